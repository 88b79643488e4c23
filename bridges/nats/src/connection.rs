//! A connection to a NATS server or cluster. It connects in the background and reconnects by itself, so that
//! an absent NATS is a transient state to its users. [`Nats::trouble`] says why NATS is absent.

use parking_lot::Mutex;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_nats::{Auth, AuthError, Client, ConnectOptions, Event, ServerAddr};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::credentials_file::CredentialsFile;

/// The longest wait between two attempts to connect.
const NATS_RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// How often the client pings its server. After three missing answers it connects to another server: a host
/// that is cut off closes no connection.
const NATS_PING_INTERVAL: Duration = Duration::from_secs(1);
/// How long a server may take to accept the client.
const NATS_CONNECT_WAIT_MAX: Duration = Duration::from_secs(2);

/// Where NATS is, and how to authenticate.
#[derive(Clone)]
pub struct NatsSettings {
    /// `nats://HOST:PORT` or `tls://HOST:PORT`, of one or more servers of a cluster.
    pub servers: Vec<String>,
    /// How to authenticate.
    pub credentials: NatsCredentials,
    /// A file with the issuers of the servers' certificates (PEM), beside those that the system trusts. With it, every
    /// connection is over TLS.
    pub ca: Option<PathBuf>,
    /// The connection's name in NATS' monitoring.
    pub name: String,
}

impl std::fmt::Debug for NatsSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let servers: Vec<String> = self.servers.iter().map(|address| without_credentials(address)).collect();
        f.debug_struct("NatsSettings")
            .field("servers", &servers)
            .field("credentials", &self.credentials)
            .field("ca", &self.ca)
            .field("name", &self.name)
            .finish()
    }
}

impl NatsSettings {
    /// The servers' addresses.
    ///
    /// # Errors
    /// [`NatsError::Address`], which shows no password.
    pub(crate) fn server_addresses(&self) -> Result<Vec<ServerAddr>, NatsError> {
        let parse = |address: &String| {
            address.parse().map_err(|_| NatsError::Address { address: without_credentials(address) })
        };
        self.servers.iter().map(parse).collect()
    }

    /// Whether a server's certificate counts.
    fn has_tls(&self) -> bool {
        let is_tls = |address: &ServerAddr| address.tls_required();
        self.ca.is_some() || self.server_addresses().is_ok_and(|servers| servers.iter().any(is_tls))
    }
}

/// How a connection authenticates to NATS.
#[derive(Clone)]
pub enum NatsCredentials {
    /// Not at all.
    None,
    /// A user of the server's configuration.
    Password {
        /// The user.
        user: String,
        /// Its password.
        password: String,
    },
    /// A `.creds` file, as `nsc` writes it.
    File(PathBuf),
}

impl std::fmt::Debug for NatsCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NatsCredentials::None => f.write_str("None"),
            NatsCredentials::Password { user, .. } => f.debug_tuple("Password").field(user).finish(),
            NatsCredentials::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

/// Why a connection could not be set up. An absent NATS is not an error.
#[derive(Debug, thiserror::Error)]
pub enum NatsError {
    /// An invalid server address.
    #[error("{address:?} is not the address of a NATS server, such as nats://HOST:4222 or tls://HOST:4222")]
    Address {
        /// What was given, without user and password.
        address: String,
    },
    /// A file that cannot be read.
    #[error("{}: {detail}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// Any other error that keeps the client from starting.
    #[error("NATS: {0}")]
    Client(String),
}

/// A connection. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Nats {
    client: Client,
    trouble: Arc<Mutex<Option<String>>>,
    /// How many times it has connected.
    connections: watch::Receiver<u64>,
}

impl Nats {
    /// Begins to connect, and retries without end, now and after every loss of the connection.
    ///
    /// # Errors
    /// [`NatsError`] for settings that can never work.
    pub async fn connect(settings: &NatsSettings) -> Result<Self, NatsError> {
        let servers = settings.servers.iter().map(|address| without_credentials(address));
        let servers = servers.collect::<Vec<_>>().join(",");
        let addresses = settings.server_addresses()?;
        let waiting = format!("not connected to NATS at {servers} yet");
        let trouble = Arc::new(Mutex::new(Some(waiting)));
        let seen = trouble.clone();
        let (count, connections) = watch::channel(0);
        let count = Arc::new(count);
        let options = match &settings.credentials {
            NatsCredentials::None => ConnectOptions::new(),
            NatsCredentials::Password { user, password } => {
                ConnectOptions::with_user_and_password(user.clone(), password.clone())
            }
            NatsCredentials::File(path) => {
                let failed =
                    |error: io::Error| NatsError::File { path: path.clone(), detail: error.to_string() };
                sign_in(path, &[]).map_err(failed)?;
                let path = path.clone();
                // At each connection: the file is replaced before its token ends.
                ConnectOptions::with_auth_callback(move |nonce| {
                    let auth = sign_in(&path, &nonce).map_err(AuthError::new);
                    async move { auth }
                })
            }
        };
        let mut options = options
            .name(&settings.name)
            .retry_on_initial_connect()
            .ping_interval(NATS_PING_INTERVAL)
            .connection_timeout(NATS_CONNECT_WAIT_MAX)
            .reconnect_delay_callback(|attempts| {
                Duration::from_millis(50 << attempts.min(5)).min(NATS_RECONNECT_PAUSE_MAX)
            })
            .event_callback(move |event| {
                let (servers, seen, count) = (servers.clone(), seen.clone(), count.clone());
                async move {
                    note_connection_event(&event, &servers, &seen);
                    if matches!(event, Event::Connected) {
                        count.send_modify(|count| *count += 1);
                    }
                }
            });
        if let Some(ca) = &settings.ca {
            options = options.add_root_certificates(ca.clone()).require_tls(true);
        }
        if settings.has_tls() {
            // Anybody on the way may have written what a server says before the handshake: the password would go, in
            // the clear, to whom that names.
            options = options.ignore_discovered_servers();
        }
        let client =
            options.connect(addresses).await.map_err(|error| NatsError::Client(error.to_string()))?;
        Ok(Self { client, trouble, connections })
    }

    /// The client library's handle.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// How many times it has connected. After a change, a subscriber may have missed messages.
    pub fn connections(&self) -> watch::Receiver<u64> {
        self.connections.clone()
    }

    /// What keeps NATS away, while it is away.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().clone()
    }
}

/// A server's address without the user and password that it may contain, for logs.
pub fn without_credentials(address: &str) -> String {
    match (address.split_once("://"), address.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, server))) => format!("{scheme}://{server}"),
        (None, Some((_, server))) => server.to_owned(),
        (_, None) => address.to_owned(),
    }
}

/// What a `.creds` file says to a server that has sent this nonce.
fn sign_in(path: &Path, nonce: &[u8]) -> io::Result<Auth> {
    let credentials = CredentialsFile::read(path)?;
    let mut auth = Auth::new();
    auth.signature = Some(credentials.sign(nonce)?);
    auth.jwt = Some(credentials.jwt);
    Ok(auth)
}

/// Records and logs an event of the connection. A loss is logged once, and again when its cause is another one, not at
/// every attempt to reconnect.
fn note_connection_event(event: &Event, servers: &str, seen: &Mutex<Option<String>>) {
    let mut trouble = seen.lock();
    match event {
        Event::Connected => {
            info!(servers, "connected to NATS");
            *trouble = None;
        }
        Event::Disconnected => {
            if trouble.is_none() {
                warn!(servers, "NATS is away");
            }
            *trouble = Some(format!("NATS at {servers} is away"));
        }
        Event::ClientError(error) if trouble.is_some() => {
            let error = error.to_string();
            let text = format!("NATS at {servers} is away ({})", error.trim_start_matches("nats: "));
            if trouble.as_ref() != Some(&text) {
                info!("{text}");
            }
            *trouble = Some(text);
        }
        Event::ClientError(error) => warn!(servers, %error, "NATS"),
        Event::ServerError(error) => warn!(servers, %error, "NATS"),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::TcpListener;

    use super::*;

    /// When its token had ended, the gateway stayed away from NATS until it was started again.
    #[tokio::test]
    async fn a_credentials_file_that_was_replaced_counts_at_the_next_connection() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("user.creds");
        let renew = |jwt: &str| {
            let seed = nkeys::KeyPair::new_user().seed().expect("a seed");
            let text = format!(
                "-----BEGIN NATS USER JWT-----\n{jwt}\n---\n-----BEGIN USER NKEY SEED-----\n{seed}\n"
            );
            std::fs::write(&path, text).expect("written");
        };
        renew("first");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let settings = NatsSettings {
            servers: vec![format!("nats://{address}")],
            credentials: NatsCredentials::File(path.clone()),
            ca: None,
            name: "test".to_owned(),
        };
        let nats = Nats::connect(&settings).await.expect("the file can be read");
        let mut seen = Vec::new();
        for next in ["second", "third"] {
            let accepted = tokio::time::timeout(Duration::from_secs(30), listener.accept()).await;
            let (mut socket, _) = accepted.expect("it connects").expect("accepted");
            let (reading, mut writing) = socket.split();
            writing.write_all(b"INFO {\"nonce\":\"abc\"}\r\n").await.expect("sent");
            let mut line = String::new();
            BufReader::new(reading).read_line(&mut line).await.expect("read");
            let connect = line.strip_prefix("CONNECT ").expect("a CONNECT");
            let connect: serde_json::Value = serde_json::from_str(connect).expect("JSON");
            seen.push((connect["jwt"].clone(), connect["sig"].is_string()));
            renew(next);
            writing.write_all(b"-ERR 'Authorization Violation'\r\n").await.expect("sent");
        }
        assert_eq!(seen, [("first".into(), true), ("second".into(), true)]);
        let says_why = || nats.trouble().is_some_and(|words| words.contains("authorization violation"));
        while !says_why() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[test]
    fn tls_is_used_where_a_server_or_an_issuer_says_so() {
        let issuer = Some(PathBuf::from("ca.pem"));
        for (servers, ca, has_tls) in [
            (&["nats://a:4222"][..], None, false),
            (&["a:4222"], None, false),
            (&["nats://a:4222"], issuer, true),
            (&["nats://a:4222", "tls://b:4222"], None, true),
        ] {
            let servers = servers.iter().map(|server| (*server).to_owned()).collect();
            let credentials = NatsCredentials::None;
            let settings = NatsSettings { servers, credentials, ca, name: "test".to_owned() };
            assert_eq!(settings.has_tls(), has_tls, "{settings:?}");
        }
    }

    #[test]
    fn an_address_is_shown_without_user_and_password() {
        for (address, shown) in [
            ("nats://127.0.0.1:4222", "nats://127.0.0.1:4222"),
            ("tls://u:p@w@nats.example:4222", "tls://nats.example:4222"),
            ("u:p@nats.example", "nats.example"),
            ("nats.example", "nats.example"),
        ] {
            assert_eq!(without_credentials(address), shown);
        }
    }
}
