//! A leak report: somebody found a key's secret where it does not belong. Whoever has the secret can
//! misuse the key, so the secret alone is enough to revoke it.

use std::sync::Arc;

use headgate_format::key::Digest;
use serde_json::json;

use super::Registry;
use super::audit::{Actor, AuditEvent};
use super::error::RegistryError;
use super::key::Key;
use super::leak_rules::LeakRow;
use super::transaction::KeyEndReason;
use crate::time::Rfc3339;

impl Registry {
    /// Revokes the key with this digest, if there is one, as leaked. `url` is where it was found. The audit
    /// entry has the newest known offset that was written under the key. Returns the dead key, whose
    /// connections the caller waits for.
    ///
    /// In a cluster the key is dead on this node when this returns, and on the others a moment later: the
    /// response to a report does not wait for them.
    ///
    /// The last admin key for all datasources is not revoked, because nobody could manage anything any
    /// more. The log and the audit report that instead.
    ///
    /// # Errors
    /// [`RegistryError::Database`] if the change cannot be made durable; the key then keeps working.
    pub fn revoke_leaked(
        &self,
        actor: &Actor,
        digest: &Digest,
        url: &str,
    ) -> Result<Option<Arc<Key>>, RegistryError> {
        let (outcome, _) = self.make_change_here(|database| {
            let Some(key) = self.live.find(digest).filter(|key| key.holds()) else { return Ok(None) };
            let is_last_admin = self.is_last_admin(&key);
            let used = self.usage_in(database, &key)?;
            let last_used_at = used.users.first().map(|user| Rfc3339(user.at));
            let what = json!({ "url": url, "last_offset": used.offset, "last_used_at": last_used_at });
            let change = database.begin()?;
            if is_last_admin {
                change.audit(actor, &AuditEvent::of_key("key.leaked_and_kept", &key, &what))?;
                change.commit()?;
                return Ok(Some((key, None)));
            }
            change.revoke(&key.datasource, key.id, KeyEndReason::Leaked)?;
            change.audit(actor, &AuditEvent::of_key("key.leaked", &key, &what))?;
            change.commit()?;
            Ok(Some((key, self.live.kill(digest))))
        })?;
        match outcome {
            None => Ok(None),
            Some((key, None)) => {
                tracing::error!(
                    key_id = %key.id,
                    "the last admin key was reported as leaked and still works: create another one, then \
                     revoke it"
                );
                Ok(None)
            }
            Some((key, dead)) => {
                tracing::warn!(key_id = %key.id, datasource = %key.datasource, "a leaked API key was revoked");
                Ok(dead)
            }
        }
    }

    /// Adds a rule about the records of a leaked key, for every node of a cluster. The follower
    /// ([`Registry::follow_leak_rules`]) has it when this returns. Returns the new version of the rules, or
    /// `None` if there were `most` already.
    ///
    /// # Errors
    /// A [`RegistryError`] if the rule could not be added.
    pub fn add_leak_rule(&self, row: &LeakRow, most: u64) -> Result<Option<u64>, RegistryError> {
        self.make_change(|database| {
            let version = database.leak_rules_version()? + 1;
            if version > most {
                return Ok(None);
            }
            let change = database.begin()?;
            change.insert_leak_rule(version, row)?;
            change.commit()?;
            self.leak_rules.lock().tell(version, row);
            Ok(Some(version))
        })
    }

    /// Calls `each` with every existing rule and every later one, in the order of their versions, which
    /// begin with 1.
    ///
    /// # Errors
    /// [`RegistryError::Database`] if the rules cannot be read.
    pub fn follow_leak_rules(&self, each: impl Fn(&LeakRow) + Send + 'static) -> Result<(), RegistryError> {
        // Locked throughout: a rule that is added meanwhile is told afterwards, once.
        let database = self.lock_database();
        self.leak_rules.lock().start(&database.leak_rules()?, each);
        Ok(())
    }
}
