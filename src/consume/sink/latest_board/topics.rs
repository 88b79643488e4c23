//! The topics of one datasource on the board: what the database had, and what each transaction has written since; how a topic
//! is shown.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::Write as _;

use rusqlite::Connection;

use crate::consume::latest::{
    LatestPage, LatestTopic, LatestValue, VALUE_BYTES, read_latest_page, read_latest_values,
};
use crate::consume::query::PageBudget;
use crate::consume::render::{PayloadJson, content_type_if_given, rfc3339_text};
use crate::consume::sink::incarnations::row_id_of_scope;
use crate::consume::sink::newest::{KeptValue, NewestTopic, NewestValues};
use crate::limits::{LATEST_BOARD_BYTES_MAX, LATEST_KEYS_PER_TOPIC_MAX, LATEST_TOPICS_MAX};
use crate::message::{DatasourceId, Offset, TimeMicros};

/// What a topic and a value take in memory beside their texts.
const TOPIC_MEMORY_BYTES: usize = 256;
const VALUE_MEMORY_BYTES: usize = 96;

/// The topics of a datasource.
pub(super) struct BoardTopics {
    /// The row id of the datasource.
    row: i64,
    pub(super) topics: BTreeMap<Box<str>, BoardTopic>,
    /// What they take in memory.
    pub(super) bytes: usize,
}

/// The newest values of a topic.
pub(super) struct BoardTopic {
    offset: Offset,
    received_at: TimeMicros,
    event_at: Option<TimeMicros>,
    payload: Box<[u8]>,
    content_type: Box<str>,
    /// In the order of their keys.
    values: Vec<BoardValue>,
    /// As it is shown, once that was asked for.
    pub(super) rendered: Option<Box<[u8]>>,
}

/// The newest value of a key.
struct BoardValue {
    key: Box<str>,
    /// The JSON that it is shown as.
    json: Box<str>,
    form: ValueForm,
    offset: Offset,
    received_at: TimeMicros,
    /// What it counts on a page.
    bytes: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ValueForm {
    Plain,
    Base64,
    Omitted,
}

impl BoardTopics {
    /// Those that the database has of a datasource; `None` without any.
    pub(super) fn read(connection: &Connection, scope: &DatasourceId) -> rusqlite::Result<Option<Self>> {
        let Some(row) = row_id_of_scope(connection, scope)? else { return Ok(None) };
        let mut page = LatestPage { datasource: scope.of_scope().0, topics: Vec::new(), next: None };
        read_latest_page(connection, row, None, &mut PageBudget::new(LATEST_TOPICS_MAX), &mut page)?;
        let is_whole = page.next.is_none();
        let mut topics = Self { row, topics: BTreeMap::new(), bytes: 0 };
        for latest in page.topics {
            let (name, topic) = BoardTopic::of_database(latest);
            topics.bytes += topic.memory_bytes(&name);
            topics.topics.insert(name, topic);
        }
        if !is_whole {
            topics.bytes = usize::MAX;
        }
        Ok(Some(topics))
    }

    pub(super) fn is_too_large(&self) -> bool {
        self.bytes > LATEST_BOARD_BYTES_MAX || self.topics.len() > LATEST_TOPICS_MAX
    }

    /// Takes topics down, if they are of this datasource.
    pub(super) fn forget<'t>(&mut self, datasource: i64, names: impl Iterator<Item = &'t str>) {
        if datasource != self.row {
            return;
        }
        for name in names {
            if let Some(topic) = self.topics.remove(name) {
                self.bytes = self.bytes.saturating_sub(topic.memory_bytes(name));
            }
        }
    }

    /// Puts what a transaction has written there.
    pub(super) fn follow(
        &mut self,
        connection: &Connection,
        newest: &NewestValues<'_>,
    ) -> rusqlite::Result<()> {
        let row = self.row;
        for (topic_id, newest) in newest.written().filter(|(_, topic)| topic.datasource == row) {
            let name = newest.record.topic;
            if let Some(topic) = self.topics.get_mut(name) {
                let before = topic.memory_bytes(name);
                topic.set(newest);
                self.bytes = (self.bytes + topic.memory_bytes(name)).saturating_sub(before);
                continue;
            }
            // A topic whose records are all withheld is not shown, and may have values of records that were removed.
            let record = &newest.record;
            let (name, topic) = BoardTopic::of_database(LatestTopic {
                topic: name.to_owned(),
                offset: record.offset,
                received_at: record.received_at,
                event_at: record.event_at,
                payload: record.payload.to_vec(),
                content_type: record.content_type.to_owned(),
                values: read_latest_values(connection, topic_id)?,
            });
            self.bytes += topic.memory_bytes(&name);
            self.topics.insert(name, topic);
        }
        Ok(())
    }
}

impl BoardTopic {
    fn of_database(latest: LatestTopic) -> (Box<str>, Self) {
        let value_of = |(key, value): (String, LatestValue)| {
            let LatestValue { value, offset, received_at } = value;
            let bytes = key.len() + value.as_ref().map_or(0, Vec::len) + VALUE_BYTES;
            let (json, form) = json_of(value.as_deref());
            BoardValue { key: key.into(), json, form, offset, received_at, bytes }
        };
        let topic = Self {
            offset: latest.offset,
            received_at: latest.received_at,
            event_at: latest.event_at,
            payload: latest.payload.into(),
            content_type: latest.content_type.into(),
            // In the order of their keys already.
            values: latest.values.into_iter().map(value_of).collect(),
            rendered: None,
        };
        (latest.topic.into(), topic)
    }

    fn set(&mut self, newest: &NewestTopic<'_>) {
        let record = &newest.record;
        (self.offset, self.received_at, self.event_at) = (record.offset, record.received_at, record.event_at);
        match self.payload.len() == record.payload.len() {
            true => self.payload.copy_from_slice(record.payload),
            false => self.payload = record.payload.into(),
        }
        if *self.content_type != *record.content_type {
            self.content_type = record.content_type.into();
        }
        self.rendered = None;
        for entry in &newest.values {
            let kept = entry.kept();
            let (json, form, length) = match &kept {
                // As JSON is shown, in one line.
                KeptValue::Json(json) if !json.contains(['\n', '\r']) => {
                    (Box::<str>::from(&**json), ValueForm::Plain, json.len())
                }
                KeptValue::Json(json) => {
                    let (text, form) = json_of(Some(json.as_bytes()));
                    (text, form, json.len())
                }
                KeptValue::Bytes(bytes) => {
                    let (text, form) = json_of(Some(*bytes));
                    (text, form, bytes.len())
                }
                KeptValue::TooLong => ("null".into(), ValueForm::Omitted, 0),
            };
            let bytes = entry.key.len() + length + VALUE_BYTES;
            let (offset, received_at) = (entry.offset, entry.received_at);
            let place = self.values.binary_search_by(|value| (*value.key).cmp(&*entry.key));
            let key = match place {
                Ok(place) => std::mem::take(&mut self.values[place].key),
                Err(_) => Box::from(&*entry.key),
            };
            let value = BoardValue { key, json, form, offset, received_at, bytes };
            match place {
                Ok(place) => self.values[place] = value,
                Err(place) => self.values.insert(place, value),
            }
        }
        self.forget_oldest();
    }

    /// As the database forgets the oldest values beyond [`LATEST_KEYS_PER_TOPIC_MAX`].
    fn forget_oldest(&mut self) {
        if self.values.len() > LATEST_KEYS_PER_TOPIC_MAX {
            self.values.sort_by(|a, b| (Reverse(a.offset), &a.key).cmp(&(Reverse(b.offset), &b.key)));
            self.values.truncate(LATEST_KEYS_PER_TOPIC_MAX);
            self.values.sort_by(|a, b| a.key.cmp(&b.key));
        }
    }

    /// What it counts on a page.
    pub(super) fn page_bytes(&self, name: &str) -> usize {
        name.len() + self.payload.len() + self.values.iter().map(|value| value.bytes).sum::<usize>()
    }

    fn memory_bytes(&self, name: &str) -> usize {
        let values = self.values.iter().map(|value| value.key.len() + value.json.len() + VALUE_MEMORY_BYTES);
        let rendered = self.rendered.as_ref().map_or(0, |rendered| rendered.len());
        name.len()
            + self.payload.len()
            + self.content_type.len()
            + values.sum::<usize>()
            + rendered
            + TOPIC_MEMORY_BYTES
    }

    /// As `LatestTopic` is serialized.
    pub(super) fn render(&self, name: &str) -> Box<[u8]> {
        let mut out = Vec::with_capacity(2 * self.page_bytes(name) + TOPIC_MEMORY_BYTES);
        let payload = PayloadJson::from_bytes(&self.payload);
        let received_at = rfc3339_text(self.received_at);
        put(&mut out, "{\"topic\":");
        put_json(&mut out, name);
        put_words(&mut out, format_args!(",\"offset\":{},\"received_at\":\"{received_at}\"", self.offset));
        if let Some(event_at) = self.event_at {
            put_words(&mut out, format_args!(",\"event_at\":\"{}\"", rfc3339_text(event_at)));
        }
        put(&mut out, ",\"payload\":");
        put_json(&mut out, &payload);
        if let Some(encoding) = payload.encoding() {
            put_words(&mut out, format_args!(",\"payload_encoding\":\"{encoding}\""));
        }
        put(&mut out, ",\"content_type\":");
        put_json(&mut out, &content_type_if_given(&self.content_type));
        put(&mut out, ",\"values\":{");
        for (place, value) in self.values.iter().enumerate() {
            if place > 0 {
                put(&mut out, ",");
            }
            put_json(&mut out, &value.key);
            put(&mut out, ":{\"value\":");
            put(&mut out, &value.json);
            put(
                &mut out,
                match value.form {
                    ValueForm::Plain => "",
                    ValueForm::Base64 => ",\"value_encoding\":\"base64\"",
                    ValueForm::Omitted => ",\"omitted\":true",
                },
            );
            put_words(&mut out, format_args!(",\"offset\":{},\"received_at\":\"", value.offset));
            // Mostly of the newest record.
            match value.received_at == self.received_at {
                true => put(&mut out, &received_at),
                false => put(&mut out, &rfc3339_text(value.received_at)),
            }
            put(&mut out, "\"}");
        }
        put(&mut out, "}}");
        out.into()
    }
}

/// The JSON that a value is shown as.
fn json_of(value: Option<&[u8]>) -> (Box<str>, ValueForm) {
    let Some(value) = value else { return ("null".into(), ValueForm::Omitted) };
    let shown = PayloadJson::from_bytes(value);
    let form = if shown.encoding().is_some() { ValueForm::Base64 } else { ValueForm::Plain };
    let mut json = Vec::new();
    put_json(&mut json, &shown);
    (String::from_utf8(json).unwrap_or_default().into(), form)
}

fn put(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(text.as_bytes());
}

fn put_words(out: &mut Vec<u8>, words: std::fmt::Arguments<'_>) {
    out.write_fmt(words).expect("a Vec takes all");
}

fn put_json(out: &mut Vec<u8>, value: &(impl serde::Serialize + ?Sized)) {
    if let Err(error) = serde_json::to_writer(out, value) {
        // Into memory, of values that have a JSON form.
        tracing::error!(%error, "a part of latest has no JSON form");
    }
}
