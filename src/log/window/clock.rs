//! The window's clock, which nobody can set.

use std::time::Instant;

use crate::log::once::WindowStamp;
use crate::message::TimeMicros;

/// The window's clock.
pub(super) struct WindowClock {
    /// Its value at `started`, in microseconds.
    base: u64,
    started: Instant,
}

impl WindowClock {
    /// A clock that starts at 0 now.
    pub(super) fn new() -> Self {
        Self { base: 0, started: Instant::now() }
    }

    /// A clock that continues from `last`, given the present wall clock.
    pub(super) fn resume(last: WindowStamp, wall: TimeMicros) -> Self {
        let passed = u64::try_from(wall.saturating_sub(last.wall)).unwrap_or(0);
        Self { base: last.clock.saturating_add(passed), started: Instant::now() }
    }

    /// Its present value, in microseconds.
    pub(super) fn now(&self) -> u64 {
        let passed = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.base.saturating_add(passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_goes_on_over_a_restart_and_never_back() {
        let last = WindowStamp { entered: 0, clock: 5_000_000, wall: 1_000_000_000 };
        let seconds = |wall| WindowClock::resume(last, wall).now() / 1_000_000;
        assert_eq!(seconds(1_000_000_000), 5);
        assert_eq!(seconds(1_060_000_000), 65);
        assert_eq!(seconds(0), 5, "the wall clock was set back");
        assert_eq!(seconds(TimeMicros::MIN), 5);
    }
}
