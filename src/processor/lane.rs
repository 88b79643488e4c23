//! The slow lane: a second runtime, whose threads have low priority. The operating system lets them in where a processor
//! is free, and takes it from them at once when another thread has something to do. So a long piece of work there
//! delays nobody, whether or not it can be cut.
//!
//! A third one has a single thread of the usual priority, for new clients of those who are in the slow lane: one of them
//! may have a key, even the one that ends the attack. So they are let in, one after the other, and a crowd of them does
//! not stand before the tasks of others. Who is known has no place there: a client with a key goes where its tenant is,
//! and one that was answered without a key is one of the crowd.
//!
//! Both belong to the process, as the processors do, and have no threads until somebody needs them.

use std::sync::LazyLock;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use super::task::paid;
use crate::limits::SLOW_LANE_NICE;
use crate::scheduler::lower_priority;
use crate::shares::processors;

/// Where a task runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TaskLane {
    /// On the threads of the gateway's runtime.
    Usual,
    /// On the one for new clients.
    Newcomers,
    /// On those of low priority.
    Slow,
}

static NEWCOMERS_LANE: LazyLock<Option<Runtime>> = LazyLock::new(|| build_lane("newcomers", 1, 0));
static SLOW_LANE: LazyLock<Option<Runtime>> =
    LazyLock::new(|| build_lane("slow-lane", processors(), SLOW_LANE_NICE));

fn build_lane(name: &'static str, threads: usize, nice: u8) -> Option<Runtime> {
    let built = Builder::new_multi_thread()
        .thread_name(name)
        .worker_threads(threads)
        .on_thread_start(move || lower_priority(nice))
        .enable_all()
        .build();
    built.inspect_err(|error| warn!(%error, name, "no threads for this: all share the usual ones")).ok()
}

tokio::task_local! {
    /// For a task that visits another lane: the runtime that it comes from.
    pub(super) static USUAL_RUNTIME: Handle;
}

impl TaskLane {
    /// Its runtime; the caller's if the system has no threads for it.
    pub(super) fn runtime(self) -> Handle {
        let runtime = match self {
            Self::Usual => None,
            Self::Newcomers => NEWCOMERS_LANE.as_ref(),
            Self::Slow => SLOW_LANE.as_ref(),
        };
        runtime.map_or_else(Handle::current, |runtime| runtime.handle().clone())
    }
}

/// Runs work that computes for long, on a thread of low priority. Whoever pays for the calling task pays for it.
///
/// # Errors
/// The work has panicked.
pub async fn run_slowly<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, tokio::task::JoinError> {
    AbortOnDropHandle::new(TaskLane::Slow.runtime().spawn_blocking(paid(work))).await
}

/// Runs work that blocks, on a thread of the usual priority, from whichever lane: what holds a lock that others need
/// must not wait for a processor behind them. The work goes on if the caller is dropped.
///
/// # Errors
/// The work has panicked.
pub async fn run_usually<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, tokio::task::JoinError> {
    match USUAL_RUNTIME.try_with(Clone::clone) {
        Err(_) => tokio::task::spawn_blocking(work).await,
        // Asked for by a thread of that runtime: one that this thread made would inherit its low priority for good.
        Ok(usual) => {
            usual.spawn(async { tokio::task::spawn_blocking(work).await }).await.and_then(|done| done)
        }
    }
}
