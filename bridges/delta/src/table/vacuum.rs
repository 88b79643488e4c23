//! What is no longer read is deleted: files that are not part of the table, and the oldest part of its log.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures_util::TryStreamExt;
use futures_util::future::try_join_all;
use object_store::ObjectStoreExt;
use object_store::path::Path;

use super::rewrite::is_aside;
use super::{LakeTable, now_ms, object_path};
use crate::actions::RemoveFile;
use crate::commit_log::{self, LogObject};
use crate::error::LakeError;

/// The age up to which a file that no commit names may still get one: `STORE_TIME_MAX` and a margin for clocks that
/// differ.
pub const ORPHAN_AGE_MIN: Duration = Duration::from_secs(60 * 60);
/// Objects that are deleted at the same time.
const DELETES_AT_ONCE: usize = 8;

/// What a vacuum has deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VacuumReport {
    /// Files that were part of the table.
    pub removed: usize,
    /// Files that never were: their writer was killed, or lost a race.
    pub orphans: usize,
}

impl LakeTable {
    /// Deletes files that were removed from the table more than `removed_kept` ago (who reads an earlier version needs
    /// them until then), and files of no commit that are older than `orphans_kept`. A running writer stores files before
    /// it commits them, so `orphans_kept` below [`ORPHAN_AGE_MIN`] is for those who know that there is none.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn vacuum(
        &mut self,
        removed_kept: Duration,
        orphans_kept: Duration,
    ) -> Result<VacuumReport, LakeError> {
        self.refresh().await?;
        let now = now_ms();
        let removed_before = now - millis(removed_kept);
        let orphans_before = now - millis(orphans_kept);
        let mut active =
            self.snapshot.files().map(|f| object_path(&f.path)).collect::<Result<HashSet<Path>, _>>()?;
        active.extend(self.paths_aside());
        let removed = self
            .snapshot
            .removed_files()
            .map(|f| Ok((object_path(&f.path)?, f.deletion_timestamp.unwrap_or(0))))
            .collect::<Result<HashMap<Path, i64>, LakeError>>()?;
        let mut report = VacuumReport::default();
        let mut doomed = Vec::new();
        let mut objects = self.store.list(None);
        while let Some(object) = objects.try_next().await? {
            if active.contains(&object.location) || is_hidden(&object.location) {
                continue;
            }
            match removed.get(&object.location) {
                Some(&removed_at) if removed_at < removed_before => report.removed += 1,
                None if object.last_modified.timestamp_millis() < orphans_before => report.orphans += 1,
                _ => continue,
            }
            doomed.push(object.location);
        }
        self.delete_objects(doomed).await?;
        self.snapshot.forget_removed_before(removed_before);
        Ok(report)
    }

    /// Deletes at once what `selects` of the files that are no longer part of the table: for what nobody may read any
    /// more. Earlier versions of the table that have these files cannot be read after that.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn erase_removed(&mut self, selects: impl Fn(&RemoveFile) -> bool) -> Result<(), LakeError> {
        self.refresh().await?;
        let doomed = self
            .snapshot
            .removed_files()
            .filter(|f| selects(f))
            .map(|f| object_path(&f.path))
            .collect::<Result<_, _>>()?;
        self.delete_objects(doomed).await
    }

    /// Deletes commits and checkpoints that only those need who read a version older than `kept`. Returns how many.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn expire_log(&mut self, kept: Duration) -> Result<usize, LakeError> {
        let Some(hint) = commit_log::read_hint(&*self.store).await? else {
            return Ok(0);
        };
        let before = now_ms() - millis(kept);
        let objects = commit_log::list_log(&*self.store).await?;
        // Everything is readable from the newest checkpoint on that is old enough itself.
        let first_kept =
            objects.iter().filter(|o| o.last_modified.timestamp_millis() < before).filter_map(|object| {
                match LogObject::of(&object.location)? {
                    LogObject::Checkpoint(version, _) if version <= hint.version => Some(version),
                    _ => None,
                }
            });
        let Some(first_kept) = first_kept.max() else {
            return Ok(0);
        };
        let doomed: Vec<Path> = objects
            .into_iter()
            .map(|object| object.location)
            .filter(|path| match LogObject::of(path) {
                Some(LogObject::Commit(version) | LogObject::Checkpoint(version, _)) => version < first_kept,
                None => false,
            })
            .collect();
        let count = doomed.len();
        self.delete_objects(doomed).await?;
        Ok(count)
    }

    pub(super) async fn delete_objects(&self, paths: Vec<Path>) -> Result<(), LakeError> {
        for paths in paths.chunks(DELETES_AT_ONCE) {
            try_join_all(paths.iter().map(|path| self.delete_object(path))).await?;
        }
        Ok(())
    }

    async fn delete_object(&self, path: &Path) -> Result<(), LakeError> {
        match self.store.delete(path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether a vacuum leaves it alone: the log, and what other engines put beside it.
fn is_hidden(path: &Path) -> bool {
    let is_hidden = |name: &str| name.starts_with('.') || (name.starts_with('_') && !name.contains('='));
    !is_aside(path) && path.parts().any(|part| is_hidden(part.as_ref()))
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX / 2)
}
