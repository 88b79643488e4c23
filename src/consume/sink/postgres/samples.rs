//! The samples of new records in PostgreSQL: a row for each number in a payload.

use headgate_bridge_postgres::CopyRows;

use super::{PostgresError, PostgresSink};
use crate::consume::sink::schema::sql_offset;
use crate::message::RecordRef;

impl PostgresSink {
    /// Adds the rows of a record's samples.
    pub(super) fn add_samples(
        &mut self,
        rows: &mut CopyRows,
        record: &RecordRef<'_>,
        topic: i32,
    ) -> Result<(), PostgresError> {
        if !self.has_samples {
            return Ok(());
        }
        let mut reader = std::mem::take(&mut self.reader);
        let mut sampled = std::mem::take(&mut self.sampled);
        let found: Vec<_> =
            reader.read(record.topic, record.content_type, record.payload, record.received_at).collect();
        let keys: Vec<&str> = found.iter().map(|sample| sample.key).collect();
        let mut added = self.learn_series(topic, &keys);
        if added.is_ok() {
            for sample in &found {
                match self.series_id(topic, sample.key) {
                    Ok(series) => sampled.push((series, sample.value, sample.at)),
                    Err(error) => added = Err(error),
                }
            }
        }
        drop(found);
        for (series, value, at) in sampled.drain(..) {
            rows.begin(4);
            rows.timestamptz(at.or(record.event_at).unwrap_or(record.received_at));
            rows.int8(sql_offset(record.offset));
            rows.float8(value);
            rows.int4(series);
        }
        (self.reader, self.sampled) = (reader, sampled);
        added
    }
}
