//! MQTT 5 properties (section 2.2.2): all checked when a packet is read, then looked up one by one
//! without further checks.

use super::{PacketReader, Violation};

/// Property identifiers.
#[allow(missing_docs, reason = "the names are the specification's")]
mod ids {
    pub const PAYLOAD_FORMAT: u8 = 0x01;
    pub const MESSAGE_EXPIRY: u8 = 0x02;
    pub const CONTENT_TYPE: u8 = 0x03;
    pub const RESPONSE_TOPIC: u8 = 0x08;
    pub const CORRELATION_DATA: u8 = 0x09;
    pub const SUBSCRIPTION_IDENTIFIER: u8 = 0x0B;
    pub const SESSION_EXPIRY: u8 = 0x11;
    pub const ASSIGNED_CLIENT_IDENTIFIER: u8 = 0x12;
    pub const SERVER_KEEP_ALIVE: u8 = 0x13;
    pub const AUTHENTICATION_METHOD: u8 = 0x15;
    pub const AUTHENTICATION_DATA: u8 = 0x16;
    pub const REQUEST_PROBLEM_INFORMATION: u8 = 0x17;
    pub const WILL_DELAY: u8 = 0x18;
    pub const REQUEST_RESPONSE_INFORMATION: u8 = 0x19;
    pub const REASON_STRING: u8 = 0x1F;
    pub const RECEIVE_MAXIMUM: u8 = 0x21;
    pub const TOPIC_ALIAS_MAXIMUM: u8 = 0x22;
    pub const TOPIC_ALIAS: u8 = 0x23;
    pub const MAXIMUM_QOS: u8 = 0x24;
    pub const USER_PROPERTY: u8 = 0x26;
    pub const MAXIMUM_PACKET_SIZE: u8 = 0x27;
    pub const WILDCARD_SUBSCRIPTION_AVAILABLE: u8 = 0x28;
    pub const SUBSCRIPTION_IDENTIFIER_AVAILABLE: u8 = 0x29;
    pub const SHARED_SUBSCRIPTION_AVAILABLE: u8 = 0x2A;
}
pub use ids::*;

/// The properties that a packet may have.
#[derive(Clone, Copy)]
pub struct AllowedProperties(u64);

impl AllowedProperties {
    /// CONNECT.
    pub const CONNECT: AllowedProperties = AllowedProperties::from_ids(&[
        SESSION_EXPIRY,
        RECEIVE_MAXIMUM,
        MAXIMUM_PACKET_SIZE,
        TOPIC_ALIAS_MAXIMUM,
        REQUEST_RESPONSE_INFORMATION,
        REQUEST_PROBLEM_INFORMATION,
        USER_PROPERTY,
        AUTHENTICATION_METHOD,
        AUTHENTICATION_DATA,
    ]);
    /// The will in a CONNECT.
    pub const WILL: AllowedProperties = AllowedProperties::from_ids(&[
        WILL_DELAY,
        PAYLOAD_FORMAT,
        MESSAGE_EXPIRY,
        CONTENT_TYPE,
        RESPONSE_TOPIC,
        CORRELATION_DATA,
        USER_PROPERTY,
    ]);
    /// PUBLISH from a client.
    pub const PUBLISH: AllowedProperties = AllowedProperties::from_ids(&[
        PAYLOAD_FORMAT,
        MESSAGE_EXPIRY,
        TOPIC_ALIAS,
        RESPONSE_TOPIC,
        CORRELATION_DATA,
        USER_PROPERTY,
        CONTENT_TYPE,
    ]);
    /// PUBACK, PUBREC, PUBREL, PUBCOMP.
    pub const PUBACK: AllowedProperties = AllowedProperties::from_ids(&[REASON_STRING, USER_PROPERTY]);
    /// SUBSCRIBE.
    pub const SUBSCRIBE: AllowedProperties =
        AllowedProperties::from_ids(&[SUBSCRIPTION_IDENTIFIER, USER_PROPERTY]);
    /// UNSUBSCRIBE.
    pub const UNSUBSCRIBE: AllowedProperties = AllowedProperties::from_ids(&[USER_PROPERTY]);
    /// DISCONNECT from a client.
    pub const DISCONNECT: AllowedProperties =
        AllowedProperties::from_ids(&[SESSION_EXPIRY, REASON_STRING, USER_PROPERTY]);
    /// AUTH.
    pub const AUTH: AllowedProperties = AllowedProperties::from_ids(&[
        AUTHENTICATION_METHOD,
        AUTHENTICATION_DATA,
        REASON_STRING,
        USER_PROPERTY,
    ]);

    const fn from_ids(ids: &[u8]) -> Self {
        let mut set = 0;
        let mut i = 0;
        while i < ids.len() {
            set |= 1 << ids[i];
            i += 1;
        }
        Self(set)
    }
}

/// One property's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PropertyValue<'a> {
    /// One, two or four bytes, or a variable byte integer.
    Number(u32),
    /// UTF-8 text.
    Text(&'a str),
    /// Bytes.
    Binary(&'a [u8]),
    /// A user property: name and value.
    Pair(&'a str, &'a str),
}

/// A packet's properties, each checked to be allowed and well-formed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Properties<'a> {
    bytes: &'a [u8],
}

impl<'a> Properties<'a> {
    /// Reads and checks the properties at `reader`.
    ///
    /// # Errors
    /// A property that is malformed, not `allowed`, or repeated (section 2.2.2.2).
    pub fn read(reader: &mut PacketReader<'a>, allowed: AllowedProperties) -> Result<Self, Violation> {
        let length = reader.varint()?;
        let bytes = reader.bytes(length as usize)?;
        let mut seen = 0_u64;
        let mut rest = PacketReader::new(bytes);
        while !rest.is_empty() {
            let (id, value) = read_property(&mut rest)?;
            let bit = 1_u64 << id;
            if allowed.0 & bit == 0 {
                return Err(match id {
                    // Allowed in a PUBLISH, but only from a server (section 3.3.4).
                    SUBSCRIPTION_IDENTIFIER if allowed.0 == AllowedProperties::PUBLISH.0 => {
                        Violation::protocol("only a server sends a subscription identifier with a message")
                    }
                    _ => Violation::malformed("a property that this packet cannot have"),
                });
            }
            if seen & bit != 0 && id != USER_PROPERTY {
                return Err(Violation::protocol("a property that can be given once is given twice"));
            }
            seen |= bit;
            check_value(id, &value)?;
        }
        Ok(Self { bytes })
    }

    /// Properties in wire form that were checked before.
    pub fn from_wire(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// All properties in order: identifier, value, and bytes on the wire.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = (u8, PropertyValue<'a>, &'a [u8])> + use<'a> {
        let mut rest = PacketReader::new(self.bytes);
        std::iter::from_fn(move || {
            let before = rest.rest();
            // An error cannot occur: the properties were checked before.
            let (id, value) = read_property(&mut rest).ok()?;
            Some((id, value, &before[..before.len() - rest.rest().len()]))
        })
    }

    /// Their size on the wire, in bytes, without its length.
    pub fn wire_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there are no properties.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The value of a number property.
    pub fn u32(&self, id: u8) -> Option<u32> {
        self.iter().find_map(|(found, value, _)| match value {
            PropertyValue::Number(number) if found == id => Some(number),
            _ => None,
        })
    }

    /// The value of a number property that takes one or two bytes on the wire.
    pub fn u16(&self, id: u8) -> Option<u16> {
        self.u32(id).and_then(|number| u16::try_from(number).ok())
    }

    /// The user properties: names and values.
    pub fn user(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        self.iter().filter_map(|(_, value, _)| match value {
            PropertyValue::Pair(name, value) => Some((name, value)),
            _ => None,
        })
    }
}

fn read_property<'a>(reader: &mut PacketReader<'a>) -> Result<(u8, PropertyValue<'a>), Violation> {
    const UNKNOWN: Violation = Violation::malformed("a property that does not exist");
    let id = u8::try_from(reader.varint()?).map_err(|_| UNKNOWN)?;
    let value = match id {
        PAYLOAD_FORMAT
        | REQUEST_PROBLEM_INFORMATION
        | REQUEST_RESPONSE_INFORMATION
        | MAXIMUM_QOS
        | 0x25
        | WILDCARD_SUBSCRIPTION_AVAILABLE
        | SUBSCRIPTION_IDENTIFIER_AVAILABLE
        | SHARED_SUBSCRIPTION_AVAILABLE => PropertyValue::Number(reader.u8()?.into()),
        SERVER_KEEP_ALIVE | RECEIVE_MAXIMUM | TOPIC_ALIAS_MAXIMUM | TOPIC_ALIAS => {
            PropertyValue::Number(reader.u16()?.into())
        }
        MESSAGE_EXPIRY | SESSION_EXPIRY | WILL_DELAY | MAXIMUM_PACKET_SIZE => {
            PropertyValue::Number(reader.u32()?)
        }
        SUBSCRIPTION_IDENTIFIER => PropertyValue::Number(reader.varint()?),
        CONTENT_TYPE
        | RESPONSE_TOPIC
        | ASSIGNED_CLIENT_IDENTIFIER
        | AUTHENTICATION_METHOD
        | 0x1A
        | 0x1C
        | REASON_STRING => PropertyValue::Text(reader.text()?),
        CORRELATION_DATA | AUTHENTICATION_DATA => PropertyValue::Binary(reader.binary()?),
        USER_PROPERTY => PropertyValue::Pair(reader.text()?, reader.text()?),
        _ => return Err(UNKNOWN),
    };
    Ok((id, value))
}

/// Rejects values that a property cannot have.
fn check_value(id: u8, value: &PropertyValue<'_>) -> Result<(), Violation> {
    match (id, value) {
        (RECEIVE_MAXIMUM | MAXIMUM_PACKET_SIZE | SUBSCRIPTION_IDENTIFIER, PropertyValue::Number(0)) => {
            Err(Violation::protocol("a property that cannot be 0 is 0"))
        }
        (
            PAYLOAD_FORMAT | REQUEST_PROBLEM_INFORMATION | REQUEST_RESPONSE_INFORMATION,
            PropertyValue::Number(2..),
        ) => Err(Violation::protocol("a property that is 0 or 1 is neither")),
        (RESPONSE_TOPIC, PropertyValue::Text(topic)) if topic.is_empty() || topic.contains(['+', '#']) => {
            Err(Violation::protocol("a response topic is a topic name, without wildcards"))
        }
        _ => Ok(()),
    }
}
