//! The rolls of groups: which of them the sessions have that stay without their connections. One task writes
//! them, so that what is said of a session last is what stays.

use std::collections::HashMap;
use std::future::Future;

use bytes::Bytes;
use futures_util::future::join_all;
use headgate_bridge_nats::{CellError, Cells};
use tokio::sync::{mpsc, oneshot};

/// Changes that are written at once.
const AT_ONCE: usize = 256;

/// The rolls. Cheap to clone; the task ends after the last clone is gone.
#[derive(Clone)]
pub struct GroupRolls {
    cells: Cells,
    changes: mpsc::UnboundedSender<Change>,
}

/// A session is on a roll from now on, or is not.
struct Change {
    key: String,
    is_on: bool,
    written: Written,
}

type Written = oneshot::Sender<Result<(), CellError>>;

impl GroupRolls {
    /// In this bucket. Needs a runtime.
    pub fn start(cells: Cells) -> Self {
        let (changes, told) = mpsc::unbounded_channel();
        tokio::spawn(write(cells.clone(), told));
        Self { cells, changes }
    }

    /// Enters a session, or says that it still is there: at once, behind what was said before. The future
    /// resolves when that is written, which it is also if it is dropped.
    ///
    /// # Errors
    /// [`CellError::Away`].
    pub fn enter(&self, group: &str, uid: u64) -> impl Future<Output = Result<(), CellError>> + use<> {
        self.change(group, uid, true)
    }

    /// Strikes a session off, as [`GroupRolls::enter`].
    ///
    /// # Errors
    /// [`CellError::Away`].
    pub fn strike(&self, group: &str, uid: u64) -> impl Future<Output = Result<(), CellError>> + use<> {
        self.change(group, uid, false)
    }

    /// Whether there is none.
    ///
    /// # Errors
    /// [`CellError::Away`].
    pub async fn is_empty(&self, group: &str) -> Result<bool, CellError> {
        Ok(!self.cells.any_below(&format!("group.{group}")).await?)
    }

    fn change(
        &self,
        group: &str,
        uid: u64,
        is_on: bool,
    ) -> impl Future<Output = Result<(), CellError>> + use<> {
        let (written, result) = oneshot::channel();
        let key = format!("group.{group}.{uid:016x}");
        let _ = self.changes.send(Change { key, is_on, written });
        async move {
            result.await.unwrap_or_else(|_| Err(CellError::Away("the gateway is shutting down".to_owned())))
        }
    }
}

async fn write(cells: Cells, mut changes: mpsc::UnboundedReceiver<Change>) {
    let mut waiting = Vec::new();
    while changes.recv_many(&mut waiting, AT_ONCE).await > 0 {
        // Of one session the last counts.
        let mut last: HashMap<String, (bool, Vec<Written>)> = HashMap::new();
        for Change { key, is_on, written } in waiting.drain(..) {
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
