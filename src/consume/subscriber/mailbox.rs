//! A mailbox: the router puts records for a live subscriber in, and the subscriber's task takes them out.
//!
//! It is bounded. A subscriber that does not empty it in time falls behind: the router puts nothing more
//! in, and the subscriber continues from the log (see [`super::feed`]).

use parking_lot::{Mutex, MutexGuard};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;

use crate::limits::MAILBOX_BYTES_MAX;
use crate::log::{Batch, RecordPlace};
use crate::message::Offset;
use crate::scheduler::polite_lock;
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
    /// The subscriber is asked to write what it has in flight.
    is_asked: AtomicBool,
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
    /// What it has in flight has changed since it was last written.
    is_unwritten: bool,
    /// How many messages it has in flight.
    in_flight: u32,
    /// Since when the subscriber waits and neither takes nor acknowledges anything.
    still_since: Option<Instant>,
    /// It was said that the subscriber stands still.
    is_still_said: bool,
}

/// How far a subscriber is, for the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubscriberProgress {
    /// Everything below is dealt with or in flight.
    pub cursor: Offset,
    /// With all that was routed, if it was given everything that it was sent.
    pub all: bool,
    /// How many messages are in flight.
    pub in_flight: usize,
    /// What is in flight has changed.
    pub has_changed: bool,
    /// The client has to take or to acknowledge something before more is sent, or something is in flight.
    pub waits: bool,
    /// It has taken or acknowledged something since the last report.
    pub has_moved: bool,
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
        let (state, is_asked, task) = Default::default();
        Self { share, state, is_asked, task }
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

    /// Whether there is nothing in it.
    pub(super) fn is_empty(&self) -> bool {
        self.state().queue.is_empty()
    }

    /// Everything below this offset was taken out or is not for the subscriber; `None` if it is behind. `routed` is the
    /// router's offset from before this call.
    pub(super) fn taken_until(&self, routed: Offset) -> Option<Offset> {
        let state = self.state();
        let first = state.queue.front().and_then(|oldest| oldest.places.first());
        state.live.then(|| first.map_or(routed, |place| place.offset.min(routed)))
    }

    /// Sets how far the subscriber is: everything below `cursor` is dealt with. With `all`, so is
    /// everything that it was given.
    pub fn set_progress(&self, cursor: Offset, all: bool) {
        self.state().set_progress(cursor, all);
    }

    /// Takes a report of how far the subscriber is.
    pub fn report(&self, progress: SubscriberProgress) {
        let mut state = self.state();
        state.set_progress(progress.cursor, progress.all);
        state.is_unwritten |= progress.has_changed;
        state.in_flight = u32::try_from(progress.in_flight).unwrap_or(u32::MAX);
        state.still_since = match state.still_since {
            Some(since) if progress.waits && !progress.has_moved => Some(since),
            _ => progress.waits.then(Instant::now),
        };
        state.is_still_said &= !progress.has_moved;
    }

    /// Has `write` queue the cursor, as [`Mailbox::cursor`] has it, if it is not the one `before`. Nothing newer can be
    /// reported meanwhile, so what the subscriber writes after its next report comes behind it. If what is in flight has
    /// changed, the subscriber is asked to write both, since only it knows them at one moment.
    pub fn write_cursor(&self, routed: Offset, before: &mut Offset, write: impl FnOnce(Offset)) {
        let state = self.state();
        if state.is_unwritten {
            drop(state);
            self.is_asked.store(true, Ordering::Release);
            self.task.wake();
            return;
        }
        let cursor = state.cursor_behind(routed);
        if std::mem::replace(before, cursor) != cursor {
            write(cursor);
        }
    }

    /// Whether the subscriber is asked to write what it has in flight. Its task is woken when it is.
    pub fn poll_asked(&self, cx: &Context<'_>) -> bool {
        self.task.register(cx.waker());
        self.is_asked.load(Ordering::Relaxed) && self.is_asked.swap(false, Ordering::Acquire)
    }

    /// What is in flight is on its way to the store, as of the last report.
    pub fn set_written(&self) {
        self.state().is_unwritten = false;
    }

    /// If the subscriber has waited for so long and has neither taken nor acknowledged anything: whether that is new,
    /// and how many messages are in flight.
    pub fn note_still(&self, after: Duration) -> Option<(bool, u32)> {
        let mut state = self.state();
        state.still_since.filter(|since| since.elapsed() >= after)?;
        Some((!std::mem::replace(&mut state.is_still_said, true), state.in_flight))
    }

    /// How many messages are in flight, and since when the subscriber waits and neither takes nor acknowledges anything.
    pub fn standing(&self) -> (u32, Option<Instant>) {
        let state = self.state();
        (state.in_flight, state.still_since)
    }

    /// The first record that is not dealt with. `routed` is the router's offset from before this call.
    pub fn cursor(&self, routed: Offset) -> Offset {
        self.state().cursor_behind(routed)
    }

    fn state(&self) -> MutexGuard<'_, MailboxState> {
        polite_lock(&self.state)
    }
}

impl MailboxState {
    fn set_progress(&mut self, cursor: Offset, all: bool) {
        self.cursor = cursor;
        self.idle = all && self.live && self.queue.is_empty();
    }

    fn cursor_behind(&self, routed: Offset) -> Offset {
        if self.idle { routed.max(self.cursor) } else { self.cursor }
    }

    fn fall_behind(&mut self) {
        self.live = false;
        self.idle = false;
        self.queue = VecDeque::new();
        self.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_newer_is_reported_while_a_cursor_is_queued() {
        let mailbox = Mailbox::new(TenantShare::alone());
        let report = |cursor, has_changed| {
            let (all, waits, has_moved, in_flight) = (true, false, true, 0);
            mailbox.report(SubscriberProgress { cursor, all, in_flight, has_changed, waits, has_moved });
        };
        let (mut before, mut written) = (0, Vec::new());
        let mut write = || {
            mailbox.write_cursor(0, &mut before, |cursor| {
                assert!(mailbox.state.try_lock().is_none(), "a report would wait");
                written.push(cursor);
            });
        };
        report(5, false);
        write();
        write();
        // The subscriber writes the flights with their cursor.
        report(6, true);
        write();
        mailbox.set_written();
        report(7, false);
        write();
        assert_eq!(written, [5, 7]);
        assert!(mailbox.is_asked.load(Ordering::Relaxed));
    }
}
