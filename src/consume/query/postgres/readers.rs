//! Connections to PostgreSQL for those who read: few, kept between queries, and none of them the one that writes.
//!
//! Each read is one short transaction that sees one moment, and no more than a piece of an answer: between pieces a client,
//! however slow, holds none. A server that does not answer is asked again by one reader at a time; the others are told at
//! once, so that they hold no thread that somebody else needs.

use std::time::Instant;

use headgate_bridge_postgres::{PostgresConnection, PostgresFault, PostgresSnapshot};
use parking_lot::{Condvar, Mutex};

use super::super::QueryError;
use crate::config::PostgresConfig;
use crate::consume::sink::postgres::PostgresError;
use crate::consume::sink::postgres::schema::{check_format, quoted};
use crate::limits::{
    POSTGRES_READ_WAIT_MAX, POSTGRES_READER_AWAY_PAUSE, POSTGRES_READER_OPEN_WAIT_MAX,
    POSTGRES_READER_WAIT_MAX, POSTGRES_READERS_MAX, POSTGRES_READERS_WAITING_MAX,
};

/// What a connection begins with. Answers come in the order of an index, which has to be used however little the server
/// knows of its tables yet: the other ways read and sort all that there is before the first row.
const READER_SETTINGS: &str = "SET default_transaction_read_only = on; SET statement_timeout = '10s'; \
     SET lock_timeout = '5s'; SET idle_in_transaction_session_timeout = '15s'; SET client_min_messages = 'warning'; \
     SET jit = off; SET max_parallel_workers_per_gather = 0; SET enable_seqscan = off; SET enable_bitmapscan = off; \
     SET enable_sort = off; SET enable_hashjoin = off; SET enable_mergejoin = off";

/// Reads a schema of a database. Blocks, so use it where blocking is allowed.
pub struct PostgresReaders {
    config: PostgresConfig,
    pool: Mutex<ReaderPool>,
    /// Told when a connection is given back, or may be opened.
    returned: Condvar,
}

/// The connections, and who waits for one.
#[derive(Default)]
struct ReaderPool {
    idle: Vec<PostgresConnection>,
    /// Those in use or being opened: one for each [`ReaderPlace`].
    in_use: usize,
    waiting: usize,
    /// When the server was found to be away, until it is back.
    away_since: Option<Instant>,
    /// Whether somebody is finding out whether it is back.
    is_probing: bool,
}

impl ReaderPool {
    fn has_room(&self) -> bool {
        self.in_use + self.idle.len() < POSTGRES_READERS_MAX
    }
}

/// The place of a reader among those that there may be. It is given back however the read ends, also with a panic.
struct ReaderPlace<'a> {
    readers: &'a PostgresReaders,
    /// Whether it is finding out whether the server is back.
    is_probe: bool,
}

impl Drop for ReaderPlace<'_> {
    fn drop(&mut self) {
        let mut pool = self.readers.pool.lock();
        pool.in_use -= 1;
        pool.is_probing &= !self.is_probe;
        drop(pool);
        self.readers.returned.notify_one();
    }
}

impl PostgresReaders {
    /// Readers of the schema of these settings. None is open yet.
    pub(in crate::consume) fn new(config: &PostgresConfig) -> Self {
        Self { config: config.clone(), pool: Mutex::default(), returned: Condvar::new() }
    }

    /// Runs `read` on a snapshot of the database, whatever is written meanwhile. It may be run twice.
    ///
    /// # Errors
    /// [`QueryError::PostgresAway`], [`QueryError::PostgresBusy`], [`QueryError::Postgres`].
    pub(super) fn read<T>(
        &self,
        mut read: impl FnMut(&PostgresSnapshot<'_>) -> Result<T, PostgresFault>,
    ) -> Result<T, QueryError> {
        let mut run = |connection: &mut PostgresConnection| read(&connection.snapshot()?);
        let (mut place, idle) = self.take()?;
        let is_new = idle.is_none();
        let mut connection = match idle {
            Some(connection) => connection,
            None => self.open(&mut place)?,
        };
        let mut answer = run(&mut connection);
        if !is_new && answer.as_ref().err().is_some_and(|fault| fault.is_away() && !fault.is_late()) {
            // The server has ended it while it was idle, and the others with it.
            drop(connection);
            let others = std::mem::take(&mut self.pool.lock().idle);
            drop(others);
            // As many may be opened.
            self.returned.notify_all();
            connection = self.open(&mut place)?;
            answer = run(&mut connection);
        }
        match answer {
            Ok(answer) => {
                self.give_back(connection);
                Ok(answer)
            }
            Err(fault) => {
                drop(connection);
                Err(self.note_fault(fault))
            }
        }
    }

    /// Takes a place, with a connection if one is idle. Otherwise it is the right to open one.
    fn take(&self) -> Result<(ReaderPlace<'_>, Option<PostgresConnection>), QueryError> {
        let deadline = Instant::now() + POSTGRES_READER_WAIT_MAX;
        let mut pool = self.pool.lock();
        loop {
            if let Some(since) = pool.away_since {
                if pool.is_probing || since.elapsed() < POSTGRES_READER_AWAY_PAUSE {
                    return Err(QueryError::PostgresAway);
                }
                if pool.idle.is_empty() && pool.has_room() {
                    pool.is_probing = true;
                    pool.in_use += 1;
                    return Ok((ReaderPlace { readers: self, is_probe: true }, None));
                }
            }
            if !pool.idle.is_empty() || pool.has_room() {
                let idle = pool.idle.pop();
                pool.in_use += 1;
                return Ok((ReaderPlace { readers: self, is_probe: false }, idle));
            }
            if pool.waiting >= POSTGRES_READERS_WAITING_MAX {
                return Err(QueryError::PostgresBusy);
            }
            pool.waiting += 1;
            let is_late = self.returned.wait_until(&mut pool, deadline).timed_out();
            pool.waiting -= 1;
            if is_late {
                return Err(QueryError::PostgresBusy);
            }
        }
    }

    /// Opens a connection for a place.
    fn open(&self, place: &mut ReaderPlace<'_>) -> Result<PostgresConnection, QueryError> {
        match self.connect() {
            Ok(connection) => {
                let mut pool = self.pool.lock();
                (pool.away_since, pool.is_probing, place.is_probe) = (None, false, false);
                Ok(connection)
            }
            Err(error) => {
                self.note_away(&error);
                Err(match error {
                    PostgresError::Database(fault) if fault.is_away() => QueryError::PostgresAway,
                    error => QueryError::PostgresUnfit(error.to_string()),
                })
            }
        }
    }

    fn connect(&self) -> Result<PostgresConnection, PostgresError> {
        let settings = self.config.settings()?;
        let mut connection = PostgresConnection::open_within(&settings, POSTGRES_READER_OPEN_WAIT_MAX)?;
        connection.set_answer_wait_max(POSTGRES_READ_WAIT_MAX);
        connection.run(READER_SETTINGS)?;
        check_format(&connection, &self.config.schema)?;
        connection.run(&format!("SET search_path = {}", quoted(&self.config.schema)))?;
        Ok(connection)
    }

    fn give_back(&self, connection: PostgresConnection) {
        let mut pool = self.pool.lock();
        pool.idle.push(connection);
        pool.away_since = None;
    }

    /// Notes what the server was found to be away with.
    fn note_away(&self, error: &dyn std::error::Error) {
        if self.pool.lock().away_since.replace(Instant::now()).is_none() {
            tracing::warn!(%error, "PostgreSQL cannot be read");
        }
        // Whoever waits for a place learns it at once.
        self.returned.notify_all();
    }

    fn note_fault(&self, fault: PostgresFault) -> QueryError {
        if fault.is_away() {
            self.note_away(&fault);
            return QueryError::PostgresAway;
        }
        QueryError::Postgres(fault)
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn a_read_that_panics_gives_its_place_back() {
        let readers = PostgresReaders::new(&PostgresConfig::default());
        let panicked = |readers: &PostgresReaders| {
            let read = || {
                let (_place, idle) = readers.take().expect("there is room");
                assert!(idle.is_some(), "nothing is idle, so this panics");
            };
            catch_unwind(AssertUnwindSafe(read)).expect_err("it panics");
        };
        for _ in 0..=POSTGRES_READERS_MAX {
            panicked(&readers);
        }
        // Also that of the one who finds out whether the server is back.
        readers.pool.lock().away_since = Instant::now().checked_sub(2 * POSTGRES_READER_AWAY_PAUSE);
        for _ in 0..2 {
            panicked(&readers);
        }
        assert_eq!(readers.pool.lock().in_use, 0);
    }

    #[test]
    fn one_at_a_time_finds_out_whether_the_server_is_back() {
        let readers = PostgresReaders::new(&PostgresConfig::default());
        readers.pool.lock().away_since = Instant::now().checked_sub(2 * POSTGRES_READER_AWAY_PAUSE);
        let probe = readers.take().expect("it looks");
        assert!(matches!(readers.take(), Err(QueryError::PostgresAway)));
        drop(probe);
        assert!(readers.take().is_ok(), "the next one looks");
    }
}
