//! Pages of quarantine from PostgreSQL, and what is there of a leaked key.

use std::ops::ControlFlow;

use headgate_bridge_postgres::{PostgresTime, Row};

use super::records::SharedTexts;
use super::{PostgresRecords, row_id_of_scope};
use crate::consume::quarantine::page::{
    LeakedRecords, LeakedTopic, QuarantineCause, QuarantinePage, QuarantineQuery, QuarantinedRecord,
};
use crate::consume::query::{PageBudget, QueryError};
use crate::consume::sink::quarantined::{CAUSE_KEY, CAUSE_LIMIT, CAUSE_SCHEMA};
use crate::consume::sink::schema::{offset_from_sql, sql_offset};
use crate::filter::TopicFilter;
use crate::limits::QUERY_RECORDS_MAX;
use crate::message::{DatasourceId, KeyId, RecordFlags};

const QUARANTINE_PAGE_SQL: &str = "SELECT q.log_offset, q.received_at, q.event_at, t.topic, o.key_id, o.transport,
         o.content_type, coalesce(q.payload_bytes, convert_to(q.payload::text, 'UTF8')), q.cause, q.keyword, q.pointer,
         q.detail, q.schema_version, q.redriven_offset, q.properties, q.publisher, q.flags
     FROM quarantined q JOIN topics t ON t.id = q.topic_id JOIN origins o ON o.id = q.origin_id
     WHERE q.datasource_id = $1 AND q.log_offset BETWEEN $2 AND $3 ORDER BY q.log_offset";

impl PostgresRecords {
    /// See [`RecordsReader::quarantine_within`](crate::consume::query::RecordsReader::quarantine_within).
    ///
    /// # Errors
    /// [`QueryError`].
    pub(in crate::consume) fn quarantine_within(
        &self,
        query: &QuarantineQuery,
        filter: Option<&TopicFilter>,
        budget: &mut PageBudget,
    ) -> Result<QuarantinePage, QueryError> {
        let left = budget.clone();
        self.read(|snapshot| {
            *budget = left.clone();
            let mut page = QuarantinePage::default();
            let Some(datasource) = row_id_of_scope(snapshot, &query.scope)? else { return Ok(page) };
            let (first, last) = query.offset_bounds();
            let mut texts = SharedTexts::default();
            snapshot.scan(QUARANTINE_PAGE_SQL, &[&datasource, &first, &last], |row| {
                if budget.is_spent() {
                    page.next = budget.scanned_to;
                    return ControlFlow::Break(());
                }
                let offset = offset_from_sql(row.get(0));
                budget.scan(offset);
                let is_unwanted = query.offsets.as_ref().is_some_and(|named| !named.contains(&offset))
                    || query.from.is_some_and(|from| row.get::<_, PostgresTime>(1).0 < from)
                    || filter.is_some_and(|filter| !filter.matches(row.get(3)));
                if is_unwanted {
                    return ControlFlow::Continue(());
                }
                let record = quarantined_record_of(row, &mut texts);
                if record.is_redrivable() || !query.redrivable {
                    budget.take(record.record.payload.len() + record.record.topic.len());
                    page.records.push(record);
                }
                ControlFlow::Continue(())
            })?;
            Ok(page)
        })
    }

    /// See [`RecordsReader::leaked`](crate::consume::query::RecordsReader::leaked).
    ///
    /// # Errors
    /// [`QueryError`].
    pub(in crate::consume) fn leaked(
        &self,
        scope: &DatasourceId,
        key_id: KeyId,
    ) -> Result<LeakedRecords, QueryError> {
        self.read(|snapshot| {
            let of_one = match scope.is_all() {
                true => None,
                false => row_id_of_scope(snapshot, scope)?.or(Some(-1)),
            };
            let key = key_id.to_string();
            let mut leaked = LeakedRecords::default();
            snapshot.scan(
                "SELECT d.datasource, t.topic, c.records FROM (
                     SELECT q.datasource_id, q.topic_id, count(*) AS records FROM quarantined q
                     WHERE q.cause = $1 AND q.origin_id IN (SELECT id FROM origins WHERE key_id = $2)
                         AND q.datasource_id = coalesce($3, q.datasource_id) GROUP BY 1, 2) c
                 JOIN datasources d ON d.id = c.datasource_id JOIN topics t ON t.id = c.topic_id ORDER BY 1, 2",
                &[&CAUSE_KEY, &key, &of_one],
                |row| {
                    let records = offset_from_sql(row.get(2));
                    leaked.records += records;
                    if leaked.topics.len() < QUERY_RECORDS_MAX {
                        leaked.topics.push(LeakedTopic {
                            datasource: row.get(0),
                            topic: row.get(1),
                            records,
                        });
                    }
                    ControlFlow::Continue(())
                },
            )?;
            let last = snapshot.query_opt(
                "SELECT max(q.log_offset) FROM quarantined q
                 WHERE q.origin_id IN (SELECT id FROM origins WHERE key_id = $1)
                     AND q.datasource_id = coalesce($2, q.datasource_id)",
                &[&key, &of_one],
            )?;
            leaked.last_offset = last.and_then(|row| row.get::<_, Option<i64>>(0)).map(offset_from_sql);
            Ok(leaked)
        })
    }
}

impl QuarantineQuery {
    /// The first and the last offset that it can give.
    fn offset_bounds(&self) -> (i64, i64) {
        let named = self.offsets.as_ref();
        let first = self.after_offset.map_or(0, |after| sql_offset(after).saturating_add(1));
        let first = named.and_then(|named| named.first()).map_or(first, |&n| first.max(sql_offset(n)));
        let last = named.map_or(i64::MAX, |named| named.last().map_or(-1, |&n| sql_offset(n)));
        (first, last)
    }
}

fn quarantined_record_of(row: &Row, texts: &mut SharedTexts) -> QuarantinedRecord {
    let payload = row.get::<_, Option<Vec<u8>>>(7).unwrap_or_default();
    let flags = u8::try_from(row.get::<_, i32>(16)).unwrap_or_default();
    QuarantinedRecord {
        record: texts.record_of(row, payload),
        cause: match row.get(8) {
            CAUSE_SCHEMA => QuarantineCause::Schema,
            CAUSE_LIMIT => QuarantineCause::Limit,
            _ => QuarantineCause::Key,
        },
        keyword: row.get(9),
        pointer: row.get(10),
        detail: row.get(11),
        schema_version: row.get::<_, Option<i64>>(12).and_then(|version| u32::try_from(version).ok()),
        redriven_offset: row.get::<_, Option<i64>>(13).map(offset_from_sql),
        properties: row.get(14),
        publisher: row.get::<_, i64>(15).cast_unsigned(),
        flags: RecordFlags(flags),
    }
}
