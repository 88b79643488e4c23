//! PUBLISH (section 3.3), the packet that makes up nearly all traffic.

use super::properties::{AllowedProperties, Properties, TOPIC_ALIAS};
use super::{PacketReader, Violation};

/// A PUBLISH from a client.
#[derive(Debug)]
pub struct PublishPacket<'a> {
    /// The DUP flag: it may have been sent before.
    pub dup: bool,
    /// 0 to 2.
    pub qos: u8,
    /// The retain flag.
    pub retain: bool,
    /// The topic; may be empty in MQTT 5, with a topic alias.
    pub topic: &'a str,
    /// The packet identifier with QoS 1 and 2; otherwise 0.
    pub packet_id: u16,
    /// MQTT 5.
    pub properties: Properties<'a>,
    /// The message.
    pub payload: &'a [u8],
}

impl<'a> PublishPacket<'a> {
    #[inline]
    pub(super) fn decode(first: u8, body: &'a [u8], v5: bool) -> Result<Self, Violation> {
        let mut reader = PacketReader::new(body);
        let qos = first >> 1 & 3;
        let topic = reader.text()?;
        if topic.contains(['+', '#']) {
            return Err(Violation::malformed("the topic of a PUBLISH cannot have wildcards"));
        }
        let packet_id = if qos > 0 { reader.packet_id()? } else { 0 };
        let properties = if v5 {
            Properties::read(&mut reader, AllowedProperties::PUBLISH)?
        } else {
            Properties::default()
        };
        if topic.is_empty() {
            if !v5 {
                return Err(Violation::malformed("a topic needs at least one character"));
            }
            if properties.u16(TOPIC_ALIAS).is_none() {
                return Err(Violation::protocol("a PUBLISH without a topic and without a topic alias"));
            }
        }
        let payload = reader.rest();
        Ok(Self { dup: first & 8 != 0, qos, retain: first & 1 != 0, topic, packet_id, properties, payload })
    }
}
