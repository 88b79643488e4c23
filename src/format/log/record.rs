//! Records as bytes: a section's head, which holds what its records share, and the records
//! themselves, as [postcard](https://postcard.jamesmunns.com/wire-format): varints, and lengths before
//! text and bytes. The module docs of [`crate::log`] have the layout.

use std::cell::Cell;

use serde::{Deserialize, Serialize};

use super::frame::LogFormatVersion;
use super::label::label_at;
use crate::message::{KeyId, Offset, RecordFlags, RecordRef, TimeMicros, Transport};

/// What the records of a section share, as the log stores it.
#[derive(Serialize, Deserialize)]
pub(super) struct SectionHead<'a> {
    pub datasource: &'a str,
    pub key_id: KeyId,
    pub transport: Transport,
    pub publisher: u64,
    pub received_at: TimeMicros,
    /// The ids under which the section is kept once, one after the other; usually none.
    #[serde(borrow, with = "serde_bytes")]
    pub once: &'a [u8],
    /// The topics and media types of the records, each once.
    #[serde(borrow, with = "serde_bytes")]
    pub labels: &'a [u8],
    pub records: u32,
    pub bytes: u32,
    /// Before version 3 each record has its topic and media type itself.
    #[serde(skip)]
    pub labels_inline: bool,
    /// The label that was read last, which is mostly that of the next record too.
    #[serde(skip)]
    pub last_label: Cell<Option<(u32, &'a str, &'a str)>>,
}

/// The head in version 2 of the format.
#[derive(Deserialize)]
struct SectionHeadV2<'a> {
    datasource: &'a str,
    key_id: KeyId,
    transport: Transport,
    publisher: u64,
    received_at: TimeMicros,
    #[serde(borrow, with = "serde_bytes")]
    once: &'a [u8],
    records: u32,
    bytes: u32,
}

impl<'a> From<SectionHeadV2<'a>> for SectionHead<'a> {
    fn from(head: SectionHeadV2<'a>) -> Self {
        let SectionHeadV2 { datasource, key_id, transport, publisher, received_at, once, records, bytes } =
            head;
        Self {
            datasource,
            key_id,
            transport,
            publisher,
            received_at,
            once,
            labels: &[],
            records,
            bytes,
            labels_inline: true,
            last_label: Cell::default(),
        }
    }
}

/// The head in version 1 of the format.
#[derive(Deserialize)]
struct SectionHeadV1<'a> {
    datasource: &'a str,
    key_id: KeyId,
    transport: Transport,
    received_at: TimeMicros,
    records: u32,
    bytes: u32,
}

impl<'a> From<SectionHeadV1<'a>> for SectionHead<'a> {
    fn from(head: SectionHeadV1<'a>) -> Self {
        let SectionHeadV1 { datasource, key_id, transport, received_at, records, bytes } = head;
        let (publisher, once) = (0, &[][..]);
        SectionHeadV2 { datasource, key_id, transport, publisher, received_at, once, records, bytes }.into()
    }
}

impl<'a> SectionHead<'a> {
    /// The topic and the media type at a place of its labels.
    #[inline]
    fn label(&self, at: u32) -> Option<(&'a str, &'a str)> {
        if let Some((last, topic, content_type)) = self.last_label.get()
            && last == at
        {
            return Some((topic, content_type));
        }
        let (topic, content_type) = label_at(self.labels, at)?;
        self.last_label.set(Some((at, topic, content_type)));
        Some((topic, content_type))
    }

    /// The head at the beginning of `bytes`, and the bytes behind it.
    pub(super) fn take(version: LogFormatVersion, bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let taken = match version {
            LogFormatVersion::V1 => {
                postcard::take_from_bytes::<SectionHeadV1>(bytes).map(|(h, rest)| (h.into(), rest))
            }
            LogFormatVersion::V2 => {
                postcard::take_from_bytes::<SectionHeadV2>(bytes).map(|(h, rest)| (h.into(), rest))
            }
            LogFormatVersion::V3 => postcard::take_from_bytes(bytes),
        };
        taken.ok()
    }
}

/// One record, without what its section says of all of its records.
#[derive(Debug, Clone, Copy)]
pub struct RecordBody<'a> {
    /// How it was published.
    pub flags: RecordFlags,
    /// Its topic.
    pub topic: &'a str,
    /// Its media type, or empty.
    pub content_type: &'a str,
    /// Its MQTT 5 properties in wire form, or empty.
    pub properties: &'a [u8],
    /// What its sender sent.
    pub payload: &'a [u8],
    /// When it was measured, if its sender has said so.
    pub event_at: Option<TimeMicros>,
    /// Its note, which its flags have to say, or empty.
    pub note: &'a [u8],
}

/// A record as it is stored, without its event time and its note, which follow if the flags say so.
#[derive(Deserialize)]
#[cfg_attr(test, derive(Serialize))]
pub(super) struct StoredRecord<'a> {
    pub flags: RecordFlags,
    /// Where its topic and media type are in the labels of its section.
    pub label: u32,
    #[serde(borrow, with = "serde_bytes")]
    pub properties: &'a [u8],
    #[serde(borrow, with = "serde_bytes")]
    pub payload: &'a [u8],
}

impl StoredRecord<'_> {
    /// Appends it as postcard does, which takes three times as long.
    #[inline]
    pub(super) fn put(&self, to: &mut Vec<u8>) {
        to.reserve(1 + 3 * VARINT_BYTES_MAX + self.properties.len() + self.payload.len());
        to.push(self.flags.0);
        put_varint(self.label as usize, to);
        for bytes in [self.properties, self.payload] {
            put_varint(bytes.len(), to);
            to.extend_from_slice(bytes);
        }
    }
}

/// What a varint of postcard takes at most.
const VARINT_BYTES_MAX: usize = 10;

#[inline]
fn put_varint(mut value: usize, to: &mut Vec<u8>) {
    while value >= 0x80 {
        to.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    to.push(value.to_le_bytes()[0]);
}

/// A record in versions 1 and 2 of the format.
#[derive(Deserialize)]
struct StoredRecordV2<'a> {
    flags: RecordFlags,
    topic: &'a str,
    content_type: &'a str,
    #[serde(borrow, with = "serde_bytes")]
    properties: &'a [u8],
    #[serde(borrow, with = "serde_bytes")]
    payload: &'a [u8],
}

impl<'a> RecordBody<'a> {
    /// The record at the beginning of `bytes`, in the section with this head, and the bytes behind it.
    pub(super) fn take(head: &SectionHead<'a>, bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (mut record, rest) = if head.labels_inline {
            let (stored, rest) = postcard::take_from_bytes::<StoredRecordV2>(bytes).ok()?;
            let StoredRecordV2 { flags, topic, content_type, properties, payload } = stored;
            (Self { flags, topic, content_type, properties, payload, event_at: None, note: &[] }, rest)
        } else {
            let (stored, rest) = postcard::take_from_bytes::<StoredRecord>(bytes).ok()?;
            let StoredRecord { flags, label, properties, payload } = stored;
            let (topic, content_type) = head.label(label)?;
            (Self { flags, topic, content_type, properties, payload, event_at: None, note: &[] }, rest)
        };
        let mut rest = rest;
        if record.flags.contains(RecordFlags::EVENT_TIMED) && !head.labels_inline {
            let event_at;
            (event_at, rest) = postcard::take_from_bytes::<TimeMicros>(rest).ok()?;
            record.event_at = Some(event_at);
            record.flags = record.flags.without(RecordFlags::EVENT_TIMED);
        }
        if !record.flags.has_note() {
            return Some((record, rest));
        }
        let (note, rest) = postcard::take_from_bytes::<&serde_bytes::Bytes>(rest).ok()?;
        record.note = note;
        Some((record, rest))
    }
}

/// Lets postcard write to the end of a vector.
struct VecFlavor<'a>(&'a mut Vec<u8>);

impl postcard::ser_flavors::Flavor for VecFlavor<'_> {
    type Output = ();

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

#[inline]
pub(super) fn put_postcard(value: &(impl Serialize + ?Sized), to: &mut Vec<u8>) {
    postcard::serialize_with_flavor(value, VecFlavor(to))
        .expect("a vector takes all, and every length is known before it is written");
}

/// A record as consumers see it: its own fields and those of its section's head.
pub(super) fn record_of<'a>(head: &SectionHead<'a>, record: RecordBody<'a>, offset: Offset) -> RecordRef<'a> {
    RecordRef {
        offset,
        datasource: head.datasource,
        topic: record.topic,
        payload: record.payload,
        content_type: record.content_type,
        properties: record.properties,
        key_id: head.key_id,
        transport: head.transport,
        publisher: head.publisher,
        received_at: head.received_at,
        event_at: record.event_at,
        flags: record.flags,
        note: record.note,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_written_as_postcard_writes_it() {
        let bytes = vec![0xa5; 20_000];
        for label in [0, 127, 128, 16_383, 16_384, u32::MAX] {
            for (properties, payload) in [(0, 0), (1, 127), (127, 128), (128, 16_383), (16_384, 20_000)] {
                let (properties, payload) = (&bytes[..properties], &bytes[..payload]);
                let record = StoredRecord { flags: RecordFlags(0xff), label, properties, payload };
                let mut written = vec![1];
                record.put(&mut written);
                let mut expected = vec![1];
                put_postcard(&record, &mut expected);
                assert!(written == expected, "{label} {} {}", properties.len(), payload.len());
            }
        }
    }
}
