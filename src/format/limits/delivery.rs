//! Delivery: the router, mailboxes, output, reads of the log, groups.

use super::log::TAIL_BYTES_MAX;
use super::mqtt::MQTT_FLIGHTS_MAX;

/// Payload bytes of retained messages that a subscriber gets at a time.
pub const RETAINED_PAGE_BYTES: usize = 256 << 10;
/// Bytes of the log read at a time to find where a replay begins.
pub const TAIL_READ_BYTES: usize = 4 << 20;
/// Records that `tail` goes back at most.
pub const TAIL_RECORDS_MAX: u64 = 1_000_000;
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
/// Wills of one datasource that were refused for a cause that passes, and wait to be published again.
pub const REFUSED_WILL_BYTES_PER_TENANT_MAX: u64 = 8 << 20;
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
