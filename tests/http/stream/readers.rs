//! Readers of streams: those that take nothing, those that take little at a time, and many.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::Value;

use super::{STREAM, numbers, post, post_numbers, scene};
use crate::common::events::EventStream;
use crate::common::{PATIENCE, Setup, wait_for};
use crate::memory::h2;

#[test]
fn a_reader_that_takes_nothing_costs_little_is_seen_and_is_closed() {
    let set = |setup: Setup| setup.set("http.body_ms_max", 15_000).set("http.stream_heartbeat_ms", 200);
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
    assert!(each < 20 << 10, "{each}");
    post_numbers(&gateway, &source.key, 0..3);
    for stream in &mut readers {
        assert_eq!(stream.payloads(3), numbers(0..3));
    }
    drop(readers);
    wait_for("them to have left", || (gateway.metric("headgate_stream_readers") <= 1.0).then_some(()));
}

#[test]
fn a_stream_comes_behind_another_answer_and_is_the_last_one_of_its_connection() {
    let (_dir, gateway, source) = scene(|setup| setup);
    post_numbers(&gateway, &source.key, 0..3);
    let read_to = |requests: &str, end: &str| {
        let mut tcp = TcpStream::connect(gateway.http).expect("connects");
        tcp.set_read_timeout(Some(PATIENCE)).expect("set");
        tcp.write_all(requests.as_bytes()).expect("written");
        let (mut text, mut piece) = (String::new(), [0; 4096]);
        while !text.contains(end) {
            let bytes = tcp.read(&mut piece).expect("more comes");
            assert!(bytes > 0, "{text}");
            text.push_str(std::str::from_utf8(&piece[..bytes]).expect("text"));
        }
        text
    };
    let head = format!("host: g\r\nauthorization: Bearer {}\r\n\r\n", source.key);
    let stream = |version: &str| format!("GET {STREAM}?from_offset=0 HTTP/{version}\r\n{head}");
    let last = "\"payload\":2,";
    let both = read_to(&format!("GET /livez HTTP/1.1\r\nhost: g\r\n\r\n{}", stream("1.1")), last);
    let (first, second) = both.rsplit_once("HTTP/1.1 200 OK\r\n").expect("two answers");
    assert!(first.starts_with("HTTP/1.1 200 OK\r\n") && !first.contains("connection: close"), "{both}");
    assert!(
        second.contains("\r\nconnection: close\r\n") && second.contains("\r\ntransfer-encoding: chunked\r\n")
    );
    assert!(
        second.contains("\r\ndate: ") && second.contains("x-content-type-options: nosniff\r\n"),
        "{second}"
    );
    // A client of HTTP/1.0 knows no chunks.
    let old = read_to(&stream("1.0"), last);
    assert!(old.starts_with("HTTP/1.0 200 OK\r\n") && !old.contains("transfer-encoding"), "{old}");
    assert!(old.contains("\r\n\r\nretry: "), "{old}");
}

#[test]
fn streams_that_take_all_connections_make_room_for_others() {
    let (_dir, gateway, source) = scene(|setup| setup.set("http.connections_max", 2));
    let mut streams = [0; 2].map(|_| EventStream::open(gateway.http, &source.key, ""));
    streams.iter_mut().for_each(|stream| drop(stream.event().expect("it says where it begins")));
    for _ in 0..3 {
        assert_eq!(gateway.request("GET", "/readyz", "", &[], &[]).status, 200);
    }
}
