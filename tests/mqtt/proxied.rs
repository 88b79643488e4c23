//! MQTT behind a proxy of TCP: whom the gateway takes a client for, by the PROXY protocol, over TCP and TLS.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::tls::{Identity, TlsClient};
use crate::common::wire::{CONNACK, Connect, Next, VERSIONS, Version, Wire};
use crate::common::{Gateway, PATIENCE, Setup, Source, scratch, wait_for, ws};

const CLIENT: &str = "203.0.113.9";
const HEADER: &[u8] = b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 1883\r\n";

fn behind(dir: &std::path::Path, proxies: &str) -> Setup {
    Setup::on(dir).set("trusted_proxies", proxies)
}

fn refusals(gateway: &Gateway, cause: &str) -> Vec<Value> {
    let answer = gateway.get(&format!("/v1/refusals?cause={cause}"), &gateway.admin_key());
    answer.json()["refusals"].as_array().expect("a list").clone()
}

fn refused(gateway: &Gateway, cause: &str, count: u64) -> Value {
    wait_for(&format!("{count} refusals for {cause}"), || {
        let found = refusals(gateway, cause);
        let all: u64 = found.iter().filter_map(|refusal| refusal["count"].as_u64()).sum();
        (all >= count).then(|| found[0].clone())
    })
}

fn last_address(gateway: &Gateway, source: &Source) -> String {
    let keys = gateway.get("/v1/datasources/press-4/keys", &gateway.admin_key()).json();
    keys["keys"][0]["last_used"]["address"].as_str().expect("an address").to_owned()
        + if keys["keys"][0]["id"] == source.key_id { "" } else { " of another key" }
}

fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len()).expect("short").to_be_bytes();
    [&b"\r\n\r\n\0\r\nQUIT\n"[..], &[command, family], &length, rest].concat()
}

const V4_ADDRESSES: [u8; 12] = [203, 0, 113, 9, 10, 0, 0, 1, 0x12, 0x67, 0x07, 0x5B];

#[test]
fn a_trusted_proxy_says_who_the_client_is() {
    let dir = scratch();
    let gateway = behind(dir.path(), "[\"127.0.0.0/8\"]").set("auth.failures_burst", 3).start();
    let source = gateway.create("press-4");
    for (header, address) in [
        (HEADER.to_vec(), CLIENT),
        (v2(0x21, 0x11, &V4_ADDRESSES), CLIENT),
        (v2(0x20, 0x00, &[]), "127.0.0.1"),
        (v2(0x21, 0x31, &[0; 216]), "127.0.0.1"),
        (Vec::new(), "127.0.0.1"),
    ] {
        for version in VERSIONS {
            let mut wire = Wire::open(gateway.mqtt);
            let connect = Connect::with_key(version, &source.key).packet();
            wire.send(&[&header[..], &connect].concat());
            assert_eq!(wire.packet(CONNACK).reason(), 0, "{header:?}");
            assert_eq!(wire.publish(version, 1, "t", b"1"), 0);
            assert_eq!(last_address(&gateway, &source), address, "{header:?}");
        }
    }
    // The limit of bad keys is the client's.
    let guess = |header: &[u8]| {
        let mut wire = Wire::open(gateway.mqtt);
        wire.send(&[header, &Connect::with_key(Version::V5, "nonsense").packet()].concat());
        wire.packet(CONNACK).reason()
    };
    assert_eq!([0; 4].map(|_| guess(HEADER)), [0x87, 0x87, 0x87, 0x9F]);
    assert_eq!(guess(b"PROXY TCP4 203.0.113.10 10.0.0.1 4711 1883\r\n"), 0x87);
    assert_eq!(refused(&gateway, "too_many_failures", 1)["address"], CLIENT);
}

#[test]
fn a_websocket_behind_a_proxy_of_http_is_its_clients() {
    let dir = scratch();
    let gateway = behind(dir.path(), "[\"127.0.0.1\"]").start();
    let source = gateway.create("press-4");
    let mut tcp = TcpStream::connect(gateway.http).expect("connected");
    tcp.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let lines = format!("Sec-WebSocket-Protocol: mqtt\r\nX-Forwarded-For: {CLIENT}\r\n");
    tcp.write_all(ws::request(&lines).as_bytes()).expect("sent");
    let connect = Connect::with_key(Version::V5, &source.key).packet();
    tcp.write_all(&ws::frame(ws::FIN | ws::BINARY, &connect)).expect("sent");
    wait_for("the key's last use", || {
        let keys = gateway.get("/v1/datasources/press-4/keys", &gateway.admin_key()).json();
        (keys["keys"][0]["last_used"]["address"] == CLIENT).then_some(())
    });
}

#[test]
fn over_tls_the_header_comes_before_the_handshake() {
    let dir = scratch();
    let issuer = Identity::issuer(dir.path(), "issuer");
    let identity = issuer.issue(dir.path(), "gateway");
    let with_tls = |setup: Setup| {
        setup
            .set("mqtt.tls.certificate", identity.certificate.display())
            .set("mqtt.tls.key", identity.key.display())
    };
    let gateway = with_tls(behind(&dir.path().join("data"), "[\"127.0.0.1\"]")).start();
    let source = gateway.create("press-4");
    let addr = gateway.mqtts.expect("it says where it serves TLS");
    for header in [HEADER.to_vec(), v2(0x21, 0x11, &V4_ADDRESSES)] {
        let mut tcp = TcpStream::connect(addr).expect("connected");
        tcp.write_all(&header).expect("sent");
        let mut wire = Wire::over(TlsClient::over(tcp, &issuer, None).expect("a handshake"));
        wire.let_in(&Connect::with_key(Version::V5, &source.key));
        assert_eq!(last_address(&gateway, &source), CLIENT);
    }
    gateway.stop();
    let gateway = with_tls(behind(&dir.path().join("data"), "[]")).start();
    let addr = gateway.mqtts.expect("it says where it serves TLS");
    let mut tcp = TcpStream::connect(addr).expect("connected");
    tcp.write_all(HEADER).expect("sent");
    assert!(TlsClient::over(tcp, &issuer, None).is_err());
    assert_eq!(refused(&gateway, "untrusted_proxy", 1)["address"], "127.0.0.1");
}

#[test]
fn a_header_from_anybody_else_is_closed_and_listed() {
    let dir = scratch();
    let gateway = behind(dir.path(), "[\"10.0.0.0/8\"]").start();
    let source = gateway.create("press-4");
    for header in [HEADER.to_vec(), v2(0x21, 0x11, &V4_ADDRESSES), v2(0x20, 0x00, &[])] {
        let mut wire = Wire::open(gateway.mqtt);
        wire.send(&[&header[..], &Connect::with_key(Version::V5, &source.key).packet()].concat());
        assert_eq!(wire.next(), Next::Closed, "{header:?}");
    }
    let refusal = refused(&gateway, "untrusted_proxy", 3);
    assert_eq!(refusal["address"], "127.0.0.1", "{refusal}");
    assert!(refusal["advice"].as_str().expect("words").contains("trusted_proxies"), "{refusal}");
}

#[test]
fn a_header_that_is_slow_or_cannot_be_read_is_closed_and_listed() {
    let dir = scratch();
    let gateway = behind(dir.path(), "[\"127.0.0.1\"]").set("mqtt.connect_ms_max", 700).start();
    for header in [
        &b"PROXY TCP4 203.0.113.9 10.0.0.1 4711\r\n"[..],
        &v2(0x21, 0x11, &[&V4_ADDRESSES[..], &[0; 60_000]].concat()),
        &v2(0x21, 0x77, &V4_ADDRESSES),
    ] {
        let mut wire = Wire::open(gateway.mqtt);
        wire.send(header);
        assert_eq!(wire.next(), Next::Closed, "{header:?}");
    }
    let started = Instant::now();
    for header in [&b"PROXY TCP4 203"[..], &HEADER[..3], &v2(0x21, 0x11, &V4_ADDRESSES)[..20]] {
        let mut wire = Wire::open(gateway.mqtt);
        wire.send(header);
        assert_eq!(wire.next_within(PATIENCE), Next::Closed, "{header:?}");
    }
    assert!(started.elapsed() >= Duration::from_millis(3 * 600), "{:?}", started.elapsed());
    refused(&gateway, "proxy_header", 6);
    // One that opens a connection and closes it, as a check of the port does, is no refusal.
    drop(TcpStream::connect(gateway.mqtt).expect("connected"));
    let all: u64 = refusals(&gateway, "proxy_header").iter().filter_map(|one| one["count"].as_u64()).sum();
    assert_eq!(all, 6);
}
