//! The log: the durable, ordered sequence of records. An acknowledgement depends on it alone. The rest of
//! Headgate uses the [`Log`] trait, which has two implementations:
//!
//! - [`EmbeddedLog`]: files in the data directory, for one gateway. Intake [appends](Log::append)
//!   sections; a commit thread drains all waiting sections into one batch, writes it, makes it durable
//!   with one `fdatasync`, and answers every caller. Meanwhile the next batch gathers, and when it is as large, a
//!   second thread commits it.
//! - [`JetstreamLog`]: a stream in NATS, for any number of gateways without a log of their own; see its
//!   module.
//!
//! Consumers [read](Log::read) batches behind their own cursors: recent batches from memory, older ones
//! from the files or the stream. The rest of this page is about the embedded log.
//!
//! # Promises
//!
//! - Offsets are consecutive from 0, and the log's order is the order of acknowledgement.
//! - An append that has resolved `Ok` is durable: on disk with `durability = "fsync"`, in the page
//!   cache with `"os"`. Readers see only durable records.
//! - The log skips a section with a known [`OnceId`] and answers with the offsets kept before, if it is the same
//!   messages again: otherwise it refuses it. An id becomes known when its section is durable: after a failed append
//!   it is still new, and what comes under it meanwhile waits for the outcome. Only a loss of
//!   power, or a restart after [`AppendError::Failed`], may find that a failed append was kept whole. Ids are
//!   in the log and so survive any end of the process: see `window/mod.rs` for how long.
//! - The log skips sections whose key has died when their batch is put together. Once the key's lease
//!   has ended and [`Log::barrier`] has returned, no more records enter under it.
//! - `received_at` never goes back by a second or less from one record to the next. It follows the
//!   clock when that is set back further.
//! - After a failed `fdatasync` nothing more is acknowledged until a restart, because the state of the
//!   kernel's dirty pages is unknown. A want of disk, memory or descriptors is no such failure: the log
//!   writes and syncs the same frames again, and takes records again as soon as that succeeds.
//! - A segment that retention removes becomes the next one (`spare.rs`), unless somebody still reads it.
//!
//! What is on disk, byte by byte, is told in [`headgate_format::log`].
//!
//! # After a crash
//!
//! Bytes behind the last whole frame are a write that was never acknowledged: they are cut off. Of two commits under
//! way the later one may be whole and the earlier one torn; it does not vouch for it, and both are cut off. A
//! broken frame with one behind it that vouches for it is damage. The log reports its place and the lost
//! offsets and does not open, unless `log.accept_corruption` tells it to
//! go on without them. Every start reads the newest segments in full; older frames are
//! checked whenever they are read. What it keeps of the last commit it writes and syncs once more, because
//! after a failed sync the kernel may have it in memory alone.
//!
//! The window of known ids is rebuilt from the once parts, starting at the newest segment that began
//! before the window of message ids (or before many times the newest `intake.dedup_ids_max` of them). Accepted
//! damage clears the exchanges from before it, because a release may be missing: keeping a message
//! twice is better than taking it for another and losing it.

mod age;
mod assembly;
mod commit_thread;
mod cut;
mod disk;
mod embedded;
mod incarnations;
mod jetstream;
pub mod nats_message;
#[cfg(test)]
pub(crate) mod power_loss_disk;
mod priority;
mod queue;
mod recovery;
mod retention;
mod segment;
mod shelf;
mod solo_commit;
mod spare;
mod tail;
#[cfg(test)]
mod tests;
mod unsettled;
mod upkeep;
mod window;
mod withheld;
mod writer;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use headgate_format::log::{batch, frame, once, section, segment as segment_format};
use tokio::sync::oneshot;

pub use cut::{CutSegment, LogCut};
pub(crate) use disk::{disk_room, free_bytes};
pub use embedded::EmbeddedLog;
pub use headgate_format::log::batch::{Batch, RecordPlace};
pub use headgate_format::log::note::{QuarantineReason, RecordNote};
pub use headgate_format::log::offsets::Offsets;
pub use headgate_format::log::once::OnceId;
pub use headgate_format::log::record::RecordBody;
pub use headgate_format::log::section::Section;
pub use incarnations::{IncarnationHistory, IncarnationStep};
pub use jetstream::{
    DeliveredRecord, HistoryGate, HistorySetBack, JetstreamLog, LogHistory, SHARED_KEEP_INTERVAL, ShareError,
    SharedPlace, SharedPlaces, SharedRecords, managed_streams, open_log_stream, timed_report,
};
pub use retention::Hold;
pub use withheld::{WithheldChange, WithheldRule, WithheldRules, WithheldSnapshot};

use crate::message::{KeyId, Offset, TimeMicros, Transport};
use crate::subject::SubjectError;
use crate::trouble::TroubleCell;

/// A message that came behind the end of its key.
#[derive(Debug, Clone, Copy)]
pub struct FencedMessage<'a> {
    /// The datasource that it was for.
    pub datasource: &'a str,
    /// The key that it came in under.
    pub key_id: KeyId,
    /// The way that it came.
    pub transport: Transport,
    /// When it was received.
    pub received_at: TimeMicros,
}

/// Is told of messages behind the ends of their keys.
pub type FencedListener = Box<dyn Fn(FencedMessage<'_>) + Send + Sync>;

/// The future of a log operation that has to wait.
pub type LogFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Resolves with the outcome of an append or a release.
pub type PendingCommit = oneshot::Receiver<Result<CommitOutcome, AppendError>>;

/// Receives each new batch: see [`Log::listen`].
pub type BatchListener = Box<dyn Fn(&Batch) + Send + Sync>;

/// A log, shared as an `Arc<dyn Log>`. A method waits only where its documentation says so.
pub trait Log: Send + Sync {
    /// The records that no reader may see.
    fn withheld(&self) -> &Arc<WithheldRules>;

    /// Checks whether this log can store a topic that [`check_topic`](crate::message::check_topic) has
    /// passed: not every topic can be a NATS subject.
    ///
    /// # Errors
    /// [`SubjectError`]: intake must refuse the message.
    fn check_topic(&self, _topic: &str) -> Result<(), SubjectError> {
        Ok(())
    }

    /// Checks whether this log can store a payload and MQTT 5 properties of these sizes in bytes, which
    /// are within Headgate's own limits.
    ///
    /// # Errors
    /// [`RecordTooLarge`]: intake must refuse the message.
    fn check_size(&self, _payload: usize, _properties: usize) -> Result<(), RecordTooLarge> {
        Ok(())
    }

    /// Appends sections. The receiver resolves when their records are durable, or are known not to
    /// be kept. Until `give_up_at` the log waits out transient failures (a full disk, a budget that
    /// storage is about to free, a cluster that is away).
    fn append(&self, sections: Vec<Section>, give_up_at: Instant) -> PendingCommit;

    /// Ends QoS 2 exchanges: once the receiver resolves `Ok` their ids are unknown, also after any
    /// crash. Unknown ids are ignored. A release takes no offset.
    fn release(&self, ids: Vec<OnceId>, give_up_at: Instant) -> PendingCommit;

    /// Returns when the outcome of every earlier append on this gateway is settled: no more records
    /// enter under a lease that ended before the call.
    fn barrier(&self) -> LogFuture<'_, ()>;

    /// Returns when this gateway knows every release that any gateway had answered before the call.
    ///
    /// # Errors
    /// [`AppendError`], transient.
    fn sync(&self) -> LogFuture<'_, Result<(), AppendError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// The oldest offset that can be read.
    fn first_offset(&self) -> Offset;

    /// The offset behind all readable records: everything below it is durable, and every resolved
    /// append is below it.
    fn next_offset(&self) -> Offset;

    /// An offset behind every append that any gateway saw resolved before the call. With one gateway
    /// that is [`Log::next_offset`].
    ///
    /// # Errors
    /// [`AppendError::Away`] if the log cannot be asked now.
    fn end(&self) -> LogFuture<'_, Result<Offset, AppendError>> {
        Box::pin(std::future::ready(Ok(self.next_offset())))
    }

    /// Returns when [`Log::next_offset`] has reached `offset` or [`Log::end`], whichever is lower.
    ///
    /// # Errors
    /// [`AppendError::Away`] if the log cannot be asked now, or takes too long.
    fn catch_up(&self, _offset: Offset) -> LogFuture<'_, Result<(), AppendError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Reads batches, starting with the one that holds `from`: about `bytes_max` bytes, at least one
    /// batch, none at the end. The first may begin below `from`, or above it where records are missing.
    /// A batch without records says that there are none below its first offset. Blocks on the disk or
    /// the network when `from` is not recent.
    ///
    /// # Errors
    /// [`LogReadError::Removed`] if retention has removed `from`, [`LogReadError::Corrupt`] at a damaged
    /// place (never skipped silently), [`LogReadError::Io`], [`LogReadError::Away`].
    fn read(&self, from: Offset, bytes_max: usize) -> Result<Vec<Batch>, LogReadError>;

    /// Like [`Log::read`], but never blocks: `None` if `from` is not in memory.
    fn read_recent(&self, from: Offset, bytes_max: usize) -> Option<Vec<Batch>>;

    /// Calls `listener` with each batch, in order, once it can be read. The call runs on the log's own
    /// thread or task, so it must not wait. Only the first listener counts.
    fn listen(&self, listener: BatchListener);

    /// Blocks until there is a record at `offset`, or `timeout` is over.
    fn wait_blocking(&self, offset: Offset, timeout: Duration);

    /// An offset close to the first record received at or after `time`; no such record is before it.
    /// Blocks as [`Log::read`] does.
    ///
    /// # Errors
    /// [`LogReadError::Io`], [`LogReadError::Away`].
    fn offset_at(&self, time: TimeMicros) -> Result<Offset, LogReadError>;

    /// A hold for a consumer that must see every record: retention keeps what it has not consumed. At
    /// first it holds everything, see [`Hold::set`].
    fn hold(&self) -> Hold;

    /// A hold for a consumer that should see every record but must not block appends: retention keeps
    /// what it has not consumed, whatever its age, until new records need the room. A log without this
    /// distinction holds as [`Log::hold`] does.
    fn hold_with_room(&self) -> Hold {
        self.hold()
    }

    /// Lets retention begin. Call it once every consumer that needs a [`Log::hold`] has one; until then
    /// nothing is removed.
    fn begin_retention(&self);

    /// The size of its records on disk, in bytes.
    fn bytes(&self) -> u64;

    /// What of its files has everything that is durable now. `None` for a log that has none.
    fn cut(&self) -> Option<LogCut> {
        None
    }

    /// How long ids tell a repetition that another gateway appends. `None`: no other one appends to this log.
    fn shared_id_window(&self) -> Option<Duration> {
        None
    }

    /// How many ids were evicted before their time because there were too many.
    fn evicted_ids(&self) -> u64 {
        0
    }

    /// Puts into the log where these dead keys end: nothing of theirs behind that is a record, whoever still has it in
    /// his queues. Resolves when that is durable; it is tried until then also if nobody waits. A log with one writer has
    /// nothing to do.
    fn fence(&self, _keys: Vec<KeyId>) -> LogFuture<'_, ()> {
        Box::pin(async {})
    }

    /// How many messages came behind the end of their key, and are no records.
    fn fenced_records(&self) -> u64 {
        0
    }

    /// Has `listener` called for each of them from now on. Only the first call counts.
    fn listen_fenced(&self, _listener: FencedListener) {}

    /// How many records are lost to damage of the log's files, as far as this process has seen; they were
    /// skipped because `log.accept_corruption` allows it. 0 where others keep the files.
    fn lost_records(&self) -> u64 {
        0
    }

    /// Whether this may be another log than this gateway has followed, or an earlier state of it. Nothing may be taken
    /// into it meanwhile. Some atomic loads.
    fn is_in_doubt(&self) -> bool {
        false
    }

    /// Why it is another one, once that is known.
    fn doubt(&self) -> Option<String> {
        None
    }

    /// The epochs of a log that several gateways have; `None` for one with files of its own.
    fn history(&self) -> Option<&LogHistory> {
        None
    }

    /// Why nothing can be appended now; `None` if appends work.
    fn trouble(&self) -> Option<String>;

    /// What an operator should look at although appends work.
    fn warning(&self) -> Option<String> {
        None
    }

    /// Returns when the threads of the log's own have answered, or wait for a disk that has not: `false` if a restart alone
    /// can make it take records again. Does not return while one of them hangs in another way.
    fn pulse(&self) -> LogFuture<'_, bool> {
        Box::pin(std::future::ready(true))
    }

    /// Stops taking appends, commits the waiting ones, and ends.
    fn close(&self) -> LogFuture<'_, ()>;
}

/// The trouble of a log that takes no records.
fn log_trouble() -> TroubleCell {
    TroubleCell::new("the log takes no records; clients are held back", "the log takes records again")
}

/// A record that is larger than a log takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordTooLarge {
    /// The size of payload and properties.
    pub bytes: usize,
    /// The largest size that the log takes.
    pub bytes_max: usize,
    /// The setting that limits it.
    pub limit: &'static str,
}

/// The outcome of an append that is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitOutcome {
    /// Per section.
    pub outcomes: Vec<SectionOutcome>,
}

/// The outcome of one section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SectionOutcome {
    /// The section is in the log, at these offsets.
    Kept(Offsets),
    /// Not kept again: a section with one of its ids is already durable, at these offsets.
    Duplicate(Offsets),
    /// Not kept: it asked for its ids ([`Section::ask_for`]), and the same messages are durable under one of them, at
    /// these offsets.
    Known(Offsets),
    /// Not kept: its key had died before.
    KeyDead,
    /// Not kept: one of its ids belongs to other messages.
    Conflict {
        /// The offsets of those.
        earlier: Offsets,
        /// Whether it is the id of a QoS 2 exchange.
        in_exchange: bool,
    },
    /// Not kept: its datasource may open no further QoS 2 exchange now.
    ExchangesFull,
    /// Not kept: its datasource may bring no new id now. Where ids cannot be pushed out.
    IdsFull,
    /// Not kept: it only asked for its ids ([`Section::only_ask`]), and none is known.
    Unknown,
}

/// Why an append failed. All but [`AppendError::TooLarge`] are transient: the same message may be accepted
/// later.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AppendError {
    /// No room on the disk.
    #[error("the disk is full")]
    DiskFull,
    /// The log's budget is full of records that a holding consumer, such as storage, has not
    /// consumed yet.
    #[error(
        "the log has reached its {retention_bytes} bytes (log.retention_bytes) and storage has not caught up"
    )]
    Budget {
        /// The budget, in bytes.
        retention_bytes: u64,
    },
    /// The operating system lacks something that the log needs, such as a file descriptor or memory.
    #[error("the log waits for the operating system: {0}")]
    Starved(Arc<str>),
    /// What cannot be split is larger than a frame of the log. No setting that is allowed leads here.
    #[error("the log takes no {bytes} bytes that belong together, {bytes_max} at most")]
    TooLarge {
        /// The size of the section or record.
        bytes: usize,
        /// The largest that the log takes.
        bytes_max: usize,
    },
    /// Writing failed in a way that makes further acknowledgements unsafe. Lasts until a restart.
    #[error("the log cannot be written: {0}")]
    Failed(Arc<str>),
    /// NATS cannot be reached or does not answer.
    #[error("the log is away: {0}")]
    Away(Arc<str>),
    /// The records may or may not have been kept: the connection to NATS was lost before the answer.
    #[error("the log is away, and what was on its way may have been kept or not: {0}")]
    Unknown(Arc<str>),
    /// The log may be another one than this gateway has followed.
    #[error("the log may be another one than this gateway has followed: {0}")]
    OtherHistory(Arc<str>),
    /// The gateway is shutting down.
    #[error("the gateway is shutting down")]
    Closed,
}

/// Why the log cannot be read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LogReadError {
    /// Retention has removed the offset.
    #[error("offset {wanted} is no longer in the log, which begins at {first}")]
    Removed {
        /// The requested offset.
        wanted: Offset,
        /// The oldest offset there is.
        first: Offset,
    },
    /// Bytes that are not what was written.
    #[error("the log is damaged: {0}")]
    Corrupt(Arc<str>),
    /// The operating system reported an error.
    #[error("the log cannot be read: {0}")]
    Io(Arc<str>),
    /// NATS cannot be reached or does not answer.
    #[error("the log is away: {0}")]
    Away(Arc<str>),
}

/// Why the log could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum LogOpenError {
    /// Some bytes are not what was written. The text names the place and the lost offsets.
    #[error("the log is damaged: {0}")]
    Corrupt(String),
    /// A file could not be read, made or listed.
    #[error("log: {0}")]
    Io(#[from] std::io::Error),
    /// NATS cannot be reached or does not answer. Transient.
    #[error("the log is away: {0}")]
    Away(String),
    /// JetStream refuses the stream as it is configured.
    #[error("log: {0}")]
    Refused(String),
}
