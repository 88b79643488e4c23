//! All streams that are open, and those of one connection: who tells them to end, and sees that a client takes nothing.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::time::MissedTickBehavior;

use super::reader::{StreamEnd, StreamReader};
use crate::limits::{STREAM_END_WAIT_MAX, STREAM_STILL};
use crate::log::WithheldRules;

/// How often it is looked at who takes nothing.
const STREAM_LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The streams that are open.
pub(in super::super) struct StreamReaders {
    began: Instant,
    next: AtomicU64,
    heartbeat: Duration,
    /// How long a client may take nothing.
    still_max: Duration,
    open: Mutex<HashMap<u64, Weak<StreamReader>>>,
}

impl StreamReaders {
    /// None yet, of which each is sent a heartbeat so often, and closed if its client takes nothing for `still_max`.
    pub(in super::super) fn new(heartbeat: Duration, still_max: Duration) -> Arc<Self> {
        let (began, next, open) = (Instant::now(), AtomicU64::new(0), Mutex::default());
        Arc::new(Self { began, next, heartbeat, still_max, open })
    }

    /// Milliseconds since it was made.
    pub(super) fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// A number for a new stream.
    pub(super) fn next_number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn enter(&self, number: u64, reader: &Arc<StreamReader>) {
        self.open.lock().insert(number, Arc::downgrade(reader));
    }

    pub(super) fn leave(&self, number: u64) {
        let mut open = self.open.lock();
        open.remove(&number);
        if open.capacity() > 4 * open.len() + 1_024 {
            open.shrink_to_fit();
        }
    }

    /// How many there are, and how many of them have clients that take nothing.
    pub(in super::super) fn counts(&self) -> (usize, usize) {
        let (readers, now_ms) = (self.readers(), self.now_ms());
        let is_still = |reader: &&Arc<StreamReader>| {
            reader.standing(now_ms, self.heartbeat).still >= STREAM_STILL.min(self.heartbeat)
        };
        (readers.len(), readers.iter().filter(is_still).count())
    }

    /// Whether a stream that ends has ended because nothing was taken of it: its socket may say so first.
    pub(super) fn is_left_lying(&self, reader: &StreamReader) -> bool {
        reader.standing(self.now_ms(), self.heartbeat).still >= self.still_max / 2
    }

    /// Ends streams with their datasources, and those of which nothing is taken.
    pub(in super::super) async fn watch(&self, withheld: &WithheldRules) -> Infallible {
        let mut changes = withheld.listen();
        let mut look = tokio::time::interval(STREAM_LOOK_INTERVAL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = look.tick() => {}
                // The rules are there as long as the log.
                _ = changes.changed() => {}
            }
            let (left_out, now_ms) = (withheld.now(), self.now_ms());
            for reader in self.readers() {
                if !left_out.is_nothing() && left_out.has_ended(reader.scope()) {
                    reader.tell(StreamEnd::DatasourceDeleted);
                }
                let standing = reader.standing(now_ms, self.heartbeat);
                if standing.still > self.still_max {
                    reader.give_up(StreamEnd::NotRead);
                } else if standing.told.is_some_and(|since| since > STREAM_END_WAIT_MAX) {
                    reader.give_up(reader.told().unwrap_or(StreamEnd::NotRead));
                }
            }
        }
    }

    fn readers(&self) -> Vec<Arc<StreamReader>> {
        self.open.lock().values().filter_map(Weak::upgrade).collect()
    }
}

/// The streams of one connection, which end with it.
#[derive(Default)]
pub(in super::super) struct ConnectionStreams(Mutex<OpenStreams>);

#[derive(Default)]
struct OpenStreams {
    /// Why the connection has to close, if it has to.
    closed: Option<StreamEnd>,
    readers: Vec<(u64, Weak<StreamReader>)>,
}

impl ConnectionStreams {
    pub(super) fn enter(&self, number: u64, reader: &Arc<StreamReader>) {
        let mut open = self.0.lock();
        open.readers.push((number, Arc::downgrade(reader)));
        let closed = open.closed;
        drop(open);
        if let Some(why) = closed {
            reader.tell(why);
        }
    }

    pub(super) fn leave(&self, number: u64) {
        self.0.lock().readers.retain(|(of, _)| *of != number);
    }

    /// Has all of them say soon that they are there: a client that has gone answers that with a reset.
    pub(in super::super) fn probe(&self) {
        let open = self.0.lock();
        let readers: Vec<_> = open.readers.iter().filter_map(|(_, reader)| reader.upgrade()).collect();
        drop(open);
        readers.iter().for_each(|reader| reader.probe());
    }

    /// Tells all to end, and those that begin later.
    pub(in super::super) fn close(&self, is_drain: bool) {
        let why = if is_drain { StreamEnd::ShuttingDown } else { StreamEnd::ConnectionCloses };
        let mut open = self.0.lock();
        open.closed = Some(why);
        let readers: Vec<_> = open.readers.iter().filter_map(|(_, reader)| reader.upgrade()).collect();
        drop(open);
        readers.iter().for_each(|reader| reader.tell(why));
    }
}
