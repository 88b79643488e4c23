//! `records.db` after kills, failures and on a full disk, and what others see of it.

use std::path::PathBuf;

use super::*;
use crate::consume::testing::record;
use crate::limits::GATHERED_KEYS_MAX;

const PAYLOAD: &[u8] = b"{\"t\": 21.5}";

fn open(dir: &Path) -> SqliteSink {
    SqliteSink::open(&dir.join(RECORDS_FILE_NAME)).expect("opens")
}

/// What a reader finds: the offsets, and the cursor.
fn content(dir: &Path) -> (Vec<Offset>, Offset) {
    let connection = Connection::open(dir.join(RECORDS_FILE_NAME)).expect("opens");
    let mut statement = connection.prepare("SELECT offset FROM records ORDER BY offset").expect("reads");
    let offsets = statement.query_map([], |row| row.get(0).map(offset_from_sql)).expect("reads");
    let offsets = offsets.map(|offset| offset.expect("reads")).collect();
    let cursor = connection.query_row("SELECT next_offset FROM cursor", [], |row| row.get(0));
    (offsets, offset_from_sql(cursor.expect("reads")))
}

/// A copy of the files as a kill at this moment would leave them.
fn copy_as_killed(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("temporary directory");
    for file in std::fs::read_dir(dir).expect("readable") {
        let file = file.expect("readable");
        std::fs::copy(file.path(), copy.path().join(file.file_name())).expect("copied");
    }
    copy
}

#[test]
fn a_kill_at_any_record_leaves_whole_transactions_and_the_rest_arrives_exactly_once() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    let mut killed = Vec::new();
    for batch in 0..4_u64 {
        let (from, to) = (batch * 25, (batch + 1) * 25);
        let records = (from..to).map(|offset| {
            killed.push((copy_as_killed(dir.path()), from));
            record(offset, "press-4", "spindle", PAYLOAD)
        });
        sink.store(records, to, batch % 2 == 0).expect("stored");
        killed.push((copy_as_killed(dir.path()), to));
    }
    for (dir, stored) in killed {
        let mut sink = open(dir.path());
        assert_eq!(sink.cursor(), stored);
        // The log gives a batch that begins below the cursor.
        let records = (0..100).map(|offset| record(offset, "press-4", "spindle", PAYLOAD));
        sink.store(records, 100, true).expect("stored");
        drop(sink);
        assert_eq!(content(dir.path()), ((0..100).collect(), 100));
    }
}

#[test]
fn more_topics_and_keys_than_are_gathered_at_once_are_stored_as_any_others() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    let topics: Vec<String> = (0..GATHERED_KEYS_MAX / 2).map(|n| format!("t/{n}")).collect();
    // Each topic comes again when it was written already.
    let records = (0_u64..).zip(topics.iter().chain(&topics).chain(&topics)).map(|(offset, topic)| {
        record(
            offset,
            "press-4",
            topic,
            if offset % 2 == 0 { br#"{"a": 1, "b": 2}"# } else { br#"{"a": 3}"# },
        )
    });
    let records: Vec<_> = records.collect();
    let end = records.len() as u64;
    sink.store(records.into_iter(), end, false).expect("stored");
    let connection = Connection::open(dir.path().join(RECORDS_FILE_NAME)).expect("opens");
    let count = |sql: &str| {
        let count = connection.query_row(sql, [], |row| row.get::<_, i64>(0)).expect("a count");
        usize::try_from(count).expect("not negative")
    };
    let half = topics.len() / 2;
    assert_eq!(count("SELECT count(*) FROM records"), 3 * topics.len());
    assert_eq!(count("SELECT count(*) FROM samples"), 3 * (2 * half + half));
    assert_eq!(count("SELECT count(*) FROM latest"), 2 * half + half);
    let newest = 2 * topics.len();
    assert_eq!(count(&format!("SELECT count(*) FROM latest WHERE offset >= {newest}")), 2 * half + half);
}

#[test]
fn a_transaction_that_fails_leaves_nothing_behind_and_gives_no_numbers() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    sink.store([record(0, "press-4", "a", PAYLOAD)].into_iter(), 1, false).expect("stored");
    // A repeated offset is a constraint violation in the middle of the transaction.
    let broken = [record(1, "press-5", "b", PAYLOAD), record(1, "press-6", "c", PAYLOAD)];
    let error = sink.store(broken.into_iter(), 2, false).expect_err("twice the same offset");
    assert!(!error.is_clean_rollback(), "{error}");
    assert_eq!(sink.cursor(), 1);
    assert_eq!(content(dir.path()), (vec![0], 1));

    // The ids of press-5 and b were rolled back with it.
    let good = [record(1, "press-7", "d", PAYLOAD), record(2, "press-5", "b", PAYLOAD)];
    sink.store(good.into_iter(), 3, false).expect("stored");
    let connection = Connection::open(dir.path().join(RECORDS_FILE_NAME)).expect("opens");
    let mut statement =
        connection.prepare("SELECT datasource, topic FROM records ORDER BY offset").expect("reads");
    let names = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).expect("reads");
    let names: Vec<(String, String)> = names.map(|names| names.expect("reads")).collect();
    let expected = [("press-4", "a"), ("press-7", "d"), ("press-5", "b")];
    assert_eq!(names, expected.map(|(datasource, topic)| (datasource.to_owned(), topic.to_owned())));
}

#[test]
fn a_full_disk_takes_nothing_until_there_is_room_again() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    let pages: i64 = sink.connection.query_row("PRAGMA page_count", [], |row| row.get(0)).expect("reads");
    sink.connection.pragma_update(None, "max_page_count", pages + 4).expect("bounded");
    let payload = vec![b'x'; 100_000];
    let records = || (0..3).map(|offset| record(offset, "press-4", "a", &payload));
    let error = sink.store(records(), 3, true).expect_err("no room");
    assert!(matches!(error, SinkError::Database(SqliteError::Full { .. })), "{error}");
    assert!(error.is_clean_rollback());
    assert_eq!((sink.cursor(), sink.durable_cursor()), (0, 0));
    assert_eq!(content(dir.path()), (vec![], 0));

    sink.connection.pragma_update(None, "max_page_count", 1_000_000).expect("unbounded");
    sink.store(records(), 3, true).expect("room");
    assert_eq!(content(dir.path()), (vec![0, 1, 2], 3));
}

#[test]
fn only_a_synced_cursor_is_durable() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    let mut store = |offset, sync| {
        sink.store([record(offset, "press-4", "a", PAYLOAD)].into_iter(), offset + 1, sync).expect("stored");
        sink.durable_cursor()
    };
    assert_eq!([store(0, false), store(1, true), store(2, false)], [0, 2, 2]);
    assert!(sink.checkpoint().expect("nobody reads"));
    assert_eq!(sink.durable_cursor(), 3);
    drop(sink);
    assert_eq!(open(dir.path()).durable_cursor(), 0, "unknown until something is synced");
}

#[test]
fn a_payload_is_text_where_tools_can_show_it_and_a_blob_where_not() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    let payloads: [(&[u8], &str); 5] = [
        (b"21.5", "text"),
        (b"", "text"),
        ("°C".as_bytes(), "text"),
        (b"\xff\xfe", "blob"),
        (b"a\0b", "blob"),
    ];
    let records =
        payloads.iter().zip(0..).map(|((payload, _), offset)| record(offset, "press-4", "a", payload));
    sink.store(records, 5, false).expect("stored");
    let connection = Connection::open(dir.path().join(RECORDS_FILE_NAME)).expect("opens");
    for ((payload, kind), offset) in payloads.into_iter().zip(0_i64..) {
        let (found, stored): (String, Vec<u8>) = connection
            .query_row(
                "SELECT typeof(payload), CAST(payload AS BLOB) FROM records WHERE offset = ?1",
                [offset],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )
            .expect("is there");
        assert_eq!((found.as_str(), stored.as_slice()), (kind, payload), "offset {offset}");
    }
}

#[test]
fn the_sqlite3_command_reads_while_the_sink_is_open() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    let mut first = record(0, "press-4", "spindle/temp", PAYLOAD);
    first.content_type = "application/json";
    let mut second = record(1, "press-4", "note", b"hello");
    second.event_at = Some(-1);
    sink.store([first, second].into_iter(), 2, false).expect("stored");
    let sqlite3 = |sql: &str| {
        let path: PathBuf = dir.path().join(RECORDS_FILE_NAME);
        let output = std::process::Command::new("sqlite3").arg(path).arg(sql).output();
        let output = output.expect("the sqlite3 command is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    assert_eq!(
        sqlite3("SELECT * FROM records"),
        "0|press-4|spindle/temp|{\"t\": 21.5}|application/json|0a0a0a0a0a0a|mqtt|2026-11-23T09:28:39.000000Z|1795426119000000||\n\
         1|press-4|note|hello||0a0a0a0a0a0a|mqtt|2026-11-23T09:28:39.001000Z|1795426119001000|1969-12-31T23:59:59.999999Z|-1\n"
    );
    assert_eq!(
        sqlite3("SELECT topic, key, value, offset, received_at FROM latest ORDER BY topic"),
        "note||hello|1|2026-11-23T09:28:39.001000Z\nspindle/temp|t|21.5|0|2026-11-23T09:28:39.000000Z\n"
    );
    assert_eq!(
        sqlite3("SELECT avg(json_extract(payload, '$.t')) FROM records WHERE topic = 'spindle/temp'"),
        "21.5\n"
    );
}

#[test]
fn a_database_that_is_not_ours_to_write_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join(RECORDS_FILE_NAME);
    drop(open(dir.path()));
    const NEXT_FORMAT: i64 = RECORDS_DATABASE.newest_version() + 1;
    Connection::open(&path).and_then(|c| c.pragma_update(None, "user_version", NEXT_FORMAT)).expect("set");
    let error = SqliteSink::open(&path).map(drop).expect_err("a newer format");
    assert_eq!(
        error.to_string(),
        format!(
            "{} has format {NEXT_FORMAT} and this Headgate knows formats up to {}: use a newer one",
            path.display(),
            NEXT_FORMAT - 1
        )
    );

    let path = dir.path().join("other.db");
    Connection::open(&path).and_then(|c| c.execute_batch("CREATE TABLE mine (x)")).expect("made");
    let error = SqliteSink::open(&path).map(drop).expect_err("not ours");
    assert!(matches!(error, SinkError::Database(SqliteError::Foreign { .. })), "{error}");

    let path = dir.path().join("no.db");
    std::fs::write(&path, "this is no database, and long enough to be seen not to be one".repeat(20))
        .expect("written");
    let error = SqliteSink::open(&path).map(drop).expect_err("no database");
    assert!(error.to_string().contains("not a database"), "{error}");
}

#[test]
fn a_second_writer_is_noticed_before_anything_is_stored_twice() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (mut one, mut other) = (open(dir.path()), open(dir.path()));
    one.store([record(0, "press-4", "a", PAYLOAD)].into_iter(), 1, false).expect("stored");
    let error = other.store([record(0, "press-4", "a", PAYLOAD)].into_iter(), 1, false).expect_err("moved");
    assert!(matches!(error, SinkError::CursorMoved { expected: 0 }), "{error}");
    assert_eq!(content(dir.path()), (vec![0], 1));
}

/// A sink with two records, the last one in a write-ahead log that could not be copied when it was closed, because of the
/// reader.
fn closed_while_it_is_read(dir: &Path) -> Connection {
    let path = dir.join(RECORDS_FILE_NAME);
    let mut sink = open(dir);
    store_next(&mut sink, true);
    assert_eq!(store_next(&mut sink, false), (2, 1));
    let reader = Connection::open(&path).expect("opens");
    reader.execute_batch("BEGIN; SELECT count(*) FROM records").expect("reads");
    drop(sink);
    assert!(has_write_ahead_log(&path));
    reader
}

/// Stores one more record. Returns both cursors.
fn store_next(sink: &mut SqliteSink, sync: bool) -> (Offset, Offset) {
    let next = sink.cursor();
    sink.store([record(next, "press-4", "a", PAYLOAD)].into_iter(), next + 1, sync).expect("stored");
    (sink.cursor(), sink.durable_cursor())
}

/// A sync had failed, the next one succeeded, and the log removed what only the kernel's memory had.
#[test]
fn a_write_ahead_log_in_doubt_makes_nothing_durable_until_it_is_copied() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join(RECORDS_FILE_NAME);
    let reader = closed_while_it_is_read(dir.path());
    let mut sink = SqliteSink::reopen(&path).expect("opens");
    assert_eq!(store_next(&mut sink, true), (3, 0), "nobody knows what the disk has of the first two");
    assert!(!sink.checkpoint().expect("no error"));
    assert_eq!(store_next(&mut sink, true), (4, 0));
    let wal_bytes = || std::fs::metadata(dir.path().join("records.db-wal")).expect("there").len();
    let before = wal_bytes();
    sink.store(std::iter::empty(), 4, true).expect("nothing to store");
    assert_eq!(wal_bytes(), before, "nothing is written for a sync that would make nothing durable");
    reader.execute_batch("COMMIT").expect("ends");
    assert_eq!(store_next(&mut sink, true), (5, 0), "it was tried a moment ago");
    let tried_long_ago = |sink: &mut SqliteSink| {
        sink.wal_doubt.as_mut().expect("in doubt").tried_at = None;
    };
    tried_long_ago(&mut sink);
    assert_eq!(store_next(&mut sink, false), (6, 0), "only a sync asks");
    assert_eq!(store_next(&mut sink, true), (7, 7));
    assert_eq!(store_next(&mut sink, true), (8, 8));
    drop((reader, sink));
    // Closed in order, it leaves none.
    let mut sink = SqliteSink::reopen(&path).expect("opens");
    assert_eq!(store_next(&mut sink, true), (9, 9));
    assert_eq!(content(dir.path()), ((0..9).collect(), 9));
}

#[test]
fn who_keeps_a_write_ahead_log_in_doubt_for_long_is_named() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let reader = closed_while_it_is_read(dir.path());
    let mut sink = SqliteSink::reopen(&dir.path().join(RECORDS_FILE_NAME)).expect("opens");
    store_next(&mut sink, true);
    assert_eq!(sink.warning(), None, "it may be over in a moment");
    let since = Instant::now().checked_sub(WAL_DOUBT_MAX).expect("the machine has run for so long");
    let doubt = sink.wal_doubt.as_mut().expect("in doubt");
    (doubt.since, doubt.tried_at) = (since, None);
    let words = sink.warning().expect("long enough");
    assert!(words.contains("process reads it") && words.contains("records.db"), "{words}");
    reader.execute_batch("COMMIT").expect("ends");
    assert_eq!((store_next(&mut sink, true), sink.warning()), ((4, 4), None));
}

/// While another process read it, nothing was durable after a kill, and the log kept everything.
#[test]
fn a_write_ahead_log_that_a_kill_has_left_is_synced_and_believed() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let _reader = closed_while_it_is_read(dir.path());
    let mut sink = open(dir.path());
    assert_eq!((store_next(&mut sink, true), sink.warning()), ((3, 3), None));
    assert_eq!((store_next(&mut sink, false), store_next(&mut sink, true)), ((4, 3), (5, 5)));
}
