//! The board: which datasources have series of their own, and what these and the one of all others show.
//!
//! **Each message is counted in one series.** While a datasource has a series, what it sends is counted there, and at all
//! other times in that of the others. So `sum(rate(…))` is right whoever comes and goes: a series that appears does not
//! bring along what the others have counted already, one that leaves hands nothing over, and one that comes again goes on
//! where it was.
//!
//! The others are never added up: they are the total without what the series show and have shown. The total and the
//! counts are read one after the other while messages come in, so the others never go back: they wait.
//!
//! Who has a series keeps it, unless another datasource has sent twice as much for a while ([`TRAFFIC_COMPARE_INTERVAL`]),
//! and few change at a time. A datasource that is deleted loses its series at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use parking_lot::Mutex;

use super::{DatasourceTraffic, TrafficCounts, TrafficSource};
use crate::limits::TRAFFIC_COMPARE_INTERVAL;
use crate::message::{DatasourceId, TimeMicros};

/// Messages by which a datasource has to be ahead of twice another, to take its place.
const TRAFFIC_LEAD_MIN: u64 = 16;
/// The part (one in so many) of the series that may change hands at once.
const TRAFFIC_CHANGE_SHARE: usize = 8;

/// Which datasources have series of their own.
pub struct TrafficBoard(Mutex<TrafficBoardState>);

struct TrafficBoardState {
    datasources_max: usize,
    shown: Vec<ShownDatasource>,
    /// What series that are gone have shown.
    retired: TrafficCounts,
    /// What the series of all others has shown.
    others: TrafficCounts,
    /// Datasources may have been counted among the others that were never looked at.
    is_unvisited: bool,
    compared_at: Option<Instant>,
}

struct ShownDatasource {
    id: DatasourceId,
    traffic: Arc<DatasourceTraffic>,
    /// What was counted elsewhere.
    base: TrafficCounts,
    /// What its series showed last.
    exposed: TrafficCounts,
    /// Its messages of late, of which each comparison forgets half.
    activity: u64,
}

/// What the series show.
#[derive(Debug, Default)]
pub struct TrafficReading {
    /// The datasources with series of their own, ordered by id: counts, and when the last message came.
    pub datasources: Vec<(DatasourceId, TrafficCounts, Option<TimeMicros>)>,
    /// All others together.
    pub others: TrafficCounts,
}

impl TrafficBoard {
    /// A board with series for so many datasources.
    pub fn new(datasources_max: usize) -> Self {
        Self(Mutex::new(TrafficBoardState {
            datasources_max,
            shown: Vec::new(),
            retired: TrafficCounts::default(),
            others: TrafficCounts::default(),
            is_unvisited: false,
            compared_at: None,
        }))
    }

    /// Changes for how many datasources there are series; for none, there are none at all.
    pub fn set_datasources_max(&self, datasources_max: usize) {
        self.0.lock().datasources_max = datasources_max;
    }

    /// What the series show now. `total` is what all datasources have sent, the deleted ones too, and was read before: a
    /// message counts for its datasource first. `None` if there are no series.
    pub fn read(
        &self,
        now: Instant,
        source: &dyn TrafficSource,
        total: TrafficCounts,
    ) -> Option<TrafficReading> {
        let mut state = self.0.lock();
        state.leave_deleted(source);
        state.leave_surplus();
        let room = state.datasources_max - state.shown.len();
        let is_due = state.compared_at.is_none_or(|at| now.duration_since(at) >= TRAFFIC_COMPARE_INTERVAL);
        if room == 0 && (!is_due || state.datasources_max == 0) {
            state.is_unvisited = true;
        } else {
            state.visit(source, room, is_due);
            if is_due {
                state.compared_at = Some(now);
            }
        }
        (state.datasources_max > 0).then(|| state.reading(total))
    }
}

impl TrafficBoardState {
    /// Takes the series away from datasources that are not there any more, or are others of the same name.
    fn leave_deleted(&mut self, source: &dyn TrafficSource) {
        let is_present = |shown: &ShownDatasource| {
            source.find(&shown.id).is_some_and(|of| Arc::ptr_eq(&of, &shown.traffic))
        };
        let (stay, leave) = std::mem::take(&mut self.shown).into_iter().partition(is_present);
        self.shown = stay;
        leave.into_iter().for_each(|shown: ShownDatasource| self.leave(&shown));
    }

    /// Takes the series away from those that are more than there may be: the least active ones.
    fn leave_surplus(&mut self) {
        self.shown.sort_by(|a, b| b.activity.cmp(&a.activity).then_with(|| a.id.cmp(&b.id)));
        for shown in self.shown.split_off(self.datasources_max.min(self.shown.len())) {
            self.leave(&shown);
        }
    }

    /// What a series has shown stays its own; what came after that is counted among the others.
    fn leave(&mut self, shown: &ShownDatasource) {
        shown.traffic.set_shown(shown.exposed);
        self.retired = self.retired.plus(shown.exposed);
    }

    /// Gives a datasource a series. What the others have shown of it already is not shown again.
    fn enter(&mut self, entrant: BoardEntrant) {
        let BoardEntrant { id, traffic, sent, is_among_others } = entrant;
        let before = traffic.shown();
        self.retired = self.retired.minus(before);
        let base = if is_among_others { traffic.counts().minus(before) } else { TrafficCounts::default() };
        self.shown.push(ShownDatasource { id, traffic, base, exposed: before, activity: sent });
    }

    /// Looks at all datasources: gives those without a series the room that there is, the most active ones first; and if
    /// it `is_due`, the series of less active ones.
    fn visit(&mut self, source: &dyn TrafficSource, room: usize, is_due: bool) {
        let changes_max = if is_due { self.datasources_max.div_ceil(TRAFFIC_CHANGE_SHARE) } else { 0 };
        let mut entrants = self.find_entrants(source, room + changes_max, is_due).into_iter();
        entrants.by_ref().take(room).for_each(|entrant| self.enter(entrant));
        // The least active one last.
        self.shown.sort_by_key(|shown| std::cmp::Reverse(shown.activity));
        let mut come = Vec::new();
        for entrant in entrants.take(changes_max) {
            let ahead = |shown: &mut ShownDatasource| {
                entrant.sent >= shown.activity.saturating_mul(2).saturating_add(TRAFFIC_LEAD_MIN)
            };
            let Some(shown) = self.shown.pop_if(ahead) else { break };
            self.leave(&shown);
            come.push(entrant);
        }
        come.into_iter().for_each(|entrant| self.enter(entrant));
    }

    /// The most active datasources without a series, so many at most. If it `is_due`, all are compared from here on.
    fn find_entrants(
        &mut self,
        source: &dyn TrafficSource,
        entrants_max: usize,
        is_due: bool,
    ) -> Vec<BoardEntrant> {
        let was_unvisited = std::mem::take(&mut self.is_unvisited);
        let mut places: HashMap<*const DatasourceTraffic, &mut ShownDatasource> =
            self.shown.iter_mut().map(|shown| (Arc::as_ptr(&shown.traffic), shown)).collect();
        let mut entrants: Vec<BoardEntrant> = Vec::new();
        source.visit(&mut |id, traffic| {
            let counts = traffic.counts();
            let sent = counts.messages.saturating_sub(traffic.compared.load(Ordering::Relaxed));
            if is_due {
                traffic.compared.store(counts.messages, Ordering::Relaxed);
            }
            if let Some(shown) = places.get_mut(&Arc::as_ptr(traffic)) {
                if is_due {
                    shown.activity = shown.activity / 2 + sent;
                }
            } else if counts != TrafficCounts::default() {
                // Those that are not chosen are among the others from now on.
                let is_among_others = traffic.is_among_others.swap(true, Ordering::Relaxed) || was_unvisited;
                entrants.push(BoardEntrant {
                    id: id.clone(),
                    traffic: traffic.clone(),
                    sent,
                    is_among_others,
                });
                if entrants.len() >= 2 * entrants_max + 64 {
                    keep_most_active(&mut entrants, entrants_max);
                }
            }
        });
        keep_most_active(&mut entrants, entrants_max);
        entrants
    }

    fn reading(&mut self, total: TrafficCounts) -> TrafficReading {
        let mut own = self.retired;
        self.shown.sort_by(|a, b| a.id.cmp(&b.id));
        let datasources = self.shown.iter_mut().map(|shown| {
            shown.exposed = shown.exposed.max(shown.traffic.counts().minus(shown.base));
            own = own.plus(shown.exposed);
            (shown.id.clone(), shown.exposed, shown.traffic.last_at())
        });
        let datasources = datasources.collect();
        self.others = self.others.max(total.minus(own));
        TrafficReading { datasources, others: self.others }
    }
}

/// A datasource that may get a series.
struct BoardEntrant {
    id: DatasourceId,
    traffic: Arc<DatasourceTraffic>,
    /// Its messages since all were compared.
    sent: u64,
    /// Whether the others have shown some of it.
    is_among_others: bool,
}

fn keep_most_active(entrants: &mut Vec<BoardEntrant>, count_max: usize) {
    entrants.sort_by(|a, b| b.sent.cmp(&a.sent).then_with(|| a.id.cmp(&b.id)));
    entrants.truncate(count_max);
}
