//! Storage: the consumers that write every record of the log into a sink, each into one of its own
//! ([`StorageSinks`]). A sink that is slow or away delays no other one, and no device.
//!
//! One thread for each reads the log from the sink's cursor, stores what it has read in one transaction, and
//! repeats. Far behind, transactions are as large as is useful. At the tail they are small and paced, so
//! that a record can be read back within milliseconds and a busy stream does not pay for a transaction
//! per record. `consume/follower.rs` runs the thread.
//!
//! A database that is damaged stops neither the start nor the thread: it is set aside, and another one begins
//! where the log begins. One that cannot be opened for another reason is left alone, and tried again and again.

mod ahead;
mod follower;
#[cfg(feature = "delta")]
mod lake_place;
mod pace;
mod postgres_place;
pub(in crate::consume) mod record_sink;
mod retention;
mod sinks;
mod sqlite_place;
#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::watch;

use self::follower::StorageFollower;
#[cfg(feature = "delta")]
pub use self::lake_place::probe_lake;
use self::pace::StoragePace;
use self::record_sink::{OpenedSink, SinkFault, SinkPlace};
pub use self::retention::StoredLimitsSource;
use super::follower::{FollowerControl, FollowerProfile};
use super::sink::sqlite::SinkError;
use crate::config::SinkKind;
use crate::log::{Hold, Log};
use crate::message::{Offset, TimeMicros, now_micros};
use crate::trouble::TroubleCell;

pub use sinks::{SinkState, StorageSinks};
pub use sqlite_place::{repair, set_back_records};

/// What the log says about each sink's consumer.
const fn profile_of(kind: SinkKind) -> &'static FollowerProfile {
    match kind {
        SinkKind::Sqlite => &FollowerProfile {
            name: "storage",
            down: "storage is failing",
            up: "storage has recovered",
            late: "storage did not finish by its deadline; the log has the rest",
            patient: true,
            nice: 0,
        },
        SinkKind::Postgres => &FollowerProfile {
            name: "postgres",
            down: "storage in PostgreSQL is failing",
            up: "storage in PostgreSQL has recovered",
            late: "storage in PostgreSQL did not finish by its deadline; the log has the rest",
            // The server may be away for long, and the next start stores the rest.
            patient: false,
            nice: 0,
        },
        SinkKind::Delta => &FollowerProfile {
            name: "delta",
            down: "storage in the Delta lake is failing",
            up: "storage in the Delta lake has recovered",
            late: "storage in the Delta lake did not finish by its deadline; the log has the rest",
            patient: false,
            nice: 0,
        },
    }
}

/// The running consumer of one sink.
pub struct StorageConsumer {
    kind: SinkKind,
    shared: Arc<StorageProgress>,
    control: Arc<FollowerControl>,
}

/// Why storage could not start.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The database cannot be opened, or this Headgate cannot write it.
    #[error("storage: {0}")]
    Sink(#[from] SinkFault),
    /// The sink is ahead of the log, and something that was acknowledged may be lost: the log has lost records,
    /// or is another one.
    #[error(
        "storage: records.db holds everything up to offset {stored}, but the log ends at {log_end}, and {why}. Put the \
         log back if you have it; or let `headgate repair` say what it would set aside, and do it with --yes"
    )]
    LogBehind {
        /// The first offset that is not stored.
        stored: Offset,
        /// The first offset that the log does not have.
        log_end: Offset,
        /// What is in doubt.
        why: String,
    },
    /// The thread could not be started.
    #[error("storage: {0}")]
    Io(#[from] std::io::Error),
}

impl From<SinkError> for StorageError {
    fn from(error: SinkError) -> Self {
        Self::Sink(error.into())
    }
}

/// What the thread and those who ask about it share.
struct StorageProgress {
    cursor: watch::Sender<Offset>,
    /// The version of the rules about leaked keys that the stored records follow.
    withheld: watch::Sender<u64>,
    /// Keeps records that are not stored in the log, even after the thread has ended.
    hold: Hold,
    /// What was set aside since the start and where, for the operator.
    set_aside: Mutex<Option<String>>,
    /// Whether this gateway writes into the sink now; another one may, where they share it.
    is_writer: watch::Sender<bool>,
    pace: Mutex<StoragePace>,
    /// What is to be told of a sink that takes records.
    warning: TroubleCell,
    /// The newest error and when it was, also if it is over.
    last_error: Mutex<Option<(TimeMicros, String)>>,
    /// How much may stay stored, once that is known.
    limits: OnceLock<StoredLimitsSource>,
}

impl StorageConsumer {
    /// Opens the sink at `place`, if that is here, and starts the thread that follows the log into it, its priority lowered by
    /// `nice`. What is damaged is set aside, and so are records behind the log's end. A sink that cannot be opened is
    /// opened by the thread once that is possible; until then nothing is stored in it, and
    /// [`StorageConsumer::trouble`] says why.
    ///
    /// # Errors
    /// [`StorageError::LogBehind`], when storing would be wrong; [`StorageError::Io`].
    pub(in crate::consume) fn start(
        mut place: Box<dyn SinkPlace>,
        nice: u8,
        log: Arc<dyn Log>,
    ) -> Result<Self, StorageError> {
        let (kind, log_end) = (place.kind(), log.next_offset());
        let (opened, trouble) = match place.is_local().then(|| place.open(&*log, log_end, false)) {
            Some(Ok(opened)) => (Some(opened), None),
            Some(Err(StorageError::Sink(error))) => (None, Some(unopened_words(&error))),
            Some(Err(error)) => return Err(error),
            None => (None, None),
        };
        let (sink, said) = opened.map(|OpenedSink { sink, said }| (sink, said)).unzip();
        let shared = Arc::new(StorageProgress {
            cursor: watch::Sender::new(sink.as_ref().map_or(0, |sink| sink.stored_cursor())),
            withheld: watch::Sender::new(sink.as_ref().map_or(0, |sink| sink.withheld_version())),
            hold: log.hold(),
            set_aside: Mutex::new(said.flatten()),
            is_writer: watch::Sender::new(true),
            pace: Mutex::default(),
            warning: TroubleCell::new("storage", "storage: that is over"),
            last_error: Mutex::default(),
            limits: OnceLock::new(),
        });
        if let Some(trouble) = &trouble {
            shared.note_error(trouble.clone());
        }
        let control = FollowerControl::new(profile_of(kind));
        control.begin_with(trouble);
        let follower = StorageFollower::new(place, sink, log.clone(), log_end, shared.clone(), nice);
        control.start(follower, log)?;
        Ok(Self { kind, shared, control })
    }

    /// The kind of its sink.
    pub fn kind(&self) -> SinkKind {
        self.kind
    }

    /// Removes from now on what is over these limits. They are asked for again and again.
    pub fn begin_retention(&self, limits: StoredLimitsSource) {
        // The first one asks the registry, which does not change.
        let _ = self.shared.limits.set(limits);
    }

    /// The first offset that is not stored yet.
    pub fn cursor(&self) -> Offset {
        *self.shared.cursor.borrow()
    }

    /// The present error, while storage fails; or what the operator has to be told of a sink that takes records.
    pub fn trouble(&self) -> Option<String> {
        self.control.trouble().or_else(|| self.shared.warning.current())
    }

    /// Whether storage fails.
    fn is_failing(&self) -> bool {
        self.control.trouble().is_some()
    }

    /// What was set aside since the start, and where it is.
    pub fn set_aside(&self) -> Option<String> {
        self.shared.set_aside.lock().clone()
    }

    /// Returns once every record below `offset` is stored; never, if storage ends first.
    pub async fn wait_stored(&self, offset: Offset) {
        // The sender is in `self`, so that waiting does not fail.
        let _ = self.shared.cursor.subscribe().wait_for(|cursor| *cursor >= offset).await;
    }

    /// Returns once the stored records follow this version of the rules about leaked keys; never, if storage
    /// ends first.
    pub async fn wait_reconciled(&self, version: u64) {
        let _ = self.shared.withheld.subscribe().wait_for(|stored| *stored >= version).await;
    }

    /// Stores what the log already has, within the deadline, and ends the thread. The next start stores
    /// the rest.
    pub async fn stop(&self, deadline: Instant) {
        self.control.stop(deadline).await;
    }
}

/// What to tell an operator of a sink that cannot be opened.
fn unopened_words(error: &SinkFault) -> String {
    let remedy = error.remedy();
    format!("{error}. Nothing is stored meanwhile, and the log keeps what is to be stored; {remedy}")
}

impl StorageProgress {
    fn note_error(&self, words: String) {
        *self.last_error.lock() = Some((now_micros(), words));
    }
}

impl Drop for StorageConsumer {
    /// Ends the thread after its present transaction if nobody has stopped it.
    fn drop(&mut self) {
        self.control.stop_by(Instant::now());
    }
}
