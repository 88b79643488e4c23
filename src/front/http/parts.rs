//! What the HTTP front is made of: what the gateway gives it to work with, and where it is served.

use std::net::SocketAddr;
use std::sync::Arc;

use headgate_bridge_nats::Nats;

use crate::backup::BackupDesk;
use crate::config::{self, PublicMqtt, PublicUrl};
use crate::consume::egress::Egress;
use crate::consume::quarantine::QuarantineLeakRules;
use crate::consume::query::RecordsReader;
use crate::consume::storage::StorageSinks;
use crate::consume::subscriber::Subscribers;
use crate::front::connection_table::ConnectionTable;
use crate::front::listen_sockets::ListenSockets;
use crate::front::proxied::ProxyTrust;
use crate::front::tls::Tls;
use crate::front::{mqtt, nats};
use crate::intake::Intake;
use crate::log::Log;
use crate::observe::disk_figures::DiskFigures;
use crate::observe::metrics::Metrics;

/// What the HTTP front works with.
pub struct HttpFrontParts {
    /// Where messages are handed in.
    pub intake: Intake,
    /// For offsets and health.
    pub log: Arc<dyn Log>,
    /// Stored records, if there is storage.
    pub query: Option<RecordsReader>,
    /// The rules for records that leaked keys let in.
    pub leaks: QuarantineLeakRules,
    /// Retained messages, of which those that a leaked key let in are withheld too, and the health of what
    /// serves subscribers.
    pub subscribers: Arc<Subscribers>,
    /// The storage consumers, if there are any.
    pub storage: Option<Arc<StorageSinks>>,
    /// The egress consumer, which sends records to NATS, if there is one.
    pub egress: Option<Arc<Egress>>,
    /// For `/metrics`.
    pub metrics: Arc<Metrics>,
    /// Limits.
    pub config: config::HttpConfig,
    /// Where connections are entered.
    pub connections: Arc<ConnectionTable>,
    /// Where those to the administration's listener are entered. Of its own, so that a crowd of devices or strangers never
    /// keeps an administrator out.
    pub admin_connections: Arc<ConnectionTable>,
    /// Takes over connections that carry MQTT over WebSocket.
    pub mqtt: mqtt::Acceptor,
    /// Where MQTT is served, for the lines that say how to connect.
    pub mqtt_addr: SocketAddr,
    /// Where MQTT is served over TLS, if it is.
    pub mqtt_tls_addr: Option<SocketAddr>,
    /// Where HTTP is served.
    pub http_addr: SocketAddr,
    /// Where HTTP is served over TLS, if it is.
    pub http_tls_addr: Option<SocketAddr>,
    /// Where clients reach HTTP and MQTT, if that is not where they are served.
    pub public_url: PublicUrl,
    /// As `public_url`.
    pub public_mqtt: PublicMqtt,
    /// The proxies that are believed.
    pub proxies: Arc<ProxyTrust>,
    /// The NATS front, if there is one.
    pub nats: Option<Arc<nats::NatsFront>>,
    /// Addresses of the NATS servers, for the lines that say how to connect.
    pub nats_servers: Vec<String>,
    /// The connection on which NATS asks about its clients, if API keys are NATS users.
    pub callout: Option<Nats>,
    /// Makes backups.
    pub backups: Arc<BackupDesk>,
    /// What the data directory takes.
    pub disk_figures: Arc<DiskFigures>,
    /// The certificates in service.
    pub certificates: Vec<Arc<Tls>>,
}

/// Where HTTP is served.
pub struct HttpListeners {
    /// Without TLS.
    pub plain: ListenSockets,
    /// Over TLS, if there is a certificate.
    pub tls: Option<ListenSockets>,
    /// The administration's own, over TLS if there is a certificate.
    pub admin: Option<ListenSockets>,
    /// The certificate.
    pub certificate: Option<Arc<Tls>>,
}
