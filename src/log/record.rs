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

use super::frame::{FrameFlags, Version};
use super::once::{Once, OnceId};
use crate::message::{DatasourceId, KeyId, Lease, Offset, RecordFlags, RecordRef, TimeMicros, Transport};

/// What the records of a section have in common, as it is kept.
#[derive(Serialize, Deserialize)]
struct SectionHead<'a> {
    datasource: &'a str,
    key_id: KeyId,
    transport: Transport,
    publisher: u64,
    received_at: TimeMicros,
    /// The ids that the section is kept once under, one behind the other; mostly none.
    #[serde(borrow, with = "serde_bytes")]
    once: &'a [u8],
    records: u32,
    bytes: u32,
}

/// As version 1 of the format has it.
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
        Self { datasource, key_id, transport, publisher: 0, received_at, once: &[], records, bytes }
    }
}

impl<'a> SectionHead<'a> {
    /// The head at the beginning of `bytes`, and what is behind it.
    fn take(version: Version, bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let taken = match version {
            Version::V1 => {
                postcard::take_from_bytes::<SectionHeadV1>(bytes).map(|(h, rest)| (h.into(), rest))
            }
            Version::V2 => postcard::take_from_bytes(bytes),
        };
        taken.ok()
    }
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
    /// Stands behind the rest, and only where the flags say so.
    #[serde(skip)]
    note: &'a [u8],
}

impl<'a> RecordBody<'a> {
    /// The record at the beginning of `bytes`, and what is behind it.
    fn take(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (mut record, rest) = postcard::take_from_bytes::<Self>(bytes).ok()?;
        if !record.flags.has_note() {
            return Some((record, rest));
        }
        let (note, rest) = postcard::take_from_bytes::<&serde_bytes::Bytes>(rest).ok()?;
        record.note = note;
        Some((record, rest))
    }
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

pub(super) fn put(value: &(impl Serialize + ?Sized), to: &mut Vec<u8>) {
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
    /// Which client they came from: a hash of it, or 0 if that is not known.
    pub publisher: u64,
    /// When they were read from their socket.
    pub received_at: TimeMicros,
    /// The ids that it is kept once under, one behind the other.
    once: Vec<u8>,
    records: u32,
    payload_bytes: u64,
    retained: bool,
    /// Of its messages and bytes of payload, those that go into quarantine.
    quarantined: (u32, u64),
    noted: bool,
    bytes: Vec<u8>,
}

impl Section {
    /// A section without messages.
    pub fn new(
        datasource: DatasourceId,
        key_id: KeyId,
        lease: Lease,
        transport: Transport,
        publisher: u64,
        received_at: TimeMicros,
    ) -> Self {
        Self {
            datasource,
            key_id,
            lease,
            transport,
            publisher,
            received_at,
            once: Vec::new(),
            records: 0,
            payload_bytes: 0,
            retained: false,
            quarantined: (0, 0),
            noted: false,
            bytes: Vec::new(),
        }
    }

    /// Gives the section an id: it is kept only if none of its ids is known.
    pub fn keep_once(&mut self, id: OnceId) {
        self.once.extend_from_slice(id.as_bytes());
    }

    /// Whether it has ids to be kept once under.
    pub fn is_once(&self) -> bool {
        !self.once.is_empty()
    }

    /// The ids that it is to be kept once under.
    pub(super) fn once(&self) -> impl Iterator<Item = OnceId> {
        OnceId::all_in(&self.once)
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
        put(&RecordBody { flags, topic, content_type, properties, payload, note: &[] }, &mut self.bytes);
        self.retained |= flags.contains(RecordFlags::RETAIN);
        self.records += 1;
        self.payload_bytes += payload.len() as u64;
    }

    /// As [`Section::push`], for a message whose flags say that it has a note.
    pub fn push_noted(
        &mut self,
        topic: &str,
        payload: &[u8],
        content_type: &str,
        properties: &[u8],
        flags: RecordFlags,
        note: &[u8],
    ) {
        debug_assert!(flags.has_note(), "a note without its flag would be taken for the next record");
        self.push(topic, payload, content_type, properties, flags);
        put(serde_bytes::Bytes::new(note), &mut self.bytes);
        self.noted = true;
        if flags.contains(RecordFlags::QUARANTINED) {
            self.quarantined.0 += 1;
            self.quarantined.1 += payload.len() as u64;
        }
    }

    /// A section of the same origin, as what is in the log: without messages, without an end.
    pub(super) fn without_records(&self) -> Self {
        let Self { datasource, key_id, transport, publisher, received_at, .. } = self;
        Self::new(datasource.clone(), *key_id, Lease::new(), *transport, *publisher, *received_at)
    }

    /// Whether what is in `other` could be in this one.
    pub(super) fn has_origin_of(&self, other: &Self) -> bool {
        self.received_at == other.received_at
            && self.key_id == other.key_id
            && self.publisher == other.publisher
            && self.transport == other.transport
            && self.datasource == other.datasource
    }

    /// Adds a message as it is in another section. Returns how many bytes that takes.
    pub(super) fn push_copy(&mut self, record: RecordRef<'_>) -> usize {
        let before = self.bytes.len();
        let RecordRef { topic, payload, content_type, properties, flags, note, .. } = record;
        match flags.has_note() {
            true => self.push_noted(topic, payload, content_type, properties, flags, note),
            false => self.push(topic, payload, content_type, properties, flags),
        }
        self.bytes.len() - before
    }

    /// How many of its messages go into quarantine, and the sum of their payloads in bytes.
    pub fn quarantined(&self) -> (u32, u64) {
        self.quarantined
    }

    /// Whether one of its messages has a note.
    pub(super) fn has_notes(&self) -> bool {
        self.noted
    }

    /// How many messages it holds.
    pub fn records(&self) -> u32 {
        self.records
    }

    /// The sum of their payloads, in bytes.
    pub fn payload_bytes(&self) -> u64 {
        self.payload_bytes
    }

    /// Whether one of them is to be retained.
    pub(super) fn has_retained(&self) -> bool {
        self.retained
    }

    /// Where in it each of its records begins, for [`Section::record`].
    pub(super) fn places(&self) -> Vec<u32> {
        let mut rest = &self.bytes[..];
        let place = |_| {
            let at = self.bytes.len() - rest.len();
            (_, rest) = RecordBody::take(rest).expect(ENCODED);
            u32::try_from(at).expect("in-flight bytes are bounded far below 4 GiB")
        };
        (0..self.records).map(place).collect()
    }

    /// The record at a place; it has no offset yet.
    pub(super) fn record(&self, place: u32) -> RecordRef<'_> {
        let (record, _) = RecordBody::take(&self.bytes[place as usize..]).expect(ENCODED);
        record_of(&self.head(), record, 0)
    }

    /// What it takes in memory and, about, on disk, in bytes.
    pub fn weight(&self) -> usize {
        self.bytes.len() + self.once.len() + self.datasource.as_str().len() + 40
    }

    fn head(&self) -> SectionHead<'_> {
        SectionHead {
            datasource: self.datasource.as_str(),
            key_id: self.key_id,
            transport: self.transport,
            publisher: self.publisher,
            received_at: self.received_at,
            once: &self.once,
            records: self.records,
            bytes: u32::try_from(self.bytes.len()).expect("in-flight bytes are bounded far below 4 GiB"),
        }
    }
}

const ENCODED: &str = "the section has encoded it itself";

/// Writes the body of a batch as far as its records go: the number of sections, their heads, their
/// records.
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
    version: Version,
    flags: FrameFlags,
    first_offset: Offset,
    records: u32,
    /// The body as it is on disk; checked when the batch was made.
    body: Bytes,
}

impl Batch {
    /// A batch whose body this process has just encoded.
    pub(super) fn encoded(flags: FrameFlags, first_offset: Offset, records: u32, body: Bytes) -> Self {
        Self { version: Version::NEWEST, flags, first_offset, records, body }
    }

    /// A batch of what these sections hold.
    pub(super) fn gather(first_offset: Offset, sections: &[Section]) -> Self {
        let mut flags = FrameFlags::default();
        if sections.iter().any(Section::has_retained) {
            flags = flags.with(FrameFlags::RETAINED);
        }
        if sections.iter().any(Section::has_notes) {
            flags = flags.with(FrameFlags::NOTED);
        }
        let mut body = Vec::with_capacity(sections.iter().map(Section::weight).sum::<usize>() + 16);
        put_body(&sections.iter().collect::<Vec<_>>(), &mut body);
        let records = sections.iter().map(Section::records).sum();
        Self::encoded(flags, first_offset, records, body.into())
    }

    /// A batch without records, which says that there are none from wherever its reader is up to an offset.
    pub(super) fn nothing_below(offset: Offset) -> Self {
        Self::gather(offset, &[])
    }

    /// A batch whose body comes from a disk: every length in it is checked, so that reading its
    /// records cannot fail later. `None` if it is not a body that was written here.
    pub(super) fn check(
        version: Version,
        flags: FrameFlags,
        first_offset: Offset,
        records: u32,
        body: Bytes,
    ) -> Option<Self> {
        let mut sections = Sections::of(version, &body)?;
        let mut seen = 0_u32;
        let mut ids = false;
        let mut noted = false;
        while sections.left > 0 {
            let (head, mut bytes) = sections.take()?;
            for _ in 0..head.records {
                let (record, rest) = RecordBody::take(bytes)?;
                noted |= record.flags.has_note();
                bytes = rest;
            }
            if !bytes.is_empty() || head.once.len() % OnceId::BYTES != 0 {
                return None;
            }
            ids |= !head.once.is_empty();
            seen = seen.checked_add(head.records)?;
        }
        let once = flags.contains(FrameFlags::ONCE);
        let behind = if once { Once::take(sections.records)?.1 } else { sections.records };
        let whole = behind.is_empty()
            && seen == records
            && (once || !ids)
            && (!noted || flags.contains(FrameFlags::NOTED));
        whole.then_some(Self { version, flags, first_offset, records, body })
    }

    /// Its first record's offset.
    pub fn first_offset(&self) -> Offset {
        self.first_offset
    }

    /// The offset after its last record.
    pub fn next_offset(&self) -> Offset {
        self.first_offset + u64::from(self.records)
    }

    /// Whether one of its records may be one to retain; a consumer of those may pass over the others.
    pub fn has_retained(&self) -> bool {
        self.flags.contains(FrameFlags::RETAINED)
    }

    /// Whether one of its records may have a note; a consumer of those may pass over the others.
    pub fn has_notes(&self) -> bool {
        self.flags.contains(FrameFlags::NOTED)
    }

    /// What it takes in memory, in bytes.
    pub fn weight(&self) -> usize {
        self.body.len()
    }

    /// Its records, in order, those in quarantine among them.
    pub fn records(&self) -> Records<'_> {
        Records { sections: self.heads(), current: None, offset: self.first_offset }
    }

    /// Its sections, in order. What a consumer does not want is passed over without being decoded.
    pub fn sections(&self) -> impl Iterator<Item = SectionRef<'_>> {
        let mut sections = self.heads();
        let mut first_offset = self.first_offset;
        std::iter::from_fn(move || {
            let head_at = self.position(sections.heads);
            if sections.left == 0 {
                return None;
            }
            let (head, bytes) = sections.take().expect(CHECKED);
            let section = SectionRef { batch: self, head_at, first_offset, head, bytes };
            first_offset += u64::from(section.head.records);
            Some(section)
        })
    }

    /// Where the record at `offset` is, if it is in this batch and not in quarantine.
    pub fn place(&self, offset: Offset) -> Option<Place> {
        let section = self.sections().find(|section| offset < section.next_offset())?;
        section.topics().map(|(_, place)| place).find(|place| place.offset == offset)
    }

    /// What has become of ids with this batch, if anything has.
    pub(super) fn once(&self) -> Option<Once<'_>> {
        self.flags.contains(FrameFlags::ONCE).then(|| {
            let mut sections = self.heads();
            while sections.left > 0 {
                sections.take().expect(CHECKED);
            }
            Once::take(sections.records).expect(CHECKED).0
        })
    }

    /// Reads single records, by their [`Place`].
    pub fn reader(&self) -> Reader<'_> {
        Reader { batch: self, head: None }
    }

    fn heads(&self) -> Sections<'_> {
        Sections::of(self.version, &self.body).expect(CHECKED)
    }

    /// Where `rest`, a part of the body up to its end or another part's beginning, begins.
    fn position(&self, rest: &[u8]) -> u32 {
        let position = rest.as_ptr() as usize - self.body.as_ptr() as usize;
        u32::try_from(position).expect("a commit is far below 4 GiB")
    }
}

const CHECKED: &str = "the body was checked when the batch was made";

/// One section of a [`Batch`]: records of one origin.
pub struct SectionRef<'a> {
    batch: &'a Batch,
    head_at: u32,
    first_offset: Offset,
    head: SectionHead<'a>,
    bytes: &'a [u8],
}

impl<'a> SectionRef<'a> {
    /// Whose records they are.
    pub fn datasource(&self) -> &'a str {
        self.head.datasource
    }

    /// Its first record's offset.
    pub fn first_offset(&self) -> Offset {
        self.first_offset
    }

    /// The offset after its last record.
    pub fn next_offset(&self) -> Offset {
        self.first_offset + u64::from(self.head.records)
    }

    /// How many records it has.
    pub fn records(&self) -> u32 {
        self.head.records
    }

    /// The ids that it is kept once under.
    pub(super) fn once(&self) -> impl Iterator<Item = OnceId> + use<'a> {
        OnceId::all_in(self.head.once)
    }

    /// The topic of each record that is not in quarantine, its offset, and where in the batch it is.
    pub fn topics(&self) -> impl Iterator<Item = (&'a str, Place)> {
        let (head_at, first_offset, batch) = (self.head_at, self.first_offset, self.batch);
        let mut rest = self.bytes;
        (0..self.head.records).filter_map(move |nth| {
            let record_at = batch.position(rest);
            let (record, after) = RecordBody::take(rest).expect(CHECKED);
            rest = after;
            let place = Place { offset: first_offset + u64::from(nth), head_at, record_at };
            (!record.flags.contains(RecordFlags::QUARANTINED)).then_some((record.topic, place))
        })
    }
}

/// Where in a [`Batch`] a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its offset.
    pub offset: Offset,
    head_at: u32,
    record_at: u32,
}

/// Reads single records of a [`Batch`]. Consecutive ones of one section share the work for its head.
pub struct Reader<'a> {
    batch: &'a Batch,
    head: Option<(u32, SectionHead<'a>)>,
}

impl<'a> Reader<'a> {
    /// The record at a place that this batch gave.
    pub fn read(&mut self, place: Place) -> RecordRef<'a> {
        let body = &self.batch.body;
        if self.head.as_ref().is_none_or(|(at, _)| *at != place.head_at) {
            let head = SectionHead::take(self.batch.version, &body[place.head_at as usize..]);
            let (head, _) = head.expect(CHECKED);
            self.head = Some((place.head_at, head));
        }
        let (_, head) = self.head.as_ref().expect("it was just read");
        let (record, _) = RecordBody::take(&body[place.record_at as usize..]).expect(CHECKED);
        record_of(head, record, place.offset)
    }
}

/// A record as consumers see it: what it has of its own, and what its section says.
fn record_of<'a>(head: &SectionHead<'a>, record: RecordBody<'a>, offset: Offset) -> RecordRef<'a> {
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
        flags: record.flags,
        note: record.note,
    }
}

/// The sections of a body, one after the other: heads and records advance together.
struct Sections<'a> {
    version: Version,
    left: usize,
    heads: &'a [u8],
    /// The records of the sections that are left, and what is behind them.
    records: &'a [u8],
}

impl<'a> Sections<'a> {
    /// Finds where the heads end and the records begin.
    fn of(version: Version, body: &'a [u8]) -> Option<Self> {
        let (left, heads) = postcard::take_from_bytes::<usize>(body).ok()?;
        let mut rest = heads;
        for _ in 0..left {
            (_, rest) = SectionHead::take(version, rest)?;
        }
        Some(Self { version, left, heads, records: rest })
    }

    fn take(&mut self) -> Option<(SectionHead<'a>, &'a [u8])> {
        let (head, heads) = SectionHead::take(self.version, self.heads)?;
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
                let (record, rest) = RecordBody::take(bytes).expect(CHECKED);
                head.records -= 1;
                *bytes = rest;
                let offset = self.offset;
                self.offset += 1;
                return Some(record_of(head, record, offset));
            }
            if self.sections.left == 0 {
                return None;
            }
            self.current = Some(self.sections.take().expect(CHECKED));
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
            Section::new(id, KeyId([7; 6]), Lease::new(), Transport::Mqtt, 9, 1_700_000_000_000_000);
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

    fn checked(first_offset: Offset, records: u32, body: Bytes) -> Option<Batch> {
        Batch::check(Version::V2, FrameFlags::default(), first_offset, records, body)
    }

    #[test]
    fn a_batch_gives_back_what_was_put_in_with_offsets_in_order() {
        let a = section("press-4", &[b"1".to_vec(), b"".to_vec()]);
        let empty = section("nothing", &[]);
        let b = section("oven", &[vec![0xff; 300]]);
        let batch = checked(40, 3, body(&[&a, &empty, &b])).expect("whole");
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
        assert!(checked(0, 1, body(&[&a])).is_none());
        assert!(checked(0, 3, body(&[&a])).is_none());
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
            prop_assert!(checked(0, records, whole.clone()).is_some());
            prop_assert!(checked(0, records, whole.slice(..cut.index(whole.len()))).is_none());
            let mut changed = whole.to_vec();
            changed[flip.index(whole.len())] ^= 1 << bit;
            if let Some(batch) = checked(0, records, changed.into()) {
                prop_assert_eq!(batch.records().count(), records as usize);
            }
        }
    }
}
