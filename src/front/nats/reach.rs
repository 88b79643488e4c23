//! Whether a client that was let in with its key can hear an answer. Its account hides the reply subject from the
//! gateway, which sees what the server puts in its place. So the gateway looks, once for a connection, at what that
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

/// A connection: the name of its server, and its number there.
type ClientPlace = (Box<str>, u64);

/// What is known of clients.
pub(super) struct NatsClientReach {
    system: SystemAccount,
    known: Mutex<HashMap<ClientPlace, ClientReach>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ClientReach {
    /// The server is being asked.
    Asked,
    /// It hears answers, or nobody knows.
    Reached,
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
        let place = (sender.server.clone(), sender.client_id);
        let mut known = self.known.lock();
        match known.get(&place) {
            Some(ClientReach::Asked | ClientReach::Reached) => return None,
            Some(ClientReach::Deaf(at)) if at.elapsed() < REACH_CHECK_AFTER => return None,
            _ => {}
        }
        if self.system.trouble().is_some() || sender.server.is_empty() {
            return None;
        }
        if known.len() >= NATS_LET_IN_CLIENTS_MAX {
            // Whoever is asked about has messages that wait for it.
            known.retain(|_, reach| *reach == ClientReach::Asked);
        }
        known.insert(place.clone(), ClientReach::Asked);
        drop(known);
        let reach = self.clone();
        Some(Box::pin(async move {
            let (server, client_id) = &place;
            let subscriptions = reach.system.subscriptions(server, *client_id).await;
            // Without an answer of the server the client has the benefit of the doubt.
            let is_deaf =
                subscriptions.is_some_and(|subjects| !subjects.iter().any(|one| is_for_answers(one)));
            let found = if is_deaf { ClientReach::Deaf(Instant::now()) } else { ClientReach::Reached };
            reach.known.lock().insert(place, found);
        }))
    }
}

/// Whether a subscription is for answers: a client may subscribe to the stream and to inboxes alone.
fn is_for_answers(subject: &str) -> bool {
    subject.split('.').next() != Some("stream")
}
