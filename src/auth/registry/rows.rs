//! The registry's rows as the nodes of a cluster exchange them: each is a name and a JSON object with the
//! columns of the row in `registry.db`. No row holds a key: it is represented by its digest. The row `secret.token` has what
//! access tokens are signed with (`token_secret.rs`).
//!
//! ```text
//! datasource.{id}     {"name", "created_at", "limits", "schemas", "incarnation", "event_time"}
//! key.{digest}        {"datasource", "scopes", "label", "created_at", "expires_at", "revoked_at", "ended",
//!                      "replaces", "replaced_by", "grace_ends_at", "limits", "incarnation"}
//! audit.{id}          {"at", "who", "address", "action", "datasource", "key_id", "what"}
//! leak.{version}      {"datasource", "key_id", "since", "below", "at"}
//! incarnation.{version} {"datasource", "incarnation", "event", "name", "created_at", "first_offset", "since", "at"}
//! secret.{name}       {"value"}
//! format              2
//! ```
//!
//! Format 2 has incarnations. A registry of format 1 becomes one of format 2 with the first of them, so that a gateway
//! of an earlier version can stay until then.
//!
//! A digest has 64 hex characters, an id or version 12 digits. Absent values are left out, and so is the first
//! incarnation, but of a key that died with its datasource. Times are
//! microseconds since the Unix epoch; `limits`, `schemas`, `event_time` and `what` are JSON in a string, as given.

use std::fmt;

use headgate_format::key::Digest;
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};

use super::error::RegistryError;
use super::incarnations::IncarnationRow;
use super::leak_rules::LeakRow;
use crate::message::{DatasourceId, Incarnation, KeyId, TimeMicros};

/// The version of these rows that this Headgate writes, and the newest that it reads.
pub(super) const REGISTRY_ROWS_FORMAT: u32 = 2;
/// The name of the row that holds the format version.
pub(super) const FORMAT_ROW_NAME: &str = "format";

/// One row; `None` inside a variant means that the row was deleted.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum RegistryRow {
    Datasource(DatasourceId, Option<DatasourceRow>),
    Key(Digest, Option<KeyRow>),
    Audit(i64, AuditRow),
    Leak(u64, LeakRow),
    Incarnation(u64, IncarnationRow),
    Secret(String, SecretRow),
    Format(u32),
}

/// The row of a secret of the registry, as 64 hex characters. `Debug` shows no part of it.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SecretRow {
    value: String,
}

impl fmt::Debug for SecretRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretRow(redacted)")
    }
}

impl SecretRow {
    fn new(value: [u8; 32]) -> Self {
        Self { value: blake3::Hash::from_bytes(value).to_hex().to_string() }
    }

    /// Its bytes, as [`RegistryRow::parse`] has checked them.
    fn bytes(&self) -> rusqlite::Result<[u8; 32]> {
        let value = blake3::Hash::from_hex(&self.value);
        Ok(*value.map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?.as_bytes())
    }
}

/// The row of a datasource.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct DatasourceRow {
    pub(super) name: String,
    pub(super) created_at: TimeMicros,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) limits: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) schemas: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) incarnation: Option<Incarnation>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) event_time: Option<String>,
}

/// The row of a key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct KeyRow {
    pub(super) datasource: String,
    pub(super) scopes: String,
    pub(super) label: String,
    pub(super) created_at: TimeMicros,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) expires_at: Option<TimeMicros>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) revoked_at: Option<TimeMicros>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ended: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) replaces: Option<KeyId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) replaced_by: Option<KeyId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) grace_ends_at: Option<TimeMicros>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) limits: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) incarnation: Option<Incarnation>,
}

impl KeyRow {
    fn write(&self, connection: &Connection, digest: &Digest) -> rusqlite::Result<usize> {
        let mut insert = connection.prepare_cached(
            "INSERT OR REPLACE INTO keys (digest, datasource, scopes, label, created_at, expires_at, revoked_at,
                 ended, replaces, replaced_by, grace_ends_at, limits, incarnation)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
        )?;
        insert.execute(params![
            digest.0,
            self.datasource,
            self.scopes,
            self.label,
            self.created_at,
            self.expires_at,
            self.revoked_at,
            self.ended,
            self.replaces.map(|id| id.to_string()),
            self.replaced_by.map(|id| id.to_string()),
            self.grace_ends_at,
            self.limits,
            self.incarnation,
        ])
    }
}

/// The row of an audit entry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct AuditRow {
    at: TimeMicros,
    who: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
    action: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    datasource: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_id: Option<String>,
    what: String,
}

impl RegistryRow {
    /// The row's name in the bucket.
    pub(super) fn name(&self) -> String {
        match self {
            RegistryRow::Datasource(id, _) => format!("datasource.{id}"),
            RegistryRow::Key(digest, _) => format!("key.{}", blake3::Hash::from_bytes(digest.0).to_hex()),
            RegistryRow::Audit(id, _) => format!("audit.{id:012}"),
            RegistryRow::Leak(version, _) => format!("leak.{version:012}"),
            RegistryRow::Incarnation(version, _) => format!("incarnation.{version:012}"),
            RegistryRow::Secret(name, _) => format!("secret.{name}"),
            RegistryRow::Format(_) => FORMAT_ROW_NAME.to_owned(),
        }
    }

    /// The row's JSON, or `None` for a deleted row.
    pub(super) fn value(&self) -> Option<Vec<u8>> {
        fn json(row: &impl Serialize) -> Vec<u8> {
            serde_json::to_vec(row).expect("texts and numbers are JSON")
        }
        match self {
            RegistryRow::Datasource(_, row) => row.as_ref().map(json),
            RegistryRow::Key(_, row) => row.as_ref().map(json),
            RegistryRow::Audit(_, row) => Some(json(row)),
            RegistryRow::Leak(_, row) => Some(json(row)),
            RegistryRow::Incarnation(_, row) => Some(json(row)),
            RegistryRow::Secret(_, row) => Some(json(row)),
            RegistryRow::Format(version) => Some(json(version)),
        }
    }

    /// Parses a row. `None` for an unknown kind, and for the deletion of a row that cannot be deleted.
    ///
    /// # Errors
    /// What is wrong with the row.
    pub(super) fn parse(name: &str, value: Option<&[u8]>) -> Result<Option<Self>, String> {
        fn json<'a, T: Deserialize<'a>>(value: &'a [u8]) -> Result<T, String> {
            serde_json::from_slice(value).map_err(|error| error.to_string())
        }
        let (kind, rest) = name.split_once('.').unwrap_or((name, ""));
        Ok(Some(match (kind, value) {
            ("datasource", value) => {
                let id = DatasourceId::new(rest).map_err(|error| error.to_string())?;
                RegistryRow::Datasource(id, value.map(json).transpose()?)
            }
            ("key", value) => {
                let digest = blake3::Hash::from_hex(rest).map_err(|error| error.to_string())?;
                RegistryRow::Key(Digest(*digest.as_bytes()), value.map(json).transpose()?)
            }
            ("audit", Some(value)) => RegistryRow::Audit(parse_number(rest)?, json(value)?),
            ("leak", Some(value)) => RegistryRow::Leak(parse_number(rest)?, json(value)?),
            ("incarnation", Some(value)) => RegistryRow::Incarnation(parse_number(rest)?, json(value)?),
            ("secret", Some(value)) => {
                let row: SecretRow = json(value)?;
                row.bytes().map_err(|_| "a secret has 64 hex characters".to_owned())?;
                RegistryRow::Secret(rest.to_owned(), row)
            }
            (FORMAT_ROW_NAME, Some(value)) => RegistryRow::Format(json(value)?),
            _ => return Ok(None),
        }))
    }

    /// Reads a datasource's row from the database.
    pub(super) fn read_datasource(connection: &Connection, id: &DatasourceId) -> rusqlite::Result<Self> {
        let mut select = connection.prepare_cached(
            "SELECT name, created_at, limits, schemas, nullif(incarnation, 1), event_time
             FROM datasources WHERE id = ?1",
        )?;
        let row = select.query_row([id.as_str()], |row| {
            Ok(DatasourceRow {
                name: row.get(0)?,
                created_at: row.get(1)?,
                limits: row.get(2)?,
                schemas: row.get(3)?,
                incarnation: row.get(4)?,
                event_time: row.get(5)?,
            })
        });
        Ok(RegistryRow::Datasource(id.clone(), row.optional()?))
    }

    /// Reads a key's row from the database.
    pub(super) fn read_key(connection: &Connection, id: KeyId) -> rusqlite::Result<Self> {
        let mut select = connection.prepare_cached(
            "SELECT digest, datasource, scopes, label, created_at, expires_at, revoked_at, ended, replaces,
                    replaced_by, grace_ends_at, limits, incarnation
             FROM keys WHERE digest BETWEEN ?1 AND ?2",
        )?;
        let (first, last) = digest_range(id);
        let key_id = |text: Option<String>| {
            let id = text.map(|text| KeyId::parse(&text)).transpose();
            id.map_err(rusqlite::types::FromSqlError::other)
        };
        select.query_row(params![first, last], |row| {
            let key = KeyRow {
                datasource: row.get(1)?,
                scopes: row.get(2)?,
                label: row.get(3)?,
                created_at: row.get(4)?,
                expires_at: row.get(5)?,
                revoked_at: row.get(6)?,
                ended: row.get(7)?,
                replaces: key_id(row.get(8)?)?,
                replaced_by: key_id(row.get(9)?)?,
                grace_ends_at: row.get(10)?,
                limits: row.get(11)?,
                incarnation: row.get(12)?,
            };
            Ok(RegistryRow::Key(Digest(row.get(0)?), Some(key)))
        })
    }

    /// Reads an audit entry from the database.
    pub(super) fn read_audit(connection: &Connection, id: i64) -> rusqlite::Result<Self> {
        let mut select = connection.prepare_cached(
            "SELECT at, who, address, action, datasource, key_id, what FROM audit WHERE id = ?1",
        )?;
        select.query_row([id], |row| {
            let entry = AuditRow {
                at: row.get(0)?,
                who: row.get(1)?,
                address: row.get(2)?,
                action: row.get(3)?,
                datasource: row.get(4)?,
                key_id: row.get(5)?,
                what: row.get(6)?,
            };
            Ok(RegistryRow::Audit(id, entry))
        })
    }

    /// Reads a rule about a leaked key from the database.
    pub(super) fn read_leak(connection: &Connection, version: u64) -> rusqlite::Result<Self> {
        let mut select = connection.prepare_cached("SELECT * FROM leaks WHERE version = ?1")?;
        let row = select.query_row([version.cast_signed()], LeakRow::from_sql)?;
        Ok(RegistryRow::Leak(version, row))
    }

    /// Reads a row about an incarnation from the database.
    pub(super) fn read_incarnation(connection: &Connection, version: u64) -> rusqlite::Result<Self> {
        let mut select = connection.prepare_cached("SELECT * FROM incarnations WHERE version = ?1")?;
        let row = select.query_row([version.cast_signed()], IncarnationRow::from_sql)?;
        Ok(RegistryRow::Incarnation(version, row))
    }

    /// Reads a secret of the registry from the database.
    pub(super) fn read_secret(connection: &Connection, name: &str) -> rusqlite::Result<Self> {
        let mut select = connection.prepare_cached("SELECT value FROM secrets WHERE name = ?1")?;
        let row = select.query_row([name], |row| row.get(0).map(SecretRow::new))?;
        Ok(RegistryRow::Secret(name.to_owned(), row))
    }

    /// Writes this row to the database, or deletes it there.
    pub(super) fn write(&self, connection: &Connection) -> rusqlite::Result<()> {
        let changed = match self {
            RegistryRow::Datasource(id, Some(row)) => connection
                .prepare_cached("INSERT OR REPLACE INTO datasources VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?
                .execute(params![
                    id.as_str(),
                    row.name,
                    row.created_at,
                    row.limits,
                    row.schemas,
                    row.incarnation.unwrap_or(1),
                    row.event_time
                ]),
            RegistryRow::Datasource(id, None) => {
                connection.prepare_cached("DELETE FROM datasources WHERE id = ?1")?.execute([id.as_str()])
            }
            RegistryRow::Key(digest, Some(row)) => row.write(connection, digest),
            RegistryRow::Key(digest, None) => {
                connection.prepare_cached("DELETE FROM keys WHERE digest = ?1")?.execute([digest.0])
            }
            RegistryRow::Audit(id, row) => connection
                .prepare_cached("INSERT OR REPLACE INTO audit VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?
                .execute(params![
                    id,
                    row.at,
                    row.who,
                    row.address,
                    row.action,
                    row.datasource,
                    row.key_id,
                    row.what
                ]),
            RegistryRow::Leak(version, row) => row.write(connection, *version),
            RegistryRow::Incarnation(version, row) => row.write(connection, *version),
            RegistryRow::Secret(name, row) => connection
                .prepare_cached("INSERT OR REPLACE INTO secrets (name, value) VALUES (?1, ?2)")?
                .execute(params![name, row.bytes()?]),
            // It is only checked.
            RegistryRow::Format(_) => Ok(0),
        };
        changed.map(drop)
    }
}

fn parse_number<N: std::str::FromStr<Err = std::num::ParseIntError>>(text: &str) -> Result<N, String> {
    text.parse().map_err(|error: std::num::ParseIntError| error.to_string())
}

/// Checks that this version can read rows of this format.
pub(super) fn check_rows_format(version: u32) -> Result<(), RegistryError> {
    if version <= REGISTRY_ROWS_FORMAT {
        return Ok(());
    }
    Err(RegistryError::Cluster(format!(
        "the cluster's registry has format {version} and this Headgate reads up to {REGISTRY_ROWS_FORMAT}: start the \
         newer one"
    )))
}

/// The first and the last digest that a key with this id can have.
pub(super) fn digest_range(id: KeyId) -> ([u8; 32], [u8; 32]) {
    let (mut first, mut last) = ([0; 32], [0xff; 32]);
    first[..id.0.len()].copy_from_slice(&id.0);
    last[..id.0.len()].copy_from_slice(&id.0);
    (first, last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_row() -> KeyRow {
        KeyRow {
            datasource: "press-4".to_owned(),
            scopes: "ingest".to_owned(),
            label: "left".to_owned(),
            created_at: 7,
            expires_at: None,
            revoked_at: None,
            ended: None,
            replaces: Some(KeyId([1; 6])),
            replaced_by: None,
            grace_ends_at: None,
            limits: Some("{\"x\": 1}".to_owned()),
            incarnation: Some(2),
        }
    }

    #[test]
    fn a_row_is_read_back_as_it_was_written() {
        let id = DatasourceId::new("press-4").expect("a slug");
        let datasource = DatasourceRow {
            name: "Press 4".to_owned(),
            created_at: 1,
            limits: None,
            schemas: None,
            incarnation: None,
            event_time: Some("{}".to_owned()),
        };
        let leak = LeakRow {
            datasource: DatasourceId::all(),
            key_id: KeyId([2; 6]),
            since: None,
            below: None,
            at: 3,
        };
        let entry = AuditRow {
            at: 1,
            who: "system".to_owned(),
            address: None,
            action: "key.created".to_owned(),
            datasource: None,
            key_id: None,
            what: "{}".to_owned(),
        };
        for (row, name) in [
            (RegistryRow::Datasource(id.clone(), Some(datasource)), "datasource.press-4".to_owned()),
            (RegistryRow::Datasource(id, None), "datasource.press-4".to_owned()),
            (RegistryRow::Key(Digest([0xab; 32]), Some(key_row())), format!("key.{}", "ab".repeat(32))),
            (RegistryRow::Key(Digest([0xab; 32]), None), format!("key.{}", "ab".repeat(32))),
            (RegistryRow::Audit(12, entry), "audit.000000000012".to_owned()),
            (RegistryRow::Leak(3, leak), "leak.000000000003".to_owned()),
            (RegistryRow::Secret("token".to_owned(), SecretRow::new([0xcd; 32])), "secret.token".to_owned()),
            (RegistryRow::Format(1), "format".to_owned()),
        ] {
            assert_eq!(row.name(), name);
            assert_eq!(RegistryRow::parse(&name, row.value().as_deref()), Ok(Some(row)));
        }
    }

    #[test]
    fn what_is_of_another_kind_is_left_alone_and_what_makes_no_sense_is_said() {
        assert_eq!(RegistryRow::parse("session.x", Some(b"?")), Ok(None));
        assert_eq!(RegistryRow::parse("audit.000000000001", None), Ok(None));
        for (name, value) in [
            ("datasource.Not a slug", "{}"),
            ("key.12", "{}"),
            ("datasource.a", "{\"name\": 1}"),
            ("leak.x", "{}"),
            ("leak.1", r#"{"datasource": "Not a slug", "key_id": "0a0b0c0d0e0f", "at": 1}"#),
            ("format", "x"),
            ("secret.token", r#"{"value": "12"}"#),
        ] {
            assert!(RegistryRow::parse(name, Some(value.as_bytes())).is_err(), "{name}");
        }
    }
}
