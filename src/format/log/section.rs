//! Messages on their way into the log. A [`Section`] holds those of one origin (datasource, key, transport,
//! time). A front fills one per read of its socket, so that what the messages share is stored once.

use std::cell::Cell;
use std::time::Instant;

use super::frame::FrameFlags;
use super::label::LabelTable;
use super::once::{ContentDigest, OnceId};
use super::record::{RecordBody, SectionHead, StoredRecord, put_postcard, record_of};
use crate::message::{DatasourceId, KeyId, Lease, RecordFlags, RecordRef, TimeMicros, Transport};

/// Messages of one origin, encoded, on their way into the log.
pub struct Section {
    /// The datasource of the messages.
    pub datasource: DatasourceId,
    /// The key that let them in.
    pub key_id: KeyId,
    /// Ends when that key dies; the writer then leaves the section out.
    pub lease: Lease,
    /// Ends when the datasource is deleted, for messages of a key that outlives it.
    datasource_lease: Option<Lease>,
    /// From then on the section is left out.
    kept_before: Option<Instant>,
    /// The transport they came over.
    pub transport: Transport,
    /// A hash of the client they came from, or 0 if that is unknown.
    pub publisher: u64,
    /// When they were read from their socket.
    pub received_at: TimeMicros,
    /// The ids under which it is kept once, one after the other.
    once: Vec<u8>,
    /// The ids of which it may be a repetition, without taking them.
    asked: Vec<OnceId>,
    /// Whether it is never kept: it only asks.
    is_question: bool,
    /// Over its messages, as soon as somebody has asked for it.
    digest: Option<ContentDigest>,
    records: u32,
    payload_bytes: u64,
    retained: bool,
    /// Messages and payload bytes that go into quarantine.
    quarantined: (u32, u64),
    noted: bool,
    timed: bool,
    labels: LabelTable,
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
            datasource_lease: None,
            kept_before: None,
            transport,
            publisher,
            received_at,
            once: Vec::new(),
            asked: Vec::new(),
            is_question: false,
            digest: None,
            records: 0,
            payload_bytes: 0,
            retained: false,
            quarantined: (0, 0),
            noted: false,
            timed: false,
            labels: LabelTable::default(),
            bytes: Vec::new(),
        }
    }

    /// Has the section left out also when this lease ends: that of its datasource.
    pub fn bind_to(&mut self, datasource: Lease) {
        self.datasource_lease = Some(datasource);
    }

    /// Has the section left out from this time on, also where it waits then.
    pub fn keep_before(&mut self, time: Instant) {
        self.kept_before = Some(time);
    }

    /// Whether its key and its datasource are still valid, and its time has not come.
    #[inline]
    pub fn holds(&self) -> bool {
        self.lease.holds()
            && self.datasource_lease.as_ref().is_none_or(Lease::holds)
            && self.kept_before.is_none_or(|time| Instant::now() < time)
    }

    /// Whether its key is still valid, whatever has become of its datasource and its time.
    pub fn key_holds(&self) -> bool {
        self.lease.holds()
    }

    /// Whether it came out of quarantine: what an admin lets in, whatever has become of its key.
    pub fn is_redriven(&self) -> bool {
        self.places().first().is_some_and(|place| self.record(*place).flags.contains(RecordFlags::REDRIVEN))
    }

    /// Gives the section an id: it is kept only if none of its ids is known.
    pub fn keep_once(&mut self, id: OnceId) {
        self.once.extend_from_slice(id.as_bytes());
    }

    /// Whether it has ids under which it is kept once.
    pub fn has_once_ids(&self) -> bool {
        !self.once.is_empty()
    }

    /// The ids under which it is kept once.
    pub fn once(&self) -> impl Iterator<Item = OnceId> {
        OnceId::parse_all(&self.once)
    }

    /// Lets the log look whether its messages are known under an id, which they do not take: then it is a
    /// repetition, and is not kept.
    pub fn ask_for(&mut self, id: OnceId) {
        self.asked.push(id);
    }

    /// The ids of which it may be a repetition, without taking them.
    pub fn asked(&self) -> &[OnceId] {
        &self.asked
    }

    /// Makes it a question: it is not kept, whatever the answer is.
    pub fn only_ask(&mut self) {
        self.is_question = true;
    }

    /// Whether it is never kept, because it only asks for its ids.
    pub fn is_question(&self) -> bool {
        self.is_question
    }

    /// The digest of its messages, if one of its ids makes it count. Call it when all of them are in.
    pub fn content_digest(&mut self) -> Option<ContentDigest> {
        if self.once.is_empty() && self.asked.is_empty() {
            return None;
        }
        let digest = self.digest.unwrap_or_else(|| {
            let (head, mut rest) = (self.head(), &self.bytes[..]);
            let messages = (0..self.records).map(|_| {
                let (record, after) = RecordBody::take(&head, rest).expect(ENCODED);
                rest = after;
                (record.topic, record.payload)
            });
            ContentDigest::of(self.datasource.as_str(), messages)
        });
        self.digest = Some(digest);
        self.digest
    }

    /// Makes room for `bytes` more, so that filling the section allocates once.
    #[inline]
    pub fn reserve(&mut self, bytes: usize) {
        self.bytes.reserve(bytes);
    }

    /// Adds one message: its topic, payload, media type (or empty), MQTT 5 properties in wire form
    /// (or empty), and flags.
    #[inline]
    pub fn push(
        &mut self,
        topic: &str,
        payload: &[u8],
        content_type: &str,
        properties: &[u8],
        flags: RecordFlags,
    ) {
        self.push_body(&RecordBody {
            flags,
            topic,
            content_type,
            properties,
            payload,
            event_at: None,
            note: &[],
        });
    }

    /// Like [`Section::push`], for a message whose flags say that it has a note.
    pub fn push_noted(
        &mut self,
        topic: &str,
        payload: &[u8],
        content_type: &str,
        properties: &[u8],
        flags: RecordFlags,
        note: &[u8],
    ) {
        self.push_body(&RecordBody { flags, topic, content_type, properties, payload, event_at: None, note });
    }

    /// Adds one message, with its event time and its note if it has them.
    #[inline]
    pub fn push_body(&mut self, body: &RecordBody<'_>) {
        let RecordBody { flags, topic, content_type, properties, payload, event_at, note } = *body;
        debug_assert!(
            flags.has_note() || note.is_empty(),
            "a note without its flag would be taken for the next record"
        );
        let label = self.labels.place(topic, content_type);
        self.digest = None;
        let kept = event_at.map_or(flags, |_| flags.with(RecordFlags::EVENT_TIMED));
        StoredRecord { flags: kept, label, properties, payload }.put(&mut self.bytes);
        if let Some(event_at) = event_at {
            put_postcard(&event_at, &mut self.bytes);
            self.timed = true;
        }
        self.retained |= flags.contains(RecordFlags::RETAIN);
        self.records += 1;
        self.payload_bytes += payload.len() as u64;
        if !flags.has_note() {
            return;
        }
        put_postcard(serde_bytes::Bytes::new(note), &mut self.bytes);
        self.noted = true;
        if flags.contains(RecordFlags::QUARANTINED) {
            self.quarantined.0 += 1;
            self.quarantined.1 += payload.len() as u64;
        }
    }

    /// An empty section of the same origin with a lease that never ends: its records are in the log.
    pub fn without_records(&self) -> Self {
        let Self { datasource, key_id, transport, publisher, received_at, .. } = self;
        Self::new(datasource.clone(), *key_id, Lease::new(), *transport, *publisher, *received_at)
    }

    /// Whether the messages of `other` could be in this section.
    pub fn has_origin_of(&self, other: &Self) -> bool {
        self.received_at == other.received_at
            && self.key_id == other.key_id
            && self.publisher == other.publisher
            && self.transport == other.transport
            && self.datasource == other.datasource
    }

    /// Adds a copy of a message from another section. Returns its encoded size in bytes.
    pub fn push_copy(&mut self, record: RecordRef<'_>) -> usize {
        let before = self.bytes.len();
        let RecordRef { topic, payload, content_type, properties, event_at, flags, note, .. } = record;
        self.push_body(&RecordBody { flags, topic, content_type, properties, payload, event_at, note });
        self.bytes.len() - before
    }

    /// Its records in sections of about `bytes_max`, at least one record each.
    pub fn split(&self, bytes_max: usize) -> Vec<Section> {
        let mut parts: Vec<Section> = Vec::new();
        for place in self.places() {
            if parts.last().is_none_or(|part| part.weight() >= bytes_max) {
                parts.push(self.without_records());
            }
            parts.last_mut().map(|part| part.push_copy(self.record(place)));
        }
        parts
    }

    /// The size of what has to be in one frame, in bytes: the section, if it is kept once, or its largest
    /// record.
    pub fn unsplit_bytes(&self) -> usize {
        if self.has_once_ids() {
            return self.weight();
        }
        let places = self.places();
        let ends = places.iter().skip(1).copied().map(|end| end as usize).chain([self.bytes.len()]);
        let largest = places.iter().zip(ends).map(|(at, end)| end - *at as usize).max();
        largest.unwrap_or_default()
    }

    /// How many of its messages go into quarantine, and the sum of their payloads in bytes.
    pub fn quarantined(&self) -> (u32, u64) {
        self.quarantined
    }

    /// Whether one of its messages has a note.
    pub fn has_notes(&self) -> bool {
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
    pub fn has_retained(&self) -> bool {
        self.retained
    }

    /// The position where each of its records begins, for [`Section::record`].
    pub fn places(&self) -> Vec<u32> {
        let head = self.head();
        let mut rest = &self.bytes[..];
        let place = |_| {
            let at = self.bytes.len() - rest.len();
            (_, rest) = RecordBody::take(&head, rest).expect(ENCODED);
            u32::try_from(at).expect("in-flight bytes are bounded far below 4 GiB")
        };
        (0..self.records).map(place).collect()
    }

    /// The record at a place; it has no offset yet.
    pub fn record(&self, place: u32) -> RecordRef<'_> {
        let head = self.head();
        let (record, _) = RecordBody::take(&head, &self.bytes[place as usize..]).expect(ENCODED);
        record_of(&head, record, 0)
    }

    /// Its size in memory, and approximately on disk, in bytes.
    pub fn weight(&self) -> usize {
        let labels = self.labels.bytes().len();
        self.bytes.len() + labels + self.once.len() + self.datasource.as_str().len() + SECTION_HEAD_BYTES
    }

    /// What it takes in memory, in bytes, with what the log keeps for it until it is durable.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + SECTION_UNDERWAY_BYTES
            + self.bytes.capacity()
            + self.labels.memory_bytes()
            + self.once.capacity()
    }

    fn head(&self) -> SectionHead<'_> {
        SectionHead {
            datasource: self.datasource.as_str(),
            key_id: self.key_id,
            transport: self.transport,
            publisher: self.publisher,
            received_at: self.received_at,
            once: &self.once,
            labels: self.labels.bytes(),
            records: self.records,
            bytes: u32::try_from(self.bytes.len()).expect("in-flight bytes are bounded far below 4 GiB"),
            labels_inline: false,
            last_label: Cell::default(),
        }
    }
}

/// What the gateway keeps beside a section until it is durable: whose it is, what it holds, its outcome.
const SECTION_UNDERWAY_BYTES: usize = 96;
/// What a section's head takes beside the datasource, the ids and the labels, at most.
const SECTION_HEAD_BYTES: usize = 60;
const ENCODED: &str = "the section has encoded it itself";

/// Writes the body of a batch without the once part: the number of sections, their heads, their
/// records. Returns what the flags of the frame say of it.
pub fn put_body<'a>(sections: impl Iterator<Item = &'a Section> + Clone, to: &mut Vec<u8>) -> FrameFlags {
    put_postcard(&sections.clone().count(), to);
    let mut flags = FrameFlags::default();
    for section in sections.clone() {
        put_postcard(&section.head(), to);
        flags = flags.with_if(section.retained, FrameFlags::RETAINED);
        flags = flags.with_if(section.noted, FrameFlags::NOTED);
        flags = flags.with_if(section.timed, FrameFlags::EVENT_TIMED);
    }
    sections.for_each(|section| to.extend_from_slice(&section.bytes));
    flags
}
