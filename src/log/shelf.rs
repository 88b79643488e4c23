//! A shelf: the known ids of one kind. It keeps its entries in order of arrival and finds them by id.
//! An entry takes 32 bytes, and 5 more in the hash table.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use hashbrown::HashTable;

use super::once::{OnceEntry, OnceId};

/// Unused room below this many entries is not worth freeing.
const TIDY_ENTRIES_MIN: usize = 1024;

/// Entries of one kind, in order of arrival, found by their id.
pub(super) struct Shelf {
    age_max_s: u64,
    pub(super) len_max: usize,
    /// Oldest first. A removed entry stays in the middle, with 0 records, until it reaches the front,
    /// where [`Shelf::tidy`] drops it.
    entries: VecDeque<OnceEntry>,
    /// How many entries have left at the front. Wraps around.
    gone: u32,
    /// The number of each id's entry, counted from the first entry ever.
    numbers: HashTable<u32>,
    hasher: RandomState,
}

impl Shelf {
    /// An empty shelf for at most `len_max` entries, each at most `age_max` old.
    pub(super) fn new(age_max: Duration, len_max: usize) -> Self {
        Self {
            age_max_s: age_max.as_secs(),
            len_max,
            entries: VecDeque::new(),
            gone: 0,
            numbers: HashTable::new(),
            hasher: RandomState::new(),
        }
    }

    /// How many entries there are.
    pub(super) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// The entries, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &OnceEntry> {
        self.entries.iter().filter(|entry| entry.kept.records > 0)
    }

    /// The entry with an id.
    pub(super) fn get(&self, id: OnceId) -> Option<&OnceEntry> {
        let at = |number: u32| &self.entries[number.wrapping_sub(self.gone) as usize];
        let found = self.numbers.find(self.hasher.hash_one(id), |number| at(*number).id == id);
        found.map(|number| at(*number))
    }

    /// Adds an entry as the newest. It replaces one with the same id.
    pub(super) fn insert(&mut self, entry: OnceEntry) {
        self.remove(entry.id);
        self.entries.push_back(entry);
        self.number_newest();
    }

    /// Numbers the last of `entries`.
    fn number_newest(&mut self) {
        let Self { entries, gone, numbers, hasher, .. } = self;
        let last = entries.len() - 1;
        let number = gone.wrapping_add(u32::try_from(last).expect("len_max is far below 2^32"));
        let hash = |entry: &OnceEntry| hasher.hash_one(entry.id);
        let hash_of = |number: &u32| hash(&entries[number.wrapping_sub(*gone) as usize]);
        numbers.insert_unique(hash(&entries[last]), number, hash_of);
    }

    /// Removes the entry with an id, if there is one.
    pub(super) fn remove(&mut self, id: OnceId) {
        let Self { entries, gone, numbers, hasher, .. } = self;
        let at = |number: u32| number.wrapping_sub(*gone) as usize;
        let found = numbers.find_entry(hasher.hash_one(id), |number| entries[at(*number)].id == id);
        let Ok(found) = found else { return };
        let (number, _) = found.remove();
        entries[at(number)].kept.records = 0;
        self.tidy();
    }

    /// Removes all entries.
    pub(super) fn clear(&mut self) {
        *self = Self::new(Duration::from_secs(self.age_max_s), self.len_max);
    }

    /// Whether an entry from `since_s` is too old at `now_s`; both are seconds of the window's clock.
    pub(super) fn is_over_age(&self, since_s: u32, now_s: u32) -> bool {
        u64::from(now_s.saturating_sub(since_s)) > self.age_max_s
    }

    /// Removes entries over their age, then evicts the oldest if there are too many; returns how many
    /// it evicted.
    pub(super) fn expire(&mut self, now_s: u32) -> u64 {
        while let Some(oldest) = self.entries.front()
            && self.is_over_age(oldest.since_s, now_s)
        {
            self.remove(oldest.id);
        }
        let mut evicted = 0;
        while self.len() > self.len_max
            && let Some(oldest) = self.entries.front()
        {
            self.remove(oldest.id);
            evicted += 1;
        }
        evicted
    }

    /// Frees the room of removed entries.
    fn tidy(&mut self) {
        while self.entries.front().is_some_and(|entry| entry.kept.records == 0) {
            self.entries.pop_front();
            self.gone = self.gone.wrapping_add(1);
        }
        let len = self.len();
        // Compacting and shrinking cost no more than the removals since the last time did.
        if self.entries.len() > 2 * len + TIDY_ENTRIES_MIN {
            self.entries.retain(|entry| entry.kept.records > 0);
            self.gone = 0;
            self.numbers.clear();
            let entries = std::mem::take(&mut self.entries);
            for entry in entries {
                self.entries.push_back(entry);
                self.number_newest();
            }
        }
        if self.entries.capacity() > 4 * len + 4 * TIDY_ENTRIES_MIN {
            let Self { entries, gone, numbers, hasher, .. } = self;
            entries.shrink_to(2 * len);
            numbers.shrink_to(2 * len, |number| {
                hasher.hash_one(entries[number.wrapping_sub(*gone) as usize].id)
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::once::KeptRange;

    fn id(n: u16) -> OnceId {
        OnceId::of_exchange(1, n)
    }

    fn entry(n: u16, since_s: u32) -> OnceEntry {
        OnceEntry { id: id(n), kept: KeptRange { first_offset: n.into(), records: 1 }, since_s }
    }

    #[test]
    fn an_entry_is_found_until_it_is_removed_or_over_its_age() {
        let mut shelf = Shelf::new(Duration::from_secs(10), 100);
        for n in 0..50 {
            shelf.insert(entry(n, n.into()));
        }
        shelf.remove(id(7));
        assert_eq!(shelf.get(id(7)), None);
        assert_eq!(shelf.expire(30), 0, "age is no eviction");
        let known: Vec<_> = (0..50).filter(|n| shelf.get(id(*n)).is_some()).collect();
        assert_eq!(known, (20..50).collect::<Vec<_>>(), "at its age and not a second over");
        assert_eq!(shelf.iter().map(|entry| entry.since_s).collect::<Vec<_>>(), (20..50).collect::<Vec<_>>());
    }

    #[test]
    fn the_oldest_leave_when_there_are_too_many() {
        let mut shelf = Shelf::new(Duration::from_secs(10), 3);
        (0..5).for_each(|n| shelf.insert(entry(n, 0)));
        shelf.insert(entry(2, 0));
        assert_eq!(shelf.expire(0), 2);
        assert_eq!(shelf.iter().map(|entry| entry.id).collect::<Vec<_>>(), [id(3), id(4), id(2)]);
    }

    #[test]
    fn one_that_stays_does_not_keep_the_room_of_all_that_came_after_it() {
        let mut shelf = Shelf::new(Duration::from_secs(10), usize::MAX);
        shelf.insert(entry(0, 0));
        for n in 1..60_000 {
            shelf.insert(entry(n, 0));
            shelf.remove(id(n));
        }
        assert!(shelf.entries.capacity() <= 4 * TIDY_ENTRIES_MIN + 8, "{}", shelf.entries.capacity());
        assert_eq!(shelf.get(id(0)), Some(&entry(0, 0)));
        assert_eq!(shelf.len(), 1);
    }
}
