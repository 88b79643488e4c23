//! What Headgate reports about itself: metrics, the list of refusals and structured logs. None contains a
//! secret.

pub(crate) mod advice;
pub mod build;
pub mod cause;
pub mod disk_figures;
pub mod exposition;
pub mod metrics;
pub mod process_figures;
pub mod refusals;
pub mod spans;
pub mod trace;
pub mod traffic;
