//! Who writes into a lake that gateways share. Nobody holds it: the first commit counts. Whoever was too late leaves it to
//! the other one, and takes over when that has committed nothing for some intervals.

use std::time::{Duration, Instant};

use super::{LakeFault, LakeSink};
use crate::message::Offset;

/// After how many intervals without a commit of the other gateway this one writes.
const STANDSTILL_INTERVALS: u32 = 3;
/// What is added to that for a gateway that is slow.
const STANDSTILL_MARGIN: Duration = Duration::from_secs(5);

/// Another gateway writes.
pub(super) struct OtherWriterTurn {
    /// How far it is, and since when.
    committed: Offset,
    since: Instant,
    looked_at: Instant,
}

impl LakeSink {
    /// Whether this gateway writes now. While another one does, it looks once an interval how far that is.
    ///
    /// # Errors
    /// [`LakeFault`].
    pub(in crate::consume) fn is_writer(&mut self) -> Result<bool, LakeFault> {
        let interval = self.settings.interval;
        let is_early = |turn: &OtherWriterTurn| turn.looked_at.elapsed() < interval;
        match &self.other_writer {
            None => return Ok(true),
            Some(turn) if is_early(turn) => return Ok(false),
            Some(_) => {}
        }
        self.runtime.block_on(self.table.refresh())?;
        self.begin_behind_commits();
        let committed = self.committed();
        let Some(turn) = &mut self.other_writer else { return Ok(true) };
        turn.looked_at = Instant::now();
        if committed != turn.committed {
            (turn.committed, turn.since) = (committed, turn.looked_at);
        }
        let stands_still = turn.since.elapsed() >= interval * STANDSTILL_INTERVALS + STANDSTILL_MARGIN;
        if stands_still {
            self.other_writer = None;
        }
        Ok(stands_still)
    }

    /// Another writer was faster. Where gateways share the lake that one goes on; elsewhere there must not be any.
    pub(super) fn yield_to_other(&mut self) -> Result<(), LakeFault> {
        if !self.settings.is_shared {
            return Err(LakeFault::OtherWriter { place: self.settings.place.to_string() });
        }
        self.begin_behind_commits();
        let now = Instant::now();
        self.other_writer = Some(OtherWriterTurn { committed: self.committed(), since: now, looked_at: now });
        Ok(())
    }
}
