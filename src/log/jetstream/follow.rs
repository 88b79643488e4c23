//! Following: brings every message of the stream, from any gateway, into this node's tail, which serves
//! the readers and the router.
//!
//! Usually JetStream pushes the messages. But a gateway that appends much, and alone, would receive
//! everything it has just sent, at the same cost to it and the servers as the append. It then takes its
//! own records as they are acknowledged ([`own`](super::own)). A record of another gateway shows within
//! milliseconds as a gap among them. Then, or when this gateway appends little, JetStream pushes again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use headgate_bridge_nats::stream::{StoredMessage, StreamFollower};
use tokio::sync::mpsc;
use tokio::time::sleep_until;
use tracing::{debug, warn};

use super::JetstreamLogShared;
use super::own::OwnRun;
use crate::log::nats_message::{ParsedTimeCache, decode_record};
use crate::log::{Batch, Section};
use crate::message::Offset;

/// Messages that make up one batch, and their bytes.
const FOLLOW_BATCH_MESSAGES_MAX: usize = 1024;
const FOLLOW_BATCH_BYTES_MAX: usize = 1 << 20;
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

/// The following task: runs for as long as the log is open.
pub(super) struct JetstreamLogFollower {
    shared: Arc<JetstreamLogShared>,
    follower: StreamFollower,
    own: mpsc::Receiver<OwnRun>,
    /// Since when it takes its own records as they are acknowledged, while the follower pauses.
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
    stored: Vec<StoredMessage>,
}

impl JetstreamLogFollower {
    /// A task that begins where the tail ends.
    pub(super) fn new(
        shared: Arc<JetstreamLogShared>,
        follower: StreamFollower,
        own: mpsc::Receiver<OwnRun>,
    ) -> Self {
        let now = Instant::now();
        let looked = (now, shared.tail.next_offset(), 0);
        Self {
            shared,
            follower,
            own,
            alone_since: None,
            runs: BTreeMap::new(),
            missing_since: None,
            looked,
            try_at: now,
            pause: ALONE_RETRY_PAUSE_RANGE.0,
            stored: Vec::new(),
        }
    }

    /// Runs until it is aborted.
    pub(super) async fn run(mut self) {
        loop {
            let look_at = self.looked.0
                + if self.alone_since.is_some() { ALONE_RECHECK_INTERVAL } else { ALONE_CHECK_INTERVAL };
            let missing_at = self.missing_since.map(|since| since + MISSING_RECORD_WAIT_MAX);
            let until = missing_at.into_iter().fold(look_at, Instant::min);
            // Otherwise there is nothing to check before a message comes; and a follower whose `next` is
            // restarted again and again never notices that it hears nothing.
            let looks = self.alone_since.is_some() || self.shared.own.wanted.load(Ordering::Relaxed);
            tokio::select! {
                message = self.follower.next(), if self.alone_since.is_none() => self.take_messages(message),
                // The appender owns the sender and may end first.
                Some(run) = self.own.recv() => self.keep_run(run),
                () = sleep_until(until.into()), if looks => {}
            }
            self.join_own_runs();
            let now = Instant::now();
            if self.missing_since.is_some_and(|since| since + MISSING_RECORD_WAIT_MAX <= now) {
                self.resume_stream("there are records of others");
            }
            if look_at <= now {
                self.check_alone(now);
            }
        }
    }

    fn next_offset(&self) -> Offset {
        self.shared.tail.next_offset()
    }

    /// Takes a message and all that have come with it, up to where the gateway's own records continue.
    fn take_messages(&mut self, message: StoredMessage) {
        let end = self.runs.first_key_value().map_or(Offset::MAX, |(first, _)| *first);
        let (mut bytes, mut message) = (0, Some(message));
        while let Some(stored) = message.take_if(|stored| stored.sequence < end) {
            bytes += stored.payload.len();
            self.stored.push(stored);
            if self.stored.len() < FOLLOW_BATCH_MESSAGES_MAX && bytes < FOLLOW_BATCH_BYTES_MAX {
                message = self.follower.try_next();
            }
        }
        let at_end = message.is_some();
        let mut stored = std::mem::take(&mut self.stored);
        for batch in gather_batches(&stored, self.next_offset(), &self.shared) {
            self.push(batch);
        }
        stored.clear();
        self.stored = stored;
        // The stream has no records between here and `end`.
        if at_end && self.next_offset() < end {
            self.push(Batch::nothing_below(end));
        }
    }

    /// Keeps a run of own records until the records before it arrive.
    fn keep_run(&mut self, run: OwnRun) {
        if self.shared.own.wanted.load(Ordering::Relaxed) && run.first >= self.next_offset() {
            self.runs.insert(run.first, run);
        }
    }

    /// Moves own records into the tail, if they are the next ones.
    fn join_own_runs(&mut self) {
        let mut next = self.next_offset();
        while let Some(entry) = self.runs.first_entry()
            && *entry.key() <= next
        {
            let run = entry.remove();
            if run.first < next {
                continue;
            }
            if self.alone_since.is_none() {
                debug!(offset = next, "this gateway appends alone; the stream is not followed");
                self.alone_since = Some(Instant::now());
                self.follower.pause();
            }
            next = run.next;
            self.push(Batch::gather(run.first, &run.sections));
        }
        self.missing_since = match self.runs.is_empty() || self.alone_since.is_none() {
            true => None,
            false => self.missing_since.or_else(|| Some(Instant::now())),
        };
        if self.runs.len() > HELD_RUNS_MAX {
            self.resume_stream("its own records do not follow each other");
        }
    }

    /// Checks whether this gateway appends much and alone.
    fn check_alone(&mut self, now: Instant) {
        let (looked_at, from, own_before) = self.looked;
        let (next, own) = (self.next_offset(), self.shared.own.appended.load(Ordering::Relaxed));
        self.looked = (now, next, own);
        let millis = u64::try_from((now - looked_at).as_millis()).unwrap_or(u64::MAX);
        let (all, own) = (next.saturating_sub(from), own - own_before);
        let much = own * 1000 >= ALONE_APPENDS_PER_SECOND_MIN * millis;
        if self.alone_since.is_some() {
            if !much {
                self.resume_stream("it appends little");
                (self.try_at, self.pause) = (now + ALONE_RETRY_PAUSE_RANGE.0, ALONE_RETRY_PAUSE_RANGE.0);
            }
        } else if self.shared.own.wanted.load(Ordering::Relaxed) {
            self.resume_stream("its own records did not come before the stream's");
        } else if much && own * 100 >= all * ALONE_RECORDS_PERCENT_MIN && self.try_at <= now {
            self.shared.own.wanted.store(true, Ordering::Relaxed);
        }
    }

    /// Lets JetStream push again from here on.
    fn resume_stream(&mut self, why: &'static str) {
        let (now, next) = (Instant::now(), self.next_offset());
        if let Some(since) = self.alone_since.take() {
            debug!(offset = next, why, "the stream is followed");
            if now - since >= ALONE_RETRY_PAUSE_RANGE.1 {
                self.pause = ALONE_RETRY_PAUSE_RANGE.0;
            }
        }
        self.shared.own.wanted.store(false, Ordering::Relaxed);
        self.follower.seek(next);
        self.runs.clear();
        self.missing_since = None;
        self.looked = (now, next, self.shared.own.appended.load(Ordering::Relaxed));
        self.try_at = now + self.pause;
        self.pause = (2 * self.pause).min(ALONE_RETRY_PAUSE_RANGE.1);
    }

    /// Puts a batch into the tail, and calls the listener.
    fn push(&self, batch: Batch) {
        self.shared.tail.push(batch.clone());
        if let Some(listener) = self.shared.listener.get() {
            listener(&batch);
        }
    }
}

/// Gathers messages into batches, in order; `next` is the first possible offset. A batch without records
/// covers missing messages and messages that are not records.
pub(super) fn gather_batches(
    messages: &[StoredMessage],
    mut next: Offset,
    shared: &JetstreamLogShared,
) -> Vec<Batch> {
    let mut batches = Vec::new();
    let mut sections: Vec<Section> = Vec::new();
    let mut last_time = ParsedTimeCache::default();
    let mut first = next;
    // The offset behind all that the batches cover.
    let mut said = next;
    for message in messages {
        if message.sequence > next {
            flush_sections(&mut sections, first, &mut said, &mut batches);
        }
        next = message.sequence + 1;
        let begins = sections.is_empty();
        if decode_record(message, &mut last_time, &mut sections) {
            if begins {
                first = message.sequence;
                if first > said {
                    batches.push(Batch::nothing_below(first));
                }
            }
            continue;
        }
        let seen = shared.foreign.fetch_add(1, Ordering::Relaxed);
        if seen.is_power_of_two() || seen == 0 {
            let (stream, sequence) = (shared.stream.name(), message.sequence);
            warn!(
                stream,
                sequence,
                messages = seen + 1,
                "a message of the stream is not a record of Headgate; it is skipped"
            );
        }
        flush_sections(&mut sections, first, &mut said, &mut batches);
    }
    flush_sections(&mut sections, first, &mut said, &mut batches);
    if next > said {
        batches.push(Batch::nothing_below(next));
    }
    batches
}

/// Makes a batch of the gathered sections.
fn flush_sections(sections: &mut Vec<Section>, first: Offset, said: &mut Offset, batches: &mut Vec<Batch>) {
    if !sections.is_empty() {
        let batch = Batch::gather(first, sections);
        *said = batch.next_offset();
        batches.push(batch);
        sections.clear();
    }
}
