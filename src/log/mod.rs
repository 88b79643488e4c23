//! The log: the durable, ordered sequence of records, and the only thing that an acknowledgement
//! stands on. [`Log`] is what the rest of Headgate knows of it; there are two:
//!
//! - [`EmbeddedLog`]: files in the data directory, for one gateway. Intake [appends](Log::append)
//!   sections; one writer thread drains all that is waiting into one batch, writes it, makes it durable
//!   with one `fdatasync`, and releases everybody who waits for it. While it does, the next batch
//!   gathers.
//! - [`JetstreamLog`]: a stream in NATS, for any number of gateways that keep nothing; its own module says
//!   how.
//!
//! Consumers [read](Log::read) batches behind cursors of their own: recent ones from memory, older ones
//! from where the log is. What follows is the embedded log's.
//!
//! # Promises
//!
//! - Offsets are consecutive from 0, and the log's order is the order of acknowledgement.
//! - An append that has resolved `Ok` is durable: on disk with `durability = "fsync"`, in the page
//!   cache with `"os"`. Readers see nothing that is not.
//! - A section with an [`OnceId`] that is known is left out, and answered with what was kept before. An
//!   id is known from the moment when its section is durable: one whose append failed is a new one. It
//!   is known across any end of the process, as it is in the log: see `window.rs` for how long.
//! - Sections whose key has died when their batch is put together are left out, so that after
//!   the key's lease has ended and [`Log::barrier`] has returned, nothing more comes in under it.
//! - `received_at` never goes back by a second or less from one record to the next. It follows the
//!   clock when that is set back further.
//! - After a failed `fdatasync` nothing more is acknowledged until a restart: what the kernel did
//!   with the dirty pages is then unknown. A disk that is full is no such failure; the log takes
//!   records again as soon as there is room.
//!
//! # On disk, version 2
//!
//! `DIR/log/` holds segments, named by their first offset in 20 digits. All integers are
//! little-endian. A segment is a header and then frames, one per commit:
//!
//! | byte | segment header (32 bytes) |
//! |---|---|
//! | 0 | `headgate` |
//! | 8 | u16, the version of the format: 2 |
//! | 10 | u16, 0 |
//! | 12 | u64, the first offset |
//! | 20 | i64, when the segment was made, µs since the Unix epoch |
//! | 28 | u32, CRC-32 of bytes 0..28 |
//!
//! | byte | frame header (36 bytes) |
//! |---|---|
//! | 0 | `HGf1` |
//! | 4 | u32, bytes of the body |
//! | 8 | u32, CRC-32 of the frame without this field |
//! | 12 | u32, records; 0 in the frame that a clean shutdown writes, and in one of releases alone |
//! | 16 | u64, the first record's offset, or the next one's if there is none |
//! | 24 | i64, the newest `received_at` of this and all earlier frames, µs since the Unix epoch |
//! | 32 | u32, flags: 1, a record is to be retained; 2, a once part is in the body; 4, a record has a note |
//! | 36 | the body |
//!
//! The body is [postcard](https://postcard.jamesmunns.com/wire-format):
//!
//! 1. the number of sections;
//! 2. per section its head: datasource, key id (6 bytes), transport, publisher (u64), `received_at`,
//!    once ids (bytes, 16 an id), records, bytes of records;
//! 3. the records of all sections, each as flags, topic, media type, MQTT 5 properties, payload, and
//!    with flag 8 (in quarantine) or 16 (sent again from there) a note (bytes);
//! 4. with flag 2, the once part: how many message ids were ever kept before the frame (u64), the
//!    window's clock (u64, µs) and the wall clock (i64, µs) when it was written; in a segment's first
//!    frame, and only there, the exchanges that were open
//!    before it (an option of bytes, 32 an exchange: id, u64 first offset, u32 records, u32 seconds
//!    of the window's clock); the ids that the frame releases (bytes, 20 an id: the u32 number of the
//!    frame's sections before the release, and the id). The first frame of a segment has a once part,
//!    and so does the frame that a clean shutdown writes.
//!
//! An id is 16 bytes of a BLAKE3 hash; the highest bit of the first byte is 1 in that of a QoS 2
//! exchange and 0 in that of a message (see [`OnceId`]). A frame with a flag that is not listed here
//! is of a newer version, and the log does not open.
//!
//! **Version 1** has no publisher and no once ids in a section's head, and 0 for the flags. Its
//! segments are read for ever, and nothing is added to them: opening a log whose newest segment is of
//! version 1 begins a new one.
//!
//! A segment's file is preallocated a few megabytes at a time; behind the last frame it holds
//! zeros. When the next frame would not fit, the file is cut to its frames and a new one begins.
//!
//! # After a crash
//!
//! Bytes behind the last whole frame are a write that was never acknowledged: they are cut off. A
//! frame that is not whole and has a whole one behind it is damage. It is reported with its place
//! and the offsets that are lost, and the log does not open, unless `log.accept_corruption` says to
//! go on without them. The newest segments are read through at every start; older frames are
//! checked whenever they are read.
//!
//! What is known under which id is read from the once parts: from the newest segment on that began
//! before the window of message ids (or before the newest `intake.dedup_ids_max` of them). Where damage was
//! accepted, the exchanges from before it are forgotten: a release may be among what is missing, and
//! a message that is kept twice is better than one that is taken for another and lost.

mod assembly;
mod batch;
mod disk;
mod embedded;
mod frame;
mod jetstream;
mod note;
mod offsets;
mod once;
mod record;
mod recovery;
mod retention;
mod section;
mod segment;
mod shelf;
mod tail;
#[cfg(test)]
mod tests;
mod window;
mod withheld;
mod writer;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

pub use batch::{Batch, Place, Reader, Records, SectionRef};
pub use embedded::EmbeddedLog;
pub use jetstream::{
    Given, JetstreamLog, KEEP_EVERY, ShareError, SharedPlace, SharedPlaces, SharedRecords, headers_of,
};
pub use note::{Note, Reason};
pub use offsets::Offsets;
pub use once::OnceId;
pub use retention::Hold;
pub use section::Section;
pub use withheld::{Change, LeftOut, Withheld, WithheldRule};

use crate::message::{Offset, TimeMicros};
use crate::subject::SubjectError;

/// Something that a log is asked for and that takes a while.
pub type Task<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Resolves when it is known what has become of what was appended or released.
pub type Committing = oneshot::Receiver<Result<Committed, AppendError>>;

/// Is told of batches: see [`Log::listen`].
pub type Listener = Box<dyn Fn(&Batch) + Send + Sync>;

/// A log. It is shared as an `Arc<dyn Log>`; none of its methods waits for anything unless it says so.
pub trait Log: Send + Sync {
    /// The records that no reader is to be given.
    fn withheld(&self) -> &Arc<Withheld>;

    /// Whether a record can have this topic, which [`check_topic`](crate::message::check_topic) has
    /// passed: a log whose records are elsewhere too may not be able to name them all.
    ///
    /// # Errors
    /// [`SubjectError`]: the message is not to be let in.
    fn check_topic(&self, _topic: &str) -> Result<(), SubjectError> {
        Ok(())
    }

    /// Whether a record can have a payload and MQTT 5 properties of so many bytes, which are within
    /// Headgate's own limits.
    ///
    /// # Errors
    /// [`RecordTooLarge`]: the message is not to be let in.
    fn check_size(&self, _payload: usize, _properties: usize) -> Result<(), RecordTooLarge> {
        Ok(())
    }

    /// Hands over sections to be kept. The receiver resolves when their records are durable, or are
    /// known not to be kept; until `give_up_at`, what passes by itself (a full disk, a budget that
    /// storage is about to free, a cluster that is away) is waited out.
    fn append(&self, sections: Vec<Section>, give_up_at: Instant) -> Committing;

    /// Ends QoS 2 exchanges: their ids are not known any more when the receiver resolves `Ok`, nor
    /// after any crash. An id that is not known is none the worse for it. No offset is taken.
    fn release(&self, ids: Vec<OnceId>, give_up_at: Instant) -> Committing;

    /// Returns when it is settled what has become of everything that was appended here before: nothing
    /// comes in any more under a lease that ended before the call.
    fn barrier(&self) -> Task<'_, ()>;

    /// Returns when what any gateway of the log has released, with an answer before the call, is
    /// released here too.
    ///
    /// # Errors
    /// [`AppendError`], transient.
    fn sync(&self) -> Task<'_, Result<(), AppendError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// The oldest offset that can be read.
    fn first_offset(&self) -> Offset;

    /// The offset behind everything that can be read: what is below is durable. Where an append has
    /// resolved, it is below.
    fn next_offset(&self) -> Offset;

    /// An offset behind whatever any gateway of the log was told is kept, before the call:
    /// [`Log::next_offset`], if there is one gateway.
    ///
    /// # Errors
    /// [`AppendError::Away`] if that cannot be said now.
    fn end(&self) -> Task<'_, Result<Offset, AppendError>> {
        Box::pin(std::future::ready(Ok(self.next_offset())))
    }

    /// Returns when [`Log::next_offset`] is `offset`, or behind all that any gateway of the log was told is
    /// kept before the call, if that is less.
    ///
    /// # Errors
    /// [`AppendError::Away`] if that cannot be known now, or takes too long.
    fn catch_up(&self, _offset: Offset) -> Task<'_, Result<(), AppendError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Follows [`Log::next_offset`].
    fn subscribe(&self) -> watch::Receiver<Offset>;

    /// The batches from the one that holds `from` on, about `bytes_max` of them, at least one; none at
    /// the end. The first may begin below `from`; where records are missing, above it. A batch may be
    /// without records: it says that there are none below its first offset. Blocks, on a disk or on
    /// another machine, when `from` is not recent.
    ///
    /// # Errors
    /// [`ReadError::Removed`] if retention has removed `from`, [`ReadError::Corrupt`] at a damaged
    /// place (never passed over in silence), [`ReadError::Io`], [`ReadError::Away`].
    fn read(&self, from: Offset, bytes_max: usize) -> Result<Vec<Batch>, ReadError>;

    /// As [`Log::read`], and never blocks: `None` if `from` is not in memory.
    fn read_recent(&self, from: Offset, bytes_max: usize) -> Option<Vec<Batch>>;

    /// Has `listener` told of each batch once it can be read, in order, on the thread that brings it:
    /// it must not wait for anything. The first listener stays; there is one.
    fn listen(&self, listener: Listener);

    /// Returns when there is a record at `offset`, or `timeout` is over. Blocks for as long.
    fn wait_blocking(&self, offset: Offset, timeout: Duration);

    /// An offset before which no record was received at or after `time`, close to the first that was.
    /// Blocks as [`Log::read`] does.
    ///
    /// # Errors
    /// [`ReadError::Io`], [`ReadError::Away`].
    fn offset_at(&self, time: TimeMicros) -> Result<Offset, ReadError>;

    /// For a consumer that has to see every record: retention leaves what it has not consumed. At
    /// first it holds everything, see [`Hold::set`].
    fn hold(&self) -> Hold;

    /// For a consumer that had better see every record, and must not stop those who append: retention
    /// leaves what it has not consumed, whatever its age, until there is no room for what comes in. A log
    /// that does not tell the two apart holds as [`Log::hold`] does.
    fn hold_with_room(&self) -> Hold {
        self.hold()
    }

    /// Lets retention begin: to be called once everybody who needs a [`Log::hold`] has it. Until then
    /// nothing is removed.
    fn begin_retention(&self);

    /// What its records take on disk, in bytes.
    fn bytes(&self) -> u64;

    /// Ids that are not known any more, before their time, because there were too many.
    fn evicted_ids(&self) -> u64 {
        0
    }

    /// Why nothing can be appended, while nothing can.
    fn trouble(&self) -> Option<String>;

    /// Commits what waits, takes no more, and ends.
    fn close(&self) -> Task<'_, ()>;
}

/// A record that is larger than a log takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordTooLarge {
    /// What payload and properties take.
    pub bytes: usize,
    /// What they may take.
    pub bytes_max: usize,
    /// What limits it.
    pub limit: &'static str,
}

/// What has become of an append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Per section.
    pub outcomes: Vec<Outcome>,
}

/// What has become of one section of an append that is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is kept, at these offsets.
    Kept(Offsets),
    /// It is not kept again: a section with one of its ids is, durably, at these offsets.
    Duplicate(Offsets),
    /// It is not kept: its key had died before.
    KeyDead,
}

/// Why nothing of an append was kept. All are transient: the same message may be let in later.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AppendError {
    /// No room on the disk.
    #[error("the disk is full")]
    DiskFull,
    /// The log's budget is used up by records that a consumer which has to see all of them, such as
    /// storage, has not consumed yet.
    #[error(
        "the log has reached its {retention_bytes} bytes (log.retention_bytes) and storage has not caught up"
    )]
    Budget {
        /// The budget, in bytes.
        retention_bytes: u64,
    },
    /// Writing failed in a way that makes further acknowledgements unsafe. Lasts until a restart.
    #[error("the log cannot be written: {0}")]
    Failed(Arc<str>),
    /// The log is elsewhere, and cannot be reached or does not answer.
    #[error("the log is away: {0}")]
    Away(Arc<str>),
    /// It may or may not have been kept: the log is elsewhere, and was lost before it answered.
    #[error("the log is away, and what was on its way may have been kept or not: {0}")]
    Unknown(Arc<str>),
    /// The gateway is shutting down.
    #[error("the gateway is shutting down")]
    Closed,
}

/// Why the log cannot be read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// Retention has removed it.
    #[error("offset {wanted} is no longer in the log, which begins at {first}")]
    Removed {
        /// What was asked for.
        wanted: Offset,
        /// The oldest offset there is.
        first: Offset,
    },
    /// Bytes that are not what was written.
    #[error("the log is damaged: {0}")]
    Corrupt(Arc<str>),
    /// The operating system said no.
    #[error("the log cannot be read: {0}")]
    Io(Arc<str>),
    /// The log is elsewhere, and cannot be reached or does not answer.
    #[error("the log is away: {0}")]
    Away(Arc<str>),
}

/// Why the log could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Something in it is not what was written. The text names the place and the offsets lost.
    #[error("the log is damaged: {0}")]
    Corrupt(String),
    /// A file that could not be read, made or listed.
    #[error("log: {0}")]
    Io(#[from] std::io::Error),
    /// The log is elsewhere, and cannot be reached or does not answer. It passes by itself.
    #[error("the log is away: {0}")]
    Away(String),
    /// The log is elsewhere, and cannot be had as it is configured.
    #[error("log: {0}")]
    Refused(String),
}
