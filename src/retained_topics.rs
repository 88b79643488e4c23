//! Retained topics: how many topics of each datasource have a retained message, and how many bytes those have.
//! Intake enters a topic when it lets its first retained message in, so that a flood stops at the limit; the
//! consumer that keeps retained messages confirms each, and takes out what was cleared.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long a message may be on its way from intake to the consumer before its topic counts no more: it was
/// refused further on.
const UNCONFIRMED_MAX: Duration = Duration::from_secs(60);
/// How often a full table is looked through for such topics.
const CLEAR_UP_INTERVAL: Duration = Duration::from_secs(10);

/// The retained topics of all datasources, each as a keyed hash of 64 bits.
#[derive(Debug, Default)]
pub struct RetainedTopics {
    by_datasource: Mutex<HashMap<Box<str>, TopicTable>>,
    hash: RandomState,
}

#[derive(Debug, Default)]
struct TopicTable {
    topics: HashMap<u64, RetainedTopic>,
    bytes: u64,
    cleared_up: Option<Instant>,
}

#[derive(Debug)]
struct RetainedTopic {
    bytes: u64,
    /// When intake let it in; `None` once the consumer has it.
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
        let mut tables = self.by_datasource.lock();
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
        table.topics.entry(hash).or_insert_with(|| {
            table.bytes += bytes;
            RetainedTopic { bytes, unconfirmed: Some(Instant::now()) }
        });
        Ok(())
    }

    /// The consumer has a topic's message of `bytes` now; with 0 it has none any more.
    pub fn confirm(&self, datasource: &str, topic: &str, bytes: u64) {
        let hash = self.hash.hash_one(topic);
        let mut tables = self.by_datasource.lock();
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
        let before = table.topics.insert(hash, RetainedTopic { bytes, unconfirmed: None });
        table.bytes = table.bytes + bytes - before.map_or(0, |topic| topic.bytes);
    }

    /// Forgets all topics: the consumer begins anew.
    pub fn clear(&self) {
        self.by_datasource.lock().clear();
    }
}

impl TopicTable {
    /// Takes out what was let in and never reached the consumer.
    fn clear_up(&mut self) {
        if self.cleared_up.is_some_and(|at| at.elapsed() < CLEAR_UP_INTERVAL) {
            return;
        }
        self.cleared_up = Some(Instant::now());
        let Self { topics, bytes, .. } = self;
        topics.retain(|_, topic| {
            let lost = topic.unconfirmed.is_some_and(|since| since.elapsed() > UNCONFIRMED_MAX);
            *bytes -= if lost { topic.bytes } else { 0 };
            !lost
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
        topics.confirm("a", "y", 10);
        assert_eq!(enter("x", 90), Ok(()), "there is room now");
        topics.confirm("a", "x", 90);
        assert_eq!(enter("y", 11), Err(RetainedFull::Bytes));
        topics.confirm("a", "x", 0);
        assert_eq!(enter("z", 90), Ok(()), "a cleared topic makes room");
        topics.confirm("a", "y", 0);
        topics.confirm("a", "z", 0);
        topics.confirm("b", "z", 0);
        assert!(topics.by_datasource.lock().is_empty());
    }
}
