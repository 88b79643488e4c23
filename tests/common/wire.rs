//! MQTT by hand: packets built and read byte by byte, so that a test can send what no client
//! library would, and see exactly what comes back.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::PATIENCE;

/// Packet types, as the upper half of a packet's first byte.
pub const CONNACK: u8 = 2;
pub const PUBLISH: u8 = 3;
pub const PUBACK: u8 = 4;
pub const PUBREC: u8 = 5;
pub const PUBREL: u8 = 6;
pub const PUBCOMP: u8 = 7;
pub const SUBACK: u8 = 9;
pub const UNSUBACK: u8 = 11;
pub const PINGRESP: u8 = 13;
pub const DISCONNECT: u8 = 14;

pub const PINGREQ: [u8; 2] = [0xC0, 0];

/// Identifiers of MQTT 5 properties.
pub const PAYLOAD_FORMAT: u8 = 0x01;
pub const MESSAGE_EXPIRY: u8 = 0x02;
pub const CONTENT_TYPE: u8 = 0x03;
pub const RESPONSE_TOPIC: u8 = 0x08;
pub const CORRELATION_DATA: u8 = 0x09;
pub const SUBSCRIPTION_ID: u8 = 0x0B;
pub const SESSION_EXPIRY: u8 = 0x11;
pub const ASSIGNED_CLIENT_ID: u8 = 0x12;
pub const SERVER_KEEP_ALIVE: u8 = 0x13;
pub const AUTH_METHOD: u8 = 0x15;
pub const AUTH_DATA: u8 = 0x16;
pub const REQUEST_PROBLEM_INFO: u8 = 0x17;
pub const WILL_DELAY: u8 = 0x18;
pub const REQUEST_RESPONSE_INFO: u8 = 0x19;
pub const RESPONSE_INFO: u8 = 0x1A;
pub const SERVER_REFERENCE: u8 = 0x1C;
pub const REASON_STRING: u8 = 0x1F;
pub const RECEIVE_MAXIMUM: u8 = 0x21;
pub const TOPIC_ALIAS_MAXIMUM: u8 = 0x22;
pub const TOPIC_ALIAS: u8 = 0x23;
pub const MAXIMUM_QOS: u8 = 0x24;
pub const RETAIN_AVAILABLE: u8 = 0x25;
pub const USER_PROPERTY: u8 = 0x26;
pub const MAXIMUM_PACKET_SIZE: u8 = 0x27;
pub const WILDCARDS_AVAILABLE: u8 = 0x28;
pub const SUBSCRIPTION_IDS_AVAILABLE: u8 = 0x29;
pub const SHARED_AVAILABLE: u8 = 0x2A;

/// MQTT 3.1.1 or 5, by the number in CONNECT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V311 = 4,
    V5 = 5,
}

/// Both.
pub const VERSIONS: [Version; 2] = [Version::V311, Version::V5];

/// A variable byte integer.
pub fn varint(mut n: usize) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let low = u8::try_from(n & 0x7F).expect("seven bits");
        n >>= 7;
        if n == 0 {
            out.push(low);
            return out;
        }
        out.push(low | 0x80);
    }
}

/// A length of two bytes, and the bytes.
pub fn prefixed(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    let mut out = u16::try_from(bytes.len()).expect("at most 65,535 bytes").to_be_bytes().to_vec();
    out.extend_from_slice(bytes);
    out
}

/// A packet: first byte, remaining length, body.
pub fn frame(first: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    out.extend(varint(body.len()));
    out.extend_from_slice(body);
    out
}

/// A user property, encoded.
pub fn user_property(name: &str, value: &str) -> Vec<u8> {
    [vec![USER_PROPERTY], prefixed(name), prefixed(value)].concat()
}

/// What a CONNECT carries.
#[derive(Clone)]
pub struct Connect {
    pub version: Version,
    pub client_id: String,
    pub clean: bool,
    pub keep_alive: u16,
    pub username: Option<Vec<u8>>,
    pub password: Option<Vec<u8>>,
    /// MQTT 5 properties, encoded, without the length in front.
    pub properties: Vec<u8>,
    /// Will topic and payload.
    pub will: Option<(String, Vec<u8>)>,
    pub will_qos: u8,
    pub will_retain: bool,
    /// As `properties`, of the will.
    pub will_properties: Vec<u8>,
}

impl Connect {
    /// No key, no client id, a new session, no keep-alive.
    pub fn new(version: Version) -> Self {
        Self {
            version,
            client_id: String::new(),
            clean: true,
            keep_alive: 0,
            username: None,
            password: None,
            properties: Vec::new(),
            will: None,
            will_qos: 0,
            will_retain: false,
            will_properties: Vec::new(),
        }
    }

    /// With a key as the user name.
    pub fn with_key(version: Version, key: &str) -> Self {
        Self { username: Some(key.as_bytes().to_vec()), ..Self::new(version) }
    }

    /// The flags byte that fits what is there.
    pub fn flags(&self) -> u8 {
        u8::from(self.clean) << 1
            | u8::from(self.will.is_some()) << 2
            | self.will_qos << 3
            | u8::from(self.will_retain) << 5
            | u8::from(self.password.is_some()) << 6
            | u8::from(self.username.is_some()) << 7
    }

    /// The packet.
    pub fn packet(&self) -> Vec<u8> {
        self.packet_with(b"MQTT", self.version as u8, self.flags())
    }

    /// The packet with another protocol name, level or flags byte.
    pub fn packet_with(&self, protocol: &[u8], level: u8, flags: u8) -> Vec<u8> {
        let mut body = prefixed(protocol);
        body.extend([level, flags]);
        body.extend(self.keep_alive.to_be_bytes());
        if self.version == Version::V5 {
            body.extend(varint(self.properties.len()));
            body.extend(&self.properties);
        }
        body.extend(prefixed(&self.client_id));
        if let Some((topic, payload)) = &self.will {
            if self.version == Version::V5 {
                body.extend(varint(self.will_properties.len()));
                body.extend(&self.will_properties);
            }
            body.extend(prefixed(topic));
            body.extend(prefixed(payload));
        }
        for field in [&self.username, &self.password].into_iter().flatten() {
            body.extend(prefixed(field));
        }
        frame(0x10, &body)
    }
}

/// A PUBLISH; a packet id of 0 makes it QoS 0, any other QoS 1.
pub fn publish(version: Version, packet_id: u16, topic: impl AsRef<[u8]>, payload: &[u8]) -> Vec<u8> {
    publish_with(version, packet_id, topic, &[], payload)
}

/// As [`publish`], with encoded MQTT 5 properties.
pub fn publish_with(
    version: Version,
    packet_id: u16,
    topic: impl AsRef<[u8]>,
    properties: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let mut body = prefixed(topic);
    if packet_id != 0 {
        body.extend(packet_id.to_be_bytes());
    }
    if version == Version::V5 {
        body.extend(varint(properties.len()));
        body.extend_from_slice(properties);
    }
    body.extend_from_slice(payload);
    frame(if packet_id == 0 { 0x30 } else { 0x32 }, &body)
}

/// A SUBSCRIBE with one or more filters at QoS 1.
pub fn subscribe(version: Version, packet_id: u16, filters: &[&str]) -> Vec<u8> {
    let mut body = packet_id.to_be_bytes().to_vec();
    if version == Version::V5 {
        body.push(0);
    }
    for filter in filters {
        body.extend(prefixed(filter));
        body.push(1);
    }
    frame(0x82, &body)
}

/// As [`subscribe`], with the options byte of each filter and encoded MQTT 5 properties.
pub fn subscribe_with(
    version: Version,
    packet_id: u16,
    filters: &[(&str, u8)],
    properties: &[u8],
) -> Vec<u8> {
    let mut body = packet_id.to_be_bytes().to_vec();
    if version == Version::V5 {
        body.extend(varint(properties.len()));
        body.extend_from_slice(properties);
    }
    for (filter, options) in filters {
        body.extend(prefixed(filter));
        body.push(*options);
    }
    frame(0x82, &body)
}

/// An UNSUBSCRIBE.
pub fn unsubscribe(version: Version, packet_id: u16, filters: &[&str]) -> Vec<u8> {
    let mut body = packet_id.to_be_bytes().to_vec();
    if version == Version::V5 {
        body.push(0);
    }
    for filter in filters {
        body.extend(prefixed(filter));
    }
    frame(0xA2, &body)
}

/// PUBACK, PUBREC, PUBREL or PUBCOMP, by its packet type, that says yes.
pub fn ack(kind: u8, packet_id: u16) -> Vec<u8> {
    let flags = if kind == PUBREL { 2 } else { 0 };
    frame(kind << 4 | flags, &packet_id.to_be_bytes())
}

/// The same of MQTT 5, with a reason code.
pub fn ack_with(kind: u8, packet_id: u16, reason: u8) -> Vec<u8> {
    let [high, low] = packet_id.to_be_bytes();
    let flags = if kind == PUBREL { 2 } else { 0 };
    frame(kind << 4 | flags, &[high, low, reason])
}

/// A property of two bytes.
pub fn two_bytes(id: u8, value: u16) -> Vec<u8> {
    let [high, low] = value.to_be_bytes();
    vec![id, high, low]
}

/// A property of four bytes.
pub fn four_bytes(id: u8, value: u32) -> Vec<u8> {
    [&[id][..], &value.to_be_bytes()].concat()
}

/// A property that is text or bytes.
pub fn text_property(id: u8, value: impl AsRef<[u8]>) -> Vec<u8> {
    [vec![id], prefixed(value)].concat()
}

/// Properties with their length in front, at the beginning of `bytes`: each one's identifier and
/// value as on the wire, and how many bytes they take.
pub fn properties_in(bytes: &[u8]) -> (Vec<(u8, Vec<u8>)>, usize) {
    let (length, at) = varint_in(bytes);
    let mut rest = &bytes[at..at + length];
    let mut found = Vec::new();
    while let Some((&id, value)) = rest.split_first() {
        let two = |at: usize| 2 + usize::from(u16::from_be_bytes([value[at], value[at + 1]]));
        let size = match id {
            PAYLOAD_FORMAT
            | REQUEST_PROBLEM_INFO
            | REQUEST_RESPONSE_INFO
            | MAXIMUM_QOS
            | RETAIN_AVAILABLE => 1,
            WILDCARDS_AVAILABLE | SUBSCRIPTION_IDS_AVAILABLE | SHARED_AVAILABLE => 1,
            SERVER_KEEP_ALIVE | RECEIVE_MAXIMUM | TOPIC_ALIAS_MAXIMUM | TOPIC_ALIAS => 2,
            MAXIMUM_PACKET_SIZE | SESSION_EXPIRY | MESSAGE_EXPIRY | WILL_DELAY => 4,
            SUBSCRIPTION_ID => varint_in(value).1,
            USER_PROPERTY => two(0) + two(two(0)),
            CONTENT_TYPE | RESPONSE_TOPIC | CORRELATION_DATA | ASSIGNED_CLIENT_ID | AUTH_METHOD
            | AUTH_DATA | RESPONSE_INFO | SERVER_REFERENCE | REASON_STRING => two(0),
            other => panic!("property {other:#04x} does not exist"),
        };
        found.push((id, value[..size].to_vec()));
        rest = &value[size..];
    }
    (found, at + length)
}

/// A variable byte integer and how many bytes it takes, which have to be as few as possible.
fn varint_in(bytes: &[u8]) -> (usize, usize) {
    let (mut value, mut at) = (0, 0);
    loop {
        let byte = bytes[at];
        value |= usize::from(byte & 0x7F) << (7 * at);
        at += 1;
        if byte < 0x80 {
            assert_eq!(varint(value).len(), at, "no more bytes than it needs");
            return (value, at);
        }
        assert!(at < 4, "a variable byte integer of at most four bytes");
    }
}

/// A PUBLISH in either direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub topic: String,
    pub payload: Vec<u8>,
    pub qos: u8,
    pub dup: bool,
    pub retain: bool,
    /// 0 at QoS 0.
    pub packet_id: u16,
    /// Identifier and value as on the wire.
    pub properties: Vec<(u8, Vec<u8>)>,
}

impl Message {
    /// At QoS 0.
    pub fn new(topic: &str, payload: impl AsRef<[u8]>) -> Self {
        Self {
            topic: topic.to_owned(),
            payload: payload.as_ref().to_vec(),
            qos: 0,
            dup: false,
            retain: false,
            packet_id: 0,
            properties: Vec::new(),
        }
    }

    pub fn at(self, qos: u8, packet_id: u16) -> Self {
        Self { qos, packet_id, ..self }
    }

    pub fn retained(self) -> Self {
        Self { retain: true, ..self }
    }

    pub fn again(self) -> Self {
        Self { dup: true, ..self }
    }

    /// With one more property, encoded.
    pub fn with(mut self, property: &[u8]) -> Self {
        self.properties.push((property[0], property[1..].to_vec()));
        self
    }

    /// Takes a packet apart.
    pub fn read(version: Version, frame: &Frame) -> Self {
        assert_eq!(frame.kind(), PUBLISH, "{frame:02x?}");
        let qos = frame.first >> 1 & 3;
        let mut rest = &frame.body[2..];
        let (topic, after) = rest.split_at(usize::from(u16::from_be_bytes([frame.body[0], frame.body[1]])));
        rest = after;
        let mut packet_id = 0;
        if qos > 0 {
            packet_id = u16::from_be_bytes([rest[0], rest[1]]);
            rest = &rest[2..];
        }
        let mut properties = Vec::new();
        if version == Version::V5 {
            let taken;
            (properties, taken) = properties_in(rest);
            rest = &rest[taken..];
        }
        Self {
            topic: String::from_utf8(topic.to_vec()).expect("UTF-8"),
            payload: rest.to_vec(),
            qos,
            dup: frame.first & 8 != 0,
            retain: frame.first & 1 != 0,
            packet_id,
            properties,
        }
    }

    /// The packet.
    pub fn packet(&self, version: Version) -> Vec<u8> {
        let mut body = prefixed(&self.topic);
        if self.qos > 0 {
            body.extend(self.packet_id.to_be_bytes());
        }
        if version == Version::V5 {
            let properties: Vec<u8> =
                self.properties.iter().flat_map(|(id, value)| [&[*id][..], value].concat()).collect();
            body.extend(varint(properties.len()));
            body.extend(properties);
        }
        body.extend(&self.payload);
        frame(0x30 | u8::from(self.dup) << 3 | self.qos << 1 | u8::from(self.retain), &body)
    }

    /// One property's value as a number.
    pub fn number(&self, id: u8) -> Option<u64> {
        let value = &self.properties.iter().find(|(found, _)| *found == id)?.1;
        Some(value.iter().fold(0, |n, &byte| n << 8 | u64::from(byte)))
    }

    /// The value of a user property.
    pub fn user(&self, name: &str) -> Option<String> {
        let name = prefixed(name);
        let values = self.properties.iter().filter(|(id, _)| *id == USER_PROPERTY);
        let value = values.map(|(_, value)| value).find_map(|value| value.strip_prefix(&name[..]))?;
        Some(String::from_utf8(value[2..].to_vec()).expect("UTF-8"))
    }

    /// The subscription identifiers, sorted.
    pub fn subscription_ids(&self) -> Vec<usize> {
        let ids = self.properties.iter().filter(|(id, _)| *id == SUBSCRIPTION_ID);
        let mut ids: Vec<usize> = ids.map(|(_, value)| varint_in(value).0).collect();
        ids.sort_unstable();
        ids
    }
}

/// A packet as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub first: u8,
    pub body: Vec<u8>,
}

impl Frame {
    pub fn kind(&self) -> u8 {
        self.first >> 4
    }

    pub fn packet_id(&self) -> u16 {
        u16::from_be_bytes([self.body[0], self.body[1]])
    }

    /// The reason code of a packet that has one; 0 where it is left out.
    pub fn reason(&self) -> u8 {
        let at = match self.kind() {
            CONNACK => 1,
            PUBACK | PUBREC | PUBREL | PUBCOMP => 2,
            DISCONNECT => 0,
            kind => panic!("packet type {kind} has no one reason"),
        };
        self.body.get(at).copied().unwrap_or(0)
    }

    /// The reason codes of an MQTT 5 SUBACK or UNSUBACK, or of a SUBACK before.
    pub fn codes(&self, version: Version) -> Vec<u8> {
        assert!(matches!(self.kind(), SUBACK | UNSUBACK), "{self:02x?}");
        let properties = if version == Version::V5 { properties_in(&self.body[2..]).1 } else { 0 };
        self.body[2 + properties..].to_vec()
    }

    /// The MQTT 5 properties of any packet from a server but PUBLISH: identifier and value as on the
    /// wire.
    pub fn properties(&self) -> Vec<(u8, Vec<u8>)> {
        let at = match self.kind() {
            CONNACK | SUBACK | UNSUBACK => 2,
            PUBACK | PUBREC | PUBREL | PUBCOMP => 3,
            _ => 1,
        };
        match self.body.get(at..) {
            Some(properties @ [_, ..]) => properties_in(properties).0,
            _ => Vec::new(),
        }
    }

    /// One property's value as a number.
    pub fn number(&self, id: u8) -> Option<u64> {
        let value = self.properties().into_iter().find(|(found, _)| *found == id)?.1;
        Some(value.iter().fold(0, |n, &byte| n << 8 | u64::from(byte)))
    }

    /// One property's value as text.
    pub fn text(&self, id: u8) -> Option<String> {
        let value = self.properties().into_iter().find(|(found, _)| *found == id)?.1;
        Some(String::from_utf8(value[2..].to_vec()).expect("UTF-8"))
    }
}

/// What came next on a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    Packet(Frame),
    /// The other side has closed.
    Closed,
    /// Nothing within the time given.
    Silent,
}

/// What carries the bytes of a [`Wire`].
pub trait Carrier: Read + Write + Send {
    /// The TCP connection that it is on.
    fn tcp(&self) -> &TcpStream;
}

impl Carrier for TcpStream {
    fn tcp(&self) -> &TcpStream {
        self
    }
}

/// One connection that speaks MQTT only as far as a test makes it.
pub struct Wire {
    socket: Box<dyn Carrier>,
    buffer: Vec<u8>,
}

impl Wire {
    /// Connects, and sends nothing.
    pub fn open(addr: SocketAddr) -> Self {
        let socket = TcpStream::connect_timeout(&addr, PATIENCE).expect("the listener accepts");
        Self::over(socket)
    }

    /// On a connection that there is, TLS or WebSocket for example.
    pub fn over(carrier: impl Carrier + 'static) -> Self {
        carrier.tcp().set_nodelay(true).expect("a socket option");
        carrier.tcp().set_write_timeout(Some(PATIENCE)).expect("a socket option");
        Self { socket: Box::new(carrier), buffer: Vec::new() }
    }

    /// Connects with a key as the user name, and has to be let in.
    pub fn login(addr: SocketAddr, version: Version, key: &str) -> Self {
        Self::connect(addr, &Connect::with_key(version, key)).0
    }

    /// Connects and has to be let in; also returns the CONNACK.
    pub fn connect(addr: SocketAddr, connect: &Connect) -> (Self, Frame) {
        let mut wire = Self::open(addr);
        let connack = wire.let_in(connect);
        (wire, connack)
    }

    /// Sends a CONNECT, and has to be let in.
    pub fn let_in(&mut self, connect: &Connect) -> Frame {
        self.send(&connect.packet());
        let connack = self.packet(CONNACK);
        assert_eq!(connack.reason(), 0, "{connack:?}");
        connack
    }

    /// Sends bytes. That the other side has closed already is no error here: reading tells.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    /// The port that it comes from.
    pub fn local_port(&self) -> u16 {
        self.socket.tcp().local_addr().expect("a socket").port()
    }

    /// Ends our direction.
    pub fn finish(&self) {
        let _ = self.socket.tcp().shutdown(std::net::Shutdown::Write);
    }

    /// The next packet, the end, or silence for `patience`.
    pub fn next_within(&mut self, patience: Duration) -> Next {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(frame) = self.buffered() {
                return Next::Packet(frame);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Next::Silent;
            }
            self.socket.tcp().set_read_timeout(Some(left)).expect("a socket option");
            let mut chunk = [0; 16 << 10];
            match self.socket.read(&mut chunk) {
                Ok(0) => return Next::Closed,
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Next::Closed,
            }
        }
    }

    fn buffered(&mut self) -> Option<Frame> {
        let (mut length, mut at) = (0, 1);
        loop {
            let byte = *self.buffer.get(at)?;
            length |= usize::from(byte & 0x7F) << (7 * (at - 1));
            at += 1;
            if byte < 0x80 {
                break;
            }
            assert!(at < 5, "a remaining length of at most four bytes");
        }
        if self.buffer.len() < at + length {
            return None;
        }
        let rest = self.buffer.split_off(at + length);
        let whole = std::mem::replace(&mut self.buffer, rest);
        Some(Frame { first: whole[0], body: whole[at..].to_vec() })
    }

    /// The next packet, the end, or silence.
    pub fn next(&mut self) -> Next {
        self.next_within(PATIENCE)
    }

    /// The next packet, which has to be of this type.
    pub fn packet(&mut self, kind: u8) -> Frame {
        match self.next() {
            Next::Packet(frame) if frame.kind() == kind => frame,
            other => panic!("expected a packet of type {kind}, got {other:?}"),
        }
    }

    /// The other side has to close without another word.
    pub fn closed(&mut self) {
        assert_eq!(self.next(), Next::Closed);
    }

    /// The other side has to say DISCONNECT with this reason, and close.
    pub fn disconnected(&mut self, reason: u8) -> Frame {
        let frame = self.packet(DISCONNECT);
        assert_eq!(frame.reason(), reason, "{:#04x}: {frame:?}", frame.reason());
        self.closed();
        frame
    }

    /// Publishes at QoS 1 and returns the PUBACK's reason.
    pub fn publish(&mut self, version: Version, packet_id: u16, topic: &str, payload: &[u8]) -> u8 {
        self.send(&publish(version, packet_id, topic, payload));
        let puback = self.packet(PUBACK);
        assert_eq!(puback.packet_id(), packet_id);
        puback.reason()
    }
}
