//! Every fixed bound, with the unit last in its name. Bounds that an operator may change are in
//! the gateway's `config`, which takes its defaults from here.

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

/// The latest users of a key that its list shows.
pub const USERS_PER_KEY_MAX: usize = 8;
/// Keys whose usage is written in one transaction; other changes of the registry wait for it.
pub const USAGE_KEYS_PER_CHANGE: usize = 1_000;
/// Ended keys that are written in one transaction; other changes of the registry wait for it. Each can be two rows,
/// the key's and its audit entry, and in a cluster a change is all or nothing up to 1,000 rows.
pub const KEY_ENDS_PER_CHANGE: usize = 500;
/// Room on the disk that is kept for the ends of keys: some fifty revocations on a disk that stays full.
pub const REGISTRY_RESERVE_BYTES: u64 = 1 << 20;
/// The part of it that is given up at a time, so that others cannot take all of it at once.
pub const REGISTRY_RESERVE_STEP_BYTES: u64 = 256 << 10;
/// Keys whose usage is read or written in the cluster's bucket concurrently.
pub const USAGE_READS_MAX: usize = 64;

/// The grace of a rotated key if the request gives none, in seconds.
pub const GRACE_DEFAULT_S: u64 = 24 * 3_600;
/// The longest grace of a rotated key, in seconds.
pub const GRACE_S_MAX: u64 = 366 * 24 * 3_600;
/// Audit entries on one page, at most.
pub const AUDIT_ENTRIES_MAX: usize = 10_000;
/// Audit entries on a page if the request gives no limit.
pub const AUDIT_ENTRIES_DEFAULT: usize = 100;
/// Secrets that the gateway checks in one leak report.
pub const LEAKS_PER_REPORT_MAX: usize = 100;
/// The part of a leak report's URL that the audit stores.
pub const LEAK_URL_BYTES_MAX: usize = 500;
/// Leak reports that may come from one address at once.
pub const LEAK_REPORTS_BURST: u64 = 20;
/// How many a second after that.
pub const LEAK_REPORTS_PER_S: u64 = 1;
/// Presented keys that are remembered for an HTTP connection: one for each concurrent request.
pub const HTTP_KEYS_PER_CONNECTION_MAX: usize = 128;

/// Default: one message's payload.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Default: one MQTT packet.
pub const MQTT_PACKET_BYTES_MAX: usize = PAYLOAD_BYTES_MAX + (64 << 10);
/// An MQTT packet of a client that has not presented a key yet: room for a CONNECT with the longest
/// user name and password, so small that strangers cannot fill memory.
pub const MQTT_CONNECT_BYTES_MAX: usize = 192 << 10;
/// Bytes that one read of an MQTT socket takes at most.
pub const MQTT_READ_BYTES: usize = 64 << 10;
/// Reads of one MQTT connection whose messages are on their way into the log at once.
pub const MQTT_READS_IN_FLIGHT_MAX: usize = 16;
/// Unsent bytes to an MQTT client above which the gateway stops reading from it.
pub const MQTT_UNSENT_BYTES_MAX: usize = 256 << 10;
/// Default: QoS 1 messages that an MQTT 5 client may have unacknowledged.
pub const MQTT_RECEIVE_MAXIMUM: u16 = 1024;
/// Topic aliases that an MQTT 5 client may set.
pub const MQTT_TOPIC_ALIAS_MAXIMUM: u16 = 32;

/// Payload of one WebSocket frame that we send; its length then fits in two bytes.
pub const WEBSOCKET_FRAME_BYTES_MAX: usize = u16::MAX as usize;
/// Topic aliases that the gateway sets for an MQTT 5 client at most.
pub const MQTT_TOPIC_ALIASES_SENT_MAX: u16 = 64;
/// Unacknowledged QoS 1 messages to one subscriber.
pub const MQTT_FLIGHTS_MAX: usize = 4096;
/// Subscriptions of one session.
pub const MQTT_SUBSCRIPTIONS_MAX: usize = 1024;
/// The topic filters of one session in a cluster, in bytes: they fit in one NATS message, which holds 1 MiB
/// by default.
pub const CLUSTER_FILTERS_BYTES_MAX: usize = 512 << 10;
/// Payload bytes of retained messages that a subscriber gets at a time.
pub const RETAINED_PAGE_BYTES: usize = 256 << 10;
/// Bytes of the log read at a time to find where a replay begins.
pub const TAIL_READ_BYTES: usize = 4 << 20;
/// Records that `tail` goes back at most.
pub const TAIL_RECORDS_MAX: u64 = 1_000_000;

/// Connections that the kernel queues until a front accepts them.
pub const LISTEN_BACKLOG: u32 = 4096;
/// Default: one HTTP request's body, after decompression.
pub const HTTP_BODY_BYTES_MAX: usize = 16 << 20;
/// Messages in one HTTP request.
pub const HTTP_MESSAGES_MAX: usize = 100_000;
/// A request that manages datasources and keys.
pub const HTTP_MANAGE_BYTES_MAX: usize = 64 << 10;
/// A request's line and header, and what one read of an HTTP/1 socket takes.
pub const HTTP_HEADER_BYTES_MAX: usize = 64 << 10;
/// Bytes in memory of all requests' bodies together; further requests are told to retry.
pub const HTTP_BODIES_BYTES_MAX: usize = 128 << 20;
/// The largest body that is parsed on the task that read it; larger ones go to a blocking thread.
pub const HTTP_INLINE_BYTES_MAX: usize = 64 << 10;
/// Bytes read and discarded of a request that was answered before its end.
pub const HTTP_LINGER_BYTES_MAX: usize = 512 << 10;
/// Requests at once on one HTTP/2 connection.
pub const HTTP2_STREAMS_MAX: u32 = 128;
/// The window of a zstd body, as its base-2 logarithm: 8 MiB, what RFC 9659 lets a server ask for.
pub const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// A message id that a client gives: MQTT's `message-id`, HTTP's `Idempotency-Key`, NATS' `Nats-Msg-Id`.
pub const MESSAGE_ID_BYTES_MAX: usize = 128;
/// Default: how long a message id is remembered, in seconds.
pub const DEDUP_WINDOW_S: u64 = 600;
/// Default: message ids that are remembered at once.
pub const DEDUP_IDS_MAX: usize = 2_000_000;
/// QoS 2 exchanges open at once; a further one evicts the oldest.
pub const EXCHANGES_OPEN_MAX: usize = 1_000_000;
/// How long a QoS 2 exchange stays open if its client does not come back.
pub const EXCHANGE_AGE_MAX: std::time::Duration = std::time::Duration::from_secs(7 * 24 * 3_600);

/// Subscriptions of one NATS client that was let in with its key.
pub const NATS_SUBSCRIPTIONS_MAX: u32 = 1024;
/// Recently admitted NATS clients that are remembered, so that they can be disconnected even before
/// their server has registered them.
pub const NATS_LET_IN_CLIENTS_MAX: usize = 1 << 16;
/// How long those clients are remembered: far longer than any server waits for a callout's answer.
pub const NATS_LET_IN_AGE_MAX: std::time::Duration = std::time::Duration::from_secs(60);
/// NATS messages that go through intake as one draft.
pub const NATS_BATCH_MESSAGES_MAX: usize = 1024;
/// Bytes of such a draft; a larger message gets its own.
pub const NATS_BATCH_BYTES_MAX: usize = 1 << 20;
/// Batches of NATS messages that are on their way into the log at once.
pub const NATS_BATCHES_IN_FLIGHT_MAX: usize = 16;
/// NATS messages that wait for a batch; further ones are told to retry.
pub const NATS_WAITING_MESSAGES_MAX: usize = 64 << 10;
/// Bytes of a NATS message's own headers that are stored as MQTT 5 user properties.
pub const NATS_HEADERS_BYTES_MAX: usize = 8 << 10;

/// One JSON Schema, as compact JSON.
pub const SCHEMA_BYTES_MAX: usize = 32 << 10;
/// How deep a JSON Schema nests.
pub const SCHEMA_DEPTH_MAX: usize = 32;
/// Nodes of a JSON Schema with all its references expanded: what one value is checked against at
/// most.
pub const SCHEMA_NODES_MAX: usize = 20_000;
/// The compiled size of one pattern of a JSON Schema.
pub const SCHEMA_REGEX_BYTES_MAX: usize = 1 << 20;
/// Schemas of one datasource, each for a topic filter.
pub const SCHEMA_RULES_MAX: usize = 64;
/// The reason text of a quarantined message, and its JSON pointer.
pub const REASON_BYTES_MAX: usize = 512;
/// Invalid messages that an HTTP answer names; it counts all of them.
pub const VALIDATION_ERRORS_MAX: usize = 100;
/// Leaked-key quarantines and their reversals, in all.
pub const LEAK_CHANGES_MAX: u64 = 10_000;
/// Records, the newest ones, that a schema is inferred from.
pub const INFERENCE_RECORDS_MAX: usize = 5_000;
/// Approximate payload bytes of those records.
pub const INFERENCE_BYTES_MAX: usize = 8 << 20;
/// Topics that each get their own inferred schema.
pub const INFERENCE_TOPICS_MAX: usize = 50;
/// How deep an inferred schema nests.
pub const INFERENCE_DEPTH_MAX: usize = 8;
/// Members of objects that an inferred schema names.
pub const INFERENCE_PARTS_MAX: usize = 1_000;
/// An object member's name in an inferred schema.
pub const INFERENCE_KEY_BYTES_MAX: usize = 128;
/// A payload shown as an example.
pub const INFERENCE_EXAMPLE_BYTES_MAX: usize = 16 << 10;
/// Quarantined messages that are redriven in one draft.
pub const REDRIVE_PAGE_RECORDS: usize = 500;
/// Quarantined messages that one redrive request handles, approximately.
pub const REDRIVE_RECORDS_MAX: u64 = 100_000;
/// A request that sets the schemas of a datasource.
pub const HTTP_SCHEMAS_BYTES_MAX: usize = 1 << 20;

/// Default: bytes of messages on their way into the log.
pub const IN_FLIGHT_BYTES_MAX: usize = 64 << 20;
/// Attempts at a change of the registry while other nodes of the cluster win the race.
pub const CHANGE_ATTEMPTS_MAX: usize = 20;
/// How long a node may take to catch up with other nodes' earlier changes of the registry.
pub const CATCH_UP_MAX: std::time::Duration = std::time::Duration::from_secs(5);
/// When to retry after a transient refusal.
pub const RETRY_AFTER: std::time::Duration = std::time::Duration::from_secs(5);
/// How long a call that ends a key waits for its last connection to close.
pub const REVOCATION_WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(5);
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
/// Bytes of the log's newest part that every start verifies.
pub const VERIFY_AT_START_BYTES: u64 = 512 << 20;
/// If the clock goes back by at most this, records' times stand still until it catches up.
pub const CLOCK_SKEW_MICROS_MAX: i64 = 1_000_000;
/// Recent batches kept in memory for consumers that keep up.
pub const TAIL_BYTES_MAX: usize = 16 << 20;
/// Bytes of batches in a live subscriber's mailbox above which it counts as behind.
pub const MAILBOX_BYTES_MAX: usize = 1 << 20;
/// Bytes that the router reads from the log at a time.
pub const ROUTE_BYTES: usize = 4 << 20;
/// Bytes that a subscriber that is behind reads from the log at a time.
pub const CATCH_UP_BYTES: usize = 1 << 20;
/// Bytes that egress reads from the log at a time.
pub const EGRESS_READ_BYTES: usize = 1 << 20;
/// Unacknowledged records that are read again at once for a subscriber.
pub const REFETCH_RECORDS: usize = 256;
/// Records on one page of a query, at most.
pub const QUERY_RECORDS_MAX: usize = 10_000;
/// Records on a page of a query that gives no limit.
pub const QUERY_RECORDS_DEFAULT: usize = 100;
/// Concurrent queries; further ones wait.
pub const QUERIES_MAX: usize = 4;
/// Payload bytes after which a page of a query ends, full or not.
pub const QUERY_BYTES_MAX: usize = 16 << 20;
/// Records that a query scans for one page; a selective filter gives short pages.
pub const QUERY_SCANNED_MAX: usize = 100_000;
/// Topics on one page of `latest`.
pub const LATEST_TOPICS_MAX: usize = 10_000;
/// JSON keys that `latest` stores per topic.
pub const LATEST_KEYS_PER_TOPIC_MAX: usize = 256;
/// One JSON key that `latest` stores.
pub const LATEST_KEY_BYTES_MAX: usize = 256;
/// How many of a topic's records are searched for values that replace quarantined ones.
pub const LATEST_LOOK_BACK_MAX: usize = 100_000;
/// The largest value that `latest` copies; of a longer one it gives only the place.
pub const LATEST_VALUE_BYTES_MAX: usize = 64 << 10;

/// The largest limit of a key or datasource that an operator may set.
pub const LIMIT_MAX: u64 = 1_000_000_000_000;
/// The largest limit on distinct topics of a key or datasource: each topic takes 8 bytes of memory.
pub const LIMIT_TOPICS_MAX: u64 = 100_000;
/// Default: failed authentications that an address may have at once.
pub const AUTH_FAILURES_BURST: u64 = 100;
/// Default: failed authentications forgotten per second.
pub const AUTH_FAILURES_PER_S: u64 = 1;
/// Counters of failed authentications, 8 bytes each; addresses share them by hash.
pub const AUTH_FAILURES_COUNTERS: usize = 1 << 16;
/// Shards of the list of refusals, each with its own lock. An address always has the same shard.
pub const REFUSALS_SHARDS: usize = 16;
/// Sources of refusals that a shard lists; a further one evicts the one silent for longest.
pub const REFUSALS_PER_SHARD_MAX: usize = 256;
/// Bytes shown of a client's identifier.
pub const REFUSALS_CLIENT_BYTES_MAX: usize = 64;
/// Refusals returned by a query that gives no limit.
pub const REFUSALS_DEFAULT: usize = 100;

// One message with all its properties fits in one commit, and one commit in one segment.
const _: () = assert!(MQTT_PACKET_BYTES_MAX + TOPIC_BYTES_MAX < BATCH_BYTES_MAX);
const _: () = assert!((BATCH_BYTES_MAX as u64) < SEGMENT_BYTES);
// A frame's worst: a part that cannot be split, and 32 bytes of each open exchange and 20 of each released one.
const _: () =
    assert!(FRAME_PART_BYTES_MAX + BATCH_BYTES_MAX + 52 * EXCHANGES_OPEN_MAX < FRAME_BODY_BYTES_MAX);
const _: () =
    assert!(HTTP_BODY_BYTES_LIMIT + HTTP_MESSAGES_MAX * 64 + 2 * TOPIC_BYTES_MAX < FRAME_PART_BYTES_MAX);
const _: () = assert!(PAYLOAD_BYTES_MAX + NATS_HEADERS_BYTES_MAX + TOPIC_BYTES_MAX < BATCH_BYTES_MAX);
const _: () = assert!(HTTP_BODY_BYTES_MAX < IN_FLIGHT_BYTES_MAX);
const _: () = assert!(HTTP_BODY_BYTES_MAX <= HTTP_BODIES_BYTES_MAX / 2);
const _: () = assert!(QUERY_RECORDS_DEFAULT <= QUERY_RECORDS_MAX);
const _: () = assert!(HTTP_KEYS_PER_CONNECTION_MAX >= HTTP2_STREAMS_MAX as usize);
const _: () = assert!(REFUSALS_DEFAULT <= REFUSALS_SHARDS * REFUSALS_PER_SHARD_MAX);
