//! Floods of HTTP/2 frames, sent as they are: each ends its connection after a bounded number, is listed with its address,
//! and delays nobody else.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::common::memory::Bystander;
use crate::common::tls::{Identity, TlsClient};
use crate::common::{Gateway, PATIENCE, Setup, scratch, wait_for};

const DATA: u8 = 0x0;
const HEADERS: u8 = 0x1;
const PRIORITY: u8 = 0x2;
const RST_STREAM: u8 = 0x3;
const SETTINGS: u8 = 0x4;
const PING: u8 = 0x6;
const GOAWAY: u8 = 0x7;
const WINDOW_UPDATE: u8 = 0x8;
const CONTINUATION: u8 = 0x9;

/// How many frames of a flood may be sent before it ends: far more than what fits in the sockets' buffers, 10 MB, where they
/// lie if the gateway waits for a processor.
const SENT_MAX: u32 = 2_000_000;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, a, b, c] = u32::try_from(payload.len()).expect("short").to_be_bytes();
    [&[a, b, c, kind, flags], &stream.to_be_bytes()[..], payload].concat()
}

/// The fields of a request, as literals that are never indexed.
fn request(method: &str, path: &str, key: &str) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [
        (":method", method),
        (":scheme", "http"),
        (":path", path),
        (":authority", "gateway"),
        ("authorization", key),
    ] {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).expect("below 127"));
            block.extend(text.as_bytes());
        }
    }
    block
}

fn hello() -> Vec<u8> {
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &frame(SETTINGS, 0, 0, &[])[..]].concat()
}

/// Sends what `numbered` makes until the gateway has ended the connection, while it takes what comes back. How many it
/// has sent.
fn flood(addr: SocketAddr, begin: &[u8], numbered: impl Fn(u32) -> Vec<u8>) -> u32 {
    let mut tcp = TcpStream::connect_timeout(&addr, PATIENCE).expect("connected");
    let mut back = tcp.try_clone().expect("a second handle");
    let taking = std::thread::spawn(move || {
        let mut scrap = [0; 65_536];
        while back.read(&mut scrap).is_ok_and(|n| n > 0) {}
    });
    tcp.write_all(&hello()).expect("sent");
    tcp.write_all(begin).expect("sent");
    let mut sent = 0;
    while sent < SENT_MAX {
        let many: Vec<u8> = (sent..sent + 50).flat_map(&numbered).collect();
        if tcp.write_all(&many).is_err() {
            break;
        }
        sent += 50;
    }
    let _ = tcp.shutdown(std::net::Shutdown::Both);
    taking.join().expect("no panic");
    sent
}

#[test]
fn every_flood_of_frames_ends_its_connection_and_delays_nobody() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let bystander = Bystander::start(&gateway);
    let post = request("POST", "/v1/ingest/press-4", &source.key);
    let get = request("GET", "/livez", "");
    let reset = |block: &[u8], flags: u8, n: u32| {
        let stream = 2 * n + 1;
        [frame(HEADERS, flags, stream, block), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat()
    };
    let opened = frame(HEADERS, 0x4, 1, &post);
    let unended = frame(HEADERS, 0, 1, &get[..5]);
    type Flood<'a> = (&'a str, &'a [u8], Box<dyn Fn(u32) -> Vec<u8> + 'a>);
    let floods: Vec<Flood> = vec![
        ("rapid reset of strangers", &[], Box::new(|n| reset(&get, 0x5, n))),
        ("rapid reset with a key", &[], Box::new(|n| reset(&post, 0x4, n))),
        (
            "resets by the gateway",
            &[],
            Box::new(|n| {
                // An increment of 0 makes the gateway reset the stream.
                let stream = 2 * n + 1;
                [frame(HEADERS, 0x4, stream, &post), frame(WINDOW_UPDATE, 0, stream, &[0; 4])].concat()
            }),
        ),
        ("CONTINUATION", &unended, Box::new(|_| frame(CONTINUATION, 0, 1, &[]))),
        ("CONTINUATION with fields", &unended, Box::new(|_| frame(CONTINUATION, 0, 1, &get))),
        ("SETTINGS", &[], Box::new(|_| frame(SETTINGS, 0, 0, &[]))),
        (
            "SETTINGS with values",
            &[],
            Box::new(|n| frame(SETTINGS, 0, 0, &[[0, 4, 0, 0, 0, n.to_be_bytes()[3]]; 8].concat())),
        ),
        ("PING", &[], Box::new(|_| frame(PING, 0, 0, &[0; 8]))),
        ("PING answers", &[], Box::new(|_| frame(PING, 1, 0, &[0; 8]))),
        ("WINDOW_UPDATE", &[], Box::new(|_| frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]))),
        ("WINDOW_UPDATE of a stream", &opened, Box::new(|_| frame(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1]))),
        ("PRIORITY", &[], Box::new(|_| frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1]))),
        ("empty DATA", &opened, Box::new(|_| frame(DATA, 0, 1, &[]))),
        ("padding", &opened, Box::new(|_| frame(DATA, 0x8, 1, &[&[200], &[0; 200][..]].concat()))),
        ("GOAWAY", &[], Box::new(|_| frame(GOAWAY, 0, 0, &[0; 8]))),
        ("frames of no type", &[], Box::new(|_| frame(0xbe, 0, 0, &[1, 2, 3]))),
    ];
    for (name, begin, numbered) in &floods {
        let started = Instant::now();
        let sent = flood(gateway.http, begin, numbered);
        assert!(sent < SENT_MAX, "{name}: {sent} were sent in {:?}", started.elapsed());
    }
    bystander.assert_undisturbed("floods of frames");
    let refusals = gateway.get("/v1/refusals?cause=frame_flood", &gateway.admin_key()).json();
    let refusal = &refusals["refusals"][0];
    assert_eq!(refusal["address"], "127.0.0.1", "{refusals}");
    assert!(refusal["count"].as_u64() >= Some(8), "{refusals}");
    assert_eq!(gateway.request("POST", "/v1/ingest/press-4", &source.key, &[], b"{}").status, 200);
}

#[test]
fn a_flood_over_tls_is_one_too() {
    let dir = scratch();
    let issuer = Identity::issuer(dir.path(), "issuer");
    let identity = issuer.issue(dir.path(), "gateway");
    let gateway = Setup::on(&dir.path().join("data"))
        .set("http.tls.certificate", identity.certificate.display())
        .set("http.tls.key", identity.key.display())
        .start();
    let addr = gateway.https.expect("it says where it serves HTTPS");
    let mut client = TlsClient::offering(addr, &issuer, &[b"h2"]).expect("a handshake");
    client.write_all(&hello()).expect("sent");
    let pings = frame(PING, 0, 0, &[0; 8]).repeat(50);
    let mut sent = 0;
    while sent < SENT_MAX && client.write_all(&pings).is_ok() {
        sent += 50;
    }
    assert!(sent < SENT_MAX);
    let noted = || {
        let refusals = gateway.get("/v1/refusals?cause=frame_flood", &gateway.admin_key()).json();
        refusals["refusals"].as_array().map(Vec::len).filter(|count| *count == 1)
    };
    wait_for("the refusal", noted);
}

/// The 17th request of the first ones was taken for a stranger's: no key of any of them had been looked at.
#[test]
fn a_client_with_a_key_may_begin_with_as_many_requests_as_there_may_be_streams() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let block = request("POST", "/v1/ingest/press-4", &source.key);
    let mut tcp = TcpStream::connect_timeout(&gateway.http, PATIENCE).expect("connected");
    tcp.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let count = 120;
    let posts = (0..count).flat_map(|n| {
        let stream = 2 * n + 1;
        [frame(HEADERS, 0x4, stream, &block), frame(DATA, 0x1, stream, b"{}")].concat()
    });
    tcp.write_all(&hello().into_iter().chain(posts).collect::<Vec<u8>>()).expect("sent");
    for _ in 0..count {
        let status = loop {
            let mut head = [0; 9];
            tcp.read_exact(&mut head).expect("an answer to each");
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            tcp.read_exact(&mut payload).expect("a whole frame");
            if head[3] == HEADERS {
                break payload[0];
            }
        };
        assert_eq!(status, 0x88, "`:status: 200`, as HPACK has it");
    }
    assert_eq!(gateway.metric("headgate_log_next_offset"), f64::from(count));
}

/// Pings kept an HTTP/2 connection for ever that asked for nothing any more.
#[test]
fn an_idle_http2_connection_is_closed_as_others_are() {
    let dir = scratch();
    let gateway =
        Setup::on(dir.path()).set("http.keep_alive_s_max", 1).set("http.header_ms_max", 5_000).start();
    let mut tcp = TcpStream::connect_timeout(&gateway.http, PATIENCE).expect("connected");
    tcp.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let request = frame(HEADERS, 0x5, 1, &request("GET", "/livez", ""));
    tcp.write_all(&[hello(), request].concat()).expect("sent");
    let started = Instant::now();
    let mut goaway = false;
    loop {
        let mut head = [0; 9];
        if tcp.read_exact(&mut head).is_err() {
            break;
        }
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        tcp.read_exact(&mut payload).expect("a whole frame");
        goaway |= head[3] == GOAWAY;
        if head[3] == PING && head[4] == 0 {
            tcp.write_all(&frame(PING, 1, 0, &payload)).expect("sent");
        }
    }
    let lasted = started.elapsed();
    assert!(goaway, "it is told to go first");
    assert!(lasted >= Duration::from_millis(900) && lasted < PATIENCE, "{lasted:?}");
}
