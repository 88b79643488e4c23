//! When storage removes what is over its limits: in turns between its transactions, so that it never waits for that. While
//! records come in a turn takes no longer than they took; otherwise it is short, and the next round of the thread goes on.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::consume::sink::retention::{PrunableStore, PruneStep, StoredLimits};
use crate::limits::{RETENTION_INTERVAL, RETENTION_TURN_MAX, TRIM_INTERVAL};
use crate::message::{DatasourceId, now_micros};

/// Says which incarnations have limits on what is stored of them, by their scopes.
pub type StoredLimitsSource = Arc<dyn Fn() -> Vec<(DatasourceId, StoredLimits)> + Send + Sync>;

/// How much longer until the next look for each datasource that has limits: to look at one takes some 20 µs.
const RETENTION_PAUSE_PER_DATASOURCE: Duration = Duration::from_millis(1);

/// Where retention is.
#[derive(Default)]
pub(super) struct RetentionTurns {
    /// What is still to be looked at, each in its turn: one of which much is to be removed holds up no other.
    left: VecDeque<(DatasourceId, StoredLimits)>,
    /// When the limits were asked for.
    asked_at: Option<Instant>,
    stage: RetentionStage,
    /// When the next look begins.
    next_look: Option<Instant>,
    /// Where something was removed since samples were last trimmed.
    to_trim: Vec<DatasourceId>,
    /// Where samples are still to be removed, with the topic that was the last.
    trimming: Vec<(DatasourceId, String)>,
    /// When that was last begun.
    trimmed_at: Option<Instant>,
    /// How many datasources the present look is at.
    count: u32,
    /// Whether it has removed something.
    has_removed: bool,
}

/// What a look does next.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum RetentionStage {
    /// Wait for the next one.
    #[default]
    Waiting,
    /// Remove records.
    Records,
    /// Remove the samples of what was removed where they share a chunk with others.
    Samples,
    /// Give their room back.
    Pages,
}

impl RetentionTurns {
    /// Does some of it, if it is time: for as long as storing has just taken, or a little longer.
    ///
    /// # Errors
    /// Those of the sink.
    pub(super) fn take_turn<S: PrunableStore>(
        &mut self,
        sink: &mut S,
        limits: &StoredLimitsSource,
        storing: Duration,
    ) -> Result<(), S::Fault> {
        let begun = Instant::now();
        if self.stage == RetentionStage::Waiting {
            if self.next_look.is_some_and(|at| begun < at) {
                return Ok(());
            }
            self.left = limits().into();
            self.asked_at = Some(begun);
            self.count = u32::try_from(self.left.len()).unwrap_or(u32::MAX);
            (self.stage, self.has_removed) = (RetentionStage::Records, false);
        }
        self.renew_limits(limits);
        let most = storing.max(RETENTION_TURN_MAX);
        while self.step(sink)? {
            if begun.elapsed() >= most {
                return Ok(());
            }
        }
        self.stage = RetentionStage::Waiting;
        let pause = RETENTION_INTERVAL.max(RETENTION_PAUSE_PER_DATASOURCE.saturating_mul(self.count));
        self.next_look = Some(Instant::now() + pause);
        Ok(())
    }

    /// Brings the limits of a long look up to date: what an operator has just raised is not removed.
    fn renew_limits(&mut self, limits: &StoredLimitsSource) {
        if self.left.is_empty() || self.asked_at.is_some_and(|at| at.elapsed() < RETENTION_INTERVAL) {
            return;
        }
        let now: HashMap<_, _> = limits().into_iter().collect();
        self.left.retain_mut(|(scope, limits)| match now.get(scope) {
            Some(renewed) => {
                *limits = *renewed;
                true
            }
            None => false,
        });
        self.asked_at = Some(Instant::now());
    }

    /// One transaction. Returns whether there may be more to do.
    fn step<S: PrunableStore>(&mut self, sink: &mut S) -> Result<bool, S::Fault> {
        match self.stage {
            RetentionStage::Pages => return sink.give_back_some(),
            RetentionStage::Samples => return self.trim(sink),
            RetentionStage::Records | RetentionStage::Waiting => {}
        }
        let Some((scope, limits)) = self.left.pop_front() else {
            if self.has_removed {
                sink.prune_time_index()?;
            }
            self.begin_trimming();
            return Ok(true);
        };
        if sink.prune_some(&scope, limits, now_micros())? == PruneStep::More {
            self.has_removed = true;
            if self.to_trim.last() != Some(&scope) {
                self.to_trim.push(scope.clone());
            }
            self.left.push_back((scope, limits));
        }
        Ok(true)
    }

    /// Goes on with the samples, if it is time, or else with the pages.
    fn begin_trimming(&mut self) {
        self.stage = RetentionStage::Pages;
        if !self.to_trim.is_empty() && self.trimmed_at.is_none_or(|at| at.elapsed() >= TRIM_INTERVAL) {
            self.to_trim.sort_unstable();
            self.to_trim.dedup();
            self.trimming = self.to_trim.drain(..).map(|scope| (scope, String::new())).collect();
            (self.stage, self.trimmed_at) = (RetentionStage::Samples, Some(Instant::now()));
        }
    }

    fn trim<S: PrunableStore>(&mut self, sink: &mut S) -> Result<bool, S::Fault> {
        let Some((scope, topic)) = self.trimming.last_mut() else {
            self.stage = RetentionStage::Pages;
            return Ok(true);
        };
        match sink.trim_samples_some(scope, topic)? {
            Some(next) => *topic = next,
            None => drop(self.trimming.pop()),
        }
        Ok(true)
    }
}
