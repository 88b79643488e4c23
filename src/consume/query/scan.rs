//! A page of records: which index is scanned for it, from where, and where it ends.

use rusqlite::{Connection, OptionalExtension, params};

use super::row::{PageNameCache, payload_bytes_of_row};
use super::{PageBudget, RecordsPage, RecordsQuery, StoredRecord, row_id_of_scope};
use crate::consume::sink::schema::{TIME_INDEX_OFFSETS, offset_from_sql, sql_offset};
use crate::filter::TopicFilter;
use crate::message::TimeMicros;

/// The records of a datasource, and those of a topic. SQLite orders the rows of one index entry by their
/// keys, which are the offsets, so that neither query sorts.
pub(super) const RECORDS_PAGE_SQL: [&str; 2] = [
    "SELECT offset, received_us, topic_id, origin_id, payload, event_us FROM entries
     WHERE datasource_id = ?1 AND offset BETWEEN ?2 AND ?3 ORDER BY offset",
    "SELECT offset, received_us, topic_id, origin_id, payload, event_us FROM entries
     WHERE topic_id = ?1 AND offset BETWEEN ?2 AND ?3 ORDER BY offset",
];

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
        let (mut first, mut last) =
            (query.after_offset.map_or(0, |after| sql_offset(after).saturating_add(1)), i64::MAX);
        if query.from.is_some() || query.to.is_some() {
            let rows: (Option<i64>, Option<i64>) = connection
                .prepare_cached(
                    "SELECT min(first_offset), max(first_offset) FROM time_index
                     WHERE newest_us >= ?1 AND oldest_us < ?2",
                )?
                .query_row(
                    [query.from.unwrap_or(TimeMicros::MIN), query.to.unwrap_or(TimeMicros::MAX)],
                    |row| Ok((row.get(0)?, row.get(1)?)),
                )?;
            let (Some(oldest), Some(newest)) = rows else { return Ok(None) };
            first = first.max(oldest);
            last = newest.saturating_add(sql_offset(TIME_INDEX_OFFSETS - 1));
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
        let (sql, id) = match self.along {
            ScanIndex::Datasource(id) => (RECORDS_PAGE_SQL[0], id),
            ScanIndex::Topic(id) => (RECORDS_PAGE_SQL[1], id),
        };
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
            if query.from.is_some_and(|from| received_at < from)
                || query.to.is_some_and(|to| received_at >= to)
            {
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
                event_at: row.get(5)?,
            });
        }
        Ok(page)
    }
}
