//! Recovery: what opening a log does before anything is appended. It finds the segments, reads through
//! the newest of them, and tells a write that a crash cut short from damage.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::warn;

use super::OpenError;
use super::disk::Disk;
use super::embedded::Segments;
use super::segment::{FrameError, Gap, HEADER_BYTES, Segment};
use crate::limits::VERIFY_AT_START_BYTES;
use crate::message::{Offset, TimeMicros};

/// What an operator needs to know about damage, and can do.
pub(super) fn refusal(gap: &Gap, places: usize) -> String {
    let Gap { place, from, to } = gap;
    let more = if places > 1 { format!(" ({} more places are damaged)", places - 1) } else { String::new() };
    let lost = match to - from {
        0 => format!("no records are missing before offset {to}, but what was said of message ids"),
        lost => {
            format!("the {lost} records from offset {from} to {} cannot be read, what follows can", to - 1)
        }
    };
    format!(
        "{place}; {lost}{more}. Restore the file from a copy, or set log.accept_corruption = true to go on without them"
    )
}

/// Why a segment keeps the log from being opened.
pub(super) fn open_error(error: FrameError) -> OpenError {
    match error {
        FrameError::Io { path, source } => {
            OpenError::Io(io::Error::new(source.kind(), format!("{}: {source}", path.display())))
        }
        refused => OpenError::Corrupt(refused.to_string()),
    }
}

/// Opens every segment in `dir`, without reading more than headers.
pub(super) fn open_segments(disk: &dyn Disk, dir: &Path) -> Result<Segments, OpenError> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path: PathBuf = entry?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            paths.push(path);
        }
    }
    paths.sort();
    let mut segments = Segments::new();
    let last = paths.last().cloned();
    for path in paths {
        match Segment::open(disk, &path) {
            Ok(segment) => {
                segments.insert(segment.first_offset, Arc::new(segment));
            }
            // A crash while the newest segment was made: its header was not durable, so no frame is.
            Err(FrameError::Damaged { .. })
                if Some(&path) == last.as_ref() && path.metadata()?.len() <= HEADER_BYTES as u64 =>
            {
                warn!(path = %path.display(), "removed a segment that a crash had left without a header");
                std::fs::remove_file(&path)?;
            }
            Err(error) => return Err(open_error(error)),
        }
    }
    Ok(segments)
}

/// What [`recover`] found.
pub(super) struct RecoveredLog {
    /// The offset after the last record.
    pub(super) next_offset: Offset,
    /// The newest `received_at`.
    pub(super) time_max: TimeMicros,
    /// Damaged places with whole frames behind them, oldest first.
    pub(super) gaps: Vec<Gap>,
}

/// Reads through the newest segments, from the last one back.
pub(super) fn recover(segments: &Segments) -> Result<RecoveredLog, OpenError> {
    let mut result = RecoveredLog { next_offset: 0, time_max: TimeMicros::MIN, gaps: Vec::new() };
    let mut follower = None;
    let mut read_bytes = 0;
    for segment in segments.values().rev() {
        if read_bytes > VERIFY_AT_START_BYTES {
            break;
        }
        read_bytes += segment.end();
        let mut found = segment.recover().map_err(open_error)?;
        match follower {
            None => {
                result.next_offset = found.next_offset;
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
                found.gaps.push(Gap { place, from: found.next_offset, to: follower });
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
