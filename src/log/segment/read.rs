//! Reading a segment: single frames, the way to an offset, and the way on behind a damaged place.
//!
//! In version 3 a header can be trusted by itself: nobody but the log can have made it, and it says where
//! the next frame begins whatever became of its body. In older versions only a whole frame can be.

use super::super::batch::Batch;
use super::{FrameError, Segment};
use bytes::Bytes;

use headgate_format::log::find_crc_frame;

use crate::log::frame::{FRAME_HEADER_BYTES, FRAME_MARK_BYTES, FrameHeader, LogFormatVersion};
use crate::message::{Offset, TimeMicros};
use crate::scheduler::polite_lock;

/// File bytes between two entries of the sparse index.
const INDEX_STEP_BYTES: u64 = 256 << 10;
/// File bytes that a search for the next frame reads at a time.
const SEGMENT_WALK_BYTES: usize = 64 << 10;

/// One entry of the sparse index: at `position` a frame begins.
#[derive(Debug, Clone, Copy)]
pub(super) struct IndexMark {
    pub(super) first_offset: Offset,
    pub(super) position: u64,
    pub(super) time_max: TimeMicros,
}

impl IndexMark {
    pub(super) fn from_header(header: &FrameHeader, position: u64) -> Self {
        Self { first_offset: header.first_offset, position, time_max: header.time_max }
    }
}

pub(super) fn push_mark(index: &mut Vec<IndexMark>, mark: IndexMark) {
    if index.last().is_none_or(|last| mark.position - last.position >= INDEX_STEP_BYTES) {
        index.push(mark);
    }
}

/// What [`Segment::seek`] found.
pub(in crate::log) enum SeekOutcome {
    /// The frame at `position`, with first offset `offset`, holds the wanted record or is damaged.
    At { position: u64, offset: Offset },
    /// The segment ends before the wanted record; its last record is the one before `next_offset`.
    End { next_offset: Offset },
}

/// Where reading goes on behind a damaged place.
#[derive(Debug, Clone, Copy)]
pub(in crate::log) struct ResumePoint {
    pub(in crate::log) position: u64,
    pub(in crate::log) header: FrameHeader,
}

impl ResumePoint {
    /// The position behind the frame.
    pub(super) fn behind(&self) -> u64 {
        self.position + self.header.frame_bytes()
    }
}

impl Segment {
    /// Reads and checks the frame at `position`, whose first offset must be `offset`.
    pub(in crate::log) fn read_frame(
        &self,
        position: u64,
        offset: Offset,
    ) -> Result<(FrameHeader, Batch), FrameError> {
        let damaged = |what| FrameError::Damaged { path: self.path.clone(), position, what };
        let header = self.read_header(position)?.ok_or_else(|| damaged("no batch begins here"))?;
        if header.first_offset != offset {
            return Err(damaged("the batch here does not have the next offset"));
        }
        // A length that anybody can have written takes no memory.
        if self.format.key().is_none()
            && position + header.frame_bytes() > self.file.len().map_err(|e| self.io_error(e))?
        {
            return Err(damaged("the batch here is cut short"));
        }
        let mut frame =
            vec![0; usize::try_from(header.frame_bytes()).expect("bounded by FRAME_BODY_BYTES_MAX")];
        let read = self.file.read_at(&mut frame, position).map_err(|e| self.io_error(e))?;
        if read < frame.len() {
            return Err(damaged("the batch here is cut short"));
        }
        if !self.format.is_whole(&header, &frame) {
            return Err(damaged("the checksum of the batch here does not match"));
        }
        let newer = || {
            let what = "the batch here has a flag".to_owned();
            FrameError::Newer { path: self.path.clone(), position, what }
        };
        let flags = self.format.flags(&header).ok_or_else(newer)?;
        let body = Bytes::from(frame).slice(self.format.header_bytes()..);
        let batch = Batch::check(self.format.version(), flags, header.first_offset, header.records, body)
            .ok_or_else(|| damaged("the batch here cannot be taken apart"))?;
        Ok((header, batch))
    }

    /// What a header at `position` says. Before version 3 it may be anybody's.
    fn read_header(&self, position: u64) -> Result<Option<FrameHeader>, FrameError> {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        let header = &mut bytes[..self.format.header_bytes()];
        let read = self.file.read_at(header, position).map_err(|e| self.io_error(e))?;
        Ok(self.format.decode(&header[..read], position))
    }

    /// The header at `position`, if it can be trusted and has the first offset `offset`.
    pub(super) fn trusted_header(
        &self,
        position: u64,
        offset: Offset,
    ) -> Result<Option<FrameHeader>, FrameError> {
        if self.format.key().is_some() {
            return Ok(self.read_header(position)?.filter(|header| header.first_offset == offset));
        }
        match self.read_frame(position, offset) {
            Ok((header, _)) => Ok(Some(header)),
            Err(FrameError::Damaged { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Finds the next header at or behind `position` that can be trusted and whose first offset is at least
    /// `offset`. Takes time in proportion to the bytes that it passes.
    pub(super) fn next_header(
        &self,
        position: u64,
        offset: Offset,
    ) -> Result<Option<ResumePoint>, FrameError> {
        let Some(key) = self.format.key() else {
            return self.next_crc_frame(position, offset);
        };
        let mut position = position;
        let mut window = vec![0; SEGMENT_WALK_BYTES];
        loop {
            let read = self.file.read_at(&mut window, position).map_err(|e| self.io_error(e))?;
            let mut rest = &window[..read];
            while let Some(at) = key.find_mark(rest) {
                let found = position + (read - rest.len() + at) as u64;
                let header = match rest[at..].len() < FRAME_HEADER_BYTES {
                    true => self.read_header(found)?,
                    false => self.format.decode(&rest[at..], found),
                };
                if let Some(header) = header.filter(|header| header.first_offset >= offset) {
                    return Ok(Some(ResumePoint { position: found, header }));
                }
                rest = &rest[at + 1..];
            }
            if read < window.len() {
                return Ok(None);
            }
            position += (read - FRAME_MARK_BYTES + 1) as u64;
        }
    }

    /// [`Segment::next_header`] before version 3: the next whole frame.
    fn next_crc_frame(&self, position: u64, offset: Offset) -> Result<Option<ResumePoint>, FrameError> {
        let file_bytes = self.file.len().map_err(|e| self.io_error(e))?;
        let left = usize::try_from(file_bytes.saturating_sub(position)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; left];
        let read = self.file.read_at(&mut bytes, position).map_err(|e| self.io_error(e))?;
        let found = find_crc_frame(&bytes[..read], position, offset);
        Ok(found.map(|(position, header)| ResumePoint { position, header }))
    }

    /// Finds the next whole frame behind the damaged one at `position`, which should have had the first
    /// offset `offset`.
    pub(in crate::log) fn resume_behind(
        &self,
        position: u64,
        offset: Offset,
    ) -> Result<Option<ResumePoint>, FrameError> {
        let mut at = self.behind_damage(position, offset)?;
        while let Some(found) = self.next_header(at, offset)? {
            match self.read_frame(found.position, found.header.first_offset) {
                Ok(_) => return Ok(Some(found)),
                Err(FrameError::Damaged { .. }) => at = found.behind(),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Where the search for the next frame begins: a header that can be trusted says where its frame ends.
    pub(super) fn behind_damage(&self, position: u64, offset: Offset) -> Result<u64, FrameError> {
        let header = self.trusted_header(position, offset)?;
        Ok(header.map_or(position + 1, |header| position + header.frame_bytes()))
    }

    /// Calls `visit` with each frame that has a once part, in order, and with `None` where frames are
    /// missing, until it returns false. Reads only the headers of the other frames where those can be
    /// trusted.
    pub(in crate::log) fn visit_once(
        &self,
        visit: &mut dyn FnMut(Option<Batch>) -> bool,
    ) -> Result<(), FrameError> {
        if self.format.version() == LogFormatVersion::V1 {
            return Ok(());
        }
        let mut position = self.begin;
        let mut next_offset = self.first_offset;
        while position < self.end() {
            let header = self.trusted_header(position, next_offset)?;
            let found = match header {
                Some(header) if !header.has_once() => Ok((header, None)),
                _ => self.read_frame(position, next_offset).map(|(header, batch)| (header, Some(batch))),
            };
            let go_on = match found {
                Ok((header, batch)) => {
                    position += header.frame_bytes();
                    next_offset = header.next_offset();
                    batch.is_none_or(|batch| visit(Some(batch)))
                }
                Err(FrameError::Damaged { .. }) => {
                    let go_on = visit(None);
                    let Some(resume) = self.resume_behind(position, next_offset)? else { break };
                    (position, next_offset) = (resume.position, resume.header.first_offset);
                    go_on
                }
                Err(error) => return Err(error),
            };
            if !go_on {
                break;
            }
        }
        Ok(())
    }

    /// Finds where the frame that holds `offset` begins, past damaged places in front of it.
    pub(in crate::log) fn seek(&self, offset: Offset) -> Result<SeekOutcome, FrameError> {
        self.build_index()?;
        let start = {
            let index = polite_lock(&self.index);
            let marks = index.as_deref().unwrap_or_default();
            let at = marks.partition_point(|mark| mark.first_offset <= offset);
            at.checked_sub(1).map(|at| marks[at])
        };
        let mut position = start.map_or(self.begin, |mark| mark.position);
        let mut next_offset = start.map_or(self.first_offset, |mark| mark.first_offset);
        while position < self.end() {
            if let Some(header) = self.trusted_header(position, next_offset)? {
                if offset < header.next_offset() {
                    return Ok(SeekOutcome::At { position, offset: next_offset });
                }
                next_offset = header.next_offset();
                position += header.frame_bytes();
                continue;
            }
            match self.next_header(position + 1, next_offset)? {
                Some(found) if found.header.first_offset <= offset => {
                    (position, next_offset) = (found.position, found.header.first_offset);
                }
                _ => return Ok(SeekOutcome::At { position, offset: next_offset }),
            }
        }
        Ok(SeekOutcome::End { next_offset })
    }

    /// The first offset, at the precision of the sparse index, whose batch has a `time_max` of at least
    /// `time`: no record before it was received at or after `time`.
    pub(in crate::log) fn offset_at(&self, time: TimeMicros) -> Result<Offset, FrameError> {
        self.build_index()?;
        let index = polite_lock(&self.index);
        let marks = index.as_deref().unwrap_or_default();
        // A mark covers its own frame only; frames before the next mark may be newer.
        let at = marks.partition_point(|mark| mark.time_max < time);
        Ok(at.checked_sub(1).map_or(self.first_offset, |at| marks[at].first_offset))
    }

    fn build_index(&self) -> Result<(), FrameError> {
        let mut guard = polite_lock(&self.index);
        if guard.is_some() {
            return Ok(());
        }
        let mut index = Vec::new();
        let (mut position, mut next_offset) = (self.begin, self.first_offset);
        while position < self.end() {
            let header = match self.trusted_header(position, next_offset)? {
                Some(header) => header,
                None => {
                    let Some(found) = self.next_header(position + 1, next_offset)? else { break };
                    position = found.position;
                    found.header
                }
            };
            push_mark(&mut index, IndexMark::from_header(&header, position));
            next_offset = header.next_offset();
            position += header.frame_bytes();
        }
        *guard = Some(index);
        Ok(())
    }

    /// Whether a frame of this segment may begin at `position`. Before version 3 anything may be one.
    pub(super) fn has_mark_at(&self, position: u64) -> Result<bool, FrameError> {
        let mut mark = [0; FRAME_MARK_BYTES];
        let read = self.file.read_at(&mut mark, position).map_err(|e| self.io_error(e))?;
        Ok(self.format.key().is_none_or(|key| key.find_mark(&mark[..read]).is_some()))
    }

    /// How many bytes behind `position` were written: up to the last that is not zero.
    pub(super) fn written_bytes_from(&self, position: u64) -> Result<u64, FrameError> {
        let mut written = 0;
        let mut at = position;
        let mut window = vec![0; SEGMENT_WALK_BYTES];
        loop {
            let read = self.file.read_at(&mut window, at).map_err(|e| self.io_error(e))?;
            if let Some(last) = window[..read].iter().rposition(|byte| *byte != 0) {
                written = at + last as u64 + 1 - position;
            }
            at += read as u64;
            if read < window.len() {
                return Ok(written);
            }
        }
    }
}
