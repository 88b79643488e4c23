//! The changes of the registry. Each is durable, in the live view and in the audit when it returns; see
//! `registry.rs` for what that guarantees. In a cluster each can also fail with
//! [`RegistryError::Away`] or [`RegistryError::Overtaken`] (both transient), [`RegistryError::TooLarge`] or
//! [`RegistryError::Cluster`], and blocks until the other nodes have it.

use std::sync::Arc;

use serde_json::{Value, json};

use super::audit::{Actor, AuditEvent};
use super::change::KeyEndReason;
use super::database::RegistryDatabase;
use super::key::ApiKey;
use super::live::{Datasource, Key, KeyAttributes, Rotation};
use super::registry::{Registry, RegistryError};
use super::setting::JsonSetting;
use super::{Scope, Scopes};
use crate::limits::{DATASOURCE_ID_BYTES_MAX, NAME_BYTES_MAX};
use crate::message::{DatasourceId, KeyId, TimeMicros, now_micros};
use crate::time::Rfc3339;

impl Registry {
    /// Creates a datasource and its first key; both are durable on return. Without an `id`, one is
    /// derived from the name, with a suffix `-2`, `-3`, … if it is taken.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] if the `id` is taken; [`RegistryError::InvalidName`] if the name is blank,
    /// too long or has control characters, if no id can be made from it, or if there are no scopes;
    /// [`RegistryError::Database`] if it cannot be made durable.
    pub fn create_datasource(
        &self,
        actor: &Actor,
        id: Option<DatasourceId>,
        name: &str,
        scopes: Scopes,
    ) -> Result<(Arc<Datasource>, Arc<Key>, ApiKey), RegistryError> {
        let name = check_name("name", name)?;
        if name.is_empty() {
            return Err(RegistryError::InvalidName("a datasource needs a name".to_owned()));
        }
        let (datasource, key, secret) = self.make_change(|database| {
            // Inside the change: only there can no other change take the id.
            let id = match &id {
                Some(id) if id.is_all() => {
                    return Err(RegistryError::InvalidName(
                        "'*' means every datasource and cannot be one".to_owned(),
                    ));
                }
                Some(id) if self.has_datasource(id.as_str()) => {
                    return Err(RegistryError::Exists(id.clone()));
                }
                Some(id) => id.clone(),
                None => self.free_id(name)?,
            };
            let datasource = Datasource {
                id,
                name: name.into(),
                created_at: now_micros(),
                limits: JsonSetting::default(),
                schemas: JsonSetting::default(),
            };
            let (key, secret) = generate_key(database, &datasource.id, "", scopes, None)?;
            let change = database.begin()?;
            change.insert_datasource(&datasource)?;
            change.insert_key(&key, &secret.digest())?;
            change.audit(
                actor,
                &AuditEvent {
                    action: "datasource.created",
                    datasource: Some(&datasource.id),
                    key_id: Some(key.id),
                    what: &json!({ "name": name, "scopes": scopes }),
                },
            )?;
            change.commit()?;
            let datasource = self.live.add_datasource(datasource);
            let key = self.live.add_key(key, secret.digest());
            Ok((datasource, key, secret))
        })?;
        tracing::info!(datasource = %datasource.id, key_id = %key.id, %scopes, "datasource created");
        Ok((datasource, key, secret))
    }

    /// Creates a key of a datasource or of all of them ([`DatasourceId::all`]), durable on return.
    ///
    /// # Errors
    /// [`RegistryError::NoDatasource`]; [`RegistryError::InvalidName`] if the label is too long or has
    /// control characters, or if there are no scopes; [`RegistryError::Database`] if it cannot be
    /// made durable.
    pub fn create_key(
        &self,
        actor: &Actor,
        datasource: &DatasourceId,
        label: &str,
        scopes: Scopes,
        expires_at: Option<TimeMicros>,
    ) -> Result<(Arc<Key>, ApiKey), RegistryError> {
        let label = check_name("label", label)?;
        let (key, secret) = self.make_change(|database| {
            self.check_owner(datasource)?;
            let (key, secret) = generate_key(database, datasource, label, scopes, expires_at)?;
            let change = database.begin()?;
            change.insert_key(&key, &secret.digest())?;
            let what = json!({ "label": label, "scopes": scopes, "expires_at": expires_at.map(Rfc3339) });
            change.audit(actor, &key_audit_event("key.created", &key, &what))?;
            change.commit()?;
            Ok((self.live.add_key(key, secret.digest()), secret))
        })?;
        tracing::info!(%datasource, key_id = %key.id, %scopes, "key created");
        Ok((key, secret))
    }

    /// Deletes a datasource and revokes its keys, durably. Before this returns, every key's lease has
    /// ended and its connections are told to close. Returns those keys, whose connections the caller
    /// waits for.
    ///
    /// # Errors
    /// [`RegistryError::NoDatasource`]; [`RegistryError::Database`] if it cannot be made durable; the
    /// keys then keep working.
    pub fn delete_datasource(
        &self,
        actor: &Actor,
        id: &DatasourceId,
    ) -> Result<Vec<Arc<Key>>, RegistryError> {
        let dead = self.make_change(|database| {
            if !self.has_datasource(id.as_str()) {
                return Err(RegistryError::NoDatasource(id.to_string()));
            }
            let change = database.begin()?;
            let digests = change.remove_datasource(id)?;
            let keys: Vec<KeyId> = digests.iter().map(|digest| digest.key_id()).collect();
            let what = json!({ "keys": keys });
            let act =
                AuditEvent { action: "datasource.deleted", datasource: Some(id), key_id: None, what: &what };
            change.audit(actor, &act)?;
            change.commit()?;
            self.live.datasources.pin().remove(id.as_str());
            Ok(digests.iter().filter_map(|digest| self.live.kill(digest)).collect::<Vec<_>>())
        })?;
        tracing::info!(datasource = %id, keys = dead.len(), "datasource deleted");
        Ok(dead)
    }

    /// Revokes one key, durably. Before this returns, its lease has ended and its connections are told to
    /// close. Returns the key, whose connections the caller waits for, or `None` if the datasource has no
    /// such live key.
    ///
    /// # Errors
    /// [`RegistryError::LastAdmin`]; [`RegistryError::NoDatasource`]; [`RegistryError::Database`] if it
    /// cannot be made durable; the key then keeps working.
    pub fn revoke_key(
        &self,
        actor: &Actor,
        datasource: &DatasourceId,
        id: KeyId,
    ) -> Result<Option<Arc<Key>>, RegistryError> {
        let dead = self.make_change(|database| {
            self.check_owner(datasource)?;
            let Some(key) = self.live.key(datasource, id) else { return Ok(None) };
            if self.is_last_admin(&key) {
                return Err(RegistryError::LastAdmin);
            }
            let change = database.begin()?;
            let digest = change.revoke(datasource, id, KeyEndReason::Revoked)?;
            change.audit(actor, &key_audit_event("key.revoked", &key, &json!({ "label": key.label })))?;
            change.commit()?;
            Ok(digest.and_then(|digest| self.live.kill(&digest)))
        })?;
        if dead.is_some() {
            tracing::info!(%datasource, key_id = %id, "key revoked");
        }
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
        let act = AuditEvent {
            action: "datasource.limits_changed",
            datasource: Some(id),
            key_id: None,
            what: &what,
        };
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
        let act = AuditEvent {
            action: "datasource.schemas_changed",
            datasource: Some(id),
            key_id: None,
            what: &what,
        };
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

    /// Sets the limits of a key, a JSON text that the caller has validated; `None` for no limits of its
    /// own. They are in force when this returns. Returns `false` if the datasource has no such key.
    ///
    /// # Errors
    /// [`RegistryError::NoDatasource`]; [`RegistryError::Database`] if it cannot be made durable.
    pub fn set_key_limits(
        &self,
        actor: &Actor,
        datasource: &DatasourceId,
        id: KeyId,
        limits: Option<String>,
    ) -> Result<bool, RegistryError> {
        let limits = limits.as_deref();
        let what = json!({ "limits": setting_as_json(limits) });
        self.make_change(|database| {
            self.check_owner(datasource)?;
            let Some(key) = self.live.key(datasource, id) else { return Ok(false) };
            let change = database.begin()?;
            change.set_key_limits(id, limits)?;
            change.audit(actor, &key_audit_event("key.limits_changed", &key, &what))?;
            change.commit()?;
            key.limits.set(limits);
            Ok(true)
        })
    }

    /// Adds an audit entry for a change outside the registry. Durable on return.
    ///
    /// # Errors
    /// [`RegistryError::Database`] if it cannot be made durable.
    pub fn audit(&self, actor: &Actor, act: &AuditEvent<'_>) -> Result<(), RegistryError> {
        self.make_change(|database| {
            let change = database.begin()?;
            change.audit(actor, act)?;
            change.commit()
        })
    }

    fn existing_datasource(&self, id: &DatasourceId) -> Result<Arc<Datasource>, RegistryError> {
        self.datasource(id.as_str()).ok_or_else(|| RegistryError::NoDatasource(id.to_string()))
    }

    /// Whether this is the last key that can manage everything. Keys that are being rotated out do not
    /// count as others.
    pub(super) fn is_last_admin(&self, key: &Key) -> bool {
        let stays = |key: &Key| key.holds() && !key.has_expired() && key.rotation().replaced_by.is_none();
        let others =
            |other: &Arc<Key>| other.id != key.id && other.scopes.allow(Scope::Admin) && stays(other);
        key.datasource.is_all()
            && key.scopes.allow(Scope::Admin)
            && !key.has_expired()
            && !self.live.keys_of(&key.datasource).iter().any(others)
    }

    /// Checks that the owner of a key exists: a datasource, or `*` for all of them.
    pub(super) fn check_owner(&self, datasource: &DatasourceId) -> Result<(), RegistryError> {
        if datasource.is_all() { Ok(()) } else { self.existing_datasource(datasource).map(drop) }
    }

    /// The first free id derived from `name`.
    fn free_id(&self, name: &str) -> Result<DatasourceId, RegistryError> {
        let id = DatasourceId::from_name(name).ok_or_else(|| {
            let text = "the name has no letter a-z or digit to make an id from: give an id as well";
            RegistryError::InvalidName(text.to_owned())
        })?;
        if !self.has_datasource(id.as_str()) {
            return Ok(id);
        }
        let numbered = |number: u64| {
            let suffix = format!("-{number}");
            let room = DATASOURCE_ID_BYTES_MAX - suffix.len();
            let stem = id.as_str().get(..room).unwrap_or(id.as_str()).trim_end_matches('-');
            DatasourceId::new(&format!("{stem}{suffix}")).expect("a slug with a number is a slug")
        };
        let free = (2..).map(numbered).find(|id| !self.has_datasource(id.as_str()));
        Ok(free.expect("there are more numbers than datasources"))
    }
}

/// Generates a key that is not in the registry yet, with an id that no key has or had.
pub(super) fn generate_key(
    database: &RegistryDatabase,
    datasource: &DatasourceId,
    label: &str,
    scopes: Scopes,
    expires_at: Option<TimeMicros>,
) -> Result<(Key, ApiKey), RegistryError> {
    if scopes.is_empty() {
        return Err(RegistryError::InvalidName("a key needs at least one scope".to_owned()));
    }
    // Ids have 48 bits: with a million keys, about one in 280 million collides.
    let (digest, secret) = loop {
        let secret = ApiKey::generate();
        let digest = secret.digest();
        if !database.has_key_id(digest.key_id())? {
            break (digest, secret);
        }
    };
    let key = Key::from(KeyAttributes {
        digest,
        datasource: datasource.clone(),
        scopes,
        label,
        created_at: now_micros(),
        expires_at,
        rotation: Rotation::default(),
        limits: None,
    });
    Ok((key, secret))
}

pub(super) fn key_audit_event<'a>(action: &'static str, key: &'a Key, what: &'a Value) -> AuditEvent<'a> {
    AuditEvent { action, datasource: Some(&key.datasource), key_id: Some(key.id), what }
}

/// A setting's text as it is written to the audit. Text that is not JSON becomes a string.
fn setting_as_json(text: Option<&str>) -> Value {
    text.map_or(Value::Null, |text| serde_json::from_str(text).unwrap_or_else(|_| text.into()))
}

/// Checks a name or label. Returns it without surrounding white space.
fn check_name<'a>(what: &str, text: &'a str) -> Result<&'a str, RegistryError> {
    let text = text.trim();
    if text.len() > NAME_BYTES_MAX {
        return Err(RegistryError::InvalidName(format!("a {what} has at most {NAME_BYTES_MAX} bytes")));
    }
    // A line break or an escape sequence could forge lines of a table or a log.
    if text.chars().any(char::is_control) {
        return Err(RegistryError::InvalidName(format!("a {what} holds no control characters")));
    }
    Ok(text)
}
