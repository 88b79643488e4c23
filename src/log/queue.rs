//! The queue in front of the writer: what callers want to append and release, in the order in which they came,
//! and whose turn it is to commit it.
//!
//! Each of the writer's threads takes a turn: it takes what waits, writes it, syncs it, and answers. Two turns may be
//! under way. The second one begins when the sync of the first takes long and as much waits as that has taken, so that load
//! makes commits larger and not more of them. While one submission comes after the other, its caller takes the
//! turn: see [`SoloCommitter`](super::solo_commit::SoloCommitter).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::oneshot;

use super::once::OnceId;
use super::section::Section;
use super::{AppendError, CommitOutcome};
use crate::limits::BATCH_BYTES_MAX;
use crate::scheduler::polite_lock;

/// What one caller wants to append and release.
pub(super) struct WriterSubmission {
    pub(super) sections: Vec<Section>,
    /// Released after the sections.
    pub(super) releases: Vec<OnceId>,
    /// Until then the writer waits out a transient failure.
    pub(super) give_up_at: Instant,
    pub(super) reply: oneshot::Sender<Result<CommitOutcome, AppendError>>,
}

impl WriterSubmission {
    fn weight(&self) -> usize {
        let sections: usize = self.sections.iter().map(Section::weight).sum();
        sections + size_of_val(&*self.releases)
    }

    /// Whether there is nothing to make durable.
    pub(super) fn is_empty(&self) -> bool {
        self.releases.is_empty() && self.sections.iter().all(|section| section.records() == 0)
    }

    /// Answers the caller, if it still waits.
    pub(super) fn answer(self, result: Result<CommitOutcome, AppendError>) {
        let _ = self.reply.send(result);
    }
}

/// For how long a turn syncs before a second one may begin. A fast disk is done by then, and more and
/// smaller commits cost more processor than they save time.
const SECOND_TURN_AFTER: Duration = Duration::from_millis(1);
/// Threads that commit, and so turns at once.
pub(super) const WRITER_THREADS: usize = 2;
/// The number of a caller that commits, behind those of the threads.
pub(super) const SOLO_COMMITTER: usize = WRITER_THREADS;
/// The threads, and a caller.
pub(super) const COMMITTERS: usize = WRITER_THREADS + 1;
/// Turns in a row that took one small submission and left none behind, before callers commit for themselves.
const SOLO_TURNS_MIN: u32 = 8;
/// Largest submission that its caller commits, in bytes.
const SOLO_BYTES_MAX: usize = 4096;

/// Submissions that wait for the writer, and its turns.
#[derive(Default)]
pub(super) struct WriterQueue {
    state: Mutex<WriterQueueState>,
    /// For each thread: there is something for it to do.
    due: [Condvar; WRITER_THREADS],
    /// A turn has ended.
    turn_ended: Condvar,
    /// Turns in a row that took one small submission and left none behind. Changed under the lock of the state.
    solo_turns: AtomicU32,
    /// Waits for the disk beside the syncs of turns.
    disk_waits: AtomicUsize,
}

/// A wait for the disk: see [`WriterQueue::note_disk_wait`].
pub(super) struct DiskWaitGuard<'a>(&'a AtomicUsize);

impl Drop for DiskWaitGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct WriterQueueState {
    submissions: VecDeque<WriterSubmission>,
    /// Weight of the submissions, in bytes.
    weight: usize,
    closed: bool,
    /// A thread has panicked, maybe in a turn, which then never ends.
    is_abandoned: bool,
    /// Which threads wait for something to do.
    is_idle: [bool; WRITER_THREADS],
    /// When a thread was woken that has not begun yet.
    woken_at: [Option<Instant>; WRITER_THREADS],
    /// Turns under way.
    turns: usize,
    /// When each that syncs now began to.
    sync_began: [Option<Instant>; COMMITTERS],
    /// A caller has a turn: what it cannot commit comes back to the queue.
    is_solo_turn: bool,
    /// A sync of a caller has failed, which a thread is to wait out.
    has_failed: bool,
    /// What they have taken, in bytes.
    taken_weight: usize,
}

/// What a thread of the writer is to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WriterDuty {
    /// A sync of a caller has failed.
    WaitOut,
    /// Submissions wait.
    Commit {
        /// How long the thread waited for a processor after it was woken.
        waited: Duration,
    },
    /// Nothing came for as long as it was to wait.
    Upkeep,
    /// The queue is closed and empty.
    End,
}

/// Whether a sync that began then takes long enough that a second one pays.
fn is_long_ago(began: Instant) -> bool {
    began.elapsed() >= SECOND_TURN_AFTER
}

impl WriterQueueState {
    /// Whether nothing is left, and nothing can come any more.
    fn is_at_end(&self) -> bool {
        self.closed && self.submissions.is_empty() && !self.is_solo_turn && !self.has_failed
    }

    /// Whether a turn may begin.
    fn is_due(&self) -> bool {
        match self.turns {
            _ if self.submissions.is_empty() => false,
            0 => true,
            1 => self.weight >= self.taken_weight && self.sync_began.into_iter().flatten().any(is_long_ago),
            _ => false,
        }
    }

    /// A thread that waits, if a turn may begin. The first one that waits is asked first: its caches are warm.
    fn wakes(&mut self) -> Option<usize> {
        let idle = self.is_due().then(|| self.is_idle.iter().position(|is_idle| *is_idle)).flatten()?;
        self.is_idle[idle] = false;
        self.woken_at[idle] = Some(Instant::now());
        Some(idle)
    }

    /// Moves submissions to `group` until that has the size of a batch. Returns the weight of what it moved.
    fn move_to(&mut self, group: &mut Vec<WriterSubmission>) -> usize {
        let before: usize = group.iter().map(WriterSubmission::weight).sum();
        let mut weight = before;
        while let Some(submission) = self.submissions.front() {
            let more = submission.weight();
            if weight > 0 && weight + more > BATCH_BYTES_MAX {
                break;
            }
            weight += more;
            group.extend(self.submissions.pop_front());
        }
        self.weight -= weight - before;
        weight - before
    }
}

impl WriterQueue {
    /// Adds a submission, or answers it at once if the queue is closed.
    pub(super) fn push(&self, submission: WriterSubmission) {
        let weight = submission.weight();
        let mut waiting = self.locked();
        if waiting.closed {
            drop(waiting);
            return submission.answer(Err(AppendError::Closed));
        }
        waiting.submissions.push_back(submission);
        waiting.weight += weight;
        let wakes = waiting.wakes();
        drop(waiting);
        self.wake(wakes);
    }

    /// Closes the queue; the writer ends once it has committed what waits.
    pub(super) fn close(&self) {
        self.locked().closed = true;
        self.wake_all();
    }

    /// Whether the queue is closed and empty.
    pub(super) fn is_at_end(&self) -> bool {
        self.locked().is_at_end()
    }

    /// Closes the queue and answers every submission in it: there is no writer any more.
    pub(super) fn abandon(&self) {
        let left = {
            let mut waiting = self.locked();
            (waiting.closed, waiting.is_abandoned, waiting.weight) = (true, true, 0);
            (waiting.is_solo_turn, waiting.has_failed) = (false, false);
            std::mem::take(&mut waiting.submissions)
        };
        self.wake_all();
        self.turn_ended.notify_all();
        left.into_iter().for_each(|submission| submission.answer(Err(AppendError::Closed)));
    }

    /// Waits until the thread with this number has something to do; with `upkeep_after`, at most that long.
    pub(super) fn wait_for_duty(&self, thread: usize, upkeep_after: Option<Duration>) -> WriterDuty {
        let deadline = upkeep_after.map(|after| Instant::now() + after);
        let mut waiting = self.locked();
        loop {
            let woken_at = waiting.woken_at[thread].take();
            if waiting.is_due() {
                return WriterDuty::Commit { waited: woken_at.map_or(Duration::ZERO, |at| at.elapsed()) };
            }
            if thread == 0 && std::mem::take(&mut waiting.has_failed) {
                return WriterDuty::WaitOut;
            }
            if waiting.is_at_end() {
                return WriterDuty::End;
            }
            waiting.is_idle[thread] = true;
            let is_over = match deadline {
                Some(deadline) => self.due[thread].wait_until(&mut waiting, deadline).timed_out(),
                None => {
                    self.due[thread].wait(&mut waiting);
                    false
                }
            };
            waiting.is_idle[thread] = false;
            if is_over && !waiting.is_due() && !waiting.has_failed {
                return WriterDuty::Upkeep;
            }
        }
    }

    /// Begins a turn and moves waiting submissions to `group`, up to the size of a batch, if it is due. Returns
    /// their weight, with which [`WriterQueue::end_turn`] is to be called. Turns begin one after the other.
    pub(super) fn begin_turn(&self, group: &mut Vec<WriterSubmission>) -> Option<usize> {
        let mut waiting = self.locked();
        if !waiting.is_due() {
            return None;
        }
        let weight = waiting.move_to(group);
        if group.len() > 1 {
            self.solo_turns.store(0, Ordering::Relaxed);
        }
        waiting.turns += 1;
        waiting.taken_weight += weight;
        let wakes = waiting.wakes();
        drop(waiting);
        self.wake(wakes);
        Some(weight)
    }

    /// Whether the next submission is likely to be the only one.
    pub(super) fn is_solo(&self) -> bool {
        self.solo_turns.load(Ordering::Relaxed) >= SOLO_TURNS_MIN
    }

    /// Begins a turn with a submission that is not in the queue, if it is small, nothing waits and no turn is under way.
    /// Returns its weight, with which [`WriterQueue::end_solo_turn`] is to be called.
    pub(super) fn begin_solo_turn(&self, submission: &WriterSubmission) -> Option<usize> {
        let weight = submission.weight();
        let mut waiting = self.locked();
        let is_alone = waiting.turns == 0 && waiting.submissions.is_empty() && !waiting.closed;
        if weight > SOLO_BYTES_MAX || !is_alone {
            return None;
        }
        waiting.turns += 1;
        waiting.is_solo_turn = true;
        waiting.taken_weight += weight;
        Some(weight)
    }

    /// Ends the turn of a caller. `left` is what it could not commit: it goes first again. If its sync `has_failed`, a
    /// thread waits that out.
    pub(super) fn end_solo_turn(&self, weight: usize, left: Vec<WriterSubmission>, has_failed: bool) {
        let wakes = {
            let mut waiting = self.locked();
            for submission in left {
                waiting.weight += submission.weight();
                waiting.submissions.push_front(submission);
            }
            waiting.is_solo_turn = false;
            waiting.has_failed |= has_failed;
            self.end_turn_in(waiting, weight);
            self.locked().wakes()
        };
        self.wake(wakes);
        if has_failed {
            self.due[0].notify_one();
        }
    }

    /// Begins a turn without submissions, to [`WriterQueue::wait_alone`] in.
    pub(super) fn begin_empty_turn(&self) -> usize {
        self.locked().turns += 1;
        0
    }

    /// Notes that the turn of a thread begins to sync, or has ended that.
    pub(super) fn note_sync(&self, thread: usize, is_under_way: bool) {
        let began = is_under_way.then(Instant::now);
        self.locked().sync_began[thread] = began;
    }

    /// Whether a sync is under way, or other work of the writer that waits for the disk.
    pub(super) fn is_syncing(&self) -> bool {
        self.disk_waits.load(Ordering::Relaxed) > 0 || self.locked().sync_began.iter().any(Option::is_some)
    }

    /// Notes, until this is dropped, that the writer waits for the disk without a sync of a turn.
    pub(super) fn note_disk_wait(&self) -> DiskWaitGuard<'_> {
        self.disk_waits.fetch_add(1, Ordering::Relaxed);
        DiskWaitGuard(&self.disk_waits)
    }

    /// Ends a turn. The calling thread looks next whether more waits, so that no other one is woken for that.
    pub(super) fn end_turn(&self, weight: usize) {
        self.end_turn_in(self.locked(), weight);
    }

    fn end_turn_in(&self, mut waiting: MutexGuard<'_, WriterQueueState>, weight: usize) {
        waiting.turns -= 1;
        waiting.taken_weight -= weight;
        let is_solo = weight <= SOLO_BYTES_MAX && waiting.turns == 0 && waiting.submissions.is_empty();
        self.note_turn(is_solo);
        let closed = waiting.closed;
        drop(waiting);
        self.turn_ended.notify_all();
        if closed {
            // A thread that waits may be at the end now.
            self.wake_all();
        }
    }

    /// Waits, in a turn, until it is the only one. No other may begin meanwhile.
    pub(super) fn wait_alone(&self) {
        let mut waiting = self.locked();
        while waiting.turns > 1 && !waiting.is_abandoned {
            self.turn_ended.wait(&mut waiting);
        }
    }

    /// Moves waiting submissions to `group`, up to the size of a batch.
    pub(super) fn take_more(&self, group: &mut Vec<WriterSubmission>) {
        self.locked().move_to(group);
    }

    /// Takes out the submissions whose time to give up has come.
    pub(super) fn take_expired(&self, now: Instant) -> Vec<WriterSubmission> {
        let mut waiting = self.locked();
        if waiting.submissions.iter().all(|s| s.give_up_at > now) {
            return Vec::new();
        }
        let all = std::mem::take(&mut waiting.submissions);
        let (expired, kept): (Vec<_>, Vec<_>) = all.into_iter().partition(|s| s.give_up_at <= now);
        waiting.submissions = kept.into();
        waiting.weight = waiting.submissions.iter().map(WriterSubmission::weight).sum();
        expired
    }

    /// Notes whether the turn that ends was small and has left nothing behind.
    fn note_turn(&self, is_solo: bool) {
        let turns = self.solo_turns.load(Ordering::Relaxed) + 1;
        self.solo_turns.store(if is_solo { turns.min(SOLO_TURNS_MIN) } else { 0 }, Ordering::Relaxed);
    }

    fn wake(&self, thread: Option<usize>) {
        if let Some(thread) = thread {
            self.due[thread].notify_one();
        }
    }

    fn wake_all(&self) {
        self.due.iter().for_each(|due| _ = due.notify_one());
    }

    fn locked(&self) -> MutexGuard<'_, WriterQueueState> {
        polite_lock(&self.state)
    }
}
