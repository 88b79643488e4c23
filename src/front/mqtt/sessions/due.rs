//! When the wills and expiries of clients that are away are due. An entry goes with the client that it is of,
//! however that comes back or ends: clients that come and go leave nothing behind.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::ClientKey;

/// The due times of all clients that are away.
#[derive(Default)]
pub(super) struct DueTimes(Mutex<DueQueue>);

#[derive(Default)]
struct DueQueue {
    queue: BTreeMap<DueTime, ClientKey>,
    /// A counter that keeps two due times at the same instant apart.
    entered: u64,
}

type DueTime = (Instant, u64);

/// One entry, for as long as it is kept.
pub(super) struct DueEntry {
    times: Arc<DueTimes>,
    at: DueTime,
}

impl DueTimes {
    /// Enters a client.
    pub(super) fn enter(self: &Arc<Self>, due: Instant, key: ClientKey) -> DueEntry {
        let mut times = self.0.lock();
        times.entered += 1;
        let at = (due, times.entered);
        times.queue.insert(at, key);
        DueEntry { times: self.clone(), at }
    }

    /// Takes out a client whose time has come.
    pub(super) fn take_due(&self, now: Instant) -> Option<ClientKey> {
        let mut times = self.0.lock();
        times.queue.first_entry().filter(|first| first.key().0 <= now).map(|first| first.remove())
    }
}

impl Drop for DueEntry {
    fn drop(&mut self) {
        self.times.0.lock().queue.remove(&self.at);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::message::DatasourceId;

    #[test]
    fn a_client_that_comes_and_goes_has_one_entry_at_a_time() {
        let times = Arc::new(DueTimes::default());
        let key: ClientKey = (DatasourceId::all(), "client".into());
        let week = Duration::from_secs(7 * 24 * 3_600);
        let mut present = None;
        for _ in 0..1_000 {
            present = Some(times.enter(Instant::now() + week, key.clone()));
        }
        assert_eq!(times.0.lock().queue.len(), 1);
        assert_eq!(times.take_due(Instant::now()), None);
        assert_eq!(times.take_due(Instant::now() + 2 * week), Some(key));
        drop(present);
        assert_eq!(times.0.lock().queue.len(), 0);
    }
}
