//! Reads of what is stored: pages, newest values, series.

use std::time::Duration;

/// Payload bytes of a page that are read from storage at a time.
pub const QUERY_PIECE_BYTES: usize = 512 << 10;
/// Records that are scanned for one piece of a page: a piece is one turn of its tenant.
pub const QUERY_PIECE_SCANNED: usize = 20_000;
/// Records on one page of a query, at most.
pub const QUERY_RECORDS_MAX: usize = 10_000;
/// Records on a page of a query that gives no limit.
pub const QUERY_RECORDS_DEFAULT: usize = 100;
/// Connections to a database that are kept for the next readers.
pub const IDLE_READERS_MAX: usize = 8;
/// Connections to PostgreSQL for those who read, beside the one that writes, ...
pub const POSTGRES_READERS_MAX: usize = 4;
/// ... how many may wait for one of them at once, ...
pub const POSTGRES_READERS_WAITING_MAX: usize = 32;
/// ... and how long.
pub const POSTGRES_READER_WAIT_MAX: Duration = Duration::from_secs(5);
/// How long it may take to open one.
pub const POSTGRES_READER_OPEN_WAIT_MAX: Duration = Duration::from_secs(5);
/// How long PostgreSQL may take for a statement of a reader's; it gives up by itself before that.
pub const POSTGRES_READ_WAIT_MAX: Duration = Duration::from_secs(15);
/// How long readers leave a PostgreSQL alone that was away.
pub const POSTGRES_READER_AWAY_PAUSE: Duration = Duration::from_millis(500);
/// Payload bytes after which a page of a query ends, full or not.
pub const QUERY_BYTES_MAX: usize = 16 << 20;
/// Records that a query scans for one page; a selective filter gives short pages.
pub const QUERY_SCANNED_MAX: usize = 100_000;
/// Topics on one page of `latest`.
pub const LATEST_TOPICS_MAX: usize = 10_000;
/// How many of a topic's records are searched for values that replace quarantined ones.
pub const LATEST_LOOK_BACK_MAX: usize = 100_000;
/// The largest value that `latest` copies; of a longer one it gives only the place.
pub const LATEST_VALUE_BYTES_MAX: usize = 64 << 10;
/// What the newest values of one datasource may take in memory to be shown from there, ...
pub const LATEST_BOARD_BYTES_MAX: usize = 8 << 20;
/// ... and of how many datasources they are: of those that are asked for again and again.
pub const LATEST_BOARD_DATASOURCES_MAX: usize = 8;
/// Steps that a series has, unless it is asked for others.
pub const SERIES_POINTS_DEFAULT: usize = 1_000;
/// The fewest steps that a series can be asked for: with one, no length of a step would always do.
pub const SERIES_POINTS_MIN: usize = 2;
/// The most steps that a series can be asked for.
pub const SERIES_POINTS_MAX: usize = 10_000;
/// The longest step of a series, in milliseconds: 366 days.
pub const SERIES_STEP_MS_MAX: u64 = 366 * 24 * 3_600 * 1_000;
/// Chunks of samples that one series reads: tens of millions of samples and more.
pub const SERIES_CHUNKS_MAX: usize = 200_000;
/// Bytes of chunks that a series reads in one turn.
pub const SERIES_PIECE_BYTES: usize = 4 << 20;
/// Samples of one piece of it from PostgreSQL.
pub const SERIES_PIECE_SAMPLES: i64 = 20_000;
