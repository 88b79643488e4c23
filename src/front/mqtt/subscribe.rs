//! SUBSCRIBE and UNSUBSCRIBE: the request, the decision, and the answer. The answer of a durable session
//! waits until the subscription is on disk.
//!
//! The user properties `from-offset`, `from-time` and `tail` make a SUBSCRIBE begin in the past. Its messages then
//! come with their metadata, as they do with `headgate-metadata: true`.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::client_identity::ClientIdentity;
use super::codec::properties::SUBSCRIPTION_IDENTIFIER;
use super::codec::subscribe::{SubscribePacket, UnsubscribePacket};
use super::codec::write::{self, PacketForm};
use super::codec::{MqttVersion, ReasonCode};
use super::metadata_wish::parse_metadata_wish;
use super::outbound::Outbound;
use super::session::{MqttSession, Subscription, SubscriptionFilter};
use super::sessions::Sessions;
use crate::auth::{Grant, GrantDenial, Scope};
use crate::consume::subscriber::sessions::{SessionStoreChange, StoredGroup};
use crate::consume::subscriber::{GroupJoinError, ReplayError, ReplayStart, ShareGroupKey, Subscribers};
use crate::filter::TopicFilter;
use crate::intake::{Intake, Refusal};
use crate::limits::{CLUSTER_FILTERS_BYTES_MAX, MQTT_SUBSCRIPTIONS_LIMIT};
use crate::message::{Offset, Transport};
use crate::observe::cause::Cause;
use crate::observe::refusals::RefusalNote;
use crate::quota::LimitExceeded;
use crate::shares::ShareExceeded;

/// How often a connection looks whether its client has gone while the log is searched for it.
const REPLAY_LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// A SUBSCRIBE or an UNSUBSCRIBE, copied out of the read buffer.
pub(super) enum SubscriptionRequest {
    Subscribe(SubscribeRequest),
    Unsubscribe { packet_id: u16, filters: Vec<String> },
}

pub(super) struct SubscribeRequest {
    pub(super) packet_id: u16,
    /// The first [`MQTT_SUBSCRIPTIONS_LIMIT`] filters.
    pub(super) filters: Vec<RequestedFilter>,
    /// How many more there are, none of which is granted: a session never has so many.
    excess: usize,
    identifier: Option<u32>,
    replay: Result<Option<ReplayStart>, &'static str>,
    /// Its messages come with their metadata.
    metadata: bool,
    /// The same, to be kept with the subscriptions.
    replay_text: Option<Box<str>>,
}

/// One filter of a SUBSCRIBE.
pub(super) struct RequestedFilter {
    filter: String,
    qos: u8,
    no_local: bool,
    retain_as_published: bool,
    retain_handling: u8,
}

impl SubscribeRequest {
    /// What a SUBSCRIBE asks for. That of a bridge asks with each filter for what other brokers do for bridges
    /// unasked: not to get its own messages back, and to see which are retained.
    pub(super) fn new(packet: &SubscribePacket<'_>, is_bridge: bool) -> Self {
        let excess = packet.filters.len().saturating_sub(MQTT_SUBSCRIPTIONS_LIMIT);
        let filters = packet.filters.iter().take(MQTT_SUBSCRIPTIONS_LIMIT).map(|f| RequestedFilter {
            filter: f.filter.to_owned(),
            qos: f.qos,
            no_local: f.no_local || is_bridge && !f.filter.starts_with("$share/"),
            retain_as_published: f.retain_as_published || is_bridge,
            retain_handling: f.retain_handling,
        });
        let wish = parse_metadata_wish(packet.properties.user());
        let replay = ReplayStart::parse(packet.properties.user()).and_then(|replay| wish.and(Ok(replay)));
        Self {
            packet_id: packet.packet_id,
            filters: filters.collect(),
            excess,
            identifier: packet.properties.u32(SUBSCRIPTION_IDENTIFIER),
            metadata: wish.ok().flatten().unwrap_or(matches!(replay, Ok(Some(_)))),
            replay_text: replay.ok().flatten().map(|replay| replay.to_string().into()),
            replay,
        }
    }
}

impl From<&UnsubscribePacket<'_>> for SubscriptionRequest {
    fn from(packet: &UnsubscribePacket<'_>) -> Self {
        let filters = packet.filters.iter().map(|filter| (*filter).to_owned()).collect();
        SubscriptionRequest::Unsubscribe { packet_id: packet.packet_id, filters }
    }
}

/// Why a filter is not granted.
struct FilterRefusal {
    reason: ReasonCode,
    cause: Cause,
    words: String,
    /// The limit that it is over.
    limited: Option<Box<LimitExceeded>>,
}

impl FilterRefusal {
    fn new(reason: ReasonCode, words: String) -> Self {
        Self { reason, cause: Cause::Subscribe, words, limited: None }
    }

    /// The filter is good, and something else is not.
    fn failed(error: impl Display) -> Self {
        Self::new(ReasonCode::ImplementationSpecificError, error.to_string())
    }
}

/// What serving a request needs.
pub(super) struct SubscribeServices {
    pub(super) sessions: Arc<Sessions>,
    pub(super) subscribers: Arc<Subscribers>,
    pub(super) intake: Intake,
    pub(super) grant: Grant,
    pub(super) form: PacketForm,
    pub(super) who: Arc<ClientIdentity>,
    /// How many subscriptions a session may have.
    pub(super) subscriptions_max: usize,
    /// Cancelled when the connection ends: searches of the log end with it.
    pub(super) cancel: CancellationToken,
    /// The end of what the connection has published.
    pub(super) published: Offset,
}

/// Serves `request`. Returns the sending half, and the answer to send.
pub(super) async fn serve_request(
    services: SubscribeServices,
    request: SubscriptionRequest,
    mut outbound: Box<Outbound>,
) -> (Box<Outbound>, Vec<u8>) {
    let mut answer = Vec::new();
    let form = services.form;
    match request {
        SubscriptionRequest::Subscribe(subscribing) => {
            let (codes, words) = services.subscribe(&subscribing, &mut outbound).await;
            write::suback(&mut answer, form, subscribing.packet_id, &codes, words.as_deref());
        }
        SubscriptionRequest::Unsubscribe { packet_id, filters } => {
            let codes = services.unsubscribe(&filters, &mut outbound).await;
            write::unsuback(&mut answer, form, packet_id, &codes);
        }
    }
    (outbound, answer)
}

impl SubscribeServices {
    /// Returns the SUBACK's code for each filter, and the reason string of the first refusal.
    async fn subscribe(
        &self,
        asked: &SubscribeRequest,
        outbound: &mut Outbound,
    ) -> (Vec<u8>, Option<String>) {
        let mut changes = Vec::new();
        // Live is what comes after the SUBSCRIBE. In a cluster the log is followed, and may not have come so far. If
        // it cannot be asked, the client may be sent its own messages, which harms less than no subscription.
        let _ = self.subscribers.log.catch_up(self.published).await;
        // An operator may have changed the limits since the client connected.
        let datasource = self.grant.datasource();
        self.intake.limit_share(datasource, &self.subscribers.shares.share(datasource));
        let (mut granted, mut words) = (Vec::with_capacity(asked.filters.len()), None);
        for filter in &asked.filters {
            // Reported once, however many filters there are.
            let reported = matches!(granted.last(), Some(Err(ReasonCode::QuotaExceeded)));
            if reported && self.has_no_room_for(filter, &outbound.session) {
                granted.push(Err(ReasonCode::QuotaExceeded));
                continue;
            }
            granted.push(match self.grant_one(asked, filter, outbound, &mut changes).await {
                Ok((slot, new)) => Ok((slot, new, filter.qos)),
                Err(refused) => {
                    let note = RefusalNote::new(Transport::Mqtt, refused.cause, &refused.words);
                    let note = RefusalNote { limited: refused.limited.as_deref(), ..note };
                    self.intake.refusals().note(self.who.note(&self.grant, note));
                    words.get_or_insert(refused.words);
                    Err(refused.reason)
                }
            });
        }
        if asked.excess > 0 {
            words.get_or_insert_with(|| self.too_many_words());
            granted.resize(granted.len() + asked.excess, Err(ReasonCode::QuotaExceeded));
        }
        if granted.iter().any(Result::is_ok)
            && let Err(error) = self.store_session(outbound, changes).await
        {
            // A subscription that is not on disk is not granted: a restart would lose it.
            words.get_or_insert(error);
            self.take_back(outbound, &mut granted);
        }
        let old = self.form.version != MqttVersion::V5;
        let code = |grant: &Result<(usize, bool, u8), ReasonCode>| match grant {
            Ok((_, _, qos)) => *qos,
            Err(_) if old => 0x80,
            Err(reason) => *reason as u8,
        };
        (granted.iter().map(code).collect(), words)
    }

    /// Adds one subscription. Returns its slot, and whether it is new.
    async fn grant_one(
        &self,
        asked: &SubscribeRequest,
        filter: &RequestedFilter,
        outbound: &mut Outbound,
        changes: &mut Vec<SessionStoreChange>,
    ) -> Result<(usize, bool), FilterRefusal> {
        let wanted = self.check_filter(filter, &outbound.session)?;
        let known = outbound.session.find_slot(&filter.filter);
        let from = match known.is_some_and(|slot| outbound.session.has_replayed(slot, &asked.replay_text)) {
            true => None,
            false => self.find_beginning(asked, &wanted.filter).await?,
        };
        let new = known.is_none();
        if new {
            outbound.session.charge_filter(&filter.filter).map_err(|over| self.share_refusal(over))?;
        }
        let subscription = Subscription {
            filter: filter.filter.clone(),
            qos: filter.qos,
            no_local: filter.no_local,
            retain_as_published: filter.retain_as_published,
            metadata: asked.metadata,
            identifier: asked.identifier,
            from: 0,
            replay: asked.replay_text.clone(),
            is_renewed: true,
        };
        // A group has one cursor for all its members, so a shared subscription goes through the group and
        // gets no retained messages (MQTT 5 section 4.8.2); any other one has its own place in the feed.
        let Some(group) = wanted.group else {
            let retained = match filter.retain_handling {
                _ if from.is_some() => false,
                0 => true,
                1 => new,
                _ => false,
            };
            let slot = known.unwrap_or_else(|| outbound.session.free_slot());
            outbound.subscribe(slot, wanted.filter, subscription, from, retained);
            return Ok((slot, new));
        };
        let key: ShareGroupKey = (outbound.scope.clone(), group.into(), wanted.filter.as_str().into());
        if let Err(refusal) = self.join_group(&key, from, &outbound.session, changes).await {
            if new {
                outbound.session.discharge_filter(&filter.filter);
            }
            return Err(refusal);
        }
        let slot = known.unwrap_or_else(|| outbound.session.free_slot());
        let session = outbound.session.group_session();
        let member = if new { self.subscribers.groups.member(&key, session) } else { None };
        outbound.subscribe_shared(slot, subscription, member);
        Ok((slot, new))
    }

    /// The refusal of what the tenant's share has no room for.
    fn share_refusal(&self, over: ShareExceeded) -> FilterRefusal {
        let refusal = self.intake.share_refusal(self.grant.datasource(), over);
        let (cause, words) = (refusal.cause(), refusal.to_string());
        let limited = if let Refusal::Limited(limited) = refusal { Some(limited) } else { None };
        FilterRefusal { reason: ReasonCode::QuotaExceeded, cause, words, limited }
    }

    /// Checks what does not depend on the log: the key's scope, the filter's form, and the session's limits.
    fn check_filter(
        &self,
        filter: &RequestedFilter,
        session: &MqttSession,
    ) -> Result<SubscriptionFilter, FilterRefusal> {
        self.grant
            .allows_scope(Scope::Subscribe)
            .map_err(|denied| FilterRefusal::new(ReasonCode::NotAuthorized, denied.to_string()))?;
        let wanted = SubscriptionFilter::parse(&filter.filter).ok_or_else(|| {
            let words = "'+' stands alone in its level, '#' alone in the last one, and a shared subscription is $share/{group}/{filter}";
            FilterRefusal::new(ReasonCode::TopicFilterInvalid, words.to_owned())
        })?;
        self.check_token_topics(&wanted).map_err(|denied| FilterRefusal {
            cause: denied.cause(),
            ..FilterRefusal::new(ReasonCode::NotAuthorized, denied.to_string())
        })?;
        if self.has_no_room_for(filter, session) {
            return Err(FilterRefusal::new(ReasonCode::QuotaExceeded, self.too_many_words()));
        }
        if self.sessions.is_clustered() {
            let filters = session.subscriptions.iter().flatten().map(|s| s.filter.len());
            if filters.sum::<usize>() + filter.filter.len() > CLUSTER_FILTERS_BYTES_MAX {
                let words = format!(
                    "in a cluster a session's filters have at most {CLUSTER_FILTERS_BYTES_MAX} bytes"
                );
                return Err(FilterRefusal::new(ReasonCode::QuotaExceeded, words));
            }
        }
        Ok(wanted)
    }

    /// Checks that the key's access token, if one was presented, is for all that a filter selects. It is for no group: what
    /// one of its members takes, the others do not get.
    fn check_token_topics(&self, wanted: &SubscriptionFilter) -> Result<(), GrantDenial> {
        self.grant.allows_filter(&wanted.filter)?;
        match wanted.group {
            Some(_) => self.grant.require_key("join a group ($share), whose others would miss what it takes"),
            None => Ok(()),
        }
    }

    /// Whether the session has as many subscriptions as it may, and not this one.
    fn has_no_room_for(&self, filter: &RequestedFilter, session: &MqttSession) -> bool {
        session.subscription_count() >= self.subscriptions_max && session.find_slot(&filter.filter).is_none()
    }

    fn too_many_words(&self) -> String {
        let most = self.subscriptions_max;
        format!("a session has at most {most} subscriptions (mqtt.subscriptions_per_session_max)")
    }

    /// The offset at which the subscription begins; `None` if it begins with the next record.
    async fn find_beginning(
        &self,
        asked: &SubscribeRequest,
        filter: &TopicFilter,
    ) -> Result<Option<Offset>, FilterRefusal> {
        let replay = match &asked.replay {
            Ok(None) => return Ok(None),
            Ok(Some(replay)) => *replay,
            Err(words) => return Err(FilterRefusal::failed(words)),
        };
        let mut look = tokio::time::interval(REPLAY_LOOK_INTERVAL);
        // Each tick lets the connection look whether its client is still there.
        let looking = async {
            loop {
                look.tick().await;
            }
        };
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(FilterRefusal::failed("the connection has ended")),
            found = self.search(replay, filter) => found.map(Some),
            () = looking => unreachable!("it goes on for ever"),
        }
    }

    /// Searches the log for the beginning of a replay.
    async fn search(&self, replay: ReplayStart, filter: &TopicFilter) -> Result<Offset, FilterRefusal> {
        let found = self.subscribers.find_replay_start(self.grant.datasource(), filter, replay).await;
        found.map_err(|error| match error {
            ReplayError::TooMany(_) => FilterRefusal {
                cause: Cause::Replays,
                ..FilterRefusal::new(ReasonCode::QuotaExceeded, error.to_string())
            },
            error => FilterRefusal::failed(error),
        })
    }

    /// Makes the session a member of a group, which begins at `from` if that is given.
    async fn join_group(
        &self,
        key: &ShareGroupKey,
        from: Option<Offset>,
        session: &MqttSession,
        changes: &mut Vec<SessionStoreChange>,
    ) -> Result<(), FilterRefusal> {
        let cursor = self.subscribers.groups.join(key, session.group_session(), from).await;
        let cursor = cursor.map_err(|error| match error {
            GroupJoinError::TooMany(over) => self.share_refusal(over),
            error => FilterRefusal::failed(error),
        })?;
        if let Some(cursor) = cursor.filter(|_| session.is_durable()) {
            let (datasource, group, filter) = key.clone();
            let group = StoredGroup { datasource, group: group.into(), filter: filter.into(), cursor };
            changes.push(SessionStoreChange::PutGroup(group));
        }
        Ok(())
    }

    /// Returns the UNSUBACK's code for each filter.
    async fn unsubscribe(&self, filters: &[String], outbound: &mut Outbound) -> Vec<u8> {
        const NO_SUBSCRIPTION_EXISTED: u8 = 0x11;
        let mut changes = Vec::new();
        let mut one = |filter: &String| {
            let Some(slot) = outbound.session.find_slot(filter) else { return NO_SUBSCRIPTION_EXISTED };
            outbound.unsubscribe(slot);
            if let Some(group) = super::sessions::shared_group_key(&outbound.scope, filter) {
                changes.extend(self.sessions.leave_group(&group, &outbound.session));
            }
            ReasonCode::Success as u8
        };
        let codes: Vec<u8> = filters.iter().map(&mut one).collect();
        // A failed write is made good by the session's next one; until then a restart would bring the
        // subscription back.
        let _ = self.store_session(outbound, changes).await;
        codes
    }

    /// Ends the new ones of the subscriptions that cannot be written. What is queued for the disk has them: what the
    /// session is without them comes behind it.
    fn take_back(&self, outbound: &mut Outbound, granted: &mut [Result<(usize, bool, u8), ReasonCode>]) {
        let mut changes = Vec::new();
        for grant in granted {
            let Ok((slot, new, _)) = *grant else { continue };
            *grant = Err(ReasonCode::ImplementationSpecificError);
            let subscription = outbound.session.subscriptions[slot].as_ref().filter(|_| new);
            let Some(filter) = subscription.map(|subscription| subscription.filter.clone()) else { continue };
            outbound.unsubscribe(slot);
            if let Some(group) = super::sessions::shared_group_key(&outbound.scope, &filter) {
                changes.extend(self.sessions.leave_group(&group, &outbound.session));
            }
        }
        let session = outbound.session.to_stored(&outbound.scope, &self.who.client);
        changes.push(SessionStoreChange::PutSession(session));
        drop(self.subscribers.store.write(changes));
    }

    /// Returns when the present state of a durable session is on disk.
    async fn store_session(
        &self,
        outbound: &mut Outbound,
        mut changes: Vec<SessionStoreChange>,
    ) -> Result<(), String> {
        if !outbound.session.is_durable() {
            return Ok(());
        }
        outbound.session.stored = true;
        changes.push(SessionStoreChange::PutSession(
            outbound.session.to_stored(&outbound.scope, &self.who.client),
        ));
        self.subscribers.store.write(changes).await.map_err(|error| error.to_string())
    }
}
