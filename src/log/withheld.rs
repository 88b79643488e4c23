//! Withheld records: records in the log that no reader gets any more, because the key that let them
//! in has leaked, or because their datasource was deleted ([`super::incarnations`]).
//!
//! The log never rewrites records. Instead it has rules, usually few, and each consumer checks
//! the records that it reads against them before it delivers them. A consumer that keeps a copy of
//! records (storage, retained messages) learns of [changes](WithheldChange) by their version and corrects its
//! copy. The same transaction notes the version, so that no crash can lose a change.

use parking_lot::RwLock;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::watch;

use super::incarnations::{IncarnationHistory, IncarnationStep};
use crate::message::{DatasourceId, Incarnation, KeyId, Offset, RecordFlags, RecordRef, TimeMicros};

/// A rule that withholds the records that a key let in during a period.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WithheldRule {
    /// The datasource of the records, or all of them (`*`).
    pub datasource: DatasourceId,
    /// The key that let them in.
    pub key_id: KeyId,
    /// Covers records received at or after this time.
    pub since: TimeMicros,
    /// Covers records below this offset: the log's end when the rule was made.
    pub below: Offset,
}

impl WithheldRule {
    /// Whether the rule covers a record with these properties.
    pub fn covers(&self, datasource: &str, key_id: KeyId, received_at: TimeMicros, offset: Offset) -> bool {
        self.key_id == key_id
            && offset < self.below
            && received_at >= self.since
            && (self.datasource.is_all() || self.datasource.as_str() == datasource)
    }
}

/// One change of the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WithheldChange {
    /// Adds a rule.
    Withhold(WithheldRule),
    /// Removes all rules of this key for this datasource (or for all, `*`).
    GiveBack(DatasourceId, KeyId),
    /// Something has happened to an incarnation of a datasource.
    Incarnation(DatasourceId, Incarnation, IncarnationStep),
}

impl WithheldChange {
    /// The leaked key whose records it concerns.
    pub fn key_id(&self) -> Option<KeyId> {
        match self {
            WithheldChange::Withhold(rule) => Some(rule.key_id),
            WithheldChange::GiveBack(_, key_id) => Some(*key_id),
            WithheldChange::Incarnation(..) => None,
        }
    }
}

/// The rules in force, and the changes that led to them.
#[derive(Debug, Default)]
pub struct WithheldRules {
    /// How many changes there have been. While it is 0 a reader need not take the lock.
    version: AtomicU64,
    state: RwLock<WithheldState>,
    /// Tells of changes.
    told: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct WithheldState {
    changes: Vec<WithheldChange>,
    /// The rules in force; `None` if there are none.
    present: Option<Arc<WithheldSet>>,
}

/// What is withheld at one moment.
#[derive(Debug, Clone, Default)]
struct WithheldSet {
    rules: Vec<WithheldRule>,
    /// Of the datasources that were deleted at some time.
    histories: HashMap<DatasourceId, Arc<IncarnationHistory>>,
}

impl WithheldRules {
    /// Applies the next change, for every check from now on. Returns the new version.
    pub fn push(&self, change: WithheldChange) -> u64 {
        let mut state = self.state.write();
        let mut present = state.present.take().unwrap_or_default();
        let set = Arc::make_mut(&mut present);
        match &change {
            WithheldChange::Withhold(rule) => set.rules.push(rule.clone()),
            WithheldChange::GiveBack(datasource, key_id) => {
                set.rules.retain(|rule| rule.key_id != *key_id || rule.datasource != *datasource);
            }
            WithheldChange::Incarnation(datasource, incarnation, step) => {
                let history = set.histories.entry(datasource.clone()).or_default();
                Arc::make_mut(history).push(*incarnation, step);
            }
        }
        state.present = (!set.rules.is_empty() || !set.histories.is_empty()).then_some(present);
        state.changes.push(change);
        let version = state.changes.len() as u64;
        self.version.store(version, Ordering::Release);
        drop(state);
        self.told.send_modify(|told| *told = version.max(*told));
        version
    }

    /// How many changes there have been.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Where the next versions are told.
    pub fn listen(&self) -> watch::Receiver<u64> {
        self.told.subscribe()
    }

    /// The changes after a version, and the rules that they have led to.
    pub fn changes_and_rules(&self, version: u64) -> (Vec<WithheldChange>, WithheldSnapshot) {
        let state = self.state.read();
        let behind = usize::try_from(version).ok().and_then(|behind| state.changes.get(behind..));
        (behind.unwrap_or_default().to_vec(), WithheldSnapshot(state.present.clone()))
    }

    /// The rules at this moment. Costs one atomic load if there never was a rule.
    pub fn now(&self) -> WithheldSnapshot {
        if self.version() == 0 {
            return WithheldSnapshot(None);
        }
        WithheldSnapshot(self.state.read().present.clone())
    }
}

/// The rules at one moment.
#[derive(Debug, Clone, Default)]
pub struct WithheldSnapshot(Option<Arc<WithheldSet>>);

impl WithheldSnapshot {
    /// Whether there is no rule, so that nothing is withheld.
    pub fn is_nothing(&self) -> bool {
        self.0.is_none()
    }

    /// Whether any record of this datasource may be withheld.
    pub fn concerns(&self, datasource: &str) -> bool {
        let may_withhold =
            |set: &Arc<WithheldSet>| !set.rules.is_empty() || set.histories.contains_key(datasource);
        self.0.as_ref().is_some_and(may_withhold)
    }

    /// Whether the record is withheld: its key has leaked, or its datasource was deleted.
    pub fn withholds(&self, record: &RecordRef<'_>) -> bool {
        let Some(set) = &self.0 else { return false };
        let RecordRef { datasource, key_id, received_at, offset, .. } = *record;
        set.histories
            .get(datasource)
            .is_some_and(|of| of.has_ended(of.incarnation_of(key_id, received_at, offset)))
            || self.covers(datasource, key_id, received_at, offset)
    }

    /// The incarnations of a datasource that was deleted at some time.
    pub fn history(&self, datasource: &str) -> Option<&IncarnationHistory> {
        self.0.as_ref()?.histories.get(datasource).map(|history| &**history)
    }

    /// Whether what is kept under the id of a scope has ended with its incarnation.
    pub fn has_ended(&self, scope: &DatasourceId) -> bool {
        let (datasource, incarnation) = scope.of_scope();
        self.history(datasource.as_str()).is_some_and(|history| history.has_ended(incarnation))
    }

    /// Whether a rule about a leaked key covers a record with these properties.
    pub fn covers(&self, datasource: &str, key_id: KeyId, received_at: TimeMicros, offset: Offset) -> bool {
        self.rules().any(|rule| rule.covers(datasource, key_id, received_at, offset))
    }

    /// Whether no reader may show the record but quarantine: it is withheld, or failed validation.
    pub fn contains(&self, record: &RecordRef<'_>) -> bool {
        record.flags.contains(RecordFlags::QUARANTINED) || self.withholds(record)
    }

    /// The rules about leaked keys.
    pub fn rules(&self) -> impl Iterator<Item = &WithheldRule> {
        self.0.iter().flat_map(|set| set.rules.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(datasource: &str, since: TimeMicros, below: Offset) -> WithheldRule {
        let datasource = match datasource {
            "*" => DatasourceId::all(),
            id => DatasourceId::new(id).expect("a slug"),
        };
        WithheldRule { datasource, key_id: KeyId([1; 6]), since, below }
    }

    #[test]
    fn a_rule_is_for_one_key_from_a_time_to_an_offset() {
        let withheld = WithheldRules::default();
        assert!(withheld.now().is_nothing());
        assert_eq!(withheld.push(WithheldChange::Withhold(rule("a", 100, 50))), 1);
        let now = withheld.now();
        assert!(now.covers("a", KeyId([1; 6]), 100, 49));
        assert!(!now.covers("a", KeyId([1; 6]), 99, 49), "before the time");
        assert!(!now.covers("a", KeyId([1; 6]), 100, 50), "after the rule was made");
        assert!(!now.covers("a", KeyId([2; 6]), 100, 49), "another key");
        assert!(!now.covers("b", KeyId([1; 6]), 100, 49), "another datasource");
    }

    #[test]
    fn what_is_given_back_is_what_was_withheld_there() {
        let withheld = WithheldRules::default();
        withheld.push(WithheldChange::Withhold(rule("a", 100, 50)));
        withheld.push(WithheldChange::Withhold(rule("*", 200, 60)));
        let given_back = WithheldChange::GiveBack(DatasourceId::new("a").expect("a slug"), KeyId([1; 6]));
        assert_eq!(withheld.push(given_back.clone()), 3);
        let now = withheld.now();
        assert!(!now.covers("a", KeyId([1; 6]), 150, 10));
        assert!(now.covers("a", KeyId([1; 6]), 200, 10), "the other rule still holds");
        assert_eq!(withheld.changes_and_rules(2).0, [given_back]);
        assert_eq!(withheld.changes_and_rules(9).0, []);
        withheld.push(WithheldChange::GiveBack(DatasourceId::all(), KeyId([1; 6])));
        assert!(withheld.now().is_nothing());
    }
}
