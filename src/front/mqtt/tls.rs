//! TLS on the MQTT front: the certificate in service, and its replacement without a restart.
//!
//! The files are read every few seconds and compared by content, so it does not matter how they are
//! replaced: overwritten, renamed into place, or behind a symlink that changes its target. Valid files
//! go into service for new connections; existing connections keep the certificate of their handshake.
//! Invalid files (a half-written file, a key that belongs to the next certificate) are reported once,
//! and the old certificate stays in service.

use parking_lot::RwLock;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{InconsistentKeys, InvalidMessage, RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{info, warn};

use crate::config::{ClientCertificates, MqttTlsConfig};

/// How often the files are checked for changes.
const TLS_FILES_CHECK_EVERY: Duration = Duration::from_secs(2);
/// MQTT's name in ALPN (RFC 7301). A client need not offer any protocol.
const MQTT_ALPN: &[u8] = b"mqtt";

/// A file of the TLS settings that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{setting} ({}): {reason}", .file.display())]
pub struct TlsError {
    /// The setting that names the file.
    pub setting: &'static str,
    /// The file.
    pub file: PathBuf,
    /// What is wrong with the file. It quotes nothing from the file, which may be a key's.
    pub reason: String,
}

/// The certificate in service.
pub struct Tls {
    settings: MqttTlsConfig,
    in_service: RwLock<Arc<ServerConfig>>,
    /// The digest of the files' contents at the start.
    seen: TlsFilesDigest,
    /// Told when the files are to be read now.
    asked: Notify,
}

impl Tls {
    /// Reads the files that the settings name, which include a certificate.
    ///
    /// # Errors
    /// The file that cannot be read or used, and why.
    pub fn load(settings: MqttTlsConfig) -> Result<Self, TlsError> {
        let files = TlsFiles::read(&settings);
        let seen = tls_files_digest(&files);
        let in_service = server_config(&settings, &files?)?;
        let in_service = RwLock::new(Arc::new(in_service));
        Ok(Self { settings, in_service, seen, asked: Notify::new() })
    }

    /// Has the files read now, if [`Tls::follow_files`] is polled, and does not wait for that.
    pub fn read_now(&self) {
        self.asked.notify_one();
    }

    /// Performs the handshake with a client, with the certificate that is now in service.
    pub(super) async fn accept(&self, tcp: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let config = self.in_service.read().clone();
        TlsAcceptor::from(config).accept(tcp).await
    }

    /// Follows changes of the files for as long as it is polled.
    pub(super) async fn follow_files(self: Arc<Self>) {
        let mut seen = self.seen;
        loop {
            tokio::select! {
                () = tokio::time::sleep(TLS_FILES_CHECK_EVERY) => {}
                () = self.asked.notified() => {}
            }
            let tls = self.clone();
            // Blocking: the files may be on a slow network file system.
            let looked = tokio::task::spawn_blocking(move || tls.reload_changed(seen)).await;
            seen = looked.unwrap_or(seen);
        }
    }

    /// Reads the files, and puts them into service if they have changed and are valid.
    fn reload_changed(&self, seen: TlsFilesDigest) -> TlsFilesDigest {
        let files = TlsFiles::read(&self.settings);
        let now = tls_files_digest(&files);
        if now == seen {
            return now;
        }
        match files.and_then(|files| server_config(&self.settings, &files)) {
            Ok(config) => {
                *self.in_service.write() = Arc::new(config);
                info!(certificate = %self.settings.certificate.display(), "a new TLS certificate is in service");
            }
            Err(error) => {
                warn!(%error, "the TLS files changed and cannot be used; the old ones stay in service")
            }
        }
        now
    }
}

/// A digest of the files' contents, or of the read error. A digest, so that no key is kept to compare.
type TlsFilesDigest = blake3::Hash;

fn tls_files_digest(files: &Result<TlsFiles, TlsError>) -> TlsFilesDigest {
    let mut hasher = blake3::Hasher::new();
    match files {
        Ok(TlsFiles { certificate, key, client_ca }) => {
            for file in [certificate, key, client_ca] {
                hasher.update(&(file.len() as u64).to_be_bytes()).update(file);
            }
        }
        Err(error) => {
            hasher.update(error.to_string().as_bytes());
        }
    }
    hasher.finalize()
}

/// The files as they were at one moment.
struct TlsFiles {
    certificate: Vec<u8>,
    key: Vec<u8>,
    /// Empty if no client certificates are asked for.
    client_ca: Vec<u8>,
}

impl TlsFiles {
    fn read(settings: &MqttTlsConfig) -> Result<Self, TlsError> {
        let read = |setting, file: &Path| {
            std::fs::read(file).map_err(|error| unusable_tls_file(setting, file, error.to_string()))
        };
        let client_ca = match settings.client_ca.as_os_str().is_empty() {
            true => Vec::new(),
            false => read("mqtt.tls.client_ca", &settings.client_ca)?,
        };
        Ok(Self {
            certificate: read("mqtt.tls.certificate", &settings.certificate)?,
            key: read("mqtt.tls.key", &settings.key)?,
            client_ca,
        })
    }
}

fn unusable_tls_file(setting: &'static str, file: &Path, reason: impl Into<String>) -> TlsError {
    TlsError { setting, file: file.to_owned(), reason: reason.into() }
}

fn server_config(settings: &MqttTlsConfig, files: &TlsFiles) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(default_provider());
    let identity = certified_key(settings, files, &provider)?;
    let versions =
        ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let builder = versions.expect("ring has cipher suites for TLS 1.2 and 1.3");
    let builder = if settings.client_ca.as_os_str().is_empty() {
        builder.with_no_client_auth()
    } else {
        let no = |reason: String| unusable_tls_file("mqtt.tls.client_ca", &settings.client_ca, reason);
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&files.client_ca).map_err(|reason| no(reason.to_owned()))? {
            roots.add(certificate).map_err(|error| no(describe_tls_error(&error)))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        let verifier = match settings.client_certificates {
            ClientCertificates::Required => verifier,
            ClientCertificates::Optional => verifier.allow_unauthenticated(),
        };
        builder.with_client_cert_verifier(verifier.build().map_err(|error| no(error.to_string()))?)
    };
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(identity)));
    config.alpn_protocols = vec![MQTT_ALPN.to_vec()];
    Ok(config)
}

/// The certificate chain with its key.
fn certified_key(
    settings: &MqttTlsConfig,
    files: &TlsFiles,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, TlsError> {
    let no_certificate =
        |reason: String| unusable_tls_file("mqtt.tls.certificate", &settings.certificate, reason);
    let no_key = |reason: &str| unusable_tls_file("mqtt.tls.key", &settings.key, reason);
    let chain = certificates(&files.certificate).map_err(|reason| no_certificate(reason.to_owned()))?;
    let key = PrivateKeyDer::from_pem_slice(&files.key).map_err(|error| match error {
        pem::Error::NoItemsFound => no_key("there is no private key in it (PEM, without a passphrase)"),
        error => no_key(pem_fault(&error)),
    })?;
    let key = provider
        .key_provider
        .load_private_key(key)
        .map_err(|_| no_key("the private key is of a kind that is not supported, or damaged"))?;
    let identity = CertifiedKey::new(chain, key);
    match identity.keys_match() {
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(identity),
        Err(rustls::Error::InconsistentKeys(_)) => {
            let certificate = settings.certificate.display();
            Err(no_key(&format!("it is not the key of the certificate in {certificate}")))
        }
        Err(error) => Err(no_certificate(describe_tls_error(&error))),
    }
}

/// All certificates in a file, at least one.
fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, &'static str> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err("there is no certificate in it (PEM)"),
        Ok(found) => Ok(found),
        Err(error) => Err(pem_fault(&error)),
    }
}

/// What is wrong with a PEM file, without quoting its contents.
fn pem_fault(error: &pem::Error) -> &'static str {
    match error {
        pem::Error::MissingSectionEnd { .. } => "it ends in the middle of a PEM section",
        pem::Error::Base64Decode(_) => "what is in a PEM section is not base64",
        _ => "it is not PEM",
    }
}

fn describe_tls_error(error: &rustls::Error) -> String {
    let words = error.to_string();
    match words.contains("UnsupportedCertVersion") {
        // `openssl x509 -req` without extensions makes these.
        true => "it is of X.509 version 1, and version 3 is needed".to_owned(),
        false => words,
    }
}

/// Why a handshake failed, for the operator; `None` if the client just left.
pub(super) fn handshake_fault(error: &io::Error) -> Option<String> {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
            Some("it is not TLS that the client speaks; plain MQTT is served at mqtt.listen".to_owned())
        }
        Some(rustls::Error::NoCertificatesPresented) => Some(
            "the client presents no certificate, and mqtt.tls.client_certificates is \"required\"".to_owned(),
        ),
        Some(rustls::Error::AlertReceived(alert)) => Some(format!(
            "the client refuses ours, most often because it does not know who issued it: {alert:?}"
        )),
        Some(error) => Some(error.to_string()),
        None if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => None,
        None => Some(error.to_string()),
    }
}
