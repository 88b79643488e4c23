//! The start of a gateway: whether it may join what the servers have.

use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt;
use headgate_bridge_nats::kv::KvPut;
use headgate_bridge_nats::{KvBucket, KvError, ManagedStream, Nats, StreamError};
use rand::TryRng;
use rand::rngs::SysRng;
use tracing::{info, warn};

use super::{
    ClusterHistory, FollowedHistory, HistoryFindings, HistoryVerdict, judge, judge_all, judge_anchor,
};
use crate::auth::cluster::{HISTORY_ROW_NAME, registry_bucket_settings};
use crate::log::HistoryGate;
use crate::message::{Offset, TimeMicros};

/// Where gateways are asked which log they have followed: beside the subjects of those that are asked by name.
const FOLLOWED_SUBJECT: &str = "headgate.settle.followed";
/// Where they are asked why they do not go on with it.
const DOUBTED_SUBJECT: &str = "headgate.settle.doubted";
/// For how long each may tell: one that does go on with it may be faster than one that does not.
const DOUBT_ANSWER_WAIT: Duration = Duration::from_millis(500);
/// How long they may take to answer. Without any the servers say so at once.
const FOLLOWED_ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);

/// The history that a gateway has joined.
pub(in crate::gateway) struct AdmittedHistory {
    pub(in crate::gateway) cluster: ClusterHistory,
    /// The first offset that was given anew since this gateway was last there.
    pub(in crate::gateway) set_back_to: Option<Offset>,
    /// When the newest message was stored that this gateway has followed; `None` if it has followed none.
    pub(in crate::gateway) followed_at: Option<TimeMicros>,
    /// What was admitted: what is there at the end of the start has to go on from that.
    seen: FollowedHistory,
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
    /// It is no longer what was admitted: what was opened since then may be of a history that has ended. Begin anew.
    #[error("the cluster's history has become another one while this gateway joined it")]
    Overtaken,
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
        let mut verdict = judge_all(nats, &found, known.as_ref(), dir).await?;
        // One that was never there, or not for long, cannot know what others have followed.
        if verdict == HistoryVerdict::Same
            && let Some(history) = &found.history
            && let Some(text) = doubted_elsewhere(nats, &history.id).await
        {
            verdict =
                HistoryVerdict::Broken(format!("a gateway that runs has followed more than this: {text}"));
        }
        match (verdict, found.history.clone()) {
            (HistoryVerdict::Same | HistoryVerdict::Adopted, Some(cluster)) => {
                let set_back_to = known.as_ref().and_then(|known| cluster.of_log().end_since(known.epoch));
                let log = found.streams.first().and_then(|(log, _)| known.as_ref()?.streams.get(log.name()));
                let followed_at = log.map(|log| log.last_at / 1_000);
                let mut seen = FollowedHistory::of(&cluster, &found);
                seen.anchors = known.map_or_else(Default::default, |known| known.anchors);
                if let Some(end) = set_back_to {
                    seen.anchors = seen.anchors.below(end);
                }
                Ok(Self { cluster, set_back_to, followed_at, seen })
            }
            (HistoryVerdict::Broken(text), _) => Err(AdmissionError::Undecided(text)),
            _ => {
                let cluster = begin(nats, &found, replicas).await?;
                let seen = FollowedHistory::of(&cluster, &found);
                Ok(Self { cluster, set_back_to: None, followed_at: None, seen })
            }
        }
    }

    /// Completes it, once every stream and bucket is there: judges again, notes when each was created, and marks those that
    /// are not marked. Returns what the gateway follows from now on. `log_end` is where its log ends by now.
    ///
    /// # Errors
    /// [`AdmissionError`]; [`AdmissionError::Overtaken`] if what is there does not go on from what was admitted.
    pub(in crate::gateway) async fn complete(
        &self,
        nats: &Nats,
        streams: &[ManagedStream],
        replicas: usize,
        log_end: Offset,
    ) -> Result<FollowedHistory, AdmissionError> {
        let found = HistoryFindings::ask(nats, streams).await?;
        let is_same = judge(&found, Some(&self.seen)) == HistoryVerdict::Same
            && judge_anchor(nats, &found, &self.seen).await?.is_none();
        let ends_at = found.log().map_or(0, |log| log.last + 1);
        if !is_same || ends_at < log_end {
            return Err(AdmissionError::Overtaken);
        }
        let Some(mut cluster) = found.history.clone() else { return Err(AdmissionError::Overtaken) };
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
        let mut known = self.seen.clone();
        known.go_on(&found);
        Ok(known)
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
    let asked = nats.client().request(FOLLOWED_SUBJECT, Default::default());
    let answer = tokio::time::timeout(FOLLOWED_ANSWER_WAIT_MAX, asked).await.ok()?.ok()?;
    Some(String::from_utf8_lossy(&answer.payload).into_owned()).filter(|id| !id.is_empty())
}

/// Why a gateway that runs, and has followed the log of this identity, does not go on with it, if one does not.
async fn doubted_elsewhere(nats: &Nats, id: &str) -> Option<String> {
    let (client, inbox) = (nats.client(), nats.client().new_inbox());
    let mut answers = client.subscribe(inbox.clone()).await.ok()?;
    client.publish_with_reply(DOUBTED_SUBJECT, inbox, id.to_owned().into()).await.ok()?;
    let first_doubt = async {
        loop {
            // A status says that nobody listens.
            let answer = answers.next().await.filter(|answer| answer.status.is_none())?;
            if !answer.payload.is_empty() {
                return Some(String::from_utf8_lossy(&answer.payload).into_owned());
            }
        }
    };
    tokio::time::timeout(DOUBT_ANSWER_WAIT, first_doubt).await.ok().flatten()
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

/// Tells whoever asks why this gateway does not go on with the log, until the connection is closed for good. The answer of one
/// that does go on is empty.
pub(super) async fn answer_doubts(nats: Nats, id: String, gate: HistoryGate) {
    let Ok(mut asked) = nats.client().subscribe(DOUBTED_SUBJECT).await else { return };
    while let Some(question) = asked.next().await {
        let doubt = gate.doubt().filter(|_| question.payload == id.as_bytes());
        if let Some(reply) = question.reply {
            let _ = nats.client().publish(reply, doubt.unwrap_or_default().into()).await;
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
