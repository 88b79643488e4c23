//! MQTT packets as bytes: a strict reader of clients' packets, and a writer of the server's.
//!
//! This is the gate: a frame that the specification forbids is rejected here, with the reason code that
//! the specification gives, and no other module sees it. Packets are decoded in place: texts and
//! payloads borrow from the socket's buffer. Section numbers are those of MQTT 5.0 (OASIS, 2019); 3.1.1
//! has the same rule unless noted.

pub mod connect;
pub mod properties;
pub mod publish;
mod reader;
pub mod subscribe;
pub mod write;

use properties::{AllowedProperties, Properties};
use reader::PacketReader;

pub use connect::ConnectPacket;
pub use publish::PublishPacket;
pub use subscribe::{SubscribePacket, UnsubscribePacket};

/// The protocol versions; CONNECT says which one a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MqttVersion {
    /// 3.1, `MQIsdp`.
    V31,
    /// 3.1.1.
    V311,
    /// 5.0.
    V5,
}

/// Reason codes of MQTT 5 (section 2.4), as far as Headgate sends them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub enum ReasonCode {
    Success = 0x00,
    PacketIdentifierNotFound = 0x92,
    QuotaExceeded = 0x97,
    ImplementationSpecificError = 0x83,
    MalformedPacket = 0x81,
    ProtocolError = 0x82,
    UnsupportedProtocolVersion = 0x84,
    ClientIdentifierNotValid = 0x85,
    NotAuthorized = 0x87,
    ServerUnavailable = 0x88,
    ServerBusy = 0x89,
    ServerShuttingDown = 0x8B,
    BadAuthenticationMethod = 0x8C,
    KeepAliveTimeout = 0x8D,
    SessionTakenOver = 0x8E,
    TopicFilterInvalid = 0x8F,
    TopicNameInvalid = 0x90,
    PacketIdentifierInUse = 0x91,
    ReceiveMaximumExceeded = 0x93,
    TopicAliasInvalid = 0x94,
    PacketTooLarge = 0x95,
    MessageRateTooHigh = 0x96,
    AdministrativeAction = 0x98,
    PayloadFormatInvalid = 0x99,
    QosNotSupported = 0x9B,
    ConnectionRateExceeded = 0x9F,
}

/// A violation that closes the connection: the reason code and a description.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Violation {
    /// The reason code for an MQTT 5 client.
    pub reason: ReasonCode,
    /// The description, for people.
    pub text: &'static str,
}

impl Violation {
    /// The bytes do not parse (0x81).
    pub const fn malformed(text: &'static str) -> Self {
        Self { reason: ReasonCode::MalformedPacket, text }
    }

    /// The bytes parse, but are not allowed (0x82).
    pub const fn protocol(text: &'static str) -> Self {
        Self { reason: ReasonCode::ProtocolError, text }
    }
}

/// A packet from a connected client.
#[derive(Debug)]
pub enum MqttPacket<'a> {
    /// A second CONNECT, which ends the connection.
    Connect,
    /// A message.
    Publish(PublishPacket<'a>),
    /// QoS 1, the answer to a message that the client was sent.
    Puback(AckPacket),
    /// QoS 2, a receiver's first answer.
    Pubrec(AckPacket),
    /// QoS 2, a sender's second packet.
    Pubrel(AckPacket),
    /// QoS 2, a receiver's second answer.
    Pubcomp(AckPacket),
    /// Topic filters to subscribe.
    Subscribe(SubscribePacket<'a>),
    /// Topic filters to give up.
    Unsubscribe(UnsubscribePacket<'a>),
    /// A sign of life.
    Pingreq,
    /// The client ends the connection.
    Disconnect(DisconnectPacket),
    /// Extended authentication, which is not supported.
    Auth,
}

/// PUBACK, PUBREC, PUBREL or PUBCOMP from a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AckPacket {
    /// The identifier of the message.
    pub packet_id: u16,
    /// Success below 0x80.
    pub reason: u8,
}

/// DISCONNECT from a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DisconnectPacket {
    /// 0 for a normal end, 0x04 if the will is to be published anyway.
    pub reason: u8,
    /// A new session expiry interval, in seconds.
    pub session_expiry_s: Option<u32>,
}

/// A whole packet in a buffer: its first byte, what follows the remaining length, and its size in
/// bytes.
#[derive(Debug, PartialEq, Eq)]
pub struct MqttFrame<'a> {
    first: u8,
    body: &'a [u8],
    /// Header and body, in bytes.
    pub bytes: usize,
}

impl<'a> MqttFrame<'a> {
    /// Finds the packet at the beginning of `buffer`. `Ok(None)` if it is not complete yet.
    ///
    /// # Errors
    /// [`ReasonCode::MalformedPacket`] as soon as the fixed header breaks a rule, and
    /// [`ReasonCode::PacketTooLarge`] as soon as the remaining length shows that the packet takes more
    /// than `bytes_max`. Neither waits for the rest.
    #[inline]
    pub fn split(
        buffer: &'a [u8],
        bytes_max: usize,
        version: Option<MqttVersion>,
    ) -> Result<Option<Self>, Violation> {
        let Some((&first, rest)) = buffer.split_first() else { return Ok(None) };
        check_flags(first, version)?;
        let mut length = 0_usize;
        for (i, &byte) in rest.iter().take(4).enumerate() {
            length |= usize::from(byte & 0x7f) << (7 * i);
            if byte & 0x80 != 0 {
                continue;
            }
            if byte == 0 && i > 0 && version == Some(MqttVersion::V5) {
                return Err(OVERLONG_LENGTH);
            }
            let header = 2 + i;
            if header + length > bytes_max {
                return Err(Violation {
                    reason: ReasonCode::PacketTooLarge,
                    text: "the packet is over the maximum packet size",
                });
            }
            let bytes = header + length;
            return Ok(buffer.get(header..bytes).map(|body| Self { first, body, bytes }));
        }
        if rest.len() >= 4 {
            return Err(Violation::malformed("the remaining length takes more than four bytes"));
        }
        Ok(None)
    }

    /// The size in bytes of the packet at the beginning of `buffer`, even if it is not complete. For
    /// packets that this codec wrote: nothing is checked.
    #[inline]
    pub fn packet_bytes(buffer: &[u8]) -> Option<usize> {
        let mut length = 0_usize;
        for (i, &byte) in buffer.get(1..)?.iter().take(4).enumerate() {
            length |= usize::from(byte & 0x7f) << (7 * i);
            if byte & 0x80 == 0 {
                return Some(2 + i + length);
            }
        }
        None
    }

    /// Whether it is a CONNECT, the only packet that may come first.
    pub fn is_connect(&self) -> bool {
        self.first >> 4 == 1
    }

    /// Decodes the first packet of a connection. An error comes with the packet's version, if known, so
    /// that the refusal can be in that version's form.
    pub fn connect(&self) -> Result<ConnectPacket<'a>, (Option<MqttVersion>, Violation)> {
        let connect = ConnectPacket::decode(self.body)?;
        if self.first & 0x0f != 0 && connect.version != MqttVersion::V31 {
            return Err((None, FLAGS_NOT_ZERO));
        }
        // Only MQTT 5 forbids this, so it is checked once the version is known.
        let header_bytes = self.bytes - self.body.len();
        if connect.version == MqttVersion::V5 && header_bytes > 1 + write::varint_bytes(self.body.len()) {
            return Err((Some(MqttVersion::V5), OVERLONG_LENGTH));
        }
        Ok(connect)
    }

    /// Whether it is a PUBLISH.
    #[inline]
    pub fn is_publish(&self) -> bool {
        self.first >> 4 == 3
    }

    /// Decodes a PUBLISH.
    ///
    /// # Errors
    /// The first rule that the packet breaks.
    #[inline]
    pub fn decode_publish(&self, version: MqttVersion) -> Result<PublishPacket<'a>, Violation> {
        PublishPacket::decode(self.first, self.body, version == MqttVersion::V5)
    }

    /// Decodes a packet of a client that has connected.
    ///
    /// # Errors
    /// The first rule that the packet breaks.
    #[inline]
    pub fn decode(&self, version: MqttVersion) -> Result<MqttPacket<'a>, Violation> {
        let v5 = version == MqttVersion::V5;
        let reader = PacketReader::new(self.body);
        match self.first >> 4 {
            1 => Ok(MqttPacket::Connect),
            3 => self.decode_publish(version).map(MqttPacket::Publish),
            4 => decode_ack(reader, v5, MESSAGE_ACK_REASONS).map(MqttPacket::Puback),
            5 => decode_ack(reader, v5, MESSAGE_ACK_REASONS).map(MqttPacket::Pubrec),
            6 => decode_ack(reader, v5, RELEASE_REASONS).map(MqttPacket::Pubrel),
            7 => decode_ack(reader, v5, RELEASE_REASONS).map(MqttPacket::Pubcomp),
            8 => SubscribePacket::decode(reader, version).map(MqttPacket::Subscribe),
            10 => UnsubscribePacket::decode(reader, version).map(MqttPacket::Unsubscribe),
            12 if self.body.is_empty() => Ok(MqttPacket::Pingreq),
            12 => Err(Violation::malformed("a PINGREQ has no content")),
            14 => decode_disconnect(reader, v5).map(MqttPacket::Disconnect),
            15 if v5 => decode_auth(reader).map(|()| MqttPacket::Auth),
            0 | 15 => Err(Violation::malformed("packet type 0, and 15 before MQTT 5, are reserved")),
            _ => Err(Violation::protocol("only a server may send this packet")),
        }
    }
}

const OVERLONG_LENGTH: Violation =
    Violation::malformed("the remaining length takes more bytes than it needs");

const FLAGS_NOT_ZERO: Violation = Violation::malformed("the flags of the fixed header have to be 0");

/// The reason codes of PUBACK and PUBREC (sections 3.4.2.1 and 3.5.2.1).
const MESSAGE_ACK_REASONS: &[u8] = &[0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99];
/// The reason codes of PUBREL and PUBCOMP (sections 3.6.2.1 and 3.7.2.1).
const RELEASE_REASONS: &[u8] = &[0x00, 0x92];

/// Checks the flags of the fixed header, which each packet type but PUBLISH prescribes (section
/// 2.1.3).
fn check_flags(first: u8, version: Option<MqttVersion>) -> Result<(), Violation> {
    let flags = first & 0x0f;
    match (first >> 4, flags) {
        (3, _) if flags & 0b0110 == 0b0110 => Err(Violation::malformed("QoS 3 does not exist")),
        // MQTT 3.1 (section 2.1) marks every repeated packet as a duplicate, and allows that at QoS 0.
        (3, _) | (6 | 8 | 10, 0b1010) if version == Some(MqttVersion::V31) => Ok(()),
        (3, _) if flags & 0b1110 == 0b1000 => {
            Err(Violation::malformed("a PUBLISH with QoS 0 cannot be a duplicate"))
        }
        (3, _) | (6 | 8 | 10, 0b0010) => Ok(()),
        (6 | 8 | 10, _) => Err(Violation::malformed("the flags of the fixed header have to be 2")),
        // MQTT 3.1 (section 3.1) does not use them; the version is in what follows.
        (1, _) if version.is_none() => Ok(()),
        (_, 0) => Ok(()),
        _ => Err(FLAGS_NOT_ZERO),
    }
}

fn decode_ack(mut reader: PacketReader<'_>, v5: bool, reasons: &[u8]) -> Result<AckPacket, Violation> {
    let packet_id = reader.packet_id()?;
    let mut reason = 0;
    if v5 && !reader.is_empty() {
        reason = reader.u8()?;
        if !reasons.contains(&reason) {
            return Err(Violation::protocol("an acknowledgement with a reason code that it cannot have"));
        }
        if !reader.is_empty() {
            Properties::read(&mut reader, AllowedProperties::PUBACK)?;
        }
    }
    reader.expect_end()?;
    Ok(AckPacket { packet_id, reason })
}

fn decode_disconnect(mut reader: PacketReader<'_>, v5: bool) -> Result<DisconnectPacket, Violation> {
    let mut packet = DisconnectPacket { reason: 0, session_expiry_s: None };
    if v5 && !reader.is_empty() {
        packet.reason = reader.u8()?;
        // The codes that a client may send: section 3.14.2.1.
        if !matches!(packet.reason, 0x00 | 0x04 | 0x80..=0x83 | 0x90 | 0x93..=0x99) {
            return Err(Violation::protocol("a DISCONNECT with a reason code that clients do not send"));
        }
        if !reader.is_empty() {
            let properties = Properties::read(&mut reader, AllowedProperties::DISCONNECT)?;
            packet.session_expiry_s = properties.u32(properties::SESSION_EXPIRY);
        }
    }
    reader.expect_end()?;
    Ok(packet)
}

fn decode_auth(mut reader: PacketReader<'_>) -> Result<(), Violation> {
    if !reader.is_empty() {
        if !matches!(reader.u8()?, 0x00 | 0x18 | 0x19) {
            return Err(Violation::protocol("an AUTH with a reason code that does not exist"));
        }
        if !reader.is_empty() {
            Properties::read(&mut reader, AllowedProperties::AUTH)?;
        }
    }
    reader.expect_end()
}

#[cfg(test)]
mod tests;
