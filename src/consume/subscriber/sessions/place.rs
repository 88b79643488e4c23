//! Where sessions are kept: in this gateway's own database, or in a cluster in the bucket that all nodes
//! share ([`bucket`](super::bucket)).

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::pending::Pending;
use super::table::Table;
use super::{SessionStoreError, Stored};

/// Where the store's thread, which owns it, writes sessions.
pub(super) trait Place: Send {
    /// Writes all of `pending`, which is durable afterwards.
    ///
    /// # Errors
    /// It was not written, written in part, or the outcome is unknown. The caller writes it again, with
    /// later changes.
    fn write(&mut self, pending: &Pending) -> Result<(), SessionStoreError>;

    /// How long it may go without a write when nothing is pending; `None`: for ever. After that it must be
    /// written even so.
    fn rest(&self) -> Option<Duration> {
        None
    }

    /// The database, if it is one and open.
    #[cfg(test)]
    fn table(&mut self) -> Option<&mut Table> {
        None
    }
}

/// `sessions.db`.
pub(super) struct Database {
    dir: PathBuf,
    /// `None` after an error that leaves its state in doubt.
    table: Option<Table>,
}

impl Database {
    /// Opens `dir/sessions.db`, or makes it, and reads what is there.
    pub(super) fn open(dir: &Path) -> Result<(Self, Stored), SessionStoreError> {
        let table = Table::open(dir)?;
        let stored = table.load()?;
        Ok((Self { dir: dir.to_owned(), table: Some(table) }, stored))
    }
}

impl Place for Database {
    fn write(&mut self, pending: &Pending) -> Result<(), SessionStoreError> {
        let table = match &mut self.table {
            Some(table) => table,
            None => self.table.insert(Table::reopen(&self.dir)?),
        };
        table.write(pending).map_err(|error| {
            if !error.leaves_all_as_it_was() {
                self.table = None;
            }
            error.into()
        })
    }

    #[cfg(test)]
    fn table(&mut self) -> Option<&mut Table> {
        self.table.as_mut()
    }
}
