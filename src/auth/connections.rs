//! The live connections that a key has opened, so that they can be closed when it dies.
//!
//! A front makes a [`ConnectionControl`] for each connection and enters it into its key's [`KeyConnections`]
//! before it serves the first message. When the registry revokes the key it closes the whole set, and
//! the set stays closed: a connection whose key was looked up just before, but which enters just after,
//! is told to close as it enters. So a connection cannot outlive its key, whichever comes first.

use parking_lot::{Mutex, MutexGuard};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

/// Why a live connection has to close.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum CloseReason {
    /// The connection's key was revoked or has expired, or its datasource was deleted.
    KeyDead = 1,
    /// The same client connected again.
    TakenOver = 2,
    /// The gateway is shutting down.
    Drain = 3,
    /// An administrator has closed it.
    Kicked = 4,
}

impl CloseReason {
    /// The reason with this number; `None` for 0.
    fn from_number(number: u8) -> Option<CloseReason> {
        [CloseReason::KeyDead, CloseReason::TakenOver, CloseReason::Drain, CloseReason::Kicked]
            .into_iter()
            .find(|why| *why as u8 == number)
    }
}

/// Tells one connection to close, once and with a reason. The connection's task polls it.
#[derive(Debug, Default)]
pub struct ConnectionControl {
    /// A [`CloseReason`] as a number, or 0.
    why: AtomicU8,
    task: AtomicWaker,
}

impl ConnectionControl {
    /// Tells the connection to close. The first reason is kept, unless the key is dead: the others let the
    /// connection take what its client had sent, and that must not keep whoever revokes the key waiting.
    pub fn close(&self, why: CloseReason) {
        let is_told = self.why.compare_exchange(0, why as u8, Ordering::AcqRel, Ordering::Acquire).is_ok();
        let key_dead = CloseReason::KeyDead as u8;
        if is_told || why == CloseReason::KeyDead && self.why.swap(key_dead, Ordering::AcqRel) != key_dead {
            self.task.wake();
        }
    }

    /// The reason, once there is one. Registers the task's waker in any case, for the first reason and for a dead key
    /// after it. Only one task may poll: a second one would replace the first one's waker.
    pub fn poll_closed(&self, cx: &mut Context<'_>) -> Poll<CloseReason> {
        self.task.register(cx.waker());
        self.closed().map_or(Poll::Pending, Poll::Ready)
    }

    /// The reason, if there is one yet. One atomic load.
    pub fn closed(&self) -> Option<CloseReason> {
        CloseReason::from_number(self.why.load(Ordering::Acquire))
    }
}

/// The live connections of one key.
///
/// There may be a million keys, few of them connected, and one key may have tens of thousands of
/// connections. An empty set is one small allocation, and each connection adds 12 bytes.
#[derive(Debug, Default)]
pub struct KeyConnections(Mutex<KeyConnectionsState>);

#[derive(Debug, Default)]
struct KeyConnectionsState {
    /// Set by [`KeyConnections::close_all`] and never reset.
    closed: Option<CloseReason>,
    /// Present while anyone is connected.
    live: Option<Box<LiveConnections>>,
}

#[derive(Debug, Default)]
struct LiveConnections {
    places: Vec<Option<Arc<ConnectionControl>>>,
    /// The indices in `places` that are `None`.
    free: Vec<u32>,
    /// Notified when the last connection leaves.
    gone: Arc<Notify>,
}

impl KeyConnections {
    /// Enters a connection; it leaves when the returned guard is dropped. If the set is closed, the
    /// connection is told to close at once.
    #[must_use = "the connection leaves when this is dropped"]
    pub fn enter(self: &Arc<Self>, control: Arc<ConnectionControl>) -> KeyConnectionGuard {
        let mut state = self.state();
        let live = state.live.get_or_insert_default();
        let entering = Some(Arc::clone(&control));
        let place = match live.free.pop() {
            Some(place) => {
                live.places[place as usize] = entering;
                place
            }
            None => {
                live.places.push(entering);
                u32::try_from(live.places.len() - 1).expect("fewer connections than 2³²")
            }
        };
        let closed = state.closed;
        drop(state);
        if let Some(why) = closed {
            control.close(why);
        }
        KeyConnectionGuard { connections: Arc::clone(self), place }
    }

    /// The number of connections in the set.
    pub fn count(&self) -> usize {
        self.state().live.as_ref().map_or(0, |live| live.places.len() - live.free.len())
    }

    /// Tells every connection to close, and every one that enters later. The first reason is kept.
    pub fn close_all(&self, why: CloseReason) {
        let why = *self.state().closed.get_or_insert(why);
        self.close_present(why);
    }

    /// Tells every connection to close that has entered, and none that enters later.
    pub fn close_present(&self, why: CloseReason) {
        let state = self.state();
        let live: Vec<_> =
            state.live.iter().flat_map(|live| &live.places).flatten().map(Arc::clone).collect();
        // Unlocked first: waking a task can drop it, and with it an `KeyConnectionGuard`, which locks this set.
        drop(state);
        for control in live {
            control.close(why);
        }
    }

    /// Waits until the set is empty.
    pub async fn wait_until_empty(&self) {
        loop {
            // Registered while the set is locked, so that the last connection cannot leave unnoticed.
            let gone = match &self.state().live {
                None => return,
                Some(live) => Arc::clone(&live.gone).notified_owned(),
            };
            gone.await;
        }
    }

    fn state(&self) -> MutexGuard<'_, KeyConnectionsState> {
        // Nothing panics under this lock except a failed allocation, which ends the process.
        self.0.lock()
    }
}

/// A connection's place among its key's [`KeyConnections`].
#[derive(Debug)]
pub struct KeyConnectionGuard {
    connections: Arc<KeyConnections>,
    place: u32,
}

impl Drop for KeyConnectionGuard {
    fn drop(&mut self) {
        let mut state = self.connections.state();
        let live = state.live.as_mut().expect("present while anyone is connected");
        let control = live.places[self.place as usize].take();
        live.free.push(self.place);
        let gone = (live.free.len() == live.places.len()).then(|| Arc::clone(&live.gone));
        if gone.is_some() {
            state.live = None;
        }
        drop(state);
        drop(control);
        if let Some(gone) = gone {
            gone.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::Barrier;
    use std::thread;

    use tokio::time::{Duration, timeout};

    use super::*;

    const RACES: usize = 2_000;

    async fn soon<T>(what: impl Future<Output = T>) -> T {
        timeout(Duration::from_secs(30), what).await.expect("happens within 30 s")
    }

    #[test]
    fn the_first_reason_stands_unless_the_key_is_dead() {
        let control = ConnectionControl::default();
        assert_eq!(control.closed(), None);
        control.close(CloseReason::TakenOver);
        control.close(CloseReason::Drain);
        assert_eq!(control.closed(), Some(CloseReason::TakenOver));
        control.close(CloseReason::KeyDead);
        control.close(CloseReason::Drain);
        assert_eq!(control.closed(), Some(CloseReason::KeyDead));
        for why in [CloseReason::KeyDead, CloseReason::TakenOver, CloseReason::Drain] {
            assert_eq!(CloseReason::from_number(why as u8), Some(why));
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_close_is_never_lost_on_a_task_that_is_just_beginning_to_wait() {
        for _ in 0..RACES {
            let control = Arc::new(ConnectionControl::default());
            let waiting = tokio::spawn({
                let control = Arc::clone(&control);
                async move { poll_fn(|cx| control.poll_closed(cx)).await }
            });
            control.close(CloseReason::Drain);
            assert_eq!(soon(waiting).await.expect("no panic"), CloseReason::Drain);
        }
    }

    #[test]
    fn every_live_connection_is_told_to_close_and_no_one_who_left() {
        let key = Arc::new(KeyConnections::default());
        let controls: Vec<_> = (0..4).map(|_| Arc::new(ConnectionControl::default())).collect();
        let mut entered: Vec<_> = controls.iter().map(|control| key.enter(Arc::clone(control))).collect();
        drop(entered.remove(1));
        assert_eq!(key.count(), 3);
        let reused = Arc::new(ConnectionControl::default());
        entered.push(key.enter(Arc::clone(&reused)));
        assert_eq!(key.count(), 4);

        key.close_all(CloseReason::KeyDead);
        let told: Vec<_> = controls.iter().map(|control| control.closed()).collect();
        assert_eq!(
            told,
            [Some(CloseReason::KeyDead), None, Some(CloseReason::KeyDead), Some(CloseReason::KeyDead)]
        );
        assert_eq!(reused.closed(), Some(CloseReason::KeyDead));
        entered.clear();
        assert_eq!(key.count(), 0);
    }

    #[test]
    fn who_enters_a_closed_set_is_told_at_once() {
        let key = Arc::new(KeyConnections::default());
        key.close_all(CloseReason::KeyDead);
        key.close_all(CloseReason::Drain);
        let late = Arc::new(ConnectionControl::default());
        let entered = key.enter(Arc::clone(&late));
        assert_eq!(late.closed(), Some(CloseReason::KeyDead));
        assert_eq!(key.count(), 1, "still waited for");
        drop(entered);
        assert_eq!(key.count(), 0);
    }

    #[test]
    fn no_connection_survives_a_close_that_races_with_its_entering() {
        for _ in 0..RACES {
            let key = Arc::new(KeyConnections::default());
            let control = Arc::new(ConnectionControl::default());
            let start = Barrier::new(2);
            let entered = thread::scope(|scope| {
                let entering = scope.spawn(|| {
                    start.wait();
                    key.enter(Arc::clone(&control))
                });
                start.wait();
                key.close_all(CloseReason::KeyDead);
                entering.join().expect("no panic")
            });
            assert_eq!(control.closed(), Some(CloseReason::KeyDead));
            drop(entered);
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn gone_returns_when_the_last_connection_has_left() {
        let key = Arc::new(KeyConnections::default());
        soon(key.wait_until_empty()).await;
        for _ in 0..RACES {
            let [a, b] = [(); 2].map(|()| key.enter(Arc::new(ConnectionControl::default())));
            let waiting = tokio::spawn({
                let key = Arc::clone(&key);
                async move {
                    key.wait_until_empty().await;
                    key.count()
                }
            });
            drop(a);
            assert!(!waiting.is_finished(), "one is still there");
            drop(b);
            assert_eq!(soon(waiting).await.expect("no panic"), 0);
        }
    }

    #[tokio::test]
    async fn a_task_that_drops_its_connection_as_it_is_woken_does_not_deadlock() {
        use std::task::{Wake, Waker};

        struct Leaves(Mutex<Option<KeyConnectionGuard>>);
        impl Wake for Leaves {
            fn wake(self: Arc<Self>) {
                drop(self.0.lock().take());
            }
        }
        let key = Arc::new(KeyConnections::default());
        let control = Arc::new(ConnectionControl::default());
        let entered = key.enter(Arc::clone(&control));
        let waker = Waker::from(Arc::new(Leaves(Mutex::new(Some(entered)))));
        assert!(control.poll_closed(&mut Context::from_waker(&waker)).is_pending());
        key.close_all(CloseReason::KeyDead);
        assert_eq!(key.count(), 0);
    }

    #[test]
    fn a_key_without_connections_costs_little() {
        assert!(size_of::<KeyConnections>() <= 24, "{}", size_of::<KeyConnections>());
        assert!(size_of::<ConnectionControl>() <= 32, "{}", size_of::<ConnectionControl>());
    }
}
