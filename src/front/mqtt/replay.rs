//! Replay: the user properties `from-offset`, `from-time` and `tail` make a SUBSCRIBE begin in the past.

use std::collections::VecDeque;

use crate::consume::render;
use crate::filter::TopicFilter;
use crate::limits::{TAIL_READ_BYTES, TAIL_RECORDS_MAX};
use crate::log::{Log, LogReadError};
use crate::message::{DatasourceId, Offset, RecordRef, TimeMicros};

/// Where in the past a subscription begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReplayStart {
    Offset(Offset),
    Time(TimeMicros),
    /// The last so many matching records.
    Tail(u64),
}

impl ReplayStart {
    /// Where the user properties of a SUBSCRIBE say that it begins; `None` if they say nothing.
    ///
    /// # Errors
    /// The words for the client, if they cannot be read or contradict each other.
    pub(super) fn parse<'a>(
        properties: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<Option<Self>, &'static str> {
        let mut replay = None;
        for (name, value) in properties {
            let parsed = match name {
                "from-offset" => Self::Offset(value.parse().map_err(|_| "from-offset is a whole number")?),
                "from-time" => Self::Time(
                    render::parse_time(value)
                        .ok_or("from-time is an RFC 3339 time such as 2026-11-23T09:00:00Z")?,
                ),
                "tail" => Self::Tail(value.parse().map_err(|_| "tail is a number of records")?),
                _ => continue,
            };
            if replay.replace(parsed).is_some() {
                return Err("give only one of from-offset, from-time and tail");
            }
        }
        Ok(replay)
    }

    /// The offset at which the replay begins. Blocks on the disk.
    ///
    /// # Errors
    /// The log cannot be read.
    pub(super) fn find_offset(
        self,
        log: &dyn Log,
        datasource: &DatasourceId,
        filter: &TopicFilter,
    ) -> Result<Offset, LogReadError> {
        match self {
            // Records that retention has removed are reported to the client as skipped.
            Self::Offset(offset) => Ok(offset.min(log.next_offset())),
            Self::Time(time) => offset_of_time(log, time),
            Self::Tail(0) => Ok(log.next_offset()),
            Self::Tail(wanted) => offset_of_tail(log, datasource, filter, wanted.min(TAIL_RECORDS_MAX)),
        }
    }
}

/// The offset of the first record received at or after `time`.
fn offset_of_time(log: &dyn Log, time: TimeMicros) -> Result<Offset, LogReadError> {
    let end = log.next_offset();
    // `offset_at` is only close to the record, and never behind it: the scan begins there.
    let mut offset = log.offset_at(time)?.max(log.first_offset());
    loop {
        let batches = log.read(offset, TAIL_READ_BYTES)?;
        let Some(last) = batches.last() else { return Ok(end) };
        let records = batches.iter().flat_map(|batch| batch.records());
        let found = records.into_iter().find(|r| r.offset >= offset && r.received_at >= time);
        match found {
            Some(record) => return Ok(record.offset),
            None => offset = last.next_offset(),
        }
    }
}

/// The offset of the first of the last `wanted` records that match.
fn offset_of_tail(
    log: &dyn Log,
    datasource: &DatasourceId,
    filter: &TopicFilter,
    wanted: u64,
) -> Result<Offset, LogReadError> {
    let (first, end) = (log.first_offset(), log.next_offset());
    let left_out = log.withheld().now();
    let matches = |record: &RecordRef<'_>| match datasource.is_all() {
        _ if left_out.contains(record) => false,
        true => filter.matches(&format!("{}/{}", record.datasource, record.topic)),
        false => record.datasource == datasource.as_str() && filter.matches(record.topic),
    };
    // Doubles the distance until enough records match or the log's beginning is reached.
    let mut back = wanted.max(1024);
    loop {
        let begin = end.saturating_sub(back).max(first);
        let mut newest = VecDeque::new();
        let mut offset = begin;
        while offset < end {
            let batches = log.read(offset, TAIL_READ_BYTES)?;
            let Some(last) = batches.last() else { break };
            for record in batches.iter().flat_map(|batch| batch.records()) {
                if (offset..end).contains(&record.offset) && matches(&record) {
                    newest.push_back(record.offset);
                    if newest.len() as u64 > wanted {
                        newest.pop_front();
                    }
                }
            }
            offset = last.next_offset();
        }
        if newest.len() as u64 == wanted || begin == first {
            return Ok(newest.front().copied().unwrap_or(end));
        }
        back = back.saturating_mul(2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replay_begins_at_one_place() {
        let parse = |pairs: &[(&'static str, &'static str)]| ReplayStart::parse(pairs.iter().copied());
        assert_eq!(parse(&[("colour", "red")]), Ok(None));
        assert_eq!(parse(&[("from-offset", "41")]), Ok(Some(ReplayStart::Offset(41))));
        assert_eq!(parse(&[("from-time", "1970-01-01T00:00:01Z")]), Ok(Some(ReplayStart::Time(1_000_000))));
        assert_eq!(parse(&[("tail", "10")]), Ok(Some(ReplayStart::Tail(10))));
        for bad in [
            &[("from-offset", "-1")][..],
            &[("from-time", "noon")],
            &[("tail", "")],
            &[("tail", "1"), ("from-offset", "1")],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
