//! Clients that misbehave: by mistake, on purpose, or because they want what is not theirs. Each is
//! told what it did wrong where the protocol has a way to say it, others are served as before, and
//! nothing gets in under somebody else's name.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use headgate::testing::ApiKey;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

use crate::common::steady::Steady;
use crate::common::wire::{
    CONNACK, Connect, DISCONNECT, Next, PINGREQ, PINGRESP, PUBACK, REASON_STRING, SUBACK, TOPIC_ALIAS,
    VERSIONS, Version, Wire, frame, prefixed, publish, publish_with, subscribe, user_property,
};
use crate::common::{Gateway, Setup, scratch, wait_for};
use Version::{V5, V311};

/// What an ack may take while somebody misbehaves, on a small machine and in a debug build.
const SANE: Duration = Duration::from_millis(250);
/// A claim of 256 MB, the largest that a remaining length can make.
const HUGE: [u8; 4] = [0xFF, 0xFF, 0xFF, 0x7F];

#[test]
fn garbage_and_half_packets_leave_others_served_as_before() {
    let seed: u64 = rand::make_rng::<SmallRng>().random();
    eprintln!("seed {seed}");
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let steady = Steady::start(gateway.mqtt, &source.key);
    let until = Instant::now() + Duration::from_secs(3);
    let abused: usize = std::thread::scope(|scope| {
        let (addr, key) = (gateway.mqtt, source.key.as_str());
        let abusers: Vec<_> =
            (0..4).map(|i| scope.spawn(move || abuse(addr, key, seed + i, until))).collect();
        abusers.into_iter().map(|abuser| abuser.join().expect("an abuser")).sum()
    });
    let latencies = steady.stop();
    assert!(abused > 100, "{abused} connections misbehaved");
    assert!(latencies.p99() < SANE, "p99 {:?}", latencies.p99());
    gateway.settle();
    assert_eq!(gateway.records("press-4").len(), latencies.count() + 1, "and only what was meant got in");
}

/// Opens one connection after another, to send nonsense or half a packet and close.
fn abuse(addr: std::net::SocketAddr, key: &str, seed: u64, until: Instant) -> usize {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut count = 0;
    while Instant::now() < until {
        let garbage: Vec<u8> = (0..random.random_range(1..2000)).map(|_| random.random()).collect();
        let version = VERSIONS[random.random_range(0..2)];
        let connect = Connect::with_key(version, key).packet();
        // Without its last byte a packet says nothing, however much of it there is.
        let half = publish(version, 1, "spindle", &garbage);
        let half = &half[..random.random_range(1..half.len())];
        match random.random_range(0..4) {
            0 => Wire::open(addr).send(&garbage),
            1 => Wire::open(addr).send(&connect[..random.random_range(1..connect.len())]),
            2 => Wire::login(addr, version, key).send(half),
            // A reserved packet type in front: whatever follows is not looked at.
            _ => Wire::login(addr, version, key).send(&[&[0x00][..], &garbage].concat()),
        }
        count += 1;
    }
    count
}

#[test]
fn thousands_of_half_open_connections_leave_others_served_as_before() {
    const SILENT: usize = 2000;
    const HALF: usize = 500;
    raise_file_limit();
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("mqtt.connect_ms_max", 4000).start();
    let source = gateway.create("press-4");
    let steady = Steady::start(gateway.mqtt, &source.key);

    let silent: Vec<Wire> = (0..SILENT).map(|_| Wire::open(gateway.mqtt)).collect();
    let connect = Connect::with_key(V311, &source.key).packet();
    let half: Vec<Wire> = (0..HALF)
        .map(|_| {
            let mut wire = Wire::open(gateway.mqtt);
            wire.send(&connect[..connect.len() / 2]);
            wire
        })
        .collect();
    let login_at = Instant::now();
    let mut newcomer = Wire::login(gateway.mqtt, V5, &source.key);
    assert_eq!(newcomer.publish(V5, 1, "spindle", b"1"), 0);
    assert!(login_at.elapsed() < Duration::from_secs(1), "a newcomer waited {:?}", login_at.elapsed());
    for mut wire in silent.into_iter().chain(half) {
        wire.closed();
    }
    let latencies = steady.stop();
    assert!(latencies.p99() < SANE, "p99 {:?}", latencies.p99());
    let timeouts = r#"headgate_refused_total{transport="mqtt",cause="connect_timeout"}"#;
    wait_for("every timeout to be counted", || {
        (gateway.metric(timeouts) >= f64::from(u32::try_from(SILENT + HALF).expect("small"))).then_some(())
    });
}

/// Thousands of sockets need more file descriptors than many shells give.
fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a valid pointer to a struct that lives across them.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = limit.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
    assert!(limit.rlim_cur >= 4096, "the hard limit on open files is {}", limit.rlim_cur);
}

#[test]
fn a_connect_that_comes_a_byte_at_a_time_gets_its_time_and_no_more() {
    const PATIENCE: Duration = Duration::from_millis(1500);
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("mqtt.connect_ms_max", PATIENCE.as_millis()).start();
    let source = gateway.create("press-4");
    let packet = Connect { client_id: "x".repeat(200), ..Connect::with_key(V5, &source.key) }.packet();

    // In time it is let in, however many pieces it comes in.
    let mut wire = Wire::open(gateway.mqtt);
    for byte in &packet {
        wire.send(&[*byte]);
    }
    assert_eq!(wire.packet(CONNACK).reason(), 0);

    let started = Instant::now();
    let mut wire = Wire::open(gateway.mqtt);
    for byte in &packet {
        wire.send(&[*byte]);
        match wire.next_within(PATIENCE / 50) {
            Next::Silent => {}
            Next::Closed => break,
            other => panic!("{other:?}"),
        }
    }
    let took = started.elapsed();
    assert!(took >= PATIENCE - Duration::from_millis(100) && took < 2 * PATIENCE, "closed after {took:?}");
}

/// A gateway that lives for one test, a key of datasource `press-4`, and a bystander who has to be
/// served whatever is done to the gateway.
struct Scene {
    gateway: Gateway,
    key: String,
    bystander: Wire,
    _dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let dir = scratch();
        let gateway = Gateway::start(dir.path());
        let key = gateway.create("press-4").key;
        let bystander = Wire::login(gateway.mqtt, V5, &key);
        Self { gateway, key, bystander, _dir: dir }
    }

    /// Sends `bytes` in the place of a CONNECT; returns what comes back before the end.
    fn instead_of_connect(&mut self, bytes: &[u8]) -> Option<crate::common::wire::Frame> {
        let mut wire = Wire::open(self.gateway.mqtt);
        wire.send(bytes);
        self.end_of(wire, bytes)
    }

    /// Sends `bytes` after a good CONNECT; returns what comes back before the end.
    fn after_connect(&mut self, version: Version, bytes: &[u8]) -> Option<crate::common::wire::Frame> {
        let mut wire = Wire::login(self.gateway.mqtt, version, &self.key);
        wire.send(bytes);
        self.end_of(wire, bytes)
    }

    fn end_of(&mut self, mut wire: Wire, bytes: &[u8]) -> Option<crate::common::wire::Frame> {
        let started = Instant::now();
        let answer = match wire.next() {
            Next::Packet(frame) => {
                wire.closed();
                Some(frame)
            }
            Next::Closed => None,
            Next::Silent => panic!("still open after {:02x?}", &bytes[..bytes.len().min(40)]),
        };
        // At once: not when some timeout is over.
        assert!(started.elapsed() < Duration::from_secs(2), "closed after {:?}", started.elapsed());
        self.bystander.send(&PINGREQ);
        self.bystander.packet(PINGRESP);
        answer
    }
}

#[test]
fn what_is_not_a_connect_is_closed_without_a_word() {
    let mut scene = Scene::new();
    let tls_hello = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xFC, 3, 3][..], &[7; 500]].concat();
    let strangers: [(&str, Vec<u8>); 9] = [
        ("a PUBLISH", publish(V311, 1, "a", b"x")),
        ("a PINGREQ", PINGREQ.to_vec()),
        ("a SUBSCRIBE", subscribe(V5, 1, &["#"])),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("TLS", tls_hello),
        ("zeros", vec![0; 100]),
        ("a claim of 256 MB", [&[0x10][..], &HUGE].concat()),
        ("a length of five bytes", vec![0x10, 0x80, 0x80, 0x80, 0x80, 0x01]),
        ("flags that a CONNECT does not have", [&[0x11][..], &Connect::new(V5).packet()[1..]].concat()),
    ];
    for (what, bytes) in strangers {
        assert_eq!(scene.instead_of_connect(&bytes), None, "{what}");
    }
}

#[test]
fn a_connect_that_breaks_a_rule_is_refused_in_the_words_of_its_version() {
    let mut scene = Scene::new();
    let good = |version| Connect::with_key(version, &scene.key);
    let with = |properties: &[u8]| Connect { properties: properties.to_vec(), ..good(V5) }.packet();
    let flags = |version, xor: u8| {
        let connect = good(version);
        connect.packet_with(b"MQTT", version as u8, connect.flags() ^ xor)
    };
    let password_alone = Connect { username: None, password: Some(scene.key.clone().into()), ..good(V311) };
    let trailing = |version| {
        let packet = good(version).packet();
        frame(0x10, &[&packet[2..], b"x"].concat())
    };
    let name = |name: &[u8], level: u8| good(V311).packet_with(name, level, good(V311).flags());
    let level6 = good(V5).packet_with(b"MQTT", 6, good(V5).flags());
    let long_id = |version| Connect { client_id: "x".repeat(257), ..good(version) }.packet();
    let nameless = Connect { clean: false, ..good(V311) }.packet();
    let nul_id = |version| Connect { client_id: "a\0b".to_owned(), ..good(version) }.packet();
    // None: closed without a word. MQTT 3.1.1 has return codes, MQTT 5 has reason codes.
    let cases: [(&str, Vec<u8>, Option<u8>); 26] = [
        ("a protocol of another name", name(b"MQTX", 4), None),
        ("a protocol without a name", name(b"", 4), None),
        ("level 3 of MQTT", name(b"MQTT", 3), Some(1)),
        ("level 0 of MQTT", name(b"MQTT", 0), Some(1)),
        ("level 9 of MQIsdp", name(b"MQIsdp", 9), Some(1)),
        ("level 6 of MQTT", level6, Some(0x84)),
        ("the reserved flag, 3.1.1", flags(V311, 0x01), None),
        ("the reserved flag, 5", flags(V5, 0x01), Some(0x81)),
        ("will QoS without a will, 3.1.1", flags(V311, 0x08), None),
        ("will QoS without a will, 5", flags(V5, 0x08), Some(0x81)),
        ("will retain without a will, 5", flags(V5, 0x20), Some(0x81)),
        ("a password without a user name, 3.1.1", password_alone.packet(), None),
        ("bytes behind the end, 3.1.1", trailing(V311), None),
        ("bytes behind the end, 5", trailing(V5), Some(0x81)),
        ("NUL in the client id, 3.1.1", nul_id(V311), None),
        ("NUL in the client id, 5", nul_id(V5), Some(0x81)),
        ("no client id for a session that stays, 3.1.1", nameless, Some(2)),
        ("a client id of 257 bytes, 3.1.1", long_id(V311), Some(2)),
        ("a client id of 257 bytes, 5", long_id(V5), Some(0x85)),
        ("a property twice", with(&[0x11, 0, 0, 0, 1, 0x11, 0, 0, 0, 1]), Some(0x82)),
        ("a property of another packet", with(&[TOPIC_ALIAS, 0, 1]), Some(0x81)),
        ("a property that does not exist", with(&[0x7F, 0]), Some(0x81)),
        ("a property that is cut short", with(&[0x11, 0, 0]), Some(0x81)),
        ("a receive maximum of 0", with(&[0x21, 0, 0]), Some(0x82)),
        ("authentication data without a method", with(&[0x16, 0, 1, 0]), Some(0x82)),
        ("an authentication method", with(&[&[0x15][..], &prefixed("PLAIN")].concat()), Some(0x8C)),
    ];
    for (what, bytes, expected) in cases {
        let answer = scene.instead_of_connect(&bytes);
        assert_eq!(answer.as_ref().map(crate::common::wire::Frame::reason), expected, "{what}: {answer:?}");
        assert!(answer.is_none_or(|answer| answer.kind() == CONNACK), "{what}");
    }
}

#[test]
fn a_will_that_could_not_be_published_is_refused_at_once() {
    let mut scene = Scene::new();
    let body = json!({ "id": "reader", "name": "reader", "scopes": ["subscribe"] });
    let created = scene.gateway.post("/v1/datasources", &scene.gateway.admin_key(), &body).json();
    let reader = created["key"]["secret"].as_str().expect("a key").to_owned();
    let will = |topic: &str, bytes: usize| Some((topic.to_owned(), vec![b'x'; bytes]));
    let cases = [(&scene.key.clone(), will("$SYS/gone", 1), 5, 0x90), (&reader, will("gone", 1), 5, 0x87)];
    for (key, will, old, new) in cases {
        for (version, code) in [(V311, old), (V5, new)] {
            let connect = Connect { will: will.clone(), ..Connect::with_key(version, key) };
            let answer = scene.instead_of_connect(&connect.packet()).expect("a CONNACK");
            assert_eq!(answer.reason(), code, "{answer:?}");
            if version == V5 {
                assert!(answer.text(REASON_STRING).expect("a reason").contains("will"), "{answer:?}");
            }
            // A stranger learns nothing but that it is one.
            let stranger = Connect { will: will.clone(), ..Connect::new(version) };
            let answer = scene.instead_of_connect(&stranger.packet()).expect("a CONNACK");
            assert_eq!(answer.reason(), if version == V5 { 0x87 } else { 5 });
        }
    }
}

#[test]
fn a_packet_that_breaks_a_rule_ends_the_connection_and_no_other() {
    const BAD: &[u8] = &[0x81, 0x82];
    let mut scene = Scene::new();
    // (what, packet, reason codes that fit; MQTT 3.1.1 just closes)
    type Case = (&'static str, fn(Version) -> Vec<u8>, &'static [u8]);
    let both: [Case; 30] = [
        ("a claim of 256 MB", |_| [&[0x32][..], &HUGE].concat(), &[0x95]),
        ("a length of five bytes", |_| vec![0x32, 0x80, 0x80, 0x80, 0x80, 0x01], &[0x81]),
        ("a second CONNECT", |version| Connect::new(version).packet(), &[0x82]),
        ("a CONNACK", |_| vec![0x20, 2, 0, 0], BAD),
        ("a SUBACK", |_| vec![0x90, 3, 0, 1, 0], BAD),
        ("an UNSUBACK", |_| vec![0xB0, 2, 0, 1], BAD),
        ("a PINGRESP", |_| vec![0xD0, 0], BAD),
        ("packet type 0", |_| vec![0x00, 0], BAD),
        ("AUTH", |_| vec![0xF0, 0], BAD),
        ("flags on a PINGREQ", |_| vec![0xC1, 0], &[0x81]),
        ("flags on a PUBACK", |_| vec![0x42, 2, 0, 1], &[0x81]),
        (
            "no flags on a SUBSCRIBE",
            |version| [&[0x80][..], &subscribe(version, 1, &["a"])[1..]].concat(),
            &[0x81],
        ),
        ("flags on a DISCONNECT", |_| vec![0xE8, 0], &[0x81]),
        ("content in a PINGREQ", |_| vec![0xC0, 1, 0], BAD),
        ("QoS 3", |version| [&[0x36][..], &publish(version, 1, "a", b"x")[1..]].concat(), &[0x81]),
        ("DUP at QoS 0", |version| [&[0x38][..], &publish(version, 0, "a", b"x")[1..]].concat(), BAD),
        ("packet id 0", |_| frame(0x32, &[0, 1, b'a', 0, 0, 0]), BAD),
        ("packet id 0 in a SUBSCRIBE", |version| subscribe(version, 0, &["a"]), BAD),
        ("a PUBLISH without a packet id", |_| frame(0x32, &[0, 1, b'a']), BAD),
        ("a topic longer than its packet", |_| frame(0x32, &[0, 9, b'a', 0, 1, 0]), BAD),
        ("a topic that is not UTF-8", |version| publish(version, 1, [b'a', 0xFF], b"x"), BAD),
        ("a surrogate in a topic", |version| publish(version, 1, [0xED, 0xA0, 0x80], b"x"), BAD),
        ("NUL in a topic", |version| publish(version, 1, "a\0b", b"x"), BAD),
        ("a wildcard in a topic, #", |version| publish(version, 1, "a/#", b"x"), &[0x90, 0x81, 0x82]),
        ("a wildcard in a topic, +", |version| publish(version, 1, "a/+/b", b"x"), &[0x90, 0x81, 0x82]),
        ("no topic at all", |version| publish(version, 1, "", b"x"), BAD),
        ("a SUBSCRIBE without a filter", |version| subscribe(version, 1, &[]), BAD),
        (
            "subscription options that are reserved",
            |version| {
                let mut packet = subscribe(version, 1, &["a"]);
                *packet.last_mut().expect("the options") = 0xC1;
                packet
            },
            BAD,
        ),
        (
            "an UNSUBSCRIBE without a filter",
            |version| frame(0xA2, if version == V5 { &[0, 1, 0] } else { &[0, 1] }),
            BAD,
        ),
        ("bytes behind the end of an ack", |_| vec![0x40, 7, 0, 7, 0, 0, 0, 0, 0], BAD),
    ];
    for (what, bytes, reasons) in both {
        assert_eq!(scene.after_connect(V311, &bytes(V311)), None, "{what}, 3.1.1");
        let answer = scene.after_connect(V5, &bytes(V5)).unwrap_or_else(|| panic!("{what}: no DISCONNECT"));
        assert!(answer.kind() == DISCONNECT && reasons.contains(&answer.reason()), "{what}: {answer:02x?}");
    }
    let publish_with = |properties: &[u8]| publish_with(V5, 1, "a", properties, b"x");
    let alias = |topic: &str, alias: u16| {
        let [high, low] = alias.to_be_bytes();
        crate::common::wire::publish_with(V5, 1, topic, &[TOPIC_ALIAS, high, low], b"x")
    };
    let v5: [(&str, Vec<u8>, &[u8]); 13] = [
        ("topic alias 0", alias("a", 0), &[0x94]),
        ("a topic alias over the maximum", alias("a", 33), &[0x94]),
        ("a topic alias that was never set", alias("", 5), &[0x94, 0x82]),
        ("a property twice", publish_with(&[TOPIC_ALIAS, 0, 1, TOPIC_ALIAS, 0, 1]), &[0x82]),
        ("a property of another packet", publish_with(&[0x11, 0, 0, 0, 1]), BAD),
        ("a subscription identifier from a client", publish_with(&[0x0B, 1]), &[0x82]),
        ("a property that does not exist", publish_with(&[0x7F, 0]), BAD),
        ("a property that is cut short", publish_with(&[0x02, 0, 0]), &[0x81]),
        ("properties longer than their packet", frame(0x32, &[0, 1, b'a', 0, 1, 99]), &[0x81]),
        ("a payload format of 2", publish_with(&[0x01, 2]), BAD),
        ("a wildcard in a response topic", publish_with(&[0x08, 0, 1, b'#']), BAD),
        ("a length that is longer than it needs to be", vec![0xC0, 0x80, 0x00], BAD),
        ("a DISCONNECT that only a server sends", vec![0xE0, 1, 0x8E], BAD),
    ];
    for (what, bytes, reasons) in v5 {
        let answer = scene.after_connect(V5, &bytes).unwrap_or_else(|| panic!("{what}: no DISCONNECT"));
        assert!(answer.kind() == DISCONNECT && reasons.contains(&answer.reason()), "{what}: {answer:02x?}");
    }
    // MQTT 3.1.1 has nothing in a DISCONNECT, where MQTT 5 has a reason.
    assert_eq!(scene.after_connect(V311, &[0xE0, 1, 0]), None);
    scene.gateway.settle();
    assert_eq!(
        scene.gateway.records("press-4"),
        Vec::<serde_json::Value>::new(),
        "nothing of all this was kept"
    );
}

#[test]
fn more_unacknowledged_messages_than_the_receive_maximum_end_an_mqtt_5_connection() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("mqtt.receive_maximum", 10).start();
    let source = gateway.create("press-4");
    let burst = |version| (1..=50).flat_map(|id| publish(version, id, "a", b"x")).collect::<Vec<u8>>();
    let (mut wire, connack) = Wire::connect(gateway.mqtt, &Connect::with_key(V5, &source.key));
    assert_eq!(connack.number(crate::common::wire::RECEIVE_MAXIMUM), Some(10));
    wire.send(&burst(V5));
    let goodbye = loop {
        match wire.next() {
            Next::Packet(frame) if frame.kind() == PUBACK => {}
            Next::Packet(frame) => break frame,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((goodbye.kind(), goodbye.reason()), (DISCONNECT, 0x93));
    wire.closed();
    // MQTT 3.1.1 knows no such limit.
    let mut wire = Wire::login(gateway.mqtt, V311, &source.key);
    wire.send(&burst(V311));
    for id in 1..=50 {
        assert_eq!(wire.packet(PUBACK).packet_id(), id);
    }
}

#[test]
fn a_subscription_is_refused_filter_by_filter() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let ingest = gateway.create("press-4").key;
    let body = json!({ "id": "press-5", "name": "press-5", "scopes": ["ingest", "subscribe"] });
    let created = gateway.post("/v1/datasources", &gateway.admin_key(), &body).json();
    let both = created["key"]["secret"].as_str().expect("a key").to_owned();
    let filters = ["a/b", "$share/g/+", "#"];
    for (key, version, codes) in
        [(&ingest, V311, [0x80; 3]), (&ingest, V5, [0x87; 3]), (&both, V311, [0; 3]), (&both, V5, [0; 3])]
    {
        let mut wire = Wire::login(gateway.mqtt, version, key);
        wire.send(&subscribe(version, 7, &filters));
        let suback = wire.packet(SUBACK);
        assert_eq!(suback.packet_id(), 7);
        let granted = &suback.body[suback.body.len() - 3..];
        let granted: Vec<u8> = granted.iter().map(|code| if *code < 3 { 0 } else { *code }).collect();
        assert_eq!(granted, codes, "{suback:02x?}");
        wire.send(&PINGREQ);
        wire.packet(PINGRESP);
    }
}

#[test]
fn a_key_of_one_datasource_gets_nothing_into_another() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let (a, b) = (gateway.create("a"), gateway.create("b"));
    let admin = gateway.admin_key();
    let mut accepted = 0;

    let topics = [
        "b/x",
        "b",
        "/b/x",
        "../b/x",
        "a/../b/x",
        "../../b",
        "$b/x",
        "*/x",
        "*",
        "ingest/b/x",
        "ingest.b.x",
        "b%2Fx",
    ];
    let properties = [
        user_property("datasource", "b"),
        user_property("x-datasource", "b"),
        user_property("authorization", &a.key),
        user_property("authorization", &format!("b:{}", a.key)),
        user_property("x-api-key", "b"),
        [user_property("authorization", &a.key), user_property("x-api-key", "hgk_b")].concat(),
    ];
    for version in VERSIONS {
        for client_id in ["a", "b", "../b"] {
            let connect = Connect { client_id: client_id.to_owned(), ..Connect::with_key(version, &a.key) };
            // A name beside the key opens nothing else.
            let named = Connect {
                username: Some(b"b".into()),
                password: Some(a.key.clone().into()),
                ..connect.clone()
            };
            for connect in [connect, named] {
                for topic in topics {
                    let mut wire = Wire::connect(gateway.mqtt, &connect).0;
                    wire.send(&publish(version, 1, topic, b"from a"));
                    accepted += usize::from(
                        matches!(wire.next(), Next::Packet(f) if f.kind() == PUBACK && f.reason() == 0),
                    );
                }
            }
        }
    }
    let mut wire = Wire::login(gateway.mqtt, V5, &a.key);
    for topic in topics {
        for properties in &properties {
            wire.send(&publish_with(V5, 1, topic, properties, b"from a"));
            let ack = wire.packet(PUBACK);
            accepted += usize::from(ack.reason() == 0);
        }
    }
    for topic in topics {
        wire.send(&publish(V5, 0, topic, b"from a, QoS 0"));
        accepted += usize::from(!topic.starts_with('$'));
    }
    wire.send(&PINGREQ);
    wire.packet(PINGRESP);

    let paths = [
        "/v1/ingest/b",
        "/v1/ingest/b/x",
        "/v1/ingest/a/../b/x",
        "/v1/ingest/a/%2e%2e/b/x",
        "/v1/ingest/a%2F..%2Fb/x",
        "/v1/ingest/b%2Fx",
        "/v1/ingest//b/x",
        "/v1/ingest/*/b/x",
        "/v1/ingest/%2A/x",
        "/v1/ingest/B/x",
        "/v1/ingest/b%00/x",
        "/v1/ingest/a/x?datasource=b",
        "//v1/ingest/b/x",
        "/v1/ingest/./b/x",
        "/v1/datasources/b/records",
        "/v1/datasources/b/keys",
        "/v1/datasources",
    ];
    let headers: [&[(&str, &str)]; 4] = [
        &[],
        &[("x-datasource", "b"), ("host", "b")],
        &[("x-original-url", "/v1/ingest/b/x"), ("x-forwarded-prefix", "/v1/ingest/b")],
        &[("x-api-key", "hgk_b")],
    ];
    for path in paths {
        for headers in headers {
            let answer = gateway.request("POST", path, &a.key, headers, b"\"from a\"");
            let to_a = path.starts_with("/v1/ingest/a/");
            assert!(
                answer.status >= 400 || to_a && answer.status == 200,
                "{path}: {} {}",
                answer.status,
                answer.text()
            );
            accepted += usize::from(answer.status == 200);
        }
    }
    for path in
        ["/v1/datasources/b/records", "/v1/datasources/b/latest", "/v1/datasources/b", "/v1/datasources"]
    {
        for method in ["GET", "DELETE"] {
            let status = gateway.request(method, path, &a.key, &[], &[]).status;
            assert!(matches!(status, 401 | 403 | 404 | 405), "{method} {path}: {status}");
        }
    }

    let mut wire = Wire::login(gateway.mqtt, V5, &b.key);
    assert_eq!(wire.publish(V5, 1, "x", b"from b"), 0);
    gateway.settle();
    let of_b: Vec<_> = gateway.records("b").into_iter().map(|record| record["payload"].clone()).collect();
    assert_eq!(of_b, ["from b"], "all that is in b came with b's own key");
    assert_eq!(gateway.records("a").len(), accepted, "what was accepted is in a");
    assert!(accepted > 100, "{accepted}");
    let datasources = gateway.get("/v1/datasources", &admin).json();
    let ids: Vec<_> =
        datasources["datasources"].as_array().expect("a list").iter().map(|d| &d["id"]).collect();
    assert_eq!(ids, ["a", "b"]);
    gateway.stop();
    for record in crate::common::kept::in_log(dir.path()) {
        let from_b = record.payload == b"from b";
        assert_eq!(record.datasource, if from_b { "b" } else { "a" }, "{record:?}");
    }
}

#[test]
fn no_secret_is_in_any_log_line_metric_answer_or_file() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("trace.filter", "trace").start();
    let admin = gateway.admin_key();
    let (live, dead) = (gateway.create("live"), gateway.create("dead"));
    let more = gateway.post("/v1/datasources/live/keys", &admin, &json!({ "label": "more" }));
    let more = if more.status == 201 { more.json()["secret"].as_str().map(str::to_owned) } else { None };
    gateway.delete("dead");
    let unknown = ApiKey::generate().expose().to_owned();
    let mut misspelt = live.key.clone();
    misspelt.pop();
    misspelt.push('~');
    let cut = live.key[..40].to_owned();
    let secrets: BTreeSet<String> =
        [admin, live.key.clone(), dead.key, unknown, misspelt, cut].into_iter().chain(more).collect();

    let answers = AtomicBool::new(true);
    let seen = |text: &str| {
        if text.contains("hgk_") {
            answers.store(false, Ordering::Relaxed);
            eprintln!("a key in an answer: {}", &text[..text.len().min(300)]);
        }
    };
    for key in &secrets {
        let bearer = format!("Bearer {key}");
        let basic = format!("Basic {key}");
        let two = [("authorization", key.as_str()), ("x-api-key", live.key.as_str())];
        let headers: [&[(&str, &str)]; 6] = [
            &[("authorization", key)],
            &[("authorization", &bearer)],
            &[("authorization", &basic)],
            &[("x-api-key", key)],
            &[("cookie", key)],
            &two,
        ];
        for headers in headers {
            for path in [
                "/v1/ingest/live/t",
                "/v1/ingest/nowhere/t",
                "/v1/datasources/live/records",
                "/v1/datasources",
            ] {
                for (method, body) in [("POST", &b"{\"value\":1}"[..]), ("POST", b"{"), ("GET", b"")] {
                    let json = [("content-type", "application/json")];
                    seen(&gateway.request(method, path, "", &[headers, &json[..]].concat(), body).text());
                }
            }
        }
        for path in [
            format!("/v1/ingest/live/t?api_key={key}"),
            format!("/v1/ingest/live/t?key={key}&x=1"),
            format!("/v1/datasources/live/records?authorization={key}"),
            format!("/v1/ingest/{key}/t"),
            format!("/v1/datasources/{key}"),
            format!("/{key}"),
        ] {
            seen(&gateway.request("POST", &path, "", &[], b"1").text());
            seen(&gateway.get(&path, &live.key).text());
        }
        for version in VERSIONS {
            let plain = Connect::new(version);
            let key = key.as_bytes().to_vec();
            let connects = [
                Connect { username: Some(key.clone()), ..plain.clone() },
                Connect { username: Some(b"device".into()), password: Some(key.clone()), ..plain.clone() },
                Connect { username: Some(key.clone()), password: Some(key.clone()), ..plain.clone() },
                Connect {
                    username: Some(key.clone()),
                    password: Some(live.key.clone().into()),
                    ..plain.clone()
                },
                Connect { client_id: String::from_utf8(key.clone()).expect("ASCII"), ..plain.clone() },
                Connect {
                    client_id: String::from_utf8(key).expect("ASCII"),
                    ..Connect::with_key(version, &live.key)
                },
            ];
            for connect in connects {
                let mut wire = Wire::open(gateway.mqtt);
                wire.send(&connect.packet());
                wire.send(&publish(version, 1, "t", b"1"));
                wire.send(&publish(version, 2, "$t", b"1"));
                wire.finish();
                while let Next::Packet(frame) = wire.next() {
                    seen(&String::from_utf8_lossy(&frame.body));
                }
            }
        }
        for name in ["authorization", "x-api-key", "Authorization"] {
            for value in [key, &bearer] {
                let properties = user_property(name, value);
                let mut wire = Wire::open(gateway.mqtt);
                wire.send(&Connect { properties: properties.clone(), ..Connect::new(V5) }.packet());
                wire.send(&publish_with(V5, 1, "t", &properties, b"1"));
                wire.finish();
                while let Next::Packet(frame) = wire.next() {
                    seen(&String::from_utf8_lossy(&frame.body));
                }
                let mut wire = Wire::login(gateway.mqtt, V5, &live.key);
                wire.send(&publish_with(V5, 1, "t", &properties, b"1"));
                seen(&String::from_utf8_lossy(&wire.packet(PUBACK).body));
            }
        }
    }
    assert!(answers.load(Ordering::Relaxed), "an answer held a key");
    gateway.settle();
    let metrics = gateway.metrics();
    let exit = gateway.stop();
    assert!(exit.output.contains("TRACE") || exit.output.contains("DEBUG"), "it did say much");
    assert!(exit.output.contains(&live.key_id), "what a log may name is a key's id");

    let mut texts =
        vec![("the log lines".to_owned(), exit.output.into_bytes()), ("/metrics".to_owned(), metrics.into())];
    let mut files = vec![dir.path().to_owned()];
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(
                std::fs::read_dir(&path).expect("readable").map(|entry| entry.expect("an entry").path()),
            );
        } else if path.file_name().is_some_and(|name| name != "admin.key") {
            texts.push((path.display().to_string(), std::fs::read(&path).expect("readable")));
        }
    }
    assert!(texts.len() >= 5, "the log, the registry and storage have files: {}", texts.len());
    for (name, text) in texts {
        // What is kept of a key without its prefix is one as well.
        let parts = secrets.iter().map(|secret| &secret.as_bytes()[4..36]).chain([&b"hgk_"[..]]);
        for part in parts {
            let found = text.windows(part.len()).position(|window| window == part);
            let around = found
                .map(|at| String::from_utf8_lossy(&text[at.saturating_sub(200)..(at + 40).min(text.len())]));
            assert!(found.is_none(), "a secret in {name}: …{}…", around.unwrap_or_default());
        }
    }
}
