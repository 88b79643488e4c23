//! The incarnations of datasources: which of those that had the same id one after the other a record belongs to.
//!
//! A key is of one incarnation, and its id is never given to another key, so the key that let a record in decides,
//! whatever was in flight when the datasource was deleted. A record of a key for all datasources is of the
//! incarnation that had begun at its offset: nothing is appended to a datasource that is deleted, and the log is
//! asked for its end when the id is used again.
//!
//! The registry keeps what has happened to incarnations as rows that are only ever added. They share their versions
//! with the rules about leaked keys, and reach the log's readers on the same way ([`super::leak_rules`]).
//!
//! **Registries of before** know no incarnations. What was deleted there becomes the first incarnation of its id when
//! the registry is opened, and a datasource that has been created again since is the second one. Records that keys for
//! all datasources sent to it before are told by their time. In a cluster the same is done for an id when it is
//! deleted or created again.

use std::sync::Arc;

use rusqlite::types::FromSqlError;
use rusqlite::{Connection, Row, params};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Registry;
use super::audit::{Actor, AuditEvent};
use super::database::RegistryDatabase;
use super::error::RegistryError;
use super::leak_rules::{LeakRow, deserialize_owner, parse_owner};
use super::transaction::RegistryTransaction;
use crate::message::{DatasourceId, Incarnation, KeyId, Offset, TimeMicros};

/// What has happened to an incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IncarnationEvent {
    /// Its datasource was deleted.
    Ended,
    /// The id of a deleted datasource was used again.
    Begun,
    /// Its records are removed from everything that can remove them, and shown by nothing.
    Purged,
}

impl IncarnationEvent {
    const ALL: [(Self, &'static str); 3] =
        [(Self::Ended, "ended"), (Self::Begun, "begun"), (Self::Purged, "purged")];

    fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(event, _)| *event == self).map_or("", |(_, name)| name)
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, name)| *name == text).map(|(event, _)| *event)
    }
}

/// One row of the table `incarnations`: what has happened to an incarnation, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncarnationRow {
    /// The id of the datasource.
    #[serde(deserialize_with = "deserialize_owner")]
    pub datasource: DatasourceId,
    /// Which incarnation of it.
    pub incarnation: Incarnation,
    /// What has happened.
    pub event: IncarnationEvent,
    /// Of one that has ended: its display name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Of one that has ended: when it was created.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at: Option<TimeMicros>,
    /// Of one that has begun, or has ended in a cluster: where the log ended then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_offset: Option<Offset>,
    /// Of one that began before there were incarnations: when that was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<TimeMicros>,
    /// When it happened.
    pub at: TimeMicros,
}

impl IncarnationRow {
    fn new(
        datasource: &DatasourceId,
        incarnation: Incarnation,
        event: IncarnationEvent,
        at: TimeMicros,
    ) -> Self {
        let datasource = datasource.clone();
        Self {
            datasource,
            incarnation,
            event,
            name: None,
            created_at: None,
            first_offset: None,
            since: None,
            at,
        }
    }

    /// Reads a row of the table `incarnations`, without its version.
    pub(super) fn from_sql(row: &Row<'_>) -> rusqlite::Result<Self> {
        let event = row.get_ref(3)?.as_str()?;
        Ok(Self {
            datasource: parse_owner(row.get_ref(1)?.as_str()?).map_err(FromSqlError::other)?,
            incarnation: row.get(2)?,
            event: IncarnationEvent::parse(event)
                .ok_or_else(|| FromSqlError::Other(format!("no event: {event}").into()))?,
            name: row.get(4)?,
            created_at: row.get(5)?,
            first_offset: row.get::<_, Option<i64>>(6)?.map(i64::cast_unsigned),
            since: row.get(7)?,
            at: row.get(8)?,
        })
    }

    /// Writes a row of the table `incarnations`.
    pub(super) fn write(&self, connection: &Connection, version: u64) -> rusqlite::Result<usize> {
        let mut insert = connection.prepare_cached(
            "INSERT OR REPLACE INTO incarnations VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        )?;
        insert.execute(params![
            version.cast_signed(),
            self.datasource.as_str(),
            self.incarnation,
            self.event.as_str(),
            self.name,
            self.created_at,
            self.first_offset.map(u64::cast_signed),
            self.since,
            self.at,
        ])
    }
}

/// A rule about records that the log's readers follow, in the order of the versions.
#[derive(Debug, Clone, PartialEq)]
pub enum RecordRule {
    /// What a leaked key let in is withheld or given back.
    Leak(LeakRow),
    /// Something has happened to an incarnation. With one that has ended, the keys that it had.
    Incarnation(IncarnationRow, Arc<[KeyId]>),
}

/// An incarnation that has ended, as it is told to operators.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedIncarnation {
    /// The id that the datasource had.
    pub datasource: DatasourceId,
    /// Which incarnation of it.
    pub incarnation: Incarnation,
    /// The name that it had, if that is known.
    pub name: Option<String>,
    /// When it was created, if that is known.
    pub created_at: Option<TimeMicros>,
    /// When it was deleted.
    pub ended_at: TimeMicros,
    /// When its removal was asked for.
    pub purged_at: Option<TimeMicros>,
}

/// How long a question for the log's end may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogEndPatience {
    /// Until all that was handed to the log before has its offset.
    Settled,
    /// A moment: the end of keys waits for the answer.
    Brief,
}

/// Asks the log for its end. Blocks; the error is in words.
pub type LogEndQuery = Box<dyn Fn(LogEndPatience) -> Result<Offset, String> + Send + Sync>;

impl RegistryDatabase {
    /// How many incarnations of a datasource have ended.
    fn ended_incarnations_of(&self, id: &DatasourceId) -> rusqlite::Result<Incarnation> {
        select_ended(&self.connection, id)
    }

    /// All rules of the log's readers with their versions, oldest first.
    pub(super) fn record_rules(&self) -> Result<Vec<(u64, RecordRule)>, RegistryError> {
        let mut rules: Vec<(u64, RecordRule)> = Vec::new();
        for (version, row) in self.incarnation_rows()? {
            rules.push((version, self.rule_of(row)?));
        }
        rules.extend(self.leak_rules()?.into_iter().map(|(version, row)| (version, RecordRule::Leak(row))));
        rules.sort_by_key(|(version, _)| *version);
        Ok(rules)
    }

    /// The rule that a row is for the log's readers.
    pub(super) fn rule_of(&self, row: IncarnationRow) -> rusqlite::Result<RecordRule> {
        if row.event != IncarnationEvent::Ended {
            return Ok(RecordRule::Incarnation(row, Arc::default()));
        }
        let mut select = self.connection.prepare_cached(
            "SELECT substr(digest, 1, 6) FROM keys
             WHERE datasource = ?1 AND coalesce(incarnation, 1) = ?2 AND revoked_at IS NOT NULL",
        )?;
        let keys = select
            .query_map(params![row.datasource.as_str(), row.incarnation], |key| key.get(0).map(KeyId))?;
        let keys = keys.collect::<rusqlite::Result<_>>()?;
        Ok(RecordRule::Incarnation(row, keys))
    }

    fn incarnation_rows(&self) -> rusqlite::Result<Vec<(u64, IncarnationRow)>> {
        let mut select = self.connection.prepare("SELECT * FROM incarnations ORDER BY version")?;
        let rows = select.query_map([], |row| {
            Ok((row.get::<_, i64>(0)?.cast_unsigned(), IncarnationRow::from_sql(row)?))
        })?;
        rows.collect()
    }

    /// Notes what was deleted before there were incarnations, as the first one of its id.
    pub(super) fn note_past_incarnations(&mut self) -> Result<(), RegistryError> {
        let ids: Vec<String> = {
            let mut select = self.connection.prepare(
                "SELECT DISTINCT k.datasource FROM keys k LEFT JOIN datasources d ON d.id = k.datasource
                 WHERE k.revoked_at IS NOT NULL AND k.datasource <> '*' AND k.incarnation IS NULL
                     AND (d.id IS NULL OR (d.incarnation = 1 AND (k.ended = 'deleted' OR k.revoked_at <= d.created_at)))
                     AND NOT EXISTS (SELECT 1 FROM incarnations i WHERE i.datasource = k.datasource)",
            )?;
            select.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?
        };
        if ids.is_empty() {
            return Ok(());
        }
        let change = self.begin()?;
        for id in &ids {
            change.note_past_incarnation(
                &parse_owner(id).map_err(|error| RegistryError::InvalidName(error.to_string()))?,
            )?;
        }
        change.commit()?;
        tracing::info!(
            datasources = ids.len(),
            "datasources that were deleted before are ended incarnations now"
        );
        Ok(())
    }
}

fn select_ended(connection: &Connection, id: &DatasourceId) -> rusqlite::Result<Incarnation> {
    connection
        .prepare_cached(
            "SELECT coalesce(max(incarnation), 0) FROM incarnations WHERE datasource = ?1 AND event = 'ended'",
        )?
        .query_row([id.as_str()], |row| row.get(0))
}

impl RegistryTransaction<'_> {
    /// How many incarnations of a datasource have ended.
    pub(super) fn ended_incarnations_of(&self, id: &DatasourceId) -> rusqlite::Result<Incarnation> {
        select_ended(self.connection(), id)
    }

    /// Notes that an incarnation has ended with its datasource.
    pub(super) fn end_incarnation(
        &self,
        id: &DatasourceId,
        incarnation: Incarnation,
        name: &str,
        created_at: TimeMicros,
        end: Option<Offset>,
    ) -> rusqlite::Result<(u64, IncarnationRow)> {
        let row = IncarnationRow::new(id, incarnation, IncarnationEvent::Ended, self.made_at());
        self.insert_incarnation_row(IncarnationRow {
            name: Some(name.to_owned()),
            created_at: Some(created_at),
            first_offset: end,
            ..row
        })
    }

    /// Notes that the next incarnation of an id begins where the log ends.
    pub(super) fn begin_incarnation(
        &self,
        id: &DatasourceId,
        incarnation: Incarnation,
        first_offset: Offset,
    ) -> rusqlite::Result<(u64, IncarnationRow)> {
        let row = IncarnationRow::new(id, incarnation, IncarnationEvent::Begun, self.made_at());
        self.insert_incarnation_row(IncarnationRow { first_offset: Some(first_offset), ..row })
    }

    /// Notes that an ended incarnation is purged. `None`: it was already.
    fn purge_incarnation(
        &self,
        id: &DatasourceId,
        incarnation: Incarnation,
    ) -> rusqlite::Result<Option<(u64, IncarnationRow)>> {
        let is_purged = self
            .connection()
            .prepare_cached(
                "SELECT 1 FROM incarnations WHERE datasource = ?1 AND incarnation = ?2 AND event = 'purged'",
            )?
            .exists(params![id.as_str(), incarnation])?;
        if is_purged {
            return Ok(None);
        }
        let row = IncarnationRow::new(id, incarnation, IncarnationEvent::Purged, self.made_at());
        self.insert_incarnation_row(row).map(Some)
    }

    /// What was deleted under this id before there were incarnations becomes its first one. Returns what was noted;
    /// nothing, if that was done already or there is nothing.
    pub(super) fn note_past_incarnation(
        &self,
        id: &DatasourceId,
    ) -> rusqlite::Result<Vec<(u64, IncarnationRow)>> {
        let connection = self.connection();
        let known = connection
            .prepare_cached("SELECT 1 FROM incarnations WHERE datasource = ?1")?
            .exists([id.as_str()])?;
        let live = {
            let mut select = connection.prepare_cached("SELECT created_at FROM datasources WHERE id = ?1")?;
            let mut rows = select.query([id.as_str()])?;
            rows.next()?.map(|row| row.get::<_, TimeMicros>(0)).transpose()?
        };
        // Whatever a clock did: a key that works, or was revoked since, is of the datasource that there is.
        let past = "datasource = ?1 AND revoked_at IS NOT NULL AND incarnation IS NULL
             AND (?2 IS NULL OR coalesce(ended, '') = 'deleted' OR revoked_at <= ?2)";
        let ended_at: Option<TimeMicros> = connection
            .prepare_cached(&format!("SELECT max(revoked_at) FROM keys WHERE {past}"))?
            .query_row(params![id.as_str(), live], |row| row.get(0))?;
        let Some(ended_at) = ended_at.filter(|_| !known) else { return Ok(Vec::new()) };
        let row = IncarnationRow::new(id, 1, IncarnationEvent::Ended, ended_at);
        let mut noted = vec![self.insert_incarnation_row(row)?];
        if let Some(created_at) = live {
            let mut select = connection.prepare_cached(&format!(
                "SELECT substr(digest, 1, 6) FROM keys WHERE datasource = ?1 AND NOT ({past})"
            ))?;
            let present = select.query_map(params![id.as_str(), live], |key| key.get(0).map(KeyId))?;
            for key in present.collect::<rusqlite::Result<Vec<_>>>()? {
                self.set_key_incarnation(key, 2)?;
            }
            self.set_datasource_incarnation(id, 2)?;
            let row = IncarnationRow::new(id, 2, IncarnationEvent::Begun, created_at);
            noted.push(self.insert_incarnation_row(IncarnationRow { since: Some(created_at), ..row })?);
        }
        Ok(noted)
    }
}

impl Registry {
    /// Sets what says where the log ends when the id of a deleted datasource is used again, and in a cluster when one is
    /// deleted. Call it before that.
    pub fn set_log_end(&self, query: LogEndQuery) {
        let _ = self.log_end.set(query);
    }

    pub(super) fn ask_log_end(&self) -> Result<Offset, RegistryError> {
        // Without a log there are no records either.
        self.log_end.get().map_or(Ok(0), |query| query(LogEndPatience::Settled).map_err(RegistryError::Away))
    }

    /// Where an incarnation ends in the log. `None` without a cluster, where nothing is appended to a datasource that is
    /// deleted; and if the log does not say, because a key dies whatever the log says.
    pub(super) fn ask_incarnation_end(&self) -> Option<Offset> {
        // In a cluster the log may be ahead of the registry of a gateway: it has to know what is not of this one.
        let query = self.replica.as_ref().and_then(|_| self.log_end.get())?;
        query(LogEndPatience::Brief).ok()
    }

    /// Tells the log's readers of a row that is durable.
    pub(super) fn tell_incarnation(&self, database: &RegistryDatabase, version: u64, row: IncarnationRow) {
        match database.rule_of(row) {
            Ok(rule) => self.record_rules.lock().tell(version, &rule),
            // Its own change has just written there, and the readers show too much rather than too little.
            Err(error) => tracing::error!(%error, "the keys of a deleted datasource cannot be read"),
        }
    }

    /// All incarnations that have ended, by datasource and number.
    ///
    /// # Errors
    /// [`RegistryError::Database`] if they cannot be read.
    pub fn ended_incarnations(&self) -> Result<Vec<EndedIncarnation>, RegistryError> {
        let rows = self.lock_database().incarnation_rows()?;
        let mut ended: Vec<EndedIncarnation> = Vec::new();
        for (_, row) in rows {
            match row.event {
                IncarnationEvent::Ended => ended.push(EndedIncarnation {
                    datasource: row.datasource,
                    incarnation: row.incarnation,
                    name: row.name,
                    created_at: row.created_at,
                    ended_at: row.at,
                    purged_at: None,
                }),
                IncarnationEvent::Begun => {}
                IncarnationEvent::Purged => {
                    let of = |of: &&mut EndedIncarnation| {
                        of.datasource == row.datasource && of.incarnation == row.incarnation
                    };
                    if let Some(of) = ended.iter_mut().find(of) {
                        of.purged_at = Some(row.at);
                    }
                }
            }
        }
        ended.sort_by(|a, b| (&a.datasource, a.incarnation).cmp(&(&b.datasource, b.incarnation)));
        Ok(ended)
    }

    /// Has the log's readers remove what they have of an ended incarnation, now and whenever they begin anew; durable
    /// when this returns. Returns the version of the rules at which that is asked for.
    ///
    /// # Errors
    /// [`RegistryError::NoDatasource`] if it has not ended; those of a change.
    pub fn purge_incarnation(
        &self,
        actor: &Actor,
        id: &DatasourceId,
        incarnation: Incarnation,
    ) -> Result<u64, RegistryError> {
        let what = json!({ "incarnation": incarnation });
        self.make_change(|database| {
            if !(1..=database.ended_incarnations_of(id)?).contains(&incarnation) {
                return Err(RegistryError::NoDatasource(id.scope(incarnation).to_string()));
            }
            let change = database.begin()?;
            let Some((version, row)) = change.purge_incarnation(id, incarnation)? else {
                drop(change);
                return database.record_rules_version();
            };
            change.audit(actor, &AuditEvent::of_datasource("datasource.purged", id, &what))?;
            change.commit()?;
            self.tell_incarnation(database, version, row);
            tracing::warn!(datasource = %id, incarnation, "the records of a deleted datasource are removed");
            Ok(version)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::auth::scope::{Scope, Scopes};
    use crate::auth::{Key, NewDatasource};

    fn create(registry: &Registry, id: &str) -> Arc<Key> {
        let id = DatasourceId::new(id).expect("a slug");
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let (limits, schemas, event_time) = (None, None, None);
        let new = NewDatasource { id: Some(id), name: "Press 4", scopes, limits, schemas, event_time };
        registry.create_datasource_with(&Actor::SYSTEM, &new).expect("created").1
    }

    fn delete(registry: &Registry, id: &str) {
        registry.delete_datasource(&Actor::SYSTEM, &DatasourceId::new(id).expect("a slug")).expect("there");
    }

    /// The rules, each as its incarnation, event and keys.
    fn rules(registry: &Registry) -> Vec<(u64, Incarnation, IncarnationEvent, Vec<KeyId>)> {
        let rules = registry.lock_database().record_rules().expect("readable");
        let told = |(version, rule)| match rule {
            RecordRule::Incarnation(row, keys) => (version, row.incarnation, row.event, keys.to_vec()),
            RecordRule::Leak(row) => panic!("{row:?}"),
        };
        rules.into_iter().map(told).collect()
    }

    #[test]
    fn each_incarnation_has_keys_of_its_own_and_begins_where_the_log_ends() {
        use IncarnationEvent::{Begun, Ended, Purged};
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Registry::open(dir.path()).expect("opens");
        registry.set_log_end(Box::new(|_| Ok(17)));
        let first = create(&registry, "press-4");
        assert_eq!(registry.scope_of(&first).expect("live").as_str(), "press-4");
        delete(&registry, "press-4");
        assert_eq!(registry.scope_of(&first), None);
        let second = create(&registry, "press-4");
        assert_eq!(registry.scope_of(&first), None, "not even now");
        assert_eq!(registry.scope_of(&second).expect("live").as_str(), "press-4~2");
        let press = second.datasource.clone();
        for not_ended in [0, 2, 3] {
            let refused = registry.purge_incarnation(&Actor::SYSTEM, &press, not_ended);
            assert!(matches!(refused, Err(RegistryError::NoDatasource(_))), "{refused:?}");
        }
        for _ in 0..2 {
            assert_eq!(registry.purge_incarnation(&Actor::SYSTEM, &press, 1).expect("ended"), 3);
        }
        let expected = vec![(1, 1, Ended, vec![first.id]), (2, 2, Begun, vec![]), (3, 1, Purged, vec![])];
        assert_eq!(rules(&registry), expected);
        drop(registry);
        let registry = Registry::open(dir.path()).expect("opens again");
        assert_eq!(rules(&registry), expected);
        assert_eq!(registry.datasource("press-4").expect("there").incarnation, 2);
        let ended = registry.ended_incarnations().expect("readable");
        assert_eq!((ended.len(), ended[0].name.as_deref()), (1, Some("Press 4")));
        assert!(ended[0].purged_at.is_some());
        delete(&registry, "press-4");
        assert_eq!(rules(&registry)[3], (4, 2, Ended, vec![second.id]));
    }

    /// As an earlier version left it.
    fn forget_incarnations(dir: &Path) {
        let connection = Connection::open(dir.join("registry.db")).expect("opens");
        let forgotten = connection.execute_batch(
            "DELETE FROM incarnations; UPDATE keys SET incarnation = NULL; UPDATE datasources SET incarnation = 1",
        );
        forgotten.expect("runs");
    }

    #[test]
    fn what_was_deleted_before_there_were_incarnations_is_the_first_one_of_its_id() {
        use IncarnationEvent::{Begun, Ended};
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Registry::open(dir.path()).expect("opens");
        let old = create(&registry, "press-4");
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let revoked =
            registry.create_key(&Actor::SYSTEM, &old.datasource, "", scopes, None).expect("created").0;
        registry.revoke_key(&Actor::SYSTEM, &old.datasource, revoked.id).expect("revoked");
        delete(&registry, "press-4");
        let new = create(&registry, "press-4");
        let of_new =
            registry.create_key(&Actor::SYSTEM, &new.datasource, "", scopes, None).expect("created").0;
        registry.revoke_key(&Actor::SYSTEM, &new.datasource, of_new.id).expect("revoked");
        let gone = create(&registry, "press-5");
        delete(&registry, "press-5");
        create(&registry, "press-6");
        drop(registry);
        for _ in 0..2 {
            forget_incarnations(dir.path());
            let registry = Registry::open(dir.path()).expect("opens");
            let mut of_press: Vec<_> = rules(&registry);
            let ids: Vec<_> = registry
                .ended_incarnations()
                .expect("readable")
                .into_iter()
                .map(|ended| (ended.datasource.to_string(), ended.incarnation))
                .collect();
            assert_eq!(ids, [("press-4".to_owned(), 1), ("press-5".to_owned(), 1)]);
            of_press.iter_mut().for_each(|(.., keys)| keys.sort_unstable());
            let mut of_old = vec![old.id, revoked.id];
            of_old.sort_unstable();
            assert_eq!(
                of_press,
                [(1, 1, Ended, of_old), (2, 2, Begun, vec![]), (3, 1, Ended, vec![gone.id])]
            );
            assert_eq!(
                registry.scope_of(&registry.keys(&new.datasource)[0]).expect("live").as_str(),
                "press-4~2"
            );
            drop(registry);
            let registry = Registry::open(dir.path()).expect("opens again");
            assert_eq!(rules(&registry).len(), 3, "it is noted once");
            assert_eq!(registry.datasource("press-6").expect("there").incarnation, 1);
        }
    }
}
