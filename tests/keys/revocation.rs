//! Revocation, and what goes the same way: when the call returns, nothing more comes in under the key
//! and every live connection with it is closed, each in its protocol's words.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::tls::{Identity, TlsClient};
use crate::common::wire::{Connect, VERSIONS, Version, Wire};
use crate::common::ws::WsClient;
use crate::common::{Gateway, PATIENCE, Setup, scratch, wait_for};
use crate::{KEY_DEAD, acts, ahead, audited, create_key, post, revoke, rotate, shown};

/// An HTTP/1.1 connection that is kept alive.
struct Kept(TcpStream);

impl Kept {
    fn open(addr: SocketAddr) -> Self {
        let tcp = TcpStream::connect_timeout(&addr, PATIENCE).expect("the listener accepts");
        tcp.set_read_timeout(Some(PATIENCE)).expect("a socket option");
        Self(tcp)
    }

    fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).expect("sent");
    }

    /// Asks for something with a key; the answer's head, its body is read too.
    fn get(&mut self, path: &str, key: &str) -> String {
        self.send(&format!("GET {path} HTTP/1.1\r\nHost: gateway\r\nAuthorization: {key}\r\n\r\n"));
        self.answer()
    }

    /// The head of an answer; its body, of the length that it says, is read too.
    fn answer(&mut self) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte).expect("an answer");
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).expect("ASCII").to_lowercase();
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
        let length = length.map_or(0, |text| text.parse().expect("a length"));
        self.0.read_exact(&mut vec![0; length]).expect("a body");
        head
    }

    /// Whether the gateway has closed it, which has to be so by now.
    fn is_closed(&mut self) -> bool {
        self.0.set_read_timeout(Some(Duration::from_millis(500))).expect("a socket option");
        match self.0.read(&mut [0]) {
            Ok(0) => true,
            Ok(_) => panic!("an answer that nobody asked for"),
            Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        }
    }
}

#[test]
fn revocation_closes_mqtt_over_every_transport_and_kept_http_connections() {
    let dir = scratch();
    let issuer = Identity::issuer(dir.path(), "issuer");
    let identity = issuer.issue(dir.path(), "gateway");
    let gateway = Setup::on(&dir.path().join("data"))
        .set("mqtt.tls.certificate", identity.certificate.display())
        .set("mqtt.tls.key", identity.key.display())
        .start();
    gateway.create("press-4");
    let key = create_key(&gateway, "press-4", &json!({ "scopes": ["ingest", "subscribe"] }));
    let sister = create_key(&gateway, "press-4", &json!({ "scopes": ["ingest", "subscribe"] }));

    let mut wires: Vec<(Version, Wire)> = Vec::new();
    for version in VERSIONS {
        wires.push((version, Wire::login(gateway.mqtt, version, &key.secret)));
        let mut over_ws = Wire::over(WsClient::open(gateway.http));
        over_ws.let_in(&Connect::with_key(version, &key.secret));
        wires.push((version, over_ws));
        let tls = TlsClient::connect(gateway.mqtts.expect("served"), &issuer, None).expect("a handshake");
        let mut over_tls = Wire::over(tls);
        over_tls.let_in(&Connect::with_key(version, &key.secret));
        wires.push((version, over_tls));
    }
    let path = "/v1/datasources/press-4/records";
    let mut idle = Kept::open(gateway.http);
    assert!(idle.get(path, &key.secret).starts_with("http/1.1 200"));
    let mut sisters = Kept::open(gateway.http);
    assert!(sisters.get(path, &sister.secret).starts_with("http/1.1 200"));
    let mut stays = Wire::login(gateway.mqtt, Version::V5, &sister.secret);
    assert_eq!(shown(&gateway, "press-4", &key.id)["connections"], wires.len() + 1);

    let began = Instant::now();
    assert_eq!(revoke(&gateway, "press-4", &key.id).status, 204);
    let took = began.elapsed();
    assert!(idle.is_closed(), "an idle HTTP connection");
    assert_eq!(post(&gateway, "press-4", &key.secret), 401);
    for (version, mut wire) in wires {
        match version {
            Version::V5 => drop(wire.disconnected(KEY_DEAD)),
            _ => wire.closed(),
        }
    }
    assert!(took < Duration::from_secs(4), "it did not run into its own limit: {took:?}");
    assert_eq!(stays.publish(Version::V5, 1, "t", b"1"), 0);
    assert!(sisters.get(path, &sister.secret).starts_with("http/1.1 200"));
    assert_eq!(gateway.metric("headgate_revocation_seconds_count"), 1.0);
    assert!(gateway.metric("headgate_revocation_seconds_sum") < took.as_secs_f64());
    assert_eq!(acts(&gateway, "key.revoked", &key.id).len(), 1);
}

#[test]
fn what_an_admin_key_has_asked_for_is_not_done_once_it_is_revoked() {
    const ASKED: usize = 150;
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let leaked = create_key(&gateway, "*", &json!({ "scopes": ["admin"] }));
    let body = r#"{"scopes":["admin"]}"#;
    let request = format!(
        "POST /v1/datasources/*/keys HTTP/1.1\r\nHost: gateway\r\nAuthorization: {}\r\nContent-Type: \
         application/json\r\nContent-Length: {}\r\n\r\n{body}",
        leaked.secret,
        body.len()
    );
    let mut asking: Vec<_> = (0..ASKED).map(|_| Kept::open(gateway.http)).collect();
    asking.iter_mut().for_each(|kept| kept.send(&request));
    // They wait for each other.
    assert_eq!(revoke(&gateway, "*", &leaked.id).status, 204);
    std::thread::sleep(Duration::from_millis(500));
    let entries = audited(&gateway);
    let is_end = |entry: &Value| entry["action"] == "key.revoked" && entry["key_id"] == leaked.id;
    let end = entries.iter().position(is_end).expect("it is noted");
    let later: Vec<_> = entries[end..].iter().filter(|entry| entry["who"] == leaked.id).collect();
    assert!(later.is_empty(), "{} keys are made after it: {:?}", later.len(), later.first());
}

#[test]
fn a_request_that_is_under_way_is_answered_and_then_its_connection_closes() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let mut busy = Kept::open(gateway.http);
    busy.send(&format!(
        "POST /v1/ingest/press-4 HTTP/1.1\r\nHost: gateway\r\nAuthorization: {}\r\nContent-Length: 4\r\n\r\nab",
        source.key
    ));
    wait_for("the request to be under way", || {
        (shown(&gateway, "press-4", &source.key_id)["connections"] == 1).then_some(())
    });
    std::thread::scope(|scope| {
        let revoking = scope.spawn(|| revoke(&gateway, "press-4", &source.key_id).status);
        wait_for("the key to be refused", || (post(&gateway, "press-4", &source.key) == 401).then_some(()));
        busy.send("cd");
        assert!(busy.answer().starts_with("http/1.1 401"));
        assert!(busy.is_closed());
        assert_eq!(revoking.join().expect("no panic"), 204);
    });
    gateway.settle();
    let records = gateway.records("press-4");
    assert!(records.iter().all(|record| record["payload"]["value"] == 1), "what it sent did not come in");
}

#[test]
fn an_http2_connection_is_told_to_go_away() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let mut client = Http2::open(gateway.http);
    client.post("/v1/ingest/press-4", &source.key);
    client.until(|kind, _| kind == 0x0, "the answer's body");
    assert_eq!(revoke(&gateway, "press-4", &source.key_id).status, 204);
    client.until(|kind, _| kind == 0x7, "GOAWAY");
    client.closed();
}

/// As much of HTTP/2 (RFC 9113) as one request takes.
struct Http2(TcpStream);

impl Http2 {
    fn open(addr: SocketAddr) -> Self {
        let mut tcp = TcpStream::connect_timeout(&addr, PATIENCE).expect("the listener accepts");
        tcp.set_read_timeout(Some(PATIENCE)).expect("a socket option");
        tcp.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00").expect("sent");
        Self(tcp)
    }

    fn frame(&mut self, kind: u8, flags: u8, stream: u8, payload: &[u8]) {
        let length = u16::try_from(payload.len()).expect("a short frame").to_be_bytes();
        let head = [0, length[0], length[1], kind, flags, 0, 0, 0, stream];
        self.0.write_all(&[&head, payload].concat()).expect("sent");
    }

    /// Every field as a literal with a new name, never indexed (RFC 7541, 6.2.2).
    fn post(&mut self, path: &str, key: &str) {
        let mut fields = Vec::new();
        let pairs = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "gateway"),
            ("authorization", key),
            ("content-length", "2"),
        ];
        for (name, value) in pairs {
            fields.push(0);
            for text in [name, value] {
                fields.push(u8::try_from(text.len()).expect("below 127"));
                fields.extend(text.as_bytes());
            }
        }
        self.frame(0x1, 0x4, 1, &fields);
        self.frame(0x0, 0x1, 1, b"{}");
    }

    fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).ok()?;
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let mut payload = vec![0; length];
        self.0.read_exact(&mut payload).ok()?;
        Some((head[3], payload))
    }

    fn until(&mut self, is: impl Fn(u8, &[u8]) -> bool, what: &str) {
        loop {
            let (kind, payload) = self.next().unwrap_or_else(|| panic!("the connection ended before {what}"));
            match (kind, head_is_settings(kind, &payload)) {
                (kind, _) if is(kind, &payload) => return,
                (_, true) => self.frame(0x4, 0x1, 0, &[]),
                _ => {}
            }
        }
    }

    fn closed(&mut self) {
        while self.next().is_some() {}
    }
}

/// SETTINGS that have to be acknowledged: those that are not an acknowledgement themselves.
fn head_is_settings(kind: u8, payload: &[u8]) -> bool {
    kind == 0x4 && !payload.is_empty()
}

#[test]
fn a_caller_that_ends_its_own_key_gets_its_answer_without_waiting_for_itself() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    gateway.create("press-4");
    let admin = create_key(&gateway, "*", &json!({ "scopes": ["admin"] }));
    let mut own = Kept::open(gateway.http);
    assert!(own.get("/v1/datasources", &admin.secret).starts_with("http/1.1 200"));
    let began = Instant::now();
    own.send(&format!(
        "DELETE /v1/datasources/*/keys/{} HTTP/1.1\r\nHost: gateway\r\nAuthorization: {}\r\n\r\n",
        admin.id, admin.secret
    ));
    assert!(own.answer().starts_with("http/1.1 204"));
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    assert!(own.is_closed());
}

#[test]
fn a_key_that_expires_loses_its_live_connections_at_that_moment() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    gateway.create("press-4");
    let lasts = Duration::from_secs(2);
    let wanted = json!({ "expires_at": ahead(lasts), "scopes": ["ingest", "subscribe"] });
    let created = Instant::now();
    let key = create_key(&gateway, "press-4", &wanted);
    let mut device = Wire::login(gateway.mqtt, Version::V5, &key.secret);
    let mut idle = Kept::open(gateway.http);
    idle.get("/v1/datasources/press-4/records", &key.secret);
    device.disconnected(KEY_DEAD);
    let lived = created.elapsed();
    assert!(lived > Duration::from_millis(1_800) && lived < Duration::from_millis(3_500), "{lived:?}");
    assert!(idle.is_closed());
    assert_eq!(post(&gateway, "press-4", &key.secret), 401);
    assert_eq!(shown(&gateway, "press-4", &key.id)["state"], "expired");
    assert_eq!(rotate(&gateway, "press-4", &key.id, &json!({})).status, 409, "another key is needed");
    wait_for("the audit", || acts(&gateway, "key.expired", &key.id).pop());

    // For good, and it can be taken away.
    gateway.stop();
    let gateway = Gateway::start(dir.path());
    assert_eq!(post(&gateway, "press-4", &key.secret), 401);
    assert_eq!(shown(&gateway, "press-4", &key.id)["state"], "expired");
    assert_eq!(acts(&gateway, "key.expired", &key.id).len(), 1, "it expired once");
    assert_eq!(revoke(&gateway, "press-4", &key.id).status, 204);
}

#[test]
fn a_deleted_datasource_takes_every_connection_with_it() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let key = create_key(&gateway, "press-4", &json!({ "scopes": ["subscribe"] }));
    let mut device = Wire::login(gateway.mqtt, Version::V5, &source.key);
    let mut idle = Kept::open(gateway.http);
    idle.get("/v1/datasources/press-4/records", &key.secret);
    gateway.delete("press-4");
    assert!(idle.is_closed());
    device.disconnected(KEY_DEAD);
}

#[test]
fn mosquitto_is_thrown_out_and_not_let_in_again() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    gateway.create("press-4");
    let key = create_key(&gateway, "press-4", &json!({ "scopes": ["subscribe"] }));
    let mut subscriber = Command::new("mosquitto_sub")
        .args(["-h", "127.0.0.1", "-p", &gateway.mqtt.port().to_string(), "-V", "mqttv5", "-i", "backend"])
        .args(["-u", &key.secret, "-t", "#"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("mosquitto_sub is installed (tests/run does it)");
    wait_for("mosquitto_sub to be connected", || {
        (shown(&gateway, "press-4", &key.id)["connections"] == 1).then_some(())
    });
    assert_eq!(revoke(&gateway, "press-4", &key.id).status, 204);
    let refused = "headgate_refused_total{transport=\"mqtt\",cause=\"revoked_key\"}";
    let ended = wait_for("mosquitto_sub to be refused", || {
        let ended = subscriber.try_wait().expect("our child");
        (ended.is_some() || gateway.metric(refused) >= 1.0).then_some(ended)
    });
    if ended.is_none() {
        subscriber.kill().expect("our child");
        subscriber.wait().expect("our child");
    }
    assert_eq!(shown_connections(&gateway), 0.0);
}

fn shown_connections(gateway: &Gateway) -> f64 {
    wait_for("no MQTT connection to be left", || {
        let count = gateway.metric("headgate_mqtt_connections");
        (count == 0.0).then_some(count)
    })
}
