//! SUBSCRIBE and UNSUBSCRIBE: sections 3.8 to 3.11, and topic filters: section 4.7.

use super::stage::{Stage, payloads};
use crate::common::cluster::has_room_for;
use crate::common::wire::{
    Connect, Message, REASON_STRING, SUBACK, SUBSCRIPTION_ID, UNSUBACK, VERSIONS, Version::V5, subscribe,
    unsubscribe,
};

const NO_LOCAL: u8 = 4;

#[test]
fn a_subscribe_is_answered_filter_by_filter_and_in_their_order() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut client = stage.client(version, "c");
        let filters = [("a", 0), ("b/+", 1), ("c/#", 2), ("#", 0), ("+/+", 1)];
        assert_eq!(client.subscribe(&filters), [0, 1, 2, 0, 1]);
        for packet_id in [1, 0x1234, 0xFFFF] {
            client.wire.send(&subscribe(version, packet_id, &["a"]));
            assert_eq!(client.wire.packet(SUBACK).packet_id(), packet_id);
            client.wire.send(&unsubscribe(version, packet_id, &["a"]));
            assert_eq!(client.wire.packet(UNSUBACK).packet_id(), packet_id);
        }
    }
}

#[test]
fn a_key_that_may_not_subscribe_is_told_so_for_each_filter() {
    let stage = Stage::new();
    let key = stage.gateway.create("press-5").key;
    for version in VERSIONS {
        let mut client = stage.connect(&Connect::with_key(version, &key));
        let code = if version == V5 { 0x87 } else { 0x80 };
        assert_eq!(client.ask(&[("a", 0), ("#", 1), ("b", 2)], &[]), [code; 3]);
        client.publish(1, "a", "still connected");
    }
}

#[test]
fn a_message_comes_at_the_lower_of_its_own_and_the_granted_qos() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        for asked in [0, 1, 2] {
            let mut subscriber = stage.client(version, "subscriber");
            let granted = subscriber.subscribe(&[("a", asked)])[0];
            for published in [0, 1, 2] {
                publisher.publish(published, "a", "x");
                assert_eq!(subscriber.received().qos, published.min(granted), "{published} to {asked}");
            }
            subscriber.disconnect();
        }
    }
}

#[test]
fn filters_match_the_topics_that_the_specification_says() {
    let topics = [
        "sport",
        "sport/",
        "/sport",
        "sport/tennis",
        "sport/tennis/1",
        "sport/tennis/1/2",
        "finance",
        "/",
        "//",
        "/finance",
    ];
    let cases: [(&str, &[&str]); 12] = [
        ("#", &topics),
        ("sport/#", &["sport", "sport/", "sport/tennis", "sport/tennis/1", "sport/tennis/1/2"]),
        ("sport/tennis/#", &["sport/tennis", "sport/tennis/1", "sport/tennis/1/2"]),
        ("sport/tennis/1", &["sport/tennis/1"]),
        ("+", &["sport", "finance"]),
        ("sport/+", &["sport/", "sport/tennis"]),
        ("+/+", &["sport/", "/sport", "sport/tennis", "/", "/finance"]),
        ("/+", &["/sport", "/", "/finance"]),
        ("+/tennis/#", &["sport/tennis", "sport/tennis/1", "sport/tennis/1/2"]),
        ("+/tennis/+", &["sport/tennis/1"]),
        ("+/+/+", &["sport/tennis/1", "//"]),
        ("/#", &["/sport", "/", "//", "/finance"]),
    ];
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        for (filter, expected) in cases {
            let mut subscriber = stage.client(version, "subscriber");
            subscriber.subscribe(&[(filter, 1), ("end", 1)]);
            for topic in topics.into_iter().filter(|topic| has_room_for(topic)) {
                publisher.publish(0, topic, topic);
            }
            let messages = subscriber.all_so_far(&mut publisher);
            let expected: Vec<_> = expected.iter().copied().filter(|topic| has_room_for(topic)).collect();
            assert_eq!(payloads(&messages), expected, "{filter}");
            assert!(messages.iter().all(|message| message.topic.as_bytes() == message.payload));
            subscriber.disconnect();
        }
    }
}

#[test]
fn topics_of_the_server_are_matched_by_no_wildcard() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut subscriber = stage.client(version, "subscriber");
        // There are none, and nobody can publish one.
        subscriber.subscribe(&[("#", 0), ("+/#", 0), ("$SYS/#", 0), ("+/+", 0)]);
        let mut publisher = stage.client(version, "publisher");
        publisher.send(&Message::new("$SYS/broker", "x"));
        if version == V5 {
            publisher.ping();
        }
        let mut other = stage.client(version, "other");
        other.publish(1, "end", "");
        assert_eq!(subscriber.until_end(), []);
    }
}

#[test]
fn overlapping_filters_bring_one_copy_at_the_highest_qos_with_every_identifier() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        let mut subscriber = stage.client(version, "subscriber");
        for (filter, qos, id) in [("a/#", 0, 1), ("a/+", 1, 300), ("a/b", 0, 200_000)] {
            let properties = [vec![SUBSCRIPTION_ID], crate::common::wire::varint(id)].concat();
            subscriber.subscribe_with(&[(filter, qos)], &properties);
        }
        subscriber.subscribe(&[("+/b", 0), ("end", 1)]);
        publisher.publish(1, "a/b", "all");
        publisher.publish(1, "a/b/c", "one");
        publisher.publish(1, "x/b", "none with an identifier");
        let messages = subscriber.all_so_far(&mut publisher);
        assert_eq!(payloads(&messages), ["all", "one", "none with an identifier"]);
        assert_eq!(messages.iter().map(|message| message.qos).collect::<Vec<_>>(), [1, 0, 0]);
        if version == V5 {
            let ids: Vec<_> = messages.iter().map(Message::subscription_ids).collect();
            assert_eq!(ids, [vec![1, 300, 200_000], vec![1], vec![]]);
        }
    }
}

#[test]
fn subscribing_a_filter_again_replaces_what_was_there() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        let mut subscriber = stage.client(version, "subscriber");
        for (qos, id) in [(1, 7), (0, 8), (1, 9)] {
            let granted = subscriber.subscribe_with(&[("a", qos)], &[SUBSCRIPTION_ID, id]);
            assert_eq!(granted, [qos]);
            subscriber.subscribe(&[("end", 1)]);
            publisher.publish(1, "a", "x");
            let messages = subscriber.all_so_far(&mut publisher);
            assert_eq!(messages.len(), 1, "one subscription");
            assert_eq!(messages[0].qos, qos);
            if version == V5 {
                assert_eq!(messages[0].subscription_ids(), [usize::from(id)]);
            }
        }
    }
}

#[test]
fn nothing_is_lost_or_doubled_while_a_filter_is_subscribed_again() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        let mut subscriber = stage.client(version, "subscriber");
        subscriber.subscribe(&[("a", 1), ("end", 1)]);
        let messages: Vec<String> = (0..50).map(|n| n.to_string()).collect();
        let received = std::thread::scope(|scope| {
            let sending = scope.spawn(|| {
                for payload in &messages {
                    publisher.publish(1, "a", payload);
                }
                publisher.publish(1, "end", "");
            });
            let mut received = Vec::new();
            loop {
                // Straight to the socket: the SUBACK comes in among the messages.
                subscriber.wire.send(&subscribe(version, 40_000, &["a"]));
                let mut answered = false;
                while !answered {
                    let crate::common::wire::Next::Packet(frame) = subscriber.wire.next() else {
                        panic!("closed or silent")
                    };
                    if frame.kind() == SUBACK {
                        answered = true;
                        continue;
                    }
                    let message = Message::read(version, &frame);
                    subscriber.acknowledge(&message);
                    received.push(message);
                }
                if received.last().is_some_and(|message| message.topic == "end") {
                    break;
                }
            }
            sending.join().expect("the publisher");
            received
        });
        let received = payloads(&received);
        assert_eq!(received[..received.len() - 1], messages);
    }
}

#[test]
fn a_client_does_not_hear_itself_where_it_does_not_want_to() {
    let stage = Stage::new();
    let mut other = stage.client(V5, "other");
    let mut client = stage.client(V5, "client");
    client.subscribe(&[("deaf/#", 1 | NO_LOCAL), ("both/#", 1), ("end", 1)]);
    for topic in ["deaf/a", "both/a"] {
        client.send(&Message::new(topic, "own").at(0, 0));
        other.publish(1, topic, "others'");
    }
    client.wire.send(&crate::common::wire::PINGREQ);
    // The PINGRESP may come before or after what is delivered; its own messages are in the log then.
    let mut messages = Vec::new();
    loop {
        match client.wire.next() {
            crate::common::wire::Next::Packet(frame) if frame.kind() == crate::common::wire::PINGRESP => {
                other.publish(1, "end", "");
            }
            crate::common::wire::Next::Packet(frame) => {
                let message = Message::read(V5, &frame);
                client.acknowledge(&message);
                if message.topic == "end" {
                    break;
                }
                messages.push((message.topic.clone(), message.payload.clone()));
            }
            other => panic!("{other:?}"),
        }
    }
    messages.sort();
    let expected = [("both/a", "others'"), ("both/a", "own"), ("deaf/a", "others'")];
    let expected = expected.map(|(topic, payload)| (topic.to_owned(), payload.as_bytes().to_vec()));
    assert_eq!(messages, expected);
}

#[test]
fn an_unsubscribe_is_answered_and_takes_exactly_what_it_names() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        let mut subscriber = stage.client(version, "subscriber");
        subscriber.subscribe(&[("a/+", 1), ("a/b", 1), ("c", 1), ("end", 1)]);
        let codes: &[u8] = if version == V5 { &[0x11, 0x11, 0x11, 0x11] } else { &[] };
        // None of these is one of them, even if it matches the same topics.
        assert_eq!(subscriber.unsubscribe(&["a/#", "+/b", "A/b", "a/b/"]), codes);
        publisher.publish(1, "a/b", "1");
        publisher.publish(1, "c", "2");
        assert_eq!(payloads(&subscriber.all_so_far(&mut publisher)), ["1", "2"]);
        let codes: &[u8] = if version == V5 { &[0x11, 0, 0] } else { &[] };
        assert_eq!(subscriber.unsubscribe(&["x", "a/+", "c"]), codes);
        publisher.publish(1, "a/x", "3");
        publisher.publish(1, "c", "4");
        publisher.publish(1, "a/b", "5");
        assert_eq!(payloads(&subscriber.all_so_far(&mut publisher)), ["5"]);
        let codes: &[u8] = if version == V5 { &[0, 0x11] } else { &[] };
        assert_eq!(subscriber.unsubscribe(&["a/b", "a/b"]), codes, "one after the other");
    }
}

#[test]
fn an_unsubscribe_leaves_what_is_on_its_way_to_be_acknowledged() {
    for version in VERSIONS {
        let stage = Stage::new();
        let mut publisher = stage.client(version, "publisher");
        let hello = stage.hello_again(version, "subscriber");
        let mut subscriber = stage.connect(&hello);
        subscriber.subscribe(&[("a", 1)]);
        publisher.publish(1, "a", "sent before");
        let before = subscriber.message();
        subscriber.unsubscribe(&["a"]);
        publisher.publish(1, "a", "sent after");
        subscriber.vanish();
        let mut subscriber = stage.connect(&hello);
        let again = subscriber.received();
        assert_eq!((&again.payload, again.packet_id, again.dup), (&before.payload, before.packet_id, true));
        subscriber.ping();
        subscriber.subscribe(&[("end", 1)]);
        assert_eq!(subscriber.all_so_far(&mut publisher), []);
        subscriber.disconnect();
    }
}

#[test]
fn a_filter_that_is_malformed_is_not_subscribed() {
    let stage = Stage::new();
    for version in VERSIONS {
        for filter in ["", "a#", "#/a", "a/#/b", "a+", "+a/b", "$share//a", "$share/g"] {
            let mut client = stage.client(version, "c");
            client.wire.send(&subscribe(version, 1, &[filter]));
            if version == V5 {
                let goodbye = client.wire.disconnected(0x81);
                assert!(goodbye.text(REASON_STRING).is_some(), "{goodbye:?}");
            } else {
                client.wire.closed();
            }
        }
    }
}
