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

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, TransactionBehavior};

use super::ids::RememberedIds;
use super::incarnations;
use super::insert::insert_records;
use super::latest_board::LatestBoard;
use super::quarantined;
use super::retention::{self, StoredSizes};
use super::schema::{RECORDS_DATABASE, offset_from_sql, sql_offset};
use crate::log::{IncarnationHistory, IncarnationStep, WithheldChange, WithheldRules, WithheldSnapshot};
use crate::message::{DatasourceId, Offset, RecordRef};
use crate::sqlite::{SqliteError, checkpoint};

/// The file's name in the data directory.
pub const RECORDS_FILE_NAME: &str = "records.db";

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

impl Drop for SqliteSink {
    /// Whoever opens it next may find something else there.
    fn drop(&mut self) {
        self.board.clear();
    }
}

impl SqliteSink {
    /// Opens the database at `path`, or makes it.
    ///
    /// # Errors
    /// [`SinkError::Database`], also for a database that this Headgate must not write.
    pub fn open(path: &Path) -> Result<Self, SinkError> {
        let connection = RECORDS_DATABASE.open(path)?;
        Ok(Self::from_connection(connection, path).map_err(|error| SqliteError::from_sqlite(&error, path))?)
    }

    fn from_connection(connection: Connection, path: &Path) -> rusqlite::Result<Self> {
        connection.set_prepared_statement_cache_capacity(32);
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

    /// Takes down what is shown: newest values have changed otherwise than by records that were stored.
    pub(super) fn clear_board(&self) {
        self.board.clear();
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

    /// As [`SqliteSink::clear_remembered`], if the last transaction of records was not committed.
    pub(super) fn forget_uncertain(&mut self) {
        if std::mem::take(&mut self.ids_uncertain) {
            self.clear_remembered();
        }
    }

    /// Notes that the database was brought back to `end`, and is on the disk so.
    pub(super) fn set_back(&mut self, end: Offset) {
        self.clear_remembered();
        (self.cursor, self.durable_cursor) = (end, end);
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

    /// The cursor as a loss of power would leave it: the sink never needs the log below this.
    pub fn durable_cursor(&self) -> Offset {
        self.durable_cursor
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
    /// With `sync`, this transaction and all before it are on the disk afterwards.
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
        if sync {
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
        if is_copied {
            self.durable_cursor = self.cursor;
        }
        Ok(is_copied)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::consume::testing::record;
    use crate::limits::GATHERED_KEYS_MAX;

    const PAYLOAD: &[u8] = b"{\"t\": 21.5}";

    fn open(dir: &Path) -> SqliteSink {
        SqliteSink::open(&dir.join(RECORDS_FILE_NAME)).expect("opens")
    }

    /// What a reader finds: the offsets, and the cursor.
    fn content(dir: &Path) -> (Vec<Offset>, Offset) {
        let connection = Connection::open(dir.join(RECORDS_FILE_NAME)).expect("opens");
        let mut statement = connection.prepare("SELECT offset FROM records ORDER BY offset").expect("reads");
        let offsets = statement.query_map([], |row| row.get(0).map(offset_from_sql)).expect("reads");
        let offsets = offsets.map(|offset| offset.expect("reads")).collect();
        let cursor = connection.query_row("SELECT next_offset FROM cursor", [], |row| row.get(0));
        (offsets, offset_from_sql(cursor.expect("reads")))
    }

    /// A copy of the files as a kill at this moment would leave them.
    fn copy_as_killed(dir: &Path) -> tempfile::TempDir {
        let copy = tempfile::tempdir().expect("temporary directory");
        for file in std::fs::read_dir(dir).expect("readable") {
            let file = file.expect("readable");
            std::fs::copy(file.path(), copy.path().join(file.file_name())).expect("copied");
        }
        copy
    }

    #[test]
    fn a_kill_at_any_record_leaves_whole_transactions_and_the_rest_arrives_exactly_once() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = open(dir.path());
        let mut killed = Vec::new();
        for batch in 0..4_u64 {
            let (from, to) = (batch * 25, (batch + 1) * 25);
            let records = (from..to).map(|offset| {
                killed.push((copy_as_killed(dir.path()), from));
                record(offset, "press-4", "spindle", PAYLOAD)
            });
            sink.store(records, to, batch % 2 == 0).expect("stored");
            killed.push((copy_as_killed(dir.path()), to));
        }
        for (dir, stored) in killed {
            let mut sink = open(dir.path());
            assert_eq!(sink.cursor(), stored);
            // The log gives a batch that begins below the cursor.
            let records = (0..100).map(|offset| record(offset, "press-4", "spindle", PAYLOAD));
            sink.store(records, 100, true).expect("stored");
            drop(sink);
            assert_eq!(content(dir.path()), ((0..100).collect(), 100));
        }
    }

    #[test]
    fn more_topics_and_keys_than_are_gathered_at_once_are_stored_as_any_others() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = open(dir.path());
        let topics: Vec<String> = (0..GATHERED_KEYS_MAX / 2).map(|n| format!("t/{n}")).collect();
        // Each topic comes again when it was written already.
        let records = (0_u64..).zip(topics.iter().chain(&topics).chain(&topics)).map(|(offset, topic)| {
            record(
                offset,
                "press-4",
                topic,
                if offset % 2 == 0 { br#"{"a": 1, "b": 2}"# } else { br#"{"a": 3}"# },
            )
        });
        let records: Vec<_> = records.collect();
        let end = records.len() as u64;
        sink.store(records.into_iter(), end, false).expect("stored");
        let connection = Connection::open(dir.path().join(RECORDS_FILE_NAME)).expect("opens");
        let count = |sql: &str| {
            let count = connection.query_row(sql, [], |row| row.get::<_, i64>(0)).expect("a count");
            usize::try_from(count).expect("not negative")
        };
        let half = topics.len() / 2;
        assert_eq!(count("SELECT count(*) FROM records"), 3 * topics.len());
        assert_eq!(count("SELECT count(*) FROM samples"), 3 * (2 * half + half));
        assert_eq!(count("SELECT count(*) FROM latest"), 2 * half + half);
        let newest = 2 * topics.len();
        assert_eq!(count(&format!("SELECT count(*) FROM latest WHERE offset >= {newest}")), 2 * half + half);
    }

    #[test]
    fn a_transaction_that_fails_leaves_nothing_behind_and_gives_no_numbers() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = open(dir.path());
        sink.store([record(0, "press-4", "a", PAYLOAD)].into_iter(), 1, false).expect("stored");
        // A repeated offset is a constraint violation in the middle of the transaction.
        let broken = [record(1, "press-5", "b", PAYLOAD), record(1, "press-6", "c", PAYLOAD)];
        let error = sink.store(broken.into_iter(), 2, false).expect_err("twice the same offset");
        assert!(!error.is_clean_rollback(), "{error}");
        assert_eq!(sink.cursor(), 1);
        assert_eq!(content(dir.path()), (vec![0], 1));

        // The ids of press-5 and b were rolled back with it.
        let good = [record(1, "press-7", "d", PAYLOAD), record(2, "press-5", "b", PAYLOAD)];
        sink.store(good.into_iter(), 3, false).expect("stored");
        let connection = Connection::open(dir.path().join(RECORDS_FILE_NAME)).expect("opens");
        let mut statement =
            connection.prepare("SELECT datasource, topic FROM records ORDER BY offset").expect("reads");
        let names = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).expect("reads");
        let names: Vec<(String, String)> = names.map(|names| names.expect("reads")).collect();
        let expected = [("press-4", "a"), ("press-7", "d"), ("press-5", "b")];
        assert_eq!(names, expected.map(|(datasource, topic)| (datasource.to_owned(), topic.to_owned())));
    }

    #[test]
    fn a_full_disk_takes_nothing_until_there_is_room_again() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = open(dir.path());
        let pages: i64 = sink.connection.query_row("PRAGMA page_count", [], |row| row.get(0)).expect("reads");
        sink.connection.pragma_update(None, "max_page_count", pages + 4).expect("bounded");
        let payload = vec![b'x'; 100_000];
        let records = || (0..3).map(|offset| record(offset, "press-4", "a", &payload));
        let error = sink.store(records(), 3, true).expect_err("no room");
        assert!(matches!(error, SinkError::Database(SqliteError::Full { .. })), "{error}");
        assert!(error.is_clean_rollback());
        assert_eq!((sink.cursor(), sink.durable_cursor()), (0, 0));
        assert_eq!(content(dir.path()), (vec![], 0));

        sink.connection.pragma_update(None, "max_page_count", 1_000_000).expect("unbounded");
        sink.store(records(), 3, true).expect("room");
        assert_eq!(content(dir.path()), (vec![0, 1, 2], 3));
    }

    #[test]
    fn only_a_synced_cursor_is_durable() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = open(dir.path());
        let mut store = |offset, sync| {
            sink.store([record(offset, "press-4", "a", PAYLOAD)].into_iter(), offset + 1, sync)
                .expect("stored");
            sink.durable_cursor()
        };
        assert_eq!([store(0, false), store(1, true), store(2, false)], [0, 2, 2]);
        assert!(sink.checkpoint().expect("nobody reads"));
        assert_eq!(sink.durable_cursor(), 3);
        drop(sink);
        assert_eq!(open(dir.path()).durable_cursor(), 0, "unknown until something is synced");
    }

    #[test]
    fn a_payload_is_text_where_tools_can_show_it_and_a_blob_where_not() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = open(dir.path());
        let payloads: [(&[u8], &str); 5] = [
            (b"21.5", "text"),
            (b"", "text"),
            ("°C".as_bytes(), "text"),
            (b"\xff\xfe", "blob"),
            (b"a\0b", "blob"),
        ];
        let records =
            payloads.iter().zip(0..).map(|((payload, _), offset)| record(offset, "press-4", "a", payload));
        sink.store(records, 5, false).expect("stored");
        let connection = Connection::open(dir.path().join(RECORDS_FILE_NAME)).expect("opens");
        for ((payload, kind), offset) in payloads.into_iter().zip(0_i64..) {
            let (found, stored): (String, Vec<u8>) = connection
                .query_row(
                    "SELECT typeof(payload), CAST(payload AS BLOB) FROM records WHERE offset = ?1",
                    [offset],
                    |row| Ok((row.get(0)?, row.get(1)?)),
                )
                .expect("is there");
            assert_eq!((found.as_str(), stored.as_slice()), (kind, payload), "offset {offset}");
        }
    }

    #[test]
    fn the_sqlite3_command_reads_while_the_sink_is_open() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = open(dir.path());
        let mut first = record(0, "press-4", "spindle/temp", PAYLOAD);
        first.content_type = "application/json";
        let mut second = record(1, "press-4", "note", b"hello");
        second.event_at = Some(-1);
        sink.store([first, second].into_iter(), 2, false).expect("stored");
        let sqlite3 = |sql: &str| {
            let path: PathBuf = dir.path().join(RECORDS_FILE_NAME);
            let output = std::process::Command::new("sqlite3").arg(path).arg(sql).output();
            let output = output.expect("the sqlite3 command is installed");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).expect("UTF-8")
        };
        assert_eq!(
            sqlite3("SELECT * FROM records"),
            "0|press-4|spindle/temp|{\"t\": 21.5}|application/json|0a0a0a0a0a0a|mqtt|2026-11-23T09:28:39.000000Z|1795426119000000||\n\
             1|press-4|note|hello||0a0a0a0a0a0a|mqtt|2026-11-23T09:28:39.001000Z|1795426119001000|1969-12-31T23:59:59.999999Z|-1\n"
        );
        assert_eq!(
            sqlite3("SELECT topic, key, value, offset, received_at FROM latest ORDER BY topic"),
            "note||hello|1|2026-11-23T09:28:39.001000Z\nspindle/temp|t|21.5|0|2026-11-23T09:28:39.000000Z\n"
        );
        assert_eq!(
            sqlite3("SELECT avg(json_extract(payload, '$.t')) FROM records WHERE topic = 'spindle/temp'"),
            "21.5\n"
        );
    }

    #[test]
    fn a_database_that_is_not_ours_to_write_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(RECORDS_FILE_NAME);
        drop(open(dir.path()));
        const NEXT_FORMAT: i64 = RECORDS_DATABASE.newest_version() + 1;
        Connection::open(&path)
            .and_then(|c| c.pragma_update(None, "user_version", NEXT_FORMAT))
            .expect("set");
        let error = SqliteSink::open(&path).map(drop).expect_err("a newer format");
        assert_eq!(
            error.to_string(),
            format!(
                "{} has format {NEXT_FORMAT} and this Headgate knows formats up to {}: use a newer one",
                path.display(),
                NEXT_FORMAT - 1
            )
        );

        let path = dir.path().join("other.db");
        Connection::open(&path).and_then(|c| c.execute_batch("CREATE TABLE mine (x)")).expect("made");
        let error = SqliteSink::open(&path).map(drop).expect_err("not ours");
        assert!(matches!(error, SinkError::Database(SqliteError::Foreign { .. })), "{error}");

        let path = dir.path().join("no.db");
        std::fs::write(&path, "this is no database, and long enough to be seen not to be one".repeat(20))
            .expect("written");
        let error = SqliteSink::open(&path).map(drop).expect_err("no database");
        assert!(error.to_string().contains("not a database"), "{error}");
    }

    #[test]
    fn a_second_writer_is_noticed_before_anything_is_stored_twice() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (mut one, mut other) = (open(dir.path()), open(dir.path()));
        one.store([record(0, "press-4", "a", PAYLOAD)].into_iter(), 1, false).expect("stored");
        let error =
            other.store([record(0, "press-4", "a", PAYLOAD)].into_iter(), 1, false).expect_err("moved");
        assert!(matches!(error, SinkError::CursorMoved { expected: 0 }), "{error}");
        assert_eq!(content(dir.path()), (vec![0], 1));
    }
}
