//! A watch on a bucket: all of its rows, and then every change, in order and without a gap, across losses of
//! the connection.
//!
//! JetStream pushes the bucket's stream from the watch's position. After a missing message, a missing
//! heartbeat or a reconnect, the watch makes a new consumer at that position. The bucket keeps only the
//! newest value of a row, so a late reader misses overwritten values. Rows therefore come in [`KvUpdate`]s:
//! each takes the reader from one state that the bucket had to a later one, and never splits a batch.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_nats::header;
use async_nats::jetstream::consumer::DeliverPolicy;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use super::{KV_RETRY_PAUSE, KvBucket, KvError, KvRevision, KvRow, is_deleted};
use crate::presence::{self, PRESENCE_BEAT_INTERVAL};
use crate::pushed::{AckPlace, PushEvent, PushFeed};

/// A watch that JetStream is silent to for longer may be behind. Other nodes wait longer than this for a silent node, so
/// that "all nodes know of a change" includes a node that is cut off.
pub const KV_WATCH_SILENCE_MAX: Duration = Duration::from_secs(2);
const _: () = assert!(
    KV_WATCH_SILENCE_MAX.as_millis() + PRESENCE_BEAT_INTERVAL.as_millis()
        <= presence::PRESENCE_SILENCE_MAX.as_millis()
);

/// A step from one state of the bucket to a later one.
#[derive(Debug)]
pub struct KvUpdate {
    /// The rows that are different now, oldest first.
    pub rows: Vec<KvRow>,
    /// The bucket's revision after them.
    pub revision: KvRevision,
    /// Whether these are all rows of the bucket. True for the first update, and again only if another bucket
    /// of the same name replaced this one.
    pub all: bool,
}

/// A reader of a bucket: call [`KvWatch::next`] in a loop.
#[derive(Debug)]
pub struct KvWatch {
    bucket: KvBucket,
    feed: Option<PushFeed>,
    /// When the bucket was created; another time means another bucket.
    created: Option<i128>,
    /// Whether it follows no other bucket than the first.
    is_strict: bool,
    /// Whether the first update has the deleted rows too.
    has_deleted: bool,
    /// The last logged reason why it cannot be watched.
    said: Option<KvError>,
    /// Rows received that do not complete a state yet.
    rows: Vec<KvRow>,
    /// The revision of the newest row received.
    position: KvRevision,
    /// Rows up to this revision have been handed out.
    handed_out: KvRevision,
    /// Whether all rows have been received once.
    loaded: bool,
    /// The bucket's revision when that load began.
    load_to: KvRevision,
    /// Whether no revision is missing between the last update and `position`.
    gapless: bool,
    /// Whether the row at `position` is the last of its batch.
    ends_batch: bool,
    seen: watch::Sender<KvRevision>,
    pulse: Arc<KvWatchPulse>,
    /// The bucket's revision after the last silence: from here on the watch is current.
    current_from: KvRevision,
}

/// When a watch last heard from JetStream.
#[derive(Debug)]
struct KvWatchPulse {
    /// By [`millis_since_boot`].
    heard_at: AtomicU64,
    /// Whether the watch has caught up with what was written during the last silence.
    caught_up: AtomicBool,
}

impl KvWatchPulse {
    fn note_heard(&self) {
        self.heard_at.store(millis_since_boot(), Ordering::Release);
    }

    fn was_silent(&self) -> bool {
        let silence = millis_since_boot().saturating_sub(self.heard_at.load(Ordering::Acquire));
        u128::from(silence) > KV_WATCH_SILENCE_MAX.as_millis()
    }
}

/// A clock that goes on while the machine is suspended, when the others no longer hear this node either.
fn millis_since_boot() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let (seconds, nanos) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    seconds.unwrap_or_default() * 1_000 + nanos.unwrap_or_default() / 1_000_000
}

/// How far the reader of a watch is. Cheap to clone.
#[derive(Debug, Clone)]
pub struct KvWatchProgress {
    bucket: KvBucket,
    seen: watch::Receiver<KvRevision>,
    pulse: Arc<KvWatchPulse>,
}

impl KvBucket {
    /// Watches all rows of this very bucket: one that replaces it is never read, and while it is in its place the watch
    /// has nothing and is not current.
    pub fn watch_strictly(&self) -> KvWatch {
        KvWatch { is_strict: true, ..self.watch() }
    }

    /// Watches all rows. The first update also has those that are deleted, whose revision a new value has to name.
    pub fn watch_with_deleted(&self) -> KvWatch {
        KvWatch { has_deleted: true, ..self.watch() }
    }

    /// Watches all rows.
    pub fn watch(&self) -> KvWatch {
        KvWatch {
            bucket: self.clone(),
            feed: None,
            created: None,
            is_strict: false,
            has_deleted: false,
            said: None,
            rows: Vec::new(),
            position: 0,
            handed_out: 0,
            loaded: false,
            load_to: 0,
            gapless: true,
            ends_batch: true,
            seen: watch::Sender::new(0),
            pulse: Arc::new(KvWatchPulse {
                heard_at: AtomicU64::new(millis_since_boot()),
                caught_up: AtomicBool::new(false),
            }),
            current_from: 0,
        }
    }
}

impl KvWatch {
    /// A handle that tells other tasks how far the reader is.
    pub fn seen(&self) -> KvWatchProgress {
        KvWatchProgress {
            bucket: self.bucket.clone(),
            seen: self.seen.subscribe(),
            pulse: self.pulse.clone(),
        }
    }

    /// Waits for the next update; the first has all rows. The call confirms that the reader has dealt with
    /// the update before. While NATS is away there is none. Cancel-safe.
    pub async fn next(&mut self) -> KvUpdate {
        if self.loaded {
            self.seen.send_replace(self.handed_out);
        }
        loop {
            if self.loaded && self.feed.is_some() && self.handed_out >= self.current_from {
                self.pulse.caught_up.store(true, Ordering::Release);
            }
            let Some(feed) = &mut self.feed else {
                let mut connections = self.bucket.nats.connections();
                connections.mark_unchanged();
                let begun = tokio::select! {
                    begun = self.begin(connections.clone()) => begun,
                    // The answer that it was waiting for is lost with the connection.
                    _ = connections.changed() => continue,
                };
                match begun {
                    Ok(is_state) => {
                        self.said = None;
                        if is_state {
                            return self.hand_out();
                        }
                    }
                    Err(error) => {
                        if self.said.as_ref() != Some(&error) {
                            tracing::warn!(bucket = self.bucket.name, %error, "the bucket cannot be watched; trying again");
                            self.said = Some(error);
                        }
                        sleep(KV_RETRY_PAUSE).await;
                    }
                }
                continue;
            };
            let event = feed.next().await;
            match self.take_event(event) {
                Some(true) => return self.hand_out(),
                Some(false) => {}
                None => self.feed = None,
            }
        }
    }

    /// Makes a consumer at the watch's position. `true`: no more rows come for now, and the rows at hand are
    /// a state to hand out.
    async fn begin(&mut self, connections: watch::Receiver<u64>) -> Result<bool, KvError> {
        let (bucket, name) = (&self.bucket, &self.bucket.name);
        let info = bucket.stream.get_info().await.map_err(|error| bucket.away_error(&error))?;
        let created = info.created.unix_timestamp_nanos();
        if self.created.is_some_and(|earlier| earlier != created) {
            if self.is_strict {
                self.pulse.caught_up.store(false, Ordering::Release);
                return Err(KvError::Refused(format!("bucket {name}: another one is in its place")));
            }
            tracing::warn!(bucket = name, "another bucket replaced this one; reading all of it");
            (self.position, self.handed_out, self.loaded) = (0, 0, false);
            self.pulse.caught_up.store(false, Ordering::Release);
            self.rows.clear();
        }
        self.created = Some(created);
        if self.pulse.was_silent() {
            self.pulse.caught_up.store(false, Ordering::Release);
        }
        if !self.pulse.caught_up.load(Ordering::Acquire) {
            self.current_from = bucket.end_revisions().await?.0;
        }
        if !self.loaded {
            self.load_to = self.current_from;
        }
        let from = match self.position {
            0 => DeliverPolicy::All,
            position => DeliverPolicy::ByStartSequence { start_sequence: position + 1 },
        };
        let opened = PushFeed::open(&bucket.nats, &bucket.stream, from, connections).await;
        let (feed, info) = opened.map_err(|error| bucket.away_error(&error))?;
        if self.pulse.was_silent() && self.pulse.caught_up.swap(false, Ordering::AcqRel) {
            // What was written meanwhile may have been missed: begin again, and ask where the bucket ends.
            self.pulse.note_heard();
            return Ok(false);
        }
        self.feed = Some(feed);
        self.pulse.note_heard();
        let nothing_more = info.num_pending == 0 && info.delivered.stream_sequence >= self.position;
        let is_due = !self.rows.is_empty() || !self.loaded;
        if nothing_more && !self.loaded && self.position == 0 {
            // An empty bucket may have had rows: the next revision is then not 1.
            self.position = info.delivered.stream_sequence;
        }
        Ok(nothing_more && is_due && self.ends_batch && (self.loaded || self.position >= self.load_to))
    }

    /// Takes what came from the feed. `Some(true)`: the rows at hand are a state to hand out; `None`: the feed
    /// is of no more use.
    fn take_event(&mut self, event: PushEvent) -> Option<bool> {
        // Messages buffered over a silence are old, and would make the watch look current.
        if self.pulse.was_silent() {
            return None;
        }
        let (message, place) = match event {
            PushEvent::Message(message, place) => (message, place),
            PushEvent::Heartbeat => {
                self.pulse.note_heard();
                return Some(false);
            }
            PushEvent::Broken => return None,
        };
        self.pulse.note_heard();
        let AckPlace { sequence: revision, pending, .. } = place;
        // A server that lags behind the previous one starts earlier than it was asked to.
        if revision > self.position {
            let headers = message.headers.as_ref();
            let has = |name: header::HeaderName| headers.is_some_and(|headers| headers.get(name).is_some());
            self.gapless &= revision == self.position + 1;
            self.ends_batch = !has(header::NATS_BATCH_ID) || has(header::NATS_BATCH_COMMIT);
            self.position = revision;
            let value = (!is_deleted(headers)).then(|| message.payload.clone());
            let key = self.bucket.key(&message.subject).to_owned();
            self.rows.push(KvRow { key, value, revision });
        } else if self.rows.is_empty() {
            return Some(false);
        }
        let is_state = match self.loaded {
            true => self.gapless || pending == 0,
            false => pending == 0 && self.position >= self.load_to,
        };
        Some(is_state && self.ends_batch)
    }

    fn hand_out(&mut self) -> KvUpdate {
        let all = !self.loaded;
        (self.loaded, self.gapless, self.handed_out) = (true, true, self.position);
        let mut rows = std::mem::take(&mut self.rows);
        if all && !self.has_deleted {
            rows.retain(|row| row.value.is_some());
        }
        KvUpdate { rows, revision: self.handed_out, all }
    }
}

impl KvWatchProgress {
    /// The revision up to which the reader has dealt with everything.
    pub fn revision(&self) -> KvRevision {
        *self.seen.borrow()
    }

    /// Waits until the reader has dealt with everything written before this call. Returns the bucket's
    /// revision.
    ///
    /// # Errors
    /// [`KvError::Away`] if that takes longer than `limit`, or while NATS is away.
    pub async fn sync(&self, limit: Duration) -> Result<KvRevision, KvError> {
        let until = Instant::now() + limit;
        let reached = async {
            let mut connections = self.bucket.nats.connections();
            loop {
                connections.mark_unchanged();
                let asked = tokio::select! {
                    asked = self.bucket.end_revisions() => asked,
                    _ = connections.changed() => continue,
                };
                match asked {
                    Ok((last, end)) => {
                        self.reach(last).await;
                        return Ok(end);
                    }
                    Err(KvError::Away(_)) => sleep(KV_RETRY_PAUSE).await,
                    Err(error) => return Err(error),
                }
            }
        };
        timeout_at(until, reached).await.unwrap_or_else(|_| Err(self.bucket.silent_error()))
    }

    /// Whether the reader has dealt with everything written until a moment ago. `false` after two seconds of
    /// silence from JetStream, until the reader has caught up.
    pub fn is_current(&self) -> bool {
        self.pulse.caught_up.load(Ordering::Acquire) && !self.pulse.was_silent()
    }

    /// Waits until the reader has dealt with a revision.
    pub async fn reach(&self, revision: KvRevision) {
        let mut seen = self.seen.clone();
        if seen.wait_for(|seen| *seen >= revision).await.is_err() {
            // The watch was dropped: the node is shutting down.
            std::future::pending::<()>().await;
        }
    }
}
