//! The lake of a log that has gone on from an earlier state: what it has beyond that leaves the table, and is kept beside it.

use headgate_bridge_delta::SetBackOrder;
use tracing::warn;

use super::{EPOCH_MARK, ERASED_MARK, LakeFault, LakeSink, WITHHELD_MARK, cursor_of, offset_of};
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
        let order = SetBackOrder {
            mark: (EPOCH_MARK, now),
            from: end.map(cursor_of),
            // The registry may have gone back too, and to follow a rule twice does no harm.
            reset: &[WITHHELD_MARK, ERASED_MARK],
            folder: &folder,
        };
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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use headgate_bridge_delta::{LakeError, LakePlace};

    use super::super::LakeSettings;
    use super::*;
    use crate::consume::testing::record;
    use crate::log::{HistorySetBack, WithheldChange, WithheldRule, WithheldRules};
    use crate::message::{DatasourceId, KeyId, Offset};

    /// The lake as a gateway opens it whose log has this history. Others share it.
    fn opened(dir: &Path, history: &LogHistory) -> LakeSink {
        let settings = LakeSettings {
            place: LakePlace::Directory(dir.to_owned()),
            interval: Duration::ZERO,
            removed_kept: Duration::from_secs(3_600),
            retention_days: 0,
            is_shared: true,
        };
        let mut sink = LakeSink::open(settings).expect("opens");
        sink.follow_epochs(history).expect("follows");
        sink
    }

    fn rules(count: u8) -> WithheldRules {
        let rules = WithheldRules::default();
        for n in 0..count {
            let (datasource, key_id) = (DatasourceId::new("press-4").expect("slug"), KeyId([n; 6]));
            rules.push(WithheldChange::Withhold(WithheldRule { datasource, key_id, since: 0, below: 100 }));
        }
        rules
    }

    fn store(sink: &mut LakeSink, to: Offset) {
        let records = (sink.cursor()..to).map(|offset| record(offset, "press-4", "a", b"1"));
        sink.store(records, to).expect("stored");
        sink.commit().expect("committed");
    }

    #[test]
    fn rules_are_followed_anew_when_the_registry_has_gone_back_with_the_log() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let first = LogHistory { epoch: 1, set_backs: Vec::new() };
        let next = LogHistory { epoch: 5, set_backs: vec![HistorySetBack { epoch: 5, end: 6, sessions: 0 }] };
        let mut sink = opened(dir.path(), &first);
        sink.reconcile(&rules(2)).expect("follows");
        store(&mut sink, 10);
        assert_eq!((sink.committed(), sink.withheld_version()), (10, 2));
        let mut late = opened(dir.path(), &first);
        late.reconcile(&rules(2)).expect("follows");

        let mut sink = opened(dir.path(), &next);
        sink.reconcile(&rules(1)).expect("follows");
        assert!(sink.has_rules());
        store(&mut sink, 8);
        assert_eq!((sink.committed(), sink.withheld_version()), (8, 1));

        // One that has not begun the epoch yet does not bring its rules in again.
        let is_late = |fault| matches!(fault, Err(LakeFault::Table(LakeError::Superseded { .. })));
        assert!(is_late(late.reconcile(&rules(3))));
        assert!(matches!(late.reconcile(&rules(3)), Err(LakeFault::LaterEpoch { .. })));
        assert_eq!(opened(dir.path(), &next).withheld_version(), 1);
    }

    /// It sorted all rows by the rules that it knew, and moved the mark back.
    #[test]
    fn a_gateway_that_has_not_heard_of_a_rule_yet_does_not_undo_it() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let history = LogHistory { epoch: 1, set_backs: Vec::new() };
        let with_leak = |rules: WithheldRules| {
            let leaked = record(0, "press-4", "a", b"1").key_id;
            let datasource = DatasourceId::new("press-4").expect("slug");
            rules.push(WithheldChange::Withhold(WithheldRule {
                datasource,
                key_id: leaked,
                since: 0,
                below: 100,
            }));
            rules
        };
        let mut slow = opened(dir.path(), &history);
        slow.reconcile(&rules(1)).expect("follows");
        store(&mut slow, 10);
        let mut fast = opened(dir.path(), &history);
        fast.reconcile(&with_leak(rules(2))).expect("follows");
        assert!(fast.newest_row().expect("readable").is_none(), "all rows are withheld");

        let late = slow.reconcile(&rules(2));
        assert!(matches!(late, Err(LakeFault::Table(LakeError::Superseded { .. }))), "{late:?}");
        let mut again = opened(dir.path(), &history);
        assert_eq!(again.withheld_version(), 3);
        assert!(again.newest_row().expect("readable").is_none());
        again.reconcile(&rules(2)).expect("it waits for the third");
        assert_eq!(again.withheld_version(), 3);
    }

    /// The later one said that the sink had failed, and opened it again.
    #[test]
    fn two_gateways_that_follow_a_rule_at_the_same_moment_both_go_on() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let history = LogHistory { epoch: 1, set_backs: Vec::new() };
        let mut first = opened(dir.path(), &history);
        first.reconcile(&rules(1)).expect("follows");
        let mut second = opened(dir.path(), &history);
        second.reconcile(&rules(1)).expect("follows");
        first.reconcile(&rules(2)).expect("follows");
        second.reconcile(&rules(2)).expect("it is done already");
        assert!(second.has_rules() && second.withheld_version() == 2);
        store(&mut second, 10);
        assert_eq!(second.committed(), 10);
    }
}
