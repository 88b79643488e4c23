//! Retention in a cluster: JetStream removes nothing by itself, as it does not know what is stored. Each
//! node publishes how far its consumers are in the bucket `headgate-cursors`. Any node removes records
//! that are over the age or the size and below all cursors. A node that has published nothing for a day
//! no longer counts.
//!
//! A stream that is at `log.retention_bytes` refuses messages, which intake reports as a transient error. So
//! retention starts below that size, and also whenever an append has found the stream full.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use headgate_bridge_nats::kv::KvPut;
use headgate_bridge_nats::{KvBucket, KvBucketSettings, KvError, KvWrites, Nats, StreamError};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{info, warn};

use super::JetstreamLogShared;
use crate::config;
use crate::message::Offset;
use crate::time::{Rfc3339, cluster_micros};

/// The name of the bucket.
const CURSORS_BUCKET_NAME: &str = "headgate-cursors";
/// How long a silent node still counts.
const NODE_AGE_MAX: Duration = Duration::from_secs(24 * 3_600);
/// The longest time after which a node publishes its cursor again, even if it has not moved.
const CURSOR_ANNOUNCE_INTERVAL: Duration = Duration::from_secs(3_600);
/// How often retention runs, and how soon after an append has asked for room.
const RETENTION_INTERVAL: Duration = Duration::from_secs(5);
const RETENTION_WANTED_DELAY: Duration = Duration::from_millis(200);
/// Removal starts above the first percentage of the size and goes down to the second.
const RETENTION_FULL_PERCENT: (u64, u64) = (90, 80);

/// What the bucket is to be like.
pub(super) fn cursors_bucket_settings(replicas: usize) -> KvBucketSettings {
    let (name, writes) = (CURSORS_BUCKET_NAME.to_owned(), KvWrites::Batched);
    KvBucketSettings { name, replicas, age_max: Some(NODE_AGE_MAX), writes }
}

/// The offset from which on each node needs the log.
type NodeCursors = HashMap<String, Offset>;

/// Watches the cursors of all nodes; `None` until all of them are known.
async fn watch_cursors(bucket: KvBucket, cursors: Arc<Mutex<Option<NodeCursors>>>) {
    let mut watch = bucket.watch();
    loop {
        let update = watch.next().await;
        let mut cursors = cursors.lock();
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

/// The retention task: runs for as long as the log is open.
pub(super) struct StreamRetention {
    shared: Arc<JetstreamLogShared>,
    bucket: KvBucket,
    /// This node's key in the bucket.
    node: String,
    config: config::LogConfig,
    /// The least age at which a record may be removed for its age, in seconds.
    stay_s: u64,
    /// The cursor that this node published last, and when.
    said: Option<(Offset, Instant)>,
}

impl StreamRetention {
    /// Opens the bucket.
    ///
    /// # Errors
    /// [`KvError`].
    pub(super) async fn open(
        nats: &Nats,
        replicas: usize,
        shared: Arc<JetstreamLogShared>,
        node: &str,
        config: config::LogConfig,
        stay_s: u64,
    ) -> Result<Self, KvError> {
        let bucket = KvBucket::open(nats, &cursors_bucket_settings(replicas)).await?;
        Ok(Self { shared, bucket, node: node.to_owned(), config, stay_s, said: None })
    }

    pub(super) async fn run(mut self) {
        let cursors = Arc::new(Mutex::new(None));
        // A separate task, so that slow removals do not hold it up.
        let mut watching = JoinSet::new();
        watching.spawn(watch_cursors(self.bucket.clone(), cursors.clone()));
        let mut due = Instant::now();
        loop {
            tokio::select! {
                () = sleep_until(due) => {}
                () = self.shared.room_wanted.notified() => sleep(RETENTION_WANTED_DELAY).await,
            }
            due = Instant::now() + RETENTION_INTERVAL;
            if self.shared.gate.is_in_doubt() {
                continue;
            }
            if let Err(error) = self.announce_cursor().await {
                warn!(%error, "retention cannot tell the other nodes how far this node's consumers are");
                // What they were told last is no higher, and holds: where there is no room to write, only removing makes some.
                if self.said.is_none() {
                    continue;
                }
            }
            // This node's row may not have come back yet, so its own value counts.
            let own = self.said.map_or(0, |(cursor, _)| cursor);
            let held = cursors.lock().as_ref().map(|cursors: &NodeCursors| {
                let others = cursors.iter().filter(|(node, _)| **node != self.node);
                others.map(|(_, cursor)| *cursor).chain([own]).min().unwrap_or(0)
            });
            if let Some(held) = held
                && let Err(error) = self.remove_expired(held).await
            {
                warn!(%error, "retention cannot remove records from the stream");
            }
        }
    }

    /// Publishes the offset from which on this node needs the log.
    async fn announce_cursor(&mut self) -> Result<(), KvError> {
        let lowest = self.shared.holds.lowest().firmly.min(self.shared.tail.next_offset());
        if self.said.is_some_and(|(cursor, at)| cursor == lowest && at.elapsed() < CURSOR_ANNOUNCE_INTERVAL) {
            return Ok(());
        }
        let put = KvPut { key: self.node.clone(), value: Some(lowest.to_string().into()), expected: None };
        self.bucket.put_all(&[put], None).await?;
        self.said = Some((lowest, Instant::now()));
        Ok(())
    }

    /// Removes records that are over the age or the size, and below `held`.
    async fn remove_expired(&self, held: Offset) -> Result<(), StreamError> {
        let stream = &self.shared.stream;
        let state = stream.state().await?;
        self.shared.note_state(&state);
        let mut end = 0;
        if self.config.retention_s > 0 {
            let age_max_s = self.config.retention_s.max(self.stay_s);
            let age_max = i64::try_from(age_max_s.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
            let time = Rfc3339(cluster_micros().saturating_sub(age_max)).to_string();
            end = stream.sequence_at(&time).await?.unwrap_or(state.last + 1);
        }
        if state.bytes > self.config.retention_bytes / 100 * RETENTION_FULL_PERCENT.0 {
            // An estimate: it assumes that all messages have the same size.
            let excess = state.bytes - self.config.retention_bytes / 100 * RETENTION_FULL_PERCENT.1;
            let messages =
                u128::from(state.last + 1 - state.first) * u128::from(excess) / u128::from(state.bytes);
            end = end.max(state.first + u64::try_from(messages).unwrap_or(0));
        }
        let end = end.min(held).min(state.last + 1);
        if end <= state.first {
            return Ok(());
        }
        // Shared places cannot see the removal themselves; readers with a cursor can.
        stream.note_skipped(end).await?;
        let purged = timeout(Duration::from_secs(30), stream.purge_below(end)).await;
        purged.unwrap_or_else(|_| Err(StreamError::Away("purging takes long".to_owned())))?;
        info!(below = end, "retention removed the oldest records of the stream");
        self.shared.note_state(&stream.state().await?);
        Ok(())
    }
}
