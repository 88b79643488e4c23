//! The log of a table as objects: `_delta_log/00000000000000000007.json` is commit 7.
//!
//! Commits are numbered without gaps, and each is created by whoever comes first: the store's put-if-absent is the only
//! thing that keeps two writers apart. `_last_checkpoint` says where to begin to read.

use futures_util::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use serde::{Deserialize, Serialize};

use crate::actions::LogAction;
use crate::checkpoint;
use crate::error::LakeError;
use crate::snapshot::{SnapshotBuilder, TableSnapshot};

/// The folder of the log.
pub(crate) const LOG_FOLDER: &str = "_delta_log";
const LAST_CHECKPOINT: &str = "_last_checkpoint";

/// What `_last_checkpoint` says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CheckpointHint {
    pub version: i64,
    /// Actions in it.
    pub size: i64,
    /// Files that it consists of, where it is more than one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts: Option<u32>,
}

/// What an object of the log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogObject {
    Commit(i64),
    /// The version, and of how many parts.
    Checkpoint(i64, Option<u32>),
}

impl LogObject {
    /// `None` for objects of other kinds (`_last_checkpoint`, checksums, compacted logs).
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let name = path.filename()?;
        let (digits, kind) = name.split_once('.')?;
        if digits.len() != 20 {
            return None;
        }
        let version = digits.parse().ok()?;
        match kind.split('.').collect::<Vec<_>>()[..] {
            ["json"] => Some(Self::Commit(version)),
            ["checkpoint", "parquet"] => Some(Self::Checkpoint(version, None)),
            ["checkpoint", _, parts, "parquet"] => Some(Self::Checkpoint(version, Some(parts.parse().ok()?))),
            _ => None,
        }
    }
}

pub(crate) fn log_folder() -> Path {
    Path::from(LOG_FOLDER)
}

fn commit_path(version: i64) -> Path {
    Path::from(format!("{LOG_FOLDER}/{version:020}.json"))
}

fn checkpoint_paths(version: i64, parts: Option<u32>) -> Vec<Path> {
    match parts {
        None => vec![Path::from(format!("{LOG_FOLDER}/{version:020}.checkpoint.parquet"))],
        Some(parts) => (1..=parts)
            .map(|part| {
                Path::from(format!("{LOG_FOLDER}/{version:020}.checkpoint.{part:010}.{parts:010}.parquet"))
            })
            .collect(),
    }
}

/// Reads the table as it is now; `None` when there is none.
///
/// # Errors
///
/// The store's, and a log that is damaged.
pub(crate) async fn read_table(store: &dyn ObjectStore) -> Result<Option<TableSnapshot>, LakeError> {
    read_table_up_to(store, i64::MAX).await
}

/// Reads the table as it was at `newest`, or as it is when it has not come so far.
pub(crate) async fn read_table_up_to(
    store: &dyn ObjectStore,
    newest: i64,
) -> Result<Option<TableSnapshot>, LakeError> {
    let mut builder = SnapshotBuilder::default();
    let mut version = -1;
    if let Some((checkpoint, parts)) = newest_checkpoint(store, newest).await? {
        for path in checkpoint_paths(checkpoint, parts) {
            builder.apply(checkpoint::decode(store.get(&path).await?.bytes().await?)?);
        }
        version = checkpoint;
    }
    while version < newest
        && let Some(actions) = read_commit(store, version + 1).await?
    {
        builder.apply(actions);
        version += 1;
    }
    if version < 0 { Ok(None) } else { builder.finish(version).map(Some) }
}

/// The newest checkpoint up to `newest`. The hint is enough unless it is newer; without a hint the log is listed: whoever
/// wrote it may have been killed before the hint was written, and the first commits may be gone.
async fn newest_checkpoint(
    store: &dyn ObjectStore,
    newest: i64,
) -> Result<Option<(i64, Option<u32>)>, LakeError> {
    if let Some(hint) = read_hint(store).await?
        && hint.version <= newest
    {
        return Ok(Some((hint.version, hint.parts)));
    }
    let mut found: Option<(i64, Option<u32>)> = None;
    for object in list_log(store).await? {
        if let Some(LogObject::Checkpoint(version, parts)) = LogObject::of(&object.location)
            && version <= newest
            && found.is_none_or(|(v, _)| v < version)
        {
            found = Some((version, parts));
        }
    }
    Ok(found)
}

/// `None` when there is none, or none that can be read: it only saves time.
pub(crate) async fn read_hint(store: &dyn ObjectStore) -> Result<Option<CheckpointHint>, LakeError> {
    let path = log_folder().join(LAST_CHECKPOINT);
    match store.get(&path).await {
        Ok(found) => Ok(serde_json::from_slice(&found.bytes().await?).ok()),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// All objects of the log, in the order of their names.
pub(crate) async fn list_log(store: &dyn ObjectStore) -> Result<Vec<ObjectMeta>, LakeError> {
    let mut objects: Vec<ObjectMeta> = store.list(Some(&log_folder())).try_collect().await?;
    objects.sort_by(|a, b| a.location.cmp(&b.location));
    Ok(objects)
}

/// The actions of a commit; `None` when it is not there.
pub(crate) async fn read_commit(
    store: &dyn ObjectStore,
    version: i64,
) -> Result<Option<Vec<LogAction>>, LakeError> {
    let text = match store.get(&commit_path(version)).await {
        Ok(found) => found.bytes().await?,
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let actions =
        serde_json::Deserializer::from_slice(&text).into_iter::<LogAction>().collect::<Result<Vec<_>, _>>();
    actions.map(Some).map_err(|e| LakeError::LogDamaged(format!("commit {version}: {e}")))
}

/// Creates a commit; false when that version is there already.
pub(crate) async fn put_commit(
    store: &dyn ObjectStore,
    version: i64,
    actions: &[LogAction],
) -> Result<bool, LakeError> {
    let mut text = Vec::new();
    for action in actions {
        serde_json::to_writer(&mut text, action).map_err(|e| LakeError::LogDamaged(e.to_string()))?;
        text.push(b'\n');
    }
    let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    match store.put_opts(&commit_path(version), PutPayload::from(text), options).await {
        Ok(_) => Ok(true),
        Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// Writes a checkpoint of the table, and then the hint to it.
pub(crate) async fn put_checkpoint(
    store: &dyn ObjectStore,
    snapshot: &TableSnapshot,
) -> Result<(), LakeError> {
    let (bytes, size) = checkpoint::encode(snapshot)?;
    for path in checkpoint_paths(snapshot.version(), None) {
        store.put(&path, PutPayload::from_bytes(bytes.clone())).await?;
    }
    // A writer that was slow must not lead readers back to commits that may be gone.
    if read_hint(store).await?.is_some_and(|hint| hint.version > snapshot.version()) {
        return Ok(());
    }
    let hint = CheckpointHint { version: snapshot.version(), size, parts: None };
    let text = serde_json::to_vec(&hint).map_err(|e| LakeError::LogDamaged(e.to_string()))?;
    store.put(&log_folder().join(LAST_CHECKPOINT), PutPayload::from(text)).await?;
    Ok(())
}
