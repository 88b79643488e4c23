//! A session: what a client and the gateway know of each other, whatever its connection does
//! (MQTT 5 section 4.1): subscriptions, a place in the log, messages in flight.

use serde::{Deserialize, Serialize};

use super::flights::Flights;
use crate::consume::subscriber::GroupSession;
use crate::consume::subscriber::sessions::{StoredSession, StoredSubscription};
use crate::filter::TopicFilter;
use crate::message::{DatasourceId, Offset};

/// One client's.
#[derive(Debug)]
pub(super) struct Session {
    /// No other session has or had the same.
    pub(super) uid: u64,
    /// How long it lives on without a connection, in seconds: 0 ends it with its connection,
    /// `u32::MAX` never.
    pub(super) expiry_s: u32,
    /// It is on the disk, or on its way there.
    pub(super) stored: bool,
    /// It was to outlive a connection, at some time.
    pub(super) ever_stayed: bool,
    /// By slot. What is given up leaves a gap, so that a slot stays the same subscription's.
    pub(super) subscriptions: Vec<Option<Subscription>>,
    /// Everything below is given out, if perhaps not acknowledged; as it was when the last connection
    /// ended.
    pub(super) position: Offset,
    pub(super) flights: Flights,
}

/// One subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Subscription {
    /// As the client gave it.
    pub(super) filter: String,
    /// 0 or 1.
    pub(super) qos: u8,
    pub(super) no_local: bool,
    pub(super) retain_as_published: bool,
    pub(super) identifier: Option<u32>,
    /// The first record wanted.
    pub(super) from: Offset,
}

/// A session on its way to another node.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct HandedOver {
    session: StoredSession,
    position: Offset,
    flights: Flights,
}

impl HandedOver {
    /// Whether this is the session that was kept, as it was last. What a node hands over that was cut off
    /// while another one had the session is not.
    pub(super) fn is(&self, kept: &StoredSession) -> bool {
        let of = |session: &StoredSession| (session.uid, session.cursor);
        of(&self.session) == of(kept) && self.session.subscriptions == kept.subscriptions
    }
}

/// A filter that a client subscribes to, understood: `$share/{group}/{filter}` or a plain one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// The group's name, if it is shared.
    pub(super) group: Option<String>,
    pub(super) filter: TopicFilter,
}

impl Wanted {
    /// `None` if it is no topic filter, or no name of a group (sections 4.7 and 4.8.2).
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

impl Session {
    /// A session without anything, of which no other has the `uid`.
    pub(super) fn new(uid: u64, expiry_s: u32) -> Self {
        let flights = Flights::default();
        let (stored, ever_stayed, subscriptions) = (false, expiry_s > 0, Vec::new());
        Self { uid, expiry_s, stored, ever_stayed, subscriptions, position: 0, flights }
    }

    /// The first record that is not dealt with.
    pub(super) fn cursor(&self) -> Offset {
        self.flights.lowest().map_or(self.position, |lowest| lowest.min(self.position))
    }

    /// How far it reaches: it knows of no offset from here on.
    pub(super) fn reaches(&self) -> Offset {
        let begin = self.subscriptions.iter().flatten().map(|subscription| subscription.from);
        begin.fold(self.position, Offset::max)
    }

    /// What its groups have to know of it.
    pub(super) fn of_groups(&self) -> GroupSession {
        GroupSession { uid: self.uid, expiry_s: self.expiry_s }
    }

    /// Whether it lives on without a connection.
    pub(super) fn is_durable(&self) -> bool {
        self.expiry_s > 0
    }

    /// The subscription to this very filter, and its slot.
    pub(super) fn find(&self, filter: &str) -> Option<usize> {
        self.subscriptions.iter().position(|s| s.as_ref().is_some_and(|s| s.filter == filter))
    }

    /// Where a new subscription goes.
    pub(super) fn free_slot(&mut self) -> usize {
        self.subscriptions.iter().position(Option::is_none).unwrap_or_else(|| {
            self.subscriptions.push(None);
            self.subscriptions.len() - 1
        })
    }

    /// How many subscriptions it has.
    pub(super) fn subscribed(&self) -> usize {
        self.subscriptions.iter().flatten().count()
    }

    /// What is kept of it on the disk.
    pub(super) fn to_stored(&self, datasource: &DatasourceId, client_id: &str) -> StoredSession {
        let subscriptions = self.subscriptions.iter().flatten().map(|s| StoredSubscription {
            filter: s.filter.clone(),
            qos: s.qos,
            no_local: s.no_local,
            retain_as_published: s.retain_as_published,
            identifier: s.identifier,
            from: s.from,
        });
        StoredSession {
            uid: self.uid,
            datasource: datasource.clone(),
            client_id: client_id.to_owned(),
            expiry_s: self.expiry_s,
            ended_at: None,
            cursor: self.cursor(),
            subscriptions: subscriptions.collect(),
        }
    }

    /// What was kept, at a start of the gateway. Which messages were in flight is not known any
    /// more: they are sent again, from the cursor on.
    pub(super) fn from_stored(stored: StoredSession) -> Self {
        let subscriptions = stored.subscriptions.into_iter().map(|s| {
            Some(Subscription {
                filter: s.filter,
                qos: s.qos,
                no_local: s.no_local,
                retain_as_published: s.retain_as_published,
                identifier: s.identifier,
                from: s.from,
            })
        });
        Self {
            uid: stored.uid,
            expiry_s: stored.expiry_s,
            stored: true,
            ever_stayed: true,
            subscriptions: subscriptions.collect(),
            position: stored.cursor,
            flights: Flights::default(),
        }
    }

    /// What another node needs to go on with it.
    pub(super) fn into_handed(self, datasource: &DatasourceId, client_id: &str) -> HandedOver {
        let session = self.to_stored(datasource, client_id);
        HandedOver { session, position: self.position, flights: self.flights }
    }

    /// What another node had. Unlike what was kept it still knows which messages are in flight.
    pub(super) fn from_handed(handed: HandedOver) -> Self {
        let HandedOver { session, position, flights } = handed;
        let kept = Self::from_stored(session);
        if flights.are_sound() { Self { position, flights, ..kept } } else { kept }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_subscription_names_a_group_and_a_filter() {
        let parsed = Wanted::parse("$share/workers/a/+").expect("shared");
        assert_eq!(parsed.group.as_deref(), Some("workers"));
        assert_eq!(parsed.filter, TopicFilter::new("a/+").expect("a filter"));
        assert_eq!(Wanted::parse("a/#").expect("plain").group, None);
        for bad in
            ["$share/workers", "$share/workers/", "$share//a", "$share/w+/a", "$share/#/a", "$share/w/a#", ""]
        {
            assert_eq!(Wanted::parse(bad), None, "{bad:?}");
        }
    }
}
