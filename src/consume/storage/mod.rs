//! Storage: the consumer that writes every record of the log into `records.db`.
//!
//! One thread reads the log from the sink's cursor, stores what it has read in one transaction, and
//! repeats. Far behind, transactions are as large as is useful. At the tail they are small and paced, so
//! that a record can be read back within milliseconds and a busy stream does not pay for a transaction
//! per record. `consume/follower.rs` runs the thread.
//!
//! A database that is damaged stops neither the start nor the thread: it is set aside, and another one begins
//! where the log begins. One that cannot be opened for another reason is left alone, and tried again and again.

mod ahead;
mod follower;
mod retention;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::error;

use self::follower::StorageFollower;
pub use self::retention::StoredLimitsSource;
use super::follower::{FollowerControl, FollowerProfile};
use super::sink::sqlite::{RECORDS_FILE_NAME, SinkError, SqliteSink};
use crate::config;
use crate::log::{Hold, Log};
use crate::message::Offset;
use crate::sqlite::set_aside;

const STORAGE_PROFILE: FollowerProfile = FollowerProfile {
    name: "storage",
    down: "storage is failing",
    up: "storage has recovered",
    late: "storage did not finish by its deadline; the log has the rest",
    patient: true,
};

/// Why [`begin_anew`] sets a database aside that cannot be read.
const WAS_DAMAGED: &str = "was damaged";

/// The running storage consumer.
pub struct StorageConsumer {
    shared: Arc<StorageProgress>,
    control: Arc<FollowerControl>,
}

/// Why storage could not start.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The database cannot be opened, or this Headgate cannot write it.
    #[error("storage: {0}")]
    Sink(#[from] SinkError),
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

/// What the thread and those who ask about it share.
struct StorageProgress {
    cursor: watch::Sender<Offset>,
    /// The version of the rules about leaked keys that the stored records follow.
    withheld: watch::Sender<u64>,
    /// Keeps records that are not stored in the log, even after the thread has ended.
    hold: Hold,
    /// What was set aside since the start and where, for the operator.
    set_aside: Mutex<Option<String>>,
    /// How much may stay stored, once that is known.
    limits: OnceLock<StoredLimitsSource>,
}

impl StorageConsumer {
    /// Opens `dir/records.db` and starts the thread that follows the log into it. A damaged database is set
    /// aside, and so are records behind the log's end. One that cannot be opened is opened by the thread once that is
    /// possible; until then nothing is stored, and [`StorageConsumer::trouble`] says why.
    ///
    /// # Errors
    /// [`StorageError::LogBehind`], when storing would be wrong; [`StorageError::Io`].
    pub fn start(
        dir: &Path,
        config: &config::StorageConfig,
        log: Arc<dyn Log>,
    ) -> Result<Self, StorageError> {
        let path = dir.join(RECORDS_FILE_NAME);
        let log_end = log.next_offset();
        let (opened, trouble) = match open_right(&path, &*log, log_end, false) {
            Ok(opened) => (Some(opened), None),
            Err(StorageError::Sink(error)) => (None, Some(unopened_words(&error))),
            Err(error) => return Err(error),
        };
        let (sink, said) = opened.unzip();
        let shared = Arc::new(StorageProgress {
            cursor: watch::Sender::new(sink.as_ref().map_or(0, SqliteSink::cursor)),
            withheld: watch::Sender::new(sink.as_ref().map_or(0, SqliteSink::withheld_version)),
            hold: log.hold(),
            set_aside: Mutex::new(said.flatten()),
            limits: OnceLock::new(),
        });
        let control = FollowerControl::new(&STORAGE_PROFILE);
        control.begin_with(trouble);
        let follower = StorageFollower::new(path, sink, log.clone(), log_end, shared.clone(), config);
        control.start(follower, log)?;
        Ok(Self { shared, control })
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

    /// The present error, while storage fails.
    pub fn trouble(&self) -> Option<String> {
        self.control.trouble()
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

/// Does what [`StorageConsumer::start`] does by itself, and what it refuses to do because something
/// acknowledged may be lost; or only tells it, without `apply`. `None` if there is nothing to do.
///
/// # Errors
/// [`StorageError::Sink`].
pub fn repair(dir: &Path, log: &dyn Log, apply: bool) -> Result<Option<String>, StorageError> {
    let path = dir.join(RECORDS_FILE_NAME);
    if !path.exists() {
        return Ok(None);
    }
    let sink = match SqliteSink::open(&path) {
        Err(damage) if damage.is_damage() && apply => {
            return Ok(Some(begin_anew(&path, log, WAS_DAMAGED)?.1));
        }
        Err(damage) if damage.is_damage() => {
            return Ok(Some(format!(
                "{damage}: every start sets it aside and makes another one from the log"
            )));
        }
        Err(error) => return Ok(Some(unopened_words(&error))),
        Ok(sink) => sink,
    };
    let log_end = log.next_offset();
    if sink.cursor() <= log_end {
        return Ok(None);
    }
    Ok(Some(if apply {
        ahead::put_right(&path, sink, log, log_end, true)?.1
    } else {
        ahead::tell(&sink, log)?
    }))
}

/// Opens `records.db`. One that is damaged is set aside, and so is what it has behind `log_end`, the end of the log at
/// the start: then also returns what to tell the operator. `is_ordered` is that of [`ahead::put_right`].
///
/// # Errors
/// [`StorageError::Sink`] if it cannot be opened; [`StorageError::LogBehind`].
fn open_right(
    path: &Path,
    log: &dyn Log,
    log_end: Offset,
    is_ordered: bool,
) -> Result<(SqliteSink, Option<String>), StorageError> {
    let (sink, said) = match SqliteSink::open(path) {
        Err(damage) if damage.is_damage() => {
            error!(%damage, "storage");
            let (sink, said) = begin_anew(path, log, WAS_DAMAGED)?;
            (sink, Some(said))
        }
        opened => (opened?, None),
    };
    if sink.cursor() <= log_end {
        return Ok((sink, said));
    }
    let (sink, said) = ahead::put_right(path, sink, log, log_end, is_ordered)?;
    Ok((sink, Some(said)))
}

/// What to tell an operator of a `records.db` that cannot be opened.
fn unopened_words(error: &SinkError) -> String {
    let remedy = match error {
        SinkError::Database(error) => error.remedy(),
        SinkError::CursorMoved { .. } => "it is tried again",
    };
    format!("{error}. Nothing is stored meanwhile, and the log keeps what is to be stored; {remedy}")
}

/// Sets a `records.db` aside and begins another one where the log begins. Also returns what to tell the
/// operator; `why` completes "records.db".
fn begin_anew(path: &Path, log: &dyn Log, why: &str) -> Result<(SqliteSink, String), SinkError> {
    let aside = set_aside(path)?;
    let mut sink = SqliteSink::open(path)?;
    let first = log.first_offset();
    sink.store(std::iter::empty(), first, true)?;
    let said = format!(
        "{RECORDS_FILE_NAME} {why} and is set aside as {}; storage is made again from the log, from offset \
         {first} on: what is older is in that file alone",
        aside.display()
    );
    error!("storage: {said}");
    Ok((sink, said))
}

impl Drop for StorageConsumer {
    /// Ends the thread after its present transaction if nobody has stopped it.
    fn drop(&mut self) {
        self.control.stop_by(Instant::now());
    }
}
