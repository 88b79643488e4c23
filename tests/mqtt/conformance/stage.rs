//! What the tests of this binary stand on: a gateway with one key that may publish and subscribe, and
//! clients that say what they mean in one line each.

use std::collections::VecDeque;

use serde_json::json;

use crate::common::wire::{
    ASSIGNED_CLIENT_ID, Connect, Frame, Message, Next, PINGREQ, PINGRESP, PUBACK, PUBCOMP, PUBLISH, PUBREC,
    PUBREL, SESSION_EXPIRY, SUBACK, UNSUBACK, Version, Wire, ack, four_bytes, subscribe_with, unsubscribe,
};
use crate::common::{Gateway, Setup, scratch};

/// A gateway that lives for one test.
pub(crate) struct Stage {
    pub(crate) gateway: Gateway,
    /// Of datasource `press-4`; may publish and subscribe.
    pub(crate) key: String,
    dir: tempfile::TempDir,
}

impl Stage {
    pub(crate) fn new() -> Self {
        Self::with(|setup| setup)
    }

    /// With other settings than the defaults.
    pub(crate) fn with(settings: impl FnOnce(Setup) -> Setup) -> Self {
        let dir = scratch();
        let gateway = settings(Setup::on(dir.path())).start();
        let body = json!({ "id": "press-4", "name": "press-4", "scopes": ["ingest", "subscribe"] });
        let answer = gateway.post("/v1/datasources", &gateway.admin_key(), &body);
        assert_eq!(answer.status, 201, "{}", answer.text());
        let key = answer.json()["key"]["secret"].as_str().expect("a key").to_owned();
        Self { gateway, key, dir }
    }

    /// The same data directory, after a stop and a start.
    pub(crate) fn restart(self) -> Self {
        let Self { gateway, key, dir } = self;
        gateway.stop();
        Self { gateway: Gateway::start(dir.path()), key, dir }
    }

    /// The same data directory, after a SIGKILL and a start.
    pub(crate) fn kill(self) -> Self {
        let Self { gateway, key, dir } = self;
        gateway.kill();
        Self { gateway: Gateway::start(dir.path()), key, dir }
    }

    /// A CONNECT with the key, for a session that ends with the connection.
    pub(crate) fn hello(&self, version: Version, client_id: &str) -> Connect {
        Connect { client_id: client_id.to_owned(), ..Connect::with_key(version, &self.key) }
    }

    /// A CONNECT with the key, for a session that stays: an hour, or with 3.1.1 for as long as the
    /// gateway keeps one.
    pub(crate) fn hello_again(&self, version: Version, client_id: &str) -> Connect {
        let properties = if version == Version::V5 { four_bytes(SESSION_EXPIRY, 3600) } else { Vec::new() };
        Connect { clean: false, properties, ..self.hello(version, client_id) }
    }

    /// A client that has connected.
    pub(crate) fn client(&self, version: Version, client_id: &str) -> Client {
        self.connect(&self.hello(version, client_id))
    }

    /// As [`Stage::client`], with a CONNECT of the test's own.
    pub(crate) fn connect(&self, connect: &Connect) -> Client {
        let (wire, connack) = Wire::connect(self.gateway.mqtt, connect);
        Client { wire, version: connect.version, connack, last_id: 0, early: VecDeque::new() }
    }

    /// Sends bytes in the place of a CONNECT, and returns what comes back before the end; there has
    /// to be one.
    pub(crate) fn refused(&self, bytes: &[u8]) -> Option<Frame> {
        let mut wire = Wire::open(self.gateway.mqtt);
        wire.send(bytes);
        last_word(&mut wire)
    }
}

/// What the gateway says before it closes a connection.
pub(crate) fn last_word(wire: &mut Wire) -> Option<Frame> {
    match wire.next() {
        Next::Packet(frame) => {
            assert_eq!(wire.next(), Next::Closed, "after {frame:02x?}");
            Some(frame)
        }
        Next::Closed => None,
        Next::Silent => panic!("still open"),
    }
}

/// A connected client.
pub(crate) struct Client {
    pub(crate) wire: Wire,
    pub(crate) version: Version,
    pub(crate) connack: Frame,
    last_id: u16,
    /// Messages that came before an answer that was waited for.
    early: VecDeque<Message>,
}

impl Client {
    /// Whether the CONNACK said that there was a session.
    pub(crate) fn session_present(&self) -> bool {
        self.connack.body[0] == 1
    }

    /// The client identifier that it was given.
    pub(crate) fn assigned_id(&self) -> Option<String> {
        self.connack.text(ASSIGNED_CLIENT_ID)
    }

    fn next_id(&mut self) -> u16 {
        self.last_id += 1;
        self.last_id
    }

    /// Subscribes filters with their options, each of which has to be granted, and returns the codes
    /// of the SUBACK.
    pub(crate) fn subscribe(&mut self, filters: &[(&str, u8)]) -> Vec<u8> {
        self.subscribe_with(filters, &[])
    }

    /// The same, with MQTT 5 properties.
    pub(crate) fn subscribe_with(&mut self, filters: &[(&str, u8)], properties: &[u8]) -> Vec<u8> {
        let codes = self.ask(filters, properties);
        assert!(codes.iter().all(|code| *code <= 2), "{codes:02x?}");
        codes
    }

    /// Asks for subscriptions, and returns the codes of the SUBACK.
    pub(crate) fn ask(&mut self, filters: &[(&str, u8)], properties: &[u8]) -> Vec<u8> {
        let packet_id = self.next_id();
        self.wire.send(&subscribe_with(self.version, packet_id, filters, properties));
        // A session that was there before may be sent messages meanwhile.
        let suback = loop {
            match self.wire.next() {
                Next::Packet(frame) if frame.kind() == PUBLISH => {
                    self.early.push_back(Message::read(self.version, &frame));
                }
                Next::Packet(frame) if frame.kind() == SUBACK => break frame,
                other => panic!("no SUBACK: {other:?}"),
            }
        };
        assert_eq!(suback.packet_id(), packet_id);
        suback.codes(self.version)
    }

    /// Unsubscribes, and returns the codes of the UNSUBACK; 3.1.1 has none.
    pub(crate) fn unsubscribe(&mut self, filters: &[&str]) -> Vec<u8> {
        let packet_id = self.next_id();
        self.wire.send(&unsubscribe(self.version, packet_id, filters));
        let unsuback = self.wire.packet(UNSUBACK);
        assert_eq!(unsuback.packet_id(), packet_id);
        unsuback.codes(self.version)
    }

    /// Sends a message as it is.
    pub(crate) fn send(&mut self, message: &Message) {
        self.wire.send(&message.packet(self.version));
    }

    /// Publishes at a QoS and sees it through; it has to be let in.
    pub(crate) fn publish(&mut self, qos: u8, topic: &str, payload: &str) {
        self.publish_message(Message::new(topic, payload), qos);
    }

    /// Publishes with the retain flag.
    pub(crate) fn retain(&mut self, qos: u8, topic: &str, payload: &str) {
        self.publish_message(Message::new(topic, payload).retained(), qos);
    }

    /// Publishes a message at a QoS and sees it through; it has to be let in. At QoS 0 a PINGRESP says
    /// that it was read.
    pub(crate) fn publish_message(&mut self, message: Message, qos: u8) {
        let packet_id = if qos > 0 { self.next_id() } else { 0 };
        self.send(&message.at(qos, packet_id));
        match qos {
            0 => self.ping(),
            1 => self.answered(PUBACK, packet_id),
            _ => {
                self.answered(PUBREC, packet_id);
                self.wire.send(&ack(PUBREL, packet_id));
                self.answered(PUBCOMP, packet_id);
            }
        }
    }

    /// The next packet has to be this yes.
    pub(crate) fn answered(&mut self, kind: u8, packet_id: u16) {
        let frame = self.wire.packet(kind);
        assert_eq!(frame.packet_id(), packet_id, "{frame:02x?}");
        // 0x10 is a yes as well: nobody has subscribed.
        assert!(matches!((kind, frame.reason()), (_, 0) | (PUBACK | PUBREC, 0x10)), "{frame:02x?}");
    }

    /// The next packet has to be a PINGRESP to this PINGREQ.
    pub(crate) fn ping(&mut self) {
        self.wire.send(&PINGREQ);
        self.wire.packet(PINGRESP);
    }

    /// The next message, which is not acknowledged.
    pub(crate) fn message(&mut self) -> Message {
        if let Some(message) = self.early.pop_front() {
            return message;
        }
        let frame = self.wire.packet(PUBLISH);
        Message::read(self.version, &frame)
    }

    /// The next message, acknowledged if it wants to be.
    pub(crate) fn received(&mut self) -> Message {
        let message = self.message();
        self.acknowledge(&message);
        message
    }

    pub(crate) fn acknowledge(&mut self, message: &Message) {
        match message.qos {
            0 => {}
            1 => self.wire.send(&ack(PUBACK, message.packet_id)),
            _ => {
                self.wire.send(&ack(PUBREC, message.packet_id));
                self.released(message.packet_id);
                self.wire.send(&ack(PUBCOMP, message.packet_id));
            }
        }
    }

    /// The PUBREL with this packet identifier; messages may come before it.
    pub(crate) fn released(&mut self, packet_id: u16) {
        loop {
            match self.wire.next() {
                Next::Packet(frame) if frame.kind() == PUBLISH => {
                    self.early.push_back(Message::read(self.version, &frame));
                }
                Next::Packet(frame) if frame.kind() == PUBREL => {
                    assert_eq!((frame.packet_id(), frame.reason()), (packet_id, 0));
                    return;
                }
                other => panic!("no PUBREL: {other:?}"),
            }
        }
    }

    /// Everything up to a message on topic `end`, which is left out; acknowledged.
    pub(crate) fn until_end(&mut self) -> Vec<Message> {
        let mut messages = Vec::new();
        loop {
            let message = self.received();
            if message.topic == "end" {
                return messages;
            }
            messages.push(message);
        }
    }

    /// Everything up to the message that another client publishes now on topic `end`, to which this
    /// one has to be subscribed. Messages come in the order of the log, so this is all there is.
    pub(crate) fn all_so_far(&mut self, other: &mut Client) -> Vec<Message> {
        other.publish(1, "end", "");
        self.until_end()
    }

    /// Ends the connection as a client should.
    pub(crate) fn disconnect(mut self) {
        self.wire.send(&[0xE0, 0]);
        self.wire.closed();
    }

    /// Ends the connection without a word.
    pub(crate) fn vanish(self) {
        drop(self.wire);
    }

    /// The connection has to be closed by the gateway; with MQTT 5 for this reason.
    pub(crate) fn ended(&mut self, reason: u8) {
        if self.version == Version::V5 {
            self.wire.disconnected(reason);
        } else {
            self.wire.closed();
        }
    }
}

/// Topics and payloads, to compare.
pub(crate) fn told(messages: &[Message]) -> Vec<(String, String)> {
    let told = |message: &Message| {
        (message.topic.clone(), String::from_utf8(message.payload.clone()).expect("UTF-8"))
    };
    messages.iter().map(told).collect()
}

/// Payloads, to compare.
pub(crate) fn payloads(messages: &[Message]) -> Vec<String> {
    told(messages).into_iter().map(|(_, payload)| payload).collect()
}
