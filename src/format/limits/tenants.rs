//! The limits of keys and datasources that operators set, and their defaults.

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
