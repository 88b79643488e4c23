//! The listeners: bound before anything is opened, so that a port that is taken is told at once.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use tokio::net::{TcpListener, TcpSocket};

use crate::config::{Config, TlsConfig};
use crate::front::tls::{Tls, TlsFront};
use crate::limits::LISTEN_BACKLOG;

/// Where the fronts listen. Connections wait in the kernel's queue until they are served.
pub(super) struct Listeners {
    pub(super) mqtt: TcpListener,
    /// With the certificate, if MQTT is served over TLS.
    pub(super) tls: Option<(TcpListener, Arc<Tls>)>,
    pub(super) http: TcpListener,
    /// With the certificate, if HTTP is served over TLS.
    pub(super) http_tls: Option<(TcpListener, Arc<Tls>)>,
    /// The administration's own.
    pub(super) admin: Option<TcpListener>,
}

/// The addresses of the listeners, with the ports that the system chose.
#[derive(Clone, Copy)]
pub(super) struct ListenAddrs {
    pub(super) mqtt: SocketAddr,
    pub(super) mqtt_tls: Option<SocketAddr>,
    pub(super) http: SocketAddr,
    pub(super) http_tls: Option<SocketAddr>,
    pub(super) admin: Option<SocketAddr>,
}

impl Listeners {
    /// Binds every listener that the configuration names.
    ///
    /// # Errors
    /// An address that cannot be bound, a certificate that cannot be used; worded for an operator.
    pub(super) fn bind(config: &Config) -> anyhow::Result<Self> {
        let mqtt = listen(config.mqtt.listen).context("mqtt.listen")?;
        let over_tls = |front, settings: &TlsConfig, setting| match settings.is_served() {
            true => {
                let listener = listen(settings.listen).context(setting)?;
                anyhow::Ok(Some((listener, Arc::new(Tls::load(front, settings.clone())?))))
            }
            false => Ok(None),
        };
        let tls = over_tls(TlsFront::Mqtt, &config.mqtt.tls, "mqtt.tls.listen")?;
        let http = listen(config.http.listen).context("http.listen")?;
        let http_tls = over_tls(TlsFront::Http, &config.http.tls, "http.tls.listen")?;
        let admin = config.http.admin.listen.map(|at| listen(at).context("http.admin.listen")).transpose()?;
        Ok(Self { mqtt, tls, http, http_tls, admin })
    }

    /// The certificates in service.
    pub(super) fn certificates(&self) -> Vec<Arc<Tls>> {
        let listeners = [&self.tls, &self.http_tls].into_iter().flatten();
        listeners.map(|(_, tls)| tls.clone()).collect()
    }

    /// Where they listen.
    ///
    /// # Errors
    /// The system does not say.
    pub(super) fn addrs(&self) -> std::io::Result<ListenAddrs> {
        Ok(ListenAddrs {
            mqtt: self.mqtt.local_addr()?,
            mqtt_tls: self.tls.as_ref().map(|(listener, _)| listener.local_addr()).transpose()?,
            http: self.http.local_addr()?,
            http_tls: self.http_tls.as_ref().map(|(listener, _)| listener.local_addr()).transpose()?,
            admin: self.admin.as_ref().map(TcpListener::local_addr).transpose()?,
        })
    }
}

fn listen(addr: SocketAddr) -> anyhow::Result<TcpListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(addr).with_context(|| format!("cannot listen on {addr}"))?;
    Ok(socket.listen(LISTEN_BACKLOG)?)
}
