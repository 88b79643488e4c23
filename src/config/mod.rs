//! The configuration: defaults, then a TOML file, then the environment
//! (`HEADGATE_MQTT__LISTEN=127.0.0.1:1883`); a later source overrides an earlier one. An unknown key is an
//! error, so that a misspelt limit is not silently absent.
//!
//! `config/headgate.toml` shows every key at its default; a test compares the two.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};
use serde::{Deserialize, Serialize};

use crate::auth::network::Network;
use crate::limits;

mod nats;

pub use nats::{ConfigSecret, NatsCalloutConfig, NatsConfig, NatsStreamConfig};

/// Environment variables of the commands: they have the same prefix but are no settings.
const COMMAND_ENV_VARS: [&str; 4] = ["url", "api_key", "api_key_file", "config"];

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The directory of everything that must survive a restart: log, registry, stored records.
    pub data_dir: PathBuf,
    /// How long a drain may take before the remaining connections are closed, in milliseconds.
    pub drain_ms_max: u64,
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
    /// Where the storage consumer writes.
    pub storage: StorageConfig,
    /// Which NATS is used, and what for.
    pub nats: NatsConfig,
    /// What Headgate says about itself on standard error.
    pub trace: TraceConfig,
}

/// MQTT over TCP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MqttConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The most connections; one more is closed at once.
    pub connections_max: usize,
    /// The largest packet accepted, in bytes.
    pub packet_bytes_max: usize,
    /// QoS 1 messages that a client may have unacknowledged.
    pub receive_maximum: u16,
    /// How long a new connection may take to send its CONNECT, in milliseconds.
    pub connect_ms_max: u64,
    /// The longest that a session may outlive its connection, in seconds.
    pub session_expiry_s_max: u32,
    /// The longest keep-alive, in seconds; an MQTT 5 client that asks for more, or for none, is
    /// told this one.
    pub keep_alive_s_max: u16,
    /// MQTT over TLS.
    pub tls: MqttTlsConfig,
}

/// Whether a client needs a certificate of its own, besides its API key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientCertificates {
    /// A client without a certificate is refused.
    Required,
    /// A client may come without a certificate; one that it presents has to be valid.
    Optional,
}

/// MQTT over TLS, served when there is a certificate. The limits are those of MQTT over TCP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MqttTlsConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
    /// A file with the certificate and its chain (PEM); empty for none. It may be replaced while the gateway
    /// runs, as may `key` and `client_ca`.
    pub certificate: PathBuf,
    /// A file with the certificate's private key (PEM).
    pub key: PathBuf,
    /// A file with the issuers of the clients' certificates (PEM); empty when clients are not asked
    /// for one.
    pub client_ca: PathBuf,
    /// With a `client_ca`: whether a client needs a certificate.
    pub client_certificates: ClientCertificates,
}

impl MqttTlsConfig {
    /// Whether MQTT over TLS is served: there is a certificate.
    pub fn is_served(&self) -> bool {
        !self.certificate.as_os_str().is_empty()
    }
}

/// HTTP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The most connections; one more waits in the kernel's queue.
    pub connections_max: usize,
    /// The largest request body, after decompression, in bytes.
    pub body_bytes_max: usize,
    /// How long a request's header may take to arrive, in milliseconds.
    pub header_ms_max: u64,
    /// How long a request's body may take to arrive, in milliseconds.
    pub body_ms_max: u64,
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
    /// How long a client is held back before it is refused, in milliseconds.
    pub hold_back_ms_max: u64,
    /// How long a message id is remembered, in seconds: a second message with the same id is acknowledged
    /// and not kept again.
    pub dedup_window_s: u64,
    /// The most message ids that are remembered; beyond that the oldest are forgotten early.
    pub dedup_ids_max: usize,
}

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

/// What Headgate says about itself on standard error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceConfig {
    /// A filter as `tracing-subscriber` reads it: `info`, `headgate=debug`.
    pub filter: String,
    /// Text or JSON.
    pub format: TraceFormat,
}

impl Default for Config {
    fn default() -> Self {
        // Loopback everywhere: reaching the gateway from a network has to be an operator's decision.
        let loopback = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Self {
            data_dir: PathBuf::from("headgate-data"),
            drain_ms_max: 10_000,
            mqtt: MqttConfig {
                listen: loopback(1883),
                connections_max: 100_000,
                packet_bytes_max: limits::MQTT_PACKET_BYTES_MAX,
                receive_maximum: limits::MQTT_RECEIVE_MAXIMUM,
                connect_ms_max: 10_000,
                session_expiry_s_max: 7 * 24 * 3_600,
                keep_alive_s_max: 3_600,
                tls: MqttTlsConfig {
                    listen: loopback(8883),
                    certificate: PathBuf::new(),
                    key: PathBuf::new(),
                    client_ca: PathBuf::new(),
                    client_certificates: ClientCertificates::Required,
                },
            },
            http: HttpConfig {
                listen: loopback(8080),
                connections_max: 10_000,
                body_bytes_max: limits::HTTP_BODY_BYTES_MAX,
                header_ms_max: 10_000,
                body_ms_max: 60_000,
            },
            auth: AuthConfig {
                failures_burst: limits::AUTH_FAILURES_BURST,
                failures_per_s: limits::AUTH_FAILURES_PER_S,
                failures_exempt: Vec::new(),
            },
            intake: IntakeConfig {
                payload_bytes_max: limits::PAYLOAD_BYTES_MAX,
                in_flight_bytes_max: limits::IN_FLIGHT_BYTES_MAX,
                hold_back_ms_max: 10_000,
                dedup_window_s: limits::DEDUP_WINDOW_S,
                dedup_ids_max: limits::DEDUP_IDS_MAX,
            },
            log: LogConfig {
                backend: LogBackend::Embedded,
                durability: Durability::Fsync,
                segment_bytes: limits::SEGMENT_BYTES,
                retention_bytes: 16 << 30,
                retention_s: 7 * 24 * 3_600,
                accept_corruption: false,
            },
            storage: StorageConfig { sink: SinkKind::Sqlite, nice: 10 },
            nats: NatsConfig::default(),
            trace: TraceConfig { filter: "info".to_owned(), format: TraceFormat::Text },
        }
    }
}

/// Why a configuration cannot be used. The text names the key.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file that does not parse, an unknown key, a value of the wrong type.
    #[error("configuration: {0}")]
    Read(#[from] Box<figment::Error>),
    /// A named file that does not exist.
    #[error("configuration: there is no file {}", .0.display())]
    NoFile(PathBuf),
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

impl Config {
    /// The defaults, with `file` (if any) and then the environment over them.
    ///
    /// # Errors
    /// [`ConfigError`], naming the key.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let mut figment = Figment::from(Serialized::defaults(Config::default()));
        if let Some(file) = file {
            if !file.is_file() {
                return Err(ConfigError::NoFile(file.to_owned()));
            }
            figment = figment.merge(Toml::file_exact(file));
        }
        let settings = Env::prefixed("HEADGATE_").ignore(&COMMAND_ENV_VARS).split("__");
        let config: Config = figment.merge(settings).extract().map_err(Box::new)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        // Each rule names one key, even if it compares two, so that an error tells which setting to change.
        let rule = |holds: bool, key, value: &dyn std::fmt::Display, rule| {
            if holds { Ok(()) } else { Err(ConfigError::Value { key, value: value.to_string(), rule }) }
        };
        let (mqtt, http, intake, log) = (&self.mqtt, &self.http, &self.intake, &self.log);
        rule(
            mqtt.receive_maximum > 0,
            "mqtt.receive_maximum",
            &mqtt.receive_maximum,
            "it has to be at least 1",
        )?;
        rule(
            mqtt.keep_alive_s_max > 0,
            "mqtt.keep_alive_s_max",
            &mqtt.keep_alive_s_max,
            "it has to be at least 1",
        )?;
        rule(
            (256..=limits::BATCH_BYTES_MAX).contains(&mqtt.packet_bytes_max),
            "mqtt.packet_bytes_max",
            &mqtt.packet_bytes_max,
            "it has to be between 256 bytes and 4 MiB",
        )?;
        rule(
            self.auth.failures_burst > 0,
            "auth.failures_burst",
            &self.auth.failures_burst,
            "it has to be at least 1",
        )?;
        rule(
            self.auth.failures_per_s > 0,
            "auth.failures_per_s",
            &self.auth.failures_per_s,
            "it has to be at least 1",
        )?;
        let (tls, unset) = (&mqtt.tls, |path: &PathBuf| path.as_os_str().is_empty());
        rule(
            unset(&tls.certificate) == unset(&tls.key),
            "mqtt.tls.key",
            &format_args!("{:?}", tls.key),
            "certificate and key are given together, or neither is",
        )?;
        rule(
            unset(&tls.client_ca) || tls.is_served(),
            "mqtt.tls.client_ca",
            &format_args!("{:?}", tls.client_ca),
            "it needs a certificate and a key",
        )?;
        rule(
            intake.payload_bytes_max <= limits::BATCH_BYTES_MAX / 2,
            "intake.payload_bytes_max",
            &intake.payload_bytes_max,
            "it has to be at most 2 MiB",
        )?;
        rule(
            intake.in_flight_bytes_max >= 2 * limits::BATCH_BYTES_MAX
                && intake.in_flight_bytes_max <= u32::MAX as usize / 2,
            "intake.in_flight_bytes_max",
            &intake.in_flight_bytes_max,
            "it has to be between 8 MiB and 2 GiB",
        )?;
        rule(
            (1..=7 * 24 * 3_600).contains(&intake.dedup_window_s),
            "intake.dedup_window_s",
            &intake.dedup_window_s,
            "it has to be between 1 second and 7 days",
        )?;
        rule(
            (1..=100_000_000).contains(&intake.dedup_ids_max),
            "intake.dedup_ids_max",
            &intake.dedup_ids_max,
            "it has to be between 1 and 100 million",
        )?;
        rule(
            http.body_bytes_max <= intake.in_flight_bytes_max / 2,
            "http.body_bytes_max",
            &http.body_bytes_max,
            "it has to be at most half of intake.in_flight_bytes_max",
        )?;
        rule(
            (1 << 20..=1 << 30).contains(&log.segment_bytes),
            "log.segment_bytes",
            &log.segment_bytes,
            "it has to be between 1 MiB and 1 GiB",
        )?;
        rule(
            http.body_bytes_max <= limits::HTTP_BODY_BYTES_LIMIT,
            "http.body_bytes_max",
            &http.body_bytes_max,
            "it has to be at most 64 MiB: the messages of a request with an id are one frame of the log",
        )?;
        rule(
            log.retention_bytes >= 2 * log.segment_bytes,
            "log.retention_bytes",
            &log.retention_bytes,
            "it has to be at least two segments (log.segment_bytes)",
        )?;
        let nats = &self.nats;
        rule(
            log.backend == LogBackend::Embedded || nats.is_used(),
            "nats.servers",
            &format_args!("{:?}", nats.servers),
            "it has to name a server, as log.backend is \"jetstream\"",
        )?;
        rule(
            !nats.callout.is_used() || nats.is_used(),
            "nats.servers",
            &format_args!("{:?}", nats.servers),
            "it has to name a server, as nats.callout.issuer_seed_file is set",
        )?;
        rule(
            !nats.callout.is_used() || !nats.callout.user.is_empty() && nats.callout.user != nats.user,
            "nats.callout.user",
            &format_args!("{:?}", nats.callout.user),
            "it has to be a user of an account of its own, as nats.callout.issuer_seed_file is set",
        )?;
        rule(
            (1..=5).contains(&nats.stream.replicas),
            "nats.stream.replicas",
            &nats.stream.replicas,
            "it has to be between 1 and 5",
        )?;
        rule(
            (10..=7 * 24 * 3_600).contains(&nats.callout.expiry_s),
            "nats.callout.expiry_s",
            &nats.callout.expiry_s,
            "it has to be between 10 seconds and 7 days",
        )?;
        rule(self.storage.nice <= 19, "storage.nice", &self.storage.nice, "it has to be between 0 and 19")?;
        Ok(())
    }

    /// How long a drain may take.
    pub fn drain_max(&self) -> Duration {
        Duration::from_millis(self.drain_ms_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_shows_every_key_at_its_default() {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/headgate.toml");
        let text = std::fs::read_to_string(&shipped).expect("config/headgate.toml is readable");
        // Without the defaults, so that a key missing in the file is an error.
        let config: Config = Figment::from(Toml::string(&text)).extract().expect("every key is there");
        assert_eq!(config, Config::default());
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("headgate.toml");
        std::fs::write(&file, "[mqtt]\nlissen = \"127.0.0.1:1\"\n").expect("written");
        let error = Config::load(Some(&file)).expect_err("misspelt").to_string();
        assert!(error.contains("lissen"), "{error}");
    }

    #[test]
    fn a_certificate_needs_its_key_and_client_certificates_need_both() {
        for (tls, key) in [
            ("certificate = \"a.pem\"", "mqtt.tls.key"),
            ("key = \"a.pem\"", "mqtt.tls.key"),
            ("client_ca = \"a.pem\"", "mqtt.tls.client_ca"),
        ] {
            let dir = tempfile::tempdir().expect("temporary directory");
            let file = dir.path().join("headgate.toml");
            std::fs::write(&file, format!("[mqtt.tls]\n{tls}\n")).expect("written");
            let error = Config::load(Some(&file)).expect_err("incomplete").to_string();
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn a_value_out_of_range_is_an_error_that_names_key_and_rule() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("headgate.toml");
        std::fs::write(&file, "[mqtt]\nreceive_maximum = 0\n").expect("written");
        let error = Config::load(Some(&file)).expect_err("zero").to_string();
        assert!(error.contains("mqtt.receive_maximum") && error.contains("at least 1"), "{error}");
    }
}
