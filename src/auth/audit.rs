//! The audit: who changed what in the registry, when, and from where. An entry is written in the same
//! transaction as the change that it tells of, so that there is none without the other, and stays
//! for good. No entry holds a secret.

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::message::{DatasourceId, KeyId, TimeMicros};

/// On whose behalf a change is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// Somebody with this key.
    Key(KeyId),
    /// The gateway itself: a time that was set has come, or it starts for the first time.
    System,
    /// Somebody who reported a key as leaked, by its secret and without a key of their own.
    LeakReport,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Key(key_id) => fmt::Display::fmt(key_id, f),
            Who::System => f.write_str("system"),
            Who::LeakReport => f.write_str("leak report"),
        }
    }
}

/// Who makes a change, and from where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Actor {
    /// Who.
    pub who: Who,
    /// The address that the request came from, if it came from one.
    pub address: Option<IpAddr>,
}

impl Actor {
    /// The gateway itself.
    pub const SYSTEM: Actor = Actor { who: Who::System, address: None };

    /// Somebody with this key.
    pub fn key(key_id: KeyId, address: Option<IpAddr>) -> Self {
        Self { who: Who::Key(key_id), address }
    }
}

/// What was done, as the audit is to have it.
#[derive(Debug, Clone, Copy)]
pub struct Act<'a> {
    /// A word for a noun, a dot, and what became of it: `key.created`. Programs compare it.
    pub action: &'static str,
    /// The datasource that it is about, or `*`.
    pub datasource: Option<&'a DatasourceId>,
    /// The key that it is about.
    pub key_id: Option<KeyId>,
    /// The particulars, a JSON object.
    pub what: &'a Value,
}

/// One entry, as it is read back.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// Its place: each entry has a higher one than those before.
    pub id: i64,
    /// When it happened.
    #[serde(skip)]
    pub at: TimeMicros,
    /// A key id, `system` or `leak report`.
    pub who: String,
    /// From where, if that is known.
    pub address: Option<String>,
    /// What was done.
    pub action: String,
    /// To which datasource.
    pub datasource: Option<String>,
    /// To which key.
    pub key_id: Option<String>,
    /// The particulars.
    pub what: Box<RawValue>,
}

/// Which entries are asked for, oldest first.
#[derive(Debug, Clone, Copy)]
pub struct Page {
    /// None that happened before.
    pub from: Option<TimeMicros>,
    /// None that happened at or after.
    pub to: Option<TimeMicros>,
    /// None up to this one's [`Entry::id`].
    pub after: i64,
    /// How many at most.
    pub limit: usize,
}
