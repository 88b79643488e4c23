//! Intake: every front hands its messages to it, and there is no other way into the log.
//!
//! A front gathers the messages of one read in a [`Draft`], which checks each against the grant of its
//! key as it is added. [`Intake::admit`] waits until there is room, hands the draft to the log, and
//! returns an [`AdmittedDraft`], which resolves when the log has made it durable: only then may a front
//! acknowledge. The front may go on reading meanwhile.

mod admitted;
mod draft;
mod incoming;
#[cfg(test)]
mod model;
mod payer;
mod payload_checks;
mod question;
mod refusal;
mod superseded;
#[cfg(test)]
mod tests;

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TrackedFuture;
use tracing::{info, warn};

use crate::auth::setting::JsonSetting;
use crate::auth::{Authorizer, Grant, GrantDenial, Key};
use crate::config;
use crate::limits::{RETRY_AFTER, REVOCATION_WAIT_MAX, SLOW_IN_FLIGHT_BYTES_MAX, SLOW_SECTION_BYTES};
use crate::log::{AppendError, FencedMessage, Log, SectionOutcome};
use crate::memory::{MemoryAccount, MemoryBudget};
use crate::message::{DatasourceId, Transport, now_micros};
use crate::observe::cause::Cause;
use crate::observe::metrics::Metrics;
use crate::observe::refusals::{RefusalNote, Refusals};
use crate::observe::spans::DraftSpans;
use crate::processor::{DiskTurn, ProcessorTime, pauses_after_large};
use crate::quota::{Limit, LimitExceeded, LimitOwner, LimitPolicy, LimitSetting, Meters, Quota, QuotaLimits};
use crate::retained_topics::{RetainedFull, RetainedTopics};
use crate::shares::{ShareCount, ShareExceeded, TenantShare};

use admitted::{DraftInFlight, DraftRoom, SectionCounts};
use payer::DraftPayer;

pub use admitted::{AdmittedDraft, DurableDraft, DurableOffsets, PendingRelease};
pub use draft::{Draft, MESSAGE_ID_PROPERTY, QuarantinedMessage, RedriveOutcome};
pub use incoming::{Exchange, IncomingMessage, check_message_id};
pub use question::AskedMessage;
pub use refusal::{IdConflict, Refusal};

/// How often a gateway that was cut off from its cluster checks whether it has caught up.
const CATCH_UP_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The one way into the log. Cheap to clone.
#[derive(Clone)]
pub struct Intake(Arc<IntakeInner>);

/// Ends connections of dead keys outside this process: those of NATS clients, which a nats-server holds.
/// Resolves when they are gone, or cannot be ended now.
pub type RemoteConnectionCloser =
    Box<dyn Fn(&[Arc<Key>]) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

struct IntakeInner {
    authorizer: Authorizer,
    log: Arc<dyn Log>,
    refusals: Arc<Refusals>,
    metrics: Arc<Metrics>,
    limits: config::IntakeConfig,
    /// What clients make the gateway hold.
    memory: MemoryBudget,
    /// What their tasks take of the processors.
    processor: ProcessorTime,
    /// A permit for each byte that may be on its way into the log.
    room: Arc<Semaphore>,
    /// Drafts on their way into the log for which nobody waits any more, and what else a drain waits for
    /// ([`Intake::track`]).
    unattended: TaskTracker,
    /// Closes connections of dead keys that are not in the registry, such as those to a NATS server.
    closer: OnceLock<RemoteConnectionCloser>,
    /// The topics with a retained message, once there is a consumer of them.
    retained: OnceLock<Arc<RetainedTopics>>,
}

impl Intake {
    /// An intake that appends to `log`.
    pub fn new(
        authorizer: Authorizer,
        log: Arc<dyn Log>,
        metrics: Arc<Metrics>,
        limits: &config::IntakeConfig,
    ) -> Self {
        let room = Arc::new(Semaphore::new(limits.in_flight_bytes_max));
        let memory = MemoryBudget::new(limits.memory_bytes_max, limits.memory_share_bytes_max);
        let registry = authorizer.registry().clone();
        let refusals = Arc::new(Refusals::new(metrics.clone(), {
            let registry = registry.clone();
            move |id| registry.count_refused(id)
        }));
        let (closer, retained) = (OnceLock::new(), OnceLock::new());
        log.listen_fenced({
            let refusals = refusals.clone();
            Box::new(move |FencedMessage { datasource, key_id, transport, received_at }| {
                // A datasource that was made since has the name, and nothing to do with it.
                let is_younger = registry.with_datasource(datasource, |of| of.created_at > received_at);
                let datasource = if is_younger == Some(true) { "" } else { datasource };
                let words = "it reached the cluster's log behind the end of its key, and is no record";
                let note = RefusalNote::new(transport, Cause::Fenced, &words);
                refusals.note(RefusalNote { datasource, key_id: Some(key_id), ..note });
            })
        });
        Self(Arc::new(IntakeInner {
            authorizer,
            log,
            refusals,
            metrics,
            limits: limits.clone(),
            memory,
            processor: ProcessorTime::new(),
            room,
            unattended: TaskTracker::new(),
            closer,
            retained,
        }))
    }

    /// Where every refusal is reported.
    pub fn refusals(&self) -> &Arc<Refusals> {
        &self.0.refusals
    }

    /// The authorizer.
    pub fn authorizer(&self) -> &Authorizer {
        &self.0.authorizer
    }

    /// The metrics.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.0.metrics
    }

    /// The memory that clients take: fronts charge what they read and what they answer.
    pub fn memory(&self) -> &MemoryBudget {
        &self.0.memory
    }

    /// The processor time of clients: fronts serve each in a [`FairTask`](crate::processor::FairTask).
    pub fn processor(&self) -> &ProcessorTime {
        &self.0.processor
    }

    /// The account of a grant's key in that memory.
    pub fn memory_account(&self, grant: &Grant) -> Arc<MemoryAccount> {
        self.0.memory.account_of_key(grant.key_id(), grant.datasource())
    }

    /// The configured limits on messages.
    pub fn limits(&self) -> &config::IntakeConfig {
        &self.0.limits
    }

    /// An empty draft for messages received at one moment: one read of a socket, or one request.
    /// `publisher` is a hash of the client that sent them, or 0 if it is not known.
    pub fn draft(&self, transport: Transport, publisher: u64) -> Draft {
        let intake = self.clone();
        let received_at = now_micros();
        Draft {
            intake,
            transport,
            publisher,
            received_at,
            message_id: None,
            ends_failed_exchanges: false,
            all_or_none: false,
            checks: None,
            client: None,
            sections: Vec::new(),
            keys: Vec::new(),
            refusals: Vec::new(),
            only_asks: false,
            paid: 0,
            over: None,
            quota: None,
            payers: Vec::new(),
            spans: DraftSpans::begin(),
        }
    }

    /// Waits until a message that is held back may go on, for `intake.hold_back_ms_max` at most. `true`:
    /// it was charged to its rates already, see [`Draft::mark_paid`].
    ///
    /// # Errors
    /// [`Refusal::Limited`] if that takes too long.
    pub async fn wait_turn(&self, limited: LimitExceeded) -> Result<bool, Refusal> {
        self.0.metrics.held_back.increment(1);
        let patience = Duration::from_millis(self.0.limits.hold_back_ms_max);
        Ok(limited.wait_turn(patience).await?)
    }

    /// The quota for messages of the key in the datasource; `None` when neither is limited.
    fn quota(&self, grant: &Grant, datasource: &DatasourceId) -> Option<Quota> {
        let key = grant.key();
        let of_key = meters(&key.limits, || LimitOwner::Key(key.id));
        let registry = self.0.authorizer.registry();
        let of_datasource = registry.with_datasource(datasource.as_str(), |datasource| {
            meters(&datasource.limits, || LimitOwner::Datasource(datasource.id.clone()))
        });
        Quota::new(of_key, of_datasource.flatten())
    }

    /// Checks the connection limits of the key and of its datasource, after a connection was entered.
    /// Connections of keys for all datasources count for no datasource.
    ///
    /// # Errors
    /// [`Refusal::Limited`].
    pub fn check_connections(&self, grant: &Grant) -> Result<(), Refusal> {
        let Some(quota) = self.quota(grant, grant.datasource()) else { return Ok(()) };
        let of_key = || grant.key().connection_count();
        let of_datasource = || {
            let keys = self.0.authorizer.registry().keys(grant.datasource());
            keys.iter().map(|key| key.connection_count()).sum()
        };
        Ok(quota.check_connections(of_key, of_datasource)?)
    }

    /// How far a count of a datasource, or of the keys for all (`*`), may go: [`Limit::default_max`] where an
    /// operator has set nothing.
    pub fn count_limit(&self, datasource: &DatasourceId, limit: Limit) -> LimitSetting {
        let registry = self.0.authorizer.registry();
        let of_datasource = registry.with_datasource(datasource.as_str(), |datasource| {
            let meters = meters(&datasource.limits, || LimitOwner::Datasource(datasource.id.clone()))?;
            meters.limits().get_or_default(limit)
        });
        let by_default = || QuotaLimits::default().get_or_default(limit);
        let none = LimitSetting { max: u64::MAX, burst: u64::MAX, policy: LimitPolicy::Reject };
        of_datasource.flatten().or_else(by_default).unwrap_or(none)
    }

    /// Brings the maxima of a tenant's share up to its present limits.
    pub fn limit_share(&self, datasource: &DatasourceId, share: &TenantShare) {
        for what in ShareCount::ALL {
            if let Some(limit) = limit_of_count(what) {
                share.set_max(what, self.count_limit(datasource, limit).max);
            }
        }
    }

    /// The refusal of what a tenant's share has no room for.
    pub fn share_refusal(&self, datasource: &DatasourceId, exceeded: ShareExceeded) -> Refusal {
        let limit = limit_of_count(exceeded.0).unwrap_or(Limit::SubscriptionBytes);
        LimitExceeded::of_count(limit, self.count_limit(datasource, limit), datasource).into()
    }

    /// Hands a draft to the log as soon as there is room for it. While there is none, MQTT clients are
    /// held back; the others wait for a second at most, unless it is their own tenant in the slow lane that is in their way,
    /// and are then told when to come again.
    ///
    /// # Errors
    /// [`Refusal::Busy`] if there is no room for `intake.hold_back_ms_max`; [`AppendError::Away`] if this
    /// gateway has been without its cluster for too long to know which keys are good; [`AppendError::OtherHistory`].
    pub async fn admit(&self, draft: Draft) -> Result<AdmittedDraft, Refusal> {
        let draft = match self.try_admit(draft) {
            Ok(admitted) => return Ok(admitted),
            Err(draft) => *draft,
        };
        // Behind messages of its own tenant everybody waits as long: they are what is in the way.
        let waits_for_own = self.log_turns(&draft).is_some();
        let transport = if waits_for_own { Transport::Mqtt } else { draft.transport };
        let patience = self.hold_back(transport).max(Duration::from_secs(1));
        let until = tokio::time::Instant::now() + patience;
        while self.may_be_behind() {
            if tokio::time::Instant::now() >= until {
                if self.0.log.is_in_doubt() {
                    let unchecked =
                        || "whether it is still the one that was followed is being checked".to_owned();
                    let doubt = self.0.log.doubt().unwrap_or_else(unchecked);
                    return Err(AppendError::OtherHistory(doubt.into()).into());
                }
                let text = "this gateway has lost NATS and may not know yet which keys are dead";
                return Err(AppendError::Away(text.into()).into());
            }
            tokio::time::sleep(CATCH_UP_POLL_INTERVAL).await;
        }
        match tokio::time::timeout_at(until, self.wait_room(&draft)).await {
            Ok(Ok(room)) => Ok(self.append(draft, room)),
            Ok(Err(_)) => Err(AppendError::Closed.into()),
            Err(_) => Err(self.busy_refusal()),
        }
    }

    /// Whether a key may have died without this gateway knowing it yet, or the log may be another one.
    fn may_be_behind(&self) -> bool {
        self.0.authorizer.registry().may_be_behind() || self.0.log.is_in_doubt()
    }

    /// Hands a draft to the log if there is room for it now, and gives it back if there is not.
    pub fn try_admit(&self, draft: Draft) -> Result<AdmittedDraft, Box<Draft>> {
        if self.may_be_behind() {
            return Err(Box::new(draft));
        }
        match self.try_room(&draft) {
            Some(room) => Ok(self.append(draft, room)),
            None => Err(Box::new(draft)),
        }
    }

    fn try_room(&self, draft: &Draft) -> Option<DraftRoom> {
        let permits = self.permits(draft);
        let _of_tenant = match self.log_turns(draft) {
            Some(turns) => Some(turns.try_acquire_many_owned(slow_permits(draft, permits)).ok()?),
            None => None,
        };
        let _of_all = self.0.room.clone().try_acquire_many_owned(permits).ok()?;
        Some(DraftRoom { _of_all, _of_tenant: self.disk_turn(_of_tenant, permits) })
    }

    /// Waits for room: first behind the messages of the same tenant, if that is in the slow lane, then behind everybody's.
    async fn wait_room(&self, draft: &Draft) -> Result<DraftRoom, AcquireError> {
        let permits = self.permits(draft);
        let _of_tenant = match self.log_turns(draft) {
            Some(turns) => Some(turns.acquire_many_owned(slow_permits(draft, permits)).await?),
            None => None,
        };
        let _of_all = self.0.room.clone().acquire_many_owned(permits).await?;
        Ok(DraftRoom { _of_all, _of_tenant: self.disk_turn(_of_tenant, permits) })
    }

    /// The turn of a tenant in the slow lane for a draft that needs so many permits of all.
    fn disk_turn(&self, of_tenant: Option<OwnedSemaphorePermit>, permits: u32) -> Option<DiskTurn> {
        let is_large = permits as usize > SLOW_IN_FLIGHT_BYTES_MAX;
        let pauses = if is_large { pauses_after_large(permits as usize) } else { 0 };
        Some(self.0.processor.disk_turn(of_tenant?, pauses))
    }

    /// What the draft's tenant has to wait for in the slow lane. `None` over NATS: a draft has the messages of many
    /// tenants there, and the next draft waits for it.
    fn log_turns(&self, draft: &Draft) -> Option<Arc<Semaphore>> {
        if draft.transport == Transport::Nats {
            return None;
        }
        self.0.processor.log_turns(draft.keys.first()?)
    }

    fn append(&self, mut draft: Draft, room: DraftRoom) -> AdmittedDraft {
        let started = Instant::now();
        draft.payers.iter_mut().for_each(DraftPayer::trim);
        let sections = draft.sections.iter().zip(&draft.keys);
        let records = sections.map(|(section, key)| SectionCounts::from_section(section, key)).collect();
        // Here, so that the log's writer need not compute it.
        draft.sections.iter_mut().for_each(|section| _ = section.content_digest());
        let give_up_at = started + self.hold_back(draft.transport);
        draft.spans.note_admitted();
        let committed = self.0.log.append(draft.sections, give_up_at);
        AdmittedDraft::new(DraftInFlight {
            committed,
            started,
            records,
            keys: draft.keys,
            asked: draft.refusals,
            client: draft.client,
            received_at: draft.received_at,
            transport: draft.transport,
            intake: draft.intake,
            spans: draft.spans,
            _payers: draft.payers,
            front_charge: None,
            _room: room,
        })
    }

    /// Has a draft wait for the log's answer as a task of its own: whoever waited for it is gone.
    fn go_on_unattended(&self, in_flight: impl Future<Output = ()> + Send + 'static) {
        // Without a runtime the process ends, or a test.
        if let Some(runtime) = self.0.processor.lasting_runtime() {
            self.0.unattended.spawn_on(in_flight, &runtime);
        }
    }

    /// Has [`Intake::settle_unattended`] wait for this as well: it admits drafts, and goes on without its client.
    pub fn track<F: Future>(&self, work: F) -> TrackedFuture<F> {
        self.0.unattended.track_future(work)
    }

    /// Returns when every draft whose client did not wait for the answer is counted. Call it once no draft is admitted any
    /// more and the log has answered all, which [`Log::close`] does.
    pub async fn settle_unattended(&self) {
        self.0.unattended.close();
        self.0.unattended.wait().await;
    }

    /// Releases QoS 2 exchanges. Once it resolves `Ok`, the release is durable, and a message that opens
    /// one of them again is a new message. The client is held back meanwhile, as in [`Intake::admit`].
    pub fn release(&self, exchanges: &[Exchange]) -> PendingRelease {
        let ids = exchanges.iter().map(|exchange| exchange.once_id()).collect();
        let committed = self.0.log.release(ids, Instant::now() + self.hold_back(Transport::Mqtt));
        PendingRelease::new(committed, self.clone())
    }

    /// The permits for a draft. One that is larger than all the room takes every permit and goes alone.
    fn permits(&self, draft: &Draft) -> u32 {
        u32::try_from(draft.memory_bytes().min(self.0.limits.in_flight_bytes_max)).unwrap_or(u32::MAX)
    }

    /// Admits a draft and waits until it is durable. `Ok` has the offsets of its records, which must be of
    /// one origin; `None` for a draft without messages, or one that only asks and is not known.
    ///
    /// # Errors
    /// Every transient [`Refusal`], [`GrantDenial::Revoked`] if the key died meanwhile, and [`Refusal::Conflict`]
    /// if its id belongs to other messages. The last two are counted already.
    pub async fn submit(&self, draft: Draft) -> Result<Option<DurableOffsets>, Refusal> {
        if draft.sections.iter().all(|section| section.records() == 0) {
            return Ok(None);
        }
        let accepted = self.admit(draft).await?.await?;
        match accepted.outcomes.into_iter().next() {
            Some(SectionOutcome::Kept(offsets)) => {
                Ok(Some(DurableOffsets { offsets, duplicate: false, known: false }))
            }
            Some(SectionOutcome::Duplicate(offsets)) => {
                Ok(Some(DurableOffsets { offsets, duplicate: true, known: false }))
            }
            Some(SectionOutcome::Known(offsets)) => {
                Ok(Some(DurableOffsets { offsets, duplicate: true, known: true }))
            }
            Some(SectionOutcome::Unknown) => Ok(None),
            Some(other) => Err(Refusal::from_outcome(&other).unwrap_or(GrantDenial::Revoked.into())),
            None => Err(GrantDenial::Revoked.into()),
        }
    }

    /// Sets which topics have a retained message. Call it once, before the first message.
    pub fn set_retained_topics(&self, topics: Arc<RetainedTopics>) {
        let _ = self.0.retained.set(topics);
    }

    /// Checks that a datasource may have one more retained message, and enters its topic.
    ///
    /// # Errors
    /// [`Refusal::Limited`].
    fn check_retained(&self, datasource: &DatasourceId, topic: &str, payload: usize) -> Result<(), Refusal> {
        let Some(topics) = self.0.retained.get().filter(|_| payload > 0) else { return Ok(()) };
        let [of_topics, of_bytes] =
            [Limit::RetainedTopics, Limit::RetainedBytes].map(|limit| self.count_limit(datasource, limit));
        let bytes = (topic.len() + payload) as u64;
        let entered = topics.try_enter(datasource.as_str(), topic, bytes, of_topics.max, of_bytes.max);
        entered.map_err(|full| {
            let (limit, setting) = match full {
                RetainedFull::Topics => (Limit::RetainedTopics, of_topics),
                RetainedFull::Bytes => (Limit::RetainedBytes, of_bytes),
            };
            LimitExceeded::of_count(limit, setting, datasource).into()
        })
    }

    /// Sets what closes connections of dead keys that the registry does not count. Call it once, before
    /// the first key dies.
    pub fn set_closer(&self, closer: RemoteConnectionCloser) {
        let _ = self.0.closer.set(closer);
    }

    /// Waits until nothing more can come in under these dead keys, and until their connections are closed,
    /// the latter for [`REVOCATION_WAIT_MAX`] at most. `called` is when their end was requested; the
    /// metric of revocation times counts from there.
    pub async fn settle(&self, dead: &[Arc<Key>], called: Instant) {
        let gone = async {
            // The closer comes first, because it takes longest.
            if let Some(closer) = self.0.closer.get() {
                closer(dead).await;
            }
            for key in dead {
                key.connections().wait_until_empty().await;
            }
        };
        let fenced = async {
            self.0.log.barrier().await;
            // An end that is not durable may turn out to be none: a grace that was undone elsewhere, the last admin key.
            let registry = self.0.authorizer.registry();
            let is_final = |key: &&Arc<Key>| {
                !key.holds() && registry.describe_unwritten(&key.datasource, Some(key.id)).is_none()
            };
            let ids = dead.iter().filter(is_final).map(|key| key.id).collect();
            if tokio::time::timeout(REVOCATION_WAIT_MAX, self.0.log.fence(ids)).await.is_err() {
                warn!(
                    "the end of a key is not in the log yet; what gateways that were paused still have comes in"
                );
            }
        };
        let ((), gone) = tokio::join!(fenced, tokio::time::timeout(REVOCATION_WAIT_MAX, gone));
        if gone.is_err() {
            let left: usize = dead.iter().map(|key| key.connection_count()).sum();
            warn!(left, "connections of a dead key are slow to close; nothing they send is let in");
        }
        self.0.metrics.revocation_seconds.record(called.elapsed());
        for key in dead {
            info!(key_id = %key.id, datasource = %key.datasource, "an API key is dead");
        }
    }

    /// How long a client of `transport` is held back for a transient cause.
    fn hold_back(&self, transport: Transport) -> Duration {
        match transport {
            Transport::Mqtt => Duration::from_millis(self.0.limits.hold_back_ms_max),
            Transport::Http | Transport::Nats => Duration::ZERO,
        }
    }

    /// The refusal for a draft without room, where a client cannot be held back.
    pub fn busy_refusal(&self) -> Refusal {
        Refusal::Busy { in_flight_bytes_max: self.0.limits.in_flight_bytes_max, retry_after: RETRY_AFTER }
    }
}

/// The permits of a tenant in the slow lane for a draft that needs so many of all.
fn slow_permits(draft: &Draft, permits: u32) -> u32 {
    let sections = draft.section_count().saturating_mul(SLOW_SECTION_BYTES);
    let bytes = (permits as usize).saturating_add(sections).min(SLOW_IN_FLIGHT_BYTES_MAX);
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// The limit that an operator may set for a count.
fn limit_of_count(what: ShareCount) -> Option<Limit> {
    match what {
        ShareCount::Sessions => Some(Limit::Sessions),
        ShareCount::Subscriptions => Some(Limit::Subscriptions),
        ShareCount::SubscriptionBytes => Some(Limit::SubscriptionBytes),
        ShareCount::ShareGroups => Some(Limit::ShareGroups),
        ShareCount::Inflight => Some(Limit::Inflight),
        ShareCount::StalledBytes
        | ShareCount::PlaceBytes
        | ShareCount::Replays
        | ShareCount::RefusedWillBytes => None,
    }
}

/// The meters of an owner, which are kept beside its limits; `None` if it has no limits.
pub fn meters(limits: &JsonSetting, owner: impl FnOnce() -> LimitOwner) -> Option<Arc<Meters>> {
    limits.is_set().then(|| limits.made(|text| Meters::from_text(owner(), text)))
}
