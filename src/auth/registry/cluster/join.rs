//! How a node joins a cluster's registry: it opens the bucket, reads all of it, and makes itself known.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use headgate_bridge_nats::kv::KvPut;
use headgate_bridge_nats::{
    KvBucket, KvBucketSettings, KvError, KvWrites, ManagedStream, Nats, NatsError, Presence,
};
use tokio::runtime::Handle;

use super::super::Registry;
use super::super::database::RegistryDatabase;
use super::super::error::RegistryError;
use super::super::replica::RegistryRevision;
use super::super::rows::{REGISTRY_ROWS_FORMAT, RegistryRow, check_rows_format};
use super::bucket::{
    NODE_SUBJECT_PREFIX, REGISTRY_BUCKET, RegistryCluster, SETTLE_SUBJECT_PREFIX, parse_update,
};
use super::follower::{RegistryFollower, RegistryProgress};
use super::usage::{KeyUsageCells, usage_bucket_settings};

/// The pause before another attempt to reach NATS.
const REGISTRY_OPEN_RETRY_PAUSE: Duration = Duration::from_millis(250);

/// The registry of a node that has joined its cluster.
pub struct JoinedRegistry {
    /// The registry, with everything that the cluster's had at this moment.
    pub registry: Arc<Registry>,
    /// The node's presence among the others.
    pub presence: Arc<Presence>,
    /// Keeps the registry up to date. Must run before any message is accepted.
    pub follow: RegistryFollower,
}

impl Registry {
    /// Joins a cluster as the node `id`: opens its bucket, or creates it with `replicas` replicas, and reads
    /// it. Waits while NATS is away.
    ///
    /// # Errors
    /// [`RegistryError::Cluster`] if JetStream cannot create the bucket, or its rows cannot be read.
    pub async fn join(nats: &Nats, replicas: usize, id: &str) -> Result<JoinedRegistry, RegistryError> {
        let settings = registry_bucket_settings(replicas);
        let bucket = open_when_reachable(|| KvBucket::open(nats, &settings)).await?;
        let usages = open_when_reachable(|| async {
            // Treats every error as transient, so that it is tried again.
            KeyUsageCells::open(nats, replicas).await.map_err(|error| KvError::Away(error.to_string()))
        });
        let usages = usages.await?;
        let mut watch = bucket.watch_strictly();
        let first = watch.next().await;
        let rows: Vec<_> = parse_update(&first)?.into_iter().map(|(_, row)| row).collect();
        ensure_rows_format(&bucket, &rows).await?;
        let progress = Arc::new(RegistryProgress::applied(first.revision));
        let cluster = Arc::new(RegistryCluster {
            bucket,
            seen: watch.seen(),
            usages,
            presence: OnceLock::new(),
            runtime: Handle::current(),
        });
        let registry = Arc::new(copy_rows(rows, first.revision, cluster.clone()).await?);
        // Only now announce this node: the others wait for it from here on, and would have had to wait
        // while it was reading.
        let presence = announce(nats, id, &progress).await?;
        let _ = cluster.presence.set(presence.clone());
        tracing::info!(
            node = id,
            datasources = registry.datasources().len(),
            keys = registry.key_count(),
            "joined the cluster's registry"
        );
        let follow = RegistryFollower { registry: registry.clone(), watch, progress };
        Ok(JoinedRegistry { follow, registry, presence })
    }
}

/// What the registry's bucket is to be like.
pub fn registry_bucket_settings(replicas: usize) -> KvBucketSettings {
    KvBucketSettings { name: REGISTRY_BUCKET.to_owned(), replicas, age_max: None, writes: KvWrites::Batched }
}

/// The buckets of the registry, as `replicas` servers are to have them.
pub fn managed_streams(replicas: usize) -> [ManagedStream; 2] {
    [(&registry_bucket_settings(replicas)).into(), (&usage_bucket_settings(replicas)).into()]
}

/// Checks that this version can read the bucket's rows. Writes the format into a bucket that has none.
async fn ensure_rows_format(bucket: &KvBucket, rows: &[RegistryRow]) -> Result<(), RegistryError> {
    let stored = rows.iter().find_map(|row| match row {
        RegistryRow::Format(version) => Some(*version),
        _ => None,
    });
    if let Some(version) = stored {
        return check_rows_format(version);
    }
    let format = RegistryRow::Format(REGISTRY_ROWS_FORMAT);
    let put = KvPut { key: format.name(), value: format.value().map(Bytes::from), expected: Some(0) };
    match bucket.put_all(&[put], None).await {
        // Another node may just have written it. The first change reports any other trouble.
        Ok(_) | Err(KvError::Conflict | KvError::Away(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// This node's copy of the cluster's registry.
async fn copy_rows(
    rows: Vec<RegistryRow>,
    revision: RegistryRevision,
    cluster: Arc<RegistryCluster>,
) -> Result<Registry, RegistryError> {
    let copied = tokio::task::spawn_blocking(move || {
        let mut database = RegistryDatabase::in_memory()?;
        database.take_over(&rows.iter().collect::<Vec<_>>(), revision, true)?;
        Registry::from_database(database, Some(cluster))
    });
    copied.await.map_err(|error| RegistryError::Cluster(error.to_string()))?
}

/// Makes this node known to the others, and answers which revision it has settled.
async fn announce(
    nats: &Nats,
    id: &str,
    progress: &Arc<RegistryProgress>,
) -> Result<Arc<Presence>, RegistryError> {
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
    Ok(presence)
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
