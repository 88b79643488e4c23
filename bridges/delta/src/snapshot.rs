//! What a table is at one version: the sum of its log up to there.

use std::collections::{BTreeMap, HashMap};

use object_store::ObjectStore;

use crate::actions::{AddFile, AppTransaction, LogAction, RemoveFile, TableMetadata, TableProtocol};
use crate::columns::TableSchema;
use crate::commit_log;
use crate::error::LakeError;

/// The newest protocol that readers and writers need for what is written here.
pub(crate) const PROTOCOL: TableProtocol = TableProtocol { min_reader_version: 1, min_writer_version: 2 };

/// A table at one version.
#[derive(Debug)]
pub struct TableSnapshot {
    version: i64,
    protocol: TableProtocol,
    metadata: TableMetadata,
    schema: TableSchema,
    contents: TableContents,
}

/// Files and cursors, in a table or in the part of its log that was read.
#[derive(Debug, Default)]
struct TableContents {
    /// By path, as the log has it.
    files: BTreeMap<String, AddFile>,
    /// Files that are no longer part of the table and may still be read, by path.
    tombstones: HashMap<String, RemoveFile>,
    transactions: BTreeMap<String, AppTransaction>,
}

impl TableSnapshot {
    /// The table in a store as it was at `version`, or as it is when it has not come so far; `None` when there is none.
    ///
    /// # Errors
    ///
    /// The store's, a log that is damaged or begins later, and a table that needs what is unknown here.
    pub async fn read(store: &dyn ObjectStore, version: i64) -> Result<Option<Self>, LakeError> {
        commit_log::read_table_up_to(store, version).await
    }

    /// The number of the last commit.
    pub fn version(&self) -> i64 {
        self.version
    }

    /// Its columns.
    pub fn schema(&self) -> &TableSchema {
        &self.schema
    }

    /// The files whose rows are the table's.
    pub fn files(&self) -> impl Iterator<Item = &AddFile> {
        self.contents.files.values()
    }

    /// Whether the file at this path is one of them.
    pub fn has_file(&self, path: &str) -> bool {
        self.contents.files.contains_key(path)
    }

    /// Files that are no longer part of it and may still be there.
    pub fn removed_files(&self) -> impl Iterator<Item = &RemoveFile> {
        self.contents.tombstones.values()
    }

    /// Columns whose values are the same for all rows of a file.
    pub fn partition_columns(&self) -> &[String] {
        &self.metadata.partition_columns
    }

    pub(crate) fn metadata(&self) -> &TableMetadata {
        &self.metadata
    }

    pub(crate) fn cursor(&self, app_id: &str) -> Option<i64> {
        self.contents.transactions.get(app_id).map(|t| t.version)
    }

    pub(crate) fn transactions(&self) -> impl Iterator<Item = &AppTransaction> {
        self.contents.transactions.values()
    }

    /// Forgets files that were removed before `time_ms`, once a vacuum has taken them.
    pub(crate) fn forget_removed_before(&mut self, time_ms: i64) {
        self.contents.tombstones.retain(|_, removed| removed.deletion_timestamp.unwrap_or(0) >= time_ms);
    }

    /// Goes on to `version`, the next one.
    ///
    /// # Errors
    ///
    /// A commit after which the table needs more than is known here. The snapshot is then as it was.
    pub(crate) fn advance(&mut self, version: i64, actions: Vec<LogAction>) -> Result<(), LakeError> {
        for action in &actions {
            if let Some(protocol) = action.protocol {
                check_protocol(protocol)?;
                self.protocol = protocol;
            }
            if let Some(metadata) = &action.meta_data {
                self.schema = TableSchema::from_json(&metadata.schema_string)?;
                self.metadata = metadata.clone();
            }
        }
        self.contents.apply(actions);
        self.version = version;
        Ok(())
    }

    /// The actions that make the whole table: what a checkpoint holds.
    pub(crate) fn actions(&self) -> impl Iterator<Item = LogAction> {
        let contents = &self.contents;
        [LogAction::from(self.protocol), LogAction::from(self.metadata.clone())]
            .into_iter()
            .chain(contents.transactions.values().cloned().map(LogAction::from))
            .chain(contents.files.values().cloned().map(LogAction::from))
            .chain(contents.tombstones.values().cloned().map(LogAction::from))
    }
}

impl TableContents {
    fn apply(&mut self, actions: Vec<LogAction>) {
        for action in actions {
            if let Some(txn) = action.txn {
                self.transactions.insert(txn.app_id.clone(), txn);
            }
            if let Some(remove) = action.remove {
                self.files.remove(&remove.path);
                self.tombstones.insert(remove.path.clone(), remove);
            }
            if let Some(add) = action.add {
                self.tombstones.remove(&add.path);
                self.files.insert(add.path.clone(), add);
            }
        }
    }
}

/// The log so far, while it is read: `protocol` and `metaData` may stand anywhere in it.
#[derive(Debug, Default)]
pub(crate) struct SnapshotBuilder {
    protocol: Option<TableProtocol>,
    metadata: Option<TableMetadata>,
    contents: TableContents,
}

impl SnapshotBuilder {
    /// Takes the actions of one commit, or of a part of a checkpoint.
    pub(crate) fn apply(&mut self, actions: Vec<LogAction>) {
        for action in &actions {
            self.protocol = action.protocol.or(self.protocol);
            if let Some(metadata) = &action.meta_data {
                self.metadata = Some(metadata.clone());
            }
        }
        self.contents.apply(actions);
    }

    /// The table after all of that.
    ///
    /// # Errors
    ///
    /// A log without what every table has, or a table that needs more than is known here.
    pub(crate) fn finish(self, version: i64) -> Result<TableSnapshot, LakeError> {
        let missing = |what: &str| LakeError::LogDamaged(format!("no {what} up to version {version}"));
        let protocol = self.protocol.ok_or_else(|| missing("protocol"))?;
        let metadata = self.metadata.ok_or_else(|| missing("metaData"))?;
        check_protocol(protocol)?;
        let schema = TableSchema::from_json(&metadata.schema_string)?;
        Ok(TableSnapshot { version, protocol, metadata, schema, contents: self.contents })
    }
}

fn check_protocol(protocol: TableProtocol) -> Result<(), LakeError> {
    let TableProtocol { min_reader_version: reader, min_writer_version: writer } = protocol;
    if reader > PROTOCOL.min_reader_version || writer > PROTOCOL.min_writer_version {
        return Err(LakeError::ProtocolNewer { reader, writer });
    }
    Ok(())
}
