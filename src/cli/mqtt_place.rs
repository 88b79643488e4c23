//! Where a gateway's MQTT is, as the commands are told it: `mqtt://HOST:PORT`, `mqtts://HOST:PORT` over TLS, or a plain
//! `HOST:PORT`.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use anyhow::{Context, bail};
use rustls::pki_types::ServerName;
use tempfile::TempDir;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpStream, UnixListener};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use super::client::GatewayAway;
use super::trust;

/// A host and a port, with or without TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MqttPlace {
    /// A name or an address, without brackets.
    pub(super) host: String,
    port: u16,
    /// Whether it is reached over TLS.
    pub(super) tls: bool,
}

impl MqttPlace {
    /// Reads it.
    ///
    /// # Errors
    /// The text is none.
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        let (tls, place) = match text.split_once("://") {
            None => (false, text),
            Some(("mqtt", place)) => (false, place),
            Some(("mqtts", place)) => (true, place),
            Some(_) => bail!("{text} is not HOST:PORT, mqtt://HOST:PORT or mqtts://HOST:PORT"),
        };
        let place = place.trim_end_matches('/');
        let parts = place.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
        let (host, port) = parts.with_context(|| format!("{text} is not HOST:PORT"))?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() {
            bail!("{text} is not HOST:PORT");
        }
        Ok(Self { host: host.to_owned(), port, tls })
    }

    /// Its first address.
    ///
    /// # Errors
    /// The host has none.
    pub(super) fn resolve(&self) -> anyhow::Result<SocketAddr> {
        let mut found =
            (self.host.as_str(), self.port).to_socket_addrs().with_context(|| self.to_string())?;
        found.next().with_context(|| format!("{self} has no address"))
    }
}

impl fmt::Display for MqttPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, tls } = self;
        let scheme = if *tls { "mqtts" } else { "mqtt" };
        match host.contains(':') {
            true => write!(f, "{scheme}://[{host}]:{port}"),
            false => write!(f, "{scheme}://{host}:{port}"),
        }
    }
}

/// A connection over TLS, given to an MQTT client that speaks none through a socket in a directory of its own, which
/// only this user can open. It ends when this is dropped.
pub(super) struct TlsRelay {
    dir: TempDir,
    task: JoinHandle<()>,
}

impl TlsRelay {
    /// Connects, and proves who is there.
    ///
    /// # Errors
    /// Nobody is there, or nobody who is trusted.
    pub(super) async fn open(addr: SocketAddr, host: &str) -> anyhow::Result<Self> {
        let name =
            ServerName::try_from(host.to_owned()).with_context(|| format!("{host} is no host name"))?;
        let away = |error| GatewayAway { place: addr.to_string(), source: Box::new(error) };
        let tcp = TcpStream::connect(addr).await.map_err(away)?;
        // Acknowledgements are small; Nagle's algorithm would delay them.
        let _ = tcp.set_nodelay(true);
        let connecting = TlsConnector::from(trust::client_tls()?).connect(name, tcp);
        let mut tls = connecting.await.with_context(|| {
            format!("{host} is not trusted; --cacert or HEADGATE_CACERT names a file with its issuer")
        })?;
        let dir = tempfile::Builder::new().prefix("headgate-").tempdir().context("a temporary directory")?;
        let listener = UnixListener::bind(dir.path().join("mqtt")).context("a socket")?;
        let task = tokio::spawn(async move {
            if let Ok((mut client, _)) = listener.accept().await {
                let _ = copy_bidirectional(&mut client, &mut tls).await;
            }
        });
        Ok(Self { dir, task })
    }

    /// The socket.
    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("mqtt")
    }
}

impl Drop for TlsRelay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_with_and_without_a_scheme() {
        for (text, shown) in [
            ("127.0.0.1:1883", "mqtt://127.0.0.1:1883"),
            ("mqtt://gw:1883/", "mqtt://gw:1883"),
            ("mqtts://[::1]:8883", "mqtts://[::1]:8883"),
        ] {
            assert_eq!(MqttPlace::parse(text).expect(text).to_string(), shown);
        }
        for text in ["gw", "http://gw:80", "mqtt://gw", ":1883", "gw:x", "mqtts://:1"] {
            assert!(MqttPlace::parse(text).is_err(), "{text}");
        }
    }
}
