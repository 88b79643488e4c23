//! `retained.db` itself: one row per topic that has a retained message, and the cursor in the log.
//!
//! ```sql
//! cursor   (id INTEGER, next_offset INTEGER)
//! messages (id INTEGER, datasource TEXT, topic TEXT, offset INTEGER, received_us INTEGER, key_id BLOB,
//!           transport TEXT, publisher INTEGER, flags INTEGER, content_type TEXT, properties BLOB,
//!           payload BLOB)
//! ```
//!
//! A `publisher` is an unsigned number, stored as the signed number with the same bits.
//!
//! The index over datasource and topic, in byte order, finds the rows. It is separate from them, so that
//! matching many topics against a filter reads their names only. Another one, over the offset, finds single messages
//! again.
//!
//! As in `records.db`, most transactions are not synced. After a loss of power the file may be back at an
//! earlier one, with its cursor; the log has the rest, because it is told only durable cursors.

use std::path::Path;

use rusqlite::types::FromSqlError;
use rusqlite::{Connection, Row, TransactionBehavior, params};

use super::RetainedMessage;
use crate::consume::sink::schema::{offset_from_sql, sql_offset};
use crate::log::{IncarnationHistory, WithheldChange, WithheldSnapshot};
use crate::message::{DatasourceId, KeyId, Offset, RecordFlags, RecordRef, Transport};
use crate::sqlite::{SqliteError, SqliteProfile, checkpoint};

/// The file's name in the data directory.
pub(in crate::consume) const RETAINED_FILE_NAME: &str = "retained.db";

/// The database, as its only writer opens it.
pub(in crate::consume) const RETAINED_DATABASE: SqliteProfile = SqliteProfile {
    // `withheld` may be missing in a database that was made without it: see `RetainedTable::from_connection`.
    migrations: &[
        "
        CREATE TABLE cursor (
            id          INTEGER PRIMARY KEY CHECK (id = 0),
            next_offset INTEGER NOT NULL
        ) STRICT;
        INSERT INTO cursor VALUES (0, 0);
        CREATE TABLE messages (
            id           INTEGER PRIMARY KEY,
            datasource   TEXT NOT NULL,
            topic        TEXT NOT NULL,
            offset       INTEGER NOT NULL,
            received_us  INTEGER NOT NULL,
            key_id       BLOB NOT NULL,
            transport    TEXT NOT NULL,
            publisher    INTEGER NOT NULL,
            flags        INTEGER NOT NULL,
            content_type TEXT NOT NULL,
            properties   BLOB NOT NULL,
            payload      BLOB NOT NULL,
            UNIQUE (datasource, topic)
        ) STRICT;
    ",
        "
        CREATE INDEX messages_offset ON messages (offset);
    ",
    ],
    // Damage that only a subscriber's query would meet is found at the start, where it can be mended.
    is_checked: true,
    ..SqliteProfile::SHARED
};

/// The columns of a message, in the order in which [`retained_message_of_row`] reads them.
macro_rules! columns {
    () => {
        "offset, datasource, topic, received_us, key_id, transport, publisher, flags, content_type, properties, payload"
    };
}

/// The message with a row id, unless it is too new.
pub(super) const SELECT_RETAINED_MESSAGE: &str =
    concat!("SELECT ", columns!(), " FROM messages WHERE id = ?1 AND offset < ?2");

/// The message at an offset, if it is of a datasource. NULL is any.
pub(super) const SELECT_RETAINED_AT: &str =
    concat!("SELECT ", columns!(), " FROM messages WHERE offset = ?1 AND (?2 IS NULL OR datasource = ?2)");

const PUT_RETAINED_MESSAGE: &str = concat!(
    "INSERT INTO messages (",
    columns!(),
    ") VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
     ON CONFLICT (datasource, topic) DO UPDATE SET
         offset = excluded.offset, received_us = excluded.received_us, key_id = excluded.key_id,
         transport = excluded.transport, publisher = excluded.publisher, flags = excluded.flags, content_type = excluded.content_type,
         properties = excluded.properties, payload = excluded.payload"
);

/// The version of the rules about leaked keys that the messages follow.
const CREATE_WITHHELD_TABLE: &str = "
    CREATE TABLE IF NOT EXISTS withheld (
        id      INTEGER PRIMARY KEY CHECK (id = 0),
        version INTEGER NOT NULL
    ) STRICT;
    INSERT OR IGNORE INTO withheld VALUES (0, 0);
";

/// The open database, for its only writer.
pub(super) struct RetainedTable {
    connection: Connection,
    cursor: Offset,
    withheld_version: u64,
    empty: bool,
}

impl RetainedTable {
    /// Opens the database at `path`, or makes it.
    pub(super) fn open(path: &Path) -> Result<Self, SqliteError> {
        Self::from_connection(RETAINED_DATABASE.open(path)?)
            .map_err(|error| SqliteError::from_sqlite(&error, path))
    }

    /// Opens it again after a transaction whose outcome is unknown.
    pub(super) fn reopen(path: &Path) -> Result<Self, SqliteError> {
        Self::from_connection(RETAINED_DATABASE.reopen(path)?)
            .map_err(|error| SqliteError::from_sqlite(&error, path))
    }

    fn from_connection(connection: Connection) -> rusqlite::Result<Self> {
        connection.execute_batch(CREATE_WITHHELD_TABLE)?;
        let cursor = connection.query_row("SELECT next_offset FROM cursor", [], |row| row.get(0))?;
        let withheld_version = connection.query_row("SELECT version FROM withheld", [], |row| row.get(0))?;
        let empty = is_empty(&connection)?;
        let withheld_version = offset_from_sql(withheld_version);
        Ok(Self { connection, cursor: offset_from_sql(cursor), withheld_version, empty })
    }

    /// The first offset that was not consumed, as of the last transaction.
    pub(super) fn cursor(&self) -> Offset {
        self.cursor
    }

    /// The version of the rules about leaked keys that the messages follow once the whole log is consumed.
    pub(super) fn withheld_version(&self) -> u64 {
        self.withheld_version
    }

    /// The rules that it follows are of another registry: all are followed anew.
    pub(super) fn forget_rules(&mut self) -> rusqlite::Result<()> {
        self.connection.execute("UPDATE withheld SET version = 0", [])?;
        self.withheld_version = 0;
        Ok(())
    }

    /// Deletes messages that are left out after some changes of the rules, which have led to `left_out`. If what they had
    /// replaced may be wanted now, or those no longer left out, that is found in the log again, and the cursor moves
    /// back for it, to `first` at most. On the disk afterwards.
    pub(super) fn follow_rules(
        &mut self,
        changes: &[WithheldChange],
        left_out: &WithheldSnapshot,
        first: Offset,
    ) -> rusqlite::Result<()> {
        self.connection.pragma_update(None, "synchronous", "FULL")?;
        // What is left out is not to be found in the file either.
        self.connection.pragma_update(None, "secure_delete", true)?;
        let version = self.withheld_version + changes.len() as u64;
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut cursor = self.cursor;
        if changes.iter().any(|change| change.key_id().is_some()) {
            cursor = cursor.min(first);
        }
        for change in changes {
            if let WithheldChange::Incarnation(datasource, ..) = change
                && let Some(history) = left_out.history(datasource.as_str())
                && let Some(from) = forget_ended(&transaction, datasource, history)?
            {
                cursor = cursor.min(from.max(first));
            }
        }
        for rule in left_out.rules() {
            let datasource = (!rule.datasource.is_all()).then(|| rule.datasource.as_str());
            transaction
                .prepare_cached(
                    "DELETE FROM messages WHERE key_id = ?1 AND received_us >= ?2 AND offset < ?3
                         AND datasource = coalesce(?4, datasource)",
                )?
                .execute(params![rule.key_id.0, rule.since, sql_offset(rule.below), datasource])?;
        }
        transaction.execute("UPDATE cursor SET next_offset = ?1", [sql_offset(cursor)])?;
        transaction.execute("UPDATE withheld SET version = ?1", [sql_offset(version)])?;
        let empty = is_empty(&transaction)?;
        transaction.commit()?;
        self.connection.pragma_update(None, "secure_delete", false)?;
        (self.cursor, self.withheld_version, self.empty) = (cursor, version, empty);
        Ok(())
    }

    /// Brings a database that is ahead of the log back to the log's end: keeps a copy of it in the empty file
    /// `aside`, deletes what the log still has to tell of, from `first` on, and moves the cursor back to there, so that
    /// these messages are those of this log. On the disk afterwards.
    pub(super) fn set_back(&mut self, end: Offset, first: Offset, aside: &Path) -> rusqlite::Result<()> {
        self.connection.execute("VACUUM INTO ?1", [aside.to_string_lossy()])?;
        self.connection.pragma_update(None, "synchronous", "FULL")?;
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute("DELETE FROM messages WHERE offset >= ?1", [sql_offset(first.min(end))])?;
        transaction.execute("UPDATE cursor SET next_offset = ?1", [sql_offset(first)])?;
        transaction.execute("UPDATE withheld SET version = 0", [])?;
        let empty = is_empty(&transaction)?;
        transaction.commit()?;
        (self.cursor, self.withheld_version, self.empty) = (first, 0, empty);
        Ok(())
    }

    /// Calls `each` with the datasource, the topic and the bytes of the payload of each message.
    pub(super) fn for_each_topic(&self, mut each: impl FnMut(&str, &str, usize)) -> rusqlite::Result<()> {
        let mut select =
            self.connection.prepare("SELECT datasource, topic, length(payload) FROM messages")?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let payload = usize::try_from(row.get::<_, i64>(2)?).unwrap_or(0);
            each(row.get_ref(0)?.as_str()?, row.get_ref(1)?.as_str()?, payload);
        }
        Ok(())
    }

    /// Whether there is no message.
    pub(super) fn is_empty(&self) -> bool {
        self.empty
    }

    /// Writes the newest retained record of each changed topic, and the cursor `next`. With `sync`, this
    /// transaction and all before it are on the disk afterwards.
    pub(super) fn write<'a>(
        &mut self,
        newest: impl Iterator<Item = RecordRef<'a>>,
        next: Offset,
        sync: bool,
    ) -> rusqlite::Result<()> {
        self.connection.pragma_update(None, "synchronous", if sync { "FULL" } else { "NORMAL" })?;
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        {
            let mut put = transaction.prepare_cached(PUT_RETAINED_MESSAGE)?;
            let mut remove =
                transaction.prepare_cached("DELETE FROM messages WHERE datasource = ?1 AND topic = ?2")?;
            for record in newest {
                if record.payload.is_empty() {
                    remove.execute([record.datasource, record.topic])?;
                    continue;
                }
                put.execute(params![
                    sql_offset(record.offset),
                    record.datasource,
                    record.topic,
                    record.received_at,
                    record.key_id.0,
                    record.transport.as_str(),
                    record.publisher.cast_signed(),
                    record.flags.0,
                    record.content_type,
                    record.properties,
                    record.payload,
                ])?;
            }
        }
        transaction.execute("UPDATE cursor SET next_offset = ?1", [sql_offset(next)])?;
        let empty = is_empty(&transaction)?;
        transaction.commit()?;
        (self.cursor, self.empty) = (next, empty);
        Ok(())
    }

    /// Copies the write-ahead log into the one file. Returns whether it could: a reader prevents it.
    pub(super) fn checkpoint(&self) -> rusqlite::Result<bool> {
        checkpoint(&self.connection)
    }

    /// Changes a pragma, to provoke errors.
    #[cfg(test)]
    pub(super) fn set(&self, pragma: &str, value: i64) {
        self.connection.pragma_update(None, pragma, value).expect("a setting");
    }
}

/// Deletes the messages of a datasource whose incarnation has ended. Returns from where on the log has to be read again:
/// in a cluster a late message of a dead key may have replaced one of the present incarnation.
fn forget_ended(
    connection: &Connection,
    datasource: &DatasourceId,
    history: &IncarnationHistory,
) -> rusqlite::Result<Option<Offset>> {
    let mut again = None;
    let mut select = connection
        .prepare_cached("SELECT id, offset, key_id, received_us FROM messages WHERE datasource = ?1")?;
    let mut remove = connection.prepare_cached("DELETE FROM messages WHERE id = ?1")?;
    let mut rows = select.query([datasource.as_str()])?;
    let mut ended: Vec<i64> = Vec::new();
    while let Some(row) = rows.next()? {
        let offset = offset_from_sql(row.get(1)?);
        if history.has_ended(history.incarnation_of(KeyId(row.get(2)?), row.get(3)?, offset)) {
            ended.push(row.get(0)?);
            again = again.or(history.present().map(|(_, first)| first).filter(|first| offset >= *first));
        }
    }
    drop(rows);
    ended.iter().try_for_each(|id| remove.execute([id]).map(drop))?;
    Ok(again)
}

/// How many messages of a datasource there are, and the sum of their payloads in bytes.
pub(super) fn count_of(connection: &Connection, datasource: &DatasourceId) -> rusqlite::Result<(u64, u64)> {
    connection.query_row(
        "SELECT count(*), coalesce(sum(length(payload)), 0) FROM messages WHERE datasource = ?1",
        [datasource.as_str()],
        |row| Ok((offset_from_sql(row.get(0)?), offset_from_sql(row.get(1)?))),
    )
}

fn is_empty(connection: &Connection) -> rusqlite::Result<bool> {
    connection.prepare_cached("SELECT NOT EXISTS (SELECT 1 FROM messages)")?.query_row([], |row| row.get(0))
}

/// The message in a row of [`SELECT_RETAINED_MESSAGE`].
pub(super) fn retained_message_of_row(row: &Row<'_>) -> rusqlite::Result<RetainedMessage> {
    let name = row.get_ref(5)?.as_str()?;
    let transport =
        Transport::parse(name).ok_or_else(|| FromSqlError::Other(format!("no transport: {name}").into()))?;
    Ok(RetainedMessage {
        offset: offset_from_sql(row.get(0)?),
        datasource: row.get(1)?,
        topic: row.get(2)?,
        received_at: row.get(3)?,
        key_id: KeyId(row.get(4)?),
        transport,
        publisher: row.get::<_, i64>(6)?.cast_unsigned(),
        flags: RecordFlags(row.get(7)?),
        content_type: row.get(8)?,
        properties: row.get(9)?,
        payload: row.get(10)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consume::testing::record;
    use crate::log::{IncarnationStep, WithheldRules};
    use crate::message::TimeMicros;

    const OLD: KeyId = KeyId([1; 6]);
    const NEW: KeyId = KeyId([2; 6]);

    /// A table at the offset 9 with one message in each of some topics, and the rules of a datasource that was deleted
    /// and, at offset 5, created again.
    fn followed(
        messages: &[(&'static str, KeyId, Offset)],
    ) -> (tempfile::TempDir, RetainedTable, Vec<Offset>) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut table = RetainedTable::open(&dir.path().join(RETAINED_FILE_NAME)).expect("opens");
        let other = record(0, "press-5", "state", b"1");
        let messages = messages.iter().map(|(topic, key_id, offset)| RecordRef {
            key_id: *key_id,
            ..record(*offset, "press-4", topic, b"1")
        });
        table.write(messages.chain([other]), 9, false).expect("written");
        let rules = WithheldRules::default();
        let press = DatasourceId::new("press-4").expect("a slug");
        let ended = IncarnationStep::Ended { keys: [OLD].into(), end: Offset::MAX };
        rules.push(WithheldChange::Incarnation(press.clone(), 1, ended));
        let begun = IncarnationStep::Begun { first_offset: 5, since: TimeMicros::MIN };
        rules.push(WithheldChange::Incarnation(press, 2, begun));
        let (changes, left_out) = rules.changes_and_rules(table.withheld_version());
        table.follow_rules(&changes, &left_out, 0).expect("followed");
        assert_eq!(table.withheld_version(), 2);
        let mut select =
            table.connection.prepare("SELECT offset FROM messages ORDER BY offset").expect("SQL");
        let kept = select.query_map([], |row| row.get(0).map(offset_from_sql)).expect("reads");
        let kept = kept.collect::<Result<_, _>>().expect("reads");
        drop(select);
        (dir, table, kept)
    }

    #[test]
    fn the_messages_of_a_deleted_datasource_go_and_nothing_is_read_again() {
        let (_dir, table, kept) = followed(&[("a", OLD, 3), ("b", NEW, 6)]);
        assert_eq!((kept, table.cursor()), (vec![0, 6], 9));
    }

    #[test]
    fn what_a_late_message_of_a_dead_key_has_replaced_is_found_in_the_log_again() {
        let (_dir, table, kept) = followed(&[("a", OLD, 7), ("b", NEW, 6)]);
        assert_eq!((kept, table.cursor()), (vec![0, 6], 5), "from where the present datasource began");
    }
}
