//! Retention of what is stored: the oldest records of a datasource are removed from `records.db`, whatever the log still
//! has, once they are older than its limit, or take more than that.
//!
//! What names take, which senders invent, counts too: topics and origins (key, transport and media type of a record) go with
//! the last record that has them. Below which offset an origin is used is noted seldom ([`super::origins`]).
//!
//! Each transaction removes a bounded number, the oldest first, in quarantine or not. A topic of which nothing is left goes;
//! one of which quarantine alone has something loses its newest values. What is removed stays known: `retention` says below
//! which offset. The rules about leaked keys and incarnations are followed by what is left, and an incarnation that has ended
//! is kept until it is purged.
//!
//! How much a datasource with a limit in bytes takes is counted once, in steps, and then kept up to date in the
//! transactions that store and remove; whatever else moves records makes it be counted anew.
//!
//! Removed records leave free pages, which later ones use. A database that was made with `auto_vacuum` gives most of them
//! back to the file system; an older one keeps its size until somebody vacuums it.

mod sizes;

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

use super::incarnations::row_id_of_scope;
use super::insert::note_gap;
use super::samples;
use super::schema::{TIME_INDEX_OFFSETS, offset_from_sql, sql_offset};
use super::sqlite::{SinkError, SqliteSink};
use crate::limits::{
    FREE_PAGES_KEPT, PRUNE_ORIGINS_PER_TRANSACTION, PRUNE_PAGES_PER_TRANSACTION,
    PRUNE_RECORDS_PER_TRANSACTION, STORED_NAME_BYTES, STORED_NAMES_FREE_BYTES, STORED_RECORD_BYTES,
    TRIM_TOPICS_PER_TRANSACTION,
};
use crate::message::{DatasourceId, Offset, TimeMicros};

pub(super) use self::sizes::StoredSizes;

/// What may stay stored of a datasource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoredLimits {
    /// How old a record may be, in microseconds since it was received.
    pub age_us: Option<i64>,
    /// What all records may take together: their payloads, [`STORED_RECORD_BYTES`] for each, and their topics and media
    /// types beyond [`STORED_NAMES_FREE_BYTES`].
    pub bytes: Option<u64>,
}

/// What a step of retention has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PruneStep {
    /// Something was removed or counted, and there may be more to do.
    More,
    /// Nothing is over the limits.
    Done,
}

/// A store whose oldest records can be removed. Each call is at most one short transaction.
pub(in crate::consume) trait PrunableStore {
    /// Why that was not possible.
    type Fault;

    /// Removes some of what is stored of an incarnation and is over its limits at `now`, or counts some of what it takes.
    fn prune_some(
        &mut self,
        scope: &DatasourceId,
        limits: StoredLimits,
        now: TimeMicros,
    ) -> Result<PruneStep, Self::Fault>;

    /// Forgets for which times the log's offsets stand that nothing is stored of any more.
    fn prune_time_index(&mut self) -> Result<(), Self::Fault>;

    /// Takes out samples that were left behind by what was removed of an incarnation, of the next topics after
    /// `after_topic`. Returns the last of these topics, if there are more.
    fn trim_samples_some(
        &mut self,
        scope: &DatasourceId,
        after_topic: &str,
    ) -> Result<Option<String>, Self::Fault>;

    /// Gives some room back to the file system. Returns whether there is more to give.
    fn give_back_some(&mut self) -> Result<bool, Self::Fault>;
}

impl PrunableStore for SqliteSink {
    type Fault = SinkError;

    fn prune_some(
        &mut self,
        scope: &DatasourceId,
        limits: StoredLimits,
        now: TimeMicros,
    ) -> Result<PruneStep, SinkError> {
        SqliteSink::prune_some(self, scope, limits, now)
    }

    fn prune_time_index(&mut self) -> Result<(), SinkError> {
        SqliteSink::prune_time_index(self)
    }

    fn trim_samples_some(
        &mut self,
        scope: &DatasourceId,
        after_topic: &str,
    ) -> Result<Option<String>, SinkError> {
        SqliteSink::trim_samples_some(self, scope, after_topic)
    }

    fn give_back_some(&mut self) -> Result<bool, SinkError> {
        SqliteSink::give_back_some(self)
    }
}

/// A stored record that may be removed.
struct OldRecord {
    offset: i64,
    bytes: u64,
    topic: i64,
}

/// The oldest records of a datasource in both tables, in the order of their offsets.
const OLDEST_SQL: &str = "SELECT r.offset, r.received_us, octet_length(r.payload), r.topic_id,
         iif(t.latest_offset <= r.offset, 2 * octet_length(t.topic), -1)
     FROM entries r LEFT JOIN topics t ON t.id = r.topic_id WHERE r.datasource_id = ?1
     UNION ALL SELECT r.offset, r.received_us, octet_length(r.payload), r.topic_id,
         iif(t.latest_offset <= r.offset, 2 * octet_length(t.topic), -1)
     FROM quarantined r LEFT JOIN topics t ON t.id = r.topic_id WHERE r.datasource_id = ?1
     ORDER BY 1 LIMIT ?2";

impl SqliteSink {
    /// Removes some of what is stored of an incarnation and is over its limits at `now`, or counts some of what it takes.
    ///
    /// # Errors
    /// As [`SqliteSink::store`].
    pub fn prune_some(
        &mut self,
        scope: &DatasourceId,
        limits: StoredLimits,
        now: TimeMicros,
    ) -> Result<PruneStep, SinkError> {
        self.forget_uncertain();
        let pruned = self.prune_within(scope, limits, now);
        if pruned.is_err() {
            self.clear_remembered();
        }
        pruned.map_err(|error| self.database_error(&error))
    }

    fn prune_within(
        &mut self,
        scope: &DatasourceId,
        limits: StoredLimits,
        now: TimeMicros,
    ) -> rusqlite::Result<PruneStep> {
        let Some(row) = row_id_of_scope(self.connection(), scope)? else { return Ok(PruneStep::Done) };
        let (mut over, mut name_bytes) = (0, 0);
        match limits.bytes {
            Some(max) => {
                let cursor = sql_offset(self.cursor());
                let (connection, sizes) = self.connection_and_sizes();
                let Some(bytes) = sizes.count_some(connection, row, cursor)? else {
                    return Ok(PruneStep::More);
                };
                name_bytes = read_name_bytes(connection, row)?.saturating_sub(STORED_NAMES_FREE_BYTES);
                over = bytes.saturating_add(name_bytes).saturating_sub(max);
            }
            None => self.connection_and_sizes().1.forget(row),
        }
        let records = removable(self.connection(), row, (over, name_bytes > 0), limits.age_us, now)?;
        let Some(last) = records.last().map(|record| record.offset) else { return Ok(PruneStep::Done) };
        let bytes = records.iter().map(|record| record.bytes).sum();
        let topics: BTreeSet<i64> = records.iter().map(|record| record.topic).collect();

        let (connection, sizes) = self.connection_and_sizes();
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        remove_up_to(&transaction, row, last)?;
        for topic in &topics {
            samples::remove_up_to(&transaction, *topic, last)?;
        }
        let mut empty = Vec::new();
        for topic in &topics {
            empty.extend(forget_if_empty(&transaction, *topic)?);
        }
        let unused_below = forget_unused_origins(&transaction, row)?;
        if limits.bytes.is_none() {
            // What is removed now is not subtracted.
            transaction.execute("DELETE FROM stored_sizes WHERE datasource_id = ?1", [row])?;
        }
        sizes.subtract(row, bytes);
        sizes.write(&transaction)?;
        transaction.commit()?;
        self.forget_topics(row, &empty);
        if let Some(below) = unused_below {
            self.forget_origins(row, below);
        }
        Ok(PruneStep::More)
    }

    /// Takes out samples of what was removed of an incarnation that are in one chunk with samples of later records, of the
    /// next topics after `after_topic`. Returns the last of these topics, if there are more.
    ///
    /// # Errors
    /// As [`SqliteSink::store`].
    pub fn trim_samples_some(
        &mut self,
        scope: &DatasourceId,
        after_topic: &str,
    ) -> Result<Option<String>, SinkError> {
        let trimmed = self.trim_samples(scope, after_topic);
        trimmed.map_err(|error| self.database_error(&error))
    }

    fn trim_samples(&mut self, scope: &DatasourceId, after_topic: &str) -> rusqlite::Result<Option<String>> {
        let Some(row) = row_id_of_scope(self.connection(), scope)? else { return Ok(None) };
        let Some(below) = read_removed_below(self.connection(), row)? else { return Ok(None) };
        let connection = self.connection_mut();
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let topics = transaction
            .prepare_cached(
                "SELECT id, topic FROM topics WHERE datasource_id = ?1 AND topic > ?2 ORDER BY topic LIMIT ?3",
            )?
            .query_map(params![row, after_topic, TRIM_TOPICS_PER_TRANSACTION], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })?
            .collect::<rusqlite::Result<Vec<(i64, String)>>>()?;
        for (topic, _) in &topics {
            samples::trim_up_to(&transaction, *topic, sql_offset(below) - 1)?;
        }
        transaction.commit()?;
        Ok(topics.into_iter().next_back().map(|(_, name)| name))
    }

    /// Forgets for which times the log's offsets stand that nothing is stored of any more.
    ///
    /// # Errors
    /// As [`SqliteSink::store`].
    pub fn prune_time_index(&mut self) -> Result<(), SinkError> {
        let pruned = prune_below_oldest(self.connection(), sql_offset(self.cursor()));
        pruned.map_err(|error| self.database_error(&error))
    }

    /// Gives some free pages back to the file system. Returns whether there are more to give: some stay for the next
    /// records.
    ///
    /// # Errors
    /// As [`SqliteSink::store`].
    pub fn give_back_some(&mut self) -> Result<bool, SinkError> {
        give_back_pages(self.connection()).map_err(|error| self.database_error(&error))
    }
}

/// The records to remove, at most as many as one transaction does: the oldest until `over` bytes are gone, with
/// `counts_names` those of topics of which nothing is left among them, and those that are older than `age_us`.
fn removable(
    connection: &Connection,
    datasource: i64,
    (mut over, counts_names): (u64, bool),
    age_us: Option<i64>,
    now: TimeMicros,
) -> rusqlite::Result<Vec<OldRecord>> {
    let mut records: Vec<OldRecord> = Vec::new();
    let mut removable = 0;
    let mut oldest = connection.prepare_cached(OLDEST_SQL)?;
    let mut rows =
        oldest.query([datasource, i64::try_from(PRUNE_RECORDS_PER_TRANSACTION).unwrap_or(i64::MAX)])?;
    while let Some(row) = rows.next()? {
        let bytes = row.get::<_, i64>(2)?.unsigned_abs() + STORED_RECORD_BYTES;
        let (offset, received_at, topic): (i64, TimeMicros, i64) = (row.get(0)?, row.get(1)?, row.get(3)?);
        let is_old = age_us.is_some_and(|age| received_at < now.saturating_sub(age));
        // Of a clock that was ahead: it is at least as old as what was received after it.
        let is_of_later = age_us.is_some() && received_at > now;
        if over == 0 && !is_old && !is_of_later {
            break;
        }
        let topic_bytes = u64::try_from(row.get::<_, i64>(4)?).map_or(0, |text| text + STORED_NAME_BYTES);
        records.push(OldRecord { offset, bytes, topic });
        if over > 0 || is_old {
            removable = records.len();
        }
        over = over.saturating_sub(bytes + if counts_names { topic_bytes } else { 0 });
    }
    if removable == 0
        && records.len() == PRUNE_RECORDS_PER_TRANSACTION
        && let Some(age) = age_us
    {
        // All are of a clock that was ahead. What is before offsets that are old as a whole is old too.
        let old_below: Option<i64> = connection
            .prepare_cached("SELECT max(first_offset) FROM time_index WHERE newest_us < ?1")?
            .query_row([now.saturating_sub(age)], |row| row.get(0))?;
        removable = records.partition_point(|record| Some(record.offset) < old_below);
    }
    records.truncate(removable);
    Ok(records)
}

/// What the topics and origins of a datasource take.
fn read_name_bytes(connection: &Connection, datasource: i64) -> rusqlite::Result<u64> {
    connection
        .prepare_cached("SELECT name_bytes FROM datasources WHERE id = ?1")?
        .query_row([datasource], |row| row.get(0).map(offset_from_sql))
}

/// Removes the origins that no record of a datasource has any more. Returns below which offset alone they were used, if
/// there were any.
fn forget_unused_origins(connection: &Connection, datasource: i64) -> rusqlite::Result<Option<i64>> {
    let mut oldest = i64::MAX;
    for table in ["entries", "quarantined"] {
        let select = format!("SELECT offset FROM {table} WHERE datasource_id = ?1 ORDER BY offset LIMIT 1");
        let offset =
            connection.prepare_cached(&select)?.query_row([datasource], |row| row.get(0)).optional()?;
        oldest = oldest.min(offset.unwrap_or(i64::MAX));
    }
    let removed = connection
        .prepare_cached("DELETE FROM origins WHERE datasource_id = ?1 AND used_below <= ?2")?
        .execute([datasource, oldest])?;
    Ok((removed > 0).then_some(oldest))
}

/// Forgets for which times offsets stand that nothing is stored of any more, and origins that no record can have.
fn prune_below_oldest(connection: &Connection, cursor: i64) -> rusqlite::Result<()> {
    let oldest: i64 = connection.query_row(
        "SELECT min(?1, coalesce((SELECT min(offset) FROM entries), ?1),
             coalesce((SELECT min(offset) FROM quarantined), ?1))",
        [cursor],
        |row| row.get(0),
    )?;
    connection.execute(
        "DELETE FROM time_index WHERE first_offset <= ?1",
        [oldest.saturating_sub(sql_offset(TIME_INDEX_OFFSETS))],
    )?;
    connection.execute("DELETE FROM marks WHERE offset < (SELECT whole_from FROM cursor)", [])?;
    // Those of one datasource have gone with its records.
    connection.execute(
        "DELETE FROM origins WHERE id IN (
             SELECT id FROM origins WHERE datasource_id IS NULL AND used_below <= ?1 LIMIT ?2)",
        [oldest, PRUNE_ORIGINS_PER_TRANSACTION],
    )?;
    Ok(())
}

/// Removes everything of a datasource up to the offset `last`, and notes that.
fn remove_up_to(connection: &Connection, datasource: i64, last: i64) -> rusqlite::Result<()> {
    for delete in [
        "DELETE FROM entries WHERE datasource_id = ?1 AND offset <= ?2",
        "DELETE FROM quarantined WHERE datasource_id = ?1 AND offset <= ?2",
    ] {
        connection.prepare_cached(delete)?.execute([datasource, last])?;
    }
    note_gap(connection, last.saturating_add(1))?;
    connection
        .prepare_cached(
            "INSERT INTO retention (datasource_id, removed_below) VALUES (?1, ?2)
             ON CONFLICT DO UPDATE SET removed_below = max(removed_below, excluded.removed_below)",
        )?
        .execute([datasource, last.saturating_add(1)])?;
    Ok(())
}

/// A topic that has no record any more that is passed on, and so no newest values.
pub(super) struct EmptyTopic {
    pub(super) name: String,
    /// Its row id, if its row is gone too.
    pub(super) gone: Option<i64>,
}

/// Forgets the newest values and samples of a topic if it has no record that is passed on, and the topic too unless
/// quarantine has something of it. Returns it then.
pub(super) fn forget_if_empty(connection: &Connection, topic: i64) -> rusqlite::Result<Option<EmptyTopic>> {
    let has_rows = |table| {
        connection
            .prepare_cached(&format!("SELECT EXISTS (SELECT 1 FROM {table} WHERE topic_id = ?1)"))?
            .query_row([topic], |row| row.get::<_, bool>(0))
    };
    if has_rows("entries")? {
        return Ok(None);
    }
    connection.prepare_cached("DELETE FROM latest_values WHERE topic_id = ?1")?.execute([topic])?;
    connection.prepare_cached("DELETE FROM sample_chunks WHERE topic_id = ?1")?.execute([topic])?;
    let (change, gone) = match has_rows("quarantined")? {
        // -1 is no record's offset, and a topic without records is not shown.
        true => ("UPDATE topics SET latest_offset = -1 WHERE id = ?1 RETURNING topic", None),
        false => ("DELETE FROM topics WHERE id = ?1 RETURNING topic", Some(topic)),
    };
    let name = connection.prepare_cached(change)?.query_row([topic], |row| row.get(0)).optional()?;
    Ok(name.map(|name| EmptyTopic { name, gone }))
}

/// The offset below which everything of a datasource was removed, if something was.
pub(in crate::consume) fn read_removed_below(
    connection: &Connection,
    datasource: i64,
) -> rusqlite::Result<Option<Offset>> {
    connection
        .prepare_cached("SELECT removed_below FROM retention WHERE datasource_id = ?1")?
        .query_row([datasource], |row| row.get(0).map(offset_from_sql))
        .optional()
}

/// Makes what is known of sizes be counted anew, in the transaction that moves records.
pub(super) fn forget_sizes(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute("DELETE FROM stored_sizes", []).map(drop)
}

fn give_back_pages(connection: &Connection) -> rusqlite::Result<bool> {
    let number = |pragma| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    const INCREMENTAL: i64 = 2;
    if number("auto_vacuum")? != INCREMENTAL {
        return Ok(false);
    }
    let (pages, free) = (number("page_count")?, number("freelist_count")?);
    // A database that grows again does not shrink first.
    let over = free - FREE_PAGES_KEPT.max(pages / 16);
    if over <= 0 {
        return Ok(false);
    }
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    // Each step of the statement frees one page.
    let count = over.min(PRUNE_PAGES_PER_TRANSACTION);
    let mut vacuum = connection.prepare(&format!("PRAGMA incremental_vacuum({count})"))?;
    let mut steps = vacuum.query([])?;
    while steps.next()?.is_some() {}
    if over > count {
        return Ok(true);
    }
    // The file becomes shorter when the write-ahead log is copied into it.
    connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))?;
    Ok(false)
}

#[cfg(test)]
mod tests;
