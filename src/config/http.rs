//! `[http]`: HTTP, its TLS, and the listener that the administration may have of its own.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{ConfigError, HTTP_TLS_SETTINGS, ListenAddress, TlsConfig, loopback, require_some};
use crate::limits;

/// HTTP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConfig {
    /// Host and port; port 0 takes a free one, and a name stands for all its addresses.
    pub listen: ListenAddress,
    /// The most connections; for one more, one of whoever has most makes room.
    pub connections_max: usize,
    /// The most connections that have presented no valid key; for one more, one makes room.
    pub strangers_max: usize,
    /// The most of them from one address (IPv6: from one /64); for one more, the oldest makes room.
    pub strangers_per_address_max: usize,
    /// The largest request body, after decompression, in bytes.
    pub body_bytes_max: usize,
    /// How long a request's header may take to arrive, and the first request of a connection, in milliseconds.
    pub header_ms_max: u64,
    /// How long a request's body may take to arrive, in milliseconds.
    pub body_ms_max: u64,
    /// How long a connection may be idle between its requests, in seconds. Clients are told.
    pub keep_alive_s_max: u64,
    /// How often a stream says that it is there, in milliseconds.
    pub stream_heartbeat_ms: u64,
    /// The origins whose pages may post messages and read records (CORS); `*` is every origin.
    pub cors_origins: Vec<CorsOrigin>,
    /// HTTP over TLS.
    pub tls: TlsConfig,
    /// The administration's own listener.
    pub admin: AdminConfig,
}

/// The administration's own listener. With one, the others serve devices and readers alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdminConfig {
    /// Host and port, with TLS if `[http.tls]` has a certificate; `None` (in the file: empty) for no such listener.
    #[serde(serialize_with = "write_listen", deserialize_with = "read_listen")]
    pub listen: Option<ListenAddress>,
}

fn write_listen<S: Serializer>(listen: &Option<ListenAddress>, s: S) -> Result<S::Ok, S::Error> {
    match listen {
        Some(listen) => s.collect_str(listen),
        None => s.serialize_str(""),
    }
}

fn read_listen<'de, D: Deserializer<'de>>(d: D) -> Result<Option<ListenAddress>, D::Error> {
    let text = String::deserialize(d)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(serde::de::Error::custom)
}

/// An origin as browsers say it: scheme, host and port; or `*`, every origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorsOrigin(String);

/// The text is no origin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no origin such as https://app.example.com or http://localhost:3000, without a path; nor \"*\""
)]
pub struct OriginParseError(String);

impl CorsOrigin {
    /// Whether every origin is meant.
    pub fn is_any(&self) -> bool {
        self.0 == "*"
    }

    /// Whether this is the value of a header `Origin`.
    pub fn matches(&self, origin: &[u8]) -> bool {
        self.is_any() || self.0.as_bytes().eq_ignore_ascii_case(origin)
    }
}

impl FromStr for CorsOrigin {
    type Err = OriginParseError;

    fn from_str(text: &str) -> Result<Self, OriginParseError> {
        let no = || OriginParseError(text.to_owned());
        if text == "*" {
            return Ok(Self(text.to_owned()));
        }
        let (scheme, host) = text.split_once("://").ok_or_else(no)?;
        let of_host =
            |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'[' | b']');
        let is_scheme =
            !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+.-".contains(&b));
        match is_scheme && !host.is_empty() && host.bytes().all(of_host) {
            true => Ok(Self(text.to_ascii_lowercase())),
            false => Err(no()),
        }
    }
}

impl fmt::Display for CorsOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for CorsOrigin {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for CorsOrigin {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            listen: loopback(8080),
            connections_max: 10_000,
            strangers_max: 2_048,
            strangers_per_address_max: 1_024,
            body_bytes_max: limits::HTTP_BODY_BYTES_MAX,
            header_ms_max: 10_000,
            body_ms_max: 60_000,
            keep_alive_s_max: 75,
            stream_heartbeat_ms: 15_000,
            cors_origins: Vec::new(),
            tls: TlsConfig::without_certificate(8443),
            admin: AdminConfig { listen: None },
        }
    }
}

impl HttpConfig {
    /// How often a stream says that it is there.
    pub fn stream_heartbeat(&self) -> Duration {
        Duration::from_millis(self.stream_heartbeat_ms).max(limits::STREAM_HEARTBEAT_MIN)
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        require_some("http.strangers_max", self.strangers_max as u64)?;
        require_some("http.strangers_per_address_max", self.strangers_per_address_max as u64)?;
        require_some("http.keep_alive_s_max", self.keep_alive_s_max)?;
        require_some("http.stream_heartbeat_ms", self.stream_heartbeat_ms)?;
        self.tls.check(&HTTP_TLS_SETTINGS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_a_scheme_and_a_host_and_nothing_else() {
        for good in ["*", "https://app.example.com", "http://localhost:3000", "http://[::1]:80", "app://x"] {
            assert_eq!(good.parse::<CorsOrigin>().map(|origin| origin.to_string()).as_deref(), Ok(good));
        }
        for bad in [
            "",
            "null",
            "app.example.com",
            "https://",
            "https://a/",
            "https://a/b",
            "https://u@a",
            "https://*.a",
        ] {
            assert!(bad.parse::<CorsOrigin>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_origin_matches_itself_alone() {
        let origin: CorsOrigin = "https://App.example".parse().expect("an origin");
        assert!(origin.matches(b"https://app.example"));
        for other in ["https://app.example:443", "http://app.example", "https://app.example.evil", "null", ""]
        {
            assert!(!origin.matches(other.as_bytes()), "{other}");
        }
        assert!("*".parse::<CorsOrigin>().expect("any").matches(b"https://anywhere"));
    }
}
