//! The different topics that were seen: 8 bytes each, never more than the limit allows.
//!
//! A topic is represented by a keyed hash of 64 bits, so that nobody can construct two topics that count
//! as one; by chance that happens to one in about 10¹⁴ pairs. A topic that was let in stays: to count
//! anew, set the limit again. The set is empty when the gateway starts.

use parking_lot::Mutex;
use std::hash::{BuildHasher, RandomState};

/// The set of topics that were seen.
#[derive(Debug, Default)]
pub(super) struct SeenTopics {
    seen: papaya::HashSet<u64>,
    hash: RandomState,
    /// Held while a topic is added, so that the count is exact. A lookup takes no lock.
    adding: Mutex<()>,
}

impl SeenTopics {
    /// Adds `topic` of `datasource` if there is room. Returns whether it is among the first `max` seen.
    pub(super) fn try_insert(&self, datasource: &str, topic: &str, max: u64) -> bool {
        let hash = self.hash.hash_one((datasource, topic));
        if self.seen.pin().contains(&hash) {
            return true;
        }
        let _adding = self.adding.lock();
        let seen = self.seen.pin();
        let fits = (seen.len() as u64) < max || seen.contains(&hash);
        if fits {
            seen.insert(hash);
        }
        fits
    }

    /// How many were seen.
    pub(super) fn count(&self) -> u64 {
        self.seen.pin().len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ones_stay_and_no_further_one_is_let_in() {
        let topics = SeenTopics::default();
        for _ in 0..3 {
            assert!(topics.try_insert("a", "t/1", 2) && topics.try_insert("a", "t/2", 2));
            assert!(!topics.try_insert("a", "t/3", 2), "one above");
            assert!(!topics.try_insert("b", "t/1", 2), "another datasource's is another topic");
        }
        assert_eq!(topics.count(), 2);
        assert!(topics.try_insert("a", "t/3", 3), "after the limit was raised");
    }

    #[test]
    fn threads_together_let_in_as_many_as_the_limit() {
        let topics = SeenTopics::default();
        let admitted: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|thread| {
                    let topics = &topics;
                    scope.spawn(move || {
                        (0..200).filter(|i| topics.try_insert("a", &format!("{thread}/{i}"), 100)).count()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
        });
        assert_eq!((admitted, topics.count()), (100, 100));
    }
}
