//! The interface between a registry and its cluster. Without a cluster there is none, and a change takes
//! effect when it is on the disk. In a cluster it takes effect when the [`RegistryReplica`] has accepted it.

use std::fmt;

use super::error::RegistryError;
use super::rows::RegistryRow;
use super::usage::KeyUsage;
use crate::message::KeyId;

/// The position of a change in the order of all nodes' changes.
pub(super) type RegistryRevision = u64;

/// The registry that all nodes of a cluster share. Its calls block.
pub(super) trait RegistryReplica: fmt::Debug + Send + Sync {
    /// Publishes the rows of one change to all nodes, all or none, if `after` is still the newest revision.
    /// Returns the new revision.
    ///
    /// # Errors
    /// [`RegistryError::Overtaken`] if it is not; [`RegistryError::Away`] if the outcome is unknown: the
    /// change may still arrive, like one of another node; [`RegistryError::TooLarge`] and
    /// [`RegistryError::Cluster`] if it can never succeed.
    fn publish(
        &self,
        rows: &[RegistryRow],
        after: RegistryRevision,
    ) -> Result<RegistryRevision, RegistryError>;

    /// The newest revision of which this node has all up to it, applied or about to be.
    fn seen(&self) -> RegistryRevision;

    /// Waits until this node has applied everything that any node had published before the call. Returns the
    /// newest revision.
    ///
    /// # Errors
    /// [`RegistryError::Away`] if that takes too long.
    fn catch_up(&self) -> Result<RegistryRevision, RegistryError>;

    /// Waits until every other node has applied a revision, and can accept nothing more under a key that died
    /// by it. Bounded in time.
    fn wait_everywhere(&self, revision: RegistryRevision);

    /// Whether this node has applied everything published until a moment ago. A few atomic loads.
    fn is_current(&self) -> bool;

    /// The usage of keys on all nodes.
    ///
    /// # Errors
    /// [`RegistryError::Away`] if it cannot be read now.
    fn usage(&self, keys: &[KeyId]) -> Result<Vec<KeyUsage>, RegistryError>;

    /// Adds to the usage of keys. Returns what could not be added, and the error of one failure.
    fn add_usage(&self, used: Vec<(KeyId, KeyUsage)>) -> (Vec<(KeyId, KeyUsage)>, Result<(), RegistryError>);
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use parking_lot::Mutex;

    use super::*;

    /// A cluster of one node, which notes the rows of each batch, and may be without NATS.
    #[derive(Debug, Default)]
    pub(in super::super) struct ClusterOfOne {
        pub(in super::super) batches: Mutex<Vec<Vec<String>>>,
        /// All of them, each with its revision.
        pub(in super::super) rows: Mutex<Vec<(RegistryRevision, RegistryRow)>>,
        pub(in super::super) is_away: AtomicBool,
        /// How many more batches arrive before NATS is away.
        pub(in super::super) batches_left: Mutex<Option<usize>>,
    }

    impl RegistryReplica for ClusterOfOne {
        fn publish(
            &self,
            rows: &[RegistryRow],
            after: RegistryRevision,
        ) -> Result<RegistryRevision, RegistryError> {
            let mut left = self.batches_left.lock();
            if self.is_away.load(Ordering::Relaxed) || *left == Some(0) {
                return Err(RegistryError::Away("NATS is away".to_owned()));
            }
            *left = left.map(|left| left - 1);
            self.batches.lock().push(rows.iter().map(RegistryRow::name).collect());
            self.rows.lock().extend((after + 1..).zip(rows.iter().cloned()));
            Ok(after + rows.len() as u64)
        }

        fn seen(&self) -> RegistryRevision {
            0
        }

        fn catch_up(&self) -> Result<RegistryRevision, RegistryError> {
            Ok(0)
        }

        fn wait_everywhere(&self, _revision: RegistryRevision) {}

        fn is_current(&self) -> bool {
            true
        }

        fn usage(&self, _keys: &[KeyId]) -> Result<Vec<KeyUsage>, RegistryError> {
            Ok(Vec::new())
        }

        fn add_usage(
            &self,
            _: Vec<(KeyId, KeyUsage)>,
        ) -> (Vec<(KeyId, KeyUsage)>, Result<(), RegistryError>) {
            (Vec::new(), Ok(()))
        }
    }
}
