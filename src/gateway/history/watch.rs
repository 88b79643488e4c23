//! The check of a running gateway: every second, after each connection to NATS, and when the log asks for it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::select_all;
use headgate_bridge_nats::{ManagedStream, Nats, StreamError};
use tokio::sync::watch;
use tokio::task::{JoinSet, spawn_blocking};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::admission::{answer_doubts, answer_followed};
use super::{FollowedHistory, HistoryFindings, HistoryVerdict, judge, judge_anchor, registry_stream};
use crate::auth::Registry;
use crate::log::HistoryGate;
use crate::message::Offset;

/// How often to compare, and how soon again after no answer.
const HISTORY_CHECK_INTERVAL: Duration = Duration::from_secs(1);
const HISTORY_RETRY_PAUSE: Duration = Duration::from_millis(100);
/// The least time between two writes of what was followed.
const FOLLOWED_SAVE_INTERVAL_MIN: Duration = Duration::from_secs(2);
/// The copy of the registry is written again after so many times as long as that took: a large one seldom.
const REGISTRY_COPY_REST: u32 = 50;

/// The watching task's state.
pub(in crate::gateway) struct HistoryWatch {
    nats: Nats,
    streams: Vec<ManagedStream>,
    gate: HistoryGate,
    dir: PathBuf,
    known: FollowedHistory,
    saved: FollowedHistory,
    saved_at: Instant,
    registry: Arc<Registry>,
    /// The first offset of the log that this gateway has not followed.
    followed: watch::Receiver<Offset>,
    /// The revision of the registry's copy, and when the next one may be written.
    copied: (u64, Instant),
    /// Cancelled when the cluster goes on from another state, which takes a new start.
    left: CancellationToken,
}

impl HistoryWatch {
    /// Of what is followed from now on. `streams` are those of [`HistoryFindings::ask`].
    pub(in crate::gateway) fn new(
        nats: Nats,
        streams: Vec<ManagedStream>,
        gate: HistoryGate,
        dir: PathBuf,
        known: FollowedHistory,
        (registry, followed): (Arc<Registry>, watch::Receiver<Offset>),
        left: CancellationToken,
    ) -> Self {
        gate.begin();
        let now = Instant::now();
        let saved = known.clone();
        let copied = (0, now);
        Self { nats, streams, gate, dir, known, saved, saved_at: now, registry, followed, copied, left }
    }

    /// Checks until the cluster goes on from another state. `connections` are those over which the log is appended to and
    /// followed.
    pub(in crate::gateway) async fn run(mut self, connections: Vec<Nats>) {
        let mut answering = JoinSet::new();
        answering.spawn(answer_followed(self.nats.clone(), self.known.id.clone()));
        answering.spawn(answer_doubts(self.nats.clone(), self.known.id.clone(), self.gate.clone()));
        let mut connections: Vec<watch::Receiver<u64>> =
            connections.iter().chain([&self.nats]).map(Nats::connections).collect();
        let mut requests = self.gate.requests();
        let mut pause = HISTORY_CHECK_INTERVAL;
        loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = requests.changed() => {}
                _ = select_all(connections.iter_mut().map(|counts| Box::pin(counts.changed()))) => {
                    self.gate.close_until_checked();
                }
            }
            let asked = *requests.borrow_and_update();
            connections.iter_mut().for_each(watch::Receiver::mark_unchanged);
            pause = HISTORY_CHECK_INTERVAL;
            match self.check().await {
                // What was asked before the connection was another one says nothing.
                Ok(HistoryVerdict::Same) if !has_changed(&connections) => self.gate.open(asked),
                Ok(HistoryVerdict::Same) => {
                    self.gate.close_until_checked();
                    pause = Duration::ZERO;
                    continue;
                }
                Ok(HistoryVerdict::Broken(text)) => {
                    // Whoever decides has to know what this gateway knows.
                    self.save_followed().await;
                    self.save_copy().await;
                    self.gate.close(text);
                    continue;
                }
                Ok(_) => break,
                Err(_) => {
                    pause = HISTORY_RETRY_PAUSE;
                    continue;
                }
            }
            self.save().await;
        }
        self.gate
            .close("the cluster goes on from another state of its log: this gateway starts again".to_owned());
        info!("the cluster goes on from another state of its log: this gateway starts again");
        self.left.cancel();
    }

    /// Compares. What is the same is what the next check compares with.
    async fn check(&mut self) -> Result<HistoryVerdict, StreamError> {
        // Before the servers are asked: they have to have at least that.
        let (followed, seen) = (*self.followed.borrow(), self.registry.seen_revision());
        let mut found = HistoryFindings::ask(&self.nats, &self.streams).await?;
        if self.is_short(&found, followed, seen) {
            // Perhaps a new leader that has not applied everything yet.
            tokio::time::sleep(HISTORY_RETRY_PAUSE).await;
            found = HistoryFindings::ask(&self.nats, &self.streams).await?;
            if self.is_short(&found, followed, seen) {
                self.raise_known(followed, seen);
            }
        }
        let verdict = judge(&found, Some(&self.known));
        if verdict != HistoryVerdict::Same {
            return Ok(verdict);
        }
        if let Some(broken) = judge_anchor(&self.nats, &found, &self.known).await? {
            return Ok(broken);
        }
        self.known.go_on(&found);
        Ok(HistoryVerdict::Same)
    }

    /// Whether the servers have less than this gateway has had from them since the last check.
    fn is_short(&self, found: &HistoryFindings, followed: Offset, seen: u64) -> bool {
        found.log().is_some_and(|log| log.last + 1 < followed)
            || found.registry().is_some_and(|registry| registry.last < seen)
    }

    /// Notes what this gateway has had from the servers since the last check.
    fn raise_known(&mut self, followed: Offset, seen: u64) {
        if let Some(known) = self.streams.first().and_then(|log| self.known.streams.get_mut(log.name()))
            && known.last + 1 < followed
        {
            // When its last message was stored is not known.
            (known.last, known.last_at) = (followed - 1, 0);
        }
        if let Some(known) = self.known.streams.get_mut(&registry_stream()) {
            known.last = known.last.max(seen);
        }
    }

    /// Writes what was followed, if that is not what was written last.
    async fn save_followed(&mut self) {
        if self.known == self.saved {
            return;
        }
        self.saved_at = Instant::now();
        let (known, dir) = (self.known.clone(), self.dir.clone());
        let saved = spawn_blocking(move || known.save(&dir).map_err(|error| error.to_string())).await;
        match saved.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(()) => self.saved = self.known.clone(),
            Err(error) => warn!(error, "what this gateway has followed cannot be noted"),
        }
    }

    /// Writes what was followed, and the copy of the registry, as often as they may be.
    async fn save(&mut self) {
        if self.saved_at.elapsed() >= FOLLOWED_SAVE_INTERVAL_MIN {
            self.save_followed().await;
        }
        if self.copied.1 <= Instant::now() {
            self.save_copy().await;
        }
    }

    /// Writes the copy of the registry, if it has changed.
    async fn save_copy(&mut self) {
        let copied = self.copied.0;
        let (registry, dir, begun) = (self.registry.clone(), self.dir.clone(), Instant::now());
        let copying = move || {
            let revision = registry.applied_revision();
            if revision == copied {
                return Ok(copied);
            }
            let copy = registry.copy_cluster_rows().map_err(|error| error.to_string())?;
            copy.save(&dir).map_err(|error| error.to_string())?;
            Ok::<_, String>(copy.revision)
        };
        match spawn_blocking(copying).await.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(revision) => self.copied.0 = revision,
            Err(error) => warn!(error, "the copy of the cluster's registry cannot be written"),
        }
        self.copied.1 = Instant::now() + begun.elapsed() * REGISTRY_COPY_REST;
    }
}

fn has_changed(connections: &[watch::Receiver<u64>]) -> bool {
    connections.iter().any(|counts| counts.has_changed().unwrap_or(false))
}
