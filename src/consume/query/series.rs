//! A series: the samples of one key of a topic, gathered in steps of time. It is answered from the chunks of samples, which an
//! index finds by their times, a piece at a time: a year of a busy topic is much to read, and others wait for the reader's turn.

use rusqlite::{Connection, OptionalExtension, params};

use super::postgres::series::{FoundSeries, SeriesPlace};
use super::{QueryError, RecordsReader, SqliteRecords, row_id_of_scope};
use crate::consume::sink::sample_chunk::{ChunkBase, ChunkSample, chunk_lists, key_json, list_samples};
use crate::limits::{SERIES_CHUNKS_MAX, SERIES_PIECE_BYTES};
use crate::message::{DatasourceId, TimeMicros};

/// Steps that are chosen by themselves, in microseconds: what people read on a clock.
const ROUND_STEPS_US: [i64; 22] = {
    const S: i64 = 1_000_000;
    const M: i64 = 60 * S;
    const H: i64 = 60 * M;
    const D: i64 = 24 * H;
    [
        1_000,
        10_000,
        100_000,
        S,
        2 * S,
        5 * S,
        10 * S,
        15 * S,
        30 * S,
        M,
        2 * M,
        5 * M,
        10 * M,
        15 * M,
        30 * M,
        H,
        2 * H,
        6 * H,
        12 * H,
        D,
        7 * D,
        30 * D,
    ]
};

/// What of the samples in a step is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SeriesAggregate {
    /// Their mean.
    #[default]
    Avg,
    /// The least.
    Min,
    /// The greatest.
    Max,
    /// The earliest; of several at one time, the one that was received first.
    First,
    /// The latest; of several at one time, the one that was received last.
    Last,
    /// How many there are.
    Count,
    /// Their sum.
    Sum,
}

/// Which samples to read, and how they are gathered.
#[derive(Debug, Clone)]
pub struct SeriesQuery {
    /// The scope of the incarnation of the datasource that they are of.
    pub scope: DatasourceId,
    /// The topic, as the device wrote it.
    pub topic: String,
    /// The key within its payloads.
    pub key: String,
    /// At or after this time; the oldest sample of the topic without one.
    pub from: Option<TimeMicros>,
    /// Before this time; behind the newest sample of the topic without one.
    pub to: Option<TimeMicros>,
    /// The length of a step in microseconds, above 0. Without one, it is such that there are no more steps than
    /// `points_max`.
    pub step_us: Option<i64>,
    /// What of a step is shown.
    pub aggregate: SeriesAggregate,
    /// How many steps there may be.
    pub points_max: usize,
}

/// One step of a series.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SeriesPoint {
    /// When the step begins. Steps begin at whole multiples of their length since the Unix epoch.
    pub at: TimeMicros,
    /// `None` if there is no sample in it.
    pub value: Option<f64>,
    /// How many samples are in it.
    pub count: u64,
}

/// Why there is no series.
#[derive(Debug, thiserror::Error)]
pub enum SeriesError {
    /// The range has more steps than there may be.
    #[error("the range has {steps} steps of that length, and at most {points_max} are shown")]
    TooManySteps {
        /// How many there are.
        steps: u64,
        /// How many there may be.
        points_max: usize,
        /// The least step with which there are not too many, in microseconds.
        least_step_us: i64,
    },
    /// The samples are in too many places.
    #[error("the range has samples in more than {SERIES_CHUNKS_MAX} places: ask for a shorter one")]
    TooMuch,
    /// The database could not be read.
    #[error(transparent)]
    Query(#[from] QueryError),
}

/// A series that is being read.
#[derive(Debug)]
pub struct SeriesReading {
    query: SeriesQuery,
    /// The JSON of the key.
    key: String,
    from: TimeMicros,
    to: TimeMicros,
    step_us: i64,
    steps: Vec<SeriesStep>,
    /// Of the sample that was added last.
    present: StepBounds,
    /// The chunks that are still to be read, the next one last.
    chunks: Vec<i64>,
    /// Where it goes on in PostgreSQL, if it is read from there and there is more.
    place: Option<SeriesPlace>,
}

/// Where a step is among all, and the times that it covers.
#[derive(Debug, Clone, Copy, Default)]
struct StepBounds {
    place: usize,
    from: TimeMicros,
    to: TimeMicros,
}

/// What is known of the samples in a step.
#[derive(Debug, Clone, Copy, Default)]
struct SeriesStep {
    count: u64,
    sum: f64,
    min: f64,
    max: f64,
    first: Option<ChunkSample>,
    last: Option<ChunkSample>,
}

impl SeriesStep {
    fn add(&mut self, sample: ChunkSample) {
        if self.count == 0 {
            (self.min, self.max) = (sample.value, sample.value);
        }
        self.count += 1;
        self.sum += sample.value;
        self.min = self.min.min(sample.value);
        self.max = self.max.max(sample.value);
        // Chunks come in no particular order.
        let time = |sample: &ChunkSample| (sample.at, sample.offset);
        if self.first.is_none_or(|first| time(&sample) < time(&first)) {
            self.first = Some(sample);
        }
        if self.last.is_none_or(|last| time(&sample) >= time(&last)) {
            self.last = Some(sample);
        }
    }

    fn value(&self, aggregate: SeriesAggregate) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "nobody has 2^53 samples")]
        let count = self.count as f64;
        let value = match aggregate {
            SeriesAggregate::Avg => self.sum / count,
            SeriesAggregate::Min => self.min,
            SeriesAggregate::Max => self.max,
            SeriesAggregate::First => self.first?.value,
            SeriesAggregate::Last => self.last?.value,
            SeriesAggregate::Count => count,
            SeriesAggregate::Sum => self.sum,
        };
        // A sum may be beyond all numbers that JSON has.
        (self.count > 0 && value.is_finite()).then_some(value)
    }
}

impl SeriesReading {
    /// The series without its samples: where they are, and which steps it has.
    ///
    /// # Errors
    /// [`SeriesError`].
    pub fn begin(stored: &RecordsReader, query: SeriesQuery) -> Result<Self, SeriesError> {
        let (found, place) = match stored {
            RecordsReader::Sqlite(stored) => (find_chunks(stored, &query)?, None),
            RecordsReader::Postgres(stored) => match stored.find_series(&query)? {
                Some(FoundSeries { from, to, place }) => (Some((from, to, Vec::new())), place),
                None => (None, None),
            },
        };
        let (from, to, mut chunks) = match (found, query.from, query.to) {
            (Some(found), ..) => found,
            (None, Some(from), Some(to)) => (from, to, Vec::new()),
            // Nothing says which steps there would be.
            (None, ..) => (0, 0, Vec::new()),
        };
        if chunks.len() > SERIES_CHUNKS_MAX || place.as_ref().is_some_and(SeriesPlace::is_too_much) {
            return Err(SeriesError::TooMuch);
        }
        chunks.reverse();
        let step_us = query.step_us.unwrap_or_else(|| round_step(from, to, query.points_max));
        let steps = step_count(from, to, step_us);
        let (key, points_max) = (key_json(&query.key), query.points_max);
        if steps > points_max as u64 {
            let least_step_us = round_step(from, to, points_max);
            return Err(SeriesError::TooManySteps { steps, points_max, least_step_us });
        }
        let steps = vec![SeriesStep::default(); usize::try_from(steps).unwrap_or(points_max)];
        let present = StepBounds::default();
        Ok(Self { query, key, from, to, step_us, steps, present, chunks, place })
    }

    /// Reads some of its samples: about [`SERIES_PIECE_BYTES`]. Returns whether there are more. A chunk that was removed
    /// meanwhile has none.
    ///
    /// # Errors
    /// [`QueryError::Database`].
    pub fn read_some(&mut self, stored: &RecordsReader) -> Result<bool, QueryError> {
        let stored = match stored {
            RecordsReader::Sqlite(stored) => stored,
            RecordsReader::Postgres(stored) => {
                let Some(mut place) = self.place.take() else { return Ok(false) };
                let has_more = stored.read_samples(&mut place, |sample| self.add_sample(sample))?;
                self.place = has_more.then_some(place);
                return Ok(has_more);
            }
        };
        stored.read(|connection| {
            // The id of a chunk that was removed may be another topic's now.
            let Some(topic) = topic_id(connection, &self.query)? else {
                self.chunks.clear();
                return Ok(false);
            };
            let mut select = connection.prepare_cached(
                "SELECT first_offset, base_us, samples FROM sample_chunks WHERE id = ?1 AND topic_id = ?2",
            )?;
            let mut bytes = 0;
            while bytes < SERIES_PIECE_BYTES
                && let Some(id) = self.chunks.pop()
            {
                let mut rows = select.query([id, topic])?;
                let Some(row) = rows.next()? else { continue };
                let base = ChunkBase { first_offset: row.get(0)?, base_us: row.get(1)? };
                let text = row.get_ref(2)?.as_str()?;
                bytes += text.len();
                self.add_chunk(base, text);
            }
            Ok(!self.chunks.is_empty())
        })
    }

    fn add_chunk(&mut self, base: ChunkBase, text: &str) {
        if let Some((_, list)) = chunk_lists(text).find(|(key, _)| *key == self.key) {
            list_samples(list, base).for_each(|sample| self.add_sample(sample));
        }
    }

    fn add_sample(&mut self, sample: ChunkSample) {
        if sample.at < self.from || sample.at >= self.to {
            return;
        }
        // Most samples are in the same step as the one before: no division then.
        if sample.at < self.present.from || sample.at >= self.present.to {
            let first_at = self.first_at();
            let number = (sample.at - first_at) / self.step_us;
            let from = first_at.saturating_add(number.saturating_mul(self.step_us));
            let to = from.saturating_add(self.step_us);
            self.present = StepBounds { place: usize::try_from(number).unwrap_or(usize::MAX), from, to };
        }
        if let Some(step) = self.steps.get_mut(self.present.place) {
            step.add(sample);
        }
    }

    /// When its first step begins.
    fn first_at(&self) -> TimeMicros {
        self.from.div_euclid(self.step_us).saturating_mul(self.step_us)
    }

    /// What was asked for.
    pub fn query(&self) -> &SeriesQuery {
        &self.query
    }

    /// The times that it covers; `None` if there is nothing and no range was asked for.
    pub fn range(&self) -> Option<(TimeMicros, TimeMicros)> {
        (!self.steps.is_empty() || self.query.from.is_some()).then_some((self.from, self.to))
    }

    /// The memory that a reading takes at most before it is known how much it is.
    pub fn bytes_max(query: &SeriesQuery) -> usize {
        query.points_max * size_of::<SeriesStep>() + SERIES_CHUNKS_MAX * size_of::<i64>()
    }

    /// The memory that it takes, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.steps.capacity() * size_of::<SeriesStep>() + self.chunks.capacity() * size_of::<i64>()
    }

    /// The length of its steps in microseconds.
    pub fn step_us(&self) -> i64 {
        self.step_us
    }

    /// Its steps in the order of time, those without samples as well.
    pub fn points(&self) -> impl Iterator<Item = SeriesPoint> {
        let (mut at, aggregate) = (self.first_at(), self.query.aggregate);
        self.steps.iter().map(move |step| {
            let point = SeriesPoint { at, value: step.value(aggregate), count: step.count };
            at = at.saturating_add(self.step_us);
            point
        })
    }
}

/// The range of a series and the chunks that may have samples in it. `None` if its topic has no samples.
fn find_chunks(
    stored: &SqliteRecords,
    query: &SeriesQuery,
) -> Result<Option<(TimeMicros, TimeMicros, Vec<i64>)>, QueryError> {
    stored.read(|connection| {
        let Some(topic) = topic_id(connection, query)? else { return Ok(None) };
        let bounds = topic_bounds(connection, topic)?;
        let range = bounds.map(|(oldest, newest)| {
            (query.from.unwrap_or(oldest), query.to.unwrap_or(newest.saturating_add(1)))
        });
        let Some((from, to)) = range else { return Ok(None) };
        Ok(Some((from, to, chunk_ids(connection, topic, from, to)?)))
    })
}

fn topic_id(connection: &Connection, query: &SeriesQuery) -> rusqlite::Result<Option<i64>> {
    let Some(datasource) = row_id_of_scope(connection, &query.scope)? else { return Ok(None) };
    connection
        .prepare_cached("SELECT id FROM topics WHERE datasource_id = ?1 AND topic = ?2")?
        .query_row(params![datasource, query.topic], |row| row.get(0))
        .optional()
}

/// The times of the oldest and of the newest sample of a topic.
fn topic_bounds(connection: &Connection, topic: i64) -> rusqlite::Result<Option<(TimeMicros, TimeMicros)>> {
    let bounds: (Option<i64>, Option<i64>) = connection
        .prepare_cached("SELECT min(oldest_us), max(newest_us) FROM sample_chunks WHERE topic_id = ?1")?
        .query_row([topic], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(bounds.0.zip(bounds.1))
}

/// The chunks of a topic that may have samples in a range, in no particular order; one more than may be read, if there are.
pub(super) const CHUNKS_OF_SERIES_SQL: &str = "SELECT id FROM sample_chunks INDEXED BY sample_chunks_time
     WHERE topic_id = ?1 AND newest_us >= ?2 AND oldest_us < ?3 LIMIT ?4";

fn chunk_ids(
    connection: &Connection,
    topic: i64,
    from: TimeMicros,
    to: TimeMicros,
) -> rusqlite::Result<Vec<i64>> {
    let limit = i64::try_from(SERIES_CHUNKS_MAX).unwrap_or(i64::MAX).saturating_add(1);
    let mut select = connection.prepare_cached(CHUNKS_OF_SERIES_SQL)?;
    let ids = select.query_map([topic, from, to, limit], |row| row.get(0))?;
    ids.collect()
}

/// How many steps a range has.
fn step_count(from: TimeMicros, to: TimeMicros, step_us: i64) -> u64 {
    if to <= from {
        return 0;
    }
    let (first, last) = (from.div_euclid(step_us), (to - 1).div_euclid(step_us));
    last.abs_diff(first) + 1
}

/// The least round step with which a range has no more steps than `points_max`.
fn round_step(from: TimeMicros, to: TimeMicros, points_max: usize) -> i64 {
    let fits = |step: &i64| step_count(from, to, *step) <= points_max as u64;
    ROUND_STEPS_US.into_iter().find(fits).unwrap_or_else(|| {
        let last = ROUND_STEPS_US[ROUND_STEPS_US.len() - 1];
        // One step may be cut by the beginning of the range.
        let times = step_count(from, to, last).div_ceil((points_max as u64).saturating_sub(1).max(1));
        last.saturating_mul(i64::try_from(times).unwrap_or(i64::MAX))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consume::sink::sqlite::{RECORDS_FILE_NAME, SqliteSink};
    use crate::consume::testing::record;
    use crate::message::RecordRef;

    const M: i64 = 60_000_000;
    /// A whole multiple of an hour.
    const T0: TimeMicros = 1_795_424_400_000_000;

    fn query(step_us: Option<i64>, aggregate: SeriesAggregate) -> SeriesQuery {
        SeriesQuery {
            scope: DatasourceId::new("press-4").expect("a slug"),
            topic: "a".to_owned(),
            key: "t".to_owned(),
            from: None,
            to: None,
            step_us,
            aggregate,
            points_max: 100,
        }
    }

    fn read(stored: &RecordsReader, query: SeriesQuery) -> Result<Vec<(i64, Option<f64>, u64)>, SeriesError> {
        let mut reading = SeriesReading::begin(stored, query)?;
        while reading.read_some(stored)? {}
        Ok(reading.points().map(|point| ((point.at - T0) / M, point.value, point.count)).collect())
    }

    /// Stores payloads of the topic `a` at minutes after T0, each in a transaction of its own.
    fn stored(dir: &std::path::Path, samples: &[(i64, &str)]) -> RecordsReader {
        let mut sink = SqliteSink::open(&dir.join(RECORDS_FILE_NAME)).expect("opens");
        for ((minute, payload), offset) in samples.iter().zip(0..) {
            let record = record(offset, "press-4", "a", payload.as_bytes());
            let record = RecordRef {
                event_at: Some(T0 + minute * M + i64::try_from(offset).expect("small")),
                ..record
            };
            sink.store([record].into_iter(), offset + 1, false).expect("stored");
        }
        RecordsReader::new(dir)
    }

    #[test]
    fn each_aggregate_of_a_step_and_gaps_are_seen() {
        let dir = tempfile::tempdir().expect("temporary directory");
        // The second one came late.
        let samples =
            [(1, r#"{"t": 4}"#), (0, r#"{"t": 7}"#), (0, r#"{"t": 2, "u": 9}"#), (3, r#"{"t": -1}"#)];
        let stored = stored(dir.path(), &samples);
        for (aggregate, values) in [
            (SeriesAggregate::Avg, [4.5, 4.0, -1.0]),
            (SeriesAggregate::Min, [2.0, 4.0, -1.0]),
            (SeriesAggregate::Max, [7.0, 4.0, -1.0]),
            (SeriesAggregate::First, [7.0, 4.0, -1.0]),
            (SeriesAggregate::Last, [2.0, 4.0, -1.0]),
            (SeriesAggregate::Count, [2.0, 1.0, 1.0]),
            (SeriesAggregate::Sum, [9.0, 4.0, -1.0]),
        ] {
            let points = read(&stored, query(Some(M), aggregate)).expect("reads");
            let expected =
                [(0, Some(values[0]), 2), (1, Some(values[1]), 1), (2, None, 0), (3, Some(values[2]), 1)];
            assert_eq!(points, expected, "{aggregate:?}");
        }
        let other = SeriesQuery { key: "u".to_owned(), ..query(Some(M), SeriesAggregate::Last) };
        assert_eq!(read(&stored, other).expect("reads")[0], (0, Some(9.0), 1));
    }

    /// It guards against another tenant's values: the id of a chunk that was removed while a series was being read was given
    /// anew.
    #[test]
    fn a_chunk_that_has_the_id_of_a_removed_one_is_not_of_the_series() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(RECORDS_FILE_NAME);
        let stored = stored(dir.path(), &[(0, r#"{"t": 1}"#)]);
        let mut reading =
            SeriesReading::begin(&stored, query(Some(M), SeriesAggregate::Sum)).expect("begins");
        let other = RecordRef { event_at: Some(T0), ..record(1, "press-5", "a", br#"{"t": 99}"#) };
        SqliteSink::open(&path)
            .and_then(|mut sink| sink.store([other].into_iter(), 2, true))
            .expect("stored");
        let connection = Connection::open(&path).expect("opens");
        let give_anew = "CREATE TEMP TABLE gone AS SELECT id FROM sample_chunks ORDER BY id LIMIT 1;
            DELETE FROM sample_chunks WHERE id = (SELECT id FROM gone);
            UPDATE sample_chunks SET id = (SELECT id FROM gone)";
        connection.execute_batch(give_anew).expect("changed");
        while reading.read_some(&stored).expect("reads") {}
        assert!(reading.points().all(|point| point.count == 0));
    }

    #[test]
    fn a_range_is_from_its_beginning_to_before_its_end() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let stored = stored(dir.path(), &[(0, r#"{"t": 1}"#), (1, r#"{"t": 2}"#), (2, r#"{"t": 3}"#)]);
        let of = |from: i64, to: i64| SeriesQuery {
            from: Some(from),
            to: Some(to),
            ..query(Some(2 * M), SeriesAggregate::Sum)
        };
        assert_eq!(read(&stored, of(T0, T0 + 2 * M)).expect("reads"), [(0, Some(3.0), 2)]);
        assert_eq!(read(&stored, of(T0 + 1, T0 + M + 1)).expect("reads"), [(0, None, 0)]);
        assert_eq!(read(&stored, of(T0 + 1, T0 + M + 2)).expect("reads"), [(0, Some(2.0), 1)]);
        assert_eq!(
            read(&stored, of(T0 + M, T0 + 3 * M)).expect("reads"),
            [(0, Some(2.0), 1), (2, Some(3.0), 1)]
        );
        assert_eq!(read(&stored, of(T0, T0)).expect("reads"), []);
        let error = read(&stored, of(T0, T0 + 201 * M)).expect_err("too many steps");
        let SeriesError::TooManySteps { steps, least_step_us, .. } = error else { panic!("{error}") };
        assert_eq!((steps, least_step_us), (101, 5 * M));
        let at_most = SeriesQuery { step_us: None, ..of(T0, T0 + 201 * M) };
        assert_eq!(read(&stored, at_most).expect("reads").len(), 41);
    }

    #[test]
    fn what_there_is_not_is_an_empty_series() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let stored = stored(dir.path(), &[(0, r#"{"t": 1}"#)]);
        let none = SeriesQuery { topic: "b".to_owned(), ..query(None, SeriesAggregate::Avg) };
        assert_eq!(read(&stored, none.clone()).expect("reads"), []);
        let gap = SeriesQuery { from: Some(T0), to: Some(T0 + M), step_us: Some(M), ..none };
        assert_eq!(read(&stored, gap).expect("reads"), [(0, None, 0)]);
    }

    #[test]
    fn an_automatic_step_fits_whatever_the_range_is() {
        for points_max in [1, 2, 3, 100, 10_000] {
            for range in [1, 1_000, M, 86_400_000_000, 366 * 86_400_000_000, i64::MAX / 4, i64::MAX - 7] {
                for from in [T0, T0 + 1, -range / 2, i64::MIN / 4] {
                    let to = from.saturating_add(range);
                    let step = round_step(from, to, points_max);
                    let steps = step_count(from, to, step);
                    // A range may be cut by a step's end however long that is.
                    assert!(
                        steps <= (points_max as u64).max(2),
                        "{from} {range} {points_max}: {step} {steps}"
                    );
                }
            }
        }
    }

    #[test]
    fn chunks_are_found_by_an_index() {
        let dir = tempfile::tempdir().expect("temporary directory");
        drop(stored(dir.path(), &[]));
        let connection = Connection::open(dir.path().join(RECORDS_FILE_NAME)).expect("opens");
        let plan: String = connection
            .query_row(&format!("EXPLAIN QUERY PLAN {CHUNKS_OF_SERIES_SQL}"), [1, 2, 3, 4], |row| row.get(3))
            .expect("a plan");
        assert!(plan.contains("COVERING INDEX sample_chunks_time (topic_id=? AND newest_us>?)"), "{plan}");
    }
}
