//! Unsettled commits: what the writer has written and what is not yet known to be durable, oldest first.
//!
//! A sync makes durable what was written to the file before it began, so a successful one settles its own commit and
//! all before it. Their submissions are answered in that order. After a failed sync nothing more is
//! settled: what is left goes back to the writer, which puts it together again.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use super::batch::Batch;
use super::embedded::EmbeddedLogShared;
use super::queue::WriterSubmission;
use super::segment::Segment;
use super::{AppendError, CommitOutcome, SectionOutcome};
use crate::message::TimeMicros;

/// Submissions, and the outcomes of the sections of each.
pub(super) struct DecidedGroup {
    pub(super) submissions: Vec<WriterSubmission>,
    pub(super) outcomes: Vec<Vec<SectionOutcome>>,
}

impl DecidedGroup {
    /// Answers every submission.
    pub(super) fn answer(self) {
        for (submission, outcomes) in self.submissions.into_iter().zip(self.outcomes) {
            submission.answer(Ok(CommitOutcome { outcomes }));
        }
    }
}

/// A commit that was written to a segment.
pub(super) struct UnsettledCommit {
    /// Its number. Later ones have higher numbers.
    pub(super) number: u64,
    pub(super) segment: Arc<Segment>,
    /// The batch of each frame, and the frame's size in bytes.
    pub(super) frames: Vec<(Batch, u64)>,
    /// The newest `received_at` in it and before it.
    pub(super) time_max: TimeMicros,
    pub(super) group: DecidedGroup,
    /// What came later and is known already, such as a duplicate: it is answered behind this commit.
    pub(super) followers: Vec<DecidedGroup>,
}

impl UnsettledCommit {
    /// Shows the batches to readers, then answers the submissions.
    fn settle(self, shared: &EmbeddedLogShared) {
        for (batch, frame_bytes) in self.frames {
            self.segment.advance(frame_bytes, batch.first_offset(), self.time_max);
            if batch.next_offset() > batch.first_offset() {
                shared.tail.push(batch.clone());
                if let Some(listener) = shared.listener.get() {
                    listener(&batch);
                }
            }
        }
        shared.trouble.set(None);
        self.group.answer();
        self.followers.into_iter().for_each(DecidedGroup::answer);
    }
}

/// The unsettled commits of a log.
#[derive(Default)]
pub(super) struct UnsettledCommits {
    state: Mutex<UnsettledState>,
    /// Held while commits are settled, so that they are in their order.
    settling: Mutex<()>,
}

#[derive(Default)]
struct UnsettledState {
    commits: VecDeque<UnsettledCommit>,
    /// The number of the newest commit whose sync has succeeded; 0 if there is none.
    durable_number: u64,
    /// The first sync that failed: nothing more is durable until [`UnsettledCommits::take_back`].
    failure: Option<AppendError>,
}

impl UnsettledCommits {
    /// Adds the newest commit.
    pub(super) fn push(&self, commit: UnsettledCommit) {
        self.state.lock().commits.push_back(commit);
    }

    /// Answers a group of which nothing was written, behind everything that was written before it.
    pub(super) fn answer_behind(&self, group: DecidedGroup) {
        let mut state = self.state.lock();
        if let Some(newest) = state.commits.back_mut() {
            return newest.followers.push(group);
        }
        drop(state);
        let _earlier = self.settling.lock();
        group.answer();
    }

    /// Notes that the sync of a commit has succeeded.
    pub(super) fn note_durable(&self, number: u64) {
        let mut state = self.state.lock();
        if state.failure.is_none() {
            state.durable_number = state.durable_number.max(number);
        }
    }

    /// Notes that the sync of a commit has failed.
    pub(super) fn note_failure(&self, error: AppendError) {
        self.state.lock().failure.get_or_insert(error);
    }

    /// The number of the newest commit that is durable.
    pub(super) fn durable_number(&self) -> u64 {
        self.state.lock().durable_number
    }

    /// Why a sync has failed.
    pub(super) fn failure(&self) -> Option<AppendError> {
        self.state.lock().failure.clone()
    }

    /// Settles what is durable.
    pub(super) fn settle(&self, shared: &EmbeddedLogShared) {
        let _in_order = self.settling.lock();
        while let Some(commit) = self.pop_durable() {
            commit.settle(shared);
        }
    }

    /// Runs `what` while nothing more is settled: the end of the current segment and that of the tail are the same then.
    pub(super) fn while_nothing_settles<T>(&self, what: impl FnOnce() -> T) -> T {
        let _in_order = self.settling.lock();
        what()
    }

    fn pop_durable(&self) -> Option<UnsettledCommit> {
        let mut state = self.state.lock();
        let durable_number = state.durable_number;
        state.commits.pop_front_if(|commit| commit.number <= durable_number)
    }

    /// Takes back the submissions that are not durable, in order. No sync may be under way.
    pub(super) fn take_back(&self, shared: &EmbeddedLogShared) -> Vec<WriterSubmission> {
        self.settle(shared);
        let mut state = self.state.lock();
        state.failure = None;
        let groups = state.commits.drain(..).flat_map(|c| std::iter::once(c.group).chain(c.followers));
        groups.flat_map(|group| group.submissions).collect()
    }
}
