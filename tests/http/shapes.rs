//! The shapes that devices send, over HTTP and MQTT: what `latest` and `series` read out of them, and when it was measured.

use std::process::Command;

use serde_json::{Value, json};

use crate::common::stores::{TestStore, in_each_store};
use crate::common::{Gateway, Source, scratch};

in_each_store! {
    line_protocol_is_read_by_series_and_latest_however_it_came,
    telemetry_of_thingsboard_is_read_with_its_times,
    senml_is_one_record_with_all_its_names,
    values_of_a_shape_are_taken_out_and_put_back_with_their_records,
}

/// 2026-11-23T09:28:39Z, in seconds.
const AT_S: i64 = 1_795_426_119;
const AT: &str = "2026-11-23T09:28:39.000000Z";

fn post(gateway: &Gateway, source: &Source, path: &str, content_type: &str, body: &str) {
    let headers = [("content-type", content_type)];
    let answer = gateway.request("POST", path, &source.key, &headers, body.as_bytes());
    assert!([200, 204].contains(&answer.status), "{}", answer.text());
}

/// Publishes over MQTT 5 with a content type, or over 3.1.1 without one.
fn publish(gateway: &Gateway, source: &Source, topic: &str, content_type: &str, body: &str) {
    let mut mqtt = Command::new("mosquitto_pub");
    mqtt.args(["-h", "127.0.0.1", "-p", &gateway.mqtt.port().to_string(), "-q", "1", "-u", &source.key]);
    mqtt.args(["-t", topic, "-m", body]);
    if content_type.is_empty() {
        mqtt.args(["-V", "311"]);
    } else {
        mqtt.args(["-V", "5", "-D", "publish", "content-type", content_type]);
    }
    assert!(mqtt.status().expect("mosquitto_pub is installed").success());
}

/// The newest values of a topic, by key.
fn latest(gateway: &Gateway, source: &Source, topic: &str) -> Value {
    let page = gateway.get("/v1/datasources/press-4/latest", &source.key).json();
    let topics = page["topics"].as_array().expect("topics");
    let found = topics.iter().find(|latest| latest["topic"] == topic);
    let values = found.unwrap_or_else(|| panic!("{topic} in {page}"))["values"].as_object().expect("values");
    values.iter().map(|(key, latest)| (key.clone(), latest["value"].clone())).collect()
}

/// The steps of a second around [`AT`] in which a key has values, with their number from there.
fn series(gateway: &Gateway, source: &Source, topic: &str, key: &str) -> Vec<(i64, f64)> {
    let encoded = |text: &str| text.replace('%', "%25").replace('=', "%3D").replace('/', "%2F");
    let query = format!(
        "topic={}&key={}&from=2026-11-23T09:28:39Z&to=2026-11-23T09:28:49Z&step=1s",
        encoded(topic),
        encoded(key)
    );
    let answer = gateway.get(&format!("/v1/datasources/press-4/series?{query}"), &source.key);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let json = answer.json();
    let points = json["points"].as_array().expect("points").iter().zip(0..);
    points.filter_map(|(point, nth)| Some((nth, point["value"].as_f64()?))).collect()
}

fn line_protocol_is_read_by_series_and_latest_however_it_came(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let source = gateway.create_open("press-4");
    let lines = |unit: i64| {
        format!(
            "cpu,host=a,cpu=0 idle=98.50,on=t,n=3i,note=\"a b\" {0}\ncpu,host=b,cpu=0 idle=97 {0}\n\
             cpu,cpu=0,host=a idle=96 {1}\n",
            AT_S * unit,
            (AT_S + 2) * unit
        )
    };
    let nanos = 1_000_000_000;
    post(&gateway, &source, "/api/v2/write?bucket=press-4", "text/plain", &lines(nanos));
    post(&gateway, &source, "/v1/ingest/press-4/east?precision=ms", "text/plain", &lines(1_000));
    publish(&gateway, &source, "telegraf/five", "text/plain; precision=s", &lines(1));
    publish(&gateway, &source, "telegraf/three", "", &lines(nanos));
    publish(&gateway, &source, "text", "text/plain", "no point at all");
    gateway.settle();

    for base in ["", "east/"] {
        let (a, b) = (format!("{base}cpu/cpu=0/host=a"), format!("{base}cpu/cpu=0/host=b"));
        let values = json!({"idle": 96, "on": true, "n": 3, "note": "a b"});
        assert_eq!(latest(&gateway, &source, &a), values);
        assert_eq!(latest(&gateway, &source, &b), json!({"idle": 97}));
        assert_eq!(series(&gateway, &source, &a, "idle"), [(0, 98.5), (2, 96.0)]);
        assert_eq!(series(&gateway, &source, &a, "on"), [(0, 1.0)]);
        assert_eq!(series(&gateway, &source, &b, "idle"), [(0, 97.0)]);
    }
    for topic in ["telegraf/five", "telegraf/three"] {
        let key = |host: &str, field: &str| format!("cpu/cpu=0/host={host}/{field}");
        let values = latest(&gateway, &source, topic);
        assert_eq!((&values[key("a", "idle")], &values[key("b", "idle")]), (&json!(96), &json!(97)));
        assert_eq!(series(&gateway, &source, topic, &key("a", "idle")), [(0, 98.5), (2, 96.0)]);
        assert_eq!(series(&gateway, &source, topic, &key("b", "idle")), [(0, 97.0)]);
    }
    assert_eq!(latest(&gateway, &source, "text"), json!({"": "no point at all"}));

    let records = gateway.records("press-4");
    let times: Vec<&Value> = records.iter().map(|record| &record["event_at"]).collect();
    let (first, last) = (json!(AT), json!("2026-11-23T09:28:41.000000Z"));
    assert_eq!(times[..8], [&first, &first, &last, &first, &first, &last, &last, &last]);
    assert_eq!(records[6]["payload"], lines(1), "the payload is what was sent");
    assert_eq!(records[8].get("event_at"), None);
}

fn telemetry_of_thingsboard_is_read_with_its_times(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let source = gateway.create_open("press-4");
    let one = |after_s: i64, temp: f64| json!({"ts": (AT_S + after_s) * 1_000, "values": {"temp": temp, "state": {"on": true}, "unit": "C"}});
    let list = json!([one(1, 21.5), one(0, 20.5)]).to_string();
    // Over HTTP each element is a message, over MQTT the array is one.
    post(&gateway, &source, "/v1/ingest/press-4/http", "application/json", &list);
    publish(&gateway, &source, "mqtt", "", &list);
    publish(&gateway, &source, "single", "application/json", &one(3, 19.0).to_string());
    gateway.settle();
    for topic in ["http", "mqtt"] {
        assert_eq!(series(&gateway, &source, topic, "temp"), [(0, 20.5), (1, 21.5)]);
        assert_eq!(series(&gateway, &source, topic, "state.on"), [(0, 1.0), (1, 1.0)]);
    }
    assert_eq!(series(&gateway, &source, "single", "temp"), [(3, 19.0)]);
    // The newest is of the last message, and within one of the latest time.
    let values = |temp: f64| json!({"temp": temp, "state": {"on": true}, "unit": "C"});
    assert_eq!(latest(&gateway, &source, "http"), values(20.5));
    assert_eq!(latest(&gateway, &source, "mqtt"), values(21.5));
    let records = gateway.records("press-4");
    assert_eq!((records.len(), &records[2]["payload"].to_string()), (4, &list));
    assert_eq!(records[0]["event_at"], "2026-11-23T09:28:40.000000Z");
    assert_eq!(records[2]["event_at"], "2026-11-23T09:28:40.000000Z");
}

fn senml_is_one_record_with_all_its_names(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let source = gateway.create_open("press-4");
    let pack = format!(
        r#"[{{"bn":"urn:dev:1/","bt":{AT_S},"bv":20,"n":"temp","u":"Cel","v":1.5}},
            {{"n":"temp","t":2,"v":2}},{{"n":"on","vb":true}},{{"n":"note","vs":"a b"}}]"#
    );
    post(&gateway, &source, "/v1/ingest/press-4/http", "application/senml+json", &pack);
    publish(&gateway, &source, "five", "application/senml+json", &pack);
    publish(&gateway, &source, "three", "", &pack);
    gateway.settle();
    for topic in ["http", "five", "three"] {
        assert_eq!(series(&gateway, &source, topic, "urn:dev:1/temp"), [(0, 21.5), (2, 22.0)], "{topic}");
        assert_eq!(series(&gateway, &source, topic, "urn:dev:1/on"), [(0, 1.0)], "{topic}");
        let values = json!({"urn:dev:1/temp": 22.0, "urn:dev:1/on": true, "urn:dev:1/note": "a b"});
        assert_eq!(latest(&gateway, &source, topic), values, "{topic}");
    }
    let records = gateway.records("press-4");
    assert_eq!(records.len(), 3);
    for record in &records {
        assert_eq!(record["event_at"], "2026-11-23T09:28:41.000000Z");
    }
}

/// What a leaked key let in is taken out of `latest` and `series`, and given back from the records.
fn values_of_a_shape_are_taken_out_and_put_back_with_their_records(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let source = gateway.create_open("press-4");
    let line = |value: u32, after_s: i64| format!("cpu,host=a idle={value} {}", AT_S + after_s);
    post(&gateway, &source, "/write?precision=s", "text/plain", &line(1, 0));
    gateway.settle();
    let admin = gateway.admin_key();
    let key = gateway.post("/v1/datasources/press-4/keys", &admin, &json!({})).json();
    let text = |name: &str| key["key"][name].as_str().expect("a text").to_owned();
    let leaked = Source { key: text("secret"), key_id: text("id"), ..source.clone() };
    post(&gateway, &leaked, "/write?precision=s", "text/plain", &line(2, 3));
    gateway.settle();
    assert_eq!(latest(&gateway, &source, "cpu/host=a"), json!({"idle": 2}));
    let path = format!("/v1/datasources/press-4/keys/{}/quarantine", leaked.key_id);
    let answer = gateway.post(&path, &admin, &json!({"since": "2026-01-01T00:00:00Z"}));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(latest(&gateway, &source, "cpu/host=a"), json!({"idle": 1}));
    assert_eq!(series(&gateway, &source, "cpu/host=a", "idle"), [(0, 1.0)]);
}
