//! What is kept once: message ids and QoS 2 exchanges.

use std::time::Duration;

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
pub const EXCHANGE_AGE_MAX: Duration = Duration::from_secs(7 * 24 * 3_600);
/// Messages of a cluster's log that a start looks through for exchanges that a kill has left open.
pub const EXCHANGES_FOUND_AT_START_MAX: u64 = 500_000;
