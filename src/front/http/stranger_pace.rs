//! The pace of strangers: how many requests may come on a connection on which no valid key was presented. One that asks
//! for more is turned away before its request is looked at, and its connection ends. The clients behind a trusted proxy
//! share connections, and have no pace.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::CONNECTION;
use axum::http::{HeaderValue, StatusCode, Version};
use axum::response::{IntoResponse, Response};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::server::{HttpCrowd, HttpPeer};
use crate::front::problem::Problem;
use crate::limits::{STRANGER_REQUESTS_BURST, STRANGER_REQUESTS_PER_S};
use crate::observe::cause::Cause;

/// When a stranger that has asked for too much may come again.
const STRANGER_RETRY_AFTER: Duration = Duration::from_secs(1);

/// How many requests a connection may still make on which no valid key was presented.
pub(super) struct StrangerPace {
    state: Mutex<PaceState>,
    /// It has asked for too much, and that was reported.
    is_reported: AtomicBool,
}

struct PaceState {
    left: u32,
    since: Instant,
}

impl StrangerPace {
    pub(super) fn new() -> Self {
        let state = Mutex::new(PaceState { left: STRANGER_REQUESTS_BURST, since: Instant::now() });
        Self { state, is_reported: AtomicBool::new(false) }
    }

    /// Takes one, if there is one.
    pub(super) fn take(&self, now: Instant) -> bool {
        let mut state = self.state.lock();
        if state.left == 0 {
            let elapsed = now.saturating_duration_since(state.since).as_millis();
            let more = elapsed * u128::from(STRANGER_REQUESTS_PER_S) / 1_000;
            if more > 0 {
                state.since = now;
            }
            state.left = u32::try_from(more).unwrap_or(u32::MAX).min(STRANGER_REQUESTS_BURST);
        }
        let taken = state.left.checked_sub(1);
        state.left = taken.unwrap_or(0);
        taken.is_some()
    }

    /// The answer to a stranger that asks for too much; the connection ends with it. HTTP/2 ends at once, with nothing
    /// said, because a hundred requests may be under way.
    pub(super) fn turn_away(&self, crowd: &HttpCrowd, peer: &HttpPeer, version: Version) -> Response {
        let words = || {
            format!(
                "more than {STRANGER_REQUESTS_BURST} requests without a valid key, and {STRANGER_REQUESTS_PER_S} a \
                 second, on one connection"
            )
        };
        if !self.is_reported.swap(true, Ordering::Relaxed) {
            crowd.report(peer.addr.ip(), Cause::StrangersShare, &words());
        }
        if version == Version::HTTP_2 {
            peer.entry.eviction().tell();
            let mut answer = Response::new(Body::empty());
            *answer.status_mut() = StatusCode::TOO_MANY_REQUESTS;
            return answer;
        }
        let problem = Problem::new(Cause::StrangersShare, format!("There were {}.", words()));
        let mut answer = problem.with_retry_after(STRANGER_RETRY_AFTER).into_response();
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_has_so_many_requests_at_once_and_so_many_a_second() {
        let (pace, began) = (StrangerPace::new(), Instant::now());
        let taken = |s: u64| {
            let now = began + Duration::from_secs(s);
            (0..1_000).take_while(|_| pace.take(now)).count()
        };
        assert_eq!(taken(0), STRANGER_REQUESTS_BURST as usize);
        assert_eq!(taken(0), 0);
        assert_eq!(taken(1), STRANGER_REQUESTS_PER_S as usize);
        assert_eq!(taken(3_600), STRANGER_REQUESTS_BURST as usize, "no more than at first");
    }
}
