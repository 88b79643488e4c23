//! `sessions.db` itself: its tables, read once at the start and then only written.
//!
//! ```sql
//! sessions      (uid INTEGER, datasource TEXT, client_id TEXT, expiry_s INTEGER, ended_at INTEGER,
//!                cursor INTEGER, flights BLOB)
//! subscriptions (uid INTEGER, filter TEXT, qos INTEGER, no_local INTEGER, retain_as_published INTEGER,
//!                identifier INTEGER, from_offset INTEGER, replay TEXT,
//!                metadata INTEGER)
//! share_groups  (datasource TEXT, name TEXT, filter TEXT, cursor INTEGER)
//! wills         (id INTEGER, will BLOB)
//! ```
//!
//! A will is encoded as a cell of the bucket is ([`row`](super::row)).
//!
//! A `uid` is an unsigned number, stored as the signed number with the same bits. Times are microseconds
//! since the Unix epoch. Flights are as [`StoredFlights`] encodes them; NULL if there are none. There are no constraints but the primary keys: a change that the database always
//! refused would block all later ones.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::types::FromSqlError;
use rusqlite::{CachedStatement, Connection, Row, TransactionBehavior, params};
use tracing::warn;

use super::pending::{PendingSessionChange, PendingSessionChanges, SessionUpdate, StoredGroupKey};
use super::{StoredFlights, StoredGroup, StoredSession, StoredSessions, StoredSubscription, StoredWill, row};
use crate::consume::sink::schema::{offset_from_sql, sql_offset};
use crate::message::{DatasourceId, Offset};
use crate::sqlite::{SqliteError, SqliteProfile, copy_database};

/// The file's name in the data directory.
pub(crate) const SESSIONS_FILE_NAME: &str = "sessions.db";

/// How long an attempt to open the database waits for a lock while clients wait for the attempt.
const LATE_OPEN_LOCK_WAIT_MAX: Duration = Duration::from_millis(50);

pub(in crate::consume) const SESSIONS_DATABASE: SqliteProfile = SqliteProfile {
    migrations: &[
        "
        CREATE TABLE sessions (
            uid        INTEGER PRIMARY KEY,
            datasource TEXT NOT NULL,
            client_id  TEXT NOT NULL,
            expiry_s   INTEGER NOT NULL,
            ended_at   INTEGER,
            cursor     INTEGER NOT NULL
        ) STRICT;
        CREATE TABLE subscriptions (
            uid                 INTEGER NOT NULL,
            filter              TEXT NOT NULL,
            qos                 INTEGER NOT NULL,
            no_local            INTEGER NOT NULL,
            retain_as_published INTEGER NOT NULL,
            identifier          INTEGER,
            from_offset         INTEGER NOT NULL,
            PRIMARY KEY (uid, filter)
        ) STRICT, WITHOUT ROWID;
        CREATE TABLE share_groups (
            datasource TEXT NOT NULL,
            name       TEXT NOT NULL,
            filter     TEXT NOT NULL,
            cursor     INTEGER NOT NULL,
            PRIMARY KEY (datasource, name, filter)
        ) STRICT, WITHOUT ROWID;
    ",
        "
        ALTER TABLE sessions ADD COLUMN flights BLOB;
        ALTER TABLE subscriptions ADD COLUMN replay TEXT;
        ALTER TABLE subscriptions ADD COLUMN metadata INTEGER NOT NULL DEFAULT 0;
        CREATE TABLE wills (
            id   INTEGER PRIMARY KEY,
            will BLOB NOT NULL
        ) STRICT;
    ",
    ],
    is_exclusive: true,
    is_checked: true,
    ..SqliteProfile::SHARED
};

/// The open database.
pub(super) struct SessionTable {
    connection: Connection,
    path: PathBuf,
}

impl SessionTable {
    /// Opens `dir/sessions.db`, or makes it.
    pub(super) fn open(dir: &Path) -> Result<Self, SqliteError> {
        let path = dir.join(SESSIONS_FILE_NAME);
        Ok(Self { connection: SESSIONS_DATABASE.open(&path)?, path })
    }

    /// Opens it while clients wait for the attempt.
    pub(super) fn open_late(dir: &Path) -> Result<Self, SqliteError> {
        let path = dir.join(SESSIONS_FILE_NAME);
        let database = SqliteProfile { open_lock_wait_max: LATE_OPEN_LOCK_WAIT_MAX, ..SESSIONS_DATABASE };
        Ok(Self { connection: database.open(&path)?, path })
    }

    /// Opens it again after a transaction whose outcome is unknown.
    pub(super) fn reopen(dir: &Path) -> Result<Self, SqliteError> {
        let path = dir.join(SESSIONS_FILE_NAME);
        Ok(Self { connection: SESSIONS_DATABASE.reopen(&path)?, path })
    }

    /// Reads everything.
    pub(super) fn load(&self) -> Result<StoredSessions, SqliteError> {
        let failed = |error: rusqlite::Error| SqliteError::from_sqlite(&error, &self.path);
        let (sessions, lonely) = self.sessions().map_err(failed)?;
        if let Some(uid) = lonely {
            let detail = format!("a subscription of session {uid}, which is not there").into();
            return Err(SqliteError::Damaged { path: self.path.clone(), detail });
        }
        let (groups, wills) = (self.groups().map_err(failed)?, self.wills().map_err(failed)?);
        Ok(StoredSessions { sessions, groups, wills })
    }

    /// The wills, but those of a newer Headgate.
    fn wills(&self) -> rusqlite::Result<Vec<Arc<StoredWill>>> {
        let mut select = self.connection.prepare("SELECT will FROM wills ORDER BY id")?;
        let mut rows = select.query([])?;
        let mut wills = Vec::new();
        while let Some(row) = rows.next()? {
            match row::decode_will(row.get_ref(0)?.as_blob()?) {
                Some(will) => wills.push(Arc::new(will)),
                None => warn!("a stored will is not as this Headgate writes it; it is not published"),
            }
        }
        Ok(wills)
    }

    /// The sessions, and the first uid that has subscriptions and no session.
    fn sessions(&self) -> rusqlite::Result<(Vec<StoredSession>, Option<i64>)> {
        let mut select = self.connection.prepare(
            "SELECT uid, datasource, client_id, expiry_s, ended_at, cursor, flights FROM sessions ORDER BY uid",
        )?;
        let mut select_subscriptions = self.connection.prepare(
            "SELECT uid, filter, qos, no_local, retain_as_published, identifier, from_offset, replay, metadata
             FROM subscriptions ORDER BY uid, filter",
        )?;
        let mut sessions = Vec::new();
        let mut subscription_rows = select_subscriptions.query([])?;
        let mut subscription = subscription_rows.next()?.map(subscription_of_row).transpose()?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let uid: i64 = row.get(0)?;
            let mut session = StoredSession {
                uid: uid.cast_unsigned(),
                datasource: datasource_of_row(row, 1)?,
                client_id: row.get(2)?,
                expiry_s: row.get(3)?,
                ended_at: row.get(4)?,
                cursor: offset_from_sql(row.get(5)?),
                subscriptions: Vec::new(),
                flights: flights_of_row(row, 6)?,
            };
            // Both queries are ordered by uid.
            while let Some((_, belongs)) = subscription.take_if(|(of, _)| *of == uid) {
                session.subscriptions.push(belongs);
                subscription = subscription_rows.next()?.map(subscription_of_row).transpose()?;
            }
            sessions.push(session);
        }
        Ok((sessions, subscription.map(|(uid, _)| uid)))
    }

    fn groups(&self) -> rusqlite::Result<Vec<StoredGroup>> {
        let mut select = self.connection.prepare(
            "SELECT datasource, name, filter, cursor FROM share_groups ORDER BY datasource, name, filter",
        )?;
        let groups = select.query_map([], |row| {
            Ok(StoredGroup {
                datasource: datasource_of_row(row, 0)?,
                group: row.get(1)?,
                filter: row.get(2)?,
                cursor: offset_from_sql(row.get(3)?),
            })
        })?;
        groups.collect()
    }

    /// Writes all of `pending` in one transaction. It is on the disk afterwards. With `supersedes`, a session that is
    /// put removes all others of its client.
    pub(super) fn write(
        &mut self,
        pending: &PendingSessionChanges,
        supersedes: bool,
    ) -> Result<(), SqliteError> {
        write_pending(&mut self.connection, pending, supersedes)
            .map_err(|error| SqliteError::from_sqlite(&error, &self.path))
    }

    /// Copies it to a new file.
    pub(super) fn copy(&self, to: &Path) -> Result<(), SqliteError> {
        copy_database(&self.connection, to, &mut |_| Ok(()))
    }

    /// Damages all pages but the first, also for this connection.
    #[cfg(test)]
    pub(super) fn damage(&mut self, path: &Path) {
        use std::os::unix::fs::FileExt;
        self.connection
            .execute_batch("PRAGMA wal_checkpoint(TRUNCATE); PRAGMA cache_size = 1; PRAGMA shrink_memory")
            .expect("a checkpoint");
        let bytes = std::fs::metadata(path).expect("it is there").len();
        let file = std::fs::File::options().write(true).open(path).expect("opens");
        file.write_all_at(&vec![0xff; usize::try_from(bytes).expect("small") - 4096], 4096).expect("written");
    }

    /// Changes a pragma, to provoke errors.
    #[cfg(test)]
    pub(super) fn set(&self, pragma: &str, value: i64) {
        self.connection.pragma_update(None, pragma, value).expect("a setting");
    }
}

fn write_pending(
    connection: &mut Connection,
    pending: &PendingSessionChanges,
    supersedes: bool,
) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for change in pending.sessions.values().filter(|_| supersedes) {
        if let PendingSessionChange::Put(session) = change {
            remove_others(&transaction, session)?;
        }
    }
    let mut sessions = SessionStatements::prepare(&transaction)?;
    for (uid, change) in &pending.sessions {
        sessions.write(uid.cast_signed(), change)?;
    }
    drop(sessions);
    write_groups(&transaction, &pending.groups)?;
    write_wills(&transaction, &pending.wills)?;
    transaction.commit()
}

/// Removes the sessions that a client had before this one.
fn remove_others(connection: &Connection, session: &StoredSession) -> rusqlite::Result<()> {
    let of_client = params![session.datasource.as_str(), session.client_id, session.uid.cast_signed()];
    const OTHERS: &str = "SELECT uid FROM sessions WHERE datasource = ?1 AND client_id = ?2 AND uid <> ?3";
    for table in ["subscriptions", "sessions"] {
        connection
            .prepare_cached(&format!("DELETE FROM {table} WHERE uid IN ({OTHERS})"))?
            .execute(of_client)?;
    }
    Ok(())
}

fn write_groups(
    connection: &Connection,
    groups: &BTreeMap<StoredGroupKey, Option<Offset>>,
) -> rusqlite::Result<()> {
    let mut put = connection.prepare_cached("INSERT OR REPLACE INTO share_groups VALUES (?1, ?2, ?3, ?4)")?;
    let mut remove = connection
        .prepare_cached("DELETE FROM share_groups WHERE datasource = ?1 AND name = ?2 AND filter = ?3")?;
    for ((datasource, group, filter), cursor) in groups {
        match cursor {
            Some(cursor) => put.execute(params![datasource.as_str(), group, filter, sql_offset(*cursor)])?,
            None => remove.execute(params![datasource.as_str(), group, filter])?,
        };
    }
    Ok(())
}

fn write_wills(
    connection: &Connection,
    wills: &BTreeMap<u64, Option<Arc<StoredWill>>>,
) -> rusqlite::Result<()> {
    let mut put = connection.prepare_cached("INSERT OR REPLACE INTO wills VALUES (?1, ?2)")?;
    let mut remove = connection.prepare_cached("DELETE FROM wills WHERE id = ?1")?;
    for (id, will) in wills {
        match will {
            Some(will) => put.execute(params![id.cast_signed(), &row::encode(&**will)[..]])?,
            None => remove.execute([id.cast_signed()])?,
        };
    }
    Ok(())
}

/// The statements that change sessions, prepared once for a whole transaction.
struct SessionStatements<'c> {
    put: CachedStatement<'c>,
    subscribe: CachedStatement<'c>,
    unsubscribe: CachedStatement<'c>,
    remove: CachedStatement<'c>,
    move_cursor: CachedStatement<'c>,
    set_flights: CachedStatement<'c>,
    end: CachedStatement<'c>,
}

impl<'c> SessionStatements<'c> {
    fn prepare(connection: &'c Connection) -> rusqlite::Result<Self> {
        let prepare = |sql| connection.prepare_cached(sql);
        Ok(Self {
            put: prepare(
                "INSERT OR REPLACE INTO sessions (uid, datasource, client_id, expiry_s, ended_at, cursor, flights)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            )?,
            subscribe: prepare(
                "INSERT OR REPLACE INTO subscriptions
                     (uid, filter, qos, no_local, retain_as_published, identifier, from_offset, replay, metadata)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
            )?,
            unsubscribe: prepare("DELETE FROM subscriptions WHERE uid = ?1")?,
            remove: prepare("DELETE FROM sessions WHERE uid = ?1")?,
            move_cursor: prepare("UPDATE sessions SET cursor = ?2 WHERE uid = ?1")?,
            set_flights: prepare("UPDATE sessions SET flights = ?2 WHERE uid = ?1")?,
            end: prepare("UPDATE sessions SET ended_at = ?2, expiry_s = ?3 WHERE uid = ?1")?,
        })
    }

    fn write(&mut self, uid: i64, change: &PendingSessionChange) -> rusqlite::Result<()> {
        match change {
            PendingSessionChange::Put(session) => self.put(uid, session)?,
            PendingSessionChange::Update(SessionUpdate { cursor, flights, ended }) => {
                if let Some(cursor) = cursor {
                    self.move_cursor.execute([uid, sql_offset(*cursor)])?;
                }
                if let Some(flights) = flights {
                    self.set_flights.execute(params![uid, flights.to_bytes()])?;
                }
                if let Some((ended_at, expiry_s)) = ended {
                    self.end.execute(params![uid, ended_at, expiry_s])?;
                }
            }
            PendingSessionChange::Remove => {
                self.unsubscribe.execute([uid])?;
                self.remove.execute([uid])?;
            }
            // A gateway with a database has no other nodes.
            PendingSessionChange::GiveUp => {}
        }
        Ok(())
    }

    fn put(&mut self, uid: i64, session: &StoredSession) -> rusqlite::Result<()> {
        self.put.execute(params![
            uid,
            session.datasource.as_str(),
            session.client_id,
            session.expiry_s,
            session.ended_at,
            sql_offset(session.cursor),
            session.flights.to_bytes(),
        ])?;
        self.unsubscribe.execute([uid])?;
        for subscription in &session.subscriptions {
            self.subscribe.execute(params![
                uid,
                subscription.filter,
                subscription.qos,
                subscription.no_local,
                subscription.retain_as_published,
                subscription.identifier,
                sql_offset(subscription.from),
                subscription.replay,
                subscription.metadata,
            ])?;
        }
        Ok(())
    }
}

fn datasource_of_row(row: &Row<'_>, column: usize) -> rusqlite::Result<DatasourceId> {
    let scope = DatasourceId::parse_scope(row.get_ref(column)?.as_str()?);
    scope.map_err(|error| FromSqlError::other(error).into())
}

fn flights_of_row(row: &Row<'_>, column: usize) -> rusqlite::Result<StoredFlights> {
    let Some(bytes) = row.get_ref(column)?.as_blob_or_null()? else { return Ok(StoredFlights::default()) };
    let unreadable = || FromSqlError::other(std::io::Error::other("messages in flight that cannot be read"));
    StoredFlights::from_bytes(bytes).ok_or_else(|| unreadable().into())
}

fn subscription_of_row(row: &Row<'_>) -> rusqlite::Result<(i64, StoredSubscription)> {
    let subscription = StoredSubscription {
        filter: row.get(1)?,
        qos: row.get(2)?,
        no_local: row.get(3)?,
        retain_as_published: row.get(4)?,
        identifier: row.get(5)?,
        from: offset_from_sql(row.get(6)?),
        replay: row.get(7)?,
        metadata: row.get(8)?,
    };
    Ok((row.get(0)?, subscription))
}
