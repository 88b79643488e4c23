//! Repair: what a start refuses to do by itself, because something would be lost by it, done on purpose. Without
//! `apply` nothing is set aside or removed, and what would be is told. Files of an older format are brought to the
//! newest one all the same, as by every start.

use std::path::Path;

use anyhow::bail;

use super::directory::{check_is_whole, check_log_backend, lock_existing};
use super::start_advice::{explain_log_error, explain_registry_error};
use crate::auth::{Registry, RegistryError};
use crate::config::{Config, LogBackend, SinkKind};
use crate::consume::storage;
use crate::consume::subscriber::retained;
use crate::log::EmbeddedLog;
use crate::sqlite::SqliteError;

/// What to repair, beside what is found.
#[derive(Debug, Clone, Copy)]
pub struct RepairOrder {
    /// Whether to do it, and not only to tell it.
    pub apply: bool,
    /// Whether a registry that is missing, damaged or not Headgate's is replaced by an empty one.
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
    check_is_whole(dir)?;
    let _lock = lock_existing(dir)?;
    check_log_backend(dir, config.log.backend)?;
    let mut steps = Vec::new();
    steps.extend(replace_registry(dir, order)?);
    // Opening cuts what was never acknowledged, as every start does.
    let log =
        EmbeddedLog::open(dir, &config.log, &config.intake).map_err(|error| explain_log_error(dir, error))?;
    if config.storage.sinks.contains(&SinkKind::Sqlite) {
        steps.extend(storage::repair(dir, &log, order.apply)?);
    }
    steps.extend(retained::repair(dir, &log, order.apply)?);
    Ok(steps)
}

/// Puts an empty registry in the place of one that is missing or cannot be used, which is set aside, if that is
/// ordered; or only tells it. `None` if the registry is sound.
fn replace_registry(dir: &Path, order: RepairOrder) -> anyhow::Result<Option<String>> {
    let apply = order.apply && order.new_registry;
    let why = match Registry::open_existing(dir) {
        Ok(Some(_)) => return Ok(None),
        Ok(None) => "registry.db is missing or empty".to_owned(),
        Err(RegistryError::Database(error @ (SqliteError::Damaged { .. } | SqliteError::Foreign { .. }))) => {
            let aside = match apply {
                true => Registry::set_aside(dir)?.display().to_string(),
                false => "registry-set-aside-TIME.db".to_owned(),
            };
            format!("{error}: it is set aside as {aside}")
        }
        Err(error) => return Err(explain_registry_error(dir, error)),
    };
    if apply {
        Registry::open(dir)?;
    }
    let only = if order.new_registry { "" } else { "only with --new-registry: " };
    Ok(Some(format!(
        "{only}{why}, and an empty one takes its place: no datasource and no key is known, every datasource has to be created \
         again, and every device needs another key. Records in the log stay. The next start writes another admin.key"
    )))
}
