//! `[trace.otlp]`: the collector that spans of messages are sent to, in a build with the feature `otlp`.

use std::path::PathBuf;

use axum::http::Uri;
use serde::{Deserialize, Serialize};

use super::{ConfigError, require};

/// What spans are sampled of, when all are.
const SAMPLED_OF: u32 = 1_000_000;

/// Where spans of messages are sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OtlpConfig {
    /// The URL of a collector (OTLP over HTTP); empty for none. Without a path it is that of traces, `/v1/traces`.
    pub endpoint: String,
    /// Of a million reads and requests whose messages name no trace, how many have a span.
    pub sampled_per_million: u32,
    /// A file with issuers (PEM) that are trusted for `https://` beside the system's; empty for none.
    pub ca: PathBuf,
}

impl Default for OtlpConfig {
    fn default() -> Self {
        Self { endpoint: String::new(), sampled_per_million: 1_000, ca: PathBuf::new() }
    }
}

impl OtlpConfig {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let shown = if self.endpoint.contains('@') { "(not shown)" } else { &self.endpoint };
        require(
            self.endpoint.is_empty() || self.traces_url().is_some(),
            "trace.otlp.endpoint",
            shown,
            "it has to be a URL such as http://127.0.0.1:4318 or https://collector.example:4318, without a user",
        )?;
        require(
            self.endpoint.is_empty() || cfg!(feature = "otlp"),
            "trace.otlp.endpoint",
            shown,
            "this Headgate was built without the feature \"otlp\": build it with `cargo build --release --features otlp`",
        )?;
        require(
            self.sampled_per_million <= SAMPLED_OF,
            "trace.otlp.sampled_per_million",
            self.sampled_per_million,
            "it has to be at most 1000000",
        )
    }

    /// Where spans are sent; `None` if they are not, or if it is no URL.
    pub fn traces_url(&self) -> Option<String> {
        let url: Uri = self.endpoint.parse().ok()?;
        let authority = url.authority().filter(|authority| !authority.as_str().contains('@'))?;
        let scheme = url.scheme_str().filter(|scheme| matches!(*scheme, "http" | "https"))?;
        let path = if url.path() == "/" { "/v1/traces" } else { url.path() };
        (!authority.host().is_empty()).then(|| format!("{scheme}://{authority}{path}"))
    }

    /// The part of the reads and requests that has a span, of 1.
    #[cfg(feature = "otlp")]
    pub fn ratio(&self) -> f64 {
        f64::from(self.sampled_per_million) / f64::from(SAMPLED_OF)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_without_a_path_is_that_of_traces() {
        let of = |endpoint: &str| {
            OtlpConfig { endpoint: endpoint.to_owned(), ..OtlpConfig::default() }.traces_url()
        };
        for (endpoint, url) in [
            ("http://127.0.0.1:4318", Some("http://127.0.0.1:4318/v1/traces")),
            ("https://c.example/", Some("https://c.example/v1/traces")),
            ("https://c.example/otlp/v1/traces", Some("https://c.example/otlp/v1/traces")),
            ("http://[::1]:4318", Some("http://[::1]:4318/v1/traces")),
            ("", None),
            ("c.example:4318", None),
            ("/v1/traces", None),
            ("ftp://c.example", None),
            ("http://user:secret@c.example", None),
        ] {
            assert_eq!(of(endpoint).as_deref(), url, "{endpoint}");
        }
    }
}
