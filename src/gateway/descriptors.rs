//! File descriptors: how many the process may have, and that connections leave enough of them to the log and the
//! stores. Without that a crowd of strangers could take the last one, and the log could not begin its next
//! segment.

use tracing::warn;

use crate::config::{Config, LogBackend};
use crate::limits::{HTTP_ADMIN_CONNECTIONS_MAX, MQTT_PLACE_WAITERS_MAX};

/// What listeners, databases with their readers, connections to NATS, threads and files that are open for a
/// moment need at most, and connections that wait for a place.
const DESCRIPTORS_BESIDE_CONNECTIONS: u64 = 64 + MQTT_PLACE_WAITERS_MAX as u64;
/// The part of the limit (one in so many) that the log's segments may take from the connections.
const SEGMENT_SHARE: u64 = 4;
/// Connections that are always allowed, however low the limit is.
const CONNECTIONS_MIN: u64 = 16;
/// The least part (one in so many) that HTTP keeps, by which the gateway is managed.
const HTTP_SHARE_MIN: usize = 8;

/// Raises the limit on open files to the system's maximum: each connection needs one. Returns the limit.
fn raise_file_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a valid pointer to a struct that lives across them.
    let (is_known, is_raised) = unsafe {
        let is_known = libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0;
        let raised = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
        (is_known, is_known && libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) == 0)
    };
    if !is_raised {
        warn!("cannot raise the limit on open files; fewer connections fit");
    }
    match (is_known, is_raised) {
        (false, _) => u64::MAX,
        (true, false) => limit.rlim_cur,
        (true, true) => limit.rlim_max,
    }
}

/// Raises the limit on open files, and lowers the maxima of connections that it does not allow. Returns the limit.
pub(crate) fn fit_connections(config: &mut Config) -> u64 {
    let limit = raise_file_limit();
    let segments_max = match config.log.backend {
        LogBackend::Embedded => config.log.retention_bytes / config.log.segment_bytes + 2,
        LogBackend::Jetstream => 0,
    };
    let wanted = [config.mqtt.connections_max, config.http.connections_max];
    // The administration's own connections keep theirs.
    let of_admin = if config.http.admin.listen.is_some() { HTTP_ADMIN_CONNECTIONS_MAX as u64 } else { 0 };
    let [mqtt, http] = allowed_connections(limit.saturating_sub(of_admin), segments_max, wanted);
    if [mqtt, http] == wanted {
        return limit;
    }
    warn!(
        open_files_max = limit,
        segments_max,
        mqtt_connections_max = mqtt,
        http_connections_max = http,
        "mqtt.connections_max and http.connections_max are lowered: the limit on open files allows no more beside the \
         log and the stores. Raise it (LimitNOFILE, ulimit -n) to serve more"
    );
    (config.mqtt.connections_max, config.http.connections_max) = (mqtt, http);
    limit
}

/// How many connections of MQTT and HTTP fit into `limit`, if so many of each are wanted.
fn allowed_connections(limit: u64, segments_max: u64, wanted: [usize; 2]) -> [usize; 2] {
    let reserve = DESCRIPTORS_BESIDE_CONNECTIONS + segments_max.min(limit / SEGMENT_SHARE);
    let room = usize::try_from(limit.saturating_sub(reserve).max(CONNECTIONS_MIN)).unwrap_or(usize::MAX);
    let [mqtt, http] = wanted;
    if mqtt.saturating_add(http) <= room {
        return wanted;
    }
    let share = room as u128 * http as u128 / (mqtt as u128 + http as u128).max(1);
    let share = usize::try_from(share).unwrap_or(room).max(room / HTTP_SHARE_MIN);
    let http = share.min(http);
    [mqtt.min(room - http), http]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_to_the_log_and_the_stores() {
        let wanted = [100_000, 10_000];
        assert_eq!(allowed_connections(1 << 20, 258, wanted), wanted);
        assert_eq!(allowed_connections(u64::MAX, 258, wanted), wanted);
        assert_eq!(allowed_connections(256, 258, wanted), [84, 12]);
        assert_eq!(allowed_connections(256, 0, [100, 60]), [100, 60], "exactly as many as fit");
        assert_eq!(allowed_connections(256, 0, [100, 61]), [100, 60]);
        assert_eq!(allowed_connections(256, 0, [0, 1000]), [0, 160]);
        assert_eq!(allowed_connections(20, 258, wanted), [14, 2], "however low the limit is");
        for limit in (80..120_000).step_by(97) {
            let [mqtt, http] = allowed_connections(limit, 258, wanted);
            let left = limit.saturating_sub((mqtt + http) as u64);
            assert!(left >= DESCRIPTORS_BESIDE_CONNECTIONS.min(limit - 16), "{limit}: {mqtt} and {http}");
            assert!(http >= 2 && mqtt >= http, "{limit}: {mqtt} and {http}");
        }
    }
}
