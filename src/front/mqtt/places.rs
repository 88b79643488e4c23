//! The places of MQTT connections: `mqtt.connections_max`. A client knows that its connection has ended before the gateway
//! is done with it, so a new connection waits a little for a place instead of being refused at once.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::limits::MQTT_PLACE_WAITERS_MAX;

/// For how long a connection waits for a place.
const PLACE_PATIENCE: Duration = Duration::from_millis(500);

/// The places of all connections.
#[derive(Clone)]
pub(super) struct ConnectionPlaces {
    free: Arc<Semaphore>,
    /// How many more connections may wait.
    waiting: Arc<Semaphore>,
}

/// A connection's turn to wait for a place.
pub(super) struct PlaceWait {
    free: Arc<Semaphore>,
    _waiting: OwnedSemaphorePermit,
}

impl ConnectionPlaces {
    /// So many places.
    pub(super) fn new(connections_max: usize) -> Self {
        Self {
            free: Arc::new(Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS))),
            waiting: Arc::new(Semaphore::new(MQTT_PLACE_WAITERS_MAX)),
        }
    }

    /// A place, if one is free now. It is free again when the permit is dropped.
    pub(super) fn try_take(&self) -> Option<OwnedSemaphorePermit> {
        self.free.clone().try_acquire_owned().ok()
    }

    /// Begins to wait for a place, unless too many do.
    pub(super) fn begin_waiting(&self) -> Option<PlaceWait> {
        let waiting = self.waiting.clone().try_acquire_owned().ok()?;
        Some(PlaceWait { free: self.free.clone(), _waiting: waiting })
    }
}

impl PlaceWait {
    /// A place that is free within [`PLACE_PATIENCE`].
    pub(super) async fn take(self) -> Option<OwnedSemaphorePermit> {
        timeout(PLACE_PATIENCE, self.free.acquire_owned()).await.ok()?.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::pin::pin;
    use std::task::Poll;
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn a_place_that_is_given_back_is_for_who_waits_and_not_for_who_comes_then() {
        let places = ConnectionPlaces::new(1);
        let earlier = places.try_take().expect("it is free");
        assert!(places.try_take().is_none());
        let mut waits = pin!(places.begin_waiting().expect("nobody waits").take());
        assert!(poll_fn(|cx| Poll::Ready(waits.as_mut().poll(cx).is_pending())).await);
        drop(earlier);
        assert!(places.try_take().is_none());
        let later = waits.await;
        assert!(later.is_some() && places.try_take().is_none());
        drop(later);
        assert!(places.try_take().is_some());
    }

    #[tokio::test]
    async fn only_so_many_wait_and_not_for_long() {
        let places = ConnectionPlaces::new(0);
        let begun = Instant::now();
        let mut waits: Vec<_> = (0..MQTT_PLACE_WAITERS_MAX).filter_map(|_| places.begin_waiting()).collect();
        assert_eq!(waits.len(), MQTT_PLACE_WAITERS_MAX);
        assert!(places.begin_waiting().is_none());
        assert!(waits.remove(0).take().await.is_none());
        assert!(begun.elapsed() >= PLACE_PATIENCE);
        assert!(places.begin_waiting().is_some(), "one has gone");
    }
}
