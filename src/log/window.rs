//! The window: the once ids that are known now. The writer asks it before it keeps a section with
//! ids, and updates it only after the batch is durable. So the window always agrees with the frames
//! on disk and can be rebuilt from them. Beside it stand the ids of the commits that are written and not yet
//! durable: a section with one of them waits for their outcome.
//!
//! A message id leaves when it is too old or there are too many. The id of a QoS 2 exchange leaves when
//! it is released or, if the client never comes back, after much longer. An id takes about 50
//! bytes of memory: 32 for its entry, 5 in the hash table, and the spare capacity of both.
//!
//! The window has its own clock, which nobody can set. It runs with the process. Over a restart it
//! advances by the wall-clock time since the newest frame with a once part, or stands still if the wall
//! clock was set back. So setting the clock while the gateway runs expires no id early or late; setting
//! it forward while the gateway is down counts as time passed.
//!
//! A restart forgets the ids of segments that retention has removed. This concerns a log whose
//! `log.retention_bytes` is too small for the records of one window.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tracing::warn;

use super::batch::Batch;
use super::once::{KeptRange, OPEN_EXCHANGE_BYTES, OnceEntry, OnceId, WindowStamp, put_open_exchange};
use super::segment::{FrameError, Segment};
use super::shelf::Shelf;
use crate::config;
use crate::limits::{EXCHANGE_AGE_MAX, EXCHANGES_OPEN_MAX};
use crate::message::{TimeMicros, now_micros};

/// The least time between two warnings about evicted ids.
const EVICTION_WARN_INTERVAL: Duration = Duration::from_secs(60);

/// The ids of a commit: what it keeps under each, `None` for a released one.
pub(super) type CommitIds = HashMap<OnceId, Option<KeptRange>>;

/// The known ids.
pub(super) struct DedupWindow {
    messages: Shelf,
    exchanges: Shelf,
    /// The ids of commits that are not yet durable, oldest first, and how many message ids each keeps.
    expected: VecDeque<(CommitIds, u64)>,
    clock: WindowClock,
    /// How many message ids have ever entered.
    entered: u64,
    /// Ids evicted because there were too many.
    evicted: Arc<AtomicU64>,
    warned_at: Option<Instant>,
}

impl DedupWindow {
    /// An empty window. `log` also bounds the open exchanges: each segment begins with all of them,
    /// and they may take at most a quarter of it.
    pub(super) fn new(dedup: &config::IntakeConfig, log: &config::LogConfig) -> Self {
        let in_segment = usize::try_from(log.segment_bytes / 4).unwrap_or(usize::MAX) / OPEN_EXCHANGE_BYTES;
        let exchanges_max = EXCHANGES_OPEN_MAX.min(in_segment);
        Self {
            messages: Shelf::new(Duration::from_secs(dedup.dedup_window_s), dedup.dedup_ids_max),
            exchanges: Shelf::new(EXCHANGE_AGE_MAX, exchanges_max),
            expected: VecDeque::new(),
            clock: WindowClock::new(),
            entered: 0,
            evicted: Arc::default(),
            warned_at: None,
        }
    }

    /// Rebuilds the window from the frames of `segments` (oldest first), as far back as needed.
    ///
    /// # Errors
    /// [`FrameError`] if a segment cannot be read. Damage is no error here.
    pub(super) fn recover<'a>(
        &mut self,
        segments: impl DoubleEndedIterator<Item = &'a Arc<Segment>>,
    ) -> Result<(), FrameError> {
        let mut needed = Vec::new();
        let mut last: Option<WindowStamp> = None;
        for segment in segments.rev() {
            needed.push(segment);
            let mut began = None;
            let mut newest = None;
            segment.visit_once(&mut |frame| {
                let stamp = frame.and_then(|batch| batch.once().map(|once| once.stamp));
                began = began.or(stamp);
                newest = stamp.or(newest);
                // For an older segment the first stamp is enough.
                last.is_none() || began.is_none()
            })?;
            if last.is_none()
                && let Some(newest) = newest
            {
                self.clock = WindowClock::resume(newest, now_micros());
                last = Some(newest);
            }
            let (Some(began), Some(last)) = (began, last) else { continue };
            let over_age = self.messages.is_over_age(began.seconds(), self.stamp().seconds());
            let too_many = last.entered.saturating_sub(began.entered) >= self.messages.len_max as u64;
            if over_age || too_many {
                break;
            }
        }
        for segment in needed.into_iter().rev() {
            segment.visit_once(&mut |frame| {
                match frame {
                    // These evictions were counted and reported when they happened.
                    Some(batch) => _ = self.replay(&batch),
                    // A release may be missing. Keeping a message twice is better than taking it for
                    // another and losing it.
                    None => self.exchanges.clear(),
                }
                true
            })?;
        }
        self.trim(self.stamp());
        Ok(())
    }

    /// The stamp of a frame written now.
    pub(super) fn stamp(&self) -> WindowStamp {
        let expected: u64 = self.expected.iter().map(|(_, message_ids)| message_ids).sum();
        WindowStamp { entered: self.entered + expected, clock: self.clock.now(), wall: now_micros() }
    }

    /// Adds the ids of a commit that was written: see [`DedupWindow::learn`].
    pub(super) fn expect(&mut self, ids: CommitIds, message_ids: u64) {
        self.expected.push_back((ids, message_ids));
    }

    /// Forgets what was expected: those commits have failed.
    pub(super) fn expect_nothing(&mut self) {
        self.expected.clear();
    }

    /// Updates the window from the frames of the oldest commit that was expected, which is durable now.
    pub(super) fn learn<'a>(&mut self, batches: impl Iterator<Item = &'a Batch>) {
        self.expected.pop_front();
        let evicted = batches.map(|batch| self.replay(batch)).sum();
        self.report(evicted);
    }

    /// Applies a durable frame. Returns how many ids it evicted.
    fn replay(&mut self, batch: &Batch) -> u64 {
        let Some(once) = batch.once() else { return 0 };
        if let Some(open) = once.open() {
            self.exchanges.clear();
            open.for_each(|entry| self.exchanges.insert(entry));
        }
        self.entered = once.stamp.entered;
        let since_s = once.stamp.seconds();
        let mut releases = once.releases().peekable();
        for (nth, section) in (0..).zip(batch.sections()) {
            while let Some((_, id)) = releases.next_if(|(sections, _)| *sections <= nth) {
                self.exchanges.remove(id);
            }
            let kept = KeptRange { first_offset: section.first_offset(), records: section.records() };
            for id in section.once() {
                let shelf = if id.is_exchange() {
                    &mut self.exchanges
                } else {
                    self.entered += 1;
                    &mut self.messages
                };
                shelf.insert(OnceEntry { id, kept, since_s });
            }
        }
        releases.for_each(|(_, id)| self.exchanges.remove(id));
        self.trim(once.stamp)
    }

    /// The records kept under an id, if it is known or expected.
    pub(super) fn get(&self, id: OnceId) -> Option<KeptRange> {
        if let Some(expected) = self.expected.iter().rev().find_map(|(ids, _)| ids.get(&id)) {
            return *expected;
        }
        let shelf = if id.is_exchange() { &self.exchanges } else { &self.messages };
        shelf.get(id).map(|entry| entry.kept)
    }

    /// The open exchanges, encoded for [`OncePart`](super::once::OncePart).
    pub(super) fn open(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.exchanges.len() * OPEN_EXCHANGE_BYTES);
        self.exchanges.iter().for_each(|entry| put_open_exchange(entry, &mut bytes));
        bytes
    }

    /// Removes ids that are too old at `now`, evicts excess ones, and reports those.
    pub(super) fn expire(&mut self, now: WindowStamp) {
        let evicted = self.trim(now);
        self.report(evicted);
    }

    /// Removes ids that are too old at `now` and evicts the oldest if there are too many; returns how
    /// many it evicted.
    fn trim(&mut self, now: WindowStamp) -> u64 {
        self.messages.expire(now.seconds()) + self.exchanges.expire(now.seconds())
    }

    /// Counts evicted ids, and warns about them at intervals.
    fn report(&mut self, evicted: u64) {
        if evicted == 0 {
            return;
        }
        self.evicted.fetch_add(evicted, Ordering::Relaxed);
        if self.warned_at.is_none_or(|at| at.elapsed() > EVICTION_WARN_INTERVAL) {
            self.warned_at = Some(Instant::now());
            warn!(
                evicted = self.evicted.load(Ordering::Relaxed),
                messages_max = self.messages.len_max,
                exchanges_max = self.exchanges.len_max,
                "too many message ids (intake.dedup_ids_max) or QoS 2 exchanges are known; the oldest leave early, \
                 and a message sent again under one of them is kept again"
            );
        }
    }

    /// The counter of ids evicted because there were too many.
    pub(super) fn evicted(&self) -> Arc<AtomicU64> {
        self.evicted.clone()
    }
}

/// The window's clock.
struct WindowClock {
    /// Its value at `started`, in microseconds.
    base: u64,
    started: Instant,
}

impl WindowClock {
    /// A clock that starts at 0 now.
    fn new() -> Self {
        Self { base: 0, started: Instant::now() }
    }

    /// A clock that continues from `last`, given the present wall clock.
    fn resume(last: WindowStamp, wall: TimeMicros) -> Self {
        let passed = u64::try_from(wall.saturating_sub(last.wall)).unwrap_or(0);
        Self { base: last.clock.saturating_add(passed), started: Instant::now() }
    }

    /// Its present value, in microseconds.
    fn now(&self) -> u64 {
        let passed = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.base.saturating_add(passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_goes_on_over_a_restart_and_never_back() {
        let last = WindowStamp { entered: 0, clock: 5_000_000, wall: 1_000_000_000 };
        let seconds = |wall| WindowClock::resume(last, wall).now() / 1_000_000;
        assert_eq!(seconds(1_000_000_000), 5);
        assert_eq!(seconds(1_060_000_000), 65);
        assert_eq!(seconds(0), 5, "the wall clock was set back");
        assert_eq!(seconds(TimeMicros::MIN), 5);
    }
}
