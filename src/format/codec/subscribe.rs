//! SUBSCRIBE (section 3.8) and UNSUBSCRIBE (section 3.10).

use super::properties::{AllowedProperties, Properties};
use super::{MqttVersion, PacketReader, Violation};

/// A SUBSCRIBE.
#[derive(Debug)]
pub struct SubscribePacket<'a> {
    /// For the answer.
    pub packet_id: u16,
    /// MQTT 5.
    pub properties: Properties<'a>,
    /// The topic filters, at least one.
    pub filters: Vec<SubscribeFilter<'a>>,
}

/// One of a SUBSCRIBE's topic filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubscribeFilter<'a> {
    /// The filter with its wildcards, and with the prefix `$share/{group}/` if it is shared.
    pub filter: &'a str,
    /// The highest QoS wanted, 0 to 2.
    pub qos: u8,
    /// The subscriber's own messages are not wanted.
    pub no_local: bool,
    /// Messages keep the retain flag with which they were published.
    pub retain_as_published: bool,
    /// When retained messages are sent: 0 always, 1 only if the subscription is new, 2 never.
    pub retain_handling: u8,
}

impl<'a> SubscribePacket<'a> {
    pub(super) fn decode(mut reader: PacketReader<'a>, version: MqttVersion) -> Result<Self, Violation> {
        let v5 = version == MqttVersion::V5;
        let packet_id = reader.packet_id()?;
        let properties = if v5 {
            Properties::read(&mut reader, AllowedProperties::SUBSCRIBE)?
        } else {
            Properties::default()
        };
        let mut filters = Vec::new();
        while !reader.is_empty() {
            let filter = read_filter(&mut reader)?;
            let options = reader.u8()?;
            let reserved = if v5 { 0xC0 } else { 0xFC };
            let qos = options & 3;
            if options & reserved != 0 && version != MqttVersion::V31 {
                return Err(Violation::malformed("reserved bits of a subscription's options are set"));
            }
            if qos == 3 {
                // Section 3.8.3.1. In 3.1.1 every violation just closes the connection.
                return Err(Violation::protocol("QoS 3 does not exist"));
            }
            let retain_handling = if v5 { options >> 4 & 3 } else { 0 };
            if retain_handling == 3 {
                return Err(Violation::protocol("retain handling 3 does not exist"));
            }
            let no_local = v5 && options & 4 != 0;
            if no_local && filter.starts_with("$share/") {
                return Err(Violation::protocol("a shared subscription cannot have no-local"));
            }
            let retain_as_published = v5 && options & 8 != 0;
            filters.push(SubscribeFilter { filter, qos, no_local, retain_as_published, retain_handling });
        }
        if filters.is_empty() {
            return Err(Violation::protocol("a SUBSCRIBE without a topic filter"));
        }
        Ok(Self { packet_id, properties, filters })
    }
}

/// An UNSUBSCRIBE.
#[derive(Debug)]
pub struct UnsubscribePacket<'a> {
    /// For the answer.
    pub packet_id: u16,
    /// The topic filters, at least one.
    pub filters: Vec<&'a str>,
}

impl<'a> UnsubscribePacket<'a> {
    pub(super) fn decode(mut reader: PacketReader<'a>, version: MqttVersion) -> Result<Self, Violation> {
        let packet_id = reader.packet_id()?;
        if version == MqttVersion::V5 {
            Properties::read(&mut reader, AllowedProperties::UNSUBSCRIBE)?;
        }
        let mut filters = Vec::new();
        while !reader.is_empty() {
            filters.push(read_filter(&mut reader)?);
        }
        if filters.is_empty() {
            return Err(Violation::protocol("an UNSUBSCRIBE without a topic filter"));
        }
        Ok(Self { packet_id, filters })
    }
}

/// Reads a topic filter: at least one character, wildcards only as whole levels, `#` only as the last
/// (section 4.7), and after `$share/` a name without wildcards and then a filter (section 4.8.2).
fn read_filter<'a>(reader: &mut PacketReader<'a>) -> Result<&'a str, Violation> {
    let whole = reader.text()?;
    // 0x8F is for a filter that is well-formed and not accepted.
    let invalid = |text| Err(Violation::malformed(text));
    let mut filter = whole;
    if let Some(shared) = whole.strip_prefix("$share/") {
        let Some((name, behind)) = shared.split_once('/') else {
            return invalid("a shared subscription has a name and a topic filter");
        };
        if name.is_empty() || name.contains(['+', '#']) {
            return invalid("the name of a shared subscription has characters, and none is a wildcard");
        }
        filter = behind;
    }
    if filter.is_empty() {
        return invalid("a topic filter needs at least one character");
    }
    let mut levels = filter.split('/').peekable();
    while let Some(level) = levels.next() {
        if level.len() > 1 && level.contains(['+', '#']) {
            return invalid("a wildcard takes a whole level of a topic filter");
        }
        if level == "#" && levels.peek().is_some() {
            return invalid("nothing comes behind # in a topic filter");
        }
    }
    Ok(whole)
}
