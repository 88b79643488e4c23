//! The changes of keys. Each is durable, in the live view and in the audit when it returns; see
//! [the registry](super) for what that guarantees. In a cluster each can also fail with
//! [`RegistryError::Away`] or [`RegistryError::Overtaken`] (both transient), [`RegistryError::TooLarge`] or
//! [`RegistryError::Cluster`], and blocks until the other nodes have it. Whoever makes one needs a key that is alive when
//! it is made ([`RegistryError::Denied`]), and not only when it was asked for.

use std::sync::Arc;

use headgate_format::key::ApiKey;
use serde_json::json;

use super::Registry;
use super::audit::{Actor, AuditEvent, setting_as_json};
use super::database::RegistryDatabase;
use super::error::RegistryError;
use super::key::{Key, KeyAttributes, Rotation};
use super::key_ends::KeyEnd;
use super::transaction::KeyEndReason;
use crate::auth::scope::{Scope, Scopes};
use crate::limits::NAME_BYTES_MAX;
use crate::message::{DatasourceId, KeyId, TimeMicros, now_micros};
use crate::time::Rfc3339;

/// A key to be created.
#[derive(Debug, Clone, Copy)]
pub struct NewKey<'a> {
    /// The datasource that it belongs to, or all of them ([`DatasourceId::all`]).
    pub datasource: &'a DatasourceId,
    /// The display name, or empty.
    pub label: &'a str,
    /// What it may be used for.
    pub scopes: Scopes,
    /// When it expires.
    pub expires_at: Option<TimeMicros>,
    /// Its own limits, a JSON text that the caller has validated.
    pub limits: Option<&'a str>,
}

impl Registry {
    /// Creates a key without limits of its own, as [`Registry::create_key_with`].
    ///
    /// # Errors
    /// Those of [`Registry::create_key_with`].
    pub fn create_key(
        &self,
        actor: &Actor,
        datasource: &DatasourceId,
        label: &str,
        scopes: Scopes,
        expires_at: Option<TimeMicros>,
    ) -> Result<(Arc<Key>, ApiKey), RegistryError> {
        self.create_key_with(actor, &NewKey { datasource, label, scopes, expires_at, limits: None })
    }

    /// Creates a key with its limits, as one change that is durable on return: no crash leaves it without them.
    ///
    /// # Errors
    /// [`RegistryError::NoDatasource`]; [`RegistryError::InvalidName`] if the label is too long or has
    /// control characters, or if there are no scopes; [`RegistryError::Denied`] if the actor's key has ended;
    /// [`RegistryError::Database`] if it cannot be made durable.
    pub fn create_key_with(
        &self,
        actor: &Actor,
        new: &NewKey<'_>,
    ) -> Result<(Arc<Key>, ApiKey), RegistryError> {
        let new = NewKey { label: check_name("label", new.label)?, ..*new };
        let NewKey { datasource, scopes, .. } = new;
        let expires_at = new.expires_at.map(Rfc3339);
        let mut what = json!({ "label": new.label, "scopes": scopes, "expires_at": expires_at });
        if new.limits.is_some() {
            what["limits"] = setting_as_json(new.limits);
        }
        let (key, secret) = self.make_change(|database| {
            self.check_owner(datasource)?;
            let (key, secret) = generate_key(database, &new)?;
            let change = database.begin()?;
            change.insert_key(&key, &secret.digest())?;
            change.audit(actor, &AuditEvent::of_key("key.created", &key, &what))?;
            change.commit()?;
            Ok((self.live.add_key(key, secret.digest()), secret))
        })?;
        tracing::info!(%datasource, key_id = %key.id, %scopes, "key created");
        Ok((key, secret))
    }

    /// Revokes one key. Before this returns, its lease has ended and its connections are told to close, whatever
    /// the disk says; [`Registry::describe_unwritten`] says whether that is durable. Returns the key, whose
    /// connections the caller waits for, or `None` if the datasource has no such live key.
    ///
    /// # Errors
    /// [`RegistryError::LastAdmin`], the key then keeps working; [`RegistryError::NoDatasource`].
    pub fn revoke_key(
        &self,
        actor: &Actor,
        datasource: &DatasourceId,
        id: KeyId,
    ) -> Result<Option<Arc<Key>>, RegistryError> {
        // Here the end begins, before any lock.
        actor.check()?;
        let found = self.live.key(datasource, id);
        let end_of = |key: &Arc<Key>| {
            KeyEnd::new(KeyEndReason::Revoked, vec![key.clone()], actor, json!({ "label": key.label }))
        };
        found.iter().for_each(|key| self.end_at_once(key));
        let dead = self.end_keys(true, || {
            self.check_owner(datasource)?;
            let Some(key) = self.live.key(datasource, id) else { return Ok(Vec::new()) };
            self.check_not_last_admin(&key)?;
            Ok(vec![end_of(&key)])
        })?;
        let dead = dead.into_iter().next();
        if dead.is_none() && found.is_some_and(|key| self.was_put_back(&key)) {
            return Err(RegistryError::LastAdmin);
        }
        if dead.is_some() {
            tracing::info!(%datasource, key_id = %id, "key revoked");
        }
        Ok(dead)
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
            change.audit(actor, &AuditEvent::of_key("key.limits_changed", &key, &what))?;
            change.commit()?;
            key.limits.set(limits);
            Ok(true)
        })
    }

    /// Adds an audit entry for a change outside the registry, also on a full disk. Durable on return.
    ///
    /// # Errors
    /// [`RegistryError::Database`] if it cannot be made durable.
    pub fn audit(&self, actor: &Actor, act: &AuditEvent<'_>) -> Result<(), RegistryError> {
        self.make_change_with_reserve(|database| {
            let change = database.begin()?;
            change.audit(actor, act)?;
            change.commit()
        })
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
}

/// Generates a key that is not in the registry yet, with an id that no key has or had.
pub(super) fn generate_key(
    database: &RegistryDatabase,
    new: &NewKey<'_>,
) -> Result<(Key, ApiKey), RegistryError> {
    if new.scopes.is_empty() {
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
        datasource: new.datasource.clone(),
        scopes: new.scopes,
        label: new.label,
        created_at: now_micros(),
        expires_at: new.expires_at,
        rotation: Rotation::default(),
        limits: new.limits,
    });
    Ok((key, secret))
}

/// Checks a name or label. Returns it without surrounding white space.
pub(super) fn check_name<'a>(what: &str, text: &'a str) -> Result<&'a str, RegistryError> {
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
