//! `records.db`: the sink that is one SQLite file. [`schema`](super::schema) describes its tables.
//!
//! One transaction writes a run of records, the cursor after them, and the newest values that they
//! bring. SQLite's write-ahead log makes it whole or absent after a kill at any moment, and lets others
//! read meanwhile.
//!
//! Most transactions are not synced. They survive a kill of the process; after a loss of power the file
//! may be back at an earlier one, its cursor included. The log still has what came after, because it is
//! told only [durable](SqliteSink::durable_cursor) cursors. So storage costs the disk that
//! acknowledgements wait for one sync a second, not one per transaction.
//!
//! After a sync that failed, a later one that succeeds says nothing about the pages that the kernel gave up on, and a loss of
//! power leaves a hole in the write-ahead log. So a sink that finds one when it is opened again calls nothing durable before
//! it has been copied into the database, and begun anew. What a kill has left, at a start, is synced and believed: the kernel
//! tells a failure that nobody was told of yet to the first who asks.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::{Connection, TransactionBehavior};

use super::ids::RememberedIds;
use super::incarnations;
use super::insert::insert_records;
use super::latest_board::LatestBoard;
use super::quarantined;
use super::retention::{self, EmptyTopic, StoredSizes};
use super::schema::{RECORDS_DATABASE, offset_from_sql, sql_offset};
use crate::log::{IncarnationHistory, IncarnationStep, WithheldChange, WithheldRules, WithheldSnapshot};
use crate::message::{DatasourceId, Offset, RecordRef};
use crate::sqlite::{SqliteError, checkpoint, has_write_ahead_log, sync_write_ahead_log};

/// The file's name in the data directory.
pub const RECORDS_FILE_NAME: &str = "records.db";

/// How often a write-ahead log in doubt is tried to be copied: who reads it holds each attempt up for a quarter of a second.
const WAL_DOUBT_INTERVAL: Duration = Duration::from_secs(10);
/// How long it may be in doubt before the operator is told.
const WAL_DOUBT_MAX: Duration = Duration::from_secs(60);

/// Why the sink did not take records, or could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The database could not be opened or written.
    #[error(transparent)]
    Database(#[from] SqliteError),
    /// Another process has moved the cursor.
    #[error("records.db is written by another process: its cursor is no longer {expected}")]
    CursorMoved {
        /// Where this sink left it.
        expected: Offset,
    },
}

impl SinkError {
    /// Whether the file itself is the trouble, so that no later attempt can do better.
    pub fn is_damage(&self) -> bool {
        matches!(self, SinkError::Database(error) if error.is_damage())
    }

    /// Whether the transaction left no trace and the sink can still be used.
    pub fn is_clean_rollback(&self) -> bool {
        matches!(self, SinkError::Database(error) if error.is_clean_rollback())
    }
}

/// The open database and its cursor in the log.
pub struct SqliteSink {
    connection: Connection,
    path: PathBuf,
    ids: RememberedIds,
    sizes: StoredSizes,
    cursor: Offset,
    durable_cursor: Offset,
    /// The write-ahead log is one of which a sync may have failed, and left a part of it in memory alone.
    wal_doubt: Option<WalDoubt>,
    /// The version of the rules about leaked keys that the tables follow.
    withheld_version: u64,
    /// Those rules, once [`SqliteSink::reconcile`] has got them.
    left_out: Option<WithheldSnapshot>,
    /// The incarnation that a purge has begun to remove.
    purging: Option<DatasourceId>,
    /// Whether the numbers in payloads are stored too.
    keeps_samples: bool,
    /// Where the newest values are shown from, beside the database.
    board: Arc<LatestBoard>,
    /// A transaction was begun and not committed: ids that it inserted do not exist.
    ids_uncertain: bool,
}

/// Since when a write-ahead log is in doubt.
struct WalDoubt {
    since: Instant,
    /// When it was tried to be copied.
    tried_at: Option<Instant>,
}

impl WalDoubt {
    fn now() -> Self {
        Self { since: Instant::now(), tried_at: None }
    }

    fn is_tried_now(&self) -> bool {
        self.tried_at.is_none_or(|at| at.elapsed() >= WAL_DOUBT_INTERVAL)
    }
}

impl Drop for SqliteSink {
    /// Whoever opens it next may find something else there.
    fn drop(&mut self) {
        self.board.clear();
    }
}

impl SqliteSink {
    /// Opens the database at `path`, or makes it. This process has not had it open.
    ///
    /// # Errors
    /// [`SinkError::Database`], also for a database that this Headgate must not write.
    pub fn open(path: &Path) -> Result<Self, SinkError> {
        let synced = sync_write_ahead_log(path);
        if let Err(error) = &synced {
            tracing::warn!(%error, path = %path.display(), "the write-ahead log that was found cannot be synced");
        }
        Self::open_with(path, synced.is_err().then(WalDoubt::now))
    }

    /// As [`SqliteSink::open`], after an error: it may have been a sync that failed.
    ///
    /// # Errors
    /// As [`SqliteSink::open`].
    pub fn reopen(path: &Path) -> Result<Self, SinkError> {
        // Looked at first: to open it makes one.
        let wal_doubt = has_write_ahead_log(path).then(WalDoubt::now);
        Self::open_with(path, wal_doubt)
    }

    fn open_with(path: &Path, wal_doubt: Option<WalDoubt>) -> Result<Self, SinkError> {
        let connection = RECORDS_DATABASE.open(path)?;
        let opened = Self::from_connection(connection, path, wal_doubt);
        Ok(opened.map_err(|error| SqliteError::from_sqlite(&error, path))?)
    }

    fn from_connection(
        connection: Connection,
        path: &Path,
        wal_doubt: Option<WalDoubt>,
    ) -> rusqlite::Result<Self> {
        connection.set_prepared_statement_cache_capacity(64);
        let cursor = connection.query_row("SELECT next_offset FROM cursor", [], |row| row.get(0))?;
        let withheld_version = quarantined::stored_withheld_version(&connection)?;
        Ok(Self {
            connection,
            path: path.to_owned(),
            ids: RememberedIds::default(),
            sizes: StoredSizes::default(),
            cursor: offset_from_sql(cursor),
            // The stored records may be in the operating system's memory only. Until the first synced
            // transaction the durable cursor stays 0, so that the log keeps everything.
            durable_cursor: 0,
            wal_doubt,
            withheld_version,
            left_out: None,
            purging: None,
            keeps_samples: true,
            board: Arc::default(),
            ids_uncertain: false,
        })
    }

    /// Whether the numbers in the payloads of what is stored from now on are stored too, as samples. They are, unless
    /// this says otherwise; what is there stays.
    pub fn keep_samples(&mut self, keeps_samples: bool) {
        self.keeps_samples = keeps_samples;
    }

    /// Shows the newest values on `board` from now on.
    pub fn show_on(&mut self, board: Arc<LatestBoard>) {
        board.clear();
        self.board = board;
    }

    /// Names the file in an error of SQLite's.
    pub(super) fn database_error(&self, error: &rusqlite::Error) -> SinkError {
        SqliteError::from_sqlite(error, &self.path).into()
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(super) fn connection_mut(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// The connection, and what the datasources take.
    pub(super) fn connection_and_sizes(&mut self) -> (&mut Connection, &mut StoredSizes) {
        (&mut self.connection, &mut self.sizes)
    }

    /// Forgets what is remembered of the tables: they have changed, or may have.
    pub(super) fn clear_remembered(&mut self) {
        self.ids.clear();
        self.sizes.clear();
        self.board.clear();
    }

    /// Forgets topics of a datasource that have no record any more. What is remembered of others stays.
    pub(super) fn forget_topics(&mut self, datasource: i64, empty: &[EmptyTopic]) {
        let gone = empty.iter().filter_map(|topic| Some((topic.gone?, &*topic.name)));
        self.ids.forget_topics(datasource, gone);
        self.board.forget_topics(datasource, empty.iter().map(|topic| &*topic.name));
    }

    /// Forgets origins of a datasource that are used below an offset alone: they are gone.
    pub(super) fn forget_origins(&mut self, datasource: i64, below: i64) {
        self.ids.forget_origins(datasource, below);
    }

    /// As [`SqliteSink::clear_remembered`], if the last transaction of records was not committed.
    pub(super) fn forget_uncertain(&mut self) {
        if std::mem::take(&mut self.ids_uncertain) {
            self.clear_remembered();
        }
    }

    /// Notes that the database was brought back to `end`, and synced.
    pub(super) fn set_back(&mut self, end: Offset) {
        self.clear_remembered();
        (self.cursor, self.durable_cursor) = (end, if self.wal_doubt.is_some() { 0 } else { end });
        (self.withheld_version, self.left_out) = (0, None);
    }

    /// Has all rules about what is left out followed once more, which does no harm: the registry may have gone back, and
    /// given a version to another rule.
    ///
    /// # Errors
    /// [`SinkError`].
    pub fn forget_rules(&mut self) -> Result<(), SinkError> {
        let forgotten = self.connection.execute("UPDATE withheld SET version = 0", []);
        forgotten.map_err(|error| self.database_error(&error))?;
        (self.withheld_version, self.left_out) = (0, None);
        Ok(())
    }

    /// The first offset that is not stored yet.
    pub fn cursor(&self) -> Offset {
        self.cursor
    }

    /// The cursor as a loss of power would leave it: the sink never needs the log below this. 0 until the first synced
    /// transaction; where the write-ahead log is in doubt, the first one since that was copied into the database, which a
    /// process that reads prevents.
    pub fn durable_cursor(&self) -> Offset {
        self.durable_cursor
    }

    /// What to tell the operator of a write-ahead log that has been in doubt for long.
    pub fn warning(&self) -> Option<String> {
        self.wal_doubt.as_ref().filter(|doubt| doubt.since.elapsed() >= WAL_DOUBT_MAX)?;
        let path = self.path.display();
        Some(format!(
            "an error of the disk leaves in doubt what it has of {path}-wal, which cannot be copied into {path} as long as a \
             process reads it. The log keeps all that is stored, up to log.retention_bytes, and then nothing is taken in: \
             `fuser -v {path}` names who has it open; end its transaction, or the process"
        ))
    }

    /// The version of the rules about leaked keys that the stored records follow.
    pub fn withheld_version(&self) -> u64 {
        self.withheld_version
    }

    /// Whether it has the rules about what is left out, since it was opened.
    pub fn has_rules(&self) -> bool {
        self.left_out.is_some()
    }

    /// Makes the stored records follow the rules about what is left out, and whatever is stored later. It is on the
    /// disk afterwards. A purge takes several transactions, and goes on after a kill: one of them is made here, and
    /// `false` says that there is more to do. Records may be stored meanwhile.
    ///
    /// # Errors
    /// As [`SqliteSink::store`].
    pub fn reconcile_some(&mut self, withheld: &WithheldRules) -> Result<bool, SinkError> {
        if self.withheld_version > withheld.version() {
            // They are of another registry. To follow a rule twice does no harm.
            self.connection
                .execute("UPDATE withheld SET version = 0", [])
                .map_err(|error| self.database_error(&error))?;
            self.withheld_version = 0;
        }
        let (changes, left_out) = withheld.changes_and_rules(self.withheld_version);
        self.clear_remembered();
        let is_done =
            self.write_reconciled(&changes, &left_out).map_err(|error| self.database_error(&error))?;
        self.left_out = Some(left_out);
        Ok(is_done)
    }

    /// As [`SqliteSink::reconcile_some`], to the end.
    #[cfg(test)]
    pub fn reconcile(&mut self, withheld: &WithheldRules) -> Result<(), SinkError> {
        while !self.reconcile_some(withheld)? {}
        Ok(())
    }

    fn write_reconciled(
        &mut self,
        changes: &[WithheldChange],
        left_out: &WithheldSnapshot,
    ) -> rusqlite::Result<bool> {
        self.connection.pragma_update(None, "synchronous", "FULL")?;
        let is_purge = |change: &WithheldChange| {
            matches!(change, WithheldChange::Incarnation(_, _, IncarnationStep::Purged))
        };
        // What comes before a purge has to be put right before it: it decides what belongs to the incarnation.
        for part in changes.chunk_by(|a, b| !is_purge(a) && !is_purge(b)) {
            if let [WithheldChange::Incarnation(datasource, incarnation, IncarnationStep::Purged)] = part {
                let history = left_out.history(datasource.as_str());
                if !self.purge_some(&datasource.scope(*incarnation), history)? {
                    return Ok(false);
                }
            }
            let version = self.withheld_version + part.len() as u64;
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            retention::forget_sizes(&transaction)?;
            quarantined::reconcile(&transaction, part, left_out, version, self.keeps_samples)?;
            transaction.commit()?;
            self.withheld_version = version;
        }
        Ok(true)
    }

    /// Removes some of what is stored of an incarnation, and overwrites the pages that it was on. Returns whether
    /// nothing is left.
    fn purge_some(
        &mut self,
        scope: &DatasourceId,
        history: Option<&IncarnationHistory>,
    ) -> rusqlite::Result<bool> {
        if let Some(history) = history.filter(|_| self.purging.as_ref() != Some(scope)) {
            // In a cluster some of it may be of an incarnation that was not known when it was stored.
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            incarnations::move_misplaced(&transaction, scope, 0, history, self.keeps_samples)?;
            transaction.commit()?;
            self.purging = Some(scope.clone());
        }
        self.connection.pragma_update(None, "secure_delete", true)?;
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let is_done = incarnations::purge_some(&transaction, scope)?;
        transaction.commit()?;
        if !is_done {
            self.connection.pragma_update(None, "secure_delete", false)?;
            return Ok(false);
        }
        self.purging = None;
        let keys = history.into_iter().flat_map(|history| history.keys_of(scope.of_scope().1));
        incarnations::purge_origins(&self.connection, keys)?;
        self.connection.pragma_update(None, "secure_delete", false)?;
        // What was overwritten is in the write-ahead log until it is copied. A reader may prevent that for now.
        checkpoint(&self.connection).map(|_| true)
    }

    /// Stores `records`, which are in order and below `next`, and moves the cursor to `next`, all or
    /// nothing. Skips records below the cursor: they are stored already. Those of a leaked key go
    /// into quarantine, by the rules of the last [`SqliteSink::reconcile`].
    /// With `sync`, this transaction and all before it are on the disk afterwards, unless the write-ahead log is in doubt: see
    /// [`SqliteSink::durable_cursor`].
    ///
    /// # Errors
    /// [`SqliteError::Busy`] after a quarter of a second, [`SqliteError::Full`], and other errors of
    /// SQLite's. Unless the error [says otherwise](SinkError::is_clean_rollback), open the sink again:
    /// the transaction may have been committed after all.
    pub fn store<'a>(
        &mut self,
        records: impl Iterator<Item = RecordRef<'a>>,
        next: Offset,
        sync: bool,
    ) -> Result<(), SinkError> {
        self.forget_uncertain();
        if sync && let Some(doubt) = &self.wal_doubt {
            // Before the transaction: it begins the new write-ahead log, durably, so that nothing is read of the one before.
            let is_copied = doubt.is_tried_now() && self.checkpoint()?;
            if !is_copied && next == self.cursor {
                // Nothing is stored, and a sync would make nothing durable.
                return Ok(());
            }
        }
        self.ids_uncertain = true;
        let moved = self.write(records, next, sync).map_err(|error| {
            // The transaction may have been committed after all.
            self.board.clear();
            self.database_error(&error)
        })?;
        if !moved {
            return Err(SinkError::CursorMoved { expected: self.cursor });
        }
        self.ids_uncertain = false;
        self.cursor = next;
        if sync && self.wal_doubt.is_none() {
            self.durable_cursor = next;
        }
        Ok(())
    }

    /// The transaction of [`SqliteSink::store`]. `false`, and nothing is written, if the cursor is elsewhere.
    fn write<'a>(
        &mut self,
        records: impl Iterator<Item = RecordRef<'a>>,
        next: Offset,
        sync: bool,
    ) -> rusqlite::Result<bool> {
        self.connection.pragma_update(None, "synchronous", if sync { "FULL" } else { "NORMAL" })?;
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let moved = transaction
            .prepare_cached("UPDATE cursor SET next_offset = ?2 WHERE next_offset = ?1")?
            .execute([sql_offset(self.cursor), sql_offset(next)])?;
        if moved != 1 {
            return Ok(false);
        }
        let records = records.skip_while(|record| record.offset < self.cursor);
        self.ids.begin_transaction(next);
        let nothing = WithheldSnapshot::default();
        let left_out = self.left_out.as_ref().unwrap_or(&nothing);
        let newest = insert_records(
            &transaction,
            (&mut self.ids, &mut self.sizes),
            left_out,
            self.keeps_samples,
            records,
        )?;
        self.sizes.write(&transaction)?;
        transaction.commit()?;
        match newest {
            Some(newest) => self.board.follow(&self.connection, &newest),
            None => self.board.clear(),
        }
        Ok(true)
    }

    /// Copies the write-ahead log into the database and syncs it, so that everything is in one file.
    /// Returns whether it could: a process that reads prevents it.
    ///
    /// # Errors
    /// SQLite's.
    pub fn checkpoint(&mut self) -> Result<bool, SinkError> {
        let is_copied = checkpoint(&self.connection).map_err(|error| self.database_error(&error))?;
        match &mut self.wal_doubt {
            None if is_copied => self.durable_cursor = self.cursor,
            // Only the next synced transaction puts another one in its place.
            Some(_) if is_copied => self.wal_doubt = None,
            Some(doubt) => doubt.tried_at = Some(Instant::now()),
            None => {}
        }
        Ok(is_copied)
    }
}

#[cfg(test)]
mod tests;
