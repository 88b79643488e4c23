//! The log, its segments, and backups of it.

/// Bytes of one commit of the log; more waits for the next.
pub const BATCH_BYTES_MAX: usize = 4 << 20;
/// The body of one frame of the log. The writer splits what is larger, and readers trust it.
pub const FRAME_BODY_BYTES_MAX: usize = 256 << 20;
/// What the log takes and cannot split: a record, or a section that is kept once.
pub const FRAME_PART_BYTES_MAX: usize = FRAME_BODY_BYTES_MAX / 2;
/// The largest `http.body_bytes_max`: the messages of one request, with what the log adds to each, fit in
/// one frame, as they have to if the request has an id.
pub const HTTP_BODY_BYTES_LIMIT: usize = FRAME_PART_BYTES_MAX / 2;
/// Default: a segment file of the log.
pub const SEGMENT_BYTES: u64 = 64 << 20;
/// Bytes of a segment file allocated ahead of writing.
pub const SEGMENT_ALLOCATE_BYTES: u64 = 8 << 20;
/// What an idle log writes ahead at a time, in bytes: it delays a commit by less than a millisecond.
pub const WRITE_AHEAD_BYTES: usize = 256 << 10;
/// Room that an idle log leaves on the disk when it writes ahead, in bytes.
pub const WRITE_AHEAD_FREE_BYTES_MIN: u64 = 1 << 30;
/// Room that a backup on the disk of the data directory leaves free there, in bytes.
pub const BACKUP_FREE_BYTES_MIN: u64 = 256 << 20;
/// Bytes that a fast backup writes before it waits for the disk.
pub const BACKUP_SYNC_BYTES: usize = 4 << 20;
/// Bytes that a paced backup writes before it waits for the disk and rests: what the disk has to write at once delays the
/// log's syncs.
pub const BACKUP_PACED_BYTES: usize = 512 << 10;
/// Bytes of a backup's manifest: about 500,000 files.
pub const BACKUP_MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// Bytes of the log's newest part that every start verifies.
pub const VERIFY_AT_START_BYTES: u64 = 512 << 20;
/// If the clock goes back by at most this, records' times stand still until it catches up.
pub const CLOCK_SKEW_MICROS_MAX: i64 = 1_000_000;
/// Recent batches kept in memory for consumers that keep up.
pub const TAIL_BYTES_MAX: usize = 16 << 20;
