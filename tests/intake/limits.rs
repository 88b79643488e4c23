//! Limits of keys and datasources, from the outside: what holds a client back, what refuses it, what it
//! is told, and that a change holds at once.

use std::time::{Duration, Instant};

use crate::common::wire::{CONNACK, Connect, Next, PUBACK, REASON_STRING, VERSIONS, Version, Wire, publish};
use crate::common::{Answer, Gateway, PATIENCE, Setup, Source, scratch, wait_for};
use Version::{V5, V311};
use serde_json::{Value, json};

/// A datasource with these limits.
fn limited(gateway: &Gateway, id: &str, limits: Value) -> Source {
    let body = json!({ "id": id, "name": id, "limits": limits });
    let answer = gateway.post("/v1/datasources", &gateway.admin_key(), &body);
    assert_eq!(answer.status, 201, "{}", answer.text());
    let json = answer.json();
    let text = |pointer: &str| json.pointer(pointer).and_then(Value::as_str).expect(pointer).to_owned();
    Source { id: text("/datasource/id"), key_id: text("/key/id"), key: text("/key/secret") }
}

fn patch(gateway: &Gateway, path: &str, limits: Value) -> Answer {
    let body = json!({ "limits": limits }).to_string();
    let headers = [("content-type", "application/json")];
    gateway.request("PATCH", path, &gateway.admin_key(), &headers, body.as_bytes())
}

fn patch_datasource(gateway: &Gateway, source: &Source, limits: Value) -> Value {
    let answer = patch(gateway, &format!("/v1/datasources/{}", source.id), limits);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

fn patch_key(gateway: &Gateway, source: &Source, limits: Value) -> Value {
    let answer = patch(gateway, &format!("/v1/datasources/{}/keys/{}", source.id, source.key_id), limits);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

fn post(gateway: &Gateway, source: &Source, body: &Value) -> Answer {
    gateway.post(&format!("/v1/ingest/{}", source.id), &source.key, body)
}

/// How many records of a datasource were kept.
fn kept(gateway: &Gateway, id: &str) -> usize {
    gateway.settle();
    gateway.records(id).len()
}

/// The reason string of a refusal has to hold all of these.
fn tells(words: Option<String>, parts: &[&str]) {
    let words = words.expect("a reason string");
    assert!(parts.iter().all(|part| words.contains(part)), "{words}");
}

#[test]
fn a_rate_over_http_is_refused_with_the_limit_and_the_wait() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = limited(&gateway, "press-4", json!({ "messages_per_s": { "max": 1, "burst": 3 } }));
    let first = post(&gateway, &source, &json!([1, 2]));
    assert_eq!(first.status, 200, "{}", first.text());
    assert_eq!(first.headers["x-ratelimit-limit"], "3");
    assert_eq!(first.headers["x-ratelimit-remaining"], "1");
    assert_eq!(first.headers["x-ratelimit-reset"], "2");

    let over = post(&gateway, &source, &json!([3, 4, 5]));
    assert_eq!(over.status, 429, "{}", over.text());
    let seconds: u64 = over.headers["retry-after"].parse().expect("whole seconds");
    assert!((1..=2).contains(&seconds), "{seconds}");
    assert_eq!(over.headers["x-ratelimit-limit"], "3");
    let problem = over.json();
    assert_eq!(problem["type"], "/problems/too_many_requests");
    assert_eq!((&problem["limit"], &problem["limit_name"]), (&json!(1), &json!("messages_per_s")));
    assert_eq!(problem["limit_of"], "datasource press-4");
    assert_eq!(problem["retry_after_seconds"], seconds);
    assert_eq!(kept(&gateway, "press-4"), 2, "nothing of it is kept");
    // Nothing was taken for what was refused.
    wait_for("its time to come", || (post(&gateway, &source, &json!([3, 4, 5])).status == 200).then_some(()));
    assert_eq!(kept(&gateway, "press-4"), 5);
    let free = gateway.create("free");
    assert!(!post(&gateway, &free, &json!(1)).headers.contains_key("x-ratelimit-limit"));
}

#[test]
fn a_request_of_more_messages_than_the_burst_is_let_in_when_nothing_is_used() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = limited(&gateway, "press-4", json!({ "messages_per_s": { "max": 1, "burst": 2 } }));
    let many = post(&gateway, &source, &json!([1, 2, 3, 4, 5]));
    assert_eq!((many.status, many.headers["x-ratelimit-remaining"].as_str()), (200, "0"));
    let over = post(&gateway, &source, &json!(6));
    assert_eq!(over.status, 429);
    let seconds: u64 = over.headers["retry-after"].parse().expect("whole seconds");
    assert!((3..=4).contains(&seconds), "what was over the burst is owed: {seconds}");
}

#[test]
fn an_mqtt_client_is_held_back_and_loses_nothing_while_others_are_served() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let free = gateway.create("free");
    for version in VERSIONS {
        let id = if version == V5 { "five" } else { "four" };
        let source = limited(&gateway, id, json!({ "messages_per_s": { "max": 40, "burst": 10 } }));
        let mut wire = Wire::login(gateway.mqtt, version, &source.key);
        let began = Instant::now();
        let all: Vec<u8> =
            (1..=50).flat_map(|n| publish(version, n, "t", n.to_string().as_bytes())).collect();
        wire.send(&all);
        // While that one waits, another one's message is not kept waiting.
        let mut other = Wire::login(gateway.mqtt, version, &free.key);
        assert_eq!(other.publish(version, 1, "t", b"x"), 0);
        assert!(began.elapsed() < Duration::from_millis(900), "{:?}", began.elapsed());
        for n in 1..=50 {
            let puback = wire.packet(PUBACK);
            assert_eq!((puback.packet_id(), puback.reason()), (n, 0));
        }
        let took = began.elapsed();
        assert!(took >= Duration::from_secs(1), "40 over the burst at 40 a second: {took:?}");
        let payloads: Vec<_> = gateway.stored(id, 50).iter().map(|r| r["payload"].to_string()).collect();
        assert_eq!(payloads, (1..=50).map(|n| n.to_string()).collect::<Vec<_>>());
    }
    assert!(gateway.metric("headgate_held_back_total") > 0.0);
}

#[test]
fn who_is_held_back_for_too_long_is_disconnected_without_an_ack_and_told_how_long() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("intake.hold_back_ms_max", 300).start();
    for version in VERSIONS {
        let id = if version == V5 { "five" } else { "four" };
        let source = limited(&gateway, id, json!({ "messages_per_s": { "max": 1, "burst": 1 } }));
        let mut wire = Wire::login(gateway.mqtt, version, &source.key);
        let began = Instant::now();
        wire.send(&[publish(version, 1, "t", b"1"), publish(version, 2, "t", b"2")].concat());
        assert_eq!(wire.packet(PUBACK).packet_id(), 1);
        if version == V5 {
            let goodbye = wire.disconnected(0x96);
            let parts = ["messages_per_s", "1", "datasource five", "wait"];
            tells(goodbye.text(REASON_STRING), &parts);
        } else {
            wire.closed();
        }
        assert!(began.elapsed() >= Duration::from_millis(300), "it is held back first");
        assert_eq!(kept(&gateway, id), 1);
    }
    let refused = "headgate_refused_total{transport=\"mqtt\",cause=\"limit_messages_per_s\"}";
    assert!((gateway.metric(refused) - 2.0).abs() < 0.5);
}

#[test]
fn a_rate_that_rejects_says_no_to_the_message_alone_in_mqtt_5() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let rate = json!({ "messages_per_s": { "max": 1, "burst": 1, "policy": "reject" } });
    let five = limited(&gateway, "five", rate.clone());
    let mut wire = Wire::login(gateway.mqtt, V5, &five.key);
    wire.send(&[publish(V5, 1, "t", b"1"), publish(V5, 2, "t", b"2"), publish(V5, 0, "t", b"3")].concat());
    assert_eq!(wire.packet(PUBACK).reason(), 0);
    let no = wire.packet(PUBACK);
    assert_eq!((no.packet_id(), no.reason()), (2, 0x97));
    tells(no.text(REASON_STRING), &["messages_per_s 1", "datasource five", "wait"]);
    // The connection goes on.
    wait_for("its time to come", || (wire.publish(V5, 3, "t", b"4") == 0).then_some(()));

    let four = limited(&gateway, "four", rate);
    let mut wire = Wire::login(gateway.mqtt, V311, &four.key);
    wire.send(&[publish(V311, 1, "t", b"1"), publish(V311, 2, "t", b"2")].concat());
    assert_eq!(wire.packet(PUBACK).packet_id(), 1);
    wire.closed();
    assert_eq!(kept(&gateway, "four"), 1);
}

#[test]
fn a_change_frees_who_is_held_back() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("intake.hold_back_ms_max", 60_000).start();
    let source = limited(&gateway, "press-4", json!({ "messages_per_s": { "max": 1, "burst": 1 } }));
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    let began = Instant::now();
    wire.send(&(1..=40).flat_map(|n| publish(V5, n, "t", b"x")).collect::<Vec<u8>>());
    assert_eq!(wire.packet(PUBACK).packet_id(), 1);
    patch_datasource(&gateway, &source, Value::Null);
    for n in 2..=40 {
        assert_eq!(wire.packet(PUBACK).packet_id(), n);
    }
    assert!(began.elapsed() < Duration::from_secs(20), "at 1 a second it takes 39: {:?}", began.elapsed());
}

#[test]
fn a_key_that_is_revoked_while_it_is_held_back_loses_its_connection_at_once() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("intake.hold_back_ms_max", 60_000).start();
    let source = limited(&gateway, "press-4", json!({ "messages_per_s": { "max": 1, "burst": 1 } }));
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    wire.send(&(1..=60).flat_map(|n| publish(V5, n, "t", b"x")).collect::<Vec<u8>>());
    assert_eq!(wire.packet(PUBACK).packet_id(), 1);
    let path = format!("/v1/datasources/press-4/keys/{}", source.key_id);
    let began = Instant::now();
    assert_eq!(gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]).status, 204);
    let ended = loop {
        match wire.next() {
            Next::Packet(frame) if frame.kind() == PUBACK => {}
            other => break other,
        }
    };
    assert!(matches!(ended, Next::Packet(frame) if frame.reason() == 0x98));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[test]
fn the_limits_of_a_key_and_of_its_datasource_both_hold() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = limited(&gateway, "press-4", json!({ "bytes_per_s": { "max": 1, "burst": 10 } }));
    patch_key(&gateway, &source, json!({ "messages_per_s": { "max": 1, "burst": 2 } }));
    for _ in 0..2 {
        assert_eq!(post(&gateway, &source, &json!(1)).status, 200);
    }
    let over = post(&gateway, &source, &json!(1)).json();
    assert_eq!(over["limit_of"], format!("API key {}", source.key_id));

    // Another key of the datasource has no limit of its own, and shares the datasource's.
    let body = json!({ "label": "second" });
    let created = gateway.post("/v1/datasources/press-4/keys", &gateway.admin_key(), &body).json();
    let key = created["key"]["secret"].as_str().expect("a secret").to_owned();
    let second = Source { key, ..source };
    let answers: Vec<_> = (0..9).map(|_| post(&gateway, &second, &json!(1))).collect();
    let refused = answers.iter().find(|answer| answer.status == 429).expect("9 bytes do not fit into 8");
    assert_eq!(refused.json()["limit_of"], "datasource press-4");
    assert_eq!(refused.json()["limit_name"], "bytes_per_s");
}

#[test]
fn a_payload_over_the_limit_is_too_large() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = limited(&gateway, "press-4", json!({ "payload_bytes": 4 }));
    let post = |body: &[u8]| {
        let headers = [("content-type", "application/octet-stream")];
        gateway.request("POST", "/v1/ingest/press-4", &source.key, &headers, body)
    };
    assert_eq!(post(b"1234").status, 200, "at the limit");
    let over = post(b"12345");
    assert_eq!((over.status, &over.json()["limit_name"]), (413, &json!("payload_bytes")));
    for version in VERSIONS {
        let mut wire = Wire::login(gateway.mqtt, version, &source.key);
        assert_eq!(wire.publish(version, 1, "t", b"1234"), 0);
        wire.send(&publish(version, 2, "t", b"12345"));
        match version {
            V5 => tells(wire.disconnected(0x95).text(REASON_STRING), &["payload_bytes 4"]),
            V311 => wire.closed(),
        }
    }
}

#[test]
fn a_topic_too_many_is_refused_and_those_that_were_let_in_stay() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = limited(&gateway, "press-4", json!({ "topics": 2 }));
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    for (id, topic, reason) in [(1, "a", 0), (2, "b", 0), (3, "c", 0x97), (4, "a", 0), (5, "d", 0x97)] {
        assert_eq!(wire.publish(V5, id, topic, b"x"), reason, "{topic}");
    }
    let post = |topic: &str| gateway.post(&format!("/v1/ingest/press-4/{topic}"), &source.key, &json!(1));
    assert_eq!(post("b").status, 200);
    let over = post("c");
    assert_eq!((over.status, &over.json()["type"]), (422, &json!("/problems/over_limit")));
    assert_eq!(over.json()["limit_name"], "topics");
    patch_datasource(&gateway, &source, json!({ "topics": 3 }));
    assert_eq!(post("c").status, 200, "counting begins anew with a change");
}

#[test]
fn a_connection_too_many_is_refused_and_one_that_comes_again_is_not() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    patch_key(&gateway, &source, json!({ "connections": 2 }));
    let named = |version, name: &str| Connect {
        client_id: name.to_owned(),
        ..Connect::with_key(version, &source.key)
    };
    let (_first, _) = Wire::connect(gateway.mqtt, &named(V5, "one"));
    let (second, _) = Wire::connect(gateway.mqtt, &named(V5, "two"));
    for version in VERSIONS {
        let mut third = Wire::open(gateway.mqtt);
        third.send(&named(version, "three").packet());
        let connack = third.packet(CONNACK);
        match version {
            V5 => {
                assert_eq!(connack.reason(), 0x97);
                tells(connack.text(REASON_STRING), &["connections 2", &source.key_id]);
            }
            V311 => assert_eq!(connack.reason(), 3),
        }
        third.closed();
    }
    // Over HTTP too.
    let refused = post(&gateway, &source, &json!(1));
    assert_eq!((refused.status, refused.json()["limit_name"].as_str()), (429, Some("connections")));
    // The same client again takes the place of its earlier connection.
    let (_first, _) = Wire::connect(gateway.mqtt, &named(V5, "one"));
    drop(second);
    wait_for("the place of the one that left", || {
        let mut third = Wire::open(gateway.mqtt);
        third.send(&named(V5, "three").packet());
        (third.packet(CONNACK).reason() == 0).then_some(())
    });
}

#[test]
fn limits_are_shown_patched_and_kept_over_a_restart() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = limited(&gateway, "press-4", json!({ "messages_per_s": 100, "topics": 7 }));
    let rate = json!({ "max": 100, "burst": 100, "policy": "hold_back" });
    let topics = json!({ "max": 7, "policy": "reject" });
    let shown = || gateway.get("/v1/datasources/press-4", &gateway.admin_key()).json()["limits"].clone();
    assert_eq!(shown(), json!({ "messages_per_s": rate, "topics": topics }));
    let change = json!({ "topics": null, "messages_per_s": { "policy": "reject" } });
    let patched = patch_datasource(&gateway, &source, change);
    let rate = json!({ "max": 100, "burst": 100, "policy": "reject" });
    assert_eq!(patched["limits"], json!({ "messages_per_s": rate }));
    patch_key(&gateway, &source, json!({ "payload_bytes": 3 }));
    gateway.stop();

    let gateway = Gateway::start(dir.path());
    let admin = gateway.admin_key();
    let shown = gateway.get("/v1/datasources/press-4", &admin).json();
    assert_eq!(shown["limits"], json!({ "messages_per_s": rate }));
    let keys = gateway.get("/v1/datasources/press-4/keys", &admin).json();
    assert_eq!(keys["keys"][0]["limits"], json!({ "payload_bytes": { "max": 3, "policy": "reject" } }));
    assert_eq!(post(&gateway, &source, &json!("long")).status, 413, "and they hold");
    // A key may have limits from its beginning.
    let body = json!({ "limits": { "topics": 1 } });
    let created = gateway.post("/v1/datasources/press-4/keys", &admin, &body).json();
    assert_eq!(created["key"]["limits"]["topics"]["max"], 1);
}

#[test]
fn what_is_over_a_limit_that_quarantines_is_kept_there_and_can_be_let_in_later() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let rate = json!({ "max": 1, "burst": 2, "policy": "quarantine" });
    let source = limited(&gateway, "press-4", json!({ "messages_per_s": rate }));
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    let mut over = 0;
    for n in 0..6_u16 {
        wire.send(&publish(V5, n + 1, "a", n.to_string().as_bytes()));
        let puback = wire.packet(PUBACK);
        if puback.reason() != 0 {
            over += 1;
            assert_eq!(puback.reason(), 0x99, "{puback:?}");
            tells(puback.text(REASON_STRING), &["messages_per_s", "quarantine"]);
        }
    }
    assert!(over >= 3, "the burst is 2, and one more a second: {over}");
    let answer = post(&gateway, &source, &json!([{ "n": 6 }, { "n": 7 }, { "n": 8 }]));
    assert_eq!((answer.status, &answer.json()["type"]), (422, &json!("/problems/validation")));
    gateway.settle();
    assert_eq!(kept(&gateway, "press-4"), 6 - over, "nothing of it is among the records");

    patch_datasource(&gateway, &source, json!({ "messages_per_s": null }));
    let path = "/v1/datasources/press-4/quarantine/redrive";
    let answer = gateway.post(path, &gateway.admin_key(), &json!({})).json();
    assert_eq!(answer["redriven"], json!(over + 3), "{answer}");
    gateway.settle();
    assert_eq!(kept(&gateway, "press-4"), 9);
}

#[test]
fn limits_that_cannot_be_set_are_refused_at_their_place_and_change_nothing() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = limited(&gateway, "press-4", json!({ "topics": 7 }));
    for (limits, pointer) in [
        (json!({ "topic": 1 }), "/limits"),
        (json!({ "messages_per_s": 0 }), "/limits/messages_per_s/max"),
        (json!({ "connections": { "max": 1, "policy": "quarantine" } }), "/limits/connections/policy"),
    ] {
        let key_path = format!("/v1/datasources/press-4/keys/{}", source.key_id);
        for path in ["/v1/datasources/press-4", &key_path] {
            let answer = patch(&gateway, path, limits.clone());
            assert_eq!((answer.status, &answer.json()["pointer"]), (400, &json!(pointer)), "{limits}");
        }
        let body = json!({ "id": "other", "name": "other", "limits": limits });
        assert_eq!(gateway.post("/v1/datasources", &gateway.admin_key(), &body).status, 400);
    }
    // What a change may leave out has to be there already, and a new datasource has nothing.
    let no_max = json!({ "messages_per_s": { "policy": "reject" } });
    assert_eq!(patch(&gateway, "/v1/datasources/press-4", no_max.clone()).status, 422);
    let body = json!({ "id": "other", "name": "other", "limits": no_max });
    assert_eq!(gateway.post("/v1/datasources", &gateway.admin_key(), &body).status, 400);
    let shown = gateway.get("/v1/datasources/press-4", &gateway.admin_key()).json();
    assert_eq!(shown["limits"], json!({ "topics": { "max": 7, "policy": "reject" } }));
    assert_eq!(gateway.get("/v1/datasources/other", &gateway.admin_key()).status, 404);
    assert_eq!(patch(&gateway, "/v1/datasources/none", json!({})).status, 404);
    let body = json!({ "limits": {} }).to_string();
    let by_key = gateway.request("PATCH", "/v1/datasources/press-4", &source.key, &[], body.as_bytes());
    assert_eq!(by_key.status, 403, "an ingest key sets no limits");
}

#[test]
fn many_connections_of_one_key_share_its_rate_and_all_get_on() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("intake.hold_back_ms_max", 30_000).start();
    let source = limited(&gateway, "press-4", json!({ "messages_per_s": { "max": 100, "burst": 10 } }));
    let mut wires: Vec<_> = (0..20).map(|_| Wire::login(gateway.mqtt, V311, &source.key)).collect();
    let began = Instant::now();
    for wire in &mut wires {
        wire.send(&(1..=10).flat_map(|n| publish(V311, n, "t", b"x")).collect::<Vec<u8>>());
    }
    for wire in &mut wires {
        for n in 1..=10 {
            assert_eq!(wire.packet(PUBACK).packet_id(), n);
        }
    }
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(1_900), "190 over the burst at 100 a second: {took:?}");
    assert!(took < PATIENCE, "{took:?}");
    assert_eq!(kept(&gateway, "press-4"), 200);
}
