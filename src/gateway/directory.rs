//! The data directory: one gateway at a time, one log backend for ever, and the file with the first admin key.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, bail};
use tracing::info;

use super::member;
use crate::auth::{Actor, Registry, Scope, Scopes};
use crate::config::LogBackend;
use crate::message::DatasourceId;

/// The file with the secret of the first admin key.
pub(super) const ADMIN_KEY_FILE: &str = "admin.key";
/// The label of the key whose secret is in [`ADMIN_KEY_FILE`].
pub(super) const ADMIN_KEY_LABEL: &str = "admin.key";

/// Creates the directory, readable by its owner only, and ensures that no other gateway uses it.
pub(super) fn lock_directory(dir: &Path) -> anyhow::Result<File> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.with_context(|| format!("cannot make the data directory {}", dir.display()))?;
    let path = dir.join("LOCK");
    let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let lock = lock.with_context(|| format!("cannot open {}", path.display()))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::WouldBlock) => {
            bail!("another gateway is using the data directory {}", dir.display())
        }
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// Ensures that a data directory keeps the log backend that it was created with: its records and sessions
/// refer to that log's offsets.
pub(super) fn check_log_backend(dir: &Path, backend: LogBackend) -> anyhow::Result<()> {
    let (other, words) = match backend {
        LogBackend::Embedded => {
            (member::NODE_NAME_FILE, "belongs to a gateway of a cluster (log.backend = \"jetstream\")")
        }
        LogBackend::Jetstream => ("log", "has a log of its own (log.backend = \"embedded\")"),
    };
    if dir.join(other).exists() {
        bail!("the data directory {} {words}: use another one", dir.display());
    }
    Ok(())
}

/// Creates the admin key of a new data directory. If an operator removed the file, a new key replaces
/// the old one: this is how a lost or leaked admin key is replaced.
pub(super) fn ensure_admin_key(registry: &Registry, path: &Path) -> anyhow::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let all = DatasourceId::all();
    let earlier: Vec<_> =
        registry.keys(&all).into_iter().filter(|key| *key.label == *ADMIN_KEY_LABEL).collect();
    let admin = Scopes::from_slice(&[Scope::Admin]);
    let (key, secret) = registry.create_key(&Actor::SYSTEM, &all, ADMIN_KEY_LABEL, admin, None)?;
    let written =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).and_then(|mut file| {
            writeln!(file, "{}", secret.expose())?;
            file.sync_all()
        });
    written.with_context(|| format!("cannot write {}", path.display()))?;
    for key in earlier {
        registry.revoke_key(&Actor::SYSTEM, &all, key.id)?;
    }
    info!(key_id = %key.id, path = %path.display(), "made an admin key");
    Ok(())
}
