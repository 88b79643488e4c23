//! Retention in a cluster: JetStream removes nothing by itself, as it does not know what is stored. Each
//! node says how far its consumers are, in the bucket `headgate-cursors`, and any of them removes what is
//! over its age or its size and below all of these. A node that has said nothing for a day does not count
//! any more.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use headgate_bridge_nats::kv::Put;
use headgate_bridge_nats::{Bucket, BucketSettings, KvError, Nats, StreamError};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{info, warn};

use super::Shared;
use crate::config;
use crate::message::{Offset, now_micros};
use crate::time::Rfc3339;

/// The bucket.
const BUCKET: &str = "headgate-cursors";
/// For how long a node counts that says nothing more.
const NODE_AGE_MAX: Duration = Duration::from_secs(24 * 3_600);
/// How often it says so at least.
const SAY_EVERY: Duration = Duration::from_secs(3_600);
/// How often it is looked after, and how long after somebody has asked for room.
const EVERY: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_millis(200);
/// From how much of its size on the oldest goes, and how much is to be left then, in percent.
const FULL_PERCENT: (u64, u64) = (90, 80);

/// By node, from which offset on it needs the log.
type Cursors = HashMap<String, Offset>;

/// Keeps up with what the nodes say; `None` until all of it is known.
async fn watch(bucket: Bucket, cursors: Arc<Mutex<Option<Cursors>>>) {
    let mut watch = bucket.watch();
    loop {
        let update = watch.next().await;
        let mut cursors = cursors.lock().unwrap_or_else(PoisonError::into_inner);
        if update.all {
            *cursors = None;
        }
        let cursors = cursors.get_or_insert_default();
        for row in update.rows {
            let text = row.value.as_deref().and_then(|value| std::str::from_utf8(value).ok());
            match text.and_then(|text| text.parse().ok()) {
                Some(cursor) => _ = cursors.insert(row.key, cursor),
                None => _ = cursors.remove(&row.key),
            }
        }
    }
}

/// Looks after it for as long as the log is open.
pub(super) struct Retention {
    shared: Arc<Shared>,
    bucket: Bucket,
    /// What this node is called in the bucket.
    node: String,
    config: config::Log,
    /// Nothing goes for its age before, in seconds.
    stay_s: u64,
    /// What this node has said last, and when.
    said: Option<(Offset, Instant)>,
}

impl Retention {
    /// Opens the bucket.
    ///
    /// # Errors
    /// [`KvError`].
    pub(super) async fn open(
        nats: &Nats,
        replicas: usize,
        shared: Arc<Shared>,
        node: &str,
        config: config::Log,
        stay_s: u64,
    ) -> Result<Self, KvError> {
        let settings = BucketSettings { name: BUCKET.to_owned(), replicas, age_max: Some(NODE_AGE_MAX) };
        let bucket = Bucket::open(nats, &settings).await?;
        Ok(Self { shared, bucket, node: node.to_owned(), config, stay_s, said: None })
    }

    pub(super) async fn run(mut self) {
        let cursors = Arc::new(Mutex::new(None));
        // On its own, so that it gets on whatever else there is to do.
        let mut watching = JoinSet::new();
        watching.spawn(watch(self.bucket.clone(), cursors.clone()));
        let mut due = Instant::now();
        loop {
            tokio::select! {
                () = sleep_until(due) => {}
                () = self.shared.room_wanted.notified() => sleep(SOON).await,
            }
            due = Instant::now() + EVERY;
            if let Err(error) = self.say().await {
                warn!(%error, "the other nodes are not told how far the consumers of this one are");
                continue;
            }
            // Its own row may be on its way back still.
            let own = self.said.map_or(0, |(cursor, _)| cursor);
            let held =
                cursors.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|cursors: &Cursors| {
                    let others = cursors.iter().filter(|(node, _)| **node != self.node);
                    others.map(|(_, cursor)| *cursor).chain([own]).min().unwrap_or(0)
                });
            if let Some(held) = held
                && let Err(error) = self.remove(held).await
            {
                warn!(%error, "retention cannot look after the stream");
            }
        }
    }

    /// Tells the others from where on this node needs the log.
    async fn say(&mut self) -> Result<(), KvError> {
        let lowest = self.shared.holds.lowest().firmly.min(self.shared.tail.next_offset());
        if self.said.is_some_and(|(cursor, at)| cursor == lowest && at.elapsed() < SAY_EVERY) {
            return Ok(());
        }
        let put = Put { key: self.node.clone(), value: Some(lowest.to_string().into()), expected: None };
        self.bucket.put_all(&[put], None).await?;
        self.said = Some((lowest, Instant::now()));
        Ok(())
    }

    /// Removes what is over its age or size, and below `held`.
    async fn remove(&self, held: Offset) -> Result<(), StreamError> {
        let stream = &self.shared.stream;
        let state = stream.state().await?;
        self.shared.note_state(&state);
        let mut end = 0;
        if self.config.retention_s > 0 {
            let age_max_s = self.config.retention_s.max(self.stay_s);
            let age_max = i64::try_from(age_max_s.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
            let time = Rfc3339(now_micros().saturating_sub(age_max)).to_string();
            end = stream.sequence_at(&time).await?.unwrap_or(state.last + 1);
        }
        if state.bytes > self.config.retention_bytes / 100 * FULL_PERCENT.0 {
            // As if all messages were of one size.
            let excess = state.bytes - self.config.retention_bytes / 100 * FULL_PERCENT.1;
            let messages =
                u128::from(state.last + 1 - state.first) * u128::from(excess) / u128::from(state.bytes);
            end = end.max(state.first + u64::try_from(messages).unwrap_or(0));
        }
        let end = end.min(held).min(state.last + 1);
        if end <= state.first {
            return Ok(());
        }
        // Those who read behind a cursor see it themselves.
        stream.note_skipped(end).await?;
        let purged = timeout(Duration::from_secs(30), stream.purge_below(end)).await;
        purged.unwrap_or_else(|_| Err(StreamError::Away("purging takes long".to_owned())))?;
        info!(below = end, "retention removed the oldest records of the stream");
        self.shared.note_state(&stream.state().await?);
        Ok(())
    }
}
