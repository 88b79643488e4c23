//! From where on records of a datasource are stored, and up to where.

use rusqlite::{Connection, OptionalExtension};

use super::{QueryError, RecordsReader, row_id_of_scope};
use crate::consume::sink::retention::read_removed_below;
use crate::consume::sink::schema::offset_from_sql;
use crate::message::{DatasourceId, Offset, TimeMicros};

/// What is stored of a datasource, at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredRange {
    /// The offset of the oldest record, and when that was received.
    pub first: Option<(Offset, TimeMicros)>,
    /// The offset below which retention has removed all records, if it has removed any.
    pub removed_below: Option<Offset>,
    /// The first offset of the log that is not stored, whatever datasource it is of.
    pub end: Offset,
}

impl RecordsReader {
    /// What is stored of an incarnation.
    ///
    /// # Errors
    /// [`QueryError::Database`].
    pub fn range_of(&self, scope: &DatasourceId) -> Result<StoredRange, QueryError> {
        let stored = match self {
            Self::Sqlite(stored) => stored,
            Self::Postgres(stored) => return stored.range_of(scope),
        };
        stored.read(|connection| {
            let end = connection.query_row("SELECT next_offset FROM cursor", [], |row| row.get(0))?;
            let mut range = StoredRange { first: None, removed_below: None, end: offset_from_sql(end) };
            if let Some(id) = row_id_of_scope(connection, scope)? {
                range.first = oldest_of(connection, id)?;
                range.removed_below = read_removed_below(connection, id)?;
            }
            Ok(range)
        })
    }
}

fn oldest_of(connection: &Connection, datasource: i64) -> rusqlite::Result<Option<(Offset, TimeMicros)>> {
    connection
        .prepare_cached(
            "SELECT offset, received_us FROM entries WHERE datasource_id = ?1 ORDER BY offset LIMIT 1",
        )?
        .query_row([datasource], |row| Ok((offset_from_sql(row.get(0)?), row.get(1)?)))
        .optional()
}
