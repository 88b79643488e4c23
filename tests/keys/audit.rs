//! The audit: every change with who made it, from where, and what it was; as pages and as NDJSON.

use serde_json::{Value, json};

use crate::common::{Gateway, scratch};
use crate::{audited, create_key, listed, revoke, rotate};

#[test]
fn every_change_over_http_is_told_with_the_key_and_the_address_it_came_from() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let admin = listed(&gateway, "*")[0]["id"].clone();
    let source = gateway.create("press-4");
    let key = create_key(&gateway, "press-4", &json!({ "label": "line 2" }));
    rotate(&gateway, "press-4", &source.key_id, &json!({}));
    rotate(&gateway, "press-4", &source.key_id, &json!({ "undo": true }));
    revoke(&gateway, "press-4", &key.id);
    gateway.delete("press-4");
    let entries = audited(&gateway);
    let actions: Vec<_> = entries.iter().map(|entry| entry["action"].as_str().expect("a word")).collect();
    assert_eq!(
        actions,
        [
            "key.created",
            "datasource.created",
            "key.created",
            "key.rotated",
            "key.rotation_undone",
            "key.revoked",
            "datasource.deleted",
        ]
    );
    assert_eq!((&entries[0]["who"], &entries[0]["address"]), (&json!("system"), &Value::Null));
    for entry in &entries[1..] {
        assert_eq!((&entry["who"], &entry["address"]), (&admin, &json!("127.0.0.1")), "{entry}");
        assert_eq!(entry["datasource"], "press-4");
    }
    assert_eq!(entries[2]["what"]["label"], "line 2");

    // What a crash finds is what was told.
    gateway.kill();
    assert_eq!(audited(&Gateway::start(dir.path())), entries);
}

#[test]
fn it_is_read_page_by_page_between_times_and_line_by_line() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    for number in 0..9 {
        gateway.create(&format!("source-{number}"));
    }
    let admin_key = gateway.admin_key();
    let all = audited(&gateway);
    assert_eq!(all.len(), 10);
    let mut read = Vec::new();
    let mut path = "/v1/audit?limit=4".to_owned();
    loop {
        let page = gateway.get(&path, &admin_key).json();
        read.extend(page["entries"].as_array().expect("a list").clone());
        match &page["next"] {
            Value::Null => break,
            next => path = format!("/v1/audit?limit=4&after={next}"),
        }
    }
    assert_eq!(read, all);

    let text = |value: &Value| value.as_str().expect("a time").to_owned();
    let (from, to) = (text(&all[3]["at"]), text(&all[6]["at"]));
    let page = gateway.get(&format!("/v1/audit?from={from}&to={to}"), &admin_key).json();
    assert_eq!(page["entries"].as_array().expect("a list"), &all[3..6]);

    let lines = |answer: crate::common::Answer| -> Vec<Value> {
        assert_eq!(answer.headers["content-type"], "application/x-ndjson");
        answer.text().lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    };
    assert_eq!(lines(gateway.get("/v1/audit?format=ndjson", &admin_key)), all);
    let asked = [("accept", "application/x-ndjson")];
    assert_eq!(lines(gateway.request("GET", "/v1/audit?limit=2", &admin_key, &asked, &[])), all[..2]);
    for bad in ["limit=0", "limit=10001", "from=yesterday", "format=csv", "since=1"] {
        assert_eq!(gateway.get(&format!("/v1/audit?{bad}"), &admin_key).status, 400, "{bad}");
    }
}

#[test]
fn it_is_for_those_who_manage_everything() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let of_one = create_key(&gateway, "press-4", &json!({ "scopes": ["admin"] }));
    let reader = create_key(&gateway, "*", &json!({ "scopes": ["subscribe", "ingest"] }));
    for (key, status) in [("", 401), (&*source.key, 403), (&*of_one.secret, 403), (&*reader.secret, 403)] {
        assert_eq!(gateway.get("/v1/audit", key).status, status);
    }
}
