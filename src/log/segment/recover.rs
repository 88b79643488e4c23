//! Recovery of one segment: what is whole in it, where it is damaged, and where it ends.

use super::super::frame::FrameHeader;
use super::read::{IndexMark, push_mark};
use super::{FrameError, Ordering, Segment};
use crate::message::{Offset, TimeMicros};

/// What [`Segment::recover`] found.
pub(in crate::log) struct RecoveredSegment {
    /// The offset after the last record.
    pub(in crate::log) next_offset: Offset,
    /// The newest `received_at` in it and before it.
    pub(in crate::log) time_max: TimeMicros,
    /// Everything in front of this position had been acknowledged when the last whole frame was written.
    pub(in crate::log) settled_position: u64,
    /// Bytes behind the last whole commit that are not zero: in the segment that was written last, a
    /// write that was never acknowledged.
    pub(in crate::log) cut_bytes: u64,
    /// Damaged places in front of what was acknowledged.
    pub(in crate::log) gaps: Vec<LogGap>,
}

/// A damaged place in the middle of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::log) struct LogGap {
    /// Where, in words: file and byte.
    pub(in crate::log) place: String,
    /// The first offset that cannot be read.
    pub(in crate::log) from: Offset,
    /// The next offset that can be read.
    pub(in crate::log) to: Offset,
}

/// How far recovery has come.
#[derive(Clone, Copy)]
struct RecoveryStep {
    position: u64,
    next_offset: Offset,
    time_max: TimeMicros,
    settled_position: u64,
    /// The number of the last write that was seen.
    write_number: Option<u32>,
}

impl RecoveryStep {
    fn behind(self, header: &FrameHeader) -> Self {
        Self {
            position: self.position + header.frame_bytes(),
            next_offset: header.next_offset(),
            time_max: header.time_max,
            settled_position: header.settled_position,
            write_number: Some(header.write_number),
        }
    }

    /// Whether a frame may come next in a segment of which the next one begins at `until`. A write that was
    /// abandoned leaves lower numbers behind, or records that the next segment has others for.
    fn may_precede(&self, header: &FrameHeader, until: Offset) -> bool {
        header.next_offset() <= until && self.write_number.is_none_or(|number| header.write_number >= number)
    }
}

impl Segment {
    /// Reads the whole segment, checks every frame, and finds where it ends. A damaged place is a
    /// [`LogGap`] if a frame behind it vouches that it had been acknowledged; if none does, the segment
    /// ends there. No record at or above `until`, where the next segment begins, was ever acknowledged.
    /// Changes nothing on the disk: see [`Segment::cut`].
    pub(in crate::log) fn recover(&self, until: Offset) -> Result<RecoveredSegment, FrameError> {
        let mut index = Vec::new();
        let mut gaps = Vec::new();
        let file_bytes = self.file.len().map_err(|e| self.io_error(e))?;
        let mut step = RecoveryStep {
            position: self.begin,
            next_offset: self.first_offset,
            time_max: TimeMicros::MIN,
            settled_position: 0,
            write_number: None,
        };
        // Behind the last commit of which every frame is whole.
        let mut complete = step;
        while step.position < file_bytes {
            let damage = match self.read_frame(step.position, step.next_offset) {
                Ok((header, _)) if step.may_precede(&header, until) => {
                    push_mark(&mut index, IndexMark::from_header(&header, step.position));
                    step = step.behind(&header);
                    if !header.is_continued() {
                        complete = step;
                    }
                    continue;
                }
                Ok(_) => break,
                Err(damage @ FrameError::Damaged { .. }) => damage,
                Err(error) => return Err(error),
            };
            let Some(resumed) = self.vouched_behind(&step, until)? else { break };
            gaps.push(LogGap { place: damage.to_string(), from: step.next_offset, to: resumed.next_offset });
            (step, complete) = (resumed, resumed);
        }
        index.retain(|mark| mark.position < complete.position);
        // In a file with an earlier life other bytes may follow: those are no write of this one.
        let is_write = self.has_mark_at(complete.position)?;
        let cut_bytes = if is_write { self.written_bytes_from(complete.position)? } else { 0 };
        self.end.store(complete.position, Ordering::Release);
        self.next_write.store(complete.write_number.map_or(0, |number| number + 1), Ordering::Relaxed);
        *self.index.lock() = Some(index);
        let RecoveryStep { next_offset, time_max, settled_position, .. } = complete;
        Ok(RecoveredSegment { next_offset, time_max, settled_position, cut_bytes, gaps })
    }

    /// Where to go on behind a damaged place if it had been acknowledged: some header behind it says so.
    /// The frames there may be damaged themselves; then it is the last that vouches.
    fn vouched_behind(
        &self,
        damaged: &RecoveryStep,
        until: Offset,
    ) -> Result<Option<RecoveryStep>, FrameError> {
        let mut at = self.behind_damage(damaged.position, damaged.next_offset)?;
        let (mut vouching, mut whole) = (None, None);
        while let Some(found) = self.next_header(at, damaged.next_offset)? {
            at = found.behind();
            if !damaged.may_precede(&found.header, until) {
                continue;
            }
            if found.header.settled_position > damaged.position {
                vouching = Some(found);
            }
            if whole.is_none() {
                match self.read_frame(found.position, found.header.first_offset) {
                    Ok(_) => whole = Some(found),
                    Err(FrameError::Damaged { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            if vouching.is_some() && whole.is_some() {
                break;
            }
        }
        let resumed = vouching.map(|vouching| whole.unwrap_or(vouching));
        Ok(resumed.map(|resumed| RecoveryStep {
            position: resumed.position,
            next_offset: resumed.header.first_offset,
            ..*damaged
        }))
    }
}
