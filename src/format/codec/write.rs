//! Writes the packets that a server sends; each function appends to a buffer.

use super::properties::{
    ASSIGNED_CLIENT_IDENTIFIER, MAXIMUM_PACKET_SIZE, REASON_STRING, RECEIVE_MAXIMUM, SERVER_KEEP_ALIVE,
    SESSION_EXPIRY, TOPIC_ALIAS_MAXIMUM, USER_PROPERTY,
};
use super::{MqttVersion, ReasonCode};

/// How packets to a client have to look: its version, and how much text it takes.
#[derive(Debug, Clone, Copy)]
pub struct PacketForm {
    /// The protocol's version.
    pub version: MqttVersion,
    /// Whether the client wants reason strings with answers to its messages.
    pub reasons: bool,
    /// The largest packet that the client accepts, in bytes.
    pub packet_bytes_max: u32,
}

/// The limits that a CONNACK announces to an MQTT 5 client.
#[derive(Debug, Clone, Default)]
pub struct ConnackLimits {
    /// How many QoS 1 and 2 messages the client may have unacknowledged.
    pub receive_maximum: u16,
    /// The largest packet that the server accepts, in bytes.
    pub packet_bytes_max: u32,
    /// How many topic aliases the client may set.
    pub topic_alias_maximum: u16,
    /// The keep-alive that the client has to use, in seconds, if not its own.
    pub keep_alive_s: Option<u16>,
    /// The assigned client identifier, if the client gave none.
    pub client_id: Option<String>,
    /// The session's expiry, in seconds, if not the one that the client asked for.
    pub session_expiry_s: Option<u32>,
}

/// Accepts a CONNECT. `present` is the session present flag, which MQTT 3.1 does not have. Returns whether it was
/// written: it is not if it would be larger than `packet_bytes_max` even without the limits that a client may do without
/// (section 3.1.2.11.4).
#[must_use]
pub fn connack(
    to: &mut Vec<u8>,
    version: MqttVersion,
    packet_bytes_max: u32,
    present: bool,
    limits: &ConnackLimits,
) -> bool {
    let present = u8::from(present && version != MqttVersion::V31);
    if version != MqttVersion::V5 {
        to.extend_from_slice(&[0x20, 2, present, 0]);
        return true;
    }
    // What a client has to know comes first. Without the others it learns of a limit when it is over it.
    let mut properties = Vec::with_capacity(48);
    number_property(&mut properties, RECEIVE_MAXIMUM, &limits.receive_maximum.to_be_bytes());
    if let Some(client_id) = &limits.client_id {
        text_property(&mut properties, ASSIGNED_CLIENT_IDENTIFIER, client_id);
    }
    if let Some(seconds) = limits.keep_alive_s {
        number_property(&mut properties, SERVER_KEEP_ALIVE, &seconds.to_be_bytes());
    }
    if let Some(seconds) = limits.session_expiry_s {
        number_property(&mut properties, SESSION_EXPIRY, &seconds.to_be_bytes());
    }
    if properties.len() + CONNACK_BYTES > packet_bytes_max as usize {
        return false;
    }
    for (property, number) in [
        (MAXIMUM_PACKET_SIZE, &limits.packet_bytes_max.to_be_bytes()[..]),
        (TOPIC_ALIAS_MAXIMUM, &limits.topic_alias_maximum.to_be_bytes()),
    ] {
        if properties.len() + 1 + number.len() + CONNACK_BYTES <= packet_bytes_max as usize {
            number_property(&mut properties, property, number);
        }
    }
    packet(to, 0x20, &[present, 0], Some(&properties), &[]);
    true
}

/// A CONNACK of MQTT 5 without properties. Those that a server sends are less than 128 bytes, so that each length takes
/// one byte, unless there is a text in them.
const CONNACK_BYTES: usize = 5;

/// Refuses a CONNECT: with MQTT 5's reason code, and the reason string if it fits `packet_bytes_max`, or
/// with the nearest return code of 3.1.1.
pub fn connack_refused(
    to: &mut Vec<u8>,
    version: MqttVersion,
    packet_bytes_max: u32,
    reason: ReasonCode,
    words: &str,
) {
    if version == MqttVersion::V5 {
        if (packet_bytes_max as usize) < CONNACK_BYTES {
            return;
        }
        let mut properties = Vec::new();
        if words.len() + 12 <= packet_bytes_max as usize {
            text_property(&mut properties, REASON_STRING, words);
        }
        packet(to, 0x20, &[0, reason as u8], Some(&properties), &[]);
        return;
    }
    // MQTT 3.1.1, section 3.2.2.3.
    let code = match reason {
        ReasonCode::UnsupportedProtocolVersion => 1,
        ReasonCode::ClientIdentifierNotValid => 2,
        // A client takes the server for unavailable and comes again at once: only where that may help.
        ReasonCode::ServerUnavailable
        | ReasonCode::ServerBusy
        | ReasonCode::ServerShuttingDown
        | ReasonCode::QuotaExceeded
        | ReasonCode::MessageRateTooHigh
        | ReasonCode::ConnectionRateExceeded => 3,
        _ => 5,
    };
    to.extend_from_slice(&[0x20, 2, 0, code]);
}

/// The packets that answer a message or one another, by their first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum AckKind {
    /// To a QoS 1 message.
    Puback = 0x40,
    /// To a QoS 2 message.
    Pubrec = 0x50,
    /// To a PUBREC.
    Pubrel = 0x62,
    /// To a PUBREL.
    Pubcomp = 0x70,
}

/// The answer to a message or a PUBREL. MQTT 3.1.1 can only say success.
pub fn message_ack(
    to: &mut Vec<u8>,
    form: PacketForm,
    answer: AckKind,
    packet_id: u16,
    reason: ReasonCode,
    words: Option<&str>,
) {
    let [high, low] = packet_id.to_be_bytes();
    if reason == ReasonCode::Success || form.version != MqttVersion::V5 {
        to.extend_from_slice(&[answer as u8, 2, high, low]);
        return;
    }
    let properties = words.filter(|_| form.reasons).map(|words| {
        let mut properties = Vec::new();
        text_property(&mut properties, REASON_STRING, words);
        properties
    });
    let properties = properties.filter(|p| p.len() + 9 <= form.packet_bytes_max as usize);
    packet(to, answer as u8, &[high, low, reason as u8], properties.as_deref(), &[]);
}

/// The answer to a SUBSCRIBE: for each filter the granted QoS or the reason code, and in `words` a
/// reason string.
pub fn suback(to: &mut Vec<u8>, form: PacketForm, packet_id: u16, codes: &[u8], words: Option<&str>) {
    filter_codes(to, form, 0x90, packet_id, codes, words);
}

/// The answer to an UNSUBSCRIBE, with a code for each filter since MQTT 5.
pub fn unsuback(to: &mut Vec<u8>, form: PacketForm, packet_id: u16, codes: &[u8]) {
    let codes = if form.version == MqttVersion::V5 { codes } else { &[] };
    filter_codes(to, form, 0xB0, packet_id, codes, None);
}

fn filter_codes(
    to: &mut Vec<u8>,
    form: PacketForm,
    first: u8,
    packet_id: u16,
    codes: &[u8],
    words: Option<&str>,
) {
    let packet_id = packet_id.to_be_bytes();
    if form.version != MqttVersion::V5 {
        return packet(to, first, &packet_id, None, codes);
    }
    let mut properties = Vec::new();
    if let Some(words) =
        words.filter(|words| form.reasons && words.len() + codes.len() + 16 <= form.packet_bytes_max as usize)
    {
        text_property(&mut properties, REASON_STRING, words);
    }
    packet(to, first, &packet_id, Some(&properties), codes);
}

/// A PUBLISH to a subscriber: the first byte, the topic's parts (none if the client knows the alias), the
/// packet identifier of QoS 1, the properties of MQTT 5, the payload.
pub fn publish(
    to: &mut Vec<u8>,
    first: u8,
    topic: &[&str],
    packet_id: Option<u16>,
    properties: Option<&[u8]>,
    payload: &[u8],
) {
    let topic_bytes = topic.iter().map(|part| part.len()).sum();
    let length = publish_length(topic_bytes, packet_id.is_some(), properties.map(<[u8]>::len), payload.len());
    to.reserve(length + 5);
    to.push(first);
    varint(to, length);
    to.extend_from_slice(&u16::try_from(topic_bytes).unwrap_or(u16::MAX).to_be_bytes());
    topic.iter().for_each(|part| to.extend_from_slice(part.as_bytes()));
    if let Some(packet_id) = packet_id {
        to.extend_from_slice(&packet_id.to_be_bytes());
    }
    if let Some(properties) = properties {
        varint(to, properties.len());
        to.extend_from_slice(properties);
    }
    to.extend_from_slice(payload);
}

/// The size of a PUBLISH in bytes, given the sizes of its parts.
pub fn publish_bytes(topic: usize, acknowledged: bool, properties: Option<usize>, payload: usize) -> usize {
    let length = publish_length(topic, acknowledged, properties, payload);
    1 + varint_bytes(length) + length
}

/// The remaining length of a PUBLISH.
fn publish_length(topic: usize, acknowledged: bool, properties: Option<usize>, payload: usize) -> usize {
    let properties = properties.map_or(0, |bytes| varint_bytes(bytes) + bytes);
    2 + topic + if acknowledged { 2 } else { 0 } + properties + payload
}

/// A user property, as one of a packet's properties.
pub fn user_property(to: &mut Vec<u8>, name: &str, value: &str) {
    to.push(USER_PROPERTY);
    for part in [name, value] {
        // Only the gateway's own short names and values are written here.
        to.extend_from_slice(&u16::try_from(part.len()).unwrap_or(u16::MAX).to_be_bytes());
        to.extend_from_slice(part.as_bytes());
    }
}

/// The answer to a PINGREQ.
pub fn pingresp(to: &mut Vec<u8>) {
    to.extend_from_slice(&[0xD0, 0]);
}

/// A DISCONNECT with its reason. MQTT 3.1.1 has no such packet from a server: nothing is written.
pub fn disconnect(to: &mut Vec<u8>, form: PacketForm, reason: ReasonCode, words: &str) {
    if form.version != MqttVersion::V5 {
        return;
    }
    let mut properties = Vec::new();
    text_property(&mut properties, REASON_STRING, words);
    let fits = properties.len() + 8 <= form.packet_bytes_max as usize;
    packet(to, 0xE0, &[reason as u8], fits.then_some(properties.as_slice()), &[]);
}

/// Writes the fixed header, `head`, the properties (if any) with their length, and `tail`.
fn packet(to: &mut Vec<u8>, first: u8, head: &[u8], properties: Option<&[u8]>, tail: &[u8]) {
    let mut length = head.len() + tail.len();
    if let Some(properties) = properties {
        length += varint_bytes(properties.len()) + properties.len();
    }
    to.push(first);
    varint(to, length);
    to.extend_from_slice(head);
    if let Some(properties) = properties {
        varint(to, properties.len());
        to.extend_from_slice(properties);
    }
    to.extend_from_slice(tail);
}

fn number_property(to: &mut Vec<u8>, id: u8, bytes: &[u8]) {
    to.push(id);
    to.extend_from_slice(bytes);
}

/// A text, as one of a packet's properties.
pub fn text_property(to: &mut Vec<u8>, id: u8, text: &str) {
    // Reason strings and client identifiers are far shorter than the limit of 65,535 bytes.
    let bytes = &text.as_bytes()[..text.floor_char_boundary(usize::from(u16::MAX))];
    to.push(id);
    to.extend_from_slice(&u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes());
    to.extend_from_slice(bytes);
}

/// How many bytes `value` takes as a variable byte integer (MQTT 5 section 1.5.5).
pub fn varint_bytes(value: usize) -> usize {
    match value {
        0..0x80 => 1,
        0x80..0x4000 => 2,
        0x4000..0x20_0000 => 3,
        _ => 4,
    }
}

/// A variable byte integer (section 1.5.5).
pub fn varint(to: &mut Vec<u8>, mut value: usize) {
    loop {
        let low = value.to_le_bytes()[0] & 0x7f;
        value >>= 7;
        if value == 0 {
            return to.push(low);
        }
        to.push(low | 0x80);
    }
}
