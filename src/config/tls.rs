//! `[mqtt.tls]` and `[http.tls]`: a listener over TLS, served when there is a certificate.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ConfigError, ListenAddress, loopback, require};

/// Whether a client needs a certificate of its own, besides its API key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientCertificates {
    /// A client without a certificate is refused.
    Required,
    /// A client may come without a certificate; one that it presents has to be valid.
    Optional,
}

/// A listener over TLS, served when there is a certificate. Its limits are those of the listener without TLS.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// Host and port; port 0 takes a free one, and a name stands for all its addresses.
    pub listen: ListenAddress,
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

/// The names of the settings of one listener over TLS, for errors that name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TlsSettingNames {
    /// `….tls.certificate`.
    pub certificate: &'static str,
    /// `….tls.key`.
    pub key: &'static str,
    /// `….tls.client_ca`.
    pub client_ca: &'static str,
    /// `….tls.client_certificates`.
    pub client_certificates: &'static str,
    /// Where the same is served without TLS.
    pub plain_listen: &'static str,
}

/// Those of `[mqtt.tls]`.
pub const MQTT_TLS_SETTINGS: TlsSettingNames = TlsSettingNames {
    certificate: "mqtt.tls.certificate",
    key: "mqtt.tls.key",
    client_ca: "mqtt.tls.client_ca",
    client_certificates: "mqtt.tls.client_certificates",
    plain_listen: "mqtt.listen",
};

/// Those of `[http.tls]`.
pub const HTTP_TLS_SETTINGS: TlsSettingNames = TlsSettingNames {
    certificate: "http.tls.certificate",
    key: "http.tls.key",
    client_ca: "http.tls.client_ca",
    client_certificates: "http.tls.client_certificates",
    plain_listen: "http.listen",
};

impl TlsConfig {
    /// Without a certificate; with one, on this port of loopback.
    pub(super) fn without_certificate(port: u16) -> Self {
        Self {
            listen: loopback(port),
            certificate: PathBuf::new(),
            key: PathBuf::new(),
            client_ca: PathBuf::new(),
            client_certificates: ClientCertificates::Required,
        }
    }

    /// Whether the listener is served: there is a certificate.
    pub fn is_served(&self) -> bool {
        !self.certificate.as_os_str().is_empty()
    }

    pub(super) fn check(&self, names: &TlsSettingNames) -> Result<(), ConfigError> {
        let unset = |path: &Path| path.as_os_str().is_empty();
        require(
            unset(&self.certificate) == unset(&self.key),
            names.key,
            format_args!("{:?}", self.key),
            "certificate and key are given together, or neither is",
        )?;
        require(
            unset(&self.client_ca) || self.is_served(),
            names.client_ca,
            format_args!("{:?}", self.client_ca),
            "it needs a certificate and a key",
        )
    }
}
