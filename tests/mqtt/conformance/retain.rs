//! Retained messages: section 3.3.1.3.

use super::stage::{Client, Stage, payloads, told};
use crate::common::wire::{MESSAGE_EXPIRY, Message, VERSIONS, Version::V5, four_bytes};

/// The retained messages that a new subscriber to `a/#` is sent.
fn retained(stage: &Stage, publisher: &mut Client) -> Vec<Message> {
    let mut newcomer = stage.client(publisher.version, "newcomer");
    newcomer.subscribe(&[("end", 1), ("a/#", 1)]);
    let messages = newcomer.all_so_far(publisher);
    newcomer.disconnect();
    assert!(messages.iter().all(|message| message.retain && !message.dup), "{messages:?}");
    messages
}

fn pair(topic: &str, payload: &str) -> (String, String) {
    (topic.to_owned(), payload.to_owned())
}

#[test]
fn the_last_retained_message_of_a_topic_is_there_for_those_who_come_later() {
    for version in VERSIONS {
        let stage = Stage::new();
        let mut publisher = stage.client(version, "publisher");
        assert_eq!(retained(&stage, &mut publisher), []);
        publisher.retain(1, "a/1", "old");
        publisher.retain(1, "a/1", "new");
        publisher.retain(0, "a/2", "at QoS 0");
        publisher.retain(2, "a/3", "at QoS 2");
        publisher.retain(1, "b", "of another topic");
        let mut messages = retained(&stage, &mut publisher);
        messages.sort_by(|one, other| one.topic.cmp(&other.topic));
        assert_eq!(told(&messages), [pair("a/1", "new"), pair("a/2", "at QoS 0"), pair("a/3", "at QoS 2")],);
        assert_eq!(messages.iter().map(|message| message.qos).collect::<Vec<_>>(), [1, 0, 1]);
        // QoS 0 replaces what QoS 1 had left.
        publisher.retain(0, "a/1", "newest");
        let messages = retained(&stage, &mut publisher);
        assert!(told(&messages).contains(&pair("a/1", "newest")), "{messages:?}");
        assert_eq!(messages.len(), 3);
        // They belong to no session, and to no start of the gateway.
        publisher.disconnect();
        let stage = stage.restart();
        let mut publisher = stage.client(version, "somebody else");
        assert_eq!(retained(&stage, &mut publisher).len(), 3);
    }
}

#[test]
fn an_empty_retained_message_is_delivered_and_leaves_nothing() {
    for version in VERSIONS {
        let stage = Stage::new();
        let mut publisher = stage.client(version, "publisher");
        let mut subscriber = stage.client(version, "subscriber");
        subscriber.subscribe(&[("a/#", 1), ("end", 1)]);
        for qos in [0, 1, 2] {
            publisher.retain(1, "a/1", "x");
            assert_eq!(retained(&stage, &mut publisher).len(), 1);
            publisher.retain(qos, "a/1", "");
            assert_eq!(retained(&stage, &mut publisher), []);
            assert_eq!(payloads(&subscriber.until_end()), ["x"]);
            let cleared = subscriber.until_end();
            assert_eq!(payloads(&cleared), [""], "as any other message");
            assert!(!cleared[0].retain);
        }
        // Where there is nothing, nothing comes of it.
        publisher.retain(1, "a/2", "");
        assert_eq!(retained(&stage, &mut publisher), []);
    }
}

#[test]
fn a_message_without_the_flag_changes_nothing_that_is_retained() {
    for version in VERSIONS {
        let stage = Stage::new();
        let mut publisher = stage.client(version, "publisher");
        publisher.retain(1, "a/1", "retained");
        publisher.publish(1, "a/1", "not retained");
        publisher.publish(1, "a/1", "");
        publisher.publish(1, "a/2", "not retained");
        assert_eq!(told(&retained(&stage, &mut publisher)), [pair("a/1", "retained")]);
    }
}

#[test]
fn live_messages_have_the_flag_only_for_those_who_asked_for_it_as_published() {
    const AS_PUBLISHED: u8 = 8;
    for version in VERSIONS {
        let stage = Stage::new();
        let mut publisher = stage.client(version, "publisher");
        let mut plain = stage.client(version, "plain");
        plain.subscribe(&[("a", 1)]);
        publisher.retain(1, "a", "x");
        assert!(!plain.received().retain);
        if version == V5 {
            let mut exact = stage.client(version, "exact");
            exact.subscribe(&[("a", 1 | AS_PUBLISHED | 2 << 4)]);
            publisher.retain(1, "a", "y");
            assert!(exact.received().retain);
            publisher.publish(1, "a", "z");
            assert!(!exact.received().retain);
            exact.disconnect();
            // Those that come because of the subscription have it either way.
            for options in [1, 1 | AS_PUBLISHED] {
                let mut late = stage.client(version, "late");
                late.subscribe(&[("a", options)]);
                let message = late.received();
                assert_eq!((&message.payload[..], message.retain), (&b"y"[..], true));
                late.disconnect();
            }
        }
    }
}

#[test]
fn subscribing_again_brings_the_retained_messages_again() {
    for version in VERSIONS {
        let stage = Stage::new();
        let mut publisher = stage.client(version, "publisher");
        publisher.retain(1, "a", "retained");
        let mut subscriber = stage.client(version, "subscriber");
        for qos in [1, 1, 0] {
            subscriber.subscribe(&[("a", qos)]);
            let message = subscriber.received();
            assert_eq!((&message.payload[..], message.retain, message.qos), (&b"retained"[..], true, qos));
        }
    }
}

#[test]
fn retain_handling_says_when_retained_messages_come() {
    let (at_once, if_new, never) = (1, 1 | 1 << 4, 1 | 2 << 4);
    let stage = Stage::new();
    let mut publisher = stage.client(V5, "publisher");
    publisher.retain(1, "a", "retained");
    let mut subscriber = stage.client(V5, "subscriber");
    subscriber.subscribe(&[("end", 1)]);
    for (options, expected) in [(never, 0), (if_new, 0), (at_once, 1), (if_new, 0), (never, 0), (at_once, 1)]
    {
        subscriber.subscribe(&[("a", options)]);
        assert_eq!(subscriber.all_so_far(&mut publisher).len(), expected, "{options:#04x}");
    }
    subscriber.unsubscribe(&["a"]);
    subscriber.subscribe(&[("a", if_new)]);
    assert_eq!(subscriber.all_so_far(&mut publisher).len(), 1, "a new one");
    // One that was resumed with its session is not new.
    let hello = stage.hello_again(V5, "stays");
    let mut stays = stage.connect(&hello);
    stays.subscribe(&[("end", 1), ("a", if_new)]);
    assert_eq!(stays.all_so_far(&mut publisher).len(), 1);
    stays.disconnect();
    let mut stays = stage.connect(&hello);
    stays.subscribe(&[("a", if_new)]);
    assert_eq!(stays.all_so_far(&mut publisher).len(), 0);
}

#[test]
fn a_retained_message_expires_like_any_other() {
    let stage = Stage::new();
    let mut publisher = stage.client(V5, "publisher");
    for (topic, seconds) in [("a/short", 1), ("a/long", 100)] {
        let message = Message::new(topic, "x").retained().with(&four_bytes(MESSAGE_EXPIRY, seconds));
        publisher.publish_message(message, 1);
    }
    crate::common::wait_for("the short one to expire and the time of the long one to run", || {
        let messages = retained(&stage, &mut publisher);
        let left = messages.last().and_then(|message| message.number(MESSAGE_EXPIRY));
        (told(&messages) == [pair("a/long", "x")] && left.is_some_and(|left| (90..100).contains(&left)))
            .then_some(())
    });
}
