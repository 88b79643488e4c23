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
//! **In a cluster** the database is only in memory ([`RegistryDatabase::in_memory`]), a copy that every node has.
//!
//! **Format.** `user_version` is the version of the format. A file of an older version is migrated step by step, in
//! one transaction.
//!
//! ```sql
//! datasources (id TEXT, name TEXT, created_at INTEGER, limits TEXT, schemas TEXT)
//! keys        (digest BLOB, datasource TEXT, scopes TEXT, label TEXT,
//!              created_at INTEGER, expires_at INTEGER, revoked_at INTEGER, ended TEXT,
//!              replaces TEXT, replaced_by TEXT, grace_ends_at INTEGER, limits TEXT)
//! usage       (key_id TEXT, accepted INTEGER, refused INTEGER, "offset" INTEGER, users TEXT)
//! audit       (id INTEGER, at INTEGER, who TEXT, address TEXT, action TEXT, datasource TEXT,
//!              key_id TEXT, what TEXT)
//! ```
//!
//! Times are microseconds since the Unix epoch, in UTC. `scopes` reads `ingest,subscribe`. The
//! datasource of a key for all of them is `*`. A key id is the first 6 bytes of the digest, which is
//! the primary key, so an id is found by a range search; other columns hold ids as 12 hex characters. A
//! revoked key's row stays: its id is in the records written under it, and is never given to another
//! key. `ended` is one word that says why a key ended. `limits`, `schemas`, `users` and `what` are JSON.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::types::FromSqlError;
use rusqlite::{Connection, OptionalExtension, params};
use serde_json::value::RawValue;

use super::audit::{AuditEntry, AuditQuery};
use super::change::RegistryTransaction;
use super::live::{Datasource, Rotation};
use super::registry::RegistryError;
use super::replica::{RegistryReplica, RegistryRevision};
use super::rows::RegistryRow;
use super::setting::JsonSetting;
use super::usage::KeyUsage;
use super::{Digest, Scopes};
use crate::message::{DatasourceId, KeyId, TimeMicros};
use crate::sqlite::{SqliteError, SqliteProfile};

/// The file's name in the data directory.
pub(super) const REGISTRY_FILE_NAME: &str = "registry.db";

const REGISTRY_DATABASE: SqliteProfile = SqliteProfile {
    migrations: &REGISTRY_MIGRATIONS,
    is_exclusive: true,
    is_private: true,
    is_checked: true,
    open_lock_wait_max: Duration::from_secs(1),
    lock_wait_max: Duration::from_secs(1),
    ..SqliteProfile::SHARED
};

/// One migration from each version to the next; the first starts from an empty file.
const REGISTRY_MIGRATIONS: [&str; 2] = [
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
];

/// The open database. The registry serialises all changes.
pub(super) struct RegistryDatabase {
    connection: Connection,
    path: PathBuf,
    /// The other nodes' registries, in a cluster.
    replica: Option<Arc<dyn RegistryReplica>>,
    /// The newest cluster revision that this database has.
    applied: RegistryRevision,
}

/// One row of `keys`.
pub(super) struct StoredKey<'a> {
    pub(super) digest: Digest,
    pub(super) datasource: &'a str,
    pub(super) scopes: Scopes,
    pub(super) label: &'a str,
    pub(super) created_at: TimeMicros,
    pub(super) expires_at: Option<TimeMicros>,
    pub(super) revoked: bool,
    /// The key has ended, whether it was revoked or expired.
    pub(super) ended: bool,
    pub(super) rotation: Rotation,
    pub(super) limits: Option<&'a str>,
}

impl RegistryDatabase {
    /// Opens or creates `dir/registry.db`, readable by its owner only, and checks its version and its
    /// pages.
    pub(super) fn open(dir: &Path) -> Result<Self, RegistryError> {
        let path = dir.join(REGISTRY_FILE_NAME);
        let connection = REGISTRY_DATABASE.open(&path)?;
        Ok(Self { connection, path, replica: None, applied: 0 })
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
            transaction.execute_batch("DELETE FROM datasources; DELETE FROM keys; DELETE FROM audit")?;
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

    /// Begins a change, which takes effect when it is committed.
    pub(super) fn begin(&mut self) -> Result<RegistryTransaction<'_>, RegistryError> {
        let transaction = self.connection.transaction()?;
        Ok(RegistryTransaction::new(transaction, self.replica.as_deref(), &mut self.applied))
    }

    /// Calls `each` with every datasource.
    pub(super) fn for_each_datasource(&self, mut each: impl FnMut(Datasource)) -> Result<(), RegistryError> {
        let mut read_all = || -> rusqlite::Result<()> {
            let mut select =
                self.connection.prepare("SELECT id, name, created_at, limits, schemas FROM datasources")?;
            let mut rows = select.query([])?;
            while let Some(row) = rows.next()? {
                let id = DatasourceId::new(row.get_ref(0)?.as_str()?).map_err(FromSqlError::other)?;
                each(Datasource {
                    id,
                    name: row.get_ref(1)?.as_str()?.into(),
                    created_at: row.get(2)?,
                    limits: JsonSetting::new(row.get_ref(3)?.as_str_or_null()?),
                    schemas: JsonSetting::new(row.get_ref(4)?.as_str_or_null()?),
                });
            }
            Ok(())
        };
        read_all().map_err(|error| SqliteError::from_sqlite(&error, &self.path).into())
    }

    /// The number of datasources.
    pub(super) fn datasource_count(&self) -> Result<usize, RegistryError> {
        self.count("SELECT count(*) FROM datasources")
    }

    /// The number of keys, revoked ones included.
    pub(super) fn key_count(&self) -> Result<usize, RegistryError> {
        self.count("SELECT count(*) FROM keys")
    }

    fn count(&self, select: &str) -> Result<usize, RegistryError> {
        let count = self.connection.query_row(select, [], |row| row.get::<_, i64>(0));
        let count = count.map_err(|error| SqliteError::from_sqlite(&error, &self.path))?;
        Ok(usize::try_from(count).expect("a count is not negative"))
    }

    /// Calls `each` with every key. An error of `each` means that the row makes no sense: damage.
    pub(super) fn for_each_key<E>(
        &self,
        mut each: impl FnMut(StoredKey<'_>) -> Result<(), E>,
    ) -> Result<(), RegistryError>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let mut read_all = || -> rusqlite::Result<()> {
            let mut select = self.connection.prepare(
                "SELECT digest, datasource, scopes, label, created_at, expires_at, revoked_at IS NOT NULL,
                        limits, replaces, replaced_by, grace_ends_at, ended IS NOT NULL
                 FROM keys",
            )?;
            let mut rows = select.query([])?;
            while let Some(row) = rows.next()? {
                let stored = StoredKey {
                    digest: Digest(row.get(0)?),
                    datasource: row.get_ref(1)?.as_str()?,
                    scopes: row.get_ref(2)?.as_str()?.parse().map_err(FromSqlError::other)?,
                    label: row.get_ref(3)?.as_str()?,
                    created_at: row.get(4)?,
                    expires_at: row.get(5)?,
                    revoked: row.get(6)?,
                    ended: row.get(11)?,
                    limits: row.get_ref(7)?.as_str_or_null()?,
                    rotation: Rotation {
                        replaces: row.get_ref(8)?.as_str_or_null()?.map(parse_key_id).transpose()?,
                        replaced_by: match row.get_ref(9)?.as_str_or_null()? {
                            Some(id) => Some((parse_key_id(id)?, row.get(10)?)),
                            None => None,
                        },
                    },
                };
                each(stored).map_err(FromSqlError::other)?;
            }
            Ok(())
        };
        read_all().map_err(|error| SqliteError::from_sqlite(&error, &self.path).into())
    }

    /// Whether a key with this id exists or existed.
    pub(super) fn has_key_id(&self, id: KeyId) -> Result<bool, RegistryError> {
        let (first, last) = digest_range(id);
        let known = self
            .connection
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM keys WHERE digest BETWEEN ?1 AND ?2)")?
            .query_row(params![first, last], |row| row.get(0))?;
        Ok(known)
    }

    /// When a key was revoked and, in one word, why. `None` if it was not revoked.
    pub(super) fn revocation_of(
        &self,
        id: KeyId,
    ) -> Result<Option<(TimeMicros, Option<String>)>, RegistryError> {
        let (first, last) = digest_range(id);
        let ended = self
            .connection
            .prepare_cached(
                "SELECT revoked_at, ended FROM keys WHERE digest BETWEEN ?1 AND ?2 AND revoked_at IS NOT NULL",
            )?
            .query_row(params![first, last], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        Ok(ended)
    }

    /// The stored usage of a key.
    pub(super) fn usage(&self, id: KeyId) -> Result<KeyUsage, RegistryError> {
        let mut select = self
            .connection
            .prepare_cached("SELECT accepted, refused, \"offset\", users FROM usage WHERE key_id = ?1")?;
        let used = select.query_row([id.to_string()], |row| {
            let users = serde_json::from_str(row.get_ref(3)?.as_str()?);
            Ok(KeyUsage {
                accepted: row.get::<_, i64>(0)?.unsigned_abs(),
                refused: row.get::<_, i64>(1)?.unsigned_abs(),
                offset: row.get::<_, Option<i64>>(2)?.map(i64::unsigned_abs),
                users: users.map_err(FromSqlError::other)?,
            })
        });
        Ok(used.optional()?.unwrap_or_default())
    }

    /// A page of the audit, oldest first.
    pub(super) fn audit_entries(&self, page: &AuditQuery) -> Result<Vec<AuditEntry>, RegistryError> {
        let mut select = self.connection.prepare_cached(
            "SELECT id, at, who, address, action, datasource, key_id, what FROM audit
             WHERE id > ?1 AND at >= ?2 AND at < ?3 ORDER BY id LIMIT ?4",
        )?;
        let limit = i64::try_from(page.limit).unwrap_or(i64::MAX);
        let (from, to) = (page.from.unwrap_or(i64::MIN), page.to.unwrap_or(i64::MAX));
        let entries = select.query_map(params![page.after, from, to, limit], |row| {
            Ok(AuditEntry {
                id: row.get(0)?,
                at: row.get(1)?,
                who: row.get(2)?,
                address: row.get(3)?,
                action: row.get(4)?,
                datasource: row.get(5)?,
                key_id: row.get(6)?,
                what: RawValue::from_string(row.get(7)?).map_err(FromSqlError::other)?,
            })
        })?;
        Ok(entries.collect::<Result<_, _>>()?)
    }

    /// Makes every change fail as on a failed disk, or succeed again.
    #[cfg(test)]
    pub(super) fn refuse_changes(&self, refuse: bool) {
        self.connection.pragma_update(None, "query_only", refuse).expect("a setting");
    }
}

/// Parses a key id from a column.
fn parse_key_id(text: &str) -> Result<KeyId, FromSqlError> {
    KeyId::parse(text).map_err(FromSqlError::other)
}

/// The first and the last digest that a key with this id can have.
pub(super) fn digest_range(id: KeyId) -> ([u8; 32], [u8; 32]) {
    let (mut first, mut last) = ([0; 32], [0xff; 32]);
    first[..id.0.len()].copy_from_slice(&id.0);
    last[..id.0.len()].copy_from_slice(&id.0);
    (first, last)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use rusqlite::types::Value;

    use super::*;
    use crate::auth::{Actor, ApiKey, Registry, Scope};

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
        written_by_hand(dir.path(), "PRAGMA user_version = 3");
        let error = RegistryDatabase::open(dir.path()).err().expect("newer");
        assert!(
            matches!(error, RegistryError::Database(SqliteError::Newer { version: 3, known: 2, .. })),
            "{error}"
        );
        let connection = Connection::open(dir.path().join("registry.db")).expect("opens");
        assert_eq!(version(&connection), 3);
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
            ("UPDATE keys SET datasource = 'gone'", "gone"),
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
