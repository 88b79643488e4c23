//! A segment: one file of the log, a header and then frames, each frame one batch. The module docs
//! of [`crate::log`] have the layout byte by byte.
//!
//! A reader walks from one frame header to the next. A sparse index, built as a segment is
//! written or first read, lets the walk start near the wanted offset.

use parking_lot::{Mutex, MutexGuard};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::batch::Batch;
use super::disk::{Disk, SegmentFile};
use super::frame::{FRAME_HEADER_BYTES, FRAME_MAGIC, FrameHeader, LogFormatVersion, frame_crc};
use crate::message::{Offset, TimeMicros, now_micros};

/// Bytes of a segment's header.
pub(super) const SEGMENT_HEADER_BYTES: usize = 32;
const SEGMENT_MAGIC: [u8; 8] = *b"headgate";
/// File bytes between two entries of the sparse index.
const INDEX_STEP_BYTES: u64 = 256 << 10;
/// File bytes that a walk over frame headers reads at a time.
const SEGMENT_WALK_BYTES: usize = 64 << 10;

fn segment_header(first_offset: Offset, created_at: TimeMicros) -> [u8; SEGMENT_HEADER_BYTES] {
    let mut header = [0; SEGMENT_HEADER_BYTES];
    header[..8].copy_from_slice(&SEGMENT_MAGIC);
    header[8..10].copy_from_slice(&LogFormatVersion::NEWEST.to_bytes());
    header[12..20].copy_from_slice(&first_offset.to_le_bytes());
    header[20..28].copy_from_slice(&created_at.to_le_bytes());
    let crc = crc32fast::hash(&header[..28]);
    header[28..].copy_from_slice(&crc.to_le_bytes());
    header
}

/// Why a place in a segment cannot be read as a frame.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    /// The bytes are not a frame, or the checksum does not match.
    #[error("{}, byte {position}: {what}", path.display())]
    Damaged { path: PathBuf, position: u64, what: &'static str },
    /// A newer version wrote the frame in a way that this one does not understand.
    #[error("{}, byte {position}: {what} that this version of Headgate does not know", path.display())]
    Newer { path: PathBuf, position: u64, what: &'static str },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// One entry of the sparse index: at `position` a frame begins.
#[derive(Debug, Clone, Copy)]
struct IndexMark {
    first_offset: Offset,
    position: u64,
    time_max: TimeMicros,
}

impl IndexMark {
    fn from_header(header: &FrameHeader, position: u64) -> Self {
        Self { first_offset: header.first_offset, position, time_max: header.time_max }
    }
}

/// One file of the log.
pub(super) struct Segment {
    pub(super) first_offset: Offset,
    version: LogFormatVersion,
    path: PathBuf,
    file: Arc<dyn SegmentFile>,
    /// Where the frames end: all bytes below are durable frames.
    end: AtomicU64,
    /// Bytes that the file takes on disk.
    allocated: AtomicU64,
    /// When it was made, which is when the segment before it ended.
    pub(super) created_at: TimeMicros,
    index: Mutex<Option<Vec<IndexMark>>>,
}

/// What [`Segment::recover`] found.
pub(super) struct RecoveredSegment {
    /// The offset after the last record.
    pub(super) next_offset: Offset,
    /// The newest `received_at` in it and before it.
    pub(super) time_max: TimeMicros,
    /// Bytes behind the last whole frame that are not zero: in the segment that was written last, a
    /// torn write.
    pub(super) cut_bytes: u64,
    /// Damaged places with whole frames behind them.
    pub(super) gaps: Vec<LogGap>,
}

/// A damaged place in the middle of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LogGap {
    /// Where, in words: file and byte.
    pub(super) place: String,
    /// The first offset that cannot be read.
    pub(super) from: Offset,
    /// The next offset that can be read.
    pub(super) to: Offset,
}

impl Segment {
    /// The file name of a segment: its first offset, so that names sort as offsets do.
    pub(super) fn path_of(dir: &Path, first_offset: Offset) -> PathBuf {
        dir.join(format!("{first_offset:020}.log"))
    }

    /// Makes a new segment, durably.
    pub(super) fn create(disk: &dyn Disk, dir: &Path, first_offset: Offset) -> io::Result<Self> {
        let path = Self::path_of(dir, first_offset);
        let file = disk.open(&path, true)?;
        let created_at = now_micros();
        let header = segment_header(first_offset, created_at);
        let written =
            file.write_all_at(&header, 0).and_then(|()| file.sync_data()).and_then(|()| disk.sync_dir(dir));
        if let Err(error) = written {
            // It holds nothing yet, and its name is needed for the next try.
            let _ = std::fs::remove_file(&path);
            return Err(error);
        }
        Ok(Self {
            first_offset,
            version: LogFormatVersion::NEWEST,
            path,
            file,
            end: AtomicU64::new(SEGMENT_HEADER_BYTES as u64),
            allocated: AtomicU64::new(SEGMENT_HEADER_BYTES as u64),
            created_at,
            index: Mutex::new(Some(Vec::new())),
        })
    }

    /// Opens an existing segment and reads its header, no more.
    ///
    /// # Errors
    /// `Newer` for a version that is not known, `Damaged` if there is no whole header.
    pub(super) fn open(disk: &dyn Disk, path: &Path) -> Result<Self, FrameError> {
        let io = |source| FrameError::Io { path: path.to_owned(), source };
        let damaged = |what| FrameError::Damaged { path: path.to_owned(), position: 0, what };
        let file = disk.open(path, false).map_err(io)?;
        let mut header = [0; SEGMENT_HEADER_BYTES];
        if file.read_at(&mut header, 0).map_err(io)? < SEGMENT_HEADER_BYTES || header[..8] != SEGMENT_MAGIC {
            return Err(damaged("it does not begin with a segment's header"));
        }
        // The version comes before the checksum: a newer version may have another header.
        let Some(version) = LogFormatVersion::from_bytes([header[8], header[9]]) else {
            let what = "it was written in a format";
            return Err(FrameError::Newer { path: path.to_owned(), position: 0, what });
        };
        if header[28..] != crc32fast::hash(&header[..28]).to_le_bytes() {
            return Err(damaged("its header's checksum does not match"));
        }
        let first_offset = header[12..20].try_into().map(Offset::from_le_bytes).expect("8 bytes");
        if Self::path_of(path.parent().unwrap_or(path), first_offset) != path {
            return Err(damaged("its name is not the first offset in its header"));
        }
        let len = file.len().map_err(io)?;
        Ok(Self {
            first_offset,
            version,
            path: path.to_owned(),
            file,
            end: AtomicU64::new(len),
            allocated: AtomicU64::new(len),
            created_at: header[20..28].try_into().map(TimeMicros::from_le_bytes).expect("8 bytes"),
            index: Mutex::new(None),
        })
    }

    /// Turns a segment without records into one of the newest version. This is safe because the header
    /// lies in one sector, which the disk writes whole or not at all.
    pub(super) fn renew(&self) -> io::Result<Self> {
        let created_at = now_micros();
        self.file.set_len(SEGMENT_HEADER_BYTES as u64)?;
        self.file.write_all_at(&segment_header(self.first_offset, created_at), 0)?;
        self.file.sync_data()?;
        Ok(Self {
            first_offset: self.first_offset,
            version: LogFormatVersion::NEWEST,
            path: self.path.clone(),
            file: self.file.clone(),
            end: AtomicU64::new(SEGMENT_HEADER_BYTES as u64),
            allocated: AtomicU64::new(SEGMENT_HEADER_BYTES as u64),
            created_at,
            index: Mutex::new(Some(Vec::new())),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether frames can be added: segments of an older version never change.
    pub(super) fn is_newest_version(&self) -> bool {
        self.version == LogFormatVersion::NEWEST
    }

    /// Whether there is a frame in it.
    pub(super) fn has_frames(&self) -> bool {
        self.end() > SEGMENT_HEADER_BYTES as u64
    }

    /// Where the next frame goes.
    pub(super) fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Its size on disk, in bytes.
    pub(super) fn disk_bytes(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed)
    }

    /// Writes a frame at the end, without making it durable: call [`Segment::sync`], then
    /// [`Segment::advance`]. Allocates `step` bytes at a time.
    pub(super) fn write(&self, frame: &[u8], step: u64) -> io::Result<()> {
        let end = self.end();
        let needed = end + frame.len() as u64;
        let allocated = self.disk_bytes();
        if needed > allocated {
            let room = (needed - allocated).next_multiple_of(step);
            // A nearly full disk may have room for the frame, if not for a whole step.
            let taken = match self.file.allocate(allocated, room) {
                Ok(()) => room,
                Err(_) => self.file.allocate(allocated, needed - allocated).map(|()| needed - allocated)?,
            };
            self.allocated.store(allocated + taken, Ordering::Relaxed);
        }
        self.file.write_all_at(frame, end)
    }

    /// Fails unless the disk has room for `bytes` more. Repeated calls allocate that room only once.
    pub(super) fn probe(&self, bytes: u64) -> io::Result<()> {
        let end = self.end();
        self.file.allocate(end, bytes)?;
        self.allocated.store(self.disk_bytes().max(end + bytes), Ordering::Relaxed);
        Ok(())
    }

    /// Makes what was written durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Makes the frame that was just written part of the segment.
    pub(super) fn advance(&self, frame_bytes: u64, first_offset: Offset, time_max: TimeMicros) {
        let position = self.end();
        if let Some(index) = self.index_locked().as_mut() {
            push_mark(index, IndexMark { first_offset, position, time_max });
        }
        self.end.store(position + frame_bytes, Ordering::Release);
    }

    /// Gives back the room behind the last frame.
    pub(super) fn trim(&self) -> io::Result<()> {
        let end = self.end();
        self.file.set_len(end)?;
        self.allocated.store(end, Ordering::Relaxed);
        Ok(())
    }

    /// Reads the whole segment, checks every frame, and finds where it ends. Damage with whole frames
    /// behind it is a [`LogGap`]. Changes nothing on the disk: see [`Segment::cut`].
    pub(super) fn recover(&self) -> Result<RecoveredSegment, FrameError> {
        let mut index = Vec::new();
        let mut gaps = Vec::new();
        let mut position = SEGMENT_HEADER_BYTES as u64;
        let mut next_offset = self.first_offset;
        let file_bytes = self.file.len().map_err(|e| self.io_error(e))?;
        let mut cut_bytes = 0;
        let mut time_max = TimeMicros::MIN;
        while position < file_bytes {
            match self.read_frame(position, next_offset) {
                Ok((header, _)) => {
                    push_mark(&mut index, IndexMark::from_header(&header, position));
                    time_max = header.time_max;
                    next_offset = header.next_offset();
                    position += header.frame_bytes();
                }
                Err(error @ (FrameError::Io { .. } | FrameError::Newer { .. })) => return Err(error),
                Err(damage @ FrameError::Damaged { .. }) => {
                    match self.next_whole_frame(position + 1, next_offset)? {
                        Some((whole, header)) => {
                            gaps.push(LogGap {
                                place: damage.to_string(),
                                from: next_offset,
                                to: header.first_offset,
                            });
                            next_offset = header.first_offset;
                            position = whole;
                        }
                        None => {
                            cut_bytes = self.written_bytes_from(position)?;
                            break;
                        }
                    }
                }
            }
        }
        self.end.store(position, Ordering::Release);
        *self.index_locked() = Some(index);
        Ok(RecoveredSegment { next_offset, time_max, cut_bytes, gaps })
    }

    /// Durably cuts off everything behind the last whole frame: allocated room and, after a crash, a
    /// write that was never acknowledged.
    pub(super) fn cut(&self) -> io::Result<()> {
        self.trim()?;
        self.file.sync_data()
    }

    /// Reads and checks the frame at `position`, whose first offset must be `offset`.
    pub(super) fn read_frame(
        &self,
        position: u64,
        offset: Offset,
    ) -> Result<(FrameHeader, Batch), FrameError> {
        let damaged = |what| FrameError::Damaged { path: self.path.clone(), position, what };
        let header = self.read_header(position)?.ok_or_else(|| damaged("no batch begins here"))?;
        if header.first_offset != offset {
            return Err(damaged("the batch here does not have the next offset"));
        }
        let mut frame = vec![0; usize::try_from(header.frame_bytes()).expect("bounded by BODY_BYTES_MAX")];
        let read = self.file.read_at(&mut frame, position).map_err(|e| self.io_error(e))?;
        if read < frame.len() {
            return Err(damaged("the batch here is cut short"));
        }
        if frame_crc(&frame) != header.crc {
            return Err(damaged("the checksum of the batch here does not match"));
        }
        let newer = || {
            let what = "the batch here has a flag";
            FrameError::Newer { path: self.path.clone(), position, what }
        };
        let flags = header.flags(self.version).ok_or_else(newer)?;
        let body = Bytes::from(frame).slice(FRAME_HEADER_BYTES..);
        let batch = Batch::check(self.version, flags, header.first_offset, header.records, body)
            .ok_or_else(|| damaged("the batch here cannot be taken apart"))?;
        Ok((header, batch))
    }

    fn read_header(&self, position: u64) -> Result<Option<FrameHeader>, FrameError> {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        let read = self.file.read_at(&mut bytes, position).map_err(|e| self.io_error(e))?;
        Ok(FrameHeader::decode(&bytes[..read]))
    }

    /// Finds the next whole frame at or behind `position` whose first offset is at least `offset`.
    pub(super) fn next_whole_frame(
        &self,
        position: u64,
        offset: Offset,
    ) -> Result<Option<(u64, FrameHeader)>, FrameError> {
        let mut position = position;
        let mut window = vec![0; SEGMENT_WALK_BYTES];
        loop {
            let read = self.file.read_at(&mut window, position).map_err(|e| self.io_error(e))?;
            let found = window[..read].windows(FRAME_MAGIC.len()).position(|bytes| bytes == FRAME_MAGIC);
            match found {
                Some(at) => {
                    position += at as u64;
                    if let Some(header) = self.read_header(position)?
                        && header.first_offset >= offset
                    {
                        match self.read_frame(position, header.first_offset) {
                            Ok(_) => return Ok(Some((position, header))),
                            Err(error @ FrameError::Newer { .. }) => return Err(error),
                            Err(_) => {}
                        }
                    }
                    position += 1;
                }
                None if read < window.len() => return Ok(None),
                None => position += (read - FRAME_MAGIC.len() + 1) as u64,
            }
        }
    }

    /// Calls `visit` with each frame that has a once part, in order, and with `None` where frames are
    /// missing, until it returns false. Reads only the headers of the other frames.
    pub(super) fn visit_once(&self, visit: &mut dyn FnMut(Option<Batch>) -> bool) -> Result<(), FrameError> {
        if self.version == LogFormatVersion::V1 {
            return Ok(());
        }
        let mut position = SEGMENT_HEADER_BYTES as u64;
        let mut next_offset = self.first_offset;
        while position < self.end() {
            let header = self.read_header(position)?.filter(|header| header.first_offset == next_offset);
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
                    let Some((whole, header)) = self.next_whole_frame(position + 1, next_offset)? else {
                        break;
                    };
                    (position, next_offset) = (whole, header.first_offset);
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

    /// How many bytes behind `position` were written: up to the last that is not zero.
    fn written_bytes_from(&self, position: u64) -> Result<u64, FrameError> {
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

    /// Finds where the frame that holds `offset` begins.
    pub(super) fn seek(&self, offset: Offset) -> Result<SeekOutcome, FrameError> {
        self.build_index()?;
        let start = {
            let index = self.index_locked();
            let marks = index.as_deref().unwrap_or_default();
            let at = marks.partition_point(|mark| mark.first_offset <= offset);
            at.checked_sub(1).map(|at| marks[at])
        };
        let mut position = start.map_or(SEGMENT_HEADER_BYTES as u64, |mark| mark.position);
        let mut next_offset = start.map_or(self.first_offset, |mark| mark.first_offset);
        while position < self.end() {
            match self.read_header(position)? {
                Some(header) if header.first_offset == next_offset => {
                    if offset < header.next_offset() {
                        return Ok(SeekOutcome::At { position, offset: next_offset });
                    }
                    next_offset = header.next_offset();
                    position += header.frame_bytes();
                }
                _ => return Ok(SeekOutcome::At { position, offset: next_offset }),
            }
        }
        Ok(SeekOutcome::End { next_offset })
    }

    /// The first offset, at the precision of the sparse index, whose batch has a `time_max` of at least
    /// `time`: no record before it was received at or after `time`.
    pub(super) fn offset_at(&self, time: TimeMicros) -> Result<Offset, FrameError> {
        self.build_index()?;
        let index = self.index_locked();
        let marks = index.as_deref().unwrap_or_default();
        // A mark covers its own frame only; frames before the next mark may be newer.
        let at = marks.partition_point(|mark| mark.time_max < time);
        Ok(at.checked_sub(1).map_or(self.first_offset, |at| marks[at].first_offset))
    }

    fn build_index(&self) -> Result<(), FrameError> {
        let mut guard = self.index_locked();
        if guard.is_some() {
            return Ok(());
        }
        let mut index = Vec::new();
        let mut position = SEGMENT_HEADER_BYTES as u64;
        while position < self.end() {
            // A broken header ends the index; a read from there reports the damage.
            let Some(header) = self.read_header(position)? else { break };
            push_mark(&mut index, IndexMark::from_header(&header, position));
            position += header.frame_bytes();
        }
        *guard = Some(index);
        Ok(())
    }

    fn index_locked(&self) -> MutexGuard<'_, Option<Vec<IndexMark>>> {
        self.index.lock()
    }

    fn io_error(&self, source: io::Error) -> FrameError {
        FrameError::Io { path: self.path.clone(), source }
    }
}

/// What [`Segment::seek`] found.
pub(super) enum SeekOutcome {
    /// The frame at `position`, with first offset `offset`, holds the wanted record or is damaged.
    At { position: u64, offset: Offset },
    /// The segment ends before the wanted record; its last record is the one before `next_offset`.
    End { next_offset: Offset },
}

fn push_mark(index: &mut Vec<IndexMark>, mark: IndexMark) {
    if index.last().is_none_or(|last| mark.position - last.position >= INDEX_STEP_BYTES) {
        index.push(mark);
    }
}
