//! A segment's header: which records the file begins with, and the secret that marks its frames.

use std::io;

use rand::TryRng;
use rand::rngs::SysRng;

use super::frame::LogFormatVersion;
use crate::message::{Offset, TimeMicros};

/// Bytes of a segment in front of its frames, in the newest version: two copies of the header and zeros.
pub const SEGMENT_HEADER_BYTES: usize = 4096;
/// Bytes of a segment's secret.
pub const SEGMENT_SECRET_BYTES: usize = 32;

const SEGMENT_MAGIC: [u8; 8] = *b"headgate";
/// Bytes in front of the frames in versions 1 and 2.
const OLD_SEGMENT_HEADER_BYTES: usize = 32;
/// Bytes of one copy of the header.
const HEADER_COPY_BYTES: usize = 64;
/// Where the copies are: a bad sector takes one of them.
const HEADER_COPIES_AT: [usize; 2] = [0, SEGMENT_HEADER_BYTES / 2];

/// The header of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The version of its format.
    pub version: LogFormatVersion,
    /// Its first offset.
    pub first_offset: Offset,
    /// When it was made, which is when the segment before it ended.
    pub created_at: TimeMicros,
    /// What marks the frames of this life of the file; zeros before version 3.
    pub secret: [u8; SEGMENT_SECRET_BYTES],
}

/// Why bytes are not a segment's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentHeaderError {
    /// It is none, or was not written to its end.
    #[error("it does not begin with a segment's header")]
    Missing,
    /// It has changed since it was written.
    #[error("its header's checksum does not match")]
    Damaged,
    /// It has a version that is not known.
    #[error("it was written in a format")]
    Newer,
}

const COPY_HAS: &str = "64 bytes";

impl SegmentHeader {
    /// The header of a new segment, with a secret of its own.
    ///
    /// # Errors
    /// The operating system has no random bytes to give.
    pub fn new(first_offset: Offset, created_at: TimeMicros) -> io::Result<Self> {
        let mut secret = [0; SEGMENT_SECRET_BYTES];
        SysRng.try_fill_bytes(&mut secret).map_err(io::Error::other)?;
        Ok(Self { version: LogFormatVersion::NEWEST, first_offset, created_at, secret })
    }

    /// Bytes of the segment in front of its frames.
    pub fn header_bytes(&self) -> usize {
        match self.version {
            LogFormatVersion::V1 | LogFormatVersion::V2 => OLD_SEGMENT_HEADER_BYTES,
            LogFormatVersion::V3 => SEGMENT_HEADER_BYTES,
        }
    }

    /// The bytes of a header of the newest version.
    pub fn encode(&self) -> Vec<u8> {
        let mut copy = [0; HEADER_COPY_BYTES];
        copy[..8].copy_from_slice(&SEGMENT_MAGIC);
        copy[8..10].copy_from_slice(&LogFormatVersion::NEWEST.to_bytes());
        copy[12..20].copy_from_slice(&self.first_offset.to_le_bytes());
        copy[20..28].copy_from_slice(&self.created_at.to_le_bytes());
        copy[28..60].copy_from_slice(&self.secret);
        let crc = crc32fast::hash(&copy[..60]);
        copy[60..].copy_from_slice(&crc.to_le_bytes());
        let mut bytes = vec![0; SEGMENT_HEADER_BYTES];
        HEADER_COPIES_AT.iter().for_each(|at| bytes[*at..at + HEADER_COPY_BYTES].copy_from_slice(&copy));
        bytes
    }

    /// Reads the header from the first bytes of a file: [`SEGMENT_HEADER_BYTES`], or all there are.
    ///
    /// # Errors
    /// [`SegmentHeaderError`]
    pub fn decode(bytes: &[u8]) -> Result<Self, SegmentHeaderError> {
        let copies = HEADER_COPIES_AT.map(|at| Self::decode_copy(bytes.get(at..).unwrap_or_default()));
        let [first, second] = copies;
        match (first, second) {
            (Ok(header), _) => Ok(header),
            (_, Ok(header)) if header.version == LogFormatVersion::V3 => Ok(header),
            (Err(error), _) => Err(error),
        }
    }

    /// Whether a file with these bytes, all that it has, is one whose header was not written to its end.
    pub fn is_room_for_one(bytes: &[u8]) -> bool {
        let in_copy =
            |at: &usize| HEADER_COPIES_AT.iter().any(|copy| (*copy..copy + HEADER_COPY_BYTES).contains(at));
        let mut others = (0..bytes.len()).filter(|at| !in_copy(at));
        bytes.len() <= SEGMENT_HEADER_BYTES && others.all(|at| bytes[at] == 0)
    }

    fn decode_copy(bytes: &[u8]) -> Result<Self, SegmentHeaderError> {
        let (Some(old), Some(magic)) = (bytes.first_chunk::<OLD_SEGMENT_HEADER_BYTES>(), bytes.first_chunk())
        else {
            return Err(SegmentHeaderError::Missing);
        };
        if *magic != SEGMENT_MAGIC {
            return Err(SegmentHeaderError::Missing);
        }
        // The version comes before the checksum: a newer version may have another header.
        let version = LogFormatVersion::from_bytes([old[8], old[9]]).ok_or(SegmentHeaderError::Newer)?;
        let (checked, crc) = match version {
            LogFormatVersion::V1 | LogFormatVersion::V2 => old.split_at(OLD_SEGMENT_HEADER_BYTES - 4),
            LogFormatVersion::V3 => {
                let copy = bytes.first_chunk::<HEADER_COPY_BYTES>().ok_or(SegmentHeaderError::Missing)?;
                copy.split_at(HEADER_COPY_BYTES - 4)
            }
        };
        if crc != crc32fast::hash(checked).to_le_bytes() {
            return Err(SegmentHeaderError::Damaged);
        }
        Ok(Self {
            version,
            first_offset: Offset::from_le_bytes(*checked[12..].first_chunk().expect(COPY_HAS)),
            created_at: TimeMicros::from_le_bytes(*checked[20..].first_chunk().expect(COPY_HAS)),
            secret: checked.get(28..60).and_then(|secret| secret.try_into().ok()).unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_from_either_copy_and_no_changed_bit_changes_what_it_says() {
        let header = SegmentHeader::new(41, -7).expect("random bytes");
        let bytes = header.encode();
        assert_eq!(SegmentHeader::decode(&bytes), Ok(header.clone()));
        for bit in 0..HEADER_COPY_BYTES * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(SegmentHeader::decode(&changed), Ok(header.clone()), "bit {bit}");
            changed[HEADER_COPIES_AT[1] + bit / 8] ^= 1 << (bit % 8);
            assert!(SegmentHeader::decode(&changed).is_err(), "bit {bit} of both");
        }
        for cut in 0..HEADER_COPY_BYTES {
            assert_eq!(SegmentHeader::decode(&bytes[..cut]), Err(SegmentHeaderError::Missing));
        }
        assert_ne!(SegmentHeader::new(41, -7).expect("random bytes").secret, header.secret);
    }
}
