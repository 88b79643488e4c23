//! A turn of a tenant in the slow lane to have something written that others wait for: while it is kept, and for a while
//! after, the tenant has none of that under way. The disk, and the threads that write to it, serve one after the other,
//! whatever the priority of who asks: so a tenant that brings much has to leave them to others for most of the time.

use std::time::Instant;

use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;

use crate::limits::{SLOW_DISK_PAUSE_MAX, SLOW_LARGE_PAUSES, SLOW_LARGE_PAUSES_MAX};

/// What the tenant has under way. Its permits come back some time after this is dropped.
#[derive(Debug)]
pub struct DiskTurn {
    permits: Option<OwnedSemaphorePermit>,
    began: Instant,
    /// How long they stay away, as a multiple of how long the turn took.
    pauses: u32,
    /// Where that is waited for.
    usual: Option<Handle>,
}

impl DiskTurn {
    pub(super) fn new(permits: OwnedSemaphorePermit, pauses: u32, usual: Option<Handle>) -> Self {
        Self { permits: Some(permits), began: Instant::now(), pauses, usual }
    }
}

/// How long the turn for a request of so many bytes stays away, as a multiple of how long it takes.
pub fn pauses_after_large(bytes: usize) -> u32 {
    let tenths = u32::try_from(bytes / ((1 << 20) / 10)).unwrap_or(u32::MAX).max(10);
    (SLOW_LARGE_PAUSES.saturating_mul(tenths.saturating_mul(tenths)) / 100).min(SLOW_LARGE_PAUSES_MAX)
}

impl Drop for DiskTurn {
    fn drop(&mut self) {
        let pause = self.began.elapsed().saturating_mul(self.pauses).min(SLOW_DISK_PAUSE_MAX);
        let Some(usual) = self.usual.take().filter(|_| !pause.is_zero()) else { return };
        let permits = self.permits.take();
        usual.spawn(async move {
            tokio::time::sleep(pause).await;
            drop(permits);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_a_request_the_longer_its_tenant_leaves_the_disk_to_others() {
        let pauses = [200 << 10, 1 << 20, 2 << 20, 4 << 20, 16 << 20, usize::MAX].map(pauses_after_large);
        assert_eq!(pauses, [4, 4, 16, 64, 100, 100]);
    }
}
