//! Flights: the QoS 1 and QoS 2 messages that a subscriber was sent and has not acknowledged, with their packet
//! identifiers.
//!
//! Identifiers are assigned in sequence, and those in use are left out. So the identifier in an acknowledgement
//! mostly gives the message's position in the queue of the latest ones. Whatever stays behind is taken out of the
//! queue, so that one message which is never acknowledged costs no more than itself. A QoS 2 message whose PUBREC
//! has come is an identifier that waits for its PUBCOMP, and nothing more.
//!
//! Identifiers stay with the session: a client that reconnects is sent the same messages with the same identifiers
//! (MQTT 5 section 4.4), also by a gateway that was started again ([`StoredFlights`]).

use std::collections::{BTreeMap, VecDeque};

use super::codec::Violation;
use crate::consume::subscriber::sessions::{FlightOrigin, StoredFlight, StoredFlights};
use crate::limits::MQTT_FLIGHTS_MAX;
use crate::message::Offset;

/// The queue may have so many acknowledged messages, and as many again as there are others.
const ACKNOWLEDGED_KEPT: usize = 64;

/// One message in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MqttFlight {
    pub(super) offset: Offset,
    pub(super) origin: FlightOrigin,
    /// 1 or 2.
    pub(super) qos: u8,
}

/// What a client says of a message that it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FlightAck {
    Puback,
    /// It has the message, or refuses it.
    Pubrec {
        is_refusal: bool,
    },
    Pubcomp,
}

/// What an acknowledgement has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FlightStep {
    /// The client has the message, or wants none of it.
    Ended(MqttFlight),
    /// The client has the QoS 2 message: a PUBREL is due. `None`: it has said so before.
    Release(Option<MqttFlight>),
    /// The client has answered the PUBREL.
    Completed,
    /// No such message is in flight.
    Unknown,
}

/// The messages in flight of one session.
#[derive(Debug, Default)]
pub(super) struct Flights {
    /// The identifier that was given last; 0 if none was.
    last_id: u16,
    /// They have changed since [`Flights::take_changed`].
    has_changed: bool,
    /// `None` while nothing is in flight: an idle connection holds no queue.
    table: Option<Box<FlightTable>>,
}

#[derive(Debug, Default)]
struct FlightTable {
    /// The latest messages, with consecutive identifiers up to the last one; `None` if it is acknowledged, or the
    /// identifier was in use. The first is a message.
    recent: VecDeque<Option<MqttFlight>>,
    /// How many messages are in `recent`.
    recent_count: usize,
    /// Older ones, each with its place in the order of sending.
    old: BTreeMap<u16, (u64, MqttFlight)>,
    /// How many messages have become old ones.
    aged: u64,
    /// The identifiers of QoS 2 messages that wait for their PUBCOMP, in the order of the PUBRECs.
    released: VecDeque<u16>,
}

impl Flights {
    /// How many messages are in flight.
    pub(super) fn len(&self) -> usize {
        self.table.as_ref().map_or(0, |table| table.len())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.table.is_none()
    }

    /// How many more messages a client with this `receive_maximum` may be sent.
    pub(super) fn room(&self, receive_maximum: u16) -> usize {
        usize::from(receive_maximum).min(MQTT_FLIGHTS_MAX).saturating_sub(self.len())
    }

    /// Adds a message and returns its packet identifier. Only where there is [room](Flights::room).
    pub(super) fn push(&mut self, offset: Offset, origin: FlightOrigin, qos: u8) -> u16 {
        self.has_changed = true;
        let table = self.table.get_or_insert_default();
        loop {
            self.last_id = id_after(self.last_id, 1);
            if !table.is_in_use_elsewhere(self.last_id) {
                break;
            }
            if !table.recent.is_empty() {
                table.recent.push_back(None);
            }
        }
        table.recent.push_back(Some(MqttFlight { offset, origin, qos }));
        table.recent_count += 1;
        table.shorten_recent(self.last_id);
        self.last_id
    }

    /// The message with this identifier, unless its PUBREC has come.
    pub(super) fn sent(&self, packet_id: u16) -> Option<MqttFlight> {
        self.table.as_ref()?.sent(packet_id, self.last_id)
    }

    /// Handles an acknowledgement.
    ///
    /// # Errors
    /// A message of that QoS cannot have it, or not yet.
    pub(super) fn acknowledge(&mut self, packet_id: u16, ack: FlightAck) -> Result<FlightStep, Violation> {
        let Some(table) = &mut self.table else { return Ok(FlightStep::Unknown) };
        let is_released = table.released.contains(&packet_id);
        let step: fn(MqttFlight) -> FlightStep = match (table.sent(packet_id, self.last_id), ack) {
            (Some(MqttFlight { qos: 1, .. }), FlightAck::Puback) => FlightStep::Ended,
            (Some(MqttFlight { qos: 1, .. }), _) => {
                return Err(Violation::protocol("a PUBREC or PUBCOMP for a QoS 1 message"));
            }
            (Some(_), FlightAck::Pubrec { is_refusal: true }) => FlightStep::Ended,
            (Some(_), FlightAck::Pubrec { is_refusal: false }) => {
                table.released.push_back(packet_id);
                |flight| FlightStep::Release(Some(flight))
            }
            (Some(_), FlightAck::Puback) => {
                return Err(Violation::protocol("a PUBACK for a QoS 2 message"));
            }
            (Some(_), FlightAck::Pubcomp) => {
                return Err(Violation::protocol("a PUBCOMP for a QoS 2 message before its PUBREC"));
            }
            (None, FlightAck::Pubrec { is_refusal: false }) if is_released => {
                return Ok(FlightStep::Release(None));
            }
            (None, FlightAck::Pubcomp | FlightAck::Pubrec { .. }) if is_released => {
                table.released.retain(|id| *id != packet_id);
                self.has_changed = true;
                self.free_table();
                return Ok(FlightStep::Completed);
            }
            (None, FlightAck::Puback) if is_released => {
                return Err(Violation::protocol("a PUBACK for a QoS 2 message"));
            }
            (None, _) => return Ok(FlightStep::Unknown),
        };
        Ok(self.remove(packet_id).map_or(FlightStep::Unknown, step))
    }

    /// Takes out a message that is not sent again; of QoS 2 its identifier has to be released as well, since the
    /// client may have it. Returns whether that is so.
    pub(super) fn give_up(&mut self, packet_id: u16) -> bool {
        let is_released = self.sent(packet_id).is_some_and(|flight| flight.qos == 2);
        if is_released && let Some(table) = &mut self.table {
            table.released.push_back(packet_id);
        }
        self.remove(packet_id);
        is_released
    }

    /// Takes out the latest message that a group gave with this offset. The client was never sent it.
    pub(super) fn take_back(&mut self, offset: Offset) {
        let is_held = |(_, flight): &(u16, MqttFlight)| {
            flight.offset == offset && flight.origin == FlightOrigin::Shared
        };
        if let Some((packet_id, _)) = self.all_sent().into_iter().rfind(is_held) {
            self.remove(packet_id);
        }
    }

    fn remove(&mut self, packet_id: u16) -> Option<MqttFlight> {
        self.has_changed = true;
        let table = self.table.as_mut()?;
        let flight = table.remove(packet_id, self.last_id);
        table.shorten_recent(self.last_id);
        self.free_table();
        flight
    }

    /// Whether they have changed since the last call.
    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.has_changed)
    }

    /// Whether a QoS 2 message with this identifier waits for its PUBCOMP.
    pub(super) fn is_released(&self, packet_id: u16) -> bool {
        self.table.as_ref().is_some_and(|table| table.released.contains(&packet_id))
    }

    fn free_table(&mut self) {
        self.table.take_if(|table| table.len() == 0);
    }

    /// The messages without a PUBACK or PUBREC, with their packet identifiers, in the order in which they were sent.
    pub(super) fn all_sent(&self) -> Vec<(u16, MqttFlight)> {
        let Some(table) = &self.table else { return Vec::new() };
        let mut old: Vec<_> = table.old.iter().collect();
        old.sort_unstable_by_key(|(_, (age, _))| *age);
        let old = old.into_iter().map(|(id, (_, flight))| (*id, *flight));
        let first = id_before(self.last_id, table.recent.len().saturating_sub(1));
        let recent = table.recent.iter().enumerate();
        old.chain(recent.filter_map(|(nth, flight)| Some((id_after(first, nth), (*flight)?)))).collect()
    }

    /// The packet identifiers that wait for their PUBCOMP, in the order of the PUBRECs.
    pub(super) fn all_released(&self) -> Vec<u16> {
        self.table.as_ref().map_or(Vec::new(), |table| table.released.iter().copied().collect())
    }

    /// What is kept of them. Messages that a group gives to others are not.
    pub(super) fn to_stored(&self) -> StoredFlights {
        let sent = self.all_sent().into_iter().filter_map(|(packet_id, flight)| {
            let MqttFlight { offset, origin, qos } = flight;
            let stays = !matches!(origin, FlightOrigin::Group(_));
            stays.then_some(StoredFlight { packet_id, offset, qos, origin })
        });
        StoredFlights { last_id: self.last_id, sent: sent.collect(), released: self.all_released() }
    }

    /// Restores them. What makes no sense is left out: it may come from another node.
    pub(super) fn from_stored(stored: &StoredFlights) -> Self {
        let mut table = FlightTable::default();
        let room = |table: &FlightTable, id: u16| {
            id > 0 && table.len() < MQTT_FLIGHTS_MAX && !table.is_in_use_elsewhere(id)
        };
        for id in &stored.released {
            if room(&table, *id) {
                table.released.push_back(*id);
            }
        }
        for StoredFlight { packet_id, offset, qos, origin } in stored.sent.iter().copied() {
            let is_known = matches!(qos, 1 | 2) && !matches!(origin, FlightOrigin::Group(_));
            if is_known && room(&table, packet_id) {
                table.aged += 1;
                table.old.insert(packet_id, (table.aged, MqttFlight { offset, origin, qos }));
            }
        }
        let table = (table.len() > 0).then(|| Box::new(table));
        Self { last_id: stored.last_id, has_changed: false, table }
    }
}

impl FlightTable {
    fn len(&self) -> usize {
        self.recent_count + self.old.len() + self.released.len()
    }

    /// Whether an identifier is in use that is not one of the latest.
    fn is_in_use_elsewhere(&self, packet_id: u16) -> bool {
        self.old.contains_key(&packet_id) || self.released.contains(&packet_id)
    }

    /// Where in the queue of the latest an identifier is, if it is there.
    fn place(&self, packet_id: u16, last_id: u16) -> Option<usize> {
        // Identifiers run from 1 to 65,535 and wrap to 1.
        let back = (u32::from(last_id) + 65_535 - u32::from(packet_id)) % 65_535;
        self.recent.len().checked_sub(1 + back as usize).filter(|_| packet_id > 0)
    }

    fn sent(&self, packet_id: u16, last_id: u16) -> Option<MqttFlight> {
        let recent = self.place(packet_id, last_id).and_then(|at| self.recent[at]);
        recent.or_else(|| self.old.get(&packet_id).map(|(_, flight)| *flight))
    }

    fn remove(&mut self, packet_id: u16, last_id: u16) -> Option<MqttFlight> {
        if let Some(flight) = self.place(packet_id, last_id).and_then(|at| self.recent[at].take()) {
            self.recent_count -= 1;
            return Some(flight);
        }
        self.old.remove(&packet_id).map(|(_, flight)| flight)
    }

    /// Takes from the queue what is acknowledged at its front, and messages before which too little is left to be
    /// worth a place each for those acknowledged behind them.
    fn shorten_recent(&mut self, last_id: u16) {
        while let Some(first) = self.recent.front().copied() {
            if first.is_some() && self.recent.len() <= ACKNOWLEDGED_KEPT + 2 * self.recent_count {
                return;
            }
            if let Some(flight) = first {
                self.aged += 1;
                self.old.insert(id_before(last_id, self.recent.len() - 1), (self.aged, flight));
                self.recent_count -= 1;
            }
            self.recent.pop_front();
        }
        if self.recent.capacity() > 0 {
            self.recent = VecDeque::new();
        }
    }
}

/// The packet identifier `steps` after one; 0 stands before the first.
fn id_after(id: u16, steps: usize) -> u16 {
    let zero_based = usize::from(id) + 65_534 + steps;
    u16::try_from(zero_based % 65_535 + 1).expect("at most 65,535")
}

/// The packet identifier `steps` before one.
fn id_before(id: u16, steps: usize) -> u16 {
    id_after(id, 65_535 - steps % 65_535)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const LOG: FlightOrigin = FlightOrigin::Log;

    fn ended(step: Result<FlightStep, Violation>) -> Option<Offset> {
        match step.expect("no violation") {
            FlightStep::Ended(flight) => Some(flight.offset),
            _ => None,
        }
    }

    #[test]
    fn identifiers_go_round_and_each_finds_its_message() {
        let mut flights = Flights::default();
        let mut waiting = VecDeque::new();
        for offset in 0..200_000 {
            let id = flights.push(offset, LOG, 1);
            assert_ne!(id, 0);
            waiting.push_back((id, offset));
            if waiting.len() > 100 {
                // Not quite in order.
                let (id, offset) = waiting.remove(usize::from(id % 7)).expect("there are 100");
                assert_eq!(ended(flights.acknowledge(id, FlightAck::Puback)), Some(offset));
                assert_eq!(flights.acknowledge(id, FlightAck::Puback), Ok(FlightStep::Unknown), "only once");
            }
        }
        let left: Vec<_> = flights.all_sent().into_iter().map(|(id, flight)| (id, flight.offset)).collect();
        assert_eq!(left, Vec::from(waiting));
    }

    /// Up to 0.1 a message that was never acknowledged stopped the stream after 8,192 others.
    #[test]
    fn messages_that_are_never_acknowledged_cost_their_own_room_and_keep_their_identifiers() {
        let mut flights = Flights::default();
        let stuck: Vec<u16> = (0..3).map(|offset| flights.push(offset, LOG, 1)).collect();
        for offset in 3..300_000 {
            assert_eq!(flights.room(100), 97);
            let id = flights.push(offset, LOG, 1);
            assert!(!stuck.contains(&id), "{id} is in use");
            flights.acknowledge(id, FlightAck::Puback).expect("it was sent");
            let table = flights.table.as_ref().expect("three are left");
            assert!(table.recent.len() <= ACKNOWLEDGED_KEPT + 2 * 3 + 1, "{}", table.recent.len());
        }
        let left: Vec<u16> = flights.all_sent().into_iter().map(|(id, _)| id).collect();
        assert_eq!(left, stuck);
    }

    #[test]
    fn an_identifier_that_is_not_in_flight_is_nobodys() {
        let mut flights = Flights::default();
        assert_eq!(flights.acknowledge(1, FlightAck::Puback), Ok(FlightStep::Unknown));
        let id = flights.push(5, FlightOrigin::Retained, 1);
        for other in [id + 1, 0, u16::MAX] {
            for ack in [FlightAck::Puback, FlightAck::Pubcomp, FlightAck::Pubrec { is_refusal: false }] {
                assert_eq!(flights.acknowledge(other, ack), Ok(FlightStep::Unknown));
            }
        }
        assert_eq!(ended(flights.acknowledge(id, FlightAck::Puback)), Some(5));
        assert!(flights.is_empty());
    }

    #[test]
    fn no_more_are_in_flight_than_the_client_takes_whatever_their_state() {
        let mut flights = Flights::default();
        let ids: Vec<u16> = (0..3).map(|offset| flights.push(offset, LOG, 2)).collect();
        assert_eq!((flights.room(3), flights.room(4)), (0, 1));
        flights.acknowledge(ids[1], FlightAck::Pubrec { is_refusal: false }).expect("in order");
        assert_eq!(flights.room(3), 0, "until its PUBCOMP");
        flights.acknowledge(ids[1], FlightAck::Pubcomp).expect("in order");
        flights.acknowledge(ids[2], FlightAck::Pubrec { is_refusal: true }).expect("a refusal ends it");
        assert_eq!(flights.room(3), 2);
        assert_eq!(flights.room(u16::MAX), MQTT_FLIGHTS_MAX - 1);
    }

    #[test]
    fn an_acknowledgement_of_another_qos_or_out_of_order_is_a_violation() {
        const PUBREC: FlightAck = FlightAck::Pubrec { is_refusal: false };
        const REFUSAL: FlightAck = FlightAck::Pubrec { is_refusal: true };
        let mut flights = Flights::default();
        let (one, two) = (flights.push(1, LOG, 1), flights.push(2, LOG, 2));
        for (id, ack) in [
            (one, PUBREC),
            (one, REFUSAL),
            (one, FlightAck::Pubcomp),
            (two, FlightAck::Puback),
            (two, FlightAck::Pubcomp),
        ] {
            assert!(flights.acknowledge(id, ack).is_err(), "{id} {ack:?}");
        }
        assert!(matches!(flights.acknowledge(two, PUBREC), Ok(FlightStep::Release(Some(_)))));
        assert_eq!(flights.acknowledge(two, PUBREC), Ok(FlightStep::Release(None)), "said again");
        assert!(flights.acknowledge(two, FlightAck::Puback).is_err());
        assert_eq!(flights.acknowledge(two, FlightAck::Pubcomp), Ok(FlightStep::Completed));
        assert_eq!(flights.acknowledge(two, FlightAck::Pubcomp), Ok(FlightStep::Unknown));
    }

    #[test]
    fn what_a_group_has_back_is_the_latest_with_its_offset_and_of_a_group() {
        let mut flights = Flights::default();
        let kept = [(5, FlightOrigin::Shared), (5, LOG), (6, FlightOrigin::Shared)];
        let kept = kept.map(|(offset, origin)| flights.push(offset, origin, 2));
        flights.push(5, FlightOrigin::Shared, 2);
        flights.take_back(5);
        flights.take_back(7);
        assert_eq!(flights.all_sent().into_iter().map(|(id, _)| id).collect::<Vec<_>>(), kept);
    }

    /// One step of a client and its session.
    #[derive(Debug, Clone)]
    enum Step {
        Send(u8),
        Acknowledge(usize),
        Refuse(usize),
        Restart,
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (1..=2_u8).prop_map(Step::Send),
            // Mostly one of the newest, so that others grow old.
            7 => (0..4_usize).prop_map(Step::Acknowledge),
            1 => any::<usize>().prop_map(Step::Acknowledge),
            1 => any::<usize>().prop_map(Step::Refuse),
            1 => Just(Step::Restart),
        ]
    }

    proptest! {
        /// Against a plain list: what is in flight, in which order, and that no identifier is given twice.
        #[test]
        fn they_are_what_a_plain_list_of_them_is(
            last_id in any::<u16>(),
            steps in prop::collection::vec(any_step(), 1..600),
        ) {
            let mut flights = Flights { last_id, ..Flights::default() };
            let mut sent: Vec<(u16, MqttFlight)> = Vec::new();
            let mut released: Vec<u16> = Vec::new();
            let mut next = 0;
            for step in steps {
                match step {
                    Step::Send(qos) if flights.room(200) > 0 => {
                        let flight = MqttFlight { offset: next, origin: LOG, qos };
                        next += 1;
                        let id = flights.push(flight.offset, LOG, qos);
                        prop_assert!(id > 0 && !released.contains(&id) && sent.iter().all(|(other, _)| *other != id));
                        sent.push((id, flight));
                    }
                    Step::Send(_) => prop_assert_eq!(sent.len() + released.len(), 200),
                    Step::Acknowledge(nth) if !released.is_empty() && nth % 2 == 0 => {
                        let id = released.remove(nth % released.len());
                        prop_assert_eq!(flights.acknowledge(id, FlightAck::Pubcomp), Ok(FlightStep::Completed));
                    }
                    Step::Acknowledge(nth) | Step::Refuse(nth) if !sent.is_empty() => {
                        let (id, flight) = sent.remove(sent.len() - 1 - nth % sent.len());
                        let is_refusal = matches!(step, Step::Refuse(_));
                        let (ack, expected) = match (flight.qos, is_refusal) {
                            (1, _) => (FlightAck::Puback, FlightStep::Ended(flight)),
                            (_, true) => (FlightAck::Pubrec { is_refusal }, FlightStep::Ended(flight)),
                            (_, false) => (FlightAck::Pubrec { is_refusal }, FlightStep::Release(Some(flight))),
                        };
                        if let FlightStep::Release(_) = expected {
                            released.push(id);
                        }
                        prop_assert_eq!(flights.acknowledge(id, ack), Ok(expected));
                    }
                    Step::Acknowledge(_) | Step::Refuse(_) => {}
                    Step::Restart => {
                        let bytes = postcard::to_allocvec(&flights.to_stored()).expect("plain values");
                        let stored: StoredFlights = postcard::from_bytes(&bytes).expect("as written");
                        flights = Flights::from_stored(&stored);
                    }
                }
                prop_assert_eq!(flights.all_sent(), sent.clone());
                prop_assert_eq!(flights.all_released(), released.clone());
                prop_assert_eq!(flights.len(), sent.len() + released.len());
                let table = flights.table.as_ref();
                prop_assert!(table.is_none_or(|t| t.recent.len() <= ACKNOWLEDGED_KEPT + 2 * (t.recent_count + 1)));
            }
        }
    }

    #[test]
    fn what_is_stored_and_makes_no_sense_is_left_out() {
        let flight = |packet_id, qos| StoredFlight { packet_id, offset: 1, qos, origin: LOG };
        let sent = vec![flight(0, 1), flight(5, 1), flight(5, 2), flight(6, 3), flight(7, 2), flight(8, 2)];
        let flights = Flights::from_stored(&StoredFlights { last_id: 9, sent, released: vec![7, 0, 7] });
        let ids: BTreeMap<u16, u8> =
            flights.all_sent().into_iter().map(|(id, flight)| (id, flight.qos)).collect();
        assert_eq!(ids, BTreeMap::from([(5, 1), (8, 2)]));
        assert_eq!(flights.all_released(), [7]);
        let sent = (1..=u16::MAX).map(|id| flight(id, 1)).collect();
        let flights = Flights::from_stored(&StoredFlights { last_id: 9, sent, released: Vec::new() });
        assert_eq!(flights.len(), MQTT_FLIGHTS_MAX);
    }
}
