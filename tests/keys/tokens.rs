//! Access tokens: what stands in for a key for a short time, wherever a key is presented, and for no more than it was made
//! for.

use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::common::events::EventStream;
use crate::common::wire::{
    CONNACK, Connect, Next, PUBACK, PUBLISH, VERSIONS, Version, Wire, four_bytes, publish_with, subscribe,
    user_property,
};
use crate::common::ws::WsClient;
use crate::common::{Answer, Gateway, Setup, Source, scratch, wait_for};
use crate::{KEY_DEAD, Made, ahead, create_key, revoke, rotate};

const STREAM: &str = "/v1/datasources/press-4/stream";

fn ask_token(gateway: &Gateway, by: &str, datasource: &str, key_id: &str, wanted: &Value) -> Answer {
    gateway.post(&format!("/v1/datasources/{datasource}/keys/{key_id}/tokens"), by, wanted)
}

/// A token that an admin makes of a key.
fn token(gateway: &Gateway, datasource: &str, key_id: &str, wanted: &Value) -> String {
    let answer = ask_token(gateway, &gateway.admin_key(), datasource, key_id, wanted);
    assert_eq!(answer.status, 201, "{}", answer.text());
    answer.json()["token"].as_str().expect("a token").to_owned()
}

fn refusal(gateway: &Gateway, cause: &str) -> Option<Value> {
    let answer = gateway.get("/v1/refusals", &gateway.admin_key()).json();
    answer["refusals"].as_array().expect("a list").iter().find(|entry| entry["cause"] == cause).cloned()
}

/// A gateway with a datasource whose key sends and reads.
fn scene() -> (tempfile::TempDir, Gateway, Source) {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("auth.failures_burst", 10_000).start();
    let source = gateway.create_open("press-4");
    (dir, gateway, source)
}

fn send(gateway: &Gateway, key: &str, topic: &str) -> u16 {
    gateway.post(&format!("/v1/ingest/press-4/{topic}"), key, &json!({ "value": 1 })).status
}

#[test]
fn a_token_is_made_by_an_admin_or_by_its_key_and_says_what_it_is_good_for() {
    let (_dir, gateway, source) = scene();
    let wanted = json!({ "ttl_s": 60, "topics": ["spindle/#"], "scopes": ["subscribe"] });
    let by_itself = ask_token(&gateway, &source.key, "press-4", &source.key_id, &wanted);
    assert_eq!(by_itself.status, 201, "{}", by_itself.text());
    let made = by_itself.json();
    assert_eq!(made["key_id"], source.key_id.as_str());
    assert_eq!((&made["datasource"], &made["scopes"]), (&json!("press-4"), &json!(["subscribe"])));
    assert_eq!(made["topics"], json!(["spindle/#"]));
    let ends_at: jiff::Timestamp = made["expires_at"].as_str().expect("a time").parse().expect("a time");
    let left = ends_at.duration_since(jiff::Timestamp::now());
    assert!((50..=60).contains(&left.as_secs()), "{left:?}");
    let by_default = ask_token(&gateway, &gateway.admin_key(), "press-4", &source.key_id, &json!({})).json();
    assert_eq!(
        (&by_default["topics"], &by_default["scopes"]),
        (&Value::Null, &json!(["ingest", "subscribe"]))
    );

    let token = made["token"].as_str().expect("a token");
    // None makes another one, and no other key makes one of this.
    let again = ask_token(&gateway, token, "press-4", &source.key_id, &json!({}));
    assert_eq!((again.status, &again.json()["type"]), (403, &json!("/problems/beyond_token")));
    let sister = create_key(&gateway, "press-4", &json!({ "scopes": ["ingest", "subscribe"] }));
    assert_eq!(ask_token(&gateway, &sister.secret, "press-4", &source.key_id, &json!({})).status, 403);
    gateway.create("press-5");
    assert_eq!(ask_token(&gateway, &source.key, "press-5", &source.key_id, &json!({})).status, 401);
    assert_eq!(ask_token(&gateway, &gateway.admin_key(), "press-5", &source.key_id, &json!({})).status, 404);
    assert_eq!(ask_token(&gateway, "", "press-4", &source.key_id, &json!({})).status, 401);

    // Never longer than its key.
    let soon = ahead(Duration::from_secs(30));
    let ending = create_key(&gateway, "press-4", &json!({ "expires_at": soon }));
    let bounded =
        ask_token(&gateway, &ending.secret, "press-4", &ending.id, &json!({ "ttl_s": 3600 })).json();
    let at = |text: &str| text.parse::<jiff::Timestamp>().expect("a time");
    assert!(at(bounded["expires_at"].as_str().expect("a time")) <= at(&soon), "{bounded}");
    assert_eq!(bounded["scopes"], json!(["ingest"]));
}

#[test]
fn what_no_token_can_be_is_refused_by_name() {
    let (_dir, gateway, source) = scene();
    let ingest = create_key(&gateway, "press-4", &json!({ "scopes": ["ingest"] }));
    let many: Vec<String> = (0..17).map(|n| format!("t{n}")).collect();
    for (wanted, status, pointer) in [
        (json!({ "ttl_s": 0 }), 400, "/ttl_s"),
        (json!({ "ttl_s": 86_401 }), 400, "/ttl_s"),
        (json!({ "topics": [] }), 400, "/topics"),
        (json!({ "topics": many }), 400, "/topics"),
        (json!({ "topics": ["t".repeat(513)] }), 422, "/topics"),
        (json!({ "topics": ["a", "a#"] }), 400, "/topics/1"),
        (json!({ "topics": ["$share/g/a"] }), 400, "/topics/0"),
        (json!({ "scopes": ["admin"] }), 400, "/scopes"),
        (json!({ "scopes": ["subscribe"] }), 422, "/scopes"),
    ] {
        let answer = ask_token(&gateway, &gateway.admin_key(), "press-4", &ingest.id, &wanted);
        assert_eq!((answer.status, &answer.json()["pointer"]), (status, &json!(pointer)), "{wanted}");
    }
    for wanted in [json!({ "ttl_s": null }), json!({ "topics": null }), json!({ "scopes": null })] {
        let answer = ask_token(&gateway, &gateway.admin_key(), "press-4", &ingest.id, &wanted);
        assert_eq!(answer.status, 400, "{wanted}");
    }
    for (wanted, count) in [(86_400, 1), (1, 1)] {
        let answer = ask_token(
            &gateway,
            &source.key,
            "press-4",
            &source.key_id,
            &json!({ "ttl_s": wanted, "topics": vec!["t".repeat(32); 16][..16 * count] }),
        );
        assert_eq!(answer.status, 201, "{}", answer.text());
        let token = answer.json()["token"].as_str().expect("a token").to_owned();
        assert!(token.len() <= 1_024, "{}", token.len());
        if wanted > 1 {
            assert_eq!(send(&gateway, &token, &"t".repeat(32)), 200, "the longest is taken");
        }
    }
    let answer = ask_token(&gateway, &gateway.admin_key(), "press-4", "0123456789ab", &json!({}));
    assert_eq!(answer.status, 404);
}

#[test]
fn a_token_is_taken_wherever_a_key_is_and_its_records_name_the_key() {
    let (_dir, gateway, source) = scene();
    let token = token(&gateway, "press-4", &source.key_id, &json!({ "ttl_s": 600 }));
    let mut expected = 0;
    let basic = format!("Basic {}", BASE64_STANDARD.encode(format!("user:{token}")));
    for (path, name, value) in [
        ("/v1/ingest/press-4/t", "authorization", token.clone()),
        ("/v1/ingest/press-4/t", "authorization", format!("Bearer {token}")),
        ("/v1/ingest/press-4/t", "x-api-key", token.clone()),
        ("/api/v2/write?bucket=press-4", "authorization", format!("Token {token}")),
        ("/write?db=press-4", "authorization", basic),
    ] {
        let body = if path.starts_with("/v1") { "1" } else { "t value=1" };
        let answer = gateway.request("POST", path, "", &[(name, &value)], body.as_bytes());
        assert!(matches!(answer.status, 200 | 204), "{path} {name}: {}", answer.text());
        expected += 1;
    }
    for version in VERSIONS {
        for (username, password) in [(token.as_str(), None), ("device", Some(token.as_str()))] {
            let connect = Connect {
                username: Some(username.as_bytes().to_vec()),
                password: password.map(|password| password.as_bytes().to_vec()),
                ..Connect::new(version)
            };
            let (mut wire, _) = Wire::connect(gateway.mqtt, &connect);
            assert_eq!(wire.publish(version, 1, "t", b"1"), 0);
            let mut ws = Wire::over(WsClient::open(gateway.http));
            ws.let_in(&connect);
            assert_eq!(ws.publish(version, 1, "t", b"1"), 0);
            expected += 2;
        }
    }
    let as_property =
        Connect { properties: user_property("authorization", &token), ..Connect::new(Version::V5) };
    let (mut wire, _) = Wire::connect(gateway.mqtt, &as_property);
    assert_eq!(wire.publish(Version::V5, 1, "t", b"1"), 0);
    // Of a message alone, on another key's connection.
    let other = gateway.create("press-5");
    let mut carrier = Wire::login(gateway.mqtt, Version::V5, &other.key);
    carrier.send(&publish_with(Version::V5, 2, "t", &user_property("x-api-key", &token), b"1"));
    assert_eq!(carrier.packet(PUBACK).reason(), 0);
    let sent = Command::new("mosquitto_pub")
        .args(["-h", "127.0.0.1", "-p", &gateway.mqtt.port().to_string(), "-q", "1", "-t", "t", "-m", "1"])
        .args(["-u", "device", "-P", &token])
        .status();
    assert!(sent.expect("mosquitto_pub is installed (tests/run does it)").success());
    expected += 3;
    for record in gateway.stored("press-4", expected) {
        assert_eq!(record["key_id"], source.key_id.as_str());
    }
    for path in ["records", "latest", "series?topic=t", "schema"] {
        let answer = gateway.get(&format!("/v1/datasources/press-4/{path}"), &token);
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    }
    let mut stream = EventStream::open(gateway.http, &token, "?from_offset=0");
    stream.record();
    let query = format!("{STREAM}?from_offset=0&access_token={token}");
    let mut in_url = EventStream::ask_with(gateway.http, &query, &[]).expect("an answer");
    assert!(in_url.head.starts_with("HTTP/1.1 200 "), "{}", in_url.head);
    let head = in_url.head.to_lowercase();
    assert!(
        head.contains("referrer-policy: no-referrer") && head.contains("cache-control: no-store"),
        "{head}"
    );
    in_url.record();
    // Both count toward the key's connections.
    let limits = json!({ "limits": { "connections": 1 } });
    let path = format!("/v1/datasources/press-4/keys/{}", source.key_id);
    let limits = serde_json::to_vec(&limits).expect("JSON");
    assert_eq!(gateway.request("PATCH", &path, &gateway.admin_key(), &[], &limits).status, 200);
    let refused = EventStream::ask_with(gateway.http, &query, &[]).expect("an answer");
    assert!(refused.head.starts_with("HTTP/1.1 429 "), "{}", refused.head);
}

#[test]
fn topics_narrow_what_is_sent_and_what_is_read() {
    let (_dir, gateway, source) = scene();
    for topic in ["a/b", "a/c", "secret/x", "z"] {
        let body = json!({ topic.replace('/', "_"): 1 });
        assert_eq!(gateway.post(&format!("/v1/ingest/press-4/{topic}"), &source.key, &body).status, 200);
    }
    gateway.stored("press-4", 4);
    let schemas = json!({ "schemas": [
        { "filter": "secret/#", "schema": { "title": "hidden" } },
        { "filter": "a/b", "schema": { "title": "shown" } },
    ] });
    let schemas = serde_json::to_vec(&schemas).expect("JSON");
    let set = gateway.request("PUT", "/v1/datasources/press-4/schema", &gateway.admin_key(), &[], &schemas);
    assert_eq!(set.status, 200, "{}", set.text());
    let narrow = token(&gateway, "press-4", &source.key_id, &json!({ "topics": ["a/#"] }));
    assert_eq!((send(&gateway, &narrow, "a/b"), send(&gateway, &narrow, "secret/x")), (200, 403));
    let influx = |measurement: &str| {
        let body = format!("{measurement} value=1");
        let headers = [("authorization", format!("Token {narrow}"))];
        let headers = headers.each_ref().map(|(name, value)| (*name, value.as_str()));
        gateway.request("POST", "/api/v2/write?bucket=press-4", "", &headers, body.as_bytes()).status
    };
    assert_eq!((influx("a"), influx("z")), (204, 403));
    gateway.stored("press-4", 6);

    let get = |path: &str| gateway.get(&format!("/v1/datasources/press-4/{path}"), &narrow);
    let hidden = |answer: &Answer| {
        assert_eq!(answer.status, 200, "{}", answer.text());
        let text = answer.text();
        assert!(text.contains("a/b") && !text.contains("secret") && !text.contains("hidden"), "{text}");
        assert!(!text.contains("\"z\""), "{text}");
    };
    for path in
        ["records", "records?topic=a/%23", "records?topic=a/b", "latest", "schema", "records?format=csv"]
    {
        hidden(&get(path));
    }
    assert_eq!(get("series?topic=a/b&key=a_b").status, 200);
    for path in [
        "records?topic=%23",
        "records?topic=secret/x",
        "records?topic=%2B/x",
        "series?topic=secret/x&key=secret_x",
        "stream?topic=%23",
        "stream?topic=secret/x",
    ] {
        let answer = get(path);
        assert_eq!(
            (answer.status, &answer.json()["type"]),
            (403, &json!("/problems/beyond_token")),
            "{path}"
        );
    }
    let mut stream = EventStream::open(gateway.http, &narrow, "?from_offset=0");
    let topics: Vec<String> =
        (0..4).map(|_| stream.record()["topic"].as_str().expect("one").to_owned()).collect();
    assert_eq!(topics, ["a/b", "a/c", "a/b", "a"]);
    let two = token(&gateway, "press-4", &source.key_id, &json!({ "topics": ["a/+", "z"] }));
    let answer = gateway.get("/v1/datasources/press-4/records", &two);
    assert_eq!((answer.status, &answer.json()["parameter"]), (400, &json!("topic")), "{}", answer.text());
    assert_eq!(gateway.get("/v1/datasources/press-4/records?topic=z", &two).status, 200);
    let refused = refusal(&gateway, "token_topics").expect("it is listed");
    assert!(refused["advice"].as_str().expect("advice").contains("other topics"), "{refused}");
    // Where a page of newest values goes on tells no name either.
    let many: String = (0..3_000).map(|n| format!("0{n:04} value=1\n")).collect();
    let by_key = [("authorization", format!("Token {}", source.key))];
    let by_key = by_key.each_ref().map(|(name, value)| (*name, value.as_str()));
    let sent = gateway.request("POST", "/api/v2/write?bucket=press-4", "", &by_key, many.as_bytes());
    assert_eq!(sent.status, 204, "{}", sent.text());
    gateway.stored("press-4", 3_006);
    let newest = get("latest");
    hidden(&newest);
    assert!(!newest.text().contains("\"00"), "{}", newest.text());
    assert_eq!(newest.json()["next"], Value::Null);
}

#[test]
fn over_mqtt_a_token_subscribes_within_its_topics_and_leaves_nothing_behind() {
    let (_dir, gateway, source) = scene();
    let narrow = token(&gateway, "press-4", &source.key_id, &json!({ "topics": ["a/#"] }));
    let (mut page, connack) = Wire::connect(
        gateway.mqtt,
        &Connect {
            client_id: "device-1".to_owned(),
            properties: four_bytes(0x11, 600),
            ..Connect::with_key(Version::V5, &narrow)
        },
    );
    assert_eq!(connack.number(0x11), Some(0), "the session ends with the connection");
    page.send(&subscribe(Version::V5, 1, &["a/+", "#", "z", "$share/g/a/b", "+/b"]));
    assert_eq!(page.packet(9).codes(Version::V5), [1, 0x87, 0x87, 0x87, 0x87]);
    assert_eq!(page.publish(Version::V5, 2, "z", b"1"), 0x87);
    // A device of the same name is not pushed out, and its session is not taken up.
    let lasting = Connect {
        client_id: "device-1".to_owned(),
        clean: false,
        properties: four_bytes(0x11, 600),
        ..Connect::with_key(Version::V5, &source.key)
    };
    let (mut device, _) = Wire::connect(gateway.mqtt, &lasting);
    device.send(&subscribe(Version::V5, 1, &["#"]));
    assert_eq!(device.packet(9).codes(Version::V5), [1]);
    drop(device);
    let again = Connect { clean: false, ..Connect::with_key(Version::V5, &narrow) };
    let again = Connect { client_id: "device-1".to_owned(), ..again };
    let (mut other_page, connack) = Wire::connect(gateway.mqtt, &again);
    assert_eq!(connack.body[0] & 1, 0, "no session is there");
    assert_eq!(send(&gateway, &source.key, "z"), 200);
    assert_eq!(other_page.publish(Version::V5, 3, "a/b", b"2"), 0);
    assert!(
        matches!(other_page.next_within(Duration::from_millis(200)), Next::Silent),
        "it has subscribed to nothing"
    );
    let (_, connack) = Wire::connect(gateway.mqtt, &lasting);
    assert_eq!(connack.body[0] & 1, 1, "the device's session is");

    let answered = |connect: &Connect| {
        let mut wire = Wire::open(gateway.mqtt);
        wire.send(&connect.packet());
        wire.packet(CONNACK).reason()
    };
    let will = Connect {
        will: Some(("a/gone".to_owned(), b"1".to_vec())),
        ..Connect::with_key(Version::V5, &narrow)
    };
    assert_eq!(answered(&will), 0x87);
    let old =
        Connect { clean: false, client_id: "x".to_owned(), ..Connect::with_key(Version::V311, &narrow) };
    assert_eq!(answered(&old), 5);
    assert!(refusal(&gateway, "token_use").is_some());
    let named =
        Connect { client_id: "headgate-token:x".to_owned(), ..Connect::with_key(Version::V5, &source.key) };
    assert_eq!(answered(&named), 0x85);
}

#[test]
fn what_a_token_has_opened_ends_with_it_and_with_its_key() {
    let (_dir, gateway, source) = scene();
    let short = token(&gateway, "press-4", &source.key_id, &json!({ "ttl_s": 5 }));
    let long = token(&gateway, "press-4", &source.key_id, &json!({ "ttl_s": 600 }));
    let made = Instant::now();
    let mut wires: Vec<_> =
        VERSIONS.map(|version| (version, Wire::login(gateway.mqtt, version, &short))).into();
    let mut ws = Wire::over(WsClient::open(gateway.http));
    ws.let_in(&Connect::with_key(Version::V5, &short));
    wires.push((Version::V5, ws));
    let mut stream = EventStream::ask_with(gateway.http, &format!("{STREAM}?access_token={short}"), &[])
        .expect("an answer");
    stream.event().expect("it says where it begins");
    let mut stays = Wire::login(gateway.mqtt, Version::V5, &long);
    let mut reading = EventStream::open(gateway.http, &long, "");
    reading.event().expect("it says where it begins");
    assert_eq!(stream.end(), "token_over");
    for (version, mut wire) in wires {
        match version {
            Version::V5 => drop(wire.disconnected(KEY_DEAD)),
            _ => wire.closed(),
        }
    }
    let took = made.elapsed();
    assert!((4..40).contains(&took.as_secs()), "{took:?}");
    assert_eq!(send(&gateway, &short, "t"), 401);
    let expired = refusal(&gateway, "expired_token").expect("it is listed");
    assert_eq!(expired["key_id"], source.key_id.as_str());
    assert!(expired["advice"].as_str().expect("advice").contains("new one"), "{expired}");

    // With its key, at once.
    assert_eq!(stays.publish(Version::V5, 1, "t", b"1"), 0);
    assert_eq!(revoke(&gateway, "press-4", &source.key_id).status, 204);
    stays.disconnected(KEY_DEAD);
    assert_eq!(reading.end(), "key_dead");
    assert_eq!(send(&gateway, &long, "t"), 401);
    let dead = refusal(&gateway, "revoked_key").expect("it is listed");
    assert_eq!(dead["key_id"], source.key_id.as_str());
}

#[test]
fn a_token_dies_with_a_key_that_is_rotated_out_or_whose_datasource_is_made_again() {
    let (_dir, gateway, source) = scene();
    let of_old = token(&gateway, "press-4", &source.key_id, &json!({}));
    let rotated = Made::of(&rotate(&gateway, "press-4", &source.key_id, &json!({ "grace_seconds": 600 })));
    assert_eq!(send(&gateway, &of_old, "t"), 200, "its key is in its grace");
    let undone = rotate(&gateway, "press-4", &source.key_id, &json!({ "undo": true }));
    assert_eq!(undone.status, 200, "{}", undone.text());
    assert_eq!(send(&gateway, &of_old, "t"), 200);
    let rotated_again =
        Made::of(&rotate(&gateway, "press-4", &source.key_id, &json!({ "grace_seconds": 0 })));
    assert_eq!(send(&gateway, &of_old, "t"), 401);
    assert_eq!(send(&gateway, &rotated.secret, "t"), 401);
    let of_new = token(&gateway, "press-4", &rotated_again.id, &json!({}));
    assert_eq!(send(&gateway, &of_new, "t"), 200);
    gateway.delete("press-4");
    gateway.create_open("press-4");
    assert_eq!(send(&gateway, &of_new, "t"), 401);
}

#[test]
fn a_token_is_good_after_a_restart_and_on_no_other_gateway() {
    let dir = scratch();
    let setup = Setup::embedded_on(dir.path());
    let gateway = setup.start();
    let source = gateway.create_open("press-4");
    let token = token(&gateway, "press-4", &source.key_id, &json!({}));
    gateway.stop();
    let gateway = setup.start();
    assert_eq!(send(&gateway, &token, "t"), 200);
    let elsewhere = scratch();
    let other = Setup::embedded_on(elsewhere.path()).start();
    other.create_open("press-4");
    assert_eq!(send(&other, &token, "t"), 401);
    // It has made one itself, and knows the difference.
    let made = other.get("/v1/datasources/press-4/keys", &other.admin_key()).json();
    let key_id = made["keys"][0]["id"].as_str().expect("an id").to_owned();
    self::token(&other, "press-4", &key_id, &json!({}));
    assert_eq!(send(&other, &token, "t"), 401);
    assert!(refusal(&other, "unknown_token").is_some());
    assert_eq!(send(&other, &token[..token.len() - 3], "t"), 401);
    assert!(refusal(&other, "damaged_token").is_some());
}

#[test]
fn a_token_manages_nothing_and_signs_nobody_in() {
    let (_dir, gateway, _) = scene();
    let admin_key_id = gateway.get("/v1/connect", &gateway.admin_key()).json()["key"]["id"].clone();
    let of_admin = token(&gateway, "*", admin_key_id.as_str().expect("an id"), &json!({}));
    assert_eq!(send(&gateway, &of_admin, "t"), 200);
    for (method, path) in [
        ("GET", "/v1/datasources"),
        ("GET", "/v1/datasources/press-4"),
        ("DELETE", "/v1/datasources/press-4"),
        ("GET", "/v1/datasources/press-4/keys"),
        ("GET", "/v1/datasources/press-4/quarantine"),
        ("GET", "/v1/datasources/press-4/sessions"),
        ("GET", "/v1/refusals"),
        ("GET", "/v1/audit"),
        ("GET", "/v1/live"),
        ("GET", "/v1/connect"),
        ("POST", "/v1/session"),
        ("GET", "/v1/datasources/press-4/export"),
    ] {
        let answer = gateway.request(method, path, &of_admin, &[], &[]);
        assert_eq!(
            (answer.status, &answer.json()["type"]),
            (403, &json!("/problems/beyond_token")),
            "{method} {path}"
        );
        assert!(!answer.headers.contains_key("set-cookie"), "{path}");
    }
    assert_eq!(gateway.get("/v1/datasources/press-4/latest?incarnation=7", &of_admin).status, 403);
}

#[test]
fn a_token_for_all_datasources_names_them_in_its_topics() {
    let (_dir, gateway, _) = scene();
    let second = gateway.create_open("press-5");
    let all = create_key(&gateway, "*", &json!({ "scopes": ["ingest", "subscribe"] }));
    let narrow = token(&gateway, "*", &all.id, &json!({ "topics": ["press-4/a/#"] }));
    assert_eq!((send(&gateway, &narrow, "a/b"), send(&gateway, &narrow, "z")), (200, 403));
    let elsewhere = gateway.post("/v1/ingest/press-5/a/b", &narrow, &json!({}));
    assert_eq!(elsewhere.status, 403, "{}", elsewhere.text());
    assert_eq!(gateway.post("/v1/ingest/press-5/a/b", &second.key, &json!({})).status, 200);
    gateway.stored("press-5", 1);
    gateway.stored("press-4", 1);
    assert_eq!(
        gateway.get("/v1/datasources/press-4/records", &narrow).json()["records"]
            .as_array()
            .expect("a list")
            .len(),
        1
    );
    assert_eq!(gateway.get("/v1/datasources/press-5/records", &narrow).status, 403);
    assert_eq!(gateway.get("/v1/datasources/press-5/latest", &narrow).json()["topics"], json!([]));
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &narrow);
    wire.send(&subscribe(Version::V5, 1, &["press-4/a/#", "#", "press-4/#", "press-5/a/#"]));
    assert_eq!(wire.packet(9).codes(Version::V5), [1, 0x87, 0x87, 0x87]);
    assert_eq!(wire.publish(Version::V5, 2, "press-5/a/b", b"1"), 0x87);
    wire.send(&publish_with(Version::V5, 3, "press-4/a/c", &[], b"1"));
    let mut seen = Vec::new();
    while seen.len() < 2 {
        if let Next::Packet(frame) = wire.next() {
            seen.push(frame.kind());
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, [PUBLISH, PUBACK]);
}

#[test]
fn a_key_in_the_url_of_a_stream_is_refused_as_ever_and_so_is_a_token_elsewhere() {
    let (_dir, gateway, source) = scene();
    let token = token(&gateway, "press-4", &source.key_id, &json!({}));
    for path in [
        format!("{STREAM}?access_token={}", source.key),
        format!("{STREAM}?token={token}"),
        format!("{STREAM}?access_token={token}&access_token={token}"),
        format!("/v1/datasources/press-4/records?access_token={token}"),
        format!("/v1/datasources/press-4/latest?topic={token}"),
        format!("/v1/datasources/{token}/records"),
    ] {
        let answer = gateway.get(&path, "");
        assert_eq!((answer.status, &answer.json()["type"]), (401, &json!("/problems/key_in_url")), "{path}");
        assert!(!answer.text().contains(&token[4..24]) && !answer.text().contains(&source.key));
    }
    // Beside a key in a header it has to be what that is.
    let answer = gateway.get(&format!("{STREAM}?access_token={token}"), &source.key);
    assert_eq!(answer.status, 401, "two of them");
    let refused = gateway.get(&format!("{STREAM}?access_token={token}x"), "");
    assert_eq!((refused.status, refused.headers["referrer-policy"].as_str()), (401, "no-referrer"));
    assert_eq!(refused.headers["cache-control"], "no-store");
}

#[test]
fn the_command_makes_a_token() {
    let (dir, gateway, source) = scene();
    let run = |arguments: &[&str]| {
        let setup = Setup::on(dir.path()).with_env("HEADGATE_URL", &format!("http://{}", gateway.http));
        let output = setup.with_env("HEADGATE_DATA_DIR", &dir.path().display().to_string()).run(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    let of = ["key", "token", "press-4", &source.key_id, "--ttl", "5m", "--topic", "a/#", "--topic", "b"];
    let shown = run(&of);
    for words in ["hgt_", "a/#, b", "ingest, subscribe", "EventSource"] {
        assert!(shown.contains(words), "{shown}");
    }
    let made: Value = serde_json::from_str(&run(&[&of[..], &["--json"]].concat())).expect("JSON");
    let token = made["token"].as_str().expect("a token");
    assert_eq!((send(&gateway, token, "a/x"), send(&gateway, token, "c")), (200, 403));
}

#[test]
fn no_token_is_written_anywhere() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("trace.filter", "trace").start();
    let source = gateway.create_open("press-4");
    let token = token(&gateway, "press-4", &source.key_id, &json!({}));
    let mut answers = vec![gateway.get(&format!("{STREAM}?tail=x&access_token={token}"), "")];
    assert_eq!(send(&gateway, &token, "t"), 200);
    let mut stream = EventStream::ask_with(gateway.http, &format!("{STREAM}?access_token={token}"), &[])
        .expect("an answer");
    stream.event().expect("it says where it begins");
    for path in
        [format!("/v1/ingest/press-4/{token}"), format!("/v1/ingest/{token}"), format!("/{token}?{token}")]
    {
        answers.push(gateway.post(&path, &source.key, &json!({})));
    }
    let damaged = format!("{token}0");
    answers.push(gateway.get(&format!("{STREAM}?access_token={damaged}"), ""));
    answers.push(gateway.post("/v1/ingest/press-4", &damaged, &json!({})));
    let named = Connect { client_id: token.clone(), ..Connect::with_key(Version::V5, &source.key) };
    let mut wire = Wire::open(gateway.mqtt);
    wire.send(&named.packet());
    assert_eq!(wire.packet(CONNACK).reason(), 0x85, "no place for it");
    let mut device = Wire::login(gateway.mqtt, Version::V5, &token);
    device.publish(Version::V5, 1, &format!("a/{token}"), b"1");
    answers.push(gateway.get("/v1/refusals", &gateway.admin_key()));
    answers.push(gateway.get("/metrics", &gateway.admin_key()));
    answers.push(gateway.get("/v1/audit", &gateway.admin_key()));
    wait_for("the record", || (gateway.records("press-4").len() == 1).then_some(()));
    let output = gateway.output();
    let parts: Vec<&str> = vec![&token[4..20], &token[token.len() - 20..]];
    for part in &parts {
        assert!(!output.contains(part), "the log has it");
        for answer in &answers {
            assert!(!answer.text().contains(part), "{}", answer.text());
        }
    }
    drop((stream, device));
    gateway.stop();
    let mut left = vec![dir.path().to_owned()];
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(
                std::fs::read_dir(&path).expect("readable").map(|entry| entry.expect("an entry").path()),
            );
            continue;
        }
        let bytes = std::fs::read(&path).expect("readable");
        for part in &parts {
            assert!(!bytes.windows(part.len()).any(|window| window == part.as_bytes()), "{}", path.display());
        }
    }
}
