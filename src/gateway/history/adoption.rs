//! `headgate cluster adopt` and `headgate cluster restore`: the decision that a cluster goes on from what its servers have.

use std::collections::HashSet;
use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use headgate_bridge_nats::{KvBucket, KvError, Nats};

use super::admission::{AdmissionError, new_identity, put_history};
use super::anchors::{FollowedEnd, end_of_followed};
use super::comparison::first_other;
use super::missing::MissingRecords;
use super::{
    ClusterHistory, FollowedHistory, HistoryFindings, HistoryVerdict, SetBackRow, judge_all, registry_stream,
};
use crate::auth::RegistryError;
use crate::auth::cluster::{RegistryCopy, RegistryMending, registry_bucket_settings};
use crate::config::{Config, LogBackend};
use crate::consume::sink::record_copy::RecordCopy;
use crate::consume::subscriber::sessions::bucket::SESSIONS_BUCKET_NAME;
use crate::gateway::cluster_settings::all_streams;
use crate::log::open_log_stream;
use crate::message::{KeyId, Offset, now_micros};

/// How long the commands wait for NATS.
const ADOPTION_TIMEOUT: Duration = Duration::from_secs(10);
const ADOPTION_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// What is ordered.
#[derive(Debug, Clone, Copy)]
pub struct AdoptionOrder {
    /// Whether the registry is published again as this gateway has it.
    pub is_restored: bool,
    /// Whether records are published again that the log has no longer and this gateway has.
    pub has_records: bool,
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

pub(super) enum AdoptionError {
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
    let mut said = String::new();
    let Some(case) = AdoptionCase::read(nats, config, order, &mut said).await? else {
        return Ok(AdoptionReport { said, is_needed: false, is_done: false });
    };
    let plan = case.plan(nats, config, order).await?;
    tell(&mut said, &case.found, case.known.as_ref(), &plan.mending, plan.end);
    if let Some(missing) = &plan.missing {
        let _ = writeln!(said, "{}", missing.words());
    }
    let is_gone = case.found.registry().is_none();
    let has_keys = !plan.mending.live_keys.is_empty() || (is_gone && order.is_restored);
    if !has_keys && !order.is_new_registry {
        return Err(AdoptionError::Refused(anyhow::anyhow!(
            "{said}the registry has no key: put its bucket back; or publish it again where a gateway has its data directory \
             (headgate cluster restore); or begin a new registry on purpose (--new-registry): then every datasource has to \
             be created again, and every device needs another key"
        )));
    }
    if order.apply {
        case.apply(nats, config, order, &plan).await?;
        let _ = writeln!(said, "done: gateways that run begin the new epoch by themselves, within seconds");
    } else {
        let _ = writeln!(said, "nothing is changed yet: with --yes it is done");
    }
    Ok(AdoptionReport { said, is_needed: true, is_done: order.apply })
}

/// What is decided about.
struct AdoptionCase {
    known: Option<FollowedHistory>,
    copy: Option<RegistryCopy>,
    found: HistoryFindings,
}

/// What is to be done.
struct AdoptionPlan {
    mending: RegistryMending,
    /// The records that are published again, if that is ordered.
    missing: Option<MissingRecords>,
    /// The first offset that is given anew.
    end: Offset,
}

impl AdoptionCase {
    /// Asks the servers and reads what this gateway knows; `None` if there is nothing to decide, which is said then.
    async fn read(
        nats: &Nats,
        config: &Config,
        order: AdoptionOrder,
        said: &mut String,
    ) -> Result<Option<Self>, AdoptionError> {
        let refused = |error: anyhow::Error| AdoptionError::Refused(error);
        let dir = &config.data_dir;
        let known = FollowedHistory::load(dir)
            .with_context(|| format!("{}/{}", dir.display(), super::HISTORY_FILE_NAME))
            .map_err(refused)?;
        let copy = RegistryCopy::load(dir).map_err(|error| refused(error.into()))?;
        let found = HistoryFindings::ask(nats, &all_streams(config)).await?;
        let verdict = judge_all(nats, &found, known.as_ref(), dir).await?;
        if verdict == HistoryVerdict::New {
            return Err(refused(anyhow::anyhow!("there is no cluster on these servers yet")));
        }
        if order.is_restored && copy.is_none() {
            return Err(refused(anyhow::anyhow!(
                "there is no copy of the registry in {}: run this where a gateway of this cluster has its data directory",
                dir.display()
            )));
        }
        let _ = match verdict {
            HistoryVerdict::Broken(_) => Ok(()),
            HistoryVerdict::Unmarked => {
                let _ = writeln!(said, "the cluster has no history yet: start a gateway, which makes one");
                return Ok(None);
            }
            _ if known.is_some() => {
                let words = "there is nothing to decide: the cluster is as the gateway of this data directory knows it";
                let _ = writeln!(said, "{words}");
                return Ok(None);
            }
            _ => writeln!(
                said,
                "no gateway has its data directory in {}: what others have followed is not known here",
                dir.display()
            ),
        };
        Ok(Some(Self { known, copy, found }))
    }

    /// Works out what is to be done. Nothing is changed.
    async fn plan(
        &self,
        nats: &Nats,
        config: &Config,
        order: AdoptionOrder,
    ) -> Result<AdoptionPlan, AdoptionError> {
        let followed = end_of_followed(nats, &self.found, self.known.as_ref()).await?;
        let end = end_of_copied(nats, config, &self.found, followed).await?;
        let mending = self.mending(nats, config, order, end).await?;
        if !order.has_records {
            return Ok(AdoptionPlan { mending, missing: None, end });
        }
        let live_keys = match (self.found.registry(), &self.copy) {
            (None, Some(copy)) => copy.live_keys()?,
            _ => mending.live_keys,
        };
        let known = self.known.as_ref();
        let missing = find_missing(nats, config, &self.found, known, (followed.sure, live_keys)).await?;
        let end = missing.end;
        let mending = self.mending(nats, config, order, end).await?;
        Ok(AdoptionPlan { mending, missing: Some(missing), end })
    }

    /// What is put right in the registry. A bucket that is gone is not made before it is decided.
    async fn mending(
        &self,
        nats: &Nats,
        config: &Config,
        order: AdoptionOrder,
        end: Offset,
    ) -> Result<RegistryMending, AdoptionError> {
        if self.found.registry().is_none() {
            return Ok(RegistryMending::default());
        }
        let bucket = KvBucket::open(nats, &registry_bucket_settings(config.nats.stream.replicas)).await?;
        Ok(RegistryMending::plan(&bucket, self.copy.as_ref(), order.is_restored, end).await?)
    }

    async fn apply(
        &self,
        nats: &Nats,
        config: &Config,
        order: AdoptionOrder,
        plan: &AdoptionPlan,
    ) -> Result<(), AdoptionError> {
        let replicas = config.nats.stream.replicas;
        let bucket = KvBucket::open(nats, &registry_bucket_settings(replicas)).await?;
        let mending = RegistryMending::plan(&bucket, self.copy.as_ref(), order.is_restored, plan.end).await?;
        mending.publish(&bucket).await?;
        if let Some(missing) = &plan.missing {
            missing.publish(nats, config).await?;
        }
        let history = next_epoch(&self.found, self.known.as_ref(), plan.end)?;
        let history = with_present(nats, config, history).await?;
        put_history(nats, &history, self.found.revision, replicas).await?;
        Ok(())
    }
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
    // What the bucket of sessions gets from here on is newer than all of them, also if it has lost its newest rows.
    set_backs.iter_mut().for_each(|earlier| earlier.sessions = earlier.sessions.min(sessions));
    set_backs.push(SetBackRow { epoch, at, end, sessions });
    let streams = found.extents().map(|(name, extent)| (name.to_owned(), extent.created)).collect();
    Ok(ClusterHistory { id, epoch, streams, set_backs })
}

/// Where the log goes on, as far as records.db of this gateway knows more than what it has noted.
async fn end_of_copied(
    nats: &Nats,
    config: &Config,
    found: &HistoryFindings,
    followed: FollowedEnd,
) -> Result<u64, AdoptionError> {
    let (Some(copy), Some(log)) = (RecordCopy::in_dir(&config.data_dir), found.log()) else {
        return Ok(followed.end);
    };
    let stream = open_log_stream(nats, config).await?;
    let other = first_other(&stream, &copy, (followed.sure, log.last)).await?;
    let has_all = copy.cursor()? > log.last;
    Ok(other.unwrap_or(if has_all { log.last + 1 } else { followed.end }))
}

/// Compares this gateway's copy of the records with the log.
async fn find_missing(
    nats: &Nats,
    config: &Config,
    found: &HistoryFindings,
    known: Option<&FollowedHistory>,
    (common, live_keys): (u64, HashSet<KeyId>),
) -> Result<MissingRecords, AdoptionError> {
    let dir = &config.data_dir;
    let copy = RecordCopy::in_dir(dir).ok_or_else(|| {
        AdoptionError::Refused(anyhow::anyhow!(
            "there is no records.db in {}: run this where a gateway with the sink sqlite has its data directory",
            dir.display()
        ))
    })?;
    let stream = match found.log() {
        Some(_) => Some(open_log_stream(nats, config).await?),
        None => None,
    };
    let last = found.log().map_or(0, |log| log.last);
    let epochs =
        found.history.as_ref().map(|row| row.epoch).into_iter().chain(known.map(|known| known.epoch));
    let epoch = epochs.max().unwrap_or(0);
    MissingRecords::find(stream.as_ref(), copy, (common, last), epoch, live_keys).await
}

/// Adds the registry's bucket and the log's stream, which may just have been made.
async fn with_present(
    nats: &Nats,
    config: &Config,
    mut history: ClusterHistory,
) -> Result<ClusterHistory, AdoptionError> {
    let found = HistoryFindings::ask(nats, &all_streams(config)).await?;
    if let Some(registry) = found.registry() {
        history.streams.insert(registry_stream(), registry.created);
    }
    if let (Some((log, _)), Some(extent)) = (found.streams.first(), found.log()) {
        history.streams.insert(log.name().to_owned(), extent.created);
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
        (mending.live_keys.len(), "keys are alive then"),
    ] {
        let _ = if count > 0 { writeln!(said, "{count} {what}") } else { Ok(()) };
    }
}
