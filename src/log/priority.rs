//! The priority of the commit threads. Every acknowledgement waits for them, and they run for some microseconds at a
//! time: on a busy machine the wait for a processor, not the disk, is the tail of its latency.
//!
//! Where the limits allow, they get the lowest real-time priority while they sync and answer, for a second after one of
//! them had to wait long for a processor: on a machine with time to spare it gains nothing, and setting it costs as much
//! as a third of a small commit. They put commits together without it: that takes longer, and a thread that is let in
//! at the first message makes many small commits. While a tenant is in the slow lane they have it all the time: what that
//! tenant brings is cut to small pieces, and nobody else is to wait until one of them is let in. It cannot starve the machine: a thread that computes for long without a pause gets normal priority again
//! (`RLIMIT_RTTIME`, `SIGXCPU`), and no child inherits it. Besides they ask for a short time slice, with which the
//! scheduler lets a thread in sooner (EEVDF, Linux 6.12).

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{io, mem, ptr};

use crate::scheduler::{SchedulerAttributes, is_crowded};

/// The lowest real-time priority: below whoever else has one.
const COMMIT_PRIORITY: libc::c_int = 1;
/// How long a real-time thread may compute without a pause, in microseconds. A commit takes some thousands.
const COMPUTE_WITHOUT_PAUSE_MAX_US: libc::rlim_t = 200_000;
/// The time slice without real-time priority, in nanoseconds; the shortest that there is.
const COMMIT_SLICE_NS: u64 = 100_000;

/// A thread that waited for a processor for so long is on a busy machine.
const BUSY_WAIT: Duration = Duration::from_millis(5);
/// For how long the machine counts as busy then.
const BUSY_TIME: Duration = Duration::from_secs(1);

static COMPUTE_LIMIT: Once = Once::new();
/// A real-time thread has computed for too long.
static WAS_LOWERED: AtomicBool = AtomicBool::new(false);

/// What the operating system allows a commit thread.
pub(super) struct CommitPriority {
    may_be_real_time: bool,
    /// With a short time slice, if the kernel has those.
    normal: Option<SchedulerAttributes>,
    /// Until when the machine counts as busy.
    busy_until: Option<Instant>,
    is_raised: bool,
    /// It has real-time priority between its turns too.
    is_kept: bool,
}

impl CommitPriority {
    /// Finds out what the calling thread may have. It has normal priority then, with a short slice if there are any.
    pub(super) fn find() -> Self {
        COMPUTE_LIMIT.call_once(limit_computing);
        let may_be_real_time = set_policy(libc::SCHED_RR, COMMIT_PRIORITY).is_ok();
        if may_be_real_time {
            let _ = set_policy(libc::SCHED_OTHER, 0);
        }
        Self {
            may_be_real_time,
            normal: SchedulerAttributes::set_slice(COMMIT_SLICE_NS),
            busy_until: None,
            is_raised: false,
            is_kept: false,
        }
    }

    /// Notes how long the thread waited for a processor.
    pub(super) fn note_wait(&mut self, waited: Duration) {
        if waited >= BUSY_WAIT {
            self.busy_until = Some(Instant::now() + BUSY_TIME);
        }
    }

    /// Gives the calling thread real-time priority for good, as long as somebody takes more of the processors than others.
    pub(super) fn raise_in_crowd(&mut self) {
        if !self.may_be_real_time || self.is_kept == is_crowded() {
            return;
        }
        self.is_kept = !self.is_kept;
        if self.is_kept {
            self.is_raised = set_policy(libc::SCHED_RR, COMMIT_PRIORITY).is_ok();
        } else {
            self.lower();
        }
    }

    /// Gives the calling thread real-time priority, if the machine is busy and it may have that.
    pub(super) fn raise(&mut self) {
        if self.may_be_real_time && !self.is_kept && self.busy_until.is_some() {
            self.busy_until = self.busy_until.filter(|until| Instant::now() < *until);
            self.is_raised = self.busy_until.is_some() && set_policy(libc::SCHED_RR, COMMIT_PRIORITY).is_ok();
        }
    }

    /// Gives the calling thread normal priority again, unless it is kept.
    pub(super) fn lower(&mut self) {
        if !self.is_kept && std::mem::take(&mut self.is_raised) {
            let _ = set_policy(libc::SCHED_OTHER, 0);
            if let Some(normal) = &self.normal {
                normal.set();
            }
        }
    }

    /// What it is, for an operator.
    pub(super) fn describe(&self) -> &'static str {
        match (self.may_be_real_time, &self.normal) {
            (true, _) => "real-time (SCHED_RR 1) while they sync and answer on a busy machine",
            (false, Some(_)) => {
                "normal with a short time slice; LimitRTPRIO=1 or CAP_SYS_NICE would allow real-time"
            }
            (false, None) => "normal; LimitRTPRIO=1 or CAP_SYS_NICE would allow real-time",
        }
    }
}

/// Whether a real-time thread has computed for too long since the last call, and has normal priority now.
pub(super) fn take_lowered() -> bool {
    WAS_LOWERED.swap(false, Ordering::Relaxed)
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::scheduler::note_crowd;

    fn policy() -> libc::c_int {
        // SAFETY: no memory is touched. 0 is the calling thread.
        let policy = unsafe { libc::syscall(libc::SYS_sched_getscheduler, 0) };
        libc::c_int::try_from(policy).expect("small") & !libc::SCHED_RESET_ON_FORK
    }

    #[test]
    fn a_real_time_thread_that_computes_without_a_pause_gets_normal_priority_and_the_process_lives() {
        let computed = std::thread::spawn(|| {
            let mut priority = CommitPriority::find();
            priority.raise();
            assert_eq!(policy(), libc::SCHED_OTHER, "nobody waits for a processor");
            priority.note_wait(BUSY_WAIT);
            priority.raise();
            let was = policy();
            if !priority.may_be_real_time {
                return None;
            }
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
    fn while_somebody_takes_more_than_others_the_priority_stays_between_commits() {
        let seen = std::thread::spawn(|| {
            let mut priority = CommitPriority::find();
            let slice = || SchedulerAttributes::get().map(|attributes| attributes.slice_ns());
            let before = slice();
            note_crowd(Duration::from_secs(1));
            priority.raise_in_crowd();
            priority.raise();
            priority.lower();
            let kept = policy();
            let deadline = Instant::now() + Duration::from_secs(60);
            while is_crowded() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
            priority.raise_in_crowd();
            (priority.may_be_real_time, kept, policy(), before == slice())
        });
        let (may, kept, after, is_same_slice) = seen.join().expect("no panic");
        assert_eq!(kept, if may { libc::SCHED_RR } else { libc::SCHED_OTHER });
        assert!(after == libc::SCHED_OTHER && is_same_slice);
    }

    #[test]
    fn a_thread_has_normal_priority_and_its_short_slice_again_after_each_commit() {
        let seen = std::thread::spawn(|| {
            let mut priority = CommitPriority::find();
            priority.note_wait(BUSY_WAIT);
            let before = SchedulerAttributes::get().map(|attributes| attributes.slice_ns());
            priority.raise();
            priority.lower();
            (policy(), before, SchedulerAttributes::get().map(|attributes| attributes.slice_ns()))
        });
        let (policy, before, after) = seen.join().expect("no panic");
        assert_eq!((policy, after), (libc::SCHED_OTHER, before));
    }
}
