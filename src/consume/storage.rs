//! Storage: the consumer that writes every record of the log into `records.db`.
//!
//! One thread reads the log from the sink's cursor, stores what it has read in one transaction, and
//! repeats. Far behind, transactions are as large as is useful. At the tail they are small and paced, so
//! that a record can be read back within milliseconds and a busy stream does not pay for a transaction
//! per record. `follower.rs` runs the thread.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{error, warn};

use super::follower::{Consumer, FollowerControl, FollowerProfile, NextRound};
use super::sink::sqlite::{RECORDS_FILE_NAME, SinkError, SqliteSink};
use crate::config;
use crate::log::{Hold, Log, LogReadError};
use crate::message::Offset;

/// About how much of the log one transaction takes.
const STORAGE_TRANSACTION_BYTES: usize = 8 << 20;
/// The least time between the starts of two small transactions.
const SMALL_TRANSACTION_INTERVAL_MIN: Duration = Duration::from_millis(20);
/// A transaction of fewer records than this is small.
const SMALL_TRANSACTION_RECORDS: u64 = 4096;
/// How often a transaction is synced, so that the log may remove what it holds.
const STORAGE_SYNC_INTERVAL: Duration = Duration::from_secs(1);

const STORAGE_PROFILE: FollowerProfile = FollowerProfile {
    name: "storage",
    down: "storage is failing",
    up: "storage has recovered",
    late: "storage did not finish by its deadline; the log has the rest",
    patient: true,
};

/// The running storage consumer.
pub struct StorageConsumer {
    shared: Arc<StorageProgress>,
    control: Arc<FollowerControl>,
}

/// Why storage could not start.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The database cannot be opened, or this Headgate cannot write it.
    #[error("storage: {0}")]
    Sink(#[from] SinkError),
    /// The sink is ahead of the log: the log has lost records, or is another one.
    #[error("storage: records.db holds everything up to offset {stored}, but the log ends at {log_end}")]
    LogBehind {
        /// The first offset that is not stored.
        stored: Offset,
        /// The first offset that the log does not have.
        log_end: Offset,
    },
    /// The thread could not be started.
    #[error("storage: {0}")]
    Io(#[from] std::io::Error),
}

/// Why a round of the thread failed.
#[derive(Debug, thiserror::Error)]
enum StorageRoundError {
    #[error(transparent)]
    Sink(#[from] SinkError),
    #[error(transparent)]
    Log(#[from] LogReadError),
    #[error("the log has records from {0} on and gives none")]
    NoRecords(Offset),
}

/// What the thread and those who ask about it share.
struct StorageProgress {
    cursor: watch::Sender<Offset>,
    /// The version of the rules about leaked keys that the stored records follow.
    withheld: watch::Sender<u64>,
    /// Keeps records that are not stored in the log, even after the thread has ended.
    hold: Hold,
}

impl StorageConsumer {
    /// Opens `dir/records.db` and starts the thread that follows the log into it.
    ///
    /// # Errors
    /// [`StorageError`], when storing would be wrong or impossible.
    pub fn start(
        dir: &Path,
        config: &config::StorageConfig,
        log: Arc<dyn Log>,
    ) -> Result<Self, StorageError> {
        let path = dir.join(RECORDS_FILE_NAME);
        let sink = SqliteSink::open(&path)?;
        let (stored, log_end) = (sink.cursor(), log.next_offset());
        if stored > log_end {
            return Err(StorageError::LogBehind { stored, log_end });
        }
        let shared = Arc::new(StorageProgress {
            cursor: watch::Sender::new(stored),
            withheld: watch::Sender::new(sink.withheld_version()),
            hold: log.hold(),
        });
        let control = FollowerControl::new(&STORAGE_PROFILE);
        let follower = StorageFollower {
            path,
            log: log.clone(),
            sink: Some(sink),
            shared: shared.clone(),
            synced_at: None,
            nice: Some(config.nice),
        };
        control.start(follower, log)?;
        Ok(Self { shared, control })
    }

    /// The first offset that is not stored yet.
    pub fn cursor(&self) -> Offset {
        *self.shared.cursor.borrow()
    }

    /// The present error, while storage fails.
    pub fn trouble(&self) -> Option<String> {
        self.control.trouble()
    }

    /// Returns once every record below `offset` is stored; never, if storage ends first.
    pub async fn wait_stored(&self, offset: Offset) {
        // The sender is in `self`, so that waiting does not fail.
        let _ = self.shared.cursor.subscribe().wait_for(|cursor| *cursor >= offset).await;
    }

    /// Returns once the stored records follow this version of the rules about leaked keys; never, if storage
    /// ends first.
    pub async fn wait_reconciled(&self, version: u64) {
        let _ = self.shared.withheld.subscribe().wait_for(|stored| *stored >= version).await;
    }

    /// Stores what the log already has, within the deadline, and ends the thread. The next start stores
    /// the rest.
    pub async fn stop(&self, deadline: Instant) {
        self.control.stop(deadline).await;
    }
}

impl Drop for StorageConsumer {
    /// Ends the thread after its present transaction if nobody has stopped it.
    fn drop(&mut self) {
        self.control.stop_by(Instant::now());
    }
}

/// The thread.
struct StorageFollower {
    path: PathBuf,
    log: Arc<dyn Log>,
    /// `None` after an error that leaves its state in doubt.
    sink: Option<SqliteSink>,
    shared: Arc<StorageProgress>,
    synced_at: Option<Instant>,
    /// By how much to lower the thread's priority; `None` once that is done.
    nice: Option<u8>,
}

/// What a round has done.
enum StorageRound {
    Stored { records: u64 },
    AtTail,
}

impl Consumer for StorageFollower {
    type RoundError = StorageRoundError;

    fn round(&mut self) -> Result<NextRound, StorageRoundError> {
        if let Some(nice) = self.nice.take() {
            lower_priority(nice);
        }
        let begun = Instant::now();
        let round = self.store();
        if let Err(StorageRoundError::Sink(error)) = &round
            && !error.is_clean_rollback()
        {
            self.sink = None;
        }
        Ok(match round? {
            StorageRound::AtTail => NextRound::AtTail,
            StorageRound::Stored { records } if records < SMALL_TRANSACTION_RECORDS => {
                NextRound::After(SMALL_TRANSACTION_INTERVAL_MIN.saturating_sub(begun.elapsed()))
            }
            StorageRound::Stored { .. } => NextRound::Again,
        })
    }

    fn cursor(&self) -> Offset {
        *self.shared.cursor.borrow()
    }

    /// Copies the write-ahead log into the one file, if nobody else reads it.
    fn end(self) {
        let Some(mut sink) = self.sink else { return };
        match sink.checkpoint() {
            Ok(_) => self.shared.hold.set(sink.durable_cursor()),
            Err(error) => warn!(%error, "the write-ahead log of records.db stays beside it"),
        }
    }
}

impl StorageFollower {
    /// Stores the next records of the log, as many as one transaction takes.
    fn store(&mut self) -> Result<StorageRound, StorageRoundError> {
        let sink = match &mut self.sink {
            Some(sink) => sink,
            None => self.sink.insert(SqliteSink::open(&self.path)?),
        };
        let cursor = sink.cursor();
        let sync = self.synced_at.is_none_or(|at| at.elapsed() >= STORAGE_SYNC_INTERVAL);
        let first = self.log.first_offset();
        let withheld = self.log.withheld();
        if sink.withheld_version() < withheld.version() {
            sink.reconcile(withheld)?;
            self.shared.withheld.send_replace(sink.withheld_version());
        }
        sink.set_left_out(withheld.now());
        if cursor < first {
            sink.store(std::iter::empty(), first, sync)?;
            error!(
                from = cursor,
                to = first,
                records = first - cursor,
                "records that were never stored are no longer in the log: storage goes on without them"
            );
        } else if cursor < self.log.next_offset() {
            let batches = self.log.read(cursor, STORAGE_TRANSACTION_BYTES)?;
            let Some(last) = batches.last() else { return Err(StorageRoundError::NoRecords(cursor)) };
            sink.store(batches.iter().flat_map(|batch| batch.records()), last.next_offset(), sync)?;
        } else if sync && sink.durable_cursor() < cursor {
            sink.store(std::iter::empty(), cursor, sync)?;
        } else {
            return Ok(StorageRound::AtTail);
        }
        if sync {
            self.synced_at = Some(Instant::now());
            self.shared.hold.set(sink.durable_cursor());
        }
        let stored = sink.cursor();
        self.shared.cursor.send_replace(stored);
        Ok(StorageRound::Stored { records: stored - cursor })
    }
}

/// Lowers the calling thread's priority by `nice`.
fn lower_priority(nice: u8) {
    if nice == 0 {
        return;
    }
    #[cfg(target_os = "linux")]
    {
        // SAFETY: no memory is involved. On Linux, process 0 is the calling thread.
        let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, i32::from(nice)) };
        if result != 0 {
            let error = std::io::Error::last_os_error();
            warn!(%error, nice, "the storage thread keeps its priority");
        }
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::*;
    use crate::config::{Config, Durability};
    use crate::log::{EmbeddedLog, Section};
    use crate::message::{DatasourceId, KeyId, Lease, RecordFlags, Transport, now_micros};

    const DEADLINE: Duration = Duration::from_secs(30);

    fn log_config() -> config::LogConfig {
        config::LogConfig {
            durability: Durability::Os,
            segment_bytes: 1 << 20,
            retention_bytes: 8 << 20,
            ..Config::default().log
        }
    }

    fn open_log(dir: &Path) -> Arc<dyn Log> {
        Arc::new(EmbeddedLog::open(dir, &log_config(), &Config::default().intake).expect("opens"))
    }

    fn start(dir: &Path, log: &Arc<dyn Log>) -> Result<StorageConsumer, StorageError> {
        StorageConsumer::start(
            dir,
            &config::StorageConfig { nice: 5, ..Config::default().storage },
            log.clone(),
        )
    }

    /// Appends `records` messages of 100 bytes in one commit.
    async fn append(log: &Arc<dyn Log>, records: u64) {
        let id = DatasourceId::new("press-4").expect("slug");
        let mut section = Section::new(id, KeyId([1; 6]), Lease::new(), Transport::Mqtt, 0, now_micros());
        for _ in 0..records {
            section.push("spindle/temp", &[b'1'; 100], "", b"", RecordFlags::default());
        }
        log.append(vec![section], Instant::now() + DEADLINE).await.expect("answered").expect("kept");
    }

    async fn until_stored(storage: &StorageConsumer, offset: Offset) {
        tokio::time::timeout(DEADLINE, storage.wait_stored(offset)).await.expect("stored in time");
    }

    async fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !holds() {
            assert!(begun.elapsed() < DEADLINE, "{what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The offsets that are stored, in order.
    fn offsets(dir: &Path) -> Vec<u64> {
        let connection = Connection::open(dir.join(RECORDS_FILE_NAME)).expect("opens");
        let mut statement = connection.prepare("SELECT offset FROM records ORDER BY offset").expect("reads");
        let offsets = statement.query_map([], |row| row.get::<_, i64>(0)).expect("reads");
        offsets.map(|offset| offset.expect("reads").try_into().expect("not negative")).collect()
    }

    #[tokio::test]
    async fn a_new_storage_catches_up_and_then_follows() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let log = open_log(dir.path());
        for _ in 0..20 {
            append(&log, 500).await;
        }
        let storage = start(dir.path(), &log).expect("starts");
        until_stored(&storage, 10_000).await;
        for at in 0..10 {
            append(&log, 1).await;
            until_stored(&storage, 10_001 + at).await;
        }
        assert_eq!((storage.cursor(), storage.trouble()), (10_010, None));
        assert_eq!(offsets(dir.path()), (0..10_010).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn stopped_and_dropped_and_started_again_it_stores_each_record_once() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let log = open_log(dir.path());
        for round in 1..=6 {
            append(&log, 300).await;
            let storage = start(dir.path(), &log).expect("starts");
            append(&log, 1).await;
            append(&log, 1).await;
            if round % 2 == 0 {
                storage.stop(Instant::now() + DEADLINE).await;
                assert_eq!(storage.cursor(), round * 302, "a stop within its deadline leaves nothing behind");
                assert!(storage.control.has_ended());
            } else {
                // Dropped at an arbitrary point; its thread must have ended before the next start.
                let control = storage.control.clone();
                drop(storage);
                until("the thread ends", || control.has_ended()).await;
            }
        }
        assert_eq!(offsets(dir.path()), (0..6 * 302).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_stop_leaves_everything_in_one_file() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let log = open_log(dir.path());
        append(&log, 1_000).await;
        let storage = start(dir.path(), &log).expect("starts");
        storage.stop(Instant::now() + DEADLINE).await;
        let copy = tempfile::tempdir().expect("temporary directory");
        std::fs::copy(dir.path().join(RECORDS_FILE_NAME), copy.path().join(RECORDS_FILE_NAME))
            .expect("copied");
        assert_eq!(offsets(copy.path()).len(), 1_000);
    }

    #[tokio::test]
    async fn a_lock_held_by_another_process_delays_storage_and_nothing_else() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let log = open_log(dir.path());
        let storage = start(dir.path(), &log).expect("starts");
        append(&log, 10).await;
        until_stored(&storage, 10).await;

        let other = Connection::open(dir.path().join(RECORDS_FILE_NAME)).expect("opens");
        until("the lock is had", || other.execute_batch("BEGIN EXCLUSIVE").is_ok()).await;
        append(&log, 10).await;
        until("storage says that it is locked out", || storage.trouble().is_some()).await;
        let trouble = storage.trouble().unwrap_or_default();
        assert!(trouble.contains("in use by another process"), "{trouble}");
        append(&log, 10).await;
        assert_eq!(storage.cursor(), 10);
        other.execute_batch("COMMIT").expect("lets go");

        until_stored(&storage, 30).await;
        until("the trouble is over", || storage.trouble().is_none()).await;
        assert_eq!(offsets(dir.path()), (0..30).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_stop_while_locked_out_ends_by_its_deadline_and_the_next_start_stores_the_rest() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let log = open_log(dir.path());
        let storage = start(dir.path(), &log).expect("starts");
        append(&log, 10).await;
        until_stored(&storage, 10).await;
        let other = Connection::open(dir.path().join(RECORDS_FILE_NAME)).expect("opens");
        until("the lock is had", || other.execute_batch("BEGIN EXCLUSIVE").is_ok()).await;
        append(&log, 10).await;
        let begun = Instant::now();
        storage.stop(begun + Duration::from_millis(300)).await;
        assert!(begun.elapsed() < DEADLINE / 3, "{:?}", begun.elapsed());
        until("the thread ends", || storage.control.has_ended()).await;
        assert_eq!(storage.cursor(), 10);
        drop(other);

        let storage = start(dir.path(), &log).expect("starts");
        until_stored(&storage, 20).await;
        assert_eq!(offsets(dir.path()), (0..20).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_log_that_ends_before_the_cursor_is_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let log = open_log(dir.path());
        append(&log, 10).await;
        let storage = start(dir.path(), &log).expect("starts");
        storage.stop(Instant::now() + DEADLINE).await;
        let other = tempfile::tempdir().expect("temporary directory");
        let other_log = open_log(other.path());
        append(&other_log, 9).await;
        let error = start(dir.path(), &other_log).map(drop).expect_err("the log is behind");
        assert!(matches!(error, StorageError::LogBehind { stored: 10, log_end: 9 }), "{error}");
        append(&other_log, 1).await;
        assert!(start(dir.path(), &other_log).is_ok(), "as far as the cursor is far enough");
    }

    #[tokio::test]
    async fn the_log_may_forget_what_is_stored_and_nothing_else() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let log = open_log(dir.path());
        let storage = start(dir.path(), &log).expect("starts");
        log.begin_retention();
        // Twice what the log may hold: it must remove segments, and may remove only what is stored.
        for _ in 0..160 {
            append(&log, 1_000).await;
        }
        until_stored(&storage, 160_000).await;
        assert!(log.first_offset() > 0, "segments have gone");
        assert_eq!(offsets(dir.path()), (0..160_000).collect::<Vec<_>>());

        // Without its database storage cannot restore them: it continues with what the log has left.
        storage.stop(Instant::now() + DEADLINE).await;
        let empty = tempfile::tempdir().expect("temporary directory");
        let storage = start(empty.path(), &log).expect("starts");
        until_stored(&storage, 160_000).await;
        assert_eq!(offsets(empty.path()), (log.first_offset()..160_000).collect::<Vec<_>>());
    }
}
