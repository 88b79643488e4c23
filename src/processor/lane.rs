//! The slow lane: a second runtime, whose threads have low priority. The operating system lets them in where a processor
//! is free, and takes it from them at once when another thread has something to do. So a long piece of work there
//! delays nobody, whether or not it can be cut.
//!
//! It belongs to the process, as the processors do, and has no threads until somebody needs it.

use std::sync::LazyLock;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use crate::limits::SLOW_LANE_NICE;
use crate::shares::processors;

static SLOW_LANE: LazyLock<Option<Runtime>> = LazyLock::new(|| {
    let built = Builder::new_multi_thread()
        .thread_name("slow-lane")
        .worker_threads(processors())
        .on_thread_start(|| lower_priority(SLOW_LANE_NICE))
        .enable_all()
        .build();
    built
        .inspect_err(|error| warn!(%error, "there are no threads of low priority: all share the others"))
        .ok()
});

/// The slow lane; the caller's runtime if the system has no threads for it.
pub(super) fn slow_lane() -> Handle {
    SLOW_LANE.as_ref().map_or_else(Handle::current, |runtime| runtime.handle().clone())
}

/// Lowers the calling thread's priority by `nice`.
pub fn lower_priority(nice: u8) {
    if nice == 0 {
        return;
    }
    #[cfg(target_os = "linux")]
    {
        // SAFETY: no memory is involved. On Linux, process 0 is the calling thread.
        let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, i32::from(nice)) };
        if result != 0 {
            let error = std::io::Error::last_os_error();
            let thread = std::thread::current();
            warn!(%error, nice, thread = thread.name(), "a thread keeps its priority");
        }
    }
}

/// Runs work that computes for long, on a thread of low priority.
///
/// # Errors
/// The work has panicked.
pub async fn run_slowly<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, tokio::task::JoinError> {
    AbortOnDropHandle::new(slow_lane().spawn_blocking(work)).await
}
