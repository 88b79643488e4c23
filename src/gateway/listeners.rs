//! The listeners: bound before anything is opened, so that a port that is taken is told at once.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use tokio::net::{TcpListener, TcpSocket};
use tracing::warn;

use crate::config::Config;
use crate::front::mqtt;
use crate::limits::LISTEN_BACKLOG;

/// Where the fronts listen. Connections wait in the kernel's queue until they are served.
pub(super) struct Listeners {
    pub(super) mqtt: TcpListener,
    /// With the certificate, if MQTT is served over TLS.
    pub(super) tls: Option<(TcpListener, Arc<mqtt::Tls>)>,
    pub(super) http: TcpListener,
}

/// The addresses of the listeners, with the ports that the system chose.
#[derive(Clone, Copy)]
pub(super) struct ListenAddrs {
    pub(super) mqtt: SocketAddr,
    pub(super) mqtt_tls: Option<SocketAddr>,
    pub(super) http: SocketAddr,
}

impl Listeners {
    /// Binds every listener that the configuration names.
    ///
    /// # Errors
    /// An address that cannot be bound, a certificate that cannot be used; worded for an operator.
    pub(super) fn bind(config: &Config) -> anyhow::Result<Self> {
        let mqtt = listen(config.mqtt.listen).context("mqtt.listen")?;
        let tls = match &config.mqtt.tls {
            settings if settings.is_served() => {
                let listener = listen(settings.listen).context("mqtt.tls.listen")?;
                Some((listener, Arc::new(mqtt::Tls::load(settings.clone())?)))
            }
            _ => None,
        };
        let http = listen(config.http.listen).context("http.listen")?;
        Ok(Self { mqtt, tls, http })
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
        })
    }
}

fn listen(addr: SocketAddr) -> anyhow::Result<TcpListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(addr).with_context(|| format!("cannot listen on {addr}"))?;
    Ok(socket.listen(LISTEN_BACKLOG)?)
}

/// Raises the limit on open files to the system's maximum: each connection needs one.
pub(super) fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a valid pointer to a struct that lives across them.
    let raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    if !raised {
        warn!("cannot raise the limit on open files; fewer connections fit");
    }
}
