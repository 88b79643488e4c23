//! The groups that the session is a member of: each gives it records in turn, and hears which of them the
//! client has acknowledged.

use std::collections::VecDeque;
use std::task::{Context, Poll, ready};

use super::super::delivery::Delivery;
use super::Outbound;
use crate::consume::subscriber::sessions::FlightOrigin;
use crate::consume::subscriber::{ShareDelivery, ShareMember};
use crate::limits::REFETCH_RECORDS;
use crate::log::{Batch, LogReadError, RecordPlace};
use crate::message::Offset;

/// The session's memberships, each with its subscription's slot, and the records from them that are not
/// written yet.
#[derive(Default)]
pub(super) struct GroupMemberships {
    members: Vec<(u32, ShareMember)>,
    records: VecDeque<(u32, Batch, RecordPlace)>,
}

impl GroupMemberships {
    /// Adds or replaces the membership of a subscription.
    pub(super) fn put(&mut self, slot: u32, member: ShareMember) {
        self.members.retain(|(present, _)| *present != slot);
        self.members.push((slot, member));
    }

    /// Removes the membership of a subscription, and its records.
    pub(super) fn remove(&mut self, slot: u32) {
        self.records.retain(|(shared, ..)| *shared != slot);
        self.members.retain(|(member, _)| *member != slot);
    }

    /// Tells a group that the client has a record.
    pub(super) fn acknowledge(&self, slot: u32, offset: Offset) {
        if let Some((_, member)) = self.members.iter().find(|(present, _)| *present == slot) {
            member.acknowledge(offset);
        }
    }

    /// How many bytes the records that are not written hold.
    pub(super) fn held_bytes(&self) -> usize {
        let mut last = None;
        let mut batches = self.records.iter().map(|(_, batch, _)| batch);
        batches.by_ref().fold(0, |bytes, batch| {
            let same = last.replace(batch.first_offset()) == Some(batch.first_offset());
            if same { bytes } else { bytes + batch.weight() }
        })
    }

    /// Gives back the records that are not written, for any member to take.
    pub(super) fn release(&mut self) {
        for (slot, member) in &self.members {
            let own = self.records.iter().filter(|(shared, ..)| shared == slot);
            member.give_back(own.map(|(_, _, place)| place.offset));
        }
        let given_back =
            |slot: u32| self.members.iter().any(|(member, of)| *member == slot && of.takes_back());
        self.records.retain(|(slot, ..)| !given_back(*slot));
    }

    /// Lets the groups serve other members, because this client takes nothing now.
    pub(super) fn pass_turns(&self) {
        self.members.iter().for_each(|(_, member)| member.pass_turn());
    }

    /// Takes up to `room` records from the first group that has some. Returns how many records retention
    /// removed before any member read them.
    fn poll_take(&mut self, room: usize, cx: &mut Context<'_>) -> Poll<Result<u64, LogReadError>> {
        for at in 0..self.members.len() {
            let (slot, member) = &mut self.members[at];
            match member.poll_take(room, cx) {
                Poll::Pending => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(ShareDelivery::Skipped(records))) => return Poll::Ready(Ok(records)),
                Poll::Ready(Ok(ShareDelivery::Records(batch, places))) => {
                    let slot = *slot;
                    self.records.extend(places.into_iter().map(|place| (slot, batch.clone(), place)));
                    // The next call asks another group first, so that no group starves.
                    self.members.rotate_left(at + 1);
                    return Poll::Ready(Ok(0));
                }
            }
        }
        Poll::Pending
    }
}

impl Outbound {
    /// Takes records from the groups in turn, and writes them.
    pub(super) fn poll_shared(
        &mut self,
        room_until: usize,
        out: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), LogReadError>> {
        while let Some((slot, batch, place)) = self.groups.records.front() {
            let (slot, place) = (*slot, *place);
            let record = batch.reader().read(place);
            let bytes = Delivery::default().bytes_of(&record);
            let waits = self.session.flight_room(self.receive_maximum) == 0
                || self.room.poll(out.len(), bytes, cx).is_pending();
            if waits || out.len() >= room_until {
                self.groups.pass_turns();
                self.is_stalled |= waits;
                // Pending waits for an acknowledgement. Ready without room in `out` ends the caller's loop.
                return if waits { Poll::Pending } else { Poll::Ready(Ok(())) };
            }
            let subscription = self.session.subscriptions.get(slot as usize).and_then(Option::as_ref);
            let in_flight = Delivery::for_subscriptions(subscription.into_iter(), &record, 0).is_some_and(
                |mut delivery| {
                    let (flights, qos) = (&mut self.session.flights, delivery.qos);
                    // A QoS 2 message is completed to this session, and given to no other (section 4.8.2).
                    let origin = if qos == 2 { FlightOrigin::Shared } else { FlightOrigin::Group(slot) };
                    if qos == 2 {
                        self.packets.begin(out);
                    }
                    let packet_id = || flights.push(record.offset, origin, qos);
                    let is_written = self.writer.write(&record, &mut delivery, out, packet_id);
                    if is_written && qos == 2 {
                        self.packets.take_for_good(slot, record.offset);
                    }
                    is_written && qos > 0
                },
            );
            if !in_flight {
                self.groups.acknowledge(slot, place.offset);
            }
            self.groups.records.pop_front();
        }
        let room = self.session.flight_room(self.receive_maximum).min(REFETCH_RECORDS);
        if room == 0 {
            self.groups.pass_turns();
            self.is_stalled = true;
            return Poll::Pending;
        }
        let skipped = ready!(self.groups.poll_take(room, cx))?;
        if skipped > 0 {
            self.report_skipped(skipped);
        }
        Poll::Ready(Ok(()))
    }
}
