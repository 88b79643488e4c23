//! The processor time that the threads of a gateway have taken, by what they are for.

use std::time::Duration;

use super::Gateway;

/// What threads have taken since the gateway started.
#[derive(Debug)]
pub struct ThreadTimes {
    /// Those on which clients are served.
    pub of_workers: Duration,
    /// Those on which clients are served that take more than others: they have low priority.
    pub of_slow_lane: Duration,
}

impl ThreadTimes {
    /// Those of `gateway`, as the kernel counts them. Panics if a thread of the slow lane has the usual priority.
    pub fn of(gateway: &Gateway) -> Self {
        let mut times = Self { of_workers: Duration::ZERO, of_slow_lane: Duration::ZERO };
        // SAFETY: it takes integers only. Whoever runs the tests may have lowered or raised them.
        let usual = i64::from(unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) });
        let tasks = std::fs::read_dir(format!("/proc/{}/task", gateway.pid())).expect("a process");
        for task in tasks {
            // A thread may have ended since.
            let Ok(stat) = std::fs::read_to_string(task.expect("listed").path().join("stat")) else {
                continue;
            };
            let (name, rest) =
                stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(") ")).expect("a stat");
            let fields: Vec<&str> = rest.split(' ').collect();
            let number = |nth: usize| fields[nth].parse::<i64>().expect("a number");
            // The state is the third field of proc_pid_stat(5), and the first here.
            let (ticks, nice) = (number(11) + number(12), number(16));
            // SAFETY: it takes an integer only.
            let ticks_per_s = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
            let micros = u64::try_from(ticks * 1_000_000 / ticks_per_s).expect("not negative");
            let time = Duration::from_micros(micros);
            if name.starts_with("slow-lane") {
                assert!(nice > usual.min(18), "{name} has niceness {nice}, where {usual} is usual");
                times.of_slow_lane += time;
            } else if name.starts_with("tokio-") {
                times.of_workers += time;
            }
        }
        times
    }
}
