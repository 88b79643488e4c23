//! Refusals, from the outside: a person finds out why a device does not get in, nobody finds a secret,
//! and guessing keys is cheap to refuse.

use std::process::{Command, Stdio};

use crate::common::wire::{CONNACK, Connect, REASON_STRING, VERSIONS, Version, Wire, publish};
use crate::common::{Gateway, Setup, Source, scratch, wait_for};
use Version::{V5, V311};
use headgate::testing::ApiKey;
use serde_json::{Value, json};

/// A gateway that never tells this machine to wait.
fn patient(dir: &std::path::Path) -> Gateway {
    Setup::on(dir).set("auth.failures_exempt", "[\"127.0.0.0/8\"]").start()
}

fn refusals(gateway: &Gateway, query: &str) -> Vec<Value> {
    let answer = gateway.get(&format!("/v1/refusals?{query}"), &gateway.admin_key());
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["refusals"].as_array().expect("a list").clone()
}

/// The one refusal that a query finds.
fn only(gateway: &Gateway, query: &str) -> Value {
    let found = refusals(gateway, query);
    assert_eq!(found.len(), 1, "{query}: {found:?}");
    found.into_iter().next().expect("one")
}

/// Connects and has to be refused; the CONNACK's code.
fn refused(gateway: &Gateway, version: Version, client_id: &str, key: &str) -> u8 {
    let mut wire = Wire::open(gateway.mqtt);
    let connect = Connect { client_id: client_id.to_owned(), ..Connect::with_key(version, key) };
    wire.send(&connect.packet());
    let connack = wire.packet(CONNACK);
    assert_ne!(connack.reason(), 0);
    wire.closed();
    connack.reason()
}

fn revoke(gateway: &Gateway, source: &Source) {
    let path = format!("/v1/datasources/{}/keys/{}", source.id, source.key_id);
    assert_eq!(gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]).status, 204);
}

#[test]
fn a_device_that_does_not_get_in_is_listed_with_the_cause_and_what_to_do() {
    let dir = scratch();
    let gateway = patient(dir.path());
    let (good, revoked) = (gateway.create("press-4"), gateway.create("saw"));
    revoke(&gateway, &revoked);
    let unknown = ApiKey::generate();
    let unknown = unknown.expose();
    let wrong = if good.key.as_bytes()[9] == b'x' { 'y' } else { 'x' };
    let misspelt = format!("{}{wrong}{}", &good.key[..9], &good.key[10..]);
    let cases = [
        ("d-revoked", revoked.key.as_str(), "revoked_key", "was revoked at 20"),
        ("d-unknown", unknown, "unknown_key", "never given out"),
        ("d-misspelt", &misspelt, "malformed_key", "copy it again"),
        ("d-cut", &good.key[..30], "malformed_key", "cut short"),
        ("d-other", "a-password", "malformed_key", "no Headgate key"),
        ("d-none", "", "no_key", "send a key"),
    ];
    for (client, key, cause, advice) in cases {
        for version in VERSIONS {
            refused(&gateway, version, client, key);
        }
        let entry = only(&gateway, &format!("client={client}"));
        assert_eq!((&entry["cause"], &entry["count"]), (&json!(cause), &json!(2)), "{entry}");
        assert_eq!((&entry["address"], &entry["transport"]), (&json!("127.0.0.1"), &json!("mqtt")));
        assert!(entry["advice"].as_str().expect("words").contains(advice), "{entry}");
        assert!(entry["first_at"].as_str() < entry["last_at"].as_str(), "{entry}");
        let unknown_key = matches!(cause, "unknown_key" | "malformed_key");
        assert_eq!(entry.get("key_shape").is_some(), unknown_key, "{entry}");
        assert_eq!(entry.get("key_id").is_some(), cause == "revoked_key", "{entry}");
    }
    let shape = &only(&gateway, "client=d-unknown")["key_shape"];
    assert_eq!(shape, &json!({ "length": "right", "prefix": true, "checksum": "right" }));
    let shape = &only(&gateway, "client=d-misspelt")["key_shape"];
    assert_eq!(shape, &json!({ "length": "right", "prefix": true, "checksum": "wrong" }));
    assert_eq!(only(&gateway, "client=d-revoked")["key_id"], revoked.key_id);
    // Filters go together; the newest comes first; there are as many as asked for.
    assert_eq!(refusals(&gateway, "address=127.0.0.1&cause=malformed_key").len(), 3);
    assert_eq!(refusals(&gateway, "address=127.0.0.2").len(), 0);
    assert_eq!(refusals(&gateway, "limit=1")[0]["client"], "d-none");
    // And nowhere is anything of a key.
    let all = gateway.get("/v1/refusals", &gateway.admin_key()).text();
    for key in [&good.key, &revoked.key, unknown] {
        assert!(!all.contains(&key[4..16]) && !gateway.output().contains(&key[4..16]));
    }
}

#[test]
fn a_message_and_a_request_that_are_refused_are_listed_with_key_and_datasource() {
    let dir = scratch();
    let gateway = patient(dir.path());
    let source = gateway.create("press-4");
    let connect = Connect { client_id: "d-1".to_owned(), ..Connect::with_key(V5, &source.key) };
    let (mut wire, _) = Wire::connect(gateway.mqtt, &connect);
    assert_eq!(wire.publish(V5, 1, "$SYS/x", b"x"), 0x90);
    let entry = only(&gateway, "client=d-1");
    assert_eq!(
        (&entry["cause"], &entry["datasource"], &entry["key_id"]),
        (&json!("topic"), &json!("press-4"), &json!(source.key_id))
    );
    let other = gateway.create("saw");
    assert_eq!(gateway.post("/v1/ingest/saw", &source.key, &json!(1)).status, 401);
    let entry = only(&gateway, "datasource=saw");
    assert_eq!(
        (&entry["cause"], &entry["transport"], &entry["key_id"]),
        (&json!("other_datasource"), &json!("http"), &json!(source.key_id))
    );
    // One that is over a limit says which and how long.
    let rate = json!({ "limits": { "messages_per_s": { "max": 1, "burst": 1 } } }).to_string();
    let answer = gateway.request("PATCH", "/v1/datasources/saw", &gateway.admin_key(), &[], rate.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let over = || gateway.post("/v1/ingest/saw", &other.key, &json!([1, 2, 3])).status == 429;
    wait_for("a 429", || over().then_some(()));
    let entry = only(&gateway, "datasource=saw&cause=limit_messages_per_s");
    assert_eq!(entry["limit"]["name"], "messages_per_s");
    assert_eq!((&entry["limit"]["max"], &entry["limit"]["of"]), (&json!(1), &json!("datasource saw")));
    assert!(entry["limit"]["wait_seconds"].as_f64().is_some_and(|wait| wait > 0.0), "{entry}");
    assert!(entry["advice"].as_str().expect("words").contains("wait"), "{entry}");
}

#[test]
fn a_client_that_calls_itself_by_its_key_is_not_shown() {
    let dir = scratch();
    let gateway = patient(dir.path());
    let source = gateway.create("press-4");
    revoke(&gateway, &source);
    refused(&gateway, V5, &source.key, &source.key);
    refused(&gateway, V311, &source.key[4..], &source.key);
    let all = gateway.get("/v1/refusals", &gateway.admin_key()).text();
    assert!(all.contains("not shown") && !all.contains(&source.key[8..20]), "{all}");
    // Nor a key that stands where a datasource is named.
    let (admin, scopes) = (gateway.admin_key(), json!({ "scopes": ["ingest"] }));
    let everywhere = gateway.post("/v1/datasources/*/keys", &admin, &scopes).json();
    let everywhere = everywhere["key"]["secret"].as_str().expect("a secret");
    let mut wire = Wire::login(gateway.mqtt, V5, everywhere);
    assert_eq!(wire.publish(V5, 1, &format!("{everywhere}/t"), b"x"), 0x90);
    let all = gateway.get("/v1/refusals", &admin).text();
    assert!(all.contains("\"topic\"") && !all.contains(&everywhere[8..20]), "{all}");
    assert!(!gateway.output().contains(&everywhere[8..20]));
}

#[test]
fn guessing_is_told_to_wait_and_a_good_key_from_the_same_address_is_let_in() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("auth.failures_burst", 5).start();
    let source = gateway.create("press-4");
    let guess = |key: &str| gateway.post("/v1/ingest/press-4", key, &json!(1));
    let answers: Vec<_> = (0..10).map(|_| guess(ApiKey::generate().expose())).collect();
    assert!(answers[..5].iter().all(|answer| answer.status == 401), "within the burst");
    let waiting = answers.iter().find(|answer| answer.status == 429).expect("over it");
    assert_eq!(waiting.headers["retry-after"], "1");
    assert_eq!(waiting.json()["type"], "/problems/too_many_requests");

    // What is no key at all, two at once, and MQTT count together with it.
    let too_many = |answer: u8, version| answer == if version == V5 { 0x9F } else { 3 };
    for version in VERSIONS {
        for key in ["password", ApiKey::generate().expose()] {
            wait_for("to be told to wait", || {
                too_many(refused(&gateway, version, "guesser", key), version).then_some(())
            });
        }
    }
    assert_eq!(guess(&source.key).status, 200, "a good key");
    for version in VERSIONS {
        let mut wire = Wire::login(gateway.mqtt, version, &source.key);
        assert_eq!(wire.publish(version, 1, "t", b"x"), 0);
    }
    // Who sends no key has guessed nothing.
    assert_eq!(guess("").status, 401);
    assert!(!refusals(&gateway, "cause=too_many_failures").is_empty());
    let lines = gateway.output();
    assert!(!lines.contains("too_many_failures"), "a flood writes no log at the usual level: {lines}");
}

#[test]
fn a_key_of_a_message_that_is_guessed_counts_too() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("auth.failures_burst", 2).start();
    let source = gateway.create("press-4");
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    let mut guess = |id| {
        let guessed = ApiKey::generate();
        let property = crate::common::wire::user_property("x-api-key", guessed.expose());
        wire.send(&crate::common::wire::publish_with(V5, id, "t", &property, b"x"));
        let puback = wire.packet(crate::common::wire::PUBACK);
        (puback.reason(), puback.text(REASON_STRING).unwrap_or_default())
    };
    assert_eq!((guess(1).0, guess(2).0), (0x87, 0x87));
    let (reason, words) = guess(3);
    assert_eq!(reason, 0x97, "{words}");
    assert!(words.contains("wait"), "{words}");
    wire.send(&publish(V5, 9, "t", b"x"));
    assert_eq!(wire.packet(crate::common::wire::PUBACK).reason(), 0, "the connection's own key is good");
}

#[test]
fn only_who_manages_sees_refusals_and_a_datasources_admin_its_own() {
    let dir = scratch();
    let gateway = patient(dir.path());
    let source = gateway.create("press-4");
    let scopes = json!({ "scopes": ["admin"] });
    let created = gateway.post("/v1/datasources/press-4/keys", &gateway.admin_key(), &scopes).json();
    let admin_of_one = created["key"]["secret"].as_str().expect("a secret");
    let status = |query: &str, key: &str| gateway.get(&format!("/v1/refusals{query}"), key).status;
    assert_eq!(status("", ""), 401);
    assert_eq!(status("", &source.key), 403);
    assert_eq!(status("?datasource=press-4", &source.key), 403);
    assert_eq!(status("", admin_of_one), 403);
    assert_eq!(status("?datasource=press-4", admin_of_one), 200);
    assert_eq!(status("?datasource=other", admin_of_one), 401);
    assert_eq!(status("?colour=red", &gateway.admin_key()), 400);
    assert_eq!(status("?address=here", &gateway.admin_key()), 400);
    assert_eq!(status("?limit=0", &gateway.admin_key()), 400);
    assert_eq!(status("?limit=4097", &gateway.admin_key()), 400);
    assert_eq!(status("?limit=4096", &gateway.admin_key()), 200);
}

#[test]
fn the_command_prints_what_was_refused_and_what_to_do() {
    let dir = scratch();
    let gateway = patient(dir.path());
    let headgate = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_headgate"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HEADGATE_")) {
            command.env_remove(name);
        }
        command.env("HEADGATE_URL", format!("http://{}", gateway.http));
        command.env("HEADGATE_DATA_DIR", gateway.dir()).arg("refusals").args(args).stdin(Stdio::null());
        let output = command.output().expect("headgate runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    assert!(headgate(&["--client", "d-1"]).contains("nothing"), "nothing of it yet");
    refused(&gateway, V5, "d-1", "a-password");
    refused(&gateway, V5, "d-2", "");
    let all = headgate(&[]);
    assert!(all.contains("d-1") && all.contains("d-2") && all.contains("what to do"), "{all}");
    let one = headgate(&["--client", "d-1"]);
    assert!(one.contains("malformed_key") && one.contains("127.0.0.1") && !one.contains("d-2"), "{one}");
    let json: Value = serde_json::from_str(&headgate(&["--client", "d-2", "--json"])).expect("JSON");
    assert_eq!(json["refusals"][0]["cause"], "no_key");
}
