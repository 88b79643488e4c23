//! The memory of a gateway at its defaults, whatever is sent to it over MQTT, and what another tenant notices.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::common::memory::Bystander;
use crate::common::wire::{
    Connect, Next, PINGREQ, PUBACK, TOPIC_ALIAS, Version, Wire, frame, prefixed, publish, publish_with,
    subscribe, two_bytes, varint,
};
use crate::common::{Gateway, PATIENCE, Setup, scratch, wait_for};
use Version::V5;

fn longest_topic() -> String {
    "x".repeat(1024)
}

/// A connection with a key, whose writes fail when the gateway does not read for long.
fn open(addr: SocketAddr, connect: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(addr).expect("connects");
    stream.set_write_timeout(Some(Duration::from_millis(500))).expect("set");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let _ = stream.write_all(connect);
    stream
}

fn let_in(addr: SocketAddr, connect: &Connect) -> TcpStream {
    let mut stream = open(addr, &connect.packet());
    let mut connack = [0; 2];
    stream.read_exact(&mut connack).expect("a CONNACK");
    let mut rest = vec![0; usize::from(connack[1])];
    stream.read_exact(&mut rest).expect("all of it");
    stream
}

#[test]
fn eight_bytes_under_an_alias_of_a_kilobyte_are_bounded() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let bystander = Bystander::start(&gateway);
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| {
                let mut stream = let_in(gateway.mqtt, &Connect::with_key(V5, &source.key));
                let alias = two_bytes(TOPIC_ALIAS, 1);
                stream.write_all(&publish_with(V5, 0, longest_topic(), &alias, b"")).expect("sent");
                let short = publish_with(V5, 0, "", &alias, b"");
                assert_eq!(short.len(), 8);
                let read = short.repeat(8_000);
                // Nobody is cut off: what the gateway does not read waits here.
                (0..8).for_each(|_| {
                    let _ = stream.write_all(&read);
                });
            });
            scope.spawn(|| {
                // QoS 2: each message is an exchange of its own.
                let mut stream = let_in(gateway.mqtt, &Connect::with_key(V5, &source.key));
                let alias = two_bytes(TOPIC_ALIAS, 1);
                let publish = |id: u16, topic: &str| {
                    let mut body = prefixed(topic);
                    body.extend_from_slice(&id.to_be_bytes());
                    body.extend_from_slice(&varint(alias.len()));
                    body.extend_from_slice(&alias);
                    frame(0x34, &body)
                };
                let first = publish(1, &longest_topic());
                let rest: Vec<u8> = (2..1_024).flat_map(|id| publish(id, "")).collect();
                let _ = stream.write_all(&first).and_then(|()| stream.write_all(&rest));
            });
        }
    });
    bystander.assert_undisturbed("8-byte packets under topic aliases");
}

#[test]
fn strangers_with_half_a_connect_are_bounded() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let bystander = Bystander::start(&gateway);
    let connect = Connect::with_key(V5, &"k".repeat(60_000)).packet();
    let mut large = vec![0x10];
    large.extend_from_slice(&varint(190_000));
    large.extend_from_slice(&connect[4..]);
    large.resize(180_000, b'x');
    let crowd: Vec<TcpStream> = (0..3_000).map(|_| open_at_once(gateway.mqtt, &large)).collect();
    std::thread::sleep(Duration::from_secs(1));
    bystander.assert_undisturbed("3,000 strangers with most of a CONNECT of 190 KB");
    drop(crowd);
}

/// A connection whose first write takes what the kernel takes, and waits for nothing.
fn open_at_once(addr: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(addr).expect("connects");
    stream.set_nonblocking(true).expect("set");
    let _ = stream.write(bytes);
    stream
}

#[test]
fn half_packets_of_a_megabyte_are_bounded_and_whole_ones_go_on() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let bystander = Bystander::start(&gateway);
    let packet = publish(V5, 1, "spindle", &vec![b'x'; 1 << 20]);
    let connect = Connect::with_key(V5, &source.key);
    let half: Vec<TcpStream> = (0..200)
        .map(|_| {
            let mut stream = let_in(gateway.mqtt, &connect);
            stream.set_nonblocking(true).expect("set");
            // As much as the gateway reads and the kernel takes.
            let mut sent = 0;
            for _ in 0..20 {
                match stream.write(&packet[sent..packet.len() - 1]) {
                    Ok(n) => sent += n,
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
            stream
        })
        .collect();
    bystander.assert_undisturbed("200 half packets of 1 MiB under one key");
    drop(half);
    // Every message that is whole is acknowledged, however many come at once.
    std::thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| {
                let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
                wire.send(&packet);
                let ack = match wire.next_within(3 * PATIENCE) {
                    Next::Packet(ack) => ack,
                    other => panic!("no PUBACK but {other:?}"),
                };
                assert_eq!((ack.kind(), ack.reason()), (PUBACK, 0));
            });
        }
    });
}

#[test]
fn wills_and_aliases_that_connections_keep_are_bounded() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let bystander = Bystander::start(&gateway);
    let mut with_will = Connect::with_key(V5, &source.key);
    with_will.will = Some(("last/words".into(), vec![b'w'; 60_000]));
    let packet = with_will.packet();
    let crowd: Vec<TcpStream> = (0..3_000).map(|_| open(gateway.mqtt, &packet)).collect();
    std::thread::sleep(Duration::from_secs(1));
    bystander.assert_undisturbed("3,000 wills of 60 KB under one key");
    drop(crowd);
}

#[test]
fn subscribers_that_do_not_read_are_bounded() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let answer = gateway.post(
        "/v1/datasources/press-4/keys",
        &gateway.admin_key(),
        &serde_json::json!({ "label": "reader", "scopes": ["subscribe"] }),
    );
    let reader = answer.json()["key"]["secret"].as_str().expect("a secret").to_owned();
    let bystander = Bystander::start(&gateway);
    let connect = Connect::with_key(V5, &reader);
    let deaf: Vec<TcpStream> = (0..300)
        .map(|_| {
            let mut stream = let_in(gateway.mqtt, &connect);
            stream.write_all(&subscribe(V5, 1, &["#"])).expect("sent");
            stream
        })
        .collect();
    let mut wire = Wire::login(gateway.mqtt, V5, &source.key);
    for id in 1..=40 {
        assert_eq!(wire.publish(V5, id, "spindle", &[b'x'; 900_000]), 0);
    }
    bystander.assert_undisturbed("300 subscribers that do not read");
    drop(deaf);
}

#[test]
fn who_holds_only_topic_aliases_does_not_hold_them_while_nothing_more_is_read() {
    const SHARE_BYTES: usize = 64 << 20;
    const SERVER_BUSY: u8 = 0x89;
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("intake.hold_back_ms_max", 500).start();
    let source = gateway.create("press-4");
    let held = || {
        let bytes = gateway.metric("headgate_memory_held_bytes");
        bytes.to_string().parse::<usize>().expect("whole bytes")
    };
    let before = held();
    let mut idle = Wire::login(gateway.mqtt, V5, &source.key);
    for alias in 1..=4 {
        idle.send(&publish_with(V5, alias, longest_topic(), &two_bytes(TOPIC_ALIAS, alias), b""));
        assert_eq!(idle.packet(PUBACK).reason(), 0);
    }
    // What the last message took is free soon after its ack.
    let of_aliases =
        wait_for("the aliases alone", || Some(held() - before).filter(|b| (4_096..5_000).contains(b)));
    let rest = SHARE_BYTES - 63 * (1 << 20) - of_aliases;
    let begun: Vec<TcpStream> = [1 << 20; 63]
        .into_iter()
        .chain([rest])
        .map(|bytes| {
            let mut stream = let_in(gateway.mqtt, &Connect::with_key(V5, &source.key));
            // The packet's type and length take four bytes.
            stream.write_all(&frame(0x30, &vec![0; bytes - 4])[..2_000]).expect("sent");
            stream
        })
        .collect();
    wait_for("a share that is used up", || (held() - before == SHARE_BYTES).then_some(()));
    idle.send(&PINGREQ);
    idle.disconnected(SERVER_BUSY);
    drop(begun);
}
