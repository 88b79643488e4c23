//! What the registry says when an operation fails.

use std::path::Path;

use crate::message::DatasourceId;
use crate::sqlite::SqliteError;

/// The file's name in the data directory.
pub(super) const REGISTRY_FILE_NAME: &str = "registry.db";

/// Why an operation of the registry failed. Nothing has then changed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A datasource with that id exists already.
    #[error("there is a datasource {0} already")]
    Exists(DatasourceId),
    /// No such datasource exists.
    #[error("there is no datasource {0:?}")]
    NoDatasource(String),
    /// The key's state does not allow this rotation, or its undoing.
    #[error("{0}")]
    Rotation(String),
    /// The key is the last one that can manage all datasources.
    #[error("this is the last admin key for all datasources; create another one first")]
    LastAdmin,
    /// The id, name, label or set of scopes cannot be used.
    #[error("{0}")]
    InvalidName(String),
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
    /// An error of the file system.
    #[error("registry: {0}")]
    Io(#[from] std::io::Error),
}

impl From<rusqlite::Error> for RegistryError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(SqliteError::from_sqlite(&error, Path::new(REGISTRY_FILE_NAME)))
    }
}
