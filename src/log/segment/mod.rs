//! A segment: one file of the log, a header and then frames, each frame one batch. The docs of
//! [`headgate_format::log`] have the layout byte by byte.
//!
//! A reader walks from one frame header to the next ([`read`]). A sparse index, built as a segment is
//! written or first read, lets the walk start near the wanted offset.

mod read;
mod recover;

use parking_lot::Mutex;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use headgate_format::log::segment::SegmentHeaderError;

use super::age::ClockReading;
use super::disk::{Disk, SegmentFile};
use super::frame::{FrameFormat, FrameHeader, LogFormatVersion};
use super::queue::COMMITTERS;
pub(super) use super::segment_format::{SEGMENT_HEADER_BYTES, SegmentHeader};
use super::spare::is_linked;
use crate::message::{Offset, TimeMicros, now_micros};
pub(super) use read::SeekOutcome;
use read::{IndexMark, push_mark};
pub(super) use recover::LogGap;

/// What the disk writes as a whole, in bytes.
const DISK_BLOCK_BYTES: u64 = 4096;
/// File bytes that are written once more at a time.
const REWRITE_BYTES: usize = 1 << 20;

/// Why a place in a segment cannot be read as a frame.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    /// The bytes are not a frame, or the checksum does not match.
    #[error("{}, byte {position}: {what}", path.display())]
    Damaged { path: PathBuf, position: u64, what: &'static str },
    /// A newer version wrote the frame in a way that this one does not understand.
    #[error("{}, byte {position}: {what} that this version of Headgate does not know", path.display())]
    Newer { path: PathBuf, position: u64, what: String },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// One file of the log.
pub(super) struct Segment {
    pub(super) first_offset: Offset,
    /// When it was made, which is when the segment before it ended.
    pub(super) created_at: TimeMicros,
    /// When this process made or found it.
    pub(super) found_at: ClockReading,
    format: FrameFormat,
    path: PathBuf,
    file: Arc<dyn SegmentFile>,
    /// Where the first frame begins.
    begin: u64,
    /// Where the frames end: all bytes below are durable frames.
    end: AtomicU64,
    /// Bytes that the file takes on disk.
    allocated: AtomicU64,
    /// Up to where all blocks have been written at some time: a sync of those costs about half.
    touched: AtomicU64,
    /// The number of the next write.
    next_write: AtomicU32,
    index: Mutex<Option<Vec<IndexMark>>>,
}

impl Segment {
    /// The file name of a segment: its first offset, so that names sort as offsets do.
    pub(super) fn path_of(dir: &Path, first_offset: Offset) -> PathBuf {
        dir.join(format!("{first_offset:020}.log"))
    }

    /// The first offset of the segment with this file name; `None` for a file that is none.
    pub(super) fn offset_of(path: &Path) -> Option<Offset> {
        let digits = path.file_name()?.to_str()?.strip_suffix(".log")?;
        let is_number = digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| digits.parse().ok()).flatten()
    }

    /// Makes a new segment, durably. The log has no record at `first_offset` yet: a file with that name is
    /// what an earlier try left.
    pub(super) fn create(disk: &dyn Disk, dir: &Path, first_offset: Offset) -> io::Result<Self> {
        let path = Self::path_of(dir, first_offset);
        let header = SegmentHeader::new(first_offset, now_micros())?;
        let file = match disk.open(&path, true) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let left = disk.open(&path, false)?;
                left.set_len(0)?;
                left
            }
            made => made?,
        };
        let written = file
            .write_all_at(&header.encode(), 0)
            .and_then(|()| file.sync_data())
            .and_then(|()| disk.sync_dir(dir));
        if let Err(error) = written {
            let _ = disk.remove(&path);
            return Err(error);
        }
        Ok(Self::with_header(&header, path, file, SEGMENT_HEADER_BYTES as u64, Some(Vec::new())))
    }

    /// Makes a new segment, durably, from a file that was one: its path, the file, and its bytes.
    pub(super) fn create_over(
        disk: &dyn Disk,
        dir: &Path,
        first_offset: Offset,
        (former, file, bytes): (&Path, Arc<dyn SegmentFile>, u64),
    ) -> io::Result<Self> {
        let path = Self::path_of(dir, first_offset);
        let header = SegmentHeader::new(first_offset, now_micros())?;
        // The header comes before the name: under its name the file is a segment.
        file.write_all_at(&header.encode(), 0)?;
        file.sync_data()?;
        disk.rename(former, &path)?;
        if let Err(error) = disk.sync_dir(dir) {
            let _ = disk.remove(&path);
            return Err(error);
        }
        let segment = Self::with_header(&header, path, file, bytes, Some(Vec::new()));
        segment.end.store(segment.begin, Ordering::Release);
        Ok(segment)
    }

    /// A descriptor for each that commits.
    pub(super) fn sync_files(&self, disk: &dyn Disk) -> io::Result<[Arc<dyn SegmentFile>; COMMITTERS]> {
        Ok([self.file.clone(), disk.open(&self.path, false)?, disk.open(&self.path, false)?])
    }

    /// The file, to be written over once nobody reads the segment any more.
    pub(super) fn file(&self) -> Arc<dyn SegmentFile> {
        self.file.clone()
    }

    /// Opens an existing segment and reads its header, no more.
    ///
    /// # Errors
    /// `Newer` for a version that is not known, `Damaged` if there is no whole header.
    pub(super) fn open(disk: &dyn Disk, path: &Path) -> Result<Self, FrameError> {
        let io = |source| FrameError::Io { path: path.to_owned(), source };
        let file = disk.open(path, false).map_err(io)?;
        let mut bytes = vec![0; SEGMENT_HEADER_BYTES];
        let read = file.read_at(&mut bytes, 0).map_err(io)?;
        let header = SegmentHeader::decode(&bytes[..read]).map_err(|error| {
            let (path, what) = (path.to_owned(), error.to_string());
            match error {
                SegmentHeaderError::Newer => FrameError::Newer { path, position: 0, what },
                SegmentHeaderError::Missing => {
                    let what = "it does not begin with a segment's header";
                    FrameError::Damaged { path, position: 0, what }
                }
                SegmentHeaderError::Damaged => {
                    FrameError::Damaged { path, position: 0, what: "its header's checksum does not match" }
                }
            }
        })?;
        if Self::offset_of(path) != Some(header.first_offset) {
            let what = "its name is not the first offset in its header";
            return Err(FrameError::Damaged { path: path.to_owned(), position: 0, what });
        }
        let len = file.len().map_err(io)?;
        Ok(Self::with_header(&header, path.to_owned(), file, len, None))
    }

    /// Whether the file was written over to become a later segment, as in a copy of the log's directory that
    /// was made before its name changed.
    pub(super) fn is_written_over(disk: &dyn Disk, path: &Path) -> io::Result<bool> {
        let mut bytes = vec![0; SEGMENT_HEADER_BYTES];
        let read = disk.open(path, false)?.read_at(&mut bytes, 0)?;
        let header = SegmentHeader::decode(&bytes[..read]).ok();
        Ok(header.is_some_and(|header| Self::offset_of(path).is_some_and(|name| header.first_offset > name)))
    }

    fn with_header(
        header: &SegmentHeader,
        path: PathBuf,
        file: Arc<dyn SegmentFile>,
        file_bytes: u64,
        index: Option<Vec<IndexMark>>,
    ) -> Self {
        let begin = header.header_bytes() as u64;
        Self {
            first_offset: header.first_offset,
            created_at: header.created_at,
            found_at: ClockReading::now(),
            format: FrameFormat::of_segment(header),
            path,
            file,
            begin,
            end: AtomicU64::new(file_bytes.max(begin)),
            allocated: AtomicU64::new(file_bytes),
            touched: AtomicU64::new(file_bytes),
            next_write: AtomicU32::new(0),
            index: Mutex::new(index),
        }
    }

    /// Turns a segment without records into one of the newest version. This is safe because the first copy
    /// of the header lies in one sector, which the disk writes whole or not at all.
    pub(super) fn renew(&self) -> io::Result<Self> {
        let header = SegmentHeader::new(self.first_offset, now_micros())?;
        self.file.set_len(self.begin)?;
        self.file.write_all_at(&header.encode(), 0)?;
        self.file.sync_data()?;
        let (path, file) = (self.path.clone(), self.file.clone());
        Ok(Self::with_header(&header, path, file, SEGMENT_HEADER_BYTES as u64, Some(Vec::new())))
    }

    /// How long ago, in microseconds, the segment before it ended.
    pub(super) fn age(&self, now: ClockReading) -> i64 {
        now.age(self.created_at, self.found_at)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its file has another name too, in a backup: then it must not change.
    pub(super) fn is_linked(&self) -> bool {
        is_linked(&*self.file)
    }

    /// Whether frames can be added: segments of an older version never change.
    pub(super) fn is_newest_version(&self) -> bool {
        self.format.version() == LogFormatVersion::NEWEST
    }

    /// Whether its first frame begins at `position`.
    pub(super) fn is_begin(&self, position: u64) -> bool {
        position == self.begin
    }

    /// Where the next frame goes.
    pub(super) fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Its size on disk, in bytes.
    pub(super) fn disk_bytes(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed)
    }

    /// Seals a frame and writes it at `position`, which is the end or behind frames of the same commit.
    /// That makes it neither durable nor part of the segment: call [`Segment::sync`], then
    /// [`Segment::advance`]. Allocates `step` bytes at a time.
    pub(super) fn write(
        &self,
        frame: &mut [u8],
        header: &FrameHeader,
        position: u64,
        step: u64,
    ) -> io::Result<()> {
        let key = self.format.key().expect("segments of an older version are not written to");
        key.seal(frame, header, position);
        let needed = position + frame.len() as u64;
        self.allocate(needed, step)?;
        self.file.write_all_at(frame, position)?;
        self.touched.fetch_max(needed, Ordering::Relaxed);
        Ok(())
    }

    /// Allocates the file up to `needed`, `step` bytes at a time.
    fn allocate(&self, needed: u64, step: u64) -> io::Result<()> {
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
        Ok(())
    }

    /// Where the blocks begin that no write has touched.
    fn untouched_position(&self) -> u64 {
        self.touched.load(Ordering::Relaxed).next_multiple_of(DISK_BLOCK_BYTES)
    }

    /// Whether a file of `bytes` has blocks that no write has touched.
    pub(super) fn is_untouched_below(&self, bytes: u64) -> bool {
        self.untouched_position() < bytes
    }

    /// Writes zeros, durably, to blocks that no write has touched: as many as there are, up to a file of `bytes`. Nothing
    /// else may be written meanwhile.
    pub(super) fn write_ahead(&self, zeros: &[u8], bytes: u64, step: u64) -> io::Result<()> {
        let position = self.untouched_position();
        let end = bytes.min(position + zeros.len() as u64);
        let wanted = usize::try_from(end.saturating_sub(position)).expect("no more than there are zeros");
        self.allocate(end, step)?;
        self.file.write_all_at(&zeros[..wanted], position)?;
        self.file.sync_data()?;
        self.touched.fetch_max(end, Ordering::Relaxed);
        Ok(())
    }

    /// The number of a write that begins now. No two have the same, whether they succeed or not.
    pub(super) fn next_write_number(&self) -> u32 {
        self.next_write.fetch_add(1, Ordering::Relaxed)
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
        if let Some(index) = self.index.lock().as_mut() {
            push_mark(index, IndexMark { first_offset, position, time_max });
        }
        self.end.store(position + frame_bytes, Ordering::Release);
    }

    /// Gives back the room behind the last frame.
    pub(super) fn trim(&self) -> io::Result<()> {
        let end = self.end();
        self.file.set_len(end)?;
        self.allocated.store(end, Ordering::Relaxed);
        self.touched.store(end, Ordering::Relaxed);
        Ok(())
    }

    /// Durably cuts off everything behind the last whole frame: allocated room and, after a crash, a
    /// write that was never acknowledged. What it keeps from `unsettled` on is written once more: after a
    /// sync that failed it may be in the kernel's memory alone, where no later sync looks for it.
    pub(super) fn cut(&self, unsettled: u64) -> io::Result<()> {
        self.trim()?;
        let end = self.end();
        let mut position = unsettled.max(self.begin);
        let mut bytes = vec![0; REWRITE_BYTES];
        while position < end {
            let wanted = usize::try_from(end - position).map_or(bytes.len(), |left| left.min(bytes.len()));
            let read = self.file.read_at(&mut bytes[..wanted], position)?;
            self.file.write_all_at(&bytes[..read], position)?;
            position += wanted as u64;
        }
        self.file.sync_data()
    }

    fn io_error(&self, source: io::Error) -> FrameError {
        FrameError::Io { path: self.path.clone(), source }
    }
}
