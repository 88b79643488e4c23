//! What Headgate promises to subscribers beyond the protocol: everything comes out of the durable
//! log, from any place in it, to the slow and to those who were away, and no longer than the key
//! is good.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::common::cluster::first_offset;
use crate::common::load::{Ledger, mqtt_sender};
use crate::common::wire::{
    Connect, Frame, Message, Next, PINGREQ, PINGRESP, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL,
    SESSION_EXPIRY, SUBACK, UNSUBACK,
    Version::{self, V5, V311},
    Wire, ack, four_bytes, publish, subscribe_with, unsubscribe, user_property,
};
use crate::common::{Gateway, PATIENCE, Setup, Source, kept, scratch, wait_for};

fn scene() -> (tempfile::TempDir, Gateway, Source) {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create_open("press-4");
    (dir, gateway, source)
}

/// A client whose session stays.
fn staying(version: Version, key: &str, client_id: &str) -> Connect {
    let properties = if version == V5 { four_bytes(SESSION_EXPIRY, 3600) } else { Vec::new() };
    Connect { client_id: client_id.to_owned(), clean: false, properties, ..Connect::with_key(version, key) }
}

fn subscribed(wire: &mut Wire, version: Version, filters: &[(&str, u8)], properties: &[u8]) -> Vec<u8> {
    wire.send(&subscribe_with(version, 1, filters, properties));
    wire.packet(SUBACK).codes(version)
}

/// The next message, acknowledged.
fn received(wire: &mut Wire, version: Version) -> Message {
    let message = Message::read(version, &wire.packet(PUBLISH));
    if message.qos == 1 {
        wire.send(&ack(PUBACK, message.packet_id));
    }
    message
}

fn publish_all(wire: &mut Wire, topic: &str, payloads: impl IntoIterator<Item = usize>) {
    for n in payloads {
        assert_eq!(wire.publish(V311, 1, topic, n.to_string().as_bytes()), 0);
    }
}

fn number(message: &Message) -> usize {
    String::from_utf8_lossy(&message.payload).parse().expect("a number")
}

#[test]
fn a_message_says_where_in_the_log_it_is_and_a_subscription_can_begin_there() {
    let (_dir, gateway, source) = scene();
    let mut publisher = Wire::login(gateway.mqtt, V311, &source.key);
    publish_all(&mut publisher, "a", 0..10);
    publish_all(&mut publisher, "b", 10..20);

    let replayed = |name: &str, value: &str, count: usize| -> Vec<Message> {
        let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
        assert_eq!(subscribed(&mut wire, V5, &[("a", 1)], &user_property(name, value)), [1]);
        (0..count).map(|_| received(&mut wire, V5)).collect()
    };
    let all = replayed("from-offset", "0", 10);
    assert_eq!(all.iter().map(number).collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
    for (offset, message) in (first_offset()..).zip(&all) {
        assert_eq!(message.user("headgate-offset"), Some(offset.to_string()));
        assert_eq!(message.user("headgate-datasource").as_deref(), Some("press-4"));
        assert_eq!(message.user("headgate-key-id").as_deref(), Some(&*source.key_id));
    }
    assert_eq!(number(&replayed("from-offset", &(first_offset() + 7).to_string(), 1)[0]), 7);
    assert_eq!(replayed("tail", "3", 3).iter().map(number).collect::<Vec<_>>(), [7, 8, 9]);
    let at = all[4].user("headgate-received-at").expect("a time");
    assert_eq!(number(&replayed("from-time", &at, 1)[0]), 4);

    // What makes no sense is refused in words, and without a subscription.
    for (name, value) in [("from-offset", "first"), ("from-time", "noon"), ("tail", "-1")] {
        let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
        wire.send(&subscribe_with(V5, 1, &[("a", 1)], &user_property(name, value)));
        let suback = wire.packet(SUBACK);
        assert_eq!(suback.codes(V5), [0x83]);
        assert!(suback.text(crate::common::wire::REASON_STRING).expect("a reason").contains(name));
    }
}

#[test]
fn a_replay_goes_over_into_what_is_new_and_other_subscriptions_are_not_repeated() {
    let (_dir, gateway, source) = scene();
    let mut publisher = Wire::login(gateway.mqtt, V311, &source.key);
    publish_all(&mut publisher, "a", 0..100);
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    subscribed(&mut wire, V5, &[("b", 1)], &[]);
    publish_all(&mut publisher, "b", 100..105);
    for n in 100..105 {
        assert_eq!(number(&received(&mut wire, V5)), n);
    }
    subscribed(&mut wire, V5, &[("a", 1)], &user_property("from-offset", &(first_offset() + 90).to_string()));
    publish_all(&mut publisher, "b", [105]);
    publish_all(&mut publisher, "a", [106]);
    let rest: Vec<usize> = (0..12).map(|_| number(&received(&mut wire, V5))).collect();
    assert_eq!(rest, (90..100).chain([105, 106]).collect::<Vec<_>>());
}

#[test]
fn a_key_for_all_datasources_sees_them_with_their_names_in_front() {
    let (_dir, gateway, first) = scene();
    let second = gateway.create_open("press-5");
    let mut wire = Wire::login(gateway.mqtt, V311, &gateway.admin_key());
    assert_eq!(subscribed(&mut wire, V311, &[("+/spindle/#", 1)], &[]), [1]);
    for source in [&first, &second] {
        let mut publisher = Wire::login(gateway.mqtt, V311, &source.key);
        publish_all(&mut publisher, "other", [0]);
        publish_all(&mut publisher, "spindle/temp", [1]);
    }
    let topics: Vec<String> = (0..2).map(|_| received(&mut wire, V311).topic).collect();
    assert_eq!(topics, ["press-4/spindle/temp", "press-5/spindle/temp"]);
    // A datasource's own key cannot look out of it.
    let mut wire = Wire::login(gateway.mqtt, V311, &first.key);
    assert_eq!(subscribed(&mut wire, V311, &[("press-5/#", 1), ("#", 1)], &[]), [1, 1]);
    let mut publisher = Wire::login(gateway.mqtt, V311, &second.key);
    publish_all(&mut publisher, "spindle/temp", [2]);
    let mut publisher = Wire::login(gateway.mqtt, V311, &first.key);
    publish_all(&mut publisher, "mine", [3]);
    assert_eq!(number(&received(&mut wire, V311)), 3);
}

/// A subscriber that read nothing while more came than its socket holds was not woken again once it
/// read: everything behind the first few megabytes never came.
#[test]
fn a_slow_subscriber_gets_everything_in_order_and_holds_up_nobody() {
    const MESSAGES: usize = 3_000;
    const PAYLOAD: usize = 8 << 10;
    let (_dir, gateway, source) = scene();
    let mut slow = Wire::login(gateway.mqtt, V311, &source.key);
    subscribed(&mut slow, V311, &[("#", 0)], &[]);
    let mut quick = Wire::login(gateway.mqtt, V311, &source.key);
    subscribed(&mut quick, V311, &[("#", 0)], &[]);

    let mut publisher = Wire::login(gateway.mqtt, V311, &source.key);
    let (mut sent, mut slowest) = (0, Duration::ZERO);
    while sent < MESSAGES {
        let payload = format!("{sent:<PAYLOAD$}");
        let began = Instant::now();
        assert_eq!(publisher.publish(V311, 1, "a", payload.as_bytes()), 0);
        assert_eq!(Message::read(V311, &quick.packet(PUBLISH)).payload, payload.as_bytes());
        slowest = slowest.max(began.elapsed());
        sent += 1;
    }
    assert!(slowest < Duration::from_secs(5), "somebody waited {slowest:?}");
    for n in 0..MESSAGES {
        let message = Message::read(V311, &slow.packet(PUBLISH));
        assert_eq!(String::from_utf8_lossy(&message.payload).trim(), n.to_string());
    }
}

#[test]
fn a_session_survives_every_kill_of_the_gateway_and_misses_nothing() {
    const ROUNDS: usize = 6;
    let dir = scratch();
    let setup = Setup::on(dir.path()).set("log.segment_bytes", 1 << 20);
    let mut gateway = setup.start();
    let source = gateway.create_open("press-4");
    let ledger = std::sync::Arc::new(Ledger::default());
    let mut seen: Vec<u64> = Vec::new();
    let mut acked = Vec::new();
    for round in 0..ROUNDS {
        let hello = staying(V5, &source.key, "backend");
        let (mut wire, connack) = Wire::connect(gateway.mqtt, &hello);
        assert_eq!(connack.body[0], u8::from(round > 0), "the session is there");
        if round == 0 {
            subscribed(&mut wire, V5, &[("load", 1)], &user_property("headgate-metadata", "true"));
        }
        let before = ledger.acked();
        let sender = mqtt_sender(&gateway, &source, &ledger, V311, 64);
        crate::common::wait_for("acks", || (ledger.acked() > before + 500).then_some(()));
        // Some of it is read and acknowledged, some read only, some neither.
        for n in 0..200 {
            let message = Message::read(V5, &wire.packet(PUBLISH));
            seen.push(kept_number(&message));
            if n < 150 {
                wire.send(&ack(PUBACK, message.packet_id));
            }
        }
        gateway.kill();
        acked.extend(sender.join().expect("a sender").acked);
        gateway = setup.start();
    }
    let (mut wire, _) = Wire::connect(gateway.mqtt, &staying(V5, &source.key, "backend"));
    let last = kept::in_log(dir.path()).last().map(|record| record.offset).expect("records");
    loop {
        let message = received(&mut wire, V5);
        seen.push(kept_number(&message));
        if message.user("headgate-offset") == Some(last.to_string()) {
            break;
        }
    }
    let seen: BTreeSet<u64> = seen.into_iter().collect();
    let missed: Vec<&u64> = acked.iter().filter(|n| !seen.contains(n)).collect();
    assert!(acked.len() > ROUNDS * 500 && missed.is_empty(), "{} of {} missed", missed.len(), acked.len());
}

fn kept_number(message: &Message) -> u64 {
    crate::common::load::number(&message.payload)
}

#[test]
fn a_qos_2_message_is_kept_once_wherever_in_its_exchange_the_gateway_is_killed() {
    let dir = scratch();
    let setup = Setup::on(dir.path());
    let mut gateway = setup.start();
    let source = gateway.create_open("press-4");
    for (round, version) in [V311, V5].into_iter().enumerate() {
        let hello = staying(version, &source.key, &format!("device {version:?}"));
        let message = Message::new("a", format!("{round}")).at(2, 7);
        let answer = |wire: &mut Wire, kind: u8| {
            let frame = wire.packet(kind);
            assert_eq!((frame.packet_id(), frame.reason()), (7, 0), "{frame:?}");
        };
        let (mut wire, _) = Wire::connect(gateway.mqtt, &hello);
        wire.send(&message.packet(version));
        answer(&mut wire, PUBREC);
        // Killed between PUBREC and PUBREL: the client sends the message again, twice even.
        gateway.kill();
        gateway = setup.start();
        let (mut wire, connack) = Wire::connect(gateway.mqtt, &hello);
        assert_eq!(connack.body[0], 1, "the session is there");
        for _ in 0..2 {
            wire.send(&message.clone().again().packet(version));
            answer(&mut wire, PUBREC);
        }
        // Killed between PUBREL and PUBCOMP: the client sends the PUBREL again.
        wire.send(&ack(PUBREL, 7));
        gateway.kill();
        gateway = setup.start();
        let (mut wire, _) = Wire::connect(gateway.mqtt, &hello);
        wire.send(&ack(PUBREL, 7));
        answer(&mut wire, PUBCOMP);
        // And the packet identifier is free again, also after another kill.
        gateway.kill();
        gateway = setup.start();
        let (mut wire, _) = Wire::connect(gateway.mqtt, &hello);
        wire.send(&message.packet(version));
        answer(&mut wire, PUBREC);
        wire.send(&ack(PUBREL, 7));
        answer(&mut wire, PUBCOMP);
    }
    gateway.stop();
    let payloads: Vec<_> = kept::in_log(dir.path()).into_iter().map(|record| record.payload).collect();
    assert_eq!(payloads, [b"0", b"0", b"1", b"1"]);
}

#[test]
fn a_message_id_is_known_whichever_way_the_message_comes_again() {
    let (_dir, gateway, source) = scene();
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    let message = |packet_id, qos, id: &str| {
        Message::new("a", "x").at(qos, packet_id).with(&user_property("message-id", id)).packet(V5)
    };
    for (packet_id, qos, answer) in [(1, 1, PUBACK), (2, 1, PUBACK), (3, 2, PUBREC)] {
        wire.send(&message(packet_id, qos, "reading 1"));
        let frame = wire.packet(answer);
        assert_eq!((frame.packet_id(), frame.reason()), (packet_id, 0));
    }
    let headers = [("idempotency-key", "reading 1")];
    let answer = gateway.request("POST", "/v1/ingest/press-4/a", &source.key, &headers, b"x");
    assert_eq!((answer.status, answer.json()["duplicate"].as_bool()), (200, Some(true)), "{}", answer.text());
    assert_eq!(answer.json()["first_offset"], first_offset());
    wire.send(&message(4, 1, "reading 2"));
    wire.packet(PUBACK);
    wire.send(&message(5, 1, &"x".repeat(129)));
    assert_eq!(wire.packet(PUBACK).reason(), 0x83, "longer than an id may be");
    assert_eq!(gateway.stored("press-4", 2).len(), 2);
}

#[test]
fn what_retention_removed_before_it_was_read_is_told_to_the_client() {
    let dir = scratch();
    let setup = Setup::on(dir.path()).set("log.segment_bytes", 1 << 20).set("log.retention_bytes", 3 << 20);
    let gateway = setup.start();
    let source = gateway.create_open("press-4");
    let hello = staying(V5, &source.key, "away for too long");
    let (mut wire, _) = Wire::connect(gateway.mqtt, &hello);
    subscribed(&mut wire, V5, &[("#", 1)], &user_property("headgate-metadata", "true"));
    drop(wire);
    let mut publisher = Wire::login(gateway.mqtt, V311, &source.key);
    // More than is kept in memory besides.
    for _ in 0..250 {
        publisher.send(&publish(V311, 1, "a", &vec![b'x'; 100_000]));
        publisher.packet(PUBACK);
    }
    let (mut wire, _) = Wire::connect(gateway.mqtt, &hello);
    let first = received(&mut wire, V5);
    let offset: u64 = first.user("headgate-offset").expect("an offset").parse().expect("a number");
    assert!(offset > 0, "retention has removed some");
    let skipped = (offset - first_offset()).to_string();
    assert_eq!(first.user("headgate-skipped"), Some(skipped.clone()));
    assert_eq!(received(&mut wire, V5).user("headgate-skipped"), None, "told once");
    assert_eq!(gateway.metric("headgate_subscriber_skipped_total").to_string(), skipped);
    gateway.says("retention has removed records before a subscriber read them");
}

/// A session that was sent retained messages whose records have left the log since.
struct RetainedInFlight {
    gateway: Gateway,
    setup: Setup,
    dir: tempfile::TempDir,
    hello: Connect,
    /// Those that it has not acknowledged.
    sent: Vec<Message>,
}

impl RetainedInFlight {
    /// Before it leaves, the session also says this.
    fn after(last_words: impl FnOnce(&mut Wire)) -> Self {
        let dir = scratch();
        let setup =
            Setup::on(dir.path()).set("log.segment_bytes", 1 << 20).set("log.retention_bytes", 3 << 20);
        let gateway = setup.start();
        let source = gateway.create_open("press-4");
        let mut publisher = Wire::login(gateway.mqtt, V5, &source.key);
        for topic in ["kept/1", "kept/2", "kept/3"] {
            publisher.send(&Message::new(topic, topic).at(1, 1).retained().packet(V5));
            publisher.packet(PUBACK);
        }
        let behind = gateway.metric("headgate_log_next_offset");
        let hello = staying(V5, &source.key, "away for too long");
        let (mut wire, _) = Wire::connect(gateway.mqtt, &hello);
        subscribed(&mut wire, V5, &[("kept/+", 1)], &[]);
        let mut sent: Vec<Message> = (0..3).map(|_| Message::read(V5, &wire.packet(PUBLISH))).collect();
        wire.send(&ack(PUBACK, sent.remove(1).packet_id));
        last_words(&mut wire);
        wire.send(&PINGREQ);
        wire.packet(PINGRESP);
        drop(wire);
        // More than is kept in memory besides.
        for _ in 0..250 {
            publisher.send(&publish(V5, 1, "a", &vec![b'x'; 100_000]));
            publisher.packet(PUBACK);
        }
        wait_for("their records to leave the log", || {
            (gateway.metric("headgate_log_first_offset") >= behind).then_some(())
        });
        Self { gateway, setup, dir, hello, sent }
    }

    /// All of them are sent again as they were.
    fn come_again(&self, wire: &mut Wire) {
        for message in &self.sent {
            assert!(message.retain);
            let again = Message::read(V5, &wire.packet(PUBLISH));
            assert_eq!(Message { dup: false, ..again }, *message);
            wire.send(&ack(PUBACK, message.packet_id));
        }
    }
}

/// It was given up, and its packet identifier with it.
#[test]
fn a_retained_message_in_flight_comes_again_although_its_record_has_left_the_log() {
    let scene = RetainedInFlight::after(|_| ());
    let (mut wire, _) = Wire::connect(scene.gateway.mqtt, &scene.hello);
    scene.come_again(&mut wire);
}

/// It was looked for under the filters of the session's present subscriptions.
#[test]
fn a_retained_message_in_flight_comes_again_also_when_its_subscription_is_gone() {
    let scene = RetainedInFlight::after(|wire| {
        wire.send(&unsubscribe(V5, 2, &["kept/+"]));
        wire.packet(UNSUBACK);
    });
    let (mut wire, _) = Wire::connect(scene.gateway.mqtt, &scene.hello);
    scene.come_again(&mut wire);
}

/// It was given up when the database could not be read at that moment.
#[test]
fn a_retained_message_in_flight_waits_for_a_database_that_cannot_be_opened_yet() {
    let mut scene = RetainedInFlight::after(|_| ());
    scene.gateway.stop();
    let database =
        rusqlite::Connection::open(scene.dir.path().join("retained.db")).expect("retained.db opens");
    let format: i64 =
        database.pragma_query_value(None, "user_version", |row| row.get(0)).expect("it has a format");
    let set_format = |format: i64| database.pragma_update(None, "user_version", format).expect("set");
    // As if a newer version had written it: it is left as it is, and tried again.
    set_format(99);
    scene.gateway = scene.setup.start();
    let (mut wire, _) = Wire::connect(scene.gateway.mqtt, &scene.hello);
    wire.send(&PINGREQ);
    wire.packet(PINGRESP);
    // It is asked for in vain meanwhile.
    std::thread::sleep(Duration::from_millis(500));
    set_format(format);
    scene.come_again(&mut wire);
}

#[test]
fn a_subscriber_is_sent_nothing_more_once_its_key_is_dead() {
    let (_dir, gateway, source) = scene();
    let admin = gateway.admin_key();
    let body = json!({ "label": "backend", "scopes": ["subscribe"] });
    let created = gateway.post("/v1/datasources/press-4/keys", &admin, &body).json();
    let text = |field: &str| created["key"][field].as_str().expect("a text").to_owned();
    let mut wires: Vec<(Version, Wire)> =
        [V311, V5].map(|version| (version, Wire::login(gateway.mqtt, version, &text("secret")))).into();
    for (version, wire) in &mut wires {
        subscribed(wire, *version, &[("#", 1)], &[]);
    }
    let mut publisher = Wire::login(gateway.mqtt, V311, &source.key);
    publish_all(&mut publisher, "a", [1]);
    for (version, wire) in &mut wires {
        assert_eq!(number(&received(wire, *version)), 1);
    }
    let path = format!("/v1/datasources/press-4/keys/{}", text("id"));
    assert_eq!(gateway.request("DELETE", &path, &admin, &[], b"").status, 204);
    publish_all(&mut publisher, "a", [2]);
    for (version, wire) in &mut wires {
        match version {
            V5 => drop(wire.disconnected(0x98)),
            V311 => wire.closed(),
        }
    }
}

#[test]
fn a_session_is_not_served_to_a_key_that_may_not_subscribe_and_waits_for_one_that_may() {
    let (_dir, gateway, source) = scene();
    let hello = staying(V311, &source.key, "backend");
    let (mut wire, _) = Wire::connect(gateway.mqtt, &hello);
    subscribed(&mut wire, V311, &[("#", 1)], &[]);
    drop(wire);
    let body = json!({ "label": "device", "scopes": ["ingest"] });
    let created = gateway.post("/v1/datasources/press-4/keys", &gateway.admin_key(), &body).json();
    let ingest = created["key"]["secret"].as_str().expect("a secret").to_owned();
    let (mut wire, connack) = Wire::connect(gateway.mqtt, &staying(V311, &ingest, "backend"));
    assert_eq!(connack.body, [1, 0]);
    publish_all(&mut wire, "a", 0..3);
    assert_eq!(wire.next_within(Duration::from_millis(200)), Next::Silent);
    drop(wire);
    let (mut wire, _) = Wire::connect(gateway.mqtt, &hello);
    assert_eq!((0..3).map(|_| number(&received(&mut wire, V311))).collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn a_group_goes_on_where_it_was_after_a_kill_and_each_record_reaches_a_member() {
    const RECORDS: usize = 300;
    let dir = scratch();
    let setup = Setup::on(dir.path());
    let mut gateway = setup.start();
    let source = gateway.create_open("press-4");
    let hello = |member: usize| staying(V311, &source.key, &format!("worker {member}"));
    let mut wires: Vec<Wire> = (0..2).map(|member| Wire::connect(gateway.mqtt, &hello(member)).0).collect();
    for wire in &mut wires {
        assert_eq!(subscribed(wire, V311, &[("$share/workers/#", 1)], &[]), [1]);
    }
    let mut publisher = Wire::login(gateway.mqtt, V311, &source.key);
    publish_all(&mut publisher, "a", 0..RECORDS / 2);
    // One member takes and acknowledges, the other takes and never says a word.
    let mut done: BTreeSet<usize> = BTreeSet::new();
    for _ in 0..RECORDS / 8 {
        done.insert(number(&received(&mut wires[0], V311)));
    }
    wires[1].packet(PUBLISH);
    gateway.kill();
    drop(wires);
    gateway = setup.start();
    let mut publisher = Wire::login(gateway.mqtt, V311, &source.key);
    publish_all(&mut publisher, "a", RECORDS / 2..RECORDS);
    let (mut wire, connack) = Wire::connect(gateway.mqtt, &hello(0));
    assert_eq!(connack.body, [1, 0]);
    let deadline = Instant::now() + PATIENCE;
    while done.len() < RECORDS {
        assert!(Instant::now() < deadline, "{} of {RECORDS} records came", done.len());
        if let Next::Packet(Frame { first, body }) = wire.next_within(Duration::from_secs(1)) {
            let message = Message::read(V311, &Frame { first, body });
            wire.send(&ack(PUBACK, message.packet_id));
            done.insert(number(&message));
        }
    }
}

#[test]
fn what_comes_in_one_segment_with_a_subscribe_is_served_when_a_full_output_is_taken() {
    let (_dir, gateway, source) = scene();
    let mut full: Vec<Wire> = (0..16)
        .map(|_| {
            let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
            subscribed(&mut wire, V5, &[("#", 0)], &[]);
            wire
        })
        .collect();
    let mut publisher = Wire::login(gateway.mqtt, V5, &source.key);
    for id in 1..=300 {
        assert_eq!(publisher.publish(V5, id, "spindle", &[b'x'; 60_000]), 0);
    }
    // Each PUBREC is answered, so the output may be as full as before when the SUBSCRIBE is served.
    let mut segment: Vec<u8> = (1..=10_000).flat_map(|id| ack(PUBREC, id)).collect();
    segment.extend(subscribe_with(V5, 7, &[("other", 0)], &[]));
    segment.extend(PINGREQ);
    std::thread::scope(|scope| {
        for wire in &mut full {
            scope.spawn(|| {
                wire.send(&segment);
                loop {
                    match wire.next() {
                        Next::Packet(frame) if frame.kind() == PINGRESP => break,
                        Next::Packet(_) => {}
                        other => panic!("no PINGRESP but {other:?}"),
                    }
                }
            });
        }
    });
}
