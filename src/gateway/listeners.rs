//! The listeners: bound before anything is opened, so that a port that is taken is told at once.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;

use crate::config::Config;
use crate::front::listen_sockets::ListenSockets;
use crate::front::mqtt;

/// Where the fronts listen. Connections wait in the kernel's queue until they are served.
pub(super) struct Listeners {
    pub(super) mqtt: ListenSockets,
    /// With the certificate, if MQTT is served over TLS.
    pub(super) tls: Option<(ListenSockets, Arc<mqtt::Tls>)>,
    pub(super) http: ListenSockets,
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
        let mqtt = ListenSockets::bind(&config.mqtt.listen).context("mqtt.listen")?;
        let tls = match &config.mqtt.tls {
            settings if settings.is_served() => {
                let listener = ListenSockets::bind(&settings.listen).context("mqtt.tls.listen")?;
                Some((listener, Arc::new(mqtt::Tls::load(settings.clone())?)))
            }
            _ => None,
        };
        let http = ListenSockets::bind(&config.http.listen).context("http.listen")?;
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
