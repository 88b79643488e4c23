//! The registry: all datasources and the keys that open them. It is durable in SQLite (`database.rs`),
//! and live in memory (`live.rs`), where every presented key is looked up.
//!
//! Changes (`changes.rs`) are made one at a time: **first on the disk, then in the live view**, and a
//! change has reached both when the call returns. So a key that was handed out survives any crash, and a
//! revoked key is dead for good: its lease has ended, which stops every message in flight under it, its
//! connections have been told to close, and no lookup finds it. The audit entry of a change is in the
//! same transaction as the change.
//!
//! In a cluster every node has its own registry in memory, and a change reaches all nodes or none
//! (`cluster.rs`): it is published before it takes effect here, the changes of other nodes are applied
//! here (`apply.rs`), and the call that makes a change returns when every node has it.
//!
//! Lookups are lock-free. Changes and reads of the audit wait for the disk: call them where blocking is
//! allowed.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{self, Arc};

use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

use super::audit::{AuditEntry, AuditQuery};
use super::database::{REGISTRY_FILE_NAME, RegistryDatabase};
use super::index::{KeyIndex, KeyLookup};
use super::key::Digest;
use super::leak::LeakRules;
use super::live::{Datasource, Key, KeyAttributes, LiveRegistry, TIME_ENDED};
use super::replica::{RegistryReplica, RegistryRevision};
use super::usage::UnwrittenUsageKeys;
use crate::limits::CHANGE_ATTEMPTS_MAX;
use crate::message::{DatasourceId, KeyId};
use crate::sqlite::SqliteError;
use crate::time::Rfc3339;

/// Why an operation of the registry failed. Nothing has then changed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A datasource with that id exists already.
    #[error("there is a datasource {0} already")]
    Exists(DatasourceId),
    /// No such datasource exists.
    #[error("there is no datasource {0:?}")]
    NoDatasource(String),
    /// The key's state does not allow this rotation, or its undoing.
    #[error("{0}")]
    Rotation(String),
    /// The key is the last one that can manage all datasources.
    #[error("this is the last admin key for all datasources; create another one first")]
    LastAdmin,
    /// The id, name, label or set of scopes cannot be used.
    #[error("{0}")]
    InvalidName(String),
    /// Changes of other cluster nodes came first at every attempt. Transient: try again.
    #[error("registry: other nodes of the cluster are changing it at this moment")]
    Overtaken,
    /// The cluster's registry cannot be reached: NATS is away. The change may still have been made, if the
    /// connection was lost in the middle of it.
    #[error("registry: it cannot be changed while NATS is away ({0})")]
    Away(String),
    /// The change does not fit in a NATS message, which is how other nodes receive it.
    #[error("it is too large for the cluster's registry: {0}")]
    TooLarge(String),
    /// The cluster's registry cannot be used as it is.
    #[error("registry: {0}")]
    Cluster(String),
    /// The database could not be opened, read or written.
    #[error("registry: {0}")]
    Database(#[from] SqliteError),
    /// An error of the file system.
    #[error("registry: {0}")]
    Io(#[from] std::io::Error),
}

impl From<rusqlite::Error> for RegistryError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(SqliteError::from_sqlite(&error, Path::new(REGISTRY_FILE_NAME)))
    }
}

/// Datasources and keys: the database and the live view.
pub struct Registry {
    /// Locked by a change until it has reached the live view too. The one lock that a panic poisons: no
    /// change starts from half of another one.
    database: sync::Mutex<RegistryDatabase>,
    pub(super) live: LiveRegistry,
    /// Keys whose usage is not yet on the disk.
    pub(super) noted: UnwrittenUsageKeys,
    /// See [`Registry::usage`].
    pub(super) adding_usage: Mutex<()>,
    /// The registries of the other nodes, in a cluster.
    pub(super) replica: Option<Arc<dyn RegistryReplica>>,
    /// The cluster's rules about leaked keys.
    pub(super) leaks: Mutex<LeakRules>,
}

impl Registry {
    /// Opens or creates `dir/registry.db` and reads it into memory. A new registry has no keys. The
    /// directory must exist.
    ///
    /// # Errors
    /// [`RegistryError::Database`], which names the file.
    pub fn open(dir: &Path) -> Result<Self, RegistryError> {
        Self::from_database(RegistryDatabase::open(dir)?, None)
    }

    /// Builds the live view from a database.
    pub(super) fn from_database(
        mut database: RegistryDatabase,
        replica: Option<Arc<dyn RegistryReplica>>,
    ) -> Result<Self, RegistryError> {
        if let Some(replica) = &replica {
            database.join(replica.clone());
        }
        let datasources = papaya::HashMap::with_capacity(database.datasource_count()?);
        database.for_each_datasource(|datasource| {
            datasources.pin().insert(datasource.id.clone(), Arc::new(datasource));
        })?;

        let keys = KeyIndex::with_capacity(database.key_count()?);
        let (mut by_datasource, mut deadlines) = (Vec::new(), BTreeSet::new());
        let all = DatasourceId::all();
        database.for_each_key(|stored| {
            let known = datasources.pin();
            if stored.revoked {
                keys.set(&stored.digest, None);
                return Ok(());
            }
            let id = stored.digest.key_id();
            // Shares the id's text with the datasource: there may be a million keys.
            let datasource = match known.get_key_value(stored.datasource) {
                Some((datasource, _)) => datasource.clone(),
                None if stored.datasource == all.as_str() => all.clone(),
                None => return Err(RegistryError::NoDatasource(stored.datasource.to_owned())),
            };
            let key = Arc::new(Key::from(KeyAttributes {
                digest: stored.digest,
                datasource: datasource.clone(),
                scopes: stored.scopes,
                label: stored.label,
                created_at: stored.created_at,
                expires_at: stored.expires_at,
                rotation: stored.rotation,
                limits: stored.limits,
            }));
            if stored.ended {
                key.end();
                key.ends_at.store(TIME_ENDED, Ordering::Relaxed);
            } else if let Some(at) = key.ends_at() {
                deadlines.insert((at, datasource.clone(), id));
            }
            by_datasource.push(((datasource, id), Arc::clone(&key)));
            keys.set(&stored.digest, Some(key));
            Ok(())
        })?;
        // Only now are all keys in memory, so their pages can be merged into huge ones.
        keys.gather();
        let by_datasource = RwLock::new(by_datasource.into_iter().collect());
        let deadlines = Mutex::new(deadlines);
        let live = LiveRegistry { keys, datasources, by_datasource, deadlines, deadline_set: Notify::new() };
        let database = sync::Mutex::new(database);
        Ok(Self {
            database,
            live,
            noted: UnwrittenUsageKeys::default(),
            adding_usage: Mutex::default(),
            replica,
            leaks: Mutex::default(),
        })
    }

    /// One datasource.
    pub fn datasource(&self, id: &str) -> Option<Arc<Datasource>> {
        self.live.datasources.pin().get(id).map(Arc::clone)
    }

    /// Calls `what` with one datasource. Meant for the path of a message: it touches no reference count
    /// that other threads share.
    pub fn with_datasource<T>(&self, id: &str, what: impl FnOnce(&Datasource) -> T) -> Option<T> {
        self.live.datasources.pin().get(id).map(|datasource| what(datasource))
    }

    /// Whether such a datasource exists; `*` is not one. Meant for the path of a message: it touches no
    /// reference count that other threads share.
    pub fn has_datasource(&self, id: &str) -> bool {
        self.live.datasources.pin().contains_key(id)
    }

    /// All datasources, ordered by id.
    pub fn datasources(&self) -> Vec<Arc<Datasource>> {
        let mut all: Vec<_> = self.live.datasources.pin().values().map(Arc::clone).collect();
        all.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// The keys of a datasource, or with `*` those for all of them, that are not revoked, oldest first.
    pub fn keys(&self, datasource: &DatasourceId) -> Vec<Arc<Key>> {
        let mut keys = self.live.keys_of(datasource);
        keys.sort_by_key(|key| key.created_at);
        keys
    }

    /// One key of a datasource, or with `*` of those for all of them, unless it is revoked.
    pub fn key(&self, datasource: &DatasourceId, id: KeyId) -> Option<Arc<Key>> {
        self.live.key(datasource, id)
    }

    /// The number of keys that are not revoked.
    pub fn key_count(&self) -> usize {
        self.live.key_count()
    }

    /// Looks up a digest, among revoked keys too.
    pub(super) fn look_up(&self, digest: &Digest) -> Option<KeyLookup> {
        self.live.keys.find(digest)
    }

    /// The key with this digest, unless it is revoked; it may have expired.
    #[cfg(any(test, feature = "testing"))]
    pub fn find(&self, digest: &Digest) -> Option<Arc<Key>> {
        self.live.find(digest)
    }

    /// Whether a key with this digest existed and was revoked.
    #[cfg(any(test, feature = "testing"))]
    pub fn was_revoked(&self, digest: &Digest) -> bool {
        matches!(self.look_up(digest), Some(KeyLookup::Revoked))
    }

    /// How a key ended, as text for people: `was revoked at 2026-11-23T09:28:39.000120Z`. `None` for a key
    /// that was not revoked. Reads the file.
    ///
    /// # Errors
    /// [`RegistryError::Database`] if it cannot be read.
    pub fn describe_revocation(&self, id: KeyId) -> Result<Option<String>, RegistryError> {
        let Some((at, why)) = self.lock_database().revocation_of(id)? else { return Ok(None) };
        let how = match why.as_deref() {
            Some("deleted") => "died with its datasource, which was deleted",
            Some("rotated") => "was rotated, and its grace ended",
            Some("leaked") => "was reported as leaked and revoked",
            _ => "was revoked",
        };
        Ok(Some(format!("{how} at {}", Rfc3339(at))))
    }

    /// A page of the audit, oldest first.
    ///
    /// # Errors
    /// [`RegistryError::Database`] if it cannot be read.
    pub fn audit_entries(&self, page: &AuditQuery) -> Result<Vec<AuditEntry>, RegistryError> {
        self.lock_database().audit_entries(page)
    }

    /// Makes a change: `make` writes to the database, and then updates the live view. In a cluster `make`
    /// runs again from its beginning if another node's change came first, and every other node has the
    /// change when this returns.
    pub(super) fn make_change<T>(
        &self,
        make: impl FnMut(&mut RegistryDatabase) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let (made, revision) = self.make_change_here(make)?;
        if let Some(replica) = &self.replica {
            replica.wait_everywhere(revision);
        }
        Ok(made)
    }

    /// As [`Registry::make_change`], but without waiting for the other nodes. Also returns the revision that
    /// they will reach.
    pub(super) fn make_change_here<T>(
        &self,
        mut make: impl FnMut(&mut RegistryDatabase) -> Result<T, RegistryError>,
    ) -> Result<(T, RegistryRevision), RegistryError> {
        for _ in 0..CHANGE_ATTEMPTS_MAX {
            let mut database = self.lock_database();
            match (make(&mut database), &self.replica) {
                (Err(RegistryError::Overtaken), Some(replica)) => {
                    // Unlocked, because applying the changes of other nodes needs the database.
                    drop(database);
                    let revision = replica.catch_up()?;
                    self.lock_database().caught_up(revision);
                }
                (made, _) => return Ok((made?, database.applied())),
            }
        }
        Err(RegistryError::Overtaken)
    }

    /// Locks the database. Every change holds this lock until it has reached the live view.
    pub(super) fn lock_database(&self) -> sync::MutexGuard<'_, RegistryDatabase> {
        // After a panic between disk and live view the two may differ, so no more changes are allowed.
        self.database.lock().expect("no change of the registry has panicked halfway")
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("datasources", &self.live.datasources.len())
            .field("keys", &self.key_count())
            .finish_non_exhaustive()
    }
}
