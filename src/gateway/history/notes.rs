//! What a gateway has followed, and its copy of the registry, as they are written to its data directory beside the checks:
//! the disk may stand still, and no check waits for it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tracing::warn;

use super::FollowedHistory;
use crate::auth::Registry;

/// The least time between two writes of what was followed.
const FOLLOWED_SAVE_INTERVAL_MIN: Duration = Duration::from_secs(2);
/// The copy of the registry is written again after so many times as long as that took: a large one seldom.
const REGISTRY_COPY_REST: u32 = 50;

/// What the newest check has found.
#[derive(Clone)]
pub(super) struct CheckedHistory {
    pub(super) known: FollowedHistory,
    /// Whether somebody has to decide, who has to know what this gateway knows.
    pub(super) is_broken: bool,
}

/// The writing task's state.
pub(super) struct HistoryNotes {
    dir: PathBuf,
    registry: Arc<Registry>,
    saved: FollowedHistory,
    saved_at: Instant,
    /// The revision of the registry's copy, and when the next one may be written.
    copied: (u64, Instant),
}

impl HistoryNotes {
    /// In a directory in which `saved` is noted.
    pub(super) fn new(dir: PathBuf, registry: Arc<Registry>, saved: FollowedHistory) -> Self {
        let now = Instant::now();
        Self { dir, registry, saved, saved_at: now, copied: (0, now) }
    }

    /// Writes after each check, as often as that may be, until there are no more.
    pub(super) async fn write(mut self, mut checked: watch::Receiver<CheckedHistory>) {
        while checked.changed().await.is_ok() {
            let CheckedHistory { known, is_broken } = checked.borrow_and_update().clone();
            if is_broken || self.saved_at.elapsed() >= FOLLOWED_SAVE_INTERVAL_MIN {
                self.save_followed(known).await;
            }
            if is_broken || self.copied.1 <= Instant::now() {
                self.save_copy().await;
            }
        }
    }

    /// Writes what was followed, if that is not what was written last.
    async fn save_followed(&mut self, known: FollowedHistory) {
        if known == self.saved {
            return;
        }
        self.saved_at = Instant::now();
        let dir = self.dir.clone();
        let saving = move || match known.save(&dir) {
            Ok(()) => Ok(known),
            Err(error) => Err(error.to_string()),
        };
        match spawn_blocking(saving).await.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(saved) => self.saved = saved,
            Err(error) => warn!(error, "what this gateway has followed cannot be noted"),
        }
    }

    /// Writes the copy of the registry, if it has changed.
    async fn save_copy(&mut self) {
        let copied = self.copied.0;
        let (registry, dir, begun) = (self.registry.clone(), self.dir.clone(), Instant::now());
        let copying = move || {
            let revision = registry.applied_revision();
            if revision == copied {
                return Ok(copied);
            }
            let copy = registry.copy_cluster_rows().map_err(|error| error.to_string())?;
            copy.save(&dir).map_err(|error| error.to_string())?;
            Ok::<_, String>(copy.revision)
        };
        match spawn_blocking(copying).await.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(revision) => self.copied.0 = revision,
            Err(error) => warn!(error, "the copy of the cluster's registry cannot be written"),
        }
        self.copied.1 = Instant::now() + begun.elapsed() * REGISTRY_COPY_REST;
    }
}
