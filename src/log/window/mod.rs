//! The window: the once ids that are known now. The writer asks it before it keeps a section with
//! ids, and updates it only after the batch is durable. So the window always agrees with the frames
//! on disk and can be rebuilt from them. Beside it stand the ids of the commits that are written and not yet
//! durable: a section with one of them waits for their outcome.
//!
//! A message id leaves when it is too old or there are too many. The id of a QoS 2 exchange leaves when
//! it is released or, if the client never comes back, after much longer: none is evicted. An id takes about 70
//! bytes of memory: 48 for its entry, 5 in the hash table, and the spare capacity of both.
//!
//! Every datasource has a share, so that none can push out the ids of another. With more message ids than
//! `intake.dedup_ids_per_datasource_max` it loses its own oldest. With more in all than
//! `intake.dedup_ids_max`, those who have most lose their oldest, down to a level that is the same for all of
//! them. Who has as many exchanges open as `intake.exchanges_per_datasource_max`, or as there is room left for,
//! opens no further one: so there is always room for a datasource that has few.
//!
//! Beside an id is the digest of what was kept under it, computed from the records themselves. So the frames
//! need not have it, and it is there again after a start.
//!
//! The window has its own clock, which nobody can set. It runs with the process. Over a restart it
//! advances by the wall-clock time since the newest frame with a once part, or stands still if the wall
//! clock was set back. So setting the clock while the gateway runs expires no id early or late; setting
//! it forward while the gateway is down counts as time passed.
//!
//! A restart forgets the ids of segments that retention has removed. This concerns a log whose
//! `log.retention_bytes` is too small for the records of one window. It also forgets what came before the
//! newest [`RECOVERED_IDS_FACTOR`] times `intake.dedup_ids_max` ids, so that a start ends soon.

mod clock;
mod share;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tracing::warn;

use self::clock::WindowClock;
use self::share::WindowShares;
use super::batch::{Batch, SectionRef};
use super::once::{
    ContentDigest, KeptRange, OPEN_EXCHANGE_BYTES, OnceEntry, OnceId, OncePart, WindowStamp,
    put_open_exchange,
};
use super::segment::{FrameError, SeekOutcome, Segment};
use super::shelf::{KnownContent, KnownId, ShareNumber, Shelf};
use crate::config;
use crate::limits::{EXCHANGE_AGE_MAX, EXCHANGES_OPEN_MAX};
use crate::message::{Offset, now_micros};

/// The least time between two warnings about evicted ids.
const EVICTION_WARN_INTERVAL: Duration = Duration::from_secs(60);
/// A start goes back by this many times the ids that are known at most: what one datasource has lost of its own
/// may be newer than what another still has.
const RECOVERED_IDS_FACTOR: u64 = 16;

/// The ids of a commit that is not durable yet.
#[derive(Default)]
pub(super) struct CommitIds {
    /// What it keeps under each, `None` for a released one.
    pub(super) known: HashMap<OnceId, Option<KnownContent>>,
    /// How many exchanges it opens: in all, and per datasource.
    pub(super) opened: usize,
    pub(super) opened_by: HashMap<String, usize>,
    /// Of its sections with ids, in order.
    pub(super) digests: Vec<Option<ContentDigest>>,
}

/// The known ids.
pub(super) struct DedupWindow {
    bounds: WindowBounds,
    /// The message ids, per datasource, and how many exchanges each has open.
    shares: WindowShares,
    /// The open exchanges of all datasources, as each segment lists them.
    exchanges: Shelf,
    /// The ids of commits that are not yet durable, oldest first, and how many message ids each keeps.
    expected: VecDeque<(CommitIds, u64)>,
    clock: WindowClock,
    /// How many message ids have ever entered.
    entered: u64,
    /// The second of the window's clock when ids over their age were last removed.
    expired_s: Option<u32>,
    /// Ids evicted because there were too many.
    evicted: Arc<AtomicU64>,
    warned_at: Option<Instant>,
}

/// How much there may be in a window.
struct WindowBounds {
    message_age_max_s: u64,
    messages_max: usize,
    messages_per_share_max: usize,
    exchanges_max: usize,
    exchanges_per_share_max: usize,
}

impl DedupWindow {
    /// An empty window. `log` also bounds the open exchanges: each segment begins with all of them,
    /// and they may take at most a quarter of it.
    pub(super) fn new(dedup: &config::IntakeConfig, log: &config::LogConfig) -> Self {
        let in_segment = usize::try_from(log.segment_bytes / 4).unwrap_or(usize::MAX) / OPEN_EXCHANGE_BYTES;
        let bounds = WindowBounds {
            message_age_max_s: dedup.dedup_window_s,
            messages_max: dedup.dedup_ids_max,
            messages_per_share_max: dedup.dedup_ids_per_datasource_max,
            exchanges_max: EXCHANGES_OPEN_MAX.min(in_segment),
            exchanges_per_share_max: dedup.exchanges_per_datasource_max,
        };
        Self {
            bounds,
            shares: WindowShares::default(),
            exchanges: Shelf::default(),
            expected: VecDeque::new(),
            clock: WindowClock::new(),
            entered: 0,
            expired_s: None,
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
        segments: impl Iterator<Item = &'a Arc<Segment>>,
    ) -> Result<(), FrameError> {
        let segments: Vec<_> = segments.collect();
        let needed = self.find_needed(&segments)?;
        for segment in &segments[needed..] {
            segment.visit_once(&mut |frame| {
                match frame {
                    // These evictions were counted and reported when they happened.
                    Some(batch) => _ = self.replay(&batch),
                    // A release may be missing. Keeping a message twice is better than taking it for
                    // another and losing it.
                    None => self.clear_exchanges(),
                }
                true
            })?;
        }
        self.find_owners(&segments)?;
        self.remove_old(self.stamp());
        Ok(())
    }

    /// The first of the segments that the window is rebuilt from. Sets the clock.
    fn find_needed(&mut self, segments: &[&Arc<Segment>]) -> Result<usize, FrameError> {
        let mut last: Option<WindowStamp> = None;
        for (nth, segment) in segments.iter().enumerate().rev() {
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
            let over_age =
                is_over_age(self.bounds.message_age_max_s, began.seconds(), self.stamp().seconds());
            let ids_max = (self.bounds.messages_max as u64).saturating_mul(RECOVERED_IDS_FACTOR);
            if over_age || last.entered.saturating_sub(began.entered) >= ids_max {
                return Ok(nth);
            }
        }
        Ok(0)
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
        let expected = self.expected.pop_front();
        let mut digests = expected.into_iter().flat_map(|(ids, _)| ids.digests);
        let mut evicted = 0;
        for batch in batches {
            if let Some(once) = batch.once() {
                evicted += self.apply(batch, &once, &mut |_| digests.next().flatten());
            }
        }
        self.report(evicted);
    }

    /// Applies a frame from the disk. Returns how many ids it evicted.
    fn replay(&mut self, batch: &Batch) -> u64 {
        let Some(once) = batch.once() else { return 0 };
        if let Some(open) = once.open() {
            self.restore_open(open);
        }
        self.apply(batch, &once, &mut |section| Some(section.content_digest()))
    }

    /// Applies what a durable frame keeps and releases. Returns how many ids it evicted.
    fn apply(
        &mut self,
        batch: &Batch,
        once: &OncePart<'_>,
        digest_of: &mut dyn FnMut(&SectionRef<'_>) -> Option<ContentDigest>,
    ) -> u64 {
        self.entered = once.stamp.entered;
        let since_s = once.stamp.seconds();
        let mut evicted = 0;
        let mut releases = once.releases().peekable();
        for (nth, section) in (0..).zip(batch.sections()) {
            while let Some((_, id)) = releases.next_if(|(sections, _)| *sections <= nth) {
                self.close_exchange(id);
            }
            let mut ids = section.once().peekable();
            if ids.peek().is_none() {
                continue;
            }
            let kept = KeptRange { first_offset: section.first_offset(), records: section.records() };
            let (digest, owner) = (digest_of(&section), self.shares.number(section.datasource()));
            for id in ids {
                let known = KnownId { entry: OnceEntry { id, kept, since_s }, digest, owner };
                if id.is_exchange() {
                    self.open_exchange(known);
                } else {
                    self.entered += 1;
                    evicted += self.shares.insert_message(known, self.bounds.messages_per_share_max);
                }
            }
        }
        releases.for_each(|(_, id)| self.close_exchange(id));
        self.remove_old(once.stamp);
        evicted + self.shares.level(self.bounds.messages_max)
    }

    /// The open exchanges are those of a list, which does not say whose they are.
    fn restore_open(&mut self, open: impl Iterator<Item = OnceEntry>) {
        let before = std::mem::take(&mut self.exchanges);
        self.shares.forget_exchanges();
        for entry in open {
            let known = before.get(entry.id).filter(|known| known.entry.kept == entry.kept).copied();
            self.open_exchange(known.unwrap_or(KnownId { entry, digest: None, owner: ShareNumber::NONE }));
        }
    }

    /// Reads the records of the exchanges that were found in a list alone, which say whose they are and what their
    /// digest is. Those of removed segments stay without.
    fn find_owners(&mut self, segments: &[&Arc<Segment>]) -> Result<(), FrameError> {
        let mut read: Option<Batch> = None;
        for known in self.exchanges.iter_mut().filter(|known| known.owner == ShareNumber::NONE) {
            let (id, offset) = (known.entry.id, known.entry.kept.first_offset);
            if !read
                .as_ref()
                .is_some_and(|batch| (batch.first_offset()..batch.next_offset()).contains(&offset))
            {
                read = read_batch(segments, offset)?;
            }
            let Some(batch) = &read else { continue };
            let section = batch.sections().find(|section| offset < section.next_offset());
            if let Some(section) = section.filter(|section| section.once().any(|found| found == id)) {
                known.digest = Some(section.content_digest());
                known.owner = self.shares.number(section.datasource());
                self.shares.count_exchange(known.owner, true);
            }
        }
        Ok(())
    }

    fn open_exchange(&mut self, known: KnownId) {
        self.shares.count_exchange(known.owner, true);
        if let Some(replaced) = self.exchanges.insert(known) {
            self.shares.count_exchange(replaced.owner, false);
        }
    }

    fn close_exchange(&mut self, id: OnceId) {
        if let Some(closed) = self.exchanges.remove(id) {
            self.shares.count_exchange(closed.owner, false);
        }
    }

    fn clear_exchanges(&mut self) {
        self.exchanges = Shelf::default();
        self.shares.forget_exchanges();
    }

    /// What a commit that is not durable yet has done under an id: `Some(None)` if it releases it.
    fn expected(&self, id: OnceId) -> Option<Option<KnownContent>> {
        self.expected.iter().rev().find_map(|(ids, _)| ids.known.get(&id)).copied()
    }

    /// What is kept under an id of a datasource, if the id is known or expected.
    pub(super) fn get(&self, datasource: &str, id: OnceId) -> Option<KnownContent> {
        if let Some(expected) = self.expected(id) {
            return expected;
        }
        let known =
            if id.is_exchange() { self.exchanges.get(id) } else { self.shares.message(datasource, id) };
        known.map(KnownId::content)
    }

    /// Whether an exchange is open, whosever it is.
    pub(super) fn is_open(&self, id: OnceId) -> bool {
        self.expected(id).map_or_else(|| self.exchanges.get(id).is_some(), |expected| expected.is_some())
    }

    /// How many more exchanges a datasource may open, if `opened` more are open in all.
    pub(super) fn exchanges_left(&self, datasource: &str, opened: usize) -> usize {
        let expected = || self.expected.iter().map(|(ids, _)| ids);
        let of_share = self.shares.exchanges(datasource)
            + expected().filter_map(|ids| ids.opened_by.get(datasource)).sum::<usize>();
        let opened = opened + expected().map(|ids| ids.opened).sum::<usize>();
        let free = self.bounds.exchanges_max.saturating_sub(self.exchanges.len() + opened);
        // Nobody may have more than there is room left for, so that there always is some.
        self.bounds.exchanges_per_share_max.min(free).saturating_sub(of_share)
    }

    /// The open exchanges, encoded for [`OncePart`].
    pub(super) fn open(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.exchanges.len() * OPEN_EXCHANGE_BYTES);
        self.exchanges.iter().for_each(|known| put_open_exchange(&known.entry, &mut bytes));
        bytes
    }

    /// Removes ids that are too old at `now`.
    pub(super) fn expire(&mut self, now: WindowStamp) {
        self.remove_old(now);
    }

    /// Removes ids that are too old at `now`. Ages are whole seconds, so that it looks once a second.
    fn remove_old(&mut self, now: WindowStamp) {
        let now_s = now.seconds();
        if self.expired_s.replace(now_s) == Some(now_s) {
            return;
        }
        self.shares.expire(|since_s| is_over_age(self.bounds.message_age_max_s, since_s, now_s));
        while let Some(oldest) = self.exchanges.oldest()
            && is_over_age(EXCHANGE_AGE_MAX.as_secs(), oldest.entry.since_s, now_s)
        {
            self.close_exchange(oldest.entry.id);
        }
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
                ids_max = self.bounds.messages_max,
                per_datasource_max = self.bounds.messages_per_share_max,
                "too many message ids are known (intake.dedup_ids_max, intake.dedup_ids_per_datasource_max); the \
                 oldest of those who have most leave early, and a message sent again under one of them is kept again"
            );
        }
    }

    /// The counter of ids evicted because there were too many.
    pub(super) fn evicted(&self) -> Arc<AtomicU64> {
        self.evicted.clone()
    }
}

/// Whether what came at `since_s` is too old at `now_s`; both are seconds of the window's clock.
fn is_over_age(age_max_s: u64, since_s: u32, now_s: u32) -> bool {
    u64::from(now_s.saturating_sub(since_s)) > age_max_s
}

/// The batch that holds the record at `offset`; `None` if it is removed or damaged.
fn read_batch(segments: &[&Arc<Segment>], offset: Offset) -> Result<Option<Batch>, FrameError> {
    let behind = segments.partition_point(|segment| segment.first_offset <= offset);
    let Some(segment) = behind.checked_sub(1).map(|at| segments[at]) else { return Ok(None) };
    let SeekOutcome::At { position, offset } = segment.seek(offset)? else { return Ok(None) };
    match segment.read_frame(position, offset) {
        Ok((_, batch)) => Ok(Some(batch)),
        Err(FrameError::Damaged { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
