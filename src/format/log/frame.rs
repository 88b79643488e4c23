//! A frame: what the log writes at once, a header and the body of a [`Batch`](super::batch::Batch).
//! The docs of [`crate::log`] have both byte by byte, and say why nobody but the log can make one.

use super::crc_frame;
use super::segment::{SEGMENT_SECRET_BYTES, SegmentHeader};
use crate::limits::FRAME_BODY_BYTES_MAX;
use crate::message::{Offset, TimeMicros};

/// Bytes of a frame's header in the newest version.
pub const FRAME_HEADER_BYTES: usize = 64;

/// Bytes of what every frame of a segment begins with.
pub const FRAME_MARK_BYTES: usize = 8;
/// Domain separation of a segment's secret. Never change it: it is part of the format.
const FRAME_KEY_CONTEXT: &str = "headgate 2026-11 log: the frames of a segment";

/// A version of the format on disk. Each segment has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormatVersion {
    /// Without publishers and ids. It is read, and no longer written.
    V1 = 1,
    /// Frames that anybody can make, and a topic in every record. It is read, and no longer written.
    V2 = 2,
    /// What is written.
    V3 = 3,
}

impl LogFormatVersion {
    /// The version of new segments.
    pub const NEWEST: LogFormatVersion = LogFormatVersion::V3;

    /// The version that a segment's header names, if it is a known one.
    pub fn from_bytes(bytes: [u8; 2]) -> Option<Self> {
        let known = [LogFormatVersion::V1, LogFormatVersion::V2, LogFormatVersion::V3];
        known.into_iter().find(|version| version.to_bytes() == bytes)
    }

    /// The version as a segment's header has it.
    pub fn to_bytes(self) -> [u8; 2] {
        (self as u16).to_le_bytes()
    }
}

/// What a frame's header says about its contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FrameFlags(pub(super) u32);

impl FrameFlags {
    /// A record has [`RecordFlags::RETAIN`](crate::message::RecordFlags::RETAIN).
    pub const RETAINED: FrameFlags = FrameFlags(1);
    /// Behind the records is an [`OncePart`](super::once::OncePart).
    pub const ONCE: FrameFlags = FrameFlags(2);
    /// A record has a note.
    pub const NOTED: FrameFlags = FrameFlags(4);
    /// The next frame belongs to the same commit: without it this one does not count.
    pub const CONTINUED: FrameFlags = FrameFlags(8);
    /// A record has an event time.
    pub const EVENT_TIMED: FrameFlags = FrameFlags(16);

    /// The flags in a header, known or not.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// Both sets of flags together.
    pub const fn with(self, other: FrameFlags) -> Self {
        Self(self.0 | other.0)
    }

    /// These flags, and `other` if `is_set`.
    pub fn with_if(self, is_set: bool, other: FrameFlags) -> Self {
        if is_set { self.with(other) } else { self }
    }

    /// Whether all flags of `other` are among these.
    pub fn contains(self, other: FrameFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// The flags that frames of a version may have.
    fn known_in(version: LogFormatVersion) -> FrameFlags {
        let v2 = Self::RETAINED.with(Self::ONCE).with(Self::NOTED);
        match version {
            LogFormatVersion::V1 => FrameFlags::default(),
            LogFormatVersion::V2 => v2,
            LogFormatVersion::V3 => v2.with(Self::CONTINUED).with(Self::EVENT_TIMED),
        }
    }
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the frame holds, as it is written.
    pub flags: FrameFlags,
    /// How many records are in the body.
    pub records: u32,
    /// The first record's offset, or the next one of the log if there are no records.
    pub first_offset: Offset,
    /// The newest `received_at` of this and all earlier frames.
    pub time_max: TimeMicros,
    /// The frame vouches for everything in front of this position of its segment: it had been
    /// acknowledged and synced when the frame was written. With durability "os" that is where the last sync
    /// ended.
    pub settled_position: u64,
    /// The number of its write in this segment. A frame with a lower one than the frame before it is
    /// what an abandoned write left behind.
    pub write_number: u32,
    pub(super) header_bytes: u32,
    pub(super) body_bytes: u32,
    pub(super) crc: u32,
}

impl FrameHeader {
    /// The header of a frame that is to be written, see [`FrameKey::seal`].
    pub fn new(flags: FrameFlags, records: u32, first_offset: Offset, time_max: TimeMicros) -> Self {
        let (settled_position, write_number, body_bytes, crc) = (0, 0, 0, 0);
        let header_bytes = u32::try_from(FRAME_HEADER_BYTES).expect("64");
        Self {
            flags,
            records,
            first_offset,
            time_max,
            settled_position,
            write_number,
            header_bytes,
            body_bytes,
            crc,
        }
    }

    /// Header and body, in bytes.
    pub fn frame_bytes(&self) -> u64 {
        u64::from(self.header_bytes) + u64::from(self.body_bytes)
    }

    /// The offset behind the frame's last record.
    pub fn next_offset(&self) -> Offset {
        self.first_offset + u64::from(self.records)
    }

    /// Whether the frame has a once part.
    pub fn has_once(&self) -> bool {
        self.flags.contains(FrameFlags::ONCE)
    }

    /// Whether the next frame belongs to the same commit.
    pub fn is_continued(&self) -> bool {
        self.flags.contains(FrameFlags::CONTINUED)
    }

    /// Whether its lengths and offsets can be worked with.
    pub(super) fn is_in_bounds(&self, position: u64) -> bool {
        self.body_bytes as usize <= FRAME_BODY_BYTES_MAX
            && self.first_offset.checked_add(u64::from(self.records)).is_some()
            && position.checked_add(self.frame_bytes()).is_some()
            && self.settled_position <= position
    }
}

/// How the frames of a segment are marked and checked.
pub enum FrameFormat {
    /// Versions 1 and 2: by a constant and a CRC-32 of header and body.
    Crc(LogFormatVersion),
    /// Version 3: by a key of the segment's own.
    Keyed(FrameKey),
}

impl FrameFormat {
    /// The format of the frames in a segment with this header.
    pub fn of_segment(header: &SegmentHeader) -> Self {
        match header.version {
            LogFormatVersion::V3 => FrameFormat::Keyed(FrameKey::derive(&header.secret)),
            older => FrameFormat::Crc(older),
        }
    }

    /// The version of the format.
    pub fn version(&self) -> LogFormatVersion {
        match self {
            FrameFormat::Crc(version) => *version,
            FrameFormat::Keyed(_) => LogFormatVersion::V3,
        }
    }

    /// Bytes of a frame's header.
    pub fn header_bytes(&self) -> usize {
        match self {
            FrameFormat::Crc(_) => crc_frame::CRC_FRAME_HEADER_BYTES,
            FrameFormat::Keyed(_) => FRAME_HEADER_BYTES,
        }
    }

    /// The key of the frames, if nobody but the log can make them. Then a header that
    /// [`FrameFormat::decode`] gives is the log's; else only [`FrameFormat::is_whole`] can tell.
    pub fn key(&self) -> Option<&FrameKey> {
        match self {
            FrameFormat::Crc(_) => None,
            FrameFormat::Keyed(key) => Some(key),
        }
    }

    /// Reads the header at a position of the segment. `None` if the bytes are too few or not a header.
    pub fn decode(&self, bytes: &[u8], position: u64) -> Option<FrameHeader> {
        match self {
            FrameFormat::Crc(_) => crc_frame::decode(bytes, position),
            FrameFormat::Keyed(key) => key.decode(bytes, position),
        }
    }

    /// Whether a frame, from the first byte of its header on, is what the header says.
    pub fn is_whole(&self, header: &FrameHeader, frame: &[u8]) -> bool {
        frame.len() as u64 == header.frame_bytes()
            && match self {
                FrameFormat::Crc(_) => crc_frame::frame_crc(frame) == header.crc,
                FrameFormat::Keyed(_) => crc32fast::hash(&frame[FRAME_HEADER_BYTES..]) == header.crc,
            }
    }

    /// What a frame holds; `None` if a flag is unknown in this version.
    pub fn flags(&self, header: &FrameHeader) -> Option<FrameFlags> {
        let version = self.version();
        let known = FrameFlags::known_in(version).contains(header.flags).then_some(header.flags);
        match version {
            // Version 1 does not say whether a frame has retained records: any frame may.
            LogFormatVersion::V1 => known.map(|_| FrameFlags::RETAINED),
            _ => known,
        }
    }
}

/// What marks the frames of one segment: known to nobody who does not read the segment's file.
pub struct FrameKey {
    mark: [u8; FRAME_MARK_BYTES],
    key: [u8; 32],
}

const HEADER_HAS: &str = "64 bytes";

impl FrameKey {
    /// The key of the frames in the segment with this secret.
    pub fn derive(secret: &[u8; SEGMENT_SECRET_BYTES]) -> Self {
        let mut derived = blake3::Hasher::new_derive_key(FRAME_KEY_CONTEXT).update(secret).finalize_xof();
        let mut key = Self { mark: [0; FRAME_MARK_BYTES], key: [0; 32] };
        derived.fill(&mut key.key);
        derived.fill(&mut key.mark);
        key
    }

    /// Finds the first mark in `bytes`: where a frame may begin.
    pub fn find_mark(&self, bytes: &[u8]) -> Option<usize> {
        let mark = u64::from_ne_bytes(self.mark);
        let is_mark = |bytes: &[u8]| bytes.first_chunk().is_some_and(|b| u64::from_ne_bytes(*b) == mark);
        bytes.windows(FRAME_MARK_BYTES).position(is_mark)
    }

    /// Fills in the header of `frame`, which has room for it before the body, and which will be written
    /// at `position`. The header's lengths and checks are not used.
    pub fn seal(&self, frame: &mut [u8], header: &FrameHeader, position: u64) {
        let body_bytes = frame.len() - FRAME_HEADER_BYTES;
        assert!(body_bytes <= FRAME_BODY_BYTES_MAX, "the writer keeps the bound that readers trust");
        let body_bytes = u32::try_from(body_bytes).expect("checked above");
        let crc = crc32fast::hash(&frame[FRAME_HEADER_BYTES..]);
        frame[0..8].copy_from_slice(&self.mark);
        frame[16..20].copy_from_slice(&crc.to_le_bytes());
        frame[20..24].copy_from_slice(&header.write_number.to_le_bytes());
        frame[24..32].copy_from_slice(&header.first_offset.to_le_bytes());
        frame[32..40].copy_from_slice(&header.time_max.to_le_bytes());
        frame[40..48].copy_from_slice(&header.settled_position.to_le_bytes());
        frame[48..52].copy_from_slice(&body_bytes.to_le_bytes());
        frame[52..56].copy_from_slice(&header.records.to_le_bytes());
        frame[56..60].copy_from_slice(&header.flags.0.to_le_bytes());
        frame[60..64].fill(0);
        let tag = self.tag(frame.first_chunk().expect(HEADER_HAS), position);
        frame[8..16].copy_from_slice(&tag);
    }

    fn decode(&self, bytes: &[u8], position: u64) -> Option<FrameHeader> {
        let header: &[u8; FRAME_HEADER_BYTES] = bytes.first_chunk()?;
        if header[..8] != self.mark || header[8..16] != self.tag(header, position) {
            return None;
        }
        let number = |at: usize| u32::from_le_bytes(*header[at..].first_chunk().expect(HEADER_HAS));
        let long = |at: usize| u64::from_le_bytes(*header[at..].first_chunk().expect(HEADER_HAS));
        let decoded = FrameHeader {
            flags: FrameFlags(number(56)),
            records: number(52),
            first_offset: long(24),
            time_max: TimeMicros::from_le_bytes(*header[32..].first_chunk().expect(HEADER_HAS)),
            settled_position: long(40),
            write_number: number(20),
            header_bytes: u32::try_from(FRAME_HEADER_BYTES).expect("64"),
            body_bytes: number(48),
            crc: number(16),
        };
        decoded.is_in_bounds(position).then_some(decoded)
    }

    /// The tag of a header: it is the log's own, and at this position of this segment. What is hashed
    /// takes one block of BLAKE3.
    fn tag(&self, header: &[u8; FRAME_HEADER_BYTES], position: u64) -> [u8; 8] {
        let mut tagged = *header;
        tagged[8..16].copy_from_slice(&position.to_le_bytes());
        *blake3::keyed_hash(&self.key, &tagged).as_bytes().first_chunk().expect("32 bytes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(key: &FrameKey, position: u64) -> (FrameHeader, Vec<u8>) {
        let mut header = FrameHeader::new(FrameFlags::RETAINED, 3, 40, -7);
        (header.settled_position, header.write_number) = (position / 2, 9);
        let mut frame = vec![0; FRAME_HEADER_BYTES];
        frame.extend_from_slice(b"the body");
        key.seal(&mut frame, &header, position);
        (header, frame)
    }

    #[test]
    fn a_header_comes_back_as_it_was_sealed_and_any_changed_bit_makes_it_none() {
        let format = FrameFormat::Keyed(FrameKey::derive(&[7; SEGMENT_SECRET_BYTES]));
        let (header, frame) = sealed(format.key().expect("keyed"), 4096);
        let decoded = format.decode(&frame, 4096).expect("a header");
        assert_eq!(FrameHeader { body_bytes: 0, crc: 0, ..decoded }, header);
        assert!(format.is_whole(&decoded, &frame));
        for bit in 0..frame.len() * 8 {
            let mut changed = frame.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            match format.decode(&changed, 4096) {
                None => assert!(bit < FRAME_HEADER_BYTES * 8, "bit {bit}"),
                Some(decoded) => assert!(!format.is_whole(&decoded, &changed), "bit {bit}"),
            }
        }
    }

    #[test]
    fn a_frame_is_one_at_its_own_place_in_its_own_segment_alone() {
        let own = FrameFormat::Keyed(FrameKey::derive(&[7; SEGMENT_SECRET_BYTES]));
        let (_, frame) = sealed(own.key().expect("keyed"), 4096);
        assert!(own.decode(&frame, 4096).is_some());
        assert!(own.decode(&frame, 4097).is_none(), "a copy of it elsewhere");
        let other = FrameFormat::Keyed(FrameKey::derive(&[8; SEGMENT_SECRET_BYTES]));
        assert!(other.decode(&frame, 4096).is_none(), "another life of the file");
    }

    #[test]
    fn a_header_beyond_the_bounds_is_none_even_if_the_log_had_sealed_it() {
        let key = FrameKey::derive(&[7; SEGMENT_SECRET_BYTES]);
        let mut frame = vec![0; FRAME_HEADER_BYTES];
        key.seal(&mut frame, &FrameHeader::new(FrameFlags::default(), 2, u64::MAX - 1, 0), 4096);
        assert_eq!(key.decode(&frame, 4096), None, "offsets end before");
        let late = FrameHeader { settled_position: 4097, ..FrameHeader::new(FrameFlags::default(), 0, 0, 0) };
        key.seal(&mut frame, &late, 4096);
        assert_eq!(key.decode(&frame, 4096), None, "it cannot vouch for itself");
    }
}
