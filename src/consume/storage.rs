//! Storage: the consumer that every record goes through, on its way from the log into
//! `records.db`.
//!
//! One thread reads what the log has behind the sink's cursor, stores it in one transaction, and
//! begins again. Far behind, transactions are as big as is useful; at the tail they are small and
//! paced, so that a record can be read back within milliseconds and a busy stream does not pay
//! for a transaction per record. Whatever goes wrong, the log keeps the records: the thread says
//! what the trouble is and tries again until it is over, and no acknowledgement waits for it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{error, info, warn};

use super::sink::sqlite::{FILE_NAME, SinkError, SqliteSink};
use crate::config;
use crate::log::{Log, ReadError};
use crate::message::Offset;

/// What one transaction takes from the log, about.
const TRANSACTION_BYTES: usize = 8 << 20;
/// The least time from the beginning of one small transaction to that of the next.
const PACE: Duration = Duration::from_millis(20);
/// A transaction of fewer records is small.
const SMALL_RECORDS: u64 = 4096;
/// How often transactions are synced, so that the log may forget what they hold.
const SYNC_EVERY: Duration = Duration::from_secs(1);
/// How long the thread waits for the log before it looks whether it is to stop.
const WAIT_SLICE: Duration = Duration::from_millis(50);
/// After trouble: the first wait before the next attempt, doubled each time up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// The running storage consumer.
pub struct Storage {
    shared: Arc<Shared>,
}

/// Why storage could not start.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The database: it cannot be opened, or is not one that this Headgate can write.
    #[error("storage: {0}")]
    Sink(#[from] SinkError),
    /// The sink is further than the log: the log has lost records, or is another one.
    #[error("storage: records.db holds everything up to offset {stored}, but the log ends at {log_end}")]
    LogBehind {
        /// The first offset that is not stored.
        stored: Offset,
        /// The first offset that the log does not have.
        log_end: Offset,
    },
    /// The thread.
    #[error("storage: {0}")]
    Io(#[from] std::io::Error),
}

/// Why a round of the thread brought nothing.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Sink(#[from] SinkError),
    #[error(transparent)]
    Log(#[from] ReadError),
    #[error("the log has records from {0} on and gives none")]
    Nothing(Offset),
}

/// What the thread and those who ask about it share.
struct Shared {
    cursor: watch::Sender<Offset>,
    ended: watch::Sender<bool>,
    trouble: Mutex<Option<String>>,
    /// When the thread has to have ended, once it is to end.
    stop: Mutex<Option<Instant>>,
    stop_changed: Condvar,
}

impl Storage {
    /// Opens `dir/records.db` and starts the thread that follows the log into it.
    ///
    /// # Errors
    /// [`StorageError`], when it would be wrong or impossible to store anything.
    pub fn start(dir: &Path, config: &config::Storage, log: Log) -> Result<Self, StorageError> {
        let path = dir.join(FILE_NAME);
        let sink = SqliteSink::open(&path)?;
        let (stored, log_end) = (sink.cursor(), log.next_offset());
        if stored > log_end {
            return Err(StorageError::LogBehind { stored, log_end });
        }
        let shared = Arc::new(Shared {
            cursor: watch::Sender::new(stored),
            ended: watch::Sender::new(false),
            trouble: Mutex::default(),
            stop: Mutex::default(),
            stop_changed: Condvar::new(),
        });
        let follower = Follower { path, log, sink: Some(sink), shared: shared.clone(), synced_at: None };
        let nice = config.nice;
        std::thread::Builder::new().name("storage".to_owned()).spawn(move || {
            lower_priority(nice);
            follower.run();
        })?;
        Ok(Self { shared })
    }

    /// The first offset that is not stored yet.
    pub fn cursor(&self) -> Offset {
        *self.shared.cursor.borrow()
    }

    /// Why storage does not get on, while it does not.
    pub fn trouble(&self) -> Option<String> {
        lock(&self.shared.trouble).clone()
    }

    /// Returns once every record below `offset` is stored. Never, if storage ends before.
    pub async fn stored(&self, offset: Offset) {
        // The sender is in `self`, so that waiting does not fail.
        let _ = self.shared.cursor.subscribe().wait_for(|cursor| *cursor >= offset).await;
    }

    /// Stores what is in the log already, within the deadline, and ends the thread. What was not
    /// stored by then is stored after the next start.
    pub async fn stop(&self, deadline: Instant) {
        self.shared.stop_by(deadline);
        let mut ended = self.shared.ended.subscribe();
        let ended = ended.wait_for(|ended| *ended);
        if tokio::time::timeout_at(deadline.into(), ended).await.is_err() {
            warn!(
                cursor = self.cursor(),
                "storage has not ended by its deadline; what is missing stays in the log"
            );
        }
    }
}

impl Drop for Storage {
    /// The thread of a storage that nobody stopped ends after its present transaction.
    fn drop(&mut self) {
        self.shared.stop_by(Instant::now());
    }
}

impl Shared {
    fn stop_by(&self, deadline: Instant) {
        let mut stop = lock(&self.stop);
        *stop = Some(stop.map_or(deadline, |earlier| earlier.min(deadline)));
        self.stop_changed.notify_all();
    }

    fn stop(&self) -> Option<Instant> {
        *lock(&self.stop)
    }

    /// Waits for `time`, or until storage is to stop.
    fn pause(&self, time: Duration) {
        let running = |stop: &mut Option<Instant>| stop.is_none();
        let _ = self.stop_changed.wait_timeout_while(lock(&self.stop), time, running);
    }

    /// Takes note of trouble, or of its end, and says so when that is news.
    fn set_trouble(&self, trouble: Option<String>, cursor: Offset) {
        let mut current = lock(&self.trouble);
        if *current == trouble {
            return;
        }
        match &trouble {
            Some(trouble) => error!(cursor, "storage does not get on: {trouble}"),
            None => info!(cursor, "storage gets on again"),
        }
        *current = trouble;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread.
struct Follower {
    path: PathBuf,
    log: Log,
    /// Absent after an error that leaves its state in doubt.
    sink: Option<SqliteSink>,
    shared: Arc<Shared>,
    synced_at: Option<Instant>,
}

/// What a round has done.
enum Round {
    Stored { records: u64 },
    AtTail,
}

impl Follower {
    fn run(mut self) {
        let _ended = Ended(self.shared.clone());
        let mut retry = RETRY.0;
        loop {
            let stop = self.shared.stop();
            if stop.is_some_and(|deadline| deadline <= Instant::now()) {
                break;
            }
            let begun = Instant::now();
            match self.round() {
                Ok(round) => {
                    retry = RETRY.0;
                    self.shared.set_trouble(None, *self.shared.cursor.borrow());
                    match round {
                        Round::AtTail if stop.is_some() => break,
                        Round::AtTail => self.log.wait_blocking(*self.shared.cursor.borrow(), WAIT_SLICE),
                        Round::Stored { records } if records < SMALL_RECORDS => {
                            self.shared.pause(PACE.saturating_sub(begun.elapsed()));
                        }
                        Round::Stored { .. } => {}
                    }
                }
                Err(trouble) => {
                    let cursor = *self.shared.cursor.borrow();
                    self.shared.set_trouble(Some(trouble.to_string()), cursor);
                    if let Trouble::Sink(error) = trouble
                        && !error.leaves_all_as_it_was()
                    {
                        self.sink = None;
                    }
                    // A pause ends at once when storage is to stop, and here something is waited for.
                    if stop.is_some() {
                        std::thread::sleep(RETRY.0)
                    } else {
                        self.shared.pause(retry)
                    }
                    retry = (retry * 2).min(RETRY.1);
                }
            }
        }
        self.end();
    }

    /// Stores what the log has behind the cursor, as much as goes in one transaction.
    fn round(&mut self) -> Result<Round, Trouble> {
        let sink = match &mut self.sink {
            Some(sink) => sink,
            None => self.sink.insert(SqliteSink::open(&self.path)?),
        };
        let cursor = sink.cursor();
        let sync = self.synced_at.is_none_or(|at| at.elapsed() >= SYNC_EVERY);
        let first = self.log.first_offset();
        if cursor < first {
            sink.store(std::iter::empty(), first, sync)?;
            error!(
                from = cursor,
                to = first,
                records = first - cursor,
                "records that were never stored are no longer in the log: storage goes on without them"
            );
        } else if cursor < self.log.next_offset() {
            let batches = self.log.read(cursor, TRANSACTION_BYTES)?;
            let Some(last) = batches.last() else { return Err(Trouble::Nothing(cursor)) };
            sink.store(batches.iter().flat_map(|batch| batch.records()), last.next_offset(), sync)?;
        } else if sync && sink.durable_cursor() < cursor {
            sink.store(std::iter::empty(), cursor, sync)?;
        } else {
            return Ok(Round::AtTail);
        }
        if sync {
            self.synced_at = Some(Instant::now());
            self.log.set_stored(sink.durable_cursor());
        }
        let stored = sink.cursor();
        self.shared.cursor.send_replace(stored);
        Ok(Round::Stored { records: stored - cursor })
    }

    /// Leaves everything in the one file, if there is time and nobody else reads it.
    fn end(self) {
        let Some(mut sink) = self.sink else { return };
        match sink.checkpoint() {
            Ok(_) => self.log.set_stored(sink.durable_cursor()),
            Err(error) => warn!(%error, "the write-ahead log of records.db stays beside it"),
        }
    }
}

/// Says that the thread has ended, also when it has panicked.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let cursor = *self.0.cursor.borrow();
            self.0.set_trouble(Some("storage has ended by a panic, and needs a restart".to_owned()), cursor);
        }
        self.0.ended.send_replace(true);
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
    use crate::log::Section;
    use crate::message::{DatasourceId, KeyId, Lease, RecordFlags, Transport, now_micros};

    const DEADLINE: Duration = Duration::from_secs(30);

    fn log_config() -> config::Log {
        config::Log {
            durability: Durability::Os,
            segment_bytes: 1 << 20,
            retention_bytes: 8 << 20,
            ..Config::default().log
        }
    }

    fn open_log(dir: &Path) -> Log {
        Log::open(dir, &log_config()).expect("opens")
    }

    fn start(dir: &Path, log: &Log) -> Result<Storage, StorageError> {
        Storage::start(dir, &config::Storage { nice: 5, ..Config::default().storage }, log.clone())
    }

    /// Appends `records` messages of 100 bytes in one commit.
    async fn append(log: &Log, records: u64) {
        let id = DatasourceId::new("press-4").expect("slug");
        let mut section = Section::new(id, KeyId([1; 6]), Lease::new(), Transport::Mqtt, now_micros());
        for _ in 0..records {
            section.push("spindle/temp", &[b'1'; 100], "", b"", RecordFlags::default());
        }
        log.append(vec![section], Instant::now() + DEADLINE).await.expect("answered").expect("kept");
    }

    async fn until_stored(storage: &Storage, offset: Offset) {
        tokio::time::timeout(DEADLINE, storage.stored(offset)).await.expect("stored in time");
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
        let connection = Connection::open(dir.join(FILE_NAME)).expect("opens");
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
                assert!(*storage.shared.ended.borrow());
            } else {
                // Dropped at whatever point it has reached; its thread must be gone before the next.
                let shared = storage.shared.clone();
                drop(storage);
                until("the thread ends", || *shared.ended.borrow()).await;
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
        std::fs::copy(dir.path().join(FILE_NAME), copy.path().join(FILE_NAME)).expect("copied");
        assert_eq!(offsets(copy.path()).len(), 1_000);
    }

    #[tokio::test]
    async fn a_lock_held_by_another_process_delays_storage_and_nothing_else() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let log = open_log(dir.path());
        let storage = start(dir.path(), &log).expect("starts");
        append(&log, 10).await;
        until_stored(&storage, 10).await;

        let other = Connection::open(dir.path().join(FILE_NAME)).expect("opens");
        until("the lock is had", || other.execute_batch("BEGIN EXCLUSIVE").is_ok()).await;
        append(&log, 10).await;
        until("storage says that it is locked out", || storage.trouble().is_some()).await;
        let trouble = storage.trouble().unwrap_or_default();
        assert!(trouble.contains("locked by another process"), "{trouble}");
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
        let other = Connection::open(dir.path().join(FILE_NAME)).expect("opens");
        until("the lock is had", || other.execute_batch("BEGIN EXCLUSIVE").is_ok()).await;
        append(&log, 10).await;
        let begun = Instant::now();
        storage.stop(begun + Duration::from_millis(300)).await;
        assert!(begun.elapsed() < DEADLINE / 3, "{:?}", begun.elapsed());
        until("the thread ends", || *storage.shared.ended.borrow()).await;
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
        // Twice what the log may take: it has to let go of segments, and may only as it is told.
        for _ in 0..160 {
            append(&log, 1_000).await;
        }
        until_stored(&storage, 160_000).await;
        assert!(log.first_offset() > 0, "segments have gone");
        assert_eq!(offsets(dir.path()), (0..160_000).collect::<Vec<_>>());

        // A database that was taken away does not bring them back: storage goes on with what is left.
        storage.stop(Instant::now() + DEADLINE).await;
        let empty = tempfile::tempdir().expect("temporary directory");
        let storage = start(empty.path(), &log).expect("starts");
        until_stored(&storage, 160_000).await;
        assert_eq!(offsets(empty.path()), (log.first_offset()..160_000).collect::<Vec<_>>());
    }
}
