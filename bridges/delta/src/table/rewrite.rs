//! Rows that are taken out of a table or changed: the files that have them are written anew, in one commit.

use arrow_array::{BooleanArray, RecordBatch};
use arrow_select::filter::filter_record_batch;
use object_store::ObjectStoreExt;

use super::{LakeTable, commit_info, now_ms, object_path};
use crate::actions::{AddFile, LogAction, RemoveFile};
use crate::data_file::{DataFile, DataFileWriter, read_rows};
use crate::error::LakeError;
use crate::snapshot::TableSnapshot;

/// How often a rewrite begins again because the files were others in the meantime.
const REWRITE_ATTEMPTS_MAX: u32 = 5;

/// What becomes of some rows of a file.
#[derive(Debug)]
pub enum RowEdit {
    /// They stay as they are.
    Keep,
    /// These stand instead of them: fewer, or others of the same columns.
    Replace(RecordBatch),
}

impl RowEdit {
    /// The rows of `batch` for which `keeps` is true.
    ///
    /// # Errors
    ///
    /// As many flags as rows are needed.
    pub fn keep_only(batch: &RecordBatch, keeps: &BooleanArray) -> Result<Self, LakeError> {
        if keeps.true_count() == batch.num_rows() {
            return Ok(Self::Keep);
        }
        Ok(Self::Replace(filter_record_batch(batch, keeps)?))
    }
}

/// What a rewrite has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RewriteReport {
    /// Files that were written anew, or removed because nothing was left of them.
    pub files: usize,
    /// Rows that are no longer in the table.
    pub rows_removed: u64,
}

/// A file and what stands for it; `None` when no row is left.
struct FileChange {
    old: AddFile,
    new: Option<DataFile>,
}

impl LakeTable {
    /// Shows `edit` all rows of the files that `selects`, and commits what it makes of them, all at once. One file at a
    /// time is in memory.
    ///
    /// # Errors
    ///
    /// The store's, and those of `edit`. Then nothing has changed, or everything; to call it again is harmless when
    /// `edit` leaves its own work as it is.
    pub async fn rewrite(
        &mut self,
        selects: impl Fn(&AddFile) -> bool,
        mut edit: impl FnMut(&RecordBatch) -> Result<RowEdit, LakeError>,
    ) -> Result<RewriteReport, LakeError> {
        for _ in 0..REWRITE_ATTEMPTS_MAX {
            self.refresh().await?;
            let selected: Vec<AddFile> = self.snapshot.files().filter(|f| selects(f)).cloned().collect();
            let mut report = RewriteReport::default();
            let mut changes = Vec::new();
            for file in &selected {
                if let Some(change) = self.edit_file(file, &mut edit, &mut report).await? {
                    changes.push(change);
                }
            }
            let mut is_outdated = false;
            self.commit(|snapshot| {
                // A commit of another writer may have replaced files, or brought some that have not been looked at.
                let are_same = snapshot
                    .files()
                    .filter(|f| selects(f))
                    .map(|f| &f.path)
                    .eq(selected.iter().map(|f| &f.path));
                is_outdated = !are_same;
                Ok((are_same && !changes.is_empty()).then(|| plan_changes(&changes)))
            })
            .await?;
            if !is_outdated {
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

    /// `None` when `edit` leaves the file as it is.
    async fn edit_file(
        &self,
        file: &AddFile,
        edit: &mut impl FnMut(&RecordBatch) -> Result<RowEdit, LakeError>,
        report: &mut RewriteReport,
    ) -> Result<Option<FileChange>, LakeError> {
        let bytes = self.store.get(&object_path(&file.path)?).await?.bytes().await?;
        let mut writer: Option<DataFileWriter> = None;
        let (mut is_changed, mut rows_before) = (false, 0);
        for batch in read_rows(bytes)? {
            let batch = batch?;
            rows_before += batch.num_rows() as u64;
            let rows = match edit(&batch)? {
                RowEdit::Keep => batch,
                RowEdit::Replace(rows) => {
                    is_changed = true;
                    rows
                }
            };
            let writer = match &mut writer {
                Some(writer) => writer,
                none => none.insert(DataFileWriter::new(
                    rows.schema(),
                    file.partition_values.clone(),
                    self.file_settings(),
                )?),
            };
            writer.write(&rows)?;
        }
        let Some(writer) = writer.filter(|_| is_changed) else {
            return Ok(None);
        };
        report.files += 1;
        report.rows_removed += rows_before.saturating_sub(writer.rows());
        let new = if writer.rows() == 0 { None } else { Some(writer.finish()?) };
        if let Some(new) = &new {
            self.put_files(std::slice::from_ref(new)).await?;
        }
        // The bytes are in the store; only the action is needed from here on.
        let new = new.map(|new| DataFile { bytes: bytes::Bytes::new(), ..new });
        Ok(Some(FileChange { old: file.clone(), new }))
    }
}

fn plan_changes(changes: &[FileChange]) -> Vec<LogAction> {
    let now = now_ms();
    let mut actions = vec![commit_info("DELETE")];
    for change in changes {
        actions.push(RemoveFile::of(&change.old, now, true).into());
        actions.extend(change.new.as_ref().map(|new| LogAction::from(new.action.clone())));
    }
    actions
}
