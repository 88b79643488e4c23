//! A database of subscribers' state: an SQLite file in the data directory, checked when it is opened.
//! [`sessions`](super::sessions) and [`retained`](super::retained) each have one.
//!
//! Both use SQLite's write-ahead log: after a kill at any moment a transaction is there whole or not at
//! all. `user_version` is the version of the format. A newer format is refused, and so is a database that
//! Headgate has not made.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};

/// How long SQLite waits for a lock: another process may be reading the file, or the previous gateway may
/// not have quite ended.
const SUBSCRIBER_LOCK_WAIT_MAX: Duration = Duration::from_secs(2);

/// Why a database of subscribers' state could not be opened, read or written. Each names the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DatabaseError {
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
    #[error("{} is damaged ({detail}): restore it from a backup, or move it away to begin without it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: Arc<str>,
    },
    /// Another process holds it locked.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file system has no room for it.
    #[error("{} cannot grow: the disk is full", path.display())]
    DiskFull {
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

impl DatabaseError {
    /// Classifies an error of SQLite's for the file at `path`.
    pub(in crate::consume) fn from_sqlite(error: &rusqlite::Error, path: &Path) -> Self {
        let (path, detail) = (path.to_owned(), error.to_string().into());
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::InUse { path },
            Some(ErrorCode::DiskFull) => Self::DiskFull { path },
            // No code: the pages are intact and hold something that Headgate never writes.
            None | Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::Damaged { path, detail }
            }
            Some(_) => Self::Failed { path, detail },
        }
    }

    /// Whether the transaction left no trace and the connection can still be used.
    pub(in crate::consume) fn is_clean_rollback(&self) -> bool {
        matches!(self, Self::InUse { .. } | Self::DiskFull { .. })
    }
}

/// One kind of database.
pub(in crate::consume) struct DatabaseKind {
    /// The version of its format, above 0.
    pub(in crate::consume) format: i64,
    /// The statements that turn an empty database into one of this kind.
    pub(in crate::consume) schema: &'static str,
    /// Whether the one connection keeps everybody else out.
    pub(in crate::consume) exclusive: bool,
}

impl DatabaseKind {
    /// Opens the database at `path`, or makes it. Its transactions are synced before they count
    /// until the caller says otherwise.
    ///
    /// # Errors
    /// [`DatabaseError`], when this Headgate cannot or must not write it.
    pub(in crate::consume) fn open(&self, path: &Path) -> Result<Connection, DatabaseError> {
        let failed = |error: rusqlite::Error| DatabaseError::from_sqlite(&error, path);
        let mut connection = self.connect(path).map_err(failed)?;
        let version = read_user_version(&connection).map_err(failed)?;
        if version > self.format {
            return Err(DatabaseError::Newer { path: path.to_owned(), version, known: self.format });
        }
        if version == 0 && !self.create(&mut connection).map_err(failed)? {
            return Err(DatabaseError::Foreign { path: path.to_owned() });
        }
        Ok(connection)
    }

    /// As [`DatabaseKind::open`], after a failed transaction that leaves in doubt what the disk has of the
    /// write-ahead log: a later successful sync says nothing about pages that the kernel gave up on. So
    /// this copies the write-ahead log into the database and syncs it there before anything relies on it.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub(in crate::consume) fn reopen(&self, path: &Path) -> Result<Connection, DatabaseError> {
        let connection = self.open(path)?;
        match checkpoint(&connection) {
            Ok(true) => Ok(connection),
            Ok(false) => Err(DatabaseError::InUse { path: path.to_owned() }),
            Err(error) => Err(DatabaseError::from_sqlite(&error, path)),
        }
    }

    fn connect(&self, path: &Path) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(SUBSCRIBER_LOCK_WAIT_MAX)?;
        if self.exclusive {
            connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        }
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        if self.exclusive {
            // Takes the lock, which is then kept.
            connection.execute_batch("BEGIN EXCLUSIVE; COMMIT")?;
        }
        Ok(connection)
    }

    /// Creates the tables in a database without a version. `false` if it has tables already.
    fn create(&self, connection: &mut Connection) -> rusqlite::Result<bool> {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let empty = "SELECT NOT EXISTS (SELECT 1 FROM sqlite_master)";
        if !transaction.query_row(empty, [], |row| row.get(0))? {
            return Ok(false);
        }
        transaction.execute_batch(self.schema)?;
        transaction.pragma_update(None, "user_version", self.format)?;
        transaction.commit()?;
        Ok(true)
    }
}

fn read_user_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

/// Copies the write-ahead log into the database and syncs it. Returns whether it could: a connection that
/// reads prevents it.
pub(in crate::consume) fn checkpoint(connection: &Connection) -> rusqlite::Result<bool> {
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, bool>(0)).map(|busy| !busy)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: DatabaseKind =
        DatabaseKind { format: 3, schema: "CREATE TABLE things (thing TEXT) STRICT", exclusive: true };

    fn by_hand(path: &Path, sql: &str) {
        Connection::open(path).and_then(|connection| connection.execute_batch(sql)).expect("runs");
    }

    #[test]
    fn a_database_is_made_once_and_found_again() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("things.db");
        let connection = KIND.open(&path).expect("made");
        connection.execute("INSERT INTO things VALUES ('a')", []).expect("written");
        drop(connection);
        let connection = KIND.reopen(&path).expect("found");
        let things: i64 =
            connection.query_row("SELECT count(*) FROM things", [], |row| row.get(0)).expect("read");
        assert_eq!((things, read_user_version(&connection).expect("read")), (1, 3));
    }

    #[test]
    fn a_file_that_a_crash_left_empty_becomes_a_database() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("things.db");
        std::fs::write(&path, b"").expect("written");
        assert_eq!(KIND.open(&path).map(|connection| read_user_version(&connection).expect("read")), Ok(3));
    }

    #[test]
    fn what_is_not_ours_to_write_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let newer = dir.path().join("newer.db");
        drop(KIND.open(&newer).expect("made"));
        by_hand(&newer, "PRAGMA user_version = 4");
        let error = KIND.open(&newer).expect_err("newer");
        assert_eq!(error, DatabaseError::Newer { path: newer.clone(), version: 4, known: 3 });
        assert_eq!(read_user_version(&Connection::open(&newer).expect("opens")), Ok(4));

        let foreign = dir.path().join("foreign.db");
        by_hand(&foreign, "CREATE TABLE mine (x)");
        assert_eq!(KIND.open(&foreign).expect_err("not ours"), DatabaseError::Foreign { path: foreign });

        let other = dir.path().join("other.db");
        let text = "this is no database, and long enough to be seen not to be one".repeat(20);
        std::fs::write(&other, &text).expect("written");
        let error = KIND.open(&other).expect_err("no database");
        assert!(matches!(error, DatabaseError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("other.db"), "{error}");
        assert_eq!(std::fs::read(&other).expect("readable"), text.as_bytes());
    }

    #[test]
    fn an_exclusive_database_has_one_owner() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("things.db");
        let first = KIND.open(&path).expect("made");
        assert_eq!(KIND.open(&path).expect_err("held"), DatabaseError::InUse { path: path.clone() });
        drop(first);
        assert!(KIND.open(&path).is_ok());
    }
}
