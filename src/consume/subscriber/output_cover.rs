//! The room for a subscriber's output: what its client has not taken is covered by its tenant's share. So clients
//! that take nothing cost a bounded memory, however many they are; those that take little at a time need none.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use crate::limits::{MQTT_UNSENT_BYTES_MAX, OUTPUT_FREE_BYTES};
use crate::shares::{OutputRoom, TenantShare};

type OutputRoomWait = Pin<Box<dyn Future<Output = OutputRoom> + Send>>;

/// What covers the output to one subscriber.
pub struct OutputCover {
    share: Arc<TenantShare>,
    room: Option<OutputRoom>,
    /// The wait for more, if there was none at once.
    waiting: Option<OutputRoomWait>,
    /// How many bytes of the output were sent already.
    sent: usize,
}

impl OutputCover {
    /// No output yet, of a client of this tenant.
    pub fn new(share: &Arc<TenantShare>) -> Self {
        Self { share: share.clone(), room: None, waiting: None, sent: 0 }
    }

    /// Begins with an output of `bytes`, `unsent` of which are not sent.
    pub fn begin(&mut self, bytes: usize, unsent: usize) {
        self.sent = bytes - unsent;
        if unsent == 0 {
            self.room = None;
        }
    }

    /// Whether it has a part of the share, or waits for one.
    pub fn is_needed(&self) -> bool {
        self.room.is_some() || self.waiting.is_some()
    }

    /// Gives back what is not needed while nothing is appended.
    pub fn suspend(&mut self, unsent: usize) {
        self.waiting = None;
        if unsent == 0 {
            self.room = None;
        }
    }

    /// Ready when `more` bytes may be appended to an output that has `bytes`.
    #[inline]
    pub fn poll(&mut self, bytes: usize, more: usize, cx: &mut Context<'_>) -> Poll<()> {
        let wanted = (bytes - self.sent + more).saturating_sub(OUTPUT_FREE_BYTES);
        if wanted == 0 { Poll::Ready(()) } else { self.poll_covered(wanted, cx) }
    }

    fn poll_covered(&mut self, wanted: usize, cx: &mut Context<'_>) -> Poll<()> {
        let covered = self.room.as_ref().map_or(0, OutputRoom::bytes);
        if wanted <= covered {
            return Poll::Ready(());
        }
        let missing = (wanted - covered).next_multiple_of(MQTT_UNSENT_BYTES_MAX);
        let more = match &mut self.waiting {
            None => self.share.try_output_room(missing),
            Some(_) => None,
        };
        let more = match more {
            Some(more) => more,
            None => {
                let share = &self.share;
                let waiting =
                    self.waiting.get_or_insert_with(|| Box::pin(share.clone().output_room(missing)));
                let more = ready!(waiting.as_mut().poll(cx));
                self.waiting = None;
                more
            }
        };
        match &mut self.room {
            Some(room) => room.merge(more),
            none => *none = Some(more),
        }
        // What was waited for may be less than what is missing now: the next call waits for the rest.
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;
    use crate::limits::OUTPUT_BYTES_PER_TENANT_MAX;

    #[test]
    fn who_takes_nothing_leaves_a_little_room_to_the_others_and_all_of_it_when_it_goes() {
        let share = TenantShare::alone();
        let mut cx = Context::from_waker(Waker::noop());
        let mut greedy: Vec<OutputCover> = (0..1_000).map(|_| OutputCover::new(&share)).collect();
        let covered = greedy
            .iter_mut()
            .map(|one| one.poll(0, MQTT_UNSENT_BYTES_MAX, &mut cx))
            .filter(Poll::is_ready)
            .count();
        assert_eq!(covered, OUTPUT_BYTES_PER_TENANT_MAX / MQTT_UNSENT_BYTES_MAX);
        let mut other = OutputCover::new(&share);
        assert!(other.poll(0, OUTPUT_FREE_BYTES, &mut cx).is_ready());
        assert!(other.poll(OUTPUT_FREE_BYTES, 1, &mut cx).is_pending());
        drop(greedy);
        assert!(other.poll(OUTPUT_FREE_BYTES, 1, &mut cx).is_ready());
        other.begin(100, 0);
        assert!(OutputCover::new(&share).poll(0, OUTPUT_BYTES_PER_TENANT_MAX / 2, &mut cx).is_ready());
    }

    #[test]
    fn a_suspended_output_gives_back_its_place_and_what_nothing_is_unsent_of() {
        let share = TenantShare::alone();
        let mut cx = Context::from_waker(Waker::noop());
        let covered = OUTPUT_BYTES_PER_TENANT_MAX / MQTT_UNSENT_BYTES_MAX;
        let mut holding: Vec<OutputCover> = (0..covered).map(|_| OutputCover::new(&share)).collect();
        let mut poll = |one: &mut OutputCover| one.poll(0, MQTT_UNSENT_BYTES_MAX, &mut cx).is_ready();
        assert!(holding.iter_mut().all(&mut poll));
        let (mut first, mut second) = (OutputCover::new(&share), OutputCover::new(&share));
        assert!(!poll(&mut first) && !poll(&mut second));
        first.suspend(0);
        holding[0].suspend(1);
        assert!(!poll(&mut second), "what is unsent stays covered");
        holding[0].suspend(0);
        assert!(poll(&mut second), "the first does not wait any more");
        assert!(!poll(&mut first));
    }
}
