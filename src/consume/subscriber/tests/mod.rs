//! Feeds against a model, with the real log and router: whatever a subscriber's pace and start, every
//! record that matches comes out once and in the log's order.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;
use tokio::time::timeout;

use super::{FeedItem, GroupSession, Router, ShareDelivery, ShareGroups, SubscriberFeed};
use crate::config::{Config, LogConfig};
use crate::limits::{
    BATCH_BYTES_MAX, MAILBOX_BYTES_MAX, MAILBOX_SWEEP_BYTES, MAILBOX_WINDOW_BYTES, ROUTE_STEPS_MAX,
};
use crate::log::{EmbeddedLog, Log, Section};
use crate::message::{DatasourceId, KeyId, Lease, Offset, RecordFlags, Transport, now_micros};
use crate::processor::ProcessorTime;
use crate::shares::{ShareCount, TenantShares};

mod groups;

const SOON: Duration = Duration::from_secs(10);
const DATASOURCES: [&str; 3] = ["a", "b", "c"];
const TOPICS: [&str; 3] = ["x", "x/y", "z"];

struct Scene {
    log: Arc<dyn Log>,
    router: Router,
    shares: Arc<TenantShares>,
    _dir: TempDir,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let config = Config::default();
        let log_config = LogConfig { durability: crate::config::Durability::Os, ..config.log };
        let log = EmbeddedLog::open(dir.path(), &log_config, &config.intake).expect("opens");
        let log: Arc<dyn Log> = Arc::new(log);
        let router = Router::start(&log).expect("a thread");
        Self { log, router, shares: Arc::default(), _dir: dir }
    }

    /// Appends records in one commit, one section each.
    async fn append(&self, records: &[(usize, usize)], payload: &[u8]) {
        let sections = records.iter().map(|&(datasource, topic)| {
            let datasource = id(DATASOURCES[datasource]);
            let mut section =
                Section::new(datasource, KeyId([1; 6]), Lease::new(), Transport::Mqtt, 0, now_micros());
            section.push(TOPICS[topic], payload, "", &[], RecordFlags::default());
            section
        });
        let appended = self.log.append(sections.collect(), Instant::now() + SOON);
        appended.await.expect("an answer").expect("appended");
    }

    fn feed(&self, datasource: &str, position: Offset) -> SubscriberFeed {
        let datasource = if datasource == "*" { DatasourceId::all() } else { id(datasource) };
        SubscriberFeed::new(self.router.clone(), self.log.clone(), &self.shares, &datasource, position)
    }
}

fn id(datasource: &str) -> DatasourceId {
    DatasourceId::new(datasource).expect("a slug")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_router_leaves_the_records_of_a_tenant_in_the_slow_lane_to_its_own_subscribers() {
    let scene = Scene::new();
    let processor = ProcessorTime::new();
    scene.router.set_processor(processor.clone());
    let slow = processor.of_datasource(&id("a"));
    processor.slow_down(&slow);
    let [mut slowed, mut other] = ["a", "b"].map(|datasource| {
        let mut feed = scene.feed(datasource, 0);
        feed.set_filter(0, "#", None);
        feed
    });
    for feed in [&mut slowed, &mut other] {
        assert!(next(feed, Duration::from_millis(20)).await.is_empty(), "it is live");
    }
    for round in 0..5 {
        scene.append(&[(0, 0), (1, 0), (0, 2)], b"x").await;
        let first = 3 * round;
        while scene.router.routed_offset() < first + 3 {
            tokio::task::yield_now().await;
        }
        assert!(!slowed.mailbox().go_behind(), "nothing is routed to it");
        assert_eq!(next(&mut other, SOON).await, [(first + 1, vec![0])]);
        let mut came = Vec::new();
        while came.len() < 2 {
            came.extend(next(&mut slowed, SOON).await);
        }
        assert_eq!(came, [(first, vec![0]), (first + 2, vec![0])], "it reads by itself");
    }
}

/// The next records' offsets and slots; none if there are none for a while.
async fn next(feed: &mut SubscriberFeed, wait: Duration) -> Vec<(Offset, Vec<u32>)> {
    let records = async {
        loop {
            let item = poll_fn(|cx| feed.poll_next(cx)).await.expect("the log is whole");
            let FeedItem::Matched(mut matched) = item else { panic!("nothing is removed") };
            let mut records = Vec::new();
            while let Some(hit) = matched.peek(&mut usize::MAX.clone()) {
                let mut slots = hit.slots.to_vec();
                slots.sort_unstable();
                records.push((hit.place.offset, slots));
                matched.advance();
            }
            // A record right before its filter's begin is routed for it, and is none of its.
            if !records.is_empty() {
                return records;
            }
        }
    };
    timeout(wait, records).await.unwrap_or_default()
}

#[derive(Debug, Clone)]
enum Step {
    /// This many commits of these records; large ones fill a mailbox.
    Append { records: Vec<(usize, usize)>, commits: usize, large: bool },
    /// The feed is polled this often.
    Read(usize),
    /// The feed gives out everything and goes live.
    Settle,
    /// A filter is added, from here on or from an earlier record.
    Subscribe { filter: usize, from: Option<u64> },
    /// The first filter is removed.
    Unsubscribe,
}

/// Filters of a key of `a`, and what they match of [`TOPICS`].
const FILTERS: [(&str, [bool; 3]); 4] =
    [("x", [true, false, false]), ("#", [true; 3]), ("+", [true, false, true]), ("x/#", [true, true, false])];

fn step() -> impl Strategy<Value = Step> {
    let record = (0..DATASOURCES.len(), 0..TOPICS.len());
    prop_oneof![
        4 => (prop::collection::vec(record, 1..5), 1..6_usize, prop::bool::weighted(0.2))
            .prop_map(|(records, commits, large)| Step::Append { records, commits, large }),
        3 => (1..4_usize).prop_map(Step::Read),
        2 => Just(Step::Settle),
        2 => (0..FILTERS.len(), prop::option::weighted(0.3, 0..40_u64))
            .prop_map(|(filter, from)| Step::Subscribe { filter, from }),
        1 => Just(Step::Unsubscribe),
    ]
}

/// What the feed has to give out: each filter's slot and start, and all appended records.
#[derive(Default)]
struct Model {
    /// For each offset the topic of its record, if the record is one of `a`.
    appended: Vec<Option<usize>>,
    filters: Vec<(u32, usize, Offset)>,
    position: Offset,
}

impl Model {
    /// What comes next from the position on, up to the end.
    fn rest(&self) -> Vec<(Offset, Vec<u32>)> {
        let records = self.appended.iter().zip(0_u64..).skip(usize::try_from(self.position).expect("small"));
        let matching = records.filter_map(|(topic, offset)| {
            let matches = |(slot, filter, from): &(u32, usize, Offset)| {
                (offset >= *from && FILTERS[*filter].1[(*topic)?]).then_some(*slot)
            };
            let mut slots: Vec<u32> = self.filters.iter().filter_map(matches).collect();
            slots.sort_unstable();
            (!slots.is_empty()).then_some((offset, slots))
        });
        matching.collect()
    }

    /// Has the feed give out what comes next, and compares it. Returns whether there was anything.
    async fn read_next(&mut self, feed: &mut SubscriberFeed) -> bool {
        let expected = self.rest();
        if expected.is_empty() {
            return false;
        }
        let records = next(feed, SOON).await;
        assert!(!records.is_empty(), "{} records did not come", expected.len());
        assert_eq!(records, expected[..records.len()]);
        self.position = records.last().expect("not empty").0 + 1;
        true
    }
}

async fn run(steps: Vec<Step>) {
    let scene = Scene::new();
    let mut feed = scene.feed("a", 0);
    let mut model = Model::default();
    let large = vec![b'x'; MAILBOX_BYTES_MAX / 3];
    for step in steps {
        match step {
            Step::Append { records, commits, large: is_large } => {
                let payload: &[u8] = if is_large { &large } else { b"small" };
                for _ in 0..commits {
                    scene.append(&records, payload).await;
                    let of_a = |&(datasource, topic): &(usize, usize)| (datasource == 0).then_some(topic);
                    model.appended.extend(records.iter().map(of_a));
                }
            }
            Step::Read(times) => {
                for _ in 0..times {
                    if !model.read_next(&mut feed).await {
                        break;
                    }
                }
            }
            Step::Settle => {
                while model.read_next(&mut feed).await {}
                until_routed(&scene).await;
                let deadline = Instant::now() + SOON;
                while !feed.has_reached(Offset::MAX) {
                    assert!(Instant::now() < deadline, "a feed with nothing to give out goes live");
                    assert_eq!(next(&mut feed, Duration::from_millis(1)).await, []);
                }
            }
            Step::Subscribe { filter, from } => {
                if model.filters.iter().any(|(_, other, _)| *other == filter) {
                    continue;
                }
                let slot = u32::try_from(filter).expect("few filters");
                let end = model.appended.len() as u64;
                let from = from.map(|from| from.min(end));
                assert_eq!(feed.set_filter(slot, FILTERS[filter].0, from), from.unwrap_or(end));
                if let Some(from) = from.filter(|from| *from < model.position) {
                    for (_, _, begin) in &mut model.filters {
                        *begin = model.position.max(*begin);
                    }
                    model.position = from;
                }
                model.filters.push((slot, filter, from.unwrap_or(end)));
            }
            Step::Unsubscribe => {
                if !model.filters.is_empty() {
                    let (slot, ..) = model.filters.remove(0);
                    feed.remove_filter(slot);
                }
            }
        }
    }
    // Whatever the steps were, the feed gives out the rest and then nothing more.
    while model.read_next(&mut feed).await {}
    assert_eq!(next(&mut feed, Duration::from_millis(1)).await, []);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn a_feed_gives_out_what_matches_once_and_in_order_at_any_pace(
        steps in prop::collection::vec(step(), 1..30),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.expect("a runtime").block_on(run(steps));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filter_that_begins_in_the_past_gets_it_on_a_live_feed_too() {
    let scene = Scene::new();
    let mut feed = scene.feed("a", 0);
    feed.set_filter(0, "x", None);
    go_live(&mut feed).await;
    // Nothing of that is for the filter, but one record, which waits in the mailbox.
    for topic in [2, 2, 0, 2] {
        scene.append(&[(0, topic)], b"x").await;
    }
    until_routed(&scene).await;
    assert_eq!(feed.set_filter(1, "z", Some(3)), 3);
    for expected in [(2, vec![0]), (3, vec![1])] {
        assert_eq!(next(&mut feed, SOON).await, [expected]);
    }
    // The same after a while without any filter.
    (0..2).for_each(|slot| feed.remove_filter(slot));
    go_live(&mut feed).await;
    scene.append(&[(0, 2)], b"x").await;
    until_routed(&scene).await;
    feed.set_filter(0, "z", Some(4));
    assert_eq!(next(&mut feed, SOON).await, [(4, vec![0])]);
    go_live(&mut feed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_record_is_lost_between_catching_up_and_being_live() {
    const RECORDS: u64 = 9_000;
    let scene = std::sync::Arc::new(Scene::new());
    let mut readers = Vec::new();
    for n in 0..8_u64 {
        let scene = scene.clone();
        readers.push(tokio::spawn(async move {
            // Each begins at another moment and in the past, while more records are appended.
            tokio::time::sleep(Duration::from_millis(3 * n)).await;
            let mut feed = scene.feed("*", 0);
            feed.set_filter(0, "a/#", Some(0));
            let mut seen = 0;
            while seen < RECORDS {
                for (offset, _) in next(&mut feed, SOON).await {
                    assert_eq!(offset, seen);
                    seen += 1;
                }
                // Goes behind each time, so that going live interleaves with appends in many ways.
                feed.rewind(seen);
            }
        }));
    }
    for _ in 0..RECORDS / 3 {
        scene.append(&[(0, 0), (0, 1), (0, 2)], b"x").await;
    }
    for reader in readers {
        timeout(SOON, reader).await.expect("everything comes").expect("in order");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_member_that_left_had_taken_goes_to_another() {
    let scene = Scene::new();
    let groups = ShareGroups::local(scene.router.clone(), scene.log.clone(), scene.shares.clone());
    let key = (id("a"), "workers".into(), "#".into());
    let of = GroupSession { uid: 1, expiry_s: 0 };
    assert_eq!(groups.join(&key, of, None).await.expect("joined"), Some(0));
    let [mut first, mut second] = [(); 2].map(|()| groups.member(&key, of).expect("the group is there"));
    scene.append(&[(0, 0); 20], b"x").await;
    let take =
        async |member: &mut super::ShareMember| match timeout(SOON, poll_fn(|cx| member.poll_take(4, cx)))
            .await
        {
            Ok(Ok(ShareDelivery::Records(records))) => {
                records.iter().map(|(_, place)| place.offset).collect::<Vec<_>>()
            }
            _ => panic!("records come"),
        };
    let taken = take(&mut first).await;
    assert_eq!(groups.cursors(20), [(key.clone(), 0)], "nothing is dealt with yet");
    for offset in &taken[1..] {
        first.acknowledge(*offset);
    }
    drop(first);
    let mut others = Vec::new();
    while others.len() < 20 - taken.len() + 1 {
        let more = take(&mut second).await;
        more.iter().for_each(|offset| second.acknowledge(*offset));
        others.extend(more);
    }
    others.sort_unstable();
    let expected: Vec<u64> = (0..20).filter(|offset| !taken[1..].contains(offset)).collect();
    assert_eq!(others, expected);
    assert_eq!(groups.cursors(20), [(key.clone(), 20)]);
    drop(second);
    assert!(groups.leave(&key, 1, false), "the last session takes the group with it");
}

/// `count` records of one datasource and topic in one commit.
async fn append_many(scene: &Scene, datasource: &str, topic: &str, count: usize) {
    let mut section =
        Section::new(id(datasource), KeyId([1; 6]), Lease::new(), Transport::Mqtt, 0, now_micros());
    (0..count).for_each(|_| section.push(topic, b"x", "", &[], RecordFlags::default()));
    let appended = scene.log.append(vec![section], Instant::now() + SOON);
    appended.await.expect("an answer").expect("appended");
}

/// A client that came back was sent again one message of each of 256 large batches, all of which were in memory at once.
#[tokio::test]
async fn messages_that_are_sent_again_hold_few_of_the_batches_that_they_are_in() {
    let scene = Scene::new();
    let large = vec![b'x'; 1 << 20];
    for _ in 0..12 {
        let mut section =
            Section::new(id("a"), KeyId([1; 6]), Lease::new(), Transport::Mqtt, 0, now_micros());
        section.push("mine", b"x", "", &[], RecordFlags::default());
        section.push("large", &large, "", &[], RecordFlags::default());
        let appended = scene.log.append(vec![section], Instant::now() + SOON);
        appended.await.expect("an answer").expect("appended");
    }
    let share = scene.shares.share(&id("a"));
    let mut wanted: Vec<Offset> = (0..24).step_by(2).collect();
    while !wanted.is_empty() {
        let found = super::feed::fetch_in_turn(&share, &scene.log, wanted.clone()).await.expect("readable");
        let held: usize = found.iter().flatten().map(|(batch, _)| batch.weight()).sum();
        assert!(!found.is_empty() && held < 2 * BATCH_BYTES_MAX, "{held} bytes are held");
        for (offset, found) in wanted.drain(..found.len()).zip(&found) {
            assert_eq!(found.as_ref().expect("it is there").1.offset, offset);
        }
    }
}

/// Waits until a feed without records to give out is live: it has nothing to read.
async fn go_live(feed: &mut SubscriberFeed) {
    assert_eq!(next(feed, Duration::from_millis(50)).await, []);
}

async fn until_routed(scene: &Scene) {
    while scene.router.routed_offset() < scene.log.next_offset() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_many_filters_match_is_queued_once_and_comes_with_all_of_them() {
    const RECORDS: usize = 2_000;
    let scene = Scene::new();
    let mut feed = scene.feed("a", 0);
    // "x", "+", "#", and 61 that do not match.
    for slot in 0..64_u32 {
        let filter = match slot {
            0 => "x".to_owned(),
            1 => "+".to_owned(),
            2 => "#".to_owned(),
            _ => format!("y/{slot}"),
        };
        feed.set_filter(slot, &filter, None);
    }
    go_live(&mut feed).await;
    append_many(&scene, "a", "x", RECORDS).await;
    until_routed(&scene).await;
    let places = scene.shares.share(&id("a")).count(ShareCount::PlaceBytes);
    assert_eq!(places, (RECORDS * size_of::<crate::log::RecordPlace>()) as u64);
    let records = next(&mut feed, SOON).await;
    assert_eq!(records.len(), RECORDS);
    assert!(records.iter().all(|(_, slots)| *slots == [0, 1, 2]));
    assert_eq!(scene.shares.share(&id("a")).count(ShareCount::PlaceBytes), 0, "they are given back");
    // Down to one filter and to none, and up again.
    (1..64).for_each(|slot| feed.remove_filter(slot));
    append_many(&scene, "a", "x", 1).await;
    assert_eq!(next(&mut feed, SOON).await, [(RECORDS as u64, vec![0])]);
    feed.remove_filter(0);
    append_many(&scene, "a", "x", 1).await;
    feed.set_filter(7, "#", None);
    append_many(&scene, "a", "x", 1).await;
    assert_eq!(next(&mut feed, SOON).await, [(RECORDS as u64 + 2, vec![7])]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_costs_the_router_too_much_reads_by_itself_and_others_stay_live() {
    let scene = Scene::new();
    let (mut greedy, mut other) = (scene.feed("a", 0), scene.feed("b", 0));
    // Every topic is another, and goes through all of these.
    for slot in 0..512_u32 {
        let filter: Vec<&str> = (0..9).map(|level| if slot >> level & 1 == 0 { "x" } else { "+" }).collect();
        greedy.set_filter(slot, &format!("{}/#", filter.join("/")), None);
    }
    other.set_filter(0, "#", None);
    go_live(&mut greedy).await;
    go_live(&mut other).await;
    let mut sections = Vec::new();
    for (datasource, records) in [("a", ROUTE_STEPS_MAX / 400), ("b", 3)] {
        let mut section =
            Section::new(id(datasource), KeyId([1; 6]), Lease::new(), Transport::Mqtt, 0, now_micros());
        for n in 0..records {
            section.push(&format!("x/x/x/x/x/x/x/x/x/{n}"), b"x", "", &[], RecordFlags::default());
        }
        sections.push(section);
    }
    let appended = scene.log.append(sections, Instant::now() + SOON);
    appended.await.expect("an answer").expect("appended");
    until_routed(&scene).await;
    assert_eq!(scene.shares.share(&id("a")).count(ShareCount::PlaceBytes), 0, "nothing is queued for it");
    assert_eq!(next(&mut other, SOON).await.len(), 3);
    let mut seen = 0;
    while seen < ROUTE_STEPS_MAX / 400 {
        for (offset, slots) in next(&mut greedy, SOON).await {
            assert_eq!((offset, slots.len()), (seen as u64, 512));
            seen += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mailbox_that_nobody_empties_holds_no_old_batch() {
    let scene = Scene::new();
    let (mut idle, mut busy) = (scene.feed("a", 0), scene.feed("a", 0));
    idle.set_filter(0, "x", None);
    busy.set_filter(0, "z", None);
    go_live(&mut idle).await;
    go_live(&mut busy).await;
    scene.append(&[(0, 0)], b"held").await;
    let large = vec![b'x'; MAILBOX_BYTES_MAX];
    for _ in 0..2 * (MAILBOX_WINDOW_BYTES + MAILBOX_SWEEP_BYTES) / MAILBOX_BYTES_MAX {
        scene.append(&[(0, 2)], &large).await;
        assert_eq!(next(&mut busy, SOON).await.len(), 1);
    }
    until_routed(&scene).await;
    assert!(idle.mailbox().is_empty(), "its batch was let go of");
    assert_eq!(next(&mut idle, SOON).await, [(0, vec![0])], "and is read again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_feed_that_is_paused_leaves_its_turn_to_the_next() {
    let scene = Scene::new();
    scene.append(&[(0, 0); 10], b"x").await;
    let mut feeds: Vec<SubscriberFeed> = (0..2 * crate::shares::processors() + 1)
        .map(|_| {
            let mut feed = scene.feed("a", 0);
            feed.set_filter(0, "#", Some(0));
            feed
        })
        .collect();
    for feed in &mut feeds {
        assert_eq!(next(feed, SOON).await.len(), 10);
        assert!(feed.held_bytes() == 0);
        feed.pause();
    }
}
