//! What a thread asks of the operating system's scheduler: a lower priority, or another time slice than usual.

use std::cell::Cell;
use std::ptr;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tracing::warn;

thread_local! {
    static IS_LOWERED: Cell<bool> = const { Cell::new(false) };
    static WAITED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Whether the calling thread has a lower priority than usual: it should hold nothing that others wait for.
pub fn is_lowered() -> bool {
    IS_LOWERED.get()
}

/// Until when threads that everybody waits for are to be let in at once, in microseconds since the first call.
static CROWDED_UNTIL_US: AtomicU64 = AtomicU64::new(0);
static CLOCK_BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);

fn clock_us() -> u64 {
    u64::try_from(CLOCK_BEGAN.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// Notes that somebody takes more of the processors than others, for so long from now on.
pub fn note_crowd(time: Duration) {
    let time = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    CROWDED_UNTIL_US.fetch_max(clock_us().saturating_add(time), Ordering::Relaxed);
}

/// Whether somebody takes more of the processors than others.
pub fn is_crowded() -> bool {
    let until = CROWDED_UNTIL_US.load(Ordering::Relaxed);
    until > 0 && clock_us() < until
}

/// How long a thread of low priority waits until it looks again whether a lock is free.
const POLITE_LOCK_PAUSE: Duration = Duration::from_micros(50);

/// Locks what threads of every priority lock, for a moment. A lock that is fair is handed to a thread that waits for it,
/// and one of low priority has it then until it gets a processor, on a busy machine for a tenth of a second. So such a
/// thread does not stand in line: it takes the lock when it is free and it runs.
#[inline]
pub fn polite_lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    if !is_lowered() {
        return mutex.lock();
    }
    wait_politely(|| mutex.try_lock())
}

/// As [`polite_lock`], to read.
#[inline]
pub fn polite_read<T: ?Sized>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    if !is_lowered() {
        return lock.read();
    }
    wait_politely(|| lock.try_read())
}

/// As [`polite_lock`], to write.
#[inline]
pub fn polite_write<T: ?Sized>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    if !is_lowered() {
        return lock.write();
    }
    wait_politely(|| lock.try_write())
}

#[cold]
fn wait_politely<T>(try_lock: impl Fn() -> Option<T>) -> T {
    loop {
        match try_lock() {
            Some(locked) => return locked,
            None => std::thread::sleep(POLITE_LOCK_PAUSE),
        }
    }
}

/// Notes that the calling thread has waited for the disk in the middle of a task.
pub fn note_waited(waited: Duration) {
    WAITED.set(WAITED.get() + waited);
}

/// How long the calling thread has waited so.
#[inline]
pub fn waited() -> Duration {
    WAITED.get()
}

/// The processor time that the calling thread has had. Costs about half a microsecond: the kernel is asked.
pub fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one `timespec`, which is there.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The time slice of a thread of low priority, in nanoseconds. Longer than the usual one, so that whoever has that is let in
/// at once; and not by much, because a thread may make up for two slices that it was kept waiting, and nobody is let in
/// meanwhile.
const LOWERED_SLICE_NS: u64 = 3_000_000;

/// Makes the calling thread's priority lower by `nice` than that of the process's first thread, and has it give way at once
/// to threads of the usual priority: it does not take a processor from them when it is woken (`SCHED_BATCH`).
pub fn lower_priority(nice: u8) {
    if nice == 0 {
        return;
    }
    IS_LOWERED.set(true);
    #[cfg(target_os = "linux")]
    {
        // SAFETY: no memory is involved. On Linux, process 0 is the calling thread, and the process's own number is its
        // first thread.
        let result = unsafe {
            let usual = libc::getpriority(libc::PRIO_PROCESS, libc::getpid().cast_unsigned());
            libc::setpriority(libc::PRIO_PROCESS, 0, (usual + i32::from(nice)).min(19))
        };
        if result != 0 {
            let error = std::io::Error::last_os_error();
            let thread = std::thread::current();
            warn!(%error, nice, thread = thread.name(), "a thread keeps its priority");
        }
    }
    // An older kernel has no slices, and takes the policy all the same.
    let _ = SchedulerAttributes::set_batch(LOWERED_SLICE_NS);
}

/// `struct sched_attr` of Linux, first version.
#[repr(C)]
#[derive(Default)]
pub struct SchedulerAttributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

impl SchedulerAttributes {
    /// Those of the calling thread.
    pub fn get() -> Option<Self> {
        let mut attributes = Self::default();
        // SAFETY: the call writes no more to `attributes` than it is told. 0 is the calling thread.
        let result =
            unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size_of::<Self>(), 0) };
        (result == 0).then_some(attributes)
    }

    /// Gives them to the calling thread. Returns whether the kernel took them.
    pub fn set(&self) -> bool {
        // SAFETY: the call reads `self`, whose size it has. 0 is the calling thread.
        unsafe { libc::syscall(libc::SYS_sched_setattr, 0, ptr::from_ref(self), 0) == 0 }
    }

    /// The time slice, in nanoseconds.
    pub fn slice_ns(&self) -> u64 {
        self.runtime
    }

    /// Has the calling thread take no processor from others when it is woken, and asks for another time slice for it. Returns
    /// whether the kernel took it.
    pub fn set_batch(slice_ns: u64) -> bool {
        let policy = libc::SCHED_BATCH.cast_unsigned();
        Self::get().is_some_and(|now| Self { policy, runtime: slice_ns, ..now }.set())
    }

    /// Asks for another time slice for the calling thread (EEVDF, Linux 6.12): a thread with a shorter one is let in
    /// sooner, and at once where one with a longer slice runs. `None` if the kernel has none: it takes the call then,
    /// and leaves it at that.
    pub fn set_slice(slice_ns: u64) -> Option<Self> {
        let wanted = Self { runtime: slice_ns, ..Self::get()? };
        let is_taken = wanted.set() && Self::get()?.slice_ns() == slice_ns;
        is_taken.then_some(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_of_low_priority_is_never_handed_a_lock_that_it_waits_for() {
        let (mutex, rw_lock) = (Mutex::new(()), RwLock::new(()));
        let (held, read) = (mutex.lock(), rw_lock.write());
        std::thread::scope(|scope| {
            let low = scope.spawn(|| {
                lower_priority(1);
                drop(polite_lock(&mutex));
                drop(polite_write(&rw_lock));
                drop(polite_read(&rw_lock));
            });
            for _ in 0..100 {
                std::thread::sleep(Duration::from_millis(1));
                assert!(!low.is_finished());
            }
            // As fair as it gets: whoever stands in line has it now, and nobody does.
            parking_lot::MutexGuard::unlock_fair(held);
            parking_lot::RwLockWriteGuard::unlock_fair(read);
            low.join().expect("it takes them when they are free");
        });
    }

    #[test]
    fn a_thread_of_low_priority_knows_that_it_is_one() {
        let lowered = std::thread::spawn(|| {
            lower_priority(1);
            is_lowered()
        });
        assert!(lowered.join().expect("no panic") && !is_lowered());
    }

    #[test]
    fn a_thread_of_low_priority_takes_no_processor_from_others_when_it_is_woken() {
        let lowered = std::thread::spawn(|| {
            lower_priority(1);
            SchedulerAttributes::get().map(|attributes| attributes.policy)
        });
        let policy = lowered.join().expect("no panic");
        assert!(policy.is_none_or(|policy| policy == libc::SCHED_BATCH.cast_unsigned()), "{policy:?}");
    }
}
