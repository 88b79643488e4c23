//! The HTTP API, from outside: who is let in, what becomes of a body, managing datasources and keys,
//! reading back what was stored, and what every answer says.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use crate::common::cluster::{self, first_offset};
use crate::common::{Answer, Gateway, PATIENCE, Setup, Source, scratch, wait_for};
use serde_json::{Value, json};

const JSON: (&str, &str) = ("content-type", "application/json");
const NDJSON: (&str, &str) = ("content-type", "application/x-ndjson");

/// Posts one message and expects a yes; the answer's offsets.
fn ingest(gateway: &Gateway, source: &Source, headers: &[(&str, &str)], body: &[u8]) -> (u64, u64, u64) {
    let answer = gateway.request("POST", &format!("/v1/ingest/{}/t", source.id), &source.key, headers, body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let json = answer.json();
    let number = |name: &str| json[name].as_u64().unwrap_or_else(|| panic!("{name} in {json}"));
    (number("accepted"), number("first_offset"), number("last_offset"))
}

/// Checks that an answer is a problem document of this status and type, and returns it.
fn problem(answer: &Answer, status: u16, slug: &str) -> Value {
    assert_eq!(answer.status, status, "{}", answer.text());
    assert_eq!(answer.headers["content-type"], "application/problem+json");
    let json = answer.json();
    assert_eq!(json["type"], format!("/problems/{slug}"), "{json}");
    assert_eq!(json["status"], status);
    assert!(json["title"].is_string() && json["detail"].is_string(), "{json}");
    json
}

/// Creates a key and returns its id and secret.
fn create_key(gateway: &Gateway, datasource: &str, body: &Value) -> (String, String) {
    let answer = gateway.post(&format!("/v1/datasources/{datasource}/keys"), &gateway.admin_key(), body);
    assert_eq!(answer.status, 201, "{}", answer.text());
    assert_eq!(answer.headers["cache-control"], "no-store");
    let json = answer.json();
    let text = |name: &str| json["key"][name].as_str().expect("a text").to_owned();
    (text("id"), text("secret"))
}

#[test]
fn a_key_is_taken_from_each_header_it_may_stand_in() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let (key, bearer) = (source.key.as_str(), format!("bearer {}", source.key));
    for headers in [
        &[("authorization", key)][..],
        &[("authorization", bearer.as_str())],
        &[("x-api-key", key)],
        &[("authorization", bearer.as_str()), ("x-api-key", key)],
    ] {
        let answer = gateway.request("POST", "/v1/ingest/press-4", "", headers, b"{}");
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert_eq!(gateway.stored("press-4", 4).len(), 4);
}

#[test]
fn whoever_is_not_let_in_is_told_the_same_and_leaves_nothing_behind() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let (other, deleted) = (gateway.create("other"), gateway.create("deleted"));
    gateway.delete("deleted");
    let (revoked_id, revoked) = create_key(&gateway, "press-4", &json!({}));
    let path = format!("/v1/datasources/press-4/keys/{revoked_id}");
    assert_eq!(gateway.request("DELETE", &path, &gateway.admin_key(), &[], &[]).status, 204);
    // Well-formed, and nobody's: a key of another gateway.
    let elsewhere = scratch();
    let unknown = Gateway::start(elsewhere.path()).admin_key();
    let malformed = source.key.replace('_', "-");

    let before = gateway.records_in_log();
    let mut answers = BTreeSet::new();
    for (path, key) in [
        ("press-4", ""),
        ("press-4", "let me in"),
        ("press-4", malformed.as_str()),
        ("press-4", unknown.as_str()),
        ("press-4", revoked.as_str()),
        ("press-4", deleted.key.as_str()),
        ("press-4", other.key.as_str()),
        ("no-such-datasource", other.key.as_str()),
        ("no-such-datasource", ""),
    ] {
        let answer = gateway.request("POST", &format!("/v1/ingest/{path}"), key, &[JSON], b"{}");
        problem(&answer, 401, "unauthorized");
        assert_eq!(answer.headers["www-authenticate"], "Bearer realm=\"headgate\"");
        answers.insert(answer.text());
    }
    assert_eq!(answers.len(), 1, "{answers:?}");
    assert_eq!(gateway.records_in_log(), before, "nothing was kept");
    for (cause, count) in [
        ("no_key", 2.0),
        ("malformed_key", 2.0),
        ("unknown_key", 1.0),
        ("revoked_key", 2.0),
        ("other_datasource", 2.0),
    ] {
        let metric = format!("headgate_refused_total{{transport=\"http\",cause=\"{cause}\"}}");
        assert_eq!(gateway.metric(&metric), count, "{cause}");
    }
}

#[test]
fn two_different_keys_are_one_too_many() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (a, b) = (gateway.create("a"), gateway.create("b"));
    let answer = gateway.request("POST", "/v1/ingest/a", &a.key, &[("x-api-key", b.key.as_str())], b"{}");
    let json = problem(&answer, 401, "unauthorized");
    assert!(json["detail"].as_str().is_some_and(|words| words.contains("two different")), "{json}");
}

#[test]
fn a_key_in_a_url_is_refused_and_repeated_nowhere() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("trace.filter", "trace").start();
    let source = gateway.create("press-4");
    for query in [format!("key={}", source.key), format!("x={}", source.key), "access_token=abc".to_owned()] {
        // A valid key in the header does not make up for one in the URL.
        let path = format!("/v1/ingest/press-4?{query}");
        let answer = gateway.request("POST", &path, &source.key, &[], b"{}");
        let json = problem(&answer, 401, "key_in_url");
        assert!(json["detail"].as_str().is_some_and(|words| words.contains("replace it")), "{json}");
        assert!(!answer.text().contains(&source.key));
    }
    assert_eq!(gateway.records_in_log(), 0.0);
    let admin_key = gateway.admin_key();
    let (metrics, output) = (gateway.metrics(), gateway.stop().output);
    assert!(output.contains("cause=\"key_in_url\""), "the refusals were logged");
    for secret in [&source.key, &admin_key] {
        assert!(!metrics.contains(secret) && !output.contains(secret));
    }
}

#[test]
fn a_missing_scope_is_named() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let (_, reader) = create_key(&gateway, "press-4", &json!({ "scopes": ["subscribe"] }));
    let records = "/v1/datasources/press-4/records";
    for (answer, scope) in [
        (gateway.get(records, &source.key), "subscribe"),
        (gateway.get("/v1/datasources/press-4/latest", &source.key), "subscribe"),
        (gateway.request("POST", "/v1/ingest/press-4", &reader, &[], b"{}"), "ingest"),
        (gateway.get("/v1/datasources/press-4", &reader), "admin"),
        (gateway.get("/v1/datasources", &reader), "admin"),
        (gateway.post("/v1/datasources/press-4/keys", &source.key, &json!({})), "admin"),
        (gateway.request("DELETE", "/v1/datasources/press-4", &source.key, &[], &[]), "admin"),
    ] {
        assert_eq!(problem(&answer, 403, "missing_scope")["scope"], scope);
    }
    assert_eq!(gateway.get(records, &reader).status, 200);
    assert_eq!(gateway.get(records, &gateway.admin_key()).status, 200);
}

#[test]
fn a_key_for_all_datasources_names_one_that_there_is() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    gateway.create("press-4");
    let (_, all) = create_key(&gateway, "*", &json!({ "scopes": ["ingest"] }));
    assert_eq!(gateway.request("POST", "/v1/ingest/press-4/a/b", &all, &[], b"x").status, 200);
    problem(&gateway.request("POST", "/v1/ingest/press-5", &all, &[], b"x"), 404, "not_found");
    assert_eq!(gateway.stored("press-4", 1)[0]["topic"], "a/b");
}

#[test]
fn a_body_becomes_the_messages_that_its_type_says() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let form = ("content-type", "application/x-www-form-urlencoded");
    let text = ("content-type", "text/plain; charset=utf-8");
    type Sent<'a> = (&'a [(&'a str, &'a str)], &'a [u8], u64);
    let sent: [Sent; 9] = [
        (&[JSON], br#"{"value": 21.50}"#, 1),
        (&[JSON], br#"[{"value": 1}, 2, "three"]"#, 3),
        (&[NDJSON], b"{\"value\": 4}\n\n{\"value\": 5}\n", 2),
        (&[form], br#"{"value": 6}"#, 1),
        (&[form], b"[7, 8]", 2),
        (&[], b"[9, 10", 1),
        (&[text], b"[11, 12]", 1),
        (&[("content-type", "application/octet-stream")], b"\xff\x00", 1),
        (&[text], b"", 1),
    ];
    let mut next = first_offset();
    for (headers, body, count) in sent {
        let offsets = ingest(&gateway, &source, headers, body);
        assert_eq!(offsets, (count, next, next + count - 1), "{}", String::from_utf8_lossy(body));
        next += count;
    }
    let records = gateway.stored("press-4", 13);
    let json = Some("application/json");
    let expected: [(Value, Option<&str>); 13] = [
        (json!({ "value": 21.5 }), json),
        (json!({ "value": 1 }), json),
        (json!(2), json),
        (json!("three"), json),
        (json!({ "value": 4 }), json),
        (json!({ "value": 5 }), json),
        (json!({ "value": 6 }), json),
        (json!(7), json),
        (json!(8), json),
        (json!("[9, 10"), None),
        (json!([11, 12]), Some(text.1)),
        (json!("/wA="), Some("application/octet-stream")),
        (json!(""), Some(text.1)),
    ];
    for (record, (payload, content_type)) in records.iter().zip(expected) {
        assert_eq!(record["payload"], payload, "{record}");
        assert_eq!(record["content_type"].as_str(), content_type, "{record}");
        assert_eq!((&record["topic"], &record["transport"]), (&json!("t"), &json!("http")));
        assert_eq!(record["key_id"], source.key_id);
    }
    let page = gateway.get("/v1/datasources/press-4/records?limit=1", &gateway.admin_key()).text();
    assert!(page.contains(r#""payload":{"value": 21.50}"#), "digit for digit: {page}");
}

#[test]
fn a_body_with_one_bad_message_keeps_none_and_says_where_it_is() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("intake.payload_bytes_max", 10).start();
    let source = gateway.create("press-4");
    let refused = |header, body: &[u8], status, slug| {
        let answer = gateway.request("POST", "/v1/ingest/press-4", &source.key, &[header], body);
        problem(&answer, status, slug)
    };
    let bad = refused(NDJSON, b"{\"v\": 1}\n\n{\"v\": }\n", 400, "malformed");
    assert_eq!((&bad["line"], &bad["column"]), (&json!(3), &json!(7)), "{bad}");
    assert_eq!(refused(JSON, b"[1, 2,\n3", 400, "malformed")["line"], 2);
    refused(JSON, b"[]", 400, "malformed");
    refused(JSON, b"", 400, "malformed");
    let large = refused(JSON, b"[1, \"123456789\"]", 413, "too_large");
    assert_eq!((&large["pointer"], &large["limit"]), (&json!("/1"), &json!(10)), "{large}");
    assert_eq!(refused(NDJSON, b"1\n\"123456789\"", 413, "too_large")["line"], 2);
    refused(("content-type", "text/plain"), b"12345678901", 413, "too_large");
    for topic in ["a/+", "%23", "$SYS", "a%00b", "%FF"] {
        let path = format!("/v1/ingest/press-4/{topic}");
        let answer = gateway.request("POST", &path, &source.key, &[], b"x");
        assert_eq!(answer.status, 400, "{topic}: {}", answer.text());
    }
    assert_eq!(gateway.records_in_log(), 0.0, "nothing was kept");
    ingest(&gateway, &source, &[("content-type", "text/plain")], b"1234567890");
}

#[test]
fn a_topic_is_what_the_path_says_decoded() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let paths = [
        ("", "data"),
        ("/a", "a"),
        ("/a/b/c", "a/b/c"),
        ("/a%2Fb%C2%B0C", "a/b°C"),
        ("/a%20b", "a b"),
        ("//a/", "/a/"),
    ];
    let paths: Vec<_> = paths.into_iter().filter(|(_, topic)| cluster::has_room_for(topic)).collect();
    for (path, _) in &paths {
        let path = format!("/v1/ingest/press-4{path}");
        let answer = gateway.request("POST", &path, &source.key, &[], b"1");
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    }
    let records = gateway.stored("press-4", paths.len());
    for (record, (path, topic)) in records.iter().zip(&paths) {
        assert_eq!(record["topic"], *topic, "{path}");
    }
}

/// `bytes` through a command that compresses.
pub(crate) fn compressed(command: &str, args: &[&str], bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new(command)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the command is there");
    let mut stdin = child.stdin.take().expect("piped");
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || std::io::Write::write_all(&mut stdin, &bytes));
    let output = child.wait_with_output().expect("it ends");
    writer.join().expect("no panic").expect("it reads all");
    assert!(output.status.success());
    output.stdout
}

#[test]
fn a_compressed_body_is_taken_and_a_bomb_costs_no_more_than_the_limit() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let gzip = compressed("gzip", &["-9"], b"[1, 2]");
    let headers = [JSON, ("content-encoding", "gzip")];
    assert_eq!(ingest(&gateway, &source, &headers, &gzip), (2, first_offset(), first_offset() + 1));
    // 512 MiB of nothing, in half a megabyte.
    let bomb = compressed("gzip", &["-1"], &vec![0; 512 << 20]);
    let before = peak_memory_kib(&gateway);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                // It is answered before all of it is sent, and a client whose write fails then reads no answer.
                let answer = wait_for("an answer", || {
                    gateway.try_request("POST", "/v1/ingest/press-4", &source.key, &headers, &bomb).ok()
                });
                assert_eq!(problem(&answer, 413, "too_large")["limit"], 16 << 20);
            });
        }
    });
    // Four bodies at the limit, each grown by doubling.
    let grown = peak_memory_kib(&gateway) - before;
    assert!(grown < 4 * 3 * (16 << 10), "{grown} KiB");
    let answer =
        gateway.request("POST", "/v1/ingest/press-4", &source.key, &[("content-encoding", "br")], &gzip);
    problem(&answer, 415, "content_encoding");
    assert_eq!(answer.headers["accept-encoding"], "gzip, zstd");
    assert_eq!(gateway.records_in_log(), 2.0);
}

fn peak_memory_kib(gateway: &Gateway) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.pid())).expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn a_body_is_limited_at_one_below_and_one_above() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("http.body_bytes_max", 1000).start();
    let source = gateway.create("press-4");
    let text = ("content-type", "text/plain");
    ingest(&gateway, &source, &[text], &[b'x'; 1000]);
    let chunked = [text, ("transfer-encoding", "chunked")];
    for headers in [&[text][..], &chunked] {
        let answer = gateway.request("POST", "/v1/ingest/press-4", &source.key, headers, &[b'x'; 1001]);
        assert_eq!(problem(&answer, 413, "too_large")["limit"], 1000);
    }
    assert_eq!(gateway.records_in_log(), 1.0);
}

#[test]
fn a_datasource_is_created_shown_and_deleted() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let admin = gateway.admin_key();
    let answer = gateway.post("/v1/datasources", &admin, &json!({ "name": "Press 4, hall B" }));
    assert_eq!((answer.status, answer.headers["location"].as_str()), (201, "/v1/datasources/press-4-hall-b"));
    assert_eq!(answer.headers["cache-control"], "no-store");
    let created = answer.json();
    let key = created["key"]["secret"].as_str().expect("a secret");
    assert_eq!(created["key"]["scopes"], json!(["ingest"]));
    for line in created["connect"].as_object().expect("lines").values() {
        let line = line.as_str().expect("a line");
        assert!(line.contains("HEADGATE_API_KEY") && !line.contains(key), "{line}");
    }
    let shown = gateway.get("/v1/datasources/press-4-hall-b", &admin).json();
    assert_eq!(shown, created["datasource"]);
    assert_eq!(shown["name"], "Press 4, hall B");
    gateway.create("a");
    let listed = gateway.get("/v1/datasources", &admin).json();
    let ids: Vec<&str> =
        listed["datasources"].as_array().expect("a list").iter().filter_map(|d| d["id"].as_str()).collect();
    assert_eq!(ids, ["a", "press-4-hall-b"]);

    let ingest = || gateway.request("POST", "/v1/ingest/press-4-hall-b", key, &[], b"1").status;
    assert_eq!(ingest(), 200);
    gateway.delete("press-4-hall-b");
    assert_eq!(ingest(), 401, "the key is dead when the deletion answers");
    problem(&gateway.get("/v1/datasources/press-4-hall-b", &admin), 404, "not_found");
    let again = gateway.request("DELETE", "/v1/datasources/press-4-hall-b", &admin, &[], &[]);
    problem(&again, 404, "not_found");
}

#[test]
fn a_request_to_manage_that_makes_no_sense_changes_nothing() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let admin = gateway.admin_key();
    gateway.create("taken");
    for (body, status, slug) in [
        (json!({ "id": "taken", "name": "x" }), 409, "conflict"),
        (json!({ "id": "No Slug", "name": "x" }), 400, "malformed"),
        (json!({ "id": "*", "name": "x" }), 400, "malformed"),
        (json!({ "name": "" }), 400, "malformed"),
        (json!({ "id": "x" }), 400, "malformed"),
        (json!({ "name": "x", "scopes": [] }), 400, "malformed"),
        (json!({ "name": "x", "scopes": ["root"] }), 400, "malformed"),
        (json!({ "name": "x", "colour": "red" }), 400, "malformed"),
        (json!({ "name": "x", "schema": 1 }), 400, "malformed"),
        (json!("x"), 400, "malformed"),
        (json!(["x", "x"]), 400, "malformed"),
    ] {
        problem(&gateway.post("/v1/datasources", &admin, &body), status, slug);
    }
    let past = json!({ "expires_at": "2001-01-01T00:00:00Z" });
    problem(&gateway.post("/v1/datasources/taken/keys", &admin, &past), 422, "not_possible");
    problem(&gateway.post("/v1/datasources", &admin, &json!({ "name": "!?" })), 422, "not_possible");
    for body in [
        json!({ "expires_at": "soon" }),
        json!({ "scopes": null }),
        json!({ "lable": "x" }),
        json!(["label"]),
    ] {
        problem(&gateway.post("/v1/datasources/taken/keys", &admin, &body), 400, "malformed");
    }
    problem(&gateway.post("/v1/datasources/nobody/keys", &admin, &json!({})), 404, "not_found");
    for path in [
        "/v1/datasources/taken/keys/0123456789ab",
        "/v1/datasources/nobody/keys/0123456789ab",
        "/v1/datasources/*",
    ] {
        problem(&gateway.request("DELETE", path, &admin, &[], &[]), 404, "not_found");
    }
    problem(&gateway.request("DELETE", "/v1/datasources/taken/keys/x", &admin, &[], &[]), 400, "malformed");
    assert_eq!(gateway.metric("headgate_keys"), 2.0, "the admin's and one other");
}

#[test]
fn a_key_is_created_listed_and_revoked() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let admin = gateway.admin_key();
    let source = gateway.create("press-4");
    let wanted = json!({ "label": "gateway 2", "scopes": ["ingest", "subscribe"], "expires_at": "2099-01-01T01:00:00+01:00" });
    let (id, secret) = create_key(&gateway, "press-4", &wanted);
    let ingest = |key: &str| gateway.request("POST", "/v1/ingest/press-4", key, &[], b"1").status;
    assert_eq!(ingest(&secret), 200);

    let answer = gateway.get("/v1/datasources/press-4/keys", &admin);
    assert!(!answer.text().contains(&secret) && !answer.text().contains(&source.key));
    let keys = answer.json();
    let key = keys["keys"].as_array().expect("a list").iter().find(|key| key["id"] == id).expect("listed");
    assert_eq!((&key["label"], &key["scopes"]), (&wanted["label"], &wanted["scopes"]));
    assert_eq!(key["expires_at"], "2099-01-01T00:00:00.000000Z");

    let revoke =
        |id: &str| gateway.request("DELETE", &format!("/v1/datasources/press-4/keys/{id}"), &admin, &[], &[]);
    assert_eq!(revoke(&id).status, 204);
    assert_eq!(ingest(&secret), 401, "dead when the revocation answers");
    assert_eq!(ingest(&source.key), 200, "the other key works on");
    problem(&revoke(&id), 404, "not_found");
}

#[test]
fn a_key_expires_at_its_time() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    gateway.create("press-4");
    let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_millis(1500);
    let (_, key) = create_key(&gateway, "press-4", &json!({ "expires_at": soon.to_string() }));
    let ingest = || gateway.request("POST", "/v1/ingest/press-4", &key, &[], b"1").status;
    assert_eq!(ingest(), 200);
    wait_for("the key to expire", || (ingest() == 401).then_some(()));
    assert!(jiff::Timestamp::now() >= soon);
}

#[test]
fn the_last_admin_key_cannot_be_revoked() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let admin = gateway.admin_key();
    let keys = gateway.get("/v1/datasources/*/keys", &admin).json();
    let first = keys["keys"][0]["id"].as_str().expect("an id").to_owned();
    let revoke = |id: &str, key: &str| {
        gateway.request("DELETE", &format!("/v1/datasources/*/keys/{id}"), key, &[], &[])
    };
    problem(&revoke(&first, &admin), 409, "conflict");
    // One that could not manage anything does not count.
    create_key(&gateway, "*", &json!({ "scopes": ["subscribe"] }));
    problem(&revoke(&first, &admin), 409, "conflict");
    let (second, second_key) = create_key(&gateway, "*", &json!({ "scopes": ["admin"] }));
    assert_eq!(revoke(&first, &admin).status, 204);
    problem(&revoke(&second, &second_key), 409, "conflict");
    assert_eq!(gateway.get("/v1/datasources", &second_key).status, 200);
}

#[test]
fn an_admin_key_of_one_datasource_manages_that_one() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    gateway.create("a");
    gateway.create("b");
    let (_, key) = create_key(&gateway, "a", &json!({ "scopes": ["admin"] }));
    assert_eq!(gateway.get("/v1/datasources/a/keys", &key).status, 200);
    for path in
        ["/v1/datasources/b", "/v1/datasources/b/keys", "/v1/datasources/*/keys", "/v1/datasources/b/records"]
    {
        problem(&gateway.get(path, &key), 401, "unauthorized");
    }
    problem(&gateway.get("/v1/datasources", &key), 403, "missing_scope");
    problem(&gateway.post("/v1/datasources", &key, &json!({ "name": "c" })), 403, "missing_scope");
    problem(
        &gateway.post("/v1/datasources/*/keys", &key, &json!({ "scopes": ["admin"] })),
        401,
        "unauthorized",
    );
}

#[test]
fn the_lines_that_connect_a_device_work_as_they_are_pasted() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let scopes = json!({ "name": "press-4", "scopes": ["ingest", "subscribe"] });
    let created = gateway.post("/v1/datasources", &gateway.admin_key(), &scopes).json();
    let key = created["key"]["secret"].as_str().expect("a secret");
    let paste = |name: &str| {
        let line = created["connect"][name].as_str().expect("a line");
        let output = Command::new("sh").args(["-c", line]).env("HEADGATE_API_KEY", key).output();
        let output = output.expect("a shell");
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    };
    assert!(paste("curl").contains("\"accepted\":1"));
    paste("mosquitto_pub");
    let records = gateway.stored("press-4", 2);
    let transports: Vec<_> = records.iter().map(|record| &record["transport"]).collect();
    assert_eq!(transports, ["http", "mqtt"]);
    assert!(
        records.iter().all(|record| record["topic"] == "temperature" && record["payload"]["value"] == 21.5)
    );
    assert!(paste("latest").contains("21.5"));
    assert!(created["connect"]["mosquitto_sub"].as_str().expect("a line").contains(" mosquitto_sub -h "));
    for (client, line) in created["connect"].as_object().expect("lines") {
        // The shell's own printf is no process whose arguments others could read.
        let line = line.as_str().expect("a line");
        let is_argument = |line: &str| line.contains("$HEADGATE_API_KEY") && !line.contains("printf '%s\\n'");
        assert!(!line.lines().any(is_argument), "{client}: {line}");
    }
}

#[test]
fn stored_records_come_in_pages_and_by_filter() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let (other_id, other_key) = create_key(&gateway, "press-4", &json!({}));
    for i in 0..6 {
        let (topic, key) = (["a/x", "b/x"][i % 2], if i < 4 { &source.key } else { &other_key });
        let path = format!("/v1/ingest/press-4/{topic}");
        assert_eq!(gateway.request("POST", &path, key, &[JSON], i.to_string().as_bytes()).status, 200);
    }
    let all = gateway.stored("press-4", 6);
    let payloads = |query: &str| {
        let mut found = Vec::new();
        let mut after = String::new();
        // Pages of two, to the end.
        loop {
            let path = format!("/v1/datasources/press-4/records?limit=2&{query}{after}");
            let page = gateway.get(&path, &gateway.admin_key()).json();
            let records = page["records"].as_array().unwrap_or_else(|| panic!("{page}"));
            assert!(records.len() <= 2, "{page}");
            found.extend(records.iter().map(|record| record["payload"].as_u64().expect("a number")));
            match &page["next"] {
                Value::Null => return found,
                next => after = format!("&after_offset={next}"),
            }
        }
    };
    assert_eq!(payloads(""), [0, 1, 2, 3, 4, 5]);
    assert_eq!(payloads("topic=a/x"), [0, 2, 4]);
    assert_eq!(payloads("topic=%2B/x"), [0, 1, 2, 3, 4, 5]);
    assert_eq!(payloads("topic=b/%23"), [1, 3, 5]);
    assert_eq!(payloads(&format!("key_id={other_id}")), [4, 5]);
    let at = |i: usize| all[i]["received_at"].as_str().expect("a time");
    assert_eq!(payloads(&format!("from={}&to={}", at(2), at(4))), [2, 3]);

    let latest = gateway.get("/v1/datasources/press-4/latest", &gateway.admin_key()).json();
    let newest: Vec<_> =
        latest["topics"].as_array().expect("topics").iter().map(|t| (&t["topic"], &t["payload"])).collect();
    assert_eq!(newest, [(&json!("a/x"), &json!(4)), (&json!("b/x"), &json!(5))]);

    for (query, names) in [
        ("limit=0", "limit"),
        ("order=up", "order"),
        ("format=xml", "format"),
        ("limit=x", "limit"),
        ("from=yesterday", "from"),
        ("topci=a", "topci"),
        ("key_id=x", "key id"),
        ("after_offset=-1", "after_offset"),
        ("after_offset=9223372036854775808", "after_offset"),
        ("limit=9223372036854775808", "limit"),
    ] {
        let path = format!("/v1/datasources/press-4/records?{query}");
        let json = problem(&gateway.get(&path, &gateway.admin_key()), 400, "malformed");
        assert!(json["detail"].as_str().is_some_and(|words| words.contains(names)), "{query}: {json}");
    }
    let path = "/v1/datasources/press-4/records?order=newest&after_offset=1";
    let json = problem(&gateway.get(path, &gateway.admin_key()), 422, "not_possible");
    assert_eq!(json["parameter"], "after_offset");
}

#[test]
fn without_storage_messages_are_kept_and_records_are_not_served() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("storage.sink", "none").start();
    let source = gateway.create("press-4");
    ingest(&gateway, &source, &[], b"1");
    for what in ["records", "latest"] {
        let answer = gateway.get(&format!("/v1/datasources/press-4/{what}"), &gateway.admin_key());
        let json = problem(&answer, 404, "not_found");
        assert!(json["detail"].as_str().is_some_and(|words| words.contains("storage.sink")), "{json}");
    }
}

#[test]
fn each_sink_says_how_far_it_is() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).start();
    let source = gateway.create("press-4");
    let (_, _, last) = ingest(&gateway, &source, &[], b"1");
    let sinks = wait_for("the record is stored", || {
        let sinks = gateway.get("/v1/sinks", &gateway.admin_key()).json();
        (sinks["sinks"][0]["cursor"] == json!(last + 1)).then_some(sinks)
    });
    let sink = &sinks["sinks"][0];
    assert_eq!(
        (&sink["sink"], &sink["is_read"], &sink["is_writer"]),
        (&json!("sqlite"), &json!(true), &json!(true))
    );
    assert_eq!(
        (&sink["lag"], &sink["trouble"], &sink["last_error"]),
        (&json!(0), &Value::Null, &Value::Null)
    );
    assert_eq!(gateway.metric("headgate_sink_cursor{sink=\"sqlite\"}"), (last + 1) as f64);
    assert_eq!(gateway.metric("headgate_sink_up{sink=\"sqlite\"}"), 1.0);
    problem(&gateway.get("/v1/sinks", &source.key), 403, "missing_scope");
}

#[test]
fn what_is_not_there_and_what_is_not_allowed_are_problems_too() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    for path in ["/nothing", "/v1", "/v1/ingest", "/v1/ingest/"] {
        problem(&gateway.request("POST", path, "", &[], b""), 404, "not_found");
    }
    for (method, path, allowed) in [
        ("GET", "/v1/ingest/press-4", "POST"),
        ("PUT", "/v1/datasources/press-4", "GET,HEAD,PATCH,DELETE"),
        ("PUT", "/livez", "GET,HEAD"),
    ] {
        let answer = gateway.request(method, path, "", &[], b"");
        problem(&answer, 405, "method_not_allowed");
        assert_eq!(answer.headers["allow"], allowed, "{method} {path}");
    }
}

#[test]
fn health_and_metrics_need_no_key_and_tell_how_it_is() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    ingest(&gateway, &source, &[JSON], b"[1, 2, 3]");
    gateway.stored("press-4", 3);
    assert_eq!(gateway.get("/livez", "").status, 200);
    // In a cluster, its last connection to NATS may be a moment behind.
    wait_for("/readyz without a warning", || {
        let ready = gateway.get("/readyz", "");
        assert_eq!(ready.status, 200);
        (ready.json() == json!({ "status": "ready", "reasons": [], "warnings": [] })).then_some(())
    });
    let metrics = gateway.get("/metrics", "");
    assert_eq!(metrics.headers["content-type"], "text/plain; version=0.0.4");
    let end = (first_offset() + 3) as f64;
    for (name, value) in [
        ("headgate_log_first_offset", 0.0),
        ("headgate_log_next_offset", end),
        ("headgate_storage_cursor", end),
        ("headgate_keys", 2.0),
        ("headgate_accepted_total{transport=\"http\"}", 3.0),
    ] {
        assert_eq!(gateway.metric(name), value, "{name}");
    }
    wait_for("the log's size", || (gateway.metric("headgate_log_bytes") > 0.0).then_some(()));
}

#[test]
fn http_2_is_spoken_too() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let url = format!("http://{}/v1/ingest/press-4", gateway.http);
    let post = |key: &str, body: &[u8]| {
        let seconds = PATIENCE.as_secs().to_string();
        let header = format!("X-API-Key: {key}");
        let mut child = Command::new("curl")
            .args(["-s", "-m", &seconds, "--http2-prior-knowledge", "-w", " %{http_version} %{http_code}"])
            .args(["-H", &header, "--data-binary", "@-", &url])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("curl");
        let mut stdin = child.stdin.take().expect("piped");
        std::io::Write::write_all(&mut stdin, body).expect("curl reads all before it sends");
        drop(stdin);
        String::from_utf8(child.wait_with_output().expect("it ends").stdout).expect("text")
    };
    let (first, last) = (first_offset(), first_offset() + 1);
    let accepted = format!(r#"{{"accepted":2,"first_offset":{first},"last_offset":{last}}} 2 200"#);
    assert_eq!(post(&source.key, b"[1, 2]"), accepted);
    // A reset of the stream must not overtake the answer, whatever of the body is still to come.
    for body in [&b"x"[..], &[b'x'; 300_000]] {
        for _ in 0..10 {
            let answer = post("nonsense", body);
            assert!(answer.contains("/problems/unauthorized") && answer.ends_with(" 2 401"), "{answer:?}");
        }
    }
}
