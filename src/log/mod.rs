//! The log: the durable, ordered sequence of records, and the only thing that an acknowledgement
//! stands on.
//!
//! Intake [appends](Log::append) sections; one writer thread drains all that is waiting into one
//! batch, writes it, makes it durable with one `fdatasync`, and releases everybody who waits for
//! it. While it does, the next batch gathers. Consumers [read](Log::read) batches behind cursors of
//! their own: recent ones from memory, older ones from the files.
//!
//! # Promises
//!
//! - Offsets are consecutive from 0, and the log's order is the order of acknowledgement.
//! - An append that has resolved `Ok` is durable: on disk with `durability = "fsync"`, in the page
//!   cache with `"os"`. Readers see nothing that is not.
//! - Sections whose key has died when their batch is put together are left out, so that after
//!   the key's lease has ended and [`Log::barrier`] has returned, nothing more comes in under it.
//! - `received_at` never goes back by a second or less from one record to the next. It follows the
//!   clock when that is set back further.
//! - After a failed `fdatasync` nothing more is acknowledged until a restart: what the kernel did
//!   with the dirty pages is then unknown. A disk that is full is no such failure; the log takes
//!   records again as soon as there is room.
//!
//! # On disk, version 1
//!
//! `DIR/log/` holds segments, named by their first offset in 20 digits. All integers are
//! little-endian. A segment is a header and then frames, one per commit:
//!
//! | byte | segment header (32 bytes) |
//! |---|---|
//! | 0 | `headgate` |
//! | 8 | u16, the version of the format: 1 |
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
//! | 12 | u32, records; 0 in the frame that a clean shutdown writes |
//! | 16 | u64, the first record's offset |
//! | 24 | i64, the newest `received_at` of this and all earlier frames, µs since the Unix epoch |
//! | 32 | u32, 0 |
//! | 36 | the body |
//!
//! The body is postcard: the number of sections; per section its head (datasource, key id, 6
//! bytes, transport, `received_at`, records, bytes of records); then the records of all sections,
//! each as flags, topic, media type, MQTT 5 properties, payload.
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

mod disk;
mod embedded;
mod record;
mod retention;
mod segment;
mod tail;
#[cfg(test)]
mod tests;
mod writer;

use std::sync::Arc;

pub use embedded::Log;
pub use record::{Batch, Records, Section};

use crate::message::Offset;

/// Where the records of an append are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Per section: the offset of its first record, or `None` if its key had died before.
    pub first_offsets: Vec<Option<Offset>>,
}

/// Why nothing of an append was kept. All are transient: the same message may be let in later.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AppendError {
    /// No room on the disk.
    #[error("the disk is full")]
    DiskFull,
    /// The log's budget is used up by records that are not stored yet.
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
}
