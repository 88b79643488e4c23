//! The pace of strangers: how many requests may come on a connection on which no valid key was presented. One that asks
//! for more is turned away before its request is looked at (over HTTP/2, where many come at once: before it is answered),
//! and its connection ends. The clients behind a trusted proxy
//! share connections, and have no pace.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::CONNECTION;
use axum::http::{HeaderValue, StatusCode, Version};
use axum::response::{IntoResponse, Response};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::server::{HttpCrowd, HttpPeer};
use crate::front::problem::Problem;
use crate::limits::{HTTP2_STREAMS_MAX, STRANGER_REQUESTS_BURST, STRANGER_REQUESTS_PER_S};
use crate::observe::cause::Cause;

/// When a stranger that has asked for too much may come again.
const STRANGER_RETRY_AFTER: Duration = Duration::from_secs(1);

/// How many requests a connection may still make on which no valid key was presented.
pub(super) struct StrangerPace {
    requests: RequestAllowance,
    /// Over HTTP/2, what may come before it is known whether it has a key: as many as there may be streams come at once,
    /// before the key of any of them is looked at.
    streams: RequestAllowance,
}

/// So many requests at once, and [`STRANGER_REQUESTS_PER_S`] after that.
struct RequestAllowance {
    burst: u32,
    state: Mutex<AllowanceState>,
}

struct AllowanceState {
    left: u32,
    since: Instant,
}

impl RequestAllowance {
    fn new(burst: u32) -> Self {
        Self { burst, state: Mutex::new(AllowanceState { left: burst, since: Instant::now() }) }
    }

    /// Takes one, if there is one. Returns how many are left.
    fn take(&self, now: Instant) -> Option<u32> {
        let mut state = self.state.lock();
        if state.left == 0 {
            let elapsed = now.saturating_duration_since(state.since).as_millis();
            let more = elapsed * u128::from(STRANGER_REQUESTS_PER_S) / 1_000;
            if more > 0 {
                state.since = now;
            }
            state.left = u32::try_from(more).unwrap_or(u32::MAX).min(self.burst);
        }
        state.left = state.left.checked_sub(1)?;
        Some(state.left)
    }
}

impl StrangerPace {
    pub(super) fn new() -> Self {
        let [requests, streams] = [STRANGER_REQUESTS_BURST, HTTP2_STREAMS_MAX].map(RequestAllowance::new);
        Self { requests, streams }
    }

    /// Whether a request may be looked at. Over HTTP/2 the first [`STRANGER_REQUESTS_BURST`] may, and each other one that
    /// gets a permit of `early`, which it holds until it is answered: what comes before a key is known takes memory.
    pub(super) fn begin(
        &self,
        version: Version,
        early: &Arc<Semaphore>,
        now: Instant,
    ) -> Option<Option<OwnedSemaphorePermit>> {
        if version != Version::HTTP_2 {
            return self.requests.take(now).map(|_| None);
        }
        match self.streams.take(now)? {
            left if left >= HTTP2_STREAMS_MAX - STRANGER_REQUESTS_BURST => Some(None),
            _ => early.clone().try_acquire_owned().ok().map(Some),
        }
    }

    /// Over HTTP/2, whether a request may be answered that turned out to have no valid key.
    pub(super) fn may_answer(&self, now: Instant) -> bool {
        self.requests.take(now).is_some()
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
        if version == Version::HTTP_2 {
            if peer.entry.eviction().tell() {
                crowd.report(peer.addr.ip(), Cause::StrangersShare, &words());
            }
            let mut answer = Response::new(Body::empty());
            *answer.status_mut() = StatusCode::TOO_MANY_REQUESTS;
            return answer;
        }
        crowd.report(peer.addr.ip(), Cause::StrangersShare, &words());
        let problem = Problem::new(Cause::StrangersShare, format!("There were {}.", words()));
        let mut answer = problem.with_retry_after(STRANGER_RETRY_AFTER).into_response();
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::EARLY_REQUESTS_MAX;

    /// How many of these are allowed after so many seconds.
    fn allowed(began: Instant, s: u64, may: impl Fn(Instant) -> bool) -> u32 {
        let now = began + Duration::from_secs(s);
        (0..1_000).take_while(|_| may(now)).count().try_into().expect("a thousand at most")
    }

    #[test]
    fn a_stranger_has_so_many_requests_at_once_and_so_many_a_second() {
        let (pace, began) = (StrangerPace::new(), Instant::now());
        let early = Arc::new(Semaphore::new(0));
        let taken = |s: u64| allowed(began, s, |now| pace.begin(Version::HTTP_11, &early, now).is_some());
        assert_eq!(taken(0), STRANGER_REQUESTS_BURST);
        assert_eq!(taken(0), 0);
        assert_eq!(taken(1), STRANGER_REQUESTS_PER_S);
        assert_eq!(taken(3_600), STRANGER_REQUESTS_BURST, "no more than at first");
    }

    /// A client with a key whose first requests came all at once was thrown out with the 17th.
    #[test]
    fn as_many_requests_as_there_may_be_streams_begin_before_a_key_is_known() {
        let (pace, began) = (StrangerPace::new(), Instant::now());
        let early = Arc::new(Semaphore::new(EARLY_REQUESTS_MAX));
        let begun = |s: u64| allowed(began, s, |now| pace.begin(Version::HTTP_2, &early, now).is_some());
        let answered = |s: u64| allowed(began, s, |now| pace.may_answer(now));
        assert_eq!(begun(0), HTTP2_STREAMS_MAX);
        assert_eq!(begun(1), STRANGER_REQUESTS_PER_S);
        assert_eq!(answered(0), STRANGER_REQUESTS_BURST);
        assert_eq!(answered(1), STRANGER_REQUESTS_PER_S);
    }

    /// A thousand strangers with a hundred requests each took 411 MiB.
    #[test]
    fn what_all_strangers_begin_early_over_http_2_is_bounded_and_nobody_loses_its_first_requests() {
        let (early, now) = (Arc::new(Semaphore::new(EARLY_REQUESTS_MAX)), Instant::now());
        let paces: Vec<StrangerPace> = (0..1_000).map(|_| StrangerPace::new()).collect();
        let of_one = |pace: &StrangerPace| {
            (0..100).map_while(|_| pace.begin(Version::HTTP_2, &early, now)).collect::<Vec<_>>()
        };
        let begun: Vec<_> = paces.iter().map(of_one).collect();
        let first = usize::try_from(STRANGER_REQUESTS_BURST).expect("few");
        assert!(begun.iter().all(|requests| requests.len() >= first));
        assert_eq!(begun.iter().flatten().count(), 1_000 * first + EARLY_REQUESTS_MAX);
        drop(begun);
        assert_eq!(early.available_permits(), EARLY_REQUESTS_MAX, "given back with the answers");
    }
}
