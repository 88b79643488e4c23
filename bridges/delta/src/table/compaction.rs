//! Small files become large ones. Every append leaves a file for each partition that it touches; readers pay for each.
//!
//! Files of about the same size are merged when there are enough of them, so that a row is written again only when its
//! file becomes several times as large: a few times in all. Rows stay in their order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow_array::{RecordBatch, new_null_array};
use arrow_schema::{Schema, SchemaRef};
use bytes::Bytes;
use object_store::ObjectStoreExt;
use parquet::arrow::arrow_reader::ParquetRecordBatchReader;

use super::{LakeTable, commit_info, now_ms, object_path};
use crate::actions::{AddFile, LogAction, RemoveFile};
use crate::columns::TableSchema;
use crate::data_file::{DataFile, DataFileWriter, PartitionValues, read_rows};
use crate::error::LakeError;
use crate::snapshot::TableSnapshot;

/// Files whose sizes differ by less than this factor count as of the same size.
const SIZE_CLASS_FACTOR: u64 = 8;

impl LakeTable {
    /// Merges small files of the same partition, at most `merges_max` times. Returns how many merges there were; fewer
    /// than `merges_max` says that nothing is left to do.
    ///
    /// # Errors
    ///
    /// The store's, and files that are no Parquet. What was merged until then stays.
    pub async fn compact(&mut self, merges_max: usize) -> Result<usize, LakeError> {
        let mut merged = 0;
        self.catch_up().await?;
        // Files with columns of types that are unknown here cannot be merged, and are not tried twice.
        let mut passed_over = BTreeSet::new();
        while merged < merges_max
            && let Some(group) = self.next_group(&passed_over)
        {
            match self.merge(&group).await? {
                true => merged += 1,
                false => passed_over.extend(group.iter().map(|file| file.path.clone())),
            }
        }
        self.checkpoint_if_due().await;
        Ok(merged)
    }

    /// Files of one partition and size class that are enough for a merge, in the order of their rows.
    fn next_group(&self, passed_over: &BTreeSet<String>) -> Option<Vec<AddFile>> {
        let settings = self.file_settings();
        let target = settings.file_bytes_target as u64;
        let mut classes: BTreeMap<(&PartitionValues, u32), Vec<&AddFile>> = BTreeMap::new();
        for file in self.snapshot.files().filter(|file| !passed_over.contains(&file.path)) {
            if let Some(class) = size_class(file.size, target) {
                classes.entry((&file.partition_values, class)).or_default().push(file);
            }
        }
        let mut group = classes.into_values().find(|files| files.len() >= settings.merge_files_min.max(2))?;
        group.sort_by_key(|file| file.bounds(&self.spec.order_column));
        let mut size = 0;
        let end = group.iter().position(|file| {
            size += u64::try_from(file.size).unwrap_or(0);
            size > target
        });
        group.truncate(end.unwrap_or(group.len()).max(2));
        Some(group.into_iter().cloned().collect())
    }

    /// False when the group was left as it is.
    async fn merge(&mut self, group: &[AddFile]) -> Result<bool, LakeError> {
        let mut readers = Vec::new();
        for file in group {
            let bytes: Bytes = self.store.get(&object_path(&file.path)?).await?.bytes().await?;
            readers.push(read_rows(bytes)?);
        }
        let Some(file) = self.merged_file(&group[0].partition_values, readers)? else {
            return Ok(false);
        };
        self.put_files(std::slice::from_ref(&file)).await?;
        self.commit(|snapshot| Ok(plan_merge(snapshot, group, &file))).await
    }

    fn merged_file(
        &self,
        partition: &PartitionValues,
        readers: Vec<ParquetRecordBatchReader>,
    ) -> Result<Option<DataFile>, LakeError> {
        let schemas: Vec<SchemaRef> = readers.iter().map(arrow_array::RecordBatchReader::schema).collect();
        let Some(schema) = merged_schema(self.snapshot.schema(), &schemas) else {
            return Ok(None);
        };
        let mut writer = DataFileWriter::new(schema.clone(), partition.clone(), self.file_settings())?;
        for batch in readers.into_iter().flatten() {
            writer.write(&widened(&batch?, &schema)?)?;
        }
        let mut file = writer.finish()?;
        file.action.data_change = false;
        Ok(Some(file))
    }
}

/// `None` for files that are large enough.
fn size_class(size: i64, target: u64) -> Option<u32> {
    let share = target / u64::try_from(size).ok()?.max(1);
    (share >= 2).then(|| share.ilog(SIZE_CLASS_FACTOR))
}

/// The columns of all files, in the table's order; `None` when a file has one that the table does not know as such.
fn merged_schema(table: &TableSchema, files: &[SchemaRef]) -> Option<SchemaRef> {
    let mut names = BTreeSet::new();
    for field in files.iter().flat_map(|schema| schema.fields()) {
        let column = table.column(field.name())?;
        if column.name != *field.name() || column.column_type.arrow_type() != *field.data_type() {
            return None;
        }
        names.insert(field.name());
    }
    let fields: Vec<_> = table
        .columns()
        .iter()
        .filter(|c| names.contains(&c.name))
        .map(|column| column.arrow_field())
        .collect();
    Some(Arc::new(Schema::new(fields)))
}

/// Rows with all columns of `schema`: null where they had none.
fn widened(rows: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, LakeError> {
    let columns = schema.fields().iter().map(|field| match rows.column_by_name(field.name()) {
        Some(column) => column.clone(),
        None => new_null_array(field.data_type(), rows.num_rows()),
    });
    Ok(RecordBatch::try_new(schema.clone(), columns.collect())?)
}

/// `None` when somebody has taken one of the files in the meantime.
fn plan_merge(snapshot: &TableSnapshot, group: &[AddFile], file: &DataFile) -> Option<Vec<LogAction>> {
    if !group.iter().all(|old| snapshot.has_file(&old.path)) {
        return None;
    }
    let now = now_ms();
    let mut actions = vec![commit_info("OPTIMIZE")];
    actions.extend(group.iter().map(|old| LogAction::from(RemoveFile::of(old, now, false))));
    actions.push(file.action.clone().into());
    Some(actions)
}
