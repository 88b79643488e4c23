//! A change of the registry on its way to the disk: one transaction of statements and the audit entry
//! that describes them. It takes effect when it is committed, and not before. In a cluster its rows are
//! first read from the open transaction and published to all nodes; only then is it committed.

use std::cell::{Cell, RefCell};

use headgate_bridge_nats::kv::KV_BATCH_ROWS_MAX;
use headgate_format::key::Digest;
use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::audit::{Actor, AuditEvent};
use super::datasource::Datasource;
use super::error::RegistryError;
use super::incarnations::IncarnationRow;
use super::key::{Key, Rotation};
use super::leak_rules::LeakRow;
use super::queries::SELECT_RECORD_RULES_VERSION;
use super::replica::{RegistryReplica, RegistryRevision};
use super::rows::{REGISTRY_ROWS_FORMAT, RegistryRow, digest_range};
use super::usage::KeyUsage;
use crate::message::{DatasourceId, Incarnation, KeyId, Offset, TimeMicros, now_micros};
use crate::time::cluster_micros;

/// Why a key has ended, as stored in the registry's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyEndReason {
    /// An operator revoked it.
    Revoked,
    /// Its datasource was deleted.
    Deleted,
    /// Another key took its place.
    Rotated,
    /// It was reported as leaked.
    Leaked,
    /// Its time was over. It was not revoked.
    Expired,
}

impl KeyEndReason {
    fn as_str(self) -> &'static str {
        match self {
            KeyEndReason::Revoked => "revoked",
            KeyEndReason::Deleted => "deleted",
            KeyEndReason::Rotated => "rotated",
            KeyEndReason::Leaked => "leaked",
            KeyEndReason::Expired => "expired",
        }
    }

    /// The action in the audit entry of a key that ended so.
    pub(super) fn action(self) -> &'static str {
        match self {
            KeyEndReason::Revoked => "key.revoked",
            KeyEndReason::Deleted => "datasource.deleted",
            KeyEndReason::Rotated => "key.retired",
            KeyEndReason::Leaked => "key.leaked",
            KeyEndReason::Expired => "key.expired",
        }
    }
}

/// What the end of keys has written.
#[derive(Default)]
pub(super) struct KeyEndRows {
    /// The digests of the revoked keys.
    pub(super) revoked: Vec<Digest>,
    /// What has happened to incarnations, with the versions of the rules.
    pub(super) incarnations: Vec<(u64, IncarnationRow)>,
}

/// One open transaction on the registry.
pub(super) struct RegistryTransaction<'a> {
    transaction: Transaction<'a>,
    at: Cell<TimeMicros>,
    /// The cluster that it is published to, if there is one.
    replica: Option<&'a dyn RegistryReplica>,
    /// The newest revision that is in the database.
    applied: &'a mut RegistryRevision,
    /// The rows to publish.
    touched: RefCell<Vec<TouchedRow>>,
}

/// A row that a change has written.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum TouchedRow {
    Key(KeyId),
    Leak(u64),
    Incarnation(u64),
    Datasource(DatasourceId),
    Format,
    Secret(&'static str),
    Audit(i64),
}

/// The place of a row among those of its change, lowest first. It matters if they need more than one batch: what has
/// come until then has to be in order at every node, also if the rest never comes.
fn publication_place(row: &RegistryRow) -> u8 {
    match row {
        // A gateway that does not know incarnations must not go on without them.
        RegistryRow::Format(_) => 0,
        RegistryRow::Key(_, key) if key.as_ref().is_none_or(|key| key.revoked_at.is_some()) => 1,
        // Behind the keys of what has ended, before the keys of what begins.
        RegistryRow::Leak(..) | RegistryRow::Incarnation(..) => 2,
        RegistryRow::Datasource(_, Some(_)) => 3,
        RegistryRow::Key(..) => 4,
        // A retry of a deletion writes the rest only as long as the datasource is there.
        RegistryRow::Datasource(_, None) => 5,
        RegistryRow::Secret(..) => 6,
        RegistryRow::Audit(..) => 7,
    }
}

impl<'a> RegistryTransaction<'a> {
    pub(super) fn new(
        transaction: Transaction<'a>,
        replica: Option<&'a dyn RegistryReplica>,
        applied: &'a mut RegistryRevision,
    ) -> Self {
        Self { transaction, at: Cell::new(now_micros()), replica, applied, touched: RefCell::default() }
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.transaction
    }

    fn touched(&self, row: TouchedRow) {
        if self.replica.is_some() {
            self.touched.borrow_mut().push(row);
        }
    }

    /// Notes that a secret of the registry was written.
    pub(super) fn touch_secret(&self, name: &'static str) {
        self.touched(TouchedRow::Secret(name));
    }

    /// The time of the change.
    pub(super) fn made_at(&self) -> TimeMicros {
        self.at.get()
    }

    /// Sets the time of what is written next: when it took effect.
    pub(super) fn set_time(&self, at: TimeMicros) {
        self.at.set(at);
    }

    /// Inserts a datasource.
    pub(super) fn insert_datasource(&self, datasource: &Datasource) -> rusqlite::Result<()> {
        let mut insert = self.transaction.prepare_cached(
            "INSERT INTO datasources (id, name, created_at, limits, schemas, incarnation, event_time)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?;
        insert.execute(params![
            datasource.id.as_str(),
            datasource.name,
            datasource.created_at,
            datasource.limits.text(),
            datasource.schemas.text(),
            datasource.incarnation,
            datasource.event_time.text(),
        ])?;
        self.touched(TouchedRow::Datasource(datasource.id.clone()));
        Ok(())
    }

    /// Inserts a key.
    pub(super) fn insert_key(&self, key: &Key, digest: &Digest) -> rusqlite::Result<()> {
        let mut insert = self.transaction.prepare_cached(
            "INSERT INTO keys (digest, datasource, scopes, label, created_at, expires_at, limits, replaces, incarnation)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8,
                     (SELECT nullif(incarnation, 1) FROM datasources WHERE id = ?2))",
        )?;
        insert.execute(params![
            digest.0,
            key.datasource.as_str(),
            key.scopes.to_string(),
            key.label,
            key.created_at,
            key.expires_at(),
            key.limits.text(),
            key.rotation().replaces.map(|id| id.to_string()),
        ])?;
        self.touched(TouchedRow::Key(key.id));
        Ok(())
    }

    /// Revokes one key of a datasource. Returns its digest, or `None` if there is no such live key.
    pub(super) fn revoke(
        &self,
        datasource: &DatasourceId,
        id: KeyId,
        why: KeyEndReason,
    ) -> rusqlite::Result<Option<Digest>> {
        let (first, last) = digest_range(id);
        let mut update = self.transaction.prepare_cached(
            "UPDATE keys SET revoked_at = ?1, ended = ?5 WHERE digest BETWEEN ?2 AND ?3 AND datasource = ?4
             AND revoked_at IS NULL RETURNING digest",
        )?;
        let parameters = params![self.at.get(), first, last, datasource.as_str(), why.as_str()];
        let digest = update.query_row(parameters, |row| row.get(0).map(Digest)).optional()?;
        if digest.is_some() {
            self.touched(TouchedRow::Key(id));
        }
        Ok(digest)
    }

    /// Revokes one key whose grace is over, unless that rotation was undone meanwhile. Returns as
    /// [`RegistryTransaction::revoke`].
    pub(super) fn retire(
        &self,
        datasource: &DatasourceId,
        id: KeyId,
        (by, grace_ends_at): (KeyId, TimeMicros),
    ) -> rusqlite::Result<Option<Digest>> {
        let (first, last) = digest_range(id);
        let mut select = self.transaction.prepare_cached(
            "SELECT 1 FROM keys WHERE digest BETWEEN ?1 AND ?2 AND replaced_by = ?3 AND grace_ends_at = ?4",
        )?;
        if select.exists(params![first, last, by.to_string(), grace_ends_at])? {
            self.revoke(datasource, id, KeyEndReason::Rotated)
        } else {
            Ok(None)
        }
    }

    /// Whether this is the last live key that can manage everything. Keys that are being rotated out do not count.
    pub(super) fn is_last_admin(&self, id: KeyId) -> rusqlite::Result<bool> {
        let (first, last) = digest_range(id);
        let mut select = self.transaction.prepare_cached(
            "SELECT count(*) FILTER (WHERE digest BETWEEN ?1 AND ?2),
                 count(*) FILTER (WHERE digest NOT BETWEEN ?1 AND ?2 AND replaced_by IS NULL)
             FROM keys WHERE datasource = '*' AND revoked_at IS NULL AND ended IS NULL
                 AND (expires_at IS NULL OR expires_at > ?3) AND ',' || scopes || ',' LIKE '%,admin,%'",
        )?;
        let (its, others): (i64, i64) =
            select.query_row(params![first, last, cluster_micros()], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(its > 0 && others == 0)
    }

    /// Marks a key as expired. The rest of its row stays: it was not revoked. Returns `false` if it has ended
    /// already.
    pub(super) fn expire(&self, id: KeyId) -> rusqlite::Result<bool> {
        let (first, last) = digest_range(id);
        let mut update = self.transaction.prepare_cached(
            "UPDATE keys SET ended = 'expired' WHERE digest BETWEEN ?1 AND ?2 AND revoked_at IS NULL
             AND ended IS NULL",
        )?;
        let has_ended = update.execute(params![first, last])? > 0;
        if has_ended {
            self.touched(TouchedRow::Key(id));
        }
        Ok(has_ended)
    }

    /// Removes a datasource, which ends its incarnation at that `end` of the log, and revokes its keys. `None` if it is gone already; one that
    /// was created later under the same id is another one.
    pub(super) fn remove_datasource(
        &self,
        datasource: &DatasourceId,
        created_at: TimeMicros,
        end: Option<Offset>,
    ) -> rusqlite::Result<Option<KeyEndRows>> {
        let mut rows = KeyEndRows::default();
        let mut is_there =
            self.transaction.prepare_cached("SELECT 1 FROM datasources WHERE id = ?1 AND created_at = ?2")?;
        if !is_there.exists(params![datasource.as_str(), created_at])? {
            return Ok(None);
        }
        rows.incarnations = self.note_past_incarnation(datasource)?;
        let mut delete = self
            .transaction
            .prepare_cached("DELETE FROM datasources WHERE id = ?1 RETURNING incarnation, name")?;
        let (incarnation, name): (Incarnation, String) =
            delete.query_row([datasource.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))?;
        rows.revoked = self.end_keys_of(datasource, Some(incarnation))?;
        self.touched(TouchedRow::Datasource(datasource.clone()));
        rows.incarnations.push(self.end_incarnation(datasource, incarnation, &name, created_at, end)?);
        Ok(Some(rows))
    }

    /// Revokes all keys of a datasource that is gone. Returns their digests. Their rows say of which `incarnation` they
    /// were, also of the first one: if a cluster gets only some of them, they are not taken for those of an earlier
    /// datasource.
    pub(super) fn end_keys_of(
        &self,
        datasource: &DatasourceId,
        incarnation: Option<Incarnation>,
    ) -> rusqlite::Result<Vec<Digest>> {
        let mut update = self.transaction.prepare_cached(
            "UPDATE keys SET revoked_at = ?1, ended = ?3, incarnation = coalesce(incarnation, ?4)
             WHERE datasource = ?2 AND revoked_at IS NULL RETURNING digest",
        )?;
        let why = KeyEndReason::Deleted.as_str();
        let parameters = params![self.at.get(), datasource.as_str(), why, incarnation];
        let ended = update.query_map(parameters, |row| row.get(0).map(Digest))?;
        let ended = ended.collect::<rusqlite::Result<Vec<_>>>()?;
        ended.iter().for_each(|digest| self.touched(TouchedRow::Key(digest.key_id())));
        Ok(ended)
    }

    /// Takes out a key that is about to be inserted again.
    pub(super) fn take_out_key(&self, id: KeyId) -> rusqlite::Result<()> {
        let (first, last) = digest_range(id);
        let mut delete =
            self.transaction.prepare_cached("DELETE FROM keys WHERE digest BETWEEN ?1 AND ?2")?;
        delete.execute(params![first, last]).map(drop)
    }

    /// Adds a row about an incarnation. Returns it with its version.
    pub(super) fn insert_incarnation_row(
        &self,
        row: IncarnationRow,
    ) -> rusqlite::Result<(u64, IncarnationRow)> {
        let newest: i64 =
            self.transaction.prepare_cached(SELECT_RECORD_RULES_VERSION)?.query_row([], |row| row.get(0))?;
        let version = newest.cast_unsigned() + 1;
        row.write(&self.transaction, version)?;
        self.touched(TouchedRow::Incarnation(version));
        self.touched(TouchedRow::Format);
        Ok((version, row))
    }

    /// Says which incarnation of its id a datasource is.
    pub(super) fn set_datasource_incarnation(
        &self,
        datasource: &DatasourceId,
        incarnation: Incarnation,
    ) -> rusqlite::Result<()> {
        let mut update =
            self.transaction.prepare_cached("UPDATE datasources SET incarnation = ?2 WHERE id = ?1")?;
        update.execute(params![datasource.as_str(), incarnation])?;
        self.touched(TouchedRow::Datasource(datasource.clone()));
        Ok(())
    }

    /// Says of which incarnation of its datasource a key is.
    pub(super) fn set_key_incarnation(&self, id: KeyId, incarnation: Incarnation) -> rusqlite::Result<()> {
        let (first, last) = digest_range(id);
        let mut update = self
            .transaction
            .prepare_cached("UPDATE keys SET incarnation = ?3 WHERE digest BETWEEN ?1 AND ?2")?;
        update.execute(params![first, last, incarnation])?;
        self.touched(TouchedRow::Key(id));
        Ok(())
    }

    /// Sets the limits of a datasource.
    pub(super) fn set_datasource_limits(
        &self,
        datasource: &DatasourceId,
        limits: Option<&str>,
    ) -> rusqlite::Result<()> {
        let mut update =
            self.transaction.prepare_cached("UPDATE datasources SET limits = ?2 WHERE id = ?1")?;
        update.execute(params![datasource.as_str(), limits])?;
        self.touched(TouchedRow::Datasource(datasource.clone()));
        Ok(())
    }

    /// Sets where the event time of a datasource's messages is.
    pub(super) fn set_datasource_event_time(
        &self,
        datasource: &DatasourceId,
        event_time: Option<&str>,
    ) -> rusqlite::Result<()> {
        let mut update =
            self.transaction.prepare_cached("UPDATE datasources SET event_time = ?2 WHERE id = ?1")?;
        update.execute(params![datasource.as_str(), event_time])?;
        self.touched(TouchedRow::Datasource(datasource.clone()));
        Ok(())
    }

    /// Sets the schemas of a datasource.
    pub(super) fn set_datasource_schemas(
        &self,
        datasource: &DatasourceId,
        schemas: Option<&str>,
    ) -> rusqlite::Result<()> {
        let mut update =
            self.transaction.prepare_cached("UPDATE datasources SET schemas = ?2 WHERE id = ?1")?;
        update.execute(params![datasource.as_str(), schemas])?;
        self.touched(TouchedRow::Datasource(datasource.clone()));
        Ok(())
    }

    /// Sets the limits of a key.
    pub(super) fn set_key_limits(&self, id: KeyId, limits: Option<&str>) -> rusqlite::Result<()> {
        let (first, last) = digest_range(id);
        let mut update =
            self.transaction.prepare_cached("UPDATE keys SET limits = ?3 WHERE digest BETWEEN ?1 AND ?2")?;
        update.execute(params![first, last, limits])?;
        self.touched(TouchedRow::Key(id));
        Ok(())
    }

    /// Sets a key's part in a rotation.
    pub(super) fn set_rotation(&self, id: KeyId, rotation: Rotation) -> rusqlite::Result<()> {
        let (first, last) = digest_range(id);
        let (replaced_by, grace_ends_at) = rotation.replaced_by.unzip();
        let mut update = self.transaction.prepare_cached(
            "UPDATE keys SET replaces = ?3, replaced_by = ?4, grace_ends_at = ?5
             WHERE digest BETWEEN ?1 AND ?2",
        )?;
        let replaces = rotation.replaces.map(|id| id.to_string());
        let replaced_by = replaced_by.map(|id: KeyId| id.to_string());
        update.execute(params![first, last, replaces, replaced_by, grace_ends_at])?;
        self.touched(TouchedRow::Key(id));
        Ok(())
    }

    /// Replaces the stored usage of a key.
    pub(super) fn set_usage(&self, id: KeyId, used: &KeyUsage) -> Result<(), RegistryError> {
        let mut insert = self.transaction.prepare_cached(
            "INSERT OR REPLACE INTO usage (key_id, accepted, refused, \"offset\", users)
             VALUES (?1, ?2, ?3, ?4, ?5)",
        )?;
        let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let users = serde_json::to_string(&used.users).expect("a list of texts and numbers is JSON");
        insert.execute(params![
            id.to_string(),
            whole(used.accepted),
            whole(used.refused),
            used.offset.map(whole),
            users
        ])?;
        Ok(())
    }

    /// Adds a rule about a leaked key.
    pub(super) fn insert_leak_rule(&self, version: u64, row: &LeakRow) -> rusqlite::Result<()> {
        row.write(&self.transaction, version)?;
        self.touched(TouchedRow::Leak(version));
        Ok(())
    }

    /// Adds an entry to the audit, which every change by somebody has.
    ///
    /// # Errors
    /// [`RegistryError::Denied`] if they may not make it any more; [`RegistryError::Database`].
    pub(super) fn audit(&self, actor: &Actor, act: &AuditEvent<'_>) -> Result<(), RegistryError> {
        actor.check()?;
        let mut insert = self.transaction.prepare_cached(
            "INSERT INTO audit (at, who, address, action, datasource, key_id, what)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?;
        // SQLite assigns the next higher id. A cluster has one order of changes, and each node has all the
        // earlier ones, so no other node has assigned the same id.
        insert.execute(params![
            self.at.get(),
            actor.who.to_string(),
            actor.address.map(|address| address.to_string()),
            act.action,
            act.datasource.map(DatasourceId::as_str),
            act.key_id.map(|id| id.to_string()),
            act.what.to_string(),
        ])?;
        self.touched(TouchedRow::Audit(self.transaction.last_insert_rowid()));
        Ok(())
    }

    /// Publishes the change in a cluster, and commits it.
    ///
    /// # Errors
    /// [`RegistryError::Database`]; nothing has then changed. In a cluster also the errors of
    /// [`RegistryReplica::publish`].
    pub(super) fn commit(self) -> Result<(), RegistryError> {
        let mut revision = *self.applied;
        if let Some(replica) = self.replica {
            let mut touched = self.touched.take();
            touched.sort_unstable();
            touched.dedup();
            let rows = touched.iter().map(|row| match row {
                TouchedRow::Key(id) => RegistryRow::read_key(&self.transaction, *id),
                TouchedRow::Datasource(id) => RegistryRow::read_datasource(&self.transaction, id),
                TouchedRow::Leak(version) => RegistryRow::read_leak(&self.transaction, *version),
                TouchedRow::Incarnation(version) => {
                    RegistryRow::read_incarnation(&self.transaction, *version)
                }
                TouchedRow::Secret(name) => RegistryRow::read_secret(&self.transaction, name),
                TouchedRow::Format => Ok(RegistryRow::Format(REGISTRY_ROWS_FORMAT)),
                TouchedRow::Audit(id) => RegistryRow::read_audit(&self.transaction, *id),
            });
            let mut rows = rows.collect::<rusqlite::Result<Vec<_>>>()?;
            rows.sort_by_key(publication_place);
            // If a later batch fails, the earlier ones stand: their rows come back as if another node
            // had written them, and the change can be retried. All have about the same size, so that the few rows
            // before the keys are together in the first one, and the few behind them in the last.
            let batches = rows.len().div_ceil(KV_BATCH_ROWS_MAX).max(1);
            for rows in rows.chunks(rows.len().div_ceil(batches).max(1)) {
                revision = replica.publish(rows, revision)?;
            }
        }
        self.transaction.commit()?;
        *self.applied = revision;
        Ok(())
    }
}
