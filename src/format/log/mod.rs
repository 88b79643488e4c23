//! The format of the embedded log, and of the records in both logs: what the log writes and reads back,
//! without any I/O. `src/log` of the gateway decides what is written and when.
//!
//! # On disk, version 3
//!
//! `DIR/log/` holds segments, named by their first offset in 20 digits and `.log`; other files there are
//! not the log's. All integers are little-endian. A segment is a header of 4096 bytes and then frames, one or
//! more per commit. The header has two copies, at byte 0 and at byte 2048, of which one is enough, and
//! zeros between and behind:
//!
//! | byte | segment header (64 bytes) |
//! |---|---|
//! | 0 | `headgate` |
//! | 8 | u16, the version of the format: 3 |
//! | 10 | u16, 0 |
//! | 12 | u64, the first offset |
//! | 20 | i64, when the segment was made, µs since the Unix epoch |
//! | 28 | the secret of this segment: 32 random bytes |
//! | 60 | u32, CRC-32 of bytes 0..60 |
//!
//! | byte | frame header (64 bytes) |
//! |---|---|
//! | 0 | the mark of the segment's frames, 8 bytes |
//! | 8 | the tag of this header, 8 bytes |
//! | 16 | u32, CRC-32 of the body |
//! | 20 | u32, the number of the write in this segment, from 0 |
//! | 24 | u64, the first record's offset, or the next offset if there are no records |
//! | 32 | i64, the newest `received_at` of this and all earlier frames, µs since the Unix epoch |
//! | 40 | u64, a position in this file: all in front of it had been acknowledged when this was written |
//! | 48 | u32, bytes of the body, at most 256 MiB |
//! | 52 | u32, records; 0 in the frame that a clean shutdown writes, and in one of releases alone |
//! | 56 | u32, flags: 1, a record is to be retained; 2, a once part is in the body; 4, a record has a note; 8, the next frame belongs to the same commit; 16, a record has an event time |
//! | 60 | u32, 0 |
//! | 64 | the body |
//!
//! The secret, as the key material of `blake3::derive_key("headgate 2026-11 log: the frames of a segment")`,
//! gives 40 bytes: first the key of the tags, 32 bytes, then the mark. A tag is the first 8 bytes of
//! BLAKE3, keyed, over the 64 bytes of the header with the frame's position in the file (u64) in the place of
//! the tag.
//!
//! The body is [postcard](https://postcard.jamesmunns.com/wire-format):
//!
//! 1. the number of sections;
//! 2. per section its head: datasource, key id (6 bytes), transport, publisher (u64), `received_at`,
//!    once ids (bytes, 16 an id), labels (bytes: topic and media type, topic and media type, ...), records,
//!    bytes of records;
//! 3. the records of all sections, each as flags, the byte of the labels where its topic and media type
//!    are, MQTT 5 properties, payload, with flag 64 the event time (i64, µs since the Unix epoch), and with flag 8 (in
//!    quarantine) or 16 (sent again from there) a note (bytes);
//! 4. with flag 2, the once part: how many message ids were ever kept before the frame (u64), the
//!    window's clock (u64, µs) and the wall clock (i64, µs) when it was written; in a segment's first
//!    frame only, the exchanges that were open
//!    before it (an option of bytes, 32 an exchange: id, u64 first offset, u32 records, u32 seconds
//!    of the window's clock); the ids that the frame releases (bytes, 20 an id: the u32 number of the
//!    frame's sections before the release, and the id). A segment's first frame and the frame of a
//!    clean shutdown always have a once part.
//!
//! An id is 16 bytes of a BLAKE3 hash. The highest bit of the first byte is 1 for a QoS 2
//! exchange and 0 for a message (see [`OnceId`](once::OnceId)). A frame with a flag that is not listed here
//! comes from a newer version, and the log does not open.
//!
//! A segment's file is preallocated a few megabytes at a time and holds zeros behind the last
//! frame, or what an earlier life of the file left. When the next frame does not fit, the file is cut to its frames and a new one begins. A commit
//! that is larger than a few megabytes is several frames; they lie in one segment, and without the
//! last of them none counts.
//!
//! A segment that retention removes may become a spare one (`.spare` for `.log`), which is written over as a new
//! segment: with a header, a secret and a name of its own, and behind its end what it held before.
//!
//! # Why nobody but the log can make a frame
//!
//! After a crash the log has to find frames among the bytes of a torn write, and those bytes are what
//! senders sent. A sender knows neither mark nor key: they come from a secret that the operating system gave
//! for this life of this file, and that never leaves it. Whoever can read the file could also write it. A copy
//! of a frame of this very file, sent as a payload, is at another position, which is in the tag; a frame
//! from an earlier life of the file has another mark.
//!
//! The secret lies in the segment itself, so that it is there as long as the frames are, a copied or
//! restored segment can be read, and there is no file whose loss would cost all others.
//!
//! The body needs no key. Its checksum is in the header, which the tag covers: a body other than the
//! log's fits no header, but for one chance in 2^32 or a sender who makes a part of his own last message
//! such that it may be missing; that message was never acknowledged. So a commit costs one
//! block of BLAKE3 (60 to 200 ns), whatever its size. Keyed BLAKE3 over everything was measured, on an EPYC with
//! AVX-512: 3 µs for 1 KB, 14 µs for 15 KB, 2.5 ms for 4 MB; CRC-32 takes 0.03 µs, 0.3 µs and 0.07 ms.
//!
//! A header can be trusted by itself. So a reader that meets a damaged body still knows where the next
//! frame is, the search for a frame behind a damaged header looks for eight bytes and hashes one block where it
//! finds them, and whatever bytes there are, it takes time in proportion to their number.
//!
//! # What is cut and what is damage
//!
//! Frames are read from front to back. Where one is not whole, the headers behind it decide: if the position of
//! one of them lies behind the broken frame, that frame had been acknowledged, and is damage; if none does,
//! nobody was ever told of it, and it is cut with all that follows. A frame with a lower write number than the
//! one before it was left behind by a write that failed; the segment ends in front of it.
//!
//! # Older versions
//!
//! Their segments stay readable but never grow: a log whose newest segment has an older version begins a
//! new segment when it opens. Both have a segment header of 32 bytes (`headgate`, the version, u16 0, u64 first
//! offset, i64 time, CRC-32 of bytes 0..28), and this frame header:
//!
//! | byte | frame header (36 bytes) |
//! |---|---|
//! | 0 | `HGf1` |
//! | 4 | u32, bytes of the body |
//! | 8 | u32, CRC-32 of the frame without this field |
//! | 12 | u32, records |
//! | 16 | u64, the first record's offset, or the next offset if there are no records |
//! | 24 | i64, the newest `received_at` of this and all earlier frames, µs since the Unix epoch |
//! | 32 | u32, flags 1, 2 and 4 as above |
//! | 36 | the body |
//!
//! Only a whole frame tells anything; each vouches for all in front of it. **Version 2** has no labels in a
//! section's head, and topic and media type in each record behind the flags. **Version 1** also has no publisher
//! and no once ids in a section's head, and 0 for the flags.

pub mod batch;
mod crc_frame;
pub mod frame;
mod label;
pub mod note;
pub mod offsets;
pub mod once;
pub mod record;
pub mod section;
pub mod segment;

pub use crc_frame::find_crc_frame;
pub use note::RecordNote;
use offsets::Offsets;
