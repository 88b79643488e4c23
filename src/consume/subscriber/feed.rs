//! A feed: one subscriber's place in the log, and what comes next for its filters.
//!
//! A subscriber that keeps up is live: the router puts matching records into its [`Mailbox`]. One that
//! does not keep up, or begins in the past, is behind: the feed reads the log itself, each batch once,
//! and is live again when it reaches the end. Both give the same output: every record that matches, once,
//! in the log's order.
//!
//! What a feed does by itself it does in turns of its tenant's share: a few feeds of one datasource at a time
//! match records, fewer read the disk, each for a bounded time, however many of them are behind.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::sync::{AcquireError, OwnedSemaphorePermit};

use super::filter_set::{FilterSet, FilterSlot};
use super::mailbox::{Mailbox, MailboxContents, RoutedPlaces, RoutedRecords};
use super::matched::{HitFilters, MatchedRecords};
use super::router::{Router, SubscriberRoute};
use crate::limits::{
    BATCH_BYTES_MAX, CATCH_UP_BYTES, CATCH_UP_RECENT_BYTES, CATCH_UP_STEPS_MAX, REFETCH_BYTES,
};
use crate::log::{Batch, Log, LogReadError, RecordPlace};
use crate::message::{DatasourceId, Offset};
use crate::shares::{TenantShare, TenantShares};

/// What comes next in a feed.
pub enum FeedItem {
    /// Records.
    Matched(MatchedRecords),
    /// Retention has removed this many records, of any datasource, before they were read.
    Skipped(u64),
}

/// A subscriber's place in the log.
pub struct SubscriberFeed {
    router: Router,
    log: Arc<dyn Log>,
    /// The datasource of the key, or `*` for a key for all, whose filters name the datasource.
    datasource: DatasourceId,
    mailbox: Arc<Mailbox>,
    slots: Vec<Option<FilterSlot>>,
    /// How the router knows those filters.
    route: SubscriberRoute,
    /// Those filters for matching, once that was needed.
    filters: Option<Arc<FilterSet>>,
    /// Everything below this is given out. In a live feed so is what the router has passed over since.
    position: Offset,
    mode: FeedMode,
}

enum FeedMode {
    Live,
    Behind(CatchUpReader),
}

type CatchUpRead = Pin<Box<dyn Future<Output = Result<Vec<Batch>, LogReadError>> + Send>>;
type CatchUpTurn = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>;

/// Reads the log for a feed that is behind.
#[derive(Default)]
struct CatchUpReader {
    /// Batches that were read and not matched to their end yet.
    read: VecDeque<Batch>,
    reading: Option<CatchUpRead>,
    /// The turn in which it reads and matches: what it holds of the log is bounded with the turns.
    turn: Option<OwnedSemaphorePermit>,
    /// The wait for a turn, if there was none at once.
    waiting: Option<CatchUpTurn>,
}

impl CatchUpReader {
    /// The next batches from `position` on; none at the end of the log.
    fn poll_read(
        &mut self,
        log: &Arc<dyn Log>,
        share: &Arc<TenantShare>,
        position: Offset,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Vec<Batch>, LogReadError>> {
        let reading = match &mut self.reading {
            Some(reading) => reading,
            none => match log.read_recent(position, CATCH_UP_RECENT_BYTES) {
                Some(batches) => return Poll::Ready(Ok(batches)),
                None => {
                    let (log, share) = (log.clone(), share.clone());
                    none.insert(Box::pin(async move {
                        let read = share.read_in_turn(move || log.read(position, CATCH_UP_BYTES));
                        read.await.unwrap_or_else(|ended| Err(LogReadError::Io(ended.to_string().into())))
                    }))
                }
            },
        };
        let done = ready!(reading.as_mut().poll(cx));
        self.reading = None;
        Poll::Ready(done)
    }

    /// Waits for a turn: its tenant's subscribers have as many as there are processors, so that others find
    /// one free soon. After each read those that wait are first.
    fn poll_turn(&mut self, share: &TenantShare, cx: &mut Context<'_>) -> Poll<()> {
        if self.read.is_empty() && self.reading.is_none() {
            self.turn = None;
        }
        if self.turn.is_none() {
            let turns = share.catch_up_turns();
            let waiting = match &mut self.waiting {
                Some(waiting) => waiting,
                none => match turns.clone().try_acquire_owned() {
                    Ok(turn) => {
                        self.turn = Some(turn);
                        return Poll::Ready(());
                    }
                    Err(_) => none.insert(Box::pin(turns.clone().acquire_owned())),
                },
            };
            self.turn = ready!(waiting.as_mut().poll(cx)).ok();
            self.waiting = None;
        }
        Poll::Ready(())
    }
}

impl SubscriberFeed {
    /// A feed without filters, that begins at `position`.
    pub fn new(
        router: Router,
        log: Arc<dyn Log>,
        shares: &TenantShares,
        datasource: &DatasourceId,
        position: Offset,
    ) -> Self {
        Self {
            router,
            log,
            datasource: datasource.clone(),
            mailbox: Arc::new(Mailbox::new(shares.share(datasource))),
            slots: Vec::new(),
            route: SubscriberRoute::Nothing,
            filters: None,
            position,
            mode: FeedMode::Behind(CatchUpReader::default()),
        }
    }

    /// The mailbox, where the subscriber reports how far it is.
    pub fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// The first record that has not been given out.
    pub fn position(&self) -> Offset {
        self.position
    }

    /// Whether everything below `end` was given out. The router may have some of the newest records still.
    pub fn has_reached(&self, end: Offset) -> bool {
        self.position >= end || matches!(self.mode, FeedMode::Live) && self.mailbox.is_empty()
    }

    /// Sets the filter of a slot. `from` is the first record wanted, or `None` for records appended from now
    /// on. If it is in the past, the whole feed goes back there, and the other filters do not give out their
    /// records again. Returns the offset at which the filter begins.
    pub fn set_filter(&mut self, slot: u32, filter: &str, from: Option<Offset>) -> Offset {
        self.settle_position();
        self.remove_filter(slot);
        let filter: Box<str> = match self.datasource.is_all() {
            true => filter.into(),
            false => format!("{}/{filter}", self.datasource).into(),
        };
        let one = match self.route {
            SubscriberRoute::One(slot) => self.slots[slot as usize].as_ref().map(|slot| &*slot.filter),
            _ => None,
        };
        self.route = self.router.subscribe(&self.datasource, &self.mailbox, self.route, one, (&filter, slot));
        // Read the end after subscribing: every record from here on is routed.
        let end = self.log.next_offset();
        let from = from.map_or(end, |from| from.min(end));
        let at = slot as usize;
        if self.slots.len() <= at {
            self.slots.resize_with(at + 1, || None);
        }
        self.slots[at] = Some(FilterSlot { filter, from });
        if from < self.position {
            for (other, slot) in self.slots.iter_mut().enumerate() {
                if let Some(slot) = slot.as_mut().filter(|_| other != at) {
                    slot.from = slot.from.max(self.position);
                }
            }
            self.rewind(from);
        } else if from < end && matches!(self.mode, FeedMode::Live) {
            // What was appended before the filter is not routed for it, and the mailbox has some of that for others.
            self.rewind(self.position);
        }
        self.filters = None;
        from
    }

    /// Brings the position of a live feed up to date: what was routed since its last record matches no filter.
    fn settle_position(&mut self) {
        if matches!(self.mode, FeedMode::Live) {
            let routed = self.router.routed_offset();
            self.position = self.position.max(self.mailbox.taken_until(routed).unwrap_or_default());
        }
    }

    /// Goes back to a record that was given out, which is then given out again.
    pub fn rewind(&mut self, to: Offset) {
        self.position = self.position.min(to);
        self.mailbox.go_behind();
        self.mode = FeedMode::Behind(CatchUpReader::default());
    }

    /// Removes a slot's filter.
    pub fn remove_filter(&mut self, slot: u32) {
        if let Some(slot) = self.slots.get_mut(slot as usize).and_then(Option::take) {
            self.route = self.router.unsubscribe(&self.datasource, &self.mailbox, self.route, &slot.filter);
        }
        self.filters = None;
    }

    /// How many bytes it has read and not given out. [`SubscriberFeed::release`] lets go of them.
    pub fn held_bytes(&self) -> usize {
        match &self.mode {
            FeedMode::Live => 0,
            FeedMode::Behind(reader) => reader.read.iter().map(Batch::weight).sum(),
        }
    }

    /// Lets others have its turn, because it is not asked for more now.
    pub fn pause(&mut self) {
        if let FeedMode::Behind(reader) = &mut self.mode {
            reader.turn = None;
            reader.waiting = None;
        }
    }

    /// Lets go of what it has read and not given out: it is read again when it is asked for.
    pub fn release(&mut self) {
        if let FeedMode::Behind(reader) = &mut self.mode {
            *reader = CatchUpReader::default();
        }
    }

    /// Where a slot's filter begins.
    pub fn filter_start(&self, slot: u32) -> Option<Offset> {
        self.slots.get(slot as usize)?.as_ref().map(|slot| slot.from)
    }

    /// What comes next.
    ///
    /// # Errors
    /// [`LogReadError`], if the log cannot be read; never `Removed`, which is [`FeedItem::Skipped`].
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<FeedItem, LogReadError>> {
        loop {
            let item = match &self.mode {
                FeedMode::Live => ready!(self.poll_live(cx)),
                FeedMode::Behind(_) => ready!(self.poll_behind(cx))?,
            };
            if let Some(item) = item {
                return Poll::Ready(Ok(item));
            }
        }
    }

    /// What the router has left in the mailbox. `None`: look again.
    fn poll_live(&mut self, cx: &mut Context<'_>) -> Poll<Option<FeedItem>> {
        Poll::Ready(match ready!(self.mailbox.poll_take(cx)) {
            MailboxContents::Behind => {
                self.mode = FeedMode::Behind(CatchUpReader::default());
                None
            }
            MailboxContents::Batch(routed) => {
                self.take_routed(routed).filter(MatchedRecords::has_more).map(FeedItem::Matched)
            }
        })
    }

    /// What the log has after the position. `None`: look again.
    fn poll_behind(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<FeedItem>, LogReadError>> {
        let filters = self.filter_set();
        let FeedMode::Behind(reader) = &mut self.mode else { return Poll::Ready(Ok(None)) };
        ready!(reader.poll_turn(self.mailbox.share(), cx));
        if !reader.read.is_empty() {
            let mut steps = CATCH_UP_STEPS_MAX;
            while let Some(batch) = reader.read.front() {
                let (places, next) = filters.match_batch(batch, self.position, &mut steps);
                self.position = self.position.max(next);
                let batch = batch.clone();
                if next >= batch.next_offset() {
                    reader.read.pop_front();
                }
                if !places.is_empty() {
                    let matched = self.matched(batch, RoutedPlaces::own(places), None);
                    let item = Some(matched).filter(MatchedRecords::has_more).map(FeedItem::Matched);
                    return Poll::Ready(Ok(item));
                }
                if steps == 0 {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
            }
        }
        match ready!(reader.poll_read(&self.log, self.mailbox.share(), self.position, cx)) {
            Ok(batches) if batches.is_empty() => {
                self.try_live();
                Poll::Ready(Ok(None))
            }
            Ok(batches) => {
                reader.read = batches.into();
                // A feed that reads much yields to other tasks between batches.
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Err(LogReadError::Removed { first, .. }) => {
                let skipped = first.saturating_sub(self.position);
                self.position = self.position.max(first);
                Poll::Ready(Ok(Some(FeedItem::Skipped(skipped))))
            }
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    /// At the end of the log: lets the router take over, unless it has already routed more.
    fn try_live(&mut self) {
        self.mailbox.go_live();
        if self.router.routing_offset() > self.position {
            self.mailbox.go_behind();
        } else {
            self.mode = FeedMode::Live;
        }
    }

    /// The filters for matching.
    fn filter_set(&mut self) -> Arc<FilterSet> {
        self.filters.get_or_insert_with(|| Arc::new(FilterSet::new(&self.slots))).clone()
    }

    /// Records of a batch. `slot` is the filter that matches all of them, if that is known.
    fn matched(&mut self, batch: Batch, places: Arc<RoutedPlaces>, slot: Option<u32>) -> MatchedRecords {
        let filters = match slot {
            Some(slot) => HitFilters::One([slot]),
            None => HitFilters::Several(self.filter_set(), Box::default()),
        };
        MatchedRecords::new(batch, places, filters, self.log.withheld().clone())
    }

    /// The records in the mailbox that are still wanted.
    fn take_routed(&mut self, routed: RoutedRecords) -> Option<MatchedRecords> {
        let RoutedRecords { batch, slot, places } = routed;
        let begin = self.position;
        self.position = begin.max(batch.next_offset());
        let from = match slot {
            Some(slot) => self.slots.get(slot as usize)?.as_ref()?.from.max(begin),
            None => begin,
        };
        let first = places.partition_point(|place| place.offset < from);
        (first < places.len()).then(|| self.matched(batch, places, slot).starting_at(first))
    }
}

impl Drop for SubscriberFeed {
    fn drop(&mut self) {
        for slot in self.slots.iter().flatten() {
            self.route = self.router.unsubscribe(&self.datasource, &self.mailbox, self.route, &slot.filter);
        }
    }
}

/// As [`fetch_records`], on a blocking thread, in a turn of the tenant's share. Nothing is read any more once
/// the future is dropped while it waits for the turn.
pub fn fetch_in_turn(
    share: &Arc<TenantShare>,
    log: &Arc<dyn Log>,
    offsets: Vec<Offset>,
) -> impl Future<Output = Result<Vec<Option<(Batch, RecordPlace)>>, LogReadError>> + Send + 'static + use<> {
    let (share, log) = (share.clone(), log.clone());
    async move {
        let fetching = share.read_in_turn(move || fetch_records(&*log, &offsets));
        fetching.await.unwrap_or_else(|ended| Err(LogReadError::Io(ended.to_string().into())))
    }
}

/// Reads single records. For each offset, in the given order, returns the batch and the place in it, or
/// `None` if retention has removed the record or it is withheld. `offsets` ascend. The answer ends after about
/// [`REFETCH_BYTES`] of payloads, and [`BATCH_BYTES_MAX`] of the batches that keep them in memory: the rest is to be asked
/// for again. Blocks on the disk.
///
/// # Errors
/// [`LogReadError`] for damage and the file system's errors.
fn fetch_records(
    log: &dyn Log,
    offsets: &[Offset],
) -> Result<Vec<Option<(Batch, RecordPlace)>>, LogReadError> {
    let mut found = Vec::with_capacity(offsets.len());
    let mut current: Option<Batch> = None;
    let left_out = log.withheld().now();
    let (mut bytes, mut held) = (0, 0);
    for &offset in offsets {
        if bytes >= REFETCH_BYTES {
            break;
        }
        let holds = |batch: &Batch| (batch.first_offset()..batch.next_offset()).contains(&offset);
        if !current.as_ref().is_some_and(holds) {
            if held >= BATCH_BYTES_MAX {
                break;
            }
            current = match log.read(offset, 1) {
                Ok(batches) => batches.into_iter().find(holds),
                Err(LogReadError::Removed { .. }) => None,
                Err(error) => return Err(error),
            };
            held += current.as_ref().map_or(0, Batch::weight);
        }
        let given = |batch: &Batch| {
            let place = batch.place(offset)?;
            let record = batch.reader().read(place);
            let given = left_out.is_nothing() || !left_out.withholds(&record);
            given.then(|| (batch.clone(), place, record.payload.len()))
        };
        let found_one = current.as_ref().and_then(given);
        bytes += found_one.as_ref().map_or(0, |(.., payload)| *payload);
        found.push(found_one.map(|(batch, place, _)| (batch, place)));
    }
    Ok(found)
}
