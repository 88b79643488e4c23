//! The check of a running gateway: every second, after each connection to NATS, and when the log asks for it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select_all;
use headgate_bridge_nats::{ManagedStream, Nats, StreamError};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::info;

use super::admission::{answer_doubts, answer_followed};
use super::notes::{CheckedHistory, HistoryNotes};
use super::{FollowedHistory, HistoryFindings, HistoryVerdict, judge, judge_anchor, registry_stream};
use crate::auth::Registry;
use crate::log::HistoryGate;
use crate::message::Offset;

/// How often to compare, and how soon again after no answer.
const HISTORY_CHECK_INTERVAL: Duration = Duration::from_secs(1);
const HISTORY_RETRY_PAUSE: Duration = Duration::from_millis(100);
/// How long what is being written is waited for before the gateway starts again: a disk may stand still.
const HISTORY_WRITE_WAIT_MAX: Duration = Duration::from_secs(10);

/// The watching task's state.
pub(in crate::gateway) struct HistoryWatch {
    nats: Nats,
    streams: Vec<ManagedStream>,
    gate: HistoryGate,
    dir: PathBuf,
    known: FollowedHistory,
    registry: Arc<Registry>,
    /// The first offset of the log that this gateway has not followed.
    followed: watch::Receiver<Offset>,
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
        Self { nats, streams, gate, dir, known, registry, followed, left }
    }

    /// Checks until the cluster goes on from another state. `connections` are those over which the log is appended to and
    /// followed.
    pub(in crate::gateway) async fn run(mut self, connections: Vec<Nats>) {
        let mut answering = JoinSet::new();
        answering.spawn(answer_followed(self.nats.clone(), self.known.id.clone()));
        answering.spawn(answer_doubts(self.nats.clone(), self.known.id.clone(), self.gate.clone()));
        let notes = HistoryNotes::new(self.dir.clone(), self.registry.clone(), self.known.clone());
        let (checked, noted) = watch::channel(self.checked(false));
        let writing = AbortOnDropHandle::new(tokio::spawn(notes.write(noted)));
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
                    self.gate.close(text);
                    checked.send_replace(self.checked(true));
                    continue;
                }
                Ok(_) => break,
                Err(_) => {
                    pause = HISTORY_RETRY_PAUSE;
                    continue;
                }
            }
            checked.send_replace(self.checked(false));
        }
        self.gate
            .close("the cluster goes on from another state of its log: this gateway starts again".to_owned());
        info!("the cluster goes on from another state of its log: this gateway starts again");
        // What is being written must not come over what the next start notes.
        drop(checked);
        let _ = tokio::time::timeout(HISTORY_WRITE_WAIT_MAX, writing).await;
        self.left.cancel();
    }

    fn checked(&self, is_broken: bool) -> CheckedHistory {
        CheckedHistory { known: self.known.clone(), is_broken }
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
}

fn has_changed(connections: &[watch::Receiver<u64>]) -> bool {
    connections.iter().any(|counts| counts.has_changed().unwrap_or(false))
}
