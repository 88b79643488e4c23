//! Datasources on their way to another gateway: exported with the digests of their keys, so that the keys work there, and
//! with no secret. What is imported begins anew: its incarnation is the next one of its id, and it has no records.

use std::collections::HashSet;
use std::sync::Arc;

use headgate_format::key::Digest;
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Value, json};

use super::Registry;
use super::audit::{Actor, AuditEvent};
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
    /// be done.
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
        let id = self.id_of_import(new)?;
        self.check_keys_are_new(database, new)?;
        let imported = ImportedDatasource { id: id.clone(), keys: new.keys.len() };
        if new.is_rehearsal {
            return Ok(imported);
        }
        let keys: Vec<(Key, Digest)> = new.keys.iter().map(|key| imported_key(&id, key)).collect();
        let ids: Vec<KeyId> = keys.iter().map(|(key, _)| key.id).collect();
        let what = json!({ "name": name, "imported_from": new.id, "keys": ids });
        let change = database.begin()?;
        let settings = NewDatasourceSettings {
            limits: new.limits.as_deref(),
            schemas: new.schemas.as_deref(),
            event_time: new.event_time.as_deref(),
        };
        let (datasource, noted) = self.insert_new(&change, id, name, &settings)?;
        for (key, digest) in &keys {
            change.insert_key(key, digest)?;
        }
        change.audit(actor, &AuditEvent::of_datasource("datasource.imported", &datasource.id, &what))?;
        change.commit()?;
        self.show_new(database, datasource, noted);
        for (key, digest) in keys {
            self.live.add_key(key, digest);
        }
        Ok(imported)
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
