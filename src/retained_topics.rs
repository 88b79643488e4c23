//! Retained topics: how many topics of each datasource have a retained message, and how many bytes those have.
//! Intake enters a topic when it lets its first retained message in, and what a larger one takes beyond that, so that a
//! flood stops at the limit; the consumer that keeps retained messages confirms each, and takes out what was cleared.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use crate::scheduler::polite_lock;

/// How long a message may be on its way from intake to the consumer before it counts no more: it was refused further on.
const UNCONFIRMED_MAX: Duration = Duration::from_secs(60);
/// How often a full table is looked through for such messages.
const CLEAR_UP_INTERVAL: Duration = Duration::from_secs(10);

/// Locks for the datasources: nobody waits for the one that another one's flood holds, or seldom.
const TOPIC_SHARDS: usize = 64;

type TopicTables = HashMap<Box<str>, TopicTable>;

/// The retained topics of all datasources, each as a keyed hash of 64 bits.
#[derive(Debug)]
pub struct RetainedTopics {
    shards: [Mutex<TopicTables>; TOPIC_SHARDS],
    hash: RandomState,
}

impl Default for RetainedTopics {
    fn default() -> Self {
        Self::with_hash(RandomState::new())
    }
}

#[derive(Debug, Default)]
struct TopicTable {
    topics: HashMap<u64, RetainedTopic>,
    bytes: u64,
    cleared_up: Option<Instant>,
}

#[derive(Debug)]
struct RetainedTopic {
    /// What it counts for.
    bytes: u64,
    /// What of that the consumer has.
    confirmed_bytes: u64,
    /// When intake let in what it has not; `None` once it has all.
    unconfirmed: Option<Instant>,
}

/// The limit that a retained message is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetainedFull {
    /// Of topics.
    Topics,
    /// Of bytes.
    Bytes,
}

impl RetainedTopics {
    fn with_hash(hash: RandomState) -> Self {
        Self { shards: std::array::from_fn(|_| Mutex::default()), hash }
    }

    /// Counts everything anew: `count` confirms what there is to an empty count, which then takes the place of the present
    /// one. What intake lets in meanwhile stays entered.
    ///
    /// # Errors
    /// Those of `count`; then nothing has changed.
    pub fn recount<E>(&self, count: impl FnOnce(&Self) -> Result<(), E>) -> Result<(), E> {
        let counted = Self::with_hash(self.hash.clone());
        count(&counted)?;
        for (shard, counted) in self.shards.iter().zip(counted.shards) {
            let mut tables = polite_lock(shard);
            let before = std::mem::replace(&mut *tables, counted.into_inner());
            for (datasource, table) in before {
                for (hash, topic) in table.topics {
                    if let Some(since) = topic.unconfirmed {
                        tables.entry(datasource.clone()).or_default().enter(hash, topic.bytes, since);
                    }
                }
            }
        }
        Ok(())
    }

    fn tables_of(&self, datasource: &str) -> MutexGuard<'_, TopicTables> {
        let shard = self.hash.hash_one(datasource) % TOPIC_SHARDS as u64;
        polite_lock(&self.shards[usize::try_from(shard).unwrap_or_default()])
    }

    /// Enters a topic with a message of `bytes`, if the datasource may have it. One that is there already may
    /// have a message that is no larger, whatever the limits are.
    ///
    /// # Errors
    /// [`RetainedFull`].
    pub fn try_enter(
        &self,
        datasource: &str,
        topic: &str,
        bytes: u64,
        topics_max: u64,
        bytes_max: u64,
    ) -> Result<(), RetainedFull> {
        let hash = self.hash.hash_one(topic);
        let mut tables = self.tables_of(datasource);
        if !tables.contains_key(datasource) {
            tables.insert(datasource.into(), TopicTable::default());
        }
        let Some(table) = tables.get_mut(datasource) else { return Ok(()) };
        let fits = |table: &TopicTable| match table.topics.get(&hash) {
            Some(present) if bytes <= present.bytes => Ok(()),
            Some(present) if table.bytes - present.bytes + bytes > bytes_max => Err(RetainedFull::Bytes),
            Some(_) => Ok(()),
            None if table.topics.len() as u64 >= topics_max => Err(RetainedFull::Topics),
            None if table.bytes + bytes > bytes_max => Err(RetainedFull::Bytes),
            None => Ok(()),
        };
        if fits(table).is_err() {
            table.clear_up();
        }
        fits(table)?;
        table.enter(hash, bytes, Instant::now());
        Ok(())
    }

    /// The consumer has a topic's message of `bytes` now; with 0 it has none any more. It confirms each message in turn, so that
    /// a larger one that was let in is still on its way behind this one, and goes on to count.
    pub fn confirm(&self, datasource: &str, topic: &str, bytes: u64) {
        let hash = self.hash.hash_one(topic);
        let mut tables = self.tables_of(datasource);
        let on_its_way = tables.get_mut(datasource).and_then(|table| table.topics.get_mut(&hash));
        if let Some(topic) = on_its_way.filter(|topic| topic.unconfirmed.is_some() && bytes < topic.bytes) {
            topic.confirmed_bytes = bytes;
            return;
        }
        if bytes == 0 {
            let Some(table) = tables.get_mut(datasource) else { return };
            table.bytes -= table.topics.remove(&hash).map_or(0, |topic| topic.bytes);
            if table.topics.is_empty() {
                tables.remove(datasource);
            }
            return;
        }
        let table = match tables.get_mut(datasource) {
            Some(table) => table,
            None => tables.entry(datasource.into()).or_default(),
        };
        let confirmed = RetainedTopic { bytes, confirmed_bytes: bytes, unconfirmed: None };
        let before = table.topics.insert(hash, confirmed);
        table.bytes = table.bytes + bytes - before.map_or(0, |topic| topic.bytes);
    }
}

impl TopicTable {
    /// Enters a message of `bytes` that was let in at a time. A smaller one than there is counts once it is confirmed.
    fn enter(&mut self, hash: u64, bytes: u64, at: Instant) {
        let topic = self.topics.entry(hash).or_insert(RetainedTopic {
            bytes: 0,
            confirmed_bytes: 0,
            unconfirmed: None,
        });
        if bytes > topic.bytes {
            self.bytes += bytes - topic.bytes;
            (topic.bytes, topic.unconfirmed) = (bytes, Some(at));
        }
    }

    /// Takes out what was let in and never reached the consumer.
    fn clear_up(&mut self) {
        if self.cleared_up.is_some_and(|at| at.elapsed() < CLEAR_UP_INTERVAL) {
            return;
        }
        self.cleared_up = Some(Instant::now());
        let Self { topics, bytes, .. } = self;
        topics.retain(|_, topic| {
            if topic.unconfirmed.is_some_and(|since| since.elapsed() > UNCONFIRMED_MAX) {
                *bytes -= topic.bytes - topic.confirmed_bytes;
                (topic.bytes, topic.unconfirmed) = (topic.confirmed_bytes, None);
            }
            topic.bytes > 0
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_and_bytes_end_at_their_limits_and_what_is_there_may_change() {
        let topics = RetainedTopics::default();
        let enter = |topic: &str, bytes| topics.try_enter("a", topic, bytes, 2, 100);
        assert_eq!((enter("x", 40), enter("y", 60)), (Ok(()), Ok(())));
        assert_eq!(enter("z", 1), Err(RetainedFull::Topics));
        assert_eq!(enter("x", 41), Err(RetainedFull::Bytes));
        assert_eq!(enter("x", 40), Ok(()));
        assert_eq!(topics.try_enter("b", "z", 100, 2, 100), Ok(()), "another datasource has its own");
        topics.confirm("a", "y", 60);
        topics.confirm("a", "y", 10);
        assert_eq!(enter("x", 90), Ok(()), "there is room now");
        topics.confirm("a", "x", 90);
        assert_eq!(enter("y", 11), Err(RetainedFull::Bytes));
        topics.confirm("a", "x", 0);
        assert_eq!(enter("z", 90), Ok(()), "a cleared topic makes room");
        topics.confirm("a", "y", 0);
        for (datasource, bytes) in [("a", 90), ("b", 100)] {
            topics.confirm(datasource, "z", bytes);
            topics.confirm(datasource, "z", 0);
        }
        assert!(topics.shards.iter().all(|shard| shard.lock().is_empty()));
    }

    /// Each topic began with a byte, and all of them grew before the consumer had the first.
    #[test]
    fn what_a_topic_grows_by_counts_at_once_and_no_more_if_it_never_reaches_the_consumer() {
        let topics = RetainedTopics::default();
        let enter = |topic: &str, bytes| topics.try_enter("a", topic, bytes, 9, 100);
        for topic in ["x", "y", "z"] {
            assert_eq!(enter(topic, 1), Ok(()));
            topics.confirm("a", topic, 1);
        }
        assert_eq!((enter("x", 60), enter("y", 39)), (Ok(()), Ok(())));
        assert_eq!(enter("z", 2), Err(RetainedFull::Bytes));
        assert_eq!(enter("y", 38), Ok(()), "a smaller one counts once it is there");
        topics.confirm("a", "y", 39);
        topics.confirm("a", "y", 38);
        assert_eq!(enter("z", 2), Ok(()));
        // The one of 60 bytes is lost.
        let since = Instant::now().checked_sub(2 * UNCONFIRMED_MAX).expect("the machine has run for so long");
        if let Some(table) = topics.tables_of("a").get_mut("a") {
            for topic in table.topics.values_mut().filter(|topic| topic.bytes == 60) {
                topic.unconfirmed = Some(since);
            }
            table.cleared_up = None;
        }
        assert_eq!(enter("new", 59), Ok(()), "what it was before counts: 1, 38 and 2");
        assert_eq!(enter("x", 2), Err(RetainedFull::Bytes));
        assert_eq!(enter("x", 1), Ok(()));
    }

    /// The confirmation of what a topic had before took out what it had grown by.
    #[test]
    fn what_a_topic_grows_by_counts_when_an_earlier_message_or_its_end_is_confirmed() {
        let topics = RetainedTopics::default();
        let enter = |topic: &str, bytes| topics.try_enter("a", topic, bytes, 1, 100);
        for earlier in [40, 0] {
            assert_eq!((enter("x", 40), enter("x", 90)), (Ok(()), Ok(())));
            topics.confirm("a", "x", earlier);
            assert_eq!(enter("y", 1), Err(RetainedFull::Topics));
            assert_eq!(topics.try_enter("a", "y", 11, 2, 100), Err(RetainedFull::Bytes), "{earlier}");
            topics.confirm("a", "x", 90);
            topics.confirm("a", "x", 0);
            assert_eq!(enter("y", 100), Ok(()), "all is over");
            topics.confirm("a", "y", 100);
            topics.confirm("a", "y", 0);
        }
        assert!(topics.shards.iter().all(|shard| shard.lock().is_empty()));
    }

    #[test]
    fn what_is_let_in_while_all_is_counted_anew_counts() {
        let topics = RetainedTopics::default();
        topics.confirm("a", "gone", 50);
        let enter = |topic: &str, bytes| topics.try_enter("a", topic, bytes, 3, 100);
        let counted = topics.recount(|counted| {
            counted.confirm("a", "x", 40);
            counted.confirm("a", "y", 10);
            enter("y", 20).expect("fits");
            enter("z", 30).map_err(|_| ())
        });
        assert_eq!(counted, Ok(()));
        assert_eq!(enter("new", 1), Err(RetainedFull::Topics));
        topics.confirm("a", "x", 0);
        assert_eq!(enter("new", 51), Err(RetainedFull::Bytes), "what has grown counts too");
        assert_eq!(enter("new", 50), Ok(()));
        assert_eq!(topics.recount(|_| Err(())), Err(()));
        assert_eq!(enter("newer", 1), Err(RetainedFull::Topics), "a count that fails changes nothing");
    }
}
