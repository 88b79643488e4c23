//! What a backup is made of: the registry, the log and the stores of one data directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::warn;

use super::BackupError;
use super::error::NamePath;
use super::manifest::is_plain_path;
use super::near_copy::NearCopy;
use super::writer::BackupWriter;
use crate::auth::Registry;
use crate::auth::registry::REGISTRY_FILE_NAME;
use crate::consume::subscriber::sessions::SessionStore;
use crate::consume::{SESSIONS_FILE_NAME, take_snapshots};
use crate::log::{Log, LogCut};
use crate::message::Offset;
use crate::scheduler::lower_priority;

/// By how much the priority of the thread is lowered once the cut is made.
const BACKUP_NICE: u8 = 10;
/// Files beside the databases that do not change while a gateway runs, but for `admin.key`, which a rotation replaces.
const STEADY_FILES: [&str; 5] = ["admin.key", "log.id", "log.parents", "quarantine.db", "quarantine.db-wal"];

/// What a backup is made of.
pub struct BackupSources {
    data_dir: PathBuf,
    registry: Arc<Registry>,
    log: Arc<dyn Log>,
    sessions: SessionStore,
}

impl BackupSources {
    /// What is open of a data directory.
    pub fn new(data_dir: &Path, registry: Arc<Registry>, log: Arc<dyn Log>, sessions: SessionStore) -> Self {
        Self { data_dir: data_dir.to_owned(), registry, log, sessions }
    }

    pub(super) fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    pub(super) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Writes all files. Returns the first offset of their log, and the one behind its last record.
    pub(super) fn write(&self, writer: &mut BackupWriter<'_>) -> Result<(Offset, Offset), BackupError> {
        if let Err(error) = self.registry.write_usage() {
            warn!(%error, "the backup has an older usage of keys");
        }
        let sessions = NearCopy::prepare(&self.data_dir, writer, SESSIONS_FILE_NAME)?;
        self.sessions.copy_blocking(sessions.path())?;
        // Until the cut the log keeps what the stores have not consumed in their snapshots. Milliseconds: a log at its
        // budget takes nothing meanwhile.
        let mut hold = Some(self.log.hold());
        let snapshots = take_snapshots(&self.data_dir)?;
        let registry = NearCopy::prepare(&self.data_dir, writer, REGISTRY_FILE_NAME)?;
        let cut = || {
            let cut = self.log.cut();
            hold = None;
            cut
        };
        // A stop does not wait for the rest of a long audit.
        let cut = self.registry.copy_with(registry.path(), cut, &mut |_| writer.progress().advance(0))??;
        let LogCut { first_offset, next_offset, segments } = cut.ok_or(BackupError::Cluster)?;
        let is_linked = writer.link(&segments);
        lower_priority(BACKUP_NICE);

        let (set_aside, steady): (Vec<_>, Vec<_>) =
            self.other_files(writer)?.into_iter().partition(|(_, name)| is_set_aside(name));
        let mut new_bytes = 0;
        for (_, snapshot) in &snapshots {
            new_bytes += snapshot.bytes()?;
        }
        let file_bytes = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
        new_bytes += sessions.new_bytes() + registry.new_bytes();
        new_bytes += steady.iter().chain(&set_aside).map(|(path, _)| file_bytes(path)).sum::<u64>();
        let segment_bytes: u64 = segments.iter().map(|segment| segment.bytes).sum();
        let linked = segments.iter().zip(&is_linked).filter(|(_, is_linked)| **is_linked);
        let linked_bytes: u64 = linked.map(|(segment, _)| segment.bytes).sum();
        // The digests of databases are read once more.
        writer.expect(2 * new_bytes + segment_bytes, new_bytes + segment_bytes - linked_bytes)?;

        // At once: `admin.key` belongs to the registry as it was at the cut.
        for (path, name) in steady {
            writer.add_file(&path, &name)?;
        }
        for (name, snapshot) in snapshots {
            writer.add_snapshot(&snapshot, name)?;
        }
        for (name, copy) in [(SESSIONS_FILE_NAME, sessions), (REGISTRY_FILE_NAME, registry)] {
            copy.add_to(writer, name)?;
        }
        for (segment, is_linked) in segments.iter().zip(is_linked) {
            writer.add_segment(segment, is_linked)?;
        }
        for (path, name) in set_aside {
            add_set_aside(writer, &path, name)?;
        }
        writer.sync()?;
        Ok((first_offset, next_offset))
    }

    /// What else there is to copy: the path and the name of each. What has a name that no backup can be restored with is
    /// left out, which is noted: Headgate gives none such.
    fn other_files(&self, writer: &mut BackupWriter<'_>) -> Result<Vec<(PathBuf, String)>, BackupError> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.data_dir).name_path(&self.data_dir)? {
            let entry = entry.name_path(&self.data_dir)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_file = std::fs::metadata(entry.path()).is_ok_and(|file| file.is_file());
            if !is_file || !STEADY_FILES.contains(&name.as_str()) && !is_set_aside(&name) {
                continue;
            }
            if !is_plain_path(&name) {
                warn!(?name, "a file is not in the backup: its name has more than letters, digits and .-_");
                writer.leave_out(name);
                continue;
            }
            files.push((entry.path(), name));
        }
        files.sort();
        Ok(files)
    }
}

/// Copies a file that was set aside. If it has been removed meanwhile it is left out, which is noted: nothing needs it.
fn add_set_aside(writer: &mut BackupWriter<'_>, path: &Path, name: String) -> Result<(), BackupError> {
    if !writer.add_file_if_there(path, &name)? {
        warn!(?name, "a file that was set aside is not in the backup: it has been removed meanwhile");
        writer.leave_out(name);
    }
    Ok(())
}

/// Whether Headgate gives such a name to a database that it sets aside, or to its write-ahead log.
fn is_set_aside(name: &str) -> bool {
    let database = name.strip_suffix("-wal").unwrap_or(name);
    database.ends_with(".db") && database.contains("-set-aside-")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io;

    use super::super::make_backup_here;
    use super::super::manifest::BackupManifest;
    use super::super::pace::BackupPace;
    use super::super::progress::BackupProgress;
    use super::*;
    use crate::config::Config;
    use crate::log::EmbeddedLog;

    #[test]
    fn what_was_set_aside_and_is_removed_meanwhile_is_left_out_and_nothing_else_may_be_missing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (data, to) = (dir.path().join("data"), dir.path().join("b"));
        for dir in [&data, &to] {
            fs::create_dir(dir).expect("made");
        }
        let progress = BackupProgress::default();
        let mut writer = BackupWriter::new(&to, &data, &progress, BackupPace::Fast).expect("a directory");
        let (there, removed) = ("records-set-aside-1.db", "records-set-aside-2.db");
        fs::write(data.join(there), "there").expect("written");
        for name in [there, removed] {
            add_set_aside(&mut writer, &data.join(name), name.to_owned()).expect("added, or left out");
        }
        let missing = writer.add_file(&data.join("log.id"), "log.id");
        assert!(
            matches!(&missing, Err(BackupError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound),
            "{missing:?}"
        );
        assert_eq!(writer.take_left_out(), [removed]);
        let files: Vec<_> = writer.finish().into_iter().map(|file| file.path).collect();
        assert_eq!(files, [there]);
        assert!(to.join(there).exists() && !to.join(removed).exists());
    }

    /// `admin.key` was copied after the databases, and a rotation meanwhile gave a backup whose registry did not know it.
    #[tokio::test]
    async fn the_admin_key_is_copied_before_the_databases_and_what_was_set_aside_last() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let data_dir = dir.path().join("data");
        fs::create_dir(&data_dir).expect("made");
        let config = Config::default();
        let log = EmbeddedLog::open(&data_dir, &config.log, &config.intake).expect("opens");
        let registry = Arc::new(Registry::open(&data_dir).expect("opens"));
        let (sessions, _) = SessionStore::open(&data_dir).expect("opens");
        for name in ["admin.key", "log.id", "records-set-aside-1.db"] {
            fs::write(data_dir.join(name), name).expect("written");
        }
        let sources = BackupSources::new(&data_dir, registry, Arc::new(log), sessions);
        let (to, made) = (dir.path().join("b"), dir.path().join("b"));
        // A thread of its own: its priority is lowered for good.
        let making = std::thread::spawn(move || make_backup_here(&sources, &to));
        making.join().expect("no panic").expect("made");
        let files = BackupManifest::read(&made).expect("whole").files;
        let order: Vec<_> = files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(order[..2], ["admin.key", "log.id"], "{order:?}");
        assert!(order[2..].contains(&REGISTRY_FILE_NAME), "{order:?}");
        assert_eq!(order.last(), Some(&"records-set-aside-1.db"), "{order:?}");
    }
}
