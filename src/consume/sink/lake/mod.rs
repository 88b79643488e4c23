//! The sink that is a Delta lake: one table, partitioned by datasource and day, that DuckDB, Polars, Spark and pandas read.
//!
//! Records are collected in memory and committed once an interval, or earlier when they are many: Parquet files for each
//! datasource and day, and one commit that also holds the last offset. So a record is in the table once, whatever is
//! killed. [`columns`] says which columns there are, [`values`] how members of JSON payloads become some.
//!
//! Records in quarantine are not in the table. Those of a leaked key are taken out of it and kept aside, until they are
//! given back or purged ([`rules`]).

mod columns;
mod pending;
mod rules;
mod values;

use std::sync::Arc;
use std::time::{Duration, Instant};

use headgate_bridge_delta::object_store::ObjectStore;
use headgate_bridge_delta::{LakeError, LakePlace, LakeTable, ORPHAN_AGE_MIN, PlaceError, TableAppend};
use tokio::runtime::Runtime;
use tracing::warn;

use self::columns::table_spec;
use self::pending::PendingRows;
use crate::limits::{LAKE_PENDING_BYTES, LAKE_VALUE_COLUMNS_MAX};
use crate::log::{WithheldRules, WithheldSnapshot};
use crate::message::{Offset, RecordFlags, RecordRef, now_micros};

/// How often old files are deleted, old days dropped and the log of the table is cut.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(15 * 60);
/// How long the log of the table is kept, for those who read an earlier version.
const TABLE_LOG_KEPT: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Merges of small files after a commit. Each holds a file in memory.
const MERGES_PER_COMMIT: usize = 2;
/// The cursor of the table that says which rules about leaked keys and deletions its rows follow.
const WITHHELD_MARK: &str = "withheld";

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
    Threads(#[from] std::io::Error),
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
            Self::Table(LakeError::OtherTable(_) | LakeError::ProtocolNewer { .. }) => {
                "name another place in storage.delta.place"
            }
            Self::Table(_) | Self::Threads(_) => "it is tried again",
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
}

/// The open table, and the records that wait for their commit.
pub(in crate::consume) struct LakeSink {
    /// Runs what the store's connections do while this thread encodes.
    runtime: Runtime,
    settings: LakeSettings,
    table: LakeTable,
    pending: PendingRows,
    /// Behind the records that are committed or wait.
    cursor: Offset,
    /// The rules about what is left out, once they are known.
    left_out: Option<WithheldSnapshot>,
    committed_at: Instant,
    upkept_at: Option<Instant>,
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
            cursor: 0,
            left_out: None,
            committed_at: Instant::now(),
            upkept_at: None,
        };
        sink.cursor = sink.committed();
        Ok(sink)
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

    /// Whether it has those rules, since it was opened.
    pub(in crate::consume) fn has_rules(&self) -> bool {
        self.left_out.is_some()
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
        let left_out = self.left_out.clone().unwrap_or_default();
        for record in records {
            if record.offset >= self.cursor && !record.flags.contains(RecordFlags::QUARANTINED) {
                self.pending.push(&record, &left_out);
            }
        }
        self.cursor = self.cursor.max(next);
        let is_due = self.committed_at.elapsed() >= self.settings.interval;
        if self.pending.bytes() >= LAKE_PENDING_BYTES || (is_due && self.cursor > self.committed()) {
            self.commit()?;
        }
        Ok(())
    }

    /// Commits what waits.
    ///
    /// # Errors
    /// [`LakeFault`].
    pub(in crate::consume) fn commit(&mut self) -> Result<(), LakeFault> {
        if self.cursor == self.committed() {
            return Ok(());
        }
        let rows = self.pending.take(self.table.file_settings())?;
        let append = TableAppend {
            previous: self.table.cursor(),
            through: cursor_of(self.cursor - 1),
            columns: rows.columns,
            files: rows.files,
            aside: rows.aside,
        };
        match self.runtime.block_on(self.table.append(&append)) {
            // In a cluster another gateway has stored some of them: this one goes on behind those, and with their columns.
            Err(LakeError::Superseded { .. }) => {
                self.cursor = self.committed();
                self.pending = PendingRows::new(self.table.snapshot().schema(), LAKE_VALUE_COLUMNS_MAX);
            }
            done => drop(done?),
        }
        self.cursor = self.cursor.max(self.committed());
        self.committed_at = Instant::now();
        if let Err(error) = self.keep_up() {
            warn!(%error, "upkeep of the lake");
        }
        Ok(())
    }

    /// Makes the rows that are there follow the rules about what is left out, and those that come.
    ///
    /// # Errors
    /// [`LakeFault`].
    pub(in crate::consume) fn reconcile(&mut self, withheld: &WithheldRules) -> Result<(), LakeFault> {
        let followed = self.withheld_version();
        // A version that is ahead is of another registry. To follow a rule twice does no harm.
        let followed = if followed > withheld.version() { 0 } else { followed };
        let (changes, left_out) = withheld.changes_and_rules(followed);
        if !changes.is_empty() {
            self.commit()?;
            self.runtime.block_on(rules::follow(&mut self.table, &changes, &left_out))?;
        }
        let version = followed + changes.len() as u64;
        if version != self.withheld_version() {
            self.runtime.block_on(self.table.set_mark(WITHHELD_MARK, cursor_of(version)))?;
        }
        self.left_out = Some(left_out);
        Ok(())
    }

    /// Merges small files, and now and then deletes what is no longer read. What fails there is tried again later.
    fn keep_up(&mut self) -> Result<(), LakeFault> {
        self.runtime.block_on(self.table.compact(MERGES_PER_COMMIT))?;
        if self.upkept_at.is_some_and(|at| at.elapsed() < UPKEEP_INTERVAL) {
            return Ok(());
        }
        self.upkept_at = Some(Instant::now());
        if self.settings.retention_days > 0 {
            let days = i64::try_from(self.settings.retention_days).unwrap_or(i64::MAX);
            let oldest = columns::day_text(columns::day_of(now_micros()).saturating_sub(days));
            let is_old = |day: Option<&str>| day.is_some_and(|day| day < oldest.as_str());
            self.runtime.block_on(self.table.drop_files(|file| is_old(file.partition(columns::DAY))))?;
        }
        self.runtime.block_on(async {
            self.table.vacuum(self.settings.removed_kept, ORPHAN_AGE_MIN).await?;
            self.table.expire_log(TABLE_LOG_KEPT).await
        })?;
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
