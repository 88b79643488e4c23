//! The deadlines of keys: a key ends when it expires or its grace period ends, in the same way as a
//! revoked key: its lease ends and its connections are told to close.
//!
//! Deadlines are wall clock times, and the clock may be set. So the task that waits for them ([`run`])
//! checks the clock at least once a second, and a key that has ended stays ended even if the clock goes
//! back. In a cluster each node ends keys by the clock of the servers, and the first one records it for all. What was opened
//! with an access token is closed here too when that ends ([`TokenEnds`](super::token_ends)).

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::task::JoinSet;

use super::Registry;
use super::audit::Actor;
use super::key::Key;
use super::key_ends::KeyEnd;
use super::token_ends::TokenEnds;
use super::transaction::KeyEndReason;
use crate::auth::connections::CloseReason;
use crate::message::TimeMicros;
use crate::time::cluster_micros;

/// How often the clock is checked.
const DEADLINE_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The shortest pause between two of these checks for the ends of access tokens.
const TOKEN_CHECK_PAUSE_MIN: Duration = Duration::from_millis(1);

impl Registry {
    /// The earliest time at which a key ends by itself.
    fn next_deadline(&self) -> Option<TimeMicros> {
        let deadlines = self.live.deadlines.lock();
        deadlines.first().map(|(at, ..)| *at)
    }

    /// Ends every key whose deadline has passed. Before this returns, their leases have ended and their
    /// connections are told to close, whatever the disk says; in a cluster the lease of a key whose grace is over
    /// ends only when that is durable. Returns the keys, whose connections the caller waits for.
    fn end_due(&self) -> Vec<Arc<Key>> {
        let now = cluster_micros();
        let due: Vec<_> = {
            let deadlines = self.live.deadlines.lock();
            deadlines.iter().take_while(|(at, ..)| *at <= now).cloned().collect()
        };
        // A deadline that differs from its key's is stale: it was moved, or the key is gone.
        let due_key = |at: TimeMicros, owner, id| {
            self.live.key(owner, id).filter(|key| key.ends_at() == Some(at)).map(end_of_due)
        };
        let ended = self.end_keys(false, || {
            Ok(due.iter().filter_map(|(at, owner, id)| due_key(*at, owner, *id)).collect())
        });
        let mut deadlines = self.live.deadlines.lock();
        for deadline in &due {
            deadlines.remove(deadline);
        }
        drop(deadlines);
        let mut ended = ended.unwrap_or_default();
        // A key whose rotation was undone lives on.
        ended.retain(|key| !key.holds() || key.has_expired());
        for key in &ended {
            if key.holds() {
                key.connections().close_present(CloseReason::KeyDead);
            }
            tracing::info!(key_id = %key.id, datasource = %key.datasource, "an API key has ended");
        }
        ended
    }
}

/// The end of a key whose deadline has passed: it expires, or its grace period is over and it is revoked.
fn end_of_due(key: Arc<Key>) -> KeyEnd {
    let grace = key.rotation().replaced_by.filter(|(_, ends_at)| key.ends_at() == Some(*ends_at));
    let (why, what) = match grace {
        Some((by, _)) => (KeyEndReason::Rotated, json!({ "new_key": by })),
        None => (KeyEndReason::Expired, json!({})),
    };
    let mut end = KeyEnd::new(why, vec![key], &Actor::SYSTEM, what);
    end.grace = grace;
    end
}

/// Ends each key at its deadline, until dropped. `settle` waits until nothing more can be accepted under the
/// ended keys; it gets the moment at which they ended.
pub async fn run<S>(registry: Arc<Registry>, settle: impl Fn(Vec<Arc<Key>>, Instant) -> S)
where
    S: Future<Output = ()> + Send + 'static,
{
    // Apart: the end of a key waits for the disk or for NATS, and that of a token for nothing.
    tokio::join!(end_tokens(&registry.token_ends), end_keys(&registry, settle));
}

/// Closes what was opened with an access token when that ends, until dropped.
async fn end_tokens(ends: &TokenEnds) {
    loop {
        ends.end_due(cluster_micros());
        let left = ends.next_end().map(|at| at.saturating_sub(cluster_micros()));
        let wait = left.map_or(DEADLINE_CHECK_INTERVAL, |left| {
            let left = Duration::from_micros(u64::try_from(left).unwrap_or(0));
            left.clamp(TOKEN_CHECK_PAUSE_MIN, DEADLINE_CHECK_INTERVAL)
        });
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = ends.is_earlier.notified() => {}
        }
    }
}

async fn end_keys<S>(registry: &Arc<Registry>, settle: impl Fn(Vec<Arc<Key>>, Instant) -> S)
where
    S: Future<Output = ()> + Send + 'static,
{
    let mut settling = JoinSet::new();
    loop {
        let (for_change, started) = (Arc::clone(registry), Instant::now());
        let is_due = registry.next_deadline().is_some_and(|at| at <= cluster_micros());
        let mut wait = DEADLINE_CHECK_INTERVAL;
        if is_due {
            match tokio::task::spawn_blocking(move || for_change.end_due()).await {
                Ok(dead) if !dead.is_empty() => drop(settling.spawn(settle(dead, started))),
                Ok(_) => {}
                Err(error) => tracing::error!(%error, "the registry has failed"),
            }
        }
        while settling.try_join_next().is_some() {}
        if let Some(at) = registry.next_deadline() {
            let left = u64::try_from(at.saturating_sub(cluster_micros())).unwrap_or(0);
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
    use std::sync::atomic::Ordering;

    use tempfile::TempDir;

    use super::super::database::RegistryDatabase;
    use super::super::replica::tests::ClusterOfOne;
    use super::super::rows::RegistryRow;
    use super::*;
    use crate::auth::{ApiKey, Scope, Scopes};
    use crate::message::DatasourceId;
    use crate::message::now_micros;

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
        assert!(registry.end_due().is_empty());
        assert!(later.holds());
        let (_dir, registry, now, _) = with_key(0);
        let ended = registry.end_due();
        assert_eq!(ended.iter().map(|key| key.id).collect::<Vec<_>>(), [now.id]);
        assert!(!now.holds());
        assert!(registry.end_due().is_empty(), "once");
        assert_eq!(registry.next_deadline(), None);
    }

    #[test]
    fn a_key_that_has_ended_stays_so_when_the_clock_is_set_back() {
        let (dir, registry, key, secret) = with_key(0);
        registry.end_due();
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
        let (dir, registry, key, secret) = with_key(0);
        registry.lock_database().refuse_changes(true);
        assert_eq!(registry.end_due().len(), 1);
        assert!(!key.holds() && key.has_expired());
        assert!(registry.trouble().is_some_and(|trouble| trouble.contains(&key.id.to_string())));
        registry.lock_database().refuse_changes(false);
        registry.write_ends().expect("written");
        assert_eq!(registry.trouble(), None);
        drop(registry);
        let registry = Registry::open(dir.path()).expect("opens");
        let key = registry.find(&secret.digest()).expect("listed still");
        assert_eq!(key.ends_at(), Some(super::super::key::TIME_ENDED));
    }

    #[test]
    fn in_a_cluster_a_grace_that_another_node_has_undone_ends_nothing_however_late_that_is_heard() {
        let cluster = Arc::new(ClusterOfOne::default());
        let database = RegistryDatabase::in_memory().expect("opens");
        let registry = Registry::from_database(database, Some(cluster.clone())).expect("empty");
        let (all, scopes) = (DatasourceId::all(), Scopes::from_slice(&[Scope::Ingest]));
        let rotated = |grace: Duration| {
            let (key, _) = registry.create_key(&Actor::SYSTEM, &all, "", scopes, None).expect("created");
            registry.rotate_key(&Actor::SYSTEM, &all, key.id, grace).expect("rotated").expect("there");
            std::thread::sleep(2 * grace);
            key
        };
        let key = rotated(Duration::from_millis(1));
        let undone = |key: &Key| {
            let database = registry.lock_database();
            let mut row = database.row_of(key.id);
            let RegistryRow::Key(_, Some(columns)) = &mut row else { panic!("no key: {row:?}") };
            (columns.replaced_by, columns.grace_ends_at) = (None, None);
            let revision = database.applied() + 1;
            (revision, row)
        };
        cluster.is_away.store(true, Ordering::Relaxed);
        assert_eq!(registry.end_due().len(), 1);
        assert!(key.holds() && key.has_expired(), "the clock denies it");
        let (revision, row) = undone(&key);
        assert!(registry.apply(&[(revision, row)], revision, false).expect("applied").is_empty());
        cluster.is_away.store(false, Ordering::Relaxed);
        registry.write_ends().expect("nothing to write");
        assert!(key.holds() && !key.has_expired() && registry.key(&all, key.id).is_some());

        // Without the undoing it dies when that can be written.
        let key = rotated(Duration::from_millis(1));
        cluster.is_away.store(true, Ordering::Relaxed);
        assert_eq!(registry.end_due().len(), 1);
        cluster.is_away.store(false, Ordering::Relaxed);
        registry.write_ends().expect("written");
        assert!(!key.holds() && registry.was_revoked(&key.digest));
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
