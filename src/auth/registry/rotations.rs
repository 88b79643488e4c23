//! The rotation of a key: a new key replaces it, and for a grace period both are valid, so that every
//! device can get the new key before the old one retires. Until then the rotation can be undone.

use std::sync::Arc;
use std::time::Duration;

use headgate_format::key::ApiKey;
use serde_json::json;

use super::Registry;
use super::audit::{Actor, AuditEvent};
use super::error::RegistryError;
use super::key::{Key, Rotation};
use super::key_ends::KeyEnd;
use super::keys::{NewKey, generate_key};
use super::transaction::KeyEndReason;
use crate::message::{DatasourceId, KeyId, TimeMicros};
use crate::time::{Rfc3339, cluster_micros};

/// The result of a rotation.
#[derive(Debug)]
pub struct KeyRotationOutcome {
    /// The new key, with the scopes, label, limits and expiry of the old one.
    pub key: Arc<Key>,
    /// Its secret, to be shown once.
    pub secret: ApiKey,
    /// The old key, if it is dead already. The caller waits for its connections.
    pub dead: Option<Arc<Key>>,
    /// When the old key's grace period ends.
    pub grace_ends_at: TimeMicros,
}

/// The result of undoing a rotation.
#[derive(Debug)]
pub struct KeyRotationUndoOutcome {
    /// The old key, which stays valid.
    pub key: Arc<Key>,
    /// The new key, if it was still alive. The caller waits for its connections.
    pub dead: Option<Arc<Key>>,
}

impl Registry {
    /// Creates a key that replaces another one. The old key works until `grace` is over; with a grace of 0
    /// it dies at once, whatever the disk says. Durable on return. `None` if the datasource has no such key.
    ///
    /// # Errors
    /// [`RegistryError::NotReplaced`] if the old key has died at once and no new one could be made, with
    /// [`Registry::describe_unwritten`] for whether that is durable; it keeps working if it is the last admin key.
    /// [`RegistryError::Denied`] if the actor's key has ended, the old one may have died all the same;
    /// [`RegistryError::Rotation`] if the key has expired or is being rotated already;
    /// [`RegistryError::NoDatasource`]; [`RegistryError::Database`] if it cannot be made durable.
    pub fn rotate_key(
        &self,
        actor: &Actor,
        datasource: &DatasourceId,
        id: KeyId,
        grace: Duration,
    ) -> Result<Option<KeyRotationOutcome>, RegistryError> {
        if grace.is_zero()
            && let Some(old) = self.rotatable_key(datasource, id)?
        {
            actor.check()?;
            // Its own key ends here. Another one's may end while this waits, and then nothing takes the old one's place.
            let actor = if actor.is(id) { &actor.under_way() } else { actor };
            self.end_at_once(&old);
            return self
                .replace_key(actor, &old, grace)
                .map_err(|error| self.end_unreplaced(actor, old, error));
        }
        let Some(old) = self.live.key(datasource, id) else {
            return self.check_owner(datasource).map(|()| None);
        };
        self.replace_key(actor, &old, grace)
    }

    /// Ends a key that was to be replaced at once and could not be, unless it is the last admin key.
    fn end_unreplaced(&self, actor: &Actor, old: Arc<Key>, error: RegistryError) -> RegistryError {
        let what = json!({ "label": old.label });
        let ended = self.end_keys(true, || {
            let Some(key) = self.live.key(&old.datasource, old.id) else { return Ok(Vec::new()) };
            self.check_not_last_admin(&key)?;
            Ok(vec![KeyEnd::new(KeyEndReason::Revoked, vec![key], actor, what)])
        });
        match ended {
            Ok(dead) if !dead.is_empty() && !matches!(error, RegistryError::Denied(_)) => {
                tracing::error!(key_id = %old.id, %error, "a key has ended and no new one could be made");
                RegistryError::NotReplaced { dead: old, why: error.to_string() }
            }
            _ => error,
        }
    }

    fn replace_key(
        &self,
        actor: &Actor,
        old: &Key,
        grace: Duration,
    ) -> Result<Option<KeyRotationOutcome>, RegistryError> {
        let (datasource, id) = (&old.datasource, old.id);
        let rotated = self.make_change_with_reserve(|database| {
            let Some(old) = self.rotatable_key(datasource, id)? else { return Ok(None) };
            let limits = old.limits.text();
            let (new, secret) = generate_key(
                database,
                &NewKey {
                    datasource,
                    label: &old.label,
                    scopes: old.scopes,
                    expires_at: old.expires_at(),
                    limits: limits.as_deref(),
                },
            )?;
            new.set_rotation(Rotation { replaces: Some(id), replaced_by: None });
            let change = database.begin()?;
            let grace_micros = TimeMicros::try_from(grace.as_micros()).unwrap_or(TimeMicros::MAX);
            let grace_ends_at = cluster_micros().saturating_add(grace_micros);
            let after = Rotation { replaced_by: Some((new.id, grace_ends_at)), ..old.rotation() };
            change.insert_key(&new, &secret.digest())?;
            change.set_rotation(id, after)?;
            let digest =
                if grace.is_zero() { change.revoke(datasource, id, KeyEndReason::Rotated)? } else { None };
            let what = json!({ "new_key": new.id, "grace_ends_at": Rfc3339(grace_ends_at) });
            change.audit(actor, &AuditEvent::of_key("key.rotated", &old, &what))?;
            change.commit()?;
            old.set_rotation(after);
            let key = self.live.add_key(new, secret.digest());
            let dead = digest.and_then(|digest| self.live.kill(&digest));
            self.live.watch(&old);
            Ok(Some(KeyRotationOutcome { key, secret, dead, grace_ends_at }))
        })?;
        if let Some(KeyRotationOutcome { key, .. }) = &rotated {
            tracing::info!(%datasource, key_id = %id, new_key_id = %key.id, ?grace, "key rotated");
        }
        Ok(rotated)
    }

    /// A key that another one may replace, if the datasource has it.
    fn rotatable_key(&self, datasource: &DatasourceId, id: KeyId) -> Result<Option<Arc<Key>>, RegistryError> {
        self.check_owner(datasource)?;
        let Some(key) = self.live.key(datasource, id) else { return Ok(None) };
        if key.has_expired() {
            return Err(RegistryError::Rotation(format!("key {id} has expired; create another one")));
        }
        match key.rotation().replaced_by {
            Some((by, _)) => {
                Err(RegistryError::Rotation(format!("key {id} is being rotated already, to key {by}")))
            }
            None => Ok(Some(key)),
        }
    }

    /// Undoes a rotation before the old key's grace period ends: the old key stays valid, and the new one
    /// is dead when this returns. `id` is the old key's. `None` if the datasource has no such live key.
    ///
    /// # Errors
    /// [`RegistryError::Rotation`] if the key is not being rotated, or the new key is itself being rotated;
    /// [`RegistryError::NoDatasource`]; [`RegistryError::Database`] if it cannot be made durable.
    pub fn undo_rotation(
        &self,
        actor: &Actor,
        datasource: &DatasourceId,
        id: KeyId,
    ) -> Result<Option<KeyRotationUndoOutcome>, RegistryError> {
        let undone = self.make_change_with_reserve(|database| {
            self.check_owner(datasource)?;
            let Some(old) = self.live.key(datasource, id) else { return Ok(None) };
            let rotation = old.rotation();
            // Past its end the key is dead, even if that is not on the disk yet.
            let Some((new_id, _)) = rotation.replaced_by.filter(|_| old.holds() && !old.has_expired()) else {
                return Err(RegistryError::Rotation(format!("key {id} is not being rotated")));
            };
            let new = self.live.key(datasource, new_id);
            if let Some((by, _)) = new.as_ref().and_then(|new| new.rotation().replaced_by) {
                return Err(RegistryError::Rotation(format!(
                    "key {new_id}, which took its place, is being rotated to key {by}: undo that first"
                )));
            }
            let change = database.begin()?;
            let after = Rotation { replaced_by: None, ..rotation };
            change.set_rotation(id, after)?;
            let digest = change.revoke(datasource, new_id, KeyEndReason::Revoked)?;
            change.audit(
                actor,
                &AuditEvent::of_key("key.rotation_undone", &old, &json!({ "revoked_key": new_id })),
            )?;
            change.commit()?;
            old.set_rotation(after);
            self.live.watch(&old);
            let dead = digest.and_then(|digest| self.live.kill(&digest));
            Ok(Some((KeyRotationUndoOutcome { key: old, dead }, new_id)))
        })?;
        Ok(undone.map(|(undone, new_id)| {
            tracing::info!(%datasource, key_id = %id, revoked_key_id = %new_id, "rotation undone");
            undone
        }))
    }
}
