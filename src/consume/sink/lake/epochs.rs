//! The lake of a log that has gone on from an earlier state: what it has beyond that leaves the table, and is kept beside it.

use headgate_bridge_delta::SetBackOrder;
use tracing::warn;

use super::{EPOCH_MARK, LakeFault, LakeSink, cursor_of, offset_of};
use crate::log::LogHistory;

impl LakeSink {
    /// Takes out of the table what is stored from where a later epoch of the log has begun, in one commit that also puts its
    /// cursor back. Of the gateways that share it the first one does it. Returns what to tell the operator, if there was
    /// anything.
    ///
    /// # Errors
    /// [`LakeFault`].
    pub(in crate::consume) fn follow_epochs(
        &mut self,
        history: &LogHistory,
    ) -> Result<Option<String>, LakeFault> {
        let now = cursor_of(history.epoch);
        self.epoch = Some(now);
        let stored = self.table.mark(EPOCH_MARK);
        if stored == Some(now) {
            return Ok(None);
        }
        let end = stored.and_then(|stored| history.end_since(offset_of(stored)));
        let folder = format!("_set_aside_{}", history.epoch);
        let order = SetBackOrder { mark: (EPOCH_MARK, now), from: end.map(cursor_of), folder: &folder };
        let report = self.runtime.block_on(self.table.set_back(&order))?;
        self.begin_behind_commits();
        if self.table.mark(EPOCH_MARK) > Some(now) {
            return Err(LakeFault::LaterEpoch { place: self.place().to_string() });
        }
        let (Some(report), Some(end)) = (report.filter(|report| report.rows > 0), end) else {
            return Ok(None);
        };
        let said = format!(
            "the lake at {} was ahead of the log, which goes on at offset {end} from an earlier state: its {} records from there \
             on are set aside in its folder {folder}",
            self.place(),
            report.rows
        );
        warn!("storage: {said}");
        Ok(Some(said))
    }
}
