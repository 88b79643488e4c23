//! Recovery: what opening a log does before anything is appended. It finds the segments, verifies
//! the newest of them, and tells a torn write from damage.
//!
//! It reads at most [`VERIFY_AT_START_BYTES`] from the newest segment back; older frames are checked when
//! they are read. A clean shutdown writes a frame without records, so that damage to the last record of a log
//! that was closed is not taken for a torn write.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::warn;

use super::LogOpenError;
use super::disk::Disk;
use super::embedded::Segments;
use super::segment::{FrameError, LogGap, SEGMENT_HEADER_BYTES, Segment, SegmentHeader};
use crate::limits::VERIFY_AT_START_BYTES;
use crate::message::{Offset, TimeMicros};

/// Describes damage for an operator: what is lost and what to do.
pub(super) fn damage_report(gap: &LogGap, places: usize) -> String {
    let LogGap { place, from, to } = gap;
    let more = if places > 1 { format!(" ({} more places are damaged)", places - 1) } else { String::new() };
    let lost = match to.saturating_sub(*from) {
        0 => format!("no records before offset {to} are missing, but changes to message ids are"),
        lost => {
            format!("the {lost} records from offset {from} to {} cannot be read, later ones can", to - 1)
        }
    };
    format!(
        "{place}; {lost}{more}. Restore the file from a copy, or set log.accept_corruption = true to go on without them"
    )
}

/// The error of opening the log, from that of one segment.
pub(super) fn open_error(error: FrameError) -> LogOpenError {
    match error {
        FrameError::Io { path, source } => {
            LogOpenError::Io(io::Error::new(source.kind(), format!("{}: {source}", path.display())))
        }
        refused => LogOpenError::Corrupt(refused.to_string()),
    }
}

/// Opens every segment in `dir`, reading only their headers. With `accept_corruption` a segment without a
/// header is left out, and where it was is a [`LogGap`]. The oldest are left out if they are no segments any more.
pub(super) fn open_segments(
    disk: &dyn Disk,
    dir: &Path,
    accept_corruption: bool,
) -> Result<(Segments, Vec<LogGap>), LogOpenError> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir)? {
        let path: PathBuf = entry?.path();
        // Whatever else is there is not the log's.
        if let Some(first_offset) = Segment::offset_of(&path) {
            found.insert(first_offset, path);
        }
    }
    let mut segments = Segments::new();
    let mut gaps = Vec::new();
    let mut found = found.into_iter().peekable();
    while let Some((first_offset, path)) = found.next() {
        let error = match Segment::open(disk, &path) {
            Ok(segment) => {
                segments.insert(first_offset, Arc::new(segment));
                continue;
            }
            Err(error @ FrameError::Damaged { .. }) => error,
            Err(error) => return Err(open_error(error)),
        };
        match found.peek() {
            None if is_unfinished(disk, &path)? => {
                warn!(path = %path.display(), "removed a segment that a crash had left without a header");
                disk.remove(&path)?;
            }
            Some(_) if segments.is_empty() && gaps.is_empty() && Segment::is_written_over(disk, &path)? => {
                // Retention had removed it. Later ones are never written over.
                warn!(path = %path.display(), "left out a segment that the log had removed while it was copied");
            }
            Some((next, _)) if accept_corruption => {
                gaps.push(LogGap { place: error.to_string(), from: first_offset, to: *next });
            }
            Some((next, _)) => {
                let gap = LogGap { place: error.to_string(), from: first_offset, to: *next };
                return Err(LogOpenError::Corrupt(damage_report(&gap, 1)));
            }
            None => {
                let what = "Restore the file from a copy, or move it away to go on without its records";
                return Err(LogOpenError::Corrupt(format!("{error}. {what}")));
            }
        }
    }
    Ok((segments, gaps))
}

/// Whether a crash interrupted making a segment: the file has a part of a header, or none, and nothing else.
fn is_unfinished(disk: &dyn Disk, path: &Path) -> io::Result<bool> {
    let mut bytes = vec![0; SEGMENT_HEADER_BYTES + 1];
    let read = disk.open(path, false)?.read_at(&mut bytes, 0)?;
    Ok(SegmentHeader::is_room_for_one(&bytes[..read]))
}

/// What [`recover`] found.
pub(super) struct RecoveredLog {
    /// The offset after the last record.
    pub(super) next_offset: Offset,
    /// The newest `received_at`.
    pub(super) time_max: TimeMicros,
    /// What the newest segment has from this position on was perhaps not acknowledged.
    pub(super) unsettled: u64,
    /// Damaged places with whole frames behind them, oldest first.
    pub(super) gaps: Vec<LogGap>,
}

/// Verifies the newest segments, from the last one back.
pub(super) fn recover(segments: &Segments) -> Result<RecoveredLog, LogOpenError> {
    let mut result =
        RecoveredLog { next_offset: 0, time_max: TimeMicros::MIN, unsettled: 0, gaps: Vec::new() };
    let mut follower = None;
    let mut read_bytes = 0;
    for segment in segments.values().rev() {
        if read_bytes > VERIFY_AT_START_BYTES {
            break;
        }
        read_bytes += segment.end();
        let mut found = segment.recover(follower.unwrap_or(Offset::MAX)).map_err(open_error)?;
        match follower {
            None => {
                (result.next_offset, result.unsettled) = (found.next_offset, found.settled_position);
                if found.cut_bytes > 0 {
                    warn!(
                        bytes = found.cut_bytes,
                        path = %segment.path().display(),
                        next_offset = found.next_offset,
                        "the log ends in a write that the last run did not finish and did not acknowledge; it is cut off"
                    );
                }
            }
            Some(follower) if follower != found.next_offset => {
                let place = format!("{}: its end is missing", segment.path().display());
                found.gaps.push(LogGap { place, from: found.next_offset, to: follower });
            }
            Some(_) => {}
        }
        result.time_max = result.time_max.max(found.time_max);
        found.gaps.append(&mut result.gaps);
        result.gaps = found.gaps;
        follower = Some(segment.first_offset);
    }
    Ok(result)
}

/// Ranges of offsets that cannot be read. Readers find them in any order, and come upon them again.
#[derive(Default)]
pub(super) struct LostRanges(BTreeMap<Offset, Offset>);

impl LostRanges {
    /// Adds a range. Returns how many of its offsets were in none yet; `None` if the range is known.
    pub(super) fn add(&mut self, from: Offset, to: Offset) -> Option<u64> {
        let (mut added, mut uncovered, mut is_known) = (0, from, false);
        for (first, end) in self.0.range(..to.max(from + 1)) {
            is_known |= *first <= uncovered && *end >= to;
            added += first.min(&to).saturating_sub(uncovered);
            uncovered = uncovered.max(*end);
        }
        added += to.saturating_sub(uncovered);
        if is_known && added == 0 {
            return None;
        }
        let end = self.0.entry(from).or_insert(to);
        *end = to.max(*end);
        Some(added)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_record_is_counted_once_however_readers_come_upon_it() {
        let mut lost = LostRanges::default();
        assert_eq!(lost.add(10, 20), Some(10));
        assert_eq!(lost.add(10, 20), None);
        assert_eq!(lost.add(15, 18), None);
        assert_eq!(lost.add(15, 25), Some(5));
        assert_eq!(lost.add(30, 40), Some(10));
        assert_eq!(lost.add(5, 45), Some(15));
        assert_eq!(lost.add(7, 44), None);
        assert_eq!(lost.add(50, 50), Some(0), "a frame without records");
        assert_eq!(lost.add(50, 50), None);
    }
}
