//! The table `quarantined` of `records.db`: records that are kept and not passed on, each with its reason.
//!
//! A record is here for one of three causes. With `schema` it failed its schema, with `limit` it was over
//! a limit, and it is here from the beginning. With `key` the key that let it in has leaked: it is moved
//! here from `entries`, or is stored here if the rule is older than its storage. Only `key` can be undone.
//! A move, its effect on the newest values, and the new version of the rules are one transaction.

use rusqlite::types::ToSqlOutput;
use rusqlite::{Connection, params};

use super::ids::RowIds;
use super::incarnations;
use super::newest;
use super::retention::{forget_if_empty, forget_sizes};
use super::samples;
use super::schema::{offset_from_sql, sql_offset};
use crate::log::{RecordNote, WithheldChange, WithheldSnapshot};
use crate::message::{KeyId, Offset, RecordFlags, RecordRef};

/// The `cause` of a record that failed its schema.
pub const CAUSE_SCHEMA: &str = "schema";
/// The `cause` of a record that was over a limit whose policy is quarantine.
pub const CAUSE_LIMIT: &str = "limit";
/// The `cause` of a record whose key has leaked.
pub const CAUSE_KEY: &str = "key";

/// The columns that a record has in both tables.
const ENTRY_COLUMNS: &str = "offset, datasource_id, topic_id, origin_id, received_us, payload, event_us";

/// The records that a correction moves out of `entries` or back.
pub(super) const CREATE_MOVED: &str =
    "CREATE TEMP TABLE IF NOT EXISTS moved (offset INTEGER PRIMARY KEY, topic_id INTEGER NOT NULL)";

/// Stores a record in quarantine, in the transaction that `connection` is in.
pub(super) fn insert_quarantined(
    connection: &Connection,
    record: &RecordRef<'_>,
    row: RowIds,
    payload: ToSqlOutput<'_>,
) -> rusqlite::Result<()> {
    let (cause, reason) = match RecordNote::decode(record.note) {
        Some(RecordNote::Quarantined(reason)) if reason.is_limit() => (CAUSE_LIMIT, Some(reason)),
        Some(RecordNote::Quarantined(reason)) => (CAUSE_SCHEMA, Some(reason)),
        _ => (CAUSE_KEY, None),
    };
    connection
        .prepare_cached(
            "INSERT INTO quarantined (offset, datasource_id, topic_id, origin_id, received_us, payload,
                 properties, publisher, flags, cause, keyword, pointer, detail, schema_version, event_us)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
        )?
        .execute(params![
            sql_offset(record.offset),
            row.datasource,
            row.topic,
            row.origin,
            record.received_at,
            payload,
            record.properties,
            record.publisher.cast_signed(),
            record.flags.0,
            cause,
            reason.as_ref().map(|reason| &*reason.keyword),
            reason.as_ref().map(|reason| &*reason.pointer),
            reason.as_ref().map(|reason| &*reason.words),
            reason.as_ref().map(|reason| reason.schema_version),
            record.event_at,
        ])?;
    Ok(())
}

/// Notes with the quarantined record the new offset of one that was sent through intake again.
pub(super) fn note_redriven(connection: &Connection, record: &RecordRef<'_>) -> rusqlite::Result<()> {
    if let Some(RecordNote::Redriven { offset, .. }) = RecordNote::decode(record.note) {
        note_let_in(connection, offset, record.offset)?;
    }
    Ok(())
}

/// Whether it is a mark that says which record was let in, and not a record itself.
pub(super) fn is_mark(record: &RecordRef<'_>) -> bool {
    record.flags.contains(RecordFlags::QUARANTINED.with(RecordFlags::REDRIVEN))
}

/// Notes with a quarantined record the offset of what was let in, itself or in its place. `false` if `record` is no
/// mark that says so.
pub(super) fn note_superseded(connection: &Connection, record: &RecordRef<'_>) -> rusqlite::Result<bool> {
    if !is_mark(record) {
        return Ok(false);
    }
    if let Some(RecordNote::Superseded { offset, by }) = RecordNote::decode(record.note) {
        note_let_in(connection, offset, by)?;
    }
    connection
        .prepare_cached("INSERT OR IGNORE INTO marks (offset) VALUES (?1)")?
        .execute([sql_offset(record.offset)])?;
    Ok(true)
}

fn note_let_in(connection: &Connection, offset: Offset, by: Offset) -> rusqlite::Result<()> {
    let sql = "UPDATE quarantined SET redriven_offset = ?2 WHERE offset = ?1";
    connection.prepare_cached(sql)?.execute([sql_offset(offset), sql_offset(by)])?;
    Ok(())
}

/// The version of the rules about leaked keys that the tables follow.
pub(super) fn stored_withheld_version(connection: &Connection) -> rusqlite::Result<u64> {
    connection.query_row("SELECT version FROM withheld", [], |row| row.get(0).map(offset_from_sql))
}

/// Makes the tables follow the rules but for purges, in the transaction that `connection` is in. `changes` are those
/// since the version that the tables followed; `left_out` holds the present rules. With `keeps_samples`, records that come
/// back have samples again.
pub(super) fn reconcile(
    connection: &Connection,
    changes: &[WithheldChange],
    left_out: &WithheldSnapshot,
    version: u64,
    keeps_samples: bool,
) -> rusqlite::Result<()> {
    connection.execute_batch(CREATE_MOVED)?;
    for change in changes {
        if let WithheldChange::Incarnation(datasource, incarnation, step) = change {
            incarnations::follow_step(connection, datasource, *incarnation, step, left_out, keeps_samples)?;
        }
    }
    let mut keys: Vec<KeyId> = changes.iter().filter_map(WithheldChange::key_id).collect();
    keys.sort_unstable();
    keys.dedup();
    for key_id in keys {
        withhold(connection, key_id, left_out)?;
        give_back(connection, key_id, left_out, keeps_samples)?;
    }
    connection.execute("UPDATE withheld SET version = ?1", [sql_offset(version)])?;
    Ok(())
}

/// Deletes the records from `end` on, in quarantine or not, in the transaction that `connection` is in. The
/// newest values become those of the records before.
pub(super) fn forget_from(connection: &Connection, end: Offset) -> rusqlite::Result<()> {
    let end = sql_offset(end);
    connection.execute_batch(CREATE_MOVED)?;
    connection.execute("DELETE FROM temp.moved", [])?;
    connection
        .execute("INSERT INTO temp.moved SELECT offset, topic_id FROM entries WHERE offset >= ?1", [end])?;
    connection.execute(
        "INSERT INTO temp.moved SELECT offset, topic_id FROM quarantined WHERE offset >= ?1",
        [end],
    )?;
    connection.execute("DELETE FROM entries WHERE offset >= ?1", [end])?;
    connection.execute("DELETE FROM quarantined WHERE offset >= ?1", [end])?;
    connection.execute("DELETE FROM marks WHERE offset >= ?1", [end])?;
    connection.execute("UPDATE cursor SET whole_from = min(whole_from, ?1)", [end])?;
    connection.execute("UPDATE retention SET removed_below = min(removed_below, ?1)", [end])?;
    forget_sizes(connection)?;
    // The registry may have gone back with the log, and given a version to another rule.
    connection.execute("UPDATE withheld SET version = 0", [])?;
    connection.execute("UPDATE quarantined SET redriven_offset = NULL WHERE redriven_offset >= ?1", [end])?;
    for_each_moved_topic(connection, |topic_id| {
        forget_moved(connection, topic_id)?;
        forget_if_empty(connection, topic_id).map(drop)
    })
}

/// Moves records that rules about this key cover into quarantine.
fn withhold(connection: &Connection, key_id: KeyId, left_out: &WithheldSnapshot) -> rusqlite::Result<()> {
    connection.execute("DELETE FROM temp.moved", [])?;
    for rule in left_out.rules().filter(|rule| rule.key_id == key_id) {
        // No earlier record can be young enough, even if the clock was set back.
        let first: Option<i64> = connection.query_row(
            "SELECT min(first_offset) FROM time_index WHERE newest_us >= ?1",
            [rule.since],
            |row| row.get(0),
        )?;
        let Some(first) = first else { continue };
        let common = "offset >= ?1 AND offset < ?2 AND received_us >= ?3
             AND origin_id IN (SELECT id FROM origins WHERE key_id = ?4)";
        let insert = "INSERT OR IGNORE INTO temp.moved SELECT offset, topic_id FROM entries WHERE";
        let (below, key_id) = (sql_offset(rule.below), key_id.to_string());
        if rule.datasource.is_all() {
            connection.execute(&format!("{insert} {common}"), params![first, below, rule.since, key_id])?;
        } else {
            // All its incarnations: the key is of one of them.
            let of_one = "datasource_id IN (SELECT id FROM datasources WHERE datasource = ?5 OR datasource LIKE ?5 || '~%') AND";
            connection.execute(
                &format!("{insert} {of_one} {common}"),
                params![first, below, rule.since, key_id, rule.datasource.as_str()],
            )?;
        }
    }
    connection.execute(
        &format!(
            "INSERT INTO quarantined ({ENTRY_COLUMNS}, properties, publisher, flags, cause)
             SELECT {ENTRY_COLUMNS}, x'', 0, 0, '{CAUSE_KEY}' FROM entries
             WHERE offset IN (SELECT offset FROM temp.moved)"
        ),
        [],
    )?;
    connection.execute("DELETE FROM entries WHERE offset IN (SELECT offset FROM temp.moved)", [])?;
    for_each_moved_topic(connection, |topic_id| forget_moved(connection, topic_id))
}

/// Moves records that no rule about this key covers any more back to `entries`.
fn give_back(
    connection: &Connection,
    key_id: KeyId,
    left_out: &WithheldSnapshot,
    keeps_samples: bool,
) -> rusqlite::Result<()> {
    connection.execute("DELETE FROM temp.moved", [])?;
    {
        let mut here = connection.prepare(&format!(
            "SELECT q.offset, q.topic_id, q.received_us, d.datasource
             FROM quarantined q JOIN datasources d ON d.id = q.datasource_id
             WHERE q.cause = '{CAUSE_KEY}' AND q.origin_id IN (SELECT id FROM origins WHERE key_id = ?1)"
        ))?;
        let mut moved = connection.prepare("INSERT INTO temp.moved VALUES (?1, ?2)")?;
        let mut rows = here.query([key_id.to_string()])?;
        while let Some(row) = rows.next()? {
            let (offset, topic_id): (i64, i64) = (row.get(0)?, row.get(1)?);
            let name = row.get_ref(3)?.as_str()?;
            let datasource = name.split_once('~').map_or(name, |(datasource, _)| datasource);
            if !left_out.covers(datasource, key_id, row.get(2)?, offset_from_sql(offset)) {
                moved.execute([offset, topic_id])?;
            }
        }
    }
    connection.execute(
        &format!(
            "INSERT INTO entries ({ENTRY_COLUMNS}) SELECT {ENTRY_COLUMNS} FROM quarantined
             WHERE offset IN (SELECT offset FROM temp.moved)"
        ),
        [],
    )?;
    connection.execute("DELETE FROM quarantined WHERE offset IN (SELECT offset FROM temp.moved)", [])?;
    for_each_moved_topic(connection, |topic_id| restore_moved(connection, topic_id, keeps_samples))
}

/// Takes out what a topic has of its records that are in `temp.moved` and no longer in `entries`: newest values and samples.
pub(super) fn forget_moved(connection: &Connection, topic_id: i64) -> rusqlite::Result<()> {
    newest::forget_moved(connection, topic_id)?;
    samples::forget_moved(connection, topic_id)
}

/// Puts back what [`forget_moved`] has taken out, of records that are in `entries`; samples only with `keeps_samples`.
pub(super) fn restore_moved(
    connection: &Connection,
    topic_id: i64,
    keeps_samples: bool,
) -> rusqlite::Result<()> {
    newest::restore_moved(connection, topic_id)?;
    if keeps_samples {
        samples::restore_moved(connection, topic_id)?;
    }
    Ok(())
}

/// Calls `work` with each topic of the records in `temp.moved`.
pub(super) fn for_each_moved_topic(
    connection: &Connection,
    mut work: impl FnMut(i64) -> rusqlite::Result<()>,
) -> rusqlite::Result<()> {
    let mut topics = connection.prepare("SELECT DISTINCT topic_id FROM temp.moved")?;
    let mut rows = topics.query([])?;
    while let Some(row) = rows.next()? {
        work(row.get(0)?)?;
    }
    Ok(())
}
