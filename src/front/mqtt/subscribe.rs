//! SUBSCRIBE and UNSUBSCRIBE: the request, the decision, and the answer. The answer of a durable session
//! waits until the subscription is on disk.
//!
//! The user properties `from-offset`, `from-time` and `tail` make a SUBSCRIBE begin in the past.

use std::sync::Arc;

use super::codec::properties::SUBSCRIPTION_IDENTIFIER;
use super::codec::subscribe::{SubscribePacket, UnsubscribePacket};
use super::codec::write::{self, PacketForm};
use super::codec::{MqttVersion, ReasonCode};
use super::inbound::ClientIdentity;
use super::outbound::Outbound;
use super::session::{Subscription, SubscriptionFilter};
use super::sessions::Sessions;
use crate::auth::{Grant, Scope};
use crate::consume::render;
use crate::consume::subscriber::sessions::{SessionStoreChange, StoredGroup};
use crate::consume::subscriber::{ShareGroupKey, Subscribers};
use crate::filter::TopicFilter;
use crate::limits::{CLUSTER_FILTERS_BYTES_MAX, MQTT_SUBSCRIPTIONS_MAX, TAIL_READ_BYTES, TAIL_RECORDS_MAX};
use crate::log::{Log, LogReadError};
use crate::message::{DatasourceId, Offset, TimeMicros, Transport};
use crate::observe::cause::Cause;
use crate::observe::refusals::{RefusalNote, Refusals};

/// A SUBSCRIBE or an UNSUBSCRIBE, copied out of the read buffer.
pub(super) enum SubscriptionRequest {
    Subscribe(SubscribeRequest),
    Unsubscribe { packet_id: u16, filters: Vec<String> },
}

pub(super) struct SubscribeRequest {
    pub(super) packet_id: u16,
    pub(super) filters: Vec<RequestedFilter>,
    identifier: Option<u32>,
    replay: Result<Option<ReplayStart>, &'static str>,
}

/// One filter of a SUBSCRIBE.
pub(super) struct RequestedFilter {
    filter: String,
    qos: u8,
    no_local: bool,
    retain_as_published: bool,
    retain_handling: u8,
}

/// Where in the past a subscription begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReplayStart {
    Offset(Offset),
    Time(TimeMicros),
    /// The last so many matching records.
    Tail(u64),
}

impl ReplayStart {
    fn parse<'a>(properties: impl Iterator<Item = (&'a str, &'a str)>) -> Result<Option<Self>, &'static str> {
        let mut replay = None;
        for (name, value) in properties {
            let parsed = match name {
                "from-offset" => Self::Offset(value.parse().map_err(|_| "from-offset is a whole number")?),
                "from-time" => Self::Time(
                    render::parse_time(value)
                        .ok_or("from-time is an RFC 3339 time such as 2026-11-23T09:00:00Z")?,
                ),
                "tail" => Self::Tail(value.parse().map_err(|_| "tail is a number of records")?),
                _ => continue,
            };
            if replay.replace(parsed).is_some() {
                return Err("give only one of from-offset, from-time and tail");
            }
        }
        Ok(replay)
    }
}

impl From<&SubscribePacket<'_>> for SubscribeRequest {
    fn from(packet: &SubscribePacket<'_>) -> Self {
        let filters = packet.filters.iter().map(|f| RequestedFilter {
            filter: f.filter.to_owned(),
            qos: f.qos.min(1),
            no_local: f.no_local,
            retain_as_published: f.retain_as_published,
            retain_handling: f.retain_handling,
        });
        Self {
            packet_id: packet.packet_id,
            filters: filters.collect(),
            identifier: packet.properties.u32(SUBSCRIPTION_IDENTIFIER),
            replay: ReplayStart::parse(packet.properties.user()),
        }
    }
}

impl From<&UnsubscribePacket<'_>> for SubscriptionRequest {
    fn from(packet: &UnsubscribePacket<'_>) -> Self {
        let filters = packet.filters.iter().map(|filter| (*filter).to_owned()).collect();
        SubscriptionRequest::Unsubscribe { packet_id: packet.packet_id, filters }
    }
}

/// Why a filter is not granted: the reason code and the reason string.
struct FilterRefusal(ReasonCode, String);

/// What serving a request needs.
pub(super) struct SubscribeServices {
    pub(super) sessions: Arc<Sessions>,
    pub(super) subscribers: Arc<Subscribers>,
    pub(super) refusals: Arc<Refusals>,
    pub(super) grant: Grant,
    pub(super) form: PacketForm,
    pub(super) who: Arc<ClientIdentity>,
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
        let (mut granted, mut words) = (Vec::with_capacity(asked.filters.len()), None);
        for filter in &asked.filters {
            granted.push(match self.grant_one(asked, filter, outbound, &mut changes).await {
                Ok((slot, new)) => Ok((slot, new, filter.qos)),
                Err(FilterRefusal(reason, text)) => {
                    let note = RefusalNote::new(Transport::Mqtt, Cause::Subscribe, &text);
                    self.refusals.note(self.who.note(&self.grant, note));
                    words.get_or_insert(text);
                    Err(reason)
                }
            });
        }
        if granted.iter().any(Result::is_ok)
            && let Err(error) = self.store_session(outbound, changes).await
        {
            // A subscription that is not on disk is not granted: a restart would lose it.
            words.get_or_insert(error);
            for grant in &mut granted {
                if let Ok((slot, new, _)) = *grant {
                    if new {
                        outbound.unsubscribe(slot);
                    }
                    *grant = Err(ReasonCode::ImplementationSpecificError);
                }
            }
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
        self.grant
            .allows_scope(Scope::Subscribe)
            .map_err(|denied| FilterRefusal(ReasonCode::NotAuthorized, denied.to_string()))?;
        let wanted = SubscriptionFilter::parse(&filter.filter).ok_or_else(|| {
            let words = "'+' stands alone in its level, '#' alone in the last one, and a shared subscription is $share/{group}/{filter}";
            FilterRefusal(ReasonCode::TopicFilterInvalid, words.to_owned())
        })?;
        let known = outbound.session.find_slot(&filter.filter);
        if known.is_none() && outbound.session.subscription_count() >= MQTT_SUBSCRIPTIONS_MAX {
            let words = format!("a session has at most {MQTT_SUBSCRIPTIONS_MAX} subscriptions");
            return Err(FilterRefusal(ReasonCode::QuotaExceeded, words));
        }
        if self.sessions.is_clustered() {
            let filters = outbound.session.subscriptions.iter().flatten().map(|s| s.filter.len());
            if filters.sum::<usize>() + filter.filter.len() > CLUSTER_FILTERS_BYTES_MAX {
                let words = format!(
                    "in a cluster a session's filters have at most {CLUSTER_FILTERS_BYTES_MAX} bytes"
                );
                return Err(FilterRefusal(ReasonCode::QuotaExceeded, words));
            }
        }
        let from = match &asked.replay {
            Ok(None) => None,
            Ok(Some(replay)) => {
                let (log, datasource) = (self.subscribers.log.clone(), self.grant.datasource().clone());
                let (replay, filter) = (*replay, wanted.filter.clone());
                // In a cluster other gateways may have appended records that this one has not followed yet.
                let reaches = if let ReplayStart::Offset(offset) = replay { offset } else { Offset::MAX };
                let caught_up = log.catch_up(reaches).await;
                caught_up
                    .map_err(|e| FilterRefusal(ReasonCode::ImplementationSpecificError, e.to_string()))?;
                let found =
                    tokio::task::spawn_blocking(move || replay_offset(&*log, &datasource, &filter, replay));
                let found = found.await.unwrap_or_else(|e| Err(LogReadError::Io(e.to_string().into())));
                Some(
                    found
                        .map_err(|e| FilterRefusal(ReasonCode::ImplementationSpecificError, e.to_string()))?,
                )
            }
            Err(words) => {
                return Err(FilterRefusal(ReasonCode::ImplementationSpecificError, (*words).to_owned()));
            }
        };
        let subscription = Subscription {
            filter: filter.filter.clone(),
            qos: filter.qos,
            no_local: filter.no_local,
            retain_as_published: filter.retain_as_published,
            identifier: asked.identifier,
            from: 0,
        };
        let new = known.is_none();
        // A group has one cursor for all its members, so a shared subscription goes through the group and
        // gets no retained messages (MQTT 5 section 4.8.2); any other one has its own place in the feed.
        match wanted.group {
            None => {
                let retained = match filter.retain_handling {
                    _ if from.is_some() => false,
                    0 => true,
                    1 => new,
                    _ => false,
                };
                let slot = known.unwrap_or_else(|| outbound.session.free_slot());
                outbound.subscribe(slot, wanted.filter, subscription, from, retained);
                Ok((slot, new))
            }
            Some(group) => {
                let datasource = outbound.datasource.clone();
                let key: ShareGroupKey = (datasource, group.into(), wanted.filter.as_str().into());
                let groups = &self.subscribers.groups;
                let of = outbound.session.group_session();
                let cursor = groups.join(&key, of, from).await;
                let cursor = cursor
                    .map_err(|e| FilterRefusal(ReasonCode::ImplementationSpecificError, e.to_string()))?;
                if let Some(cursor) = cursor.filter(|_| outbound.session.is_durable()) {
                    let (datasource, group, filter) = key.clone();
                    let group =
                        StoredGroup { datasource, group: group.into(), filter: filter.into(), cursor };
                    changes.push(SessionStoreChange::PutGroup(group));
                }
                let slot = known.unwrap_or_else(|| outbound.session.free_slot());
                let member = if new { groups.member(&key, of) } else { None };
                outbound.subscribe_shared(slot, subscription, member);
                Ok((slot, new))
            }
        }
    }

    /// Returns the UNSUBACK's code for each filter.
    async fn unsubscribe(&self, filters: &[String], outbound: &mut Outbound) -> Vec<u8> {
        const NO_SUBSCRIPTION_EXISTED: u8 = 0x11;
        let mut changes = Vec::new();
        let mut one = |filter: &String| {
            let Some(slot) = outbound.session.find_slot(filter) else { return NO_SUBSCRIPTION_EXISTED };
            outbound.unsubscribe(slot);
            if let Some(group) = super::sessions::shared_group_key(&outbound.datasource, filter) {
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
            outbound.session.to_stored(self.grant.datasource(), &self.who.client),
        ));
        self.subscribers.store.write(changes).await.map_err(|error| error.to_string())
    }
}

/// Where in the log a replay begins. Blocks on the disk.
fn replay_offset(
    log: &dyn Log,
    datasource: &DatasourceId,
    filter: &TopicFilter,
    replay: ReplayStart,
) -> Result<Offset, LogReadError> {
    let (first, end) = (log.first_offset(), log.next_offset());
    match replay {
        // Records that retention has removed are reported to the client as skipped.
        ReplayStart::Offset(offset) => Ok(offset.min(end)),
        ReplayStart::Time(time) => {
            // `offset_at` is only close to the record, and never behind it: the scan begins there.
            let mut offset = log.offset_at(time)?.max(first);
            loop {
                let batches = log.read(offset, TAIL_READ_BYTES)?;
                let Some(last) = batches.last() else { return Ok(end) };
                let records = batches.iter().flat_map(|batch| batch.records());
                let found = records.into_iter().find(|r| r.offset >= offset && r.received_at >= time);
                match found {
                    Some(record) => return Ok(record.offset),
                    None => offset = last.next_offset(),
                }
            }
        }
        ReplayStart::Tail(0) => Ok(end),
        ReplayStart::Tail(wanted) => {
            let wanted = wanted.min(TAIL_RECORDS_MAX);
            let left_out = log.withheld().now();
            let matches = |record: &crate::message::RecordRef<'_>| match datasource.is_all() {
                _ if left_out.contains(record) => false,
                true => filter.matches(&format!("{}/{}", record.datasource, record.topic)),
                false => record.datasource == datasource.as_str() && filter.matches(record.topic),
            };
            // Doubles the distance until enough records match or the log's beginning is reached.
            let mut back = wanted.max(1024);
            loop {
                let begin = end.saturating_sub(back).max(first);
                let mut newest = std::collections::VecDeque::new();
                let mut offset = begin;
                while offset < end {
                    let batches = log.read(offset, TAIL_READ_BYTES)?;
                    let Some(last) = batches.last() else { break };
                    for record in batches.iter().flat_map(|batch| batch.records()) {
                        if (offset..end).contains(&record.offset) && matches(&record) {
                            newest.push_back(record.offset);
                            if newest.len() as u64 > wanted {
                                newest.pop_front();
                            }
                        }
                    }
                    offset = last.next_offset();
                }
                if newest.len() as u64 == wanted || begin == first {
                    return Ok(newest.front().copied().unwrap_or(end));
                }
                back = back.saturating_mul(2);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replay_begins_at_one_place() {
        let parse = |pairs: &[(&'static str, &'static str)]| ReplayStart::parse(pairs.iter().copied());
        assert_eq!(parse(&[("colour", "red")]), Ok(None));
        assert_eq!(parse(&[("from-offset", "41")]), Ok(Some(ReplayStart::Offset(41))));
        assert_eq!(parse(&[("from-time", "1970-01-01T00:00:01Z")]), Ok(Some(ReplayStart::Time(1_000_000))));
        assert_eq!(parse(&[("tail", "10")]), Ok(Some(ReplayStart::Tail(10))));
        for bad in [
            &[("from-offset", "-1")][..],
            &[("from-time", "noon")],
            &[("tail", "")],
            &[("tail", "1"), ("from-offset", "1")],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
