//! The gateway, assembled: opens the data directory, binds every listener, then serves; and drains
//! in the order in which a message goes, so that nothing that was accepted is left on the way.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::auth::{Authorizer, Registry, Scope, Scopes};
use crate::config::{Config, Durability, SinkKind};
use crate::consume::query::Query;
use crate::consume::storage::Storage;
use crate::front::{http, mqtt};
use crate::intake::Intake;
use crate::limits::LISTEN_BACKLOG;
use crate::log::Log;
use crate::message::{DatasourceId, Offset};
use crate::observe::metrics::Metrics;

/// The label of the key whose secret is in `admin.key`.
const ADMIN_KEY_LABEL: &str = "admin.key";
/// How often the metrics' histograms are folded, so that they stay small if nobody reads them.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// A running gateway.
pub struct Gateway {
    /// Where MQTT is served.
    pub mqtt_addr: SocketAddr,
    /// Where HTTP is served.
    pub http_addr: SocketAddr,
    /// The file with the first admin key.
    pub admin_key_path: PathBuf,
    log: Log,
    storage: Option<Arc<Storage>>,
    drain: CancellationToken,
    drain_max: Duration,
    fronts: [JoinHandle<()>; 2],
    upkeep: JoinHandle<()>,
    /// Held for as long as the data directory is in use.
    _lock: File,
}

impl Gateway {
    /// Opens the data directory, binds every listener, and serves.
    ///
    /// # Errors
    /// What could not be opened or bound, in words for an operator: another gateway uses the
    /// directory, the log is damaged, a port is taken.
    pub async fn start(config: Config) -> anyhow::Result<Gateway> {
        let dir = &config.data_dir;
        raise_file_limit();
        let lock = lock_directory(dir)?;
        let registry = Arc::new(Registry::open(dir)?);
        let admin_key_path = dir.join("admin.key");
        ensure_admin_key(&registry, &admin_key_path)?;
        let log = Log::open(dir, &config.log)?;
        if config.log.durability == Durability::Os {
            warn!("log.durability is \"os\": what is acknowledged does not survive a loss of power");
        }
        let (storage, query) = match config.storage.sink {
            SinkKind::Sqlite => {
                let storage = Storage::start(dir, &config.storage, log.clone())?;
                (Some(Arc::new(storage)), Some(Query::open(dir)?))
            }
            SinkKind::None => {
                log.set_stored(Offset::MAX);
                (None, None)
            }
        };
        let mqtt_listener = listen(config.mqtt.listen).context("mqtt.listen")?;
        let http_listener = listen(config.http.listen).context("http.listen")?;
        let (mqtt_addr, http_addr) = (mqtt_listener.local_addr()?, http_listener.local_addr()?);

        let metrics = Arc::new(Metrics::new());
        let intake = Intake::new(Authorizer::new(registry), log.clone(), metrics.clone(), &config.intake);
        let drain = CancellationToken::new();
        let parts = http::Parts {
            intake: intake.clone(),
            log: log.clone(),
            query,
            storage: storage.clone(),
            metrics: metrics.clone(),
            config: config.http.clone(),
            mqtt_addr,
            http_addr,
        };
        let fronts = [
            tokio::spawn(mqtt::serve(mqtt_listener, intake, config.mqtt.clone(), drain.clone())),
            tokio::spawn(http::serve(http_listener, parts, drain.clone())),
        ];
        let upkeep = tokio::spawn(async move {
            loop {
                tokio::time::sleep(METRICS_UPKEEP).await;
                metrics.upkeep();
            }
        });
        info!(%mqtt_addr, %http_addr, next_offset = log.next_offset(), "serving");
        let drain_max = config.drain_max();
        Ok(Gateway {
            mqtt_addr,
            http_addr,
            admin_key_path,
            log,
            storage,
            drain,
            drain_max,
            fronts,
            upkeep,
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
        // A client that does not go costs the fronts their share of the time, not storage's.
        let fronts_end = tokio::time::Instant::from_std(started + self.drain_max / 2);
        for front in &mut self.fronts {
            if tokio::time::timeout_at(fronts_end, &mut *front).await.is_err() {
                warn!("connections were still open at the drain's deadline");
                front.abort();
            }
        }
        self.log.close().await;
        if let Some(storage) = &self.storage {
            storage.stop(deadline).await;
        }
    }
}

/// Makes the directory, for its owner alone, and sees to it that no other gateway uses it.
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

/// Makes the admin key of a new data directory. If its file was removed, a new key takes the place
/// of the one that was in it: that is how a lost or leaked one is replaced.
fn ensure_admin_key(registry: &Registry, path: &Path) -> anyhow::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let all = DatasourceId::all();
    let earlier: Vec<_> =
        registry.keys(&all).into_iter().filter(|key| key.label == ADMIN_KEY_LABEL).collect();
    let (key, secret) = registry.create_key(&all, ADMIN_KEY_LABEL, Scopes::of(&[Scope::Admin]), None)?;
    let written =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).and_then(|mut file| {
            writeln!(file, "{}", secret.expose())?;
            file.sync_all()
        });
    written.with_context(|| format!("cannot write {}", path.display()))?;
    for key in earlier {
        registry.revoke_key(&all, key.id)?;
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

/// Takes as many file descriptors as the system gives: each connection is one.
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
