//! Records as consumers read them. A [`Batch`] holds one commit: the heads of its sections, then the
//! records of all of them. A consumer that wants one datasource reads the heads and skips the rest.

use bytes::Bytes;

use super::frame::{FrameFlags, LogFormatVersion};
use super::once::{ContentDigest, OnceId, OncePart};
use super::record::{RecordBody, SectionHead, record_of};
use super::section::{Section, put_body};
use crate::message::{Offset, RecordFlags, RecordRef};

/// One commit of the log: records with consecutive offsets. Cheap to clone.
#[derive(Clone)]
pub struct Batch {
    version: LogFormatVersion,
    flags: FrameFlags,
    first_offset: Offset,
    records: u32,
    /// The body as it is on disk; checked when the batch was made.
    body: Bytes,
}

impl Batch {
    /// A batch whose body this process has just encoded.
    pub fn encoded(flags: FrameFlags, first_offset: Offset, records: u32, body: Bytes) -> Self {
        Self { version: LogFormatVersion::NEWEST, flags, first_offset, records, body }
    }

    /// A batch of the records of these sections.
    pub fn gather(first_offset: Offset, sections: &[Section]) -> Self {
        let mut body = Vec::with_capacity(sections.iter().map(Section::weight).sum::<usize>() + 16);
        let flags = put_body(sections.iter(), &mut body);
        let records = sections.iter().map(Section::records).sum();
        Self::encoded(flags, first_offset, records, body.into())
    }

    /// A batch without records. It tells a reader that there are none below `offset`.
    pub fn nothing_below(offset: Offset) -> Self {
        Self::gather(offset, &[])
    }

    /// A batch whose body comes from a disk. Checks every length in it, so that reading its
    /// records cannot fail later. `None` if Headgate did not write this body.
    pub fn check(
        version: LogFormatVersion,
        flags: FrameFlags,
        first_offset: Offset,
        records: u32,
        body: Bytes,
    ) -> Option<Self> {
        let mut sections = BodySections::parse(version, &body)?;
        let mut seen = 0_u32;
        let mut ids = false;
        let (mut noted, mut timed) = (false, false);
        while sections.left > 0 {
            let (head, mut bytes) = sections.take()?;
            for _ in 0..head.records {
                let (record, rest) = RecordBody::take(&head, bytes)?;
                noted |= record.flags.has_note();
                timed |= record.event_at.is_some();
                bytes = rest;
            }
            if !bytes.is_empty() || head.once.len() % OnceId::BYTES != 0 {
                return None;
            }
            ids |= !head.once.is_empty();
            seen = seen.checked_add(head.records)?;
        }
        let once = flags.contains(FrameFlags::ONCE);
        let behind = if once { OncePart::take(sections.records)?.1 } else { sections.records };
        let whole = behind.is_empty()
            && seen == records
            && (once || !ids)
            && (!noted || flags.contains(FrameFlags::NOTED))
            && (!timed || flags.contains(FrameFlags::EVENT_TIMED));
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

    /// Whether one of its records may be retained; a consumer of retained records may skip other batches.
    pub fn has_retained(&self) -> bool {
        self.flags.contains(FrameFlags::RETAINED)
    }

    /// Whether one of its records may have a note; a consumer of notes may skip other batches.
    pub fn has_notes(&self) -> bool {
        self.flags.contains(FrameFlags::NOTED)
    }

    /// Its size in memory, in bytes.
    pub fn weight(&self) -> usize {
        self.body.len()
    }

    /// Its records, in order, including those in quarantine.
    pub fn records(&self) -> Records<'_> {
        Records { sections: self.heads(), current: None, offset: self.first_offset }
    }

    /// Its sections, in order. A consumer skips a section without decoding its records.
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
    pub fn place(&self, offset: Offset) -> Option<RecordPlace> {
        let section = self.sections().find(|section| offset < section.next_offset())?;
        section.topics().map(|(_, place)| place).find(|place| place.offset == offset)
    }

    /// The ids that this batch keeps and releases, if it has a once part.
    pub fn once(&self) -> Option<OncePart<'_>> {
        self.flags.contains(FrameFlags::ONCE).then(|| {
            let mut sections = self.heads();
            while sections.left > 0 {
                sections.take().expect(CHECKED);
            }
            OncePart::take(sections.records).expect(CHECKED).0
        })
    }

    /// Reads single records, by their [`RecordPlace`].
    pub fn reader(&self) -> BatchReader<'_> {
        BatchReader { batch: self, head: None }
    }

    fn heads(&self) -> BodySections<'_> {
        BodySections::parse(self.version, &self.body).expect(CHECKED)
    }

    /// The position in the body where `rest`, a slice of it, begins.
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
    /// The datasource of its records.
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

    /// The ids under which it is kept once.
    pub fn once(&self) -> impl Iterator<Item = OnceId> + use<'a> {
        OnceId::parse_all(self.head.once)
    }

    /// The digest of its messages.
    pub fn content_digest(&self) -> ContentDigest {
        let mut rest = self.bytes;
        let messages = (0..self.head.records).map(|_| {
            let (record, after) = RecordBody::take(&self.head, rest).expect(CHECKED);
            rest = after;
            (record.topic, record.payload)
        });
        ContentDigest::of(self.head.datasource, messages)
    }

    /// The topic of each record that is not in quarantine, its offset, and where in the batch it is.
    pub fn topics(&self) -> impl Iterator<Item = (&'a str, RecordPlace)> + use<'_, 'a> {
        let (head_at, first_offset, batch) = (self.head_at, self.first_offset, self.batch);
        let (head, mut rest) = (&self.head, self.bytes);
        (0..head.records).filter_map(move |nth| {
            let record_at = batch.position(rest);
            let (record, after) = RecordBody::take(head, rest).expect(CHECKED);
            rest = after;
            let place = RecordPlace { offset: first_offset + u64::from(nth), head_at, record_at };
            (!record.flags.contains(RecordFlags::QUARANTINED)).then_some((record.topic, place))
        })
    }
}

/// The place of a record in a [`Batch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordPlace {
    /// Its offset.
    pub offset: Offset,
    head_at: u32,
    record_at: u32,
}

/// Reads single records of a [`Batch`]. Consecutive reads in one section decode its head once.
pub struct BatchReader<'a> {
    batch: &'a Batch,
    head: Option<(u32, SectionHead<'a>)>,
}

impl<'a> BatchReader<'a> {
    /// The record at a place that this batch gave.
    pub fn read(&mut self, place: RecordPlace) -> RecordRef<'a> {
        let body = &self.batch.body;
        if self.head.as_ref().is_none_or(|(at, _)| *at != place.head_at) {
            let head = SectionHead::take(self.batch.version, &body[place.head_at as usize..]);
            let (head, _) = head.expect(CHECKED);
            self.head = Some((place.head_at, head));
        }
        let (_, head) = self.head.as_ref().expect("it was just read");
        let (record, _) = RecordBody::take(head, &body[place.record_at as usize..]).expect(CHECKED);
        record_of(head, record, place.offset)
    }
}

/// Iterates over the sections of a body: heads and records advance together.
struct BodySections<'a> {
    version: LogFormatVersion,
    left: usize,
    heads: &'a [u8],
    /// The records of the remaining sections, then the once part if there is one.
    records: &'a [u8],
}

impl<'a> BodySections<'a> {
    /// Finds where the heads end and the records begin.
    fn parse(version: LogFormatVersion, body: &'a [u8]) -> Option<Self> {
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
    sections: BodySections<'a>,
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
                let (record, rest) = RecordBody::take(head, bytes).expect(CHECKED);
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
    use crate::message::{DatasourceId, KeyId, Lease, Transport};

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
        put_body(sections.iter().copied(), &mut body);
        body.into()
    }

    fn checked(first_offset: Offset, records: u32, body: Bytes) -> Option<Batch> {
        Batch::check(LogFormatVersion::V3, FrameFlags::default(), first_offset, records, body)
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

    #[test]
    fn event_times_come_back_and_a_frame_says_that_it_has_some() {
        let mut timed = section("press-4", &[b"1".to_vec()]);
        let plain = checked(0, 1, body(&[&timed])).expect("whole");
        assert_eq!(plain.records().map(|record| record.event_at).collect::<Vec<_>>(), [None]);
        for (event_at, note) in [(Some(0), &[][..]), (Some(-1), &[5]), (Some(i64::MAX), &[]), (None, &[])] {
            let flags = if note.is_empty() { RecordFlags::default() } else { RecordFlags::QUARANTINED };
            let (topic, content_type, properties, payload) = ("a", "", &[][..], &b"2"[..]);
            timed.push_body(&RecordBody { flags, topic, content_type, properties, payload, event_at, note });
        }
        let batch = Batch::gather(0, std::slice::from_ref(&timed));
        assert!(
            batch.flags.contains(FrameFlags::EVENT_TIMED) && !plain.flags.contains(FrameFlags::EVENT_TIMED)
        );
        let seen: Vec<_> =
            batch.records().map(|record| (record.event_at, record.note, record.flags)).collect();
        let (none, quarantined) = (RecordFlags::default(), RecordFlags::QUARANTINED);
        let expected = [
            (None, &[][..], RecordFlags::RETAIN),
            (Some(0), &[], none),
            (Some(-1), &[5], quarantined),
            (Some(i64::MAX), &[], none),
            (None, &[], none),
        ];
        assert_eq!(seen, expected, "in none of them is the flag of the log");
        // An earlier version knows neither the flag nor what it announces.
        let flags = FrameFlags::NOTED;
        assert!(Batch::check(LogFormatVersion::V3, flags, 0, 5, body(&[&timed])).is_none());
        let flags = flags.with(FrameFlags::EVENT_TIMED);
        assert!(Batch::check(LogFormatVersion::V3, flags, 0, 5, body(&[&timed])).is_some());
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
