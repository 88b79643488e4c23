//! The MQTT front, with clients that nobody here wrote wherever they can do it (rumqttc,
//! `mosquitto_pub`, paho), and byte by byte where the answer's exact form matters.

use std::collections::HashSet;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::kept::in_log;
use crate::common::load::{Ledger, mqtt_sender, number};
use crate::common::wire::{
    ASSIGNED_CLIENT_ID, CONNACK, CONTENT_TYPE, Connect, DISCONNECT, Frame, MAXIMUM_PACKET_SIZE, MAXIMUM_QOS,
    Next, PINGREQ, PINGRESP, PUBACK, REASON_STRING, RECEIVE_MAXIMUM, SERVER_KEEP_ALIVE, TOPIC_ALIAS,
    TOPIC_ALIAS_MAXIMUM, VERSIONS, Version, Wire, publish, publish_with, user_property,
};
use crate::common::{Gateway, PATIENCE, Setup, Source, scratch, wait_for};
use Version::{V5, V311};
use headgate::testing::{ApiKey, limits};
use serde_json::{Value, json};

/// What a test of one gateway needs.
fn scene() -> (tempfile::TempDir, Gateway, Source) {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    (dir, gateway, source)
}

/// Payloads of stored records, in order.
fn payloads(records: &[Value]) -> Vec<String> {
    records
        .iter()
        .map(|record| record["payload"].as_str().map_or_else(|| record["payload"].to_string(), str::to_owned))
        .collect()
}

/// Publishes `count` messages with rumqttc over MQTT 3.1.1 and waits for every ack.
fn rumqttc_v4(options: rumqttc::MqttOptions, count: usize) {
    use rumqttc::{Client, Event, Packet, QoS};
    let (client, mut connection) = Client::new(options, count);
    for n in 0..count {
        client.publish("spindle/temp", QoS::AtLeastOnce, false, n.to_string()).expect("queued");
    }
    let mut acks = 0;
    while acks < count {
        let event = connection.recv_timeout(PATIENCE).expect("in time").expect("no error");
        acks += usize::from(matches!(event, Event::Incoming(Packet::PubAck(_))));
    }
    client.disconnect().expect("queued");
    while connection.recv_timeout(PATIENCE).is_ok_and(|event| event.is_ok()) {}
}

/// Publishes `count` messages with rumqttc over MQTT 5 and waits for every ack.
fn rumqttc_v5(options: rumqttc::v5::MqttOptions, count: usize) {
    use rumqttc::v5::mqttbytes::QoS;
    use rumqttc::v5::mqttbytes::v5::{Packet, PubAckReason};
    use rumqttc::v5::{Client, Event};
    let (client, mut connection) = Client::new(options, count);
    for n in 0..count {
        client.publish("spindle/temp", QoS::AtLeastOnce, false, n.to_string()).expect("queued");
    }
    let mut acks = 0;
    while acks < count {
        let event = connection.recv_timeout(PATIENCE).expect("in time").expect("no error");
        if let Event::Incoming(Packet::PubAck(ack)) = event {
            assert_eq!(ack.reason, PubAckReason::Success);
            acks += 1;
        }
    }
    client.disconnect().expect("queued");
    while connection.recv_timeout(PATIENCE).is_ok_and(|event| event.is_ok()) {}
}

#[test]
fn rumqttc_publishes_with_the_key_in_any_place() {
    const COUNT: usize = 300;
    let (_dir, gateway, source) = scene();
    let (host, port) = (gateway.mqtt.ip().to_string(), gateway.mqtt.port());
    for (user, password) in
        [(source.key.as_str(), ""), ("device", source.key.as_str()), (&source.key, &source.key)]
    {
        let mut v4 = rumqttc::MqttOptions::new("four", &host, port);
        v4.set_credentials(user, password);
        rumqttc_v4(v4, COUNT);
        let mut v5 = rumqttc::v5::MqttOptions::new("five", &host, port);
        v5.set_credentials(user, password);
        rumqttc_v5(v5, COUNT);
    }
    for (name, value) in [
        ("authorization", source.key.clone()),
        ("X-API-Key", source.key.clone()),
        ("Authorization", format!("Bearer {}", source.key)),
    ] {
        let mut v5 = rumqttc::v5::MqttOptions::new("five", &host, port);
        v5.set_user_properties(vec![(name.to_owned(), value)]);
        rumqttc_v5(v5, COUNT);
    }
    let records = gateway.stored("press-4", 9 * COUNT);
    let expected: Vec<String> = (0..9 * COUNT).map(|n| (n % COUNT).to_string()).collect();
    assert_eq!(payloads(&records), expected, "each once, in the order in which they were sent");
    let record = &records[0];
    assert_eq!((&record["topic"], &record["transport"]), (&json!("spindle/temp"), &json!("mqtt")));
    assert_eq!(record["key_id"], json!(source.key_id));
}

/// Runs `mosquitto_pub` against a gateway.
fn mosquitto_pub(gateway: &Gateway, arguments: &[&str]) -> Output {
    let output = Command::new("mosquitto_pub")
        .args(["-h", &gateway.mqtt.ip().to_string(), "-p", &gateway.mqtt.port().to_string()])
        .args(arguments)
        .output();
    output.expect("mosquitto_pub is installed (tests/run does it)")
}

#[test]
fn mosquitto_pub_publishes_with_the_key_in_any_place() {
    let (_dir, gateway, source) = scene();
    let other = gateway.create("press-5");
    let key = source.key.as_str();
    let message = ["-q", "1", "-t", "spindle", "-m"];
    let ways: [&[&str]; 8] = [
        &["-V", "mqttv31", "-u", key],
        &["-V", "mqttv311", "-u", key],
        &["-V", "mqttv311", "-u", "device", "-P", key],
        &["-V", "mqttv5", "-u", key],
        &["-V", "mqttv5", "-u", "device", "-P", key],
        &["-V", "mqttv5", "-D", "connect", "user-property", "authorization", key],
        &["-V", "mqttv5", "-D", "connect", "user-property", "x-api-key", key],
        // One connection, and a key for the message alone.
        &["-V", "mqttv5", "-u", &other.key, "-D", "publish", "user-property", "x-api-key", key],
    ];
    for (i, way) in ways.into_iter().enumerate() {
        let output = mosquitto_pub(&gateway, &[way, &message, &[&format!("way {i}")]].concat());
        assert!(output.status.success(), "{way:?}: {output:?}");
    }
    let expected: Vec<String> = (0..ways.len()).map(|i| format!("way {i}")).collect();
    assert_eq!(payloads(&gateway.stored("press-4", ways.len())), expected);
    assert!(gateway.records("press-5").is_empty(), "the message's key decided, not the connection's");

    let stranger = ApiKey::generate();
    for way in [
        &["-V", "mqttv311", "-u", stranger.expose()][..],
        &["-V", "mqttv5", "-u", stranger.expose()],
        &["-V", "mqttv5"],
    ] {
        let output = mosquitto_pub(&gateway, &[way, &message, &["no"]].concat());
        let said = String::from_utf8_lossy(&output.stderr).to_lowercase();
        assert!(!output.status.success() && said.contains("not authori"), "{output:?}");
    }
    gateway.settle();
    assert_eq!(gateway.records("press-4").len(), ways.len());
}

#[test]
fn mosquitto_pub_streams_lines() {
    let (dir, gateway, source) = scene();
    let file = dir.path().join("lines");
    let lines: Vec<String> = (0..2000).map(|n| format!("line {n}")).collect();
    std::fs::write(&file, lines.join("\n")).expect("written");
    for version in ["mqttv311", "mqttv5"] {
        let status = Command::new("mosquitto_pub")
            .args(["-h", &gateway.mqtt.ip().to_string(), "-p", &gateway.mqtt.port().to_string()])
            .args(["-V", version, "-u", &source.key, "-q", "1", "-t", version, "-l"])
            .stdin(std::fs::File::open(&file).expect("there"))
            .status();
        assert!(status.expect("mosquitto_pub is installed (tests/run does it)").success());
    }
    let records = gateway.stored("press-4", 2 * lines.len());
    assert_eq!(payloads(&records), [&lines[..], &lines[..]].concat());
}

#[test]
fn the_python_line_that_comes_with_a_new_datasource_works_as_it_is() {
    let (_dir, gateway, _) = scene();
    let created = gateway.post("/v1/datasources", &gateway.admin_key(), &json!({ "name": "Hall B" })).json();
    let line = created["connect"]["python"].as_str().expect("a line");
    // Where tests/run puts paho.
    let venv = format!("{}/../venv/bin", env!("CARGO_TARGET_TMPDIR"));
    let output = Command::new("sh")
        .args(["-c", line])
        .env("PATH", format!("{venv}:{}", std::env::var("PATH").unwrap_or_default()))
        .env("HEADGATE_API_KEY", created["key"]["secret"].as_str().expect("a key"))
        .output()
        .expect("a shell");
    assert!(output.status.success(), "needs paho (tests/run installs it): {line}\n{output:?}");
    let records = gateway.stored("hall-b", 1);
    assert_eq!(
        (&records[0]["topic"], &records[0]["payload"]),
        (&json!("temperature"), &json!({ "value": 21.5 }))
    );
}

/// What a client is answered that presents this, or nothing.
fn refusal(gateway: &Gateway, connect: &Connect) -> Frame {
    let mut wire = Wire::open(gateway.mqtt);
    wire.send(&connect.packet());
    let connack = wire.packet(CONNACK);
    wire.closed();
    connack
}

#[test]
fn every_key_that_is_not_good_gets_the_same_answer() {
    let (_dir, gateway, source) = scene();
    let dead = gateway.create("press-5");
    gateway.delete("press-5");
    let unknown = ApiKey::generate();
    let mut misspelt = source.key.clone().into_bytes();
    misspelt[20] ^= 1;
    let other = gateway.create("press-6").key;
    for (version, code) in [(V311, 5), (V5, 0x87)] {
        let none = Connect::new(version);
        let user = |name: &[u8]| Connect { username: Some(name.to_vec()), ..Connect::new(version) };
        let strangers = [
            user(b""),
            user(b"device"),
            user(unknown.expose().as_bytes()),
            user(dead.key.as_bytes()),
            user(&misspelt),
            user(&source.key.as_bytes()[..source.key.len() - 1]),
            user(format!("{}x", source.key).as_bytes()),
            // Two keys, each of them good: whose message would it be?
            Connect { password: Some(other.clone().into()), ..Connect::with_key(version, &source.key) },
        ];
        let answer = refusal(&gateway, &none);
        assert_eq!(answer.reason(), code);
        for stranger in strangers {
            assert_eq!(refusal(&gateway, &stranger), answer, "it tells a stranger nothing");
        }
    }
}

#[test]
fn a_connack_announces_what_will_be_held_against_the_client() {
    let (_dir, gateway, source) = scene();
    let good = Connect::with_key(V5, &source.key);
    let (_wire, connack) = Wire::connect(gateway.mqtt, &good);
    assert_eq!(connack.number(RECEIVE_MAXIMUM), Some(limits::MQTT_RECEIVE_MAXIMUM.into()));
    assert_eq!(connack.number(MAXIMUM_QOS), None, "all of them");
    assert_eq!(connack.number(TOPIC_ALIAS_MAXIMUM), Some(limits::MQTT_TOPIC_ALIAS_MAXIMUM.into()));
    assert_eq!(connack.number(MAXIMUM_PACKET_SIZE), Some(limits::MQTT_PACKET_BYTES_MAX as u64));
    assert_eq!(connack.number(SERVER_KEEP_ALIVE), Some(3600), "a keep-alive of 0 is none, and too long");
    assert!(!connack.text(ASSIGNED_CLIENT_ID).expect("one was made").is_empty());
    assert_eq!(connack.body[0], 0, "no session is present");

    let named = Connect { client_id: "me".to_owned(), keep_alive: 60, ..good.clone() };
    let (_wire, connack) = Wire::connect(gateway.mqtt, &named);
    assert_eq!((connack.number(SERVER_KEEP_ALIVE), connack.text(ASSIGNED_CLIENT_ID)), (None, None));
    // A session's expiry is as asked for, up to the maximum.
    let lasting = Connect { clean: false, properties: vec![0x11, 0, 0, 0x0E, 0x10], ..named.clone() };
    let (_wire, connack) = Wire::connect(gateway.mqtt, &lasting);
    assert_eq!((connack.number(0x11), connack.body[0]), (None, 0));
    let for_ever = Connect { clean: true, properties: vec![0x11, 0xFF, 0xFF, 0xFF, 0xFF], ..named };
    let (_wire, connack) = Wire::connect(gateway.mqtt, &for_ever);
    assert_eq!((connack.number(0x11), connack.body[0]), (Some(7 * 24 * 3600), 0));
    let lasting =
        Connect { clean: false, client_id: "me".to_owned(), ..Connect::with_key(V311, &source.key) };
    let (_wire, connack) = Wire::connect(gateway.mqtt, &lasting);
    assert_eq!(connack.body, [1, 0], "the session is there");
}

#[test]
fn a_client_that_connects_again_takes_over_from_itself_and_from_nobody_else() {
    let (_dir, gateway, source) = scene();
    let other = gateway.create("press-5");
    for version in VERSIONS {
        let connect = |source: &Source| {
            let connect = Connect { client_id: "plc".to_owned(), ..Connect::with_key(version, &source.key) };
            Wire::connect(gateway.mqtt, &connect).0
        };
        let mut bystander = connect(&other);
        let mut first = connect(&source);
        assert_eq!(first.publish(version, 1, "t", b"first"), 0);
        let mut second = connect(&source);
        match version {
            V5 => drop(first.disconnected(0x8E)),
            V311 => first.closed(),
        }
        assert_eq!(second.publish(version, 1, "t", b"second"), 0);
        assert_eq!(bystander.publish(version, 1, "t", b"another datasource's client of the same name"), 0);
    }
}

#[test]
fn a_silent_client_is_gone_after_one_and_a_half_keep_alives() {
    let (_dir, gateway, source) = scene();
    std::thread::scope(|scope| {
        for version in VERSIONS {
            let connect = Connect { keep_alive: 1, ..Connect::with_key(version, &source.key) };
            let (gateway, connect2) = (&gateway, connect.clone());
            scope.spawn(move || {
                let (mut wire, _) = Wire::connect(gateway.mqtt, &connect2);
                let silent_from = Instant::now();
                match version {
                    V5 => drop(wire.disconnected(0x8D)),
                    V311 => wire.closed(),
                }
                let took = silent_from.elapsed().as_secs_f64();
                assert!((1.3..3.0).contains(&took), "closed after {took} s");
            });
            scope.spawn(move || {
                let (mut wire, _) = Wire::connect(gateway.mqtt, &connect);
                for _ in 0..4 {
                    assert_eq!(wire.next_within(Duration::from_millis(900)), Next::Silent);
                    wire.send(&PINGREQ);
                    wire.packet(PINGRESP);
                }
                // A QoS 0 message is a sign of life as well; half a packet is none.
                let message = publish(version, 0, "t", b"x");
                wire.send(&message);
                assert_eq!(wire.next_within(Duration::from_millis(900)), Next::Silent);
                let half_from = Instant::now();
                for byte in &message[..3] {
                    wire.send(&[*byte]);
                    if wire.next_within(Duration::from_millis(400)) != Next::Silent {
                        break;
                    }
                }
                while !matches!(wire.next(), Next::Closed) {}
                assert!(half_from.elapsed() < Duration::from_secs(3), "{:?}", half_from.elapsed());
            });
        }
    });
}

#[test]
fn deleting_a_datasource_closes_its_connections_before_it_returns() {
    let dir = scratch();
    // So many clients with a dead key at one address are told to wait otherwise.
    let gateway = Setup::on(dir.path()).set("auth.failures_exempt", "[\"127.0.0.1\"]").start();
    let source = gateway.create("press-4");
    let other = gateway.create("press-5");
    let mut others = VERSIONS.map(|version| (version, Wire::login(gateway.mqtt, version, &other.key)));
    let live: Vec<_> = (0..20)
        .map(|i| {
            let version = VERSIONS[i % 2];
            let mut wire = Wire::login(gateway.mqtt, version, &source.key);
            assert_eq!(wire.publish(version, 1, "t", b"x"), 0);
            (version, wire)
        })
        .collect();
    assert!((gateway.metric("headgate_mqtt_connections") - 22.0).abs() < 0.5);
    gateway.delete("press-4");
    assert!(
        (gateway.metric("headgate_mqtt_connections") - 2.0).abs() < 0.5,
        "only the other datasource's are left"
    );
    let log_end = gateway.metric("headgate_log_next_offset");
    for (version, mut wire) in live {
        wire.send(&publish(version, 2, "t", b"after"));
        match version {
            V5 => drop(wire.disconnected(0x98)),
            V311 => wire.closed(),
        }
        let answer = refusal(&gateway, &Connect::with_key(version, &source.key));
        assert_eq!(answer.reason(), if version == V5 { 0x87 } else { 5 });
    }
    assert!((gateway.metric("headgate_log_next_offset") - log_end).abs() < 0.5, "nothing came in any more");
    for (version, wire) in &mut others {
        assert_eq!(wire.publish(*version, 1, "t", b"x"), 0);
    }
    // The dead key is no better on somebody else's connection, message by message.
    let (_, wire) = &mut others[1];
    wire.send(&publish_with(V5, 3, "t", &user_property("authorization", &source.key), b"x"));
    assert_eq!(wire.packet(PUBACK).reason(), 0x87);
    assert_eq!(wire.publish(V5, 4, "t", b"x"), 0);
}

#[test]
fn deleting_a_datasource_under_load_leaves_no_ack_without_a_record() {
    let (dir, gateway, _) = scene();
    let mut acked = Vec::new();
    let ledger = Arc::new(Ledger::default());
    for round in 0..20 {
        let source = gateway.create(&format!("line-{round}"));
        let before = ledger.acked();
        let senders = [(V311, 1), (V311, 50), (V311, 200), (V5, 1), (V5, 50), (V5, 200)]
            .map(|(version, window)| mqtt_sender(&gateway, &source, &ledger, version, window));
        wait_for("some acks", || (ledger.acked() > before + 200).then_some(()));
        gateway.delete(&source.id);
        let log_end = gateway.metric("headgate_log_next_offset");
        for sender in senders {
            let sent = sender.join().expect("only acks, and then the end");
            assert!(matches!(sent.goodbye, None | Some(0x98)), "{:?}", sent.goodbye);
            acked.extend(sent.acked);
        }
        // What reaches the log of a cluster behind the end of its key has an offset, and is no record.
        let is_in_cluster = crate::common::cluster::is_wanted();
        let came = gateway.metric("headgate_log_next_offset") - log_end;
        assert!(is_in_cluster || came.abs() < 0.5, "{came} came in after");
    }
    gateway.stop();
    let kept: HashSet<u64> = in_log(dir.path()).iter().map(|record| number(&record.payload)).collect();
    let lost: Vec<_> = acked.iter().filter(|n| !kept.contains(n)).collect();
    assert!(lost.is_empty(), "{} of {} acknowledged and not kept: {lost:?}", lost.len(), acked.len());
}

#[test]
fn a_bad_key_for_one_message_costs_that_message_and_no_more() {
    let (_dir, gateway, source) = scene();
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    let (unknown, other) = (ApiKey::generate(), gateway.create("press-5"));
    let keyed = |id, key: &str| publish_with(V5, id, "t", &user_property("authorization", key), b"x");
    let two = [user_property("authorization", &source.key), user_property("x-api-key", &other.key)].concat();
    let burst = [
        publish(V5, 1, "t", b"x"),
        keyed(2, unknown.expose()),
        keyed(3, "not a key"),
        publish(V5, 4, "t", b"x"),
        keyed(5, &other.key),
        publish_with(V5, 6, "t", &two, b"x"),
        keyed(7, &source.key),
    ];
    wire.send(&burst.concat());
    let acks: Vec<_> = (1..=7).map(|_| wire.packet(PUBACK)).collect();
    let answers: Vec<_> = acks.iter().map(|ack| (ack.packet_id(), ack.reason())).collect();
    assert_eq!(
        answers,
        [(1, 0), (2, 0x87), (3, 0x87), (4, 0), (5, 0), (6, 0x87), (7, 0)],
        "in the order of the messages"
    );
    assert!(acks[1].text(REASON_STRING).is_some_and(|words| words.contains("key")), "{:?}", acks[1]);
    assert_eq!(gateway.stored("press-4", 3).len(), 3);
    assert_eq!(gateway.stored("press-5", 1).len(), 1);
    // Without a place for a no, there is no ack.
    let mut wire = Wire::login(gateway.mqtt, V311, &source.key);
    wire.send(
        &[publish(V311, 1, "t", b"x"), publish(V311, 2, "$t", b"x"), publish(V311, 3, "t", b"x")].concat(),
    );
    assert_eq!(wire.packet(PUBACK).packet_id(), 1);
    wire.closed();
    gateway.settle();
    assert_eq!(gateway.records("press-4").len(), 4, "what came before the no was kept");
}

#[test]
fn the_admin_key_publishes_with_the_datasource_in_front_of_the_topic() {
    let (_dir, gateway, _) = scene();
    let mut wire = Wire::login(gateway.mqtt, V5, &gateway.admin_key());
    assert_eq!(wire.publish(V5, 1, "press-4/spindle/temp", b"21"), 0);
    assert_eq!(wire.publish(V5, 2, "nowhere/spindle", b"21"), 0x87);
    assert_eq!(wire.publish(V5, 3, "spindle", b"21"), 0x90);
    assert_eq!(wire.publish(V5, 4, "press-4/", b"21"), 0x90);
    assert_eq!(gateway.stored("press-4", 1)[0]["topic"], "spindle/temp");
}

#[test]
fn a_topic_alias_stands_for_its_topic_until_it_is_set_anew() {
    let (_dir, gateway, source) = scene();
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    let aliased =
        |id: u16, topic: &str, alias: u8| publish_with(V5, id, topic, &[TOPIC_ALIAS, 0, alias], b"x");
    let messages = [("one", 1), ("", 1), ("two", 32), ("", 1), ("", 32), ("three", 1), ("", 1), ("", 32)];
    for (id, (topic, alias)) in (1..).zip(messages) {
        wire.send(&aliased(id, topic, alias));
        assert_eq!(wire.packet(PUBACK).reason(), 0);
    }
    let records = gateway.stored("press-4", messages.len());
    let topics: Vec<_> = records.iter().map(|record| record["topic"].as_str().expect("text")).collect();
    assert_eq!(topics, ["one", "one", "two", "one", "two", "three", "three", "two"]);
    // An alias is its connection's own.
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    wire.send(&aliased(1, "", 1));
    assert_eq!(wire.packet(DISCONNECT).reason(), 0x82);
}

#[test]
fn a_packet_or_payload_over_its_limit_is_refused_and_one_at_the_limit_is_not() {
    const PACKET: usize = 8000;
    const PAYLOAD: usize = 5000;
    let dir = scratch();
    let setup =
        Setup::on(dir.path()).set("mqtt.packet_bytes_max", PACKET).set("intake.payload_bytes_max", PAYLOAD);
    let gateway = setup.start();
    let source = gateway.create("press-4");
    let mut kept = 0;
    for version in VERSIONS {
        // A topic alone can fill a packet up to its limit only with properties beside it.
        for (payload, fits) in [(PAYLOAD - 1, true), (PAYLOAD, true), (PAYLOAD + 1, false), (PACKET, false)] {
            let mut wire = Wire::login(gateway.mqtt, version, &source.key);
            wire.send(&publish(version, 1, "t", &vec![b'x'; payload]));
            match (fits, version) {
                (true, _) => assert_eq!(wire.packet(PUBACK).reason(), 0, "{payload}"),
                (false, V5) => drop(wire.disconnected(0x95)),
                (false, V311) => wire.closed(),
            }
            kept += usize::from(fits);
        }
    }
    let filled_to = |bytes: usize| {
        // 2 + 3 for a user property's name, 2 for its value's length; 9 for the rest of the packet.
        let empty = publish_with(V5, 1, "t", &user_property("pad", &"x".repeat(200)), b"").len() - 200;
        let packet = publish_with(V5, 1, "t", &user_property("pad", &"x".repeat(bytes - empty)), b"");
        assert_eq!(packet.len(), bytes);
        packet
    };
    for (bytes, fits) in [(PACKET - 1, true), (PACKET, true), (PACKET + 1, false)] {
        let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
        wire.send(&filled_to(bytes));
        match fits {
            true => assert_eq!(wire.packet(PUBACK).reason(), 0, "{bytes}"),
            false => drop(wire.disconnected(0x95)),
        }
        kept += usize::from(fits);
    }
    gateway.settle();
    assert_eq!(gateway.records("press-4").len(), kept);
}

#[test]
fn a_message_without_qos_is_counted_whether_it_is_let_in_or_not() {
    let (_dir, gateway, source) = scene();
    let accepted = r#"headgate_accepted_total{transport="mqtt"}"#;
    let refused = r#"headgate_refused_total{transport="mqtt",cause="topic"}"#;
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    let burst: Vec<u8> =
        (0..30).flat_map(|n| publish(V5, 0, if n % 3 == 0 { "$t" } else { "t" }, b"x")).collect();
    wire.send(&burst);
    wire.send(&PINGREQ);
    wire.packet(PINGRESP);
    let count = |name, expected: f64| {
        wait_for(name, || ((gateway.metric(name) - expected).abs() < 0.5).then_some(()));
    };
    count(accepted, 20.0);
    count(refused, 10.0);
    assert_eq!(gateway.stored("press-4", 20).len(), 20);
}

#[test]
fn what_comes_in_the_same_breath_as_connect_and_disconnect_is_kept() {
    let (_dir, gateway, source) = scene();
    for version in VERSIONS {
        let mut wire = Wire::open(gateway.mqtt);
        let again = [&[0x3A][..], &publish(version, 2, "t", b"dup")[1..]].concat();
        let all = [
            Connect::with_key(version, &source.key).packet(),
            publish(version, 0, "t", b"qos 0"),
            publish(version, 1, "t", b"qos 1"),
            again,
            vec![0xE0, 0],
        ];
        wire.send(&all.concat());
        wire.packet(CONNACK);
        assert_eq!(wire.packet(PUBACK).packet_id(), 1);
        assert_eq!(wire.packet(PUBACK).packet_id(), 2);
        wire.closed();
    }
    assert_eq!(payloads(&gateway.stored("press-4", 6)), ["qos 0", "qos 1", "dup", "qos 0", "qos 1", "dup"]);
}

#[test]
fn a_message_keeps_its_topic_media_type_and_every_byte() {
    let (_dir, gateway, source) = scene();
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    let json_type = [&[CONTENT_TYPE][..], &crate::common::wire::prefixed("application/json")].concat();
    let bytes: Vec<u8> = (0..=255).collect();
    // What is no subject of NATS cannot be in a log there.
    let mut topics = ["/", "a//b", "spindle/temp °C", "a/$b", &"x".repeat(limits::TOPIC_BYTES_MAX)];
    if crate::common::cluster::is_wanted() {
        for topic in &mut topics[..3] {
            assert_eq!(wire.publish(V5, 9, topic, b"x"), 0x90, "{topic}");
            *topic = "v1.2/temp°C";
        }
    }
    for (id, topic) in (1..).zip(topics) {
        wire.send(&publish_with(V5, id, topic, &json_type, br#"{"value": 21.50}"#));
        assert_eq!(wire.packet(PUBACK).reason(), 0, "{topic}");
    }
    for payload in [&bytes[..], b"", b"{not json"] {
        assert_eq!(wire.publish(V5, 9, "raw", payload), 0);
    }
    let too_long = "x".repeat(limits::TOPIC_BYTES_MAX + 1);
    let too_deep = "/".repeat(limits::TOPIC_LEVELS_MAX);
    for topic in [too_long.as_str(), &too_deep, "$SYS/x", "a\tb", "a\u{85}b"] {
        assert_eq!(wire.publish(V5, 9, topic, b"x"), 0x90, "{topic}");
    }
    let records = gateway.stored("press-4", topics.len() + 3);
    for (record, topic) in records.iter().zip(topics) {
        assert_eq!(record["topic"], topic);
        assert_eq!(
            (&record["payload"], &record["content_type"]),
            (&json!({ "value": 21.5 }), &json!("application/json"))
        );
    }
    let exit = gateway.stop();
    let kept = in_log(_dir.path());
    assert_eq!(kept.len(), records.len(), "{}", exit.output);
    assert_eq!(kept[0].payload, br#"{"value": 21.50}"#);
    assert_eq!(kept[topics.len()].payload, bytes);
    assert_eq!(crate::common::kept::in_storage(_dir.path()), kept);
}
