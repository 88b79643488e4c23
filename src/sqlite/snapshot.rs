//! Copying a database while its writer goes on: a reader that keeps the database as it is at one moment, and the copy of
//! its pages. As long as a snapshot is held, SQLite's write-ahead log grows.

use std::path::{Path, PathBuf};

use rusqlite::Connection;
use rusqlite::backup::{Backup, StepResult};

use super::aside::keep_names;
use super::open::{check_write_ahead_log, create_private};
use super::readers::open_read_only;
use super::{SqliteError, SqliteProfile};

/// Pages that are copied at a time: 4 MiB.
const COPY_STEP_PAGES: i32 = 1024;
/// The size of SQLite's pages.
const PAGE_BYTES: usize = 4 << 10;
/// What the copy keeps in memory, in KiB.
const COPY_CACHE_KIB: i64 = 8 << 10;

/// Called after each step of a copy with the bytes of the step; an error ends the copy.
type CopyStep<'a, E> = &'a mut dyn FnMut(u64) -> Result<(), E>;

/// A database as it was at one moment.
pub(crate) struct SqliteSnapshot {
    connection: Connection,
    path: PathBuf,
}

impl SqliteSnapshot {
    /// The database at `path` as it is now; `None` if there is none.
    ///
    /// # Errors
    /// [`SqliteError`], also for a database that Headgate has not made or a newer one has.
    pub(crate) fn take(path: &Path, profile: &SqliteProfile) -> Result<Option<Self>, SqliteError> {
        check_write_ahead_log(path)?;
        if !path.exists() {
            return Ok(None);
        }
        let failed = |error: rusqlite::Error| SqliteError::from_sqlite(&error, path);
        let _names = keep_names();
        let connection = open_read_only(path).map_err(failed)?;
        profile.check_maker(&connection, path)?;
        // Kept open for as long as the connection: no step of the copy begins another one.
        connection.execute_batch("BEGIN").map_err(failed)?;
        connection.query_row("SELECT count(*) FROM sqlite_master", [], |_| Ok(())).map_err(failed)?;
        Ok(Some(Self { connection, path: path.to_owned() }))
    }

    /// The bytes of its pages.
    ///
    /// # Errors
    /// SQLite's.
    pub(crate) fn bytes(&self) -> Result<u64, SqliteError> {
        let failed = |error: rusqlite::Error| SqliteError::from_sqlite(&error, &self.path);
        let number = |pragma: &str| {
            let value = self.connection.pragma_query_value(None, pragma, |row| row.get::<_, u32>(0));
            value.map(u64::from).map_err(failed)
        };
        Ok(number("page_count")? * number("page_size")?)
    }

    /// Copies it to a new file at `to`, about `step_bytes` in each step, see [`copy_database`].
    ///
    /// # Errors
    /// Those of [`copy_database`].
    pub(crate) fn copy<E: From<SqliteError>>(
        &self,
        to: &Path,
        step_bytes: usize,
        step: CopyStep<'_, E>,
    ) -> Result<(), E> {
        let pages = i32::try_from(step_bytes / PAGE_BYTES).unwrap_or(COPY_STEP_PAGES).max(1);
        copy_in_steps(&self.connection, to, pages, step)
    }
}

/// Copies a database to a new file, readable by its owner only; without its write-ahead log, which is in the copy. The
/// copy is not synced.
///
/// # Errors
/// [`SqliteError`], which names the copy, and what `step` returns.
pub(crate) fn copy_database<E: From<SqliteError>>(
    source: &Connection,
    to: &Path,
    step: CopyStep<'_, E>,
) -> Result<(), E> {
    copy_in_steps(source, to, COPY_STEP_PAGES, step)
}

fn copy_in_steps<E: From<SqliteError>>(
    source: &Connection,
    to: &Path,
    step_pages: i32,
    step: CopyStep<'_, E>,
) -> Result<(), E> {
    create_private(to).map_err(|error| SqliteError::failed(to, error.to_string()))?;
    let failed = |error: rusqlite::Error| SqliteError::from_sqlite(&error, to);
    let mut copy = Connection::open(to).map_err(failed)?;
    for (pragma, value) in [("synchronous", 0), ("cache_size", -COPY_CACHE_KIB)] {
        copy.pragma_update(None, pragma, value).map_err(failed)?;
    }
    // A copy that is not finished is no copy: nothing has to be undone.
    copy.pragma_update_and_check(None, "journal_mode", "OFF", |_| Ok(())).map_err(failed)?;
    let page_bytes: u32 = source.pragma_query_value(None, "page_size", |row| row.get(0)).map_err(failed)?;
    let backup = Backup::new(source, &mut copy).map_err(failed)?;
    let mut left = None;
    loop {
        let result = backup.step(step_pages).map_err(failed)?;
        let progress = backup.progress();
        let (remaining, all) = (progress.remaining.unsigned_abs(), progress.pagecount.unsigned_abs());
        let pages = left.replace(remaining).unwrap_or(all).saturating_sub(remaining);
        step(u64::from(pages) * u64::from(page_bytes))?;
        match result {
            StepResult::Done => return Ok(()),
            StepResult::More => {}
            _ => return Err(SqliteError::Busy { path: to.to_owned() }.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: SqliteProfile =
        SqliteProfile { migrations: &["CREATE TABLE things (thing TEXT) STRICT"], ..SqliteProfile::SHARED };

    #[test]
    fn a_snapshot_is_copied_as_it_was_however_much_is_written_meanwhile() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (path, to) = (dir.path().join("things.db"), dir.path().join("copy.db"));
        assert!(SqliteSnapshot::take(&path, &PROFILE).expect("none").is_none());
        let writer = PROFILE.open(&path).expect("made");
        let write = |count: usize| {
            for _ in 0..count {
                writer.execute("INSERT INTO things VALUES (hex(zeroblob(2000)))", []).expect("written");
            }
        };
        write(3_000);
        let snapshot = SqliteSnapshot::take(&path, &PROFILE).expect("taken").expect("there");
        let (mut steps, mut bytes) = (0, 0);
        let copied: Result<(), SqliteError> = snapshot.copy(&to, 4 << 20, &mut |step| {
            (steps, bytes) = (steps + 1, bytes + step);
            write(100);
            Ok(())
        });
        copied.expect("copied");
        assert!(steps > 1 && bytes == snapshot.bytes().expect("read"), "{steps} steps, {bytes} bytes");
        let copy = PROFILE.open(&to).expect("a database");
        let count: i64 = copy.query_row("SELECT count(*) FROM things", [], |row| row.get(0)).expect("read");
        assert_eq!(count, 3_000);
        let pages: String = copy.pragma_query_value(None, "quick_check", |row| row.get(0)).expect("read");
        assert_eq!(pages, "ok");
    }
}
