//! The audit: who changed what in the registry, when, and from where. An entry is written in the same
//! transaction as the change it describes, so neither exists without the other, and is never deleted.
//! No entry holds a secret.

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::key::Key;
use crate::auth::grant::{Grant, GrantDenial};
use crate::limits::AUDIT_KEY_IDS_MAX;
use crate::message::{DatasourceId, KeyId, TimeMicros};

/// On whose behalf a change is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActorIdentity {
    /// Somebody with this key.
    Key(KeyId),
    /// The gateway itself: a deadline has passed, or it starts for the first time.
    System,
    /// Somebody who reported a key as leaked, by its secret and without a key of their own.
    LeakReport,
}

impl fmt::Display for ActorIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ActorIdentity::Key(key_id) => fmt::Display::fmt(key_id, f),
            ActorIdentity::System => f.write_str("system"),
            ActorIdentity::LeakReport => f.write_str("leak report"),
        }
    }
}

/// Who makes a change, and from where.
#[derive(Debug, Clone)]
pub struct Actor {
    /// The identity.
    pub who: ActorIdentity,
    /// The source address of the request, if there is one.
    pub address: Option<IpAddr>,
    /// What has to hold when the change is made, however long that has waited; `None` for what needs no key, or is under
    /// way.
    grant: Option<Grant>,
}

impl Actor {
    /// The gateway itself.
    pub const SYSTEM: Actor = Actor { who: ActorIdentity::System, address: None, grant: None };

    /// Somebody with this grant, for as long as it holds.
    pub fn of_grant(grant: &Grant, address: Option<IpAddr>) -> Self {
        Self { who: ActorIdentity::Key(grant.key_id()), address, grant: Some(grant.clone()) }
    }

    /// Somebody who reports leaked keys.
    pub fn leak_report(address: IpAddr) -> Self {
        Self { who: ActorIdentity::LeakReport, address: Some(address), grant: None }
    }

    /// Whether this is the holder of a key.
    pub(super) fn is(&self, key_id: KeyId) -> bool {
        matches!(self.who, ActorIdentity::Key(id) if id == key_id)
    }

    /// The same one, for the rest of what has begun: that goes on, and is noted, whatever becomes of the key.
    pub fn under_way(&self) -> Self {
        Self { grant: None, ..self.clone() }
    }

    /// Checks that the change may be made now. Under the lock of the registry that is so until the change is made: the end
    /// of the key comes behind it.
    ///
    /// # Errors
    /// Why the key allows nothing any more.
    pub(super) fn check(&self) -> Result<(), GrantDenial> {
        self.grant.as_ref().map_or(Ok(()), Grant::check)
    }
}

/// What was done, as it is written to the audit.
#[derive(Debug, Clone, Copy)]
pub struct AuditEvent<'a> {
    /// A noun, a dot and a past participle: `key.created`. Programs compare it.
    pub action: &'static str,
    /// The datasource that was changed, or `*`.
    pub datasource: Option<&'a DatasourceId>,
    /// The key that was changed.
    pub key_id: Option<KeyId>,
    /// The details, a JSON object.
    pub what: &'a Value,
}

impl<'a> AuditEvent<'a> {
    /// A change of a key.
    pub(super) fn of_key(action: &'static str, key: &'a Key, what: &'a Value) -> Self {
        Self { action, datasource: Some(&key.datasource), key_id: Some(key.id), what }
    }

    /// A change of a datasource as a whole.
    pub(super) fn of_datasource(action: &'static str, id: &'a DatasourceId, what: &'a Value) -> Self {
        Self { action, datasource: Some(id), key_id: None, what }
    }
}

/// A setting's text as it is written to the audit. Text that is not JSON becomes a string.
pub(super) fn setting_as_json(text: Option<&str>) -> Value {
    text.map_or(Value::Null, |text| serde_json::from_str(text).unwrap_or_else(|_| text.into()))
}

/// Adds the ids of keys to the details of an entry: as many as one may name, and how many more there are. In a cluster an
/// entry has to fit in a message.
pub(super) fn add_key_ids(what: &mut Value, keys: impl ExactSizeIterator<Item = KeyId>) {
    let more = keys.len().saturating_sub(AUDIT_KEY_IDS_MAX);
    what["keys"] = keys.take(AUDIT_KEY_IDS_MAX).map(|id| id.to_string()).collect();
    if more > 0 {
        what["more_keys"] = more.into();
    }
}

/// One entry as read from the database.
#[derive(Debug, Serialize)]
pub struct AuditEntry {
    /// Increases with each entry.
    pub id: i64,
    /// When it happened.
    #[serde(skip)]
    pub at: TimeMicros,
    /// A key id, `system` or `leak report`.
    pub who: String,
    /// The source address, if known.
    pub address: Option<String>,
    /// What was done.
    pub action: String,
    /// The datasource that was changed.
    pub datasource: Option<String>,
    /// The key that was changed.
    pub key_id: Option<String>,
    /// The details.
    pub what: Box<RawValue>,
}

/// A query for entries, oldest first.
#[derive(Debug, Clone, Copy)]
pub struct AuditQuery {
    /// Only entries at or after this time.
    pub from: Option<TimeMicros>,
    /// Only entries before this time.
    pub to: Option<TimeMicros>,
    /// Only entries with a higher [`AuditEntry::id`].
    pub after: i64,
    /// Maximum number of entries.
    pub limit: usize,
}
