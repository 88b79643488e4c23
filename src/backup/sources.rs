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
/// Files beside the databases that do not change while a gateway runs.
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

        let others = self.other_files(writer)?;
        let mut new_bytes = 0;
        for (_, snapshot) in &snapshots {
            new_bytes += snapshot.bytes()?;
        }
        let file_bytes = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
        new_bytes += sessions.new_bytes() + registry.new_bytes();
        new_bytes += others.iter().map(|(path, _)| file_bytes(path)).sum::<u64>();
        let segment_bytes: u64 = segments.iter().map(|segment| segment.bytes).sum();
        let linked = segments.iter().zip(&is_linked).filter(|(_, is_linked)| **is_linked);
        let linked_bytes: u64 = linked.map(|(segment, _)| segment.bytes).sum();
        // The digests of databases are read once more.
        writer.expect(2 * new_bytes + segment_bytes, new_bytes + segment_bytes - linked_bytes)?;

        for (name, snapshot) in snapshots {
            writer.add_snapshot(&snapshot, name)?;
        }
        for (name, copy) in [(SESSIONS_FILE_NAME, sessions), (REGISTRY_FILE_NAME, registry)] {
            copy.add_to(writer, name)?;
        }
        for (path, name) in others {
            writer.add_file(&path, &name)?;
        }
        for (segment, is_linked) in segments.iter().zip(is_linked) {
            writer.add_segment(segment, is_linked)?;
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

/// Whether Headgate gives such a name to a database that it sets aside, or to its write-ahead log.
fn is_set_aside(name: &str) -> bool {
    let database = name.strip_suffix("-wal").unwrap_or(name);
    database.ends_with(".db") && database.contains("-set-aside-")
}
