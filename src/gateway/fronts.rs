//! The fronts: started last, when everything that they hand messages to is there.

use std::sync::Arc;
use std::time::Duration;

use headgate_bridge_nats::Nats;
use headgate_bridge_nats::connection::without_credentials;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::listeners::Listeners;
use super::opened::OpenedGateway;
use crate::auth::Authorizer;
use crate::backup::BackupDesk;
use crate::config::Config;
use crate::front::connection_table::ConnectionTable;
use crate::front::proxied::ProxyTrust;
use crate::front::tls::Tls;
use crate::front::{http, mqtt, nats};
use crate::intake::Intake;
use crate::memory::MemoryBudget;
use crate::observe::disk_figures::DiskFigures;
use crate::observe::metrics::Metrics;

/// How often it is measured what the data directory takes.
const DISK_MEASURE_INTERVAL: Duration = Duration::from_secs(5);

/// The fronts of a gateway, each a task that ends after the drain has begun.
pub(super) struct RunningFronts {
    pub(super) tasks: Vec<JoinHandle<()>>,
    /// The NATS servers that messages are ingested from, without credentials; empty without NATS ingest.
    pub(super) nats_servers: Vec<String>,
    pub(super) live: LiveSettings,
}

/// The settings that can be changed while the gateway runs.
pub(super) struct LiveSettings {
    memory: MemoryBudget,
    authorizer: Authorizer,
    certificates: Vec<Arc<Tls>>,
    http: Arc<ConnectionTable>,
    http_admin: Arc<ConnectionTable>,
    mqtt: Arc<ConnectionTable>,
    metrics: Arc<Metrics>,
}

impl LiveSettings {
    /// Applies these settings as they are in `config`, and has the certificates read.
    pub(super) fn apply(&self, config: &Config) {
        self.memory.set_limits(config.intake.memory_bytes_max, config.intake.memory_share_bytes_max);
        self.authorizer.set_failure_limits(&config.auth);
        self.certificates.iter().for_each(|tls| tls.read_now());
        self.http.set_limits(config.http.stranger_limits());
        self.http_admin.set_limits(config.http.stranger_limits());
        self.mqtt.set_limits(config.mqtt.stranger_limits());
        self.metrics.traffic.set_datasources_max(config.metrics.datasources_max);
    }
}

impl RunningFronts {
    /// Starts every front that the configuration names. `callout` is the connection of auth callout, if there
    /// is one.
    ///
    /// # Errors
    /// NATS settings that can never work, worded for an operator.
    pub(super) async fn start(
        config: &Config,
        listeners: Listeners,
        opened: OpenedGateway,
        callout: Option<Nats>,
        backups: Arc<BackupDesk>,
        drain: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let addrs = listeners.addrs()?;
        let OpenedGateway { log, leaks, consumers, clients, intake, metrics, .. } = opened;
        let nats = connect_nats(config, &intake)?;
        let nats_servers = config.nats.servers.iter().filter(|_| nats.is_some());
        let nats_servers: Vec<_> = nats_servers.map(|address| without_credentials(address)).collect();
        let proxies = Arc::new(ProxyTrust::new(config));
        let acceptor = mqtt::Acceptor::new(
            intake.clone(),
            consumers.subscribers.clone(),
            clients.stored,
            clients.claims,
            config.mqtt.clone(),
            proxies.clone(),
            drain.clone(),
        );
        let live = LiveSettings {
            memory: intake.memory().clone(),
            authorizer: intake.authorizer().clone(),
            certificates: listeners.certificates(),
            http: Arc::new(ConnectionTable::new(config.http.stranger_limits())),
            http_admin: Arc::new(ConnectionTable::new(config.http.stranger_limits())),
            mqtt: acceptor.strangers().clone(),
            metrics: metrics.clone(),
        };
        let disk_figures = Arc::new(DiskFigures::new(&config.data_dir, config.log.retention_bytes));
        let parts = http::HttpFrontParts {
            intake,
            log,
            query: consumers.query,
            leaks,
            subscribers: consumers.subscribers,
            storage: consumers.storage,
            egress: consumers.egress,
            metrics,
            config: config.http.clone(),
            connections: live.http.clone(),
            admin_connections: live.http_admin.clone(),
            mqtt: acceptor.clone(),
            mqtt_addr: addrs.mqtt,
            mqtt_tls_addr: addrs.mqtt_tls,
            http_addr: addrs.http,
            http_tls_addr: addrs.http_tls,
            public_url: config.public_url.clone(),
            public_mqtt: config.public_mqtt.clone(),
            proxies,
            nats: nats.clone(),
            nats_servers: nats_servers.clone(),
            callout,
            backups,
            disk_figures: disk_figures.clone(),
            certificates: live.certificates.clone(),
        };
        let (tls, certificate) = listeners.http_tls.unzip();
        let (plain, admin) = (listeners.http, listeners.admin);
        let http_listeners = http::HttpListeners { plain, tls, admin, certificate };
        let mut tasks = vec![
            tokio::spawn(mqtt::serve(acceptor, listeners.mqtt, listeners.tls)),
            tokio::spawn(http::serve(http_listeners, parts, drain.clone())),
        ];
        for tls in live.certificates.iter().cloned() {
            let drain = drain.clone();
            tasks.push(tokio::spawn(async move {
                drain.run_until_cancelled(tls.follow_files()).await;
            }));
        }
        let measured = drain.clone();
        tasks.push(tokio::spawn(async move {
            measured.run_until_cancelled(follow_disk(disk_figures)).await;
        }));
        if let Some(nats) = nats {
            let drain = drain.clone();
            tasks.push(tokio::spawn(async move { nats.serve(drain).await }));
        }
        Ok(Self { tasks, nats_servers, live })
    }
}

/// Measures the data directory for the metrics every [`DISK_MEASURE_INTERVAL`]. A disk that hangs holds up one thread.
async fn follow_disk(figures: Arc<DiskFigures>) {
    loop {
        let measured = figures.clone();
        let _ = tokio::task::spawn_blocking(move || measured.measure_blocking()).await;
        tokio::time::sleep(DISK_MEASURE_INTERVAL).await;
    }
}

/// Makes the NATS front, if messages are ingested from NATS.
fn connect_nats(config: &Config, intake: &Intake) -> anyhow::Result<Option<Arc<nats::NatsFront>>> {
    let nats = &config.nats;
    if !nats.is_used() || !nats.ingest {
        return Ok(None);
    }
    let connection = nats.connection("ingest")?;
    let front = nats::NatsFront::new(connection, nats, intake.clone(), None, None)?;
    Ok(Some(Arc::new(front)))
}
