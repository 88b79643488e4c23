//! The age of a segment, by which retention removes it: how long ago its last record came in. It is the lesser of what two
//! clocks say. The wall clock can be set, and counts over restarts. The other one cannot be set, and counts from when this
//! process made the segment, or found it at its start and took its age then from the wall clock. So a step of the wall
//! clock while Headgate runs ages nothing; at a start there is the wall clock alone.

use crate::message::{TimeMicros, now_micros};
use crate::time::running_micros;

/// What both clocks said at one moment, in microseconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct ClockReading {
    /// Since the Unix epoch.
    pub(super) wall: TimeMicros,
    /// Since the machine started.
    pub(super) running: i64,
}

impl ClockReading {
    pub(super) fn now() -> Self {
        Self { wall: now_micros(), running: running_micros() }
    }

    /// The age, in microseconds, of what is from `since` by the wall clock, and was made or found at `found_at`. Less than 0
    /// while the wall clock says that it is from the future.
    pub(super) fn age(self, since: TimeMicros, found_at: ClockReading) -> i64 {
        let by_wall = self.wall.saturating_sub(since);
        let when_found = found_at.wall.saturating_sub(since).max(0);
        by_wall.min(when_found.saturating_add(self.running.saturating_sub(found_at.running)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_is_the_lesser_of_what_two_clocks_say() {
        let at = |wall, running| ClockReading { wall, running };
        let made = at(1_000, 50);
        assert_eq!(at(1_010, 60).age(1_000, made), 10);
        assert_eq!(at(9_000, 60).age(1_000, made), 10, "the wall clock was set forward");
        assert_eq!(at(900, 60).age(1_000, made), -100, "it was set back");
        let found = at(1_500, 5);
        assert_eq!(at(1_510, 15).age(1_000, found), 510, "it was there at the start");
        assert_eq!(at(TimeMicros::MAX, 15).age(1_000, found), 510, "the wall clock was set forward since");
        assert_eq!(at(1_510, 15).age(8_000, at(1_500, 5)), -6_490, "it is from the future");
        assert_eq!(at(8_100, 15).age(8_000, at(1_500, 5)), 10, "until the clock was set right");
        assert!(ClockReading::now().running > 0);
    }
}
