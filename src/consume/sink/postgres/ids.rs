//! A cache of the row ids of datasources, topics, origins and series in PostgreSQL, so that a record costs a few look-ups in
//! memory and no question to the server.

use std::borrow::Cow;
use std::collections::HashMap;

use headgate_bridge_postgres::PostgresConnection;

use super::{PostgresError, PostgresSink};
use crate::message::{DatasourceId, Incarnation, KeyId, RecordRef, Transport};

/// How many names are remembered. Beyond that, all are forgotten and read again: clients may invent topics without end,
/// which must not cost memory for ever.
const REMEMBERED_NAMES_MAX: usize = 200_000;

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
    series: HashMap<i32, IdsByName>,
    remembered: usize,
}

impl RememberedNames {
    /// Forgets everything. Call this when a transaction that may have inserted names was not committed.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    fn make_room(&mut self) {
        if self.remembered >= REMEMBERED_NAMES_MAX {
            self.clear();
        }
        self.remembered += 1;
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
        self.names.make_room();
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

    /// Learns the row ids of those of a topic's keys that are not remembered, with one statement: a record may have
    /// hundreds that nobody has seen before.
    pub(super) fn learn_series(&mut self, topic: i32, keys: &[&str]) -> Result<(), PostgresError> {
        let known = self.names.series.get(&topic);
        let is_unknown = |key: &&str| known.is_none_or(|known| !known.contains_key(*key));
        let unknown: Vec<&str> = keys.iter().copied().filter(is_unknown).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let texts: Vec<String> = unknown.iter().map(|key| text_of(key).into_owned()).collect();
        let rows = self.connection.query(
            "WITH wanted AS (SELECT DISTINCT key FROM unnest($2::text[]) AS w (key)),
             found AS (SELECT s.id, s.key FROM series s JOIN wanted w ON w.key = s.key WHERE s.topic_id = $1::int),
             made AS (INSERT INTO series (topic_id, key) SELECT $1::int, w.key FROM wanted w
                 WHERE NOT EXISTS (SELECT FROM found f WHERE f.key = w.key)
                 ON CONFLICT (topic_id, key) DO UPDATE SET key = excluded.key RETURNING id, key)
             SELECT id, key FROM found UNION ALL SELECT id, key FROM made",
            &[&topic, &texts],
        )?;
        let ids: HashMap<String, i32> = rows.iter().map(|row| (row.get(1), row.get(0))).collect();
        if self.names.remembered + unknown.len() > REMEMBERED_NAMES_MAX {
            self.names.clear();
        }
        self.names.remembered += unknown.len();
        let series = self.names.series.entry(topic).or_default();
        for (key, text) in unknown.into_iter().zip(&texts) {
            if let Some(id) = ids.get(text) {
                series.insert(key.into(), *id);
            }
        }
        Ok(())
    }

    /// The row id of a topic's samples under a key.
    pub(super) fn series_id(&mut self, topic: i32, key: &str) -> Result<i32, PostgresError> {
        if let Some(id) = self.names.series.get(&topic).and_then(|keys| keys.get(key)) {
            return Ok(*id);
        }
        self.names.make_room();
        let row = self.connection.query_one(
            "WITH found AS (SELECT id FROM series WHERE topic_id = $1::int AND key = $2::text),
             made AS (INSERT INTO series (topic_id, key) SELECT $1::int, $2::text
                 WHERE NOT EXISTS (SELECT FROM found)
                 ON CONFLICT (topic_id, key) DO UPDATE SET key = excluded.key RETURNING id)
             SELECT id FROM found UNION ALL SELECT id FROM made",
            &[&topic, &text_of(key)],
        )?;
        let id = row.get(0);
        self.names.series.entry(topic).or_default().insert(key.into(), id);
        Ok(id)
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
pub(super) fn text_of(text: &str) -> Cow<'_, str> {
    match text.contains('\0') {
        false => Cow::Borrowed(text),
        true => Cow::Owned(text.replace('\0', "\u{2400}")),
    }
}
