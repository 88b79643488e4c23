//! A Mosquitto that bridges to a gateway, with its own defaults: `try_private`, notifications, and a will on `$SYS`.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::json;

use crate::common::wire::{
    CONNACK, Connect, Message, Next, PINGREQ, PINGRESP, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, SUBACK,
    VERSIONS,
    Version::{self, V5, V311},
    Wire, ack, publish, subscribe_with,
};
use crate::common::{Gateway, Source, scratch, wait_for};

const STATE_TOPIC: &str = "$SYS/broker/connection/mosquitto.headgate/state";

fn scene() -> (tempfile::TempDir, Gateway, Source) {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create_open("press-4");
    (dir, gateway, source)
}

/// A Mosquitto of a test's own. Killed when it is dropped.
struct Mosquitto {
    child: Child,
    port: u16,
}

impl Mosquitto {
    /// One that bridges its topics to and from a gateway.
    fn bridging(dir: &Path, gateway: &Gateway, key: &str, more: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        drop(listener);
        let file = dir.join(format!("mosquitto-{port}.conf"));
        let config = format!(
            "listener {port} 127.0.0.1\nallow_anonymous true\n\
             connection headgate\naddress {}\nremote_username {key}\nrestart_timeout 1\n{more}\n\
             topic up/# out 1\ntopic down/# in 1\ntopic both/# both 1\n",
            gateway.mqtt,
        );
        std::fs::write(&file, config).expect("the configuration is written");
        let mut command = Command::new(if Path::new("/usr/sbin/mosquitto").exists() {
            "/usr/sbin/mosquitto"
        } else {
            "mosquitto"
        });
        command.arg("-c").arg(&file).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("mosquitto is installed (tests/run does it)");
        let mosquitto = Self { child, port };
        wait_for("Mosquitto to listen", || mosquitto.try_client().map(drop));
        mosquitto
    }

    fn try_client(&self) -> Option<Wire> {
        let socket = std::net::TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        let mut wire = Wire::over(socket);
        wire.send(&Connect::new(V311).packet());
        matches!(wire.next(), Next::Packet(frame) if frame.kind() == CONNACK).then_some(wire)
    }

    fn client(&self) -> Wire {
        self.try_client().expect("Mosquitto lets it in")
    }
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn subscribed(wire: &mut Wire, filter: &str) {
    wire.send(&subscribe_with(V311, 1, &[(filter, 1)], &[]));
    assert_eq!(wire.packet(SUBACK).codes(V311), [1]);
}

fn received(wire: &mut Wire) -> Message {
    let message = Message::read(V311, &wire.packet(PUBLISH));
    wire.send(&ack(PUBACK, message.packet_id));
    message
}

/// The bridge was refused for its will, with a code that made it try for ever.
#[test]
fn a_bridge_of_mosquitto_connects_with_its_defaults_and_brings_messages_both_ways() {
    for more in
        ["", "bridge_protocol_version mqttv50", "bridge_protocol_version mqttv31", "try_private false"]
    {
        let (dir, gateway, source) = scene();
        let mosquitto = Mosquitto::bridging(dir.path(), &gateway, &source.key, more);
        wait_for("the bridge to connect", || {
            (gateway.metric("headgate_mqtt_connections") == 1.0).then_some(())
        });
        let (mut here, mut there) = (Wire::login(gateway.mqtt, V311, &source.key), mosquitto.client());
        subscribed(&mut here, "#");
        // Until the bridge has subscribed, what is published here does not go there.
        subscribed(&mut there, "down/#");
        let mut publisher = Wire::login(gateway.mqtt, V311, &source.key);
        wait_for("a message to cross", || {
            assert_eq!(publisher.publish(V311, 1, "down/probe", b"x"), 0);
            received(&mut here);
            let crossed = there.next_within(std::time::Duration::from_millis(300));
            (crossed != Next::Silent).then_some(())
        });
        let mut local = mosquitto.client();
        assert_eq!(local.publish(V311, 1, "up/a", b"1"), 0);
        let message = received(&mut here);
        assert_eq!((&*message.topic, &message.payload[..]), ("up/a", &b"1"[..]), "{more}");
        // Once, and not back again.
        assert_eq!(local.publish(V311, 2, "both/a", b"2"), 0);
        assert_eq!(received(&mut here).topic, "both/a");
        assert_eq!(publisher.publish(V311, 1, "both/b", b"3"), 0);
        assert_eq!(received(&mut here).topic, "both/b");
        here.send(&PINGREQ);
        here.packet(PINGRESP);
        assert!(gateway.metric("headgate_bridge_notices_total") >= 2.0, "its will and its notification");
        let listed = gateway.get("/v1/refusals", &gateway.admin_key()).json();
        assert_eq!(listed["refusals"], json!([]), "{more}");
        drop(mosquitto);
        gateway.settle();
        let topics: Vec<_> =
            gateway.records("press-4").iter().map(|record| record["topic"].clone()).collect();
        assert!(topics.iter().all(|topic| !topic.as_str().expect("a text").contains("SYS")), "{topics:?}");
    }
}

fn bridge_hello(version: Version, key: &str) -> Vec<u8> {
    let connect = Connect {
        client_id: format!("bridge {}", version as u8),
        will: Some((STATE_TOPIC.to_owned(), b"0".to_vec())),
        will_qos: 1,
        will_retain: true,
        ..Connect::with_key(version, key)
    };
    connect.packet_with(b"MQTT", version as u8 | 0x80, connect.flags())
}

#[test]
fn a_bridge_gets_no_message_back_and_its_notices_are_taken_and_dropped_at_every_qos() {
    let (_dir, gateway, source) = scene();
    for version in VERSIONS {
        let mut bridge = Wire::open(gateway.mqtt);
        bridge.send(&bridge_hello(version, &source.key));
        assert_eq!(bridge.packet(CONNACK).reason(), 0);
        let before = gateway.metric("headgate_bridge_notices_total");
        bridge.send(&Message::new(STATE_TOPIC, "1").packet(version));
        bridge.send(&publish(version, 7, STATE_TOPIC, b"1"));
        assert_eq!(bridge.packet(PUBACK).reason(), 0);
        for _ in 0..2 {
            bridge.send(&Message::new(STATE_TOPIC, "1").at(2, 8).packet(version));
            assert_eq!(bridge.packet(PUBREC).reason(), 0);
        }
        bridge.send(&ack(PUBREL, 8));
        assert_eq!(bridge.packet(PUBCOMP).reason(), 0);
        assert_eq!(gateway.metric("headgate_bridge_notices_total") - before, 4.0);
        // The packet identifier is free again.
        bridge.send(&Message::new("a", "x").at(2, 8).packet(version));
        assert_eq!(bridge.packet(PUBREC).reason(), 0);
        bridge.send(&ack(PUBREL, 8));
        bridge.packet(PUBCOMP);

        bridge.send(&subscribe_with(version, 1, &[("#", 1)], &[]));
        bridge.packet(SUBACK);
        assert_eq!(bridge.publish(version, 9, "mine", b"x"), 0);
        let mut other = Wire::login(gateway.mqtt, version, &source.key);
        other.send(&Message::new("retained", "x").at(1, 1).retained().packet(version));
        other.packet(PUBACK);
        let message = Message::read(version, &bridge.packet(PUBLISH));
        assert_eq!((&*message.topic, message.retain), ("retained", true));
        // Cleared for the next round.
        other.send(&Message::new("retained", "").at(1, 1).retained().packet(version));
        other.packet(PUBACK);
    }
    // Who is no bridge is told, as ever, that other topics of that kind are not taken.
    let mut device = Wire::login(gateway.mqtt, V5, &source.key);
    assert_eq!(device.publish(V5, 1, "$SYS/broker/uptime", b"x"), 0x90);
    assert_eq!(device.publish(V5, 1, STATE_TOPIC, b"x"), 0);
}
