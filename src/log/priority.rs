//! The priority of the commit threads. Every acknowledgement waits for them, and they run for some microseconds at a
//! time: on a busy machine the wait for a processor, not the disk, is the tail of its latency.
//!
//! Where the limits allow, they get the lowest real-time priority. It cannot starve the machine: a thread that
//! computes for long without a pause gets normal priority again (`RLIMIT_RTTIME`, `SIGXCPU`), and no child inherits
//! it. Else they ask for a short time slice, with which the scheduler lets a thread in sooner (EEVDF, Linux 6.12).

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{io, mem, ptr};

/// The lowest real-time priority: below whoever else has one.
const COMMIT_PRIORITY: libc::c_int = 1;
/// How long a real-time thread may compute without a pause, in microseconds. A commit takes some thousands.
const COMPUTE_WITHOUT_PAUSE_MAX_US: libc::rlim_t = 200_000;
/// The time slice without real-time priority, in nanoseconds; the shortest that there is.
const COMMIT_SLICE_NS: u64 = 100_000;

static COMPUTE_LIMIT: Once = Once::new();
/// A real-time thread has computed for too long.
static WAS_LOWERED: AtomicBool = AtomicBool::new(false);

/// What a thread got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CommitPriority {
    RealTime,
    ShortSlice,
    Normal,
}

impl CommitPriority {
    /// Raises the priority of the calling thread as far as the operating system allows.
    pub(super) fn raise() -> Self {
        if raise_to_real_time().is_ok() {
            Self::RealTime
        } else if shorten_slice() {
            Self::ShortSlice
        } else {
            Self::Normal
        }
    }

    /// What it is, for an operator.
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::RealTime => "real-time (SCHED_RR 1)",
            Self::ShortSlice => {
                "normal with a short time slice; LimitRTPRIO=1 or CAP_SYS_NICE would allow real-time"
            }
            Self::Normal => "normal; LimitRTPRIO=1 or CAP_SYS_NICE would allow real-time",
        }
    }
}

/// Whether a real-time thread has computed for too long since the last call, and has normal priority now.
pub(super) fn take_lowered() -> bool {
    WAS_LOWERED.swap(false, Ordering::Relaxed)
}

fn raise_to_real_time() -> io::Result<()> {
    COMPUTE_LIMIT.call_once(limit_computing);
    set_policy(libc::SCHED_RR, COMMIT_PRIORITY)
}

/// Sets the calling thread's policy. Only a system call, so that a signal handler may do it.
fn set_policy(policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    // SAFETY: all zeros is a valid `sched_param`.
    let mut param: libc::sched_param = unsafe { mem::zeroed() };
    param.sched_priority = priority;
    let policy = policy | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the call reads `param` alone. 0 is the calling thread.
    let result = unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const param) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has the kernel send a signal to a real-time thread that computes for too long, and lowers its priority then.
fn limit_computing() {
    extern "C" fn lower(_: libc::c_int) {
        WAS_LOWERED.store(true, Ordering::Relaxed);
        let _ = set_policy(libc::SCHED_OTHER, 0);
    }
    // SAFETY: all zeros is a valid `sigaction`; the handler makes a system call and stores to an atomic,
    // which a signal handler may; the limits are read and written in place.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = lower as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGXCPU, &raw const action, ptr::null_mut());
        let mut limit: libc::rlimit = mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_RTTIME, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_cur.min(COMPUTE_WITHOUT_PAUSE_MAX_US);
            libc::setrlimit(libc::RLIMIT_RTTIME, &raw const limit);
        }
    }
}

/// `struct sched_attr` of Linux, first version.
#[repr(C)]
#[derive(Default)]
struct SchedulerAttributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Asks for a short time slice. Returns whether the kernel took it.
fn shorten_slice() -> bool {
    let size = u32::try_from(size_of::<SchedulerAttributes>()).expect("48");
    let mut attributes = SchedulerAttributes { size, ..SchedulerAttributes::default() };
    // SAFETY: the calls read and write `attributes`, of the size that they are told. 0 is the calling thread.
    unsafe {
        let attributes = &raw mut attributes;
        if libc::syscall(libc::SYS_sched_getattr, 0, attributes, size, 0) != 0 {
            return false;
        }
        (*attributes).runtime = COMMIT_SLICE_NS;
        // A kernel that knows no slices takes the call and leaves it at that.
        libc::syscall(libc::SYS_sched_setattr, 0, attributes, 0) == 0
            && libc::syscall(libc::SYS_sched_getattr, 0, attributes, size, 0) == 0
            && (*attributes).runtime == COMMIT_SLICE_NS
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn policy() -> libc::c_int {
        // SAFETY: no memory is touched. 0 is the calling thread.
        let policy = unsafe { libc::syscall(libc::SYS_sched_getscheduler, 0) };
        libc::c_int::try_from(policy).expect("small") & !libc::SCHED_RESET_ON_FORK
    }

    #[test]
    fn a_real_time_thread_that_computes_without_a_pause_gets_normal_priority_and_the_process_lives() {
        let computed = std::thread::spawn(|| {
            if CommitPriority::raise() != CommitPriority::RealTime {
                return None;
            }
            let was = policy();
            let deadline = Instant::now() + Duration::from_secs(20);
            while policy() == libc::SCHED_RR && Instant::now() < deadline {}
            Some((was, policy()))
        });
        if let Some(policies) = computed.join().expect("no panic") {
            assert_eq!(policies, (libc::SCHED_RR, libc::SCHED_OTHER));
            assert!(take_lowered());
        }
    }

    #[test]
    fn a_thread_that_gets_no_real_time_priority_asks_for_a_short_slice_and_goes_on_without_one() {
        // Whether the kernel has slices is its matter; asking for one is no harm.
        let asked = std::thread::spawn(|| (shorten_slice(), policy())).join().expect("no panic");
        assert_eq!(asked.1, libc::SCHED_OTHER);
    }
}
