//! The messages that were in flight when the last connection ended: read from the log again, and sent with
//! the packet identifiers that they had.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::super::delivery::Delivery;
use super::super::flights::{FlightSource, MqttFlight};
use super::super::session::{MqttSession, Subscription, SubscriptionFilter};
use super::{Outbound, OutboundError};
use crate::consume::subscriber::feed::fetch_in_turn;
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
        let flights: VecDeque<_> = session.flights.unacknowledged().collect();
        (!flights.is_empty()).then_some(Self { flights, fetching: None })
    }
}

impl Outbound {
    /// Sends the messages in flight again, with the same packet identifiers.
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
            let share = self.feed.mailbox().share();
            resending.fetching = Some(Box::pin(fetch_in_turn(share, &self.subscribers.log, offsets)));
            return Poll::Ready(Ok(()));
        };
        let found = ready!(fetching.as_mut().poll(cx));
        resending.fetching = None;
        let found = found?;
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
}
