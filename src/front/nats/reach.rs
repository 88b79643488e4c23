//! Whether a client that was let in with its key can hear an answer. Its account hides the reply subject from the
//! gateway, which sees what the server puts in its place. So the gateway looks, once in a while, at what that
//! connection is subscribed to: a client with an inbox that it may not subscribe to has no subscription for answers.
//! What it sends would be kept and never answered, so it would send it again and again; it is refused instead.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use headgate_bridge_nats::system::SystemAccount;
use parking_lot::Mutex;

use super::attested::AttestedSender;
use crate::limits::NATS_LET_IN_CLIENTS_MAX;

/// After how long a client that could hear no answer is looked at again: it may have subscribed since.
const REACH_CHECK_AFTER: Duration = Duration::from_secs(1);

/// After how long one that hears answers is: a server that was begun again has other clients under its numbers.
const REACH_KNOWN_FOR: Duration = Duration::from_secs(60);

/// After how long a server that gave no answer is asked again. The client's messages wait for the answer.
const REACH_ASKED_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// A connection: the name of its server, and its number there.
type ClientPlace = (Box<str>, u64);

/// What is known of clients.
pub(super) struct NatsClientReach {
    system: SystemAccount,
    known: Mutex<HashMap<ClientPlace, ClientReach>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ClientReach {
    /// The server was asked at this time. Nobody may wait for the answer any more.
    Asked(Instant),
    /// It had a subscription for answers at this time.
    Reached(Instant),
    /// Its server gave no answer at this time: it has the benefit of the doubt.
    Unknown(Instant),
    /// It had no subscription for answers at this time.
    Deaf(Instant),
}

impl NatsClientReach {
    pub(super) fn new(system: SystemAccount) -> Arc<Self> {
        Arc::new(Self { system, known: Mutex::default() })
    }

    /// Whether the client is known to hear no answer.
    pub(super) fn is_deaf(&self, sender: &AttestedSender) -> bool {
        let place = (sender.server.clone(), sender.client_id);
        matches!(self.known.lock().get(&place), Some(ClientReach::Deaf(_)))
    }

    /// What has to be done before a message of this client is judged: `None` if nothing has.
    pub(super) fn look(self: &Arc<Self>, sender: &AttestedSender) -> Option<BoxFuture<'static, ()>> {
        let (place, now) = ((sender.server.clone(), sender.client_id), Instant::now());
        let mut known = self.known.lock();
        if known.get(&place).is_some_and(|reach| reach.holds_at(now)) {
            return None;
        }
        if self.system.trouble().is_some() || sender.server.is_empty() {
            return None;
        }
        if known.len() >= NATS_LET_IN_CLIENTS_MAX {
            // Whoever is asked about has messages that wait for it.
            known.retain(|_, reach| matches!(reach, ClientReach::Asked(_)) && reach.holds_at(now));
        }
        known.insert(place.clone(), ClientReach::Asked(now));
        drop(known);
        let reach = self.clone();
        Some(Box::pin(async move {
            let (server, client_id) = &place;
            let subscriptions = reach.system.subscriptions(server, *client_id).await;
            let found = ClientReach::judge(subscriptions.as_deref(), Instant::now());
            reach.known.lock().insert(place, found);
        }))
    }
}

impl ClientReach {
    /// Whether nobody has to be asked.
    fn holds_at(self, now: Instant) -> bool {
        let (at, holds_for) = match self {
            Self::Reached(at) => (at, REACH_KNOWN_FOR),
            Self::Asked(at) | Self::Unknown(at) => (at, REACH_ASKED_AGAIN_AFTER),
            Self::Deaf(at) => (at, REACH_CHECK_AFTER),
        };
        now.duration_since(at) < holds_for
    }

    /// By what a client is subscribed to; `None` if its server has not answered.
    fn judge(subscriptions: Option<&[String]>, at: Instant) -> Self {
        match subscriptions {
            None => Self::Unknown(at),
            Some(subjects) if subjects.iter().any(|one| is_for_answers(one)) => Self::Reached(at),
            Some(_) => Self::Deaf(at),
        }
    }
}

/// Whether a subscription is for answers: a client may subscribe to the stream and to inboxes alone.
fn is_for_answers(subject: &str) -> bool {
    subject.split('.').next() != Some("stream")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer that did not come once, or a client that had the number before, let one that hears nothing send for ever.
    #[test]
    fn whatever_is_known_of_a_client_is_asked_again() {
        let now = Instant::now();
        let judge = |subjects: &[&str]| {
            let subjects: Vec<String> = subjects.iter().map(|subject| (*subject).to_owned()).collect();
            ClientReach::judge(Some(&subjects), now)
        };
        assert_eq!(judge(&["stream.press-4.>", "_INBOX.a.*"]), ClientReach::Reached(now));
        assert_eq!(judge(&["stream.press-4.>"]), ClientReach::Deaf(now));
        let unknown = ClientReach::judge(None, now);
        assert_eq!(unknown, ClientReach::Unknown(now));
        let asked = ClientReach::Asked(now);
        for (reach, holds_for) in [(judge(&["_INBOX.a.*"]), 60), (unknown, 10), (asked, 10), (judge(&[]), 1)]
        {
            assert!(reach.holds_at(now + Duration::from_millis(holds_for * 1000 - 1)), "{reach:?}");
            assert!(!reach.holds_at(now + Duration::from_secs(holds_for)), "{reach:?}");
        }
    }
}
