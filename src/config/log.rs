//! `[log]` and `[storage]`: where records are kept.

use serde::{Deserialize, Serialize};

use super::{ConfigError, require};
use crate::limits;

/// When an append counts as durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// After `fdatasync`: it survives a loss of power.
    Fsync,
    /// Once the operating system has it: it survives a kill of the process.
    Os,
}

/// Where the log is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogBackend {
    /// In files of the data directory: for a single gateway.
    Embedded,
    /// In JetStream, as `nats.stream`: for any number of gateways, which keep nothing themselves.
    Jetstream,
}

/// The durable log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogConfig {
    /// Where the log is kept.
    pub backend: LogBackend,
    /// When an append counts as durable, and is acknowledged.
    pub durability: Durability,
    /// The size of a segment file, in bytes.
    pub segment_bytes: u64,
    /// The log's maximum size on disk, in bytes. At that size the oldest segments are removed once they are
    /// stored; until then no more messages are admitted.
    pub retention_bytes: u64,
    /// How long a stored record stays in the log, in seconds, at least `intake.dedup_window_s`; 0: as long as
    /// there is room.
    pub retention_s: u64,
    /// Whether to start although records in the middle of the log are unreadable: they are reported, counted
    /// and skipped. If off, Headgate names the place and does not start.
    pub accept_corruption: bool,
}

/// The kinds of storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SinkKind {
    /// `records.db` in the data directory.
    Sqlite,
    /// None beside the log; `records` and `latest` are then not served.
    None,
}

/// Where the storage consumer writes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageConfig {
    /// The kind of database.
    pub sink: SinkKind,
    /// The niceness of the storage thread (0 to 19): when all processors are busy, devices come first and
    /// storage catches up later.
    pub nice: u8,
    /// Whether the numbers in payloads are stored as samples too, for `series`. Applies to what is stored from now on.
    pub samples: bool,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            backend: LogBackend::Embedded,
            durability: Durability::Fsync,
            segment_bytes: limits::SEGMENT_BYTES,
            retention_bytes: 16 << 30,
            retention_s: 7 * 24 * 3_600,
            accept_corruption: false,
        }
    }
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self { sink: SinkKind::Sqlite, nice: 10, samples: true }
    }
}

impl LogConfig {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if self.backend == LogBackend::Jetstream {
            // There are no segments.
            let is_enough = self.retention_bytes >= 1 << 20;
            let rule = "it has to be at least 1 MiB";
            return require(is_enough, "log.retention_bytes", self.retention_bytes, rule);
        }
        require(
            (1 << 20..=1 << 30).contains(&self.segment_bytes),
            "log.segment_bytes",
            self.segment_bytes,
            "it has to be between 1 MiB and 1 GiB",
        )?;
        require(
            self.retention_bytes >= 2 * self.segment_bytes,
            "log.retention_bytes",
            self.retention_bytes,
            "it has to be at least two segments (log.segment_bytes)",
        )
    }
}

impl StorageConfig {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        require(self.nice <= 19, "storage.nice", self.nice, "it has to be between 0 and 19")
    }
}
