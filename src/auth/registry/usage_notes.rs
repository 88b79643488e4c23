//! How the registry records the usage of keys: in memory once for each draft or request, never for each
//! message. It is added to the registry's file every few seconds, so a crash loses a few seconds of it and the
//! path of a message never waits for the disk. In a cluster it is added to the usage on all nodes
//! (`cluster/usage.rs`).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;

use super::Registry;
use super::database::RegistryDatabase;
use super::error::RegistryError;
use super::key::Key;
use super::replica::RegistryReplica;
use super::usage::{KeyClient, KeyUsage, PendingKeyUsage};
use crate::limits::USAGE_KEYS_PER_CHANGE;
use crate::message::{Offset, TimeMicros};

impl Registry {
    /// Records that `client` used the key at `at`. `came_in` is the number of accepted messages and the
    /// newest offset. To be called once for each draft or request, not for each message.
    pub fn note_use(
        &self,
        key: &Arc<Key>,
        client: Option<&Arc<KeyClient>>,
        at: TimeMicros,
        came_in: Option<(u64, Offset)>,
    ) {
        let usage = key.usage();
        let mut used = usage.pending();
        if let Some((accepted, offset)) = came_in {
            used.accepted += accepted;
            used.offset = used.offset.max(Some(offset));
        }
        if let Some(client) = client {
            used.note_client(client, at);
        }
        drop(used);
        self.note(key, usage);
    }

    /// Records that a message or request under the key was refused.
    pub fn note_refusal(&self, key: &Arc<Key>) {
        let usage = key.usage();
        usage.refused.fetch_add(1, Ordering::Relaxed);
        self.note(key, usage);
    }

    fn note(&self, key: &Arc<Key>, usage: &PendingKeyUsage) {
        if !usage.noted.swap(true, Ordering::AcqRel) {
            self.noted.lock().push(Arc::clone(key));
        }
    }

    /// The usage of keys up to now. In a cluster, the last few seconds of other nodes may be missing.
    ///
    /// # Errors
    /// [`RegistryError::Database`] if it cannot be read; [`RegistryError::Away`] in a cluster without NATS.
    pub fn usage(&self, keys: &[Arc<Key>]) -> Result<Vec<KeyUsage>, RegistryError> {
        if let Some(replica) = &self.replica {
            let _adding = self.adding_usage();
            let ids: Vec<_> = keys.iter().map(|key| key.id).collect();
            let mut used = replica.usage(&ids)?;
            for (key, used) in keys.iter().zip(&mut used) {
                used.add(key.recorded_usage().map(PendingKeyUsage::peek).unwrap_or_default());
            }
            return Ok(used);
        }
        // Held throughout, so that usage being written is neither missed nor counted twice.
        let database = self.lock_database();
        keys.iter().map(|key| self.usage_in(&database, key)).collect()
    }

    /// The usage of one key, for a caller that has locked the database.
    pub(super) fn usage_in(&self, database: &RegistryDatabase, key: &Key) -> Result<KeyUsage, RegistryError> {
        let mut used = match &self.replica {
            // On an error continue with what this node knows: the caller's change must not fail for this.
            Some(replica) => replica.usage(&[key.id]).unwrap_or_default().pop().unwrap_or_default(),
            None => database.usage(key.id)?,
        };
        if let Some(usage) = key.recorded_usage() {
            used.add(usage.peek());
        }
        Ok(used)
    }

    /// In a cluster, held while usage is read or added, so that none is missed or counted twice.
    fn adding_usage(&self) -> MutexGuard<'_, ()> {
        self.adding_usage.lock()
    }

    /// Adds pending usage to the stored one, on the disk or in the cluster. To be called every few
    /// seconds and at shutdown.
    ///
    /// # Errors
    /// [`RegistryError::Database`] or [`RegistryError::Away`] if it cannot be written; it then stays pending.
    pub fn write_usage(&self) -> Result<(), RegistryError> {
        let mut noted = std::mem::take(&mut *self.noted.lock());
        while !noted.is_empty() {
            // In chunks, so that other changes can run in between.
            let some = noted.split_off(noted.len().saturating_sub(USAGE_KEYS_PER_CHANGE));
            if let Err(error) = self.write_usage_of(&some) {
                noted.extend(some);
                self.noted.lock().append(&mut noted);
                return Err(error);
            }
        }
        Ok(())
    }

    fn write_usage_of(&self, keys: &[Arc<Key>]) -> Result<(), RegistryError> {
        if let Some(replica) = &self.replica {
            return self.add_usage_of(keys, &**replica);
        }
        let mut database = self.lock_database();
        let mut taken = Vec::with_capacity(keys.len());
        let written = (|| {
            let stored: Result<Vec<_>, _> = keys.iter().map(|key| database.usage(key.id)).collect();
            let stored = stored?;
            let change = database.begin()?;
            for (key, mut used) in keys.iter().zip(stored) {
                let usage = key.recorded_usage().expect("a key that is noted was used");
                // Cleared before `take`, so that any later use puts the key in the list again.
                usage.noted.store(false, Ordering::Release);
                let pending = usage.take();
                taken.push(pending.clone());
                used.add(pending);
                change.set_usage(key.id, &used)?;
            }
            change.commit()
        })();
        if written.is_err() {
            for (key, earlier) in keys.iter().zip(taken) {
                key.recorded_usage().expect("a key that is noted was used").put_back(earlier);
            }
        }
        written
    }

    fn add_usage_of(&self, keys: &[Arc<Key>], replica: &dyn RegistryReplica) -> Result<(), RegistryError> {
        let _adding = self.adding_usage();
        let taken = keys.iter().map(|key| {
            let usage = key.recorded_usage().expect("a key that is noted was used");
            usage.noted.store(false, Ordering::Release);
            (key.id, usage.take())
        });
        let (left, added) = replica.add_usage(taken.collect());
        for (id, earlier) in left {
            if let Some(usage) = keys.iter().find(|key| key.id == id).and_then(|key| key.recorded_usage()) {
                usage.put_back(earlier);
            }
        }
        added
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::{Actor, Scope, Scopes};
    use crate::message::{DatasourceId, Transport};

    fn client(name: &str) -> Arc<KeyClient> {
        Arc::new(KeyClient::new(Transport::Mqtt, Some([192, 0, 2, 1].into()), Some(name)))
    }

    #[test]
    fn what_is_pending_is_added_once_whatever_fails_meanwhile() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Registry::open(dir.path()).expect("opens");
        let (all, scopes) = (DatasourceId::all(), Scopes::from_slice(&[Scope::Ingest]));
        let (key, _) = registry.create_key(&Actor::SYSTEM, &all, "", scopes, None).expect("created");
        let check = |registry: &Registry, accepted, refused| {
            let keys = registry.keys(&all);
            let used = &registry.usage(&keys).expect("read")[0];
            assert_eq!((used.accepted, used.refused, used.offset), (accepted, refused, Some(9)));
            used.users.iter().map(|user| user.client.client_id.clone()).collect::<Vec<_>>()
        };
        registry.note_use(&key, Some(&client("a")), 1, Some((5, 9)));
        registry.note_refusal(&key);
        check(&registry, 5, 1);
        registry.lock_database().refuse_changes(true);
        assert!(registry.write_usage().is_err());
        registry.note_use(&key, Some(&client("b")), 2, Some((1, 7)));
        check(&registry, 6, 1);
        registry.lock_database().refuse_changes(false);
        registry.write_usage().expect("written");
        check(&registry, 6, 1);
        registry.write_usage().expect("nothing to write");
        registry.note_use(&key, Some(&client("a")), 3, None);
        registry.write_usage().expect("written");
        drop(registry);
        let registry = Registry::open(dir.path()).expect("opens");
        let users = check(&registry, 6, 1);
        assert_eq!(users, [Some("a".into()), Some("b".into())]);
        registry.note_use(&registry.keys(&all)[0], None, 4, Some((1, 8)));
        check(&registry, 7, 1);
    }
}
