//! `[mqtt]`: MQTT over TCP, TLS and WebSocket.

use serde::{Deserialize, Serialize};

use super::{ConfigError, ListenAddress, MQTT_TLS_SETTINGS, TlsConfig, loopback, require, require_some};
use crate::limits;

/// MQTT over TCP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MqttConfig {
    /// Host and port; port 0 takes a free one, and a name stands for all its addresses.
    pub listen: ListenAddress,
    /// The most connections; one more is closed at once.
    pub connections_max: usize,
    /// The most connections that have presented no valid key yet; for one more, one makes room.
    pub strangers_max: usize,
    /// The most of them from one address (IPv6: from one /64); for one more, the oldest makes room.
    pub strangers_per_address_max: usize,
    /// The largest packet accepted, in bytes.
    pub packet_bytes_max: usize,
    /// QoS 1 messages that a client may have unacknowledged.
    pub receive_maximum: u16,
    /// How long a new connection may take to send its CONNECT, in milliseconds.
    pub connect_ms_max: u64,
    /// The longest that a session may outlive its connection, in seconds.
    pub session_expiry_s_max: u32,
    /// How long a subscriber may neither take nor acknowledge anything before it is said to stand still, in
    /// milliseconds.
    pub still_ms: u64,
    /// The longest keep-alive, in seconds; an MQTT 5 client that asks for more, or for none, is
    /// told this one.
    pub keep_alive_s_max: u16,
    /// MQTT over TLS.
    pub tls: TlsConfig,
}

impl Default for MqttConfig {
    fn default() -> Self {
        Self {
            listen: loopback(1883),
            connections_max: 100_000,
            strangers_max: 8_192,
            strangers_per_address_max: 4_096,
            packet_bytes_max: limits::MQTT_PACKET_BYTES_MAX,
            receive_maximum: limits::MQTT_RECEIVE_MAXIMUM,
            connect_ms_max: 10_000,
            session_expiry_s_max: 7 * 24 * 3_600,
            still_ms: 30_000,
            keep_alive_s_max: 3_600,
            tls: TlsConfig::without_certificate(8883),
        }
    }
}

impl MqttConfig {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        require_some("mqtt.receive_maximum", self.receive_maximum)?;
        require_some("mqtt.keep_alive_s_max", self.keep_alive_s_max)?;
        require_some("mqtt.strangers_max", self.strangers_max as u64)?;
        require_some("mqtt.strangers_per_address_max", self.strangers_per_address_max as u64)?;
        require(
            (256..=limits::BATCH_BYTES_MAX).contains(&self.packet_bytes_max),
            "mqtt.packet_bytes_max",
            self.packet_bytes_max,
            "it has to be between 256 bytes and 4 MiB",
        )?;
        self.tls.check(&MQTT_TLS_SETTINGS)
    }
}
