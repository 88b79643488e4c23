//! How far a backup is, and whether it is to end.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::BackupError;

/// What the thread of a backup and those who ask about it share.
#[derive(Default)]
pub(super) struct BackupProgress {
    done: AtomicU64,
    total: AtomicU64,
    is_cancelled: AtomicBool,
}

impl BackupProgress {
    /// Bytes that are done, and of how many; 0 until that is known.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }

    /// Sets how many bytes there are to do.
    pub(super) fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    /// Notes that so many more are done.
    ///
    /// # Errors
    /// [`BackupError::Cancelled`].
    pub(super) fn advance(&self, bytes: u64) -> Result<(), BackupError> {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        if self.is_cancelled.load(Ordering::Relaxed) { Err(BackupError::Cancelled) } else { Ok(()) }
    }

    /// Ends the backup at its next step.
    pub(super) fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }
}
