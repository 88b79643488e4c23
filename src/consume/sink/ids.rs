//! A cache of the row ids of datasources, topics and origins in `records.db`, so that a record costs a
//! few look-ups in memory and no statement.

use hashbrown::HashMap;
use rusqlite::types::FromSqlError;
use rusqlite::{Connection, params};

use super::incarnations;
use super::samples::OpenChunks;
use super::schema::sql_offset;
use crate::limits::{REMEMBERED_NAME_BYTES, REMEMBERED_NAMES_BYTES_MAX};
use crate::message::{DatasourceId, Incarnation, KeyId, RecordRef, Transport};

/// Open chunks that are remembered from one transaction to the next.
const OPEN_CHUNKS_MAX: usize = 200_000;

/// The row ids that one record refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RowIds {
    pub(super) datasource: i64,
    pub(super) topic: i64,
    pub(super) origin: i64,
}

/// One datasource and those of its topics that are remembered.
struct RememberedDatasource {
    id: i64,
    topics: HashMap<Box<str>, i64>,
}

/// The remembered row ids.
#[derive(Default)]
pub(super) struct RememberedIds {
    datasources: HashMap<Box<str>, RememberedDatasource>,
    origins: HashMap<(KeyId, Transport), HashMap<Box<str>, i64>>,
    remembered_bytes: usize,
    /// Where the samples of remembered topics go.
    open_chunks: OpenChunks,
}

impl RememberedIds {
    /// Forgets everything. Call this when a transaction that may have inserted names was not committed:
    /// their ids do not exist.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Where the samples of remembered topics go, for one transaction.
    pub(super) fn take_open_chunks(&mut self) -> OpenChunks {
        std::mem::take(&mut self.open_chunks)
    }

    /// Remembers that, unless it is more than is remembered of anything.
    pub(super) fn keep_open_chunks(&mut self, open_chunks: OpenChunks) {
        if open_chunks.len() <= OPEN_CHUNKS_MAX {
            self.open_chunks = open_chunks;
        }
    }

    /// The row ids of `record`, which is of this incarnation of its datasource; `name` is what `datasources` calls
    /// that. Inserts a name that the database does not have, in the transaction that `connection` is in.
    ///
    /// # Errors
    /// The database's.
    pub(super) fn row_ids(
        &mut self,
        connection: &Connection,
        record: &RecordRef<'_>,
        name: &str,
        incarnation: Incarnation,
    ) -> rusqlite::Result<RowIds> {
        match self.find_remembered(record, name) {
            Some(ids) => Ok(ids),
            None => self.read_or_insert(connection, record, name, incarnation),
        }
    }

    fn find_remembered(&self, record: &RecordRef<'_>, name: &str) -> Option<RowIds> {
        let datasource = self.datasources.get(name)?;
        let topic = *datasource.topics.get(record.topic)?;
        let origins = self.origins.get(&(record.key_id, record.transport))?;
        let origin = *origins.get(record.content_type)?;
        Some(RowIds { datasource: datasource.id, topic, origin })
    }

    #[cold]
    fn read_or_insert(
        &mut self,
        connection: &Connection,
        record: &RecordRef<'_>,
        name: &str,
        incarnation: Incarnation,
    ) -> rusqlite::Result<RowIds> {
        if self.remembered_bytes >= REMEMBERED_NAMES_BYTES_MAX {
            self.clear();
        }
        // An upper bound: at most one of each is new.
        self.remembered_bytes +=
            3 * REMEMBERED_NAME_BYTES + name.len() + record.topic.len() + record.content_type.len();

        let scope =
            DatasourceId::parse_scope(record.datasource).map_err(FromSqlError::other)?.scope(incarnation);
        let datasource = incarnations::ensure_row(connection, &scope, name)?;
        let topic = topic_id(connection, record, datasource)?;
        let origin = origin_id(connection, record)?;

        let known = self
            .datasources
            .entry(name.into())
            .or_insert_with(|| RememberedDatasource { id: datasource, topics: HashMap::new() });
        known.topics.insert(record.topic.into(), topic);
        let origins = self.origins.entry((record.key_id, record.transport)).or_default();
        origins.insert(record.content_type.into(), origin);
        Ok(RowIds { datasource, topic, origin })
    }
}

fn topic_id(connection: &Connection, record: &RecordRef<'_>, datasource: i64) -> rusqlite::Result<i64> {
    connection
        .prepare_cached(
            "INSERT INTO topics (datasource_id, topic, latest_offset) VALUES (?1, ?2, ?3)
             ON CONFLICT DO NOTHING",
        )?
        .execute(params![datasource, record.topic, sql_offset(record.offset)])?;
    connection
        .prepare_cached("SELECT id FROM topics WHERE datasource_id = ?1 AND topic = ?2")?
        .query_row(params![datasource, record.topic], |row| row.get(0))
}

fn origin_id(connection: &Connection, record: &RecordRef<'_>) -> rusqlite::Result<i64> {
    let origin = params![record.key_id.to_string(), record.transport.as_str(), record.content_type];
    connection
        .prepare_cached(
            "INSERT INTO origins (key_id, transport, content_type) VALUES (?1, ?2, ?3)
             ON CONFLICT DO NOTHING",
        )?
        .execute(origin)?;
    connection
        .prepare_cached("SELECT id FROM origins WHERE key_id = ?1 AND transport = ?2 AND content_type = ?3")?
        .query_row(origin, |row| row.get(0))
}
