//! CONNECT and CONNACK: chapters 3.1 and 3.2. What is malformed about a CONNECT is in
//! [`super::malformed`].

use super::stage::Stage;
use crate::common::wire::{
    AUTH_METHOD, CONNACK, Connect, MAXIMUM_PACKET_SIZE, MAXIMUM_QOS, Message, Next, PINGREQ, PINGRESP,
    PUBACK, PUBCOMP, PUBREC, PUBREL, RECEIVE_MAXIMUM, REQUEST_RESPONSE_INFO, RESPONSE_INFO, RETAIN_AVAILABLE,
    SERVER_KEEP_ALIVE, SHARED_AVAILABLE, SUBACK, SUBSCRIPTION_IDS_AVAILABLE, TOPIC_ALIAS_MAXIMUM, VERSIONS,
    Version::{V5, V311},
    WILDCARDS_AVAILABLE, Wire, ack, publish, subscribe, text_property,
};

#[test]
fn the_connack_comes_first_once_and_without_reserved_bits() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut wire = Wire::open(stage.gateway.mqtt);
        let hello = stage.hello(version, "first").packet();
        wire.send(&[&hello[..], &publish(version, 1, "a", b"x"), &PINGREQ].concat());
        let connack = wire.packet(CONNACK);
        assert_eq!((connack.first, connack.body[0], connack.reason()), (0x20, 0, 0));
        // A PINGRESP need not wait for the disk, a PUBACK has to.
        let mut kinds = [wire.next(), wire.next()].map(|next| match next {
            Next::Packet(frame) => frame.kind(),
            other => panic!("{other:?}"),
        });
        kinds.sort_unstable();
        assert_eq!(kinds, [PUBACK, PINGRESP]);
        wire.send(&PINGREQ);
        wire.packet(PINGRESP);
    }
}

#[test]
fn a_second_connect_ends_the_connection_and_nothing_comes_before_the_first() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut client = stage.client(version, "twice");
        client.wire.send(&stage.hello(version, "twice").packet());
        client.ended(0x82);
        assert_eq!(stage.refused(&PINGREQ), None);
        assert_eq!(stage.refused(&publish(version, 1, "a", b"x")), None);
    }
}

#[test]
fn a_version_that_is_not_spoken_is_named_as_the_reason() {
    let stage = Stage::new();
    let hello = stage.hello(V311, "c");
    let refusal = stage.refused(&hello.packet_with(b"MQTT", 3, hello.flags())).expect("a CONNACK");
    assert_eq!((refusal.first, &refusal.body[..]), (0x20, &[0, 1][..]));
    let hello = stage.hello(V5, "c");
    let refusal = stage.refused(&hello.packet_with(b"MQTT", 6, hello.flags())).expect("a CONNACK");
    assert_eq!((refusal.first, refusal.body[0], refusal.reason()), (0x20, 0, 0x84));
    assert_eq!(stage.refused(&hello.packet_with(b"XMPP", 5, hello.flags())), None);
}

#[test]
fn every_field_of_a_connect_is_read_in_its_order() {
    let stage = Stage::new();
    for version in VERSIONS {
        let full = Connect {
            will: Some(("will".to_owned(), b"gone".to_vec())),
            username: Some(b"a device".to_vec()),
            password: Some(stage.key.clone().into_bytes()),
            ..stage.hello(version, "full")
        };
        let mut client = stage.connect(&full);
        client.publish(1, "a", "x");
        client.disconnect();
        // The user name where the password is: the key is then not where it was announced.
        let swapped = Connect {
            username: Some(b"nobody".to_vec()),
            password: Some(b"nothing".to_vec()),
            client_id: stage.key.clone(),
            ..full
        };
        let refusal = stage.refused(&swapped.packet()).expect("a CONNACK");
        assert_eq!(refusal.reason(), if version == V5 { 0x87 } else { 5 });
    }
}

#[test]
fn the_client_identifiers_that_every_server_takes_are_taken() {
    const ALL: &str = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    let stage = Stage::new();
    for version in VERSIONS {
        for id in [&ALL[..1], &ALL[..23], &ALL[23..46], &ALL[39..]] {
            let mut client = stage.client(version, id);
            assert!(client.version != V5 || client.assigned_id().is_none(), "its own");
            client.ping();
            client.disconnect();
        }
    }
}

#[test]
fn a_client_without_an_identifier_is_given_one_of_its_own() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut one = stage.client(version, "");
        let mut other = stage.client(version, "");
        one.ping();
        other.ping();
        assert!(!one.session_present() && !other.session_present());
        if version == V5 {
            let (one_id, other_id) = (one.assigned_id(), other.assigned_id());
            let one_id = one_id.expect("an identifier");
            assert!(!one_id.is_empty() && Some(&one_id) != other_id.as_ref(), "{one_id} {other_id:?}");
            // It is the client's from now on, as if it had brought it.
            let mut again = stage.client(V5, &one_id);
            one.wire.disconnected(0x8E);
            again.ping();
        }
    }
    // A session that stays belongs to the identifier that was given.
    let hello = stage.hello_again(V5, "");
    let id = stage.connect(&hello).assigned_id().expect("an identifier");
    assert!(stage.connect(&stage.hello_again(V5, &id)).session_present());
}

#[test]
fn an_identifier_that_is_not_taken_is_refused_by_its_code() {
    let stage = Stage::new();
    for (version, code) in [(V311, 2), (V5, 0x85)] {
        let refusal = stage.refused(&stage.hello(version, &"x".repeat(300)).packet()).expect("a CONNACK");
        assert_eq!((refusal.first, refusal.body[0], refusal.reason()), (0x20, 0, code));
    }
    let nameless = Connect { clean: false, ..stage.hello(V311, "") };
    assert_eq!(stage.refused(&nameless.packet()).expect("a CONNACK").body, [0, 2]);
    // MQTT 5 makes no such difference.
    let nameless = Connect { clean: false, ..stage.hello(V5, "") };
    assert!(stage.connect(&nameless).assigned_id().is_some());
}

#[test]
fn after_a_refusal_nothing_that_was_sent_with_it_is_looked_at() {
    let stage = Stage::new();
    for (version, code) in [(V311, 5), (V5, 0x87)] {
        let stranger = Connect { username: Some(b"stranger".to_vec()), ..stage.hello(version, "c") };
        let bytes =
            [&stranger.packet()[..], &publish(version, 1, "a", b"x"), &stage.hello(version, "c").packet()];
        let refusal = stage.refused(&bytes.concat()).expect("a CONNACK");
        // A CONNACK and not a DISCONNECT, once, with session present 0.
        assert_eq!((refusal.first, refusal.body[0], refusal.reason()), (0x20, 0, code));
    }
    stage.gateway.settle();
    assert!(stage.gateway.records("press-4").is_empty());
}

#[test]
fn a_client_that_connects_again_ends_its_earlier_connection() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut first = stage.client(version, "same");
        let mut second = stage.client(version, "same");
        first.ended(0x8E);
        second.ping();
        second.disconnect();
    }
    // The version makes no other client of it.
    let mut first = stage.client(V311, "same");
    let mut second = stage.client(V5, "same");
    first.ended(0x8E);
    second.ping();
}

#[test]
fn a_connack_tells_what_the_client_has_to_know_and_nothing_else() {
    let stage = Stage::new();
    for asked in [None, Some(0), Some(1)] {
        let properties = asked.map_or(Vec::new(), |asked| vec![REQUEST_RESPONSE_INFO, asked]);
        let client = stage.connect(&Connect { properties, keep_alive: 60, ..stage.hello(V5, "c") });
        let connack = &client.connack;
        assert_eq!(connack.number(RECEIVE_MAXIMUM), Some(1024));
        assert_eq!(connack.number(TOPIC_ALIAS_MAXIMUM), Some(32));
        assert!(connack.number(MAXIMUM_PACKET_SIZE).is_some_and(|bytes| bytes > 1 << 20));
        // Left out is 2: a PUBLISH may have any QoS.
        assert_eq!(connack.number(MAXIMUM_QOS), None);
        for available in [RETAIN_AVAILABLE, WILDCARDS_AVAILABLE, SUBSCRIPTION_IDS_AVAILABLE, SHARED_AVAILABLE]
        {
            assert!(matches!(connack.number(available), None | Some(1)), "{available:#04x}");
        }
        let properties = connack.properties();
        let has = |wanted| properties.iter().any(|(id, _)| *id == wanted);
        assert!(!has(RESPONSE_INFO), "there is no response information");
        assert!(!has(AUTH_METHOD), "nobody asked for a method");
        assert!(!has(SERVER_KEEP_ALIVE), "the client's own is good");
    }
}

#[test]
fn an_authentication_method_is_refused_by_its_code() {
    let stage = Stage::new();
    let properties = text_property(AUTH_METHOD, "SCRAM-SHA-1");
    let hello = Connect { properties, ..stage.hello(V5, "c") };
    let refusal = stage.refused(&hello.packet()).expect("a CONNACK");
    assert_eq!((refusal.kind(), refusal.reason()), (CONNACK, 0x8C));
    // Without one there is nothing that an AUTH could continue.
    let mut client = stage.client(V5, "c");
    client.wire.send(&[0xF0, 0]);
    client.wire.disconnected(0x82);
}

#[test]
fn mqtt_3_1_is_served_as_well() {
    let stage = Stage::new();
    let hello = Connect { clean: false, ..stage.hello(V311, "old") };
    let bytes = hello.packet_with(b"MQIsdp", 3, hello.flags());
    let mut wire = Wire::open(stage.gateway.mqtt);
    wire.send(&bytes);
    assert_eq!(wire.packet(CONNACK).body, [0, 0]);
    wire.send(&subscribe(V311, 1, &["a"]));
    assert_eq!(wire.packet(SUBACK).body, [0, 1, 1]);
    wire.send(&publish(V311, 2, "b", b"x"));
    wire.packet(PUBACK);
    wire.send(&Message::new("b", "y").at(2, 3).packet(V311));
    wire.packet(PUBREC);
    // What is sent again is marked, also where later versions have no such mark.
    let mut pubrel = ack(PUBREL, 3);
    wire.send(&pubrel);
    wire.packet(PUBCOMP);
    pubrel[0] |= 8;
    wire.send(&pubrel);
    wire.packet(PUBCOMP);
    wire.send(&publish(V311, 4, "a", b"z"));
    let mut kinds = [wire.next(), wire.next()].map(|next| match next {
        Next::Packet(frame) => frame.kind(),
        other => panic!("{other:?}"),
    });
    kinds.sort_unstable();
    assert_eq!(kinds, [3, PUBACK]);
    drop(wire);
    // The byte that says in 3.1.1 that there is a session is reserved in 3.1.
    let mut wire = Wire::open(stage.gateway.mqtt);
    wire.send(&bytes);
    assert_eq!(wire.packet(CONNACK).body, [0, 0]);
}
