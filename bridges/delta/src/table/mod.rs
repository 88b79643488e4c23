//! A table that is open for writing: appends with a cursor, and the commits that everything else is made of.
//!
//! A commit is planned on what the table is now, and created under the next number. When somebody was faster, the plan
//! is made again on what they have left; when the store fails, nobody knows whether the commit is there, and the next
//! operation looks before it does anything.

mod compaction;
mod rewrite;
mod set_back;
pub(crate) mod vacuum;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures_util::future::try_join_all;
use jiff::Timestamp;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use serde_json::json;

use crate::actions::{AddFile, AppTransaction, FileFormat, LogAction, TableMetadata};
use crate::columns::{TableColumn, TableSchema};
use crate::commit_log;
use crate::data_file::{DataFile, read_rows};
use crate::error::LakeError;
use crate::snapshot::{PROTOCOL, TableSnapshot};

pub use rewrite::{RewriteReport, RowTarget, RowTargets};
pub use set_back::{SetBackOrder, SetBackReport};

/// How often a commit is tried when others are faster.
const COMMIT_ATTEMPTS_MAX: u32 = 16;
/// Files that are stored at the same time.
const PUTS_AT_ONCE: usize = 8;
/// For how long a table that is open is believed to be what it was, until a commit says otherwise. Then it is read from
/// the beginning: commits may have been expired since, and a number that was taken would look free.
const SNAPSHOT_AGE_MAX: Duration = Duration::from_secs(10 * 60);
/// How long files may be stored before their commit. See [`vacuum::ORPHAN_AGE_MIN`].
const STORE_TIME_MAX: Duration = Duration::from_secs(20 * 60);
const ENGINE: &str = concat!("headgate-bridge-delta/", env!("CARGO_PKG_VERSION"));

/// What a table is to be.
#[derive(Clone, Debug)]
pub struct TableSpec {
    /// A name for people.
    pub name: String,
    /// The columns that it begins with, those of partitions among them.
    pub columns: Vec<TableColumn>,
    /// The columns whose values are the same in all rows of a file.
    pub partitions: Vec<String>,
    /// A column of integers by which rows are in order: files are merged in its order.
    pub order_column: String,
    /// Whose cursor it is: applications with other names have cursors of their own in the same table.
    pub app_id: String,
    /// How files are written.
    pub files: FileSettings,
    /// Commits after which a checkpoint is written.
    pub checkpoint_commits: i64,
}

/// How files are written.
#[derive(Clone, Debug)]
pub struct FileSettings {
    /// Rows of a row group.
    pub group_rows_max: usize,
    /// Bytes of a row group, about, before compression: a writer holds one.
    pub group_bytes_max: usize,
    /// The size that small files are merged to, in bytes. A merge holds so much.
    pub file_bytes_target: usize,
    /// Files of about the same size that a merge takes at least.
    pub merge_files_min: usize,
    /// Columns whose values seldom repeat: without dictionary and bounds.
    pub opaque_columns: Vec<String>,
}

impl Default for FileSettings {
    fn default() -> Self {
        Self {
            group_rows_max: 128 << 10,
            group_bytes_max: 32 << 20,
            file_bytes_target: 64 << 20,
            merge_files_min: 8,
            opaque_columns: Vec::new(),
        }
    }
}

/// Rows to append, up to a new cursor.
#[derive(Clone, Debug, Default)]
pub struct TableAppend {
    /// Where the cursor is expected: after the rows before these.
    pub previous: Option<i64>,
    /// Where it is afterwards. Larger than `previous`.
    pub through: i64,
    /// Columns of the files that may be new to the table.
    pub columns: Vec<TableColumn>,
    /// The rows.
    pub files: Vec<DataFile>,
    /// Rows that are kept and not in the table: see [`LakeTable::rewrite`].
    pub aside: Vec<DataFile>,
    /// [Marks](LakeTable::mark) that the rows depend on, and where they are expected; 0 if one was never set.
    pub marks: Vec<(String, i64)>,
}

/// What became of an append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppendOutcome {
    /// The rows are in the table, by this commit.
    Committed {
        /// Its number.
        version: i64,
    },
    /// The cursor is there already: an earlier attempt, or another writer, has stored them.
    WasThere,
}

/// A table that is open for writing.
#[derive(Debug)]
pub struct LakeTable {
    store: Arc<dyn ObjectStore>,
    spec: TableSpec,
    snapshot: TableSnapshot,
    /// False from before a commit is sent until it is known what became of it.
    is_current: bool,
    looked_at: SystemTime,
    last_checkpoint: i64,
}

impl LakeTable {
    /// Opens the table, or creates it.
    ///
    /// # Errors
    ///
    /// The store's; a table that is another one, is damaged, or needs what is unknown here.
    pub async fn open(store: Arc<dyn ObjectStore>, spec: TableSpec) -> Result<Self, LakeError> {
        let snapshot = match commit_log::read_table(&*store).await? {
            Some(snapshot) => snapshot,
            None => create(&*store, &spec).await?,
        };
        check_identity(&snapshot, &spec)?;
        let last_checkpoint = commit_log::read_hint(&*store).await?.map_or(-1, |hint| hint.version);
        Ok(Self { store, spec, snapshot, is_current: true, looked_at: SystemTime::now(), last_checkpoint })
    }

    /// The table as it was last seen.
    pub fn snapshot(&self) -> &TableSnapshot {
        &self.snapshot
    }

    /// The cursor as it was last seen: the `through` of the last append. Before the first, `None`.
    pub fn cursor(&self) -> Option<i64> {
        self.snapshot.cursor(&self.spec.app_id)
    }

    /// A further cursor of the application: how far something else has come. See [`LakeTable::set_mark`].
    pub fn mark(&self, name: &str) -> Option<i64> {
        self.snapshot.cursor(&mark_app(&self.spec.app_id, name))
    }

    /// Commits a further cursor, and nothing else. It may also go back. `expected` are marks that it depends on, and where they
    /// are; 0 if one was never set.
    ///
    /// # Errors
    ///
    /// The store's, and [`LakeError::Superseded`] when one of these is elsewhere.
    pub async fn set_mark(
        &mut self,
        name: &str,
        version: i64,
        expected: &[(&str, i64)],
    ) -> Result<(), LakeError> {
        let app_id = self.spec.app_id.clone();
        self.commit(|snapshot| {
            check_marks(snapshot, &app_id, expected)?;
            let moved = mark_action(snapshot, &app_id, name, version);
            Ok(moved.map(|moved| vec![commit_info("WRITE"), moved]))
        })
        .await?;
        Ok(())
    }

    /// Where its files are stored, also while something else is done with the table.
    pub fn file_stage(&self) -> FileStage {
        FileStage { store: self.store.clone() }
    }

    /// How its files are written.
    pub fn file_settings(&self) -> &FileSettings {
        &self.spec.files
    }

    /// Looks for commits of others, and for what became of one whose answer was lost.
    ///
    /// # Errors
    ///
    /// The store's, a log that is damaged, or a table that needs more by now than is known here.
    pub async fn refresh(&mut self) -> Result<(), LakeError> {
        self.is_current = false;
        self.catch_up().await
    }

    /// Stores the files that are not yet stored, and commits all with the cursor: once, however often it is called.
    ///
    /// # Errors
    ///
    /// [`LakeError::Superseded`] when the cursor or a mark is elsewhere than expected, [`LakeError::Schema`] for columns
    /// that do not fit, and the store's. After an error the same append may be tried again.
    pub async fn append(&mut self, append: &TableAppend) -> Result<AppendOutcome, LakeError> {
        self.catch_up().await?;
        if plan_append(&self.snapshot, &self.spec.app_id, append)?.is_none() {
            return Ok(AppendOutcome::WasThere);
        }
        let began = append.files.iter().filter_map(|file| file.stored_at).min().unwrap_or_else(Instant::now);
        self.put_files(&append.files).await?;
        let aside = self.put_aside(&append.aside).await?;
        let app_id = self.spec.app_id.clone();
        let committed = self
            .commit(|snapshot| match plan_append(snapshot, &app_id, append)? {
                Some(_) if began.elapsed() > STORE_TIME_MAX => Err(LakeError::FilesTooOld),
                plan => Ok(plan.map(|plan| [plan, aside.clone()].concat())),
            })
            .await?;
        if !committed {
            return Ok(AppendOutcome::WasThere);
        }
        self.checkpoint_if_due().await;
        Ok(AppendOutcome::Committed { version: self.snapshot.version() })
    }

    /// Writes a checkpoint of the table as it was last seen.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn checkpoint(&mut self) -> Result<(), LakeError> {
        commit_log::put_checkpoint(&*self.store, &self.snapshot).await?;
        self.last_checkpoint = self.snapshot.version();
        Ok(())
    }

    /// The rows of a file of the table, without its partition columns; a file is held in memory.
    ///
    /// # Errors
    ///
    /// The store's, and a file that is no Parquet.
    pub async fn read_file(
        &self,
        file: &AddFile,
    ) -> Result<impl Iterator<Item = Result<arrow_array::RecordBatch, LakeError>> + use<>, LakeError> {
        let bytes = self.store.get(&object_path(&file.path)?).await?.bytes().await?;
        Ok(read_rows(bytes)?.map(|batch| batch.map_err(LakeError::from)))
    }

    /// A checkpoint only saves time, so what fails there is tried again after the next commit.
    async fn checkpoint_if_due(&mut self) {
        if self.snapshot.version() - self.last_checkpoint < self.spec.checkpoint_commits {
            return;
        }
        if let Err(error) = self.checkpoint().await {
            tracing::warn!(%error, table = self.spec.name, "no checkpoint of the table was written");
        }
    }

    async fn put_files(&self, files: &[DataFile]) -> Result<(), LakeError> {
        put_files(&*self.store, files).await
    }

    async fn catch_up(&mut self) -> Result<(), LakeError> {
        if SystemTime::now().duration_since(self.looked_at).is_ok_and(|age| age > SNAPSHOT_AGE_MAX) {
            let Some(snapshot) = commit_log::read_table(&*self.store).await? else {
                return Err(LakeError::LogDamaged("the log of the table is gone".to_owned()));
            };
            check_identity(&snapshot, &self.spec)?;
            self.snapshot = snapshot;
        } else {
            if self.is_current {
                return Ok(());
            }
            let mut next = self.snapshot.version() + 1;
            while let Some(actions) = commit_log::read_commit(&*self.store, next).await? {
                self.snapshot.advance(next, actions)?;
                next += 1;
            }
        }
        self.is_current = true;
        self.looked_at = SystemTime::now();
        Ok(())
    }

    /// Commits what `plan` makes of the table as it is; false when that is nothing.
    async fn commit(
        &mut self,
        mut plan: impl FnMut(&TableSnapshot) -> Result<Option<Vec<LogAction>>, LakeError>,
    ) -> Result<bool, LakeError> {
        for _ in 0..COMMIT_ATTEMPTS_MAX {
            self.catch_up().await?;
            let Some(actions) = plan(&self.snapshot)? else {
                return Ok(false);
            };
            let version = self.snapshot.version() + 1;
            self.is_current = false;
            if commit_log::put_commit(&*self.store, version, &actions).await? {
                self.snapshot.advance(version, actions)?;
                self.is_current = true;
                self.looked_at = SystemTime::now();
                return Ok(true);
            }
        }
        Err(LakeError::Contended { attempts: COMMIT_ATTEMPTS_MAX })
    }
}

/// Stores files of a table before they are committed.
#[derive(Clone, Debug)]
pub struct FileStage {
    store: Arc<dyn ObjectStore>,
}

impl FileStage {
    /// Stores them. They are to be [appended](LakeTable::append) soon: those that are not are deleted by a vacuum.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn put(&self, files: &mut [DataFile]) -> Result<(), LakeError> {
        let began = Instant::now();
        put_files(&*self.store, files).await?;
        for file in files {
            (file.stored_at, file.bytes) = (Some(began), Bytes::new());
        }
        Ok(())
    }
}

async fn put_files(store: &dyn ObjectStore, files: &[DataFile]) -> Result<(), LakeError> {
    let missing: Vec<&DataFile> = files.iter().filter(|file| file.stored_at.is_none()).collect();
    for files in missing.chunks(PUTS_AT_ONCE) {
        try_join_all(files.iter().map(|file| put_file(store, file))).await?;
    }
    Ok(())
}

async fn put_file(store: &dyn ObjectStore, file: &DataFile) -> Result<(), LakeError> {
    let path = object_path(&file.action.path)?;
    store.put(&path, PutPayload::from_bytes(file.bytes.clone())).await?;
    Ok(())
}

/// The object that a path of the log names.
fn object_path(path: &str) -> Result<Path, LakeError> {
    Path::from_url_path(path).map_err(|error| LakeError::LogDamaged(format!("the path {path:?}: {error}")))
}

fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

/// Says in the history of the table what a commit does.
fn commit_info(operation: &str) -> LogAction {
    let info = json!({
        "timestamp": now_ms(), "operation": operation, "operationParameters": {}, "engineInfo": ENGINE,
    });
    LogAction { commit_info: Some(info), ..LogAction::default() }
}

fn mark_app(app_id: &str, name: &str) -> String {
    format!("{app_id}/{name}")
}

/// Moves a mark; `None` when it is there already.
fn mark_action(snapshot: &TableSnapshot, app_id: &str, name: &str, version: i64) -> Option<LogAction> {
    let app_id = mark_app(app_id, name);
    let is_there = snapshot.cursor(&app_id) == Some(version);
    (!is_there).then(|| AppTransaction { app_id, version, last_updated: Some(now_ms()) }.into())
}

/// Whether a mark is where it is expected; one that was never set is at 0.
fn has_mark(snapshot: &TableSnapshot, app_id: &str, name: &str, version: i64) -> bool {
    snapshot.cursor(&mark_app(app_id, name)).unwrap_or_default() == version
}

/// Refuses what depends on marks that are elsewhere by now.
fn check_marks(snapshot: &TableSnapshot, app_id: &str, expected: &[(&str, i64)]) -> Result<(), LakeError> {
    match expected.iter().all(|(name, version)| has_mark(snapshot, app_id, name, *version)) {
        true => Ok(()),
        false => Err(LakeError::Superseded { cursor: snapshot.cursor(app_id) }),
    }
}

/// `None` when the cursor is there already.
fn plan_append(
    snapshot: &TableSnapshot,
    app_id: &str,
    append: &TableAppend,
) -> Result<Option<Vec<LogAction>>, LakeError> {
    let cursor = snapshot.cursor(app_id);
    if cursor.is_some_and(|cursor| cursor >= append.through) {
        return Ok(None);
    }
    let is_expected = |(name, version): &(String, i64)| has_mark(snapshot, app_id, name, *version);
    if cursor != append.previous || !append.marks.iter().all(is_expected) {
        return Err(LakeError::Superseded { cursor });
    }
    let mut actions = vec![commit_info("WRITE")];
    if let Some(schema) = snapshot.schema().extended(&append.columns)? {
        actions.push(TableMetadata { schema_string: schema.to_json(), ..snapshot.metadata().clone() }.into());
    }
    let txn =
        AppTransaction { app_id: app_id.to_owned(), version: append.through, last_updated: Some(now_ms()) };
    actions.push(txn.into());
    actions.extend(append.files.iter().map(|file| LogAction::from(file.action.clone())));
    Ok(Some(actions))
}

/// Creates the table, unless somebody does it at the same time: then theirs is opened.
async fn create(store: &dyn ObjectStore, spec: &TableSpec) -> Result<TableSnapshot, LakeError> {
    let schema = TableSchema::new(&spec.columns)?;
    let configuration =
        BTreeMap::from([("delta.checkpointInterval".to_owned(), spec.checkpoint_commits.to_string())]);
    let metadata = TableMetadata {
        id: new_uuid(),
        name: Some(spec.name.clone()),
        description: None,
        format: FileFormat { provider: "parquet".to_owned(), options: BTreeMap::new() },
        schema_string: schema.to_json(),
        partition_columns: spec.partitions.clone(),
        created_time: Some(now_ms()),
        configuration,
    };
    commit_log::put_commit(store, 0, &[commit_info("CREATE TABLE"), PROTOCOL.into(), metadata.into()])
        .await?;
    commit_log::read_table(store)
        .await?
        .ok_or_else(|| LakeError::LogDamaged("the table that was made is gone".to_owned()))
}

/// A random UUID (version 4).
fn new_uuid() -> String {
    let bits = rand::random::<u128>() & !(0xf << 76) & !(0b11 << 62) | (4 << 76) | (0b10 << 62);
    let hex = format!("{bits:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Whether the table is the one that `spec` means: partitions and the columns it begins with.
fn check_identity(snapshot: &TableSnapshot, spec: &TableSpec) -> Result<(), LakeError> {
    if snapshot.partition_columns() != spec.partitions {
        let theirs = snapshot.partition_columns().join(", ");
        return Err(LakeError::OtherTable(format!("it is partitioned by {theirs:?}")));
    }
    for column in &spec.columns {
        match snapshot.schema().column(&column.name) {
            Some(known) if known.column_type == column.column_type => (),
            _ => {
                return Err(LakeError::OtherTable(format!(
                    "it has no column {:?} of that type",
                    column.name
                )));
            }
        }
    }
    Ok(())
}
