//! An admitted draft: on its way into the log, with what is counted and answered when it is durable. Its messages are in
//! the log's queue whether or not anybody waits for the answer. So a draft that is dropped before that, with the request or
//! connection that brought it, goes on as a task of its own: it keeps its room and memory until the log has answered, and
//! what it has brought is counted.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::auth::usage::KeyClient;
use crate::auth::{GrantDenial, Key};
use crate::log::{AppendError, CommitOutcome, Offsets, PendingCommit, Section, SectionOutcome};
use crate::memory::MemoryCharge;
use crate::message::{DatasourceId, Offset, TimeMicros, Transport};
use crate::observe::refusals::RefusalNote;
use crate::observe::spans::DraftSpans;
use crate::processor::DiskTurn;

use super::payer::DraftPayer;
use super::{Intake, IntakeInner, Refusal};

/// A draft on its way into the log. Resolves when it is durable, or known not to be kept.
pub struct AdmittedDraft(Option<DraftInFlight>);

/// What there is of a draft until the log has answered.
pub(super) struct DraftInFlight {
    pub(super) committed: oneshot::Receiver<Result<CommitOutcome, AppendError>>,
    pub(super) started: Instant,
    /// What each section holds.
    pub(super) records: Vec<SectionCounts>,
    /// The key of each section.
    pub(super) keys: Vec<Arc<Key>>,
    /// Why the messages of sections that only ask are refused.
    pub(super) asked: Vec<(usize, Refusal)>,
    pub(super) client: Option<Arc<KeyClient>>,
    pub(super) received_at: TimeMicros,
    pub(super) transport: Transport,
    pub(super) intake: Intake,
    /// The spans of its messages.
    pub(super) spans: DraftSpans,
    /// What it takes in memory, until it is durable.
    pub(super) _payers: Vec<DraftPayer>,
    /// What its front has charged for it, if that is gone.
    pub(super) front_charge: Option<MemoryCharge>,
    pub(super) _room: DraftRoom,
}

/// The room of a draft on its way into the log.
pub(super) struct DraftRoom {
    pub(super) _of_all: OwnedSemaphorePermit,
    /// Of its tenant, if that is in the slow lane.
    pub(super) _of_tenant: Option<DiskTurn>,
}

/// The numbers of a section that metrics count when it is durable.
pub(super) struct SectionCounts {
    /// Messages that are let in, and their payload bytes.
    accepted: (u32, u64),
    /// Messages that go into quarantine.
    quarantined: u32,
    /// The datasource, if its key does not say which.
    datasource: Option<DatasourceId>,
}

impl SectionCounts {
    pub(super) fn from_section(section: &Section, key: &Key) -> Self {
        let (quarantined, bytes) = section.quarantined();
        let accepted = (section.records() - quarantined, section.payload_bytes() - bytes);
        let datasource = key.datasource.is_all().then(|| section.datasource.clone());
        Self { accepted, quarantined, datasource }
    }
}

/// What consecutive sections of one key and datasource have brought: it is reported together.
struct KeptRun<'a> {
    key: &'a Arc<Key>,
    datasource: &'a DatasourceId,
    /// Messages that were let in, and their payload bytes.
    accepted: (u64, u64),
    last_offset: Offset,
}

impl AdmittedDraft {
    pub(super) fn new(in_flight: DraftInFlight) -> Self {
        Self(Some(in_flight))
    }

    /// Keeps what its front has charged for its memory, until it is durable: for a front that drops it.
    pub fn keep_charge(&mut self, charge: Option<MemoryCharge>) {
        if let Some(in_flight) = &mut self.0 {
            in_flight.front_charge = charge;
        }
    }
}

impl DraftInFlight {
    /// Reports the use of a key to the registry, and what its datasource has sent.
    fn report_use(&self, kept: Option<KeptRun<'_>>) {
        if let Some(KeptRun { key, datasource, accepted, last_offset }) = kept {
            let (at, came_in) = (self.received_at, Some((accepted.0, last_offset)));
            let registry = self.intake.0.authorizer.registry();
            registry.note_use(key, self.client.as_ref(), at, came_in);
            registry.count_traffic(key, datasource, accepted, at);
        }
    }

    /// Reports that `messages` of a key are refused, which only the log could tell.
    fn report_refusal(&self, key: &Arc<Key>, messages: u32, refusal: &Refusal) {
        self.intake.0.authorizer.registry().note_refusal(key);
        let client = self.client.as_deref();
        let note = RefusalNote {
            address: client.and_then(|client| client.address),
            client: client.and_then(|client| client.client_id.as_deref()).unwrap_or_default(),
            datasource: if key.datasource.is_all() { "" } else { key.datasource.as_str() },
            key_id: Some(key.id),
            ..refusal.note(self.transport)
        };
        (0..messages).for_each(|_| self.intake.0.refusals.note(note));
    }
}

/// A draft that is durable.
pub struct DurableDraft {
    /// The outcome for each origin.
    pub outcomes: Vec<SectionOutcome>,
}

/// The offsets of a durable draft of one origin.
pub struct DurableOffsets {
    /// Offsets of its records, or of those that were kept before under its id.
    pub offsets: Offsets,
    /// Whether these were kept before.
    pub duplicate: bool,
    /// Whether they were let in before, although the draft would be refused now.
    pub known: bool,
}

impl Future for AdmittedDraft {
    type Output = Result<DurableDraft, Refusal>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let in_flight = self.0.as_mut().expect("a future is not polled again once it has resolved");
        let resolved = ready!(Pin::new(in_flight).poll(cx));
        self.0 = None;
        Poll::Ready(resolved)
    }
}

impl Drop for AdmittedDraft {
    fn drop(&mut self) {
        let Some(mut in_flight) = self.0.take() else { return };
        if Pin::new(&mut in_flight).poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            let intake = in_flight.intake.clone();
            intake.go_on_unattended(async move { drop(in_flight.await) });
        }
    }
}

impl Future for DraftInFlight {
    type Output = Result<DurableDraft, Refusal>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // A writer that is gone without an answer ended because the gateway is shutting down.
        let committed = ready!(Pin::new(&mut self.committed).poll(cx)).unwrap_or(Err(AppendError::Closed))?;
        let IntakeInner { metrics, refusals, .. } = &*self.intake.0;
        metrics.commit_seconds.record(self.started.elapsed());
        let (mut records, mut bytes, mut duplicates, mut quarantined) = (0, 0, 0, 0);
        let mut kept: Option<KeptRun<'_>> = None;
        let sections = self.records.iter().zip(&self.keys).zip(&committed.outcomes);
        for (origin, ((counts, key), outcome)) in sections.enumerate() {
            let SectionCounts { accepted: (n, payload_bytes), quarantined: m, datasource } = counts;
            match outcome {
                SectionOutcome::Kept(offsets) => {
                    records += u64::from(*n);
                    bytes += payload_bytes;
                    quarantined += u64::from(*m);
                    let datasource = datasource.as_ref().unwrap_or(&key.datasource);
                    let same = |run: &KeptRun<'_>| Arc::ptr_eq(run.key, key) && run.datasource == datasource;
                    if !kept.as_ref().is_some_and(same) {
                        let last_offset = offsets.last();
                        let begun = KeptRun { key, datasource, accepted: (0, 0), last_offset };
                        self.report_use(kept.replace(begun));
                    }
                    if let Some(run) = &mut kept {
                        run.accepted = (run.accepted.0 + u64::from(*n), run.accepted.1 + payload_bytes);
                        run.last_offset = offsets.last();
                    }
                }
                SectionOutcome::Duplicate(_) | SectionOutcome::Known(_) => duplicates += u64::from(n + m),
                SectionOutcome::KeyDead => {
                    let note =
                        RefusalNote::new(self.transport, GrantDenial::Revoked.cause(), &GrantDenial::Revoked);
                    (0..n + m).for_each(|_| refusals.note(note));
                }
                other => {
                    let asked = self.asked.iter().find(|(asked, _)| *asked == origin);
                    let refusal = asked.map(|(_, refusal)| refusal.clone());
                    if let Some(refusal) = refusal.or_else(|| Refusal::from_outcome(other)) {
                        self.report_refusal(key, n + m, &refusal);
                    }
                }
            }
        }
        self.report_use(kept);
        metrics.count_accepted(self.transport, records, bytes);
        if quarantined > 0 {
            metrics.count_quarantined(self.transport, quarantined);
        }
        metrics.count_duplicates(self.transport, duplicates);
        self.spans.note_outcomes(&committed.outcomes);
        Poll::Ready(Ok(DurableDraft { outcomes: committed.outcomes }))
    }
}

/// A release of exchanges on its way into the log. Resolves when it is durable, or known not to be.
pub struct PendingRelease {
    /// `None` once the log has answered.
    committed: Option<PendingCommit>,
    intake: Intake,
    /// What its front has charged for it, if that is gone.
    front_charge: Option<MemoryCharge>,
}

impl PendingRelease {
    pub(super) fn new(committed: PendingCommit, intake: Intake) -> Self {
        Self { committed: Some(committed), intake, front_charge: None }
    }

    /// As [`AdmittedDraft::keep_charge`].
    pub fn keep_charge(&mut self, charge: Option<MemoryCharge>) {
        self.front_charge = charge;
    }
}

impl Drop for PendingRelease {
    fn drop(&mut self) {
        if let (Some(committed), Some(charge)) = (self.committed.take(), self.front_charge.take()) {
            self.intake.go_on_unattended(async move {
                // Whatever the log says, it has them no more.
                let _ = committed.await;
                drop(charge);
            });
        }
    }
}

impl Future for PendingRelease {
    type Output = Result<(), Refusal>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let committed = self.committed.as_mut().expect("a future is not polled again once it has resolved");
        let answered = ready!(Pin::new(committed).poll(cx));
        self.committed = None;
        answered.unwrap_or(Err(AppendError::Closed))?;
        Poll::Ready(Ok(()))
    }
}
