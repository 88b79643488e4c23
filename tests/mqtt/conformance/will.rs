//! Wills: sections 3.1.2.5 to 3.1.2.7 and 3.1.3.2.

use std::time::{Duration, Instant};

use super::stage::{Client, Stage, payloads};
use crate::common::wire::{
    CONTENT_TYPE, CORRELATION_DATA, Connect, PAYLOAD_FORMAT, RESPONSE_TOPIC, SESSION_EXPIRY, USER_PROPERTY,
    VERSIONS,
    Version::{self, V5},
    WILL_DELAY, four_bytes, prefixed, text_property, user_property,
};

/// A CONNECT with a will of QoS 1 on topic `will`.
fn willing(stage: &Stage, version: Version) -> Connect {
    let will = Some(("will".to_owned(), b"gone".to_vec()));
    Connect { will, will_qos: 1, ..stage.hello(version, "mortal") }
}

/// A client that hears of wills.
fn heir(stage: &Stage, version: Version) -> Client {
    let mut heir = stage.client(version, "heir");
    heir.subscribe(&[("will/#", 1), ("end", 1)]);
    heir
}

#[test]
fn a_connection_that_ends_without_a_goodbye_publishes_its_will_once() {
    let stage = Stage::new();
    type Ending = fn(&Stage, Client);
    let endings: [(&str, Ending); 4] = [
        ("the connection is lost", |_, client| client.vanish()),
        ("the client breaks a rule", |_, mut client| {
            client.wire.send(&[0x00, 0]);
            client.ended(0x81);
        }),
        ("the client says nothing", |_, mut client| client.ended(0x8D)),
        ("the client connects again", |stage, mut client| {
            let again = stage.client(client.version, "mortal");
            client.ended(0x8E);
            again.disconnect();
        }),
    ];
    for version in VERSIONS {
        let mut heir = heir(&stage, version);
        let mut other = stage.client(version, "other");
        for (ending, end) in endings {
            for qos in [0, 1, 2] {
                if ending == "the client says nothing" && qos != 1 {
                    continue;
                }
                let hello = Connect { will_qos: qos, keep_alive: 1, ..willing(&stage, version) };
                end(&stage, stage.connect(&hello));
                let message = heir.received();
                assert_eq!((&message.topic[..], &message.payload[..]), ("will", &b"gone"[..]), "{ending}");
                assert_eq!((message.qos, message.retain), (qos.min(1), false), "{ending}");
                assert_eq!(heir.all_so_far(&mut other), [], "{ending}: once");
            }
        }
        heir.disconnect();
        other.disconnect();
    }
}

#[test]
fn a_goodbye_takes_the_will_back() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut heir = heir(&stage, version);
        stage.connect(&willing(&stage, version)).disconnect();
        // Nor is it left for a connection that has none.
        stage.client(version, "mortal").vanish();
        let mut other = stage.client(version, "other");
        assert_eq!(heir.all_so_far(&mut other), []);
        if version == V5 {
            for reason in [0x04, 0x80, 0x98] {
                let mut client = stage.connect(&willing(&stage, V5));
                client.wire.send(&[0xE0, 1, reason]);
                client.wire.closed();
                assert_eq!(heir.received().payload, b"gone", "a goodbye of {reason:#04x} asks for it");
            }
        }
        heir.disconnect();
        other.disconnect();
    }
}

#[test]
fn a_will_is_retained_if_it_was_asked_to_be() {
    for version in VERSIONS {
        let stage = Stage::new();
        for retain in [false, true] {
            let mut heir = heir(&stage, version);
            stage.connect(&Connect { will_retain: retain, ..willing(&stage, version) }).vanish();
            assert!(!heir.received().retain, "it was subscribed before");
            heir.disconnect();
            let mut late = stage.client(version, "late");
            late.subscribe(&[("will", 1), ("end", 1)]);
            let mut other = stage.client(version, "other");
            let messages = late.all_so_far(&mut other);
            assert_eq!(payloads(&messages), if retain { vec!["gone"] } else { vec![] });
            assert!(messages.iter().all(|message| message.retain));
        }
    }
}

#[test]
fn an_empty_will_is_a_will() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut heir = heir(&stage, version);
        let will = Some(("will/empty".to_owned(), Vec::new()));
        stage.connect(&Connect { will, ..willing(&stage, version) }).vanish();
        let message = heir.received();
        assert_eq!((&message.topic[..], &message.payload[..]), ("will/empty", &b""[..]));
        heir.disconnect();
    }
}

#[test]
fn a_will_comes_with_its_properties_in_their_order() {
    let stage = Stage::new();
    let mut heir = heir(&stage, V5);
    let will_properties = [
        user_property("z", "1"),
        vec![PAYLOAD_FORMAT, 1],
        user_property("a", "2"),
        text_property(CONTENT_TYPE, "text/plain"),
        text_property(RESPONSE_TOPIC, "answers"),
        text_property(CORRELATION_DATA, [0, 1, 0xFF]),
        user_property("z", "3"),
    ]
    .concat();
    stage.connect(&Connect { will_properties, ..willing(&stage, V5) }).vanish();
    let message = heir.received();
    assert_eq!(message.number(PAYLOAD_FORMAT), Some(1));
    let value =
        |id| message.properties.iter().find(|(found, _)| *found == id).map(|(_, value)| value.clone());
    assert_eq!(value(CONTENT_TYPE), Some(prefixed("text/plain")));
    assert_eq!(value(RESPONSE_TOPIC), Some(prefixed("answers")));
    assert_eq!(value(CORRELATION_DATA), Some(prefixed([0, 1, 0xFF])));
    assert_eq!(value(WILL_DELAY), None, "the gateway's business");
    let users = message.properties.iter().filter(|(id, _)| *id == USER_PROPERTY);
    let users: Vec<Vec<u8>> = users.map(|(id, value)| [&[*id][..], value].concat()).take(3).collect();
    assert_eq!(users, [user_property("z", "1"), user_property("a", "2"), user_property("z", "3")]);
}

#[test]
fn a_will_waits_for_its_delay_or_for_the_end_of_its_session() {
    let stage = &Stage::new();
    let mut heir = stage.client(V5, "heir");
    heir.subscribe(&[("will/#", 1)]);
    let mortal = |id: &str, delay: u32, expiry: u32| Connect {
        client_id: id.to_owned(),
        will: Some((format!("will/{id}"), b"gone".to_vec())),
        will_properties: four_bytes(WILL_DELAY, delay),
        properties: four_bytes(SESSION_EXPIRY, expiry),
        clean: false,
        ..stage.hello(V5, id)
    };
    let lost_at = Instant::now();
    stage.connect(&mortal("delayed", 2, 3600)).vanish();
    stage.connect(&mortal("session", 3600, 1)).vanish();
    stage.connect(&mortal("at-once", 3600, 0)).vanish();
    // Back in time: its will is then not sent, also not when it leaves for good after.
    stage.connect(&mortal("back", 1, 3600)).vanish();
    let back = stage.connect(&Connect { will: None, ..mortal("back", 0, 3600) });
    assert!(back.session_present());
    // A new session is the end of the old one.
    stage.connect(&mortal("new", 3600, 3600)).vanish();
    stage.connect(&stage.hello(V5, "new")).disconnect();

    let mut came = Vec::new();
    for _ in 0..4 {
        let message = heir.received();
        came.push((message.topic.trim_start_matches("will/").to_owned(), lost_at.elapsed()));
    }
    let order: Vec<_> = came.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(order[2..], ["session", "delayed"], "{came:?}");
    assert!(order[..2].contains(&"at-once") && order[..2].contains(&"new"), "{came:?}");
    assert!(came[2].1 >= Duration::from_millis(900), "{came:?}");
    assert!(came[3].1 >= Duration::from_millis(1900) && came[3].1 < Duration::from_secs(5), "{came:?}");
    heir.ping();
    back.disconnect();
}
