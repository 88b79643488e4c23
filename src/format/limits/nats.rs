//! The NATS front.

use std::time::Duration;

/// Subscriptions of one NATS client that was let in with its key.
pub const NATS_SUBSCRIPTIONS_MAX: u32 = 1024;
/// Recently admitted NATS clients that are remembered, so that they can be disconnected even before
/// their server has registered them.
pub const NATS_LET_IN_CLIENTS_MAX: usize = 1 << 16;
/// How long those clients are remembered: far longer than any server waits for a callout's answer.
pub const NATS_LET_IN_AGE_MAX: Duration = Duration::from_secs(60);
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
