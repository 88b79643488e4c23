//! The flights of a stored session: what its client was sent and has not acknowledged, with the packet
//! identifiers, so that a restart sends exactly that again and nothing else (MQTT 5 section 4.4).
//!
//! Everything below the session's cursor was sent. What of it is not among the flights is done, so the set of
//! acknowledged records needs no form of its own, and is never longer than what a client may have outstanding.

use serde::{Deserialize, Serialize};

use crate::message::Offset;

/// The first byte of the flights in a row of a database; [postcard](https://postcard.jamesmunns.com/wire-format)
/// follows.
const FLIGHTS_VERSION: u8 = 1;

/// Where a message that is in flight came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FlightOrigin {
    /// The session's own subscriptions.
    Log,
    /// The retained messages.
    Retained,
    /// A group, which has given it to this session for good: a QoS 2 message.
    Shared,
    /// The group of the subscription in this slot, which gives it to another session if this one leaves. Not stored.
    Group(u32),
}

/// One message that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredFlight {
    /// From 1; no two flights of a session have the same.
    pub packet_id: u16,
    /// The record.
    pub offset: Offset,
    /// 1 or 2.
    pub qos: u8,
    /// Where it came from.
    pub origin: FlightOrigin,
}

/// All that a session's client has not acknowledged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredFlights {
    /// The packet identifier that was given last; 0 if none was.
    pub last_id: u16,
    /// The messages without a PUBACK or PUBREC, oldest first.
    pub sent: Vec<StoredFlight>,
    /// The packet identifiers of QoS 2 messages that the client has, and whose PUBREL it has not answered, in the order
    /// of the PUBRECs.
    pub released: Vec<u16>,
}

impl StoredFlights {
    /// Whether nothing is in flight.
    pub fn is_empty(&self) -> bool {
        self.sent.is_empty() && self.released.is_empty()
    }

    /// About how many bytes they take, encoded.
    pub(super) fn encoded_bytes(&self) -> usize {
        // A packet identifier has up to 3 bytes, an offset mostly 5.
        8 + 12 * self.sent.len() + 3 * self.released.len()
    }

    /// Forgets the messages from `end` on, which the log does not have.
    pub(super) fn set_back(&mut self, end: Offset) {
        self.sent.retain(|flight| flight.offset < end);
    }

    /// For a row of a database; `None` if there is nothing to keep.
    pub(super) fn to_bytes(&self) -> Option<Vec<u8>> {
        let bytes = || postcard::to_extend(self, vec![FLIGHTS_VERSION]).expect("plain values, into memory");
        (!self.is_empty()).then(bytes)
    }

    /// `None`: the bytes are damaged, or of a newer version.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match bytes.split_first()? {
            (&FLIGHTS_VERSION, rest) => postcard::from_bytes(rest).ok(),
            _ => None,
        }
    }
}
