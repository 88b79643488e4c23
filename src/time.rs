//! Points in time as people read and write them: RFC 3339 in UTC. Internally a time is
//! [`TimeMicros`].
//!
//! In a cluster, how old something is and whether a key has ended is judged by the clock of the servers that all
//! gateways share ([`cluster_micros`]): a gateway whose own clock is wrong would end and remove for all of them. Between two
//! answers of the servers it goes on by a clock that nobody can set ([`running_micros`]).

use std::fmt;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};

use crate::message::{TimeMicros, now_micros};

/// What the cluster's clock said when the machine started, in microseconds since the Unix epoch; [`NO_CLUSTER`] if there is
/// none. A process is in one cluster at most.
static CLUSTER_BOOT: AtomicI64 = AtomicI64::new(NO_CLUSTER);
const NO_CLUSTER: i64 = i64::MIN;

/// Now, by the clock of the cluster's servers; without a cluster, by this machine's.
pub(crate) fn cluster_micros() -> TimeMicros {
    match CLUSTER_BOOT.load(Ordering::Relaxed) {
        NO_CLUSTER => now_micros(),
        boot => boot.saturating_add(running_micros()),
    }
}

/// Sets what the cluster's clock said when [`running_micros`] was `running`, in microseconds since the Unix epoch.
pub(crate) fn set_cluster_time(time: TimeMicros, running: i64) {
    CLUSTER_BOOT.store(time.saturating_sub(running), Ordering::Relaxed);
}

/// How long the machine has been running, also suspended; `None` where the system does not tell. Nobody can set this clock.
pub(crate) fn machine_uptime() -> Option<Duration> {
    #[cfg(target_os = "linux")]
    {
        let mut up = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the call writes one `timespec`, which is there.
        let failed = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut up) } != 0;
        let nanos = u32::try_from(up.tv_nsec).ok().filter(|_| !failed)?;
        Some(Duration::new(up.tv_sec.unsigned_abs(), nanos))
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// A clock in microseconds that nobody can set: that of [`machine_uptime`], or else one that begins with the process.
pub(crate) fn running_micros() -> i64 {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    let passed = machine_uptime().unwrap_or_else(|| BEGAN.elapsed());
    i64::try_from(passed.as_micros()).unwrap_or(i64::MAX)
}

/// A point in time, shown as RFC 3339 in UTC with six fraction digits:
/// `2026-11-23T09:28:39.000120Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rfc3339(pub TimeMicros);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = jiff::Timestamp::from_microsecond(self.0).unwrap_or(if self.0 < 0 {
            jiff::Timestamp::MIN
        } else {
            jiff::Timestamp::MAX
        });
        write!(f, "{time:.6}")
    }
}

impl Serialize for Rfc3339 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Reads an RFC 3339 time with any offset; digits below a microsecond are cut off. `None` for
/// any other text.
pub fn parse_time(text: &str) -> Option<TimeMicros> {
    let time: jiff::Timestamp = text.parse().ok()?;
    Some(time.as_microsecond())
}
