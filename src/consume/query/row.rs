//! What a row of `records.db` holds, in the form that readers want it.

use std::collections::HashMap;
use std::sync::Arc;

use rusqlite::types::Type;
use rusqlite::{Connection, Row};

use crate::filter::TopicFilter;
use crate::message::{KeyId, Transport};

/// A payload, whether it is stored as TEXT or as BLOB.
pub(in crate::consume) fn payload_bytes_of_row(row: &Row<'_>, column: usize) -> rusqlite::Result<Vec<u8>> {
    Ok(row.get_ref(column)?.as_bytes()?.to_vec())
}

/// The columns that most records of one sender share.
#[derive(Clone)]
pub(in crate::consume) struct RecordOrigin {
    pub(in crate::consume) key_id: KeyId,
    pub(in crate::consume) transport: Transport,
    pub(in crate::consume) content_type: Arc<str>,
}

/// The origin in the first three columns of a row.
pub(in crate::consume) fn origin_of_row(row: &Row<'_>) -> rusqlite::Result<RecordOrigin> {
    let unreadable = |column, error| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, error);
    let key_id = KeyId::parse(row.get_ref(0)?.as_str()?).map_err(|error| unreadable(0, error.into()))?;
    let name = row.get_ref(1)?.as_str()?;
    let transport =
        Transport::parse(name).ok_or_else(|| unreadable(1, format!("no transport: {name}").into()))?;
    Ok(RecordOrigin { key_id, transport, content_type: row.get(2)? })
}

/// The names that the rows of one page refer to, each looked up once. `None` stands for a name that the
/// query excludes.
pub(super) struct PageNameCache<'q> {
    connection: &'q Connection,
    filter: Option<&'q TopicFilter>,
    key_id: Option<KeyId>,
    topics: HashMap<i64, Option<Arc<str>>>,
    origins: HashMap<i64, Option<RecordOrigin>>,
}

impl<'q> PageNameCache<'q> {
    /// No names yet. Excludes topics that `filter` does not match, and records of other keys than `key_id`.
    pub(super) fn new(
        connection: &'q Connection,
        filter: Option<&'q TopicFilter>,
        key_id: Option<KeyId>,
    ) -> Self {
        Self { connection, filter, key_id, topics: HashMap::new(), origins: HashMap::new() }
    }

    pub(super) fn wanted_topic(&mut self, id: i64) -> rusqlite::Result<Option<Arc<str>>> {
        if let Some(topic) = self.topics.get(&id) {
            return Ok(topic.clone());
        }
        let topic: Arc<str> = self
            .connection
            .prepare_cached("SELECT topic FROM topics WHERE id = ?1")?
            .query_row([id], |row| row.get(0))?;
        let wanted = self.filter.is_none_or(|filter| filter.matches(&topic)).then_some(topic);
        self.topics.insert(id, wanted.clone());
        Ok(wanted)
    }

    pub(super) fn wanted_origin(&mut self, id: i64) -> rusqlite::Result<Option<RecordOrigin>> {
        if let Some(origin) = self.origins.get(&id) {
            return Ok(origin.clone());
        }
        let origin = self
            .connection
            .prepare_cached("SELECT key_id, transport, content_type FROM origins WHERE id = ?1")?
            .query_row([id], origin_of_row)?;
        let wanted = self.key_id.is_none_or(|key_id| key_id == origin.key_id).then_some(origin);
        self.origins.insert(id, wanted.clone());
        Ok(wanted)
    }
}
