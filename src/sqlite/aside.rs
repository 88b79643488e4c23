//! Setting aside: a file that is damaged, or ahead of the log, keeps its content under another name beside it,
//! `records-set-aside-20261129T210000Z.db`, and the gateway goes on without it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::SqliteError;
use super::open::create_private;

/// Renames the database at `path`, with its write-ahead log, to a name of its own. Nobody may have it open
/// for writing. Returns the new path.
///
/// # Errors
/// [`SqliteError::Failed`] if the file system does not rename it.
pub(crate) fn set_aside(path: &Path) -> Result<PathBuf, SqliteError> {
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

/// The write-ahead log goes first: left behind, SQLite would copy it into the next database of that name.
fn rename_all(path: &Path, aside: &Path) -> io::Result<()> {
    for suffix in ["-wal", "-shm", ""] {
        match std::fs::rename(with_suffix(path, suffix), with_suffix(aside, suffix)) {
            Err(error) if suffix.is_empty() || error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    File::open(path.parent().unwrap_or(path))?.sync_all()
}

/// A path beside `path` that says when it was made, and that no file has.
fn free_path(path: &Path) -> PathBuf {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let now = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let named = |number: &str| path.with_file_name(format!("{name}-set-aside-{now}{number}.db"));
    let mut aside = named("");
    for number in 2.. {
        if !aside.exists() {
            break;
        }
        aside = named(&format!("-{number}"));
    }
    aside
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
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
