//! Messages in flight to a subscriber: sections 4.3.3, 4.4 and 4.9, within a connection and beyond it.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::stage::{Client, Stage, payloads};
use crate::common::wire::{
    Connect, Frame, MESSAGE_EXPIRY, Message, Next, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, RECEIVE_MAXIMUM,
    VERSIONS,
    Version::{V5, V311},
    ack, ack_with, four_bytes, two_bytes, user_property,
};
use crate::common::{scratch, wait_for};

/// A subscriber whose session stays, with these subscriptions.
fn subscriber(stage: &Stage, hello: &Connect, filters: &[(&str, u8)]) -> Client {
    let mut client = stage.connect(hello);
    let granted: Vec<u8> = filters.iter().map(|(_, qos)| *qos).collect();
    assert_eq!(client.ask(filters, &[]), granted, "as asked");
    client
}

/// What comes next: a PUBLISH or a PUBREL, as (kind, packet identifier, DUP flag).
fn next(client: &mut Client) -> (u8, u16, bool) {
    match client.wire.next() {
        Next::Packet(frame) if frame.kind() == PUBLISH => {
            let message = Message::read(client.version, &frame);
            (PUBLISH, message.packet_id, message.dup)
        }
        Next::Packet(frame) => (frame.kind(), frame.packet_id(), false),
        other => panic!("{other:?}"),
    }
}

/// A message, and its PUBREC.
fn took(client: &mut Client) -> Message {
    let message = client.message();
    client.wire.send(&ack(PUBREC, message.packet_id));
    client.released(message.packet_id);
    message
}

fn publish_some(publisher: &mut Client, qos: u8, payloads: impl IntoIterator<Item = u32>) {
    payloads.into_iter().for_each(|n| publisher.publish(qos, "a", &n.to_string()));
}

/// Nothing comes but the answer to a PINGREQ.
fn silent(client: &mut Client) {
    client.ping();
    let next = client.wire.next_within(Duration::from_millis(300));
    assert!(matches!(next, Next::Silent), "{next:?}");
}

#[test]
fn a_message_goes_out_with_the_lower_of_the_qos_that_it_came_with_and_that_was_asked_for() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut publisher = stage.client(version, "publisher");
        let mut client = stage.client(version, "subscriber");
        let filters = [("of/0", 0), ("of/1", 1), ("of/2", 2), ("two/+", 1), ("two/#", 2), ("end", 1)];
        assert_eq!(client.ask(&filters, &[]), [0, 1, 2, 1, 2, 1]);
        for granted in 0..=2 {
            for published in 0..=2 {
                publisher.publish(published, &format!("of/{granted}"), "x");
                let message = client.received();
                assert_eq!(
                    (message.qos, message.dup),
                    (published.min(granted), false),
                    "{granted} {published}"
                );
            }
        }
        // Filters that overlap: once, with the most.
        publisher.publish(2, "two/a", "x");
        let messages = client.all_so_far(&mut publisher);
        assert_eq!(messages.iter().map(|message| message.qos).collect::<Vec<_>>(), [2]);
        // By HTTP there is no QoS: it is kept once, and goes out as it was asked for.
        let answer = stage.gateway.request("POST", "/v1/ingest/press-4/of/2", &stage.key, &[], b"x");
        assert_eq!(answer.status, 200);
        assert_eq!(client.received().qos, 2);
    }
}

#[test]
fn a_qos_2_message_takes_its_packet_id_until_its_pubcomp() {
    for version in VERSIONS {
        let stage = Stage::new();
        let properties = if version == V5 { two_bytes(RECEIVE_MAXIMUM, 2) } else { Vec::new() };
        let hello = Connect { properties, ..stage.hello(version, "subscriber") };
        let mut client = subscriber(&stage, &hello, &[("a", 2)]);
        let mut publisher = stage.client(version, "publisher");
        publish_some(&mut publisher, 2, 1..=3);
        let first = took(&mut client);
        // Said again, answered again.
        client.wire.send(&ack(PUBREC, first.packet_id));
        client.released(first.packet_id);
        let second = client.message();
        assert_ne!(first.packet_id, second.packet_id);
        if version == V5 {
            silent(&mut client);
        }
        client.wire.send(&ack(PUBCOMP, first.packet_id));
        let third = client.message();
        assert_eq!(payloads(&[first.clone(), second, third]), ["1", "2", "3"]);
        // An exchange that is over is unknown.
        client.wire.send(&ack(PUBREC, first.packet_id));
        let pubrel = client.wire.packet(PUBREL);
        assert_eq!(
            (pubrel.packet_id(), pubrel.reason()),
            (first.packet_id, if version == V5 { 0x92 } else { 0 })
        );
    }
}

#[test]
fn pubrels_come_in_the_order_of_the_pubrecs() {
    let stage = Stage::new();
    for version in VERSIONS {
        let hello = stage.hello_again(version, &format!("subscriber {version:?}"));
        let mut client = subscriber(&stage, &hello, &[("a", 2)]);
        let mut publisher = stage.client(version, "publisher");
        publish_some(&mut publisher, 2, 0..20);
        let mut ids: Vec<u16> = (0..20).map(|_| client.message().packet_id).collect();
        ids.swap(3, 17);
        ids.reverse();
        let pubrecs: Vec<u8> = ids.iter().flat_map(|id| ack(PUBREC, *id)).collect();
        client.wire.send(&pubrecs);
        ids.iter().for_each(|id| client.released(*id));
        client.vanish();
        let mut client = stage.connect(&hello);
        ids.iter().for_each(|id| client.released(*id));
        client.unsubscribe(&["a"]);
    }
}

#[test]
fn a_pubrec_that_says_no_ends_the_delivery() {
    let stage = Stage::new();
    let hello = stage.hello_again(V5, "subscriber");
    let mut client = subscriber(&stage, &hello, &[("a", 2)]);
    let mut publisher = stage.client(V5, "publisher");
    publish_some(&mut publisher, 2, 1..=1);
    let message = client.message();
    client.wire.send(&ack_with(PUBREC, message.packet_id, 0x97));
    silent(&mut client);
    client.vanish();
    let mut client = stage.connect(&hello);
    assert!(client.session_present());
    silent(&mut client);
    publish_some(&mut publisher, 2, 2..=2);
    assert_eq!(client.received().payload, b"2");
}

#[test]
fn an_acknowledgement_of_another_qos_closes_the_connection() {
    let stage = Stage::new();
    for version in VERSIONS {
        for (qos, wrong) in [(1, PUBREC), (1, PUBCOMP), (2, PUBACK), (2, PUBCOMP)] {
            let mut client = subscriber(&stage, &stage.hello(version, "subscriber"), &[("a", qos)]);
            let mut publisher = stage.client(version, "publisher");
            publish_some(&mut publisher, 2, 1..=1);
            let message = client.message();
            assert_eq!(message.qos, qos);
            client.wire.send(&ack(wrong, message.packet_id));
            client.ended(0x82);
        }
    }
}

/// Up to 0.1 all of them came again, with other packet identifiers and DUP 0.
#[test]
fn a_restart_keeps_what_was_in_flight_and_nothing_else() {
    for version in VERSIONS {
        let stage = Stage::new();
        let hello = stage.hello_again(version, "subscriber");
        let mut client = subscriber(&stage, &hello, &[("a", 2)]);
        let mut publisher = stage.client(version, "publisher");
        for n in 0..30_u32 {
            publisher.publish(1 + u8::from(n % 2 == 0), "a", &n.to_string());
        }
        let mut left = Vec::new();
        for n in 0..30_u32 {
            let message = client.message();
            match (n % 5, message.qos) {
                (0, _) => left.push((PUBLISH, message.packet_id, true)),
                // It has the message, and owes its PUBCOMP.
                (1, 2) => {
                    client.wire.send(&ack(PUBREC, message.packet_id));
                    client.released(message.packet_id);
                    left.insert(0, (PUBREL, message.packet_id, false));
                }
                _ => client.acknowledge(&message),
            }
        }
        // PUBRELs are first, in their order.
        let releases = left.iter().filter(|(kind, ..)| *kind == PUBREL).count();
        left[..releases].reverse();
        client.ping();
        for clean in [true, false] {
            if clean {
                client.disconnect()
            } else {
                client.vanish()
            }
            client = stage.connect(&hello);
            let again: Vec<_> = (0..left.len()).map(|_| next(&mut client)).collect();
            assert_eq!(again, left);
        }
        client.vanish();
        publisher.disconnect();
        let stage = stage.restart();
        let mut client = stage.connect(&hello);
        assert!(client.session_present());
        let again: Vec<_> = (0..left.len()).map(|_| next(&mut client)).collect();
        assert_eq!(again, left);
        silent(&mut client);
        let mut publisher = stage.client(version, "publisher");
        publish_some(&mut publisher, 2, [99]);
        let message = client.received();
        assert_eq!((&message.payload[..], message.dup), (&b"99"[..], false));
        assert!(left.iter().all(|(_, id, _)| *id != message.packet_id), "it is in use");
    }
}

/// Up to 0.1 the stream stood still after 8,192 more messages, and a restart sent all of them again.
#[test]
fn one_message_that_is_never_acknowledged_stops_no_stream_and_comes_again_alone() {
    const MESSAGES: usize = 12_000;
    let stage = Stage::new();
    let hello = stage.hello_again(V311, "subscriber");
    let mut client = subscriber(&stage, &hello, &[("a", 1)]);
    let many = vec!["\"x\""; MESSAGES].join(",");
    let answer = stage.gateway.request(
        "POST",
        "/v1/ingest/press-4/a",
        &stage.key,
        &[],
        format!("[{many}]").as_bytes(),
    );
    assert_eq!(answer.status, 200, "{}", answer.text());
    let stuck = client.message();
    for _ in 1..MESSAGES {
        let message = client.received();
        assert_ne!(message.packet_id, stuck.packet_id);
    }
    silent(&mut client);
    client.vanish();
    let stage = stage.restart();
    let mut client = stage.connect(&hello);
    assert_eq!(next(&mut client), (PUBLISH, stuck.packet_id, true));
    silent(&mut client);
}

/// A gateway that is killed has written what its client may have of a QoS 2 message before it sends it.
#[test]
fn a_qos_2_message_is_delivered_once_whenever_the_gateway_is_killed() {
    let mut stage = Stage::new();
    let hello = stage.hello_again(V5, "subscriber");
    let mut publisher = stage.client(V5, "publisher");
    let mut client = subscriber(&stage, &hello, &[("a", 2)]);
    publish_some(&mut publisher, 2, 0..4);
    let sent: Vec<Message> = (0..4).map(|_| client.message()).collect();
    stage = stage.kill();
    let mut client = stage.connect(&hello);
    for message in &sent {
        assert_eq!(next(&mut client), (PUBLISH, message.packet_id, true));
    }
    // At once after the PUBRELs.
    let [first, second, ..] = &sent[..] else { panic!("four") };
    client.wire.send(&[ack(PUBREC, second.packet_id), ack(PUBREC, first.packet_id)].concat());
    client.released(second.packet_id);
    client.released(first.packet_id);
    stage = stage.kill();
    let mut client = stage.connect(&hello);
    let expected = [
        (PUBREL, second.packet_id, false),
        (PUBREL, first.packet_id, false),
        (PUBLISH, sent[2].packet_id, true),
        (PUBLISH, sent[3].packet_id, true),
    ];
    assert_eq!([0; 4].map(|_| next(&mut client)), expected);
    for id in [first.packet_id, second.packet_id] {
        client.wire.send(&ack(PUBCOMP, id));
    }
    for message in &sent[2..] {
        client.wire.send(&ack(PUBREC, message.packet_id));
        client.released(message.packet_id);
        client.wire.send(&ack(PUBCOMP, message.packet_id));
    }
    client.ping();
    // What the client has said last may be said again; none of the messages comes again.
    stage = stage.kill();
    let mut client = stage.connect(&hello);
    loop {
        match client.wire.next_within(Duration::from_millis(500)) {
            Next::Packet(frame) if frame.kind() == PUBREL => {
                client.wire.send(&ack(PUBCOMP, frame.packet_id()));
            }
            Next::Silent => break,
            other => panic!("{other:?}"),
        }
    }
    silent(&mut client);
}

/// How many bytes the flights of the only session take in a copy of the database, which its gateway holds locked.
fn flights_bytes(path: &Path) -> Option<i64> {
    let copy = scratch();
    for suffix in ["", "-wal"] {
        let from = format!("{}{suffix}", path.display());
        std::fs::copy(from, copy.path().join(format!("sessions.db{suffix}"))).ok()?;
    }
    let database = rusqlite::Connection::open(copy.path().join("sessions.db")).ok()?;
    database.query_row("SELECT length(flights) FROM sessions", [], |row| row.get(0)).ok()
}

#[test]
fn a_qos_2_message_that_was_sent_is_sent_again_also_when_it_has_expired() {
    let stage = Stage::new();
    let hello = stage.hello_again(V5, "subscriber");
    let mut client = subscriber(&stage, &hello, &[("a", 2)]);
    let mut publisher = stage.client(V5, "publisher");
    publisher.publish_message(Message::new("a", "x").with(&four_bytes(MESSAGE_EXPIRY, 1)), 2);
    let message = client.message();
    client.vanish();
    // A time, which has to pass.
    std::thread::sleep(Duration::from_millis(2_100));
    let mut client = stage.connect(&hello);
    let again = client.message();
    assert_eq!((again.packet_id, again.dup, &again.payload), (message.packet_id, true, &message.payload));
    client.acknowledge(&again);
    silent(&mut client);
}

/// What was acknowledged a second before a kill does not come again.
#[test]
fn after_a_kill_only_the_last_second_comes_again() {
    let stage = Stage::new();
    let hello = stage.hello_again(V5, "subscriber");
    let mut client = subscriber(&stage, &hello, &[("a", 1)]);
    let mut publisher = stage.client(V5, "publisher");
    publish_some(&mut publisher, 1, 0..20);
    let messages: Vec<Message> = (0..20).map(|_| client.message()).collect();
    // All but the first and the tenth.
    let left = [messages[0].packet_id, messages[9].packet_id];
    messages.iter().filter(|of| !left.contains(&of.packet_id)).for_each(|of| client.acknowledge(of));
    client.ping();
    let path = stage.gateway.dir().join("sessions.db");
    if !path.exists() {
        // In a cluster sessions are in the bucket.
        return;
    }
    wait_for("it is written what is in flight", || (flights_bytes(&path)? < 40).then_some(()));
    let stage = stage.kill();
    let mut client = stage.connect(&hello);
    for id in left {
        assert_eq!(next(&mut client), (PUBLISH, id, true));
    }
    silent(&mut client);
}

#[test]
fn a_client_that_takes_fewer_messages_than_are_in_flight_gets_them_again_a_few_at_a_time() {
    let stage = Stage::new();
    let hello = stage.hello_again(V5, "subscriber");
    let mut client = subscriber(&stage, &hello, &[("a", 1)]);
    let mut publisher = stage.client(V5, "publisher");
    publish_some(&mut publisher, 1, 0..6);
    let ids: Vec<u16> = (0..6).map(|_| client.message().packet_id).collect();
    client.vanish();
    let properties = [hello.properties.clone(), two_bytes(RECEIVE_MAXIMUM, 2)].concat();
    let mut client = stage.connect(&Connect { properties, ..hello });
    let mut held: Vec<Message> = Vec::new();
    for id in ids {
        if held.len() == 2 {
            silent(&mut client);
            client.acknowledge(&held.remove(0));
        }
        held.push(client.message());
        assert_eq!((held.last().map(|last| (last.packet_id, last.dup))), Some((id, true)));
    }
}

#[test]
fn a_qos_2_message_of_a_group_is_completed_to_the_member_that_has_it_begun() {
    let stage = Stage::new();
    let hello = stage.hello_again(V5, "one");
    let mut one = subscriber(&stage, &hello, &[("$share/g/a", 2)]);
    let mut publisher = stage.client(V5, "publisher");
    publish_some(&mut publisher, 2, 1..=1);
    let message = one.message();
    assert_eq!((message.qos, &message.payload[..]), (2, &b"1"[..]));
    one.ping();
    one.vanish();
    let mut two = subscriber(&stage, &stage.hello_again(V5, "two"), &[("$share/g/a", 2)]);
    silent(&mut two);
    let mut one = stage.connect(&hello);
    assert_eq!(next(&mut one), (PUBLISH, message.packet_id, true));
    // Nor does another get it when the session has ended.
    one.vanish();
    stage.client(V5, "one").disconnect();
    silent(&mut two);
    publish_some(&mut publisher, 2, 2..=2);
    assert_eq!(two.received().payload, b"2");
}

#[test]
fn what_waited_comes_before_retained_messages_of_a_client_that_subscribes_again() {
    let stage = Stage::new();
    for version in VERSIONS {
        let topic = format!("r/{version:?}");
        let filters = [(topic.as_str(), 1), ("end", 1)];
        let hello = stage.hello_again(version, &format!("subscriber {version:?}"));
        let mut publisher = stage.client(version, "publisher");
        publisher.retain(1, &topic, "before");
        let mut client = subscriber(&stage, &hello, &filters);
        assert_eq!(client.received().payload, b"before");
        client.disconnect();
        for n in 0..500 {
            publisher.retain(1, &topic, &n.to_string());
        }
        let mut client = stage.connect(&hello);
        client.subscribe(&filters[..1]);
        let expected: Vec<String> = (0..500).chain([499]).map(|n: u32| n.to_string()).collect();
        let messages: Vec<Message> = expected.iter().map(|_| client.received()).collect();
        assert_eq!(payloads(&messages), expected);
        let retained: Vec<bool> = messages.iter().map(|message| message.retain).collect();
        assert_eq!(retained, (0..501).map(|n| n == 500).collect::<Vec<_>>());
        publisher.retain(1, &topic, "");
    }
}

/// Clients subscribe whenever they connect, always with the same words.
#[test]
fn a_replay_that_a_session_has_had_does_not_come_at_every_connection() {
    let stage = Stage::new();
    let mut publisher = stage.client(V5, "publisher");
    publish_some(&mut publisher, 1, 0..10);
    let from = |value: &str| user_property("from-offset", value);
    let hello = stage.hello_again(V5, "subscriber");
    let first = if stage.gateway.records_in_log() > 0.0 { "0" } else { "1" };
    let mut client = stage.connect(&hello);
    client.subscribe_with(&[("a", 1)], &from(first));
    let told: Vec<Message> = (0..10).map(|_| client.received()).collect();
    assert_eq!(told[0].payload, b"0");
    client.ping();
    client.disconnect();
    publish_some(&mut publisher, 1, 10..12);
    let mut client = stage.connect(&hello);
    client.subscribe_with(&[("a", 1)], &from(first));
    assert_eq!(payloads(&[client.received(), client.received()]), ["10", "11"]);
    silent(&mut client);
    client.disconnect();
    publisher.disconnect();
    // Nor after a restart.
    let stage = stage.restart();
    let mut client = stage.connect(&hello);
    client.subscribe_with(&[("a", 1)], &from(first));
    silent(&mut client);
    // Asked for once more it comes again, and so does another place.
    client.subscribe_with(&[("a", 1)], &from(first));
    assert_eq!(client.received().payload, b"0");
    (1..12).for_each(|_| drop(client.received()));
    client.ping();
    client.disconnect();
    let mut client = stage.connect(&hello);
    client.subscribe_with(&[("a", 1)], &user_property("tail", "3"));
    assert_eq!(client.received().payload, b"9");
}

#[test]
fn a_subscriber_that_stands_still_is_seen() {
    let stage = Stage::with(|setup| setup.set("mqtt.still_ms", 100));
    let admin = stage.gateway.admin_key();
    let listed = |query: &str| {
        let answer = stage.gateway.get(&format!("/v1/datasources/press-4/sessions{query}"), &admin);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    };
    let properties = two_bytes(RECEIVE_MAXIMUM, 3);
    let stuck = Connect { properties, ..stage.hello(V5, "stuck") };
    let mut stuck = subscriber(&stage, &stuck, &[("a", 1)]);
    let mut moving = subscriber(&stage, &stage.hello(V5, "moving"), &[("a", 1)]);
    subscriber(&stage, &stage.hello_again(V5, "away"), &[("a", 1)]).disconnect();
    let mut publisher = stage.client(V5, "publisher");
    publish_some(&mut publisher, 1, 0..10);
    (0..3).for_each(|_| drop(stuck.message()));
    (0..10).for_each(|_| drop(moving.received()));
    let still = wait_for("it is seen", || {
        let still = listed("?still=true")["sessions"].as_array().expect("a list").clone();
        (still.len() == 1 && still[0]["client_id"] == "stuck").then(|| still[0].clone())
    });
    assert_eq!((&still["in_flight"], &still["connected"]), (&Value::from(3), &Value::from(true)));
    assert!(still["still_since"].is_string() && still["behind"].as_u64() >= Some(7), "{still}");
    wait_for("it is counted", || (stage.gateway.metric("headgate_subscribers_still") == 1.0).then_some(()));
    stage.gateway.says("a subscriber stands still");
    let ids = |page: &Value| -> Vec<String> {
        let sessions = page["sessions"].as_array().expect("a list").iter();
        sessions.map(|of| of["client_id"].as_str().expect("text").to_owned()).collect()
    };
    let page = listed("?limit=2");
    assert_eq!((ids(&page), &page["next"]), (vec!["away".into(), "moving".into()], &Value::from("moving")));
    let page = listed("?limit=2&after=moving");
    assert_eq!((ids(&page), &page["next"]), (vec!["stuck".to_owned()], &Value::Null));
    // It is not any more when the client takes what it is sent.
    let begun = Instant::now();
    stuck.wire.send(&(1..=3_u16).flat_map(|id| ack(PUBACK, id)).collect::<Vec<u8>>());
    (3..10).for_each(|_| drop(stuck.received()));
    wait_for("it moves", || (ids(&listed("?still=true")).is_empty()).then_some(()));
    wait_for("it is counted", || (stage.gateway.metric("headgate_subscribers_still") == 0.0).then_some(()));
    assert!(begun.elapsed() < Duration::from_secs(60));
    let other = stage.gateway.create("press-5").key;
    let refused = stage.gateway.get("/v1/datasources/press-4/sessions", &other);
    assert!(matches!(refused.status, 401 | 403), "{}", refused.status);
}

/// The kinds of packets that a client may send for a message that is in flight, for the tables.
#[test]
fn an_acknowledgement_of_nothing_changes_nothing() {
    let stage = Stage::new();
    let mut client = subscriber(&stage, &stage.hello(V5, "subscriber"), &[("a", 2)]);
    let mut publisher = stage.client(V5, "publisher");
    publish_some(&mut publisher, 2, 1..=1);
    let message = client.message();
    let other = message.packet_id + 1;
    let is_release =
        |frame: &Frame| (frame.kind(), frame.packet_id(), frame.reason()) == (PUBREL, other, 0x92);
    for kind in [PUBACK, PUBCOMP] {
        client.wire.send(&ack(kind, other));
    }
    client.wire.send(&ack(PUBREC, other));
    assert!(is_release(&client.wire.packet(PUBREL)));
    client.acknowledge(&message);
    silent(&mut client);
}
