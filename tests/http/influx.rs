//! Line protocol: what Telegraf and the clients of InfluxDB send, unchanged, and the same over `/v1/ingest`.

use std::process::Output;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use super::api::compressed;
use crate::common::{Answer, Gateway, python, scratch};

const TEXT: (&str, &str) = ("content-type", "text/plain; charset=utf-8");

/// What Telegraf 1.36 writes of a machine.
const TELEGRAF: &str = "\
cpu,cpu=cpu0,host=hall\\ b usage_idle=98.5,usage_user=1.25 1795426119000000000
cpu,cpu=cpu-total,host=hall\\ b usage_idle=97,usage_user=2 1795426119000000000
disk,device=sda1,host=hall\\ b,path=/ free=12i,used_percent=33.1 1795426119000000000
";

/// What it is stored as: topic, content type and payload.
fn stored(gateway: &Gateway, count: usize) -> Vec<(String, String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_else(|| panic!("{value} is a text")).to_owned();
    let records = gateway.stored("press-4", count);
    records.iter().map(|r| (text(&r["topic"]), text(&r["content_type"]), text(&r["payload"]))).collect()
}

fn telegraf_records() -> Vec<(String, String, String)> {
    let topics = [
        "cpu/cpu=cpu0/host=hall%20b",
        "cpu/cpu=cpu-total/host=hall%20b",
        "disk/device=sda1/host=hall%20b/path=%2F",
    ];
    let lines = topics.iter().zip(TELEGRAF.lines());
    lines.map(|(topic, line)| ((*topic).into(), "text/plain; precision=ns".into(), line.into())).collect()
}

fn basic(key: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(format!("telegraf:{key}")))
}

fn write(gateway: &Gateway, target: &str, authorization: &str, body: &str) -> Answer {
    gateway.request("POST", target, "", &[("authorization", authorization), TEXT], body.as_bytes())
}

fn succeeded(output: &Output) -> String {
    let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{error}");
    said.into_owned()
}

/// The requests of Telegraf's `outputs.influxdb_v2` (plugins/outputs/influxdb_v2/http.go), whose body is gzip by default.
#[test]
fn telegraf_writes_as_to_influxdb_2() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let token = format!("Token {}", source.key);
    let headers = [
        ("user-agent", "Telegraf/1.36.0 Go/1.25.0"),
        ("authorization", token.as_str()),
        ("content-encoding", "gzip"),
        TEXT,
    ];
    let body = compressed("gzip", &[], TELEGRAF.as_bytes());
    let answer = gateway.request("POST", "/api/v2/write?bucket=press-4&org=acme", "", &headers, &body);
    assert_eq!((answer.status, answer.text().as_str()), (204, ""), "{}", answer.text());
    assert_eq!(stored(&gateway, 3), telegraf_records());
}

/// Those of its `outputs.influxdb`, which creates its database first, by a form.
#[test]
fn telegraf_writes_as_to_influxdb_1() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let authorization = basic(&source.key);
    let form = |statement: &str, authorization: &str| {
        let headers = [
            ("authorization", authorization),
            ("content-type", "application/x-www-form-urlencoded"),
            ("user-agent", "Telegraf/1.36.0 Go/1.25.0"),
        ];
        gateway.request("POST", "/query", "", &headers, format!("q={statement}").as_bytes())
    };
    let created = form("CREATE+DATABASE+%22press-4%22", &authorization);
    assert_eq!((created.status, created.json()), (200, json!({"results": [{"statement_id": 0}]})));
    assert_eq!(form("CREATE+DATABASE+%22other%22", &authorization).status, 401);
    assert_eq!(form("CREATE+DATABASE+%22press-4%22", &basic("nobody")).status, 401);
    assert_eq!(form("SELECT+1", &authorization).status, 400);
    let absent = form("CREATE+DATABASE+%22other%22", &format!("Bearer {}", gateway.admin_key()));
    assert_eq!(absent.status, 404, "{}", absent.text());
    let answer = write(&gateway, "/write?db=press-4&rp=autogen&consistency=any", &authorization, TELEGRAF);
    assert_eq!((answer.status, answer.text().as_str()), (204, ""));
    assert_eq!(stored(&gateway, 3), telegraf_records());
    // A key that is for one datasource needs not be told which.
    assert_eq!(write(&gateway, "/write?precision=s", &authorization, "t v=1 1795426119\n").status, 204);
    let last = stored(&gateway, 4).remove(3);
    assert_eq!(last, ("t".into(), "text/plain; precision=s".into(), "t v=1 1795426119".into()));
}

#[test]
fn the_python_client_of_influxdb_2_writes_unchanged() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let program = r#"
import sys
from influxdb_client import InfluxDBClient, Point, WritePrecision
from influxdb_client.client.write_api import SYNCHRONOUS, WriteOptions
from influxdb_client.rest import ApiException
url, key = sys.argv[1:]
with InfluxDBClient(url=url, token=key, org="acme", enable_gzip=True) as client:
    assert client.ping()
    assert client.health().status == "pass", client.health()
    write = client.write_api(write_options=SYNCHRONOUS)
    point = Point("spindle").tag("hall", "b, east").field("temp", 21.5).field("on", True).field("n", 3)
    write.write(bucket="press-4", record=point.field("note", 'a "b"').time(1795426119, WritePrecision.S),
                write_precision=WritePrecision.S)
    write.write(bucket="press-4", record={"measurement": "t", "fields": {"v": 1.0}})
    with client.write_api(write_options=WriteOptions(batch_size=500, flush_interval=100)) as batching:
        for n in range(1000):
            batching.write(bucket="press-4", record=f"load,n={n % 10} v={n} {n}", write_precision=WritePrecision.MS)
    try:
        write.write(bucket="press-4", record="t v=1\nt v=")
        raise SystemExit("a line that is none was taken")
    except ApiException as error:
        assert error.status == 400 and "line 2, column 5" in error.message, (error.status, error.message)
try:
    with InfluxDBClient(url=url, token="no key", org="acme") as client:
        client.write_api(write_options=SYNCHRONOUS).write(bucket="press-4", record="t v=1")
    raise SystemExit("a stranger was let in")
except ApiException as error:
    assert error.status == 401 and "Token KEY" in error.message, error.message
"#;
    succeeded(&python(program, &[&format!("http://{}", gateway.http), &source.key]));
    let records = stored(&gateway, 1_002);
    assert_eq!(records.len(), 1_002);
    let (topic, content_type, payload) = &records[0];
    assert_eq!(
        (topic.as_str(), content_type.as_str()),
        ("spindle/hall=b,%20east", "text/plain; precision=s")
    );
    assert_eq!(payload, r#"spindle,hall=b\,\ east n=3i,note="a \"b\"",on=true,temp=21.5 1795426119"#);
    assert_eq!((records[1].0.as_str(), records[1].2.as_str()), ("t", "t v=1"));
    assert_eq!(records[2..].iter().filter(|(topic, ..)| topic == "load/n=7").count(), 100);
}

#[test]
fn the_python_client_of_influxdb_1_writes_unchanged() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let program = r#"
import sys
from influxdb import InfluxDBClient
from influxdb.exceptions import InfluxDBClientError
host, port, key = sys.argv[1:]
client = InfluxDBClient(host, int(port), "device", key, "press-4", gzip=True)
assert client.ping().startswith("headgate-"), client.ping()
client.create_database("press-4")
assert client.write_points([{"measurement": "spindle", "tags": {"hall": "b"}, "time": 1795426119,
                             "fields": {"temp": 21.5, "on": True, "n": 3, "note": "a b"}}], time_precision="s")
assert client.write_points(["load v=1 1", "load v=2 2"], protocol="line", time_precision="ms")
for wrong, status in [(InfluxDBClient(host, int(port), "device", "no key", "press-4"), 401),
                      (InfluxDBClient(host, int(port), "device", key, "press-5"), 401)]:
    try:
        wrong.write_points(["t v=1"], protocol="line")
        raise SystemExit("a stranger was let in")
    except InfluxDBClientError as error:
        assert error.code == status and "password" in str(error), error
try:
    client.write_points(["t v=1", "t,a v=1"], protocol="line")
    raise SystemExit("a line that is none was taken")
except InfluxDBClientError as error:
    assert error.code == 400 and "line 2, column 4" in str(error), error
"#;
    let (host, port) = (gateway.http.ip().to_string(), gateway.http.port().to_string());
    succeeded(&python(program, &[&host, &port, &source.key]));
    let records = stored(&gateway, 3);
    let expected = [
        ("spindle/hall=b", "s", "spindle,hall=b n=3i,note=\"a b\",on=True,temp=21.5 1795426119"),
        ("load", "ms", "load v=1 1"),
        ("load", "ms", "load v=2 2"),
    ];
    let expected = expected.map(|(topic, precision, line)| {
        (topic.to_owned(), format!("text/plain; precision={precision}"), line.to_owned())
    });
    assert_eq!(records, expected);
}

#[test]
fn line_protocol_is_posted_to_a_datasource_or_below_a_topic() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let post = |path: &str, headers: &[(&str, &str)], body: &str| {
        let answer = gateway.request("POST", path, &source.key, headers, body.as_bytes());
        (answer.status, if answer.status == 200 { answer.json()["accepted"].clone() } else { answer.json() })
    };
    let typed = ("content-type", "text/plain; precision=\"ms\"");
    let form = ("content-type", "application/x-www-form-urlencoded");
    let body = "# readings\nt,hall=b v=1 5\n\nt,hall=b v=\"a\nb\" 6\r\n";
    for (path, headers) in [
        ("/v1/ingest/press-4?precision=ms", &[TEXT][..]),
        ("/v1/ingest/press-4", &[typed]),
        ("/v1/ingest/press-4?precision=ms", &[typed]),
        ("/v1/ingest/press-4?precision=ms", &[]),
        ("/v1/ingest/press-4/?precision=ms", &[form]),
    ] {
        assert_eq!(post(path, headers, body), (200, json!(2)), "{path} {headers:?}");
    }
    assert_eq!(post("/v1/ingest/press-4/east/1?precision=s", &[TEXT], "t,hall=b v=1"), (200, json!(1)));
    // Without a precision a text is a text.
    assert_eq!(post("/v1/ingest/press-4", &[TEXT], body), (200, json!(1)));
    let records = stored(&gateway, 12);
    for two in records[..10].chunks(2) {
        assert_eq!(two[0], ("t/hall=b".into(), "text/plain; precision=ms".into(), "t,hall=b v=1 5".into()));
        assert_eq!(two[1].2, "t,hall=b v=\"a\nb\" 6");
    }
    assert_eq!(records[10].0, "east/1/t/hall=b");
    assert_eq!(records[11], ("data".into(), TEXT.1.into(), body.into()));

    for (path, headers, body, words) in [
        ("/v1/ingest/press-4?precision=day", &[TEXT], "t v=1", "precision"),
        ("/v1/ingest/press-4?precision=", &[TEXT], "t v=1", "precision"),
        ("/v1/ingest/press-4?precision=s", &[typed], "t v=1", "different precisions"),
        ("/v1/ingest/press-4?precision=s", &[("content-type", "application/json")], "{}", "text/plain"),
        ("/v1/ingest/press-4?precision=s", &[TEXT], "", "no message"),
        ("/v1/ingest/press-4?precision=s", &[TEXT], "# t v=1\n", "no message"),
        (
            "/v1/ingest/press-4?precision=s",
            &[TEXT],
            "t v=1\nt,a=1,a=2 v=1",
            "a tag comes twice (line 2, column 7)",
        ),
        ("/v1/ingest/press-4?precision=s", &[TEXT], "t v=1\nhgk_ v=1", "key"),
    ] {
        let (status, problem) = post(path, headers, body);
        // Both are what the API describes, and not together.
        let is_contrary = ["different precisions", "text/plain"].contains(&words);
        assert_eq!(status, if is_contrary { 422 } else { 400 }, "{path} {body:?}: {problem}");
        assert!(problem["detail"].as_str().is_some_and(|detail| detail.contains(words)), "{problem}");
    }
    let (_, problem) = post("/v1/ingest/press-4?precision=s", &[TEXT], "t v=1\nt v=1,\nt v=1");
    assert_eq!((&problem["line"], &problem["column"]), (&json!(2), &json!(7)));
    let (_, problem) =
        post("/v1/ingest/press-4?precision=s", &[TEXT], &format!("t v=1\n{} v=1", "m".repeat(1_025)));
    assert_eq!((&problem["type"], &problem["line"]), (&json!("/problems/topic"), &json!(2)));
    gateway.settle();
    assert_eq!(gateway.records("press-4").len(), 12, "nothing of what was refused was kept");
    assert_eq!(gateway.records_in_log(), 12.0);
}

#[test]
fn a_refusal_is_said_in_each_version_s_words_and_nothing_of_it_is_kept() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let other = gateway.create("other");
    let (token, password) = (format!("Token {}", source.key), basic(&source.key));
    let all = basic(&gateway.admin_key());
    for (target, authorization, body, status, words) in [
        ("/api/v2/write?bucket=press-4", token.as_str(), "t v=1\nt v=x", 400, "line 2, column 5"),
        ("/api/v2/write?bucket=press-4", &token, "\n", 400, "no message"),
        ("/api/v2/write?bucket=press-4&precision=d", &token, "t v=1", 400, "precision"),
        ("/api/v2/write?bucket=press-4", "", "t v=1", 401, "Token KEY"),
        ("/api/v2/write?bucket=other", &token, "t v=1", 401, "Token KEY"),
        ("/api/v2/write?bucket=no-such", &token, "t v=1", 401, "Token KEY"),
        ("/write?db=press-4", &password, "t v=1\nt v=x", 400, "line 2, column 5"),
        ("/write?db=press-4&precision=d", &password, "t v=1", 400, "precision"),
        ("/write?db=press-4", &basic(&other.key), "t v=1", 401, "password"),
        ("/write?db=press-4", &basic("telegraf"), "t v=1", 401, "password"),
        ("/write?db=press-4&u=telegraf&p=secret", "", "t v=1", 401, "password"),
        ("/write", &all, "t v=1", 400, "db=DATASOURCE"),
        ("/api/v2/write", &all, "t v=1", 400, "bucket=DATASOURCE"),
        ("/api/v2/write?bucket=no-such", &all, "t v=1", 404, "no datasource"),
    ] {
        let mut headers = vec![TEXT];
        headers.extend((!authorization.is_empty()).then_some(("authorization", authorization)));
        let answer = gateway.request("POST", target, "", &headers, body.as_bytes());
        assert_eq!(answer.status, status, "{target}: {}", answer.text());
        assert_eq!(answer.headers["content-type"], "application/json");
        let json = answer.json();
        let said = if target.starts_with("/api") { &json["message"] } else { &json["error"] };
        assert!(said.as_str().is_some_and(|said| said.contains(words)), "{target}: {json}");
    }
    let line = write(&gateway, "/api/v2/write", &token, "t v=1\nt v=x");
    assert_eq!((&line.json()["line"], &line.json()["code"]), (&json!(2), &json!("invalid")));
    // A key in a URL is refused wherever that leads, and said where it belongs.
    let target = format!("/write?db=press-4&u=telegraf&p={}", source.key);
    let answer = gateway.request("POST", &target, "", &[TEXT], b"t v=1");
    assert_eq!(answer.status, 401);
    assert!(
        answer.text().contains("never in the URL") && !answer.text().contains(&source.key),
        "{}",
        answer.text()
    );
    assert_eq!(gateway.metric("headgate_refused_total{transport=\"http\",cause=\"key_in_url\"}"), 1.0);
    let refusals = gateway.get("/v1/refusals", &gateway.admin_key()).json();
    let of_key_in_url = |refusal: &&Value| refusal["cause"] == "key_in_url";
    let listed = refusals["refusals"].as_array().and_then(|all| all.iter().find(of_key_in_url).cloned());
    assert_eq!(listed.map(|refusal| refusal["datasource"].clone()), Some(json!("press-4")), "{refusals}");
    assert_eq!(gateway.records_in_log(), 0.0);
}

/// Telegraf drops what any 4xx answers, in its form for InfluxDB 1 also 429.
#[test]
fn what_a_rate_refuses_comes_again() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    // So slow that nothing is let in again while the test runs.
    let limits = json!({ "limits": { "messages_per_s": { "max": 1, "burst": 1_000 } } });
    let body = limits.to_string();
    let headers = [("content-type", "application/json")];
    let answer =
        gateway.request("PATCH", "/v1/datasources/press-4", &gateway.admin_key(), &headers, body.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let (token, password) = (format!("Token {}", source.key), basic(&source.key));
    let lines = "t v=1\n".repeat(1_000);
    assert_eq!(write(&gateway, "/write?db=press-4", &password, &lines).status, 204);
    for (target, authorization, status) in
        [("/api/v2/write?bucket=press-4", token, 429), ("/write?db=press-4", password, 503)]
    {
        let answer = write(&gateway, target, &authorization, &lines);
        assert_eq!(answer.status, status, "{}", answer.text());
        assert!(answer.headers["retry-after"].parse::<u64>().is_ok_and(|seconds| seconds > 0));
    }
    assert_eq!(gateway.records_in_log(), 1_000.0);
}

#[test]
fn clients_find_that_there_is_somebody() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    for method in ["GET", "HEAD"] {
        let answer = gateway.request(method, "/ping", "", &[], &[]);
        assert_eq!((answer.status, answer.text().as_str()), (204, ""));
        assert!(answer.headers["x-influxdb-version"].starts_with("headgate-"));
    }
    let health = gateway.get("/health", "").json();
    assert_eq!((&health["status"], &health["name"]), (&json!("pass"), &json!("headgate")));
}
