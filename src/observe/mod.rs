//! What Headgate reports about itself: metrics, the list of refusals and structured logs. None contains a
//! secret.

pub(crate) mod advice;
pub mod cause;
pub mod metrics;
pub mod refusals;
pub mod trace;
