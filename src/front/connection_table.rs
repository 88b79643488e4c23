//! The connections of a front by who they are of: the address of a stranger, which is a client that has presented no
//! valid key yet, or a key. Strangers are limited by address and in all. Where there is no room for a new connection,
//! one that is there makes room: the oldest of whoever has most. So a crowd of strangers keeps nobody out but itself,
//! and a call that revokes a key does not wait until they have left.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use crate::config;
use crate::message::KeyId;
use crate::network::source_of;
use crate::scheduler::polite_lock;

/// How many strangers there may be.
#[derive(Debug, Clone, Copy)]
pub struct StrangerLimits {
    /// In all.
    pub strangers_max: usize,
    /// From one address (IPv6: one /64).
    pub per_address_max: usize,
}

impl config::MqttConfig {
    /// The limits of strangers over MQTT.
    pub fn stranger_limits(&self) -> StrangerLimits {
        StrangerLimits { strangers_max: self.strangers_max, per_address_max: self.strangers_per_address_max }
    }
}

impl config::HttpConfig {
    /// The limits of strangers over HTTP.
    pub fn stranger_limits(&self) -> StrangerLimits {
        StrangerLimits { strangers_max: self.strangers_max, per_address_max: self.strangers_per_address_max }
    }
}

/// The connections of a front.
pub struct ConnectionTable {
    state: Mutex<TableState>,
}

struct TableState {
    limits: StrangerLimits,
    /// The connections of each owner, oldest first.
    groups: HashMap<ConnectionOwner, BTreeMap<u64, Arc<Eviction>>>,
    /// How many each address has, and each key.
    address_sizes: BTreeSet<(usize, ConnectionOwner)>,
    key_sizes: BTreeSet<(usize, ConnectionOwner)>,
    strangers: usize,
    next_number: u64,
}

/// Whose a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum ConnectionOwner {
    Address(IpAddr),
    Key(KeyId),
}

/// Tells a connection that it has to make room.
#[derive(Default)]
pub(super) struct Eviction {
    is_due: AtomicBool,
    task: AtomicWaker,
}

impl Eviction {
    /// Tells it. Whether that was the first time.
    pub(super) fn tell(&self) -> bool {
        let was_due = self.is_due.swap(true, Ordering::AcqRel);
        self.task.wake();
        !was_due
    }

    /// Ready once it was told. Only one task may poll it.
    pub(super) fn poll_due(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.task.register(cx.waker());
        if self.is_due.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// A stranger's connection was closed because there are too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EvictedStranger {
    /// More than so many came from one address.
    OfAddress { address: IpAddr, max: usize },
    /// There are more than so many in all. It came from this address, which had most.
    OfStrangers { address: IpAddr, max: usize },
}

/// A connection's entry. Dropping it removes it.
pub(super) struct TableEntry {
    table: Arc<ConnectionTable>,
    number: u64,
    owner: Mutex<Option<ConnectionOwner>>,
    eviction: Arc<Eviction>,
}

impl ConnectionTable {
    /// No connections yet.
    pub fn new(limits: StrangerLimits) -> Self {
        let (address_sizes, key_sizes) = (BTreeSet::new(), BTreeSet::new());
        let state = TableState {
            limits,
            groups: HashMap::new(),
            address_sizes,
            key_sizes,
            strangers: 0,
            next_number: 0,
        };
        Self { state: Mutex::new(state) }
    }

    /// Sets other limits, for connections that come from now on.
    pub fn set_limits(&self, limits: StrangerLimits) {
        self.state.lock().limits = limits;
    }

    /// Enters a connection that was just accepted. If there are too many strangers then, the oldest one makes room,
    /// and is returned.
    pub(super) fn enter(self: &Arc<Self>, address: IpAddr) -> (TableEntry, Option<EvictedStranger>) {
        let address = source_of(address);
        let owner = ConnectionOwner::Address(address);
        let eviction = Arc::new(Eviction::default());
        let mut state = polite_lock(&self.state);
        let number = state.next_number;
        state.next_number += 1;
        let evicted = state.add_stranger(address, number, eviction.clone());
        drop(state);
        (TableEntry { table: self.clone(), number, owner: Mutex::new(Some(owner)), eviction }, evicted)
    }

    /// Makes room for one more: tells the oldest connection of whoever has most.
    pub(super) fn make_room(&self) {
        let mut state = polite_lock(&self.state);
        let largest = state.address_sizes.last().max(state.key_sizes.last()).map(|(_, owner)| *owner);
        if let Some(owner) = largest {
            state.evict_oldest(owner);
        }
    }

    /// How many connections have presented no valid key.
    pub(super) fn stranger_count(&self) -> usize {
        self.state.lock().strangers
    }
}

impl TableState {
    fn sizes(&mut self, owner: ConnectionOwner) -> &mut BTreeSet<(usize, ConnectionOwner)> {
        match owner {
            ConnectionOwner::Address(_) => &mut self.address_sizes,
            ConnectionOwner::Key(_) => &mut self.key_sizes,
        }
    }

    /// Adds a connection; returns how many the owner has then.
    fn add(&mut self, owner: ConnectionOwner, number: u64, eviction: Arc<Eviction>) -> usize {
        let group = self.groups.entry(owner).or_default();
        group.insert(number, eviction);
        let size = group.len();
        let sizes = self.sizes(owner);
        sizes.remove(&(size - 1, owner));
        sizes.insert((size, owner));
        self.strangers += usize::from(matches!(owner, ConnectionOwner::Address(_)));
        size
    }

    /// Adds a stranger's connection. If there are too many strangers then, the oldest one makes room, and is returned.
    fn add_stranger(
        &mut self,
        address: IpAddr,
        number: u64,
        eviction: Arc<Eviction>,
    ) -> Option<EvictedStranger> {
        let owner = ConnectionOwner::Address(address);
        let of_address = self.add(owner, number, eviction);
        let StrangerLimits { strangers_max, per_address_max } = self.limits;
        if of_address > per_address_max {
            self.evict_oldest(owner);
            return Some(EvictedStranger::OfAddress { address, max: per_address_max });
        }
        if self.strangers <= strangers_max {
            return None;
        }
        let largest = self.address_sizes.last().map_or(owner, |(_, owner)| *owner);
        self.evict_oldest(largest);
        match largest {
            ConnectionOwner::Address(address) => {
                Some(EvictedStranger::OfStrangers { address, max: strangers_max })
            }
            ConnectionOwner::Key(_) => None,
        }
    }

    /// Removes a connection, unless it was told to make room already.
    fn remove(&mut self, owner: ConnectionOwner, number: u64) -> Option<Arc<Eviction>> {
        let group = self.groups.get_mut(&owner)?;
        let removed = group.remove(&number)?;
        let size = group.len();
        if size == 0 {
            self.groups.remove(&owner);
        }
        let sizes = self.sizes(owner);
        sizes.remove(&(size + 1, owner));
        if size > 0 {
            sizes.insert((size, owner));
        }
        self.strangers -= usize::from(matches!(owner, ConnectionOwner::Address(_)));
        Some(removed)
    }

    fn evict_oldest(&mut self, owner: ConnectionOwner) {
        let oldest = self.groups.get(&owner).and_then(|group| group.keys().next().copied());
        if let Some(eviction) = oldest.and_then(|number| self.remove(owner, number)) {
            eviction.tell();
        }
    }
}

impl TableEntry {
    /// Where the connection learns that it has to make room.
    pub(super) fn eviction(&self) -> &Arc<Eviction> {
        &self.eviction
    }

    /// Notes that a stranger's connection is, for now, that of another address, as a proxy says. If that has too many
    /// then, the oldest makes room, and is returned.
    pub(super) fn move_to(&self, address: IpAddr) -> Option<EvictedStranger> {
        let address = source_of(address);
        let mut owner = self.owner.lock();
        let Some(before @ ConnectionOwner::Address(of)) = *owner else { return None };
        if of == address {
            return None;
        }
        let mut state = polite_lock(&self.table.state);
        // One that was told to make room already is in no group.
        let eviction = state.remove(before, self.number)?;
        *owner = Some(ConnectionOwner::Address(address));
        state.add_stranger(address, self.number, eviction)
    }

    /// Notes that the connection has presented a valid key: it is no stranger's any more.
    pub(super) fn present(&self, key_id: KeyId) {
        let mut owner = self.owner.lock();
        let Some(stranger @ ConnectionOwner::Address(_)) = *owner else { return };
        let mut state = polite_lock(&self.table.state);
        // One that was told to make room already is in no group.
        *owner = state.remove(stranger, self.number).map(|eviction| {
            let key = ConnectionOwner::Key(key_id);
            state.add(key, self.number, eviction);
            key
        });
    }
}

impl Drop for TableEntry {
    fn drop(&mut self) {
        if let Some(owner) = *self.owner.lock() {
            polite_lock(&self.table.state).remove(owner, self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(strangers_max: usize, per_address_max: usize) -> Arc<ConnectionTable> {
        Arc::new(ConnectionTable::new(StrangerLimits { strangers_max, per_address_max }))
    }

    fn address(n: u8) -> IpAddr {
        IpAddr::from([203, 0, 113, n])
    }

    fn is_evicted(entry: &TableEntry) -> bool {
        entry.eviction.is_due.load(Ordering::Acquire)
    }

    #[test]
    fn the_oldest_stranger_of_an_address_makes_room_at_one_below_and_one_above() {
        let table = table(100, 3);
        let mut entries: Vec<TableEntry> = Vec::new();
        for n in 0..3 {
            let (entry, evicted) = table.enter(address(1));
            assert_eq!(evicted, None, "{n}");
            entries.push(entry);
        }
        let (fourth, evicted) = table.enter(address(1));
        assert_eq!(evicted, Some(EvictedStranger::OfAddress { address: address(1), max: 3 }));
        assert_eq!(entries.iter().map(is_evicted).collect::<Vec<_>>(), [true, false, false]);
        assert_eq!(table.enter(address(2)).1, None, "another address has its own");
        // Who has presented a key is no stranger any more.
        entries[1].present(KeyId([1; 6]));
        assert_eq!(table.stranger_count(), 2);
        let (fifth, evicted) = table.enter(address(1));
        assert_eq!(evicted, None);
        table.set_limits(StrangerLimits { strangers_max: 100, per_address_max: 1 });
        let (sixth, evicted) = table.enter(address(1));
        assert_eq!(
            evicted,
            Some(EvictedStranger::OfAddress { address: address(1), max: 1 }),
            "changed while it is used"
        );
        drop((entries, fourth, fifth, sixth));
        let state = table.state.lock();
        assert!(state.groups.is_empty() && state.address_sizes.is_empty() && state.key_sizes.is_empty());
        assert_eq!(state.strangers, 0);
    }

    #[test]
    fn the_address_with_most_strangers_makes_room_for_others() {
        let table = table(4, 3);
        let crowd: Vec<TableEntry> = (0..3).map(|_| table.enter(address(1)).0).collect();
        let (lone, evicted) = table.enter(address(2));
        assert_eq!(evicted, None);
        let (_newcomer, evicted) = table.enter(address(3));
        assert_eq!(evicted, Some(EvictedStranger::OfStrangers { address: address(1), max: 4 }));
        assert!(is_evicted(&crowd[0]) && !is_evicted(&lone));
        assert_eq!(table.stranger_count(), 4);
    }

    #[test]
    fn a_stranger_behind_a_proxy_counts_where_its_requests_come_from() {
        let table = table(100, 2);
        let proxied: Vec<TableEntry> = (0..4)
            .map(|n| {
                let entry = table.enter(address(9)).0;
                assert_eq!(entry.move_to(address(n)), None);
                entry
            })
            .collect();
        assert_eq!(table.stranger_count(), 4);
        assert_eq!(proxied[1].move_to(address(0)), None, "two are as many as there may be");
        assert_eq!(proxied[1].move_to(address(0)), None, "it is there already");
        let evicted = Some(EvictedStranger::OfAddress { address: address(0), max: 2 });
        assert_eq!(proxied[2].move_to(address(0)), evicted);
        assert_eq!(proxied.iter().map(is_evicted).collect::<Vec<_>>(), [true, false, false, false]);
        assert_eq!(proxied[0].move_to(address(5)), None, "one that makes room stays where it is");
        proxied[3].present(KeyId([1; 6]));
        assert_eq!(proxied[3].move_to(address(0)), None, "whoever has a key is no stranger");
        drop(proxied);
        let state = table.state.lock();
        assert!(state.groups.is_empty() && state.address_sizes.is_empty() && state.key_sizes.is_empty());
    }

    #[test]
    fn whoever_has_most_makes_room_when_all_places_are_taken() {
        let table = table(100, 100);
        let of_key: Vec<TableEntry> = (0..5)
            .map(|_| {
                let entry = table.enter(address(1)).0;
                entry.present(KeyId([1; 6]));
                entry
            })
            .collect();
        let strangers: Vec<TableEntry> = (0..4).map(|_| table.enter(address(2)).0).collect();
        table.make_room();
        assert!(is_evicted(&of_key[0]) && !strangers.iter().any(is_evicted));
        table.make_room();
        table.make_room();
        let told = of_key.iter().chain(&strangers).filter(|entry| is_evicted(entry)).count();
        assert_eq!(told, 3, "each time another one");
        // Told already: it leaves no trace, and no key brings it back.
        of_key[0].present(KeyId([2; 6]));
        drop((of_key, strangers));
        table.make_room();
        assert!(table.state.lock().groups.is_empty());
    }
}
