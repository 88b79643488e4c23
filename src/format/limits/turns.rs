//! Turns: what a tenant or a stranger gets of processors and disk while others want it too.

use std::time::Duration;

/// For how long the processor time of tenants is counted before it is looked at.
pub const PROCESSOR_WINDOW: Duration = Duration::from_millis(10);
/// How long a tenant counts as somebody who wants something, after it was last served.
pub const TENANT_ACTIVE: Duration = Duration::from_millis(300);
/// How long a tenant is served at low priority for each [`PROCESSOR_WINDOW`] in which it was over its share of the
/// processors.
pub const SLOW_LANE_STEP: Duration = Duration::from_millis(200);
/// The longest of these stays.
pub const SLOW_LANE_STAY: Duration = Duration::from_secs(2);
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
pub const SLOW_DISK_PAUSE_MAX: Duration = Duration::from_secs(2);
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
pub const EARLY_KEY_WAIT_MAX: Duration = Duration::from_millis(250);
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
