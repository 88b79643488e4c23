//! Applies the changes of other cluster nodes: writes their rows to this node's database, and updates its
//! live view with the differences. A key that is revoked elsewhere dies here as if this node had revoked
//! it: its lease ends, and its connections are told to close.

use std::collections::HashSet;
use std::sync::{Arc, OnceLock};

use headgate_format::key::Digest;

use super::Registry;
use super::database::RegistryDatabase;
use super::datasource::Datasource;
use super::error::RegistryError;
use super::incarnations::RecordRule;
use super::index::KeyLookup;
use super::key::{Key, KeyAttributes, Rotation, TIME_ENDED};
use super::replica::RegistryRevision;
use super::rows::{DatasourceRow, KeyRow, RegistryRow, check_rows_format};
use super::setting::JsonSetting;
use crate::message::{DatasourceId, Lease};

impl Registry {
    /// Applies rows of the cluster's registry up to `revision`, each with its own revision. With `all`, these
    /// are all the rows there are. Returns the keys that died, whose connections the caller waits for.
    ///
    /// # Errors
    /// [`RegistryError::Database`], and [`RegistryError::Cluster`] for rows of a newer format. The live view
    /// is then unchanged.
    pub(super) fn apply(
        &self,
        rows: &[(RegistryRevision, RegistryRow)],
        revision: RegistryRevision,
        all: bool,
    ) -> Result<Vec<Arc<Key>>, RegistryError> {
        let mut database = self.lock_database();
        let applied = if all { 0 } else { database.applied() };
        // This node's own changes come back from the cluster too; skip those.
        let rows: Vec<&RegistryRow> =
            rows.iter().filter(|(revision, _)| *revision > applied).map(|(_, row)| row).collect();
        if rows.is_empty() && !all {
            database.caught_up(revision);
            return Ok(Vec::new());
        }
        if let Some(RegistryRow::Format(version)) =
            rows.iter().find(|row| matches!(row, RegistryRow::Format(_)))
        {
            check_rows_format(*version)?;
        }
        database.take_over(&rows, revision, all)?;
        if all || rows.iter().any(|row| matches!(row, RegistryRow::Secret(..))) {
            self.load_token_secret(&database)?;
        }
        let mut dead = if all { self.forget_all_but(&rows) } else { Vec::new() };
        // Datasources first: a key needs the datasource that it belongs to.
        let mut added = Vec::new();
        for row in &rows {
            if let RegistryRow::Datasource(id, row) = row
                && self.apply_datasource(id, row.as_ref())
            {
                added.push(id);
            }
        }
        self.tell_rules(&database, &rows);
        for id in added {
            // Its keys may have come before it.
            if let Err(error) = self.live.add_keys_of(&database, id) {
                tracing::error!(datasource = %id, %error, "the keys of a datasource cannot be read");
            }
        }
        for row in rows {
            if let RegistryRow::Key(digest, row) = row {
                dead.extend(self.apply_key(digest, row.as_ref()));
            }
        }
        Ok(dead)
    }

    /// Tells the log's readers of the rules among these rows, in the order of their versions: before any key is there
    /// that could read or write what begins with them.
    fn tell_rules(&self, database: &RegistryDatabase, rows: &[&RegistryRow]) {
        let mut rules: Vec<_> = rows
            .iter()
            .filter_map(|row| match row {
                RegistryRow::Leak(version, _) | RegistryRow::Incarnation(version, _) => {
                    Some((*version, *row))
                }
                _ => None,
            })
            .collect();
        rules.sort_unstable_by_key(|(version, _)| *version);
        for (version, row) in rules {
            match row {
                RegistryRow::Leak(_, row) => {
                    self.record_rules.lock().tell(version, &RecordRule::Leak(row.clone()));
                }
                RegistryRow::Incarnation(_, row) => self.tell_incarnation(database, version, row.clone()),
                _ => {}
            }
        }
    }

    /// Ends what is sent to this datasource, and removes it from the live view.
    fn forget_datasource(&self, id: &DatasourceId) {
        let datasources = self.live.datasources.pin();
        if let Some(gone) = datasources.remove(id.as_str()) {
            gone.lease.end();
        }
    }

    /// Applies one datasource's row. Returns whether that has added it.
    fn apply_datasource(&self, id: &DatasourceId, row: Option<&DatasourceRow>) -> bool {
        let Some(row) = row else {
            self.forget_datasource(id);
            tracing::info!(datasource = %id, "datasource deleted on another node");
            return false;
        };
        if self.unwritten.has_deletion(id, row.created_at) {
            return false;
        }
        match self.datasource(id.as_str()) {
            Some(known)
                if known.created_at == row.created_at
                    && *known.name == *row.name
                    && known.incarnation == row.incarnation.unwrap_or(1) =>
            {
                set_if_changed(&known.limits, row.limits.as_deref());
                set_if_changed(&known.schemas, row.schemas.as_deref());
                set_if_changed(&known.event_time, row.event_time.as_deref());
                false
            }
            // Includes a datasource that was deleted and created again meanwhile.
            _ => {
                self.forget_datasource(id);
                let limits = JsonSetting::new(row.limits.as_deref());
                let schemas = JsonSetting::new(row.schemas.as_deref());
                let event_time = JsonSetting::new(row.event_time.as_deref());
                let (id, name) = (id.clone(), row.name.as_str().into());
                self.live.add_datasource(Datasource {
                    id,
                    name,
                    created_at: row.created_at,
                    limits,
                    schemas,
                    event_time,
                    incarnation: row.incarnation.unwrap_or(1),
                    lease: Lease::new(),
                    traffic: OnceLock::new(),
                });
                true
            }
        }
    }

    /// Applies one key's row. Returns the key if it died.
    fn apply_key(&self, digest: &Digest, row: Option<&KeyRow>) -> Option<Arc<Key>> {
        let known = self.live.keys.find(digest);
        let Some(row) = row.filter(|row| row.revoked_at.is_none()) else {
            if known.is_none() {
                self.live.keys.set(digest, None);
            }
            let dead = self.live.kill(digest)?;
            tracing::info!(key_id = %dead.id, datasource = %dead.datasource, "key revoked on another node");
            return Some(dead);
        };
        match known {
            // A revoked key stays revoked.
            Some(KeyLookup::Revoked) => None,
            Some(KeyLookup::Key(key)) => {
                set_if_changed(&key.limits, row.limits.as_deref());
                let rotation = rotation_of_row(row);
                if key.rotation() != rotation {
                    key.set_rotation(rotation);
                    self.live.watch(&key);
                }
                let ends = row.ended.is_some() && key.ends_at() != Some(TIME_ENDED);
                ends.then(|| {
                    key.end();
                    key.mark_ended();
                    key
                })
            }
            None => {
                match self.key_from_row(digest, row) {
                    Ok(key) if row.ended.is_some() => {
                        key.end();
                        let key = self.live.add_key(key, *digest);
                        key.mark_ended();
                    }
                    Ok(key) => drop(self.live.add_key(key, *digest)),
                    Err(error) => {
                        tracing::error!(key_id = %digest.key_id(), error, "a key of the cluster cannot be used");
                    }
                }
                None
            }
        }
    }

    fn key_from_row(&self, digest: &Digest, row: &KeyRow) -> Result<Key, String> {
        let all = DatasourceId::all();
        let datasource = if row.datasource == all.as_str() {
            all
        } else {
            // Shares the id's text with the datasource, to save memory.
            let owner = self.datasource(&row.datasource);
            owner.ok_or_else(|| format!("there is no datasource {:?}", row.datasource))?.id.clone()
        };
        Ok(Key::from(KeyAttributes {
            digest: *digest,
            datasource,
            scopes: row.scopes.parse().map_err(|_| format!("{:?} are no scopes", row.scopes))?,
            label: &row.label,
            created_at: row.created_at,
            expires_at: row.expires_at,
            rotation: rotation_of_row(row),
            limits: row.limits.as_deref(),
        }))
    }

    /// Removes everything that these rows do not have. Returns the keys that died.
    fn forget_all_but(&self, rows: &[&RegistryRow]) -> Vec<Arc<Key>> {
        let (mut datasources, mut keys) = (HashSet::new(), HashSet::new());
        for row in rows {
            match row {
                RegistryRow::Datasource(id, Some(_)) => drop(datasources.insert(id.as_str())),
                RegistryRow::Key(digest, Some(_)) => drop(keys.insert(digest.0)),
                _ => {}
            }
        }
        let known = self.datasources();
        for known in known.iter().filter(|known| !datasources.contains(known.id.as_str())) {
            self.forget_datasource(&known.id);
        }
        let by_datasource = self.live.by_datasource.read();
        let live = by_datasource.values().map(|key| key.digest);
        let gone: Vec<Digest> = live.filter(|digest| !keys.contains(&digest.0)).collect();
        drop(by_datasource);
        gone.iter().filter_map(|digest| self.live.kill(digest)).collect()
    }
}

/// Sets the text if it differs. An unchanged one keeps its cached value and the state in it.
fn set_if_changed(setting: &JsonSetting, text: Option<&str>) {
    if setting.text().as_deref() != text {
        setting.set(text);
    }
}

fn rotation_of_row(row: &KeyRow) -> Rotation {
    Rotation { replaces: row.replaces, replaced_by: row.replaced_by.zip(row.grace_ends_at) }
}
