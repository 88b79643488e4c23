//! The start of a gateway: whether it may join what the servers have.

use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt;
use headgate_bridge_nats::kv::KvPut;
use headgate_bridge_nats::{KvBucket, KvError, ManagedStream, Nats, StreamError};
use rand::TryRng;
use rand::rngs::SysRng;
use tracing::{info, warn};

use super::{ClusterHistory, FollowedHistory, HistoryFindings, HistoryVerdict, judge, judge_anchor};
use crate::auth::cluster::{HISTORY_ROW_NAME, registry_bucket_settings};
use crate::message::{Offset, TimeMicros};

/// Where gateways are asked which log they have followed: beside the subjects of those that are asked by name.
const FOLLOWED_SUBJECT: &str = "headgate.settle.followed";
/// How long they may take to answer. Without any the servers say so at once.
const FOLLOWED_ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);

/// The history that a gateway has joined.
pub(in crate::gateway) struct AdmittedHistory {
    pub(in crate::gateway) cluster: ClusterHistory,
    /// The first offset that was given anew since this gateway was last there.
    pub(in crate::gateway) set_back_to: Option<Offset>,
    /// When the newest message was stored that this gateway has followed; `None` if it has followed none.
    pub(in crate::gateway) followed_at: Option<TimeMicros>,
}

/// Why it may not join now.
#[derive(Debug, thiserror::Error)]
pub(in crate::gateway) enum AdmissionError {
    /// NATS is away, or another gateway was first: try again.
    #[error("{0}")]
    Away(String),
    /// It is not what was followed, and nobody has decided yet.
    #[error("{0}")]
    Undecided(String),
    /// Trying again does not help.
    #[error("{0}")]
    Failed(String),
}

impl From<StreamError> for AdmissionError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Away(text) => Self::Away(text),
            error => Self::Failed(error.to_string()),
        }
    }
}

impl From<KvError> for AdmissionError {
    fn from(error: KvError) -> Self {
        match error {
            KvError::Away(text) => Self::Away(text),
            KvError::Conflict => Self::Away("another gateway is joining".to_owned()),
            error => Self::Failed(error.to_string()),
        }
    }
}

impl AdmittedHistory {
    /// Compares what the servers have with what the gateway in `dir` has followed. A new cluster gets its identity here.
    ///
    /// # Errors
    /// [`AdmissionError`].
    pub(in crate::gateway) async fn ask(
        nats: &Nats,
        streams: &[ManagedStream],
        replicas: usize,
        dir: &Path,
    ) -> Result<Self, AdmissionError> {
        let known = FollowedHistory::load(dir).map_err(|error| {
            AdmissionError::Failed(format!("{}/{}: {error}", dir.display(), super::HISTORY_FILE_NAME))
        })?;
        let found = HistoryFindings::ask(nats, streams).await?;
        let mut verdict = judge(&found, known.as_ref());
        if verdict == HistoryVerdict::Same
            && let Some(known) = &known
            && let Some(broken) = judge_anchor(nats, &found, known).await?
        {
            verdict = broken;
        }
        match (verdict, found.history.clone()) {
            (HistoryVerdict::Same | HistoryVerdict::Adopted, Some(cluster)) => {
                let set_back_to = known.as_ref().and_then(|known| cluster.of_log().end_since(known.epoch));
                let log = found.streams.first().and_then(|(log, _)| known.as_ref()?.streams.get(log.name()));
                let followed_at = log.map(|log| log.last_at / 1_000);
                Ok(Self { cluster, set_back_to, followed_at })
            }
            (HistoryVerdict::Broken(text), _) => Err(AdmissionError::Undecided(text)),
            _ => {
                let cluster = begin(nats, &found, replicas).await?;
                Ok(Self { cluster, set_back_to: None, followed_at: None })
            }
        }
    }

    /// Completes it, once every stream and bucket is there: notes when each was created, and marks those that are not
    /// marked. Returns what the gateway follows from now on.
    ///
    /// # Errors
    /// [`AdmissionError`].
    pub(in crate::gateway) async fn complete(
        &self,
        nats: &Nats,
        streams: &[ManagedStream],
        replicas: usize,
    ) -> Result<FollowedHistory, AdmissionError> {
        let found = HistoryFindings::ask(nats, streams).await?;
        if let Some(now) = &found.history
            && (now.epoch > self.cluster.epoch || now.id != self.cluster.id)
        {
            return Err(AdmissionError::Failed(
                "the cluster goes on from another state of its log since this start began: start again"
                    .to_owned(),
            ));
        }
        let Some(mut cluster) = found.history.clone().filter(|history| history.epoch == self.cluster.epoch)
        else {
            return Err(AdmissionError::Away("the cluster's history is being changed".to_owned()));
        };
        let before = cluster.clone();
        for (name, extent) in found.extents() {
            cluster.streams.entry(name.to_owned()).or_insert(extent.created);
        }
        if cluster != before {
            put_history(nats, &cluster, found.revision, replicas).await?;
        }
        let mark = cluster.mark();
        for (stream, report) in &found.streams {
            let Some(report) = report else {
                return Err(AdmissionError::Away(format!("{stream} is not there yet")));
            };
            if report.mark().as_ref() != Some(&mark)
                && let Err(error) = stream.set_mark(nats, report, &mark).await
            {
                warn!(%error, "a stream or bucket cannot be marked as that of this log");
            }
        }
        Ok(FollowedHistory::of(&cluster, &found))
    }
}

/// Gives a cluster its identity, over what is there. A gateway that runs, and has followed another one, objects.
async fn begin(
    nats: &Nats,
    found: &HistoryFindings,
    replicas: usize,
) -> Result<ClusterHistory, AdmissionError> {
    if let Some(id) = followed_elsewhere(nats).await {
        return Err(AdmissionError::Undecided(format!(
            "there is no cluster on these servers, and a gateway that runs has followed one, whose log has the identity {id}: \
             look there what is to be decided (/readyz)"
        )));
    }
    let streams = found.extents().map(|(name, extent)| (name.to_owned(), extent.created)).collect();
    let cluster = ClusterHistory { id: new_identity()?, epoch: 1, streams, set_backs: Vec::new() };
    put_history(nats, &cluster, found.revision, replicas).await?;
    info!(id = cluster.id, "the cluster's log has its identity");
    Ok(cluster)
}

/// The identity of the log that a gateway on these servers has followed; `None` if there is none.
async fn followed_elsewhere(nats: &Nats) -> Option<String> {
    let asked = nats.client().request(FOLLOWED_SUBJECT, Vec::new().into());
    let answer = tokio::time::timeout(FOLLOWED_ANSWER_WAIT_MAX, asked).await.ok()?.ok()?;
    Some(String::from_utf8_lossy(&answer.payload).into_owned()).filter(|id| !id.is_empty())
}

/// Tells whoever asks the identity of the log that this gateway has followed, until the connection is closed for good.
pub(super) async fn answer_followed(nats: Nats, id: String) {
    let Ok(mut asked) = nats.client().subscribe(FOLLOWED_SUBJECT).await else { return };
    while let Some(question) = asked.next().await {
        if let Some(reply) = question.reply {
            let _ = nats.client().publish(reply, id.clone().into()).await;
        }
    }
}

/// 128 random bits.
pub(super) fn new_identity() -> Result<String, AdmissionError> {
    let mut random = [0; 16];
    SysRng.try_fill_bytes(&mut random).map_err(|error| {
        AdmissionError::Failed(format!("the operating system's random generator: {error}"))
    })?;
    Ok(format!("{:032x}", u128::from_be_bytes(random)))
}

/// Writes the row over the revision that it had.
pub(super) async fn put_history(
    nats: &Nats,
    history: &ClusterHistory,
    revision: u64,
    replicas: usize,
) -> Result<(), AdmissionError> {
    let bucket = KvBucket::open(nats, &registry_bucket_settings(replicas)).await?;
    let value = serde_json::to_vec(history).map_err(|error| AdmissionError::Failed(error.to_string()))?;
    let put = KvPut { key: HISTORY_ROW_NAME.to_owned(), value: Some(value.into()), expected: Some(revision) };
    bucket.put_all(&[put], None).await?;
    Ok(())
}
