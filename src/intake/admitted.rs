//! An admitted draft: on its way into the log, with what is counted and answered when it is durable.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::auth::usage::KeyClient;
use crate::auth::{GrantDenial, Key, Registry};
use crate::log::{AppendError, CommitOutcome, Offsets, Section, SectionOutcome};
use crate::message::{DatasourceId, Offset, TimeMicros, Transport};
use crate::observe::metrics::Metrics;
use crate::observe::refusals::{RefusalNote, Refusals};
use crate::observe::spans::DraftSpans;
use crate::processor::DiskTurn;

use super::Refusal;
use super::payer::DraftPayer;

/// A draft on its way into the log. Resolves when it is durable, or known not to be kept.
pub struct AdmittedDraft {
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
    pub(super) registry: Arc<Registry>,
    pub(super) transport: Transport,
    pub(super) metrics: Arc<Metrics>,
    pub(super) refusals: Arc<Refusals>,
    /// The spans of its messages.
    pub(super) spans: DraftSpans,
    /// What it takes in memory, until it is durable.
    pub(super) _payers: Vec<DraftPayer>,
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
    /// Reports the use of a key to the registry, and what its datasource has sent.
    fn report_use(&self, kept: Option<KeptRun<'_>>) {
        if let Some(KeptRun { key, datasource, accepted, last_offset }) = kept {
            let (at, came_in) = (self.received_at, Some((accepted.0, last_offset)));
            self.registry.note_use(key, self.client.as_ref(), at, came_in);
            self.registry.count_traffic(key, datasource, accepted, at);
        }
    }

    /// Reports that `messages` of a key are refused, which only the log could tell.
    fn report_refusal(&self, key: &Arc<Key>, messages: u32, refusal: &Refusal) {
        self.registry.note_refusal(key);
        let client = self.client.as_deref();
        let note = RefusalNote {
            address: client.and_then(|client| client.address),
            client: client.and_then(|client| client.client_id.as_deref()).unwrap_or_default(),
            datasource: if key.datasource.is_all() { "" } else { key.datasource.as_str() },
            key_id: Some(key.id),
            ..refusal.note(self.transport)
        };
        (0..messages).for_each(|_| self.refusals.note(note));
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
        // A writer that is gone without an answer ended because the gateway is shutting down.
        let committed = ready!(Pin::new(&mut self.committed).poll(cx)).unwrap_or(Err(AppendError::Closed))?;
        self.metrics.commit_seconds.record(self.started.elapsed());
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
                    (0..n + m).for_each(|_| self.refusals.note(note));
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
        self.metrics.count_accepted(self.transport, records, bytes);
        if quarantined > 0 {
            self.metrics.count_quarantined(self.transport, quarantined);
        }
        self.metrics.count_duplicates(self.transport, duplicates);
        self.spans.note_outcomes(&committed.outcomes);
        Poll::Ready(Ok(DurableDraft { outcomes: committed.outcomes }))
    }
}

/// A release of exchanges on its way into the log. Resolves when it is durable, or known not to be.
pub struct PendingRelease(pub(super) oneshot::Receiver<Result<CommitOutcome, AppendError>>);

impl Future for PendingRelease {
    type Output = Result<(), Refusal>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        ready!(Pin::new(&mut self.0).poll(cx)).unwrap_or(Err(AppendError::Closed))?;
        Poll::Ready(Ok(()))
    }
}
