//! PUBLISH from a client and its answers: sections 3.3 to 3.7.

use super::stage::{Stage, payloads, told};
use crate::common::wire::{
    Connect, Message, PUBACK, PUBCOMP, PUBREC, PUBREL, REASON_STRING, VERSIONS, Version::V5, ack,
};

#[test]
fn a_publish_is_answered_as_its_qos_says() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut client = stage.client(version, "c");
        // QoS 0 has no answer: the next packet is the PINGRESP.
        client.publish(0, "a", "0");
        for packet_id in [1, 0x1234, 0xFFFF] {
            client.send(&Message::new("a", "1").at(1, packet_id));
            client.answered(PUBACK, packet_id);
            client.send(&Message::new("a", "2").at(2, packet_id));
            client.answered(PUBREC, packet_id);
            client.wire.send(&ack(PUBREL, packet_id));
            client.answered(PUBCOMP, packet_id);
        }
    }
    stage.gateway.settle();
    assert_eq!(stage.gateway.records("press-4").len(), 14);
}

#[test]
fn answers_come_in_the_order_of_the_messages() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut client = stage.client(version, "c");
        for (qos, kind) in [(1, PUBACK), (2, PUBREC)] {
            let ids = [7, 3, 65_535, 1, 12, 9];
            let all = ids.map(|id| Message::new("a", "x").at(qos, id).packet(version)).concat();
            client.wire.send(&all);
            for id in ids {
                client.answered(kind, id);
            }
        }
    }
}

#[test]
fn a_message_that_is_not_allowed_costs_a_3_1_1_client_its_connection_and_a_5_client_the_message() {
    let stage = Stage::new();
    for version in VERSIONS {
        for (qos, kind) in [(1, PUBACK), (2, PUBREC)] {
            let mut client = stage.client(version, "c");
            client.send(&Message::new("$SYS/x", "x").at(qos, 5));
            if version == V5 {
                let answer = client.wire.packet(kind);
                assert_eq!((answer.packet_id(), answer.reason()), (5, 0x90));
                assert!(answer.text(REASON_STRING).is_some_and(|words| words.contains('$')), "{answer:?}");
                client.publish(qos, "a", "kept");
            } else {
                client.wire.closed();
            }
        }
    }
    // A key that may not publish at all.
    let body = serde_json::json!({ "id": "reader", "name": "reader", "scopes": ["subscribe"] });
    let created = stage.gateway.post("/v1/datasources", &stage.gateway.admin_key(), &body).json();
    let key = created["key"]["secret"].as_str().expect("a key");
    for version in VERSIONS {
        let mut client = stage.connect(&Connect::with_key(version, key));
        client.send(&Message::new("a", "x").at(1, 1));
        if version == V5 {
            assert_eq!(client.wire.packet(PUBACK).reason(), 0x87);
            client.ping();
        } else {
            client.wire.closed();
        }
    }
    stage.gateway.settle();
    assert_eq!(stage.gateway.records("press-4").len(), 2);
    assert!(stage.gateway.records("reader").is_empty());
}

#[test]
fn a_publishers_dup_and_retain_flags_are_not_passed_on() {
    for version in VERSIONS {
        let stage = Stage::new();
        let mut publisher = stage.client(version, "publisher");
        let mut subscriber = stage.client(version, "subscriber");
        subscriber.subscribe(&[("a/#", 1)]);
        for (qos, kind) in [(1, PUBACK), (2, PUBREC)] {
            publisher.send(&Message::new("a/dup", "x").at(qos, 1).again());
            publisher.answered(kind, 1);
            if qos == 2 {
                publisher.wire.send(&ack(PUBREL, 1));
                publisher.answered(PUBCOMP, 1);
            }
            let message = subscriber.received();
            assert_eq!((message.qos, message.dup, message.retain), (1, false, false), "{message:?}");
        }
        publisher.retain(1, "a/retain", "x");
        let message = subscriber.received();
        assert_eq!((message.qos, message.dup, message.retain), (1, false, false), "{message:?}");
    }
}

#[test]
fn messages_come_in_the_order_in_which_they_were_sent() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        let mut subscriber = stage.client(version, "subscriber");
        subscriber.subscribe(&[("a/+", 1), ("end", 1)]);
        let sent: Vec<String> = (0..100).map(|n| n.to_string()).collect();
        let all = sent.iter().zip(1..).map(|(payload, id): (_, u16)| {
            Message::new(&format!("a/{}", id % 3), payload).at(u8::from(id % 2 == 0), id & !(id % 2))
        });
        let all: Vec<u8> = all
            .map(|m| Message { packet_id: if m.qos == 0 { 0 } else { m.packet_id }, ..m }.packet(version))
            .collect::<Vec<_>>()
            .concat();
        publisher.wire.send(&all);
        for id in (2..=100).step_by(2) {
            publisher.answered(PUBACK, id);
        }
        publisher.publish(1, "end", "");
        assert_eq!(payloads(&subscriber.until_end()), sent);
    }
}

#[test]
fn a_message_goes_to_every_client_with_a_matching_subscription_and_to_no_other() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        let mut subscribers: Vec<_> = ["a/b", "a/+", "#", "b", "a"]
            .into_iter()
            .map(|filter| {
                let mut client = stage.client(version, &format!("subscriber {filter}"));
                client.subscribe(&[(filter, 1), ("end", 1)]);
                client
            })
            .collect();
        publisher.publish(1, "a/b", "x");
        publisher.publish(1, "end", "");
        for (client, expected) in subscribers.iter_mut().zip([1, 1, 1, 0, 0]) {
            let messages = client.until_end();
            assert_eq!(messages.len(), expected, "{:?}", told(&messages));
            assert!(messages.iter().all(|message| message.topic == "a/b"));
        }
        for client in subscribers {
            client.vanish();
        }
    }
}
