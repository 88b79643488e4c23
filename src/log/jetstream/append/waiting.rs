//! Appends whose messages are all acknowledged, and that wait for this node's follower to have them too. Where it stands
//! still, an append is answered without it once everything is known that could have ended its keys before.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use headgate_bridge_nats::kv::KV_WATCH_SILENCE_MAX;

use crate::message::Offset;

/// How long the follower may stand still before appends may be answered without it.
const FOLLOWER_STALL_MAX: Duration = Duration::from_millis(500);
/// How long an append waits for the follower after its own acknowledgement. A key's end that precedes its records in the
/// stream was in the registry before that. A gateway that may publish has heard the registry within
/// [`KV_WATCH_SILENCE_MAX`]: here, after the acknowledgement, with time to have applied what it has heard.
const UNFOLLOWED_ANSWER_MIN: Duration = KV_WATCH_SILENCE_MAX.saturating_add(Duration::from_millis(500));

/// The appends that wait.
pub(super) struct WaitingAppends<A> {
    /// By their last offset and their number, each with the time of its acknowledgement.
    appends: BTreeMap<(Offset, u64), (Instant, A)>,
    followed: Offset,
    /// When the follower last moved, an append began to wait for it, or it was found to stand still.
    got_on_at: Instant,
}

/// What becomes of appends for which the follower is not waited.
pub(super) struct UnfollowedAppends<A> {
    /// Every end of a key that precedes their records is known.
    pub(super) answered: Vec<A>,
    /// They have waited long enough, and nobody knows.
    pub(super) given_up: Vec<A>,
}

impl<A> WaitingAppends<A> {
    pub(super) fn new() -> Self {
        Self { appends: BTreeMap::new(), followed: 0, got_on_at: Instant::now() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.appends.is_empty()
    }

    /// Whether none with a lower number waits.
    pub(super) fn has_none_below(&self, number: u64) -> bool {
        self.appends.keys().all(|(_, append)| *append >= number)
    }

    /// Adds an append that was acknowledged just now, by its number and the last offset of its records.
    pub(super) fn push(&mut self, number: u64, last: Offset, append: A, now: Instant) {
        if self.appends.is_empty() {
            self.got_on_at = now;
        }
        self.appends.insert((last, number), (now, append));
    }

    /// Notes the first offset that the follower does not have.
    pub(super) fn note_followed(&mut self, next_offset: Offset, now: Instant) {
        if next_offset != self.followed {
            (self.followed, self.got_on_at) = (next_offset, now);
        }
    }

    /// Removes an append that the follower has.
    pub(super) fn pop_followed(&mut self) -> Option<A> {
        let first = self.appends.first_entry()?;
        (first.key().0 < self.followed).then(|| first.remove().1)
    }

    /// When to look whether the follower stands still.
    pub(super) fn next_check(&self) -> Option<Instant> {
        (!self.appends.is_empty()).then(|| self.got_on_at + FOLLOWER_STALL_MAX)
    }

    /// If the follower stands still, removes the appends that have waited long enough. While there is an obstacle to
    /// publishing, that is when it `is_over` for the append.
    pub(super) fn take_unfollowed(
        &mut self,
        now: Instant,
        has_obstacle: bool,
        is_over: impl Fn(&A) -> bool,
    ) -> UnfollowedAppends<A> {
        let mut taken = UnfollowedAppends { answered: Vec::new(), given_up: Vec::new() };
        if self.next_check().is_none_or(|due| due > now) {
            return taken;
        }
        self.got_on_at = now;
        for (place, (acked_at, append)) in std::mem::take(&mut self.appends) {
            if has_obstacle && is_over(&append) {
                taken.given_up.push(append);
            } else if !has_obstacle && now.duration_since(acked_at) >= UNFOLLOWED_ANSWER_MIN {
                taken.answered.push(append);
            } else {
                self.appends.insert(place, (acked_at, append));
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        /// So many milliseconds pass.
        Pass(u64),
        /// An append is acknowledged.
        Acknowledge,
        /// The registry is heard.
        Hear,
        /// The follower has some more.
        Follow(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (1..900_u64).prop_map(Step::Pass),
            3 => Just(Step::Acknowledge),
            2 => Just(Step::Hear),
            1 => (1..4_u64).prop_map(Step::Follow),
        ];
        prop::collection::vec(step, 1..80)
    }

    proptest! {
        /// What the follower does not have is answered only if the registry was heard after the acknowledgement: an end
        /// that precedes the records in the stream is known then.
        #[test]
        fn nothing_is_answered_before_what_could_have_ended_its_key_is_known(steps in steps()) {
            let mut now = Instant::now();
            let (mut heard_at, mut followed, mut number) = (now, 0, 0);
            let mut waiting = WaitingAppends::new();
            let mut acked: HashMap<u64, Instant> = HashMap::new();
            for step in steps {
                match step {
                    Step::Pass(millis) => now += Duration::from_millis(millis),
                    Step::Hear => heard_at = now,
                    Step::Acknowledge => {
                        number += 1;
                        acked.insert(number, now);
                        waiting.push(number, number, number, now);
                    }
                    Step::Follow(more) => {
                        followed = (followed + more).min(number);
                        waiting.note_followed(followed + 1, now);
                        while let Some(append) = waiting.pop_followed() {
                            prop_assert!(append <= followed && acked.remove(&append).is_some());
                        }
                    }
                }
                let has_obstacle = now.duration_since(heard_at) > KV_WATCH_SILENCE_MAX;
                let taken = waiting.take_unfollowed(now, has_obstacle, |append| append % 2 == 0);
                for append in taken.answered {
                    let acked_at = acked.remove(&append).expect("it is answered once");
                    prop_assert!(!has_obstacle && heard_at > acked_at, "{append}");
                }
                for append in taken.given_up {
                    prop_assert!(has_obstacle && append % 2 == 0 && acked.remove(&append).is_some());
                }
            }
            now += UNFOLLOWED_ANSWER_MIN + FOLLOWER_STALL_MAX;
            let left = waiting.take_unfollowed(now, false, |_| true);
            prop_assert!(left.given_up.is_empty() && waiting.is_empty());
            prop_assert_eq!(left.answered.len(), acked.len());
        }
    }

    #[test]
    fn an_append_is_answered_a_while_after_its_own_acknowledgement_and_not_after_the_stall() {
        let begun = Instant::now();
        let mut waiting = WaitingAppends::new();
        let answered_at =
            |waiting: &mut WaitingAppends<u64>, now| waiting.take_unfollowed(now, false, |_| true).answered;
        waiting.push(1, 11, 1, begun);
        let later = begun + UNFOLLOWED_ANSWER_MIN - Duration::from_millis(1);
        waiting.push(2, 12, 2, later);
        assert!(answered_at(&mut waiting, later).is_empty());
        let later = later + FOLLOWER_STALL_MAX;
        assert_eq!(answered_at(&mut waiting, later), [1]);
        assert!(waiting.has_none_below(2) && !waiting.has_none_below(3));
        waiting.note_followed(13, later);
        assert_eq!(waiting.pop_followed(), Some(2));
        assert!(waiting.is_empty() && waiting.next_check().is_none());
    }
}
