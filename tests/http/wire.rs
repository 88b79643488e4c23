//! HTTP connections, byte by byte: what is read and what is not, how long a client may take, how many
//! there may be, and how they end.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::common::{Gateway, PATIENCE, Setup, scratch, wait_for};

/// A connection that speaks HTTP by hand.
struct Wire(TcpStream);

impl Wire {
    fn open(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect(addr).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_nodelay(true).expect("an option");
        Self(stream)
    }

    fn send(&mut self, text: impl AsRef<[u8]>) {
        self.0.write_all(text.as_ref()).expect("sent");
    }

    /// A request's line and header.
    fn head(&mut self, method: &str, path: &str, headers: &[&str]) {
        let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
        self.send(format!("{method} {path} HTTP/1.1\r\nHost: gateway\r\n{headers}\r\n"));
    }

    /// The next answer: its header, and its body if it says how long that is.
    fn answer(&mut self) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte).expect("a whole header");
            head.push(byte[0]);
        }
        let mut answer = String::from_utf8(head).expect("text");
        let length = answer.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; length.map_or(0, |length| length.parse().expect("a number"))];
        self.0.read_exact(&mut body).expect("a whole body");
        answer.push_str(&String::from_utf8(body).expect("text"));
        answer
    }

    /// Expects the end of the connection, and no reset.
    fn end(&mut self) {
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest).expect("an orderly end");
        assert_eq!(String::from_utf8_lossy(&rest), "");
    }

    /// Expects that nothing comes for a while.
    fn silence(&mut self, how_long: Duration) {
        self.0.set_read_timeout(Some(how_long)).expect("a timeout");
        let error = self.0.read(&mut [0]).expect_err("silence");
        assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
        self.0.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    }
}

fn with_key(key: &str) -> String {
    format!("Authorization: Bearer {key}")
}

#[test]
fn the_body_of_a_request_that_is_not_let_in_is_not_read() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    gateway.create("press-4");
    let mut wire = Wire::open(gateway.http);
    // Answered although none of the body has come.
    wire.head("POST", "/v1/ingest/press-4", &["Authorization: nonsense", "Content-Length: 10000000"]);
    let answer = wire.answer();
    assert!(answer.starts_with("HTTP/1.1 401 ") && answer.contains("\r\nconnection: close\r\n"), "{answer}");
    wire.end();
}

#[test]
fn a_client_in_the_middle_of_its_body_still_gets_to_read_why_not() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("http.body_bytes_max", 1000).start();
    let source = gateway.create("press-4");
    let body = vec![b'x'; 300_000];
    for (key, status) in [("nonsense", "401"), (source.key.as_str(), "413")] {
        let mut wire = Wire::open(gateway.http);
        wire.head("POST", "/v1/ingest/press-4", &[&with_key(key), "Content-Length: 300000"]);
        for piece in body.chunks(10_000) {
            wire.send(piece);
        }
        let answer = wire.answer();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
        wire.end();
    }
}

#[test]
fn a_body_is_asked_for_only_when_the_key_is_good() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let expect = ["Expect: 100-continue", "Content-Length: 2"];
    let mut stranger = Wire::open(gateway.http);
    stranger.head("POST", "/v1/ingest/press-4", &[&expect[..], &["X-API-Key: nonsense"]].concat());
    let answer = stranger.answer();
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");

    let mut device = Wire::open(gateway.http);
    let key = with_key(&source.key);
    device.head("POST", "/v1/ingest/press-4", &[&expect[..], &[key.as_str()]].concat());
    assert!(device.answer().starts_with("HTTP/1.1 100 "));
    device.send("{}");
    assert!(device.answer().starts_with("HTTP/1.1 200 "));
}

#[test]
fn a_connection_carries_on_after_a_refusal_whose_body_was_read() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let (key, json) = (with_key(&source.key), "Content-Type: application/json");
    let mut wire = Wire::open(gateway.http);
    for (body, status) in [("{", "400"), ("{}", "200"), ("[]", "400"), ("[1]", "200")] {
        let length = format!("Content-Length: {}", body.len());
        wire.head("POST", "/v1/ingest/press-4", &[&key, json, &length]);
        wire.send(body);
        let answer = wire.answer();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        assert!(!answer.contains("connection: close"), "{answer}");
    }
    // In chunks, with no length said beforehand.
    wire.head("POST", "/v1/ingest/press-4", &[&key, json, "Transfer-Encoding: chunked"]);
    wire.send("2\r\n[1\r\n3\r\n,2]\r\n0\r\n\r\n");
    let answer = wire.answer();
    assert!(answer.ends_with(r#"{"accepted":2,"first_offset":2,"last_offset":3}"#), "{answer}");
}

#[test]
fn a_body_that_breaks_off_is_not_kept() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let key = with_key(&source.key);
    for framing in ["Content-Length: 10", "Transfer-Encoding: chunked"] {
        let mut wire = Wire::open(gateway.http);
        wire.head("POST", "/v1/ingest/press-4", &[&key, "Content-Type: text/plain", framing]);
        wire.send(if framing.starts_with('C') { "half" } else { "4\r\nhalf\r\n" });
        wire.0.shutdown(std::net::Shutdown::Write).expect("shut down");
        let mut rest = Vec::new();
        let _ = wire.0.read_to_end(&mut rest);
        assert!(!rest.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&rest));
    }
    assert_eq!(gateway.metric("headgate_log_next_offset"), 0.0);
}

#[test]
fn a_client_that_takes_too_long_is_not_waited_for() {
    let dir = scratch();
    let setup = Setup::on(dir.path()).set("http.header_ms_max", 300).set("http.body_ms_max", 300);
    let gateway = setup.start();
    let source = gateway.create("press-4");
    // Nothing; half of what HTTP/2 begins with; half a header.
    for begin in ["", "PRI * HTTP", "POST /v1/ingest/press-4 HTTP/1.1\r\nHost: g"] {
        let mut wire = Wire::open(gateway.http);
        let started = Instant::now();
        wire.send(begin);
        let mut rest = Vec::new();
        let _ = wire.0.read_to_end(&mut rest);
        let waited = started.elapsed();
        assert!(waited >= Duration::from_millis(250) && waited < PATIENCE, "{begin:?}: {waited:?}");
        assert!(!rest.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&rest));
    }
    // Half a body.
    let mut wire = Wire::open(gateway.http);
    wire.head("POST", "/v1/ingest/press-4", &[&with_key(&source.key), "Content-Length: 10"]);
    wire.send("half");
    let answer = wire.answer();
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("http.body_ms_max"), "{answer}");
    wire.end();
    // An idle connection after its answer.
    let mut wire = Wire::open(gateway.http);
    wire.head("GET", "/livez", &[]);
    assert!(wire.answer().starts_with("HTTP/1.1 200 "));
    wire.end();
    assert_eq!(gateway.metric("headgate_log_next_offset"), 0.0);
}

#[test]
fn a_client_that_does_not_read_its_answer_is_not_waited_for() {
    let dir = scratch();
    let setup = Setup::on(dir.path()).set("http.header_ms_max", 300).set("http.body_ms_max", 300);
    // A place for one connection: whoever comes next is served when the one before is gone.
    let gateway = setup.set("http.connections_max", 1).start();
    let source = gateway.create("press-4");
    let admin = gateway.admin_key();
    // More than the sockets' buffers on both sides hold.
    let payload = vec![b'x'; 1 << 20];
    for _ in 0..24 {
        let answer = gateway.request("POST", "/v1/ingest/press-4", &source.key, &[], &payload);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    gateway.settle();
    let mut wires = [0; 8].map(|_| {
        let mut wire = Wire::open(gateway.http);
        wire.head("GET", "/v1/datasources/press-4/records?limit=24", &[&with_key(&admin)]);
        wire
    });
    let mut next = Wire::open(gateway.http);
    next.head("GET", "/livez", &[]);
    assert!(next.answer().starts_with("HTTP/1.1 200 "));
    let whole = wires.iter_mut().map(|wire| {
        let mut answer = Vec::new();
        wire.0.read_to_end(&mut answer).is_ok() && answer.len() > payload.len() * 24
    });
    assert_eq!(whole.filter(|whole| *whole).count(), 0, "the answers were too small to stall");
}

#[test]
fn one_connection_too_many_waits_until_there_is_a_place() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("http.connections_max", 2).start();
    let mut served = [0; 2].map(|_| Wire::open(gateway.http));
    for wire in &mut served {
        wire.head("GET", "/livez", &[]);
        assert!(wire.answer().starts_with("HTTP/1.1 200 "));
    }
    let mut waiting = Wire::open(gateway.http);
    waiting.head("GET", "/livez", &[]);
    waiting.silence(Duration::from_millis(200));
    drop(served);
    assert!(waiting.answer().starts_with("HTTP/1.1 200 "));
}

#[test]
fn when_all_places_are_taken_for_long_whoever_has_most_makes_room() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("http.connections_max", 2).start();
    let mut idle = [0; 2].map(|_| Wire::open(gateway.http));
    for wire in &mut idle {
        wire.head("GET", "/livez", &[]);
        assert!(wire.answer().starts_with("HTTP/1.1 200 "));
    }
    for _ in 0..5 {
        let mut next = Wire::open(gateway.http);
        next.head("GET", "/livez", &[]);
        assert!(next.answer().starts_with("HTTP/1.1 200 "));
    }
    idle[0].end();
}

#[test]
fn a_drain_answers_what_is_under_way_and_takes_nothing_new() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let addr = gateway.http;
    let mut idle = Wire::open(addr);
    idle.head("GET", "/livez", &[]);
    assert!(idle.answer().starts_with("HTTP/1.1 200 "));
    let mut busy = Wire::open(addr);
    let key = with_key(&source.key);
    busy.head("POST", "/v1/ingest/press-4", &[&key, "Content-Length: 4", "Expect: 100-continue"]);
    assert!(busy.answer().starts_with("HTTP/1.1 100 "), "the request is under way");
    busy.send("12");

    gateway.terminate();
    idle.end();
    wait_for("the listener to close", || TcpStream::connect(addr).is_err().then_some(()));
    busy.send("34");
    let answer = busy.answer();
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("\"accepted\":1"), "{answer}");
    assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
    busy.end();
    assert!(gateway.wait().status.success());

    let gateway = Gateway::start(dir.path());
    assert_eq!(gateway.stored("press-4", 1)[0]["payload"], 1234);
}
