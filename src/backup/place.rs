//! The place of a backup: the directory that was asked for, and the unfinished one beside it, in which it is written and
//! which gets that name when it is complete.
//!
//! A process that is killed leaves the unfinished directory behind. Its mark is locked as long as somebody writes there: the
//! next backup beside it, of whatever name and gateway, removes those in which nobody does. The mark goes when the
//! directory has its name, so that there is no whole backup of an unfinished name that nobody removes.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use rand::TryRng;
use rand::rngs::SysRng;
use tracing::{info, warn};

use super::BackupError;
use super::error::NamePath;
use super::manifest::{BackupManifest, MANIFEST_FILE_NAME};

/// The mark in a directory that is not finished.
const BACKUP_MARK: &str = "headgate-backup.unfinished";
/// The mark until it is locked.
const NEW_BACKUP_MARK: &str = "headgate-backup.unfinished.new";
/// What the name of a directory that is not finished has between the name that is asked for and a random number.
const UNFINISHED_INFIX: &str = ".unfinished-";

/// A directory for a backup, and the unfinished one beside it, which is removed when this is dropped.
pub struct BackupPlace {
    dir: PathBuf,
    parent: PathBuf,
    unfinished: PathBuf,
    /// Locked.
    _mark: File,
    is_finished: bool,
}

impl BackupPlace {
    /// Checks that `dir` can be a backup of `data_dir`, and makes the unfinished directory.
    ///
    /// # Errors
    /// [`BackupError::Place`]; [`BackupError::Io`] if the directory cannot be made.
    pub fn prepare(dir: &Path, data_dir: &Path) -> Result<Self, BackupError> {
        let (parent, dir) = checked_place(dir, data_dir)?;
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        remove_left_behind(&parent);
        let mut random = [0; 4];
        SysRng.try_fill_bytes(&mut random).map_err(io::Error::other).name_path(&parent)?;
        let random = u32::from_le_bytes(random);
        let unfinished = parent.join(format!(".{name}{UNFINISHED_INFIX}{random:08x}"));
        DirBuilder::new().mode(0o700).create(&unfinished).name_path(&unfinished)?;
        let mark = make_mark(&unfinished).inspect_err(|_| drop(fs::remove_dir_all(&unfinished)))?;
        Ok(Self { dir, parent, unfinished, _mark: mark, is_finished: false })
    }

    /// Where the backup will be.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where it is written.
    pub fn unfinished(&self) -> &Path {
        &self.unfinished
    }

    /// Writes the manifest, makes everything durable and gives the backup its name.
    ///
    /// # Errors
    /// [`BackupError::Io`]; [`BackupError::Place`] if there is something in its place by now.
    pub fn finish(mut self, manifest: &BackupManifest) -> Result<(), BackupError> {
        self.write_manifest(manifest)?;
        self.give_name()?;
        // It is complete with a mark too: a restore copies what the manifest names.
        if let Err(error) = self.remove_mark() {
            warn!(%error, "a backup is complete, and the mark of an unfinished one is still in it");
        }
        Ok(())
    }

    fn write_manifest(&self, manifest: &BackupManifest) -> Result<(), BackupError> {
        let path = self.unfinished.join(MANIFEST_FILE_NAME);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let written = file.and_then(|mut file| {
            file.write_all(&manifest.encode())?;
            file.sync_all()
        });
        written.name_path(&path)?;
        sync_dir(&self.unfinished)
    }

    fn give_name(&mut self) -> Result<(), BackupError> {
        // Replaces an empty directory, and nothing else.
        fs::rename(&self.unfinished, &self.dir).name_path(&self.dir)?;
        self.is_finished = true;
        sync_dir(&self.parent)
    }

    /// Removes the mark, once the name is durable.
    fn remove_mark(&self) -> Result<(), BackupError> {
        let mark = self.dir.join(BACKUP_MARK);
        fs::remove_file(&mark).name_path(&mark)?;
        sync_dir(&self.dir)
    }
}

impl Drop for BackupPlace {
    fn drop(&mut self) {
        if !self.is_finished
            && let Err(error) = fs::remove_dir_all(&self.unfinished)
        {
            warn!(%error, path = %self.unfinished.display(), "an unfinished backup is left behind");
        }
    }
}

/// Makes a directory's entries durable.
pub(super) fn sync_dir(dir: &Path) -> Result<(), BackupError> {
    File::open(dir).and_then(|dir| dir.sync_all()).name_path(dir)
}

/// The parent of a backup's directory, and the directory in it, without links on the way.
fn checked_place(dir: &Path, data_dir: &Path) -> Result<(PathBuf, PathBuf), BackupError> {
    let refused = |why: &str| Err(BackupError::place(dir, why));
    let has_dots = dir.components().any(|part| matches!(part, Component::ParentDir | Component::CurDir));
    if !dir.is_absolute() || has_dots {
        return refused("a backup needs an absolute path, without . and .., on the gateway's own machine");
    }
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return refused("it is the root of the file system: name a directory that is not there yet");
    };
    if is_unfinished_name(&name.to_string_lossy()) {
        return refused("a backup that is not complete has such a name: take another one");
    }
    let parent = match fs::canonicalize(parent) {
        Ok(parent) if parent.is_dir() => parent,
        Ok(_) => return refused("what it is to be in is no directory"),
        Err(error) => return refused(&format!("the directory that it is to be in cannot be used: {error}")),
    };
    let real = parent.join(name);
    for inside in [data_dir.to_owned(), data_dir.join("log")] {
        if fs::canonicalize(&inside).is_ok_and(|inside| real.starts_with(inside)) {
            return refused("it is in the data directory itself: name one elsewhere, best on another disk");
        }
    }
    let there = match fs::symlink_metadata(&real) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((parent, real)),
        Err(error) => return refused(&error.to_string()),
        Ok(there) => there,
    };
    if !there.is_dir() {
        return refused("there is something of that name already, and it is no directory");
    }
    if fs::metadata(&parent).is_ok_and(|parent| parent.dev() != there.dev()) {
        return refused("a disk is mounted there: name a directory in it that is not there yet");
    }
    match fs::read_dir(&real).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok((parent, real)),
        Ok(false) => refused("the directory is not empty: name one that is not there yet"),
        Err(error) => refused(&error.to_string()),
    }
}

/// Makes the mark of an unfinished directory, and locks it before it has its name: another gateway that looks for what is
/// left behind never finds it unlocked.
fn make_mark(dir: &Path) -> Result<File, BackupError> {
    let (new, mark) = (dir.join(NEW_BACKUP_MARK), dir.join(BACKUP_MARK));
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new).name_path(&new)?;
    file.try_lock().map_err(io::Error::from).name_path(&new)?;
    fs::rename(&new, &mark).name_path(&mark)?;
    Ok(file)
}

/// Whether an unfinished directory has such a name.
fn is_unfinished_name(name: &str) -> bool {
    name.starts_with('.') && name.contains(UNFINISHED_INFIX)
}

/// Removes the unfinished directories that a killed process has left behind. Those in which somebody writes, be it another
/// gateway, stay: their mark is locked.
fn remove_left_behind(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let is_one = entry.file_name().to_str().is_some_and(is_unfinished_name)
            && entry.file_type().is_ok_and(|kind| kind.is_dir());
        let path = entry.path();
        if !is_one || !is_left_behind(&path) {
            continue;
        }
        match fs::remove_dir_all(&path) {
            Ok(()) => info!(path = %path.display(), "removed an unfinished backup"),
            Err(error) => warn!(%error, path = %path.display(), "an unfinished backup cannot be removed"),
        }
    }
}

/// Whether a directory has the mark, and nobody writes there.
fn is_left_behind(dir: &Path) -> bool {
    let mark = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(dir.join(BACKUP_MARK));
    mark.is_ok_and(|mark| mark.try_lock().is_ok())
}

#[cfg(test)]
mod tests {
    use super::super::restore::{check_backup, restore_files};
    use super::*;

    fn why(dir: &Path, data_dir: &Path) -> String {
        let refused = BackupPlace::prepare(dir, data_dir).err().expect("refused");
        assert!(refused.is_refusal(), "{refused}");
        refused.to_string()
    }

    #[test]
    fn a_backup_is_made_where_nothing_is_and_nowhere_else() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let data = dir.path().join("data");
        fs::create_dir_all(data.join("log")).expect("made");
        fs::create_dir(dir.path().join("full")).expect("made");
        fs::write(dir.path().join("full/x"), "x").expect("written");
        fs::write(dir.path().join("file"), "x").expect("written");
        std::os::unix::fs::symlink(dir.path().join("nowhere"), dir.path().join("link")).expect("made");
        std::os::unix::fs::symlink(&data, dir.path().join("way")).expect("made");
        for (name, words) in [
            ("full", "not empty"),
            ("file", "no directory"),
            ("link", "no directory"),
            ("data/backup", "data directory"),
            ("data/log/backup", "data directory"),
            ("way/backup", "data directory"),
            ("none/backup", "cannot be used"),
            ("file/backup", "no directory"),
            ("full/../new", "absolute"),
            (".new.unfinished-1", "not complete"),
        ] {
            let said = why(&dir.path().join(name), &data);
            assert!(said.contains(words), "{name}: {said}");
        }
        assert!(why(Path::new("relative"), &data).contains("absolute"));
        assert!(why(Path::new("/"), &data).contains("root"));
        assert!(why(Path::new("/proc"), &data).contains("mounted"));
        let names = || fs::read_dir(dir.path()).expect("readable").count();
        let before = names();
        drop(BackupPlace::prepare(&dir.path().join("new"), &data).expect("nothing is there"));
        assert_eq!(names(), before, "what is not finished is not there");
        fs::create_dir(dir.path().join("empty")).expect("made");
        for name in ["new", "empty"] {
            let place = BackupPlace::prepare(&dir.path().join(name), &data).expect("nothing is there");
            place.finish(&BackupManifest::new(0, 0, Vec::new()).expect("no names")).expect("finished");
            let entries: Vec<_> = fs::read_dir(dir.path().join(name)).expect("there").flatten().collect();
            assert!(entries.len() == 1 && entries[0].file_name() == MANIFEST_FILE_NAME);
        }
    }

    #[test]
    fn what_a_killed_process_left_is_removed_and_what_is_being_written_stays() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (to, data) = (dir.path().join("b"), dir.path().join("data"));
        let place = BackupPlace::prepare(&to, &data).expect("nothing is there");
        let left = dir.path().join(".b.unfinished-00000000");
        let foreign = dir.path().join(".b.unfinished-11111111");
        fs::create_dir(&left).expect("made");
        fs::write(left.join(BACKUP_MARK), "").expect("written");
        fs::create_dir(&foreign).expect("made");
        let second = BackupPlace::prepare(&to, &data).expect("nothing is there");
        assert!(!left.exists() && foreign.exists() && place.unfinished().exists());
        place.finish(&BackupManifest::new(0, 0, Vec::new()).expect("no names")).expect("finished");
        let late = second
            .finish(&BackupManifest::new(0, 0, Vec::new()).expect("no names"))
            .expect_err("there is one");
        assert!(late.to_string().contains("not empty"), "{late}");
    }

    /// A timer gives each backup another name.
    #[test]
    fn what_is_left_of_a_backup_of_another_name_is_removed_and_what_another_gateway_writes_stays() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let data = dir.path().join("data");
        let other = BackupPlace::prepare(&dir.path().join("other"), &data).expect("nothing is there");
        let marked = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).expect("made");
            fs::write(path.join(BACKUP_MARK), "").expect("written");
            path
        };
        let left = marked(".2026-11-29.unfinished-00000000");
        let kept = [marked("2026-11-29.unfinished-00000000"), marked(".2026-11-29"), marked("elsewhere")];
        let link = dir.path().join(".link.unfinished-00000000");
        std::os::unix::fs::symlink(&kept[2], &link).expect("made");
        let place = BackupPlace::prepare(&dir.path().join("2026-11-30"), &data).expect("nothing is there");
        assert!(!left.exists() && other.unfinished().exists() && place.unfinished().exists());
        assert!(kept.iter().chain([&link]).all(|path| path.join(BACKUP_MARK).exists()));
        other.finish(&BackupManifest::new(0, 0, Vec::new()).expect("no names")).expect("finished");
    }

    /// The mark went before the directory had its name, so that a kill left a whole backup that nobody removed.
    #[test]
    fn a_kill_at_any_step_leaves_a_whole_backup_or_what_the_next_one_removes() {
        let manifest = BackupManifest::new(0, 0, Vec::new()).expect("no names");
        for steps in 0..=3 {
            let dir = tempfile::tempdir().expect("temporary directory");
            let (to, data) = (dir.path().join("b"), dir.path().join("data"));
            let mut place = BackupPlace::prepare(&to, &data).expect("nothing is there");
            if steps > 0 {
                place.write_manifest(&manifest).expect("written");
            }
            if steps > 1 {
                place.give_name().expect("named");
            }
            if steps > 2 {
                place.remove_mark().expect("removed");
            }
            // As a kill: nothing is removed, and the mark is no longer locked.
            place.is_finished = true;
            drop(place);
            drop(BackupPlace::prepare(&dir.path().join("next"), &data).expect("nothing is there"));
            let left = fs::read_dir(dir.path()).expect("readable").count();
            assert_eq!((left, to.exists()), (usize::from(steps > 1), steps > 1), "{steps} steps");
            if steps > 1 {
                assert_eq!(to.join(BACKUP_MARK).exists(), steps == 2);
                let restored = tempfile::tempdir().expect("temporary directory");
                let whole = check_backup(&to).expect("whole");
                restore_files(&to, &whole, restored.path(), false).expect("restored");
                assert!(!restored.path().join(BACKUP_MARK).exists(), "a restore does not copy it");
            }
        }
    }
}
