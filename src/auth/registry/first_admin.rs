//! The first admin key of a cluster. A registry in a data directory gets its first admin key when the
//! gateway creates the directory. In a cluster the first node creates it, and every later node finds it.
//!
//! If all admin keys of a cluster are lost: delete their rows from the bucket (`nats kv del headgate-registry
//! key.{digest}`) and restart a node, which then creates another one.

use std::io;
use std::sync::Arc;

use headgate_format::key::ApiKey;
use serde_json::json;

use super::Registry;
use super::audit::{Actor, AuditEvent};
use super::error::RegistryError;
use super::key::Key;
use super::keys::{NewKey, generate_key};
use crate::auth::scope::{Scope, Scopes};
use crate::message::DatasourceId;

impl Registry {
    /// Creates an admin key for all datasources. Returns `None` if there is one already. `keep` stores the
    /// secret where an operator finds it, before the key becomes valid. If two nodes call this at once, one
    /// of them gets `None`, and the secret that it stored belongs to no key.
    ///
    /// # Errors
    /// [`RegistryError::Io`] if `keep` fails; any other [`RegistryError`] if the key cannot be created.
    pub fn create_first_admin(
        &self,
        label: &str,
        mut keep: impl FnMut(&ApiKey) -> io::Result<()>,
    ) -> Result<Option<Arc<Key>>, RegistryError> {
        let (all, scopes) = (DatasourceId::all(), Scopes::from_slice(&[Scope::Admin]));
        self.make_change(|database| {
            let manages =
                |key: &Arc<Key>| key.scopes.allow(Scope::Admin) && key.holds() && !key.has_expired();
            if self.live.keys_of(&all).iter().any(manages) {
                return Ok(None);
            }
            let new = NewKey { datasource: &all, label, scopes, expires_at: None, limits: None };
            let (key, secret) = generate_key(database, &new)?;
            keep(&secret)?;
            let change = database.begin()?;
            change.insert_key(&key, &secret.digest())?;
            let what = json!({ "label": label, "scopes": scopes });
            change.audit(&Actor::SYSTEM, &AuditEvent::of_key("key.created", &key, &what))?;
            change.commit()?;
            Ok(Some(self.live.add_key(key, secret.digest())))
        })
    }
}
