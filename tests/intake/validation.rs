//! Validation: what the schema of a datasource does to the messages of devices, over every front, and
//! where those go that do not meet it. The readings are recorded ones.

use crate::common::wire::{
    Message, PUBACK, PUBCOMP, PUBREC, PUBREL, REASON_STRING, Version, Wire, ack, publish, user_property,
};
use crate::common::{Gateway, Source, scratch, wait_for};
use serde_json::{Value, json};

/// MQTT 5's reason for a payload that is not what was expected.
const PAYLOAD_FORMAT_INVALID: u8 = 0x99;

/// The readings of the machine whose temperature was recorded until it failed.
fn readings() -> Vec<Value> {
    let csv = include_str!("../fixtures/sensors/machine_temperature_system_failure.csv");
    let reading = |line: &str| {
        let (timestamp, value) = line.split_once(',').expect("two columns");
        let value: f64 = value.parse().expect("a number");
        json!({ "timestamp": format!("{}Z", timestamp.replace(' ', "T")), "value": value })
    };
    csv.lines().skip(1).map(reading).collect()
}

/// What such a reading is, in this machine's range.
fn reading_schema(maximum: f64) -> Value {
    json!({
        "type": "object",
        "required": ["timestamp", "value"],
        "properties": {
            "timestamp": {"type": "string", "format": "date-time"},
            "value": {"type": "number", "maximum": maximum},
        },
    })
}

fn bad() -> Value {
    json!({ "timestamp": "2013-12-02T21:15:00Z", "value": "73.9" })
}

fn set(gateway: &Gateway, id: &str, body: &Value) -> crate::common::Answer {
    let path = format!("/v1/datasources/{id}/schema");
    let headers = [("content-type", "application/json")];
    gateway.request("PUT", &path, &gateway.admin_key(), &headers, body.to_string().as_bytes())
}

/// A gateway whose datasource has a schema, and the datasource.
fn with_schema(dir: &std::path::Path) -> (Gateway, Source) {
    let gateway = Gateway::start(dir);
    let source = gateway.create("press-4");
    let answer = set(&gateway, "press-4", &json!({ "schema": reading_schema(200.0) }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.json()["enforced"][0]["version"], 1);
    (gateway, source)
}

fn quarantine(gateway: &Gateway, id: &str) -> Vec<Value> {
    let answer = gateway.get(&format!("/v1/datasources/{id}/quarantine?limit=1000"), &gateway.admin_key());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let Value::Array(records) = answer.json()["records"].take() else { panic!("{}", answer.text()) };
    records
}

fn quarantined(gateway: &Gateway, id: &str, count: usize) -> Vec<Value> {
    wait_for(&format!("{count} messages of {id} in quarantine"), || {
        Some(quarantine(gateway, id)).filter(|records| records.len() >= count)
    })
}

#[test]
fn a_good_reading_is_let_in_and_a_bad_one_is_not_over_every_front() {
    let dir = scratch();
    let (gateway, source) = with_schema(dir.path());
    let (good, bad) = (readings()[0].to_string(), bad().to_string());

    let mut v5 = Wire::login(gateway.mqtt, Version::V5, &source.key);
    assert_eq!(v5.publish(Version::V5, 1, "v5", good.as_bytes()), 0);
    v5.send(&publish(Version::V5, 2, "v5", bad.as_bytes()));
    let puback = v5.packet(PUBACK);
    assert_eq!((puback.packet_id(), puback.reason()), (2, PAYLOAD_FORMAT_INVALID));
    let words = puback.text(REASON_STRING).expect("words");
    assert!(words.contains("/value") && words.contains("schema version 1"), "{words}");
    assert_eq!(v5.publish(Version::V5, 3, "v5", good.as_bytes()), 0, "the connection goes on");

    let mut v311 = Wire::login(gateway.mqtt, Version::V311, &source.key);
    assert_eq!(v311.publish(Version::V311, 1, "v311", good.as_bytes()), 0);
    assert_eq!(v311.publish(Version::V311, 2, "v311", bad.as_bytes()), 0, "it has no words for a no");

    let post = |body: &str| {
        let headers = [("content-type", "application/json")];
        gateway.request("POST", "/v1/ingest/press-4/http", &source.key, &headers, body.as_bytes())
    };
    assert_eq!(post(&good).status, 200);
    let answer = post(&bad);
    let problem = answer.json();
    assert_eq!((answer.status, &problem["type"]), (422, &json!("/problems/validation")), "{problem}");
    assert_eq!((&problem["pointer"], &problem["errors"][0]["keyword"]), (&json!("/value"), &json!("type")));

    let kept = gateway.stored("press-4", 4);
    let topics: Vec<_> = kept.iter().map(|record| record["topic"].as_str().expect("text")).collect();
    assert_eq!(topics, ["v5", "v5", "v311", "http"]);
    let held = quarantined(&gateway, "press-4", 3);
    let topics: Vec<_> = held.iter().map(|record| record["topic"].as_str().expect("text")).collect();
    assert_eq!(topics, ["v5", "v311", "http"]);
    for record in &held {
        assert_eq!(record["payload"].to_string(), bad);
        assert_eq!((&record["pointer"], &record["keyword"]), (&json!("/value"), &json!("type")), "{record}");
        assert_eq!((&record["schema_version"], &record["cause"]), (&json!(1), &json!("schema")));
        assert_eq!((&record["key_id"], &record["redriven_offset"]), (&json!(source.key_id), &Value::Null));
    }
    assert_eq!(held[2]["offset"], problem["errors"][0]["offset"]);
    assert!(gateway.metric("headgate_quarantined_total{transport=\"mqtt\"}") == 2.0);
    assert!(gateway.metric("headgate_accepted_total{transport=\"mqtt\"}") == 3.0);
}

#[test]
fn a_request_with_bad_messages_names_each_and_lets_none_of_the_others_in() {
    let dir = scratch();
    let (gateway, source) = with_schema(dir.path());
    let all = readings();
    let batch = json!([all[0], bad(), all[1], 7]);
    let headers = [("content-type", "application/json"), ("idempotency-key", "batch-1")];
    let post = |body: String| {
        gateway.request("POST", "/v1/ingest/press-4/t", &source.key, &headers, body.as_bytes())
    };
    let answer = post(batch.to_string());
    let problem = answer.json();
    assert_eq!((answer.status, &problem["quarantined"]), (422, &json!(2)), "{problem}");
    assert_eq!(problem["errors"][0]["pointer"], "/1/value");
    assert_eq!(problem["errors"][1]["pointer"], "/3");
    let held = quarantined(&gateway, "press-4", 2);
    assert_eq!(held[1]["payload"], 7);
    assert_eq!(held[1]["offset"], problem["errors"][1]["offset"]);
    assert!(gateway.records("press-4").is_empty());
    // Mended, it may be sent with the same key.
    let answer = post(json!([all[0], all[1]]).to_string());
    assert_eq!((answer.status, answer.json()["accepted"].as_u64()), (200, Some(2)), "{}", answer.text());

    let lines = format!("{}\n\n{}\n", all[2], bad());
    let headers = [("content-type", "application/x-ndjson")];
    let answer = gateway.request("POST", "/v1/ingest/press-4/t", &source.key, &headers, lines.as_bytes());
    let errors = answer.json()["errors"].take();
    assert_eq!(
        (answer.status, &errors[0]["line"], &errors[0]["pointer"]),
        (422, &json!(3), &json!("/value"))
    );
    assert_eq!(gateway.stored("press-4", 2).len(), 2);
}

#[test]
fn without_a_schema_every_payload_is_let_in_and_with_one_only_json_is() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    assert_eq!(wire.publish(Version::V5, 1, "raw", b"\xff\x00"), 0);
    assert_eq!(set(&gateway, "press-4", &json!({ "schema": {} })).status, 200);
    // The same connection, the next message.
    wire.send(&publish(Version::V5, 2, "raw", b"\xff\x00"));
    let puback = wire.packet(PUBACK);
    assert_eq!(puback.reason(), PAYLOAD_FORMAT_INVALID);
    assert!(puback.text(REASON_STRING).is_some_and(|words| words.contains("not JSON")));
    assert_eq!(set(&gateway, "press-4", &json!({ "schemas": [] })).status, 200);
    assert_eq!(wire.publish(Version::V5, 3, "raw", b"\xff\x00"), 0);
}

#[test]
fn the_first_filter_that_matches_counts_and_versions_tell_schemas_apart() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let rules = |spindle: &str| {
        json!({ "schemas": [
            {"filter": "spindle/#", "schema": {"type": spindle}},
            {"schema": {"type": "object"}},
        ] })
    };
    assert_eq!(set(&gateway, "press-4", &rules("number")).status, 200);
    let enforced = set(&gateway, "press-4", &rules("string")).json()["enforced"].take();
    let versions: Vec<_> = (0..2).map(|n| enforced[n]["version"].as_u64()).collect();
    assert_eq!(versions, [Some(2), Some(1)]);
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    assert_eq!(wire.publish(Version::V5, 1, "spindle/temp", b"\"21.5\""), 0);
    assert_eq!(wire.publish(Version::V5, 2, "spindle/temp", b"{}"), PAYLOAD_FORMAT_INVALID);
    assert_eq!(wire.publish(Version::V5, 3, "door", b"{}"), 0);
    assert_eq!(wire.publish(Version::V5, 4, "door", b"\"open\""), PAYLOAD_FORMAT_INVALID);
    let held = quarantined(&gateway, "press-4", 2);
    let versions: Vec<_> = held.iter().map(|record| record["schema_version"].as_u64()).collect();
    assert_eq!(versions, [Some(2), Some(1)]);
}

#[test]
fn a_schema_that_cannot_be_used_is_refused_with_its_place_and_changes_nothing() {
    let dir = scratch();
    let (gateway, _) = with_schema(dir.path());
    for (schema, words) in [
        (json!({"properties": {"v": {"$ref": "https://example.com/v.json"}}}), "/properties/v/$ref"),
        (json!({"properties": {"v": {"$ref": "file:///etc/passwd"}}}), "not followed"),
        (json!({"properties": {"v": {"$ref": "#"}}}), "leads back to itself"),
        (json!({"type": "flaot"}), "/type"),
        (json!({"pattern": "(?=a)"}), "pattern"),
    ] {
        let answer = set(&gateway, "press-4", &json!({ "schema": schema }));
        assert_eq!(answer.status, 422, "{}", answer.text());
        assert_eq!(answer.json()["type"], "/problems/not_possible");
        let detail = answer.json()["detail"].as_str().expect("words").to_owned();
        assert!(detail.contains(words), "{detail}");
    }
    for body in [
        json!({}),
        json!({"schema": {}, "schemas": []}),
        json!({"schema": {}, "schemas": null}),
        json!({"schema": {}, "more": 1}),
        json!({"schema": null}),
        json!({"schema": 1}),
    ] {
        assert_eq!(set(&gateway, "press-4", &body).status, 400);
    }
    let enforced = gateway.get("/v1/datasources/press-4/schema", &gateway.admin_key()).json();
    assert_eq!(enforced["enforced"][0]["schema"], reading_schema(200.0));

    let wanted = json!({"name": "press-5", "schema": {"$ref": "other.json"}});
    assert_eq!(gateway.post("/v1/datasources", &gateway.admin_key(), &wanted).status, 422);
    assert_eq!(gateway.get("/v1/datasources/press-5", &gateway.admin_key()).status, 404);
    let wanted = json!({"name": "press-5", "schema": {"type": "number"}});
    let created = gateway.post("/v1/datasources", &gateway.admin_key(), &wanted);
    assert_eq!(created.status, 201, "{}", created.text());
    let key = created.json()["key"]["secret"].as_str().expect("a key").to_owned();
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &key);
    assert_eq!(wire.publish(Version::V5, 1, "t", b"{}"), PAYLOAD_FORMAT_INVALID);
}

#[test]
fn a_member_that_comes_twice_does_not_pass_a_schema() {
    let dir = scratch();
    let (gateway, source) = with_schema(dir.path());
    let schema = json!({ "properties": { "temp": { "maximum": 100 } } });
    assert_eq!(set(&gateway, "press-4", &json!({ "schema": schema })).status, 200);
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    let twice = [
        (r#"{"temp":999999,"temp":20}"#, "/temp"),
        (r#"{"temp":999999,"\u0074emp":20}"#, "/temp"),
        (r#"{"temp":20,"more":[{"a":1,"a":1}]}"#, "/more/0/a"),
    ];
    for (payload, pointer) in twice {
        assert_eq!(wire.publish(Version::V5, 1, "t", payload.as_bytes()), PAYLOAD_FORMAT_INVALID);
        let headers = [("content-type", "application/json")];
        let answer =
            gateway.request("POST", "/v1/ingest/press-4/t", &source.key, &headers, payload.as_bytes());
        let problem = answer.json();
        assert_eq!((answer.status, &problem["pointer"]), (422, &json!(pointer)), "{problem}");
        assert_eq!(problem["errors"][0]["keyword"], "duplicate");
    }
    assert_eq!(quarantined(&gateway, "press-4", 6)[0]["pointer"], "/temp");
    assert_eq!(wire.publish(Version::V5, 1, "t", br#"{"temp":20,"more":[{"a":1},{"a":1}]}"#), 0);
    assert_eq!(gateway.stored("press-4", 1).len(), 1);
}

#[test]
fn what_was_answered_from_quarantine_is_there_after_a_kill() {
    let dir = scratch();
    let (gateway, source) = with_schema(dir.path());
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    let mut old = Wire::login(gateway.mqtt, Version::V311, &source.key);
    for id in 1..=50 {
        let payload = json!({ "value": id }).to_string();
        assert_eq!(wire.publish(Version::V5, id, "v5", payload.as_bytes()), PAYLOAD_FORMAT_INVALID);
        assert_eq!(old.publish(Version::V311, id, "v311", payload.as_bytes()), 0);
    }
    gateway.kill();
    let gateway = Gateway::start(dir.path());
    let held = quarantined(&gateway, "press-4", 100);
    assert_eq!(held.len(), 100);
    for topic in ["v5", "v311"] {
        let values = held.iter().filter(|record| record["topic"] == topic);
        let values: Vec<_> = values.filter_map(|record| record["payload"]["value"].as_u64()).collect();
        assert_eq!(values, (1..=50).collect::<Vec<_>>(), "{topic}");
    }
    assert!(gateway.records("press-4").is_empty());
    // The schema has outlived it too, with its version.
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    assert_eq!(wire.publish(Version::V5, 1, "v5", b"{}"), PAYLOAD_FORMAT_INVALID);
    assert_eq!(quarantined(&gateway, "press-4", 101)[100]["schema_version"], 1);
}

#[test]
fn a_qos_2_exchange_ends_with_a_no_and_its_packet_id_is_free_for_the_next_message() {
    let dir = scratch();
    let (gateway, source) = with_schema(dir.path());
    let (good, bad) = (readings()[0].to_string(), bad().to_string());
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    wire.send(&Message::new("t", bad.as_bytes()).at(2, 9).packet(Version::V5));
    assert_eq!(wire.packet(PUBREC).reason(), PAYLOAD_FORMAT_INVALID);
    wire.send(&Message::new("t", good.as_bytes()).at(2, 9).packet(Version::V5));
    assert_eq!(wire.packet(PUBREC).reason(), 0);
    wire.send(&ack(PUBREL, 9));
    assert_eq!(wire.packet(PUBCOMP).reason(), 0);
    assert_eq!(gateway.stored("press-4", 1).len(), 1);
    assert_eq!(quarantined(&gateway, "press-4", 1).len(), 1);

    let mut old = Wire::login(gateway.mqtt, Version::V311, &source.key);
    old.send(&Message::new("t", bad.as_bytes()).at(2, 9).packet(Version::V311));
    old.packet(PUBREC);
    old.send(&ack(PUBREL, 9));
    old.packet(PUBCOMP);
    assert_eq!(quarantined(&gateway, "press-4", 2).len(), 2);
}

/// Whether it fails its schema or a limit.
#[test]
fn an_id_is_used_up_by_the_message_that_is_let_in_and_not_by_one_in_quarantine() {
    let dir = scratch();
    let (gateway, source) = with_schema(dir.path());
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    let mut by_mqtt = |packet_id, message_id: &str, payload: &str| {
        let message = Message::new("mqtt", payload).at(1, packet_id);
        wire.send(&message.with(&user_property("message-id", message_id)).packet(Version::V5));
        wire.packet(PUBACK).reason()
    };
    let by_http = |message_id: &str, payload: &str| {
        let headers = [("content-type", "application/json"), ("idempotency-key", message_id)];
        gateway.request("POST", "/v1/ingest/press-4/http", &source.key, &headers, payload.as_bytes())
    };
    let redrive = || {
        let path = "/v1/datasources/press-4/quarantine/redrive";
        let answer = gateway.post(path, &gateway.admin_key(), &json!({})).json();
        ["redriven", "duplicates", "failing"].map(|field| answer[field].as_u64().expect("a number"))
    };
    let (good, other, bad) = (readings()[0].to_string(), readings()[1].to_string(), bad().to_string());

    // The corrected message takes the id, so that the bad one is not let in beside it later.
    assert_eq!(by_mqtt(1, "mended-1", &bad), PAYLOAD_FORMAT_INVALID);
    assert_eq!(by_mqtt(2, "mended-1", &good), 0);
    assert_eq!(by_http("mended-2", &bad).status, 422);
    assert!(by_http("mended-2", &good).json().get("duplicate").is_none());
    assert_eq!(gateway.stored("press-4", 2).len(), 2);
    // Or the redriven one does, so that the corrected one is another message with a known id.
    assert_eq!(by_mqtt(3, "redriven-1", &bad), PAYLOAD_FORMAT_INVALID);
    assert_eq!(by_http("redriven-2", &bad).status, 422);
    quarantined(&gateway, "press-4", 4);
    assert_eq!(set(&gateway, "press-4", &json!({ "schemas": [] })).status, 200);
    assert_eq!(redrive(), [2, 2, 0]);
    assert_eq!(by_mqtt(4, "redriven-1", &bad), 0);
    assert_eq!(by_mqtt(5, "redriven-1", &other), 0x83);
    assert_eq!(by_http("redriven-2", &bad).json()["duplicate"], true);
    assert_eq!(by_http("redriven-2", &other).status, 422);
    assert_eq!(by_http("redriven-1", &other).status, 422, "an id is one over every front");
    assert_eq!(gateway.stored("press-4", 4).len(), 4);

    let limit = |value: Value| {
        let body = json!({ "limits": { "messages_per_s": value } }).to_string();
        let headers = [("content-type", "application/json")];
        let path = "/v1/datasources/press-4";
        let answer = gateway.request("PATCH", path, &gateway.admin_key(), &headers, body.as_bytes());
        assert_eq!(answer.status, 200, "{}", answer.text());
    };
    limit(json!({ "max": 1, "burst": 1, "policy": "quarantine" }));
    let over = (0..6).filter(|n| by_mqtt(10 + n, &format!("over-{n}"), &good) != 0).count();
    assert!(over > 0);
    limit(Value::Null);
    (0..6).for_each(|n| assert_eq!(by_mqtt(20 + n, &format!("over-{n}"), &good), 0));
    assert_eq!(gateway.stored("press-4", 10).len(), 10);
    quarantined(&gateway, "press-4", 4 + over);
    assert_eq!(redrive()[0], 0);
    gateway.settle();
    assert_eq!(gateway.records("press-4").len(), 10);
}

#[test]
fn what_is_inferred_from_recorded_readings_can_be_enforced_and_lets_them_in_again() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let all = readings();
    let headers = [("content-type", "application/json")];
    let body = Value::from(all[..2_000].to_vec()).to_string();
    let ingest = |topic: &str, body: &str| {
        let path = format!("/v1/ingest/press-4/{topic}");
        gateway.request("POST", &path, &source.key, &headers, body.as_bytes())
    };
    assert_eq!(ingest("machine/temp", &body).status, 200);
    assert_eq!(ingest("machine/state", "{\"on\": true}").status, 200);
    gateway.settle();
    let inferred = gateway.get("/v1/datasources/press-4/schema", &gateway.admin_key()).json();
    assert_eq!(inferred["enforced"], json!([]));
    let of_temp = inferred["by_topic"].as_array().expect("a list").iter();
    let of_temp = of_temp.clone().find(|rule| rule["filter"] == "machine/temp").expect("there");
    assert_eq!(
        of_temp["schema"],
        json!({
            "type": "object",
            "properties": {
                "timestamp": {"type": "string", "format": "date-time"},
                "value": {"type": "number"},
            },
            "required": ["timestamp", "value"],
        })
    );
    assert_eq!(inferred["examples"]["machine/temp"], all[1_999]);
    // Ready to be enforced as it is.
    let answer = set(&gateway, "press-4", &json!({ "schemas": inferred["by_topic"] }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(ingest("machine/temp", &body).status, 200);
    assert_eq!(ingest("machine/temp", &bad().to_string()).status, 422);
    // A key that only publishes may not look.
    assert_eq!(gateway.get("/v1/datasources/press-4/schema", &source.key).status, 403);
    assert_eq!(gateway.get("/v1/datasources/press-4/quarantine", &source.key).status, 403);
}
