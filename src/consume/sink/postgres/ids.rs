//! A cache of the row ids of datasources, topics, origins and sets of keys in PostgreSQL, so that a record costs a few look-ups in
//! memory and no question to the server.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use headgate_bridge_postgres::PostgresConnection;

use super::{PostgresError, PostgresSink};
use crate::limits::{POSTGRES_KEY_SETS_PER_TOPIC_MAX, REMEMBERED_NAME_BYTES, REMEMBERED_NAMES_BYTES_MAX};
use crate::message::{DatasourceId, Incarnation, KeyId, RecordRef, Transport};

/// The row ids that one record refers to.
#[derive(Debug, Clone, Copy)]
pub(super) struct RecordNameIds {
    pub(super) datasource: i32,
    pub(super) topic: i32,
    pub(super) origin: i32,
}

type IdsByName = HashMap<Box<str>, i32>;

/// The remembered row ids.
#[derive(Default)]
pub(super) struct RememberedNames {
    /// By what `datasources` calls it: its id, and those of its topics.
    datasources: HashMap<Box<str>, (i32, IdsByName)>,
    origins: HashMap<(KeyId, Transport), IdsByName>,
    /// By topic.
    key_sets: HashMap<(i32, KeySetDigest), i32>,
    /// The topics that have as many sets as they may. All of these are remembered.
    full_topics: HashSet<i32>,
    bytes: usize,
}

impl RememberedNames {
    /// Forgets everything. Call this when a transaction that may have inserted names was not committed.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Makes room for so many names, which have so many bytes.
    fn make_room(&mut self, names: usize, bytes: usize) {
        if self.bytes >= REMEMBERED_NAMES_BYTES_MAX {
            self.clear();
        }
        self.bytes += names * REMEMBERED_NAME_BYTES + bytes;
    }

    fn find(&self, record: &RecordRef<'_>, name: &str) -> Option<RecordNameIds> {
        let (datasource, topics) = self.datasources.get(name)?;
        let topic = *topics.get(record.topic)?;
        let origins = self.origins.get(&(record.key_id, record.transport))?;
        let origin = *origins.get(record.content_type)?;
        Some(RecordNameIds { datasource: *datasource, topic, origin })
    }
}

impl PostgresSink {
    /// The row ids of a record, which is of this incarnation of its datasource; `name` is what `datasources` calls that.
    /// Inserts a name that the database does not have.
    pub(super) fn name_ids(
        &mut self,
        record: &RecordRef<'_>,
        name: &str,
        incarnation: Incarnation,
    ) -> Result<RecordNameIds, PostgresError> {
        if let Some(ids) = self.names.find(record, name) {
            return Ok(ids);
        }
        // At most one of each is new.
        self.names.make_room(3, name.len() + record.topic.len() + record.content_type.len());
        let Ok(scope) = DatasourceId::parse_scope(record.datasource).map(|id| id.scope(incarnation)) else {
            // No intake lets such a record in.
            return Ok(RecordNameIds { datasource: 0, topic: 0, origin: 0 });
        };
        let datasource = self.ensure_datasource(&scope, name)?;
        let topic = ensure_topic(&self.connection, datasource, record.topic)?;
        let origin = self.connection.query_one(
            // What is there takes no new id: there are only so many.
            "WITH found AS (SELECT id FROM origins
                 WHERE key_id = $1::text AND transport = $2::text AND content_type = $3::text),
             made AS (INSERT INTO origins (key_id, transport, content_type) SELECT $1::text, $2::text, $3::text
                 WHERE NOT EXISTS (SELECT FROM found)
                 ON CONFLICT (key_id, transport, content_type) DO UPDATE SET key_id = excluded.key_id RETURNING id)
             SELECT id FROM found UNION ALL SELECT id FROM made",
            &[&record.key_id.to_string(), &record.transport.as_str(), &text_of(record.content_type)],
        )?;
        let origin = origin.get(0);
        let (_, topics) =
            self.names.datasources.entry(name.into()).or_insert_with(|| (datasource, HashMap::new()));
        topics.insert(record.topic.into(), topic);
        let origins = self.names.origins.entry((record.key_id, record.transport)).or_default();
        origins.insert(record.content_type.into(), origin);
        Ok(RecordNameIds { datasource, topic, origin })
    }

    /// The row id of a set of a topic's keys, if it is remembered.
    pub(super) fn known_key_set(&self, topic: i32, digest: KeySetDigest) -> Option<i32> {
        self.names.key_sets.get(&(topic, digest)).copied()
    }

    /// The row id of a set of a topic's keys. Inserts one that the database does not have, unless the topic has
    /// [`POSTGRES_KEY_SETS_PER_TOPIC_MAX`] already: then there is none.
    pub(super) fn learn_key_set<'k>(
        &mut self,
        topic: i32,
        digest: KeySetDigest,
        keys: impl Iterator<Item = &'k str>,
    ) -> Result<Option<i32>, PostgresError> {
        if self.names.full_topics.contains(&topic) {
            return Ok(None);
        }
        let keys: Vec<Cow<'_, str>> = keys.map(text_of).collect();
        let keys: Vec<&str> = keys.iter().map(|key| &**key).collect();
        let rows = self.connection.query(
            "WITH found AS (SELECT id FROM key_sets WHERE topic_id = $1::int AND digest = $2::bytea),
             made AS (INSERT INTO key_sets (topic_id, digest, keys) SELECT $1::int, $2::bytea, $3::text[]
                 WHERE NOT EXISTS (SELECT FROM found)
                     AND (SELECT count(*) FROM key_sets WHERE topic_id = $1::int) < $4::bigint
                 ON CONFLICT (topic_id, digest) DO UPDATE SET digest = excluded.digest RETURNING id)
             SELECT id FROM found UNION ALL SELECT id FROM made",
            &[&topic, &&digest.0[..], &keys, &POSTGRES_KEY_SETS_PER_TOPIC_MAX],
        )?;
        self.names.make_room(1, 0);
        let Some(row) = rows.first() else {
            self.learn_full_topic(topic)?;
            return Ok(None);
        };
        let id = row.get(0);
        self.names.key_sets.insert((topic, digest), id);
        Ok(Some(id))
    }

    /// Learns all sets of a topic that gets no further ones, so that nobody asks for those that it does not have.
    fn learn_full_topic(&mut self, topic: i32) -> Result<(), PostgresError> {
        let rows = self.connection.query("SELECT id, digest FROM key_sets WHERE topic_id = $1", &[&topic])?;
        for row in &rows {
            if let Ok(digest) = row.get::<_, &[u8]>(1).try_into() {
                self.names.key_sets.insert((topic, KeySetDigest(digest)), row.get(0));
            }
        }
        self.names.bytes += rows.len() * REMEMBERED_NAME_BYTES;
        self.names.full_topics.insert(topic);
        Ok(())
    }
}

/// By what a set of keys is found: a digest of them in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct KeySetDigest([u8; 32]);

impl KeySetDigest {
    /// That of these keys.
    pub(super) fn of<'k>(keys: impl Iterator<Item = &'k str>) -> Self {
        let mut hasher = blake3::Hasher::new();
        for key in keys {
            hasher.update(&(key.len() as u64).to_le_bytes());
            hasher.update(key.as_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }
}

/// The row of a topic; without one, makes it.
pub(super) fn ensure_topic(
    connection: &PostgresConnection,
    datasource: i32,
    topic: &str,
) -> Result<i32, PostgresError> {
    let row = connection.query_one(
        "WITH found AS (SELECT id FROM topics WHERE datasource_id = $1::int AND topic = $2::text),
         made AS (INSERT INTO topics (datasource_id, topic, latest_offset) SELECT $1::int, $2::text, -1
             WHERE NOT EXISTS (SELECT FROM found)
             ON CONFLICT (datasource_id, topic) DO UPDATE SET topic = excluded.topic RETURNING id)
         SELECT id FROM found UNION ALL SELECT id FROM made",
        &[&datasource, &text_of(topic)],
    )?;
    Ok(row.get(0))
}

/// A text as PostgreSQL takes it: it has no NUL, which is shown as its picture.
pub(in crate::consume) fn text_of(text: &str) -> Cow<'_, str> {
    match text.contains('\0') {
        false => Cow::Borrowed(text),
        true => Cow::Owned(text.replace('\0', "\u{2400}")),
    }
}
