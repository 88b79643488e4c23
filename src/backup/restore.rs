//! Restoring: the files of a backup, checked, in a data directory that is new or empty, or whose content is moved aside.
//!
//! Until all is there, a mark in the directory says that it is not: no gateway starts on it, and another restore goes on
//! where this one was interrupted. The mark says what is being done: first what was there is moved aside, and only once
//! that is done may what is there be removed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::BackupError;
use super::error::NamePath;
use super::manifest::{BackupFile, BackupManifest, MANIFEST_FILE_NAME, ManifestError};
use super::place::sync_dir;
use super::writer::{PIECE_BYTES, read_some};
use crate::auth::Registry;
use crate::auth::registry::REGISTRY_FILE_NAME;
use crate::consume::newest_format;
use crate::log::free_bytes;

/// The mark in a data directory whose restore is not finished.
const RESTORE_MARK: &str = "restore.unfinished";
/// The mark while it is being written.
const NEW_RESTORE_MARK: &str = "restore.unfinished.new";
/// The mark once what was there is moved aside.
const COPYING: &str = "copying";
/// What the directory is called that gets what was there; a time follows.
const ASIDE_BEGIN: &str = "before-restore-";

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
    /// There is too little room.
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
             with it"
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
    let aside = match read_mark(data_dir).as_deref() {
        Some(COPYING) => {
            remove_entries(data_dir)?;
            None
        }
        Some(aside) => Some(data_dir.join(aside)),
        None => match entries(data_dir)?.first() {
            Some(name) if !replace => {
                return Err(RestoreError::NotEmpty { dir: data_dir.to_owned(), name: name.clone() });
            }
            Some(_) => {
                let aside = free_aside_name(data_dir);
                write_mark(data_dir, &aside)?;
                Some(data_dir.join(aside))
            }
            None => None,
        },
    };
    if let Some(aside) = &aside {
        move_entries(data_dir, aside)?;
    }
    write_mark(data_dir, COPYING)?;
    let needed: u64 = manifest.files.iter().map(|file| file.bytes).sum();
    let free = free_bytes(data_dir).name_path(data_dir)?;
    if free < needed {
        return Err(BackupError::NoRoom { dir: data_dir.to_owned(), free, needed }.into());
    }
    let log = data_dir.join("log");
    fs::DirBuilder::new().mode(0o700).create(&log).name_path(&log)?;
    for file in &manifest.files {
        copy_checked(backup, file, data_dir)?;
    }
    sync_dir(&log)?;
    sync_dir(data_dir)?;
    Ok(aside)
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

/// What is in a data directory beside what restoring has put there for itself.
fn entries(dir: &Path) -> Result<Vec<String>, BackupError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).name_path(dir)? {
        let name = entry.name_path(dir)?.file_name().to_string_lossy().into_owned();
        let is_ours = matches!(name.as_str(), "LOCK" | "lost+found" | RESTORE_MARK | NEW_RESTORE_MARK);
        if !is_ours && !name.starts_with(ASIDE_BEGIN) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn read_mark(dir: &Path) -> Option<String> {
    let text = fs::read_to_string(dir.join(RESTORE_MARK)).ok()?.trim().to_owned();
    (text == COPYING || text.starts_with(ASIDE_BEGIN) && !text.contains('/')).then_some(text)
}

fn write_mark(dir: &Path, text: &str) -> Result<(), BackupError> {
    let (new, mark) = (dir.join(NEW_RESTORE_MARK), dir.join(RESTORE_MARK));
    let written = File::create(&new).and_then(|mut file| {
        writeln!(file, "{text}")?;
        file.sync_all()
    });
    written.name_path(&new)?;
    fs::rename(&new, &mark).name_path(&mark)?;
    sync_dir(dir)
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
