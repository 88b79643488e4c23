//! The wills that were refused for a cause that passes: the log has no room, or a rate holds them back for too long. Each
//! is published again after a pause. Its copy stays in the store meanwhile: a gateway that ends leaves it to its next run.

use std::collections::BTreeMap;
use std::time::Instant;

use parking_lot::Mutex;
use tracing::warn;

use super::super::wills::MqttWill;
use crate::shares::TenantShares;

/// The refused wills, by the time at which they are published again.
#[derive(Default)]
pub(super) struct RefusedWills(Mutex<RefusedWillQueue>);

#[derive(Default)]
struct RefusedWillQueue {
    waiting: BTreeMap<(Instant, u64), Box<MqttWill>>,
    /// A counter that keeps two wills at the same instant apart.
    entered: u64,
    /// The gateway ends, and publishes none of them again.
    is_closed: bool,
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
            drop(queue);
            warn!(datasource = %will.datasource(), "a refused will is given up: too many wait to be published again");
            return;
        }
        will.note_due();
        queue.entered += 1;
        let at = (Instant::now() + will.retry_pause(), queue.entered);
        queue.waiting.insert(at, will);
    }

    /// Takes out those that are to be published again.
    pub(super) fn take_due(&self, now: Instant) -> Vec<Box<MqttWill>> {
        let mut queue = self.0.lock();
        let mut due = Vec::new();
        while let Some(first) = queue.waiting.first_entry().filter(|first| first.key().0 <= now) {
            due.push(first.remove());
        }
        due
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
