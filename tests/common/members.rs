//! Members of a group (`$share`) that need some time for each message, and count what they get.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::wire::{
    Message, Next, PUBACK, PUBCOMP, PUBREC, PUBREL, SUBACK, Version::V5, Wire, ack, publish, subscribe_with,
};
use super::{Gateway, PATIENCE};

/// What a member that hangs may keep from the others.
pub const FEW: usize = 16;

/// A client that has subscribed to everything as a member of a group.
pub fn member(gateway: &Gateway, key: &str, qos: u8) -> Wire {
    let mut wire = Wire::login(gateway.mqtt, V5, key);
    wire.send(&subscribe_with(V5, 1, &[("$share/workers/#", qos)], &[]));
    assert_eq!(wire.packet(SUBACK).codes(V5), [qos]);
    wire
}

/// Publishes numbered messages, as fast as they are taken.
pub fn publish_burst(gateway: &Gateway, key: &str, qos: u8, messages: usize) {
    let mut wire = Wire::login(gateway.mqtt, V5, key);
    for n in 0..messages {
        let packet_id = u16::try_from(n % 1_000 + 1).expect("small");
        wire.send(&match qos {
            0 => Message::new("a", n.to_string()).packet(V5),
            2 => Message::new("a", n.to_string()).at(2, packet_id).packet(V5),
            _ => publish(V5, packet_id, "a", n.to_string().as_bytes()),
        });
        if qos == 1 && packet_id == 1_000 {
            (0..1_000).for_each(|_| _ = wire.packet(PUBACK));
        }
    }
    if qos == 1 {
        (0..messages % 1_000).for_each(|_| _ = wire.packet(PUBACK));
    }
    if qos == 2 {
        assert!(messages <= 1_000, "as many as may be in flight");
        let received: Vec<u16> = (0..messages).map(|_| wire.packet(PUBREC).packet_id()).collect();
        received.into_iter().for_each(|packet_id| wire.send(&ack(PUBREL, packet_id)));
        (0..messages).for_each(|_| _ = wire.packet(PUBCOMP));
    }
}

/// Takes messages, each for so long, until all members have had so many.
fn work(mut wire: Wire, each: Duration, all: &AtomicUsize, until: usize) -> Vec<usize> {
    let mut taken = Vec::new();
    let deadline = Instant::now() + 2 * PATIENCE;
    while all.load(Ordering::Acquire) < until {
        assert!(Instant::now() < deadline, "{} of {until}", all.load(Ordering::Acquire));
        let Next::Packet(frame) = wire.next_within(Duration::from_millis(20)) else { continue };
        if frame.kind() == PUBREL {
            wire.send(&ack(PUBCOMP, frame.packet_id()));
            continue;
        }
        let message = Message::read(V5, &frame);
        // A time that this client needs.
        std::thread::sleep(each);
        taken.push(String::from_utf8_lossy(&message.payload).parse().expect("a number"));
        all.fetch_add(1, Ordering::AcqRel);
        match message.qos {
            0 => {}
            1 => wire.send(&ack(PUBACK, message.packet_id)),
            _ => wire.send(&ack(PUBREC, message.packet_id)),
        }
    }
    taken
}

/// What members get that need so long for each message, until they have `until` of them.
pub fn shared_out(members: Vec<(Wire, Duration)>, until: usize, publish: impl FnOnce()) -> Vec<Vec<usize>> {
    let all = &AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let members = members.into_iter();
        let working: Vec<_> =
            members.map(|(wire, each)| scope.spawn(move || work(wire, each, all, until))).collect();
        publish();
        working.into_iter().map(|member| member.join().expect("a member")).collect()
    })
}
