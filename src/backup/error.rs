//! Why there is no backup, or why one is not restored.

use std::io;
use std::path::{Path, PathBuf};

use crate::auth::RegistryError;
use crate::consume::subscriber::sessions::SessionStoreError;
use crate::sqlite::SqliteError;

/// Why a backup is not made. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The directory cannot be one of a backup.
    #[error("{}: {why}", dir.display())]
    Place {
        /// The directory.
        dir: PathBuf,
        /// Why.
        why: String,
    },
    /// Another one runs.
    #[error("a backup is being made already; GET /v1/backup says how far it is")]
    Running,
    /// The data is on NATS.
    #[error(
        "this gateway is one of a cluster: its log, registry and sessions are on NATS. Back them up there: `nats stream \
         backup` of the stream with the log and of KV_headgate-registry, KV_headgate-sessions, KV_headgate-once, \
         KV_headgate-usage and KV_headgate-cursors, or `nats account backup`. records.db and retained.db of a gateway are \
         copies, made again from the log"
    )]
    Cluster,
    /// The gateway is shutting down.
    #[error("the gateway is shutting down: ask again when it runs")]
    Cancelled,
    /// There is too little room.
    #[error(
        "{}: the disk has {free} bytes free, and the backup needs {needed}: make room, or use another disk",
        dir.display()
    )]
    NoRoom {
        /// Where it was to be.
        dir: PathBuf,
        /// What is free there, in bytes.
        free: u64,
        /// What it needs, and leaves free, in bytes.
        needed: u64,
    },
    /// A file has a name with which the backup could not be restored.
    #[error(
        "{path:?} has a name that no file of a backup may have: rename it, with letters, digits and .-_ alone"
    )]
    Name {
        /// Relative to the data directory.
        path: String,
    },
    /// The registry could not be copied.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A database could not be read, or the copy not be written.
    #[error("{0}; {remedy}", remedy = .0.remedy())]
    Database(#[from] SqliteError),
    /// The sessions could not be copied.
    #[error(transparent)]
    Sessions(#[from] SessionStoreError),
    /// The operating system reported an error.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The error.
        error: io::Error,
    },
}

impl BackupError {
    /// Whether what was asked for can be done in no way, or not now, so that nothing was begun.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Place { .. } | Self::Running | Self::Cluster)
    }

    /// That the directory cannot be one of a backup.
    pub(super) fn place(dir: &Path, why: impl Into<String>) -> Self {
        Self::Place { dir: dir.to_owned(), why: why.into() }
    }
}

/// Makes an error of the operating system's one of a backup that names the path.
pub(super) trait NamePath<T> {
    fn name_path(self, path: &Path) -> Result<T, BackupError>;
}

impl<T> NamePath<T> for io::Result<T> {
    fn name_path(self, path: &Path) -> Result<T, BackupError> {
        self.map_err(|error| BackupError::Io { path: path.to_owned(), error })
    }
}
