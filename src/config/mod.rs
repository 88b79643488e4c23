//! The configuration: defaults, then a TOML file, then the environment
//! (`HEADGATE_MQTT__LISTEN=127.0.0.1:1883`); a later source overrides an earlier one. An unknown key is an
//! error, so that a misspelt limit is not silently absent. What each source says is brought into the shape of the
//! defaults (`shape.rs`), so that sizes and times may have units and lists may be written `a,b`.
//!
//! An error names the setting and what it has to be. It repeats no value that it could not read: that may be a
//! secret.
//!
//! `config/headgate.toml` shows every key at its default; a test compares the two.

use std::fmt::Display;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use figment::Figment;
use figment::providers::Serialized;
use figment::value::Dict;
use serde::{Deserialize, Serialize};

use crate::limits;
use crate::network::Network;

mod changes;
mod delta;
mod environment;
mod http;
mod listen;
mod log;
mod mqtt;
mod nats;
mod otlp;
mod postgres;
mod public;
mod quantity;
mod shape;
#[cfg(test)]
mod tests;
mod tls;

use environment::{EnvironmentSettings, variable_of};
use shape::ConfigShape;

pub use changes::ConfigChanges;
pub use delta::DeltaConfig;
pub use http::{CorsOrigin, HttpConfig};
pub use listen::ListenAddress;
pub use log::{Durability, LogBackend, LogConfig, SinkKind, StorageConfig};
pub use mqtt::{MetadataPolicy, MqttConfig};
pub use nats::{ConfigSecret, NatsConfig};
pub use otlp::OtlpConfig;
pub use postgres::PostgresConfig;
pub use public::{PublicMqtt, PublicUrl};
pub use quantity::{parse_duration_ms, parse_quantity};
pub use tls::{ClientCertificates, HTTP_TLS_SETTINGS, MQTT_TLS_SETTINGS, TlsConfig, TlsSettingNames};

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The directory of everything that must survive a restart: log, registry, stored records.
    pub data_dir: PathBuf,
    /// How long a drain may take before the remaining connections are closed, in milliseconds.
    pub drain_ms_max: u64,
    /// The proxies that are believed when they say whose connection or request it is.
    pub trusted_proxies: Vec<Network>,
    /// Whether they say so with a PROXY protocol header.
    pub proxy_protocol: ProxyProtocol,
    /// Where clients reach HTTP, for the lines that say how to connect.
    pub public_url: PublicUrl,
    /// Where clients reach MQTT, for the same lines.
    pub public_mqtt: PublicMqtt,
    /// MQTT over TCP, TLS and WebSocket.
    pub mqtt: MqttConfig,
    /// HTTP: ingest, management, queries, metrics.
    pub http: HttpConfig,
    /// How bad API keys are limited.
    pub auth: AuthConfig,
    /// The limits of intake.
    pub intake: IntakeConfig,
    /// The durable log.
    pub log: LogConfig,
    /// Where the storage consumers write.
    pub storage: StorageConfig,
    /// Which NATS is used, and what for.
    pub nats: NatsConfig,
    /// What Headgate says about itself in numbers.
    pub metrics: MetricsConfig,
    /// What Headgate says about itself on standard error.
    pub trace: TraceConfig,
}

/// Whether connections from trusted proxies begin with a PROXY protocol header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyProtocol {
    /// They may.
    Optional,
    /// They have to; one that does not is closed.
    Required,
    /// They do not; one that does is closed.
    Off,
}

/// How bad API keys are limited.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuthConfig {
    /// How many bad keys one address (IPv6: one /64) may present before it is told to wait.
    pub failures_burst: u64,
    /// How many a second it may present after that.
    pub failures_per_s: u64,
    /// Addresses and networks that are never told to wait.
    pub failures_exempt: Vec<Network>,
}

/// The limits of intake.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IntakeConfig {
    /// The largest payload of one message, in bytes.
    pub payload_bytes_max: usize,
    /// The most bytes on their way into the log; a connection that brings more is held back until there is
    /// room.
    pub in_flight_bytes_max: usize,
    /// The most bytes that all clients together may make the gateway hold: what is being read, waits, or is being
    /// sent. Raised to what `in_flight_bytes_max` and `http.body_bytes_max` need.
    pub memory_bytes_max: usize,
    /// The part of it that one key, or one datasource, may have. Raised to what `http.body_bytes_max` needs.
    pub memory_share_bytes_max: usize,
    /// How long a client is held back before it is refused, in milliseconds.
    pub hold_back_ms_max: u64,
    /// How long a message id is remembered, in seconds: a second message with the same id is acknowledged
    /// and not kept again.
    pub dedup_window_s: u64,
    /// The most message ids that are remembered; beyond that the oldest of the datasources that have most are
    /// forgotten early.
    pub dedup_ids_max: usize,
    /// The most message ids that are remembered of one datasource; beyond that its oldest are forgotten early.
    pub dedup_ids_per_datasource_max: usize,
    /// The most QoS 2 exchanges of one datasource that may be open; a further one is refused.
    pub exchanges_per_datasource_max: usize,
}

/// The format of Headgate's own log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TraceFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What Headgate says about itself in numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsConfig {
    /// How many datasources have series of their own; with 0 there are none of datasources.
    pub datasources_max: usize,
}

/// What Headgate says about itself on standard error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceConfig {
    /// A filter as `tracing-subscriber` reads it: `info`, `headgate=debug`.
    pub filter: String,
    /// Text or JSON.
    pub format: TraceFormat,
    /// Where spans of messages are sent.
    pub otlp: OtlpConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("headgate-data"),
            drain_ms_max: 10_000,
            trusted_proxies: Vec::new(),
            proxy_protocol: ProxyProtocol::Optional,
            public_url: PublicUrl::default(),
            public_mqtt: PublicMqtt::default(),
            mqtt: MqttConfig::default(),
            http: HttpConfig::default(),
            auth: AuthConfig::default(),
            intake: IntakeConfig::default(),
            log: LogConfig::default(),
            storage: StorageConfig::default(),
            nats: NatsConfig::default(),
            metrics: MetricsConfig { datasources_max: limits::METRICS_DATASOURCES_DEFAULT },
            trace: TraceConfig {
                filter: "info".to_owned(),
                format: TraceFormat::Text,
                otlp: OtlpConfig::default(),
            },
        }
    }
}

impl Default for AuthConfig {
    fn default() -> Self {
        Self {
            failures_burst: limits::AUTH_FAILURES_BURST,
            failures_per_s: limits::AUTH_FAILURES_PER_S,
            failures_exempt: Vec::new(),
        }
    }
}

impl Default for IntakeConfig {
    fn default() -> Self {
        Self {
            payload_bytes_max: limits::PAYLOAD_BYTES_MAX,
            in_flight_bytes_max: limits::IN_FLIGHT_BYTES_MAX,
            memory_bytes_max: limits::MEMORY_BYTES_MAX,
            memory_share_bytes_max: limits::MEMORY_SHARE_BYTES_MAX,
            hold_back_ms_max: 10_000,
            dedup_window_s: limits::DEDUP_WINDOW_S,
            dedup_ids_max: limits::DEDUP_IDS_MAX,
            dedup_ids_per_datasource_max: limits::DEDUP_IDS_PER_DATASOURCE_MAX,
            exchanges_per_datasource_max: limits::EXCHANGES_PER_DATASOURCE_MAX,
        }
    }
}

/// The default of every listener: reaching the gateway from a network has to be an operator's decision.
fn loopback(port: u16) -> ListenAddress {
    SocketAddr::from(([127, 0, 0, 1], port)).into()
}

/// Why a configuration cannot be used. The text names the key.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A named file that does not exist.
    #[error("configuration: there is no file {}", .0.display())]
    NoFile(PathBuf),
    /// A file that cannot be read.
    #[error("configuration: cannot read {}: {error}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A file that is not TOML. It quotes nothing of the file, which may hold a secret at that place.
    #[error("configuration: {}, line {line}, column {column}: {}", file.display(), message.trim())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The character in it, from 1.
        column: usize,
        /// What is wrong there.
        message: String,
    },
    /// An unknown key, a value of the wrong type.
    #[error("configuration: {key} ({source_name}): {fault}")]
    Setting {
        /// The key, with dots.
        key: String,
        /// The file or the variable that says it.
        source_name: String,
        /// What is wrong.
        fault: String,
    },
    /// An environment variable that is nearly a setting.
    #[error("configuration: {name} (environment): {fault}")]
    Variable {
        /// Its name.
        name: String,
        /// What is wrong.
        fault: String,
    },
    /// A file with a secret that cannot be read.
    #[error("configuration: {key}: cannot read {}: {error}", file.display())]
    Secret {
        /// The key, with dots.
        key: &'static str,
        /// The file.
        file: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A value of the right type that breaks a rule.
    #[error("configuration: {key} is {value}: {rule}")]
    Value {
        /// The key, with dots.
        key: &'static str,
        /// What was set.
        value: String,
        /// What it has to be.
        rule: &'static str,
    },
}

/// A configuration, and what was passed over while it was read.
#[derive(Debug)]
pub struct LoadedConfig {
    /// The configuration.
    pub config: Config,
    /// Environment variables that begin with `HEADGATE_` and are no settings.
    pub passed_over: Vec<String>,
}

impl LoadedConfig {
    /// As [`Config::load`].
    ///
    /// # Errors
    /// [`ConfigError`], naming the key.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let shape = ConfigShape::of_defaults();
        let source = file.map(|file| file.display().to_string()).unwrap_or_default();
        let of_file = file.map(read_toml).transpose()?.unwrap_or_default();
        let of_file = shape.conform(of_file, &source)?;
        let environment = EnvironmentSettings::read(std::env::vars_os(), &shape)?;
        let of_environment = shape.conform(environment.tree(), "environment")?;
        let figment = Figment::from(Serialized::defaults(Config::default()))
            .merge(Serialized::defaults(of_file))
            .merge(Serialized::defaults(of_environment));
        let mut config: Config = figment.extract().map_err(|error| {
            let key = error.path.join(".");
            let is_variable = environment.settings.iter().any(|(path, _)| *path == key);
            let source_name = if is_variable { variable_of(&key) } else { source.clone() };
            ConfigError::Setting { key, source_name, fault: fault_of_value(&error.kind) }
        })?;
        config.check()?;
        config.intake.fit_memory(config.http.body_bytes_max);
        Ok(Self { config, passed_over: environment.passed_over })
    }
}

/// Reads a TOML file.
fn read_toml(file: &Path) -> Result<Dict, ConfigError> {
    // Not a FIFO or a device, which could hold the start for ever.
    if !file.is_file() {
        return Err(ConfigError::NoFile(file.to_owned()));
    }
    let text =
        std::fs::read_to_string(file).map_err(|error| ConfigError::File { file: file.to_owned(), error })?;
    // A byte order mark, as some editors write it.
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    toml::from_str(text).map_err(|error: toml::de::Error| {
        let begin = error.span().map_or(0, |span| span.start);
        let before = text.get(..begin).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        let message = error.message().replace('\n', ", ");
        ConfigError::Syntax { file: file.to_owned(), line, column, message }
    })
}

/// What is wrong with a value that is of the right kind and cannot be used, without the value.
fn fault_of_value(kind: &figment::error::Kind) -> String {
    use figment::error::Kind;
    match kind {
        Kind::Message(text) => text.clone(),
        Kind::InvalidType(_, expected) | Kind::InvalidValue(_, expected) => match expected.as_str() {
            "u8" => format!("it has to be at most {}", u8::MAX),
            "u16" => format!("it has to be at most {}", u16::MAX),
            "u32" => format!("it has to be at most {}", u32::MAX),
            "u64" | "usize" => format!("it has to be at most {}", u64::MAX),
            expected => format!("it has to be {expected}"),
        },
        Kind::UnknownVariant(_, known) => format!("it has to be one of \"{}\"", known.join("\", \"")),
        Kind::UnknownField(name, _) => format!("there is no such setting {name}"),
        _ => "it cannot be used".to_owned(),
    }
}

impl Config {
    /// The defaults, with `file` (if any) and then the environment over them.
    ///
    /// # Errors
    /// [`ConfigError`], naming the key.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        LoadedConfig::load(file).map(|loaded| loaded.config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        self.mqtt.check()?;
        self.http.check()?;
        self.auth.check()?;
        self.intake.check()?;
        require(
            self.metrics.datasources_max <= limits::METRICS_DATASOURCES_MAX,
            "metrics.datasources_max",
            self.metrics.datasources_max,
            "it has to be at most 1000",
        )?;
        require(
            self.http.body_bytes_max <= self.intake.in_flight_bytes_max / 2,
            "http.body_bytes_max",
            self.http.body_bytes_max,
            "it has to be at most half of intake.in_flight_bytes_max",
        )?;
        require(
            self.http.body_bytes_max <= limits::HTTP_BODY_BYTES_LIMIT,
            "http.body_bytes_max",
            self.http.body_bytes_max,
            "it has to be at most 64 MiB: the messages of a request with an id are one frame of the log",
        )?;
        self.log.check()?;
        self.nats.check(self.log.backend)?;
        self.trace.otlp.check()?;
        self.storage.check()
    }

    /// How long a drain may take.
    pub fn drain_max(&self) -> Duration {
        Duration::from_millis(self.drain_ms_max)
    }
}

impl AuthConfig {
    fn check(&self) -> Result<(), ConfigError> {
        require_some("auth.failures_burst", self.failures_burst)?;
        require_some("auth.failures_per_s", self.failures_per_s)
    }
}

impl IntakeConfig {
    /// Raises the memory of a key to what a request with the largest body takes, and that of all to what may be on
    /// its way into the log beside two such keys.
    fn fit_memory(&mut self, body_bytes_max: usize) {
        let of_request = 3 * body_bytes_max + 100 * limits::HTTP_MESSAGES_MAX;
        self.memory_share_bytes_max = self.memory_share_bytes_max.max(of_request);
        let of_all = self.in_flight_bytes_max + 2 * self.memory_share_bytes_max;
        self.memory_bytes_max = self.memory_bytes_max.max(of_all);
    }

    fn check(&self) -> Result<(), ConfigError> {
        require(
            self.payload_bytes_max <= limits::BATCH_BYTES_MAX / 2,
            "intake.payload_bytes_max",
            self.payload_bytes_max,
            "it has to be at most 2 MiB",
        )?;
        // Two batches, so that one gathers while the other is written; a semaphore takes its permits as u32.
        require(
            (2 * limits::BATCH_BYTES_MAX..=u32::MAX as usize / 2).contains(&self.in_flight_bytes_max),
            "intake.in_flight_bytes_max",
            self.in_flight_bytes_max,
            "it has to be between 8 MiB and 2 GiB",
        )?;
        require(
            (1..=7 * 24 * 3_600).contains(&self.dedup_window_s),
            "intake.dedup_window_s",
            self.dedup_window_s,
            "it has to be between 1 second and 7 days",
        )?;
        require(
            (1..=100_000_000).contains(&self.dedup_ids_max),
            "intake.dedup_ids_max",
            self.dedup_ids_max,
            "it has to be between 1 and 100 million",
        )?;
        require(
            (1..=100_000_000).contains(&self.dedup_ids_per_datasource_max),
            "intake.dedup_ids_per_datasource_max",
            self.dedup_ids_per_datasource_max,
            "it has to be between 1 and 100 million",
        )?;
        require(
            (1..=limits::EXCHANGES_OPEN_MAX).contains(&self.exchanges_per_datasource_max),
            "intake.exchanges_per_datasource_max",
            self.exchanges_per_datasource_max,
            "it has to be between 1 and 1 million",
        )
    }
}

/// Checks a rule. It names one key, even if it compares two, so that an error tells which setting to change.
fn require(
    holds: bool,
    key: &'static str,
    value: impl Display,
    rule: &'static str,
) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(ConfigError::Value { key, value: value.to_string(), rule }) }
}

/// Checks that a number is not 0.
fn require_some(key: &'static str, value: impl Into<u64>) -> Result<(), ConfigError> {
    let value = value.into();
    require(value > 0, key, value, "it has to be at least 1")
}
