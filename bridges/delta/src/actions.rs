//! The actions of a table's log, as its JSON has them: one object with one key in each line of a commit.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A line of a commit. Actions that are unknown here (change data, domains) are left out when they are read: none of
/// them says which rows a table of protocol 1 has.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct LogAction {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit_info: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<TableProtocol>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub meta_data: Option<TableMetadata>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub txn: Option<AppTransaction>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub add: Option<AddFile>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remove: Option<RemoveFile>,
}

/// Which readers and writers may use the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TableProtocol {
    pub min_reader_version: i32,
    pub min_writer_version: i32,
}

/// What the table is.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TableMetadata {
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    pub format: FileFormat,
    pub schema_string: String,
    pub partition_columns: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_time: Option<i64>,
    #[serde(default)]
    pub configuration: BTreeMap<String, String>,
}

/// What the files are: Parquet.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FileFormat {
    pub provider: String,
    #[serde(default)]
    pub options: BTreeMap<String, String>,
}

/// How far an application has come: the highest `version` of each `appId` counts.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AppTransaction {
    pub app_id: String,
    pub version: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_updated: Option<i64>,
}

/// A file whose rows are in the table from this commit on.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddFile {
    /// Relative to the table, as a URI.
    pub path: String,
    /// The values of the partition columns, as text.
    pub partition_values: BTreeMap<String, Option<String>>,
    /// Bytes.
    pub size: i64,
    /// Milliseconds since the Unix epoch.
    pub modification_time: i64,
    /// False where rows were only moved between files.
    pub data_change: bool,
    /// How many rows, and the bounds of their columns, as JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stats: Option<String>,
}

impl AddFile {
    /// The value of a partition column; `None` when it is null or no column of partitions.
    pub fn partition(&self, column: &str) -> Option<&str> {
        self.partition_values.get(column)?.as_deref()
    }

    /// How many rows the file has; `None` when whoever wrote it does not say.
    pub fn rows(&self) -> Option<u64> {
        self.parsed_stats()?["numRecords"].as_u64()
    }

    /// The least and the greatest value of a column of integers; `None` when the file does not say.
    pub fn bounds(&self, column: &str) -> Option<(i64, i64)> {
        let stats = self.parsed_stats()?;
        Some((stats["minValues"][column].as_i64()?, stats["maxValues"][column].as_i64()?))
    }

    /// The same of a column of texts.
    pub fn text_bounds(&self, column: &str) -> Option<(String, String)> {
        let stats = self.parsed_stats()?;
        let bound = |which: &str| Some(stats[which][column].as_str()?.to_owned());
        Some((bound("minValues")?, bound("maxValues")?))
    }

    fn parsed_stats(&self) -> Option<Value> {
        serde_json::from_str(self.stats.as_deref()?).ok()
    }
}

/// A file whose rows are no longer in the table from this commit on. It stays for those who read an earlier version,
/// until a vacuum takes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RemoveFile {
    /// Relative to the table, as a URI.
    pub path: String,
    /// Milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion_timestamp: Option<i64>,
    /// False where rows were only moved between files.
    pub data_change: bool,
    /// The values of the partition columns, as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition_values: Option<BTreeMap<String, Option<String>>>,
    /// Whether `partition_values` and `size` are there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extended_file_metadata: Option<bool>,
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<i64>,
}

impl RemoveFile {
    /// That `file` is no longer part of the table.
    pub(crate) fn of(file: &AddFile, deletion_timestamp: i64, data_change: bool) -> Self {
        Self {
            path: file.path.clone(),
            deletion_timestamp: Some(deletion_timestamp),
            data_change,
            partition_values: Some(file.partition_values.clone()),
            extended_file_metadata: Some(true),
            size: Some(file.size),
        }
    }
}

impl From<AddFile> for LogAction {
    fn from(add: AddFile) -> Self {
        Self { add: Some(add), ..Self::default() }
    }
}

impl From<RemoveFile> for LogAction {
    fn from(remove: RemoveFile) -> Self {
        Self { remove: Some(remove), ..Self::default() }
    }
}

impl From<TableMetadata> for LogAction {
    fn from(metadata: TableMetadata) -> Self {
        Self { meta_data: Some(metadata), ..Self::default() }
    }
}

impl From<TableProtocol> for LogAction {
    fn from(protocol: TableProtocol) -> Self {
        Self { protocol: Some(protocol), ..Self::default() }
    }
}

impl From<AppTransaction> for LogAction {
    fn from(txn: AppTransaction) -> Self {
        Self { txn: Some(txn), ..Self::default() }
    }
}
