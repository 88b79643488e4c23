//! Assembles the gateway: opens the data directory, binds every listener, then serves. It drains in the
//! order of a message's path, so that no accepted message is left behind.

mod member;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use headgate_bridge_nats::Nats;
use headgate_bridge_nats::connection::without_credentials;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::auth::{Actor, Authorizer, Registry, Scope, Scopes, deadlines};
use crate::config::{Config, Durability, LogBackend, SinkKind};
use crate::consume::egress::Egress;
use crate::consume::quarantine::QuarantineLeakRules;
use crate::consume::query::RecordsReader;
use crate::consume::storage::StorageConsumer;
use crate::consume::subscriber::Subscribers;
use crate::consume::subscriber::retained::RetainedStore;
use crate::consume::subscriber::sessions::{SessionStore, StoredSessions};
use crate::front::{http, mqtt, nats};
use crate::intake::Intake;
use crate::limits::LISTEN_BACKLOG;
use crate::log::{EmbeddedLog, Log};
use crate::message::DatasourceId;
use crate::observe::metrics::Metrics;

use member::{ClusterMember, JoiningMember};

/// The label of the key whose secret is in `admin.key`.
const ADMIN_KEY_LABEL: &str = "admin.key";
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
    /// The NATS servers that messages are ingested from, without credentials; empty without NATS ingest.
    pub nats_servers: Vec<String>,
    /// The file with the first admin key.
    pub admin_key_path: PathBuf,
    log: Arc<dyn Log>,
    subscribers: Arc<Subscribers>,
    storage: Option<Arc<StorageConsumer>>,
    egress: Option<Arc<Egress>>,
    drain: CancellationToken,
    drain_max: Duration,
    fronts: Vec<JoinHandle<()>>,
    /// Tells NATS whether its clients may connect (auth callout).
    callout: Option<nats::NatsKeyCallout>,
    upkeep: JoinHandle<()>,
    /// Ends keys when they expire.
    deadlines: JoinHandle<()>,
    registry: Arc<Registry>,
    /// `None` without a cluster.
    member: Option<ClusterMember>,
    /// Held for as long as the data directory is in use.
    _lock: File,
}

impl Gateway {
    /// Opens the data directory, binds every listener, and serves.
    ///
    /// # Errors
    /// What could not be opened or bound, worded for an operator: another gateway uses the directory,
    /// the log is damaged, a port is taken.
    pub async fn start(config: Config) -> anyhow::Result<Gateway> {
        let dir = &config.data_dir;
        raise_file_limit();
        let lock = lock_directory(dir)?;
        let admin_key_path = dir.join("admin.key");
        let mqtt_listener = listen(config.mqtt.listen).context("mqtt.listen")?;
        let tls = match &config.mqtt.tls {
            settings if settings.is_served() => {
                let listener = listen(settings.listen).context("mqtt.tls.listen")?;
                Some((listener, Arc::new(mqtt::Tls::load(settings.clone())?)))
            }
            _ => None,
        };
        let http_listener = listen(config.http.listen).context("http.listen")?;
        let (mqtt_addr, http_addr) = (mqtt_listener.local_addr()?, http_listener.local_addr()?);
        let mqtt_tls_addr = tls.as_ref().map(|(listener, _)| listener.local_addr()).transpose()?;
        check_log_backend(dir, config.log.backend)?;
        let (mut member, registry, log, places): (_, _, Arc<dyn Log>, _) = match config.log.backend {
            LogBackend::Embedded => {
                let registry = Arc::new(Registry::open(dir)?);
                ensure_admin_key(&registry, &admin_key_path)?;
                let log = EmbeddedLog::open(dir, &config.log, &config.intake)?;
                if config.log.durability == Durability::Os {
                    warn!("log.durability is \"os\": what is acknowledged does not survive a loss of power");
                }
                (None, registry, Arc::new(log), None)
            }
            LogBackend::Jetstream => {
                info!(%http_addr, "joining the cluster; until then /readyz says what is waited for");
                let joining = JoiningMember::begin(&config).await?;
                let joined = joining.join(&config);
                let joined = http::serve_until_ready(&http_listener, &config.http, joining.reason(), joined);
                let (member, log) = joined.await?;
                let registry = member.registry().clone();
                let places = log.shared_places();
                (Some((joining, member)), registry, Arc::new(log), Some(places))
            }
        };
        // Opened before any consumer reads the log: it decides which records they may see.
        let leaks = QuarantineLeakRules::start(registry.clone(), log.clone())?;
        let (storage, query) = match config.storage.sink {
            SinkKind::Sqlite => {
                let storage = StorageConsumer::start(dir, &config.storage, log.clone())?;
                (Some(Arc::new(storage)), Some(RecordsReader::open(dir)?))
            }
            SinkKind::None => (None, None),
        };
        let hold = log.hold();
        let retained = RetainedStore::start(dir, log.clone(), move |offset| hold.set(offset))?;
        let retained_too = retained.clone();
        let (store, stored, claims, groups) = match member.as_ref().zip(places) {
            Some(((joining, member), places)) => {
                let opened = member.open_sessions(&config, places);
                let opened = http::serve_until_ready(&http_listener, &config.http, joining.reason(), opened);
                let (store, claims, groups) = opened.await?;
                (store, StoredSessions::default(), Some(claims), Some(groups))
            }
            None => {
                let (store, stored) = SessionStore::open(dir)?;
                (store, stored, None, None)
            }
        };
        let subscribers = Arc::new(Subscribers::start(log.clone(), store, retained, groups)?);
        let egress = start_egress(&config, &log).await?;
        log.begin_retention();

        let metrics = Arc::new(Metrics::new());
        let intake = Intake::new(
            Authorizer::with_config(registry.clone(), &config.auth),
            log.clone(),
            metrics.clone(),
            &config.intake,
        );
        if let Some((joining, member)) = &mut member {
            let following = async {
                member.follow(&intake).await?;
                member.ensure_admin_key(&admin_key_path).await
            };
            http::serve_until_ready(&http_listener, &config.http, joining.reason(), following).await?;
        }
        let drain = CancellationToken::new();
        // Started before anything can end a key, so that it disconnects the NATS clients of every dead key.
        let callout = match &config.nats {
            config if config.callout.is_used() => {
                Some(nats::NatsKeyCallout::start(config, &intake, drain.clone()).await?)
            }
            _ => None,
        };
        let deadlines = tokio::spawn({
            let intake = intake.clone();
            deadlines::run(registry.clone(), move |dead, called| {
                let intake = intake.clone();
                async move { intake.settle(&dead, called).await }
            })
        });
        let nats = match &config.nats {
            nats if nats.is_used() && nats.ingest => {
                let connection = nats.connection("ingest")?;
                let front =
                    nats::NatsFront::connect(connection, &nats.stream.name, intake.clone(), None).await?;
                Some(Arc::new(front))
            }
            _ => None,
        };
        let nats_servers = config.nats.servers.iter().filter(|_| nats.is_some());
        let nats_servers: Vec<_> = nats_servers.map(|address| without_credentials(address)).collect();
        let mqtt = config.mqtt.clone();
        let acceptor =
            mqtt::Acceptor::new(intake.clone(), subscribers.clone(), stored, claims, mqtt, drain.clone());
        let parts = http::HttpFrontParts {
            intake,
            log: log.clone(),
            query,
            leaks,
            retained: retained_too,
            storage: storage.clone(),
            egress: egress.clone(),
            metrics: metrics.clone(),
            config: config.http.clone(),
            mqtt: acceptor.clone(),
            mqtt_addr,
            mqtt_tls_addr,
            http_addr,
            nats: nats.clone(),
            nats_servers: nats_servers.clone(),
            callout: callout.as_ref().map(|callout| callout.nats().clone()),
        };
        let mut fronts = vec![
            tokio::spawn(mqtt::serve(acceptor, mqtt_listener, tls)),
            tokio::spawn(http::serve(http_listener, parts, drain.clone())),
        ];
        if let Some(nats) = nats {
            let drain = drain.clone();
            fronts.push(tokio::spawn(async move { nats.serve(drain).await }));
        }
        let upkeep = tokio::spawn({
            let registry = registry.clone();
            async move {
                loop {
                    tokio::time::sleep(UPKEEP_INTERVAL).await;
                    metrics.upkeep();
                    write_usage(&registry).await;
                }
            }
        });
        let next_offset = log.next_offset();
        info!(%mqtt_addr, mqtt_tls_addr = mqtt_tls_addr.map(display), %http_addr, next_offset, "serving");
        let drain_max = config.drain_max();
        Ok(Gateway {
            mqtt_addr,
            mqtt_tls_addr,
            http_addr,
            nats_servers,
            admin_key_path,
            log,
            subscribers,
            storage,
            egress,
            drain,
            drain_max,
            fronts,
            callout,
            upkeep,
            deadlines,
            registry,
            member: member.map(|(_, member)| member),
            _lock: lock,
        })
    }

    /// Drains within `drain_ms_max`: stops accepting, commits and acknowledges what was read, closes
    /// the connections, ends the log, stores what is in it.
    pub async fn stop(mut self) {
        let started = Instant::now();
        let deadline = started + self.drain_max;
        self.drain.cancel();
        self.upkeep.abort();
        // A client that does not disconnect uses up the fronts' share of the time, not storage's.
        let fronts_end = tokio::time::Instant::from_std(started + self.drain_max / 2);
        for front in &mut self.fronts {
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
        if tokio::time::timeout_at(fronts_end, self.subscribers.groups.close()).await.is_err() {
            warn!("group members' records were not handed over; other members get them later");
        }
        self.log.close().await;
        if let Some(member) = self.member.take() {
            member.leave().await;
        }
        write_usage(&self.registry).await;
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

/// Saves key usage.
async fn write_usage(registry: &Arc<Registry>) {
    let registry = registry.clone();
    match tokio::task::spawn_blocking(move || registry.write_usage()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => warn!(%error, "key usage cannot be saved; trying again"),
        Err(error) => warn!(%error, "the registry has failed"),
    }
}

/// Creates the directory, readable by its owner only, and ensures that no other gateway uses it.
fn lock_directory(dir: &Path) -> anyhow::Result<File> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.with_context(|| format!("cannot make the data directory {}", dir.display()))?;
    let path = dir.join("LOCK");
    let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let lock = lock.with_context(|| format!("cannot open {}", path.display()))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::WouldBlock) => {
            bail!("another gateway is using the data directory {}", dir.display())
        }
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// Ensures that a data directory keeps the log backend that it was created with: its records and sessions
/// refer to that log's offsets.
fn check_log_backend(dir: &Path, backend: LogBackend) -> anyhow::Result<()> {
    let (other, words) = match backend {
        LogBackend::Embedded => {
            (member::NODE_NAME_FILE, "belongs to a gateway of a cluster (log.backend = \"jetstream\")")
        }
        LogBackend::Jetstream => ("log", "has a log of its own (log.backend = \"embedded\")"),
    };
    if dir.join(other).exists() {
        bail!("the data directory {} {words}: use another one", dir.display());
    }
    Ok(())
}

/// Creates the admin key of a new data directory. If an operator removed the file, a new key replaces
/// the old one: this is how a lost or leaked admin key is replaced.
fn ensure_admin_key(registry: &Registry, path: &Path) -> anyhow::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let all = DatasourceId::all();
    let earlier: Vec<_> =
        registry.keys(&all).into_iter().filter(|key| *key.label == *ADMIN_KEY_LABEL).collect();
    let admin = Scopes::from_slice(&[Scope::Admin]);
    let (key, secret) = registry.create_key(&Actor::SYSTEM, &all, ADMIN_KEY_LABEL, admin, None)?;
    let written =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).and_then(|mut file| {
            writeln!(file, "{}", secret.expose())?;
            file.sync_all()
        });
    written.with_context(|| format!("cannot write {}", path.display()))?;
    for key in earlier {
        registry.revoke_key(&Actor::SYSTEM, &all, key.id)?;
    }
    info!(key_id = %key.id, path = %path.display(), "made an admin key");
    Ok(())
}

fn listen(addr: SocketAddr) -> anyhow::Result<TcpListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(addr).with_context(|| format!("cannot listen on {addr}"))?;
    Ok(socket.listen(LISTEN_BACKLOG)?)
}

/// Raises the limit on open files to the system's maximum: each connection needs one.
fn raise_file_limit() {
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
