//! The SQLite files of the data directory: how each is opened, what can go wrong with it, and how it is read
//! while somebody writes it. [`registry.db`](crate::auth), `records.db`, `retained.db`, `sessions.db` and
//! `quarantine.db` each have a [`SqliteProfile`]; what is in them is told where their tables are.
//!
//! All of them use SQLite's write-ahead log: after a kill at any moment a transaction is there whole or not
//! at all. Only the owner of a file may read it (mode 0600). What can be built anew is [set aside](set_aside)
//! when it is damaged. `user_version` is the version of the format. A database of a newer format is left as it is, and so is
//! one that Headgate has not made. Only the registry is needed for a start: without another one the gateway serves, warns
//! of it, and tries again ([`SqliteError::remedy`]).

mod aside;
mod open;
mod readers;
mod snapshot;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::ErrorCode;
use rusqlite::ffi::SQLITE_IOERR_SHMSIZE;

pub(crate) use aside::{new_file_aside, open_or_set_aside, set_aside};
pub(crate) use open::{
    SqliteProfile, check_write_ahead_log, checkpoint, has_write_ahead_log, sync_write_ahead_log,
};
pub(crate) use readers::SqliteReaders;
pub(crate) use snapshot::{SqliteSnapshot, copy_database};

/// Why an SQLite file could not be opened, read or written. Each names the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SqliteError {
    /// A newer Headgate wrote it.
    #[error("{} has format {version} and this Headgate knows formats up to {known}: use a newer one", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// The format it has.
        version: i64,
        /// The newest format that is known here.
        known: i64,
    },
    /// It is not Headgate's database.
    #[error("{} is an SQLite database that Headgate has not made", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// Its content is not what Headgate wrote.
    #[error("{} is damaged ({detail})", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: Arc<str>,
    },
    /// Its writer has not made it yet, or makes it at this moment.
    #[error("{} is not there yet, or is only being made", path.display())]
    Unmade {
        /// The file.
        path: PathBuf,
    },
    /// Another process holds it locked.
    #[error("{} is in use by another process: another gateway, or a program that has it open", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// The file system has no room for it.
    #[error("{} cannot grow: the disk is full", path.display())]
    Full {
        /// The file.
        path: PathBuf,
    },
    /// Another error of SQLite's or the operating system's.
    #[error("{}: {detail}", path.display())]
    Failed {
        /// The file.
        path: PathBuf,
        /// Why.
        detail: Arc<str>,
    },
}

impl SqliteError {
    /// Classifies an error of SQLite's for the file at `path`.
    pub(crate) fn from_sqlite(error: &rusqlite::Error, path: &Path) -> Self {
        let (path, mut detail) = (path.to_owned(), error.to_string());
        if error.sqlite_error().is_some_and(|error| error.extended_code == SQLITE_IOERR_SHMSIZE) {
            detail.push_str(": there may be no room for the index of its write-ahead log");
        }
        let detail = detail.into();
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Busy { path },
            Some(ErrorCode::DiskFull) => Self::Full { path },
            // No code: the pages are intact and hold something that Headgate never writes.
            None | Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::Damaged { path, detail }
            }
            Some(_) => Self::Failed { path, detail },
        }
    }

    /// For an error of the operating system's.
    pub(crate) fn failed(path: &Path, detail: impl Into<Arc<str>>) -> Self {
        Self::Failed { path: path.to_owned(), detail: detail.into() }
    }

    /// What an operator does about a database without which the gateway serves, to complete a sentence. It is tried
    /// again all the time, so that nothing has to be restarted.
    pub(crate) fn remedy(&self) -> &'static str {
        match self {
            Self::Newer { .. } => "it is left as it is; or move it away, and another one is made",
            Self::Foreign { .. } => {
                "it is left as it is: move it away, and another one is made; or use another data directory"
            }
            Self::Damaged { .. } => "restore it from a backup, or move it away, and another one is made",
            Self::Unmade { .. } => "it is tried again",
            Self::Busy { .. } => "end the other process; it is tried again",
            Self::Full { .. } => "make room; it is tried again",
            Self::Failed { .. } => "put that right; it is tried again",
        }
    }

    /// Whether the file itself is the trouble, so that no later attempt can do better.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. })
    }

    /// Whether the transaction left no trace and the connection can still be used.
    pub(crate) fn is_clean_rollback(&self) -> bool {
        matches!(self, Self::Busy { .. } | Self::Full { .. })
    }
}
