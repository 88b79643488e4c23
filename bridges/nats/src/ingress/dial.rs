//! Connects the ingress to a server: TCP, TLS where the server or its address asks for it, CONNECT, and the
//! subscription.

use std::io;
use std::path::Path;
use std::sync::Arc;

use async_nats::ServerAddr;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::BytesMut;
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::IngressSettings;
use super::wire::{ServerOperation, take_operation};
use crate::connection::{NatsCredentials, NatsSettings};
use crate::credentials_file::CredentialsFile;

/// A connection to a server.
pub(super) trait LinkStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> LinkStream for T {}

/// The number of the ingress's only subscription on its connection.
pub(super) const SUBSCRIPTION_ID: u64 = 1;

/// What a server says about itself.
#[derive(Deserialize)]
struct ServerInfo {
    #[serde(default)]
    tls_required: bool,
    #[serde(default)]
    nonce: Option<String>,
    /// Other servers of its cluster, as `HOST:PORT`.
    #[serde(default)]
    connect_urls: Vec<String>,
}

impl ServerInfo {
    /// The other servers that may be connected to. None over TLS: anybody on the way may have written what a server says
    /// before the handshake, and the password would go to whom that names.
    fn other_servers(&self, tls: bool) -> Vec<ServerAddr> {
        let named = self.connect_urls.iter().filter(|_| !tls);
        named.filter_map(|url| url.parse().ok()).collect()
    }
}

/// A connection that is subscribed.
pub(super) struct DialedLink {
    pub(super) stream: Box<dyn LinkStream>,
    /// What was read already and is not taken yet.
    pub(super) read: BytesMut,
    /// Other servers of its cluster.
    pub(super) others: Vec<ServerAddr>,
    /// How many PONGs are still to come.
    pub(super) pings_sent: u64,
}

/// Connects to `server`, and subscribes.
///
/// # Errors
/// The server is away, or refuses the gateway.
pub(super) async fn dial(
    server: &ServerAddr,
    connection: &NatsSettings,
    settings: &IngressSettings,
) -> io::Result<DialedLink> {
    let tcp = TcpStream::connect((server.host(), server.port())).await?;
    tcp.set_nodelay(true)?;
    let mut stream: Box<dyn LinkStream> = Box::new(tcp);
    let mut read = BytesMut::new();
    let ServerOperation::Info(info) = next_operation(&mut stream, &mut read).await? else {
        return Err(io::Error::other("the server does not begin with INFO"));
    };
    let info: ServerInfo = serde_json::from_slice(&info).map_err(io::Error::other)?;
    let tls = info.tls_required || server.tls_required() || connection.ca.is_some();
    if tls {
        let name = ServerName::try_from(server.host().to_owned()).map_err(io::Error::other)?;
        let config = client_config(connection.ca.as_deref())?;
        stream = Box::new(TlsConnector::from(config).connect(name, stream).await?);
        read.clear();
    }
    let connect = connect_options(server, connection, info.nonce.as_deref(), tls)?;
    let IngressSettings { subject, queue, .. } = settings;
    let hello = format!("CONNECT {connect}\r\nSUB {subject} {queue} {SUBSCRIPTION_ID}\r\nPING\r\n");
    stream.write_all(hello.as_bytes()).await?;
    stream.flush().await?;
    let pings_sent = loop {
        // Messages may come before the answer: they are left where they are.
        if read.starts_with(b"MSG") || read.starts_with(b"HMSG") {
            break 1;
        }
        match take_operation(&mut read).map_err(io::Error::other)? {
            Some(ServerOperation::Pong) => break 0,
            Some(ServerOperation::Complaint(words)) => return Err(io::Error::other(words)),
            Some(_) => {}
            None => read_more(&mut stream, &mut read).await?,
        }
    };
    Ok(DialedLink { stream, read, others: info.other_servers(tls), pings_sent })
}

/// Reads until there is an operation.
async fn next_operation(
    stream: &mut Box<dyn LinkStream>,
    read: &mut BytesMut,
) -> io::Result<ServerOperation> {
    loop {
        if let Some(operation) = take_operation(read).map_err(io::Error::other)? {
            return Ok(operation);
        }
        read_more(stream, read).await?;
    }
}

async fn read_more(stream: &mut Box<dyn LinkStream>, read: &mut BytesMut) -> io::Result<()> {
    match stream.read_buf(read).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// The argument of CONNECT.
fn connect_options(
    server: &ServerAddr,
    connection: &NatsSettings,
    nonce: Option<&str>,
    tls: bool,
) -> io::Result<serde_json::Value> {
    let mut options = json!({
        "verbose": false,
        "pedantic": false,
        "tls_required": tls,
        "name": connection.name,
        "lang": "rust-headgate",
        "version": env!("CARGO_PKG_VERSION"),
        "protocol": 1,
        "headers": true,
    });
    match &connection.credentials {
        NatsCredentials::Password { user, password } => {
            options["user"] = json!(user);
            options["pass"] = json!(password);
        }
        NatsCredentials::File(file) => {
            let credentials = CredentialsFile::read(file)?;
            let signature = credentials.sign(nonce.unwrap_or_default().as_bytes())?;
            options["jwt"] = json!(credentials.jwt);
            options["nkey"] = json!(credentials.public_key());
            options["sig"] = json!(URL_SAFE_NO_PAD.encode(signature));
        }
        NatsCredentials::None => {
            if let (Some(user), Some(password)) = (server.username(), server.password()) {
                options["user"] = json!(user);
                options["pass"] = json!(password);
            }
        }
    }
    Ok(options)
}

/// TLS that trusts the system's issuers, and those in `ca`.
fn client_config(ca: Option<&Path>) -> io::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(ca) = ca {
        let pem = std::fs::read(ca)?;
        for issuer in CertificateDer::pem_slice_iter(&pem) {
            roots.add(issuer.map_err(io::Error::other)?).map_err(io::Error::other)?;
        }
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()));
    let builder = builder.with_safe_default_protocol_versions().map_err(io::Error::other)?;
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn nobody_on_the_way_to_a_server_over_tls_can_name_another_one() {
        let info = br#"{"tls_required":true,"connect_urls":["evil:4222","10.0.0.2:4222"]}"#;
        let info: ServerInfo = serde_json::from_slice(info).expect("as servers write it");
        assert!(info.other_servers(true).is_empty());
        let others: Vec<_> =
            info.other_servers(false).iter().map(|other| (other.host().to_owned(), other.port())).collect();
        assert_eq!(others, [("evil".to_owned(), 4222), ("10.0.0.2".to_owned(), 4222)]);
    }

    /// Messages of others came with the first answer, and the first one was dropped.
    #[tokio::test]
    async fn messages_that_come_before_the_first_answer_are_kept() {
        let message = "MSG a.b 1 _INBOX.1 2\r\nhi\r\n";
        // Wherever the bytes are cut.
        for (first, second) in [("", message), (message, ""), message.split_at(1), message.split_at(12)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
            let port = listener.local_addr().expect("an address").port();
            let serving = tokio::spawn(async move {
                let (mut tcp, _) = listener.accept().await.expect("accepted");
                tcp.set_nodelay(true).expect("set");
                tcp.write_all(b"INFO {}\r\n").await.expect("sent");
                let mut said = Vec::new();
                while !said.ends_with(b"PING\r\n") {
                    assert!(tcp.read_buf(&mut said).await.expect("readable") > 0);
                }
                tcp.write_all(format!("+OK\r\n{first}").as_bytes()).await.expect("sent");
                tokio::task::yield_now().await;
                tcp.write_all(format!("{second}PONG\r\n").as_bytes()).await.expect("sent");
                tcp
            });
            let server: ServerAddr = format!("nats://127.0.0.1:{port}").parse().expect("an address");
            let connection = NatsSettings {
                servers: Vec::new(),
                credentials: NatsCredentials::None,
                ca: None,
                name: "test".to_owned(),
            };
            let DialedLink { mut stream, mut read, pings_sent, .. } =
                dial(&server, &connection, &IngressSettings::small()).await.expect("subscribed");
            assert_eq!(pings_sent, 1, "the answer is still to come");
            let next = next_operation(&mut stream, &mut read).await.expect("a message");
            let ServerOperation::Message(parcel) = next else { panic!("the message is gone") };
            assert_eq!(parcel.payload(), b"hi");
            let next = next_operation(&mut stream, &mut read).await.expect("the answer");
            assert!(matches!(next, ServerOperation::Pong));
            serving.await.expect("no panic");
        }
    }
}
