//! Where sessions are kept: in this gateway's own database, or in a cluster in the bucket that all nodes
//! share ([`bucket`](super::bucket)).

use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::error;

use super::pending::PendingSessionChanges;
use super::table::{SESSIONS_FILE_NAME, SessionTable};
use super::{SessionStoreError, StoredSessions};
use crate::sqlite::{SqliteError, open_or_set_aside, set_aside};

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

    /// Copies what is durable to a new database.
    ///
    /// # Errors
    /// It is in no database, or that cannot be read or the copy not be written.
    fn copy(&mut self, _to: &Path) -> Result<(), SessionStoreError> {
        Err(SessionStoreError::Bucket("the sessions of a cluster are in no file".into()))
    }

    /// What was set aside since the last call and where, for the operator.
    fn take_set_aside(&mut self) -> Option<String> {
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
    /// Everything that the database has: what a new one gets when it is damaged.
    mirror: PendingSessionChanges,
    /// One was set aside. It happens once only: a disk that damages one file after the other needs an operator.
    is_anew: bool,
    /// What the one that was set aside had is not in the new one yet.
    lacks_mirror: bool,
    set_aside: Option<String>,
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
        Self {
            dir: dir.to_owned(),
            table: None,
            state: SessionDatabaseState::Unopened,
            mirror: PendingSessionChanges::default(),
            is_anew: false,
            lacks_mirror: false,
            set_aside: None,
        }
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
        let mut mirror = PendingSessionChanges::default();
        mirror.include(&stored);
        let is_anew = said.is_some();
        let (dir, state) = (dir.to_owned(), SessionDatabaseState::Loaded);
        let (lacks_mirror, set_aside) = (false, None);
        Ok((Self { dir, table: Some(table), state, mirror, is_anew, lacks_mirror, set_aside }, stored, said))
    }

    fn try_write(&mut self, pending: &PendingSessionChanges) -> Result<(), SqliteError> {
        if self.lacks_mirror {
            self.write_mirror()?;
        }
        let table = match &mut self.table {
            Some(table) => table,
            None => self.table.insert(SessionTable::reopen(&self.dir)?),
        };
        table.write(pending, self.state == SessionDatabaseState::OpenedLate).inspect_err(|error| {
            if !error.is_clean_rollback() {
                self.table = None;
            }
        })
    }

    /// Whether another database can have all that a damaged one had.
    fn may_begin_anew(&self) -> bool {
        !self.is_anew && self.state == SessionDatabaseState::Loaded
    }

    /// Sets the damaged database aside, and writes all that it had to another one.
    fn begin_anew(&mut self, damage: &SqliteError) -> Result<(), SqliteError> {
        self.table = None;
        let aside = set_aside(&self.dir.join(SESSIONS_FILE_NAME))?;
        (self.is_anew, self.lacks_mirror) = (true, true);
        let said = format!(
            "{SESSIONS_FILE_NAME} was damaged and is set aside as {}; another one has everything that it had",
            aside.display()
        );
        error!(%damage, "sessions: {said}");
        self.set_aside = Some(said);
        self.write_mirror()
    }

    /// Writes all that the database that was set aside had to the new one.
    fn write_mirror(&mut self) -> Result<(), SqliteError> {
        let table = match &mut self.table {
            Some(table) => table,
            None => self.table.insert(SessionTable::open(&self.dir)?),
        };
        let written = table.write(&self.mirror, false);
        if written.as_ref().is_err_and(|error| !error.is_clean_rollback()) {
            self.table = None;
        }
        self.lacks_mirror = written.is_err();
        written
    }
}

impl SessionBackend for SessionDatabase {
    fn write(&mut self, pending: &PendingSessionChanges) -> Result<(), SessionStoreError> {
        if self.state == SessionDatabaseState::Unopened {
            let table = SessionTable::open_late(&self.dir).map_err(SessionStoreError::Unopened)?;
            (self.table, self.state) = (Some(table), SessionDatabaseState::OpenedLate);
        }
        let written = self.try_write(pending);
        // Kept also if the outcome is unknown: it is written again, and twice does no harm.
        self.mirror.follow(pending);
        match written {
            Err(damage) if damage.is_damage() && self.may_begin_anew() => self.begin_anew(&damage)?,
            written => written?,
        }
        Ok(())
    }

    fn copy(&mut self, to: &Path) -> Result<(), SessionStoreError> {
        if self.state == SessionDatabaseState::Unopened {
            let path = self.dir.join(SESSIONS_FILE_NAME);
            let error = SqliteError::failed(&path, "it could not be opened since the start");
            return Err(SessionStoreError::Unopened(error));
        }
        if self.lacks_mirror {
            self.write_mirror()?;
        }
        let table = match &mut self.table {
            Some(table) => table,
            None => self.table.insert(SessionTable::reopen(&self.dir)?),
        };
        Ok(table.copy(to)?)
    }

    fn take_set_aside(&mut self) -> Option<String> {
        self.set_aside.take()
    }

    fn is_unopened(&self) -> bool {
        self.state == SessionDatabaseState::Unopened
    }

    #[cfg(test)]
    fn table(&mut self) -> Option<&mut SessionTable> {
        self.table.as_mut()
    }
}
