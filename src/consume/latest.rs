//! The newest value of each topic and of each top-level key of its JSON objects: what a twin of the
//! machine would show. Storage keeps these up to date; this file reads them.

use std::collections::BTreeMap;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, params};
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::query::{PageBudget, payload_bytes_of_row};
use super::render::{self, PayloadJson, Rfc3339};
use super::sink::schema::offset_from_sql;
use crate::message::{DatasourceId, Offset, TimeMicros};

/// The newest values of a datasource, or of some of its topics if it has very many.
#[derive(Debug, Serialize)]
pub struct LatestPage {
    /// The datasource of the topics.
    pub datasource: DatasourceId,
    /// Ordered by name.
    pub topics: Vec<LatestTopic>,
    /// The topic after which the next page begins, if there is one.
    pub next: Option<String>,
}

/// The newest value of one topic.
#[derive(Debug, Clone, PartialEq)]
pub struct LatestTopic {
    /// As the device wrote it.
    pub topic: String,
    /// The offset of the newest record.
    pub offset: Offset,
    /// When that record was received.
    pub received_at: TimeMicros,
    /// When it was measured, if its sender has said so.
    pub event_at: Option<TimeMicros>,
    /// Its payload.
    pub payload: Vec<u8>,
    /// Its media type, or empty.
    pub content_type: String,
    /// The newest value of each top-level key of the topic's JSON objects. Other payloads are the value of
    /// the key `""`.
    pub values: BTreeMap<String, LatestValue>,
}

/// The newest value of one key.
#[derive(Debug, Clone, PartialEq)]
pub struct LatestValue {
    /// JSON, or the bytes that were sent. `None` if the value was too long to be kept.
    pub value: Option<Vec<u8>>,
    /// The offset of the record that it came with.
    pub offset: Offset,
    /// When that record was received.
    pub received_at: TimeMicros,
}

/// `{"topic", "offset", "received_at", "payload", "content_type", "values"}`, with `"event_at"` if there is one.
impl Serialize for LatestTopic {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let payload = PayloadJson::from_bytes(&self.payload);
        let encoding = payload.encoding();
        let more = usize::from(encoding.is_some()) + usize::from(self.event_at.is_some());
        let mut fields = serializer.serialize_struct("Latest", 6 + more)?;
        fields.serialize_field("topic", &self.topic)?;
        fields.serialize_field("offset", &self.offset)?;
        fields.serialize_field("received_at", &Rfc3339(self.received_at))?;
        if let Some(event_at) = self.event_at {
            fields.serialize_field("event_at", &Rfc3339(event_at))?;
        }
        fields.serialize_field("payload", &payload)?;
        if let Some(encoding) = encoding {
            fields.serialize_field("payload_encoding", encoding)?;
        }
        fields.serialize_field("content_type", &render::content_type_if_given(&self.content_type))?;
        fields.serialize_field("values", &self.values)?;
        fields.end()
    }
}

/// `{"value", "offset", "received_at"}`, with `"value_encoding": "base64"` beside bytes that are not
/// text, and `"omitted": true` beside the `null` that stands for a value too long to be kept.
impl Serialize for LatestValue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let value = self.value.as_deref().map(PayloadJson::from_bytes);
        let encoding = value.as_ref().and_then(PayloadJson::encoding);
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

/// What a value takes on a page beside its key and itself.
pub(super) const VALUE_BYTES: usize = 96;

/// Fills `page` with the topics of a datasource that come after `after`.
pub(super) fn read_latest_page(
    connection: &Connection,
    datasource_id: i64,
    after: Option<&str>,
    budget: &mut PageBudget,
    page: &mut LatestPage,
) -> rusqlite::Result<()> {
    // No topic is empty, so every topic sorts after the empty string.
    let after = after.unwrap_or_default();
    let mut topics = connection.prepare_cached(
        "SELECT t.id, t.topic, e.offset, e.received_us, e.payload, o.content_type, e.event_us
         FROM topics t JOIN entries e ON e.offset = t.latest_offset JOIN origins o ON o.id = e.origin_id
         WHERE t.datasource_id = ?1 AND t.topic > ?2 ORDER BY t.topic",
    )?;
    let mut rows = topics.query(params![datasource_id, after])?;
    while let Some(row) = rows.next()? {
        if budget.is_spent() {
            page.next = page.topics.last().map(|last| last.topic.clone());
            break;
        }
        let id: i64 = row.get(0)?;
        let mut latest = LatestTopic {
            topic: row.get(1)?,
            offset: offset_from_sql(row.get(2)?),
            received_at: row.get(3)?,
            payload: payload_bytes_of_row(row, 4)?,
            content_type: row.get(5)?,
            event_at: row.get(6)?,
            values: BTreeMap::new(),
        };
        latest.values = read_latest_values(connection, id)?;
        let value_bytes = |(key, of): (&String, &LatestValue)| {
            key.len() + of.value.as_ref().map_or(0, Vec::len) + VALUE_BYTES
        };
        let values = latest.values.iter().map(value_bytes);
        let bytes = latest.topic.len() + latest.payload.len() + values.sum::<usize>();
        budget.take(bytes);
        page.topics.push(latest);
    }
    Ok(())
}

/// The newest values of the keys of a topic.
pub(super) fn read_latest_values(
    connection: &Connection,
    topic_id: i64,
) -> rusqlite::Result<BTreeMap<String, LatestValue>> {
    let mut select = connection.prepare_cached(
        "SELECT key, value, offset, received_us FROM latest_values WHERE topic_id = ?1 ORDER BY key",
    )?;
    let mut rows = select.query([topic_id])?;
    let mut values = BTreeMap::new();
    while let Some(row) = rows.next()? {
        let value = match row.get_ref(1)? {
            ValueRef::Null => None,
            value => Some(value.as_bytes()?.to_vec()),
        };
        let value = LatestValue { value, offset: offset_from_sql(row.get(2)?), received_at: row.get(3)? };
        values.insert(row.get(0)?, value);
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::consume::query::RecordsReader;
    use crate::consume::sink::sqlite::{RECORDS_FILE_NAME, SqliteSink};
    use crate::consume::testing::record;
    use crate::limits::{
        LATEST_KEY_BYTES_MAX, LATEST_KEYS_PER_TOPIC_MAX, LATEST_TOPICS_MAX, LATEST_VALUE_BYTES_MAX,
    };
    use crate::message::RecordRef;

    /// Stores each of `transactions`, whose records are consecutive, and reads the latest values.
    fn latest_after(transactions: &[Vec<RecordRef<'_>>]) -> LatestPage {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = SqliteSink::open(&dir.path().join(RECORDS_FILE_NAME)).expect("opens");
        for records in transactions {
            let next = records.last().expect("some records").offset + 1;
            sink.store(records.iter().copied(), next, false).expect("stored");
        }
        let query = RecordsReader::new(dir.path());
        query.latest(&DatasourceId::new("press-4").expect("slug"), None).expect("reads")
    }

    /// The values of one topic whose payloads these are, each in a transaction of its own or all in
    /// one: that must not make a difference.
    fn values_after(payloads: &[&[u8]]) -> Value {
        let records =
            || payloads.iter().zip(0..).map(|(payload, offset)| record(offset, "press-4", "a", payload));
        let together = latest_after(&[records().collect()]);
        let apart = latest_after(&records().map(|record| vec![record]).collect::<Vec<_>>());
        assert_eq!(together.topics, apart.topics);
        let shown = serde_json::to_value(&together.topics[0].values).expect("serializable");
        let values = shown.as_object().expect("a map").iter();
        values.map(|(key, value)| (key.clone(), json!([value["value"], value["offset"]]))).collect()
    }

    #[test]
    fn each_key_keeps_its_newest_value_across_messages() {
        let values = values_after(&[
            br#"{"t": 20, "unit": "C"}"#,
            br#"{"rpm": 900, "t": 21.50}"#,
            br#"{"unit": "F", "state": {"on": [1, null]}}"#,
        ]);
        let expected =
            json!({"t": [21.5, 1], "unit": ["F", 2], "rpm": [900, 1], "state": [{"on": [1, null]}, 2]});
        assert_eq!(values, expected);
    }

    #[test]
    fn a_payload_that_is_no_object_is_the_value_of_the_empty_key() {
        assert_eq!(values_after(&[b"20", b" 21.5 "]), json!({"": [21.5, 1]}));
        assert_eq!(values_after(&[b"[1]"]), json!({"": [[1], 0]}));
        assert_eq!(values_after(&[b"on", br#"{"a": 1}"#]), json!({"": ["on", 0], "a": [1, 1]}));
        assert_eq!(values_after(&[br#"{"a": 1"#]), json!({"": ["{\"a\": 1", 0]}));
        assert_eq!(
            values_after(&[br#"{"a": 1}"#, br#"{"b": 2} x"#]),
            json!({"a": [1, 0], "": ["{\"b\": 2} x", 1]})
        );
        assert_eq!(values_after(&[b"\xff\x00"]), json!({"": ["/wA=", 0]}));
        assert_eq!(values_after(&[b"{}"]), json!({}));
    }

    #[test]
    fn payloads_of_other_shapes_give_the_values_that_they_have() {
        let values_of = |topic: &str, content_type: &'static str, payload: &str| {
            let mut shaped = record(0, "press-4", topic, payload.as_bytes());
            shaped.content_type = content_type;
            let page = latest_after(&[vec![shaped]]);
            let values = page.topics[0].values.iter();
            let value =
                |value: &LatestValue| value.value.as_deref().map(String::from_utf8_lossy).map(Into::into);
            values
                .map(|(key, latest)| (key.clone(), value(latest)))
                .collect::<BTreeMap<String, Option<String>>>()
        };
        let of = |values: &[(&str, &str)]| {
            values
                .iter()
                .map(|&(key, value)| (key.to_owned(), Some(value.to_owned())))
                .collect::<BTreeMap<_, _>>()
        };
        let line = r#"cpu,host=a idle=98.50,n=-3i,on=t,note="a b" 5"#;
        let expected = of(&[("idle", "98.50"), ("n", "-3"), ("on", "true"), ("note", "\"a b\"")]);
        assert_eq!(values_of("cpu/host=a", "text/plain; precision=s", line), expected);
        // Lines of two series on one topic, the newest of each by its time.
        let lines = "cpu,host=a v=1 5\ncpu,host=b v=2 5\ncpu,host=a v=3 4\ncpu,host=b v=4 6";
        let expected = of(&[("cpu/host=a/v", "1"), ("cpu/host=b/v", "4")]);
        assert_eq!(values_of("telegraf", "text/plain; precision=s", lines), expected);
        let telemetry =
            r#"[{"ts": 2, "values": {"t": 1, "o": {"x": 1}}}, {"ts": 1, "values": {"t": 3, "u": "°"}}]"#;
        let expected = of(&[("t", "1"), ("o", r#"{"x": 1}"#), ("u", "\"°\"")]);
        assert_eq!(values_of("t", "application/json", telemetry), expected);
        let senml = r#"[{"bn":"a/","bv":20,"n":"t","v":1.5},{"n":"on","vb":true}]"#;
        assert_eq!(values_of("t", "application/senml+json", senml), of(&[("a/t", "21.5"), ("a/on", "true")]));
    }

    #[test]
    fn keys_are_what_they_stand_for_however_they_are_written() {
        let values =
            values_after(&[br#"{"\u0074": 1, "a\"b": 2, "t": 3}"#, r#"{"°": 4, "a\u0022b": 5}"#.as_bytes()]);
        assert_eq!(values, json!({"t": [1, 0], "a\"b": [5, 1], "°": [4, 1]}));
    }

    #[test]
    fn of_a_member_that_comes_twice_the_latest_value_is_the_one_that_sqlite_reads() {
        let payloads: [&[u8]; 4] = [
            br#"{"t": 999999, "t": 20}"#,
            br#"{"\u0074": 1, "t": 2, "t": 3}"#,
            br#"{"t": 4, "\u0074": 5}"#,
            br#"{"a": {"t": 6, "t": 7}, "a": {"t": 8}}"#,
        ];
        for payload in payloads {
            let dir = tempfile::tempdir().expect("temporary directory");
            let path = dir.path().join(RECORDS_FILE_NAME);
            let mut sink = SqliteSink::open(&path).expect("opens");
            sink.store([record(0, "press-4", "a", payload)].into_iter(), 1, false).expect("stored");
            let sqlite = Connection::open(&path).expect("opens");
            let read = |sql: &str| sqlite.query_row(sql, [], |row| row.get::<_, i64>(0)).expect("reads");
            let key = if payload.starts_with(b"{\"a") { "$.a.t" } else { "$.t" };
            let of_payload = read(&format!("SELECT json_extract(payload, '{key}') FROM records"));
            let latest = match key {
                "$.t" => read("SELECT value FROM latest"),
                _ => read("SELECT json_extract(value, '$.t') FROM latest"),
            };
            assert_eq!(of_payload, latest, "{}", String::from_utf8_lossy(payload));
        }
    }

    #[test]
    fn a_value_that_not_every_parser_reads_is_shown_as_text() {
        let deep = format!(r#"{{"deep": {}1{}, "big": 1e999}}"#, "[".repeat(500), "]".repeat(500));
        let values = values_after(&[deep.as_bytes()]);
        assert_eq!(values["big"], json!(["1e999", 0]));
        assert!(values["deep"][0].is_string());
    }

    #[test]
    fn a_topic_keeps_its_newest_keys_up_to_the_limit() {
        let max = LATEST_KEYS_PER_TOPIC_MAX;
        let one_each: Vec<String> = (0..=max).map(|n| format!(r#"{{"k{n}": {n}, "always": 1}}"#)).collect();
        let payloads: Vec<&[u8]> = one_each.iter().map(|payload| payload.as_bytes()).collect();
        let values = values_after(&payloads);
        assert_eq!(values.as_object().map(|keys| keys.len()), Some(max));
        assert_eq!((&values["k0"], &values["k1"]), (&Value::Null, &Value::Null), "the oldest give way");
        assert_eq!(values["always"], json!([1, max]));
        let below = values_after(&payloads[..max - 1]);
        assert_eq!(below.as_object().map(|keys| keys.len()), Some(max), "all keys fit");

        let members: Vec<String> = (0..=max).map(|n| format!(r#""k{n:03}": {n}"#)).collect();
        let wide = format!("{{{}}}", members.join(","));
        let values = values_after(&[wide.as_bytes(), wide.as_bytes()]);
        assert_eq!(values.as_object().map(|keys| keys.len()), Some(max));
    }

    #[test]
    fn a_key_or_value_beyond_its_limit_is_not_copied() {
        let (key, long_key) = ("k".repeat(LATEST_KEY_BYTES_MAX), "k".repeat(LATEST_KEY_BYTES_MAX + 1));
        let text = "x".repeat(LATEST_VALUE_BYTES_MAX - 2);
        let payload = format!(r#"{{"{key}": 1, "{long_key}": 2, "fits": "{text}", "long": "x{text}"}}"#);
        let page = latest_after(&[vec![record(0, "press-4", "a", payload.as_bytes())]]);
        let values = serde_json::to_value(&page.topics[0].values).expect("serializable");
        assert_eq!(values.as_object().map(|keys| keys.len()), Some(3), "without the long key");
        assert_eq!(values[&key]["value"], 1);
        assert_eq!(values["fits"]["value"], json!(text));
        assert_eq!(
            (&values["long"]["value"], &values["long"]["omitted"]),
            (&Value::Null, &Value::Bool(true))
        );
    }

    #[test]
    fn the_answer_has_the_shape_that_the_api_promises() {
        let mut json_record = record(0, "press-4", "a", b"{\"t\": 21.50}");
        json_record.content_type = "application/json";
        let others = vec![json_record, record(1, "press-4", "b", b"\xff"), record(2, "press-5", "c", b"1")];
        let shown = serde_json::to_string(&latest_after(&[others])).expect("serializable");
        let expected = concat!(
            r#"{"datasource":"press-4","topics":["#,
            r#"{"topic":"a","offset":0,"received_at":"2026-11-23T09:28:39.000000Z","payload":{"t": 21.50},"#,
            r#""content_type":"application/json","#,
            r#""values":{"t":{"value":21.50,"offset":0,"received_at":"2026-11-23T09:28:39.000000Z"}}},"#,
            r#"{"topic":"b","offset":1,"received_at":"2026-11-23T09:28:39.001000Z","payload":"/w==","#,
            r#""payload_encoding":"base64","content_type":null,"values":{"":{"value":"/w==","#,
            r#""value_encoding":"base64","offset":1,"received_at":"2026-11-23T09:28:39.001000Z"}}}],"#,
            r#""next":null}"#
        );
        assert_eq!(shown, expected);
    }

    #[test]
    fn very_many_topics_come_in_pages() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = SqliteSink::open(&dir.path().join(RECORDS_FILE_NAME)).expect("opens");
        let topics: Vec<String> = (0..=LATEST_TOPICS_MAX).map(|n| format!("t/{n:06}")).collect();
        let records = topics.iter().zip(0..).map(|(topic, offset)| record(offset, "press-4", topic, b"1"));
        sink.store(records, topics.len() as u64, false).expect("stored");
        let query = RecordsReader::new(dir.path());
        let id = DatasourceId::new("press-4").expect("slug");
        let first = query.latest(&id, None).expect("reads");
        assert_eq!(first.topics.len(), LATEST_TOPICS_MAX);
        let last = topics.last().expect("some");
        assert_eq!(first.next.as_ref(), topics.get(LATEST_TOPICS_MAX - 1));
        let second = query.latest(&id, first.next.as_deref()).expect("reads");
        assert_eq!(second.topics.iter().map(|t| &t.topic).collect::<Vec<_>>(), [last]);
        assert_eq!(second.next, None);
    }
}
