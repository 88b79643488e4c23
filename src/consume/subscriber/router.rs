//! The router: follows the log's end and gives each new record to the live subscribers whose
//! filters match it.
//!
//! It is one thread. A batch that no subscriber wants does not even wake it: the log's writer checks that
//! first, with one look-up per datasource in the batch. The records that match a filter are collected
//! once, however many subscribers have that filter. A subscriber with several filters gets each record once,
//! and finds out by itself which of them match it ([`MatchedRecords`](super::MatchedRecords)).
//!
//! **Fairness.** What one datasource costs is bounded in each batch, in steps ([`ROUTE_STEPS_MAX`]) and in
//! memory ([`ROUTED_PLACES_BYTES_MAX`]). Beyond that all its subscribers fall behind, and read the batch from
//! the log by themselves, in turns of their own; the router goes on with the records of others. So do the subscribers
//! of a datasource that is in the slow lane ([`crate::processor`]): they read there.

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::collections::{HashMap, VecDeque};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use super::mailbox::{Mailbox, RoutedPlaces, RoutedRecords};
use super::trie::Trie;
use crate::limits::{
    MAILBOX_SWEEP_BYTES, MAILBOX_WINDOW_BYTES, ROUTE_BYTES, ROUTE_STEPS_MAX, ROUTED_PLACES_BYTES_MAX,
};
use crate::log::{Batch, Log, RecordPlace};
use crate::message::{DatasourceId, Offset};
use crate::processor::ProcessorTime;
use crate::scheduler::{polite_read, polite_write};
use crate::trouble::TroubleCell;

/// How long the thread sleeps at most when nobody wakes it.
const ROUTER_SLEEP_MAX: Duration = Duration::from_secs(3600);
/// How long the thread pauses after the log could not be read.
const ROUTER_RETRY_PAUSE: Duration = Duration::from_millis(200);

/// The running router. Cheap to clone; its thread ends after the last clone.
#[derive(Clone)]
pub struct Router(Arc<RouterOwner>);

struct RouterOwner {
    shared: Arc<RouterState>,
    thread: std::thread::Thread,
}

impl Drop for RouterOwner {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

struct RouterState {
    routes: RwLock<RoutingTable>,
    /// What the datasources take of the processors, once that is known.
    processor: OnceLock<ProcessorTime>,
    /// Everything below is routed or being routed.
    routing: AtomicU64,
    /// Everything below is routed.
    routed: AtomicU64,
    ended: AtomicBool,
    /// Why subscribers get nothing new.
    trouble: TroubleCell,
}

/// Which subscribers want what.
#[derive(Default)]
struct RoutingTable {
    /// The index in `interests` for each filter.
    trie: Trie<u32>,
    /// The interest that subscribers with only this filter share.
    by_filter: HashMap<Box<str>, u32>,
    interests: Vec<Interest>,
    free: Vec<u32>,
    /// The subscribers of each datasource, and of the keys for all (`*`), by the address of their mailbox.
    tenants: HashMap<DatasourceId, HashMap<usize, Arc<Mailbox>>>,
}

/// Who gets the records that a filter matches.
enum Interest {
    /// Subscribers that have only that filter, and its slot at each.
    Filter(Vec<(Arc<Mailbox>, u32)>),
    /// A subscriber with several filters, and how many it has.
    Subscriber(Arc<Mailbox>, usize),
}

/// How the router knows a subscriber.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SubscriberRoute {
    /// It has no filter.
    Nothing,
    /// It has one, in this slot.
    One(u32),
    /// It has, or had, several, and this interest.
    Several(u32),
}

impl RouterState {
    fn routes(&self) -> RwLockReadGuard<'_, RoutingTable> {
        polite_read(&self.routes)
    }

    /// Marks the batch as routed. The thread and the log's writer may both do so for one batch.
    fn mark_routed(&self, batch: &Batch) {
        self.routing.fetch_max(batch.next_offset(), Ordering::SeqCst);
        self.routed.fetch_max(batch.next_offset(), Ordering::SeqCst);
    }

    fn routes_mut(&self) -> RwLockWriteGuard<'_, RoutingTable> {
        polite_write(&self.routes)
    }
}

impl Router {
    /// Starts the thread, at the end of `log`.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start(log: &Arc<dyn Log>) -> std::io::Result<Self> {
        let at = log.next_offset();
        let shared = Arc::new(RouterState {
            routes: RwLock::default(),
            processor: OnceLock::new(),
            routing: AtomicU64::new(at),
            routed: AtomicU64::new(at),
            ended: AtomicBool::new(false),
            trouble: TroubleCell::new(
                "subscribers are sent nothing new",
                "subscribers are sent what is new again",
            ),
        });
        let thread = std::thread::Builder::new().name("router".to_owned()).spawn({
            let (shared, log) = (shared.clone(), log.clone());
            move || {
                let _ended = RouterEndGuard(&shared);
                run_router(&shared, &*log);
            }
        })?;
        let thread = thread.thread().clone();
        let router = Self(Arc::new(RouterOwner { shared, thread }));
        let listener = Arc::downgrade(&router.0);
        log.listen(Box::new(move |batch| Self::on_append(&listener, batch)));
        Ok(router)
    }

    /// Why subscribers are sent nothing new, while they are not.
    pub fn trouble(&self) -> Option<String> {
        self.0.shared.trouble.current()
    }

    /// The log's writer calls this for each batch, in order.
    fn on_append(router: &Weak<RouterOwner>, batch: &Batch) {
        let Some(owner) = router.upgrade() else { return };
        let shared = &owner.shared;
        // `try_read`: the log's writer must not wait here.
        if let Some(routes) = shared.routes.try_read()
            && shared.routed.load(Ordering::SeqCst) == batch.first_offset()
            && (routes.tenants.is_empty()
                || batch
                    .sections()
                    .all(|section| routes.trie.for_datasource(section.datasource()).is_empty()))
        {
            shared.mark_routed(batch);
            return;
        }
        owner.thread.unpark();
    }

    /// Sets where is counted what the datasources take of the processors. Call it once, before the first record.
    pub fn set_processor(&self, processor: ProcessorTime) {
        let _ = self.0.shared.processor.set(processor);
    }

    /// Everything below this offset is routed.
    pub fn routed_offset(&self) -> Offset {
        self.0.shared.routed.load(Ordering::SeqCst)
    }

    /// Everything below this offset is routed or being routed.
    pub(super) fn routing_offset(&self) -> Offset {
        self.0.shared.routing.load(Ordering::SeqCst)
    }

    /// Routes what matches `filter` to `mailbox` from now on. The filter's first level is the datasource.
    /// `route` is what this has made of the subscriber's earlier filters, `one` the only one of those.
    pub(super) fn subscribe(
        &self,
        tenant: &DatasourceId,
        mailbox: &Arc<Mailbox>,
        route: SubscriberRoute,
        one: Option<&str>,
        (filter, slot): (&str, u32),
    ) -> SubscriberRoute {
        let mut routes = self.0.shared.routes_mut();
        match (route, one) {
            (SubscriberRoute::Several(interest), _) => {
                routes.enter(filter, interest);
                route
            }
            (SubscriberRoute::One(_), Some(one)) => {
                routes.leave_filter(one, mailbox);
                let interest = routes.add_interest(Interest::Subscriber(mailbox.clone(), 0));
                [one, filter].into_iter().for_each(|filter| routes.enter(filter, interest));
                SubscriberRoute::Several(interest)
            }
            _ => {
                let members = routes.tenants.entry(tenant.clone()).or_default();
                members.insert(Arc::as_ptr(mailbox) as usize, mailbox.clone());
                routes.join_filter(filter, mailbox, slot);
                SubscriberRoute::One(slot)
            }
        }
    }

    /// No longer routes what matches `filter` to `mailbox`.
    pub(super) fn unsubscribe(
        &self,
        tenant: &DatasourceId,
        mailbox: &Arc<Mailbox>,
        route: SubscriberRoute,
        filter: &str,
    ) -> SubscriberRoute {
        let mut routes = self.0.shared.routes_mut();
        match route {
            SubscriberRoute::Several(interest) if !routes.leave(filter, interest) => return route,
            SubscriberRoute::Several(_) => {}
            SubscriberRoute::One(_) => routes.leave_filter(filter, mailbox),
            SubscriberRoute::Nothing => return route,
        }
        if let Some(members) = routes.tenants.get_mut(tenant) {
            members.remove(&(Arc::as_ptr(mailbox) as usize));
            if members.is_empty() {
                routes.tenants.remove(tenant);
            }
        }
        SubscriberRoute::Nothing
    }
}

impl RoutingTable {
    fn add_interest(&mut self, interest: Interest) -> u32 {
        let at = self.free.pop().unwrap_or_else(|| {
            self.interests.push(Interest::Filter(Vec::new()));
            u32::try_from(self.interests.len() - 1).expect("fewer filters than 2³²")
        });
        self.interests[at as usize] = interest;
        at
    }

    fn remove_interest(&mut self, interest: u32) {
        self.interests[interest as usize] = Interest::Filter(Vec::new());
        self.free.push(interest);
    }

    /// Adds one of several filters of a subscriber.
    fn enter(&mut self, filter: &str, interest: u32) {
        self.trie.values(filter).push(interest);
        if let Interest::Subscriber(_, filters) = &mut self.interests[interest as usize] {
            *filters += 1;
        }
    }

    /// Removes one of several filters of a subscriber. Returns whether it was the last.
    fn leave(&mut self, filter: &str, interest: u32) -> bool {
        self.trie.remove(filter, |value| *value == interest);
        let Interest::Subscriber(_, filters) = &mut self.interests[interest as usize] else { return false };
        *filters -= 1;
        let last = *filters == 0;
        if last {
            self.remove_interest(interest);
        }
        last
    }

    /// Adds the only filter of a subscriber.
    fn join_filter(&mut self, filter: &str, mailbox: &Arc<Mailbox>, slot: u32) {
        let interest = match self.by_filter.get(filter) {
            Some(&interest) => interest,
            None => {
                let interest = self.add_interest(Interest::Filter(Vec::new()));
                self.by_filter.insert(filter.into(), interest);
                self.trie.values(filter).push(interest);
                interest
            }
        };
        if let Interest::Filter(members) = &mut self.interests[interest as usize] {
            members.push((mailbox.clone(), slot));
        }
    }

    /// Removes the only filter of a subscriber.
    fn leave_filter(&mut self, filter: &str, mailbox: &Arc<Mailbox>) {
        let Some(&interest) = self.by_filter.get(filter) else { return };
        let Interest::Filter(members) = &mut self.interests[interest as usize] else { return };
        if let Some(at) = members.iter().position(|(member, _)| Arc::ptr_eq(member, mailbox)) {
            members.swap_remove(at);
        }
        if members.is_empty() {
            self.by_filter.remove(filter);
            self.trie.remove(filter, |value| *value == interest);
            self.remove_interest(interest);
        }
    }

    /// The subscribers of a datasource, and those of all datasources.
    fn subscribers_of<'t>(&'t self, datasource: &str) -> impl Iterator<Item = &'t Arc<Mailbox>> {
        let named = DatasourceId::new(datasource).ok().and_then(|id| self.tenants.get(&id));
        let all = self.tenants.get(&DatasourceId::all());
        [named, all].into_iter().flatten().flat_map(HashMap::values)
    }
}

/// The thread.
fn run_router(shared: &RouterState, log: &dyn Log) {
    let mut scratch = RoutingScratch::default();
    while !shared.ended.load(Ordering::Acquire) {
        let position = shared.routed.load(Ordering::SeqCst);
        match log.read(position, ROUTE_BYTES) {
            Ok(batches) => {
                shared.trouble.set(None);
                batches.iter().for_each(|batch| scratch.route(shared, batch));
                if batches.is_empty() {
                    std::thread::park_timeout(ROUTER_SLEEP_MAX);
                }
            }
            Err(error) => {
                // Live subscribers wait; those that read the log themselves get the same error.
                shared.trouble.set_at(Some(error.to_string()), Some(position));
                std::thread::sleep(ROUTER_RETRY_PAUSE);
                let first = log.first_offset();
                if first > position {
                    shared.routing.fetch_max(first, Ordering::SeqCst);
                    shared.routed.fetch_max(first, Ordering::SeqCst);
                }
            }
        }
    }
}

/// Marks the thread as ended by a panic.
struct RouterEndGuard<'a>(&'a RouterState);

impl Drop for RouterEndGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let trouble = "the router has ended by a panic, and needs a restart";
            self.0.trouble.set(Some(trouble.to_owned()));
        }
    }
}

/// Buffers for routing a batch, kept from one to the next.
#[derive(Default)]
struct RoutingScratch {
    /// The matching places of each interest.
    places: Vec<Vec<RecordPlace>>,
    /// The interests that something matches.
    touched: Vec<u32>,
    /// The interests that the last topic matches.
    of_topic: Vec<u32>,
    /// The steps left for each datasource in the batch; none if its subscribers fall behind.
    steps: HashMap<String, usize>,
    wake: Vec<Arc<Mailbox>>,
    window: RoutedWindow,
}

/// The latest batches that were routed, without the batches themselves.
#[derive(Default)]
struct RoutedWindow {
    batches: VecDeque<(Offset, usize)>,
    bytes: usize,
    unswept: usize,
    /// The end of the newest batch that no mailbox should hold any more.
    floor: Offset,
}

impl RoutedWindow {
    /// Adds a batch. Returns the floor when it is time to look for mailboxes below it.
    fn push(&mut self, batch: &Batch) -> Option<Offset> {
        self.batches.push_back((batch.next_offset(), batch.weight()));
        self.bytes += batch.weight();
        self.unswept += batch.weight();
        while self.bytes > MAILBOX_WINDOW_BYTES && self.batches.len() > 1 {
            let Some((end, weight)) = self.batches.pop_front() else { break };
            self.bytes -= weight;
            self.floor = end;
        }
        let due = self.unswept >= MAILBOX_SWEEP_BYTES && self.floor > 0;
        due.then(|| {
            self.unswept = 0;
            self.floor
        })
    }
}

impl RoutingScratch {
    /// What is kept of a buffer from one batch to the next, in elements.
    const KEPT_MAX: usize = 1024;

    fn route(&mut self, shared: &RouterState, batch: &Batch) {
        let (routes, began) = (shared.routes(), Instant::now());
        let processor = shared.processor.get();
        shared.routing.fetch_max(batch.next_offset(), Ordering::SeqCst);
        self.collect(&routes, batch, processor);
        for (datasource, _) in self.steps.iter().filter(|(_, steps)| **steps == 0) {
            for mailbox in routes.subscribers_of(datasource).filter(|mailbox| mailbox.go_behind()) {
                self.wake.push(mailbox.clone());
            }
        }
        self.hand_out(&routes, batch);
        if let Some(floor) = self.window.push(batch) {
            let all = routes.tenants.values().flat_map(HashMap::values);
            self.wake.extend(all.filter(|mailbox| mailbox.go_behind_if_older(floor)).cloned());
        }
        drop(routes);
        shared.mark_routed(batch);
        if let Some(processor) = processor.filter(|processor| processor.is_contended()) {
            self.note_time(processor, began);
        }
        for mailbox in self.wake.drain(..) {
            mailbox.wake();
        }
        self.shrink();
    }

    /// Notes for each datasource its part of the time since `began`.
    fn note_time(&self, processor: &ProcessorTime, began: Instant) {
        let (now, all) = (Instant::now(), self.steps.len() * ROUTE_STEPS_MAX);
        let all = all - self.steps.values().sum::<usize>();
        for (datasource, left) in self.steps.iter().filter(|(_, left)| **left < ROUTE_STEPS_MAX) {
            let Ok(datasource) = DatasourceId::new(datasource) else { continue };
            #[expect(clippy::cast_precision_loss, reason = "a part of some milliseconds")]
            let part = (ROUTE_STEPS_MAX - left) as f64 / all.max(1) as f64;
            let used = now.saturating_duration_since(began).mul_f64(part);
            processor.note(&processor.of_datasource(&datasource), used, now);
        }
    }

    /// Finds the matching places of each interest. The subscribers of datasources in the slow lane all fall behind.
    fn collect(&mut self, routes: &RoutingTable, batch: &Batch, processor: Option<&ProcessorTime>) {
        let processor = processor.filter(|processor| processor.is_somebody_slow());
        self.places.resize_with(routes.interests.len(), Vec::new);
        for section in batch.sections() {
            let starts = routes.trie.for_datasource(section.datasource());
            if starts.is_empty() {
                continue;
            }
            if !self.steps.contains_key(section.datasource()) {
                let is_slow = processor.zip(DatasourceId::new(section.datasource()).ok());
                let is_slow =
                    is_slow.is_some_and(|(processor, id)| processor.is_slow(&processor.of_datasource(&id)));
                let steps = if is_slow { 0 } else { ROUTE_STEPS_MAX };
                self.steps.insert(section.datasource().to_owned(), steps);
            }
            let Some(steps) = self.steps.get_mut(section.datasource()).filter(|steps| **steps > 0) else {
                continue;
            };
            let Self { places, touched, of_topic, .. } = self;
            let mut last = None;
            for (topic, place) in section.topics() {
                // Consecutive records often have the same topic.
                if last == Some(topic) {
                    *steps = steps.saturating_sub(1 + of_topic.len());
                    of_topic.iter().for_each(|interest| places[*interest as usize].push(place));
                } else {
                    of_topic.clear();
                    starts.visit(topic, steps, |&interest| {
                        let places = &mut places[interest as usize];
                        // A subscriber with several filters is found once for each that matches.
                        if places.last().is_none_or(|last| last.offset != place.offset) {
                            if places.is_empty() {
                                touched.push(interest);
                            }
                            places.push(place);
                            of_topic.push(interest);
                        }
                        ControlFlow::Continue(())
                    });
                    last = Some(topic);
                }
                if *steps == 0 {
                    break;
                }
            }
        }
    }

    /// Puts the places that were found into the mailboxes.
    fn hand_out(&mut self, routes: &RoutingTable, batch: &Batch) {
        for interest in self.touched.drain(..) {
            let found = &mut self.places[interest as usize];
            let members = match &routes.interests[interest as usize] {
                Interest::Filter(members) => {
                    Members::Filter(members.iter().map(|(mailbox, slot)| (mailbox, Some(*slot))))
                }
                Interest::Subscriber(mailbox, _) => Members::Subscriber(std::iter::once((mailbox, None))),
            };
            let mut charged = None;
            for (mailbox, slot) in members {
                let places = charged.get_or_insert_with(|| {
                    RoutedPlaces::charged(found, mailbox.share(), ROUTED_PLACES_BYTES_MAX)
                });
                let wake = match places {
                    Some(places) => {
                        mailbox.put(RoutedRecords { batch: batch.clone(), slot, places: places.clone() })
                    }
                    None => mailbox.go_behind(),
                };
                if wake {
                    self.wake.push(mailbox.clone());
                }
            }
            found.clear();
            if found.capacity() > Self::KEPT_MAX {
                *found = Vec::new();
            }
        }
    }

    /// Gives back what one large batch, or many subscribers that have gone, have left.
    fn shrink(&mut self) {
        self.steps.clear();
        self.steps.shrink_to(Self::KEPT_MAX);
        self.of_topic.clear();
        self.of_topic.shrink_to(Self::KEPT_MAX);
        self.touched.shrink_to(Self::KEPT_MAX);
        if self.wake.capacity() > 16 * Self::KEPT_MAX {
            self.wake = Vec::new();
        }
        if self.places.capacity() > 2 * self.places.len() + Self::KEPT_MAX {
            self.places.shrink_to_fit();
        }
    }
}

/// The mailboxes of an interest, with the slot of the filter where it is the only one.
enum Members<A, B> {
    Filter(A),
    Subscriber(B),
}

impl<T, A: Iterator<Item = T>, B: Iterator<Item = T>> Iterator for Members<A, B> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        match self {
            Members::Filter(members) => members.next(),
            Members::Subscriber(member) => member.next(),
        }
    }
}
