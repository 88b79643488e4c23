//! Read-only connections to one SQLite file, kept between queries, while its one writer goes on.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::Mutex;
use rusqlite::{Connection, OpenFlags};

use super::{SqliteError, SqliteProfile};
use crate::limits::IDLE_READERS_MAX;

/// How long a reader waits while another process has the whole database locked.
const READER_LOCK_WAIT_MAX: Duration = Duration::from_secs(2);

/// Reads the file at a path. Blocks, so use it where blocking is allowed.
pub(crate) struct SqliteReaders {
    path: PathBuf,
    profile: &'static SqliteProfile,
    /// Connections that nobody uses at the moment, each with the number of its file (inode): the file at the
    /// path is another one once the first was set aside.
    idle: Mutex<Vec<(u64, Connection)>>,
}

impl SqliteReaders {
    /// Readers of the database at `path`. None is open yet.
    pub(crate) fn new(path: PathBuf, profile: &'static SqliteProfile) -> Self {
        Self { path, profile, idle: Mutex::default() }
    }

    /// Runs `read` on a snapshot of the database, whatever is written meanwhile.
    ///
    /// # Errors
    /// [`SqliteError`], also for a file that is not there, and for one that Headgate has not made or a newer one has.
    pub(crate) fn read<T>(
        &self,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, SqliteError> {
        let failed = |error: rusqlite::Error| SqliteError::from_sqlite(&error, &self.path);
        // A file that is not there fails when it is opened.
        let file = std::fs::metadata(&self.path).map_or(0, |file| file.ino());
        let idle = {
            let mut idle = self.idle.lock();
            idle.retain(|(of, _)| *of == file);
            idle.pop()
        };
        let mut connection = match idle {
            Some((_, connection)) => connection,
            None => {
                let connection = open_read_only(&self.path).map_err(failed)?;
                self.profile.check_maker(&connection, &self.path)?;
                connection
            }
        };
        let answer = {
            let transaction = connection.transaction().map_err(failed)?;
            read(&transaction).map_err(failed)?
        };
        // A connection whose query failed is closed.
        let mut idle = self.idle.lock();
        if idle.len() < IDLE_READERS_MAX {
            idle.push((file, connection));
        }
        Ok(answer)
    }
}

pub(super) fn open_read_only(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(READER_LOCK_WAIT_MAX)?;
    Ok(connection)
}
