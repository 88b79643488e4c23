//! Keeping once: message ids and QoS 2 exchanges against repetition, restarts, kills, failures,
//! damage, retention and time.

use std::collections::{BTreeMap, HashMap};

use super::*;

fn message(id: u32) -> OnceId {
    OnceId::of_message(&DatasourceId::new("press-4").expect("slug"), &id.to_string())
}

fn exchange(packet_id: u16) -> OnceId {
    OnceId::of_exchange(1, packet_id)
}

/// A section of `records` records that is kept once under `ids`.
fn once(ids: &[OnceId], records: usize) -> Section {
    let mut section = section(&vec![&b"x"[..]; records], &Lease::new());
    ids.iter().for_each(|id| section.keep_once(*id));
    section
}

fn keep(log: &EmbeddedLog, sections: Vec<Section>) -> Vec<SectionOutcome> {
    let appended = log.append(sections, later()).blocking_recv();
    appended.expect("the writer answers").expect("kept").outcomes
}

fn keep_one(log: &EmbeddedLog, id: OnceId) -> SectionOutcome {
    keep(log, vec![once(&[id], 1)]).remove(0)
}

fn release(log: &EmbeddedLog, ids: &[OnceId]) {
    let released = log.release(ids.to_vec(), later()).blocking_recv();
    assert_eq!(released.expect("the writer answers").expect("released").outcomes, []);
}

fn duplicate(first_offset: Offset, records: u32) -> SectionOutcome {
    SectionOutcome::Duplicate(Offsets::consecutive(first_offset, records))
}

fn conflict(first_offset: Offset, records: u32, in_exchange: bool) -> SectionOutcome {
    SectionOutcome::Conflict { earlier: Offsets::consecutive(first_offset, records), in_exchange }
}

/// The files of a log, as a kill would leave them now.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(dir.join("log")).expect("listable");
    let paths = entries.map(|entry| entry.expect("listable").path());
    paths.map(|path| (path.clone(), fs::read(path).expect("readable"))).collect()
}

/// Puts them back.
fn restore(dir: &Path, files: &BTreeMap<PathBuf, Vec<u8>>) {
    for path in self::files(dir).into_keys() {
        fs::remove_file(path).expect("removable");
    }
    files.iter().for_each(|(path, bytes)| fs::write(path, bytes).expect("writable"));
}

/// Ends a log as a kill does: without the frame that a clean shutdown writes.
fn kill(dir: &Path, log: EmbeddedLog) {
    let files = files(dir);
    drop(log);
    restore(dir, &files);
}

#[test]
fn the_same_id_again_is_answered_with_the_offsets_of_the_first_also_after_a_restart_and_a_kill() {
    let dir = TempDir::new().expect("temporary directory");
    let mut log = open(dir.path(), &config()).expect("opens");
    assert_eq!(keep(&log, vec![section(&[b"a"], &Lease::new())]), [kept(0, 1)]);
    assert_eq!(keep(&log, vec![once(&[message(1)], 3)]), [kept(1, 3)]);
    assert_eq!(keep(&log, vec![once(&[exchange(1)], 1)]), [kept(4, 1)]);
    for ended in ["not at all", "by a kill", "cleanly"] {
        assert_eq!(keep(&log, vec![once(&[message(1)], 3)]), [duplicate(1, 3)], "ended {ended}");
        assert_eq!(keep(&log, vec![once(&[message(2), exchange(1)], 1)]), [duplicate(4, 1)]);
        match ended {
            "not at all" => kill(dir.path(), log),
            _ => drop(log),
        }
        log = open(dir.path(), &config()).expect("opens");
    }
    assert_eq!(log.next_offset(), 5);
    assert_eq!(keep_one(&log, message(2)), kept(5, 1), "what was left out has entered no id");
}

/// A section with an id, and messages of topic and payload.
fn once_of(datasource: &str, id: OnceId, messages: &[(&str, &str)]) -> Section {
    let datasource = DatasourceId::new(datasource).expect("slug");
    let mut section = Section::new(datasource, KeyId([1; 6]), Lease::new(), Transport::Mqtt, 0, now_micros());
    section.keep_once(id);
    for (topic, payload) in messages {
        section.push(topic, payload.as_bytes(), "", &[], RecordFlags::default());
    }
    section
}

/// Acknowledging another message as a repetition would lose it.
#[test]
fn other_messages_under_a_known_id_are_refused_also_after_a_restart_and_a_kill() {
    let dir = TempDir::new().expect("temporary directory");
    let mut log = open(dir.path(), &config()).expect("opens");
    let first = |id| once_of("press-4", id, &[("t", "a"), ("u", "b")]);
    let others: [&[(&str, &str)]; 6] = [
        &[("t", "a"), ("u", "c")],
        &[("t", "a"), ("v", "b")],
        &[("u", "b"), ("t", "a")],
        &[("t", "a")],
        &[("t", "a"), ("u", "b"), ("u", "b")],
        &[("t", "au"), ("", "b")],
    ];
    let ids = [message(1), exchange(1)];
    // Beside each other in one commit.
    let sections = ids.into_iter().flat_map(|id| [first(id), once_of("press-4", id, others[0]), first(id)]);
    let expected = [kept(0, 2), conflict(0, 2, false), duplicate(0, 2)];
    let of_exchange = [kept(2, 2), conflict(2, 2, true), duplicate(2, 2)];
    assert_eq!(keep(&log, sections.collect()), [expected, of_exchange].concat());
    for ended in ["not at all", "by a kill", "cleanly"] {
        for (id, at, in_exchange) in [(ids[0], 0, false), (ids[1], 2, true)] {
            for messages in others {
                let outcome = keep(&log, vec![once_of("press-4", id, messages)]);
                assert_eq!(outcome, [conflict(at, 2, in_exchange)], "ended {ended}: {messages:?}");
            }
            assert_eq!(keep(&log, vec![first(id)]), [duplicate(at, 2)], "ended {ended}");
        }
        match ended {
            "not at all" => kill(dir.path(), log),
            _ => drop(log),
        }
        log = open(dir.path(), &config()).expect("opens");
    }
    assert_eq!(log.next_offset(), 4);
    release(&log, &[exchange(1)]);
    assert_eq!(keep(&log, vec![once_of("press-4", exchange(1), others[0])]), [kept(4, 2)]);
}

#[test]
fn who_asks_is_told_what_is_known_and_takes_no_id() {
    let dir = TempDir::new().expect("temporary directory");
    let log = open(dir.path(), &config()).expect("opens");
    let asking = |ids: &[OnceId], payload, only: bool| {
        let mut section = section(&[payload], &Lease::new());
        ids.iter().for_each(|id| section.ask_for(*id));
        if only {
            section.only_ask();
        }
        section
    };
    let ask = |ids: &[OnceId], payload: &'static str| {
        keep(&log, vec![asking(ids, payload.as_bytes(), true)]).remove(0)
    };
    assert_eq!(ask(&[message(1)], "x"), SectionOutcome::Unknown);
    let together = vec![
        asking(&[message(1)], b"x", true),
        once(&[message(1), exchange(1)], 1),
        asking(&[message(2), exchange(1)], b"x", true),
        asking(&[exchange(1)], b"y", true),
    ];
    let known = || SectionOutcome::Known(Offsets::consecutive(0, 1));
    let expected = [SectionOutcome::Unknown, kept(0, 1), known(), conflict(0, 1, true)];
    assert_eq!(keep(&log, together), expected);
    assert_eq!([ask(&[message(1)], "x"), ask(&[message(9), exchange(1)], "x")], [known(), known()]);
    assert_eq!(ask(&[message(1)], "y"), SectionOutcome::Unknown, "an id that is not taken may be another's");
    // What is kept otherwise, as in quarantine, is kept unless it is known.
    assert_eq!(keep(&log, vec![asking(&[message(1)], b"x", false)]), [known()]);
    assert_eq!(keep(&log, vec![asking(&[message(1)], b"y", false)]), [kept(1, 1)]);
    assert_eq!(keep(&log, vec![asking(&[message(2)], b"z", false)]), [kept(2, 1)]);
    assert_eq!(keep_one(&log, message(2)), kept(3, 1), "nobody has taken it");
}

/// One datasource's unreleased exchanges and ids must not push out another's, which would be kept twice.
#[test]
fn a_datasource_has_a_share_of_the_window_and_none_pushes_out_anothers() {
    const MINE: u32 = 20;
    let dir = TempDir::new().expect("temporary directory");
    let dedup = config::IntakeConfig {
        dedup_ids_max: 100,
        dedup_ids_per_datasource_max: 60,
        exchanges_per_datasource_max: 150,
        ..Config::default().intake
    };
    // There is room for 400 exchanges in all.
    let small = config::LogConfig { segment_bytes: 400 << 7, retention_bytes: 1 << 30, ..config() };
    let reopen = || EmbeddedLog::open(dir.path(), &small, &dedup).expect("opens");
    let id = |datasource: &str, n: u32| {
        OnceId::of_message(&DatasourceId::new(datasource).expect("slug"), &n.to_string())
    };
    let keep_message = |log: &EmbeddedLog, of: &str, n| {
        keep(log, vec![once_of(of, id(of, n), &[("t", &n.to_string())])]).remove(0)
    };
    let open_exchange = |log: &EmbeddedLog, of: &str, session: u64, n: u32| {
        let id = OnceId::of_exchange(session, u16::try_from(n).expect("small"));
        keep(log, vec![once_of(of, id, &[("t", &n.to_string())])]).remove(0)
    };
    let is_kept = |outcome: SectionOutcome| matches!(outcome, SectionOutcome::Kept(_));
    let is_duplicate = |outcome: SectionOutcome| matches!(outcome, SectionOutcome::Duplicate(_));
    let mut log = reopen();
    for n in 0..MINE {
        assert!(is_kept(keep_message(&log, "mine", n)) && is_kept(open_exchange(&log, "mine", 1, n)));
    }
    for ended in ["not at all", "by a kill", "cleanly"] {
        for hostile in ["bad-1", "bad-2"] {
            (0..300).for_each(|n| _ = keep_message(&log, hostile, n));
        }
        let opened = |of, session| (0..200).filter(|n| is_kept(open_exchange(&log, of, session, *n))).count();
        let (one, two) = (opened("bad-1", 2), opened("bad-2", 3));
        let expected = if ended == "not at all" { (150, 115) } else { (0, 0) };
        assert_eq!((one, two), expected, "ended {ended}: its own share, and half of what is left");
        assert_eq!(open_exchange(&log, "bad-1", 2, 199), SectionOutcome::ExchangesFull);
        for n in 0..MINE {
            assert!(is_duplicate(keep_message(&log, "mine", n)), "ended {ended}: {n}");
            assert!(is_duplicate(open_exchange(&log, "mine", 1, n)), "ended {ended}: {n}");
        }
        // Over its share, it has lost the oldest of its own.
        assert!(is_duplicate(keep_message(&log, "bad-2", 299)) && is_kept(keep_message(&log, "bad-2", 0)));
        match ended {
            "not at all" => kill(dir.path(), log),
            _ => drop(log),
        }
        log = reopen();
    }
    let newcomer = (0..200).filter(|n| is_kept(open_exchange(&log, "new", 4, *n))).count();
    assert_eq!(newcomer, 58, "there is always room for somebody who has few");
    release(&log, &(0..150).map(|n| OnceId::of_exchange(2, n)).collect::<Vec<_>>());
    assert!(is_kept(open_exchange(&log, "bad-1", 2, 199)), "what was released takes no room");
}

#[test]
fn of_two_with_one_id_in_one_batch_the_second_is_a_duplicate_of_the_first() {
    let dir = TempDir::new().expect("temporary directory");
    let log = open(dir.path(), &config()).expect("opens");
    let sections = vec![
        once(&[message(1)], 2),
        section(&[b"a"], &Lease::new()),
        once(&[message(1)], 2),
        once(&[message(2)], 1),
        once(&[message(2), message(1)], 1),
    ];
    let expected = [kept(0, 2), kept(2, 1), duplicate(0, 2), kept(3, 1), duplicate(3, 1)];
    assert_eq!(keep(&log, sections), expected);
    assert_eq!(log.next_offset(), 4);
}

#[test]
fn an_id_whose_commit_failed_or_whose_key_was_dead_is_a_new_one() {
    let dir = TempDir::new().expect("temporary directory");
    let faults = Arc::new(Faults::default());
    let log = open_faulty(&faults, dir.path()).expect("opens");
    append(&log, &[b"0"]).expect("kept");
    let dead = once(&[message(1)], 1);
    dead.lease.end();
    assert_eq!(keep(&log, vec![dead]), [SectionOutcome::KeyDead]);
    faults.disk_is_full.store(true, Ordering::SeqCst);
    let refused = log.append(vec![once(&[message(1), exchange(1)], 1)], Instant::now()).blocking_recv();
    assert!(matches!(refused, Ok(Err(AppendError::DiskFull))));
    faults.disk_is_full.store(false, Ordering::SeqCst);
    assert_eq!(keep_one(&log, message(1)), kept(1, 1));
    assert_eq!(keep_one(&log, exchange(1)), kept(2, 1));

    faults.disk_is_full.store(true, Ordering::SeqCst);
    let refused = log.release(vec![exchange(1)], Instant::now()).blocking_recv();
    assert!(matches!(refused, Ok(Err(AppendError::DiskFull))));
    faults.disk_is_full.store(false, Ordering::SeqCst);
    assert_eq!(keep_one(&log, exchange(1)), duplicate(2, 1), "a release that failed has released nothing");
}

#[test]
fn an_exchange_is_known_until_it_is_released_and_no_reader_sees_that() {
    let dir = TempDir::new().expect("temporary directory");
    let log = open(dir.path(), &config()).expect("opens");
    append(&log, &[b"0"]).expect("kept");
    for n in 0..600 {
        assert_eq!(keep(&log, vec![once(&[exchange(n)], 1)]), [kept(Offset::from(n) + 1, 1)]);
    }
    let next_offset = log.next_offset();
    for n in 0..600 {
        release(&log, &[exchange(n), exchange(u16::MAX)]);
    }
    assert_eq!(log.next_offset(), next_offset);
    append(&log, &[b"last"]).expect("kept");
    kill(dir.path(), log);
    let log = open(dir.path(), &config()).expect("opens");
    // Even the smallest read has to get past six hundred frames without a record.
    let batches = log.read(next_offset, 1).expect("readable");
    assert_eq!(batches.first().map(Batch::first_offset), Some(next_offset));
    assert_eq!(read_all(&log, 0).expect("readable").len() as u64, next_offset + 1);
    assert_eq!(keep_one(&log, exchange(5)), kept(next_offset + 1, 1), "it is another message's now");
}

#[test]
fn an_open_exchange_outlives_the_segments_that_it_was_opened_in() {
    let dir = TempDir::new().expect("temporary directory");
    let small = config::LogConfig { segment_bytes: 64 << 10, retention_bytes: 128 << 10, ..config() };
    let log = open(dir.path(), &small).expect("opens");
    log.begin_retention();
    assert_eq!(keep_one(&log, exchange(1)), kept(0, 1));
    assert_eq!(keep_one(&log, exchange(2)), kept(1, 1));
    let payload = vec![7; 16 << 10];
    let fill = |log: &EmbeddedLog| {
        let first = log.first_offset();
        while log.first_offset() < first + 12 {
            append(log, &[&payload]).expect("kept");
        }
    };
    fill(&log);
    release(&log, &[exchange(2)]);
    fill(&log);
    kill(dir.path(), log);
    let log = open(dir.path(), &small).expect("opens");
    assert_eq!(keep_one(&log, exchange(1)), duplicate(0, 1));
    let next_offset = log.next_offset();
    assert_eq!(keep_one(&log, exchange(2)), kept(next_offset, 1));
}

#[test]
fn a_message_id_is_known_for_its_time_and_a_restart_makes_no_difference() {
    let dir = TempDir::new().expect("temporary directory");
    let dedup = config::IntakeConfig { dedup_window_s: 2, ..Config::default().intake };
    let open = || EmbeddedLog::open(dir.path(), &config(), &dedup).expect("opens");
    let mut log = open();
    for (id, restarts) in [(message(1), false), (message(2), true)] {
        let next_offset = log.next_offset();
        let kept_at = Instant::now();
        assert_eq!(keep_one(&log, id), kept(next_offset, 1));
        assert_eq!(keep_one(&log, id), duplicate(next_offset, 1));
        let until = later();
        while keep_one(&log, id) != kept(next_offset + 1, 1) {
            assert!(Instant::now() < until, "it is forgotten after 2 seconds");
            if restarts {
                kill(dir.path(), log);
                log = open();
            }
        }
        assert!(kept_at.elapsed() > Duration::from_secs(2), "{:?}", kept_at.elapsed());
    }
}

#[test]
fn when_too_many_are_known_the_oldest_leave_and_are_counted() {
    let dir = TempDir::new().expect("temporary directory");
    let dedup = config::IntakeConfig { dedup_ids_max: 3, ..Config::default().intake };
    let mut log = EmbeddedLog::open(dir.path(), &config(), &dedup).expect("opens");
    for n in 0..5 {
        assert_eq!(keep_one(&log, message(n)), kept(n.into(), 1));
    }
    wait_for_evicted(&log, 2);
    for _ in 0..2 {
        assert_eq!(keep_one(&log, message(2)), duplicate(2, 1));
        kill(dir.path(), log);
        log = EmbeddedLog::open(dir.path(), &config(), &dedup).expect("opens");
    }
    assert_eq!(keep_one(&log, message(1)), kept(5, 1));
    // Counted from the start on.
    wait_for_evicted(&log, 1);
    // Each segment begins with all open exchanges: they may take a quarter of it.
    drop(log);
    let small = config::LogConfig { segment_bytes: 128 << 7, retention_bytes: 1 << 30, ..config() };
    let log = open(dir.path(), &small).expect("opens");
    // One datasource may have half of that: as many as there is room left for.
    (0..64).for_each(|n| assert!(matches!(keep_one(&log, exchange(n)), SectionOutcome::Kept(_))));
    assert_eq!(keep_one(&log, exchange(64)), SectionOutcome::ExchangesFull);
    assert!(matches!(keep_one(&log, exchange(0)), SectionOutcome::Duplicate(_)));
    assert_eq!(log.evicted_ids(), 0);
}

/// They are counted soon after the commit that evicts them is acknowledged.
fn wait_for_evicted(log: &EmbeddedLog, ids: u64) {
    let deadline = later();
    while log.evicted_ids() != ids {
        assert!(log.evicted_ids() < ids && Instant::now() < deadline, "{} were evicted", log.evicted_ids());
        std::thread::yield_now();
    }
}

/// An exchange that stays open although its release was acknowledged would take the next message
/// with its packet id for a repetition, and lose it.
#[test]
fn damage_that_may_have_been_a_release_forgets_the_exchanges_before_it_and_no_message_id() {
    let dir = TempDir::new().expect("temporary directory");
    let log = open(dir.path(), &config()).expect("opens");
    assert_eq!(keep_one(&log, message(1)), kept(0, 1));
    assert_eq!(keep_one(&log, exchange(1)), kept(1, 1));
    release(&log, &[exchange(1)]);
    assert_eq!(keep_one(&log, exchange(2)), kept(2, 1));
    kill(dir.path(), log);
    let path = crate::log::segment::Segment::path_of(&dir.path().join("log"), 0);
    let starts = frame_starts(&path);
    let mut bytes = fs::read(&path).expect("readable");
    bytes[starts[3] - 1] ^= 1;
    fs::write(&path, bytes).expect("writable");
    let Err(LogOpenError::Corrupt(text)) = open(dir.path(), &config()) else { panic!("opened") };
    assert!(text.contains("no records"), "{text}");
    let accepting = config::LogConfig { accept_corruption: true, ..config() };
    let log = open(dir.path(), &accepting).expect("opens");
    assert_eq!(keep_one(&log, exchange(1)), kept(3, 1));
    assert_eq!(keep_one(&log, exchange(2)), duplicate(2, 1));
    assert_eq!(keep_one(&log, message(1)), duplicate(0, 1));
}

#[test]
fn a_segment_of_releases_alone_goes_on_until_there_is_a_record() {
    let dir = TempDir::new().expect("temporary directory");
    let small = config::LogConfig { segment_bytes: 16 << 10, retention_bytes: 1 << 30, ..config() };
    let log = open(dir.path(), &small).expect("opens");
    let ids: Vec<_> = (0..64).map(exchange).collect();
    let sections = ids.iter().map(|id| once(&[*id], 1)).collect();
    assert!(keep(&log, sections).iter().all(|outcome| matches!(outcome, SectionOutcome::Kept(_))));
    let payload = vec![0; 16 << 10];
    append(&log, &[&payload]).expect("kept");
    assert_eq!(files(dir.path()).len(), 2);
    ids.iter().for_each(|id| release(&log, &[*id]));
    append(&log, &[b"x"]).expect("kept");
    drop(log);
    let log = open(dir.path(), &small).expect("opens");
    assert_eq!(read_all(&log, 0).expect("readable").len(), 66);
    assert_eq!(keep_one(&log, ids[0]), kept(66, 1));
}

#[derive(Debug, Clone)]
enum Step {
    /// Per section its ids, as numbers: messages below 16, exchanges above.
    Append(Vec<Vec<u16>>),
    Release(Vec<u16>),
    /// Several at once, so that they may share a batch.
    Together(Vec<Result<Vec<u16>, u16>>),
    Reopen,
    Kill,
    /// An append that a kill interrupts with part of its frame on the disk.
    Torn(Vec<Vec<u16>>, prop::sample::Index),
}

fn ids() -> impl Strategy<Value = Vec<u16>> {
    prop_oneof![3 => Just(vec![]), 6 => (0..32_u16).prop_map(|id| vec![id]), 1 => Just(vec![3, 19])]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let sections = || prop::collection::vec(ids(), 1..6);
    let any_one = || prop_oneof![2 => ids().prop_map(Ok), 1 => (16..32_u16).prop_map(Err)];
    let step = prop_oneof![
        6 => sections().prop_map(Step::Append),
        3 => prop::collection::vec(16..32_u16, 1..4).prop_map(Step::Release),
        4 => prop::collection::vec(any_one(), 1..20).prop_map(Step::Together),
        1 => Just(Step::Reopen),
        1 => Just(Step::Kill),
        1 => (sections(), any::<prop::sample::Index>()).prop_map(|(s, at)| Step::Torn(s, at)),
    ];
    prop::collection::vec(step, 1..50)
}

fn id_of(number: u16) -> OnceId {
    if number < 16 { message(number.into()) } else { exchange(number) }
}

/// Payload bytes such that a segment of the model holds a few batches.
const PADDING: usize = 600;

fn padded(ids: &[u16]) -> Section {
    let payload = [7; PADDING];
    let mut section = section(&[&payload, b"2"], &Lease::new());
    ids.iter().for_each(|id| section.keep_once(id_of(*id)));
    section
}

/// The simplest model of the log: which ids are known.
#[derive(Clone, Default)]
struct Model {
    known: HashMap<u16, Offset>,
    next_offset: Offset,
}

impl Model {
    fn keep(&mut self, ids: &[u16]) -> SectionOutcome {
        if let Some(first) = ids.iter().find_map(|id| self.known.get(id)) {
            return duplicate(*first, 2);
        }
        self.known.extend(ids.iter().map(|id| (*id, self.next_offset)));
        self.next_offset += 2;
        kept(self.next_offset - 2, 2)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn the_window_behaves_as_a_map_whatever_ends_the_process(steps in steps()) {
        let dir = TempDir::new().expect("temporary directory");
        let small = config::LogConfig { segment_bytes: 8 << 10, retention_bytes: 1 << 30, ..config() };
        let reopen = || open(dir.path(), &small).expect("opens");
        let mut log = reopen();
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Append(sections) => {
                    let expected: Vec<_> = sections.iter().map(|ids| model.keep(ids)).collect();
                    prop_assert_eq!(keep(&log, sections.iter().map(|ids| padded(ids)).collect()), expected);
                }
                Step::Release(numbers) => {
                    release(&log, &numbers.iter().map(|n| id_of(*n)).collect::<Vec<_>>());
                    numbers.iter().for_each(|n| { model.known.remove(n); });
                }
                Step::Together(all) => {
                    let mut waiting = Vec::new();
                    for one in &all {
                        waiting.push(match one {
                            Ok(ids) => (vec![model.keep(ids)], log.append(vec![padded(ids)], later())),
                            Err(released) => {
                                model.known.remove(released);
                                (vec![], log.release(vec![id_of(*released)], later()))
                            }
                        });
                    }
                    for (expected, receiver) in waiting {
                        let committed = receiver.blocking_recv().expect("answered").expect("durable");
                        prop_assert_eq!(committed.outcomes, expected);
                    }
                }
                Step::Reopen => {
                    drop(log);
                    log = reopen();
                }
                Step::Kill => {
                    kill(dir.path(), log);
                    log = reopen();
                }
                Step::Torn(sections, at) => {
                    let before = files(dir.path());
                    keep(&log, sections.iter().map(|ids| padded(ids)).collect());
                    let mut after = files(dir.path());
                    drop(log);
                    let (path, bytes) = after.iter_mut().next_back().expect("a segment");
                    let old = before.get(path).map_or(&[][..], Vec::as_slice);
                    // A segment's header is durable before there is a frame in it.
                    let written: Vec<_> = (crate::log::segment::SEGMENT_HEADER_BYTES..bytes.len())
                        .filter(|i| bytes[*i] != old.get(*i).copied().unwrap_or(0))
                        .collect();
                    if !written.is_empty() {
                        bytes[written[at.index(written.len())]..].fill(0);
                    }
                    restore(dir.path(), &after);
                    log = reopen();
                }
            }
            prop_assert_eq!(log.next_offset(), model.next_offset);
        }
    }
}
