//! `[log]` and `[storage]`: where records are kept.

use std::fmt;

use serde::de::IntoDeserializer;
use serde::{Deserialize, Deserializer, Serialize};

use super::{ConfigError, DeltaConfig, PostgresConfig, require};
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
    /// PostgreSQL, as `storage.postgres` says.
    Postgres,
    /// A Delta lake.
    Delta,
}

/// Which sink reads are answered from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReadSource {
    /// The first one that can be read.
    First,
    /// `records.db`.
    Sqlite,
    /// PostgreSQL.
    Postgres,
}

/// Where the storage consumers write.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageConfig {
    /// The kinds of database, each at most once. Without any there is the log alone, and `records` and `latest` are not
    /// served. A lone `none` says the same.
    #[serde(deserialize_with = "read_sinks")]
    pub sinks: Vec<SinkKind>,
    /// Which of them reads are answered from.
    pub read_from: ReadSource,
    /// The niceness of the storage threads (0 to 19): when all processors are busy, devices come first and
    /// storage catches up later.
    pub nice: u8,
    /// Whether the numbers in payloads are stored as samples too, for `series`. Applies to what is stored from now on.
    pub samples: bool,
    /// PostgreSQL as a sink.
    pub postgres: PostgresConfig,
    /// The Delta lake.
    pub delta: DeltaConfig,
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
        Self {
            sinks: vec![SinkKind::Sqlite],
            read_from: ReadSource::First,
            nice: 10,
            samples: true,
            postgres: PostgresConfig::default(),
            delta: DeltaConfig::default(),
        }
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

impl SinkKind {
    /// Its name in settings, metrics and answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sqlite => "sqlite",
            Self::Postgres => "postgres",
            Self::Delta => "delta",
        }
    }

    /// Whether this build has it.
    pub(super) const fn is_built(self) -> bool {
        match self {
            Self::Sqlite | Self::Postgres => true,
            Self::Delta => cfg!(feature = "delta"),
        }
    }

    /// Whether reads can be answered from it.
    const fn is_readable(self) -> bool {
        match self {
            Self::Sqlite | Self::Postgres => true,
            Self::Delta => false,
        }
    }
}

// The tests are built with the feature; the lints check this without it as well.
const _: () = assert!(SinkKind::Delta.is_built() == cfg!(feature = "delta"));

impl fmt::Display for SinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Reads the list of sinks, in which a lone `none` is an empty list.
fn read_sinks<'de, D: Deserializer<'de>>(list: D) -> Result<Vec<SinkKind>, D::Error> {
    let words = Vec::<String>::deserialize(list)?;
    match words.as_slice() {
        [none] if none == "none" => Ok(Vec::new()),
        words => words.iter().map(|word| SinkKind::deserialize(word.as_str().into_deserializer())).collect(),
    }
}

impl StorageConfig {
    /// The sink that reads are answered from, if there is one.
    pub fn read_from(&self) -> Option<SinkKind> {
        let wanted = |kind: &SinkKind| match self.read_from {
            ReadSource::First => kind.is_readable(),
            ReadSource::Sqlite => *kind == SinkKind::Sqlite,
            ReadSource::Postgres => *kind == SinkKind::Postgres,
        };
        self.sinks.iter().copied().find(wanted)
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let is_twice = |place: usize| self.sinks[..place].contains(&self.sinks[place]);
        let named: Vec<_> = self.sinks.iter().map(|kind| kind.as_str()).collect();
        require(
            !(0..self.sinks.len()).any(is_twice),
            "storage.sinks",
            named.join(","),
            "it has to name each sink once",
        )?;
        require(
            self.read_from == ReadSource::First || self.read_from().is_some(),
            "storage.read_from",
            "another one",
            "it has to be one of storage.sinks, or \"first\"",
        )?;
        self.postgres.check(self.sinks.contains(&SinkKind::Postgres))?;
        self.check_built(SinkKind::is_built)?;
        self.delta.check()?;
        require(self.nice <= 19, "storage.nice", self.nice, "it has to be between 0 and 19")
    }

    /// Whether each sink is one that the build has.
    pub(super) fn check_built(&self, is_built: impl Fn(SinkKind) -> bool) -> Result<(), ConfigError> {
        let missing = self.sinks.iter().find(|kind| !is_built(**kind));
        require(
            missing.is_none(),
            "storage.sinks",
            missing.map_or("", |kind| kind.as_str()),
            "this Headgate was built without the feature \"delta\": build it with `cargo build --release --features delta`",
        )
    }
}
