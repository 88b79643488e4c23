//! Event times and series: when readings were measured, as their senders say, and the numbers in their payloads over time.

use std::process::Command;

use crate::common::stores::{TestStore, in_each_store};
use crate::common::{Answer, Gateway, Source, scratch};
use serde_json::{Value, json};

in_each_store! {
    an_event_time_is_what_was_said_when_the_record_came_in,
    a_time_that_cannot_be_used_brings_a_message_into_quarantine_until_it_may_do_without,
    a_series_shows_the_numbers_of_a_key_with_their_gaps,
    a_series_loses_what_leaked_and_gets_it_back,
}

const NDJSON: (&str, &str) = ("content-type", "application/x-ndjson");

fn set_event_time(gateway: &Gateway, id: &str, setting: &Value) -> Answer {
    let admin = gateway.admin_key();
    let body = json!({ "event_time": setting }).to_string();
    let headers = [("content-type", "application/json")];
    gateway.request("PATCH", &format!("/v1/datasources/{id}"), &admin, &headers, body.as_bytes())
}

fn publish(gateway: &Gateway, source: &Source, headers: &[(&str, &str)], body: &str) -> Answer {
    gateway.request("POST", &format!("/v1/ingest/{}/t", source.id), &source.key, headers, body.as_bytes())
}

/// The event times of all stored records, `-` for none.
fn event_times(gateway: &Gateway, id: &str) -> Vec<String> {
    gateway.settle();
    let records = gateway.records(id);
    records.iter().map(|record| record["event_at"].as_str().unwrap_or("-").to_owned()).collect()
}

fn series(gateway: &Gateway, source: &Source, query: &str) -> Value {
    let answer = gateway.get(&format!("/v1/datasources/{}/series?topic=t&{query}", source.id), &source.key);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

fn values(series: &Value) -> Vec<Option<f64>> {
    let points = series["points"].as_array().expect("points");
    points.iter().map(|point| point["value"].as_f64()).collect()
}

fn an_event_time_is_what_was_said_when_the_record_came_in(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let source = gateway.create_open("press-4");
    let said = "2026-11-23T09:28:39.000120Z";
    assert_eq!(publish(&gateway, &source, &[], r#"{"at": 7}"#).status, 200);
    assert_eq!(publish(&gateway, &source, &[("event-time", said)], r#"{"at": 7}"#).status, 200);
    let answer = set_event_time(&gateway, "press-4", &json!({"pointer": "/at", "format": "unix_s"}));
    assert_eq!(answer.json()["event_time"]["pointer"], "/at", "{}", answer.text());
    assert_eq!(publish(&gateway, &source, &[], r#"{"at": 7}"#).status, 200);
    assert_eq!(publish(&gateway, &source, &[], r#"{"at": "soon"}"#).status, 200);
    let mqtt = Command::new("mosquitto_pub")
        .args(["-V", "5", "-q", "1", "-u", &source.key, "-t", "t", "-m", r#"{"at": 7}"#])
        .args(["-D", "publish", "user-property", "event-time", "1795426119000120"])
        .args(["-h", "127.0.0.1", "-p", &gateway.mqtt.port().to_string()])
        .status();
    assert!(mqtt.expect("mosquitto_pub is installed").success());
    // The next change applies to what comes in after it.
    assert_eq!(set_event_time(&gateway, "press-4", &json!({"format": "unix_ms"})).status, 200);
    assert_eq!(publish(&gateway, &source, &[], r#"{"at": 7}"#).status, 200);
    assert_eq!(set_event_time(&gateway, "press-4", &Value::Null).json()["event_time"], Value::Null);
    assert_eq!(publish(&gateway, &source, &[], r#"{"at": 7}"#).status, 200);

    let (seven, milliseconds) = ("1970-01-01T00:00:07.000000Z", "1970-01-01T00:00:00.007000Z");
    let expected = ["-", said, seven, "-", said, milliseconds, "-"];
    assert_eq!(event_times(&gateway, "press-4"), expected);
    // Also when storage is made again from the log.
    let gateway = {
        drop(gateway.stop());
        store.lose(dir.path());
        store.start(dir.path())
    };
    assert_eq!(event_times(&gateway, "press-4"), expected);
    let latest = gateway.get("/v1/datasources/press-4/latest", &source.key);
    assert_eq!(latest.json()["topics"][0].get("event_at"), None);
}

fn a_time_that_cannot_be_used_brings_a_message_into_quarantine_until_it_may_do_without(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let source = gateway.create_open("press-4");
    let setting = json!({"pointer": "/at", "format": "unix_s", "on_error": "quarantine", "max_skew_s": 3600});
    assert_eq!(set_event_time(&gateway, "press-4", &setting).status, 200);
    for body in [r#"{"at": 7}"#, r#"{"v": 1}"#, "no JSON"] {
        let answer = publish(&gateway, &source, &[], body);
        assert_eq!(answer.status, 422, "{}", answer.text());
        assert_eq!(answer.json()["pointer"], "/at", "{}", answer.text());
    }
    gateway.settle();
    assert_eq!(gateway.records("press-4").len(), 0);
    let admin = gateway.admin_key();
    let kept = gateway.get("/v1/datasources/press-4/quarantine", &admin).json();
    let keywords: Vec<&Value> =
        kept["records"].as_array().expect("records").iter().map(|r| &r["keyword"]).collect();
    assert_eq!(keywords, [&json!("event_time"); 3], "{kept}");
    // A merge patch leaves the pointer as it is.
    let changed =
        set_event_time(&gateway, "press-4", &json!({"on_error": "received_at", "max_skew_s": null}));
    assert_eq!(
        changed.json()["event_time"],
        json!({"pointer": "/at", "format": "unix_s", "on_error": "received_at"})
    );
    let answer = gateway.post("/v1/datasources/press-4/quarantine/redrive", &admin, &json!({}));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(event_times(&gateway, "press-4"), ["1970-01-01T00:00:07.000000Z", "-", "-"]);
}

#[test]
fn settings_and_headers_that_say_nothing_are_refused() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create_open("press-4");
    for (setting, pointer) in [
        (json!({"pointer": "at"}), "/event_time/pointer"),
        (json!({"format": "unix"}), "/event_time"),
        (json!(true), "/event_time"),
    ] {
        let answer = set_event_time(&gateway, "press-4", &setting);
        assert_eq!((answer.status, &answer.json()["pointer"]), (400, &json!(pointer)), "{}", answer.text());
    }
    assert_eq!(publish(&gateway, &source, &[("event-time", &"1".repeat(65))], "{}").status, 400);
    let of_key = format!("/v1/datasources/press-4/keys/{}", source.key_id);
    let body = json!({"event_time": {}}).to_string();
    let headers = [("content-type", "application/json")];
    assert_eq!(
        gateway.request("PATCH", &of_key, &gateway.admin_key(), &headers, body.as_bytes()).status,
        400
    );
    let wanted = json!({"id": "made", "name": "made", "event_time": {"pointer": "/at"}});
    let made = gateway.post("/v1/datasources", &gateway.admin_key(), &wanted);
    assert_eq!(made.json()["datasource"]["event_time"]["pointer"], "/at", "{}", made.text());
}

fn a_series_shows_the_numbers_of_a_key_with_their_gaps(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let source = gateway.create_open("press-4");
    let setting = json!({"pointer": "/at", "format": "rfc3339"});
    assert_eq!(set_event_time(&gateway, "press-4", &setting).status, 200);
    let lines = [
        r#"{"at": "2026-11-23T09:00:10Z", "temp": 20, "state": {"rpm": 900, "on": true}}"#,
        r#"{"at": "2026-11-23T09:00:50Z", "temp": 22.5, "state": {"rpm": 910, "on": false}}"#,
        r#"{"at": "2026-11-23T09:02:00Z", "temp": "broken", "state": {"rpm": 0}}"#,
        r#"{"at": "2026-11-23T09:02:30Z", "temp": 21}"#,
    ];
    assert_eq!(publish(&gateway, &source, &[NDJSON], &lines.join("\n")).status, 200);
    gateway.settle();
    let shown = series(&gateway, &source, "key=temp&step=1m");
    let expected = json!({
        "datasource": "press-4", "topic": "t", "key": "temp", "agg": "avg",
        "from": "2026-11-23T09:00:10.000000Z", "to": "2026-11-23T09:02:30.000001Z", "step_s": 60.0,
        "points": [
            {"at": "2026-11-23T09:00:00.000000Z", "value": 21.25, "count": 2},
            {"at": "2026-11-23T09:01:00.000000Z", "value": null, "count": 0},
            {"at": "2026-11-23T09:02:00.000000Z", "value": 21.0, "count": 1},
        ],
    });
    assert_eq!(shown, expected);
    for (query, expected) in [
        ("key=temp&step=60&agg=max", vec![Some(22.5), None, Some(21.0)]),
        ("key=state.rpm&step=1m&agg=last", vec![Some(910.0), None, Some(0.0)]),
        ("key=state.on&step=1m&agg=sum", vec![Some(1.0), None, None]),
        ("key=temp&step=1h&agg=count", vec![Some(3.0)]),
        ("key=temp&points=3", vec![Some(21.25), None, Some(21.0)]),
        ("key=temp&from=2026-11-23T09:02:00Z&to=2026-11-23T09:03:00Z&step=30s", vec![None, Some(21.0)]),
        ("key=other&from=2026-11-23T09:02:00Z&to=2026-11-23T09:03:00Z&step=30s", vec![None, None]),
    ] {
        assert_eq!(values(&series(&gateway, &source, query)), expected, "{query}");
    }
    let nothing = gateway.get("/v1/datasources/press-4/series?topic=none", &source.key).json();
    assert_eq!((&nothing["points"], &nothing["from"]), (&json!([]), &Value::Null));
    for query in [
        "",
        "topic=a/%23",
        "topic=t&step=x",
        "topic=t&agg=mean",
        "topic=t&points=1",
        "topic=t&points=10001",
        "topic=t&x=1",
        "topic=t&from=now",
    ] {
        let answer = gateway.get(&format!("/v1/datasources/press-4/series?{query}"), &source.key);
        assert_eq!(answer.status, 400, "{query}: {}", answer.text());
    }
    for query in ["topic=t&step=0s", "topic=t&step=367d", "topic=t&from=2026-01-01T00:00:00Z&step=1s"] {
        let answer = gateway.get(&format!("/v1/datasources/press-4/series?{query}"), &source.key);
        assert_eq!(answer.status, 422, "{query}: {}", answer.text());
    }
    let other = gateway.create_open("other");
    assert_eq!(gateway.get("/v1/datasources/press-4/series?topic=t", &other.key).status, 401);
    let ingest = gateway.create("ingest");
    assert_eq!(gateway.get("/v1/datasources/ingest/series?topic=t", &ingest.key).status, 403);
}

fn a_series_loses_what_leaked_and_gets_it_back(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let source = gateway.create_open("press-4");
    let admin = gateway.admin_key();
    let leaked = gateway.post("/v1/datasources/press-4/keys", &admin, &json!({})).json();
    let (leaked_id, leaked_key) =
        (leaked["key"]["id"].as_str().expect("id"), leaked["key"]["secret"].as_str());
    let leaked = Source { key: leaked_key.expect("a secret").to_owned(), ..source.clone() };
    for (nth, of) in [&source, &leaked, &source, &leaked].into_iter().enumerate() {
        let said = format!("2026-11-23T09:0{nth}:00Z");
        assert_eq!(publish(&gateway, of, &[("event-time", &said)], &nth.to_string()).status, 200);
    }
    gateway.settle();
    let shown = || values(&series(&gateway, &source, "step=1m"));
    let all: Vec<Option<f64>> = (0..4).map(|n| Some(f64::from(n))).collect();
    assert_eq!(shown(), all);
    let path = format!("/v1/datasources/press-4/keys/{leaked_id}/quarantine");
    let withheld = gateway.post(&path, &admin, &json!({"since": "2020-01-01T00:00:00Z"}));
    assert_eq!(withheld.status, 200, "{}", withheld.text());
    assert_eq!(shown(), [Some(0.0), None, Some(2.0)]);
    let undone = gateway.post(&path, &admin, &json!({"undo": true}));
    assert_eq!(undone.status, 200, "{}", undone.text());
    assert_eq!(shown(), all);
    assert_eq!(event_times(&gateway, "press-4").len(), 4);

    // The next one begins empty, and nothing is left of the first.
    gateway.delete("press-4");
    let again = gateway.create_open("press-4");
    assert_eq!(values(&series(&gateway, &again, "step=1m")), []);
    let old = "/v1/datasources/press-4/series?topic=t&step=1m&incarnation=1";
    assert_eq!(values(&gateway.get(old, &admin).json()), all);
    let path = "/v1/datasources/press-4?purge=true&incarnation=1";
    assert_eq!(gateway.request("DELETE", path, &admin, &[], &[]).status, 200);
    assert_eq!(store.sample_rows(dir.path()), 0);
}
