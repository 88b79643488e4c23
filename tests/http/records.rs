//! Reading what is stored: in both orders, in each form, however much it is, and what retention leaves of it. They guard
//! against a record that is missing or twice where an answer goes on, an answer that takes memory as it grows, a reader
//! that holds others up, and limits that remove what they should not.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::cluster::first_offset;
use crate::common::memory::ResidentMemory;
use crate::common::stores::{TestStore, in_each_store};
use crate::common::{Gateway, PATIENCE, Source, scratch, wait_for};

in_each_store! {
    the_form_is_asked_for_by_name_or_by_accept_and_all_have_the_same_records,
    both_orders_go_on_where_they_were_while_records_come_and_are_removed,
    an_answer_has_what_was_stored_when_it_began_and_takes_no_memory_as_it_grows,
    what_is_older_than_a_limit_or_more_is_removed_live_and_nothing_else,
    a_reader_in_the_middle_of_what_is_removed_is_told_nothing_wrong,
}

const NDJSON: (&str, &str) = ("content-type", "application/x-ndjson");
const JSON: (&str, &str) = ("content-type", "application/json");

/// Posts messages, a line each.
fn post_lines(gateway: &Gateway, source: &Source, topic: &str, lines: &str) {
    let path = format!("/v1/ingest/{}/{topic}", source.id);
    let answer = gateway.request("POST", &path, &source.key, &[NDJSON], lines.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
}

fn numbered(range: std::ops::Range<u32>) -> String {
    range.map(|n| format!("{{\"n\":{n}}}\n")).collect()
}

fn path_of(id: &str, query: &str) -> String {
    format!("/v1/datasources/{id}/records?{query}")
}

/// The numbers in an answer of lines of JSON.
fn numbers(lines: &str) -> Vec<u64> {
    let number = |line: &str| serde_json::from_str::<Value>(line).expect("JSON")["payload"]["n"].as_u64();
    lines.lines().map(|line| number(line).expect("a number")).collect()
}

fn set_limits(gateway: &Gateway, id: &str, limits: &Value) {
    let body = json!({ "limits": limits }).to_string();
    let path = format!("/v1/datasources/{id}");
    let answer = gateway.request("PATCH", &path, &gateway.admin_key(), &[JSON], body.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
}

fn the_form_is_asked_for_by_name_or_by_accept_and_all_have_the_same_records(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let source = gateway.create("press-4");
    post_lines(&gateway, &source, "a", &numbered(0..250));
    gateway.settle();
    let admin = gateway.admin_key();
    for (query, accept, media_type, lines) in [
        ("format=ndjson", "", "application/x-ndjson", 250),
        ("format=ndjson&limit=7", "text/csv", "application/x-ndjson", 7),
        ("", "application/x-ndjson", "application/x-ndjson", 250),
        ("", "text/csv;q=0.9, application/json;q=0.1", "text/csv; charset=utf-8", 251),
        ("format=csv", "application/json", "text/csv; charset=utf-8", 251),
    ] {
        let answer = gateway.request("GET", &path_of("press-4", query), &admin, &[("accept", accept)], b"");
        assert_eq!((answer.status, answer.headers["content-type"].as_str()), (200, media_type));
        assert_eq!(answer.text().lines().count(), lines, "{query} {accept}");
        assert_eq!(answer.headers["vary"], "accept");
        assert_eq!(answer.headers["headgate-stored-from"], first_offset().to_string());
        assert!(!answer.headers.contains_key("headgate-removed-below"));
    }
    let page = gateway.get(&path_of("press-4", ""), &admin).json();
    assert_eq!(page["records"].as_array().map(Vec::len), Some(100), "a page of JSON, as ever");
    assert_eq!(page["stored_from"]["offset"], first_offset());
    assert_eq!((&page["removed_below"], &page["next"]), (&Value::Null, &json!(first_offset() + 99)));
    let whole = gateway.get(&path_of("press-4", "limit=20000"), &admin).json();
    assert_eq!((whole["records"].as_array().map(Vec::len), &whole["next"]), (Some(250), &Value::Null));
    // Nothing: an empty answer in each form.
    gateway.create("press-5");
    for (form, text) in [("ndjson", ""), ("csv", whole_header())] {
        let answer = gateway.get(&path_of("press-5", &format!("format={form}")), &admin);
        assert_eq!((answer.status, answer.text().as_str()), (200, text));
    }
}

fn whole_header() -> &'static str {
    "offset,received_at,topic,payload,payload_encoding,content_type,key_id,transport,event_at\n"
}

fn both_orders_go_on_where_they_were_while_records_come_and_are_removed(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let (source, admin) = (gateway.create("press-4"), gateway.admin_key());
    post_lines(&gateway, &source, "a", &numbered(0..60));
    gateway.settle();
    for (order, from) in [("oldest", 0), ("newest", 60)] {
        let (mut found, mut cursor, mut sent) = (Vec::new(), String::new(), from.max(60));
        loop {
            let query = format!("order={order}&limit=7&to_offset={}{cursor}", first_offset() + 60);
            let page = gateway.get(&path_of("press-4", &query), &admin).json();
            let records = page["records"].as_array().expect("records");
            found.extend(records.iter().map(|record| record["payload"]["n"].as_u64().expect("a number")));
            // More comes in between.
            post_lines(&gateway, &source, "a", &numbered(sent..sent + 1));
            gateway.settle();
            sent += 1;
            match &page["next"] {
                Value::Null => break,
                next => cursor = format!("&cursor={next}"),
            }
        }
        let mut expected: Vec<u64> = (0..60).collect();
        if order == "newest" {
            expected.reverse();
        }
        assert_eq!(found, expected, "{order}");
    }
    let range = format!("format=ndjson&from_offset={}&to_offset={}", first_offset() + 3, first_offset() + 6);
    assert_eq!(numbers(&gateway.get(&path_of("press-4", &range), &admin).text()), [3, 4, 5]);
    // The oldest half is removed: the place that an answer had stays one.
    let cursor = first_offset() + 10;
    set_limits(&gateway, "press-4", &json!({ "stored_bytes": 40 * 72 }));
    let removed = wait_for("the oldest to be removed", || {
        gateway.get(&path_of("press-4", ""), &admin).json()["removed_below"].as_u64()
    });
    let page = gateway.get(&path_of("press-4", &format!("cursor={cursor}")), &admin).json();
    assert!(removed > cursor && page["stored_from"]["offset"].as_u64() >= Some(removed), "{page}");
    assert_eq!(page["records"][0]["offset"], page["stored_from"]["offset"]);
    let before = gateway.get(&path_of("press-4", &format!("order=newest&cursor={cursor}")), &admin).json();
    assert_eq!((before["records"].as_array().map(Vec::len), &before["next"]), (Some(0), &Value::Null));
    // Nor does a new datasource of that name make it another one.
    gateway.delete("press-4");
    let source = gateway.create("press-4");
    post_lines(&gateway, &source, "a", &numbered(500..503));
    gateway.settle();
    let page = gateway.get(&path_of("press-4", &format!("cursor={cursor}")), &admin).json();
    let found: Vec<_> =
        page["records"].as_array().expect("records").iter().map(|r| r["payload"]["n"].clone()).collect();
    assert_eq!((found, &page["removed_below"]), (vec![json!(500), json!(501), json!(502)], &Value::Null));
    let page = gateway.get(&path_of("press-4", "incarnation=1"), &admin).json();
    assert!(
        page["removed_below"].as_u64() >= Some(removed),
        "it is known of the one that was deleted: {page}"
    );
}

fn an_answer_has_what_was_stored_when_it_began_and_takes_no_memory_as_it_grows(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let (source, admin) = (gateway.create("press-4"), gateway.admin_key());
    let padding = "x".repeat(4_000);
    let total = 14_000_u32;
    for first in (0..total).step_by(1_000) {
        let lines: String =
            (first..first + 1_000).map(|n| format!("{{\"n\":{n},\"x\":\"{padding}\"}}\n")).collect();
        post_lines(&gateway, &source, "a", &lines);
    }
    gateway.settle();
    for order in ["oldest", "newest"] {
        let before = ResidentMemory::of(&gateway).bytes_now();
        let mut stream = TcpStream::connect(gateway.http).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        let path = path_of("press-4", &format!("format=ndjson&order={order}"));
        // Without chunks among the lines.
        let head = format!("GET {path} HTTP/1.0\r\nauthorization: {admin}\r\n\r\n");
        stream.write_all(head.as_bytes()).expect("sent");
        let mut answer = BufReader::with_capacity(64 << 10, stream);
        let mut line = String::new();
        answer.read_line(&mut line).expect("a status");
        assert!(line.contains(" 200 "), "{line}");
        // It is not read for now; others read, and storage goes on.
        let begun = Instant::now();
        post_lines(&gateway, &source, "b", "{\"n\":0}\n");
        gateway.settle();
        let page = gateway.get(&path_of("press-4", "topic=b&limit=1"), &admin).json();
        assert_eq!(page["records"][0]["payload"]["n"], 0);
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        let (mut bytes, mut lines, mut most) = (0, 0_u32, 0);
        loop {
            line.clear();
            let count = answer.read_line(&mut line).expect("the rest");
            if count == 0 {
                break;
            }
            bytes += count;
            lines += u32::from(line.starts_with("{\"offset\""));
            if lines.is_multiple_of(1_000) {
                most = most.max(ResidentMemory::of(&gateway).bytes_now());
            }
        }
        let more = if order == "newest" { 1 } else { 0 };
        assert_eq!(lines, total + more, "{order}: what came in after it began is not in it");
        assert!(bytes > 50 << 20, "{bytes}");
        assert!(most < before + (40 << 20), "{order}: {before} bytes before, {most} in between");
    }
}

fn what_is_older_than_a_limit_or_more_is_removed_live_and_nothing_else(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let (source, other, admin) = (gateway.create("press-4"), gateway.create("press-5"), gateway.admin_key());
    post_lines(&gateway, &source, "old", &numbered(0..300));
    post_lines(&gateway, &other, "kept", &numbered(0..300));
    gateway.settle();
    set_limits(&gateway, "press-4", &json!({ "stored_age_s": 1 }));
    wait_for("all to be older than a second, and removed", || {
        let page = gateway.get(&path_of("press-4", ""), &admin).json();
        (page["stored_from"].is_null() && page["removed_below"].as_u64() >= Some(first_offset() + 300))
            .then_some(())
    });
    let latest = gateway.get("/v1/datasources/press-4/latest", &admin).json();
    assert_eq!(latest["topics"], json!([]), "a topic of which nothing is left has no newest values");
    assert_eq!(gateway.get(&path_of("press-5", "format=ndjson"), &admin).text().lines().count(), 300);
    // Without the limit everything stays again, also what comes under a topic that was forgotten.
    set_limits(&gateway, "press-4", &json!({ "stored_age_s": null }));
    post_lines(&gateway, &source, "old", &numbered(300..400));
    post_lines(&gateway, &source, "new", &numbered(400..500));
    gateway.settle();
    let all = path_of("press-4", "format=ndjson");
    assert_eq!(numbers(&gateway.get(&all, &admin).text()), (300..500).collect::<Vec<u64>>());
    assert_eq!(
        gateway.get("/v1/datasources/press-4/latest", &admin).json()["topics"].as_array().map(Vec::len),
        Some(2)
    );
    // By bytes: 9 of the payload and 64 each.
    set_limits(&gateway, "press-4", &json!({ "stored_bytes": { "max": 73 * 120 } }));
    let left = || numbers(&gateway.get(&all, &admin).text());
    wait_for("no more than the limit", || (left().len() <= 120).then_some(()));
    assert_eq!(left(), (380..500).collect::<Vec<u64>>(), "the newest stay");
    post_lines(&gateway, &source, "new", &numbered(500..530));
    wait_for("room for what is new", || (left() == (410..530).collect::<Vec<u64>>()).then_some(()));
    // Also after a restart, without counting from the beginning.
    let dir = gateway.dir().to_owned();
    gateway.stop();
    let gateway = store.start(&dir);
    post_lines(&gateway, &source, "new", &numbered(530..540));
    wait_for("room for what is new", || {
        let now = numbers(&gateway.get(&all, &admin).text());
        (now == (420..540).collect::<Vec<u64>>()).then_some(())
    });
    for (limits, words) in [
        (json!({ "stored_age_s": 0 }), "between 1"),
        (json!({ "stored_bytes": { "max": 5, "policy": "reject" } }), "remove"),
        (json!({ "topics": { "max": 5, "policy": "remove" } }), "stored_age_s"),
    ] {
        let body = json!({ "limits": limits }).to_string();
        let answer = gateway.request("PATCH", "/v1/datasources/press-4", &admin, &[JSON], body.as_bytes());
        assert!(answer.status == 400 && answer.text().contains(words), "{}", answer.text());
    }
    let key =
        gateway.post("/v1/datasources/press-4/keys", &admin, &json!({ "limits": { "stored_bytes": 5 } }));
    assert_eq!(key.status, 400, "keys have none of these: {}", key.text());
}

fn a_reader_in_the_middle_of_what_is_removed_is_told_nothing_wrong(store: TestStore) {
    let dir = scratch();
    let gateway = store.start(dir.path());
    let (source, admin) = (gateway.create("press-4"), gateway.admin_key());
    let padding = "x".repeat(400);
    for first in (0..40_000).step_by(10_000) {
        let lines: String =
            (first..first + 10_000).map(|n| format!("{{\"n\":{n},\"x\":\"{padding}\"}}\n")).collect();
        post_lines(&gateway, &source, "a", &lines);
    }
    gateway.settle();
    let mut stream = TcpStream::connect(gateway.http).expect("connects");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let path = path_of("press-4", "format=ndjson");
    let head = format!("GET {path} HTTP/1.0\r\nauthorization: {admin}\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("sent");
    let mut first = [0; 4096];
    stream.read_exact(&mut first).expect("the beginning");
    set_limits(&gateway, "press-4", &json!({ "stored_bytes": 4_000 }));
    wait_for("nearly all to be removed", || {
        let page = gateway.get(&path_of("press-4", ""), &admin).json();
        (page["removed_below"].as_u64() >= Some(first_offset() + 39_900)).then_some(())
    });
    let mut rest = String::new();
    stream.read_to_string(&mut rest).expect("the rest");
    let mut offsets: Vec<u64> = Vec::new();
    for line in rest.lines().skip(1) {
        offsets
            .push(serde_json::from_str::<Value>(line).expect("whole lines")["offset"].as_u64().expect("one"));
    }
    assert!(offsets.is_sorted(), "in order, none twice");
    assert_eq!(offsets.last(), Some(&(first_offset() + 39_999)), "it goes on with what is left");
    assert!(offsets.len() < 40_000);
}
