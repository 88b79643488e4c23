//! The sending half of a connection: turns the records that match its session's subscriptions into
//! PUBLISH packets, as fast as the client takes them.
//!
//! The order is: messages in flight from the last connection, then messages retained for a new
//! subscription, then the log from the session's position on. A record is taken from the log only when
//! there is room for it, so a slow client falls behind in the log and costs no memory.

mod cover;
mod resend;
mod retained;
mod shared;

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tracing::warn;

use self::cover::OutputCover;
use self::resend::PendingResend;
use self::retained::PendingRetained;
use self::shared::GroupMemberships;
use super::delivery::{Delivery, PublishWriter};
use super::flights::{FlightSource, MqttFlight};
use super::session::{MqttSession, Subscription};
use crate::consume::subscriber::retained::RetainedError;
use crate::consume::subscriber::{FeedItem, MatchedRecords, ShareMember, SubscriberFeed, Subscribers};
use crate::filter::TopicFilter;
use crate::limits::{
    DELIVERY_STEPS_MAX, MQTT_UNSENT_BYTES_MAX, STALLED_BYTES_MAX, STALLED_BYTES_PER_TENANT_MAX,
};
use crate::log::LogReadError;
use crate::message::{DatasourceId, Offset};
use crate::observe::metrics::Metrics;
use crate::shares::{ShareCharge, ShareCount};

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
        session: MqttSession,
        writer: PublishWriter,
        receive_maximum: u16,
    ) -> Self {
        let Subscribers { router, log, shares, .. } = &*subscribers;
        let (datasource, _) = scope.of_scope();
        let end = log.next_offset();
        let begin = if session.subscription_count() > 0 { session.position.min(end) } else { end };
        let mut feed = SubscriberFeed::new(router.clone(), log.clone(), shares, &datasource, begin);
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
        let resending = PendingResend::of_session(&session);
        Self {
            is_stalled: false,
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
        self.retained.iter().map(PendingRetained::held_bytes).sum::<usize>() + self.writer.alias_bytes()
    }

    /// The mailbox, through which the session reports its cursor.
    pub(super) fn mailbox(&self) -> &Arc<crate::consume::subscriber::Mailbox> {
        self.feed.mailbox()
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
        match (known, from) {
            // Only the options change: the subscription keeps its start in the log.
            (true, None) => subscription.from = self.feed.filter_start(at).unwrap_or_default(),
            (false, None) => subscription.from = self.feed.set_filter(at, filter.as_str(), None),
            (_, from) => {
                // The feed goes back to `from`, and will match these records again for all subscriptions.
                self.rewind_unwritten();
                subscription.from = self.feed.set_filter(at, filter.as_str(), from);
                let lowest = self.session.flights.lowest_log_offset().unwrap_or(Offset::MAX);
                for (slot, other) in self.session.subscriptions.iter_mut().enumerate() {
                    let from = u32::try_from(slot).ok().and_then(|slot| self.feed.filter_start(slot));
                    if let (Some(other), Some(from)) = (other, from) {
                        other.from = from.min(lowest);
                    }
                }
            }
        }
        if retained {
            let below = if known { self.subscribers.log.next_offset() } else { subscription.from };
            self.retained.retain(|job| job.slot != at);
            self.retained.push_back(PendingRetained::new(at, filter, below));
        }
        self.session.subscriptions[slot] = Some(subscription);
        self.session.position = self.position();
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
    }

    /// Removes a subscription.
    pub(super) fn unsubscribe(&mut self, slot: usize) {
        let at = u32::try_from(slot).expect("subscriptions are bounded");
        if let Some(subscription) = self.session.subscriptions[slot].take() {
            self.session.discharge_filter(&subscription.filter);
        }
        self.feed.remove_filter(at);
        self.retained.retain(|job| job.slot != at);
        self.groups.remove(at);
    }

    /// Handles a PUBACK. An unknown packet identifier is ignored.
    pub(super) fn acknowledge(&mut self, packet_id: u16) {
        if let Some(MqttFlight { offset, source: FlightSource::Group(slot), .. }) =
            self.session.flights.acknowledge(packet_id)
        {
            self.groups.acknowledge(slot, offset);
        }
        self.session.charge_flights();
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
        let room_until = out.len() + MQTT_UNSENT_BYTES_MAX.saturating_sub(unsent);
        self.is_stalled = false;
        self.room.begin(out.len(), unsent);
        self.groups.begin();
        let filled = self.poll_all(room_until, out, cx);
        if filled.is_pending() {
            self.groups.settle();
            if self.is_stalled {
                self.pause();
            }
            self.report_progress();
        }
        filled
    }

    /// Lets others have everything that this one holds in common with them: it is not asked for messages for a while.
    /// `unsent` bytes of its output are not sent.
    pub(super) fn suspend(&mut self, unsent: usize) {
        self.room.suspend(unsent);
        self.groups.pass_turns();
        self.pause();
    }

    /// Lets others have the turns of this one, which sends nothing for a while. What it holds is counted, and
    /// let go of where its tenant's share has no room: it is read again later. So clients that do not read
    /// cost no more memory than that, however many there are.
    fn pause(&mut self) {
        self.feed.pause();
        let matched = self.matched.as_ref().map_or(0, MatchedRecords::weight);
        let retained: usize = self.retained.front().map_or(0, PendingRetained::held_bytes);
        let held = (matched + self.feed.held_bytes() + retained + self.groups.held_bytes()) as u64;
        self.held.set(ShareCount::StalledBytes, 0);
        let all = self.held.share().count_of_all(ShareCount::StalledBytes);
        let fits = all + held <= STALLED_BYTES_MAX;
        if !fits || self.held.try_add(ShareCount::StalledBytes, held, STALLED_BYTES_PER_TENANT_MAX).is_err() {
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
            let retained = match self.resending.is_none() && !self.retained.is_empty() {
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
            } else {
                ready!(self.poll_shared(room_until, out, cx)).map_err(OutboundError::from)
            };
            if let Err(error) = polled {
                return Poll::Ready(error);
            }
        }
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
                let Self { writer, session: MqttSession { flights, .. }, .. } = self;
                writer.write(&record, &mut delivery, out, || flights.push(record.offset, FlightSource::Log));
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

    /// Reports the session's progress, to be written and to outlive the connection.
    fn report_progress(&self) {
        let position = self.position();
        let cursor = self.session.flights.lowest_log_offset().map_or(position, |lowest| lowest.min(position));
        let all = self.matched.is_none() && self.session.flights.is_empty();
        self.feed.mailbox().set_progress(cursor, all);
    }

    /// Returns records that were taken from the feed but not written.
    fn rewind_unwritten(&mut self) {
        if let Some(place) = self.matched.take().as_ref().and_then(MatchedRecords::peek_place) {
            self.feed.rewind(place.offset);
        }
    }

    /// Gives the session back, for the next connection.
    pub(super) fn into_session(self) -> MqttSession {
        let routed = self.subscribers.router.routed_offset();
        let position = self.position();
        // A live session with nothing to send has reached the router's position.
        self.feed.mailbox().set_progress(position, self.matched.is_none());
        let position = self.feed.mailbox().cursor(routed);
        MqttSession { position, ..self.session }
    }
}
