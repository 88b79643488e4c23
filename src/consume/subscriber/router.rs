//! The router: follows the log's end and gives each new record to the live subscribers whose
//! filters match it.
//!
//! It is one thread. A batch that no subscriber wants does not even wake it: the log's writer checks that
//! first, with one look-up per datasource in the batch. The records that match a filter are collected
//! once, however many subscribers have that filter.

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tracing::error;

use super::mailbox::{Mailbox, RoutedRecords};
use super::trie::Trie;
use crate::limits::ROUTE_BYTES;
use crate::log::{Batch, Log, RecordPlace};
use crate::message::Offset;

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
    /// Everything below is routed or being routed.
    routing: AtomicU64,
    /// Everything below is routed.
    routed: AtomicU64,
    ended: AtomicBool,
}

/// Which subscribers want what.
#[derive(Default)]
struct RoutingTable {
    /// The index in `interests` for each filter.
    trie: Trie<u32>,
    by_filter: HashMap<Box<str>, u32>,
    interests: Vec<FilterInterest>,
    free: Vec<u32>,
}

/// A filter, and the subscribers that have it.
struct FilterInterest {
    members: Vec<(Arc<Mailbox>, u32)>,
}

impl RouterState {
    fn routes(&self) -> RwLockReadGuard<'_, RoutingTable> {
        self.routes.read()
    }

    /// Marks the batch as routed. The thread and the log's writer may both do so for one batch.
    fn mark_routed(&self, batch: &Batch) {
        self.routing.fetch_max(batch.next_offset(), Ordering::SeqCst);
        self.routed.fetch_max(batch.next_offset(), Ordering::SeqCst);
    }

    fn routes_mut(&self) -> RwLockWriteGuard<'_, RoutingTable> {
        self.routes.write()
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
            routing: AtomicU64::new(at),
            routed: AtomicU64::new(at),
            ended: AtomicBool::new(false),
        });
        let thread = std::thread::Builder::new().name("router".to_owned()).spawn({
            let (shared, log) = (shared.clone(), log.clone());
            move || run_router(&shared, &*log)
        })?;
        let thread = thread.thread().clone();
        let router = Self(Arc::new(RouterOwner { shared, thread }));
        let listener = Arc::downgrade(&router.0);
        log.listen(Box::new(move |batch| Self::on_append(&listener, batch)));
        Ok(router)
    }

    /// The log's writer calls this for each batch, in order.
    fn on_append(router: &Weak<RouterOwner>, batch: &Batch) {
        let Some(owner) = router.upgrade() else { return };
        let shared = &owner.shared;
        // `try_read`: the log's writer must not wait here.
        if let Some(routes) = shared.routes.try_read()
            && shared.routed.load(Ordering::SeqCst) == batch.first_offset()
            && (routes.by_filter.is_empty()
                || batch
                    .sections()
                    .all(|section| routes.trie.for_datasource(section.datasource()).is_empty()))
        {
            shared.mark_routed(batch);
            return;
        }
        owner.thread.unpark();
    }

    /// Everything below this offset is routed.
    pub fn routed_offset(&self) -> Offset {
        self.0.shared.routed.load(Ordering::SeqCst)
    }

    /// Everything below this offset is routed or being routed.
    pub(super) fn routing_offset(&self) -> Offset {
        self.0.shared.routing.load(Ordering::SeqCst)
    }

    /// Routes what matches `filter` to `mailbox` from now on, as its `slot`. The filter's first level
    /// is the datasource.
    pub(super) fn subscribe(&self, filter: &str, mailbox: &Arc<Mailbox>, slot: u32) {
        let mut guard = self.0.shared.routes_mut();
        let routes = &mut *guard;
        let interest = match routes.by_filter.get(filter) {
            Some(&interest) => interest,
            None => {
                let interest = routes.free.pop().unwrap_or_else(|| {
                    routes.interests.push(FilterInterest { members: Vec::new() });
                    u32::try_from(routes.interests.len() - 1).expect("fewer filters than 2³²")
                });
                routes.by_filter.insert(filter.into(), interest);
                routes.trie.values(filter).push(interest);
                interest
            }
        };
        routes.interests[interest as usize].members.push((mailbox.clone(), slot));
    }

    /// No longer routes what matches `filter` to `mailbox`.
    pub(super) fn unsubscribe(&self, filter: &str, mailbox: &Arc<Mailbox>) {
        let mut guard = self.0.shared.routes_mut();
        let routes = &mut *guard;
        let Some(&interest) = routes.by_filter.get(filter) else { return };
        let members = &mut routes.interests[interest as usize].members;
        if let Some(at) = members.iter().position(|(member, _)| Arc::ptr_eq(member, mailbox)) {
            members.swap_remove(at);
        }
        if members.is_empty() {
            routes.interests[interest as usize].members = Vec::new();
            routes.by_filter.remove(filter);
            routes.trie.remove(filter, |value| *value == interest);
            routes.free.push(interest);
        }
    }
}

/// The thread.
fn run_router(shared: &RouterState, log: &dyn Log) {
    let mut scratch = RoutingScratch::default();
    while !shared.ended.load(Ordering::Acquire) {
        let position = shared.routed.load(Ordering::SeqCst);
        match log.read(position, ROUTE_BYTES) {
            Ok(batches) if batches.is_empty() => std::thread::park_timeout(ROUTER_SLEEP_MAX),
            Ok(batches) => batches.iter().for_each(|batch| scratch.route(shared, batch)),
            Err(error) => {
                // Live subscribers wait; those that read the log themselves get the same error.
                error!(%error, position, "new records cannot be read for subscribers");
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

/// Buffers for routing a batch, kept from one to the next.
#[derive(Default)]
struct RoutingScratch {
    /// The matching places of each interest.
    places: Vec<Vec<RecordPlace>>,
    /// The interests that something matches.
    touched: Vec<u32>,
    wake: Vec<Arc<Mailbox>>,
}

impl RoutingScratch {
    fn route(&mut self, shared: &RouterState, batch: &Batch) {
        let routes = shared.routes();
        shared.routing.fetch_max(batch.next_offset(), Ordering::SeqCst);
        self.places.resize_with(routes.interests.len().max(self.places.len()), Vec::new);
        for section in batch.sections() {
            let starts = routes.trie.for_datasource(section.datasource());
            if starts.is_empty() {
                continue;
            }
            for (topic, place) in section.topics() {
                starts.visit(topic, |&interest| {
                    let places = &mut self.places[interest as usize];
                    if places.is_empty() {
                        self.touched.push(interest);
                    }
                    places.push(place);
                });
            }
        }
        for interest in self.touched.drain(..) {
            let places: Arc<[RecordPlace]> = self.places[interest as usize].as_slice().into();
            self.places[interest as usize].clear();
            for (mailbox, slot) in &routes.interests[interest as usize].members {
                let routed = RoutedRecords { batch: batch.clone(), slot: *slot, places: places.clone() };
                if mailbox.put(routed) {
                    self.wake.push(mailbox.clone());
                }
            }
        }
        drop(routes);
        shared.mark_routed(batch);
        for mailbox in self.wake.drain(..) {
            mailbox.wake();
        }
    }
}
