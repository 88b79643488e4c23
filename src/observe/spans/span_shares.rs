//! Whose messages have spans: of the few that a second has for all, each datasource gets a share.

use std::collections::HashMap;

use crate::limits::SPANS_PER_S_MAX;
use crate::message::DatasourceId;

/// The spans of one second, and who asked for them.
///
/// A share is what a second has, divided by the datasources that ask and one more: whoever comes in the middle of a second
/// finds something left. A datasource that is alone gets half of all.
#[derive(Debug, Default)]
pub(super) struct SpanShares {
    /// The second that is counted, since the Unix epoch.
    second: u64,
    /// How many datasources asked in the second before.
    askers_before: u64,
    /// How many spans each that asks has had.
    taken: HashMap<DatasourceId, u64>,
    taken_by_all: u64,
}

impl SpanShares {
    /// Whether one more message of this datasource may have a span in this second.
    pub(super) fn take(&mut self, datasource: &DatasourceId, second: u64) -> bool {
        // A clock that is set back begins a second too.
        if second != self.second {
            let is_next = self.second.checked_add(1) == Some(second);
            self.askers_before = if is_next { self.taken.len() as u64 } else { 0 };
            (self.second, self.taken_by_all) = (second, 0);
            self.taken.clear();
        }
        // As many as there are spans are enough to know that each gets one at most.
        let is_crowded = self.taken.len() as u64 >= SPANS_PER_S_MAX;
        if !self.taken.contains_key(datasource) {
            if is_crowded {
                return false;
            }
            self.taken.insert(datasource.clone(), 0);
        }
        let askers = self.askers_before.max(self.taken.len() as u64);
        let share = (SPANS_PER_S_MAX / (askers + 1)).max(1);
        let is_spent = self.taken_by_all >= SPANS_PER_S_MAX;
        let Some(mine) = self.taken.get_mut(datasource).filter(|mine| !is_spent && **mine < share) else {
            return false;
        };
        *mine += 1;
        self.taken_by_all += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datasource(name: &str) -> DatasourceId {
        DatasourceId::new(name).expect("an id")
    }

    /// How many of so many messages have a span.
    fn taken(shares: &mut SpanShares, of: &DatasourceId, second: u64, messages: u64) -> u64 {
        (0..messages).filter(|_| shares.take(of, second)).count() as u64
    }

    #[test]
    fn one_that_takes_all_it_can_leaves_a_newcomer_its_share() {
        let (loud, quiet) = (datasource("loud"), datasource("quiet"));
        let mut shares = SpanShares::default();
        for second in 100..105 {
            let of_loud = taken(&mut shares, &loud, second, 10 * SPANS_PER_S_MAX);
            assert!((SPANS_PER_S_MAX / 3..=SPANS_PER_S_MAX / 2).contains(&of_loud), "{of_loud}");
            assert_eq!(taken(&mut shares, &quiet, second, 50), 50, "in second {second}");
        }
        // Alone again, it has half of all again.
        taken(&mut shares, &loud, 105, 1);
        assert_eq!(taken(&mut shares, &loud, 106, 10 * SPANS_PER_S_MAX), SPANS_PER_S_MAX / 2);
    }

    #[test]
    fn those_that_ask_every_second_get_the_same_whoever_is_first() {
        let all = ["a", "b", "c", "d"].map(datasource);
        let mut shares = SpanShares::default();
        all.iter().for_each(|one| _ = shares.take(one, 7));
        for one in &all {
            assert_eq!(taken(&mut shares, one, 8, 5_000), SPANS_PER_S_MAX / 5);
        }
    }

    #[test]
    fn more_datasources_than_spans_get_one_each_and_no_more_memory_than_that() {
        let mut shares = SpanShares::default();
        for second in [1, 2, 3, 2, u64::MAX, 0] {
            let all = (0..3 * SPANS_PER_S_MAX).map(|n| datasource(&format!("d{n}")));
            let given: u64 = all.map(|one| taken(&mut shares, &one, second, 3)).sum();
            assert!(given <= SPANS_PER_S_MAX, "{given} in second {second}");
            assert!(given >= SPANS_PER_S_MAX / 2, "{given} in second {second}");
            assert!(shares.taken.len() as u64 <= SPANS_PER_S_MAX);
        }
    }
}
