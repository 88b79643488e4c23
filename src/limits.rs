//! Every fixed bound in one place, the unit last in its name. What an operator may want to change
//! is in [`crate::config`], with its default taken from here.

/// A datasource's id, in bytes (all ASCII).
pub const DATASOURCE_ID_BYTES_MAX: usize = 63;
/// A datasource's name or a key's label, in bytes.
pub const NAME_BYTES_MAX: usize = 200;
/// A topic that is published to.
pub const TOPIC_BYTES_MAX: usize = 1024;
/// Levels of a topic, `a/b/c` has three.
pub const TOPIC_LEVELS_MAX: usize = 64;
/// A media type given with a message.
pub const CONTENT_TYPE_BYTES_MAX: usize = 255;
/// An MQTT client identifier.
pub const CLIENT_ID_BYTES_MAX: usize = 256;
/// A presented key before anything looks at it; a real one has 53 characters.
pub const PRESENTED_KEY_BYTES_MAX: usize = 256;

/// Default: one message's payload.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Default: one MQTT packet.
pub const MQTT_PACKET_BYTES_MAX: usize = PAYLOAD_BYTES_MAX + (64 << 10);
/// An MQTT packet of a client that has not presented a key yet: room for a CONNECT with its
/// longest user name and password, and for nothing that a stranger could fill memory with.
pub const MQTT_CONNECT_BYTES_MAX: usize = 192 << 10;
/// What one read of an MQTT socket takes at most.
pub const MQTT_READ_BYTES: usize = 64 << 10;
/// Reads of one MQTT connection whose messages are on their way into the log at once.
pub const MQTT_READS_IN_FLIGHT_MAX: usize = 16;
/// What waits to be written to an MQTT client before nothing more is read from it.
pub const MQTT_UNSENT_BYTES_MAX: usize = 256 << 10;
/// Default: QoS 1 messages that an MQTT 5 client may have unacknowledged.
pub const MQTT_RECEIVE_MAXIMUM: u16 = 1024;
/// Topic aliases that an MQTT 5 client may set.
pub const MQTT_TOPIC_ALIAS_MAXIMUM: u16 = 32;

/// Connections that the kernel keeps waiting for a front to accept them.
pub const LISTEN_BACKLOG: u32 = 4096;
/// Default: one HTTP request's body, after decompression.
pub const HTTP_BODY_BYTES_MAX: usize = 16 << 20;
/// Messages in one HTTP request.
pub const HTTP_MESSAGES_MAX: usize = 100_000;
/// A request that manages datasources and keys.
pub const HTTP_MANAGE_BYTES_MAX: usize = 64 << 10;
/// A request's line and header, and what one read of an HTTP/1 socket takes.
pub const HTTP_HEADER_BYTES_MAX: usize = 64 << 10;
/// Bodies of all requests together that are held in memory; one more is told to come again.
pub const HTTP_BODIES_BYTES_MAX: usize = 128 << 20;
/// A body that is taken apart where it was read; a larger one goes to a thread that may take long.
pub const HTTP_INLINE_BYTES_MAX: usize = 64 << 10;
/// What is read and thrown away of a request that was answered before its end.
pub const HTTP_LINGER_BYTES_MAX: usize = 512 << 10;
/// Requests at once on one HTTP/2 connection.
pub const HTTP2_STREAMS_MAX: u32 = 128;
/// The window of a zstd body, as its base-2 logarithm: 8 MiB, what RFC 9659 lets a server ask for.
pub const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// Default: bytes of messages that are on their way into the log.
pub const IN_FLIGHT_BYTES_MAX: usize = 64 << 20;
/// How many origins (datasource and key) of a read's messages are kept apart before one repeats.
pub const SECTION_SEARCH_MAX: usize = 8;
/// How long a call that ends a key waits for the last of its connections to close.
pub const REVOCATION_WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(5);
/// What one commit of the log takes at most; more waits for the next.
pub const BATCH_BYTES_MAX: usize = 4 << 20;
/// Default: a segment file of the log.
pub const SEGMENT_BYTES: u64 = 64 << 20;
/// How much of a segment's file is allocated ahead of writing.
pub const SEGMENT_ALLOCATE_BYTES: u64 = 8 << 20;
/// How much of the newest part of the log every start reads through.
pub const VERIFY_AT_START_BYTES: u64 = 512 << 20;
/// A clock that goes back by no more than this is held still until it catches up.
pub const CLOCK_SKEW_MICROS_MAX: i64 = 1_000_000;
/// Recent batches kept in memory for consumers that keep up.
pub const TAIL_BYTES_MAX: usize = 16 << 20;
/// Records that one page of a query returns at most.
pub const QUERY_RECORDS_MAX: usize = 10_000;
/// Records in a page of a query that does not say how many.
pub const QUERY_RECORDS_DEFAULT: usize = 100;
/// Queries at once; one more waits.
pub const QUERIES_MAX: usize = 4;
/// Payload bytes after which a page of a query ends, full or not.
pub const QUERY_BYTES_MAX: usize = 16 << 20;
/// Records that a query looks at for one page; a filter that few of them pass gives short pages.
pub const QUERY_SCANNED_MAX: usize = 100_000;
/// Topics on one page of `latest`.
pub const LATEST_TOPICS_MAX: usize = 10_000;
/// JSON keys per topic that `latest` remembers.
pub const LATEST_KEYS_PER_TOPIC_MAX: usize = 256;
/// A JSON key that `latest` remembers.
pub const LATEST_KEY_BYTES_MAX: usize = 256;
/// A value that `latest` copies; of a longer one it only says where it is.
pub const LATEST_VALUE_BYTES_MAX: usize = 64 << 10;

// One message, whatever it carries with it, fits in one commit, and one commit in one segment.
const _: () = assert!(MQTT_PACKET_BYTES_MAX + TOPIC_BYTES_MAX < BATCH_BYTES_MAX);
const _: () = assert!((BATCH_BYTES_MAX as u64) < SEGMENT_BYTES);
const _: () = assert!(HTTP_BODY_BYTES_MAX < IN_FLIGHT_BYTES_MAX);
const _: () = assert!(HTTP_BODY_BYTES_MAX <= HTTP_BODIES_BYTES_MAX / 2);
const _: () = assert!(QUERY_RECORDS_DEFAULT <= QUERY_RECORDS_MAX);
