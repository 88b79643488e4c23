//! `headgate cluster adopt` and `headgate cluster restore`: the decision that a cluster goes on from what its servers have.

use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use headgate_bridge_nats::{KvBucket, KvError, Nats};

use super::admission::{AdmissionError, new_identity, put_history};
use super::{
    ClusterHistory, FollowedHistory, HistoryFindings, HistoryVerdict, SetBackRow, judge, judge_anchor,
    registry_stream,
};
use crate::auth::RegistryError;
use crate::auth::cluster::{RegistryCopy, RegistryMending, registry_bucket_settings};
use crate::config::{Config, LogBackend};
use crate::consume::subscriber::sessions::bucket::SESSIONS_BUCKET_NAME;
use crate::gateway::cluster_settings::all_streams;
use crate::message::now_micros;

/// How long the commands wait for NATS.
const ADOPTION_TIMEOUT: Duration = Duration::from_secs(10);
const ADOPTION_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// What is ordered.
#[derive(Debug, Clone, Copy)]
pub struct AdoptionOrder {
    /// Whether the registry is published again as this gateway has it.
    pub is_restored: bool,
    /// Whether a registry without any key may be gone on with: every datasource and key has to be created again.
    pub is_new_registry: bool,
    /// Whether to do it, and not only say it.
    pub apply: bool,
}

/// What was (or would be) done.
#[derive(Debug)]
pub struct AdoptionReport {
    /// For people, a line each.
    pub said: String,
    /// There is something to decide.
    pub is_needed: bool,
    /// It was decided.
    pub is_done: bool,
}

/// Why a command about a cluster did nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClusterCommandError {
    /// NATS does not answer now.
    #[error("{0}")]
    Away(String),
    /// Something stands against it.
    #[error("{0}")]
    Refused(String),
}

/// Lets the cluster of a configuration go on from what its servers have. Returns what is (or would be) done, for people.
///
/// # Errors
/// The configuration has no cluster; [`ClusterCommandError`]: NATS is away, there is no cluster, or a registry without
/// keys is not wanted; worded for an operator.
pub fn adopt_cluster(config: &Config, order: AdoptionOrder) -> anyhow::Result<AdoptionReport> {
    if config.log.backend != LogBackend::Jetstream {
        bail!("log.backend is not \"jetstream\": this configuration has no cluster");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let nats = Nats::connect(&config.nats.connection("headgate cluster adopt")?).await?;
        let give_up_at = Instant::now() + ADOPTION_TIMEOUT;
        loop {
            let trouble = match nats.trouble() {
                Some(trouble) => trouble,
                None => match try_adopt(&nats, config, order).await {
                    Err(AdoptionError::Away(trouble)) => trouble,
                    Err(AdoptionError::Refused(error)) => {
                        return Err(ClusterCommandError::Refused(format!("{error:#}")).into());
                    }
                    Ok(report) => return Ok(report),
                },
            };
            if Instant::now() >= give_up_at {
                return Err(ClusterCommandError::Away(trouble).into());
            }
            tokio::time::sleep(ADOPTION_RETRY_PAUSE).await;
        }
    })
}

enum AdoptionError {
    /// Try again.
    Away(String),
    Refused(anyhow::Error),
}

impl From<AdmissionError> for AdoptionError {
    fn from(error: AdmissionError) -> Self {
        match error {
            AdmissionError::Away(text) => Self::Away(text),
            error => Self::Refused(error.into()),
        }
    }
}

impl From<headgate_bridge_nats::StreamError> for AdoptionError {
    fn from(error: headgate_bridge_nats::StreamError) -> Self {
        AdmissionError::from(error).into()
    }
}

impl From<KvError> for AdoptionError {
    fn from(error: KvError) -> Self {
        AdmissionError::from(error).into()
    }
}

impl From<RegistryError> for AdoptionError {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::Away(text) => Self::Away(text),
            error => Self::Refused(error.into()),
        }
    }
}

async fn try_adopt(
    nats: &Nats,
    config: &Config,
    order: AdoptionOrder,
) -> Result<AdoptionReport, AdoptionError> {
    let refused = |error: anyhow::Error| AdoptionError::Refused(error);
    let (dir, replicas) = (&config.data_dir, config.nats.stream.replicas);
    let known = FollowedHistory::load(dir)
        .with_context(|| format!("{}/{}", dir.display(), super::HISTORY_FILE_NAME))
        .map_err(refused)?;
    let copy = RegistryCopy::load(dir).map_err(|error| refused(error.into()))?;
    let found = HistoryFindings::ask(nats, &all_streams(config)).await?;
    let mut verdict = judge(&found, known.as_ref());
    if let (HistoryVerdict::Same, Some(known)) = (&verdict, &known)
        && let Some(broken) = judge_anchor(nats, &found, known).await?
    {
        verdict = broken;
    }
    if verdict == HistoryVerdict::New {
        return Err(refused(anyhow::anyhow!("there is no cluster on these servers yet")));
    }
    if order.is_restored && copy.is_none() {
        return Err(refused(anyhow::anyhow!(
            "there is no copy of the registry in {}: run this where a gateway of this cluster has its data directory",
            dir.display()
        )));
    }
    let mut said = String::new();
    let nothing = match verdict {
        HistoryVerdict::Broken(_) => None,
        HistoryVerdict::Unmarked => Some("the cluster has no history yet: start a gateway, which makes one"),
        _ if known.is_some() => {
            Some("there is nothing to decide: the cluster is as the gateway of this data directory knows it")
        }
        _ => {
            let _ = writeln!(
                said,
                "no gateway has its data directory in {}: what others have followed is not known here",
                dir.display()
            );
            None
        }
    };
    if let Some(nothing) = nothing {
        return Ok(AdoptionReport { said: format!("{nothing}\n"), is_needed: false, is_done: false });
    }
    let end = found.log().map_or(1, |log| log.last + 1);
    let settings = registry_bucket_settings(replicas);
    // One that is gone is not made before it is decided.
    let mending = match found.registry() {
        Some(_) => {
            let bucket = KvBucket::open(nats, &settings).await?;
            RegistryMending::plan(&bucket, copy.as_ref(), order.is_restored, end).await?
        }
        None => RegistryMending::default(),
    };
    tell(&mut said, &found, known.as_ref(), &mending, end);
    let has_keys = mending.live_keys > 0 || (found.registry().is_none() && order.is_restored);
    if !has_keys && !order.is_new_registry {
        return Err(refused(anyhow::anyhow!(
            "{said}the registry has no key: put its bucket back; or publish it again where a gateway has its data directory \
             (headgate cluster restore); or begin a new registry on purpose (--new-registry): then every datasource has to \
             be created again, and every device needs another key"
        )));
    }
    if order.apply {
        let bucket = KvBucket::open(nats, &settings).await?;
        let mending = RegistryMending::plan(&bucket, copy.as_ref(), order.is_restored, end).await?;
        mending.publish(&bucket).await?;
        let history = next_epoch(&found, known.as_ref(), end)?;
        put_history(nats, &with_registry(nats, config, history).await?, found.revision, replicas).await?;
        let _ = writeln!(said, "done: gateways that run begin the new epoch by themselves, within seconds");
    } else {
        let _ = writeln!(said, "nothing is changed yet: with --yes it is done");
    }
    Ok(AdoptionReport { said, is_needed: true, is_done: order.apply })
}

/// The history from here on.
fn next_epoch(
    found: &HistoryFindings,
    known: Option<&FollowedHistory>,
    end: u64,
) -> Result<ClusterHistory, AdmissionError> {
    let row = found.history.as_ref();
    let marks: Vec<_> = found.marks().collect();
    let id = row.map(|row| row.id.clone()).or_else(|| known.map(|known| known.id.clone()));
    let id = match id.or_else(|| marks.first().map(|mark| mark.id.clone())) {
        Some(id) => id,
        None => new_identity()?,
    };
    let epochs = marks.iter().map(|mark| mark.epoch).chain(row.map(|row| row.epoch));
    let newest = epochs.chain(known.map(|known| known.epoch)).max().unwrap_or(0);
    let at = now_micros();
    // Also behind an epoch of which nothing is left.
    let epoch = (newest + 1).max(u64::try_from(at / 1_000_000).unwrap_or(0));
    let sessions = found.extent_of(&format!("KV_{SESSIONS_BUCKET_NAME}")).map_or(0, |bucket| bucket.last);
    let mut set_backs = row.map_or_else(Vec::new, |row| row.set_backs.clone());
    set_backs.push(SetBackRow { epoch, at, end, sessions });
    let streams = found.extents().map(|(name, extent)| (name.to_owned(), extent.created)).collect();
    Ok(ClusterHistory { id, epoch, streams, set_backs })
}

/// Adds the registry's bucket, which may just have been made.
async fn with_registry(
    nats: &Nats,
    config: &Config,
    mut history: ClusterHistory,
) -> Result<ClusterHistory, AdoptionError> {
    let found = HistoryFindings::ask(nats, &all_streams(config)).await?;
    if let Some(registry) = found.registry() {
        history.streams.insert(registry_stream(), registry.created);
    }
    Ok(history)
}

/// Says what is gone on from, and what is beyond it.
fn tell(
    said: &mut String,
    found: &HistoryFindings,
    known: Option<&FollowedHistory>,
    mending: &RegistryMending,
    end: u64,
) {
    for (stream, report) in &found.streams {
        let followed = known.and_then(|known| known.streams.get(stream.name())).map(|known| known.last);
        let is = report.as_ref().map(|report| report.extent().last);
        let followed =
            followed.map_or_else(String::new, |last| format!(", this gateway has followed it up to {last}"));
        let _ = match is {
            Some(last) => writeln!(said, "{stream}: ends at {last}{followed}"),
            None => writeln!(said, "{stream}: is gone, and is made anew{followed}"),
        };
    }
    let _ = writeln!(
        said,
        "the log goes on at offset {end}: what stores have from there on is set aside, and cursors beyond it go back to it"
    );
    for (count, what) in [
        (mending.ended_keys, "keys that this gateway knows as dead and the registry has as alive: they end"),
        (mending.restored_rows, "rows of the registry are published again as this gateway has them"),
        (mending.set_back_rows, "incarnations of datasources that began beyond that offset begin there"),
        (mending.live_keys, "keys are alive then"),
    ] {
        let _ = if count > 0 { writeln!(said, "{count} {what}") } else { Ok(()) };
    }
}
