//! What to tell an operator when a start fails: beside what happened, how to go on, and what that costs.

use std::io;
use std::path::Path;

use super::directory::LOG_DIRECTORY;
use crate::auth::RegistryError;
use crate::log::LogOpenError;
use crate::sqlite::SqliteError;

/// How to go on after an error of the operating system's in the data directory.
pub(super) fn advise_on_io(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            "Mount the file system for writing, or use another data directory (--data-dir)"
        }
        io::ErrorKind::PermissionDenied => {
            "Run the gateway as the owner of the data directory, or give it to the user that runs it (chown -R)"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "Make room, and start again",
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists | io::ErrorKind::IsADirectory => {
            "Move what is in its place away, or use another data directory (--data-dir)"
        }
        _ => match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => {
                "Raise the limit on open files (LimitNOFILE=, ulimit -n) to 256 at least, and start again"
            }
            Some(libc::EIO) => {
                "Look at the disk (dmesg), and restore the directory from a backup if it is lost"
            }
            _ => "Put that right, and start again",
        },
    }
}

/// An error of the operating system's for a path, with how to go on.
pub(super) fn explain_io_error(what: &str, path: &Path, error: &io::Error) -> anyhow::Error {
    anyhow::anyhow!("{what} {}: {error}. {}", path.display(), advise_on_io(error))
}

/// Adds to the reason why the log cannot be opened how to go on, if it does not say that itself.
pub(super) fn explain_log_error(dir: &Path, error: LogOpenError) -> anyhow::Error {
    match error {
        LogOpenError::Io(error) => {
            let path = dir.join(LOG_DIRECTORY);
            match std::fs::read_link(&path) {
                Ok(target) if !path.exists() => anyhow::anyhow!(
                    "{} is a link to {}, which is not there: mount or make that, and start again",
                    path.display(),
                    target.display()
                ),
                _ => explain_io_error("cannot open the log in", &path, &error),
            }
        }
        error => error.into(),
    }
}

/// Adds to the reason why the registry cannot be opened how to go on: without it no key is known, so that it is the one
/// store without which nothing is served.
pub(super) fn explain_registry_error(dir: &Path, error: RegistryError) -> anyhow::Error {
    let dir = dir.display();
    let go_on = match &error {
        RegistryError::Database(SqliteError::Newer { .. }) => {
            "It is left as it is: without its keys nothing can be served".to_owned()
        }
        RegistryError::Database(SqliteError::Foreign { .. } | SqliteError::Damaged { .. }) => format!(
            "Put registry.db back from a backup; or begin anew on purpose (headgate repair --data-dir {dir} \
             --new-registry --yes, which sets it aside): then every datasource has to be created again, and every \
             device needs another key"
        ),
        RegistryError::Database(SqliteError::Busy { .. }) => {
            format!("End that process (fuser {dir}/registry.db names it), and start again")
        }
        RegistryError::Database(SqliteError::Full { .. }) => format!(
            "Make room, and start again; {dir}/registry.reserve may be removed for that, it is made again by itself"
        ),
        RegistryError::Io(error) => advise_on_io(error).to_owned(),
        _ => "Put that right, and start again".to_owned(),
    };
    anyhow::anyhow!("{error}. {go_on}")
}
