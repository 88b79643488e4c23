//! Text: section 1.5.4 (1.5.3 of MQTT 3.1.1), and topics as text: section 4.7.3. Text that is none is
//! in [`super::malformed`].

use super::stage::{Stage, told};
use crate::common::cluster::has_room_for;
use crate::common::wire::{Message, Next, VERSIONS, Version::V5};

#[test]
fn a_byte_order_mark_is_a_character_like_any_other() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        let mut subscriber = stage.client(version, "subscriber");
        subscriber.subscribe(&[("\u{FEFF}a", 1), ("end", 1)]);
        publisher.publish(1, "a", "without");
        publisher.publish(1, "\u{FEFF}a", "with");
        publisher.publish(1, "a\u{FEFF}", "behind");
        let messages = subscriber.all_so_far(&mut publisher);
        assert_eq!(told(&messages), [("\u{FEFF}a".to_owned(), "with".to_owned())]);
    }
}

#[test]
fn topics_are_compared_byte_by_byte() {
    let stage = Stage::new();
    let names =
        ["Accounts", "ACCOUNTS", "accounts", "/accounts", "accounts/", "a b", "caf\u{e9}", "cafe\u{301}"]
            .into_iter()
            .filter(|name| has_room_for(name));
    let names: Vec<&str> = names.collect();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        for &name in &names {
            let mut subscriber = stage.client(version, "subscriber");
            subscriber.subscribe(&[(name, 1), ("end", 1)]);
            for topic in &names {
                publisher.publish(1, topic, topic);
            }
            let messages = subscriber.all_so_far(&mut publisher);
            assert_eq!(told(&messages), [(name.to_owned(), name.to_owned())]);
            subscriber.disconnect();
        }
    }
}

#[test]
fn the_longest_topic_that_fits_a_packet_does_no_harm() {
    let stage = Stage::new();
    let longest = "x".repeat(65_535);
    for version in VERSIONS {
        let mut client = stage.client(version, "c");
        client.send(&Message::new(&longest, "x").at(1, 1));
        // Headgate's topics are shorter: a no to the message, or the end where there is no such no.
        match client.wire.next() {
            Next::Packet(frame) if version == V5 => assert_eq!(frame.reason(), 0x90),
            other => assert_eq!(other, Next::Closed),
        }
        let mut client = stage.client(version, "c");
        assert!(client.ask(&[(&longest, 1)], &[])[0] != 2, "an answer");
        client.ping();
    }
}
