//! The QoS 2 exchanges of a connection, from PUBLISH to PUBCOMP: the table follows what the log has
//! answered, and never runs ahead of it. A packet about an exchange that waits for an answer of the log has
//! to wait for it too: only then is it known what the packet means.

use std::collections::BTreeMap;

/// The state of an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExchangeState {
    /// Its message is on its way into the log, and the PUBREC waits.
    Opening,
    /// The log has its message, and a PUBREC said so. The client has not released it.
    Open,
    /// Its release is on its way into the log, and the PUBCOMP waits.
    Releasing,
}

/// The exchanges that this connection opened, by packet identifier. The log knows those of earlier
/// connections.
#[derive(Debug, Default)]
pub(super) struct ExchangeTable {
    states: BTreeMap<u16, ExchangeState>,
    releasing: usize,
}

impl ExchangeTable {
    /// The state of an exchange, if the connection knows it.
    pub(super) fn state(&self, packet_id: u16) -> Option<ExchangeState> {
        self.states.get(&packet_id).copied()
    }

    /// How many messages are not released: the client counts them as not acknowledged.
    pub(super) fn unreleased(&self) -> usize {
        self.states.len() - self.releasing
    }

    /// A message that opens an exchange is on its way into the log.
    pub(super) fn begin_open(&mut self, packet_id: u16) {
        self.states.insert(packet_id, ExchangeState::Opening);
    }

    /// A message opens an exchange that the log is not to have.
    pub(super) fn open_unkept(&mut self, packet_id: u16) {
        self.states.insert(packet_id, ExchangeState::Open);
    }

    /// The log has answered: it has the message, or it does not, and then there is no exchange.
    pub(super) fn settle_open(&mut self, packet_id: u16, kept: bool) {
        // A repetition may be answered when the client has released it already.
        if self.state(packet_id) == Some(ExchangeState::Releasing) {
            return;
        }
        if kept {
            self.states.insert(packet_id, ExchangeState::Open);
        } else {
            self.states.remove(&packet_id);
        }
    }

    /// A release is on its way into the log.
    pub(super) fn begin_release(&mut self, packet_id: u16) {
        self.states.insert(packet_id, ExchangeState::Releasing);
        self.releasing += 1;
    }

    /// The log has the release: the packet identifier may be used for another message.
    pub(super) fn settle_release(&mut self, packet_id: u16) {
        if self.state(packet_id) == Some(ExchangeState::Releasing) {
            self.states.remove(&packet_id);
            self.releasing -= 1;
        }
    }

    /// The packet identifiers of all exchanges.
    pub(super) fn packet_ids(&self) -> impl Iterator<Item = u16> {
        self.states.keys().copied()
    }
}
