//! What the registry says when an operation fails.

use std::path::Path;
use std::sync::Arc;

use super::key::Key;
use crate::auth::grant::GrantDenial;
use crate::message::{DatasourceId, KeyId};
use crate::sqlite::SqliteError;

/// The file's name in the data directory.
pub const REGISTRY_FILE_NAME: &str = "registry.db";

/// Why an operation of the registry failed. Nothing has then changed, unless it says so.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A datasource with that id exists already.
    #[error("there is a datasource {0} already")]
    Exists(DatasourceId),
    /// A key that was to be imported is known already.
    #[error(
        "key {key} of datasource {datasource} is known here already, alive or dead: a key belongs to one datasource of one \
         gateway, and one that was revoked stays so. Leave it out, and create another one"
    )]
    KeyExists {
        /// The key.
        key: KeyId,
        /// The datasource that was to have it.
        datasource: DatasourceId,
    },
    /// The key that the change is made with has ended before it could be made.
    #[error("{0}")]
    Denied(#[from] GrantDenial),
    /// No such datasource exists.
    #[error("there is no datasource {0:?}")]
    NoDatasource(String),
    /// The key's state does not allow this rotation, or its undoing.
    #[error("{0}")]
    Rotation(String),
    /// No new key could be made, and the old one, which was to end at once, has ended all the same. The caller waits
    /// for its connections.
    #[error(
        "no new key could be made ({why}). Key {} is dead all the same, because no grace was asked for: create another \
         one once that is over",
        dead.id
    )]
    NotReplaced {
        /// The old key.
        dead: Arc<Key>,
        /// Why there is no new one.
        why: String,
    },
    /// The key is the last one that can manage all datasources.
    #[error("this is the last admin key for all datasources; create another one first")]
    LastAdmin,
    /// The id, name, label or set of scopes cannot be used.
    #[error("{0}")]
    InvalidName(String),
    /// The name of a datasource without an id gives no id.
    #[error("{0}")]
    NoSlug(&'static str),
    /// Changes of other cluster nodes came first at every attempt. Transient: try again.
    #[error("registry: other nodes of the cluster are changing it at this moment")]
    Overtaken,
    /// The cluster's registry cannot be reached: NATS is away. The change may still have been made, if the
    /// connection was lost in the middle of it.
    #[error("registry: it cannot be changed while NATS is away ({0})")]
    Away(String),
    /// The change does not fit in a NATS message, which is how other nodes receive it.
    #[error("it is too large for the cluster's registry: {0}")]
    TooLarge(String),
    /// The cluster's registry cannot be used as it is.
    #[error("registry: {0}")]
    Cluster(String),
    /// The database could not be opened, read or written.
    #[error("registry: {0}")]
    Database(#[from] SqliteError),
    /// Rules of an earlier version could not be read; why, in words.
    #[error("there are rules about leaked keys that could not be read yet: {0}")]
    UnreadRules(String),
    /// An error of the file system.
    #[error("registry: {0}")]
    Io(#[from] std::io::Error),
}

impl RegistryError {
    /// Whether more room on the disk may help. A quota of the file system shows as a failed write.
    pub(super) fn may_lack_room(&self) -> bool {
        matches!(self, Self::Database(SqliteError::Full { .. } | SqliteError::Failed { .. }))
    }
}

impl From<rusqlite::Error> for RegistryError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(SqliteError::from_sqlite(&error, Path::new(REGISTRY_FILE_NAME)))
    }
}
