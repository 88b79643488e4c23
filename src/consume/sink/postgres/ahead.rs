//! Whether what is in PostgreSQL is of this log. The newest record that both may have is compared; what is stored behind the
//! log's end is set aside in tables of its own, because the log gives those offsets anew.

use super::{PostgresError, PostgresSink};
use crate::consume::sink::schema::{offset_from_sql, sql_offset};
use crate::log::{Log, LogHistory};
use crate::message::{Offset, now_micros};

/// See [`PostgresSink::put_right`].
pub(super) fn put_right(
    sink: &mut PostgresSink,
    log: &dyn Log,
    log_end: Offset,
) -> Result<Option<String>, PostgresError> {
    let other = |sink: &PostgresSink, why: String| PostgresError::OtherLog {
        schema: sink.config.schema.clone(),
        why,
    };
    let is_ahead = sink.cursor > log_end && !sink.is_shared;
    let newest = sink.connection.query(
        "SELECT log_offset, (extract(epoch FROM received_at) * 1000000)::bigint, key_id FROM (
             (SELECT log_offset, received_at, origin_id FROM entries WHERE log_offset < $1 ORDER BY 1 DESC LIMIT 1)
             UNION ALL
             (SELECT log_offset, received_at, origin_id FROM quarantined WHERE log_offset < $1 ORDER BY 1 DESC LIMIT 1)
         ) n JOIN origins o ON o.id = n.origin_id ORDER BY log_offset DESC LIMIT 1",
        &[&sql_offset(sink.cursor.min(log_end))],
    )?;
    let Some(newest) = newest.first() else {
        return match is_ahead {
            true => Err(other(sink, "the two have no record in common, and the log is behind".to_owned())),
            false => Ok(None),
        };
    };
    let (offset, received_at, key): (i64, i64, String) = (newest.get(0), newest.get(1), newest.get(2));
    let offset = offset_from_sql(offset);
    let batches = log.read(offset, 1).ok().filter(|_| offset >= log.first_offset());
    let record =
        batches.iter().flatten().flat_map(|batch| batch.records()).find(|record| record.offset == offset);
    match record {
        Some(record) if record.received_at != received_at || record.key_id.to_string() != key => {
            return Err(other(sink, format!("they have different records at offset {offset}")));
        }
        None if is_ahead => {
            return Err(other(sink, format!("the record at offset {offset} cannot be compared")));
        }
        _ => {}
    }
    if !is_ahead {
        return Ok(None);
    }
    // As long as its statements may take: a wait that ends earlier would begin all of it again, for ever.
    sink.connection.set_answer_wait_max(super::RECONCILE_WAIT_MAX);
    let said = set_aside(sink, log_end);
    sink.connection.reset_answer_wait_max();
    said.map(Some)
}

/// Sets aside what is stored from where a later epoch of the log has begun. Of the gateways that share the tables the first
/// one does it. Returns what to tell the operator, if there was anything.
///
/// # Errors
/// [`PostgresError`].
pub(super) fn follow_epochs(
    sink: &mut PostgresSink,
    history: &LogHistory,
) -> Result<Option<String>, PostgresError> {
    let now = sql_offset(history.epoch);
    sink.connection.run(&format!(
        "CREATE TABLE IF NOT EXISTS log_epoch (id int PRIMARY KEY CHECK (id = 0), epoch bigint NOT NULL);
         INSERT INTO log_epoch VALUES (0, {now}) ON CONFLICT DO NOTHING"
    ))?;
    let stored = sink.connection.query_one("SELECT epoch FROM log_epoch", &[])?;
    let stored = offset_from_sql(stored.get(0));
    if stored >= history.epoch {
        return Ok(None);
    }
    let end = history.end_since(stored).filter(|end| *end < sink.cursor);
    sink.connection.set_answer_wait_max(super::RECONCILE_WAIT_MAX);
    // A crash in between sets aside once more, and finds nothing.
    let said = end.map(|end| set_aside(sink, end)).transpose();
    sink.connection.reset_answer_wait_max();
    let said = said?;
    sink.connection.run(&format!(
        "UPDATE sink SET withheld_version = 0; UPDATE log_epoch SET epoch = {now} WHERE epoch < {now}"
    ))?;
    sink.forget_rules();
    Ok(said)
}

/// Moves the records from `end` on into tables of their own, and the cursor back to `end`, in one transaction.
fn set_aside(sink: &mut PostgresSink, end: Offset) -> Result<String, PostgresError> {
    let name = format!("set_aside_{}", now_micros() / 1_000_000);
    let from = sql_offset(end);
    let samples_from = match sink.samples_cursor < end {
        true => sink.samples_cursor.to_string(),
        false => "NULL".to_owned(),
    };
    sink.within("BEGIN; SET LOCAL statement_timeout = '15min'", |sink| {
        sink.make_moved()?;
        // Only the one that writes may do that, and it is not known yet who that is.
        let row = sink.connection.query_one("SELECT next_offset FROM sink FOR UPDATE", &[])?;
        if row.get::<_, i64>(0) != sql_offset(sink.cursor) {
            return Err(sink.cursor_moved());
        }
        // Behind the samples that are being committed, which are deleted with the others.
        let reset = sink.connection.execute(
            "UPDATE sample_lane SET next_offset = 0 WHERE next_offset = $1",
            &[&sql_offset(sink.lane_offset)],
        )?;
        if reset != 1 {
            return Err(sink.cursor_moved());
        }
        sink.connection.run(&format!(
            "CREATE TABLE {name}_records AS SELECT * FROM records WHERE log_offset >= {from};
             CREATE TABLE {name}_quarantine AS SELECT * FROM quarantine WHERE log_offset >= {from};
             INSERT INTO moved SELECT log_offset, topic_id FROM entries WHERE log_offset >= {from};
             INSERT INTO moved SELECT log_offset, topic_id FROM quarantined WHERE log_offset >= {from};
             DELETE FROM entries WHERE log_offset >= {from};
             DELETE FROM quarantined WHERE log_offset >= {from};
             DELETE FROM sample_rows WHERE log_offset >= {from};
             DELETE FROM withheld_samples WHERE log_offset >= {from};
             DELETE FROM time_index WHERE first_offset >= {from};
             UPDATE retention SET removed_below = {from} WHERE removed_below > {from};
             UPDATE quarantined SET redriven_offset = NULL WHERE redriven_offset >= {from};
             UPDATE sink SET next_offset = {from}, durable_offset = {from}, samples_from = {samples_from},
                 withheld_version = 0"
        ))?;
        sink.forget_moved_values()?;
        let topics = sink.moved_topics()?;
        sink.forget_empty_topics(&topics)
    })?;
    sink.sizes.clear();
    sink.forget_rules();
    (sink.cursor, sink.lane_offset) = (end, 0);
    sink.samples_cursor = sink.samples_cursor.min(end);
    sink.durable_cursor = sink.cursor();
    let said = format!(
        "the schema {} was ahead of the log, which ends at offset {end}: its records from there on are set aside in the tables \
         {name}_records and {name}_quarantine, and the log gives their offsets anew",
        sink.config.schema
    );
    tracing::warn!("storage: {said}");
    Ok(said)
}
