//! What a gateway needs of its machine: a disk with room that is quick to sync, files, a clock, certificates that last.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::DoctorFinding;
use crate::cli::out::{grouped, latency};
use crate::cli::time_argument::distance;
use crate::config::{Config, LogBackend, TlsConfig};
use crate::front::tls::{Tls, TlsFront};
use crate::gateway::fit_connections;
use crate::log::disk_room;
use crate::message::now_micros;

/// Writes that are timed.
const SYNC_SAMPLES: usize = 50;
/// A write that is as large as that of a small message.
const SYNC_BYTES: usize = 4 << 10;
/// A disk that takes longer to sync keeps devices waiting.
const SYNC_SLOW_MIN: Duration = Duration::from_millis(20);
/// Room without which a gateway stops taking messages soon.
const DISK_FREE_BYTES_MIN: u64 = 256 << 20;
/// How long before its end a certificate is warned of.
const CERTIFICATE_DAYS_MIN: i64 = 21;

/// The data directory: whether it can be used, its disk's room, and what a sync costs there.
pub(super) fn look_at_data(config: &Config) -> Vec<DoctorFinding> {
    const WHAT: &str = "data directory";
    let dir = config.data_dir.as_path();
    let Some(place) = existing(dir) else {
        let found = format!("{} cannot be looked at", dir.display());
        return vec![DoctorFinding::bad(WHAT, found, "name another one: data_dir, or --data-dir")];
    };
    let mut findings = vec![match dir.exists() {
        true if !dir.is_dir() => {
            let found = format!("{} is no directory", dir.display());
            DoctorFinding::bad(WHAT, found, "move it away, or name another one")
        }
        true => DoctorFinding::ok(WHAT, dir.display().to_string()),
        false => DoctorFinding::ok(WHAT, format!("{} is not there yet: serve makes it", dir.display())),
    }];
    findings.push(look_at_room(config, &place));
    findings.push(look_at_sync(&place));
    findings
}

/// The directory itself, or the nearest one above it that is there.
fn existing(dir: &Path) -> Option<PathBuf> {
    let dir = std::path::absolute(dir).ok()?;
    dir.ancestors().find(|above| above.exists()).map(Path::to_owned).filter(|found| found.exists())
}

fn look_at_room(config: &Config, place: &Path) -> DoctorFinding {
    const WHAT: &str = "disk";
    let Ok((free, total)) = disk_room(place) else {
        return DoctorFinding::warn(
            WHAT,
            "its room cannot be read",
            "see that it has room for log.retention_bytes",
        );
    };
    let mib = |bytes: u64| format!("{} MiB", grouped(bytes >> 20));
    let found = format!("{} of {} free", mib(free), mib(total));
    let is_embedded = config.log.backend == LogBackend::Embedded;
    if free < DISK_FREE_BYTES_MIN {
        return DoctorFinding::bad(
            WHAT,
            found,
            "make room: on a full disk nothing more is taken, and devices wait",
        );
    }
    // What the log has already counts as room for it.
    let log = if is_embedded { directory_bytes(&place.join("log")) } else { 0 };
    match is_embedded && free.saturating_add(log) < config.log.retention_bytes {
        true => DoctorFinding::warn(
            WHAT,
            format!("{found}; the log may grow to {}", mib(config.log.retention_bytes)),
            "make room, or lower log.retention_bytes",
        ),
        false => DoctorFinding::ok(WHAT, found),
    }
}

fn directory_bytes(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|file| file.len()).sum()
}

fn look_at_sync(place: &Path) -> DoctorFinding {
    const WHAT: &str = "sync";
    let median = match sync_median(place) {
        Ok(median) => median,
        Err(error) => {
            let found = format!("nothing can be written to {}: {error}", place.display());
            return DoctorFinding::bad(WHAT, found, "give the gateway's user the right to write there");
        }
    };
    let nanos = u64::try_from(median.as_nanos()).unwrap_or(u64::MAX);
    let found = format!(
        "a durable write takes {} (median of {SYNC_SAMPLES}); no acknowledgement comes sooner",
        latency(nanos)
    );
    match median < SYNC_SLOW_MIN {
        true => DoctorFinding::ok(WHAT, found),
        false => DoctorFinding::warn(
            WHAT,
            found,
            "put the data directory on a disk of its own, best an SSD with power-loss protection",
        ),
    }
}

/// What `fdatasync` behind a small write into room that is there takes.
fn sync_median(place: &Path) -> io::Result<Duration> {
    use std::os::unix::fs::FileExt;
    let mut file: File = tempfile::tempfile_in(place)?;
    let piece = [0x5a; SYNC_BYTES];
    for _ in 0..SYNC_SAMPLES {
        file.write_all(&piece)?;
    }
    file.sync_all()?;
    let mut taken = Vec::with_capacity(SYNC_SAMPLES);
    for at in 0..SYNC_SAMPLES {
        let began = Instant::now();
        file.write_all_at(&piece, (at * SYNC_BYTES) as u64)?;
        file.sync_data()?;
        taken.push(began.elapsed());
    }
    taken.sort();
    Ok(taken[SYNC_SAMPLES / 2])
}

/// The limit on open files, and whether the connections that are configured fit.
pub(super) fn look_at_open_files(config: &Config) -> DoctorFinding {
    const WHAT: &str = "open files";
    let mut fitted = config.clone();
    let limit = fit_connections(&mut fitted);
    let (mqtt, http) = (fitted.mqtt.connections_max, fitted.http.connections_max);
    match (mqtt, http) == (config.mqtt.connections_max, config.http.connections_max) {
        true => DoctorFinding::ok(WHAT, format!("{} may be open: all connections fit", grouped(limit))),
        false => DoctorFinding::warn(
            WHAT,
            format!(
                "{} may be open: {} connections over MQTT and {} over HTTP fit, instead of {} and {}",
                grouped(limit),
                grouped(mqtt as u64),
                grouped(http as u64),
                grouped(config.mqtt.connections_max as u64),
                grouped(config.http.connections_max as u64)
            ),
            "raise the limit for the gateway: LimitNOFILE= (systemd), ulimit -n",
        ),
    }
}

/// Whether the clock is kept right. A gateway on this machine has the same.
pub(super) fn look_at_clock() -> Option<DoctorFinding> {
    const WHAT: &str = "clock";
    // SAFETY: all fields are numbers, for which zero is a value; no mode is set, so that nothing is changed.
    let state = unsafe {
        let mut time: libc::timex = std::mem::zeroed();
        libc::adjtimex(&raw mut time)
    };
    let now = crate::time::Rfc3339(now_micros());
    match state {
        // Not allowed to ask.
        -1 => None,
        libc::TIME_ERROR => Some(DoctorFinding::warn(
            WHAT,
            format!("{now} (UTC), and nothing keeps it right"),
            "run chrony or systemd-timesyncd: records have the time of this clock, and keys end by it",
        )),
        _ => Some(DoctorFinding::ok(WHAT, format!("{now} (UTC), kept right"))),
    }
}

/// The certificates that are served: whether they can be, and how long they last.
pub(super) fn look_at_certificates(config: &Config) -> Vec<DoctorFinding> {
    let fronts = [("MQTT", TlsFront::Mqtt, &config.mqtt.tls), ("HTTP", TlsFront::Http, &config.http.tls)];
    let served = fronts.into_iter().filter(|(_, _, tls)| tls.is_served());
    served
        .map(|(name, front, tls)| look_at_certificate(&format!("certificate of {name}"), front, tls))
        .collect()
}

fn look_at_certificate(what: &str, front: TlsFront, tls: &TlsConfig) -> DoctorFinding {
    let standing = match Tls::load(front, tls.clone()) {
        Ok(loaded) => loaded.standing(),
        Err(error) => return DoctorFinding::bad(what, error.to_string(), "correct the files that it names"),
    };
    let Some(ends_at) = standing.ends_at else {
        let found = format!("when {} ends cannot be read", tls.certificate.display());
        return DoctorFinding::warn(what, found, "see that it is a usual certificate");
    };
    let (now, end) = (now_micros(), crate::time::Rfc3339(ends_at));
    let days = (ends_at - now) / 86_400_000_000;
    if ends_at <= now {
        return DoctorFinding::bad(
            what,
            format!("it has ended at {end}"),
            "renew it: clients refuse it, and the gateway takes the new files by itself",
        );
    }
    let found = format!("it lasts {}, until {end}", distance(now, ends_at));
    match days < CERTIFICATE_DAYS_MIN {
        true => DoctorFinding::warn(what, found, "see that it is renewed in time"),
        false => DoctorFinding::ok(what, found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::FindingGrade;

    #[test]
    fn a_disk_is_measured_where_the_data_is_or_will_be() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = Config { data_dir: dir.path().join("not/yet"), ..Config::default() };
        let findings = look_at_data(&config);
        assert_eq!(findings.len(), 3);
        assert!(findings[0].found.contains("not there yet"), "{findings:?}");
        assert!(findings[2].found.contains("a durable write takes"), "{findings:?}");
        let left: Vec<_> = std::fs::read_dir(dir.path()).expect("readable").collect();
        assert!(left.is_empty(), "{left:?}");
        std::fs::write(dir.path().join("file"), "").expect("written");
        let config = Config { data_dir: dir.path().join("file"), ..Config::default() };
        assert_eq!(look_at_data(&config)[0].grade, FindingGrade::Bad);
    }
}
