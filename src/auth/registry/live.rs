//! The live view: every datasource and key in memory, where a presented key is looked up. Its contents
//! are on the disk already; only the registry's changes write to it. Lookups are lock-free.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use headgate_format::key::Digest;
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

use super::database::RegistryDatabase;
use super::datasource::Datasource;
use super::error::RegistryError;
use super::index::{KeyIndex, KeyLookup};
use super::key::{Key, KeyAttributes};
use super::queries::StoredKey;
use crate::message::{DatasourceId, KeyId, TimeMicros};
use crate::scheduler::polite_read;

/// Deadlines beyond two for each key that may be stale before they are looked through.
const STALE_DEADLINES_MAX: usize = 64;

/// Every datasource and key.
pub(super) struct LiveRegistry {
    /// Every key, revoked ones included.
    pub(super) keys: KeyIndex,
    pub(super) datasources: papaya::HashMap<DatasourceId, Arc<Datasource>>,
    /// The keys that are not revoked by datasource and id, for key management.
    pub(super) by_datasource: RwLock<BTreeMap<(DatasourceId, KeyId), Arc<Key>>>,
    /// When keys end by themselves. A deadline that differs from its key's end is stale and ignored.
    pub(super) deadlines: Mutex<BTreeSet<(TimeMicros, DatasourceId, KeyId)>>,
    /// Notified of each new deadline.
    pub(super) deadline_set: Notify,
}

impl LiveRegistry {
    /// Reads everything that a database has.
    ///
    /// # Errors
    /// [`RegistryError::Database`].
    pub(super) fn load(database: &RegistryDatabase) -> Result<Self, RegistryError> {
        let datasources = papaya::HashMap::with_capacity(database.datasource_count()?);
        database.for_each_datasource(|datasource| {
            datasources.pin().insert(datasource.id.clone(), Arc::new(datasource));
        })?;
        let live = Self {
            keys: KeyIndex::with_capacity(database.key_count()?),
            datasources,
            by_datasource: RwLock::default(),
            deadlines: Mutex::default(),
            deadline_set: Notify::new(),
        };
        let (mut by_datasource, all) = (Vec::new(), DatasourceId::all());
        let mut without_datasource = BTreeMap::<String, usize>::new();
        database.for_each_key(None, |stored| match live.load_key(stored, &all) {
            Ok(key) => by_datasource.extend(key.map(|key| ((key.datasource.clone(), key.id), key))),
            Err(id) => *without_datasource.entry(id).or_default() += 1,
        })?;
        for (datasource, keys) in without_datasource {
            tracing::error!(
                datasource,
                keys,
                "keys cannot be used, because there is no such datasource: import it again, which completes it, or \
                 create another one with its id, which ends them"
            );
        }
        // Only now are all keys in memory, so their pages can be merged into huge ones.
        live.keys.gather();
        *live.by_datasource.write() = by_datasource.into_iter().collect();
        Ok(live)
    }

    /// Adds the stored keys of a datasource that was added, unless they are known.
    ///
    /// # Errors
    /// [`RegistryError::Database`].
    pub(super) fn add_keys_of(
        &self,
        database: &RegistryDatabase,
        datasource: &DatasourceId,
    ) -> Result<(), RegistryError> {
        let all = DatasourceId::all();
        database.for_each_key(Some(datasource), |stored| {
            if self.keys.find(&stored.digest).is_none()
                && let Ok(Some(key)) = self.load_key(stored, &all)
            {
                self.by_datasource.write().insert((key.datasource.clone(), key.id), key);
            }
        })?;
        self.deadline_set.notify_one();
        Ok(())
    }

    /// Adds a stored key to everything but `by_datasource`. Returns it, unless it was revoked.
    ///
    /// # Errors
    /// The id of its datasource, if that is not there: then the key cannot be used, and all others can.
    fn load_key(&self, stored: StoredKey<'_>, all: &DatasourceId) -> Result<Option<Arc<Key>>, String> {
        if stored.is_revoked {
            self.keys.set(&stored.digest, None);
            return Ok(None);
        }
        // Shares the id's text with the datasource: there may be a million keys.
        let datasource = match self.datasources.pin().get_key_value(stored.datasource) {
            Some((datasource, _)) => datasource.clone(),
            None if stored.datasource == all.as_str() => all.clone(),
            None => return Err(stored.datasource.to_owned()),
        };
        let key = Arc::new(Key::from(KeyAttributes {
            digest: stored.digest,
            datasource,
            scopes: stored.scopes,
            label: stored.label,
            created_at: stored.created_at,
            expires_at: stored.expires_at,
            rotation: stored.rotation,
            limits: stored.limits,
        }));
        if stored.has_ended {
            key.end();
            key.mark_ended();
        } else if let Some(at) = key.ends_at() {
            self.deadlines.lock().insert((at, key.datasource.clone(), key.id));
        }
        self.keys.set(&stored.digest, Some(Arc::clone(&key)));
        Ok(Some(key))
    }

    /// The key with this digest, unless it is revoked; it may have expired.
    pub(super) fn find(&self, digest: &Digest) -> Option<Arc<Key>> {
        match self.keys.find(digest)? {
            KeyLookup::Key(key) => Some(key),
            KeyLookup::Revoked => None,
        }
    }

    /// A key by its id.
    pub(super) fn key(&self, datasource: &DatasourceId, id: KeyId) -> Option<Arc<Key>> {
        let by_datasource = polite_read(&self.by_datasource);
        by_datasource.get(&(datasource.clone(), id)).map(Arc::clone)
    }

    /// The keys of a datasource, by their ids.
    pub(super) fn keys_of(&self, datasource: &DatasourceId) -> Vec<Arc<Key>> {
        let first = (datasource.clone(), KeyId([0; 6]));
        let last = (datasource.clone(), KeyId([0xff; 6]));
        let by_datasource = polite_read(&self.by_datasource);
        by_datasource.range(first..=last).map(|(_, key)| Arc::clone(key)).collect()
    }

    /// The number of keys that are not revoked.
    pub(super) fn key_count(&self) -> usize {
        self.by_datasource.read().len()
    }

    /// Adds a datasource that is already on the disk.
    pub(super) fn add_datasource(&self, datasource: Datasource) -> Arc<Datasource> {
        let datasource = Arc::new(datasource);
        self.datasources.pin().insert(datasource.id.clone(), Arc::clone(&datasource));
        datasource
    }

    /// Adds a key that is already on the disk.
    pub(super) fn add_key(&self, key: Key, digest: Digest) -> Arc<Key> {
        let key = Arc::new(key);
        let place = (key.datasource.clone(), key.id);
        self.by_datasource.write().insert(place, Arc::clone(&key));
        self.keys.set(&digest, Some(Arc::clone(&key)));
        self.watch(&key);
        key
    }

    /// Schedules the key's end, if it has one.
    pub(super) fn watch(&self, key: &Key) {
        if let Some(at) = key.ends_at() {
            let deadline = (at, key.datasource.clone(), key.id);
            let mut deadlines = self.deadlines.lock();
            deadlines.insert(deadline);
            // Those that were moved, or whose key is gone, are ignored; rotations must not pile them up.
            if deadlines.len() > STALE_DEADLINES_MAX + 2 * self.key_count() {
                deadlines.retain(|(at, owner, id)| {
                    self.key(owner, *id).is_some_and(|key| key.ends_at() == Some(*at))
                });
            }
            drop(deadlines);
            self.deadline_set.notify_one();
        }
    }

    /// Puts a key back that has ended in memory and has to live. Its lease has ended for whoever has it, so that it
    /// takes a look-up to use the key again.
    pub(super) fn revive(&self, key: &Key) {
        let limits = key.limits.text();
        let again = Key::from(KeyAttributes {
            digest: key.digest,
            datasource: key.datasource.clone(),
            scopes: key.scopes,
            label: &key.label,
            created_at: key.created_at,
            expires_at: key.expires_at(),
            rotation: key.rotation(),
            limits: limits.as_deref(),
        });
        self.add_key(again, key.digest);
    }

    /// Ends and removes a key that is already dead on the disk.
    pub(super) fn kill(&self, digest: &Digest) -> Option<Arc<Key>> {
        let key = self.find(digest)?;
        key.end();
        self.keys.set(digest, None);
        let place = (key.datasource.clone(), key.id);
        self.by_datasource.write().remove(&place);
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datasource_that_nobody_uses_costs_little() {
        assert!(size_of::<Datasource>() <= 96, "{}", size_of::<Datasource>());
    }
}
