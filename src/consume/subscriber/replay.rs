//! Replay: `from-offset`, `from-time` and `tail` make a subscription begin in the past, whether they are the user
//! properties of a SUBSCRIBE or the parameters of a stream over HTTP.

use std::collections::VecDeque;

use super::Subscribers;
use crate::filter::TopicFilter;
use crate::limits::{REPLAYS_PER_TENANT_MAX, TAIL_READ_BYTES, TAIL_RECORDS_MAX};
use crate::log::{AppendError, Log, LogReadError};
use crate::message::{DatasourceId, Offset, RecordRef, TimeMicros};
use crate::processor::spawn_reading;
use crate::shares::ShareCount;
use crate::time::parse_time;

/// Where in the past a subscription begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplayStart {
    /// At this record.
    Offset(Offset),
    /// At the first record received at or after this time.
    Time(TimeMicros),
    /// The last so many matching records.
    Tail(u64),
}

impl std::fmt::Display for ReplayStart {
    /// As it is kept with its subscription.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Offset(offset) => write!(f, "from-offset {offset}"),
            Self::Time(time) => write!(f, "from-time {time}"),
            Self::Tail(records) => write!(f, "tail {records}"),
        }
    }
}

impl ReplayStart {
    /// Where the properties of a subscription say that it begins; `None` if they say nothing.
    ///
    /// # Errors
    /// The words for the client, if they cannot be read or contradict each other.
    pub fn parse<'a>(
        properties: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<Option<Self>, &'static str> {
        let mut replay = None;
        for (name, value) in properties {
            let parsed = match name {
                "from-offset" => Self::Offset(value.parse().map_err(|_| "from-offset is a whole number")?),
                "from-time" => Self::Time(
                    parse_time(value).ok_or("from-time is an RFC 3339 time such as 2026-11-23T09:00:00Z")?,
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
}

/// Why the beginning of a replay was not found.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// As many subscriptions of the tenant look for theirs as may at once.
    #[error(
        "datasource {0} searches the log for {REPLAYS_PER_TENANT_MAX} subscriptions already that begin in the past"
    )]
    TooMany(DatasourceId),
    /// The log cannot be asked how far it is.
    #[error(transparent)]
    Away(#[from] AppendError),
    /// The log cannot be read.
    #[error(transparent)]
    Read(#[from] LogReadError),
    /// The gateway ends.
    #[error(transparent)]
    Ended(#[from] tokio::task::JoinError),
}

impl Subscribers {
    /// The offset at which a replay of a tenant's records begins that pass the filter: of those of a datasource, or of
    /// all (`*`), where the filter names it. Never behind the log's end, and where retention has removed it, so that the feed
    /// says how much. Ends at once when it is dropped, but for a read under way.
    ///
    /// A time or a number of records is searched for: a few searches at a time, each read in a turn of the tenant's share.
    ///
    /// # Errors
    /// [`ReplayError`].
    pub async fn find_replay_start(
        &self,
        tenant: &DatasourceId,
        filter: &TopicFilter,
        start: ReplayStart,
    ) -> Result<Offset, ReplayError> {
        // In a cluster other gateways may have appended records that this one has not followed yet.
        let reaches = if let ReplayStart::Offset(offset) = start { offset } else { Offset::MAX };
        self.log.catch_up(reaches).await?;
        if let ReplayStart::Offset(offset) = start {
            return Ok(offset.min(self.log.next_offset()));
        }
        let share = self.shares.share(tenant);
        let mut charge = share.charge();
        let charged = charge.try_add(ShareCount::Replays, 1, REPLAYS_PER_TENANT_MAX);
        charged.map_err(|_| ReplayError::TooMany(tenant.clone()))?;
        let _searching = share.clone().replay_turn().await;
        let mut search = ReplaySearch::new(start, &*self.log, tenant.clone(), filter.clone());
        loop {
            let (turn, log) = (share.clone().read_turn().await, self.log.clone());
            let step = spawn_reading(move || {
                let _turn = turn;
                let found = search.step(&*log);
                (search, found)
            });
            let (continued, found) = step.await?;
            if let Some(offset) = found? {
                return Ok(offset);
            }
            search = continued;
        }
    }
}

/// The search for the offset at which a replay begins, one read of the log at a time.
struct ReplaySearch {
    datasource: DatasourceId,
    filter: TopicFilter,
    /// The end of the log when the search began.
    end: Offset,
    stage: SearchStage,
}

enum SearchStage {
    Begin(ReplayStart),
    /// Looks for the first record received at or after the time, from the offset on.
    Time(TimeMicros, Offset),
    Tail(TailSearch),
}

/// Looks for the last so many matching records, further and further back.
struct TailSearch {
    wanted: u64,
    /// How far back it looks.
    back: u64,
    begin: Offset,
    /// Everything from the beginning to here is looked at.
    offset: Offset,
    /// The last matching records of those.
    newest: VecDeque<Offset>,
}

impl TailSearch {
    fn looking_back(wanted: u64, back: u64, log: &dyn Log, end: Offset) -> Self {
        let begin = end.saturating_sub(back).max(log.first_offset());
        Self { wanted, back, begin, offset: begin, newest: VecDeque::new() }
    }
}

impl ReplaySearch {
    /// A search in what the log has now.
    fn new(start: ReplayStart, log: &dyn Log, datasource: DatasourceId, filter: TopicFilter) -> Self {
        Self { datasource, filter, end: log.next_offset(), stage: SearchStage::Begin(start) }
    }

    /// Goes on with the search, for one read of the log at most, on which it blocks. Returns the offset once it
    /// is found.
    ///
    /// # Errors
    /// The log cannot be read.
    fn step(&mut self, log: &dyn Log) -> Result<Option<Offset>, LogReadError> {
        match &mut self.stage {
            // Records that retention has removed are reported to the client as skipped.
            SearchStage::Begin(ReplayStart::Offset(offset)) => return Ok(Some((*offset).min(self.end))),
            SearchStage::Begin(ReplayStart::Tail(0)) => return Ok(Some(self.end)),
            SearchStage::Begin(ReplayStart::Tail(wanted)) => {
                let wanted = (*wanted).min(TAIL_RECORDS_MAX);
                let search = TailSearch::looking_back(wanted, wanted.max(1024), log, self.end);
                self.stage = SearchStage::Tail(search);
            }
            SearchStage::Begin(ReplayStart::Time(time)) => {
                // `offset_at` is only close to the record, and never behind it: the scan begins there.
                self.stage = SearchStage::Time(*time, log.offset_at(*time)?.max(log.first_offset()));
            }
            SearchStage::Time(time, offset) => {
                let batches = log.read(*offset, TAIL_READ_BYTES)?;
                let Some(last) = batches.last() else { return Ok(Some(self.end)) };
                let mut records = batches.iter().flat_map(|batch| batch.records());
                let found = records.find(|r| r.offset >= *offset && r.received_at >= *time);
                if let Some(record) = found {
                    return Ok(Some(record.offset));
                }
                *offset = last.next_offset();
            }
            SearchStage::Tail(_) => return self.step_tail(log),
        }
        Ok(None)
    }

    fn step_tail(&mut self, log: &dyn Log) -> Result<Option<Offset>, LogReadError> {
        let (datasource, filter, end) = (&self.datasource, &self.filter, self.end);
        let SearchStage::Tail(search) = &mut self.stage else { return Ok(None) };
        let left_out = log.withheld().now();
        let matches = |record: &RecordRef<'_>| match datasource.is_all() {
            _ if left_out.contains(record) => false,
            true => filter.matches(&format!("{}/{}", record.datasource, record.topic)),
            false => record.datasource == datasource.as_str() && filter.matches(record.topic),
        };
        let batches =
            if search.offset < end { log.read(search.offset, TAIL_READ_BYTES)? } else { Vec::new() };
        for record in batches.iter().flat_map(|batch| batch.records()) {
            if (search.offset..end).contains(&record.offset) && matches(&record) {
                search.newest.push_back(record.offset);
                if search.newest.len() as u64 > search.wanted {
                    search.newest.pop_front();
                }
            }
        }
        if let Some(last) = batches.last() {
            search.offset = last.next_offset();
            return Ok(None);
        }
        if search.newest.len() as u64 == search.wanted || search.begin <= log.first_offset() {
            return Ok(Some(search.newest.front().copied().unwrap_or(end)));
        }
        // Doubles the distance until enough records match or the log's beginning is reached.
        *search = TailSearch::looking_back(search.wanted, search.back.saturating_mul(2), log, end);
        Ok(None)
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
