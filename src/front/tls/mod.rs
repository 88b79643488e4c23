//! TLS of the MQTT and HTTP fronts: the certificate in service, and its replacement without a restart.
//!
//! The files are read every few seconds and compared by content, so it does not matter how they are
//! replaced: overwritten, renamed into place, or behind a symlink that changes its target. Valid files
//! go into service for new connections; existing connections keep the certificate of their handshake.
//! Invalid files (a half-written file, a key that belongs to the next certificate) are reported once,
//! and the old certificate stays in service.

mod files;

use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use rustls::{InvalidMessage, ServerConfig};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{info, warn};

use self::files::{TlsFiles, TlsFilesDigest, server_config, tls_files_digest};
use crate::config::{HTTP_TLS_SETTINGS, MQTT_TLS_SETTINGS, TlsConfig, TlsSettingNames};
use crate::message::{TimeMicros, now_micros};

/// How often the files are checked for changes.
const TLS_FILES_CHECK_EVERY: Duration = Duration::from_secs(2);

/// The front that a listener belongs to: it says what its settings are called, and what ALPN (RFC 7301) offers. A client
/// need not offer any protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsFront {
    /// `[mqtt.tls]`.
    Mqtt,
    /// `[http.tls]`.
    Http,
}

impl TlsFront {
    const fn names(self) -> &'static TlsSettingNames {
        match self {
            TlsFront::Mqtt => &MQTT_TLS_SETTINGS,
            TlsFront::Http => &HTTP_TLS_SETTINGS,
        }
    }

    /// The names of its protocols, the preferred one first.
    const fn protocols(self) -> &'static [&'static [u8]] {
        match self {
            TlsFront::Mqtt => &[b"mqtt"],
            TlsFront::Http => &[b"h2", b"http/1.1"],
        }
    }

    const fn name(self) -> &'static str {
        match self {
            TlsFront::Mqtt => "mqtt",
            TlsFront::Http => "http",
        }
    }

    const fn protocol_words(self) -> &'static str {
        match self {
            TlsFront::Mqtt => "MQTT",
            TlsFront::Http => "HTTP",
        }
    }
}

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
    front: TlsFront,
    settings: TlsConfig,
    in_service: RwLock<ServedCertificate>,
    /// The files when they were read last. Held while they are read, so that a reading that began earlier never replaces
    /// a later one.
    seen: Mutex<SeenFiles>,
    /// The files as they were read last cannot be used.
    is_faulty: AtomicBool,
    /// Told when the files are to be read now.
    asked: Notify,
}

/// What handshakes are made with.
struct ServedCertificate {
    config: Arc<ServerConfig>,
    loaded_at: TimeMicros,
    /// When the first certificate of its chain ends.
    ends_at: Option<TimeMicros>,
}

/// How a front's certificate stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CertificateStanding {
    /// The front: `mqtt` or `http`.
    pub front: &'static str,
    /// When what is in service was read.
    pub loaded_at: TimeMicros,
    /// When the first certificate of the chain in service ends; `None` if one of them cannot be read.
    pub ends_at: Option<TimeMicros>,
    /// Whether the files as they are now are those in service.
    pub is_current: bool,
}

/// The files as they were read last.
struct SeenFiles {
    /// The digest of their contents.
    digest: TlsFilesDigest,
    /// Why they cannot be used.
    fault: Option<TlsError>,
}

impl Tls {
    /// Reads the files that the settings name, which include a certificate.
    ///
    /// # Errors
    /// The file that cannot be read or used, and why.
    pub fn load(front: TlsFront, settings: TlsConfig) -> Result<Self, TlsError> {
        let files = TlsFiles::read(&settings, front.names());
        let seen = Mutex::new(SeenFiles { digest: tls_files_digest(&files), fault: None });
        let in_service = RwLock::new(served_certificate(front, &settings, &files?)?);
        Ok(Self {
            front,
            settings,
            in_service,
            seen,
            is_faulty: AtomicBool::new(false),
            asked: Notify::new(),
        })
    }

    /// How its certificate stands.
    pub fn standing(&self) -> CertificateStanding {
        let (loaded_at, ends_at) = {
            let in_service = self.in_service.read();
            (in_service.loaded_at, in_service.ends_at)
        };
        // Not locked for: it is held while the files are read.
        let is_current = !self.is_faulty.load(Ordering::Relaxed);
        CertificateStanding { front: self.front.name(), loaded_at, ends_at, is_current }
    }

    /// Performs the handshake with a client, with the certificate that is now in service.
    pub(super) async fn accept(&self, tcp: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let config = self.in_service.read().config.clone();
        TlsAcceptor::from(config).accept(tcp).await
    }

    /// Has the files read now, if [`Tls::follow_files`] is polled, and does not wait for that. What is wrong with them
    /// is said then, also if it was said before.
    pub fn read_now(&self) {
        self.asked.notify_one();
    }

    /// Follows changes of the files for as long as it is polled.
    pub async fn follow_files(self: Arc<Self>) {
        loop {
            let is_asked = tokio::select! {
                () = tokio::time::sleep(TLS_FILES_CHECK_EVERY) => false,
                () = self.asked.notified() => true,
            };
            let tls = self.clone();
            // Blocking: the files may be on a slow network file system.
            let _ = tokio::task::spawn_blocking(move || tls.reload_changed(is_asked)).await;
        }
    }

    /// Reads the files, and puts them into service if they have changed and are valid; otherwise what is in service
    /// stays.
    fn reload_changed(&self, says_again: bool) {
        let mut seen = self.seen.lock();
        let files = TlsFiles::read(&self.settings, self.front.names());
        let digest = tls_files_digest(&files);
        if digest == seen.digest {
            if let Some(error) = seen.fault.as_ref().filter(|_| says_again) {
                warn!(%error, "the TLS files cannot be used; those that were read before stay in service");
            }
            return;
        }
        let fault = match files.and_then(|files| served_certificate(self.front, &self.settings, &files)) {
            Ok(served) => {
                *self.in_service.write() = served;
                info!(certificate = %self.settings.certificate.display(), "a new TLS certificate is in service");
                None
            }
            Err(error) => {
                warn!(%error, "the TLS files changed and cannot be used; the old ones stay in service");
                Some(error)
            }
        };
        self.is_faulty.store(fault.is_some(), Ordering::Relaxed);
        *seen = SeenFiles { digest, fault };
    }

    /// Why a handshake failed, for the operator; `None` if the client just left.
    pub(super) fn handshake_fault(&self, error: &io::Error) -> Option<String> {
        let (names, protocol) = (self.front.names(), self.front.protocol_words());
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)) => Some(format!(
                "it is not TLS that the client speaks; plain {protocol} is served at {}",
                names.plain_listen
            )),
            Some(rustls::Error::NoCertificatesPresented) => Some(format!(
                "the client presents no certificate, and {} is \"required\"",
                names.client_certificates
            )),
            Some(rustls::Error::AlertReceived(alert)) => Some(format!(
                "the client refuses ours, most often because it does not know who issued it: {alert:?}"
            )),
            Some(error) => Some(error.to_string()),
            None if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => None,
            None => Some(error.to_string()),
        }
    }
}

/// What handshakes of a front need.
fn served_certificate(
    front: TlsFront,
    settings: &TlsConfig,
    files: &TlsFiles,
) -> Result<ServedCertificate, TlsError> {
    let mut config = server_config(settings, front.names(), files)?;
    config.alpn_protocols = front.protocols().iter().map(|name| name.to_vec()).collect();
    Ok(ServedCertificate { config: Arc::new(config), loaded_at: now_micros(), ends_at: files.first_end() })
}
