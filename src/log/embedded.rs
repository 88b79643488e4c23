//! The embedded log: segments in the data directory, one writer, any number of readers.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};
use tracing::{error, warn};

use super::disk::{Disk, FileSystem};
use super::record::{Batch, Section};
use super::segment::{FrameError, Gap, HEADER_BYTES, Seek, Segment};
use super::tail::Tail;
use super::writer::{Queue, Submission, Writer};
use super::{AppendError, Committed, OpenError, ReadError};
use crate::config;
use crate::limits::VERIFY_AT_START_BYTES;
use crate::message::{Offset, TimeMicros};

type Segments = BTreeMap<Offset, Arc<Segment>>;

/// The log. Cheap to clone; the writer ends after the last clone is gone, or with [`Log::close`].
#[derive(Clone)]
pub struct Log {
    shared: Arc<Shared>,
    closer: Arc<Closer>,
}

/// What the writer and the readers have in common.
pub(super) struct Shared {
    pub(super) queue: Queue,
    pub(super) tail: Tail,
    /// The first write that failed for good.
    pub(super) failure: OnceLock<Arc<str>>,
    segments: RwLock<Segments>,
    stored: AtomicU64,
    trouble: Mutex<Option<String>>,
    accept_corruption: bool,
    /// First offsets of the damaged places that were reported, so that each is reported once.
    reported: Mutex<BTreeSet<Offset>>,
    lost_records: AtomicU64,
}

impl Shared {
    fn segments(&self) -> RwLockReadGuard<'_, Segments> {
        self.segments.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn segments_mut(&self) -> RwLockWriteGuard<'_, Segments> {
        self.segments.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stored(&self) -> Offset {
        self.stored.load(Ordering::Acquire)
    }

    pub(super) fn disk_bytes(&self) -> u64 {
        self.segments().values().map(|segment| segment.disk_bytes()).sum()
    }

    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns what it was before.
    pub(super) fn set_trouble(&self, trouble: Option<String>) -> Option<String> {
        std::mem::replace(&mut *self.trouble.lock().unwrap_or_else(PoisonError::into_inner), trouble)
    }

    /// Says, once, that records are lost and that the log goes on without them.
    fn report(&self, gap: &Gap) {
        if self.reported.lock().unwrap_or_else(PoisonError::into_inner).insert(gap.from) {
            let lost = gap.to - gap.from;
            self.lost_records.fetch_add(lost, Ordering::Relaxed);
            error!(lost, from = gap.from, to = gap.to, place = gap.place, "records of the log are lost");
        }
    }
}

/// Held by the writer's thread: whatever ends it, nobody is left waiting for an answer.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let failure = self.0.failure.get_or_init(|| "its writer panicked".into());
            self.0.set_trouble(Some(AppendError::Failed(failure.clone()).to_string()));
        }
        self.0.queue.abandon();
    }
}

/// Ends the writer when the last [`Log`] goes.
struct Closer {
    shared: Arc<Shared>,
    writer: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Closer {
    fn close(&self) {
        self.shared.queue.close();
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if writer.is_some_and(|writer| writer.join().is_err()) {
            error!("the log's writer panicked");
        }
    }
}

impl Drop for Closer {
    fn drop(&mut self) {
        self.close();
    }
}

impl Log {
    /// Opens or creates the log in `dir/log`, after reading through its newest part.
    ///
    /// # Errors
    /// [`OpenError::Corrupt`] for damage with whole records behind it, or a format that is not
    /// known; [`OpenError::Io`] for the file system's.
    pub fn open(dir: &Path, config: &config::Log) -> Result<Self, OpenError> {
        Self::open_on(Box::new(FileSystem), dir, config)
    }

    pub(super) fn open_on(disk: Box<dyn Disk>, dir: &Path, config: &config::Log) -> Result<Self, OpenError> {
        let dir = dir.join("log");
        std::fs::create_dir_all(&dir)?;
        let mut segments = open_segments(&*disk, &dir)?;
        if segments.is_empty() {
            segments.insert(0, Arc::new(Segment::create(&*disk, &dir, 0)?));
        }
        let recovered = recover(&segments)?;
        if let (false, Some(first)) = (config.accept_corruption, recovered.gaps.first()) {
            return Err(OpenError::Corrupt(refusal(first, recovered.gaps.len())));
        }
        let current = segments.last_entry().expect("one was made if there was none").get().clone();
        // Only now: a log that is refused is left as it was found.
        current.cut()?;
        let shared = Arc::new(Shared {
            queue: Queue::default(),
            tail: Tail::new(recovered.next_offset),
            failure: OnceLock::new(),
            segments: RwLock::new(segments),
            stored: AtomicU64::new(0),
            trouble: Mutex::new(None),
            accept_corruption: config.accept_corruption,
            reported: Mutex::default(),
            lost_records: AtomicU64::new(0),
        });
        recovered.gaps.iter().for_each(|gap| shared.report(gap));
        let writer = Writer {
            shared: shared.clone(),
            disk,
            dir,
            config: config.clone(),
            current,
            next_offset: recovered.next_offset,
            time_max: recovered.time_max,
        };
        let ended = Ended(shared.clone());
        let writer = std::thread::Builder::new().name("log".to_owned()).spawn(move || {
            let _ended = ended;
            writer.run();
        })?;
        let closer = Arc::new(Closer { shared: shared.clone(), writer: Mutex::new(Some(writer)) });
        Ok(Self { shared, closer })
    }

    /// Hands sections to the writer. The receiver resolves when their records are durable, or are
    /// known not to be kept; until `give_up_at`, what passes by itself (a full disk, a budget that
    /// storage is about to free) is waited out. Sections of one call stay together, in one batch.
    pub fn append(
        &self,
        sections: Vec<Section>,
        give_up_at: Instant,
    ) -> oneshot::Receiver<Result<Committed, AppendError>> {
        let (reply, committed) = oneshot::channel();
        self.shared.queue.push(Submission { sections, give_up_at, reply });
        committed
    }

    /// Returns when the writer has looked at the leases of everything that was appended before:
    /// nothing comes in any more under a lease that ended before the call.
    pub async fn barrier(&self) {
        // Whatever the answer, it comes after what was queued before.
        let _ = self.append(Vec::new(), Instant::now()).await;
    }

    /// The oldest offset that can be read.
    pub fn first_offset(&self) -> Offset {
        self.shared.segments().keys().next().copied().unwrap_or_default()
    }

    /// The offset that the next record will get: everything below it is durable.
    pub fn next_offset(&self) -> Offset {
        self.shared.tail.next_offset()
    }

    /// Follows [`Log::next_offset`].
    pub fn subscribe(&self) -> watch::Receiver<Offset> {
        self.shared.tail.subscribe()
    }

    /// The batches from the one that holds `from` on, about `bytes_max` of them, at least one;
    /// none at the end. The first may begin below `from`; where damage was accepted, above it.
    /// Blocks on the disk when `from` is not recent.
    ///
    /// # Errors
    /// [`ReadError::Removed`] if retention has removed `from`, [`ReadError::Corrupt`] at a damaged
    /// place (never passed over in silence), [`ReadError::Io`].
    pub fn read(&self, from: Offset, bytes_max: usize) -> Result<Vec<Batch>, ReadError> {
        match self.shared.tail.read(from, bytes_max) {
            Some(batches) => Ok(batches),
            None => self.read_files(from, bytes_max),
        }
    }

    /// Returns when there is a record at `offset`, or `timeout` is over.
    pub fn wait_blocking(&self, offset: Offset, timeout: Duration) {
        self.shared.tail.wait(offset, timeout);
    }

    /// An offset before which no record was received at or after `time`, close to the first that
    /// was. Blocks on the disk.
    ///
    /// # Errors
    /// [`ReadError::Io`].
    pub fn offset_at(&self, time: TimeMicros) -> Result<Offset, ReadError> {
        let segments: Vec<_> = self.shared.segments().values().cloned().collect();
        let at = segments.partition_point(|segment| segment.created_at <= time);
        match segments.get(at.saturating_sub(1)) {
            Some(segment) => segment.offset_at(time).map_err(|e| self.read_error(&e)),
            None => Ok(self.first_offset()),
        }
    }

    /// Tells retention that everything below `offset` is stored, durably.
    pub fn set_stored(&self, offset: Offset) {
        self.shared.stored.store(offset, Ordering::Release);
    }

    /// Bytes that the log takes on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.shared.disk_bytes()
    }

    /// Records that were lost to damage and passed over because `log.accept_corruption` says so.
    pub fn lost_records(&self) -> u64 {
        self.shared.lost_records.load(Ordering::Relaxed)
    }

    /// Why nothing can be appended, while nothing can.
    pub fn trouble(&self) -> Option<String> {
        self.shared.trouble()
    }

    /// Commits what waits, takes no more, and ends the writer.
    pub async fn close(&self) {
        let closer = self.closer.clone();
        // The writer ends by itself; a runtime that is shutting down need not wait for it.
        let _ = tokio::task::spawn_blocking(move || closer.close()).await;
    }

    fn read_files(&self, from: Offset, bytes_max: usize) -> Result<Vec<Batch>, ReadError> {
        let durable = self.next_offset();
        let mut wanted = from;
        loop {
            let (segment, next_segment) = {
                let segments = self.shared.segments();
                let found = segments.range(..=wanted).next_back().map(|(_, segment)| segment.clone());
                let next = segments.range(wanted + 1..).next().map(|(offset, _)| *offset);
                (found, next)
            };
            let Some(segment) = segment else {
                return Err(ReadError::Removed { wanted, first: self.first_offset() });
            };
            let mut batches = Vec::new();
            let end = self.read_segment(&segment, wanted, durable, bytes_max, &mut batches)?;
            if !batches.is_empty() || end >= durable {
                return Ok(batches);
            }
            // The segment ends before `wanted`: its successor begins there, or records are missing.
            match next_segment {
                Some(next) if next == end => wanted = next,
                Some(next) => {
                    let place = format!("{}: its end is missing", segment.path().display());
                    self.pass_over(Gap { place, from: end, to: next })?;
                    wanted = next;
                }
                None => return Ok(batches),
            }
        }
    }

    /// Reads what `segment` has from `wanted` on. Returns the offset behind what it saw.
    fn read_segment(
        &self,
        segment: &Segment,
        wanted: Offset,
        durable: Offset,
        bytes_max: usize,
        batches: &mut Vec<Batch>,
    ) -> Result<Offset, ReadError> {
        let (mut position, mut offset) = match segment.seek(wanted).map_err(|e| self.read_error(&e))? {
            Seek::At { position, offset } => (position, offset),
            Seek::End { next_offset } => return Ok(next_offset),
        };
        let mut bytes = 0;
        while bytes < bytes_max && offset < durable && position < segment.end() {
            match segment.read_frame(position, offset) {
                Ok((header, batch)) => {
                    offset = header.next_offset();
                    position += header.frame_bytes();
                    bytes += batch.weight();
                    if header.records > 0 && offset > wanted {
                        batches.push(batch);
                    }
                }
                // What is whole is delivered first; the next read begins at the damage.
                Err(FrameError::Damaged { .. }) if !batches.is_empty() => break,
                Err(damage @ FrameError::Damaged { .. }) => {
                    let whole = segment.next_whole(position + 1, offset).map_err(|e| self.read_error(&e))?;
                    let Some((next, header)) = whole else { return Ok(offset) };
                    self.pass_over(Gap { place: damage.to_string(), from: offset, to: header.first_offset })?;
                    (position, offset) = (next, header.first_offset);
                }
                Err(error) => return Err(self.read_error(&error)),
            }
        }
        Ok(offset)
    }

    fn pass_over(&self, gap: Gap) -> Result<(), ReadError> {
        if !self.shared.accept_corruption {
            return Err(ReadError::Corrupt(refusal(&gap, 1).into()));
        }
        self.shared.report(&gap);
        Ok(())
    }

    fn read_error(&self, error: &FrameError) -> ReadError {
        let text = error.to_string().into();
        if matches!(error, FrameError::Io { .. }) { ReadError::Io(text) } else { ReadError::Corrupt(text) }
    }
}

/// What an operator needs to know about damage, and can do.
fn refusal(gap: &Gap, places: usize) -> String {
    let Gap { place, from, to } = gap;
    let more = if places > 1 { format!(" ({} more places are damaged)", places - 1) } else { String::new() };
    format!(
        "{place}; the {} records from offset {from} to {} cannot be read, what follows can{more}. Restore the file from a \
         copy, or set log.accept_corruption = true to go on without them",
        to - from,
        to.saturating_sub(1).max(*from),
    )
}

fn open_segments(disk: &dyn Disk, dir: &Path) -> Result<Segments, OpenError> {
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
            Err(_) if Some(&path) == last.as_ref() && path.metadata()?.len() <= HEADER_BYTES as u64 => {
                warn!(path = %path.display(), "removed a segment that a crash had left without a header");
                std::fs::remove_file(&path)?;
            }
            Err(FrameError::Io { path, source }) => {
                return Err(io::Error::new(source.kind(), format!("{}: {source}", path.display())).into());
            }
            Err(damage) => return Err(OpenError::Corrupt(damage.to_string())),
        }
    }
    Ok(segments)
}

struct RecoveredLog {
    next_offset: Offset,
    time_max: TimeMicros,
    gaps: Vec<Gap>,
}

/// Reads through the newest segments, from the last one back.
fn recover(segments: &Segments) -> Result<RecoveredLog, OpenError> {
    let mut result = RecoveredLog { next_offset: 0, time_max: TimeMicros::MIN, gaps: Vec::new() };
    let mut follower = None;
    let mut read_bytes = 0;
    for segment in segments.values().rev() {
        if read_bytes > VERIFY_AT_START_BYTES {
            break;
        }
        read_bytes += segment.end();
        let mut found = segment.recover().map_err(|error| match error {
            FrameError::Io { path, source } => {
                OpenError::Io(io::Error::new(source.kind(), format!("{}: {source}", path.display())))
            }
            damage @ FrameError::Damaged { .. } => OpenError::Corrupt(damage.to_string()),
        })?;
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
