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

/// Those who used a key last, of whom its list tells.
pub const USERS_PER_KEY_MAX: usize = 8;
/// Keys whose use is written in one transaction: other changes of the registry wait for it.
pub const USAGE_KEYS_PER_CHANGE: usize = 1_000;
/// Keys whose use is read or written in the cluster's bucket at once.
pub const USAGE_READS_MAX: usize = 64;

/// The grace of a key that is rotated, if nobody says how long, in seconds.
pub const GRACE_DEFAULT_S: u64 = 24 * 3_600;
/// The longest grace.
pub const GRACE_S_MAX: u64 = 366 * 24 * 3_600;
/// Entries of the audit that one page has at most.
pub const AUDIT_ENTRIES_MAX: usize = 10_000;
/// Entries on a page of the audit that does not say how many.
pub const AUDIT_ENTRIES_DEFAULT: usize = 100;
/// Secrets in one leak report that are looked at.
pub const LEAKS_PER_REPORT_MAX: usize = 100;
/// What the audit keeps of the URL in a leak report.
pub const LEAK_URL_BYTES_MAX: usize = 500;
/// Leak reports that may come from one address at once.
pub const LEAK_REPORTS_BURST: u64 = 20;
/// How many a second after that.
pub const LEAK_REPORTS_PER_S: u64 = 1;
/// Keys that an HTTP connection is known to have presented: as many as requests at once.
pub const HTTP_KEYS_PER_CONNECTION_MAX: usize = 128;

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

/// What one WebSocket frame that we send carries; its length is then two bytes.
pub const WEBSOCKET_FRAME_BYTES_MAX: usize = u16::MAX as usize;
/// Topic aliases that an MQTT 5 client is sent at most.
pub const MQTT_TOPIC_ALIASES_SENT_MAX: u16 = 64;
/// QoS 1 messages that a subscriber is sent before it has acknowledged any.
pub const MQTT_FLIGHTS_MAX: usize = 4096;
/// Subscriptions of one session.
pub const MQTT_SUBSCRIPTIONS_MAX: usize = 1024;
/// The topic filters of one session in a cluster, in bytes: it fits in one message of NATS, which has 1 MiB
/// by default.
pub const CLUSTER_FILTERS_BYTES_MAX: usize = 512 << 10;
/// What a subscriber is given of retained messages at a time, in bytes of payloads.
pub const RETAINED_PAGE_BYTES: usize = 256 << 10;
/// What is read of the log at a time to find where a replay begins, in bytes.
pub const TAIL_BYTES: usize = 4 << 20;
/// Records that `tail` goes back at most.
pub const TAIL_RECORDS_MAX: u64 = 1_000_000;

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

/// A message id that a client gives: MQTT's `message-id`, HTTP's `Idempotency-Key`, NATS' `Nats-Msg-Id`.
pub const MESSAGE_ID_BYTES_MAX: usize = 128;
/// Default: how long a message id is known, in seconds.
pub const DEDUP_WINDOW_S: u64 = 600;
/// Default: message ids that are known at once.
pub const DEDUP_IDS_MAX: usize = 2_000_000;
/// QoS 2 exchanges that are open at once; the oldest is given up for one more.
pub const EXCHANGES_OPEN_MAX: usize = 1_000_000;
/// How long a QoS 2 exchange stays open whose client does not come back.
pub const EXCHANGE_AGE_MAX: std::time::Duration = std::time::Duration::from_secs(7 * 24 * 3_600);

/// Subscriptions of one NATS client that was let in with its key.
pub const NATS_SUBSCRIPTIONS_MAX: u32 = 1024;
/// NATS clients that were let in just now and are remembered, so that they can be ended before their
/// server has put them in their place.
pub const LET_IN_MAX: usize = 1 << 16;
/// How long they are: far longer than any server waits for the answer that lets one in.
pub const LET_IN_FOR: std::time::Duration = std::time::Duration::from_secs(60);
/// NATS messages that go through intake as one draft.
pub const NATS_BATCH_MESSAGES_MAX: usize = 1024;
/// And their bytes; a larger message is alone.
pub const NATS_BATCH_BYTES_MAX: usize = 1 << 20;
/// Batches of NATS messages that are on their way into the log at once.
pub const NATS_BATCHES_IN_FLIGHT_MAX: usize = 16;
/// NATS messages that wait for their batch; one more is told to come again.
pub const NATS_WAITING_MESSAGES_MAX: usize = 64 << 10;
/// What is kept of a NATS message's own headers, as user properties of MQTT 5, in bytes.
pub const NATS_HEADERS_BYTES_MAX: usize = 8 << 10;

/// One JSON Schema, as JSON without blanks.
pub const SCHEMA_BYTES_MAX: usize = 32 << 10;
/// How deep a JSON Schema nests.
pub const SCHEMA_DEPTH_MAX: usize = 32;
/// Parts of a JSON Schema when each of its references is unfolded: what a message's value is held
/// against at most.
pub const SCHEMA_NODES_MAX: usize = 20_000;
/// What one pattern of a JSON Schema may be compiled into.
pub const SCHEMA_REGEX_BYTES_MAX: usize = 1 << 20;
/// Schemas of one datasource, each for a topic filter.
pub const SCHEMA_RULES_MAX: usize = 64;
/// The words with which a message goes into quarantine, and the pointer.
pub const REASON_BYTES_MAX: usize = 512;
/// Messages that an HTTP answer names of those that do not meet their schema; it counts all of them.
pub const VALIDATION_ERRORS_MAX: usize = 100;
/// How often keys are quarantined because they have leaked, or given back.
pub const LEAK_CHANGES_MAX: u64 = 10_000;
/// Records, the newest ones, that a schema is inferred from.
pub const INFERENCE_RECORDS_MAX: usize = 5_000;
/// The bytes of their payloads, about.
pub const INFERENCE_BYTES_MAX: usize = 8 << 20;
/// Topics that a schema is inferred for each.
pub const INFERENCE_TOPICS_MAX: usize = 50;
/// How deep an inferred schema looks.
pub const INFERENCE_DEPTH_MAX: usize = 8;
/// Members of objects that an inferred schema names.
pub const INFERENCE_PARTS_MAX: usize = 1_000;
/// A member's name in an inferred schema.
pub const INFERENCE_KEY_BYTES_MAX: usize = 128;
/// A payload that is shown as an example.
pub const INFERENCE_EXAMPLE_BYTES_MAX: usize = 16 << 10;
/// Messages in quarantine that are sent again in one draft, and in one request about.
pub const REDRIVE_PAGE_RECORDS: usize = 500;
/// See [`REDRIVE_PAGE_RECORDS`].
pub const REDRIVE_RECORDS_MAX: u64 = 100_000;
/// A request that sets the schemas of a datasource.
pub const HTTP_SCHEMAS_BYTES_MAX: usize = 1 << 20;

/// Default: bytes of messages that are on their way into the log.
pub const IN_FLIGHT_BYTES_MAX: usize = 64 << 20;
/// How many origins (datasource and key) of a read's messages are kept apart before one repeats.
pub const SECTION_SEARCH_MAX: usize = 8;
/// How often a change of the registry is made anew because another node of the cluster was faster.
pub const CHANGE_ATTEMPTS_MAX: usize = 20;
/// How long a node may take to learn what others have changed in the registry before.
pub const CATCH_UP_MAX: std::time::Duration = std::time::Duration::from_secs(5);
/// When to come again after a transient refusal.
pub const RETRY_AFTER: std::time::Duration = std::time::Duration::from_secs(5);
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
/// What waits in a live subscriber's mailbox before it counts as behind, in bytes of batches.
pub const MAILBOX_BYTES_MAX: usize = 1 << 20;
/// What the router takes from the log at a time.
pub const ROUTE_BYTES: usize = 4 << 20;
/// What a subscriber that is behind reads of the log at a time.
pub const CATCH_UP_BYTES: usize = 1 << 20;
/// What egress reads of the log at a time.
pub const EGRESS_READ_BYTES: usize = 1 << 20;
/// Records that are read again at once for a subscriber that has not acknowledged them.
pub const REFETCH_RECORDS: usize = 256;
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
/// How many of a topic's records are looked through for values to take the place of those that went
/// into quarantine.
pub const LATEST_LOOK_BACK_MAX: usize = 100_000;
/// A value that `latest` copies; of a longer one it only says where it is.
pub const LATEST_VALUE_BYTES_MAX: usize = 64 << 10;

/// A limit of a key or datasource that an operator may set, whatever it counts.
pub const LIMIT_MAX: u64 = 1_000_000_000_000;
/// Different topics that a key or datasource may be limited to: 8 bytes of memory each.
pub const LIMIT_TOPICS_MAX: u64 = 100_000;
/// Default: failed authentications that an address may have at once.
pub const AUTH_FAILURES_BURST: u64 = 100;
/// Default: how many of them are forgotten a second.
pub const AUTH_FAILURES_PER_S: u64 = 1;
/// Counters of failed authentications, which all addresses share by their hash: 8 bytes each.
pub const AUTH_FAILURES_COUNTERS: usize = 1 << 16;
/// Parts of the list of refusals, each with a lock of its own. An address is always in the same one.
pub const REFUSALS_SHARDS: usize = 16;
/// Sources of refusals that a part lists; the one that was silent for longest leaves for one more.
pub const REFUSALS_PER_SHARD_MAX: usize = 256;
/// What is shown of a client's identifier, in bytes.
pub const REFUSALS_CLIENT_BYTES_MAX: usize = 64;
/// Refusals that a query returns when it does not say how many.
pub const REFUSALS_DEFAULT: usize = 100;

// One message, whatever it carries with it, fits in one commit, and one commit in one segment.
const _: () = assert!(MQTT_PACKET_BYTES_MAX + TOPIC_BYTES_MAX < BATCH_BYTES_MAX);
const _: () = assert!((BATCH_BYTES_MAX as u64) < SEGMENT_BYTES);
const _: () = assert!(PAYLOAD_BYTES_MAX + NATS_HEADERS_BYTES_MAX + TOPIC_BYTES_MAX < BATCH_BYTES_MAX);
const _: () = assert!(HTTP_BODY_BYTES_MAX < IN_FLIGHT_BYTES_MAX);
const _: () = assert!(HTTP_BODY_BYTES_MAX <= HTTP_BODIES_BYTES_MAX / 2);
const _: () = assert!(QUERY_RECORDS_DEFAULT <= QUERY_RECORDS_MAX);
const _: () = assert!(HTTP_KEYS_PER_CONNECTION_MAX >= HTTP2_STREAMS_MAX as usize);
const _: () = assert!(REFUSALS_DEFAULT <= REFUSALS_SHARDS * REFUSALS_PER_SHARD_MAX);
