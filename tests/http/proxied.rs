//! HTTP behind a proxy: whom the gateway takes a client for, by `X-Forwarded-For` and by the PROXY protocol, from those
//! that it trusts and from those that it does not.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::{Gateway, PATIENCE, Setup, scratch, wait_for};
use crate::wire::{Wire, with_key};

const CLIENT: &str = "203.0.113.9";

fn behind(dir: &std::path::Path, proxies: &str) -> Setup {
    Setup::on(dir).set("trusted_proxies", proxies)
}

fn refusals(gateway: &Gateway, cause: &str) -> Vec<Value> {
    let answer = gateway.get(&format!("/v1/refusals?cause={cause}"), &gateway.admin_key());
    answer.json()["refusals"].as_array().expect("a list").clone()
}

/// The address of the one refusal for a cause.
fn refused_address(gateway: &Gateway, cause: &str) -> String {
    let found = wait_for(cause, || Some(refusals(gateway, cause)).filter(|found| !found.is_empty()));
    assert_eq!(found.len(), 1, "{found:?}");
    found[0]["address"].as_str().expect("an address").to_owned()
}

/// Where the key was last used from.
fn last_address(gateway: &Gateway, key_id: &str) -> String {
    let keys = gateway.get("/v1/datasources/press-4/keys", &gateway.admin_key()).json();
    let keys = keys["keys"].as_array().expect("keys").clone();
    let key = keys.iter().find(|key| key["id"] == key_id).expect("the key");
    key["last_used"]["address"].as_str().expect("an address").to_owned()
}

#[test]
fn a_trusted_proxy_says_who_the_client_is_in_limits_refusals_keys_and_audit() {
    let dir = scratch();
    let setup = behind(dir.path(), "[\"127.0.0.1\", \"10.0.0.0/8\"]");
    let gateway = setup.set("auth.failures_burst", 3).start();
    let source = gateway.create("press-4");
    let chain = format!("198.51.100.1, {CLIENT}, 10.1.2.3");
    let forwarded = [("x-forwarded-for", chain.as_str())];
    let post = |key: &str, headers: &[(&str, &str)]| {
        gateway.request("POST", "/v1/ingest/press-4", key, headers, b"{}").status
    };
    assert_eq!(post(&source.key, &forwarded), 200);
    assert_eq!(last_address(&gateway, &source.key_id), CLIENT);
    // The limit of bad keys is the client's, and not that of all who come through the proxy.
    let statuses: Vec<u16> = (0..5).map(|_| post("nonsense", &forwarded)).collect();
    assert_eq!(statuses, [401, 401, 401, 429, 429]);
    assert_eq!(refused_address(&gateway, "malformed_key"), CLIENT);
    assert_eq!(refused_address(&gateway, "too_many_failures"), CLIENT);
    let other = [("x-forwarded-for", "203.0.113.10")];
    assert_eq!(post("nonsense", &other), 401, "another client has its own");
    assert_eq!(post("nonsense", &[]), 401, "and so has the proxy");
    // A client that writes more to the left changes nothing.
    let spoofed = format!("10.9.9.9, 203.0.113.77, {CLIENT}");
    assert_eq!(post("nonsense", &[("x-forwarded-for", &spoofed)]), 429);
    let body = serde_json::json!({ "id": "saw", "name": "Saw" }).to_string();
    let answer =
        gateway.request("POST", "/v1/datasources", &gateway.admin_key(), &forwarded, body.as_bytes());
    assert_eq!(answer.status, 201);
    let audit = gateway.get("/v1/audit", &gateway.admin_key()).text();
    assert!(audit.contains(CLIENT), "{audit}");
}

#[test]
fn nobody_else_says_it() {
    let dir = scratch();
    let gateway = behind(dir.path(), "[\"10.0.0.0/8\"]").set("auth.failures_burst", 3).start();
    let source = gateway.create("press-4");
    for (n, header) in ["x-forwarded-for", "forwarded", "x-real-ip", "x-forwarded-for"].iter().enumerate() {
        let value = format!("203.0.113.{n}");
        let status = |key: &str| {
            gateway.request("POST", "/v1/ingest/press-4", key, &[(header, value.as_str())], b"{}").status
        };
        assert_eq!(status("nonsense"), if n < 3 { 401 } else { 429 }, "{header}");
        assert_eq!(status(&source.key), 200);
        assert_eq!(last_address(&gateway, &source.key_id), "127.0.0.1");
    }
    assert_eq!(refused_address(&gateway, "malformed_key"), "127.0.0.1");
    let body = serde_json::json!({ "id": "saw", "name": "Saw" }).to_string();
    let headers = [("x-forwarded-proto", "https"), ("host", "gw.example")];
    let created = gateway.request("POST", "/v1/datasources", &gateway.admin_key(), &headers, body.as_bytes());
    let curl = created.json()["connect"]["curl"].as_str().expect("a line").to_owned();
    assert!(curl.contains("http://gw.example/v1/ingest/saw/"), "{curl}");
}

#[test]
fn a_crowd_of_strangers_behind_a_proxy_counts_by_client() {
    let dir = scratch();
    let setup = behind(dir.path(), "[\"127.0.0.1\"]").set("http.strangers_per_address_max", 3);
    let gateway = setup.start();
    let open = |client: &str| {
        let mut wire = Wire::open(gateway.http);
        wire.head("GET", "/livez", &[&format!("X-Forwarded-For: {client}")]);
        assert!(wire.answer().starts_with("HTTP/1.1 200 "));
        wire
    };
    let mut lone = open("203.0.113.200");
    let mut crowd: Vec<Wire> = (0..3).map(|_| open(CLIENT)).collect();
    let _one_more = open(CLIENT);
    crowd[0].end();
    lone.head("GET", "/livez", &[]);
    assert!(lone.answer().starts_with("HTTP/1.1 200 "), "another client keeps its place");
    assert_eq!(refused_address(&gateway, "strangers"), CLIENT);
}

#[test]
fn connect_lines_say_where_the_gateway_is_reached() {
    let dir = scratch();
    let lines = |gateway: &Gateway, id: &str, headers: &[(&str, &str)]| {
        let body = serde_json::json!({ "id": id, "name": id, "scopes": ["ingest", "subscribe"] }).to_string();
        let answer =
            gateway.request("POST", "/v1/datasources", &gateway.admin_key(), headers, body.as_bytes());
        assert_eq!(answer.status, 201, "{}", answer.text());
        answer.json()["connect"].clone()
    };
    let behind_https = [("host", "gw.example"), ("x-forwarded-proto", "https"), ("x-forwarded-for", CLIENT)];
    let gateway = behind(dir.path(), "[\"127.0.0.1\"]").start();
    let connect = lines(&gateway, "one", &behind_https);
    assert!(
        connect["curl"].as_str().expect("a line").contains("https://gw.example/v1/ingest/one/"),
        "{connect}"
    );
    gateway.stop();
    let setup = behind(dir.path(), "[]").set("public_url", "https://iot.example.com/gate/");
    let gateway = setup.set("public_mqtt", "mqtts://mqtt.example.com").start();
    let connect = lines(&gateway, "two", &behind_https);
    let text = |name: &str| connect[name].as_str().expect("a line").to_owned();
    assert!(text("curl").contains("https://iot.example.com/gate/v1/ingest/two/temperature"), "{connect}");
    assert!(text("latest").contains("https://iot.example.com/gate/v1/datasources/two/latest"), "{connect}");
    let mosquitto = text("mosquitto_pub");
    assert!(mosquitto.contains("-h mqtt.example.com -p 8883 --tls-use-os-certs "), "{mosquitto}");
    assert!(text("python").contains("hostname=\"mqtt.example.com\", port=8883, tls={}"), "{connect}");
    gateway.stop();
    for (key, value) in [
        ("public_url", "iot.example.com"),
        ("public_mqtt", "mqtt.example.com"),
        ("public_url", "https://a;b"),
    ] {
        let exit = Setup::on(dir.path()).set(key, value).refused();
        let said = exit.output.to_lowercase();
        assert!(said.contains(key) && said.contains("host"), "{said}");
    }
}

/// A request behind a PROXY protocol header; its answer.
fn ask(addr: SocketAddr, header: &[u8], key: &str) -> String {
    let mut wire = Wire::open(addr);
    wire.send(header);
    wire.head("POST", "/v1/ingest/press-4", &[&with_key(key), "Content-Length: 2", "Connection: close"]);
    wire.send("{}");
    wire.answer()
}

fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len()).expect("short").to_be_bytes();
    [&b"\r\n\r\n\0\r\nQUIT\n"[..], &[command, family], &length, rest].concat()
}

const V4_ADDRESSES: [u8; 12] = [203, 0, 113, 9, 10, 0, 0, 1, 0x12, 0x67, 0x1F, 0x90];

#[test]
fn a_trusted_proxy_says_it_in_a_header_of_either_version() {
    let dir = scratch();
    let gateway = behind(dir.path(), "[\"127.0.0.1\"]").start();
    let source = gateway.create("press-4");
    for (header, address) in [
        (b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 8080\r\n".to_vec(), CLIENT),
        (b"PROXY TCP6 2001:db8::9 ::1 4711 8080\r\n".to_vec(), "2001:db8::9"),
        (v2(0x21, 0x11, &V4_ADDRESSES), CLIENT),
        (v2(0x21, 0x11, &[&V4_ADDRESSES[..], &[0x05, 0, 200], &[7; 200]].concat()), CLIENT),
        // The proxy's own connection, a Unix socket, one of which nothing is known, none at all.
        (v2(0x20, 0x11, &V4_ADDRESSES), "127.0.0.1"),
        (v2(0x20, 0x00, &[]), "127.0.0.1"),
        (v2(0x21, 0x31, &[0; 216]), "127.0.0.1"),
        (b"PROXY UNKNOWN\r\n".to_vec(), "127.0.0.1"),
        (Vec::new(), "127.0.0.1"),
    ] {
        assert!(ask(gateway.http, &header, &source.key).starts_with("HTTP/1.1 200 "), "{header:?}");
        assert_eq!(last_address(&gateway, &source.key_id), address, "{header:?}");
    }
    // Both: behind a TCP proxy that is itself behind one of HTTP, the connection's client is no proxy that is trusted.
    let mut wire = Wire::open(gateway.http);
    wire.send("PROXY TCP4 203.0.113.9 10.0.0.1 4711 8080\r\n");
    wire.head(
        "POST",
        "/v1/ingest/press-4",
        &[&with_key(&source.key), "X-Forwarded-For: 198.51.100.1", "Content-Length: 2"],
    );
    wire.send("{}");
    assert!(wire.answer().starts_with("HTTP/1.1 200 "));
    assert_eq!(last_address(&gateway, &source.key_id), CLIENT);
    // In pieces, and two headers are one too many.
    let mut wire = Wire::open(gateway.http);
    for piece in b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 8080\r\n".chunks(3) {
        wire.send(piece);
        std::thread::sleep(Duration::from_millis(2));
    }
    wire.head("GET", "/livez", &[]);
    assert!(wire.answer().starts_with("HTTP/1.1 200 "));
    let mut wire = Wire::open(gateway.http);
    wire.send(b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 8080\r\n".repeat(2));
    let _ = wire.0.read_to_end(&mut Vec::new());
    assert_eq!(refused_address(&gateway, "untrusted_proxy"), CLIENT);
}

#[test]
fn a_header_that_cannot_be_read_is_closed_and_listed() {
    let dir = scratch();
    let gateway = behind(dir.path(), "[\"127.0.0.1\"]").set("http.header_ms_max", 700).start();
    let addr = gateway.http;
    let closes = |bytes: &[u8]| {
        let mut tcp = TcpStream::connect_timeout(&addr, PATIENCE).expect("connected");
        tcp.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let _ = tcp.write_all(bytes);
        let mut rest = Vec::new();
        let _ = tcp.read_to_end(&mut rest);
        assert_eq!(rest, b"", "{bytes:?}");
    };
    for bytes in [
        &b"PROXY TCP4 203.0.113.9 10.0.0.1 4711\r\n"[..],
        b"PROXY TCP9 203.0.113.9 10.0.0.1 4711 8080\r\n",
        &[b"PROXY TCP4 ", &[b'1'; 200][..], b"\r\n"].concat(),
        &v2(0x21, 0x11, &V4_ADDRESSES[..4]),
        &v2(0x21, 0x11, &[&V4_ADDRESSES[..], &[0; 60_000]].concat()),
        &v2(0x25, 0x11, &V4_ADDRESSES),
    ] {
        closes(bytes);
    }
    // Slow ones, and one that says that more comes than does.
    let started = Instant::now();
    for bytes in [&b""[..], b"PRO", b"PROXY TCP4 203.0.113.9", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0C\xCB"] {
        closes(bytes);
    }
    assert!(started.elapsed() >= Duration::from_millis(4 * 600), "{:?}", started.elapsed());
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
    let found = refusals(&gateway, "proxy_header");
    let count: u64 = found.iter().filter_map(|refusal| refusal["count"].as_u64()).sum();
    // A connection that begins with nothing may yet be a client's.
    assert!(count >= 9 && found.iter().all(|refusal| refusal["address"] == "127.0.0.1"), "{found:?}");
    assert_eq!(gateway.get("/livez", "").status, 200);
}

#[test]
fn a_header_from_anybody_else_is_closed_and_listed() {
    let dir = scratch();
    for (proxies, protocol) in
        [("[]", "optional"), ("[\"10.0.0.0/8\"]", "required"), ("[\"127.0.0.1\"]", "off")]
    {
        let gateway = behind(dir.path(), proxies).set("proxy_protocol", protocol).start();
        let all = [b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 8080\r\n".to_vec(), v2(0x21, 0x11, &V4_ADDRESSES)];
        for header in &all {
            for pieces in [vec![&header[..]], header.chunks(4).collect()] {
                let mut tcp = TcpStream::connect_timeout(&gateway.http, PATIENCE).expect("connected");
                tcp.set_read_timeout(Some(PATIENCE)).expect("a timeout");
                tcp.set_nodelay(true).expect("an option");
                for piece in pieces {
                    let _ = tcp.write_all(piece);
                    std::thread::sleep(Duration::from_millis(1));
                }
                let _ = tcp.write_all(b"GET /livez HTTP/1.1\r\nHost: gateway\r\n\r\n");
                let mut rest = Vec::new();
                let _ = tcp.read_to_end(&mut rest);
                assert!(
                    !String::from_utf8_lossy(&rest).contains("200"),
                    "{}",
                    String::from_utf8_lossy(&rest)
                );
            }
        }
        wait_for("the refusals", || {
            let found = refusals(&gateway, "untrusted_proxy");
            let all = found.first().is_some_and(|one| one["address"] == "127.0.0.1" && one["count"] == 4);
            (found.len() == 1 && all).then_some(())
        });
        gateway.stop();
    }
}
