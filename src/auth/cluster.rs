//! The registry of a cluster: the KV bucket [`BUCKET`], which every node watches and of which each has a copy in
//! memory (`rows.rs` says what is in it).
//!
//! **Changes are in one order.** A node publishes a change as one atomic batch, on the condition that the
//! bucket has nothing newer than what that node has applied. So each change was checked against all that
//! were before it, on whichever node they were made, and of two at once the second is told so, catches up
//! and is checked again. That is why the ids of the audit and the versions of leak rules are the same
//! everywhere, and why no key can be made for a datasource that is being deleted elsewhere.
//!
//! **A change counts everywhere before its call returns.** The node that made it asks every other one that is
//! there ([`Presence`]) on [`SETTLE`]; each answers when it has applied it, and nothing more can come in under
//! the keys that died by it. A node that does not answer is waited for as long as it is there, five seconds at
//! most. One that has lost NATS hears of nothing; but it cannot append anything either, because the log
//! is there, and when it is back nothing is let in before it has caught up ([`Registry::may_be_behind`]).

mod usage;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use headgate_bridge_nats::kv::{Put, Seen, Update, Watch};
use headgate_bridge_nats::presence::Reply;
use headgate_bridge_nats::{Bucket, BucketSettings, KvError, Nats, NatsError, Presence};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::apply::check_format;
use super::database::Database;
use super::live::Key;
use super::registry::{Registry, RegistryError};
use super::replica::{Replica, Revision};
use super::rows::{FORMAT, Row};
use super::usage::Used;
use crate::limits::{CATCH_UP_MAX, REVOCATION_WAIT_MAX};
use crate::message::KeyId;

use usage::Usages;

pub use usage::USAGE_BUCKET;

/// The bucket.
pub const BUCKET: &str = "headgate-registry";
/// What a node's own subject begins with, on which it says that it is there.
pub const NODES: &str = "headgate.node";
/// What the subjects begin with on which a node is asked whether it has applied a revision.
pub const SETTLE: &str = "headgate.settle";

/// The pause before NATS is tried again.
const PAUSE: Duration = Duration::from_millis(250);
/// The pause before a change of another node is applied again that could not be.
const APPLY_AGAIN: Duration = Duration::from_secs(1);

/// A node's registry as it joins its cluster.
pub struct Joined {
    /// The registry, with all that the cluster's had at this moment.
    pub registry: Arc<Registry>,
    /// The node among the others.
    pub presence: Arc<Presence>,
    /// Keeps it up to date; to be run, before anything is let in.
    pub follow: Follow,
}

/// What keeps a node's registry up to date.
pub struct Follow {
    registry: Arc<Registry>,
    watch: Watch,
    progress: Arc<Progress>,
}

/// The bucket, and the node that changes it.
#[derive(Debug)]
struct Cluster {
    bucket: Bucket,
    seen: Seen,
    usages: Usages,
    presence: OnceLock<Arc<Presence>>,
    runtime: Handle,
}

/// Up to where a node has applied what was changed, and settled it.
#[derive(Debug, Default)]
struct Progress(watch::Sender<Reached>);

#[derive(Debug, Default)]
struct Reached {
    applied: Revision,
    /// Updates whose dead keys may still have messages on their way, by what was applied before each.
    settling: BTreeMap<Revision, usize>,
}

impl Reached {
    fn settled(&self) -> Revision {
        self.settling.first_key_value().map_or(self.applied, |(before, _)| *before)
    }
}

impl Progress {
    async fn settled(&self, revision: Revision) {
        // The sender is held here: it does not go.
        let _ = self.0.subscribe().wait_for(|reached| reached.settled() >= revision).await;
    }
}

impl Registry {
    /// Joins a cluster as the node `id`: opens its bucket, or makes it on as many servers, and reads it. While NATS
    /// is away this waits.
    ///
    /// # Errors
    /// [`RegistryError::Cluster`] if JetStream cannot have such a bucket, or what is in it cannot be read.
    pub async fn join(nats: &Nats, replicas: usize, id: &str) -> Result<Joined, RegistryError> {
        let settings = BucketSettings { name: BUCKET.to_owned(), replicas, age_max: None };
        let bucket = once_there(|| Bucket::open(nats, &settings)).await?;
        let usages = once_there(|| async {
            // Whatever it says may pass.
            Usages::open(nats, replicas).await.map_err(|error| KvError::Away(error.to_string()))
        });
        let usages = usages.await?;
        let mut watch = bucket.watch();
        let first = watch.next().await;
        let rows = parse(&first)?;
        match rows
            .iter()
            .find_map(|(_, row)| if let Row::Format(version) = row { Some(*version) } else { None })
        {
            Some(version) => check_format(version)?,
            None => {
                let format = Row::Format(FORMAT);
                let value = format.value().map(Bytes::from);
                let put = Put { key: format.name(), value, expected: Some(0) };
                match bucket.put_all(&[put], None).await {
                    // Another node has just done it. What else may be wrong, the first change will say.
                    Ok(_) | Err(KvError::Conflict | KvError::Away(_)) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        let progress = Arc::<Progress>::default();
        progress.0.send_modify(|reached| reached.applied = first.revision);
        let cluster = Arc::new(Cluster {
            bucket,
            seen: watch.seen(),
            usages,
            presence: OnceLock::new(),
            runtime: Handle::current(),
        });
        let replica = cluster.clone();
        let registry = tokio::task::spawn_blocking(move || {
            let mut database = Database::in_memory()?;
            let all: Vec<&Row> = rows.iter().map(|(_, row)| row).collect();
            database.take_over(&all, first.revision, true)?;
            let registry = Registry::of(database, Some(replica))?;
            for (_, row) in rows {
                if let Row::Leak(version, row) = row {
                    registry.learn_leak_rule(version, row);
                }
            }
            Ok::<_, RegistryError>(registry)
        });
        let registry = registry.await.map_err(|error| RegistryError::Cluster(error.to_string()))??;
        // From now on others wait for this node; before, it would keep them waiting while it reads.
        let failed = |error: NatsError| RegistryError::Cluster(error.to_string());
        let presence = Arc::new(Presence::start(nats, NODES, id).await.map_err(failed)?);
        let answers = progress.clone();
        let answer = move |asked: Bytes| {
            let progress = answers.clone();
            async move {
                let revision = std::str::from_utf8(&asked).ok().and_then(|text| text.parse().ok());
                // A question that nobody of this version asks waits for nothing.
                progress.settled(revision.unwrap_or(0)).await;
                Bytes::new()
            }
        };
        presence.serve(SETTLE, answer).await.map_err(failed)?;
        let _ = cluster.presence.set(presence.clone());
        let registry = Arc::new(registry);
        tracing::info!(
            node = id,
            datasources = registry.datasources().len(),
            keys = registry.key_count(),
            "joined the cluster's registry"
        );
        Ok(Joined { follow: Follow { registry: registry.clone(), watch, progress }, registry, presence })
    }

    /// Whether this node may not know yet that a key is dead: it has lost NATS for so long that the others do
    /// not wait for it any more, and has not caught up. Nothing is to be let in meanwhile. A few atomic loads.
    pub fn may_be_behind(&self) -> bool {
        self.replica.as_ref().is_some_and(|replica| !replica.is_current())
    }

    /// Returns when this node has applied whatever the cluster had changed before. At once, if there is no
    /// cluster.
    ///
    /// # Errors
    /// [`RegistryError::Away`] if that takes too long.
    pub async fn caught_up(self: &Arc<Self>) -> Result<(), RegistryError> {
        let Some(replica) = self.replica.clone() else { return Ok(()) };
        let caught_up = tokio::task::spawn_blocking(move || replica.catch_up()).await;
        caught_up.map_err(|error| RegistryError::Cluster(error.to_string()))?.map(drop)
    }
}

impl Follow {
    /// Applies whatever other nodes change, until it is dropped. `settle` waits until nothing more can come in
    /// under keys that died by that.
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

    /// Applies one update, however long that takes: a revocation must not be left out.
    async fn apply(&self, update: Update) -> Vec<Arc<Key>> {
        let (revision, all) = (update.revision, update.all);
        let update = Arc::new(update);
        loop {
            let (registry, update) = (self.registry.clone(), update.clone());
            // It waits for changes that this node is making.
            let applied =
                tokio::task::spawn_blocking(move || registry.apply(&parse(&update)?, revision, all));
            let error = match applied.await {
                Ok(Ok(dead)) => return dead,
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            tracing::error!(error, "what the cluster has changed cannot be applied; trying again");
            tokio::time::sleep(APPLY_AGAIN).await;
        }
    }
}

impl Replica for Cluster {
    fn publish(&self, rows: &[Row], after: Revision) -> Result<Revision, RegistryError> {
        let put = |row: &Row| Put { key: row.name(), value: row.value().map(Bytes::from), expected: None };
        let puts: Vec<Put> = rows.iter().map(put).collect();
        Ok(self.runtime.block_on(self.bucket.put_all(&puts, Some(after)))?)
    }

    fn catch_up(&self) -> Result<Revision, RegistryError> {
        Ok(self.runtime.block_on(self.seen.sync(CATCH_UP_MAX))?)
    }

    fn everywhere(&self, revision: Revision) {
        let Some(presence) = self.presence.get() else { return };
        let asked = presence.ask_all(SETTLE, Bytes::from(revision.to_string()), REVOCATION_WAIT_MAX);
        for (node, reply) in self.runtime.block_on(asked) {
            if reply == Reply::Silent {
                tracing::warn!(
                    node,
                    revision,
                    "a node does not say that it has applied a change of the registry"
                );
            }
        }
    }

    fn is_current(&self) -> bool {
        self.seen.is_current()
    }

    fn usage(&self, keys: &[KeyId]) -> Result<Vec<Used>, RegistryError> {
        self.runtime.block_on(self.usages.read(keys))
    }

    fn add_usage(&self, used: Vec<(KeyId, Used)>) -> (Vec<(KeyId, Used)>, Result<(), RegistryError>) {
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

/// Opens something as soon as NATS is there.
async fn once_there<T, O>(mut open: impl FnMut() -> O) -> Result<T, RegistryError>
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
                tokio::time::sleep(PAUSE).await;
            }
            opened => return Ok(opened?),
        }
    }
}

/// The rows of an update. One that cannot be read is said and stands for the whole: what it changes is not
/// known.
fn parse(update: &Update) -> Result<Vec<(Revision, Row)>, RegistryError> {
    let mut rows = Vec::with_capacity(update.rows.len());
    for row in &update.rows {
        match Row::parse(&row.key, row.value.as_deref()) {
            Ok(Some(parsed)) => rows.push((row.revision, parsed)),
            Ok(None) => tracing::warn!(row = row.key, "the cluster's registry has a row of another kind"),
            Err(detail) => {
                return Err(RegistryError::Cluster(format!(
                    "row {} of the bucket {BUCKET} cannot be read: {detail}",
                    row.key
                )));
            }
        }
    }
    Ok(rows)
}
