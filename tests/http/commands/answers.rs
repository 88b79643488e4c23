//! What the commands answer: JSON wherever they answer, all of a datasource, ids of names in any script, limits.

use serde_json::{Value, json};

use crate::cli::{fails_with, prints, to};
use crate::common::{Gateway, scratch};

fn json_of(gateway: &Gateway, args: &[&str]) -> Value {
    serde_json::from_str(&prints(&mut to(gateway, &[args, &["--json"]].concat()))).expect("JSON")
}

#[test]
fn a_name_becomes_an_id_by_its_sound() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    for (name, id) in [
        ("Ünï", "uni"),
        ("Größe/Halle Süd", "grosse-halle-sud"),
        ("Пресс 4", "press-4"),
        ("Łódź", "lodz"),
        ("  -- ", ""),
        ("\u{e000}", ""),
    ] {
        let mut command = to(&gateway, &["datasource", "create", "--json", "--", name]);
        if id.is_empty() {
            fails_with(&mut command, &[3]);
            continue;
        }
        let created: Value = serde_json::from_str(&prints(&mut command)).expect("JSON");
        assert_eq!(created["datasource"]["id"], id, "{name}");
        assert_eq!(created["datasource"]["name"], name);
    }
}

#[test]
fn a_datasource_is_shown_with_all_that_is_asked_about_it() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let shown = prints(&mut to(&gateway, &["datasource", "show", "press-4"]));
    assert!(shown.contains("none is stored") && shown.contains("no limit is set"), "{shown}");
    assert_eq!(gateway.post("/v1/ingest/press-4/spindle/temp", &source.key, &json!(21.5)).status, 200);
    gateway.stored("press-4", 1);
    let limit = ["datasource", "limit", "press-4", "--set", "messages_per_s=100,burst=200,policy=reject"];
    let set = json_of(&gateway, &limit);
    let expected = json!({ "messages_per_s": { "max": 100, "burst": 200, "policy": "reject" } });
    assert_eq!(set, expected);
    assert_eq!(json_of(&gateway, &["datasource", "limit", "press-4"]), expected);
    let shown = prints(&mut to(&gateway, &["datasource", "show", "press-4"]));
    let http = format!("http://{}/v1/ingest/press-4/", gateway.http);
    let mqtt = format!("mqtt://{}", gateway.mqtt);
    for words in [
        http.as_str(),
        &mqtt,
        "1 accepted and 0 refused",
        "on spindle/temp, offset ",
        &source.key_id,
        "messages_per_s",
        "mosquitto_pub",
        "mosquitto_sub",
        "curl",
    ] {
        assert!(shown.contains(words), "{words}: {shown}");
    }
    assert!(!shown.contains("hgk_"), "{shown}");
    let unset = json_of(&gateway, &["datasource", "limit", "press-4", "--unset", "messages_per_s"]);
    assert_eq!(unset, json!({}));
    let key = ["key", "limit", "press-4", source.key_id.as_str()];
    let set =
        json_of(&gateway, &[&key[..], &["--set", "payload_bytes=10", "--set", "connections=2"]].concat());
    assert_eq!(set["payload_bytes"]["max"], 10);
    assert!(prints(&mut to(&gateway, &key)).contains("payload_bytes"));
    assert_eq!(json_of(&gateway, &key), set);
    let wrong = [&key[..], &["--set", "stored_bytes=1"]].concat();
    let said = fails_with(&mut to(&gateway, &wrong), &[3]);
    assert!(said.contains("only datasources have it"), "{said}");
}

#[test]
fn the_keys_of_all_datasources_are_one_list() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let ids = ["a", "b"].map(|id| gateway.create(id).key_id);
    let table = prints(&mut to(&gateway, &["key", "list", "--all"]));
    for words in ids.iter().map(String::as_str).chain(["│ *", "│ a", "│ b", "admin"]) {
        assert!(table.contains(words), "{words}:\n{table}");
    }
    let lines = prints(&mut to(&gateway, &["key", "list", "--all", "--json"]));
    let owners: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON")["datasource"].take())
        .collect();
    assert_eq!(owners, ["*", "a", "b"]);
}

#[test]
fn what_was_done_is_told_as_json_where_it_is_asked_for() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let published = {
        let mut command = to(&gateway, &["publish", "press-4", "t", "1", "--json"]);
        command.env("HEADGATE_API_KEY", &source.key);
        serde_json::from_str::<Value>(&prints(&mut command)).expect("JSON")
    };
    assert_eq!((&published["acked"], &published["topic"]), (&json!(1), &json!("t")));
    gateway.stored("press-4", 1);
    assert_eq!(json_of(&gateway, &["records", "press-4"])["topic"], "t");
    let revoked = json_of(&gateway, &["key", "revoke", "press-4", &source.key_id]);
    let expected = json!({
        "datasource": "press-4", "key_id": source.key_id, "revoked": true, "durable": true, "detail": null,
    });
    assert_eq!(revoked, expected);
    let redriven = json_of(&gateway, &["quarantine", "redrive", "press-4"]);
    assert_eq!(redriven["redriven"], 0);
    let elsewhere = scratch();
    let backup = elsewhere.path().join("backup");
    let made = json_of(&gateway, &["backup", backup.to_str().expect("text"), "--fast"]);
    assert!(made["files"].as_u64().is_some_and(|files| files > 0), "{made}");
    let purged = json_of(&gateway, &["datasource", "delete", "press-4", "--purge"]);
    assert_eq!((&purged["records"], &purged["done"]), (&json!(1), &json!(true)), "{purged}");
}

/// Whoever rotated the admin key with the commands locked himself out when the grace was over.
#[test]
fn a_rotated_admin_key_is_in_its_file_and_an_undone_one_too() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let keys = json_of(&gateway, &["key", "list", "*"]);
    let first = keys["keys"][0]["id"].as_str().expect("an id").to_owned();
    let before = gateway.admin_key();
    let said = prints(&mut to(&gateway, &["key", "rotate", "*", &first, "--grace", "1h"]));
    assert!(said.contains("admin.key has the new key now"), "{said}");
    let after = gateway.admin_key();
    assert!(after != before && said.contains(&after), "{said}");
    let said = prints(&mut to(&gateway, &["key", "rotate", "*", &first, "--undo"]));
    assert!(said.contains("has the old key again"), "{said}");
    assert_eq!(gateway.admin_key(), before);
    let rotated = json_of(&gateway, &["key", "rotate", "*", &first, "--grace", "0"]);
    assert_eq!(rotated["key"]["secret"], gateway.admin_key());
    prints(&mut to(&gateway, &["datasource", "list"]));
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(gateway.dir().join("admin.key")).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // A key of a datasource is none of it.
    let source = gateway.create("press-4");
    prints(&mut to(&gateway, &["key", "rotate", "press-4", &source.key_id]));
    assert_eq!(rotated["key"]["secret"], gateway.admin_key());
}
