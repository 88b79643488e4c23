//! The thread that follows the log into `retained.db`.
//!
//! Most records are not to be retained. For those it moves the cursor in memory only, and writes the
//! cursor once a second and at the end. A message to be retained is written at once if there was no
//! transaction for a while, and otherwise waits for the next, so that a fleet that retains everything
//! costs a bounded part of the time and each topic is written once per transaction. A caller that waits
//! for an offset makes the thread write at once. `consume/follower.rs` runs the thread.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{error, warn};

use super::table::RetainedTable;
use super::{RetainedError, damage_words, open_right, unopened_words};
use crate::consume::follower::{Consumer, FollowerControl, FollowerProfile, NextRound};
use crate::log::{Batch, Log, LogReadError};
use crate::message::{Offset, RecordFlags, RecordRef};
use crate::retained_topics::RetainedTopics;
use crate::sqlite::{SqliteError, set_aside};

/// About how much of the log one transaction takes.
const RETAINED_READ_BYTES: usize = 8 << 20;
/// The least time between the starts of two transactions, and the most that a long one delays the next,
/// unless much waits in the log.
const RETAINED_PACE_RANGE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Transactions may take one part in this many of the time.
const RETAINED_PACE_DIVISOR: u32 = 5;
/// The least time between two reads of the log, unless much waits in it.
const RETAINED_LOOK_INTERVAL_MIN: Duration = Duration::from_millis(10);
/// How often the cursor is written and synced while records arrive, so that the log may remove what is
/// below it. As often as storage does, because the log waits for the slower of the two.
const RETAINED_SYNC_INTERVAL: Duration = Duration::from_secs(1);

/// By how much the thread's priority is lower than usual: above that of the slow lane, whose clients wait for it too.
const RETAINED_NICE: u8 = 5;

const RETAINED_PROFILE: FollowerProfile = FollowerProfile {
    name: "retained",
    down: "retained messages are not up to date",
    up: "retained messages are kept up to date again",
    late: "retained messages did not finish by their deadline; the log has the rest",
    patient: true,
    nice: RETAINED_NICE,
};

/// What the thread and those who ask about it share.
pub(super) struct RetainedFollowerState {
    progress: watch::Sender<RetainedProgress>,
    /// Called with the offset that is durable. It is here, not in the thread, because its hold on the log
    /// must outlast the thread.
    consumed: Mutex<Box<dyn Fn(Offset) + Send>>,
    control: Arc<FollowerControl>,
    /// What was set aside since the start and where, for the operator.
    set_aside: Mutex<Option<String>>,
    /// Whether the database was opened.
    is_open: AtomicBool,
    /// The topics that have a message.
    topics: Arc<RetainedTopics>,
    /// Below it, all records of the log are in that count.
    counted_below: AtomicU64,
    /// Damage that a reader has met, for the thread to mend.
    damage: Mutex<Option<SqliteError>>,
}

/// The thread's cursor, and the state of the table at that cursor.
#[derive(Clone, Copy)]
struct RetainedProgress {
    cursor: Offset,
    empty: bool,
    /// The version of the rules about leaked keys that the table follows.
    withheld_version: u64,
    /// How many databases were set aside before this one.
    made_anew: u32,
}

impl RetainedProgress {
    fn from_table(table: &RetainedTable) -> Self {
        let (cursor, empty) = (table.cursor(), table.is_empty());
        Self { cursor, empty, withheld_version: table.withheld_version(), made_anew: 0 }
    }
}

impl RetainedFollowerState {
    /// For a thread that begins at the cursor of `table`, or opens it.
    pub(super) fn new(table: Option<&RetainedTable>, consumed: Box<dyn Fn(Offset) + Send>) -> Self {
        let unopened = RetainedProgress { cursor: 0, empty: true, withheld_version: 0, made_anew: 0 };
        let progress = table.map_or(unopened, RetainedProgress::from_table);
        Self {
            progress: watch::Sender::new(progress),
            consumed: Mutex::new(consumed),
            control: FollowerControl::new(&RETAINED_PROFILE),
            set_aside: Mutex::default(),
            is_open: AtomicBool::new(table.is_some()),
            topics: Arc::default(),
            counted_below: AtomicU64::new(0),
            damage: Mutex::default(),
        }
    }

    /// Whether the database was opened since the start.
    pub(super) fn is_open(&self) -> bool {
        self.is_open.load(Ordering::Acquire)
    }

    /// Takes over the state of the table.
    fn follow_table(&self, table: &RetainedTable) {
        self.progress.send_modify(|progress| {
            *progress =
                RetainedProgress { made_anew: progress.made_anew, ..RetainedProgress::from_table(table) };
        });
    }

    /// The topics that have a message.
    pub(super) fn topics(&self) -> &Arc<RetainedTopics> {
        &self.topics
    }

    /// Counts the topics anew: those of the table, and what is to be retained of the records behind it in the log, as far
    /// as `may_go_on`. What the thread has not consumed yet counts too: the limits hold right after a kill.
    pub(super) fn count_topics(
        &self,
        table: &RetainedTable,
        log: &dyn Log,
        may_go_on: impl Fn() -> bool,
    ) -> rusqlite::Result<()> {
        self.topics.recount(|topics| {
            table.for_each_topic(|datasource, topic, payload| {
                topics.confirm(datasource, topic, message_bytes(topic, payload));
            })?;
            self.counted_below.store(count_unconsumed(topics, table, log, may_go_on), Ordering::Release);
            Ok(())
        })
    }

    /// Notes that the thread has consumed a record: its topic has that message now.
    fn confirm_topic(&self, record: &RecordRef<'_>) {
        // Below, what came after it is counted already.
        if record.offset >= self.counted_below.load(Ordering::Acquire) {
            let bytes = message_bytes(record.topic, record.payload.len());
            self.topics.confirm(record.datasource, record.topic, bytes);
        }
    }

    /// Notes that the topics could not be counted at the start, which goes on: the thread mends damage, and after
    /// another error the limits of retained topics count from here.
    pub(super) fn note_uncounted(&self, error: SqliteError) {
        warn!(%error, "retained messages: the topics could not be counted");
        *self.damage.lock() = Some(error).filter(SqliteError::is_damage);
    }

    /// Has the thread mend damage that a reader has met, and returns once there is another database. `false`
    /// if it mends nothing: it has done so before, and a disk that damages one file after the other needs an
    /// operator.
    pub(super) async fn mend(&self, damage: SqliteError) -> bool {
        // Read first: the thread may mend it between the two.
        let mut progress = self.progress.subscribe();
        let before = progress.borrow().made_anew;
        if self.set_aside().is_some() {
            return false;
        }
        *self.damage.lock() = Some(damage);
        self.control.request_offset(Offset::MAX);
        progress.wait_for(|progress| progress.made_anew > before).await.is_ok()
    }

    /// What was set aside since the start, and where it is.
    pub(super) fn set_aside(&self) -> Option<String> {
        self.set_aside.lock().clone()
    }

    /// Tells the operator what was set aside.
    pub(super) fn note_set_aside(&self, said: String) {
        error!("retained messages: {said}");
        *self.set_aside.lock() = Some(said);
    }

    /// The control of the thread.
    pub(super) fn control(&self) -> &Arc<FollowerControl> {
        &self.control
    }

    /// The first offset that is not consumed.
    pub(super) fn cursor(&self) -> Offset {
        self.progress.borrow().cursor
    }

    /// Whether nothing is retained at that offset.
    pub(super) fn is_empty(&self) -> bool {
        self.progress.borrow().empty
    }

    /// Returns once the cursor is at `offset` or beyond.
    pub(super) async fn wait_caught_up(&self, offset: Offset) {
        if self.cursor() >= offset {
            return;
        }
        self.control.request_offset(offset);
        // The sender is in `self`, so that waiting does not fail.
        let _ = self.progress.subscribe().wait_for(|progress| progress.cursor >= offset).await;
    }

    /// Returns once the table follows this version of the rules about leaked keys.
    pub(super) async fn wait_reconciled(&self, version: u64) {
        let _ = self.progress.subscribe().wait_for(|progress| progress.withheld_version >= version).await;
    }
}

/// The thread.
pub(super) struct RetainedFollower {
    path: PathBuf,
    /// `None` after an error that leaves its state in doubt, and until the database was opened at all.
    table: Option<RetainedTable>,
    log: Arc<dyn Log>,
    /// Where the log ended at the start.
    log_end: Offset,
    shared: Arc<RetainedFollowerState>,
    synced_at: Option<Instant>,
    /// The offset with which `RetainedFollowerState::consumed` was last called.
    durable: Option<Offset>,
}

/// What a round has done.
enum RetainedRound {
    AtTail,
    /// There is much more.
    Behind,
    /// Nearly all was read, and nothing had to be written.
    OnlyRead,
    /// Nearly all was read and written.
    Wrote,
}

/// Why a round of the thread failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum RetainedRoundError {
    #[error(transparent)]
    Database(#[from] SqliteError),
    #[error("{}", unopened_words(.0))]
    Unopened(SqliteError),
    #[error(transparent)]
    Log(#[from] LogReadError),
    #[error("the log has records from {0} on and gives none")]
    NoRecords(Offset),
}

/// What a message counts in its datasource's limit; 0 for one without a payload, which clears its topic.
fn message_bytes(topic: &str, payload: usize) -> u64 {
    if payload == 0 { 0 } else { (topic.len() + payload) as u64 }
}

/// Counts what is to be retained of the records that a table has not consumed. Returns the offset below which all are
/// counted; the thread counts the others when it consumes them.
fn count_unconsumed(
    topics: &RetainedTopics,
    table: &RetainedTable,
    log: &dyn Log,
    may_go_on: impl Fn() -> bool,
) -> Offset {
    let left_out = log.withheld().now();
    let mut counted = table.cursor().max(log.first_offset());
    while counted < log.next_offset() && may_go_on() {
        let batches = match log.read(counted, RETAINED_READ_BYTES) {
            Err(LogReadError::Removed { first, .. }) if first > counted => {
                counted = first;
                continue;
            }
            Err(error) => {
                warn!(%error, "retained messages: the topics in the rest of the log count when they are consumed");
                break;
            }
            Ok(batches) => batches,
        };
        let Some(last) = batches.last() else { break };
        for batch in batches.iter().filter(|batch| batch.has_retained()) {
            for record in batch.records().filter(|record| {
                record.offset >= counted && is_retained(record) && !left_out.contains(record)
            }) {
                topics.confirm(
                    record.datasource,
                    record.topic,
                    message_bytes(record.topic, record.payload.len()),
                );
            }
        }
        counted = last.next_offset();
    }
    counted
}

fn is_retained(record: &RecordRef<'_>) -> bool {
    record.flags.contains(RecordFlags::RETAIN)
}

impl Consumer for RetainedFollower {
    type RoundError = RetainedRoundError;

    fn round(&mut self) -> Result<NextRound, RetainedRoundError> {
        let begun = Instant::now();
        if !self.shared.is_open() {
            self.open_late()?;
        }
        let met = self.shared.damage.lock().take();
        if let Some(damage) = met.filter(|_| self.shared.set_aside().is_none()) {
            self.begin_anew(&damage)?;
        }
        let round = self.consume();
        if let Err(RetainedRoundError::Database(error)) = &round
            && !error.is_clean_rollback()
        {
            self.table = None;
            // Once only: a disk that damages one file after the other needs an operator.
            if error.is_damage() && self.shared.set_aside().is_none() {
                self.begin_anew(error)?;
                return Ok(NextRound::Again);
            }
        }
        let took = begun.elapsed();
        Ok(match round? {
            RetainedRound::AtTail => NextRound::AtTail,
            RetainedRound::Behind => NextRound::Again,
            RetainedRound::OnlyRead => NextRound::After(RETAINED_LOOK_INTERVAL_MIN.saturating_sub(took)),
            RetainedRound::Wrote => {
                let pace = (took * RETAINED_PACE_DIVISOR).clamp(RETAINED_PACE_RANGE.0, RETAINED_PACE_RANGE.1);
                NextRound::After(pace.saturating_sub(took))
            }
        })
    }

    fn cursor(&self) -> Offset {
        self.shared.cursor()
    }

    fn may_recover(&self) -> bool {
        self.shared.is_open()
    }

    /// Writes the cursor, and copies the write-ahead log into the one file if nobody else reads it.
    fn end(mut self) {
        let cursor = self.shared.cursor();
        if self.shared.is_open()
            && self.durable != Some(cursor)
            && let Err(error) = self.write(&[], cursor, true)
        {
            warn!(%error, "retained messages: the next start reads a part of the log again");
        }
        if let Some(Err(error)) = self.table.map(|table| table.checkpoint()) {
            warn!(%error, "the write-ahead log of retained.db stays beside it");
        }
    }
}

impl RetainedFollower {
    /// A thread, not started yet, that continues at the cursor of `table`, or opens it.
    pub(super) fn new(
        path: PathBuf,
        table: Option<RetainedTable>,
        log: Arc<dyn Log>,
        log_end: Offset,
        shared: Arc<RetainedFollowerState>,
    ) -> Self {
        Self { path, table, log, log_end, shared, synced_at: None, durable: None }
    }

    /// Opens the database that could not be opened at the start. The log has gone on since then: one that is ahead of
    /// a log that was empty at the start is set aside without asking, because its offsets are given anew already.
    fn open_late(&mut self) -> Result<(), RetainedRoundError> {
        let (table, said) = match open_right(&self.path, &*self.log, self.log_end) {
            Ok(opened) => opened,
            Err(RetainedError::Database(error)) => return Err(RetainedRoundError::Unopened(error)),
            Err(behind) => {
                let aside = set_aside(&self.path)?;
                let said = format!("{behind}. It is set aside as {}", aside.display());
                (RetainedTable::open(&self.path)?, Some(said))
            }
        };
        if let Some(said) = said {
            self.shared.note_set_aside(said);
        }
        self.count_topics(&table)?;
        self.shared.progress.send_replace(RetainedProgress::from_table(&table));
        self.table = Some(table);
        self.shared.is_open.store(true, Ordering::Release);
        Ok(())
    }

    /// Sets the damaged database aside, and goes on with another one from where the log begins. If it cannot, the next
    /// round does.
    fn begin_anew(&mut self, damage: &SqliteError) -> Result<(), SqliteError> {
        // The log keeps all that it has until the new database has consumed it.
        self.shared.consumed.lock()(0);
        self.durable = None;
        self.table = None;
        let aside = set_aside(&self.path).inspect_err(|_| {
            // A reader that has met it waits for another database.
            self.shared.damage.lock().get_or_insert_with(|| damage.clone());
        })?;
        self.shared.note_set_aside(damage_words(&aside, damage, self.log.first_offset()));
        self.shared.progress.send_modify(|progress| {
            let made_anew = progress.made_anew + 1;
            *progress = RetainedProgress { cursor: 0, empty: true, withheld_version: 0, made_anew };
        });
        self.shared.counted_below.store(0, Ordering::Release);
        let table = RetainedTable::open(&self.path).inspect_err(|_| {
            // The next round begins with an empty one all the same, and counts as it consumes.
            let Ok(()) = self.shared.topics.recount(|_| Ok::<_, Infallible>(()));
        })?;
        self.count_topics(&table)?;
        self.shared.follow_table(&table);
        self.table = Some(table);
        Ok(())
    }

    /// Counts the topics of a table, and of what it has still to consume; not while the thread is to end.
    fn count_topics(&self, table: &RetainedTable) -> Result<(), SqliteError> {
        let may_go_on = || self.shared.control.stop_deadline().is_none();
        let counted = self.shared.count_topics(table, &*self.log, may_go_on);
        counted.map_err(|error| SqliteError::from_sqlite(&error, &self.path))
    }

    /// Consumes the next records of the log, as many as one transaction takes.
    fn consume(&mut self) -> Result<RetainedRound, RetainedRoundError> {
        let withheld = self.log.withheld();
        let followed = self.shared.progress.borrow().withheld_version;
        if followed != withheld.version() {
            self.follow_rules()?;
            return Ok(RetainedRound::Behind);
        }
        let left_out = withheld.now();
        let cursor = self.shared.cursor();
        let sync = self.synced_at.is_none_or(|at| at.elapsed() >= RETAINED_SYNC_INTERVAL);
        let first = self.log.first_offset();
        if cursor < first {
            self.skip_removed(cursor, first)?;
        } else if cursor < self.log.next_offset() {
            let batches = match self.log.read(cursor, RETAINED_READ_BYTES) {
                // Retention removed it just now.
                Err(LogReadError::Removed { first, .. }) if first > cursor => {
                    self.skip_removed(cursor, first)?;
                    return Ok(RetainedRound::Behind);
                }
                batches => batches?,
            };
            let Some(last) = batches.last() else { return Err(RetainedRoundError::NoRecords(cursor)) };
            let mut newest = HashMap::new();
            for batch in batches.iter().filter(|batch| batch.has_retained()) {
                for record in batch.records().filter(|record| {
                    record.offset >= cursor && is_retained(record) && !left_out.contains(record)
                }) {
                    newest.insert((record.datasource, record.topic), record);
                }
            }
            let written = sync || !newest.is_empty();
            if written {
                let newest: Vec<RecordRef<'_>> = newest.into_values().collect();
                self.write(&newest, last.next_offset(), sync)?;
            } else {
                self.shared.progress.send_modify(|progress| progress.cursor = last.next_offset());
            }
            let bytes: usize = batches.iter().map(Batch::weight).sum();
            return Ok(match written {
                _ if bytes >= RETAINED_READ_BYTES / 2 => RetainedRound::Behind,
                true => RetainedRound::Wrote,
                false => RetainedRound::OnlyRead,
            });
        } else if sync && self.durable != Some(cursor) {
            self.write(&[], cursor, true)?;
        } else {
            return Ok(RetainedRound::AtTail);
        }
        Ok(RetainedRound::Behind)
    }

    /// Leaves out what the rules leave out now, and goes back in the log for what is to be read again for that. Those
    /// who wait for an offset wait until the thread reaches it again.
    fn follow_rules(&mut self) -> Result<(), SqliteError> {
        // What is to be read again stays in the log until it is.
        self.shared.consumed.lock()(0);
        self.durable = None;
        let first = self.log.first_offset();
        let table = open_or_reopen(&mut self.table, &self.path)?;
        if table.withheld_version() > self.log.withheld().version() {
            table.forget_rules().map_err(|error| SqliteError::from_sqlite(&error, &self.path))?;
        }
        let (changes, left_out) = self.log.withheld().changes_and_rules(table.withheld_version());
        table
            .follow_rules(&changes, &left_out, first)
            .map_err(|error| SqliteError::from_sqlite(&error, &self.path))?;
        if let Some(table) = &self.table {
            // Before anybody hears of it.
            self.count_topics(table)?;
            self.shared.follow_table(table);
        }
        Ok(())
    }

    /// Resumes at `to`, where the log begins.
    fn skip_removed(&mut self, from: Offset, to: Offset) -> Result<(), SqliteError> {
        self.write(&[], to, true)?;
        warn!(
            from,
            to,
            records = to - from,
            "records are no longer in the log; what was to be retained of them is missing"
        );
        Ok(())
    }

    /// Writes `newest` and the cursor `next`, and wakes those who wait for it.
    fn write(&mut self, newest: &[RecordRef<'_>], next: Offset, sync: bool) -> Result<(), SqliteError> {
        let table = open_or_reopen(&mut self.table, &self.path)?;
        let written = table.write(newest.iter().copied(), next, sync);
        written.map_err(|error| SqliteError::from_sqlite(&error, &self.path))?;
        // Before anybody hears of it: who has waited finds them counted.
        newest.iter().for_each(|record| self.shared.confirm_topic(record));
        self.shared.follow_table(table);
        if sync {
            self.synced_at = Some(Instant::now());
            self.durable = Some(next);
            self.shared.consumed.lock()(next);
        }
        Ok(())
    }
}

fn open_or_reopen<'a>(
    table: &'a mut Option<RetainedTable>,
    path: &Path,
) -> Result<&'a mut RetainedTable, SqliteError> {
    match table {
        Some(table) => Ok(table),
        none => Ok(none.insert(RetainedTable::reopen(path)?)),
    }
}
