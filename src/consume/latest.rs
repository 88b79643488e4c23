//! The newest value of each topic and of each top-level key of its JSON objects: what a twin of the
//! machine would show. Storage keeps it up to date with the records; here it is read.

use std::collections::BTreeMap;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, params};
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::query::bytes_of;
use super::render::{self, Payload, Rfc3339};
use super::sink::schema::offset_of;
use crate::limits::{LATEST_TOPICS_MAX, QUERY_BYTES_MAX};
use crate::message::{DatasourceId, Offset, TimeMicros};

/// The newest values of a datasource, or of some of its topics if it has very many.
#[derive(Debug, Serialize)]
pub struct LatestPage {
    /// Whose.
    pub datasource: DatasourceId,
    /// Ordered by name.
    pub topics: Vec<Latest>,
    /// The topic after which the next page begins, if there is one.
    pub next: Option<String>,
}

/// The newest value of one topic.
#[derive(Debug, Clone, PartialEq)]
pub struct Latest {
    /// As the device wrote it.
    pub topic: String,
    /// Of the newest record.
    pub offset: Offset,
    /// When that was received.
    pub received_at: TimeMicros,
    /// What it holds.
    pub payload: Vec<u8>,
    /// Its media type, or empty.
    pub content_type: String,
    /// The newest value of each top-level key of the topic's JSON objects; of the key `""` for
    /// payloads that are no object.
    pub values: BTreeMap<String, LatestValue>,
}

/// The newest value of one key.
#[derive(Debug, Clone, PartialEq)]
pub struct LatestValue {
    /// JSON, or the bytes that were sent; `None` if it was too long to be copied out of its record.
    pub value: Option<Vec<u8>>,
    /// Of the record that it came with.
    pub offset: Offset,
    /// When that was received.
    pub received_at: TimeMicros,
}

/// `{"topic", "offset", "received_at", "payload", "content_type", "values"}`.
impl Serialize for Latest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let payload = Payload::of(&self.payload);
        let encoding = payload.encoding();
        let mut fields = serializer.serialize_struct("Latest", 6 + usize::from(encoding.is_some()))?;
        fields.serialize_field("topic", &self.topic)?;
        fields.serialize_field("offset", &self.offset)?;
        fields.serialize_field("received_at", &Rfc3339(self.received_at))?;
        fields.serialize_field("payload", &payload)?;
        if let Some(encoding) = encoding {
            fields.serialize_field("payload_encoding", encoding)?;
        }
        fields.serialize_field("content_type", &render::given(&self.content_type))?;
        fields.serialize_field("values", &self.values)?;
        fields.end()
    }
}

/// `{"value", "offset", "received_at"}`, with `"value_encoding": "base64"` beside bytes that are no
/// text, and `"omitted": true` beside the `null` that stands for a value too long to be copied.
impl Serialize for LatestValue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let value = self.value.as_deref().map(Payload::of);
        let encoding = value.as_ref().and_then(Payload::encoding);
        let more = usize::from(encoding.is_some() || value.is_none());
        let mut fields = serializer.serialize_struct("LatestValue", 3 + more)?;
        fields.serialize_field("value", &value)?;
        if let Some(encoding) = encoding {
            fields.serialize_field("value_encoding", encoding)?;
        }
        if value.is_none() {
            fields.serialize_field("omitted", &true)?;
        }
        fields.serialize_field("offset", &self.offset)?;
        fields.serialize_field("received_at", &Rfc3339(self.received_at))?;
        fields.end()
    }
}

/// Fills `page` with the topics of a datasource that come after `after`.
pub(super) fn read(
    connection: &Connection,
    datasource_id: i64,
    after: Option<&str>,
    page: &mut LatestPage,
) -> rusqlite::Result<()> {
    // Every topic sorts after the empty one, which none is.
    let after = after.unwrap_or_default();
    let mut topics = connection.prepare_cached(
        "SELECT t.id, t.topic, e.offset, e.received_us, e.payload, o.content_type
         FROM topics t JOIN entries e ON e.offset = t.latest_offset JOIN origins o ON o.id = e.origin_id
         WHERE t.datasource_id = ?1 AND t.topic > ?2 ORDER BY t.topic",
    )?;
    let mut values = connection.prepare_cached(
        "SELECT key, value, offset, received_us FROM latest_values WHERE topic_id = ?1 ORDER BY key",
    )?;
    let mut bytes = 0;
    let mut rows = topics.query(params![datasource_id, after])?;
    while let Some(row) = rows.next()? {
        if page.topics.len() == LATEST_TOPICS_MAX || bytes >= QUERY_BYTES_MAX {
            page.next = page.topics.last().map(|last| last.topic.clone());
            break;
        }
        let id: i64 = row.get(0)?;
        let mut latest = Latest {
            topic: row.get(1)?,
            offset: offset_of(row.get(2)?),
            received_at: row.get(3)?,
            payload: bytes_of(row, 4)?,
            content_type: row.get(5)?,
            values: BTreeMap::new(),
        };
        bytes += latest.topic.len() + latest.payload.len();
        let mut rows = values.query([id])?;
        while let Some(row) = rows.next()? {
            let value = match row.get_ref(1)? {
                ValueRef::Null => None,
                value => Some(value.as_bytes()?.to_vec()),
            };
            let key: String = row.get(0)?;
            bytes += key.len() + value.as_ref().map_or(0, Vec::len);
            let value = LatestValue { value, offset: offset_of(row.get(2)?), received_at: row.get(3)? };
            latest.values.insert(key, value);
        }
        page.topics.push(latest);
    }
    Ok(())
}
