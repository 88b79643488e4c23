//! The registry: all datasources and the keys that open them. It is durable in SQLite (`database.rs`),
//! and live in memory (`live.rs`), where every presented key is looked up.
//!
//! Changes (`datasources.rs`, `keys.rs`, `rotations.rs`) are made one at a time: **first on the disk**
//! (`transaction.rs`), **then in the live view**, and a change has reached both when the call returns. So a key
//! that was handed out survives any crash. The audit entry of a change is in the same transaction as the change.
//!
//! The end of a key goes **first into the live view, then to the disk** (`key_ends.rs`): a key dies whatever the
//! disk says. Its lease has ended, which stops every message in flight under it, its connections have been told
//! to close, and no lookup finds it. It is dead for good once that is durable, usually when the call returns.
//!
//! In a cluster every node has its own registry in memory, and a change reaches all nodes or none
//! (`cluster/`): it is published before it takes effect here, the changes of other nodes are applied
//! here (`remote_changes.rs`), and the call that makes a change returns when every node has it.
//!
//! Lookups are lock-free. Changes and reads of the audit wait for the disk: call them where blocking is
//! allowed.

pub mod audit;
pub mod cluster;
mod copy;
mod database;
pub mod datasource;
mod datasource_traffic;
pub mod datasources;
pub mod deadlines;
mod disk_reserve;
pub mod error;
mod first_admin;
pub mod incarnations;
pub(super) mod index;
pub mod key;
pub mod key_ends;
pub mod keys;
pub mod leak_rules;
pub mod leaks;
mod live;
mod quarantine_file;
mod queries;
mod remote_changes;
mod replica;
pub mod rotations;
mod rows;
pub mod setting;
pub mod token_ends;
pub mod token_secret;
mod transaction;
pub mod transfer;
mod unwritten_ends;
pub mod usage;
mod usage_notes;

pub use error::REGISTRY_FILE_NAME;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{self, Arc, OnceLock};

use arc_swap::ArcSwapOption;
use headgate_format::key::Digest;
use parking_lot::Mutex;

use super::token::TokenSecret;
use crate::limits::CHANGE_ATTEMPTS_MAX;
use crate::message::{DatasourceId, KeyId};
use crate::sqlite::set_aside;
use crate::time::Rfc3339;

use audit::{AuditEntry, AuditQuery};
use database::RegistryDatabase;
use datasource::Datasource;
use disk_reserve::DiskReserve;
use error::RegistryError;
use incarnations::LogEndQuery;
use index::KeyLookup;
use key::Key;
use key_ends::DiskReserveUse;
use leak_rules::RecordRuleFollower;
use live::LiveRegistry;
use quarantine_file::QuarantineFile;
use replica::{RegistryReplica, RegistryRevision};
use token_ends::TokenEnds;
use unwritten_ends::UnwrittenEnds;

/// Datasources and keys: the database and the live view.
pub struct Registry {
    /// Locked by a change until it has reached the live view too. The one lock that a panic poisons: no
    /// change starts from half of another one.
    database: sync::Mutex<RegistryDatabase>,
    live: LiveRegistry,
    /// Keys whose usage is not yet on the disk.
    noted: Mutex<Vec<Arc<Key>>>,
    /// See [`Registry::usage`].
    adding_usage: Mutex<()>,
    /// The registries of the other nodes, in a cluster.
    replica: Option<Arc<dyn RegistryReplica>>,
    /// Locked inside the lock of the database only.
    record_rules: Mutex<RecordRuleFollower>,
    /// See [`Registry::set_log_end`].
    log_end: OnceLock<LogEndQuery>,
    /// Changed only under the lock of the database.
    unwritten: UnwrittenEnds,
    /// `None` in a cluster, whose registry is not on this disk.
    reserve: Option<DiskReserve>,
    /// `None` in a cluster, which never had it.
    quarantine_file: Option<QuarantineFile>,
    /// What access tokens are signed with. Changed only under the lock of the database.
    token_secret: ArcSwapOption<TokenSecret>,
    /// What is open with access tokens.
    token_ends: Arc<TokenEnds>,
}

impl Registry {
    /// Opens or creates `dir/registry.db` and reads it into memory. A new registry has no keys. The
    /// directory must exist.
    ///
    /// # Errors
    /// [`RegistryError::Database`], which names the file.
    pub fn open(dir: &Path) -> Result<Self, RegistryError> {
        let mut database = RegistryDatabase::open(dir)?;
        let quarantine_file = Some(QuarantineFile::open(dir, &mut database));
        database.note_past_incarnations()?;
        let reserve = Some(DiskReserve::open(dir));
        Ok(Self { reserve, quarantine_file, ..Self::from_database(database, None)? })
    }

    /// As [`Registry::open`], if there is one.
    ///
    /// # Errors
    /// [`RegistryError::Database`], also if nothing but its write-ahead log is there.
    pub fn open_existing(dir: &Path) -> Result<Option<Self>, RegistryError> {
        RegistryDatabase::check_write_ahead_log(dir)?;
        if Self::is_there(dir) { Self::open(dir).map(Some) } else { Ok(None) }
    }

    /// Sets `dir/registry.db` aside, with its write-ahead log. Returns its new path.
    ///
    /// # Errors
    /// [`RegistryError::Database`].
    pub fn set_aside(dir: &Path) -> Result<PathBuf, RegistryError> {
        Ok(set_aside(&dir.join(error::REGISTRY_FILE_NAME))?)
    }

    /// Whether `dir` has a registry. An empty file is none: it is what some copies and repairs leave.
    pub fn is_there(dir: &Path) -> bool {
        std::fs::metadata(dir.join(error::REGISTRY_FILE_NAME)).is_ok_and(|file| file.len() > 0)
    }

    /// Builds the live view from a database.
    fn from_database(
        mut database: RegistryDatabase,
        replica: Option<Arc<dyn RegistryReplica>>,
    ) -> Result<Self, RegistryError> {
        if let Some(replica) = &replica {
            database.join(replica.clone());
        }
        let live = LiveRegistry::load(&database)?;
        let registry = Self {
            database: sync::Mutex::new(database),
            live,
            noted: Mutex::default(),
            adding_usage: Mutex::default(),
            replica,
            record_rules: Mutex::default(),
            log_end: OnceLock::new(),
            unwritten: UnwrittenEnds::default(),
            reserve: None,
            quarantine_file: None,
            token_secret: ArcSwapOption::empty(),
            token_ends: Arc::default(),
        };
        registry.load_token_secret(&registry.lock_database())?;
        Ok(registry)
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

    /// The scope of the incarnation that a key is of; `*` for a key for all datasources. `None` if the key is dead.
    pub fn scope_of(&self, key: &Key) -> Option<DatasourceId> {
        if key.datasource.is_all() {
            return Some(key.datasource.clone());
        }
        let incarnation =
            self.with_datasource(key.datasource.as_str(), |datasource| datasource.incarnation)?;
        // Its datasource cannot be created again before the lease of a key of the last one has ended: while this
        // holds, that was the datasource of the key.
        key.holds().then(|| key.datasource.scope(incarnation))
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

    /// How many ends of keys and deletions are in force and not yet durable.
    pub fn unwritten_count(&self) -> usize {
        self.unwritten.count()
    }

    /// The number of datasources.
    pub fn datasource_count(&self) -> usize {
        self.live.datasources.len()
    }

    /// The number of keys that are not revoked.
    pub fn key_count(&self) -> usize {
        self.live.key_count()
    }

    /// Looks up a digest, among revoked keys too.
    pub(in crate::auth) fn look_up(&self, digest: &Digest) -> Option<KeyLookup> {
        self.live.keys.find(digest)
    }

    /// As [`Registry::look_up`], by the first bytes of the digest.
    pub(in crate::auth) fn look_up_beginning(&self, beginning: [u8; 8]) -> Option<KeyLookup> {
        self.live.keys.find_beginning(beginning)
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

    /// Whether this node may have missed that a key died: it was without NATS for so long that the others no
    /// longer wait for it, and has not caught up yet. Nothing may be accepted meanwhile. A few atomic loads.
    pub fn may_be_behind(&self) -> bool {
        self.replica.as_ref().is_some_and(|replica| !replica.is_current())
    }

    /// Waits until this node has applied all changes that the cluster had made before the call. Returns at
    /// once without a cluster.
    ///
    /// # Errors
    /// [`RegistryError::Away`] if that takes too long.
    pub async fn caught_up(self: &Arc<Self>) -> Result<(), RegistryError> {
        let Some(replica) = self.replica.clone() else { return Ok(()) };
        let caught_up = tokio::task::spawn_blocking(move || replica.catch_up()).await;
        caught_up.map_err(|error| RegistryError::Cluster(error.to_string()))?.map(drop)
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
    /// change when this returns. Ends of keys that are not yet durable are written first.
    fn make_change<T>(
        &self,
        make: impl FnMut(&mut RegistryDatabase) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let (made, revision) = self.make_after_ends(DiskReserveUse::Kept, make)?;
        if let Some(replica) = &self.replica {
            replica.wait_everywhere(revision);
        }
        Ok(made)
    }

    /// As [`Registry::make_change`], but without the ends of keys, and without waiting for the other nodes. Also
    /// returns the revision that they will reach.
    fn make_change_here<T>(
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
    fn lock_database(&self) -> sync::MutexGuard<'_, RegistryDatabase> {
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

#[cfg(test)]
mod tests;
