//! The rules about leaked keys. They are in `DIR/quarantine.db`, so that withheld records stay withheld
//! however the process ends. In a cluster they are in its registry: every node withholds the same records
//! and gives each change the same version.
//!
//! ```sql
//! changes (version INTEGER, datasource TEXT, key_id BLOB, since_us INTEGER, below INTEGER, made_us INTEGER)
//! ```
//!
//! The table has every change ever made, in order; a row without `since_us` and `below` gives back what
//! earlier rows withhold. A change is on the disk before it takes effect in memory, so that nothing that
//! was reported as withheld is handed out after a crash.

use parking_lot::Mutex;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, params};
use tokio::runtime::Handle;

use crate::auth::{LeakRow, Registry, RegistryError};
use crate::consume::sink::schema::{offset_from_sql, sql_offset};
use crate::limits::LEAK_CHANGES_MAX;
use crate::log::{AppendError, Log, WithheldChange, WithheldRule};
use crate::message::{DatasourceId, KeyId, TimeMicros, now_micros};
use crate::sqlite::{SqliteError, SqliteProfile};

/// The file's name in the data directory.
const QUARANTINE_FILE_NAME: &str = "quarantine.db";

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

/// The rules about leaked keys: durable here, live in the log's [`Withheld`](crate::log::WithheldRules).
pub struct QuarantineLeakRules {
    log: Arc<dyn Log>,
    kept: LeakRuleStore,
}

/// Where the rules are durable.
enum LeakRuleStore {
    /// In a file.
    File {
        path: PathBuf,
        /// A change holds the lock until it has reached the live rules too.
        connection: Mutex<Connection>,
    },
    /// In the registry of the cluster, which reports changes of all nodes.
    Cluster { registry: Arc<Registry>, runtime: Handle },
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum LeakError {
    /// The database could not be written.
    #[error("quarantine: {0}")]
    Database(#[from] SqliteError),
    /// The cluster's registry could not be written.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The end of the cluster's log cannot be determined now.
    #[error(transparent)]
    Log(#[from] AppendError),
    /// There are too many changes.
    #[error("keys were quarantined {LEAK_CHANGES_MAX} times; no more changes can be kept")]
    TooMany,
}

impl QuarantineLeakRules {
    /// Opens `dir/quarantine.db`, or makes it, and applies its rules to the log. Call it before the log has
    /// readers.
    ///
    /// # Errors
    /// [`SqliteError`].
    pub fn open(dir: &Path, log: Arc<dyn Log>) -> Result<Self, SqliteError> {
        let path = dir.join(QUARANTINE_FILE_NAME);
        let connection = QUARANTINE_DATABASE.open(&path)?;
        let read = || -> rusqlite::Result<()> {
            let mut changes = connection
                .prepare("SELECT datasource, key_id, since_us, below FROM changes ORDER BY version")?;
            let mut rows = changes.query([])?;
            while let Some(row) = rows.next()? {
                let datasource = match row.get_ref(0)?.as_str()? {
                    "*" => DatasourceId::all(),
                    id => DatasourceId::new(id).map_err(rusqlite::types::FromSqlError::other)?,
                };
                let key_id = KeyId(row.get(1)?);
                let rule: (Option<TimeMicros>, Option<i64>) = (row.get(2)?, row.get(3)?);
                log.withheld().push(match rule {
                    (Some(since), Some(below)) => WithheldChange::Withhold(WithheldRule {
                        datasource,
                        key_id,
                        since,
                        below: offset_from_sql(below),
                    }),
                    _ => WithheldChange::GiveBack(datasource, key_id),
                });
            }
            Ok(())
        };
        read().map_err(|error| SqliteError::from_sqlite(&error, &path))?;
        Ok(Self { log, kept: LeakRuleStore::File { path, connection: Mutex::new(connection) } })
    }

    /// Applies the rules of the cluster's registry, present and future, to the log. Call it before the log
    /// has readers, in a runtime.
    pub fn in_cluster(registry: Arc<Registry>, log: Arc<dyn Log>) -> Self {
        let withheld = log.withheld().clone();
        registry.follow_leak_rules(move |row| {
            let LeakRow { datasource, key_id, .. } = row.clone();
            withheld.push(match (row.since, row.below) {
                (Some(since), Some(below)) => {
                    WithheldChange::Withhold(WithheldRule { datasource, key_id, since, below })
                }
                _ => WithheldChange::GiveBack(datasource, key_id),
            });
        });
        Self { log, kept: LeakRuleStore::Cluster { registry, runtime: Handle::current() } }
    }

    /// Withholds what a key let in since a time: durably, and from every reader of the log once this
    /// returns. Records that the key lets in later, if it is still valid, are not covered. Returns the new
    /// version of the rules. Blocks.
    ///
    /// # Errors
    /// [`LeakError`]; nothing has changed then.
    pub fn withhold(
        &self,
        datasource: &DatasourceId,
        key_id: KeyId,
        since: TimeMicros,
    ) -> Result<u64, LeakError> {
        let below = match &self.kept {
            LeakRuleStore::File { .. } => self.log.next_offset(),
            // Records of other gateways may not have arrived here yet.
            LeakRuleStore::Cluster { runtime, .. } => runtime.block_on(self.log.end())?,
        };
        let rule = WithheldRule { datasource: datasource.clone(), key_id, since, below };
        self.change(WithheldChange::Withhold(rule))
    }

    /// Gives back what is withheld of a key in this datasource, or in all (`*`). Returns the new version of
    /// the rules. Blocks.
    ///
    /// # Errors
    /// [`LeakError`]; nothing has changed then.
    pub fn give_back(&self, datasource: &DatasourceId, key_id: KeyId) -> Result<u64, LeakError> {
        self.change(WithheldChange::GiveBack(datasource.clone(), key_id))
    }

    fn change(&self, change: WithheldChange) -> Result<u64, LeakError> {
        let withheld = self.log.withheld();
        let (datasource, key_id, since, below) = match &change {
            WithheldChange::Withhold(rule) => {
                (&rule.datasource, rule.key_id, Some(rule.since), Some(rule.below))
            }
            WithheldChange::GiveBack(datasource, key_id) => (datasource, *key_id, None, None),
        };
        let (path, connection) = match &self.kept {
            LeakRuleStore::Cluster { registry, .. } => {
                let row = LeakRow { datasource: datasource.clone(), key_id, since, below, at: now_micros() };
                return registry.add_leak_rule(&row, LEAK_CHANGES_MAX)?.ok_or(LeakError::TooMany);
            }
            LeakRuleStore::File { path, connection } => (path, connection),
        };
        let connection = connection.lock();
        if withheld.version() >= LEAK_CHANGES_MAX {
            return Err(LeakError::TooMany);
        }
        connection
            .execute(
                "INSERT INTO changes VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![
                    sql_offset(withheld.version() + 1),
                    datasource.as_str(),
                    key_id.0,
                    since,
                    below.map(sql_offset),
                    now_micros()
                ],
            )
            .map_err(|error| SqliteError::from_sqlite(&error, path))?;
        Ok(withheld.push(change))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::log::EmbeddedLog;

    #[test]
    fn what_was_withheld_is_withheld_after_a_restart_and_what_was_given_back_is_not() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let config = Config::default();
        let open = || {
            let log = EmbeddedLog::open(dir.path(), &config.log, &config.intake).expect("opens");
            let log: Arc<dyn Log> = Arc::new(log);
            (QuarantineLeakRules::open(dir.path(), log.clone()).expect("opens"), log)
        };
        let (leaks, _log) = open();
        let datasource = DatasourceId::new("press-4").expect("a slug");
        let (one, other) = (KeyId([1; 6]), KeyId([2; 6]));
        assert_eq!(leaks.withhold(&datasource, one, 7).expect("kept"), 1);
        assert_eq!(leaks.withhold(&DatasourceId::all(), other, 8).expect("kept"), 2);
        assert_eq!(leaks.give_back(&datasource, one).expect("kept"), 3);
        drop((leaks, _log));
        let (_leaks, log) = open();
        let rules: Vec<_> = log.withheld().now().rules().cloned().collect();
        let expected = WithheldRule { datasource: DatasourceId::all(), key_id: other, since: 8, below: 0 };
        assert_eq!((log.withheld().version(), rules), (3, vec![expected]));
    }
}
