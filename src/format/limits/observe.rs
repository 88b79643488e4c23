//! Refusals, spans and metrics.

use std::time::Duration;

/// Shards of the list of refusals, each with its own lock. An address always has the same shard.
pub const REFUSALS_SHARDS: usize = 16;
/// Sources of refusals that a shard lists; a further one evicts the one silent for longest.
pub const REFUSALS_PER_SHARD_MAX: usize = 256;
/// Bytes shown of a client's identifier.
pub const REFUSALS_CLIENT_BYTES_MAX: usize = 64;
/// Messages that have a span in one second, shared among their datasources; those beyond have none.
pub const SPANS_PER_S_MAX: u64 = 1_000;
/// Messages of one datasource in one read or request that have a span of their own.
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
pub const TRAFFIC_COMPARE_INTERVAL: Duration = Duration::from_secs(60);
/// Refusals returned by a query that gives no limit.
pub const REFUSALS_DEFAULT: usize = 100;
