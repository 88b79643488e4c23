//! The retained messages that a new subscription begins with.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::super::delivery::Delivery;
use super::super::flights::FlightSource;
use super::{Outbound, OutboundError};
use crate::consume::subscriber::retained::{RetainedError, RetainedPage, RetainedPageStart, RetainedStore};
use crate::filter::TopicFilter;
use crate::limits::RETAINED_PAGE_BYTES;
use crate::message::{DatasourceId, Offset};

/// A read of one page of retained messages.
type RetainedPageRead = Pin<Box<dyn Future<Output = Result<RetainedPage, RetainedError>> + Send>>;

/// The retained messages for a new subscription.
pub(super) struct PendingRetained {
    pub(super) slot: u32,
    filter: TopicFilter,
    /// Newer messages come from the log.
    below: Offset,
    after: Option<RetainedPageStart>,
    asking: Option<RetainedPageRead>,
    /// A page, and how many of its messages were written.
    page: Option<(RetainedPage, usize)>,
}

impl PendingRetained {
    /// The messages that match `filter` and are older than `below`.
    pub(super) fn new(slot: u32, filter: TopicFilter, below: Offset) -> Self {
        Self { slot, filter, below, after: None, asking: None, page: None }
    }

    /// What its page takes, in bytes.
    pub(super) fn held_bytes(&self) -> usize {
        let messages = self.page.iter().flat_map(|(page, _)| &page.messages);
        messages.map(|message| message.payload.len() + message.topic.len()).sum()
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
                let (filter, below, after) = (self.filter.clone(), self.below, self.after.take());
                Box::pin(async move {
                    store.page(datasource.as_ref(), &filter, below, after, RETAINED_PAGE_BYTES).await
                })
            });
            let page = ready!(asking.as_mut().poll(cx));
            self.asking = None;
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
        if let Err(error) = ready!(pending.poll_page(&self.subscribers.retained, datasource, cx)) {
            self.retained.pop_front();
            return Poll::Ready(Err(error.into()));
        }
        let Some((page, written)) = &mut pending.page else { return Poll::Ready(Ok(())) };
        let subscription = self.session.subscriptions.get(pending.slot as usize).and_then(Option::as_ref);
        while let Some(message) = page.messages.get(*written) {
            let record = message.as_record();
            if let Some(mut delivery) =
                Delivery::for_subscriptions(subscription.into_iter(), &record, self.writer.publisher)
            {
                delivery.retain = true;
                let flights = &mut self.session.flights;
                let waits = delivery.qos > 0 && flights.room(self.receive_maximum) == 0;
                if waits || out.len() >= room_until {
                    return if waits { Poll::Pending } else { Poll::Ready(Ok(())) };
                }
                let packet_id = || flights.push(record.offset, FlightSource::Retained);
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
