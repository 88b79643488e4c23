//! Retention: removes the oldest segments when the log is over its size or they are over their age, but
//! never while a consumer holds them because it has not consumed them. A consumer may also hold
//! them only while there is room.
//!
//! | hold | of | effect |
//! |---|---|---|
//! | firm | storage, retained messages | a log that is full of records under it takes no more |
//! | yielding | egress | age alone removes nothing under it; lack of room does |
//!
//! A step of the wall clock while Headgate runs ages no segment (`age.rs`).
//!
//! Nothing is removed before the consumers of this start have their holds: until then the log holds
//! everything.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use super::age::ClockReading;
use super::segment::Segment;
use crate::config;
use crate::message::Offset;

/// Keeps what a consumer has not consumed yet: retention removes nothing at or above the lowest firm
/// hold, and nothing at or above the lowest yielding one for its age alone. Dropping it ends it.
#[derive(Debug)]
pub struct Hold(Arc<AtomicU64>);

impl Hold {
    /// Releases everything below `offset`, which the consumer has durably processed.
    pub fn set(&self, offset: Offset) {
        self.0.store(offset, Ordering::Release);
    }
}

/// The lowest holds: the offsets from which on records have to stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LowestHolds {
    /// Unconditionally.
    pub(super) firmly: Offset,
    /// While there is room; never above `firmly`.
    pub(super) with_room: Offset,
}

/// All holds of a log.
pub(super) struct Holds {
    firm: Mutex<Vec<Weak<AtomicU64>>>,
    /// Holds that yield when there is no room.
    yielding: Mutex<Vec<Weak<AtomicU64>>>,
    /// Holds everything until the consumers have their own holds.
    first: Mutex<Option<Hold>>,
}

impl Holds {
    pub(super) fn new() -> Self {
        let holds = Self { firm: Mutex::default(), yielding: Mutex::default(), first: Mutex::default() };
        *holds.first.lock() = Some(holds.hold());
        holds
    }

    /// A hold of everything.
    pub(super) fn hold(&self) -> Hold {
        new_hold_in(&self.firm)
    }

    /// A hold of everything while there is room.
    pub(super) fn hold_with_room(&self) -> Hold {
        new_hold_in(&self.yielding)
    }

    /// Ends the initial hold: from here on only the consumers' holds count.
    pub(super) fn begin(&self) {
        self.first.lock().take();
    }

    /// The offsets from which on nothing may be removed.
    pub(super) fn lowest(&self) -> LowestHolds {
        let firmly = lowest_hold_in(&self.firm);
        LowestHolds { firmly, with_room: lowest_hold_in(&self.yielding).min(firmly) }
    }
}

fn new_hold_in(holds: &Mutex<Vec<Weak<AtomicU64>>>) -> Hold {
    let hold = Hold(Arc::default());
    holds.lock().push(Arc::downgrade(&hold.0));
    hold
}

fn lowest_hold_in(holds: &Mutex<Vec<Weak<AtomicU64>>>) -> Offset {
    let mut lowest = Offset::MAX;
    holds.lock().retain(|hold| match hold.upgrade() {
        Some(offset) => {
            lowest = lowest.min(offset.load(Ordering::Acquire));
            true
        }
        None => false,
    });
    lowest
}

/// How many of the oldest `segments` may go, so that `incoming_bytes` more fit into the budget.
///
/// While there is room, segments stay for at least `stay_s`, because the window is rebuilt from them.
/// `held` says what else has to stay, see [`Holds::lowest`]. The newest segment always stays.
pub(super) fn removable(
    segments: &BTreeMap<Offset, Arc<Segment>>,
    config: &config::LogConfig,
    stay_s: u64,
    held: LowestHolds,
    now: ClockReading,
    incoming_bytes: u64,
) -> usize {
    let mut bytes: u64 = segments.values().map(|segment| segment.disk_bytes()).sum::<u64>() + incoming_bytes;
    let age_max_s = config.retention_s.max(stay_s);
    let age_max = i64::try_from(age_max_s.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
    // A segment ends, in offsets and in time, where the next one begins.
    segments
        .values()
        .zip(segments.values().skip(1))
        .take_while(|(segment, next)| {
            let over_size = bytes > config.retention_bytes;
            let over_age = config.retention_s > 0 && next.age(now) > age_max;
            bytes -= segment.disk_bytes();
            let over_age = over_age && next.first_offset <= held.with_room;
            next.first_offset <= held.firmly && (over_size || over_age)
        })
        .count()
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::super::disk::FileSystem;
    use super::*;
    use crate::config::Config;
    use crate::message::TimeMicros;

    const SECOND: TimeMicros = 1_000_000;

    fn at(wall: TimeMicros, running: i64) -> ClockReading {
        ClockReading { wall, running }
    }

    /// Three segments, of which each ended, in offsets and seconds, at the next multiple of ten.
    fn segments(dir: &TempDir) -> BTreeMap<Offset, Arc<Segment>> {
        let segment = |first_offset: Offset| {
            let mut segment = Segment::create(&FileSystem, dir.path(), first_offset).expect("made");
            segment.created_at = TimeMicros::try_from(first_offset).expect("small") * SECOND;
            segment.found_at = at(segment.created_at, segment.created_at);
            (first_offset, Arc::new(segment))
        };
        [0, 10, 20].map(segment).into()
    }

    #[test]
    fn a_segment_over_its_age_goes_but_not_before_the_window_of_ids_has_passed_or_while_it_is_held() {
        let dir = TempDir::new().expect("temporary directory");
        let segments = segments(&dir);
        let removable = |retention_s, stay_s, held, now| {
            let config = config::LogConfig { retention_s, ..Config::default().log };
            let held = LowestHolds { firmly: held, with_room: held };
            super::removable(&segments, &config, stay_s, held, at(now * SECOND, now * SECOND), 0)
        };
        assert_eq!(removable(5, 1, Offset::MAX, 15), 0);
        assert_eq!(removable(5, 1, Offset::MAX, 16), 1);
        assert_eq!(removable(5, 1, Offset::MAX, 1_000), 2, "the newest stays");
        assert_eq!(removable(5, 30, Offset::MAX, 40), 0);
        assert_eq!(removable(5, 30, Offset::MAX, 41), 1);
        assert_eq!(removable(5, 1, 19, 1_000), 1, "the second holds an offset that is needed");
        assert_eq!(removable(0, 1, Offset::MAX, 1_000), 0, "no age");
    }

    /// A minute of a wrong time from NTP, or the first right one of a board without a clock, removed every ended segment.
    #[test]
    fn a_step_of_the_wall_clock_while_the_log_is_open_removes_nothing() {
        let dir = TempDir::new().expect("temporary directory");
        let mut segments = segments(&dir);
        let config = config::LogConfig { retention_s: 60, ..Config::default().log };
        let held = LowestHolds { firmly: Offset::MAX, with_room: Offset::MAX };
        let removable = |segments: &BTreeMap<Offset, Arc<Segment>>, wall, running| {
            super::removable(segments, &config, 1, held, at(wall * SECOND, running * SECOND), 0)
        };
        assert_eq!(removable(&segments, 1_000_000, 30), 0, "they were made in this run");
        assert_eq!(removable(&segments, 1_000_000, 71), 1, "after their time they go");
        // The same after a start at 40 seconds.
        for segment in segments.values_mut() {
            let segment = Arc::get_mut(segment).expect("nobody else has it");
            segment.found_at = at(40 * SECOND, 0);
        }
        assert_eq!(removable(&segments, 1_000_000, 30), 0, "30 seconds and 30 seconds");
        assert_eq!(removable(&segments, 1_000_000, 31), 1);
    }

    #[test]
    fn what_is_held_with_room_stays_over_its_age_and_goes_when_there_is_no_room() {
        let dir = TempDir::new().expect("temporary directory");
        let segments = segments(&dir);
        let bytes: u64 = segments.values().map(|segment| segment.disk_bytes()).sum();
        let removable = |retention_bytes, firmly, with_room| {
            let config = config::LogConfig { retention_s: 5, retention_bytes, ..Config::default().log };
            let (held, now) = (LowestHolds { firmly, with_room }, at(1_000 * SECOND, 1_000 * SECOND));
            super::removable(&segments, &config, 1, held, now, 0)
        };
        assert_eq!(removable(bytes, Offset::MAX, 10), 1, "over its age, and the second is held");
        assert_eq!(removable(bytes - 1, Offset::MAX, 0), 1, "no room for one of them");
        assert_eq!(removable(0, Offset::MAX, 0), 2, "no room for any");
        assert_eq!(removable(0, 10, 0), 1, "what is held firmly stays whatever room there is");
    }

    #[test]
    fn the_lowest_hold_counts_and_one_that_was_dropped_does_not() {
        let holds = Holds::new();
        assert_eq!(holds.lowest().firmly, 0, "everything is held until retention begins");
        let (a, b, yielding) = (holds.hold(), holds.hold(), holds.hold_with_room());
        holds.begin();
        yielding.set(8);
        a.set(7);
        assert_eq!(holds.lowest().firmly, 0);
        b.set(9);
        assert_eq!(holds.lowest(), LowestHolds { firmly: 7, with_room: 7 });
        drop(a);
        assert_eq!(holds.lowest(), LowestHolds { firmly: 9, with_room: 8 });
        drop((b, yielding));
        assert_eq!(holds.lowest(), LowestHolds { firmly: Offset::MAX, with_room: Offset::MAX });
    }
}
