//! The room for a subscriber's output: what its client has not taken is covered by its tenant's share. So clients
//! that take nothing cost a bounded memory, however many they are; those that take little at a time need none.

use std::sync::Arc;
use std::task::{Context, Poll};

use crate::limits::OUTPUT_FREE_BYTES;
use crate::shares::{OutputRoom, TenantShare};

/// Room is taken in steps of so many bytes.
const COVER_STEP_BYTES: usize = 16 << 10;

/// What covers the output to one subscriber.
pub struct OutputCover {
    room: OutputRoom,
    /// How many bytes of the output were sent already.
    sent: usize,
}

impl OutputCover {
    /// No output yet, of a client of this tenant.
    pub fn new(share: &Arc<TenantShare>) -> Self {
        Self { room: OutputRoom::new(share), sent: 0 }
    }

    /// Begins with an output of `bytes`, `unsent` of which are not sent.
    pub fn begin(&mut self, bytes: usize, unsent: usize) {
        self.sent = bytes - unsent;
        if unsent == 0 {
            self.room.clear();
        }
    }

    /// Whether it has a part of the share, or waits for one.
    pub fn is_needed(&self) -> bool {
        self.room.bytes() > 0 || self.room.is_waiting()
    }

    /// Gives back what is not needed while nothing is appended.
    pub fn suspend(&mut self, unsent: usize) {
        self.room.leave();
        if unsent == 0 {
            self.room.clear();
        }
    }

    /// Ready when `more` bytes may be appended to an output that has `bytes`.
    #[inline]
    pub fn poll(&mut self, bytes: usize, more: usize, cx: &mut Context<'_>) -> Poll<()> {
        let unsent = bytes - self.sent;
        let wanted = (unsent + more).saturating_sub(OUTPUT_FREE_BYTES);
        if wanted <= self.room.bytes() {
            return Poll::Ready(());
        }
        let missing = wanted - self.room.bytes();
        // More is taken at once where it is for the asking: for the messages that come next.
        let is_prompt = unsent == 0;
        let step = if is_prompt { missing } else { missing.next_multiple_of(COVER_STEP_BYTES) };
        self.room.poll_more(step, is_prompt, cx)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;
    use crate::limits::{MQTT_UNSENT_BYTES_MAX, OUTPUT_BYTES_PER_TENANT_MAX};

    /// Fills its output with messages of 10 KB until there is no room for another one.
    fn fill(cover: &mut OutputCover) -> usize {
        let mut cx = Context::from_waker(Waker::noop());
        let mut bytes = 0;
        while bytes < MQTT_UNSENT_BYTES_MAX && cover.poll(bytes, 10_000, &mut cx).is_ready() {
            bytes += 10_000;
        }
        bytes
    }

    #[test]
    fn who_takes_nothing_leaves_room_to_the_others_and_all_of_it_when_it_goes() {
        let share = TenantShare::alone();
        let mut cx = Context::from_waker(Waker::noop());
        let mut greedy: Vec<OutputCover> = (0..60).map(|_| OutputCover::new(&share)).collect();
        let filled: usize = greedy.iter_mut().map(fill).sum();
        let bytes_max = OUTPUT_BYTES_PER_TENANT_MAX + greedy.len() * OUTPUT_FREE_BYTES;
        assert!((bytes_max / 3..bytes_max).contains(&filled), "{filled}");
        let mut other = OutputCover::new(&share);
        assert!(other.poll(0, OUTPUT_FREE_BYTES + 10_000, &mut cx).is_ready(), "who has taken everything");
        let more = OUTPUT_BYTES_PER_TENANT_MAX / 16;
        assert!(other.poll(OUTPUT_FREE_BYTES + 10_000, more, &mut cx).is_pending(), "who has not");
        drop(greedy);
        assert!(other.poll(OUTPUT_FREE_BYTES + 10_000, more, &mut cx).is_ready());
        other.begin(100, 0);
        assert!(OutputCover::new(&share).poll(0, OUTPUT_BYTES_PER_TENANT_MAX / 2, &mut cx).is_ready());
    }

    #[test]
    fn a_suspended_output_gives_back_its_place_and_what_nothing_is_unsent_of() {
        const HALF: usize = OUTPUT_BYTES_PER_TENANT_MAX / 2;
        let share = TenantShare::alone();
        let mut cx = Context::from_waker(Waker::noop());
        let mut poll = |one: &mut OutputCover| one.poll(0, HALF + OUTPUT_FREE_BYTES, &mut cx).is_ready();
        let mut holding = [OutputCover::new(&share), OutputCover::new(&share)];
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
