//! Flights: the QoS 1 messages that a subscriber was sent and has not acknowledged, with their
//! packet identifiers.
//!
//! Identifiers are assigned in sequence, so the identifier in an acknowledgement gives the message's
//! position in the queue. They stay with the session: a client that reconnects is sent the same
//! messages with the same identifiers (MQTT 5 section 4.4).

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::limits::MQTT_FLIGHTS_MAX;
use crate::message::Offset;

/// Where a message that is in flight came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FlightSource {
    /// The session's own feed.
    Log,
    /// The retained messages.
    Retained,
    /// The group of the subscription in this slot.
    Group(u32),
}

/// One message in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MqttFlight {
    pub(super) offset: Offset,
    pub(super) source: FlightSource,
    acknowledged: bool,
}

/// The messages in flight, oldest first.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Flights {
    /// The packet identifier of the first message in the queue, or of the next one if it is empty.
    first_id: u16,
    queue: VecDeque<MqttFlight>,
    unacknowledged: usize,
}

impl Default for Flights {
    fn default() -> Self {
        Self { first_id: 1, queue: VecDeque::new(), unacknowledged: 0 }
    }
}

impl Flights {
    /// How many more messages a client with this `receive_maximum` may be sent.
    pub(super) fn room(&self, receive_maximum: u16) -> usize {
        let window = usize::from(receive_maximum).min(MQTT_FLIGHTS_MAX).saturating_sub(self.unacknowledged);
        // Acknowledged messages stay behind an unacknowledged one: this bounds the queue.
        window.min((2 * MQTT_FLIGHTS_MAX).saturating_sub(self.queue.len()))
    }

    /// Adds a message and returns its packet identifier.
    pub(super) fn push(&mut self, offset: Offset, source: FlightSource) -> u16 {
        let id = self.packet_id_at(self.queue.len());
        self.queue.push_back(MqttFlight { offset, source, acknowledged: false });
        self.unacknowledged += 1;
        id
    }

    /// Marks a message as acknowledged. `None` if no message with that identifier is in flight.
    pub(super) fn acknowledge(&mut self, packet_id: u16) -> Option<MqttFlight> {
        // Identifiers run from 1 to 65,535 and wrap to 1.
        let from_first = (u32::from(packet_id) + 65_535 - u32::from(self.first_id)) % 65_535;
        let flight = self.queue.get_mut(from_first as usize)?;
        if packet_id == 0 || std::mem::replace(&mut flight.acknowledged, true) {
            return None;
        }
        let flight = *flight;
        self.unacknowledged -= 1;
        while self.queue.front().is_some_and(|first| first.acknowledged) {
            self.queue.pop_front();
            self.first_id = self.packet_id_at(1);
        }
        if self.queue.is_empty() {
            // An idle connection holds no queue.
            self.queue = VecDeque::new();
        }
        Some(flight)
    }

    /// The unacknowledged messages with their packet identifiers, oldest first.
    pub(super) fn unacknowledged(&self) -> impl Iterator<Item = (u16, MqttFlight)> {
        let all = self.queue.iter().enumerate();
        all.filter(|(_, flight)| !flight.acknowledged).map(|(nth, flight)| (self.packet_id_at(nth), *flight))
    }

    /// The lowest unacknowledged offset from the session's own feed.
    pub(super) fn lowest_log_offset(&self) -> Option<Offset> {
        let own =
            self.queue.iter().filter(|flight| !flight.acknowledged && flight.source == FlightSource::Log);
        own.map(|flight| flight.offset).min()
    }

    /// Whether the fields agree; they may come from another node.
    pub(super) fn is_consistent(&self) -> bool {
        let unacknowledged = self.queue.iter().filter(|flight| !flight.acknowledged).count();
        self.first_id > 0
            && self.queue.len() <= 2 * MQTT_FLIGHTS_MAX
            && self.unacknowledged == unacknowledged
            && self.queue.front().is_none_or(|first| !first.acknowledged)
    }

    /// How many messages the queue holds, acknowledged ones behind an unacknowledged one included.
    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.unacknowledged == 0
    }

    /// The packet identifier of the `nth` message in the queue.
    fn packet_id_at(&self, nth: usize) -> u16 {
        let id = (usize::from(self.first_id) - 1 + nth) % 65_535 + 1;
        u16::try_from(id).expect("at most 65,535")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_go_round_and_each_finds_its_message() {
        let mut flights = Flights::default();
        let mut waiting = VecDeque::new();
        for offset in 0..200_000 {
            let id = flights.push(offset, FlightSource::Log);
            assert_ne!(id, 0);
            waiting.push_back((id, offset));
            if waiting.len() > 100 {
                // Not quite in order.
                let (id, offset) = waiting.remove(usize::from(id % 7)).expect("there are 100");
                assert_eq!(flights.acknowledge(id).map(|flight| flight.offset), Some(offset));
                assert_eq!(flights.acknowledge(id), None, "only once");
            }
            assert_eq!(flights.lowest_log_offset(), waiting.iter().map(|(_, offset)| *offset).min());
        }
        let left: Vec<_> = flights.unacknowledged().map(|(id, flight)| (id, flight.offset)).collect();
        assert_eq!(left, Vec::from(waiting));
    }

    #[test]
    fn an_identifier_that_is_not_in_flight_is_nobodys() {
        let mut flights = Flights::default();
        assert_eq!(flights.acknowledge(1), None);
        let id = flights.push(5, FlightSource::Retained);
        assert_eq!(flights.acknowledge(id + 1), None);
        assert_eq!(flights.acknowledge(0), None);
        assert!(flights.acknowledge(id).is_some() && flights.is_empty());
    }

    #[test]
    fn no_more_are_in_flight_than_the_client_takes() {
        let mut flights = Flights::default();
        let ids: Vec<u16> = (0..3).map(|offset| flights.push(offset, FlightSource::Log)).collect();
        assert_eq!((flights.room(3), flights.room(4)), (0, 1));
        flights.acknowledge(ids[1]);
        assert_eq!(flights.room(3), 1);
    }
}
