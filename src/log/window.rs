//! The window: what is known, at this moment, under which once id. The writer asks it before it
//! keeps a section that has ids, and tells it after the batch is durable, so that it always says
//! what the frames on the disk say: whatever is in it can be read from them again.
//!
//! Ids of messages leave after a time, and when there are too many; those of QoS 2 exchanges when
//! they are released or, if their client never comes back, after much longer. An id takes about 50
//! bytes of memory: 32 for its entry, 5 to find it, and what both leave free to grow.
//!
//! Time is that of a clock which nobody sets: it runs with the process, and over a restart it goes on
//! by what the wall clock says has passed since the newest frame that has ids, or stands still if that
//! has been set back. So a clock that is set while the gateway runs lets no id leave early or late; one
//! that is set forward while it does not run counts as time that has passed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tracing::warn;

use super::batch::Batch;
use super::once::{Earlier, Entry, OPEN_BYTES, OnceId, Stamp, put_open};
use super::segment::{FrameError, Segment};
use super::shelf::Shelf;
use crate::config;
use crate::limits::{EXCHANGE_AGE_MAX, EXCHANGES_OPEN_MAX};
use crate::message::{TimeMicros, now_micros};

/// How often it is said that ids have to leave early.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// What is known under which id.
pub(super) struct Window {
    messages: Shelf,
    exchanges: Shelf,
    clock: Clock,
    /// How many message ids have ever entered.
    entered: u64,
    /// Ids that had to leave because there were too many.
    evicted: Arc<AtomicU64>,
    warned_at: Option<Instant>,
}

impl Window {
    /// An empty one. `log` bounds the open exchanges as well: each segment begins with all of them,
    /// and they are to take a quarter of it at most.
    pub(super) fn new(dedup: &config::Intake, log: &config::Log) -> Self {
        let in_segment = usize::try_from(log.segment_bytes / 4).unwrap_or(usize::MAX) / OPEN_BYTES;
        let exchanges_max = EXCHANGES_OPEN_MAX.min(in_segment);
        Self {
            messages: Shelf::new(Duration::from_secs(dedup.dedup_window_s), dedup.dedup_ids_max),
            exchanges: Shelf::new(EXCHANGE_AGE_MAX, exchanges_max),
            clock: Clock::new(),
            entered: 0,
            evicted: Arc::default(),
            warned_at: None,
        }
    }

    /// Takes in what the frames of `segments`, oldest first, say, as far back as it matters.
    ///
    /// # Errors
    /// What keeps a segment from being read. Damage does not.
    pub(super) fn recover<'a>(
        &mut self,
        segments: impl DoubleEndedIterator<Item = &'a Arc<Segment>>,
    ) -> Result<(), FrameError> {
        let mut needed = Vec::new();
        let mut last: Option<Stamp> = None;
        for segment in segments.rev() {
            needed.push(segment);
            let mut began = None;
            let mut newest = None;
            segment.visit_once(&mut |frame| {
                let stamp = frame.and_then(|batch| batch.once().map(|once| once.stamp));
                began = began.or(stamp);
                newest = stamp.or(newest);
                // Of an older segment it is enough to know how it began.
                last.is_none() || began.is_none()
            })?;
            if last.is_none()
                && let Some(newest) = newest
            {
                self.clock = Clock::resume(newest, now_micros());
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
                    // What left early was counted and reported when it did.
                    Some(batch) => _ = self.replay(&batch),
                    // Releases may be among what is missing. A message that is kept twice is better
                    // than one that is taken for another and lost.
                    None => self.exchanges.clear(),
                }
                true
            })?;
        }
        self.trim(self.stamp());
        Ok(())
    }

    /// Where a frame that is written now stands.
    pub(super) fn stamp(&self) -> Stamp {
        Stamp { entered: self.entered, clock: self.clock.now(), wall: now_micros() }
    }

    /// Takes in what a frame says that was just made durable.
    pub(super) fn learn(&mut self, batch: &Batch) {
        let evicted = self.replay(batch);
        self.report(evicted);
    }

    /// Takes in what a durable frame says. Returns how many ids had to leave early for it.
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
            let kept = Earlier { first_offset: section.first_offset(), records: section.records() };
            for id in section.once() {
                let shelf = if id.is_exchange() {
                    &mut self.exchanges
                } else {
                    self.entered += 1;
                    &mut self.messages
                };
                shelf.insert(Entry { id, kept, since_s });
            }
        }
        releases.for_each(|(_, id)| self.exchanges.remove(id));
        self.trim(once.stamp)
    }

    /// What was kept under an id, if it is known.
    pub(super) fn get(&self, id: OnceId) -> Option<Earlier> {
        let shelf = if id.is_exchange() { &self.exchanges } else { &self.messages };
        shelf.get(id).map(|entry| entry.kept)
    }

    /// The exchanges that are open, as [`Once`](super::once::Once) has them.
    pub(super) fn open(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.exchanges.len() * OPEN_BYTES);
        self.exchanges.iter().for_each(|entry| put_open(entry, &mut bytes));
        bytes
    }

    /// Lets go of what is too old at `now`.
    pub(super) fn expire(&mut self, now: Stamp) {
        let evicted = self.trim(now);
        self.report(evicted);
    }

    /// Lets go of what is too old at `now`, and of the oldest where there are too many; returns how
    /// many those were.
    fn trim(&mut self, now: Stamp) -> u64 {
        self.messages.expire(now.seconds()) + self.exchanges.expire(now.seconds())
    }

    /// Counts ids that had to leave early, and says so now and then.
    fn report(&mut self, evicted: u64) {
        if evicted == 0 {
            return;
        }
        self.evicted.fetch_add(evicted, Ordering::Relaxed);
        if self.warned_at.is_none_or(|at| at.elapsed() > WARN_EVERY) {
            self.warned_at = Some(Instant::now());
            warn!(
                evicted = self.evicted.load(Ordering::Relaxed),
                messages_max = self.messages.len_max,
                exchanges_max = self.exchanges.len_max,
                "too many message ids (intake.dedup_ids_max) or QoS 2 exchanges are known; the oldest leave early, \
                 and what is sent again under them is kept again"
            );
        }
    }

    /// Counts the ids that had to leave because there were too many.
    pub(super) fn evicted(&self) -> Arc<AtomicU64> {
        self.evicted.clone()
    }
}

/// The clock that the window's time is told by.
struct Clock {
    /// What it said at `started`, in microseconds.
    base: u64,
    started: Instant,
}

impl Clock {
    /// One that begins now.
    fn new() -> Self {
        Self { base: 0, started: Instant::now() }
    }

    /// One that goes on from where it last was, now that the wall clock says `wall`.
    fn resume(last: Stamp, wall: TimeMicros) -> Self {
        let passed = u64::try_from(wall.saturating_sub(last.wall)).unwrap_or(0);
        Self { base: last.clock.saturating_add(passed), started: Instant::now() }
    }

    /// What it says now, in microseconds.
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
        let last = Stamp { entered: 0, clock: 5_000_000, wall: 1_000_000_000 };
        let seconds = |wall| Clock::resume(last, wall).now() / 1_000_000;
        assert_eq!(seconds(1_000_000_000), 5);
        assert_eq!(seconds(1_060_000_000), 65);
        assert_eq!(seconds(0), 5, "the wall clock was set back");
        assert_eq!(seconds(TimeMicros::MIN), 5);
    }
}
