//! A solo commit: while one small submission comes after the other, the thread that brings it commits it itself. That
//! saves two wake-ups, the commit thread's and then the caller's, which at such a load cost as much as the sync.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::block_in_place;

use super::embedded::{EmbeddedLogShared, WriterExitGuard};
use super::queue::{SOLO_COMMITTER, WriterSubmission};
use super::writer::LogWriter;

/// What a caller commits with.
pub(super) struct SoloCommitter {
    pub(super) shared: Arc<EmbeddedLogShared>,
    pub(super) writer: Arc<Mutex<LogWriter>>,
}

impl SoloCommitter {
    /// Commits and answers the submission, or gives it back for the queue: unless it is likely to be the only one, and
    /// this thread may block.
    pub(super) fn try_commit(&self, submission: WriterSubmission) -> Result<(), WriterSubmission> {
        if !self.shared.queue.is_solo() || !may_block() {
            return Err(submission);
        }
        // Who holds the writer commits, or does the upkeep.
        let Some(mut writer) = self.writer.try_lock() else { return Err(submission) };
        let Some(weight) = self.shared.queue.begin_solo_turn(&submission) else { return Err(submission) };
        let _ended = WriterExitGuard(self.shared.clone());
        // The disk may stall: what else this thread has to do is done by another one meanwhile.
        block_in_place(|| {
            let mut group = vec![submission];
            // After an error a commit thread tries again, and waits it out.
            let written = writer.commit(SOLO_COMMITTER, &mut group);
            drop(writer);
            if let Ok(written) = written {
                self.shared.sync(SOLO_COMMITTER, written);
                self.shared.unsettled.settle(&self.shared);
            }
            let has_failed = self.shared.unsettled.failure().is_some();
            self.shared.queue.end_solo_turn(weight, group, has_failed);
        });
        Ok(())
    }
}

/// Whether the rest of the work of this thread goes on elsewhere while it blocks.
fn may_block() -> bool {
    Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::MultiThread)
}
