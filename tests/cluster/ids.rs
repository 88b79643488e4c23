//! Ids of messages in a cluster, where JetStream has every one for its time: how many a datasource may bring, and what is
//! kept once although two gateways bring it at once.

use std::path::Path;

use serde_json::{Value, json};

use crate::common::kept::in_storage;
use crate::common::nats::NatsServer;
use crate::common::wire::{Message, PUBACK, Version::V5, Wire, user_property};
use crate::common::{Gateway, Setup, scratch};

const QUOTA_EXCEEDED: u8 = 0x97;
const IMPLEMENTATION_SPECIFIC: u8 = 0x83;

fn setup(dir: &Path, server: &NatsServer) -> Setup {
    Setup::embedded_on(dir)
        .set("log.backend", "jetstream")
        .set("nats.servers", format!("[\"{}\"]", server.url()))
}

/// The reason code for a message with an id.
fn reason(wire: &mut Wire, payload: &str, id: &str) -> u8 {
    let message = Message::new("t", payload).at(1, 7).with(&user_property("message-id", id));
    wire.send(&message.packet(V5));
    wire.packet(PUBACK).reason()
}

#[test]
fn who_brings_more_ids_than_are_remembered_is_told_so_and_a_repetition_and_the_others_are_let_in() {
    let (server, dir) = (NatsServer::start(), scratch());
    let gateway = setup(dir.path(), &server).set("intake.dedup_ids_per_datasource_max", 5).start();
    let (press, oven) = (gateway.create("press-4"), gateway.create("oven"));
    let mut wire = Wire::login(gateway.mqtt, V5, &press.key);
    for n in 0..5 {
        assert_eq!(reason(&mut wire, &n.to_string(), &format!("id-{n}")), 0);
    }
    // A repetition brings no new one, before and after that, and another message with a known id is told so.
    for _ in 0..2 {
        assert_eq!(reason(&mut wire, "3", "id-3"), 0);
        assert_eq!(reason(&mut wire, "other", "id-3"), IMPLEMENTATION_SPECIFIC);
        // Without an ack: with that the client would forget the message.
        wire.send(&Message::new("t", "5").at(1, 7).with(&user_property("message-id", "id-5")).packet(V5));
        wire.disconnected(QUOTA_EXCEEDED);
        wire = Wire::login(gateway.mqtt, V5, &press.key);
    }
    let again = [("idempotency-key", "id-4")];
    let posted = |key: &str, headers: &[(&str, &str)], path: &str, body: &[u8]| {
        gateway.request("POST", path, key, headers, body)
    };
    let known = posted(&press.key, &again, "/v1/ingest/press-4/t", b"4");
    assert_eq!((known.status, &known.json()["duplicate"]), (200, &json!(true)), "{}", known.text());
    let refused = posted(&press.key, &[("idempotency-key", "id-6")], "/v1/ingest/press-4/t", b"6");
    assert_eq!(refused.status, 429, "{}", refused.text());
    assert!(refused.text().contains("intake.dedup_ids_per_datasource_max"), "{}", refused.text());
    let refusals = gateway.get("/v1/refusals", &gateway.admin_key()).text();
    assert!(refusals.contains("\"cause\":\"limit_ids\""), "{refusals}");
    // A QoS 2 message has an id there too.
    wire.send(&Message::new("t", "7").at(2, 9).packet(V5));
    wire.disconnected(QUOTA_EXCEEDED);
    let mut wire = Wire::login(gateway.mqtt, V5, &press.key);
    // Without an id there is nothing to remember, and another datasource has its own.
    wire.send(&Message::new("t", "8").at(1, 7).packet(V5));
    assert_eq!(wire.packet(PUBACK).reason(), 0);
    let mut other = Wire::login(gateway.mqtt, V5, &oven.key);
    assert_eq!(reason(&mut other, "9", "id-6"), 0);
    let stored = gateway.stored("press-4", 6);
    let mut payloads: Vec<_> = stored.iter().map(|record| record["payload"].as_u64()).collect();
    payloads.sort_unstable();
    assert_eq!(payloads, [0, 1, 2, 3, 4, 8].map(Some));
}

#[test]
fn what_two_gateways_redrive_at_once_comes_in_once() {
    const MESSAGES: usize = 300;
    let (server, dirs) = (NatsServer::start(), [scratch(), scratch()]);
    let gateways = dirs.each_ref().map(|dir| setup(dir.path(), &server).start());
    let admin = gateways[0].admin_key();
    // The first gateway of a cluster has it; the second one is asked for its metrics with it too.
    std::fs::write(dirs[1].path().join("admin.key"), &admin).expect("written");
    let source = gateways[0].create("press-4");
    let set = |schemas: &Value| {
        let json = [("content-type", "application/json")];
        let (path, body) = ("/v1/datasources/press-4/schema", json!({ "schemas": schemas }).to_string());
        let set = gateways[0].request("PUT", path, &admin, &json, body.as_bytes());
        assert_eq!(set.status, 200, "{}", set.text());
    };
    set(&json!([{ "filter": "#", "schema": { "type": "null" } }]));
    for n in 0..MESSAGES {
        let sent = gateways[n % 2].post("/v1/ingest/press-4/t", &source.key, &json!({ "n": n }));
        assert_eq!(sent.status, 422, "{}", sent.text());
    }
    set(&json!([]));
    gateways.iter().for_each(Gateway::settle);
    let redriven: u64 = std::thread::scope(|scope| {
        let redrives: Vec<_> = (0..6)
            .map(|n| {
                let (gateway, admin) = (&gateways[n % 2], &admin);
                scope.spawn(move || {
                    let path = "/v1/datasources/press-4/quarantine/redrive";
                    let answer = gateway.post(path, admin, &json!({}));
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    answer.json()["redriven"].as_u64().expect("a number")
                })
            })
            .collect();
        redrives.into_iter().map(|redrive| redrive.join().expect("no panic")).sum()
    });
    assert_eq!(redriven, MESSAGES as u64);
    for (gateway, dir) in gateways.iter().zip(&dirs) {
        gateway.settle();
        assert_eq!(in_storage(dir.path()).len(), MESSAGES);
    }
}
