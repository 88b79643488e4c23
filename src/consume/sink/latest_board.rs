//! The board: in memory, what `latest` shows of the datasources that are asked for it again and again. While a hundred
//! thousand messages a second come in, each answer would otherwise read thousands of rows that have just been written.
//!
//! The thread that writes `records.db` alone puts things on the board, behind each of its transactions, so that the board says
//! what the database says. It puts a datasource there some time after somebody has asked for it, keeps it up to date, and takes it
//! down when nobody asks any more. Whatever else changes newest values clears the board: until then, and for all that has no
//! room there, the database is read. A topic is rendered when it is asked for, and stays so until it changes.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rusqlite::Connection;

use super::incarnations::row_id_of_scope;
use super::newest::{KeptValue, NewestTopic, NewestValues};
use crate::consume::latest::{
    LatestPage, LatestTopic, LatestValue, VALUE_BYTES, read_latest_page, read_latest_values,
};
use crate::consume::query::PageBudget;
use crate::consume::render::{PayloadJson, content_type_if_given, rfc3339_text};
use crate::limits::{
    LATEST_BOARD_BYTES_MAX, LATEST_BOARD_DATASOURCES_MAX, LATEST_KEYS_PER_TOPIC_MAX, LATEST_TOPICS_MAX,
};
use crate::message::{DatasourceId, Offset, TimeMicros};

/// How long a datasource stays on the board that nobody asks for.
const UNASKED_MAX: Duration = Duration::from_secs(30);
/// What a topic and a value take in memory beside their texts.
const TOPIC_MEMORY_BYTES: usize = 256;
const VALUE_MEMORY_BYTES: usize = 96;

/// The board of one `records.db`.
#[derive(Default)]
pub struct LatestBoard {
    /// By the scope of each datasource.
    places: Mutex<HashMap<DatasourceId, BoardPlace>>,
    /// There is a place on it.
    is_used: AtomicBool,
}

/// The place of one datasource.
struct BoardPlace {
    asked_at: Instant,
    state: BoardState,
}

enum BoardState {
    /// It is to be put there.
    Wanted,
    Shown(Arc<Mutex<BoardTopics>>),
    /// It is too large.
    TooLarge,
}

/// The topics of a datasource.
struct BoardTopics {
    /// The row id of the datasource.
    row: i64,
    topics: BTreeMap<Box<str>, BoardTopic>,
    /// What they take in memory.
    bytes: usize,
}

/// The newest values of a topic.
struct BoardTopic {
    offset: Offset,
    received_at: TimeMicros,
    event_at: Option<TimeMicros>,
    payload: Box<[u8]>,
    content_type: Box<str>,
    /// In the order of their keys.
    values: Vec<BoardValue>,
    /// As it is shown, once that was asked for.
    rendered: Option<Box<[u8]>>,
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

impl LatestBoard {
    /// Gives the topics of a datasource to `each` as they are shown, those after `after_topic` in the order of their names, while
    /// `budget` is not spent. Returns the topic after which it goes on if there are more; `None` for the whole if the datasource is not there: it is asked
    /// for then.
    pub(in crate::consume) fn read(
        &self,
        scope: &DatasourceId,
        after_topic: Option<&str>,
        budget: &mut PageBudget,
        each: &mut dyn FnMut(&str, &[u8]),
    ) -> Option<Option<String>> {
        let topics = self.ask(scope)?;
        let mut topics = topics.lock();
        let after = after_topic.map_or(Bound::Unbounded, Bound::Excluded);
        let (mut last, mut more_bytes) = (None::<&str>, 0);
        let mut next = None;
        for (name, topic) in topics.topics.range_mut::<str, _>((after, Bound::Unbounded)) {
            if budget.is_spent() {
                next = last.map(str::to_owned);
                break;
            }
            budget.take(topic.page_bytes(name));
            if topic.rendered.is_none() {
                let rendered = topic.render(name);
                more_bytes += rendered.len();
                topic.rendered = Some(rendered);
            }
            each(name, topic.rendered.as_deref().unwrap_or_default());
            last = Some(name);
        }
        topics.bytes += more_bytes;
        Some(next)
    }

    /// The topics of a datasource that is there, and notes that they are asked for.
    fn ask(&self, scope: &DatasourceId) -> Option<Arc<Mutex<BoardTopics>>> {
        let mut places = self.places.lock();
        let now = Instant::now();
        if let Some(place) = places.get_mut(scope) {
            place.asked_at = now;
            return match &place.state {
                BoardState::Shown(topics) => Some(topics.clone()),
                BoardState::Wanted | BoardState::TooLarge => None,
            };
        }
        places.retain(|_, place| now.duration_since(place.asked_at) < UNASKED_MAX);
        if places.len() < LATEST_BOARD_DATASOURCES_MAX {
            places.insert(scope.clone(), BoardPlace { asked_at: now, state: BoardState::Wanted });
            self.is_used.store(true, Ordering::Release);
        }
        None
    }

    /// Takes everything down: what the database says may be something else. Whoever asks again has it put there again.
    pub(super) fn clear(&self) {
        if self.is_used.swap(false, Ordering::AcqRel) {
            self.places.lock().clear();
        }
    }

    /// Puts the values there that a transaction has written, behind its end, and the datasources that are wanted.
    pub(super) fn follow(&self, connection: &Connection, newest: &NewestValues<'_>) {
        if !self.is_used.load(Ordering::Acquire) {
            return;
        }
        let shown = self.shown();
        for (scope, topics) in shown {
            let mut topics = topics.lock();
            let state = match topics.follow(connection, newest) {
                Ok(()) if !topics.is_too_large() => continue,
                Ok(()) => BoardState::TooLarge,
                // What the database says is not known: whoever asks reads it there.
                Err(_) => BoardState::Wanted,
            };
            drop(topics);
            if let Some(place) = self.places.lock().get_mut(&scope) {
                place.state = state;
            }
        }
        let places = self.places.lock();
        let is_wanted = |(scope, place): (&DatasourceId, &BoardPlace)| {
            matches!(place.state, BoardState::Wanted).then(|| scope.clone())
        };
        let wanted: Vec<DatasourceId> = places.iter().filter_map(is_wanted).collect();
        drop(places);
        for scope in wanted {
            let state = match BoardTopics::read(connection, &scope) {
                Ok(Some(topics)) if topics.is_too_large() => BoardState::TooLarge,
                Ok(Some(topics)) => BoardState::Shown(Arc::new(Mutex::new(topics))),
                // It has no records yet, or storage is about to say what is wrong.
                Ok(None) | Err(_) => continue,
            };
            if let Some(place) = self.places.lock().get_mut(&scope) {
                place.state = state;
            }
        }
    }

    /// What is there. Takes down what nobody asks for.
    fn shown(&self) -> Vec<(DatasourceId, Arc<Mutex<BoardTopics>>)> {
        let mut places = self.places.lock();
        let now = Instant::now();
        places.retain(|_, place| now.duration_since(place.asked_at) < UNASKED_MAX);
        self.is_used.store(!places.is_empty(), Ordering::Release);
        let shown = |(scope, place): (&DatasourceId, &BoardPlace)| match &place.state {
            BoardState::Shown(topics) => Some((scope.clone(), topics.clone())),
            BoardState::Wanted | BoardState::TooLarge => None,
        };
        places.iter().filter_map(shown).collect()
    }
}

impl BoardTopics {
    /// Those that the database has of a datasource; `None` without any.
    fn read(connection: &Connection, scope: &DatasourceId) -> rusqlite::Result<Option<Self>> {
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

    fn is_too_large(&self) -> bool {
        self.bytes > LATEST_BOARD_BYTES_MAX || self.topics.len() > LATEST_TOPICS_MAX
    }

    /// Puts what a transaction has written there.
    fn follow(&mut self, connection: &Connection, newest: &NewestValues<'_>) -> rusqlite::Result<()> {
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
    fn page_bytes(&self, name: &str) -> usize {
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
    fn render(&self, name: &str) -> Box<[u8]> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consume::query::RecordsReader;
    use crate::consume::sink::retention::StoredLimits;
    use crate::consume::sink::sqlite::{RECORDS_FILE_NAME, SqliteSink};
    use crate::consume::testing::record;
    use crate::log::{WithheldChange, WithheldRule, WithheldRules};
    use crate::message::RecordRef;
    use crate::seeded_random::SeededRandom;

    const PAYLOADS: [&[u8]; 9] = [
        br#"{"t": 21.50, "unit": "C"}"#,
        br#"{"t": 2, "a\"b": {"deep": [1, null]}}"#,
        b"{\"t\":\n 3,\r\n\"list\": [\n1 ]}",
        b"20",
        b"on",
        b"\xff\x00",
        b"a\0b",
        b"{}",
        br#"{"big": 1e999, "t": "x"}"#,
    ];

    fn press() -> DatasourceId {
        DatasourceId::new("press-4").expect("a slug")
    }

    fn shown(reader: &RecordsReader) -> Vec<String> {
        let mut topics = Vec::new();
        let mut each = |_: &str, json: &[u8]| topics.push(String::from_utf8(json.to_vec()).expect("text"));
        let mut budget = PageBudget::new(LATEST_TOPICS_MAX);
        reader.latest_json_within(&press(), None, &mut budget, &mut each).expect("reads");
        topics
    }

    /// A store with a board, and who reads it with and without.
    struct Stored {
        sink: SqliteSink,
        board: Arc<LatestBoard>,
        with: RecordsReader,
        without: RecordsReader,
        end: Offset,
    }

    impl Stored {
        fn new(dir: &std::path::Path) -> Self {
            let mut sink = SqliteSink::open(&dir.join(RECORDS_FILE_NAME)).expect("opens");
            let board = Arc::<LatestBoard>::default();
            sink.show_on(board.clone());
            let with = RecordsReader::new(dir).with_board(board.clone());
            Self { sink, board, with, without: RecordsReader::new(dir), end: 0 }
        }

        fn store(&mut self, records: &[(&str, &[u8])]) {
            let records: Vec<RecordRef<'_>> = records
                .iter()
                .zip(self.end..)
                .map(|((topic, payload), offset)| RecordRef {
                    event_at: (offset % 3 == 0).then_some(i64::try_from(offset).expect("small")),
                    content_type: if offset % 2 == 0 { "application/json" } else { "" },
                    ..record(offset, "press-4", topic, payload)
                })
                .collect();
            self.end += records.len() as u64;
            self.sink.store(records.into_iter(), self.end, false).expect("stored");
        }

        fn is_shown(&self) -> bool {
            matches!(
                self.board.places.lock().get(&press()),
                Some(BoardPlace { state: BoardState::Shown(_), .. })
            )
        }
    }

    #[test]
    fn the_board_says_what_the_database_says_whatever_happens() {
        for seed in 0..20 {
            let dir = tempfile::tempdir().expect("temporary directory");
            let (mut random, mut stored) = (SeededRandom(seed), Stored::new(dir.path()));
            let rules = WithheldRules::default();
            let mut was_shown = false;
            for step in 0..60 {
                match random.below(12) {
                    0 => {
                        let key_id = record(0, "press-4", "a", b"").key_id;
                        let since = record(stored.end / 2, "press-4", "a", b"").received_at;
                        let rule = WithheldRule { datasource: press(), key_id, since, below: stored.end };
                        rules.push(WithheldChange::Withhold(rule));
                        stored.sink.reconcile(&rules).expect("reconciled");
                    }
                    1 => {
                        let key_id = record(0, "press-4", "a", b"").key_id;
                        rules.push(WithheldChange::GiveBack(press(), key_id));
                        stored.sink.reconcile(&rules).expect("reconciled");
                    }
                    2 => {
                        let limits = StoredLimits { bytes: Some(random.below(2_000) as u64), age_us: None };
                        stored.sink.prune_some(&press(), limits, 0).expect("pruned");
                    }
                    _ => {
                        let records: Vec<(&str, &[u8])> = (0..1 + random.below(4))
                            .map(|_| (["a", "b", "c/\"d"][random.below(3)], PAYLOADS[random.below(9)]))
                            .collect();
                        stored.store(&records);
                    }
                }
                assert_eq!(shown(&stored.with), shown(&stored.without), "seed {seed}, step {step}");
                was_shown |= stored.is_shown();
            }
            assert!(was_shown, "seed {seed}");
        }
    }

    #[test]
    fn a_datasource_is_on_the_board_once_it_was_asked_for_and_keeps_its_newest_keys() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut stored = Stored::new(dir.path());
        stored.store(&[("a", b"1")]);
        assert!(!stored.is_shown());
        assert_eq!(shown(&stored.with).len(), 1);
        for n in 0..LATEST_KEYS_PER_TOPIC_MAX + 3 {
            stored.store(&[("a", format!(r#"{{"k{n}": {n}, "always": 1}}"#).as_bytes())]);
            assert!(stored.is_shown());
        }
        assert_eq!(shown(&stored.with), shown(&stored.without));
        drop(stored.sink);
        assert!(stored.board.places.lock().is_empty(), "nobody keeps it up to date");
    }

    #[test]
    fn what_is_too_large_is_read_from_the_database() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut stored = Stored::new(dir.path());
        let large = vec![b'x'; LATEST_BOARD_BYTES_MAX / 8];
        shown(&stored.with);
        for topic in ["a", "b", "c", "d", "e", "f", "g", "h", "i"] {
            stored.store(&[(topic, &large)]);
            assert_eq!(shown(&stored.with), shown(&stored.without));
        }
        assert!(!stored.is_shown());
        stored.store(&[("a", b"1")]);
        assert!(!stored.is_shown());
    }

    #[test]
    fn pages_are_the_same_from_the_board() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut stored = Stored::new(dir.path());
        shown(&stored.with);
        let topics: Vec<String> = (0..10).map(|n| format!("t/{n}")).collect();
        let records: Vec<(&str, &[u8])> = topics.iter().map(|topic| (&**topic, PAYLOADS[0])).collect();
        stored.store(&records);
        assert!(stored.is_shown());
        for reader in [&stored.with, &stored.without] {
            let (mut after, mut pages) = (None::<String>, Vec::new());
            loop {
                let (mut budget, mut count) = (PageBudget::new(4), 0);
                let next = reader
                    .latest_json_within(&press(), after.as_deref(), &mut budget, &mut |_, _| count += 1);
                pages.push(count);
                after = next.expect("reads");
                if after.is_none() {
                    break;
                }
            }
            assert_eq!(pages, [4, 4, 2]);
        }
    }
}
