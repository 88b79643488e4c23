//! What the ids of messages and of QoS 2 exchanges mean when something else comes under them, when there are too
//! many, and when a repetition would be refused today.

use serde_json::{Value, json};

use crate::common::wire::{
    Connect, Message, PUBACK, PUBCOMP, PUBREC, PUBREL, REASON_STRING, SESSION_EXPIRY,
    Version::{self, V5, V311},
    Wire, ack, four_bytes, user_property,
};
use crate::common::{Gateway, Setup, Source, kept, scratch};

const PACKET_IDENTIFIER_IN_USE: u8 = 0x91;
const IMPLEMENTATION_SPECIFIC_ERROR: u8 = 0x83;
const QUOTA_EXCEEDED: u8 = 0x97;
const PACKET_TOO_LARGE: u8 = 0x95;
const PAYLOAD_FORMAT_INVALID: u8 = 0x99;

/// A client whose session stays.
fn staying(version: Version, source: &Source, client_id: &str) -> Connect {
    let properties = if version == V5 { four_bytes(SESSION_EXPIRY, 3600) } else { Vec::new() };
    let hello = Connect::with_key(version, &source.key);
    Connect { client_id: client_id.to_owned(), clean: false, properties, ..hello }
}

fn payloads(dir: &std::path::Path) -> Vec<String> {
    let records = kept::in_log(dir).into_iter();
    records.map(|record| String::from_utf8_lossy(&record.payload).into_owned()).collect()
}

/// The reason of the answer to a QoS 2 message.
fn pubrec(wire: &mut Wire, message: &Message, version: Version) -> u8 {
    wire.send(&message.packet(version));
    let frame = wire.packet(PUBREC);
    assert_eq!(frame.packet_id(), message.packet_id);
    frame.reason()
}

#[test]
fn another_message_with_a_known_id_is_refused_whichever_way_it_comes() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    let message = |topic: &str, payload: &str, qos, packet_id| {
        Message::new(topic, payload).at(qos, packet_id).with(&user_property("message-id", "reading 1"))
    };
    // All in one read, so that they are in one commit.
    let together =
        [message("a", "1", 1, 1), message("a", "2", 1, 2), message("b", "1", 1, 3), message("a", "1", 1, 4)];
    wire.send(&together.iter().flat_map(|message| message.packet(V5)).collect::<Vec<_>>());
    for expected in [0, IMPLEMENTATION_SPECIFIC_ERROR, IMPLEMENTATION_SPECIFIC_ERROR, 0] {
        let answer = wire.packet(PUBACK);
        assert_eq!(answer.reason(), expected, "{}", answer.packet_id());
        if expected != 0 {
            let words = answer.text(REASON_STRING).unwrap_or_default();
            assert!(words.contains("another message") && words.contains("offset"), "{words}");
        }
    }
    let mut other = Wire::login(gateway.mqtt, V5, &source.key);
    assert_eq!(pubrec(&mut other, &message("a", "3", 2, 7), V5), IMPLEMENTATION_SPECIFIC_ERROR);
    // That exchange is over: its packet identifier may be used for another message.
    assert_eq!(pubrec(&mut other, &Message::new("a", "4").at(2, 7), V5), 0);
    let headers = [("idempotency-key", "reading 1")];
    let post = |body: &[u8]| gateway.request("POST", "/v1/ingest/press-4/a", &source.key, &headers, body);
    assert_eq!((post(b"1").json()["duplicate"].as_bool(), post(b"5").status), (Some(true), 422));
    let refusals = gateway.get("/v1/refusals", &gateway.admin_key()).text();
    assert!(refusals.contains("\"cause\":\"id_conflict\""), "{refusals}");
    assert_eq!(gateway.metric("headgate_refused_total{transport=\"mqtt\",cause=\"id_conflict\"}"), 3.0);
    gateway.stop();
    assert_eq!(payloads(dir.path()), ["1", "4"]);
}

/// A client that has lost its own state begins again with packet identifiers that the session has in use. Its messages
/// would be acknowledged and lost.
#[test]
fn another_message_under_an_open_packet_identifier_is_refused_and_ends_the_exchange() {
    for version in [V311, V5] {
        let dir = scratch();
        let gateway = Gateway::start(dir.path());
        let source = gateway.create("press-4");
        let hello = staying(version, &source, "device");
        let message = |payload: &str| Message::new("a", payload).at(2, 7);
        let mut sent = Vec::new();
        for round in 0..3 {
            let (mut wire, _) = Wire::connect(gateway.mqtt, &hello);
            let (first, second) = (format!("{round} first"), format!("{round} second"));
            assert_eq!(pubrec(&mut wire, &message(&first), version), 0);
            assert_eq!(pubrec(&mut wire, &message(&first).again(), version), 0);
            // Also when the session goes on in another connection.
            if round == 1 {
                drop(wire);
                (wire, _) = Wire::connect(gateway.mqtt, &hello);
            }
            match version {
                V311 => {
                    wire.send(&message(&second).packet(version));
                    wire.closed();
                    (wire, _) = Wire::connect(gateway.mqtt, &hello);
                }
                V5 => assert_eq!(pubrec(&mut wire, &message(&second), version), PACKET_IDENTIFIER_IN_USE),
            }
            // What it was told is that nothing is open: it sends the message again, as a new one.
            assert_eq!(pubrec(&mut wire, &message(&second), version), 0, "round {round}");
            wire.send(&ack(PUBREL, 7));
            wire.packet(PUBCOMP);
            sent.extend([first, second]);
        }
        gateway.stop();
        assert_eq!(payloads(dir.path()), sent, "{version:?}");
    }
}

#[test]
fn who_has_too_many_open_exchanges_is_told_no_and_nobody_else_notices() {
    let dir = scratch();
    let setup = Setup::on(dir.path()).set("intake.exchanges_per_datasource_max", 5);
    let mut gateway = setup.start();
    let (bad, good) = (gateway.create("bad"), gateway.create("good"));
    let message = |packet_id: u16| Message::new("a", packet_id.to_string()).at(2, packet_id);
    let (mut good_wire, _) = Wire::connect(gateway.mqtt, &staying(V5, &good, "good"));
    (1..=5).for_each(|n| assert_eq!(pubrec(&mut good_wire, &message(n), V5), 0));
    // From several sessions.
    let (mut first, _) = Wire::connect(gateway.mqtt, &staying(V5, &bad, "bad 1"));
    (1..=3).for_each(|n| assert_eq!(pubrec(&mut first, &message(n), V5), 0));
    for round in 0..2 {
        let (mut second, _) = Wire::connect(gateway.mqtt, &staying(V5, &bad, "bad 2"));
        let reasons: Vec<u8> = (4..=5).map(|n| pubrec(&mut second, &message(n), V5)).collect();
        assert_eq!(reasons, [0, 0], "round {round}");
        for n in 6..=8 {
            // No PUBREC: with that the client would forget the message. Nor one for what comes behind it.
            second.send(&[message(n).packet(V5), message(4).again().packet(V5)].concat());
            second.disconnected(QUOTA_EXCEEDED);
            (second, _) = Wire::connect(gateway.mqtt, &staying(V5, &bad, "bad 2"));
        }
        let mut old = Wire::login(gateway.mqtt, V311, &bad.key);
        old.send(&message(1).packet(V311));
        old.closed();
        // The others' are known as before, across a kill.
        (good_wire, _) = Wire::connect(gateway.mqtt, &staying(V5, &good, "good"));
        (1..=5).for_each(|n| assert_eq!(pubrec(&mut good_wire, &message(n).again(), V5), 0));
        let refusals = gateway.get("/v1/refusals", &gateway.admin_key()).text();
        assert!(refusals.contains("\"cause\":\"exchanges\""), "{refusals}");
        gateway.kill();
        gateway = setup.start();
    }
    // Who releases has room again.
    let (mut first, _) = Wire::connect(gateway.mqtt, &staying(V5, &bad, "bad 1"));
    first.send(&ack(PUBREL, 1));
    first.packet(PUBCOMP);
    assert_eq!(pubrec(&mut first, &message(9), V5), 0);
    first.send(&message(10).packet(V5));
    first.disconnected(QUOTA_EXCEEDED);
    gateway.stop();
    assert_eq!(payloads(dir.path()).len(), 5 + 5 + 1);
}

fn tighten(gateway: &Gateway, by: &Value) {
    let (method, path) = match by["schemas"].is_array() {
        true => ("PUT", "/v1/datasources/press-4/schema"),
        false => ("PATCH", "/v1/datasources/press-4"),
    };
    let headers = [("content-type", "application/json")];
    let body = by.to_string();
    let changed = gateway.request(method, path, &gateway.admin_key(), &headers, body.as_bytes());
    assert_eq!(changed.status, 200, "{}", changed.text());
}

/// A client that has lost an answer sends the message again, whatever has been tightened meanwhile.
#[test]
fn a_repetition_is_known_although_a_limit_or_a_schema_would_refuse_it_now() {
    for tightened in [
        json!({ "limits": { "payload_bytes": 1 } }),
        json!({ "limits": { "payload_bytes": { "max": 1, "policy": "quarantine" } } }),
        json!({ "schemas": [{ "filter": "#", "schema": { "type": "string" } }] }),
    ] {
        let dir = scratch();
        let gateway = Gateway::start(dir.path());
        let source = gateway.create("press-4");
        let headers = |id: &'static str| [("content-type", "application/json"), ("idempotency-key", id)];
        let post = |id: &'static str, topic: &str, body: &str| {
            let path = format!("/v1/ingest/press-4/{topic}");
            gateway.request("POST", &path, &source.key, &headers(id), body.as_bytes())
        };
        let exchange = |payload: &str| Message::new("e", payload).at(2, 7);
        let with_id = |packet_id, id: &str, payload: &str| {
            let property = user_property("message-id", id);
            Message::new("m", payload).at(1, packet_id).with(&property).packet(V5)
        };
        let (new, old) = (staying(V5, &source, "new"), staying(V311, &source, "old"));
        let (mut wire, _) = Wire::connect(gateway.mqtt, &new);
        let (mut old_wire, _) = Wire::connect(gateway.mqtt, &old);
        assert_eq!(pubrec(&mut wire, &exchange("10"), V5), 0);
        assert_eq!(pubrec(&mut old_wire, &exchange("20"), V311), 0);
        wire.send(&with_id(1, "m", "30"));
        assert_eq!(wire.packet(PUBACK).reason(), 0);
        assert_eq!((post("h", "h", "40").status, post("hs", "h", "[50, 60]").status), (200, 200));
        drop((wire, old_wire));

        tighten(&gateway, &tightened);
        let (mut wire, _) = Wire::connect(gateway.mqtt, &new);
        let (mut old_wire, _) = Wire::connect(gateway.mqtt, &old);
        for _ in 0..2 {
            assert_eq!(pubrec(&mut wire, &exchange("10").again(), V5), 0, "{tightened}");
            assert_eq!(pubrec(&mut old_wire, &exchange("20").again(), V311), 0, "{tightened}");
            wire.send(&with_id(1, "m", "30"));
            assert_eq!(wire.packet(PUBACK).reason(), 0, "{tightened}");
            for (id, body) in [("h", "40"), ("hs", "[50, 60]")] {
                let answer = post(id, "h", body);
                assert_eq!(answer.json()["duplicate"], true, "{tightened}: {}", answer.text());
            }
        }
        for wire in [&mut wire, &mut old_wire] {
            wire.send(&ack(PUBREL, 7));
            assert_eq!(wire.packet(PUBCOMP).reason(), 0);
        }
        // What is no repetition is refused as it would be without an id, and nothing of it is open.
        if tightened["limits"]["payload_bytes"].is_number() {
            wire.send(&exchange("11").packet(V5));
            wire.disconnected(PACKET_TOO_LARGE);
            (wire, _) = Wire::connect(gateway.mqtt, &new);
            wire.send(&with_id(1, "m2", "31"));
            wire.disconnected(PACKET_TOO_LARGE);
        } else {
            for payload in ["11", "12"] {
                assert_eq!(pubrec(&mut wire, &exchange(payload), V5), PAYLOAD_FORMAT_INVALID, "{tightened}");
            }
            wire.send(&with_id(1, "m2", "31"));
            assert_eq!(wire.packet(PUBACK).reason(), PAYLOAD_FORMAT_INVALID, "{tightened}");
        }
        assert!(matches!(post("h2", "h", "41").status, 413 | 422), "{tightened}");
        assert!(matches!(post("hs2", "h", "[51, 61]").status, 413 | 422), "{tightened}");
        gateway.settle();
        let stored = gateway.records("press-4");
        assert_eq!(stored.len(), 6, "{tightened}: {stored:?}");
    }
}

/// It guards against a reading that was acknowledged and dropped: the release was answered without the log, whose exchange
/// stayed open, so that the next message with the same content passed for its repetition.
#[test]
fn a_release_in_a_session_that_now_ends_with_its_connection_frees_the_packet_id() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let message = Message::new("t", "21.5").at(2, 1);
    let (mut wire, _) = Wire::connect(gateway.mqtt, &staying(V5, &source, "sensor"));
    assert_eq!(pubrec(&mut wire, &message, V5), 0);
    drop(wire);
    // The same session, which ends with this connection.
    let (mut wire, connack) =
        Wire::connect(gateway.mqtt, &Connect { properties: Vec::new(), ..staying(V5, &source, "sensor") });
    assert_eq!(connack.body[0], 1, "the session is there");
    for _ in 0..2 {
        wire.send(&ack(PUBREL, 1));
        assert_eq!(wire.packet(PUBCOMP).reason(), 0);
        assert_eq!(pubrec(&mut wire, &message, V5), 0, "a new message");
    }
    gateway.stored("press-4", 3);
}
