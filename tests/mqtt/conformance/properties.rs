//! Properties of MQTT 5 on their way through: sections 3.3.2.3, 3.1.2.11 and the limits that a client
//! sets. What is malformed about properties is in [`super::malformed`].

use std::collections::BTreeMap;
use std::time::Duration;

use super::stage::{Stage, last_word, payloads};
use crate::common::wire::{
    CONTENT_TYPE, CORRELATION_DATA, Connect, DISCONNECT, MAXIMUM_PACKET_SIZE, MESSAGE_EXPIRY, Message,
    PAYLOAD_FORMAT, PUBACK, PUBCOMP, PUBREC, PUBREL, REASON_STRING, REQUEST_PROBLEM_INFO, RESPONSE_TOPIC,
    SESSION_EXPIRY, SUBACK, TOPIC_ALIAS, TOPIC_ALIAS_MAXIMUM, UNSUBACK, USER_PROPERTY, Version::V5, ack,
    four_bytes, prefixed, subscribe, text_property, two_bytes, unsubscribe, user_property,
};

#[test]
fn the_properties_of_a_message_arrive_as_they_were_sent_and_no_others() {
    let stage = Stage::new();
    let mut publisher = stage.client(V5, "publisher");
    let mut subscriber = stage.client(V5, "subscriber");
    subscriber.subscribe(&[("a", 1)]);
    let users = [("z", "1"), ("a", ""), ("", "2"), ("z", "1"), ("\u{e9}", "\u{1F4A7}"), ("a", "3")];
    for format in [0, 1] {
        let mut message = Message::new("a", "x")
            .with(&text_property(CORRELATION_DATA, [0, 0xFF, 1]))
            .with(&user_property(users[0].0, users[0].1))
            .with(&[PAYLOAD_FORMAT, format])
            .with(&text_property(RESPONSE_TOPIC, "press-4/answers"))
            .with(&text_property(CONTENT_TYPE, "text/plain; charset=utf-8"));
        for (name, value) in &users[1..] {
            message = message.with(&user_property(name, value));
        }
        publisher.publish_message(message, 1);
        let message = subscriber.received();
        let values: BTreeMap<u8, Vec<u8>> =
            message.properties.iter().filter(|(id, _)| *id != USER_PROPERTY).cloned().collect();
        assert_eq!(values.get(&CORRELATION_DATA), Some(&prefixed([0, 0xFF, 1])));
        assert_eq!(values.get(&RESPONSE_TOPIC), Some(&prefixed("press-4/answers")));
        assert_eq!(values.get(&CONTENT_TYPE), Some(&prefixed("text/plain; charset=utf-8")));
        // Left out is 0.
        assert_eq!(values.get(&PAYLOAD_FORMAT).map_or(0, |value| value[0]), format);
        assert_eq!(values.get(&MESSAGE_EXPIRY), None);
        let got = message.properties.iter().filter(|(id, _)| *id == USER_PROPERTY);
        let got: Vec<Vec<u8>> = got.map(|(id, value)| [&[*id][..], value].concat()).collect();
        let sent: Vec<Vec<u8>> = users.iter().map(|(name, value)| user_property(name, value)).collect();
        assert_eq!(got, sent, "in their order");
    }
}

#[test]
fn a_message_that_has_expired_is_not_delivered_and_the_time_of_others_runs() {
    let stage = Stage::new();
    let hello = stage.hello_again(V5, "subscriber");
    let mut subscriber = stage.connect(&hello);
    subscriber.subscribe(&[("a", 1), ("end", 1)]);
    let mut publisher = stage.client(V5, "publisher");
    publisher.publish_message(Message::new("a", "at once").with(&four_bytes(MESSAGE_EXPIRY, 100)), 1);
    let message = subscriber.received();
    assert!(message.number(MESSAGE_EXPIRY).is_some_and(|left| (98..=100).contains(&left)), "{message:?}");
    subscriber.disconnect();
    for (payload, seconds) in [("short", 1), ("long", 100)] {
        publisher.publish_message(Message::new("a", payload).with(&four_bytes(MESSAGE_EXPIRY, seconds)), 1);
    }
    publisher.publish(1, "a", "for ever");
    // The exchange of a QoS 2 message goes on whatever becomes of the message.
    publisher.send(&Message::new("a", "short, too").at(2, 500).with(&four_bytes(MESSAGE_EXPIRY, 1)));
    publisher.answered(PUBREC, 500);
    // Longer than the short ones live: a time, which has to pass.
    std::thread::sleep(Duration::from_millis(1200));
    publisher.wire.send(&ack(PUBREL, 500));
    publisher.answered(PUBCOMP, 500);
    let mut subscriber = stage.connect(&hello);
    let messages = subscriber.all_so_far(&mut publisher);
    assert_eq!(payloads(&messages), ["long", "for ever"]);
    let left = messages[0].number(MESSAGE_EXPIRY).expect("what is left of it");
    assert!((90..=99).contains(&left), "{left}");
    assert_eq!(messages[1].number(MESSAGE_EXPIRY), None);
}

#[test]
fn every_topic_alias_up_to_the_maximum_is_taken_and_forgotten_with_the_connection() {
    let stage = Stage::new();
    let mut subscriber = stage.client(V5, "subscriber");
    subscriber.subscribe(&[("alias/#", 0)]);
    let mut publisher = stage.client(V5, "publisher");
    assert_eq!(publisher.connack.number(TOPIC_ALIAS_MAXIMUM), Some(32));
    let numbered = |topic: &str, alias| Message::new(topic, "x").with(&two_bytes(TOPIC_ALIAS, alias));
    for alias in 1..=32 {
        publisher.publish_message(numbered(&format!("alias/{alias}"), alias), 0);
    }
    for alias in (1..=32).rev() {
        publisher.publish_message(numbered("", alias), u8::from(alias % 2 == 0));
    }
    let topics: Vec<String> = (0..64).map(|_| subscriber.received().topic).collect();
    let expected: Vec<String> =
        (1..=32).chain((1..=32).rev()).map(|alias| format!("alias/{alias}")).collect();
    assert_eq!(topics, expected);
    publisher.disconnect();
    let mut publisher = stage.connect(&stage.hello_again(V5, "publisher"));
    publisher.send(&numbered("", 1).at(1, 1));
    let goodbye = last_word(&mut publisher.wire).expect("a DISCONNECT");
    assert_eq!(goodbye.kind(), DISCONNECT);
    assert!([0x82, 0x94].contains(&goodbye.reason()), "{goodbye:?}");
}

#[test]
fn topic_aliases_to_a_client_stay_within_its_maximum_and_its_connection() {
    let stage = Stage::new();
    let mut publisher = stage.client(V5, "publisher");
    let name = |n: usize| format!("a/topic/that/is/long/enough/for/an/alias/to/pay/{n}");
    for maximum in [None, Some(0), Some(1), Some(3), Some(65_535)] {
        let aliases = maximum.map_or(Vec::new(), |maximum| two_bytes(TOPIC_ALIAS_MAXIMUM, maximum));
        let properties = [aliases, four_bytes(SESSION_EXPIRY, 3600)].concat();
        let hello = Connect { properties, clean: false, ..stage.hello(V5, &format!("{maximum:?}")) };
        for round in 0..2 {
            let mut subscriber = stage.connect(&hello);
            assert_eq!(subscriber.session_present(), round == 1);
            subscriber.subscribe(&[("a/#", 1)]);
            let mut known: BTreeMap<u64, String> = BTreeMap::new();
            let mut used = 0;
            for n in [0, 0, 1, 0, 2, 3, 1, 4, 0, 4, 2] {
                publisher.publish(1, &name(n), "x");
                let message = subscriber.received();
                let alias = message.number(TOPIC_ALIAS);
                let topic = match alias {
                    None => message.topic,
                    Some(alias) => {
                        used += 1;
                        assert!(
                            alias > 0 && alias <= u64::from(maximum.unwrap_or(0)),
                            "{alias} of {maximum:?}"
                        );
                        if !message.topic.is_empty() {
                            known.insert(alias, message.topic);
                        }
                        known.get(&alias).expect("one that was set on this connection").clone()
                    }
                };
                assert_eq!(topic, name(n), "{maximum:?}");
            }
            assert_eq!(used > 0, maximum.unwrap_or(0) > 0, "{maximum:?}");
            subscriber.disconnect();
        }
    }
}

#[test]
fn a_client_is_sent_no_packet_over_its_maximum_and_what_is_over_counts_as_sent() {
    const MAXIMUM: usize = 400;
    let stage = Stage::new();
    let mut publisher = stage.client(V5, "publisher");
    let session = four_bytes(SESSION_EXPIRY, 3600);
    let limited = [session.clone(), four_bytes(MAXIMUM_PACKET_SIZE, 400)].concat();
    let hello = Connect { properties: limited, clean: false, ..stage.hello(V5, "subscriber") };
    let mut subscriber = stage.connect(&hello);
    subscriber.subscribe(&[("a", 1), ("b", 0), ("end", 1)]);
    let big = "x".repeat(MAXIMUM);
    for (topic, payload) in [("a", "1"), ("a", &big), ("b", &big), ("a", "2"), ("b", "3")] {
        publisher.publish(1, topic, payload);
    }
    assert_eq!(payloads(&subscriber.all_so_far(&mut publisher)), ["1", "2", "3"]);
    subscriber.disconnect();
    // It is not kept for a connection that would take it.
    let mut subscriber = stage.connect(&Connect { properties: session, ..hello });
    assert!(subscriber.session_present());
    assert_eq!(subscriber.all_so_far(&mut publisher), []);
    subscriber.disconnect();
    // What the gateway would add keeps no message from a client that takes it without: up to the last
    // byte, but for the room of a topic alias.
    let properties = four_bytes(MAXIMUM_PACKET_SIZE, 64);
    let mut subscriber = stage.connect(&Connect { properties, ..stage.hello(V5, "small") });
    subscriber.subscribe(&[("a", 1), ("end", 1)]);
    let largest = "x".repeat(64 - 3 - (2 + 2 + 1 + 2 + 1));
    let too_large = "x".repeat(64 - (2 + 2 + 1 + 2 + 1) + 1);
    for payload in [&largest, &too_large] {
        publisher.publish(1, "a", payload);
    }
    let messages = subscriber.all_so_far(&mut publisher);
    assert_eq!(payloads(&messages), [largest]);
    assert_eq!(messages[0].properties, []);
}

#[test]
fn words_that_would_make_a_packet_too_large_are_left_out() {
    let stage = Stage::new();
    let small = |bytes: u32| four_bytes(MAXIMUM_PACKET_SIZE, bytes);
    // A CONNACK that says no.
    let stranger = Connect { properties: small(20), ..Connect::new(V5) };
    let refusal = stage.refused(&stranger.packet()).expect("a CONNACK");
    assert_eq!((refusal.reason(), refusal.text(REASON_STRING)), (0x87, None));

    let key = stage.gateway.create("press-5").key;
    let hello = Connect {
        properties: small(40),
        client_id: "c".to_owned(),
        keep_alive: 60,
        ..Connect::with_key(V5, &key)
    };
    let mut client = stage.connect(&hello);
    for (qos, kind) in [(1, PUBACK), (2, PUBREC)] {
        let topic = format!("$SYS/{}", "x".repeat(100));
        client.send(&Message::new(&topic, "x").at(qos, 1));
        let answer = client.wire.packet(kind);
        assert_eq!(answer.reason(), 0x90);
        assert!(answer.body.len() <= 38, "{answer:?}");
    }
    client.wire.send(&ack(PUBREL, 99));
    assert!(client.wire.packet(PUBCOMP).body.len() <= 38);
    client.wire.send(&subscribe(V5, 1, &["a"]));
    let suback = client.wire.packet(SUBACK);
    assert_eq!(suback.codes(V5), [0x87]);
    assert!(suback.body.len() <= 38, "{suback:?}");
    client.wire.send(&unsubscribe(V5, 1, &["a"]));
    assert!(client.wire.packet(UNSUBACK).body.len() <= 38);
    client.wire.send(&[0xF0, 0]);
    let goodbye = client.wire.disconnected(0x82);
    assert!(goodbye.body.len() <= 38, "{goodbye:?}");
}

#[test]
fn a_client_that_wants_no_problem_information_gets_none_but_with_the_last_word() {
    let stage = Stage::new();
    let key = stage.gateway.create("press-5").key;
    for wanted in [true, false] {
        let properties = vec![REQUEST_PROBLEM_INFO, u8::from(wanted)];
        let hello = Connect { properties, ..Connect::with_key(V5, &key) };
        let mut client = stage.connect(&hello);
        for (qos, kind) in [(1, PUBACK), (2, PUBREC)] {
            client.send(&Message::new("$SYS/x", "x").at(qos, 1));
            let answer = client.wire.packet(kind);
            assert_eq!((answer.reason(), answer.text(REASON_STRING).is_some()), (0x90, wanted));
            assert!(answer.properties().iter().all(|(id, _)| *id != USER_PROPERTY));
        }
        client.wire.send(&subscribe(V5, 1, &["a"]));
        let suback = client.wire.packet(SUBACK);
        assert_eq!((suback.codes(V5), suback.text(REASON_STRING).is_some()), (vec![0x87], wanted));
        client.wire.send(&unsubscribe(V5, 1, &["a"]));
        let unsuback = client.wire.packet(UNSUBACK);
        assert!(wanted || unsuback.properties().is_empty(), "{unsuback:?}");
        client.wire.send(&ack(PUBREL, 99));
        let pubcomp = client.wire.packet(PUBCOMP);
        assert!(wanted || pubcomp.properties().is_empty(), "{pubcomp:?}");
    }
}

#[test]
fn the_servers_last_word_is_the_last_and_names_a_reason() {
    let stage = Stage::new();
    let mut client = stage.client(V5, "c");
    let after = [&[0xC0, 1, 0][..], &Message::new("a", "x").at(1, 1).packet(V5)].concat();
    client.wire.send(&after);
    let goodbye = last_word(&mut client.wire).expect("a DISCONNECT");
    assert_eq!((goodbye.first, goodbye.reason()), (0xE0, 0x81));
    assert!(goodbye.text(REASON_STRING).is_some_and(|words| words.contains("PINGREQ")), "{goodbye:?}");
    assert!(goodbye.properties().iter().all(|(id, _)| *id != SESSION_EXPIRY), "a client's to say");
    stage.gateway.settle();
    assert!(stage.gateway.records("press-4").is_empty(), "nothing behind it is looked at");
}
