//! How many records a second a sink takes.

use std::time::Instant;

/// The seconds over which records are counted.
const PACE_SECONDS: usize = 10;

/// The records that were stored in each of the last seconds.
#[derive(Debug, Default)]
pub(super) struct StoragePace {
    begun: Option<Instant>,
    /// The second, counted from `begun`, of the newest count.
    second: u64,
    /// One for each second, the newest at `second % PACE_SECONDS`.
    counts: [u64; PACE_SECONDS],
}

impl StoragePace {
    /// Counts records that were stored just now.
    pub(super) fn note(&mut self, now: Instant, records: u64) {
        self.move_on(now);
        self.counts[self.place_of(self.second)] += records;
    }

    /// Records a second, over the last seconds.
    pub(super) fn per_second(&mut self, now: Instant) -> f64 {
        self.move_on(now);
        let Some(begun) = self.begun else { return 0.0 };
        let counted: u64 = self.counts.iter().sum();
        let seconds = now.saturating_duration_since(begun).as_secs_f64().clamp(1.0, PACE_SECONDS as f64);
        #[expect(clippy::cast_precision_loss, reason = "a rate; exact up to 2^53")]
        let counted = counted as f64;
        counted / seconds
    }

    /// Forgets the seconds that have gone by.
    fn move_on(&mut self, now: Instant) {
        let begun = *self.begun.get_or_insert(now);
        let second = now.saturating_duration_since(begun).as_secs();
        for passed in (self.second + 1..=second).take(PACE_SECONDS) {
            let place = self.place_of(passed);
            self.counts[place] = 0;
        }
        self.second = self.second.max(second);
    }

    fn place_of(&self, second: u64) -> usize {
        usize::try_from(second % PACE_SECONDS as u64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_pace_is_that_of_the_last_seconds() {
        let (mut pace, begun) = (StoragePace::default(), Instant::now());
        let at = |seconds| begun + Duration::from_secs(seconds);
        assert!(pace.per_second(at(0)) < 0.1);
        for second in 0..20 {
            pace.note(at(second), 100);
        }
        assert!((pace.per_second(at(19)) - 100.0).abs() < 1.0);
        assert!((pace.per_second(at(24)) - 50.0).abs() < 1.0);
        assert!(pace.per_second(at(100)) < 0.1);
    }
}
