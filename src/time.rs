//! Points in time as people read and write them: RFC 3339 in UTC. Internally a time is
//! [`TimeMicros`].
//!
//! In a cluster, how old something is and whether a key has ended is judged by the clock of the servers that all
//! gateways share ([`cluster_micros`]): a gateway whose own clock is wrong would end and remove for all of them.

use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};

use serde::{Serialize, Serializer};

use crate::message::{TimeMicros, now_micros};

/// How far the cluster's clock is ahead of this machine's, in microseconds. A process is in one cluster at most.
static CLUSTER_AHEAD: AtomicI64 = AtomicI64::new(0);

/// Now, by the clock of the cluster's servers; without a cluster, by this machine's.
pub(crate) fn cluster_micros() -> TimeMicros {
    now_micros().saturating_add(CLUSTER_AHEAD.load(Ordering::Relaxed))
}

/// Sets how far the cluster's clock is ahead of this machine's, in microseconds.
pub(crate) fn set_cluster_ahead(micros: i64) {
    CLUSTER_AHEAD.store(micros, Ordering::Relaxed);
}

/// A point in time, shown as RFC 3339 in UTC with six fraction digits:
/// `2026-11-23T09:28:39.000120Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rfc3339(pub TimeMicros);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = jiff::Timestamp::from_microsecond(self.0).unwrap_or(if self.0 < 0 {
            jiff::Timestamp::MIN
        } else {
            jiff::Timestamp::MAX
        });
        write!(f, "{time:.6}")
    }
}

impl Serialize for Rfc3339 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Reads an RFC 3339 time with any offset; digits below a microsecond are cut off. `None` for
/// any other text.
pub fn parse_time(text: &str) -> Option<TimeMicros> {
    let time: jiff::Timestamp = text.parse().ok()?;
    Some(time.as_microsecond())
}
