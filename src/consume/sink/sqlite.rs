//! `records.db`: the sink that is one SQLite file. [`schema`](super::schema) says what is in it.
//!
//! One transaction takes a run of records, the cursor behind them, and the newest values they
//! bring. SQLite's write-ahead log makes it whole or absent after a kill at any moment, and lets
//! others read while it is written.
//!
//! Most transactions are not synced: they survive a kill of the process, and after a loss of power
//! the file may be back at an earlier one, its cursor included. The log has what came after,
//! because it is told only of cursors that are [durable](SqliteSink::durable_cursor). So storage
//! costs the disk that acknowledgements wait for a sync a second, not one per transaction.

use std::path::Path;
use std::time::Duration;

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, ErrorCode, TransactionBehavior, params};

use super::ids::Ids;
use super::newest::Newest;
use super::schema::{self, FORMAT, TIME_INDEX_OFFSETS, offset_of, sql_offset};
use crate::message::{Offset, RecordRef, TimeMicros};

/// The file's name in the data directory.
pub const FILE_NAME: &str = "records.db";
/// Pages of the write-ahead log (of 4 KiB) after which it is copied into the database.
const CHECKPOINT_PAGES: i64 = 8 << 10;
/// What the file of the write-ahead log shrinks to after a reader has kept it from being copied.
const WAL_BYTES_KEPT: i64 = 64 << 20;
/// Memory for database pages, in KiB: the pages that one transaction changes fit in it.
const CACHE_KIB: i64 = 32 << 10;
/// How long SQLite waits for another process's lock before it says so, at every transaction.
const LOCK_WAIT: Duration = Duration::from_millis(250);
/// The same while it is opened, when nothing can be done without it.
const LOCK_WAIT_AT_OPEN: Duration = Duration::from_secs(5);

/// Why the sink did not take records, or could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// Another process holds the database locked.
    #[error("records.db is locked by another process")]
    Locked,
    /// The file system has no room for it.
    #[error("records.db cannot grow: the disk is full")]
    DiskFull,
    /// SQLite could not do it.
    #[error("records.db: {0}")]
    Database(rusqlite::Error),
    /// A later Headgate wrote it.
    #[error("records.db has format {found}, and this Headgate knows formats up to {FORMAT}: use a newer one")]
    Newer {
        /// Its `user_version`.
        found: i64,
    },
    /// Somebody else's database.
    #[error("records.db is an SQLite database that Headgate has not made")]
    Foreign,
    /// Somebody else has moved the cursor.
    #[error("records.db is written by another process: its cursor is no longer {expected}")]
    CursorMoved {
        /// Where this sink left it.
        expected: Offset,
    },
}

impl From<rusqlite::Error> for SinkError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => SinkError::Locked,
            Some(ErrorCode::DiskFull) => SinkError::DiskFull,
            _ => SinkError::Database(error),
        }
    }
}

impl SinkError {
    /// Whether the sink can go on being used, and nothing of the transaction is there.
    pub fn leaves_all_as_it_was(&self) -> bool {
        matches!(self, SinkError::Locked | SinkError::DiskFull)
    }
}

/// The open database, and where in the log it has got to.
pub struct SqliteSink {
    connection: Connection,
    ids: Ids,
    cursor: Offset,
    durable_cursor: Offset,
    /// Whether a transaction was begun and not committed: the numbers it gave do not exist.
    ids_uncertain: bool,
}

impl SqliteSink {
    /// Opens the database at `path`, or makes it.
    ///
    /// # Errors
    /// [`SinkError::Newer`] and [`SinkError::Foreign`] for one that is not ours to write, and
    /// whatever else keeps it from being opened.
    pub fn open(path: &Path) -> Result<Self, SinkError> {
        let mut connection = Connection::open(path)?;
        connection.busy_timeout(LOCK_WAIT_AT_OPEN)?;
        connection.set_prepared_statement_cache_capacity(32);
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
        connection.pragma_update(None, "journal_size_limit", WAL_BYTES_KEPT)?;
        connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
        schema::prepare(&mut connection)?;
        let cursor = connection.query_row("SELECT next_offset FROM cursor", [], |row| row.get(0))?;
        connection.busy_timeout(LOCK_WAIT)?;
        // What is there may be in the operating system's memory only. The first synced
        // transaction changes that, and until then the log keeps everything.
        let cursor = offset_of(cursor);
        Ok(Self { connection, ids: Ids::default(), cursor, durable_cursor: 0, ids_uncertain: false })
    }

    /// The first offset that is not stored yet.
    pub fn cursor(&self) -> Offset {
        self.cursor
    }

    /// The same, counting only what a loss of power would leave: what this says will never be
    /// asked of the log again.
    pub fn durable_cursor(&self) -> Offset {
        self.durable_cursor
    }

    /// Stores `records`, which are in order and below `next`, and moves the cursor to `next`: all
    /// of it, or on an error nothing. Records below the cursor are there already and passed over.
    /// With `sync`, this transaction and all before it are on the disk afterwards.
    ///
    /// # Errors
    /// [`SinkError::Locked`] after a quarter of a second, [`SinkError::DiskFull`], and whatever else
    /// SQLite meets with. Unless the error [says otherwise](SinkError::leaves_all_as_it_was), the sink
    /// is then to be opened again, because the transaction may be there after all.
    pub fn store<'a>(
        &mut self,
        records: impl Iterator<Item = RecordRef<'a>>,
        next: Offset,
        sync: bool,
    ) -> Result<(), SinkError> {
        if std::mem::replace(&mut self.ids_uncertain, true) {
            self.ids.clear();
        }
        self.connection.pragma_update(None, "synchronous", if sync { "FULL" } else { "NORMAL" })?;
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let (expected, wanted) = (sql_offset(self.cursor), sql_offset(next));
        let moved = transaction
            .prepare_cached("UPDATE cursor SET next_offset = ?2 WHERE next_offset = ?1")?
            .execute([expected, wanted])?;
        if moved != 1 {
            return Err(SinkError::CursorMoved { expected: self.cursor });
        }
        insert(&transaction, &mut self.ids, records.skip_while(|record| record.offset < self.cursor))?;
        transaction.commit()?;
        self.ids_uncertain = false;
        self.cursor = next;
        if sync {
            self.durable_cursor = next;
        }
        Ok(())
    }

    /// Copies the write-ahead log into the database and syncs it, so that what is stored is in the
    /// one file. Says whether it could: another process that reads keeps it from it.
    ///
    /// # Errors
    /// SQLite's.
    pub fn checkpoint(&mut self) -> Result<bool, SinkError> {
        let busy: bool =
            self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
        if !busy {
            self.durable_cursor = self.cursor;
        }
        Ok(!busy)
    }
}

fn insert<'a>(
    transaction: &Connection,
    ids: &mut Ids,
    records: impl Iterator<Item = RecordRef<'a>>,
) -> rusqlite::Result<()> {
    let mut newest = Newest::default();
    let mut times = Times::default();
    let mut entry = transaction.prepare_cached(
        "INSERT INTO entries (offset, datasource_id, topic_id, origin_id, received_us, payload)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?;
    for record in records {
        let row = ids.of(transaction, &record)?;
        // Many a tool takes a TEXT to end at a NUL.
        let text = std::str::from_utf8(record.payload).ok().filter(|text| !text.contains('\0'));
        let payload = text.map_or(ValueRef::Blob(record.payload), ValueRef::from);
        entry.execute(params![
            sql_offset(record.offset),
            row.datasource,
            row.topic,
            row.origin,
            record.received_at,
            ToSqlOutput::Borrowed(payload),
        ])?;
        times.see(transaction, record.offset, record.received_at)?;
        newest.see(row.topic, &record, text);
    }
    times.write(transaction)?;
    newest.write(transaction)
}

/// The row of `time_index` that the records at hand belong to.
#[derive(Default)]
struct Times {
    row: Option<(Offset, TimeMicros, TimeMicros)>,
}

impl Times {
    fn see(&mut self, transaction: &Connection, offset: Offset, at: TimeMicros) -> rusqlite::Result<()> {
        let first = offset - offset % TIME_INDEX_OFFSETS;
        match &mut self.row {
            Some((row, oldest, newest)) if *row == first => {
                (*oldest, *newest) = ((*oldest).min(at), (*newest).max(at));
            }
            _ => {
                self.write(transaction)?;
                self.row = Some((first, at, at));
            }
        }
        Ok(())
    }

    fn write(&mut self, transaction: &Connection) -> rusqlite::Result<()> {
        let Some((first, oldest, newest)) = self.row.take() else { return Ok(()) };
        transaction
            .prepare_cached(
                "INSERT INTO time_index (first_offset, oldest_us, newest_us) VALUES (?1, ?2, ?3)
                 ON CONFLICT DO UPDATE SET oldest_us = min(oldest_us, excluded.oldest_us),
                                           newest_us = max(newest_us, excluded.newest_us)",
            )?
            .execute(params![sql_offset(first), oldest, newest])?;
        Ok(())
    }
}
