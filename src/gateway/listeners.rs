//! The listeners: bound before anything is opened, so that a port that is taken is told at once.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;

use crate::config::{Config, TlsConfig};
use crate::front::listen_sockets::ListenSockets;
use crate::front::tls::{Tls, TlsFront};

/// Where the fronts listen. Connections wait in the kernel's queue until they are served.
pub(super) struct Listeners {
    pub(super) mqtt: ListenSockets,
    /// With the certificate, if MQTT is served over TLS.
    pub(super) tls: Option<(ListenSockets, Arc<Tls>)>,
    pub(super) http: ListenSockets,
    /// With the certificate, if HTTP is served over TLS.
    pub(super) http_tls: Option<(ListenSockets, Arc<Tls>)>,
    /// The administration's own.
    pub(super) admin: Option<ListenSockets>,
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
        let mqtt = ListenSockets::bind(&config.mqtt.listen).context("mqtt.listen")?;
        let over_tls = |front, settings: &TlsConfig, setting| match settings.is_served() {
            true => {
                let listener = ListenSockets::bind(&settings.listen).context(setting)?;
                anyhow::Ok(Some((listener, Arc::new(Tls::load(front, settings.clone())?))))
            }
            false => Ok(None),
        };
        let tls = over_tls(TlsFront::Mqtt, &config.mqtt.tls, "mqtt.tls.listen")?;
        let http = ListenSockets::bind(&config.http.listen).context("http.listen")?;
        let http_tls = over_tls(TlsFront::Http, &config.http.tls, "http.tls.listen")?;
        let admin = match &config.http.admin.listen {
            Some(at) => Some(ListenSockets::bind(at).context("http.admin.listen")?),
            None => None,
        };
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
            admin: self.admin.as_ref().map(ListenSockets::local_addr).transpose()?,
        })
    }
}
