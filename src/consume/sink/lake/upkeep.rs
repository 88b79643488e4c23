//! What a lake needs now and then: small files are merged, and what is too old is taken out of the table and deleted.

use std::time::{Duration, Instant};

use hashbrown::HashMap;
use headgate_bridge_delta::{AddFile, ORPHAN_AGE_MIN};
use tracing::info;

use super::columns::{self, DATASOURCE, DAY, DAY_US, OFFSET};
use super::{LakeFault, LakeSink};
use crate::consume::sink::retention::StoredLimits;
use crate::message::{DatasourceId, now_micros};

/// How often old files are deleted, and the log of the table is cut.
const LAKE_UPKEEP_INTERVAL: Duration = Duration::from_secs(15 * 60);
/// How often it is looked for days that are too old.
const LAKE_RETENTION_INTERVAL: Duration = Duration::from_secs(60);
/// How long the log of the table is kept, for those who read an earlier version.
const TABLE_LOG_KEPT: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Merges take this part of the time. Each holds a file in memory.
const MERGE_TIME_SHARE: u32 = 4;

/// When things were last done, since the table was opened.
#[derive(Default)]
pub(super) struct UpkeepTimes {
    upkept_at: Option<Instant>,
    pruned_at: Option<Instant>,
}

impl LakeSink {
    /// Merges small files, for about a quarter of the time since the last commit, and now and then deletes what is no
    /// longer read. What fails there is tried again later.
    pub(super) fn keep_up(&mut self, since_commit: Duration) -> Result<(), LakeFault> {
        let (begun, most) = (Instant::now(), since_commit / MERGE_TIME_SHARE);
        let merged = loop {
            match self.runtime.block_on(self.table.compact(1)) {
                Ok(1..) if begun.elapsed() < most => {}
                done => break done,
            }
        };
        if self.upkeep.upkept_at.is_some_and(|at| at.elapsed() < LAKE_UPKEEP_INTERVAL) {
            merged?;
            return Ok(());
        }
        // Also where a file cannot be merged.
        self.upkeep.upkept_at = Some(Instant::now());
        self.runtime.block_on(async {
            self.table.vacuum(self.settings.removed_kept, ORPHAN_AGE_MIN).await?;
            self.table.expire_log(TABLE_LOG_KEPT).await
        })?;
        merged?;
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
        let retention_days = i64::try_from(self.settings.retention_days).unwrap_or(i64::MAX);
        let bounds = FileBounds {
            oldest_day: (retention_days > 0).then(|| first_day_kept(retention_days)),
            of_datasources: self.datasource_bounds(&limits()),
        };
        let dropped = self.runtime.block_on(self.table.drop_files(|file| bounds.are_passed_by(file)))?;
        if dropped > 0 {
            info!(files = dropped, "the oldest files are no longer part of the lake");
        }
        Ok(())
    }

    /// Which files are over the limits of datasources. Those of ended incarnations have another name.
    fn datasource_bounds(&self, limits: &[(DatasourceId, StoredLimits)]) -> HashMap<String, FileBound> {
        let mut bounds: HashMap<String, FileBound> = HashMap::new();
        let mut bytes_max: HashMap<String, u64> = HashMap::new();
        for (scope, limits) in limits {
            let datasource = scope.of_scope().0.as_str().to_owned();
            // A day is over when its last record is.
            let days = limits.age_us.map(|age| age.saturating_add(DAY_US - 1).div_euclid(DAY_US));
            let bound = FileBound { oldest_day: days.map(first_day_kept), oldest_row: None };
            bounds.insert(datasource.clone(), bound);
            bytes_max.extend(limits.bytes.map(|max| (datasource, max)));
        }
        let mut sizes: HashMap<&str, Vec<(i64, u64)>> = HashMap::new();
        for file in self.table.snapshot().files() {
            if let Some(datasource) = file.partition(DATASOURCE)
                && bytes_max.contains_key(datasource)
                && let Some((first, _)) = file.bounds(OFFSET)
            {
                let size = u64::try_from(file.size).unwrap_or(0);
                sizes.entry(datasource).or_default().push((first, size));
            }
        }
        for (datasource, sizes) in sizes {
            if let (Some(bound), Some(max)) = (bounds.get_mut(datasource), bytes_max.get(datasource)) {
                bound.oldest_row = oldest_row_within(sizes, *max);
            }
        }
        bounds
    }
}

/// The first row of the oldest file that stays, so that all that stay are at most `bytes_max`; `None`: all stay. The newest
/// one stays in any case: a datasource that is over its limit is not empty.
fn oldest_row_within(mut files: Vec<(i64, u64)>, bytes_max: u64) -> Option<i64> {
    files.sort_unstable_by(|a, b| b.cmp(a));
    let mut all = 0_u64;
    let is_within = |(_, size): &&(i64, u64)| {
        all = all.saturating_add(*size);
        all <= bytes_max
    };
    let staying = files.iter().take_while(is_within).count();
    (staying < files.len()).then(|| files[staying.max(1) - 1].0)
}

/// The oldest files that stay.
struct FileBounds {
    /// Of all datasources.
    oldest_day: Option<String>,
    of_datasources: HashMap<String, FileBound>,
}

/// The oldest rows of a datasource that stay.
struct FileBound {
    oldest_day: Option<String>,
    oldest_row: Option<i64>,
}

impl FileBounds {
    fn are_passed_by(&self, file: &AddFile) -> bool {
        let is_before = |oldest: &Option<String>| match (oldest, file.partition(DAY)) {
            (Some(oldest), Some(day)) => day < oldest.as_str(),
            _ => false,
        };
        let of_datasource = file.partition(DATASOURCE).and_then(|name| self.of_datasources.get(name));
        let is_passed = |bound: &FileBound| {
            is_before(&bound.oldest_day)
                || bound
                    .oldest_row
                    .is_some_and(|oldest| file.bounds(OFFSET).is_some_and(|(first, _)| first < oldest))
        };
        is_before(&self.oldest_day) || of_datasource.is_some_and(is_passed)
    }
}

/// The oldest of the last `days` whole days before today.
fn first_day_kept(days: i64) -> String {
    columns::day_text(columns::day_of(now_micros()).saturating_sub(days))
}
