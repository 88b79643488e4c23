//! Inference: a JSON Schema that stored records of a datasource meet, ready to be enforced, and an example payload.
//! All records are examined if they are few, else the newest and some of every earlier time. The schema states only what all of these records have in common: their types,
//! the members that every one has, strings that are times, and strings that take only a few values.
//!
//! Everything is bounded: the records examined and the depth, width and size of the schema. Beyond a
//! bound the schema states nothing, and so accepts everything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use rusqlite::Connection;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::query::{QueryError, RecordsReader, payload_bytes_of_row, row_id_of_scope};
use crate::filter::TopicFilter;
use crate::limits::{
    INFERENCE_BYTES_MAX, INFERENCE_DEPTH_MAX, INFERENCE_EXAMPLE_BYTES_MAX, INFERENCE_KEY_BYTES_MAX,
    INFERENCE_PARTS_MAX, INFERENCE_RECORDS_MAX, INFERENCE_TOPICS_MAX, SCHEMA_BYTES_MAX,
};
use crate::message::{DatasourceId, TimeMicros};
use crate::time::Rfc3339;
use crate::validate::json::parse_unique_json;
use crate::validate::{Schema, WrittenRule};

/// The least number of strings, and the least ratio of strings to different ones, before an `enum` is
/// inferred.
const ENUM_EVIDENCE_MIN: (u64, u64) = (20, 4);
/// The most values of an inferred `enum`, and the most bytes of each.
const ENUM_SIZE_MAX: (usize, usize) = (8, 64);

/// The result of an inference.
#[derive(Debug, Default, Serialize)]
pub struct Inference {
    /// A schema that every examined JSON payload of every topic meets; `None` if there was none.
    pub inferred: Option<Value>,
    /// The newest payload that is not very long.
    pub example: Option<Value>,
    /// A schema for each topic, in the form in which it is set; no more than [`INFERENCE_TOPICS_MAX`].
    pub by_topic: Vec<WrittenRule>,
    /// An example payload for each of them, by topic.
    pub examples: BTreeMap<String, Value>,
    /// How many records were examined.
    pub records: usize,
    /// How many of them are not JSON, or have a member twice: no schema accepts those.
    pub not_json: usize,
    /// Whether these are all that are stored. If not, the schemas leave open what one more record could easily show: a
    /// number is any number, and a string any string.
    pub complete: bool,
    /// When the oldest of them was received.
    pub from: Option<Rfc3339>,
    /// When the newest was.
    pub to: Option<Rfc3339>,
    /// How many of them were on each topic that has a schema of its own.
    pub counts: BTreeMap<String, u64>,
}

impl RecordsReader {
    /// Infers schemas from stored records of a datasource, in the incarnation with this scope: from all of them if they are
    /// few, else from the newest and from some of every earlier time; with `topics`, from those of them that are on these.
    ///
    /// # Errors
    /// [`QueryError::Database`].
    pub fn inference(
        &self,
        scope: &DatasourceId,
        topics: Option<&[TopicFilter]>,
    ) -> Result<Inference, QueryError> {
        let stored = match self {
            Self::Sqlite(stored) => stored,
            Self::Postgres(stored) => return stored.inference(scope, topics),
        };
        stored.read(|connection| {
            let mut observed = DatasourceObservation::of_topics(topics);
            let Some(id) = row_id_of_scope(connection, scope)? else {
                observed.is_complete = true;
                return Ok(observed.infer());
            };
            let oldest = observed.observe_newest(connection, id)?;
            if let Some(oldest) = oldest {
                observed.observe_earlier(connection, id, oldest)?;
            }
            Ok(observed.infer())
        })
    }
}

/// How many of the records that are examined are the newest; the others are spread over the time before.
pub(super) const INFERENCE_NEWEST_RECORDS: usize = INFERENCE_RECORDS_MAX / 2;
/// As many bytes of these.
pub(super) const INFERENCE_NEWEST_BYTES: usize = INFERENCE_BYTES_MAX / 2;

impl<'t> DatasourceObservation<'t> {
    /// Nothing was seen yet, of these topics or of all.
    pub(super) fn of_topics(topics: Option<&'t [TopicFilter]>) -> Self {
        Self { only: topics, ..Self::default() }
    }

    /// Examines the newest records. Returns the oldest offset of these, if there may be earlier ones.
    fn observe_newest(&mut self, connection: &Connection, id: i64) -> rusqlite::Result<Option<i64>> {
        let mut newest = connection.prepare_cached(
            "SELECT t.topic, e.payload, e.received_us, e.offset FROM entries e LEFT JOIN topics t ON t.id = e.topic_id
             WHERE e.datasource_id = ?1 ORDER BY e.offset DESC LIMIT ?2",
        )?;
        let mut rows = newest.query([id, i64::try_from(INFERENCE_NEWEST_RECORDS).unwrap_or(i64::MAX)])?;
        let mut oldest = None;
        while self.bytes < INFERENCE_NEWEST_BYTES {
            let Some(row) = rows.next()? else {
                self.is_complete = self.looked_at < INFERENCE_NEWEST_RECORDS;
                break;
            };
            self.observe_row(row)?;
            oldest = Some(row.get(3)?);
        }
        Ok(oldest.filter(|_| !self.is_complete))
    }

    /// Examines records from below an offset on, at equal distances down to the oldest one.
    fn observe_earlier(&mut self, connection: &Connection, id: i64, below: i64) -> rusqlite::Result<()> {
        let first: Option<i64> = connection
            .prepare_cached("SELECT min(offset) FROM entries WHERE datasource_id = ?1")?
            .query_row([id], |row| row.get(0))?;
        let Some(first) = first.filter(|&first| first < below) else {
            self.is_complete = true;
            return Ok(());
        };
        let mut next = connection.prepare_cached(
            "SELECT t.topic, e.payload, e.received_us, e.offset FROM entries e LEFT JOIN topics t ON t.id = e.topic_id
             WHERE e.datasource_id = ?1 AND e.offset >= ?2 AND e.offset < ?3 ORDER BY e.offset LIMIT 1",
        )?;
        let steps = i64::try_from(INFERENCE_RECORDS_MAX - INFERENCE_NEWEST_RECORDS).unwrap_or(i64::MAX);
        let stride = ((below - first) / steps).max(1);
        self.is_complete = stride == 1 && below - first <= steps;
        let mut from = first;
        for _ in 0..steps {
            let mut rows = next.query([id, from, below])?;
            let Some(row) = rows.next()? else { return Ok(()) };
            if self.bytes >= INFERENCE_BYTES_MAX {
                self.is_complete = false;
                return Ok(());
            }
            self.observe_row(row)?;
            from = row.get::<_, i64>(3)?.saturating_add(stride);
        }
        Ok(())
    }

    fn observe_row(&mut self, row: &rusqlite::Row<'_>) -> rusqlite::Result<()> {
        let payload = payload_bytes_of_row(row, 1)?;
        self.observe_at(&row.get::<_, String>(0)?, &payload, row.get(2)?);
        Ok(())
    }

    /// Adds the next payload, which was received at this time.
    pub(super) fn observe_at(&mut self, topic: &str, payload: &[u8], at: TimeMicros) {
        self.bytes += payload.len();
        self.looked_at += 1;
        if self.only.is_some_and(|only| !only.iter().any(|filter| filter.matches(topic))) {
            return;
        }
        self.times = Some(self.times.map_or((at, at), |(from, to)| (from.min(at), to.max(at))));
        self.observe(topic, payload);
    }
}

/// What the payloads of a datasource have shown so far.
#[derive(Default)]
pub(super) struct DatasourceObservation<'t> {
    /// The topics that count, if not all do.
    only: Option<&'t [TopicFilter]>,
    /// How many records were looked at, on whatever topic.
    pub(super) looked_at: usize,
    all: PayloadObservation,
    topics: BTreeMap<String, PayloadObservation>,
    pub(super) records: usize,
    not_json: usize,
    pub(super) bytes: usize,
    /// When the oldest and the newest were received.
    times: Option<(TimeMicros, TimeMicros)>,
    /// All that are stored are among them.
    pub(super) is_complete: bool,
}

/// What a set of payloads has in common, with an example.
#[derive(Default)]
struct PayloadObservation {
    shape: InferredShape,
    parts: usize,
    example: Option<Value>,
    seen: u64,
}

impl DatasourceObservation<'_> {
    /// Adds the next payload; the newest comes first.
    fn observe(&mut self, topic: &str, payload: &[u8]) {
        self.records += 1;
        let Ok(value) = parse_unique_json(payload) else {
            self.not_json += 1;
            return;
        };
        let short = payload.len() <= INFERENCE_EXAMPLE_BYTES_MAX;
        self.all.observe(&value, short);
        if let Some(examined) = self.topics.get_mut(topic) {
            examined.observe(&value, short);
        } else if self.topics.len() < INFERENCE_TOPICS_MAX {
            self.topics.entry(topic.to_owned()).or_default().observe(&value, short);
        }
    }

    pub(super) fn infer(mut self) -> Inference {
        if !self.is_complete {
            self.all.shape.leave_open();
            self.topics.values_mut().for_each(|topic| topic.shape.leave_open());
        }
        let (from, to) = self.times.unzip();
        let mut inference = Inference {
            complete: self.is_complete,
            from: from.map(Rfc3339),
            to: to.map(Rfc3339),
            inferred: (self.records > self.not_json).then(|| self.all.shape.to_schema()),
            example: self.all.example,
            records: self.records,
            not_json: self.not_json,
            ..Inference::default()
        };
        for (topic, PayloadObservation { shape, example, seen, .. }) in self.topics {
            inference.counts.insert(topic.clone(), seen);
            inference.by_topic.push(WrittenRule { filter: topic.clone(), schema: shape.to_schema() });
            inference.examples.extend(example.map(|example| (topic, example)));
        }
        inference
    }
}

impl PayloadObservation {
    fn observe(&mut self, value: &Value, short: bool) {
        self.seen += 1;
        self.shape.observe(value, 0, &mut self.parts);
        if short && self.example.is_none() {
            self.example = Some(value.clone());
        }
    }
}

/// What the values at one place have in common.
#[derive(Default)]
struct InferredShape {
    null: bool,
    boolean: bool,
    integer: bool,
    number: bool,
    strings: Option<ObservedStrings>,
    /// The shape of the elements of all arrays.
    elements: Option<Box<InferredShape>>,
    objects: Option<ObservedObjects>,
    /// Values at this depth are not examined: any is accepted.
    anything: bool,
}

#[derive(Default)]
struct ObservedStrings {
    seen: u64,
    /// The different strings, as long as they are few and short.
    choice: Option<BTreeSet<String>>,
    all_times: bool,
}

#[derive(Default)]
struct ObservedObjects {
    seen: u64,
    members: BTreeMap<String, ObservedMember>,
}

#[derive(Default)]
struct ObservedMember {
    seen: u64,
    shape: InferredShape,
}

impl InferredShape {
    /// Leaves open what records that were not examined may easily have: a fraction, or another string.
    fn leave_open(&mut self) {
        self.number |= std::mem::take(&mut self.integer);
        if let Some(strings) = &mut self.strings {
            strings.choice = None;
        }
        if let Some(elements) = &mut self.elements {
            elements.leave_open();
        }
        let members = self.objects.iter_mut().flat_map(|objects| objects.members.values_mut());
        members.for_each(|member| member.shape.leave_open());
    }

    /// Adds one more value. `parts` counts the members recorded for all values so far.
    fn observe(&mut self, value: &Value, depth: usize, parts: &mut usize) {
        if depth == INFERENCE_DEPTH_MAX {
            self.anything = true;
            return;
        }
        match value {
            Value::Null => self.null = true,
            Value::Bool(_) => self.boolean = true,
            Value::Number(number) if number.is_f64() => self.number = true,
            Value::Number(_) => self.integer = true,
            Value::String(text) => self.strings.get_or_insert_default().observe(text),
            Value::Array(elements) => {
                let shape = self.elements.get_or_insert_default();
                elements.iter().for_each(|element| shape.observe(element, depth + 1, parts));
            }
            Value::Object(members) => {
                let objects = self.objects.get_or_insert_default();
                objects.seen += 1;
                for (key, value) in members {
                    if let Some(member) = objects.members.get_mut(key) {
                        member.seen += 1;
                        member.shape.observe(value, depth + 1, parts);
                    } else if *parts < INFERENCE_PARTS_MAX && key.len() <= INFERENCE_KEY_BYTES_MAX {
                        *parts += 1;
                        let member = objects.members.entry(key.clone()).or_default();
                        member.seen = 1;
                        member.shape.observe(value, depth + 1, parts);
                    }
                }
            }
        }
    }

    /// A schema that all of the values meet, as deep as the size limit of schemas allows.
    fn to_schema(&self) -> Value {
        let deepest = (1..=INFERENCE_DEPTH_MAX).rev().map(|depth| self.schema_to_depth(depth));
        let mut fitting = deepest.filter(|schema| schema.to_string().len() <= SCHEMA_BYTES_MAX);
        fitting.next().unwrap_or_else(|| json!({}))
    }

    fn schema_to_depth(&self, depth: usize) -> Value {
        let types = self.types();
        if self.anything || types.is_empty() || depth == 0 {
            return json!({});
        }
        let mut schema = Map::new();
        let only_strings = types == ["string"];
        schema.insert(
            "type".to_owned(),
            match &types[..] {
                [one] => json!(one),
                several => json!(several),
            },
        );
        if let Some(strings) = &self.strings {
            if strings.all_times {
                schema.insert("format".to_owned(), json!("date-time"));
            } else if let Some(choice) = strings.enum_values().filter(|_| only_strings) {
                schema.insert("enum".to_owned(), json!(choice));
            }
        }
        if let Some(elements) = &self.elements {
            schema.insert("items".to_owned(), elements.schema_to_depth(depth - 1));
        }
        if let Some(objects) = &self.objects {
            let required: Vec<_> =
                objects.members.iter().filter(|(_, m)| m.seen == objects.seen).map(|(key, _)| key).collect();
            let members = objects.members.iter();
            let properties: Map<_, _> =
                members.map(|(key, member)| (key.clone(), member.shape.schema_to_depth(depth - 1))).collect();
            schema.insert("properties".to_owned(), properties.into());
            schema.insert("required".to_owned(), json!(required));
        }
        schema.into()
    }

    fn types(&self) -> Vec<&'static str> {
        let types = [
            ("null", self.null),
            ("boolean", self.boolean),
            // Every integer is a number too.
            ("integer", self.integer && !self.number),
            ("number", self.number),
            ("string", self.strings.is_some()),
            ("array", self.elements.is_some()),
            ("object", self.objects.is_some()),
        ];
        types.into_iter().filter_map(|(name, seen)| seen.then_some(name)).collect()
    }
}

impl ObservedStrings {
    fn observe(&mut self, text: &str) {
        let first = self.seen == 0;
        self.seen += 1;
        self.all_times = (first || self.all_times) && is_date_time(text);
        let choice = if first { Some(BTreeSet::new()) } else { self.choice.take() };
        let (most, bytes_max) = ENUM_SIZE_MAX;
        self.choice = choice.filter(|_| text.len() <= bytes_max).and_then(|mut choice| {
            if !choice.contains(text) {
                choice.insert(text.to_owned());
            }
            (choice.len() <= most).then_some(choice)
        });
    }

    fn enum_values(&self) -> Option<&BTreeSet<String>> {
        let (seen_min, times) = ENUM_EVIDENCE_MIN;
        let sure =
            |choice: &&BTreeSet<String>| self.seen >= seen_min && self.seen >= times * choice.len() as u64;
        self.choice.as_ref().filter(sure)
    }
}

/// Whether a string meets the schema format `date-time`, as the validator will judge it.
fn is_date_time(text: &str) -> bool {
    static DATE_TIME_SCHEMA: OnceLock<Option<Schema>> = OnceLock::new();
    // A cheap test first: most strings are no times and do not begin like one.
    let schema =
        || DATE_TIME_SCHEMA.get_or_init(|| Schema::compile(json!({"format": "date-time"})).ok()).as_ref();
    text.len() >= 20
        && text.as_bytes()[0].is_ascii_digit()
        && schema().is_some_and(|schema| schema.check(&json!(text)).is_ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn inferred(values: &[Value]) -> Value {
        let mut observed = DatasourceObservation { is_complete: true, ..DatasourceObservation::default() };
        values.iter().for_each(|value| observed.observe("t", value.to_string().as_bytes()));
        observed.infer().inferred.expect("there were some")
    }

    #[test]
    fn what_all_have_in_common_is_inferred_and_no_more() {
        let reading = |n: i32| {
            json!({
                "timestamp": format!("2013-12-02T21:{:02}:00Z", n % 60),
                "value": if n % 2 == 0 { json!(n) } else { json!(f64::from(n) + 0.5) },
                "unit": (["°F", "°C"][n as usize % 2]),
                "note": format!("reading {n}"),
                "fault": if n % 3 == 0 { Value::Null } else { json!(true) },
                "axes": [1, 2, n],
            })
        };
        let mut readings: Vec<Value> = (0..40).map(reading).collect();
        readings[7].as_object_mut().expect("an object").remove("note");
        assert_eq!(
            inferred(&readings),
            json!({
                "type": "object",
                "properties": {
                    "timestamp": {"type": "string", "format": "date-time"},
                    "value": {"type": "number"},
                    "unit": {"type": "string", "enum": ["°C", "°F"]},
                    "note": {"type": "string"},
                    "fault": {"type": ["null", "boolean"]},
                    "axes": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["axes", "fault", "timestamp", "unit", "value"],
            })
        );
    }

    #[test]
    fn each_topic_has_a_schema_of_its_own_and_an_example() {
        let mut observed = DatasourceObservation { is_complete: true, ..DatasourceObservation::default() };
        for n in 0..10 {
            observed.observe("temp", format!("{n}").as_bytes());
            observed.observe("state", b"{\"on\": true}");
            observed.observe("raw", b"\xff");
        }
        let inference = observed.infer();
        assert_eq!((inference.records, inference.not_json), (30, 10));
        assert_eq!(
            inference.inferred,
            Some(json!({
                "type": ["integer", "object"],
                "properties": {"on": {"type": "boolean"}},
                "required": ["on"],
            }))
        );
        let filters: Vec<_> = inference.by_topic.iter().map(|written| written.filter.as_str()).collect();
        assert_eq!(filters, ["state", "temp"]);
        assert_eq!(inference.examples["temp"], json!(0), "the first that was seen: the newest");
        let rules = crate::validate::Rules::default().replace(inference.by_topic).expect("can be set");
        assert!(rules.check("temp", b"7").is_ok() && rules.check("temp", b"{}").is_err());
    }

    /// A topic whose newest values were whole was called one of integers, and its next fraction was quarantined.
    #[test]
    fn what_was_inferred_from_some_leaves_open_what_the_others_may_have() {
        let mut observed = DatasourceObservation::default();
        for n in 0..100 {
            let reading = json!({ "value": n, "unit": "bar", "axes": [n] });
            observed.observe("t", reading.to_string().as_bytes());
        }
        let inference = observed.infer();
        assert_eq!((inference.complete, &inference.counts["t"]), (false, &100));
        let expected = json!({
            "type": "object",
            "properties": {
                "value": {"type": "number"},
                "unit": {"type": "string"},
                "axes": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["axes", "unit", "value"],
        });
        assert_eq!(inference.inferred, Some(expected));
    }

    #[test]
    fn a_schema_stays_within_what_can_be_enforced() {
        let wide: Map<_, _> =
            (0..10_000).map(|n| (format!("member-{n:05}"), json!({"x": {"y": n}}))).collect();
        let deep = (0..50).fold(json!(1), |inner, _| json!({ "in": [inner] }));
        for value in [Value::from(wide), deep, json!([[[]]]), json!({})] {
            let schema = Schema::compile(inferred(std::slice::from_ref(&value))).expect("compiles");
            assert_eq!(schema.check(&value), Ok(()));
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[a-c]{0,2}".prop_map(Value::from),
            Just(json!("2013-12-02T21:15:00Z")),
            Just(json!("2013-12-02T21:15:99Z")),
            "\\PC{0,30}".prop_map(Value::from),
        ];
        leaf.prop_recursive(6, 40, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map("[a-d$/~]{0,2}|\\$ref|\\$id|\\$defs|enum", inner, 0..6)
                    .prop_map(|members| Value::from(Map::from_iter(members))),
            ]
        })
    }

    proptest! {
        #[test]
        fn an_inferred_schema_lets_in_all_that_it_was_inferred_from(
            values in prop::collection::vec(any_json(), 1..40)
        ) {
            let source = inferred(&values);
            let schema = Schema::compile(source.clone());
            let schema = match schema {
                Ok(schema) => schema,
                Err(error) => return Err(TestCaseError::fail(format!("{error}: {source}"))),
            };
            for value in &values {
                // Parsed from its text, as a message would be.
                let value: Value = serde_json::from_str(&value.to_string()).expect("JSON");
                prop_assert_eq!(schema.check(&value), Ok(()), "{} against {}", value, source);
            }
        }
    }
}
