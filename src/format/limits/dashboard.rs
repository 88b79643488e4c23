//! The dashboard: sessions of browsers, and the live view.

use std::time::Duration;

/// Browser sessions that one key may have at once.
pub const BROWSER_SESSIONS_PER_KEY_MAX: usize = 16;
/// Browser sessions that there may be at once.
pub const BROWSER_SESSIONS_MAX: usize = 1_024;
/// How long a browser session lasts that is not used.
pub const BROWSER_SESSION_IDLE_MAX: Duration = Duration::from_secs(3_600);
/// How long a browser session lasts at most.
pub const BROWSER_SESSION_AGE_MAX: Duration = Duration::from_secs(12 * 3_600);
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
