//! The registry of a cluster: the KV bucket [`REGISTRY_BUCKET`], which every node watches and copies into memory.
//! `rows.rs` describes its rows.
//!
//! **Changes have one order.** A node publishes a change as one atomic batch, on the condition that the
//! bucket has nothing newer than what that node has applied. So each change was checked against all
//! earlier ones, from whichever node. The second of two concurrent changes is rejected; its node catches
//! up and checks it again. That is why audit ids and versions of leak rules are the same on all nodes, and
//! why no key can be created for a datasource that is being deleted elsewhere.
//!
//! **A change takes effect everywhere before its call returns.** The node that made it asks every other
//! present node ([`Presence`]) on [`SETTLE_SUBJECT_PREFIX`]. Each answers when it has applied the change and nothing more
//! can be accepted under the keys that died. The wait for a node ends when it answers or is gone, after
//! five seconds at most. A node without NATS hears of no change, but cannot append anything either,
//! because the log is on NATS. When it is back, it accepts nothing until it has caught up
//! ([`Registry::may_be_behind`]).

mod usage;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use headgate_bridge_nats::kv::{KvPut, KvUpdate, KvWatch, KvWatchProgress};
use headgate_bridge_nats::presence::NodeReply;
use headgate_bridge_nats::{KvBucket, KvBucketSettings, KvError, KvWrites, Nats, NatsError, Presence};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::apply::check_rows_format;
use super::database::RegistryDatabase;
use super::live::Key;
use super::registry::{Registry, RegistryError};
use super::replica::{RegistryReplica, RegistryRevision};
use super::rows::{REGISTRY_ROWS_FORMAT, RegistryRow};
use super::usage::KeyUsage;
use crate::limits::{CATCH_UP_MAX, REVOCATION_WAIT_MAX};
use crate::message::KeyId;

use usage::KeyUsageCells;

/// The KV bucket of the cluster's registry.
pub const REGISTRY_BUCKET: &str = "headgate-registry";
/// Prefix of the subject on which a node announces its presence.
pub const NODE_SUBJECT_PREFIX: &str = "headgate.node";
/// Prefix of the subjects on which a node is asked whether it has settled a revision.
pub const SETTLE_SUBJECT_PREFIX: &str = "headgate.settle";

/// The pause before another attempt to reach NATS.
const REGISTRY_OPEN_RETRY_PAUSE: Duration = Duration::from_millis(250);
/// The pause before another attempt to apply a change of another node.
const REGISTRY_APPLY_RETRY_PAUSE: Duration = Duration::from_secs(1);

/// The registry of a node that has joined its cluster.
pub struct JoinedRegistry {
    /// The registry, with everything that the cluster's had at this moment.
    pub registry: Arc<Registry>,
    /// The node's presence among the others.
    pub presence: Arc<Presence>,
    /// Keeps the registry up to date. Must run before any message is accepted.
    pub follow: RegistryFollower,
}

/// Keeps a node's registry up to date.
pub struct RegistryFollower {
    registry: Arc<Registry>,
    watch: KvWatch,
    progress: Arc<RegistryProgress>,
}

/// The cluster's registry as seen by the node that changes it.
#[derive(Debug)]
struct RegistryCluster {
    bucket: KvBucket,
    seen: KvWatchProgress,
    usages: KeyUsageCells,
    presence: OnceLock<Arc<Presence>>,
    runtime: Handle,
}

/// How far a node has applied and settled the cluster's changes.
#[derive(Debug, Default)]
struct RegistryProgress(watch::Sender<RegistryProgressState>);

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
    async fn wait_settled(&self, revision: RegistryRevision) {
        // Cannot fail: `self` holds the sender.
        let _ = self.0.subscribe().wait_for(|reached| reached.settled_revision() >= revision).await;
    }
}

impl Registry {
    /// Joins a cluster as the node `id`: opens its bucket, or creates it with `replicas` replicas, and reads
    /// it. Waits while NATS is away.
    ///
    /// # Errors
    /// [`RegistryError::Cluster`] if JetStream cannot create the bucket, or its rows cannot be read.
    pub async fn join(nats: &Nats, replicas: usize, id: &str) -> Result<JoinedRegistry, RegistryError> {
        let (name, writes) = (REGISTRY_BUCKET.to_owned(), KvWrites::Batched);
        let settings = KvBucketSettings { name, replicas, age_max: None, writes };
        let bucket = open_when_reachable(|| KvBucket::open(nats, &settings)).await?;
        let usages = open_when_reachable(|| async {
            // Treats every error as transient, so that it is tried again.
            KeyUsageCells::open(nats, replicas).await.map_err(|error| KvError::Away(error.to_string()))
        });
        let usages = usages.await?;
        let mut watch = bucket.watch();
        let first = watch.next().await;
        let rows = parse_update(&first)?;
        match rows
            .iter()
            .find_map(|(_, row)| if let RegistryRow::Format(version) = row { Some(*version) } else { None })
        {
            Some(version) => check_rows_format(version)?,
            None => {
                let format = RegistryRow::Format(REGISTRY_ROWS_FORMAT);
                let value = format.value().map(Bytes::from);
                let put = KvPut { key: format.name(), value, expected: Some(0) };
                match bucket.put_all(&[put], None).await {
                    // Another node may just have written it. The first change reports any other trouble.
                    Ok(_) | Err(KvError::Conflict | KvError::Away(_)) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        let progress = Arc::<RegistryProgress>::default();
        progress.0.send_modify(|reached| reached.applied = first.revision);
        let cluster = Arc::new(RegistryCluster {
            bucket,
            seen: watch.seen(),
            usages,
            presence: OnceLock::new(),
            runtime: Handle::current(),
        });
        let replica = cluster.clone();
        let registry = tokio::task::spawn_blocking(move || {
            let mut database = RegistryDatabase::in_memory()?;
            let all: Vec<&RegistryRow> = rows.iter().map(|(_, row)| row).collect();
            database.take_over(&all, first.revision, true)?;
            let registry = Registry::from_database(database, Some(replica))?;
            for (_, row) in rows {
                if let RegistryRow::Leak(version, row) = row {
                    registry.learn_leak_rule(version, row);
                }
            }
            Ok::<_, RegistryError>(registry)
        });
        let registry = registry.await.map_err(|error| RegistryError::Cluster(error.to_string()))??;
        // Only now announce this node: the others wait for it from here on, and would have had to wait
        // while it was reading.
        let failed = |error: NatsError| RegistryError::Cluster(error.to_string());
        let presence = Arc::new(Presence::start(nats, NODE_SUBJECT_PREFIX, id).await.map_err(failed)?);
        let answers = progress.clone();
        let answer = move |asked: Bytes| {
            let progress = answers.clone();
            async move {
                let revision = std::str::from_utf8(&asked).ok().and_then(|text| text.parse().ok());
                // An unreadable question, as from another version, is answered at once.
                progress.wait_settled(revision.unwrap_or(0)).await;
                Bytes::new()
            }
        };
        presence.serve(SETTLE_SUBJECT_PREFIX, answer).await.map_err(failed)?;
        let _ = cluster.presence.set(presence.clone());
        let registry = Arc::new(registry);
        tracing::info!(
            node = id,
            datasources = registry.datasources().len(),
            keys = registry.key_count(),
            "joined the cluster's registry"
        );
        Ok(JoinedRegistry {
            follow: RegistryFollower { registry: registry.clone(), watch, progress },
            registry,
            presence,
        })
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

impl RegistryReplica for RegistryCluster {
    fn publish(
        &self,
        rows: &[RegistryRow],
        after: RegistryRevision,
    ) -> Result<RegistryRevision, RegistryError> {
        let put = |row: &RegistryRow| KvPut {
            key: row.name(),
            value: row.value().map(Bytes::from),
            expected: None,
        };
        let puts: Vec<KvPut> = rows.iter().map(put).collect();
        Ok(self.runtime.block_on(self.bucket.put_all(&puts, Some(after)))?)
    }

    fn catch_up(&self) -> Result<RegistryRevision, RegistryError> {
        Ok(self.runtime.block_on(self.seen.sync(CATCH_UP_MAX))?)
    }

    fn wait_everywhere(&self, revision: RegistryRevision) {
        let Some(presence) = self.presence.get() else { return };
        let asked =
            presence.ask_all(SETTLE_SUBJECT_PREFIX, Bytes::from(revision.to_string()), REVOCATION_WAIT_MAX);
        for (node, reply) in self.runtime.block_on(asked) {
            if reply == NodeReply::Silent {
                tracing::warn!(node, revision, "a node has not confirmed a change of the registry");
            }
        }
    }

    fn is_current(&self) -> bool {
        self.seen.is_current()
    }

    fn usage(&self, keys: &[KeyId]) -> Result<Vec<KeyUsage>, RegistryError> {
        self.runtime.block_on(self.usages.read(keys))
    }

    fn add_usage(&self, used: Vec<(KeyId, KeyUsage)>) -> (Vec<(KeyId, KeyUsage)>, Result<(), RegistryError>) {
        let mut added = Ok(());
        let left = self.runtime.block_on(self.usages.add(used));
        let left = left.into_iter().map(|(key, used, error)| {
            added = Err(RegistryError::Away(error.to_string()));
            (key, used)
        });
        (left.collect(), added)
    }
}

impl From<KvError> for RegistryError {
    fn from(error: KvError) -> Self {
        match error {
            KvError::Conflict => RegistryError::Overtaken,
            KvError::Away(text) => RegistryError::Away(text),
            KvError::TooLarge(text) => RegistryError::TooLarge(text),
            KvError::Refused(text) => RegistryError::Cluster(text),
        }
    }
}

/// Calls `open` until NATS can be reached.
async fn open_when_reachable<T, O>(mut open: impl FnMut() -> O) -> Result<T, RegistryError>
where
    O: Future<Output = Result<T, KvError>>,
{
    let mut said = String::new();
    loop {
        match open().await {
            Err(KvError::Away(trouble)) => {
                if trouble != said {
                    tracing::warn!(trouble, "waiting for the cluster's registry");
                    said = trouble;
                }
                tokio::time::sleep(REGISTRY_OPEN_RETRY_PAUSE).await;
            }
            opened => return Ok(opened?),
        }
    }
}

/// Parses the rows of an update. An unreadable row fails the whole update, because its effect is unknown.
fn parse_update(update: &KvUpdate) -> Result<Vec<(RegistryRevision, RegistryRow)>, RegistryError> {
    let mut rows = Vec::with_capacity(update.rows.len());
    for row in &update.rows {
        match RegistryRow::parse(&row.key, row.value.as_deref()) {
            Ok(Some(parsed)) => rows.push((row.revision, parsed)),
            Ok(None) => tracing::warn!(row = row.key, "the cluster's registry has a row of an unknown kind"),
            Err(detail) => {
                return Err(RegistryError::Cluster(format!(
                    "row {} of the bucket {REGISTRY_BUCKET} cannot be read: {detail}",
                    row.key
                )));
            }
        }
    }
    Ok(rows)
}
