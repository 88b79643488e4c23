//! A shelf: known ids of one kind. It keeps its entries in order of arrival and finds them by id.
//! An entry takes 48 bytes, and 5 more in the hash table.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;

use super::once::{ContentDigest, KeptRange, OnceEntry, OnceId};

/// Unused room below this many entries is not worth freeing. Every datasource has a shelf.
const TIDY_ENTRIES_MIN: usize = 16;

/// A known id: what was kept under it, and for whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KnownId {
    pub(super) entry: OnceEntry,
    /// Of the records that were kept; `None` if it cannot be had any more.
    pub(super) digest: Option<ContentDigest>,
    /// The datasource whose share it is in.
    pub(super) owner: ShareNumber,
}

/// The number of a datasource's share in the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ShareNumber(pub(super) u32);

impl ShareNumber {
    /// Nobody's: the datasource of an id is not known.
    pub(super) const NONE: Self = Self(u32::MAX);
}

impl KnownId {
    /// What was kept, and its digest.
    pub(super) fn content(&self) -> KnownContent {
        KnownContent { kept: self.entry.kept, digest: self.digest }
    }
}

/// What is kept under an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KnownContent {
    pub(super) kept: KeptRange,
    pub(super) digest: Option<ContentDigest>,
}

impl KnownContent {
    /// Whether messages with this digest are a repetition of it. They count as one if that cannot be told.
    pub(super) fn is_repeated_by(&self, digest: Option<ContentDigest>) -> bool {
        self.digest.is_none() || digest.is_none() || self.digest == digest
    }
}

/// Entries of one kind, in order of arrival, found by their id.
pub(super) struct Shelf {
    /// Oldest first. A removed entry stays in the middle, with 0 records, until it reaches the front,
    /// where [`Shelf::tidy`] drops it.
    entries: VecDeque<KnownId>,
    /// How many entries have left at the front. Wraps around.
    gone: u32,
    /// The number of each id's entry, counted from the first entry ever.
    numbers: HashTable<u32>,
    hasher: RandomState,
}

impl Default for Shelf {
    fn default() -> Self {
        Self { entries: VecDeque::new(), gone: 0, numbers: HashTable::new(), hasher: RandomState::new() }
    }
}

impl Shelf {
    /// How many entries there are.
    pub(super) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// The entries, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &KnownId> {
        self.entries.iter().filter(|known| known.entry.kept.records > 0)
    }

    /// The entries, oldest first.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut KnownId> {
        self.entries.iter_mut().filter(|known| known.entry.kept.records > 0)
    }

    /// The oldest entry.
    pub(super) fn oldest(&self) -> Option<&KnownId> {
        // A removed entry never stays in front.
        self.entries.front()
    }

    /// The entry with an id.
    pub(super) fn get(&self, id: OnceId) -> Option<&KnownId> {
        let at = |number: u32| &self.entries[number.wrapping_sub(self.gone) as usize];
        let found = self.numbers.find(self.hasher.hash_one(id), |number| at(*number).entry.id == id);
        found.map(|number| at(*number))
    }

    /// Adds an entry as the newest. Returns the one with the same id that it replaces.
    pub(super) fn insert(&mut self, known: KnownId) -> Option<KnownId> {
        let replaced = self.remove(known.entry.id);
        self.entries.push_back(known);
        self.number_newest();
        replaced
    }

    /// Numbers the last of `entries`.
    fn number_newest(&mut self) {
        let Self { entries, gone, numbers, hasher } = self;
        let last = entries.len() - 1;
        let number = gone.wrapping_add(u32::try_from(last).expect("the bounds of ids are far below 2^32"));
        let hash = |known: &KnownId| hasher.hash_one(known.entry.id);
        let hash_of = |number: &u32| hash(&entries[number.wrapping_sub(*gone) as usize]);
        numbers.insert_unique(hash(&entries[last]), number, hash_of);
    }

    /// Removes the entry with an id, and returns it if there is one.
    pub(super) fn remove(&mut self, id: OnceId) -> Option<KnownId> {
        let Self { entries, gone, numbers, hasher } = self;
        let at = |number: u32| number.wrapping_sub(*gone) as usize;
        let found = numbers.find_entry(hasher.hash_one(id), |number| entries[at(*number)].entry.id == id);
        let (number, _) = found.ok()?.remove();
        let known = entries[at(number)];
        entries[at(number)].entry.kept.records = 0;
        self.tidy();
        Some(known)
    }

    /// Removes the oldest entry.
    pub(super) fn pop_oldest(&mut self) -> Option<KnownId> {
        let oldest = self.oldest()?.entry.id;
        self.remove(oldest)
    }

    /// Frees the room of removed entries.
    fn tidy(&mut self) {
        while self.entries.front().is_some_and(|known| known.entry.kept.records == 0) {
            self.entries.pop_front();
            self.gone = self.gone.wrapping_add(1);
        }
        let len = self.len();
        // Compacting and shrinking cost no more than the removals since the last time did.
        if self.entries.len() > 2 * len + TIDY_ENTRIES_MIN {
            self.entries.retain(|known| known.entry.kept.records > 0);
            self.gone = 0;
            self.numbers.clear();
            let entries = std::mem::take(&mut self.entries);
            for known in entries {
                self.entries.push_back(known);
                self.number_newest();
            }
        }
        if self.entries.capacity() > 4 * len + 4 * TIDY_ENTRIES_MIN {
            let Self { entries, gone, numbers, hasher } = self;
            entries.shrink_to(2 * len);
            numbers.shrink_to(2 * len, |number| {
                hasher.hash_one(entries[number.wrapping_sub(*gone) as usize].entry.id)
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u16) -> OnceId {
        OnceId::of_exchange(1, n)
    }

    fn known(n: u16) -> KnownId {
        let kept = KeptRange { first_offset: n.into(), records: 1 };
        let entry = OnceEntry { id: id(n), kept, since_s: n.into() };
        KnownId { entry, digest: None, owner: ShareNumber(1) }
    }

    #[test]
    fn an_entry_is_found_until_it_is_removed() {
        let mut shelf = Shelf::default();
        for n in 0..50 {
            assert_eq!(shelf.insert(known(n)), None);
        }
        assert_eq!(shelf.remove(id(7)), Some(known(7)));
        assert_eq!(shelf.get(id(7)), None);
        assert_eq!(shelf.remove(id(7)), None);
        assert_eq!(shelf.pop_oldest(), Some(known(0)));
        assert_eq!(shelf.insert(known(2)), Some(known(2)), "the newest now");
        let ids: Vec<_> = shelf.iter().map(|known| known.entry.since_s).collect();
        let left = [1].into_iter().chain(3..7).chain(8..50).chain([2]);
        assert_eq!(ids, left.collect::<Vec<_>>());
        assert_eq!(shelf.len(), ids.len());
    }

    #[test]
    fn one_that_stays_does_not_keep_the_room_of_all_that_came_after_it() {
        let mut shelf = Shelf::default();
        shelf.insert(known(0));
        for n in 1..60_000 {
            shelf.insert(known(n));
            shelf.remove(id(n));
        }
        assert!(shelf.entries.capacity() <= 4 * TIDY_ENTRIES_MIN + 8, "{}", shelf.entries.capacity());
        assert_eq!(shelf.get(id(0)), Some(&known(0)));
        assert_eq!(shelf.len(), 1);
    }
}
