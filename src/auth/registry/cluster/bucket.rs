//! The bucket of a cluster's registry, as the node that changes it sees it.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use headgate_bridge_nats::kv::{KvPut, KvUpdate, KvWatchProgress};
use headgate_bridge_nats::presence::NodeReply;
use headgate_bridge_nats::{KvBucket, KvError, Presence};
use tokio::runtime::Handle;

use super::super::error::RegistryError;
use super::super::replica::{RegistryReplica, RegistryRevision};
use super::super::rows::RegistryRow;
use super::super::usage::KeyUsage;
use super::history::HISTORY_ROW_NAME;
use super::usage::KeyUsageCells;
use crate::limits::{CATCH_UP_MAX, REVOCATION_WAIT_MAX};
use crate::message::KeyId;

/// The KV bucket of the cluster's registry.
pub const REGISTRY_BUCKET: &str = "headgate-registry";
/// Prefix of the subject on which a node announces its presence.
pub const NODE_SUBJECT_PREFIX: &str = "headgate.node";
/// Prefix of the subjects on which a node is asked whether it has settled a revision.
pub const SETTLE_SUBJECT_PREFIX: &str = "headgate.settle";

/// The cluster's registry as seen by the node that changes it.
#[derive(Debug)]
pub(super) struct RegistryCluster {
    pub(super) bucket: KvBucket,
    pub(super) seen: KvWatchProgress,
    pub(super) usages: KeyUsageCells,
    pub(super) presence: OnceLock<Arc<Presence>>,
    pub(super) runtime: Handle,
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

    fn seen(&self) -> RegistryRevision {
        self.seen.revision()
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

/// Parses the rows of an update. An unreadable row fails the whole update, because its effect is unknown.
pub(super) fn parse_update(update: &KvUpdate) -> Result<Vec<(RegistryRevision, RegistryRow)>, RegistryError> {
    let mut rows = Vec::with_capacity(update.rows.len());
    for row in &update.rows {
        match RegistryRow::parse(&row.key, row.value.as_deref()) {
            Ok(Some(parsed)) => rows.push((row.revision, parsed)),
            Ok(None) if row.key == HISTORY_ROW_NAME => {}
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
