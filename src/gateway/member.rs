//! A gateway as a member of its cluster: its connection to NATS, the registry that it shares with the other
//! members, and its place among them.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use headgate_bridge_nats::{CellError, Nats, Presence};
use rand::TryRng;
use rand::rngs::SysRng;
use tokio::task::JoinHandle;
use tracing::info;

use super::ADMIN_KEY_LABEL;
use crate::auth::cluster::{Follow, Joined};
use crate::auth::{ApiKey, Registry, RegistryError};
use crate::config::Config;
use crate::consume::subscriber::ClusterGroups;
use crate::consume::subscriber::sessions::SessionStore;
use crate::consume::subscriber::sessions::bucket::{self, GroupRolls, Lookup};
use crate::front::http::Reason;
use crate::front::mqtt::Claims;
use crate::intake::Intake;
use crate::log::{JetstreamLog, OpenError, SharedPlaces};

/// The pause before another attempt at what NATS was away for.
const PAUSE: Duration = Duration::from_millis(250);

/// The file with what the gateway of a data directory is called in its cluster.
pub(super) const NAME_FILE: &str = "node";

/// A gateway that is about to be a member.
pub(super) struct Joining {
    nats: Nats,
    /// What it waited for last, besides NATS itself.
    waits_for: Arc<Mutex<String>>,
}

impl Joining {
    /// Begins to connect.
    ///
    /// # Errors
    /// In words for an operator: settings that can never work.
    pub(super) async fn begin(config: &Config) -> anyhow::Result<Self> {
        let nats = Nats::connect(&config.nats.connection("headgate cluster")?).await?;
        Ok(Self { nats, waits_for: Arc::new(Mutex::new("the cluster's registry is being read".to_owned())) })
    }

    /// What is waited for.
    pub(super) fn reason(&self) -> Reason {
        let (nats, waits_for) = (self.nats.clone(), self.waits_for.clone());
        Arc::new(move || {
            let of_cluster = || waits_for.lock().unwrap_or_else(PoisonError::into_inner).clone();
            nats.trouble().unwrap_or_else(of_cluster)
        })
    }

    /// Joins the cluster and opens its log. While NATS is away this waits.
    ///
    /// # Errors
    /// In words for an operator: settings that can never work, a registry that cannot be read, a stream
    /// that cannot be used.
    pub(super) async fn join(&self, config: &Config) -> anyhow::Result<(Member, JetstreamLog)> {
        let name = name_of(&config.data_dir)?;
        let member = Member::join(&self.nats, config).await?;
        // A connection of its own, as it has the most to do.
        let nats = Nats::connect(&config.nats.connection("headgate log")?).await?;
        let following = Nats::connect(&config.nats.connection("headgate log, following")?).await?;
        loop {
            let error = match JetstreamLog::open(&nats, &following, config, &name).await {
                Ok(log) => return Ok((member, log)),
                Err(error @ OpenError::Away(_)) => error,
                Err(error) => return Err(error.into()),
            };
            *self.waits_for.lock().unwrap_or_else(PoisonError::into_inner) = error.to_string();
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// What the gateway of a data directory is called, now and after every restart.
fn name_of(dir: &Path) -> anyhow::Result<String> {
    let path = dir.join(NAME_FILE);
    match std::fs::read_to_string(&path) {
        Ok(name) => Ok(name.trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let name = random_name()?;
            std::fs::write(&path, format!("{name}\n"))
                .with_context(|| format!("cannot write {}", path.display()))?;
            Ok(name)
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn random_name() -> anyhow::Result<String> {
    let mut random = [0; 8];
    SysRng.try_fill_bytes(&mut random).context("the operating system's random generator")?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A member.
pub(super) struct Member {
    nats: Nats,
    /// It among the others.
    presence: Arc<Presence>,
    registry: Arc<Registry>,
    /// Applies what others change; before it runs, what it is to run.
    follow: Option<Follow>,
    following: Option<JoinHandle<()>>,
}

impl Member {
    /// Joins the cluster. While NATS is away this waits.
    ///
    /// # Errors
    /// In words for an operator: settings that can never work, a registry that cannot be read.
    async fn join(nats: &Nats, config: &Config) -> anyhow::Result<Self> {
        // Another one at each start: nobody waits for the gateway that was here before.
        let id = random_name()?;
        let Joined { registry, presence, follow } =
            Registry::join(nats, config.nats.stream.replicas, &id).await?;
        Ok(Self { nats: nats.clone(), presence, registry, follow: Some(follow), following: None })
    }

    /// The registry.
    pub(super) fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Begins to apply what other members change, and returns once whatever was changed before has been: only
    /// then may anything be let in. While NATS is away this waits.
    ///
    /// # Errors
    /// The registry has failed.
    pub(super) async fn follow(&mut self, intake: &Intake) -> anyhow::Result<()> {
        if let Some(follow) = self.follow.take() {
            let intake = intake.clone();
            let settle = move |dead: Vec<_>| {
                let (intake, heard) = (intake.clone(), Instant::now());
                async move { intake.settle(&dead, heard).await }
            };
            self.following = Some(tokio::spawn(follow.run(settle)));
        }
        loop {
            match self.registry.caught_up().await {
                Err(RegistryError::Away(_)) => tokio::time::sleep(PAUSE).await,
                caught_up => return Ok(caught_up?),
            }
        }
    }

    /// Sees to it that there is an admin key: a cluster that has none gets one, whose secret goes to `path`.
    /// While NATS is away this waits.
    ///
    /// # Errors
    /// The file cannot be written, or the registry has failed.
    pub(super) async fn ensure_admin_key(&self, path: &Path) -> anyhow::Result<()> {
        loop {
            let (registry, for_file) = (self.registry.clone(), path.to_owned());
            match tokio::task::spawn_blocking(move || first_admin_key(&registry, &for_file)).await? {
                Err(RegistryError::Away(_) | RegistryError::Overtaken) => tokio::time::sleep(PAUSE).await,
                made => return made.with_context(|| format!("the admin key in {}", path.display())),
            }
        }
    }

    /// Where MQTT sessions are kept, what clients are shared with the other members by, and the groups of
    /// subscribers, whose members are anywhere in the cluster. While NATS is away this waits.
    ///
    /// # Errors
    /// In words for an operator: JetStream cannot keep them.
    pub(super) async fn sessions(
        &self,
        config: &Config,
        places: SharedPlaces,
    ) -> anyhow::Result<(SessionStore, Claims, ClusterGroups)> {
        let (replicas, expiry_s_max) = (config.nats.stream.replicas, config.mqtt.session_expiry_s_max);
        let cells = loop {
            match bucket::open(&self.nats, replicas, expiry_s_max).await {
                Err(CellError::Away(_)) => tokio::time::sleep(PAUSE).await,
                opened => break opened.context("the bucket of MQTT sessions")?,
            }
        };
        let (lookup, rolls) = (Lookup::new(cells.clone()), GroupRolls::start(cells.clone()));
        let (store, lost) = SessionStore::in_bucket(cells, self.presence.id())?;
        let groups = ClusterGroups::start(places, rolls, self.presence.clone()).await?;
        Ok((store, Claims::new(self.presence.clone(), lookup, lost), groups))
    }

    /// Leaves: the others wait for this member no more. To be called when nothing can come in any more.
    pub(super) async fn leave(self) {
        self.presence.leave().await;
        if let Some(following) = self.following {
            following.abort();
        }
    }
}

fn first_admin_key(registry: &Registry, path: &Path) -> Result<(), RegistryError> {
    let mut written = None;
    let made = registry.create_first_admin(ADMIN_KEY_LABEL, |secret| {
        written = Some(path);
        write_secret(path, secret)
    });
    if !matches!(made, Ok(Some(_)))
        && let Some(path) = written
    {
        // It has become nobody's key. If it stays, that does no harm.
        let _ = std::fs::remove_file(path);
    }
    match made? {
        Some(key) => info!(key_id = %key.id, path = %path.display(), "made the cluster's first admin key"),
        None if path.exists() => {}
        None => info!(
            "the cluster has its admin keys: there is one in admin.key of the gateway that was first, and it makes \
             others (headgate key create)"
        ),
    }
    Ok(())
}

/// Writes a secret for its owner alone. What is there already is of a registry that there is no more.
fn write_secret(path: &Path, secret: &ApiKey) -> io::Result<()> {
    let beside = PathBuf::from(format!("{}.new", path.display()));
    let _ = std::fs::remove_file(&beside);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    writeln!(file, "{}", secret.expose())?;
    file.sync_all()?;
    std::fs::rename(&beside, path)
}
