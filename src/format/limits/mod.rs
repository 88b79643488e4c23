//! Every fixed bound, with the unit last in its name. Bounds that an operator may change are in
//! the gateway's `config`, which takes its defaults from here.
//! Each file has those of one noun; how some of them have to fit together is checked at the end of this one.

mod dashboard;
mod delivery;
mod http;
mod keys;
mod log;
mod memory;
mod mqtt;
mod names;
mod nats;
mod observe;
mod once;
mod queries;
mod schemas;
mod storage;
mod tenants;
mod turns;

pub use self::dashboard::*;
pub use self::delivery::*;
pub use self::http::*;
pub use self::keys::*;
pub use self::log::*;
pub use self::memory::*;
pub use self::mqtt::*;
pub use self::names::*;
pub use self::nats::*;
pub use self::observe::*;
pub use self::once::*;
pub use self::queries::*;
pub use self::schemas::*;
pub use self::storage::*;
pub use self::tenants::*;
pub use self::turns::*;

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
