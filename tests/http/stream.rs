//! `GET /v1/datasources/{id}/stream`: records as they come in or from any earlier point on, nothing missing and nothing
//! twice, however often a client comes back, and to whom; and what ends a stream.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::events::EventStream;
use crate::common::{Gateway, PATIENCE, Setup, Source, scratch, wait_for};
use crate::memory::h2;

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
        (open("?from_offset=18446744073709551615"), 10..10),
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
        "?from_offset=18446744073709551616",
        "?from_time=noon",
        "?from_time=2026-11-23",
        "?tail=-1",
        "?tail=x",
        "?tail=1&from_offset=1",
        "?topic=a%23",
        "?topic=",
        "?topik=a",
        "?from_offset=1&from_offset=2",
    ] {
        assert_eq!(ask(query, &source.key, &[]), 400, "{query}");
    }
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
    println!("the key was dead, with all its streams closed, after {took:?}");
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
    assert_eq!(own.end(), "datasource_deleted");
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
fn a_reader_that_takes_nothing_costs_little_is_seen_and_is_closed() {
    let set = |setup: Setup| setup.set("http.body_ms_max", 6_000).set("http.stream_heartbeat_ms", 200);
    let (_dir, gateway, source) = scene(set);
    for _ in 0..32 {
        post(&gateway, &source.key, "a", vec![b'x'; 1 << 20]);
    }
    let lying: Vec<TcpStream> = (0..40)
        .map(|n| {
            let mut tcp = TcpStream::connect(gateway.http).expect("connects");
            let query = format!("{STREAM}?from_offset=0");
            let request = match n % 2 {
                0 => {
                    let key = &source.key;
                    format!("GET {query} HTTP/1.1\r\nhost: g\r\nauthorization: {key}\r\n\r\n").into_bytes()
                }
                // With no window, or one that is taken up at once.
                _ if n % 4 == 1 => {
                    [h2::PREFACE, &h2::no_window(), &h2::get_with(1, &query, &source.key)].concat()
                }
                _ => {
                    [h2::PREFACE, &h2::frame(0x4, 0, 0, &[]), &h2::get_with(1, &query, &source.key)].concat()
                }
            };
            tcp.write_all(&request).expect("sent");
            tcp
        })
        .collect();
    wait_for("all to be open", || (gateway.metric("headgate_stream_readers") >= 40.0).then_some(()));
    wait_for("them to be seen", || (gateway.metric("headgate_stream_readers_still") >= 30.0).then_some(()));
    // Others of the same datasource are served meanwhile.
    let mut reading = EventStream::open(gateway.http, &source.key, "?from_offset=0");
    for _ in 0..32 {
        reading.record();
    }
    let held = gateway.metric("headgate_memory_held_bytes");
    assert!(held < 64e6, "{held}");
    wait_for("them to be closed", || (gateway.metric("headgate_stream_readers") <= 1.0).then_some(()));
    let closed = gateway.metric("headgate_stream_ended_total{reason=\"not_read\"}");
    assert!(closed >= 40.0, "{closed}\n{}", gateway.metrics());
    drop(lying);
    post_numbers(&gateway, &source.key, 0..1);
    assert_eq!(reading.record()["payload"], 0, "one that reads is not");
}

#[test]
fn a_stream_over_http2_goes_as_fast_as_its_window() {
    let (_dir, gateway, source) = scene(|setup| setup);
    post_numbers(&gateway, &source.key, 0..2_000);
    let mut tcp = TcpStream::connect(gateway.http).expect("connects");
    tcp.set_read_timeout(Some(PATIENCE)).expect("set");
    let path = format!("{STREAM}?from_offset=0");
    tcp.write_all(&[h2::PREFACE, &h2::no_window(), &h2::get_with(1, &path, &source.key)].concat())
        .expect("sent");
    let mut text = Vec::new();
    let mut window = 0;
    while text.windows(7).filter(|part| part == b"\ndata: ").count() < 2_000 {
        let mut head = [0; 9];
        tcp.read_exact(&mut head).expect("a frame");
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        tcp.read_exact(&mut payload).expect("its payload");
        match head[3] {
            0x0 => {
                window -= payload.len();
                text.extend_from_slice(&payload);
            }
            0x1 => {}
            0x4 if head[4] == 0 => tcp.write_all(&h2::frame(0x4, 1, 0, &[])).expect("sent"),
            _ => continue,
        }
        // It has as much as it was given, and no more comes.
        if window == 0 {
            let more = 1_000_u32.to_be_bytes();
            let more = [h2::frame(0x8, 0, 0, &more), h2::frame(0x8, 0, 1, &more)].concat();
            tcp.write_all(&more).expect("sent");
            window = 1_000;
        }
    }
    let text = String::from_utf8_lossy(&text);
    let received = text.split("\n\n").filter_map(|event| event.strip_prefix("id: ")?.split_once("\ndata: "));
    let received: Vec<Value> = received
        .filter_map(|(_, data)| serde_json::from_str::<Value>(data).ok())
        .map(|mut record| record["payload"].take())
        .collect();
    assert_eq!(received[..1_999], numbers(0..1_999)[..]);
}

#[test]
fn a_thousand_readers_get_what_comes_in_and_cost_little_while_nothing_does() {
    const READERS: usize = 1_000;
    let mut files = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a valid pointer.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut files);
        files.rlim_cur = files.rlim_max.min(8_192);
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const files);
    }
    let (_dir, gateway, source) = scene(|setup| setup);
    let memory = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.pid())).expect("it runs");
        let kib = status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB"));
        kib.expect("a size").parse::<usize>().expect("a number") << 10
    };
    let mut warm = EventStream::open(gateway.http, &source.key, "");
    warm.event().expect("it says where it begins");
    let before = memory();
    let mut readers: Vec<EventStream> = (0..READERS)
        .map(|_| {
            let mut stream = EventStream::open(gateway.http, &source.key, "");
            stream.event().expect("it says where it begins");
            stream
        })
        .collect();
    let each = memory().saturating_sub(before) / READERS;
    println!("an idle reader takes {each} bytes");
    assert!(each < 48 << 10, "{each}");
    post_numbers(&gateway, &source.key, 0..3);
    for stream in &mut readers {
        assert_eq!(stream.payloads(3), numbers(0..3));
    }
    drop(readers);
    wait_for("them to have left", || (gateway.metric("headgate_stream_readers") <= 1.0).then_some(()));
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
