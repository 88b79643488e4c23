//! What this program was built of.

use super::exposition::{ExpositionText, MetricKind};

/// Its version.
pub const BUILD_VERSION: &str = env!("CARGO_PKG_VERSION");

/// The commit, if whoever built it said so (`HEADGATE_COMMIT`): cargo would build the crate again after each commit if it
/// were looked up.
pub const BUILD_COMMIT: Option<&str> = match option_env!("HEADGATE_COMMIT") {
    Some(commit) if !commit.is_empty() => Some(commit),
    _ => None,
};

/// The optional parts that are in it, by the names of their cargo features.
pub fn build_features() -> impl Iterator<Item = &'static str> {
    let all = [("delta", cfg!(feature = "delta")), ("otlp", cfg!(feature = "otlp"))];
    all.into_iter().filter(|(_, is_in)| *is_in).map(|(name, _)| name)
}

/// Writes `headgate_build_info`.
pub fn write_build_info(out: &mut ExpositionText) {
    let features: Vec<_> = build_features().collect();
    let labels = [
        ("version", BUILD_VERSION),
        ("commit", BUILD_COMMIT.unwrap_or_default()),
        ("features", &features.join(",")),
    ];
    out.family("headgate_build_info", MetricKind::Gauge, "What the gateway was built of; always 1");
    out.sample("headgate_build_info", &labels, 1_u64);
}
