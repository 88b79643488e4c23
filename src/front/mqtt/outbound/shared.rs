//! The groups that the session is a member of: each gives it records in turn, and hears which of them the
//! client has acknowledged.

use std::collections::VecDeque;
use std::task::{Context, Poll, ready};

use super::super::delivery::Delivery;
use super::Outbound;
use crate::consume::subscriber::sessions::FlightOrigin;
use crate::consume::subscriber::{GroupCount, ShareDelivery, ShareMember, batches_weight};
use crate::limits::REFETCH_RECORDS;
use crate::log::{Batch, LogReadError, RecordPlace};
use crate::message::Offset;

/// The session's memberships, each with its subscription's slot, and the records from them that are not
/// written yet.
#[derive(Default)]
pub(super) struct GroupMemberships {
    members: Vec<(u32, ShareMember)>,
    records: VecDeque<(u32, Batch, RecordPlace)>,
    /// The groups were asked for more and have none: they wake the connection.
    waits: bool,
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

    /// The places of the groups in the count of their datasource's, for a session that is away.
    pub(super) fn counted(&self) -> Vec<GroupCount> {
        self.members.iter().filter_map(|(_, member)| member.counted().cloned()).collect()
    }

    /// Tells a group that the client has a record.
    pub(super) fn acknowledge(&mut self, slot: u32, offset: Offset) {
        if let Some((_, member)) = self.members.iter_mut().find(|(present, _)| *present == slot) {
            member.acknowledge(offset);
        }
    }

    /// Tells a group that a record is this session's for good.
    pub(super) fn keep(&mut self, slot: u32, offset: Offset) {
        if let Some((_, member)) = self.members.iter_mut().find(|(present, _)| *present == slot) {
            member.keep(offset);
        }
    }

    /// Whether this gateway keeps the group itself, in the store that has its sessions.
    pub(super) fn is_kept_here(&self, slot: u32) -> bool {
        self.members.iter().any(|(of, member)| *of == slot && matches!(member, ShareMember::Local(_)))
    }

    /// Tells the groups that the client has a record that was [kept](GroupMemberships::keep).
    pub(super) fn acknowledge_kept(&mut self, offset: Offset) {
        self.members.iter_mut().for_each(|(_, member)| member.acknowledge_kept(offset));
    }

    /// How many bytes the records that are not written hold.
    pub(super) fn held_bytes(&self) -> usize {
        batches_weight(self.records.iter().map(|(_, batch, _)| batch))
    }

    /// Gives back the records that are not written, for any member to take.
    pub(super) fn release(&mut self) {
        self.give_back(ShareMember::takes_back);
    }

    /// Gives the records that are not written back to the groups for which `applies` holds.
    fn give_back(&mut self, applies: impl Fn(&ShareMember) -> bool) {
        let Self { members, records, .. } = self;
        for (slot, member) in members {
            if records.iter().any(|(of, ..)| of == slot) && applies(member) {
                let own = records.iter().filter(|(of, ..)| of == slot);
                member.give_back(own.map(|(_, batch, place)| (batch.clone(), *place)));
                records.retain(|(of, ..)| of != slot);
            }
        }
    }

    /// Begins to ask the groups. Until they are asked for more, they are not to wait for this client.
    pub(super) fn begin(&mut self) {
        self.waits = false;
    }

    /// Lets the groups serve other members, unless this one waits for more.
    pub(super) fn settle(&mut self) {
        if !self.waits {
            self.pass_turns();
        }
    }

    /// Lets the groups serve other members, because this client takes nothing now: with the records, too, that it
    /// has not taken, if others wait.
    pub(super) fn pass_turns(&mut self) {
        self.waits = false;
        self.members.iter().for_each(|(_, member)| member.pass_turn());
        self.give_back(ShareMember::keeps_others_waiting);
    }

    /// Takes up to `room` records from the first group that has some. Returns how many records retention
    /// removed before any member read them.
    fn poll_take(&mut self, room: usize, cx: &mut Context<'_>) -> Poll<Result<u64, LogReadError>> {
        self.waits = false;
        for at in 0..self.members.len() {
            let (slot, member) = &mut self.members[at];
            match member.poll_take(room, cx) {
                Poll::Pending => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(ShareDelivery::Skipped(records))) => return Poll::Ready(Ok(records)),
                Poll::Ready(Ok(ShareDelivery::Records(records))) => {
                    let slot = *slot;
                    self.records.extend(records.into_iter().map(|(batch, place)| (slot, batch, place)));
                    // The next call asks another group first, so that no group starves.
                    self.members.rotate_left(at + 1);
                    return Poll::Ready(Ok(0));
                }
            }
        }
        self.waits = true;
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
