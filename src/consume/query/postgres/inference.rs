//! The newest payloads in PostgreSQL, from which a schema is inferred.

use std::ops::ControlFlow;

use super::{PostgresRecords, row_id_of_scope};
use crate::consume::query::QueryError;
use crate::consume::schema_inference::{DatasourceObservation, Inference};
use crate::limits::{INFERENCE_BYTES_MAX, INFERENCE_RECORDS_MAX};
use crate::message::DatasourceId;

impl PostgresRecords {
    /// See [`RecordsReader::inference`](crate::consume::query::RecordsReader::inference).
    ///
    /// # Errors
    /// [`QueryError`].
    pub(in crate::consume) fn inference(&self, scope: &DatasourceId) -> Result<Inference, QueryError> {
        self.read(|snapshot| {
            let mut observed = DatasourceObservation::default();
            let Some(id) = row_id_of_scope(snapshot, scope)? else {
                observed.is_complete = true;
                return Ok(observed.infer());
            };
            observed.is_complete = true;
            let (mut bytes, mut left) = (0, INFERENCE_RECORDS_MAX);
            snapshot.scan(
                "SELECT t.topic, coalesce(e.payload_bytes, convert_to(e.payload::text, 'UTF8'))
                 FROM entries e JOIN topics t ON t.id = e.topic_id
                 WHERE e.datasource_id = $1 ORDER BY e.log_offset DESC",
                &[&id],
                |row| {
                    if left == 0 || bytes >= INFERENCE_BYTES_MAX {
                        observed.is_complete = false;
                        return ControlFlow::Break(());
                    }
                    left -= 1;
                    let payload: &[u8] = row.get(1);
                    bytes += payload.len();
                    observed.observe(row.get(0), payload);
                    ControlFlow::Continue(())
                },
            )?;
            Ok(observed.infer())
        })
    }
}
