//! A `records.db` that is ahead of the log: it has records from the log's end on. That is what a copy of a
//! running gateway's directory leaves, a loss of power with `log.durability = "os"`, or a log that was put back
//! to an earlier state. The log gives those offsets anew, so that the records that have them here are set aside,
//! in a database of their own, before anything else comes under their offsets.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior};

use super::quarantined;
use super::schema::{offset_from_sql, sql_offset};
use super::sqlite::{SinkError, SqliteSink};
use crate::message::{Offset, RecordRef};
use crate::sqlite::new_file_aside;

/// What tells one stored record from another one at the same offset.
#[derive(Debug, PartialEq, Eq)]
pub struct RecordTrace {
    /// Its offset.
    pub offset: Offset,
    received_us: i64,
    key_id: String,
    payload: Vec<u8>,
}

impl RecordTrace {
    /// Whether this is the trace of `record`.
    pub fn is_of(&self, record: &RecordRef<'_>) -> bool {
        self.offset == record.offset
            && self.received_us == record.received_at
            && self.key_id == record.key_id.to_string()
            && self.payload == record.payload
    }
}

impl SqliteSink {
    /// The newest record below `end` that is stored, in quarantine or not.
    ///
    /// # Errors
    /// [`SinkError::Database`].
    pub fn newest_below(&self, end: Offset) -> Result<Option<RecordTrace>, SinkError> {
        let newest = |table| newest_in(self.connection(), table, end);
        let both = newest("entries").and_then(|entry| Ok([entry, newest("quarantined")?]));
        let both = both.map_err(|error| self.database_error(&error))?;
        Ok(both.into_iter().flatten().max_by_key(|trace| trace.offset))
    }

    /// How many records are stored from `end` on.
    ///
    /// # Errors
    /// [`SinkError::Database`].
    pub fn count_from(&self, end: Offset) -> Result<u64, SinkError> {
        let count = self.connection().query_row(
            "SELECT (SELECT count(*) FROM entries WHERE offset >= ?1)
                  + (SELECT count(*) FROM quarantined WHERE offset >= ?1)",
            [sql_offset(end)],
            |row| row.get(0),
        );
        Ok(offset_from_sql(count.map_err(|error| self.database_error(&error))?))
    }

    /// How many offsets from `end` on, up to the cursor, have no record here although none was removed or left out: they
    /// were never stored. Where something was, that cannot be told, and they do not count.
    ///
    /// # Errors
    /// [`SinkError::Database`].
    pub fn missing_from(&self, end: Offset) -> Result<u64, SinkError> {
        let missing = self.connection().query_row(
            "WITH known AS (SELECT next_offset, max(whole_from, ?1) AS first FROM cursor)
             SELECT next_offset - first - (SELECT count(*) FROM entries WHERE offset >= first)
                 - (SELECT count(*) FROM quarantined WHERE offset >= first)
                 - (SELECT count(*) FROM marks WHERE offset >= first) FROM known",
            [sql_offset(end)],
            |row| row.get(0),
        );
        Ok(offset_from_sql(missing.map_err(|error| self.database_error(&error))?))
    }

    /// Forgets marks below `first`, where the log begins: it ends nowhere before, so that nothing is asked of them.
    ///
    /// # Errors
    /// [`SinkError::Database`].
    pub fn forget_marks_below(&self, first: Offset) -> Result<(), SinkError> {
        let forgotten = self.connection().execute("DELETE FROM marks WHERE offset < ?1", [sql_offset(first)]);
        forgotten.map(drop).map_err(|error| self.database_error(&error))
    }

    /// Moves the records from `end` on into a database of their own, in tables `records` and `quarantine` with
    /// the columns of the views of that name, and the cursor back to `end`. Everything is on the disk
    /// afterwards; a crash in between leaves them in both.
    ///
    /// # Errors
    /// [`SinkError::Database`]; then this database is as it was, or its commit is in doubt: open it again.
    pub fn set_aside_from(&mut self, end: Offset, path: &Path) -> Result<PathBuf, SinkError> {
        let aside = new_file_aside(path)?;
        let connection = self.connection_mut();
        let deleted = match copy_from(connection, end, &aside) {
            Ok(()) => delete_from(connection, end),
            Err(error) => Err(error),
        };
        let (error, is_kept) = match deleted.map(Transaction::commit) {
            Ok(Ok(())) => {
                self.set_back(end);
                return Ok(aside);
            }
            Ok(Err(error)) => {
                let error = self.database_error(&error);
                let is_kept = !error.is_clean_rollback();
                (error, is_kept)
            }
            Err(error) => (self.database_error(&error), false),
        };
        if !is_kept {
            // Nothing was deleted here, and every start would leave one more copy.
            let _ = std::fs::remove_file(&aside);
        }
        Err(error)
    }
}

fn newest_in(connection: &Connection, table: &str, end: Offset) -> rusqlite::Result<Option<RecordTrace>> {
    let select = format!(
        "SELECT r.offset, r.received_us, o.key_id, CAST(r.payload AS BLOB)
         FROM {table} r JOIN origins o ON o.id = r.origin_id
         WHERE r.offset = (SELECT max(offset) FROM {table} WHERE offset < ?1)"
    );
    let mut select = connection.prepare(&select)?;
    let trace = select.query_row([sql_offset(end)], |row| {
        Ok(RecordTrace {
            offset: offset_from_sql(row.get(0)?),
            received_us: row.get(1)?,
            key_id: row.get(2)?,
            payload: row.get(3)?,
        })
    });
    trace.optional()
}

/// Copies what is to be set aside; that is committed, and synced, before anything is deleted here.
fn copy_from(connection: &Connection, end: Offset, aside: &Path) -> rusqlite::Result<()> {
    connection.execute("ATTACH ?1 AS aside", [aside.to_string_lossy()])?;
    let copy = |table: &str| {
        let copy = format!("CREATE TABLE aside.{table} AS SELECT * FROM main.{table} WHERE offset >= ?1");
        connection.execute(&copy, [sql_offset(end)])
    };
    let copied = copy("records").and_then(|_| copy("quarantine"));
    let detached = connection.execute_batch("DETACH aside");
    copied.and(detached)
}

/// Deletes what was copied, in a transaction that is to be committed.
fn delete_from(connection: &mut Connection, end: Offset) -> rusqlite::Result<Transaction<'_>> {
    connection.pragma_update(None, "synchronous", "FULL")?;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    quarantined::forget_from(&transaction, end)?;
    // The row of the offsets around `end` keeps its bounds: they may be too wide, which finds no fewer records.
    transaction.execute("DELETE FROM time_index WHERE first_offset >= ?1", [sql_offset(end)])?;
    transaction.execute("UPDATE cursor SET next_offset = ?1", [sql_offset(end)])?;
    Ok(transaction)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consume::sink::retention::{PruneStep, StoredLimits};
    use crate::consume::sink::sqlite::RECORDS_FILE_NAME;
    use crate::consume::testing::record;
    use crate::log::{IncarnationStep, RecordNote, WithheldChange, WithheldRules};
    use crate::message::DatasourceId;

    fn texts(path: &Path, sql: &str) -> Vec<String> {
        let connection = Connection::open(path).expect("opens");
        let mut select = connection.prepare(sql).expect("reads");
        let rows = select.query_map([], |row| row.get::<_, String>(0)).expect("reads");
        rows.map(|row| row.expect("text")).collect()
    }

    /// A start refused a store that lacked nothing: marks, and what retention or a purge had removed, counted as lost.
    #[test]
    fn what_has_no_row_on_purpose_is_not_missing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = SqliteSink::open(&dir.path().join(RECORDS_FILE_NAME)).expect("opens");
        let of = |offset| record(offset, "press-4", "a", b"12345678");
        let note = RecordNote::Superseded { offset: 1, by: 2 };
        let (flags, note) = (note.flag(), note.encode());
        let mark = RecordRef { flags, note: &note, ..of(7) };
        let records = (0..7).map(of).chain([mark]).chain((8..10).map(of));
        sink.store(records, 10, true).expect("stored");
        let missing = |sink: &SqliteSink, end| sink.missing_from(end).expect("reads");
        assert_eq!([0, 6, 8, 10].map(|end| missing(&sink, end)), [0; 4]);
        // The log had lost these before they were stored.
        sink.store(std::iter::empty(), 15, true).expect("stored");
        sink.store((15..20).map(of), 20, true).expect("stored");
        assert_eq!([0, 6, 12, 16].map(|end| missing(&sink, end)), [5, 5, 3, 0]);
        // What was removed says nothing of what is below it.
        let limits = StoredLimits { age_us: None, bytes: Some(72 * 4) };
        let scope = DatasourceId::new("press-4").expect("a slug");
        while sink.prune_some(&scope, limits, 0).expect("pruned") == PruneStep::More {}
        assert_eq!([0, 6, 12, 16].map(|end| missing(&sink, end)), [0; 4]);
        sink.store(std::iter::empty(), 22, true).expect("stored");
        assert_eq!(missing(&sink, 6), 2);
        let rules = WithheldRules::default();
        let step = |incarnation, step| {
            rules.push(WithheldChange::Incarnation(scope.clone(), incarnation, step));
        };
        let keys = [of(0).key_id].into();
        step(1, IncarnationStep::Ended { keys, end: Offset::MAX });
        step(1, IncarnationStep::Purged);
        sink.reconcile(&rules).expect("reconciled");
        assert_eq!(missing(&sink, 6), 0);
        sink.store((22..24).map(of), 24, true).expect("stored");
        assert_eq!((missing(&sink, 6), sink.count_from(0).expect("reads")), (0, 0));
    }

    /// The copy was deleted with any error, also where the commit that had deleted the records might count.
    #[test]
    fn a_copy_stays_unless_it_is_certain_that_nothing_was_deleted() {
        let fails_at_commit = "PRAGMA foreign_keys = 1; CREATE TABLE things (id INTEGER PRIMARY KEY);
             CREATE TABLE uses (thing REFERENCES things DEFERRABLE INITIALLY DEFERRED);
             CREATE TRIGGER fails AFTER DELETE ON entries BEGIN INSERT INTO uses VALUES (1); END";
        let fails_before =
            "CREATE TRIGGER fails AFTER DELETE ON entries BEGIN SELECT RAISE(ABORT, 'not now'); END";
        for (sql, copies) in [(fails_at_commit, 1), (fails_before, 0)] {
            let dir = tempfile::tempdir().expect("temporary directory");
            let path = dir.path().join(RECORDS_FILE_NAME);
            let mut sink = SqliteSink::open(&path).expect("opens");
            let records = (0..4).map(|offset| record(offset, "press-4", "a", b"1"));
            sink.store(records, 4, true).expect("stored");
            sink.connection().execute_batch(sql).expect("made");
            sink.set_aside_from(2, &path).expect_err("it fails");
            assert_eq!((sink.cursor(), sink.count_from(0).expect("reads")), (4, 4));
            let files = std::fs::read_dir(dir.path()).expect("readable");
            let names = files.map(|file| file.expect("readable").file_name().into_string().expect("text"));
            let aside: Vec<String> =
                names.filter(|name| name.contains("set-aside") && name.ends_with(".db")).collect();
            assert_eq!(aside.len(), copies, "{aside:?}");
            for name in aside {
                let offsets = "SELECT group_concat(offset) FROM records";
                assert_eq!(texts(&dir.path().join(name), offsets), ["2,3"]);
            }
        }
    }

    #[test]
    fn records_from_an_offset_on_are_moved_and_leave_no_trace() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(RECORDS_FILE_NAME);
        let mut sink = SqliteSink::open(&path).expect("opens");
        let payloads: Vec<String> = (0..10).map(|n| format!("{{\"t\": {n}, \"k{n}\": 1}}")).collect();
        let records = |from: u64, to: u64| {
            payloads
                .iter()
                .zip(0..)
                .map(|(payload, offset)| record(offset, "press-4", "a", payload.as_bytes()))
                .filter(move |record| (from..to).contains(&record.offset))
        };
        sink.store(records(0, 10), 10, true).expect("stored");
        assert_eq!(sink.count_from(6).expect("reads"), 4);
        let trace = sink.newest_below(6).expect("reads").expect("there is one");
        assert!(trace.is_of(&record(5, "press-4", "a", payloads[5].as_bytes())), "{trace:?}");
        assert!(!trace.is_of(&record(5, "press-4", "a", b"another")));

        let aside = sink.set_aside_from(6, &path).expect("set aside");
        assert_eq!(sink.cursor(), 6);
        let offsets = "SELECT group_concat(offset) FROM (SELECT offset FROM records ORDER BY offset)";
        assert_eq!(texts(&aside, offsets), ["6,7,8,9"]);
        assert_eq!(texts(&path, offsets), ["0,1,2,3,4,5"]);
        assert_eq!(texts(&path, "SELECT value || '' FROM latest WHERE key = 't'"), ["5"]);
        assert_eq!(texts(&path, "SELECT key FROM latest WHERE offset >= 6"), [""; 0]);

        // What comes under the offsets now is what is stored.
        sink.store(records(6, 8), 8, true).expect("stored");
        assert_eq!(texts(&path, offsets), ["0,1,2,3,4,5,6,7"]);
        assert_eq!(sink.newest_below(0).expect("reads"), None);
    }
}
