//! Watching a bucket: all of its rows, and then every change, in order and without a gap, whatever becomes
//! of the connection meanwhile.
//!
//! JetStream pushes the bucket's stream from where this watch is. A message that is missing, a silence
//! longer than its heartbeats, or a new connection make it begin again there. Since only the newest value
//! of a row is kept, what was overwritten meanwhile is left out; that is why rows come in [`Update`]s, each
//! of which takes the reader from one state that the bucket had to a later one. A batch is never torn.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::{self};
use async_nats::{StatusCode, Subscriber, header};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{Bucket, KvError, PAUSE, Revision, Row, is_deleted};
use crate::presence::{self, BEAT};
use crate::pushed::{self, SILENCE_MAX};

/// The silence after which a watch may be behind. The others of a cluster wait longer for a node that
/// is silent: who is told that all have heard of a change can rely on it.
const CURRENT_MAX: Duration = Duration::from_secs(2);
const _: () = assert!(CURRENT_MAX.as_millis() + BEAT.as_millis() <= presence::SILENCE_MAX.as_millis());

/// A step from one state of the bucket to a later one.
#[derive(Debug)]
pub struct Update {
    /// The rows that are different now, oldest first.
    pub rows: Vec<Row>,
    /// How far the bucket is with them.
    pub revision: Revision,
    /// These are all rows that there are: what is not among them is not there. The first update is one,
    /// and another comes only if the bucket was replaced by another one of its name.
    pub all: bool,
}

/// A reader of a bucket: call [`Watch::next`] in a loop.
#[derive(Debug)]
pub struct Watch {
    bucket: Bucket,
    feed: Option<Feed>,
    /// When the bucket was made that is being read.
    created: Option<i128>,
    /// Rows that do not make up a state yet.
    rows: Vec<Row>,
    /// The newest row that came in.
    position: Revision,
    /// Up to here they have been handed out.
    handed_out: Revision,
    /// Whether all rows have come in once.
    loaded: bool,
    /// Where the bucket was when that began.
    load_to: Revision,
    /// Whether no revision is missing between the last update and `position`.
    gapless: bool,
    /// Whether the row at `position` is the last of its batch.
    ends_batch: bool,
    seen: watch::Sender<Revision>,
    pulse: Arc<Pulse>,
    /// Where the bucket was after the last silence.
    current_from: Revision,
}

/// When a watch has last heard something.
#[derive(Debug)]
struct Pulse {
    began: Instant,
    /// In milliseconds since then.
    heard_at: AtomicU64,
    /// Whether it knows what was written while it was silent.
    caught_up: AtomicBool,
}

impl Pulse {
    fn heard(&self) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard_at.store(now, Ordering::Release);
    }

    fn was_silent(&self) -> bool {
        let silence = self.began.elapsed().as_millis();
        silence.saturating_sub(self.heard_at.load(Ordering::Acquire).into()) > CURRENT_MAX.as_millis()
    }
}

/// One push consumer.
#[derive(Debug)]
struct Feed {
    messages: Subscriber,
    /// How many it has delivered.
    delivered: u64,
    connections: watch::Receiver<u64>,
}

/// How far a watch's reader is.
#[derive(Debug, Clone)]
pub struct Seen {
    bucket: Bucket,
    seen: watch::Receiver<Revision>,
    pulse: Arc<Pulse>,
}

impl Bucket {
    /// Watches all rows.
    pub fn watch(&self) -> Watch {
        Watch {
            bucket: self.clone(),
            feed: None,
            created: None,
            rows: Vec::new(),
            position: 0,
            handed_out: 0,
            loaded: false,
            load_to: 0,
            gapless: true,
            ends_batch: true,
            seen: watch::Sender::new(0),
            pulse: Arc::new(Pulse {
                began: Instant::now(),
                heard_at: AtomicU64::new(0),
                caught_up: AtomicBool::new(false),
            }),
            current_from: 0,
        }
    }
}

impl Watch {
    /// For those who want to know how far the reader is.
    pub fn seen(&self) -> Seen {
        Seen { bucket: self.bucket.clone(), seen: self.seen.subscribe(), pulse: self.pulse.clone() }
    }

    /// The next update, when there is one; the first has all rows. To ask for it says that the one before
    /// has been dealt with. While NATS is away there is none. May be dropped and called again.
    pub async fn next(&mut self) -> Update {
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
                    // Whatever it was waiting for has been lost.
                    _ = connections.changed() => continue,
                };
                match begun {
                    Ok(true) => return self.hand_out(),
                    Ok(false) => {}
                    Err(error) => {
                        tracing::warn!(bucket = self.bucket.name, %error, "the bucket cannot be watched; trying again");
                        sleep(PAUSE).await;
                    }
                }
                continue;
            };
            let message = tokio::select! {
                message = timeout(SILENCE_MAX, feed.messages.next()) => message.ok().flatten(),
                _ = feed.connections.changed() => None,
            };
            let is_whole = match message {
                Some(message) => self.take(message).await,
                None => None,
            };
            match is_whole {
                Some(true) => return self.hand_out(),
                Some(false) => {}
                None => self.feed = None,
            }
        }
    }

    /// Begins to listen from where this watch is. `true`: there is nothing more, and what there was is yet
    /// to be handed out.
    async fn begin(&mut self, connections: watch::Receiver<u64>) -> Result<bool, KvError> {
        let (bucket, name) = (&self.bucket, &self.bucket.name);
        let away = |text: String| KvError::Away(format!("bucket {name}: {text}"));
        let info = bucket.stream.get_info().await.map_err(|error| away(error.to_string()))?;
        let created = info.created.unix_timestamp_nanos();
        if self.created.is_some_and(|earlier| earlier != created) {
            tracing::warn!(bucket = name, "the bucket was replaced by another one: reading all of it");
            (self.position, self.handed_out, self.loaded) = (0, 0, false);
            self.pulse.caught_up.store(false, Ordering::Release);
            self.rows.clear();
        }
        self.created = Some(created);
        if self.pulse.was_silent() {
            self.pulse.caught_up.store(false, Ordering::Release);
        }
        if !self.pulse.caught_up.load(Ordering::Acquire) {
            self.current_from = bucket.end().await?.0;
        }
        if !self.loaded {
            self.load_to = self.current_from;
        }
        let client = bucket.nats.client();
        let inbox = client.new_inbox();
        let messages = client.subscribe(inbox.clone()).await.map_err(|error| away(error.to_string()))?;
        let from = match self.position {
            0 => DeliverPolicy::All,
            position => DeliverPolicy::ByStartSequence { start_sequence: position + 1 },
        };
        let config = pushed::consumer(inbox, from);
        let consumer =
            bucket.stream.create_consumer(config).await.map_err(|error| away(error.to_string()))?;
        let info = consumer.cached_info();
        self.feed = Some(Feed { messages, delivered: 0, connections });
        self.pulse.heard();
        let nothing_more = info.num_pending == 0 && info.delivered.stream_sequence >= self.position;
        let is_due = !self.rows.is_empty() || !self.loaded;
        if nothing_more && !self.loaded && self.position == 0 {
            // An empty bucket may have had rows: then the next one is not its first.
            self.position = info.delivered.stream_sequence;
        }
        Ok(nothing_more && is_due && self.ends_batch && (self.loaded || self.position >= self.load_to))
    }

    /// Takes a message. `Some(true)`: what came in is whole now; `None`: this consumer is of no more use.
    async fn take(&mut self, message: async_nats::Message) -> Option<bool> {
        // After a silence what comes first is old.
        if self.pulse.was_silent() {
            return None;
        }
        let feed = self.feed.as_mut()?;
        self.pulse.heard();
        if message.status == Some(StatusCode::IDLE_HEARTBEAT) {
            if let Some(reply) = pushed::flow_reply(&message) {
                self.bucket.nats.client().publish(reply, Bytes::new()).await.ok()?;
                return Some(false);
            }
            let last = message.headers.as_ref()?.get(header::NATS_LAST_CONSUMER)?;
            return (last.as_str().parse() == Ok(feed.delivered)).then_some(false);
        }
        if message.status.is_some() {
            return None;
        }
        let message = jetstream::Message { message, context: self.bucket.context.clone() };
        let (revision, pending) = {
            let info = message.info().ok()?;
            if info.consumer_sequence != feed.delivered + 1 {
                return None;
            }
            (info.stream_sequence, info.pending)
        };
        feed.delivered += 1;
        // A server that is behind the one before begins earlier than it was asked to.
        if revision > self.position {
            let headers = message.message.headers.as_ref();
            let has = |name: header::HeaderName| headers.is_some_and(|headers| headers.get(name).is_some());
            self.gapless &= revision == self.position + 1;
            self.ends_batch = !has(header::NATS_BATCH_ID) || has(header::NATS_BATCH_COMMIT);
            self.position = revision;
            let value = (!is_deleted(headers)).then(|| message.message.payload.clone());
            let key = self.bucket.key(&message.message.subject).to_owned();
            self.rows.push(Row { key, value, revision });
        } else if self.rows.is_empty() {
            return Some(false);
        }
        let is_state = match self.loaded {
            true => self.gapless || pending == 0,
            false => pending == 0 && self.position >= self.load_to,
        };
        Some(is_state && self.ends_batch)
    }

    fn hand_out(&mut self) -> Update {
        let all = !self.loaded;
        (self.loaded, self.gapless, self.handed_out) = (true, true, self.position);
        let mut rows = std::mem::take(&mut self.rows);
        if all {
            rows.retain(|row| row.value.is_some());
        }
        Update { rows, revision: self.handed_out, all }
    }
}

impl Seen {
    /// Waits until the reader has dealt with everything that was written before this was called. Returns
    /// how far the bucket was.
    ///
    /// # Errors
    /// [`KvError::Away`] if that takes longer than `limit`, or NATS is away.
    pub async fn sync(&self, limit: Duration) -> Result<Revision, KvError> {
        let until = Instant::now() + limit;
        let reached = async {
            let mut connections = self.bucket.nats.connections();
            loop {
                connections.mark_unchanged();
                let asked = tokio::select! {
                    asked = self.bucket.end() => asked,
                    _ = connections.changed() => continue,
                };
                match asked {
                    Ok((last, end)) => {
                        self.reach(last).await;
                        return Ok(end);
                    }
                    Err(KvError::Away(_)) => sleep(PAUSE).await,
                    Err(error) => return Err(error),
                }
            }
        };
        timeout_at(until, reached).await.unwrap_or_else(|_| Err(self.bucket.away()))
    }

    /// Whether the reader has dealt with whatever was written until a moment ago. `false` while JetStream has
    /// been silent for two seconds, and then until the reader has caught up.
    pub fn is_current(&self) -> bool {
        self.pulse.caught_up.load(Ordering::Acquire) && !self.pulse.was_silent()
    }

    /// Returns when the reader has dealt with a revision.
    pub async fn reach(&self, revision: Revision) {
        let mut seen = self.seen.clone();
        if seen.wait_for(|seen| *seen >= revision).await.is_err() {
            // Whoever watched has gone, and the node with it.
            std::future::pending::<()>().await;
        }
    }
}
