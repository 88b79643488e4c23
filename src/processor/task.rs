//! A fair task: what serves a client, wherever its tenant's share of the processors lets it run.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::task::futures::TaskLocalFuture;
use tokio_util::task::AbortOnDropHandle;

use super::lane::{TaskLane, USUAL_RUNTIME};
use super::poll_clock::PollClock;
use super::{ProcessorTime, TenantTime};
use crate::limits::NEWCOMER_NS;
use crate::scheduler::{is_lowered, thread_time};

/// Who pays for a client's tasks: first the strangers, then the tenant of the key that it presents.
pub struct TaskPayer {
    time: ProcessorTime,
    tenant: ArcSwap<TenantTime>,
    /// What this client has used.
    used_ns: AtomicU64,
    /// What of that is nobody's yet: a client that presents its key soon never was a stranger.
    unpaid_ns: AtomicU64,
    is_known: AtomicBool,
}

impl TaskPayer {
    /// A stranger's.
    pub fn stranger(time: &ProcessorTime) -> Arc<Self> {
        let tenant = ArcSwap::new(time.of_strangers());
        Arc::new(Self {
            time: time.clone(),
            tenant,
            used_ns: AtomicU64::new(0),
            unpaid_ns: AtomicU64::new(0),
            is_known: AtomicBool::new(false),
        })
    }

    /// From now on `tenant` pays, also for what is nobody's yet.
    pub fn set(&self, tenant: Arc<TenantTime>) {
        self.tenant.store(tenant);
        self.is_known.store(true, Ordering::Relaxed);
        self.pay(Duration::ZERO);
    }

    /// Lets the task that this is called in go on where its tenant's tasks run, now that it is known: a long piece of
    /// work that comes next would delay newcomers.
    pub async fn change_lane(&self) {
        if self.lane() == TaskLane::Slow && !is_lowered() {
            tokio::task::yield_now().await;
        }
    }

    /// Notes that the client was answered without a key: it is no newcomer any more, but one of the crowd.
    pub fn end_welcome(&self) {
        self.used_ns.fetch_max(NEWCOMER_NS + 1, Ordering::Relaxed);
    }

    /// Whether it is not known yet whose it is, and others wait behind it to be let in.
    pub fn is_newcomer(&self) -> bool {
        self.lane() == TaskLane::Newcomers
    }

    /// Has the tenant pay for `used`, and for what is nobody's yet.
    fn pay(&self, used: Duration) {
        let used = used + Duration::from_nanos(self.unpaid_ns.swap(0, Ordering::Relaxed));
        self.time.note(&self.tenant.load(), used, Instant::now());
    }

    /// Whether nobody but this tenant has anything to do.
    pub fn is_alone(&self) -> bool {
        self.time.is_alone(&self.tenant.load())
    }

    /// Where its tasks run now.
    #[inline]
    fn lane(&self) -> TaskLane {
        if !self.time.is_somebody_slow() || !self.time.is_slow(&self.tenant.load()) {
            TaskLane::Usual
        } else if self.is_known.load(Ordering::Relaxed) || self.used_ns.load(Ordering::Relaxed) > NEWCOMER_NS
        {
            TaskLane::Slow
        } else {
            TaskLane::Newcomers
        }
    }

    /// Polls, and notes what that takes.
    #[inline]
    fn poll_measured<F: Future + ?Sized>(&self, work: Pin<&mut F>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let Some(weight) = self.time.next_weight(&self.tenant.load()) else { return work.poll(cx) };
        let clock = PollClock::start();
        let polled = work.poll(cx);
        let (used, now) = clock.stop();
        let used = used * weight;
        let used_ns = u64::try_from(used.as_nanos()).unwrap_or(u64::MAX);
        let before = self.used_ns.fetch_add(used_ns, Ordering::Relaxed);
        if self.is_known.load(Ordering::Relaxed) {
            self.time.note(&self.tenant.load(), used, now);
        } else if before.saturating_add(used_ns) > NEWCOMER_NS {
            self.pay(used);
        } else {
            self.unpaid_ns.fetch_add(used_ns, Ordering::Relaxed);
        }
        polled
    }
}

impl Drop for TaskPayer {
    fn drop(&mut self) {
        // It has left without a key.
        if *self.unpaid_ns.get_mut() > 0 {
            self.pay(Duration::ZERO);
        }
    }
}

tokio::task_local! {
    /// Who pays for the task that asks.
    static PRESENT_PAYER: Arc<TaskPayer>;
}

/// Runs work that reads or computes for long on a blocking thread, at the priority of the calling task's lane. Whoever pays
/// for the task pays for it.
pub fn spawn_reading<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    tokio::task::spawn_blocking(paid(work))
}

/// `work` for which whoever pays for the calling task pays, on whichever thread it is done.
pub fn paid<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
    let payer = PRESENT_PAYER.try_with(Arc::clone).ok();
    move || {
        let before = thread_time();
        let done = work();
        if let Some(payer) = payer {
            payer.pay(thread_time().saturating_sub(before));
        }
        done
    }
}

type BoxedWork<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Work that goes to another lane while its payer is there, and comes back.
pub struct FairTask<T> {
    payer: Arc<TaskPayer>,
    place: TaskPlace<T>,
}

enum TaskPlace<T> {
    Here(BoxedWork<T>),
    /// In another lane, which gives it back if it is not done.
    Away(AbortOnDropHandle<LaneVisitEnd<T>>),
    Nowhere,
}

enum LaneVisitEnd<T> {
    Done(T),
    Back(BoxedWork<T>),
}

impl<T: Send + 'static> FairTask<T> {
    /// `work` of a client for whom `payer` pays.
    pub fn new(payer: Arc<TaskPayer>, work: impl Future<Output = T> + Send + 'static) -> Self {
        let work = PRESENT_PAYER.scope(payer.clone(), work);
        Self { payer, place: TaskPlace::Here(Box::pin(work)) }
    }
}

impl<T: Send + 'static> Future for FairTask<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let this = &mut *self;
        loop {
            this.place = match std::mem::replace(&mut this.place, TaskPlace::Nowhere) {
                TaskPlace::Here(mut work) => match this.payer.lane() {
                    TaskLane::Usual => {
                        let polled = this.payer.poll_measured(work.as_mut(), cx);
                        this.place = TaskPlace::Here(work);
                        return polled;
                    }
                    lane => {
                        let visit = LaneVisit::new(this.payer.clone(), lane, work);
                        TaskPlace::Away(AbortOnDropHandle::new(lane.runtime().spawn(visit)))
                    }
                },
                TaskPlace::Away(mut visit) => match Pin::new(&mut visit).poll(cx) {
                    Poll::Ready(Ok(LaneVisitEnd::Done(output))) => return Poll::Ready(output),
                    Poll::Ready(Ok(LaneVisitEnd::Back(work))) => TaskPlace::Here(work),
                    // As if it had panicked here.
                    Poll::Ready(Err(error)) => match error.try_into_panic() {
                        Ok(panic) => std::panic::resume_unwind(panic),
                        // The process ends.
                        Err(_) => return Poll::Pending,
                    },
                    Poll::Pending => {
                        this.place = TaskPlace::Away(visit);
                        return Poll::Pending;
                    }
                },
                TaskPlace::Nowhere => return Poll::Pending,
            };
        }
    }
}

/// A task's stay in another lane.
struct LaneVisit<T> {
    payer: Arc<TaskPayer>,
    lane: TaskLane,
    work: Option<BoxedWork<T>>,
}

impl<T> LaneVisit<T> {
    /// The visit of `work` to `lane`, in which [`run_usually`](super::run_usually) finds the way back.
    fn new(payer: Arc<TaskPayer>, lane: TaskLane, work: BoxedWork<T>) -> TaskLocalFuture<Handle, Self> {
        let usual = payer.time.usual_runtime();
        USUAL_RUNTIME.scope(usual, Self { payer, lane, work: Some(work) })
    }
}

impl<T> Future for LaneVisit<T> {
    type Output = LaneVisitEnd<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<LaneVisitEnd<T>> {
        let this = &mut *self;
        if this.payer.lane() != this.lane
            && let Some(work) = this.work.take()
        {
            return Poll::Ready(LaneVisitEnd::Back(work));
        }
        let Some(work) = &mut this.work else { return Poll::Pending };
        Poll::Ready(LaneVisitEnd::Done(ready!(this.payer.poll_measured(work.as_mut(), cx))))
    }
}

/// Spawns `work` of a client for whom `payer` pays, which nobody waits for.
pub fn spawn_fairly(payer: &Arc<TaskPayer>, work: impl Future<Output = ()> + Send + 'static) {
    let (payer, usual, lane) = (payer.clone(), payer.time.usual_runtime(), payer.lane());
    if lane == TaskLane::Usual {
        usual.spawn(FairTask::new(payer, work));
        return;
    }
    // It begins where it is to run, so that a crowd of such tasks does not pass through the usual runtime.
    let work = PRESENT_PAYER.scope(payer.clone(), work);
    let visit = LaneVisit::new(payer.clone(), lane, Box::pin(work));
    lane.runtime().spawn(async move {
        if let LaneVisitEnd::Back(work) = visit.await {
            usual.spawn(FairTask { payer, place: TaskPlace::Here(work) });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::KeyId;

    fn niceness() -> i32 {
        // SAFETY: it takes integers only. 0 is the calling thread on Linux.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
    }

    /// Tells on each turn at which niceness it runs, and pauses.
    async fn tell(told: tokio::sync::mpsc::UnboundedSender<i32>) {
        while told.send(niceness()).is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn a_task_goes_to_the_slow_lane_and_comes_back_with_its_tenant() {
        let time = ProcessorTime::new();
        let payer = TaskPayer::stranger(&time);
        payer.used_ns.store(NEWCOMER_NS + 1, Ordering::Relaxed);
        let tenant = time.of_strangers();
        let (telling, mut told) = tokio::sync::mpsc::unbounded_channel();
        let task = tokio::spawn(FairTask::new(payer.clone(), tell(telling)));
        let usual = told.recv().await.expect("a turn");
        time.slow_down(&tenant);
        let wait = Duration::from_secs(20);
        let low = async { while told.recv().await.expect("a turn") == usual {} };
        tokio::time::timeout(wait, low).await.expect("it goes on at low priority");
        tenant.slow_until.store(0, Ordering::Relaxed);
        let back = async { while told.recv().await.expect("a turn") != usual {} };
        tokio::time::timeout(wait, back).await.expect("it comes back");
        drop(told);
        tokio::time::timeout(wait, task).await.expect("it ends").expect("without a panic");
    }

    /// Waits until the name of a thread that tells is one of those wanted.
    async fn told_by(
        told: &mut tokio::sync::mpsc::UnboundedReceiver<String>,
        is_wanted: impl Fn(&str) -> bool,
    ) {
        let found = async { while !is_wanted(&told.recv().await.expect("a turn")) {} };
        tokio::time::timeout(Duration::from_secs(20), found).await.expect("it comes to that thread");
    }

    fn thread_name() -> String {
        std::thread::current().name().unwrap_or_default().to_owned()
    }

    const LANES: [&str; 2] = ["newcomers", "slow-lane"];

    #[tokio::test]
    async fn a_task_that_nobody_waits_for_changes_lanes_with_its_payer_and_comes_back() {
        let time = ProcessorTime::new();
        let payer = TaskPayer::stranger(&time);
        let tenant = time.of_strangers();
        time.slow_down(&tenant);
        let (telling, mut told) = tokio::sync::mpsc::unbounded_channel();
        spawn_fairly(&payer, async move {
            while telling.send(thread_name()).is_ok() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        told_by(&mut told, |name| name == "newcomers").await;
        payer.used_ns.store(NEWCOMER_NS + 1, Ordering::Relaxed);
        told_by(&mut told, |name| name == "slow-lane").await;
        tenant.slow_until.store(0, Ordering::Relaxed);
        told_by(&mut told, |name| !LANES.contains(&name)).await;
    }

    #[tokio::test]
    async fn what_a_task_begins_in_another_lane_for_good_begins_on_the_usual_runtime() {
        let time = ProcessorTime::new();
        let strangers = time.of_strangers();
        time.slow_down(&strangers);
        let payer = TaskPayer::stranger(&time);
        payer.used_ns.store(NEWCOMER_NS + 1, Ordering::Relaxed);
        let seen = tokio::spawn(FairTask::new(payer, async move {
            let begun = time.usual_runtime().spawn(async { thread_name() });
            (thread_name(), begun.await.expect("no panic"))
        }));
        let (here, begun) = seen.await.expect("no panic");
        assert!(here == "slow-lane" && !LANES.contains(&begun.as_str()), "{here}, {begun}");
    }

    #[tokio::test]
    async fn what_may_lock_the_registry_has_the_usual_priority_in_the_slow_lane_too() {
        let time = ProcessorTime::new();
        let strangers = time.of_strangers();
        time.slow_down(&strangers);
        let usual = niceness();
        for task in 0..2 {
            let payer = TaskPayer::stranger(&time);
            payer.used_ns.store(NEWCOMER_NS + 1, Ordering::Relaxed);
            let (telling, told) = tokio::sync::oneshot::channel();
            let work = async move {
                let at = || (niceness(), crate::scheduler::is_lowered());
                let seen = (at(), crate::processor::run_usually(at).await.expect("no panic"));
                let _ = telling.send(seen);
            };
            match task {
                0 => spawn_fairly(&payer, work),
                _ => drop(tokio::spawn(FairTask::new(payer, work))),
            }
            let told = tokio::time::timeout(Duration::from_secs(20), told).await.expect("it ends");
            let (here, there) = told.expect("no panic");
            assert!(here.1 && here.0 > usual, "the task itself is in the slow lane: {here:?}");
            assert_eq!(there, (usual, false));
        }
        assert!(!crate::processor::run_usually(crate::scheduler::is_lowered).await.expect("no panic"));
    }

    #[tokio::test]
    async fn who_comes_is_let_in_first_and_a_task_that_is_dropped_ends_in_the_slow_lane_too() {
        let time = ProcessorTime::new();
        let strangers = time.of_strangers();
        time.slow_down(&strangers);
        let newcomer = TaskPayer::stranger(&time);
        assert_eq!(newcomer.lane(), TaskLane::Newcomers);
        let payer = TaskPayer::stranger(&time);
        payer.used_ns.store(NEWCOMER_NS + 1, Ordering::Relaxed);
        assert_eq!(payer.lane(), TaskLane::Slow);
        let (telling, mut told) = tokio::sync::mpsc::unbounded_channel();
        let task = tokio::spawn(FairTask::new(payer, tell(telling)));
        told.recv().await.expect("a turn");
        task.abort();
        let end = async { while told.recv().await.is_some() {} };
        tokio::time::timeout(Duration::from_secs(20), end).await.expect("nothing of it is left");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn a_crowd_of_newcomers_is_let_in_one_after_the_other() {
        let time = ProcessorTime::new();
        let strangers = time.of_strangers();
        time.slow_down(&strangers);
        let at_once = Arc::new(AtomicU64::new(0));
        let crowd: Vec<_> = (0..100)
            .map(|_| {
                let at_once = at_once.clone();
                tokio::spawn(FairTask::new(TaskPayer::stranger(&time), async move {
                    let mut most = 0;
                    for _ in 0..3 {
                        // Where it goes when it was interrupted for long.
                        if std::thread::current().name() == Some("slow-lane") {
                            break;
                        }
                        most = most.max(at_once.fetch_add(1, Ordering::SeqCst) + 1);
                        std::thread::yield_now();
                        at_once.fetch_sub(1, Ordering::SeqCst);
                        tokio::task::yield_now().await;
                    }
                    most
                }))
            })
            .collect();
        for task in crowd {
            let most = tokio::time::timeout(Duration::from_secs(20), task).await.expect("its turn comes");
            assert!(most.expect("no panic") <= 1);
        }
    }

    #[tokio::test]
    async fn a_client_that_presents_its_key_soon_never_was_a_stranger() {
        let time = ProcessorTime::new();
        let (strangers, tenant) = (time.of_strangers(), Arc::new(TenantTime::new(false)));
        for knows_key in [true, false] {
            let payer = TaskPayer::stranger(&time);
            let mut work = std::pin::pin!(std::future::ready(()));
            assert!(
                payer
                    .poll_measured(work.as_mut(), &mut Context::from_waker(std::task::Waker::noop()))
                    .is_ready()
            );
            if knows_key {
                payer.set(tenant.clone());
            }
            drop(payer);
            assert!(time.is_alone(if knows_key { &tenant } else { &strangers }) == knows_key);
        }
        assert!(!time.is_alone(&tenant), "one has left without a key");
    }

    /// The first read of a connection with a key of a tenant in the slow lane, of a thousand messages, kept newcomers
    /// waiting.
    #[tokio::test]
    async fn a_client_whose_tenant_is_in_the_slow_lane_is_no_newcomer_once_that_is_known() {
        let time = ProcessorTime::new();
        let (strangers, tenant) =
            (time.of_strangers(), time.of_owner(super::super::TimeOwner::Key(KeyId([1; 6]))));
        time.slow_down(&strangers);
        time.slow_down(&tenant);
        let payer = TaskPayer::stranger(&time);
        let (to_set, of_tenant) = (payer.clone(), tenant.clone());
        let task = tokio::spawn(FairTask::new(payer, async move {
            let before = thread_name();
            to_set.set(of_tenant);
            to_set.change_lane().await;
            (before, thread_name())
        }));
        let seen = tokio::time::timeout(Duration::from_secs(20), task).await.expect("it ends");
        assert_eq!(seen.expect("no panic"), (LANES[0].to_owned(), LANES[1].to_owned()));
        // One without a key is no newcomer when it was answered.
        let payer = TaskPayer::stranger(&time);
        assert!(payer.is_newcomer());
        payer.end_welcome();
        assert_eq!(payer.lane(), TaskLane::Slow);
    }

    /// A tenant whose requests read for long on blocking threads used none of the processors, it seemed.
    #[tokio::test]
    async fn who_pays_for_a_task_pays_for_what_it_has_blocking_threads_do() {
        let time = ProcessorTime::new();
        // No other window begins.
        time.0.window.store(u64::MAX, Ordering::Relaxed);
        let spin = || {
            let began = thread_time();
            while thread_time() - began < Duration::from_millis(20) {}
        };
        let lanes: [fn(Arc<TaskPayer>, Reading) -> Reading; 2] = [
            |payer, work| Box::pin(FairTask::new(payer, work)),
            |payer, work| {
                let (telling, told) = tokio::sync::oneshot::channel();
                spawn_fairly(&payer, async move {
                    work.await;
                    let _ = telling.send(());
                });
                Box::pin(async { told.await.expect("done") })
            },
        ];
        for lane in lanes {
            for runs_slowly in [false, true] {
                let (payer, tenant) = (TaskPayer::stranger(&time), Arc::new(TenantTime::new(false)));
                payer.set(tenant.clone());
                let reading = lane(
                    payer,
                    Box::pin(async move {
                        match runs_slowly {
                            true => crate::processor::run_slowly(spin).await.expect("no panic"),
                            false => spawn_reading(spin).await.expect("no panic"),
                        }
                    }),
                );
                tokio::time::timeout(Duration::from_secs(20), reading).await.expect("it ends");
                let used = tenant.used_ns.load(Ordering::Relaxed);
                assert!(used >= 20_000_000, "{used} ns of 20 ms");
            }
        }
    }

    type Reading = Pin<Box<dyn Future<Output = ()> + Send>>;

    #[tokio::test]
    async fn a_wait_for_the_disk_is_no_processor_time() {
        let payer = TaskPayer::stranger(&ProcessorTime::new());
        let mut work = std::pin::pin!(async { crate::scheduler::note_waited(Duration::from_secs(3_600)) });
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(payer.poll_measured(work.as_mut(), &mut cx).is_ready());
        assert_eq!(payer.used_ns.load(Ordering::Relaxed), 0);
    }
}
