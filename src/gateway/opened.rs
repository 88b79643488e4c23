//! What is opened behind the fronts, in the order in which one needs the other: registry and log, the consumers
//! that read it, and intake, which writes it.

use std::sync::Arc;

use tracing::warn;

use super::consumers::{Consumers, StartingClients};
use super::directory::{ADMIN_KEY_FILE, check_registry_is_there, ensure_admin_key};
use super::member::{ClusterMember, JoiningMember};
use super::start_advice::{explain_log_error, explain_registry_error};
use crate::auth::{Authorizer, Registry};
use crate::backup::BackupSources;
use crate::config::{Config, Durability, LogBackend};
use crate::consume::quarantine::QuarantineLeakRules;
use crate::intake::Intake;
use crate::log::{EmbeddedLog, Log, SharedPlaces};
use crate::observe::metrics::Metrics;

/// The registry and the log.
pub(super) struct OpenedLog {
    pub(super) registry: Arc<Registry>,
    pub(super) log: Arc<dyn Log>,
    /// The membership, and the places in the log that subscribers of all gateways share; `None` without a
    /// cluster.
    pub(super) cluster: Option<(ClusterMember, SharedPlaces)>,
}

impl OpenedLog {
    /// Opens registry and log of a gateway without a cluster, in its data directory.
    ///
    /// # Errors
    /// A file that is damaged or cannot be read or written, a registry that is gone; worded for an operator.
    pub(super) fn open(config: &Config) -> anyhow::Result<Self> {
        let dir = &config.data_dir;
        let log = EmbeddedLog::open(dir, &config.log, &config.intake)
            .map_err(|error| explain_log_error(dir, error))?;
        check_registry_is_there(dir, log.next_offset())?;
        let registry = Registry::open(dir).map_err(|error| explain_registry_error(dir, error))?;
        let registry = Arc::new(registry);
        ensure_admin_key(&registry, &dir.join(ADMIN_KEY_FILE))?;
        if config.log.durability == Durability::Os {
            warn!("log.durability is \"os\": what is acknowledged does not survive a loss of power");
        }
        Ok(Self { registry, log: Arc::new(log), cluster: None })
    }

    /// Opens registry and log of a cluster. Waits while NATS is unreachable.
    ///
    /// # Errors
    /// Those of [`JoiningMember::join`].
    pub(super) async fn join(joining: &JoiningMember, config: &Config) -> anyhow::Result<Self> {
        let (member, log) = joining.join(config).await?;
        let (registry, places) = (member.registry().clone(), log.shared_places());
        Ok(Self { registry, log, cluster: Some((member, places)) })
    }
}

/// A gateway that lacks only its fronts.
pub(super) struct OpenedGateway {
    pub(super) registry: Arc<Registry>,
    pub(super) log: Arc<dyn Log>,
    /// `None` without a cluster.
    pub(super) member: Option<ClusterMember>,
    pub(super) leaks: QuarantineLeakRules,
    pub(super) consumers: Consumers,
    pub(super) clients: StartingClients,
    pub(super) intake: Intake,
    pub(super) metrics: Arc<Metrics>,
}

impl OpenedGateway {
    /// Starts the consumers, makes intake, and in a cluster follows the registry until it is up to date. Waits
    /// while NATS is unreachable.
    ///
    /// # Errors
    /// What could not be opened; worded for an operator.
    pub(super) async fn open(config: &Config, mut opened: OpenedLog) -> anyhow::Result<Self> {
        // Opened before any consumer reads the log: it decides which records they may see.
        let leaks = QuarantineLeakRules::start(opened.registry.clone(), opened.log.clone())?;
        let (consumers, clients) = Consumers::start(config, &mut opened).await?;
        let OpenedLog { registry, log, cluster } = opened;
        let metrics = Arc::new(Metrics::new());
        metrics.traffic.set_datasources_max(config.metrics.datasources_max);
        let authorizer = Authorizer::with_config(registry.clone(), &config.auth);
        let intake = Intake::new(authorizer, log.clone(), metrics.clone(), &config.intake);
        let mut member = cluster.map(|(member, _)| member);
        if let Some(member) = &mut member {
            member.follow(&intake).await?;
            member.ensure_admin_key(&config.data_dir.join(ADMIN_KEY_FILE)).await?;
        }
        Ok(Self { registry, log, member, leaks, consumers, clients, intake, metrics })
    }

    /// What a backup is made of; `None` in a cluster.
    pub(super) fn backup_sources(&self, config: &Config) -> Option<BackupSources> {
        let sessions = self.consumers.subscribers.store.clone();
        let is_embedded = config.log.backend == LogBackend::Embedded;
        is_embedded
            .then(|| BackupSources::new(&config.data_dir, self.registry.clone(), self.log.clone(), sessions))
    }
}
