//! `GET /v1/live`: what a watcher is told, and what it is not.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::common::events::{Event, EventStream};
use crate::common::wire::{Connect, DISCONNECT, Version, Wire};
use crate::common::{Gateway, scratch, wait_for};

fn watch(gateway: &Gateway, key: &str, query: &str) -> EventStream {
    let stream = EventStream::ask(gateway.http, &format!("/v1/live{query}"), key, &[]).expect("an answer");
    assert!(stream.head.starts_with("HTTP/1.1 200 "), "{}", stream.head);
    stream
}

/// The next event of this name.
fn next(stream: &mut EventStream, name: &str) -> Event {
    loop {
        let event = stream.event().unwrap_or_else(|| panic!("{name}, before the end"));
        if event.name == name {
            return event;
        }
    }
}

/// What ticks say of each datasource, until as many records were told of.
fn gather(stream: &mut EventStream, records: u64) -> BTreeMap<String, (u64, u64, Vec<Value>)> {
    let mut all: BTreeMap<String, (u64, u64, Vec<Value>)> = BTreeMap::new();
    while all.values().map(|(records, quarantined, _)| records + quarantined).sum::<u64>() < records {
        let tick = next(stream, "tick");
        assert_eq!(tick.data["unread"], 0);
        for (id, of) in tick.data["datasources"].as_object().expect("an object") {
            let known = all.entry(id.clone()).or_default();
            known.0 += of["records"].as_u64().expect("a number");
            known.1 += of["quarantined"].as_u64().expect("a number");
            known.2.extend(of["newest"].as_array().expect("a list").iter().cloned());
        }
    }
    all
}

fn post(gateway: &Gateway, key: &str, path: &str, body: &[u8]) -> u16 {
    gateway.request("POST", &format!("/v1/ingest/{path}"), key, &[], body).status
}

#[test]
fn a_watcher_of_all_is_told_of_each_and_of_the_gateway() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (a, b) = (gateway.create("a"), gateway.create("b"));
    assert_eq!(post(&gateway, &a.key, "a/t", b"1"), 200);
    let mut stream = watch(&gateway, &gateway.admin_key(), "");
    let hello = next(&mut stream, "hello").data;
    let listed: Vec<&Value> =
        hello["datasources"].as_array().expect("a list").iter().map(|of| &of["id"]).collect();
    assert_eq!(listed, ["a", "b"]);
    assert_eq!(
        (&hello["totals"]["a"]["accepted"], &hello["totals"]["b"]["last_at"]),
        (&json!(1), &Value::Null)
    );
    let history: u64 =
        hello["history"]["a"].as_array().expect("a list").iter().filter_map(Value::as_u64).sum();
    assert_eq!(history, 1, "its last minute");
    let health = next(&mut stream, "health").data;
    assert_eq!(
        (&health["readiness"]["status"], &health["gateway"]["sinks"][0]["sink"]),
        (&json!("ready"), &json!("sqlite"))
    );

    for n in 0..30 {
        assert_eq!(post(&gateway, &b.key, &format!("b/{}", n % 20), n.to_string().as_bytes()), 200);
    }
    let told = gather(&mut stream, 30);
    assert_eq!((told["b"].0, told.contains_key("a")), (30, false));
    gateway.create("c");
    let list = next(&mut stream, "datasources").data;
    assert_eq!(list["datasources"].as_array().map(Vec::len), Some(3));
    // What was refused is only said to have been, and then asked for.
    let before = next_refusals(&mut stream);
    assert_eq!(post(&gateway, "hgk_wrong", "a/t", b"1"), 401);
    assert!(next(&mut stream, "refusals").data["count"].as_u64() > before);
}

fn next_refusals(stream: &mut EventStream) -> Option<u64> {
    let mut count = None;
    // The first one came long ago; it is not told again as long as nothing is refused.
    for _ in 0..2 {
        let event = stream.event().expect("an event");
        if event.name == "refusals" {
            count = event.data["count"].as_u64();
        }
    }
    count
}

#[test]
fn a_watcher_of_one_gets_its_newest_records_and_nothing_of_others() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (a, b) = (gateway.create_open("a"), gateway.create("b"));
    let mut all = watch(&gateway, &a.key, "");
    let mut one = watch(&gateway, &a.key, "?datasource=a&topic=t/%23");
    for stream in [&mut all, &mut one] {
        let hello = next(stream, "hello").data;
        assert_eq!(hello["datasources"].as_array().map(Vec::len), Some(1), "{hello}");
        assert!(next(stream, "health").data.get("gateway").is_none(), "that is for admins of the gateway");
    }
    for n in 0..300 {
        assert_eq!(post(&gateway, &b.key, "b/t/1", b"secret"), 200);
        assert_eq!(
            post(&gateway, &a.key, if n % 3 == 0 { "a/u" } else { "a/t/1" }, n.to_string().as_bytes()),
            200
        );
    }
    let long = vec![b'x'; 5_000];
    assert_eq!(post(&gateway, &a.key, "a/t/long", &long), 200);
    let told = gather(&mut one, 301);
    let (records, quarantined, newest) = &told["a"];
    assert_eq!((*records, *quarantined, told.len()), (301, 0, 1));
    assert!(newest.iter().all(|of| of["topic"] != "u"), "only what matches");
    let long = newest.last().expect("the last one");
    assert_eq!((&long["omitted_bytes"], &long["payload"]), (&json!(5_000), &Value::Null));
    let offsets: Vec<u64> = newest.iter().filter_map(|of| of["offset"].as_u64()).collect();
    assert!(offsets.windows(2).all(|two| two[0] < two[1]), "in order, and each once");
    assert_eq!(gather(&mut all, 301).keys().collect::<Vec<_>>(), ["a"]);
}

#[test]
fn what_is_withheld_is_not_shown_and_what_failed_is_counted() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let admin = gateway.admin_key();
    let schema = json!({ "schema": { "type": "number" } });
    let set =
        gateway.request("PUT", "/v1/datasources/press-4/schema", &admin, &[], schema.to_string().as_bytes());
    assert_eq!(set.status, 200, "{}", set.text());
    let mut stream = watch(&gateway, &admin, "?datasource=press-4");
    next(&mut stream, "tick");
    assert_eq!(post(&gateway, &source.key, "press-4/t", b"\"no\""), 422);
    assert_eq!(post(&gateway, &source.key, "press-4/t", b"1"), 200);
    let (records, quarantined, newest) = gather(&mut stream, 2).remove("press-4").expect("told of");
    assert_eq!((records, quarantined, newest.len()), (1, 1, 1));
    // Withheld: the beginning of another watcher has nothing of it any more.
    let path = format!("/v1/datasources/press-4/keys/{}/quarantine", source.key_id);
    let answer = gateway.post(&path, &admin, &json!({ "since": "2020-01-01T00:00:00Z" }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    let hello = next(&mut watch(&gateway, &admin, ""), "hello").data;
    assert_eq!(hello["history"], json!({}), "{hello}");
}

#[test]
fn a_watcher_is_told_to_go_when_its_key_or_its_datasource_ends() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (a, _b) = (gateway.create_open("a"), gateway.create("b"));
    let admin = gateway.admin_key();
    let mut of_key = watch(&gateway, &a.key, "?datasource=a");
    let mut of_datasource = watch(&gateway, &admin, "?datasource=b");
    let mut of_all = watch(&gateway, &admin, "");
    for stream in [&mut of_key, &mut of_datasource, &mut of_all] {
        next(stream, "tick");
    }
    let path = format!("/v1/datasources/a/keys/{}", a.key_id);
    assert_eq!(gateway.request("DELETE", &path, &admin, &[], &[]).status, 204);
    assert_eq!(next(&mut of_key, "end").data["reason"], "key_dead");
    gateway.delete("b");
    assert_eq!(next(&mut of_datasource, "end").data["reason"], "datasource_deleted");
    let list = next(&mut of_all, "datasources").data;
    assert_eq!(list["datasources"].as_array().map(Vec::len), Some(1));
    let refused = |key: &str, query: &str| gateway.get(&format!("/v1/live{query}"), key).status;
    assert_eq!(refused(&a.key, ""), 401);
    assert_eq!(refused(&admin, "?datasource=b"), 404);
    assert_eq!(refused(&admin, "?topic=t"), 422);
    assert_eq!(refused(&admin, "?datasource=a&topic=%23/a"), 400);
    assert_eq!(refused(&gateway.create("c").key, ""), 403);
}

#[test]
fn a_client_is_listed_and_told_to_leave() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let admin = gateway.admin_key();
    let mut connect = Connect::with_key(Version::V5, &source.key);
    connect.client_id = "press/4".to_owned();
    let (mut wire, _) = Wire::connect(gateway.mqtt, &connect);
    let sessions = |query: &str| {
        gateway.get(&format!("/v1/datasources/press-4/sessions{query}"), &admin).json()["sessions"].clone()
    };
    assert_eq!(sessions(""), json!([]), "it has subscribed to nothing");
    wait_for("the client", || (sessions("?publishers=true")[0]["client_id"] == "press/4").then_some(()));
    assert_eq!(sessions("?publishers=true")[0]["subscriber"], false);
    let path = "/v1/datasources/press-4/sessions/press%2F4/disconnect";
    assert_eq!(gateway.post(path, &source.key, &json!({})).status, 403);
    assert_eq!(gateway.post(path, &admin, &json!({})).status, 204);
    assert_eq!(wire.packet(DISCONNECT).reason(), 0x98, "an administrative action");
    wait_for("it to leave", || (sessions("?publishers=true") == json!([])).then_some(()));
    assert_eq!(gateway.post(path, &admin, &json!({})).status, 404, "nobody is there");
    let audit = gateway.get("/v1/audit?limit=10000", &admin).json();
    let last = audit["entries"].as_array().expect("a list").last().expect("an entry");
    assert_eq!(
        (&last["action"], &last["what"]["client_id"]),
        (&json!("client.disconnected"), &json!("press/4"))
    );
}
