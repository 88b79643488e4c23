//! What the process takes of the machine, under the names that Prometheus' own clients use. Read from `/proc`; elsewhere
//! than on Linux there is none of it.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use super::exposition::{ExpositionText, MetricKind};
use crate::time::machine_uptime;

/// Figures of this process.
#[derive(Debug, Clone, Copy, PartialEq)]
struct ProcessFigures {
    cpu_seconds: f64,
    start_seconds: f64,
    threads: u64,
    virtual_bytes: u64,
    resident_bytes: u64,
}

/// Writes `process_*`. `open_fds` was counted before: with many connections that takes a while.
pub fn write_process_figures(out: &mut ExpositionText, open_fds: Option<u64>) {
    if let Some(figures) = read_figures() {
        let ProcessFigures { cpu_seconds, start_seconds, threads, virtual_bytes, resident_bytes } = figures;
        let name = "process_cpu_seconds_total";
        out.family(name, MetricKind::Counter, "Processor time of the process, user and system, in seconds");
        out.sample(name, &[], cpu_seconds);
        let name = "process_start_time_seconds";
        out.family(name, MetricKind::Gauge, "When the process started, in seconds since the Unix epoch");
        out.sample(name, &[], start_seconds);
        for (name, help, value) in [
            ("process_threads", "Threads of the process", threads),
            ("process_virtual_memory_bytes", "Virtual memory of the process", virtual_bytes),
            ("process_resident_memory_bytes", "Resident memory of the process", resident_bytes),
        ] {
            out.family(name, MetricKind::Gauge, help);
            out.sample(name, &[], value);
        }
    }
    for (name, help, value) in [
        ("process_open_fds", "Open file descriptors, counted every few seconds", open_fds),
        ("process_max_fds", "The most file descriptors that the process may have", fds_max()),
    ] {
        if let Some(value) = value {
            out.family(name, MetricKind::Gauge, help);
            out.sample(name, &[], value);
        }
    }
}

/// How many file descriptors are open. Where the kernel does not say, they are listed.
pub fn count_open_fds() -> Option<u64> {
    let dir = Path::new("/proc/self/fd");
    // Since Linux 6.2 the size of the directory is their number.
    match fs::metadata(dir).ok()?.len() {
        0 => Some(fs::read_dir(dir).ok()?.count() as u64),
        open => Some(open),
    }
}

fn fds_max() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call gets a valid pointer to a struct that lives across it.
    let is_known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 };
    is_known.then_some(limit.rlim_cur)
}

fn read_figures() -> Option<ProcessFigures> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // SAFETY: the calls only return a number.
    let (ticks, page) = unsafe { (libc::sysconf(libc::_SC_CLK_TCK), libc::sysconf(libc::_SC_PAGESIZE)) };
    parse_figures(&stat, boot_seconds()?, u32::try_from(ticks).ok()?, u64::try_from(page).ok()?)
}

/// When the machine started, in seconds since the Unix epoch. Not from `/proc/stat`: a service with `ProcSubset=pid` has
/// none. Found once, so that it does not waver.
fn boot_seconds() -> Option<f64> {
    static BOOT: OnceLock<Option<f64>> = OnceLock::new();
    *BOOT.get_or_init(|| {
        // Other systems have no `/proc/self/stat` either.
        let up = machine_uptime()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        Some(now.checked_sub(up)?.as_secs_f64())
    })
}

/// From `/proc/self/stat` (proc(5)).
fn parse_figures(stat: &str, boot_seconds: f64, ticks_per_s: u32, page_bytes: u64) -> Option<ProcessFigures> {
    // The second field is the name in parentheses, which may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    #[expect(clippy::cast_precision_loss, reason = "ticks are exact up to 2^53")]
    let seconds = |ticks: u64| ticks as f64 / f64::from(ticks_per_s);
    Some(ProcessFigures {
        cpu_seconds: seconds(number(14)? + number(15)?),
        threads: number(20)?,
        start_seconds: boot_seconds + seconds(number(22)?),
        virtual_bytes: number(23)?,
        resident_bytes: number(24)?.saturating_mul(page_bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_are_counted_behind_a_name_that_may_be_anything() {
        let stat = "7 (a) 1 (b) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 9 0 1000 4096000 300 18446744073709551615 1";
        let figures = parse_figures(stat, 1_700_000_000.0, 100, 4096).expect("whole");
        let expected = ProcessFigures {
            cpu_seconds: 2.0,
            start_seconds: 1_700_000_010.0,
            threads: 9,
            virtual_bytes: 4_096_000,
            resident_bytes: 300 * 4096,
        };
        assert_eq!(figures, expected);
        assert_eq!(parse_figures("7 (a) S", 1.0, 100, 4096), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_has_figures() {
        let figures = read_figures().expect("on Linux");
        assert!(figures.threads > 0 && figures.resident_bytes > 0);
        assert!(figures.virtual_bytes >= figures.resident_bytes);
        let open = count_open_fds().expect("on Linux");
        assert!(open >= 3 && fds_max().expect("there is one") >= open, "{open}");
    }
}
