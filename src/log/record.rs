//! Records as bytes: how messages are gathered into sections on their way in, and how a batch is
//! taken apart again on its way out.
//!
//! A [`Section`] holds messages of one origin (datasource, key, transport, moment); a front fills
//! one per read of its socket, so what the messages share is written once. A [`Batch`] is what one
//! commit of the log holds: the heads of its sections, then the records of all of them. A consumer
//! that wants one datasource reads the heads and skips the rest.
//!
//! Heads and records are [postcard](https://postcard.jamesmunns.com/wire-format): varints, and
//! lengths before text and bytes. The module docs of [`crate::log`] have the layout.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::message::{DatasourceId, KeyId, Lease, Offset, RecordFlags, RecordRef, TimeMicros, Transport};

/// What the records of a section have in common, as it is kept.
#[derive(Serialize, Deserialize)]
struct SectionHead<'a> {
    datasource: &'a str,
    key_id: KeyId,
    transport: Transport,
    received_at: TimeMicros,
    records: u32,
    bytes: u32,
}

/// One record, as it is kept.
#[derive(Serialize, Deserialize)]
struct RecordBody<'a> {
    flags: RecordFlags,
    topic: &'a str,
    content_type: &'a str,
    #[serde(borrow, with = "serde_bytes")]
    properties: &'a [u8],
    #[serde(borrow, with = "serde_bytes")]
    payload: &'a [u8],
}

/// Lets postcard write to the end of a vector.
struct Appender<'a>(&'a mut Vec<u8>);

impl postcard::ser_flavors::Flavor for Appender<'_> {
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

fn put(value: &impl Serialize, to: &mut Vec<u8>) {
    postcard::serialize_with_flavor(value, Appender(to))
        .expect("a vector takes all, and every length is known before it is written");
}

/// Messages of one origin, encoded, on their way into the log.
pub struct Section {
    /// Whose they are.
    pub datasource: DatasourceId,
    /// The key that let them in.
    pub key_id: KeyId,
    /// Ends when that key dies; the writer then leaves the section out.
    pub lease: Lease,
    /// Which way they came.
    pub transport: Transport,
    /// When they were read from their socket.
    pub received_at: TimeMicros,
    records: u32,
    payload_bytes: u64,
    bytes: Vec<u8>,
}

impl Section {
    /// A section without messages.
    pub fn new(
        datasource: DatasourceId,
        key_id: KeyId,
        lease: Lease,
        transport: Transport,
        received_at: TimeMicros,
    ) -> Self {
        Self {
            datasource,
            key_id,
            lease,
            transport,
            received_at,
            records: 0,
            payload_bytes: 0,
            bytes: Vec::new(),
        }
    }

    /// Makes room for `bytes` more, so that filling the section allocates once.
    pub fn reserve(&mut self, bytes: usize) {
        self.bytes.reserve(bytes);
    }

    /// Adds one message: its topic, payload, media type (or empty), MQTT 5 properties in wire form
    /// (or empty), and flags.
    pub fn push(
        &mut self,
        topic: &str,
        payload: &[u8],
        content_type: &str,
        properties: &[u8],
        flags: RecordFlags,
    ) {
        put(&RecordBody { flags, topic, content_type, properties, payload }, &mut self.bytes);
        self.records += 1;
        self.payload_bytes += payload.len() as u64;
    }

    /// How many messages it holds.
    pub fn records(&self) -> u32 {
        self.records
    }

    /// The sum of their payloads, in bytes.
    pub fn payload_bytes(&self) -> u64 {
        self.payload_bytes
    }

    /// What it takes in memory and, about, on disk, in bytes.
    pub fn weight(&self) -> usize {
        self.bytes.len() + self.datasource.as_str().len() + 32
    }

    fn head(&self) -> SectionHead<'_> {
        SectionHead {
            datasource: self.datasource.as_str(),
            key_id: self.key_id,
            transport: self.transport,
            received_at: self.received_at,
            records: self.records,
            bytes: u32::try_from(self.bytes.len()).expect("in-flight bytes are bounded far below 4 GiB"),
        }
    }
}

/// Writes the body of a batch: the number of sections, their heads, their records.
pub(super) fn put_body(sections: &[&Section], to: &mut Vec<u8>) {
    put(&sections.len(), to);
    for section in sections {
        put(&section.head(), to);
    }
    for section in sections {
        to.extend_from_slice(&section.bytes);
    }
}

/// One commit of the log: records with consecutive offsets. Cheap to clone.
#[derive(Clone)]
pub struct Batch {
    first_offset: Offset,
    records: u32,
    /// The body as it is on disk; checked when the batch was made.
    body: Bytes,
}

impl Batch {
    /// A batch whose body this process has just encoded.
    pub(super) fn encoded(first_offset: Offset, records: u32, body: Bytes) -> Self {
        Self { first_offset, records, body }
    }

    /// A batch whose body comes from a disk: every length in it is checked, so that reading its
    /// records cannot fail later. `None` if it is not a body that [`put_body`] wrote.
    pub(super) fn check(first_offset: Offset, records: u32, body: Bytes) -> Option<Self> {
        let mut sections = Sections::of(&body)?;
        let mut seen = 0_u32;
        while sections.left > 0 {
            let (head, mut bytes) = sections.take()?;
            for _ in 0..head.records {
                let (_, rest) = postcard::take_from_bytes::<RecordBody>(bytes).ok()?;
                bytes = rest;
            }
            if !bytes.is_empty() {
                return None;
            }
            seen = seen.checked_add(head.records)?;
        }
        let whole = sections.records.is_empty() && seen == records;
        whole.then_some(Self { first_offset, records, body })
    }

    /// Its first record's offset.
    pub fn first_offset(&self) -> Offset {
        self.first_offset
    }

    /// The offset after its last record.
    pub fn next_offset(&self) -> Offset {
        self.first_offset + u64::from(self.records)
    }

    /// What it takes in memory, in bytes.
    pub fn weight(&self) -> usize {
        self.body.len()
    }

    /// Its records, in order.
    pub fn records(&self) -> Records<'_> {
        const CHECKED: &str = "the body was checked when the batch was made";
        let sections = Sections::of(&self.body).expect(CHECKED);
        Records { sections, current: None, offset: self.first_offset }
    }
}

/// The sections of a body, one after the other: heads and records advance together.
struct Sections<'a> {
    left: usize,
    heads: &'a [u8],
    records: &'a [u8],
}

impl<'a> Sections<'a> {
    /// Finds where the heads end and the records begin.
    fn of(body: &'a [u8]) -> Option<Self> {
        let (left, heads) = postcard::take_from_bytes::<usize>(body).ok()?;
        let mut rest = heads;
        for _ in 0..left {
            (_, rest) = postcard::take_from_bytes::<SectionHead>(rest).ok()?;
        }
        Some(Self { left, heads, records: rest })
    }

    fn take(&mut self) -> Option<(SectionHead<'a>, &'a [u8])> {
        let (head, heads) = postcard::take_from_bytes::<SectionHead>(self.heads).ok()?;
        let (bytes, records) = self.records.split_at_checked(head.bytes as usize)?;
        self.left = self.left.checked_sub(1)?;
        self.heads = heads;
        self.records = records;
        Some((head, bytes))
    }
}

/// The records of a [`Batch`], in order.
pub struct Records<'a> {
    sections: Sections<'a>,
    current: Option<(SectionHead<'a>, &'a [u8])>,
    offset: Offset,
}

impl<'a> Iterator for Records<'a> {
    type Item = RecordRef<'a>;

    fn next(&mut self) -> Option<RecordRef<'a>> {
        loop {
            if let Some((head, bytes)) = &mut self.current
                && head.records > 0
            {
                let (record, rest) = postcard::take_from_bytes::<RecordBody<'a>>(bytes)
                    .expect("the body was checked when the batch was made");
                head.records -= 1;
                *bytes = rest;
                let offset = self.offset;
                self.offset += 1;
                return Some(RecordRef {
                    offset,
                    datasource: head.datasource,
                    topic: record.topic,
                    payload: record.payload,
                    content_type: record.content_type,
                    properties: record.properties,
                    key_id: head.key_id,
                    transport: head.transport,
                    received_at: head.received_at,
                    flags: record.flags,
                });
            }
            if self.sections.left == 0 {
                return None;
            }
            self.current = Some(self.sections.take().expect("the body was checked when the batch was made"));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn section(datasource: &str, payloads: &[Vec<u8>]) -> Section {
        let id = DatasourceId::new(datasource).expect("slug");
        let mut section =
            Section::new(id, KeyId([7; 6]), Lease::new(), Transport::Mqtt, 1_700_000_000_000_000);
        for payload in payloads {
            section.push("spindle/temp", payload, "application/json", &[], RecordFlags::RETAIN);
        }
        section
    }

    fn body(sections: &[&Section]) -> Bytes {
        let mut body = Vec::new();
        put_body(sections, &mut body);
        body.into()
    }

    #[test]
    fn a_batch_gives_back_what_was_put_in_with_offsets_in_order() {
        let a = section("press-4", &[b"1".to_vec(), b"".to_vec()]);
        let empty = section("nothing", &[]);
        let b = section("oven", &[vec![0xff; 300]]);
        let batch = Batch::check(40, 3, body(&[&a, &empty, &b])).expect("whole");
        assert_eq!((batch.first_offset(), batch.next_offset()), (40, 43));
        let seen: Vec<_> =
            batch.records().map(|r| (r.offset, r.datasource.to_owned(), r.payload.len())).collect();
        assert_eq!(
            seen,
            [(40, "press-4".to_owned(), 1), (41, "press-4".to_owned(), 0), (42, "oven".to_owned(), 300)]
        );
        let first = batch.records().next().expect("a record");
        assert_eq!((first.topic, first.content_type), ("spindle/temp", "application/json"));
        assert!(first.flags.contains(RecordFlags::RETAIN));
    }

    #[test]
    fn a_body_with_another_number_of_records_is_refused() {
        let a = section("press-4", &[b"1".to_vec(), b"2".to_vec()]);
        assert!(Batch::check(0, 1, body(&[&a])).is_none());
        assert!(Batch::check(0, 3, body(&[&a])).is_none());
    }

    proptest! {
        #[test]
        fn any_cut_or_changed_body_is_refused_or_readable_and_never_panics(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..6),
            cut in any::<prop::sample::Index>(),
            flip in any::<prop::sample::Index>(),
            bit in 0..8_u8,
        ) {
            let a = section("press-4", &payloads);
            let whole = body(&[&a]);
            let records = a.records();
            prop_assert!(Batch::check(0, records, whole.clone()).is_some());
            prop_assert!(Batch::check(0, records, whole.slice(..cut.index(whole.len()))).is_none());
            let mut changed = whole.to_vec();
            changed[flip.index(whole.len())] ^= 1 << bit;
            if let Some(batch) = Batch::check(0, records, changed.into()) {
                prop_assert_eq!(batch.records().count(), records as usize);
            }
        }
    }
}
