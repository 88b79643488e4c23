//! A bucket: how much of a rate is used, in one atomic number. It fills at the rate and holds at most the
//! burst. A caller that takes from it says how long it would wait for units that are not there yet.
//!
//! This is the generic cell rate algorithm (ITU-T I.371): the number is the time at which the bucket is
//! full again. To take units moves that time on. So no task has to fill a bucket, no thread waits for
//! another, and a caller that waits has its turn reserved: a thousand connections at one bucket are
//! served in the order in which they came, each woken once.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const NANOS_PER_S: u128 = 1_000_000_000;

/// A moment, in nanoseconds since the first call of [`Moment::now`] in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub(super) u64);

impl Moment {
    /// The present moment.
    pub fn now() -> Self {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        Self(nanos(START.elapsed()))
    }
}

/// The rate at which a bucket fills, and the most that it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Units a second, at least 1.
    pub per_s: u64,
    /// Units that may be taken at once, at least 1.
    pub burst: u64,
}

impl Rate {
    /// How long the rate takes to supply `units`, in nanoseconds, rounded up.
    fn nanos(self, units: u64) -> u64 {
        let nanos = (u128::from(units) * NANOS_PER_S).div_ceil(u128::from(self.per_s.max(1)));
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }

    /// How many units the rate supplies in `nanos`, rounded down.
    fn units(self, nanos: u64) -> u64 {
        let units = u128::from(nanos) * u128::from(self.per_s) / NANOS_PER_S;
        u64::try_from(units).unwrap_or(u64::MAX)
    }
}

/// The bucket. Each call passes its rate.
#[derive(Debug, Default)]
pub struct RateBucket {
    /// When it is full again.
    full_at: AtomicU64,
}

impl RateBucket {
    /// Takes `units`, if they are available within `patience` from `now`. More than the burst counts as
    /// available when the bucket is full, and leaves the bucket in debt. `Ok` says how long to wait before
    /// using them, `Err` how long the wait would have been: nothing is taken then.
    ///
    /// # Errors
    /// The wait, if it is longer than `patience`.
    pub fn take(
        &self,
        rate: Rate,
        units: u64,
        now: Moment,
        patience: Duration,
    ) -> Result<Duration, Duration> {
        let cost = rate.nanos(units);
        // How far from full the bucket may be and still hold these units.
        let room = rate.nanos(rate.burst).saturating_sub(rate.nanos(units.min(rate.burst)));
        let patience = nanos(patience);
        let mut full_at = self.full_at.load(Ordering::Relaxed);
        loop {
            let from = full_at.max(now.0);
            let wait = (from - now.0).saturating_sub(room);
            if wait > patience {
                return Err(Duration::from_nanos(wait));
            }
            let taken = from.saturating_add(cost);
            match self.full_at.compare_exchange_weak(full_at, taken, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(Duration::from_nanos(wait)),
                Err(changed) => full_at = changed,
            }
        }
    }

    /// Returns units that were taken and not used.
    pub fn give_back(&self, rate: Rate, units: u64) {
        let cost = rate.nanos(units);
        // The cost is still part of `full_at`, whatever others have taken since, so it can be subtracted.
        let _ = self
            .full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| Some(full_at.saturating_sub(cost)));
    }

    /// How many units could be taken without a wait.
    pub fn left(&self, rate: Rate, now: Moment) -> u64 {
        rate.units(rate.nanos(rate.burst).saturating_sub(nanos(self.full_in(now)))).min(rate.burst)
    }

    /// How long from `now` until it is full again.
    pub fn full_in(&self, now: Moment) -> Duration {
        Duration::from_nanos(self.full_at.load(Ordering::Relaxed).saturating_sub(now.0))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    /// A bucket as one would draw it: a level that rises with time, in parts of a unit.
    struct Model {
        rate: Rate,
        /// Units times 10⁹; negative when some are owed.
        level: i128,
        at: u64,
    }

    impl Model {
        fn new(rate: Rate) -> Self {
            Self { rate, level: i128::from(rate.burst) * 1_000_000_000, at: 0 }
        }

        fn rise(&mut self, now: u64) {
            let risen = i128::from(now - self.at) * i128::from(self.rate.per_s);
            self.level = (self.level + risen).min(i128::from(self.rate.burst) * 1_000_000_000);
            self.at = now;
        }

        fn has(&self, units: u64) -> i128 {
            self.level - i128::from(units.min(self.rate.burst)) * 1_000_000_000
        }
    }

    proptest! {
        #[test]
        fn a_bucket_is_a_level_that_rises(
            // Rates that a unit's nanoseconds are whole for, so that nothing is rounded.
            per_s in prop::sample::select(vec![1_u64, 10, 100, 1_000, 1_000_000]),
            burst in 1_u64..50,
            steps in prop::collection::vec((0_u64..3_000 * MS, 1_u64..80), 1..60),
        ) {
            let rate = Rate { per_s, burst };
            let (bucket, mut model) = (RateBucket::default(), Model::new(rate));
            let mut now = 0;
            for (later, units) in steps {
                now += later;
                model.rise(now);
                prop_assert_eq!(
                    i128::from(bucket.left(rate, Moment(now))),
                    (model.level / 1_000_000_000).max(0)
                );
                let short = model.has(units);
                match bucket.take(rate, units, Moment(now), Duration::ZERO) {
                    Ok(wait) => {
                        prop_assert!(short >= 0 && wait.is_zero());
                        model.level -= i128::from(units) * 1_000_000_000;
                    }
                    Err(wait) => {
                        let missing = -short;
                        prop_assert!(missing > 0);
                        prop_assert_eq!(wait.as_nanos() as i128, missing / i128::from(per_s));
                    }
                }
            }
        }

        #[test]
        fn what_is_given_back_can_be_taken_again(burst in 1_u64..50, units in 1_u64..50) {
            let rate = Rate { per_s: 7, burst };
            let bucket = RateBucket::default();
            let now = Moment(1_000 * MS);
            prop_assume!(units <= burst);
            bucket.take(rate, units, now, Duration::ZERO).expect("it is full");
            bucket.give_back(rate, units);
            prop_assert_eq!(bucket.left(rate, now), burst);
        }
    }

    #[test]
    fn who_waits_has_its_turn_in_order() {
        let rate = Rate { per_s: 10, burst: 1 };
        let bucket = RateBucket::default();
        let waits: Vec<_> = (0..4)
            .map(|_| bucket.take(rate, 1, Moment(0), Duration::from_millis(250)).map(|wait| wait.as_millis()))
            .collect();
        let too_long = Err(Duration::from_millis(300));
        assert_eq!(waits, [Ok(0), Ok(100), Ok(200), too_long]);
        // The fourth has taken nothing.
        let next = bucket.take(rate, 1, Moment(100 * MS), Duration::from_millis(250));
        assert_eq!(next, Ok(Duration::from_millis(200)));
    }

    #[test]
    fn threads_together_get_the_burst_and_no_more() {
        let rate = Rate { per_s: 1, burst: 1_000 };
        let bucket = RateBucket::default();
        let got: usize = std::thread::scope(|scope| {
            let take =
                || (0..1_000).filter(|_| bucket.take(rate, 1, Moment(0), Duration::ZERO).is_ok()).count();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
        });
        assert_eq!(got, 1_000);
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let bucket = RateBucket::default();
        let slow = Rate { per_s: 1, burst: u64::MAX };
        assert!(bucket.take(slow, u64::MAX, Moment(5), Duration::MAX).is_ok());
        assert!(bucket.take(slow, 1, Moment(5), Duration::ZERO).is_err());
        let fast = Rate { per_s: u64::MAX, burst: u64::MAX };
        assert!(RateBucket::default().take(fast, u64::MAX, Moment(5), Duration::ZERO).is_ok());
    }
}
