//! `GET /v1/datasources/{id}/stream`: records as they come in or from any earlier point on, nothing missing and nothing
//! twice, however often a client comes back, and to whom.

mod ends;
mod readers;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::common::events::EventStream;
use crate::common::{Gateway, Setup, Source, scratch, wait_for};

const STREAM: &str = "/v1/datasources/press-4/stream";

/// Posts one message, and returns its offset.
fn post(gateway: &Gateway, key: &str, topic: &str, payload: impl AsRef<[u8]>) -> u64 {
    let answer = gateway.request("POST", &format!("/v1/ingest/press-4/{topic}"), key, &[], payload.as_ref());
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["first_offset"].as_u64().expect("an offset")
}

/// Posts numbers as one request, and returns the offset of the first.
fn post_numbers(gateway: &Gateway, key: &str, numbers: std::ops::Range<usize>) -> u64 {
    let body: String = numbers.map(|n| format!("{n}\n")).collect();
    let headers = [("content-type", "application/x-ndjson")];
    let answer = gateway.request("POST", "/v1/ingest/press-4/n", key, &headers, body.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["first_offset"].as_u64().expect("an offset")
}

fn numbers(range: std::ops::Range<usize>) -> Vec<Value> {
    range.map(Value::from).collect()
}

fn scene(setup: impl FnOnce(Setup) -> Setup) -> (tempfile::TempDir, Gateway, Source) {
    let dir = scratch();
    let gateway = setup(Setup::on(dir.path())).start();
    let source = gateway.create_open("press-4");
    (dir, gateway, source)
}

#[test]
fn a_stream_begins_where_it_is_told_and_goes_over_into_what_is_new() {
    let (_dir, gateway, source) = scene(|setup| setup);
    let first = post_numbers(&gateway, &source.key, 0..10);
    post(&gateway, &source.key, "other/topic", "10");
    let open = |query: &str| EventStream::open(gateway.http, &source.key, query);
    let mut live = open("");
    assert!(live.head.contains("content-type: text/event-stream\r\n"), "{}", live.head);
    assert!(live.head.contains("x-accel-buffering: no\r\n") && live.head.contains("cache-control: no-store"));
    let begin = live.event().expect("it says where it begins");
    assert_eq!((begin.name.as_str(), &begin.data["next_offset"]), ("heartbeat", &json!(first + 11)));
    assert_eq!((begin.id, &begin.data["log_end"]), (Some((first + 10).to_string()), &json!(first + 11)));
    let middle = gateway.stored("press-4", 11)[0]["received_at"].clone();
    let mut streams = vec![
        (open(&format!("?from_offset={}", first + 3)), 3..10),
        (open("?from_offset=0"), 0..10),
        (open("?tail=4"), 7..10),
        (open("?tail=2&topic=n"), 8..10),
        (open(&format!("?from_time={}", middle.as_str().expect("a time"))), 0..10),
        (open(&format!("?from_offset={}", first + 1_000_000)), 10..10),
        (open("?from_offset=9223372036854775807"), 10..10),
        (open("?tail=0"), 10..10),
        (open("?from_time=2999-01-01T00:00:00Z"), 10..10),
        (live, 10..10),
    ];
    post_numbers(&gateway, &source.key, 20..23);
    for (stream, before) in &mut streams {
        let mut wanted = numbers(before.clone());
        let mut received = stream.payloads(before.len());
        assert_eq!(received, wanted);
        let mut next = stream.record();
        if next["topic"] == "other/topic" {
            assert_eq!(next["payload"], 10);
            next = stream.record();
        }
        received = vec![next["payload"].take()];
        received.extend(stream.payloads(2));
        wanted = numbers(20..23);
        assert_eq!(received, wanted);
    }
    // The same as `records` shows, and no other members.
    let stored = gateway.stored("press-4", 14);
    let mut all = open("?from_offset=0");
    assert_eq!((0..14).map(|_| all.record()).collect::<Vec<_>>(), stored);
    // In the other form.
    let accept = [("accept", "application/x-ndjson")];
    let mut lines = EventStream::open_with(gateway.http, &source.key, "?tail=1", &accept);
    assert!(lines.head.contains("content-type: application/x-ndjson\r\n"), "{}", lines.head);
    assert_eq!(lines.line().expect("a heartbeat")["heartbeat"]["next_offset"], first + 13);
    assert_eq!(lines.line().as_ref(), stored.last());
    // Of a key for all datasources.
    let mut all = EventStream::open(gateway.http, &gateway.admin_key(), "?from_offset=0&topic=other/%2B");
    assert_eq!(all.record()["topic"], "other/topic");
    let head = gateway.request("HEAD", STREAM, &source.key, &[], &[]);
    assert_eq!((head.status, head.headers["content-type"].as_str()), (200, "text/event-stream"));
    let open_readers = gateway.metric("headgate_stream_readers");
    assert!(open_readers >= 13.0, "{open_readers}");
    drop((streams, all, lines));
}

#[test]
fn a_stream_that_cannot_be_opened_is_told_why() {
    let (_dir, gateway, source) = scene(|setup| setup);
    post_numbers(&gateway, &source.key, 0..3);
    let other = gateway.create("press-5");
    let ask = |query: &str, key: &str, headers: &[(&str, &str)]| {
        gateway.request("GET", &format!("{STREAM}{query}"), key, headers, &[]).status
    };
    for query in [
        "?from_offset=-1",
        "?from_offset=one",
        "?from_offset=",
        "?from_offset=1.5",
        "?from_offset=9223372036854775808",
        "?tail=9223372036854775808",
        "?from_time=noon",
        "?from_time=2026-11-23",
        "?tail=-1",
        "?tail=x",
        "?topic=a%23",
        "?topic=",
        "?topik=a",
        "?from_offset=1&from_offset=2",
    ] {
        assert_eq!(ask(query, &source.key, &[]), 400, "{query}");
    }
    assert_eq!(ask("?tail=1&from_offset=1", &source.key, &[]), 422, "one of them alone");
    for id in ["-1", "+1", "1.0", "abc", "1 1", "0x1", "{\"offset\":1}", "\u{e9}"] {
        assert_eq!(ask("", &source.key, &[("last-event-id", id)]), 400, "{id}");
    }
    assert_eq!(ask("", "", &[]), 401);
    assert_eq!(ask(&format!("?key={}", source.key), "", &[]), 401, "no key in a URL");
    assert_eq!(ask("", &other.key, &[]), 401, "another datasource's");
    let key =
        gateway.post("/v1/datasources/press-4/keys", &gateway.admin_key(), &json!({ "scopes": ["ingest"] }));
    let ingest = key.json()["secret"].as_str().map(str::to_owned);
    let ingest =
        ingest.or_else(|| key.json()["key"]["secret"].as_str().map(str::to_owned)).expect("a secret");
    assert_eq!(ask("", &ingest, &[]), 403);
    let missing = gateway.get("/v1/datasources/press-9/stream", &gateway.admin_key());
    assert_eq!(missing.status, 404);
    // What a client had may be more than there is now, or less than a number says.
    for id in ["99999", "18446744073709551615", "99999999999999999999999"] {
        let mut stream = EventStream::open_with(gateway.http, &source.key, "", &[("last-event-id", id)]);
        let begin = stream.event().expect("it says where it begins");
        assert_eq!(begin.data["next_offset"], begin.data["log_end"], "{id}");
    }
}

#[test]
fn payloads_that_are_not_text_come_as_records_shows_them() {
    let (_dir, gateway, source) = scene(|setup| setup);
    let payloads: [&[u8]; 8] = [
        b"two\nlines\r\nand\rmore",
        b"\x00",
        b"\xff\xfe\n\n",
        b"{\"a\":\r\n1}",
        b"data: x\n\nid: 9\n\n",
        b"",
        b"123456789012345678901234567890",
        &[b'\n'; 100_000],
    ];
    let headers = [("content-type", "application/octet-stream")];
    for payload in payloads {
        let answer = gateway.request("POST", "/v1/ingest/press-4/a", &source.key, &headers, payload);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let stored = gateway.stored("press-4", payloads.len());
    let mut stream = EventStream::open(gateway.http, &source.key, "?from_offset=0");
    for record in stored {
        assert_eq!(stream.record(), record);
    }
}

#[test]
fn heartbeats_say_how_far_the_log_is_and_a_client_goes_on_from_them() {
    let (_dir, gateway, source) = scene(|setup| setup.set("http.stream_heartbeat_ms", 100));
    let mut stream = EventStream::open(gateway.http, &source.key, "?topic=rare");
    stream.event().expect("the first heartbeat");
    let last = post_numbers(&gateway, &source.key, 0..1_000) + 999;
    // Nothing of that passes the filter, and the client need not have it looked through again.
    wait_for("a heartbeat behind all that", || {
        let beat = stream.event().expect("a heartbeat");
        assert_eq!((beat.name.as_str(), &beat.data["interval_ms"]), ("heartbeat", &json!(100)));
        (beat.data["log_end"] == last + 1 && beat.id == Some(last.to_string())).then_some(())
    });
    let rare = post(&gateway, &source.key, "rare", "1");
    let mut stream = stream.come_back(gateway.http, &source.key, "?topic=rare");
    assert_eq!(stream.record()["offset"], rare);
    // One that comes to an empty log misses nothing either.
    let (_dir, gateway, source) = scene(|setup| setup.set("http.stream_heartbeat_ms", 100));
    let mut stream = EventStream::open(gateway.http, &source.key, "");
    stream.event().expect("the first heartbeat");
    post_numbers(&gateway, &source.key, 0..3);
    let mut stream = stream.come_back(gateway.http, &source.key, "");
    assert_eq!(stream.payloads(3), numbers(0..3));
}

#[test]
fn a_client_that_comes_back_misses_nothing_and_gets_nothing_twice_whatever_is_killed() {
    const ROUNDS: usize = 12;
    const EACH: usize = 500;
    let dir = scratch();
    let setup = Setup::on(dir.path());
    let mut gateway = setup.start();
    let source = gateway.create_open("press-4");
    let mut stream = EventStream::open(gateway.http, &source.key, "");
    stream.event().expect("it says where it begins");
    let mut received = Vec::new();
    for round in 0..ROUNDS {
        std::thread::scope(|scope| {
            let (posting, key) = (&gateway, &source.key);
            scope.spawn(move || {
                for part in (round * EACH..(round + 1) * EACH).step_by(50) {
                    post_numbers(posting, key, part..part + 50);
                }
            });
            // Somewhere in the middle, mostly of an event.
            for _ in 0..(round * 67) % EACH {
                received.push(stream.record()["payload"].take());
            }
        });
        if round % 4 == 3 {
            gateway.kill();
            gateway = setup.start();
        }
        stream = stream.come_back(gateway.http, &source.key, "");
    }
    while received.len() < ROUNDS * EACH {
        received.push(stream.record()["payload"].take());
    }
    assert_eq!(received, numbers(0..ROUNDS * EACH));
    post(&gateway, &source.key, "n", "true");
    assert_eq!(stream.record()["payload"], true, "nothing comes twice");
}

#[test]
fn a_browsers_event_source_goes_on_after_a_kill() {
    const PROGRAM: &str = "
        const { EventSource } = require('eventsource');
        const [url, key, until] = process.argv.slice(1);
        const withKey = (url, init) =>
            fetch(url, { ...init, headers: { ...init.headers, Authorization: `Bearer ${key}` } });
        const source = new EventSource(url, { fetch: withKey });
        source.addEventListener('heartbeat', () => console.log('heartbeat'));
        source.addEventListener('end', (event) => console.log('end', JSON.parse(event.data).reason));
        source.onmessage = (event) => {
            const { offset, payload } = JSON.parse(event.data);
            if (event.lastEventId !== String(offset)) throw new Error(event.lastEventId);
            console.log(payload);
            if (payload === Number(until)) source.close();
        };";
    let dir = scratch();
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port");
    let setup = Setup::on(dir.path()).set("http.listen", port);
    let mut gateway = setup.start();
    let source = gateway.create_open("press-4");
    let modules = format!("{}/../node/node_modules", env!("CARGO_TARGET_TMPDIR"));
    let mut node = Command::new("node")
        .args(["-e", PROGRAM, &format!("http://{port}{STREAM}"), &source.key, "1499"])
        .env("NODE_PATH", modules)
        .stdout(Stdio::piped())
        .spawn()
        .expect("there is Node.js with eventsource (tests/run installs it)");
    let mut lines =
        BufReader::new(node.stdout.take().expect("piped")).lines().map(|line| line.expect("text"));
    assert_eq!(lines.next().as_deref(), Some("heartbeat"));
    let mut received = Vec::new();
    for part in [0..500, 500..1_000, 1_000..1_500] {
        let end = part.end;
        post_numbers(&gateway, &source.key, part);
        if end < 1_500 {
            gateway.kill();
            gateway = setup.start();
        }
    }
    for line in lines {
        if let Ok(number) = line.parse::<usize>() {
            received.push(Value::from(number));
        }
    }
    assert_eq!(received, numbers(0..1_500));
    assert!(node.wait().expect("our child").success());
}
