//! The changes of datasources. Each is durable, in the live view and in the audit when it returns; see
//! [the registry](super) for what that guarantees. In a cluster each can also fail with
//! [`RegistryError::Away`] or [`RegistryError::Overtaken`] (both transient), [`RegistryError::TooLarge`] or
//! [`RegistryError::Cluster`], and blocks until the other nodes have it.

use std::sync::{Arc, OnceLock};

use deunicode::deunicode_with_tofu;
use headgate_format::key::{ApiKey, Digest};
use serde_json::{Value, json};

use super::Registry;
use super::audit::{Actor, AuditEvent, add_key_ids, setting_as_json};
use super::database::RegistryDatabase;
use super::datasource::Datasource;
use super::error::RegistryError;
use super::incarnations::IncarnationRow;
use super::key::Key;
use super::key_ends::KeyEnd;
use super::keys::{NewKey, check_name, generate_key};
use super::setting::JsonSetting;
use super::transaction::{KeyEndReason, RegistryTransaction};
use crate::auth::scope::Scopes;
use crate::limits::DATASOURCE_ID_BYTES_MAX;
use crate::message::{DatasourceId, Incarnation, Lease, now_micros};

/// A datasource to be created with its first key. The texts have been validated by the caller.
#[derive(Debug, Clone)]
pub struct NewDatasource<'a> {
    /// Without one, an id is derived from the name, with a suffix `-2`, `-3`, … if it is taken.
    pub id: Option<DatasourceId>,
    /// The display name.
    pub name: &'a str,
    /// What the first key may be used for.
    pub scopes: Scopes,
    /// The limits that all its keys share, a JSON text.
    pub limits: Option<&'a str>,
    /// The schemas that its messages must match, a JSON text.
    pub schemas: Option<&'a str>,
    /// Where the event time of its messages is, a JSON text.
    pub event_time: Option<&'a str>,
}

/// The settings of a new datasource, each a JSON text.
pub(super) struct NewDatasourceSettings<'a> {
    pub(super) limits: Option<&'a str>,
    pub(super) schemas: Option<&'a str>,
    pub(super) event_time: Option<&'a str>,
}

/// What a change has noted about incarnations, each with the version that it has then.
type NotedIncarnations = Vec<(u64, IncarnationRow)>;

impl Registry {
    /// Creates a datasource without settings, as [`Registry::create_datasource_with`].
    ///
    /// # Errors
    /// Those of [`Registry::create_datasource_with`].
    #[cfg(any(test, feature = "testing"))]
    pub fn create_datasource(
        &self,
        actor: &Actor,
        id: Option<DatasourceId>,
        name: &str,
        scopes: Scopes,
    ) -> Result<(Arc<Datasource>, Arc<Key>, ApiKey), RegistryError> {
        let (limits, schemas, event_time) = (None, None, None);
        self.create_datasource_with(actor, &NewDatasource { id, name, scopes, limits, schemas, event_time })
    }

    /// Creates a datasource with its settings, and its first key. All of it is one change, which is durable on
    /// return: no crash leaves a key without its limits.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] if the id is taken; [`RegistryError::InvalidName`] if the name is blank,
    /// too long or has control characters, or if there are no scopes; [`RegistryError::NoSlug`] if no id can be made from it;
    /// [`RegistryError::Database`] if it cannot be made durable.
    pub fn create_datasource_with(
        &self,
        actor: &Actor,
        new: &NewDatasource<'_>,
    ) -> Result<(Arc<Datasource>, Arc<Key>, ApiKey), RegistryError> {
        let name = check_name("name", new.name)?;
        if name.is_empty() {
            return Err(RegistryError::InvalidName("a datasource needs a name".to_owned()));
        }
        let scopes = new.scopes;
        let mut what = json!({ "name": name, "scopes": scopes });
        for (setting, text) in
            [("limits", new.limits), ("schemas", new.schemas), ("event_time", new.event_time)]
        {
            if text.is_some() {
                what[setting] = setting_as_json(text);
            }
        }
        let (datasource, key, secret) =
            self.make_change(|database| self.write_new_datasource(database, actor, new, name, &what))?;
        tracing::info!(datasource = %datasource.id, key_id = %key.id, %scopes, "datasource created");
        Ok((datasource, key, secret))
    }

    /// The change of [`Registry::create_datasource_with`]: begins the next incarnation of the id, if there was one.
    fn write_new_datasource(
        &self,
        database: &mut RegistryDatabase,
        actor: &Actor,
        new: &NewDatasource<'_>,
        name: &str,
        what: &Value,
    ) -> Result<(Arc<Datasource>, Arc<Key>, ApiKey), RegistryError> {
        // Inside the change: only there can no other change take the id.
        let id = self.id_of_new(new.id.as_ref(), name)?;
        let first = NewKey { datasource: &id, label: "", scopes: new.scopes, expires_at: None, limits: None };
        let (key, secret) = generate_key(database, &first)?;
        let change = database.begin()?;
        let NewDatasource { limits, schemas, event_time, .. } = *new;
        let settings = NewDatasourceSettings { limits, schemas, event_time };
        let (datasource, noted) = self.insert_new(&change, actor, id, name, &settings)?;
        change.insert_key(&key, &secret.digest())?;
        change.audit(actor, &AuditEvent::of_key("datasource.created", &key, what))?;
        change.commit()?;
        let datasource = self.show_new(database, datasource, noted);
        let key = self.live.add_key(key, secret.digest());
        Ok((datasource, key, secret))
    }

    /// Inserts a datasource in a change, with its settings, as the next incarnation of its id. Keys that are left of an
    /// earlier one end. Once that is committed, [`Registry::show_new`] lets it in.
    pub(super) fn insert_new(
        &self,
        change: &RegistryTransaction<'_>,
        actor: &Actor,
        id: DatasourceId,
        name: &str,
        settings: &NewDatasourceSettings<'_>,
    ) -> Result<(Datasource, NotedIncarnations), RegistryError> {
        let left = change.end_keys_of(&id, None)?;
        if !left.is_empty() {
            let mut what = json!({});
            add_key_ids(&mut what, left.iter().map(Digest::key_id));
            change.audit(actor, &AuditEvent::of_datasource("datasource.deleted", &id, &what))?;
        }
        let (incarnation, noted) = self.begin_new_incarnation(change, &id)?;
        let datasource = Datasource {
            id,
            name: name.into(),
            created_at: now_micros(),
            limits: JsonSetting::new(settings.limits),
            schemas: JsonSetting::new(settings.schemas),
            event_time: JsonSetting::new(settings.event_time),
            incarnation,
            lease: Lease::new(),
            traffic: OnceLock::new(),
        };
        change.insert_datasource(&datasource)?;
        Ok((datasource, noted))
    }

    /// Shows a new datasource, which has no keys yet. Its readers know that it begins anew before anybody can read it or
    /// write to it.
    pub(super) fn show_new(
        &self,
        database: &mut RegistryDatabase,
        datasource: Datasource,
        noted: NotedIncarnations,
    ) -> Arc<Datasource> {
        for (version, row) in noted {
            self.tell_incarnation(database, version, row);
        }
        self.live.add_datasource(datasource)
    }

    /// Deletes the datasource that has an id now, as [`Registry::delete_incarnation`].
    ///
    /// # Errors
    /// [`RegistryError::NoDatasource`].
    #[cfg(any(test, feature = "testing"))]
    pub fn delete_datasource(
        &self,
        actor: &Actor,
        id: &DatasourceId,
    ) -> Result<Vec<Arc<Key>>, RegistryError> {
        let present = self.existing_datasource(id)?;
        self.delete_incarnation(actor, &present)
    }

    /// Deletes a datasource and revokes its keys; not another one that has its id by now. Before this returns, every
    /// key's lease has ended and its connections are told to close, whatever the disk says;
    /// [`Registry::describe_unwritten`] says whether that is durable. Returns those keys, whose connections the caller
    /// waits for.
    ///
    /// # Errors
    /// [`RegistryError::NoDatasource`]; [`RegistryError::Denied`] if the actor's key has ended, also while this waited: then
    /// the keys that there were when it began have ended too, and the datasource stays, with those that it has got since.
    pub fn delete_incarnation(
        &self,
        actor: &Actor,
        wanted: &Datasource,
    ) -> Result<Vec<Arc<Key>>, RegistryError> {
        // Here the end of the keys begins, before any lock.
        actor.check()?;
        let id = &wanted.id;
        let find_wanted = || {
            let present = self.existing_datasource(id)?;
            let is_wanted = present.incarnation == wanted.incarnation;
            is_wanted
                .then_some(present)
                .ok_or_else(|| RegistryError::NoDatasource(wanted.scope().to_string()))
        };
        // Looked up before the datasource: if that is still there, they are its keys.
        let keys = self.live.keys_of(id);
        find_wanted()?;
        keys.iter().for_each(|key| self.end_at_once(key));
        let is_alive = |key: &Key| self.live.key(id, key.id).is_some();
        // The actor's own key may be one of them: it counts as long as nobody else has ended it.
        let own = keys.iter().find(|key| actor.is(key.id));
        let mut denial = None;
        let dead = self.end_keys(true, || {
            let datasource = find_wanted()?;
            if !own.is_some_and(|key| is_alive(key))
                && let Err(denied) = actor.check()
            {
                denial = Some(denied);
                let ended: Vec<_> = keys.iter().filter(|key| is_alive(key)).cloned().collect();
                let each = |key| KeyEnd::new(KeyEndReason::Revoked, vec![key], actor, json!({}));
                return Ok(ended.into_iter().map(each).collect());
            }
            let keys = self.live.keys_of(id);
            let mut what = json!({});
            add_key_ids(&mut what, keys.iter().map(|key| key.id));
            let mut end = KeyEnd::new(KeyEndReason::Deleted, keys, actor, what);
            end.deleted = Some(datasource);
            Ok(vec![end])
        })?;
        if let Some(denied) = denial {
            return Err(denied.into());
        }
        tracing::info!(datasource = %id, keys = dead.len(), "datasource deleted");
        Ok(dead)
    }

    /// Sets the limits of a datasource, a JSON text that the caller has validated; `None` for no limits
    /// of its own. They are in force when this returns.
    ///
    /// # Errors
    /// [`RegistryError::NoDatasource`]; [`RegistryError::Database`] if it cannot be made durable.
    pub fn set_datasource_limits(
        &self,
        actor: &Actor,
        id: &DatasourceId,
        limits: Option<String>,
    ) -> Result<(), RegistryError> {
        let limits = limits.as_deref();
        let what = json!({ "limits": setting_as_json(limits) });
        let act = AuditEvent::of_datasource("datasource.limits_changed", id, &what);
        self.make_change(|database| {
            let datasource = self.existing_datasource(id)?;
            let change = database.begin()?;
            change.set_datasource_limits(id, limits)?;
            change.audit(actor, &act)?;
            change.commit()?;
            datasource.limits.set(limits);
            Ok(())
        })
    }

    /// Sets where the event time of a datasource's messages is, a JSON text that the caller has validated; `None` for
    /// nowhere. It counts for what comes in once this returns; what is in the log keeps what it has.
    ///
    /// # Errors
    /// [`RegistryError::NoDatasource`]; [`RegistryError::Database`] if it cannot be made durable.
    pub fn set_datasource_event_time(
        &self,
        actor: &Actor,
        id: &DatasourceId,
        event_time: Option<&str>,
    ) -> Result<(), RegistryError> {
        let what = json!({ "event_time": setting_as_json(event_time) });
        let act = AuditEvent::of_datasource("datasource.event_time_changed", id, &what);
        self.make_change(|database| {
            let datasource = self.existing_datasource(id)?;
            let change = database.begin()?;
            change.set_datasource_event_time(id, event_time)?;
            change.audit(actor, &act)?;
            change.commit()?;
            datasource.event_time.set(event_time);
            Ok(())
        })
    }

    /// Sets the schemas of a datasource, a JSON text that the caller has validated; `None` for none. They
    /// are in force when this returns.
    ///
    /// # Errors
    /// [`RegistryError::NoDatasource`]; [`RegistryError::Database`] if it cannot be made durable.
    pub fn set_datasource_schemas(
        &self,
        actor: &Actor,
        id: &DatasourceId,
        schemas: Option<String>,
    ) -> Result<(), RegistryError> {
        let schemas = schemas.as_deref();
        let what = json!({ "schemas": setting_as_json(schemas) });
        let act = AuditEvent::of_datasource("datasource.schemas_changed", id, &what);
        self.make_change(|database| {
            let datasource = self.existing_datasource(id)?;
            let change = database.begin()?;
            change.set_datasource_schemas(id, schemas)?;
            change.audit(actor, &act)?;
            change.commit()?;
            datasource.schemas.set(schemas);
            Ok(())
        })
    }

    pub(super) fn existing_datasource(&self, id: &DatasourceId) -> Result<Arc<Datasource>, RegistryError> {
        self.datasource(id.as_str()).ok_or_else(|| RegistryError::NoDatasource(id.to_string()))
    }

    /// Begins the next incarnation of an id. Also returns what its readers have to be told once that is durable.
    fn begin_new_incarnation(
        &self,
        change: &RegistryTransaction<'_>,
        id: &DatasourceId,
    ) -> Result<(Incarnation, NotedIncarnations), RegistryError> {
        let mut noted = change.note_past_incarnation(id)?;
        let incarnation = change.ended_incarnations_of(id)? + 1;
        if incarnation > 1 {
            noted.push(change.begin_incarnation(id, incarnation, self.ask_log_end()?)?);
        }
        Ok((incarnation, noted))
    }

    /// The id of a new datasource: the given one, if it is free, or one derived from its name.
    pub(super) fn id_of_new(
        &self,
        given: Option<&DatasourceId>,
        name: &str,
    ) -> Result<DatasourceId, RegistryError> {
        match given {
            Some(id) if id.is_all() => {
                Err(RegistryError::InvalidName("'*' means every datasource and cannot be one".to_owned()))
            }
            Some(id) if self.has_datasource(id.as_str()) => Err(RegistryError::Exists(id.clone())),
            Some(id) => Ok(id.clone()),
            None => self.free_id(name),
        }
    }

    /// The first free id derived from `name`.
    fn free_id(&self, name: &str) -> Result<DatasourceId, RegistryError> {
        let id = DatasourceId::from_name(&deunicode_with_tofu(name, "-")).ok_or_else(|| {
            let text = "the name has no letter a-z or digit to make an id from: give an id as well";
            RegistryError::NoSlug(text)
        })?;
        Ok(if self.has_datasource(id.as_str()) { self.numbered_id(&id) } else { id })
    }

    /// The first free id that is `id` with a number.
    pub(super) fn numbered_id(&self, id: &DatasourceId) -> DatasourceId {
        let numbered = |number: u64| {
            let suffix = format!("-{number}");
            let room = DATASOURCE_ID_BYTES_MAX - suffix.len();
            let stem = id.as_str().get(..room).unwrap_or(id.as_str()).trim_end_matches('-');
            DatasourceId::new(&format!("{stem}{suffix}")).expect("a slug with a number is a slug")
        };
        let free = (2..).map(numbered).find(|id| !self.has_datasource(id.as_str()));
        free.expect("there are more numbers than datasources")
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::super::audit::AuditQuery;
    use super::super::replica::tests::ClusterOfOne;
    use super::*;
    use crate::auth::scope::Scope;

    const LIMITS: &str = r#"{"messages_per_s":5}"#;
    const SCHEMAS: &str = r##"[{"filter":"#"}]"##;

    fn new_datasource(name: &str) -> NewDatasource<'_> {
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        NewDatasource {
            id: None,
            name,
            scopes,
            limits: Some(LIMITS),
            schemas: Some(SCHEMAS),
            event_time: None,
        }
    }

    fn new_key(datasource: &DatasourceId) -> NewKey<'_> {
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        NewKey { datasource, label: "left", scopes, expires_at: None, limits: Some(LIMITS) }
    }

    fn empty() -> (TempDir, Registry) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Registry::open(dir.path()).expect("opens");
        (dir, registry)
    }

    #[test]
    fn limits_and_schemas_come_with_what_they_are_for_in_one_audited_change() {
        let (dir, registry) = empty();
        let (press, _, _) =
            registry.create_datasource_with(&Actor::SYSTEM, &new_datasource("Press 4")).expect("created");
        let (key, _) = registry.create_key_with(&Actor::SYSTEM, &new_key(&press.id)).expect("created");
        let check = |registry: &Registry| {
            let press = registry.datasource("press-4").expect("there");
            let key = registry.key(&press.id, key.id).expect("there");
            let settings = [&press.limits, &press.schemas, &key.limits].map(|setting| setting.text());
            assert_eq!(
                settings.each_ref().map(|text| text.as_deref()),
                [Some(LIMITS), Some(SCHEMAS), Some(LIMITS)]
            );
        };
        check(&registry);
        let page = AuditQuery { from: None, to: None, after: 0, limit: 10 };
        let entries = registry.audit_entries(&page).expect("readable");
        let entries: Vec<_> = entries.iter().map(|entry| (&*entry.action, entry.what.get())).collect();
        assert_eq!(
            entries,
            [
                (
                    "datasource.created",
                    r##"{"limits":{"messages_per_s":5},"name":"Press 4","schemas":[{"filter":"#"}],"scopes":["ingest"]}"##
                ),
                (
                    "key.created",
                    r#"{"expires_at":null,"label":"left","limits":{"messages_per_s":5},"scopes":["ingest"]}"#
                ),
            ]
        );
        drop(registry);
        check(&Registry::open(dir.path()).expect("opens again"));
    }

    #[test]
    fn in_a_cluster_each_creation_is_one_batch() {
        let batches = Arc::new(ClusterOfOne::default());
        let database = RegistryDatabase::in_memory().expect("opens");
        let registry = Registry::from_database(database, Some(batches.clone())).expect("empty");
        let (press, first, first_secret) =
            registry.create_datasource_with(&Actor::SYSTEM, &new_datasource("Press 4")).expect("created");
        let (_, secret) = registry.create_key_with(&Actor::SYSTEM, &new_key(&press.id)).expect("created");
        assert!(first.holds());
        let row = |secret: &ApiKey| format!("key.{}", blake3::Hash::from_bytes(secret.digest().0).to_hex());
        let datasource =
            vec!["datasource.press-4".to_owned(), row(&first_secret), "audit.000000000001".to_owned()];
        assert_eq!(
            *batches.batches.lock(),
            [datasource, vec![row(&secret), "audit.000000000002".to_owned()]]
        );
    }
}
