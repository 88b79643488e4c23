//! Storage: the consumer that writes every record of the log into `records.db`.
//!
//! One thread reads the log from the sink's cursor, stores what it has read in one transaction, and
//! repeats. Far behind, transactions are as large as is useful. At the tail they are small and paced, so
//! that a record can be read back within milliseconds and a busy stream does not pay for a transaction
//! per record. `consume/follower.rs` runs the thread.

mod follower;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use self::follower::StorageFollower;
use super::follower::{FollowerControl, FollowerProfile};
use super::sink::sqlite::{RECORDS_FILE_NAME, SinkError, SqliteSink};
use crate::config;
use crate::log::{Hold, Log};
use crate::message::Offset;

const STORAGE_PROFILE: FollowerProfile = FollowerProfile {
    name: "storage",
    down: "storage is failing",
    up: "storage has recovered",
    late: "storage did not finish by its deadline; the log has the rest",
    patient: true,
};

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
    /// The sink is ahead of the log: the log has lost records, or is another one.
    #[error("storage: records.db holds everything up to offset {stored}, but the log ends at {log_end}")]
    LogBehind {
        /// The first offset that is not stored.
        stored: Offset,
        /// The first offset that the log does not have.
        log_end: Offset,
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
}

impl StorageConsumer {
    /// Opens `dir/records.db` and starts the thread that follows the log into it.
    ///
    /// # Errors
    /// [`StorageError`], when storing would be wrong or impossible.
    pub fn start(
        dir: &Path,
        config: &config::StorageConfig,
        log: Arc<dyn Log>,
    ) -> Result<Self, StorageError> {
        let path = dir.join(RECORDS_FILE_NAME);
        let sink = SqliteSink::open(&path)?;
        let (stored, log_end) = (sink.cursor(), log.next_offset());
        if stored > log_end {
            return Err(StorageError::LogBehind { stored, log_end });
        }
        let shared = Arc::new(StorageProgress {
            cursor: watch::Sender::new(stored),
            withheld: watch::Sender::new(sink.withheld_version()),
            hold: log.hold(),
        });
        let control = FollowerControl::new(&STORAGE_PROFILE);
        let follower = StorageFollower::new(path, sink, log.clone(), shared.clone(), config.nice);
        control.start(follower, log)?;
        Ok(Self { shared, control })
    }

    /// The first offset that is not stored yet.
    pub fn cursor(&self) -> Offset {
        *self.shared.cursor.borrow()
    }

    /// The present error, while storage fails.
    pub fn trouble(&self) -> Option<String> {
        self.control.trouble()
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

impl Drop for StorageConsumer {
    /// Ends the thread after its present transaction if nobody has stopped it.
    fn drop(&mut self) {
        self.control.stop_by(Instant::now());
    }
}
