//! What PostgreSQL has stored, read with the same answers as `records.db`. [`readers`] has the connections; each other file
//! reads what the file of that name one level up reads of SQLite.
//!
//! JSON payloads are those of the server's column: with `jsonb` the same values in its own order and spacing.

mod inference;
mod latest;
mod quarantine;
mod range;
mod readers;
mod records;
pub(super) mod series;

use std::sync::Arc;

use headgate_bridge_postgres::{PostgresFault, PostgresSnapshot};

pub(super) use self::readers::PostgresReaders;
use super::QueryError;
use crate::config::PostgresConfig;
use crate::consume::sink::postgres::text_of;
use crate::message::DatasourceId;

/// Reads the tables of PostgreSQL. Cheap to clone.
#[derive(Clone)]
pub struct PostgresRecords {
    readers: Arc<PostgresReaders>,
}

impl PostgresRecords {
    /// A reader of the schema of these settings. It connects when it is read.
    pub(super) fn new(config: &PostgresConfig) -> Self {
        Self { readers: Arc::new(PostgresReaders::new(config)) }
    }

    /// Runs `read` on a snapshot. It may be run twice.
    ///
    /// # Errors
    /// As [`PostgresReaders::read`].
    fn read<T>(
        &self,
        read: impl FnMut(&PostgresSnapshot<'_>) -> Result<T, PostgresFault>,
    ) -> Result<T, QueryError> {
        self.readers.read(read)
    }
}

/// The row id of the incarnation whose scope this is, if it has records.
fn row_id_of_scope(
    snapshot: &PostgresSnapshot<'_>,
    scope: &DatasourceId,
) -> Result<Option<i32>, PostgresFault> {
    let (id, incarnation) = scope.of_scope();
    let row = snapshot.query_opt(
        "SELECT id FROM datasources WHERE incarnation = $3 AND datasource IN ($1, $2) LIMIT 1",
        &[&id.as_str(), &format!("{id}~{incarnation}"), &i64::from(incarnation)],
    )?;
    Ok(row.map(|row| row.get(0)))
}

/// The row id of a topic.
fn topic_id(
    snapshot: &PostgresSnapshot<'_>,
    datasource: i32,
    topic: &str,
) -> Result<Option<i64>, PostgresFault> {
    let row = snapshot.query_opt(
        "SELECT id::bigint FROM topics WHERE datasource_id = $1 AND topic = $2",
        &[&datasource, &&*text_of(topic)],
    )?;
    Ok(row.map(|row| row.get(0)))
}
