//! MQTT over WebSocket: with mqtt.js and paho, which nobody here wrote, and frame by frame where the
//! answer's exact form matters.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use crate::common::wire::{
    CONNACK, Carrier, Connect, DISCONNECT, Next, PINGREQ, PINGRESP, Version, Wire, publish,
};
use crate::common::ws::{self, BINARY, CLOSE, CONTINUATION, FIN, PING, PONG, TEXT, WsClient};
use crate::common::{Gateway, PATIENCE, Setup, Source, node, python, scratch, wait_for};
use Version::{V5, V311};
use headgate::testing::limits;
use serde_json::json;

fn scene_with(setup: impl FnOnce(Setup) -> Setup) -> (tempfile::TempDir, Gateway, Source) {
    let dir = scratch();
    let gateway = setup(Setup::on(dir.path())).start();
    let source = gateway.create("press-4");
    (dir, gateway, source)
}

fn scene() -> (tempfile::TempDir, Gateway, Source) {
    scene_with(|setup| setup)
}

/// A WebSocket that has been let in, to be spoken to frame by frame.
fn login(gateway: &Gateway, source: &Source, version: Version) -> WsClient {
    let mut client = WsClient::open(gateway.http);
    client.send(&ws::frame(FIN | BINARY, &Connect::with_key(version, &source.key).packet()));
    let (first, connack) = client.next_frame().expect("in time").expect("an answer");
    assert_eq!((first, connack[0], connack[3]), (FIN | BINARY, CONNACK << 4, 0));
    client
}

/// The answer to a request that is sent as it is: its head, and its body if it has one.
fn answer(gateway: &Gateway, request: &str) -> String {
    let mut tcp = TcpStream::connect(gateway.http).expect("connected");
    tcp.set_read_timeout(Some(PATIENCE)).expect("a socket option");
    tcp.write_all(request.as_bytes()).expect("sent");
    let mut reader = BufReader::new(tcp);
    let mut answer = String::new();
    while !answer.ends_with("\r\n\r\n") {
        assert_ne!(reader.read_line(&mut answer).expect("an answer in time"), 0, "{answer}");
    }
    let head = answer.to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().expect("a length"))];
    reader.read_exact(&mut body).expect("a body in time");
    answer + &String::from_utf8(body).expect("UTF-8")
}

#[test]
fn mqtt_js_publishes() {
    const PROGRAM: &str = r#"
const mqtt = require("mqtt");
const [url, key] = process.argv.slice(1);
async function run(protocolVersion) {
    const client = await mqtt.connectAsync(url, { protocolVersion, username: key, reconnectPeriod: 0 });
    const sent = [];
    for (let n = 0; n < 100; n++) sent.push(client.publishAsync("js", String(n), { qos: 1 }));
    sent.push(client.publishAsync("js", Buffer.alloc(300000, "x"), { qos: 1 }));
    await Promise.all(sent);
    await client.endAsync();
}
run(4).then(() => run(5)).then(() => process.exit(0), (error) => { console.error(error); process.exit(1); });
"#;
    let (_dir, gateway, source) = scene();
    let output = node(PROGRAM, &[&format!("ws://{}/mqtt", gateway.http), &source.key]);
    assert!(output.status.success(), "{output:?}");
    let stored = gateway.stored("press-4", 202);
    let expected: Vec<String> = (0..100).map(|n| n.to_string()).collect();
    let payload = |record: &serde_json::Value| record["payload"].to_string();
    for half in [&stored[..101], &stored[101..]] {
        assert_eq!(half[..100].iter().map(payload).collect::<Vec<_>>(), expected, "in order");
        assert_eq!(payload(&half[100]).len(), 300_002);
    }
}

#[test]
fn mqtt_js_receives_what_is_published_in_order_and_whole() {
    const PROGRAM: &str = r#"
const mqtt = require("mqtt");
const [url, key, tcp] = process.argv.slice(1);
async function run(protocolVersion) {
    const options = { protocolVersion, username: key, reconnectPeriod: 0 };
    const listener = await mqtt.connectAsync(url, options);
    const topic = "from/" + protocolVersion;
    const received = [];
    const all = new Promise((resolve) => listener.on("message", (topic, payload) => {
        received.push(payload.toString());
        if (received.length === 201) resolve();
    }));
    await listener.subscribeAsync(topic, { qos: 1 });
    const publisher = await mqtt.connectAsync(tcp, options);
    const expected = [];
    for (let n = 0; n < 200; n++) expected.push(String(n).repeat(50));
    expected.splice(100, 0, "x".repeat(500000));
    await Promise.all(expected.map((payload) => publisher.publishAsync(topic, payload, { qos: 1 })));
    await all;
    if (JSON.stringify(received) !== JSON.stringify(expected)) throw new Error("others, or in another order");
    await publisher.endAsync();
    await listener.endAsync();
}
run(4).then(() => run(5)).then(() => process.exit(0), (error) => { console.error(error); process.exit(1); });
"#;
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let body = json!({ "name": "press-4", "scopes": ["ingest", "subscribe"] });
    let created = gateway.post("/v1/datasources", &gateway.admin_key(), &body).json();
    let key = created["key"]["secret"].as_str().expect("a key");
    let (url, tcp) = (format!("ws://{}/mqtt", gateway.http), format!("mqtt://{}", gateway.mqtt));
    let output = node(PROGRAM, &[&url, key, &tcp]);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn paho_publishes_and_pings() {
    const PROGRAM: &str = r#"
import sys, threading, paho.mqtt.client as mqtt
host, port, key = sys.argv[1:]
for version in (mqtt.MQTTv31, mqtt.MQTTv311, mqtt.MQTTv5):
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="paho", protocol=version, transport="websockets")
    ponged = threading.Event()
    client.on_log = lambda client, userdata, level, text: ponged.set() if "PINGRESP" in text else None
    client.ws_set_options(path="/mqtt")
    client.username_pw_set(key)
    client.connect(host, int(port), keepalive=1)
    client.loop_start()
    sent = [client.publish("paho", str(n) * 5000, qos=1) for n in range(10)]
    for message in sent:
        message.wait_for_publish(15)
        assert message.is_published()
    assert ponged.wait(15)
    client.disconnect()
    client.loop_stop()
"#;
    let (_dir, gateway, source) = scene();
    let (host, port) = (gateway.http.ip().to_string(), gateway.http.port().to_string());
    let output = python(PROGRAM, &[&host, &port, &source.key]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(gateway.stored("press-4", 30).len(), 30);
}

#[test]
fn packets_are_split_and_joined_over_frames_at_will() {
    let (_dir, gateway, source) = scene();
    let packets: Vec<u8> =
        (1..=20u16).flat_map(|id| publish(V311, id, "t", &vec![b'x'; usize::from(id) * 100])).collect();
    let connect = Connect::with_key(V311, &source.key).packet();

    // The CONNECT in the same write as the opening handshake, in two pieces, with a ping between.
    let early = [
        ws::frame(BINARY, &connect[..5]),
        ws::frame(FIN | PING, b"early"),
        ws::frame(FIN | CONTINUATION, &connect[5..]),
    ];
    let mut client = WsClient::open_with(gateway.http, &early.concat());
    client.expect(FIN | PONG, b"early");
    client.expect(FIN | BINARY, &[CONNACK << 4, 2, 0, 0]);
    // All in one message, ...
    client.send(&ws::frame(FIN | BINARY, &packets));
    // ... in messages of seven bytes, ...
    for piece in packets.chunks(7) {
        client.send(&ws::frame(FIN | BINARY, piece));
    }
    // ... and in one message of frames of 1,000 bytes, some of them empty, each sent in two writes.
    client.send(&ws::frame(BINARY, b""));
    for piece in packets.chunks(1000) {
        let frame = [ws::frame(CONTINUATION, b""), ws::frame(CONTINUATION, piece)].concat();
        let (head, tail) = frame.split_at(9);
        client.send(head);
        client.send(tail);
    }
    client.send(&ws::frame(FIN | CONTINUATION, b""));
    let stored = gateway.stored("press-4", 60);
    let lengths: Vec<_> = stored.iter().map(|record| record["payload"].as_str().map(str::len)).collect();
    let expected: Vec<_> = (0..60).map(|n| Some((n % 20 + 1) * 100)).collect();
    assert_eq!(lengths, expected);
}

#[test]
fn a_message_may_be_longer_than_any_packet() {
    let (_dir, gateway, source) = scene_with(|setup| setup.set("mqtt.packet_bytes_max", 100_000));
    let mut client = login(&gateway, &source, V311);
    let packet = publish(V311, 1, "t", &[b'x'; 50_000]);
    client.send(&ws::header(FIN | BINARY, 40 * packet.len() as u64));
    // The mask of the tests' frames goes on over the whole message.
    let masked = ws::frame(FIN | BINARY, &packet.repeat(40));
    client.send(&masked[masked.len() - 40 * packet.len()..]);
    assert_eq!(gateway.stored("press-4", 40).len(), 40);
}

#[test]
fn a_packet_over_the_limit_is_refused_by_its_first_bytes_however_long_the_message_says_it_is() {
    let (_dir, gateway, source) = scene();
    let mut wire = Wire::over(WsClient::open(gateway.http));
    wire.let_in(&Connect::with_key(V5, &source.key));
    let mut packet = vec![0x32];
    packet.extend(crate::common::wire::varint(limits::MQTT_PACKET_BYTES_MAX + 1));
    wire.send(&packet);
    assert_eq!(wire.packet(DISCONNECT).reason(), 0x95);

    // A stranger announces a message of an exbibyte: that alone costs nothing, and its CONNECT of
    // 200 KiB is refused before it has come.
    let mut client = WsClient::open(gateway.http);
    client.send(&ws::header(FIN | BINARY, 1 << 60));
    let start = [&[0x10][..], &crate::common::wire::varint(limits::MQTT_CONNECT_BYTES_MAX + 1)].concat();
    let masked = ws::frame(FIN | BINARY, &start);
    client.send(&masked[masked.len() - start.len()..]);
    client.closed(1000);
}

#[test]
fn a_client_that_breaks_the_rules_of_websocket_is_told_by_the_status_and_counted() {
    let (_dir, gateway, source) = scene();
    let connect = Connect::with_key(V5, &source.key).packet();
    let unmasked = [&[FIN | BINARY, u8::try_from(connect.len()).expect("short")][..], &connect].concat();
    let refused = || gateway.metric("headgate_refused_total{transport=\"mqtt\",cause=\"websocket\"}");
    for (n, (bytes, status)) in [
        (ws::frame(FIN | TEXT, &connect), 1003),
        (ws::frame(TEXT, b""), 1003),
        (unmasked, 1002),
        (ws::frame(FIN | CONTINUATION, &connect), 1002),
        (ws::frame(FIN | 0x40 | BINARY, &connect), 1002),
        (ws::frame(PING, b""), 1002),
        (ws::frame(FIN | PING, &[0; 126]), 1002),
    ]
    .into_iter()
    .enumerate()
    {
        let mut stranger = WsClient::open(gateway.http);
        stranger.send(&bytes);
        stranger.closed(status);
        let mut client = login(&gateway, &source, V5);
        client.send(&bytes);
        client.closed(status);
        wait_for("both to be counted", || (refused() == 2.0 * (n as f64 + 1.0)).then_some(()));
    }
    gateway.says("a text frame");
}

#[test]
fn pings_are_answered_and_a_close_is_answered_with_its_status() {
    let (_dir, gateway, source) = scene();
    let mut client = login(&gateway, &source, V5);
    client.send(&ws::frame(FIN | PING, b"are you there?"));
    client.expect(FIN | PONG, b"are you there?");
    client.send(&ws::frame(FIN | PONG, b"unasked"));
    client.send(&ws::frame(FIN | BINARY, &PINGREQ));
    client.expect(FIN | BINARY, &[PINGRESP << 4, 0]);
    client.send(&ws::frame(FIN | CLOSE, &1001u16.to_be_bytes()));
    client.closed(1001);

    // A DISCONNECT, and what a client publishes right before its close, count.
    let mut client = login(&gateway, &source, V5);
    let last = publish(V5, 1, "t", b"1");
    client.send(&[ws::frame(FIN | BINARY, &last), ws::frame(FIN | CLOSE, &[])].concat());
    client.expect(FIN | BINARY, &[0x40, 2, 0, 1]);
    client.closed(1000);
    let mut client = login(&gateway, &source, V5);
    client.send(&ws::frame(FIN | BINARY, &[DISCONNECT << 4, 0]));
    client.closed(1000);
    assert_eq!(gateway.stored("press-4", 1).len(), 1);
}

#[test]
fn a_handshake_that_offers_no_mqtt_is_refused_in_words() {
    let (_dir, gateway, source) = scene();
    for lines in ["", "Sec-WebSocket-Protocol: chat\r\n"] {
        let said = answer(&gateway, &ws::request(lines));
        assert!(said.starts_with("HTTP/1.1 400 ") && said.contains("Offer the subprotocol 'mqtt'"), "{said}");
        assert!(said.contains("application/problem+json"), "{said}");
    }
    let said = answer(&gateway, &ws::request("Sec-WebSocket-Protocol: mqttv3.1\r\n"));
    assert!(said.starts_with("HTTP/1.1 101 ") && said.contains("mqttv3.1"), "{said}");

    let page = gateway.get("/mqtt", "");
    assert_eq!((page.status, page.headers["upgrade"].as_str()), (426, "websocket"), "{}", page.text());
    assert_eq!(page.json()["type"], "/problems/upgrade_required");

    let keyed = ws::request("Sec-WebSocket-Protocol: mqtt\r\n")
        .replace("/mqtt ", &format!("/mqtt?key={} ", source.key));
    let said = answer(&gateway, &keyed);
    assert!(said.starts_with("HTTP/1.1 401 ") && said.contains("key_in_url"), "{said}");

    let http2 = Command::new("curl")
        .args(["-s", "--http2-prior-knowledge", "-H", "Sec-WebSocket-Protocol: mqtt"])
        .arg(format!("http://{}/mqtt", gateway.http))
        .output()
        .expect("curl is installed (tests/run does it)");
    let said = String::from_utf8_lossy(&http2.stdout);
    assert!(said.contains("begins with HTTP/1.1"), "{http2:?}");
}

#[test]
fn a_revoked_key_loses_its_websocket() {
    let (_dir, gateway, source) = scene();
    let open = |version| {
        let mut wire = Wire::over(WsClient::open(gateway.http));
        wire.let_in(&Connect::with_key(version, &source.key));
        wire
    };
    let (mut new, mut old) = (open(V5), open(V311));
    gateway.delete("press-4");
    new.disconnected(0x98);
    old.closed();
}

#[test]
fn a_drain_closes_websockets_as_every_other_connection() {
    let (_dir, gateway, source) = scene();
    let open = |version| {
        let mut wire = Wire::over(WsClient::open(gateway.http));
        wire.let_in(&Connect::with_key(version, &source.key));
        wire
    };
    let (mut new, mut old) = (open(V5), open(V311));
    // One that has not said who it is keeps nobody waiting.
    let mut silent = WsClient::open(gateway.http);
    assert_eq!(new.publish(V5, 1, "t", b"1"), 0);
    gateway.terminate();
    new.disconnected(0x8B);
    old.closed();
    silent.closed(1000);
    let exit = gateway.wait();
    assert!(exit.status.success(), "{}", exit.output);
    assert!(!exit.output.contains("still open at the drain's deadline"), "{}", exit.output);
}

#[test]
fn a_websocket_has_its_connect_to_present_in_time_and_its_keep_alive_to_keep() {
    let (_dir, gateway, source) = scene_with(|setup| setup.set("mqtt.connect_ms_max", 1500));
    WsClient::open(gateway.http).closed(1000);
    let mut wire = Wire::over(WsClient::open(gateway.http));
    wire.let_in(&Connect { keep_alive: 1, ..Connect::with_key(V5, &source.key) });
    wire.disconnected(0x8D);
}

#[test]
fn a_websocket_counts_as_an_mqtt_connection_and_not_as_one_of_http() {
    let (_dir, gateway, source) =
        scene_with(|setup| setup.set("mqtt.connections_max", 2).set("http.connections_max", 1));
    let open = || Wire::over(WsClient::open(gateway.http));
    let (mut first, mut second) = (open(), open());
    let opening = ws::request("Sec-WebSocket-Protocol: mqtt\r\n");
    let said = answer(&gateway, &opening);
    assert!(said.starts_with("HTTP/1.1 503 ") && said.contains("mqtt.connections_max"), "{said}");
    Wire::open(gateway.mqtt).closed();
    first.let_in(&Connect::with_key(V5, &source.key));
    second.send(&PINGREQ);
    assert_eq!(second.next(), Next::Closed, "the first packet has to be a CONNECT");
    wait_for("a place to be free", || answer(&gateway, &opening).starts_with("HTTP/1.1 101 ").then_some(()));
    assert_eq!(first.publish(V5, 1, "t", b"1"), 0);
}

#[test]
fn a_client_that_reads_late_gets_everything() {
    const BURST: usize = 16 << 10;
    let (_dir, gateway, source) = scene();
    let mut client = login(&gateway, &source, V5);
    let mut sending = client.tcp().try_clone().expect("a second handle");
    sending.set_write_timeout(Some(Duration::from_millis(500))).expect("a socket option");
    let pings = ws::frame(FIN | BINARY, &PINGREQ.repeat(BURST));
    // Until nothing goes any more, as the gateway does not read from who does not read from it.
    let mut bursts = 0;
    let unsent = loop {
        let mut sent = 0;
        let stalled = loop {
            match sending.write(&pings[sent..]) {
                Ok(n) if sent + n == pings.len() => break false,
                Ok(n) => sent += n,
                Err(_) => break true,
            }
        };
        if stalled {
            break pings[sent..].to_vec();
        }
        bursts += 1;
        assert!(bursts < 10_000, "the gateway holds everything that a client does not read");
    };
    let finishing = std::thread::spawn(move || {
        sending.set_write_timeout(Some(PATIENCE)).expect("a socket option");
        sending.write_all(&unsent).expect("there is room again");
    });
    let mut answers = vec![0; PINGREQ.len() * BURST];
    for _ in 0..=bursts {
        client.read_exact(&mut answers).expect("in time");
        assert!(answers.chunks(2).all(|answer| answer == [PINGRESP << 4, 0]));
    }
    finishing.join().expect("everything is sent");
    client.send(&ws::frame(FIN | CLOSE, &1000u16.to_be_bytes()));
    client.closed(1000);
}
