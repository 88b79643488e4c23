//! Alone mode: a gateway that appends much, and alone, takes its own records into its tail as they are
//! acknowledged. The acknowledgement gives the offset and the record is still in memory, so JetStream need
//! not push back what the gateway has just sent.
//!
//! What it gives, in five turns each with and without it (three servers, R3, two gateways, 50 MQTT clients at
//! QoS 1 with 128 bytes through one of them, all on two busy cores): the gateway needs 6.9 us of processor
//! time for a message instead of 9.9, the three servers 22.5 us instead of 23.9, and the median throughput
//! was a third higher. So a gateway that is the bottleneck takes about 1.4 times as much. It gives nothing to
//! a gateway that appends little, or beside others that append too: there JetStream pushes, which is always
//! right. A record of another gateway shows within milliseconds as a gap among the own ones, and ends the
//! mode.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::sleep_until;
use tracing::debug;

use super::JetstreamLogShared;
use super::fences::KeyFences;
use crate::log::Section;
use crate::message::Offset;

/// A gateway that appends this many records a second appends much.
const ALONE_APPENDS_PER_SECOND_MIN: u64 = 1000;
/// A gateway appends alone if it appends at least this share of the stream's records.
const ALONE_RECORDS_PERCENT_MIN: u64 = 99;
/// How often to check whether this gateway appends much and alone.
const ALONE_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How often to check whether it still appends much.
const ALONE_RECHECK_INTERVAL: Duration = Duration::from_millis(100);
/// How long a record may be missing among the gateway's own before it counts as another's:
/// acknowledgements may overtake each other.
const MISSING_RECORD_WAIT_MAX: Duration = Duration::from_millis(5);
/// The pause before the next attempt to do without JetStream after records of others came: the first,
/// and the longest. An attempt that lasts as long as the longest resets the pause to the first.
const ALONE_RETRY_PAUSE_RANGE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Runs that are held until the records before them arrive.
const HELD_RUNS_MAX: usize = 1024;
/// The most records in a run, and their bytes.
const RUN_RECORDS_MAX: u64 = 1024;
const RUN_BYTES_MAX: usize = 1 << 20;
/// Runs that wait for the follower. A run that finds no room is dropped, and so comes from the stream.
const QUEUED_RUNS_MAX: usize = 256;

/// The records that this gateway appends itself, as far as the appender and the follower share them.
#[derive(Default)]
pub(super) struct OwnAppends {
    /// How many it has appended.
    appended: AtomicU64,
    /// Whether the follower wants them.
    wanted: AtomicBool,
}

/// Consecutive records of the stream.
pub(super) struct OwnRun {
    pub(super) first: Offset,
    /// The offset behind the last record.
    next: Offset,
    pub(super) sections: Vec<Section>,
    bytes: usize,
}

impl OwnRun {
    /// Whether a record of it is behind the fence of its key.
    pub(super) fn has_fenced(&self, fences: &KeyFences) -> bool {
        self.sections.iter().any(|section| fences.is_behind(section.key_id, self.next - 1))
    }
}

/// Puts runs together.
pub(super) struct OwnRunCollector {
    shared: Arc<JetstreamLogShared>,
    runs: mpsc::Sender<OwnRun>,
    run: Option<OwnRun>,
}

/// The appender's part and the follower's part.
pub(super) fn own(shared: Arc<JetstreamLogShared>) -> (OwnRunCollector, AloneMode) {
    let (runs, queue) = mpsc::channel(QUEUED_RUNS_MAX);
    let now = Instant::now();
    let mode = AloneMode {
        queue,
        alone_since: None,
        runs: BTreeMap::new(),
        missing_since: None,
        looked: (now, shared.tail.next_offset(), 0),
        try_at: now,
        pause: ALONE_RETRY_PAUSE_RANGE.0,
        shared: shared.clone(),
    };
    (OwnRunCollector { shared, runs, run: None }, mode)
}

impl OwnRunCollector {
    /// Adds the record at `place` in `section`, which is stored at `offset`.
    pub(super) fn add_record(&mut self, offset: Offset, section: &Section, place: u32) {
        self.shared.own.appended.fetch_add(1, Ordering::Relaxed);
        if !self.shared.own.wanted.load(Ordering::Relaxed) {
            return;
        }
        let full = |run: &OwnRun| run.next - run.first >= RUN_RECORDS_MAX || run.bytes >= RUN_BYTES_MAX;
        if self.run.as_ref().is_some_and(|run| run.next != offset || full(run)) {
            self.hand_over();
        }
        let none = || OwnRun { first: offset, next: offset, sections: Vec::new(), bytes: 0 };
        let run = self.run.get_or_insert_with(none);
        if !run.sections.last().is_some_and(|last| last.has_origin_of(section)) {
            run.sections.push(section.without_records());
        }
        if let Some(last) = run.sections.last_mut() {
            run.bytes += last.push_copy(section.record(place));
            run.next = offset + 1;
        }
    }

    /// Hands over the run so far, if there is one.
    pub(super) fn hand_over(&mut self) {
        if let Some(run) = self.run.take() {
            let _ = self.runs.try_send(run);
        }
    }
}

/// Decides whether the gateway is alone, and puts its own runs in order.
///
/// - *Followed*: JetStream pushes. When the gateway has appended much and alone for a second, its runs are
///   *wanted*, while JetStream still pushes.
/// - *Alone*: from the first run that continues the tail. JetStream does not push.
/// - Followed again: when a record is missing among its own for longer than acknowledgements overtake each other,
///   when too many runs wait for that, or when it appends little.
pub(super) struct AloneMode {
    shared: Arc<JetstreamLogShared>,
    queue: mpsc::Receiver<OwnRun>,
    /// Since when it takes its own records.
    alone_since: Option<Instant>,
    /// Own records behind those that are in the tail.
    runs: BTreeMap<Offset, OwnRun>,
    /// Since when the record before the first of `runs` has been missing.
    missing_since: Option<Instant>,
    /// The last check: its time, the stream's end, and the number of own records.
    looked: (Instant, Offset, u64),
    /// When to try next to do without JetStream, and the pause after a failure.
    try_at: Instant,
    pause: Duration,
}

impl AloneMode {
    /// Whether the gateway's own records are all that comes.
    pub(super) fn is_alone(&self) -> bool {
        self.alone_since.is_some()
    }

    /// Where the gateway's own records continue: the stream is needed only up to there.
    pub(super) fn continues_at(&self) -> Offset {
        self.runs.first_key_value().map_or(Offset::MAX, |(first, _)| *first)
    }

    fn wanted(&self) -> bool {
        self.shared.own.wanted.load(Ordering::Relaxed)
    }

    fn look_at(&self) -> Instant {
        self.looked.0 + if self.is_alone() { ALONE_RECHECK_INTERVAL } else { ALONE_CHECK_INTERVAL }
    }

    fn missing_at(&self) -> Option<Instant> {
        self.missing_since.map(|since| since + MISSING_RECORD_WAIT_MAX)
    }

    /// Waits for a run, or until something has to be checked. Cancel-safe.
    pub(super) async fn wake(&mut self) {
        let until = self.missing_at().into_iter().fold(self.look_at(), Instant::min);
        // Otherwise there is nothing to check before a message comes; and a follower whose `next` is
        // restarted again and again never notices that it hears nothing.
        let looks = self.is_alone() || self.wanted();
        tokio::select! {
            Some(run) = self.queue.recv() => {
                if self.wanted() && run.first >= self.shared.tail.next_offset() {
                    self.runs.insert(run.first, run);
                }
            }
            () = sleep_until(until.into()), if looks => {}
            // The appender owns the sender and may end first.
            else => std::future::pending().await,
        }
    }

    /// The run that begins at `next`, if it is there: from then on the gateway is alone.
    pub(super) fn next_run(&mut self, next: Offset) -> Option<OwnRun> {
        while let Some(entry) = self.runs.first_entry()
            && *entry.key() <= next
        {
            let run = entry.remove();
            if run.first == next {
                if self.alone_since.is_none() {
                    debug!(offset = next, "this gateway appends alone; the stream is not followed");
                    self.alone_since = Some(Instant::now());
                }
                return Some(run);
            }
        }
        None
    }

    /// Whether JetStream has to push again from `next` on, the end of the tail.
    pub(super) fn has_to_resume(&mut self, next: Offset) -> bool {
        let now = Instant::now();
        self.missing_since = match self.runs.is_empty() || !self.is_alone() {
            true => None,
            false => self.missing_since.or(Some(now)),
        };
        if self.runs.len() > HELD_RUNS_MAX {
            self.resume(now, next, "its own records do not follow each other");
        } else if self.missing_at().is_some_and(|at| at <= now) {
            self.resume(now, next, "there are records of others");
        } else {
            return self.look_at() <= now && self.has_ended(now, next);
        }
        true
    }

    /// Checks whether this gateway appends much and alone. `true`: it no longer does.
    fn has_ended(&mut self, now: Instant, next: Offset) -> bool {
        let (looked_at, from, own_before) = self.looked;
        let own = self.shared.own.appended.load(Ordering::Relaxed);
        self.looked = (now, next, own);
        let millis = u64::try_from((now - looked_at).as_millis()).unwrap_or(u64::MAX);
        let (all, own) = (next.saturating_sub(from), own - own_before);
        let much = own * 1000 >= ALONE_APPENDS_PER_SECOND_MIN * millis;
        if self.is_alone() {
            if !much {
                self.resume(now, next, "it appends little");
                (self.try_at, self.pause) = (now + ALONE_RETRY_PAUSE_RANGE.0, ALONE_RETRY_PAUSE_RANGE.0);
            }
            return !much;
        }
        if self.wanted() {
            self.resume(now, next, "its own records did not come before the stream's");
            return true;
        }
        if much && own * 100 >= all * ALONE_RECORDS_PERCENT_MIN && self.try_at <= now {
            self.shared.own.wanted.store(true, Ordering::Relaxed);
        }
        false
    }

    /// Ends the mode, because a record of the next run is behind the fence of its key. JetStream has to push again
    /// from `next` on.
    pub(super) fn end(&mut self, next: Offset) {
        self.resume(Instant::now(), next, "a key of its records has ended");
    }

    /// Ends the mode: JetStream has to push again.
    fn resume(&mut self, now: Instant, next: Offset, why: &'static str) {
        if let Some(since) = self.alone_since.take() {
            debug!(offset = next, why, "the stream is followed");
            if now - since >= ALONE_RETRY_PAUSE_RANGE.1 {
                self.pause = ALONE_RETRY_PAUSE_RANGE.0;
            }
        }
        self.shared.own.wanted.store(false, Ordering::Relaxed);
        self.runs.clear();
        self.missing_since = None;
        self.looked = (now, next, self.shared.own.appended.load(Ordering::Relaxed));
        self.try_at = now + self.pause;
        self.pause = (2 * self.pause).min(ALONE_RETRY_PAUSE_RANGE.1);
    }
}
