//! The QoS 2 exchanges that clients of this gateway have opened and not released, counted for their datasource: as many
//! as `intake.exchanges_per_datasource_max` may be open on each gateway. JetStream knows their ids for its window, and they
//! count for as long.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::log::OnceId;
use crate::message::DatasourceId;

/// How often in a window the ids are gone through for those that are over it.
const SWEEPS_PER_WINDOW: u32 = 16;

/// The open exchanges of this gateway.
pub(super) struct OpenExchanges {
    per_datasource_max: usize,
    window: Duration,
    state: Mutex<OpenExchangesState>,
}

struct OpenExchangesState {
    open: HashMap<OnceId, (DatasourceId, Instant)>,
    counts: HashMap<DatasourceId, usize>,
    swept_at: Instant,
}

impl OpenExchanges {
    pub(super) fn new(per_datasource_max: usize, window: Duration) -> Self {
        let (open, counts, swept_at) = (HashMap::new(), HashMap::new(), Instant::now());
        Self { per_datasource_max, window, state: Mutex::new(OpenExchangesState { open, counts, swept_at }) }
    }

    /// Counts an exchange, if it is open already or its datasource may open one more.
    pub(super) fn try_open(&self, datasource: &DatasourceId, id: OnceId) -> bool {
        let (mut state, now) = (self.state.lock(), Instant::now());
        if now.duration_since(state.swept_at) > self.window / SWEEPS_PER_WINDOW {
            state.swept_at = now;
            let OpenExchangesState { open, counts, .. } = &mut *state;
            for (_, (of, _)) in open.extract_if(|_, (_, since)| now.duration_since(*since) > self.window) {
                uncount(counts, &of);
            }
        }
        if let Some((_, since)) = state.open.get_mut(&id) {
            *since = now;
            return true;
        }
        let count = state.counts.get(datasource).copied().unwrap_or_default();
        if count >= self.per_datasource_max {
            return false;
        }
        state.counts.insert(datasource.clone(), count + 1);
        state.open.insert(id, (datasource.clone(), now));
        true
    }

    /// Counts released exchanges no more.
    pub(super) fn close(&self, ids: &[OnceId]) {
        let mut state = self.state.lock();
        for id in ids {
            if let Some((datasource, _)) = state.open.remove(id) {
                uncount(&mut state.counts, &datasource);
            }
        }
    }
}

fn uncount(counts: &mut HashMap<DatasourceId, usize>, datasource: &DatasourceId) {
    if let Some(count) = counts.get_mut(datasource) {
        *count -= 1;
        if *count == 0 {
            counts.remove(datasource);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datasource_has_so_many_exchanges_open_and_a_released_or_old_one_makes_room() {
        let of = |name: &str| DatasourceId::new(name).expect("a slug");
        let (press, oven, id) = (of("press-4"), of("oven"), |n| OnceId::of_exchange(1, n));
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
        assert!(exchanges.try_open(&press, id(2)), "the first one is over its window");
    }
}
