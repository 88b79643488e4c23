//! What a poll takes of a processor.
//!
//! The clock on the wall costs 20 ns and the thread's own processor time 25 times that, for each poll twice. So a short
//! poll is measured by the wall, and only a long one, which may have been without a processor in the middle of it, also by
//! its thread's time: what the thread has had since that was last read, less what its other polls have taken since.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::scheduler::{thread_time, waited};

/// A poll that was shorter had its processor all the time, or nearly.
const SURE_POLL_MAX: Duration = Duration::from_micros(100);
/// The thread's time is read again when it was read so long ago.
const THREAD_TIME_AGE_MAX: Duration = Duration::from_micros(200);

/// A reading of the thread's processor time.
#[derive(Clone, Copy)]
struct ThreadTimeReading {
    at: Instant,
    processor: Duration,
    /// What polls have taken since then.
    polls: Duration,
}

thread_local! {
    static READING: Cell<Option<ThreadTimeReading>> = const { Cell::new(None) };
}

fn read_thread_time(at: Instant) -> ThreadTimeReading {
    let reading = ThreadTimeReading { at, processor: thread_time(), polls: Duration::ZERO };
    READING.set(Some(reading));
    reading
}

/// Measures one poll, on the thread on which it begins and ends.
pub(super) struct PollClock {
    began: Instant,
    waited: Duration,
}

impl PollClock {
    pub(super) fn start() -> Self {
        let began = Instant::now();
        let is_old =
            |reading: ThreadTimeReading| began.saturating_duration_since(reading.at) > THREAD_TIME_AGE_MAX;
        if READING.get().is_none_or(is_old) {
            read_thread_time(began);
        }
        Self { began, waited: waited() }
    }

    /// What the poll has taken, without what it has waited for the disk; and the time now.
    pub(super) fn stop(self) -> (Duration, Instant) {
        let now = Instant::now();
        let wall =
            now.saturating_duration_since(self.began).saturating_sub(waited().saturating_sub(self.waited));
        let Some(last) = READING.get() else { return (wall, now) };
        if wall <= SURE_POLL_MAX {
            READING.set(Some(ThreadTimeReading { polls: last.polls + wall, ..last }));
            return (wall, now);
        }
        let had = read_thread_time(now).processor.saturating_sub(last.processor);
        (wall.min(had.saturating_sub(last.polls)), now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spin(time: Duration) {
        let began = thread_time();
        while thread_time() - began < time {}
    }

    #[test]
    fn a_poll_takes_what_its_thread_worked_and_not_what_it_was_without_a_processor() {
        for _ in 0..5 {
            let clock = PollClock::start();
            std::thread::sleep(Duration::from_millis(20));
            let (used, _) = clock.stop();
            assert!(used < Duration::from_millis(5), "{used:?} of nothing");
            spin(Duration::from_micros(500));
            let clock = PollClock::start();
            spin(Duration::from_millis(3));
            let (used, _) = clock.stop();
            assert!(used >= Duration::from_millis(3), "{used:?}");
            assert!(used < Duration::from_millis(8), "{used:?} of three");
        }
    }
}
