//! A leak report: somebody found a key's secret where it does not belong. Whoever has the secret can
//! misuse the key, so the secret alone is enough to revoke it.

use std::sync::Arc;

use headgate_format::key::Digest;
use serde_json::json;

use super::Registry;
use super::audit::{Actor, AuditEvent};
use super::error::RegistryError;
use super::incarnations::RecordRule;
use super::key::Key;
use super::key_ends::KeyEnd;
use super::leak_rules::LeakRow;
use super::transaction::KeyEndReason;
use super::usage::KeyUsage;
use crate::time::Rfc3339;

/// What has become of a reported secret.
#[derive(Debug)]
pub enum LeakedKeyFate {
    /// It is no live key's.
    Unknown,
    /// Its key is dead. The caller waits for its connections.
    Revoked(Arc<Key>),
    /// It is the last admin key's, which still works.
    Kept,
}

impl Registry {
    /// Revokes the key with this digest, if there is one, as leaked. `url` is where it was found. The audit
    /// entry has the newest known offset that was written under the key.
    ///
    /// The key is dead on this node when this returns, whatever the disk says; [`Registry::describe_unwritten`]
    /// says whether that is durable. In a cluster the other nodes follow a moment later: the response to a report
    /// does not wait for them.
    ///
    /// The last admin key for all datasources is not revoked, because nobody could manage anything any
    /// more. The log and the audit report that instead.
    ///
    /// # Errors
    /// A [`RegistryError`] if the audit cannot be told of the last admin key.
    pub fn revoke_leaked(
        &self,
        actor: &Actor,
        digest: &Digest,
        url: &str,
    ) -> Result<LeakedKeyFate, RegistryError> {
        let Some(key) = self.live.find(digest).filter(|key| key.holds()) else {
            return Ok(LeakedKeyFate::Unknown);
        };
        self.end_at_once(&key);
        let used = self.usage_in(&self.lock_database(), &key).unwrap_or_else(|error| {
            tracing::warn!(%error, key_id = %key.id, "the use of a leaked key cannot be read for the audit");
            KeyUsage::default()
        });
        let last_used_at = used.users.first().map(|user| Rfc3339(user.at));
        let what = json!({ "url": url, "last_offset": used.offset, "last_used_at": last_used_at });
        let end = KeyEnd::new(KeyEndReason::Leaked, vec![key.clone()], actor, what.clone());
        let dead = self.end_keys(false, || {
            let Some(key) = self.live.find(digest) else { return Ok(Vec::new()) };
            self.check_not_last_admin(&key)?;
            Ok(vec![end])
        });
        match dead {
            // The audit has that already.
            Ok(dead) if dead.is_empty() && self.was_put_back(&key) => Ok(LeakedKeyFate::Kept),
            // Another call has ended it meanwhile.
            Ok(dead) if dead.is_empty() => Ok(LeakedKeyFate::Unknown),
            Ok(_) => {
                tracing::warn!(key_id = %key.id, datasource = %key.datasource, "a leaked API key was revoked");
                Ok(LeakedKeyFate::Revoked(key))
            }
            Err(RegistryError::LastAdmin) => {
                tracing::error!(
                    key_id = %key.id,
                    "the last admin key was reported as leaked and still works: create another one, then \
                     revoke it"
                );
                self.audit(actor, &AuditEvent::of_key("key.leaked_and_kept", &key, &what))?;
                Ok(LeakedKeyFate::Kept)
            }
            Err(error) => Err(error),
        }
    }

    /// Adds a rule about the records of a leaked key, for every node of a cluster. The follower
    /// ([`Registry::follow_record_rules`]) has it when this returns. Returns the new version of the rules, or
    /// `None` if there were `most` about leaked keys already.
    ///
    /// # Errors
    /// A [`RegistryError`] if the rule could not be added; [`RegistryError::UnreadRules`] as long as there are earlier
    /// ones that could not be read.
    pub fn add_leak_rule(
        &self,
        actor: &Actor,
        row: &LeakRow,
        most: u64,
    ) -> Result<Option<u64>, RegistryError> {
        if let Some(unread) = self.unread_rules() {
            return Err(RegistryError::UnreadRules(unread));
        }
        self.make_change_with_reserve(|database| {
            actor.check()?;
            if database.leak_rule_count()? >= most {
                return Ok(None);
            }
            let version = database.record_rules_version()? + 1;
            let change = database.begin()?;
            change.insert_leak_rule(version, row)?;
            change.commit()?;
            self.record_rules.lock().tell(version, &RecordRule::Leak(row.clone()));
            Ok(Some(version))
        })
    }

    /// Calls `each` with every existing rule and every later one, in the order of their versions, which
    /// begin with 1.
    ///
    /// # Errors
    /// [`RegistryError::Database`] if the rules cannot be read.
    pub fn follow_record_rules(
        &self,
        each: impl Fn(&RecordRule) + Send + 'static,
    ) -> Result<(), RegistryError> {
        // Locked throughout: a rule that is added meanwhile is told afterwards, once.
        let database = self.lock_database();
        self.record_rules.lock().start(&database.record_rules()?, each);
        Ok(())
    }
}
