//! Retention of what is stored: the oldest records of a datasource are removed from `records.db`, whatever the log still
//! has, once they are older than its limit, or take more than that.
//!
//! Each transaction removes a bounded number, the oldest first, in quarantine or not. A topic of which nothing is left loses
//! its newest values. What is removed stays known: `retention` says below which offset. The rules about leaked keys and
//! incarnations are followed by what is left, and an incarnation that has ended is kept until it is purged.
//!
//! How much a datasource with a limit in bytes takes is counted once, in steps, and then kept up to date in the
//! transactions that store and remove; whatever else moves records makes it be counted anew.
//!
//! Removed records leave free pages, which later ones use. A database that was made with `auto_vacuum` gives most of them
//! back to the file system; an older one keeps its size until somebody vacuums it.

use std::collections::{BTreeSet, HashMap};

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

use super::incarnations::row_id_of_scope;
use super::samples;
use super::schema::{TIME_INDEX_OFFSETS, offset_from_sql, sql_offset};
use super::sqlite::{SinkError, SqliteSink};
use crate::limits::{
    FREE_PAGES_KEPT, PRUNE_PAGES_PER_TRANSACTION, PRUNE_RECORDS_PER_TRANSACTION, STORED_RECORD_BYTES,
    TRIM_TOPICS_PER_TRANSACTION,
};
use crate::message::{DatasourceId, Offset, TimeMicros};

/// What may stay stored of a datasource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoredLimits {
    /// How old a record may be, in microseconds since it was received.
    pub age_us: Option<i64>,
    /// What all records may take together: their payloads, and [`STORED_RECORD_BYTES`] for each.
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
const OLDEST_SQL: &str = "SELECT offset, received_us, octet_length(payload), topic_id FROM entries
     WHERE datasource_id = ?1
     UNION ALL SELECT offset, received_us, octet_length(payload), topic_id FROM quarantined
     WHERE datasource_id = ?1 ORDER BY offset LIMIT ?2";

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
        let mut over = 0;
        match limits.bytes {
            Some(max) => {
                let cursor = sql_offset(self.cursor());
                let (connection, sizes) = self.connection_and_sizes();
                match sizes.count_some(connection, row, cursor)? {
                    Some(bytes) => over = bytes.saturating_sub(max),
                    None => return Ok(PruneStep::More),
                }
            }
            None => self.connection_and_sizes().1.forget(row),
        }
        let records = removable(self.connection(), row, over, limits.age_us, now)?;
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
        let forgotten = forget_empty_topics(&transaction, row, &topics)?;
        if limits.bytes.is_none() {
            // What is removed now is not subtracted.
            transaction.execute("DELETE FROM stored_sizes WHERE datasource_id = ?1", [row])?;
        }
        sizes.subtract(row, bytes);
        sizes.write(&transaction)?;
        transaction.commit()?;
        match forgotten {
            ForgottenTopics::None => {}
            ForgottenTopics::Hidden => self.clear_board(),
            ForgottenTopics::Gone => self.clear_remembered(),
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
        let cursor = sql_offset(self.cursor());
        let removed = self.connection().execute(
            "DELETE FROM time_index WHERE first_offset <= min(?2, coalesce((SELECT min(offset) FROM entries), ?2),
                 coalesce((SELECT min(offset) FROM quarantined), ?2)) - ?1",
            params![sql_offset(TIME_INDEX_OFFSETS), cursor],
        );
        removed.map(drop).map_err(|error| self.database_error(&error))
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

/// The records to remove, at most as many as one transaction does: the oldest until `over` bytes are gone, and those
/// that are older than `age_us`.
fn removable(
    connection: &Connection,
    datasource: i64,
    mut over: u64,
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
        records.push(OldRecord { offset, bytes, topic });
        if over > 0 || is_old {
            removable = records.len();
        }
        over = over.saturating_sub(bytes);
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

/// Removes everything of a datasource up to the offset `last`, and notes that.
fn remove_up_to(connection: &Connection, datasource: i64, last: i64) -> rusqlite::Result<()> {
    for delete in [
        "DELETE FROM entries WHERE datasource_id = ?1 AND offset <= ?2",
        "DELETE FROM quarantined WHERE datasource_id = ?1 AND offset <= ?2",
    ] {
        connection.prepare_cached(delete)?.execute([datasource, last])?;
    }
    connection
        .prepare_cached(
            "INSERT INTO retention (datasource_id, removed_below) VALUES (?1, ?2)
             ON CONFLICT DO UPDATE SET removed_below = max(removed_below, excluded.removed_below)",
        )?
        .execute([datasource, last.saturating_add(1)])?;
    Ok(())
}

/// What has become of the topics of removed records.
#[derive(PartialEq, Eq)]
enum ForgottenTopics {
    /// All have records.
    None,
    /// Some have none, and so no newest values.
    Hidden,
    /// Some are gone, with their row ids.
    Gone,
}

/// Forgets the newest values of those of the topics that have no record any more, and the topics too unless quarantine may
/// name them.
fn forget_empty_topics(
    connection: &Connection,
    datasource: i64,
    topics: &BTreeSet<i64>,
) -> rusqlite::Result<ForgottenTopics> {
    let has_quarantine: bool = connection
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM quarantined WHERE datasource_id = ?1)")?
        .query_row([datasource], |row| row.get(0))?;
    let mut is_used =
        connection.prepare_cached("SELECT EXISTS (SELECT 1 FROM entries WHERE topic_id = ?1)")?;
    let mut forget_values = connection.prepare_cached("DELETE FROM latest_values WHERE topic_id = ?1")?;
    let mut forget_samples = connection.prepare_cached("DELETE FROM sample_chunks WHERE topic_id = ?1")?;
    let mut hide = connection.prepare_cached("UPDATE topics SET latest_offset = -1 WHERE id = ?1")?;
    let mut forget = connection.prepare_cached("DELETE FROM topics WHERE id = ?1")?;
    let mut forgotten = ForgottenTopics::None;
    for topic in topics {
        if is_used.query_row([topic], |row| row.get(0))? {
            continue;
        }
        forget_values.execute([topic])?;
        forget_samples.execute([topic])?;
        if has_quarantine {
            hide.execute([topic])?;
            forgotten = ForgottenTopics::Hidden;
        } else {
            forget.execute([topic])?;
            forgotten = ForgottenTopics::Gone;
        }
    }
    Ok(forgotten)
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

/// What the datasources with a limit in bytes take, by the row id of the datasource.
#[derive(Default)]
pub(super) struct StoredSizes(HashMap<i64, SizeCount>);

/// What one takes.
#[derive(Debug, Clone, Copy)]
struct SizeCount {
    bytes: u64,
    /// The first offset that is not counted.
    next: i64,
    /// Everything is counted, and what comes is added as it comes.
    is_whole: bool,
    is_changed: bool,
}

impl StoredSizes {
    /// Forgets what was not written: a transaction was not committed.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    fn forget(&mut self, datasource: i64) {
        self.0.remove(&datasource);
    }

    /// Adds a record that is stored now.
    #[inline]
    pub(super) fn add(&mut self, datasource: i64, offset: i64, payload_bytes: usize) {
        if !self.0.is_empty()
            && let Some(count) = self.0.get_mut(&datasource)
            && count.is_whole
        {
            count.bytes += payload_bytes as u64 + STORED_RECORD_BYTES;
            count.next = offset + 1;
            count.is_changed = true;
        }
    }

    fn subtract(&mut self, datasource: i64, bytes: u64) {
        if let Some(count) = self.0.get_mut(&datasource) {
            count.bytes = count.bytes.saturating_sub(bytes);
            count.is_changed = true;
        }
    }

    /// Writes what has changed, in the transaction that `connection` is in.
    pub(super) fn write(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        for (datasource, count) in self.0.iter_mut().filter(|(_, count)| count.is_changed) {
            connection
                .prepare_cached(
                    "INSERT INTO stored_sizes (datasource_id, bytes, next_offset) VALUES (?1, ?2, ?3)
                     ON CONFLICT DO UPDATE SET bytes = excluded.bytes, next_offset = excluded.next_offset",
                )?
                .execute(params![datasource, i64::try_from(count.bytes).unwrap_or(i64::MAX), count.next])?;
            count.is_changed = false;
        }
        Ok(())
    }

    /// What a datasource takes; `None` after a step that has not counted all of it, up to `cursor`.
    fn count_some(
        &mut self,
        connection: &Connection,
        datasource: i64,
        cursor: i64,
    ) -> rusqlite::Result<Option<u64>> {
        let count = match self.0.get_mut(&datasource) {
            Some(count) if count.is_whole => return Ok(Some(count.bytes)),
            Some(count) => count,
            None => self.0.entry(datasource).or_insert(read_count(connection, datasource)?),
        };
        let mut select = connection.prepare_cached(
            "SELECT offset, octet_length(payload) FROM entries WHERE datasource_id = ?1 AND offset >= ?2
             UNION ALL SELECT offset, octet_length(payload) FROM quarantined
             WHERE datasource_id = ?1 AND offset >= ?2 ORDER BY offset LIMIT ?3",
        )?;
        let most = i64::try_from(10 * PRUNE_RECORDS_PER_TRANSACTION).unwrap_or(i64::MAX);
        let mut rows = select.query([datasource, count.next, most])?;
        let mut left = most;
        while let Some(row) = rows.next()? {
            count.bytes += row.get::<_, i64>(1)?.unsigned_abs() + STORED_RECORD_BYTES;
            count.next = row.get::<_, i64>(0)? + 1;
            left -= 1;
        }
        count.is_changed = true;
        if left == 0 {
            return Ok(None);
        }
        (count.next, count.is_whole) = (count.next.max(cursor), true);
        Ok(Some(count.bytes))
    }
}

fn read_count(connection: &Connection, datasource: i64) -> rusqlite::Result<SizeCount> {
    let known = connection
        .prepare_cached("SELECT bytes, next_offset FROM stored_sizes WHERE datasource_id = ?1")?
        .query_row([datasource], |row| Ok((row.get::<_, i64>(0)?.unsigned_abs(), row.get(1)?)))
        .optional()?;
    let (bytes, next) = known.unwrap_or((0, 0));
    Ok(SizeCount { bytes, next, is_whole: false, is_changed: false })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::consume::sink::sqlite::RECORDS_FILE_NAME;
    use crate::consume::testing::{EPOCH, record};
    use crate::log::{IncarnationStep, WithheldChange, WithheldRules};
    use crate::message::{KeyId, RecordFlags, RecordRef};

    const SECOND: i64 = 1_000_000;
    const AGED: StoredLimits = StoredLimits { age_us: Some(60 * SECOND), bytes: None };

    fn press() -> DatasourceId {
        DatasourceId::new("press-4").expect("a slug")
    }

    fn open(dir: &Path) -> SqliteSink {
        SqliteSink::open(&dir.join(RECORDS_FILE_NAME)).expect("opens")
    }

    fn at(offset: Offset, seconds: i64) -> RecordRef<'static> {
        RecordRef { received_at: EPOCH + seconds * SECOND, ..record(offset, "press-4", "a", b"12345678") }
    }

    fn store(sink: &mut SqliteSink, records: &[RecordRef<'static>]) {
        let next = records.last().map_or(0, |record| record.offset + 1);
        sink.store(records.iter().copied(), next, false).expect("stored");
    }

    fn prune(sink: &mut SqliteSink, limits: StoredLimits, seconds: i64) {
        while sink.prune_some(&press(), limits, EPOCH + seconds * SECOND).expect("pruned") == PruneStep::More
        {
        }
    }

    fn offsets(sink: &SqliteSink) -> Vec<i64> {
        let sql = "SELECT offset FROM entries UNION ALL SELECT offset FROM quarantined ORDER BY 1";
        let mut select = sink.connection().prepare(sql).expect("reads");
        let rows = select.query_map([], |row| row.get(0)).expect("reads");
        rows.map(|row| row.expect("reads")).collect()
    }

    fn counted(sink: &SqliteSink) -> Option<i64> {
        let sql = "SELECT bytes FROM stored_sizes";
        sink.connection().query_row(sql, [], |row| row.get(0)).optional().expect("reads")
    }

    #[test]
    fn what_is_older_goes_and_a_clock_that_was_wrong_takes_nothing_young_with_it() {
        // Behind, before it was set: 3 and 4. Ahead for a while: 6 and 7.
        let times = [0, 10, 20, -900_000, -900_000, 30, 5_000, 5_001, 40, 50];
        let records: Vec<_> = (0..).zip(times).map(|(offset, seconds)| at(offset, seconds)).collect();
        for (now, left) in [
            (60, (0..10).collect::<Vec<i64>>()),
            (71, (2..10).collect()),
            (81, (5..10).collect()),
            // What is of a later time may be as young as what comes behind it.
            (91, (6..10).collect()),
            (101, (9..10).collect()),
            (200, vec![]),
        ] {
            let dir = tempfile::tempdir().expect("temporary directory");
            let mut sink = open(dir.path());
            store(&mut sink, &records);
            prune(&mut sink, AGED, now);
            assert_eq!(offsets(&sink), left, "after {now} s");
        }
    }

    #[test]
    fn the_bytes_are_counted_once_and_kept_up_to_date_whatever_happens() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = open(dir.path());
        let quarantined = RecordRef { flags: RecordFlags::QUARANTINED, ..at(2, 2) };
        store(&mut sink, &[at(0, 0), at(1, 1), quarantined, at(3, 3)]);
        let limits = |records: u64| StoredLimits { age_us: None, bytes: Some(72 * records) };
        prune(&mut sink, limits(3), 9);
        assert_eq!((offsets(&sink), counted(&sink)), (vec![1, 2, 3], Some(3 * 72)));
        // What comes in is added, what is refused by the cursor is not.
        let more = [at(3, 3), at(4, 4), at(5, 5)];
        sink.store(more.into_iter(), 6, false).expect("stored");
        assert_eq!(counted(&sink), Some(5 * 72));
        drop(sink);
        let mut sink = open(dir.path());
        prune(&mut sink, limits(2), 9);
        assert_eq!((offsets(&sink), counted(&sink)), (vec![4, 5], Some(2 * 72)), "quarantine too");
        // A change of the rules moves records: it is counted anew.
        let rules = WithheldRules::default();
        let keys = [KeyId([0x0a; 6])].into();
        rules.push(WithheldChange::Incarnation(press(), 1, IncarnationStep::Ended { keys, end: 5 }));
        sink.reconcile(&rules).expect("reconciled");
        assert_eq!(counted(&sink), None);
        store(&mut sink, &[at(6, 6)]);
        prune(&mut sink, limits(2), 9);
        assert_eq!((offsets(&sink), counted(&sink)), (vec![5, 6], Some(2 * 72)));
        // What another limit removes in between is not counted any more.
        store(&mut sink, &[at(7, 7), at(8, 8)]);
        prune(&mut sink, AGED, 67);
        assert_eq!((offsets(&sink), counted(&sink)), (vec![7, 8], None));
        prune(&mut sink, limits(2), 67);
        assert_eq!(offsets(&sink), [7, 8]);
        // One byte less is one record less.
        prune(&mut sink, StoredLimits { age_us: None, bytes: Some(2 * 72 - 1) }, 9);
        assert_eq!(offsets(&sink), [8]);
        let row = row_id_of_scope(sink.connection(), &press()).expect("reads").expect("there");
        assert_eq!(read_removed_below(sink.connection(), row).expect("reads"), Some(8));
    }

    #[test]
    fn a_topic_of_which_nothing_is_left_is_forgotten_and_comes_back() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = open(dir.path());
        let on = |offset, topic, seconds| RecordRef { topic, ..at(offset, seconds) };
        store(&mut sink, &[on(0, "a", 0), on(1, "b", 1), on(2, "b", 70)]);
        prune(&mut sink, AGED, 62);
        let topics = |sink: &SqliteSink| {
            let sql = "SELECT topic FROM topics t JOIN latest_values v ON v.topic_id = t.id ORDER BY 1";
            let mut select = sink.connection().prepare(sql).expect("reads");
            let rows = select.query_map([], |row| row.get::<_, String>(0)).expect("reads");
            rows.map(|row| row.expect("reads")).collect::<Vec<_>>()
        };
        assert_eq!(topics(&sink), ["b"]);
        store(&mut sink, &[on(3, "a", 80), on(4, "c", 80)]);
        assert_eq!(topics(&sink), ["a", "b", "c"]);
        let names = "SELECT count(*) FROM records WHERE topic IS NULL";
        assert_eq!(sink.connection().query_row(names, [], |row| row.get(0)), Ok(0));
    }

    #[test]
    fn the_samples_go_with_their_records() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = open(dir.path());
        let of = |offset, topic| RecordRef {
            topic,
            payload: b"{\"t\":1.5}",
            ..at(offset, i64::try_from(offset).expect("small"))
        };
        for offset in 0..300 {
            store(&mut sink, &[of(offset, if offset.is_multiple_of(3) { "a" } else { "b" })]);
        }
        let samples = |sink: &SqliteSink| {
            let mut select =
                sink.connection().prepare("SELECT offset FROM samples ORDER BY offset").expect("reads");
            let rows = select.query_map([], |row| row.get::<_, i64>(0)).expect("reads");
            rows.map(|row| row.expect("reads")).collect::<Vec<_>>()
        };
        assert_eq!(samples(&sink).len(), 300);
        for (now, first) in [(160, 100), (161, 101), (300, 240)] {
            prune(&mut sink, AGED, now);
            let mut topic = String::new();
            while let Some(next) = sink.trim_samples_some(&press(), &topic).expect("trimmed") {
                topic = next;
            }
            assert_eq!(samples(&sink), (first..300).collect::<Vec<i64>>());
            assert_eq!(offsets(&sink), (first..300).collect::<Vec<i64>>());
        }
        prune(&mut sink, AGED, 1_000);
        assert_eq!(
            sink.connection().query_row("SELECT count(*) FROM sample_chunks", [], |row| row.get(0)),
            Ok(0)
        );
    }

    #[test]
    fn room_is_given_back_to_the_file_system_and_times_are_forgotten() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (mut sink, path) = (open(dir.path()), dir.path().join(RECORDS_FILE_NAME));
        let payload = vec![b'x'; 1000];
        let of = |offset| RecordRef { payload: &payload, ..record(offset, "press-4", "a", b"") };
        let count = 30_000;
        sink.store((0..count).map(of), count, false).expect("stored");
        assert!(sink.checkpoint().expect("copied"));
        let before = std::fs::metadata(&path).expect("there").len();
        prune(&mut sink, StoredLimits { age_us: None, bytes: Some(1_064 * 100) }, 0);
        sink.prune_time_index().expect("pruned");
        while sink.give_back_some().expect("given back") {}
        let after = std::fs::metadata(&path).expect("there").len();
        let kept = u64::try_from(FREE_PAGES_KEPT).expect("positive") * 4096;
        assert!(before > 30 << 20 && after < kept + (2 << 20), "{before} bytes before, {after} after");
        let times: i64 = sink
            .connection()
            .query_row("SELECT count(*) FROM time_index", [], |row| row.get(0))
            .expect("reads");
        assert_eq!(times, 1);
        let pages: String =
            sink.connection().pragma_query_value(None, "integrity_check", |row| row.get(0)).expect("reads");
        assert_eq!(pages, "ok");
    }
}
