//! Where a handler's long work runs: on which threads, at whose priority, in whose turn.

use super::HttpFrontState;
use super::credentials::Caller;
use crate::auth::Grant;
use crate::front::problem::Problem;
use crate::processor::{run_usually, spawn_reading};

/// Runs work that waits for a disk on a blocking thread of the usual priority: it may lock the registry.
pub async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    run_usually(work).await.map_err(|error| Problem::internal(&error))?
}

/// Runs work that reads or computes for long on a blocking thread, at the caller's priority.
pub async fn run_reading<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    spawn_reading(work).await.map_err(|error| Problem::internal(&error))?
}

/// As [`run_reading`], for what a caller reads: in a turn of its tenant, so that others and the registry always
/// find a thread. The work goes on, and keeps the turn, if the caller goes away.
pub async fn run_in_turn<T: Send + 'static>(
    shared: &HttpFrontState,
    caller: &Caller,
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    run_in_turn_of(shared, &caller.0, work).await
}

/// As [`run_in_turn`], for whom `grant` is of.
pub async fn run_in_turn_of<T: Send + 'static>(
    shared: &HttpFrontState,
    grant: &Grant,
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let turn = shared.parts.subscribers.shares.share(grant.datasource()).read_turn().await;
    run_reading(move || {
        let _turn = turn;
        work()
    })
    .await
}
