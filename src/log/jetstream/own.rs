//! What this gateway appends itself, in the order of the stream: where each record is says its
//! acknowledgement, and what it is is here still, so that it need not come back over the network
//! ([`follow`](super::follow)).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc;

use super::Shared;
use crate::log::Section;
use crate::message::Offset;

/// Records in a run, and their bytes.
const RUN_RECORDS_MAX: u64 = 1024;
const RUN_BYTES_MAX: usize = 1 << 20;
/// Runs that wait to be taken. A run that finds no room is missing, and so comes from the stream.
const RUNS_MAX: usize = 256;

/// Records that follow each other in the stream.
pub(super) struct Run {
    pub(super) first: Offset,
    /// Behind the last.
    pub(super) next: Offset,
    pub(super) sections: Vec<Section>,
    bytes: usize,
}

/// Puts runs together.
pub(super) struct Own {
    shared: Arc<Shared>,
    runs: mpsc::Sender<Run>,
    run: Option<Run>,
}

/// Where runs are put together, and where they come out.
pub(super) fn own(shared: Arc<Shared>) -> (Own, mpsc::Receiver<Run>) {
    let (runs, taken) = mpsc::channel(RUNS_MAX);
    (Own { shared, runs, run: None }, taken)
}

impl Own {
    /// A record, which begins at `place` in `section`, is at `offset` now.
    pub(super) fn add(&mut self, offset: Offset, section: &Section, place: u32) {
        self.shared.own.appended.fetch_add(1, Ordering::Relaxed);
        if !self.shared.own.wanted.load(Ordering::Relaxed) {
            return;
        }
        let full = |run: &Run| run.next - run.first >= RUN_RECORDS_MAX || run.bytes >= RUN_BYTES_MAX;
        if self.run.as_ref().is_some_and(|run| run.next != offset || full(run)) {
            self.hand_over();
        }
        let none = || Run { first: offset, next: offset, sections: Vec::new(), bytes: 0 };
        let run = self.run.get_or_insert_with(none);
        if !run.sections.last().is_some_and(|last| last.has_origin_of(section)) {
            run.sections.push(section.without_records());
        }
        if let Some(last) = run.sections.last_mut() {
            run.bytes += last.push_copy(section.record(place));
            run.next = offset + 1;
        }
    }

    /// Hands over what has been put together, if there is anything.
    pub(super) fn hand_over(&mut self) {
        if let Some(run) = self.run.take() {
            let _ = self.runs.try_send(run);
        }
    }
}
