//! The format of the embedded log, and of the records in both logs: what the log writes and reads back,
//! without any I/O. `src/log` of the gateway decides what is written and when.
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
//! | 16 | u64, the first record's offset, or the next offset if there are no records |
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
//!    frame only, the exchanges that were open
//!    before it (an option of bytes, 32 an exchange: id, u64 first offset, u32 records, u32 seconds
//!    of the window's clock); the ids that the frame releases (bytes, 20 an id: the u32 number of the
//!    frame's sections before the release, and the id). A segment's first frame and the frame of a
//!    clean shutdown always have a once part.
//!
//! An id is 16 bytes of a BLAKE3 hash. The highest bit of the first byte is 1 for a QoS 2
//! exchange and 0 for a message (see [`OnceId`]). A frame with a flag that is not listed here
//! comes from a newer version, and the log does not open.
//!
//! **Version 1** has no publisher and no once ids in a section's head, and 0 for the flags. Its
//! segments stay readable but never grow: a log whose newest segment has version 1 begins a
//! new segment when it opens.
//!
//! A segment's file is preallocated a few megabytes at a time and holds zeros behind the last
//! frame. When the next frame does not fit, the file is cut to its frames and a new one begins.

pub mod batch;
pub mod frame;
pub mod note;
pub mod offsets;
pub mod once;
mod record;
pub mod section;

pub use note::RecordNote;
use offsets::Offsets;
