//! The copy of the registry for a backup, made at a moment at which nothing of it changes.

use std::path::Path;

use super::Registry;
use super::database::{REGISTRY_DATABASE, RegistryDatabase};
use super::error::RegistryError;
use super::key_ends::DiskReserveUse;
use crate::sqlite::{SqliteError, copy_database};

impl Registry {
    /// The newest format of the registry's file that this Headgate knows.
    pub const NEWEST_FORMAT: i64 = REGISTRY_DATABASE.newest_version();

    /// Copies the registry to a new file at `to`, and calls `cut` while nothing of it can change: what `cut` sees of the log
    /// has records of no key and no datasource that the copy does not know, and every rule of the copy is about what
    /// comes before the log's end. The ends of keys that are not durable yet are written first. Lookups go on; a change
    /// waits, so `to` belongs on a disk on which changes depend anyway. `step` is called with the bytes of each step; its
    /// error ends the copy and is returned. The copy is not synced.
    ///
    /// # Errors
    /// [`RegistryError::Database`] if the ends of keys cannot be written; in the inner result, that the copy cannot, or the
    /// error of `step`.
    pub(crate) fn copy_with<T, E: From<SqliteError>>(
        &self,
        to: &Path,
        mut cut: impl FnMut() -> T,
        step: &mut dyn FnMut(u64) -> Result<(), E>,
    ) -> Result<Result<T, E>, RegistryError> {
        let copy = |database: &mut RegistryDatabase| {
            let cut = cut();
            Ok(copy_database(&database.connection, to, &mut *step).map(|()| cut))
        };
        self.make_after_ends(DiskReserveUse::Kept, copy).map(|(cut, _)| cut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::audit::Actor;
    use crate::auth::{Scope, Scopes};

    #[test]
    fn a_copy_ends_at_the_next_step_if_that_is_wanted_and_the_registry_goes_on() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Registry::open(dir.path()).expect("opens");
        let to = dir.path().join("copy");
        let end = SqliteError::failed(&to, "the gateway stops");
        let copied = registry.copy_with(&to, || (), &mut |_| Err(end.clone()));
        assert_eq!(copied.expect("the registry is in order"), Err(end));
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        registry.create_datasource(&Actor::SYSTEM, None, "press-4", scopes).expect("a change is made");
    }
}
