//! The commands that look after keys, as an operator runs them.

use std::process::{Command, Output};

use serde_json::Value;

use crate::common::{Gateway, scratch};
use crate::{listed, post};

fn headgate(gateway: &Gateway, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headgate"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HEADGATE_")) {
        command.env_remove(name);
    }
    command.env("HEADGATE_URL", format!("http://{}", gateway.http)).env("HEADGATE_DATA_DIR", gateway.dir());
    command.args(arguments).output().expect("headgate runs")
}

fn told(gateway: &Gateway, arguments: &[&str]) -> String {
    let output = headgate(gateway, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn json(gateway: &Gateway, arguments: &[&str]) -> Value {
    serde_json::from_str(&told(gateway, &[arguments, &["--json"]].concat())).expect("JSON")
}

#[test]
fn an_operator_rotates_a_key_sees_who_uses_it_and_undoes_it() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    assert_eq!(post(&gateway, "press-4", &source.key), 200);
    let rotated = json(&gateway, &["key", "rotate", "press-4", &source.key_id, "--grace", "2h"]);
    let secret = rotated["key"]["secret"].as_str().expect("shown once").to_owned();
    assert_eq!(post(&gateway, "press-4", &secret), 200);

    let table = told(&gateway, &["key", "list", "press-4", "--wide"]);
    let offset = format!("offset {}", crate::common::cluster::first_offset());
    for word in ["rotating until", "active", "127.0.0.1", "http", &offset, &source.key_id] {
        assert!(table.contains(word), "{word} in\n{table}");
    }
    let keys = json(&gateway, &["key", "list", "press-4"]);
    assert_eq!(keys["keys"].as_array().map(Vec::len), Some(2));

    let undone = told(&gateway, &["key", "rotate", "press-4", &source.key_id, "--undo"]);
    assert!(undone.contains("lives on"), "{undone}");
    assert_eq!((post(&gateway, "press-4", &source.key), post(&gateway, "press-4", &secret)), (200, 401));
    let told = told(&gateway, &["key", "rotate", "press-4", &source.key_id]);
    assert!(told.contains("hgk_") && told.contains("shown once") && told.contains("works until"), "{told}");
    let wrong = headgate(&gateway, &["key", "rotate", "press-4", &source.key_id, "--grace", "soon"]);
    assert!(!wrong.status.success());
}

#[test]
fn keys_for_all_datasources_are_made_listed_and_revoked_as_others() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    gateway.create("a");
    let wanted = ["key", "create", "*", "--scope", "ingest", "--scope", "subscribe", "--label", "fleet"];
    let expires = ["--expires-at", "2099-01-01T00:00:00Z"];
    let created = json(&gateway, &[&wanted[..], &expires].concat());
    let (id, secret) = (created["key"]["id"].as_str(), created["key"]["secret"].as_str());
    let (id, secret) = (id.expect("an id"), secret.expect("a secret"));
    assert_eq!(created["key"]["expires_at"], "2099-01-01T00:00:00.000000Z");
    assert_eq!(post(&gateway, "a", secret), 200);
    let table = told(&gateway, &["key", "list", "*", "--wide"]);
    assert!(table.contains("fleet") && table.contains("active until 2099-01-01"), "{table}");
    told(&gateway, &["key", "revoke", "*", id]);
    assert_eq!(post(&gateway, "a", secret), 401);
    assert_eq!(listed(&gateway, "*").len(), 1);
}

#[test]
fn the_audit_is_a_table_and_an_entry_a_line() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    told(&gateway, &["key", "revoke", "press-4", &source.key_id]);
    let table = told(&gateway, &["audit"]);
    for word in ["datasource.created", "key.revoked", "press-4", "127.0.0.1", "system"] {
        assert!(table.contains(word), "{word} in\n{table}");
    }
    let lines = told(&gateway, &["audit", "--json"]);
    let entries: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(entries.len(), 3);
    let at = entries[2]["at"].as_str().expect("a time");
    assert_eq!(told(&gateway, &["audit", "--json", "--from", at]).lines().count(), 1);
    assert_eq!(told(&gateway, &["audit", "--json", "--to", at]).lines().count(), 2);
}
