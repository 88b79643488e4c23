//! Storage with a log of its own: what it stores, when it cannot, and what it leaves behind.

use std::time::Duration;

use rusqlite::Connection;

use std::path::Path;

use super::sqlite_place::SqlitePlace;
use super::*;
use crate::config::{self, Config, Durability};
use crate::consume::sink::sqlite::RECORDS_FILE_NAME;
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
    StorageConsumer::start(Box::new(SqlitePlace::new(dir, true, Arc::default())), 5, log.clone())
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
    std::fs::copy(dir.path().join(RECORDS_FILE_NAME), copy.path().join(RECORDS_FILE_NAME)).expect("copied");
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
async fn another_log_that_ends_before_the_cursor_is_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let log = open_log(dir.path());
    append(&log, 10).await;
    let storage = start(dir.path(), &log).expect("starts");
    storage.stop(Instant::now() + DEADLINE).await;
    let other = tempfile::tempdir().expect("temporary directory");
    let other_log = open_log(other.path());
    append(&other_log, 9).await;
    let error = start(dir.path(), &other_log).map(drop).expect_err("the log is behind");
    assert!(matches!(error, StorageError::LogBehind { stored: 10, log_end: 9, .. }), "{error}");
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

    // Marks of what the log has no longer go at the next start.
    storage.stop(Instant::now() + DEADLINE).await;
    let by_hand = Connection::open(dir.path().join(RECORDS_FILE_NAME)).expect("opens");
    by_hand.execute("INSERT INTO marks VALUES (0), (159999)", []).expect("written");
    let storage = start(dir.path(), &log).expect("starts");
    let marks: String =
        by_hand.query_row("SELECT group_concat(offset) FROM marks", [], |row| row.get(0)).expect("reads");
    assert_eq!(marks, "159999");
    drop(by_hand);

    // Without its database storage cannot restore them: it continues with what the log has left.
    storage.stop(Instant::now() + DEADLINE).await;
    let empty = tempfile::tempdir().expect("temporary directory");
    let storage = start(empty.path(), &log).expect("starts");
    until_stored(&storage, 160_000).await;
    assert_eq!(offsets(empty.path()), (log.first_offset()..160_000).collect::<Vec<_>>());
}
