//! A digest of what has come into the log since a watcher last looked: numbers of each datasource, and its newest
//! records. It looks at the newest batches alone, which are in memory, and at a bounded part of them.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;
use serde_json::value::RawValue;

use super::LiveView;
use crate::consume::render::log_record_json;
use crate::limits::{
    LIVE_EVENT_BYTES_MAX, LIVE_PAYLOAD_BYTES_MAX, LIVE_RECORDS_MAX, LIVE_SCAN_BYTES_MAX, LIVE_TOPICS_MAX,
};
use crate::log::{Batch, Log};
use crate::message::{KeyId, Offset, RecordFlags, RecordRef, TimeMicros, Transport};
use crate::time::Rfc3339;

/// What happened in one datasource.
#[derive(Serialize)]
pub(super) struct DatasourceDigest {
    /// Records that were let in.
    records: u64,
    /// Messages that went into quarantine.
    quarantined: u64,
    /// When the last of either came.
    last_at: Rfc3339,
    /// The newest records, the oldest of them first: of each topic one, or all if this datasource alone is watched.
    newest: Vec<Box<RawValue>>,
    /// How many more there were of those.
    more: u64,
}

/// What happened since the last look.
#[derive(Serialize)]
pub(super) struct LogDigest {
    at: Rfc3339,
    /// The time that it is about.
    seconds: f64,
    log_end: Offset,
    /// How many records were not looked at, because there were too many.
    unread: u64,
    datasources: BTreeMap<String, DatasourceDigest>,
}

/// A record whose payload is too long to be shown.
#[derive(Serialize)]
struct OmittedRecord<'a> {
    offset: Offset,
    topic: &'a str,
    payload: Option<()>,
    /// The payload's length.
    omitted_bytes: usize,
    key_id: KeyId,
    transport: Transport,
    received_at: Rfc3339,
}

/// What is found of one datasource.
#[derive(Default)]
struct DatasourceCount<'a> {
    records: u64,
    quarantined: u64,
    last_at: TimeMicros,
    matched: u64,
    newest: Vec<RecordRef<'a>>,
}

impl<'a> DatasourceCount<'a> {
    fn add(&mut self, record: RecordRef<'a>, view: &LiveView) {
        self.last_at = self.last_at.max(record.received_at);
        if record.flags.contains(RecordFlags::QUARANTINED) {
            self.quarantined += 1;
            return;
        }
        self.records += 1;
        match &view.filter {
            Some(filter) => {
                if !filter.matches(record.topic) {
                    return;
                }
                self.matched += 1;
                if self.newest.len() >= 2 * LIVE_RECORDS_MAX {
                    self.newest.drain(..LIVE_RECORDS_MAX);
                }
                self.newest.push(record);
            }
            None => {
                self.newest.retain(|known| known.topic != record.topic);
                if self.newest.len() == LIVE_TOPICS_MAX {
                    self.newest.remove(0);
                }
                self.newest.push(record);
            }
        }
    }

    /// As JSON, with as many of the newest records as there is room for.
    fn render(self, bytes_left: &mut usize) -> DatasourceDigest {
        let mut newest = Vec::new();
        for record in self.newest.iter().rev().take(LIVE_RECORDS_MAX) {
            let shown = record.payload.len().min(LIVE_PAYLOAD_BYTES_MAX) + record.topic.len();
            if shown > *bytes_left {
                break;
            }
            *bytes_left -= shown;
            newest.extend(record_json(record));
        }
        newest.reverse();
        let more = self.matched.saturating_sub(newest.len() as u64);
        let (records, quarantined) = (self.records, self.quarantined);
        DatasourceDigest { records, quarantined, last_at: Rfc3339(self.last_at), newest, more }
    }
}

/// A record as the API shows it, without a payload that is too long.
fn record_json(record: &RecordRef<'_>) -> Option<Box<RawValue>> {
    let json = match record.payload.len() {
        ..=LIVE_PAYLOAD_BYTES_MAX => serde_json::to_string(&log_record_json(record)),
        omitted_bytes => serde_json::to_string(&OmittedRecord {
            offset: record.offset,
            topic: record.topic,
            payload: None,
            omitted_bytes,
            key_id: record.key_id,
            transport: record.transport,
            received_at: Rfc3339(record.received_at),
        }),
    };
    json.and_then(RawValue::from_string).ok()
}

/// The records of the newest batches that a watcher may see, from an offset on.
pub(super) fn visible_records<'a>(
    log: &'a dyn Log,
    batches: &'a [Batch],
    from: Offset,
    view: &'a LiveView,
) -> impl Iterator<Item = RecordRef<'a>> {
    let left_out = log.withheld().now();
    let (datasource, _) = view.scope.of_scope();
    let records = batches.iter().flat_map(|batch| batch.records());
    records.filter(move |record| {
        record.offset >= from
            && (view.scope.is_all() || record.datasource == datasource.as_str())
            && (left_out.is_nothing() || !left_out.withholds(record))
    })
}

/// What came from `from` on, and the offset at which the next look begins.
pub(super) fn look(
    log: &dyn Log,
    view: &LiveView,
    from: Offset,
    seconds: f64,
    at: TimeMicros,
) -> (LogDigest, Offset) {
    let end = log.next_offset();
    // Older ones are not in memory any more, or there are too many: they are not read for a digest.
    let batches = log.read_recent(from, LIVE_SCAN_BYTES_MAX).unwrap_or_default();
    let read_to = batches.last().map_or(from, Batch::next_offset).clamp(from, end.max(from));
    let mut counts: HashMap<&str, DatasourceCount<'_>> = HashMap::new();
    for record in visible_records(log, &batches, from, view) {
        counts.entry(record.datasource).or_default().add(record, view);
    }
    let mut bytes_left = LIVE_EVENT_BYTES_MAX;
    let mut datasources: Vec<_> = counts.into_iter().collect();
    datasources.sort_unstable_by_key(|(id, _)| *id);
    let datasources =
        datasources.into_iter().map(|(id, count)| (id.to_owned(), count.render(&mut bytes_left))).collect();
    let unread = end.saturating_sub(read_to);
    (LogDigest { at: Rfc3339(at), seconds, log_end: end, unread, datasources }, end.max(from))
}
