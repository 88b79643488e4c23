//! The rules about leaked keys, and the incarnations of datasources: durable in the registry, which every node of a cluster has with the same
//! versions, and live in the log's [`WithheldRules`](crate::log::WithheldRules). A change is durable before
//! it takes effect, so that nothing that was reported as withheld is handed out after a crash.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::auth::{Actor, IncarnationEvent, LeakRow, LogEndPatience, RecordRule, Registry, RegistryError};
use crate::limits::{LEAK_CHANGES_MAX, REVOCATION_WAIT_MAX};
use crate::log::{AppendError, IncarnationStep, Log, WithheldChange, WithheldRule};
use crate::message::{DatasourceId, KeyId, Offset, TimeMicros, now_micros};

/// How long the log is asked for its end when a datasource is deleted or created again.
const LOG_END_WAIT_MAX: Duration = Duration::from_secs(1);

/// The rules about leaked keys, from the registry to the log.
pub struct QuarantineLeakRules {
    log: Arc<dyn Log>,
    registry: Arc<Registry>,
    runtime: Handle,
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum LeakError {
    /// The registry could not be written.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The end of the cluster's log cannot be determined now.
    #[error(transparent)]
    Log(#[from] AppendError),
    /// There are too many changes.
    #[error("keys were quarantined {LEAK_CHANGES_MAX} times; no more changes can be kept")]
    TooMany,
}

impl QuarantineLeakRules {
    /// Applies the rules of the registry, present and future, to the log. Call it before the log has readers,
    /// in a runtime.
    ///
    /// # Errors
    /// [`RegistryError`] if the rules cannot be read.
    pub fn start(registry: Arc<Registry>, log: Arc<dyn Log>) -> Result<Self, RegistryError> {
        let (runtime, withheld, end_of) = (Handle::current(), log.withheld().clone(), log.clone());
        registry.follow_record_rules(move |rule| {
            withheld.push(withheld_change(rule));
        })?;
        let waits = runtime.clone();
        registry.set_log_end(Box::new(move |patience| {
            waits.block_on(async {
                if patience == LogEndPatience::Settled {
                    let settled = tokio::time::timeout(REVOCATION_WAIT_MAX, end_of.barrier()).await;
                    settled.map_err(|_| "the log does not get on".to_owned())?;
                }
                let end = tokio::time::timeout(LOG_END_WAIT_MAX, end_of.end()).await;
                end.map_err(|_| "the log does not say where it ends".to_owned())?
                    .map_err(|error| error.to_string())
            })
        }));
        Ok(Self { log, registry, runtime })
    }

    /// Withholds what a key let in since a time: durably, and from every reader of the log once this
    /// returns. Records that the key lets in later, if it is still valid, are not covered. Returns the new
    /// version of the rules. Blocks.
    ///
    /// # Errors
    /// [`LeakError`]; nothing has changed then.
    pub fn withhold(
        &self,
        actor: &Actor,
        datasource: &DatasourceId,
        key_id: KeyId,
        since: TimeMicros,
    ) -> Result<u64, LeakError> {
        // In a cluster, records of other gateways may not have arrived here yet: the log is asked for its end.
        let below = self.runtime.block_on(self.log.end())?;
        self.change(actor, datasource, key_id, Some((since, below)))
    }

    /// Gives back what is withheld of a key in this datasource, or in all (`*`). Returns the new version of
    /// the rules. Blocks.
    ///
    /// # Errors
    /// [`LeakError`]; nothing has changed then.
    pub fn give_back(
        &self,
        actor: &Actor,
        datasource: &DatasourceId,
        key_id: KeyId,
    ) -> Result<u64, LeakError> {
        self.change(actor, datasource, key_id, None)
    }

    fn change(
        &self,
        actor: &Actor,
        datasource: &DatasourceId,
        key_id: KeyId,
        withheld: Option<(TimeMicros, Offset)>,
    ) -> Result<u64, LeakError> {
        let (since, below) = withheld.unzip();
        let row = LeakRow { datasource: datasource.clone(), key_id, since, below, at: now_micros() };
        self.registry.add_leak_rule(actor, &row, LEAK_CHANGES_MAX)?.ok_or(LeakError::TooMany)
    }
}

/// The change that a rule of the registry is for the log's readers.
fn withheld_change(rule: &RecordRule) -> WithheldChange {
    match rule {
        RecordRule::Leak(row) => {
            let LeakRow { datasource, key_id, .. } = row.clone();
            match (row.since, row.below) {
                (Some(since), Some(below)) => {
                    WithheldChange::Withhold(WithheldRule { datasource, key_id, since, below })
                }
                _ => WithheldChange::GiveBack(datasource, key_id),
            }
        }
        RecordRule::Incarnation(row, keys) => {
            let step = match row.event {
                IncarnationEvent::Ended => {
                    let end = row.first_offset.unwrap_or(Offset::MAX);
                    IncarnationStep::Ended { keys: keys.clone(), end }
                }
                IncarnationEvent::Begun => IncarnationStep::Begun {
                    first_offset: row.first_offset.unwrap_or(0),
                    since: row.since.unwrap_or(TimeMicros::MIN),
                },
                IncarnationEvent::Purged => IncarnationStep::Purged,
            };
            WithheldChange::Incarnation(row.datasource.clone(), row.incarnation, step)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::log::EmbeddedLog;

    #[tokio::test]
    async fn what_was_withheld_is_withheld_after_a_restart_and_what_was_given_back_is_not() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let config = Config::default();
        let open = || {
            let log = EmbeddedLog::open(dir.path(), &config.log, &config.intake).expect("opens");
            let log: Arc<dyn Log> = Arc::new(log);
            let registry = Arc::new(Registry::open(dir.path()).expect("opens"));
            (QuarantineLeakRules::start(registry, log.clone()).expect("readable"), log)
        };
        let (leaks, log) = open();
        let datasource = DatasourceId::new("press-4").expect("a slug");
        let (one, other) = (KeyId([1; 6]), KeyId([2; 6]));
        let changing = tokio::task::spawn_blocking(move || {
            assert_eq!(leaks.withhold(&Actor::SYSTEM, &datasource, one, 7).expect("kept"), 1);
            assert_eq!(leaks.withhold(&Actor::SYSTEM, &DatasourceId::all(), other, 8).expect("kept"), 2);
            assert_eq!(leaks.give_back(&Actor::SYSTEM, &datasource, one).expect("kept"), 3);
        });
        changing.await.expect("no panic");
        drop(log);
        let (_leaks, log) = open();
        let rules: Vec<_> = log.withheld().now().rules().cloned().collect();
        let expected = WithheldRule { datasource: DatasourceId::all(), key_id: other, since: 8, below: 0 };
        assert_eq!((log.withheld().version(), rules), (3, vec![expected]));
    }
}
