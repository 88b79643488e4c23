//! Setting aside: a file that is damaged, or ahead of the log, keeps its content under another name beside it,
//! `records-set-aside-20261129T210000Z.db`, and the gateway goes on without it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use parking_lot::{RwLock, RwLockReadGuard};

use super::SqliteError;
use super::open::create_private;

/// Writes when the files of a database get other names. SQLite finds what is beside a database by name, and opens that at
/// the first read: a reader that had opened a database before it was set aside would then take the index of the next one for
/// its own, cut it off under the writer that has it mapped, and end the process with SIGBUS.
static NAMES: RwLock<()> = RwLock::new(());

/// No file of a database gets another name as long as this is held: from before a reader opens it until it has read.
pub(super) fn keep_names() -> RwLockReadGuard<'static, ()> {
    NAMES.read()
}

/// Renames the database at `path`, with its write-ahead log, to a name of its own. Nobody may have it open
/// for writing. Returns the new path.
///
/// # Errors
/// [`SqliteError::Failed`] if the file system does not rename it.
pub(crate) fn set_aside(path: &Path) -> Result<PathBuf, SqliteError> {
    let _renaming = NAMES.write();
    let aside = free_path(path);
    rename_all(path, &aside).map_err(|error| SqliteError::failed(path, error.to_string()))?;
    Ok(aside)
}

/// Makes an empty file, readable by its owner only, for what is set aside of the database at `path`.
///
/// # Errors
/// [`SqliteError::Failed`] if it cannot be made.
pub(crate) fn new_file_aside(path: &Path) -> Result<PathBuf, SqliteError> {
    let aside = free_path(path);
    create_private(&aside).map_err(|error| SqliteError::failed(&aside, error.to_string()))?;
    Ok(aside)
}

/// Opens the database at `path` with `open`. If it is damaged, sets it aside and opens another one; returns
/// where the damaged one is, and what is wrong with it.
///
/// # Errors
/// Those of `open` that are no damage, and [`set_aside`]'s.
pub(crate) fn open_or_set_aside<T>(
    path: &Path,
    open: impl Fn() -> Result<T, SqliteError>,
) -> Result<(T, Option<(PathBuf, SqliteError)>), SqliteError> {
    match open() {
        Err(damage) if damage.is_damage() => {
            let aside = set_aside(path)?;
            Ok((open()?, Some((aside, damage))))
        }
        opened => Ok((opened?, None)),
    }
}

/// Completes what a kill has interrupted in the middle of [`set_aside`]: a database whose write-ahead log is on its
/// way already goes where that goes. Without it the database would be opened as it was before its newest transactions.
///
/// # Errors
/// [`SqliteError::Failed`] if the file system does not rename it.
pub(super) fn finish_set_aside(path: &Path) -> Result<(), SqliteError> {
    let begin = format!("{}-set-aside-", stem(path));
    let failed = |error: io::Error| SqliteError::failed(path, error.to_string());
    let Ok(entries) = std::fs::read_dir(path.parent().unwrap_or(path)) else { return Ok(()) };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let Some(aside) = name.strip_suffix(MOVING_WAL_SUFFIX).filter(|aside| aside.starts_with(&begin))
        else {
            continue;
        };
        let _renaming = NAMES.write();
        let aside = path.with_file_name(aside);
        // A database that is there already was moved before the kill; the one at `path` is another one.
        if !aside.exists() {
            rename_if_there(path, &aside).map_err(failed)?;
        }
        rename_if_there(&with_suffix(&aside, MOVING_WAL_SUFFIX), &with_suffix(&aside, "-wal"))
            .map_err(failed)?;
        tracing::warn!(aside = %aside.display(), "a database that a kill has left half set aside is set aside now");
    }
    Ok(())
}

/// The name of a write-ahead log that is set aside before its database is.
const MOVING_WAL_SUFFIX: &str = "-wal.moving";

/// The renames that set a database aside, in their order. The write-ahead log goes before the database: left
/// behind, SQLite would copy it into the next database of that name. Until the database is beside it, it has a name
/// by which [`finish_set_aside`] knows it. The index of the write-ahead log (`-shm`) is made anew when it is missing.
fn renames(path: &Path, aside: &Path) -> [(PathBuf, PathBuf); 4] {
    let moving = with_suffix(aside, MOVING_WAL_SUFFIX);
    [
        (with_suffix(path, "-shm"), with_suffix(aside, "-shm")),
        (with_suffix(path, "-wal"), moving.clone()),
        (path.to_owned(), aside.to_owned()),
        (moving, with_suffix(aside, "-wal")),
    ]
}

fn rename_all(path: &Path, aside: &Path) -> io::Result<()> {
    let mut is_any = false;
    for (from, to) in renames(path, aside) {
        is_any |= rename_if_there(&from, &to)?;
    }
    if !is_any {
        return Err(io::ErrorKind::NotFound.into());
    }
    File::open(path.parent().unwrap_or(path))?.sync_all()
}

/// Returns whether there was a file of that name.
fn rename_if_there(from: &Path, to: &Path) -> io::Result<bool> {
    match std::fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        renamed => renamed.map(|()| true),
    }
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// A path beside `path` that says when it was made, and that no file has.
fn free_path(path: &Path) -> PathBuf {
    let name = stem(path);
    let now = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let named = |number: &str| path.with_file_name(format!("{name}-set-aside-{now}{number}.db"));
    let mut aside = named("");
    for number in 2.. {
        if !aside.exists() && !with_suffix(&aside, "-wal").exists() {
            break;
        }
        aside = named(&format!("-{number}"));
    }
    aside
}

/// The path of a file that SQLite keeps beside a database.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_database_goes_with_its_write_ahead_log_and_no_name_is_given_twice() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("things.db");
        let mut asides = Vec::new();
        for content in ["first", "second"] {
            std::fs::write(&path, content).expect("written");
            std::fs::write(with_suffix(&path, "-wal"), content).expect("written");
            let aside = set_aside(&path).expect("set aside");
            assert!(!path.exists() && !with_suffix(&path, "-wal").exists());
            assert_eq!(std::fs::read_to_string(with_suffix(&aside, "-wal")).expect("there"), content);
            assert_eq!(std::fs::read_to_string(&aside).expect("there"), content);
            asides.push(aside);
        }
        asides.push(new_file_aside(&path).expect("made"));
        let mode = std::fs::metadata(&asides[2]).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        asides.dedup();
        assert_eq!(asides.len(), 3);
        assert!(set_aside(&path).is_err(), "nothing is there");
    }

    /// The content of every file in a directory whose name ends so.
    fn contents(dir: &Path, end: &str) -> Vec<String> {
        let files = std::fs::read_dir(dir).expect("readable").map(|file| file.expect("an entry").path());
        let named = files.filter(|path| path.to_str().is_some_and(|path| path.ends_with(end)));
        named.map(|path| std::fs::read_to_string(path).expect("text")).collect()
    }

    #[test]
    fn a_kill_after_any_step_leaves_a_database_and_its_write_ahead_log_together() {
        for has_wal in [true, false] {
            for done in 0..=4 {
                let dir = tempfile::tempdir().expect("temporary directory");
                let path = dir.path().join("things.db");
                std::fs::write(&path, "pages").expect("written");
                std::fs::write(with_suffix(&path, "-shm"), "index").expect("written");
                if has_wal {
                    std::fs::write(with_suffix(&path, "-wal"), "newest").expect("written");
                }
                let aside = free_path(&path);
                for (from, to) in renames(&path, &aside).iter().take(done) {
                    rename_if_there(from, to).expect("renamed");
                }
                // Killed here; the next start finishes it, or begins it again.
                for _ in 0..2 {
                    finish_set_aside(&path).expect("finished");
                    let (at, other) = if path.exists() { (&path, &aside) } else { (&aside, &path) };
                    assert_eq!(std::fs::read_to_string(at).expect("there"), "pages", "{done}");
                    assert_eq!(with_suffix(at, "-wal").exists(), has_wal, "{done}");
                    assert!(!other.exists() && !with_suffix(other, "-wal").exists(), "{done}");
                }
                if path.exists() {
                    set_aside(&path).expect("set aside");
                }
                assert_eq!(contents(dir.path(), ".db"), ["pages"]);
                assert_eq!(contents(dir.path(), "-wal"), if has_wal { vec!["newest"] } else { vec![] });
                assert!(contents(dir.path(), MOVING_WAL_SUFFIX).is_empty());
            }
        }
    }

    #[test]
    fn a_write_ahead_log_alone_is_set_aside_too_and_what_is_removed_of_that_moves_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("things.db");
        std::fs::write(with_suffix(&path, "-wal"), "newest").expect("written");
        let aside = set_aside(&path).expect("set aside");
        assert_eq!(std::fs::read_to_string(with_suffix(&aside, "-wal")).expect("there"), "newest");
        std::fs::write(&path, "another").expect("written");
        finish_set_aside(&path).expect("nothing to finish");
        assert!(path.exists() && !aside.exists());
    }

    #[test]
    fn only_damage_makes_room_for_another_database() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("things.db");
        let attempts = std::cell::Cell::new(0);
        let open = |first: SqliteError| {
            std::fs::write(&path, "x").expect("written");
            attempts.set(0);
            open_or_set_aside(&path, || match attempts.replace(attempts.get() + 1) {
                0 => Err(first.clone()),
                _ => Ok(()),
            })
        };
        let busy = SqliteError::Busy { path: path.clone() };
        assert_eq!(open(busy.clone()), Err(busy));
        let damage = SqliteError::Damaged { path: path.clone(), detail: "torn".into() };
        let ((), aside) = open(damage.clone()).expect("opened anew");
        let (aside, why) = aside.expect("set aside");
        assert!(aside.exists() && why == damage);
    }
}
