//! A page of records: which index is scanned for it, from where, and where it ends.

use rusqlite::{Connection, OptionalExtension, params};

use super::row::{PageNameCache, payload_bytes_of_row};
use super::{PageBudget, RecordsOrder, RecordsPage, RecordsQuery, StoredRecord, row_id_of_scope};
use crate::consume::sink::schema::{TIME_INDEX_OFFSETS, offset_from_sql, sql_offset};
use crate::filter::TopicFilter;
use crate::message::TimeMicros;

macro_rules! page_sql {
    ($along:literal, $order:literal) => {
        concat!(
            "SELECT offset, received_us, topic_id, origin_id, payload, event_us FROM entries
             WHERE ",
            $along,
            " = ?1 AND offset BETWEEN ?2 AND ?3 ORDER BY offset ",
            $order
        )
    };
}

/// The records of a datasource, and those of a topic; oldest first, and newest first. SQLite orders the rows of one
/// index entry by their keys, which are the offsets, so that no query sorts.
pub(super) const RECORDS_PAGE_SQL: [[&str; 2]; 2] = [
    [page_sql!("datasource_id", "ASC"), page_sql!("datasource_id", "DESC")],
    [page_sql!("topic_id", "ASC"), page_sql!("topic_id", "DESC")],
];

/// The offsets that a time range can be in. The rows of `time_index` are a thousandth of the records.
pub(super) const TIME_RANGE_SQL: &str = "SELECT min(first_offset), max(first_offset) FROM time_index
     WHERE newest_us >= ?1 AND oldest_us < ?2";

/// The offsets of a topic's events in a time range.
pub(super) const EVENT_RANGE_SQL: &str = "SELECT min(offset), max(offset) FROM entries
     WHERE topic_id = ?1 AND event_us IS NOT NULL AND event_us >= ?2 AND event_us < ?3";

/// The first and the last offset that what was received in a time range can have.
fn offsets_of_times(
    connection: &Connection,
    from: Option<TimeMicros>,
    to: Option<TimeMicros>,
) -> rusqlite::Result<Option<(i64, i64)>> {
    let times = [from.unwrap_or(TimeMicros::MIN), to.unwrap_or(TimeMicros::MAX)];
    let (first, last): (Option<i64>, Option<i64>) =
        connection.prepare_cached(TIME_RANGE_SQL)?.query_row(times, |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(first.zip(last).map(|(first, last)| (first, last.saturating_add(sql_offset(TIME_INDEX_OFFSETS - 1)))))
}

fn offsets_of_events(
    connection: &Connection,
    topic: i64,
    from: Option<TimeMicros>,
    to: Option<TimeMicros>,
) -> rusqlite::Result<Option<(i64, i64)>> {
    let (first, last): (Option<i64>, Option<i64>) = connection
        .prepare_cached(EVENT_RANGE_SQL)?
        .query_row([topic, from.unwrap_or(TimeMicros::MIN), to.unwrap_or(TimeMicros::MAX)], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
    Ok(first.zip(last))
}

/// Which index to scan, and its first and last offset.
pub(super) struct RecordsScan {
    along: ScanIndex,
    first: i64,
    last: i64,
}

enum ScanIndex {
    Datasource(i64),
    Topic(i64),
}

impl RecordsScan {
    /// Chooses index and range. `None` if no record can match.
    pub(super) fn plan(
        connection: &Connection,
        query: &RecordsQuery,
        filter: Option<&TopicFilter>,
    ) -> rusqlite::Result<Option<Self>> {
        let Some(datasource) = row_id_of_scope(connection, &query.scope)? else { return Ok(None) };
        let along = match filter.and_then(TopicFilter::exact) {
            None => ScanIndex::Datasource(datasource),
            Some(topic) => {
                let topic: Option<i64> = connection
                    .prepare_cached("SELECT id FROM topics WHERE datasource_id = ?1 AND topic = ?2")?
                    .query_row(params![datasource, topic], |row| row.get(0))
                    .optional()?;
                let Some(topic) = topic else { return Ok(None) };
                ScanIndex::Topic(topic)
            }
        };
        let mut first = query.after_offset.map_or(0, |after| sql_offset(after).saturating_add(1));
        let mut last = query.before_offset.map_or(i64::MAX, |before| sql_offset(before) - 1);
        if query.from.is_some() || query.to.is_some() {
            let Some((oldest, newest)) = offsets_of_times(connection, query.from, query.to)? else {
                return Ok(None);
            };
            (first, last) = (first.max(oldest), last.min(newest));
        }
        // The events of a datasource can be anywhere: only those of a topic have an index.
        if let ScanIndex::Topic(topic) = along
            && (query.event_from.is_some() || query.event_to.is_some())
        {
            let (from, to) = (query.event_from, query.event_to);
            let events = offsets_of_events(connection, topic, from, to)?;
            // Those without a time of their own.
            let others = offsets_of_times(connection, from, to)?;
            let Some(oldest) = events.iter().chain(&others).map(|range| range.0).min() else {
                return Ok(None);
            };
            let newest = events.iter().chain(&others).map(|range| range.1).max().unwrap_or(oldest);
            (first, last) = (first.max(oldest), last.min(newest));
        }
        Ok(Some(Self { along, first, last }))
    }

    /// Scans until the range or the page ends.
    pub(super) fn page(
        &self,
        connection: &Connection,
        query: &RecordsQuery,
        filter: Option<&TopicFilter>,
        budget: &mut PageBudget,
    ) -> rusqlite::Result<RecordsPage> {
        let (along, id) = match self.along {
            ScanIndex::Datasource(id) => (0, id),
            ScanIndex::Topic(id) => (1, id),
        };
        let sql = RECORDS_PAGE_SQL[along][usize::from(query.order == RecordsOrder::Newest)];
        let mut names = PageNameCache::new(connection, filter, query.key_id);
        let mut page = RecordsPage::default();
        let mut statement = connection.prepare_cached(sql)?;
        let mut rows = statement.query([id, self.first, self.last])?;
        // Cheap conditions come first, so that a row that fails them costs no look-up and no payload copy.
        while let Some(row) = rows.next()? {
            if budget.is_spent() {
                page.next = budget.scanned_to;
                break;
            }
            let offset = offset_from_sql(row.get(0)?);
            budget.scan(offset);
            let received_at: TimeMicros = row.get(1)?;
            let event_at: Option<TimeMicros> = row.get(5)?;
            if !query.has_times(received_at, event_at) {
                continue;
            }
            let Some(topic) = names.wanted_topic(row.get(2)?)? else { continue };
            let Some(origin) = names.wanted_origin(row.get(3)?)? else { continue };
            let payload = payload_bytes_of_row(row, 4)?;
            budget.take(payload.len() + topic.len());
            page.records.push(StoredRecord {
                offset,
                topic,
                payload,
                content_type: origin.content_type,
                key_id: origin.key_id,
                transport: origin.transport,
                received_at,
                event_at,
            });
        }
        Ok(page)
    }
}
