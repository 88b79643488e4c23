//! Tenant shares: what the subscribers of one datasource take at this moment, of memory and of turns. A
//! tenant is a datasource; keys for all datasources (`*`) are one more.
//!
//! What is counted is held by a [`ShareCharge`], which gives it back when it is dropped: a count goes down in
//! every way in which a session, a group or a batch can end. Who is over a count is refused by name; who
//! wants a turn waits behind its own tenant first, so that no tenant takes the turns of the others.

mod output;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinError;
use tokio_util::task::AbortOnDropHandle;

use crate::limits::{
    BLOCKING_READS_MAX, BLOCKING_READS_PER_TENANT_MAX, REPLAYS_RUNNING_MAX, REPLAYS_RUNNING_PER_TENANT_MAX,
    STALLED_BYTES_MAX, STALLED_BYTES_PER_TENANT_MAX, SUBSCRIPTION_BYTES, SUBSCRIPTION_LEVEL_BYTES,
};
use crate::message::DatasourceId;
use crate::processor::paid;
use crate::scheduler::polite_lock;

use self::output::OutputPool;

pub use self::output::OutputRoom;

/// What is counted for each tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShareCount {
    /// Sessions that outlive their connection.
    Sessions,
    /// Subscriptions of all sessions.
    Subscriptions,
    /// What those subscriptions take in memory, in bytes.
    SubscriptionBytes,
    /// Groups of shared subscriptions.
    ShareGroups,
    /// Messages that were sent to subscribers and are not acknowledged.
    Inflight,
    /// Bytes that subscribers hold while their clients take nothing.
    StalledBytes,
    /// Bytes of places that the router has found and nobody has taken.
    PlaceBytes,
    /// SUBSCRIBEs that search the log for their beginning, or wait to.
    Replays,
    /// Bytes of wills that were refused and are published again later.
    RefusedWillBytes,
}

const SHARE_COUNTS: usize = ShareCount::ALL.len();

impl ShareCount {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Sessions,
        Self::Subscriptions,
        Self::SubscriptionBytes,
        Self::ShareGroups,
        Self::Inflight,
        Self::StalledBytes,
        Self::PlaceBytes,
        Self::Replays,
        Self::RefusedWillBytes,
    ];
}

/// The shares of all tenants.
#[derive(Debug)]
pub struct TenantShares {
    by_datasource: Mutex<HashMap<DatasourceId, Weak<TenantShare>>>,
    all: Arc<SharedTurns>,
}

/// What all tenants together take.
#[derive(Debug)]
struct SharedTurns {
    counts: [AtomicU64; SHARE_COUNTS],
    reads: Arc<Semaphore>,
    replays: Arc<Semaphore>,
    output: OutputPool,
}

/// What one tenant takes.
#[derive(Debug)]
pub struct TenantShare {
    counts: [AtomicU64; SHARE_COUNTS],
    /// How far each count may go; an operator may change it at any time.
    maxima: [AtomicU64; SHARE_COUNTS],
    /// Turns of subscribers that read the log by themselves: as many as there are processors.
    catch_up: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    replays: Arc<Semaphore>,
    /// Output to clients that have not taken it.
    output: OutputPool,
    all: Arc<SharedTurns>,
}

/// A part of a [`TenantShare`], which is given back when this is dropped.
#[derive(Debug)]
pub struct ShareCharge {
    share: Arc<TenantShare>,
    amounts: [u64; SHARE_COUNTS],
}

/// A turn to read from the disk, for as long as it is kept: move it into the work, which goes on when nobody
/// waits for it any more.
#[derive(Debug)]
pub struct ReadTurn {
    _own: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

/// There is no room in a share for this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShareExceeded(pub ShareCount);

impl Default for TenantShares {
    fn default() -> Self {
        let turns = |turns| Arc::new(Semaphore::new(turns));
        let (reads, replays) = (turns(BLOCKING_READS_MAX), turns(REPLAYS_RUNNING_MAX));
        let output = OutputPool::of_all();
        let all = Arc::new(SharedTurns { counts: Default::default(), reads, replays, output });
        Self { by_datasource: Mutex::default(), all }
    }
}

impl TenantShares {
    /// The share of a datasource, or of the keys for all datasources.
    pub fn share(&self, datasource: &DatasourceId) -> Arc<TenantShare> {
        let mut shares = polite_lock(&self.by_datasource);
        if let Some(share) = shares.get(datasource).and_then(Weak::upgrade) {
            return share;
        }
        if shares.len() == shares.capacity() {
            shares.retain(|_, share| share.strong_count() > 0);
        }
        let share = Arc::new(TenantShare {
            counts: Default::default(),
            maxima: std::array::from_fn(|_| AtomicU64::new(u64::MAX)),
            catch_up: Arc::new(Semaphore::new(processors())),
            reads: Arc::new(Semaphore::new(BLOCKING_READS_PER_TENANT_MAX)),
            replays: Arc::new(Semaphore::new(REPLAYS_RUNNING_PER_TENANT_MAX)),
            output: OutputPool::of_tenant(),
            all: self.all.clone(),
        });
        shares.insert(datasource.clone(), Arc::downgrade(&share));
        share
    }
}

/// How many processors the gateway may use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl TenantShare {
    /// A share of a tenant that is alone, for tests and tools.
    #[cfg(test)]
    pub fn alone() -> Arc<Self> {
        TenantShares::default().share(&DatasourceId::all())
    }

    /// How much is taken.
    #[cfg(test)]
    pub fn count(&self, what: ShareCount) -> u64 {
        self.counts[what as usize].load(Ordering::Relaxed)
    }

    /// Sets how far a count may go from now on. What is taken already stays.
    pub fn set_max(&self, what: ShareCount, max: u64) {
        self.maxima[what as usize].store(max, Ordering::Relaxed);
    }

    /// How much all tenants together have taken.
    pub fn count_of_all(&self, what: ShareCount) -> u64 {
        self.all.counts[what as usize].load(Ordering::Relaxed)
    }

    /// Nothing yet.
    pub fn charge(self: &Arc<Self>) -> ShareCharge {
        ShareCharge { share: self.clone(), amounts: [0; SHARE_COUNTS] }
    }

    /// The turns of subscribers that read the log by themselves.
    pub fn catch_up_turns(&self) -> &Arc<Semaphore> {
        &self.catch_up
    }

    /// Waits for a turn to read from the disk: first behind the same tenant's, then behind everybody's. Such
    /// turns are far fewer than the threads for blocking work, so that the registry always finds one.
    pub async fn read_turn(self: Arc<Self>) -> ReadTurn {
        ReadTurn::take(&self.reads, &self.all.reads).await
    }

    /// Runs `read` on a blocking thread in a turn ([`TenantShare::read_turn`]). A task of its own waits for the turn:
    /// one that is given to a future which nobody polls would be lost to the others. Dropping the future ends the wait.
    pub fn read_in_turn<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce() -> T + Send + 'static,
    ) -> impl Future<Output = Result<T, JoinError>> + Send + 'static {
        let share = self.clone();
        async move {
            // The task that waits is not the caller's.
            let read = paid(read);
            let task = tokio::spawn(async move {
                let turn = share.read_turn().await;
                let reading = tokio::task::spawn_blocking(move || {
                    let _turn = turn;
                    read()
                });
                reading.await
            });
            AbortOnDropHandle::new(task).await.and_then(|done| done)
        }
    }

    /// Waits for a turn to search the log, with many reads.
    pub async fn replay_turn(self: Arc<Self>) -> ReadTurn {
        ReadTurn::take(&self.replays, &self.all.replays).await
    }

    fn add(&self, what: ShareCount, amount: u64) {
        self.counts[what as usize].fetch_add(amount, Ordering::Relaxed);
        self.all.counts[what as usize].fetch_add(amount, Ordering::Relaxed);
    }

    fn subtract(&self, what: usize, amount: u64) {
        self.counts[what].fetch_sub(amount, Ordering::Relaxed);
        self.all.counts[what].fetch_sub(amount, Ordering::Relaxed);
    }
}

impl ReadTurn {
    async fn take(own: &Arc<Semaphore>, all: &Arc<Semaphore>) -> Self {
        const OPEN: &str = "the semaphores are never closed";
        let _own = own.clone().acquire_owned().await.expect(OPEN);
        let _all = all.clone().acquire_owned().await.expect(OPEN);
        Self { _own, _all }
    }
}

impl ShareCharge {
    /// The share that this is a part of.
    #[cfg(test)]
    pub fn share(&self) -> &Arc<TenantShare> {
        &self.share
    }

    /// How much this part has.
    pub fn amount(&self, what: ShareCount) -> u64 {
        self.amounts[what as usize]
    }

    /// Takes more, whatever is taken already: for what is there from before.
    pub fn add(&mut self, what: ShareCount, amount: u64) {
        self.share.add(what, amount);
        self.amounts[what as usize] += amount;
    }

    /// Takes more, if the tenant's count does not go over its maximum with it.
    ///
    /// # Errors
    /// [`ShareExceeded`], and nothing is taken.
    pub fn try_take(&mut self, what: ShareCount, amount: u64) -> Result<(), ShareExceeded> {
        let max = self.share.maxima[what as usize].load(Ordering::Relaxed);
        self.try_add(what, amount, max)
    }

    /// Takes more, if the tenant has at most `max` with it.
    ///
    /// # Errors
    /// [`ShareExceeded`], and nothing is taken.
    pub fn try_add(&mut self, what: ShareCount, amount: u64, max: u64) -> Result<(), ShareExceeded> {
        let count = &self.share.counts[what as usize];
        let fits = |taken: u64| taken.checked_add(amount).filter(|sum| *sum <= max);
        count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).map_err(|_| ShareExceeded(what))?;
        self.share.all.counts[what as usize].fetch_add(amount, Ordering::Relaxed);
        self.amounts[what as usize] += amount;
        Ok(())
    }

    /// Takes what a subscription with this filter costs, if the tenant has room for it.
    ///
    /// # Errors
    /// [`ShareExceeded`], and nothing is taken.
    pub fn try_take_filter(&mut self, filter: &str) -> Result<(), ShareExceeded> {
        self.try_take(ShareCount::Subscriptions, 1)?;
        self.try_take(ShareCount::SubscriptionBytes, filter_bytes(filter))
            .inspect_err(|_| self.subtract(ShareCount::Subscriptions, 1))
    }

    /// Gives back what [`ShareCharge::try_take_filter`] has taken.
    pub fn give_back_filter(&mut self, filter: &str) {
        self.subtract(ShareCount::Subscriptions, 1);
        self.subtract(ShareCount::SubscriptionBytes, filter_bytes(filter));
    }

    /// Counts what a subscriber holds in memory while its client takes nothing, in place of what it held before. Returns
    /// whether there is room for it; if not, nothing is counted, and the subscriber is to let go of it.
    pub fn hold_stalled(&mut self, bytes: u64) -> bool {
        self.set(ShareCount::StalledBytes, 0);
        let all = self.share.count_of_all(ShareCount::StalledBytes);
        all.saturating_add(bytes) <= STALLED_BYTES_MAX
            && self.try_add(ShareCount::StalledBytes, bytes, STALLED_BYTES_PER_TENANT_MAX).is_ok()
    }

    /// Gives a part back.
    pub fn subtract(&mut self, what: ShareCount, amount: u64) {
        let amount = amount.min(self.amounts[what as usize]);
        self.amounts[what as usize] -= amount;
        self.share.subtract(what as usize, amount);
    }

    /// Takes exactly `amount`, whatever it was before.
    pub fn set(&mut self, what: ShareCount, amount: u64) {
        let before = self.amount(what);
        if amount > before {
            self.add(what, amount - before);
        } else {
            self.subtract(what, before - amount);
        }
    }
}

/// What a subscription with this filter takes in memory: the texts of session and feed, and its place in the
/// router's trie and its own.
pub fn filter_bytes(filter: &str) -> u64 {
    let levels = filter.bytes().filter(|byte| *byte == b'/').count() as u64 + 1;
    SUBSCRIPTION_BYTES + 4 * filter.len() as u64 + levels * SUBSCRIPTION_LEVEL_BYTES
}

impl Drop for ShareCharge {
    fn drop(&mut self) {
        for (what, amount) in self.amounts.iter().enumerate().filter(|(_, amount)| **amount > 0) {
            self.share.subtract(what, *amount);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};
    use std::time::Duration;

    use super::*;

    fn id(name: &str) -> DatasourceId {
        DatasourceId::new(name).expect("a slug")
    }

    #[test]
    fn a_share_is_full_at_its_bound_and_a_dropped_charge_makes_room() {
        let shares = TenantShares::default();
        let (mut first, mut second) = (shares.share(&id("a")).charge(), shares.share(&id("a")).charge());
        assert_eq!(first.try_add(ShareCount::Sessions, 2, 3), Ok(()));
        assert_eq!(
            second.try_add(ShareCount::Sessions, 2, 3),
            Err(ShareExceeded(ShareCount::Sessions)),
            "one above"
        );
        assert_eq!(second.try_add(ShareCount::Sessions, 1, 3), Ok(()), "at the bound");
        assert_eq!(
            second.try_add(ShareCount::Sessions, u64::MAX, u64::MAX),
            Err(ShareExceeded(ShareCount::Sessions))
        );
        let mut other = shares.share(&id("b")).charge();
        assert_eq!(other.try_add(ShareCount::Sessions, 3, 3), Ok(()), "another tenant has its own");
        assert_eq!(other.share().count_of_all(ShareCount::Sessions), 6);
        drop(first);
        assert_eq!(second.share().count(ShareCount::Sessions), 1);
        second.add(ShareCount::Sessions, 9);
        assert_eq!(
            second.try_add(ShareCount::Sessions, 1, 3),
            Err(ShareExceeded(ShareCount::Sessions)),
            "what was there stays"
        );
        second.set(ShareCount::Sessions, 1);
        assert_eq!(second.try_add(ShareCount::Sessions, 2, 3), Ok(()));
    }

    #[test]
    fn a_maximum_holds_for_what_comes_after_it_was_set() {
        let mut charge = TenantShare::alone().charge();
        assert_eq!(charge.try_take(ShareCount::ShareGroups, 5), Ok(()));
        charge.share().set_max(ShareCount::ShareGroups, 5);
        assert_eq!(charge.try_take(ShareCount::ShareGroups, 1), Err(ShareExceeded(ShareCount::ShareGroups)));
        charge.share().set_max(ShareCount::ShareGroups, 6);
        assert_eq!(charge.try_take(ShareCount::ShareGroups, 1), Ok(()));
        charge.share().set_max(ShareCount::ShareGroups, 1);
        assert_eq!(charge.amount(ShareCount::ShareGroups), 6, "what was there stays");
    }

    #[tokio::test]
    async fn a_tenant_that_takes_all_its_turns_leaves_those_of_others() {
        let shares = TenantShares::default();
        let (greedy, other) = (shares.share(&id("a")), shares.share(&id("b")));
        let mut turns = Vec::new();
        for _ in 0..BLOCKING_READS_PER_TENANT_MAX {
            turns.push(greedy.clone().read_turn().await);
        }
        let waiting: Vec<_> = (0..600).map(|_| tokio::spawn(greedy.clone().read_turn())).collect();
        drop(other.read_turn().await);
        waiting.iter().for_each(tokio::task::JoinHandle::abort);
        for one in waiting {
            assert!(one.await.is_err(), "it was never its turn");
        }
        drop(turns);
        drop(greedy.read_turn().await);
    }

    #[tokio::test]
    async fn a_turn_that_comes_to_who_does_not_look_is_not_lost_to_the_others() {
        let share = TenantShare::alone();
        let mut turns = Vec::new();
        for _ in 0..BLOCKING_READS_PER_TENANT_MAX {
            turns.push(share.clone().read_turn().await);
        }
        let mut cx = Context::from_waker(Waker::noop());
        let mut wait = || {
            let mut waiting = Box::pin(share.read_in_turn(|| ()));
            assert!(waiting.as_mut().poll(&mut cx).is_pending());
            waiting
        };
        let unpolled: Vec<_> = (0..BLOCKING_READS_PER_TENANT_MAX).map(|_| wait()).collect();
        let dropped: Vec<_> = (0..BLOCKING_READS_PER_TENANT_MAX).map(|_| wait()).collect();
        // All of them queue before the third.
        let third = tokio::spawn(share.read_in_turn(|| 3));
        while share.reads.available_permits() == 0 && !turns.is_empty() {
            tokio::task::yield_now().await;
            turns.pop();
        }
        drop((turns, dropped));
        let read = tokio::time::timeout(Duration::from_secs(20), third).await;
        assert_eq!(read.expect("its turn comes").expect("a task").expect("read"), 3);
        drop(unpolled);
    }

    #[test]
    fn a_share_that_nobody_uses_is_forgotten() {
        let shares = TenantShares::default();
        for n in 0..10_000 {
            drop(shares.share(&id(&format!("d-{n}"))));
        }
        assert!(shares.by_datasource.lock().len() < 100);
    }
}
