//! `quarantine.db`, where earlier versions of Headgate kept the rules about leaked keys. Its rules are moved
//! into the registry, with the versions that they had there: `records.db` and `retained.db` note which of
//! them they follow.
//!
//! The rules reach the registry in one transaction, and only then is the file removed. After a kill between the
//! two the file is read again and changes nothing: the registry has those versions already.
//!
//! A file that cannot be read stops no start: it stays where it is and is tried again. Until then no rule is added
//! ([`Registry::add_leak_rule`]), because it would get a version that the file has given already.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rusqlite::Connection;
use rusqlite::types::FromSqlError;

use super::Registry;
use super::database::RegistryDatabase;
use super::error::RegistryError;
use super::incarnations::RecordRule;
use super::leak_rules::{LeakRow, parse_owner};
use crate::message::KeyId;
use crate::sqlite::{SqliteError, SqliteProfile};
use crate::trouble::TroubleCell;

/// The file's name in the data directory.
const QUARANTINE_FILE_NAME: &str = "quarantine.db";

/// The one format that the file ever had. It is opened for writing: what a killed gateway left in the write-ahead
/// log has to be read too.
const QUARANTINE_DATABASE: SqliteProfile = SqliteProfile {
    migrations: &["
        CREATE TABLE changes (
            version    INTEGER PRIMARY KEY,
            datasource TEXT NOT NULL,
            key_id     BLOB NOT NULL,
            since_us   INTEGER,
            below      INTEGER,
            made_us    INTEGER NOT NULL
        ) STRICT;
    "],
    is_exclusive: true,
    ..SqliteProfile::SHARED
};

/// The file, until its rules are in the registry.
#[derive(Debug)]
pub(super) struct QuarantineFile {
    dir: PathBuf,
    /// Why they are not.
    trouble: TroubleCell,
}

impl QuarantineFile {
    /// Moves the rules of `dir/quarantine.db` into the registry, if there is such a file. What prevents that is kept
    /// for [`Registry::unread_rules`].
    pub(super) fn open(dir: &Path, database: &mut RegistryDatabase) -> Self {
        let trouble = TroubleCell::new(
            "rules about leaked keys are not in force: their records are handed out",
            "all rules about leaked keys are in force",
        );
        let file = Self { dir: dir.to_owned(), trouble };
        file.try_to_move(database);
        file
    }

    /// Returns the rules that were moved, with their versions.
    fn try_to_move(&self, database: &mut RegistryDatabase) -> Vec<(u64, LeakRow)> {
        let moved = move_into_registry(&self.dir, database);
        self.trouble.set(moved.as_ref().err().map(unread_words));
        moved.unwrap_or_default()
    }
}

fn unread_words(error: &RegistryError) -> String {
    let path = QUARANTINE_FILE_NAME;
    format!(
        "{error}. {path} has the rules about leaked keys of an earlier version: until they are read, the records of those \
         keys are handed out. Put it right, or from a backup: it is tried again; or move it away to go on without them"
    )
}

impl Registry {
    /// Why rules about leaked keys that an earlier version has made are not in force, for people.
    pub fn unread_rules(&self) -> Option<String> {
        self.quarantine_file.as_ref().and_then(|file| file.trouble.current())
    }

    /// Tries again to read rules that could not be read at the start.
    pub(super) fn read_unread_rules(&self) {
        let Some(file) = self.quarantine_file.as_ref().filter(|file| file.trouble.is_present()) else {
            return;
        };
        let mut database = self.lock_database();
        for (version, rule) in file.try_to_move(&mut database) {
            self.record_rules.lock().tell(version, &RecordRule::Leak(rule));
        }
    }
}

/// Moves the rules of `dir/quarantine.db` into the registry, and removes the file. Does nothing without one. Returns
/// the rules that are new to the registry, with their versions there.
///
/// # Errors
/// [`RegistryError::Database`], which names the file; [`RegistryError::Io`] if it cannot be removed.
fn move_into_registry(
    dir: &Path,
    database: &mut RegistryDatabase,
) -> Result<Vec<(u64, LeakRow)>, RegistryError> {
    let path = dir.join(QUARANTINE_FILE_NAME);
    if std::fs::symlink_metadata(&path).is_err() {
        return Ok(Vec::new());
    }
    let rules = read_rules(&path)?;
    let rules = copy_rules(database, rules)?;
    remove_file(&path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    tracing::info!(rules = rules.len(), path = %path.display(), "the rules about leaked keys are in the registry now");
    Ok(rules)
}

/// All rules of the file, in the order of their versions.
fn read_rules(path: &Path) -> Result<Vec<(u64, LeakRow)>, SqliteError> {
    let connection = QUARANTINE_DATABASE.open(path)?;
    select_rules(&connection).map_err(|error| SqliteError::from_sqlite(&error, path))
}

fn select_rules(connection: &Connection) -> rusqlite::Result<Vec<(u64, LeakRow)>> {
    let mut select = connection.prepare(
        "SELECT version, datasource, key_id, since_us, below, made_us FROM changes ORDER BY version",
    )?;
    let rules = select.query_map([], |row| {
        let rule = LeakRow {
            datasource: parse_owner(row.get_ref(1)?.as_str()?).map_err(FromSqlError::other)?,
            key_id: KeyId(row.get(2)?),
            since: row.get(3)?,
            below: row.get::<_, Option<i64>>(4)?.map(i64::cast_unsigned),
            at: row.get(5)?,
        };
        Ok((row.get::<_, i64>(0)?.cast_unsigned(), rule))
    })?;
    rules.collect()
}

/// Adds the rules that the registry does not have, in one transaction. A rule whose version is taken, because a
/// datasource was deleted before the file could be read, gets the next one. Returns what was added.
fn copy_rules(
    database: &mut RegistryDatabase,
    rules: Vec<(u64, LeakRow)>,
) -> Result<Vec<(u64, LeakRow)>, RegistryError> {
    let existing = database.leak_rules()?;
    let mut newest = database.record_rules_version()?;
    let change = database.begin()?;
    let mut added = Vec::new();
    for (version, rule) in rules {
        if existing.iter().any(|(_, row)| *row == rule) {
            continue;
        }
        newest = version.max(newest + 1);
        change.insert_leak_rule(newest, &rule)?;
        added.push((newest, rule));
    }
    change.commit()?;
    Ok(added)
}

/// Removes a database, its main file last: while that is there, the next start tries again.
fn remove_file(path: &Path) -> io::Result<()> {
    let beside = |suffix: &str| PathBuf::from(format!("{}{suffix}", path.display()));
    for path in [beside("-wal"), beside("-shm"), path.to_owned()] {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::{Actor, Registry};
    use crate::message::DatasourceId;

    /// The rules of a file that an earlier version made; its last one is in the write-ahead log only.
    fn with_file(dir: &Path) -> Vec<(u64, LeakRow)> {
        let connection = QUARANTINE_DATABASE.open(&dir.join(QUARANTINE_FILE_NAME)).expect("opens");
        let made = connection.execute_batch(
            "INSERT INTO changes VALUES (1, 'press-4', x'010101010101', 7, 5, 100),
                                        (2, '*', x'020202020202', 8, 6, 101);
             PRAGMA wal_checkpoint(TRUNCATE);
             INSERT INTO changes VALUES (3, 'press-4', x'010101010101', NULL, NULL, 102);",
        );
        made.expect("made");
        let copies = ["quarantine.db", "quarantine.db-wal"].map(|name| (name, fs::read(dir.join(name))));
        drop(connection);
        for (name, copy) in copies {
            fs::write(dir.join(name), copy.expect("there")).expect("as a kill leaves it");
        }
        let press = DatasourceId::new("press-4").expect("a slug");
        let rule = |datasource: &DatasourceId, key, since, below, at| LeakRow {
            datasource: datasource.clone(),
            key_id: KeyId([key; 6]),
            since,
            below,
            at,
        };
        vec![
            (1, rule(&press, 1, Some(7), Some(5), 100)),
            (2, rule(&DatasourceId::all(), 2, Some(8), Some(6), 101)),
            (3, rule(&press, 1, None, None, 102)),
        ]
    }

    fn rules_of(registry: &Registry) -> Vec<(u64, LeakRow)> {
        registry.lock_database().leak_rules().expect("readable")
    }

    fn files(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).expect("a directory").map(|file| file.expect("there").file_name());
        names
            .map(|name| name.into_string().expect("a name"))
            .filter(|name| name.starts_with("quar"))
            .collect()
    }

    #[test]
    fn the_rules_of_an_earlier_version_keep_their_versions_and_its_file_goes() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut expected = with_file(dir.path());
        let registry = Registry::open(dir.path()).expect("opens");
        assert_eq!((rules_of(&registry), files(dir.path())), (expected.clone(), vec![]));
        let (_, again) = expected[0].clone();
        assert_eq!(registry.add_leak_rule(&Actor::SYSTEM, &again, 10).expect("added"), Some(4));
        expected.push((4, again));
        drop(registry);
        assert_eq!(rules_of(&Registry::open(dir.path()).expect("opens again")), expected);
    }

    #[test]
    fn a_kill_before_the_file_has_gone_moves_nothing_twice() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut expected = with_file(dir.path());
        let mut database = RegistryDatabase::open(dir.path()).expect("opens");
        let rules = read_rules(&dir.path().join(QUARANTINE_FILE_NAME)).expect("read");
        copy_rules(&mut database, rules).expect("copied");
        // Killed here.
        drop(database);
        assert!(!files(dir.path()).is_empty());
        let registry = Registry::open(dir.path()).expect("opens");
        assert_eq!((rules_of(&registry), files(dir.path())), (expected.clone(), vec![]));
        // A loss of power may even bring the file back after the next change.
        let (_, again) = expected[1].clone();
        registry.add_leak_rule(&Actor::SYSTEM, &again, 10).expect("added");
        expected.push((4, again));
        drop(registry);
        with_file(dir.path());
        let registry = Registry::open(dir.path()).expect("opens");
        assert_eq!((rules_of(&registry), files(dir.path())), (expected, vec![]));
    }

    #[test]
    fn rules_whose_versions_are_taken_get_the_next_ones_in_their_order() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(QUARANTINE_FILE_NAME);
        fs::write(&path, "no database, and long enough to be seen not to be one".repeat(20))
            .expect("written");
        let registry = Registry::open(dir.path()).expect("opens");
        assert!(registry.unread_rules().is_some());
        let told = std::sync::Arc::<parking_lot::Mutex<Vec<u8>>>::default();
        let tells = told.clone();
        let follow = move |rule: &RecordRule| {
            tells.lock().push(match rule {
                RecordRule::Leak(row) => row.key_id.0[0],
                _ => 0,
            });
        };
        registry.follow_record_rules(follow).expect("readable");
        // A deletion takes the first version meanwhile.
        let scopes = crate::auth::Scopes::from_slice(&[crate::auth::Scope::Ingest]);
        let actor = crate::auth::Actor::SYSTEM;
        let (press, ..) = registry.create_datasource(&actor, None, "press-5", scopes).expect("created");
        registry.delete_datasource(&actor, &press.id).expect("deleted");
        assert_eq!(*told.lock(), [0]);
        fs::remove_file(&path).expect("removed");
        let expected = with_file(dir.path());
        registry.read_unread_rules();
        assert_eq!((registry.unread_rules(), files(dir.path())), (None, vec![]));
        let moved: Vec<_> = expected.into_iter().map(|(version, rule)| (version + 1, rule)).collect();
        assert_eq!((rules_of(&registry), told.lock().clone()), (moved.clone(), vec![0, 1, 2, 1]));
        // The file comes back with a loss of power.
        drop(registry);
        with_file(dir.path());
        assert_eq!(rules_of(&Registry::open(dir.path()).expect("opens")), moved);
    }

    #[test]
    fn a_kill_before_the_rules_are_copied_loses_none() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let expected = with_file(dir.path());
        let registry = Registry::open(dir.path()).expect("opens");
        drop(registry);
        // As the transaction had not been committed.
        let connection = Connection::open(dir.path().join("registry.db")).expect("opens");
        connection.execute_batch("DELETE FROM leaks").expect("runs");
        drop(connection);
        with_file(dir.path());
        assert_eq!(rules_of(&Registry::open(dir.path()).expect("opens")), expected);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named_and_left_alone_and_stops_no_start() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(QUARANTINE_FILE_NAME);
        fs::write(&path, b"").expect("written");
        drop(Registry::open(dir.path()).expect("a crash left it empty"));
        assert!(!path.exists());

        let unread = |part: &str| {
            let registry = Registry::open(dir.path()).expect("opens");
            let said = registry.unread_rules().expect("an operator is told");
            assert!(said.contains("quarantine.db") && said.contains(part), "{said}");
            let rule = LeakRow {
                datasource: DatasourceId::all(),
                key_id: KeyId([9; 6]),
                since: Some(1),
                below: Some(1),
                at: 1,
            };
            let added = registry.add_leak_rule(&Actor::SYSTEM, &rule, 10);
            assert!(matches!(added, Err(RegistryError::UnreadRules(_))), "{added:?}");
            registry
        };
        let text = "this is no database, and long enough to be seen not to be one".repeat(20);
        fs::write(&path, &text).expect("written");
        unread("damaged");
        assert_eq!(fs::read(&path).expect("there"), text.as_bytes());

        fs::remove_file(&path).expect("removed");
        fs::create_dir(&path).expect("made");
        unread("a directory");
        fs::remove_dir(&path).expect("removed");
        Connection::open(&path).expect("made").execute_batch("CREATE TABLE mine (x)").expect("runs");
        unread("has not made");
        fs::remove_file(&path).expect("removed");

        let expected = with_file(dir.path());
        let by_hand = |sql: &str| {
            let connection = Connection::open(&path).expect("opens");
            connection.execute_batch(sql).expect("runs");
            connection
        };
        drop(by_hand("PRAGMA user_version = 2"));
        unread("format 2");
        drop(by_hand("PRAGMA user_version = 1"));
        let other = by_hand("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE");
        let registry = unread("in use by another process");
        drop(other);
        // While it runs, and once only.
        let told = std::sync::Arc::<parking_lot::Mutex<Vec<KeyId>>>::default();
        let tells = told.clone();
        let follow = move |rule: &RecordRule| {
            if let RecordRule::Leak(row) = rule {
                tells.lock().push(row.key_id);
            }
        };
        registry.follow_record_rules(follow).expect("readable");
        registry.read_unread_rules();
        registry.read_unread_rules();
        assert_eq!((registry.unread_rules(), files(dir.path())), (None, vec![]));
        assert_eq!(*told.lock(), expected.iter().map(|(_, rule)| rule.key_id).collect::<Vec<_>>());
        assert_eq!(rules_of(&registry), expected);
    }
}
