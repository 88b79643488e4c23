//! The wills that were refused for a cause that passes: the log has no room, or a rate holds them back for too long. Each
//! is published again after a pause. Its copy stays in the store meanwhile: a gateway that ends leaves it to its next run.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::{debug, warn};

use super::super::wills::MqttWill;
use crate::message::DatasourceId;
use crate::shares::TenantShares;

/// How long nothing more is told of wills of a tenant that are given up.
const GIVEN_UP_TOLD_PAUSE: Duration = Duration::from_secs(60);

/// The refused wills, by the time at which they are published again.
#[derive(Default)]
pub(super) struct RefusedWills(Mutex<RefusedWillQueue>);

#[derive(Default)]
struct RefusedWillQueue {
    waiting: BTreeMap<(Instant, u64), Box<MqttWill>>,
    /// A counter that keeps two wills at the same instant apart.
    entered: u64,
    /// When it was last told of a tenant that wills of it are given up.
    told: HashMap<DatasourceId, Instant>,
    /// The gateway ends, and publishes none of them again.
    is_closed: bool,
}

impl RefusedWillQueue {
    /// Whether to tell now that a will of a tenant is given up: a flood of wills must not flood the log.
    fn is_to_be_told(&mut self, datasource: &DatasourceId, now: Instant) -> bool {
        let is_old = |told: &Instant| now.saturating_duration_since(*told) >= GIVEN_UP_TOLD_PAUSE;
        if self.told.get(datasource).is_some_and(|told| !is_old(told)) {
            return false;
        }
        self.told.retain(|_, told| !is_old(told));
        self.told.insert(datasource.clone(), now);
        true
    }
}

impl RefusedWills {
    /// Keeps a will that was refused, unless its tenant has too many of them. One that is refused at the end of the gateway
    /// takes nothing of a share: its copy stays.
    pub(super) fn keep(&self, mut will: Box<MqttWill>, shares: &TenantShares) {
        let mut queue = self.0.lock();
        if queue.is_closed {
            drop(queue);
            will.note_due();
            return will.leave_copy();
        }
        if will.charge_refused(shares).is_err() {
            let datasource = will.datasource();
            if queue.is_to_be_told(datasource, Instant::now()) {
                warn!(%datasource, "refused wills are given up: too many wait to be published again");
            } else {
                debug!(%datasource, "a refused will is given up");
            }
            drop(queue);
            return;
        }
        will.note_due();
        queue.entered += 1;
        let at = (Instant::now() + will.retry_pause(), queue.entered);
        queue.waiting.insert(at, will);
    }

    /// Takes out those that are to be published again.
    pub(super) fn take_due(&self, now: Instant) -> impl Iterator<Item = Box<MqttWill>> {
        let mut queue = self.0.lock();
        let later = queue.waiting.split_off(&(now, u64::MAX));
        std::mem::replace(&mut queue.waiting, later).into_values()
    }

    /// Leaves all of them, and those that are refused from now on, to whoever finds their copies.
    pub(super) fn close(&self) {
        let waiting = {
            let mut queue = self.0.lock();
            queue.is_closed = true;
            std::mem::take(&mut queue.waiting)
        };
        waiting.into_values().for_each(|will| will.leave_copy());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_wills_are_given_up_is_told_once_a_minute_of_each_tenant() {
        let mut queue = RefusedWillQueue::default();
        let (first, second) = (DatasourceId::all(), DatasourceId::new("press-4").expect("a slug"));
        let now = Instant::now();
        let told = [&first, &first, &second, &first].map(|of| queue.is_to_be_told(of, now));
        assert_eq!(told, [true, false, true, false]);
        assert!(!queue.is_to_be_told(&first, now + GIVEN_UP_TOLD_PAUSE / 2));
        assert!(queue.is_to_be_told(&first, now + GIVEN_UP_TOLD_PAUSE));
        assert_eq!(queue.told.len(), 1, "the other one is forgotten");
    }
}
