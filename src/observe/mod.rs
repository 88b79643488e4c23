//! What Headgate says about itself: metrics, the list of refusals and structured logs, none with a secret
//! in it.

mod advice;
pub mod metrics;
pub mod refusals;
pub mod trace;
