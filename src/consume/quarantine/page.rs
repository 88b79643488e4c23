//! Pages of quarantine, each record with its reason. The same bounds hold as for pages of records: their
//! number, their bytes, and the records scanned.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Row, params};
use serde::Serialize;

use crate::consume::query::{
    PageBudget, QueryError, RecordsReader, StoredRecord, origin_of_row, payload_bytes_of_row, row_id_of_scope,
};
use crate::consume::render::{RecordJson, record_json};
use crate::consume::sink::quarantined::{CAUSE_LIMIT, CAUSE_SCHEMA};
use crate::consume::sink::schema::{offset_from_sql, sql_offset};
use crate::filter::TopicFilter;
use crate::limits::{QUERY_RECORDS_MAX, TAIL_READ_BYTES};
use crate::log::{Log, LogReadError};
use crate::message::{DatasourceId, KeyId, Offset, RecordFlags, RecordRef, TimeMicros};

/// Which records to read.
#[derive(Debug, Clone)]
pub struct QuarantineQuery {
    /// The scope of the incarnation of the datasource that the records are of.
    pub scope: DatasourceId,
    /// A topic or an MQTT filter (`+`, `#`).
    pub topic: Option<String>,
    /// Received at or after.
    pub from: Option<TimeMicros>,
    /// Only records with a greater offset.
    pub after_offset: Option<Offset>,
    /// Only records with one of these offsets.
    pub offsets: Option<BTreeSet<Offset>>,
    /// Only those that can be sent through intake again: not withheld for their key, and not sent again
    /// yet.
    pub redrivable: bool,
    /// At most this many, and never more than [`QUERY_RECORDS_MAX`].
    pub limit: usize,
}

/// What brought a record into quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum QuarantineCause {
    /// It does not meet its schema.
    Schema,
    /// It was over a limit.
    Limit,
    /// The key that let it in has leaked.
    Key,
}

/// One record in quarantine.
#[derive(Debug, Clone, PartialEq)]
pub struct QuarantinedRecord {
    /// The fields that it shares with stored records.
    pub record: StoredRecord,
    /// What brought it here.
    pub cause: QuarantineCause,
    /// The keyword of the schema that it fails.
    pub keyword: Option<String>,
    /// Where in the message, as a JSON pointer.
    pub pointer: Option<String>,
    /// The reason in words.
    pub detail: Option<String>,
    /// The version of the schema.
    pub schema_version: Option<u32>,
    /// Its new offset, once it was sent through intake again and let in.
    pub redriven_offset: Option<Offset>,
    /// MQTT 5 properties in wire form.
    pub properties: Vec<u8>,
    /// The client that published it.
    pub publisher: u64,
    /// How it was published.
    pub flags: RecordFlags,
}

impl QuarantinedRecord {
    /// Whether it can be sent through intake again: not withheld for its key, and not sent again yet.
    pub(in crate::consume) fn is_redrivable(&self) -> bool {
        self.cause != QuarantineCause::Key && self.redriven_offset.is_none()
    }

    /// The record as it is in the log, without its note.
    pub fn as_record<'a>(&'a self, datasource: &'a DatasourceId) -> RecordRef<'a> {
        let StoredRecord { offset, topic, payload, content_type, key_id, transport, received_at, event_at } =
            &self.record;
        RecordRef {
            offset: *offset,
            datasource: datasource.as_str(),
            topic,
            payload,
            content_type,
            properties: &self.properties,
            key_id: *key_id,
            transport: *transport,
            publisher: self.publisher,
            received_at: *received_at,
            event_at: *event_at,
            flags: self.flags,
            note: &[],
        }
    }
}

/// The API's form: the fields of a record, and those of the reason.
impl Serialize for QuarantinedRecord {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct QuarantinedRecordJson<'a> {
            #[serde(flatten)]
            record: RecordJson<'a>,
            cause: QuarantineCause,
            keyword: Option<&'a str>,
            pointer: Option<&'a str>,
            detail: Option<&'a str>,
            schema_version: Option<u32>,
            redriven_offset: Option<Offset>,
        }
        QuarantinedRecordJson {
            record: record_json(&self.record),
            cause: self.cause,
            keyword: self.keyword.as_deref(),
            pointer: self.pointer.as_deref(),
            detail: self.detail.as_deref(),
            schema_version: self.schema_version,
            redriven_offset: self.redriven_offset,
        }
        .serialize(serializer)
    }
}

/// A page of quarantine, and where the next one starts.
#[derive(Debug, Default)]
pub struct QuarantinePage {
    /// Ordered by offset. May be empty although there is a next page.
    pub records: Vec<QuarantinedRecord>,
    /// `after_offset` of the next page, if there may be one.
    pub next: Option<Offset>,
}

/// The records of a leaked key that are in quarantine.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct LeakedRecords {
    /// How many.
    pub records: u64,
    /// Their topics, ordered by datasource and name; no more than [`QUERY_RECORDS_MAX`] are listed.
    pub topics: Vec<LeakedTopic>,
    /// The newest record of the key in quarantine, for whatever reason.
    pub last_offset: Option<Offset>,
}

/// The quarantined records of a leaked key in one topic.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct LeakedTopic {
    /// The datasource of the topic.
    pub datasource: String,
    /// As the device wrote it.
    pub topic: String,
    /// How many.
    pub records: u64,
}

impl LeakedRecords {
    /// Counts them in the log, where there is no storage. Blocks on the disk.
    ///
    /// # Errors
    /// [`LogReadError`].
    pub fn in_log(log: &dyn Log, datasource: &DatasourceId, key_id: KeyId) -> Result<Self, LogReadError> {
        let left_out = log.withheld().now();
        let mut topics: BTreeMap<(String, String), u64> = BTreeMap::new();
        let mut leaked = Self::default();
        let (mut offset, end) = (log.first_offset(), log.next_offset());
        while offset < end && !left_out.is_nothing() {
            let batches = log.read(offset, TAIL_READ_BYTES)?;
            let Some(last) = batches.last() else { break };
            offset = last.next_offset();
            for record in batches.iter().flat_map(|batch| batch.records()) {
                let meant = datasource.is_all() || record.datasource == datasource.as_str();
                let RecordRef { received_at, offset, .. } = record;
                if meant
                    && record.key_id == key_id
                    && left_out.covers(record.datasource, key_id, received_at, offset)
                {
                    leaked.records += 1;
                    leaked.last_offset = Some(record.offset);
                    *topics.entry((record.datasource.to_owned(), record.topic.to_owned())).or_default() += 1;
                }
            }
        }
        let topics = topics.into_iter().take(QUERY_RECORDS_MAX);
        leaked.topics =
            topics.map(|((datasource, topic), records)| LeakedTopic { datasource, topic, records }).collect();
        Ok(leaked)
    }
}

impl RecordsReader {
    /// The next records of a page of quarantine of which `budget` is left, in the order of their offsets.
    ///
    /// # Errors
    /// [`QueryError::Filter`] for a topic that is not valid; [`QueryError::Database`].
    pub fn quarantine_within(
        &self,
        query: &QuarantineQuery,
        budget: &mut PageBudget,
    ) -> Result<QuarantinePage, QueryError> {
        let filter = query.topic.as_deref().map(TopicFilter::new).transpose()?;
        let stored = match self {
            Self::Sqlite(stored) => stored,
            Self::Postgres(stored) => return stored.quarantine_within(query, filter.as_ref(), budget),
        };
        stored.read(|connection| {
            let mut page = QuarantinePage::default();
            let Some(datasource) = row_id_of_scope(connection, &query.scope)? else { return Ok(page) };
            let mut statement = connection.prepare_cached(
                "SELECT o.key_id, o.transport, o.content_type, q.offset, q.received_us, t.topic, q.payload,
                     q.cause, q.keyword, q.pointer, q.detail, q.schema_version, q.redriven_offset,
                     q.properties, q.publisher, q.flags, q.event_us
                 FROM quarantined q
                 LEFT JOIN topics t ON t.id = q.topic_id
                 LEFT JOIN origins o ON o.id = q.origin_id
                 WHERE q.datasource_id = ?1 AND q.offset BETWEEN ?2 AND ?3 ORDER BY q.offset",
            )?;
            let named = query.offsets.as_ref();
            let first = query.after_offset.map_or(0, |after| sql_offset(after).saturating_add(1));
            let first = named.and_then(|named| named.first()).map_or(first, |&n| first.max(sql_offset(n)));
            let last = named.map_or(i64::MAX, |named| named.last().map_or(-1, |&n| sql_offset(n)));
            let mut rows = statement.query(params![datasource, first, last])?;
            while let Some(row) = rows.next()? {
                if budget.is_spent() {
                    page.next = budget.scanned_to;
                    break;
                }
                let offset = offset_from_sql(row.get(3)?);
                budget.scan(offset);
                let unwanted = named.is_some_and(|named| !named.contains(&offset))
                    || query.from.is_some_and(|from| row.get(4).is_ok_and(|at: TimeMicros| at < from))
                    || filter.as_ref().is_some_and(|f| row.get_ref(5).is_ok_and(|t| !matches_filter(f, t)));
                if unwanted {
                    continue;
                }
                let record = quarantined_record_of_row(row)?;
                if record.is_redrivable() || !query.redrivable {
                    budget.take(record.record.payload.len() + record.record.topic.len());
                    page.records.push(record);
                }
            }
            Ok(page)
        })
    }

    /// The records that are in quarantine because this key has leaked, in the incarnation of a datasource with this
    /// scope, or in all (`*`).
    ///
    /// # Errors
    /// [`QueryError::Database`].
    pub fn leaked(&self, scope: &DatasourceId, key_id: KeyId) -> Result<LeakedRecords, QueryError> {
        let stored = match self {
            Self::Sqlite(stored) => stored,
            Self::Postgres(stored) => return stored.leaked(scope, key_id),
        };
        stored.read(|connection| {
            let mut statement = connection.prepare_cached(
                "SELECT d.datasource, t.topic, count(*)
                 FROM quarantined q JOIN datasources d ON d.id = q.datasource_id JOIN topics t ON t.id = q.topic_id
                 WHERE q.cause = 'key' AND q.origin_id IN (SELECT id FROM origins WHERE key_id = ?1)
                     AND q.datasource_id = coalesce(?2, q.datasource_id)
                 GROUP BY q.topic_id ORDER BY 1, 2",
            )?;
            let mut leaked = LeakedRecords::default();
            let of_one = match scope.is_all() {
                true => None,
                false => row_id_of_scope(connection, scope)?.or(Some(-1)),
            };
            let mut rows = statement.query(params![key_id.to_string(), of_one])?;
            while let Some(row) = rows.next()? {
                let (of, topic): (String, String) = (row.get(0)?, row.get(1)?);
                let records = offset_from_sql(row.get(2)?);
                leaked.records += records;
                if leaked.topics.len() < QUERY_RECORDS_MAX {
                    leaked.topics.push(LeakedTopic { datasource: of, topic, records });
                }
            }
            let last: Option<i64> = connection
                .prepare_cached(
                    "SELECT max(q.offset) FROM quarantined q
                     WHERE q.origin_id IN (SELECT id FROM origins WHERE key_id = ?1)
                         AND q.datasource_id = coalesce(?2, q.datasource_id)",
                )?
                .query_row(params![key_id.to_string(), of_one], |row| row.get(0))?;
            leaked.last_offset = last.map(offset_from_sql);
            Ok(leaked)
        })
    }
}

fn matches_filter(filter: &TopicFilter, topic: rusqlite::types::ValueRef<'_>) -> bool {
    topic.as_str().is_ok_and(|topic| filter.matches(topic))
}

fn quarantined_record_of_row(row: &Row<'_>) -> rusqlite::Result<QuarantinedRecord> {
    let origin = origin_of_row(row)?;
    let cause = match row.get_ref(7)?.as_str()? {
        CAUSE_SCHEMA => QuarantineCause::Schema,
        CAUSE_LIMIT => QuarantineCause::Limit,
        _ => QuarantineCause::Key,
    };
    Ok(QuarantinedRecord {
        record: StoredRecord {
            offset: offset_from_sql(row.get(3)?),
            topic: row.get(5)?,
            payload: payload_bytes_of_row(row, 6)?,
            content_type: origin.content_type,
            key_id: origin.key_id,
            transport: origin.transport,
            received_at: row.get(4)?,
            event_at: row.get(16)?,
        },
        cause,
        keyword: row.get(8)?,
        pointer: row.get(9)?,
        detail: row.get(10)?,
        schema_version: row.get(11)?,
        redriven_offset: row.get::<_, Option<i64>>(12)?.map(offset_from_sql),
        properties: row.get(13)?,
        publisher: row.get::<_, i64>(14)?.cast_unsigned(),
        flags: RecordFlags(row.get(15)?),
    })
}
