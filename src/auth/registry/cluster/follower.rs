//! Follows the bucket of a cluster's registry: applies what other nodes change, and says how far it has come.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use headgate_bridge_nats::kv::{KvUpdate, KvWatch};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::super::Registry;
use super::super::key::Key;
use super::super::replica::RegistryRevision;
use super::bucket::parse_update;

/// The pause before another attempt to apply a change of another node.
const REGISTRY_APPLY_RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Keeps a node's registry up to date.
pub struct RegistryFollower {
    pub(super) registry: Arc<Registry>,
    pub(super) watch: KvWatch,
    pub(super) progress: Arc<RegistryProgress>,
}

/// How far a node has applied and settled the cluster's changes.
#[derive(Debug)]
pub(super) struct RegistryProgress(watch::Sender<RegistryProgressState>);

#[derive(Debug, Default)]
struct RegistryProgressState {
    applied: RegistryRevision,
    /// Number of updates whose dead keys may still have messages in flight, by the revision that was
    /// applied before each.
    settling: BTreeMap<RegistryRevision, usize>,
}

impl RegistryProgressState {
    fn settled_revision(&self) -> RegistryRevision {
        self.settling.first_key_value().map_or(self.applied, |(before, _)| *before)
    }
}

impl RegistryProgress {
    /// A node that has applied everything up to a revision.
    pub(super) fn applied(revision: RegistryRevision) -> Self {
        Self(watch::Sender::new(RegistryProgressState { applied: revision, settling: BTreeMap::new() }))
    }

    pub(super) async fn wait_settled(&self, revision: RegistryRevision) {
        // Cannot fail: `self` holds the sender.
        let _ = self.0.subscribe().wait_for(|reached| reached.settled_revision() >= revision).await;
    }
}

impl RegistryFollower {
    /// Applies the changes of other nodes until it is dropped. `settle` waits until nothing more can be
    /// accepted under the keys that died.
    pub async fn run<S>(mut self, settle: impl Fn(Vec<Arc<Key>>) -> S)
    where
        S: Future<Output = ()> + Send + 'static,
    {
        let mut settling = JoinSet::new();
        loop {
            let update = self.watch.next().await;
            while settling.try_join_next().is_some() {}
            let (revision, all) = (update.revision, update.all);
            let dead = self.apply(update).await;
            let progress = &self.progress.0;
            let mut before = 0;
            progress.send_modify(|reached| {
                before = if all { 0 } else { reached.applied };
                reached.applied = revision;
                if !dead.is_empty() {
                    *reached.settling.entry(before).or_default() += 1;
                }
            });
            if dead.is_empty() {
                continue;
            }
            let (settled, progress) = (settle(dead), self.progress.clone());
            settling.spawn(async move {
                settled.await;
                progress.0.send_modify(|reached| {
                    if let Some(left) = reached.settling.get_mut(&before) {
                        *left -= 1;
                        if *left == 0 {
                            reached.settling.remove(&before);
                        }
                    }
                });
            });
        }
    }

    /// Applies one update, and retries until it succeeds: a revocation must not be skipped.
    async fn apply(&self, update: KvUpdate) -> Vec<Arc<Key>> {
        let (revision, all) = (update.revision, update.all);
        let update = Arc::new(update);
        loop {
            let (registry, update) = (self.registry.clone(), update.clone());
            // Blocking, because it waits for this node's own changes.
            let applied =
                tokio::task::spawn_blocking(move || registry.apply(&parse_update(&update)?, revision, all));
            let error = match applied.await {
                Ok(Ok(dead)) => return dead,
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            tracing::error!(error, "a change of the cluster's registry cannot be applied; trying again");
            tokio::time::sleep(REGISTRY_APPLY_RETRY_PAUSE).await;
        }
    }
}
