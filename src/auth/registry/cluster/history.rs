//! The registry when the cluster goes on from an earlier state of itself: a copy of it that each gateway keeps
//! ([`RegistryCopy`]), and what is put right in the bucket before anybody reads it ([`RegistryMending`]).
//!
//! The copy has datasources, keys (digests only) and rules; not the audit. A key that it knows as dead never becomes alive
//! again, whatever state the bucket is put back to.

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use headgate_bridge_nats::kv::{KvPut, KvRevision, KvRow};
use headgate_bridge_nats::{KvBucket, KvError};
use serde::{Deserialize, Serialize};

use super::super::Registry;
use super::super::error::RegistryError;
use super::super::rows::{REGISTRY_ROWS_FORMAT, RegistryRow};
use crate::message::{DatasourceId, KeyId, Offset};

/// The row of the registry's bucket that says whose it is; it is no row of the registry.
pub const HISTORY_ROW_NAME: &str = "history";
/// The file with a gateway's copy of the cluster's registry, in its data directory.
const REGISTRY_COPY_FILE: &str = "registry-copy.json";
/// Rows that are put right in one batch.
const MENDED_ROWS_PER_BATCH: usize = 500;
/// How long the bucket may take to be read: one that no consumer can be made on would take for ever.
const MENDING_READ_MAX: Duration = Duration::from_secs(30);
/// Keys that are copied while changes wait.
const COPIED_KEYS_PER_PAGE: usize = 1_000;

/// What a gateway knew of the registry, so that it can be published again.
#[derive(Debug, Serialize, Deserialize)]
pub struct RegistryCopy {
    /// The revision of the bucket that it is of.
    pub revision: u64,
    /// Name and value of each row.
    rows: Vec<(String, String)>,
}

/// Why a copy cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("the copy of the registry in {}: {detail}", .path.display())]
pub struct RegistryCopyError {
    path: PathBuf,
    detail: String,
}

/// What is put right in the bucket. The rows are published together with [`RegistryMending::publish`].
#[derive(Debug, Default)]
pub struct RegistryMending {
    puts: Vec<KvPut>,
    /// The keys that are alive in the bucket, when it is put right.
    pub live_keys: HashSet<KeyId>,
    /// How many keys end that the bucket has as alive.
    pub ended_keys: usize,
    /// How many rows come from the copy.
    pub restored_rows: usize,
    /// How many rows named an offset behind the log's end.
    pub set_back_rows: usize,
}

impl Registry {
    /// A copy of all but the audit. Changes may be made between its pages of keys; the copy is of a revision before them.
    ///
    /// # Errors
    /// [`RegistryError::Database`].
    pub fn copy_cluster_rows(&self) -> Result<RegistryCopy, RegistryError> {
        let (revision, mut rows) = {
            let database = self.lock_database();
            (database.applied(), database.rows_but_keys()?)
        };
        let datasources: HashSet<_> = rows
            .iter()
            .filter_map(|row| match row {
                RegistryRow::Datasource(id, _) => Some(id.clone()),
                _ => None,
            })
            .collect();
        // A datasource may be created meanwhile, and its keys are nothing without it.
        let has_owner = |row: &RegistryRow| match row {
            RegistryRow::Key(_, Some(key)) if key.revoked_at.is_none() => {
                key.datasource == DatasourceId::all().as_str()
                    || datasources.contains(key.datasource.as_str())
            }
            _ => true,
        };
        rows.push(RegistryRow::Format(REGISTRY_ROWS_FORMAT));
        let mut copy = RegistryCopy { revision, rows: Vec::new() };
        copy.extend(&rows);
        let mut after = None;
        loop {
            let mut page = self.lock_database().key_rows_after(after, COPIED_KEYS_PER_PAGE)?;
            after = match page.last() {
                Some(RegistryRow::Key(digest, _)) => Some(*digest),
                _ => return Ok(copy),
            };
            page.retain(has_owner);
            copy.extend(&page);
        }
    }

    /// What the watch of the cluster's registry has handed out; unlike [`Registry::applied_revision`] it waits for no
    /// lock. 0 without a cluster.
    pub fn seen_revision(&self) -> u64 {
        self.replica.as_ref().map_or(0, |replica| replica.seen())
    }

    /// The newest revision of the cluster's registry that this node has applied.
    pub fn applied_revision(&self) -> u64 {
        self.lock_database().applied()
    }
}

impl RegistryCopy {
    /// Reads the copy in a data directory; `None` if there is none.
    ///
    /// # Errors
    /// [`RegistryCopyError`].
    pub fn load(dir: &Path) -> Result<Option<Self>, RegistryCopyError> {
        let path = dir.join(REGISTRY_COPY_FILE);
        let failed = |detail: String| RegistryCopyError { path: path.clone(), detail };
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| failed(error.to_string())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// The keys that it has as alive.
    ///
    /// # Errors
    /// [`RegistryError::Cluster`] for rows that cannot be read.
    pub fn live_keys(&self) -> Result<HashSet<KeyId>, RegistryError> {
        let mut live = HashSet::new();
        for (name, value) in &self.rows {
            live.extend(live_key(parse(name, value.as_bytes())?.as_ref()));
        }
        Ok(live)
    }

    fn extend(&mut self, rows: &[RegistryRow]) {
        let text = |row: &RegistryRow| {
            let value = row.value().and_then(|value| String::from_utf8(value).ok());
            value.map(|value| (row.name(), value))
        };
        self.rows.extend(rows.iter().filter_map(text));
    }

    /// Writes it into a data directory: all of it, or what was there stays.
    ///
    /// # Errors
    /// [`RegistryCopyError`].
    pub fn save(&self, dir: &Path) -> Result<(), RegistryCopyError> {
        let path = dir.join(REGISTRY_COPY_FILE);
        let text = serde_json::to_vec(self).unwrap_or_default();
        replace_file(&path, &text)
            .map_err(|error| RegistryCopyError { path: path.clone(), detail: error.to_string() })
    }
}

/// Replaces a file with another content, which is on the disk before it has the name.
pub(crate) fn replace_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    std::fs::File::open(path.parent().unwrap_or(path))?.sync_all()
}

impl RegistryMending {
    /// Works out what to put right in a bucket whose log ends at `end`. Keys that are dead in `copy` end; with
    /// `is_restored`, every row of it that the bucket lacks or has otherwise is taken over.
    ///
    /// # Errors
    /// [`RegistryError::Cluster`] for rows that cannot be read, [`RegistryError::Away`].
    pub async fn plan(
        bucket: &KvBucket,
        copy: Option<&RegistryCopy>,
        is_restored: bool,
        end: Offset,
    ) -> Result<Self, RegistryError> {
        let mut present: HashMap<String, Bytes> = HashMap::new();
        let mut revisions: HashMap<String, KvRevision> = HashMap::new();
        let away = |_| RegistryError::Away(format!("bucket {}: it cannot be read", bucket.name()));
        let mut watch = bucket.watch_with_deleted();
        let read = tokio::time::timeout(MENDING_READ_MAX, watch.next()).await.map_err(away)?;
        for KvRow { key, value, revision } in read.rows {
            revisions.insert(key.clone(), revision);
            match value {
                Some(value) => _ = present.insert(key, value),
                None => _ = present.remove(&key),
            }
        }
        let mut mending = Self::default();
        for (name, value) in copy.iter().flat_map(|copy| &copy.rows) {
            let is = present.get(name);
            let (of_copy, of_bucket) =
                (parse(name, value.as_bytes())?, is.map(|is| parse(name, is)).transpose()?);
            let is_end =
                is_dead(of_copy.as_ref()) && of_bucket.as_ref().is_some_and(|row| !is_dead(row.as_ref()));
            let is_revival =
                !is_dead(of_copy.as_ref()) && of_bucket.as_ref().is_some_and(|row| is_dead(row.as_ref()));
            let is_other = is.is_none_or(|is| is[..] != *value.as_bytes());
            // Written, or deleted, after the copy was made.
            let is_newer =
                copy.zip(revisions.get(name)).is_some_and(|(copy, revision)| *revision > copy.revision);
            if is_end || (is_restored && is_other && !is_revival && !is_newer) {
                mending.ended_keys += usize::from(is_end);
                mending.restored_rows += usize::from(!is_end);
                present.insert(name.clone(), value.clone().into());
                mending.put(name, value.clone().into(), &revisions);
            }
        }
        for (name, value) in &present {
            match parse(name, value)? {
                Some(RegistryRow::Incarnation(version, mut row)) if row.first_offset > Some(end) => {
                    row.first_offset = Some(end);
                    let row = RegistryRow::Incarnation(version, row);
                    mending.puts.retain(|put| put.key != *name);
                    mending.put(name, row.value().unwrap_or_default().into(), &revisions);
                    mending.set_back_rows += 1;
                }
                row => mending.live_keys.extend(live_key(row.as_ref())),
            }
        }
        Ok(mending)
    }

    /// Nobody may have changed the row meanwhile.
    fn put(&mut self, name: &str, value: Bytes, revisions: &HashMap<String, KvRevision>) {
        let expected = Some(revisions.get(name).copied().unwrap_or_default());
        self.puts.push(KvPut { key: name.to_owned(), value: Some(value), expected });
    }

    /// Writes what is to be put right.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn publish(&self, bucket: &KvBucket) -> Result<(), KvError> {
        for puts in self.puts.chunks(MENDED_ROWS_PER_BATCH) {
            bucket.put_all(puts, None).await?;
        }
        Ok(())
    }
}

fn parse(name: &str, value: &[u8]) -> Result<Option<RegistryRow>, RegistryError> {
    RegistryRow::parse(name, Some(value))
        .map_err(|detail| RegistryError::Cluster(format!("row {name} cannot be read: {detail}")))
}

/// The key of a row, if that is the row of one that is alive.
fn live_key(row: Option<&RegistryRow>) -> Option<KeyId> {
    match row {
        Some(RegistryRow::Key(digest, Some(_))) if !is_dead(row) => Some(digest.key_id()),
        _ => None,
    }
}

/// Whether a row is that of a key that has ended.
fn is_dead(row: Option<&RegistryRow>) -> bool {
    matches!(row, Some(RegistryRow::Key(_, Some(row))) if row.revoked_at.is_some())
}
