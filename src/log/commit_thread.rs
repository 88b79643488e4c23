//! A commit thread: one of the two that commit, beside callers that do it themselves. Each holds the writer while it puts a commit together and writes it,
//! and syncs without it, so that the other one can write meanwhile.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tracing::{info, warn};

use super::embedded::EmbeddedLogShared;
use super::priority::{CommitPriority, take_lowered};
use super::queue::WriterDuty;
use super::writer::{LOG_WRITE_RETRY_PAUSE, LogWriter, WrittenCommit};

/// For how long nothing has to come before the log is written ahead.
const WRITE_AHEAD_IDLE: Duration = Duration::from_millis(50);
/// The pause between two pieces that are written ahead.
const WRITE_AHEAD_PAUSE: Duration = Duration::from_millis(5);
/// A commit of so many bytes is put together with its priority already.
const LARGE_COMMIT_BYTES: usize = 256 << 10;
/// How often the first thread runs retention when nothing is appended.
const WRITER_IDLE_INTERVAL: Duration = Duration::from_secs(1);

/// The state of one thread.
pub(super) struct CommitThread {
    /// Its number. The first one also does the upkeep, and closes the log.
    pub(super) number: usize,
    pub(super) shared: Arc<EmbeddedLogShared>,
    pub(super) writer: Arc<Mutex<LogWriter>>,
}

impl CommitThread {
    /// Commits until the queue is closed and empty.
    pub(super) fn run(self) {
        let mut priority = CommitPriority::find();
        if self.number == 0 {
            info!(priority = priority.describe(), "the threads that commit have their priority");
        }
        let mut upkeep_after = WRITE_AHEAD_IDLE;
        loop {
            match self.shared.queue.wait_for_duty(self.number, (self.number == 0).then_some(upkeep_after)) {
                WriterDuty::Commit { waited } => {
                    priority.note_wait(waited);
                    priority.raise_in_crowd();
                    self.take_turn(&mut priority);
                    upkeep_after = WRITE_AHEAD_IDLE;
                }
                WriterDuty::WaitOut => self.wait_out_failure(),
                WriterDuty::Upkeep => upkeep_after = self.keep_up(),
                WriterDuty::End => break,
            }
        }
        if self.number == 0 {
            self.close();
        }
    }

    /// Does what there is to do when nothing comes. Returns after which time there is more of it.
    fn keep_up(&self) -> Duration {
        let mut writer = self.writer.lock();
        if take_lowered() {
            warn!("a commit computed for so long that its thread lost its real-time priority");
        }
        writer.maintain();
        if writer.write_ahead() {
            WRITE_AHEAD_PAUSE
        } else if self.shared.trouble.is_present() {
            LOG_WRITE_RETRY_PAUSE
        } else {
            WRITER_IDLE_INTERVAL
        }
    }

    /// Commits what waits.
    fn take_turn(&self, priority: &mut CommitPriority) {
        let mut group = Vec::new();
        let (weight, written) = {
            let mut writer = self.writer.lock();
            let Some(weight) = self.shared.queue.begin_turn(&mut group) else { return };
            if weight >= LARGE_COMMIT_BYTES {
                // It computes for milliseconds, in which everybody waits for it.
                priority.raise();
            }
            let written = writer.commit(self.number, &mut group).unwrap_or_else(|error| {
                writer.wait_out(error, group);
                None
            });
            (weight, written)
        };
        priority.raise();
        self.shared.sync(self.number, written);
        // What is answered first comes back as one large commit, not as many small ones of the other thread.
        self.shared.unsettled.settle(&self.shared);
        priority.lower();
        self.shared.queue.end_turn(weight);
        if self.shared.unsettled.failure().is_some() {
            self.wait_out_failure();
        }
    }

    /// Waits out a failed sync, unless that was done.
    fn wait_out_failure(&self) {
        let mut writer = self.writer.lock();
        let weight = self.shared.queue.begin_empty_turn();
        if let Some(error) = self.shared.unsettled.failure() {
            writer.wait_out(error, Vec::new());
        }
        self.shared.queue.end_turn(weight);
    }

    /// Marks the log as closed, once the other thread has nothing under way.
    fn close(&self) {
        let mut writer = self.writer.lock();
        let weight = self.shared.queue.begin_empty_turn();
        if let Err(error) = writer.wait_settled() {
            writer.wait_out(error, Vec::new());
        }
        writer.seal();
        self.shared.queue.end_turn(weight);
    }
}

impl EmbeddedLogShared {
    /// Syncs what a committer has written, and notes how that ended.
    pub(super) fn sync(&self, committer: usize, written: Option<WrittenCommit>) {
        let Some(commit) = written else { return };
        self.queue.note_sync(committer, true);
        let synced = commit.sync(self);
        self.queue.note_sync(committer, false);
        match synced {
            Ok(()) => self.unsettled.note_durable(commit.number),
            Err(error) => self.unsettled.note_failure(error),
        }
    }
}
