//! The tables in PostgreSQL, as Headgate makes them and brings them up to date, in a schema of their own.
//!
//! Four views are for reading, also while the gateway runs:
//!
//! - `records`: `log_offset`, `datasource`, `topic`, `received_at`, `event_at` (when it was measured, if its sender has
//!   said so), `time` (the one or the other), `key_id`, `transport`, `content_type`, `payload` (JSON) or `payload_bytes`
//!   (anything else), and `payload_note`: why JSON is in `payload_bytes`.
//! - `samples`: `datasource`, `topic`, `key`, `time`, `value`, `log_offset`: the numbers of JSON payloads.
//! - `latest`: `datasource`, `topic`, `key`, `value`, `log_offset`, `received_at`: the newest value of each key.
//! - `quarantine`: what is kept and not passed on, with its cause.
//!
//! The tables behind them have each repeating name once. A datasource that was deleted is called `press-4~1` in all of them.
//! Rows of `entries` and `sample_rows` come in the order of their offsets, so that a BRIN index, which costs next to
//! nothing, finds a range of time or offsets.

use std::cmp::Ordering;

use headgate_bridge_postgres::{PostgresConnection, PostgresFault};

use super::PostgresError;

/// The oldest version that is used, as `server_version_num` has it.
const SERVER_VERSION_MIN: i32 = 140_000;
/// The lock under which the tables are made: of all that Headgate makes in one database, "hg" and a number.
const MIGRATION_LOCK: i64 = 0x6867_0001;
/// Gives ids more room, in tables of format 4.
const WIDEN_IDS: &str = include_str!("wide_ids.sql");
/// The first format whose tables may have wide ids.
const WIDE_IDS_FORMAT: i32 = 4;
/// Tables that take more bytes together keep their ids as they are, until somebody has the time: see `docs/operating.md`.
const WIDENED_BYTES_MAX: i64 = 1 << 30;
/// Turns format N into format N + 1.
const MIGRATIONS: [&str; 4] = [CREATE_TABLES, ADD_READING, ADD_SAMPLE_LANE, BOUND_NAMES];

/// Makes the tables in `schema`, or brings them up to date, and makes them those that names stand for in this connection.
/// `json` is the type of JSON payloads in tables that are made anew.
///
/// # Errors
/// [`PostgresError`]: the database's, or it is none that Headgate can use.
pub(super) fn open_schema(
    connection: &PostgresConnection,
    schema: &str,
    json: &str,
) -> Result<(), PostgresError> {
    let about = connection.query_one(
        "SELECT current_setting('server_version_num')::int, current_setting('server_encoding')",
        &[],
    )?;
    let (version, encoding): (i32, String) = (about.get(0), about.get(1));
    if version < SERVER_VERSION_MIN {
        return Err(PostgresError::OldServer { version: version / 10_000 });
    }
    if encoding != "UTF8" {
        return Err(PostgresError::Encoding(encoding));
    }
    connection.run("BEGIN")?;
    let made = migrate(connection, schema, json);
    connection.run(if made.is_ok() { "COMMIT" } else { "ROLLBACK" })?;
    made?;
    Ok(connection.run(&format!("SET search_path = {}", quoted(schema)))?)
}

fn migrate(connection: &PostgresConnection, schema: &str, json: &str) -> Result<(), PostgresError> {
    // Two gateways that start at once: the later one finds what the earlier one has made.
    connection.query("SELECT pg_advisory_xact_lock($1)", &[&MIGRATION_LOCK])?;
    let is_there = connection.query("SELECT FROM pg_namespace WHERE nspname = $1", &[&schema])?;
    if is_there.is_empty() {
        connection.run(&format!("CREATE SCHEMA {}", quoted(schema)))?;
    }
    connection.run(&format!("SET LOCAL search_path = {}", quoted(schema)))?;
    let (found, newest) = (format_of(connection, schema)?, newest_format());
    if found > newest {
        return Err(PostgresError::NewerFormat { found, newest });
    }
    if found < newest {
        connection.run("SET LOCAL statement_timeout = '15min'")?;
    }
    for migration in MIGRATIONS.iter().skip(usize::try_from(found).unwrap_or(0)) {
        connection.run(&migration.replace("{json}", json))?;
    }
    if found < WIDE_IDS_FORMAT {
        widen_ids(connection, schema)?;
    }
    if found < newest {
        connection.execute("UPDATE headgate_format SET version = $1", &[&newest])?;
    }
    Ok(())
}

/// Makes ids bigint where that is soon done. Where it is not, or other views are in the way, there are still as many as an
/// int has. Where rows are in other tables (a hypertable's chunks, partitions), nothing says how long it would take.
fn widen_ids(connection: &PostgresConnection, schema: &str) -> Result<(), PostgresFault> {
    let tables = connection.query_one(
        "SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint,
             coalesce(bool_or(EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = c.oid)), false)
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = $1 AND c.relkind IN ('r', 'p')",
        &[&schema],
    )?;
    let (bytes, has_parts): (i64, bool) = (tables.get(0), tables.get(1));
    if bytes > WIDENED_BYTES_MAX || has_parts {
        tracing::info!(bytes, has_parts, "PostgreSQL: ids in these tables stay int (docs/operating.md)");
        return Ok(());
    }
    connection.run("SAVEPOINT narrow_ids")?;
    match connection.run(WIDEN_IDS) {
        Err(fault) if fault.code().is_some() => {
            tracing::warn!(%fault, "PostgreSQL: ids stay int (docs/operating.md)");
            connection.run("ROLLBACK TO narrow_ids")
        }
        widened => widened,
    }
}

/// Whether ids of topics, origins and sets of keys are bigint, and not int.
///
/// # Errors
/// The database's.
pub(super) fn has_wide_ids(connection: &PostgresConnection) -> Result<bool, PostgresFault> {
    let row = connection.query_one(
        "SELECT atttypid = 'bigint'::regtype FROM pg_attribute WHERE attrelid = 'entries'::regclass AND attname = 'topic_id'",
        &[],
    )?;
    Ok(row.get(0))
}

/// Whether the tables in `schema` are of the format that this Headgate knows.
///
/// # Errors
/// [`PostgresError::NotMade`], [`PostgresError::NewerFormat`]; the database's.
pub(in crate::consume) fn check_format(
    connection: &PostgresConnection,
    schema: &str,
) -> Result<(), PostgresError> {
    let (found, newest) = (format_of(connection, schema)?, newest_format());
    match found.cmp(&newest) {
        Ordering::Less => Err(PostgresError::NotMade { schema: schema.to_owned(), newest }),
        Ordering::Equal => Ok(()),
        Ordering::Greater => Err(PostgresError::NewerFormat { found, newest }),
    }
}

fn newest_format() -> i32 {
    i32::try_from(MIGRATIONS.len()).unwrap_or(i32::MAX)
}

/// The format of the tables in `schema`; 0 without any.
fn format_of(connection: &PostgresConnection, schema: &str) -> Result<i32, PostgresError> {
    let known = connection.query(
        "SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = $1 AND c.relname = 'headgate_format'",
        &[&schema],
    )?;
    if known.is_empty() {
        return Ok(0);
    }
    let version = format!("SELECT version FROM {}.headgate_format", quoted(schema));
    Ok(connection.query_one(&version, &[])?.get(0))
}

/// An identifier in quotes.
pub(in crate::consume) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Makes format 4 of format 3: names go with the last record that has them.
const BOUND_NAMES: &str = r#"
    -- Says whether quarantine has anything of a topic.
    CREATE INDEX quarantined_topic ON quarantined (topic_id);

    -- Topics of which nothing is left: while anything of a datasource was in quarantine none of its topics went.
    -- Each is looked up in an index: to read all entries could take longer than a migration may.
    SET LOCAL enable_hashjoin = off;
    SET LOCAL enable_mergejoin = off;
    CREATE TEMP TABLE empty_topics ON COMMIT DROP AS
    SELECT t.id FROM topics t WHERE NOT EXISTS (SELECT FROM entries e WHERE e.topic_id = t.id)
        AND NOT EXISTS (SELECT FROM quarantined q WHERE q.topic_id = t.id);
    RESET enable_hashjoin;
    RESET enable_mergejoin;
    DELETE FROM latest_values WHERE topic_id IN (SELECT id FROM empty_topics);
    DELETE FROM key_sets WHERE topic_id IN (SELECT id FROM empty_topics);
    DELETE FROM topics WHERE id IN (SELECT id FROM empty_topics);

    -- Whose records have an origin: NULL where that is not known, or not one datasource's. All of them are below used_below.
    ALTER TABLE origins ADD COLUMN datasource_id int, ADD COLUMN used_below bigint NOT NULL DEFAULT 0,
        DROP CONSTRAINT origins_key_id_transport_content_type_key,
        ADD CONSTRAINT origins_of_datasource UNIQUE (key_id, transport, content_type, datasource_id);
    UPDATE origins SET used_below = (SELECT next_offset FROM sink);
    CREATE INDEX origins_used ON origins (datasource_id, used_below);
"#;

/// Makes format 3 of format 2: samples may have a transaction of their own, and rows of samples the keys of their own.
const ADD_SAMPLE_LANE: &str = r#"
    -- Up to where samples that had a transaction of their own are stored, and which connection it was.
    CREATE TABLE sample_lane (
        id          int PRIMARY KEY CHECK (id = 0),
        next_offset bigint NOT NULL,
        pid         int,
        pid_since   timestamptz
    );
    INSERT INTO sample_lane VALUES (0, 0);
    -- From where on the samples of the last transaction have one of their own. They are stored if that has come as far.
    ALTER TABLE sink ADD COLUMN samples_from bigint;
    -- The keys of a row that has no set of them: key_set_id is 0.
    ALTER TABLE sample_rows ADD COLUMN keys text[] COLLATE "C";
    ALTER TABLE withheld_samples ADD COLUMN keys text[] COLLATE "C";
    CREATE INDEX sample_rows_keys ON sample_rows (topic_id, time) WHERE key_set_id = 0;

    CREATE OR REPLACE VIEW samples AS
    SELECT d.datasource, t.topic, n.key, s.time, n.value, s.log_offset
    FROM sample_rows s LEFT JOIN key_sets k ON k.id = s.key_set_id JOIN topics t ON t.id = s.topic_id
    JOIN datasources d ON d.id = t.datasource_id
    CROSS JOIN LATERAL unnest(coalesce(s.keys, k.keys), s.numbers) AS n (key, value);
"#;

/// Makes format 2 of format 1: what reads and retention need. What a row takes is not known of earlier ones.
const ADD_READING: &str = r#"
    ALTER TABLE entries ADD COLUMN payload_size int;
    ALTER TABLE quarantined ADD COLUMN payload_size int;

    -- The oldest and the newest time of receipt among 4096 offsets.
    CREATE TABLE time_index (
        first_offset bigint PRIMARY KEY,
        oldest       timestamptz NOT NULL,
        newest       timestamptz NOT NULL
    );
    INSERT INTO time_index
    SELECT log_offset - log_offset % 4096, min(received_at), max(received_at)
    FROM (SELECT log_offset, received_at FROM entries UNION ALL SELECT log_offset, received_at FROM quarantined) r
    GROUP BY 1;

    -- The offset below which retention has removed everything of a datasource.
    CREATE TABLE retention (
        datasource_id int PRIMARY KEY,
        removed_below bigint NOT NULL
    );

    CREATE INDEX entries_event ON entries (topic_id, event_at, log_offset) WHERE event_at IS NOT NULL;
    -- Which keys the numbers of a row of samples stand for, in their order. By a digest of them.
    CREATE TABLE key_sets (
        id       int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        topic_id int NOT NULL,
        digest   bytea NOT NULL,
        keys     text[] COLLATE "C" NOT NULL,
        UNIQUE (topic_id, digest)
    );
    -- The samples of a record that are of one time. Room that retention has made is used again, so that rows are not in
    -- the order of their offsets for ever.
    CREATE TABLE sample_rows (
        time       timestamptz NOT NULL,
        log_offset bigint NOT NULL,
        topic_id   int NOT NULL,
        key_set_id int NOT NULL,
        numbers    double precision[] NOT NULL
    );
    -- Those of records that are in quarantine because of a leaked key.
    ALTER TABLE withheld_samples RENAME TO withheld_values;
    CREATE TABLE withheld_samples (LIKE sample_rows);

    -- Those of format 1 have a row each.
    CREATE TEMP TABLE earlier ON COMMIT DROP AS
    SELECT v.is_withheld, v.time, v.log_offset, s.topic_id, array_agg(s.key ORDER BY s.id) AS keys,
        array_agg(v.value ORDER BY s.id) AS numbers
    FROM (SELECT *, row_number() OVER (PARTITION BY is_withheld, series_id, log_offset, time) AS nth FROM (
        SELECT false AS is_withheld, * FROM sample_values UNION ALL SELECT true, * FROM withheld_values) a) v
    JOIN series s ON s.id = v.series_id GROUP BY v.is_withheld, v.nth, v.time, v.log_offset, s.topic_id;
    INSERT INTO key_sets (topic_id, digest, keys)
    SELECT DISTINCT topic_id, sha256(convert_to(keys::text, 'UTF8')), keys FROM earlier;
    INSERT INTO sample_rows
    SELECT e.time, e.log_offset, e.topic_id, k.id, e.numbers FROM earlier e
    JOIN key_sets k ON k.topic_id = e.topic_id AND k.keys = e.keys WHERE NOT e.is_withheld ORDER BY e.log_offset;
    INSERT INTO withheld_samples
    SELECT e.time, e.log_offset, e.topic_id, k.id, e.numbers FROM earlier e
    JOIN key_sets k ON k.topic_id = e.topic_id AND k.keys = e.keys WHERE e.is_withheld;

    CREATE INDEX sample_rows_topic ON sample_rows (topic_id, time);
    CREATE INDEX sample_rows_offset ON sample_rows (log_offset);
    CREATE INDEX sample_rows_time ON sample_rows USING brin (time) WITH (pages_per_range = 32);
    CREATE INDEX withheld_samples_offset ON withheld_samples (log_offset);

    CREATE OR REPLACE VIEW samples AS
    SELECT d.datasource, t.topic, n.key, s.time, n.value, s.log_offset
    FROM sample_rows s JOIN key_sets k ON k.id = s.key_set_id JOIN topics t ON t.id = s.topic_id
    JOIN datasources d ON d.id = t.datasource_id CROSS JOIN LATERAL unnest(k.keys, s.numbers) AS n (key, value);
    DROP TABLE sample_values, withheld_values, series;
"#;

/// Makes format 1.
const CREATE_TABLES: &str = r#"
    CREATE TABLE headgate_format (version int NOT NULL);
    INSERT INTO headgate_format VALUES (0);

    -- The first offset that is not stored, and the one that a crash of the server leaves at least. The version of the rules
    -- about what is left out that the tables follow. Which gateway writes, over which connection, and until when no other
    -- one may take its place.
    CREATE TABLE sink (
        id               int PRIMARY KEY CHECK (id = 0),
        next_offset      bigint NOT NULL,
        durable_offset   bigint NOT NULL,
        withheld_version bigint NOT NULL,
        owner            text,
        owner_pid        int,
        owner_since      timestamptz,
        lease_until      timestamptz
    );
    INSERT INTO sink VALUES (0, 0, 0, 0);

    CREATE TABLE datasources (
        id          int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        datasource  text COLLATE "C" NOT NULL UNIQUE,
        incarnation bigint NOT NULL
    );
    CREATE TABLE topics (
        id            int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        datasource_id int NOT NULL,
        topic         text COLLATE "C" NOT NULL,
        latest_offset bigint NOT NULL,
        UNIQUE (datasource_id, topic)
    );
    -- Who sent records: they share these.
    CREATE TABLE origins (
        id           int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        key_id       text COLLATE "C" NOT NULL,
        transport    text COLLATE "C" NOT NULL,
        content_type text COLLATE "C" NOT NULL,
        UNIQUE (key_id, transport, content_type)
    );
    -- The keys of a topic's samples.
    CREATE TABLE series (
        id       int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        topic_id int NOT NULL,
        key      text COLLATE "C" NOT NULL,
        UNIQUE (topic_id, key)
    );

    CREATE TABLE entries (
        log_offset    bigint PRIMARY KEY,
        received_at   timestamptz NOT NULL,
        event_at      timestamptz,
        datasource_id int NOT NULL,
        topic_id      int NOT NULL,
        origin_id     int NOT NULL,
        payload       {json},
        payload_bytes bytea,
        payload_note  text
    );
    CREATE INDEX entries_topic ON entries (topic_id, log_offset);
    CREATE INDEX entries_datasource ON entries (datasource_id, log_offset);
    CREATE INDEX entries_received ON entries USING brin (received_at) WITH (pages_per_range = 32);

    CREATE TABLE sample_values (
        time       timestamptz NOT NULL,
        log_offset bigint NOT NULL,
        value      double precision NOT NULL,
        series_id  int NOT NULL
    );
    CREATE INDEX sample_values_time ON sample_values USING brin (time) WITH (pages_per_range = 32);
    CREATE INDEX sample_values_offset ON sample_values USING brin (log_offset) WITH (pages_per_range = 32);
    -- Those of records that are in quarantine because of a leaked key.
    CREATE TABLE withheld_samples (LIKE sample_values);

    -- value: JSON, or value_bytes: a payload that is no text, or neither if it was too long to be copied.
    CREATE TABLE latest_values (
        topic_id    int NOT NULL,
        key         text COLLATE "C" NOT NULL,
        value       text,
        value_bytes bytea,
        log_offset  bigint NOT NULL,
        received_at timestamptz NOT NULL,
        PRIMARY KEY (topic_id, key)
    );

    CREATE TABLE quarantined (
        log_offset      bigint PRIMARY KEY,
        received_at     timestamptz NOT NULL,
        event_at        timestamptz,
        datasource_id   int NOT NULL,
        topic_id        int NOT NULL,
        origin_id       int NOT NULL,
        payload         {json},
        payload_bytes   bytea,
        payload_note    text,
        properties      bytea NOT NULL,
        publisher       bigint NOT NULL,
        flags           int NOT NULL,
        cause           text NOT NULL,
        keyword         text,
        pointer         text,
        detail          text,
        schema_version  bigint,
        redriven_offset bigint
    );
    CREATE INDEX quarantined_datasource ON quarantined (datasource_id, log_offset);
    CREATE INDEX quarantined_origin ON quarantined (origin_id);

    CREATE VIEW records AS
    SELECT e.log_offset, d.datasource, t.topic, e.received_at, e.event_at, coalesce(e.event_at, e.received_at) AS time,
        o.key_id, o.transport, nullif(o.content_type, '') AS content_type, e.payload, e.payload_bytes, e.payload_note
    FROM entries e JOIN datasources d ON d.id = e.datasource_id JOIN topics t ON t.id = e.topic_id
    JOIN origins o ON o.id = e.origin_id;

    CREATE VIEW samples AS
    SELECT d.datasource, t.topic, s.key, v.time, v.value, v.log_offset
    FROM sample_values v JOIN series s ON s.id = v.series_id JOIN topics t ON t.id = s.topic_id
    JOIN datasources d ON d.id = t.datasource_id;

    CREATE VIEW latest AS
    SELECT d.datasource, t.topic, v.key, v.value, v.value_bytes, v.log_offset, v.received_at
    FROM latest_values v JOIN topics t ON t.id = v.topic_id JOIN datasources d ON d.id = t.datasource_id;

    CREATE VIEW quarantine AS
    SELECT q.log_offset, d.datasource, t.topic, q.received_at, q.event_at, o.key_id, o.transport,
        nullif(o.content_type, '') AS content_type, q.payload, q.payload_bytes, q.payload_note,
        q.cause, q.keyword, q.pointer, q.detail, q.schema_version, q.redriven_offset
    FROM quarantined q JOIN datasources d ON d.id = q.datasource_id JOIN topics t ON t.id = q.topic_id
    JOIN origins o ON o.id = q.origin_id;
"#;
