//! The shape of `records.db`: what somebody who opens it with `sqlite3` finds.
//!
//! Three views are for reading, even while the gateway runs:
//!
//! - `records`: `offset`, `datasource`, `topic`, `payload`, `content_type`, `key_id`, `transport`,
//!   `received_at`, `received_us`. A payload is TEXT when it is UTF-8 without a NUL, else BLOB.
//! - `latest`: `datasource`, `topic`, `key`, `value`, `offset`, `received_at`, `received_us`: the
//!   newest value of each top-level key of a topic's JSON objects, and under the key `''` of its
//!   other payloads.
//!
//! - `quarantine`: records that are kept and not passed on, with the columns of `records` and `cause`
//!   (`schema` or `key`), `keyword`, `pointer`, `detail`, `schema_version`, `redriven_offset`.
//!
//! `received_at` is RFC 3339 in UTC with microseconds, so that its order as text is its order in
//! time; `received_us` is the same in microseconds since the Unix epoch.
//!
//! The tables behind the views store each repeating name once, and records refer to it by row id.
//! Compared with a single table this takes 60 % of the space (180 instead of 302 bytes a record at
//! 128-byte payloads) and two thirds of the time to write. The joins of `records` are LEFT joins,
//! although no row is ever missing, because SQLite then reads `entries` in the order of its key unless a
//! condition on a name makes an index better.

use rusqlite::Connection;

use super::quarantined;
use super::sqlite::SinkError;
use crate::message::Offset;

/// The version of this schema, kept in `user_version`.
pub const RECORDS_FORMAT: i64 = 2;

/// Offsets that one row of `time_index` covers.
pub const TIME_INDEX_OFFSETS: u64 = 4096;

/// An offset as SQLite's signed integer. No log reaches 2^63; a larger offset in a client's query is
/// clamped.
pub fn sql_offset(offset: Offset) -> i64 {
    i64::try_from(offset).unwrap_or(i64::MAX)
}

/// The inverse of [`sql_offset`].
pub fn offset_from_sql(sql: i64) -> Offset {
    u64::try_from(sql).unwrap_or(0)
}

/// `received_at` from `received_us`.
macro_rules! rfc3339 {
    ($us:literal) => {
        concat!(
            "strftime('%Y-%m-%dT%H:%M:%S', ",
            $us,
            " / 1000000, 'unixepoch')",
            " || printf('.%06dZ', ",
            $us,
            " % 1000000)"
        )
    };
}

/// Turns an empty database into format 1.
const CREATE_RECORDS_TABLES: &str = concat!(
    "
    -- The first offset that is not stored yet.
    CREATE TABLE cursor (
        id          INTEGER PRIMARY KEY CHECK (id = 0),
        next_offset INTEGER NOT NULL
    );
    INSERT INTO cursor VALUES (0, 0);

    CREATE TABLE datasources (
        id         INTEGER PRIMARY KEY,
        datasource TEXT NOT NULL UNIQUE
    );

    CREATE TABLE topics (
        id            INTEGER PRIMARY KEY,
        datasource_id INTEGER NOT NULL,
        topic         TEXT NOT NULL,
        latest_offset INTEGER NOT NULL,
        UNIQUE (datasource_id, topic)
    );

    -- What a record has in common with most others of its sender.
    CREATE TABLE origins (
        id           INTEGER PRIMARY KEY,
        key_id       TEXT NOT NULL,
        transport    TEXT NOT NULL,
        content_type TEXT NOT NULL,
        UNIQUE (key_id, transport, content_type)
    );

    CREATE TABLE entries (
        offset        INTEGER PRIMARY KEY,
        datasource_id INTEGER NOT NULL,
        topic_id      INTEGER NOT NULL,
        origin_id     INTEGER NOT NULL,
        received_us   INTEGER NOT NULL,
        payload       NOT NULL
    );
    CREATE INDEX entries_datasource ON entries (datasource_id);
    CREATE INDEX entries_topic ON entries (topic_id);

    -- The oldest and the newest record among the 4096 from first_offset on. It finds the offsets of
    -- a time range, whatever the clock has done, at a thousandth of what an index would cost.
    CREATE TABLE time_index (
        first_offset INTEGER PRIMARY KEY,
        oldest_us    INTEGER NOT NULL,
        newest_us    INTEGER NOT NULL
    );

    -- value: JSON as TEXT, or the BLOB that a payload was, or NULL if it was too long to be copied.
    CREATE TABLE latest_values (
        topic_id    INTEGER NOT NULL,
        key         TEXT NOT NULL,
        value,
        offset      INTEGER NOT NULL,
        received_us INTEGER NOT NULL,
        PRIMARY KEY (topic_id, key)
    ) WITHOUT ROWID;

    CREATE VIEW records AS
    SELECT e.offset, d.datasource, t.topic, e.payload, o.content_type, o.key_id, o.transport,
        ",
    rfc3339!("e.received_us"),
    " AS received_at, e.received_us
    FROM entries e
    LEFT JOIN datasources d ON d.id = e.datasource_id
    LEFT JOIN topics t ON t.id = e.topic_id
    LEFT JOIN origins o ON o.id = e.origin_id;

    CREATE VIEW latest AS
    SELECT d.datasource, t.topic, v.key,
        CASE typeof(v.value) WHEN 'text' THEN json_extract(v.value, '$') ELSE v.value END AS value,
        v.offset, ",
    rfc3339!("v.received_us"),
    " AS received_at, v.received_us
    FROM latest_values v
    JOIN topics t ON t.id = v.topic_id
    JOIN datasources d ON d.id = t.datasource_id;

    PRAGMA user_version = 1;
    "
);

/// The view of what [`quarantined::CREATE_QUARANTINED_TABLES`] makes. Completes the step from format 1 to format 2.
const CREATE_QUARANTINE_VIEW: &str = concat!(
    "
    CREATE VIEW quarantine AS
    SELECT q.offset, d.datasource, t.topic, q.payload, o.content_type, o.key_id, o.transport,
        ",
    rfc3339!("q.received_us"),
    " AS received_at, q.received_us, q.cause, q.keyword, q.pointer, q.detail, q.schema_version,
        q.redriven_offset
    FROM quarantined q
    LEFT JOIN datasources d ON d.id = q.datasource_id
    LEFT JOIN topics t ON t.id = q.topic_id
    LEFT JOIN origins o ON o.id = q.origin_id;

    PRAGMA user_version = 2;
    "
);

/// Ensures that the database has this schema; an empty one is given it.
///
/// # Errors
/// [`SinkError::Newer`] and [`SinkError::Foreign`] for a database that is not ours to write.
pub(super) fn prepare(connection: &mut Connection) -> Result<(), SinkError> {
    let version = |c: &Connection| c.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0));
    match version(connection)? {
        RECORDS_FORMAT => return Ok(()),
        0 | 1 => {}
        found => return Err(SinkError::Newer { found }),
    }
    let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    // Read again under the write lock: another process may just have made the tables.
    if version(&transaction)? == 0 {
        let objects: i64 =
            transaction.query_row("SELECT count(*) FROM sqlite_master", [], |row| row.get(0))?;
        if objects > 0 {
            return Err(SinkError::Foreign);
        }
        transaction.execute_batch(CREATE_RECORDS_TABLES)?;
    }
    if version(&transaction)? == 1 {
        transaction.execute_batch(quarantined::CREATE_QUARANTINED_TABLES)?;
        transaction.execute_batch(CREATE_QUARANTINE_VIEW)?;
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_of_format_1_becomes_one_of_format_2_with_what_is_in_it() {
        let mut connection = Connection::open_in_memory().expect("opens");
        connection.execute_batch(CREATE_RECORDS_TABLES).expect("format 1");
        connection.execute("UPDATE cursor SET next_offset = 41", []).expect("written");
        prepare(&mut connection).expect("upgraded");
        let number = |sql| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).expect("reads");
        assert_eq!(number("PRAGMA user_version"), RECORDS_FORMAT);
        assert_eq!(number("SELECT next_offset FROM cursor"), 41);
        assert_eq!(number("SELECT count(*) FROM quarantine"), 0);
        assert_eq!(number("SELECT version FROM withheld"), 0);
    }
}
