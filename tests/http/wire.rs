//! HTTP connections, byte by byte: what is read and what is not, how long a client may take, how many
//! there may be, and how they end.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::{Gateway, PATIENCE, Setup, scratch, wait_for};

/// A connection that speaks HTTP by hand.
pub struct Wire(pub TcpStream);

impl Wire {
    pub fn open(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect(addr).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_nodelay(true).expect("an option");
        Self(stream)
    }

    pub fn send(&mut self, text: impl AsRef<[u8]>) {
        self.0.write_all(text.as_ref()).expect("sent");
    }

    /// A request's line and header.
    pub fn head(&mut self, method: &str, path: &str, headers: &[&str]) {
        self.request(method, path, headers, "");
    }

    /// A request in one write: what is answered after its header may be closed before more of it comes.
    pub fn request(&mut self, method: &str, path: &str, headers: &[&str], body: &str) {
        let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
        self.send(format!("{method} {path} HTTP/1.1\r\nHost: gateway\r\n{headers}\r\n{body}"));
    }

    /// The next answer: its header, and its body if it says how long that is.
    pub fn answer(&mut self) -> String {
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
    pub fn end(&mut self) {
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest).expect("an orderly end");
        assert_eq!(String::from_utf8_lossy(&rest), "");
    }

    /// Expects that nothing comes for a while.
    pub fn silence(&mut self, how_long: Duration) {
        self.0.set_read_timeout(Some(how_long)).expect("a timeout");
        let error = self.0.read(&mut [0]).expect_err("silence");
        assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
        self.0.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    }
}

pub fn with_key(key: &str) -> String {
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

/// It guards against a stolen admin key that outlived its end: the body of a request that was under way brought another one.
#[test]
fn a_key_that_ends_while_its_body_is_under_way_changes_nothing() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    gateway.create("press-4");
    let keys_of_all = || gateway.get("/v1/datasources/*/keys", &gateway.admin_key()).json();
    let of_press = "/v1/datasources/press-4/keys";
    for path in ["/v1/datasources/*/keys", of_press, "/v1/datasources"] {
        let before = keys_of_all();
        let stolen = json!({ "scopes": ["admin"] });
        let stolen = gateway.post("/v1/datasources/*/keys", &gateway.admin_key(), &stolen).json();
        let text = |pointer: &str| stolen.pointer(pointer).and_then(Value::as_str).expect("it is there");
        let body = r#"{"id":"spare","name":"spare","scopes":["admin"]}"#;
        let length = format!("Content-Length: {}", body.len());
        let headers = ["Expect: 100-continue", "Content-Type: application/json", &length];
        let mut wire = Wire::open(gateway.http);
        let key = with_key(text("/key/secret"));
        wire.head("POST", path, &[&headers[..], &[key.as_str()]].concat());
        assert!(wire.answer().starts_with("HTTP/1.1 100 "));
        wire.send(&body[..10]);
        let ended = format!("/v1/datasources/*/keys/{}", text("/key/id"));
        let ended = gateway.request("DELETE", &ended, &gateway.admin_key(), &[], b"");
        assert_eq!(ended.status, 204, "{}", ended.text());
        wire.send(&body[10..]);
        let answer = wire.answer();
        assert!(answer.starts_with("HTTP/1.1 401 "), "{path}: {answer}");
        let count = |keys: &Value| keys["keys"].as_array().map(Vec::len);
        assert_eq!(count(&keys_of_all()), count(&before), "{path}");
    }
    assert_eq!(gateway.get("/v1/datasources/spare", &gateway.admin_key()).status, 404);
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
    let gateway = setup.set("http.keep_alive_s_max", 1).start();
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
    let idle_since = Instant::now();
    wire.end();
    let waited = idle_since.elapsed();
    assert!(waited >= Duration::from_millis(900) && waited < PATIENCE, "{waited:?}");
    assert_eq!(gateway.metric("headgate_log_next_offset"), 0.0);
}

/// A connection that was idle for as long as a header may take was closed, while clients sent their next request on it.
#[test]
fn an_idle_connection_is_kept_for_longer_than_a_header_may_take_and_its_client_is_told() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("http.header_ms_max", 300).start();
    let mut wire = Wire::open(gateway.http);
    for _ in 0..2 {
        wire.head("GET", "/livez", &[]);
        let answer = wire.answer();
        assert!(answer.contains("\r\nkeep-alive: timeout=75\r\n"), "{answer}");
        assert!(answer.contains("\r\nconnection: keep-alive\r\n"), "{answer}");
        wire.silence(Duration::from_millis(1_000));
    }
    // The deadline of a header begins with its first byte.
    let started = Instant::now();
    wire.send("GET /livez HTTP/1.1\r\nHost: ga");
    wire.end();
    assert!(started.elapsed() >= Duration::from_millis(250), "{:?}", started.elapsed());
    // Nobody is told to come again on a connection that ends.
    let mut wire = Wire::open(gateway.http);
    wire.head("GET", "/livez", &["Connection: close"]);
    let answer = wire.answer();
    assert!(answer.contains("\r\nconnection: close\r\n") && !answer.contains("keep-alive"), "{answer}");
    wire.end();
    // HTTP/1.0 goes on where it asks to.
    let mut wire = Wire::open(gateway.http);
    wire.send("GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    assert!(wire.answer().contains("\r\nkeep-alive: timeout=75\r\n"));
    wire.send("GET /livez HTTP/1.0\r\n\r\n");
    assert!(!wire.answer().contains("keep-alive"));
    wire.end();
}

/// The connection was closed without an answer, although the message was kept.
#[test]
fn a_client_that_has_shut_down_its_half_still_gets_its_answer() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let key = with_key(&source.key);
    for n in 0..50 {
        let mut wire = Wire::open(gateway.http);
        let body = format!("{{\"n\":{n}}}");
        let length = format!("Content-Length: {}", body.len());
        wire.head("POST", "/v1/ingest/press-4", &[&key, &length]);
        wire.send(body);
        wire.0.shutdown(std::net::Shutdown::Write).expect("shut down");
        let answer = wire.answer();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("\"accepted\":1"), "{answer}");
        wire.end();
    }
    // Also a longer answer, and one after others on the same connection.
    let mut wire = Wire::open(gateway.http);
    let twice = "GET /openapi.json HTTP/1.1\r\nHost: gateway\r\n\r\n".repeat(2);
    wire.send(twice);
    wire.0.shutdown(std::net::Shutdown::Write).expect("shut down");
    for _ in 0..2 {
        assert!(wire.answer().starts_with("HTTP/1.1 200 "));
    }
    wire.end();
    assert_eq!(gateway.stored("press-4", 50).len(), 50);
    let mut wire = Wire::open(gateway.http);
    wire.head("GET", "/v1/datasources/press-4/latest", &[&with_key(&gateway.admin_key())]);
    wire.0.shutdown(std::net::Shutdown::Write).expect("shut down");
    let answer = wire.answer();
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("\"topics\""), "{answer}");
    wire.end();
}

/// What came as its body was taken for the first frames.
#[test]
fn a_request_that_opens_a_websocket_and_has_a_body_is_malformed() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let upgrade = [
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Protocol: mqtt",
    ];
    for (framing, body) in [
        ("Content-Length: 5", "hello"),
        ("Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n"),
        ("Content-Length: 5", ""),
        ("Transfer-Encoding: chunked", ""),
    ] {
        let mut wire = Wire::open(gateway.http);
        wire.request("GET", "/mqtt", &[&upgrade[..], &[framing]].concat(), body);
        let answer = wire.answer();
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("/problems/malformed"), "{answer}");
        wire.end();
    }
    let mut wire = Wire::open(gateway.http);
    wire.head("GET", "/mqtt", &[&upgrade[..], &["Content-Length: 0"]].concat());
    assert!(wire.answer().starts_with("HTTP/1.1 101 "), "no body at all");
    // What asks for another protocol elsewhere is served as it is (RFC 9110, 7.8).
    let mut wire = Wire::open(gateway.http);
    let h2c = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"];
    wire.head(
        "POST",
        "/v1/ingest/press-4",
        &[&h2c[..], &[&with_key(&source.key), "Content-Length: 2"]].concat(),
    );
    wire.send("{}");
    assert!(wire.answer().starts_with("HTTP/1.1 200 "));
}

/// Whoever answered a body that nobody reads, without a word that the connection ends, closed it under a client that was still
/// sending; the answer to a request for another protocol was followed by a reset.
#[test]
fn a_body_that_nobody_reads_and_that_is_late_costs_no_client_its_answer() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (key, websocket) = (with_key(&gateway.admin_key()), ["Connection: Upgrade", "Upgrade: websocket"]);
    let requests: [(_, _, &[&str], _); 7] = [
        ("GET", "/mqtt", &websocket, "426"),
        ("GET", "/mqtt", &[websocket[0], websocket[1], "Sec-WebSocket-Version: 13"], "400"),
        ("GET", "/mqtt", &[], "426"),
        ("GET", "/livez", &[], "200"),
        ("GET", "/v1/datasources", &[&key], "200"),
        ("POST", "/livez", &[], "405"),
        ("GET", "/nothing", &websocket, "404"),
    ];
    for (method, path, headers, status) in requests {
        for framing in ["Content-Length: 10", "Transfer-Encoding: chunked"] {
            let mut wire = Wire::open(gateway.http);
            wire.head(method, path, &[headers, &[framing]].concat());
            let answer = wire.answer();
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{path}: {answer}");
            assert!(answer.contains("connection: close\r\n"), "{path}, {framing}: {answer}");
            wire.end();
            // Our half is open yet: a socket that is closed for good is an error of the second write.
            for piece in ["5\r\nhe", "llo\r\n"] {
                wire.0.write_all(piece.as_bytes()).unwrap_or_else(|e| panic!("{path}, {framing}: {e}"));
            }
        }
    }
    // One that was read is no reason to close.
    let mut wire = Wire::open(gateway.http);
    let source = gateway.create("press-4");
    for body in ["{}", "[]"] {
        wire.request("POST", "/v1/ingest/press-4", &[&with_key(&source.key), "Content-Length: 2"], body);
        assert!(!wire.answer().contains("connection: close"));
        wire.head(
            "PATCH",
            "/v1/datasources/press-4",
            &[&key, "Content-Type: application/json", "Content-Length: 2"],
        );
        wire.send("{}");
        let answer = wire.answer();
        assert!(!answer.contains("connection: close"), "{answer}");
    }
}

/// They were served.
#[test]
fn a_request_without_a_host_or_with_two_is_malformed() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    for (lines, status) in [
        ("", 400),
        ("Host: a\r\nHost: a\r\n", 400),
        ("Host: a\r\nX: y\r\nhost: b\r\n", 400),
        ("Host: a b\r\n", 400),
        ("Host: a/b\r\n", 400),
        ("Host: a, b\r\n", 400),
        ("Host: gateway:8080\r\n", 200),
        ("Host:\r\n", 200),
    ] {
        for target in ["/livez", "http://gateway/livez"] {
            let mut wire = Wire::open(gateway.http);
            wire.send(format!("GET {target} HTTP/1.1\r\n{lines}\r\n"));
            let answer = wire.answer();
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{target} {lines:?}: {answer}");
        }
    }
    let mut wire = Wire::open(gateway.http);
    wire.send("GET /livez HTTP/1.0\r\n\r\n");
    assert!(wire.answer().starts_with("HTTP/1.0 200 "), "HTTP/1.0 had none");
    let refusals = gateway.get("/v1/refusals?cause=malformed", &gateway.admin_key()).json();
    assert!(refusals["refusals"][0]["count"].as_u64() >= Some(2), "{refusals}");
}

/// The answer to a request, without what differs from one to the next.
fn answered(addr: SocketAddr, path: &str, headers: &[&str], body: &str) -> String {
    let mut wire = Wire::open(addr);
    wire.head("POST", path, &[headers, &[&format!("Content-Length: {}", body.len())]].concat());
    wire.send(body);
    let answer = wire.answer();
    let (head, body) = answer.split_once("\r\n\r\n").expect("a header");
    let head = head.lines().filter(|line| !line.starts_with("date:") && !line.starts_with("content-length:"));
    let body: String = body.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    [head.collect::<Vec<_>>().join("\n"), body.replace("00", "0")].join("\n")
}

/// A path with nothing to decode does not pass through the router.
#[test]
fn a_request_for_ingest_is_answered_alike_with_and_without_the_router() {
    let dir = scratch();
    let origin = "http://page.example";
    let gateway = Setup::on(dir.path()).set("http.cors_origins", format!("[\"{origin}\"]")).start();
    let (key, json) = (with_key(&gateway.create("press-4").key), "Content-Type: application/json");
    let page = format!("Origin: {origin}");
    let routed = |path: &str| path.replace("press-4", "pres%73-4").replace("saw", "s%61w");
    let requests: [(&str, &[&str], &str); 10] = [
        ("200", &[&key, json], "{}"),
        ("200", &[&key, json, &page], "[1,2]"),
        ("400", &[&key, json], "{"),
        ("400", &[&key, json, "Host: other"], "{}"),
        ("400", &[&key, json, "Idempotency-Key: a", "Idempotency-Key: b"], "{}"),
        ("415", &[&key, json, "Content-Encoding: br"], "{}"),
        ("401", &[json], "{}"),
        ("401", &[json, "X-API-Key: nonsense", &page], "{}"),
        ("401", &[&key, json, "X-API-Key: nonsense"], "{}"),
        ("200", &[&key, json, "Connection: close"], "{}"),
    ];
    for path in ["/v1/ingest/press-4", "/v1/ingest/press-4/a/b"] {
        for (status, headers, body) in requests {
            let direct = answered(gateway.http, path, headers, body);
            assert!(direct.starts_with(&format!("HTTP/1.1 {status} ")), "{headers:?} {direct}");
            let by_router = answered(gateway.http, &routed(path), headers, body);
            assert_eq!(direct, by_router, "{path} {headers:?}");
        }
    }
    for path in ["/v1/ingest/saw", "/v1/ingest/press-4?key=x", "/v1/ingest/press-4/a?b=hgk_secret"] {
        let direct = answered(gateway.http, path, &[&key, json], "{}");
        assert!(direct.starts_with("HTTP/1.1 4"), "{path} {direct}");
        assert_eq!(direct, answered(gateway.http, &routed(path), &[&key, json], "{}"), "{path}");
    }
}

/// It was 404.
#[test]
fn a_slash_behind_the_datasource_names_no_topic() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let (key, json) = (with_key(&source.key), "Content-Type: application/json");
    let mut wire = Wire::open(gateway.http);
    for body in [&b"{\"v\":1}"[..], b"\xEF\xBB\xBF{\"v\":2}", b"\xEF\xBB\xBF[3]"] {
        wire.head("POST", "/v1/ingest/press-4/", &[&key, json, &format!("Content-Length: {}", body.len())]);
        wire.send(body);
        let answer = wire.answer();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
    let stored = gateway.stored("press-4", 3);
    let kept: Vec<String> = stored.iter().map(|r| format!("{} {}", r["topic"], r["payload"])).collect();
    assert_eq!(kept, ["\"data\" {\"v\":1}", "\"data\" {\"v\":2}", "\"data\" 3"]);
    // A mark before the JSON of a management request, too.
    let admin = with_key(&gateway.admin_key());
    let body = "\u{feff}{\"name\":\"Saw\"}";
    wire.head("POST", "/v1/datasources", &[&admin, json, &format!("Content-Length: {}", body.len())]);
    wire.send(body);
    let answer = wire.answer();
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
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
