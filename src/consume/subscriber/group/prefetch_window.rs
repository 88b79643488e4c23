//! A prefetch window: how many records a member of a group may have that it has not acknowledged. It follows
//! the member's pace, so that a fast one never waits for the next record, and one that is slow or hangs keeps
//! few from the others.
//!
//! The window is twice what the client acknowledged in the time that it takes for a record, and in
//! [`PrefetchWindow::ahead`] at least. Twice, so that it grows: a window that limits its client grows by a quarter with
//! each round, no faster, so that of members that begin together none is far ahead of the others. The time for a record is that of one that found the client without any; others wait behind
//! their predecessors.

use std::time::{Duration, Instant};

use crate::limits::{MEMBER_WINDOW_RECORDS_MAX, MEMBER_WINDOW_RECORDS_MIN, MEMBER_WINDOW_RECORDS_START};

/// After so long without any record a window begins anew: nothing is known any more about the client's pace.
const WINDOW_IDLE_MAX: Duration = Duration::from_millis(100);
/// How long a client may take for its first acknowledgement before its window shrinks.
const FIRST_ACK_WAIT_MAX: Duration = Duration::from_secs(1);

/// The window of one member, and how many records the member has.
#[derive(Debug)]
pub(super) struct PrefetchWindow {
    /// How long the records of a full window last at least.
    ahead: Duration,
    records_max: usize,
    outstanding: usize,
    /// How long the client takes for a record when it has no other.
    record_time: Option<Duration>,
    /// When the client was given the records that tell this, as it had none before.
    alone_at: Option<Instant>,
    /// Since when acknowledgements are counted, and how many there were; without records: since when.
    counted_since: Instant,
    acknowledged: usize,
}

impl PrefetchWindow {
    /// The window of a member that has no records.
    pub(super) fn new(ahead: Duration, now: Instant) -> Self {
        let (record_time, alone_at) = (None, None);
        let records_max = MEMBER_WINDOW_RECORDS_START;
        Self {
            ahead,
            records_max,
            outstanding: 0,
            record_time,
            alone_at,
            counted_since: now,
            acknowledged: 0,
        }
    }

    /// How many records the member has.
    pub(super) fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// How many more it may have.
    pub(super) fn room(&mut self, now: Instant) -> usize {
        let elapsed = now.saturating_duration_since(self.counted_since);
        if self.outstanding == 0 {
            if elapsed > WINDOW_IDLE_MAX {
                self.records_max = self.records_max.min(MEMBER_WINDOW_RECORDS_START);
            }
        } else if elapsed >= self.round_time() {
            self.adapt(now);
        }
        self.records_max.saturating_sub(self.outstanding)
    }

    /// The member has taken records.
    pub(super) fn take(&mut self, records: usize, now: Instant) {
        if self.outstanding == 0 && records > 0 {
            (self.counted_since, self.acknowledged) = (now, 0);
            self.alone_at = Some(now);
        }
        self.outstanding += records;
    }

    /// The member has acknowledged a record that it took at `taken_at`.
    pub(super) fn acknowledge(&mut self, taken_at: Instant, now: Instant) {
        self.outstanding = self.outstanding.saturating_sub(1);
        self.acknowledged += 1;
        let took = now.saturating_duration_since(taken_at);
        let newest = self.alone_at.take_if(|alone_at| *alone_at == taken_at).is_some();
        self.record_time = Some(self.record_time.filter(|known| !newest && *known < took).unwrap_or(took));
        if self.outstanding == 0 {
            self.adapt(now);
        }
    }

    /// A record that the member had goes to another one.
    pub(super) fn give_back(&mut self) {
        self.outstanding = self.outstanding.saturating_sub(1);
    }

    /// After how long the acknowledgements tell the client's pace.
    fn round_time(&self) -> Duration {
        self.record_time.map_or(FIRST_ACK_WAIT_MAX, |time| (time + time / 4).max(self.ahead))
    }

    /// Makes the window fit what was acknowledged since the last time. It grows by a quarter at most, and shrinks half
    /// the way.
    fn adapt(&mut self, now: Instant) {
        let span = self.record_time.unwrap_or_default().max(self.ahead);
        let elapsed = now.saturating_duration_since(self.counted_since).as_nanos().max(1);
        let fitting = 2 * self.acknowledged as u128 * span.as_nanos() / elapsed;
        let fitting = usize::try_from(fitting).unwrap_or(usize::MAX);
        let changed = match fitting >= self.records_max {
            true => fitting.min(self.records_max + self.records_max.div_ceil(4)),
            false => usize::midpoint(self.records_max, fitting),
        };
        self.records_max = changed.clamp(MEMBER_WINDOW_RECORDS_MIN, MEMBER_WINDOW_RECORDS_MAX);
        (self.counted_since, self.acknowledged) = (now, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const AHEAD: Duration = Duration::from_millis(1);
    const MILLISECOND: Duration = Duration::from_millis(1);

    /// A client that deals with one record after the other, in time that is counted, not waited for.
    struct PacedClient {
        window: PrefetchWindow,
        now: Instant,
        /// From the gateway to the client and back.
        way: Duration,
        per_record: Duration,
        /// When each of its records was taken, and will be acknowledged.
        records: VecDeque<(Instant, Instant)>,
        free_at: Instant,
    }

    impl PacedClient {
        fn new(way: Duration, per_record: Duration) -> Self {
            let now = Instant::now();
            let window = PrefetchWindow::new(AHEAD, now);
            Self { window, now, way, per_record, records: VecDeque::new(), free_at: now }
        }

        /// Is given all that it takes for so long. Returns how many it has acknowledged.
        fn run(&mut self, time: Duration) -> usize {
            let (until, mut acknowledged) = (self.now + time, 0);
            while self.now < until {
                while let Some((taken_at, _)) = self.records.pop_front_if(|(_, done)| *done <= self.now) {
                    self.window.acknowledge(taken_at, self.now);
                    acknowledged += 1;
                }
                let room = self.window.room(self.now);
                self.window.take(room, self.now);
                for _ in 0..room {
                    self.free_at = self.free_at.max(self.now + self.way / 2) + self.per_record;
                    self.records.push_back((self.now, self.free_at + self.way / 2));
                }
                self.now += Duration::from_micros(20);
            }
            acknowledged
        }
    }

    #[test]
    fn a_member_that_never_acknowledges_has_a_few_records_and_fewer_as_time_goes_by() {
        let mut hung = PacedClient::new(MILLISECOND, Duration::from_secs(3_600));
        hung.run(Duration::from_secs(20));
        assert_eq!(hung.window.outstanding(), MEMBER_WINDOW_RECORDS_START);
        assert_eq!(hung.window.records_max, MEMBER_WINDOW_RECORDS_MIN);
    }

    #[test]
    fn a_window_follows_its_members_pace_up_and_down() {
        let mut client = PacedClient::new(MILLISECOND / 10, MILLISECOND / 100);
        let fast = client.run(Duration::from_secs(1));
        assert!(fast > 90_000, "{fast} of 100,000: it waits for no record");
        let held = client.window.outstanding();
        assert!((100..=800).contains(&held), "{held} records of a client that does 100 a millisecond");
        client.per_record = 10 * MILLISECOND;
        let slow = client.run(Duration::from_secs(10));
        assert!(slow > 800, "{slow} of 1,000");
        let held = client.window.outstanding();
        assert!(held <= 2 * MEMBER_WINDOW_RECORDS_START, "{held} records of a client that does 100 a second");
    }

    #[test]
    fn a_slow_member_has_few_records_and_is_never_without() {
        let mut slow = PacedClient::new(MILLISECOND / 10, 10 * MILLISECOND);
        let done = slow.run(Duration::from_secs(4));
        assert!(done > 380, "{done} of 400");
        assert!(slow.window.outstanding() <= 4, "{}", slow.window.outstanding());
    }

    #[test]
    fn the_way_to_a_far_client_is_filled() {
        let mut far = PacedClient::new(200 * MILLISECOND, MILLISECOND);
        far.run(Duration::from_secs(10));
        let done = far.run(Duration::from_secs(10));
        assert!(done > 9_000, "{done} of 10,000");
    }

    #[test]
    fn a_member_that_had_nothing_for_long_begins_with_a_few() {
        let mut client = PacedClient::new(MILLISECOND / 10, MILLISECOND / 100);
        client.run(Duration::from_secs(1));
        client.now += Duration::from_secs(1);
        while let Some((taken_at, _)) = client.records.pop_front() {
            client.window.acknowledge(taken_at, client.now);
        }
        client.now += 2 * WINDOW_IDLE_MAX;
        assert!(client.window.room(client.now) <= MEMBER_WINDOW_RECORDS_START);
    }
}
