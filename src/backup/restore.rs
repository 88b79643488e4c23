//! Restoring: the files of a backup, checked, in a data directory that is new or empty, or whose content is moved aside.
//!
//! Until all is there, a mark in the directory says that it is not: no gateway starts on it, and another restore goes on
//! where this one was interrupted, or [`undo`] puts back what was there.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::BackupError;
use super::error::NamePath;
use super::manifest::{BackupFile, BackupManifest, MANIFEST_FILE_NAME, ManifestError};
use super::place::sync_dir;
use super::restore_mark::{ASIDE_BEGIN, NEW_RESTORE_MARK, RESTORE_MARK, RestoreMark};
use super::writer::{PIECE_BYTES, read_some};
use crate::auth::Registry;
use crate::auth::registry::REGISTRY_FILE_NAME;
use crate::consume::newest_format;
use crate::log::free_bytes;

/// Why a backup is not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The directory is no backup that can be used.
    #[error("{}: {error}", dir.display())]
    Manifest {
        /// The directory.
        dir: PathBuf,
        /// Why.
        error: ManifestError,
    },
    /// A file of it is not what was written.
    #[error("{}: {what}. The backup is damaged: use another one", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A newer Headgate wrote it.
    #[error("{} has format {version} and this Headgate knows formats up to {known}: use a newer one", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// The format it has.
        version: u32,
        /// The newest format that is known here.
        known: i64,
    },
    /// There is something in the data directory.
    #[error(
        "the data directory {} is not empty (it has {name}): restore into a new one; or with --replace, which moves what is \
         there to {ASIDE_BEGIN}TIME in it",
        dir.display()
    )]
    NotEmpty {
        /// The directory.
        dir: PathBuf,
        /// Something in it.
        name: String,
    },
    /// One of the two directories is in the other.
    #[error("{} and the backup are one in the other: use another data directory", dir.display())]
    Nested {
        /// The data directory.
        dir: PathBuf,
    },
    /// Something that is there cannot be moved. It is all as it was.
    #[error(
        "{} cannot be moved aside ({error}), and nothing is changed: restore into a new data directory. A mount point cannot be \
         moved, mount the data directory as a whole",
        path.display()
    )]
    Immovable {
        /// What.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// There is nothing to undo.
    #[error("no restore into {} was interrupted: there is nothing to undo", dir.display())]
    NotInterrupted {
        /// The data directory.
        dir: PathBuf,
    },
    /// What was moved aside is no longer where the mark says, so that nothing may be removed: it may be all that there is.
    #[error(
        "{} is not there or has nothing in it, and it should have what was in {} before: nothing is changed. Put it back \
         there; if what is in {} now is what was there, remove {RESTORE_MARK} from it; if you have removed it on purpose, \
         restore into another data directory",
        aside.display(), dir.display(), dir.display()
    )]
    AsideMissing {
        /// The data directory.
        dir: PathBuf,
        /// Where it should be.
        aside: PathBuf,
    },
    /// The mark does not say where what was there is, and there is something that was moved aside.
    #[error(
        "the restore into {} that was interrupted does not say where what was there before is, and it may be in {name}: \
         nothing is changed. Restore into it again; or remove what was copied beside {name}, move back what is in that, \
         and then remove {RESTORE_MARK}",
        dir.display()
    )]
    AsideUnknown {
        /// The data directory.
        dir: PathBuf,
        /// A directory in it.
        name: String,
    },
    /// There is too little room, or the operating system reported an error.
    #[error(transparent)]
    Copy(#[from] BackupError),
}

/// Whether a directory is no data directory that a gateway may use, and why.
pub fn describe_unusable(dir: &Path) -> Option<String> {
    let shown = dir.display();
    if dir.join(MANIFEST_FILE_NAME).exists() {
        return Some(format!(
            "{shown} is a backup, and nothing may change in it: `headgate restore {shown} --data-dir NEW` makes a data \
             directory of it"
        ));
    }
    dir.join(RESTORE_MARK).exists().then(|| {
        format!(
            "a restore into {shown} was interrupted, and a part of it is missing: restore into it again, which goes on \
             with it, or put back what was there with `headgate restore --undo --data-dir {shown}`"
        )
    })
}

/// Reads the manifest of the backup in `dir` and checks every file.
///
/// # Errors
/// [`RestoreError`]
pub fn check_backup(dir: &Path) -> Result<BackupManifest, RestoreError> {
    let manifest =
        BackupManifest::read(dir).map_err(|error| RestoreError::Manifest { dir: dir.to_owned(), error })?;
    for file in &manifest.files {
        let known = match file.path.as_str() {
            REGISTRY_FILE_NAME => Some(Registry::NEWEST_FORMAT),
            name => newest_format(name),
        };
        if let (Some(version), Some(known)) = (file.format, known)
            && i64::from(version) > known
        {
            return Err(RestoreError::Newer { path: dir.join(&file.path), version, known });
        }
    }
    for file in &manifest.files {
        read_checked(dir, file, &mut |_| Ok(()))?;
    }
    Ok(manifest)
}

/// Puts the files of a backup that is checked into `data_dir`, which the caller has locked, and marks it as unfinished
/// until [`finish`]. Returns where what was there is now. `replace`: something may be there.
///
/// # Errors
/// [`RestoreError`]
pub fn restore_files(
    backup: &Path,
    manifest: &BackupManifest,
    data_dir: &Path,
    replace: bool,
) -> Result<Option<PathBuf>, RestoreError> {
    check_apart(backup, data_dir)?;
    let needed: u64 = manifest.files.iter().map(|file| file.bytes).sum();
    let aside = match RestoreMark::read(data_dir) {
        Some(RestoreMark::Copying { aside }) => {
            aside.as_ref().map_or(Ok(()), |aside| check_aside(data_dir, aside))?;
            remove_entries(data_dir)?;
            check_room(data_dir, needed)?;
            aside
        }
        Some(RestoreMark::Moving { aside }) => {
            check_room(data_dir, needed)?;
            move_entries(data_dir, &data_dir.join(&aside))?;
            Some(aside)
        }
        None => {
            let first = entries(data_dir)?.into_iter().next();
            if let Some(name) = first.as_ref().filter(|_| !replace) {
                let name = name.to_string_lossy().into_owned();
                return Err(RestoreError::NotEmpty { dir: data_dir.to_owned(), name });
            }
            // Nothing is moved for a restore that cannot be.
            check_room(data_dir, needed)?;
            first.map(|_| move_aside(data_dir)).transpose()?
        }
    };
    RestoreMark::Copying { aside: aside.clone() }.write(data_dir)?;
    let log = data_dir.join("log");
    fs::DirBuilder::new().mode(0o700).create(&log).name_path(&log)?;
    for file in &manifest.files {
        copy_checked(backup, file, data_dir)?;
    }
    sync_dir(&log)?;
    sync_dir(data_dir)?;
    Ok(aside.map(|aside| data_dir.join(aside)))
}

/// Puts back what was in a data directory, which the caller has locked, before a restore into it was interrupted. It can be
/// interrupted too, and called again.
///
/// # Errors
/// [`RestoreError::NotInterrupted`]; [`RestoreError::AsideMissing`] or [`RestoreError::AsideUnknown`], and nothing is changed
/// then; [`RestoreError::Copy`].
pub fn undo(data_dir: &Path) -> Result<(), RestoreError> {
    match RestoreMark::read(data_dir) {
        None => return Err(RestoreError::NotInterrupted { dir: data_dir.to_owned() }),
        Some(RestoreMark::Copying { aside: None }) => {
            // An earlier Headgate has not noted where it moved what was there.
            if let Some(name) = any_aside(data_dir)? {
                return Err(RestoreError::AsideUnknown { dir: data_dir.to_owned(), name });
            }
            remove_entries(data_dir)?;
        }
        Some(RestoreMark::Copying { aside: Some(aside) }) => {
            check_aside(data_dir, &aside)?;
            remove_entries(data_dir)?;
            sync_dir(data_dir)?;
            // From here on what is in the directory is what was there.
            RestoreMark::Moving { aside: aside.clone() }.write(data_dir)?;
            put_back(data_dir, &data_dir.join(aside))?;
        }
        Some(RestoreMark::Moving { aside }) => put_back(data_dir, &data_dir.join(aside))?,
    }
    Ok(finish(data_dir)?)
}

/// Ensures that a restore into a directory was interrupted. It changes nothing, and needs no lock.
///
/// # Errors
/// [`RestoreError::NotInterrupted`].
pub fn check_interrupted(data_dir: &Path) -> Result<(), RestoreError> {
    match RestoreMark::read(data_dir) {
        None => Err(RestoreError::NotInterrupted { dir: data_dir.to_owned() }),
        Some(_) => Ok(()),
    }
}

/// Takes the mark away: the data directory is whole.
///
/// # Errors
/// [`BackupError::Io`]
pub fn finish(data_dir: &Path) -> Result<(), BackupError> {
    let mark = data_dir.join(RESTORE_MARK);
    fs::remove_file(&mark).name_path(&mark)?;
    sync_dir(data_dir)
}

fn check_apart(backup: &Path, data_dir: &Path) -> Result<(), RestoreError> {
    let real = |path: &Path| fs::canonicalize(path).name_path(path);
    let (backup, dir) = (real(backup)?, real(data_dir)?);
    if backup.starts_with(&dir) || dir.starts_with(&backup) {
        return Err(RestoreError::Nested { dir });
    }
    Ok(())
}

/// Checks that the disk has room for what a backup has.
fn check_room(data_dir: &Path, needed: u64) -> Result<(), BackupError> {
    let free = free_bytes(data_dir).name_path(data_dir)?;
    match free < needed {
        true => Err(BackupError::NoRoom { dir: data_dir.to_owned(), free, needed }),
        false => Ok(()),
    }
}

/// What is in a data directory beside what restoring has put there for itself.
fn entries(dir: &Path) -> Result<Vec<OsString>, BackupError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).name_path(dir)? {
        let name = entry.name_path(dir)?.file_name();
        let text = name.to_string_lossy();
        let is_ours = matches!(&*text, "LOCK" | "lost+found" | RESTORE_MARK | NEW_RESTORE_MARK);
        if !is_ours && !text.starts_with(ASIDE_BEGIN) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Ensures that what was there is aside, before what is there now is removed. It is moved back, and its directory removed,
/// only once the mark says that it is being moved.
fn check_aside(data_dir: &Path, name: &str) -> Result<(), RestoreError> {
    let aside = data_dir.join(name);
    let is_dir = fs::symlink_metadata(&aside).is_ok_and(|file| file.is_dir());
    if is_dir && fs::read_dir(&aside).name_path(&aside)?.next().is_some() {
        return Ok(());
    }
    Err(RestoreError::AsideMissing { dir: data_dir.to_owned(), aside })
}

/// The name of a directory into which a restore has moved something.
fn any_aside(dir: &Path) -> Result<Option<String>, BackupError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).name_path(dir)? {
        names.push(entry.name_path(dir)?.file_name().to_string_lossy().into_owned());
    }
    Ok(names.into_iter().filter(|name| name.starts_with(ASIDE_BEGIN)).max())
}

/// Moves what is there aside, all of it or nothing. Returns the name of where it is.
fn move_aside(data_dir: &Path) -> Result<String, RestoreError> {
    let name = free_aside_name(data_dir);
    let aside = data_dir.join(&name);
    RestoreMark::Moving { aside: name.clone() }.write(data_dir)?;
    let moved = move_entries(data_dir, &aside);
    if let Err(BackupError::Io { path, error }) = moved {
        put_back(data_dir, &aside)?;
        finish(data_dir)?;
        return Err(RestoreError::Immovable { path, error });
    }
    moved?;
    Ok(name)
}

fn free_aside_name(dir: &Path) -> String {
    let now = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let named = |number: u32| match number {
        1 => format!("{ASIDE_BEGIN}{now}"),
        _ => format!("{ASIDE_BEGIN}{now}-{number}"),
    };
    (1..).map(named).find(|name| !dir.join(name).exists()).expect("there are more numbers than names")
}

fn move_entries(dir: &Path, aside: &Path) -> Result<(), BackupError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(aside).name_path(aside)?;
    for name in entries(dir)? {
        let from = dir.join(&name);
        fs::rename(&from, aside.join(&name)).name_path(&from)?;
    }
    sync_dir(aside)?;
    sync_dir(dir)
}

/// Moves back what was moved aside, and removes the directory that had it.
fn put_back(dir: &Path, aside: &Path) -> Result<(), BackupError> {
    let moved = match fs::read_dir(aside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        moved => moved.name_path(aside)?,
    };
    for entry in moved {
        let from = entry.name_path(aside)?.path();
        let to = dir.join(from.file_name().expect("an entry of a directory has a name"));
        fs::rename(&from, &to).name_path(&from)?;
    }
    sync_dir(dir)?;
    fs::remove_dir(aside).name_path(aside)?;
    sync_dir(dir)
}

/// Removes what an interrupted restore has copied.
fn remove_entries(dir: &Path) -> Result<(), BackupError> {
    for name in entries(dir)? {
        let path = dir.join(name);
        let is_dir = fs::symlink_metadata(&path).is_ok_and(|file| file.is_dir());
        let removed = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.name_path(&path)?;
    }
    Ok(())
}

fn copy_checked(backup: &Path, file: &BackupFile, data_dir: &Path) -> Result<(), RestoreError> {
    let path = data_dir.join(&file.path);
    let mut copy =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).name_path(&path)?;
    read_checked(backup, file, &mut |piece| copy.write_all(piece).name_path(&path))?;
    Ok(copy.sync_all().name_path(&path)?)
}

/// Reads a file of a backup, piece by piece, and checks that it is what was written.
fn read_checked(
    backup: &Path,
    file: &BackupFile,
    piece: &mut dyn FnMut(&[u8]) -> Result<(), BackupError>,
) -> Result<(), RestoreError> {
    let path = backup.join(&file.path);
    let damaged = |what: &str| RestoreError::Damaged { path: path.clone(), what: what.to_owned() };
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path);
    let mut source = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(damaged("the file is missing")),
        opened => opened.name_path(&path)?,
    };
    let there = source.metadata().name_path(&path)?;
    if !there.is_file() || there.len() != file.bytes {
        return Err(damaged(&format!("it has {} bytes, and {} were written", there.len(), file.bytes)));
    }
    let (mut digest, mut buffer) = (blake3::Hasher::new(), vec![0; PIECE_BYTES]);
    loop {
        let count = read_some(&mut source, &mut buffer).name_path(&path)?;
        if count == 0 {
            break;
        }
        digest.update(&buffer[..count]);
        piece(&buffer[..count])?;
    }
    if digest.finalize().to_hex().as_str() != file.blake3 {
        return Err(damaged("its content is not what was written"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::unix::ffi::OsStringExt;

    use tempfile::TempDir;

    use super::*;

    /// A backup with a registry of so many bytes, by its manifest.
    fn backup(bytes: u64, blake3: &str) -> (TempDir, BackupManifest) {
        let dir = TempDir::new().expect("temporary directory");
        fs::write(dir.path().join(REGISTRY_FILE_NAME), "after").expect("written");
        let (path, blake3) = (REGISTRY_FILE_NAME.to_owned(), blake3.to_owned());
        let file = BackupFile { path, bytes, blake3, format: None };
        (dir, BackupManifest::new(0, 0, vec![file]).expect("a plain name"))
    }

    /// The files of a directory, those of the directories in it too, with their content.
    fn content(dir: &Path) -> BTreeMap<PathBuf, String> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(dir).expect("readable") {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => found.extend(content(&path)),
                false => _ = found.insert(path.clone(), fs::read_to_string(path).expect("text")),
            }
        }
        found
    }

    #[test]
    fn what_was_there_is_not_moved_without_room_and_comes_back_from_wherever_a_restore_was_interrupted() {
        let data = TempDir::new().expect("temporary directory");
        let dir = data.path();
        fs::create_dir(dir.join("log")).expect("made");
        fs::write(dir.join("log/0.log"), "before").expect("written");
        fs::write(dir.join(REGISTRY_FILE_NAME), "before").expect("written");
        fs::write(dir.join(OsString::from_vec(b"\xff".to_vec())), "no text").expect("written");
        let before = content(dir);
        let is_no_room = |done| matches!(done, Err(RestoreError::Copy(BackupError::NoRoom { .. })));

        let (large, of_large) = backup(u64::MAX / 2, "");
        assert!(is_no_room(restore_files(large.path(), &of_large, dir, true)));
        assert_eq!(content(dir), before, "nothing is moved, and there is no mark");
        assert!(matches!(undo(dir), Err(RestoreError::NotInterrupted { .. })));

        // While it copies.
        let (damaged, of_damaged) = backup(5, "00");
        let failed = restore_files(damaged.path(), &of_damaged, dir, true);
        assert!(matches!(failed, Err(RestoreError::Damaged { .. })), "{failed:?}");
        let mark = RestoreMark::read(dir);
        assert!(matches!(mark, Some(RestoreMark::Copying { aside: Some(_) })), "{mark:?}");
        assert!(describe_unusable(dir).is_some_and(|words| words.contains("headgate restore --undo")));
        assert!(is_no_room(restore_files(large.path(), &of_large, dir, true)));
        assert_eq!(RestoreMark::read(dir), mark, "and so it can still be undone");
        undo(dir).expect("undone");
        assert_eq!((content(dir), describe_unusable(dir)), (before.clone(), None));

        // While it moves, and while it moves back.
        let aside = free_aside_name(dir);
        RestoreMark::Moving { aside: aside.clone() }.write(dir).expect("written");
        undo(dir).expect("nothing was moved yet");
        assert_eq!(content(dir), before);
        RestoreMark::Moving { aside: aside.clone() }.write(dir).expect("written");
        fs::create_dir(dir.join(&aside)).expect("made");
        fs::rename(dir.join("log"), dir.join(&aside).join("log")).expect("moved");
        undo(dir).expect("undone");
        assert_eq!(content(dir), before);

        // What was copied is removed once more if nothing was there.
        let empty = TempDir::new().expect("temporary directory");
        assert!(restore_files(damaged.path(), &of_damaged, empty.path(), false).is_err());
        undo(empty.path()).expect("undone");
        assert!(entries(empty.path()).expect("readable").is_empty());
        let digest = blake3::hash(b"after").to_hex();
        let (whole, of_whole) = backup(5, digest.as_str());
        let restored = restore_files(whole.path(), &of_whole, dir, true).expect("restored");
        assert!(restored.is_some_and(|aside| aside.join("log/0.log").exists()));
        finish(dir).expect("done");
        assert_eq!(fs::read_to_string(dir.join(REGISTRY_FILE_NAME)).expect("there"), "after");
    }

    /// It removed what was in the directory, and took what was not there for something that was moved back already.
    #[test]
    fn nothing_is_removed_unless_what_was_there_is_where_the_mark_says() {
        let data = TempDir::new().expect("temporary directory");
        let dir = data.path();
        fs::write(dir.join(REGISTRY_FILE_NAME), "moved back by hand").expect("written");
        let aside = format!("{ASIDE_BEGIN}20260101T000000Z");
        let (backup, manifest) = backup(5, blake3::hash(b"after").to_hex().as_str());
        let is_missing = |done| matches!(done, Err(RestoreError::AsideMissing { .. }));

        RestoreMark::Copying { aside: Some(aside.clone()) }.write(dir).expect("written");
        for is_empty in [false, true] {
            if is_empty {
                fs::create_dir(dir.join(&aside)).expect("made");
            }
            let before = content(dir);
            assert!(is_missing(undo(dir)));
            assert!(is_missing(restore_files(backup.path(), &manifest, dir, true).map(drop)));
            assert_eq!(content(dir), before);
        }

        // As an earlier Headgate wrote it.
        RestoreMark::Copying { aside: None }.write(dir).expect("written");
        let before = content(dir);
        let refused = undo(dir).expect_err("what was there may be aside");
        assert!(matches!(&refused, RestoreError::AsideUnknown { name, .. } if *name == aside), "{refused}");
        assert_eq!(content(dir), before);

        // While it moves back, what is not there any more is back.
        fs::remove_dir(dir.join(&aside)).expect("removed");
        RestoreMark::Moving { aside }.write(dir).expect("written");
        undo(dir).expect("undone");
        assert_eq!(fs::read_to_string(dir.join(REGISTRY_FILE_NAME)).expect("there"), "moved back by hand");
    }
}
