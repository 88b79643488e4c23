//! PostgreSQL as a sink. [`schema`] describes its tables.
//!
//! One transaction copies a run of records, moves the cursor behind them and writes the newest values that they bring; the samples
//! of a large one have a transaction of their own beside it ([`sample_lane`]). A
//! kill of the gateway or of the server at any moment leaves all of it or nothing, and the cursor says which. Most
//! transactions do not wait for the server's disk (`synchronous_commit = off`): after its crash the database may be back at
//! an earlier one, with its cursor. The log still has what came after, because it is told only of what is durable.
//!
//! **One gateway writes.** The row with the cursor names the connection that may move it, and until when no other may take
//! its place ([`lease`]). Whatever moves the cursor names the connection and the cursor that it expects: a gateway that
//! was cut off, and is back, changes nothing.
//!
//! **A value that PostgreSQL cannot take** stops nothing. JSON that `jsonb` refuses ([`json_fit`]) is stored as the bytes that it
//! is, with the reason in `payload_note`; whatever else a copy fails at is found by halving the copy, and stored so as well.

mod ahead;
mod ids;
mod incarnations;
mod insert;
mod json_fit;
mod lease;
mod newest;
mod quarantined;
mod retention;
mod sample_lane;
mod samples;
pub(in crate::consume) mod schema;

use std::time::{Duration, Instant};

use headgate_bridge_postgres::{PostgresConnection, PostgresFault};

use self::ids::RememberedNames;
pub(in crate::consume) use self::ids::text_of;
use self::insert::{CopyScope, PayloadForm};
use self::retention::CountedSizes;
use self::sample_lane::SampleLane;
use super::schema::{offset_from_sql, sql_offset};
use crate::config::{ConfigError, PostgresConfig};
use crate::log::{IncarnationStep, Log, WithheldChange, WithheldRules, WithheldSnapshot};
use crate::message::{DatasourceId, Offset, RecordRef};
use crate::values::SampleReader;

/// How long the server may take to follow a rule about what is left out, which may be about all that is stored.
const RECONCILE_WAIT_MAX: Duration = Duration::from_secs(15 * 60);
/// What a connection begins with: a gateway that is gone or stopped must not hold a lock for ever.
const SESSION_SETTINGS: &str = "SET statement_timeout = '120s'; SET lock_timeout = '10s'; \
     SET idle_in_transaction_session_timeout = '30s'; SET client_min_messages = 'warning'";

/// Why PostgreSQL did not take records, or could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    /// The server's, or the network's.
    #[error(transparent)]
    Database(#[from] PostgresFault),
    /// The file with the password cannot be read.
    #[error(transparent)]
    Settings(#[from] ConfigError),
    /// The server is too old.
    #[error("PostgreSQL {version} is too old: 14 is the oldest that is used")]
    OldServer {
        /// Its version.
        version: i32,
    },
    /// The database does not keep text as UTF-8.
    #[error(
        "the database has the encoding {0}: it has to be UTF8 (CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0)"
    )]
    Encoding(String),
    /// A newer Headgate has made the tables.
    #[error("the tables are of format {found}, and this Headgate knows {newest}: a newer one has made them")]
    NewerFormat {
        /// Their format.
        found: i32,
        /// The newest that is known.
        newest: i32,
    },
    /// The tables are not there, or of an earlier format: whoever writes makes them.
    #[error("the schema {schema} has no tables of format {newest} yet: storage makes them")]
    NotMade {
        /// The schema.
        schema: String,
        /// The newest format.
        newest: i32,
    },
    /// Another gateway, with another log, writes into the same schema.
    #[error(
        "another gateway writes into the schema {schema}: give each log a schema of its own (storage.postgres.schema)"
    )]
    OtherOwner {
        /// The schema.
        schema: String,
    },
    /// What is stored is of another log.
    #[error(
        "what the schema {schema} holds does not fit the log ({why}): choose another one (storage.postgres.schema), or \
         rename that, and storage is made again from the log"
    )]
    OtherLog {
        /// The schema.
        schema: String,
        /// What does not fit.
        why: String,
    },
    /// Another gateway has stored by rules about keys that this one does not have yet.
    #[error(
        "the tables follow the rules about leaked keys up to version {stored}, and this gateway has heard of {known}: \
         another gateway goes on, or this one when it has caught up"
    )]
    RulesBehind {
        /// What the tables follow.
        stored: u64,
        /// What this gateway knows.
        known: u64,
    },
    /// The ids of a column are used up.
    #[error(
        "the tables in the schema {schema} have no id left for what is new ({why}): their columns have to become bigint, as \
         docs/operating.md says"
    )]
    OutOfIds {
        /// The schema.
        schema: String,
        /// What the server says.
        why: PostgresFault,
    },
    /// Another gateway has moved the cursor.
    #[error("another gateway has written into the schema {schema}: its cursor is no longer {expected}")]
    CursorMoved {
        /// The schema.
        schema: String,
        /// Where this sink left it.
        expected: Offset,
    },
}

impl PostgresError {
    /// Whether a value is the trouble, so that no later attempt can do better.
    fn is_of_value(&self) -> bool {
        matches!(self, Self::Database(fault) if fault.is_of_value())
    }
}

/// The open database and its cursor in the log.
pub(in crate::consume) struct PostgresSink {
    connection: PostgresConnection,
    config: PostgresConfig,
    /// Whether other gateways with the same log write into the same tables.
    is_shared: bool,
    has_samples: bool,
    form: PayloadForm,
    /// Whether ids of names are bigint.
    has_wide_ids: bool,
    /// What this sink is called in the row with the cursor.
    name: String,
    /// When this gateway began to want its place.
    started_at: Instant,
    /// When the lease was had last; `None` while another gateway has it.
    leased_at: Option<Instant>,
    /// The first offset whose record is not stored.
    cursor: Offset,
    /// The first one whose samples are not: the same, but after a crash in between.
    samples_cursor: Offset,
    durable_cursor: Offset,
    lane: Option<SampleLane>,
    lane_failed_at: Option<Instant>,
    /// The cursor of the lane.
    lane_offset: Offset,
    withheld_version: u64,
    left_out: Option<WithheldSnapshot>,
    /// The incarnation that a purge has begun to remove.
    purging: Option<DatasourceId>,
    names: RememberedNames,
    sizes: CountedSizes,
    reader: SampleReader,
}

impl PostgresSink {
    /// Connects, makes the tables or brings them up to date, and reads the cursor.
    ///
    /// # Errors
    /// [`PostgresError`].
    pub(in crate::consume) fn open(
        config: &PostgresConfig,
        has_samples: bool,
        is_shared: bool,
        started_at: Instant,
    ) -> Result<Self, PostgresError> {
        let mut connection = PostgresConnection::open(&config.settings()?)?;
        connection.run(SESSION_SETTINGS)?;
        // Tables of an earlier format may be large.
        connection.set_answer_wait_max(RECONCILE_WAIT_MAX);
        schema::open_schema(&connection, &config.schema, config.json.as_str())?;
        connection.reset_answer_wait_max();
        let form = PayloadForm::of_table(&connection)?;
        let has_wide_ids = schema::has_wide_ids(&connection)?;
        let name = format!("{:016x}", rand::random::<u64>());
        let mut sink = Self {
            connection,
            config: config.clone(),
            is_shared,
            has_samples,
            form,
            has_wide_ids,
            name,
            started_at,
            leased_at: None,
            cursor: 0,
            samples_cursor: 0,
            durable_cursor: 0,
            lane: None,
            lane_failed_at: None,
            lane_offset: 0,
            withheld_version: 0,
            left_out: None,
            purging: None,
            names: RememberedNames::default(),
            sizes: CountedSizes::default(),
            reader: SampleReader::default(),
        };
        sink.read_cursor()?;
        Ok(sink)
    }

    /// Takes over where the database is.
    fn read_cursor(&mut self) -> Result<(), PostgresError> {
        let row = self.connection.query_one(
            "SELECT s.next_offset, s.durable_offset, s.withheld_version, l.next_offset,
                 CASE WHEN l.next_offset <= s.samples_from THEN s.samples_from ELSE s.next_offset END
             FROM sink s, sample_lane l",
            &[],
        )?;
        let offset = |place: usize| offset_from_sql(row.get(place));
        (self.cursor, self.lane_offset, self.samples_cursor) = (offset(0), offset(3), offset(4));
        // What is durable of the records is so of the samples before the last transaction too.
        self.durable_cursor = offset(1).min(self.samples_cursor);
        self.withheld_version = offset(2);
        Ok(())
    }

    /// Runs `work` in a transaction.
    fn within<T>(
        &mut self,
        begin: &str,
        work: impl FnOnce(&mut Self) -> Result<T, PostgresError>,
    ) -> Result<T, PostgresError> {
        self.connection.run(begin)?;
        match work(self) {
            Ok(done) => {
                self.connection.run("COMMIT")?;
                Ok(done)
            }
            Err(error) => {
                // Ids that it has inserted do not exist.
                self.names.clear();
                self.sizes.clear();
                // What it was that failed is what is told; without a connection there is nothing to roll back.
                let _ = self.connection.run("ROLLBACK");
                Err(match error {
                    PostgresError::Database(why) if why.is_out_of_ids() => {
                        PostgresError::OutOfIds { schema: self.config.schema.clone(), why }
                    }
                    error => error,
                })
            }
        }
    }

    pub(in crate::consume) fn cursor(&self) -> Offset {
        self.cursor.min(self.samples_cursor)
    }

    fn cursor_moved(&self) -> PostgresError {
        PostgresError::CursorMoved { schema: self.config.schema.clone(), expected: self.cursor }
    }

    pub(in crate::consume) fn durable_cursor(&self) -> Offset {
        self.durable_cursor
    }

    /// Has all rules about what is left out followed once more, which does no harm: the registry may have gone back, and
    /// given a version to another rule.
    fn forget_rules(&mut self) {
        (self.withheld_version, self.left_out) = (0, None);
    }

    pub(in crate::consume) fn withheld_version(&self) -> u64 {
        self.withheld_version
    }

    /// Whether this gateway was the one that writes when that was last asked.
    pub(in crate::consume) fn has_place(&self) -> bool {
        self.leased_at.is_some()
    }

    pub(in crate::consume) fn has_rules(&self) -> bool {
        self.left_out.is_some()
    }

    /// See [`RecordSink::store`](crate::consume::storage::record_sink::RecordSink::store).
    ///
    /// # Errors
    /// [`PostgresError`].
    pub(in crate::consume) fn store<'a>(
        &mut self,
        records: &mut dyn Iterator<Item = RecordRef<'a>>,
        next: Offset,
        sync: bool,
    ) -> Result<(), PostgresError> {
        let cursor = self.cursor();
        let records: Vec<_> = records.skip_while(|record| record.offset < cursor).collect();
        if cursor < self.cursor {
            self.store_missing_samples(&records, next)?;
            if next <= self.cursor {
                return Ok(());
            }
        }
        let stored = records.partition_point(|record| record.offset < self.cursor);
        self.store_halves(&records[stored..], next, sync)
    }

    /// Stores all at once, or, if the server cannot take a value among them, one half after the other.
    fn store_halves(
        &mut self,
        records: &[RecordRef<'_>],
        next: Offset,
        sync: bool,
    ) -> Result<(), PostgresError> {
        match (self.store_transaction(records, next, sync, false), records) {
            (Err(error), [_]) if error.is_of_value() => {
                tracing::warn!(%error, next, "PostgreSQL cannot take a payload, which is stored as its bytes");
                self.store_transaction(records, next, sync, true)
            }
            (Err(error), [_, _, ..]) if error.is_of_value() => {
                let (first, second) = records.split_at(records.len() / 2);
                self.store_halves(first, second[0].offset, false)?;
                self.store_halves(second, next, sync)
            }
            (stored, _) => stored,
        }
    }

    fn store_transaction(
        &mut self,
        records: &[RecordRef<'_>],
        next: Offset,
        sync: bool,
        is_plain: bool,
    ) -> Result<(), PostgresError> {
        let begin = if sync { "BEGIN" } else { "BEGIN; SET LOCAL synchronous_commit = off" };
        let mut lane = self.take_lane(records.len());
        self.within(begin, |sink| {
            sink.move_cursor(next, sync, lane.is_some())?;
            let scope = match &lane {
                Some(lane) if lane.begin(begin, sink.lane_offset, next)? => CopyScope::BesideLane(lane),
                Some(_) => return Err(sink.cursor_moved()),
                None => CopyScope::All,
            };
            sink.insert_records(records, is_plain, scope)
        })?;
        if let Some(lane) = &mut lane {
            lane.commit()?;
            self.lane_offset = next;
        }
        self.lane = lane.or_else(|| self.lane.take());
        (self.cursor, self.samples_cursor) = (next, next);
        if sync {
            self.durable_cursor = next;
        }
        Ok(())
    }

    /// Moves the cursor, if it is where this sink has left it and this connection is the one that writes. With `has_lane`,
    /// the samples up to there have a transaction of their own.
    fn move_cursor(&mut self, next: Offset, sync: bool, has_lane: bool) -> Result<(), PostgresError> {
        let moved = self.connection.execute(
            "UPDATE sink SET next_offset = $2, durable_offset = CASE WHEN $3 THEN $2 ELSE durable_offset END,
                 lease_until = clock_timestamp() + $5 * interval '1 second', samples_from = CASE WHEN $6 THEN $1 END
             WHERE next_offset = $1 AND owner = $4 AND owner_pid = pg_backend_pid()",
            &[&sql_offset(self.cursor), &sql_offset(next), &sync, &self.name, &lease::LEASE_S, &has_lane],
        )?;
        if moved != 1 {
            return Err(self.cursor_moved());
        }
        self.leased_at = Some(Instant::now());
        Ok(())
    }

    /// See [`RecordSink::reconcile_some`](crate::consume::storage::record_sink::RecordSink::reconcile_some).
    ///
    /// # Errors
    /// [`PostgresError`].
    pub(in crate::consume) fn reconcile_some(
        &mut self,
        withheld: &WithheldRules,
    ) -> Result<bool, PostgresError> {
        if self.withheld_version > withheld.version() && self.is_shared {
            // Another gateway has them, and they come: what is stored meanwhile would follow older ones. Where the
            // registry itself has gone back the epoch is a later one, and the version is 0.
            let (stored, known) = (self.withheld_version, withheld.version());
            return Err(PostgresError::RulesBehind { stored, known });
        }
        if self.withheld_version > withheld.version() {
            // They are of another registry. To follow a rule twice does no harm.
            self.withheld_version = 0;
        }
        let (changes, left_out) = withheld.changes_and_rules(self.withheld_version);
        let mut is_done = true;
        if !changes.is_empty() {
            self.extend_lease(RECONCILE_WAIT_MAX)?;
            self.connection.set_answer_wait_max(RECONCILE_WAIT_MAX);
            is_done = self.follow_changes(&changes, &left_out)?;
            self.connection.reset_answer_wait_max();
            self.extend_lease(Duration::ZERO)?;
        }
        self.left_out = Some(left_out);
        Ok(is_done)
    }

    fn follow_changes(
        &mut self,
        changes: &[WithheldChange],
        left_out: &WithheldSnapshot,
    ) -> Result<bool, PostgresError> {
        const BEGIN: &str = "BEGIN; SET LOCAL statement_timeout = '15min'";
        let is_purge = |change: &WithheldChange| {
            matches!(change, WithheldChange::Incarnation(_, _, IncarnationStep::Purged))
        };
        self.names.clear();
        self.sizes.clear();
        // What comes before a purge has to be put right before it: it decides what belongs to the incarnation.
        for part in changes.chunk_by(|a, b| !is_purge(a) && !is_purge(b)) {
            if let [WithheldChange::Incarnation(datasource, incarnation, IncarnationStep::Purged)] = part {
                let scope = datasource.scope(*incarnation);
                let history = left_out.history(datasource.as_str());
                if let Some(history) = history.filter(|_| self.purging.as_ref() != Some(&scope)) {
                    self.within(BEGIN, |sink| sink.move_misplaced(&scope, 0, history))?;
                    self.purging = Some(scope.clone());
                }
                if !self.within(BEGIN, |sink| sink.purge_some(&scope, history))? {
                    return Ok(false);
                }
                self.purging = None;
            }
            let version = self.withheld_version + part.len() as u64;
            self.within(BEGIN, |sink| {
                sink.follow_rules(part, left_out)?;
                let noted = sink.connection.execute(
                    "UPDATE sink SET withheld_version = $1 WHERE owner = $2 AND owner_pid = pg_backend_pid()",
                    &[&sql_offset(version), &sink.name],
                )?;
                match noted {
                    1 => Ok(()),
                    _ => Err(sink.cursor_moved()),
                }
            })?;
            self.withheld_version = version;
        }
        Ok(true)
    }

    /// Makes what is stored durable and gives the place of the one that writes to whoever wants it.
    ///
    /// # Errors
    /// [`PostgresError`].
    pub(in crate::consume) fn finish(&mut self) -> Result<(), PostgresError> {
        if self.leased_at.is_none() {
            return Ok(());
        }
        self.connection.execute(
            "UPDATE sink SET durable_offset = next_offset, owner = NULL, owner_pid = NULL, lease_until = NULL
             WHERE owner = $1 AND owner_pid = pg_backend_pid() AND next_offset = $2",
            &[&self.name, &sql_offset(self.cursor)],
        )?;
        self.durable_cursor = self.cursor();
        Ok(())
    }

    /// Compares what is stored with the log, and sets aside what is behind its end. Returns what to tell the operator
    /// of that.
    ///
    /// # Errors
    /// [`PostgresError::OtherLog`] if the two do not belong together, or may not.
    pub(in crate::consume) fn put_right(
        &mut self,
        log: &dyn Log,
        log_end: Offset,
    ) -> Result<Option<String>, PostgresError> {
        let set_back = log.history().map(|history| ahead::follow_epochs(self, history)).transpose()?;
        let put_right = ahead::put_right(self, log, log_end)?;
        Ok(put_right.or(set_back.flatten()))
    }
}
