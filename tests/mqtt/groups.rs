//! Groups (`$share/{group}/{filter}`): each member gets as much as it deals with, one that hangs keeps a few, and
//! what it had goes to others when it is gone.

use std::time::{Duration, Instant};

use crate::common::members::{FEW, member, publish_burst, shared_out};
use crate::common::wire::{Message, Next, PUBACK, PUBLISH, Version::V5, Wire, ack, publish};
use crate::common::{Gateway, Source, scratch, wait_for};

fn scene() -> (tempfile::TempDir, Gateway, Source) {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create_open("press-4");
    (dir, gateway, source)
}

/// Waits until all members have left.
fn left(gateway: &Gateway) {
    let connections = || gateway.metric("headgate_mqtt_connections");
    wait_for("the members to have left", || (connections() == 0.0).then_some(()));
}

/// The whole burst went to one member.
#[test]
fn a_burst_is_shared_evenly() {
    let (_dir, gateway, source) = scene();
    for (published, subscribed) in [(1, 1), (0, 1), (1, 0), (0, 0)] {
        // One whose connection waits for a processor all the time has less, and the others share what it left: then it is
        // tried again. Each message comes once, however they are shared.
        let mut tries = (0..5).map(|_| {
            // With a millisecond for each message, what else the machine does is the same for all members.
            let members =
                (0..4).map(|_| (member(&gateway, &source.key, subscribed), Duration::from_millis(1)));
            let publish = || publish_burst(&gateway, &source.key, published, 1_000);
            let taken = shared_out(members.collect(), 1_000, publish);
            let counts: Vec<usize> = taken.iter().map(Vec::len).collect();
            let mut all = taken.concat();
            all.sort_unstable();
            assert_eq!(all, (0..1_000).collect::<Vec<_>>(), "each once");
            left(&gateway);
            counts
        });
        let is_even = |counts: Vec<usize>| counts.iter().all(|count| (100..=400).contains(count));
        assert!(tries.any(is_even), "QoS {published}, {subscribed}");
    }
}

/// A slow member got 237 of 400, and an idle one none.
#[test]
fn a_slow_member_gets_what_it_deals_with_and_no_other_idles() {
    let (_dir, gateway, source) = scene();
    let slow = Duration::from_millis(30);
    let members = [Duration::from_millis(3), slow].map(|each| (member(&gateway, &source.key, 1), each));
    let began = Instant::now();
    let taken = shared_out(members.into(), 600, || publish_burst(&gateway, &source.key, 1, 600));
    let counts: Vec<usize> = taken.iter().map(Vec::len).collect();
    // As many as it deals with in that time, and what it has in hand: a tenth of the other's on an idle machine.
    let at_most = usize::try_from(began.elapsed().as_millis() / slow.as_millis()).expect("few") + FEW;
    assert!(counts[1] <= at_most && counts[1] >= at_most / 3, "{counts:?} of {at_most}");
    assert!(counts[0] > 3 * counts[1], "{counts:?}");
}

/// Beside a member that hung, the others got nothing.
#[test]
fn a_member_that_hangs_keeps_a_few_and_leaves_them_to_the_others() {
    let (_dir, gateway, source) = scene();
    for subscribed in [1, 0, 2] {
        let hung = member(&gateway, &source.key, subscribed);
        let members = (0..2).map(|_| (member(&gateway, &source.key, subscribed), Duration::ZERO));
        let until = if subscribed > 0 { 1_000 - FEW } else { 600 };
        let taken = shared_out(members.collect(), until, || {
            publish_burst(&gateway, &source.key, subscribed.max(1), 1_000)
        });
        assert!(taken.concat().len() >= until);
        drop(hung);
        left(&gateway);
    }
    let hung = member(&gateway, &source.key, 1);
    let mut healthy = member(&gateway, &source.key, 1);
    publish_burst(&gateway, &source.key, 1, 100);
    let mut taken = Vec::new();
    let mut take = |taken: &mut Vec<usize>| {
        let message = Message::read(V5, &healthy.packet(PUBLISH));
        healthy.send(&ack(PUBACK, message.packet_id));
        taken.push(String::from_utf8_lossy(&message.payload).parse::<usize>().expect("a number"));
    };
    while taken.len() < 100 - FEW {
        take(&mut taken);
    }
    drop(hung);
    while taken.len() < 100 {
        take(&mut taken);
    }
    taken.sort_unstable();
    assert_eq!(taken, (0..100).collect::<Vec<_>>());
}

/// A member that takes nothing more kept what had been prepared for it.
#[test]
fn a_member_that_does_not_read_keeps_what_its_socket_holds() {
    const MESSAGES: usize = 400;
    let (_dir, gateway, source) = scene();
    let hung = member(&gateway, &source.key, 0);
    let mut healthy = member(&gateway, &source.key, 0);
    let payload = vec![b'x'; 100_000];
    let mut publisher = Wire::login(gateway.mqtt, V5, &source.key);
    let mut taken = 0;
    for n in 0..MESSAGES {
        publisher.send(&publish(V5, 1, "a", &payload));
        publisher.packet(PUBACK);
        // Half of them, until the other's socket is full.
        while n + 1 - taken > 120 {
            Message::read(V5, &healthy.packet(PUBLISH));
            taken += 1;
        }
    }
    while let Next::Packet(_) = healthy.next_within(Duration::from_millis(500)) {
        taken += 1;
    }
    assert!(taken > MESSAGES - 120, "{taken} of {MESSAGES}");
    drop(hung);
}
