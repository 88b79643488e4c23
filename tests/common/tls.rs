//! TLS for the tests: issuers and certificates made with `openssl`, and a client that sees which
//! certificate it is shown and whether it is told of the end.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::PATIENCE;
use super::wire::Carrier;

/// What the certificates are for, in openssl's form.
const CONFIG: &str = "
[req]
distinguished_name = name
[name]
[issuer]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign
[leaf]
subjectAltName = IP:127.0.0.1,DNS:localhost
extendedKeyUsage = serverAuth,clientAuth
";

/// A certificate and its private key, in PEM files.
#[derive(Debug, Clone)]
pub struct Identity {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Identity {
    /// An issuer of its own in `dir`.
    pub fn issuer(dir: &Path, name: &str) -> Self {
        Self::make(dir, name, None)
    }

    /// A certificate for 127.0.0.1, and for clients, by this issuer.
    pub fn issue(&self, dir: &Path, name: &str) -> Self {
        Self::make(dir, name, Some(self))
    }

    fn make(dir: &Path, name: &str, issuer: Option<&Self>) -> Self {
        let config = dir.join("openssl.cnf");
        std::fs::write(&config, CONFIG).expect("written");
        let made =
            Self { certificate: dir.join(format!("{name}.pem")), key: dir.join(format!("{name}.key")) };
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
        openssl.args(["-days", "2", "-subj", &format!("/CN={name}"), "-config"]).arg(&config);
        openssl.arg("-keyout").arg(&made.key).arg("-out").arg(&made.certificate);
        match issuer {
            None => openssl.args(["-extensions", "issuer"]),
            Some(issuer) => {
                openssl.arg("-CA").arg(&issuer.certificate).arg("-CAkey").arg(&issuer.key);
                openssl.args(["-extensions", "leaf"])
            }
        };
        let output = openssl.output().expect("openssl is installed (tests/run does it)");
        assert!(output.status.success(), "{output:?}");
        made
    }

    /// The certificate's bytes, as they go over the wire.
    pub fn der(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(&self.certificate).expect("a certificate")
    }

    /// Copies both files over another pair, which keeps its names.
    pub fn replace(&self, other: &Self) {
        std::fs::copy(&self.certificate, &other.certificate).expect("copied");
        std::fs::copy(&self.key, &other.key).expect("copied");
    }
}

/// A TLS connection of a client.
pub struct TlsClient(pub StreamOwned<ClientConnection, TcpStream>);

impl TlsClient {
    /// Connects, trusting `issuer` alone, and shakes hands; with a certificate of its own, if any.
    pub fn connect(addr: SocketAddr, issuer: &Identity, own: Option<&Identity>) -> io::Result<Self> {
        let tcp = TcpStream::connect_timeout(&addr, PATIENCE)?;
        Self::over(tcp, issuer, own)
    }

    /// Connects as a client that offers these protocols (ALPN).
    pub fn offering(addr: SocketAddr, issuer: &Identity, protocols: &[&[u8]]) -> io::Result<Self> {
        let tcp = TcpStream::connect_timeout(&addr, PATIENCE)?;
        Self::shake_hands(tcp, issuer, None, protocols)
    }

    /// Shakes hands over a connection that there is.
    pub fn over(tcp: TcpStream, issuer: &Identity, own: Option<&Identity>) -> io::Result<Self> {
        Self::shake_hands(tcp, issuer, own, &[])
    }

    fn shake_hands(
        tcp: TcpStream,
        issuer: &Identity,
        own: Option<&Identity>,
        protocols: &[&[u8]],
    ) -> io::Result<Self> {
        tcp.set_read_timeout(Some(PATIENCE))?;
        let mut roots = RootCertStore::empty();
        roots.add(issuer.der()).expect("an issuer");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots);
        let mut config = match own {
            None => builder.with_no_client_auth(),
            Some(own) => {
                let key = PrivateKeyDer::from_pem_file(&own.key).expect("a key");
                builder.with_client_auth_cert(vec![own.der()], key).expect("a pair")
            }
        };
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        let name = tcp.peer_addr()?.ip().into();
        let connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(connection, tcp);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Self(stream))
    }

    /// The protocol that the gateway chose.
    pub fn protocol(&self) -> Option<&[u8]> {
        self.0.conn.alpn_protocol()
    }

    /// The certificate that the gateway showed.
    pub fn shown(&self) -> CertificateDer<'static> {
        let chain = self.0.conn.peer_certificates().expect("after the handshake");
        chain[0].clone().into_owned()
    }
}

impl Read for TlsClient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(buffer);
        if let Err(error) = &read {
            assert_ne!(error.kind(), io::ErrorKind::UnexpectedEof, "an end without close_notify");
        }
        read
    }
}

impl Write for TlsClient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Carrier for TlsClient {
    fn tcp(&self) -> &TcpStream {
        &self.0.sock
    }
}
