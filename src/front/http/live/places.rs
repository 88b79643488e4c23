//! Places of watchers: how many there may be of a key, and in all. Each looks at the log once a second.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::front::problem::Problem;
use crate::limits::{
    LIVE_WATCHERS_MAX, LIVE_WATCHERS_PER_DATASOURCE_MAX, LIVE_WATCHERS_PER_KEY_MAX, RETRY_AFTER,
};
use crate::message::{DatasourceId, KeyId};
use crate::observe::cause::Cause;

/// The watchers of each key, and whose key it is.
type WatcherCounts = HashMap<KeyId, (DatasourceId, usize)>;

/// How many watchers each key has.
#[derive(Default)]
pub(in super::super) struct LivePlaces(Arc<Mutex<WatcherCounts>>);

/// A place of one watcher, until it is dropped.
pub(super) struct LivePlace {
    places: Arc<Mutex<WatcherCounts>>,
    key_id: KeyId,
}

impl LivePlaces {
    /// A place for one more watcher under a key of a datasource, or of all. Those with keys for all are not kept out by
    /// those of the datasources, and these not by each other.
    ///
    /// # Errors
    /// It has as many as it may have, or there are too many in all.
    pub(super) fn take(&self, key_id: KeyId, owner: &DatasourceId) -> Result<LivePlace, Problem> {
        let mut places = self.0.lock();
        let of_key = places.get(&key_id).map_or(0, |(_, count)| *count);
        let count_of = |counts: &dyn Fn(&DatasourceId) -> bool| -> usize {
            places.values().filter(|(of, _)| counts(of)).map(|(_, count)| count).sum()
        };
        let of_owner = count_of(&|of| of == owner);
        let of_its_kind = count_of(&|of| of.is_all() == owner.is_all());
        let over = if of_key >= LIVE_WATCHERS_PER_KEY_MAX {
            Some((LIVE_WATCHERS_PER_KEY_MAX, "with this key"))
        } else if !owner.is_all() && of_owner >= LIVE_WATCHERS_PER_DATASOURCE_MAX {
            Some((LIVE_WATCHERS_PER_DATASOURCE_MAX, "with keys of this datasource"))
        } else {
            (of_its_kind >= LIVE_WATCHERS_MAX).then_some((LIVE_WATCHERS_MAX, "in all"))
        };
        if let Some((limit, whose)) = over {
            let words = format!("{limit} live views are open {whose}: close one.");
            let problem = Problem::new(Cause::TooManyRequests, words).with("limit_name", "live_watchers");
            return Err(problem.with("limit", limit).with_retry_after(RETRY_AFTER));
        }
        places.insert(key_id, (owner.clone(), of_key + 1));
        Ok(LivePlace { places: self.0.clone(), key_id })
    }
}

impl Drop for LivePlace {
    fn drop(&mut self) {
        let mut places = self.places.lock();
        match places.get_mut(&self.key_id) {
            Some((_, count)) if *count > 1 => *count -= 1,
            _ => drop(places.remove(&self.key_id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_and_a_datasource_have_so_many_watchers_and_nobody_keeps_out_keys_for_all() {
        let places = LivePlaces::default();
        let key = |n: usize| KeyId([u8::try_from(n).expect("a few"); 6]);
        let of = |n: usize| DatasourceId::new(&format!("press-{n}")).expect("a slug");
        let mut held: Vec<_> =
            (0..LIVE_WATCHERS_PER_KEY_MAX).map(|_| places.take(key(0), &of(0)).expect("room")).collect();
        assert!(places.take(key(0), &of(0)).is_err());
        held.pop();
        held.push(places.take(key(0), &of(0)).expect("one has left"));
        let per_datasource = LIVE_WATCHERS_PER_DATASOURCE_MAX / LIVE_WATCHERS_PER_KEY_MAX;
        let keys = LIVE_WATCHERS_MAX / LIVE_WATCHERS_PER_KEY_MAX;
        for n in 1..keys {
            if n == per_datasource {
                assert!(places.take(key(n), &of(0)).is_err(), "of the datasource");
            }
            let all = (0..LIVE_WATCHERS_PER_KEY_MAX).map(|_| places.take(key(n), &of(n / per_datasource)));
            held.extend(all.map(|place| place.expect("room")));
        }
        assert!(places.take(key(200), &of(200)).is_err(), "in all");
        held.push(places.take(key(201), &DatasourceId::all()).expect("a key for all"));
        drop(held);
        assert!(places.0.lock().is_empty());
    }
}
