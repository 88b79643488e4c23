//! Quarantine: what is in it reaches no consumer, what is sent again from it comes in once, and what a
//! leaked key let in goes there and comes back.

use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use crate::common::cluster::is_wanted;
use crate::common::stores::{TestStore, in_each_store};
use crate::common::wire::{
    Connect, Message, PUBACK, PUBLISH, RECEIVE_MAXIMUM, SUBACK, Version, Wire, ack, subscribe,
    subscribe_with, two_bytes, user_property,
};
use crate::common::{Answer, Gateway, Source, scratch, wait_for};
use serde_json::{Value, json};

in_each_store! {
    no_consumer_is_given_what_is_in_quarantine,
    what_is_redriven_after_the_schema_is_mended_comes_in_once,
    a_redrive_is_once_across_kills_and_beyond_the_window_of_message_ids,
    redrives_at_the_same_time_let_each_message_in_once_also_when_its_id_is_forgotten,
    a_repeated_message_is_in_quarantine_once_and_comes_out_once,
    a_message_that_was_corrected_is_not_let_in_by_a_later_redrive,
    a_page_of_quarantine_is_chosen_by_topic_and_place_and_ends,
    what_a_leaked_key_let_in_goes_out_of_sight_everywhere_and_comes_back,
    a_leaked_key_is_quarantined_in_the_datasource_that_is_named_and_by_who_may,
    a_slow_subscriber_is_not_given_what_was_withheld_while_it_waited,
}

const PAYLOAD_FORMAT_INVALID: u8 = 0x99;

fn put_schema(gateway: &Gateway, id: &str, schema: &Value) {
    let path = format!("/v1/datasources/{id}/schema");
    let body = json!({ "schema": schema }).to_string();
    let headers = [("content-type", "application/json")];
    let answer = gateway.request("PUT", &path, &gateway.admin_key(), &headers, body.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
}

fn quarantine(gateway: &Gateway, id: &str) -> Vec<Value> {
    let answer = gateway.get(&format!("/v1/datasources/{id}/quarantine?limit=1000"), &gateway.admin_key());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let Value::Array(records) = answer.json()["records"].take() else { panic!("{}", answer.text()) };
    records
}

fn redrive(gateway: &Gateway, id: &str, what: &Value) -> Value {
    let answer =
        gateway.post(&format!("/v1/datasources/{id}/quarantine/redrive"), &gateway.admin_key(), what);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

fn leak(gateway: &Gateway, id: &str, key_id: &str, body: &Value) -> Answer {
    gateway.post(&format!("/v1/datasources/{id}/keys/{key_id}/quarantine"), &gateway.admin_key(), body)
}

/// A key of a datasource with one scope: id and secret.
fn key(gateway: &Gateway, id: &str, scope: &str) -> (String, String) {
    let answer = gateway.post(
        &format!("/v1/datasources/{id}/keys"),
        &gateway.admin_key(),
        &json!({ "scopes": [scope] }),
    );
    assert_eq!(answer.status, 201, "{}", answer.text());
    let key = answer.json()["key"].take();
    let text = |name: &str| key[name].as_str().expect("text").to_owned();
    (text("id"), text("secret"))
}

/// Subscribes to everything, from the oldest record there is, and says how far that goes: by a last
/// message with the payload `"end"`.
fn all_that_is_given(gateway: &Gateway, subscriber: &str, publisher: &str) -> Vec<Message> {
    let mut wire = Wire::login(gateway.mqtt, Version::V5, subscriber);
    wire.send(&subscribe_with(Version::V5, 1, &[("#", 1)], &user_property("from-offset", "0")));
    wire.packet(SUBACK);
    let mut sender = Wire::login(gateway.mqtt, Version::V5, publisher);
    assert_eq!(sender.publish(Version::V5, 1, "end", b"\"end\""), 0);
    let mut given = Vec::new();
    loop {
        let message = Message::read(Version::V5, &wire.packet(PUBLISH));
        if message.qos > 0 {
            wire.send(&ack(PUBACK, message.packet_id));
        }
        if message.topic == "end" && !message.retain {
            return given;
        }
        given.push(message);
    }
}

fn payloads(records: &[Value]) -> Vec<String> {
    records.iter().map(|record| record["payload"].to_string()).collect()
}

/// A datasource that takes numbers alone, and has refused some strings.
fn with_refused(store: TestStore, dir: &Path) -> (Gateway, Source) {
    let gateway = store.start(dir);
    let source = gateway.create("press-4");
    put_schema(&gateway, "press-4", &json!({"type": "number"}));
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    for id in 1..=6_u16 {
        let good = id % 2 == 0;
        let payload = if good { format!("{id}") } else { format!("\"{id}\"") };
        let reason = wire.publish(Version::V5, id, &format!("t/{id}"), payload.as_bytes());
        assert_eq!(reason, if good { 0 } else { PAYLOAD_FORMAT_INVALID });
    }
    gateway.settle();
    (gateway, source)
}

fn no_consumer_is_given_what_is_in_quarantine(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let source = gateway.create("press-4");
    put_schema(&gateway, "press-4", &json!({"type": ["number", "string"], "maxLength": 3}));
    let (_, subscriber) = key(&gateway, "press-4", "subscribe");
    let mut live = Wire::login(gateway.mqtt, Version::V5, &subscriber);
    live.send(&subscribe_with(Version::V5, 1, &[("#", 1), ("$share/g/#", 1)], &[]));
    live.packet(SUBACK);

    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    for (id, payload) in [(1, "1"), (2, "\"refused\""), (3, "3"), (4, "{}")] {
        wire.send(&Message::new("t", payload).at(1, id).retained().packet(Version::V5));
        let refused = if id % 2 == 0 { PAYLOAD_FORMAT_INVALID } else { 0 };
        assert_eq!(wire.packet(PUBACK).reason(), refused);
    }
    // Live, by itself and in the group: each in the log's order, and either may be first.
    let mut given: Vec<_> = (0..4)
        .map(|_| {
            let message = Message::read(Version::V5, &live.packet(PUBLISH));
            live.send(&ack(PUBACK, message.packet_id));
            String::from_utf8_lossy(&message.payload).into_owned()
        })
        .collect();
    given.sort();
    assert_eq!(given, ["1", "1", "3", "3"]);
    // From the past, and retained.
    let given = all_that_is_given(&gateway, &subscriber, &source.key);
    let mut given: Vec<_> =
        given.iter().map(|m| (m.retain, String::from_utf8_lossy(&m.payload).into_owned())).collect();
    given.sort();
    given.dedup();
    assert!(given.iter().all(|(_, payload)| ["1", "3"].contains(&payload.as_str())), "{given:?}");
    assert!(given.len() >= 2, "{given:?}");
    // Stored, and the newest.
    gateway.settle();
    assert_eq!(payloads(&gateway.records("press-4")), ["1", "3", "\"end\""]);
    let latest = gateway.get("/v1/datasources/press-4/latest", &subscriber).json();
    let topics = latest["topics"].as_array().expect("topics");
    let of_t = topics.iter().find(|topic| topic["topic"] == "t").expect("there");
    assert_eq!(of_t["payload"], 3);
    assert_eq!(quarantine(&gateway, "press-4").len(), 2);
}

fn what_is_redriven_after_the_schema_is_mended_comes_in_once(store: TestStore) {
    let dir = scratch();
    let (gateway, source) = with_refused(store, dir.path());
    let held = quarantine(&gateway, "press-4");
    assert_eq!(payloads(&held), ["\"1\"", "\"3\"", "\"5\""]);

    // Not mended yet: nothing comes in, and each says why.
    let answer = redrive(&gateway, "press-4", &json!({}));
    assert_eq!((&answer["redriven"], &answer["failing"]), (&json!(0), &json!(3)), "{answer}");
    assert_eq!(answer["errors"][0]["offset"], held[0]["offset"]);

    put_schema(&gateway, "press-4", &json!({"type": ["number", "string"]}));
    let answer = redrive(&gateway, "press-4", &json!({"ids": [held[0]["offset"]]}));
    assert_eq!(answer["redriven"], 1, "{answer}");
    let answer = redrive(&gateway, "press-4", &json!({"filter": "t/3"}));
    assert_eq!(answer["redriven"], 1, "{answer}");
    let answer = redrive(&gateway, "press-4", &json!({}));
    assert_eq!((&answer["redriven"], &answer["failing"]), (&json!(1), &json!(0)), "{answer}");
    let answer = redrive(&gateway, "press-4", &json!({}));
    assert_eq!((&answer["redriven"], &answer["duplicates"]), (&json!(0), &json!(0)), "{answer}");

    gateway.settle();
    let records = gateway.records("press-4");
    assert_eq!(payloads(&records), ["2", "4", "6", "\"1\"", "\"3\"", "\"5\""]);
    assert_eq!((&records[3]["topic"], &records[3]["transport"]), (&json!("t/1"), &json!("mqtt")));
    assert_eq!(records[3]["key_id"], json!(source.key_id), "it is of the key that let it in at first");
    let held = quarantine(&gateway, "press-4");
    assert_eq!(held[0]["redriven_offset"], records[3]["offset"]);

    // A subscriber is told where it comes from.
    let (_, subscriber) = key(&gateway, "press-4", "subscribe");
    let given = all_that_is_given(&gateway, &subscriber, &source.key);
    assert_eq!(given.len(), 6);
    assert_eq!(given[3].user("redriven-from"), Some(held[0]["offset"].to_string()));
    assert_eq!(given[3].user("first-received-at").as_deref(), held[0]["received_at"].as_str());
}

fn a_redrive_is_once_across_kills_and_beyond_the_window_of_message_ids(store: TestStore) {
    let dir = scratch();
    let (gateway, _) = with_refused(store, dir.path());
    put_schema(&gateway, "press-4", &json!({"type": ["number", "string"]}));
    assert_eq!(redrive(&gateway, "press-4", &json!({}))["redriven"], 3);
    gateway.kill();
    // A window of a second, which is over when the records are stored and it has been waited for.
    let gateway = store.setup(dir.path()).set("intake.dedup_window_s", 1).change_cluster().start();
    gateway.settle();
    let began = std::time::Instant::now();
    wait_for("the window to be over", || (began.elapsed().as_millis() > 1_500).then_some(()));
    let answer = redrive(&gateway, "press-4", &json!({}));
    assert_eq!((&answer["redriven"], &answer["failing"]), (&json!(0), &json!(0)), "{answer}");
    gateway.settle();
    assert_eq!(gateway.records("press-4").len(), 6);
}

/// The first redrive is not known to storage yet when the next one reads what is in quarantine, and its id is forgotten
/// when that comes to the log.
fn redrives_at_the_same_time_let_each_message_in_once_also_when_its_id_is_forgotten(store: TestStore) {
    const MESSAGES: usize = 300;
    let dir = scratch();
    let setup = store.setup(dir.path());
    // A cluster forgets no id before its time: it refuses those that are too many.
    let setup = if is_wanted() { setup } else { setup.set("intake.dedup_ids_max", 1) };
    let gateway = setup.start();
    let source = gateway.create("press-4");
    put_schema(&gateway, "press-4", &json!({"type": "number"}));
    for n in 0..MESSAGES {
        let body = format!("\"{n}\"");
        let headers = [("content-type", "application/json")];
        let answer = gateway.request("POST", "/v1/ingest/press-4", &source.key, &headers, body.as_bytes());
        assert_eq!(answer.status, 422, "{}", answer.text());
    }
    put_schema(&gateway, "press-4", &json!({"type": ["number", "string"]}));
    let redriven: u64 = std::thread::scope(|scope| {
        let all: Vec<_> = (0..6).map(|_| scope.spawn(|| redrive(&gateway, "press-4", &json!({})))).collect();
        all.into_iter().map(|one| one.join().expect("no panic")["redriven"].as_u64().expect("a number")).sum()
    });
    gateway.settle();
    let mut records = payloads(&gateway.records("press-4"));
    assert_eq!(redriven, MESSAGES as u64);
    records.sort_unstable();
    records.dedup();
    assert_eq!((records.len(), gateway.records("press-4").len()), (MESSAGES, MESSAGES));
}

/// What was let in before a client left, and what it did not wait for, is in the audit.
#[test]
fn what_a_redrive_lets_in_is_in_the_audit_also_if_its_client_leaves() {
    const MESSAGES: usize = 4_000;
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    put_schema(&gateway, "press-4", &json!({"type": "number"}));
    let body: String = (0..MESSAGES).map(|n| format!("\"{n}\"\n")).collect();
    let headers = [("content-type", "application/x-ndjson")];
    let path = "/v1/ingest/press-4/many";
    assert_eq!(gateway.request("POST", path, &source.key, &headers, body.as_bytes()).status, 422);
    gateway.settle();
    put_schema(&gateway, "press-4", &json!({"type": "string"}));
    let request = format!(
        "POST /v1/datasources/press-4/quarantine/redrive HTTP/1.1\r\nHost: gateway\r\nAuthorization: {}\r\n\
         Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}",
        gateway.admin_key()
    );
    for pause_ms in [5, 10, 20, 30, 40, 60, 80] {
        let mut leaving = TcpStream::connect(gateway.http).expect("the listener accepts");
        leaving.write_all(request.as_bytes()).expect("sent");
        std::thread::sleep(Duration::from_millis(pause_ms));
    }
    redrive(&gateway, "press-4", &json!({}));
    gateway.settle();
    assert_eq!(gateway.records("press-4").len(), MESSAGES);
    wait_for("the audit to have all of them", || {
        let audit = gateway.get("/v1/audit?limit=1000", &gateway.admin_key()).json();
        let entries = audit["entries"].as_array().expect("a list");
        let redrives = entries.iter().filter(|entry| entry["action"] == "quarantine.redriven");
        let redriven: u64 = redrives.filter_map(|entry| entry["what"]["redriven"].as_u64()).sum();
        (redriven == MESSAGES as u64).then_some(())
    });
}

/// A sender repeats what it has no answer to. The repetition is not kept beside the first one, so that no redrive
/// lets both in, and what the sender changes is.
fn a_repeated_message_is_in_quarantine_once_and_comes_out_once(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let source = gateway.create("press-4");
    put_schema(&gateway, "press-4", &json!({"type": "number"}));
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    let mut by_mqtt = |packet_id, id: &str, topic: &str, payload: &str| {
        let message = Message::new(topic, payload).at(1, packet_id);
        wire.send(&message.with(&user_property("message-id", id)).packet(Version::V5));
        wire.packet(PUBACK).reason()
    };
    let by_http = |id: &str, path: &str, body: &str| {
        let media_type = if path.ends_with("many") { "application/x-ndjson" } else { "application/json" };
        let headers = [("content-type", media_type), ("idempotency-key", id)];
        let path = format!("/v1/ingest/press-4/{path}");
        gateway.request("POST", &path, &source.key, &headers, body.as_bytes())
    };
    assert_eq!(by_mqtt(1, "m", "t", "\"m\""), PAYLOAD_FORMAT_INVALID);
    assert_eq!(by_mqtt(2, "m", "t", "\"m\""), PAYLOAD_FORMAT_INVALID);
    let first = by_http("h", "t", "\"h\"");
    let again = by_http("h", "t", "\"h\"");
    assert_eq!((first.status, again.status), (422, 422));
    assert_eq!(first.json()["errors"], again.json()["errors"], "the same offset");
    // A request of several: those that fail are kept once, together.
    let first = by_http("n", "many", "1\n\"n1\"\n\"n2\"");
    let again = by_http("n", "many", "1\n\"n1\"\n\"n2\"");
    assert_eq!((first.status, again.status), (422, 422));
    assert_eq!(first.json()["errors"], again.json()["errors"], "the same offsets");
    // Another topic, another payload, another id, and the same over another front.
    assert_eq!(by_mqtt(3, "m", "t/2", "\"m\""), PAYLOAD_FORMAT_INVALID);
    assert_eq!(by_mqtt(4, "m", "t", "\"m2\""), PAYLOAD_FORMAT_INVALID);
    assert_eq!(by_mqtt(5, "m2", "t", "\"m\""), PAYLOAD_FORMAT_INVALID);
    assert_eq!(by_http("m", "t", "\"m\"").status, 422);
    gateway.settle();
    let held = payloads(&quarantine(&gateway, "press-4"));
    assert_eq!(held, [r#""m""#, r#""h""#, r#""n1""#, r#""n2""#, r#""m""#, r#""m2""#, r#""m""#]);

    // The ids themselves are not used up, and one redrive takes them.
    assert!(by_http("n", "many", "1\n2\n3").json().get("duplicate").is_none());
    put_schema(&gateway, "press-4", &json!({"type": ["number", "string"]}));
    let all = redrive(&gateway, "press-4", &json!({"filter": "t"}));
    assert_eq!((&all["redriven"], &all["duplicates"]), (&json!(3), &json!(1)), "{all}");
    assert_eq!(by_http("h", "t", "\"h\"").json()["duplicate"], true);
    gateway.kill();
    let gateway = store.setup(dir.path()).set("intake.dedup_window_s", 1).change_cluster().start();
    gateway.settle();
    let began = std::time::Instant::now();
    wait_for("the window to be over", || (began.elapsed().as_millis() > 1_500).then_some(()));
    redrive(&gateway, "press-4", &json!({"filter": "t"}));
    gateway.settle();
    let records = payloads(&gateway.records("press-4"));
    assert_eq!(records.iter().filter(|payload| *payload == "\"h\"").count(), 1, "{records:?}");
}

/// The corrected message has taken the place of the one in quarantine. That is noted, so that it holds when the id is
/// forgotten.
fn a_message_that_was_corrected_is_not_let_in_by_a_later_redrive(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let source = gateway.create("press-4");
    put_schema(&gateway, "press-4", &json!({"type": "number"}));
    let post = |gateway: &Gateway, body: &str| {
        let headers = [("content-type", "application/json"), ("idempotency-key", "a")];
        gateway.request("POST", "/v1/ingest/press-4/t", &source.key, &headers, body.as_bytes()).status
    };
    assert_eq!((post(&gateway, "\"1\""), post(&gateway, "1")), (422, 200));
    gateway.settle();
    put_schema(&gateway, "press-4", &json!({"type": ["number", "string"]}));
    let answer = redrive(&gateway, "press-4", &json!({}));
    assert_eq!((&answer["redriven"], &answer["duplicates"]), (&json!(0), &json!(1)), "{answer}");
    gateway.settle();
    let held = quarantine(&gateway, "press-4");
    let records = gateway.records("press-4");
    assert_eq!(held.len(), 1, "the mark is no message: {held:?}");
    assert_eq!(held[0]["redriven_offset"], records[0]["offset"]);
    gateway.kill();
    let gateway = store.setup(dir.path()).set("intake.dedup_window_s", 1).change_cluster().start();
    gateway.settle();
    let began = std::time::Instant::now();
    wait_for("the window to be over", || (began.elapsed().as_millis() > 2_500).then_some(()));
    let answer = redrive(&gateway, "press-4", &json!({}));
    assert_eq!((&answer["redriven"], &answer["duplicates"]), (&json!(0), &json!(0)), "{answer}");
    gateway.settle();
    assert_eq!(payloads(&gateway.records("press-4")), ["1"]);
}

fn a_page_of_quarantine_is_chosen_by_topic_and_place_and_ends(store: TestStore) {
    let dir = scratch();
    let (gateway, _) = with_refused(store, dir.path());
    let page = |query: &str| {
        let path = format!("/v1/datasources/press-4/quarantine?{query}");
        let answer = gateway.get(&path, &gateway.admin_key());
        assert_eq!(answer.status, 200, "{}", answer.text());
        let json = answer.json();
        (payloads(json["records"].as_array().expect("records")), json["next"].clone())
    };
    let (first, next) = page("limit=2");
    assert_eq!(first, ["\"1\"", "\"3\""]);
    assert_eq!(page(&format!("limit=2&after_offset={next}")), (vec!["\"5\"".to_owned()], Value::Null));
    assert_eq!(page("topic=t/3").0, ["\"3\""]);
    assert_eq!(page("from=2100-01-01T00:00:00Z").0, Vec::<String>::new());
    let bad = gateway.get("/v1/datasources/press-4/quarantine?topic=a/%23/b", &gateway.admin_key());
    assert_eq!(bad.status, 400);
}

fn what_a_leaked_key_let_in_goes_out_of_sight_everywhere_and_comes_back(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let source = gateway.create("press-4");
    let (leaked_id, leaked) = key(&gateway, "press-4", "ingest");
    let (_, subscriber) = key(&gateway, "press-4", "subscribe");
    let mut honest = Wire::login(gateway.mqtt, Version::V5, &source.key);
    let mut thief = Wire::login(gateway.mqtt, Version::V5, &leaked);
    let send = |wire: &mut Wire, id: u16, topic: &str, payload: Value| {
        let message = Message::new(topic, payload.to_string()).at(1, id).retained();
        wire.send(&message.packet(Version::V5));
        assert_eq!(wire.packet(PUBACK).reason(), 0);
    };
    send(&mut honest, 1, "spindle", json!({"t": 20, "rpm": 100}));
    send(&mut thief, 1, "spindle", json!({"t": 1}));
    gateway.settle();
    let before = gateway.records("press-4");
    let since = before[1]["received_at"].clone();
    // What came earlier in the same microsecond is not there: the log's clock only goes forward.
    send(&mut thief, 2, "spindle", json!({"t": 999}));
    send(&mut thief, 3, "forged", json!(1));
    send(&mut honest, 2, "door", json!(true));
    gateway.settle();
    let all = gateway.records("press-4");
    assert_eq!(all.len(), 5);
    let latest = |gateway: &Gateway| {
        let answer = gateway.get("/v1/datasources/press-4/latest", &subscriber).json();
        let topics = answer["topics"].as_array().expect("topics").clone();
        topics.into_iter().map(|t| (t["topic"].to_string(), t["values"].clone())).collect::<Vec<_>>()
    };
    let latest_before = latest(&gateway);

    let revoked = format!("/v1/datasources/press-4/keys/{leaked_id}");
    assert_eq!(gateway.request("DELETE", &revoked, &gateway.admin_key(), &[], &[]).status, 204);
    let answer = leak(&gateway, "press-4", &leaked_id, &json!({ "since": since }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    let told = answer.json();
    assert_eq!((&told["records"], &told["last_offset"]), (&json!(3), &all[3]["offset"]), "{told}");
    assert_eq!(
        told["topics"],
        json!([
            {"datasource": "press-4", "topic": "forged", "records": 1},
            {"datasource": "press-4", "topic": "spindle", "records": 2},
        ])
    );

    let out_of_sight = |gateway: &Gateway| {
        assert_eq!(gateway.records("press-4"), [all[0].clone(), all[4].clone()]);
        let held = quarantine(gateway, "press-4");
        assert_eq!(payloads(&held), payloads(&all[1..4]));
        assert!(held.iter().all(|record| record["cause"] == "key" && record["key_id"] == json!(leaked_id)));
        let latest = latest(gateway);
        let topics: Vec<_> = latest.iter().map(|(topic, _)| topic.as_str()).collect();
        assert_eq!(topics, ["\"door\"", "\"spindle\""]);
        assert_eq!((&latest[1].1["t"]["value"], &latest[1].1["rpm"]["value"]), (&json!(20), &json!(100)));
    };
    out_of_sight(&gateway);
    // Redriving is not for these.
    assert_eq!(redrive(&gateway, "press-4", &json!({}))["redriven"], 0);
    gateway.kill();
    let gateway = store.start(dir.path());
    gateway.settle();
    out_of_sight(&gateway);
    // Nobody is given them, from the past or as retained messages.
    let given = all_that_is_given(&gateway, &subscriber, &source.key);
    let mut shown: Vec<_> = given.iter().map(|m| (m.retain, m.topic.clone(), m.payload.clone())).collect();
    shown.sort();
    let spindle = json!({"t": 20, "rpm": 100}).to_string().into_bytes();
    for (_, topic, payload) in &shown {
        let honest = *payload == spindle || (topic == "door" && payload == b"true");
        assert!(honest, "{topic}: {}", String::from_utf8_lossy(payload));
    }
    assert!(shown.iter().any(|(_, _, payload)| *payload == spindle), "{shown:?}");

    // It was another key after all.
    let answer = leak(&gateway, "press-4", &leaked_id, &json!({ "undo": true }));
    assert_eq!((answer.status, &answer.json()["records"]), (200, &json!(0)), "{}", answer.text());
    gateway.settle();
    assert_eq!(gateway.records("press-4")[..5], all[..]);
    assert_eq!(quarantine(&gateway, "press-4"), Vec::<Value>::new());
    let restored: Vec<_> = latest(&gateway).into_iter().filter(|(topic, _)| topic != "\"end\"").collect();
    assert_eq!(restored, latest_before);
}

fn a_leaked_key_is_quarantined_in_the_datasource_that_is_named_and_by_who_may(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let (one, other) = (gateway.create("press-4"), gateway.create("press-5"));
    // A key for all datasources, that writes to both.
    let (for_all, secret) = key(&gateway, "*", "ingest");
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &secret);
    assert_eq!(wire.publish(Version::V5, 1, "press-4/t", b"4"), 0);
    assert_eq!(wire.publish(Version::V5, 2, "press-5/t", b"5"), 0);
    let since = json!({"since": "2020-01-01T00:00:00Z"});
    let answer = leak(&gateway, "press-4", &for_all, &since);
    assert_eq!((answer.status, &answer.json()["records"]), (200, &json!(1)), "{}", answer.text());
    assert!(gateway.records("press-4").is_empty());
    assert_eq!(gateway.records("press-5").len(), 1);
    let answer = leak(&gateway, "*", &for_all, &since);
    assert_eq!((answer.status, &answer.json()["records"]), (200, &json!(2)), "{}", answer.text());
    assert!(gateway.records("press-5").is_empty());
    // The key is still good, and what it lets in from now on is not meant.
    assert_eq!(wire.publish(Version::V5, 3, "press-4/t", b"6"), 0);
    assert_eq!(gateway.stored("press-4", 1).len(), 1);

    for (body, status) in [
        (json!({}), 400),
        (json!({"since": "yesterday"}), 400),
        (json!({"since": null, "undo": true}), 400),
        (json!({"since": "2100-01-01T00:00:00Z"}), 422),
    ] {
        assert_eq!(leak(&gateway, "press-4", &for_all, &body).status, status, "{body}");
    }
    let path = format!("/v1/datasources/press-4/keys/{for_all}/quarantine");
    assert_eq!(gateway.post(&path, &one.key, &since).status, 403);
    assert_eq!(gateway.post(&path, &other.key, &since).status, 401);
}

fn a_slow_subscriber_is_not_given_what_was_withheld_while_it_waited(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let source = gateway.create("press-4");
    let (_, subscriber) = key(&gateway, "press-4", "subscribe");
    let (leaked_id, leaked) = key(&gateway, "press-4", "ingest");
    // One message at a time.
    let properties = two_bytes(RECEIVE_MAXIMUM, 1);
    let connect = Connect { properties, ..Connect::with_key(Version::V5, &subscriber) };
    let (mut slow, _) = Wire::connect(gateway.mqtt, &connect);
    slow.send(&subscribe(Version::V5, 1, &["#"]));
    slow.packet(SUBACK);
    // In one request, and so in one batch.
    let headers = [("content-type", "application/json")];
    let body = json!([1, 2, 3, 4, 5]).to_string();
    let answer = gateway.request("POST", "/v1/ingest/press-4/t", &leaked, &headers, body.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let first = Message::read(Version::V5, &slow.packet(PUBLISH));
    assert_eq!(first.payload, b"1");
    let answer = leak(&gateway, "press-4", &leaked_id, &json!({"since": "2020-01-01T00:00:00Z"}));
    assert_eq!(answer.json()["records"], 5, "{}", answer.text());
    let mut honest = Wire::login(gateway.mqtt, Version::V5, &source.key);
    assert_eq!(honest.publish(Version::V5, 1, "t", b"6"), 0);
    slow.send(&ack(PUBACK, first.packet_id));
    let next = Message::read(Version::V5, &slow.packet(PUBLISH));
    assert_eq!(String::from_utf8_lossy(&next.payload), "6");
}
