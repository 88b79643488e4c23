//! The messages that were in flight when the last connection ended: read from the log again, and sent with
//! the packet identifiers that they had. Retained messages may have left the log since: they are looked for among those
//! that are retained now, by their offsets, whatever the session subscribes to by now.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::Instant;
use tracing::debug;

use super::super::delivery::Delivery;
use super::super::flights::MqttFlight;
use super::super::session::{MqttSession, Subscription, SubscriptionFilter};
use super::{Outbound, OutboundError};
use crate::consume::subscriber::feed::fetch_in_turn;
use crate::consume::subscriber::retained::{RetainedError, RetainedMessage, RetainedStore};
use crate::consume::subscriber::sessions::FlightOrigin;
use crate::limits::{BATCH_BYTES_MAX, REFETCH_BYTES, REFETCH_RECORDS};
use crate::log::{Batch, RecordPlace};
use crate::message::{DatasourceId, Offset, RecordRef};

/// How long a session waits for each part of its retained messages that cannot be read now, before that is given up.
const RETAINED_REFETCH_TIME_MAX: Duration = Duration::from_secs(30);
/// The pause before they are asked for again.
const RETAINED_REFETCH_PAUSE: Duration = Duration::from_secs(1);

/// Reads messages in flight again.
type RefetchTask = Pin<Box<dyn Future<Output = Result<Refetch, OutboundError>> + Send>>;

/// The first of the messages that were asked for.
struct Refetch {
    /// In their order. `None` for one that is nowhere any more.
    found: Vec<Option<FoundMessage>>,
    /// It ends in front of a retained message that could not be read.
    has_failed: bool,
}

/// A message that was found again.
enum FoundMessage {
    Logged(Batch, RecordPlace),
    Retained(Box<RetainedMessage>),
}

/// The messages that are not sent again yet.
pub(super) struct PendingResend {
    flights: VecDeque<(u16, MqttFlight)>,
    fetching: Option<RefetchTask>,
    /// Since when the first of them, a retained message, cannot be read.
    failing_since: Option<Instant>,
}

impl PendingResend {
    /// The messages in flight of a session; `None` if there are none.
    pub(super) fn of_session(session: &MqttSession) -> Option<Self> {
        let flights: VecDeque<_> = session.flights.all_sent().into();
        (!flights.is_empty()).then_some(Self { flights, fetching: None, failing_since: None })
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
        let most = 2 * REFETCH_BYTES + BATCH_BYTES_MAX / 2;
        if self.resending.is_some() && self.room.poll(out.len(), most, cx).is_pending() {
            self.is_stalled = true;
            return Poll::Pending;
        }
        let Some(resending) = &mut self.resending else { return Poll::Ready(Ok(())) };
        let Some(fetching) = &mut resending.fetching else { return self.begin_fetching() };
        let found = ready!(fetching.as_mut().poll(cx));
        resending.fetching = None;
        let Refetch { found, has_failed } = found?;
        resending.failing_since = has_failed
            .then(|| resending.failing_since.filter(|_| found.is_empty()).unwrap_or_else(Instant::now));
        let again: Vec<_> = resending.flights.drain(..found.len()).zip(found).collect();
        let mut gone = 0;
        for ((packet_id, flight), found) in again {
            if self.session.flights.sent(packet_id) != Some(flight) {
                // The client has acknowledged it after all.
                continue;
            }
            let is_written = match &found {
                Some(FoundMessage::Logged(batch, place)) => {
                    self.write_again(packet_id, flight, &batch.reader().read(*place), out)
                }
                Some(FoundMessage::Retained(message)) => {
                    self.write_again(packet_id, flight, &message.as_record(), out)
                }
                None => false,
            };
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
        let wanted: Vec<MqttFlight> =
            resending.flights.iter().take(room).map(|(_, flight)| *flight).collect();
        let offsets: Vec<Offset> = wanted.iter().map(|flight| flight.offset).collect();
        let failing_since = resending.failing_since;
        let search = RetainedSearch {
            store: self.subscribers.retained.clone(),
            datasource: (!self.datasource.is_all()).then(|| self.datasource.clone()),
            is_last_try: failing_since.is_some_and(|since| since.elapsed() >= RETAINED_REFETCH_TIME_MAX),
        };
        let fetching = fetch_in_turn(self.feed.mailbox().share(), &self.subscribers.log, offsets);
        resending.fetching = Some(Box::pin(async move {
            if failing_since.is_some() {
                tokio::time::sleep(RETAINED_REFETCH_PAUSE).await;
            }
            let logged = |found: Option<(Batch, RecordPlace)>| {
                found.map(|(batch, place)| FoundMessage::Logged(batch, place))
            };
            let found = fetching.await?.into_iter().map(logged).collect();
            Ok(search.find(&wanted, found).await?)
        }));
        Poll::Ready(Ok(()))
    }

    /// Writes a message again. Returns whether it was.
    fn write_again(
        &mut self,
        packet_id: u16,
        flight: MqttFlight,
        record: &RecordRef<'_>,
        out: &mut Vec<u8>,
    ) -> bool {
        let mut delivery = Delivery { packet_id: Some(packet_id), ..self.redelivery(record, flight) };
        if flight.qos == 2 {
            self.packets.begin(out);
        }
        self.writer.write(record, &mut delivery, out, || packet_id)
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

/// Looks for retained messages whose records have left the log.
struct RetainedSearch {
    store: RetainedStore,
    /// `None` for a key of all datasources.
    datasource: Option<DatasourceId>,
    /// What cannot be read now is given up.
    is_last_try: bool,
}

impl RetainedSearch {
    /// Adds what is retained still of the `wanted` messages that are not among `found`. Cuts `found` behind the first of
    /// them that take about [`REFETCH_BYTES`], or in front of the first one if they cannot be read now.
    ///
    /// # Errors
    /// [`RetainedError::Closed`].
    async fn find(
        self,
        wanted: &[MqttFlight],
        mut found: Vec<Option<FoundMessage>>,
    ) -> Result<Refetch, RetainedError> {
        let is_missing = |at: &usize| found[*at].is_none() && wanted[*at].origin == FlightOrigin::Retained;
        let missing: Vec<usize> = (0..found.len()).filter(is_missing).collect();
        let Some(first) = missing.first() else { return Ok(Refetch { found, has_failed: false }) };
        let offsets = missing.iter().map(|at| wanted[*at].offset).collect();
        match self.store.messages_at(self.datasource.as_ref(), offsets, REFETCH_BYTES).await {
            Ok(messages) => {
                if let Some(cut) = missing.get(messages.len()) {
                    found.truncate(*cut);
                }
                for (at, message) in missing.into_iter().zip(messages) {
                    found[at] = message.map(|message| FoundMessage::Retained(Box::new(message)));
                }
                Ok(Refetch { found, has_failed: false })
            }
            Err(RetainedError::Closed) => Err(RetainedError::Closed),
            Err(error) => {
                let is_last_try = self.is_last_try;
                debug!(%error, is_last_try, "retained messages in flight cannot be read again now");
                if !is_last_try {
                    found.truncate(*first);
                }
                Ok(Refetch { found, has_failed: !is_last_try })
            }
        }
    }
}
