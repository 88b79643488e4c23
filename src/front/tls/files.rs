//! The files of a TLS listener: read at one moment, and made into what a handshake needs. Only regular files are read,
//! and no more of one than a certificate chain can be long: a FIFO, a device or a socket in their place is an error and
//! is not waited for.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{InconsistentKeys, RootCertStore, ServerConfig};
use x509_cert::Certificate;
use x509_cert::der::Decode;

use super::TlsError;
use crate::config::{ClientCertificates, TlsConfig, TlsSettingNames};
use crate::limits::TLS_FILE_BYTES_MAX;
use crate::message::TimeMicros;

/// A digest of the files' contents, or of the read error. A digest, so that no key is kept to compare.
pub(super) type TlsFilesDigest = blake3::Hash;

pub(super) fn tls_files_digest(files: &Result<TlsFiles, TlsError>) -> TlsFilesDigest {
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
pub(super) struct TlsFiles {
    certificate: Vec<u8>,
    key: Vec<u8>,
    /// Empty if no client certificates are asked for.
    client_ca: Vec<u8>,
}

impl TlsFiles {
    pub(super) fn read(settings: &TlsConfig, names: &TlsSettingNames) -> Result<Self, TlsError> {
        let read = |setting, file: &Path| {
            read_regular(file).map_err(|error| unusable_tls_file(setting, file, error.to_string()))
        };
        let client_ca = match settings.client_ca.as_os_str().is_empty() {
            true => Vec::new(),
            false => read(names.client_ca, &settings.client_ca)?,
        };
        Ok(Self {
            certificate: read(names.certificate, &settings.certificate)?,
            key: read(names.key, &settings.key)?,
            client_ca,
        })
    }
}

impl TlsFiles {
    /// When the first certificate of the chain ends that does; `None` if one of them cannot be read.
    pub(super) fn first_end(&self) -> Option<TimeMicros> {
        let ends = CertificateDer::pem_slice_iter(&self.certificate).map(|der| {
            let certificate = Certificate::from_der(&der.ok()?).ok()?;
            let end = certificate.tbs_certificate.validity.not_after.to_unix_duration();
            TimeMicros::try_from(end.as_micros()).ok()
        });
        ends.collect::<Option<Vec<_>>>()?.into_iter().min()
    }
}

/// Reads a regular file of at most [`TLS_FILE_BYTES_MAX`] bytes.
fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let irregular = || {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is no regular file (but a directory, FIFO, socket or device)",
        )
    };
    // Looked at before it is opened, because to open a device may have an effect; and again after, because it may have
    // been replaced meanwhile. Without O_NONBLOCK the opening of a FIFO waits until somebody writes.
    if !std::fs::metadata(path)?.is_file() {
        return Err(irregular());
    }
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(irregular());
    }
    let mut contents = Vec::new();
    file.take(TLS_FILE_BYTES_MAX + 1).read_to_end(&mut contents)?;
    match contents.len() as u64 > TLS_FILE_BYTES_MAX {
        true => Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than any certificate file")),
        false => Ok(contents),
    }
}

fn unusable_tls_file(setting: &'static str, file: &Path, reason: impl Into<String>) -> TlsError {
    TlsError { setting, file: file.to_owned(), reason: reason.into() }
}

/// What handshakes need, without the protocols that ALPN offers.
pub(super) fn server_config(
    settings: &TlsConfig,
    names: &TlsSettingNames,
    files: &TlsFiles,
) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(default_provider());
    let identity = certified_key(settings, names, files, &provider)?;
    let versions =
        ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let builder = versions.expect("ring has cipher suites for TLS 1.2 and 1.3");
    let builder = if settings.client_ca.as_os_str().is_empty() {
        builder.with_no_client_auth()
    } else {
        let no = |reason: String| unusable_tls_file(names.client_ca, &settings.client_ca, reason);
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
    Ok(builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(identity))))
}

/// The certificate chain with its key.
fn certified_key(
    settings: &TlsConfig,
    names: &TlsSettingNames,
    files: &TlsFiles,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, TlsError> {
    let no_certificate = |reason: String| unusable_tls_file(names.certificate, &settings.certificate, reason);
    let no_key = |reason: &str| unusable_tls_file(names.key, &settings.key, reason);
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

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use super::*;

    #[test]
    fn what_is_no_regular_file_is_an_error_at_once() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let fifo = dir.path().join("fifo");
        let name = CString::new(fifo.to_str().expect("UTF-8")).expect("no NUL");
        // SAFETY: mkfifo(3) takes a string that ends in NUL and lives across the call.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&fifo, &link).expect("linked");
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("bound");
        for path in [&fifo, &link, &socket, dir.path(), Path::new("/dev/zero"), Path::new("/dev/tty")] {
            let error = read_regular(path).expect_err("not regular");
            assert!(error.to_string().contains("no regular file"), "{}: {error}", path.display());
        }
    }

    #[test]
    fn a_file_is_read_up_to_the_bound_and_not_one_byte_more() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("file");
        for (bytes, is_read) in [(TLS_FILE_BYTES_MAX, true), (TLS_FILE_BYTES_MAX + 1, false)] {
            File::create(&path).and_then(|file| file.set_len(bytes)).expect("made");
            assert_eq!(read_regular(&path).is_ok(), is_read, "{bytes}");
        }
    }
}
