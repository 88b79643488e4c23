//! Places of watchers: how many there may be of a key, and in all. Each looks at the log once a second.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::front::problem::Problem;
use crate::limits::{LIVE_WATCHERS_MAX, LIVE_WATCHERS_PER_KEY_MAX, RETRY_AFTER};
use crate::message::KeyId;
use crate::observe::cause::Cause;

/// How many watchers each key has.
#[derive(Default)]
pub(in super::super) struct LivePlaces(Arc<Mutex<HashMap<KeyId, usize>>>);

/// A place of one watcher, until it is dropped.
pub(super) struct LivePlace {
    places: Arc<Mutex<HashMap<KeyId, usize>>>,
    key_id: KeyId,
}

impl LivePlaces {
    /// A place for one more watcher under a key.
    ///
    /// # Errors
    /// It has as many as it may have, or there are too many in all.
    pub(super) fn take(&self, key_id: KeyId) -> Result<LivePlace, Problem> {
        let mut places = self.0.lock();
        let of_key = places.get(&key_id).copied().unwrap_or_default();
        let is_over = of_key >= LIVE_WATCHERS_PER_KEY_MAX;
        if is_over || places.values().sum::<usize>() >= LIVE_WATCHERS_MAX {
            let whose = if is_over { "with this key" } else { "in all" };
            let limit = if is_over { LIVE_WATCHERS_PER_KEY_MAX } else { LIVE_WATCHERS_MAX };
            let words = format!("{limit} live views are open {whose}: close one.");
            let problem = Problem::new(Cause::TooManyRequests, words).with("limit_name", "live_watchers");
            return Err(problem.with("limit", limit).with_retry_after(RETRY_AFTER));
        }
        places.insert(key_id, of_key + 1);
        Ok(LivePlace { places: self.0.clone(), key_id })
    }
}

impl Drop for LivePlace {
    fn drop(&mut self) {
        let mut places = self.places.lock();
        match places.get_mut(&self.key_id) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(places.remove(&self.key_id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_so_many_watchers_and_no_more_until_one_leaves() {
        let places = LivePlaces::default();
        let key = |n: u8| KeyId([n; 6]);
        let mut held: Vec<_> =
            (0..LIVE_WATCHERS_PER_KEY_MAX).map(|_| places.take(key(1)).expect("room")).collect();
        assert!(places.take(key(1)).is_err());
        held.pop();
        held.push(places.take(key(1)).expect("one has left"));
        let keys = u8::try_from(LIVE_WATCHERS_MAX / LIVE_WATCHERS_PER_KEY_MAX).expect("a few");
        for n in 2..=keys {
            held.extend((0..LIVE_WATCHERS_PER_KEY_MAX).map(|_| places.take(key(n)).expect("room")));
        }
        assert!(places.take(key(200)).is_err(), "in all");
        drop(held);
        assert!(places.0.lock().is_empty());
    }
}
