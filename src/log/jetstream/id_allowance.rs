//! The ids that this gateway has given to JetStream and that it still has to know, counted for their datasource. JetStream
//! keeps an id for its window whatever else comes, in the memory of every server, and pushes out none. So whoever brings
//! new ids faster than they leave is refused: a datasource may have `intake.dedup_ids_per_datasource_max` from each
//! gateway, and, while there are `intake.dedup_ids_max` in all, no more than an equal part of those. A repetition
//! brings no new id and is recognized as ever.
//!
//! Every message with an id counts, those that share one too, because each has its own in the stream. Only numbers are
//! kept, for parts of the window: an id counts until the part in which it came is over its time as a whole.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::message::DatasourceId;

/// The parts of a window that are counted each by itself.
const PARTS_PER_WINDOW: u32 = 16;

/// What each datasource has of the ids that JetStream knows, as far as this gateway gave them.
pub(super) struct IdAllowance {
    per_datasource_max: usize,
    all_max: usize,
    window: Duration,
    began: Instant,
    state: Mutex<IdAllowanceState>,
}

#[derive(Default)]
struct IdAllowanceState {
    tallies: HashMap<DatasourceId, IdTally>,
    /// In all.
    count: usize,
    /// The part of the window in which tallies were last gone through.
    swept_in: u32,
}

/// The ids of one datasource: how many came in which part of the window, oldest first.
#[derive(Default)]
struct IdTally {
    parts: VecDeque<(u32, usize)>,
    count: usize,
}

impl IdTally {
    /// Counts those no more that came before this part. Returns how many they were.
    fn expire(&mut self, before: u32) -> usize {
        let mut expired = 0;
        while let Some((_, count)) = self.parts.pop_front_if(|(part, _)| *part < before) {
            expired += count;
        }
        self.count -= expired;
        expired
    }

    fn add(&mut self, part: u32, ids: usize) {
        self.count += ids;
        match self.parts.back_mut() {
            Some((newest, count)) if *newest == part => *count += ids,
            _ => self.parts.push_back((part, ids)),
        }
    }
}

impl IdAllowance {
    pub(super) fn new(per_datasource_max: usize, all_max: usize, window: Duration) -> Self {
        Self { per_datasource_max, all_max, window, began: Instant::now(), state: Mutex::default() }
    }

    /// The part of the window that is counted at this time.
    fn part_at(&self, now: Instant) -> u32 {
        let part = (self.window / PARTS_PER_WINDOW).max(Duration::from_millis(1));
        let parts = now.saturating_duration_since(self.began).as_millis() / part.as_millis();
        u32::try_from(parts).unwrap_or(u32::MAX)
    }

    /// Counts new ids of a datasource, if it may have any more now. Those of one request count as a whole.
    pub(super) fn try_take(&self, datasource: &DatasourceId, ids: usize) -> bool {
        self.try_take_at(datasource, ids, Instant::now())
    }

    fn try_take_at(&self, datasource: &DatasourceId, ids: usize, now: Instant) -> bool {
        let part = self.part_at(now);
        let before = part.saturating_sub(PARTS_PER_WINDOW);
        let mut state = self.state.lock();
        let IdAllowanceState { tallies, count, swept_in } = &mut *state;
        if *swept_in != part {
            *swept_in = part;
            tallies.retain(|_, tally| {
                *count -= tally.expire(before);
                tally.count > 0
            });
        }
        let others = tallies.len();
        let has = tallies.get(datasource).map_or(0, |tally| tally.count);
        // Who comes last finds as much as everybody has.
        let equal_part = self.all_max / (others + usize::from(has == 0));
        if has >= self.per_datasource_max || (*count >= self.all_max && has >= equal_part) {
            return false;
        }
        *count += ids;
        match tallies.get_mut(datasource) {
            Some(tally) => tally.add(part, ids),
            None => {
                let mut tally = IdTally::default();
                tally.add(part, ids);
                tallies.insert(datasource.clone(), tally);
            }
        }
        true
    }

    /// Takes back ids of a datasource that were counted just now: they were known, or did not get into the stream.
    pub(super) fn give_back(&self, datasource: &DatasourceId, ids: usize) {
        let mut state = self.state.lock();
        let IdAllowanceState { tallies, count, .. } = &mut *state;
        let Some(tally) = tallies.get_mut(datasource) else { return };
        let mut left = ids;
        while left > 0
            && let Some((_, newest)) = tally.parts.back_mut()
        {
            let taken = left.min(*newest);
            *newest -= taken;
            left -= taken;
            if *newest == 0 {
                tally.parts.pop_back();
            }
        }
        tally.count -= ids - left;
        *count -= ids - left;
        if tally.count == 0 {
            tallies.remove(datasource);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(160);

    fn of(name: &str) -> DatasourceId {
        DatasourceId::new(name).expect("a slug")
    }

    #[test]
    fn a_datasource_brings_so_many_ids_in_a_window_and_others_have_theirs() {
        let (allowance, press, oven) = (IdAllowance::new(10, 100, WINDOW), of("press-4"), of("oven"));
        let at = |s: u64| allowance.began + Duration::from_secs(s);
        assert!((0..10).all(|_| allowance.try_take_at(&press, 1, at(5))));
        assert!(!allowance.try_take_at(&press, 1, at(6)), "one above");
        assert!(allowance.try_take_at(&oven, 9, at(6)), "another datasource has its own");
        assert!(allowance.try_take_at(&oven, 4, at(6)), "a request counts as a whole");
        assert!(!allowance.try_take_at(&oven, 1, at(7)));
        allowance.give_back(&press, 2);
        assert!(allowance.try_take_at(&press, 2, at(7)));
        assert!(!allowance.try_take_at(&press, 1, at(166)), "their part of the window is not over");
        assert!(allowance.try_take_at(&press, 1, at(171)));
        assert_eq!(allowance.state.lock().count, 1, "what is over its time counts for nobody");
    }

    #[test]
    fn when_there_are_too_many_in_all_only_who_has_few_brings_more() {
        let allowance = IdAllowance::new(100, 30, WINDOW);
        let now = allowance.began;
        assert!((0..29).all(|_| allowance.try_take_at(&of("big"), 1, now)));
        assert!(allowance.try_take_at(&of("b"), 1, now));
        assert!(!allowance.try_take_at(&of("big"), 1, now));
        assert!((0..14).all(|_| allowance.try_take_at(&of("b"), 1, now)), "up to an equal part");
        assert!(!allowance.try_take_at(&of("b"), 1, now));
        assert!(allowance.try_take_at(&of("c"), 1, now), "who comes last");
        allowance.give_back(&of("c"), 5);
        allowance.give_back(&of("nobody"), 5);
        let state = allowance.state.lock();
        assert_eq!((state.count, state.tallies.len()), (44, 2));
    }
}
