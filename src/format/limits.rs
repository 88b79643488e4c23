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
/// Tags of a point in line protocol: a level of its topic each, behind that of the measurement.
pub const POINT_TAGS_MAX: usize = TOPIC_LEVELS_MAX - 1;
/// A media type given with a message.
pub const CONTENT_TYPE_BYTES_MAX: usize = 255;
/// An MQTT client identifier.
pub const CLIENT_ID_BYTES_MAX: usize = 256;
/// A presented key or access token before anything looks at it; a real key has 53 characters.
pub const PRESENTED_KEY_BYTES_MAX: usize = 1_024;

/// How long an access token is good for if the request says nothing, in seconds.
pub const TOKEN_TTL_DEFAULT_S: u64 = 3_600;
/// The longest time that an access token is good for, in seconds.
pub const TOKEN_TTL_S_MAX: u64 = 24 * 3_600;
/// Topic filters of an access token.
pub const TOKEN_TOPICS_MAX: usize = 16;
/// What these may have in all, in bytes: the token carries them.
pub const TOKEN_TOPICS_BYTES_MAX: usize = 512;

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
/// Audit entries that are read at a time.
pub const AUDIT_ENTRIES_PER_READ: usize = 500;
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
/// How many bytes are read behind a packet that cannot be taken in yet, to see what the client says meanwhile.
pub const MQTT_AHEAD_BYTES_MAX: usize = 64 << 10;
/// The longest times of a TCP connection that the kernel takes, in seconds.
pub const TCP_SECONDS_MAX: u32 = 32_767;
/// How often the kernel asks for a peer that does not answer.
pub const TCP_PROBE_INTERVAL: std::time::Duration = std::time::Duration::from_secs(10);
/// How often it asks in vain.
pub const TCP_PROBES_MAX: u32 = 6;
/// How many takeovers of one client identifier in a row are told: fewer are a client that connects again.
pub const TAKEOVERS_TOLD_MIN: u32 = 5;
/// How many client identifiers are watched for that at once.
pub const TAKEOVER_TALLIES_MAX: usize = 4096;
/// How long a connection that somebody else ends takes in what its client had sent.
pub const MQTT_EXIT_WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(2);
/// How much of it is read: more than a socket's buffer holds by default (`net.ipv4.tcp_rmem`).
pub const MQTT_EXIT_BYTES_MAX: usize = 16 << 20;
/// How long an MQTT packet may take to arrive, ...
pub const MQTT_PACKET_GRACE: std::time::Duration = std::time::Duration::from_secs(30);
/// ... and a second more for so many bytes of it.
pub const MQTT_PACKET_BYTES_PER_S_MIN: u64 = 256;
/// What a TLS handshake is charged for.
pub const TLS_HANDSHAKE_BYTES: usize = 32 << 10;
/// A file with certificates or a key.
pub const TLS_FILE_BYTES_MAX: u64 = 1 << 20;
/// A PROXY protocol header of version 1, with its line end (the specification's section 2.1).
pub const PROXY_V1_BYTES_MAX: usize = 107;
/// A PROXY protocol header of version 2, with what a proxy adds to the addresses.
pub const PROXY_V2_BYTES_MAX: usize = 4 << 10;
/// Addresses of `X-Forwarded-For` that are looked at, from the right.
pub const FORWARDED_ADDRESSES_MAX: usize = 64;
/// What the beginning of a CONNECT may take before it is charged for.
pub const MQTT_CONNECT_UNCHARGED_BYTES: usize = 4 << 10;
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
/// Messages in flight to one subscriber: at QoS 1 until the PUBACK, at QoS 2 until the PUBCOMP.
pub const MQTT_FLIGHTS_MAX: usize = 4096;
/// Default: subscriptions of one session.
pub const MQTT_SUBSCRIPTIONS_MAX: usize = 1024;
/// The largest number of subscriptions of one session that an operator may set: each filter of a SUBSCRIBE is looked
/// for among all of them.
pub const MQTT_SUBSCRIPTIONS_LIMIT: usize = 10_000;
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
/// A datasource with its keys that is imported in one request: about 60,000 keys.
pub const HTTP_IMPORT_BYTES_MAX: usize = 16 << 20;
/// A request's line and header, and what one read of an HTTP/1 socket takes.
pub const HTTP_HEADER_BYTES_MAX: usize = 64 << 10;
/// Bytes of a body that have to arrive in a second, on average over [`HTTP_BODY_PACE_WINDOW`].
pub const HTTP_BODY_BYTES_PER_S_MIN: u64 = 256;
/// How long a body may be slower than that.
pub const HTTP_BODY_PACE_WINDOW: std::time::Duration = std::time::Duration::from_secs(10);
/// What a request under way is charged for, without its body and its answer.
pub const HTTP_REQUEST_BYTES: usize = 8 << 10;
/// Answers larger than this are sent in pieces, and dropped if their client does not take them.
pub const HTTP_ANSWER_PIECE_BYTES: usize = 64 << 10;
/// Payload bytes of a page that are read from storage at a time.
pub const QUERY_PIECE_BYTES: usize = 512 << 10;
/// Records that are scanned for one piece of a page: a piece is one turn of its tenant.
pub const QUERY_PIECE_SCANNED: usize = 20_000;
/// What a stream over HTTP hands over at a time, about, in bytes.
pub const STREAM_CHUNK_BYTES: usize = 32 << 10;
/// What it hands over until others have their turn, in bytes.
pub const STREAM_BYTES_PER_TURN: usize = 128 << 10;
/// The shortest time between two heartbeats of a stream.
pub const STREAM_HEARTBEAT_MIN: std::time::Duration = std::time::Duration::from_millis(100);
/// How long the last event of a stream may take that was told to end.
pub const STREAM_END_WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(1);
/// Browser sessions that one key may have at once.
pub const BROWSER_SESSIONS_PER_KEY_MAX: usize = 16;
/// Browser sessions that there may be at once.
pub const BROWSER_SESSIONS_MAX: usize = 1_024;
/// How long a browser session lasts that is not used.
pub const BROWSER_SESSION_IDLE_MAX: std::time::Duration = std::time::Duration::from_secs(3_600);
/// How long a browser session lasts at most.
pub const BROWSER_SESSION_AGE_MAX: std::time::Duration = std::time::Duration::from_secs(12 * 3_600);
/// Live views that one key may have open.
pub const LIVE_WATCHERS_PER_KEY_MAX: usize = 16;
/// ... with the keys of one datasource.
pub const LIVE_WATCHERS_PER_DATASOURCE_MAX: usize = 64;
/// Live views that may be open in all.
pub const LIVE_WATCHERS_MAX: usize = 256;
/// Datasources that the live view lists.
pub const LIVE_DATASOURCES_MAX: usize = 1_000;
/// Keys whose usage the live view adds up when it begins.
pub const LIVE_KEYS_MAX: usize = 2_000;
/// Bytes of the log that the live view looks at in one turn; of what is beyond it has the number alone.
pub const LIVE_SCAN_BYTES_MAX: usize = 2 << 20;
/// Records that the live view looks back for when it begins.
pub const LIVE_HISTORY_RECORDS_MAX: u64 = 20_000;
/// Seconds that the live view looks back for.
pub const LIVE_HISTORY_S: usize = 60;
/// Newest records of a datasource that one event of the live view has.
pub const LIVE_RECORDS_MAX: usize = 100;
/// Topics of a datasource whose newest records one event has in the view of all datasources.
pub const LIVE_TOPICS_MAX: usize = 8;
/// A payload that the live view shows.
pub const LIVE_PAYLOAD_BYTES_MAX: usize = 4 << 10;
/// Payload bytes in one event of the live view.
pub const LIVE_EVENT_BYTES_MAX: usize = 128 << 10;
/// How long a stream's client takes nothing until it counts as one that stands still.
pub const STREAM_STILL: std::time::Duration = std::time::Duration::from_secs(10);
/// The largest body that is parsed on the task that read it; larger ones go to a blocking thread.
pub const HTTP_INLINE_BYTES_MAX: usize = 64 << 10;
/// Bytes read and discarded of a request that was answered before its end.
pub const HTTP_LINGER_BYTES_MAX: usize = 512 << 10;
/// MQTT connections that wait at once for a place, at `mqtt.connections_max`.
pub const MQTT_PLACE_WAITERS_MAX: usize = 32;
/// Connections at once to the administration's own listener.
pub const HTTP_ADMIN_CONNECTIONS_MAX: usize = 64;
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
/// Default: message ids of one datasource that are remembered at once.
pub const DEDUP_IDS_PER_DATASOURCE_MAX: usize = DEDUP_IDS_MAX / 2;
/// Default: QoS 2 exchanges of one datasource that are open at once: two sessions with all their packet identifiers.
pub const EXCHANGES_PER_DATASOURCE_MAX: usize = 2 << 16;
/// QoS 2 exchanges open at once; a further one is refused.
pub const EXCHANGES_OPEN_MAX: usize = 1_000_000;
/// How long a QoS 2 exchange stays open if its client does not come back.
pub const EXCHANGE_AGE_MAX: std::time::Duration = std::time::Duration::from_secs(7 * 24 * 3_600);
/// Messages of a cluster's log that a start looks through for exchanges that a kill has left open.
pub const EXCHANGES_FOUND_AT_START_MAX: u64 = 500_000;

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
/// What the remembered row ids of datasources, topics and origins take in memory, about. Beyond that, all are forgotten and
/// read again: clients may invent topics without end.
pub const REMEMBERED_NAMES_BYTES_MAX: usize = 32 << 20;
/// What one of them takes beside its text.
pub const REMEMBERED_NAME_BYTES: usize = 64;
/// Sets of keys that the samples of a topic have in PostgreSQL; beyond that, each row of samples has its keys itself, which go
/// with it.
pub const POSTGRES_KEY_SETS_PER_TOPIC_MAX: i64 = 64;
/// Bytes of rows that are made while those before them are copied into PostgreSQL, ...
pub const POSTGRES_COPY_BYTES: usize = 2 << 20;
/// ... how many records they are of, ...
pub const POSTGRES_COPY_RECORDS_MAX: usize = 4096;
/// ... and how many times that may be on its way.
pub const POSTGRES_COPIES_UNDER_WAY_MAX: usize = 2;
/// What records that wait for their commit in a Delta lake take in memory, about: so much is collected while as much is made
/// into files.
pub const LAKE_LOT_BYTES: usize = 32 << 20;
/// Columns of values in a Delta lake, for all datasources.
pub const LAKE_VALUE_COLUMNS_MAX: usize = 1_000;
/// Columns of values that one datasource brings into a Delta lake.
pub const LAKE_VALUE_COLUMNS_OF_ONE_MAX: usize = 100;
/// The name of a member that gets a column in a Delta lake.
pub const LAKE_VALUE_NAME_BYTES_MAX: usize = 128;
/// A string that stands in a column of a Delta lake.
pub const LAKE_VALUE_BYTES_MAX: usize = 256;
/// Quarantined messages that are redriven in one draft.
pub const REDRIVE_PAGE_RECORDS: usize = 500;
/// Quarantined messages that one redrive request handles, approximately.
pub const REDRIVE_RECORDS_MAX: u64 = 100_000;
/// A request that sets the schemas of a datasource.
pub const HTTP_SCHEMAS_BYTES_MAX: usize = 1 << 20;

/// Default: bytes that clients may make the gateway hold, all together.
pub const MEMORY_BYTES_MAX: usize = 192 << 20;
/// Default: the part of it that one key, or one datasource, may have.
pub const MEMORY_SHARE_BYTES_MAX: usize = 64 << 20;
/// What is kept, over all, for those who hold little.
pub const MEMORY_RESERVE_BYTES: usize = 32 << 20;
/// Who holds no more than this may use that reserve.
pub const MEMORY_LIGHT_BYTES_MAX: usize = 1 << 20;
/// The part that clients without a key at one address may have.
pub const MEMORY_BYTES_PER_ADDRESS_MAX: usize = 8 << 20;
/// The part that all clients without a key may have.
pub const MEMORY_STRANGERS_BYTES_MAX: usize = 32 << 20;
/// A draft is charged for in steps of at most this.
pub const MEMORY_STEP_BYTES_MAX: usize = 64 << 10;
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
/// For how long the processor time of tenants is counted before it is looked at.
pub const PROCESSOR_WINDOW: std::time::Duration = std::time::Duration::from_millis(10);
/// How long a tenant counts as somebody who wants something, after it was last served.
pub const TENANT_ACTIVE: std::time::Duration = std::time::Duration::from_millis(300);
/// How long a tenant is served at low priority for each [`PROCESSOR_WINDOW`] in which it was over its share of the
/// processors.
pub const SLOW_LANE_STEP: std::time::Duration = std::time::Duration::from_millis(200);
/// The longest of these stays.
pub const SLOW_LANE_STAY: std::time::Duration = std::time::Duration::from_secs(2);
/// What such a tenant may have on its way into the log, in bytes; a larger request goes alone.
pub const SLOW_IN_FLIGHT_BYTES_MAX: usize = 128 << 10;
/// What a section of such a tenant counts there beyond its bytes: messages with ids of their own are a section each, and the
/// log computes for each of those as long as for so many bytes.
pub const SLOW_SECTION_BYTES: usize = 4 << 10;
/// Sections of one draft of such a tenant; what else was read goes into the next one.
pub const SLOW_SECTIONS_MAX: usize = SLOW_IN_FLIGHT_BYTES_MAX / SLOW_SECTION_BYTES;
/// How long such a tenant pauses after work of its own that others wait for the disk behind, as a multiple of what the
/// work took.
pub const SLOW_DISK_PAUSES: u32 = 3;
/// The same after a request larger than [`SLOW_IN_FLIGHT_BYTES_MAX`], for whose commit everybody waits, up to 1 MiB; beyond
/// that it grows with the square of its size: others wait for longer, and that often.
pub const SLOW_LARGE_PAUSES: u32 = 4;
/// The most of that: a hundredth of the log's time is such a tenant's.
pub const SLOW_LARGE_PAUSES_MAX: u32 = 100;
/// The longest of these pauses.
pub const SLOW_DISK_PAUSE_MAX: std::time::Duration = std::time::Duration::from_secs(2);
/// The niceness of that priority.
pub const SLOW_LANE_NICE: u8 = 10;
/// What a new connection may use of the processors before it shares the place of its tenant, in nanoseconds.
pub const NEWCOMER_NS: u64 = 200_000;
/// Bytes of a new connection that are looked at for a key while a crowd of strangers stands in line: a request with its
/// first headers, or a CONNECT.
pub const EARLY_KEY_BYTES_MAX: usize = 1_024;
/// How many there are looked up.
pub const EARLY_KEYS_MAX: usize = 4;
/// How long those bytes are waited for.
pub const EARLY_KEY_WAIT_MAX: std::time::Duration = std::time::Duration::from_millis(250);
/// Connections that are accepted before others have their turn, while somebody is in the slow lane: a crowd must not fill
/// the kernel's queue.
pub const ACCEPTS_PER_TURN_MAX: u32 = 8;
/// What is read of a new HTTP connection in one of its turns while others wait to be let in.
pub const NEWCOMER_READ_BYTES: usize = 256;
/// Packets of an MQTT connection that are decoded before others have their turn.
pub const MQTT_PACKETS_PER_TURN_MAX: usize = 1_024;
/// Decoded bytes of an HTTP body after which others have their turn.
pub const HTTP_BODY_BYTES_PER_TURN: usize = 128 << 10;
/// Requests without a valid key that may come at once on an HTTP connection which has presented none, ...
pub const STRANGER_REQUESTS_BURST: u32 = 16;
/// ... and how many more a second after that.
pub const STRANGER_REQUESTS_PER_S: u32 = 4;
/// Requests over HTTP/2 that are under way beyond those on connections of which no key is known yet, of all clients.
pub const EARLY_REQUESTS_MAX: usize = 4_096;
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
/// Bytes of batches in a live subscriber's mailbox above which it counts as behind.
pub const MAILBOX_BYTES_MAX: usize = 1 << 20;
/// Bytes of routed batches that mailboxes hold in all: who has not taken a batch when so many came after it
/// reads it from the log again.
pub const MAILBOX_WINDOW_BYTES: usize = TAIL_BYTES_MAX;
/// The part of it after which the router looks for mailboxes that hold older batches.
pub const MAILBOX_SWEEP_BYTES: usize = 4 << 20;
/// Steps through filters and places found that the router spends on the records of one datasource in one
/// batch. Beyond that its subscribers read the batch by themselves.
pub const ROUTE_STEPS_MAX: usize = 200_000;
/// Places that the router has found for the subscribers of one datasource and that they have not taken.
pub const ROUTED_PLACES_BYTES_MAX: u64 = 8 << 20;
/// Steps through filters and places found in one turn of a subscriber that reads the log by itself.
pub const CATCH_UP_STEPS_MAX: usize = 20_000;
/// Subscriptions of a session that are gone through in one turn to send it records.
pub const DELIVERY_STEPS_MAX: usize = 32_768;
/// Bytes that the subscribers of one datasource hold while their clients take nothing; beyond that they read
/// them again later.
pub const STALLED_BYTES_PER_TENANT_MAX: u64 = 32 << 20;
/// The same of all datasources.
pub const STALLED_BYTES_MAX: u64 = 96 << 20;
/// Output to subscribers of one datasource that they have not taken, beyond [`OUTPUT_FREE_BYTES`] each.
pub const OUTPUT_BYTES_PER_TENANT_MAX: usize = 24 << 20;
/// The same of all datasources.
pub const OUTPUT_BYTES_MAX: usize = 96 << 20;
/// What each subscriber may have in its output whatever the others have.
pub const OUTPUT_FREE_BYTES: usize = 8 << 10;
/// Bytes of log that are read at a time to send unacknowledged messages again.
pub const REFETCH_BYTES: usize = 256 << 10;
/// Reads from the disk for subscribers and queries at once, each on a blocking thread; the runtime has 512,
/// and the registry needs some whatever subscribers do.
pub const BLOCKING_READS_MAX: usize = 16;
/// Those of them that one datasource may have.
pub const BLOCKING_READS_PER_TENANT_MAX: usize = 2;
/// SUBSCRIBEs that search the log for their beginning at once; each remembers up to [`TAIL_RECORDS_MAX`] offsets.
pub const REPLAYS_RUNNING_MAX: usize = 8;
/// Those of them that one datasource may have; further ones wait.
pub const REPLAYS_RUNNING_PER_TENANT_MAX: usize = 2;
/// SUBSCRIBEs of one datasource that search the log for their beginning, or wait for their turn to.
pub const REPLAYS_PER_TENANT_MAX: u64 = 64;
/// Bytes that the router reads from the log at a time.
pub const ROUTE_BYTES: usize = 4 << 20;
/// Bytes in memory anyway that a subscriber that is behind takes at a time.
pub const CATCH_UP_RECENT_BYTES: usize = 64 << 10;
/// Bytes that a subscriber that is behind reads from the log at a time.
pub const CATCH_UP_BYTES: usize = 1 << 20;
/// Bytes that egress reads from the log at a time.
pub const EGRESS_READ_BYTES: usize = 1 << 20;
/// Records that a member of a group has before anything is known about its pace.
pub const MEMBER_WINDOW_RECORDS_START: usize = 8;
/// Records that a slow member of a group has: one that its client deals with, and one on its way.
pub const MEMBER_WINDOW_RECORDS_MIN: usize = 2;
/// Records that the fastest member of a group has.
pub const MEMBER_WINDOW_RECORDS_MAX: usize = MQTT_FLIGHTS_MAX;
/// Records that a group has in memory for its members, ...
pub const GROUP_READY_RECORDS_MAX: usize = 1024;
/// ... and bytes of the batches that have them, above which it takes no further one.
pub const GROUP_READY_BYTES_MAX: usize = 1 << 20;
/// Unacknowledged records that are read again at once for a subscriber.
pub const REFETCH_RECORDS: usize = 256;
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
pub const POSTGRES_READER_WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(5);
/// How long it may take to open one.
pub const POSTGRES_READER_OPEN_WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(5);
/// How long PostgreSQL may take for a statement of a reader's; it gives up by itself before that.
pub const POSTGRES_READ_WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(15);
/// How long readers leave a PostgreSQL alone that was away.
pub const POSTGRES_READER_AWAY_PAUSE: std::time::Duration = std::time::Duration::from_millis(500);
/// Large HTTP bodies that are parsed at once for each processor.
pub const PARSES_PER_PROCESSOR_MAX: usize = 2;
/// Payload bytes after which a page of a query ends, full or not.
pub const QUERY_BYTES_MAX: usize = 16 << 20;
/// Records that a query scans for one page; a selective filter gives short pages.
pub const QUERY_SCANNED_MAX: usize = 100_000;
/// Stored records that one transaction of retention removes: storage goes on in between.
pub const PRUNE_RECORDS_PER_TRANSACTION: usize = 2_000;
/// The same in PostgreSQL, ...
pub const POSTGRES_PRUNE_RECORDS_PER_TRANSACTION: usize = 5_000;
/// ... where what a datasource takes is counted so many records at a time.
pub const POSTGRES_COUNT_RECORDS_PER_STEP: i64 = 50_000;
/// Topics whose samples one transaction of retention takes out of what they share with later ones.
pub const TRIM_TOPICS_PER_TRANSACTION: u32 = 64;
/// How often that is done: samples may outlive their records by so much.
pub const TRIM_INTERVAL: std::time::Duration = std::time::Duration::from_secs(30);
/// Free pages of `records.db` that are given back to the file system at a time.
pub const PRUNE_PAGES_PER_TRANSACTION: i64 = 256;
/// Free pages of `records.db` that stay for later records, of 4 KiB each; of a large one, a sixteenth of its pages.
pub const FREE_PAGES_KEPT: i64 = 1024;
/// What a stored record takes beside its payload, approximately, as the limit `stored_bytes` counts it.
pub const STORED_RECORD_BYTES: u64 = 64;
/// How often is looked at what is over the limits of what is stored, ...
pub const RETENTION_INTERVAL: std::time::Duration = std::time::Duration::from_secs(1);
/// ... and how long that may take at a time while storage has nothing else to do.
pub const RETENTION_TURN_MAX: std::time::Duration = std::time::Duration::from_millis(20);
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
/// What the newest values of one datasource may take in memory to be shown from there, ...
pub const LATEST_BOARD_BYTES_MAX: usize = 8 << 20;
/// ... and of how many datasources they are: of those that are asked for again and again.
pub const LATEST_BOARD_DATASOURCES_MAX: usize = 8;
/// Numbers of one payload that become samples. Enough for a wide reading; more would make one message cost what hundreds do.
pub const SAMPLES_PER_RECORD_MAX: usize = 256;
/// Bytes of a sample's key, with the names of the objects that it is in.
pub const SAMPLE_KEY_BYTES_MAX: usize = LATEST_KEY_BYTES_MAX;
/// Topics and keys whose samples or newest values one transaction of storage gathers before it writes them: what clients
/// invent must not take more memory than that.
pub const GATHERED_KEYS_MAX: usize = 32 << 10;
/// Objects inside of the outermost one whose numbers become samples.
pub const SAMPLE_DEPTH_MAX: usize = 8;
/// Bytes of the JSON pointer to an event time.
pub const EVENT_TIME_POINTER_BYTES_MAX: usize = 256;
/// Bytes of an event time that is said with a request.
pub const EVENT_TIME_TEXT_BYTES_MAX: usize = 64;
/// Parts of the JSON pointer to an event time: each is a scan of what it is in.
pub const EVENT_TIME_POINTER_PARTS_MAX: usize = 8;
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
/// The largest distance between event time and receipt that a datasource may ask for, in seconds: 100 years.
pub const EVENT_TIME_SKEW_S_MAX: u64 = 100 * 366 * 24 * 3_600;

/// The largest limit of a key or datasource that an operator may set.
pub const LIMIT_MAX: u64 = 1_000_000_000_000;
/// The largest limit on distinct topics of a key or datasource: each topic takes 8 bytes of memory.
pub const LIMIT_TOPICS_MAX: u64 = 100_000;
/// The largest limit on topics with a retained message: each takes about 32 bytes of memory.
pub const RETAINED_TOPICS_LIMIT: u64 = 10_000_000;
/// Default for a datasource: MQTT sessions that outlive their connection, with about 1 KiB each.
pub const SESSIONS_PER_TENANT_MAX: u64 = 10_000;
/// Default for a datasource: subscriptions of all its MQTT sessions.
pub const SUBSCRIPTIONS_PER_TENANT_MAX: u64 = 100_000;
/// Default for a datasource: what those take in memory, in bytes, as [`SUBSCRIPTION_BYTES`] and
/// [`SUBSCRIPTION_LEVEL_BYTES`] count it.
pub const SUBSCRIPTION_BYTES_PER_TENANT_MAX: u64 = 64 << 20;
/// What a subscription takes in memory beside its filter's text, which is there four times.
pub const SUBSCRIPTION_BYTES: u64 = 256;
/// What each level of its filter takes in memory, where no other filter shares it.
pub const SUBSCRIPTION_LEVEL_BYTES: u64 = 512;
/// Default for a datasource: groups of shared subscriptions.
pub const SHARE_GROUPS_PER_TENANT_MAX: u64 = 1_000;
/// Default for a datasource: messages that were sent to its subscribers and are not acknowledged.
pub const INFLIGHT_PER_TENANT_MAX: u64 = 500_000;
/// How many of those a session takes of its datasource's share at a time.
pub const INFLIGHT_STEP: u64 = 256;
/// How many messages a session may have in flight whatever others of its datasource have.
pub const INFLIGHT_PER_SESSION_MIN: u64 = 16;
/// Default for a datasource: topics with a retained message.
pub const RETAINED_TOPICS_PER_TENANT_MAX: u64 = 100_000;
/// Default for a datasource: bytes of its retained messages.
pub const RETAINED_BYTES_PER_TENANT_MAX: u64 = 256 << 20;
/// Default for a datasource: keys that are not revoked.
pub const KEYS_PER_TENANT_MAX: u64 = 10_000;
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
/// Messages that have a span in one second; those beyond have none.
pub const SPANS_PER_S_MAX: u64 = 1_000;
/// Messages of one read or request that have a span of their own.
pub const SPANS_PER_DRAFT_MAX: usize = 16;
/// Spans that wait to be sent; those beyond are lost.
pub const SPANS_WAITING_MAX: usize = 4_096;
/// Records with spans that are remembered until they are stored.
pub const TRACED_RECORDS_MAX: usize = 1_024;
/// Default: datasources that have series of their own in the metrics; all others share one.
pub const METRICS_DATASOURCES_DEFAULT: usize = 100;
/// The most that may have: each has four series.
pub const METRICS_DATASOURCES_MAX: usize = 1_000;
/// How long a datasource keeps its series at least, although others send much more.
pub const TRAFFIC_COMPARE_INTERVAL: std::time::Duration = std::time::Duration::from_secs(60);
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
// A request of the largest body, with the draft that is made of it, is within one share; three shares and what
// strangers may have are within the whole with its reserve.
const _: () = assert!(3 * HTTP_BODY_BYTES_MAX + HTTP_MESSAGES_MAX * 100 <= MEMORY_SHARE_BYTES_MAX);
// Of its share, a key may have half for what it is sent: clients that take nothing leave some of that.
const _: () = assert!(OUTPUT_BYTES_PER_TENANT_MAX < MEMORY_SHARE_BYTES_MAX / 2);
const _: () = assert!(MEMORY_SHARE_BYTES_MAX <= MEMORY_BYTES_MAX / 3);
const _: () = assert!(MEMORY_BYTES_PER_ADDRESS_MAX <= MEMORY_STRANGERS_BYTES_MAX / 2);
const _: () = assert!(QUERY_RECORDS_DEFAULT <= QUERY_RECORDS_MAX);
const _: () = assert!(HTTP_KEYS_PER_CONNECTION_MAX >= HTTP2_STREAMS_MAX as usize);
const _: () = assert!(METRICS_DATASOURCES_DEFAULT <= METRICS_DATASOURCES_MAX);
const _: () = assert!(REFUSALS_DEFAULT <= REFUSALS_SHARDS * REFUSALS_PER_SHARD_MAX);
