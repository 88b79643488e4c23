//! Memory of clients, and changes that wait for other nodes.

use std::time::Duration;

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
pub const CATCH_UP_MAX: Duration = Duration::from_secs(5);
/// When to retry after a transient refusal.
pub const RETRY_AFTER: Duration = Duration::from_secs(5);
/// How long a call that ends a key waits for its last connection to close.
pub const REVOCATION_WAIT_MAX: Duration = Duration::from_secs(5);
