//! Pages of records: what they hold, where they end, and that a query sees a snapshot.

use super::scan::{EVENT_RANGE_SQL, RECORDS_PAGE_SQL, TIME_RANGE_SQL};
use super::*;
use crate::consume::sink::sqlite::SqliteSink;
use crate::consume::testing::{EPOCH, record};
use crate::message::RecordRef;

const TOPICS: [&str; 4] = ["spindle/temp", "spindle/rpm", "spindle", "door"];
const DATASOURCES: [&str; 3] = ["press-4", "press-5", "press-6"];
const SECOND: TimeMicros = 1_000_000;

fn id(datasource: &str) -> DatasourceId {
    DatasourceId::new(datasource).expect("slug")
}

fn all_of(datasource: &str) -> RecordsQuery {
    RecordsQuery {
        scope: id(datasource),
        topic: None,
        from: None,
        to: None,
        event_from: None,
        event_to: None,
        after_offset: None,
        before_offset: None,
        order: RecordsOrder::Oldest,
        key_id: None,
        limit: QUERY_RECORDS_MAX,
    }
}

fn stored<'a>(dir: &Path, records: impl Iterator<Item = RecordRef<'a>>, next: Offset) -> RecordsReader {
    let mut sink = SqliteSink::open(&dir.join(RECORDS_FILE_NAME)).expect("opens");
    sink.store(records, next, false).expect("stored");
    RecordsReader::new(dir)
}

/// Twenty thousand records of several datasources, topics, keys and transports. The clock is
/// set back twice while they come, once far and once by little.
fn mixed() -> Vec<RecordRef<'static>> {
    let mut clock = EPOCH;
    (0..20_000_u64)
        .map(|offset| {
            clock += match offset {
                7_000 => -3_600 * SECOND,
                12_345 => -2 * SECOND,
                _ => 100_000,
            };
            // Independent of each other: each from other bits of the same hash.
            let mixture = offset.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let pick = |of: u64, bits: u64| usize::try_from((mixture >> (8 * bits)) % of).expect("small");
            let mut record = record(offset, DATASOURCES[pick(3, 1)], TOPICS[pick(4, 2)], b"{\"t\": 1}");
            record.key_id = KeyId([u8::try_from(pick(3, 3)).expect("small"); 6]);
            record.transport = [Transport::Mqtt, Transport::Http][pick(2, 4)];
            record.content_type = ["", "application/json"][pick(2, 5)];
            record.received_at = clock;
            record
        })
        .collect()
}

#[test]
fn every_combination_of_conditions_gives_exactly_the_records_that_meet_them_page_by_page() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let records = mixed();
    let query = stored(dir.path(), records.iter().copied(), 20_000);
    let times = [
        (None, None),
        (Some(EPOCH + 300 * SECOND), None),
        (None, Some(EPOCH + 500 * SECOND)),
        (Some(EPOCH + 1_200 * SECOND), Some(EPOCH + 1_234 * SECOND)),
        // An hour that occurred twice, and one that never occurred.
        (Some(EPOCH - 2_700 * SECOND), Some(EPOCH - 2_600 * SECOND)),
        (Some(EPOCH + 40_000 * SECOND), Some(EPOCH + 50_000 * SECOND)),
    ];
    let filters = [None, Some("spindle/temp"), Some("spindle/#"), Some("+"), Some("+/rpm"), Some("no/such")];
    let keys = [None, Some(KeyId([1; 6])), Some(KeyId([9; 6]))];
    let mut found_some = 0;
    for (from, to) in times {
        for topic in filters {
            for key_id in keys {
                for (after, order) in [
                    (None, RecordsOrder::Oldest),
                    (Some(11_111), RecordsOrder::Oldest),
                    (Some(11_111), RecordsOrder::Newest),
                ] {
                    let mut asked = RecordsQuery {
                        from,
                        to,
                        topic: topic.map(str::to_owned),
                        key_id,
                        after_offset: after,
                        before_offset: after.map(|_| 19_000),
                        order,
                        limit: 700,
                        ..all_of("press-5")
                    };
                    let filter = topic.map(|topic| TopicFilter::new(topic).expect("a filter"));
                    let mut expected: Vec<Offset> = records
                        .iter()
                        .filter(|r| r.datasource == "press-5")
                        .filter(|r| after.is_none_or(|after| r.offset > after && r.offset < 19_000))
                        .filter(|r| from.is_none_or(|from| r.received_at >= from))
                        .filter(|r| to.is_none_or(|to| r.received_at < to))
                        .filter(|r| key_id.is_none_or(|key_id| r.key_id == key_id))
                        .filter(|r| filter.as_ref().is_none_or(|filter| filter.matches(r.topic)))
                        .map(|r| r.offset)
                        .collect();
                    if order == RecordsOrder::Newest {
                        expected.reverse();
                    }
                    let mut found = Vec::new();
                    loop {
                        let page = query.records(&asked).expect("reads");
                        assert!(page.records.len() <= 700);
                        found.extend(page.records.iter().map(|record| record.offset));
                        let Some(next) = page.next else { break };
                        asked.go_on_at(next);
                    }
                    assert_eq!(found, expected, "{asked:?}");
                    found_some += usize::from(!found.is_empty());
                }
            }
        }
    }
    assert!(found_some > 50, "{found_some}");
}

#[test]
fn a_record_comes_back_as_it_was_sent() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut sent = record(3, "press-4", "spindle/temp °C", b"\xff\x00{");
    sent.content_type = "image/x";
    sent.transport = Transport::Nats;
    sent.event_at = Some(-1);
    let query = stored(dir.path(), [sent].into_iter(), 4);
    let page = query.records(&all_of("press-4")).expect("reads");
    let expected = StoredRecord {
        offset: 3,
        topic: sent.topic.into(),
        payload: sent.payload.to_vec(),
        content_type: "image/x".into(),
        key_id: sent.key_id,
        transport: Transport::Nats,
        received_at: sent.received_at,
        event_at: Some(-1),
    };
    assert_eq!((page.records, page.next), (vec![expected], None));
    assert!(query.records(&all_of("press-9")).expect("reads").records.is_empty());
}

#[test]
fn a_page_says_whether_there_may_be_another() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let query = stored(dir.path(), (0..10).map(|offset| record(offset, "press-4", "a", b"1")), 10);
    let page = |after_offset, limit| {
        let page = query.records(&RecordsQuery { after_offset, limit, ..all_of("press-4") }).expect("reads");
        (page.records.len(), page.next)
    };
    assert_eq!(page(None, 9), (9, Some(8)));
    assert_eq!(page(Some(8), 9), (1, None));
    assert_eq!(page(None, 10), (10, None));
    assert_eq!(page(Some(9), 10), (0, None));
    assert_eq!(page(Some(Offset::MAX), 10), (0, None));
}

#[test]
fn a_page_ends_after_so_many_bytes_and_goes_on_with_the_next() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let payload = vec![b'x'; 1 << 20];
    let query = stored(dir.path(), (0..20).map(|offset| record(offset, "press-4", "a", &payload)), 20);
    let first = query.records(&all_of("press-4")).expect("reads");
    assert_eq!((first.records.len(), first.next), (16, Some(15)));
    let rest = query.records(&RecordsQuery { after_offset: first.next, ..all_of("press-4") }).expect("reads");
    assert_eq!((rest.records.len(), rest.next), (4, None));
}

#[test]
fn a_filter_that_few_records_pass_gives_short_pages_and_finds_them_all() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let wanted = QUERY_SCANNED_MAX as u64 + 10;
    let topic = |offset| if offset == wanted { "rare/one" } else { "common" };
    let records = (0..=wanted).map(|offset| record(offset, "press-4", topic(offset), b"1"));
    let query = stored(dir.path(), records, wanted + 1);
    let rare = RecordsQuery { topic: Some("rare/+".to_owned()), ..all_of("press-4") };
    let first = query.records(&rare).expect("reads");
    assert_eq!((first.records.len(), first.next), (0, Some(QUERY_SCANNED_MAX as u64 - 1)));
    let second = query.records(&RecordsQuery { after_offset: first.next, ..rare }).expect("reads");
    assert_eq!(second.records.iter().map(|record| record.offset).collect::<Vec<_>>(), [wanted]);
    assert_eq!(second.next, None);
}

#[test]
fn a_topic_that_is_no_filter_is_an_error_of_its_own() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let query = stored(dir.path(), [record(0, "press-4", "a", b"1")].into_iter(), 1);
    let bad = RecordsQuery { topic: Some("a/#/b".to_owned()), ..all_of("press-4") };
    assert!(matches!(query.records(&bad), Err(QueryError::Filter(_))));
}

#[test]
fn pages_are_read_along_an_index_and_never_sorted() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let query = stored(dir.path(), [record(0, "press-4", "a", b"1")].into_iter(), 1);
    let plan_of = |sql: &str, parameters: &[i64]| {
        let RecordsReader::Sqlite(stored) = &query else { panic!("it reads SQLite") };
        let explained = stored.read(|connection| {
            let mut statement = connection.prepare(&format!("EXPLAIN QUERY PLAN {sql}"))?;
            let steps =
                statement.query_map(rusqlite::params_from_iter(parameters), |row| row.get::<_, String>(3))?;
            steps.collect::<rusqlite::Result<Vec<_>>>()
        });
        explained.expect("explained")
    };
    for (along, index, sqls) in [
        ("datasource_id", "entries_datasource", RECORDS_PAGE_SQL[0]),
        ("topic_id", "entries_topic", RECORDS_PAGE_SQL[1]),
    ] {
        let expected = format!("SEARCH entries USING INDEX {index} ({along}=? AND rowid>? AND rowid<?)");
        for sql in sqls {
            assert_eq!(plan_of(sql, &[1, 2, 3]), [expected.as_str()]);
        }
    }
    // It has a row for 4096 records.
    assert_eq!(plan_of(TIME_RANGE_SQL, &[1, 2]), ["SCAN time_index"]);
    let plan = plan_of(EVENT_RANGE_SQL, &[1, 2, 3]);
    let expected =
        "SEARCH entries USING COVERING INDEX entries_event (topic_id=? AND event_us>? AND event_us<?)";
    assert_eq!(plan, [expected]);
    // What docs/backends.md says of SQL by time.
    let by_time = "SELECT count(*) FROM records WHERE received_us >= ?1
         AND offset >= (SELECT min(first_offset) FROM time_index WHERE newest_us >= ?1)";
    let plan = plan_of(by_time, &[1]);
    assert!(plan[0].starts_with("SEARCH e USING INTEGER PRIMARY KEY (rowid>?)"), "{plan:?}");
}

#[test]
fn a_query_sees_what_is_stored_while_storage_writes() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let query = stored(dir.path(), [record(0, "press-4", "a", b"1")].into_iter(), 1);
    let mut sink = SqliteSink::open(&dir.path().join(RECORDS_FILE_NAME)).expect("opens");
    let count = || query.records(&all_of("press-4")).expect("reads").records.len();
    let records = (1..3).map(|offset| {
        assert_eq!(count(), 1, "what is not committed is not seen");
        record(offset, "press-4", "a", b"1")
    });
    sink.store(records, 3, false).expect("stored");
    assert_eq!(count(), 3);
}

#[test]
fn a_range_of_event_times_takes_the_time_of_receipt_where_nobody_says_more() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let records: Vec<RecordRef<'static>> = mixed()
        .into_iter()
        .map(|mut record| {
            // Sent late, in part in another order, and a third of them without a time.
            let late = SECOND * i64::try_from(record.offset * 7_919 % 900).expect("small");
            record.event_at = (!record.offset.is_multiple_of(3)).then_some(record.received_at - late);
            record
        })
        .collect();
    let query = stored(dir.path(), records.iter().copied(), 20_000);
    let ranges = [
        (Some(EPOCH + 100 * SECOND), Some(EPOCH + 130 * SECOND)),
        (None, Some(EPOCH - 800 * SECOND)),
        (Some(EPOCH + 1_900 * SECOND), None),
        (Some(EPOCH + 40_000 * SECOND), None),
    ];
    for (event_from, event_to) in ranges {
        for topic in [None, Some("door"), Some("spindle/+")] {
            let mut asked = RecordsQuery {
                event_from,
                event_to,
                topic: topic.map(str::to_owned),
                limit: 500,
                ..all_of("press-5")
            };
            let filter = topic.map(|topic| TopicFilter::new(topic).expect("a filter"));
            let expected: Vec<Offset> = records
                .iter()
                .filter(|r| r.datasource == "press-5")
                .filter(|r| filter.as_ref().is_none_or(|filter| filter.matches(r.topic)))
                .filter(|r| event_from.is_none_or(|from| r.event_at.unwrap_or(r.received_at) >= from))
                .filter(|r| event_to.is_none_or(|to| r.event_at.unwrap_or(r.received_at) < to))
                .map(|r| r.offset)
                .collect();
            let mut found = Vec::new();
            loop {
                let page = query.records(&asked).expect("reads");
                found.extend(page.records.iter().map(|record| record.offset));
                let Some(next) = page.next else { break };
                asked.go_on_at(next);
            }
            assert_eq!(found, expected, "{asked:?}");
        }
    }
}
