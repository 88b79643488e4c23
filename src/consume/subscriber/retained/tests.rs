//! Retained messages with a real log: what is kept, what is found, and what a kill leaves.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use rusqlite::Connection;
use tempfile::TempDir;

use super::*;
use crate::config::{self, Config, Durability};
use crate::log::{EmbeddedLog, Section};
use crate::message::{Lease, now_micros};

const DEADLINE: Duration = Duration::from_secs(30);
const ALL: Offset = Offset::MAX;

fn directory() -> TempDir {
    tempfile::tempdir().expect("temporary directory")
}

fn open_log(dir: &Path) -> Arc<dyn Log> {
    let config = config::LogConfig {
        durability: Durability::Os,
        segment_bytes: 1 << 20,
        retention_bytes: 8 << 20,
        ..Config::default().log
    };
    Arc::new(EmbeddedLog::open(dir, &config, &config::Config::default().intake).expect("opens"))
}

fn start(dir: &Path, log: &Arc<dyn Log>) -> RetainedStore {
    RetainedStore::start(dir, log.clone(), |_| ()).expect("starts")
}

fn id(datasource: &str) -> DatasourceId {
    DatasourceId::new(datasource).expect("slug")
}

fn filter(filter: &str) -> TopicFilter {
    TopicFilter::new(filter).expect("a filter")
}

const RETAIN: RecordFlags = RecordFlags::RETAIN;
const PLAIN: RecordFlags = RecordFlags(0);

/// Appends messages (datasource, topic, payload, flags) in one commit.
async fn append<'a>(
    log: &Arc<dyn Log>,
    messages: impl IntoIterator<Item = (&'a str, &'a str, &'a [u8], RecordFlags)>,
) {
    let mut sections: Vec<Section> = Vec::new();
    for (datasource, topic, payload, flags) in messages {
        if sections.last().is_none_or(|section| section.datasource.as_str() != datasource) {
            let section = Section::new(
                id(datasource),
                KeyId([1; 6]),
                Lease::new(),
                Transport::Mqtt,
                u64::MAX - 1,
                now_micros(),
            );
            sections.push(section);
        }
        let section = sections.last_mut().expect("there is one");
        section.push(topic, payload, "text/plain", &[0x01, 1], flags);
    }
    log.append(sections, Instant::now() + DEADLINE).await.expect("answered").expect("kept");
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < DEADLINE, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn caught_up(retained: &RetainedStore, log: &Arc<dyn Log>) {
    let caught_up = retained.wait_caught_up(log.next_offset());
    tokio::time::timeout(DEADLINE, caught_up).await.expect("caught up in time");
}

/// All pages together.
async fn found(
    retained: &RetainedStore,
    log: &Arc<dyn Log>,
    datasource: Option<&str>,
    wanted: &str,
    bytes_max: usize,
) -> Vec<RetainedMessage> {
    let (datasource, wanted) = (datasource.map(id), filter(wanted));
    let (mut messages, mut after) = (Vec::new(), None);
    loop {
        let page = retained.page(datasource.as_ref(), &wanted, log.next_offset(), after, bytes_max).await;
        let page = page.expect("a page");
        messages.extend(page.messages);
        match page.next {
            Some(next) => after = Some(next),
            None => return messages,
        }
    }
}

/// The offset and the topic of what is found at each of these offsets.
async fn found_at(
    retained: &RetainedStore,
    datasource: Option<&str>,
    offsets: &[Offset],
    bytes_max: usize,
) -> Vec<Option<(Offset, String)>> {
    let datasource = datasource.map(id);
    let found = retained.messages_at(datasource.as_ref(), offsets.to_vec(), bytes_max).await;
    let found = found.expect("they are read").into_iter();
    found.map(|message| message.map(|message| (message.offset, message.topic))).collect()
}

/// Datasource, topic and payload of every retained message.
async fn everything(retained: &RetainedStore, log: &Arc<dyn Log>) -> Vec<(String, String, Vec<u8>)> {
    let messages = found(retained, log, None, "#", 1 << 20).await;
    messages.into_iter().map(|message| (message.datasource, message.topic, message.payload)).collect()
}

#[tokio::test]
async fn a_topic_keeps_its_newest_retained_message_with_all_it_has() {
    let dir = directory();
    let log = open_log(dir.path());
    let retained = start(dir.path(), &log);
    let will = RETAIN.with(RecordFlags::WILL);
    append(&log, [("press-4", "a", &b"1"[..], RETAIN), ("press-4", "a", b"2", RETAIN)]).await;
    append(&log, [("press-4", "a", &b"\xff\x003"[..], will), ("press-4", "a", b"4", PLAIN)]).await;
    append(&log, [("press-4", "b", &b"5"[..], PLAIN), ("press-5", "a", b"6", RETAIN)]).await;
    let messages = found(&retained, &log, Some("press-4"), "a", 1 << 20).await;
    let [message] = &messages[..] else { panic!("{messages:?}") };
    let batches = log.read(2, 1 << 20).expect("read");
    let record = batches.iter().flat_map(|batch| batch.records()).find(|record| record.offset == 2);
    assert_eq!(Some(message.as_record()), record);
    assert_eq!((message.offset, message.flags), (2, will));
    assert_eq!(found(&retained, &log, Some("press-4"), "b", 1 << 20).await, []);
    assert_eq!(retained.trouble(), None);
}

#[tokio::test]
async fn an_empty_payload_takes_the_message_away_and_only_with_the_flag() {
    let dir = directory();
    let log = open_log(dir.path());
    let retained = start(dir.path(), &log);
    assert!(retained.is_empty());
    append(&log, [("press-4", "a", &b"1"[..], RETAIN), ("press-4", "b", b"2", RETAIN)]).await;
    append(&log, [("press-4", "a", &b""[..], PLAIN)]).await;
    caught_up(&retained, &log).await;
    assert!(!retained.is_empty());
    assert_eq!(everything(&retained, &log).await.len(), 2);
    append(&log, [("press-4", "a", &b""[..], RETAIN), ("press-4", "never", b"", RETAIN)]).await;
    assert_eq!(everything(&retained, &log).await, [("press-4".into(), "b".into(), b"2".into())]);
    // In one batch: away, there, away.
    append(
        &log,
        [("press-4", "b", &b""[..], RETAIN), ("press-4", "b", b"3", RETAIN), ("press-4", "b", b"", RETAIN)],
    )
    .await;
    caught_up(&retained, &log).await;
    assert!(retained.is_empty());
    assert_eq!(everything(&retained, &log).await, []);
    retained.stop(Instant::now() + DEADLINE).await;
    assert!(start(dir.path(), &log).is_empty());
}

#[tokio::test]
async fn a_message_that_the_reader_of_the_log_is_given_is_not_given_twice() {
    let dir = directory();
    let log = open_log(dir.path());
    let retained = start(dir.path(), &log);
    append(&log, [("press-4", "a", &b"1"[..], RETAIN), ("press-4", "b", b"2", RETAIN)]).await;
    caught_up(&retained, &log).await;
    for (below, topics) in [(0, &[][..]), (1, &["a"]), (2, &["a", "b"])] {
        let page = retained.page(Some(&id("press-4")), &filter("#"), below, None, 1 << 20).await;
        let page = page.expect("a page");
        let found: Vec<_> = page.messages.iter().map(|message| message.topic.as_str()).collect();
        assert_eq!(found, topics, "below {below}");
        assert_eq!(page.next, None);
    }
}

/// Topics whose bytes are in a different order from their levels among them.
const TOPICS: [&str; 14] =
    ["a", "a/", "a/b", "a/b/", "a/b/c", "a/b-1", "a/b0", "a//b", "a-b", "a0", "b/a", "/", "/a", "°/b"];
const FILTERS: [&str; 20] = [
    "#", "+", "+/+", "+/#", "a", "a/#", "a/+", "a/+/#", "a/b", "a/b/#", "a/b/+", "a/+/c", "+/b", "+/b/#",
    "/#", "/+", "°/#", "a/b/c/#", "none/#", "none",
];
const DATASOURCES: [&str; 4] = ["a", "press-4", "press-40", "press-5"];

#[tokio::test]
async fn every_filter_finds_what_it_names_in_order_however_small_the_pages() {
    let dir = directory();
    let log = open_log(dir.path());
    let retained = start(dir.path(), &log);
    let all: Vec<_> = DATASOURCES
        .iter()
        .flat_map(|datasource| TOPICS.iter().map(move |topic| (*datasource, *topic, &b"1"[..], RETAIN)))
        .collect();
    append(&log, all.iter().rev().copied()).await;
    for wanted in FILTERS {
        for bytes_max in [0, 20, 1 << 20] {
            let mut expected: Vec<_> =
                TOPICS.into_iter().filter(|topic| filter(wanted).matches(topic)).collect();
            expected.sort_unstable();
            let found = found(&retained, &log, Some("press-4"), wanted, bytes_max).await;
            assert!(found.iter().all(|message| message.datasource == "press-4"));
            let found: Vec<_> = found.iter().map(|message| message.topic.as_str()).collect();
            assert_eq!(found, expected, "{wanted}");
        }
    }
    assert_eq!(found(&retained, &log, Some("press-6"), "#", 1 << 20).await, []);
}

#[tokio::test]
async fn over_all_datasources_the_datasource_is_the_first_level() {
    let dir = directory();
    let log = open_log(dir.path());
    let retained = start(dir.path(), &log);
    let all: Vec<_> = DATASOURCES
        .iter()
        .flat_map(|datasource| TOPICS.iter().map(move |topic| (*datasource, *topic, &b"1"[..], RETAIN)))
        .collect();
    append(&log, all.iter().copied()).await;
    let under = |level: &str| FILTERS.map(|filter| format!("{level}/{filter}"));
    let filters = ["#", "+", "press-4", "none/#", "/#"].map(str::to_owned).into_iter();
    let filters: Vec<_> = filters.chain(under("+")).chain(under("press-4")).chain(under("a")).collect();
    let mut some = 0;
    for wanted in filters {
        for bytes_max in [0, 1 << 20] {
            let mut expected: Vec<_> =
                all.iter().map(|(datasource, topic, ..)| (*datasource, *topic)).collect();
            expected.retain(|(datasource, topic)| filter(&wanted).matches(&format!("{datasource}/{topic}")));
            expected.sort_unstable();
            some += expected.len();
            let found = found(&retained, &log, None, &wanted, bytes_max).await;
            let found: Vec<_> =
                found.iter().map(|found| (found.datasource.as_str(), found.topic.as_str())).collect();
            assert_eq!(found, expected, "{wanted}");
        }
    }
    assert!(some > 100, "{some}");
    let page =
        retained.page(Some(&DatasourceId::all()), &filter("press-4/a"), 1, None, 1).await.expect("a page");
    assert_eq!(page.messages, [], "it came after offset 0");
    let page = retained.page(Some(&DatasourceId::all()), &filter("a/a"), 1, None, 1).await.expect("a page");
    assert_eq!(page.messages.len(), 1, "* is the same as none");
}

#[tokio::test]
async fn twenty_thousand_topics_come_in_pages_of_the_size_that_was_asked_for() {
    let dir = directory();
    let log = open_log(dir.path());
    let retained = start(dir.path(), &log);
    let topics: Vec<String> = (0..20_000).map(|n| format!("machine/{:03}/{n:05}", n % 200)).collect();
    for topics in topics.chunks(1000) {
        append(&log, topics.iter().map(|topic| ("press-4", topic.as_str(), &[b'x'; 80][..], RETAIN))).await;
    }
    caught_up(&retained, &log).await;
    let (mut names, mut pages, mut after) = (Vec::new(), 0, None);
    loop {
        let page = retained
            .page(Some(&id("press-4")), &filter("machine/#"), log.next_offset(), after, 64 << 10)
            .await;
        let page = page.expect("a page");
        let bytes: usize = page.messages.iter().map(|message| message.payload.len()).sum();
        assert!(bytes <= 64 << 10, "{bytes}");
        names.extend(page.messages.into_iter().map(|message| message.topic));
        pages += 1;
        match page.next {
            Some(next) => after = Some(next),
            None => break,
        }
    }
    let mut expected = topics.clone();
    expected.sort_unstable();
    assert_eq!(names, expected);
    assert!((30..60).contains(&pages), "{pages} pages");
    // One of two hundred, by a wildcard in the middle and by a prefix.
    assert_eq!(found(&retained, &log, Some("press-4"), "machine/+/00007", 1 << 20).await.len(), 1);
    assert_eq!(found(&retained, &log, Some("press-4"), "machine/007/+", 1 << 20).await.len(), 100);
}

/// Where a kill at this moment would leave the database.
fn copy_as_killed(dir: &Path) -> TempDir {
    let copy = directory();
    for name in [RETAINED_FILE_NAME.to_owned(), format!("{RETAINED_FILE_NAME}-wal")] {
        std::fs::copy(dir.join(&name), copy.path().join(&name)).expect("copied");
    }
    copy
}

#[tokio::test]
async fn a_kill_at_any_moment_leaves_what_the_rest_of_the_log_makes_exact() {
    let dir = directory();
    let log = open_log(dir.path());
    let retained = start(dir.path(), &log);
    let mut model = BTreeMap::new();
    let mut killed = Vec::new();
    for round in 0..40_u32 {
        for n in 0..5 {
            let mixed = (round * 5 + n).wrapping_mul(2_654_435_761) >> 8;
            let topic = format!("t/{}", mixed % 11);
            let flags = if mixed >> 8 & 3 == 0 { PLAIN } else { RETAIN };
            let payload = if mixed >> 10 & 1 == 0 { String::new() } else { format!("{round}.{n}") };
            append(&log, [("press-4", topic.as_str(), payload.as_bytes(), flags)]).await;
            match (flags == RETAIN, payload.is_empty()) {
                (true, true) => drop(model.remove(&topic)),
                (true, false) => drop(model.insert(topic, payload.into_bytes())),
                (false, _) => {}
            }
        }
        caught_up(&retained, &log).await;
        if round % 4 == 0 {
            killed.push(copy_as_killed(dir.path()));
        }
    }
    let expected: Vec<_> =
        model.into_iter().map(|(topic, payload)| ("press-4".to_owned(), topic, payload)).collect();
    assert!((3..11).contains(&expected.len()), "{expected:?}");
    assert_eq!(everything(&retained, &log).await, expected);
    for dir in killed {
        let retained = start(dir.path(), &log);
        assert_eq!(everything(&retained, &log).await, expected);
    }
    retained.stop(Instant::now() + DEADLINE).await;
    assert_eq!(everything(&start(dir.path(), &log), &log).await, expected);
}

/// What a killed gateway had let in and not consumed did not count until it was, and a topic more was let in meanwhile.
#[tokio::test]
async fn what_was_not_consumed_before_a_kill_counts_from_the_start() {
    let dir = directory();
    let log = open_log(dir.path());
    let retained = start(dir.path(), &log);
    append(&log, [("press-4", "a", &b"1"[..], RETAIN), ("press-4", "b", &b"1"[..], RETAIN)]).await;
    caught_up(&retained, &log).await;
    let killed = copy_as_killed(dir.path());
    append(&log, [("press-4", "a", &b""[..], RETAIN)]).await;
    append(&log, [("press-4", "c", &b"22"[..], RETAIN), ("press-4", "d", &b"1"[..], PLAIN)]).await;
    append(&log, [("press-4", "a", &b"333"[..], RETAIN), ("press-5", "e", &b"1"[..], RETAIN)]).await;
    append(&log, [("press-4", "b", &b""[..], RETAIN)]).await;
    caught_up(&retained, &log).await;
    // As a start counts, before its thread has consumed anything.
    let path = killed.path().join(RETAINED_FILE_NAME);
    let state = {
        let table = RetainedTable::open(&path).expect("opens");
        assert!(table.cursor() < log.next_offset());
        let state = RetainedFollowerState::new(Some(&table), Box::new(|_| ()));
        state.count_topics(&table, &*log, || true).expect("reads");
        state
    };
    for topics in [retained.topics(), state.topics()] {
        for (datasource, count, bytes) in [("press-4", 2, 4 + 3), ("press-5", 1, 2)] {
            let enter = |topics_max, bytes_max| topics.try_enter(datasource, "new", 1, topics_max, bytes_max);
            assert!(enter(count, u64::MAX).is_err(), "{datasource} has {count}");
            assert!(enter(u64::MAX, bytes).is_err(), "{datasource} has {bytes} bytes");
            assert!(enter(count + 1, bytes + 1).is_ok(), "{datasource} has no more");
        }
    }
    let restarted = start(killed.path(), &log);
    caught_up(&restarted, &log).await;
    let enter = |topics_max| restarted.topics().try_enter("press-4", "new", 1, topics_max, u64::MAX);
    assert!(enter(2).is_err() && enter(3).is_ok(), "the thread counts none of it again");
}

#[tokio::test]
async fn a_stop_leaves_the_cursor_at_the_end_and_everything_in_one_file() {
    let dir = directory();
    let log = open_log(dir.path());
    let durable: Arc<Mutex<Vec<Offset>>> = Arc::default();
    let noted = durable.clone();
    let consumed = move |offset| noted.lock().push(offset);
    let retained = RetainedStore::start(dir.path(), log.clone(), consumed).expect("starts");
    append(&log, [("press-4", "a", &b"1"[..], RETAIN)]).await;
    caught_up(&retained, &log).await;
    for _ in 0..50 {
        append(&log, [("press-4", "a", &b"2"[..], PLAIN)]).await;
    }
    retained.stop(Instant::now() + DEADLINE).await;
    let durable = durable.lock().clone();
    assert_eq!(durable.last(), Some(&51));
    assert!(durable.is_sorted() && durable.len() < 20, "{durable:?}");
    let copy = directory();
    std::fs::copy(dir.path().join(RETAINED_FILE_NAME), copy.path().join(RETAINED_FILE_NAME)).expect("copied");
    let table = RetainedTable::open(&copy.path().join(RETAINED_FILE_NAME)).expect("opens");
    assert_eq!((table.cursor(), table.is_empty()), (51, false));
}

#[tokio::test]
async fn what_retention_has_removed_is_passed_over() {
    let dir = directory();
    let log = open_log(dir.path());
    append(&log, [("press-4", "old", &b"1"[..], RETAIN)]).await;
    log.begin_retention();
    let payload = [b'x'; 1000];
    while log.first_offset() == 0 {
        append(&log, std::iter::repeat_n(("press-4", "a", &payload[..], PLAIN), 1000)).await;
    }
    append(&log, [("press-4", "new", &b"2"[..], RETAIN)]).await;
    let retained = start(dir.path(), &log);
    assert_eq!(everything(&retained, &log).await, [("press-4".into(), "new".into(), b"2".into())]);
    assert_eq!(retained.trouble(), None);
}

#[tokio::test]
async fn the_log_keeps_what_was_not_consumed() {
    let dir = directory();
    let log = open_log(dir.path());
    let hold = log.hold();
    let retained =
        RetainedStore::start(dir.path(), log.clone(), move |offset| hold.set(offset)).expect("starts");
    log.begin_retention();
    // Three times what the log may hold: it must remove segments, and may remove only what is consumed.
    let payload = [b'x'; 1000];
    let topics: Vec<String> = (0..24).map(|n| format!("t/{n:02}")).collect();
    for topic in &topics {
        append(&log, [("press-4", topic.as_str(), &b"1"[..], RETAIN)]).await;
        append(&log, std::iter::repeat_n(("press-4", "a", &payload[..], PLAIN), 1000)).await;
    }
    let found = everything(&retained, &log).await;
    assert_eq!(found.into_iter().map(|(_, topic, _)| topic).collect::<Vec<_>>(), topics);
    assert!(log.first_offset() > 0, "segments have gone");
}

#[tokio::test]
async fn a_log_that_ends_before_the_cursor_is_refused() {
    let dir = directory();
    let log = open_log(dir.path());
    append(&log, std::iter::repeat_n(("press-4", "a", &b"1"[..], PLAIN), 10)).await;
    start(dir.path(), &log).stop(Instant::now() + DEADLINE).await;
    let other = directory();
    let other_log = open_log(other.path());
    let error = RetainedStore::start(dir.path(), other_log, |_| ()).map(drop).expect_err("the log is behind");
    assert!(matches!(error, RetainedError::LogBehind { consumed: 10, log_end: 0 }), "{error}");
}

#[tokio::test]
async fn a_full_disk_delays_retained_messages_and_loses_none() {
    let dir = directory();
    let log = open_log(dir.path());
    let path = dir.path().join(RETAINED_FILE_NAME);
    let table = RetainedTable::open(&path).expect("opens");
    table.set("max_page_count", 1);
    let shared = Arc::new(RetainedFollowerState::new(Some(&table), Box::new(|_| ())));
    let follower = RetainedFollower::new(path.clone(), Some(table), log.clone(), 0, shared.clone());
    shared.control().start(follower, log.clone()).expect("starts");
    append(&log, [("press-4", "a", &[b'x'; 100_000][..], RETAIN), ("press-4", "b", b"2", RETAIN)]).await;
    until("it says what the trouble is", || shared.control().trouble().is_some()).await;
    let trouble = shared.control().trouble().unwrap_or_default();
    assert!(trouble.contains("retained.db") && trouble.contains("the disk is full"), "{trouble}");
    assert_eq!((shared.cursor(), shared.is_empty()), (0, true));
    shared.control().stop(Instant::now() + Duration::from_millis(100)).await;
    until("the thread ends", || shared.control().has_ended()).await;

    // The bound was a setting of the closed connection.
    let retained = start(dir.path(), &log);
    assert_eq!(everything(&retained, &log).await.len(), 2);
}

#[tokio::test]
async fn after_an_error_of_another_kind_the_database_is_opened_again() {
    let dir = directory();
    let log = open_log(dir.path());
    let path = dir.path().join(RETAINED_FILE_NAME);
    let table = RetainedTable::open(&path).expect("opens");
    table.set("query_only", 1);
    let shared = Arc::new(RetainedFollowerState::new(Some(&table), Box::new(|_| ())));
    let follower = RetainedFollower::new(path.clone(), Some(table), log.clone(), 0, shared.clone());
    shared.control().start(follower, log.clone()).expect("starts");
    append(&log, [("press-4", "a", &b"1"[..], RETAIN)]).await;
    tokio::time::timeout(DEADLINE, shared.wait_caught_up(1)).await.expect("caught up in time");
    until("the trouble is over", || shared.control().trouble().is_none()).await;
    shared.control().stop(Instant::now() + DEADLINE).await;
    until("the thread ends", || shared.control().has_ended()).await;
    assert_eq!(everything(&start(dir.path(), &log), &log).await.len(), 1);
}

#[tokio::test]
async fn new_rules_are_followed_where_more_were_noted_of_another_registry() {
    use crate::log::{WithheldChange, WithheldRule, WithheldRules};

    let dir = directory();
    let log = open_log(dir.path());
    let mut table = RetainedTable::open(&dir.path().join(RETAINED_FILE_NAME)).expect("opens");
    let earlier = WithheldRules::default();
    for key in 5..8 {
        earlier.push(WithheldChange::GiveBack(id("press-9"), KeyId([key; 6])));
    }
    let (changes, left_out) = earlier.changes_and_rules(0);
    table.follow_rules(&changes, &left_out, 0).expect("followed");
    assert_eq!(table.withheld_version(), 3);
    drop(table);
    append(&log, [("press-4", "a", &b"1"[..], RETAIN), ("press-5", "a", &b"1"[..], RETAIN)]).await;
    let retained = start(dir.path(), &log);
    assert_eq!(everything(&retained, &log).await.len(), 2);
    let (datasource, key_id) = (id("press-4"), KeyId([1; 6]));
    let rule = WithheldRule { datasource, key_id, since: i64::MIN, below: Offset::MAX };
    let version = log.withheld().push(WithheldChange::Withhold(rule));
    tokio::time::timeout(DEADLINE, retained.wait_reconciled(version)).await.expect("followed in time");
    let counts = ["press-4", "press-5"].map(|of| retained.count_of(&id(of)).expect("reads").0);
    assert_eq!(counts, [0, 1], "what is left out is not in the file either");
}

/// Damages all pages but the first, so that the thread, which only writes cursors, does not notice.
fn damage(dir: &Path) {
    let path = dir.join(RETAINED_FILE_NAME);
    let connection = Connection::open(&path).expect("opens");
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).expect("a checkpoint");
    drop(connection);
    let bytes = usize::try_from(std::fs::metadata(&path).expect("it is there").len()).expect("small");
    let file = std::fs::File::options().write(true).open(&path).expect("opens");
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0xff; bytes - 3 * 4096], 3 * 4096)
        .expect("written");
}

#[tokio::test]
async fn another_database_that_cannot_be_opened_at_once_gets_all_from_the_log() {
    let dir = directory();
    let log = open_log(dir.path());
    let retained = start(dir.path(), &log);
    let large = vec![b'x'; 10_000];
    append(&log, [("press-4", "a", &large[..], RETAIN), ("press-4", "b", &large[..], RETAIN)]).await;
    append(&log, [("press-5", "c", &large[..], RETAIN), ("press-5", "d", &b"1"[..], PLAIN)]).await;
    assert_eq!(everything(&retained, &log).await.len(), 3);
    damage(dir.path());
    // A database that was half set aside before cannot go where it has to.
    let moving = |more: &str| dir.path().join(format!("retained-set-aside-20260101T000000Z.db{more}"));
    std::fs::write(moving(""), b"earlier").expect("written");
    std::fs::write(moving("-wal.moving"), b"").expect("written");
    std::fs::create_dir(moving("-wal")).expect("made");
    let mending = async {
        // Every reader that meets the damage is answered, also those who come at the same time.
        let deadline = Instant::now() + DEADLINE;
        while retained.set_aside().is_none() {
            let (filter, press) = (filter("#"), id("press-4"));
            let page = || retained.page(Some(&press), &filter, log.next_offset(), None, 1 << 20);
            let _ = tokio::join!(page(), page(), page());
            assert!(Instant::now() < deadline, "damage is noticed in time");
        }
    };
    tokio::time::timeout(DEADLINE, mending).await.expect("readers are answered");
    std::fs::remove_dir(moving("-wal")).expect("removed");
    caught_up(&retained, &log).await;
    until("the trouble is over", || retained.trouble().is_none()).await;
    let found = everything(&retained, &log).await;
    assert_eq!(found.len(), 3);
    assert!(found.iter().all(|(_, _, payload)| *payload == large));
    assert!(!retained.is_empty());
    assert_eq!(retained.count_of(&id("press-4")).expect("reads"), (2, 2 * large.len() as u64));
    for (datasource, topics) in [("press-4", 2), ("press-5", 1)] {
        let enter = |topics_max| retained.topics().try_enter(datasource, "new", 1, topics_max, u64::MAX);
        assert!(enter(topics).is_err() && enter(topics + 1).is_ok(), "{datasource} has {topics}");
    }
}

#[tokio::test]
async fn damage_that_a_reader_meets_is_mended_from_the_log() {
    let dir = directory();
    let log = open_log(dir.path());
    let retained = start(dir.path(), &log);
    let large = vec![b'x'; 10_000];
    append(&log, [("press-4", "a", &large[..], RETAIN), ("press-4", "b", &large[..], RETAIN)]).await;
    assert_eq!(everything(&retained, &log).await.len(), 2);
    damage(dir.path());
    let deadline = Instant::now() + DEADLINE;
    let found = loop {
        let page = retained.page(Some(&id("press-4")), &filter("#"), log.next_offset(), None, 1 << 20).await;
        match page {
            Ok(page) if page.messages.len() == 2 => break page,
            _ => assert!(Instant::now() < deadline, "mended in time"),
        }
    };
    assert_eq!(found.messages[0].payload, large);
    assert!(retained.set_aside().expect("it is said").contains("retained-set-aside-"));
}

#[tokio::test]
async fn looking_for_a_filter_reads_names_and_no_rows() {
    let dir = directory();
    let log = open_log(dir.path());
    start(dir.path(), &log).stop(Instant::now() + DEADLINE).await;
    let connection = Connection::open(dir.path().join(RETAINED_FILE_NAME)).expect("opens");
    let plan: String = connection
        .query_row(&format!("EXPLAIN QUERY PLAN {}", page::SELECT_RETAINED_TOPICS), ["", "", ""], |row| {
            row.get(3)
        })
        .expect("a plan");
    assert!(plan.contains("USING COVERING INDEX") && plan.contains("topic>? AND topic<?"), "{plan}");
}

#[tokio::test]
async fn single_messages_are_found_again_by_their_offsets() {
    let dir = directory();
    let log = open_log(dir.path());
    let retained = start(dir.path(), &log);
    append(&log, [("press-4", "a", &b"0"[..], RETAIN), ("press-4", "b", b"1", RETAIN)]).await;
    append(&log, [("press-5", "c", &b"2"[..], RETAIN), ("press-5", "d", b"3", PLAIN)]).await;
    append(&log, [("press-4", "a", &b"4"[..], RETAIN)]).await;
    let (a, b, c) = (Some((4, "a".to_owned())), Some((1, "b".to_owned())), Some((2, "c".to_owned())));
    let all = found_at(&retained, None, &[4, 0, 2, 1, 3], 1 << 20).await;
    assert_eq!(all, [a.clone(), None, c, b.clone(), None], "replaced, or not retained");
    assert_eq!(found_at(&retained, Some("press-4"), &[2, 1, 4], 1 << 20).await, [None, b.clone(), a]);
    assert_eq!(found_at(&retained, None, &[0, 1, 4], 1).await, [None, b], "as much as is asked for");
    retained.stop(Instant::now() + DEADLINE).await;
    // As a file of the first format has it.
    let connection = Connection::open(dir.path().join(RETAINED_FILE_NAME)).expect("opens");
    connection.execute_batch("DROP INDEX messages_offset; PRAGMA user_version = 1").expect("runs");
    drop((connection, retained));
    drop(start(dir.path(), &log));
    let connection = Connection::open(dir.path().join(RETAINED_FILE_NAME)).expect("opens");
    let plan = format!("EXPLAIN QUERY PLAN {}", table::SELECT_RETAINED_AT);
    let plan: String = connection.query_row(&plan, ["", ""], |row| row.get(3)).expect("a plan");
    assert!(plan.contains("messages_offset (offset=?)"), "{plan}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_table_holds_what_a_map_would(
        transactions in prop::collection::vec(
            prop::collection::vec((0..4_usize, prop::sample::select(vec!["", "1", "2"])), 0..6), 1..6,
        ),
    ) {
        let dir = directory();
        let path = dir.path().join(RETAINED_FILE_NAME);
        let mut table = RetainedTable::open(&path).expect("opens");
        let mut model = BTreeMap::new();
        let mut offset = 0;
        for messages in transactions {
            let mut newest = BTreeMap::new();
            for (topic, payload) in messages {
                let message = RetainedMessage {
                    offset,
                    datasource: "press-4".to_owned(),
                    topic: TOPICS[topic].to_owned(),
                    payload: payload.into(),
                    content_type: String::new(),
                    properties: Vec::new(),
                    key_id: KeyId([9; 6]),
                    transport: Transport::Http,
                    publisher: 1,
                    received_at: -1,
                    flags: RETAIN,
                };
                newest.insert(topic, message);
                offset += 1;
            }
            table.write(newest.values().map(RetainedMessage::as_record), offset, false).expect("written");
            for message in newest.into_values() {
                if message.payload.is_empty() {
                    model.remove(&message.topic);
                } else {
                    model.insert(message.topic.clone(), message);
                }
            }
            prop_assert_eq!(table.is_empty(), model.is_empty());
            let wanted = RetainedSelection::new(None, &filter("#")).expect("something");
            let page = read_retained_page(&SqliteReaders::new(path.clone(), &RETAINED_DATABASE), &wanted, ALL, None, 1 << 20).expect("a page");
            prop_assert_eq!(page, RetainedPage { messages: model.values().cloned().collect(), next: None });
        }
        prop_assert_eq!(RetainedTable::open(&path).expect("opens").cursor(), offset);
    }
}
