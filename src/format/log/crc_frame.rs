//! Frames of versions 1 and 2: read for ever, and no longer written. A constant marks them and a CRC-32
//! checks them, so that a payload can be made to look like one; only what is a whole frame counts.

use super::frame::{FrameFlags, FrameHeader};
use crate::message::{Offset, TimeMicros};

/// Bytes of a frame's header.
pub(super) const CRC_FRAME_HEADER_BYTES: usize = 36;
/// The first bytes of every frame.
const CRC_FRAME_MARK: [u8; 4] = *b"HGf1";
/// The part of a frame in front of its checksum.
const BEFORE_CRC_BYTES: usize = 8;
/// Where the part behind its checksum begins.
const BEHIND_CRC_AT: usize = 12;

pub(super) fn decode(bytes: &[u8], position: u64) -> Option<FrameHeader> {
    let bytes: &[u8; CRC_FRAME_HEADER_BYTES] = bytes.first_chunk()?;
    let (mark, rest) = bytes.split_first_chunk::<4>()?;
    let (body_bytes, rest) = rest.split_first_chunk::<4>()?;
    let (crc, rest) = rest.split_first_chunk::<4>()?;
    let (records, rest) = rest.split_first_chunk::<4>()?;
    let (first_offset, rest) = rest.split_first_chunk::<8>()?;
    let (time_max, rest) = rest.split_first_chunk::<8>()?;
    let (flags, _) = rest.split_first_chunk::<4>()?;
    let header = FrameHeader {
        flags: FrameFlags(u32::from_le_bytes(*flags)),
        records: u32::from_le_bytes(*records),
        first_offset: Offset::from_le_bytes(*first_offset),
        time_max: TimeMicros::from_le_bytes(*time_max),
        // One write was under way at a time: what is in front of a frame was acknowledged.
        settled_position: position,
        write_number: 0,
        header_bytes: u32::try_from(CRC_FRAME_HEADER_BYTES).ok()?,
        body_bytes: u32::from_le_bytes(*body_bytes),
        crc: u32::from_le_bytes(*crc),
    };
    (*mark == CRC_FRAME_MARK && header.is_in_bounds(position)).then_some(header)
}

/// The checksum of a whole frame, without the checksum field itself.
pub(super) fn frame_crc(frame: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&frame[..BEFORE_CRC_BYTES]);
    crc.update(&frame[BEHIND_CRC_AT..]);
    crc.finalize()
}

/// Finds the first whole frame in `bytes`, which begin at `position` of a segment, whose first offset is at
/// least `offset_min`. Takes time in proportion to the bytes, however many of them look like headers and
/// however long the bodies that those claim: all checksums come from one running over all bytes.
pub fn find_crc_frame(bytes: &[u8], position: u64, offset_min: Offset) -> Option<(u64, FrameHeader)> {
    let mut candidates = Vec::new();
    for (at, mark) in bytes.windows(CRC_FRAME_MARK.len()).enumerate() {
        if mark == CRC_FRAME_MARK
            && let Some(header) = decode(&bytes[at..], position + at as u64)
            && header.first_offset >= offset_min
            && let Some(end) = usize::try_from(header.frame_bytes()).ok().and_then(|n| at.checked_add(n))
            && end <= bytes.len()
        {
            candidates.push((at, end, header));
        }
    }
    let mut wanted: Vec<usize> =
        candidates.iter().flat_map(|(at, end, _)| [at + BEHIND_CRC_AT, *end]).collect();
    wanted.sort_unstable();
    wanted.dedup();
    let mut running = crc32fast::Hasher::new();
    let mut hashed = 0;
    let mut running_at = |at: usize| {
        running.update(&bytes[hashed..at]);
        hashed = at;
        running.clone().finalize()
    };
    let running: Vec<u32> = wanted.iter().map(|at| running_at(*at)).collect();
    let running_at = |at| running[wanted.binary_search(&at).expect("it is wanted")];
    let is_whole = |(at, end, header): &&(usize, usize, FrameHeader)| {
        let (before, behind) = (&bytes[*at..at + BEFORE_CRC_BYTES], at + BEHIND_CRC_AT);
        let moved = (end - behind) as u64;
        // Both sides lack the checksum of the bytes behind, which is the same.
        header.crc ^ moved_crc(crc32fast::hash(before), moved)
            == running_at(*end) ^ moved_crc(running_at(behind), moved)
    };
    candidates.iter().find(is_whole).map(|(at, _, header)| (position + *at as u64, *header))
}

/// What the checksum of some bytes adds to that of these bytes and `bytes` more behind them.
fn moved_crc(crc: u32, bytes: u64) -> u32 {
    let mut moved = crc32fast::Hasher::new_with_initial(crc);
    moved.combine(&crc32fast::Hasher::new_with_initial_len(0, bytes));
    moved.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(first_offset: Offset, body: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; CRC_FRAME_HEADER_BYTES];
        frame.extend_from_slice(body);
        frame[..4].copy_from_slice(&CRC_FRAME_MARK);
        frame[4..8].copy_from_slice(&u32::try_from(body.len()).expect("short").to_le_bytes());
        frame[12..16].copy_from_slice(&1_u32.to_le_bytes());
        frame[16..24].copy_from_slice(&first_offset.to_le_bytes());
        let crc = frame_crc(&frame);
        frame[8..12].copy_from_slice(&crc.to_le_bytes());
        frame
    }

    #[test]
    fn the_first_whole_frame_is_found_behind_broken_ones_and_around_one_in_its_body() {
        let inner = frame(6, b"a payload that is a frame");
        let outer = frame(5, &[b"....", &inner[..], b"...."].concat());
        let mut broken = frame(4, &[1; 50]);
        broken[60] ^= 1;
        let bytes = [b"xHGf1HGf1", &broken[..], &outer, &frame(9, b"")].concat();
        let at = (9 + broken.len()) as u64;
        let found = find_crc_frame(&bytes, 100, 5).expect("it is there");
        assert_eq!((found.0, found.1.first_offset), (100 + at, 5));
        let found = find_crc_frame(&bytes, 100, 7).expect("it is there");
        assert_eq!(found.1.first_offset, 9);
        assert_eq!(find_crc_frame(&bytes, 100, 10), None);
        assert_eq!(find_crc_frame(&bytes[..bytes.len() - 1], 100, 9), None, "cut short");
    }

    #[test]
    fn a_megabyte_of_false_headers_takes_no_time() {
        let mut bytes = Vec::new();
        while bytes.len() < 1 << 20 {
            let mut header = frame(7, b"");
            header[4..8].copy_from_slice(&(1_u32 << 19).to_le_bytes());
            bytes.extend_from_slice(&header);
        }
        let started = std::time::Instant::now();
        assert_eq!(find_crc_frame(&bytes, 0, 0), None);
        assert!(started.elapsed() < std::time::Duration::from_secs(10), "{:?}", started.elapsed());
    }
}
