//! TLS as libpq's `sslmode` has it: what is verified of the server's certificate.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WantsClientCert, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, Error, RootCertStore,
    SignatureScheme,
};

use crate::fault::PostgresFault;
use crate::settings::{PostgresSettings, SslMode};

/// The TLS of a connection with these settings.
///
/// # Errors
/// [`PostgresFault::Certificate`] if the file with issuers cannot be used.
pub(crate) fn client_config(settings: &PostgresSettings) -> Result<ClientConfig, PostgresFault> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| PostgresFault::Certificate(error.to_string()))?;
    let is_name_verified = match settings.ssl_mode {
        SslMode::VerifyFull => true,
        SslMode::VerifyCa => false,
        _ => {
            let verifier = Arc::new(AnyCertificate(provider));
            return with_identity(builder.dangerous().with_custom_certificate_verifier(verifier), settings);
        }
    };
    let roots = Arc::new(issuers(settings.ca.as_deref())?);
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider)
        .build()
        .map_err(|error| PostgresFault::Certificate(error.to_string()))?;
    let verifier: Arc<dyn ServerCertVerifier> =
        if is_name_verified { verifier } else { Arc::new(AnyName(verifier)) };
    with_identity(builder.dangerous().with_custom_certificate_verifier(verifier), settings)
}

/// Shows the client's certificate, if there is one. Its files are read at every connection.
fn with_identity(
    builder: ConfigBuilder<ClientConfig, WantsClientCert>,
    settings: &PostgresSettings,
) -> Result<ClientConfig, PostgresFault> {
    let Some((certificate, key)) = &settings.identity else { return Ok(builder.with_no_client_auth()) };
    let unusable =
        |file: &Path, why: String| PostgresFault::Certificate(format!("{}: {why}", file.display()));
    let chain = certificates_in(certificate)?;
    let text = std::fs::read(key).map_err(|error| unusable(key, error.to_string()))?;
    let private = PrivateKeyDer::from_pem_slice(&text)
        .map_err(|_| unusable(key, "it has no private key (PEM)".to_owned()))?;
    let built = builder.with_client_auth_cert(chain, private);
    built.map_err(|error| unusable(certificate, error.to_string()))
}

/// The certificates in a file; at least one.
fn certificates_in(file: &Path) -> Result<Vec<CertificateDer<'static>>, PostgresFault> {
    let unusable = |why: String| PostgresFault::Certificate(format!("{}: {why}", file.display()));
    let text = std::fs::read(file).map_err(|error| unusable(error.to_string()))?;
    let certificates = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
    let certificates = certificates.map_err(|error| unusable(error.to_string()))?;
    match certificates.is_empty() {
        true => Err(unusable("it has no certificate (PEM)".to_owned())),
        false => Ok(certificates),
    }
}

/// The issuers in a file, or those that the system trusts.
fn issuers(file: Option<&Path>) -> Result<RootCertStore, PostgresFault> {
    let mut roots = RootCertStore::empty();
    let Some(file) = file else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        return Ok(roots);
    };
    for certificate in certificates_in(file)? {
        let unusable = |error: Error| PostgresFault::Certificate(format!("{}: {error}", file.display()));
        roots.add(certificate).map_err(unusable)?;
    }
    Ok(roots)
}

/// Takes every certificate, as `sslmode=require` does: TLS against those who listen, not against those who pretend.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Takes a certificate of a trusted issuer whatever name it has, as `sslmode=verify-ca` does.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // The name is verified last, so that everything else holds if that is what fails.
        match self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
