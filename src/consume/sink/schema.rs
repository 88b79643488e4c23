//! The shape of `records.db`: what somebody who opens it with `sqlite3` finds.
//!
//! Four views are for reading, even while the gateway runs:
//!
//! - `records`: `offset`, `datasource`, `topic`, `payload`, `content_type`, `key_id`, `transport`,
//!   `received_at`, `received_us`, and `event_at`, `event_us`: when it was measured, NULL if nobody says so. A payload is
//!   TEXT when it is UTF-8 without a NUL, else BLOB.
//! - `latest`: `datasource`, `topic`, `key`, `value`, `offset`, `received_at`, `received_us`: the
//!   newest value of each top-level key of a topic's JSON objects, and under the key `''` of its
//!   other payloads.
//!
//! - `quarantine`: records that are kept and not passed on, with the columns of `records` and `cause`
//!   (`schema` or `key`), `keyword`, `pointer`, `detail`, `schema_version`, `redriven_offset`.
//! - `samples`: `offset`, `datasource`, `topic`, `key`, `value`, `at`, `at_us`: each number of the stored payloads, its key as
//!   `src/values/samples.rs` says. Its time is that of the event where that is known, or else of the receipt.
//!
//! A datasource that was deleted is called `press-4~1` in all of them, with the number of its incarnation: the id stays
//! free for one that is created again.
//!
//! `received_at` is RFC 3339 in UTC with microseconds, so that its order as text is its order in
//! time; `received_us` is the same in microseconds since the Unix epoch.
//!
//! The tables behind the views store each repeating name once, and records refer to it by row id.
//! Compared with a single table this takes 60 % of the space (180 instead of 302 bytes a record at
//! 128-byte payloads) and two thirds of the time to write. The joins of `records` are LEFT joins,
//! although no row is ever missing, because SQLite then reads `entries` in the order of its key unless a
//! condition on a name makes an index better.

use std::time::Duration;

use crate::message::Offset;
use crate::sqlite::SqliteProfile;

/// Pages (of 4 KiB) of the write-ahead log after which SQLite copies it into the database.
const CHECKPOINT_PAGES: i64 = 8 << 10;
/// The size to which the write-ahead log shrinks after a reader has delayed its copying.
const WAL_BYTES_KEPT: i64 = 64 << 20;
/// The cache for database pages, in KiB: the pages that one transaction changes fit in it.
const CACHE_KIB: i64 = 32 << 10;

/// How the sink opens `records.db`. The opening waits long for a lock: without the database there is nothing
/// to do. Each transaction fails soon, and is tried again.
pub(in crate::consume) const RECORDS_DATABASE: SqliteProfile = SqliteProfile {
    migrations: &[
        CREATE_RECORDS_TABLES,
        ADD_QUARANTINE,
        ADD_INCARNATIONS,
        ADD_EVENT_TIME,
        ADD_RETENTION,
        BOUND_NAMES,
    ],
    gives_pages_back: true,
    open_lock_wait_max: Duration::from_secs(5),
    lock_wait_max: Duration::from_millis(250),
    pragmas: &[
        ("wal_autocheckpoint", CHECKPOINT_PAGES),
        ("journal_size_limit", WAL_BYTES_KEPT),
        ("cache_size", -CACHE_KIB),
    ],
    ..SqliteProfile::SHARED
};

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

/// As [`rfc3339`], also for times before 1970, and NULL for NULL.
macro_rules! rfc3339_of_any {
    ($us:literal) => {
        concat!(
            "strftime('%Y-%m-%dT%H:%M:%S', (",
            $us,
            " - (",
            $us,
            " % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')",
            " || printf('.%06dZ', (",
            $us,
            " % 1000000 + 1000000) % 1000000)"
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
    "
);

/// Turns format 1 into format 2.
const ADD_QUARANTINE: &str = concat!(
    "
    -- What is kept and not let through. cause: 'schema', 'limit' or 'key'; keyword, pointer, detail and
    -- schema_version say what of its schema a message did not meet. redriven_offset: where it is
    -- since it was sent through intake again and let in.
    CREATE TABLE quarantined (
        offset          INTEGER PRIMARY KEY,
        datasource_id   INTEGER NOT NULL,
        topic_id        INTEGER NOT NULL,
        origin_id       INTEGER NOT NULL,
        received_us     INTEGER NOT NULL,
        payload         NOT NULL,
        properties      BLOB NOT NULL,
        publisher       INTEGER NOT NULL,
        flags           INTEGER NOT NULL,
        cause           TEXT NOT NULL,
        keyword         TEXT,
        pointer         TEXT,
        detail          TEXT,
        schema_version  INTEGER,
        redriven_offset INTEGER
    );
    CREATE INDEX quarantined_datasource ON quarantined (datasource_id);
    CREATE INDEX quarantined_origin ON quarantined (origin_id);

    -- The version of the rules about leaked keys that the tables are in accordance with.
    CREATE TABLE withheld (
        id      INTEGER PRIMARY KEY CHECK (id = 0),
        version INTEGER NOT NULL
    );
    INSERT INTO withheld VALUES (0, 0);

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
    "
);

/// Turns format 2 into format 3.
const ADD_INCARNATIONS: &str = "
    -- Which of the datasources that had the same id one after the other. Those that were deleted are called
    -- 'press-4~1': the name of an id that is in use stays free for the present one.
    ALTER TABLE datasources ADD COLUMN incarnation INTEGER NOT NULL DEFAULT 1;
";

/// Turns format 3 into format 4.
const ADD_EVENT_TIME: &str = concat!(
    "
    -- When it was measured, as its sender says: NULL if nobody does.
    ALTER TABLE entries ADD COLUMN event_us INTEGER;
    ALTER TABLE quarantined ADD COLUMN event_us INTEGER;
    CREATE INDEX entries_event ON entries (topic_id, event_us) WHERE event_us IS NOT NULL;

    -- The numbers of a topic's payloads, from a run of its records: {\"KEY\":[[OFFSET,TIME,VALUE],...],...}, with
    -- offsets that count from first_offset and times in microseconds that count from base_us.
    CREATE TABLE sample_chunks (
        id           INTEGER PRIMARY KEY,
        topic_id     INTEGER NOT NULL,
        first_offset INTEGER NOT NULL,
        last_offset  INTEGER NOT NULL,
        base_us      INTEGER NOT NULL,
        oldest_us    INTEGER NOT NULL,
        newest_us    INTEGER NOT NULL,
        samples      TEXT NOT NULL
    );
    CREATE INDEX sample_chunks_time ON sample_chunks (topic_id, newest_us, oldest_us);

    CREATE VIEW samples AS
    SELECT c.first_offset + json_extract(s.value, '$[0]') AS offset, d.datasource, t.topic, k.key,
        json_extract(s.value, '$[2]') AS value, ",
    rfc3339_of_any!("(c.base_us + json_extract(s.value, '$[1]'))"),
    " AS at, c.base_us + json_extract(s.value, '$[1]') AS at_us
    FROM sample_chunks c
    JOIN topics t ON t.id = c.topic_id
    JOIN datasources d ON d.id = t.datasource_id
    JOIN json_each(c.samples) k
    JOIN json_each(k.value) s;

    -- That a record's topic is of its datasource lets SQLite begin with the topic, if both names are given.
    DROP VIEW records;
    CREATE VIEW records AS
    SELECT e.offset, d.datasource, t.topic, e.payload, o.content_type, o.key_id, o.transport,
        ",
    rfc3339!("e.received_us"),
    " AS received_at, e.received_us, ",
    rfc3339_of_any!("e.event_us"),
    " AS event_at, e.event_us
    FROM entries e
    LEFT JOIN datasources d ON d.id = e.datasource_id
    LEFT JOIN topics t ON t.id = e.topic_id AND t.datasource_id = e.datasource_id
    LEFT JOIN origins o ON o.id = e.origin_id;

    DROP VIEW quarantine;
    CREATE VIEW quarantine AS
    SELECT q.offset, d.datasource, t.topic, q.payload, o.content_type, o.key_id, o.transport,
        ",
    rfc3339!("q.received_us"),
    " AS received_at, q.received_us, q.cause, q.keyword, q.pointer, q.detail, q.schema_version,
        q.redriven_offset, ",
    rfc3339_of_any!("q.event_us"),
    " AS event_at, q.event_us
    FROM quarantined q
    LEFT JOIN datasources d ON d.id = q.datasource_id
    LEFT JOIN topics t ON t.id = q.topic_id
    LEFT JOIN origins o ON o.id = q.origin_id;
    "
);

/// Turns format 4 into format 5.
const ADD_RETENTION: &str = "
    -- Below removed_below nothing is stored of a datasource any more: its limits have had it removed.
    CREATE TABLE retention (
        datasource_id INTEGER PRIMARY KEY,
        removed_below INTEGER NOT NULL
    );

    -- What the records of a datasource with a limit in bytes take, as far as that is counted: below next_offset.
    CREATE TABLE stored_sizes (
        datasource_id INTEGER PRIMARY KEY,
        bytes         INTEGER NOT NULL,
        next_offset   INTEGER NOT NULL
    );

    -- Finds the samples of what is removed.
    CREATE INDEX sample_chunks_offset ON sample_chunks (topic_id, first_offset);
";

/// Turns format 5 into format 6.
const BOUND_NAMES: &str = "
    -- Says whether quarantine has anything of a topic.
    CREATE INDEX quarantined_topic ON quarantined (topic_id);

    -- Topics of which nothing is left: while anything of a datasource was in quarantine none of its topics went.
    DELETE FROM latest_values WHERE topic_id IN (
        SELECT id FROM topics t WHERE NOT EXISTS (SELECT 1 FROM entries e WHERE e.topic_id = t.id)
            AND NOT EXISTS (SELECT 1 FROM quarantined q WHERE q.topic_id = t.id));
    DELETE FROM sample_chunks WHERE topic_id IN (
        SELECT id FROM topics t WHERE NOT EXISTS (SELECT 1 FROM entries e WHERE e.topic_id = t.id)
            AND NOT EXISTS (SELECT 1 FROM quarantined q WHERE q.topic_id = t.id));
    DELETE FROM topics AS t WHERE NOT EXISTS (SELECT 1 FROM entries e WHERE e.topic_id = t.id)
        AND NOT EXISTS (SELECT 1 FROM quarantined q WHERE q.topic_id = t.id);

    -- Whose records have an origin: NULL where that is not known, or not one datasource's. All of them are below used_below.
    -- No table is renamed: that fails where somebody has a view of their own on records or quarantine.
    CREATE TABLE earlier_origins AS SELECT id, key_id, transport, content_type FROM origins;
    DROP TABLE origins;
    CREATE TABLE origins (
        id            INTEGER PRIMARY KEY,
        key_id        TEXT NOT NULL,
        transport     TEXT NOT NULL,
        content_type  TEXT NOT NULL,
        datasource_id INTEGER,
        used_below    INTEGER NOT NULL,
        UNIQUE (key_id, transport, content_type, datasource_id)
    );
    INSERT INTO origins (id, key_id, transport, content_type, used_below)
    SELECT id, key_id, transport, content_type, (SELECT next_offset FROM cursor) FROM earlier_origins;
    DROP TABLE earlier_origins;
    CREATE INDEX origins_used ON origins (datasource_id, used_below);

    -- Offsets of marks, which have no row.
    CREATE TABLE marks (
        offset INTEGER PRIMARY KEY
    );
    -- From whole_from on, each offset up to the cursor has a row or is a mark's.
    ALTER TABLE cursor ADD COLUMN whole_from INTEGER NOT NULL DEFAULT 0;
    UPDATE cursor SET whole_from = next_offset;

    -- What the topics and origins of a datasource take.
    ALTER TABLE datasources ADD COLUMN name_bytes INTEGER NOT NULL DEFAULT 0;
    UPDATE datasources SET name_bytes = (
        SELECT coalesce(sum(2 * octet_length(topic) + 64), 0) FROM topics WHERE datasource_id = datasources.id);
    CREATE TRIGGER topics_added AFTER INSERT ON topics BEGIN
        UPDATE datasources SET name_bytes = name_bytes + 2 * octet_length(NEW.topic) + 64 WHERE id = NEW.datasource_id;
    END;
    CREATE TRIGGER topics_removed AFTER DELETE ON topics BEGIN
        UPDATE datasources SET name_bytes = name_bytes - 2 * octet_length(OLD.topic) - 64 WHERE id = OLD.datasource_id;
    END;
    CREATE TRIGGER origins_added AFTER INSERT ON origins BEGIN
        UPDATE datasources SET name_bytes = name_bytes + 2 * octet_length(NEW.content_type) + 64
        WHERE id = NEW.datasource_id;
    END;
    CREATE TRIGGER origins_removed AFTER DELETE ON origins BEGIN
        UPDATE datasources SET name_bytes = name_bytes - 2 * octet_length(OLD.content_type) - 64
        WHERE id = OLD.datasource_id;
    END;
    CREATE TRIGGER origins_shared AFTER UPDATE OF datasource_id ON origins BEGIN
        UPDATE datasources SET name_bytes = name_bytes - 2 * octet_length(OLD.content_type) - 64
        WHERE id = OLD.datasource_id;
    END;
";

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::*;

    #[test]
    fn a_database_of_format_1_becomes_one_of_the_newest_with_what_is_in_it() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("records.db");
        let connection = Connection::open(&path).expect("opens");
        connection.execute_batch(CREATE_RECORDS_TABLES).expect("format 1");
        connection.execute("UPDATE cursor SET next_offset = 41", []).expect("written");
        connection.pragma_update(None, "user_version", 1).expect("written");
        drop(connection);
        let connection = RECORDS_DATABASE.open(&path).expect("upgraded");
        let number = |sql| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).expect("reads");
        assert_eq!(number("PRAGMA user_version"), RECORDS_DATABASE.newest_version());
        assert_eq!(number("SELECT next_offset FROM cursor"), 41);
        assert_eq!(number("SELECT count(*) FROM quarantine"), 0);
        assert_eq!(number("SELECT version FROM withheld"), 0);
        assert_eq!(number("SELECT count(*) FROM retention"), 0);
        assert_eq!(number("PRAGMA auto_vacuum"), 0, "an older one keeps its form");
    }

    /// A database of format 5 with what `sql` puts there.
    fn of_format_5(path: &std::path::Path, sql: &str) {
        let connection = Connection::open(path).expect("opens");
        for step in &RECORDS_DATABASE.migrations[..5] {
            connection.execute_batch(step).expect("a format");
        }
        connection.execute_batch(sql).expect("written");
        connection.pragma_update(None, "user_version", 5).expect("written");
    }

    #[test]
    fn topics_that_format_5_has_kept_without_a_record_are_gone() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("records.db");
        of_format_5(
            &path,
            "INSERT INTO datasources (id, datasource) VALUES (1, 'press-4');
             INSERT INTO topics VALUES (1, 1, 'a', 7), (2, 1, 'b', -1), (3, 1, 'c', -1), (4, 1, 'd', -1);
             INSERT INTO origins VALUES (1, '0a0a0a0a0a0a', 'mqtt', '');
             INSERT INTO entries VALUES (7, 1, 1, 1, 0, 'x', NULL);
             INSERT INTO quarantined VALUES (8, 1, 3, 1, 0, 'x', '', 0, 0, 'key', NULL, NULL, NULL, NULL, NULL, NULL);
             INSERT INTO latest_values VALUES (1, '', 'x', 7, 0), (2, '', 'x', 6, 0);
             INSERT INTO sample_chunks VALUES (1, 1, 7, 7, 0, 0, 0, '{}'), (2, 4, 6, 6, 0, 0, 0, '{}');
             UPDATE cursor SET next_offset = 9;",
        );
        let connection = RECORDS_DATABASE.open(&path).expect("upgraded");
        let list = |sql| connection.query_row(sql, [], |row| row.get::<_, String>(0)).expect("reads");
        assert_eq!(list("SELECT group_concat(topic) FROM topics"), "a,c");
        assert_eq!(list("SELECT group_concat(topic_id) FROM latest_values"), "1");
        assert_eq!(list("SELECT group_concat(topic_id) FROM sample_chunks"), "1");
        assert_eq!(list("SELECT topic || key_id FROM records"), "a0a0a0a0a0a0a");
        assert_eq!(list("SELECT topic || key_id FROM quarantine"), "c0a0a0a0a0a0a");
        assert_eq!(list("SELECT name_bytes || ' ' || datasource FROM datasources"), "132 press-4");
        assert_eq!(list("SELECT used_below || '' FROM origins WHERE datasource_id IS NULL"), "9");
    }

    /// To rename a table fails where a view reads what is not there at the moment: the gateway did not start any more.
    #[test]
    fn a_view_of_somebody_elses_is_in_no_migrations_way_and_stays() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("records.db");
        of_format_5(
            &path,
            "INSERT INTO datasources (id, datasource) VALUES (1, 'press-4');
             INSERT INTO topics VALUES (1, 1, 'a', 7);
             INSERT INTO origins VALUES (1, '0a0a0a0a0a0a', 'mqtt', '');
             INSERT INTO entries VALUES (7, 1, 1, 1, 0, 'x', NULL);
             UPDATE cursor SET next_offset = 8;
             CREATE VIEW mine AS SELECT r.topic, o.key_id FROM records r JOIN origins o USING (key_id);
             CREATE VIEW refused AS SELECT count(*) AS count FROM quarantine;",
        );
        let connection = RECORDS_DATABASE.open(&path).expect("upgraded");
        let text = |sql| connection.query_row(sql, [], |row| row.get::<_, String>(0)).expect("reads");
        assert_eq!(text("SELECT topic || key_id FROM mine"), "a0a0a0a0a0a0a");
        assert_eq!(text("SELECT count || '' FROM refused"), "0");
        assert_eq!(text("SELECT count(*) || '' FROM sqlite_schema WHERE name = 'earlier_origins'"), "0");
    }

    #[test]
    fn a_new_database_can_give_pages_back() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let connection = RECORDS_DATABASE.open(&dir.path().join("records.db")).expect("made");
        let mode: i64 = connection.pragma_query_value(None, "auto_vacuum", |row| row.get(0)).expect("reads");
        assert_eq!(mode, 2, "incremental");
    }

    #[test]
    fn sql_finds_the_records_of_a_topic_by_their_event_times_with_an_index() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let connection = RECORDS_DATABASE.open(&dir.path().join("records.db")).expect("made");
        let mut plan = connection
            .prepare(
                "EXPLAIN QUERY PLAN SELECT offset, payload FROM records
                 WHERE datasource = 'press-4' AND topic = 'a' AND event_us >= 5 AND event_us < 9",
            )
            .expect("SQL");
        let steps = plan.query_map([], |row| row.get::<_, String>(3)).expect("a plan");
        let steps: Vec<String> = steps.map(|step| step.expect("a text")).collect();
        let by_time = "SEARCH e USING INDEX entries_event (topic_id=? AND event_us>? AND event_us<?)";
        assert!(steps.iter().any(|step| step == by_time), "{steps:?}");
    }
}
