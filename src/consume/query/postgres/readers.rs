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
    /// Told when a connection is given back.
    returned: Condvar,
}

/// The connections, and who waits for one.
#[derive(Default)]
struct ReaderPool {
    idle: Vec<PostgresConnection>,
    /// All that there are, in use or idle, or being opened.
    open: usize,
    waiting: usize,
    /// When the server was found to be away, until it is back.
    away_since: Option<Instant>,
    /// Whether somebody is finding out whether it is back.
    is_probing: bool,
}

/// What a reader may do next.
enum ReaderTurn {
    Use(PostgresConnection),
    Open,
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
        let (mut connection, is_new) = match self.take()? {
            ReaderTurn::Use(connection) => (connection, false),
            ReaderTurn::Open => (self.open()?, true),
        };
        let mut answer = run(&mut connection);
        if !is_new && answer.as_ref().err().is_some_and(|fault| fault.is_away() && !fault.is_late()) {
            // The server has ended it while it was idle, and the others with it.
            drop(connection);
            let others = {
                let mut pool = self.pool.lock();
                pool.open -= pool.idle.len();
                std::mem::take(&mut pool.idle)
            };
            drop(others);
            connection = self.open()?;
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

    /// Takes a connection, or the right to open one.
    fn take(&self) -> Result<ReaderTurn, QueryError> {
        let deadline = Instant::now() + POSTGRES_READER_WAIT_MAX;
        let mut pool = self.pool.lock();
        loop {
            if let Some(since) = pool.away_since {
                if pool.is_probing || since.elapsed() < POSTGRES_READER_AWAY_PAUSE {
                    return Err(QueryError::PostgresAway);
                }
                if pool.idle.is_empty() && pool.open < POSTGRES_READERS_MAX {
                    pool.is_probing = true;
                    pool.open += 1;
                    return Ok(ReaderTurn::Open);
                }
            }
            if let Some(connection) = pool.idle.pop() {
                return Ok(ReaderTurn::Use(connection));
            }
            if pool.open < POSTGRES_READERS_MAX {
                pool.open += 1;
                return Ok(ReaderTurn::Open);
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

    /// Opens a connection, which is counted already.
    fn open(&self) -> Result<PostgresConnection, QueryError> {
        match self.connect() {
            Ok(connection) => {
                let mut pool = self.pool.lock();
                (pool.away_since, pool.is_probing) = (None, false);
                Ok(connection)
            }
            Err(error) => {
                self.forget_one(Some(&error));
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
        drop(pool);
        self.returned.notify_one();
    }

    /// Notes that a connection is no more, and what the server was found to be `away` with. It is closed, so that no
    /// statement goes on in it.
    fn forget_one(&self, away: Option<&dyn std::error::Error>) {
        let mut pool = self.pool.lock();
        pool.open = pool.open.saturating_sub(1);
        if let Some(error) = away {
            if pool.away_since.replace(Instant::now()).is_none() {
                tracing::warn!(%error, "PostgreSQL cannot be read");
            }
            pool.is_probing = false;
        }
        drop(pool);
        self.returned.notify_one();
    }

    fn note_fault(&self, fault: PostgresFault) -> QueryError {
        if fault.is_away() {
            self.forget_one(Some(&fault));
            return QueryError::PostgresAway;
        }
        self.forget_one(None);
        QueryError::Postgres(fault)
    }
}
