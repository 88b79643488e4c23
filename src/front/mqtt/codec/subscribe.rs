//! SUBSCRIBE (section 3.8) and UNSUBSCRIBE (section 3.10).

use super::properties::{Allowed, Properties};
use super::{Reader, Version, Violation};

/// A SUBSCRIBE.
#[derive(Debug)]
pub struct Subscribe<'a> {
    /// For the answer.
    pub packet_id: u16,
    /// MQTT 5.
    pub properties: Properties<'a>,
    /// At least one.
    pub filters: Vec<Filter<'a>>,
}

/// One of a SUBSCRIBE's topic filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filter<'a> {
    /// With its wildcards, and `$share/{group}/` in front if it is shared.
    pub filter: &'a str,
    /// The highest QoS wanted, 0 to 2.
    pub qos: u8,
    /// The subscriber's own messages are not wanted.
    pub no_local: bool,
    /// The retain flag is wanted as the message was published with.
    pub retain_as_published: bool,
    /// 0: retained messages at once, 1: only if the subscription is new, 2: not.
    pub retain_handling: u8,
}

impl<'a> Subscribe<'a> {
    pub(super) fn decode(mut reader: Reader<'a>, version: Version) -> Result<Self, Violation> {
        let v5 = version == Version::V5;
        let packet_id = reader.packet_id()?;
        let properties =
            if v5 { Properties::read(&mut reader, Allowed::SUBSCRIBE)? } else { Properties::default() };
        let mut filters = Vec::new();
        while !reader.is_empty() {
            let filter = reader.text()?;
            let options = reader.u8()?;
            let reserved = if v5 { 0xC0 } else { 0xFC };
            let qos = options & 3;
            if options & reserved != 0 && version != Version::V31 {
                return Err(Violation::malformed("reserved bits of a subscription's options are set"));
            }
            if qos == 3 {
                return Err(Violation::malformed("QoS 3 does not exist"));
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
            filters.push(Filter { filter, qos, no_local, retain_as_published, retain_handling });
        }
        if filters.is_empty() {
            return Err(Violation::protocol("a SUBSCRIBE without a topic filter"));
        }
        Ok(Self { packet_id, properties, filters })
    }
}

/// An UNSUBSCRIBE.
#[derive(Debug)]
pub struct Unsubscribe<'a> {
    /// For the answer.
    pub packet_id: u16,
    /// At least one.
    pub filters: Vec<&'a str>,
}

impl<'a> Unsubscribe<'a> {
    pub(super) fn decode(mut reader: Reader<'a>, version: Version) -> Result<Self, Violation> {
        let packet_id = reader.packet_id()?;
        if version == Version::V5 {
            Properties::read(&mut reader, Allowed::UNSUBSCRIBE)?;
        }
        let mut filters = Vec::new();
        while !reader.is_empty() {
            filters.push(reader.text()?);
        }
        if filters.is_empty() {
            return Err(Violation::protocol("an UNSUBSCRIBE without a topic filter"));
        }
        Ok(Self { packet_id, filters })
    }
}
