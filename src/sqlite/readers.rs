//! Read-only connections to one SQLite file, kept between queries, while its one writer goes on.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::Mutex;
use rusqlite::{Connection, OpenFlags};

use super::aside::keep_names;
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
    /// [`SqliteError`]: [`SqliteError::Unmade`] until there is a database, and others also for one that Headgate has not made
    /// or a newer one has.
    pub(crate) fn read<T>(
        &self,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, SqliteError> {
        let file = self.file()?;
        let idle = {
            let mut idle = self.idle.lock();
            idle.retain(|(of, _)| *of == file);
            idle.pop()
        };
        let answer =
            idle.map_or_else(|| self.open(), |(_, connection)| Ok(connection)).and_then(|mut connection| {
                let failed = |error: rusqlite::Error| SqliteError::from_sqlite(&error, &self.path);
                let transaction = connection.transaction().map_err(failed)?;
                let answer = read(&transaction).map_err(failed)?;
                drop(transaction);
                Ok((answer, connection))
            });
        // What was set aside in the middle of it is no trouble of the database that follows.
        let (answer, connection) = match answer {
            Err(_) if self.file()? != file => return Err(self.unmade()),
            answer => answer?,
        };
        // A connection whose query failed is closed.
        let mut idle = self.idle.lock();
        if idle.len() < IDLE_READERS_MAX {
            idle.push((file, connection));
        }
        Ok(answer)
    }

    fn open(&self) -> Result<Connection, SqliteError> {
        let _names = keep_names();
        let connection =
            open_read_only(&self.path).map_err(|error| SqliteError::from_sqlite(&error, &self.path))?;
        match self.profile.check_maker(&connection, &self.path)? {
            0 => Err(self.unmade()),
            _ => Ok(connection),
        }
    }

    /// The number of the file at the path; 0 if it cannot be looked at, which fails when it is opened.
    fn file(&self) -> Result<u64, SqliteError> {
        match std::fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(self.unmade()),
            file => Ok(file.map_or(0, |file| file.ino())),
        }
    }

    fn unmade(&self) -> SqliteError {
        SqliteError::Unmade { path: self.path.clone() }
    }
}

pub(super) fn open_read_only(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(READER_LOCK_WAIT_MAX)?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;

    static PROFILE: SqliteProfile =
        SqliteProfile { migrations: &["CREATE TABLE things (name TEXT)"], ..SqliteProfile::SHARED };

    /// Storage sets its database aside and makes another while queries come: each finds all of one, or is told to come
    /// again. Without [`keep_names`] this ended with SIGBUS now and then.
    #[test]
    fn a_database_that_is_being_made_is_never_taken_for_one_that_is_broken() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("things.db");
        let readers = SqliteReaders::new(path.clone(), &PROFILE);
        let names = || {
            readers
                .read(|connection| connection.query_row("SELECT count(*) FROM things", [], |row| row.get(0)))
        };
        let unmade = SqliteError::Unmade { path: path.clone() };
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for _ in 0..100 {
                    drop(PROFILE.open(&path).expect("made"));
                    super::super::set_aside(&path).expect("set aside");
                }
            });
            while !writer.is_finished() {
                match names() {
                    Ok(count) => assert_eq!(count, 0_i64),
                    Err(error) => assert_eq!(error, unmade),
                }
            }
        });
        assert_eq!(names().expect_err("set aside"), unmade);
        std::fs::write(&path, b"").expect("written");
        assert_eq!(names().expect_err("empty"), unmade);
        drop(PROFILE.open(&path).expect("made"));
        assert_eq!(names(), Ok(0));
    }
}
