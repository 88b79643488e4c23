//! A mailbox: the router puts records for a live subscriber in, and the subscriber's task takes them out.
//!
//! It is bounded. A subscriber that does not empty it in time falls behind: the router puts nothing more
//! in, and the subscriber continues from the log (see [`super::feed`]).

use parking_lot::{Mutex, MutexGuard};
use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;

use crate::limits::MAILBOX_BYTES_MAX;
use crate::log::{Batch, RecordPlace};
use crate::message::Offset;

/// Records of one batch that match one filter.
pub(super) struct RoutedRecords {
    pub(super) batch: Batch,
    /// Which of the subscriber's filters.
    pub(super) slot: u32,
    pub(super) places: Arc<[RecordPlace]>,
}

/// One subscriber's mailbox.
#[derive(Default)]
pub struct Mailbox {
    state: Mutex<MailboxState>,
    task: AtomicWaker,
}

#[derive(Default)]
struct MailboxState {
    /// Whether the router puts records in.
    live: bool,
    /// Whether the subscriber has dealt with everything that was routed.
    idle: bool,
    queue: VecDeque<RoutedRecords>,
    /// What the queued batches take in memory.
    bytes: usize,
    /// The first record that the subscriber has not dealt with, as it last reported.
    cursor: Offset,
}

/// What a live subscriber finds in its mailbox.
pub(super) enum MailboxContents {
    /// All matches in one batch, in the order in which its filters were routed.
    Batch(Vec<RoutedRecords>),
    /// Nothing, and nothing will be put in: continue from the log.
    Behind,
}

impl Mailbox {
    /// Puts in the matches of one filter. Returns whether to [wake](Mailbox::wake) the subscriber once the
    /// whole batch is routed.
    pub(super) fn put(&self, routed: RoutedRecords) -> bool {
        let mut state = self.state();
        if !state.live {
            return false;
        }
        let same =
            state.queue.back().is_some_and(|last| last.batch.first_offset() == routed.batch.first_offset());
        if !same {
            if state.bytes > MAILBOX_BYTES_MAX {
                state.live = false;
                return false;
            }
            state.bytes += routed.batch.weight();
        }
        state.idle = false;
        state.queue.push_back(routed);
        !same
    }

    /// Wakes the subscriber's task.
    pub(super) fn wake(&self) {
        self.task.wake();
    }

    /// Takes out the oldest batch if it is below `routed`. Otherwise more of that batch may still be put
    /// in.
    pub(super) fn poll_take(
        &self,
        routed: impl Fn() -> Offset,
        cx: &mut Context<'_>,
    ) -> Poll<MailboxContents> {
        if let Poll::Ready(taken) = self.take(routed()) {
            return Poll::Ready(taken);
        }
        self.task.register(cx.waker());
        self.take(routed())
    }

    fn take(&self, routed: Offset) -> Poll<MailboxContents> {
        let mut state = self.state();
        let Some(first) = state.queue.front().map(|routed| routed.batch.clone()) else {
            return if state.live { Poll::Pending } else { Poll::Ready(MailboxContents::Behind) };
        };
        if first.next_offset() > routed {
            return Poll::Pending;
        }
        let of_first = |r: &RoutedRecords| r.batch.first_offset() == first.first_offset();
        let count = state.queue.iter().take_while(|r| of_first(r)).count();
        let batch = state.queue.drain(..count).collect();
        state.bytes -= first.weight();
        if state.queue.is_empty() && state.queue.capacity() > 64 {
            state.queue = VecDeque::new();
        }
        Poll::Ready(MailboxContents::Batch(batch))
    }

    /// Lets the router put records in from now on.
    pub(super) fn go_live(&self) {
        self.state().live = true;
    }

    /// Lets the router put nothing in from now on, and drops what is there.
    pub(super) fn go_behind(&self) {
        let mut state = self.state();
        state.live = false;
        state.idle = false;
        state.queue = VecDeque::new();
        state.bytes = 0;
    }

    /// Sets how far the subscriber is: everything below `cursor` is dealt with. With `all`, so is
    /// everything that it was given.
    pub fn set_progress(&self, cursor: Offset, all: bool) {
        let mut state = self.state();
        state.cursor = cursor;
        state.idle = all && state.live && state.queue.is_empty();
    }

    /// The first record that is not dealt with. `routed` is the router's offset from before this call.
    pub fn cursor(&self, routed: Offset) -> Offset {
        let state = self.state();
        if state.idle { routed.max(state.cursor) } else { state.cursor }
    }

    fn state(&self) -> MutexGuard<'_, MailboxState> {
        self.state.lock()
    }
}
