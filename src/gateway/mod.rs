//! Assembles the gateway: opens the data directory, binds every listener, then serves. It drains in the
//! order of a message's path, so that no accepted message is left behind.

mod cluster_settings;
mod consumers;
mod descriptors;
mod directory;
mod fronts;
mod history;
mod keep;
mod listeners;
mod member;
mod opened;
mod repair;
mod start_advice;
mod start_wait;

use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::auth::{Registry, deadlines, key_ends};
use crate::backup::BackupDesk;
use crate::config::{Config, LogBackend};
use crate::front::proxied::ProxyTrust;
use crate::front::{http, nats};
use crate::intake::Intake;
use crate::log::Log;
use crate::observe::metrics::Metrics;

pub use cluster_settings::{change_cluster, clock_of_servers};
use consumers::Consumers;
pub(crate) use descriptors::fit_connections;
use directory::ADMIN_KEY_FILE;
pub(crate) use directory::write_secret;
use fronts::RunningFronts;
pub use history::{AdoptionOrder, AdoptionReport, ClusterCommandError, adopt_cluster};
pub use keep::{back_up_stopped, restore_backup, undo_restore};
use listeners::Listeners;
use member::{ClusterMember, JoiningMember};
use opened::{OpenedGateway, OpenedLog};
pub use repair::{RepairOrder, repair};

/// How often the gateway folds the metrics' histograms, so that they stay small if nobody reads them,
/// and saves key usage.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// A running gateway.
pub struct Gateway {
    /// Where MQTT is served.
    pub mqtt_addr: SocketAddr,
    /// Where MQTT is served over TLS, if a certificate is configured.
    pub mqtt_tls_addr: Option<SocketAddr>,
    /// Where HTTP is served.
    pub http_addr: SocketAddr,
    /// Where HTTP is served over TLS, if a certificate is configured.
    pub http_tls_addr: Option<SocketAddr>,
    /// Where the administration is served, if it has a listener of its own; over TLS if a certificate is configured.
    pub admin_addr: Option<SocketAddr>,
    /// The file with the first admin key.
    pub admin_key_path: PathBuf,
    log: Arc<dyn Log>,
    intake: Intake,
    consumers: Consumers,
    drain: CancellationToken,
    drain_max: Duration,
    fronts: RunningFronts,
    /// Tells NATS whether its clients may connect (auth callout).
    callout: Option<nats::NatsKeyCallout>,
    upkeep: JoinHandle<()>,
    /// Ends keys when they expire.
    deadlines: JoinHandle<()>,
    /// Writes the ends of keys that could not be written at once.
    key_ends: JoinHandle<()>,
    registry: Arc<Registry>,
    backups: Arc<BackupDesk>,
    /// `None` without a cluster.
    member: Option<ClusterMember>,
    /// Held for as long as the data directory is in use.
    _lock: File,
}

/// Asks whether a gateway lives.
pub struct GatewayPulse {
    log: Arc<dyn Log>,
}

impl GatewayPulse {
    /// Returns when the threads of the log have answered, or wait for a disk that has not: `false` if a restart alone can make
    /// it take messages again. Does not return while one of them hangs in another way.
    pub fn pulse(&self) -> impl Future<Output = bool> + Send + use<> {
        let log = self.log.clone();
        async move { log.pulse().await }
    }
}

impl Gateway {
    /// Opens the data directory, binds every listener, and serves.
    ///
    /// # Errors
    /// What could not be opened or bound, worded for an operator: another gateway uses the directory,
    /// the log is damaged, a port is taken.
    pub async fn start(mut config: Config) -> anyhow::Result<Gateway> {
        descriptors::fit_connections(&mut config);
        let lock = directory::lock_directory(&config.data_dir)?;
        let listeners = Listeners::bind(&config)?;
        let addrs = listeners.addrs()?;
        directory::check_log_backend(&config.data_dir, config.log.backend)?;
        let mut opened = match config.log.backend {
            LogBackend::Embedded => OpenedGateway::open(&config, OpenedLog::open(&config)?).await?,
            LogBackend::Jetstream => {
                info!(http_addr = %addrs.http, "joining the cluster; until then /readyz says what is waited for");
                let joining = JoiningMember::begin(&config).await?;
                let opening =
                    async { OpenedGateway::open(&config, OpenedLog::join(&joining, &config).await?).await };
                let proxies = Arc::new(ProxyTrust::new(&config));
                http::serve_until_ready(&listeners.http, &config.http, proxies, joining.reason(), opening)
                    .await?
            }
        };
        let OpenedGateway { registry, log, consumers, metrics, .. } = &opened;
        let (registry, log, consumers, metrics) =
            (registry.clone(), log.clone(), consumers.clone(), metrics.clone());
        let member = opened.member.take();
        consumers.subscribers.router.set_processor(opened.intake.processor().clone());
        opened.intake.set_retained_topics(consumers.subscribers.retained.topics().clone());
        let intake = opened.intake.clone();
        let drain = CancellationToken::new();
        // Started before anything can end a key, so that it disconnects the NATS clients of every dead key.
        let callout = match &config.nats {
            config if config.callout.is_used() => {
                Some(nats::NatsKeyCallout::start(config, &opened.intake, drain.clone()).await?)
            }
            _ => None,
        };
        let deadlines = spawn_deadlines(registry.clone(), opened.intake.clone());
        let callout_nats = callout.as_ref().map(|callout| callout.nats().clone());
        let backups = Arc::new(BackupDesk::new(opened.backup_sources(&config)));
        let fronts =
            RunningFronts::start(&config, listeners, opened, callout_nats, backups.clone(), &drain).await?;
        let upkeep = spawn_upkeep(registry.clone(), metrics);
        let key_ends = tokio::spawn(key_ends::run(registry.clone()));
        info!(
            mqtt_addr = %addrs.mqtt, mqtt_tls_addr = addrs.mqtt_tls.map(display), http_addr = %addrs.http,
            http_tls_addr = addrs.http_tls.map(display), admin_addr = addrs.admin.map(display),
            next_offset = log.next_offset(), "serving"
        );
        Ok(Gateway {
            mqtt_addr: addrs.mqtt,
            mqtt_tls_addr: addrs.mqtt_tls,
            http_addr: addrs.http,
            http_tls_addr: addrs.http_tls,
            admin_addr: addrs.admin,
            admin_key_path: config.data_dir.join(ADMIN_KEY_FILE),
            log,
            intake,
            consumers,
            drain,
            drain_max: config.drain_max(),
            fronts,
            callout,
            upkeep,
            deadlines,
            key_ends,
            registry,
            backups,
            member,
            _lock: lock,
        })
    }

    /// Returns when the cluster goes on from another state of its log: then this gateway has to start again. Never without
    /// a cluster.
    pub async fn left_history(&self) {
        match &self.member {
            Some(member) => member.left().cancelled().await,
            None => std::future::pending().await,
        }
    }

    /// Sets the ports of a configuration that the system chose to those that it has, so that a new start has them again.
    pub fn pin_listeners(&self, config: &mut Config) {
        config.mqtt.listen.pin(self.mqtt_addr);
        config.http.listen.pin(self.http_addr);
        for (setting, addr) in [
            (&mut config.mqtt.tls.listen, self.mqtt_tls_addr),
            (&mut config.http.tls.listen, self.http_tls_addr),
        ] {
            if let Some(addr) = addr {
                setting.pin(addr);
            }
        }
        if let (Some(setting), Some(addr)) = (&mut config.http.admin.listen, self.admin_addr) {
            setting.pin(addr);
        }
    }

    /// Applies those settings of `config` that can be changed while the gateway runs
    /// ([`ConfigChanges`](crate::config::ConfigChanges) knows which), and has the certificates read.
    pub fn apply_live(&mut self, config: &Config) {
        self.drain_max = config.drain_max();
        self.fronts.live.apply(config);
    }

    /// What can ask whether the gateway lives.
    pub fn watched(&self) -> GatewayPulse {
        GatewayPulse { log: self.log.clone() }
    }

    /// For how long [`Gateway::stop`] drains at most.
    pub fn drain_max(&self) -> Duration {
        self.drain_max
    }

    /// The NATS servers that messages are ingested from, without credentials; empty without NATS ingest.
    pub fn nats_servers(&self) -> &[String] {
        &self.fronts.nats_servers
    }

    /// Drains within `drain_ms_max`: stops accepting, commits and acknowledges what was read, closes
    /// the connections, ends the log, stores what is in it.
    pub async fn stop(mut self) {
        let started = Instant::now();
        let deadline = started + self.drain_max;
        self.drain.cancel();
        self.upkeep.abort();
        self.backups.cancel();
        // A client that does not disconnect uses up the fronts' share of the time, not storage's.
        let fronts_end = tokio::time::Instant::from_std(started + self.drain_max / 2);
        for front in &mut self.fronts.tasks {
            if tokio::time::timeout_at(fronts_end, &mut *front).await.is_err() {
                warn!("connections were still open at the drain's deadline");
                front.abort();
            }
        }
        if let Some(callout) = self.callout.take()
            && tokio::time::timeout_at(fronts_end, callout.drained()).await.is_err()
        {
            warn!("NATS did not take the last answers of auth callout");
        }
        self.deadlines.abort();
        self.key_ends.abort();
        write_ends(&self.registry).await;
        if tokio::time::timeout_at(fronts_end, self.consumers.subscribers.groups.close()).await.is_err() {
            warn!("group members' records were not handed over; other members get them later");
        }
        self.log.close().await;
        // Each has its answer now.
        if tokio::time::timeout_at(deadline.into(), self.intake.settle_unattended()).await.is_err() {
            warn!("what clients brought that did not wait for the answer is not counted");
        }
        if let Some(member) = self.member.take() {
            member.leave().await;
        }
        write_usage(&self.registry).await;
        self.backups.ended(deadline).await;
        self.consumers.stop(deadline).await;
    }
}

/// Ends keys when they expire.
fn spawn_deadlines(registry: Arc<Registry>, intake: Intake) -> JoinHandle<()> {
    tokio::spawn(deadlines::run(registry, move |dead, called| {
        let intake = intake.clone();
        async move { intake.settle(&dead, called).await }
    }))
}

/// Does every [`UPKEEP_INTERVAL`] what nobody asks for.
fn spawn_upkeep(registry: Arc<Registry>, metrics: Arc<Metrics>) -> JoinHandle<()> {
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(UPKEEP_INTERVAL).await;
            metrics.upkeep();
            write_usage(&registry).await;
        }
    })
}

/// Writes the ends of keys that are not durable yet, for the last time.
async fn write_ends(registry: &Arc<Registry>) {
    let registry = registry.clone();
    match tokio::task::spawn_blocking(move || registry.write_ends().map_err(|_| registry.trouble())).await {
        Ok(Ok(_)) => {}
        Ok(Err(trouble)) => {
            error!(trouble, "dead keys work again after a restart: their end is not durable; end them again");
        }
        Err(error) => warn!(%error, "the registry has failed"),
    }
}

/// Saves key usage.
async fn write_usage(registry: &Arc<Registry>) {
    let registry = registry.clone();
    match tokio::task::spawn_blocking(move || registry.write_usage()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => warn!(%error, "key usage cannot be saved; trying again"),
        Err(error) => warn!(%error, "the registry has failed"),
    }
}
