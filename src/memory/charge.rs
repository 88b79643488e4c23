//! An account of the budget, and a charge to it: bytes that are held until the charge is dropped.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{BudgetState, MemoryExceeded, MemoryUse, OwnerUse, WaitKind, WaitingQueue};
use crate::scheduler::polite_lock;

/// What is to be sent may take one part in so many of a share.
pub(super) const SEND_PARTS: usize = 2;
/// How often those who wait look again unasked: other limits may be set, and an owner that has come to hold little may use
/// the reserve.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// What is charged together: a key and its datasource, or an address and all strangers.
pub struct MemoryAccount {
    budget: Arc<BudgetState>,
    /// The key, or the address.
    own: Arc<OwnerUse>,
    /// The datasource, or all strangers.
    shared: Option<Arc<OwnerUse>>,
}

/// Bytes that are charged to an account. Dropping it frees them.
pub struct MemoryCharge {
    account: Arc<MemoryAccount>,
    bytes: usize,
}

impl MemoryAccount {
    pub(super) fn new(budget: Arc<BudgetState>, own: Arc<OwnerUse>, shared: Option<Arc<OwnerUse>>) -> Self {
        Self { budget, own, shared }
    }

    fn owners(&self) -> impl Iterator<Item = &Arc<OwnerUse>> {
        [&self.own].into_iter().chain(&self.shared)
    }

    /// Charges `bytes`.
    ///
    /// # Errors
    /// [`MemoryExceeded`]: they do not fit; nothing is charged then.
    pub fn charge(self: &Arc<Self>, bytes: usize) -> Result<MemoryCharge, MemoryExceeded> {
        let mut charge = MemoryCharge { account: self.clone(), bytes: 0 };
        charge.grow(bytes)?;
        Ok(charge)
    }

    /// Charges `bytes` of something that is to be sent: that takes no more than half of a share, so that a client that
    /// does not read what it is sent can still send.
    ///
    /// # Errors
    /// As [`MemoryAccount::charge`].
    pub fn charge_to_send(self: &Arc<Self>, bytes: usize) -> Result<MemoryCharge, MemoryExceeded> {
        let mut charge = MemoryCharge { account: self.clone(), bytes: 0 };
        charge.grow_to_send(bytes)?;
        Ok(charge)
    }

    /// Charges bytes that are in memory already, over the share if need be: for what is bounded by itself and leads
    /// to [`MemoryAccount::is_over`].
    pub fn charge_held(self: &Arc<Self>, bytes: usize) -> MemoryCharge {
        let mut charge = MemoryCharge { account: self.clone(), bytes: 0 };
        charge.set_held(bytes);
        charge
    }

    /// Whether nothing more is to be taken in for this account for now.
    #[inline]
    pub fn is_over(&self) -> bool {
        self.used_up(1).is_some()
    }

    /// Whether nothing more is to be prepared to be sent for this account for now: half of the share is held.
    #[inline]
    pub fn is_over_to_send(&self) -> bool {
        self.used_up(SEND_PARTS).is_some()
    }

    /// Whether anybody waits for a part of these shares.
    pub fn is_waited_for(&self) -> bool {
        self.owners().any(|owner| owner.held.queues.iter().any(WaitingQueue::has_waiting))
    }

    /// What is used up, if anything is; of the shares, one part in `parts`.
    fn used_up(&self, parts: usize) -> Option<&MemoryUse> {
        let is_used_up =
            |owner: &&Arc<OwnerUse>| owner.held.bytes() >= self.budget.share_of(&owner.owner) / parts;
        if let Some(owner) = self.owners().find(is_used_up) {
            return Some(&owner.held);
        }
        let all = &self.budget.all;
        (all.bytes() >= self.budget.bytes_max_of(self.own.held.bytes())).then_some(all)
    }

    /// Waits until something may be taken in again.
    pub async fn wait_room(&self) {
        self.wait_part(WaitKind::Room).await;
    }

    /// Waits until something may be prepared to be sent again.
    pub async fn wait_room_to_send(&self) {
        self.wait_part(WaitKind::RoomToSend).await;
    }

    async fn wait_part(&self, kind: WaitKind) {
        let mut turns = WaitTurns::new(kind, 1);
        while let Some(used_up) = self.used_up(kind.parts()) {
            turns.wait(self, used_up, || self.used_up(kind.parts()).is_none().then_some(())).await;
        }
        self.wake_next(kind);
    }

    /// Waits until `bytes` can be charged.
    pub async fn wait_for(self: &Arc<Self>, bytes: usize) -> MemoryCharge {
        let mut turns = WaitTurns::new(WaitKind::Bytes, bytes);
        let charge = loop {
            let exceeded = match self.charge(bytes) {
                Ok(charge) => break charge,
                Err(exceeded) => exceeded,
            };
            let is_it = |owner: &&Arc<OwnerUse>| exceeded.owner.as_ref() == Some(&owner.owner);
            let used_up = self.owners().find(is_it).map_or(&self.budget.all, |owner| &owner.held);
            let charged = turns.wait(self, used_up, || self.charge(bytes).ok()).await;
            if let Some(charge) = charged {
                break charge;
            }
        };
        self.wake_next(WaitKind::Bytes);
        charge
    }

    /// All that is charged: its owners, and the whole.
    fn uses(&self) -> impl Iterator<Item = &MemoryUse> {
        self.owners().map(|owner| &owner.held).chain([&self.budget.all])
    }

    /// There may be room for one more of those that wait for the same.
    fn wake_next(&self, kind: WaitKind) {
        self.uses().for_each(|held| held.tell_who_fits(kind));
    }

    /// What may be held of `held`, which refuses it, for `bytes` more to fit.
    fn held_max(&self, held: &MemoryUse, kind: WaitKind, bytes: usize) -> Option<usize> {
        let bytes_max = match self.owners().find(|owner| std::ptr::eq(&owner.held, held)) {
            Some(owner) => self.budget.share_of(&owner.owner) / kind.parts(),
            // Whether an owner holds little is asked when the bytes are charged to it already.
            None if matches!(kind, WaitKind::Bytes) => {
                self.budget.bytes_max_of(self.own.held.bytes().saturating_add(bytes))
            }
            None => self.budget.bytes_max_of(self.own.held.bytes()),
        };
        bytes_max.checked_sub(bytes)
    }

    /// Adds `bytes` to a charge of `charged`, if no more than one part in `parts` of the shares is held then.
    fn try_add(&self, bytes: usize, charged: usize, parts: usize) -> Result<(), MemoryExceeded> {
        for (nth, owner) in self.owners().enumerate() {
            let bytes_max = self.budget.share_of(&owner.owner) / parts;
            if !owner.held.try_add(bytes, bytes_max) {
                self.owners().take(nth).for_each(|owner| owner.held.take_back(bytes));
                let of = Some(owner.owner.clone());
                let is_too_large = charged.saturating_add(bytes) > bytes_max;
                return Err(MemoryExceeded { owner: of, bytes_max, is_too_large });
            }
        }
        let budget = &self.budget;
        if budget.all.try_add(bytes, budget.bytes_max_of(self.own.held.bytes())) {
            return Ok(());
        }
        self.owners().for_each(|owner| owner.held.take_back(bytes));
        let bytes_max = budget.bytes_max.load(Ordering::Relaxed);
        let is_too_large = charged.saturating_add(bytes) > bytes_max;
        Err(MemoryExceeded { owner: None, bytes_max, is_too_large })
    }

    fn add(&self, bytes: usize) {
        self.owners().for_each(|owner| owner.held.add(bytes));
        self.budget.all.add(bytes);
    }

    fn release(&self, bytes: usize) {
        self.owners().for_each(|owner| owner.held.release(bytes));
        self.budget.all.release(bytes);
    }
}

impl MemoryCharge {
    /// The account that is charged.
    pub fn account(&self) -> &Arc<MemoryAccount> {
        &self.account
    }

    /// How many bytes are charged.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Charges `more` bytes.
    ///
    /// # Errors
    /// [`MemoryExceeded`]; the charge is what it was then.
    pub fn grow(&mut self, more: usize) -> Result<(), MemoryExceeded> {
        self.account.try_add(more, self.bytes, 1)?;
        self.bytes += more;
        Ok(())
    }

    /// Charges `more` bytes of something that is to be sent.
    ///
    /// # Errors
    /// As [`MemoryAccount::charge_to_send`]; the charge is what it was then.
    pub fn grow_to_send(&mut self, more: usize) -> Result<(), MemoryExceeded> {
        self.account.try_add(more, self.bytes, SEND_PARTS)?;
        self.bytes += more;
        Ok(())
    }

    /// Makes it `bytes`, more or fewer.
    ///
    /// # Errors
    /// As [`MemoryCharge::grow`].
    pub fn resize(&mut self, bytes: usize) -> Result<(), MemoryExceeded> {
        match bytes.checked_sub(self.bytes) {
            Some(more) => self.grow(more),
            None => {
                self.set_held(bytes);
                Ok(())
            }
        }
    }

    /// Makes it `bytes`, which are in memory already.
    pub fn set_held(&mut self, bytes: usize) {
        match bytes.checked_sub(self.bytes) {
            Some(more) => self.account.add(more),
            None => self.account.release(self.bytes - bytes),
        }
        self.bytes = bytes;
    }
}

impl Drop for MemoryCharge {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.account.release(self.bytes);
        }
    }
}

/// The turns of somebody who waits. One of those in a queue is told of what was freed, and may not be able to use it: it is
/// too little, or something else is used up too. Then the next one is told, as long as what is free is enough for any of
/// them: those of equal need are not told one after the other of what is enough for none.
struct WaitTurns {
    kind: WaitKind,
    /// What is needed at least.
    bytes: usize,
    /// Where it was told last, as a place among [`MemoryAccount::uses`].
    told_at: Option<usize>,
}

impl WaitTurns {
    fn new(kind: WaitKind, bytes: usize) -> Self {
        Self { kind, bytes, told_at: None }
    }

    /// Waits until something of `used_up` is freed, or returns what `look` finds once this is in line.
    async fn wait<T>(
        &mut self,
        account: &MemoryAccount,
        used_up: &MemoryUse,
        look: impl FnOnce() -> Option<T>,
    ) -> Option<T> {
        let told = self.told_at.take().and_then(|place| account.uses().nth(place));
        let queue = &used_up.queues[self.kind as usize];
        let mut freed = std::pin::pin!(queue.freed.notified());
        let waiting = WaitingClient::new(queue, || account.held_max(used_up, self.kind, self.bytes));
        // In line first: what is freed between the look and the wait is seen by one of the two.
        freed.as_mut().enable();
        let found = look();
        if found.is_some() {
            return found;
        }
        if let Some(told) = told {
            told.tell_who_fits(self.kind);
        }
        // If something else refuses it by now, that is what it has to wait for.
        let is_refused = waiting.held_max.is_none_or(|held_max| used_up.bytes() > held_max);
        if !is_refused || tokio::time::timeout(LOOK_INTERVAL, freed).await.is_ok() {
            self.told_at = account.uses().position(|held| std::ptr::eq(held, used_up));
        }
        None
    }
}

/// Counts somebody who waits, for as long as it exists.
struct WaitingClient<'a> {
    queue: &'a WaitingQueue,
    held_max: Option<usize>,
}

impl<'a> WaitingClient<'a> {
    /// `held_max`: what may be held for it to go on, looked at once it is counted.
    fn new(queue: &'a WaitingQueue, held_max: impl FnOnce() -> Option<usize>) -> Self {
        queue.waiting.fetch_add(1, Ordering::SeqCst);
        let held_max = held_max();
        if let Some(held_max) = held_max {
            *polite_lock(&queue.held_max).entry(held_max).or_default() += 1;
        }
        Self { queue, held_max }
    }
}

impl Drop for WaitingClient<'_> {
    fn drop(&mut self) {
        if let Some(held_max) = self.held_max {
            let mut all = polite_lock(&self.queue.held_max);
            if let Some(count) = all.get_mut(&held_max) {
                *count -= 1;
                if *count == 0 {
                    all.remove(&held_max);
                }
            }
        }
        self.queue.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
