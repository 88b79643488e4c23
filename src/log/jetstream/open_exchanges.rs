//! The QoS 2 exchanges that are open, as far as this gateway knows: its clients' own, counted for their datasource (as many
//! as `intake.exchanges_per_datasource_max` may be open on each gateway), those of other gateways, whose messages it
//! follows, and those that have a row in the bucket `headgate-exchanges` ([`exchange_rows`](super::exchange_rows)).
//!
//! JetStream knows the id of an exchange for its window. One that stays open for longer than a moment gets a row, which
//! lasts until it is released.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use headgate_bridge_nats::kv::KvRevision;
use parking_lot::Mutex;

use super::message::SharedIdContent;
use crate::log::OnceId;
use crate::message::{DatasourceId, Offset};

/// How often in a window the ids are gone through for those that are over it.
const SWEEPS_PER_WINDOW: u32 = 16;
/// How long an exchange is open before it gets a row: no longer than half the window.
const ROW_DELAY_MAX: Duration = Duration::from_secs(2);
/// How much later a gateway writes the row of an exchange of another one, which may have ended.
const OTHERS_ROW_DELAYS: u32 = 2;

/// The open exchanges.
pub(super) struct OpenExchanges {
    per_datasource_max: usize,
    window: Duration,
    delay: Duration,
    state: Mutex<OpenExchangesState>,
}

struct OpenExchangesState {
    open: HashMap<OnceId, OpenExchange>,
    counts: HashMap<DatasourceId, usize>,
    swept_at: Instant,
}

struct OpenExchange {
    datasource: DatasourceId,
    since: Instant,
    /// Whether it is counted for its datasource.
    is_counted: bool,
    /// What was kept under it, once that is known.
    kept: Option<KeptExchange>,
    /// When it gets a row.
    due: Instant,
    /// The revision of its row, once it has one.
    row: Option<KvRevision>,
}

/// What was kept of an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KeptExchange {
    /// The generation of its id.
    pub(super) generation: Option<u64>,
    /// The offset of the first of its records.
    pub(super) first: Offset,
    /// What its records are together.
    pub(super) content: SharedIdContent,
    /// The epoch of the log in which they were kept.
    pub(super) epoch: u64,
}

impl OpenExchanges {
    pub(super) fn new(per_datasource_max: usize, window: Duration) -> Self {
        let (open, counts, swept_at) = (HashMap::new(), HashMap::new(), Instant::now());
        let state = Mutex::new(OpenExchangesState { open, counts, swept_at });
        Self { per_datasource_max, window, delay: ROW_DELAY_MAX.min(window / 2), state }
    }

    /// How long an exchange is open before it gets a row.
    pub(super) fn row_delay(&self) -> Duration {
        self.delay
    }

    /// Counts an exchange, if it is open already or its datasource may open one more.
    pub(super) fn try_open(&self, datasource: &DatasourceId, id: OnceId) -> bool {
        let (mut state, now) = (self.state.lock(), Instant::now());
        if now.duration_since(state.swept_at) > self.window / SWEEPS_PER_WINDOW {
            state.swept_at = now;
            let OpenExchangesState { open, counts, .. } = &mut *state;
            let is_over = |exchange: &OpenExchange| {
                exchange.kept.is_none() && now.duration_since(exchange.since) > self.window
            };
            open.extract_if(|_, exchange| is_over(exchange)).for_each(|(_, over)| uncount(counts, &over));
        }
        if let Some(exchange) = state.open.get_mut(&id) {
            if exchange.kept.is_none() {
                exchange.since = now;
            }
            return true;
        }
        if !state.may_count(datasource, self.per_datasource_max) {
            return false;
        }
        state.insert(id, OpenExchange::new(datasource, now, self.delay), true);
        true
    }

    /// Notes what was kept of an exchange of this gateway's.
    pub(super) fn note_own(&self, datasource: &DatasourceId, id: OnceId, kept: KeptExchange) {
        self.note_kept(datasource, id, kept, self.delay);
    }

    /// Notes what was kept of an exchange that this gateway has seen in the stream.
    pub(super) fn note_seen(&self, datasource: &DatasourceId, id: OnceId, kept: KeptExchange) {
        self.note_kept(datasource, id, kept, self.delay * OTHERS_ROW_DELAYS);
    }

    fn note_kept(&self, datasource: &DatasourceId, id: OnceId, kept: KeptExchange, delay: Duration) {
        let (mut state, now) = (self.state.lock(), Instant::now());
        match state.open.get_mut(&id) {
            Some(exchange) => match exchange.kept {
                Some(known) if known.generation == kept.generation && known.epoch == kept.epoch => {}
                _ => {
                    (exchange.kept, exchange.row) = (Some(kept), None);
                    exchange.due = now + delay;
                }
            },
            None => {
                let exchange = OpenExchange { kept: Some(kept), ..OpenExchange::new(datasource, now, delay) };
                state.insert(id, exchange, false);
            }
        }
    }

    /// What was kept under an id whose generation is now this one, if the exchange is open and JetStream may have
    /// forgotten it.
    pub(super) fn find(&self, id: OnceId, generation: Option<u64>) -> Option<KeptExchange> {
        let state = self.state.lock();
        let exchange = state.open.get(&id)?;
        let kept = exchange.kept?;
        // The row of a generation may have expired while the exchange was open.
        let is_same = generation.is_none() || kept.generation == generation;
        let is_old = exchange.row.is_some() || exchange.since.elapsed() > self.delay;
        (is_same && is_old).then_some(kept)
    }

    /// Counts released exchanges no more. Returns those that have a row, with its revision: it has to go before they are
    /// released.
    pub(super) fn close(&self, ids: &[OnceId]) -> Vec<(OnceId, KvRevision)> {
        let mut state = self.state.lock();
        let mut rows = Vec::new();
        for id in ids {
            match state.open.get(id).map(|exchange| exchange.row) {
                Some(Some(revision)) => rows.push((*id, revision)),
                Some(None) => state.remove(*id),
                None => {}
            }
        }
        rows
    }

    /// Notes that the id of an exchange has a new generation: an earlier one is over. Returns the revision of its row.
    pub(super) fn close_earlier(&self, id: OnceId, generation: u64) -> Option<KvRevision> {
        let mut state = self.state.lock();
        let exchange = state.open.get(&id)?;
        let kept = exchange.kept?;
        if kept.generation == Some(generation) {
            return None;
        }
        let row = exchange.row;
        state.remove(id);
        row
    }

    /// The exchanges that are to have a row by now and have none; with `all`, whether it is time or not.
    pub(super) fn due(&self, all: bool) -> Vec<(OnceId, DatasourceId, KeptExchange)> {
        let (state, now) = (self.state.lock(), Instant::now());
        let due =
            state.open.iter().filter(|(_, exchange)| exchange.row.is_none() && (all || exchange.due <= now));
        due.filter_map(|(id, exchange)| Some((*id, exchange.datasource.clone(), exchange.kept?))).collect()
    }

    /// Notes that an exchange has a row. `false`: it is no longer open, so that the row has to go.
    pub(super) fn note_row(
        &self,
        datasource: &DatasourceId,
        id: OnceId,
        kept: KeptExchange,
        revision: KvRevision,
        is_own: bool,
    ) -> bool {
        let mut state = self.state.lock();
        let OpenExchangesState { open, counts, .. } = &mut *state;
        match open.get_mut(&id) {
            Some(exchange) if exchange.kept.is_none_or(|known| known.generation == kept.generation) => {
                exchange.row = exchange.row.max(Some(revision));
                // One that lies beyond an earlier state from which the log went on may have been kept anew.
                if exchange.kept.is_none_or(|known| known.epoch <= kept.epoch) {
                    exchange.kept = Some(kept);
                }
                if !exchange.is_counted {
                    exchange.is_counted = true;
                    *counts.entry(exchange.datasource.clone()).or_default() += 1;
                }
            }
            Some(_) => return false,
            None if is_own => return false,
            None => {
                let exchange = OpenExchange {
                    kept: Some(kept),
                    row: Some(revision),
                    ..OpenExchange::new(datasource, Instant::now(), self.delay)
                };
                state.insert(id, exchange, true);
            }
        }
        true
    }

    /// Notes that the row of an exchange is gone, by a change of this revision.
    pub(super) fn note_no_row(&self, id: OnceId, revision: KvRevision) {
        let mut state = self.state.lock();
        if state.open.get(&id).is_some_and(|exchange| exchange.row.is_some_and(|row| row < revision)) {
            state.remove(id);
        }
    }

    /// Forgets all rows: all that there are come next.
    pub(super) fn forget_rows(&self) {
        let mut state = self.state.lock();
        let OpenExchangesState { open, counts, .. } = &mut *state;
        open.extract_if(|_, exchange| exchange.row.is_some()).for_each(|(_, of)| uncount(counts, &of));
    }
}

impl OpenExchange {
    fn new(datasource: &DatasourceId, now: Instant, delay: Duration) -> Self {
        let datasource = datasource.clone();
        Self { datasource, since: now, is_counted: false, kept: None, due: now + delay, row: None }
    }
}

impl OpenExchangesState {
    fn may_count(&self, datasource: &DatasourceId, max: usize) -> bool {
        self.counts.get(datasource).copied().unwrap_or_default() < max
    }

    fn insert(&mut self, id: OnceId, mut exchange: OpenExchange, is_counted: bool) {
        exchange.is_counted = is_counted;
        if is_counted {
            *self.counts.entry(exchange.datasource.clone()).or_default() += 1;
        }
        self.open.insert(id, exchange);
    }

    fn remove(&mut self, id: OnceId) {
        if let Some(exchange) = self.open.remove(&id) {
            uncount(&mut self.counts, &exchange);
        }
    }
}

fn uncount(counts: &mut HashMap<DatasourceId, usize>, exchange: &OpenExchange) {
    if exchange.is_counted
        && let Some(count) = counts.get_mut(&exchange.datasource)
    {
        *count -= 1;
        if *count == 0 {
            counts.remove(&exchange.datasource);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str) -> DatasourceId {
        DatasourceId::new(name).expect("a slug")
    }

    fn id(n: u16) -> OnceId {
        OnceId::of_exchange(1, n)
    }

    fn kept(generation: Option<u64>) -> KeptExchange {
        let content = SharedIdContent { records: 1, digest: None };
        KeptExchange { generation, first: 7, content, epoch: 1 }
    }

    #[test]
    fn a_datasource_has_so_many_exchanges_open_and_a_released_or_old_one_makes_room() {
        let (press, oven) = (of("press-4"), of("oven"));
        let exchanges = OpenExchanges::new(2, Duration::from_secs(3_600));
        assert!(exchanges.try_open(&press, id(1)) && exchanges.try_open(&press, id(2)));
        assert!(!exchanges.try_open(&press, id(3)), "one above");
        assert!(exchanges.try_open(&press, id(2)), "a repetition");
        assert!(exchanges.try_open(&oven, id(4)), "another datasource has its own");
        exchanges.close(&[id(1), id(1), id(9)]);
        assert!(exchanges.try_open(&press, id(3)));
        exchanges.close(&[id(2), id(3), id(4)]);
        assert!(exchanges.state.lock().counts.is_empty());
        let exchanges = OpenExchanges::new(1, Duration::ZERO);
        assert!(exchanges.try_open(&press, id(1)));
        while Instant::now() == exchanges.state.lock().swept_at {}
        assert!(exchanges.try_open(&press, id(2)), "the first one is over its window, and nothing was kept");
    }

    #[test]
    fn one_that_stays_open_gets_a_row_and_is_found_until_its_id_has_another_generation() {
        let press = of("press-4");
        let exchanges = OpenExchanges::new(1, Duration::ZERO);
        assert!(exchanges.try_open(&press, id(1)));
        exchanges.note_own(&press, id(1), kept(Some(3)));
        assert_eq!(exchanges.due(false), [(id(1), press.clone(), kept(Some(3)))]);
        assert!(exchanges.note_row(&press, id(1), kept(Some(3)), 9, true));
        assert_eq!(exchanges.due(true), []);
        // The generation's row has expired, or is there; another one means that it was released.
        assert_eq!(exchanges.find(id(1), None), Some(kept(Some(3))));
        assert_eq!(exchanges.find(id(1), Some(3)), Some(kept(Some(3))));
        assert_eq!(exchanges.find(id(1), Some(4)), None);
        assert!(!exchanges.try_open(&press, id(2)), "it is counted");
        assert_eq!(exchanges.close(&[id(1)]), [(id(1), 9)]);
        assert_eq!(exchanges.close_earlier(id(1), 3), None);
        assert_eq!(exchanges.close_earlier(id(1), 4), Some(9));
        assert!(exchanges.try_open(&press, id(2)));
        assert!(!exchanges.note_row(&press, id(1), kept(Some(3)), 10, true), "it is over");
        // That of another gateway, whose removal is heard of.
        assert!(exchanges.note_row(&press, id(3), kept(None), 11, false));
        exchanges.note_no_row(id(3), 11);
        assert_eq!(exchanges.find(id(3), None), Some(kept(None)));
        exchanges.note_no_row(id(3), 12);
        assert_eq!(exchanges.find(id(3), None), None);
        exchanges.close(&[id(2)]);
        assert!(exchanges.state.lock().counts.is_empty());
    }
}
