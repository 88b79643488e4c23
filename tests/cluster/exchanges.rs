//! QoS 2 exchanges that stay open for longer than JetStream knows an id. Their repetition was stored a second time.

use std::path::Path;
use std::time::Duration;

use crate::common::nats::NatsServer;
use crate::common::wire::{
    CONNACK, Connect, Message, PUBCOMP, PUBREC, PUBREL, SESSION_EXPIRY, Version::V5, Wire, ack, four_bytes,
};
use crate::common::{Gateway, Setup, scratch};

/// For how long JetStream knows an id here, and somewhat longer.
const WINDOW_S: u64 = 2;
const LONGER_THAN_WINDOW: Duration = Duration::from_secs(WINDOW_S + 2);

fn setup(dir: &Path, server: &NatsServer) -> Setup {
    Setup::embedded_on(dir)
        .set("log.backend", "jetstream")
        .set("nats.servers", format!("[\"{}\"]", server.url()))
        .set("intake.dedup_window_s", WINDOW_S)
        .set("log.retention_bytes", "1GiB")
}

/// A client whose session stays.
fn connected(gateway: &Gateway, key: &str, name: &str) -> Wire {
    let connect = Connect {
        client_id: name.to_owned(),
        clean: false,
        properties: four_bytes(SESSION_EXPIRY, 3_600),
        ..Connect::with_key(V5, key)
    };
    let mut wire = Wire::open(gateway.mqtt);
    wire.send(&connect.packet());
    wire.packet(CONNACK);
    wire
}

/// A message of a client, whose topic it is.
fn message(name: &str) -> Message {
    Message::new(name, format!("\"{name}\"")).at(2, 1)
}

fn received(wire: &mut Wire, message: &Message) {
    wire.send(&message.packet(V5));
    let answer = wire.packet(PUBREC);
    assert_eq!((answer.packet_id(), answer.reason()), (1, 0));
}

fn released(wire: &mut Wire) {
    wire.send(&ack(PUBREL, 1));
    assert_eq!(wire.packet(PUBCOMP).packet_id(), 1);
}

/// How often a client's message is stored, once a gateway has stored all that there is.
fn stored(gateway: &Gateway, name: &str) -> usize {
    gateway.settle();
    let answer = gateway.get(&format!("/v1/datasources/press-4/records?topic={name}"), &gateway.admin_key());
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["records"].as_array().expect("records").len()
}

#[test]
fn a_qos_2_exchange_is_open_until_it_is_released() {
    let (server, first, second) = (NatsServer::start(), scratch(), scratch());
    let (a, b) = (setup(first.path(), &server).start(), setup(second.path(), &server).start());
    std::fs::copy(first.path().join("admin.key"), second.path().join("admin.key")).expect("it is there");
    let key = a.create("press-4").key;
    for name in ["here", "there", "restarted", "other"] {
        received(&mut connected(&a, &key, name), &message(name));
    }
    std::thread::sleep(LONGER_THAN_WINDOW);
    let mut here = connected(&a, &key, "here");
    received(&mut here, &message("here").again());
    let mut there = connected(&b, &key, "there");
    received(&mut there, &message("there").again());
    // Another message under the packet id of an open exchange is none of it.
    let mut other = connected(&b, &key, "other");
    other.send(&Message::new("other", "\"another\"").at(2, 1).packet(V5));
    assert_ne!(other.packet(PUBREC).reason(), 0);
    assert_eq!([stored(&a, "here"), stored(&a, "there"), stored(&a, "other")], [1, 1, 1]);

    // Released, the packet id is for a new message.
    for wire in [&mut here, &mut there] {
        released(wire);
    }
    received(&mut here, &message("here"));
    received(&mut there, &message("there"));
    assert_eq!([stored(&a, "here"), stored(&a, "there")], [2, 2]);

    // Killed at once: whoever comes back finds it in the stream.
    let mut killed = connected(&b, &key, "killed");
    received(&mut killed, &message("killed"));
    b.kill();
    a.kill();
    let (a, b) = (setup(first.path(), &server).start(), setup(second.path(), &server).start());
    std::thread::sleep(LONGER_THAN_WINDOW);
    for (gateway, name) in [(&b, "restarted"), (&a, "killed"), (&a, "there"), (&b, "here")] {
        let mut wire = connected(gateway, &key, name);
        received(&mut wire, &message(name).again());
        released(&mut wire);
    }
    assert_eq!(["restarted", "killed", "there", "here"].map(|name| stored(&a, name)), [1, 1, 2, 2]);
    assert_eq!(["restarted", "killed", "there", "here"].map(|name| stored(&b, name)), [1, 1, 2, 2]);
}

/// A gateway that is gone wrote no row; another one has seen the exchange in the stream.
#[test]
fn the_exchange_of_a_gateway_that_was_killed_stays_open() {
    let (server, first, second) = (NatsServer::start(), scratch(), scratch());
    let (a, b) = (setup(first.path(), &server).start(), setup(second.path(), &server).start());
    std::fs::copy(first.path().join("admin.key"), second.path().join("admin.key")).expect("it is there");
    let key = a.create("press-4").key;
    let mut wire = connected(&a, &key, "killed");
    received(&mut wire, &message("killed"));
    a.kill();
    // `b` publishes nothing meanwhile, and is asked for the first time after the window.
    std::thread::sleep(LONGER_THAN_WINDOW);
    let mut wire = connected(&b, &key, "killed");
    received(&mut wire, &message("killed").again());
    released(&mut wire);
    received(&mut wire, &message("killed"));
    assert_eq!(stored(&b, "killed"), 2);
}
