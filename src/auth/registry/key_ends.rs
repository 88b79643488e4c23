//! The ends of keys: revoked, leaked, retired, expired, or gone with their datasource. An end goes the other way
//! round than every other change of the registry: **first in memory, then to the disk**. A key that has to die
//! dies at once, whatever the disk says, and its end waits in a queue ([`UnwrittenEnds`](super::unwritten_ends::UnwrittenEnds)) until it is durable.
//!
//! The queue is written by the call that ended the key, which in the usual case leaves it empty. On a full disk it
//! gives up the [reserve](super::disk_reserve) for that. If the write fails all the same, [`run`] tries again and
//! `/readyz` warns; every other change of the registry writes the queue first, so that the order on the disk is
//! the order in memory. If the gateway ends before that, the key is alive again at its next start.
//!
//! In a cluster two ends depend on what other nodes do. An admin key of `*` may turn out to be the last one when its
//! end is written, because another node has ended the others meanwhile: then it is [put back](LiveRegistry::revive),
//! as an end of the last one is refused. A key whose grace is over waits in the queue, because its rotation may have
//! been undone, and the clock denies it meanwhile.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::Registry;
use super::audit::{Actor, AuditEvent};
use super::database::RegistryDatabase;
use super::datasource::Datasource;
use super::disk_reserve::DiskReserve;
use super::error::RegistryError;
use super::key::Key;
use super::replica::RegistryRevision;
use super::transaction::{KeyEndReason, KeyEndRows, RegistryTransaction};
use super::unwritten_ends::{UnwrittenQueue, WARNED_KEYS_MAX};
use crate::auth::scope::Scope;
use crate::message::{DatasourceId, KeyId, TimeMicros, now_micros};

/// The pause before another attempt to write the ends of keys.
const KEY_END_RETRY_PAUSE: Duration = Duration::from_millis(500);
/// The same in a cluster.
const KEY_END_CLUSTER_RETRY_PAUSE: Duration = Duration::from_secs(5);
/// How often the reserve is looked after when nothing waits.
const RESERVE_CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// The end of keys by one act.
#[derive(Debug, Clone)]
pub(super) struct KeyEnd {
    pub(super) why: KeyEndReason,
    pub(super) keys: Vec<Arc<Key>>,
    /// The datasource that is deleted with the keys.
    pub(super) deleted: Option<Arc<Datasource>>,
    /// The key that took its place, and when its grace was over. Another node may undo that rotation meanwhile.
    pub(super) grace: Option<(KeyId, TimeMicros)>,
    actor: Actor,
    at: TimeMicros,
    /// The details for the audit.
    pub(super) what: Value,
}

impl KeyEnd {
    /// The end of keys at this moment.
    pub(super) fn new(why: KeyEndReason, keys: Vec<Arc<Key>>, actor: &Actor, what: Value) -> Self {
        let actor = actor.under_way();
        Self { why, keys, deleted: None, grace: None, actor, at: now_micros(), what }
    }

    /// Whether this is refused if it would leave nobody who can manage everything.
    fn spares_last_admin(&self) -> bool {
        matches!(self.why, KeyEndReason::Revoked | KeyEndReason::Leaked)
            && self.keys.iter().any(|key| may_be_last_admin(key))
    }

    /// Whether one of its keys is the last admin key by now.
    fn is_of_last_admin(&self, change: &RegistryTransaction<'_>) -> Result<bool, RegistryError> {
        for key in &self.keys {
            if change.is_last_admin(key.id)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Notes in the audit that a leaked key is kept.
    fn audit_kept(&self, change: &RegistryTransaction<'_>) -> Result<(), RegistryError> {
        for key in self.keys.iter().filter(|_| self.why == KeyEndReason::Leaked) {
            change.audit(&self.actor, &AuditEvent::of_key("key.leaked_and_kept", key, &self.what))?;
        }
        Ok(())
    }

    pub(super) fn deletes(&self, id: &DatasourceId) -> bool {
        self.deleted.as_ref().is_some_and(|datasource| datasource.id == *id)
    }

    /// Writes the end and its audit entries. What has ended on the disk already, by another node of the cluster or
    /// by an attempt whose outcome was unknown, is not written again.
    fn write(
        &self,
        registry: &Registry,
        change: &RegistryTransaction<'_>,
    ) -> Result<KeyEndRows, RegistryError> {
        change.set_time(self.at);
        if let Some(Datasource { id, created_at, .. }) = self.deleted.as_deref() {
            let end = registry.ask_incarnation_end();
            let Some(rows) = change.remove_datasource(id, *created_at, end)? else {
                return Ok(KeyEndRows::default());
            };
            let act = AuditEvent::of_datasource(self.why.action(), id, &self.what);
            change.audit(&self.actor, &act)?;
            return Ok(rows);
        }
        let mut rows = KeyEndRows::default();
        for key in &self.keys {
            let has_ended = if self.why == KeyEndReason::Expired {
                change.expire(key.id)?
            } else {
                let digest = match self.grace {
                    Some(grace) => change.retire(&key.datasource, key.id, grace)?,
                    None => change.revoke(&key.datasource, key.id, self.why)?,
                };
                rows.revoked.extend(digest);
                digest.is_some()
            };
            if has_ended {
                change.audit(&self.actor, &AuditEvent::of_key(self.why.action(), key, &self.what))?;
            }
        }
        Ok(rows)
    }
}

/// What a change does on a full disk.
#[derive(Debug, Clone, Copy)]
pub(super) enum DiskReserveUse {
    /// It fails.
    Kept,
    /// It takes the room of the reserve.
    GivenUp,
}

impl Registry {
    /// Ends keys in memory, and then writes that. `plan` decides what ends; nothing else changes meanwhile. Before
    /// this returns, the leases of the keys have ended and their connections are told to close. Returns the keys.
    /// Whether their end is durable is to be asked ([`Registry::describe_unwritten`]). Those that were put back, as the
    /// last admin key of a cluster, are not among them.
    pub(super) fn end_keys(
        &self,
        waits_everywhere: bool,
        plan: impl FnOnce() -> Result<Vec<KeyEnd>, RegistryError>,
    ) -> Result<Vec<Arc<Key>>, RegistryError> {
        let dead: Vec<_> = {
            let _database = self.lock_database();
            let ends = plan()?;
            ends.iter().for_each(|end| self.end_in_memory(end));
            let dead = ends.iter().flat_map(|end| end.keys.iter().cloned()).collect();
            self.unwritten.extend(ends);
            dead
        };
        // A failure is kept with the queue, from where it is reported.
        if let (Ok(()), true, Some(replica)) = (self.write_ends(), waits_everywhere, &self.replica) {
            // Another call may have written these ends: what the database has now includes them.
            let revision = self.lock_database().applied();
            replica.wait_everywhere(revision);
        }
        Ok(dead.into_iter().filter(|key| !self.was_put_back(key)).collect())
    }

    /// Whether a key that has ended was put back since then.
    pub(super) fn was_put_back(&self, ended: &Arc<Key>) -> bool {
        self.live.find(&ended.digest).is_some_and(|now| !Arc::ptr_eq(&now, ended))
    }

    /// Ends a key before the lock of the registry is waited for, which a slow disk may hold up, or a cluster without
    /// NATS. Not the last admin key.
    pub(super) fn end_at_once(&self, key: &Key) {
        if !self.is_last_admin(key) {
            key.end();
        }
    }

    /// Refuses the end of the last admin key. Call it under the lock of the database: two calls may have ended one
    /// of the last two each, before one of them has got it.
    ///
    /// # Errors
    /// [`RegistryError::LastAdmin`]; the key then works.
    pub(super) fn check_not_last_admin(&self, key: &Key) -> Result<(), RegistryError> {
        if !self.is_last_admin(key) {
            return Ok(());
        }
        if !key.holds() {
            self.live.revive(key);
        }
        Err(RegistryError::LastAdmin)
    }

    fn end_in_memory(&self, end: &KeyEnd) {
        if let Some(datasource) = &end.deleted {
            datasource.lease.end();
            self.live.datasources.pin().remove(datasource.id.as_str());
        }
        for key in &end.keys {
            match end.why {
                KeyEndReason::Expired => {
                    key.end();
                    key.mark_ended();
                }
                // The rotation may have been undone on another node. The clock denies the key until that is known.
                KeyEndReason::Rotated if self.replica.is_some() => {}
                _ => drop(self.live.kill(&key.digest)),
            }
        }
    }

    /// Writes all ends that are not yet durable. In a cluster the other nodes follow a moment later.
    ///
    /// # Errors
    /// Those of a change; the ends that are left are in force all the same.
    pub fn write_ends(&self) -> Result<(), RegistryError> {
        while !self.unwritten.is_empty() {
            let written = self.make_here_with_reserve(|database| {
                // The queue is only changed under the lock of the database.
                let ends = self.unwritten.oldest();
                let change = database.begin()?;
                let (mut written, mut kept) = (Vec::new(), Vec::new());
                for end in &ends {
                    if self.replica.is_some() && end.spares_last_admin() && end.is_of_last_admin(&change)? {
                        end.audit_kept(&change)?;
                        kept.extend(&end.keys);
                    } else {
                        written.push(end.write(self, &change)?);
                    }
                }
                change.commit()?;
                self.unwritten.remove_oldest(ends.len());
                for KeyEndRows { revoked, incarnations } in written {
                    // In a cluster a datasource may have got keys meanwhile that this node did not know.
                    for digest in &revoked {
                        self.live.kill(digest);
                    }
                    for (version, row) in incarnations {
                        self.tell_incarnation(database, version, row);
                    }
                }
                for key in kept {
                    tracing::error!(
                        key_id = %key.id,
                        "this has become the last admin key and works again: create another one, then revoke it"
                    );
                    self.live.revive(key);
                }
                Ok(())
            });
            if let Err(error) = written {
                self.unwritten.set_error(&error);
                return Err(error);
            }
        }
        Ok(())
    }

    /// As [`Registry::make_change`], for a change that ends a key among other things: on a full disk it gives up
    /// the reserve. It has to be durable to be in force.
    pub(super) fn make_change_with_reserve<T>(
        &self,
        make: impl FnMut(&mut RegistryDatabase) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let (made, revision) = self.make_after_ends(DiskReserveUse::GivenUp, make)?;
        if let Some(replica) = &self.replica {
            replica.wait_everywhere(revision);
        }
        Ok(made)
    }

    /// Makes a change behind the ends of all keys that have ended before it. The other nodes are not waited for.
    pub(super) fn make_after_ends<T>(
        &self,
        reserve: DiskReserveUse,
        mut make: impl FnMut(&mut RegistryDatabase) -> Result<T, RegistryError>,
    ) -> Result<(T, RegistryRevision), RegistryError> {
        loop {
            self.write_ends()?;
            // Asked under the lock: a key may have ended since its queue was written.
            let make_if_next = |database: &mut RegistryDatabase| {
                if self.unwritten.is_empty() { make(database).map(Some) } else { Ok(None) }
            };
            let made = match reserve {
                DiskReserveUse::Kept => self.make_change_here(make_if_next)?,
                DiskReserveUse::GivenUp => self.make_here_with_reserve(make_if_next)?,
            };
            if let (Some(made), revision) = made {
                return Ok((made, revision));
            }
        }
    }

    /// As [`Registry::make_change_here`], with the reserve.
    fn make_here_with_reserve<T>(
        &self,
        mut make: impl FnMut(&mut RegistryDatabase) -> Result<T, RegistryError>,
    ) -> Result<(T, RegistryRevision), RegistryError> {
        loop {
            match self.make_change_here(&mut make) {
                Err(error)
                    if error.may_lack_room() && self.reserve.as_ref().is_some_and(DiskReserve::release) =>
                {
                    tracing::warn!(%error, "the registry's reserve on the disk is used to end a key");
                }
                made => return made,
            }
        }
    }

    /// Why the end of a key, or the deletion of a datasource, is not durable: for people, with what it means.
    /// `None` if it is durable, or was never asked for.
    pub fn describe_unwritten(&self, datasource: &DatasourceId, key: Option<KeyId>) -> Option<String> {
        let queue = self.unwritten.queue.lock();
        let is_it = |end: &KeyEnd| match key {
            Some(id) => end.keys.iter().any(|key| key.id == id && key.datasource == *datasource),
            None => end.deletes(datasource),
        };
        queue.ends.iter().any(is_it).then(|| self.words_for_unwritten(&queue))
    }

    /// What an operator should know about ends that could not be written, for `/readyz`: which keys, and why.
    pub fn trouble(&self) -> Option<String> {
        let queue = self.unwritten.queue.lock();
        queue.error.as_ref()?;
        let keys: Vec<_> =
            queue.ends.iter().flat_map(|end| end.keys.iter().map(|key| key.id.to_string())).collect();
        let named = keys[..keys.len().min(WARNED_KEYS_MAX)].join(", ");
        let more = match keys.len().saturating_sub(WARNED_KEYS_MAX) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        // A number alone: `/readyz` is for everybody.
        let deleted = match queue.ends.iter().filter(|end| end.deleted.is_some()).count() {
            0 => String::new(),
            deleted => format!("; deleted datasources: {deleted}"),
        };
        Some(format!("ended keys: {named}{more}{deleted}: {}", self.words_for_unwritten(&queue)))
    }

    fn words_for_unwritten(&self, queue: &UnwrittenQueue) -> String {
        let error = queue.error.as_deref().unwrap_or("it is being written");
        if self.replica.is_some() {
            format!(
                "in force at this gateway only ({error}). Other gateways of the cluster may not know it yet. It \
                 is tried again; if this gateway ends before that, the key works again"
            )
        } else {
            format!(
                "in force, but not durable yet ({error}). It is tried again; if the gateway ends before that, the \
                 key works again"
            )
        }
    }
}

fn may_be_last_admin(key: &Key) -> bool {
    key.datasource.is_all() && key.scopes.allow(Scope::Admin)
}

/// Writes the ends of keys that could not be written at once, and looks after the reserve, until dropped.
pub async fn run(registry: Arc<Registry>) {
    loop {
        if registry.unwritten.is_empty() {
            let failed = registry.unwritten.failed.notified();
            let _ = tokio::time::timeout(RESERVE_CHECK_INTERVAL, failed).await;
        }
        if !registry.unwritten.is_empty() {
            // An attempt holds the registry's lock; without NATS it takes seconds to fail.
            let pause = match registry.replica {
                Some(_) => KEY_END_CLUSTER_RETRY_PAUSE,
                None => KEY_END_RETRY_PAUSE,
            };
            tokio::time::sleep(pause).await;
        }
        let for_write = registry.clone();
        let upkeep = move || {
            // A failure is kept with the queue, from where it is reported.
            if for_write.write_ends().is_ok()
                && let Some(reserve) = &for_write.reserve
            {
                reserve.take_again();
            }
            for_write.read_unread_rules();
        };
        if let Err(error) = tokio::task::spawn_blocking(upkeep).await {
            tracing::error!(%error, "the registry has failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::thread;

    use super::super::audit::AuditQuery;
    use super::super::leaks::LeakedKeyFate;
    use super::super::replica::tests::ClusterOfOne;
    use super::super::rows::RegistryRow;
    use serde_json::json;

    use super::*;
    use crate::auth::scope::Scopes;

    fn in_memory(cluster: Option<Arc<ClusterOfOne>>) -> Registry {
        let database = RegistryDatabase::in_memory().expect("opens");
        Registry::from_database(database, cluster.map(|cluster| cluster as _)).expect("empty")
    }

    fn create(registry: &Registry, scope: Scope) -> Arc<Key> {
        let scopes = Scopes::from_slice(&[scope]);
        registry.create_key(&Actor::SYSTEM, &DatasourceId::all(), "", scopes, None).expect("created").0
    }

    /// Applies what another node has made of a key's row.
    fn revoked_elsewhere(registry: &Registry, key: &Key) {
        let (revision, row) = {
            let database = registry.lock_database();
            let mut row = database.row_of(key.id);
            let RegistryRow::Key(_, Some(columns)) = &mut row else { panic!("no key: {row:?}") };
            (columns.revoked_at, columns.ended) = (Some(1), Some("revoked".to_owned()));
            (database.applied() + 1, row)
        };
        registry.apply(&[(revision, row)], revision, false).expect("applied");
    }

    #[test]
    fn without_nats_a_leaked_or_revoked_admin_key_dies_at_once_and_its_end_is_tried_again() {
        let cluster = Arc::new(ClusterOfOne::default());
        let registry = in_memory(Some(cluster.clone()));
        let [first, second, third] =
            [Scope::Admin, Scope::Admin, Scope::Admin].map(|scope| create(&registry, scope));
        cluster.is_away.store(true, Ordering::Relaxed);
        let leaked = registry.revoke_leaked(&Actor::SYSTEM, &first.digest, "");
        assert!(matches!(leaked, Ok(LeakedKeyFate::Revoked(_))), "{leaked:?}");
        let revoke = |key: &Key| registry.revoke_key(&Actor::SYSTEM, &key.datasource, key.id);
        assert!(revoke(&second).expect("dead here").is_some());
        for key in [&first, &second] {
            assert!(!key.holds() && registry.was_revoked(&key.digest));
            assert!(registry.describe_unwritten(&key.datasource, Some(key.id)).is_some());
            assert!(registry.trouble().expect("it is said").contains(&key.id.to_string()));
        }
        assert!(matches!(revoke(&third), Err(RegistryError::LastAdmin)));
        let leaked = registry.revoke_leaked(&Actor::SYSTEM, &third.digest, "");
        assert!(
            matches!(leaked, Err(RegistryError::Away(_))),
            "its audit entry cannot be written: {leaked:?}"
        );
        assert!(third.holds());
        cluster.is_away.store(false, Ordering::Relaxed);
        registry.write_ends().expect("written");
        assert_eq!(registry.trouble(), None);
        assert!(revoke(&first).expect("dead already").is_none() && third.holds());
    }

    #[test]
    fn in_a_cluster_an_admin_key_that_has_become_the_last_one_is_put_back() {
        for is_leaked in [true, false] {
            let cluster = Arc::new(ClusterOfOne::default());
            let registry = in_memory(Some(cluster.clone()));
            let [first, second] = [Scope::Admin, Scope::Admin].map(|scope| create(&registry, scope));
            cluster.is_away.store(true, Ordering::Relaxed);
            if is_leaked {
                registry.revoke_leaked(&Actor::SYSTEM, &first.digest, "").expect("dead here");
            } else {
                registry.revoke_key(&Actor::SYSTEM, &first.datasource, first.id).expect("dead here");
            }
            assert!(registry.was_revoked(&first.digest));
            revoked_elsewhere(&registry, &second);
            cluster.is_away.store(false, Ordering::Relaxed);
            registry.write_ends().expect("written");
            let kept = registry.find(&first.digest).expect("there again");
            assert!(kept.holds() && !first.holds() && !second.holds());
            assert_eq!(registry.key(&kept.datasource, kept.id).map(|key| key.id), Some(first.id));
            let page = AuditQuery { from: None, to: None, after: 0, limit: 10 };
            let entries = registry.audit_entries(&page).expect("read");
            assert_eq!(entries.iter().any(|entry| &*entry.action == "key.leaked_and_kept"), is_leaked);
            // Once there is another one, it can go.
            create(&registry, Scope::Admin);
            assert!(registry.revoke_key(&Actor::SYSTEM, &kept.datasource, kept.id).expect("dead").is_some());
        }
    }

    #[test]
    fn a_deletion_of_which_a_cluster_has_got_a_part_is_completed() {
        const KEYS: usize = 1_500;
        let cluster = Arc::new(ClusterOfOne::default());
        let registry = in_memory(Some(cluster.clone()));
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let (press, ..) =
            registry.create_datasource(&Actor::SYSTEM, None, "Press 4", scopes).expect("created");
        for _ in 1..KEYS {
            registry.create_key(&Actor::SYSTEM, &press.id, "", scopes, None).expect("created");
        }
        cluster.batches.lock().clear();
        *cluster.batches_left.lock() = Some(1);
        let dead = registry.delete_datasource(&Actor::SYSTEM, &press.id).expect("dead here");
        assert_eq!(dead.len(), KEYS);
        let part = std::mem::take(&mut *cluster.batches.lock());
        let are_keys = |rows: &[String]| rows.iter().all(|name| name.starts_with("key."));
        assert!(part.len() == 1 && are_keys(&part[0][1..]), "{part:?}");
        let rows = cluster.rows.lock().clone();
        registry.apply(&rows, rows.len() as u64, false).expect("applied");
        *cluster.batches_left.lock() = None;
        registry.write_ends().expect("written");
        let rest = cluster.batches.lock().concat();
        let (keys, last) = rest[1..].split_at(rest.len() - 4);
        assert!(are_keys(keys), "{keys:?}");
        assert_eq!(part[0].len() + keys.len(), KEYS + 1, "each once, beside the format");
        let kinds: Vec<_> = last.iter().map(|name| name.split('.').next().unwrap_or_default()).collect();
        assert_eq!(kinds, ["incarnation", "datasource", "audit"]);
    }

    #[test]
    fn a_change_comes_behind_the_end_of_a_key_that_it_has_waited_for() {
        let registry = in_memory(None);
        let key = create(&registry, Scope::Ingest);
        thread::scope(|scope| {
            let locked = registry.lock_database();
            let creating = scope.spawn(|| create(&registry, Scope::Ingest));
            // It has found the queue empty and waits for the lock.
            thread::sleep(Duration::from_millis(100));
            let end = KeyEnd::new(KeyEndReason::Revoked, vec![key], &Actor::SYSTEM, json!({}));
            registry.end_in_memory(&end);
            registry.unwritten.extend(vec![end]);
            drop(locked);
            creating.join().expect("no panic");
        });
        let page = AuditQuery { from: None, to: None, after: 0, limit: 10 };
        let entries = registry.audit_entries(&page).expect("read");
        let actions: Vec<_> = entries.iter().map(|entry| &*entry.action).collect();
        assert_eq!(actions, ["key.created", "key.revoked", "key.created"]);
    }
}
