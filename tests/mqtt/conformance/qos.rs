//! The QoS protocols: sections 4.3, 4.4 and 4.9.

use super::stage::{Stage, payloads};
use crate::common::wire::{
    Connect, Message, Next, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, RECEIVE_MAXIMUM, VERSIONS, Version::V5,
    ack, ack_with, two_bytes,
};

#[test]
fn after_its_puback_a_packet_id_is_free_whatever_the_dup_flag_says() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut client = stage.client(version, "c");
        let message = Message::new("a", "x").at(1, 9);
        for message in [message.clone(), message.clone().again(), message.again()] {
            client.send(&message);
            client.answered(PUBACK, 9);
        }
    }
    stage.gateway.settle();
    assert_eq!(stage.gateway.records("press-4").len(), 6, "each one is new");
}

#[test]
fn a_qos_2_message_is_kept_once_until_its_pubrel_and_its_packet_id_is_free_after() {
    for version in VERSIONS {
        let stage = Stage::new();
        let mut subscriber = stage.client(version, "subscriber");
        subscriber.subscribe(&[("a", 1), ("end", 1)]);
        let mut client = stage.connect(&stage.hello_again(version, "publisher"));
        let message = Message::new("a", "once").at(2, 7);
        client.send(&message);
        client.answered(PUBREC, 7);
        for _ in 0..2 {
            client.send(&message.clone().again());
            client.answered(PUBREC, 7);
        }
        // Not even a lost connection, or the client's forgetting of the flag, makes another of it.
        client.vanish();
        let mut client = stage.connect(&stage.hello_again(version, "publisher"));
        assert!(client.session_present());
        for message in [message.clone().again(), message] {
            client.send(&message);
            client.answered(PUBREC, 7);
        }
        client.wire.send(&ack(PUBREL, 7));
        client.answered(PUBCOMP, 7);
        client.send(&Message::new("a", "another").at(2, 7).again());
        client.answered(PUBREC, 7);
        client.wire.send(&ack(PUBREL, 7));
        client.answered(PUBCOMP, 7);
        assert_eq!(payloads(&subscriber.all_so_far(&mut client)), ["once", "another"]);
    }
}

#[test]
fn a_qos_2_exchange_goes_on_in_a_gateway_that_was_started_again() {
    for version in VERSIONS {
        let stage = Stage::new();
        let mut client = stage.connect(&stage.hello_again(version, "publisher"));
        let message = Message::new("a", "once").at(2, 7);
        client.send(&message);
        client.answered(PUBREC, 7);
        let stage = stage.restart();
        let mut client = stage.connect(&stage.hello_again(version, "publisher"));
        assert!(client.session_present());
        client.send(&message.again());
        client.answered(PUBREC, 7);
        client.wire.send(&ack(PUBREL, 7));
        client.answered(PUBCOMP, 7);
        stage.gateway.settle();
        assert_eq!(stage.gateway.records("press-4").len(), 1);
    }
}

#[test]
fn a_pubrel_of_nothing_is_answered_and_an_ack_of_nothing_harms_nobody() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut client = stage.client(version, "c");
        // Its PUBCOMP was lost, perhaps: it has to be told that all is done.
        client.wire.send(&ack(PUBREL, 77));
        let pubcomp = client.wire.packet(PUBCOMP);
        assert_eq!(pubcomp.packet_id(), 77);
        assert_eq!(pubcomp.reason(), if version == V5 { 0x92 } else { 0 });
        client.ping();
        // No specification has an answer to these. A client that has lost its session may send them
        // in good faith; a server that does not believe it may call it a protocol error.
        for (kind, answer) in [(PUBACK, None), (PUBREC, Some(PUBREL)), (PUBCOMP, None)] {
            let mut client = stage.client(version, "c");
            client.wire.send(&[&ack(kind, 77)[..], &crate::common::wire::PINGREQ].concat());
            match client.wire.next() {
                Next::Packet(frame) if frame.kind() == crate::common::wire::DISCONNECT => {
                    assert_eq!((version, frame.reason()), (V5, 0x82));
                    client.wire.closed();
                }
                Next::Packet(frame) if Some(frame.kind()) == answer => {
                    assert_eq!(frame.reason(), if version == V5 { 0x92 } else { 0 });
                    client.wire.packet(crate::common::wire::PINGRESP);
                }
                Next::Packet(frame) => assert_eq!(frame.kind(), crate::common::wire::PINGRESP),
                Next::Closed => assert_ne!(version, V5, "a reason is due"),
                Next::Silent => panic!("neither served nor closed"),
            }
        }
    }
}

#[test]
fn a_qos_2_message_that_is_refused_frees_its_packet_id() {
    let stage = Stage::new();
    let mut client = stage.client(V5, "c");
    client.send(&Message::new("$SYS/a", "not allowed").at(2, 3));
    let pubrec = client.wire.packet(PUBREC);
    assert_eq!((pubrec.packet_id(), pubrec.reason()), (3, 0x90));
    client.send(&Message::new("a", "allowed").at(2, 3));
    client.answered(PUBREC, 3);
    client.wire.send(&ack(PUBREL, 3));
    client.answered(PUBCOMP, 3);
}

#[test]
fn messages_leave_with_packet_ids_of_their_own_and_unmarked() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        let mut subscriber = stage.client(version, "subscriber");
        subscriber.subscribe(&[("one", 1), ("zero", 0)]);
        let mut unacknowledged: Vec<u16> = Vec::new();
        for _ in 0..20 {
            publisher.publish(1, "one", "x");
            let message = subscriber.message();
            assert_eq!((message.qos, message.dup), (1, false));
            assert!(message.packet_id != 0 && !unacknowledged.contains(&message.packet_id));
            unacknowledged.push(message.packet_id);
            if unacknowledged.len() == 5 {
                // Any of them, not the oldest: what is left stays in use.
                let id = unacknowledged.remove(2);
                subscriber.wire.send(&ack(PUBACK, id));
            }
            publisher.publish(1, "zero", "x");
            let message = subscriber.message();
            assert_eq!((message.qos, message.dup, message.packet_id), (0, false, 0));
        }
    }
}

#[test]
fn what_was_not_acknowledged_is_sent_again_when_the_session_resumes_and_only_then() {
    for version in VERSIONS {
        let stage = Stage::new();
        let mut publisher = stage.client(version, "publisher");
        let hello = stage.hello_again(version, "subscriber");
        let mut subscriber = stage.connect(&hello);
        subscriber.subscribe(&[("a", 1)]);
        for payload in ["1", "2", "3"] {
            publisher.publish(1, "a", payload);
        }
        let first: Vec<Message> = (0..3).map(|_| subscriber.message()).collect();
        subscriber.ping();
        assert_eq!(payloads(&first), ["1", "2", "3"]);
        subscriber.vanish();

        let mut subscriber = stage.connect(&hello);
        assert!(subscriber.session_present());
        let second: Vec<Message> = (0..3).map(|_| subscriber.message()).collect();
        let as_before = |m: &Message| (m.topic.clone(), m.payload.clone(), m.packet_id);
        assert!(second.iter().all(|message| message.dup && message.qos == 1), "{second:?}");
        assert!(second.iter().map(as_before).eq(first.iter().map(as_before)), "{first:?} {second:?}");
        subscriber.acknowledge(&second[0]);
        subscriber.ping();
        subscriber.vanish();

        let mut subscriber = stage.connect(&hello);
        let third: Vec<Message> = (0..2).map(|_| subscriber.received()).collect();
        assert!(third.iter().map(as_before).eq(first[1..].iter().map(as_before)), "{first:?} {third:?}");
        subscriber.ping();
        subscriber.disconnect();

        let mut subscriber = stage.connect(&hello);
        publisher.publish(1, "a", "4");
        let message = subscriber.received();
        assert_eq!((&message.payload[..], message.dup), (&b"4"[..], false), "nothing is left of the others");
    }
}

#[test]
fn a_no_to_a_message_is_an_answer_to_it() {
    let stage = Stage::new();
    let mut publisher = stage.client(V5, "publisher");
    let hello = stage.hello_again(V5, "subscriber");
    let mut subscriber = stage.connect(&hello);
    subscriber.subscribe(&[("a", 1)]);
    publisher.publish(1, "a", "unwanted");
    let message = subscriber.message();
    subscriber.wire.send(&ack_with(PUBACK, message.packet_id, 0x83));
    subscriber.ping();
    subscriber.vanish();
    let mut subscriber = stage.connect(&hello);
    assert!(subscriber.session_present());
    publisher.publish(1, "a", "next");
    assert_eq!(subscriber.received().payload, b"next");
}

#[test]
fn no_more_messages_wait_for_their_acks_than_the_client_takes() {
    let stage = Stage::new();
    let mut publisher = stage.client(V5, "publisher");
    let properties = two_bytes(RECEIVE_MAXIMUM, 2);
    let mut subscriber = stage.connect(&Connect { properties, ..stage.hello(V5, "subscriber") });
    subscriber.subscribe(&[("a", 1), ("other", 0)]);
    for payload in ["1", "2", "3", "4", "5"] {
        publisher.publish(1, "a", payload);
    }
    let mut held = vec![subscriber.message(), subscriber.message()];
    // Everything else goes on.
    subscriber.ping();
    assert_eq!(subscriber.subscribe(&[("b", 1)]), [1]);
    assert_eq!(subscriber.unsubscribe(&["b"]), [0]);
    subscriber.send(&Message::new("c", "x").at(1, 100));
    subscriber.answered(PUBACK, 100);
    for expected in ["3", "4", "5"] {
        let message = held.remove(0);
        subscriber.acknowledge(&message);
        held.push(subscriber.message());
        subscriber.ping();
        assert_eq!(held[1].payload, expected.as_bytes());
    }
    for message in held {
        subscriber.acknowledge(&message);
    }
    subscriber.ping();
}

#[test]
fn more_messages_than_the_server_takes_unacknowledged_end_the_connection() {
    let stage = Stage::with(|setup| setup.set("mqtt.receive_maximum", 4));
    let mut client = stage.client(V5, "c");
    assert_eq!(client.connack.number(RECEIVE_MAXIMUM), Some(4));
    // At QoS 2 a message is on its way until its PUBCOMP.
    for id in 1..=4 {
        client.send(&Message::new("a", "x").at(2, id));
        client.answered(PUBREC, id);
    }
    // One that is sent again is not one more.
    client.send(&Message::new("a", "x").at(2, 4).again());
    client.answered(PUBREC, 4);
    client.wire.send(&ack(PUBREL, 1));
    client.answered(PUBCOMP, 1);
    client.send(&Message::new("a", "x").at(2, 5));
    client.answered(PUBREC, 5);
    client.send(&Message::new("a", "x").at(2, 6));
    client.wire.disconnected(0x93);
}

#[test]
fn a_message_is_not_sent_again_within_a_connection() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        let mut subscriber = stage.client(version, "subscriber");
        subscriber.subscribe(&[("a", 1)]);
        publisher.publish(1, "a", "x");
        subscriber.message();
        let silence = subscriber.wire.next_within(std::time::Duration::from_millis(1500));
        assert!(!matches!(&silence, Next::Packet(frame) if frame.kind() == PUBLISH), "{silence:?}");
    }
}
