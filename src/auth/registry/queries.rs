//! What the registry reads from its database: everything at the start, and later the audit, the usage and how a
//! key ended.

use std::sync::OnceLock;

use headgate_format::key::Digest;
use rusqlite::types::FromSqlError;
use rusqlite::{OptionalExtension, params, params_from_iter};
use serde_json::value::RawValue;

use super::audit::{AuditEntry, AuditQuery};
use super::database::RegistryDatabase;
use super::datasource::Datasource;
use super::error::RegistryError;
use super::key::Rotation;
use super::leak_rules::LeakRow;
use super::rows::digest_range;
use super::setting::JsonSetting;
use super::usage::KeyUsage;
use crate::auth::scope::Scopes;
use crate::message::{DatasourceId, KeyId, Lease, TimeMicros};
use crate::sqlite::SqliteError;

/// The version of the newest row of those tables whose rows share their versions.
pub(super) const SELECT_RECORD_RULES_VERSION: &str = "SELECT max(
    (SELECT coalesce(max(version), 0) FROM leaks), (SELECT coalesce(max(version), 0) FROM incarnations))";

/// One row of `keys`.
pub(super) struct StoredKey<'a> {
    pub(super) digest: Digest,
    pub(super) datasource: &'a str,
    pub(super) scopes: Scopes,
    pub(super) label: &'a str,
    pub(super) created_at: TimeMicros,
    pub(super) expires_at: Option<TimeMicros>,
    pub(super) is_revoked: bool,
    /// Whether it was revoked or has expired.
    pub(super) has_ended: bool,
    pub(super) rotation: Rotation,
    pub(super) limits: Option<&'a str>,
}

/// A key that is in the database, dead or alive.
pub(super) struct KnownKey {
    pub(super) digest: Digest,
    /// The id of its datasource, which need not be there, or `*`.
    pub(super) datasource: String,
    pub(super) is_revoked: bool,
}

impl RegistryDatabase {
    /// Calls `each` with every datasource.
    pub(super) fn for_each_datasource(&self, mut each: impl FnMut(Datasource)) -> Result<(), RegistryError> {
        let mut read_all = || -> rusqlite::Result<()> {
            let mut select = self.connection.prepare(
                "SELECT id, name, created_at, limits, schemas, incarnation, event_time FROM datasources",
            )?;
            let mut rows = select.query([])?;
            while let Some(row) = rows.next()? {
                let id = DatasourceId::new(row.get_ref(0)?.as_str()?).map_err(FromSqlError::other)?;
                each(Datasource {
                    id,
                    name: row.get_ref(1)?.as_str()?.into(),
                    created_at: row.get(2)?,
                    limits: JsonSetting::new(row.get_ref(3)?.as_str_or_null()?),
                    schemas: JsonSetting::new(row.get_ref(4)?.as_str_or_null()?),
                    event_time: JsonSetting::new(row.get_ref(6)?.as_str_or_null()?),
                    incarnation: row.get(5)?,
                    lease: Lease::new(),
                    traffic: OnceLock::new(),
                });
            }
            Ok(())
        };
        read_all().map_err(|error| SqliteError::from_sqlite(&error, &self.path).into())
    }

    /// The number of datasources.
    pub(super) fn datasource_count(&self) -> Result<usize, RegistryError> {
        self.count("SELECT count(*) FROM datasources")
    }

    /// The number of keys, revoked ones included.
    pub(super) fn key_count(&self) -> Result<usize, RegistryError> {
        self.count("SELECT count(*) FROM keys")
    }

    fn count(&self, select: &str) -> Result<usize, RegistryError> {
        let count = self.connection.query_row(select, [], |row| row.get::<_, i64>(0));
        let count = count.map_err(|error| SqliteError::from_sqlite(&error, &self.path))?;
        Ok(usize::try_from(count).expect("a count is not negative"))
    }

    /// Calls `each` with every key, or with those of one datasource that are not revoked.
    pub(super) fn for_each_key(
        &self,
        of: Option<&DatasourceId>,
        mut each: impl FnMut(StoredKey<'_>),
    ) -> Result<(), RegistryError> {
        let mut read_all = || -> rusqlite::Result<()> {
            let which = if of.is_some() { " WHERE datasource = ?1 AND revoked_at IS NULL" } else { "" };
            let mut select = self.connection.prepare_cached(&format!(
                "SELECT digest, datasource, scopes, label, created_at, expires_at, revoked_at IS NOT NULL,
                        limits, replaces, replaced_by, grace_ends_at, ended IS NOT NULL
                 FROM keys{which}"
            ))?;
            let mut rows = select.query(params_from_iter(of.map(DatasourceId::as_str)))?;
            while let Some(row) = rows.next()? {
                let stored = StoredKey {
                    digest: Digest(row.get(0)?),
                    datasource: row.get_ref(1)?.as_str()?,
                    scopes: row.get_ref(2)?.as_str()?.parse().map_err(FromSqlError::other)?,
                    label: row.get_ref(3)?.as_str()?,
                    created_at: row.get(4)?,
                    expires_at: row.get(5)?,
                    is_revoked: row.get(6)?,
                    has_ended: row.get(11)?,
                    limits: row.get_ref(7)?.as_str_or_null()?,
                    rotation: Rotation {
                        replaces: row.get_ref(8)?.as_str_or_null()?.map(parse_key_id).transpose()?,
                        replaced_by: match row.get_ref(9)?.as_str_or_null()? {
                            Some(id) => Some((parse_key_id(id)?, row.get(10)?)),
                            None => None,
                        },
                    },
                };
                each(stored);
            }
            Ok(())
        };
        read_all().map_err(|error| SqliteError::from_sqlite(&error, &self.path).into())
    }

    /// Whether a key with this id exists or existed.
    pub(super) fn has_key_id(&self, id: KeyId) -> Result<bool, RegistryError> {
        let (first, last) = digest_range(id);
        let known = self
            .connection
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM keys WHERE digest BETWEEN ?1 AND ?2)")?
            .query_row(params![first, last], |row| row.get(0))?;
        Ok(known)
    }

    /// The key that has or had this id.
    pub(super) fn key_with_id(&self, id: KeyId) -> Result<Option<KnownKey>, RegistryError> {
        let (first, last) = digest_range(id);
        let mut select = self.connection.prepare_cached(
            "SELECT digest, datasource, revoked_at IS NOT NULL FROM keys WHERE digest BETWEEN ?1 AND ?2",
        )?;
        let known = select.query_row(params![first, last], |row| {
            let (digest, datasource, is_revoked) = (Digest(row.get(0)?), row.get(1)?, row.get(2)?);
            Ok(KnownKey { digest, datasource, is_revoked })
        });
        Ok(known.optional()?)
    }

    /// Whether the creation or the import of the datasource that has this id now is in the audit: it is then complete.
    pub(super) fn is_audited(&self, id: &DatasourceId) -> Result<bool, RegistryError> {
        let mut select = self.connection.prepare_cached(
            "SELECT action <> 'datasource.deleted' FROM audit
             WHERE datasource = ?1 AND action IN ('datasource.created', 'datasource.imported', 'datasource.deleted')
             ORDER BY id DESC LIMIT 1",
        )?;
        Ok(select.query_row([id.as_str()], |row| row.get(0)).optional()?.unwrap_or(false))
    }

    /// When a key was revoked and, in one word, why. `None` if it was not revoked.
    pub(super) fn revocation_of(
        &self,
        id: KeyId,
    ) -> Result<Option<(TimeMicros, Option<String>)>, RegistryError> {
        let (first, last) = digest_range(id);
        let ended = self
            .connection
            .prepare_cached(
                "SELECT revoked_at, ended FROM keys WHERE digest BETWEEN ?1 AND ?2 AND revoked_at IS NOT NULL",
            )?
            .query_row(params![first, last], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        Ok(ended)
    }

    /// The stored usage of a key.
    pub(super) fn usage(&self, id: KeyId) -> Result<KeyUsage, RegistryError> {
        let mut select = self
            .connection
            .prepare_cached("SELECT accepted, refused, \"offset\", users FROM usage WHERE key_id = ?1")?;
        let used = select.query_row([id.to_string()], |row| {
            let users = serde_json::from_str(row.get_ref(3)?.as_str()?);
            Ok(KeyUsage {
                accepted: row.get::<_, i64>(0)?.unsigned_abs(),
                refused: row.get::<_, i64>(1)?.unsigned_abs(),
                offset: row.get::<_, Option<i64>>(2)?.map(i64::unsigned_abs),
                users: users.map_err(FromSqlError::other)?,
            })
        });
        Ok(used.optional()?.unwrap_or_default())
    }

    /// A page of the audit, oldest first.
    pub(super) fn audit_entries(&self, page: &AuditQuery) -> Result<Vec<AuditEntry>, RegistryError> {
        let mut select = self.connection.prepare_cached(
            "SELECT id, at, who, address, action, datasource, key_id, what FROM audit
             WHERE id > ?1 AND at >= ?2 AND at < ?3 ORDER BY id LIMIT ?4",
        )?;
        let limit = i64::try_from(page.limit).unwrap_or(i64::MAX);
        let (from, to) = (page.from.unwrap_or(i64::MIN), page.to.unwrap_or(i64::MAX));
        let entries = select.query_map(params![page.after, from, to, limit], |row| {
            Ok(AuditEntry {
                id: row.get(0)?,
                at: row.get(1)?,
                who: row.get(2)?,
                address: row.get(3)?,
                action: row.get(4)?,
                datasource: row.get(5)?,
                key_id: row.get(6)?,
                what: RawValue::from_string(row.get(7)?).map_err(FromSqlError::other)?,
            })
        })?;
        Ok(entries.collect::<Result<_, _>>()?)
    }

    /// The version of the newest rule that the log's readers follow; 0 without one.
    pub(super) fn record_rules_version(&self) -> Result<u64, RegistryError> {
        Ok(self.count(SELECT_RECORD_RULES_VERSION)? as u64)
    }

    /// The number of rules about leaked keys.
    pub(super) fn leak_rule_count(&self) -> Result<u64, RegistryError> {
        Ok(self.count("SELECT count(*) FROM leaks")? as u64)
    }

    /// All rules about leaked keys with their versions, oldest first.
    pub(super) fn leak_rules(&self) -> Result<Vec<(u64, LeakRow)>, RegistryError> {
        let read_all = || {
            let mut select = self.connection.prepare("SELECT * FROM leaks ORDER BY version")?;
            let rules = select
                .query_map([], |row| Ok((row.get::<_, i64>(0)?.cast_unsigned(), LeakRow::from_sql(row)?)))?;
            rules.collect::<rusqlite::Result<_>>()
        };
        read_all().map_err(|error| SqliteError::from_sqlite(&error, &self.path).into())
    }
}

/// Parses a key id from a column.
fn parse_key_id(text: &str) -> Result<KeyId, FromSqlError> {
    KeyId::parse(text).map_err(FromSqlError::other)
}
