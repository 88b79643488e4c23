//! The rolls of groups: which sessions that outlive their connections are in which group. One task writes
//! them, so that the last change of a session's entry takes effect last.

use std::collections::HashMap;
use std::future::Future;

use bytes::Bytes;
use futures_util::future::join_all;
use headgate_bridge_nats::{KvBucket, KvError};
use tokio::sync::{mpsc, oneshot};

/// How many changes are written at once, at most.
const ROLL_CHANGES_PER_WRITE_MAX: usize = 256;

/// The rolls. Cheap to clone; the task ends after the last clone is dropped.
#[derive(Clone)]
pub struct GroupRolls {
    cells: KvBucket,
    changes: mpsc::UnboundedSender<RollChange>,
}

/// An entry or removal of a session in a roll.
struct RollChange {
    key: String,
    is_on: bool,
    written: RollWrittenSender,
}

type RollWrittenSender = oneshot::Sender<Result<(), KvError>>;

impl GroupRolls {
    /// Starts the task that writes rolls to this bucket. Needs a runtime.
    pub fn start(cells: KvBucket) -> Self {
        let (changes, told) = mpsc::unbounded_channel();
        tokio::spawn(write_rolls(cells.clone(), told));
        Self { cells, changes }
    }

    /// Enters a session or renews its entry. Queued at once, behind earlier changes. The future resolves when
    /// the entry is written, which happens even if the future is dropped.
    ///
    /// # Errors
    /// [`KvError::Away`].
    pub fn enter(&self, group: &str, uid: u64) -> impl Future<Output = Result<(), KvError>> + use<> {
        self.change(group, uid, true)
    }

    /// Removes a session from the roll, in the way of [`GroupRolls::enter`].
    ///
    /// # Errors
    /// [`KvError::Away`].
    pub fn strike(&self, group: &str, uid: u64) -> impl Future<Output = Result<(), KvError>> + use<> {
        self.change(group, uid, false)
    }

    /// Whether the group's roll has no session.
    ///
    /// # Errors
    /// [`KvError::Away`].
    pub async fn is_empty(&self, group: &str) -> Result<bool, KvError> {
        Ok(!self.cells.has_any_below(&format!("group.{group}")).await?)
    }

    fn change(
        &self,
        group: &str,
        uid: u64,
        is_on: bool,
    ) -> impl Future<Output = Result<(), KvError>> + use<> {
        let (written, result) = oneshot::channel();
        let key = format!("group.{group}.{uid:016x}");
        let _ = self.changes.send(RollChange { key, is_on, written });
        async move {
            result.await.unwrap_or_else(|_| Err(KvError::Away("the gateway is shutting down".to_owned())))
        }
    }
}

async fn write_rolls(cells: KvBucket, mut changes: mpsc::UnboundedReceiver<RollChange>) {
    let mut waiting = Vec::new();
    while changes.recv_many(&mut waiting, ROLL_CHANGES_PER_WRITE_MAX).await > 0 {
        // The last change of each session counts.
        let mut last: HashMap<String, (bool, Vec<RollWrittenSender>)> = HashMap::new();
        for RollChange { key, is_on, written } in waiting.drain(..) {
            let change = last.entry(key).or_default();
            change.0 = is_on;
            change.1.push(written);
        }
        let writes = last.into_iter().map(async |(key, (is_on, waiting))| {
            let result = match is_on {
                true => cells.put(&key, Bytes::from_static(b"on"), None, None).await.map(|_| ()),
                false => cells.remove(&key).await,
            };
            for written in waiting {
                let _ = written.send(result.clone());
            }
        });
        join_all(writes).await;
    }
}
