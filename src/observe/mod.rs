//! What Headgate says about itself: metrics and structured logs, neither with a secret in it.

pub mod metrics;
pub mod trace;
