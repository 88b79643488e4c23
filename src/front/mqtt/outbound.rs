//! The sending half of a connection: turns the records that match its session's subscriptions into
//! PUBLISH packets, as fast as the client takes them.
//!
//! The order is: messages in flight from the last connection, then messages retained for a new
//! subscription, then the log from the session's position on. A record is taken from the log only when
//! there is room for it, so a slow client falls behind in the log and costs no memory.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::task::JoinHandle;
use tracing::warn;

use super::delivery::{Delivery, PublishWriter};
use super::flights::{FlightSource, MqttFlight};
use super::session::{MqttSession, Subscription, SubscriptionFilter};
use crate::consume::subscriber::feed::fetch_records;
use crate::consume::subscriber::retained::{RetainedError, RetainedPage, RetainedPageStart};
use crate::consume::subscriber::{
    FeedItem, MatchedRecords, ShareDelivery, ShareMember, SubscriberFeed, Subscribers,
};
use crate::filter::TopicFilter;
use crate::limits::{MQTT_UNSENT_BYTES_MAX, REFETCH_RECORDS, RETAINED_PAGE_BYTES};
use crate::log::{Batch, LogReadError, RecordPlace};
use crate::message::{DatasourceId, Offset, RecordRef};
use crate::observe::metrics::Metrics;

/// A task that reads records in flight again.
type RefetchTask = JoinHandle<Result<Vec<Option<(Batch, RecordPlace)>>, LogReadError>>;
/// A read of one page of retained messages.
type RetainedPageRead = Pin<Box<dyn Future<Output = Result<RetainedPage, RetainedError>> + Send>>;

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
    pub(super) session: MqttSession,
    writer: PublishWriter,
    /// How many unacknowledged messages the client accepts.
    receive_maximum: u16,
    feed: SubscriberFeed,
    members: Vec<(u32, ShareMember)>,
    /// The matched records that are being written.
    matched: Option<MatchedRecords>,
    /// Records from groups, each with its subscription's slot.
    shared: VecDeque<(u32, Batch, RecordPlace)>,
    resending: Option<PendingResend>,
    retained: VecDeque<PendingRetained>,
}

/// The messages that were in flight when the last connection ended.
struct PendingResend {
    flights: VecDeque<(u16, MqttFlight)>,
    fetching: Option<RefetchTask>,
}

/// The retained messages for a new subscription.
struct PendingRetained {
    slot: u32,
    filter: TopicFilter,
    /// Newer messages come from the log.
    below: Offset,
    after: Option<RetainedPageStart>,
    asking: Option<RetainedPageRead>,
    /// A page, and how many of its messages were written.
    page: Option<(RetainedPage, usize)>,
}

impl Outbound {
    /// The sending half for a session, at the session's position in the log.
    pub(super) fn new(
        subscribers: Arc<Subscribers>,
        metrics: Arc<Metrics>,
        datasource: DatasourceId,
        session: MqttSession,
        writer: PublishWriter,
        receive_maximum: u16,
    ) -> Self {
        let Subscribers { router, log, .. } = &*subscribers;
        let end = log.next_offset();
        let begin = if session.subscription_count() > 0 { session.position.min(end) } else { end };
        let mut feed = SubscriberFeed::new(router.clone(), log.clone(), &datasource, begin);
        let mut members = Vec::new();
        for (slot, subscription) in session.subscriptions.iter().enumerate() {
            let Some(subscription) = subscription else { continue };
            let slot = u32::try_from(slot).expect("subscriptions are bounded");
            match super::sessions::shared_group_key(&datasource, &subscription.filter) {
                Some(group) => {
                    let member = subscribers.groups.member(&group, session.group_session());
                    members.extend(member.map(|member| (slot, member)));
                }
                None => {
                    // Never before `begin`: the feed continues from the session's position.
                    feed.set_filter(slot, &subscription.filter, Some(subscription.from.max(begin)));
                }
            }
        }
        let flights: VecDeque<_> = session.flights.unacknowledged().collect();
        let resending = (!flights.is_empty()).then_some(PendingResend { flights, fetching: None });
        Self {
            subscribers,
            metrics,
            datasource,
            session,
            writer,
            receive_maximum,
            feed,
            members,
            matched: None,
            shared: VecDeque::new(),
            resending,
            retained: VecDeque::new(),
        }
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
            self.retained.push_back(PendingRetained {
                slot: at,
                filter,
                below,
                after: None,
                asking: None,
                page: None,
            });
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
            self.members.retain(|(present, _)| *present != at);
            self.members.push((at, member));
        }
        self.session.subscriptions[slot] = Some(subscription);
    }

    /// Removes a subscription.
    pub(super) fn unsubscribe(&mut self, slot: usize) {
        let at = u32::try_from(slot).expect("subscriptions are bounded");
        self.session.subscriptions[slot] = None;
        self.feed.remove_filter(at);
        self.retained.retain(|job| job.slot != at);
        self.shared.retain(|(shared, ..)| *shared != at);
        self.members.retain(|(member, _)| *member != at);
    }

    /// Handles a PUBACK. An unknown packet identifier is ignored.
    pub(super) fn acknowledge(&mut self, packet_id: u16) {
        if let Some(MqttFlight { offset, source: FlightSource::Group(slot), .. }) =
            self.session.flights.acknowledge(packet_id)
        {
            self.acknowledge_to_group(slot, offset);
        }
    }

    fn acknowledge_to_group(&self, slot: u32, offset: Offset) {
        if let Some((_, member)) = self.members.iter().find(|(present, _)| *present == slot) {
            member.acknowledge(offset);
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
        let room_until = out.len() + MQTT_UNSENT_BYTES_MAX.saturating_sub(unsent);
        let filled = self.poll_all(room_until, out, cx);
        if filled.is_pending() {
            self.report_progress();
        }
        filled
    }

    fn poll_all(
        &mut self,
        room_until: usize,
        out: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Poll<OutboundError> {
        loop {
            if out.len() >= room_until {
                self.members.iter().for_each(|(_, member)| member.pass_turn());
                return Poll::Pending;
            }
            if self.resending.is_some() {
                if let Err(trouble) = ready!(self.poll_resend(out, cx)) {
                    return Poll::Ready(trouble);
                }
                continue;
            }
            if !self.retained.is_empty() {
                if let Err(trouble) = ready!(self.poll_retained(room_until, out, cx)) {
                    return Poll::Ready(trouble);
                }
                continue;
            }
            if let Some(mut matched) = self.matched.take() {
                let more = self.write_matched(&mut matched, room_until, out);
                if more {
                    self.matched = Some(matched);
                    if out.len() < room_until {
                        // The receive maximum is reached; groups may serve other members meanwhile.
                        self.members.iter().for_each(|(_, member)| member.pass_turn());
                        return Poll::Pending;
                    }
                }
                continue;
            }
            match self.feed.poll_next(cx) {
                Poll::Ready(Ok(FeedItem::Matched(matched))) => {
                    self.matched = Some(matched);
                    continue;
                }
                Poll::Ready(Ok(FeedItem::Skipped(records))) => {
                    self.report_skipped(records);
                    continue;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(error.into()),
                Poll::Pending => {}
            }
            match ready!(self.poll_shared(room_until, out, cx)) {
                Ok(()) => {}
                Err(error) => return Poll::Ready(error.into()),
            }
        }
    }

    /// Writes matched records of the log. Returns whether some are left.
    fn write_matched(&mut self, matched: &mut MatchedRecords, room_until: usize, out: &mut Vec<u8>) -> bool {
        let batch = matched.batch().clone();
        let mut reader = batch.reader();
        while let Some(hit) = matched.peek() {
            if out.len() >= room_until {
                return true;
            }
            let record = reader.read(hit.place);
            let subscriptions =
                hit.slots.iter().filter_map(|slot| self.session.subscriptions.get(*slot as usize)?.as_ref());
            if let Some(mut delivery) =
                Delivery::for_subscriptions(subscriptions, &record, self.writer.publisher)
            {
                let Self { writer, session: MqttSession { flights, .. }, .. } = self;
                if delivery.qos > 0 && flights.room(self.receive_maximum) == 0 {
                    return true;
                }
                writer.write(&record, &mut delivery, out, || flights.push(record.offset, FlightSource::Log));
            }
            matched.advance();
        }
        false
    }

    /// Takes records from the groups in turn, and writes them.
    fn poll_shared(
        &mut self,
        room_until: usize,
        out: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), LogReadError>> {
        while let Some((slot, batch, place)) = self.shared.front() {
            let (slot, place) = (*slot, *place);
            let room = self.session.flights.room(self.receive_maximum);
            if room == 0 || out.len() >= room_until {
                self.members.iter().for_each(|(_, member)| member.pass_turn());
                // Pending waits for an acknowledgement. Ready without room in `out` ends the caller's loop.
                return if room == 0 { Poll::Pending } else { Poll::Ready(Ok(())) };
            }
            let record = batch.reader().read(place);
            let subscription = self.session.subscriptions.get(slot as usize).and_then(Option::as_ref);
            let in_flight = Delivery::for_subscriptions(subscription.into_iter(), &record, 0).is_some_and(
                |mut delivery| {
                    let flights = &mut self.session.flights;
                    let packet_id = || flights.push(record.offset, FlightSource::Group(slot));
                    self.writer.write(&record, &mut delivery, out, packet_id) && delivery.qos > 0
                },
            );
            if !in_flight {
                self.acknowledge_to_group(slot, place.offset);
            }
            self.shared.pop_front();
        }
        let room = self.session.flights.room(self.receive_maximum).min(REFETCH_RECORDS);
        if room == 0 {
            self.members.iter().for_each(|(_, member)| member.pass_turn());
            return Poll::Pending;
        }
        for at in 0..self.members.len() {
            let (slot, member) = &mut self.members[at];
            match member.poll_take(room, cx) {
                Poll::Pending => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(ShareDelivery::Skipped(records))) => {
                    self.report_skipped(records);
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Ok(ShareDelivery::Records(batch, places))) => {
                    let slot = *slot;
                    self.shared.extend(places.into_iter().map(|place| (slot, batch.clone(), place)));
                    // The next call asks another group first, so that no group starves.
                    self.members.rotate_left(at + 1);
                    return Poll::Ready(Ok(()));
                }
            }
        }
        Poll::Pending
    }

    /// Sends the messages in flight again, with the same packet identifiers.
    fn poll_resend(&mut self, out: &mut Vec<u8>, cx: &mut Context<'_>) -> Poll<Result<(), OutboundError>> {
        let Some(resending) = &mut self.resending else { return Poll::Ready(Ok(())) };
        let Some(fetching) = &mut resending.fetching else {
            // Messages of groups have gone to other members.
            let (own, groups): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut resending.flights)
                .into_iter()
                .partition(|(_, flight)| !matches!(flight.source, FlightSource::Group(_)));
            for (packet_id, _) in groups {
                self.session.flights.acknowledge(packet_id);
            }
            resending.flights = own;
            let offsets: Vec<Offset> =
                resending.flights.iter().take(REFETCH_RECORDS).map(|(_, flight)| flight.offset).collect();
            if offsets.is_empty() {
                self.resending = None;
                return Poll::Ready(Ok(()));
            }
            let log = self.subscribers.log.clone();
            resending.fetching = Some(tokio::task::spawn_blocking(move || fetch_records(&*log, &offsets)));
            return Poll::Ready(Ok(()));
        };
        let done = ready!(Pin::new(fetching).poll(cx));
        resending.fetching = None;
        let found = done.unwrap_or_else(|ended| Err(LogReadError::Io(ended.to_string().into())))?;
        let again: Vec<_> = resending.flights.drain(..found.len()).zip(found).collect();
        let mut gone = 0;
        for ((packet_id, flight), found) in again {
            let Some((batch, place)) = found else {
                self.session.flights.acknowledge(packet_id);
                gone += 1;
                continue;
            };
            let record = batch.reader().read(place);
            let mut delivery =
                Delivery { packet_id: Some(packet_id), ..self.redelivery(&record, flight.source) };
            if !self.writer.write(&record, &mut delivery, out, || packet_id) {
                self.session.flights.acknowledge(packet_id);
            }
        }
        if gone > 0 {
            self.report_skipped(gone);
        }
        Poll::Ready(Ok(()))
    }

    /// How a record is delivered again.
    fn redelivery(&self, record: &RecordRef<'_>, source: FlightSource) -> Delivery {
        let whole = format!("{}/{}", record.datasource, record.topic);
        let topic = if self.datasource.is_all() { &whole } else { record.topic };
        let matches = |s: &&Subscription| {
            SubscriptionFilter::parse(&s.filter)
                .is_some_and(|wanted| wanted.group.is_none() && wanted.filter.matches(topic))
        };
        let subscriptions = self.session.subscriptions.iter().flatten().filter(matches);
        let delivery = Delivery::for_subscriptions(subscriptions, record, 0).unwrap_or_default();
        let retain = delivery.retain || source == FlightSource::Retained;
        Delivery { qos: 1, dup: true, retain, ..delivery }
    }

    /// Sends the retained messages for the oldest new subscription.
    fn poll_retained(
        &mut self,
        room_until: usize,
        out: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), OutboundError>> {
        let Some(mut job) = self.retained.pop_front() else { return Poll::Ready(Ok(())) };
        let Some((page, written)) = &mut job.page else {
            let asking = job.asking.get_or_insert_with(|| {
                let store = self.subscribers.retained.clone();
                let datasource = (!self.datasource.is_all()).then(|| self.datasource.clone());
                let (filter, below, after) = (job.filter.clone(), job.below, job.after.take());
                Box::pin(async move {
                    store.page(datasource.as_ref(), &filter, below, after, RETAINED_PAGE_BYTES).await
                })
            });
            let asked = asking.as_mut().poll(cx);
            if let Poll::Ready(page) = asked {
                job.asking = None;
                job.page = Some((page?, 0));
            }
            let waiting = job.asking.is_some();
            self.retained.push_front(job);
            return if waiting { Poll::Pending } else { Poll::Ready(Ok(())) };
        };
        let subscription = self.session.subscriptions.get(job.slot as usize).and_then(Option::as_ref);
        while let Some(message) = page.messages.get(*written) {
            let record = message.as_record();
            if let Some(mut delivery) =
                Delivery::for_subscriptions(subscription.into_iter(), &record, self.writer.publisher)
            {
                delivery.retain = true;
                let flights = &mut self.session.flights;
                let waits = delivery.qos > 0 && flights.room(self.receive_maximum) == 0;
                if waits || out.len() >= room_until {
                    self.retained.push_front(job);
                    return if waits { Poll::Pending } else { Poll::Ready(Ok(())) };
                }
                let packet_id = || flights.push(record.offset, FlightSource::Retained);
                self.writer.write(&record, &mut delivery, out, packet_id);
            }
            *written += 1;
        }
        job.after = page.next.take();
        job.page = None;
        if job.after.is_some() {
            self.retained.push_front(job);
        }
        Poll::Ready(Ok(()))
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
        let next = self.matched.as_ref().and_then(|matched| matched.peek()).map(|hit| hit.place.offset);
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
        if let Some(hit) = self.matched.take().as_ref().and_then(|matched| matched.peek()) {
            self.feed.rewind(hit.place.offset);
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
