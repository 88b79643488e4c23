//! The memory of a gateway at its defaults, whatever is sent to it over HTTP, and what another tenant notices: small
//! requests that become large, answers that nobody reads, strangers in crowds, floods of frames.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::api::compressed;
use crate::common::memory::Bystander;
use crate::common::{Gateway, PATIENCE, Setup, Source, scratch, signal, wait_for};

/// A topic of the largest size, which a gzipped request of a few hundred bytes has for 100,000 messages.
fn longest_topic() -> String {
    (0..8).map(|n| format!("{n}{}", "x".repeat(127))).collect::<Vec<_>>().concat()[..1024].to_owned()
}

fn connect(addr: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(addr).expect("connects");
    stream.set_read_timeout(Some(3 * PATIENCE)).expect("set");
    stream.set_write_timeout(Some(PATIENCE)).expect("set");
    stream
}

/// Sends a request, and reads nothing.
fn send_only(addr: SocketAddr, head: &str, body: &[u8]) -> TcpStream {
    let mut stream = connect(addr);
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    stream
}

/// The status of the answer on a connection; 0 if it was closed without one.
fn status(mut stream: &TcpStream) -> u16 {
    let mut line = [0; 12];
    match stream.read_exact(&mut line) {
        Ok(()) => String::from_utf8_lossy(&line[9..]).parse().unwrap_or(0),
        Err(_) => 0,
    }
}

fn post_head(source: &Source, path: &str, length: usize, more: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: h\r\nauthorization: {}\r\ncontent-length: {length}\r\n{more}\r\n",
        source.key
    )
}

/// Sends the same request on so many connections at once, and returns the statuses of their answers.
fn post_at_once(gateway: &Gateway, count: usize, head: &str, body: &[u8]) -> Vec<u16> {
    std::thread::scope(|scope| {
        let posts: Vec<_> =
            (0..count).map(|_| scope.spawn(|| status(&send_only(gateway.http, head, body)))).collect();
        posts.into_iter().map(|post| post.join().expect("a client")).collect()
    })
}

#[test]
fn nobody_attacks() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let bystander = Bystander::start(&gateway);
    std::thread::sleep(Duration::from_secs(1));
    // What the figures of the attacks are to be held against.
    bystander.assert_undisturbed("nothing");
}

#[test]
fn small_requests_of_a_hundred_thousand_messages_are_bounded() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let bystander = Bystander::start(&gateway);
    let path = format!("/v1/ingest/press-4/{}", longest_topic());
    let ndjson = "content-type: application/x-ndjson\r\ncontent-encoding: gzip\r\n";
    let lines = compressed("gzip", &["-9"], &b"1\n".repeat(100_000));
    assert!(lines.len() < 1_000, "{} bytes", lines.len());
    let head = post_head(&source, &path, lines.len(), ndjson);
    let statuses = post_at_once(&gateway, 10, &head, &lines);
    assert!(statuses.contains(&200) && statuses.iter().all(|s| [200, 429, 503].contains(s)), "{statuses:?}");
    // The same, where every message fails its schema: each goes into quarantine with its reason.
    let schema = json!({ "schema": { "type": "object", "required": ["a".repeat(400)] } });
    let schema_path = "/v1/datasources/press-4/schema";
    let answer = gateway.request(
        "PUT",
        schema_path,
        &gateway.admin_key(),
        &[("content-type", "application/json")],
        schema.to_string().as_bytes(),
    );
    assert_eq!(answer.status, 200, "{}", answer.text());
    let statuses = post_at_once(&gateway, 10, &head, &lines);
    assert!(statuses.iter().all(|s| [413, 422, 429, 503].contains(s)), "{statuses:?}");
    bystander.assert_undisturbed("gzipped requests of 100,000 messages");
    let answer = gateway.request("POST", "/v1/ingest/press-4", &source.key, &[], b"{}");
    assert_eq!(answer.status, 422, "what was charged is free again: {}", answer.text());
}

#[test]
fn compressed_bodies_that_are_held_open_are_bounded() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let bystander = Bystander::start(&gateway);
    let mut held = Vec::new();
    for (encoding, level) in [("gzip", "-1"), ("zstd", "-19")] {
        let body = compressed(encoding, &[level], &vec![b'7'; 12 << 20]);
        let more = format!("content-encoding: {encoding}\r\n");
        let head = post_head(&source, "/v1/ingest/press-4", body.len(), &more);
        // All but the last byte: what it becomes is in memory, and waits.
        held.extend((0..100).map(|_| send_only(gateway.http, &head, &body[..body.len() - 1])));
    }
    std::thread::sleep(Duration::from_secs(2));
    bystander.assert_undisturbed("compressed bodies held open");
    drop(held);
    wait_for("its memory is free again", || {
        // While it is not, the gateway answers before it has read all, and closes.
        let body = vec![b'7'; 12 << 20];
        let answer = gateway.try_request("POST", "/v1/ingest/press-4", &source.key, &[], &body).ok()?;
        (answer.status == 413 || answer.status == 200).then_some(())
    });
}

#[test]
fn answers_that_nobody_reads_are_bounded_for_every_get() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let admin = gateway.admin_key();
    // Each byte becomes six in JSON: 16 MiB of payloads are a page of 96 MiB.
    let payload = vec![1; 1 << 20];
    for topic in 0..20 {
        let path = format!("/v1/ingest/press-4/t{topic}");
        let answer = gateway.request("POST", &path, &source.key, &[("content-type", "text/plain")], &payload);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    gateway.settle();
    let bystander = Bystander::start(&gateway);
    let mut held = Vec::new();
    for path in [
        "/v1/datasources/press-4/records?limit=10000",
        "/v1/datasources/press-4/latest",
        "/v1/datasources/press-4/quarantine",
        "/v1/datasources",
        "/v1/datasources/press-4/keys",
        "/v1/audit?limit=10000",
        "/v1/refusals?limit=4096",
        "/metrics",
        "/openapi.json",
        "/",
    ] {
        let head = format!("GET {path} HTTP/1.1\r\nhost: h\r\nauthorization: {admin}\r\n\r\n");
        held.extend((0..40).map(|_| send_only(gateway.http, &head, &[])));
    }
    std::thread::sleep(Duration::from_secs(3));
    bystander.assert_undisturbed("answers that nobody reads");
    drop(held);
    // Whoever reads gets all of a page, in pieces.
    let page = wait_for("the key has room again", || {
        let answer = gateway.get("/v1/datasources/press-4/records?limit=10000", &admin);
        (answer.status == 200).then(|| answer.json())
    });
    assert_eq!(page["records"].as_array().map(Vec::len), Some(16));
    assert_eq!(gateway.records("press-4").len(), 20);
    let latest = gateway.get("/v1/datasources/press-4/latest", &admin).json();
    assert_eq!(latest["topics"].as_array().map(Vec::len), Some(16), "with `next`: {}", latest["next"]);
}

/// HTTP/2 frames by hand (RFC 9113).
pub mod h2 {
    pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let [_, a, b, c] = u32::try_from(payload.len()).expect("short").to_be_bytes();
        let mut frame = vec![a, b, c, kind, flags];
        frame.extend_from_slice(&stream.to_be_bytes());
        frame.extend_from_slice(payload);
        frame
    }

    /// SETTINGS with a window of 0 for every stream.
    pub fn no_window() -> Vec<u8> {
        frame(0x4, 0, 0, &[0, 4, 0, 0, 0, 0])
    }

    /// `GET path` with a key.
    pub fn get_with(stream: u32, path: &str, key: &str) -> Vec<u8> {
        let mut block = vec![0x82, 0x86, 0x41, 1, b'h', 0x04, u8::try_from(path.len()).expect("short")];
        block.extend_from_slice(path.as_bytes());
        block.extend_from_slice(&[0x0f, 0x08, u8::try_from(key.len()).expect("short")]);
        block.extend_from_slice(key.as_bytes());
        frame(0x1, 0x5, stream, &block)
    }

    /// `GET path` without a key.
    pub fn get(stream: u32, path: &str) -> Vec<u8> {
        let mut block = vec![0x82, 0x86, 0x41, 1, b'h', 0x04, u8::try_from(path.len()).expect("short")];
        block.extend_from_slice(path.as_bytes());
        frame(0x1, 0x5, stream, &block)
    }
}

#[test]
fn strangers_with_many_streams_and_no_window_are_bounded_and_closed() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let bystander = Bystander::start(&gateway);
    let mut held = Vec::new();
    for n in 0..1_000_u32 {
        let path = ["/v1/datasources", "/", "/openapi.json", "/nothing"][n as usize % 4];
        let streams = (0..100).flat_map(|n| h2::get(2 * n + 1, path));
        let bytes: Vec<u8> = h2::PREFACE.iter().copied().chain(h2::no_window()).chain(streams).collect();
        held.push(send_only(gateway.http, "", &bytes));
    }
    bystander.assert_undisturbed("1,000 strangers with 100 streams and no window");
    // Those whose answers wait unread are closed.
    for mut stream in held.into_iter().take(20) {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    }
    let refusals = gateway.get("/v1/refusals?cause=strangers_share", &gateway.admin_key()).json();
    assert_eq!(refusals["refusals"][0]["cause"], "strangers_share", "{refusals}");
}

#[test]
fn a_stranger_that_asks_again_and_again_is_told_to_leave_and_whoever_has_a_key_is_not() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let admin = gateway.admin_key();
    let get = |more: &str| format!("GET /v1/datasources/press-4 HTTP/1.1\r\nhost: h\r\n{more}\r\n");
    let statuses = |more: &str, count: usize| {
        let mut stream = connect(gateway.http);
        let last = get(&format!("{more}connection: close\r\n"));
        let _ = stream.write_all((get(more).repeat(count - 1) + &last).as_bytes());
        let mut answers = Vec::new();
        let _ = stream.read_to_end(&mut answers);
        let answers = String::from_utf8_lossy(&answers).into_owned();
        answers.split("HTTP/1.1 ").skip(1).map(|answer| answer[..3].to_owned()).collect::<Vec<_>>()
    };
    let stranger = statuses("", 200);
    assert!((17..40).contains(&stranger.len()), "{stranger:?}");
    assert_eq!(stranger.last().map(String::as_str), Some("429"), "{stranger:?}");
    assert!(stranger[..16].iter().all(|status| status == "401"), "{stranger:?}");
    let known = statuses(&format!("authorization: {admin}\r\n"), 200);
    assert_eq!(known, vec!["404"; 200]);
    // Over HTTP/2, where all can be asked at once.
    let streams: Vec<u8> = (0..60).flat_map(|n| h2::get(2 * n + 1, "/v1/datasources")).collect();
    let mut stream = connect(gateway.http);
    stream.write_all(&[h2::PREFACE, &h2::frame(0x4, 0, 0, &[]), &streams].concat()).expect("sent");
    let _ = stream.read_to_end(&mut Vec::new());
    // The connection may be closed a moment before that is noted.
    wait_for("a refusal for each connection", || {
        let refusals = gateway.get("/v1/refusals?cause=strangers_share", &admin).json();
        let first = &refusals["refusals"][0];
        (first["cause"] == "strangers_share" && first["count"] == 2).then_some(())
    });
}

#[test]
fn floods_of_frames_that_carry_nothing_close_the_connection() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let bystander = Bystander::start(&gateway);
    let reset = [h2::get(1, "/"), h2::frame(0x3, 0, 1, &[0, 0, 0, 8])].concat();
    let floods: [(&str, Vec<u8>); 6] = [
        ("WINDOW_UPDATE", h2::frame(0x8, 0, 0, &[0, 0, 0, 1])),
        ("PRIORITY", h2::frame(0x2, 0, 1, &[0, 0, 0, 0, 1])),
        ("SETTINGS", h2::frame(0x4, 0, 0, &[])),
        ("PING", h2::frame(0x6, 0, 0, &[0; 8])),
        ("RST_STREAM", reset),
        ("CONTINUATION", [h2::frame(0x1, 0, 1, &[0x82]), h2::frame(0x9, 0, 1, &[]).repeat(1_000)].concat()),
    ];
    for (name, frame) in &floods {
        let mut stream = connect(gateway.http);
        stream.write_all(&[h2::PREFACE, &h2::frame(0x4, 0, 0, &[])].concat()).expect("sent");
        // Another number for every stream, as a client has to.
        let numbered = |n: u32| match *name {
            "RST_STREAM" => [h2::get(2 * n + 1, "/"), h2::frame(0x3, 0, 2 * n + 1, &[0, 0, 0, 8])].concat(),
            _ => frame.clone(),
        };
        let started = Instant::now();
        let mut sent = 0;
        while sent < 200_000 && stream.write_all(&numbered(sent)).is_ok() {
            sent += 1;
            let mut scrap = [0; 4096];
            if sent % 500 == 0 {
                stream.set_read_timeout(Some(Duration::from_millis(1))).expect("set");
                let _ = stream.read(&mut scrap);
            }
        }
        assert!(sent < 200_000, "{sent} frames {name} were taken in {:?}", started.elapsed());
    }
    bystander.assert_undisturbed("floods of frames");
}

#[test]
fn ten_thousand_idle_strangers_delay_no_revocation() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let bystander = Bystander::start(&gateway);
    let crowd: Vec<TcpStream> = (0..10_100).map(|_| connect(gateway.http)).collect();
    let took = bystander.revocation_took();
    assert!(took < Duration::from_secs(2), "a revocation took {took:?}");
    bystander.assert_undisturbed("10,100 idle strangers");
    drop(crowd);
    let refusals = gateway.get("/v1/refusals?cause=strangers", &gateway.admin_key()).json();
    assert_eq!(refusals["refusals"][0]["cause"], "strangers", "{refusals}");
}

#[test]
fn the_limits_of_strangers_are_changed_while_the_gateway_runs() {
    let dir = scratch();
    let file = dir.path().join("headgate.toml");
    let limit = |max: usize| {
        std::fs::write(&file, format!("[http]\nstrangers_per_address_max = {max}\n")).expect("written");
    };
    limit(100);
    let gateway =
        Setup::on(dir.path()).set("config", file.display()).set("http.admin.listen", "127.0.0.1:0").start();
    let admin = gateway.admin.expect("it says where the administration is");
    let crowd: Vec<TcpStream> = (0..20).flat_map(|_| [gateway.http, admin].map(connect)).collect();
    let strangers = || {
        let refusals = gateway.get("/v1/refusals?cause=strangers", &gateway.admin_key()).json();
        refusals["refusals"]
            .as_array()
            .map_or(0, |of| of.iter().filter_map(|one| one["count"].as_u64()).sum())
    };
    assert_eq!(strangers(), 0);
    limit(3);
    signal(gateway.pid(), libc::SIGHUP);
    gateway.says("the configuration was read again");
    let mut seen = 0;
    for listener in [gateway.http, admin] {
        let more: Vec<TcpStream> = (0..5).map(|_| connect(listener)).collect();
        wait_for("strangers to make room", || (strangers() >= seen + 5).then_some(()));
        seen = strangers();
        drop(more);
    }
    drop(crowd);
}

#[test]
fn headers_that_do_not_end_are_bounded() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let bystander = Bystander::start(&gateway);
    let head = format!("GET / HTTP/1.1\r\nhost: h\r\nx-a: {}", "y".repeat(60 << 10));
    let crowd: Vec<TcpStream> = (0..3_000).map(|_| send_only(gateway.http, &head, &[])).collect();
    bystander.assert_undisturbed("3,000 headers of 60 KiB that do not end");
    drop(crowd);
}

#[test]
fn a_body_that_drips_is_refused() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let mut stream = send_only(gateway.http, &post_head(&source, "/v1/ingest/press-4", 1_000, ""), b"x");
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(40) {
        if stream.write_all(b"x").is_err() {
            break;
        }
        stream.set_read_timeout(Some(Duration::from_secs(1))).expect("set");
        let mut line = [0; 12];
        if stream.peek(&mut line).is_ok_and(|n| n == 12) {
            assert_eq!(status(&stream), 408);
            return;
        }
    }
    panic!("a body of one byte a second was served for {:?}", started.elapsed());
}
