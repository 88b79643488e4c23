//! The queue of a client's connections: those that wait for an earlier one to leave, or are asked whether they may enter,
//! enter in the order in which they came. A client that connects again before it was answered is that of its latest
//! connection, whichever task runs first.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

use super::{ClientEntry, ClientKey, Sessions};

/// The connections of one client that wait.
#[derive(Default)]
pub(super) struct ClientQueue {
    next_ticket: u64,
    tickets: VecDeque<u64>,
    /// Notified when the client's entry has changed.
    moved: Arc<Notify>,
}

/// A place in the queue. Dropping it gives it up.
pub(super) struct QueuePlace {
    sessions: Arc<Sessions>,
    key: ClientKey,
    /// `None`: it was left.
    ticket: Option<u64>,
}

impl Sessions {
    /// Waits in the queue of a client for a change of its entry.
    pub(super) fn wait_in_queue(
        self: &Arc<Self>,
        key: &ClientKey,
        entry: &mut ClientEntry,
        place: &mut Option<QueuePlace>,
    ) -> OwnedNotified {
        let queue = entry.queue.get_or_insert_default();
        place.get_or_insert_with(|| {
            let ticket = queue.next_ticket;
            queue.next_ticket += 1;
            queue.tickets.push_back(ticket);
            QueuePlace { sessions: self.clone(), key: key.clone(), ticket: Some(ticket) }
        });
        queue.moved.clone().notified_owned()
    }
}

impl ClientEntry {
    /// Whether a connection may enter now that none is there.
    pub(super) fn is_turn_of(&self, place: Option<&QueuePlace>) -> bool {
        let first = self.queue.as_ref().and_then(|queue| queue.tickets.front());
        first.is_none_or(|first| place.is_some_and(|place| place.ticket == Some(*first)))
    }

    /// Gives up a place for the client's own. Returns whether others wait.
    pub(super) fn leave_queue(&mut self, place: Option<&mut QueuePlace>) -> bool {
        let ticket = place.and_then(|place| place.ticket.take());
        let Some(queue) = &mut self.queue else { return false };
        queue.tickets.retain(|waiting| Some(*waiting) != ticket);
        if queue.tickets.is_empty() {
            // A connected client holds no queue. Who waits without a place looks again.
            queue.moved.notify_waiters();
            self.queue = None;
        }
        self.queue.is_some()
    }

    /// Resolves when the entry has changed.
    pub(super) fn moved(&mut self) -> OwnedNotified {
        self.queue.get_or_insert_default().moved.clone().notified_owned()
    }

    /// Tells those that wait that the entry has changed. Returns whether it is still needed.
    pub(super) fn note_move(&mut self) -> bool {
        if let Some(queue) = &self.queue {
            queue.moved.notify_waiters();
            if queue.tickets.is_empty() {
                self.queue = None;
            }
        }
        self.queue.is_some() || self.connected.is_some() || self.away.is_some()
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let mut clients = self.sessions.lock_clients();
        let Some(entry) = clients.entries.get_mut(&self.key) else { return };
        if let Some(queue) = &mut entry.queue {
            queue.tickets.retain(|waiting| *waiting != ticket);
        }
        if !entry.note_move() {
            clients.entries.remove(&self.key);
        }
    }
}
