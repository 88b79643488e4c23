//! The tail: the newest batches, in memory. It serves consumers that keep up, and they wait on it for
//! the next batch.

use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::batch::Batch;
use crate::limits::TAIL_BYTES_MAX;
use crate::message::Offset;
use crate::scheduler::{is_lowered, polite_lock};

/// How often a thread of low priority that waits looks for itself.
const SLOW_LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The newest durable batches and the offset behind them.
pub(super) struct Tail {
    recent: Mutex<RecentBatches>,
    grown: Condvar,
    /// What threads of low priority wait for: they take `recent` only when it is free.
    grown_slowly: (Mutex<()>, Condvar),
    next_offset: watch::Sender<Offset>,
}

struct RecentBatches {
    batches: VecDeque<Batch>,
    bytes: usize,
    next_offset: Offset,
}

impl Tail {
    /// An empty tail of a log whose next record gets `next_offset`.
    pub(super) fn new(next_offset: Offset) -> Self {
        Self {
            recent: Mutex::new(RecentBatches { batches: VecDeque::new(), bytes: 0, next_offset }),
            grown: Condvar::new(),
            grown_slowly: (Mutex::new(()), Condvar::new()),
            next_offset: watch::Sender::new(next_offset),
        }
    }

    /// Everything below this offset is durable.
    pub(super) fn next_offset(&self) -> Offset {
        *self.next_offset.borrow()
    }

    /// Watches [`Tail::next_offset`].
    pub(super) fn subscribe(&self) -> watch::Receiver<Offset> {
        self.next_offset.subscribe()
    }

    /// Adds a durable batch; the oldest batches make room for it.
    pub(super) fn push(&self, batch: Batch) {
        let next_offset = batch.next_offset();
        let mut recent = self.locked();
        recent.bytes += batch.weight();
        recent.batches.push_back(batch);
        // Freed when the lock is free again.
        let mut oldest = Vec::new();
        while recent.bytes > TAIL_BYTES_MAX && recent.batches.len() > 1 {
            if let Some(batch) = recent.batches.pop_front() {
                recent.bytes -= batch.weight();
                oldest.push(batch);
            }
        }
        recent.next_offset = next_offset;
        drop(recent);
        self.grown.notify_all();
        self.next_offset.send_replace(next_offset);
        self.grown_slowly.1.notify_all();
    }

    /// Batches, starting with the one that holds `from`: up to about `bytes_max` bytes, at least one
    /// batch; empty at the end. `None` if `from` is older than the batches in memory.
    pub(super) fn read(&self, from: Offset, bytes_max: usize) -> Option<Vec<Batch>> {
        let recent = self.locked();
        if from >= recent.next_offset {
            return Some(Vec::new());
        }
        let first = recent.batches.front()?.first_offset();
        if from < first {
            return None;
        }
        let at = recent.batches.partition_point(|batch| batch.next_offset() <= from);
        let mut bytes = 0;
        let wanted = recent.batches.range(at..).take_while(|batch| {
            let take = bytes == 0 || bytes + batch.weight() <= bytes_max;
            bytes += batch.weight().max(1);
            take
        });
        Some(wanted.cloned().collect())
    }

    /// Blocks until there is a record at `offset`, or `timeout` is over.
    pub(super) fn wait(&self, offset: Offset, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        if is_lowered() {
            return self.wait_slowly(offset, deadline);
        }
        let mut recent = self.locked();
        while recent.next_offset <= offset {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            self.grown.wait_for(&mut recent, left);
        }
    }

    fn wait_slowly(&self, offset: Offset, deadline: Instant) {
        let (mutex, grown) = &self.grown_slowly;
        let mut nothing = mutex.lock();
        while self.next_offset() <= offset {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            // Who tells does not take the lock, so that the word may come right before this.
            grown.wait_for(&mut nothing, left.min(SLOW_LOOK_INTERVAL));
        }
    }

    fn locked(&self) -> MutexGuard<'_, RecentBatches> {
        polite_lock(&self.recent)
    }
}
