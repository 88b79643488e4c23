//! The messages that were in flight when the last connection ended: read from the log again, and sent with
//! the packet identifiers that they had. Retained messages may have left the log since: they are looked for among those
//! that are retained now.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tracing::debug;

use super::super::delivery::Delivery;
use super::super::flights::MqttFlight;
use super::super::session::{MqttSession, Subscription, SubscriptionFilter};
use super::{Outbound, OutboundError};
use crate::consume::subscriber::feed::fetch_in_turn;
use crate::consume::subscriber::retained::{RetainedError, RetainedMessage, RetainedStore};
use crate::consume::subscriber::sessions::FlightOrigin;
use crate::filter::TopicFilter;
use crate::limits::{BATCH_BYTES_MAX, REFETCH_BYTES, REFETCH_RECORDS, RETAINED_PAGE_BYTES};
use crate::log::{Batch, RecordPlace};
use crate::message::{DatasourceId, Offset, RecordRef};

/// Reads messages in flight again: the first ones, in their order. `None` for one that is nowhere any more.
type RefetchTask = Pin<Box<dyn Future<Output = Result<Vec<Option<FoundMessage>>, OutboundError>> + Send>>;

/// A message that was found again.
enum FoundMessage {
    Logged(Batch, RecordPlace),
    Retained(Box<RetainedMessage>),
}

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
        let most = 2 * REFETCH_BYTES + BATCH_BYTES_MAX / 2;
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
        let filters =
            session.subscriptions.iter().flatten().filter_map(|s| SubscriptionFilter::parse(&s.filter));
        let search = RetainedSearch {
            store: self.subscribers.retained.clone(),
            datasource: (!self.datasource.is_all()).then(|| self.datasource.clone()),
            filters: match wanted.iter().any(|flight| flight.origin == FlightOrigin::Retained) {
                true => filters.filter(|wanted| wanted.group.is_none()).map(|wanted| wanted.filter).collect(),
                false => Vec::new(),
            },
        };
        let fetching = fetch_in_turn(self.feed.mailbox().share(), &self.subscribers.log, offsets);
        resending.fetching = Some(Box::pin(async move {
            let logged = |found: Option<(Batch, RecordPlace)>| {
                found.map(|(batch, place)| FoundMessage::Logged(batch, place))
            };
            let mut found = fetching.await?.into_iter().map(logged).collect();
            search.find(&wanted, &mut found).await?;
            Ok(found)
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
    /// The filters that they may have come by.
    filters: Vec<TopicFilter>,
}

impl RetainedSearch {
    /// Adds what is retained still of the `wanted` messages that are not among `found`. Cuts `found` behind the first of
    /// them that take about [`REFETCH_BYTES`].
    ///
    /// # Errors
    /// [`RetainedError::Closed`]. Where the messages cannot be read for another reason, none are added.
    async fn find(
        self,
        wanted: &[MqttFlight],
        found: &mut Vec<Option<FoundMessage>>,
    ) -> Result<(), RetainedError> {
        let mut missing: HashMap<Offset, Vec<usize>> = HashMap::new();
        for (at, flight) in wanted.iter().enumerate().take(found.len()) {
            if found[at].is_none() && flight.origin == FlightOrigin::Retained {
                missing.entry(flight.offset).or_default().push(at);
            }
        }
        let Some(newest) = missing.keys().max().copied() else { return Ok(()) };
        for filter in &self.filters {
            let mut after = None;
            loop {
                let (store, datasource) = (&self.store, self.datasource.as_ref());
                let page = store.page(datasource, filter, newest + 1, after, RETAINED_PAGE_BYTES).await;
                let page = match page {
                    Ok(page) => page,
                    Err(RetainedError::Closed) => return Err(RetainedError::Closed),
                    Err(error) => {
                        debug!(%error, "retained messages in flight cannot be read again");
                        return Ok(());
                    }
                };
                for message in page.messages {
                    for at in missing.remove(&message.offset).into_iter().flatten() {
                        // Those behind a cut are asked for again.
                        if let Some(place) = found.get_mut(at) {
                            *place = Some(FoundMessage::Retained(Box::new(message.clone())));
                        }
                    }
                }
                cut_retained(found);
                missing.retain(|_, places| places[0] < found.len());
                if missing.is_empty() {
                    return Ok(());
                }
                after = page.next;
                if after.is_none() {
                    break;
                }
            }
        }
        Ok(())
    }
}

/// Cuts what was found behind the first retained messages that take about [`REFETCH_BYTES`].
fn cut_retained(found: &mut Vec<Option<FoundMessage>>) {
    let mut bytes = 0;
    let over = found.iter().position(|found| {
        let is_over = bytes >= REFETCH_BYTES;
        if let Some(FoundMessage::Retained(message)) = found {
            bytes += message.payload.len();
        }
        is_over
    });
    found.truncate(over.unwrap_or(found.len()));
}
