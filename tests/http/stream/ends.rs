//! What ends a stream: its key, its datasource, the gateway; and what is not sent, and what is said of it.

use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{STREAM, numbers, post, post_numbers, scene};
use crate::common::events::EventStream;
use crate::common::{PATIENCE, Setup, wait_for};

#[test]
fn a_stream_ends_with_its_key_and_keeps_nobody_waiting_who_ends_it() {
    let (_dir, gateway, source) = scene(|setup| setup);
    let admin = gateway.admin_key();
    // 16 MB, more than sockets hold.
    for _ in 0..16 {
        post(&gateway, &source.key, "a", vec![b'x'; 1 << 20]);
    }
    let mut idle = EventStream::open(gateway.http, &source.key, "");
    idle.event().expect("it says where it begins");
    let mut reading = EventStream::open(gateway.http, &source.key, "?from_offset=0");
    reading.record();
    let lying = EventStream::open(gateway.http, &source.key, "?from_offset=0");
    let began = Instant::now();
    let path = format!("/v1/datasources/press-4/keys/{}", source.key_id);
    let answer = gateway.request("DELETE", &path, &admin, &[], &[]);
    let took = began.elapsed();
    assert_eq!(answer.status, 204, "{}", answer.text());
    assert!(took < Duration::from_secs(4), "{took:?}: whoever does not read is not waited for");
    assert_eq!(idle.end(), "key_dead");
    let mut left = lying.socket();
    let mut scrap = vec![0; 1 << 20];
    while left.read(&mut scrap).is_ok_and(|bytes| bytes > 0) {}
    // What was on its way to a client that reads may come; more does not.
    let mut more = 0;
    while let Some(event) = reading.telling() {
        more += usize::from(event.name == "message");
    }
    assert!(more < 15, "{more} records came after the key was dead");
    wait_for("no stream to be left", || (gateway.metric("headgate_stream_readers") == 0.0).then_some(()));
    assert!(gateway.metric("headgate_stream_ended_total{reason=\"key_dead\"}") >= 1.0);
    let again = EventStream::ask(gateway.http, STREAM, &source.key, &[]).expect("an answer");
    assert!(again.head.starts_with("HTTP/1.1 401 "), "{}", again.head);
}

#[test]
fn a_stream_ends_with_its_datasource_and_one_that_is_made_again_begins_empty() {
    let (_dir, gateway, source) = scene(|setup| setup);
    let admin = gateway.admin_key();
    post_numbers(&gateway, &source.key, 0..5);
    let mut own = EventStream::open(gateway.http, &source.key, "?from_offset=0");
    let mut admins = EventStream::open(gateway.http, &admin, "?from_offset=0");
    assert_eq!((own.payloads(5), admins.payloads(5)), (numbers(0..5), numbers(0..5)));
    gateway.delete("press-4");
    // Its keys die first: whichever the stream sees is the reason.
    let end = own.end();
    assert!(["datasource_deleted", "key_dead"].contains(&&*end), "{end}");
    assert_eq!(admins.end(), "datasource_deleted");
    assert_eq!(gateway.get(STREAM, &admin).status, 404);
    let again = gateway.create_open("press-4");
    let last = own.last_id.clone().expect("an id");
    let early = last.parse::<u64>().expect("an offset") - 3;
    let early = early.to_string();
    let mut streams: Vec<EventStream> = vec![
        EventStream::open(gateway.http, &again.key, "?from_offset=0"),
        EventStream::open(gateway.http, &again.key, "?from_time=2000-01-01T00:00:00Z"),
        EventStream::open(gateway.http, &again.key, "?tail=100"),
        EventStream::open_with(gateway.http, &again.key, "", &[("last-event-id", &early)]),
        EventStream::open_with(gateway.http, &again.key, "", &[("last-event-id", &last)]),
        EventStream::open(gateway.http, &admin, "?from_offset=0"),
    ];
    post_numbers(&gateway, &again.key, 5..8);
    for stream in &mut streams {
        assert_eq!(stream.payloads(3), numbers(5..8), "nothing of the former one");
    }
}

#[test]
fn what_is_in_quarantine_or_withheld_is_not_sent() {
    let (_dir, gateway, source) = scene(|setup| setup);
    let admin = gateway.admin_key();
    let schemas = json!({ "schemas": [{ "filter": "n", "schema": { "type": "integer" } }] });
    let answer = gateway.request(
        "PUT",
        "/v1/datasources/press-4/schema",
        &admin,
        &[("content-type", "application/json")],
        schemas.to_string().as_bytes(),
    );
    assert_eq!(answer.status, 200, "{}", answer.text());
    let mut live = EventStream::open(gateway.http, &source.key, "");
    live.event().expect("it says where it begins");
    let first = post_numbers(&gateway, &source.key, 0..1);
    let refused = gateway.request("POST", "/v1/ingest/press-4/n", &source.key, &[], b"\"no number\"");
    assert_eq!(refused.status, 422, "{}", refused.text());
    post_numbers(&gateway, &source.key, 1..2);
    assert_eq!(live.payloads(2), numbers(0..2));
    gateway.stored("press-4", 2);
    let leaked = json!({ "since": "2000-01-01T00:00:00Z" });
    let path = format!("/v1/datasources/press-4/keys/{}/quarantine", source.key_id);
    let answer = gateway.post(&path, &admin, &leaked);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let mut stream = EventStream::open(gateway.http, &admin, &format!("?from_offset={first}"));
    let other = gateway.post("/v1/datasources/press-4/keys", &admin, &json!({ "scopes": ["ingest"] })).json();
    let secret = other["key"]["secret"].as_str().or(other["secret"].as_str()).expect("a secret").to_owned();
    post_numbers(&gateway, &secret, 2..3);
    assert_eq!(stream.payloads(1), numbers(2..3), "what the leaked key had let in is not there");
}

#[test]
fn what_retention_removed_before_it_was_sent_is_told() {
    let set = |setup: Setup| setup.set("log.segment_bytes", 1 << 20).set("log.retention_bytes", 3 << 20);
    let (_dir, gateway, source) = scene(set);
    let first = post(&gateway, &source.key, "a", vec![b'x'; 100_000]);
    let mut last = first;
    // More than is kept in memory besides.
    for _ in 0..250 {
        last = wait_for("storage to catch up", || {
            let path = "/v1/ingest/press-4/a";
            let answer = gateway.request("POST", path, &source.key, &[], &vec![b'x'; 100_000]);
            (answer.status == 200).then(|| answer.json()["first_offset"].as_u64().expect("an offset"))
        });
    }
    for headers in [&[("last-event-id", "0")][..], &[]] {
        let mut stream = EventStream::open_with(gateway.http, &source.key, "?from_offset=0", headers);
        let gap = stream.telling().expect("a gap");
        assert_eq!(gap.name, "skipped");
        let next = gap.data["next_offset"].as_u64().expect("an offset");
        assert!(next > first && gap.data["records"].as_u64().is_some_and(|records| records > 0), "{gap:?}");
        assert_eq!(stream.record()["offset"], next, "told once");
        while stream.record()["offset"] != last {}
    }
}

#[test]
fn a_drain_tells_streams_to_come_again() {
    let (_dir, gateway, source) = scene(|setup| setup);
    let mut stream = EventStream::open(gateway.http, &source.key, "");
    stream.event().expect("it says where it begins");
    let http = gateway.http;
    let began = Instant::now();
    gateway.terminate();
    assert_eq!(stream.end(), "shutting_down");
    assert!(gateway.wait().status.success());
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    assert!(TcpStream::connect(http).is_err());
}
