//! The messages that were in flight when the last connection ended: read from the log again, and sent with
//! the packet identifiers that they had.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::super::delivery::Delivery;
use super::super::flights::MqttFlight;
use super::super::session::{MqttSession, Subscription, SubscriptionFilter};
use super::{Outbound, OutboundError};
use crate::consume::subscriber::feed::fetch_in_turn;
use crate::consume::subscriber::sessions::FlightOrigin;
use crate::limits::{BATCH_BYTES_MAX, REFETCH_BYTES, REFETCH_RECORDS};
use crate::log::{Batch, LogReadError, RecordPlace};
use crate::message::{Offset, RecordRef};

/// Reads records in flight again.
type RefetchTask =
    Pin<Box<dyn Future<Output = Result<Vec<Option<(Batch, RecordPlace)>>, LogReadError>> + Send>>;

/// The messages that are not sent again yet.
pub(super) struct PendingResend {
    flights: VecDeque<(u16, MqttFlight)>,
    fetching: Option<RefetchTask>,
}

impl PendingResend {
    /// The messages in flight of a session; `None` if there are none.
    pub(super) fn of_session(session: &MqttSession) -> Option<Self> {
        let flights: VecDeque<_> = session.flights.all_sent().into();
        (!flights.is_empty()).then_some(Self { flights, fetching: None })
    }
}

impl Outbound {
    /// Sends the messages in flight again, with the same packet identifiers, as many at a time as the client takes.
    pub(super) fn poll_resend(
        &mut self,
        out: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), OutboundError>> {
        // What one read brings is written at once: some messages, the last of any size.
        let most = REFETCH_BYTES + BATCH_BYTES_MAX / 2;
        if self.resending.is_some() && self.room.poll(out.len(), most, cx).is_pending() {
            self.is_stalled = true;
            return Poll::Pending;
        }
        let Some(resending) = &mut self.resending else { return Poll::Ready(Ok(())) };
        let Some(fetching) = &mut resending.fetching else { return self.begin_fetching() };
        let found = ready!(fetching.as_mut().poll(cx));
        resending.fetching = None;
        let found = found?;
        let again: Vec<_> = resending.flights.drain(..found.len()).zip(found).collect();
        let mut gone = 0;
        for ((packet_id, flight), found) in again {
            if self.session.flights.sent(packet_id) != Some(flight) {
                // The client has acknowledged it after all.
                continue;
            }
            let is_written = found.as_ref().is_some_and(|(batch, place)| {
                let record = batch.reader().read(*place);
                let mut delivery =
                    Delivery { packet_id: Some(packet_id), ..self.redelivery(&record, flight) };
                if flight.qos == 2 {
                    self.packets.begin(out);
                }
                self.writer.write(&record, &mut delivery, out, || packet_id)
            });
            if !is_written && self.session.flights.give_up(packet_id) {
                // The client may have it, and has to forget the identifier before another message gets that.
                self.releases.push(packet_id);
            }
            gone += u64::from(found.is_none());
        }
        if gone > 0 {
            self.report_skipped(gone);
        }
        self.write_releases(out);
        Poll::Ready(Ok(()))
    }

    /// Begins to read the next messages that are sent again, or ends with the last of them.
    fn begin_fetching(&mut self) -> Poll<Result<(), OutboundError>> {
        let Self { resending: Some(resending), session, .. } = self else { return Poll::Ready(Ok(())) };
        // Messages of groups have gone to other members.
        resending.flights.retain(|(packet_id, flight)| {
            let is_of_group = matches!(flight.origin, FlightOrigin::Group(_));
            if is_of_group {
                session.flights.give_up(*packet_id);
            }
            !is_of_group && session.flights.sent(*packet_id) == Some(*flight)
        });
        if resending.flights.is_empty() {
            self.resending = None;
            return Poll::Ready(Ok(()));
        }
        let in_flight = session.flights.len().saturating_sub(resending.flights.len());
        let room = usize::from(self.receive_maximum).saturating_sub(in_flight).min(REFETCH_RECORDS);
        if room == 0 {
            self.is_stalled = true;
            return Poll::Pending;
        }
        let offsets: Vec<Offset> =
            resending.flights.iter().take(room).map(|(_, flight)| flight.offset).collect();
        let share = self.feed.mailbox().share();
        resending.fetching = Some(Box::pin(fetch_in_turn(share, &self.subscribers.log, offsets)));
        Poll::Ready(Ok(()))
    }

    /// How a record is delivered again.
    fn redelivery(&self, record: &RecordRef<'_>, flight: MqttFlight) -> Delivery {
        let whole = format!("{}/{}", record.datasource, record.topic);
        let topic = if self.datasource.is_all() { &whole } else { record.topic };
        let is_shared = flight.origin == FlightOrigin::Shared;
        let matches = |s: &&Subscription| {
            SubscriptionFilter::parse(&s.filter)
                .is_some_and(|wanted| wanted.group.is_some() == is_shared && wanted.filter.matches(topic))
        };
        // A group has given it under one subscription.
        let most = if is_shared { 1 } else { usize::MAX };
        let subscriptions = self.session.subscriptions.iter().flatten().filter(matches).take(most);
        let delivery = Delivery::for_subscriptions(subscriptions, record, 0).unwrap_or_default();
        let retain = delivery.retain || flight.origin == FlightOrigin::Retained;
        Delivery { qos: flight.qos, dup: true, retain, ..delivery }
    }
}
