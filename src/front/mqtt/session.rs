//! A session: the state of a client that is independent of its connection (MQTT 5 section 4.1):
//! subscriptions, a position in the log, messages in flight.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::flights::Flights;
use crate::consume::subscriber::sessions::{SessionStoreChange, StoredSession, StoredSubscription};
use crate::consume::subscriber::{GroupCount, GroupSession};
use crate::filter::TopicFilter;
use crate::limits::{INFLIGHT_PER_SESSION_MIN, INFLIGHT_STEP};
use crate::message::{DatasourceId, Offset};
use crate::shares::{ShareCharge, ShareCount, ShareExceeded, TenantShare, filter_bytes};

/// One client's session.
#[derive(Debug)]
pub(super) struct MqttSession {
    /// A number that no other session has or had.
    pub(super) uid: u64,
    /// How long the session outlives its connection, in seconds: 0 not at all, `u32::MAX` without
    /// limit.
    pub(super) expiry_s: u32,
    /// The session is on disk, or a write of it is under way.
    pub(super) stored: bool,
    /// The session has had an expiry above 0 at some time.
    pub(super) ever_stayed: bool,
    /// By slot. A removed subscription leaves a gap, so that the others keep their slots.
    pub(super) subscriptions: Vec<Option<Subscription>>,
    /// Every record below this was sent, though perhaps not acknowledged. What is not acknowledged is in flight.
    pub(super) position: Offset,
    pub(super) flights: Flights,
    /// What it takes of its tenant's share, once it is among the sessions. It gives it back when it ends.
    pub(super) charge: Option<ShareCharge>,
    /// While it is away: the places of its groups in the count of its datasource's.
    pub(super) groups: Vec<GroupCount>,
}

/// One subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Subscription {
    /// The filter as the client gave it.
    pub(super) filter: String,
    /// 0, 1 or 2.
    pub(super) qos: u8,
    pub(super) no_local: bool,
    pub(super) retain_as_published: bool,
    /// Its messages come with their metadata.
    pub(super) metadata: bool,
    pub(super) identifier: Option<u32>,
    /// The offset of the first record wanted.
    pub(super) from: Offset,
    /// What it asked for of the past.
    pub(super) replay: Option<Box<str>>,
    /// This connection has subscribed to it.
    pub(super) is_renewed: bool,
}

/// A session on its way to another node.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SessionHandover {
    session: StoredSession,
}

impl SessionHandover {
    /// Whether this is the latest state of the stored session. It is not if the node that hands it over
    /// was cut off while another node had the session.
    pub(super) fn is_latest_of(&self, kept: &StoredSession) -> bool {
        let of = |session: &StoredSession| (session.uid, session.cursor);
        of(&self.session) == of(kept)
            && self.session.subscriptions == kept.subscriptions
            && self.session.flights == kept.flights
    }
}

/// A parsed subscription filter: `$share/{group}/{filter}` or a plain topic filter.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SubscriptionFilter {
    /// The group's name, if the subscription is shared.
    pub(super) group: Option<String>,
    pub(super) filter: TopicFilter,
}

impl SubscriptionFilter {
    /// `None` if the topic filter or the group's name is not valid (sections 4.7 and 4.8.2).
    pub(super) fn parse(text: &str) -> Option<Self> {
        let Some(shared) = text.strip_prefix("$share/") else {
            return Some(Self { group: None, filter: TopicFilter::new(text).ok()? });
        };
        let (group, filter) = shared.split_once('/')?;
        if group.is_empty() || group.contains(['+', '#']) {
            return None;
        }
        Some(Self { group: Some(group.to_owned()), filter: TopicFilter::new(filter).ok()? })
    }
}

impl MqttSession {
    /// An empty session. No other session may have the same `uid`.
    pub(super) fn new(uid: u64, expiry_s: u32) -> Self {
        let flights = Flights::default();
        let (stored, ever_stayed, subscriptions) = (false, expiry_s > 0, Vec::new());
        let (charge, groups) = (None, Vec::new());
        Self { uid, expiry_s, stored, ever_stayed, subscriptions, position: 0, flights, charge, groups }
    }

    /// Charges its tenant's share for what it has already, whatever the limits are: what was let in stays.
    pub(super) fn charge_present(&mut self, share: &Arc<TenantShare>) {
        if self.charge.is_some() {
            return;
        }
        let mut charge = share.charge();
        charge.add(ShareCount::Sessions, u64::from(self.stored));
        charge.add(ShareCount::Subscriptions, self.subscription_count() as u64);
        let bytes =
            self.subscriptions.iter().flatten().map(|subscription| filter_bytes(&subscription.filter));
        charge.add(ShareCount::SubscriptionBytes, bytes.sum());
        charge.add(ShareCount::Inflight, self.inflight_steps());
        self.charge = Some(charge);
    }

    /// Charges the share for a session that is to outlive its connection, or no longer for one that is not.
    ///
    /// # Errors
    /// [`ShareExceeded`], and nothing is charged.
    pub(super) fn charge_stay(&mut self, stays: bool) -> Result<(), ShareExceeded> {
        let Some(charge) = &mut self.charge else { return Ok(()) };
        match (charge.amount(ShareCount::Sessions), stays) {
            (0, true) => charge.try_take(ShareCount::Sessions, 1),
            (charged, false) => {
                charge.subtract(ShareCount::Sessions, charged);
                Ok(())
            }
            (_, true) => Ok(()),
        }
    }

    /// Charges the share for a new subscription.
    ///
    /// # Errors
    /// [`ShareExceeded`], and nothing is charged.
    pub(super) fn charge_filter(&mut self, filter: &str) -> Result<(), ShareExceeded> {
        let Some(charge) = &mut self.charge else { return Ok(()) };
        charge.try_take_filter(filter)
    }

    /// Gives back what [`MqttSession::charge_filter`] has charged.
    pub(super) fn discharge_filter(&mut self, filter: &str) {
        if let Some(charge) = &mut self.charge {
            charge.give_back_filter(filter);
        }
    }

    /// Makes what is charged for the messages in flight fit their number, in steps.
    pub(super) fn charge_flights(&mut self) {
        let steps = self.inflight_steps();
        let Some(charge) = &mut self.charge else { return };
        if charge.amount(ShareCount::Inflight) > steps {
            charge.set(ShareCount::Inflight, steps);
        }
    }

    fn inflight_steps(&self) -> u64 {
        (self.flights.len() as u64).next_multiple_of(INFLIGHT_STEP)
    }

    /// How many more messages may be in flight to a client with this `receive_maximum`: as many as it takes,
    /// as long as its tenant's share has room.
    pub(super) fn flight_room(&mut self, receive_maximum: u16) -> usize {
        let room = self.flights.room(receive_maximum);
        let (Some(charge), used) = (&mut self.charge, self.flights.len() as u64) else { return room };
        if room == 0 {
            return 0;
        }
        if used >= charge.amount(ShareCount::Inflight) {
            let _ = charge.try_take(ShareCount::Inflight, INFLIGHT_STEP);
        }
        let most = charge.amount(ShareCount::Inflight).max(INFLIGHT_PER_SESSION_MIN);
        room.min(usize::try_from(most.saturating_sub(used)).unwrap_or(room))
    }

    /// The end of the offsets that the session refers to.
    pub(super) fn end_offset(&self) -> Offset {
        let begin = self.subscriptions.iter().flatten().map(|subscription| subscription.from);
        let in_flight = self.flights.all_sent().into_iter().map(|(_, flight)| flight.offset + 1);
        begin.chain(in_flight).fold(self.position, Offset::max)
    }

    /// What is stored when the position or what is in flight has changed.
    pub(super) fn moved(&self) -> SessionStoreChange {
        let (uid, cursor, flights) = (self.uid, self.position, self.flights.to_stored());
        SessionStoreChange::MoveFlights { uid, cursor, flights }
    }

    /// What groups have to know about the session.
    pub(super) fn group_session(&self) -> GroupSession {
        GroupSession { uid: self.uid, expiry_s: self.expiry_s }
    }

    /// Whether the session outlives its connection.
    pub(super) fn is_durable(&self) -> bool {
        self.expiry_s > 0
    }

    /// The slot of the subscription with exactly this filter.
    pub(super) fn find_slot(&self, filter: &str) -> Option<usize> {
        self.subscriptions.iter().position(|s| s.as_ref().is_some_and(|s| s.filter == filter))
    }

    /// Whether the subscription in a slot has begun with this replay in an earlier connection: the client subscribes
    /// again as it does whenever it connects, and goes on where it was.
    pub(super) fn has_replayed(&self, slot: usize, replay: &Option<Box<str>>) -> bool {
        let subscription = self.subscriptions.get(slot).and_then(Option::as_ref);
        replay.is_some() && subscription.is_some_and(|s| !s.is_renewed && s.replay == *replay)
    }

    /// A free slot for a new subscription.
    pub(super) fn free_slot(&mut self) -> usize {
        self.subscriptions.iter().position(Option::is_none).unwrap_or_else(|| {
            if self.subscriptions.is_empty() {
                // Most sessions have one.
                self.subscriptions.reserve_exact(1);
            }
            self.subscriptions.push(None);
            self.subscriptions.len() - 1
        })
    }

    /// How many subscriptions the session has.
    pub(super) fn subscription_count(&self) -> usize {
        self.subscriptions.iter().flatten().count()
    }

    /// The part of the session that is kept on disk.
    pub(super) fn to_stored(&self, datasource: &DatasourceId, client_id: &str) -> StoredSession {
        let subscriptions = self.subscriptions.iter().flatten().map(|s| StoredSubscription {
            filter: s.filter.clone(),
            qos: s.qos,
            no_local: s.no_local,
            retain_as_published: s.retain_as_published,
            identifier: s.identifier,
            from: s.from,
            metadata: s.metadata,
            replay: s.replay.as_deref().map(str::to_owned),
        });
        StoredSession {
            uid: self.uid,
            datasource: datasource.clone(),
            client_id: client_id.to_owned(),
            expiry_s: self.expiry_s,
            ended_at: None,
            cursor: self.position,
            subscriptions: subscriptions.collect(),
            flights: self.flights.to_stored(),
        }
    }

    /// Restores a session from the disk or the bucket: what was in flight is sent again, and then everything from the
    /// cursor on.
    pub(super) fn from_stored(stored: StoredSession) -> Self {
        let subscriptions = stored.subscriptions.into_iter().map(|s| {
            Some(Subscription {
                filter: s.filter,
                qos: s.qos,
                no_local: s.no_local,
                retain_as_published: s.retain_as_published,
                metadata: s.metadata,
                identifier: s.identifier,
                from: s.from,
                replay: s.replay.map(Into::into),
                is_renewed: false,
            })
        });
        Self {
            uid: stored.uid,
            expiry_s: stored.expiry_s,
            stored: true,
            ever_stayed: true,
            subscriptions: subscriptions.collect(),
            position: stored.cursor,
            flights: Flights::from_stored(&stored.flights),
            charge: None,
            groups: Vec::new(),
        }
    }

    /// What another node needs to continue the session.
    pub(super) fn into_handover(self, datasource: &DatasourceId, client_id: &str) -> SessionHandover {
        SessionHandover { session: self.to_stored(datasource, client_id) }
    }

    /// Restores a session from another node.
    pub(super) fn from_handover(handed: SessionHandover) -> Self {
        Self::from_stored(handed.session)
    }
}

#[cfg(test)]
mod tests {
    use super::super::flights::FlightAck;
    use super::*;
    use crate::consume::subscriber::sessions::FlightOrigin;

    #[test]
    fn a_session_gives_back_what_it_took_however_it_ends() {
        let share = TenantShare::alone();
        let counts = || ShareCount::ALL.map(|what| share.count(what));
        let mut session = MqttSession::new(1, 60);
        session.charge_present(&share);
        session.charge_filter("a/b/c").expect("room");
        session.charge_filter("#").expect("room");
        session.discharge_filter("a/b/c");
        assert_eq!((share.count(ShareCount::Subscriptions), session.flight_room(100)), (1, 100));
        assert_eq!(share.count(ShareCount::SubscriptionBytes), filter_bytes("#"));
        share.set_max(ShareCount::SubscriptionBytes, filter_bytes("#"));
        let over = session.charge_filter("b").expect_err("no room");
        assert_eq!(
            (over, share.count(ShareCount::Subscriptions)),
            (ShareExceeded(ShareCount::SubscriptionBytes), 1)
        );
        drop(session);
        assert_eq!(counts(), [0; ShareCount::ALL.len()]);
    }

    #[test]
    fn a_session_always_has_a_little_room_in_flight() {
        let share = TenantShare::alone();
        share.set_max(ShareCount::Inflight, INFLIGHT_STEP);
        let mut sessions = [1, 2].map(|uid| MqttSession::new(uid, 60));
        sessions.iter_mut().for_each(|session| session.charge_present(&share));
        let [step, least] =
            [INFLIGHT_STEP, INFLIGHT_PER_SESSION_MIN].map(|count| usize::try_from(count).expect("small"));
        assert_eq!(sessions[0].flight_room(1000), step);
        assert_eq!(sessions[1].flight_room(1000), least, "the other has it all");
        let push = |offset| sessions[0].flights.push(offset, FlightOrigin::Log, 1);
        let ids: Vec<u16> = (0..INFLIGHT_STEP).map(push).collect();
        assert_eq!(sessions[0].flight_room(1000), 0);
        let mut acknowledge = |id| sessions[0].flights.acknowledge(id, FlightAck::Puback).expect("QoS 1");
        ids.into_iter().for_each(|id| _ = acknowledge(id));
        sessions[0].charge_flights();
        assert_eq!(sessions[1].flight_room(1000), step, "it is free again");
    }

    #[test]
    fn a_shared_subscription_names_a_group_and_a_filter() {
        let parsed = SubscriptionFilter::parse("$share/workers/a/+").expect("shared");
        assert_eq!(parsed.group.as_deref(), Some("workers"));
        assert_eq!(parsed.filter, TopicFilter::new("a/+").expect("a filter"));
        assert_eq!(SubscriptionFilter::parse("a/#").expect("plain").group, None);
        for bad in
            ["$share/workers", "$share/workers/", "$share//a", "$share/w+/a", "$share/#/a", "$share/w/a#", ""]
        {
            assert_eq!(SubscriptionFilter::parse(bad), None, "{bad:?}");
        }
    }
}
