//! The usage of keys on all nodes of a cluster: a KV bucket with a cell for each key, to which every node
//! adds its own share. It is not the registry's bucket, and nobody watches it: usage is written every few
//! seconds and read on request.

use std::sync::OnceLock;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use headgate_bridge_nats::{KvBucket, KvBucketSettings, KvError, KvWrites, Nats};

use super::super::error::RegistryError;
use super::super::usage::KeyUsage;
use crate::limits::{CHANGE_ATTEMPTS_MAX, USAGE_READS_MAX};
use crate::message::KeyId;

/// The KV bucket of the usage of keys.
pub const USAGE_BUCKET: &str = "headgate-usage";

/// What the bucket is to be like.
pub(super) fn usage_bucket_settings(replicas: usize) -> KvBucketSettings {
    KvBucketSettings { name: USAGE_BUCKET.to_owned(), replicas, age_max: None, writes: KvWrites::Single }
}

/// The usage cells of all keys.
#[derive(Debug, Clone)]
pub(super) struct KeyUsageCells(KvBucket);

impl KeyUsageCells {
    /// Opens the bucket, or creates it with `replicas` replicas.
    pub(super) async fn open(nats: &Nats, replicas: usize) -> Result<Self, KvError> {
        KvBucket::open(nats, &usage_bucket_settings(replicas)).await.map(Self)
    }

    /// Reads the usage of these keys.
    ///
    /// # Errors
    /// [`RegistryError::Away`] if a cell cannot be read.
    pub(super) async fn read(&self, keys: &[KeyId]) -> Result<Vec<KeyUsage>, RegistryError> {
        let read = keys.iter().map(|key| self.read_one(*key));
        let read = stream::iter(read).buffered(USAGE_READS_MAX).map_ok(|(used, _)| used);
        read.try_collect().await.map_err(|error: KvError| RegistryError::Away(error.to_string()))
    }

    /// Adds usage to the cells. Returns what could not be added, and why. After the first failure nothing
    /// more is tried, because each attempt could wait for its timeout.
    pub(super) async fn add(&self, used: Vec<(KeyId, KeyUsage)>) -> Vec<(KeyId, KeyUsage, KvError)> {
        let failure = OnceLock::new();
        let failure = &failure;
        let adding = used.into_iter().map(|(key, used)| async move {
            if let Some(failed) = failure.get() {
                return Some((key, used, KvError::clone(failed)));
            }
            let failed = self.add_one(key, &used).await.err()?;
            Some((key, used, failure.get_or_init(|| failed).clone()))
        });
        let failed = stream::iter(adding).buffer_unordered(USAGE_READS_MAX);
        failed.filter_map(std::future::ready).collect().await
    }

    async fn read_one(&self, key: KeyId) -> Result<(KeyUsage, u64), KvError> {
        let cell = self.0.get(&key.to_string()).await?;
        let used = cell.value.as_deref().map(serde_json::from_slice).transpose();
        let used = used.unwrap_or_else(|error| {
            tracing::warn!(key_id = %key, %error, "the stored usage of a key cannot be read: it starts at zero");
            None
        });
        Ok((used.unwrap_or_default(), cell.revision))
    }

    async fn add_one(&self, key: KeyId, later: &KeyUsage) -> Result<(), KvError> {
        let mut attempts = 0;
        loop {
            let (mut used, revision) = self.read_one(key).await?;
            used.add(later.clone());
            let value = serde_json::to_vec(&used).expect("texts and numbers are JSON");
            match self.0.put(&key.to_string(), Bytes::from(value), Some(revision), None).await {
                Err(KvError::Conflict) if attempts < CHANGE_ATTEMPTS_MAX => attempts += 1,
                written => return written.map(drop),
            }
        }
    }
}
