//! What only the log in a cluster does: several gateways on one stream, and NATS that comes and goes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use headgate::testing::message::Offset;
use headgate::testing::{AppendError, LogBackend, LogOpenError, SectionOutcome};

use super::stage::{
    Opened, Stage, exchange, keep, kept, later, message, offsets, once, payloads, read_all, release, section,
    until,
};
use crate::common::nats::nats_py;

fn stage() -> Stage {
    Stage::new(LogBackend::Jetstream)
}

fn next(stage: &Stage) -> Opened {
    stage.open_as("two").expect("opens")
}

#[test]
fn what_one_gateway_appends_every_other_one_reads_in_the_same_order() {
    let stage = stage();
    let (one, two) = (stage.open(), next(&stage));
    let appended: Vec<_> = (0..500_u32)
        .map(|n| {
            let log = if n % 2 == 0 { &one } else { &two };
            log.append(vec![section(&[n.to_string().as_bytes()])], later())
        })
        .collect();
    appended.into_iter().for_each(|appended| {
        appended.blocking_recv().expect("answered").expect("kept");
    });
    let all = read_all(&**one, 0).expect("readable");
    assert_eq!(all.len(), 500);
    until("the other one to have it", || two.next_offset() == one.next_offset());
    assert_eq!(read_all(&**two, 0).expect("readable"), all);
}

/// It has them already. What another one appends is seen all the same: at once, and also when it appends nothing
/// any more.
#[test]
fn what_a_gateway_appends_alone_is_not_sent_back_to_it() {
    let stage = stage();
    let (one, two) = (stage.open(), next(&stage));
    let told: Arc<Mutex<Vec<_>>> = Arc::default();
    let heard = told.clone();
    one.listen(Box::new(move |batch| {
        let records = batch.records().map(|record| (record.offset, record.payload.to_vec()));
        heard.lock().expect("nobody panics").extend(records);
    }));
    let seen = |offset| until("it to be seen", || one.next_offset() > offset);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            let mut appended = 0_u32;
            while !done.load(Ordering::Relaxed) {
                let append = |n: u32| {
                    // Now and then the same again, which the stream does not take.
                    let again = once(&[message(appended + n - n % 2)], &[b"an id"]);
                    one.append(vec![section(&[&n.to_le_bytes(), b"x"]), again], later())
                };
                let appends: Vec<_> = (0..100).map(append).collect();
                appends.into_iter().for_each(|append| {
                    append.blocking_recv().expect("answered").expect("kept");
                });
                appended += 100;
            }
            appended
        });
        let alone = || until("it to be sent no more", || stage.consumers().len() == 1);
        alone();
        for _ in 0..3 {
            seen(kept(&**two, &[b"two"]).last());
        }
        until("it to be sent what others append", || stage.consumers().len() == 2);
        alone();
        done.store(true, Ordering::Relaxed);
        assert!(busy.join().expect("it appends") >= 1000);
    });
    seen(kept(&**two, &[b"last"]).last());
    until("the other one to have it", || two.next_offset() == one.next_offset());
    let all = read_all(&**two, 0).expect("readable");
    assert_eq!(all.iter().filter(|(_, payload)| payload == b"two").count(), 3);
    assert!(*told.lock().expect("nobody panics") == all, "each once, in the order of the stream");
    assert!(read_all(&**one, 0).expect("readable") == all, "in memory too");
}

/// JetStream does not say that it has stopped to send.
#[test]
fn a_gateway_that_is_sent_nothing_more_notices_and_whoever_needs_what_is_missing_waits() {
    let stage = stage();
    let one = stage.open();
    until("the first to be sent what comes", || stage.consumers().len() == 1);
    let of_one = stage.consumers();
    let two = next(&stage);
    until("the second to be, too", || stage.consumers().len() == 2);
    stage.consumers().iter().filter(|name| !of_one.contains(name)).for_each(|name| stage.end_consumer(name));
    let last = kept(&**one, &[b"a", b"b"]).last();
    assert!(two.next_offset() <= last, "it has been sent nothing");
    stage.block_on(two.catch_up(Offset::MAX)).expect("it catches up");
    assert_eq!(two.next_offset(), last + 1);
    assert_eq!(payloads(&read_all(&**two, 0).expect("readable")), [b"a", b"b"]);
}

#[test]
fn an_id_is_known_whichever_gateway_it_came_to_first() {
    let stage = stage();
    let (one, two) = (stage.open(), next(&stage));
    let first = offsets(keep(&**one, vec![once(&[message(1)], &[b"a"])]).remove(0));
    assert_eq!(keep(&**two, vec![once(&[message(1)], &[b"a"])]), [SectionOutcome::Duplicate(first)]);
    let first = offsets(keep(&**one, vec![once(&[exchange(1)], &[b"b"])]).remove(0));
    assert_eq!(keep(&**two, vec![once(&[exchange(1)], &[b"b"])]), [SectionOutcome::Duplicate(first)]);
    for round in 0..20 {
        let (from, to) = if round % 2 == 0 { (&one, &two) } else { (&two, &one) };
        release(&***from, &[exchange(1)]);
        stage.block_on(to.sync()).expect("in step");
        offsets(keep(&***to, vec![once(&[exchange(1)], &[b"c"])]).remove(0));
    }
}

/// Whichever gateway is first: one is kept, and the other is told no.
#[test]
fn of_two_messages_with_one_id_at_two_gateways_at_once_one_is_kept_and_the_other_refused() {
    let stage = stage();
    let (one, two) = (stage.open(), next(&stage));
    let mut kept = 0;
    for round in 0..50 {
        for id in [message(round), exchange(u16::try_from(round).expect("small"))] {
            let sent: Vec<_> = [(&one, b"a"), (&two, b"b"), (&one, b"a"), (&two, b"b")]
                .map(|(log, payload)| log.append(vec![once(&[id], &[&payload[..]])], later()))
                .into();
            let outcomes: Vec<SectionOutcome> = sent
                .into_iter()
                .map(|sent| sent.blocking_recv().expect("answered").expect("kept").outcomes.remove(0))
                .collect();
            let count =
                |is: fn(&SectionOutcome) -> bool| outcomes.iter().filter(|outcome| is(outcome)).count();
            let first = count(|outcome| matches!(outcome, SectionOutcome::Kept(_)));
            let again = count(|outcome| matches!(outcome, SectionOutcome::Duplicate(_)));
            let refused = count(|outcome| matches!(outcome, SectionOutcome::Conflict { .. }));
            assert_eq!((first, again, refused), (1, 1, 2), "{outcomes:?}");
            kept += first;
        }
    }
    stage.block_on(one.catch_up(Offset::MAX)).expect("it catches up");
    assert_eq!(read_all(&**one, 0).expect("readable").len(), kept);
}

/// A gateway that was killed in the middle of a request leaves a part of it. Sent again with its id, the rest
/// comes in, and nothing of it twice.
#[test]
fn the_rest_of_a_request_of_which_a_part_was_kept_comes_in_when_it_is_sent_again() {
    let stage = stage();
    let log = stage.open();
    // As of a request of three, of which the first message alone got there.
    let id: String = "56f59aca833e4aa8e1ca61bc92d71076".to_owned();
    let body = "h = {'Nats-Msg-Id': sys.argv[2], 'Headgate-Together': '3', 'Headgate-Key-Id': '010101010101', \
                'Headgate-Received-At': '2026-11-26T01:00:00.000000Z', 'Headgate-Transport': 'http'}\n\
                await js.publish('stream.press-4.t', b'0', headers=h)";
    let output = nats_py(&stage.server.as_ref().expect("in JetStream").url(), body, &[&id]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let reading = headgate::testing::OnceId::of_message(&super::stage::datasource(), "reading-1");
    let outcomes = keep(&**log, vec![once(&[reading], &[b"0", b"1", b"2"])]);
    assert_eq!(offsets(outcomes[0].clone()).records(), 3);
    assert_eq!(payloads(&read_all(&**log, 0).expect("readable")), [b"0", b"1", b"2"]);
}

#[test]
fn while_nats_is_away_appends_wait_or_are_refused_and_then_go_on() {
    let mut stage = stage();
    let log = stage.open();
    kept(&**log, &[b"0"]);
    stage.server().kill();
    until("it to be noticed", || log.trouble().is_some());
    let impatient = log.append(vec![section(&[b"x"])], Instant::now()).blocking_recv().expect("answered");
    assert!(matches!(impatient, Err(AppendError::Away(_))), "{impatient:?}");
    let released = log.release(vec![exchange(1)], Instant::now()).blocking_recv().expect("answered");
    assert!(matches!(released, Err(AppendError::Away(_))), "{released:?}");
    // Everything that is in memory is there still.
    assert_eq!(read_all(&**log, 1).expect("readable").len(), 1);
    let patient: Vec<_> =
        (1..100_u32).map(|n| log.append(vec![section(&[n.to_string().as_bytes()])], later())).collect();
    stage.block_on(async { tokio::time::sleep(Duration::from_millis(300)).await });
    stage.server().restart();
    for appended in patient {
        appended.blocking_recv().expect("answered").expect("kept");
    }
    until("the trouble to be over", || log.trouble().is_none());
    let read = read_all(&**log, 0).expect("readable");
    let expected: Vec<Vec<u8>> = (0..100_u32).map(|n| n.to_string().into_bytes()).collect();
    assert_eq!(payloads(&read), expected.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

/// What was on its way when the server died may be there or not: what was acknowledged is, once.
#[test]
fn a_server_that_is_killed_under_load_costs_nothing_that_was_acknowledged() {
    let mut stage = stage();
    let log = stage.open();
    let mut acknowledged = Vec::new();
    for round in 0..3_u32 {
        let appended: Vec<_> = (0..2000_u32)
            .map(|n| {
                let id = round * 10_000 + n;
                (id, log.append(vec![once(&[message(id)], &[id.to_string().as_bytes()])], later()))
            })
            .collect();
        std::thread::sleep(Duration::from_millis(u64::from(round) * 7 + 3));
        stage.server().kill();
        std::thread::sleep(Duration::from_millis(100));
        stage.server().restart();
        for (id, appended) in appended {
            // Each has an id, so that what is unknown is sent again until it is known.
            appended.blocking_recv().expect("answered").expect("kept");
            acknowledged.push(id.to_string().into_bytes());
        }
    }
    let read = read_all(&**log, 0).expect("readable");
    let mut found: Vec<_> = read.into_iter().map(|(_, payload)| payload).collect();
    found.sort();
    acknowledged.sort();
    assert_eq!(found.len(), acknowledged.len());
    assert!(found == acknowledged, "each once");
}

#[test]
fn a_message_that_no_gateway_has_written_is_passed_over() {
    let stage = stage();
    let log = stage.open();
    kept(&**log, &[b"0"]);
    let body = "await js.publish('stream.press-4.t', b'forged')\nawait js.publish('stream.x', b'y')";
    let url = stage.server.as_ref().expect("in JetStream").url();
    let output = nats_py(&url, body, &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    until("them to be passed over", || log.next_offset() == 4);
    assert_eq!(payloads(&read_all(&**log, 0).expect("readable")), [b"0"]);
    let after = kept(&**log, &[b"1"]);
    assert_eq!(after.first(), 4);
    let log = stage.reopen(log);
    assert_eq!(payloads(&read_all(&**log, 0).expect("readable")), [b"0", b"1"]);
}

#[test]
fn a_stream_of_another_kind_is_refused_and_left_as_it_is() {
    let stage = stage();
    let url = stage.server.as_ref().expect("in JetStream").url();
    let body = "await js.add_stream(name='headgate', subjects=['stream.>'])";
    assert!(nats_py(&url, body, &[]).status.success());
    let Err(LogOpenError::Refused(text)) = stage.open_as("one") else { panic!("it was used") };
    assert!(text.contains("headgate") && text.contains("subjects"), "{text}");
}

#[test]
fn more_replicas_than_there_are_servers_are_refused() {
    let mut stage = stage();
    stage.config.nats.stream.replicas = 3;
    let Err(LogOpenError::Refused(text)) = stage.open_as("one") else { panic!("it was opened") };
    assert!(text.contains("replicas"), "{text}");
}

#[test]
fn retention_leaves_what_a_consumer_of_another_gateway_has_not_seen() {
    let mut stage = stage();
    stage.config.log.retention_bytes = 512 << 10;
    let (one, two) = (stage.open(), next(&stage));
    let (of_one, of_two) = (one.hold(), two.hold());
    one.begin_retention();
    two.begin_retention();
    let payload = vec![7; 16 << 10];
    for _ in 0..20 {
        kept(&**one, &[&payload]);
    }
    of_one.set(one.next_offset());
    until("the log to be full", || {
        let soon = Instant::now() + Duration::from_millis(300);
        one.append(vec![section(&[&payload])], soon).blocking_recv().expect("answered").is_err()
    });
    assert_eq!(one.first_offset(), 0);
    of_two.set(one.next_offset());
    kept(&**one, &[&payload]);
    until("room", || one.first_offset() > 0);
}
