//! A model test of samples: whatever is stored, withheld, given back, deleted, created again and put back to an earlier end,
//! the samples are those of the payloads in `entries`, each once.

use rusqlite::Connection;

use crate::consume::sink::sqlite::{RECORDS_FILE_NAME, SqliteSink};
use crate::consume::testing::record;
use crate::limits::GATHERED_KEYS_MAX;
use crate::log::{IncarnationStep, WithheldChange, WithheldRule, WithheldRules};
use crate::message::{DatasourceId, KeyId, Offset, RecordFlags, RecordRef, TimeMicros};
use crate::seeded_random::SeededRandom;
use crate::values::SampleReader;

const KEYS: [KeyId; 3] = [KeyId([1; 6]), KeyId([2; 6]), KeyId([3; 6])];
const PAYLOADS: [&str; 7] = [
    r#"{"t": 1.5}"#,
    r#"{"t": 2, "u": {"v": -3e3, "w": true}}"#,
    r#"{"u": {"v": 7}, "t": "none", "x\"]]": 4}"#,
    "8",
    "no number",
    r#"{"list": [1]}"#,
    r#"{"t": 1, "t": 2, "long": 123456789.125}"#,
];

/// Topic, key, offset, time and value of a sample, the value as its bits.
type Row = (i64, String, i64, i64, u64);
/// Topic, key, value and offset of a newest value.
type NewestValueRow = (String, String, String, i64);

fn stored_samples(connection: &Connection) -> Vec<Row> {
    let mut select = connection
        .prepare(
            "SELECT t.id, s.key, s.offset, s.at_us, s.value
             FROM samples s JOIN datasources d ON d.datasource = s.datasource
             JOIN topics t ON t.topic = s.topic AND t.datasource_id = d.id",
        )
        .expect("SQL");
    let rows = select.query_map([], |row| {
        Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get::<_, f64>(4)?.to_bits()))
    });
    let mut rows: Vec<Row> = rows.expect("reads").map(|row| row.expect("reads")).collect();
    rows.sort_unstable();
    rows
}

fn samples_of_entries(connection: &Connection) -> Vec<Row> {
    let mut select = connection
        .prepare(
            "SELECT topic_id, offset, coalesce(event_us, received_us), CAST(payload AS BLOB) FROM entries",
        )
        .expect("SQL");
    let mut rows = select.query([]).expect("reads");
    let (mut reader, mut samples) = (SampleReader::default(), Vec::new());
    while let Some(row) = rows.next().expect("reads") {
        let payload: Vec<u8> = row.get(3).expect("a payload");
        for sample in reader.read("t", "", &payload, 0) {
            let number = |column| row.get::<_, i64>(column).expect("a number");
            samples.push((number(0), sample.key.to_owned(), number(1), number(2), sample.value.to_bits()));
        }
    }
    samples.sort_unstable();
    samples
}

/// One run of the model.
struct ModelRun {
    random: SeededRandom,
    rules: WithheldRules,
    sink: SqliteSink,
    incarnation: u32,
    end: Offset,
}

impl ModelRun {
    fn press() -> DatasourceId {
        DatasourceId::new("press-4").expect("a slug")
    }

    fn store(&mut self) {
        let count = 1 + self.random.below(12) as u64;
        let records: Vec<RecordRef<'static>> = (self.end..self.end + count)
            .map(|offset| {
                let topic = ["a", "b"][self.random.below(2)];
                let payload = PAYLOADS[self.random.below(PAYLOADS.len())].as_bytes();
                let event_at = self.random.percent(50).then(|| self.random.below(1_000) as TimeMicros - 500);
                let key_id = KEYS[self.random.below(KEYS.len())];
                let mut flags = RecordFlags::default();
                if self.random.percent(5) {
                    flags = RecordFlags::QUARANTINED;
                }
                RecordRef { event_at, key_id, flags, ..record(offset, "press-4", topic, payload) }
            })
            .collect();
        self.end += count;
        self.sink.store(records.into_iter(), self.end, false).expect("stored");
    }

    fn up_to(&mut self, most: Offset) -> Offset {
        let most = usize::try_from(most).expect("small");
        self.random.below(most + 1) as u64
    }

    fn change(&mut self) {
        let key_id = KEYS[self.random.below(KEYS.len())];
        let change = match self.random.below(4) {
            0 | 1 => {
                let since = record(self.up_to(self.end), "press-4", "a", b"").received_at;
                WithheldChange::Withhold(WithheldRule {
                    datasource: Self::press(),
                    key_id,
                    since,
                    below: self.end,
                })
            }
            2 => WithheldChange::GiveBack(Self::press(), key_id),
            _ => return self.begin_again(),
        };
        self.rules.push(change);
        self.sink.reconcile(&self.rules).expect("reconciled");
    }

    /// Deletes the datasource and creates it again, where the log is ahead of that.
    fn begin_again(&mut self) {
        let ended = IncarnationStep::Ended { keys: [KEYS[self.random.below(3)]].into(), end: self.end };
        self.rules.push(WithheldChange::Incarnation(Self::press(), self.incarnation, ended));
        if self.random.percent(50) {
            self.store();
        }
        let first_offset = self.end - self.up_to(self.end.min(2));
        self.incarnation += 1;
        let begun = IncarnationStep::Begun { first_offset, since: TimeMicros::MIN };
        self.rules.push(WithheldChange::Incarnation(Self::press(), self.incarnation, begun));
        if self.random.percent(30) {
            let purged =
                WithheldChange::Incarnation(Self::press(), self.incarnation - 1, IncarnationStep::Purged);
            self.rules.push(purged);
        }
        self.sink.reconcile(&self.rules).expect("reconciled");
    }

    fn set_back(&mut self, path: &std::path::Path) {
        self.end -= self.up_to(self.end.min(5));
        self.sink.set_aside_from(self.end, path).expect("set aside");
    }
}

#[test]
fn the_samples_are_those_of_the_stored_payloads_whatever_happens() {
    for seed in 0..25 {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(RECORDS_FILE_NAME);
        let mut run = ModelRun {
            random: SeededRandom(seed),
            rules: WithheldRules::default(),
            sink: SqliteSink::open(&path).expect("opens"),
            incarnation: 1,
            end: 0,
        };
        run.sink.reconcile(&run.rules).expect("reconciled");
        let reader = Connection::open(&path).expect("opens");
        for step in 0..25 {
            match run.random.below(10) {
                0..=5 => run.store(),
                6..=8 => run.change(),
                _ => run.set_back(&path),
            }
            assert_eq!(stored_samples(&reader), samples_of_entries(&reader), "seed {seed}, step {step}");
        }
    }
}

/// What a store holds of samples and newest values.
fn all_values(path: &std::path::Path) -> (Vec<Row>, Vec<NewestValueRow>) {
    let connection = Connection::open(path).expect("opens");
    let mut select = connection
        .prepare("SELECT topic, key, CAST(value AS TEXT), offset FROM latest ORDER BY topic, key")
        .expect("SQL");
    let latest = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)));
    let latest = latest.expect("reads").map(|row| row.expect("a row")).collect();
    (stored_samples(&connection), latest)
}

#[test]
fn a_large_transaction_whose_payloads_another_thread_reads_stores_what_small_ones_do() {
    // With more keys than one transaction gathers.
    let payload =
        |n: usize| format!(r#"{{"t": {n}.5, "k{}": {}, "x{n}": 1, "y{n}": 2, "z{n}": 3}}"#, n % 7, n % 11);
    let payloads: Vec<String> = (0..12_345).map(payload).collect();
    assert!(3 * payloads.len() > GATHERED_KEYS_MAX);
    let topics = ["a", "b", "c"];
    let records = || {
        (0..).zip(&payloads).map(|(offset, payload)| {
            let topic = topics[usize::try_from(offset % 3).expect("small")];
            record(offset, "press-4", topic, payload.as_bytes())
        })
    };
    let end = payloads.len() as Offset;
    let stored = |most: usize| {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(RECORDS_FILE_NAME);
        let mut sink = SqliteSink::open(&path).expect("opens");
        let all: Vec<RecordRef<'_>> = records().collect();
        for part in all.chunks(most) {
            let next = part.last().expect("some").offset + 1;
            sink.store(part.iter().copied(), next, false).expect("stored");
        }
        assert_eq!(sink.cursor(), end);
        all_values(&path)
    };
    let small = stored(1_000);
    assert_eq!(small.0.len(), 5 * payloads.len());
    assert!(stored(payloads.len()) == small);
    assert!(stored(7_777) == small);
}

#[test]
fn records_that_come_back_from_quarantine_have_samples_only_where_they_are_kept() {
    for keeps_samples in [true, false] {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(RECORDS_FILE_NAME);
        let (mut sink, rules) = (SqliteSink::open(&path).expect("opens"), WithheldRules::default());
        sink.keep_samples(keeps_samples);
        let one = RecordRef { key_id: KEYS[0], ..record(0, "press-4", "a", b"{\"t\": 1}") };
        sink.store([one].into_iter(), 1, false).expect("stored");
        let reader = Connection::open(&path).expect("opens");
        let expected = usize::from(keeps_samples);
        assert_eq!(stored_samples(&reader).len(), expected);
        let rule = WithheldRule { datasource: ModelRun::press(), key_id: KEYS[0], since: 0, below: 1 };
        rules.push(WithheldChange::Withhold(rule));
        sink.reconcile(&rules).expect("reconciled");
        assert_eq!(stored_samples(&reader).len(), 0);
        rules.push(WithheldChange::GiveBack(ModelRun::press(), KEYS[0]));
        sink.reconcile(&rules).expect("reconciled");
        assert_eq!(stored_samples(&reader).len(), expected);
        assert_eq!(samples_of_entries(&reader).len(), 1, "the record is back");
    }
}
