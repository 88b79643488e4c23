//! The rules about the records of leaked keys. A rule withholds what a key let in, or gives it back. Rules
//! are only ever added; the version of the rules is their number, together with what has happened to
//! [incarnations](super::incarnations), and the same on every node of a cluster.

use rusqlite::types::FromSqlError;
use rusqlite::{Connection, Row, params};
use serde::{Deserialize, Deserializer, Serialize};

use super::incarnations::RecordRule;
use crate::message::{DatasourceId, KeyId, NameError, Offset, TimeMicros};

/// One rule about the records of a leaked key: it withholds them or gives them back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeakRow {
    /// Applies to records of this datasource, or of all of them (`*`).
    #[serde(deserialize_with = "deserialize_owner")]
    pub datasource: DatasourceId,
    /// Applies to records written under this key.
    pub key_id: KeyId,
    /// Withholds records received at or after this time; without it, withheld records are given back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<TimeMicros>,
    /// Applies only to records with a lower offset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub below: Option<Offset>,
    /// When the rule was added.
    pub at: TimeMicros,
}

impl LeakRow {
    /// Reads a row of the table `leaks`.
    pub(super) fn from_sql(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            datasource: parse_owner(row.get_ref(1)?.as_str()?).map_err(FromSqlError::other)?,
            key_id: KeyId::parse(row.get_ref(2)?.as_str()?).map_err(FromSqlError::other)?,
            since: row.get(3)?,
            below: row.get::<_, Option<i64>>(4)?.map(i64::cast_unsigned),
            at: row.get(5)?,
        })
    }

    /// Writes a row of the table `leaks`.
    pub(super) fn write(&self, connection: &Connection, version: u64) -> rusqlite::Result<usize> {
        let mut insert =
            connection.prepare_cached("INSERT OR REPLACE INTO leaks VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?;
        insert.execute(params![
            version.cast_signed(),
            self.datasource.as_str(),
            self.key_id.to_string(),
            self.since,
            self.below.map(u64::cast_signed),
            self.at,
        ])
    }
}

type RecordRuleListener = Box<dyn Fn(&RecordRule) + Send>;

/// Who is told of the rules that the log's readers follow: those about leaked keys, and what happens to incarnations.
#[derive(Default)]
pub(super) struct RecordRuleFollower {
    /// Called with each rule, in the order of the versions.
    each: Option<RecordRuleListener>,
    /// The version of the newest rule that it was told.
    told: u64,
}

impl RecordRuleFollower {
    /// Tells `each` of the existing rules, and of every later one.
    pub(super) fn start(
        &mut self,
        existing: &[(u64, RecordRule)],
        each: impl Fn(&RecordRule) + Send + 'static,
    ) {
        *self = Self { each: Some(Box::new(each)), told: 0 };
        existing.iter().for_each(|(version, rule)| self.tell(*version, rule));
    }

    /// Tells of a durable rule, once: a node's own rules come back from the cluster.
    pub(super) fn tell(&mut self, version: u64, rule: &RecordRule) {
        if let Some(each) = self.each.as_ref().filter(|_| version > self.told) {
            each(rule);
            self.told = version;
        }
    }
}

/// Parses the id of a datasource, or `*`.
pub(super) fn parse_owner(text: &str) -> Result<DatasourceId, NameError> {
    let all = DatasourceId::all();
    if text == all.as_str() { Ok(all) } else { DatasourceId::new(text) }
}

pub(super) fn deserialize_owner<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<DatasourceId, D::Error> {
    let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
    parse_owner(&text).map_err(serde::de::Error::custom)
}
