//! Writes the files of a backup: links or copies them, piece by piece, with their digests.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::BackupError;
use super::error::NamePath;
use super::manifest::BackupFile;
use super::pace::{BackupPace, CopyPace, forget_pages, write_out};
use super::place::sync_dir;
use super::progress::BackupProgress;
use crate::limits::BACKUP_FREE_BYTES_MIN;
use crate::log::{CutSegment, free_bytes};
use crate::sqlite::SqliteSnapshot;

/// Bytes that a restore reads at a time.
pub(super) const PIECE_BYTES: usize = 1 << 20;
/// Where a database has its `user_version`.
const USER_VERSION_AT: u64 = 60;

/// The files of a backup that is being written.
pub(super) struct BackupWriter<'a> {
    dir: &'a Path,
    progress: &'a BackupProgress,
    pace: CopyPace,
    is_on_other_disk: bool,
    /// What has to stay free on its disk, in bytes.
    free_bytes_min: u64,
    files: Vec<BackupFile>,
    linked_bytes: u64,
    left_out: Vec<String>,
}

impl<'a> BackupWriter<'a> {
    /// Writes to `dir`, which is empty.
    pub(super) fn new(
        dir: &'a Path,
        data_dir: &Path,
        progress: &'a BackupProgress,
        pace: BackupPace,
    ) -> Result<Self, BackupError> {
        let log = dir.join("log");
        fs::DirBuilder::new().mode(0o700).create(&log).name_path(&log)?;
        let device = |path: &Path| fs::metadata(path).map(|file| file.dev()).name_path(path);
        // Devices need the room of the data directory's disk.
        let is_on_other_disk = device(dir)? != device(data_dir)?;
        let free_bytes_min = if is_on_other_disk { 0 } else { BACKUP_FREE_BYTES_MIN };
        let pace = CopyPace::new(pace);
        let (files, left_out) = (Vec::new(), Vec::new());
        Ok(Self { dir, progress, pace, is_on_other_disk, free_bytes_min, files, linked_bytes: 0, left_out })
    }

    /// The path of a file in it.
    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Whether it is on another disk than the data directory.
    pub(super) fn is_on_other_disk(&self) -> bool {
        self.is_on_other_disk
    }

    /// How far the backup is, and whether it is to end.
    pub(super) fn progress(&self) -> &'a BackupProgress {
        self.progress
    }

    /// Sets how many bytes there are to do, of which `new_bytes` are to be written.
    ///
    /// # Errors
    /// [`BackupError::NoRoom`].
    pub(super) fn expect(&self, bytes: u64, new_bytes: u64) -> Result<(), BackupError> {
        self.progress.set_total(bytes);
        self.check_room(new_bytes)
    }

    fn check_room(&self, bytes: u64) -> Result<(), BackupError> {
        let free = free_bytes(self.dir).name_path(self.dir)?;
        let needed = bytes + self.free_bytes_min;
        if free < needed {
            let dir = self.dir.parent().unwrap_or(self.dir).to_owned();
            return Err(BackupError::NoRoom { dir, free, needed });
        }
        Ok(())
    }

    /// Gives those of the segments that do not change any more a second name. Returns which have one.
    pub(super) fn link(&self, segments: &[CutSegment]) -> Vec<bool> {
        segments.iter().map(|segment| segment.link(&self.path_of(&log_path(segment)))).collect()
    }

    /// Copies a segment, or checks it if it is linked.
    pub(super) fn add_segment(&mut self, segment: &CutSegment, is_linked: bool) -> Result<(), BackupError> {
        let name = log_path(segment);
        if is_linked {
            self.linked_bytes += self.add_written(&name)?;
            return Ok(());
        }
        let mut position = 0;
        self.copy_from(&name, |buffer| {
            let read = segment.read_at(buffer, position)?;
            position += read as u64;
            Ok(read)
        })
    }

    /// Copies a file that does not change.
    pub(super) fn add_file(&mut self, path: &Path, name: &str) -> Result<(), BackupError> {
        let file = File::open(path).name_path(path)?;
        self.add_opened(file, name)
    }

    /// Copies a file that does not change, but may have been removed. Returns whether it is there.
    pub(super) fn add_file_if_there(&mut self, path: &Path, name: &str) -> Result<bool, BackupError> {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            file => file.name_path(path)?,
        };
        self.add_opened(file, name)?;
        Ok(true)
    }

    fn add_opened(&mut self, mut file: File, name: &str) -> Result<(), BackupError> {
        self.copy_from(name, |buffer| read_some(&mut file, buffer))
    }

    /// Notes that so much more is done, and rests.
    fn advance(&self, bytes: u64) -> Result<(), BackupError> {
        self.progress.advance(bytes)?;
        self.pace.rest();
        Ok(())
    }

    fn copy_from(
        &mut self,
        name: &str,
        mut read: impl FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> Result<(), BackupError> {
        let path = self.path_of(name);
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).name_path(&path)?;
        let (mut digest, mut buffer) = (blake3::Hasher::new(), vec![0; self.pace.piece_bytes()]);
        let mut bytes = 0;
        loop {
            let count = read(&mut buffer).name_path(&path)?;
            if count == 0 {
                break;
            }
            let piece = &buffer[..count];
            digest.update(piece);
            file.write_all(piece).name_path(&path)?;
            write_out(&file, bytes).name_path(&path)?;
            bytes += count as u64;
            self.check_room(0)?;
            self.advance(count as u64)?;
        }
        file.sync_all().name_path(&path)?;
        forget_pages(&file);
        let blake3 = digest.finalize().to_hex().to_string();
        self.files.push(BackupFile { path: name.to_owned(), bytes, blake3, format: None });
        Ok(())
    }

    /// Copies a database.
    pub(super) fn add_snapshot(&mut self, snapshot: &SqliteSnapshot, name: &str) -> Result<(), BackupError> {
        let path = self.path_of(name);
        let mut file = None;
        let mut written = 0;
        snapshot.copy(&path, self.pace.piece_bytes(), &mut |bytes| {
            let file = match &mut file {
                Some(file) => file,
                none => none.insert(File::open(&path).name_path(&path)?),
            };
            write_out(file, written).name_path(&path)?;
            written += bytes;
            self.check_room(0)?;
            self.advance(bytes)
        })?;
        self.add_database(name)
    }

    /// Copies a database that nobody has open, and that has no write-ahead log.
    pub(super) fn copy_database(&mut self, from: &Path, name: &str) -> Result<(), BackupError> {
        self.add_file(from, name)?;
        self.note_format(name)
    }

    /// Adds a database that is written already.
    pub(super) fn add_database(&mut self, name: &str) -> Result<(), BackupError> {
        self.add_written(name)?;
        self.note_format(name)
    }

    /// Notes the format of the database that was added last.
    fn note_format(&mut self, name: &str) -> Result<(), BackupError> {
        let path = self.path_of(name);
        let mut version = [0; 4];
        let read = File::open(&path).and_then(|file| file.read_exact_at(&mut version, USER_VERSION_AT));
        read.name_path(&path)?;
        if let Some(file) = self.files.last_mut() {
            file.format = Some(u32::from_be_bytes(version));
        }
        Ok(())
    }

    /// Adds a file that is written already, or linked. Returns its bytes.
    fn add_written(&mut self, name: &str) -> Result<u64, BackupError> {
        let path = self.path_of(name);
        let mut file = File::open(&path).name_path(&path)?;
        file.sync_all().name_path(&path)?;
        let (mut digest, mut buffer) = (blake3::Hasher::new(), vec![0; self.pace.piece_bytes()]);
        let mut bytes = 0;
        loop {
            let count = read_some(&mut file, &mut buffer).name_path(&path)?;
            if count == 0 {
                break;
            }
            digest.update(&buffer[..count]);
            bytes += count as u64;
            self.advance(count as u64)?;
        }
        let blake3 = digest.finalize().to_hex().to_string();
        self.files.push(BackupFile { path: name.to_owned(), bytes, blake3, format: None });
        Ok(bytes)
    }

    /// Bytes of the segments that the log has too.
    pub(super) fn linked_bytes(&self) -> u64 {
        self.linked_bytes
    }

    /// Notes a file that is not in the backup.
    pub(super) fn leave_out(&mut self, name: String) {
        self.left_out.push(name);
    }

    /// The files that are not in the backup.
    pub(super) fn take_left_out(&mut self) -> Vec<String> {
        std::mem::take(&mut self.left_out)
    }

    /// Makes the entries of its directories durable.
    pub(super) fn sync(&self) -> Result<(), BackupError> {
        sync_dir(&self.path_of("log"))?;
        sync_dir(self.dir)
    }

    /// All its files.
    pub(super) fn finish(self) -> Vec<BackupFile> {
        self.files
    }
}

fn log_path(segment: &CutSegment) -> String {
    format!("log/{}", segment.file_name())
}

/// Reads something; 0 bytes at the end.
pub(super) fn read_some(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}
