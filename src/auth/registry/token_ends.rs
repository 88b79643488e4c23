//! The ends of access tokens that live connections and streams were opened with: each is closed when its token ends, as
//! it is when its key does. Nothing is known here of tokens that nobody uses.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::auth::connections::{CloseReason, ConnectionControl, KeyConnectionGuard};
use crate::auth::grant::Grant;
use crate::message::TimeMicros;

use super::Registry;

/// What was opened with an access token.
pub trait TokenUse: Send + Sync {
    /// The token has ended: it is closed.
    fn end_with_token(&self);
}

impl TokenUse for ConnectionControl {
    fn end_with_token(&self) {
        self.close(CloseReason::KeyDead);
    }
}

/// What is open with access tokens, by their ends.
#[derive(Default)]
pub(super) struct TokenEnds {
    state: Mutex<TokenEndsState>,
    /// Notified of each new earliest end.
    pub(super) is_earlier: Notify,
}

#[derive(Default)]
struct TokenEndsState {
    open: BTreeMap<(TimeMicros, u64), Weak<dyn TokenUse>>,
    next_number: u64,
}

/// The place of what is open with a token. Dropping it removes it.
pub struct TokenEndGuard {
    ends: Arc<TokenEnds>,
    place: (TimeMicros, u64),
}

/// A connection's place among those of its key and, if it was opened with a token, among those that end with tokens.
#[derive(Debug)]
pub struct GrantConnectionGuard {
    _of_token: Option<Box<TokenEndGuard>>,
    _of_key: KeyConnectionGuard,
}

impl TokenEnds {
    /// The earliest end.
    pub(super) fn next_end(&self) -> Option<TimeMicros> {
        self.state.lock().open.first_key_value().map(|((at, _), _)| *at)
    }

    /// Closes all whose tokens have ended by `now`.
    pub(super) fn end_due(&self, now: TimeMicros) {
        let mut state = self.state.lock();
        let later = state.open.split_off(&(now.saturating_add(1), 0));
        let due = std::mem::replace(&mut state.open, later);
        // Unlocked first: what is closed may leave at once.
        drop(state);
        due.into_values().filter_map(|of| of.upgrade()).for_each(|open| open.end_with_token());
    }

    fn enter(self: &Arc<Self>, at: TimeMicros, open: Weak<dyn TokenUse>) -> TokenEndGuard {
        let mut state = self.state.lock();
        let place = (at, state.next_number);
        state.next_number += 1;
        state.open.insert(place, open);
        let is_first = state.open.first_key_value().is_some_and(|(first, _)| *first == place);
        drop(state);
        if is_first {
            self.is_earlier.notify_one();
        }
        TokenEndGuard { ends: self.clone(), place }
    }
}

impl Drop for TokenEndGuard {
    fn drop(&mut self) {
        let left = self.ends.state.lock().open.remove(&self.place);
        drop(left);
    }
}

impl std::fmt::Debug for TokenEndGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("TokenEndGuard").field(&self.place.0).finish()
    }
}

impl Registry {
    /// Has `open` closed when the token of its grant ends, for as long as the guard is there. `None` if the grant is that
    /// of a key: that closes its connections itself.
    pub fn end_with_token(&self, grant: &Grant, open: Weak<dyn TokenUse>) -> Option<TokenEndGuard> {
        Some(self.token_ends.enter(grant.token_ends_at()?, open))
    }

    /// Enters a connection among those of its key, and of its token: it is told to close when either ends.
    #[must_use = "the connection leaves when this is dropped"]
    pub fn enter_connection(&self, grant: &Grant, control: &Arc<ConnectionControl>) -> GrantConnectionGuard {
        let weak: Weak<ConnectionControl> = Arc::downgrade(control);
        let of_token = self.end_with_token(grant, weak).map(Box::new);
        let of_key = grant.key().connections().enter(control.clone());
        GrantConnectionGuard { _of_token: of_token, _of_key: of_key }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_open_is_closed_when_its_token_ends_and_not_before() {
        let ends = Arc::new(TokenEnds::default());
        let controls: Vec<_> = (0..4).map(|_| Arc::new(ConnectionControl::default())).collect();
        let enter = |at, n: usize| {
            let weak: Weak<ConnectionControl> = Arc::downgrade(&controls[n]);
            ends.enter(at, weak)
        };
        let guards = [enter(20, 0), enter(10, 1), enter(10, 2)];
        let left = enter(5, 3);
        assert_eq!(ends.next_end(), Some(5));
        drop(left);
        assert_eq!(ends.next_end(), Some(10));
        ends.end_due(9);
        assert!(controls.iter().all(|control| control.closed().is_none()));
        ends.end_due(10);
        let closed: Vec<_> = controls.iter().map(|control| control.closed()).collect();
        assert_eq!(closed, [None, Some(CloseReason::KeyDead), Some(CloseReason::KeyDead), None]);
        assert_eq!(ends.next_end(), Some(20));
        drop(guards);
        assert_eq!(ends.next_end(), None);
        ends.end_due(TimeMicros::MAX);
        assert_eq!(controls[0].closed(), None);
    }
}
