//! A mailbox: where the router puts what a live subscriber is to be given, and where the
//! subscriber's task finds it.
//!
//! It is bounded. A subscriber that does not empty it in time falls behind: the router puts nothing
//! more in, and the subscriber goes on from the log by itself (see [`super::feed`]).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;

use crate::limits::MAILBOX_BYTES_MAX;
use crate::log::{Batch, Place};
use crate::message::Offset;

/// Records of one batch that match one filter.
pub(super) struct Routed {
    pub(super) batch: Batch,
    /// Which of the subscriber's filters.
    pub(super) slot: u32,
    pub(super) places: Arc<[Place]>,
}

/// One subscriber's.
#[derive(Default)]
pub struct Mailbox {
    state: Mutex<State>,
    task: AtomicWaker,
}

#[derive(Default)]
struct State {
    /// The router puts in what it routes.
    live: bool,
    /// Whatever was routed has been dealt with to the end.
    idle: bool,
    queue: VecDeque<Routed>,
    /// What the queued batches take in memory.
    bytes: usize,
    /// The first record that has not been dealt with, as the subscriber last said.
    cursor: Offset,
}

/// What there is for a live subscriber.
pub(super) enum Taken {
    /// All that matches of one batch, in the order of the filters' routing.
    Batch(Vec<Routed>),
    /// Nothing, and nothing will be put in: go on from the log.
    Behind,
}

impl Mailbox {
    /// Puts in what matches one filter. Returns whether the subscriber is to be [woken](Mailbox::wake)
    /// when the whole batch is routed.
    pub(super) fn put(&self, routed: Routed) -> bool {
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

    /// Takes out what there is of the oldest batch, if that is below `routed`: the rest of a batch
    /// may still be on its way in.
    pub(super) fn poll_take(&self, routed: impl Fn() -> Offset, cx: &mut Context<'_>) -> Poll<Taken> {
        if let Poll::Ready(taken) = self.take(routed()) {
            return Poll::Ready(taken);
        }
        self.task.register(cx.waker());
        self.take(routed())
    }

    fn take(&self, routed: Offset) -> Poll<Taken> {
        let mut state = self.state();
        let Some(first) = state.queue.front().map(|routed| routed.batch.clone()) else {
            return if state.live { Poll::Pending } else { Poll::Ready(Taken::Behind) };
        };
        if first.next_offset() > routed {
            return Poll::Pending;
        }
        let of_first = |r: &Routed| r.batch.first_offset() == first.first_offset();
        let count = state.queue.iter().take_while(|r| of_first(r)).count();
        let batch = state.queue.drain(..count).collect();
        state.bytes -= first.weight();
        if state.queue.is_empty() && state.queue.capacity() > 64 {
            state.queue = VecDeque::new();
        }
        Poll::Ready(Taken::Batch(batch))
    }

    /// From now on, what is routed is put in.
    pub(super) fn go_live(&self) {
        self.state().live = true;
    }

    /// From now on nothing is put in, and what is there is dropped.
    pub(super) fn go_behind(&self) {
        let mut state = self.state();
        state.live = false;
        state.idle = false;
        state.queue = VecDeque::new();
        state.bytes = 0;
    }

    /// The subscriber says how far it is: everything below `cursor` is dealt with; with `all`,
    /// everything that it was given.
    pub fn progress(&self, cursor: Offset, all: bool) {
        let mut state = self.state();
        state.cursor = cursor;
        state.idle = all && state.live && state.queue.is_empty();
    }

    /// The first record that has not been dealt with. `routed` is how far the router was before.
    pub fn cursor(&self, routed: Offset) -> Offset {
        let state = self.state();
        if state.idle { routed.max(state.cursor) } else { state.cursor }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
