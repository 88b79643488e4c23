//! Payloads in PostgreSQL from which a schema is inferred: the newest, and some of every earlier time.

use std::ops::ControlFlow;

use headgate_bridge_postgres::{PostgresFault, PostgresSnapshot, PostgresTime, Row};

use super::{PostgresRecords, row_id_of_scope};
use crate::consume::query::QueryError;
use crate::consume::schema_inference::{
    DatasourceObservation, INFERENCE_NEWEST_BYTES, INFERENCE_NEWEST_RECORDS, Inference,
};
use crate::filter::TopicFilter;
use crate::limits::{INFERENCE_BYTES_MAX, INFERENCE_RECORDS_MAX};
use crate::message::DatasourceId;

/// The newest records of a datasource, the newest first.
const NEWEST_SQL: &str = "SELECT t.topic, coalesce(e.payload_bytes, convert_to(e.payload::text, 'UTF8')), e.received_at, e.log_offset
     FROM entries e JOIN topics t ON t.id = e.topic_id
     WHERE e.datasource_id = $1 ORDER BY e.log_offset DESC LIMIT $2";

/// Records from one offset on and below another one, each at least a distance behind the one before.
const SPREAD_SQL: &str = "WITH RECURSIVE step (log_offset) AS (
         (SELECT log_offset FROM entries WHERE datasource_id = $1 AND log_offset >= $2 AND log_offset < $3
          ORDER BY log_offset LIMIT 1)
         UNION ALL
         SELECT (SELECT e.log_offset FROM entries e
                 WHERE e.datasource_id = $1 AND e.log_offset >= step.log_offset + $4 AND e.log_offset < $3
                 ORDER BY e.log_offset LIMIT 1)
         FROM step WHERE step.log_offset IS NOT NULL)
     SELECT t.topic, coalesce(e.payload_bytes, convert_to(e.payload::text, 'UTF8')), e.received_at, e.log_offset
     FROM step JOIN entries e ON e.datasource_id = $1 AND e.log_offset = step.log_offset JOIN topics t ON t.id = e.topic_id
     LIMIT $5";

impl PostgresRecords {
    /// See [`RecordsReader::inference`](crate::consume::query::RecordsReader::inference).
    ///
    /// # Errors
    /// [`QueryError`].
    pub(in crate::consume) fn inference(
        &self,
        scope: &DatasourceId,
        topics: Option<&[TopicFilter]>,
    ) -> Result<Inference, QueryError> {
        self.read(|snapshot| {
            let mut observed = DatasourceObservation::of_topics(topics);
            let Some(id) = row_id_of_scope(snapshot, scope)? else {
                observed.is_complete = true;
                return Ok(observed.infer());
            };
            if let Some(oldest) = observe_newest(&mut observed, snapshot, id)? {
                observe_earlier(&mut observed, snapshot, id, oldest)?;
            }
            Ok(observed.infer())
        })
    }
}

/// Examines the newest records. Returns the oldest offset of these, if there may be earlier ones.
fn observe_newest(
    observed: &mut DatasourceObservation<'_>,
    snapshot: &PostgresSnapshot,
    id: i32,
) -> Result<Option<i64>, PostgresFault> {
    let limit = i64::try_from(INFERENCE_NEWEST_RECORDS).unwrap_or(i64::MAX);
    let mut oldest = None;
    snapshot.scan(NEWEST_SQL, &[&id, &limit], |row| {
        if observed.bytes >= INFERENCE_NEWEST_BYTES {
            return ControlFlow::Break(());
        }
        observe_row(observed, row);
        oldest = Some(row.get(3));
        ControlFlow::Continue(())
    })?;
    observed.is_complete =
        observed.bytes < INFERENCE_NEWEST_BYTES && observed.looked_at < INFERENCE_NEWEST_RECORDS;
    Ok(oldest.filter(|_| !observed.is_complete))
}

/// Examines records from below an offset on, at equal distances down to the oldest one.
fn observe_earlier(
    observed: &mut DatasourceObservation<'_>,
    snapshot: &PostgresSnapshot,
    id: i32,
    below: i64,
) -> Result<(), PostgresFault> {
    let first = snapshot
        .query_opt("SELECT min(log_offset) FROM entries WHERE datasource_id = $1", &[&id])?
        .and_then(|row| row.get::<_, Option<i64>>(0));
    let Some(first) = first.filter(|&first| first < below) else {
        observed.is_complete = true;
        return Ok(());
    };
    let steps = i64::try_from(INFERENCE_RECORDS_MAX - INFERENCE_NEWEST_RECORDS).unwrap_or(i64::MAX);
    let stride = ((below - first) / steps).max(1);
    observed.is_complete = stride == 1 && below - first <= steps;
    snapshot.scan(SPREAD_SQL, &[&id, &first, &below, &stride, &steps], |row| {
        if observed.bytes >= INFERENCE_BYTES_MAX {
            observed.is_complete = false;
            return ControlFlow::Break(());
        }
        observe_row(observed, row);
        ControlFlow::Continue(())
    })
}

fn observe_row(observed: &mut DatasourceObservation<'_>, row: &Row) {
    observed.observe_at(row.get(0), row.get(1), row.get::<_, PostgresTime>(2).0);
}
