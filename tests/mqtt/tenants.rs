//! One tenant's subscribers against everybody else: whatever the sessions, filters, groups and replays of one
//! datasource are, the gateway stays small, and others get their messages, their acks and their revocations.
//! All at the gateway's defaults.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::memory::ResidentMemory;
use crate::common::wire::{
    CONNACK, Connect, Message, Next, PUBACK, PUBLISH, SESSION_EXPIRY, SUBACK, Version::V5, Wire, four_bytes,
    subscribe, subscribe_with, unsubscribe, user_property,
};
use crate::common::{Gateway, Source, scratch, wait_for};

/// What nobody else's delivery, ack or revocation may take while one tenant attacks, on a machine that may be
/// busy with other tests. Without the bounds that are tested here it takes from 8 to 99 seconds.
const DISTURBED_MAX: Duration = Duration::from_secs(4);

const SUBSCRIPTION_ID: u8 = 0x0B;
const TOO_MUCH: u8 = 0x97;

fn set_limits(gateway: &Gateway, id: &str, limits: &Value) {
    let (path, key) = (format!("/v1/datasources/{id}"), gateway.admin_key());
    let body = json!({ "limits": limits }).to_string();
    let headers = [("content-type", "application/json")];
    let answer = gateway.request("PATCH", &path, &key, &headers, body.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// The cause and the limit of the newest refusal of a datasource.
fn newest_refusal(gateway: &Gateway, id: &str) -> (String, u64) {
    let listed = gateway.get(&format!("/v1/refusals?datasource={id}"), &gateway.admin_key()).json();
    let newest = &listed["refusals"][0];
    let max = newest["limit"]["max"].as_u64().unwrap_or_default();
    (newest["cause"].as_str().unwrap_or_default().to_owned(), max)
}

/// A client whose session stays.
fn staying(key: &str, client_id: &str) -> Connect {
    let properties = four_bytes(SESSION_EXPIRY, u32::MAX);
    Connect { client_id: client_id.to_owned(), clean: false, properties, ..Connect::with_key(V5, key) }
}

/// The reason of the CONNACK.
fn connected(gateway: &Gateway, connect: &Connect) -> (Wire, u8) {
    let mut wire = Wire::open(gateway.mqtt);
    wire.send(&connect.packet());
    let reason = wire.packet(CONNACK).reason();
    (wire, reason)
}

fn granted(wire: &mut Wire, filters: &[&str]) -> Vec<u8> {
    wire.send(&subscribe(V5, 9, filters));
    wire.packet(SUBACK).codes(V5)
}

/// Messages of one byte as one request of lines.
fn post_many(gateway: &Gateway, source: &Source, topic: &str, messages: usize) -> u16 {
    let (path, body) = (format!("/v1/ingest/{}/{topic}", source.id), "1\n".repeat(messages));
    let headers = [("content-type", "application/x-ndjson")];
    gateway.request("POST", &path, &source.key, &headers, body.as_bytes()).status
}

/// A tenant that does nothing wrong: it publishes to itself, and notes how long each delivery took.
struct Bystander {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Duration>>,
}

impl Bystander {
    fn start(addr: SocketAddr, key: &str) -> Self {
        let mut wire = Wire::login(addr, V5, key);
        assert_eq!(granted(&mut wire, &["steady"]), [1]);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut took = Vec::new();
            while !stopped.load(Ordering::Acquire) {
                let begun = Instant::now();
                wire.send(&Message::new("steady", b"1").packet(V5));
                wire.packet(PUBLISH);
                took.push(begun.elapsed());
                std::thread::sleep(Duration::from_millis(2));
            }
            took.sort_unstable();
            took
        });
        Self { stop, thread }
    }

    /// Asserts that every message came, and soon; prints the figures.
    fn stop(self, during: &str) {
        self.stop.store(true, Ordering::Release);
        let took = self.thread.join().expect("every message came");
        let (last, at) = (took.len() - 1, |part: usize| took[(took.len() - 1) * part / 100]);
        eprintln!("{during}: {last} deliveries, p50 {:?}, p99 {:?}, max {:?}", at(50), at(99), took[last]);
        assert!(took[last] < DISTURBED_MAX, "{during}: a delivery took {:?}", took[last]);
    }
}

/// Asserts that a key dies soon.
fn revoke_soon(gateway: &Gateway, source: &Source, during: &str) {
    let path = format!("/v1/datasources/{}/keys/{}", source.id, source.key_id);
    let begun = Instant::now();
    let answer = gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]);
    eprintln!("{during}: a revocation took {:?}", begun.elapsed());
    assert_eq!(answer.status, 204, "{}", answer.text());
    assert!(begun.elapsed() < DISTURBED_MAX, "{during}: a revocation took {:?}", begun.elapsed());
}

/// 1,024 filters that all match [`DEEP_TOPIC`].
fn overlapping_filters() -> Vec<String> {
    let level = |bits: usize, level: usize| if bits >> level & 1 == 0 { "a" } else { "+" };
    (0..1024).map(|bits| (0..10).map(|n| level(bits, n)).collect::<Vec<_>>().join("/")).collect()
}

const DEEP_TOPIC: &str = "a/a/a/a/a/a/a/a/a/a";

/// Subscribes to all of them, in four requests with an identifier each.
fn subscribe_overlapping(wire: &mut Wire) {
    let filters = overlapping_filters();
    for (id, some) in (1_u8..).zip(filters.chunks(256)) {
        let some: Vec<(&str, u8)> = some.iter().map(|filter| (&**filter, u8::from(id == 4))).collect();
        wire.send(&subscribe_with(V5, u16::from(id), &some, &[SUBSCRIPTION_ID, id]));
        assert!(wire.packet(SUBACK).codes(V5).iter().all(|code| *code <= 1));
    }
}

#[test]
fn overlapping_filters_cost_one_delivery_and_leave_others_theirs() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (attacker, other) = (gateway.create_open("attacker"), gateway.create_open("other"));
    let doomed = gateway.create_open("doomed");
    let mut sessions: Vec<Wire> = (0..4).map(|_| Wire::login(gateway.mqtt, V5, &attacker.key)).collect();
    sessions.iter_mut().for_each(subscribe_overlapping);
    let bystander = Bystander::start(gateway.mqtt, &other.key);
    for _ in 0..3 {
        assert_eq!(post_many(&gateway, &attacker, DEEP_TOPIC, 100_000), 200);
    }
    revoke_soon(&gateway, &doomed, "overlapping filters");
    // What comes out is what MQTT says: each record once, at the highest QoS, with every identifier.
    for session in &mut sessions {
        for _ in 0..20 {
            let message = Message::read(V5, &session.packet(PUBLISH));
            assert_eq!((message.topic.as_str(), message.qos), (DEEP_TOPIC, 1));
            let ids = message.subscription_ids();
            let of_each = [1, 2, 3, 4].map(|id| ids.iter().filter(|other| **other == id).count());
            assert_eq!(of_each, [256; 4]);
        }
    }
    bystander.stop("overlapping filters");
    ResidentMemory::of(&gateway).assert_bounded("overlapping filters");
}

#[test]
fn subscribers_that_do_not_read_cost_a_bounded_memory_however_many_they_are() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (attacker, other) = (gateway.create_open("attacker"), gateway.create_open("other"));
    let (mut live, mut behind) = (Vec::new(), Vec::new());
    let body = vec![b'x'; 1 << 20];
    let path = format!("/v1/ingest/{}/t", attacker.id);
    let bystander = Bystander::start(gateway.mqtt, &other.key);
    // Each stops reading at another place of the log, so that what one holds is no other's.
    for n in 0..200 {
        let mut wire = Wire::login(gateway.mqtt, V5, &attacker.key);
        assert_eq!(granted(&mut wire, &["#", "+", "t"]), [1; 3]);
        live.push(wire);
        assert_eq!(gateway.request("POST", &path, &attacker.key, &[], &body).status, 200);
        if n % 2 == 0 {
            let mut wire = Wire::login(gateway.mqtt, V5, &attacker.key);
            let from = user_property("from-offset", &(n / 2).to_string());
            wire.send(&subscribe_with(V5, 1, &[("#", 1)], &from));
            behind.push(wire);
        }
    }
    bystander.stop("subscribers that do not read");
    ResidentMemory::of(&gateway).assert_bounded("subscribers that do not read");
    // The others make room when they go, and who reads gets everything.
    let mut reading: Vec<Wire> = live.drain(170..173).collect();
    reading.extend(behind.split_off(behind.len() - 3));
    drop((live, behind));
    let mut again = Wire::login(gateway.mqtt, V5, &attacker.key);
    again.send(&subscribe_with(V5, 1, &[("#", 1)], &user_property("from-offset", "100")));
    reading.push(again);
    let last = reading.len() - 1;
    for (nth, wire) in reading.iter_mut().enumerate() {
        let mut read = 0;
        while read < 20 {
            match wire.next() {
                Next::Packet(frame) if frame.kind() == PUBLISH => {
                    assert_eq!(Message::read(V5, &frame).payload.len() / body.len() * body.len(), body.len());
                    read += 1;
                }
                Next::Packet(frame) if frame.kind() == SUBACK => assert_eq!(frame.codes(V5), [1]),
                // It stood in the way of others for too long, on a slow machine.
                Next::Closed if nth < last => break,
                other => panic!("{other:?}"),
            }
        }
    }
    ResidentMemory::of(&gateway).assert_bounded("subscribers that read again");
}

/// Clients that read nothing kept the room for output for 30 s, and the memory of their key: nobody else of their
/// datasource was sent anything meanwhile, nor read from.
#[test]
fn clients_that_do_not_read_leave_deliveries_and_acks_to_others_of_their_datasource() {
    for payload_bytes in [40_000, 900_000] {
        let dir = scratch();
        let gateway = Gateway::start(dir.path());
        let source = gateway.create_open("press-4");
        let deaf: Vec<Wire> = (0..200)
            .map(|_| {
                let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
                assert_eq!(granted(&mut wire, &["#"]), [1]);
                wire
            })
            .collect();
        let payload = vec![b'x'; payload_bytes];
        let mut writer = Wire::login(gateway.mqtt, V5, &source.key);
        let fills = u16::try_from(6_000_000 / payload_bytes).expect("few");
        for id in 1..=fills {
            assert_eq!(writer.publish(V5, id, "spindle", &payload), 0);
        }
        let mut reader = Wire::login(gateway.mqtt, V5, &source.key);
        assert_eq!(granted(&mut reader, &["last/#"]), [1]);
        let began = Instant::now();
        for n in 0..10 {
            assert_eq!(writer.publish(V5, 1_000 + n, "last/words", &payload), 0);
            match reader.next_within(Duration::from_secs(15)) {
                Next::Packet(frame) if frame.kind() == PUBLISH => {
                    assert_eq!(Message::read(V5, &frame).payload.len(), payload_bytes);
                }
                other => panic!("{payload_bytes} bytes, delivery {n}: {other:?}"),
            }
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{payload_bytes} bytes: {:?}", began.elapsed());
        drop(deaf);
    }
}

#[test]
fn searches_of_the_log_leave_others_the_threads_and_end_with_their_clients() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (attacker, other) = (gateway.create_open("attacker"), gateway.create_open("other"));
    for _ in 0..8 {
        assert_eq!(post_many(&gateway, &attacker, "t", 100_000), 200);
    }
    let bystander = Bystander::start(gateway.mqtt, &other.key);
    // `tail` of a topic that nobody has published to reads the whole log.
    let mut searching: Vec<Wire> = (0..520)
        .map(|_| {
            let mut wire = Wire::login(gateway.mqtt, V5, &attacker.key);
            let filters: Vec<String> = (0..100).map(|n| format!("never/{n}")).collect();
            let filters: Vec<(&str, u8)> = filters.iter().map(|filter| (&**filter, 1)).collect();
            wire.send(&subscribe_with(V5, 1, &filters, &user_property("tail", "1000000")));
            wire
        })
        .collect();
    // Who is one too many is told which bound it is.
    let refused =
        searching.iter_mut().rev().find_map(|wire| match wire.next_within(Duration::from_secs(2)) {
            Next::Packet(frame) => Some(frame),
            _ => None,
        });
    assert!(refused.expect("an answer").codes(V5).contains(&TOO_MUCH));
    assert_eq!(newest_refusal(&gateway, &attacker.id).0, "replays");
    revoke_soon(&gateway, &gateway.create_open("doomed"), "searches of the log");
    drop(searching);
    // The share is free again, long before all of that would have been searched.
    wait_for("room for another search", || {
        let mut wire = Wire::login(gateway.mqtt, V5, &attacker.key);
        wire.send(&subscribe_with(V5, 1, &[("t", 1)], &user_property("tail", "1")));
        matches!(wire.next_within(Duration::from_secs(5)), Next::Packet(frame) if frame.codes(V5) == [1])
            .then_some(())
    });
    bystander.stop("searches of the log");
    ResidentMemory::of(&gateway).assert_bounded("searches of the log");
}

#[test]
fn sessions_are_counted_for_each_datasource_and_one_too_many_is_refused_by_name() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (one, other) = (gateway.create_open("one"), gateway.create_open("other"));
    set_limits(&gateway, "one", &json!({ "sessions": 2 }));
    let (first, _second) =
        (connected(&gateway, &staying(&one.key, "a")), connected(&gateway, &staying(&one.key, "b")));
    assert_eq!(first.1, 0);
    let (_, refused) = connected(&gateway, &staying(&one.key, "c"));
    assert_eq!(refused, TOO_MUCH);
    assert_eq!(newest_refusal(&gateway, "one"), ("limit_sessions".to_owned(), 2));
    // Neither a session that ends with its connection nor another tenant's is counted; who is back is not new.
    Wire::login(gateway.mqtt, V5, &one.key);
    assert_eq!(connected(&gateway, &staying(&other.key, "c")).1, 0);
    assert_eq!(connected(&gateway, &staying(&one.key, "a")).1, 0, "it takes its own session over");
    // A clean start that is not to stay ends a session, which makes room for another.
    let ends = Connect { clean: true, properties: Vec::new(), ..staying(&one.key, "a") };
    assert_eq!(connected(&gateway, &ends).1, 0);
    wait_for("room for a session", || (connected(&gateway, &staying(&one.key, "c")).1 == 0).then_some(()));
    // A SUBACK says that the session is on the disk.
    let (mut wire, _) = Wire::connect(gateway.mqtt, &staying(&one.key, "c"));
    assert_eq!(granted(&mut wire, &["x"]), [1]);
    // After a kill they are there and counted, and stay whatever the limit is by now.
    set_limits(&gateway, "one", &json!({ "sessions": 1 }));
    gateway.kill();
    let gateway = Gateway::start(dir.path());
    for client in ["b", "c"] {
        let (mut wire, _) = Wire::connect(gateway.mqtt, &staying(&one.key, client));
        assert_eq!(granted(&mut wire, &["x"]), [1]);
    }
    assert_eq!(connected(&gateway, &staying(&one.key, "d")).1, TOO_MUCH);
    set_limits(&gateway, "one", &json!({ "sessions": null }));
    assert_eq!(connected(&gateway, &staying(&one.key, "d")).1, 0, "the default has room");
}

#[test]
fn subscriptions_groups_and_keys_are_counted_and_one_too_many_is_refused_by_name() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let one = gateway.create_open("one");
    set_limits(&gateway, "one", &json!({ "subscriptions": 3, "share_groups": 1, "keys": 2 }));
    let (mut first, mut second) =
        (Wire::login(gateway.mqtt, V5, &one.key), Wire::login(gateway.mqtt, V5, &one.key));
    assert_eq!(granted(&mut first, &["a", "b"]), [1, 1]);
    assert_eq!(granted(&mut second, &["a", "b"]), [1, TOO_MUCH]);
    assert_eq!(newest_refusal(&gateway, "one"), ("limit_subscriptions".to_owned(), 3));
    assert_eq!(granted(&mut first, &["a"]), [1], "it is there already");
    first.send(&unsubscribe(V5, 3, &["b"]));
    first.next();
    assert_eq!(granted(&mut second, &["b"]), [1]);
    // What a connection had is free once it has gone.
    drop(second);
    wait_for("room for subscriptions", || (granted(&mut first, &["c", "d"]) == [1, 1]).then_some(()));
    first.send(&unsubscribe(V5, 3, &["a", "c", "d"]));
    first.next();
    assert_eq!(granted(&mut first, &["$share/g/x", "$share/h/x"]), [1, TOO_MUCH]);
    assert_eq!(newest_refusal(&gateway, "one"), ("limit_share_groups".to_owned(), 1));
    first.send(&unsubscribe(V5, 3, &["$share/g/x"]));
    first.next();
    assert_eq!(granted(&mut first, &["$share/h/x"]), [1]);
    set_limits(&gateway, "one", &json!({ "subscription_bytes": 10_000 }));
    let long = "long/".repeat(200);
    assert_eq!(granted(&mut first, &[&long]), [TOO_MUCH]);
    assert_eq!(newest_refusal(&gateway, "one"), ("limit_subscription_bytes".to_owned(), 10_000));

    let (path, admin) = ("/v1/datasources/one/keys", gateway.admin_key());
    let key = gateway.post(path, &admin, &json!({}));
    assert_eq!(key.status, 201, "{}", key.text());
    let refused = gateway.post(path, &admin, &json!({}));
    assert_eq!(refused.status, 422);
    assert_eq!(
        (refused.json()["limit_name"].as_str(), refused.json()["limit"].as_u64()),
        (Some("keys"), Some(2))
    );
    let id = key.json()["key"]["id"].as_str().expect("an id").to_owned();
    assert_eq!(gateway.request("DELETE", &format!("{path}/{id}"), &admin, &[], &[]).status, 204);
    assert_eq!(gateway.post(path, &admin, &json!({})).status, 201, "a dead key is not counted");
    let of_key = json!({ "limits": { "sessions": 1 } });
    assert_eq!(gateway.post(path, &admin, &of_key).status, 400, "only datasources have it");
}

#[test]
fn retained_topics_are_counted_and_one_too_many_is_refused_by_name() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let one = gateway.create_open("one");
    set_limits(&gateway, "one", &json!({ "retained_topics": 2 }));
    let mut wire = Wire::login(gateway.mqtt, V5, &one.key);
    let retain = |wire: &mut Wire, topic: &str, payload: &[u8]| {
        wire.send(&Message::new(topic, payload).at(1, 7).retained().packet(V5));
        wire.packet(PUBACK).reason()
    };
    assert_eq!((retain(&mut wire, "a", b"1"), retain(&mut wire, "b", b"1")), (0, 0));
    assert_eq!(retain(&mut wire, "c", b"1"), TOO_MUCH);
    assert_eq!(newest_refusal(&gateway, "one"), ("limit_retained_topics".to_owned(), 2));
    assert_eq!(retain(&mut wire, "a", b"2"), 0, "a topic that is there may change");
    gateway.kill();
    let gateway = Gateway::start(dir.path());
    // Who is sent them knows that the gateway has read its log up to there.
    let mut subscriber = Wire::login(gateway.mqtt, V5, &one.key);
    assert_eq!(granted(&mut subscriber, &["#"]), [1]);
    (0..2).for_each(|_| drop(subscriber.packet(PUBLISH)));
    let mut wire = Wire::login(gateway.mqtt, V5, &one.key);
    assert_eq!(retain(&mut wire, "c", b"1"), TOO_MUCH, "they are counted after a kill");
    assert_eq!(retain(&mut wire, "b", b""), 0, "and one that is cleared makes room");
    wait_for("room for a topic", || (retain(&mut wire, "c", b"1") == 0).then_some(()));
}

#[test]
fn many_long_filters_of_many_sessions_are_refused_before_they_fill_memory_and_disk() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let attacker = gateway.create_open("attacker");
    let mut refused = 0;
    for session in 0..40 {
        let (mut wire, _) = Wire::connect(gateway.mqtt, &staying(&attacker.key, &format!("s{session}")));
        for part in 0..8 {
            let filters: Vec<String> =
                (0..128).map(|n| format!("{session}/{part}/{n}/{}", "x".repeat(1_000))).collect();
            let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
            refused += granted(&mut wire, &filters).iter().filter(|code| **code == TOO_MUCH).count();
        }
    }
    assert!(refused > 20_000, "{refused} were refused");
    ResidentMemory::of(&gateway).assert_bounded("long filters");
    assert_eq!(gateway.stop().status.code(), Some(0));
    let bytes = std::fs::metadata(dir.path().join("sessions.db")).expect("it is there").len();
    assert!(bytes < 64 << 20, "sessions.db has {bytes} bytes");
}
