//! What the registry says when an operation fails.

use std::path::PathBuf;

use crate::message::DatasourceId;

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
    /// A newer Headgate wrote the file.
    #[error(
        "registry: {} has format {version} and this Headgate reads up to {known}: start the newer one",
        path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// The file's format.
        version: i64,
        /// The newest format that this version reads.
        known: i64,
    },
    /// The file is not what Headgate wrote.
    #[error(
        "registry: {} is damaged ({detail}): restore it from a backup, or move it away and create \
         datasources and keys again",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// Another process has the file open.
    #[error("registry: {} is in use by another process: is a gateway already running?", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
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
    /// An error of SQLite.
    #[error("registry: {0}")]
    Database(#[from] rusqlite::Error),
    /// An error of the file system.
    #[error("registry: {0}")]
    Io(#[from] std::io::Error),
}
