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
use crate::shares::{ShareCharge, ShareCount, TenantShare};

/// Places in one batch, with what they take of a tenant's share until the last subscriber has dealt with them.
pub(super) struct RoutedPlaces {
    places: Box<[RecordPlace]>,
    _charge: Option<ShareCharge>,
}

impl RoutedPlaces {
    /// Places that a share is charged for; `None` if it has no room.
    pub(super) fn charged(
        places: &[RecordPlace],
        share: &Arc<TenantShare>,
        bytes_max: u64,
    ) -> Option<Arc<Self>> {
        let mut charge = share.charge();
        charge.try_add(ShareCount::PlaceBytes, size_of_val(places) as u64, bytes_max).ok()?;
        Some(Arc::new(Self { places: places.into(), _charge: Some(charge) }))
    }

    /// Places that their reader alone has, and that its own bounds are for.
    pub(super) fn own(places: Vec<RecordPlace>) -> Arc<Self> {
        Arc::new(Self { places: places.into(), _charge: None })
    }
}

impl std::ops::Deref for RoutedPlaces {
    type Target = [RecordPlace];

    fn deref(&self) -> &[RecordPlace] {
        &self.places
    }
}

/// Records of one batch that match the filters of one subscriber.
pub(super) struct RoutedRecords {
    pub(super) batch: Batch,
    /// The subscriber's only filter, if the router knows that it matches all of them.
    pub(super) slot: Option<u32>,
    pub(super) places: Arc<RoutedPlaces>,
}

impl RoutedRecords {
    /// What it takes in memory.
    fn weight(&self) -> usize {
        self.batch.weight() + size_of_val(&**self.places) + size_of::<Self>()
    }
}

/// One subscriber's mailbox.
pub struct Mailbox {
    share: Arc<TenantShare>,
    state: Mutex<MailboxState>,
    task: AtomicWaker,
}

#[derive(Default)]
struct MailboxState {
    /// Whether the router puts records in.
    live: bool,
    /// Whether the subscriber has dealt with everything that was routed.
    idle: bool,
    /// At most one entry for each batch.
    queue: VecDeque<RoutedRecords>,
    /// What the queue takes in memory.
    bytes: usize,
    /// The first record that the subscriber has not dealt with, as it last reported.
    cursor: Offset,
}

/// What a live subscriber finds in its mailbox.
pub(super) enum MailboxContents {
    /// All matches in one batch.
    Batch(RoutedRecords),
    /// Nothing, and nothing will be put in: continue from the log.
    Behind,
}

impl Mailbox {
    /// An empty mailbox of a subscriber that is behind.
    pub(super) fn new(share: Arc<TenantShare>) -> Self {
        Self { share, state: Mutex::default(), task: AtomicWaker::new() }
    }

    /// What its subscriber's tenant takes.
    pub fn share(&self) -> &Arc<TenantShare> {
        &self.share
    }

    /// Puts in the matches in one batch. Returns whether to [wake](Mailbox::wake) the subscriber once the
    /// whole batch is routed.
    pub(super) fn put(&self, routed: RoutedRecords) -> bool {
        let mut state = self.state();
        if !state.live {
            return false;
        }
        if state.bytes > MAILBOX_BYTES_MAX {
            state.fall_behind();
            return true;
        }
        state.bytes += routed.weight();
        state.idle = false;
        state.queue.push_back(routed);
        true
    }

    /// Wakes the subscriber's task.
    pub(super) fn wake(&self) {
        self.task.wake();
    }

    /// Takes out the oldest batch.
    pub(super) fn poll_take(&self, cx: &mut Context<'_>) -> Poll<MailboxContents> {
        if let Poll::Ready(taken) = self.take() {
            return Poll::Ready(taken);
        }
        self.task.register(cx.waker());
        self.take()
    }

    fn take(&self) -> Poll<MailboxContents> {
        let mut state = self.state();
        let Some(routed) = state.queue.pop_front() else {
            return if state.live { Poll::Pending } else { Poll::Ready(MailboxContents::Behind) };
        };
        state.bytes -= routed.weight();
        if state.queue.is_empty() && state.queue.capacity() > 64 {
            state.queue = VecDeque::new();
        }
        Poll::Ready(MailboxContents::Batch(routed))
    }

    /// Lets the router put records in from now on.
    pub(super) fn go_live(&self) {
        self.state().live = true;
    }

    /// Lets the router put nothing in from now on, and drops what is there: the subscriber reads it from the
    /// log. Returns whether it was live.
    pub(super) fn go_behind(&self) -> bool {
        let mut state = self.state();
        let was_live = state.live;
        state.fall_behind();
        was_live
    }

    /// As [`Mailbox::go_behind`], if its oldest batch ends at `floor` or before. Returns whether it did.
    pub(super) fn go_behind_if_older(&self, floor: Offset) -> bool {
        let mut state = self.state();
        let older = state.queue.front().is_some_and(|routed| routed.batch.next_offset() <= floor);
        if older {
            state.fall_behind();
        }
        older
    }

    /// Whether there is anything in it.
    #[cfg(test)]
    pub(super) fn holds_any(&self) -> bool {
        !self.state().queue.is_empty()
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

impl MailboxState {
    fn fall_behind(&mut self) {
        self.live = false;
        self.idle = false;
        self.queue = VecDeque::new();
        self.bytes = 0;
    }
}
