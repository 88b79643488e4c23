//! How far egress is, and what it could not send.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tracing::warn;

use crate::message::{Offset, RecordRef};

/// How often records that cannot be sent are logged, at most.
const EGRESS_REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// The position of egress and its counts since the start.
#[derive(Default)]
pub struct EgressCounts {
    pub(super) cursor: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) skipped: [AtomicU64; 3],
}

/// Why a record is not on the stream, other than that it is in quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EgressSkipReason {
    /// Its topic is no valid subject.
    Topic,
    /// It is larger than NATS takes.
    Size,
    /// The log removed it before NATS could take it.
    Gone,
}

impl EgressSkipReason {
    /// All of them.
    pub const ALL: [EgressSkipReason; 3] =
        [EgressSkipReason::Topic, EgressSkipReason::Size, EgressSkipReason::Gone];

    /// The lower-case name, as in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            EgressSkipReason::Topic => "topic",
            EgressSkipReason::Size => "size",
            EgressSkipReason::Gone => "gone",
        }
    }
}

impl EgressCounts {
    /// The first offset that is not on the stream yet.
    pub fn cursor(&self) -> Offset {
        self.cursor.load(Ordering::Acquire)
    }

    /// Records that were sent and stored.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Records that will not be on the stream, for this reason.
    pub fn skipped(&self, why: EgressSkipReason) -> u64 {
        self.skipped[why as usize].load(Ordering::Relaxed)
    }
}

/// Records that could not be sent since the last report.
#[derive(Default)]
pub(super) struct EgressSkipReport {
    records: u64,
    /// One of them.
    example: String,
    said_at: Option<Instant>,
    /// The newest offset that was counted.
    pub(super) seen: Option<Offset>,
}

impl EgressSkipReport {
    pub(super) fn add(&mut self, record: &RecordRef<'_>, why: String) {
        if self.records == 0 {
            self.example.clear();
            let RecordRef { offset, datasource, topic, .. } = record;
            // Writing to a string does not fail.
            let _ = write!(self.example, "{datasource} {topic:?} at offset {offset}: {why}");
        }
        self.records += 1;
    }

    /// Logs what could not be sent, at most once a minute.
    pub(super) fn warn_if_due(&mut self) {
        if self.records > 0 && self.said_at.is_none_or(|at| at.elapsed() >= EGRESS_REPORT_INTERVAL) {
            let (records, example) = (self.records, &self.example);
            warn!(records, example, "records cannot go to the stream on NATS");
            self.records = 0;
            self.said_at = Some(Instant::now());
        }
    }
}
