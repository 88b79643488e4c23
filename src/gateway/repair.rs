//! Repair: what a start refuses to do by itself, because something would be lost by it, done on purpose. Without
//! `apply` nothing is set aside or removed, and what would be is told. Files of an older format are brought to the
//! newest one all the same, as by every start.

use anyhow::bail;

use super::directory::{check_log_backend, lock_existing};
use crate::auth::Registry;
use crate::config::{Config, LogBackend, SinkKind};
use crate::consume::storage;
use crate::consume::subscriber::retained;
use crate::log::EmbeddedLog;

/// What to repair, beside what is found.
#[derive(Debug, Clone, Copy)]
pub struct RepairOrder {
    /// Whether to do it, and not only to tell it.
    pub apply: bool,
    /// Whether a registry that is missing is replaced by an empty one.
    pub new_registry: bool,
}

/// Repairs the data directory of a gateway that does not run. Returns what was done, or would be, a sentence
/// each.
///
/// # Errors
/// There is no such directory, a gateway uses it, it belongs to a cluster, or a file cannot be read or
/// written; worded for an operator.
pub fn repair(config: &Config, order: RepairOrder) -> anyhow::Result<Vec<String>> {
    let dir = &config.data_dir;
    if !dir.is_dir() {
        bail!("there is no data directory {}", dir.display());
    }
    if config.log.backend == LogBackend::Jetstream {
        bail!(
            "log.backend is \"jetstream\": the log is on NATS. Move records.db and retained.db away, and what the log \
             has is copied again"
        );
    }
    // A start would make a new one; here it is more likely that the directory is the wrong one.
    if !dir.join("log").is_dir() {
        bail!("there is no log in {}: put it back, or begin with an empty directory", dir.display());
    }
    let _lock = lock_existing(dir)?;
    check_log_backend(dir, config.log.backend)?;
    let mut steps = Vec::new();
    if order.new_registry && !Registry::is_there(dir) {
        steps.push(
            "registry.db is missing or empty, and an empty one takes its place: no datasource and no key is known, \
             every datasource has to be created again, and every device needs another key. Records in the log \
             stay. The next start writes another admin.key"
                .to_owned(),
        );
        if order.apply {
            Registry::open(dir)?;
        }
    }
    // Opening cuts what was never acknowledged, as every start does.
    let log = EmbeddedLog::open(dir, &config.log, &config.intake)?;
    if config.storage.sink == SinkKind::Sqlite {
        steps.extend(storage::repair(dir, &log, order.apply)?);
    }
    steps.extend(retained::repair(dir, &log, order.apply)?);
    Ok(steps)
}
