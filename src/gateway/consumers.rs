//! The consumers: everything that reads the log, started before the first message is let in.

use std::sync::Arc;
use std::time::Instant;

use headgate_bridge_nats::Nats;
use tokio::task::spawn_blocking;
use tracing::warn;

use super::opened::OpenedLog;
use crate::auth::Registry;
use crate::config::{Config, LogBackend, SinkKind};
use crate::consume::egress::Egress;
use crate::consume::query::RecordsReader;
use crate::consume::sink::retention::StoredLimits;
use crate::consume::storage::{StorageSinks, StoredLimitsSource};
use crate::consume::subscriber::Subscribers;
use crate::consume::subscriber::retained::RetainedStore;
use crate::consume::subscriber::sessions::{SessionStore, StoredSessions};
use crate::front::mqtt::ClientClaims;
use crate::intake::meters;
use crate::log::Log;
use crate::message::Offset;
use crate::quota::{Limit, LimitOwner};

/// The consumers of a gateway.
#[derive(Clone)]
pub(super) struct Consumers {
    pub(super) subscribers: Arc<Subscribers>,
    pub(super) storage: Option<Arc<StorageSinks>>,
    pub(super) egress: Option<Arc<Egress>>,
    /// What storage has stored, for queries.
    pub(super) query: Option<RecordsReader>,
}

/// What the MQTT front begins with.
pub(super) struct StartingClients {
    /// The sessions and groups of the last run.
    pub(super) stored: StoredSessions,
    /// Moves clients between gateways; only in a cluster.
    pub(super) claims: Option<ClientClaims>,
}

impl Consumers {
    /// Starts the consumers, each with a hold on the log if it must see every record, and then retention. In
    /// a cluster it waits while NATS is unreachable.
    ///
    /// # Errors
    /// A database that is ahead of the log, NATS settings that can never work; worded for an operator.
    pub(super) async fn start(
        config: &Config,
        opened: &mut OpenedLog,
    ) -> anyhow::Result<(Self, StartingClients)> {
        let (dir, log) = (&config.data_dir, &opened.log);
        let (at, settings, followed) = (dir.clone(), config.storage.clone(), log.clone());
        // It may read the log, which in a cluster blocks.
        let is_shared = config.log.backend == LogBackend::Jetstream;
        let storage =
            spawn_blocking(move || StorageSinks::start(&at, &settings, &followed, is_shared)).await??;
        if let Some(storage) = &storage {
            storage.begin_retention(&stored_limits(opened.registry.clone()));
        }
        let storage = storage.map(Arc::new);
        let board = storage.as_ref().map(|storage| storage.latest_board().clone()).unwrap_or_default();
        let query = config.storage.read_from().and_then(|kind| match kind {
            SinkKind::Sqlite => Some(RecordsReader::new(dir).with_board(board)),
            SinkKind::Postgres => Some(RecordsReader::of_postgres(&config.storage.postgres)),
            // It is read with what reads Delta lakes: `read_from` never names it.
            SinkKind::Delta => None,
        });
        let hold = log.hold();
        let (at, followed) = (dir.clone(), log.clone());
        let retained =
            spawn_blocking(move || RetainedStore::start(&at, followed, move |offset| hold.set(offset)))
                .await??;
        let (store, groups, clients) = match &mut opened.cluster {
            Some((member, places)) => {
                let (store, claims, groups) = member.open_sessions(config, places.clone(), log).await?;
                let stored = StoredSessions::default();
                (store, Some(groups), StartingClients { stored, claims: Some(claims) })
            }
            None => {
                let (store, mut stored) = SessionStore::open(dir)?;
                set_sessions_back(&store, &mut stored, log.next_offset()).await;
                (store, None, StartingClients { stored, claims: None })
            }
        };
        let subscribers = Arc::new(Subscribers::start(log.clone(), store, retained, groups)?);
        let egress = start_egress(config, log).await?;
        log.begin_retention();
        Ok((Self { subscribers, storage, egress, query }, clients))
    }

    /// Stores what is in the log, until `deadline`. Call it once the log is closed.
    pub(super) async fn stop(&self, deadline: Instant) {
        self.subscribers.retained.stop(deadline).await;
        self.subscribers.store.close().await;
        if let Some(storage) = &self.storage {
            storage.stop(deadline).await;
        }
        if let Some(egress) = &self.egress {
            egress.stop(deadline).await;
        }
    }
}

/// The limits on what is stored of each datasource that has some, as they are at the time.
fn stored_limits(registry: Arc<Registry>) -> StoredLimitsSource {
    Arc::new(move || {
        let datasources = registry.datasources().into_iter();
        let limited = datasources.filter_map(|datasource| {
            let meters = meters(&datasource.limits, || LimitOwner::Datasource(datasource.id.clone()))?;
            let max = |limit| meters.limits().get(limit).map(|setting| setting.max);
            let limits = StoredLimits {
                age_us: max(Limit::StoredAgeS).and_then(|s| i64::try_from(s).ok()?.checked_mul(1_000_000)),
                bytes: max(Limit::StoredBytes),
            };
            (limits != StoredLimits::default()).then(|| (datasource.scope(), limits))
        });
        limited.collect()
    })
}

/// Brings sessions and groups that are ahead of the log back to its end.
async fn set_sessions_back(store: &SessionStore, stored: &mut StoredSessions, log_end: Offset) {
    let changes = stored.set_back(log_end);
    if changes.is_empty() {
        return;
    }
    let sessions = changes.len();
    warn!(sessions, log_end, "sessions and groups were ahead of the log; they go on at its end");
    if let Err(error) = store.write(changes).await {
        warn!(%error, "that is not stored yet");
    }
}

/// Starts egress to NATS, if NATS is configured and the log is not in NATS already. Egress has its own
/// connection: catching up would otherwise delay answers to devices.
async fn start_egress(config: &Config, log: &Arc<dyn Log>) -> anyhow::Result<Option<Arc<Egress>>> {
    let nats = &config.nats;
    if !nats.is_used() || !nats.stream.enabled || config.log.backend != LogBackend::Embedded {
        return Ok(None);
    }
    let nats = Nats::connect(&nats.connection("headgate stream")?).await?;
    Ok(Some(Arc::new(Egress::start(&config.data_dir, config, nats, log.clone())?)))
}
