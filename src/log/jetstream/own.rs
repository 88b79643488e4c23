//! The records that this gateway appends itself, in the order of the stream. The acknowledgement gives the
//! offset and the record is still in memory, so that it need not come back over the network
//! ([`follow`](super::follow)).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc;

use super::JetstreamLogShared;
use crate::log::Section;
use crate::message::Offset;

/// The most records in a run, and their bytes.
const RUN_RECORDS_MAX: u64 = 1024;
const RUN_BYTES_MAX: usize = 1 << 20;
/// Runs that wait for the follower. A run that finds no room is dropped, and so comes from the stream.
const QUEUED_RUNS_MAX: usize = 256;

/// Consecutive records of the stream.
pub(super) struct OwnRun {
    pub(super) first: Offset,
    /// The offset behind the last record.
    pub(super) next: Offset,
    pub(super) sections: Vec<Section>,
    bytes: usize,
}

/// Puts runs together.
pub(super) struct OwnRunCollector {
    shared: Arc<JetstreamLogShared>,
    runs: mpsc::Sender<OwnRun>,
    run: Option<OwnRun>,
}

/// Creates the collector of runs and the receiver of complete ones.
pub(super) fn own(shared: Arc<JetstreamLogShared>) -> (OwnRunCollector, mpsc::Receiver<OwnRun>) {
    let (runs, taken) = mpsc::channel(QUEUED_RUNS_MAX);
    (OwnRunCollector { shared, runs, run: None }, taken)
}

impl OwnRunCollector {
    /// Adds the record at `place` in `section`, which is stored at `offset`.
    pub(super) fn add_record(&mut self, offset: Offset, section: &Section, place: u32) {
        self.shared.own.appended.fetch_add(1, Ordering::Relaxed);
        if !self.shared.own.wanted.load(Ordering::Relaxed) {
            return;
        }
        let full = |run: &OwnRun| run.next - run.first >= RUN_RECORDS_MAX || run.bytes >= RUN_BYTES_MAX;
        if self.run.as_ref().is_some_and(|run| run.next != offset || full(run)) {
            self.hand_over();
        }
        let none = || OwnRun { first: offset, next: offset, sections: Vec::new(), bytes: 0 };
        let run = self.run.get_or_insert_with(none);
        if !run.sections.last().is_some_and(|last| last.has_origin_of(section)) {
            run.sections.push(section.without_records());
        }
        if let Some(last) = run.sections.last_mut() {
            run.bytes += last.push_copy(section.record(place));
            run.next = offset + 1;
        }
    }

    /// Hands over the run so far, if there is one.
    pub(super) fn hand_over(&mut self) {
        if let Some(run) = self.run.take() {
            let _ = self.runs.try_send(run);
        }
    }
}
