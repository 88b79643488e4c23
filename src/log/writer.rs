//! The writer: the end of the log, which its threads (`commit_thread.rs`) hold one after the other. It puts all
//! waiting submissions together to one commit and writes that, while the sync of the one before it may be
//! under way. What is done beside that is in `upkeep.rs`.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tracing::warn;

use super::assembly::{AssembledCommit, AssembledFrame, Assembly};
use super::batch::Batch;
use super::disk::{Disk, SegmentFile};
use super::embedded::EmbeddedLogShared;
use super::frame::{FRAME_HEADER_BYTES, FrameFlags, FrameHeader};
use super::once::{OncePart, WindowStamp};
use super::queue::{COMMITTERS, WriterSubmission};
use super::section::Section;
use super::segment::Segment;
use super::spare::SpareSegments;
use super::unsettled::{DecidedGroup, UnsettledCommit};
use super::window::DedupWindow;
use super::{AppendError, CommitOutcome, SectionOutcome};
use crate::config::{self, Durability};
use crate::limits::SEGMENT_ALLOCATE_BYTES;
use crate::message::{Offset, TimeMicros};

/// The pause before a failed append is tried again.
pub(super) const LOG_WRITE_RETRY_PAUSE: Duration = Duration::from_millis(50);
/// The largest size of a once part without releases and open exchanges.
const ONCE_PART_BYTES_MAX: usize = 48;

/// The end of the log.
pub(super) struct LogWriter {
    pub(super) shared: Arc<EmbeddedLogShared>,
    pub(super) disk: Box<dyn Disk>,
    pub(super) dir: PathBuf,
    pub(super) config: config::LogConfig,
    /// The segment that receives new frames.
    pub(super) current: Arc<Segment>,
    /// For each thread a descriptor of its own of the current segment: the kernel reports a page that could
    /// not be written once per descriptor, so on a common one a sync could succeed because another failed.
    pub(super) sync_files: [Arc<dyn SegmentFile>; COMMITTERS],
    /// The end of what is written, durable or not.
    pub(super) written: WrittenEnd,
    /// The newest `received_at` of what is durable.
    pub(super) durable_time_max: TimeMicros,
    /// The number of the last commit.
    pub(super) commit_number: u64,
    /// The batches of commits that the window has not learned yet.
    pub(super) unlearned: VecDeque<UnlearnedCommit>,
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
    /// [`retention`](super::retention).
    pub(super) stay_s: u64,
}

/// Where the log ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct WrittenEnd {
    /// Behind the last frame of the current segment.
    pub(super) position: u64,
    pub(super) next_offset: Offset,
    /// The newest `received_at` so far.
    pub(super) time_max: TimeMicros,
}

/// What the window learns once a commit is durable.
pub(super) struct UnlearnedCommit {
    number: u64,
    batches: Vec<Batch>,
    time_max: TimeMicros,
}

/// A commit that was written and is to be synced.
pub(super) struct WrittenCommit {
    pub(super) number: u64,
    segment: Arc<Segment>,
    /// `None` if the configuration does not want it synced.
    file: Option<Arc<dyn SegmentFile>>,
}

impl WrittenCommit {
    /// Makes the commit durable, as far as the configuration wants that.
    pub(super) fn sync(&self, shared: &EmbeddedLogShared) -> Result<(), AppendError> {
        let synced = self.file.as_ref().map_or(Ok(()), |file| file.sync_data());
        synced.map_err(|error| shared.write_error(&self.segment, error))
    }
}

impl LogWriter {
    /// Puts one commit together from `group` and writes it. `None` if there is nothing to sync: then the group is
    /// answered behind what was written before. What fails leaves the group as it was.
    pub(super) fn commit(
        &mut self,
        committer: usize,
        group: &mut Vec<WriterSubmission>,
    ) -> Result<Option<WrittenCommit>, AppendError> {
        if let Some(failure) = self.shared.failure.get() {
            return Err(AppendError::Failed(failure.clone()));
        }
        self.learn_durable();
        let stamp = self.window.stamp();
        self.window.expire(stamp);
        let mut assembly = Assembly::new(&self.window, self.written.next_offset, self.written.time_max);
        let outcomes: Vec<_> = group.iter_mut().map(|submission| assembly.take(submission)).collect();
        let sections =
            group.iter().flat_map(|submission| &submission.sections).zip(outcomes.iter().flatten());
        let kept = sections.filter(|(_, outcome)| matches!(outcome, SectionOutcome::Kept(_)));
        let kept: Vec<&Section> = kept.map(|(section, _)| section).collect();
        let Some(assembled) = assembly.finish(&kept) else {
            let submissions = std::mem::take(group);
            self.shared.unsettled.answer_behind(DecidedGroup { submissions, outcomes });
            return Ok(None);
        };
        self.write(assembled, stamp, group, outcomes)?;
        let file = match self.config.durability {
            Durability::Fsync => Some(self.sync_files[committer].clone()),
            Durability::Os => None,
        };
        Ok(Some(WrittenCommit { number: self.commit_number, segment: self.current.clone(), file }))
    }

    /// Writes a commit (to a new segment if it does not fit), which makes it unsettled.
    fn write(
        &mut self,
        commit: AssembledCommit,
        stamp: WindowStamp,
        group: &mut Vec<WriterSubmission>,
        outcomes: Vec<Vec<SectionOutcome>>,
    ) -> Result<(), AppendError> {
        let AssembledCommit { mut frames, ids, time_max } = commit;
        let frame_bytes =
            |frame: &AssembledFrame| frame.bytes.len() + frame.releases.len() + ONCE_PART_BYTES_MAX;
        let bytes_max = frames.iter().map(frame_bytes).sum::<usize>() as u64;
        // A segment is named by its first offset, so one without records can have no successor.
        let may_end = self.written.next_offset > self.current.first_offset;
        if may_end && (self.must_roll || self.written.position + bytes_max > self.config.segment_bytes) {
            self.roll()?;
        }
        self.write_frames(&mut frames, stamp, time_max)?;
        let message_ids = frames.iter().map(|frame| frame.message_ids).sum();
        let frames: Vec<_> = frames.into_iter().map(|frame| self.pass(frame)).collect();
        self.written.time_max = time_max;
        self.window.expect(ids, message_ids);
        self.commit_number += 1;
        let batches = frames.iter().map(|(batch, _)| batch.clone()).collect();
        self.unlearned.push_back(UnlearnedCommit { number: self.commit_number, batches, time_max });
        self.shared.unsettled.push(UnsettledCommit {
            number: self.commit_number,
            segment: self.current.clone(),
            frames,
            time_max,
            group: DecidedGroup { submissions: std::mem::take(group), outcomes },
            followers: Vec::new(),
        });
        Ok(())
    }

    /// Completes the frames of a commit and writes them.
    fn write_frames(
        &self,
        frames: &mut [AssembledFrame],
        mut stamp: WindowStamp,
        time_max: TimeMicros,
    ) -> Result<(), AppendError> {
        let WrittenEnd { mut position, next_offset: mut offset, .. } = self.written;
        let mut open = self.current.is_begin(position).then(|| self.window.open());
        let step = SEGMENT_ALLOCATE_BYTES.min(self.config.segment_bytes);
        let write_number = self.current.next_write_number();
        // Frames must not vouch for what a loss of power may take without damage.
        let settled_position = match self.config.durability {
            Durability::Fsync => self.current.end(),
            Durability::Os => self.synced_end,
        };
        let last = frames.len() - 1;
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
        Ok(())
    }

    /// Moves the end behind a frame that was written. Returns its batch, and its size in bytes.
    fn pass(&mut self, frame: AssembledFrame) -> (Batch, u64) {
        let frame_bytes = frame.bytes.len() as u64;
        let body = Bytes::from(frame.bytes).slice(FRAME_HEADER_BYTES..);
        let batch = Batch::encoded(frame.flags, self.written.next_offset, frame.records, body);
        self.written.position += frame_bytes;
        self.written.next_offset = batch.next_offset();
        (batch, frame_bytes)
    }

    /// Tells the window of the commits that have become durable.
    pub(super) fn learn_durable(&mut self) {
        let durable_number = self.shared.unsettled.durable_number();
        while let Some(commit) = self.unlearned.pop_front_if(|commit| commit.number <= durable_number) {
            self.window.learn(commit.batches.iter());
            self.durable_time_max = commit.time_max;
        }
    }

    /// Waits until what was written is settled or has failed. Call it in a turn.
    pub(super) fn wait_settled(&self) -> Result<(), AppendError> {
        self.shared.queue.wait_alone();
        self.shared.unsettled.settle(&self.shared);
        self.shared.unsettled.failure().map_or(Ok(()), Err)
    }

    /// Goes back to the end of what is durable. Returns the submissions of what is not, in order. Call it in the
    /// only turn.
    fn take_back(&mut self) -> Vec<WriterSubmission> {
        let taken_back = self.shared.unsettled.take_back(&self.shared);
        if !taken_back.is_empty() && self.shared.failure.get().is_none() {
            // It may be whole: a start after a kill must not find what its next try leaves out.
            let _ = self.current.trim();
        }
        self.learn_durable();
        self.unlearned.clear();
        self.window.expect_nothing();
        self.written = WrittenEnd {
            position: self.current.end(),
            next_offset: self.shared.tail.next_offset(),
            time_max: self.durable_time_max,
        };
        taken_back
    }

    /// Waits out an error: writes what has failed, and `group` behind it, again and again until that succeeds
    /// or nobody waits for it any more. What else is under way ends first, and nothing else begins. Call it
    /// in a turn.
    pub(super) fn wait_out(&mut self, mut error: AppendError, group: Vec<WriterSubmission>) {
        self.shared.queue.wait_alone();
        let mut waiting = self.take_back();
        waiting.extend(group);
        loop {
            if matches!(error, AppendError::DiskFull) {
                self.give_back_spare();
            }
            self.shared.trouble.set(Some(error.to_string()));
            self.give_up(&error, &mut waiting, self.shared.queue.is_at_end());
            std::thread::sleep(LOG_WRITE_RETRY_PAUSE);
            self.shared.queue.take_more(&mut waiting);
            if waiting.is_empty() {
                return;
            }
            match self.commit_alone(&mut waiting) {
                Ok(()) => return self.shared.trouble.set(None),
                Err(again) => error = again,
            }
        }
    }

    /// Commits `group` in the only turn. What fails leaves the group as it was.
    fn commit_alone(&mut self, group: &mut Vec<WriterSubmission>) -> Result<(), AppendError> {
        if let Some(commit) = self.commit(0, group)? {
            let waiting = self.shared.queue.note_disk_wait();
            let synced = commit.sync(&self.shared);
            drop(waiting);
            if let Err(error) = synced {
                *group = self.take_back();
                return Err(error);
            }
            self.shared.unsettled.note_durable(commit.number);
            self.shared.unsettled.settle(&self.shared);
        }
        Ok(())
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
    pub(super) fn seal(&mut self) {
        if self.shared.failure.get().is_some() {
            return;
        }
        if self.config.durability == Durability::Os && self.current.sync().is_ok() {
            self.synced_end = self.current.end();
        }
        let (seal, stamp) = (AssembledCommit::seal(self.written.time_max), self.window.stamp());
        let sealed = self.write(seal, stamp, &mut Vec::new(), Vec::new()).map_err(|e| e.to_string());
        let sealed = sealed.and_then(|()| {
            self.shared.unsettled.note_durable(self.commit_number);
            self.shared.unsettled.settle(&self.shared);
            self.current.trim().and_then(|()| self.current.sync()).map_err(|e| e.to_string())
        });
        if let Err(error) = sealed {
            // Harmless: the next start only takes the end of the log for a crash.
            warn!(error, "the log could not be sealed");
        }
    }

    /// The error for a failed call on the current segment.
    pub(super) fn write_error(&self, error: io::Error) -> AppendError {
        self.shared.write_error(&self.current, error)
    }
}

impl EmbeddedLogShared {
    /// The error for a failed call: a want of disk, memory or descriptors is transient, anything else is
    /// not, and marks the log as failed: nothing is acknowledged from there on.
    fn write_error(&self, segment: &Segment, error: io::Error) -> AppendError {
        use io::ErrorKind::{FileTooLarge, Interrupted, OutOfMemory, QuotaExceeded, StorageFull, WouldBlock};
        match (error.kind(), error.raw_os_error()) {
            (StorageFull | QuotaExceeded | FileTooLarge, _) => AppendError::DiskFull,
            (OutOfMemory | Interrupted | WouldBlock, _) | (_, Some(libc::EMFILE | libc::ENFILE)) => {
                AppendError::Starved(error.to_string().into())
            }
            _ => {
                let text: Arc<str> = format!("{}: {error}", segment.path().display()).into();
                AppendError::Failed(self.failure.get_or_init(|| text).clone())
            }
        }
    }
}
