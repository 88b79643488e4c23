//! A feed: one subscriber's place in the log, and what comes next for its filters.
//!
//! A subscriber that keeps up is live: the router puts matching records into its [`Mailbox`]. One that
//! does not keep up, or begins in the past, is behind: the feed reads the log itself, each batch once,
//! and is live again when it reaches the end. Both give the same output: every record that matches, once,
//! in the log's order.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::task::JoinHandle;

use super::mailbox::{Mailbox, MailboxContents, RoutedRecords};
use super::matched::{FilterHits, MatchedRecords};
use super::router::Router;
use super::trie::Trie;
use crate::limits::CATCH_UP_BYTES;
use crate::log::{Batch, Log, LogReadError, RecordPlace};
use crate::message::{DatasourceId, Offset};

/// What comes next in a feed.
pub enum FeedItem {
    /// Records.
    Matched(MatchedRecords),
    /// Retention has removed this many records, of any datasource, before they were read.
    Skipped(u64),
}

/// One of a feed's filters.
struct FilterSlot {
    /// With the datasource as its first level.
    filter: Box<str>,
    /// The first record wanted.
    from: Offset,
}

/// A subscriber's place in the log.
pub struct SubscriberFeed {
    router: Router,
    log: Arc<dyn Log>,
    /// The datasource of the key. `None` for a key for all, whose filters name the datasource.
    datasource: Option<DatasourceId>,
    mailbox: Arc<Mailbox>,
    slots: Vec<Option<FilterSlot>>,
    /// Everything below this is given out.
    position: Offset,
    mode: FeedMode,
}

enum FeedMode {
    Live,
    Behind(CatchUpReader),
}

/// Reads the log for a feed that is behind.
#[derive(Default)]
struct CatchUpReader {
    /// Batches that were read and not matched yet.
    read: VecDeque<Batch>,
    /// The filters, for matching.
    trie: Trie<u32>,
    reading: Option<JoinHandle<Result<Vec<Batch>, LogReadError>>>,
}

impl CatchUpReader {
    /// The next batches from `position` on; none at the end of the log.
    fn poll_read(
        &mut self,
        log: &Arc<dyn Log>,
        position: Offset,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Vec<Batch>, LogReadError>> {
        let task = match &mut self.reading {
            Some(task) => task,
            none => match log.read_recent(position, CATCH_UP_BYTES) {
                Some(batches) => return Poll::Ready(Ok(batches)),
                None => {
                    let log = log.clone();
                    none.insert(tokio::task::spawn_blocking(move || log.read(position, CATCH_UP_BYTES)))
                }
            },
        };
        let done = ready!(Pin::new(task).poll(cx));
        self.reading = None;
        Poll::Ready(done.unwrap_or_else(|ended| Err(LogReadError::Io(ended.to_string().into()))))
    }
}

impl SubscriberFeed {
    /// A feed without filters, that begins at `position`.
    pub fn new(router: Router, log: Arc<dyn Log>, datasource: &DatasourceId, position: Offset) -> Self {
        Self {
            router,
            log,
            datasource: (!datasource.is_all()).then(|| datasource.clone()),
            mailbox: Arc::default(),
            slots: Vec::new(),
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

    /// Sets the filter of a slot. `from` is the first record wanted, or `None` for records appended from now
    /// on. If it is in the past, the whole feed goes back there, and the other filters do not give out their
    /// records again. Returns the offset at which the filter begins.
    pub fn set_filter(&mut self, slot: u32, filter: &str, from: Option<Offset>) -> Offset {
        self.remove_filter(slot);
        let filter: Box<str> = match &self.datasource {
            Some(datasource) => format!("{datasource}/{filter}").into(),
            None => filter.into(),
        };
        self.router.subscribe(&filter, &self.mailbox, slot);
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
        } else if let FeedMode::Behind(reader) = &mut self.mode {
            reader.trie = Trie::default();
        }
        from
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
            self.router.unsubscribe(&slot.filter, &self.mailbox);
        }
        if let FeedMode::Behind(reader) = &mut self.mode {
            reader.trie = Trie::default();
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
        Poll::Ready(match ready!(self.mailbox.poll_take(|| self.router.routed_offset(), cx)) {
            MailboxContents::Behind => {
                self.mode = FeedMode::Behind(CatchUpReader::default());
                None
            }
            MailboxContents::Batch(routed) => {
                self.merge(routed).filter(MatchedRecords::has_more).map(FeedItem::Matched)
            }
        })
    }

    /// What the log has after the position. `None`: look again.
    fn poll_behind(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<FeedItem>, LogReadError>> {
        let FeedMode::Behind(reader) = &mut self.mode else { return Poll::Ready(Ok(None)) };
        if let Some(batch) = reader.read.pop_front() {
            fill_trie(&mut reader.trie, &self.slots);
            let hits = match_batch(&reader.trie, &self.slots, &batch, self.position);
            self.position = self.position.max(batch.next_offset());
            let matched = hits.map(|hits| MatchedRecords::new(batch, hits, self.log.withheld().clone()));
            return Poll::Ready(Ok(matched.filter(MatchedRecords::has_more).map(FeedItem::Matched)));
        }
        match ready!(reader.poll_read(&self.log, self.position, cx)) {
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

    /// Merges the matches of all filters in one batch into log order.
    fn merge(&mut self, mut routed: Vec<RoutedRecords>) -> Option<MatchedRecords> {
        let batch = routed.first()?.batch.clone();
        let begin = self.position;
        self.position = begin.max(batch.next_offset());
        let slots = &self.slots;
        let from = |slot: u32| slots.get(slot as usize)?.as_ref().map(|slot| slot.from.max(begin));
        routed.retain(|routed| from(routed.slot).is_some());
        if let [one] = &routed[..] {
            let wanted = from(one.slot).unwrap_or_default();
            let first = one.places.partition_point(|place| place.offset < wanted);
            let hits = FilterHits::One([one.slot], one.places.clone());
            let matched = MatchedRecords::new(batch, hits, self.log.withheld().clone());
            return (first < one.places.len()).then(|| matched.starting_at(first));
        }
        let mut all: Vec<(RecordPlace, u32)> = Vec::new();
        for RoutedRecords { slot, places, .. } in &routed {
            let wanted = from(*slot).unwrap_or_default();
            all.extend(places.iter().filter(|place| place.offset >= wanted).map(|place| (*place, *slot)));
        }
        all.sort_by_key(|(place, _)| place.offset);
        let hits = FilterHits::from_pairs(all.into_iter())?;
        Some(MatchedRecords::new(batch, hits, self.log.withheld().clone()))
    }
}

impl Drop for SubscriberFeed {
    fn drop(&mut self) {
        for slot in self.slots.iter().flatten() {
            self.router.unsubscribe(&slot.filter, &self.mailbox);
        }
    }
}

/// Enters the filters into an empty trie.
fn fill_trie(trie: &mut Trie<u32>, slots: &[Option<FilterSlot>]) {
    if trie.is_empty() {
        for (at, slot) in slots.iter().enumerate() {
            if let (Some(slot), Ok(at)) = (slot, u32::try_from(at)) {
                trie.values(&slot.filter).push(at);
            }
        }
    }
}

/// The records of a batch, from `begin` on, that the filters match.
fn match_batch(
    trie: &Trie<u32>,
    slots: &[Option<FilterSlot>],
    batch: &Batch,
    begin: Offset,
) -> Option<FilterHits> {
    let from = |slot: u32| slots.get(slot as usize).and_then(Option::as_ref).map(|slot| slot.from);
    let mut all = Vec::new();
    for section in batch.sections() {
        let starts = trie.for_datasource(section.datasource());
        if section.next_offset() <= begin || starts.is_empty() {
            continue;
        }
        for (topic, place) in section.topics().filter(|(_, place)| place.offset >= begin) {
            starts.visit(topic, |&slot| {
                if from(slot).is_some_and(|from| place.offset >= from) {
                    all.push((place, slot));
                }
            });
        }
    }
    FilterHits::from_pairs(all.into_iter())
}

/// Reads single records. For each offset, in the given order, returns the batch and the place in it, or
/// `None` if retention has removed the record or it is withheld. `offsets` ascend. Blocks on the disk.
///
/// # Errors
/// [`LogReadError`] for damage and the file system's errors.
pub fn fetch_records(
    log: &dyn Log,
    offsets: &[Offset],
) -> Result<Vec<Option<(Batch, RecordPlace)>>, LogReadError> {
    let mut found = Vec::with_capacity(offsets.len());
    let mut current: Option<Batch> = None;
    let left_out = log.withheld().now();
    for &offset in offsets {
        let holds = |batch: &Batch| (batch.first_offset()..batch.next_offset()).contains(&offset);
        if !current.as_ref().is_some_and(holds) {
            current = match log.read(offset, 1) {
                Ok(batches) => batches.into_iter().find(holds),
                Err(LogReadError::Removed { .. }) => None,
                Err(error) => return Err(error),
            };
        }
        let given = |batch: &Batch| {
            let place = batch.place(offset)?;
            let given = left_out.is_nothing() || !left_out.withholds(&batch.reader().read(place));
            given.then(|| (batch.clone(), place))
        };
        found.push(current.as_ref().and_then(given));
    }
    Ok(found)
}
