//! The wills of a node's clients in the bucket: written while the clients are connected, so that another node finds
//! them when this one is killed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use headgate_bridge_nats::{KvBucket, KvError};

use super::super::StoredWill;
use super::super::row::encode;
use super::node::{CELL_REFRESH_INTERVAL, CELLS_AT_ONCE};
use super::{will_key, wills_mark_key};

/// A node's wills, as the bucket should have them.
#[derive(Default)]
pub(super) struct NodeWills {
    mine: BTreeMap<u64, Arc<StoredWill>>,
    /// Those to be written, or to be removed.
    changed: BTreeSet<u64>,
    /// When all of them were written last, so that none ages away; `None`: there was none yet.
    refreshed_at: Option<Instant>,
}

impl NodeWills {
    /// Applies changes. Applying them twice does no harm.
    pub(super) fn apply(&mut self, changes: &BTreeMap<u64, Option<Arc<StoredWill>>>) {
        for (id, will) in changes {
            match will {
                Some(will) => _ = self.mine.insert(*id, will.clone()),
                None => _ = self.mine.remove(id),
            }
            self.changed.insert(*id);
        }
    }

    /// Writes what has changed, and from time to time all of it.
    pub(super) async fn write(&mut self, cells: &KvBucket, node: &str) -> Result<(), KvError> {
        if self.mine.is_empty() && self.changed.is_empty() {
            return Ok(());
        }
        if self.refreshed_at.is_none_or(|at| at.elapsed() >= CELL_REFRESH_INTERVAL) {
            // First: whoever finds a will has to find its node.
            cells.put(&wills_mark_key(node), Bytes::from_static(b"1"), None, None).await?;
            self.changed.extend(self.mine.keys());
            self.refreshed_at = Some(Instant::now());
        }
        let writes = self.changed.iter().map(|id| {
            let will = self.mine.get(id);
            async move {
                let written = match will {
                    Some(will) => {
                        cells.put(&will_key(node, *id), encode(&**will), None, None).await.map(drop)
                    }
                    None => cells.remove(&will_key(node, *id)).await,
                };
                written.map(|()| *id)
            }
        });
        let written: Vec<_> = stream::iter(writes).buffer_unordered(CELLS_AT_ONCE).collect().await;
        let mut failed = None;
        for written in written {
            match written {
                Ok(id) => _ = self.changed.remove(&id),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(()), Err)
    }
}
