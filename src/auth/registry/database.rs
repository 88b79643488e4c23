//! `registry.db`: the registry on disk, in SQLite. Datasources and keys are read once, at start; after
//! that the file is written with each change. The path of a message never touches it.
//!
//! **Durability.** Each change is one transaction, and is on the disk when the call that makes it
//! returns. That is `journal_mode = WAL` with `synchronous = FULL`: the commit is one append
//! to `registry.db-wal` and one sync of it. (`WAL` with `NORMAL` syncs only at checkpoints; `DELETE`
//! with `FULL` commits by unlinking the journal and leaves that unsynced, so that a loss of power can
//! bring a revoked key back, and with `EXTRA` a commit takes four syncs instead of one.)
//!
//! **One owner.** The file is locked (`locking_mode = EXCLUSIVE`) as long as it is open. A write by
//! another program would not reach the live view: a key that somebody deleted by hand would keep
//! working. So other programs are locked out, as is a second gateway on the same directory.
//!
//! **In a cluster** the database is only in memory ([`RegistryDatabase::in_memory`]), a copy that every node
//! has.
//!
//! **Format.** `user_version` is the version of the format. A file of an older version is migrated step by
//! step, in one transaction.
//!
//! ```sql
//! datasources (id TEXT, name TEXT, created_at INTEGER, limits TEXT, schemas TEXT, incarnation INTEGER,
//!              event_time TEXT)
//! keys        (digest BLOB, datasource TEXT, scopes TEXT, label TEXT,
//!              created_at INTEGER, expires_at INTEGER, revoked_at INTEGER, ended TEXT,
//!              replaces TEXT, replaced_by TEXT, grace_ends_at INTEGER, limits TEXT, incarnation INTEGER)
//! usage       (key_id TEXT, accepted INTEGER, refused INTEGER, "offset" INTEGER, users TEXT)
//! audit       (id INTEGER, at INTEGER, who TEXT, address TEXT, action TEXT, datasource TEXT,
//!              key_id TEXT, what TEXT)
//! leaks       (version INTEGER, datasource TEXT, key_id TEXT, since INTEGER, below INTEGER, at INTEGER)
//! incarnations (version INTEGER, datasource TEXT, incarnation INTEGER, event TEXT, name TEXT,
//!              created_at INTEGER, first_offset INTEGER, since INTEGER, at INTEGER)
//! secrets     (name TEXT, value BLOB)
//! ```
//!
//! Times are microseconds since the Unix epoch, in UTC. `scopes` reads `ingest,subscribe`. The
//! datasource of a key for all of them is `*`. A key id is the first 6 bytes of the digest, which is
//! the primary key, so an id is found by a range search; other columns hold ids as 12 hex characters. A
//! revoked key's row stays: its id is in the records written under it, and is never given to another
//! key. `ended` is one word that says why a key ended. `limits`, `schemas`, `event_time`, `users` and
//! `what` are JSON.
//! `leaks` has every rule about the records of a leaked key that was ever made, see
//! [`LeakRow`](super::leak_rules::LeakRow), and `incarnations` what has happened to the incarnations of datasources,
//! see [`IncarnationRow`](super::incarnations::IncarnationRow); both share their versions, which count from 1, and
//! nothing is deleted. The `incarnation` of a key is NULL for the first one, until the key dies with its datasource.
//! `secrets` has what access tokens are signed with, once there is one (`token_secret.rs`).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use headgate_format::key::Digest;
use rusqlite::Connection;

use super::error::{REGISTRY_FILE_NAME, RegistryError};
use super::replica::{RegistryReplica, RegistryRevision};
use super::rows::RegistryRow;
use super::transaction::RegistryTransaction;
use crate::message::DatasourceId;
use crate::sqlite::{SqliteProfile, check_write_ahead_log};

pub(super) const REGISTRY_DATABASE: SqliteProfile = SqliteProfile {
    migrations: &REGISTRY_MIGRATIONS,
    is_exclusive: true,
    is_checked: true,
    open_lock_wait_max: Duration::from_secs(1),
    lock_wait_max: Duration::from_secs(1),
    ..SqliteProfile::SHARED
};

/// One migration from each version to the next; the first starts from an empty file.
const REGISTRY_MIGRATIONS: [&str; 6] = [
    "CREATE TABLE datasources (
        id         TEXT PRIMARY KEY,
        name       TEXT NOT NULL,
        created_at INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE keys (
        digest     BLOB PRIMARY KEY CHECK (length(digest) = 32),
        datasource TEXT NOT NULL,
        scopes     TEXT NOT NULL,
        label      TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER,
        revoked_at INTEGER
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX keys_of_datasource ON keys (datasource) WHERE revoked_at IS NULL;",
    "ALTER TABLE datasources ADD COLUMN limits TEXT;
    ALTER TABLE datasources ADD COLUMN schemas TEXT;
    ALTER TABLE keys ADD COLUMN ended TEXT;
    ALTER TABLE keys ADD COLUMN replaces TEXT;
    ALTER TABLE keys ADD COLUMN replaced_by TEXT;
    ALTER TABLE keys ADD COLUMN grace_ends_at INTEGER;
    ALTER TABLE keys ADD COLUMN limits TEXT;
    CREATE TABLE usage (
        key_id   TEXT PRIMARY KEY,
        accepted INTEGER NOT NULL,
        refused  INTEGER NOT NULL,
        \"offset\" INTEGER,
        users    TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE audit (
        id         INTEGER PRIMARY KEY,
        at         INTEGER NOT NULL,
        who        TEXT NOT NULL,
        address    TEXT,
        action     TEXT NOT NULL,
        datasource TEXT,
        key_id     TEXT,
        what       TEXT NOT NULL
    ) STRICT;
    CREATE INDEX audit_by_time ON audit (at);",
    "CREATE TABLE leaks (
        version    INTEGER PRIMARY KEY,
        datasource TEXT NOT NULL,
        key_id     TEXT NOT NULL,
        since      INTEGER,
        below      INTEGER,
        at         INTEGER NOT NULL
    ) STRICT;",
    "ALTER TABLE datasources ADD COLUMN incarnation INTEGER NOT NULL DEFAULT 1;
    ALTER TABLE keys ADD COLUMN incarnation INTEGER;
    CREATE INDEX revoked_keys_of_datasource ON keys (datasource) WHERE revoked_at IS NOT NULL;
    CREATE TABLE incarnations (
        version      INTEGER PRIMARY KEY,
        datasource   TEXT NOT NULL,
        incarnation  INTEGER NOT NULL,
        event        TEXT NOT NULL,
        name         TEXT,
        created_at   INTEGER,
        first_offset INTEGER,
        since        INTEGER,
        at           INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX incarnations_of_datasource ON incarnations (datasource, incarnation);",
    "ALTER TABLE datasources ADD COLUMN event_time TEXT;",
    "CREATE TABLE secrets (
        name  TEXT PRIMARY KEY,
        value BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;",
];

/// The open database. The registry serialises all changes.
pub(super) struct RegistryDatabase {
    pub(super) connection: Connection,
    pub(super) path: PathBuf,
    /// The other nodes' registries, in a cluster.
    replica: Option<Arc<dyn RegistryReplica>>,
    /// The newest cluster revision that this database has.
    applied: RegistryRevision,
}

impl RegistryDatabase {
    /// Opens or creates `dir/registry.db`, readable by its owner only, and checks its version and its
    /// pages.
    pub(super) fn open(dir: &Path) -> Result<Self, RegistryError> {
        let path = dir.join(REGISTRY_FILE_NAME);
        let connection = REGISTRY_DATABASE.open(&path)?;
        Ok(Self { connection, path, replica: None, applied: 0 })
    }

    /// Ensures that `dir/registry.db` is there if its write-ahead log is.
    pub(super) fn check_write_ahead_log(dir: &Path) -> Result<(), RegistryError> {
        Ok(check_write_ahead_log(&dir.join(REGISTRY_FILE_NAME))?)
    }

    /// An in-memory database for a node of a cluster, whose durable registry is the bucket.
    pub(super) fn in_memory() -> Result<Self, RegistryError> {
        let connection = REGISTRY_DATABASE.open_in_memory()?;
        let path = PathBuf::from("the cluster's registry");
        Ok(Self { connection, path, replica: None, applied: 0 })
    }

    /// Publishes every later change to the cluster before it is committed.
    pub(super) fn join(&mut self, replica: Arc<dyn RegistryReplica>) {
        self.replica = Some(replica);
    }

    /// The newest cluster revision that this database has.
    pub(super) fn applied(&self) -> RegistryRevision {
        self.applied
    }

    /// Writes the rows of other nodes up to a revision. With `all`, they replace all existing rows.
    pub(super) fn take_over(
        &mut self,
        rows: &[&RegistryRow],
        revision: RegistryRevision,
        all: bool,
    ) -> Result<(), RegistryError> {
        let transaction = self.connection.transaction()?;
        if all {
            transaction.execute_batch(
                "DELETE FROM datasources; DELETE FROM keys; DELETE FROM audit; DELETE FROM leaks;
                 DELETE FROM incarnations; DELETE FROM secrets",
            )?;
        }
        for row in rows {
            row.write(&transaction)?;
        }
        transaction.commit()?;
        self.applied = revision;
        Ok(())
    }

    /// Notes that this database has everything in the cluster's registry up to this revision.
    pub(super) fn caught_up(&mut self, revision: RegistryRevision) {
        self.applied = self.applied.max(revision);
    }

    /// Every row that is there, but keys and the audit.
    pub(super) fn rows_but_keys(&self) -> Result<Vec<RegistryRow>, RegistryError> {
        let connection = &self.connection;
        let mut select = connection.prepare("SELECT id FROM datasources")?;
        let ids = select.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<Vec<String>>>()?;
        let mut rows = Vec::with_capacity(ids.len());
        for id in ids {
            let id = DatasourceId::new(&id).map_err(|error| RegistryError::InvalidName(error.to_string()))?;
            rows.push(RegistryRow::read_datasource(connection, &id)?);
        }
        let versions = |table: &str| {
            let mut select = connection.prepare(&format!("SELECT version FROM {table}"))?;
            let versions = select.query_map([], |row| row.get::<_, i64>(0).map(i64::cast_unsigned))?;
            versions.collect::<rusqlite::Result<Vec<u64>>>()
        };
        for version in versions("leaks")? {
            rows.push(RegistryRow::read_leak(connection, version)?);
        }
        for version in versions("incarnations")? {
            rows.push(RegistryRow::read_incarnation(connection, version)?);
        }
        Ok(rows)
    }

    /// The rows of at most `max` keys, dead ones included, behind a digest.
    pub(super) fn key_rows_after(
        &self,
        after: Option<Digest>,
        max: usize,
    ) -> Result<Vec<RegistryRow>, RegistryError> {
        let mut select = self.connection.prepare_cached(
            "SELECT digest FROM keys WHERE ?1 IS NULL OR digest > ?1 ORDER BY digest LIMIT ?2",
        )?;
        let bounds = rusqlite::params![after.map(|digest| digest.0), i64::try_from(max).unwrap_or(i64::MAX)];
        let digests = select.query_map(bounds, |row| row.get::<_, [u8; 32]>(0))?;
        let mut rows = Vec::new();
        for digest in digests {
            rows.push(RegistryRow::read_key(&self.connection, Digest(digest?).key_id())?);
        }
        Ok(rows)
    }

    /// Begins a change, which takes effect when it is committed.
    pub(super) fn begin(&mut self) -> Result<RegistryTransaction<'_>, RegistryError> {
        let transaction = self.connection.transaction()?;
        Ok(RegistryTransaction::new(transaction, self.replica.as_deref(), &mut self.applied))
    }

    /// The row of a key, as the nodes of a cluster exchange it.
    #[cfg(test)]
    pub(super) fn row_of(&self, id: crate::message::KeyId) -> RegistryRow {
        RegistryRow::read_key(&self.connection, id).expect("there")
    }

    /// Makes every change fail as on a failed disk, or succeed again.
    #[cfg(test)]
    pub(super) fn refuse_changes(&self, refuse: bool) {
        self.connection.pragma_update(None, "query_only", refuse).expect("a setting");
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use rusqlite::types::Value;

    use super::*;
    use crate::auth::{Actor, ApiKey, Registry, Scope, Scopes};
    use crate::message::{DatasourceId, KeyId};
    use crate::sqlite::SqliteError;

    fn written_by_hand(dir: &Path, sql: &str) {
        let connection = Connection::open(dir.join("registry.db")).expect("opens");
        connection.execute_batch(sql).expect("runs");
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("exists").permissions().mode() & 0o777
    }

    #[test]
    fn only_its_owner_can_read_the_registry() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("registry.db");
        let database = RegistryDatabase::open(dir.path()).expect("opens");
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(&path.with_extension("db-wal")), 0o600);
        drop(database);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).expect("changed");
        drop(RegistryDatabase::open(dir.path()).expect("opens again"));
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn a_change_is_synced_before_it_counts() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let database = RegistryDatabase::open(dir.path()).expect("opens");
        let set = |name| database.connection.pragma_query_value(None, name, |row| row.get::<_, Value>(0));
        assert_eq!(set("journal_mode").expect("set"), Value::Text("wal".to_owned()));
        assert_eq!(set("synchronous").expect("set"), Value::Integer(2), "2 is FULL");
    }

    #[test]
    fn a_registry_has_one_owner() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("registry.db");
        let first = RegistryDatabase::open(dir.path()).expect("opens");
        let second = RegistryDatabase::open(dir.path()).err().expect("the first one holds it");
        assert!(matches!(second, RegistryError::Database(SqliteError::Busy { .. })), "{second}");
        assert!(second.to_string().contains(&path.display().to_string()), "{second}");
        drop(first);
        assert!(RegistryDatabase::open(dir.path()).is_ok());
    }

    #[test]
    fn a_newer_format_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().expect("temporary directory");
        drop(RegistryDatabase::open(dir.path()).expect("opens"));
        written_by_hand(dir.path(), "PRAGMA user_version = 7");
        let error = RegistryDatabase::open(dir.path()).err().expect("newer");
        assert!(
            matches!(error, RegistryError::Database(SqliteError::Newer { version: 7, known: 6, .. })),
            "{error}"
        );
        let connection = Connection::open(dir.path().join("registry.db")).expect("opens");
        assert_eq!(version(&connection), 7);
    }

    fn version(connection: &Connection) -> i64 {
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).expect("has one")
    }

    #[test]
    fn a_file_that_a_crash_left_empty_becomes_a_registry() {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::write(dir.path().join("registry.db"), b"").expect("written");
        let database = RegistryDatabase::open(dir.path()).expect("opens");
        assert_eq!(version(&database.connection), REGISTRY_DATABASE.newest_version());
    }

    #[test]
    fn damage_is_reported_with_the_file_and_never_read_past() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("registry.db");
        let registry = Registry::open(dir.path()).expect("opens");
        for _ in 0..200 {
            registry
                .create_key(
                    &Actor::SYSTEM,
                    &DatasourceId::all(),
                    "",
                    Scopes::from_slice(&[Scope::Ingest]),
                    None,
                )
                .expect("created");
        }
        drop(registry);
        let sound = fs::read(&path).expect("readable");
        let pages = sound.len() / 4096;
        assert!(pages > 4, "{pages} pages");

        let mut torn = sound.clone();
        torn[3 * 4096..4 * 4096].fill(0xa5);
        let mut no_database = sound.clone();
        no_database[..16].fill(b'x');
        for damaged in [torn, no_database, sound[..sound.len() - 4096].to_vec()] {
            fs::write(&path, damaged).expect("written");
            let error = Registry::open(dir.path()).expect_err("damaged");
            assert!(matches!(error, RegistryError::Database(SqliteError::Damaged { .. })), "{error}");
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        }
        fs::write(&path, sound).expect("written");
        assert_eq!(Registry::open(dir.path()).expect("sound").key_count(), 200);
    }

    #[test]
    fn a_row_that_makes_no_sense_is_damage() {
        let row = "INSERT INTO keys (digest, datasource, scopes, label, created_at)
                   VALUES (zeroblob(32), '*', 'ingest', '', 0)";
        let dir = tempfile::tempdir().expect("temporary directory");
        drop(RegistryDatabase::open(dir.path()).expect("opens"));
        written_by_hand(dir.path(), row);
        assert_eq!(Registry::open(dir.path()).expect("a row that does").key_count(), 1);
        for (change, named) in [
            ("UPDATE keys SET datasource = '*', scopes = 'root'", "scopes"),
            ("INSERT INTO datasources (id, name, created_at) VALUES ('Not a slug', 'x', 0)", "datasource id"),
        ] {
            written_by_hand(dir.path(), change);
            let error = Registry::open(dir.path()).expect_err("makes no sense");
            assert!(matches!(error, RegistryError::Database(SqliteError::Damaged { .. })), "{error}");
            assert!(error.to_string().contains(named), "{error}");
        }
    }

    #[test]
    fn an_id_is_known_as_long_as_there_is_a_row_with_it() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Registry::open(dir.path()).expect("opens");
        let (datasource, key, _) = registry
            .create_datasource(&Actor::SYSTEM, None, "a", Scopes::from_slice(&[Scope::Ingest]))
            .expect("created");
        registry.delete_datasource(&Actor::SYSTEM, &datasource.id).expect("deleted");
        drop(registry);
        let database = RegistryDatabase::open(dir.path()).expect("opens");
        assert!(database.has_key_id(key.id).expect("read"));
        let [first @ .., last] = key.id.0;
        for near in [last.wrapping_sub(1), last.wrapping_add(1)] {
            let [a, b, c, d, e] = first;
            assert!(!database.has_key_id(KeyId([a, b, c, d, e, near])).expect("read"));
        }
        assert!(!database.has_key_id(ApiKey::generate().digest().key_id()).expect("read"));
    }
}
