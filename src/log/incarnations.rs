//! The incarnations of a datasource, as the log's readers know them: which of the datasources that had the same id one
//! after the other a record belongs to.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::message::{Incarnation, KeyId, Offset, TimeMicros};

/// What has happened to an incarnation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IncarnationStep {
    /// It has ended, and these were its keys. A record of another key at `end` or behind it is of the next one, until
    /// that is known to have begun.
    Ended {
        /// The keys that it had.
        keys: Arc<[KeyId]>,
        /// Nothing of it is at this offset or behind it, but what its keys have let in.
        end: Offset,
    },
    /// It has begun after another one: records of keys for all datasources belong to it from this offset and time on.
    Begun {
        /// The log's end then.
        first_offset: Offset,
        /// When that was, where the offset is not known.
        since: TimeMicros,
    },
    /// What is left of it is removed.
    Purged,
}

/// The incarnations of one datasource, as far as they differ from a datasource that was never deleted.
#[derive(Debug, Clone, Default)]
pub struct IncarnationHistory {
    /// How many have ended.
    ended: Incarnation,
    /// Where the last one of those ends.
    end: Offset,
    /// The keys of those that have ended.
    keys: HashMap<KeyId, Incarnation>,
    /// Those that have begun after another one, in order.
    begun: Vec<(Incarnation, Offset, TimeMicros)>,
    purged: BTreeSet<Incarnation>,
}

impl IncarnationHistory {
    /// Notes the next step.
    pub(super) fn push(&mut self, incarnation: Incarnation, step: &IncarnationStep) {
        match step {
            IncarnationStep::Ended { keys, end } => {
                self.keys.extend(keys.iter().map(|key| (*key, incarnation)));
                (self.ended, self.end) = (self.ended.max(incarnation), *end);
            }
            IncarnationStep::Begun { first_offset, since } => {
                self.begun.push((incarnation, *first_offset, *since));
            }
            IncarnationStep::Purged => drop(self.purged.insert(incarnation)),
        }
    }

    /// The incarnation that a record with these properties belongs to.
    pub fn incarnation_of(&self, key_id: KeyId, received_at: TimeMicros, offset: Offset) -> Incarnation {
        if let Some(of_key) = self.keys.get(&key_id) {
            return *of_key;
        }
        let begun = |(_, first, since): &&(Incarnation, Offset, TimeMicros)| {
            offset >= *first && received_at >= *since
        };
        let newest = self.begun.iter().rev().find(begun).map_or(1, |(incarnation, ..)| *incarnation);
        // In a cluster the log may be ahead of the registry: a record of the next incarnation is here before it is
        // known to have begun.
        let is_next = newest == self.ended && self.present().is_none() && offset >= self.end;
        if is_next { newest + 1 } else { newest }
    }

    /// The keys that an ended incarnation had.
    pub fn keys_of(&self, incarnation: Incarnation) -> impl Iterator<Item = KeyId> {
        self.keys.iter().filter(move |(_, of)| **of == incarnation).map(|(key, _)| *key)
    }

    /// Whether an incarnation has ended.
    pub fn has_ended(&self, incarnation: Incarnation) -> bool {
        incarnation <= self.ended
    }

    /// Whether an incarnation is purged.
    pub fn is_purged(&self, incarnation: Incarnation) -> bool {
        self.purged.contains(&incarnation)
    }

    /// The incarnation that has not ended, and the offset from which on it is; `None`: it is not known yet.
    pub fn present(&self) -> Option<(Incarnation, Offset)> {
        let (incarnation, first_offset, _) = self.begun.last()?;
        (*incarnation > self.ended).then_some((*incarnation, *first_offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: KeyId = KeyId([1; 6]);
    const NEW: KeyId = KeyId([2; 6]);
    const ALL: KeyId = KeyId([9; 6]);

    fn history(steps: &[(Incarnation, IncarnationStep)]) -> IncarnationHistory {
        let mut history = IncarnationHistory::default();
        steps.iter().for_each(|(incarnation, step)| history.push(*incarnation, step));
        history
    }

    fn ended(key: KeyId, end: Offset) -> IncarnationStep {
        IncarnationStep::Ended { keys: Arc::new([key]), end }
    }

    #[test]
    fn a_record_is_of_the_incarnation_of_its_key_wherever_it_is() {
        let begun = IncarnationStep::Begun { first_offset: 10, since: TimeMicros::MIN };
        let history = history(&[(1, ended(OLD, Offset::MAX)), (2, begun)]);
        for offset in [0, 9, 10, 1_000] {
            assert_eq!(history.incarnation_of(OLD, 0, offset), 1);
        }
        assert_eq!(history.incarnation_of(NEW, 0, 10), 2);
        assert_eq!([9, 10].map(|offset| history.incarnation_of(ALL, 0, offset)), [1, 2]);
        assert!(history.has_ended(1) && !history.has_ended(2));
        assert_eq!(history.present(), Some((2, 10)));
    }

    #[test]
    fn of_a_datasource_that_is_deleted_everything_has_ended_but_what_comes_behind_its_end() {
        let history = history(&[(1, ended(OLD, 20))]);
        assert_eq!([19, 20].map(|offset| history.incarnation_of(ALL, 0, offset)), [1, 2]);
        assert_eq!(history.incarnation_of(OLD, 0, 25), 1);
        assert_eq!(history.present(), None);
    }

    #[test]
    fn each_deletion_ends_one_more_and_a_purge_is_of_one() {
        let begun = |first_offset| IncarnationStep::Begun { first_offset, since: TimeMicros::MIN };
        let history = history(&[
            (1, ended(OLD, Offset::MAX)),
            (2, begun(10)),
            (2, ended(NEW, Offset::MAX)),
            (1, IncarnationStep::Purged),
            (3, begun(30)),
        ]);
        assert_eq!([5, 15, 29, 30].map(|offset| history.incarnation_of(ALL, 0, offset)), [1, 2, 2, 3]);
        assert!(history.is_purged(1) && !history.is_purged(2) && history.has_ended(2));
    }
}
