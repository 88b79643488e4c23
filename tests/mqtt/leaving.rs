//! What a client has sent before it left counts, whoever ends its connection: itself, its next connection, or the
//! gateway. Before, a takeover and a drain closed a connection without reading what lay in its socket: clients that
//! had said goodbye had their wills published, and messages were lost.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::tls::{Identity, TlsClient};
use crate::common::wire::{
    CONNACK, Connect, Message, Next, PINGREQ, PINGRESP, PUBACK, PUBREC, SESSION_EXPIRY, SUBACK, VERSIONS,
    Version::{self, V5, V311},
    WILL_DELAY, Wire, four_bytes, frame, publish, subscribe, subscribe_with,
};
use crate::common::ws::WsClient;
use crate::common::{Gateway, Setup, scratch, signal, wait_for};

const GOODBYE: [u8; 2] = [0xE0, 0];
const QUOTA_EXCEEDED: u8 = 0x97;
/// More with `HEADGATE_TEST_ROUNDS`.
const ROUNDS: usize = 60;

fn rounds() -> usize {
    std::env::var("HEADGATE_TEST_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(ROUNDS)
}

/// A gateway with TLS, and a key that may publish and subscribe.
struct LeavingStage {
    _dir: tempfile::TempDir,
    issuer: Identity,
    gateway: Gateway,
    key: String,
}

impl LeavingStage {
    fn new() -> Self {
        Self::with(json!({}))
    }

    fn with(limits: Value) -> Self {
        let dir = scratch();
        let issuer = Identity::issuer(dir.path(), "issuer");
        let identity = issuer.issue(dir.path(), "gateway");
        let setup = Setup::on(dir.path()).set("mqtt.tls.certificate", identity.certificate.display());
        let gateway = setup.set("mqtt.tls.key", identity.key.display()).start();
        let key = create(&gateway, limits);
        Self { _dir: dir, issuer, gateway, key }
    }

    /// A connection that nothing was sent on.
    fn open(&self, carrier: &str) -> Wire {
        match carrier {
            "tcp" => Wire::open(self.gateway.mqtt),
            "tls" => {
                let addr = self.gateway.mqtts.expect("it serves TLS");
                Wire::over(TlsClient::connect(addr, &self.issuer, None).expect("a handshake"))
            }
            _ => Wire::over(WsClient::open(self.gateway.http)),
        }
    }

    fn mortal(&self, version: Version) -> Connect {
        mortal(&self.key, version)
    }

    fn kept(&self) -> (Vec<usize>, usize) {
        kept(&self.gateway)
    }
}

fn create(gateway: &Gateway, limits: Value) -> String {
    let body =
        json!({ "id": "press-4", "name": "press-4", "scopes": ["ingest", "subscribe"], "limits": limits });
    let answer = gateway.post("/v1/datasources", &gateway.admin_key(), &body);
    assert_eq!(answer.status, 201, "{}", answer.text());
    answer.json()["key"]["secret"].as_str().expect("a key").to_owned()
}

/// A client with a will.
fn mortal(key: &str, version: Version) -> Connect {
    let will = Some(("will".to_owned(), b"gone".to_vec()));
    Connect { client_id: "mortal".to_owned(), will, ..Connect::with_key(version, key) }
}

/// The numbers published to `n`, in their order in storage, and how many wills there are.
fn kept(gateway: &Gateway) -> (Vec<usize>, usize) {
    gateway.settle();
    let records = gateway.records("press-4");
    let numbers = records.iter().filter(|record| record["topic"] == "n");
    let numbers = numbers.map(|record| record["payload"].to_string().parse().expect("a number"));
    (numbers.collect(), records.iter().filter(|record| record["topic"] == "will").count())
}

fn number(n: usize) -> Vec<u8> {
    publish_zero(n, V311)
}

fn publish_zero(n: usize, version: Version) -> Vec<u8> {
    publish(version, 0, "n", n.to_string().as_bytes())
}

/// Processes that take the processor, for as long as it lives.
struct BusyProcesses(Vec<Child>);

impl BusyProcesses {
    fn begin(processes: usize) -> Self {
        let spin = || {
            let mut command = Command::new("sh");
            command.args(["-c", "while :; do :; done"]).stdin(Stdio::null()).spawn().expect("a shell")
        };
        Self((0..processes).map(|_| spin()).collect())
    }
}

impl Drop for BusyProcesses {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Such a connection was reset: a client knows that its earlier one has ended before the gateway is done with it.
#[test]
fn who_comes_while_another_leaves_gets_its_place() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("mqtt.connections_max", 1).start();
    let key = create(&gateway, json!({}));
    let connect = Connect::with_key(V5, &key);
    let let_in = |mut wire: Wire| {
        wire.send(&connect.packet());
        matches!(wire.next(), Next::Packet(frame) if frame.kind() == CONNACK && frame.reason() == 0)
            .then_some(wire)
    };
    // On a machine that stands still for long, a place may come too late; not each time.
    let is_let_in = (0..5).any(|_| {
        let mut earlier = wait_for("a place", || let_in(Wire::open(gateway.mqtt)));
        let next = Wire::open(gateway.mqtt);
        // By the answer, the next one has been accepted.
        earlier.send(&PINGREQ);
        earlier.packet(PINGRESP);
        earlier.send(&GOODBYE);
        drop(earlier);
        let_in(next).is_some()
    });
    assert!(is_let_in);
}

/// A client that publishes, says goodbye, closes and connects again with the same identifier.
fn come_and_go(scene: &LeavingStage, carrier: &str, version: Version, rounds: usize, first: usize) {
    for n in first..first + rounds {
        let mut wire = scene.open(carrier);
        wire.let_in(&scene.mortal(version));
        wire.send(&[&publish_zero(n, version)[..], &GOODBYE].concat());
    }
}

#[test]
fn who_says_goodbye_and_connects_again_has_lost_nothing_and_no_will_is_published() {
    let scene = LeavingStage::new();
    let mut first = 0;
    for carrier in ["tcp", "tls", "ws"] {
        for version in VERSIONS {
            come_and_go(&scene, carrier, version, rounds(), first);
            first += rounds();
        }
    }
    scene.open("tcp").let_in(&Connect { will: None, ..scene.mortal(V5) });
    let (numbers, wills) = scene.kept();
    assert_eq!((numbers.len(), wills), (first, 0));
    assert!(numbers.is_sorted(), "in their order");
    let refused =
        scene.gateway.metric("headgate_refused_total{transport=\"mqtt\",cause=\"shared_client_id\"}");
    assert_eq!(refused, 0.0, "those are no two devices");
}

#[test]
fn on_a_busy_machine_neither() {
    let scene = LeavingStage::new();
    let _spinning = BusyProcesses::begin(3);
    come_and_go(&scene, "tcp", V311, rounds(), 0);
    scene.open("tcp").let_in(&Connect { will: None, ..scene.mortal(V5) });
    let (numbers, wills) = scene.kept();
    assert_eq!((numbers, wills), ((0..rounds()).collect(), 0));
}

#[test]
fn who_does_not_wait_for_an_answer_is_heard_all_the_same() {
    let scene = LeavingStage::new();
    for n in 0..rounds() {
        let hello = scene.mortal(V311).packet();
        scene.open("tcp").send(&[&hello[..], &number(n), &GOODBYE].concat());
    }
    // Which of them is first, nobody knows who does not wait.
    let mut numbers = wait_for("all of them", || Some(scene.kept().0).filter(|all| all.len() == rounds()));
    numbers.sort_unstable();
    assert_eq!((numbers, scene.kept().1), ((0..rounds()).collect(), 0));
}

#[test]
fn who_closes_one_direction_only_has_left_too() {
    let scene = LeavingStage::new();
    for n in 0..rounds() {
        let mut wire = scene.open("tcp");
        wire.let_in(&scene.mortal(V5));
        wire.send(&[&publish_zero(n, V5)[..], &GOODBYE].concat());
        wire.finish();
        // It stays half open.
        std::mem::forget(wire);
    }
    scene.open("tcp").let_in(&Connect { will: None, ..scene.mortal(V5) });
    let (numbers, wills) = scene.kept();
    assert_eq!((numbers, wills), ((0..rounds()).collect(), 0));
}

#[test]
fn a_connection_that_is_taken_over_is_answered_first() {
    let scene = LeavingStage::new();
    for (version, carrier) in [(V5, "tcp"), (V311, "tcp"), (V5, "ws"), (V311, "tls")] {
        let hello = Connect { will: None, ..scene.mortal(version) };
        let mut old = scene.open(carrier);
        old.let_in(&hello);
        let all: Vec<u8> = (1..=200).flat_map(|n| publish(version, n, "q1", b"x")).collect();
        old.send(&all);
        let mut new = scene.open(carrier);
        new.let_in(&hello);
        for n in 1..=200 {
            let puback = old.packet(PUBACK);
            assert_eq!((puback.packet_id(), puback.reason()), (n, 0));
        }
        if version == V5 {
            old.disconnected(0x8E);
        } else {
            old.closed();
        }
        new.send(&GOODBYE);
        new.closed();
    }
}

#[test]
fn an_expiry_in_a_goodbye_holds_for_the_next_connection() {
    let scene = LeavingStage::new();
    for _ in 0..rounds() {
        let hour = four_bytes(SESSION_EXPIRY, 3600);
        let hello = Connect { clean: false, properties: hour, ..scene.mortal(V5) };
        let mut wire = scene.open("tcp");
        let connack = wire.let_in(&hello);
        assert_eq!(connack.body[0], 0, "there is no session any more");
        let end = [&[0, 5][..], &four_bytes(SESSION_EXPIRY, 0)].concat();
        wire.send(&[publish_zero(1, V5), frame(0xE0, &end)].concat());
    }
}

#[test]
fn who_leaves_without_reading_what_it_was_sent_has_left_all_the_same() {
    let scene = LeavingStage::new();
    let mut publisher = Wire::login(scene.gateway.mqtt, V311, &scene.key);
    for n in 0..rounds() {
        let mut wire = scene.open("tcp");
        wire.let_in(&scene.mortal(V311));
        wire.send(&subscribe(V311, 1, &["news"]));
        wire.packet(SUBACK);
        assert_eq!(publisher.publish(V311, 1, "news", b"1"), 0);
        // What it was sent is unread when it closes: the gateway's next write is answered by a reset.
        wire.send(&[&number(n)[..], &GOODBYE].concat());
        drop(wire);
        assert_eq!(publisher.publish(V311, 1, "news", b"2"), 0);
    }
    scene.open("tcp").let_in(&Connect { will: None, ..scene.mortal(V5) });
    let (numbers, wills) = scene.kept();
    assert_eq!((numbers, wills), ((0..rounds()).collect(), 0));
}

#[test]
fn a_goodbye_counts_although_a_message_before_it_is_held_back() {
    let scene = LeavingStage::with(json!({ "messages_per_s": { "max": 1, "burst": 1 } }));
    for version in VERSIONS {
        let mut wire = scene.open("tcp");
        wire.let_in(&scene.mortal(version));
        let all: Vec<u8> = (1..=40).flat_map(|n| publish(version, n, "held", b"1")).collect();
        wire.send(&[&all[..], &GOODBYE].concat());
        wire.packet(PUBACK);
        let mut next = scene.open("tcp");
        next.let_in(&Connect { will: None, ..scene.mortal(version) });
    }
    assert_eq!(scene.kept().1, 0);
}

/// Its will was published.
#[test]
fn a_goodbye_counts_although_a_message_before_it_may_only_be_taken_later() {
    let dir = scratch();
    let setup = Setup::on(dir.path()).set("intake.exchanges_per_datasource_max", 1);
    let gateway = setup.start();
    let key = create(&gateway, json!({}));
    let message = |packet_id: u16| Message::new("a", "1").at(2, packet_id);
    let mut other = Wire::connect(gateway.mqtt, &willing(&key, "other", 0, 3600)).0;
    other.send(&message(1).packet(V5));
    assert_eq!(other.packet(PUBREC).reason(), 0);
    // The goodbye is read with the message, or waits behind a request that waits for the message's answer.
    for between in [Vec::new(), subscribe_with(V5, 2, &[("#", 1)], &[])] {
        let mut wire = Wire::connect(gateway.mqtt, &willing(&key, "leaving", 0, 3600)).0;
        wire.send(&[message(2).packet(V5), between, GOODBYE.to_vec()].concat());
        wire.disconnected(QUOTA_EXCEEDED);
        // It is let in when the connection before it has left.
        let mut next =
            Wire::connect(gateway.mqtt, &Connect { will: None, ..willing(&key, "leaving", 0, 0) }).0;
        next.send(&GOODBYE);
        next.closed();
    }
    drop(other);
    assert_eq!(KilledGateway::wills(&gateway, 1), ["other"]);
}

#[test]
fn a_drain_takes_what_has_arrived() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let key = create(&gateway, json!({}));
    let wires = (0..rounds()).map(|n| {
        let hello = Connect { client_id: format!("mortal-{n}"), ..mortal(&key, V311) };
        Wire::connect(gateway.mqtt, &hello).0
    });
    let mut wires: Vec<Wire> = wires.collect();
    for (n, wire) in wires.iter_mut().enumerate() {
        wire.send(&[&number(n)[..], &publish(V311, 1, "q1", b"1"), &GOODBYE].concat());
    }
    gateway.stop();
    for wire in &mut wires {
        wire.packet(PUBACK);
        wire.closed();
    }
    let gateway = Gateway::start(dir.path());
    let (mut numbers, wills) = kept(&gateway);
    numbers.sort_unstable();
    assert_eq!((numbers, wills), ((0..rounds()).collect(), 0));
}

#[test]
fn two_devices_with_one_client_identifier_are_named() {
    let scene = LeavingStage::new();
    let mut devices: Vec<Wire> = Vec::new();
    for _ in 0..8 {
        let mut device = scene.open("tcp");
        device.let_in(&Connect { will: None, ..scene.mortal(V5) });
        if let Some(mut other) = devices.pop() {
            other.disconnected(0x8E);
        }
        devices.push(device);
    }
    let refusals = wait_for("the takeovers to be told", || {
        let refusals =
            scene.gateway.get("/v1/refusals?cause=shared_client_id", &scene.gateway.admin_key()).json();
        Some(refusals["refusals"][0].clone()).filter(|refusal| refusal.is_object())
    });
    assert_eq!((&refusals["client"], &refusals["datasource"]), (&json!("mortal"), &json!("press-4")));
    assert!(refusals["advice"].as_str().is_some_and(|advice| advice.contains("identifier of its own")));
    assert!(refusals["detail"].as_str().is_some_and(|words| words.contains("127.0.0.1")), "{refusals}");
    let metric = "headgate_refused_total{transport=\"mqtt\",cause=\"shared_client_id\"}";
    assert!(scene.gateway.metric(metric) >= 1.0);
    scene.gateway.says("have pushed each other out 5 times");
}

#[test]
fn a_ping_is_answered_while_a_rate_holds_back() {
    let scene = LeavingStage::with(json!({ "messages_per_s": { "max": 1, "burst": 1 } }));
    for (version, carrier) in [(V311, "tcp"), (V5, "tcp"), (V5, "ws"), (V5, "tls")] {
        let mut wire = scene.open(carrier);
        wire.let_in(&Connect { client_id: format!("{carrier}{}", version as u8), ..scene.mortal(version) });
        let all: Vec<u8> = (1..=20).flat_map(|n| publish(version, n, "held", b"1")).collect();
        wire.send(&all);
        wire.packet(PUBACK);
        let mut acked = 1;
        for _ in 0..2 {
            wire.send(&PINGREQ);
            loop {
                match wire.next() {
                    Next::Packet(frame) if frame.kind() == PINGRESP => break,
                    Next::Packet(frame) if frame.kind() == PUBACK => acked += 1,
                    other => panic!("{other:?}"),
                }
            }
        }
        assert!(acked < 10, "the rate holds: {acked}");
        wire.send(&GOODBYE);
    }
}

#[test]
fn what_was_published_before_a_subscribe_is_not_sent_live() {
    let scene = LeavingStage::new();
    for version in VERSIONS {
        for n in 0..rounds() {
            let mut wire = scene.open("tcp");
            wire.let_in(&Connect { client_id: format!("{n}"), will: None, ..scene.mortal(version) });
            let before = [publish(version, 0, "live", b"0"), publish(version, 1, "live", b"1")].concat();
            let after = publish(version, 2, "live", b"2");
            wire.send(&[&before[..], &subscribe(version, 1, &["live"]), &after].concat());
            let mut first = None;
            let mut acks = 0;
            while first.is_none() || acks < 2 {
                match wire.next() {
                    Next::Packet(frame) if frame.kind() == PUBACK => acks += 1,
                    Next::Packet(frame) if frame.kind() == SUBACK => {}
                    Next::Packet(frame) => first = Some(Message::read(version, &frame)),
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(first.map(|message| message.payload).as_deref(), Some(&b"2"[..]));
            wire.send(&GOODBYE);
            wire.closed();
        }
    }
}

#[test]
fn a_gateway_that_was_stopped_reads_before_it_judges_keep_alives() {
    let scene = LeavingStage::new();
    // More than the runtime hears of at once.
    let mut wires: Vec<Wire> = (0..1_500)
        .map(|n| {
            let client_id = format!("{n}");
            let hello = Connect { client_id, keep_alive: 2, will: None, ..scene.mortal(V311) };
            let mut wire = scene.open("tcp");
            wire.send(&hello.packet());
            wire
        })
        .collect();
    wires.iter_mut().for_each(|wire| _ = wire.packet(CONNACK));
    for wire in &mut wires {
        wire.send(&PINGREQ);
    }
    wires.iter_mut().for_each(|wire| _ = wire.packet(PINGRESP));
    signal(scene.gateway.pid(), libc::SIGSTOP);
    for wire in &mut wires {
        wire.send(&PINGREQ);
    }
    std::thread::sleep(Duration::from_secs(4));
    signal(scene.gateway.pid(), libc::SIGCONT);
    let mut is_answered =
        |wire: &mut Wire| matches!(wire.next(), Next::Packet(frame) if frame.kind() == PINGRESP);
    let answered = wires.iter_mut().map(&mut is_answered).filter(|answered| *answered);
    assert_eq!(answered.count(), 1_500);
}

#[test]
fn a_peer_that_is_gone_without_a_word_is_asked_for() {
    let scene = LeavingStage::new();
    for carrier in ["tcp", "tls", "ws"] {
        let mut wire = scene.open(carrier);
        wire.let_in(&Connect { client_id: carrier.to_owned(), ..scene.mortal(V5) });
        let local = wire.local_port();
        // The gateway's end of the connection: a timer of kind 2 asks for a peer that is silent.
        let timer = wait_for("a timer of the socket", || {
            let table = std::fs::read_to_string("/proc/net/tcp").expect("Linux");
            table.lines().find_map(|line| {
                let fields: Vec<&str> = line.split_whitespace().collect();
                let remote = fields.get(2)?.rsplit(':').next()?;
                let is_it = u16::from_str_radix(remote, 16).ok()? == local;
                fields.get(5).filter(|timer| is_it && timer.starts_with("02:")).map(|timer| timer.to_string())
            })
        });
        let ticks = u64::from_str_radix(timer.split(':').nth(1).expect("a time"), 16).expect("hexadecimal");
        assert!(ticks <= 60 * 100, "within a minute: {timer}");
    }
}

#[test]
fn a_connack_is_no_larger_than_the_client_takes() {
    let scene = LeavingStage::new();
    let key = [&[0x27][..], &[0, 0, 0]].concat();
    for most in 1..=40_u8 {
        for (client_id, keep_alive) in [("named", 10), ("", 10), ("named", 0), ("", 0)] {
            let properties = [&key[..], &[most]].concat();
            let hello = Connect {
                client_id: client_id.to_owned(),
                keep_alive,
                properties,
                will: None,
                ..scene.mortal(V5)
            };
            let mut wire = scene.open("tcp");
            wire.send(&hello.packet());
            let needed = 8 + if keep_alive == 0 { 3 } else { 0 } + if client_id.is_empty() { 32 } else { 0 };
            match wire.next() {
                Next::Packet(connack) => {
                    assert!(connack.body.len() + 2 <= usize::from(most), "{most}: {connack:02x?}");
                    let reason = if usize::from(most) < needed { 0x95 } else { 0 };
                    assert_eq!(connack.reason(), reason, "{most} {client_id:?} {keep_alive}");
                    assert_eq!(
                        connack.reason() == 0 && connack.text(0x12).is_none(),
                        reason == 0 && client_id == "named"
                    );
                }
                Next::Closed => assert!(most < 5, "{most}"),
                Next::Silent => panic!("no answer"),
            }
        }
    }
}

#[test]
fn a_will_that_can_never_be_taken_is_no_unavailable_server() {
    let scene = LeavingStage::with(json!({ "payload_bytes": { "max": 3, "policy": "reject" } }));
    let mut wire = scene.open("tcp");
    wire.send(&scene.mortal(V311).packet());
    let connack = wire.packet(CONNACK);
    assert_eq!(connack.body[1], 5, "not authorized: a client does not try for ever");
    wire.closed();
    let reserved = Connect { will: Some(("$SYS/x".to_owned(), Vec::new())), ..scene.mortal(V311) };
    let mut wire = scene.open("tcp");
    wire.send(&reserved.packet());
    assert_eq!(wire.packet(CONNACK).body[1], 5);
}

#[test]
fn a_connect_of_an_unknown_level_is_refused_in_its_own_form() {
    let scene = LeavingStage::new();
    for level in [6, 7, 0x7F] {
        for (version, first, code) in [(V311, 2, 1), (V5, 3, 0x84)] {
            let hello = scene.mortal(version);
            let mut wire = scene.open("tcp");
            wire.send(&hello.packet_with(b"MQTT", level, hello.flags()));
            let connack = wire.packet(CONNACK);
            assert!(connack.body.len() >= first && connack.body[1] == code, "{level}: {connack:02x?}");
            assert_eq!(version == V311, connack.body.len() == 2);
            wire.closed();
        }
    }
}

/// A gateway with wills that is killed, and started again.
struct KilledGateway {
    dir: tempfile::TempDir,
    key: String,
}

impl KilledGateway {
    fn with(clients: impl FnOnce(&Gateway, &str) -> Vec<Wire>) -> Self {
        let dir = scratch();
        let gateway = Gateway::start(dir.path());
        let key = create(&gateway, json!({}));
        let wires = clients(&gateway, &key);
        gateway.kill();
        drop(wires);
        Self { dir, key }
    }

    /// The topics of the wills in storage, once there are so many.
    fn wills(gateway: &Gateway, count: usize) -> Vec<String> {
        let topics = || {
            let records = gateway.records("press-4");
            let topics = records.iter().filter_map(|record| record["topic"].as_str()?.strip_prefix("will/"));
            let mut topics: Vec<String> = topics.map(str::to_owned).collect();
            topics.sort_unstable();
            topics
        };
        wait_for("the wills", || (topics().len() >= count).then_some(()));
        gateway.settle();
        topics()
    }
}

fn willing(key: &str, id: &str, delay: u32, expiry: u32) -> Connect {
    let will = Some((format!("will/{id}"), b"gone".to_vec()));
    Connect {
        client_id: id.to_owned(),
        clean: false,
        will,
        will_properties: four_bytes(WILL_DELAY, delay),
        properties: four_bytes(SESSION_EXPIRY, expiry),
        ..Connect::with_key(V5, key)
    }
}

#[test]
fn wills_of_clients_that_were_connected_when_the_gateway_was_killed_are_published_once() {
    let killed = KilledGateway::with(|gateway, key| {
        let mut wires: Vec<Wire> = (0..50)
            .map(|n| Wire::connect(gateway.mqtt, &willing(key, &format!("{n:02}"), 0, n % 2 * 3600)).0)
            .collect();
        // These have left before, with a goodbye and without one.
        for goodbye in [true, false] {
            let mut wire = Wire::connect(gateway.mqtt, &willing(key, "left", 0, 3600)).0;
            if goodbye {
                wire.send(&GOODBYE);
                wire.closed();
            }
        }
        KilledGateway::wills(gateway, 1);
        // This one waits for longer than its delay in the old run.
        Wire::connect(gateway.mqtt, &willing(key, "waits", 4, 3600));
        wires.push(Wire::connect(gateway.mqtt, &willing(key, "back", 3600, 3600)).0);
        wires
    });
    let expected: Vec<String> =
        (0..50).map(|n| format!("{n:02}")).chain(["left".to_owned(), "waits".to_owned()]).collect();
    let gateway = Gateway::start(killed.dir.path());
    let back = Wire::connect(gateway.mqtt, &Connect { will: None, ..willing(&killed.key, "back", 0, 3600) });
    assert_eq!(back.1.body[0], 1, "in time for its will");
    assert_eq!(KilledGateway::wills(&gateway, 52), expected);
    // Neither comes again: not after a stop, and not after another kill.
    gateway.stop();
    let gateway = Gateway::start(killed.dir.path());
    gateway.kill();
    let gateway = Gateway::start(killed.dir.path());
    assert_eq!(KilledGateway::wills(&gateway, 52), expected);
}

/// Such a will waited for the first second of the next run, and was dropped if its client was faster.
#[test]
fn a_will_that_is_due_is_published_whoever_is_back_at_once_after_a_kill() {
    const DELAY_S: u32 = 1;
    let mut ids: Vec<String> = (0..20).map(|n| format!("{n:02}")).collect();
    let killed = KilledGateway::with(|gateway, key| {
        let mut late = Wire::connect(gateway.mqtt, &willing(key, "late", DELAY_S, 3600)).0;
        late.send(&frame(0xE0, &[4, 0]));
        late.closed();
        // The store writes in order: what these have is behind the loss of that one.
        ids.iter().map(|id| Wire::connect(gateway.mqtt, &willing(key, id, 0, 3600)).0).collect()
    });
    ids.push("late".to_owned());
    // Its delay passes while no gateway runs.
    std::thread::sleep(Duration::from_secs(DELAY_S.into()));
    let gateway = Gateway::start(killed.dir.path());
    for id in &ids {
        let back = Connect { will: None, ..willing(&killed.key, id, 0, 3600) };
        assert_eq!(Wire::connect(gateway.mqtt, &back).1.body[0], 1, "its session is there");
    }
    assert_eq!(KilledGateway::wills(&gateway, ids.len()), ids);
}

#[test]
fn a_will_of_a_dead_key_or_of_a_datasource_that_was_made_again_is_never_published() {
    let all = scratch();
    let gateway = Gateway::start(all.path());
    let first = create(&gateway, json!({}));
    let everything = json!({ "scopes": ["ingest", "subscribe"] });
    let created = gateway.post("/v1/datasources/press-4/keys", &gateway.admin_key(), &everything).json();
    let second = created["key"]["secret"].as_str().expect("a key").to_owned();
    let created = gateway.post("/v1/datasources/*/keys", &gateway.admin_key(), &everything).json();
    let star = created["key"]["secret"].as_str().expect("a key").to_owned();
    gateway.create("other");
    let mut wires = vec![
        Wire::connect(gateway.mqtt, &willing(&first, "revoked", 30, 3600)).0,
        Wire::connect(gateway.mqtt, &willing(&second, "living", 0, 3600)).0,
    ];
    let will = Some(("other/will".to_owned(), b"gone".to_vec()));
    wires.push(Wire::connect(gateway.mqtt, &Connect { will, ..willing(&star, "star", 0, 0) }).0);
    // Its connection ends, and the will waits for its delay.
    let keys = gateway.get("/v1/datasources/press-4/keys", &gateway.admin_key()).json();
    let oldest = keys["keys"][0]["id"].as_str().expect("an id");
    let revoked = gateway.request(
        "DELETE",
        &format!("/v1/datasources/press-4/keys/{oldest}"),
        &gateway.admin_key(),
        &[],
        &[],
    );
    assert_eq!(revoked.status, 204, "{}", revoked.text());
    gateway.delete("other");
    gateway.create("other");
    gateway.kill();
    let gateway = Gateway::start(all.path());
    assert_eq!(KilledGateway::wills(&gateway, 1), ["living"]);
    assert_eq!(gateway.records("other"), Vec::<Value>::new());
}

/// It was dropped with its copy.
#[test]
fn a_will_that_is_held_back_for_too_long_is_published_later_by_this_run_or_the_next() {
    let dir = scratch();
    let setup = Setup::on(dir.path()).set("intake.hold_back_ms_max", 300);
    let gateway = setup.start();
    let key = create(&gateway, json!({ "messages_per_s": { "max": 1, "burst": 1 } }));
    let refused = "headgate_refused_total{transport=\"mqtt\",cause=\"limit_messages_per_s\"}";
    let lose = |gateway: &Gateway, ids: [&str; 3]| {
        let before = gateway.metric(refused);
        let wires = ids.map(|id| Wire::connect(gateway.mqtt, &willing(&key, id, 0, 3600)).0);
        drop(wires);
        wait_for("all to be gone, and one to be refused", || {
            let is_gone = gateway.metric("headgate_mqtt_connections") == 0.0;
            (is_gone && gateway.metric(refused) > before).then_some(())
        });
    };
    lose(&gateway, ["0", "1", "2"]);
    assert_eq!(KilledGateway::wills(&gateway, 3), ["0", "1", "2"]);
    lose(&gateway, ["3", "4", "5"]);
    gateway.stop();
    let gateway = setup.start();
    assert_eq!(KilledGateway::wills(&gateway, 6), ["0", "1", "2", "3", "4", "5"]);
}

/// It was tried again until the rate let it in, by the next run too.
#[test]
fn a_will_that_a_rate_rejects_is_gone() {
    const WILLS: u32 = 10;
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let key = create(&gateway, json!({ "messages_per_s": { "max": 1, "burst": 1, "policy": "reject" } }));
    let ids = (0..WILLS).map(|n| n.to_string());
    let wires: Vec<Wire> =
        ids.map(|id| Wire::connect(gateway.mqtt, &willing(&key, &id, 0, 3600)).0).collect();
    drop(wires);
    let refused =
        || gateway.metric("headgate_refused_total{transport=\"mqtt\",cause=\"limit_messages_per_s\"}");
    wait_for("each to be kept or refused", || {
        (gateway.records_in_log() + refused() >= f64::from(WILLS)).then_some(())
    });
    let (rejected, kept) = (refused(), gateway.records_in_log());
    assert!(rejected > 0.0 && rejected + kept <= f64::from(WILLS), "{rejected} and {kept}");
    gateway.stop();
    let gateway = Gateway::start(dir.path());
    gateway.settle();
    assert_eq!(gateway.records_in_log().to_string(), kept.to_string());
}

/// Those beyond 8 MiB were lost.
#[test]
fn no_will_is_lost_at_the_end_of_a_run_however_many_are_held_back() {
    const WILLS: u32 = 150;
    let dir = scratch();
    let setup = Setup::on(dir.path());
    let gateway = setup.clone().set("intake.hold_back_ms_max", 300).start();
    let key = create(&gateway, json!({ "messages_per_s": { "max": 10, "burst": 1 } }));
    let ids: Vec<String> = (0..WILLS).map(|n| format!("{n:03}")).collect();
    let connect = |id: &String| {
        // As large as a will may be, nearly.
        let will = Some((format!("will/{id}"), vec![b'x'; 65_000]));
        Wire::connect(gateway.mqtt, &Connect { will, ..willing(&key, id, 0, 3600) }).0
    };
    let wires: Vec<Wire> = ids.iter().map(connect).collect();
    gateway.stop();
    drop(wires);
    // Here each is held back until it is its turn.
    let gateway = setup.set("intake.hold_back_ms_max", 60_000).start();
    wait_for("the wills", || (gateway.records_in_log() >= f64::from(WILLS)).then_some(()));
    assert_eq!(KilledGateway::wills(&gateway, ids.len()), ids);
}

#[test]
fn a_will_that_waits_goes_on_waiting_when_its_client_is_not_let_in_again() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let key = create(&gateway, json!({ "connections": 1 }));
    let knock = |id: &str, delay: u32| {
        let mut wire = Wire::open(gateway.mqtt);
        wire.send(&willing(&key, id, delay, 3600).packet());
        let connack = wire.packet(CONNACK);
        (wire, connack.body[1])
    };
    drop(Wire::connect(gateway.mqtt, &willing(&key, "late", 2, 3600)));
    let (_other, code) =
        wait_for("its connection to end", || Some(knock("other", 3600)).filter(|(_, code)| *code == 0));
    assert_eq!(code, 0);
    assert_eq!(knock("late", 2).1, 0x97, "one connection too many");
    assert_eq!(KilledGateway::wills(&gateway, 1), ["late"]);
}

/// Its session was removed or ended, its will was published, and each attempt put off what was due.
#[test]
fn a_client_that_is_not_let_in_is_away_as_before() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let key = create(&gateway, json!({ "connections": 1 }));
    let knock = |hello: &Connect| {
        let mut wire = Wire::open(gateway.mqtt);
        wire.send(&hello.packet());
        let connack = wire.packet(CONNACK);
        (wire, connack.body[0], connack.body[1])
    };
    let let_in = |hello: &Connect| {
        wait_for("the place to be free", || Some(knock(hello)).filter(|(.., code)| *code == 0))
    };
    let stays = willing(&key, "stays", 3600, 3600);
    drop(let_in(&stays));
    drop(let_in(&willing(&key, "late", 3, 3600)));
    let (other, ..) = let_in(&willing(&key, "other", 3600, 3600));
    // The CONNECTs that would end a session, one of which would end it with the connection.
    for (clean, properties) in
        [(true, four_bytes(SESSION_EXPIRY, 3600)), (false, Vec::new()), (true, Vec::new())]
    {
        let hello = Connect { clean, properties, ..willing(&key, "stays", 3600, 3600) };
        assert_eq!(knock(&hello).2, 0x97, "one connection too many");
    }
    // Its will comes all the same, however often it knocks.
    let late = willing(&key, "late", 3, 3600);
    let came = || gateway.records("press-4").iter().any(|record| record["topic"] == "will/late");
    wait_for("the will of who knocks", || {
        assert_eq!(knock(&late).2, 0x97);
        came().then_some(())
    });
    drop(other);
    assert_eq!(let_in(&stays).1, 1, "its session is there");
    gateway.settle();
    assert_eq!(KilledGateway::wills(&gateway, 1), ["late"]);
}
