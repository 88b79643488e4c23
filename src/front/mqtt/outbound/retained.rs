//! The retained messages that a new subscription begins with.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep};
use tracing::debug;

use super::super::delivery::Delivery;
use super::{Outbound, OutboundError};
use crate::consume::subscriber::retained::{RetainedError, RetainedPage, RetainedPageStart, RetainedStore};
use crate::consume::subscriber::sessions::FlightOrigin;
use crate::filter::TopicFilter;
use crate::limits::RETAINED_PAGE_BYTES;
use crate::message::{DatasourceId, Offset};

/// How long other messages wait for the retained ones that come before them.
const RETAINED_PATIENCE: Duration = Duration::from_secs(1);
/// The pause before retained messages that could not be read are asked for again.
const RETAINED_RETRY_PAUSE: Duration = Duration::from_secs(1);

/// A read of one page of retained messages.
type RetainedPageRead = Pin<Box<dyn Future<Output = Result<RetainedPage, RetainedError>> + Send>>;

/// The retained messages for a new subscription.
pub(super) struct PendingRetained {
    pub(super) slot: u32,
    filter: TopicFilter,
    /// Newer messages come from the log.
    below: Offset,
    /// They come behind everything below this offset, which waited before the subscription.
    pub(super) behind: Option<Offset>,
    after: Option<RetainedPageStart>,
    asking: Option<RetainedPageRead>,
    /// Until then other messages wait for the page.
    patience: Pin<Box<Sleep>>,
    /// Whether the last answer was an error that may be over by now.
    has_failed: bool,
    /// A page, and how many of its messages were written.
    page: Option<(RetainedPage, usize)>,
}

impl PendingRetained {
    /// The messages that match `filter` and are older than `below`; `behind` those of the log that end there.
    pub(super) fn new(slot: u32, filter: TopicFilter, below: Offset, behind: Option<Offset>) -> Self {
        let patience = Box::pin(tokio::time::sleep(RETAINED_PATIENCE));
        let (after, asking, has_failed, page) = (None, None, false, None);
        Self { slot, filter, below, behind, after, asking, patience, has_failed, page }
    }

    /// It is their turn now.
    pub(super) fn begin(&mut self) {
        self.behind = None;
        self.patience.as_mut().reset(Instant::now() + RETAINED_PATIENCE);
    }

    /// How many bytes its page holds.
    pub(super) fn held_bytes(&self) -> usize {
        self.page.as_ref().map_or(0, |(page, _)| page.weight())
    }

    /// Lets go of the page: what is left of it is read again.
    pub(super) fn release(&mut self) {
        if let Some((page, written)) = self.page.take()
            && let Some(last) = written.checked_sub(1).and_then(|last| page.messages.get(last))
        {
            self.after = Some(RetainedPageStart::behind(last));
        }
    }

    /// Whether other messages wait for the page no longer: the database is being made anew, for example. Older
    /// messages may then come after newer ones, as with any broker that retains in the background.
    pub(super) fn poll_late(&mut self, cx: &mut Context<'_>) -> bool {
        self.page.is_none() && self.patience.as_mut().poll(cx).is_ready()
    }

    /// Reads the next page, unless there is one already. `datasource` is `None` for a key of all datasources.
    fn poll_page(
        &mut self,
        store: &RetainedStore,
        datasource: Option<&DatasourceId>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), RetainedError>> {
        if self.page.is_none() {
            let asking = self.asking.get_or_insert_with(|| {
                let (store, datasource) = (store.clone(), datasource.cloned());
                let (filter, below, after) = (self.filter.clone(), self.below, self.after.clone());
                let pause = if self.has_failed { RETAINED_RETRY_PAUSE } else { Duration::ZERO };
                Box::pin(async move {
                    if !pause.is_zero() {
                        tokio::time::sleep(pause).await;
                    }
                    store.page(datasource.as_ref(), &filter, below, after, RETAINED_PAGE_BYTES).await
                })
            });
            let page = ready!(asking.as_mut().poll(cx));
            self.asking = None;
            self.has_failed = page.is_err();
            self.page = Some((page?, 0));
        }
        Poll::Ready(Ok(()))
    }
}

impl Outbound {
    /// Sends the retained messages for the oldest new subscription.
    pub(super) fn poll_retained(
        &mut self,
        room_until: usize,
        out: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), OutboundError>> {
        let Some(pending) = self.retained.front_mut() else { return Poll::Ready(Ok(())) };
        let datasource = (!self.datasource.is_all()).then_some(&self.datasource);
        match ready!(pending.poll_page(&self.subscribers.retained, datasource, cx)) {
            Ok(()) => {}
            Err(error @ RetainedError::Closed) => return Poll::Ready(Err(error.into())),
            Err(error) => {
                // The operator sees it at /readyz; the client has its subscription meanwhile.
                debug!(%error, "retained messages come later");
                return Poll::Ready(Ok(()));
            }
        }
        let Some((page, written)) = &mut pending.page else { return Poll::Ready(Ok(())) };
        let subscription =
            self.session.subscriptions.get(pending.slot as usize).and_then(Option::as_ref).cloned();
        while let Some(message) = page.messages.get(*written) {
            let record = message.as_record();
            let delivery = Delivery::for_subscriptions(subscription.iter(), &record, self.writer.publisher);
            if let Some(mut delivery) = delivery {
                delivery.retain = true;
                let waits = delivery.qos > 0 && self.session.flight_room(self.receive_maximum) == 0
                    || self.room.poll(out.len(), delivery.bytes_of(&record), cx).is_pending();
                if waits || out.len() >= room_until {
                    self.is_stalled |= waits;
                    return if waits { Poll::Pending } else { Poll::Ready(Ok(())) };
                }
                let (flights, qos) = (&mut self.session.flights, delivery.qos);
                if qos == 2 {
                    self.packets.begin(out);
                }
                let packet_id = || flights.push(record.offset, FlightOrigin::Retained, qos);
                self.writer.write(&record, &mut delivery, out, packet_id);
            }
            *written += 1;
        }
        pending.after = page.next.take();
        pending.page = None;
        if pending.after.is_none() {
            self.retained.pop_front();
        }
        Poll::Ready(Ok(()))
    }
}
