//! Datasources on their way to another gateway: exported with the digests of their keys, so that the keys work there, and
//! with no secret. What is imported begins anew: its incarnation is the next one of its id, and it has no records.

use std::collections::HashSet;
use std::sync::Arc;

use headgate_format::key::Digest;
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Value, json};

use super::Registry;
use super::audit::{Actor, AuditEvent, add_key_ids};
use super::database::RegistryDatabase;
use super::datasources::NewDatasourceSettings;
use super::error::RegistryError;
use super::key::{Key, KeyAttributes, Rotation};
use super::keys::check_name;
use super::setting::JsonSetting;
use crate::auth::scope::Scopes;
use crate::message::{DatasourceId, KeyId, TimeMicros};
use crate::time::{Rfc3339, parse_time};
use crate::whole_number;

/// The version of the format of [`ExportedDatasource`].
pub const EXPORT_FORMAT: u32 = 1;

/// A datasource with its live keys, as it is exported: one line of JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportedDatasource {
    /// [`EXPORT_FORMAT`].
    #[serde(deserialize_with = "whole_number::narrowed")]
    pub headgate_export: u32,
    /// The slug.
    pub id: String,
    /// The display name.
    pub name: String,
    /// The limits that all its keys share.
    #[serde(default)]
    pub limits: Value,
    /// The schemas that its messages must match, as the registry has them.
    #[serde(default)]
    pub schemas: Value,
    /// Where the event time of its messages is.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub event_time: Value,
    /// Its keys, without those that have ended.
    pub keys: Vec<ExportedKey>,
}

/// A key, without its secret.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportedKey {
    /// The digest by which the key is known, in hex.
    #[serde(deserialize_with = "digest")]
    pub digest: KeyDigestText,
    /// What it may be used for.
    pub scopes: Scopes,
    /// The display name, or empty.
    #[serde(default)]
    pub label: String,
    /// When it was created.
    #[serde(deserialize_with = "time")]
    pub created_at: Rfc3339,
    /// When it ends by itself: at its expiry, or at the end of its grace.
    #[serde(default, deserialize_with = "optional_time")]
    pub expires_at: Option<Rfc3339>,
    /// Its own limits.
    #[serde(default)]
    pub limits: Value,
}

/// The digest of a key, 64 hex characters in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyDigestText([u8; 32]);

impl Serialize for KeyDigestText {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

fn digest<'de, D: Deserializer<'de>>(deserializer: D) -> Result<KeyDigestText, D::Error> {
    let text = String::deserialize(deserializer)?;
    let hash =
        blake3::Hash::from_hex(&text).map_err(|_| de::Error::custom("a digest has 64 hex characters"))?;
    Ok(KeyDigestText(*hash.as_bytes()))
}

fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Rfc3339, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_time(&text).map(Rfc3339).ok_or_else(|| de::Error::custom("a time has to be RFC 3339"))
}

fn optional_time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Rfc3339>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
    let time = parse_time(&text).ok_or_else(|| de::Error::custom("a time has to be RFC 3339"))?;
    Ok(Some(Rfc3339(time)))
}

/// A datasource to be imported. The texts have been validated by the caller.
pub struct NewImport<'a> {
    /// The id that it had.
    pub id: DatasourceId,
    /// Whether it gets another one if that is taken.
    pub may_rename: bool,
    /// The display name.
    pub name: &'a str,
    /// The limits that all its keys share, a JSON text.
    pub limits: Option<String>,
    /// The schemas that its messages must match, a JSON text.
    pub schemas: Option<String>,
    /// Where the event time of its messages is, a JSON text.
    pub event_time: Option<String>,
    /// Its keys, each with its own limits, a JSON text.
    pub keys: &'a [(&'a ExportedKey, Option<String>)],
    /// Whether it is only checked.
    pub is_rehearsal: bool,
}

/// What was imported, or would be.
pub struct ImportedDatasource {
    /// Its id here.
    pub id: DatasourceId,
    /// How many keys it has.
    pub keys: usize,
}

impl Registry {
    /// A datasource with its live keys; `None` if there is none with this id.
    pub fn export(&self, id: &str) -> Option<ExportedDatasource> {
        let datasource = self.datasource(id)?;
        let value = |setting: &JsonSetting| {
            setting.text().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
        };
        let lives = |key: &&Arc<Key>| key.holds() && !key.has_expired();
        let keys = self.keys(&datasource.id);
        let keys = keys.iter().filter(lives).map(|key| ExportedKey {
            digest: KeyDigestText(key.digest.0),
            scopes: key.scopes,
            label: key.label.to_string(),
            created_at: Rfc3339(key.created_at),
            expires_at: key.ends_at().map(Rfc3339),
            limits: value(&key.limits),
        });
        Some(ExportedDatasource {
            headgate_export: EXPORT_FORMAT,
            id: datasource.id.to_string(),
            name: datasource.name.to_string(),
            limits: value(&datasource.limits),
            schemas: value(&datasource.schemas),
            event_time: value(&datasource.event_time),
            keys: keys.collect(),
        })
    }

    /// Imports a datasource with its keys as one change, which is durable on return; or only checks whether that can
    /// be done. In a cluster more than about 1,000 keys come in several batches: if a later one fails, the datasource has
    /// those that came, and the same import completes it.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] if the id is taken and it may have no other; [`RegistryError::KeyExists`] if a key is
    /// known here, alive or dead; [`RegistryError::InvalidName`]; [`RegistryError::Database`] if it cannot be made
    /// durable.
    pub fn import(&self, actor: &Actor, new: &NewImport<'_>) -> Result<ImportedDatasource, RegistryError> {
        let name = check_name("name", new.name)?;
        for (key, _) in new.keys {
            check_name("label", &key.label)?;
        }
        let imported = self.make_change(|database| self.write_import(database, actor, new, name))?;
        if !new.is_rehearsal {
            tracing::info!(datasource = %imported.id, keys = imported.keys, "datasource imported");
        }
        Ok(imported)
    }

    fn write_import(
        &self,
        database: &mut RegistryDatabase,
        actor: &Actor,
        new: &NewImport<'_>,
        name: &str,
    ) -> Result<ImportedDatasource, RegistryError> {
        // Inside the change: only there can no other change take the id or a key.
        let (id, known) = match self.unfinished_import(database, new, name)? {
            Some(unfinished) => unfinished,
            None => {
                let id = self.id_of_import(new)?;
                self.check_keys_are_new(database, new)?;
                (id, HashSet::new())
            }
        };
        let imported = ImportedDatasource { id: id.clone(), keys: new.keys.len() };
        if new.is_rehearsal {
            return Ok(imported);
        }
        let is_there = self.has_datasource(id.as_str());
        let mut what = json!({ "name": name, "imported_from": new.id });
        add_key_ids(&mut what, new.keys.iter().map(|(key, _)| Digest(key.digest.0).key_id()));
        let keys = new.keys.iter().map(|key| imported_key(&id, key));
        let keys: Vec<(Key, Digest)> =
            keys.filter(|(key, _)| !is_there || !known.contains(&key.id)).collect();
        let settings = NewDatasourceSettings {
            limits: new.limits.as_deref(),
            schemas: new.schemas.as_deref(),
            event_time: new.event_time.as_deref(),
        };
        let change = database.begin()?;
        let begun = if is_there {
            None
        } else {
            known.iter().try_for_each(|id| change.take_out_key(*id))?;
            Some(self.insert_new(&change, actor, id.clone(), name, &settings)?)
        };
        for (key, digest) in &keys {
            change.insert_key(key, digest)?;
        }
        change.audit(actor, &AuditEvent::of_datasource("datasource.imported", &id, &what))?;
        change.commit()?;
        if let Some((datasource, noted)) = begun {
            self.show_new(database, datasource, noted);
        }
        for (key, digest) in keys {
            self.live.add_key(key, digest);
        }
        Ok(imported)
    }

    /// The datasource of which an earlier attempt at this import has published a part, and the keys that it has already.
    /// The audit is the last row of an import, so it has none.
    fn unfinished_import(
        &self,
        database: &RegistryDatabase,
        new: &NewImport<'_>,
        name: &str,
    ) -> Result<Option<(DatasourceId, HashSet<KeyId>)>, RegistryError> {
        let (mut owner, mut known, mut seen) = (None, HashSet::new(), HashSet::new());
        for (key, _) in new.keys {
            let digest = Digest(key.digest.0);
            if !seen.insert(digest.key_id()) {
                return Ok(None);
            }
            let Some(stored) = database.key_with_id(digest.key_id())? else { continue };
            let of = owner.get_or_insert_with(|| stored.datasource.clone());
            if stored.is_revoked || stored.digest != digest || *of != stored.datasource {
                return Ok(None);
            }
            known.insert(digest.key_id());
        }
        let Some(id) = owner.and_then(|id| DatasourceId::new(&id).ok()) else { return Ok(None) };
        if id != new.id && !new.may_rename {
            return Ok(None);
        }
        let is_unfinished = match self.datasource(id.as_str()) {
            Some(present) => {
                let has_others = self.live.keys_of(&id).iter().any(|key| !known.contains(&key.id));
                *present.name == *name && !has_others && !database.is_audited(&id)?
            }
            None => true,
        };
        Ok(is_unfinished.then_some((id, known)))
    }

    fn id_of_import(&self, new: &NewImport<'_>) -> Result<DatasourceId, RegistryError> {
        match self.id_of_new(Some(&new.id), new.name) {
            Err(RegistryError::Exists(_)) if new.may_rename => Ok(self.numbered_id(&new.id)),
            id => id,
        }
    }

    /// Ensures that no key is known here, alive or dead: one that was revoked stays dead.
    fn check_keys_are_new(
        &self,
        database: &RegistryDatabase,
        new: &NewImport<'_>,
    ) -> Result<(), RegistryError> {
        let mut seen = HashSet::new();
        for (key, _) in new.keys {
            let id = Digest(key.digest.0).key_id();
            if !seen.insert(id) || database.has_key_id(id)? {
                return Err(RegistryError::KeyExists { key: id, datasource: new.id.clone() });
            }
        }
        Ok(())
    }
}

fn imported_key(id: &DatasourceId, (key, limits): &(&ExportedKey, Option<String>)) -> (Key, Digest) {
    let digest = Digest(key.digest.0);
    let attributes = KeyAttributes {
        digest,
        datasource: id.clone(),
        scopes: key.scopes,
        label: key.label.trim(),
        created_at: key.created_at.0,
        expires_at: key.expires_at.map(|Rfc3339(at)| -> TimeMicros { at }),
        rotation: Rotation::default(),
        limits: limits.as_deref(),
    };
    (Key::from(attributes), digest)
}

#[cfg(test)]
mod tests {
    use super::super::audit::AuditQuery;
    use super::super::replica::RegistryRevision;
    use super::super::replica::tests::ClusterOfOne;
    use super::super::rows::RegistryRow;
    use super::*;
    use crate::auth::scope::Scope;

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Registry::open(dir.path()).expect("opens");
        (dir, registry)
    }

    fn import(
        registry: &Registry,
        from: &ExportedDatasource,
        may_rename: bool,
        is_rehearsal: bool,
    ) -> Result<ImportedDatasource, RegistryError> {
        let keys: Vec<_> = from.keys.iter().map(|key| (key, None)).collect();
        let id = DatasourceId::new(&from.id).expect("a slug");
        let (limits, schemas, event_time, name) = (None, None, None, from.name.as_str());
        let keys = keys.as_slice();
        let new = NewImport { id, may_rename, name, limits, schemas, event_time, keys, is_rehearsal };
        registry.import(&Actor::SYSTEM, &new)
    }

    #[test]
    fn what_is_exported_and_read_again_works_elsewhere_and_has_no_secret() {
        let ((_dir, from), (to_dir, to)) = (registry(), registry());
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let (press, key, secret) =
            from.create_datasource(&Actor::SYSTEM, None, "Press 4", scopes).expect("created");
        let (dead, dead_secret) =
            from.create_key(&Actor::SYSTEM, &press.id, "dead", scopes, None).expect("created");
        from.revoke_key(&Actor::SYSTEM, &press.id, dead.id).expect("revoked");
        let line = serde_json::to_string(&from.export("press-4").expect("there")).expect("JSON");
        assert!(!line.contains(secret.expose()) && from.export("none").is_none());
        let read: ExportedDatasource = serde_json::from_str(&line).expect("as it was written");
        assert_eq!(read.keys.len(), 1, "a dead key is not exported");
        import(&to, &read, false, true).expect("it may come");
        assert!(to.datasource("press-4").is_none(), "it was only checked");
        let imported = import(&to, &read, false, false).expect("imported");
        assert_eq!((imported.id.as_str(), imported.keys), ("press-4", 1));
        assert_eq!(to.find(&secret.digest()).expect("it works").id, key.id);
        assert!(to.find(&dead_secret.digest()).is_none());

        let taken = import(&to, &read, false, false).err().expect("there is one");
        assert!(matches!(taken, RegistryError::Exists(_)), "{taken}");
        let known = import(&to, &read, true, false).err().expect("its key is there");
        assert!(known.to_string().contains(&key.id.to_string()), "{known}");
        drop(to);
        let to = Registry::open(to_dir.path()).expect("opens again");
        assert!(to.find(&secret.digest()).is_some(), "durable");

        // A key that is dead here stays so, and what is imported after a deletion begins anew.
        to.delete_datasource(&Actor::SYSTEM, &press.id).expect("deleted");
        let dead = import(&to, &read, false, false).err().expect("its key is dead here");
        assert!(matches!(dead, RegistryError::KeyExists { .. }), "{dead}");
        let without = ExportedDatasource { keys: Vec::new(), ..read };
        import(&to, &without, false, false).expect("imported");
        assert_eq!(to.datasource("press-4").expect("there").incarnation, 2);
        let renamed = import(&to, &without, true, false).expect("imported");
        assert_eq!(renamed.id.as_str(), "press-4-2");
    }

    fn exported(keys: usize) -> ExportedDatasource {
        let key = |number: usize| {
            let digest = KeyDigestText(*blake3::hash(&number.to_le_bytes()).as_bytes());
            let (scopes, created_at) = (Scopes::from_slice(&[Scope::Ingest]), Rfc3339(1));
            let (label, limits) = (String::new(), Value::Null);
            ExportedKey { digest, scopes, label, created_at, expires_at: None, limits }
        };
        ExportedDatasource {
            headgate_export: EXPORT_FORMAT,
            id: "press-4".to_owned(),
            name: "Press 4".to_owned(),
            limits: Value::Null,
            schemas: Value::Null,
            event_time: Value::Null,
            keys: (0..keys).map(key).collect(),
        }
    }

    fn node(cluster: &Arc<ClusterOfOne>) -> Registry {
        let database = RegistryDatabase::in_memory().expect("opens");
        Registry::from_database(database, Some(cluster.clone())).expect("empty")
    }

    /// A node that joins when the cluster's registry has these rows.
    fn joined(rows: &[(RegistryRevision, RegistryRow)]) -> Registry {
        let mut database = RegistryDatabase::in_memory().expect("opens");
        let all: Vec<_> = rows.iter().map(|(_, row)| row).collect();
        database.take_over(&all, rows.len() as u64, true).expect("written");
        Registry::from_database(database, Some(Arc::new(ClusterOfOne::default()))).expect("it joins")
    }

    fn usable(registry: &Registry, from: &ExportedDatasource) -> usize {
        let is_usable = |key: &&ExportedKey| registry.find(&Digest(key.digest.0)).is_some();
        let usable = from.keys.iter().filter(is_usable).count();
        assert_eq!(usable, registry.key_count());
        usable
    }

    #[test]
    fn an_import_of_which_a_cluster_has_got_a_part_works_as_far_as_it_has_come_and_is_completed() {
        const KEYS: usize = 1_500;
        let cluster = Arc::<ClusterOfOne>::default();
        let (here, there, press) = (node(&cluster), node(&Arc::default()), exported(KEYS));
        *cluster.batches_left.lock() = Some(1);
        let cut = import(&here, &press, false, false).err().expect("NATS goes away");
        assert!(matches!(cut, RegistryError::Away(_)), "{cut}");
        let part = cluster.rows.lock().clone();
        let end = part.len() as RegistryRevision;
        assert!(matches!(part[0].1, RegistryRow::Datasource(..)), "{:?}", part[0]);
        for registry in [&there, &here] {
            registry.apply(&part, end, false).expect("applied");
            assert_eq!(usable(registry, &press), part.len() - 1);
        }
        assert_eq!(usable(&joined(&part), &press), part.len() - 1);

        *cluster.batches_left.lock() = None;
        assert_eq!(import(&here, &press, false, true).expect("it may come").keys, KEYS);
        assert_eq!(import(&here, &press, true, false).expect("completed").id.as_str(), "press-4");
        let all = cluster.rows.lock().clone();
        there.apply(&all, all.len() as RegistryRevision, false).expect("applied");
        for registry in [&here, &there, &joined(&all)] {
            assert_eq!(usable(registry, &press), KEYS);
            let page = AuditQuery { from: None, to: None, after: 0, limit: 10 };
            let entries = registry.audit_entries(&page).expect("readable");
            assert_eq!(entries.len(), 1);
            let what: Value = serde_json::from_str(entries[0].what.get()).expect("JSON");
            let named = what["keys"].as_array().map(Vec::len);
            assert_eq!((named, &what["more_keys"]), (Some(1_000), &json!(KEYS - 1_000)));
        }
        let again = import(&here, &press, false, false).err().expect("it is complete");
        assert!(matches!(again, RegistryError::Exists(_)), "{again}");
    }

    #[test]
    fn keys_without_their_datasource_stop_no_start_and_come_or_end_with_one() {
        let cluster = Arc::<ClusterOfOne>::default();
        let press = exported(3);
        import(&node(&cluster), &press, false, false).expect("imported");
        let (datasource, keys): (Vec<_>, Vec<_>) = cluster
            .rows
            .lock()
            .iter()
            .filter(|(_, row)| !matches!(row, RegistryRow::Audit(..)))
            .cloned()
            .partition(|(_, row)| matches!(row, RegistryRow::Datasource(..)));
        let late = joined(&keys);
        assert_eq!(usable(&late, &press), 0);
        late.apply(&[(100, datasource[0].1.clone())], 100, false).expect("applied");
        assert_eq!(usable(&late, &press), 3);

        let (completed, ended) = (joined(&keys), joined(&keys));
        import(&completed, &press, false, false).expect("completed");
        assert_eq!(usable(&completed, &press), 3);
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let (press_4, _, _) =
            ended.create_datasource(&Actor::SYSTEM, None, "Press 4", scopes).expect("created");
        assert_eq!(ended.keys(&press_4.id).len(), 1, "the first of its own");
        let dead = import(&ended, &press, true, false).err().expect("its keys are dead");
        assert!(matches!(dead, RegistryError::KeyExists { .. }), "{dead}");
    }

    #[test]
    fn what_is_no_export_is_refused() {
        let key = r#""scopes":["ingest"],"created_at":"2026-11-30T00:00:00Z""#;
        let whole = "0".repeat(64);
        for (line, is_one) in [
            (
                format!(
                    r#"{{"headgate_export":1,"id":"a","name":"a","keys":[{{"digest":"{whole}",{key}}}]}}"#
                ),
                true,
            ),
            (
                format!(
                    r#"{{"headgate_export":1,"id":"a","name":"a","keys":[{{"digest":"0{whole}",{key}}}]}}"#
                ),
                false,
            ),
            (
                r#"{"headgate_export":1,"id":"a","name":"a","keys":[{"digest":"zz","scopes":["ingest"]}]}"#
                    .to_owned(),
                false,
            ),
            (r#"{"headgate_export":1,"id":"a","name":"a"}"#.to_owned(), false),
            (r#"{"headgate_export":1,"id":"a","name":"a","keys":[],"secret":"x"}"#.to_owned(), false),
        ] {
            assert_eq!(serde_json::from_str::<ExportedDatasource>(&line).is_ok(), is_one, "{line}");
        }
    }
}
