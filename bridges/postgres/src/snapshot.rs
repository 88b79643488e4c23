//! What a database holds at one moment, to be read. While it is open the server keeps what others replace meanwhile: it is
//! for short reads.

use std::future::Future;
use std::ops::ControlFlow;
use std::pin::pin;
use std::time::Duration;

use futures_util::TryStreamExt;
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Row, Transaction};

use crate::fault::PostgresFault;

/// How many rows a scan asks for first: whoever wants one is given few.
const SCAN_ROWS_FIRST: i32 = 32;
/// How many it asks for at most at a time.
const SCAN_ROWS_MAX: i32 = 4096;
/// About how many bytes it asks for at a time. What is sent and not wanted any more is received all the same.
const SCAN_STEP_BYTES: usize = 256 << 10;

/// A snapshot of a database (`REPEATABLE READ READ ONLY`). It ends when it is dropped.
pub struct PostgresSnapshot<'a> {
    pub(crate) transaction: Transaction<'a>,
    pub(crate) runtime: &'a Runtime,
    pub(crate) place: &'a str,
    pub(crate) answer_wait_max: Duration,
}

impl PostgresSnapshot<'_> {
    /// Runs statements without parameters.
    ///
    /// # Errors
    /// [`PostgresFault`].
    pub fn run(&self, statements: &str) -> Result<(), PostgresFault> {
        self.answer(self.transaction.batch_execute(statements))
    }

    /// The rows of a query, which are few.
    ///
    /// # Errors
    /// [`PostgresFault`].
    pub fn query(
        &self,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, PostgresFault> {
        self.answer(self.transaction.query(statement, parameters))
    }

    /// The row of a query that has one or none.
    ///
    /// # Errors
    /// [`PostgresFault`]; also if there are more.
    pub fn query_opt(
        &self,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>, PostgresFault> {
        self.answer(self.transaction.query_opt(statement, parameters))
    }

    /// Shows `each` the rows of a query, one after the other, until it breaks. However many there are and however large,
    /// few of them are in memory or on their way.
    ///
    /// # Errors
    /// [`PostgresFault`].
    pub fn scan(
        &self,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
        mut each: impl FnMut(&Row) -> ControlFlow<()>,
    ) -> Result<(), PostgresFault> {
        let portal = self.answer(async {
            let statement = self.transaction.prepare(statement).await?;
            self.transaction.bind(&statement, parameters).await
        })?;
        let mut rows_max = SCAN_ROWS_FIRST;
        loop {
            let (mut count, mut bytes) = (0, 0);
            let step = self.answer(async {
                let mut rows = pin!(self.transaction.query_portal_raw(&portal, rows_max).await?);
                while let Some(row) = rows.try_next().await? {
                    count += 1;
                    bytes += row.raw_size_bytes();
                    if each(&row).is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
                Ok(ControlFlow::Continue(()))
            })?;
            if step.is_break() || count < rows_max {
                return Ok(());
            }
            let mean = bytes / usize::try_from(count).unwrap_or(1).max(1);
            let wanted = i32::try_from(SCAN_STEP_BYTES / mean.max(1)).unwrap_or(SCAN_ROWS_MAX);
            // The next rows may be larger than those before: it grows in steps.
            rows_max = wanted.clamp(1, (rows_max * 4).min(SCAN_ROWS_MAX));
        }
    }

    fn answer<T>(
        &self,
        asked: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, PostgresFault> {
        block_on_answer(self.runtime, self.place, self.answer_wait_max, asked)
    }
}

/// Waits for an answer of the server's.
pub(crate) fn block_on_answer<T>(
    runtime: &Runtime,
    place: &str,
    wait: Duration,
    asked: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, PostgresFault> {
    match runtime.block_on(async { timeout(wait, asked).await }) {
        Ok(answered) => answered.map_err(|error| PostgresFault::of(&error, place)),
        Err(_) => Err(PostgresFault::Late { place: place.to_owned(), after: wait }),
    }
}
