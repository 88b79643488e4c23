//! Whom the commands trust over TLS: the issuers that the system trusts, and those in the file of `--cacert` or
//! `HEADGATE_CACERT`. There is no way to trust everybody.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, bail};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::client;

/// The file of `--cacert`, once the command line is read.
static CA_FILE: OnceLock<PathBuf> = OnceLock::new();

/// Remembers the file of `--cacert` for the rest of the process.
pub(super) fn set_ca_file(file: PathBuf) {
    // A command line is read once.
    let _ = CA_FILE.set(file);
}

/// The issuers that are trusted, at least one.
fn issuers() -> anyhow::Result<Vec<CertificateDer<'static>>> {
    // Unreadable files of the system are left out: with a file of one's own they need not matter.
    let mut issuers = rustls_native_certs::load_native_certs().certs;
    let of_variable = || client::variable("HEADGATE_CACERT").map(PathBuf::from);
    if let Some(file) = CA_FILE.get().cloned().or_else(of_variable) {
        let name = file.display();
        let pem = std::fs::read(&file).with_context(|| format!("the certificates in {name}"))?;
        let own: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        let own = own.map_err(|_| anyhow::anyhow!("{name} is not PEM"))?;
        if own.is_empty() {
            bail!("there is no certificate in {name} (PEM)");
        }
        issuers.extend(own);
    }
    if issuers.is_empty() {
        bail!(
            "this system trusts no issuer of certificates: name a file with one (--cacert, HEADGATE_CACERT)"
        );
    }
    Ok(issuers)
}

/// The TLS of the HTTP agent.
///
/// # Errors
/// A file of certificates that cannot be used.
pub(super) fn agent_tls() -> anyhow::Result<TlsConfig> {
    let issuers = issuers()?;
    let roots: Vec<Certificate<'static>> =
        issuers.iter().map(|issuer| Certificate::from_der(issuer).to_owned()).collect();
    Ok(TlsConfig::builder()
        .unversioned_rustls_crypto_provider(Arc::new(default_provider()))
        .root_certs(RootCerts::new_with_certs(&roots))
        .build())
}

/// The TLS of a client of MQTT.
///
/// # Errors
/// A file of certificates that cannot be used.
pub(super) fn client_tls() -> anyhow::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(issuers()?);
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()));
    let builder = builder.with_safe_default_protocol_versions().context("TLS")?;
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}

/// Why a server's certificate is not trusted, with what to do; `None` for any other error.
pub(super) fn explain(error: &ureq::Error) -> Option<String> {
    // The client hides rustls' error under others of its own, without a source.
    let words = error.to_string();
    let (_, fault) = words.split_once("invalid peer certificate: ")?;
    Some(match fault.contains("UnknownIssuer") {
        true => "the issuer of its certificate is not known; name its file with --cacert or HEADGATE_CACERT"
            .to_owned(),
        false => fault.to_owned(),
    })
}
