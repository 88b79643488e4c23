//! The first admin key of a cluster. A registry in a data directory gets one when its gateway makes the
//! directory; that of a cluster gets one from the node that comes first, and every later one finds it.

use std::io;
use std::sync::Arc;

use serde_json::json;

use super::audit::Actor;
use super::changes::{about_key, new_key};
use super::key::ApiKey;
use super::live::Key;
use super::registry::{Registry, RegistryError};
use super::{Scope, Scopes};
use crate::message::DatasourceId;

impl Registry {
    /// Makes an admin key for all datasources, unless there is one: then `None`. `keep` has to have put its secret
    /// where somebody finds it before the key counts; of two nodes that do this at once one gets `None`, and
    /// its secret is nobody's key.
    ///
    /// # Errors
    /// [`RegistryError::Io`] if `keep` fails; those that say why nothing has changed.
    pub fn create_first_admin(
        &self,
        label: &str,
        mut keep: impl FnMut(&ApiKey) -> io::Result<()>,
    ) -> Result<Option<Arc<Key>>, RegistryError> {
        let (all, scopes) = (DatasourceId::all(), Scopes::of(&[Scope::Admin]));
        self.changing(|database| {
            let manages =
                |key: &Arc<Key>| key.scopes.allow(Scope::Admin) && key.holds() && !key.has_expired();
            if self.live.keys_of(&all).iter().any(manages) {
                return Ok(None);
            }
            let (key, secret) = new_key(database, &all, label, scopes, None)?;
            keep(&secret)?;
            let change = database.begin()?;
            change.insert_key(&key, &secret.digest())?;
            let what = json!({ "label": label, "scopes": scopes });
            change.audit(&Actor::SYSTEM, &about_key("key.created", &key, &what))?;
            change.commit()?;
            Ok(Some(self.live.add_key(key, secret.digest())))
        })
    }
}
