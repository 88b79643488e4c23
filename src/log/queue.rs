//! The queue in front of the writer: what callers want to append and release, in the order in which they came.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::oneshot;

use super::once::OnceId;
use super::section::Section;
use super::{AppendError, CommitOutcome};
use crate::limits::BATCH_BYTES_MAX;

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

/// Submissions that wait for the writer.
#[derive(Default)]
pub(super) struct WriterQueue {
    state: Mutex<WriterQueueState>,
    ready: Condvar,
}

#[derive(Default)]
struct WriterQueueState {
    submissions: VecDeque<WriterSubmission>,
    closed: bool,
}

impl WriterQueue {
    /// Adds a submission, or answers it at once if the queue is closed.
    pub(super) fn push(&self, submission: WriterSubmission) {
        let mut waiting = self.locked();
        if waiting.closed {
            drop(waiting);
            return submission.answer(Err(AppendError::Closed));
        }
        waiting.submissions.push_back(submission);
        let first = waiting.submissions.len() == 1;
        drop(waiting);
        if first {
            self.ready.notify_one();
        }
    }

    /// Closes the queue; the writer ends once it has committed what waits.
    pub(super) fn close(&self) {
        self.locked().closed = true;
        self.ready.notify_one();
    }

    /// Closes the queue and answers every submission in it: there is no writer any more.
    pub(super) fn abandon(&self) {
        let left = {
            let mut waiting = self.locked();
            waiting.closed = true;
            std::mem::take(&mut waiting.submissions)
        };
        left.into_iter().for_each(|submission| submission.answer(Err(AppendError::Closed)));
    }

    /// Moves waiting submissions to `group`, up to the size of a batch; waits up to `wait` if there are
    /// none. Returns whether the queue is closed and empty.
    pub(super) fn take(&self, group: &mut Vec<WriterSubmission>, wait: Duration) -> bool {
        let mut waiting = self.locked();
        if waiting.submissions.is_empty() && !waiting.closed {
            self.ready.wait_for(&mut waiting, wait);
        }
        let mut weight: usize = group.iter().map(WriterSubmission::weight).sum();
        while let Some(submission) = waiting.submissions.front() {
            if weight > 0 && weight + submission.weight() > BATCH_BYTES_MAX {
                break;
            }
            weight += submission.weight();
            group.extend(waiting.submissions.pop_front());
        }
        waiting.closed && waiting.submissions.is_empty()
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
        expired
    }

    fn locked(&self) -> MutexGuard<'_, WriterQueueState> {
        self.state.lock()
    }
}
