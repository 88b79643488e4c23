//! The writer: one thread that owns the end of the log. It drains all waiting submissions into one
//! batch, makes it durable, and answers each of them.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tracing::{info, warn};

use super::assembly::{AssembledCommit, AssembledFrame, Assembly};
use super::batch::Batch;
use super::disk::Disk;
use super::embedded::EmbeddedLogShared;
use super::frame::{FRAME_HEADER_BYTES, FrameFlags, FrameHeader};
use super::once::{OncePart, WindowStamp};
use super::queue::WriterSubmission;
use super::section::Section;
use super::segment::Segment;
use super::spare::SpareSegments;
use super::window::DedupWindow;
use super::{AppendError, CommitOutcome, SectionOutcome, retention};
use crate::config::{self, Durability};
use crate::limits::SEGMENT_ALLOCATE_BYTES;
use crate::message::{Offset, TimeMicros, now_micros};

/// The pause before a failed append is tried again.
const LOG_WRITE_RETRY_PAUSE: Duration = Duration::from_millis(50);
/// How often the writer runs retention when nothing is appended.
const WRITER_IDLE_INTERVAL: Duration = Duration::from_secs(1);
/// The largest size of a once part without releases and open exchanges.
const ONCE_PART_BYTES_MAX: usize = 48;

/// The state of the writer's thread.
pub(super) struct LogWriter {
    pub(super) shared: Arc<EmbeddedLogShared>,
    pub(super) disk: Box<dyn Disk>,
    pub(super) dir: PathBuf,
    pub(super) config: config::LogConfig,
    /// The segment that receives new frames.
    pub(super) current: Arc<Segment>,
    pub(super) next_offset: Offset,
    /// The newest `received_at` so far.
    pub(super) time_max: TimeMicros,
    /// The known ids.
    pub(super) window: DedupWindow,
    /// The next segment may be there, half made: a start may find it, so the current one must not grow past
    /// its name.
    pub(super) must_roll: bool,
    /// With [`Durability::Os`], where the last sync of the current segment ended.
    pub(super) synced_end: u64,
    /// Files that the next segments are written over.
    pub(super) spares: SpareSegments,
    /// The segment that retention could not remove, so that it is reported once.
    pub(super) unremovable: Option<Offset>,
    /// The least age of a segment that retention may remove, so that the window can be rebuilt: see
    /// [`retention`].
    pub(super) stay_s: u64,
}

impl LogWriter {
    /// Writes until the queue is closed and empty.
    pub(super) fn run(mut self) {
        let mut group = Vec::new();
        let mut stalled = false;
        loop {
            let wait = if stalled { LOG_WRITE_RETRY_PAUSE } else { WRITER_IDLE_INTERVAL };
            let closed = self.shared.queue.take(&mut group, wait);
            if group.is_empty() {
                if closed {
                    break;
                }
                stalled = self.maintain().is_err();
                continue;
            }
            match self.commit(&mut group) {
                Ok(all) => {
                    self.shared.trouble.set(None);
                    stalled = false;
                    for (submission, outcomes) in group.drain(..).zip(all) {
                        submission.answer(Ok(CommitOutcome { outcomes }));
                    }
                }
                Err(error) => {
                    if matches!(error, AppendError::DiskFull) {
                        self.give_back_spare();
                    }
                    self.shared.trouble.set(Some(error.to_string()));
                    self.give_up(&error, &mut group, closed);
                    stalled = true;
                    std::thread::sleep(LOG_WRITE_RETRY_PAUSE);
                }
            }
        }
        self.seal();
    }

    /// Puts one batch together from `group` and makes it durable. Returns, per submission, the outcomes
    /// of its sections.
    fn commit(&mut self, group: &mut [WriterSubmission]) -> Result<Vec<Vec<SectionOutcome>>, AppendError> {
        if let Some(failure) = self.shared.failure.get() {
            return Err(AppendError::Failed(failure.clone()));
        }
        let stamp = self.window.stamp();
        self.window.expire(stamp);
        let mut assembly = Assembly::new(&self.window, self.next_offset, self.time_max);
        let outcomes: Vec<_> = group.iter_mut().map(|submission| assembly.take(submission)).collect();
        let sections =
            group.iter().flat_map(|submission| &submission.sections).zip(outcomes.iter().flatten());
        let kept = sections.filter(|(_, outcome)| matches!(outcome, SectionOutcome::Kept(_)));
        let kept: Vec<&Section> = kept.map(|(section, _)| section).collect();
        let Some(mut assembled) = assembly.finish(&kept) else { return Ok(outcomes) };
        let mut digests = std::mem::take(&mut assembled.digests).into_iter();
        let time_max = assembled.time_max;
        let batches = self.write(assembled, stamp)?;
        self.time_max = time_max;
        for batch in batches {
            self.next_offset = batch.next_offset();
            self.window.learn(&batch, &mut digests);
            if batch.next_offset() > batch.first_offset() {
                self.shared.tail.push(batch.clone());
                if let Some(listener) = self.shared.listener.get() {
                    listener(&batch);
                }
            }
        }
        Ok(outcomes)
    }

    /// Completes the frames of a commit, writes them (to a new segment if they do not fit), and makes
    /// them durable together.
    fn write(&mut self, commit: AssembledCommit, mut stamp: WindowStamp) -> Result<Vec<Batch>, AppendError> {
        let AssembledCommit { mut frames, time_max, .. } = commit;
        let frame_bytes =
            |frame: &AssembledFrame| frame.bytes.len() + frame.releases.len() + ONCE_PART_BYTES_MAX;
        let bytes_max = frames.iter().map(frame_bytes).sum::<usize>() as u64;
        // A segment is named by its first offset, so one without records can have no successor.
        let may_end = self.current.has_frames() && self.next_offset > self.current.first_offset;
        if may_end && (self.must_roll || self.current.end() + bytes_max > self.config.segment_bytes) {
            self.roll(self.next_offset)?;
        }
        let mut open = (!self.current.has_frames()).then(|| self.window.open());
        let step = SEGMENT_ALLOCATE_BYTES.min(self.config.segment_bytes);
        let (end, write_number) = (self.current.end(), self.current.next_write_number());
        // Frames must not vouch for what a loss of power may take without damage.
        let settled_position = match self.config.durability {
            Durability::Fsync => end,
            Durability::Os => self.synced_end,
        };
        let (mut position, mut offset, last) = (end, self.next_offset, frames.len() - 1);
        for (nth, frame) in frames.iter_mut().enumerate() {
            let open = open.take();
            if open.is_some() || frame.flags.contains(FrameFlags::ONCE) {
                frame.flags = frame.flags.with(FrameFlags::ONCE);
                OncePart::put(stamp, open.as_deref(), &frame.releases, &mut frame.bytes);
            }
            stamp.entered += frame.message_ids;
            let flags = frame.flags.with_if(nth < last, FrameFlags::CONTINUED);
            let mut header = FrameHeader::new(flags, frame.records, offset, time_max);
            (header.settled_position, header.write_number) = (settled_position, write_number);
            let written = self.current.write(&mut frame.bytes, &header, position, step);
            written.map_err(|e| self.write_error(e))?;
            position += frame.bytes.len() as u64;
            offset += u64::from(frame.records);
        }
        if self.config.durability == Durability::Fsync {
            // A sync that failed for want of something is tried again with the write, whose pages the
            // kernel may have given up.
            self.current.sync().map_err(|e| self.write_error(e))?;
        }
        let mut first_offset = self.next_offset;
        let settled = |frame: AssembledFrame| {
            self.current.advance(frame.bytes.len() as u64, first_offset, time_max);
            let body = Bytes::from(frame.bytes).slice(FRAME_HEADER_BYTES..);
            let batch = Batch::encoded(frame.flags, first_offset, frame.records, body);
            first_offset = batch.next_offset();
            batch
        };
        Ok(frames.into_iter().map(settled).collect())
    }

    /// Ends the current segment and begins the next one at `first_offset`.
    fn roll(&mut self, first_offset: Offset) -> Result<(), AppendError> {
        // Preallocated room must not count against the budget.
        self.current.trim().map_err(|e| self.write_error(e))?;
        self.make_room(self.config.segment_bytes)?;
        if self.config.durability == Durability::Os {
            // So that a power failure can damage the newest segment only.
            self.current.sync().map_err(|e| self.write_error(e))?;
        }
        self.must_roll = true;
        let segment =
            self.spares.create(&*self.disk, &self.dir, first_offset).map_err(|e| self.write_error(e));
        self.shared.spare_bytes.store(self.spares.bytes(), Ordering::Relaxed);
        let segment = segment?;
        self.must_roll = false;
        self.synced_end = segment.end();
        self.current = Arc::new(segment);
        self.shared.segments_mut().insert(first_offset, self.current.clone());
        Ok(())
    }

    /// Removes the segments that retention allows, and fails if `incoming_bytes` still do not fit. A spare
    /// segment takes no more room when it becomes one of the log.
    fn make_room(&mut self, incoming_bytes: u64) -> Result<(), AppendError> {
        self.give_back_spares_over_budget(incoming_bytes);
        let removable: Vec<_> = {
            let segments = self.shared.segments();
            let held = self.shared.holds.lowest();
            let (config, stay_s, now) = (&self.config, self.stay_s, now_micros());
            let incoming_bytes = self.spares.bytes() + self.beside_spare(incoming_bytes);
            let count = retention::removable(&segments, config, stay_s, held, now, incoming_bytes);
            segments.values().take(count).cloned().collect()
        };
        for segment in removable {
            // One after the other, durably: a segment that stays while a later one is gone would be a gap,
            // which the next start would take for damage.
            let has_budget = self.shared.disk_bytes() + incoming_bytes <= self.config.retention_bytes;
            let keeps = self.spares.is_empty() || self.spares.has_room() && has_budget;
            let removed = match keeps {
                true => self.spares.keep(&*self.disk, segment.clone()),
                false => self.disk.remove(segment.path()),
            };
            if let Err(error) = removed {
                if self.unremovable.replace(segment.first_offset) != Some(segment.first_offset) {
                    warn!(%error, path = %segment.path().display(), "retention cannot remove a segment");
                }
                break;
            }
            let first_offset = segment.first_offset;
            self.shared.segments_mut().remove(&first_offset);
            self.shared.spare_bytes.store(self.spares.bytes(), Ordering::Relaxed);
            info!(first_offset, bytes = segment.disk_bytes(), "retention removed a segment");
            if self.spares.sync_dir(&*self.disk, &self.dir).is_err() {
                break;
            }
        }
        self.give_back_spares_over_budget(incoming_bytes);
        // A current segment that nobody needs goes as soon as there is a next one.
        let is_needed =
            self.shared.segments().len() > 1 || self.shared.holds.lowest().firmly < self.next_offset;
        if is_needed && self.is_over_budget(incoming_bytes) {
            return Err(AppendError::Budget { retention_bytes: self.config.retention_bytes });
        }
        Ok(())
    }

    fn is_over_budget(&self, incoming_bytes: u64) -> bool {
        self.shared.disk_bytes() + self.beside_spare(incoming_bytes) > self.config.retention_bytes
    }

    /// Spares never outrank data.
    fn give_back_spares_over_budget(&mut self, incoming_bytes: u64) {
        while !self.spares.is_empty() && self.is_over_budget(incoming_bytes) {
            self.give_back_spare();
        }
    }

    fn give_back_spare(&mut self) {
        self.spares.give_back(&*self.disk);
        self.shared.spare_bytes.store(self.spares.bytes(), Ordering::Relaxed);
    }

    /// How many of `incoming_bytes` a spare segment has no room for.
    fn beside_spare(&self, incoming_bytes: u64) -> u64 {
        incoming_bytes.saturating_sub(self.spares.next_bytes())
    }

    /// Idle work: retention, and checking whether a trouble is over.
    fn maintain(&mut self) -> Result<(), AppendError> {
        if self.shared.failure.get().is_some() {
            return Ok(());
        }
        self.window.expire(self.window.stamp());
        let result = if self.shared.trouble.is_present() {
            let step = SEGMENT_ALLOCATE_BYTES.min(self.config.segment_bytes);
            let room = self.current.probe(step).map_err(|e| self.write_error(e));
            room.and_then(|()| self.make_room(0))
        } else {
            // Being over the budget is no trouble until something is to be written.
            let _ = self.make_room(0);
            Ok(())
        };
        if result.is_ok() {
            self.shared.trouble.set(None);
        }
        result
    }

    /// Answers the submissions that wait no longer; with `all`, every one.
    fn give_up(&self, error: &AppendError, group: &mut Vec<WriterSubmission>, all: bool) {
        let now = Instant::now();
        let lasting = all || matches!(error, AppendError::Failed(_));
        let waits = |s: &WriterSubmission| !lasting && s.give_up_at > now && !s.is_empty();
        let given_up: Vec<_> = group.extract_if(.., |submission| !waits(submission)).collect();
        if !given_up.is_empty() && !matches!(error, AppendError::Failed(_)) {
            // Its bytes may be whole: a start after a kill must not find what is answered as failed.
            let _ = self.current.trim();
        }
        for submission in given_up {
            let nothing =
                CommitOutcome { outcomes: vec![SectionOutcome::KeyDead; submission.sections.len()] };
            let answer = if submission.is_empty() { Ok(nothing) } else { Err(error.clone()) };
            submission.answer(answer);
        }
        for submission in self.shared.queue.take_expired(now) {
            submission.answer(Err(error.clone()));
        }
    }

    /// Writes the empty frame that marks a clean shutdown.
    fn seal(&mut self) {
        if self.shared.failure.get().is_some() {
            return;
        }
        if self.config.durability == Durability::Os && self.current.sync().is_ok() {
            self.synced_end = self.current.end();
        }
        let sealed = self.write(AssembledCommit::seal(self.time_max), self.window.stamp());
        let sealed = sealed
            .map_err(|e| e.to_string())
            .and_then(|_| self.current.trim().and_then(|()| self.current.sync()).map_err(|e| e.to_string()));
        if let Err(error) = sealed {
            // Harmless: the next start only takes the end of the log for a crash.
            warn!(error, "the log could not be sealed");
        }
    }

    /// The error for a failed call: a want of disk, memory or descriptors is transient, anything else is
    /// not.
    fn write_error(&self, error: io::Error) -> AppendError {
        use io::ErrorKind::{FileTooLarge, Interrupted, OutOfMemory, QuotaExceeded, StorageFull, WouldBlock};
        match (error.kind(), error.raw_os_error()) {
            (StorageFull | QuotaExceeded | FileTooLarge, _) => AppendError::DiskFull,
            (OutOfMemory | Interrupted | WouldBlock, _) | (_, Some(libc::EMFILE | libc::ENFILE)) => {
                AppendError::Starved(error.to_string().into())
            }
            _ => self.poison(&error),
        }
    }

    /// Marks the log as failed: nothing is acknowledged from here on.
    fn poison(&self, error: &io::Error) -> AppendError {
        let text: Arc<str> = format!("{}: {error}", self.current.path().display()).into();
        AppendError::Failed(self.shared.failure.get_or_init(|| text).clone())
    }
}
