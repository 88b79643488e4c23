//! Requests over HTTP and their answers, streams among them.

use std::time::Duration;

/// Presented keys that are remembered for an HTTP connection: one for each concurrent request.
pub const HTTP_KEYS_PER_CONNECTION_MAX: usize = 128;
/// Default: one HTTP request's body, after decompression.
pub const HTTP_BODY_BYTES_MAX: usize = 16 << 20;
/// Messages in one HTTP request.
pub const HTTP_MESSAGES_MAX: usize = 100_000;
/// A request that manages datasources and keys.
pub const HTTP_MANAGE_BYTES_MAX: usize = 64 << 10;
/// A datasource with its keys that is imported in one request: about 60,000 keys.
pub const HTTP_IMPORT_BYTES_MAX: usize = 16 << 20;
/// A request's line and header, and what one read of an HTTP/1 socket takes.
pub const HTTP_HEADER_BYTES_MAX: usize = 64 << 10;
/// Bytes of a body that have to arrive in a second, on average over [`HTTP_BODY_PACE_WINDOW`].
pub const HTTP_BODY_BYTES_PER_S_MIN: u64 = 256;
/// How long a body may be slower than that.
pub const HTTP_BODY_PACE_WINDOW: Duration = Duration::from_secs(10);
/// What a request under way is charged for, without its body and its answer.
pub const HTTP_REQUEST_BYTES: usize = 8 << 10;
/// Answers larger than this are sent in pieces, and dropped if their client does not take them.
pub const HTTP_ANSWER_PIECE_BYTES: usize = 64 << 10;
/// What a stream over HTTP hands over at a time, about, in bytes.
pub const STREAM_CHUNK_BYTES: usize = 32 << 10;
/// What it hands over until others have their turn, in bytes.
pub const STREAM_BYTES_PER_TURN: usize = 128 << 10;
/// The shortest time between two heartbeats of a stream.
pub const STREAM_HEARTBEAT_MIN: Duration = Duration::from_millis(100);
/// How long the last event of a stream may take that was told to end.
pub const STREAM_END_WAIT_MAX: Duration = Duration::from_secs(1);
/// How long a stream's client takes nothing until it counts as one that stands still.
pub const STREAM_STILL: Duration = Duration::from_secs(10);
/// The largest body that is parsed on the task that read it; larger ones go to a blocking thread.
pub const HTTP_INLINE_BYTES_MAX: usize = 64 << 10;
/// Bytes read and discarded of a request that was answered before its end.
pub const HTTP_LINGER_BYTES_MAX: usize = 512 << 10;
/// Connections at once to the administration's own listener.
pub const HTTP_ADMIN_CONNECTIONS_MAX: usize = 64;
/// Requests at once on one HTTP/2 connection.
pub const HTTP2_STREAMS_MAX: u32 = 128;
/// The window of a zstd body, as its base-2 logarithm: 8 MiB, what RFC 9659 lets a server ask for.
pub const ZSTD_WINDOW_LOG_MAX: u32 = 23;
/// Large HTTP bodies that are parsed at once for each processor.
pub const PARSES_PER_PROCESSOR_MAX: usize = 2;
