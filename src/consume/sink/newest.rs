//! The newest values among the records of one transaction, gathered in memory so that a key that
//! changes a thousand times in it is written once.
//!
//! A payload that is a JSON object gives a value to each of its top-level keys; any other payload is
//! itself the value of the key `""`. Payloads of other shapes (`src/values/shape`) give the values that those have, the one with
//! the latest time where a key has several. Of a member that an object has twice, the first one counts: SQLite's JSON
//! functions read that one in the payloads and values of every view. A topic keeps its [`LATEST_KEYS_PER_TOPIC_MAX`] newest keys: one
//! more replaces the key whose value is oldest.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::HashSet;
use std::fmt;

use hashbrown::HashMap;
use rusqlite::types::{self, ToSqlOutput, ValueRef};
use rusqlite::{Connection, Row, params};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::ids::RowIds;
use super::schema::sql_offset;
use crate::consume::render;
use crate::limits::{
    GATHERED_KEYS_MAX, LATEST_KEY_BYTES_MAX, LATEST_KEYS_PER_TOPIC_MAX, LATEST_LOOK_BACK_MAX,
    LATEST_VALUE_BYTES_MAX,
};
use crate::message::{Offset, RecordRef, TimeMicros};
use crate::values::ShapedPayload;
use crate::values::samples::{JsonMember, MemberName};

/// The newest values, by the topic's row id.
#[derive(Default)]
pub(super) struct NewestValues<'a> {
    topics: HashMap<i64, NewestTopic<'a>>,
    /// How many topics and keys there are.
    gathered: usize,
    /// The values of the present payload, if it is of another shape; kept for its allocation.
    shaped: Vec<ShapedEntry>,
}

/// The newest values of one topic.
pub(super) struct NewestTopic<'a> {
    /// The row id of its datasource.
    pub(super) datasource: i64,
    /// Its newest record.
    pub(super) record: RecordRef<'a>,
    pub(super) values: Vec<NewestEntry<'a>>,
    /// The position of each key in `values`.
    places: HashMap<Cow<'a, str>, usize>,
}

/// The newest value of one key.
pub(super) struct NewestEntry<'a> {
    pub(super) key: Cow<'a, str>,
    value: PayloadValue<'a>,
    pub(super) offset: Offset,
    pub(super) received_at: TimeMicros,
}

/// A value as it is kept.
pub(super) enum KeptValue<'a> {
    /// JSON.
    Json(Cow<'a, str>),
    /// A payload that is no text.
    Bytes(&'a [u8]),
    /// One that is too long to be copied.
    TooLong,
}

/// A value as the payload has it.
enum PayloadValue<'a> {
    /// JSON or other text.
    Text(Cow<'a, str>),
    /// A payload that is not text.
    Bytes(&'a [u8]),
}

impl<'a> NewestValues<'a> {
    /// Adds the next record; `text` is its payload, if it is text, and `members` are its members, if it is a JSON object.
    pub(super) fn observe(
        &mut self,
        row: RowIds,
        record: &RecordRef<'a>,
        text: Option<&'a str>,
        members: Option<&mut Vec<JsonMember<'a>>>,
    ) {
        let gathered = &mut self.gathered;
        let topic = self.topics.entry(row.topic).or_insert_with(|| {
            *gathered += 1;
            NewestTopic {
                datasource: row.datasource,
                record: *record,
                values: Vec::new(),
                places: HashMap::new(),
            }
        });
        let keys = topic.values.len();
        topic.record = *record;
        if let Some(text) = text
            && read_shaped(&shaped_payload(record, text), &mut self.shaped)
        {
            for (place, ShapedEntry { key, json, .. }) in self.shaped.drain(..).enumerate() {
                topic.set(place, Cow::Owned(key), PayloadValue::Text(Cow::Owned(json)), record);
            }
        } else if let Some(members) = members {
            for (place, (key, value)) in members.drain(..).enumerate() {
                topic.set(place, key, PayloadValue::Text(Cow::Borrowed(value)), record);
            }
        } else {
            let value = match text {
                Some(text) => PayloadValue::Text(Cow::Borrowed(text)),
                None => PayloadValue::Bytes(record.payload),
            };
            topic.set(0, Cow::Borrowed(""), value, record);
        }
        *gathered += topic.values.len() - keys;
    }

    /// Whether there is so much that it is to be written before more is added.
    pub(super) fn is_full(&self) -> bool {
        self.gathered >= GATHERED_KEYS_MAX
    }

    /// As [`NewestValues::observe`], where nobody has read the members yet, and only the topic has a row id.
    pub(super) fn observe_payload(&mut self, topic_id: i64, record: &RecordRef<'a>, text: Option<&'a str>) {
        let mut members = Vec::new();
        let is_object = text.is_some_and(|text| read_members(text, &mut members));
        let row = RowIds { datasource: 0, topic: topic_id, origin: 0 };
        self.observe(row, record, text, is_object.then_some(&mut members));
    }

    /// The topics, each with the offset of its newest record and its newest values.
    pub(super) fn into_topics(self) -> impl Iterator<Item = (i64, Offset, Vec<NewestEntry<'a>>)> {
        self.topics.into_iter().map(|(topic_id, mut topic)| {
            topic.keep_newest();
            (topic_id, topic.record.offset, topic.values)
        })
    }

    /// The row ids of the topics, and the topics as they were written.
    pub(super) fn written(&self) -> impl Iterator<Item = (i64, &NewestTopic<'a>)> {
        self.topics.iter().map(|(topic_id, topic)| (*topic_id, topic))
    }

    /// Writes the gathered values, in the transaction that `connection` is in.
    ///
    /// # Errors
    /// The database's.
    pub(super) fn write(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let mut topic_row =
            connection.prepare_cached("UPDATE topics SET latest_offset = ?2 WHERE id = ?1")?;
        let mut change = connection.prepare_cached(
            "UPDATE latest_values SET value = ?3, offset = ?4, received_us = ?5
             WHERE topic_id = ?1 AND key = ?2",
        )?;
        let mut add = connection.prepare_cached(
            "INSERT INTO latest_values (topic_id, key, value, offset, received_us)
             VALUES (?1, ?2, ?3, ?4, ?5)",
        )?;
        for (&topic_id, topic) in &mut self.topics {
            topic.keep_newest();
            topic_row.execute(params![topic_id, sql_offset(topic.record.offset)])?;
            let mut added = false;
            for newer in &topic.values {
                let (offset, value) = (sql_offset(newer.offset), newer.value.to_sql());
                let row = params![topic_id, newer.key, value, offset, newer.received_at];
                if change.execute(row)? == 0 {
                    add.execute(row)?;
                    added = true;
                }
            }
            if added {
                forget_oldest(connection, topic_id)?;
            }
        }
        Ok(())
    }
}

/// Forgets the values of a topic whose records are in `temp.moved` and no longer in `entries`, and looks
/// for their replacements in the [`LATEST_LOOK_BACK_MAX`] newest records that are left.
pub(super) fn forget_moved(connection: &Connection, topic_id: i64) -> rusqlite::Result<()> {
    let mut wanted = connection
        .prepare_cached(
            "DELETE FROM latest_values WHERE topic_id = ?1 AND offset IN (SELECT offset FROM temp.moved)
             RETURNING key",
        )?
        .query_map([topic_id], |row| row.get(0))?
        .collect::<rusqlite::Result<HashSet<String>>>()?;
    set_latest_offset(connection, topic_id)?;
    let mut entries = connection.prepare_cached(
        "SELECT e.offset, e.received_us, e.payload, o.content_type, t.topic
         FROM entries e JOIN origins o ON o.id = e.origin_id JOIN topics t ON t.id = e.topic_id
         WHERE e.topic_id = ?1 ORDER BY e.offset DESC LIMIT ?2",
    )?;
    let mut rows = entries.query([topic_id, i64::try_from(LATEST_LOOK_BACK_MAX).unwrap_or(i64::MAX)])?;
    while !wanted.is_empty()
        && let Some(row) = rows.next()?
    {
        put_values(connection, topic_id, row, |key| wanted.remove(key))?;
    }
    Ok(())
}

/// Restores the values of a topic's records that are in `temp.moved` and back in `entries`, where they are
/// newer than the present values.
pub(super) fn restore_moved(connection: &Connection, topic_id: i64) -> rusqlite::Result<()> {
    set_latest_offset(connection, topic_id)?;
    let mut entries = connection.prepare_cached(
        "SELECT e.offset, e.received_us, e.payload, o.content_type, t.topic
         FROM entries e JOIN origins o ON o.id = e.origin_id JOIN topics t ON t.id = e.topic_id
         WHERE e.topic_id = ?1 AND e.offset IN (SELECT offset FROM temp.moved) ORDER BY e.offset",
    )?;
    let mut rows = entries.query([topic_id])?;
    while let Some(row) = rows.next()? {
        put_values(connection, topic_id, row, |_| true)?;
    }
    forget_oldest(connection, topic_id)
}

fn set_latest_offset(connection: &Connection, topic_id: i64) -> rusqlite::Result<()> {
    // -1 is no record's offset, and a topic without records is not shown.
    let mut update = connection.prepare_cached(
        "UPDATE topics SET latest_offset =
             coalesce((SELECT max(offset) FROM entries WHERE topic_id = ?1), -1) WHERE id = ?1",
    )?;
    update.execute([topic_id])?;
    Ok(())
}

/// Writes those values of one record (`offset, received_us, payload, content_type, topic`) that are `wanted` and newer than the
/// present ones.
fn put_values(
    connection: &Connection,
    topic_id: i64,
    row: &Row<'_>,
    mut wanted: impl FnMut(&str) -> bool,
) -> rusqlite::Result<()> {
    let mut put = connection.prepare_cached(
        "INSERT INTO latest_values (topic_id, key, value, offset, received_us) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT DO UPDATE SET value = excluded.value, offset = excluded.offset,
             received_us = excluded.received_us
         WHERE excluded.offset > latest_values.offset",
    )?;
    let (offset, received_at): (i64, TimeMicros) = (row.get(0)?, row.get(1)?);
    let payload = row.get_ref(2)?;
    let mut members = Vec::new();
    let values = match payload {
        ValueRef::Text(_) => {
            let text = payload.as_str()?;
            let (content_type, topic) = (row.get_ref(3)?.as_str()?, row.get_ref(4)?.as_str()?);
            let mut shaped = Vec::new();
            if read_shaped(&ShapedPayload { topic, content_type, text, received_at }, &mut shaped) {
                let owned =
                    |entry: ShapedEntry| (Cow::Owned(entry.key), PayloadValue::Text(Cow::Owned(entry.json)));
                shaped.into_iter().map(owned).collect()
            } else if read_members(text, &mut members) {
                let borrowed = |(key, value)| (key, PayloadValue::Text(Cow::Borrowed(value)));
                members.into_iter().map(borrowed).collect()
            } else {
                vec![(Cow::Borrowed(""), PayloadValue::Text(Cow::Borrowed(text)))]
            }
        }
        payload => vec![(Cow::Borrowed(""), PayloadValue::Bytes(payload.as_bytes()?))],
    };
    for (key, value) in values {
        if key.len() <= LATEST_KEY_BYTES_MAX && wanted(&key) {
            put.execute(params![topic_id, key, value.to_sql(), offset, received_at])?;
        }
    }
    Ok(())
}

/// Deletes a topic's oldest values beyond [`LATEST_KEYS_PER_TOPIC_MAX`].
fn forget_oldest(connection: &Connection, topic_id: i64) -> rusqlite::Result<()> {
    let mut forget = connection.prepare_cached(
        "DELETE FROM latest_values WHERE topic_id = ?1 AND key IN (
            SELECT key FROM latest_values WHERE topic_id = ?1 ORDER BY offset DESC, key LIMIT -1 OFFSET ?2
         )",
    )?;
    forget.execute(params![topic_id, i64::try_from(LATEST_KEYS_PER_TOPIC_MAX).unwrap_or(i64::MAX)])?;
    Ok(())
}

impl<'a> NewestTopic<'a> {
    /// Sets the value of a key, unless this record has set it already. Objects of one topic mostly have the same keys in the same order, so the
    /// search begins at the key's `place` in its object.
    fn set(&mut self, place: usize, key: Cow<'a, str>, value: PayloadValue<'a>, record: &RecordRef<'a>) {
        if key.len() > LATEST_KEY_BYTES_MAX {
            return;
        }
        let place = match self.values.get(place) {
            Some(there) if there.key == key => Some(place),
            _ => self.places.get(&key).copied(),
        };
        match place {
            Some(place) => {
                let newer = &mut self.values[place];
                if newer.offset != record.offset {
                    (newer.value, newer.offset, newer.received_at) =
                        (value, record.offset, record.received_at);
                }
            }
            None => {
                self.places.insert(key.clone(), self.values.len());
                self.values.push(NewestEntry {
                    key,
                    value,
                    offset: record.offset,
                    received_at: record.received_at,
                });
            }
        }
    }

    /// Leaves the newest values, no more than [`LATEST_KEYS_PER_TOPIC_MAX`].
    fn keep_newest(&mut self) {
        if self.values.len() > LATEST_KEYS_PER_TOPIC_MAX {
            self.values.sort_by_key(|newer| Reverse(newer.offset));
            self.values.truncate(LATEST_KEYS_PER_TOPIC_MAX);
            self.places.clear();
        }
    }
}

impl<'a> NewestEntry<'a> {
    /// The value as it is kept.
    pub(super) fn kept(&self) -> KeptValue<'_> {
        self.value.kept()
    }
}

impl<'a> PayloadValue<'a> {
    fn kept(&self) -> KeptValue<'_> {
        match self {
            PayloadValue::Text(text) if text.len() <= LATEST_VALUE_BYTES_MAX => {
                KeptValue::Json(match render::portable_json(text) {
                    Some(json) => Cow::Borrowed(json),
                    None => Cow::Owned(serde_json::Value::from(&**text).to_string()),
                })
            }
            PayloadValue::Bytes(bytes) if bytes.len() <= LATEST_VALUE_BYTES_MAX => KeptValue::Bytes(bytes),
            PayloadValue::Text(_) | PayloadValue::Bytes(_) => KeptValue::TooLong,
        }
    }

    /// The form in `latest_values`: JSON, a BLOB, or NULL for a value that is too long.
    fn to_sql(&self) -> ToSqlOutput<'_> {
        match self.kept() {
            KeptValue::Json(Cow::Borrowed(json)) => ToSqlOutput::Borrowed(ValueRef::Text(json.as_bytes())),
            KeptValue::Json(Cow::Owned(json)) => ToSqlOutput::Owned(types::Value::Text(json)),
            KeptValue::Bytes(bytes) => ToSqlOutput::Borrowed(ValueRef::Blob(bytes)),
            KeptValue::TooLong => ToSqlOutput::Owned(types::Value::Null),
        }
    }
}

fn shaped_payload<'a>(record: &RecordRef<'a>, text: &'a str) -> ShapedPayload<'a> {
    let RecordRef { topic, content_type, received_at, .. } = *record;
    ShapedPayload { topic, content_type, text, received_at }
}

/// A value of a payload that is of another shape than JSON's.
struct ShapedEntry {
    key: String,
    json: String,
    at: TimeMicros,
}

/// Reads the values of a payload of another shape, of each key the one with the latest time. Returns whether it is of one.
fn read_shaped(payload: &ShapedPayload<'_>, values: &mut Vec<ShapedEntry>) -> bool {
    values.clear();
    let mut places: HashMap<String, usize> = HashMap::new();
    payload.read(&mut |key, value, at| {
        let at = at.unwrap_or(payload.received_at);
        match places.get(key) {
            Some(&place) if at >= values[place].at => {
                (values[place].json, values[place].at) = (value.to_json(), at)
            }
            Some(_) => {}
            None => {
                places.insert(key.to_owned(), values.len());
                values.push(ShapedEntry { key: key.to_owned(), json: value.to_json(), at });
            }
        }
    })
}

/// Reads the members of a JSON object. Returns whether `text` is one. Values are parsed only as far as
/// needed to find their end.
pub(super) fn read_members<'a>(text: &'a str, members: &mut Vec<JsonMember<'a>>) -> bool {
    members.clear();
    if !text.trim_start().starts_with('{') {
        return false;
    }
    let mut json = serde_json::Deserializer::from_str(text);
    (&mut json).deserialize_map(MembersVisitor(members)).and_then(|()| json.end()).is_ok()
}

struct MembersVisitor<'m, 'a>(&'m mut Vec<JsonMember<'a>>);

impl<'a> Visitor<'a> for MembersVisitor<'_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some((MemberName(name), value)) = map.next_entry::<MemberName<'a>, &'a RawValue>()? {
            self.0.push((name, value.get()));
        }
        Ok(())
    }
}
