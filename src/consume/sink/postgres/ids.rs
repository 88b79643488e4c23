//! A cache of the row ids of datasources, topics, origins and sets of keys in PostgreSQL, so that a record costs a few
//! look-ups in memory and no question to the server.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use headgate_bridge_postgres::{CopyRows, PostgresFault};

use super::{PostgresError, PostgresSink};
use crate::consume::sink::origins::{OriginUses, RememberedOrigin};
use crate::consume::sink::quarantined::is_mark;
use crate::limits::{POSTGRES_KEY_SETS_PER_TOPIC_MAX, REMEMBERED_NAME_BYTES, REMEMBERED_NAMES_BYTES_MAX};
use crate::message::{DatasourceId, Incarnation, KeyId, Offset, RecordRef, Transport};

/// How far ahead in a transaction topics are learnt together with one that is not known.
const LEARNT_AHEAD_RECORDS: usize = 2048;
/// Ids of sets of keys that are taken from the server at a time.
const KEY_SET_IDS_TAKEN: i64 = 256;

/// The row ids that one record refers to.
#[derive(Debug, Clone, Copy)]
pub(super) struct RecordNameIds {
    pub(super) datasource: i32,
    pub(super) topic: i64,
    pub(super) origin: i64,
}

type IdsByName = HashMap<Box<str>, i64>;

/// A datasource, with those of its topics and origins that are remembered.
struct RememberedDatasource {
    id: i32,
    topics: IdsByName,
    /// By media type.
    origins: HashMap<(KeyId, Transport), HashMap<Box<str>, RememberedOrigin>>,
}

/// The remembered row ids.
#[derive(Default)]
pub(super) struct RememberedNames {
    /// By what `datasources` calls it.
    datasources: HashMap<Box<str>, RememberedDatasource>,
    /// The origins that the present transaction uses.
    origin_uses: OriginUses,
    /// By topic.
    key_sets: HashMap<(i64, KeySetDigest), i64>,
    /// The topics that have as many sets as they may. All of these are remembered.
    full_topics: HashSet<i64>,
    /// How many sets topics have that were made since: the server has no others.
    new_topics: HashMap<i64, i64>,
    /// For sets of those.
    key_set_ids: Vec<i64>,
    bytes: usize,
}

impl RememberedNames {
    /// Forgets everything. Call this when a transaction that may have inserted names was not committed.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Forgets topics of these datasources that are no longer there. Others stay: to learn them costs a question each.
    pub(super) fn forget_topics(&mut self, datasources: &HashSet<i32>, gone: &HashSet<i64>) {
        let mut forgotten = 0;
        for known in self.datasources.values_mut().filter(|known| datasources.contains(&known.id)) {
            known.topics.retain(|name, topic| {
                let is_gone = gone.contains(topic);
                forgotten += if is_gone { 2 * REMEMBERED_NAME_BYTES + name.len() } else { 0 };
                !is_gone
            });
        }
        let sets = self.key_sets.len();
        self.key_sets.retain(|(topic, _), _| !gone.contains(topic));
        forgotten += (sets - self.key_sets.len()) * REMEMBERED_NAME_BYTES;
        self.bytes = self.bytes.saturating_sub(forgotten);
        self.full_topics.retain(|topic| !gone.contains(topic));
        self.new_topics.retain(|topic, _| !gone.contains(topic));
    }

    /// Forgets the origins of a datasource that were removed: those that are used below an offset alone.
    pub(super) fn forget_origins(&mut self, datasource: i32, below: i64) {
        let bytes = &mut self.bytes;
        for known in self.datasources.values_mut().filter(|known| known.id == datasource) {
            known.origins.retain(|_, origins| {
                origins.retain(|content_type, origin| {
                    let is_kept = origin.used_below > below;
                    *bytes -= if is_kept { 0 } else { REMEMBERED_NAME_BYTES + content_type.len() };
                    is_kept
                });
                !origins.is_empty()
            });
        }
    }

    /// Begins a transaction of records below `next`.
    pub(super) fn begin_transaction(&mut self, next: Offset) {
        self.origin_uses.begin_transaction(next);
    }

    /// Makes room for the names of a transaction, before it: it relies on what it has remembered.
    pub(super) fn make_room(&mut self) {
        if self.bytes >= REMEMBERED_NAMES_BYTES_MAX {
            self.clear();
        }
    }

    fn find(&mut self, record: &RecordRef<'_>, name: &str) -> Option<RecordNameIds> {
        let known = self.datasources.get_mut(name)?;
        let topic = *known.topics.get(record.topic)?;
        let origin = self.origin_uses.use_at(record.offset, known.origin_mut(record)?);
        Some(RecordNameIds { datasource: known.id, topic, origin })
    }
}

impl RememberedDatasource {
    fn has_origin(&self, record: &RecordRef<'_>) -> bool {
        let origins = self.origins.get(&(record.key_id, record.transport));
        origins.is_some_and(|origins| origins.contains_key(record.content_type))
    }

    fn origin_mut(&mut self, record: &RecordRef<'_>) -> Option<&mut RememberedOrigin> {
        self.origins.get_mut(&(record.key_id, record.transport))?.get_mut(record.content_type)
    }
}

impl PostgresSink {
    /// The row ids of a record, which is of this incarnation of its datasource; `name` is what `datasources` calls that.
    /// Inserts a name that the database does not have.
    /// `ahead` are the records after it.
    pub(super) fn name_ids(
        &mut self,
        record: &RecordRef<'_>,
        name: &str,
        incarnation: Incarnation,
        ahead: &[RecordRef<'_>],
    ) -> Result<RecordNameIds, PostgresError> {
        if let Some(ids) = self.names.find(record, name) {
            return Ok(ids);
        }
        let Ok(scope) = DatasourceId::parse_scope(record.datasource).map(|id| id.scope(incarnation)) else {
            // No intake lets such a record in.
            return Ok(RecordNameIds { datasource: 0, topic: 0, origin: 0 });
        };
        let datasource = match self.names.datasources.get(name) {
            Some(known) => known.id,
            None => {
                let datasource = self.ensure_datasource(&scope, name)?;
                let (topics, origins) = Default::default();
                let known = RememberedDatasource { id: datasource, topics, origins };
                self.names.datasources.insert(name.into(), known);
                self.names.bytes += REMEMBERED_NAME_BYTES + name.len();
                datasource
            }
        };
        self.learn_topics(datasource, name, record, ahead)?;
        let known = self.names.datasources.get(name);
        let topic = known.and_then(|known| known.topics.get(record.topic)).copied().unwrap_or_default();
        if !known.is_some_and(|known| known.has_origin(record)) {
            self.learn_origin(datasource, name, record, ahead)?;
        }
        let names = &mut self.names;
        let known = names.datasources.get_mut(name);
        let origin = known.and_then(|known| known.origin_mut(record)).ok_or_else(no_id)?;
        Ok(RecordNameIds { datasource, topic, origin: names.origin_uses.use_at(record.offset, origin) })
    }

    /// Notes the origins that the present transaction uses, at its end and all at once.
    pub(super) fn note_origins(&mut self) -> Result<(), PostgresError> {
        let unnoted = self.names.origin_uses.take_unnoted();
        if !unnoted.is_empty() {
            self.connection.execute(
                "UPDATE origins SET used_below = $2::bigint WHERE id = ANY($1::bigint[]) AND used_below < $2::bigint",
                &[&unnoted, &self.names.origin_uses.known_below],
            )?;
        }
        Ok(())
    }

    /// Learns the topic of a record, unless it is known, and those of the records after it under the same key, which is of
    /// one incarnation.
    fn learn_topics(
        &mut self,
        datasource: i32,
        name: &str,
        record: &RecordRef<'_>,
        ahead: &[RecordRef<'_>],
    ) -> Result<(), PostgresError> {
        let names = &mut self.names;
        let Some(RememberedDatasource { topics: known, .. }) = names.datasources.get_mut(name) else {
            return Ok(());
        };
        if known.contains_key(record.topic) {
            return Ok(());
        }
        let is_of_same = |next: &&RecordRef<'_>| {
            next.key_id == record.key_id
                && next.datasource == record.datasource
                && !is_mark(next)
                && !known.contains_key(next.topic)
        };
        let ahead = ahead.iter().take(LEARNT_AHEAD_RECORDS).filter(is_of_same);
        let wanted: HashSet<&str> = ahead.chain([record]).map(|record| record.topic).collect();
        let texts: Vec<Cow<'_, str>> = wanted.iter().map(|topic| text_of(topic)).collect();
        let texts: Vec<&str> = texts.iter().map(|text| &**text).collect();
        let rows = self.connection.query(
            "WITH wanted AS (SELECT DISTINCT topic FROM unnest($2::text[]) AS w (topic)),
             made AS (INSERT INTO topics (datasource_id, topic, latest_offset) SELECT $1::int, w.topic, -1 FROM wanted w
                 WHERE NOT EXISTS (SELECT FROM topics t WHERE t.datasource_id = $1::int AND t.topic = w.topic)
                 RETURNING id, topic)
             SELECT id::bigint, topic, true FROM made
             UNION ALL SELECT t.id::bigint, t.topic, false FROM topics t JOIN wanted w ON w.topic = t.topic
             WHERE t.datasource_id = $1::int",
            &[&datasource, &texts],
        )?;
        let mut ids: HashMap<&str, i64> = HashMap::new();
        for row in &rows {
            let id = row.get(0);
            ids.insert(row.get(1), id);
            if row.get(2) {
                names.new_topics.insert(id, 0);
                self.sizes.add_name(datasource, row.get(1));
            }
        }
        for topic in wanted {
            if let Some(id) = ids.get(&*text_of(topic)) {
                known.insert(topic.into(), *id);
                names.bytes += 2 * REMEMBERED_NAME_BYTES + topic.len();
            }
        }
        Ok(())
    }

    /// Learns the origin of a record, and those of the records after it under the same key over the same transport, and notes
    /// that this transaction uses them: media types are the senders' to choose, and one question for each record would hold
    /// up everybody's. Those that were there before are noted some way ahead, as they come again.
    fn learn_origin(
        &mut self,
        datasource: i32,
        name: &str,
        record: &RecordRef<'_>,
        ahead: &[RecordRef<'_>],
    ) -> Result<(), PostgresError> {
        let names = &mut self.names;
        let known = names.datasources.get_mut(name).ok_or_else(no_id)?;
        let is_of_same = |next: &&RecordRef<'_>| {
            (next.key_id, next.transport, next.datasource)
                == (record.key_id, record.transport, record.datasource)
                && !known.has_origin(next)
                && !is_mark(next)
        };
        let ahead = ahead.iter().take(LEARNT_AHEAD_RECORDS).filter(is_of_same);
        let wanted: HashSet<&str> = ahead.chain([record]).map(|record| record.content_type).collect();
        let texts: Vec<Cow<'_, str>> = wanted.iter().map(|content_type| text_of(content_type)).collect();
        let texts: Vec<&str> = texts.iter().map(|text| &**text).collect();
        let rows = self.connection.query(
            // What is there takes no new id.
            "WITH wanted AS (SELECT DISTINCT content_type FROM unnest($3::text[]) AS w (content_type)),
             used AS (UPDATE origins o SET used_below = greatest(o.used_below, $5::bigint) FROM wanted w
                 WHERE o.key_id = $1::text AND o.transport = $2::text AND o.content_type = w.content_type
                     AND o.datasource_id = $4::int RETURNING o.id, o.content_type, o.used_below),
             made AS (INSERT INTO origins (key_id, transport, content_type, datasource_id, used_below)
                 SELECT $1::text, $2::text, w.content_type, $4::int, $6::bigint FROM wanted w
                 WHERE NOT EXISTS (SELECT FROM used u WHERE u.content_type = w.content_type)
                 RETURNING id, content_type, used_below)
             SELECT id::bigint, content_type, used_below, true FROM made
             UNION ALL SELECT id::bigint, content_type, used_below, false FROM used",
            &[
                &record.key_id.to_string(),
                &record.transport.as_str(),
                &texts,
                &datasource,
                &names.origin_uses.known_below,
                &names.origin_uses.new_below,
            ],
        )?;
        let mut learnt: HashMap<&str, RememberedOrigin> = HashMap::new();
        for row in &rows {
            learnt.insert(row.get(1), RememberedOrigin { id: row.get(0), used_below: row.get(2) });
            if row.get(3) {
                self.sizes.add_name(datasource, row.get(1));
            }
        }
        let origins = known.origins.entry((record.key_id, record.transport)).or_default();
        for content_type in wanted {
            if let Some(origin) = learnt.get(&*text_of(content_type))
                && origins.insert(content_type.into(), *origin).is_none()
            {
                names.bytes += REMEMBERED_NAME_BYTES + content_type.len();
            }
        }
        Ok(())
    }

    /// The row id of a set of a topic's keys, if it is remembered.
    pub(super) fn known_key_set(&self, topic: i64, digest: KeySetDigest) -> Option<i64> {
        self.names.key_sets.get(&(topic, digest)).copied()
    }

    /// The row id of a set of a topic's keys. Inserts one that the database does not have, unless the topic has
    /// [`POSTGRES_KEY_SETS_PER_TOPIC_MAX`] already: then there is none.
    pub(super) fn learn_key_set<'k>(
        &mut self,
        rows: &mut CopyRows,
        topic: i64,
        digest: KeySetDigest,
        keys: impl Iterator<Item = &'k str>,
    ) -> Result<Option<i64>, PostgresError> {
        if self.names.full_topics.contains(&topic) {
            return Ok(None);
        }
        let keys: Vec<Cow<'_, str>> = keys.map(text_of).collect();
        if let Some(sets) = self.names.new_topics.get_mut(&topic) {
            *sets += 1;
            return match *sets > POSTGRES_KEY_SETS_PER_TOPIC_MAX {
                true => Ok(None),
                false => self.add_key_set(rows, topic, digest, &keys).map(Some),
            };
        }
        let keys: Vec<&str> = keys.iter().map(|key| &**key).collect();
        let rows = self.connection.query(
            "WITH found AS (SELECT id FROM key_sets WHERE topic_id = $1::bigint AND digest = $2::bytea),
             made AS (INSERT INTO key_sets (topic_id, digest, keys) SELECT $1::bigint, $2::bytea, $3::text[]
                 WHERE NOT EXISTS (SELECT FROM found)
                     AND (SELECT count(*) FROM key_sets WHERE topic_id = $1::bigint) < $4::bigint
                 ON CONFLICT (topic_id, digest) DO UPDATE SET digest = excluded.digest RETURNING id)
             SELECT id::bigint FROM found UNION ALL SELECT id::bigint FROM made",
            &[&topic, &&digest.0[..], &keys, &POSTGRES_KEY_SETS_PER_TOPIC_MAX],
        )?;
        let Some(row) = rows.first() else {
            self.learn_full_topic(topic)?;
            return Ok(None);
        };
        let id = row.get(0);
        self.names.key_sets.insert((topic, digest), id);
        self.names.bytes += REMEMBERED_NAME_BYTES;
        Ok(Some(id))
    }

    /// Adds the row of a set that the server does not have.
    fn add_key_set(
        &mut self,
        rows: &mut CopyRows,
        topic: i64,
        digest: KeySetDigest,
        keys: &[Cow<'_, str>],
    ) -> Result<i64, PostgresError> {
        if self.names.key_set_ids.is_empty() {
            let taken = self.connection.query(
                "SELECT nextval(pg_get_serial_sequence('key_sets', 'id')) FROM generate_series(1, $1::bigint)",
                &[&KEY_SET_IDS_TAKEN],
            )?;
            self.names.key_set_ids = taken.iter().map(|row| row.get(0)).collect();
        }
        let Some(id) = self.names.key_set_ids.pop() else {
            return Err(PostgresFault::Io(std::io::Error::other("the server has given no ids")).into());
        };
        rows.begin(4);
        self.put_id(rows, id);
        self.put_id(rows, topic);
        rows.bytes(&digest.0);
        rows.text_array(keys.iter().map(|key| &**key));
        self.names.key_sets.insert((topic, digest), id);
        self.names.bytes += REMEMBERED_NAME_BYTES;
        Ok(id)
    }

    /// Adds an id of a topic, an origin or a set of keys to a row that is copied.
    pub(super) fn put_id(&self, rows: &mut CopyRows, id: i64) {
        match self.has_wide_ids {
            true => rows.int8(id),
            // The server gives no larger one then.
            false => rows.int4(i32::try_from(id).unwrap_or_default()),
        }
    }

    /// Learns all sets of a topic that gets no further ones, so that nobody asks for those that it does not have.
    fn learn_full_topic(&mut self, topic: i64) -> Result<(), PostgresError> {
        let rows = self
            .connection
            .query("SELECT id::bigint, digest FROM key_sets WHERE topic_id = $1::bigint", &[&topic])?;
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

fn no_id() -> PostgresFault {
    PostgresFault::Io(std::io::Error::other("the server has given no id"))
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

/// A text as PostgreSQL takes it: it has no NUL, which is shown as its picture.
pub(in crate::consume) fn text_of(text: &str) -> Cow<'_, str> {
    match text.contains('\0') {
        false => Cow::Borrowed(text),
        true => Cow::Owned(text.replace('\0', "\u{2400}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consume::testing::record;
    use crate::limits::ORIGIN_USE_OFFSETS;

    /// With as many devices of their own keys as offsets are noted ahead, each record was a question to the server.
    #[test]
    fn a_record_of_a_known_origin_costs_no_question_whatever_came_in_between() {
        let first = record(0, "press-4", "a", b"");
        let origin = RememberedOrigin { id: 7, used_below: 1 };
        let known = RememberedDatasource {
            id: 1,
            topics: [("a".into(), 2)].into(),
            origins: [((first.key_id, first.transport), [(first.content_type.into(), origin)].into())].into(),
        };
        let mut names = RememberedNames::default();
        names.datasources.insert("press-4".into(), known);
        let mut noted = 0;
        for offset in [0, ORIGIN_USE_OFFSETS, ORIGIN_USE_OFFSETS + 1, 10 * ORIGIN_USE_OFFSETS] {
            names.begin_transaction(offset + 1);
            let ids = names.find(&record(offset, "press-4", "a", b""), "press-4").expect("known");
            assert_eq!((ids.datasource, ids.topic, ids.origin), (1, 2, 7));
            noted += names.origin_uses.take_unnoted().len();
        }
        assert_eq!(noted, 2);
    }
}
