//! Sessions: sections 3.1.2.4, 3.1.2.11.2 and 4.1.

use std::time::Duration;

use super::stage::{Client, Stage, payloads};
use crate::common::wire::{
    Connect, Message, PUBACK, SESSION_EXPIRY, VERSIONS,
    Version::{V5, V311},
    four_bytes, frame,
};

/// Subscribes, goes away, and comes back to what was published meanwhile.
fn away(stage: &Stage, hello: &Connect, leave: impl FnOnce(Client)) -> Client {
    let mut publisher = stage.client(hello.version, "publisher");
    let mut subscriber = stage.connect(hello);
    subscriber.subscribe(&[("a", 1), ("end", 1)]);
    leave(subscriber);
    for (qos, payload) in [(1, "1"), (2, "2"), (1, "3")] {
        publisher.publish(qos, "a", payload);
    }
    publisher.publish(1, "end", "");
    publisher.disconnect();
    stage.connect(hello)
}

#[test]
fn a_session_that_stays_has_its_subscriptions_and_all_that_came_meanwhile() {
    let stage = Stage::new();
    let leavings: [fn(Client); 2] = [Client::disconnect, Client::vanish];
    for version in VERSIONS {
        for (n, leave) in leavings.into_iter().enumerate() {
            let hello = stage.hello_again(version, &format!("subscriber {n} {version:?}"));
            let mut back = away(&stage, &hello, leave);
            assert!(back.session_present());
            assert_eq!(payloads(&back.until_end()), ["1", "2", "3"]);
            back.disconnect();
            let mut back = stage.connect(&hello);
            assert!(back.session_present());
            let mut publisher = stage.client(version, "publisher");
            assert_eq!(back.all_so_far(&mut publisher), [], "each of them once");
            back.disconnect();
        }
    }
}

#[test]
fn a_session_outlives_the_gateways_process() {
    for version in VERSIONS {
        let stage = Stage::new();
        let hello = stage.hello_again(version, "subscriber");
        let mut publisher = stage.client(version, "publisher");
        let mut subscriber = stage.connect(&hello);
        subscriber.subscribe(&[("a", 1), ("end", 1)]);
        publisher.publish(1, "a", "seen");
        assert_eq!(payloads(&subscriber.all_so_far(&mut publisher)), ["seen"]);
        subscriber.disconnect();
        publisher.publish(1, "a", "before");
        publisher.disconnect();
        let stage = stage.restart();
        let mut publisher = stage.client(version, "publisher");
        publisher.publish(1, "a", "after");
        publisher.publish(1, "end", "");
        let mut subscriber = stage.connect(&hello);
        assert!(subscriber.session_present());
        assert_eq!(payloads(&subscriber.until_end()), ["before", "after"]);
    }
}

#[test]
fn a_clean_start_finds_nothing_and_leaves_nothing_of_what_was() {
    let stage = Stage::new();
    for version in VERSIONS {
        let stays = stage.hello_again(version, "subscriber");
        let clean = stage.hello(version, "subscriber");
        let mut back = {
            let back = away(&stage, &stays, Client::disconnect);
            back.vanish();
            stage.connect(&clean)
        };
        assert!(!back.session_present());
        let mut publisher = stage.client(version, "publisher");
        back.subscribe(&[("end", 1)]);
        assert_eq!(back.all_so_far(&mut publisher), [], "neither subscriptions nor messages");
        back.subscribe(&[("a", 1)]);
        back.disconnect();
        publisher.publish(1, "a", "nobody's");
        // And what began clean ends with the connection.
        let mut back = stage.connect(&stays);
        assert!(!back.session_present());
        back.subscribe(&[("end", 1)]);
        publisher.publish(1, "a", "nobody's");
        assert_eq!(back.all_so_far(&mut publisher), []);
        back.disconnect();
    }
}

#[test]
fn a_clean_start_can_begin_a_session_that_stays() {
    let stage = Stage::new();
    let begins = Connect { clean: true, ..stage.hello_again(V5, "subscriber") };
    let client = stage.connect(&begins);
    assert!(!client.session_present());
    client.disconnect();
    assert!(stage.connect(&stage.hello_again(V5, "subscriber")).session_present());
    assert!(!stage.connect(&begins).session_present());
}

#[test]
fn a_session_belongs_to_its_client_identifier_alone() {
    let stage = Stage::new();
    for version in VERSIONS {
        stage.connect(&stage.hello_again(version, "one")).disconnect();
        for other in ["two", "One", "one "] {
            assert!(!stage.connect(&stage.hello_again(version, other)).session_present(), "{other:?}");
            stage.connect(&stage.hello(version, other)).disconnect();
        }
        assert!(stage.connect(&stage.hello_again(version, "one")).session_present());
        stage.connect(&stage.hello(version, "one")).disconnect();
    }
    // Nor does another key find it.
    let other_key = stage.gateway.create("press-5").key;
    let hello = stage.hello_again(V5, "one");
    stage.connect(&hello).disconnect();
    let stranger = Connect { username: Some(other_key.into_bytes()), ..hello.clone() };
    assert!(!stage.connect(&stranger).session_present());
    assert!(stage.connect(&hello).session_present());
}

#[test]
fn a_session_is_the_same_for_every_version() {
    let stage = Stage::new();
    stage.connect(&stage.hello_again(V311, "c")).disconnect();
    assert!(stage.connect(&stage.hello_again(V5, "c")).session_present());
    assert!(stage.connect(&stage.hello_again(V311, "c")).session_present());
}

#[test]
fn a_session_ends_when_its_expiry_has_passed_after_the_connection() {
    const PASSED: Duration = Duration::from_millis(2200);
    let stage = &Stage::new();
    let with_expiry = |id: &str, seconds: Option<u32>| Connect {
        clean: false,
        properties: seconds.map_or(Vec::new(), |seconds| four_bytes(SESSION_EXPIRY, seconds)),
        ..stage.hello(V5, id)
    };
    let goodbye = |seconds: u32| frame(0xE0, &[&[0, 5][..], &four_bytes(SESSION_EXPIRY, seconds)].concat());
    let leave = |hello: &Connect, goodbye: Option<Vec<u8>>| {
        let mut client = stage.connect(hello);
        client.subscribe(&[("a", 1)]);
        match goodbye {
            Some(goodbye) => {
                client.wire.send(&goodbye);
                client.wire.closed();
            }
            None => client.vanish(),
        }
    };
    // While the connection lasts nothing expires.
    let mut connected = stage.connect(&with_expiry("connected", Some(1)));
    connected.subscribe(&[("a", 1)]);

    leave(&with_expiry("ends", Some(1)), None);
    leave(&with_expiry("none", None), None);
    leave(&with_expiry("zero", Some(0)), None);
    leave(&with_expiry("stays", Some(3600)), None);
    leave(&with_expiry("for ever", Some(u32::MAX)), None);
    leave(&with_expiry("ended by DISCONNECT", Some(3600)), Some(goodbye(0)));
    leave(&with_expiry("shortened", Some(3600)), Some(goodbye(1)));
    leave(&with_expiry("prolonged", Some(1)), Some(goodbye(3600)));
    leave(&with_expiry("as it was", Some(3600)), Some(vec![0xE0, 0]));
    // A time, which has to pass: whoever looks whether a session is there resumes it.
    std::thread::sleep(PASSED);
    for (id, there) in [
        ("ends", false),
        ("none", false),
        ("zero", false),
        ("stays", true),
        ("for ever", true),
        ("ended by DISCONNECT", false),
        ("shortened", false),
        ("prolonged", true),
        ("as it was", true),
    ] {
        assert_eq!(stage.connect(&with_expiry(id, Some(10))).session_present(), there, "{id}");
    }
    let mut publisher = stage.client(V5, "publisher");
    publisher.publish(1, "a", "x");
    assert_eq!(connected.received().payload, b"x");
    connected.vanish();
    assert!(stage.connect(&with_expiry("connected", Some(1))).session_present(), "it starts at the end");
}

#[test]
fn a_session_expiry_cannot_come_with_the_goodbye_alone() {
    let stage = Stage::new();
    let mut client = stage.client(V5, "c");
    client.wire.send(&frame(0xE0, &[&[0, 5][..], &four_bytes(SESSION_EXPIRY, 10)].concat()));
    client.wire.disconnected(0x82);
    // Again 0 is what it was.
    let mut client = stage.client(V5, "c");
    client.wire.send(&frame(0xE0, &[&[0, 5][..], &four_bytes(SESSION_EXPIRY, 0)].concat()));
    client.wire.closed();
}

#[test]
fn a_takeover_resumes_the_session() {
    let stage = Stage::new();
    for version in VERSIONS {
        let hello = stage.hello_again(version, "subscriber");
        let mut publisher = stage.client(version, "publisher");
        let mut first = stage.connect(&hello);
        first.subscribe(&[("a", 1)]);
        publisher.publish(1, "a", "unacknowledged");
        assert_eq!(first.message().payload, b"unacknowledged");
        let mut second = stage.connect(&hello);
        first.ended(0x8E);
        assert!(second.session_present());
        let message = second.received();
        assert_eq!((&message.payload[..], message.dup), (&b"unacknowledged"[..], true));
        second.disconnect();
    }
}

#[test]
fn a_publisher_can_pipeline_and_leave_in_one_write() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut subscriber = stage.client(version, "subscriber");
        subscriber.subscribe(&[("a", 0)]);
        let mut bytes = stage.hello(version, "hasty").packet();
        bytes.extend(Message::new("a", "x").at(1, 1).packet(version));
        bytes.extend([0xE0, 0]);
        let mut wire = crate::common::wire::Wire::open(stage.gateway.mqtt);
        wire.send(&bytes);
        wire.packet(crate::common::wire::CONNACK);
        assert_eq!(wire.packet(PUBACK).packet_id(), 1);
        wire.closed();
        assert_eq!(subscriber.received().payload, b"x");
        subscriber.disconnect();
    }
}
