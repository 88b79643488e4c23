//! The session store: the MQTT sessions that outlive their connection (MQTT 5 section 4.1), kept in
//! `DIR/sessions.db` so that they outlive the gateway too. A session is a cursor in the log, a set of
//! subscriptions, and what is in flight; the messages themselves are in the log.
//!
//! Live sessions are in memory, with the tasks that serve them; the store has what a restart needs. One
//! thread owns the database. Changes come over a channel. All waiting changes go into one transaction with
//! one sync, which then releases all their waiters. Meanwhile the next changes gather, so that a thousand
//! clients that connect at once cost a few syncs.
//!
//! A failed transaction is retried, together with later changes, until it succeeds: no change is lost or
//! overtaken by a later one. Waiters get the error after [`SESSION_WRITE_WAIT_MAX`].
//!
//! In a cluster the [`bucket`] of all nodes replaces the database.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use headgate_bridge_nats::KvBucket;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};
use tracing::error;

use self::bucket::LostSession;
use self::bucket::node::NodeSessions;
pub use self::flights::{FlightOrigin, StoredFlight, StoredFlights};
use self::pending::PendingSessionChanges;
use self::place::{SessionBackend, SessionDatabase};
#[cfg(test)]
use self::table::{SESSIONS_FILE_NAME, SessionTable};
pub use self::will::StoredWill;
use crate::message::{DatasourceId, Offset, TimeMicros};
use crate::sqlite::SqliteError;
use crate::trouble::TroubleCell;

pub mod bucket;
mod flights;
mod pending;
mod place;
mod row;
pub(in crate::consume) mod table;
#[cfg(test)]
mod tests;
mod will;

/// How long a caller waits for a change while transactions fail. The change stays queued.
pub const SESSION_WRITE_WAIT_MAX: Duration = Duration::from_secs(3);
/// How long a store that is closing keeps retrying.
const SESSION_CLOSE_WAIT_MAX: Duration = Duration::from_secs(2);
/// The first and the longest pause after a failed transaction; it doubles each time.
const SESSION_RETRY_PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// The most calls of [`SessionStore::write`] in one transaction, so that the first of them does not wait
/// for an endless stream of later ones.
const SESSION_WRITES_PER_TRANSACTION_MAX: usize = 16_384;

/// A session as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredSession {
    /// Its number. Unlike a client id, it is never used again.
    pub uid: u64,
    /// The scope of the key that opened it: its datasource, in one incarnation; `*` for a key for all.
    #[serde(deserialize_with = "row::datasource")]
    pub datasource: DatasourceId,
    /// Unique within the datasource.
    pub client_id: String,
    /// How many seconds it outlives its connection; `u32::MAX`: for ever.
    pub expiry_s: u32,
    /// When its connection ended. `None`: it was connected when this was written.
    pub ended_at: Option<TimeMicros>,
    /// Everything below this offset was sent, and all of it but the flights is acknowledged.
    pub cursor: Offset,
    /// No two have the same filter. Loaded in the order of their filters.
    pub subscriptions: Vec<StoredSubscription>,
    /// What was sent and is not acknowledged.
    pub flights: StoredFlights,
}

/// One subscription of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredSubscription {
    /// As the client gave it, with `$share/{group}/` if it is shared.
    pub filter: String,
    /// The granted QoS.
    pub qos: u8,
    /// Whether the client's own messages are left out.
    pub no_local: bool,
    /// Whether messages keep the retain flag with which they were published.
    pub retain_as_published: bool,
    /// The subscription identifier that its messages carry.
    pub identifier: Option<u32>,
    /// The offset at which it begins.
    pub from: Offset,
    /// What it asked for of the past, as in its SUBSCRIBE: `from-offset 41`. It got that.
    pub replay: Option<String>,
    /// Whether its messages come with their metadata.
    pub metadata: bool,
}

/// The cursor of a group of shared subscriptions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredGroup {
    /// The scope of its members' keys, or `*`.
    pub datasource: DatasourceId,
    /// The name in `$share/{group}/{filter}`.
    pub group: String,
    /// The filter in it.
    pub filter: String,
    /// Everything below is delivered to one member or another.
    pub cursor: Offset,
}

/// What the last run has stored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoredSessions {
    /// In the order of their uid as a signed number.
    pub sessions: Vec<StoredSession>,
    /// In the order of datasource, name and filter.
    pub groups: Vec<StoredGroup>,
    /// Those of clients that were connected, or whose wills waited.
    pub wills: Vec<Arc<StoredWill>>,
}

impl StoredSessions {
    /// Moves every cursor that is behind the end of the log back to it: that log never gave them what comes there
    /// from now on. Returns the changes to store.
    pub fn set_back(&mut self, end: Offset) -> Vec<SessionStoreChange> {
        let mut changes = Vec::new();
        for session in &mut self.sessions {
            if session.set_back(end) {
                changes.push(SessionStoreChange::PutSession(session.clone()));
            }
        }
        for group in self.groups.iter_mut().filter(|group| group.cursor > end) {
            group.cursor = end;
            changes.push(SessionStoreChange::PutGroup(group.clone()));
        }
        changes
    }
}

impl StoredSession {
    /// Moves what is behind the end of the log back to it. Returns whether anything was.
    pub(in crate::consume::subscriber) fn set_back(&mut self, end: Offset) -> bool {
        // A filter begins where the log ended then, which may be further on than the session's cursor.
        let is_ahead = self.flights.sent.iter().any(|flight| flight.offset >= end);
        let is_behind = is_ahead || self.cursor > end || self.subscriptions.iter().any(|of| of.from > end);
        if is_behind {
            self.cursor = self.cursor.min(end);
            self.flights.set_back(end);
            self.subscriptions.iter_mut().for_each(|of| of.from = of.from.min(end));
        }
        is_behind
    }
}

/// A change of what is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionStoreChange {
    /// A session is new, or its subscriptions have changed. Replaces everything stored of it.
    PutSession(StoredSession),
    /// The session with this uid has ended for good.
    RemoveSession(u64),
    /// A session's cursor has moved, and what is in flight is what it was. Does nothing if there is no session with
    /// this uid.
    MoveCursor {
        /// Which.
        uid: u64,
        /// Everything below was sent.
        cursor: Offset,
    },
    /// A session's cursor has moved, or what is in flight has changed. Does nothing if there is no session with this
    /// uid.
    MoveFlights {
        /// Which.
        uid: u64,
        /// Everything below was sent.
        cursor: Offset,
        /// What of it is not acknowledged.
        flights: StoredFlights,
    },
    /// A session's connection has ended, or begun with `None`. Does nothing if there is no session with this
    /// uid.
    SetEnded {
        /// Which.
        uid: u64,
        /// When.
        ended_at: Option<TimeMicros>,
        /// Seconds that it stays; `u32::MAX`: for ever.
        expiry_s: u32,
    },
    /// A group is new, or its cursor has moved.
    PutGroup(StoredGroup),
    /// A group has no members left.
    RemoveGroup {
        /// The datasource of its members' keys, or `*`.
        datasource: DatasourceId,
        /// Its name.
        group: String,
        /// Its filter.
        filter: String,
    },
    /// A client has connected with a will, or was lost and its will waits. Replaces the will with the same id.
    PutWill(Arc<StoredWill>),
    /// The will with this id was published, or is not to be.
    RemoveWill(u64),
    /// In a cluster: what the bucket has of a client. Later changes of that client are written over this.
    Found(Box<bucket::FoundSession>),
    /// In a cluster: the session with this uid belongs to another node from now on. This node writes
    /// nothing of it any more.
    GiveUpSession(u64),
}

/// Why sessions could not be read, or a change is not known to be durable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionStoreError {
    /// The database failed. The change is not lost: it is written once that is possible again, unless the
    /// gateway is killed first.
    #[error("sessions: {0}")]
    Database(#[from] SqliteError),
    /// The database could not be opened since the start; likewise.
    #[error(
        "sessions: {0}. Sessions of earlier runs are not known, so that their clients begin anew, and those of this run \
         are in memory only; {remedy}",
        remedy = .0.remedy()
    )]
    Unopened(SqliteError),
    /// The bucket of the cluster failed; likewise. The reason is in words.
    #[error("sessions: {0}")]
    Bucket(Arc<str>),
    /// The store has been closed.
    #[error("sessions: the gateway is shutting down")]
    Closed,
}

/// The running store. Cheap to clone; the thread ends after the last clone is dropped, or with
/// [`SessionStore::close`].
#[derive(Clone)]
pub struct SessionStore {
    inbox: mpsc::Sender<SessionStoreMessage>,
    shared: Arc<SessionStoreState>,
}

/// What the thread and those who ask about it share.
struct SessionStoreState {
    trouble: TroubleCell,
    ended: watch::Sender<bool>,
    /// What was set aside and where, for the operator.
    set_aside: Mutex<Option<String>>,
}

/// What the thread is sent.
enum SessionStoreMessage {
    Write(Vec<SessionStoreChange>, SessionWriteWaiter),
    /// Copy what is durable to a new file.
    Copy(PathBuf, oneshot::Sender<Result<(), SessionStoreError>>),
    Close,
    #[cfg(test)]
    Meddle(Box<dyn FnOnce(&mut SessionTable) + Send>),
}

/// A caller that waits for changes to be durable.
struct SessionWriteWaiter {
    since: Instant,
    reply: oneshot::Sender<Result<(), SessionStoreError>>,
}

impl SessionStore {
    /// Opens `dir/sessions.db`, or makes it, reads what is there, and starts the thread that writes it. A
    /// damaged database is set aside. One that cannot be opened, because it is in use, newer or not ours, is opened by
    /// the thread once that is possible; until then sessions are in memory only, and [`SessionStore::trouble`] says
    /// why.
    ///
    /// # Errors
    /// [`SessionStoreError::Database`]: there is no thread for it.
    pub fn open(dir: &Path) -> Result<(Self, StoredSessions), SessionStoreError> {
        let (database, stored, set_aside, error) = match SessionDatabase::open(dir) {
            Ok((database, stored, set_aside)) => (database, stored, set_aside, None),
            Err(error) => {
                let error = SessionStoreError::Unopened(error);
                (SessionDatabase::unopened(dir), StoredSessions::default(), None, Some(error))
            }
        };
        let started = Self::start(Box::new(database), set_aside, error);
        Ok((started.map_err(|error| thread_error(dir, &error))?, stored))
    }

    /// Starts a store that keeps the sessions of this `node` in the cluster's bucket. The returned receiver
    /// gets the sessions that another node has taken over.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn in_bucket(
        cells: KvBucket,
        node: &str,
        is_frozen: impl Fn() -> bool + Send + 'static,
    ) -> std::io::Result<(Self, tokio::sync::mpsc::UnboundedReceiver<LostSession>)> {
        let (lost, told) = tokio::sync::mpsc::unbounded_channel();
        let place = NodeSessions::new(cells, node, Box::new(is_frozen), lost);
        Ok((Self::start(Box::new(place), None, None)?, told))
    }

    /// `error` is why the place could not be opened yet.
    fn start(
        place: Box<dyn SessionBackend>,
        set_aside: Option<String>,
        error: Option<SessionStoreError>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(SessionStoreState {
            trouble: TroubleCell::new("sessions cannot be kept", "sessions are kept again"),
            ended: watch::Sender::new(false),
            set_aside: Mutex::new(set_aside),
        });
        let (inbox, received) = mpsc::channel();
        let mut writer = SessionWriter {
            place,
            inbox: received,
            pending: PendingSessionChanges::default(),
            waiting: Vec::new(),
            failure: None,
            close_by: None,
            shared: shared.clone(),
        };
        error.into_iter().for_each(|error| writer.fail(error));
        let ended = SessionWriterEndGuard(shared.clone());
        std::thread::Builder::new().name("sessions".to_owned()).spawn(move || {
            // Told once the database is closed: who is told may open it again.
            let _ended = ended;
            writer.run();
        })?;
        Ok(Self { inbox, shared })
    }

    /// Queues `changes`, at once and in order, behind all that was queued before. The future resolves
    /// when they are on the disk; they are written also if it is dropped.
    ///
    /// # Errors
    /// [`SessionStoreError::Database`] when they could not be written for [`SESSION_WRITE_WAIT_MAX`]. They stay queued,
    /// and whatever is queued later comes after them. [`SessionStoreError::Closed`] after
    /// [`SessionStore::close`].
    pub fn write(
        &self,
        changes: Vec<SessionStoreChange>,
    ) -> impl Future<Output = Result<(), SessionStoreError>> + Send + 'static + use<> {
        let (reply, written) = oneshot::channel();
        // If the thread has ended, the reply is dropped with the message, which means `Closed`.
        let _ = self
            .inbox
            .send(SessionStoreMessage::Write(changes, SessionWriteWaiter { since: Instant::now(), reply }));
        async move { written.await.unwrap_or(Err(SessionStoreError::Closed)) }
    }

    /// Copies what is durable to a new database at `to`, between two transactions. The copy is not synced. Blocks until
    /// that is done.
    ///
    /// # Errors
    /// [`SessionStoreError`], also in a cluster, whose sessions are in no file.
    pub fn copy_blocking(&self, to: &Path) -> Result<(), SessionStoreError> {
        let (reply, copied) = oneshot::channel();
        let _ = self.inbox.send(SessionStoreMessage::Copy(to.to_owned(), reply));
        copied.blocking_recv().unwrap_or(Err(SessionStoreError::Closed))
    }

    /// Writes what is queued, accepts no more, and ends the thread. Gives up on what cannot be written
    /// within two seconds.
    pub async fn close(&self) {
        let _ = self.inbox.send(SessionStoreMessage::Close);
        // The sender is in `self`, so that waiting does not fail.
        let _ = self.shared.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// What was set aside since the start, and where it is.
    pub fn set_aside(&self) -> Option<String> {
        self.shared.set_aside.lock().clone()
    }

    /// The present error, while nothing can be written.
    pub fn trouble(&self) -> Option<String> {
        self.shared.trouble.current()
    }

    /// Does something to the database between two transactions.
    #[cfg(test)]
    fn meddle(&self, meddle: impl FnOnce(&mut SessionTable) + Send + 'static) {
        assert!(self.inbox.send(SessionStoreMessage::Meddle(Box::new(meddle))).is_ok(), "the thread runs");
    }
}

/// The error of a thread that could not be started for the database in `dir`.
fn thread_error(dir: &Path, error: &std::io::Error) -> SqliteError {
    SqliteError::failed(&dir.join(table::SESSIONS_FILE_NAME), format!("no thread for it: {error}"))
}

/// The thread.
struct SessionWriter {
    place: Box<dyn SessionBackend>,
    inbox: mpsc::Receiver<SessionStoreMessage>,
    pending: PendingSessionChanges,
    waiting: Vec<SessionWriteWaiter>,
    failure: Option<SessionWriteFailure>,
    /// The deadline for the end, once the store is closing.
    close_by: Option<Instant>,
    shared: Arc<SessionStoreState>,
}

/// The failure of the last transaction, and when to retry.
struct SessionWriteFailure {
    error: SessionStoreError,
    pause: Duration,
    retry_at: Instant,
}

impl SessionWriter {
    fn run(mut self) {
        loop {
            self.gather();
            let now = Instant::now();
            if self.failure.as_ref().is_none_or(|failure| failure.retry_at <= now) {
                match self.commit() {
                    Ok(()) => self.release(),
                    Err(error) => self.fail(error),
                }
            }
            self.fail_overdue_waiters();
            if self.close_by.is_some_and(|deadline| self.pending.is_empty() || deadline <= Instant::now()) {
                break;
            }
        }
        if let Some(SessionWriteFailure { error, .. }) = self.failure {
            error!(%error, "changes of sessions were not written before the end");
            self.waiting.drain(..).for_each(|waiter| waiter.answer(Err(error.clone())));
        }
    }

    /// Receives all waiting messages, and waits for one if there is nothing to do.
    fn gather(&mut self) {
        let first = match (&self.failure, self.close_by) {
            (None, None) => match self.place.idle_time() {
                None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(rest) => self.inbox.recv_timeout(rest),
            },
            (None, Some(_)) => self.inbox.try_recv().map_err(|_| RecvTimeoutError::Timeout),
            (Some(failure), None) => {
                self.inbox.recv_timeout(failure.retry_at.saturating_duration_since(Instant::now()))
            }
            (Some(failure), Some(_)) => {
                std::thread::sleep(failure.retry_at.saturating_duration_since(Instant::now()));
                self.inbox.try_recv().map_err(|_| RecvTimeoutError::Timeout)
            }
        };
        match first {
            Ok(message) => self.take(message),
            Err(RecvTimeoutError::Timeout) => return,
            Err(RecvTimeoutError::Disconnected) => return self.close(),
        }
        for _ in 1..SESSION_WRITES_PER_TRANSACTION_MAX {
            match self.inbox.try_recv() {
                Ok(message) => self.take(message),
                Err(_) => break,
            }
        }
    }

    fn take(&mut self, message: SessionStoreMessage) {
        match message {
            SessionStoreMessage::Write(changes, waiter) => {
                changes.into_iter().for_each(|change| self.pending.fold(change));
                self.waiting.push(waiter);
            }
            SessionStoreMessage::Copy(to, reply) => {
                let _ = reply.send(self.place.copy(&to));
            }
            SessionStoreMessage::Close => self.close(),
            #[cfg(test)]
            SessionStoreMessage::Meddle(meddle) => {
                meddle(self.place.table().expect("a test meddles with what is open"))
            }
        }
    }

    fn close(&mut self) {
        self.close_by.get_or_insert_with(|| Instant::now() + SESSION_CLOSE_WAIT_MAX);
    }

    fn commit(&mut self) -> Result<(), SessionStoreError> {
        let may_rest = || self.place.idle_time().is_none_or(|rest| rest > Duration::ZERO);
        if self.pending.is_empty() && !self.place.is_unopened() && may_rest() {
            return Ok(());
        }
        let written = self.place.write(&self.pending);
        if let Some(said) = self.place.take_set_aside() {
            *self.shared.set_aside.lock() = Some(said);
        }
        written
    }

    fn release(&mut self) {
        self.pending = PendingSessionChanges::default();
        // Before the answers, so that whoever has one sees no error any more.
        if self.failure.take().is_some() {
            self.shared.trouble.set(None);
        }
        self.waiting.drain(..).for_each(|waiter| waiter.answer(Ok(())));
    }

    fn fail(&mut self, error: SessionStoreError) {
        self.shared.trouble.set(Some(error.to_string()));
        let pause = self
            .failure
            .as_ref()
            .map_or(SESSION_RETRY_PAUSES.0, |failure| (failure.pause * 2).min(SESSION_RETRY_PAUSES.1));
        self.failure = Some(SessionWriteFailure { error, pause, retry_at: Instant::now() + pause });
    }

    /// Answers callers that have waited for [`SESSION_WRITE_WAIT_MAX`] with the error; all of them, as long as there is
    /// no database.
    fn fail_overdue_waiters(&mut self) {
        let Some(SessionWriteFailure { error, .. }) = &self.failure else { return };
        let wait_max = if self.place.is_unopened() { Duration::ZERO } else { SESSION_WRITE_WAIT_MAX };
        for waiter in self.waiting.extract_if(.., |waiter| waiter.since.elapsed() >= wait_max) {
            waiter.answer(Err(error.clone()));
        }
    }
}

impl SessionWriteWaiter {
    fn answer(self, answer: Result<(), SessionStoreError>) {
        // Many callers do not wait, and have dropped the receiver.
        let _ = self.reply.send(answer);
    }
}

/// Marks the thread as ended when it is dropped, also after a panic.
struct SessionWriterEndGuard(Arc<SessionStoreState>);

impl Drop for SessionWriterEndGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let trouble = "the session store has ended by a panic, and needs a restart";
            self.0.trouble.set(Some(trouble.to_owned()));
        }
        self.0.ended.send_replace(true);
    }
}
