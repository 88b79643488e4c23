//! The deadlines of keys: a key ends when it expires or its grace period ends, in the same way as a
//! revoked key: its lease ends and its connections are told to close.
//!
//! Deadlines are wall clock times, and the clock may be set. So the task that waits for them ([`run`])
//! checks the clock at least once a second, and a key that has ended stays ended even if the clock goes
//! back. In a cluster each node ends keys by its own clock, and the first one records it for all.

use std::sync::Arc;
use std::time::{Duration, Instant};

use headgate_format::key::Digest;
use serde_json::json;
use tokio::task::JoinSet;

use super::Registry;
use super::audit::{Actor, AuditEvent};
use super::database::RegistryDatabase;
use super::error::RegistryError;
use super::key::Key;
use super::transaction::KeyEndReason;
use crate::message::{TimeMicros, now_micros};

/// How often the clock is checked.
const DEADLINE_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The pause before another attempt to record that keys have ended.
const DEADLINE_WRITE_RETRY_PAUSE: Duration = Duration::from_secs(5);

impl Registry {
    /// The earliest time at which a key ends by itself.
    fn next_deadline(&self) -> Option<TimeMicros> {
        let deadlines = self.live.deadlines.lock();
        deadlines.first().map(|(at, ..)| *at)
    }

    /// Ends every key whose deadline has passed. Before this returns, their leases have ended and their
    /// connections are told to close. Returns the keys, whose connections the caller waits for.
    ///
    /// # Errors
    /// [`RegistryError::Database`] if the end cannot be recorded. The keys have ended all the same, as they
    /// would after a restart, and the next call tries again.
    fn end_due(&self) -> Result<Vec<Arc<Key>>, RegistryError> {
        let now = now_micros();
        // Collects over all attempts: a key whose end another node has recorded meanwhile ended here too.
        let mut all: Vec<Arc<Key>> = Vec::new();
        self.make_change_here(|database| {
            let due: Vec<_> = {
                let deadlines = self.live.deadlines.lock();
                deadlines.iter().take_while(|(at, ..)| *at <= now).cloned().collect()
            };
            // A deadline that differs from its key's is stale: it was moved, or the key is gone.
            let still_its = |key: &Arc<Key>, at| key.ends_at() == Some(at);
            let ended: Vec<_> = due
                .iter()
                .filter_map(|(at, owner, id)| self.live.key(owner, *id).filter(|key| still_its(key, *at)))
                .collect();
            for key in &ended {
                key.end();
                if all.iter().all(|earlier| earlier.id != key.id) {
                    all.push(Arc::clone(key));
                }
            }
            let retired = if ended.is_empty() { Vec::new() } else { record_ended(database, &ended)? };
            for digest in &retired {
                self.live.kill(digest);
            }
            for key in &ended {
                key.mark_ended();
                tracing::info!(key_id = %key.id, datasource = %key.datasource, "an API key has ended");
            }
            let mut deadlines = self.live.deadlines.lock();
            for deadline in &due {
                deadlines.remove(deadline);
            }
            Ok(())
        })?;
        Ok(all)
    }
}

/// Records that keys have ended. Returns the digests of those whose grace period ended: they are revoked.
fn record_ended(database: &mut RegistryDatabase, ended: &[Arc<Key>]) -> Result<Vec<Digest>, RegistryError> {
    let mut retired = Vec::new();
    let change = database.begin()?;
    for key in ended {
        match key.rotation().replaced_by {
            Some((by, grace_ends_at)) if key.ends_at() == Some(grace_ends_at) => {
                retired.extend(change.revoke(&key.datasource, key.id, KeyEndReason::Rotated)?);
                let what = json!({ "new_key": by });
                change.audit(&Actor::SYSTEM, &AuditEvent::of_key("key.retired", key, &what))?;
            }
            _ => {
                change.expire(key.id)?;
                change.audit(&Actor::SYSTEM, &AuditEvent::of_key("key.expired", key, &json!({})))?;
            }
        }
    }
    change.commit()?;
    Ok(retired)
}

/// Ends each key at its deadline, until dropped. `settle` waits until nothing more can be accepted under the
/// ended keys; it gets the moment at which they ended.
pub async fn run<S>(registry: Arc<Registry>, settle: impl Fn(Vec<Arc<Key>>, Instant) -> S)
where
    S: Future<Output = ()> + Send + 'static,
{
    let mut settling = JoinSet::new();
    loop {
        let (for_change, started) = (Arc::clone(&registry), Instant::now());
        let is_due = registry.next_deadline().is_some_and(|at| at <= now_micros());
        let mut wait = DEADLINE_CHECK_INTERVAL;
        if is_due {
            match tokio::task::spawn_blocking(move || for_change.end_due()).await {
                Ok(Ok(dead)) if !dead.is_empty() => drop(settling.spawn(settle(dead, started))),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    tracing::error!(%error, "keys have ended, but that could not be recorded");
                    wait = DEADLINE_WRITE_RETRY_PAUSE;
                }
                Err(error) => {
                    tracing::error!(%error, "the registry has failed");
                    wait = DEADLINE_WRITE_RETRY_PAUSE;
                }
            }
        }
        while settling.try_join_next().is_some() {}
        if let Some(at) = registry.next_deadline() {
            let left = u64::try_from(at.saturating_sub(now_micros())).unwrap_or(0);
            if left > 0 {
                wait = wait.min(Duration::from_micros(left));
            }
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = registry.live.deadline_set.notified() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::auth::{ApiKey, Scope, Scopes};
    use crate::message::DatasourceId;

    fn with_key(lasts: TimeMicros) -> (TempDir, Registry, Arc<Key>, ApiKey) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Registry::open(dir.path()).expect("opens");
        let (all, scopes) = (DatasourceId::all(), Scopes::from_slice(&[Scope::Ingest]));
        let expires_at = Some(now_micros() + lasts);
        let (key, secret) =
            registry.create_key(&Actor::SYSTEM, &all, "", scopes, expires_at).expect("created");
        (dir, registry, key, secret)
    }

    #[test]
    fn a_key_ends_when_its_time_has_come_and_not_before() {
        let (_dir, registry, later, _) = with_key(60_000_000);
        assert!(registry.end_due().expect("written").is_empty());
        assert!(later.holds());
        let (_dir, registry, now, _) = with_key(0);
        let ended = registry.end_due().expect("written");
        assert_eq!(ended.iter().map(|key| key.id).collect::<Vec<_>>(), [now.id]);
        assert!(!now.holds());
        assert!(registry.end_due().expect("written").is_empty(), "once");
        assert_eq!(registry.next_deadline(), None);
    }

    #[test]
    fn a_key_that_has_ended_stays_so_when_the_clock_is_set_back() {
        let (dir, registry, key, secret) = with_key(0);
        registry.end_due().expect("written");
        // Before any time that a clock shows.
        assert!(key.ends_at().is_some_and(|at| at < 0));
        drop(registry);
        let registry = Registry::open(dir.path()).expect("opens");
        let key = registry.find(&secret.digest()).expect("listed still");
        assert!(key.has_expired() && !key.holds());
        assert!(key.ends_at().is_some_and(|at| at < 0));
        assert_eq!(registry.next_deadline(), None);
    }

    #[test]
    fn a_key_ends_also_when_that_cannot_be_written_down_and_it_is_tried_again() {
        let (_dir, registry, key, _) = with_key(0);
        registry.lock_database().refuse_changes(true);
        assert!(matches!(registry.end_due(), Err(RegistryError::Database(_))));
        assert!(!key.holds() && key.has_expired());
        registry.lock_database().refuse_changes(false);
        assert_eq!(registry.end_due().expect("written").len(), 1);
    }

    #[test]
    fn a_grace_that_is_undone_ends_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Registry::open(dir.path()).expect("opens");
        let (all, scopes) = (DatasourceId::all(), Scopes::from_slice(&[Scope::Ingest]));
        let (key, _) = registry.create_key(&Actor::SYSTEM, &all, "", scopes, None).expect("created");
        let grace = Duration::from_secs(60);
        let rotated = registry.rotate_key(&Actor::SYSTEM, &all, key.id, grace).expect("rotated");
        let at = rotated.expect("there").grace_ends_at;
        assert_eq!((registry.next_deadline(), key.ends_at()), (Some(at), Some(at)));
        registry.undo_rotation(&Actor::SYSTEM, &all, key.id).expect("undone").expect("there");
        assert_eq!(key.ends_at(), None);
    }
}
