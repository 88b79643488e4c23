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
mod question;
mod refusal;
mod superseded;

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::{AcquireError, Semaphore};
use tracing::{info, warn};

use crate::auth::setting::JsonSetting;
use crate::auth::{Authorizer, Grant, GrantDenial, Key};
use crate::config;
use crate::limits::{RETRY_AFTER, REVOCATION_WAIT_MAX, SLOW_IN_FLIGHT_BYTES_MAX};
use crate::log::{AppendError, Log, SectionOutcome};
use crate::memory::{MemoryAccount, MemoryBudget};
use crate::message::{DatasourceId, Transport, now_micros};
use crate::observe::metrics::Metrics;
use crate::observe::refusals::Refusals;
use crate::processor::ProcessorTime;
use crate::quota::{Limit, LimitExceeded, LimitOwner, LimitPolicy, LimitSetting, Meters, Quota, QuotaLimits};
use crate::retained_topics::{RetainedFull, RetainedTopics};
use crate::shares::{ShareCount, ShareExceeded, TenantShare};

use admitted::{DraftRoom, SectionCounts};
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
        let refusals = Arc::new(Refusals::new(metrics.clone()));
        let (closer, retained) = (OnceLock::new(), OnceLock::new());
        Self(Arc::new(IntakeInner {
            authorizer,
            log,
            refusals,
            metrics,
            limits: limits.clone(),
            memory,
            processor: ProcessorTime::new(),
            room,
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
            validation: None,
            client: None,
            sections: Vec::new(),
            keys: Vec::new(),
            refusals: Vec::new(),
            only_asks: false,
            paid: 0,
            over: None,
            quota: None,
            payers: Vec::new(),
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
    /// held back; the others wait for a second at most, and are then told when to come again.
    ///
    /// # Errors
    /// [`Refusal::Busy`] if there is no room for `intake.hold_back_ms_max`; [`AppendError::Away`] if this
    /// gateway has been without its cluster for too long to know which keys are good.
    pub async fn admit(&self, draft: Draft) -> Result<AdmittedDraft, Refusal> {
        let draft = match self.try_admit(draft) {
            Ok(admitted) => return Ok(admitted),
            Err(draft) => *draft,
        };
        let patience = self.hold_back(draft.transport).max(Duration::from_secs(1));
        let until = tokio::time::Instant::now() + patience;
        while self.may_be_behind() {
            if tokio::time::Instant::now() >= until {
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

    /// Whether a key may have died without this gateway knowing it yet.
    fn may_be_behind(&self) -> bool {
        self.0.authorizer.registry().may_be_behind()
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
            Some(turns) => Some(turns.try_acquire_many_owned(slow_permits(permits)).ok()?),
            None => None,
        };
        Some(DraftRoom { _of_all: self.0.room.clone().try_acquire_many_owned(permits).ok()?, _of_tenant })
    }

    /// Waits for room: first behind the messages of the same tenant, if that is in the slow lane, then behind everybody's.
    async fn wait_room(&self, draft: &Draft) -> Result<DraftRoom, AcquireError> {
        let permits = self.permits(draft);
        let _of_tenant = match self.log_turns(draft) {
            Some(turns) => Some(turns.acquire_many_owned(slow_permits(permits)).await?),
            None => None,
        };
        Ok(DraftRoom { _of_all: self.0.room.clone().acquire_many_owned(permits).await?, _of_tenant })
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
        let records = draft.sections.iter().map(SectionCounts::from_section).collect();
        // Here, so that the log's writer need not compute it.
        draft.sections.iter_mut().for_each(|section| _ = section.content_digest());
        let give_up_at = started + self.hold_back(draft.transport);
        let committed = self.0.log.append(draft.sections, give_up_at);
        let metrics = self.0.metrics.clone();
        let refusals = self.0.refusals.clone();
        AdmittedDraft {
            committed,
            started,
            records,
            keys: draft.keys,
            asked: draft.refusals,
            client: draft.client,
            received_at: draft.received_at,
            registry: self.0.authorizer.registry().clone(),
            transport: draft.transport,
            metrics,
            refusals,
            _payers: draft.payers,
            _room: room,
        }
    }

    /// Releases QoS 2 exchanges. Once it resolves `Ok`, the release is durable, and a message that opens
    /// one of them again is a new message. The client is held back meanwhile, as in [`Intake::admit`].
    pub fn release(&self, exchanges: &[Exchange]) -> PendingRelease {
        let ids = exchanges.iter().map(|exchange| exchange.once_id()).collect();
        PendingRelease(self.0.log.release(ids, Instant::now() + self.hold_back(Transport::Mqtt)))
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
        let ((), gone) = tokio::join!(self.0.log.barrier(), tokio::time::timeout(REVOCATION_WAIT_MAX, gone));
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
fn slow_permits(permits: u32) -> u32 {
    permits.min(u32::try_from(SLOW_IN_FLIGHT_BYTES_MAX).unwrap_or(u32::MAX))
}

/// The limit that an operator may set for a count.
fn limit_of_count(what: ShareCount) -> Option<Limit> {
    match what {
        ShareCount::Sessions => Some(Limit::Sessions),
        ShareCount::Subscriptions => Some(Limit::Subscriptions),
        ShareCount::SubscriptionBytes => Some(Limit::SubscriptionBytes),
        ShareCount::ShareGroups => Some(Limit::ShareGroups),
        ShareCount::Inflight => Some(Limit::Inflight),
        ShareCount::StalledBytes | ShareCount::PlaceBytes | ShareCount::Replays => None,
    }
}

/// The meters of an owner, which are kept beside its limits; `None` if it has no limits.
pub fn meters(limits: &JsonSetting, owner: impl FnOnce() -> LimitOwner) -> Option<Arc<Meters>> {
    limits.is_set().then(|| limits.made(|text| Meters::from_text(owner(), text)))
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::auth::{Actor, Registry, Scope, Scopes};
    use crate::config::Config;
    use crate::limits::MESSAGE_ID_BYTES_MAX;
    use crate::log::{EmbeddedLog, Offsets};
    use crate::message::{Offset, RecordFlags};

    /// An intake with a log of its own, and a grant for datasource `press-4`.
    pub(super) fn intake() -> (TempDir, Intake, Grant) {
        let dir = TempDir::new().expect("temporary directory");
        let registry = Arc::new(Registry::open(dir.path()).expect("opens"));
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let (_, _, secret) =
            registry.create_datasource(&Actor::SYSTEM, None, "press-4", scopes).expect("created");
        let config = Config::default();
        let log = EmbeddedLog::open(dir.path(), &config.log, &config.intake).expect("opens");
        let log = Arc::new(log);
        let authorizer = Authorizer::new(registry);
        let grant = authorizer.identify(secret.expose().as_bytes()).expect("a valid key");
        (dir, Intake::new(authorizer, log, Arc::new(Metrics::new()), &config.intake), grant)
    }

    pub(super) fn message<'a>(
        message_id: Option<&'a str>,
        exchange: Option<Exchange>,
    ) -> IncomingMessage<'a> {
        let (flags, payload) = (RecordFlags::default(), b"1");
        IncomingMessage {
            topic: "t",
            payload,
            content_type: "",
            properties: &[],
            flags,
            message_id,
            exchange,
        }
    }

    /// One message was kept.
    fn one_at(offset: Offset) -> SectionOutcome {
        SectionOutcome::Kept(Offsets::consecutive(offset, 1))
    }

    /// Pushes messages into one draft and returns, per message, what has become of it.
    pub(super) async fn publish(
        intake: &Intake,
        grant: &Grant,
        messages: &[IncomingMessage<'_>],
    ) -> Vec<SectionOutcome> {
        let mut draft = intake.draft(Transport::Mqtt, 7);
        let push = |message: &IncomingMessage<'_>| draft.push(grant, None, *message).expect("let in");
        let origins: Vec<usize> = messages.iter().map(push).collect();
        let accepted = intake.admit(draft).await.expect("room").await.expect("kept");
        origins.into_iter().map(|origin| accepted.outcomes[origin].clone()).collect()
    }

    #[tokio::test]
    async fn what_a_tenant_in_the_slow_lane_has_on_its_way_into_the_log_is_bounded() {
        let (_dir, intake, grant) = intake();
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let registry = intake.authorizer().registry();
        let (_, _, other) =
            registry.create_datasource(&Actor::SYSTEM, None, "press-5", scopes).expect("created");
        let other = intake.authorizer().identify(other.expose().as_bytes()).expect("a valid key");
        let payload = vec![b'x'; SLOW_IN_FLIGHT_BYTES_MAX / 2];
        let draft_over = |transport: Transport, grant: &Grant| {
            let mut draft = intake.draft(transport, 7);
            let message = IncomingMessage { payload: &payload, ..message(None, None) };
            draft.push(grant, None, message).expect("let in");
            draft
        };
        let draft = |grant: &Grant| draft_over(Transport::Mqtt, grant);
        let under_way = |grant: &Grant, count: usize| {
            let rooms = (0..count).map(|_| intake.try_room(&draft(grant)));
            rooms.flatten().collect::<Vec<_>>()
        };
        assert_eq!(under_way(&grant, 10).len(), 10, "as long as nobody minds");
        let tenant = intake.processor().of_grant(&grant);
        intake.processor().slow_down(&tenant);
        let held = under_way(&grant, 10);
        assert_eq!(held.len(), 1, "two take more than the bound with what the log adds");
        assert_eq!(under_way(&other, 10).len(), 10);
        assert!(intake.try_admit(draft(&grant)).is_err());
        // Over NATS the messages of others may be in the same draft.
        assert!(intake.try_room(&draft_over(Transport::Nats, &grant)).is_some());
        drop(held);
        intake.submit(draft(&grant)).await.expect("kept, now that there is room");
    }

    #[tokio::test]
    async fn a_message_with_an_id_is_an_origin_of_its_own_and_is_judged_alone() {
        let (_dir, intake, grant) = intake();
        let plain = message(None, None);
        let outcomes = publish(
            &intake,
            &grant,
            &[plain, message(Some("a"), None), plain, message(Some("b"), None), message(Some("a"), None)],
        )
        .await;
        let again = SectionOutcome::Duplicate(Offsets::consecutive(1, 1));
        assert_eq!(outcomes, [one_at(0), one_at(1), one_at(2), one_at(3), again]);
        assert_eq!(intake.0.log.next_offset(), 4);
        let metrics = intake.metrics().render();
        assert!(metrics.contains("headgate_accepted_total{transport=\"mqtt\"} 4"), "{metrics}");
        assert!(metrics.contains("headgate_duplicates_total{transport=\"mqtt\"} 1"), "{metrics}");
    }

    /// The payloads in the log, in order.
    fn in_log(intake: &Intake) -> String {
        let batches = intake.0.log.read(0, 1 << 20).expect("readable");
        let records = batches.iter().flat_map(|batch| batch.records());
        records.map(|record| std::str::from_utf8(record.payload).expect("text")).collect()
    }

    #[tokio::test]
    async fn the_order_in_which_messages_are_accepted_is_the_order_in_the_log() {
        let (_dir, intake, grant) = intake();
        let registry = intake.authorizer().registry();
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let (_, _, other) =
            registry.create_datasource(&Actor::SYSTEM, None, "press-5", scopes).expect("created");
        let other = intake.authorizer().identify(other.expose().as_bytes()).expect("a valid key");
        let second = grant.datasource().clone();
        let (_, second) = registry.create_key(&Actor::SYSTEM, &second, "", scopes, None).expect("created");
        let second = intake.authorizer().identify(second.expose().as_bytes()).expect("a valid key");
        let schema = r#"{"last_version":1,"rules":[{"filter":"bad","version":1,"schema":false}]}"#;
        registry
            .set_datasource_schemas(&Actor::SYSTEM, grant.datasource(), Some(schema.to_owned()))
            .expect("set");
        let with = |payload, id, topic| IncomingMessage { payload, topic, ..message(id, None) };
        let exchange = |payload, packet_id| IncomingMessage {
            payload,
            ..message(None, Some(Exchange { session: 1, packet_id }))
        };
        let mut draft = intake.draft(Transport::Mqtt, 7);
        for (grant, message) in [
            (&grant, with(b"a", None, "t")),
            (&grant, with(b"b", Some("id-1"), "t")),
            (&grant, with(b"c", None, "t")),
            (&second, with(b"d", None, "t")),
            (&grant, with(b"e", None, "t")),
            (&grant, with(b"f", None, "bad")),
            (&grant, with(b"g", None, "t")),
            (&other, with(b"h", None, "t")),
            (&second, with(b"i", Some("id-2"), "t")),
            (&grant, exchange(b"j", 1)),
            (&grant, with(b"k", None, "t")),
            (&grant, with(b"l", None, "t")),
        ] {
            let quarantined = matches!(draft.push(grant, None, message), Err(Refusal::Quarantined(_)));
            assert_eq!(quarantined, message.topic == "bad");
        }
        assert_eq!(draft.sections.len(), 11, "the last two share a section");
        intake.admit(draft).await.expect("room").await.expect("kept");
        assert_eq!(in_log(&intake), "abcdefghijkl");
    }

    #[tokio::test]
    async fn messages_of_one_key_without_ids_are_one_section() {
        let (_dir, intake, grant) = intake();
        let mut draft = intake.draft(Transport::Mqtt, 7);
        for _ in 0..100 {
            draft.push(&grant, None, message(None, None)).expect("let in");
        }
        assert_eq!(draft.sections.len(), 1);
    }

    #[tokio::test]
    async fn a_message_id_is_the_same_over_every_transport() {
        let (_dir, intake, grant) = intake();
        let kept = publish(&intake, &grant, &[message(Some("a"), None)]).await;
        assert_eq!(kept, [one_at(0)]);
        let mut request = intake.draft(Transport::Http, 0);
        request.keep_once("a").expect("a good id");
        request.push(&grant, None, message(None, None)).expect("let in");
        let kept = intake.submit(request).await.expect("answered").expect("there were messages");
        assert_eq!((kept.offsets, kept.duplicate), (Offsets::consecutive(0, 1), true));
        let mut longer = intake.draft(Transport::Http, 0);
        longer.keep_once("a").expect("a good id");
        (0..2).for_each(|_| _ = longer.push(&grant, None, message(None, None)).expect("let in"));
        let refused = intake.submit(longer).await;
        assert!(matches!(refused, Err(Refusal::Conflict(IdConflict::MessageId(0)))), "two are not one");
    }

    #[tokio::test]
    async fn an_exchange_is_kept_once_until_it_is_released() {
        let (_dir, intake, grant) = intake();
        let exchange = Exchange { session: 1, packet_id: 5 };
        let others = [Exchange { session: 2, ..exchange }, Exchange { packet_id: 6, ..exchange }];
        let opened = message(None, Some(exchange));
        assert_eq!(publish(&intake, &grant, &[opened]).await, [one_at(0)]);
        let again = publish(&intake, &grant, &[opened]).await;
        assert!(matches!(again[..], [SectionOutcome::Duplicate(_)]), "{again:?}");
        for (n, other) in others.into_iter().enumerate() {
            let kept = publish(&intake, &grant, &[message(None, Some(other))]).await;
            assert_eq!(kept, [one_at(1 + n as u64)]);
        }
        let other = publish(&intake, &grant, &[IncomingMessage { payload: b"2", ..opened }]).await;
        assert!(matches!(other[..], [SectionOutcome::Conflict { in_exchange: true, .. }]), "{other:?}");
        intake.release(&[exchange, exchange]).await.expect("released");
        assert_eq!(publish(&intake, &grant, &[opened]).await, [one_at(3)]);
    }

    #[tokio::test]
    async fn what_a_key_for_all_datasources_has_sent_to_one_does_not_outlive_it() {
        let (_dir, intake, grant) = intake();
        let registry = intake.authorizer().registry();
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let (_, all) =
            registry.create_key(&Actor::SYSTEM, &DatasourceId::all(), "", scopes, None).expect("created");
        let all = intake.authorizer().identify(all.expose().as_bytes()).expect("a valid key");
        let press = grant.datasource().clone();
        let draft = |grant: &Grant| {
            let mut draft = intake.draft(Transport::Mqtt, 7);
            draft.push(grant, Some(&press), message(Some("a"), None)).expect("let in");
            draft
        };
        let kept = intake.submit(draft(&all)).await.expect("kept").expect("a message");
        assert_eq!((kept.offsets, kept.duplicate), (Offsets::consecutive(0, 1), false));
        let late = draft(&all);
        registry.delete_datasource(&Actor::SYSTEM, &press).expect("there");
        registry.create_datasource(&Actor::SYSTEM, None, "press-4", scopes).expect("created again");
        assert!(matches!(intake.submit(late).await, Err(Refusal::Denied(GrantDenial::Revoked))));
        // The id was used up in the last one only.
        let kept = intake.submit(draft(&all)).await.expect("kept").expect("a message");
        assert_eq!((kept.offsets, kept.duplicate), (Offsets::consecutive(1, 1), false));
    }

    #[tokio::test]
    async fn a_message_id_has_1_to_128_printable_bytes() {
        let (_dir, intake, grant) = intake();
        let (longest, too_long) = ("a".repeat(MESSAGE_ID_BYTES_MAX), "a".repeat(MESSAGE_ID_BYTES_MAX + 1));
        let mut draft = intake.draft(Transport::Mqtt, 0);
        for good in ["a", " ", "°C", &longest] {
            assert!(draft.push(&grant, None, message(Some(good), None)).is_ok(), "{good:?}");
        }
        for bad in ["", "a\0", "a\nb", "\u{85}", &too_long] {
            let refused = draft.push(&grant, None, message(Some(bad), None));
            assert!(matches!(refused, Err(Refusal::MessageId)), "{bad:?}");
        }
    }

    #[test]
    fn a_draft_is_charged_for_as_it_grows_and_gives_all_of_it_back() {
        let (_dir, intake, grant) = intake();
        let account = MemoryBudget::new(4 << 20, 1 << 20).account_of_key(grant.key_id(), grant.datasource());
        let topic = "x".repeat(1024);
        for (id, messages_max) in [(false, 30_000), (true, 2_000)] {
            let mut draft = intake.draft(Transport::Http, 0);
            draft.charge_to(&account, grant.key_id());
            let ids: Vec<String> = (0..messages_max).map(|n| n.to_string()).collect();
            let refused = ids.iter().position(|n| {
                let message = IncomingMessage { topic: &topic, ..message(id.then_some(n.as_str()), None) };
                match draft.push(&grant, None, message) {
                    Ok(_) => false,
                    Err(Refusal::Memory(_)) => true,
                    Err(other) => panic!("{other}"),
                }
            });
            let pushed = refused.expect("the share is used up before");
            // A topic that all messages share is kept once; with an id, each message has a section of its own.
            let messages_min = if id { 300 } else { 5_000 };
            assert!(pushed > messages_min, "{pushed} messages of one byte in a share of 1 MiB");
            assert!(draft.memory_bytes() <= 1 << 20, "{} bytes", draft.memory_bytes());
            drop(draft);
            assert!(account.charge(1 << 20).is_ok(), "all of it is free again");
        }
    }
}
