//! The log: what every one promises, tried on each. What only the log in files promises (torn and damaged
//! files, a disk that fails) is tried in `src/log/tests/mod.rs`, what only a cluster's does in `jetstream.rs`.

mod jetstream;
mod stage;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use headgate::testing::message::{KeyId, Lease, Offset, RecordFlags, Transport, now_micros};
use headgate::testing::{
    AppendError, Log, LogBackend, LogReadError, Offsets, RecordNote, Section, SectionOutcome,
};
use proptest::prelude::*;

use stage::{
    Stage, datasource, exchange, keep, kept, later, message, offsets, once, payloads, read_all, release,
    section, section_under, until,
};

type Records = Vec<(Offset, Vec<u8>)>;

/// Makes a test for each log there is.
macro_rules! on_every_log {
    ($($name:ident)*) => {
        mod embedded {
            $(#[test] fn $name() { super::$name(super::LogBackend::Embedded); })*
        }
        mod in_jetstream {
            $(#[test] fn $name() { super::$name(super::LogBackend::Jetstream); })*
        }
    };
}

on_every_log! {
    what_was_acknowledged_is_read_back_before_and_after_a_restart
    a_record_comes_back_with_all_that_was_known_of_it
    nothing_comes_in_under_a_lease_that_has_ended
    a_barrier_lets_through_what_came_before_it_and_answers_after
    the_same_id_again_is_answered_with_the_offsets_of_the_first_also_after_a_restart
    of_two_with_one_id_in_one_append_the_second_is_a_duplicate_of_the_first
    who_asks_is_told_what_is_known_and_takes_no_id
    several_messages_under_one_id_are_kept_once_together
    an_exchange_is_known_until_it_is_released_and_no_reader_sees_that
    a_message_id_is_known_for_its_time
    the_listener_is_told_of_every_record_once_and_in_order
    what_is_not_in_memory_any_more_is_read_all_the_same
    a_time_leads_to_an_offset_before_all_that_was_received_after_it
    a_full_log_says_so_and_takes_records_again_once_they_are_consumed
    what_retention_has_removed_is_said_to_be_removed
    the_log_behaves_as_a_vector
}

fn what_was_acknowledged_is_read_back_before_and_after_a_restart(backend: LogBackend) {
    let stage = Stage::new(backend);
    let log = stage.open();
    assert_eq!(log.first_offset(), 0);
    assert_eq!(read_all(&**log, 0).expect("readable"), []);
    let two = kept(&**log, &[b"0", b"1"]);
    let one = kept(&**log, &[b"2"]);
    assert_eq!((two.records(), one.first()), (2, two.last() + 1));
    let all = [(two.first(), b"0".to_vec()), (two.last(), b"1".to_vec()), (one.first(), b"2".to_vec())];
    assert_eq!(log.next_offset(), one.last() + 1, "what was acknowledged can be read");
    assert_eq!(read_all(&**log, 0).expect("readable"), all);
    assert_eq!(read_all(&**log, two.last()).expect("readable"), all[1..]);
    let log = stage.reopen(log);
    assert_eq!(log.next_offset(), one.last() + 1);
    assert_eq!(read_all(&**log, 0).expect("readable"), all);
    let last = kept(&**log, &[b"3"]);
    assert_eq!(last.first(), one.last() + 1);
    assert_eq!(payloads(&read_all(&**log, one.first()).expect("readable")), [b"2", b"3"]);
    assert_eq!(log.trouble(), None);
}

fn a_record_comes_back_with_all_that_was_known_of_it(backend: LogBackend) {
    let stage = Stage::new(backend);
    let mut log = stage.open();
    let note = RecordNote::Redriven { offset: 3, received_at: 9 }.encode();
    let received_at = now_micros();
    let section = || {
        let mut section =
            Section::new(datasource(), KeyId([7; 6]), Lease::new(), Transport::Http, 0x1234, received_at);
        let properties = [38, 0, 1, b'a', 0, 1, b'b'];
        section.push("v1.2/°C", &[0xff, 0], "text/plain", &properties, RecordFlags::RETAIN);
        section.push("t", b"", "", &[], RecordFlags::AT_MOST_ONCE.with(RecordFlags::WILL));
        section.push_noted("t", b"x", "", &[], RecordFlags::REDRIVEN, &note);
        section.push_noted("t", b"y", "", &[], RecordFlags::QUARANTINED, &note);
        section
    };
    let at = offsets(keep(&**log, vec![section()]).remove(0));
    for restarted in [false, true] {
        let batches = log.read(at.first(), 1 << 20).expect("readable");
        assert!(batches.iter().any(|batch| batch.has_retained()) && batches.iter().any(|b| b.has_notes()));
        let records: Vec<_> = batches.iter().flat_map(|batch| batch.records()).collect();
        assert_eq!(records.len(), 4, "restarted: {restarted}");
        for (nth, record) in records.iter().enumerate() {
            assert_eq!(record.offset, at.nth(nth));
            assert_eq!((record.datasource, record.key_id), ("press-4", KeyId([7; 6])));
            assert_eq!((record.transport, record.publisher), (Transport::Http, 0x1234));
            assert_eq!(record.received_at, received_at);
        }
        let (first, second) = (records[0], records[1]);
        assert_eq!(
            (first.topic, first.payload, first.content_type),
            ("v1.2/°C", &[0xff, 0][..], "text/plain")
        );
        assert_eq!((first.properties.len(), first.flags), (7, RecordFlags::RETAIN));
        assert_eq!((second.payload, second.flags.0), (&b""[..], 6));
        assert_eq!((records[2].note, records[3].note), (&note[..], &note[..]));
        assert!(records[3].flags.contains(RecordFlags::QUARANTINED));
        drop(batches);
        log = stage.reopen(log);
    }
}

fn nothing_comes_in_under_a_lease_that_has_ended(backend: LogBackend) {
    let stage = Stage::new(backend);
    let log = stage.open();
    let (dead, alive) = (Lease::new(), Lease::new());
    dead.end();
    let sections = vec![section_under(&[b"x", b"y"], &dead), section_under(&[b"0"], &alive)];
    let outcomes = keep(&**log, sections);
    assert!(matches!(outcomes[..], [SectionOutcome::KeyDead, SectionOutcome::Kept(_)]), "{outcomes:?}");
    assert_eq!(payloads(&read_all(&**log, 0).expect("readable")), [b"0"]);
}

fn a_barrier_lets_through_what_came_before_it_and_answers_after(backend: LogBackend) {
    let stage = Stage::new(backend);
    let log = stage.open();
    let lease = Lease::new();
    let before: Vec<_> =
        (0..200).map(|_| log.append(vec![section_under(&[b"x"], &lease)], later())).collect();
    lease.end();
    stage.block_on(log.barrier());
    let end = log.next_offset();
    for appended in before {
        // What was let in was so before the barrier, and is settled.
        let outcome = appended.blocking_recv().expect("answered").expect("settled").outcomes.remove(0);
        if let SectionOutcome::Kept(offsets) = outcome {
            assert!(offsets.last() < end.max(log.next_offset()));
        }
    }
    let records = read_all(&**log, 0).expect("readable").len();
    let after = keep(&**log, vec![section_under(&[b"x"], &lease)]);
    assert_eq!(after, [SectionOutcome::KeyDead]);
    assert_eq!(read_all(&**log, 0).expect("readable").len(), records);
}

fn the_same_id_again_is_answered_with_the_offsets_of_the_first_also_after_a_restart(backend: LogBackend) {
    let stage = Stage::new(backend);
    let mut log = stage.open();
    kept(&**log, &[b"a"]);
    let of_message = offsets(keep(&**log, vec![once(&[message(1)], &[b"b"])]).remove(0));
    let of_exchange = offsets(keep(&**log, vec![once(&[exchange(1)], &[b"c"])]).remove(0));
    for _ in 0..2 {
        let again = keep(&**log, vec![once(&[message(1)], &[b"b"]), once(&[exchange(1)], &[b"c"])]);
        let expected =
            [SectionOutcome::Duplicate(of_message.clone()), SectionOutcome::Duplicate(of_exchange.clone())];
        assert_eq!(again, expected);
        let others = keep(&**log, vec![once(&[message(1)], &[b"other"]), once(&[exchange(1)], &[b"d"])]);
        assert_eq!(others, [conflict(&of_message, false), conflict(&of_exchange, true)]);
        log = stage.reopen(log);
    }
    assert_eq!(payloads(&read_all(&**log, 0).expect("readable")), [b"a", b"b", b"c"]);
    offsets(keep(&**log, vec![once(&[message(2)], &[b"d"])]).remove(0));
}

fn conflict(earlier: &Offsets, in_exchange: bool) -> SectionOutcome {
    SectionOutcome::Conflict { earlier: earlier.clone(), in_exchange }
}

fn who_asks_is_told_what_is_known_and_takes_no_id(backend: LogBackend) {
    let stage = Stage::new(backend);
    let log = stage.open();
    let asking = |id, payload: &[u8], only: bool| {
        let mut section = section(&[payload]);
        section.ask_for(id);
        if only {
            section.only_ask();
        }
        keep(&**log, vec![section]).remove(0)
    };
    assert_eq!(asking(message(1), b"a", true), SectionOutcome::Unknown);
    assert_eq!(asking(exchange(1), b"b", true), SectionOutcome::Unknown);
    let of_message = offsets(keep(&**log, vec![once(&[message(1)], &[b"a"])]).remove(0));
    let of_exchange = offsets(keep(&**log, vec![once(&[exchange(1)], &[b"b"])]).remove(0));
    for _ in 0..2 {
        assert_eq!(asking(message(1), b"a", true), SectionOutcome::Known(of_message.clone()));
        assert_eq!(asking(message(1), b"other", true), SectionOutcome::Unknown);
        assert_eq!(asking(exchange(1), b"b", true), SectionOutcome::Known(of_exchange.clone()));
        assert_eq!(asking(exchange(1), b"other", true), conflict(&of_exchange, true));
        assert_eq!(asking(message(1), b"a", false), SectionOutcome::Known(of_message.clone()));
    }
    offsets(asking(message(1), b"c", false));
    offsets(asking(message(2), b"d", false));
    offsets(keep(&**log, vec![once(&[message(2)], &[b"e"])]).remove(0));
    release(&**log, &[exchange(1)]);
    assert_eq!(asking(exchange(1), b"b", true), SectionOutcome::Unknown);
    assert_eq!(payloads(&read_all(&**log, 0).expect("readable")), [b"a", b"b", b"c", b"d", b"e"]);
}

fn of_two_with_one_id_in_one_append_the_second_is_a_duplicate_of_the_first(backend: LogBackend) {
    let stage = Stage::new(backend);
    let log = stage.open();
    let sections = vec![
        once(&[message(1)], &[b"a"]),
        section(&[b"b"]),
        once(&[message(1)], &[b"a"]),
        once(&[message(2)], &[b"d"]),
        once(&[message(1)], &[b"c"]),
    ];
    let outcomes = keep(&**log, sections);
    let first = offsets(outcomes[0].clone());
    assert_eq!(outcomes[2], SectionOutcome::Duplicate(first.clone()));
    assert_eq!(outcomes[4], conflict(&first, false));
    assert_eq!(payloads(&read_all(&**log, 0).expect("readable")), [b"a", b"b", b"d"]);
}

fn several_messages_under_one_id_are_kept_once_together(backend: LogBackend) {
    let stage = Stage::new(backend);
    let mut log = stage.open();
    let three: [&[u8]; 3] = [b"0", b"1", b"2"];
    let first = offsets(keep(&**log, vec![once(&[message(1)], &three)]).remove(0));
    let ones = offsets(keep(&**log, vec![once(&[message(2)], &[b"3"])]).remove(0));
    for _ in 0..2 {
        assert_eq!(
            keep(&**log, vec![once(&[message(1)], &three)]),
            [SectionOutcome::Duplicate(first.clone())]
        );
        // Fewer under an id than before, and more.
        assert_eq!(keep(&**log, vec![once(&[message(1)], &[b"0"])]), [conflict(&first, false)]);
        assert_eq!(keep(&**log, vec![once(&[message(2)], &three)]), [conflict(&ones, false)]);
        log = stage.reopen(log);
    }
    assert_eq!(payloads(&read_all(&**log, 0).expect("readable")), [b"0", b"1", b"2", b"3"]);
}

fn an_exchange_is_known_until_it_is_released_and_no_reader_sees_that(backend: LogBackend) {
    let stage = Stage::new(backend);
    let mut log = stage.open();
    let keep_one = |log: &dyn Log, id| keep(log, vec![once(&[id], &[b"x"])]).remove(0);
    for round in 0..3 {
        let first = offsets(keep_one(&**log, exchange(1)));
        assert_eq!(keep_one(&**log, exchange(1)), SectionOutcome::Duplicate(first.clone()), "round {round}");
        let end = log.next_offset();
        release(&**log, &[exchange(1), exchange(1), exchange(9)]);
        assert_eq!(log.next_offset(), end);
        if round == 1 {
            log = stage.reopen(log);
            stage.block_on(log.sync()).expect("in step");
        }
    }
    assert_eq!(read_all(&**log, 0).expect("readable").len(), 3);
    // One of many, and many at once.
    let ids: Vec<_> = (10..1200).map(exchange).collect();
    let outcomes = keep(&**log, ids.iter().map(|id| once(&[*id], &[b"y"])).collect());
    assert!(outcomes.iter().all(|outcome| matches!(outcome, SectionOutcome::Kept(_))));
    release(&**log, &ids);
    assert!(matches!(keep_one(&**log, ids[0]), SectionOutcome::Kept(_)));
    assert!(matches!(keep_one(&**log, ids[1189]), SectionOutcome::Kept(_)));
}

fn a_message_id_is_known_for_its_time(backend: LogBackend) {
    let mut stage = Stage::new(backend);
    stage.config.intake.dedup_window_s = 2;
    let log = stage.open();
    let kept_at = Instant::now();
    let keep_one = || keep(&**log, vec![once(&[message(1)], &[b"x"])]).remove(0);
    let first = offsets(keep_one());
    assert_eq!(keep_one(), SectionOutcome::Duplicate(first));
    until("the id to be forgotten", || matches!(keep_one(), SectionOutcome::Kept(_)));
    assert!(kept_at.elapsed() > Duration::from_secs(2), "{:?}", kept_at.elapsed());
}

fn the_listener_is_told_of_every_record_once_and_in_order(backend: LogBackend) {
    let stage = Stage::new(backend);
    let log = stage.open();
    kept(&**log, &[b"before"]);
    let told: Arc<Mutex<Records>> = Arc::default();
    let heard = told.clone();
    log.listen(Box::new(move |batch| {
        let records = batch.records().map(|record| (record.offset, record.payload.to_vec()));
        heard.lock().expect("nobody panics").extend(records);
    }));
    let appended: Vec<_> = (0..300_u32)
        .map(|n| log.append(vec![section(&[n.to_string().as_bytes()]), section(&[b"x"])], later()))
        .collect();
    let mut expected = Vec::new();
    for (n, appended) in appended.into_iter().enumerate() {
        for (at, outcome) in
            appended.blocking_recv().expect("answered").expect("kept").outcomes.into_iter().enumerate()
        {
            let payload = if at == 0 { n.to_string().into_bytes() } else { b"x".to_vec() };
            expected.push((offsets(outcome).first(), payload));
        }
    }
    assert!(expected.is_sorted(), "what was appended one after the other is in that order");
    assert_eq!(*told.lock().expect("nobody panics"), expected);
    assert!(log.next_offset() > expected[599].0);
    log.wait_blocking(expected[599].0, Duration::ZERO);
}

fn what_is_not_in_memory_any_more_is_read_all_the_same(backend: LogBackend) {
    let stage = Stage::new(backend);
    let mut log = stage.open();
    let payload = vec![7; 60 << 10];
    let mut last = 0;
    for n in 0..400_u32 {
        let at = kept(&**log, &[&n.to_le_bytes(), &payload]);
        last = at.last();
    }
    assert!(log.read_recent(1, 1 << 20).is_none(), "24 MB are more than is kept in memory");
    for _ in 0..2 {
        let read = read_all(&**log, 0).expect("readable");
        let numbers: Vec<_> =
            read.iter().filter(|(_, payload)| payload.len() == 4).map(|(_, n)| n.clone()).collect();
        assert_eq!(numbers, (0..400_u32).map(|n| n.to_le_bytes().to_vec()).collect::<Vec<_>>());
        assert_eq!(read.len(), 800);
        // However little is asked for.
        let batches = log.read(last / 2, 1).expect("readable");
        assert!(batches[0].records().any(|record| record.offset == last / 2));
        log = stage.reopen(log);
    }
}

fn a_time_leads_to_an_offset_before_all_that_was_received_after_it(backend: LogBackend) {
    let stage = Stage::new(backend);
    let log = stage.open();
    kept(&**log, &[b"old"]);
    let time = now_micros();
    let new = kept(&**log, &[b"new"]);
    assert!(log.offset_at(time).expect("readable") <= new.first());
    assert!(log.offset_at(0).expect("readable") <= 1);
    assert!(log.offset_at(time + 3_600_000_000).expect("readable") <= log.next_offset());
}

/// Fills a log until it says that it is full, and returns how many messages it took.
fn fill(log: &dyn Log) -> (usize, AppendError) {
    let payload = vec![7; 16 << 10];
    for n in 0..1000 {
        let soon = Instant::now() + Duration::from_millis(300);
        let appended = log.append(vec![section(&[&payload])], soon).blocking_recv();
        if let Err(error) = appended.expect("answered") {
            return (n, error);
        }
    }
    panic!("the log was never full")
}

fn a_full_log_says_so_and_takes_records_again_once_they_are_consumed(backend: LogBackend) {
    let mut stage = Stage::new(backend);
    (stage.config.log.segment_bytes, stage.config.log.retention_bytes) = (64 << 10, 512 << 10);
    let log = stage.open();
    let (storage, other) = (log.hold(), log.hold());
    log.begin_retention();
    let (taken, error) = fill(&**log);
    assert!(matches!(error, AppendError::Budget { retention_bytes: 524_288 }), "{error}");
    assert!(log.trouble().is_some());
    assert!(log.bytes() <= 512 << 10);
    assert_eq!(read_all(&**log, 0).expect("readable").len(), taken);
    storage.set(log.next_offset());
    fill(&**log);
    assert_eq!(log.first_offset(), 0, "nothing that one of them holds is removed");
    other.set(log.next_offset());
    let payload = vec![7; 16 << 10];
    kept(&**log, &[&payload]);
    until("room", || log.first_offset() > 0);
    until("the trouble to be over", || log.trouble().is_none());
}

fn what_retention_has_removed_is_said_to_be_removed(backend: LogBackend) {
    let mut stage = Stage::new(backend);
    (stage.config.log.segment_bytes, stage.config.log.retention_bytes) = (1 << 20, 2 << 20);
    let log = stage.open();
    log.begin_retention();
    let payload = vec![7; 250 << 10];
    // Until it is in memory no more either.
    until("the beginning to be removed", || {
        (0..20).for_each(|_| _ = kept(&**log, &[&payload]));
        log.first_offset() > 1 && log.read_recent(1, 1).is_none()
    });
    let Err(LogReadError::Removed { wanted, first }) = log.read(1, 1 << 20) else { panic!("it was removed") };
    assert_eq!(wanted, 1);
    assert!(first > 1 && first <= log.next_offset());
}

#[derive(Debug, Clone)]
enum Step {
    Append(Vec<Vec<u8>>),
    Read(prop::sample::Index),
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => prop::collection::vec(prop::collection::vec(any::<u8>(), 0..2000), 1..8).prop_map(Step::Append),
        4 => any::<prop::sample::Index>().prop_map(Step::Read),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..40)
}

/// Against the simplest thing that behaves like it.
fn the_log_behaves_as_a_vector(backend: LogBackend) {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(8));
    let run = |steps: Vec<Step>| {
        let stage = Stage::new(backend);
        let mut log = stage.open();
        let mut model: Records = Vec::new();
        for step in steps {
            match step {
                Step::Append(payloads) => {
                    let borrowed: Vec<&[u8]> = payloads.iter().map(Vec::as_slice).collect();
                    let at = kept(&**log, &borrowed);
                    model.extend(
                        payloads.into_iter().enumerate().map(|(nth, payload)| (at.nth(nth), payload)),
                    );
                }
                Step::Read(at) => {
                    let at = at.index(model.len() + 1);
                    let from = model.get(at).map_or(log.next_offset(), |(offset, _)| *offset);
                    prop_assert_eq!(&read_all(&**log, from).expect("readable"), &model[at..]);
                }
                Step::Reopen => log = stage.reopen(log),
            }
            if let Some((last, _)) = model.last() {
                prop_assert_eq!(log.next_offset(), last + 1);
            }
        }
        Ok(())
    };
    runner.run(&steps(), run).expect("it does");
}

#[test]
fn offsets_that_do_not_follow_each_other_are_told_one_by_one() {
    assert_eq!(Offsets::from_each(&[4, 5]), Offsets::consecutive(4, 2));
    assert_eq!(Offsets::from_each(&[4, 7]).nth(1), 7);
}
