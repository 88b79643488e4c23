//! A second connection, over which large transactions copy samples: a server gives each connection one processor, and samples
//! take a third of what a record takes there. Small transactions do without.
//!
//! Records and samples are two transactions then, and each moves a cursor of its own. That of the samples ends after the other:
//! they are never ahead of their records, also where a crash of the server takes back what was committed last. If they are
//! behind, because something was killed in between, what is missing is stored before anything else. That transaction and
//! those of the lane move the lane's cursor from where they have found it, so that of two only one counts.

use std::time::{Duration, Instant};

use headgate_bridge_postgres::PostgresConnection;

use super::insert::CopyScope;
use super::schema::quoted;
use super::{PostgresError, PostgresSink, SESSION_SETTINGS, lease};
use crate::config::PostgresConfig;
use crate::consume::sink::schema::sql_offset;
use crate::message::{Offset, RecordRef};

/// A transaction of fewer records copies its samples itself.
const LANE_RECORDS_MIN: usize = 8192;
/// How long a lane stays open without a large transaction.
const LANE_IDLE_MAX: Duration = Duration::from_secs(30);
/// How long it may take to open one: the place of the one that writes is kept by transactions.
const LANE_OPEN_WAIT_MAX: Duration = Duration::from_secs(3);
/// After how long another one is tried that could not be opened.
const LANE_PAUSE: Duration = Duration::from_secs(30);

/// The connection.
pub(super) struct SampleLane {
    connection: PostgresConnection,
    used_at: Instant,
}

impl SampleLane {
    fn open(config: &PostgresConfig) -> Result<Self, PostgresError> {
        let connection = PostgresConnection::open_within(&config.settings()?, LANE_OPEN_WAIT_MAX)?;
        connection.run(SESSION_SETTINGS)?;
        // What has the lane's row locked is the transaction of one that is gone, and ends soon.
        connection.run(&format!("SET lock_timeout = '3s'; SET search_path = {}", quoted(&config.schema)))?;
        connection.execute(
            "UPDATE sample_lane SET pid = pg_backend_pid(),
                 pid_since = (SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid())",
            &[],
        )?;
        Ok(Self { connection, used_at: Instant::now() })
    }

    /// Where its rows are copied.
    pub(super) fn connection(&self) -> &PostgresConnection {
        &self.connection
    }

    /// Begins the transaction of samples up to `next`. The lane's cursor has to be at `stored`.
    pub(super) fn begin(&self, begin: &str, stored: Offset, next: Offset) -> Result<bool, PostgresError> {
        self.connection.run(begin)?;
        let moved = self.connection.execute(
            "UPDATE sample_lane SET next_offset = $2 WHERE next_offset = $1",
            &[&sql_offset(stored), &sql_offset(next)],
        )?;
        Ok(moved == 1)
    }

    /// Ends it. Those of the records have to be committed.
    pub(super) fn commit(&mut self) -> Result<(), PostgresError> {
        self.connection.run("COMMIT")?;
        self.used_at = Instant::now();
        Ok(())
    }
}

impl PostgresSink {
    /// The lane for a transaction of so many records, if it is to have one. Whoever takes it gives it back once both
    /// transactions are committed; otherwise its connection ends, and what it has begun with it.
    pub(super) fn take_lane(&mut self, records: usize) -> Option<SampleLane> {
        if !self.has_samples || records < LANE_RECORDS_MIN {
            if self.lane.as_ref().is_some_and(|lane| lane.used_at.elapsed() >= LANE_IDLE_MAX) {
                self.lane = None;
            }
            return None;
        }
        if let Some(lane) = self.lane.take() {
            return Some(lane);
        }
        if self.lane_failed_at.is_some_and(|at| at.elapsed() < LANE_PAUSE) {
            return None;
        }
        match SampleLane::open(&self.config) {
            Ok(lane) => {
                self.lane_failed_at = None;
                Some(lane)
            }
            Err(error) => {
                tracing::warn!(%error, "PostgreSQL gives no second connection: storage catches up over one");
                self.lane_failed_at = Some(Instant::now());
                None
            }
        }
    }

    /// Stores the samples of records up to `next` that are stored without them, durably.
    pub(super) fn store_missing_samples(
        &mut self,
        records: &[RecordRef<'_>],
        next: Offset,
    ) -> Result<(), PostgresError> {
        let next = next.min(self.cursor);
        let missing = records.partition_point(|record| record.offset < next);
        self.within("BEGIN", |sink| {
            let moved = sink.connection.execute(
                "WITH lane AS (UPDATE sample_lane SET next_offset = $2 WHERE next_offset = $1 RETURNING id)
                 UPDATE sink SET samples_from = nullif($2, next_offset),
                     lease_until = clock_timestamp() + $4 * interval '1 second'
                 WHERE owner = $3 AND owner_pid = pg_backend_pid() AND EXISTS (SELECT FROM lane)",
                &[&sql_offset(sink.lane_offset), &sql_offset(next), &sink.name, &lease::LEASE_S],
            )?;
            match moved {
                1 => sink.insert_records(&records[..missing], false, CopyScope::Samples),
                _ => Err(sink.cursor_moved()),
            }
        })?;
        // They were counted when they were stored.
        self.sizes.clear();
        self.leased_at = Some(Instant::now());
        (self.samples_cursor, self.lane_offset) = (next, next);
        self.durable_cursor = self.durable_cursor.max(next);
        Ok(())
    }
}
