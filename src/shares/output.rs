//! Room for output to clients: what they have not taken yet, of one datasource and of all.
//!
//! Clients that take nothing keep what they have got for as long as their connection lives. So the more is taken, the
//! less one of them gets: a client that has something in its output may have one part in [`OUTPUT_CLIENT_PARTS`] of what is
//! free, and a datasource no more than is free of all, so that there is always some for another datasource (Choudhury and
//! Hahne, "Dynamic queue length thresholds", 1998). Who has taken everything may have all that is free for its next
//! message. If that is too little, it waits, and the clients that take nothing meanwhile have to go:
//! [`TenantShare::is_output_wanted`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

use super::TenantShare;
use crate::limits::{OUTPUT_BYTES_MAX, OUTPUT_BYTES_PER_TENANT_MAX};
use crate::scheduler::polite_lock;

/// What a client may have beside what it has not taken: one part in so many of what is free.
const OUTPUT_CLIENT_PARTS: usize = 8;
/// A datasource with less than one part in so many of its room is in nobody's way.
const OUTPUT_LARGE_PARTS: usize = 8;

/// The room of one datasource, or of all.
#[derive(Debug)]
pub(super) struct OutputPool(Mutex<OutputPoolState>);

#[derive(Debug)]
struct OutputPoolState {
    free: usize,
    /// Who waits, by how much has to be free for it.
    waiting: BTreeMap<(usize, u64), OutputWaiting>,
    /// How many of them have taken everything so far.
    prompt: usize,
    next_number: u64,
}

#[derive(Debug)]
struct OutputWaiting {
    waker: Waker,
    is_prompt: bool,
}

/// A client's room for output, as its tenant's share covers it.
#[derive(Debug)]
pub struct OutputRoom {
    share: Arc<TenantShare>,
    bytes: usize,
    waits_at: Option<OutputPlace>,
}

/// A place among those that wait.
#[derive(Debug, Clone, Copy)]
struct OutputPlace {
    of_all: bool,
    key: (usize, u64),
}

impl OutputPool {
    fn new(bytes: usize) -> Self {
        let (waiting, prompt, next_number) = (BTreeMap::new(), 0, 0);
        Self(Mutex::new(OutputPoolState { free: bytes, waiting, prompt, next_number }))
    }

    /// The room of a datasource.
    pub(super) fn of_tenant() -> Self {
        Self::new(OUTPUT_BYTES_PER_TENANT_MAX)
    }

    /// The room of all.
    pub(super) fn of_all() -> Self {
        Self::new(OUTPUT_BYTES_MAX)
    }

    /// Takes `bytes` if `needed` are free.
    fn try_take(&self, bytes: usize, needed: usize) -> bool {
        let mut pool = polite_lock(&self.0);
        let fits = pool.free >= needed.max(bytes);
        if fits {
            pool.free -= bytes;
        }
        fits
    }

    fn give_back(&self, bytes: usize) {
        let mut pool = polite_lock(&self.0);
        pool.free += bytes;
        pool.wake_next();
    }

    /// Waits until `needed` are free.
    fn wait(&self, needed: usize, is_prompt: bool, waker: Waker) -> (usize, u64) {
        let mut pool = polite_lock(&self.0);
        pool.next_number += 1;
        let key = (needed, pool.next_number);
        pool.prompt += usize::from(is_prompt);
        pool.waiting.insert(key, OutputWaiting { waker, is_prompt });
        // It may have become free since it was looked for.
        pool.wake_next();
        key
    }

    /// Gives up a place. Who was told and goes leaves the room to the next one.
    fn leave(&self, key: (usize, u64)) {
        let mut pool = polite_lock(&self.0);
        match pool.waiting.remove(&key) {
            Some(waiting) => pool.prompt -= usize::from(waiting.is_prompt),
            None => pool.wake_next(),
        }
    }

    /// Whether a client that has taken everything waits.
    fn is_wanted(&self) -> bool {
        polite_lock(&self.0).prompt > 0
    }

    fn taken(&self, all: usize) -> usize {
        all - polite_lock(&self.0).free
    }
}

impl OutputPoolState {
    /// Tells the one that needs least, if there is so much: it tells the next one when it has taken its part.
    fn wake_next(&mut self) {
        let free = self.free;
        if let Some(first) = self.waiting.first_entry()
            && first.key().0 <= free
        {
            let OutputWaiting { waker, is_prompt } = first.remove();
            self.prompt -= usize::from(is_prompt);
            waker.wake();
        }
    }
}

impl TenantShare {
    /// Whether a client of the datasource that has taken everything waits for room, or one of another and this datasource
    /// has much: those that take nothing are in the way then.
    pub fn is_output_wanted(&self) -> bool {
        let taken = self.output.taken(OUTPUT_BYTES_PER_TENANT_MAX);
        self.output.is_wanted()
            || taken > OUTPUT_BYTES_PER_TENANT_MAX / OUTPUT_LARGE_PARTS && self.all.output.is_wanted()
    }
}

impl OutputRoom {
    /// No room yet.
    pub fn new(share: &Arc<TenantShare>) -> Self {
        Self { share: share.clone(), bytes: 0, waits_at: None }
    }

    /// How much there is.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it waits for more.
    pub fn is_waiting(&self) -> bool {
        self.waits_at.is_some()
    }

    /// Ready when there are `more` bytes; `is_prompt`: the client has taken everything so far.
    pub fn poll_more(&mut self, more: usize, is_prompt: bool, cx: &mut Context<'_>) -> Poll<()> {
        self.leave();
        // More than half of the room is never for one client: what is larger goes with that.
        let more = more.min(OUTPUT_BYTES_PER_TENANT_MAX / 2);
        let parts = if is_prompt { 1 } else { OUTPUT_CLIENT_PARTS };
        let needed = parts * if is_prompt { more } else { self.bytes + more };
        // Beyond all of it, the whole has to be free.
        let needed = needed.min(OUTPUT_BYTES_PER_TENANT_MAX);
        let TenantShare { output, all, .. } = &*self.share;
        if !output.try_take(more, needed) {
            let key = output.wait(needed, is_prompt, cx.waker().clone());
            self.waits_at = Some(OutputPlace { of_all: false, key });
            return Poll::Pending;
        }
        let of_tenant = output.taken(OUTPUT_BYTES_PER_TENANT_MAX);
        if !all.output.try_take(more, of_tenant) {
            output.give_back(more);
            let key = all.output.wait(of_tenant.max(more), is_prompt, cx.waker().clone());
            self.waits_at = Some(OutputPlace { of_all: true, key });
            return Poll::Pending;
        }
        self.bytes += more;
        // Others may fit into what is left.
        output.0.lock().wake_next();
        all.output.0.lock().wake_next();
        Poll::Ready(())
    }

    /// Does not wait any more.
    pub fn leave(&mut self) {
        match self.waits_at.take() {
            None => {}
            Some(OutputPlace { of_all: false, key }) => self.share.output.leave(key),
            Some(OutputPlace { of_all: true, key }) => self.share.all.output.leave(key),
        }
    }

    /// Gives all of it back.
    pub fn clear(&mut self) {
        if self.bytes > 0 {
            let bytes = std::mem::take(&mut self.bytes);
            self.share.output.give_back(bytes);
            self.share.all.output.give_back(bytes);
        }
    }
}

impl Drop for OutputRoom {
    fn drop(&mut self) {
        self.leave();
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::super::TenantShares;
    use super::*;
    use crate::message::DatasourceId;

    const MESSAGE: usize = 20_000;

    fn share(shares: &TenantShares, name: &str) -> Arc<TenantShare> {
        shares.share(&DatasourceId::new(name).expect("a slug"))
    }

    /// A client that takes nothing: it gets as much as it can.
    fn deaf(share: &Arc<TenantShare>) -> OutputRoom {
        let mut room = OutputRoom::new(share);
        let mut cx = Context::from_waker(Waker::noop());
        let _ = room.poll_more(MESSAGE, true, &mut cx);
        while room.bytes() < 256 << 10 && room.poll_more(MESSAGE, false, &mut cx).is_ready() {}
        room
    }

    #[test]
    fn clients_that_take_nothing_leave_some_room_to_who_takes_everything() {
        let shares = TenantShares::default();
        let mut cx = Context::from_waker(Waker::noop());
        let mut held: Vec<Vec<OutputRoom>> = Vec::new();
        for n in 0..12 {
            let of = share(&shares, &format!("deaf-{n}"));
            held.push((0..80).map(|_| deaf(&of)).collect());
            let mut other = OutputRoom::new(&of);
            assert!(n > 1 || other.poll_more(MESSAGE, true, &mut cx).is_ready(), "of datasource {n}");
        }
        let all: usize = held.iter().flatten().map(OutputRoom::bytes).sum();
        assert!(all < OUTPUT_BYTES_MAX, "{all}");
        let other = share(&shares, "other");
        let mut room = OutputRoom::new(&other);
        assert!(room.poll_more(MESSAGE, true, &mut cx).is_ready(), "another datasource");
        drop((held, room));
        let free = |pool: &OutputPool| pool.0.lock().free;
        assert_eq!(
            (free(&other.output), free(&other.all.output)),
            (OUTPUT_BYTES_PER_TENANT_MAX, OUTPUT_BYTES_MAX)
        );
    }

    #[test]
    fn who_waits_for_room_is_told_when_there_is_enough_and_seen_meanwhile() {
        let share = TenantShare::alone();
        let mut cx = Context::from_waker(Waker::noop());
        let mut holds = OutputRoom::new(&share);
        assert!(holds.poll_more(OUTPUT_BYTES_PER_TENANT_MAX / 2, true, &mut cx).is_ready());
        let mut also = OutputRoom::new(&share);
        assert!(also.poll_more(OUTPUT_BYTES_PER_TENANT_MAX / 2, true, &mut cx).is_ready());
        let (mut small, mut large, mut greedy) =
            (OutputRoom::new(&share), OutputRoom::new(&share), OutputRoom::new(&share));
        assert!(greedy.poll_more(MESSAGE, false, &mut cx).is_pending() && !share.is_output_wanted());
        assert!(large.poll_more(1 << 20, true, &mut cx).is_pending() && share.is_output_wanted());
        assert!(small.poll_more(MESSAGE, true, &mut cx).is_pending());
        let is_told = |room: &OutputRoom| {
            let key = room.waits_at.expect("it waits").key;
            !share.output.0.lock().waiting.contains_key(&key)
        };
        drop(also);
        assert!(is_told(&small) && !is_told(&large), "who needs least comes first");
        // It goes without taking any: the others are told.
        drop(small);
        assert!(is_told(&greedy) ^ is_told(&large));
        assert!(greedy.poll_more(MESSAGE, false, &mut cx).is_ready());
        assert!(is_told(&large) && large.poll_more(1 << 20, true, &mut cx).is_ready());
        assert!(!share.is_output_wanted());
    }
}
