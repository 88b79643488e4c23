//! A model of the board: whoever sends, comes, goes and comes again, what a Prometheus adds up of the series is what was
//! sent. It guards against messages that are counted in two series, or in none, when a datasource gets or loses its own.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::limits::TRAFFIC_COMPARE_INTERVAL;

/// Datasources by id.
#[derive(Default)]
struct ModelDatasources(BTreeMap<DatasourceId, Arc<DatasourceTraffic>>);

impl TrafficSource for ModelDatasources {
    fn visit(&self, each: &mut dyn FnMut(&DatasourceId, &Arc<DatasourceTraffic>)) {
        self.0.iter().for_each(|(id, traffic)| each(id, traffic));
    }

    fn find(&self, datasource: &DatasourceId) -> Option<Arc<DatasourceTraffic>> {
        self.0.get(datasource).cloned()
    }
}

#[derive(Debug, Clone)]
enum BoardStep {
    /// One of the datasources sends so many messages; it is created if it is not there.
    Send(u8, u64),
    /// One is refused.
    Refuse(u8),
    /// One is deleted.
    Delete(u8),
    /// The series are read, so many seconds later.
    Read(u64),
    /// So many may have series.
    Resize(usize),
}

fn steps() -> impl Strategy<Value = Vec<BoardStep>> {
    let step = prop_oneof![
        8 => (0..12_u8, 0..200_u64).prop_map(|(of, count)| BoardStep::Send(of, count)),
        2 => (0..12_u8).prop_map(BoardStep::Refuse),
        1 => (0..12_u8).prop_map(BoardStep::Delete),
        6 => (0..90_u64).prop_map(BoardStep::Read),
        1 => (0..6_usize).prop_map(BoardStep::Resize),
    ];
    vec(step, 1..120)
}

/// What a Prometheus adds up of a series that it reads: how much more it is each time. A series that is there for the
/// first time begins at nothing here, so that what is lost is seen too.
#[derive(Default)]
struct SeriesSums {
    last: BTreeMap<String, TrafficCounts>,
    sum: TrafficCounts,
    /// Some series began anew, with its datasource, and may have passed its old value by: a Prometheus misses that.
    may_miss: bool,
}

impl SeriesSums {
    fn read(&mut self, series: &str, now: TrafficCounts, is_another: bool) {
        let last = self.last.insert(series.to_owned(), now).unwrap_or_default();
        let went_back = now.zip(last, |now, last| u64::from(now < last)) != TrafficCounts::default();
        assert!(!went_back || is_another, "{series} goes back from {last:?} to {now:?}");
        let gained = |now: u64, last: u64| if now < last { now } else { now - last };
        self.may_miss |= is_another && last != TrafficCounts::default();
        self.sum = self.sum.plus(now.zip(last, gained));
    }
}

/// A run of the model: how often each name was taken, and in which of its lives a series was seen last.
struct TrafficModel {
    board: TrafficBoard,
    datasources: ModelDatasources,
    lives: BTreeMap<DatasourceId, u32>,
    seen_lives: BTreeMap<DatasourceId, u32>,
    sent: TrafficCounts,
    sums: SeriesSums,
    now: Instant,
    datasources_max: usize,
}

impl TrafficModel {
    fn id(of: u8) -> DatasourceId {
        DatasourceId::new(&format!("press-{of}")).expect("a slug")
    }

    fn traffic(&mut self, of: u8) -> Arc<DatasourceTraffic> {
        let (id, lives) = (Self::id(of), &mut self.lives);
        let made = || {
            *lives.entry(id.clone()).or_default() += 1;
            Arc::default()
        };
        self.datasources.0.entry(id.clone()).or_insert_with(made).clone()
    }

    fn run(&mut self, step: &BoardStep) {
        match *step {
            BoardStep::Send(of, messages) => {
                self.traffic(of).count(messages, 10 * messages, 1);
                let (bytes, refused) = (10 * messages, 0);
                self.sent = self.sent.plus(TrafficCounts { messages, bytes, refused });
            }
            BoardStep::Refuse(of) => {
                self.traffic(of).count_refused();
                self.sent.refused += 1;
            }
            BoardStep::Delete(of) => drop(self.datasources.0.remove(&Self::id(of))),
            BoardStep::Resize(max) => {
                self.datasources_max = max;
                self.board.set_datasources_max(max);
            }
            BoardStep::Read(seconds) => {
                self.now += Duration::from_secs(seconds);
                self.read();
            }
        }
    }

    fn read(&mut self) {
        let Some(reading) = self.board.read(self.now, &self.datasources, self.sent) else {
            assert_eq!(self.datasources_max, 0);
            return;
        };
        assert!(reading.datasources.len() <= self.datasources_max);
        for (id, counts, _) in reading.datasources {
            assert!(self.datasources.0.contains_key(&id), "{id} is deleted");
            let life = self.lives[&id];
            let is_another = self.seen_lives.insert(id.clone(), life).is_some_and(|seen| seen != life);
            self.sums.read(id.as_str(), counts, is_another);
        }
        self.sums.read("_other", reading.others, false);
        let (sum, sent) = (self.sums.sum, self.sent);
        assert_eq!(sum.max(sent), sent, "more was counted than was sent");
        assert!(sum == sent || self.sums.may_miss, "{sum:?} was counted of {sent:?}");
    }
}

fn run_all(datasources_max: usize, steps: &[BoardStep]) {
    let mut run = TrafficModel {
        board: TrafficBoard::new(datasources_max),
        datasources: ModelDatasources::default(),
        lives: BTreeMap::new(),
        seen_lives: BTreeMap::new(),
        sent: TrafficCounts::default(),
        sums: SeriesSums::default(),
        now: Instant::now(),
        datasources_max,
    };
    steps.iter().for_each(|step| run.run(step));
    run.board.set_datasources_max(4);
    run.datasources_max = 4;
    run.read();
}

proptest! {
    #[test]
    fn every_message_is_counted_in_one_series_and_none_goes_back(max in 0..5_usize, steps in steps()) {
        run_all(max, &steps);
    }
}

#[test]
fn a_series_changes_hands_slowly_and_only_to_who_sends_much_more() {
    let (board, mut datasources) = (TrafficBoard::new(1), ModelDatasources::default());
    for name in ["a", "b"] {
        datasources.0.insert(DatasourceId::new(name).expect("a slug"), Arc::default());
    }
    let mut now = Instant::now();
    let count = |name: &str, messages| {
        datasources.0[&DatasourceId::new(name).expect("a slug")].count(messages, 0, 1);
    };
    let shown = |now: Instant| {
        let total = datasources.0.values().fold(TrafficCounts::default(), |sum, of| sum.plus(of.counts()));
        let reading = board.read(now, &datasources, total).expect("one series");
        (
            reading.datasources[0].0.as_str().to_owned(),
            reading.datasources[0].1.messages,
            reading.others.messages,
        )
    };
    count("a", 100);
    assert_eq!(shown(now), ("a".to_owned(), 100, 0));
    count("b", 110);
    assert_eq!(shown(now), ("a".to_owned(), 100, 110), "b has no series");
    now += TRAFFIC_COMPARE_INTERVAL;
    count("a", 1);
    assert_eq!(shown(now), ("a".to_owned(), 101, 110), "b has sent more, but not twice as much of late");
    count("b", 1_000);
    assert_eq!(shown(now), ("a".to_owned(), 101, 1_110), "not before the next comparison");
    now += TRAFFIC_COMPARE_INTERVAL;
    count("a", 5);
    count("b", 7);
    assert_eq!(shown(now), ("b".to_owned(), 0, 1_122), "what was counted among the others stays there");
    count("b", 3);
    count("a", 2);
    assert_eq!(shown(now), ("b".to_owned(), 3, 1_124));
    for _ in 0..12 {
        count("a", 50_000);
        now += TRAFFIC_COMPARE_INTERVAL;
    }
    let (name, messages, _) = shown(now);
    assert_eq!((&*name, messages), ("a", 101), "it goes on where it was");
}
