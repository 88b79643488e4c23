//! A cache of the row ids of datasources, topics and origins in `records.db`, so that a record costs a
//! few look-ups in memory and no statement.

use std::cmp::Reverse;

use hashbrown::HashMap;
use rusqlite::types::FromSqlError;
use rusqlite::{Connection, params};

use super::incarnations;
use super::origins::{OriginUses, RememberedOrigin};
use super::samples::OpenChunks;
use super::schema::sql_offset;
use crate::limits::{REMEMBERED_NAME_BYTES, REMEMBERED_NAMES_BYTES_MAX};
use crate::message::{DatasourceId, Incarnation, KeyId, Offset, RecordRef, Transport};

/// Open chunks that are remembered from one transaction to the next.
const OPEN_CHUNKS_MAX: usize = 200_000;

/// The row ids that one record refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RowIds {
    pub(super) datasource: i64,
    pub(super) topic: i64,
    pub(super) origin: i64,
}

/// One datasource and those of its topics and origins that are remembered.
struct RememberedDatasource {
    id: i64,
    topics: HashMap<Box<str>, i64>,
    /// By media type.
    origins: HashMap<(KeyId, Transport), HashMap<Box<str>, RememberedOrigin>>,
}

impl RememberedDatasource {
    fn new(id: i64) -> Self {
        Self { id, topics: HashMap::new(), origins: HashMap::new() }
    }
}

/// The remembered row ids.
#[derive(Default)]
pub(super) struct RememberedIds {
    datasources: HashMap<Box<str>, RememberedDatasource>,
    remembered_bytes: usize,
    /// The origins that the present transaction uses.
    origin_uses: OriginUses,
    /// Where the samples of remembered topics go.
    open_chunks: OpenChunks,
}

impl RememberedIds {
    /// Forgets everything. Call this when a transaction that may have inserted names was not committed:
    /// their ids do not exist.
    pub(super) fn clear(&mut self) {
        // Within a transaction, what it has used so far is still to be noted.
        *self = Self { origin_uses: std::mem::take(&mut self.origin_uses), ..Self::default() };
    }

    /// Begins a transaction of records below `next`.
    pub(super) fn begin_transaction(&mut self, next: Offset) {
        self.origin_uses.begin_transaction(next);
    }

    /// Notes the origins that the present transaction uses, at its end.
    ///
    /// # Errors
    /// The database's.
    pub(super) fn note_origins(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let mut update =
            connection.prepare_cached("UPDATE origins SET used_below = max(used_below, ?2) WHERE id = ?1")?;
        for origin in self.origin_uses.take_unnoted() {
            update.execute([origin, self.origin_uses.known_below])?;
        }
        Ok(())
    }

    /// Forgets topics of a datasource that are no longer there, as their row ids are given anew. Those of others stay.
    pub(super) fn forget_topics<'t>(&mut self, datasource: i64, gone: impl Iterator<Item = (i64, &'t str)>) {
        let mut known = self.datasources.values_mut().find(|known| known.id == datasource);
        for (id, name) in gone {
            self.open_chunks.remove(&id);
            if let Some(known) = &mut known
                && known.topics.remove(name).is_some()
            {
                self.remembered_bytes -= REMEMBERED_NAME_BYTES + name.len();
            }
        }
    }

    /// Forgets the origins of a datasource that were removed: those that are used below an offset alone.
    pub(super) fn forget_origins(&mut self, datasource: i64, below: i64) {
        let Some(known) = self.datasources.values_mut().find(|known| known.id == datasource) else { return };
        let remembered_bytes = &mut self.remembered_bytes;
        known.origins.retain(|_, origins| {
            origins.retain(|content_type, origin| {
                let is_kept = origin.used_below > below;
                *remembered_bytes -= if is_kept { 0 } else { REMEMBERED_NAME_BYTES + content_type.len() };
                is_kept
            });
            !origins.is_empty()
        });
    }

    /// Where the samples of remembered topics go, for one transaction.
    pub(super) fn take_open_chunks(&mut self) -> OpenChunks {
        std::mem::take(&mut self.open_chunks)
    }

    /// Remembers that. Beyond what is remembered of anything, those of the datasources that have the most topics give way,
    /// one after the other until the rest fits: whoever invents topics closes no chunk of another one.
    pub(super) fn keep_open_chunks(&mut self, mut open_chunks: OpenChunks) {
        if open_chunks.len() > OPEN_CHUNKS_MAX {
            let mut largest: Vec<&RememberedDatasource> = self.datasources.values().collect();
            largest.sort_unstable_by_key(|known| Reverse(known.topics.len()));
            for known in largest {
                for topic in known.topics.values() {
                    open_chunks.remove(topic);
                }
                if open_chunks.len() <= OPEN_CHUNKS_MAX {
                    break;
                }
            }
        }
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

    fn find_remembered(&mut self, record: &RecordRef<'_>, name: &str) -> Option<RowIds> {
        let datasource = self.datasources.get_mut(name)?;
        let topic = *datasource.topics.get(record.topic)?;
        let origins = datasource.origins.get_mut(&(record.key_id, record.transport))?;
        let origin = self.origin_uses.use_at(record.offset, origins.get_mut(record.content_type)?);
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
        let mut new_bytes = 0;
        let known = match self.datasources.get_mut(name) {
            Some(known) => known,
            None => {
                let scope = DatasourceId::parse_scope(record.datasource).map_err(FromSqlError::other)?;
                let id = incarnations::ensure_row(connection, &scope.scope(incarnation), name)?;
                new_bytes += REMEMBERED_NAME_BYTES + name.len();
                self.datasources.entry(name.into()).or_insert(RememberedDatasource::new(id))
            }
        };
        let topic = match known.topics.get(record.topic) {
            Some(topic) => *topic,
            None => {
                let topic = topic_id(connection, record, known.id)?;
                known.topics.insert(record.topic.into(), topic);
                new_bytes += REMEMBERED_NAME_BYTES + record.topic.len();
                topic
            }
        };
        let origins = known.origins.entry((record.key_id, record.transport)).or_default();
        let origin = match origins.get_mut(record.content_type) {
            Some(origin) => self.origin_uses.use_at(record.offset, origin),
            None => {
                let origin = origin_of(connection, record, known.id, &self.origin_uses)?;
                origins.insert(record.content_type.into(), origin);
                new_bytes += REMEMBERED_NAME_BYTES + record.content_type.len();
                origin.id
            }
        };
        self.remembered_bytes += new_bytes;
        Ok(RowIds { datasource: known.id, topic, origin })
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

/// The origin of a record in a datasource, noted as used.
fn origin_of(
    connection: &Connection,
    record: &RecordRef<'_>,
    datasource: i64,
    uses: &OriginUses,
) -> rusqlite::Result<RememberedOrigin> {
    let key_id = record.key_id.to_string();
    connection
        .prepare_cached(
            "INSERT INTO origins (key_id, transport, content_type, datasource_id, used_below) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (key_id, transport, content_type, datasource_id)
                 DO UPDATE SET used_below = max(used_below, ?6)
             RETURNING id, used_below",
        )?
        .query_row(
            params![
                key_id,
                record.transport.as_str(),
                record.content_type,
                datasource,
                uses.new_below,
                uses.known_below
            ],
            |row| Ok(RememberedOrigin { id: row.get(0)?, used_below: row.get(1)? }),
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consume::sink::sample_chunk::ChunkBase;
    use crate::consume::sink::samples::OpenChunk;

    fn remembered(id: i64, topics: std::ops::Range<i64>) -> RememberedDatasource {
        let topics = topics.map(|topic| (topic.to_string().into(), topic)).collect();
        RememberedDatasource { topics, ..RememberedDatasource::new(id) }
    }

    #[test]
    fn a_datasource_with_too_many_topics_closes_its_own_chunks_alone() {
        let count = i64::try_from(OPEN_CHUNKS_MAX).expect("small");
        let mut ids = RememberedIds::default();
        ids.datasources.insert("press-4".into(), remembered(1, 0..10));
        ids.datasources.insert("press-5".into(), remembered(2, 10..count + 1));
        let open = OpenChunk { id: 1, base: ChunkBase { first_offset: 0, base_us: 0 } };
        ids.keep_open_chunks((0..count).map(|topic| (topic, open)).collect());
        assert_eq!(ids.take_open_chunks().len(), OPEN_CHUNKS_MAX, "as many as there may be");
        ids.keep_open_chunks((0..count + 1).map(|topic| (topic, open)).collect());
        let mut left: Vec<i64> = ids.take_open_chunks().into_keys().collect();
        left.sort_unstable();
        assert_eq!(left, (0..10).collect::<Vec<i64>>());
        // Where those of one are not enough, the next largest follows.
        ids.datasources.insert("press-6".into(), remembered(3, count + 1..3 * count));
        ids.datasources.insert("press-7".into(), remembered(4, 3 * count..4 * count + 5));
        ids.keep_open_chunks((1..4 * count + 5).map(|topic| (topic, open)).collect());
        let mut left: Vec<i64> = ids.take_open_chunks().into_keys().collect();
        left.sort_unstable();
        assert_eq!(left, (1..count + 1).collect::<Vec<i64>>());
    }
}
