//! Opening an SQLite file: its mode (its owner alone reads it), its locks and settings, its version, its pages.

use std::ffi::CString;
use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use super::SqliteError;
use super::aside::{finish_set_aside, with_suffix};

/// What one of the databases is, and how its only writer opens it.
pub(crate) struct SqliteProfile {
    /// One step from each version of the format to the next; the first starts from an empty database. Their
    /// number is the newest version.
    pub(crate) migrations: &'static [&'static str],
    /// Whether the one connection keeps everybody else out as long as it is open.
    pub(crate) is_exclusive: bool,
    /// Whether all pages are checked when it is opened.
    pub(crate) is_checked: bool,
    /// How long the opening waits for a lock: another process may be reading the file, or the previous
    /// gateway may not have quite ended.
    pub(crate) open_lock_wait_max: Duration,
    /// How long each later transaction waits for it.
    pub(crate) lock_wait_max: Duration,
    /// Whether a new database is made so that its free pages can be given back to the file system in steps. An older
    /// one stays as it is.
    pub(crate) gives_pages_back: bool,
    /// Other pragmas with their values.
    pub(crate) pragmas: &'static [(&'static str, i64)],
}

impl SqliteProfile {
    /// A database without tables, that other processes may open meanwhile: what most profiles begin with.
    pub(crate) const SHARED: Self = Self {
        migrations: &[],
        is_exclusive: false,
        is_checked: false,
        open_lock_wait_max: Duration::from_secs(2),
        lock_wait_max: Duration::from_secs(2),
        gives_pages_back: false,
        pragmas: &[],
    };

    /// The newest version of the format.
    pub(crate) const fn newest_version(&self) -> i64 {
        self.migrations.len() as i64
    }

    /// Opens the database at `path`, or makes it, and brings it to the newest version. Its transactions are
    /// synced before they count until the caller says otherwise.
    ///
    /// # Errors
    /// [`SqliteError`], when this Headgate cannot or must not write it.
    pub(crate) fn open(&self, path: &Path) -> Result<Connection, SqliteError> {
        finish_set_aside(path)?;
        self.open_checked(path, self.is_checked)
    }

    /// As [`SqliteProfile::open`], after a failed transaction that leaves in doubt what the disk has of the
    /// write-ahead log: a later successful sync says nothing about pages that the kernel gave up on. So
    /// this copies the write-ahead log into the database and syncs it there before anything relies on it.
    ///
    /// # Errors
    /// [`SqliteError`].
    pub(crate) fn reopen(&self, path: &Path) -> Result<Connection, SqliteError> {
        let connection = self.open_checked(path, false)?;
        match checkpoint(&connection) {
            Ok(true) => Ok(connection),
            Ok(false) => Err(SqliteError::Busy { path: path.to_owned() }),
            Err(error) => Err(SqliteError::from_sqlite(&error, path)),
        }
    }

    /// A database of this kind that is in memory only.
    ///
    /// # Errors
    /// SQLite's.
    pub(crate) fn open_in_memory(&self) -> rusqlite::Result<Connection> {
        let mut connection = Connection::open_in_memory()?;
        self.migrate(&mut connection)?;
        Ok(connection)
    }

    fn open_checked(&self, path: &Path, checks_pages: bool) -> Result<Connection, SqliteError> {
        check_write_ahead_log(path)?;
        create_private(path).map_err(|error| SqliteError::failed(path, error.to_string()))?;
        let failed = |error: rusqlite::Error| SqliteError::from_sqlite(&error, path);
        let mut connection = self.connect(path).map_err(failed)?;
        self.check_maker(&connection, path)?;
        self.prepare_writing(&connection).map_err(failed)?;
        if checks_pages {
            let pages: String =
                connection.pragma_query_value(None, "quick_check", |row| row.get(0)).map_err(failed)?;
            if pages != "ok" {
                return Err(SqliteError::Damaged { path: path.to_owned(), detail: pages.into() });
            }
        }
        let version = read_user_version(&connection).map_err(failed)?;
        if version < self.newest_version() && !self.migrate(&mut connection).map_err(failed)? {
            return Err(SqliteError::Foreign { path: path.to_owned() });
        }
        connection.busy_timeout(self.lock_wait_max).map_err(failed)?;
        Ok(connection)
    }

    /// Opens the file and changes nothing in it, also when it is closed again.
    fn connect(&self, path: &Path) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        connection.busy_timeout(self.open_lock_wait_max)?;
        if self.is_exclusive {
            connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        }
        Ok(connection)
    }

    /// Ensures that the database is empty, or that a Headgate no newer than this one has made it. Any other is left
    /// as it is. Returns the version of its format, 0 of one without tables.
    pub(super) fn check_maker(&self, connection: &Connection, path: &Path) -> Result<i64, SqliteError> {
        let failed = |error: rusqlite::Error| SqliteError::from_sqlite(&error, path);
        // The tables first: its writer may be making them, and commits them together with the version.
        let is_empty = is_without_tables(connection).map_err(failed)?;
        let (version, known) = (read_user_version(connection).map_err(failed)?, self.newest_version());
        if version > known {
            return Err(SqliteError::Newer { path: path.to_owned(), version, known });
        }
        if version <= 0 && !is_empty {
            return Err(SqliteError::Foreign { path: path.to_owned() });
        }
        Ok(version.max(0))
    }

    fn prepare_writing(&self, connection: &Connection) -> rusqlite::Result<()> {
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
        if self.gives_pages_back {
            // It counts before the first page is written, and changes nothing later.
            connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
        }
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        for (pragma, value) in self.pragmas {
            connection.pragma_update(None, pragma, value)?;
        }
        if self.is_exclusive {
            // Takes the lock, which is then kept.
            connection.execute_batch("BEGIN EXCLUSIVE; COMMIT")?;
        }
        Ok(())
    }

    /// Brings a database of an older version, or an empty one, to the newest. `false` if it is none of ours:
    /// it has tables and no version.
    fn migrate(&self, connection: &mut Connection) -> rusqlite::Result<bool> {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // Read again under the lock: another process may just have done it.
        let version = read_user_version(&transaction)?;
        if version == 0 && !is_without_tables(&transaction)? {
            return Ok(false);
        }
        let done = usize::try_from(version).unwrap_or(usize::MAX);
        let Some(steps) = self.migrations.get(done..) else { return Ok(false) };
        for step in steps {
            transaction.execute_batch(step)?;
        }
        transaction.pragma_update(None, "user_version", self.newest_version())?;
        transaction.commit()?;
        Ok(true)
    }
}

/// Ensures that a database is there if its write-ahead log is: SQLite deletes the log of an empty one, and with it
/// what may be all that is left of the transactions.
///
/// # Errors
/// [`SqliteError::Damaged`].
pub(crate) fn check_write_ahead_log(path: &Path) -> Result<(), SqliteError> {
    let bytes = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
    let wal = with_suffix(path, "-wal");
    if bytes(path) > 0 || bytes(&wal) == 0 {
        return Ok(());
    }
    let detail = format!("it is missing or empty, and its write-ahead log {} is not", wal.display()).into();
    Err(SqliteError::Damaged { path: path.to_owned(), detail })
}

/// Whether there is a write-ahead log with anything in it beside the database at `path`. One that was closed in order has
/// none.
pub(crate) fn has_write_ahead_log(path: &Path) -> bool {
    std::fs::metadata(with_suffix(path, "-wal")).is_ok_and(|file| file.len() > 0)
}

/// Has the disk write what the kernel has of the write-ahead log beside the database at `path`, if there is one. Where this
/// succeeds, and no sync of it has failed before, all that can be read of it is there.
///
/// # Errors
/// The operating system's.
pub(crate) fn sync_write_ahead_log(path: &Path) -> io::Result<()> {
    match File::open(with_suffix(path, "-wal")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        wal => wal?.sync_data(),
    }
}

/// Creates an empty file if there is none, so that others can never read it, not even for a moment.
/// SQLite gives its WAL files the same mode.
pub(super) fn create_private(path: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        // The directory entry has to be durable as well as the contents.
        Ok(_) => File::open(path.parent().unwrap_or(path))?.sync_all(),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => check_own_file(path),
        Err(error) => Err(error),
    }
}

/// Ensures that a database and what SQLite keeps beside it are files that this process may write, and nobody else
/// may read. SQLite does not say which of them it could not open, and why.
fn check_own_file(path: &Path) -> io::Result<()> {
    let file = std::fs::metadata(path).map_err(|error| match std::fs::read_link(path) {
        Ok(target) => io::Error::new(error.kind(), format!("it is a link to {}: {error}", target.display())),
        Err(_) => error,
    })?;
    check_is_file(&file)?;
    if file.permissions().mode() & 0o7777 != 0o600 {
        // Whoever may write it need not be its owner, for example of a volume in a container. The start warns of that.
        let _ = std::fs::set_permissions(path, Permissions::from_mode(0o600));
    }
    check_access(path)?;
    for beside in ["-wal", "-shm"].map(|suffix| with_suffix(path, suffix)) {
        let Ok(file) = std::fs::metadata(&beside) else { continue };
        check_is_file(&file)
            .and_then(|()| check_access(&beside))
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", beside.display())))?;
    }
    Ok(())
}

fn check_is_file(file: &Metadata) -> io::Result<()> {
    if file.is_file() {
        return Ok(());
    }
    let kind = if file.is_dir() { "a directory" } else { "a device, socket or pipe" };
    Err(io::Error::other(format!("it is {kind} and no file: move it away")))
}

/// Asks whether this process may read and write a file. It is not opened for that: to close it again would take away
/// the locks that SQLite has on it in this process.
fn check_access(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    // SAFETY: the pointer is to a string with a NUL at its end that outlives the call.
    match unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::R_OK | libc::W_OK, libc::AT_EACCESS) }
    {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_without_tables(connection: &Connection) -> rusqlite::Result<bool> {
    connection.query_row("SELECT NOT EXISTS (SELECT 1 FROM sqlite_master)", [], |row| row.get(0))
}

fn read_user_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

/// Copies the write-ahead log into the database and syncs it. Returns whether it could: a connection that
/// reads prevents it.
///
/// # Errors
/// SQLite's.
pub(crate) fn checkpoint(connection: &Connection) -> rusqlite::Result<bool> {
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, bool>(0)).map(|busy| !busy)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: SqliteProfile = SqliteProfile {
        migrations: &[
            "CREATE TABLE things (thing TEXT) STRICT",
            "CREATE TABLE places (place TEXT) STRICT",
            "DROP TABLE places",
        ],
        is_exclusive: true,
        ..SqliteProfile::SHARED
    };

    /// Storage and retained messages woke each other at each page, and were served before those whom it concerned.
    #[test]
    fn no_database_counts_its_memory_under_a_lock_that_all_share() {
        let connection = Connection::open_in_memory().expect("opens");
        let is_built_with = |option: &str| {
            let used = "SELECT sqlite_compileoption_used(?1)";
            connection.query_row(used, [option], |row| row.get::<_, bool>(0)).expect("answers")
        };
        for option in ["DEFAULT_MEMSTATUS=0", "DISABLE_PAGECACHE_OVERFLOW_STATS"] {
            assert!(
                is_built_with(option),
                "{option}: see .cargo/config.toml (cargo clean -p libsqlite3-sys, if it was built before)"
            );
        }
        assert!(!is_built_with("ENABLE_MEMORY_MANAGEMENT"), "all databases would have one cache of pages");
    }

    fn by_hand(path: &Path, sql: &str) {
        Connection::open(path).and_then(|connection| connection.execute_batch(sql)).expect("runs");
    }

    #[test]
    fn a_database_is_made_once_and_found_again() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("things.db");
        let connection = PROFILE.open(&path).expect("made");
        connection.execute("INSERT INTO things VALUES ('a')", []).expect("written");
        drop(connection);
        let connection = PROFILE.reopen(&path).expect("found");
        let things: i64 =
            connection.query_row("SELECT count(*) FROM things", [], |row| row.get(0)).expect("read");
        assert_eq!((things, read_user_version(&connection).expect("read")), (1, 3));
    }

    #[test]
    fn a_file_that_a_crash_left_empty_becomes_a_database() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("things.db");
        std::fs::write(&path, b"").expect("written");
        assert_eq!(
            PROFILE.open(&path).map(|connection| read_user_version(&connection).expect("read")),
            Ok(3)
        );
    }

    #[test]
    fn what_is_not_ours_to_write_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let newer = dir.path().join("newer.db");
        drop(PROFILE.open(&newer).expect("made"));
        by_hand(&newer, "PRAGMA user_version = 4");
        let error = PROFILE.open(&newer).expect_err("newer");
        assert_eq!(error, SqliteError::Newer { path: newer.clone(), version: 4, known: 3 });
        assert_eq!(read_user_version(&Connection::open(&newer).expect("opens")), Ok(4));

        let foreign = dir.path().join("foreign.db");
        by_hand(&foreign, "CREATE TABLE mine (x)");
        assert_eq!(PROFILE.open(&foreign).expect_err("not ours"), SqliteError::Foreign { path: foreign });

        let other = dir.path().join("other.db");
        let text = "this is no database, and long enough to be seen not to be one".repeat(20);
        std::fs::write(&other, &text).expect("written");
        let error = PROFILE.open(&other).expect_err("no database");
        assert!(matches!(error, SqliteError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("other.db"), "{error}");
        assert_eq!(std::fs::read(&other).expect("readable"), text.as_bytes());
    }

    #[test]
    fn what_is_not_ours_is_not_touched_by_the_attempt() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("foreign.db");
        by_hand(&path, "PRAGMA journal_mode = DELETE; CREATE TABLE mine (x)");
        let before = std::fs::read(&path).expect("readable");
        PROFILE.open(&path).expect_err("not ours");
        assert!(std::fs::read(&path).expect("readable") == before);

        // A newer one that a kill has left with a write-ahead log.
        let (path, left) = (dir.path().join("newer.db"), dir.path().join("left.db"));
        drop(PROFILE.open(&path).expect("made"));
        let open = Connection::open(&path).expect("opens");
        open.execute_batch("PRAGMA user_version = 9; CREATE TABLE newer (x)").expect("runs");
        for suffix in ["", "-wal"] {
            std::fs::copy(with_suffix(&path, suffix), with_suffix(&left, suffix)).expect("copied");
        }
        let files =
            || ["", "-wal"].map(|suffix| std::fs::read(with_suffix(&left, suffix)).expect("readable"));
        let before = files();
        let error = PROFILE.open(&left).expect_err("newer");
        assert!(matches!(error, SqliteError::Newer { version: 9, .. }), "{error}");
        assert!(files() == before);
    }

    #[test]
    fn the_write_ahead_log_of_a_database_that_is_gone_or_empty_is_kept() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("things.db");
        for is_empty in [true, false] {
            if is_empty {
                std::fs::write(&path, b"").expect("written");
            } else {
                std::fs::remove_file(&path).expect("removed");
            }
            std::fs::write(with_suffix(&path, "-wal"), [7; 5000]).expect("written");
            let error = PROFILE.open(&path).expect_err("its transactions may be there alone");
            assert!(matches!(error, SqliteError::Damaged { .. }), "{error}");
            assert!(error.to_string().contains("things.db-wal"), "{error}");
            assert_eq!(std::fs::read(with_suffix(&path, "-wal")).expect("there"), [7; 5000]);
        }
    }

    #[test]
    fn what_is_no_file_is_named_and_left_alone() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("things.db");
        let said = || PROFILE.open(&path).expect_err("no file").to_string();
        std::fs::create_dir(&path).expect("made");
        std::fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("set");
        assert!(said().contains("things.db: it is a directory"), "{}", said());
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o755);
        std::fs::remove_dir(&path).expect("removed");
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &path).expect("made");
        assert!(said().contains("it is a link to") && said().contains("elsewhere"), "{}", said());
        drop(PROFILE.open(&dir.path().join("elsewhere")).expect("made"));
        PROFILE.open(&path).expect("a link to a database is one");
    }

    #[test]
    fn an_exclusive_database_has_one_owner() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("things.db");
        let first = PROFILE.open(&path).expect("made");
        assert_eq!(PROFILE.open(&path).expect_err("held"), SqliteError::Busy { path: path.clone() });
        drop(first);
        assert!(PROFILE.open(&path).is_ok());
    }
}
