//! The registry: which datasources there are and which keys open them. Durable in SQLite (see
//! `database.rs`), and live in memory (`live.rs`), where every presented key is looked up.
//!
//! Each change (`changes.rs`) goes through one door, one at a time: **first to the disk, then into the
//! live view**, and it has reached both when the call returns. So a key that was handed out survives any
//! crash, and a revoked one is dead for good: its lease has ended, which stops every message that is on
//! its way under it, its connections have been told to close, and no lookup finds it. The audit's
//! entry of a change is in the same transaction as the change.
//!
//! In a cluster every node has a registry of its own, in memory, and a change is everybody's or nobody's
//! (`cluster.rs`): it is published before it counts here, what others publish is applied here
//! (`apply.rs`), and the call that makes a change returns when every node has it.
//!
//! Looking up is free of locks. Changes, and reading the audit, wait for the disk: call them where
//! blocking is allowed.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use tokio::sync::Notify;

use super::audit::{Entry, Page};
use super::database::Database;
use super::index::{Found, Index};
use super::key::Digest;
use super::leak::LeakRules;
use super::live::{Datasource, ENDED, Key, Live, NewKey};
use super::replica::{Replica, Revision};
use super::usage::Noted;
use crate::limits::CHANGE_ATTEMPTS_MAX;
use crate::message::{DatasourceId, KeyId};
use crate::time::Rfc3339;

/// Why the registry could not do what was asked. Nothing has then changed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// There is a datasource with that id already.
    #[error("there is a datasource {0} already")]
    Exists(DatasourceId),
    /// There is none.
    #[error("there is no datasource {0:?}")]
    NoDatasource(String),
    /// The rotation of a key does not go with what has happened to it before.
    #[error("{0}")]
    Rotation(String),
    /// It is the last key that can manage all datasources.
    #[error("this is the last admin key for all datasources; create another one first")]
    LastAdmin,
    /// The id, name, label or set of scopes cannot be used.
    #[error("{0}")]
    Name(String),
    /// A newer Headgate wrote the file.
    #[error(
        "registry: {} has format {version} and this Headgate reads up to {known}: start the newer one",
        path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// The format it has.
        version: i64,
        /// The newest format that is known here.
        known: i64,
    },
    /// The file is not what Headgate wrote.
    #[error(
        "registry: {} is damaged ({detail}): restore it from a backup, or move it away and create \
         datasources and keys again",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// Another process has the file open.
    #[error("registry: {} is in use by another process: is a gateway already running?", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// Other nodes of the cluster were faster, again and again. It is worth another attempt.
    #[error("registry: other nodes of the cluster are changing it at this moment")]
    Overtaken,
    /// The cluster's registry cannot be reached: NATS is away. What was asked for may have been done all the
    /// same, if that happened in the middle of it.
    #[error("registry: it cannot be changed while NATS is away ({0})")]
    Away(String),
    /// It does not fit in a message of NATS, by which other nodes would learn of it.
    #[error("it is too large for the cluster's registry: {0}")]
    TooLarge(String),
    /// The cluster's registry cannot be used as it is.
    #[error("registry: {0}")]
    Cluster(String),
    /// The database.
    #[error("registry: {0}")]
    Database(#[from] rusqlite::Error),
    /// A file.
    #[error("registry: {0}")]
    Io(#[from] std::io::Error),
}

/// Datasources and keys: durable, and the live view.
pub struct Registry {
    /// Locked by a change until it has reached the live view too.
    database: Mutex<Database>,
    pub(super) live: Live,
    /// Keys whose use is not on the disk yet.
    pub(super) noted: Noted,
    /// See [`Registry::usage`].
    pub(super) adding_usage: Mutex<()>,
    /// The registries of the other nodes, in a cluster.
    pub(super) replica: Option<Arc<dyn Replica>>,
    /// What the cluster's registry has of rules about leaked keys.
    pub(super) leaks: Mutex<LeakRules>,
}

impl Registry {
    /// Opens or creates `dir/registry.db` and reads it into memory. A new registry holds no key. The
    /// directory has to be there.
    ///
    /// # Errors
    /// [`RegistryError::Newer`], [`RegistryError::Damaged`] or [`RegistryError::InUse`], each naming
    /// the file; [`RegistryError::Io`] or [`RegistryError::Database`] if it cannot be read or made.
    pub fn open(dir: &Path) -> Result<Self, RegistryError> {
        Self::of(Database::open(dir)?, None)
    }

    /// The registry of what is in a database.
    pub(super) fn of(
        mut database: Database,
        replica: Option<Arc<dyn Replica>>,
    ) -> Result<Self, RegistryError> {
        if let Some(replica) = &replica {
            database.join(replica.clone());
        }
        let datasources = papaya::HashMap::with_capacity(database.datasource_count()?);
        database.datasources(|datasource| {
            datasources.pin().insert(datasource.id.clone(), Arc::new(datasource));
        })?;

        let keys = Index::with_capacity(database.key_count()?);
        let (mut by_datasource, mut deadlines) = (Vec::new(), BTreeSet::new());
        let all = DatasourceId::all();
        database.keys(|stored| {
            let known = datasources.pin();
            if stored.revoked {
                keys.set(&stored.digest, None);
                return Ok(());
            }
            let id = stored.digest.key_id();
            // Shares the text of the id with the datasource.
            let datasource = match known.get_key_value(stored.datasource) {
                Some((datasource, _)) => datasource.clone(),
                None if stored.datasource == all.as_str() => all.clone(),
                None => return Err(RegistryError::NoDatasource(stored.datasource.to_owned())),
            };
            let key = Arc::new(Key::from(NewKey {
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
                key.ends_at.store(ENDED, Ordering::Relaxed);
            } else if let Some(at) = key.ends_at() {
                deadlines.insert((at, datasource.clone(), id));
            }
            by_datasource.push(((datasource, id), Arc::clone(&key)));
            keys.set(&stored.digest, Some(key));
            Ok(())
        })?;
        keys.gather();
        let by_datasource = RwLock::new(by_datasource.into_iter().collect());
        let deadlines = Mutex::new(deadlines);
        let live = Live { keys, datasources, by_datasource, deadlines, deadline_set: Notify::new() };
        let database = Mutex::new(database);
        Ok(Self {
            database,
            live,
            noted: Noted::default(),
            adding_usage: Mutex::default(),
            replica,
            leaks: Mutex::default(),
        })
    }

    /// One datasource.
    pub fn datasource(&self, id: &str) -> Option<Arc<Datasource>> {
        self.live.datasources.pin().get(id).map(Arc::clone)
    }

    /// What is to be known of one datasource. For the path of a message: it shares no counter with
    /// other threads.
    pub fn of_datasource<T>(&self, id: &str, what: impl FnOnce(&Datasource) -> T) -> Option<T> {
        self.live.datasources.pin().get(id).map(|datasource| what(datasource))
    }

    /// Whether there is such a datasource; `*` is none. For the path of a message: it shares no
    /// counter with other threads.
    pub fn has_datasource(&self, id: &str) -> bool {
        self.live.datasources.pin().contains_key(id)
    }

    /// All, ordered by id.
    pub fn datasources(&self) -> Vec<Arc<Datasource>> {
        let mut all: Vec<_> = self.live.datasources.pin().values().map(Arc::clone).collect();
        all.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// The keys of a datasource, or those for all of them, that are not revoked: oldest first.
    pub fn keys(&self, datasource: &DatasourceId) -> Vec<Arc<Key>> {
        let mut keys = self.live.keys_of(datasource);
        keys.sort_by_key(|key| key.created_at);
        keys
    }

    /// One key of a datasource, or of those for all of them, that is not revoked.
    pub fn key(&self, datasource: &DatasourceId, id: KeyId) -> Option<Arc<Key>> {
        self.live.key(datasource, id)
    }

    /// How many keys there are that are not revoked.
    pub fn key_count(&self) -> usize {
        self.live.key_count()
    }

    /// What is known of a digest.
    pub(super) fn look_up(&self, digest: &Digest) -> Option<Found> {
        self.live.keys.find(digest)
    }

    /// The key with this digest, unless it is revoked; it may have expired.
    pub fn find(&self, digest: &Digest) -> Option<Arc<Key>> {
        self.live.find(digest)
    }

    /// Whether there was a key with this digest that has been revoked.
    pub fn was_revoked(&self, digest: &Digest) -> bool {
        matches!(self.look_up(digest), Some(Found::Revoked))
    }

    /// How a key came to its end, for people: `was revoked at 2026-11-23T09:28:39.000120Z`. `None` for a
    /// key that has not been revoked. Reads the file.
    ///
    /// # Errors
    /// [`RegistryError::Database`] if it cannot be read.
    pub fn end_of(&self, id: KeyId) -> Result<Option<String>, RegistryError> {
        let Some((at, why)) = self.change().end_of(id)? else { return Ok(None) };
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
    pub fn audited(&self, page: &Page) -> Result<Vec<Entry>, RegistryError> {
        self.change().audited(page)
    }

    /// Makes a change: what `make` does with the database, once, and then with the live view. In a cluster
    /// it is done again, from its beginning, if another node was faster, and every other node has it
    /// when this returns.
    pub(super) fn changing<T>(
        &self,
        make: impl FnMut(&mut Database) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let (made, revision) = self.changing_here(make)?;
        if let Some(replica) = &self.replica {
            replica.everywhere(revision);
        }
        Ok(made)
    }

    /// The same, and nobody waits for the other nodes. Returns the revision that they will have, too.
    pub(super) fn changing_here<T>(
        &self,
        mut make: impl FnMut(&mut Database) -> Result<T, RegistryError>,
    ) -> Result<(T, Revision), RegistryError> {
        for _ in 0..CHANGE_ATTEMPTS_MAX {
            let mut database = self.change();
            match (make(&mut database), &self.replica) {
                (Err(RegistryError::Overtaken), Some(replica)) => {
                    // Whoever applies what others have changed needs it.
                    drop(database);
                    let revision = replica.catch_up()?;
                    self.change().caught_up(revision);
                }
                (made, _) => return Ok((made?, database.applied())),
            }
        }
        Err(RegistryError::Overtaken)
    }

    /// The one door of changes.
    pub(super) fn change(&self) -> MutexGuard<'_, Database> {
        // After a panic between disk and live view the two may differ: no more changes then.
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
