//! From where on records of a datasource are stored in PostgreSQL, and up to where; and how many there are.

use headgate_bridge_postgres::{PostgresFault, PostgresTime};

use super::{PostgresRecords, row_id_of_scope};
use crate::consume::query::{QueryError, StoredRange};
use crate::consume::sink::schema::offset_from_sql;
use crate::message::DatasourceId;

impl PostgresRecords {
    /// What is stored of an incarnation.
    ///
    /// # Errors
    /// [`QueryError`].
    pub(in crate::consume::query) fn range_of(
        &self,
        scope: &DatasourceId,
    ) -> Result<StoredRange, QueryError> {
        self.read(|snapshot| {
            let end = snapshot.query_opt("SELECT next_offset FROM sink", &[])?;
            let end = end.map_or(0, |row| offset_from_sql(row.get(0)));
            let mut range = StoredRange { first: None, removed_below: None, end };
            let Some(id) = row_id_of_scope(snapshot, scope)? else { return Ok(range) };
            let first = snapshot.query_opt(
                "SELECT log_offset, received_at FROM entries WHERE datasource_id = $1 ORDER BY log_offset LIMIT 1",
                &[&id],
            )?;
            range.first = first.map(|row| (offset_from_sql(row.get(0)), row.get::<_, PostgresTime>(1).0));
            let removed = snapshot
                .query_opt("SELECT removed_below FROM retention WHERE datasource_id = $1", &[&id])?;
            range.removed_below = removed.map(|row| offset_from_sql(row.get(0)));
            Ok(range)
        })
    }

    /// How many records are stored of an incarnation, how many are in quarantine, and the sum of the payloads of both in
    /// bytes.
    ///
    /// # Errors
    /// [`QueryError`].
    pub(in crate::consume::query) fn count_of(
        &self,
        scope: &DatasourceId,
    ) -> Result<(u64, u64, u64), QueryError> {
        self.read(|snapshot| {
            let Some(id) = row_id_of_scope(snapshot, scope)? else { return Ok((0, 0, 0)) };
            let count = |table: &str| -> Result<(u64, u64), PostgresFault> {
                let select = format!(
                    "SELECT count(*), coalesce(sum(coalesce(payload_size, octet_length(payload_bytes),
                         octet_length(payload::text))), 0)::bigint FROM {table} WHERE datasource_id = $1"
                );
                let row = snapshot.query_opt(&select, &[&id])?;
                Ok(row.map_or((0, 0), |row| (offset_from_sql(row.get(0)), offset_from_sql(row.get(1)))))
            };
            let ((records, bytes), (quarantined, more)) = (count("entries")?, count("quarantined")?);
            Ok((records, quarantined, bytes + more))
        })
    }
}
