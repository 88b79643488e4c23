//! A near copy: a database is copied on the data directory's own disk first, while its lock is held or its thread waits,
//! and goes to the backup's disk afterwards. So nothing that serves clients waits for a disk that may be slow, or hang.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tracing::warn;

use super::BackupError;
use super::error::NamePath;
use super::writer::BackupWriter;
use crate::limits::BACKUP_FREE_BYTES_MIN;
use crate::log::free_bytes;

/// The place of the copy of one database.
pub(super) struct NearCopy {
    path: PathBuf,
    /// It is in the data directory, and removed when this is dropped. Else it is in the backup itself.
    is_temporary: bool,
}

impl NearCopy {
    /// A place for the copy of `data_dir/name`, where nothing is: in the data directory if the backup is on another disk
    /// and there is room for it. Without room the copy is made in the backup.
    ///
    /// # Errors
    /// What a killed process has left there cannot be removed.
    pub(super) fn prepare(
        data_dir: &Path,
        writer: &BackupWriter<'_>,
        name: &str,
    ) -> Result<Self, BackupError> {
        let path = data_dir.join(format!(".{name}.copy"));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).name_path(&path),
            _ => {}
        }
        let bytes_of = |name: &str| fs::metadata(data_dir.join(name)).map_or(0, |file| file.len());
        let needed = bytes_of(name) + bytes_of(&format!("{name}-wal")) + BACKUP_FREE_BYTES_MIN;
        let has_room = || free_bytes(data_dir).is_ok_and(|free| free >= needed);
        Ok(match writer.is_on_other_disk() && has_room() {
            true => Self { path, is_temporary: true },
            false => Self { path: writer.path_of(name), is_temporary: false },
        })
    }

    /// Where the copy is to be made.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that the backup still has to write for it.
    pub(super) fn new_bytes(&self) -> u64 {
        if self.is_temporary { fs::metadata(&self.path).map_or(0, |file| file.len()) } else { 0 }
    }

    /// Adds the copy to the backup as `name`.
    ///
    /// # Errors
    /// Those of the writer.
    pub(super) fn add_to(&self, writer: &mut BackupWriter<'_>, name: &str) -> Result<(), BackupError> {
        match self.is_temporary {
            true => writer.copy_database(&self.path, name),
            false => writer.add_database(name),
        }
    }
}

impl Drop for NearCopy {
    fn drop(&mut self) {
        if !self.is_temporary {
            return;
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warn!(%error, path = %self.path.display(), "a copy is left behind; the next backup removes it");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::super::pace::BackupPace;
    use super::super::progress::BackupProgress;
    use super::*;

    #[test]
    fn a_copy_for_another_disk_is_made_beside_the_database_and_is_gone_afterwards() {
        let data = tempfile::tempdir().expect("temporary directory");
        let Ok(other) = tempfile::tempdir_in("/dev/shm") else { return };
        let device = |dir: &Path| fs::metadata(dir).expect("there").dev();
        if device(data.path()) == device(other.path()) {
            return;
        }
        let same =
            tempfile::tempdir_in(data.path().parent().expect("a parent")).expect("temporary directory");
        for (dir, is_near) in [(other.path(), true), (same.path(), false)] {
            // What a killed process has left.
            let near = data.path().join(".registry.db.copy");
            fs::write(&near, "half").expect("written");
            let progress = BackupProgress::default();
            let mut writer =
                BackupWriter::new(dir, data.path(), &progress, BackupPace::Fast).expect("a directory");
            let copy = NearCopy::prepare(data.path(), &writer, "registry.db").expect("prepared");
            assert!(!near.exists() && (copy.path() == near) == is_near);
            fs::write(copy.path(), [7; 100]).expect("written");
            assert_eq!(copy.new_bytes(), if is_near { 100 } else { 0 });
            copy.add_to(&mut writer, "registry.db").expect("added");
            drop(copy);
            assert!(fs::read(dir.join("registry.db")).expect("there") == [7; 100] && !near.exists());
            let files = writer.finish();
            assert_eq!((files.len(), files[0].bytes, files[0].format), (1, 100, Some(0x0707_0707)));
        }
    }
}
