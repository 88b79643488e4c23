//! Retention: the oldest segments go when the log is over its size or they are over their age, but
//! never before storage has what is in them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::segment::Segment;
use crate::config;
use crate::message::{Offset, TimeMicros};

/// How many of the oldest `segments` may go, so that `incoming_bytes` more fit into the budget.
///
/// `stored` is the first offset that storage does not have. The newest segment always stays.
pub(super) fn removable(
    segments: &BTreeMap<Offset, Arc<Segment>>,
    config: &config::Log,
    stored: Offset,
    now: TimeMicros,
    incoming_bytes: u64,
) -> usize {
    let mut bytes: u64 = segments.values().map(|segment| segment.disk_bytes()).sum::<u64>() + incoming_bytes;
    let age_max = i64::try_from(config.retention_s.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
    // A segment ends, in offsets and in time, where the next one begins.
    segments
        .values()
        .zip(segments.values().skip(1))
        .take_while(|(segment, next)| {
            let over_size = bytes > config.retention_bytes;
            let over_age = config.retention_s > 0 && now.saturating_sub(next.created_at) > age_max;
            bytes -= segment.disk_bytes();
            next.first_offset <= stored && (over_size || over_age)
        })
        .count()
}
