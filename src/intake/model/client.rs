//! The clients of a model run: what they have sent, and what they believe of it.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use crate::intake::{AdmittedDraft, Exchange};

/// The number of a message, which is in its payload.
pub(super) type MessageNumber = u64;

/// What the model knows of a message.
#[derive(Clone)]
pub(super) struct ModelMessage {
    pub(super) tenant: usize,
    pub(super) connection: usize,
    pub(super) id: Option<String>,
    /// The exchange, and how many the packet identifier has had before.
    pub(super) exchange: Option<(Exchange, u32)>,
    /// Whether it meets the schema.
    pub(super) good: bool,
    /// How often it was sent.
    pub(super) attempts: u32,
    /// It was answered with a no for good, or with one that its client does not follow by another attempt.
    pub(super) refused: bool,
}

impl ModelMessage {
    /// Its payload.
    pub(super) fn payload(&self, number: MessageNumber) -> String {
        let quoted = if self.good { "" } else { "\"" };
        format!("{{\"n\": {quoted}{number}{quoted}}}")
    }

    /// Whether the two have an id in common.
    pub(super) fn shares_id(&self, other: &Self) -> bool {
        let same_id = self.tenant == other.tenant && self.id.is_some() && self.id == other.id;
        let exchange = |message: &Self| message.exchange.map(|(exchange, _)| exchange);
        same_id || (self.exchange.is_some() && exchange(self) == exchange(other))
    }
}

/// What a client believes of a packet identifier.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum ClientExchange {
    /// It waits for the answer to this message.
    Sent(MessageNumber),
    /// It has lost its connection while it waited, and sends this message again.
    Unanswered(MessageNumber),
    Open,
}

/// What was said of a message when it was checked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PushedAs {
    LetIn,
    Quarantined,
    /// It is refused unless the log knows it.
    Asked,
}

/// A message in a draft.
#[derive(Clone, Copy)]
pub(super) struct DraftedMessage {
    pub(super) number: MessageNumber,
    pub(super) origin: usize,
    /// Its place among those of its origin.
    pub(super) place: usize,
    pub(super) pushed_as: PushedAs,
    /// How many exchanges its tenant may have open at that time, with itself.
    pub(super) maybe_open: usize,
}

/// A draft on its way into the log.
pub(super) struct PendingDraft {
    pub(super) admitted: AdmittedDraft,
    pub(super) messages: Vec<DraftedMessage>,
}

#[derive(Default)]
pub(super) struct ModelConnection {
    /// By packet identifier; others are free.
    pub(super) exchanges: BTreeMap<u16, ClientExchange>,
    /// How many exchanges each packet identifier has had.
    rounds: HashMap<u16, u32>,
    /// The packet identifiers whose exchange the log may have open.
    pub(super) maybe_open: HashSet<u16>,
    /// Drafts that are not answered.
    pub(super) pending: VecDeque<PendingDraft>,
}

impl ModelConnection {
    /// The packet identifier may be used for another message.
    pub(super) fn free(&mut self, packet_id: u16) {
        self.exchanges.remove(&packet_id);
        *self.rounds.entry(packet_id).or_default() += 1;
    }

    pub(super) fn round(&self, packet_id: u16) -> u32 {
        self.rounds.get(&packet_id).copied().unwrap_or_default()
    }

    /// The connection is lost, and with it the answers that the client waits for.
    pub(super) fn lose_answers(&mut self) {
        self.pending.clear();
        for state in self.exchanges.values_mut() {
            if let ClientExchange::Sent(number) = *state {
                *state = ClientExchange::Unanswered(number);
            }
        }
    }
}
