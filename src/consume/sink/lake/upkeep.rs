//! What a lake needs now and then: small files are merged, and what is too old is taken out of the table and deleted.

use std::time::{Duration, Instant};

use headgate_bridge_delta::{AddFile, ORPHAN_AGE_MIN};
use tracing::info;

use super::columns::{self, DATASOURCE, DAY, OFFSET};
use super::{LakeFault, LakeSink};
use crate::consume::sink::retention::StoredLimits;
use crate::message::{DatasourceId, TimeMicros, now_micros};

/// How often old files are deleted, and the log of the table is cut.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(15 * 60);
/// How often it is looked for days that are too old.
const LAKE_RETENTION_INTERVAL: Duration = Duration::from_secs(60);
/// How long the log of the table is kept, for those who read an earlier version.
const TABLE_LOG_KEPT: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Merges of small files after a commit. Each holds a file in memory.
const MERGES_PER_COMMIT: usize = 2;
const DAY_US: TimeMicros = 24 * 60 * 60 * 1_000_000;

/// When things were last done, since the table was opened.
#[derive(Default)]
pub(super) struct UpkeepTimes {
    upkept_at: Option<Instant>,
    pruned_at: Option<Instant>,
}

impl LakeSink {
    /// Merges small files, and now and then deletes what is no longer read. What fails there is tried again later.
    pub(super) fn keep_up(&mut self) -> Result<(), LakeFault> {
        self.runtime.block_on(self.table.compact(MERGES_PER_COMMIT))?;
        if self.upkeep.upkept_at.is_some_and(|at| at.elapsed() < UPKEEP_INTERVAL) {
            return Ok(());
        }
        self.upkeep.upkept_at = Some(Instant::now());
        self.runtime.block_on(async {
            self.table.vacuum(self.settings.removed_kept, ORPHAN_AGE_MIN).await?;
            self.table.expire_log(TABLE_LOG_KEPT).await
        })?;
        Ok(())
    }

    /// Takes whole days out of the table that are too old, and whole files of datasources that have too much, the oldest
    /// first, if it is time to look.
    ///
    /// # Errors
    /// [`LakeFault`].
    pub(in crate::consume) fn keep_within(
        &mut self,
        limits: impl FnOnce() -> Vec<(DatasourceId, StoredLimits)>,
    ) -> Result<(), LakeFault> {
        let is_early = self.upkeep.pruned_at.is_some_and(|at| at.elapsed() < LAKE_RETENTION_INTERVAL);
        if is_early || self.other_writer.is_some() {
            return Ok(());
        }
        self.upkeep.pruned_at = Some(Instant::now());
        let mut bounds: Vec<FileBound> = limits().iter().filter_map(|limit| self.bound_of(limit)).collect();
        if self.settings.retention_days > 0 {
            let days = i64::try_from(self.settings.retention_days).unwrap_or(i64::MAX);
            bounds.push(FileBound {
                datasource: None,
                oldest_day: Some(first_day_kept(days)),
                oldest_row: None,
            });
        }
        if bounds.is_empty() {
            return Ok(());
        }
        let is_over = |file: &AddFile| bounds.iter().any(|bound| bound.is_passed_by(file));
        let dropped = self.runtime.block_on(self.table.drop_files(is_over))?;
        if dropped > 0 {
            info!(files = dropped, "the oldest files are no longer part of the lake");
        }
        Ok(())
    }

    /// Which files are over the limits of a datasource. Those of its ended incarnations have another name.
    fn bound_of(&self, (scope, limits): &(DatasourceId, StoredLimits)) -> Option<FileBound> {
        let (datasource, _) = scope.of_scope();
        let datasource = datasource.as_str();
        let oldest_row = limits.bytes.and_then(|max| self.oldest_row_within(datasource, max));
        let oldest_day = limits.age_us.map(|age| first_day_kept(age.div_euclid(DAY_US)));
        (oldest_row.is_some() || oldest_day.is_some()).then(|| FileBound {
            datasource: Some(datasource.to_owned()),
            oldest_day,
            oldest_row,
        })
    }

    /// The first row of the oldest file that stays, so that the files of a datasource are at most `bytes_max`; `None`: all.
    fn oldest_row_within(&self, datasource: &str, bytes_max: u64) -> Option<i64> {
        let files =
            self.table.snapshot().files().filter(|file| file.partition(DATASOURCE) == Some(datasource));
        let mut sizes: Vec<(i64, u64)> = files
            .filter_map(|file| Some((file.bounds(OFFSET)?.0, u64::try_from(file.size).unwrap_or(0))))
            .collect();
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        let mut all = 0;
        let is_within = |(_, size): &&(i64, u64)| {
            all += size;
            all <= bytes_max
        };
        let staying = sizes.iter().take_while(is_within).count();
        if staying == sizes.len() {
            return None;
        }
        // The newest file stays in any case: a datasource that is over its limit is not empty.
        Some(sizes[staying.max(1) - 1].0)
    }
}

/// The oldest rows that stay.
struct FileBound {
    /// `None`: of all datasources.
    datasource: Option<String>,
    oldest_day: Option<String>,
    oldest_row: Option<i64>,
}

impl FileBound {
    fn is_passed_by(&self, file: &AddFile) -> bool {
        if self.datasource.as_deref().is_some_and(|datasource| file.partition(DATASOURCE) != Some(datasource))
        {
            return false;
        }
        let is_old = match (&self.oldest_day, file.partition(DAY)) {
            (Some(oldest), Some(day)) => day < oldest.as_str(),
            _ => false,
        };
        let first = || file.bounds(OFFSET).map(|(first, _)| first);
        is_old || self.oldest_row.is_some_and(|oldest| first().is_some_and(|first| first < oldest))
    }
}

/// The oldest of the last `days` whole days before today.
fn first_day_kept(days: i64) -> String {
    columns::day_text(columns::day_of(now_micros()).saturating_sub(days))
}
