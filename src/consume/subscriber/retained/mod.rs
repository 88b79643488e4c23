//! Retained messages (MQTT 5 section 3.3.1.3): the newest message of every topic that was published
//! with the retain flag, kept in `DIR/retained.db` for those who subscribe later. An empty payload
//! with the flag takes the topic's message away.
//!
//! They are in the log like every other record, and this is a consumer of it: a thread follows the
//! log (`follow.rs`) and keeps its cursor in the transaction that brings the messages (`table.rs`), so
//! that after a kill at any moment each topic has the message that it would have had without.
//! Subscribers ask for what matches their filter, a page at a time (`page.rs`).

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use self::follow::{Follower, Shared};
use self::page::{Readers, Wanted};
use self::table::{FILE_NAME, Table};
use super::DatabaseError;
use crate::filter::TopicFilter;
use crate::limits::QUERIES_MAX;
use crate::log::Log;
use crate::message::{DatasourceId, KeyId, Offset, RecordFlags, RecordRef, TimeMicros, Transport};

mod follow;
mod page;
mod table;
#[cfg(test)]
mod tests;

/// How long a page waits for what is before it in the log.
const BEHIND_WAIT_MAX: Duration = Duration::from_secs(10);

/// A retained message: what the record of it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetainedMessage {
    /// Its place in the log.
    pub offset: Offset,
    /// Whose it is.
    pub datasource: String,
    /// As the device wrote it, relative to its datasource.
    pub topic: String,
    /// The bytes the device sent; not empty.
    pub payload: Vec<u8>,
    /// The media type the client gave, or empty.
    pub content_type: String,
    /// The other MQTT 5 properties, in their wire form without the length in front; or empty. Among
    /// them may be an expiry, which is the reader's to heed.
    pub properties: Vec<u8>,
    /// The key that let it in.
    pub key_id: KeyId,
    /// Which way it came.
    pub transport: Transport,
    /// Which client published it: a hash of it, or 0 if that is not known.
    pub publisher: u64,
    /// When its last byte was read from the socket.
    pub received_at: TimeMicros,
    /// How it was published.
    pub flags: RecordFlags,
}

impl RetainedMessage {
    /// The record that it was.
    pub fn as_record(&self) -> RecordRef<'_> {
        RecordRef {
            offset: self.offset,
            datasource: &self.datasource,
            topic: &self.topic,
            payload: &self.payload,
            content_type: &self.content_type,
            properties: &self.properties,
            key_id: self.key_id,
            transport: self.transport,
            publisher: self.publisher,
            received_at: self.received_at,
            flags: self.flags,
            note: &[],
        }
    }

    /// What it takes in memory, in bytes, about.
    fn weight(&self) -> usize {
        self.datasource.len()
            + self.topic.len()
            + self.payload.len()
            + self.content_type.len()
            + self.properties.len()
    }
}

/// Retained messages that match a filter.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RetainedPage {
    /// In the order of datasource and topic. May be few or none although there is a next page.
    pub messages: Vec<RetainedMessage>,
    /// Where the next page begins, if there may be one.
    pub next: Option<RetainedAfter>,
}

/// A place between two pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetainedAfter {
    datasource: String,
    /// The last topic that was looked at; empty before the first.
    topic: String,
}

/// Why retained messages could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum RetainedError {
    /// The database.
    #[error("retained messages: {0}")]
    Database(#[from] DatabaseError),
    /// The database is further than the log: the log has lost records, or is another one.
    #[error(
        "retained messages: {FILE_NAME} has what is below offset {consumed}, but the log ends at {log_end}"
    )]
    LogBehind {
        /// The first offset that was not consumed.
        consumed: Offset,
        /// The first offset that the log does not have.
        log_end: Offset,
    },
    /// What was asked for was not consumed in time.
    #[error("retained messages: got to offset {consumed} and not to {wanted} yet: {trouble}")]
    Behind {
        /// The first offset that was not consumed.
        consumed: Offset,
        /// What was asked for.
        wanted: Offset,
        /// Why, if that is known.
        trouble: String,
    },
    /// The gateway is shutting down.
    #[error("retained messages: the gateway is shutting down")]
    Closed,
}

/// The running consumer, and the way to ask it. Cheap to clone; the thread ends after the last clone
/// is gone, or with [`Retained::stop`].
#[derive(Clone)]
pub struct Retained {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
    readers: Readers,
    /// Pages at once; one more waits.
    permits: Arc<Semaphore>,
}

impl Retained {
    /// Opens `dir/retained.db`, or makes it, and starts the thread that follows the log into it.
    /// Whenever more is durable there, `consumed` is told the offset below which everything is: the
    /// log need not keep that on this consumer's account. What `consumed` owns lives as long as this.
    ///
    /// # Errors
    /// [`RetainedError::Database`] and [`RetainedError::LogBehind`].
    pub fn start(
        dir: &Path,
        log: Arc<dyn Log>,
        consumed: impl Fn(Offset) + Send + 'static,
    ) -> Result<Self, RetainedError> {
        let path = dir.join(FILE_NAME);
        let table = Table::open(&path)?;
        let (cursor, log_end) = (table.cursor(), log.next_offset());
        if cursor > log_end {
            return Err(RetainedError::LogBehind { consumed: cursor, log_end });
        }
        let shared = Arc::new(Shared::new(&table, Box::new(consumed)));
        let follower = Follower::new(path.clone(), table, log.clone(), shared.clone());
        shared.control().start(follower, log).map_err(|error| DatabaseError::Failed {
            path: path.clone(),
            detail: format!("no thread for it: {error}").into(),
        })?;
        let permits = Arc::new(Semaphore::new(QUERIES_MAX));
        Ok(Self { handle: Arc::new(Handle { shared, readers: Readers::new(path), permits }) })
    }

    /// The retained messages that match, in the order of datasource and topic, those with an offset
    /// below `below` only: of a topic whose newest message is at `below` or behind, none, because
    /// who reads the log from there is given that one. Waits first until everything below `below`
    /// has been consumed.
    ///
    /// With a `datasource`, `filter` is over its topics. Without one (or with `*`), over all, and
    /// the datasource is the first level. A page ends after about `bytes_max`, or when very many
    /// topics were looked at for it; `after` is the `next` of the page before.
    ///
    /// # Errors
    /// [`RetainedError::Behind`] if the wait takes more than ten seconds, [`RetainedError::Database`],
    /// [`RetainedError::Closed`].
    pub async fn page(
        &self,
        datasource: Option<&DatasourceId>,
        filter: &TopicFilter,
        below: Offset,
        after: Option<RetainedAfter>,
        bytes_max: usize,
    ) -> Result<RetainedPage, RetainedError> {
        if tokio::time::timeout(BEHIND_WAIT_MAX, self.caught_up(below)).await.is_err() {
            let trouble = self.trouble().unwrap_or_else(|| "there is much to read".to_owned());
            return Err(RetainedError::Behind {
                consumed: self.handle.shared.cursor(),
                wanted: below,
                trouble,
            });
        }
        let wanted = match Wanted::new(datasource, filter) {
            Some(wanted) if !self.is_empty() => wanted,
            _ => return Ok(RetainedPage::default()),
        };
        let permit = self.handle.permits.clone().acquire_owned().await;
        let handle = self.handle.clone();
        let page = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            handle.readers.page(&wanted, below, after, bytes_max)
        });
        Ok(page.await.map_err(|_| RetainedError::Closed)??)
    }

    /// Returns once everything below `offset` has been consumed. Never, if the thread ends before.
    pub async fn caught_up(&self, offset: Offset) {
        self.handle.shared.caught_up(offset).await;
    }

    /// Returns once nothing is handed out that the rules about leaked keys, as of this version, withhold.
    /// Never, if the thread ends before.
    pub async fn reconciled(&self, version: u64) {
        self.handle.shared.reconciled(version).await;
    }

    /// Whether nothing is retained, as of what has been consumed: after [`Retained::caught_up`] it is
    /// exact for everything below. Costs next to nothing.
    pub fn is_empty(&self) -> bool {
        self.handle.shared.is_empty()
    }

    /// Why retained messages are not up to date, while they are not.
    pub fn trouble(&self) -> Option<String> {
        self.handle.shared.control().trouble()
    }

    /// Consumes what is in the log already, within the deadline, and ends the thread. What was not
    /// consumed by then is consumed after the next start.
    pub async fn stop(&self, deadline: Instant) {
        self.handle.shared.control().stop(deadline).await;
    }
}

impl Drop for Handle {
    /// The thread of a consumer that nobody stopped ends after its present transaction.
    fn drop(&mut self) {
        self.shared.control().stop_by(Instant::now());
    }
}
