//! The copy of the registry for a backup, made at a moment at which nothing of it changes.

use std::path::Path;

use super::Registry;
use super::database::{REGISTRY_DATABASE, RegistryDatabase};
use super::error::RegistryError;
use super::key_ends::DiskReserveUse;
use crate::sqlite::copy_database;

impl Registry {
    /// The newest format of the registry's file that this Headgate knows.
    pub const NEWEST_FORMAT: i64 = REGISTRY_DATABASE.newest_version();

    /// Copies the registry to a new file at `to`, and calls `cut` while nothing of it can change: what `cut` sees of the log
    /// has records of no key and no datasource that the copy does not know, and every rule of the copy is about what
    /// comes before the log's end. The ends of keys that are not durable yet are written first. Lookups go on; a change
    /// waits. The copy is not synced.
    ///
    /// # Errors
    /// [`RegistryError::Database`] if the ends of keys cannot be written, or the copy cannot.
    pub fn copy_with<T>(&self, to: &Path, mut cut: impl FnMut() -> T) -> Result<T, RegistryError> {
        let copy = |database: &mut RegistryDatabase| {
            let cut = cut();
            copy_database::<RegistryError>(&database.connection, to, &mut |_| Ok(()))?;
            Ok(cut)
        };
        self.make_after_ends(DiskReserveUse::Kept, copy).map(|(cut, _)| cut)
    }
}
