//! The actions that a checkpoint has, whoever wrote it.

use std::collections::BTreeMap;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, Int64Type};
use arrow_array::{Array, RecordBatch, StructArray};
use bytes::Bytes;

use crate::actions::{
    AddFile, AppTransaction, FileFormat, LogAction, RemoveFile, TableMetadata, TableProtocol,
};
use crate::data_file::read_rows;
use crate::error::LakeError;

/// All actions of the file.
///
/// # Errors
///
/// A file that is no Parquet, or an action without what the protocol demands of it.
pub(crate) fn decode(file: Bytes) -> Result<Vec<LogAction>, LakeError> {
    let mut actions = Vec::new();
    for batch in read_rows(file)? {
        decode_batch(&batch?, &mut actions)?;
    }
    Ok(actions)
}

fn decode_batch(batch: &RecordBatch, actions: &mut Vec<LogAction>) -> Result<(), LakeError> {
    let column = |name: &str| StructReader::of(batch.column_by_name(name).and_then(|c| c.as_struct_opt()));
    let (protocols, metadata, transactions) = (column("protocol"), column("metaData"), column("txn"));
    let (adds, removes) = (column("add"), column("remove"));
    for row in 0..batch.num_rows() {
        if protocols.has(row) {
            actions.push(protocol(&protocols, row)?.into());
        }
        if metadata.has(row) {
            actions.push(table_metadata(&metadata, row)?.into());
        }
        if transactions.has(row) {
            actions.push(transaction(&transactions, row)?.into());
        }
        if adds.has(row) {
            actions.push(add_file(&adds, row)?.into());
        }
        if removes.has(row) {
            actions.push(remove_file(&removes, row)?.into());
        }
    }
    Ok(())
}

/// Reads children of a struct column by name. What is missing is null.
struct StructReader<'a>(Option<&'a StructArray>);

impl<'a> StructReader<'a> {
    fn of(column: Option<&'a StructArray>) -> Self {
        Self(column)
    }

    fn has(&self, row: usize) -> bool {
        self.0.is_some_and(|column| column.is_valid(row))
    }

    fn child(&self, name: &str, row: usize) -> Option<&'a dyn Array> {
        let child = self.0?.column_by_name(name)?;
        child.is_valid(row).then_some(child.as_ref())
    }

    fn text(&self, name: &str, row: usize) -> Option<String> {
        Some(self.child(name, row)?.as_string_opt::<i32>()?.value(row).to_owned())
    }

    fn long(&self, name: &str, row: usize) -> Option<i64> {
        let child = self.child(name, row)?;
        if let Some(longs) = child.as_primitive_opt::<Int64Type>() {
            return Some(longs.value(row));
        }
        Some(child.as_primitive_opt::<Int32Type>()?.value(row).into())
    }

    fn flag(&self, name: &str, row: usize) -> Option<bool> {
        Some(self.child(name, row)?.as_boolean_opt()?.value(row))
    }

    fn map(&self, name: &str, row: usize) -> Option<BTreeMap<String, Option<String>>> {
        let entries = self.child(name, row)?.as_map_opt()?.value(row);
        let keys = entries.column(0).as_string_opt::<i32>()?;
        let values = entries.column(1).as_string_opt::<i32>()?;
        let owned = |value: Option<&str>| value.map(str::to_owned);
        Some(keys.iter().zip(values).filter_map(|(k, v)| Some((k?.to_owned(), owned(v)))).collect())
    }

    fn list(&self, name: &str, row: usize) -> Option<Vec<String>> {
        let list = self.child(name, row)?.as_list_opt::<i32>()?.value(row);
        Some(list.as_string_opt::<i32>()?.iter().flatten().map(str::to_owned).collect())
    }
}

fn missing(what: &str) -> LakeError {
    LakeError::LogDamaged(format!("a checkpoint has an action without its {what}"))
}

fn protocol(column: &StructReader<'_>, row: usize) -> Result<TableProtocol, LakeError> {
    let version =
        |name| column.long(name, row).and_then(|v| i32::try_from(v).ok()).ok_or_else(|| missing(name));
    Ok(TableProtocol {
        min_reader_version: version("minReaderVersion")?,
        min_writer_version: version("minWriterVersion")?,
    })
}

fn table_metadata(column: &StructReader<'_>, row: usize) -> Result<TableMetadata, LakeError> {
    let plain = |map: Option<BTreeMap<String, Option<String>>>| {
        map.unwrap_or_default().into_iter().filter_map(|(k, v)| Some((k, v?))).collect()
    };
    let format = StructReader::of(column.child("format", row).and_then(|f| f.as_struct_opt()));
    Ok(TableMetadata {
        id: column.text("id", row).ok_or_else(|| missing("id"))?,
        name: column.text("name", row),
        description: column.text("description", row),
        format: FileFormat {
            provider: format.text("provider", row).unwrap_or_else(|| "parquet".to_owned()),
            options: plain(format.map("options", row)),
        },
        schema_string: column.text("schemaString", row).ok_or_else(|| missing("schemaString"))?,
        partition_columns: column.list("partitionColumns", row).unwrap_or_default(),
        created_time: column.long("createdTime", row),
        configuration: plain(column.map("configuration", row)),
    })
}

fn transaction(column: &StructReader<'_>, row: usize) -> Result<AppTransaction, LakeError> {
    Ok(AppTransaction {
        app_id: column.text("appId", row).ok_or_else(|| missing("appId"))?,
        version: column.long("version", row).ok_or_else(|| missing("version"))?,
        last_updated: column.long("lastUpdated", row),
    })
}

fn add_file(column: &StructReader<'_>, row: usize) -> Result<AddFile, LakeError> {
    Ok(AddFile {
        path: column.text("path", row).ok_or_else(|| missing("path"))?,
        partition_values: column.map("partitionValues", row).unwrap_or_default(),
        size: column.long("size", row).ok_or_else(|| missing("size"))?,
        modification_time: column.long("modificationTime", row).unwrap_or(0),
        data_change: false,
        stats: column.text("stats", row),
    })
}

fn remove_file(column: &StructReader<'_>, row: usize) -> Result<RemoveFile, LakeError> {
    Ok(RemoveFile {
        path: column.text("path", row).ok_or_else(|| missing("path"))?,
        deletion_timestamp: column.long("deletionTimestamp", row),
        data_change: false,
        partition_values: column.map("partitionValues", row),
        extended_file_metadata: column.flag("extendedFileMetadata", row),
        size: column.long("size", row),
    })
}
