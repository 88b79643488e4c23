//! The sink that is a Delta lake: one table, partitioned by datasource and day, that DuckDB, Polars, Spark and pandas read.
//!
//! Records are collected in memory and committed once an interval, or earlier when they are many: Parquet files for each
//! datasource and day, and one commit that also holds the last offset. So a record is in the table once, whatever is
//! killed. [`columns`] says which columns there are, [`values`] how members of JSON payloads become some.
//!
//! Records in quarantine are not in the table. Those of a leaked key are taken out of it and kept aside, until they are
//! given back or purged ([`rules`]).
//!
//! Where gateways share a lake, each commit says which offset, which rules and which epoch of the log ([`epochs`]) it
//! follows: the first one counts, and the others lose nothing but their work. Whoever was too late leaves the lake to the faster one until that stands still
//! ([`turns`]).

mod columns;
mod epochs;
mod pending;
mod rules;
mod turns;
mod upkeep;
mod values;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use headgate_bridge_delta::object_store::ObjectStore;
use headgate_bridge_delta::{LakeError, LakePlace, LakeTable, ORPHAN_AGE_MIN, PlaceError, TableAppend};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tracing::warn;

use self::columns::{OFFSET, table_spec};
use self::pending::{PendingFiles, PendingRows};
use self::turns::OtherWriterTurn;
use self::upkeep::UpkeepTimes;
use crate::limits::{LAKE_LOT_BYTES, LAKE_VALUE_COLUMNS_MAX};
use crate::log::{WithheldRules, WithheldSnapshot};
use crate::message::{KeyId, Offset, RecordFlags, RecordRef, TimeMicros};

/// The cursor of the table that says which rules about leaked keys and deletions its rows follow.
const WITHHELD_MARK: &str = "withheld";
/// The one that says up to which of them what was purged is erased from earlier versions of the table too.
const ERASED_MARK: &str = "erased";

/// The one that says of which epoch of the log its rows are.
const EPOCH_MARK: &str = "epoch";

/// A lake that does not come to rest is kept up once in so many commits.
const BUSY_COMMITS_PER_UPKEEP: u32 = 32;

/// Why the lake has not taken records, or could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum LakeFault {
    /// The table, or the store that it is in.
    #[error(transparent)]
    Table(#[from] LakeError),
    /// The settings say no place that can be used.
    #[error("the lake: {0}")]
    Place(#[from] PlaceError),
    /// A file of the settings cannot be read.
    #[error("the lake: {0}")]
    Settings(String),
    /// The threads for its connections could not be started.
    #[error("the lake: {0}")]
    Threads(#[from] io::Error),
    /// The log, with which the table is compared, cannot be read now.
    #[error("the lake cannot be compared with the log: {0}")]
    Log(String),
    /// Another gateway, which has another log, writes into the table.
    #[error("another gateway writes into the lake at {place}")]
    OtherWriter {
        /// Where it is.
        place: String,
    },
    /// The table is of a later epoch of the log than this gateway.
    #[error(
        "another gateway has begun a later epoch of the log in the lake at {place}, and this one has not yet"
    )]
    LaterEpoch {
        /// Where it is.
        place: String,
    },
    /// The table has the records of another log.
    #[error("the lake at {place} is that of another log: its record {offset} is not the one of this log")]
    OtherLog {
        /// Where it is.
        place: String,
        /// The newest record in it.
        offset: Offset,
    },
    /// The table has records that the log does not have.
    #[error(
        "the lake at {place} has records up to offset {stored}, and the log ends at {log_end}: it is the lake of another log, or the log has lost records"
    )]
    AheadOfLog {
        /// Where it is.
        place: String,
        /// The first offset that it does not have.
        stored: Offset,
        /// The first offset that the log does not have.
        log_end: Offset,
    },
}

impl LakeFault {
    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::AheadOfLog { .. } => "put the log back, or name another place in storage.delta.place",
            Self::OtherWriter { .. }
            | Self::OtherLog { .. }
            | Self::Table(LakeError::OtherTable(_) | LakeError::ProtocolNewer { .. }) => {
                "name another place in storage.delta.place"
            }
            Self::LaterEpoch { .. } => "this gateway begins it by itself, or with its next start",
            Self::Table(_) | Self::Threads(_) | Self::Log(_) => "it is tried again",
            Self::Place(_) | Self::Settings(_) => "see [storage.delta]",
        }
    }
}

/// How a lake is kept.
#[derive(Debug, Clone)]
pub(in crate::consume) struct LakeSettings {
    /// Where it is.
    pub(in crate::consume) place: LakePlace,
    /// How long records may wait for their commit.
    pub(in crate::consume) interval: Duration,
    /// How long files stay that are no longer part of the table.
    pub(in crate::consume) removed_kept: Duration,
    /// How many days of records are kept; 0: all.
    pub(in crate::consume) retention_days: u64,
    /// Whether other gateways with the same log write there too.
    pub(in crate::consume) is_shared: bool,
}

/// The record of the table with the highest offset.
pub(in crate::consume) struct NewestRow {
    pub(in crate::consume) offset: Offset,
    pub(in crate::consume) key_id: KeyId,
    pub(in crate::consume) received_at: TimeMicros,
}

/// Records that are made into files and stored beside this thread, and are committed next.
struct RowLot {
    /// Behind the last one.
    end: Offset,
    files: JoinHandle<Result<PendingFiles, LakeFault>>,
}

/// The open table, and the records that wait for their commit.
pub(in crate::consume) struct LakeSink {
    /// Runs what the store's connections do, and makes files.
    runtime: Runtime,
    settings: LakeSettings,
    table: LakeTable,
    pending: PendingRows,
    /// Those before these, of which files are made meanwhile.
    lot: Option<RowLot>,
    /// Behind the records that are committed or wait.
    cursor: Offset,
    /// The table's cursor when what is not committed began: it is committed behind that, or not at all.
    base: Option<i64>,
    /// The epoch of the log that its rows are of; `None` without a cluster.
    epoch: Option<i64>,
    /// The rules about what is left out and their version, once they are known.
    left_out: Option<(WithheldSnapshot, u64)>,
    /// `None` since it was opened: what failed before is seen to fail or to work at once.
    committed_at: Option<Instant>,
    /// Commits in a row behind which more waited already.
    busy_commits: u32,
    /// While another gateway writes.
    other_writer: Option<OtherWriterTurn>,
    upkeep: UpkeepTimes,
}

impl LakeSink {
    /// Opens the table, or makes it.
    ///
    /// # Errors
    /// [`LakeFault`].
    pub(in crate::consume) fn open(settings: LakeSettings) -> Result<Self, LakeFault> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("lake")
            .enable_all()
            .build()?;
        let store: Arc<dyn ObjectStore> = settings.place.open()?;
        if let Err(error) = settings.place.remove_unfinished(ORPHAN_AGE_MIN) {
            warn!(%error, "temporary files of the lake stay");
        }
        let table = runtime.block_on(LakeTable::open(store, table_spec()))?;
        let pending = PendingRows::new(table.snapshot().schema(), LAKE_VALUE_COLUMNS_MAX);
        let mut sink = Self {
            runtime,
            settings,
            table,
            pending,
            lot: None,
            cursor: 0,
            base: None,
            epoch: None,
            left_out: None,
            committed_at: None,
            busy_commits: 0,
            other_writer: None,
            upkeep: UpkeepTimes::default(),
        };
        sink.begin_behind_commits();
        Ok(sink)
    }

    /// Waits for something else, on a thread that may block.
    pub(in crate::consume) fn wait_for<T>(&self, something: impl Future<Output = T>) -> T {
        self.runtime.block_on(something)
    }

    /// Where it is.
    pub(in crate::consume) fn place(&self) -> &LakePlace {
        &self.settings.place
    }

    /// The first offset that is neither committed nor waits.
    pub(in crate::consume) fn cursor(&self) -> Offset {
        self.cursor
    }

    /// The first offset that is not committed.
    pub(in crate::consume) fn committed(&self) -> Offset {
        self.table.cursor().map_or(0, |last| offset_of(last) + 1)
    }

    /// The version of the rules about leaked keys and deletions that the table follows.
    pub(in crate::consume) fn withheld_version(&self) -> u64 {
        self.table.mark(WITHHELD_MARK).map_or(0, offset_of)
    }

    /// Whether it has the rules that the table follows.
    pub(in crate::consume) fn has_rules(&self) -> bool {
        self.left_out.as_ref().is_some_and(|(_, version)| *version == self.withheld_version())
    }

    /// The newest record of the table; `None` if it has none.
    ///
    /// # Errors
    /// [`LakeFault`].
    pub(in crate::consume) fn newest_row(&self) -> Result<Option<NewestRow>, LakeFault> {
        let files = self.table.snapshot().files();
        let newest =
            files.filter_map(|file| Some((file.bounds(OFFSET)?.1, file))).max_by_key(|(last, _)| *last);
        let Some((last, file)) = newest else { return Ok(None) };
        for rows in self.runtime.block_on(self.table.read_file(file))? {
            let rows = rows?;
            for (key_id, received_at, offset) in
                (0..rows.num_rows()).rev().filter_map(|row| rules::row_of(&rows, row))
            {
                if offset == offset_of(last) {
                    return Ok(Some(NewestRow { offset, key_id, received_at }));
                }
            }
        }
        Ok(None)
    }

    /// Takes `records`, which are in order and below `next`, and commits them with those before when that is due.
    ///
    /// # Errors
    /// [`LakeFault`]. What waited is to be read again from the log.
    pub(in crate::consume) fn store<'a>(
        &mut self,
        records: impl Iterator<Item = RecordRef<'a>>,
        next: Offset,
    ) -> Result<(), LakeFault> {
        let left_out = self.left_out.as_ref().map(|(rules, _)| rules.clone()).unwrap_or_default();
        for record in records {
            if record.offset >= self.cursor && !record.flags.contains(RecordFlags::QUARANTINED) {
                self.pending.push(&record, &left_out);
            }
        }
        self.cursor = self.cursor.max(next);
        let is_due = self.committed_at.is_none_or(|at| at.elapsed() >= self.settings.interval);
        if self.pending.bytes() >= LAKE_LOT_BYTES {
            if let Some(earlier) = self.begin_lot() {
                self.commit_lot(earlier)?;
            }
        } else if is_due && self.cursor > self.committed() {
            self.commit()?;
        }
        Ok(())
    }

    /// Commits what it has caught up with, once the log has nothing more: that does not wait for the end of an interval.
    ///
    /// # Errors
    /// [`LakeFault`].
    pub(in crate::consume) fn end_catching_up(&mut self) -> Result<(), LakeFault> {
        if self.lot.is_some() { self.commit() } else { Ok(()) }
    }

    /// Commits what waits.
    ///
    /// # Errors
    /// [`LakeFault`].
    pub(in crate::consume) fn commit(&mut self) -> Result<(), LakeFault> {
        if self.base != self.table.cursor() {
            // Another writer has come on, and that was seen before what waits was committed.
            return self.yield_to_other();
        }
        let taken = self.lot.as_ref().map_or(self.committed(), |lot| lot.end);
        let earlier = if self.cursor > taken { self.begin_lot() } else { self.lot.take() };
        if let Some(lot) = earlier {
            self.commit_lot(lot)?;
        }
        // Unless another writer has come on.
        match self.lot.take() {
            Some(lot) => self.commit_lot(lot),
            None => Ok(()),
        }
    }

    /// Begins to make files of what waits. Returns those before, which are to be committed now.
    fn begin_lot(&mut self) -> Option<RowLot> {
        let (rows, settings) = (self.pending.take(), self.table.file_settings().clone());
        let stage = self.table.file_stage();
        let files = self.runtime.spawn(async move {
            let made = tokio::task::spawn_blocking(move || rows.into_files(&settings)).await;
            let mut files = made.map_err(io::Error::other)??;
            stage.put(&mut files.files).await?;
            Ok(files)
        });
        self.lot.replace(RowLot { end: self.cursor, files })
    }

    fn commit_lot(&mut self, lot: RowLot) -> Result<(), LakeFault> {
        if self.base != self.table.cursor() {
            return self.yield_to_other();
        }
        let rows = self.runtime.block_on(lot.files).map_err(io::Error::other)??;
        let rules = self.left_out.as_ref().map(|(_, version)| (WITHHELD_MARK, cursor_of(*version)));
        let marks = rules.into_iter().chain(self.epoch.map(|epoch| (EPOCH_MARK, epoch)));
        let append = TableAppend {
            previous: self.base,
            through: cursor_of(lot.end - 1),
            columns: rows.columns,
            files: rows.files,
            aside: rows.aside,
            marks: marks.map(|(name, version)| (name.to_owned(), version)).collect(),
        };
        match self.runtime.block_on(self.table.append(&append)) {
            Err(LakeError::Superseded { .. }) => return self.yield_to_other(),
            done => drop(done?),
        }
        drop(append);
        if self.table.cursor() != Some(cursor_of(lot.end - 1)) {
            // Another writer was further already: some of what was made behind this lot is there too.
            return self.yield_to_other();
        }
        self.cursor = self.cursor.max(self.committed());
        self.base = self.table.cursor();
        let last = self.committed_at.replace(Instant::now());
        // More waits already: merges are for quieter times, unless there are none.
        self.busy_commits = if self.lot.is_some() { self.busy_commits + 1 } else { 0 };
        if self.busy_commits.is_multiple_of(BUSY_COMMITS_PER_UPKEEP)
            && let Err(error) = self.keep_up(last.map_or(Duration::ZERO, |at| at.elapsed()))
        {
            warn!(%error, "upkeep of the lake");
        }
        Ok(())
    }

    /// Forgets what waits, and goes on behind what is committed, with the columns that the table has now.
    fn begin_behind_commits(&mut self) {
        self.cursor = self.committed();
        self.base = self.table.cursor();
        self.lot = None;
        self.pending = PendingRows::new(self.table.snapshot().schema(), LAKE_VALUE_COLUMNS_MAX);
    }

    /// Makes the rows that are there follow the rules about what is left out, and those that come.
    ///
    /// # Errors
    /// [`LakeFault`].
    pub(in crate::consume) fn reconcile(&mut self, withheld: &WithheldRules) -> Result<(), LakeFault> {
        if self.epoch.is_some() && self.table.mark(EPOCH_MARK) != self.epoch {
            return Err(LakeFault::LaterEpoch { place: self.place().to_string() });
        }
        // A rule that another gateway has brought in since is not undone: the mark is still there, or nothing is done.
        let expected = self.expected_marks(WITHHELD_MARK);
        let followed = self.withheld_version();
        let is_ahead = followed > withheld.version();
        if is_ahead && self.settings.is_shared {
            // Another gateway has them, and they come: until then nothing that is committed follows older ones.
            self.left_out = Some((withheld.now(), withheld.version()));
            return Ok(());
        }
        // A version that is ahead is of another registry. To follow a rule twice does no harm.
        let followed = if is_ahead { 0 } else { followed };
        let (changes, left_out) = withheld.changes_and_rules(followed);
        let version = followed + changes.len() as u64;
        if self.left_out.as_ref().is_some_and(|(_, known)| *known != version) {
            // What waits was sorted by other rules: it is committed under those, or read again.
            self.commit()?;
        }
        // Also without changes: the mark of another registry has to go, or no commit fits it.
        if !changes.is_empty() || is_ahead {
            self.commit()?;
            let followed = rules::follow(&mut self.table, &expected, &changes, &left_out, version);
            match self.runtime.block_on(followed) {
                // Another gateway has done the same at the same moment.
                Err(LakeError::Superseded { .. }) if self.is_at(WITHHELD_MARK, version) => {}
                done => done?,
            }
        }
        self.left_out = Some((left_out, version));
        self.erase_purged(withheld)
    }

    /// What a commit depends on that moves this mark: where that was last seen, and the epoch.
    fn expected_marks(&self, moved: &'static str) -> Vec<(&'static str, i64)> {
        let seen = (moved, self.table.mark(moved).unwrap_or_default());
        self.epoch.map(|epoch| (EPOCH_MARK, epoch)).into_iter().chain([seen]).collect()
    }

    /// Whether the table as it was seen last has this mark there, in the epoch of the log.
    fn is_at(&self, mark: &str, version: u64) -> bool {
        let is_epoch = self.epoch.is_none() || self.table.mark(EPOCH_MARK) == self.epoch;
        is_epoch && self.table.mark(mark) == Some(cursor_of(version))
    }

    /// Erases what was purged from earlier versions of the table as well.
    fn erase_purged(&mut self, withheld: &WithheldRules) -> Result<(), LakeFault> {
        let expected = self.expected_marks(ERASED_MARK);
        let erased = self.table.mark(ERASED_MARK).map_or(0, offset_of);
        let erased = if erased > withheld.version() { 0 } else { erased };
        let (changes, _) = withheld.changes_and_rules(erased);
        if self.runtime.block_on(rules::erase_purged(&mut self.table, &changes))? {
            let version = erased + changes.len() as u64;
            let set = self.table.set_mark(ERASED_MARK, cursor_of(version), &expected);
            match self.runtime.block_on(set) {
                Err(LakeError::Superseded { .. }) if self.is_at(ERASED_MARK, version) => {}
                done => done?,
            }
        }
        Ok(())
    }
}

/// An offset as a number of the table. No log reaches 2^63.
fn cursor_of(offset: Offset) -> i64 {
    i64::try_from(offset).unwrap_or(i64::MAX)
}

/// The inverse of [`cursor_of`].
fn offset_of(number: i64) -> Offset {
    u64::try_from(number).unwrap_or(0)
}
