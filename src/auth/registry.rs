//! The registry: which datasources there are and which keys open them. Durable in SQLite (see
//! `database.rs`), and live in memory, where every presented key is looked up.
//!
//! Each change goes through one door, one at a time: **first to the disk, then into the live view**,
//! and it has reached both when the call returns. So a key that was handed out survives any crash,
//! and a revoked one is dead for good: its lease has ended, which stops every message that is on its
//! way under it, its connections have been told to close, and no lookup finds it.
//!
//! Looking up is free of locks. Changes wait for the disk: call them where blocking is allowed.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use serde::Serialize;

use super::Scopes;
use super::connections::{Close, Connections};
use super::database::Database;
use super::key::{ApiKey, Digest, DigestHash};
use crate::limits::{DATASOURCE_ID_BYTES_MAX, NAME_BYTES_MAX};
use crate::message::{DatasourceId, KeyId, Lease, TimeMicros, now_micros};

/// One named stream of readings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Datasource {
    /// The slug.
    pub id: DatasourceId,
    /// What a person calls it.
    pub name: String,
    /// When it was created.
    pub created_at: TimeMicros,
}

/// One key, live: everything but its secret.
pub struct Key {
    /// Its public handle; no other key has or had the same.
    pub id: KeyId,
    /// What it belongs to, or `*`.
    pub datasource: DatasourceId,
    /// What it may be used for.
    pub scopes: Scopes,
    /// What a person calls it, or empty.
    pub label: String,
    /// When it was created.
    pub created_at: TimeMicros,
    /// When it stops working by itself.
    pub expires_at: Option<TimeMicros>,
    /// Whether it is still good.
    pub lease: Lease,
    /// What it has opened.
    pub connections: Arc<Connections>,
}

impl Key {
    /// Whether its time is over.
    pub fn has_expired(&self) -> bool {
        self.expires_at.is_some_and(|expires_at| expires_at <= now_micros())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key")
            .field("id", &self.id)
            .field("datasource", &self.datasource)
            .field("scopes", &self.scopes)
            .field("label", &self.label)
            .finish_non_exhaustive()
    }
}

/// Why the registry could not do what was asked. Nothing has then changed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// There is a datasource with that id already.
    #[error("there is a datasource {0} already")]
    Exists(DatasourceId),
    /// There is none.
    #[error("there is no datasource {0:?}")]
    NoDatasource(String),
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
    /// Every key there is, and as `None` every key that was revoked.
    keys: papaya::HashMap<Digest, Option<Arc<Key>>, DigestHash>,
    datasources: papaya::HashMap<DatasourceId, Arc<Datasource>>,
    /// The keys that are not revoked, for those who manage them.
    by_datasource: RwLock<BTreeMap<(DatasourceId, KeyId), Arc<Key>>>,
}

impl Registry {
    /// Opens or creates `dir/registry.db` and reads it into memory. A new registry holds no key. The
    /// directory has to be there.
    ///
    /// # Errors
    /// [`RegistryError::Newer`], [`RegistryError::Damaged`] or [`RegistryError::InUse`], each naming
    /// the file; [`RegistryError::Io`] or [`RegistryError::Database`] if it cannot be read or made.
    pub fn open(dir: &Path) -> Result<Self, RegistryError> {
        let database = Database::open(dir)?;
        let datasources = papaya::HashMap::new();
        database.datasources(|datasource| {
            datasources.pin().insert(datasource.id.clone(), Arc::new(datasource));
        })?;

        let keys = papaya::HashMap::with_capacity_and_hasher(database.key_count()?, DigestHash);
        let mut by_datasource = Vec::new();
        let all = DatasourceId::all();
        database.keys(|stored| {
            let (known, keys) = (datasources.pin(), keys.pin());
            if stored.revoked {
                keys.insert(stored.digest, None);
                return Ok(());
            }
            let id = stored.digest.key_id();
            // Shares the text of the id with the datasource.
            let datasource = match known.get_key_value(stored.datasource) {
                Some((datasource, _)) => datasource.clone(),
                None if stored.datasource == all.as_str() => all.clone(),
                None => return Err(RegistryError::NoDatasource(stored.datasource.to_owned())),
            };
            let key = Arc::new(Key {
                id,
                datasource: datasource.clone(),
                scopes: stored.scopes,
                label: stored.label.to_owned(),
                created_at: stored.created_at,
                expires_at: stored.expires_at,
                lease: Lease::new(),
                connections: Arc::default(),
            });
            by_datasource.push(((datasource, id), Arc::clone(&key)));
            keys.insert(stored.digest, Some(key));
            Ok(())
        })?;
        Ok(Self {
            database: Mutex::new(database),
            keys,
            datasources,
            by_datasource: RwLock::new(by_datasource.into_iter().collect()),
        })
    }

    /// Creates a datasource and its first key; both are durable on return. Without an `id` one is
    /// made from the name, with `-2`, `-3`, … behind it if it is taken.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] if the `id` is taken; [`RegistryError::Name`] if the name is blank,
    /// too long or has control characters, if no id can be made from it, or if there are no scopes;
    /// [`RegistryError::Database`] if it cannot be made durable.
    pub fn create_datasource(
        &self,
        id: Option<DatasourceId>,
        name: &str,
        scopes: Scopes,
    ) -> Result<(Datasource, Arc<Key>, ApiKey), RegistryError> {
        let name = check_name("name", name)?;
        if name.is_empty() {
            return Err(RegistryError::Name("a datasource needs a name".to_owned()));
        }
        let mut database = self.change();
        let id = match id {
            Some(id) if id.is_all() => {
                return Err(RegistryError::Name("'*' means every datasource and cannot be one".to_owned()));
            }
            Some(id) if self.has_datasource(id.as_str()) => return Err(RegistryError::Exists(id)),
            Some(id) => id,
            None => self.free_id(name)?,
        };
        let datasource = Datasource { id, name: name.to_owned(), created_at: now_micros() };
        let (key, secret) = new_key(&database, &datasource.id, "", scopes, None)?;
        database.insert(Some(&datasource), &key, &secret.digest())?;
        self.datasources.pin().insert(datasource.id.clone(), Arc::new(datasource.clone()));
        let key = self.make_live(key, &secret);
        drop(database);
        tracing::info!(datasource = %datasource.id, key_id = %key.id, %scopes, "datasource created");
        Ok((datasource, key, secret))
    }

    /// Creates a key of a datasource or of all of them ([`DatasourceId::all`]), durable on return.
    ///
    /// # Errors
    /// [`RegistryError::NoDatasource`]; [`RegistryError::Name`] if the label is too long or has
    /// control characters, or if there are no scopes; [`RegistryError::Database`] if it cannot be
    /// made durable.
    pub fn create_key(
        &self,
        datasource: &DatasourceId,
        label: &str,
        scopes: Scopes,
        expires_at: Option<TimeMicros>,
    ) -> Result<(Arc<Key>, ApiKey), RegistryError> {
        let label = check_name("label", label)?;
        let mut database = self.change();
        if !datasource.is_all() && !self.has_datasource(datasource.as_str()) {
            return Err(RegistryError::NoDatasource(datasource.to_string()));
        }
        let (key, secret) = new_key(&database, datasource, label, scopes, expires_at)?;
        database.insert(None, &key, &secret.digest())?;
        let key = self.make_live(key, &secret);
        drop(database);
        tracing::info!(%datasource, key_id = %key.id, %scopes, "key created");
        Ok((key, secret))
    }

    /// One datasource.
    pub fn datasource(&self, id: &str) -> Option<Arc<Datasource>> {
        self.datasources.pin().get(id).map(Arc::clone)
    }

    /// Whether there is such a datasource; `*` is none. For the path of a message: it shares no
    /// counter with other threads.
    pub fn has_datasource(&self, id: &str) -> bool {
        self.datasources.pin().contains_key(id)
    }

    /// All, ordered by id.
    pub fn datasources(&self) -> Vec<Arc<Datasource>> {
        let mut all: Vec<_> = self.datasources.pin().values().map(Arc::clone).collect();
        all.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// The keys of a datasource, or those for all of them, that are not revoked: oldest first.
    pub fn keys(&self, datasource: &DatasourceId) -> Vec<Arc<Key>> {
        let first = (datasource.clone(), KeyId([0; 6]));
        let last = (datasource.clone(), KeyId([0xff; 6]));
        let by_datasource = self.by_datasource.read().unwrap_or_else(PoisonError::into_inner);
        let mut keys: Vec<_> = by_datasource.range(first..=last).map(|(_, key)| Arc::clone(key)).collect();
        drop(by_datasource);
        keys.sort_by_key(|key| key.created_at);
        keys
    }

    /// How many keys there are that are not revoked.
    pub fn key_count(&self) -> usize {
        self.by_datasource.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Deletes a datasource and revokes its keys, durably; every key's lease has ended and its
    /// connections are told to close before this returns. Returns those keys, to wait for.
    ///
    /// # Errors
    /// [`RegistryError::NoDatasource`]; [`RegistryError::Database`] if it cannot be made durable:
    /// then the keys go on working.
    pub fn delete_datasource(&self, id: &DatasourceId) -> Result<Vec<Arc<Key>>, RegistryError> {
        let mut database = self.change();
        if !self.has_datasource(id.as_str()) {
            return Err(RegistryError::NoDatasource(id.to_string()));
        }
        let digests = database.remove(id, now_micros())?;
        self.datasources.pin().remove(id.as_str());
        let dead: Vec<_> = digests.iter().filter_map(|digest| self.kill(digest)).collect();
        drop(database);
        tracing::info!(datasource = %id, keys = dead.len(), "datasource deleted");
        Ok(dead)
    }

    /// Revokes one key, durably; its lease has ended and its connections are told to close before
    /// this returns. Returns it, to wait for; `None` if the datasource has no such key (any more).
    ///
    /// # Errors
    /// [`RegistryError::NoDatasource`]; [`RegistryError::Database`] if it cannot be made durable:
    /// then the key goes on working.
    pub fn revoke_key(
        &self,
        datasource: &DatasourceId,
        id: KeyId,
    ) -> Result<Option<Arc<Key>>, RegistryError> {
        let mut database = self.change();
        if !datasource.is_all() && !self.has_datasource(datasource.as_str()) {
            return Err(RegistryError::NoDatasource(datasource.to_string()));
        }
        let digest = database.revoke(datasource, id, now_micros())?;
        let dead = digest.and_then(|digest| self.kill(&digest));
        drop(database);
        if dead.is_some() {
            tracing::info!(%datasource, key_id = %id, "key revoked");
        }
        Ok(dead)
    }

    /// The key with this digest, unless it is revoked; it may have expired.
    pub fn find(&self, digest: &Digest) -> Option<Arc<Key>> {
        self.keys.pin().get(digest)?.clone()
    }

    /// Whether there was a key with this digest that has been revoked.
    pub fn was_revoked(&self, digest: &Digest) -> bool {
        self.keys.pin().get(digest).is_some_and(Option::is_none)
    }

    fn change(&self) -> MutexGuard<'_, Database> {
        // After a panic between disk and live view the two may differ: no more changes then.
        self.database.lock().expect("no change of the registry has panicked halfway")
    }

    /// The first id made from `name` that is free.
    fn free_id(&self, name: &str) -> Result<DatasourceId, RegistryError> {
        let id = DatasourceId::from_name(name).ok_or_else(|| {
            let text = "the name has no letter a-z or digit to make an id from: give an id as well";
            RegistryError::Name(text.to_owned())
        })?;
        if !self.has_datasource(id.as_str()) {
            return Ok(id);
        }
        let numbered = |number: u64| {
            let suffix = format!("-{number}");
            let room = DATASOURCE_ID_BYTES_MAX - suffix.len();
            let stem = id.as_str().get(..room).unwrap_or(id.as_str()).trim_end_matches('-');
            DatasourceId::new(&format!("{stem}{suffix}")).expect("a slug with a number is a slug")
        };
        let free = (2..).map(numbered).find(|id| !self.has_datasource(id.as_str()));
        Ok(free.expect("there are more numbers than datasources"))
    }

    /// The change is on the disk.
    fn make_live(&self, key: Key, secret: &ApiKey) -> Arc<Key> {
        let key = Arc::new(key);
        let place = (key.datasource.clone(), key.id);
        self.by_datasource.write().unwrap_or_else(PoisonError::into_inner).insert(place, Arc::clone(&key));
        self.keys.pin().insert(secret.digest(), Some(Arc::clone(&key)));
        key
    }

    /// The change is on the disk. The lease first: it stops what is already past the lookup.
    fn kill(&self, digest: &Digest) -> Option<Arc<Key>> {
        let key = self.find(digest)?;
        key.lease.end();
        key.connections.close_all(Close::KeyDead);
        self.keys.pin().insert(*digest, None);
        self.by_datasource
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&(key.datasource.clone(), key.id));
        Some(key)
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("datasources", &self.datasources.len())
            .field("keys", &self.key_count())
            .finish_non_exhaustive()
    }
}

/// A key that is not in the registry yet, with an id that none has or had.
fn new_key(
    database: &Database,
    datasource: &DatasourceId,
    label: &str,
    scopes: Scopes,
    expires_at: Option<TimeMicros>,
) -> Result<(Key, ApiKey), RegistryError> {
    if scopes.is_empty() {
        return Err(RegistryError::Name("a key needs at least one scope".to_owned()));
    }
    // Ids have 48 bits: among a million keys, once in 280 million times.
    let (id, secret) = loop {
        let secret = ApiKey::generate();
        let id = secret.digest().key_id();
        if !database.knows(id)? {
            break (id, secret);
        }
    };
    let key = Key {
        id,
        datasource: datasource.clone(),
        scopes,
        label: label.to_owned(),
        created_at: now_micros(),
        expires_at,
        lease: Lease::new(),
        connections: Arc::default(),
    };
    Ok((key, secret))
}

/// A name or label without the white space around it.
fn check_name<'a>(what: &str, text: &'a str) -> Result<&'a str, RegistryError> {
    let text = text.trim();
    if text.len() > NAME_BYTES_MAX {
        return Err(RegistryError::Name(format!("a {what} has at most {NAME_BYTES_MAX} bytes")));
    }
    // A line break or an escape would let a name forge lines of a table or a log.
    if text.chars().any(char::is_control) {
        return Err(RegistryError::Name(format!("a {what} holds no control characters")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use tempfile::TempDir;

    use super::*;
    use crate::auth::Scope;
    use crate::auth::connections::Control;

    fn empty() -> (TempDir, Registry) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Registry::open(dir.path()).expect("opens");
        (dir, registry)
    }

    fn reopened(dir: &TempDir, registry: Registry) -> Registry {
        drop(registry);
        Registry::open(dir.path()).expect("opens again")
    }

    fn ingest() -> Scopes {
        Scopes::of(&[Scope::Ingest])
    }

    fn slug(id: &str) -> DatasourceId {
        DatasourceId::new(id).expect("a slug")
    }

    /// Makes every change fail as a full or broken disk would.
    fn break_disk(registry: &Registry, broken: bool) {
        registry.change().refuse_changes(broken);
    }

    #[test]
    fn a_new_registry_holds_nothing() {
        let (_dir, registry) = empty();
        assert_eq!(registry.key_count(), 0);
        assert!(registry.datasources().is_empty());
        assert!(registry.find(&ApiKey::generate().digest()).is_none());
    }

    #[test]
    fn what_was_created_is_there_after_a_restart() {
        let (dir, registry) = empty();
        let (press, first, first_secret) =
            registry.create_datasource(None, " Press 4 ", ingest()).expect("created");
        assert_eq!((press.id.as_str(), press.name.as_str()), ("press-4", "Press 4"));
        let both = Scopes::of(&[Scope::Subscribe, Scope::Ingest]);
        let far = now_micros() + 1_000_000_000;
        let (second, second_secret) =
            registry.create_key(&press.id, "line 2", both, Some(far)).expect("created");
        let (admin, admin_secret) = registry
            .create_key(&DatasourceId::all(), "admin", Scopes::of(&[Scope::Admin]), None)
            .expect("created");

        let registry = reopened(&dir, registry);
        assert_eq!(registry.datasources(), [Arc::new(press.clone())]);
        assert_eq!(registry.datasource("press-4").as_deref(), Some(&press));
        assert_eq!(registry.key_count(), 3);
        for (secret, was) in [(first_secret, first), (second_secret, second), (admin_secret, admin)] {
            let key = registry.find(&secret.digest()).expect("kept");
            assert_eq!((key.id, &key.datasource, key.scopes), (was.id, &was.datasource, was.scopes));
            assert_eq!((&key.label, key.created_at), (&was.label, was.created_at));
            assert_eq!(key.expires_at, was.expires_at);
            assert!(key.lease.holds());
        }
        let labels: Vec<_> = registry.keys(&press.id).iter().map(|key| key.label.clone()).collect();
        assert_eq!(labels, ["", "line 2"]);
        assert_eq!(registry.keys(&DatasourceId::all()).len(), 1);
    }

    #[test]
    fn a_deleted_datasource_takes_its_keys_with_it_at_once_and_for_good() {
        let (dir, registry) = empty();
        let (a, key, secret) = registry.create_datasource(None, "a", ingest()).expect("created");
        let (b, _, b_secret) = registry.create_datasource(None, "b", ingest()).expect("created");
        let (second, second_secret) = registry.create_key(&a.id, "", ingest(), None).expect("created");
        let control = Arc::new(Control::default());
        let _entered = key.connections.enter(Arc::clone(&control));

        let dead = registry.delete_datasource(&a.id).expect("deleted");
        assert!(!key.lease.holds() && !second.lease.holds());
        assert_eq!(control.closed(), Some(Close::KeyDead));
        let mut dead: Vec<_> = dead.iter().map(|key| key.id).collect();
        let mut expected = [key.id, second.id];
        dead.sort_unstable();
        expected.sort_unstable();
        assert_eq!(dead, expected);

        let check = |registry: &Registry| {
            for secret in [&secret, &second_secret] {
                assert!(registry.find(&secret.digest()).is_none());
                assert!(registry.was_revoked(&secret.digest()));
            }
            assert!(!registry.has_datasource("a") && registry.datasource("a").is_none());
            assert!(registry.keys(&a.id).is_empty());
            assert_eq!(registry.datasources(), [Arc::new(b.clone())]);
            assert!(registry.find(&b_secret.digest()).is_some_and(|key| key.lease.holds()));
            assert_eq!(registry.key_count(), 1);
            let error = registry.delete_datasource(&a.id).expect_err("deleted already");
            assert!(matches!(error, RegistryError::NoDatasource(_)), "{error}");
        };
        check(&registry);
        let registry = reopened(&dir, registry);
        check(&registry);

        let (again, ..) = registry.create_datasource(Some(a.id.clone()), "a", ingest()).expect("free");
        assert_eq!(registry.keys(&again.id).len(), 1, "the old keys stay dead");
        assert!(registry.was_revoked(&secret.digest()));
    }

    #[test]
    fn a_revoked_key_is_dead_at_once_and_for_good_and_its_sisters_live() {
        let (dir, registry) = empty();
        let (a, first, secret) = registry.create_datasource(None, "a", ingest()).expect("created");
        let (b, ..) = registry.create_datasource(None, "b", ingest()).expect("created");
        let (sister, sister_secret) = registry.create_key(&a.id, "", ingest(), None).expect("created");
        let control = Arc::new(Control::default());
        let _entered = first.connections.enter(Arc::clone(&control));

        assert!(registry.revoke_key(&b.id, first.id).expect("asked").is_none(), "not b's key");
        assert!(first.lease.holds() && control.closed().is_none());
        let error = registry.revoke_key(&slug("c"), first.id).expect_err("no c");
        assert!(matches!(error, RegistryError::NoDatasource(_)), "{error}");

        let dead = registry.revoke_key(&a.id, first.id).expect("revoked").expect("was live");
        assert_eq!(dead.id, first.id);
        assert!(!first.lease.holds());
        assert_eq!(control.closed(), Some(Close::KeyDead));
        assert!(registry.revoke_key(&a.id, first.id).expect("asked").is_none(), "once");

        let registry = reopened(&dir, registry);
        assert!(registry.find(&secret.digest()).is_none() && registry.was_revoked(&secret.digest()));
        assert!(registry.find(&sister_secret.digest()).is_some());
        assert_eq!(registry.keys(&a.id).iter().map(|key| key.id).collect::<Vec<_>>(), [sister.id]);
    }

    #[test]
    fn a_key_for_all_can_be_revoked_too() {
        let (_dir, registry) = empty();
        let (key, secret) = registry.create_key(&DatasourceId::all(), "", ingest(), None).expect("created");
        registry.revoke_key(&DatasourceId::all(), key.id).expect("revoked").expect("was live");
        assert!(registry.was_revoked(&secret.digest()));
        assert_eq!(registry.key_count(), 0);
    }

    #[test]
    fn what_a_call_returned_is_on_disk_without_a_clean_end() {
        let (dir, registry) = empty();
        // The files as a kill at this moment would leave them.
        let as_left = || {
            let left = tempfile::tempdir().expect("temporary directory");
            for file in std::fs::read_dir(dir.path()).expect("readable") {
                let file = file.expect("entry");
                std::fs::copy(file.path(), left.path().join(file.file_name())).expect("copied");
            }
            let registry = Registry::open(left.path()).expect("opens");
            (left, registry)
        };
        let (a, _, secret) = registry.create_datasource(None, "a", ingest()).expect("created");
        assert!(as_left().1.find(&secret.digest()).is_some());
        registry.delete_datasource(&a.id).expect("deleted");
        let (_left, after) = as_left();
        assert!(after.find(&secret.digest()).is_none() && after.was_revoked(&secret.digest()));
        assert!(after.datasources().is_empty());
    }

    #[test]
    fn a_change_that_does_not_reach_the_disk_does_not_reach_the_live_view() {
        let (dir, registry) = empty();
        let (a, key, secret) = registry.create_datasource(None, "a", ingest()).expect("created");
        break_disk(&registry, true);
        let failed = [
            registry.create_datasource(None, "b", ingest()).err(),
            registry.create_key(&a.id, "", ingest(), None).err(),
            registry.delete_datasource(&a.id).err(),
            registry.revoke_key(&a.id, key.id).err(),
        ];
        for error in failed {
            assert!(matches!(error, Some(RegistryError::Database(_))), "{error:?}");
        }
        let check = |registry: &Registry| {
            assert_eq!(registry.datasources().len(), 1);
            assert_eq!(registry.key_count(), 1);
            assert!(registry.find(&secret.digest()).is_some_and(|key| key.lease.holds()));
        };
        check(&registry);
        assert!(key.lease.holds());
        break_disk(&registry, false);
        registry.create_key(&a.id, "", ingest(), None).expect("works again");
        registry.revoke_key(&a.id, registry.keys(&a.id)[1].id).expect("works again");
        check(&reopened(&dir, registry));
    }

    #[test]
    fn no_file_of_the_registry_holds_a_secret() {
        let (dir, registry) = empty();
        let (a, _, first) = registry.create_datasource(None, "a", ingest()).expect("created");
        let (second_key, second) = registry.create_key(&a.id, "label", ingest(), None).expect("created");
        registry.revoke_key(&a.id, second_key.id).expect("revoked");
        let files = || -> Vec<u8> {
            let files = std::fs::read_dir(dir.path()).expect("readable");
            files.flat_map(|file| std::fs::read(file.expect("entry").path()).expect("readable")).collect()
        };
        let holds = |bytes: &[u8], part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
        let open = files();
        drop(registry);
        for bytes in [open, files()] {
            for secret in [&first, &second] {
                assert!(
                    holds(&bytes, &secret.digest().0),
                    "the digest is there, so this looks in the right place"
                );
                assert!(!holds(&bytes, &secret.expose().as_bytes()[4..20]));
                assert!(!holds(&bytes, b"hgk_"));
            }
        }
    }

    #[test]
    fn an_id_that_is_given_has_to_be_free_and_one_that_is_made_is() {
        let (_dir, registry) = empty();
        let create = |id: Option<&str>, name: &str| {
            registry
                .create_datasource(id.map(slug), name, ingest())
                .map(|(datasource, ..)| datasource.id.to_string())
        };
        assert_eq!(create(Some("press"), "Press 4").expect("free"), "press");
        let error = create(Some("press"), "another").expect_err("taken");
        assert!(matches!(&error, RegistryError::Exists(id) if id.as_str() == "press"), "{error}");
        assert_eq!(create(None, "Press").expect("made"), "press-2");
        assert_eq!(create(None, "PRESS!").expect("made"), "press-3");
        let long = "x".repeat(DATASOURCE_ID_BYTES_MAX);
        assert_eq!(create(None, &long).expect("made"), long);
        assert_eq!(
            create(None, &long).expect("made"),
            format!("{}-2", "x".repeat(DATASOURCE_ID_BYTES_MAX - 2))
        );
        let error = create(None, "温度").expect_err("nothing to make an id from");
        assert!(matches!(&error, RegistryError::Name(text) if text.contains("give an id")), "{error}");
        assert_eq!(create(Some("temperature"), "温度").expect("id given"), "temperature");
    }

    #[test]
    fn names_labels_and_scopes_that_cannot_be_used_are_refused_with_the_rule() {
        let (_dir, registry) = empty();
        let refused = |error: Option<RegistryError>, rule: &str| {
            assert!(matches!(&error, Some(RegistryError::Name(text)) if text.contains(rule)), "{error:?}");
        };
        let create = |name: &str| registry.create_datasource(None, name, ingest()).err();
        refused(create(" "), "needs a name");
        refused(create("a\nb"), "control");
        refused(create(&"a".repeat(NAME_BYTES_MAX + 1)), "200 bytes");
        assert!(create(&"a".repeat(NAME_BYTES_MAX)).is_none());
        assert!(create(&"a".repeat(NAME_BYTES_MAX - 1)).is_none());
        refused(registry.create_datasource(Some(DatasourceId::all()), "all", ingest()).err(), "'*'");
        refused(registry.create_datasource(None, "a", Scopes::of(&[])).err(), "scope");

        let all = DatasourceId::all();
        let label = |label: &str| registry.create_key(&all, label, ingest(), None).err();
        refused(label(&"a".repeat(NAME_BYTES_MAX + 1)), "200 bytes");
        refused(label("\u{1b}[2J"), "control");
        assert!(label(&"a".repeat(NAME_BYTES_MAX)).is_none());
        let error = registry.create_key(&slug("none"), "", ingest(), None).expect_err("no datasource");
        assert!(matches!(error, RegistryError::NoDatasource(_)), "{error}");
        assert_eq!(registry.datasources().len(), 2);
        assert_eq!(registry.key_count(), 3);
    }

    #[test]
    fn all_is_no_datasource() {
        let (_dir, registry) = empty();
        registry.create_key(&DatasourceId::all(), "", ingest(), None).expect("created");
        assert!(!registry.has_datasource("*") && registry.datasource("*").is_none());
        let error = registry.delete_datasource(&DatasourceId::all()).expect_err("not one");
        assert!(matches!(error, RegistryError::NoDatasource(_)), "{error}");
        assert_eq!(registry.key_count(), 1);
    }

    #[test]
    fn no_connection_outlives_its_key_however_lookup_and_deletion_race() {
        let (_dir, registry) = empty();
        let mut entered_in_all = 0;
        for _ in 0..30 {
            let (a, _, secret) = registry.create_datasource(None, "a", ingest()).expect("created");
            let digest = secret.digest();
            let connections = thread::scope(|scope| {
                let connecting = scope.spawn(|| {
                    let mut connections = Vec::new();
                    while let Some(key) = registry.find(&digest) {
                        let control = Arc::new(Control::default());
                        connections.push((key.connections.enter(Arc::clone(&control)), control));
                    }
                    connections
                });
                registry.delete_datasource(&a.id).expect("deleted");
                connecting.join().expect("no panic")
            });
            entered_in_all += connections.len();
            for (_, control) in &connections {
                assert_eq!(control.closed(), Some(Close::KeyDead));
            }
        }
        assert!(entered_in_all > 0, "some of them got in before the deletion");
    }

    #[test]
    fn changes_at_the_same_time_do_not_take_each_others_place() {
        let (dir, registry) = empty();
        let created: Vec<_> = thread::scope(|scope| {
            let creating: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        (0..10)
                            .map(|_| registry.create_datasource(None, "same", ingest()).expect("created"))
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            creating.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
        });
        let registry = reopened(&dir, registry);
        assert_eq!(registry.datasources().len(), 40);
        for (datasource, key, secret) in created {
            let found = registry.find(&secret.digest()).expect("kept");
            assert_eq!((found.id, &found.datasource), (key.id, &datasource.id));
        }
    }

    #[test]
    fn debug_shows_no_part_of_a_digest_beyond_the_key_id() {
        let (_dir, registry) = empty();
        let (_, key, secret) = registry.create_datasource(None, "a", ingest()).expect("created");
        let shown = format!("{registry:?} {key:?}");
        assert!(shown.contains(&key.id.to_string()));
        let hex = blake3::Hash::from(secret.digest().0).to_hex();
        assert!(!shown.contains(&hex[12..24]) && !shown.contains(&secret.expose()[4..12]), "{shown}");
    }
}
