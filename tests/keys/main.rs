//! API keys over their lives: rotated, expired, leaked, revoked, and what is told of them. By the real
//! binary, over its sockets.

#[path = "../common/mod.rs"]
mod common;

mod arguments;
mod audit;
mod commands;
mod incarnations;
mod leaks;
mod presented;
mod revocation;
mod rotation;
mod secrets;
mod tokens;

use std::time::Duration;

use common::{Answer, Gateway, wait_for};
use serde_json::{Value, json};

/// The reason of an MQTT 5 DISCONNECT when a key is dead.
const KEY_DEAD: u8 = 0x98;

/// A key that a test has made.
#[derive(Clone)]
struct Made {
    id: String,
    secret: String,
}

impl Made {
    fn of(answer: &Answer) -> Self {
        assert_eq!(answer.status, 201, "{}", answer.text());
        let json = answer.json();
        let text = |name: &str| json["key"][name].as_str().expect("a key with its secret").to_owned();
        Self { id: text("id"), secret: text("secret") }
    }
}

fn create_key(gateway: &Gateway, datasource: &str, wanted: &Value) -> Made {
    let path = format!("/v1/datasources/{datasource}/keys");
    Made::of(&gateway.post(&path, &gateway.admin_key(), wanted))
}

fn revoke(gateway: &Gateway, datasource: &str, key_id: &str) -> Answer {
    let path = format!("/v1/datasources/{datasource}/keys/{key_id}");
    gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[])
}

fn rotate(gateway: &Gateway, datasource: &str, key_id: &str, wanted: &Value) -> Answer {
    let path = format!("/v1/datasources/{datasource}/keys/{key_id}/rotate");
    gateway.post(&path, &gateway.admin_key(), wanted)
}

/// The keys of a datasource, as they are listed.
fn listed(gateway: &Gateway, datasource: &str) -> Vec<Value> {
    let answer = gateway.get(&format!("/v1/datasources/{datasource}/keys"), &gateway.admin_key());
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["keys"].as_array().expect("a list").clone()
}

/// One of them.
fn shown(gateway: &Gateway, datasource: &str, key_id: &str) -> Value {
    let mut keys = listed(gateway, datasource).into_iter();
    keys.find(|key| key["id"] == key_id).unwrap_or_else(|| panic!("key {key_id} is listed"))
}

/// Publishes one message over HTTP: the status.
fn post(gateway: &Gateway, datasource: &str, key: &str) -> u16 {
    gateway.post(&format!("/v1/ingest/{datasource}"), key, &json!({ "value": 1 })).status
}

/// The whole audit, oldest first.
fn audited(gateway: &Gateway) -> Vec<Value> {
    let answer = gateway.get("/v1/audit?limit=10000", &gateway.admin_key());
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["entries"].as_array().expect("a list").clone()
}

/// The entries of the audit for one action on one key.
fn acts(gateway: &Gateway, action: &str, key_id: &str) -> Vec<Value> {
    let mut entries = audited(gateway);
    entries.retain(|entry| entry["action"] == action && entry["key_id"] == key_id);
    entries
}

/// A time this far ahead, as the API takes it.
fn ahead(by: Duration) -> String {
    let at = jiff::Timestamp::now() + by;
    at.to_string()
}

/// Waits until a key is refused over HTTP.
fn refused(gateway: &Gateway, datasource: &str, key: &str) {
    wait_for("the key to be refused", || (post(gateway, datasource, key) == 401).then_some(()));
}
