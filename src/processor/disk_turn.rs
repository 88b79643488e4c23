//! A turn of a tenant in the slow lane to have something written that others wait for: while it is kept, and for a while
//! after, the tenant has none of that under way. The disk, and the threads that write to it, serve one after the other,
//! whatever the priority of who asks: so a tenant that brings much has to leave them to others for most of the time.

use std::time::Instant;

use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;

use crate::limits::SLOW_DISK_PAUSE_MAX;

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
