//! What each datasource sends, for the metrics. Every datasource counts by itself ([`DatasourceTraffic`], which lives and
//! dies with its incarnation); the busiest of them have series of their own, and all the others one together
//! ([`TrafficBoard`]).
//!
//! A batch costs two additions for each datasource in it, and a look-up without a lock.

mod board;
#[cfg(test)]
mod model;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use crate::message::{DatasourceId, TimeMicros};

pub use board::TrafficBoard;

/// Counts of one datasource, or of all together: since the start, or a part of that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TrafficCounts {
    /// Messages that were let in.
    pub messages: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// Messages and connections that were refused.
    pub refused: u64,
}

impl TrafficCounts {
    fn zip(self, other: Self, with: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            messages: with(self.messages, other.messages),
            bytes: with(self.bytes, other.bytes),
            refused: with(self.refused, other.refused),
        }
    }

    fn plus(self, other: Self) -> Self {
        self.zip(other, u64::saturating_add)
    }

    fn minus(self, other: Self) -> Self {
        self.zip(other, u64::saturating_sub)
    }

    fn max(self, other: Self) -> Self {
        self.zip(other, u64::max)
    }
}

/// What one incarnation of a datasource has sent to this gateway since its start.
#[derive(Debug, Default)]
pub struct DatasourceTraffic {
    messages: AtomicU64,
    bytes: AtomicU64,
    refused: AtomicU64,
    last_at: AtomicI64,
    /// What follows is the board's alone. What its own series had shown when it lost it.
    shown: [AtomicU64; 3],
    /// Whether something that it sent was counted among the others.
    is_among_others: AtomicBool,
    /// Its messages when the board last compared all datasources.
    compared: AtomicU64,
}

impl DatasourceTraffic {
    /// Counts messages that were let in, received at `at`.
    pub fn count(&self, messages: u64, bytes: u64, at: TimeMicros) {
        self.messages.fetch_add(messages, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        // Not `fetch_max`: two batches that end at once may leave the earlier time, by the length of a commit.
        if self.last_at.load(Ordering::Relaxed) < at {
            self.last_at.store(at, Ordering::Relaxed);
        }
    }

    /// Counts one refusal.
    pub fn count_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    fn counts(&self) -> TrafficCounts {
        TrafficCounts {
            messages: self.messages.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }

    /// When its last message was received, if there was one.
    fn last_at(&self) -> Option<TimeMicros> {
        Some(self.last_at.load(Ordering::Relaxed)).filter(|at| *at != 0)
    }

    fn shown(&self) -> TrafficCounts {
        let [messages, bytes, refused] = self.shown.each_ref().map(|part| part.load(Ordering::Relaxed));
        TrafficCounts { messages, bytes, refused }
    }

    fn set_shown(&self, counts: TrafficCounts) {
        let TrafficCounts { messages, bytes, refused } = counts;
        for (part, count) in self.shown.iter().zip([messages, bytes, refused]) {
            part.store(count, Ordering::Relaxed);
        }
    }
}

/// Where the board finds the datasources.
pub trait TrafficSource {
    /// Calls `each` with every datasource that has sent anything.
    fn visit(&self, each: &mut dyn FnMut(&DatasourceId, &Arc<DatasourceTraffic>));

    /// The present incarnation of one, if there is one that has sent anything.
    fn find(&self, datasource: &DatasourceId) -> Option<Arc<DatasourceTraffic>>;
}
