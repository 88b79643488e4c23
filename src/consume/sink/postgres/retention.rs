//! Retention in PostgreSQL, as in `records.db` ([`crate::consume::sink::retention`]): the oldest records of a datasource go
//! once they are older than its limit, or take more than that, with their samples, a bounded number in each transaction.
//!
//! The gateway that writes does it, over the connection that writes: each transaction asks the row with the cursor whether
//! that still is the one. How much a datasource with a limit in bytes takes is counted in steps when that gateway begins, and
//! then kept in memory.

use std::collections::{BTreeSet, HashMap};

use headgate_bridge_postgres::{PostgresTime, Row};

use super::{PostgresError, PostgresSink};
use crate::consume::sink::retention::{PrunableStore, PruneStep, StoredLimits};
use crate::consume::sink::schema::{TIME_INDEX_OFFSETS, offset_from_sql, sql_offset};
use crate::limits::{
    POSTGRES_COUNT_RECORDS_PER_STEP, POSTGRES_PRUNE_RECORDS_PER_TRANSACTION, PRUNE_ORIGINS_PER_TRANSACTION,
    STORED_NAME_BYTES, STORED_NAMES_FREE_BYTES, STORED_RECORD_BYTES,
};
use crate::message::{DatasourceId, TimeMicros};

/// What a payload takes, in bytes. Records of format 1 do not say.
const PAYLOAD_SIZE_SQL: &str =
    "coalesce(payload_size, octet_length(payload_bytes), octet_length(payload::text), 0)";

/// A stored record that may be removed.
struct RemovableRow {
    offset: i64,
    received_at: TimeMicros,
    bytes: u64,
    topic: i64,
    /// What its topic takes, if nothing else is left of that.
    topic_bytes: u64,
}

/// What the datasources with a limit in bytes take, by the row id of the datasource.
#[derive(Default)]
pub(super) struct CountedSizes(HashMap<i32, CountedSize>);

/// What one takes.
#[derive(Debug, Clone, Copy, Default)]
struct CountedSize {
    bytes: u64,
    /// What its topics and origins take.
    name_bytes: u64,
    /// The first offset that is not counted.
    next: i64,
    /// Everything is counted, and what comes is added as it comes.
    is_whole: bool,
}

impl CountedSizes {
    /// Forgets all: records were moved, by whomever, or a transaction was not committed.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds a record that is stored now.
    #[inline]
    pub(super) fn add(&mut self, datasource: i32, payload_bytes: usize) {
        if !self.0.is_empty()
            && let Some(count) = self.0.get_mut(&datasource)
            && count.is_whole
        {
            count.bytes += payload_bytes as u64 + STORED_RECORD_BYTES;
        }
    }

    /// Adds a topic or a media type that is stored now.
    pub(super) fn add_name(&mut self, datasource: i32, name: &str) {
        if let Some(count) = self.0.get_mut(&datasource).filter(|count| count.is_whole) {
            count.name_bytes += 2 * name.len() as u64 + STORED_NAME_BYTES;
        }
    }

    /// Takes `count` names of these lengths together off what a datasource takes.
    fn subtract_names(&mut self, datasource: i32, count: u64, lengths: u64) {
        if let Some(size) = self.0.get_mut(&datasource).filter(|size| size.is_whole) {
            size.name_bytes = size.name_bytes.saturating_sub(2 * lengths + count * STORED_NAME_BYTES);
        }
    }
}

impl PrunableStore for PostgresSink {
    type Fault = PostgresError;

    fn prune_some(
        &mut self,
        scope: &DatasourceId,
        limits: StoredLimits,
        now: TimeMicros,
    ) -> Result<PruneStep, PostgresError> {
        if self.samples_cursor < self.cursor {
            // Samples that come after their records were removed would stay.
            return Ok(PruneStep::Done);
        }
        let Some(row) = self.row_id_of_scope(scope)? else { return Ok(PruneStep::Done) };
        let (mut over, mut name_bytes) = (0, 0);
        match limits.bytes {
            Some(max) => match self.count_some(row)? {
                Some(count) => {
                    name_bytes = count.name_bytes.saturating_sub(STORED_NAMES_FREE_BYTES);
                    over = count.bytes.saturating_add(name_bytes).saturating_sub(max);
                }
                None => return Ok(PruneStep::More),
            },
            None => drop(self.sizes.0.remove(&row)),
        }
        let records = self.removable(row, (over, name_bytes > 0), limits.age_us, now)?;
        if records.is_empty() {
            return Ok(PruneStep::Done);
        }
        let bytes: u64 = records.iter().map(|record| record.bytes).sum();
        self.within("BEGIN; SET LOCAL synchronous_commit = off", |sink| {
            sink.require_place()?;
            sink.remove_records(row, &records)
        })?;
        if let Some(count) = self.sizes.0.get_mut(&row) {
            count.bytes = count.bytes.saturating_sub(bytes);
        }
        Ok(PruneStep::More)
    }

    fn prune_time_index(&mut self) -> Result<(), PostgresError> {
        let cursor = sql_offset(self.cursor);
        let lines = sql_offset(TIME_INDEX_OFFSETS);
        self.within("BEGIN; SET LOCAL synchronous_commit = off", |sink| {
            sink.require_place()?;
            let row = sink.connection.query_one(
                "SELECT least($1::bigint, (SELECT min(log_offset) FROM entries), (SELECT min(log_offset) FROM quarantined))",
                &[&cursor],
            )?;
            let oldest: i64 = row.get(0);
            sink.connection
                .execute("DELETE FROM time_index WHERE first_offset <= $1", &[&oldest.saturating_sub(lines)])?;
            // Those of one datasource have gone with its records.
            sink.connection.execute(
                "DELETE FROM origins WHERE id IN (
                     SELECT id FROM origins WHERE datasource_id IS NULL AND used_below <= $1 LIMIT $2)",
                &[&oldest, &PRUNE_ORIGINS_PER_TRANSACTION],
            )?;
            Ok(())
        })
    }

    /// Each sample has a row of its own, which goes with its record.
    fn trim_samples_some(&mut self, _: &DatasourceId, _: &str) -> Result<Option<String>, PostgresError> {
        Ok(None)
    }

    /// The server's own vacuum does that.
    fn give_back_some(&mut self) -> Result<bool, PostgresError> {
        Ok(false)
    }
}

impl PostgresSink {
    /// Fails unless this connection still is the one that writes; nobody takes its place before the transaction ends.
    fn require_place(&self) -> Result<(), PostgresError> {
        let held = self.connection.query(
            "SELECT FROM sink WHERE owner = $1 AND owner_pid = pg_backend_pid() FOR SHARE",
            &[&self.name],
        )?;
        match held.is_empty() {
            true => Err(self.cursor_moved()),
            false => Ok(()),
        }
    }

    /// The oldest records of a datasource in both tables, in the order of their offsets.
    fn oldest_records(&self, datasource: i32, count: i64) -> Result<Vec<RemovableRow>, PostgresError> {
        let of = |table: &str| {
            format!(
                "(SELECT log_offset, received_at, ({PAYLOAD_SIZE_SQL})::bigint AS size, topic_id::bigint,
                      (SELECT octet_length(t.topic)::bigint FROM topics t
                       WHERE t.id = topic_id AND t.latest_offset <= log_offset)
                  FROM {table} WHERE datasource_id = $1 ORDER BY log_offset LIMIT $2)"
            )
        };
        let rows = self.connection.query(
            &format!("{} UNION ALL {} ORDER BY log_offset LIMIT $2", of("entries"), of("quarantined")),
            &[&datasource, &count],
        )?;
        let record = |row: &Row| RemovableRow {
            offset: row.get(0),
            received_at: row.get::<_, PostgresTime>(1).0,
            bytes: row.get::<_, i64>(2).unsigned_abs() + STORED_RECORD_BYTES,
            topic: row.get(3),
            topic_bytes: row
                .get::<_, Option<i64>>(4)
                .map_or(0, |text| 2 * text.unsigned_abs() + STORED_NAME_BYTES),
        };
        Ok(rows.iter().map(record).collect())
    }

    /// The records to remove, at most as many as one transaction does: the oldest until `over` bytes are gone, with
    /// `counts_names` those of topics of which nothing is left among them, and those that are older than `age_us`.
    fn removable(
        &self,
        datasource: i32,
        (mut over, counts_names): (u64, bool),
        age_us: Option<i64>,
        now: TimeMicros,
    ) -> Result<Vec<RemovableRow>, PostgresError> {
        let is_old =
            |record: &RemovableRow| age_us.is_some_and(|age| record.received_at < now.saturating_sub(age));
        // Of a clock that was ahead: it is at least as old as what was received after it.
        let is_of_later = |record: &RemovableRow| age_us.is_some() && record.received_at > now;
        if over == 0 {
            // Mostly there is nothing to do.
            let first = self.oldest_records(datasource, 1)?;
            if !first.iter().any(|record| is_old(record) || is_of_later(record)) {
                return Ok(Vec::new());
            }
        }
        let count = POSTGRES_PRUNE_RECORDS_PER_TRANSACTION;
        let mut records = self.oldest_records(datasource, i64::try_from(count).unwrap_or(i64::MAX))?;
        let (mut removable, mut looked_at) = (0, 0);
        for record in &records {
            if over == 0 && !is_old(record) && !is_of_later(record) {
                break;
            }
            looked_at += 1;
            if over > 0 || is_old(record) {
                removable = looked_at;
            }
            over = over.saturating_sub(record.bytes + if counts_names { record.topic_bytes } else { 0 });
        }
        if removable == 0
            && looked_at == count
            && let Some(age) = age_us
        {
            // All are of a clock that was ahead. What is before offsets that are old as a whole is old too.
            let row = self.connection.query_one(
                "SELECT max(first_offset) FROM time_index WHERE newest < $1",
                &[&PostgresTime(now.saturating_sub(age))],
            )?;
            let old_below: Option<i64> = row.get(0);
            removable = records.partition_point(|record| Some(record.offset) < old_below);
        }
        records.truncate(removable);
        Ok(records)
    }

    /// Removes these records of a datasource, its oldest ones, in the present transaction.
    fn remove_records(&mut self, datasource: i32, records: &[RemovableRow]) -> Result<(), PostgresError> {
        let offsets: Vec<i64> = records.iter().map(|record| record.offset).collect();
        let last = offsets.last().copied().unwrap_or(-1);
        for table in ["entries", "quarantined"] {
            let delete = format!("DELETE FROM {table} WHERE datasource_id = $1 AND log_offset <= $2");
            self.connection.execute(&delete, &[&datasource, &last])?;
        }
        for samples in ["sample_rows", "withheld_samples"] {
            let delete = format!("DELETE FROM {samples} WHERE log_offset = ANY($1)");
            self.connection.execute(&delete, &[&offsets])?;
        }
        self.connection.execute(
            "INSERT INTO retention (datasource_id, removed_below) VALUES ($1, $2)
             ON CONFLICT (datasource_id) DO UPDATE
                 SET removed_below = greatest(retention.removed_below, excluded.removed_below)",
            &[&datasource, &last.saturating_add(1)],
        )?;
        let topics: BTreeSet<i64> = records.iter().map(|record| record.topic).collect();
        self.forget_empty_topics(&topics.into_iter().collect::<Vec<_>>())?;
        self.forget_unused_origins(datasource)
    }

    /// Removes the origins that no record of a datasource has any more.
    fn forget_unused_origins(&mut self, datasource: i32) -> Result<(), PostgresError> {
        let oldest = |table: &str| {
            format!(
                "(SELECT log_offset FROM {table} WHERE datasource_id = $1::int ORDER BY log_offset LIMIT 1)"
            )
        };
        let row = self.connection.query_one(
            &format!(
                "WITH oldest AS (SELECT coalesce(least({}, {}), {}) AS log_offset),
                 gone AS (DELETE FROM origins o USING oldest
                     WHERE o.datasource_id = $1::int AND o.used_below <= oldest.log_offset RETURNING o.content_type)
                 SELECT (SELECT log_offset FROM oldest), count(*), coalesce(sum(octet_length(content_type)), 0)::bigint
                 FROM gone",
                oldest("entries"),
                oldest("quarantined"),
                i64::MAX
            ),
            &[&datasource],
        )?;
        let (count, lengths) = (offset_from_sql(row.get(1)), offset_from_sql(row.get(2)));
        if count > 0 {
            self.sizes.subtract_names(datasource, count, lengths);
            self.names.forget_origins(datasource, row.get(0));
        }
        Ok(())
    }

    /// Forgets the newest values of those of the topics that have no record any more that is passed on, and the topics too of
    /// which quarantine has nothing.
    pub(super) fn forget_empty_topics(&mut self, topics: &[i64]) -> Result<(), PostgresError> {
        let rows = self.connection.query(
            "SELECT n.id, q.is_there IS NOT NULL FROM unnest($1::bigint[]) AS n (id)
             LEFT JOIN LATERAL (SELECT true AS is_there FROM quarantined q WHERE q.topic_id = n.id LIMIT 1) q ON true
             WHERE NOT EXISTS (SELECT FROM entries e WHERE e.topic_id = n.id)",
            &[&topics],
        )?;
        if rows.is_empty() {
            return Ok(());
        }
        let empty: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
        self.connection.execute("DELETE FROM latest_values WHERE topic_id = ANY($1::bigint[])", &[&empty])?;
        let (hidden, gone): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row.get(1));
        let [hidden, gone] =
            [hidden, gone].map(|rows: Vec<&Row>| rows.iter().map(|row| row.get(0)).collect::<Vec<i64>>());
        if !hidden.is_empty() {
            self.connection
                .execute("UPDATE topics SET latest_offset = -1 WHERE id = ANY($1::bigint[])", &[&hidden])?;
        }
        if !gone.is_empty() {
            self.connection.execute("DELETE FROM key_sets WHERE topic_id = ANY($1::bigint[])", &[&gone])?;
            let rows = self
                .connection
                .query("DELETE FROM topics WHERE id = ANY($1::bigint[]) RETURNING datasource_id, octet_length(topic)", &[&gone])?;
            for row in &rows {
                self.sizes.subtract_names(row.get(0), 1, u64::from(row.get::<_, i32>(1).unsigned_abs()));
            }
            let datasources = rows.iter().map(|row| row.get(0)).collect();
            self.names.forget_topics(&datasources, &gone.into_iter().collect());
        }
        Ok(())
    }

    /// What a datasource takes; `None` after a step that has not counted all of it.
    fn count_some(&mut self, datasource: i32) -> Result<Option<CountedSize>, PostgresError> {
        let mut count = self.sizes.0.get(&datasource).copied().unwrap_or_default();
        if count.is_whole {
            return Ok(Some(count));
        }
        let limit = POSTGRES_COUNT_RECORDS_PER_STEP;
        let of = |table: &str| {
            format!(
                "(SELECT log_offset, ({PAYLOAD_SIZE_SQL})::bigint AS size FROM {table}
                  WHERE datasource_id = $1 AND log_offset >= $2 ORDER BY log_offset LIMIT $3)"
            )
        };
        let row = self.connection.query_one(
            &format!(
                "SELECT count(*), coalesce(sum(size), 0)::bigint, coalesce(max(log_offset), -1) FROM (
                     {} UNION ALL {} ORDER BY log_offset LIMIT $3) r",
                of("entries"),
                of("quarantined")
            ),
            &[&datasource, &count.next, &limit],
        )?;
        let (records, bytes, last): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
        count.bytes += offset_from_sql(bytes) + offset_from_sql(records) * STORED_RECORD_BYTES;
        count.next = count.next.max(last.saturating_add(1));
        // Whoever counts is the one that stores: nothing has come in meanwhile.
        count.is_whole = records < limit;
        if count.is_whole {
            count.name_bytes = self.count_names(datasource)?;
        }
        self.sizes.0.insert(datasource, count);
        Ok(count.is_whole.then_some(count))
    }

    /// What the topics and origins of a datasource take.
    fn count_names(&self, datasource: i32) -> Result<u64, PostgresError> {
        let row = self.connection.query_one(
            "SELECT count(*), coalesce(sum(octet_length(name)), 0)::bigint FROM (
                 SELECT topic AS name FROM topics WHERE datasource_id = $1
                 UNION ALL SELECT content_type FROM origins WHERE datasource_id = $1) n",
            &[&datasource],
        )?;
        let (count, lengths) = (offset_from_sql(row.get(0)), offset_from_sql(row.get(1)));
        Ok(2 * lengths + count * STORED_NAME_BYTES)
    }
}
