//! The data directory: one gateway at a time, one log backend for ever, and the file with the first admin key.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::bail;
use tracing::{error, info, warn};

use super::member;
use super::start_advice::explain_io_error;
use crate::auth::key::is_well_formed;
use crate::auth::{Actor, Registry, Scope, Scopes};
use crate::backup::restore::describe_unusable;
use crate::config::LogBackend;
use crate::message::{DatasourceId, Offset};

/// The file with the secret of the first admin key.
pub(super) const ADMIN_KEY_FILE: &str = "admin.key";
/// The directory of the embedded log, in the data directory.
pub(super) const LOG_DIRECTORY: &str = "log";
/// The label of the key whose secret is in [`ADMIN_KEY_FILE`].
pub(super) const ADMIN_KEY_LABEL: &str = "admin.key";

/// Creates the directory, and ensures that it may be used and no other gateway uses it: see [`make_and_lock`].
pub(super) fn lock_directory(dir: &Path) -> anyhow::Result<File> {
    check_is_whole(dir)?;
    make_and_lock(dir)
}

/// Creates a directory, readable by its owner only, and ensures that no gateway uses it. What is in it already becomes
/// readable by its owner only too.
pub(super) fn make_and_lock(dir: &Path) -> anyhow::Result<File> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| explain_io_error("cannot make the data directory", dir, &error))?;
    let lock = lock_existing(dir)?;
    for (path, is_own) in
        [(dir.to_owned(), is_own_file as fn(&str) -> bool), (dir.join(LOG_DIRECTORY), is_log_file)]
    {
        // Whoever may write the directory need not be its owner, for example of a volume in a container.
        if let Err(error) = set_private_modes(&path, is_own)
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(%error, path = %path.display(), "the data directory may be readable by others than its owner");
        }
    }
    Ok(lock)
}

/// Whether Headgate makes a file of this name in the data directory. Others may have put more there.
fn is_own_file(name: &str) -> bool {
    let is_database = ["registry", "records", "retained", "sessions", "quarantine"]
        .iter()
        .any(|stem| name.strip_prefix(stem).is_some_and(|rest| rest.starts_with(['.', '-'])));
    is_database
        || matches!(name, "LOCK" | "admin.key" | "log.id" | "log.parents" | "node")
        || matches!(name, "history.json" | "registry-copy.json" | "cursors-set-aside.jsonl")
}

/// Whether the log makes a file of this name in its directory.
fn is_log_file(name: &str) -> bool {
    name.ends_with(".log") || name.ends_with(".spare")
}

/// Takes from everybody but the owner what they may do with a directory and Headgate's files in it. Links are
/// left as they are, and so are files that are not Headgate's.
fn set_private_modes(dir: &Path, is_own: fn(&str) -> bool) -> io::Result<()> {
    if std::fs::symlink_metadata(dir)?.is_symlink() {
        return Ok(());
    }
    std::fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() && entry.file_name().to_str().is_some_and(is_own) {
            std::fs::set_permissions(entry.path(), Permissions::from_mode(0o600))?;
        }
    }
    Ok(())
}

/// Ensures that a directory is no backup, and that no restore into it was interrupted.
pub(super) fn check_is_whole(dir: &Path) -> anyhow::Result<()> {
    describe_unusable(dir).map_or(Ok(()), |why| bail!("{why}"))
}

/// Ensures that no gateway uses a directory that is there. Whatever this process makes from here on is its
/// owner's alone.
pub(super) fn lock_existing(dir: &Path) -> anyhow::Result<File> {
    // SAFETY: umask(2) takes an integer, and always succeeds.
    unsafe { libc::umask(0o077) };
    let path = dir.join("LOCK");
    let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let lock = lock.map_err(|error| explain_io_error("cannot open", &path, &error))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::WouldBlock) => bail!(
            "another gateway is using the data directory {} (fuser {} names it): stop that one, or use another directory \
             (--data-dir)",
            dir.display(),
            path.display()
        ),
        Err(std::fs::TryLockError::Error(error)) => Err(explain_io_error("cannot lock", &path, &error)),
    }
}

/// Ensures that a data directory keeps the log backend that it was created with: its records and sessions
/// refer to that log's offsets.
pub(super) fn check_log_backend(dir: &Path, backend: LogBackend) -> anyhow::Result<()> {
    let (other, words) = match backend {
        LogBackend::Embedded => {
            (member::NODE_NAME_FILE, "belongs to a gateway of a cluster (log.backend = \"jetstream\")")
        }
        LogBackend::Jetstream => (LOG_DIRECTORY, "has a log of its own (log.backend = \"embedded\")"),
    };
    if dir.join(other).exists() {
        bail!("the data directory {} {words}: use another one", dir.display());
    }
    Ok(())
}

/// Ensures that the registry of a log that has records is not a new one: without the datasources and keys that
/// it had, every device would be refused, and most do not ask again. Call it before the registry is opened,
/// which makes one.
pub(super) fn check_registry_is_there(dir: &Path, records: Offset) -> anyhow::Result<()> {
    let is_new = records == 0 && !dir.join("records.db").exists() && !dir.join("sessions.db").exists();
    if is_new || Registry::is_there(dir) {
        return Ok(());
    }
    let dir = dir.display();
    bail!(
        "registry.db is missing or empty in {dir}, and there is a log beside it, up to offset {records}, or what was stored of one: without it \
         no datasource and no key is known, and every device would be refused. Put it back from a backup, or \
         begin anew on purpose (headgate repair --data-dir {dir} --new-registry --yes): then every datasource \
         has to be created again, and every device needs another key"
    )
}

/// Creates the admin key of a new data directory. If an operator removed the file, or a full disk or a loss of
/// power left it empty or cut, a new key replaces the old one: this is how a lost or leaked admin key is
/// replaced. A registry that has keys serves devices also if that fails.
pub(super) fn ensure_admin_key(registry: &Registry, path: &Path) -> anyhow::Result<()> {
    match make_admin_key(registry, path) {
        Err(error) if registry.key_count() > 0 => {
            error!("devices are served, but there is no new admin key before the next start: {error}");
            Ok(())
        }
        made => made,
    }
}

fn make_admin_key(registry: &Registry, path: &Path) -> anyhow::Result<()> {
    let all = DatasourceId::all();
    match std::fs::read(path) {
        // With a registry that has no key at all, the file is from another one.
        Ok(text) if is_well_formed(text.trim_ascii()) && registry.key_count() > 0 => return Ok(()),
        Ok(_) => {
            warn!(path = %path.display(), "it holds no key of this registry: another one takes its place")
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(explain_io_error("cannot read", path, &error)),
    }
    let earlier: Vec<_> =
        registry.keys(&all).into_iter().filter(|key| *key.label == *ADMIN_KEY_LABEL).collect();
    let admin = Scopes::from_slice(&[Scope::Admin]);
    let (key, secret) = registry.create_key(&Actor::SYSTEM, &all, ADMIN_KEY_LABEL, admin, None)?;
    if let Err(error) = write_secret_beside(path, secret.expose()) {
        // Nobody has its secret. The last one stays, and the next start ends it.
        drop(registry.revoke_key(&Actor::SYSTEM, &all, key.id));
        return Err(explain_io_error("cannot write", path, &error));
    }
    for key in &earlier {
        registry.revoke_key(&Actor::SYSTEM, &all, key.id)?;
    }
    if let Some(why) = earlier.iter().find_map(|key| registry.describe_unwritten(&all, Some(key.id))) {
        bail!("the end of the earlier admin key is not written yet: {why}");
    }
    // Last: as long as it is not there, the next start does all of this again.
    take_place(path).map_err(|error| explain_io_error("cannot write", path, &error))?;
    info!(key_id = %key.id, path = %path.display(), "made an admin key");
    Ok(())
}

/// Gives a new file to the owner of the one that it replaces, or of the directory: whoever renews the gateway's files with a
/// command may be root. Where root may not do that, as in some containers, it stays root's.
fn keep_owner(file: &File, path: &Path) -> io::Result<()> {
    let own = file.metadata()?;
    let owner = std::fs::metadata(path).or_else(|_| std::fs::metadata(path.parent().unwrap_or(path)));
    if let Ok(owner) = owner
        && own.uid() == 0
        && (owner.uid(), owner.gid()) != (own.uid(), own.gid())
        && let Err(error) = fchown(file, Some(owner.uid()), Some(owner.gid()))
    {
        warn!(%error, path = %path.display(), "the file is root's: whoever owns its directory cannot read it");
    }
    Ok(())
}

/// Writes a secret, readable by its owner only, whole or not at all. It replaces a file that is there.
pub(crate) fn write_secret(path: &Path, secret: &str) -> io::Result<()> {
    write_secret_beside(path, secret)?;
    take_place(path)
}

/// Where a secret is before it takes its place.
fn place_beside(path: &Path) -> PathBuf {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    beside.into()
}

/// Writes a secret beside its place.
fn write_secret_beside(path: &Path, secret: &str) -> io::Result<()> {
    let beside = place_beside(path);
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    keep_owner(&file, path)?;
    writeln!(file, "{secret}")?;
    file.sync_all()
}

/// Puts the secret beside it in its place.
fn take_place(path: &Path) -> io::Result<()> {
    std::fs::rename(place_beside(path), path)?;
    File::open(path.parent().unwrap_or(path))?.sync_all()
}
