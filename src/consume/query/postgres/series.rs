//! The samples of a series from PostgreSQL, a piece at a time.

use std::sync::Arc;

use headgate_bridge_postgres::{PostgresFault, PostgresSnapshot, PostgresTime};

use super::records::times_to;
use super::{PostgresRecords, row_id_of_scope, topic_id};
use crate::consume::query::QueryError;
use crate::consume::query::series::SeriesQuery;
use crate::consume::sink::postgres::text_of;
use crate::consume::sink::sample_chunk::ChunkSample;
use crate::limits::{SERIES_CHUNKS_MAX, SERIES_PIECE_SAMPLES};
use crate::message::TimeMicros;

/// The next samples of a series, of rows with a set of keys and of those that have their keys themselves. Samples of one time
/// and record come together: the place is behind all of them.
const SAMPLES_SQL: &str = "SELECT array_agg(time), array_agg(log_offset), array_agg(value) FROM (
         SELECT * FROM (
             (SELECT r.time, r.log_offset, r.numbers[k.position] AS value
              FROM sample_rows r JOIN unnest($5::bigint[], $6::int[]) AS k (id, position) ON k.id = r.key_set_id
              WHERE r.topic_id = $1::bigint AND r.time >= $2 AND r.time < $3 AND (r.time > $2 OR r.log_offset > $4)
              ORDER BY r.time, r.log_offset FETCH FIRST $7 ROWS WITH TIES)
             UNION ALL
             (SELECT r.time, r.log_offset, r.numbers[array_position(r.keys, $8)]
              FROM sample_rows r
              WHERE r.key_set_id = 0 AND $8 = ANY(r.keys)
                  AND r.topic_id = $1::bigint AND r.time >= $2 AND r.time < $3 AND (r.time > $2 OR r.log_offset > $4)
              ORDER BY r.time, r.log_offset FETCH FIRST $7 ROWS WITH TIES)) both_kinds
         ORDER BY time, log_offset FETCH FIRST $7 ROWS WITH TIES) s";

/// Where a series goes on.
#[derive(Debug)]
pub(in crate::consume::query) struct SeriesPlace {
    topic: i64,
    /// The sets of keys that have its key, and the place of that in each.
    key_sets: Arc<[(i64, i32)]>,
    /// Rows may have its key themselves.
    key: Arc<str>,
    /// The time and the offset of the last sample that was read.
    after: (TimeMicros, i64),
    to: TimeMicros,
}

impl SeriesPlace {
    /// Whether its samples are in more places than are read.
    pub(in crate::consume::query) fn is_too_much(&self) -> bool {
        self.key_sets.len() > SERIES_CHUNKS_MAX
    }
}

/// The range of a series, and where it begins if it has samples at all.
pub(in crate::consume::query) struct FoundSeries {
    pub(in crate::consume::query) from: TimeMicros,
    pub(in crate::consume::query) to: TimeMicros,
    pub(in crate::consume::query) place: Option<SeriesPlace>,
}

impl PostgresRecords {
    /// Looks for a series. `None` if its topic has no samples.
    ///
    /// # Errors
    /// [`QueryError`].
    pub(in crate::consume::query) fn find_series(
        &self,
        query: &SeriesQuery,
    ) -> Result<Option<FoundSeries>, QueryError> {
        self.read(|snapshot| {
            let Some(datasource) = row_id_of_scope(snapshot, &query.scope)? else { return Ok(None) };
            let Some(topic) = topic_id(snapshot, datasource, &query.topic)? else { return Ok(None) };
            let Some((oldest, newest)) = topic_bounds(snapshot, topic)? else { return Ok(None) };
            let from = query.from.unwrap_or(oldest);
            let to = query.to.unwrap_or(newest.saturating_add(1));
            // One more than there may be.
            let limit = i64::try_from(SERIES_CHUNKS_MAX).unwrap_or(i64::MAX).saturating_add(1);
            let rows = snapshot.query(
                "SELECT id::bigint, array_position(keys, $2) FROM key_sets WHERE topic_id = $1::bigint AND $2 = ANY(keys) LIMIT $3",
                &[&topic, &&*text_of(&query.key), &limit],
            )?;
            let key_sets: Arc<[_]> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
            let key: Arc<str> = text_of(&query.key).into();
            let has_samples = !key_sets.is_empty() || has_rows_with_keys(snapshot, topic)?;
            let place = has_samples.then_some(SeriesPlace { topic, key_sets, key, after: (from, -1), to });
            Ok(Some(FoundSeries { from, to, place }))
        })
    }

    /// Shows `each` the next samples behind a place, in the order of time, and moves that on. Returns whether there are
    /// more.
    ///
    /// # Errors
    /// [`QueryError`].
    pub(in crate::consume::query) fn read_samples(
        &self,
        place: &mut SeriesPlace,
        mut each: impl FnMut(ChunkSample),
    ) -> Result<bool, QueryError> {
        let SeriesPlace { topic, after: (at, offset), to, .. } = *place;
        let (sets, positions): (Vec<i64>, Vec<i32>) = place.key_sets.iter().copied().unzip();
        let key = &*place.key;
        let row = self.read(|snapshot| {
            snapshot.query_opt(
                SAMPLES_SQL,
                &[
                    &topic,
                    &PostgresTime(at),
                    &times_to(Some(to)),
                    &offset,
                    &sets,
                    &positions,
                    &SERIES_PIECE_SAMPLES,
                    &key,
                ],
            )
        })?;
        let Some(row) = row else { return Ok(false) };
        let times = row.get::<_, Option<Vec<PostgresTime>>>(0).unwrap_or_default();
        let offsets = row.get::<_, Option<Vec<i64>>>(1).unwrap_or_default();
        let values = row.get::<_, Option<Vec<f64>>>(2).unwrap_or_default();
        let count = i64::try_from(values.len()).unwrap_or(i64::MAX);
        for ((at, offset), value) in times.into_iter().zip(offsets).zip(values) {
            place.after = place.after.max((at.0, offset));
            each(ChunkSample { offset, at: at.0, value });
        }
        Ok(count >= SERIES_PIECE_SAMPLES)
    }
}

/// Whether rows of a topic's samples have their keys themselves.
fn has_rows_with_keys(snapshot: &PostgresSnapshot<'_>, topic: i64) -> Result<bool, PostgresFault> {
    let select = "SELECT EXISTS (SELECT FROM sample_rows WHERE topic_id = $1::bigint AND key_set_id = 0)";
    Ok(snapshot.query_opt(select, &[&topic])?.is_some_and(|row| row.get(0)))
}

/// The times of the oldest and of the newest sample of a topic, under whichever key.
fn topic_bounds(
    snapshot: &PostgresSnapshot<'_>,
    topic: i64,
) -> Result<Option<(TimeMicros, TimeMicros)>, PostgresFault> {
    let row = snapshot.query_opt(
        "SELECT (SELECT time FROM sample_rows WHERE topic_id = $1::bigint ORDER BY time LIMIT 1),
             (SELECT time FROM sample_rows WHERE topic_id = $1::bigint ORDER BY time DESC LIMIT 1)",
        &[&topic],
    )?;
    let bounds: Option<(Option<PostgresTime>, Option<PostgresTime>)> =
        row.map(|row| (row.get(0), row.get(1)));
    Ok(bounds.and_then(|(oldest, newest)| oldest.zip(newest)).map(|(oldest, newest)| (oldest.0, newest.0)))
}
