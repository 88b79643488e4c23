//! Backups of a data directory that no gateway uses, and restoring one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{anyhow, bail};

use super::directory::{LOG_DIRECTORY, check_is_whole, check_log_backend, lock_existing, make_and_lock};
use super::start_advice::{explain_log_error, explain_registry_error};
use crate::auth::Registry;
use crate::backup::{BackupSources, BackupSummary, make_backup_here, restore};
use crate::config::{Config, LogBackend};
use crate::consume::egress::begin_history;
use crate::consume::subscriber::sessions::SessionStore;
use crate::log::{EmbeddedLog, Log};
use crate::message::Offset;

/// What was restored.
pub struct RestoredDirectory {
    /// Files of the backup.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// The offset that the next record gets.
    pub next_offset: Offset,
    /// Where what was in the data directory before is now.
    pub aside: Option<PathBuf>,
}

/// Backs up the data directory of a gateway that does not run.
///
/// # Errors
/// A gateway uses it, it belongs to a cluster, or something of it cannot be opened, read or written; worded for an
/// operator.
pub fn back_up_stopped(config: &Config, dir: &Path) -> anyhow::Result<BackupSummary> {
    let data_dir = &config.data_dir;
    if !data_dir.join(LOG_DIRECTORY).is_dir() {
        bail!("there is no log of a gateway's own in {}", data_dir.display());
    }
    check_is_whole(data_dir)?;
    let _lock = lock_existing(data_dir)?;
    check_log_backend(data_dir, LogBackend::Embedded)?;
    let log = EmbeddedLog::open(data_dir, &config.log, &config.intake)
        .map_err(|error| explain_log_error(data_dir, error))?;
    let registry =
        Registry::open_existing(data_dir).map_err(|error| explain_registry_error(data_dir, error))?;
    let Some(registry) = registry else {
        bail!("registry.db is missing or empty in {}: put it back first", data_dir.display());
    };
    let (sessions, _) = SessionStore::open(data_dir)?;
    let sources = BackupSources::new(data_dir, Arc::new(registry), Arc::new(log), sessions);
    Ok(make_backup_here(&sources, dir)?)
}

/// Restores the backup in `backup` into the data directory, which is made if it is not there. With `replace` what is in it
/// is moved aside. It is opened once, as a start would.
///
/// # Errors
/// The backup is damaged or newer, a gateway uses the directory, there is something in it, or it cannot be written;
/// worded for an operator.
pub fn restore_backup(config: &Config, backup: &Path, replace: bool) -> anyhow::Result<RestoredDirectory> {
    let data_dir = &config.data_dir;
    if config.log.backend == LogBackend::Jetstream {
        bail!("log.backend is \"jetstream\": what a backup has is on NATS there, and is restored there");
    }
    let manifest = restore::check_backup(backup)?;
    let _lock = make_and_lock(data_dir)?;
    let restored = (|| {
        let aside = restore::restore_files(backup, &manifest, data_dir, replace)?;
        begin_history(data_dir, manifest.next_offset)?;
        let next_offset = open_once(config)?;
        if next_offset != manifest.next_offset {
            bail!(
                "the log that was restored ends at offset {next_offset}, and the backup says {}: use another backup",
                manifest.next_offset
            );
        }
        restore::finish(data_dir)?;
        let bytes = manifest.files.iter().map(|file| file.bytes).sum();
        Ok(RestoredDirectory { files: manifest.files.len(), bytes, next_offset, aside })
    })();
    // The data directory may be one that no gateway starts on: how to get out of that belongs to what has gone wrong.
    restored.map_err(|error| match restore::describe_unusable(data_dir) {
        Some(unusable) => anyhow!("{error:#}. {unusable}"),
        None => error,
    })
}

/// Puts back what was in a data directory before a restore into it was interrupted.
///
/// # Errors
/// A gateway uses the directory, no restore was interrupted, or something cannot be moved; worded for an operator.
pub fn undo_restore(data_dir: &Path) -> anyhow::Result<()> {
    if !data_dir.is_dir() {
        bail!("there is no directory {}", data_dir.display());
    }
    // Before the lock: nothing is made in a directory that there is nothing to undo in.
    restore::check_interrupted(data_dir)?;
    let _lock = lock_existing(data_dir)?;
    Ok(restore::undo(data_dir)?)
}

/// Opens the log and the registry, without which nothing is served. Returns the offset that the next record gets.
fn open_once(config: &Config) -> anyhow::Result<Offset> {
    let dir = &config.data_dir;
    let log =
        EmbeddedLog::open(dir, &config.log, &config.intake).map_err(|error| explain_log_error(dir, error))?;
    Registry::open_existing(dir).map_err(|error| explain_registry_error(dir, error))?;
    Ok(log.next_offset())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_undo_of_nothing_makes_nothing_in_the_directory() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let refused = undo_restore(dir.path()).expect_err("no restore was interrupted");
        assert!(refused.to_string().contains("nothing to undo"), "{refused}");
        assert_eq!(std::fs::read_dir(dir.path()).expect("readable").count(), 0);
    }
}
