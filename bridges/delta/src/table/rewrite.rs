//! Rows that have to be elsewhere: in another partition, aside, or nowhere. The files that have them are written anew, in
//! one commit.
//!
//! Rows aside are kept and not in the table: files in `_aside/`, which no reader of the table looks at. Each of them
//! counts from the commit on that names it, by a transaction `aside/NAME` of version 0, up to the one that says version 1:
//! so a kill leaves no row both here and there, and none nowhere.

use std::collections::BTreeMap;

use arrow_array::{BooleanArray, RecordBatch};
use arrow_select::filter::filter_record_batch;
use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};

use super::{LakeTable, check_marks, commit_info, mark_action, now_ms, object_path};
use crate::actions::{AddFile, AppTransaction, LogAction, RemoveFile};
use crate::data_file::{DataFile, DataFileWriter, PartitionValues, partition_of, read_rows};
use crate::error::LakeError;
use crate::snapshot::TableSnapshot;

/// How often a rewrite begins again because the files were others in the meantime.
pub(super) const REWRITE_ATTEMPTS_MAX: u32 = 5;
/// The folder of what is aside. Its name begins with `_`, so that readers leave it alone.
const ASIDE_FOLDER: &str = "_aside";
/// What the transactions of files aside begin with.
const ASIDE_APP: &str = "aside/";
/// The version that says that a file aside counts, and the one that says that it no longer does.
const ASIDE_COUNTS: i64 = 0;
const ASIDE_ENDED: i64 = 1;

/// Where rows belong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RowTarget {
    /// In the table, in this partition.
    Table(PartitionValues),
    /// Kept, and not in the table.
    Aside,
    /// Nowhere.
    Nowhere,
}

/// Which rows of a batch belong where. Each row belongs to exactly one target.
pub type RowTargets = Vec<(RowTarget, BooleanArray)>;

/// What a rewrite has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RewriteReport {
    /// Files that were written anew, or removed because nothing was left of them.
    pub files: usize,
    /// Rows that were in the table and are aside now, or nowhere.
    pub rows_removed: u64,
}

/// Where rows are: in a file of the table, or in one aside.
#[derive(Clone)]
pub(super) enum RowSource {
    Table(AddFile),
    Aside { name: String, partition: PartitionValues },
}

impl RowSource {
    pub(super) fn path(&self) -> Result<Path, LakeError> {
        match self {
            Self::Table(file) => object_path(&file.path),
            Self::Aside { name, .. } => Ok(aside_path(name)),
        }
    }

    pub(super) fn partition(&self) -> &PartitionValues {
        match self {
            Self::Table(file) => &file.partition_values,
            Self::Aside { partition, .. } => partition,
        }
    }

    /// Where its rows are if nothing is done.
    fn target(&self) -> RowTarget {
        match self {
            Self::Table(file) => RowTarget::Table(file.partition_values.clone()),
            Self::Aside { .. } => RowTarget::Aside,
        }
    }
}

impl LakeTable {
    /// Asks `sort` where the rows belong of all files that `selects`, and of all files aside, and commits what has to
    /// change, all at once. `sort` gets the partition that rows are in (or were, of those aside). One file at a time is in
    /// memory, and what it becomes.
    ///
    /// # Errors
    ///
    /// The store's, and those of `sort`. Then nothing has changed, or everything; to call it again is harmless when
    /// `sort` says the same again.
    pub async fn rewrite(
        &mut self,
        selects: impl Fn(&AddFile) -> bool,
        sort: impl FnMut(&PartitionValues, &RecordBatch) -> Result<RowTargets, LakeError>,
    ) -> Result<RewriteReport, LakeError> {
        self.rewrite_with_mark(None, &[], selects, sort).await
    }

    /// As [`LakeTable::rewrite`], and sets a [mark](LakeTable::mark) in the same commit, also when no row has to move: an
    /// append that expects the mark to be where it was is then too late. `expected` are marks that it depends on itself, and
    /// where they are; 0 if one was never set.
    ///
    /// # Errors
    ///
    /// As there, and [`LakeError::Superseded`] when one of these is elsewhere; then nothing has changed.
    pub async fn rewrite_with_mark(
        &mut self,
        mark: Option<(&str, i64)>,
        expected: &[(&str, i64)],
        selects: impl Fn(&AddFile) -> bool,
        mut sort: impl FnMut(&PartitionValues, &RecordBatch) -> Result<RowTargets, LakeError>,
    ) -> Result<RewriteReport, LakeError> {
        let app_id = self.spec.app_id.clone();
        for _ in 0..REWRITE_ATTEMPTS_MAX {
            self.refresh().await?;
            let selected: Vec<AddFile> = self.snapshot.files().filter(|f| selects(f)).cloned().collect();
            let mut report = RewriteReport::default();
            let mut actions = Vec::new();
            for file in &selected {
                actions.extend(self.sort_file(RowSource::Table(file.clone()), &mut sort, &mut report).await?);
            }
            let mut ended = Vec::new();
            let all_aside = names_aside(&self.snapshot);
            for name in &all_aside {
                let source =
                    RowSource::Aside { partition: self.partition_aside(name).await?, name: name.clone() };
                let changes = self.sort_file(source, &mut sort, &mut report).await?;
                if !changes.is_empty() {
                    ended.push(name.clone());
                    actions.extend(changes);
                }
            }
            let mut is_outdated = false;
            self.commit(|snapshot| {
                check_marks(snapshot, &app_id, expected)?;
                // A commit of another writer may have replaced files, or brought some that have not been looked at.
                let paths = snapshot.files().filter(|f| selects(f)).map(|f| &f.path);
                is_outdated =
                    !paths.eq(selected.iter().map(|f| &f.path)) || names_aside(snapshot) != all_aside;
                let moved = mark.and_then(|(name, version)| mark_action(snapshot, &app_id, name, version));
                let changes: Vec<LogAction> = actions.iter().cloned().chain(moved).collect();
                Ok((!is_outdated && !changes.is_empty())
                    .then(|| [vec![commit_info("UPDATE")], changes].concat()))
            })
            .await?;
            if !is_outdated {
                // What a kill leaves of them a vacuum takes.
                self.delete_objects(ended.iter().map(|name| aside_path(name)).collect()).await?;
                self.checkpoint_if_due().await;
                return Ok(report);
            }
        }
        Err(LakeError::Contended { attempts: REWRITE_ATTEMPTS_MAX })
    }

    /// Takes all rows of the files that `selects` out of the table, in one commit. Returns how many files they are.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn drop_files(&mut self, selects: impl Fn(&AddFile) -> bool) -> Result<usize, LakeError> {
        let mut dropped = 0;
        self.commit(|snapshot: &TableSnapshot| {
            let now = now_ms();
            let removes: Vec<LogAction> = snapshot
                .files()
                .filter(|f| selects(f))
                .map(|f| RemoveFile::of(f, now, true).into())
                .collect();
            dropped = removes.len();
            Ok((!removes.is_empty()).then(|| [vec![commit_info("DELETE")], removes].concat()))
        })
        .await?;
        self.checkpoint_if_due().await;
        Ok(dropped)
    }

    /// The rows aside, file by file, with the partition that they were in.
    ///
    /// # Errors
    ///
    /// The store's, and a file that is no Parquet.
    pub async fn read_aside(&self) -> Result<Vec<(PartitionValues, Vec<RecordBatch>)>, LakeError> {
        let mut files = Vec::new();
        for name in names_aside(&self.snapshot) {
            let bytes = self.store.get(&aside_path(&name)).await?.bytes().await?;
            files.push((partition_of(&bytes)?, read_rows(bytes)?.collect::<Result<_, _>>()?));
        }
        Ok(files)
    }

    /// Stores files aside. Returns the actions from which on they count.
    pub(super) async fn put_aside(&self, files: &[DataFile]) -> Result<Vec<LogAction>, LakeError> {
        let mut actions = Vec::new();
        for file in files {
            let name = format!("{:032x}", rand::random::<u128>());
            self.store.put(&aside_path(&name), PutPayload::from_bytes(file.bytes.clone())).await?;
            actions.push(aside_action(&name, ASIDE_COUNTS));
        }
        Ok(actions)
    }

    /// The objects of the files aside that count.
    pub(super) fn paths_aside(&self) -> impl Iterator<Item = Path> {
        names_aside(&self.snapshot).into_iter().map(|name| aside_path(&name))
    }

    pub(super) async fn partition_aside(&self, name: &str) -> Result<PartitionValues, LakeError> {
        partition_of(&self.store.get(&aside_path(name)).await?.bytes().await?)
    }

    /// Stores the files that the rows of `source` are to be in. Returns the actions that put those in its place; none when
    /// all rows are where they belong.
    async fn sort_file(
        &self,
        source: RowSource,
        sort: &mut impl FnMut(&PartitionValues, &RecordBatch) -> Result<RowTargets, LakeError>,
        report: &mut RewriteReport,
    ) -> Result<Vec<LogAction>, LakeError> {
        let bytes: Bytes = self.store.get(&source.path()?).await?.bytes().await?;
        let (stays, mut all_stay) = (source.target(), true);
        for batch in read_rows(bytes.clone())? {
            let targets = sort(source.partition(), &batch?)?;
            all_stay &= targets.iter().all(|(target, rows)| *target == stays || rows.true_count() == 0);
        }
        if all_stay {
            return Ok(Vec::new());
        }
        let mut writers: BTreeMap<RowTarget, DataFileWriter> = BTreeMap::new();
        for batch in read_rows(bytes)? {
            let batch = batch?;
            for (target, rows) in sort(source.partition(), &batch)? {
                self.route(&source, target, &filter_record_batch(&batch, &rows)?, &mut writers, report)?;
            }
        }
        report.files += 1;
        let mut actions = vec![ended_action(&source)];
        for (target, writer) in writers {
            let file = writer.finish()?;
            if target == RowTarget::Aside {
                actions.extend(self.put_aside(std::slice::from_ref(&file)).await?);
            } else {
                self.put_files(std::slice::from_ref(&file)).await?;
                actions.push(file.action.into());
            }
        }
        Ok(actions)
    }

    /// Writes rows of `source` to the file of their target.
    fn route(
        &self,
        source: &RowSource,
        target: RowTarget,
        rows: &RecordBatch,
        writers: &mut BTreeMap<RowTarget, DataFileWriter>,
        report: &mut RewriteReport,
    ) -> Result<(), LakeError> {
        if rows.num_rows() == 0 {
            return Ok(());
        }
        if matches!(source, RowSource::Table(_)) && !matches!(target, RowTarget::Table(_)) {
            report.rows_removed += rows.num_rows() as u64;
        }
        let partition = match &target {
            RowTarget::Table(partition) => partition,
            RowTarget::Aside => source.partition(),
            RowTarget::Nowhere => return Ok(()),
        };
        let writer = match writers.entry(target.clone()) {
            std::collections::btree_map::Entry::Occupied(writer) => writer.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(DataFileWriter::new(rows.schema(), partition.clone(), self.file_settings())?)
            }
        };
        writer.write(rows)
    }
}

/// The files aside that count.
pub(super) fn names_aside(snapshot: &TableSnapshot) -> Vec<String> {
    let counting = snapshot.transactions().filter(|t| t.version == ASIDE_COUNTS);
    counting.filter_map(|t| t.app_id.strip_prefix(ASIDE_APP).map(str::to_owned)).collect()
}

/// Says that a file no longer counts.
pub(super) fn ended_action(source: &RowSource) -> LogAction {
    match source {
        RowSource::Table(file) => RemoveFile::of(file, now_ms(), true).into(),
        RowSource::Aside { name, .. } => aside_action(name, ASIDE_ENDED),
    }
}

fn aside_action(name: &str, version: i64) -> LogAction {
    AppTransaction { app_id: aside_app(name), version, last_updated: Some(now_ms()) }.into()
}

fn aside_app(name: &str) -> String {
    format!("{ASIDE_APP}{name}")
}

pub(super) fn aside_path(name: &str) -> Path {
    Path::from(format!("{ASIDE_FOLDER}/{name}.parquet"))
}

/// Whether an object is a file aside, counting or not.
pub(super) fn is_aside(path: &Path) -> bool {
    path.parts().next().is_some_and(|folder| folder.as_ref() == ASIDE_FOLDER)
}
