//! Where sessions are kept: in this gateway's own database, or in a cluster in the bucket that all nodes
//! share ([`bucket`](super::bucket)).

use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::error;

use super::pending::PendingSessionChanges;
use super::table::{SESSIONS_FILE_NAME, SessionTable};
use super::{SessionStoreError, StoredSessions};
use crate::sqlite::{SqliteError, open_or_set_aside};

/// Where the store's thread, which owns it, writes sessions.
pub(super) trait SessionBackend: Send {
    /// Writes all of `pending`, which is durable afterwards.
    ///
    /// # Errors
    /// It was not written, written in part, or the outcome is unknown. The caller writes it again, with
    /// later changes.
    fn write(&mut self, pending: &PendingSessionChanges) -> Result<(), SessionStoreError>;

    /// Whether it could not be opened since the start, so that nobody should wait for a write.
    fn is_unopened(&self) -> bool {
        false
    }

    /// How long it may go without a write when nothing is pending; `None`: for ever. After that it must be
    /// written even so.
    fn idle_time(&self) -> Option<Duration> {
        None
    }

    /// The database, if it is one and open.
    #[cfg(test)]
    fn table(&mut self) -> Option<&mut SessionTable> {
        None
    }
}

/// `sessions.db`.
pub(super) struct SessionDatabase {
    dir: PathBuf,
    /// `None` after an error that leaves its state in doubt, and until the database was opened at all.
    table: Option<SessionTable>,
    state: SessionDatabaseState,
}

/// What this run knows of the sessions that were stored before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SessionDatabaseState {
    /// All of them.
    Loaded,
    /// None, and the database could not be opened yet.
    Unopened,
    /// None. Those whose client has begun another session are removed; the next start has the others.
    OpenedLate,
}

impl SessionDatabase {
    /// One that could not be opened when its sessions were to be read, and is opened once that is possible.
    pub(super) fn unopened(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), table: None, state: SessionDatabaseState::Unopened }
    }

    /// Opens `dir/sessions.db`, or makes it, and reads what is there. A damaged one is set aside: the third
    /// value is what to tell the operator then.
    pub(super) fn open(dir: &Path) -> Result<(Self, StoredSessions, Option<String>), SqliteError> {
        let ((table, stored), damaged) = open_or_set_aside(&dir.join(SESSIONS_FILE_NAME), || {
            let table = SessionTable::open(dir)?;
            let stored = table.load()?;
            Ok((table, stored))
        })?;
        let said = damaged.map(|(aside, damage)| {
            let said = format!(
                "{SESSIONS_FILE_NAME} was damaged and is set aside as {}: clients that come back have no session \
                 and subscribe anew, and groups of subscribers begin at the log's end",
                aside.display()
            );
            error!(%damage, "sessions: {said}");
            said
        });
        let state = SessionDatabaseState::Loaded;
        Ok((Self { dir: dir.to_owned(), table: Some(table), state }, stored, said))
    }
}

impl SessionBackend for SessionDatabase {
    fn write(&mut self, pending: &PendingSessionChanges) -> Result<(), SessionStoreError> {
        let table = match &mut self.table {
            Some(table) => table,
            None if self.state == SessionDatabaseState::Unopened => {
                let table = SessionTable::open_late(&self.dir).map_err(SessionStoreError::Unopened)?;
                self.state = SessionDatabaseState::OpenedLate;
                self.table.insert(table)
            }
            None => self.table.insert(SessionTable::reopen(&self.dir)?),
        };
        let is_late = self.state == SessionDatabaseState::OpenedLate;
        table.write(pending, is_late).map_err(|error| {
            if !error.is_clean_rollback() {
                self.table = None;
            }
            error.into()
        })
    }

    fn is_unopened(&self) -> bool {
        self.state == SessionDatabaseState::Unopened
    }

    #[cfg(test)]
    fn table(&mut self) -> Option<&mut SessionTable> {
        self.table.as_mut()
    }
}
