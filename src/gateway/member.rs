//! A gateway as a member of its cluster: its connection to NATS, the registry that it shares with the other
//! members, and its presence among them.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use headgate_bridge_nats::{KvBucket, KvError, Nats, Presence, StreamError};
use rand::TryRng;
use rand::rngs::SysRng;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::cluster_settings::{all_streams, check_cluster_settings};
use super::directory::{ADMIN_KEY_LABEL, write_secret};
use super::history::{AdmissionError, AdmittedHistory, HistoryWatch, set_back_stores};
use super::start_wait::StartWait;
use crate::auth::cluster::{JoinedRegistry, RegistryFollower, replace_file};
use crate::auth::{Registry, RegistryError};
use crate::config::Config;
use crate::consume::subscriber::ClusterShareGroups;
use crate::consume::subscriber::sessions::SessionStore;
use crate::consume::subscriber::sessions::bucket::{self, CursorSetBacks, GroupRolls, SessionLookup};
use crate::front::http::UnreadyReason;
use crate::front::mqtt::ClientClaims;
use crate::intake::Intake;
use crate::log::{JetstreamLog, Log, LogOpenError, SharedPlaces};

/// The file with the gateway's name in its cluster.
pub(super) const NODE_NAME_FILE: &str = "node";
/// The random bytes of a name, which is their hexadecimal digits.
const NODE_NAME_BYTES: usize = 8;

/// A gateway that is joining its cluster.
pub(super) struct JoiningMember {
    nats: Nats,
    /// What it waits for, other than NATS itself.
    wait: Arc<StartWait>,
}

impl JoiningMember {
    /// Begins to connect.
    ///
    /// # Errors
    /// Settings that can never work, worded for an operator.
    pub(super) async fn begin(config: &Config) -> anyhow::Result<Self> {
        let nats = Nats::connect(&config.nats.connection("headgate cluster")?).await?;
        Ok(Self { nats, wait: Arc::new(StartWait::new("the cluster's registry is being read")) })
    }

    /// What it is waiting for, as `/readyz` reports it.
    pub(super) fn reason(&self) -> UnreadyReason {
        let (nats, wait) = (self.nats.clone(), self.wait.clone());
        Arc::new(move || nats.trouble().unwrap_or_else(|| wait.reason()))
    }

    /// Joins the cluster and opens its log. Waits while NATS is unreachable.
    ///
    /// # Errors
    /// Worded for an operator: settings that can never work, a registry that cannot be read, a stream
    /// that cannot be used.
    pub(super) async fn join(&self, config: &Config) -> anyhow::Result<(ClusterMember, Arc<JetstreamLog>)> {
        let name = node_name(&config.data_dir)?;
        loop {
            match self.try_join(config, &name).await {
                Err(error) if is_overtaken(&error) => {
                    warn!("{error}: it joins again");
                    self.wait.pause(error).await;
                }
                joined => return joined,
            }
        }
    }

    /// Joins once: what it opens belongs to the history that was admitted at its beginning.
    async fn try_join(
        &self,
        config: &Config,
        name: &str,
    ) -> anyhow::Result<(ClusterMember, Arc<JetstreamLog>)> {
        loop {
            match check_cluster_settings(&self.nats, config).await {
                Ok(()) => break,
                Err(StreamError::Away(trouble)) => self.wait.pause(trouble).await,
                Err(error) => return Err(error.into()),
            };
        }
        let admitted = self.admit(config).await?;
        let mut member = ClusterMember::join(&self.nats, config, self.wait.clone()).await?;
        // The log has its own connection because it carries the most traffic.
        let nats = Nats::connect(&config.nats.connection("headgate log")?).await?;
        let following = Nats::connect(&config.nats.connection("headgate log, following")?).await?;
        let log = loop {
            match JetstreamLog::open(&nats, &following, config, name).await {
                Ok(log) => break Arc::new(log),
                Err(error @ LogOpenError::Away(_)) => self.wait.pause(error).await,
                Err(error) => return Err(error.into()),
            };
        };
        let registry = member.registry.clone();
        log.set_behind_check(move || registry.may_be_behind());
        self.begin_history(config, &admitted, &log, &mut member, following).await?;
        Ok((member, log))
    }

    /// Compares what the servers have with what this gateway has followed. Waits until they are the same, or it is decided
    /// that the cluster goes on from another state.
    async fn admit(&self, config: &Config) -> anyhow::Result<AdmittedHistory> {
        let (streams, replicas) = (all_streams(config), config.nats.stream.replicas);
        loop {
            match AdmittedHistory::ask(&self.nats, &streams, replicas, &config.data_dir).await {
                Ok(admitted) => return Ok(admitted),
                Err(AdmissionError::Away(text)) => self.wait.pause(text).await,
                Err(AdmissionError::Undecided(text)) => {
                    if self.wait.reason() != text {
                        error!("the cluster is not the one that this gateway has followed: {text}");
                    }
                    self.wait.pause(text).await
                }
                Err(error) => return Err(error.into()),
            };
        }
    }

    /// Sets aside what the stores have beyond the state from which the cluster goes on, notes what is followed from now on,
    /// and watches that.
    async fn begin_history(
        &self,
        config: &Config,
        admitted: &AdmittedHistory,
        log: &Arc<JetstreamLog>,
        member: &mut ClusterMember,
        following: Nats,
    ) -> anyhow::Result<()> {
        log.set_history(admitted.cluster.of_log());
        let dir = config.data_dir.clone();
        if let Some(end) = admitted.set_back_to {
            let (dir, log) = (dir.clone(), log.clone());
            tokio::task::spawn_blocking(move || set_back_stores(&dir, &*log, end)).await??;
        }
        if let Some(followed_at) = admitted.followed_at {
            while let Err(error) = log.find_open_exchanges(followed_at).await {
                self.wait.pause(error).await;
            }
        }
        member.open_cells(config).await?;
        let streams = all_streams(config);
        let known = loop {
            let replicas = config.nats.stream.replicas;
            match admitted.complete(&self.nats, &streams, replicas, log.next_offset()).await {
                Ok(known) => break known,
                Err(AdmissionError::Away(text)) => self.wait.pause(text).await,
                Err(error) => return Err(error.into()),
            };
        };
        known.save(&dir).with_context(|| format!("what is followed, in {}", dir.display()))?;
        let (gate, registry) = (log.gate().clone(), member.registry.clone());
        let watch = HistoryWatch::new(
            self.nats.clone(),
            streams,
            gate,
            dir,
            known,
            (registry, log.followed()),
            member.left.clone(),
        );
        member.history = Some(tokio::spawn(watch.run(vec![log.nats().clone(), following])));
        Ok(())
    }
}

/// Whether a start has to join again, because the history that it was admitted to has ended meanwhile.
fn is_overtaken(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(AdmissionError::Overtaken))
}

/// The gateway's name in the cluster, kept in its data directory across restarts. A file that a full disk or a loss of
/// power left empty or cut has none: another name takes its place.
fn node_name(dir: &Path) -> anyhow::Result<String> {
    let path = dir.join(NODE_NAME_FILE);
    match std::fs::read(&path) {
        Ok(text) => match read_name(&text) {
            Some(name) => return Ok(name),
            None => {
                warn!(path = %path.display(), "it holds no name of a gateway: another one takes its place")
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
    let name = random_name()?;
    replace_file(&path, format!("{name}\n").as_bytes())
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(name)
}

/// A name as [`random_name`] makes it.
fn read_name(text: &[u8]) -> Option<String> {
    let name = str::from_utf8(text.trim_ascii()).ok()?;
    let is_name = name.len() == 2 * NODE_NAME_BYTES && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_name.then(|| name.to_owned())
}

fn random_name() -> anyhow::Result<String> {
    let mut random = [0; NODE_NAME_BYTES];
    SysRng.try_fill_bytes(&mut random).context("the operating system's random generator")?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A gateway that has joined its cluster.
pub(super) struct ClusterMember {
    nats: Nats,
    /// Makes this gateway known to the other members.
    presence: Arc<Presence>,
    registry: Arc<Registry>,
    /// Applies the other members' changes, once [`ClusterMember::follow`] has spawned it.
    follow: Option<RegistryFollower>,
    following: Option<JoinHandle<()>>,
    /// The bucket of sessions, once it is open.
    cells: Option<KvBucket>,
    /// Watches whether the cluster is the one that is followed.
    history: Option<JoinHandle<()>>,
    /// Cancelled when it goes on from another state.
    left: CancellationToken,
    /// What its start waits for.
    wait: Arc<StartWait>,
}

impl ClusterMember {
    /// Joins the cluster. Waits while NATS is unreachable.
    ///
    /// # Errors
    /// Worded for an operator: settings that can never work, a registry that cannot be read.
    async fn join(nats: &Nats, config: &Config, wait: Arc<StartWait>) -> anyhow::Result<Self> {
        // A new id at each start: no member waits for the process that ran here before.
        let id = random_name()?;
        let JoinedRegistry { registry, presence, follow } =
            Registry::join(nats, config.nats.stream.replicas, &id).await?;
        Ok(Self {
            nats: nats.clone(),
            presence,
            registry,
            follow: Some(follow),
            following: None,
            cells: None,
            history: None,
            left: CancellationToken::new(),
            wait,
        })
    }

    /// The registry.
    pub(super) fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Cancelled when the cluster goes on from another state of its log.
    pub(super) fn left(&self) -> &CancellationToken {
        &self.left
    }

    /// Opens the bucket of sessions. Waits while NATS is unreachable.
    ///
    /// # Errors
    /// JetStream cannot have it; worded for an operator.
    async fn open_cells(&mut self, config: &Config) -> anyhow::Result<KvBucket> {
        if let Some(cells) = &self.cells {
            return Ok(cells.clone());
        }
        let (replicas, expiry_s_max) = (config.nats.stream.replicas, config.mqtt.session_expiry_s_max);
        loop {
            match bucket::open_sessions_bucket(&self.nats, replicas, expiry_s_max).await {
                Err(error @ KvError::Away(_)) => {
                    self.wait.pause(format_args!("the bucket of MQTT sessions: {error}")).await;
                }
                opened => {
                    let cells = opened.context("the bucket of MQTT sessions")?;
                    self.cells = Some(cells.clone());
                    return Ok(cells);
                }
            }
        }
    }

    /// Begins to apply other members' changes and returns once all earlier changes are applied: only
    /// then may the gateway accept messages. Waits while NATS is unreachable.
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
        // Only now can it answer: before, everybody else would wait for it at each change. What was published until now it
        // has when it has caught up.
        self.presence.announce().await;
        loop {
            match self.registry.caught_up().await {
                Err(error @ RegistryError::Away(_)) => self.wait.pause(error).await,
                caught_up => return Ok(caught_up?),
            };
        }
    }

    /// Ensures that the cluster has an admin key: if it has none, creates one and writes its secret to
    /// `path`. Waits while NATS is unreachable.
    ///
    /// # Errors
    /// The file cannot be written, or the registry has failed.
    pub(super) async fn ensure_admin_key(&self, path: &Path) -> anyhow::Result<()> {
        loop {
            let (registry, for_file) = (self.registry.clone(), path.to_owned());
            match tokio::task::spawn_blocking(move || first_admin_key(&registry, &for_file)).await? {
                Err(error @ (RegistryError::Away(_) | RegistryError::Overtaken)) => {
                    self.wait.pause(error).await
                }
                made => return made.with_context(|| format!("the admin key in {}", path.display())),
            };
        }
    }

    /// Opens the store of MQTT sessions, the claims that move clients between members, and the groups of
    /// subscribers, whose members may be on any gateway. Waits while NATS is unreachable.
    ///
    /// # Errors
    /// JetStream cannot store them; worded for an operator.
    pub(super) async fn open_sessions(
        &mut self,
        config: &Config,
        places: SharedPlaces,
        log: &Arc<dyn Log>,
    ) -> anyhow::Result<(SessionStore, ClientClaims, ClusterShareGroups)> {
        let cells = self.open_cells(config).await?;
        let set_backs = CursorSetBacks::new(log.history().cloned().unwrap_or_default(), &config.data_dir);
        let lookup = SessionLookup::new(cells.clone(), set_backs);
        let rolls = GroupRolls::start(cells.clone());
        let written = log.clone();
        let (store, lost) =
            SessionStore::in_bucket(cells, self.presence.id(), move || written.doubt().is_some())?;
        let groups = ClusterShareGroups::start(places, rolls, self.presence.clone()).await?;
        Ok((store, ClientClaims::new(self.presence.clone(), lookup, lost), groups))
    }

    /// Leaves the cluster: the others no longer wait for this member. Call it only once the gateway accepts
    /// no more messages.
    pub(super) async fn leave(self) {
        self.presence.leave().await;
        if let Some(history) = self.history {
            history.abort();
        }
        if let Some(following) = self.following {
            following.abort();
        }
    }
}

fn first_admin_key(registry: &Registry, path: &Path) -> Result<(), RegistryError> {
    let mut written = None;
    let made = registry.create_first_admin(ADMIN_KEY_LABEL, |secret| {
        written = Some(path);
        write_secret(path, secret.expose())
    });
    if !matches!(made, Ok(Some(_)))
        && let Some(path) = written
    {
        // The key was not created, so its secret opens nothing. A leftover file does no harm.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_and_a_file_without_one_gets_another() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(NODE_NAME_FILE);
        let mut earlier = node_name(dir.path()).expect("made");
        for left in [&b""[..], b"\n", b"0123456\n", &[0; 17], b"\xff\xfe\xff\xfe"] {
            assert_eq!(node_name(dir.path()).expect("read"), earlier);
            std::fs::write(&path, left).expect("as a loss of power leaves it");
            let name = node_name(dir.path()).expect("made");
            assert!(read_name(name.as_bytes()).is_some() && name != earlier, "{name:?}");
            earlier = name;
        }
        assert_eq!(std::fs::read_to_string(&path).expect("written"), format!("{earlier}\n"));
    }
}
