//! Processor time: what the tasks of each tenant take of it, and where they run. A tenant is a datasource, a key for all
//! of them, or all strangers together.
//!
//! A task that serves a client is a [`FairTask`]: it measures what each of its polls takes, for its tenant. When the
//! processors are busy, a tenant that takes far more than others goes on in the slow lane (`lane.rs`), on threads of low
//! priority: they take what nobody else wants. A tenant that is alone has all of the gateway, as before. So the others'
//! tasks are few on their threads, and an ack, a delivery or a revocation does not wait behind somebody's attack.
//!
//! What is measured is what a task has had of a processor (`poll_clock.rs`), not what passed meanwhile: beside an attack,
//! who was without a processor in the middle of a small piece of work would seem to have used much, and be in the slow lane
//! for it. A share is found by windows of [`PROCESSOR_WINDOW`] ([`fair_share`]). Each window in which a tenant is over it
//! adds [`SLOW_LANE_STEP`] to its stay in the slow lane, up to [`SLOW_LANE_STAY`]: one large request is soon forgotten, an
//! attack in bursts is not.

mod disk_turn;
mod lane;
mod poll_clock;
mod task;

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::auth::{Grant, Key};
use crate::limits::{
    PROCESSOR_WINDOW, SLOW_DISK_PAUSES, SLOW_IN_FLIGHT_BYTES_MAX, SLOW_LANE_STAY, SLOW_LANE_STEP,
    TENANT_ACTIVE,
};
use crate::message::{DatasourceId, KeyId};
use crate::scheduler::{note_crowd, polite_lock};
use crate::shares::processors;

pub use disk_turn::{DiskTurn, pauses_after_large};
pub use lane::{run_slowly, run_usually};
pub use task::{FairTask, TaskPayer, paid, spawn_fairly, spawn_reading};

/// The part of the processors, in percent, below which nobody's use is in the way of anybody.
const BUSY_PERCENT: u64 = 20;
/// The part of the processors, in percent, that a tenant may use whatever the others do.
const HARMLESS_PERCENT: u64 = 10;
/// The part of what is used, in percent, that goes round when all take no more than a fair share.
const SHARED_PERCENT: u64 = 70;

const WINDOWS_PER_S: u64 = 100;
const WINDOW_NS: u64 = 1_000_000_000 / WINDOWS_PER_S;
const _: () = assert!(PROCESSOR_WINDOW.as_millis() * WINDOWS_PER_S as u128 == 1_000);

/// The part of the processors, in percent, below which strangers are in nobody's way: who is let in was one before, and a
/// fleet that connects is no reason to serve it at low priority.
const STRANGERS_PERCENT: u64 = 2;

/// Of the polls of a tenant that is alone, one in so many is measured, and counts for all.
const LONE_POLLS_PER_SAMPLE: u32 = 16;

thread_local! {
    /// Counts polls that are not measured.
    static POLLS: Cell<u32> = const { Cell::new(0) };
}

/// The processor time of all tenants. Cheap to clone.
#[derive(Clone)]
pub struct ProcessorTime(Arc<TimeState>);

struct TimeState {
    began: Instant,
    processors: u64,
    /// Where tasks run that are in no other lane; `None` if this was made outside of a runtime.
    usual: Option<Handle>,
    /// The number of the window that is counted now.
    window: AtomicU64,
    tenants: Mutex<HashMap<TimeOwner, Weak<TenantTime>>>,
    /// Those that have used something lately.
    active: Mutex<Vec<Arc<TenantTime>>>,
    /// How many those are.
    active_count: AtomicUsize,
    /// The window until which somebody's tasks run in the slow lane.
    slow_until: AtomicU64,
    /// A test has set who is slow.
    #[cfg(test)]
    is_set: AtomicBool,
}

/// Whose time it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum TimeOwner {
    Datasource(DatasourceId),
    /// A key for all datasources.
    Key(KeyId),
    Strangers,
}

/// The processor time of one tenant.
pub struct TenantTime {
    /// Nanoseconds in the present window.
    used_ns: AtomicU64,
    /// In windows before that, each counting half of the next.
    average_ns: AtomicU64,
    is_active: AtomicBool,
    /// All clients without a key.
    are_strangers: bool,
    /// The window in which it was last seen.
    seen_in: AtomicU64,
    /// The window until which its tasks run in the slow lane.
    slow_until: AtomicU64,
    /// A permit for each byte that it may have on its way into the log while it is there.
    log_turns: Arc<Semaphore>,
}

impl TenantTime {
    fn new(are_strangers: bool) -> Self {
        Self {
            used_ns: AtomicU64::new(0),
            average_ns: AtomicU64::new(0),
            is_active: AtomicBool::new(false),
            are_strangers,
            seen_in: AtomicU64::new(0),
            slow_until: AtomicU64::new(0),
            log_turns: Arc::new(Semaphore::new(SLOW_IN_FLIGHT_BYTES_MAX)),
        }
    }
}

impl ProcessorTime {
    /// Nothing is used yet, of so many processors as there are. The caller's runtime is the usual one.
    pub fn new() -> Self {
        let (processors, window) = (processors() as u64, AtomicU64::new(0));
        let (tenants, active) = (Mutex::default(), Mutex::default());
        Self(Arc::new(TimeState {
            began: Instant::now(),
            processors,
            usual: Handle::try_current().ok(),
            window,
            tenants,
            active,
            active_count: AtomicUsize::new(0),
            slow_until: AtomicU64::new(0),
            #[cfg(test)]
            is_set: AtomicBool::new(false),
        }))
    }

    /// The runtime of what is in no other lane. A task that outlives the one that makes it, or that is nobody's, begins
    /// there: the maker may be in another lane, and what begins in a lane by itself never leaves it.
    pub fn usual_runtime(&self) -> Handle {
        self.0.usual.clone().unwrap_or_else(Handle::current)
    }

    /// As [`ProcessorTime::usual_runtime`], for what may be called outside of any; `None` then.
    pub fn lasting_runtime(&self) -> Option<Handle> {
        self.0.usual.clone().or_else(|| Handle::try_current().ok())
    }

    /// The time of a grant's tenant.
    pub fn of_grant(&self, grant: &Grant) -> Arc<TenantTime> {
        self.of_key(grant.key())
    }

    fn of_key(&self, key: &Key) -> Arc<TenantTime> {
        self.of_owner(match key.datasource.is_all() {
            true => TimeOwner::Key(key.id),
            false => TimeOwner::Datasource(key.datasource.clone()),
        })
    }

    /// The time of those who have a key of this datasource.
    pub fn of_datasource(&self, datasource: &DatasourceId) -> Arc<TenantTime> {
        self.of_owner(TimeOwner::Datasource(datasource.clone()))
    }

    /// What a key's tenant has to have while its messages are on their way into the log, a permit for each byte: so what
    /// waits there for the disk does not grow before the messages of others. `None` if it is not in the slow lane.
    pub fn log_turns(&self, key: &Key) -> Option<Arc<Semaphore>> {
        if !self.is_somebody_slow() {
            return None;
        }
        let tenant = self.of_key(key);
        self.is_slow(&tenant).then(|| tenant.log_turns.clone())
    }

    /// Does work for a key's tenant that writes so many bytes to a disk for which others wait. While the tenant is in the
    /// slow lane, it has little of that under way, and pauses between.
    pub async fn pace_disk<T>(&self, key: &Key, bytes: usize, work: impl Future<Output = T>) -> T {
        let Some(turns) = self.log_turns(key) else { return work.await };
        let permits = u32::try_from(bytes.min(SLOW_IN_FLIGHT_BYTES_MAX)).unwrap_or(u32::MAX);
        // Never closed.
        let permits = turns.acquire_many_owned(permits).await.ok();
        let _turn = permits.map(|permits| self.disk_turn(permits, SLOW_DISK_PAUSES));
        work.await
    }

    /// A turn that begins now for who has these permits of its tenant. They are away for so many times as long as it takes.
    pub fn disk_turn(&self, permits: OwnedSemaphorePermit, pauses: u32) -> DiskTurn {
        DiskTurn::new(permits, pauses, self.lasting_runtime())
    }

    /// The time of all clients without a key.
    pub fn of_strangers(&self) -> Arc<TenantTime> {
        self.of_owner(TimeOwner::Strangers)
    }

    fn of_owner(&self, owner: TimeOwner) -> Arc<TenantTime> {
        let mut tenants = polite_lock(&self.0.tenants);
        if let Some(known) = tenants.get(&owner).and_then(Weak::upgrade) {
            return known;
        }
        if tenants.len() == tenants.capacity() {
            tenants.retain(|_, tenant| tenant.strong_count() > 0);
        }
        let tenant = Arc::new(TenantTime::new(owner == TimeOwner::Strangers));
        tenants.insert(owner, Arc::downgrade(&tenant));
        tenant
    }

    fn window_at(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.0.began);
        since.as_secs() * WINDOWS_PER_S + u64::from(since.subsec_nanos() / PROCESSOR_WINDOW.subsec_nanos())
    }

    /// Lets others have their turn while somebody takes more than others: between two connections that are accepted.
    pub async fn give_way(&self) {
        if self.is_somebody_slow() {
            tokio::task::yield_now().await;
        }
    }

    /// Whether any tenant is in the slow lane.
    #[inline]
    pub fn is_somebody_slow(&self) -> bool {
        self.0.slow_until.load(Ordering::Relaxed) > self.0.window.load(Ordering::Relaxed)
    }

    /// Has the tasks of a tenant run in the slow lane from now on.
    #[cfg(test)]
    pub fn slow_down(&self, tenant: &TenantTime) {
        tenant.slow_until.store(u64::MAX, Ordering::Relaxed);
        self.0.slow_until.store(u64::MAX, Ordering::Relaxed);
        self.0.is_set.store(true, Ordering::Relaxed);
    }

    /// Notes what a tenant has used until now.
    pub fn note(&self, tenant: &Arc<TenantTime>, used: Duration, now: Instant) {
        tenant.used_ns.fetch_add(u64::try_from(used.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        if !tenant.is_active.load(Ordering::Relaxed) && !tenant.is_active.swap(true, Ordering::AcqRel) {
            tenant.seen_in.store(self.window_at(now), Ordering::Relaxed);
            let mut active = polite_lock(&self.0.active);
            active.push(tenant.clone());
            if active.len() > 2 {
                // The end of the window finds it out, once for all who have come.
                self.0.active_count.store(active.len(), Ordering::Relaxed);
            } else {
                // Who has had all processors may be in the way from now on.
                self.find_slow(&active);
            }
        }
        let window = self.window_at(now);
        if window > self.0.window.load(Ordering::Relaxed) {
            self.begin_window(window);
        }
    }

    /// Whether the tenant's tasks run in the slow lane now.
    pub fn is_slow(&self, tenant: &TenantTime) -> bool {
        tenant.slow_until.load(Ordering::Relaxed) > self.0.window.load(Ordering::Relaxed)
    }

    /// Whether more than one tenant has used something lately.
    #[inline]
    pub fn is_contended(&self) -> bool {
        self.0.active_count.load(Ordering::Relaxed) > 1
    }

    /// For how many polls the next one of the tenant is measured; `None` if it is not. What one that is alone takes is of
    /// interest only when another one comes.
    #[inline]
    fn next_weight(&self, tenant: &TenantTime) -> Option<u32> {
        if self.is_contended() || !tenant.is_active.load(Ordering::Relaxed) {
            return Some(1);
        }
        let nth = POLLS.get().wrapping_add(1);
        POLLS.set(nth);
        nth.is_multiple_of(LONE_POLLS_PER_SAMPLE).then_some(LONE_POLLS_PER_SAMPLE)
    }

    /// Whether others may be in the way of a tenant that is active, or it in theirs.
    fn counts(&self, tenant: &TenantTime) -> bool {
        let capacity = self.0.processors.saturating_mul(WINDOW_NS);
        let used = tenant.average_ns.load(Ordering::Relaxed);
        !tenant.are_strangers || used > capacity / 100 * STRANGERS_PERCENT || self.is_slow(tenant)
    }

    /// Whether nobody but this tenant has used anything lately.
    fn is_alone(&self, tenant: &Arc<TenantTime>) -> bool {
        polite_lock(&self.0.active).iter().all(|other| Arc::ptr_eq(other, tenant))
    }

    /// Finds out who was over its share in the window that has ended. If others do so now, nothing has to be done.
    fn begin_window(&self, window: u64) {
        let Some(mut active) = self.0.active.try_lock() else { return };
        let before = self.0.window.load(Ordering::Relaxed);
        if window <= before {
            return;
        }
        self.0.window.store(window, Ordering::Relaxed);
        let windows = window - before;
        active.retain(|tenant| tenant.pass_window(window, windows));
        self.find_slow(&active);
    }

    /// Finds out which of the active tenants are over their share.
    fn find_slow(&self, active: &[Arc<TenantTime>]) {
        let counted = || active.iter().filter(|tenant| self.counts(tenant));
        let mut uses: Vec<u64> = counted().map(|tenant| tenant.average_ns.load(Ordering::Relaxed)).collect();
        self.0.active_count.store(uses.len(), Ordering::Relaxed);
        #[cfg(test)]
        if self.0.is_set.load(Ordering::Relaxed) {
            return;
        }
        if uses.len() < 2 {
            // There is nobody to be in the way of.
            active.iter().for_each(|tenant| tenant.slow_until.store(0, Ordering::Relaxed));
            self.0.slow_until.store(0, Ordering::Relaxed);
            return;
        }
        let share = fair_share(&mut uses, self.0.processors.saturating_mul(WINDOW_NS));
        let window = self.0.window.load(Ordering::Relaxed);
        for tenant in counted().filter(|tenant| tenant.average_ns.load(Ordering::Relaxed) > share) {
            let stay = tenant.slow_until.load(Ordering::Relaxed).saturating_sub(window);
            let stay = (stay + windows_in(SLOW_LANE_STEP)).min(windows_in(SLOW_LANE_STAY));
            tenant.slow_until.store(window + stay, Ordering::Relaxed);
            self.0.slow_until.fetch_max(window + stay, Ordering::Relaxed);
            note_crowd(PROCESSOR_WINDOW.saturating_mul(u32::try_from(stay).unwrap_or(u32::MAX)));
        }
    }
}

impl Default for ProcessorTime {
    fn default() -> Self {
        Self::new()
    }
}

impl TenantTime {
    /// Takes what was used into the average, when window `window` begins; the last one began `windows` before. Returns
    /// whether the tenant is still active.
    fn pass_window(&self, window: u64, windows: u64) -> bool {
        let used = self.used_ns.swap(0, Ordering::Relaxed) / windows;
        if used > 0 {
            self.seen_in.store(window, Ordering::Relaxed);
        }
        let before = self.average_ns.load(Ordering::Relaxed);
        // After a pause, what was before it no longer counts.
        let before = before >> windows.saturating_sub(1).min(63);
        self.average_ns.store(before.midpoint(used), Ordering::Relaxed);
        let idle = window.saturating_sub(self.seen_in.load(Ordering::Relaxed));
        let is_active = idle <= windows_in(TENANT_ACTIVE);
        self.is_active.store(is_active, Ordering::Release);
        is_active
    }
}

/// How many windows there are in a time.
fn windows_in(time: Duration) -> u64 {
    u64::try_from(time.as_millis() / PROCESSOR_WINDOW.as_millis()).unwrap_or(u64::MAX)
}

/// What a tenant may use when there is not enough for all, given what each has used of `capacity`: the level at which
/// [`SHARED_PERCENT`] of it all would be used if nobody used more. `u64::MAX` if nobody is in the way of anybody: the
/// processors are not busy, one tenant is alone, or all are equal.
fn fair_share(uses: &mut [u64], capacity: u64) -> u64 {
    let total: u64 = uses.iter().sum();
    if uses.len() < 2 || total < capacity / 100 * BUSY_PERCENT {
        return u64::MAX;
    }
    uses.sort_unstable();
    let mut left = total / 100 * SHARED_PERCENT;
    for (nth, used) in uses.iter().enumerate() {
        let level = left / (uses.len() - nth) as u64;
        if *used > level {
            return if nth == 0 { u64::MAX } else { level.max(capacity / 100 * HARMLESS_PERCENT) };
        }
        left -= used;
    }
    u64::MAX
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::SLOW_DISK_PAUSE_MAX;

    const CAPACITY: u64 = 20_000_000;

    #[test]
    fn who_takes_far_more_than_others_is_over_its_share_when_the_processors_are_busy() {
        let over = |uses: &[u64]| {
            let share = fair_share(&mut uses.to_vec(), CAPACITY);
            uses.iter().map(|used| *used > share).collect::<Vec<_>>()
        };
        assert_eq!(over(&[18_000_000]), [false], "alone");
        assert_eq!(over(&[18_000_000, 500_000]), [true, false]);
        assert_eq!(over(&[3_000_000, 500_000]), [false, false], "there is time for both");
        assert_eq!(over(&[9_000_000, 9_000_000]), [false, false], "equals");
        assert_eq!(over(&[30_000, 1_900_000, 3_000_000]), [false, false, true], "a tenth is nobody's harm");
        assert_eq!(over(&[9_000_000, 300_000, 9_000_000]), [true, false, true]);
        let mut many = vec![20_000; 100];
        many.extend([2_200_000; 8]);
        assert_eq!(over(&many).iter().filter(|over| **over).count(), 8);
    }

    fn windows(time: &ProcessorTime, from: u64, count: u64, uses: &[(&Arc<TenantTime>, u32)]) {
        for window in from..from + count {
            let now = time.0.began + PROCESSOR_WINDOW * u32::try_from(window).expect("few");
            for (tenant, percent) in uses {
                time.note(tenant, PROCESSOR_WINDOW * *percent / 100, now);
            }
        }
    }

    #[test]
    fn a_tenant_is_in_the_slow_lane_soon_and_for_a_while() {
        let time = ProcessorTime::new();
        let all = u32::try_from(100 * time.0.processors).expect("few");
        let strangers = time.of_strangers();
        let tenant = time.of_owner(TimeOwner::Key(KeyId([1; 6])));
        windows(&time, 1, 50, &[(&strangers, all)]);
        assert!(!time.is_slow(&strangers) && time.is_alone(&strangers), "nobody else wants anything");
        windows(&time, 51, 1, &[(&tenant, 3)]);
        assert!(time.is_slow(&strangers), "at once, when another one comes");
        windows(&time, 52, 12, &[(&tenant, 3), (&strangers, all)]);
        assert!(time.is_slow(&strangers) && !time.is_slow(&tenant) && !time.is_alone(&strangers));
        let stay = windows_in(SLOW_LANE_STAY);
        windows(&time, 64, stay - 2, &[(&tenant, 3)]);
        assert!(time.is_slow(&strangers), "bursts do not help");
        windows(&time, 62 + stay, 20, &[(&tenant, 3)]);
        assert!(!time.is_slow(&strangers));
        windows(&time, 82 + stay, 1, &[(&tenant, 3), (&strangers, all)]);
        windows(&time, 83 + stay, 3, &[(&tenant, 3)]);
        assert!(time.is_slow(&strangers));
        windows(&time, 86 + stay, stay / 2, &[(&tenant, 3)]);
        assert!(!time.is_slow(&strangers), "one request is soon forgotten");
        windows(&time, 90 + stay * 2, 10, &[(&tenant, 3), (&strangers, all)]);
        windows(&time, 100 + stay * 2, windows_in(TENANT_ACTIVE) + 2, &[(&strangers, all)]);
        assert!(!time.is_slow(&strangers), "the other one has gone");
    }

    /// A fleet that connected put itself in the slow lane.
    #[test]
    fn strangers_that_use_little_are_no_reason_for_the_slow_lane_and_those_that_use_much_are_in_it() {
        let time = ProcessorTime::new();
        let all = u32::try_from(100 * time.0.processors).expect("few");
        let strangers = time.of_strangers();
        let tenant = time.of_owner(TimeOwner::Key(KeyId([1; 6])));
        windows(&time, 1, 50, &[(&tenant, all)]);
        windows(&time, 51, 20, &[(&tenant, all), (&strangers, 1)]);
        assert!(!time.is_slow(&tenant) && !time.is_somebody_slow() && !time.is_contended());
        windows(&time, 71, 20, &[(&tenant, 10), (&strangers, all)]);
        assert!(time.is_slow(&strangers) && !time.is_slow(&tenant));
        windows(&time, 91, 20, &[(&tenant, 10)]);
        assert!(time.is_slow(&strangers), "bursts do not help");
    }

    #[tokio::test(start_paused = true)]
    async fn in_the_slow_lane_a_tenant_pauses_after_what_others_wait_behind() {
        let time = ProcessorTime::new();
        let tenant = time.of_owner(TimeOwner::Key(KeyId([1; 6])));
        let turns = tenant.log_turns.clone();
        let all = u32::try_from(SLOW_IN_FLIGHT_BYTES_MAX).expect("fits");
        let permits = turns.clone().try_acquire_many_owned(all).expect("free");
        let turn = time.disk_turn(permits, 10_000);
        std::thread::sleep(Duration::from_millis(1));
        drop(turn);
        assert_eq!(turns.available_permits(), 0);
        tokio::time::sleep(SLOW_DISK_PAUSE_MAX - Duration::from_millis(2)).await;
        assert_eq!(turns.available_permits(), 0);
        tokio::time::sleep(SLOW_DISK_PAUSE_MAX).await;
        let permits = turns.clone().try_acquire_many_owned(all).expect("back, however long the turn took");
        drop(time.disk_turn(permits, 0));
        assert_eq!(
            turns.available_permits(),
            SLOW_IN_FLIGHT_BYTES_MAX,
            "without a pause they are back at once"
        );
    }

    #[test]
    fn a_tenant_that_nobody_serves_is_forgotten() {
        let time = ProcessorTime::new();
        for n in 0..10_000_u32 {
            let [a, b, c, d] = n.to_be_bytes();
            drop(time.of_owner(TimeOwner::Key(KeyId([a, b, c, d, 0, 0]))));
        }
        assert!(time.0.tenants.lock().len() < 100);
    }
}
