//! Going back: all rows from a value of the order column on leave the table, in one commit that also moves the cursor back,
//! and are kept beside it.
//!
//! They are in a folder whose name begins with `_`: no reader of the table looks there, and no vacuum deletes it. Each file
//! has the name that it had, so that a second attempt after a kill writes over what the first one left.

use std::collections::BTreeSet;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{Array, BooleanArray, RecordBatch};
use arrow_select::filter::filter_record_batch;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};

use super::rewrite::{REWRITE_ATTEMPTS_MAX, RowSource, aside_path, ended_action, names_aside};
use super::{LakeTable, commit_info, mark_action, mark_app, now_ms, object_path};
use crate::actions::{AddFile, AppTransaction, LogAction};
use crate::data_file::{DataFile, DataFileWriter, read_rows};
use crate::error::LakeError;
use crate::snapshot::TableSnapshot;

/// The folder, in that of a set-back, of the rows that were not in the table but aside.
const WITHHELD_FOLDER: &str = "withheld";

/// What a table goes back to.
#[derive(Clone, Copy, Debug)]
pub struct SetBackOrder<'a> {
    /// A [mark](LakeTable::mark) that the same commit sets. Where it is already, or is further, nothing is done.
    pub mark: (&'a str, i64),
    /// The first value of the order column that the table has no longer; `None`: all rows stay.
    pub from: Option<i64>,
    /// Marks that go back to 0 together with rows, if they were ever set.
    pub reset: &'a [&'a str],
    /// The folder of the rows that leave. Its name begins with `_`.
    pub folder: &'a str,
}

impl SetBackOrder<'_> {
    /// Puts back the marks that go back.
    fn reset_actions(&self, snapshot: &TableSnapshot, app_id: &str) -> impl Iterator<Item = LogAction> {
        let names = self.from.iter().flat_map(|_| self.reset);
        let was_set = names.filter(|name| snapshot.cursor(&mark_app(app_id, name)).is_some());
        was_set.filter_map(|name| mark_action(snapshot, app_id, name, 0))
    }
}

/// What a set-back has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetBackReport {
    /// Files that have left the table, or were written anew.
    pub files: usize,
    /// Rows that were in the table, or aside, and are in the folder now.
    pub rows: u64,
}

/// What becomes of one file.
struct SplitFile {
    actions: Vec<LogAction>,
    /// Where its rows are that leave.
    kept_at: Path,
    rows: u64,
}

impl LakeTable {
    /// Takes the rows of the order out of the table. `None`: the mark was there already, or somebody else was faster. One file
    /// at a time is in memory.
    ///
    /// # Errors
    ///
    /// The store's. Then nothing has changed, or everything; to call it again is harmless.
    pub async fn set_back(&mut self, order: &SetBackOrder<'_>) -> Result<Option<SetBackReport>, LakeError> {
        let (app_id, (mark, version)) = (self.spec.app_id.clone(), order.mark);
        let order_column = self.spec.order_column.clone();
        let is_beyond = |file: &AddFile| {
            let last = file.bounds(&order_column).map(|(_, last)| last);
            order.from.is_some_and(|from| last.is_none_or(|last| last >= from))
        };
        let mut written: BTreeSet<Path> = BTreeSet::new();
        for _ in 0..REWRITE_ATTEMPTS_MAX {
            self.refresh().await?;
            // Before anything is written: what is there now came behind it.
            if self.mark(mark).is_some_and(|reached| reached >= version) {
                return Ok(None);
            }
            let selected: Vec<AddFile> = self.snapshot.files().filter(|f| is_beyond(f)).cloned().collect();
            let all_aside = names_aside(&self.snapshot);
            let (splits, ended) = self.split_files(order, &selected, &all_aside).await?;
            let actions: Vec<LogAction> = splits.iter().flat_map(|split| split.actions.clone()).collect();
            let (mut is_outdated, mut is_done) = (false, false);
            self.commit(|snapshot| {
                is_done = snapshot.cursor(&mark_app(&app_id, mark)).is_some_and(|reached| reached >= version);
                let paths = snapshot.files().filter(|f| is_beyond(f)).map(|f| &f.path);
                is_outdated =
                    !paths.eq(selected.iter().map(|f| &f.path)) || names_aside(snapshot) != all_aside;
                let cursor = snapshot.cursor(&app_id).zip(order.from).filter(|(cursor, from)| cursor >= from);
                let moved = cursor.map(|(_, from)| {
                    let app_id = app_id.clone();
                    AppTransaction { app_id, version: from - 1, last_updated: Some(now_ms()) }.into()
                });
                let marked = mark_action(snapshot, &app_id, mark, version);
                let marks = order.reset_actions(snapshot, &app_id).chain(marked);
                let changes: Vec<LogAction> = actions.iter().cloned().chain(moved).chain(marks).collect();
                Ok((!is_done && !is_outdated).then(|| [vec![commit_info("DELETE")], changes].concat()))
            })
            .await?;
            let kept: BTreeSet<Path> = splits.iter().map(|split| split.kept_at.clone()).collect();
            if is_done {
                return Ok(None);
            }
            if !is_outdated {
                let left = written.difference(&kept).cloned();
                self.delete_objects(left.chain(ended.iter().map(|name| aside_path(name))).collect()).await?;
                self.checkpoint_if_due().await;
                let rows = splits.iter().map(|split| split.rows).sum();
                return Ok(Some(SetBackReport { files: splits.len(), rows }));
            }
            written.extend(kept);
        }
        Err(LakeError::Contended { attempts: REWRITE_ATTEMPTS_MAX })
    }

    /// Splits files of the table and files aside. Also returns the names of those aside that are replaced.
    async fn split_files(
        &self,
        order: &SetBackOrder<'_>,
        files: &[AddFile],
        aside: &[String],
    ) -> Result<(Vec<SplitFile>, Vec<String>), LakeError> {
        let (mut splits, mut ended) = (Vec::new(), Vec::new());
        let Some(from) = order.from else { return Ok((splits, ended)) };
        for file in files {
            let kept_at = object_path(&format!("{}/{}", order.folder, file.path))?;
            splits.extend(self.split_file(RowSource::Table(file.clone()), from, kept_at).await?);
        }
        for name in aside {
            let source =
                RowSource::Aside { partition: self.partition_aside(name).await?, name: name.clone() };
            let kept_at = Path::from(format!("{}/{WITHHELD_FOLDER}/{name}.parquet", order.folder));
            if let Some(split) = self.split_file(source, from, kept_at).await? {
                splits.push(split);
                ended.push(name.clone());
            }
        }
        Ok((splits, ended))
    }

    /// Stores the rows of a file from `from` on at `kept_at`, and the others in a file of their own; `None` if there are
    /// none from there on.
    async fn split_file(
        &self,
        source: RowSource,
        from: i64,
        kept_at: Path,
    ) -> Result<Option<SplitFile>, LakeError> {
        let bytes = self.store.get(&source.path()?).await?.bytes().await?;
        let (mut stays, mut leaves) = (None, None);
        for rows in read_rows(bytes)? {
            let rows = rows?;
            let is_beyond = self.rows_from(&rows, from)?;
            let is_before: BooleanArray = is_beyond.iter().map(|beyond| beyond.map(|b| !b)).collect();
            self.write_rows(&source, &rows, &is_beyond, &mut leaves)?;
            self.write_rows(&source, &rows, &is_before, &mut stays)?;
        }
        let Some(leaves) = leaves else { return Ok(None) };
        let rows = leaves.rows();
        let file = leaves.finish()?;
        self.store.put(&kept_at, PutPayload::from_bytes(file.bytes)).await?;
        let mut actions = vec![ended_action(&source)];
        if let Some(stays) = stays.map(DataFileWriter::finish).transpose()? {
            actions.extend(self.put_split(&source, stays).await?);
        }
        Ok(Some(SplitFile { actions, kept_at, rows }))
    }

    /// Stores what stays of a file where that was.
    async fn put_split(&self, source: &RowSource, file: DataFile) -> Result<Vec<LogAction>, LakeError> {
        match source {
            RowSource::Aside { .. } => self.put_aside(std::slice::from_ref(&file)).await,
            RowSource::Table(_) => {
                self.put_files(std::slice::from_ref(&file)).await?;
                Ok(vec![file.action.into()])
            }
        }
    }

    fn rows_from(&self, rows: &RecordBatch, from: i64) -> Result<BooleanArray, LakeError> {
        let column = &self.spec.order_column;
        let values = rows.column_by_name(column).and_then(|values| values.as_primitive_opt::<Int64Type>());
        let values = values.ok_or_else(|| {
            LakeError::OtherTable(format!("a file of it has no column {column:?} of integers"))
        })?;
        Ok((0..values.len()).map(|row| Some(values.is_valid(row) && values.value(row) >= from)).collect())
    }

    fn write_rows(
        &self,
        source: &RowSource,
        rows: &RecordBatch,
        which: &BooleanArray,
        writer: &mut Option<DataFileWriter>,
    ) -> Result<(), LakeError> {
        if which.true_count() == 0 {
            return Ok(());
        }
        let new = || DataFileWriter::new(rows.schema(), source.partition().clone(), self.file_settings());
        let writer = match writer {
            Some(writer) => writer,
            None => writer.insert(new()?),
        };
        writer.write(&filter_record_batch(rows, which)?)
    }
}
