//! A frame: what one commit adds to a segment, a header and the body of a
//! [`Batch`](super::batch::Batch). The module docs of [`crate::log`] have both byte by byte.

use crate::limits::IN_FLIGHT_BYTES_MAX;
use crate::message::{Offset, TimeMicros};

/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = 36;
/// The first bytes of every frame, in every version.
pub const FRAME_MAGIC: [u8; 4] = *b"HGf1";
/// This log writes no larger body: a header that claims more is not a frame's.
const BODY_BYTES_MAX: usize = 2 * IN_FLIGHT_BYTES_MAX + (1 << 20);

/// A version of the format on disk. Each segment has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormatVersion {
    /// Without publishers and ids. It is read, and no longer written.
    V1 = 1,
    /// What is written.
    V2 = 2,
}

impl LogFormatVersion {
    /// The version of new segments.
    pub const NEWEST: LogFormatVersion = LogFormatVersion::V2;

    /// The version that a segment's header names, if it is a known one.
    pub fn from_bytes(bytes: [u8; 2]) -> Option<Self> {
        [LogFormatVersion::V1, LogFormatVersion::V2].into_iter().find(|version| version.to_bytes() == bytes)
    }

    /// The version as a segment's header has it.
    pub fn to_bytes(self) -> [u8; 2] {
        (self as u16).to_le_bytes()
    }
}

/// What a frame's header says about its contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FrameFlags(u32);

impl FrameFlags {
    /// A record has [`RecordFlags::RETAIN`](crate::message::RecordFlags::RETAIN).
    pub const RETAINED: FrameFlags = FrameFlags(1);
    /// Behind the records is a [`OncePart`](super::once::OncePart).
    pub const ONCE: FrameFlags = FrameFlags(2);
    /// A record has a note.
    pub const NOTED: FrameFlags = FrameFlags(4);
    /// All flags of this version.
    const KNOWN: FrameFlags = Self::RETAINED.with(Self::ONCE).with(Self::NOTED);

    /// Both sets of flags together.
    pub const fn with(self, other: FrameFlags) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all flags of `other` are among these.
    pub fn contains(self, other: FrameFlags) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// The length of the body.
    pub body_bytes: u32,
    /// The checksum of the whole frame, see [`frame_crc`].
    pub crc: u32,
    /// How many records are in the body.
    pub records: u32,
    /// The first record's offset, or the next one of the log if there are no records.
    pub first_offset: Offset,
    /// The newest `received_at` of this and all earlier frames.
    pub time_max: TimeMicros,
    flags: FrameFlags,
}

impl FrameHeader {
    /// Reads a header. `None` if the bytes are too few or not a header.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; FRAME_HEADER_BYTES] = bytes.get(..FRAME_HEADER_BYTES)?.try_into().ok()?;
        let (magic, rest) = bytes.split_first_chunk::<4>()?;
        let (body_bytes, rest) = rest.split_first_chunk::<4>()?;
        let (crc, rest) = rest.split_first_chunk::<4>()?;
        let (records, rest) = rest.split_first_chunk::<4>()?;
        let (first_offset, rest) = rest.split_first_chunk::<8>()?;
        let (time_max, rest) = rest.split_first_chunk::<8>()?;
        let (flags, _) = rest.split_first_chunk::<4>()?;
        let header = Self {
            body_bytes: u32::from_le_bytes(*body_bytes),
            crc: u32::from_le_bytes(*crc),
            records: u32::from_le_bytes(*records),
            first_offset: Offset::from_le_bytes(*first_offset),
            time_max: TimeMicros::from_le_bytes(*time_max),
            flags: FrameFlags(u32::from_le_bytes(*flags)),
        };
        (*magic == FRAME_MAGIC && header.body_bytes as usize <= BODY_BYTES_MAX).then_some(header)
    }

    /// Header and body, in bytes.
    pub fn frame_bytes(&self) -> u64 {
        FRAME_HEADER_BYTES as u64 + u64::from(self.body_bytes)
    }

    /// The offset behind the frame's last record.
    pub fn next_offset(&self) -> Offset {
        self.first_offset + u64::from(self.records)
    }

    /// Whether the frame has a once part.
    pub fn has_once(&self) -> bool {
        self.flags.contains(FrameFlags::ONCE)
    }

    /// What the frame holds; `None` if a flag is unknown in this version.
    pub fn flags(&self, version: LogFormatVersion) -> Option<FrameFlags> {
        match version {
            // Version 1 does not say whether a frame has retained records: any frame may.
            LogFormatVersion::V1 => (self.flags == FrameFlags::default()).then_some(FrameFlags::RETAINED),
            LogFormatVersion::V2 => FrameFlags::KNOWN.contains(self.flags).then_some(self.flags),
        }
    }
}

/// Fills in the header of `frame`, which has room for it before the body.
pub fn seal_frame(
    frame: &mut [u8],
    flags: FrameFlags,
    records: u32,
    first_offset: Offset,
    time_max: TimeMicros,
) {
    let body_bytes = u32::try_from(frame.len() - FRAME_HEADER_BYTES).expect("a commit is far below 4 GiB");
    frame[0..4].copy_from_slice(&FRAME_MAGIC);
    frame[4..8].copy_from_slice(&body_bytes.to_le_bytes());
    frame[12..16].copy_from_slice(&records.to_le_bytes());
    frame[16..24].copy_from_slice(&first_offset.to_le_bytes());
    frame[24..32].copy_from_slice(&time_max.to_le_bytes());
    frame[32..36].copy_from_slice(&flags.0.to_le_bytes());
    let crc = frame_crc(frame);
    frame[8..12].copy_from_slice(&crc.to_le_bytes());
}

/// The checksum of a whole frame, without the checksum field itself.
pub fn frame_crc(frame: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&frame[..8]);
    crc.update(&frame[12..]);
    crc.finalize()
}
