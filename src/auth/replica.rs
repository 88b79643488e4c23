//! The seam between a registry and the others of its cluster. A registry by itself has none, and its changes
//! count when they are on its disk; one in a cluster has a [`Replica`], and they count when that has taken
//! them.

use std::fmt;

use super::registry::RegistryError;
use super::rows::Row;
use super::usage::Used;
use crate::message::KeyId;

/// The place of a change among those of all nodes.
pub(super) type Revision = u64;

/// What all nodes of a cluster have in common. Its calls block.
pub(super) trait Replica: fmt::Debug + Send + Sync {
    /// Makes the rows of one change everybody's, all or none, if `after` is still the newest revision.
    /// Returns the newest one then.
    ///
    /// # Errors
    /// [`RegistryError::Overtaken`] if it is not; [`RegistryError::Away`] if that cannot be said now: the
    /// change may then still come, as somebody else's would; [`RegistryError::TooLarge`] and
    /// [`RegistryError::Cluster`] if it can never be.
    fn publish(&self, rows: &[Row], after: Revision) -> Result<Revision, RegistryError>;

    /// Waits until this node has applied whatever any node had published before. Returns the newest
    /// revision.
    ///
    /// # Errors
    /// [`RegistryError::Away`] if that takes too long.
    fn catch_up(&self) -> Result<Revision, RegistryError>;

    /// Waits until every other node has applied a revision, and nothing more can come in there under a key
    /// that died by it. Bounded in time.
    fn everywhere(&self, revision: Revision);

    /// Whether this node has applied whatever any node had published until a moment ago. A few atomic loads.
    fn is_current(&self) -> bool;

    /// What is known of the use of keys, on all nodes.
    ///
    /// # Errors
    /// [`RegistryError::Away`] if that cannot be said now.
    fn usage(&self, keys: &[KeyId]) -> Result<Vec<Used>, RegistryError>;

    /// Adds to it. Returns what could not be added, and the error of one of them.
    fn add_usage(&self, used: Vec<(KeyId, Used)>) -> (Vec<(KeyId, Used)>, Result<(), RegistryError>);
}
