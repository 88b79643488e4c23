//! The embedded log: segments in the data directory, one writer, any number of readers.

use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::error;

use super::batch::Batch;
use super::commit_thread::CommitThread;
use super::cut::LogCut;
use super::disk::{Disk, FileSystem};
use super::queue::{WRITER_THREADS, WriterQueue, WriterSubmission};
use super::recovery::{LostRanges, damage_report, open_error, open_segments, recover};
use super::retention::{Hold, Holds};
use super::section::Section;
use super::segment::{FrameError, LogGap, SeekOutcome, Segment};
use super::solo_commit::SoloCommitter;
use super::spare::SpareSegments;
use super::tail::Tail;
use super::unsettled::UnsettledCommits;
use super::window::DedupWindow;
use super::withheld::WithheldRules;
use super::writer::{LogWriter, WrittenEnd};
use super::{
    AppendError, BatchListener, Log, LogFuture, LogOpenError, LogReadError, OnceId, PendingCommit,
    log_trouble,
};
use crate::config::{self, Durability};
use crate::limits::FRAME_PART_BYTES_MAX;
use crate::message::{Offset, TimeMicros};
use crate::trouble::TroubleCell;

/// How often a pulse that waits looks whether it is the disk that is waited for.
const PULSE_POLL_INTERVAL: Duration = Duration::from_millis(500);

/// The segments of a log, by their first offsets.
pub(super) type Segments = BTreeMap<Offset, Arc<Segment>>;

/// The log in files. Dropping it, or [`Log::close`], ends the writer.
pub struct EmbeddedLog {
    shared: Arc<EmbeddedLogShared>,
    closer: Arc<WriterCloser>,
    solo: Arc<SoloCommitter>,
}

/// The state that the writer and the readers share.
pub(super) struct EmbeddedLogShared {
    pub(super) queue: WriterQueue,
    pub(super) unsettled: UnsettledCommits,
    pub(super) tail: Tail,
    /// Called with each durable batch, before its submissions are answered.
    pub(super) listener: OnceLock<BatchListener>,
    /// The first write that failed for good.
    pub(super) failure: OnceLock<Arc<str>>,
    segments: RwLock<Segments>,
    /// Bytes of the spare segments.
    pub(super) spare_bytes: AtomicU64,
    pub(super) holds: Holds,
    pub(super) trouble: TroubleCell,
    accept_corruption: bool,
    /// The records that were reported as lost, so that each is counted once.
    lost: Mutex<LostRanges>,
    lost_records: AtomicU64,
    evicted_ids: Arc<AtomicU64>,
    withheld: Arc<WithheldRules>,
}

impl EmbeddedLogShared {
    pub(super) fn segments(&self) -> RwLockReadGuard<'_, Segments> {
        self.segments.read()
    }

    pub(super) fn segments_mut(&self) -> RwLockWriteGuard<'_, Segments> {
        self.segments.write()
    }

    pub(super) fn disk_bytes(&self) -> u64 {
        let segments: u64 = self.segments().values().map(|segment| segment.disk_bytes()).sum();
        segments + self.spare_bytes.load(Ordering::Relaxed)
    }

    /// Reports a gap, once: its records are lost and the log goes on without them.
    fn report_gap(&self, gap: &LogGap) {
        if let Some(lost) = self.lost.lock().add(gap.from, gap.to) {
            self.lost_records.fetch_add(lost, Ordering::Relaxed);
            error!(lost, from = gap.from, to = gap.to, place = gap.place, "records of the log are lost");
        }
    }
}

/// A drop guard of who commits: if the thread panics, every caller gets an answer.
pub(super) struct WriterExitGuard(pub(super) Arc<EmbeddedLogShared>);

impl Drop for WriterExitGuard {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let failure = self.0.failure.get_or_init(|| "its writer panicked".into());
        let error = AppendError::Failed(failure.clone());
        self.0.trouble.set(Some(error.to_string()));
        self.0.queue.abandon();
        for submission in self.0.unsettled.take_back(&self.0) {
            submission.answer(Err(error.clone()));
        }
    }
}

/// Ends the writer when the log is dropped.
struct WriterCloser {
    shared: Arc<EmbeddedLogShared>,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

impl WriterCloser {
    fn close(&self) {
        self.shared.queue.close();
        let threads = std::mem::take(&mut *self.threads.lock());
        if threads.into_iter().filter_map(|thread| thread.join().err()).count() > 0 {
            error!("the log's writer panicked");
        }
    }
}

impl Drop for WriterCloser {
    fn drop(&mut self) {
        self.close();
    }
}

impl EmbeddedLog {
    /// Opens or creates the log in `dir/log`, and verifies its newest part. `dedup` bounds how long, and
    /// how many, message ids stay known.
    ///
    /// # Errors
    /// [`LogOpenError::Corrupt`] for damage with whole records behind it, or an unknown format;
    /// [`LogOpenError::Io`] for an error of the file system.
    pub fn open(
        dir: &Path,
        config: &config::LogConfig,
        dedup: &config::IntakeConfig,
    ) -> Result<Self, LogOpenError> {
        Self::open_on(Box::new(FileSystem), dir, config, dedup)
    }

    pub(super) fn open_on(
        disk: Box<dyn Disk>,
        dir: &Path,
        config: &config::LogConfig,
        dedup: &config::IntakeConfig,
    ) -> Result<Self, LogOpenError> {
        let parent = dir;
        let dir = dir.join("log");
        std::fs::create_dir_all(&dir)?;
        disk.sync_dir(parent)?;
        let (mut segments, left_out) = open_segments(&*disk, &dir, config.accept_corruption)?;
        if segments.is_empty() {
            segments.insert(0, Arc::new(Segment::create(&*disk, &dir, 0)?));
        }
        let recovered = recover(&segments)?;
        if let (false, Some(first)) = (config.accept_corruption, recovered.gaps.first()) {
            return Err(LogOpenError::Corrupt(damage_report(first, recovered.gaps.len())));
        }
        let mut window = DedupWindow::new(dedup, config);
        window.recover(segments.values()).map_err(open_error)?;
        let mut current = segments.last_entry().expect("one was made if there was none").get().clone();
        // Only now does opening change files: a refused log stays as it was found.
        // Only what was synced is known to be on the disk; with "os" nobody was promised that it is.
        current.cut(match config.durability {
            Durability::Fsync => recovered.unsettled,
            Durability::Os => current.end(),
        })?;
        let next_offset = recovered.next_offset;
        let has_records = next_offset > current.first_offset;
        if !current.is_newest_version() || has_records && current.is_linked() {
            current = Arc::new(match has_records {
                true => Segment::create(&*disk, &dir, next_offset)?,
                false => current.renew()?,
            });
            segments.insert(next_offset, current.clone());
        }
        let mut spares = SpareSegments::find(&*disk, &dir)?;
        // What an earlier run renamed or removed must not come back once this one appends.
        spares.sync_dir(&*disk, &dir)?;
        let shared = Arc::new(EmbeddedLogShared {
            queue: WriterQueue::default(),
            unsettled: UnsettledCommits::default(),
            tail: Tail::new(recovered.next_offset),
            listener: OnceLock::new(),
            failure: OnceLock::new(),
            segments: RwLock::new(segments),
            spare_bytes: AtomicU64::new(spares.bytes()),
            holds: Holds::new(),
            trouble: log_trouble(),
            accept_corruption: config.accept_corruption,
            lost: Mutex::default(),
            lost_records: AtomicU64::new(0),
            evicted_ids: window.evicted(),
            withheld: Arc::default(),
        });
        left_out.iter().chain(&recovered.gaps).for_each(|gap| shared.report_gap(gap));
        let writer = LogWriter {
            shared: shared.clone(),
            synced_end: current.end(),
            sync_files: current.sync_files(&*disk)?,
            disk,
            dir,
            config: config.clone(),
            written: WrittenEnd {
                position: current.end(),
                next_offset: recovered.next_offset,
                time_max: recovered.time_max,
            },
            current,
            durable_time_max: recovered.time_max,
            commit_number: 0,
            unlearned: VecDeque::new(),
            window,
            must_roll: false,
            spares,
            unremovable: None,
            stay_s: dedup.dedup_window_s,
        };
        let threads = Mutex::new(Vec::new());
        let closer = Arc::new(WriterCloser { shared: shared.clone(), threads });
        let writer = Arc::new(Mutex::new(writer));
        for number in 0..WRITER_THREADS {
            let thread = CommitThread { number, shared: shared.clone(), writer: writer.clone() };
            let ended = WriterExitGuard(shared.clone());
            let spawned = std::thread::Builder::new().name(format!("log-{number}")).spawn(move || {
                let _ended = ended;
                thread.run();
            })?;
            closer.threads.lock().push(spawned);
        }
        let solo = Arc::new(SoloCommitter { shared: shared.clone(), writer });
        Ok(Self { shared, closer, solo })
    }

    fn submit(&self, sections: Vec<Section>, releases: Vec<OnceId>, give_up_at: Instant) -> PendingCommit {
        let (reply, committed) = oneshot::channel();
        let submission = WriterSubmission { sections, releases, give_up_at, reply };
        if let Err(submission) = self.solo.try_commit(submission) {
            self.shared.queue.push(submission);
        }
        committed
    }

    fn read_files(&self, from: Offset, bytes_max: usize) -> Result<Vec<Batch>, LogReadError> {
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
                return Err(LogReadError::Removed { wanted, first: self.first_offset() });
            };
            let mut batches = Vec::new();
            let end = self.read_segment(&segment, wanted, durable, bytes_max, &mut batches)?;
            if !batches.is_empty() || end >= durable {
                return Ok(batches);
            }
            // The segment ends before `wanted`: either the next one begins there, or records are missing.
            match next_segment {
                Some(next) if next == end => wanted = next,
                Some(next) => {
                    let place = format!("{}: its end is missing", segment.path().display());
                    self.pass_over(LogGap { place, from: end, to: next })?;
                    wanted = next;
                }
                None => {
                    let place = format!("{}: its end is damaged", segment.path().display());
                    self.pass_over(LogGap { place, from: end, to: durable })?;
                    return Ok(vec![Batch::nothing_below(durable)]);
                }
            }
        }
    }

    /// Reads the batches of `segment` from `wanted` on. Returns the offset behind the last frame it read.
    fn read_segment(
        &self,
        segment: &Segment,
        wanted: Offset,
        durable: Offset,
        bytes_max: usize,
        batches: &mut Vec<Batch>,
    ) -> Result<Offset, LogReadError> {
        let (mut position, mut offset) = match segment.seek(wanted).map_err(|e| self.read_error(&e))? {
            SeekOutcome::At { position, offset } => (position, offset),
            SeekOutcome::End { next_offset } => return Ok(next_offset),
        };
        let mut bytes = 0;
        while bytes < bytes_max && offset < durable && position < segment.end() {
            match segment.read_frame(position, offset) {
                Ok((header, batch)) => {
                    offset = header.next_offset();
                    position += header.frame_bytes();
                    // Frames without records do not count, or the read could end before `wanted`.
                    if header.records > 0 && offset > wanted {
                        bytes += batch.weight();
                        batches.push(batch);
                    }
                }
                // Whole batches are delivered first; the next read begins at the damage.
                Err(FrameError::Damaged { .. }) if !batches.is_empty() => break,
                Err(damage @ FrameError::Damaged { .. }) => {
                    let resume = segment.resume_behind(position, offset).map_err(|e| self.read_error(&e))?;
                    let Some(resume) = resume else { return Ok(offset) };
                    let to = resume.header.first_offset;
                    self.pass_over(LogGap { place: damage.to_string(), from: offset, to })?;
                    (position, offset) = (resume.position, to);
                }
                Err(error) => return Err(self.read_error(&error)),
            }
        }
        Ok(offset)
    }

    fn pass_over(&self, gap: LogGap) -> Result<(), LogReadError> {
        if !self.shared.accept_corruption {
            return Err(LogReadError::Corrupt(damage_report(&gap, 1).into()));
        }
        self.shared.report_gap(&gap);
        Ok(())
    }

    fn read_error(&self, error: &FrameError) -> LogReadError {
        let text = error.to_string().into();
        if matches!(error, FrameError::Io { .. }) {
            LogReadError::Io(text)
        } else {
            LogReadError::Corrupt(text)
        }
    }
}

impl Log for EmbeddedLog {
    fn withheld(&self) -> &Arc<WithheldRules> {
        &self.shared.withheld
    }

    /// All sections of one call are kept together or not at all.
    fn append(&self, sections: Vec<Section>, give_up_at: Instant) -> PendingCommit {
        let unsplit = |section: &Section| section.unsplit_bytes();
        let heavy = sections.iter().filter(|section| section.weight() > FRAME_PART_BYTES_MAX);
        let bytes = heavy.map(unsplit).max().unwrap_or_default();
        if bytes > FRAME_PART_BYTES_MAX {
            let (reply, refused) = oneshot::channel();
            let _ = reply.send(Err(AppendError::TooLarge { bytes, bytes_max: FRAME_PART_BYTES_MAX }));
            return refused;
        }
        self.submit(sections, Vec::new(), give_up_at)
    }

    fn release(&self, ids: Vec<OnceId>, give_up_at: Instant) -> PendingCommit {
        self.submit(Vec::new(), ids, give_up_at)
    }

    /// Returns when the writer has checked the leases of all earlier appends.
    fn barrier(&self) -> LogFuture<'_, ()> {
        // Any answer to an empty append comes after everything queued before it.
        let passed = self.append(Vec::new(), Instant::now());
        Box::pin(async { drop(passed.await) })
    }

    fn first_offset(&self) -> Offset {
        self.shared.segments().keys().next().copied().unwrap_or_default()
    }

    fn next_offset(&self) -> Offset {
        self.shared.tail.next_offset()
    }

    fn read(&self, from: Offset, bytes_max: usize) -> Result<Vec<Batch>, LogReadError> {
        match self.shared.tail.read(from, bytes_max) {
            Some(batches) => Ok(batches),
            None => self.read_files(from, bytes_max),
        }
    }

    fn read_recent(&self, from: Offset, bytes_max: usize) -> Option<Vec<Batch>> {
        self.shared.tail.read(from, bytes_max)
    }

    /// Runs the listener on the writer's thread.
    fn listen(&self, listener: BatchListener) {
        let _ = self.shared.listener.set(listener);
    }

    fn wait_blocking(&self, offset: Offset, timeout: Duration) {
        self.shared.tail.wait(offset, timeout);
    }

    fn offset_at(&self, time: TimeMicros) -> Result<Offset, LogReadError> {
        let segments: Vec<_> = self.shared.segments().values().cloned().collect();
        // No time of a segment is sorted, because clocks are set back: not `created_at`, and not `received_at`. The
        // newest time so far, which a segment's index has, only rises. The newest segment that has a place behind
        // its beginning where that time was still less is the one.
        for segment in segments.iter().rev() {
            let offset = segment.offset_at(time).map_err(|e| self.read_error(&e))?;
            if offset > segment.first_offset {
                return Ok(offset);
            }
        }
        Ok(self.first_offset())
    }

    fn hold(&self) -> Hold {
        self.shared.holds.hold()
    }

    fn hold_with_room(&self) -> Hold {
        self.shared.holds.hold_with_room()
    }

    fn begin_retention(&self) {
        self.shared.holds.begin();
    }

    fn bytes(&self) -> u64 {
        self.shared.disk_bytes()
    }

    fn cut(&self) -> Option<LogCut> {
        Some(LogCut::make(&self.shared))
    }

    fn evicted_ids(&self) -> u64 {
        self.shared.evicted_ids.load(Ordering::Relaxed)
    }

    fn lost_records(&self) -> u64 {
        self.shared.lost_records.load(Ordering::Relaxed)
    }

    fn trouble(&self) -> Option<String> {
        self.shared.trouble.current()
    }

    /// A disk that does not answer is none that a restart mends.
    fn pulse(&self) -> LogFuture<'_, bool> {
        let answered = self.barrier();
        Box::pin(async move {
            let mut answered = answered;
            loop {
                tokio::select! {
                    () = &mut answered => break,
                    () = tokio::time::sleep(PULSE_POLL_INTERVAL) => {
                        if self.shared.queue.is_syncing() {
                            break;
                        }
                    }
                }
            }
            self.shared.failure.get().is_none()
        })
    }

    fn close(&self) -> LogFuture<'_, ()> {
        let closer = self.closer.clone();
        // The writer ends by itself, so a runtime that shuts down need not wait for it.
        Box::pin(async { drop(tokio::task::spawn_blocking(move || closer.close()).await) })
    }
}
