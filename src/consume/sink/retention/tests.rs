//! Retention of `records.db`, on a clock of the tests' own.

use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::consume::query::{PageBudget, RecordsReader};
use crate::consume::sink::latest_board::LatestBoard;
use crate::consume::sink::sqlite::RECORDS_FILE_NAME;
use crate::consume::testing::{EPOCH, record};
use crate::limits::LATEST_TOPICS_MAX;
use crate::log::{IncarnationStep, RecordNote, WithheldChange, WithheldRules};
use crate::message::{KeyId, RecordFlags, RecordRef};

const SECOND: i64 = 1_000_000;
const AGED: StoredLimits = StoredLimits { age_us: Some(60 * SECOND), bytes: None };

fn press() -> DatasourceId {
    DatasourceId::new("press-4").expect("a slug")
}

fn open(dir: &Path) -> SqliteSink {
    SqliteSink::open(&dir.join(RECORDS_FILE_NAME)).expect("opens")
}

fn at(offset: Offset, seconds: i64) -> RecordRef<'static> {
    RecordRef { received_at: EPOCH + seconds * SECOND, ..record(offset, "press-4", "a", b"12345678") }
}

fn store(sink: &mut SqliteSink, records: &[RecordRef<'static>]) {
    let next = records.last().map_or(0, |record| record.offset + 1);
    sink.store(records.iter().copied(), next, false).expect("stored");
}

fn prune(sink: &mut SqliteSink, limits: StoredLimits, seconds: i64) {
    while sink.prune_some(&press(), limits, EPOCH + seconds * SECOND).expect("pruned") == PruneStep::More {}
}

fn offsets(sink: &SqliteSink) -> Vec<i64> {
    let sql = "SELECT offset FROM entries UNION ALL SELECT offset FROM quarantined ORDER BY 1";
    let mut select = sink.connection().prepare(sql).expect("reads");
    let rows = select.query_map([], |row| row.get(0)).expect("reads");
    rows.map(|row| row.expect("reads")).collect()
}

fn counted(sink: &SqliteSink) -> Option<i64> {
    let sql = "SELECT bytes FROM stored_sizes";
    sink.connection().query_row(sql, [], |row| row.get(0)).optional().expect("reads")
}

#[test]
fn what_is_older_goes_and_a_clock_that_was_wrong_takes_nothing_young_with_it() {
    // Behind, before it was set: 3 and 4. Ahead for a while: 6 and 7.
    let times = [0, 10, 20, -900_000, -900_000, 30, 5_000, 5_001, 40, 50];
    let records: Vec<_> = (0..).zip(times).map(|(offset, seconds)| at(offset, seconds)).collect();
    for (now, left) in [
        (60, (0..10).collect::<Vec<i64>>()),
        (71, (2..10).collect()),
        (81, (5..10).collect()),
        // What is of a later time may be as young as what comes behind it.
        (91, (6..10).collect()),
        (101, (9..10).collect()),
        (200, vec![]),
    ] {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = open(dir.path());
        store(&mut sink, &records);
        prune(&mut sink, AGED, now);
        assert_eq!(offsets(&sink), left, "after {now} s");
    }
}

#[test]
fn the_bytes_are_counted_once_and_kept_up_to_date_whatever_happens() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    let quarantined = RecordRef { flags: RecordFlags::QUARANTINED, ..at(2, 2) };
    store(&mut sink, &[at(0, 0), at(1, 1), quarantined, at(3, 3)]);
    let limits = |records: u64| StoredLimits { age_us: None, bytes: Some(72 * records) };
    prune(&mut sink, limits(3), 9);
    assert_eq!((offsets(&sink), counted(&sink)), (vec![1, 2, 3], Some(3 * 72)));
    // What comes in is added, what is refused by the cursor is not.
    let more = [at(3, 3), at(4, 4), at(5, 5)];
    sink.store(more.into_iter(), 6, false).expect("stored");
    assert_eq!(counted(&sink), Some(5 * 72));
    drop(sink);
    let mut sink = open(dir.path());
    prune(&mut sink, limits(2), 9);
    assert_eq!((offsets(&sink), counted(&sink)), (vec![4, 5], Some(2 * 72)), "quarantine too");
    // A change of the rules moves records: it is counted anew.
    let rules = WithheldRules::default();
    let keys = [KeyId([0x0a; 6])].into();
    rules.push(WithheldChange::Incarnation(press(), 1, IncarnationStep::Ended { keys, end: 5 }));
    sink.reconcile(&rules).expect("reconciled");
    assert_eq!(counted(&sink), None);
    store(&mut sink, &[at(6, 6)]);
    prune(&mut sink, limits(2), 9);
    assert_eq!((offsets(&sink), counted(&sink)), (vec![5, 6], Some(2 * 72)));
    // What another limit removes in between is not counted any more.
    store(&mut sink, &[at(7, 7), at(8, 8)]);
    prune(&mut sink, AGED, 67);
    assert_eq!((offsets(&sink), counted(&sink)), (vec![7, 8], None));
    prune(&mut sink, limits(2), 67);
    assert_eq!(offsets(&sink), [7, 8]);
    // One byte less is one record less.
    prune(&mut sink, StoredLimits { age_us: None, bytes: Some(2 * 72 - 1) }, 9);
    assert_eq!(offsets(&sink), [8]);
    let row = row_id_of_scope(sink.connection(), &press()).expect("reads").expect("there");
    assert_eq!(read_removed_below(sink.connection(), row).expect("reads"), Some(8));
}

#[test]
fn a_topic_of_which_nothing_is_left_is_forgotten_and_comes_back() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    let on = |offset, topic, seconds| RecordRef { topic, ..at(offset, seconds) };
    store(&mut sink, &[on(0, "a", 0), on(1, "b", 1), on(2, "b", 70)]);
    prune(&mut sink, AGED, 62);
    let topics = |sink: &SqliteSink| {
        let sql = "SELECT topic FROM topics t JOIN latest_values v ON v.topic_id = t.id ORDER BY 1";
        let mut select = sink.connection().prepare(sql).expect("reads");
        let rows = select.query_map([], |row| row.get::<_, String>(0)).expect("reads");
        rows.map(|row| row.expect("reads")).collect::<Vec<_>>()
    };
    assert_eq!(topics(&sink), ["b"]);
    store(&mut sink, &[on(3, "a", 80), on(4, "c", 80)]);
    assert_eq!(topics(&sink), ["a", "b", "c"]);
    let names = "SELECT count(*) FROM records WHERE topic IS NULL";
    assert_eq!(sink.connection().query_row(names, [], |row| row.get(0)), Ok(0));
}

/// One message in quarantine kept every topic of its datasource, hidden, for ever.
#[test]
fn quarantine_keeps_the_topics_that_it_has_something_of_and_no_others() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    let on = |offset, topic, seconds| RecordRef { topic, ..at(offset, seconds) };
    let quarantined = RecordRef { flags: RecordFlags::QUARANTINED, ..on(3, "b", 100) };
    store(&mut sink, &[on(0, "a", 0), on(1, "b", 1), on(2, "c", 2), quarantined]);
    let topics = |sink: &SqliteSink| {
        let sql = "SELECT topic FROM topics ORDER BY topic";
        let mut select = sink.connection().prepare(sql).expect("reads");
        let rows = select.query_map([], |row| row.get::<_, String>(0)).expect("reads");
        rows.map(|row| row.expect("reads")).collect::<Vec<_>>()
    };
    prune(&mut sink, AGED, 90);
    assert_eq!(topics(&sink), ["b"], "one is hidden between two that are gone");
    // The ids of the others are given anew.
    let other = RecordRef { datasource: "press-5", ..on(4, "x", 101) };
    store(&mut sink, &[other, on(5, "a", 102), on(6, "c", 103), on(7, "b", 104)]);
    let mut select = sink
        .connection()
        .prepare("SELECT datasource || ' ' || topic FROM records ORDER BY offset")
        .expect("reads");
    let rows = select.query_map([], |row| row.get::<_, String>(0)).expect("reads");
    let names: Vec<String> = rows.map(|row| row.expect("reads")).collect();
    assert_eq!(names, ["press-5 x", "press-4 a", "press-4 c", "press-4 b"]);
    drop(select);
    prune(&mut sink, AGED, 163);
    assert_eq!((offsets(&sink), topics(&sink)), (vec![4, 6, 7], vec!["b".into(), "c".into(), "x".into()]));
    prune(&mut sink, AGED, 1_000);
    assert_eq!(topics(&sink), ["x"], "with what was in quarantine");
}

#[test]
fn what_is_set_aside_and_a_mark_leave_no_topic_behind() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    let on = |offset, topic| RecordRef { topic, ..at(offset, 0) };
    let quarantined = RecordRef { flags: RecordFlags::QUARANTINED, ..on(2, "c") };
    let note = RecordNote::Superseded { offset: 2, by: 1 };
    let (flags, note) = (note.flag(), note.encode());
    let mark = RecordRef { flags, note: &note, ..on(3, "d") };
    sink.store([on(0, "a"), on(1, "b"), quarantined, mark].into_iter(), 4, false).expect("stored");
    let topics = |sink: &SqliteSink| {
        let sql = "SELECT group_concat(topic) FROM topics";
        sink.connection().query_row(sql, [], |row| row.get::<_, String>(0)).expect("reads")
    };
    assert_eq!(topics(&sink), "a,b,c");
    sink.set_aside_from(1, &dir.path().join(RECORDS_FILE_NAME)).expect("set aside");
    assert_eq!(topics(&sink), "a");
}

/// Media types are the senders' to choose: each was a row for ever.
#[test]
fn an_origin_goes_with_the_last_record_that_has_it() {
    const PART: u64 = 1_000;
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    let count = |sink: &SqliteSink, sql| {
        sink.connection().query_row(sql, [], |row| row.get(0).map(offset_from_sql)).expect("reads")
    };
    let origins = "SELECT count(*) FROM origins";
    let mut next = 0;
    for seconds in (0..12).map(|part| 70 * part) {
        let types: Vec<String> =
            (next..next + PART).map(|offset| format!("text/{}", offset / 2 * 2)).collect();
        let of = |(offset, content_type)| {
            // One has no limits, and media types of its own under the same names.
            let datasource = if offset % 100 == 0 { "press-5" } else { "press-4" };
            RecordRef { datasource, content_type, ..at(offset, seconds) }
        };
        let records = (next..).zip(types.iter().map(String::as_str)).map(of);
        next += PART;
        sink.store(records, next, false).expect("stored");
        prune(&mut sink, AGED, seconds + 1);
        sink.prune_time_index().expect("pruned");
        let nameless = "SELECT count(*) FROM records WHERE content_type <> 'text/' || (offset / 2 * 2)";
        assert_eq!(count(&sink, nameless), 0);
        assert_eq!(count(&sink, "SELECT count(*) FROM records WHERE content_type IS NULL"), 0);
    }
    assert_eq!(count(&sink, origins), PART / 2 + next / 100, "of the last part, and those of the other one");
    prune(&mut sink, AGED, 1_000);
    assert_eq!(count(&sink, origins), next / 100, "those of the other one");
    let names = "SELECT sum(name_bytes) FROM datasources";
    assert_eq!(count(&sink, names), count(&sink, NAME_BYTES));
    // What is known of them is what is there.
    let steady = RecordRef { content_type: "text/0", ..at(next, 0) };
    store(&mut sink, &[steady]);
    assert_eq!(count(&sink, "SELECT count(*) FROM records WHERE content_type IS NULL"), 0);
}

/// With as many devices of their own keys as offsets are noted ahead, each record was a statement about its origin.
#[test]
fn many_keys_in_turn_are_noted_seldom_and_go_with_their_records() {
    const KEYS: u64 = 5_000;
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    sink.connection()
        .execute_batch(
            "CREATE TEMP TABLE notes (id);
             CREATE TEMP TRIGGER noted AFTER UPDATE ON main.origins BEGIN INSERT INTO notes VALUES (NEW.id); END;",
        )
        .expect("counts");
    let of = |offset: Offset| {
        let [a, b, c, d] = u32::try_from(offset % KEYS).expect("small").to_be_bytes();
        RecordRef { key_id: KeyId([0x0b, 0, a, b, c, d]), ..at(offset, 0) }
    };
    for first in (0..6).map(|round| round * KEYS) {
        sink.store((first..first + KEYS).map(of), first + KEYS, false).expect("stored");
    }
    let number = |sink: &SqliteSink, sql| {
        sink.connection().query_row(sql, [], |row| row.get(0).map(offset_from_sql)).expect("reads")
    };
    assert_eq!(number(&sink, "SELECT count(*) FROM origins"), KEYS);
    assert_eq!(number(&sink, "SELECT count(*) FROM notes"), KEYS, "once when they come again");
    let keys = "SELECT count(*) FROM records WHERE key_id IS NOT printf('0b00%08x', offset % 5000)";
    assert_eq!(number(&sink, keys), 0);
    let early =
        "SELECT count(*) FROM entries e JOIN origins o ON o.id = e.origin_id WHERE o.used_below <= e.offset";
    assert_eq!(number(&sink, early), 0, "used below what is noted alone");
    prune(&mut sink, AGED, 1_000);
    assert_eq!(number(&sink, "SELECT count(*) FROM origins"), 0);
}

/// What `name_bytes` has to be.
const NAME_BYTES: &str = "SELECT (SELECT coalesce(sum(2 * octet_length(topic) + 64), 0) FROM topics)
     + (SELECT coalesce(sum(2 * octet_length(content_type) + 64), 0) FROM origins WHERE datasource_id IS NOT NULL)";

#[test]
fn what_topics_take_counts_once_for_each() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    let topics: Vec<String> = (0..3_000).map(|n| format!("{n:01024}")).collect();
    for (part, offset) in topics.chunks(500).zip((0..).step_by(500)) {
        let of = |(topic, offset)| RecordRef { topic, payload: b"", ..at(offset, 0) };
        let records = part.iter().map(String::as_str).zip(offset..).map(of);
        sink.store(records, offset + 500, false).expect("stored");
        prune(&mut sink, StoredLimits { age_us: None, bytes: Some(1 << 20) }, 0);
    }
    // 64 for the record, 64 and twice the name for its topic.
    let most = ((1 << 20) + STORED_NAMES_FREE_BYTES) / (2 * 64 + 2 * 1024);
    let left = offsets(&sink).len() as u64;
    assert!((most - 1..=most).contains(&left), "{left} of {most}");
    let number = |sql| sink.connection().query_row(sql, [], |row| row.get::<_, i64>(0)).expect("reads");
    assert_eq!(number("SELECT sum(name_bytes) FROM datasources"), number(NAME_BYTES));
    // A topic that many share counts no more for each.
    let records = (3_000..9_000).map(|offset| RecordRef { topic: &topics[2_999], ..at(offset, 0) });
    sink.store(records, 9_000, false).expect("stored");
    prune(&mut sink, StoredLimits { age_us: None, bytes: Some(72 * 5_000) }, 0);
    assert_eq!(offsets(&sink), (4_000..9_000).collect::<Vec<i64>>());
}

#[test]
fn the_samples_go_with_their_records() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    let of = |offset, topic| RecordRef {
        topic,
        payload: b"{\"t\":1.5}",
        ..at(offset, i64::try_from(offset).expect("small"))
    };
    for offset in 0..300 {
        store(&mut sink, &[of(offset, if offset.is_multiple_of(3) { "a" } else { "b" })]);
    }
    let samples = |sink: &SqliteSink| {
        let mut select =
            sink.connection().prepare("SELECT offset FROM samples ORDER BY offset").expect("reads");
        let rows = select.query_map([], |row| row.get::<_, i64>(0)).expect("reads");
        rows.map(|row| row.expect("reads")).collect::<Vec<_>>()
    };
    assert_eq!(samples(&sink).len(), 300);
    for (now, first) in [(160, 100), (161, 101), (300, 240)] {
        prune(&mut sink, AGED, now);
        let mut topic = String::new();
        while let Some(next) = sink.trim_samples_some(&press(), &topic).expect("trimmed") {
            topic = next;
        }
        assert_eq!(samples(&sink), (first..300).collect::<Vec<i64>>());
        assert_eq!(offsets(&sink), (first..300).collect::<Vec<i64>>());
    }
    prune(&mut sink, AGED, 1_000);
    assert_eq!(
        sink.connection().query_row("SELECT count(*) FROM sample_chunks", [], |row| row.get(0)),
        Ok(0)
    );
}

/// Whoever has a limit and a new topic for each message emptied the caches of all: samples of others had a chunk each.
#[test]
fn a_topic_that_is_forgotten_closes_no_chunk_and_takes_down_no_value_of_another_datasource() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sink = open(dir.path());
    let board = Arc::<LatestBoard>::default();
    sink.show_on(board.clone());
    let reader = RecordsReader::new(dir.path()).with_board(board.clone());
    let other = DatasourceId::new("press-5").expect("a slug");
    let shown = |scope: &DatasourceId| {
        let mut topics = Vec::new();
        let mut budget = PageBudget::new(LATEST_TOPICS_MAX);
        let mut each = |topic: &str, _: &[u8]| topics.push(topic.to_owned());
        board.read(scope, None, &mut budget, &mut each).map(|_| topics)
    };
    for offset in (0..200).step_by(2) {
        let topic = format!("new/{offset}");
        let new = RecordRef { topic: &topic, ..at(offset, 0) };
        let steady = record(offset + 1, "press-5", "a", b"{\"t\":1.5}");
        sink.store([new, steady].into_iter(), offset + 2, false).expect("stored");
        shown(&press());
        shown(&other);
        let limits = StoredLimits { age_us: None, bytes: Some(3 * 72) };
        while sink.prune_some(&press(), limits, EPOCH).expect("pruned") == PruneStep::More {}
    }
    let chunks =
        "SELECT count(*) FROM sample_chunks c JOIN topics t ON t.id = c.topic_id WHERE t.topic = 'a'";
    assert_eq!(sink.connection().query_row(chunks, [], |row| row.get(0)), Ok(1));
    assert_eq!(shown(&other), Some(vec!["a".to_owned()]), "it stays there");
    let of_database = |scope: &DatasourceId| {
        let page = reader.latest(scope, None).expect("reads");
        page.topics.into_iter().map(|topic| topic.topic).collect::<Vec<_>>()
    };
    assert_eq!(shown(&press()), Some(of_database(&press())));
    let ids =
        "SELECT count(*) FROM records r WHERE r.topic IS NULL OR r.datasource = 'press-5' AND r.topic <> 'a'";
    assert_eq!(sink.connection().query_row(ids, [], |row| row.get(0)), Ok(0), "ids are given anew");
}

#[test]
fn room_is_given_back_to_the_file_system_and_times_are_forgotten() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (mut sink, path) = (open(dir.path()), dir.path().join(RECORDS_FILE_NAME));
    let payload = vec![b'x'; 1000];
    let of = |offset| RecordRef { payload: &payload, ..record(offset, "press-4", "a", b"") };
    let count = 30_000;
    sink.store((0..count).map(of), count, false).expect("stored");
    assert!(sink.checkpoint().expect("copied"));
    let before = std::fs::metadata(&path).expect("there").len();
    prune(&mut sink, StoredLimits { age_us: None, bytes: Some(1_064 * 100) }, 0);
    sink.prune_time_index().expect("pruned");
    while sink.give_back_some().expect("given back") {}
    let after = std::fs::metadata(&path).expect("there").len();
    let kept = u64::try_from(FREE_PAGES_KEPT).expect("positive") * 4096;
    assert!(before > 30 << 20 && after < kept + (2 << 20), "{before} bytes before, {after} after");
    let times: i64 =
        sink.connection().query_row("SELECT count(*) FROM time_index", [], |row| row.get(0)).expect("reads");
    assert_eq!(times, 1);
    let pages: String =
        sink.connection().pragma_query_value(None, "integrity_check", |row| row.get(0)).expect("reads");
    assert_eq!(pages, "ok");
}
