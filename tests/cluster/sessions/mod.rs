//! MQTT sessions in a cluster: a client is one client on all gateways. It comes to any of them, is closed
//! on the one where it was, and goes on where it was in the log.

mod bucket;
mod groups;

use std::time::Duration;

use headgate_bridge_nats::presence::PRESENCE_SILENCE_MAX;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::nats::{NatsServer, nats_py};
use crate::common::wire::{
    CONNACK, Connect, Message, Next, PINGREQ, PINGRESP, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL,
    SESSION_EXPIRY, SUBACK,
    Version::{self, V5, V311},
    WILL_DELAY, Wire, ack, four_bytes, publish, subscribe, subscribe_with,
};
use crate::common::{Gateway, Setup, scratch, signal, wait_for};

const SILENCE: Duration = Duration::from_millis(300);

/// A nats-server, what the gateways on it have in common, and their directories.
pub struct Cluster {
    nats: NatsServer,
    pub key: String,
    _dirs: [TempDir; 2],
}

impl Cluster {
    /// One with two gateways, and a key that may publish and subscribe.
    pub fn two() -> (Self, Gateway, Gateway) {
        // JetStream makes no stream that the disk has no room for.
        Self::two_that_retain(256 << 20)
    }

    /// As [`Cluster::two`], with a log of so many bytes.
    fn two_that_retain(bytes: u64) -> (Self, Gateway, Gateway) {
        let nats = NatsServer::start();
        let dirs = [scratch(), scratch()];
        let [a, b] = dirs.each_ref().map(|dir| {
            let servers = format!("[{:?}]", nats.url());
            let setup = Setup::on(dir.path()).set("log.backend", "jetstream").set("nats.servers", servers);
            setup.set("log.segment_bytes", 1 << 20).set("log.retention_bytes", bytes).start()
        });
        let body = json!({ "id": "press-4", "name": "press-4", "scopes": ["ingest", "subscribe"] });
        let created = a.post("/v1/datasources", &a.admin_key(), &body).json();
        let key = created["key"]["secret"].as_str().expect("a secret").to_owned();
        (Self { nats, key, _dirs: dirs }, a, b)
    }
}

/// Has JetStream send the stream no more to the gateway that came last, and tell it nothing.
fn cut_off_the_last(nats: &NatsServer, gateways: usize) {
    let body = "consumers = await js.consumers_info('headgate')\n\
                if len(consumers) < int(sys.argv[2]): sys.exit('not yet')\n\
                await js.delete_consumer('headgate', max(consumers, key=lambda c: c.created).name)";
    let cut_off = || nats_py(&nats.url(), body, &[&gateways.to_string()]).status.success().then_some(());
    wait_for("every gateway to be sent the stream", cut_off);
}

/// A client whose session stays.
fn staying(version: Version, key: &str, client_id: &str) -> Connect {
    let properties = if version == V5 { four_bytes(SESSION_EXPIRY, 3600) } else { Vec::new() };
    Connect { client_id: client_id.to_owned(), clean: false, properties, ..Connect::with_key(version, key) }
}

fn connected(gateway: &Gateway, connect: &Connect) -> (Wire, bool) {
    let (wire, connack) = Wire::connect(gateway.mqtt, connect);
    let present = connack.body[0] == 1;
    (wire, present)
}

fn subscribed(wire: &mut Wire, version: Version, filter: &str) {
    wire.send(&subscribe(version, 1, &[filter]));
    assert_eq!(wire.packet(SUBACK).codes(version), [1]);
}

/// Publishes a number, at QoS 1.
fn published(wire: &mut Wire, numbers: impl IntoIterator<Item = usize>) {
    for n in numbers {
        assert_eq!(wire.publish(V311, 1, "a", n.to_string().as_bytes()), 0);
    }
}

/// The next message's number, acknowledged.
fn received(wire: &mut Wire, version: Version) -> usize {
    let message = next_message(wire, version);
    wire.send(&ack(PUBACK, message.packet_id));
    number(&message)
}

fn next_message(wire: &mut Wire, version: Version) -> Message {
    Message::read(version, &wire.packet(PUBLISH))
}

fn number(message: &Message) -> usize {
    String::from_utf8_lossy(&message.payload).parse().expect("a number")
}

#[test]
fn a_client_that_comes_to_another_gateway_goes_on_there_and_is_closed_where_it_was() {
    let (cluster, a, b) = Cluster::two();
    let mut publisher = Wire::login(a.mqtt, V311, &cluster.key);
    for version in [V5, V311] {
        let client = staying(version, &cluster.key, &format!("c{}", version as u8));
        let (mut on_a, present) = connected(&a, &client);
        assert!(!present);
        subscribed(&mut on_a, version, "a");
        published(&mut publisher, 0..5);
        assert_eq!((0..5).map(|_| received(&mut on_a, version)).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        // One that stays unacknowledged comes again, as what it is.
        published(&mut publisher, [5]);
        let unacknowledged = next_message(&mut on_a, version);
        assert_eq!((number(&unacknowledged), unacknowledged.dup), (5, false));

        let (mut on_b, present) = connected(&b, &client);
        assert!(present, "the session is there");
        match version {
            V5 => drop(on_a.disconnected(0x8E)),
            V311 => on_a.closed(),
        }
        published(&mut publisher, 6..10);
        let again = next_message(&mut on_b, version);
        assert_eq!((number(&again), again.dup, again.packet_id), (5, true, unacknowledged.packet_id));
        on_b.send(&ack(PUBACK, again.packet_id));
        assert_eq!((6..10).map(|_| received(&mut on_b, version)).collect::<Vec<_>>(), [6, 7, 8, 9]);

        // What comes while it is away waits, wherever it comes back.
        on_b.send(&PINGREQ);
        on_b.packet(PINGRESP);
        drop(on_b);
        published(&mut publisher, 10..20);
        let (mut on_a, present) = connected(&a, &client);
        assert!(present);
        assert_eq!(
            (10..20).map(|_| received(&mut on_a, version)).collect::<Vec<_>>(),
            (10..20).collect::<Vec<_>>()
        );
        assert_eq!(on_a.next_within(SILENCE), Next::Silent);
    }
}

/// The client goes on where it was also if the gateway that it comes to has yet to hear of what it was given.
#[test]
fn a_session_that_comes_to_a_gateway_which_is_behind_waits_until_that_has_caught_up() {
    let (cluster, a, b) = Cluster::two();
    let client = staying(V5, &cluster.key, "c");
    let mut publisher = Wire::login(a.mqtt, V311, &cluster.key);
    let (mut on_a, _) = connected(&a, &client);
    subscribed(&mut on_a, V5, "a");
    cut_off_the_last(&cluster.nats, 2);
    published(&mut publisher, 0..5);
    assert_eq!((0..5).map(|_| received(&mut on_a, V5)).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    on_a.send(&PINGREQ);
    on_a.packet(PINGRESP);
    let (mut on_b, present) = connected(&b, &client);
    assert!(present);
    published(&mut publisher, 5..10);
    assert_eq!((5..10).map(|_| received(&mut on_b, V5)).collect::<Vec<_>>(), [5, 6, 7, 8, 9]);
    assert_eq!(on_b.next_within(SILENCE), Next::Silent);
}

#[test]
fn a_gateway_that_was_killed_leaves_its_sessions_to_the_others() {
    let (cluster, a, b) = Cluster::two();
    let mut publisher = Wire::login(b.mqtt, V311, &cluster.key);
    let client = staying(V5, &cluster.key, "c");
    let (mut on_a, _) = connected(&a, &client);
    subscribed(&mut on_a, V5, "a");
    published(&mut publisher, 0..50);
    for n in 0..50 {
        assert_eq!(received(&mut on_a, V5), n);
    }
    // Its cursor is written once a second, and where it is cannot be seen from outside.
    std::thread::sleep(Duration::from_millis(2_500));
    published(&mut publisher, 50..60);
    for n in 50..55 {
        assert_eq!(received(&mut on_a, V5), n);
    }
    a.kill();
    let (mut on_b, present) = connected(&b, &client);
    assert!(present);
    let first = received(&mut on_b, V5);
    assert!((50..=55).contains(&first), "from the last acknowledgement on, or a second before: {first}");
    for n in first + 1..60 {
        assert_eq!(received(&mut on_b, V5), n);
    }
    assert_eq!(on_b.next_within(SILENCE), Next::Silent);
}

#[test]
fn what_was_in_flight_at_a_gateway_that_was_killed_is_in_flight_at_another() {
    let (cluster, a, b) = Cluster::two();
    let mut publisher = Wire::login(b.mqtt, V311, &cluster.key);
    let client = staying(V5, &cluster.key, "c");
    let (mut on_a, _) = connected(&a, &client);
    on_a.send(&subscribe_with(V5, 1, &[("a", 1), ("b", 2)], &[]));
    assert_eq!(on_a.packet(SUBACK).codes(V5), [1, 2]);
    published(&mut publisher, 0..10);
    let messages: Vec<Message> = (0..10).map(|_| next_message(&mut on_a, V5)).collect();
    for message in messages.iter().filter(|message| ![0, 4].contains(&number(message))) {
        on_a.send(&ack(PUBACK, message.packet_id));
    }
    // What is in flight is written once a second, and where it is cannot be seen from outside.
    std::thread::sleep(Duration::from_millis(2_500));
    let mut exactly_once = Vec::new();
    for packet_id in [7, 8] {
        publisher.send(&Message::new("b", "x").at(2, packet_id).packet(V311));
        publisher.packet(PUBREC);
        publisher.send(&ack(PUBREL, packet_id));
        publisher.packet(PUBCOMP);
        exactly_once.push(next_message(&mut on_a, V5).packet_id);
    }
    on_a.send(&ack(PUBREC, exactly_once[0]));
    assert_eq!(on_a.packet(PUBREL).packet_id(), exactly_once[0]);
    a.kill();
    let (mut on_b, present) = connected(&b, &client);
    assert!(present);
    assert_eq!(on_b.packet(PUBREL).packet_id(), exactly_once[0]);
    for expected in [messages[0].packet_id, messages[4].packet_id, exactly_once[1]] {
        let message = next_message(&mut on_b, V5);
        assert_eq!((message.packet_id, message.dup), (expected, true));
    }
    assert_eq!(on_b.next_within(SILENCE), Next::Silent);
}

#[test]
fn a_clean_start_on_another_gateway_ends_the_session_and_the_connection() {
    let (cluster, a, b) = Cluster::two();
    let mut publisher = Wire::login(a.mqtt, V311, &cluster.key);
    let client = staying(V5, &cluster.key, "c");
    let clean = Connect { clean: true, properties: Vec::new(), ..client.clone() };
    // Whether the client is there or away.
    for stays in [true, false] {
        let (mut on_a, present) = connected(&a, &client);
        assert!(!present);
        subscribed(&mut on_a, V5, "a");
        if !stays {
            drop(on_a);
            on_a = Wire::open(a.mqtt);
        }
        let (mut on_b, present) = connected(&b, &clean);
        assert!(!present);
        if stays {
            on_a.disconnected(0x8E);
        }
        published(&mut publisher, [1]);
        assert_eq!(on_b.next_within(SILENCE), Next::Silent, "nothing is subscribed to");
        let (_, present) = connected(&a, &client);
        assert!(!present, "nor kept");
        on_b.disconnected(0x8E);
        let (_, present) = connected(&b, &clean);
        assert!(!present);
    }
    // Sessions that end with their connection are taken over too.
    let (mut on_a, _) = connected(&a, &clean);
    let (_on_b, _) = connected(&b, &clean);
    on_a.disconnected(0x8E);
}

#[test]
fn of_connections_to_two_gateways_at_the_same_moment_one_stays() {
    let (cluster, a, b) = Cluster::two();
    let client = staying(V5, &cluster.key, "c");
    for _ in 0..20 {
        let mut wires = [&a, &b, &a, &b].map(|gateway| Wire::open(gateway.mqtt));
        for wire in &mut wires {
            wire.send(&client.packet());
        }
        // Whoever is refused, or taken over, is closed.
        let heard = wires.each_mut().map(|wire| {
            let mut heard = Vec::new();
            while heard.last().is_none_or(|next| matches!(next, Next::Packet(_))) {
                heard.push(wire.next_within(SILENCE));
            }
            heard
        });
        let open = heard.iter().filter(|heard| heard.last() == Some(&Next::Silent)).count();
        assert_eq!(open, 1, "{heard:?}");
    }
}

#[test]
fn a_message_of_qos_2_is_kept_once_when_its_exchange_ends_on_another_gateway() {
    let (cluster, a, b) = Cluster::two();
    let (mut subscriber, _) = connected(&b, &Connect::with_key(V5, &cluster.key));
    subscribed(&mut subscriber, V5, "a");
    let client = staying(V5, &cluster.key, "c");
    let (mut on_a, _) = connected(&a, &client);
    let message = Message::new("a", "1").at(2, 7);
    on_a.send(&message.packet(V5));
    assert_eq!(on_a.packet(PUBREC).reason(), 0);
    let (mut on_b, present) = connected(&b, &client);
    assert!(present);
    // As if the answer had been lost.
    on_b.send(&message.clone().again().packet(V5));
    assert_eq!(on_b.packet(PUBREC).reason(), 0);
    on_b.send(&ack(PUBREL, 7));
    assert_eq!(on_b.packet(PUBCOMP).packet_id(), 7);
    // The same identifier again is another message, also elsewhere.
    let (mut on_a, _) = connected(&a, &client);
    on_a.send(&Message::new("a", "2").at(2, 7).packet(V5));
    assert_eq!(on_a.packet(PUBREC).reason(), 0);
    on_a.send(&ack(PUBREL, 7));
    on_a.packet(PUBCOMP);
    assert_eq!((received(&mut subscriber, V5), received(&mut subscriber, V5)), (1, 2));
    assert_eq!(subscriber.next_within(SILENCE), Next::Silent);
}

#[test]
fn a_hundred_takeovers_under_load_leave_out_nothing() {
    const MESSAGES: usize = 5_000;
    let (cluster, a, b) = Cluster::two();
    let client = staying(V5, &cluster.key, "c");
    let (mut wire, _) = connected(&a, &client);
    subscribed(&mut wire, V5, "a");
    let publisher = std::thread::spawn({
        let (addr, key) = (b.mqtt, cluster.key.clone());
        move || {
            let mut publisher = Wire::login(addr, V311, &key);
            for n in 0..MESSAGES {
                published(&mut publisher, [n]);
            }
        }
    });
    const TURN: usize = MESSAGES / 120;
    let (mut next, mut takeovers, mut again) = (0, 0, 0);
    while next < MESSAGES {
        for turn in 0..TURN {
            if next == MESSAGES {
                break;
            }
            let message = next_message(&mut wire, V5);
            let n = number(&message);
            assert!(n <= next, "{n} came after {next}: some are missing");
            again += usize::from(n < next);
            next = next.max(n + 1);
            // The last ones of a turn stay unacknowledged.
            if turn + 3 < TURN {
                wire.send(&ack(PUBACK, message.packet_id));
            }
        }
        if takeovers < 100 {
            takeovers += 1;
            let present;
            (wire, present) = connected([&a, &b][takeovers % 2], &client);
            assert!(present);
        }
    }
    // What the client has acknowledged just before may not have been read.
    assert!(again <= 100 * TURN, "{again} came again");
    publisher.join().expect("all are published");
    assert_eq!(takeovers, 100);
}

#[test]
fn a_will_that_waits_is_dropped_when_the_client_is_back_elsewhere_and_sent_when_its_session_ends() {
    let (cluster, a, b) = Cluster::two();
    let (mut subscriber, _) = connected(&b, &Connect::with_key(V5, &cluster.key));
    subscribed(&mut subscriber, V5, "will");
    let plain = staying(V5, &cluster.key, "c");
    let with_will = Connect {
        will: Some(("will".to_owned(), b"1".to_vec())),
        will_properties: four_bytes(WILL_DELAY, 600),
        ..plain.clone()
    };
    let (on_a, _) = connected(&a, &with_will);
    drop(on_a);
    let (on_b, present) = connected(&b, &with_will);
    assert!(present);
    assert_eq!(subscriber.next_within(SILENCE), Next::Silent);
    drop(on_b);
    let (_on_a, present) = connected(&a, &Connect { clean: true, ..plain });
    assert!(!present);
    assert_eq!(received(&mut subscriber, V5), 1);
}

#[test]
fn while_nats_is_away_a_client_is_told_to_come_again_and_nothing_is_forgotten() {
    let (mut cluster, a, b) = Cluster::two();
    let client = staying(V5, &cluster.key, "c");
    let (mut on_a, _) = connected(&a, &client);
    subscribed(&mut on_a, V5, "a");
    cluster.nats.kill();
    let mut wire = Wire::open(b.mqtt);
    wire.send(&client.packet());
    let refused = wire.packet(CONNACK);
    assert_eq!(refused.reason(), 0x88, "{refused:?}");
    cluster.nats.restart();
    let (mut on_b, present) = wait_for("to be let in", || {
        let mut wire = Wire::open(b.mqtt);
        wire.send(&client.packet());
        let connack = wire.packet(CONNACK);
        (connack.reason() == 0).then(|| (wire, connack.body[0] == 1))
    });
    assert!(present);
    on_a.disconnected(0x8E);
    let mut publisher = Wire::login(a.mqtt, V311, &cluster.key);
    published(&mut publisher, [1]);
    assert_eq!(received(&mut on_b, V5), 1);
}

#[test]
fn a_gateway_that_could_not_be_asked_closes_the_connection_when_it_can() {
    let (cluster, a, b) = Cluster::two();
    let mut publisher = Wire::login(b.mqtt, V311, &cluster.key);
    let client = staying(V5, &cluster.key, "c");
    let (mut on_a, _) = connected(&a, &client);
    subscribed(&mut on_a, V5, "a");
    signal(a.pid(), libc::SIGSTOP);
    let (mut on_b, present) = connected(&b, &client);
    assert!(present);
    published(&mut publisher, 0..10);
    for n in 0..10 {
        assert_eq!(received(&mut on_b, V5), n);
    }
    // Until the others do not even know it any more: that is a time without a word, and has to pass.
    std::thread::sleep(PRESENCE_SILENCE_MAX + Duration::from_millis(200));
    signal(a.pid(), libc::SIGCONT);
    let taken_over = wait_for("the old connection to end", || match on_a.next() {
        Next::Packet(frame) if frame.kind() == PUBLISH => None,
        other => Some(other),
    });
    assert!(matches!(&taken_over, Next::Packet(frame) if frame.reason() == 0x8E), "{taken_over:?}");
    published(&mut publisher, [10]);
    assert_eq!(received(&mut on_b, V5), 10);
    drop(on_b);
    let (mut on_a, present) = connected(&a, &client);
    assert!(present);
    published(&mut publisher, [11]);
    let last = (0..12).map(|_| received(&mut on_a, V5)).find(|n| *n == 11);
    assert_eq!(last, Some(11));
}

#[test]
fn a_gateway_that_is_shut_down_leaves_its_sessions_where_they_were() {
    let (cluster, a, b) = Cluster::two();
    let mut publisher = Wire::login(b.mqtt, V311, &cluster.key);
    let client = staying(V5, &cluster.key, "c");
    let (mut on_a, _) = connected(&a, &client);
    subscribed(&mut on_a, V5, "a");
    published(&mut publisher, 0..10);
    for n in 0..10 {
        assert_eq!(received(&mut on_a, V5), n);
    }
    on_a.send(&PINGREQ);
    on_a.packet(PINGRESP);
    a.stop();
    on_a.disconnected(0x8B);
    published(&mut publisher, [10]);
    let (mut on_b, present) = connected(&b, &client);
    assert!(present);
    assert_eq!(received(&mut on_b, V5), 10);
    assert_eq!(on_b.next_within(SILENCE), Next::Silent);
}

/// What storage has of the datasource. The first gateway has the admin key.
fn stored(gateway: &Gateway, admin: &str) -> Vec<Value> {
    let answer = gateway.get("/v1/datasources/press-4/records?limit=1000", admin).json();
    answer["records"].as_array().cloned().unwrap_or_default()
}

/// The topics of the wills in storage, sorted.
fn wills(gateway: &Gateway, admin: &str) -> Vec<String> {
    let records = stored(gateway, admin);
    let topics = records.iter().filter_map(|record| record["topic"].as_str()?.strip_prefix("will/"));
    let mut topics: Vec<String> = topics.map(str::to_owned).collect();
    topics.sort_unstable();
    topics
}

fn willing(key: &str, id: &str, delay: u32, expiry: u32) -> Connect {
    let will_properties = four_bytes(WILL_DELAY, delay);
    let properties = four_bytes(SESSION_EXPIRY, expiry);
    let will = Some((format!("will/{id}"), b"gone".to_vec()));
    Connect { will, will_properties, properties, ..staying(V5, key, id) }
}

#[test]
fn what_a_client_has_sent_before_it_comes_to_another_gateway_counts() {
    const ROUNDS: usize = 40;
    let (cluster, a, b) = Cluster::two();
    let admin = a.admin_key();
    for n in 0..ROUNDS {
        let gateway = [&a, &b][n % 2];
        let (mut wire, present) = connected(gateway, &willing(&cluster.key, "wanders", 0, 3600));
        assert!(!present, "the goodbye has ended the session");
        let message = publish(V5, 0, "n", n.to_string().as_bytes());
        let goodbye = [&[0xE0, 7, 0, 5][..], &four_bytes(SESSION_EXPIRY, 0)].concat();
        wire.send(&[message, goodbye].concat());
    }
    connected(&a, &Connect { will: None, ..willing(&cluster.key, "wanders", 0, 0) });
    let numbers: Vec<usize> = wait_for("what was published", || {
        let records = stored(&a, &admin);
        let numbers = records.iter().filter(|record| record["topic"] == "n");
        let numbers = numbers.map(|record| record["payload"].to_string().parse().expect("a number"));
        Some(numbers.collect::<Vec<usize>>()).filter(|numbers| numbers.len() >= ROUNDS)
    });
    assert_eq!(numbers, (0..ROUNDS).collect::<Vec<_>>());
    assert_eq!(wills(&a, &admin), Vec::<String>::new());
}

#[test]
fn wills_of_a_gateway_that_is_killed_are_published_by_another_once() {
    let (cluster, a, b) = Cluster::two();
    let admin = a.admin_key();
    let mut wires: Vec<Wire> = (0..20)
        .map(|n| connected(&a, &willing(&cluster.key, &format!("{n:02}"), 0, n % 2 * 3600)).0)
        .collect();
    let (mut left, _) = connected(&a, &willing(&cluster.key, "left", 0, 3600));
    left.send(&[0xE0, 0]);
    left.closed();
    wires.push(connected(&a, &willing(&cluster.key, "waits", 12, 3600)).0);
    wires.push(connected(&a, &willing(&cluster.key, "back", 12, 3600)).0);
    a.kill();
    let (_back, present) = connected(&b, &Connect { will: None, ..willing(&cluster.key, "back", 0, 3600) });
    assert!(present);
    let at_once: Vec<String> = (0..20).map(|n| format!("{n:02}")).collect();
    wait_for("the wills", || (wills(&b, &admin).len() >= 20).then_some(()));
    assert_eq!(wills(&b, &admin), at_once, "the others wait");
    wait_for("the will that waits", || (wills(&b, &admin).len() >= 21).then_some(()));
    let all: Vec<String> = at_once.into_iter().chain(["waits".to_owned()]).collect();
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(wills(&b, &admin), all, "the other one is back in time");
}
