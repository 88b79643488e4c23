//! The board: in memory, what `latest` shows of the datasources that are asked for it again and again. While a hundred
//! thousand messages a second come in, each answer would otherwise read thousands of rows that have just been written.
//!
//! The thread that writes `records.db` alone puts things on the board, behind each of its transactions, so that the board says
//! what the database says. It puts a datasource there some time after somebody has asked for it, keeps it up to date, and takes it
//! down when nobody asks any more. Whatever else changes newest values clears the board: until then, and for all that has no
//! room there, the database is read. A topic is rendered when it is asked for, and stays so until it changes.

mod topics;

use std::collections::HashMap;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rusqlite::Connection;

use self::topics::BoardTopics;
use super::newest::NewestValues;
use crate::consume::query::PageBudget;
use crate::limits::LATEST_BOARD_DATASOURCES_MAX;
use crate::message::DatasourceId;

/// How long a datasource stays on the board that nobody asks for.
const UNASKED_MAX: Duration = Duration::from_secs(30);

/// The board of one `records.db`.
#[derive(Default)]
pub struct LatestBoard {
    /// By the scope of each datasource.
    places: Mutex<HashMap<DatasourceId, BoardPlace>>,
    /// There is a place on it.
    is_used: AtomicBool,
}

/// The place of one datasource.
struct BoardPlace {
    asked_at: Instant,
    state: BoardState,
}

enum BoardState {
    /// It is to be put there.
    Wanted,
    Shown(Arc<Mutex<BoardTopics>>),
    /// It is too large.
    TooLarge,
}

impl LatestBoard {
    /// Gives the topics of a datasource to `each` as they are shown, those after `after_topic` in the order of their names, while
    /// `budget` is not spent. Returns the topic after which it goes on if there are more; `None` for the whole if the datasource is not there: it is asked
    /// for then.
    pub(in crate::consume) fn read(
        &self,
        scope: &DatasourceId,
        after_topic: Option<&str>,
        budget: &mut PageBudget,
        each: &mut dyn FnMut(&str, &[u8]),
    ) -> Option<Option<String>> {
        let topics = self.ask(scope)?;
        let mut topics = topics.lock();
        let after = after_topic.map_or(Bound::Unbounded, Bound::Excluded);
        let (mut last, mut more_bytes) = (None::<&str>, 0);
        let mut next = None;
        for (name, topic) in topics.topics.range_mut::<str, _>((after, Bound::Unbounded)) {
            if budget.is_spent() {
                next = last.map(str::to_owned);
                break;
            }
            budget.take(topic.page_bytes(name));
            if topic.rendered.is_none() {
                let rendered = topic.render(name);
                more_bytes += rendered.len();
                topic.rendered = Some(rendered);
            }
            each(name, topic.rendered.as_deref().unwrap_or_default());
            last = Some(name);
        }
        topics.bytes += more_bytes;
        Some(next)
    }

    /// The topics of a datasource that is there, and notes that they are asked for.
    fn ask(&self, scope: &DatasourceId) -> Option<Arc<Mutex<BoardTopics>>> {
        let mut places = self.places.lock();
        let now = Instant::now();
        if let Some(place) = places.get_mut(scope) {
            place.asked_at = now;
            return match &place.state {
                BoardState::Shown(topics) => Some(topics.clone()),
                BoardState::Wanted | BoardState::TooLarge => None,
            };
        }
        places.retain(|_, place| now.duration_since(place.asked_at) < UNASKED_MAX);
        if places.len() < LATEST_BOARD_DATASOURCES_MAX {
            places.insert(scope.clone(), BoardPlace { asked_at: now, state: BoardState::Wanted });
            self.is_used.store(true, Ordering::Release);
        }
        None
    }

    /// Takes everything down: what the database says may be something else. Whoever asks again has it put there again.
    pub(super) fn clear(&self) {
        if self.is_used.swap(false, Ordering::AcqRel) {
            self.places.lock().clear();
        }
    }

    /// Takes topics of a datasource down that have no record any more.
    pub(super) fn forget_topics<'t>(&self, datasource: i64, names: impl Iterator<Item = &'t str> + Clone) {
        if !self.is_used.load(Ordering::Acquire) {
            return;
        }
        for (_, topics) in self.shown() {
            topics.lock().forget(datasource, names.clone());
        }
    }

    /// Puts the values there that a transaction has written, behind its end, and the datasources that are wanted.
    pub(super) fn follow(&self, connection: &Connection, newest: &NewestValues<'_>) {
        if !self.is_used.load(Ordering::Acquire) {
            return;
        }
        let shown = self.shown();
        for (scope, topics) in shown {
            let mut topics = topics.lock();
            let state = match topics.follow(connection, newest) {
                Ok(()) if !topics.is_too_large() => continue,
                Ok(()) => BoardState::TooLarge,
                // What the database says is not known: whoever asks reads it there.
                Err(_) => BoardState::Wanted,
            };
            drop(topics);
            if let Some(place) = self.places.lock().get_mut(&scope) {
                place.state = state;
            }
        }
        let places = self.places.lock();
        let is_wanted = |(scope, place): (&DatasourceId, &BoardPlace)| {
            matches!(place.state, BoardState::Wanted).then(|| scope.clone())
        };
        let wanted: Vec<DatasourceId> = places.iter().filter_map(is_wanted).collect();
        drop(places);
        for scope in wanted {
            let state = match BoardTopics::read(connection, &scope) {
                Ok(Some(topics)) if topics.is_too_large() => BoardState::TooLarge,
                Ok(Some(topics)) => BoardState::Shown(Arc::new(Mutex::new(topics))),
                // It has no records yet, or storage is about to say what is wrong.
                Ok(None) | Err(_) => continue,
            };
            if let Some(place) = self.places.lock().get_mut(&scope) {
                place.state = state;
            }
        }
    }

    /// What is there. Takes down what nobody asks for.
    fn shown(&self) -> Vec<(DatasourceId, Arc<Mutex<BoardTopics>>)> {
        let mut places = self.places.lock();
        let now = Instant::now();
        places.retain(|_, place| now.duration_since(place.asked_at) < UNASKED_MAX);
        self.is_used.store(!places.is_empty(), Ordering::Release);
        let shown = |(scope, place): (&DatasourceId, &BoardPlace)| match &place.state {
            BoardState::Shown(topics) => Some((scope.clone(), topics.clone())),
            BoardState::Wanted | BoardState::TooLarge => None,
        };
        places.iter().filter_map(shown).collect()
    }
}

#[cfg(test)]
mod tests;
