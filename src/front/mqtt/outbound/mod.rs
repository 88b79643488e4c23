//! The sending half of a connection: turns the records that match its session's subscriptions into
//! PUBLISH packets, as fast as the client takes them.
//!
//! The order is: messages in flight from the last connection, then the log from the session's position on.
//! Messages retained for a new subscription come before what the log gets after it, and after what waited before it. A record is taken from the log only when
//! there is room for it, so a slow client falls behind in the log and costs no memory.

mod held;
#[cfg(test)]
pub(super) mod model;
mod resend;
mod retained;
mod shared;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tracing::warn;

use self::held::HeldPackets;
use self::resend::PendingResend;
use self::retained::PendingRetained;
use self::shared::GroupMemberships;
use super::codec::ReasonCode;
use super::codec::Violation;
use super::codec::write::{self, AckKind};
use super::delivery::{Delivery, PublishWriter};
use super::flights::{FlightAck, FlightStep, MqttFlight};
use super::session::{MqttSession, Subscription};
use crate::consume::subscriber::retained::RetainedError;
use crate::consume::subscriber::sessions::FlightOrigin;
use crate::consume::subscriber::{
    FeedItem, MatchedRecords, OutputCover, ShareMember, SubscriberFeed, SubscriberProgress, Subscribers,
};
use crate::filter::TopicFilter;
use crate::limits::{DELIVERY_STEPS_MAX, MQTT_UNSENT_BYTES_MAX};
use crate::log::LogReadError;
use crate::message::{DatasourceId, Offset, Transport};
use crate::observe::metrics::Metrics;
use crate::shares::{ShareCharge, TenantShare};

/// Why no more messages can be sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum OutboundError {
    #[error(transparent)]
    Log(#[from] LogReadError),
    #[error(transparent)]
    Retained(#[from] RetainedError),
}

/// A connection's sending half.
pub(super) struct Outbound {
    subscribers: Arc<Subscribers>,
    metrics: Arc<Metrics>,
    pub(super) datasource: DatasourceId,
    /// The scope of its key.
    pub(super) scope: DatasourceId,
    pub(super) session: MqttSession,
    writer: PublishWriter,
    /// How many unacknowledged messages the client accepts.
    receive_maximum: u16,
    feed: SubscriberFeed,
    groups: GroupMemberships,
    /// The matched records that are being written.
    matched: Option<MatchedRecords>,
    resending: Option<PendingResend>,
    retained: VecDeque<PendingRetained>,
    /// The client takes nothing more at the moment, or has too much that it has not acknowledged.
    is_stalled: bool,
    /// The client has taken or acknowledged something since the last report.
    has_moved: bool,
    /// The packet identifiers of the PUBRELs to send.
    releases: Vec<u16>,
    /// What waits for the store.
    packets: HeldPackets,
    /// What is held meanwhile, of its tenant's share.
    held: ShareCharge,
    room: OutputCover,
}

impl Outbound {
    /// The sending half for a session, at the session's position in the log.
    pub(super) fn new(
        subscribers: Arc<Subscribers>,
        metrics: Arc<Metrics>,
        scope: DatasourceId,
        mut session: MqttSession,
        writer: PublishWriter,
        receive_maximum: u16,
    ) -> Self {
        let Subscribers { router, log, shares, .. } = &*subscribers;
        let (datasource, _) = scope.of_scope();
        let end = log.next_offset();
        let begin = if session.subscription_count() > 0 { session.position.min(end) } else { end };
        let mut feed = SubscriberFeed::new(router.clone(), log.clone(), shares, &datasource, begin);
        // Until it reports: whoever asks before must not hear that it is at the log's beginning.
        feed.mailbox().set_progress(begin, false);
        let mut groups = GroupMemberships::default();
        for (slot, subscription) in session.subscriptions.iter().enumerate() {
            let Some(subscription) = subscription else { continue };
            let slot = u32::try_from(slot).expect("subscriptions are bounded");
            match super::sessions::shared_group_key(&scope, &subscription.filter) {
                Some(group) => {
                    if let Some(member) = subscribers.groups.member(&group, session.group_session()) {
                        groups.put(slot, member);
                    }
                }
                None => {
                    // Never before `begin`: the feed continues from the session's position.
                    feed.set_filter(slot, &subscription.filter, Some(subscription.from.max(begin)));
                }
            }
        }
        session.subscriptions.iter_mut().flatten().for_each(|subscription| subscription.is_renewed = false);
        session.groups.clear();
        let resending = PendingResend::of_session(&session);
        let releases = session.flights.all_released();
        Self {
            is_stalled: false,
            has_moved: true,
            releases,
            packets: HeldPackets::default(),
            held: feed.mailbox().share().charge(),
            room: OutputCover::new(feed.mailbox().share()),
            subscribers,
            metrics,
            datasource,
            scope,
            session,
            writer,
            receive_maximum,
            feed,
            groups,
            matched: None,
            resending,
            retained: VecDeque::new(),
        }
    }

    /// What is prepared for the client and not written yet, in bytes.
    pub(super) fn held_bytes(&self) -> usize {
        let retained: usize = self.retained.iter().map(PendingRetained::held_bytes).sum();
        retained + self.writer.alias_bytes() + self.packets.bytes()
    }

    /// The mailbox, through which the session reports its cursor.
    pub(super) fn mailbox(&self) -> &Arc<crate::consume::subscriber::Mailbox> {
        self.feed.mailbox()
    }

    /// What its tenant takes.
    pub(super) fn share(&self) -> &TenantShare {
        self.feed.mailbox().share()
    }

    /// Adds or replaces a subscription that is not shared. `from` is where in the log it begins, if not at
    /// the end. With `retained`, retained messages are sent first.
    pub(super) fn subscribe(
        &mut self,
        slot: usize,
        filter: TopicFilter,
        mut subscription: Subscription,
        from: Option<Offset>,
        retained: bool,
    ) {
        let at = u32::try_from(slot).expect("subscriptions are bounded");
        let known = self.session.subscriptions[slot].is_some();
        let end = self.subscribers.log.next_offset();
        let behind = (!self.has_reached(end)).then_some(end);
        match (known, from) {
            // Only the options change: the subscription keeps its start in the log.
            (true, None) => subscription.from = self.feed.filter_start(at).unwrap_or_default(),
            (false, None) => subscription.from = self.feed.set_filter(at, filter.as_str(), None),
            (_, from) => {
                // The feed goes back to `from`, and will match these records again for all subscriptions.
                self.rewind_unwritten();
                subscription.from = self.feed.set_filter(at, filter.as_str(), from);
                for (slot, other) in self.session.subscriptions.iter_mut().enumerate() {
                    let from = u32::try_from(slot).ok().and_then(|slot| self.feed.filter_start(slot));
                    if let (Some(other), Some(from)) = (other, from) {
                        other.from = from;
                    }
                }
            }
        }
        if retained {
            let below = if known { end } else { subscription.from };
            self.retained.retain(|job| job.slot != at);
            self.retained.push_back(PendingRetained::new(at, filter, below, behind));
        }
        self.session.subscriptions[slot] = Some(subscription);
        self.note_position();
    }

    /// Adds or replaces a shared subscription.
    pub(super) fn subscribe_shared(
        &mut self,
        slot: usize,
        subscription: Subscription,
        member: Option<ShareMember>,
    ) {
        let at = u32::try_from(slot).expect("subscriptions are bounded");
        if let Some(member) = member {
            self.groups.put(at, member);
        }
        self.session.subscriptions[slot] = Some(subscription);
        self.note_position();
    }

    /// Removes a subscription.
    pub(super) fn unsubscribe(&mut self, slot: usize) {
        let at = u32::try_from(slot).expect("subscriptions are bounded");
        if let Some(subscription) = self.session.subscriptions[slot].take() {
            self.session.discharge_filter(&subscription.filter);
        }
        self.feed.remove_filter(at);
        self.retained.retain(|job| job.slot != at);
        self.keep_held(at);
        self.groups.remove(at);
        self.note_position();
    }

    /// Brings the session's position up to date before the session is written with it, and that in the mailbox: whoever
    /// writes it from there is not to undo a start in the past.
    fn note_position(&mut self) {
        self.session.position = self.position();
        self.feed.mailbox().set_progress(self.session.position, self.matched.is_none());
    }

    /// Handles an acknowledgement. Returns whether a message with this identifier is in flight.
    ///
    /// # Errors
    /// A message of that QoS cannot have it, or not yet.
    pub(super) fn acknowledge(&mut self, packet_id: u16, ack: FlightAck) -> Result<bool, Violation> {
        match self.session.flights.acknowledge(packet_id, ack)? {
            FlightStep::Unknown => return Ok(false),
            FlightStep::Ended(MqttFlight { offset, origin: FlightOrigin::Group(slot), .. }) => {
                self.groups.acknowledge(slot, offset);
            }
            FlightStep::Release(first) => {
                if let Some(MqttFlight { offset, origin: FlightOrigin::Shared, .. }) = first {
                    self.groups.acknowledge_kept(offset);
                }
                // Said again, it is answered again, but once.
                if first.is_some() || !self.releases.contains(&packet_id) {
                    self.releases.push(packet_id);
                }
            }
            FlightStep::Ended(MqttFlight { offset, origin: FlightOrigin::Shared, .. }) => {
                self.groups.acknowledge_kept(offset);
            }
            FlightStep::Ended(_) | FlightStep::Completed => {}
        }
        self.has_moved = true;
        self.session.charge_flights();
        Ok(true)
    }

    /// Writes what is in flight to the store, if the keeper of the sessions asks for it.
    pub(super) fn poll_asked(&mut self, cx: &Context<'_>) {
        if self.feed.mailbox().poll_asked(cx) {
            drop(self.save_progress());
        }
    }

    /// Writes packets to `out` until [`MQTT_UNSENT_BYTES_MAX`] bytes are unsent; `unsent` bytes already
    /// are. Pending while it waits for the log, for acknowledgements, or for room. Ready on an error
    /// only.
    pub(super) fn poll_fill(
        &mut self,
        unsent: usize,
        out: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Poll<OutboundError> {
        let held = self.packets.bytes();
        let room_until = out.len() + MQTT_UNSENT_BYTES_MAX.saturating_sub(unsent);
        self.is_stalled = false;
        self.room.begin(out.len() + held, unsent + held);
        if self.poll_held(out, cx).is_pending() {
            // A disk that is full or slow may keep it for long: others of its tenant have their turns meanwhile.
            self.groups.pass_turns();
            self.pause();
            return Poll::Pending;
        }
        let begin = out.len();
        self.write_releases(out);
        self.groups.begin();
        let filled = self.poll_all(room_until, out, cx);
        match std::mem::take(&mut self.writer.written) {
            0 => {}
            written => self.metrics.count_delivered(Transport::Mqtt, written),
        }
        self.has_moved |= out.len() > begin;
        self.hold_packets(out);
        if filled.is_pending() {
            self.groups.settle();
            if self.is_stalled {
                self.pause();
            }
            self.report_progress();
            // Mostly it only has the store wake this task.
            if self.packets.bytes() > 0 && self.poll_held(out, cx).is_ready() {
                cx.waker().wake_by_ref();
            }
        }
        filled
    }

    /// Writes the PUBRELs that are due.
    fn write_releases(&mut self, out: &mut Vec<u8>) {
        if self.releases.is_empty() {
            return;
        }
        self.packets.begin(out);
        for packet_id in std::mem::take(&mut self.releases) {
            if self.session.flights.is_released(packet_id) {
                write::message_ack(
                    out,
                    self.writer.form,
                    AckKind::Pubrel,
                    packet_id,
                    ReasonCode::Success,
                    None,
                );
            }
        }
    }

    /// Lets others have everything that this one holds in common with them: it is not asked for messages for a while.
    /// `unsent` bytes of its output are not sent.
    pub(super) fn suspend(&mut self, unsent: usize) {
        self.room.suspend(unsent + self.packets.bytes());
        self.groups.pass_turns();
        self.pause();
        self.report_progress();
    }

    /// Lets others have the turns of this one, which sends nothing for a while. What it holds is counted, and
    /// let go of where its tenant's share has no room: it is read again later. So clients that do not read
    /// cost no more memory than that, however many there are.
    fn pause(&mut self) {
        self.feed.pause();
        let matched = self.matched.as_ref().map_or(0, MatchedRecords::weight);
        let retained: usize = self.retained.front().map_or(0, PendingRetained::held_bytes);
        let held = (matched + self.feed.held_bytes() + retained + self.groups.held_bytes()) as u64;
        if !self.held.hold_stalled(held) {
            self.rewind_unwritten();
            self.feed.release();
            self.retained.iter_mut().for_each(PendingRetained::release);
            self.groups.release();
        }
    }

    /// Goes through the sources in their order until `out` is full or all of them wait.
    fn poll_all(
        &mut self,
        room_until: usize,
        out: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Poll<OutboundError> {
        loop {
            if out.len() >= room_until {
                self.groups.pass_turns();
                self.is_stalled = true;
                return Poll::Pending;
            }
            let is_due = self.is_retained_due();
            let retained = match is_due {
                true => self.poll_retained(room_until, out, cx).map(Some),
                false => Poll::Ready(None),
            };
            // What comes late is not waited for.
            if retained.is_pending()
                && !self.retained.front_mut().is_some_and(|pending| pending.poll_late(cx))
            {
                return Poll::Pending;
            }
            let polled = if self.resending.is_some() {
                ready!(self.poll_resend(out, cx))
            } else if let Poll::Ready(Some(polled)) = retained {
                polled
            } else if self.matched.is_some() {
                ready!(self.poll_matched(room_until, out, cx))
            } else if let Poll::Ready(polled) = self.poll_feed(cx) {
                polled
            } else if !is_due && self.is_retained_due() {
                // The feed has just reached the place behind which they come.
                Ok(())
            } else {
                ready!(self.poll_shared(room_until, out, cx)).map_err(OutboundError::from)
            };
            if let Err(error) = polled {
                return Poll::Ready(error);
            }
        }
    }

    /// Whether everything below `end` is sent, but for records that the router has still.
    fn has_reached(&self, end: Offset) -> bool {
        self.resending.is_none() && self.matched.is_none() && self.feed.has_reached(end)
    }

    /// Whether it is the turn of retained messages.
    fn is_retained_due(&mut self) -> bool {
        let Some(behind) = self.retained.front().map(|pending| pending.behind) else { return false };
        let is_due = self.resending.is_none() && behind.is_none_or(|end| self.has_reached(end));
        if is_due && behind.is_some() {
            self.retained[0].begin();
        }
        is_due
    }

    /// Takes the next matched records from the log.
    #[inline]
    fn poll_feed(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), OutboundError>> {
        match ready!(self.feed.poll_next(cx))? {
            FeedItem::Matched(matched) => self.matched = Some(matched),
            FeedItem::Skipped(records) => self.report_skipped(records),
        }
        Poll::Ready(Ok(()))
    }

    /// Writes the matched records that were taken. Pending while the receive maximum is reached, and after
    /// each [`DELIVERY_STEPS_MAX`], so that other connections are served meanwhile.
    #[inline]
    fn poll_matched(
        &mut self,
        room_until: usize,
        out: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), OutboundError>> {
        let Some(mut matched) = self.matched.take() else { return Poll::Ready(Ok(())) };
        let mut steps = DELIVERY_STEPS_MAX;
        if self.write_matched(&mut matched, room_until, out, &mut steps, cx) {
            self.matched = Some(matched);
            if steps == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if out.len() < room_until {
                // Groups may serve other members meanwhile.
                self.groups.pass_turns();
                self.is_stalled = true;
                return Poll::Pending;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Writes matched records of the log, as far as `steps` go. Returns whether some may be left.
    fn write_matched(
        &mut self,
        matched: &mut MatchedRecords,
        room_until: usize,
        out: &mut Vec<u8>,
        steps: &mut usize,
        cx: &mut Context<'_>,
    ) -> bool {
        let batch = matched.batch().clone();
        let mut reader = batch.reader();
        while let Some(hit) = matched.peek(steps) {
            if out.len() >= room_until || *steps == 0 {
                return true;
            }
            let record = reader.read(hit.place);
            let subscriptions =
                hit.slots.iter().filter_map(|slot| self.session.subscriptions.get(*slot as usize)?.as_ref());
            if let Some(mut delivery) =
                Delivery::for_subscriptions(subscriptions, &record, self.writer.publisher)
            {
                if delivery.qos > 0 && self.session.flight_room(self.receive_maximum) == 0
                    || self.room.poll(out.len(), delivery.bytes_of(&record), cx).is_pending()
                {
                    return true;
                }
                let Self { writer, session: MqttSession { flights, .. }, packets, .. } = self;
                let qos = delivery.qos;
                if qos == 2 {
                    packets.begin(out);
                }
                let packet_id = || flights.push(record.offset, FlightOrigin::Log, qos);
                writer.write(&record, &mut delivery, out, packet_id);
            }
            matched.advance();
        }
        false
    }

    /// Reports records that retention removed before this session read them: to the client with its next
    /// message, to the operator at once.
    fn report_skipped(&mut self, records: u64) {
        self.writer.skipped += records;
        self.metrics.skipped.increment(records);
        warn!(
            datasource = %self.datasource, records, position = self.feed.position(),
            "retention has removed records before a subscriber read them"
        );
    }

    /// The first record that was not sent.
    fn position(&self) -> Offset {
        let next = self.matched.as_ref().and_then(MatchedRecords::peek_place).map(|place| place.offset);
        next.unwrap_or_else(|| self.feed.position())
    }

    /// Reports the session's progress, to be written and to be looked at.
    fn report_progress(&mut self) {
        let in_flight = self.session.flights.len();
        self.feed.mailbox().report(SubscriberProgress {
            cursor: self.position(),
            all: self.matched.is_none(),
            in_flight,
            has_changed: self.session.flights.take_changed(),
            waits: in_flight > 0 || self.is_stalled,
            has_moved: std::mem::take(&mut self.has_moved),
        });
    }

    /// Returns records that were taken from the feed but not written.
    fn rewind_unwritten(&mut self) {
        if let Some(place) = self.matched.take().as_ref().and_then(MatchedRecords::peek_place) {
            self.feed.rewind(place.offset);
        }
    }

    /// Gives the session back, for the next connection.
    pub(super) fn into_session(mut self) -> MqttSession {
        self.drop_held();
        let routed = self.subscribers.router.routed_offset();
        let position = self.position();
        // A live session with nothing to send has reached the router's position.
        self.feed.mailbox().set_progress(position, self.matched.is_none());
        let position = self.feed.mailbox().cursor(routed);
        // What is routed from here on it is not given.
        self.feed.mailbox().set_progress(position, false);
        MqttSession { position, groups: self.groups.counted(), ..self.session }
    }
}
