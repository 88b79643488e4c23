//! How long an HTTP connection is waited for: for its first request and for the rest of a request's header as long as
//! `http.header_ms_max` says, and between two requests as long as `http.keep_alive_s_max` says, which clients are told.
//! A connection with a request under way is not waited for here: its body has a deadline of its own, and so has its
//! answer; a stream goes on until its connection is asked to close, and has a moment for its last event then.
//! One whose client has shut down its half is still answered. But such a client may as well have gone, and
//! whoever asks and goes must not have all the work done that others wait for: a read that nobody may wait for any more
//! has so long to be begun to be answered.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep};

use super::stream::ConnectionStreams;
use crate::config;
use crate::limits::STREAM_END_WAIT_MAX;

/// How long the answer to a read (GET, HEAD) may not have begun after its client has shut down its half.
const HALF_CLOSED_READ_MAX: Duration = Duration::from_secs(3);

/// What a connection is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AwaitedPart {
    /// Its first request.
    FirstRequest,
    /// The rest of a request's header.
    HeaderRest,
    /// The next request.
    NextRequest,
    /// Its end, after it was asked to close.
    End,
    /// The answer to a read of a client that has shut down its half.
    ReadAnswer,
    /// The last events of its streams.
    StreamEnds,
}

/// What a connection is waited for, and since when. Cheap to clone: all clones are of one connection.
#[derive(Clone)]
pub(super) struct RequestClock(Arc<ClockShared>);

struct ClockShared {
    state: Mutex<ClockState>,
    /// The task that serves the connection. An HTTP/2 request ends in another one.
    task: AtomicWaker,
    streams: Arc<ConnectionStreams>,
}

struct ClockState {
    under_way: usize,
    /// Reads among them whose answer has not begun.
    unanswered_reads: usize,
    /// When the last of them came.
    read_since: Instant,
    /// When the client has shut down its half.
    half_closed: Option<Instant>,
    /// How many streams are open.
    streams: usize,
    /// When they were asked to end.
    streams_asked: Option<Instant>,
    awaited: AwaitedPart,
    since: Instant,
}

/// A request that is under way, until its answer is sent. Then the connection is idle, if it has no other.
pub(super) struct RequestUnderWay(RequestClock);

/// A read whose answer has not begun.
pub(super) struct UnansweredRead(RequestClock);

/// A stream that is open.
pub(super) struct StreamUnderWay {
    clock: RequestClock,
    /// It is all that its connection carries, and not over before the client has taken its end.
    is_alone: bool,
}

impl RequestClock {
    /// Of a connection that begins now.
    pub(super) fn start() -> Self {
        let now = Instant::now();
        let state = ClockState {
            under_way: 0,
            unanswered_reads: 0,
            read_since: now,
            half_closed: None,
            streams: 0,
            streams_asked: None,
            awaited: AwaitedPart::FirstRequest,
            since: now,
        };
        let (state, task) = (Mutex::new(state), AtomicWaker::new());
        Self(Arc::new(ClockShared { state, task, streams: Arc::default() }))
    }

    /// Notes that a request has come.
    pub(super) fn begin_request(&self) -> RequestUnderWay {
        self.0.state.lock().under_way += 1;
        RequestUnderWay(self.clone())
    }

    /// Notes that a request which is under way is a read.
    pub(super) fn begin_read(&self) -> UnansweredRead {
        let mut state = self.0.state.lock();
        state.unanswered_reads += 1;
        state.read_since = Instant::now();
        UnansweredRead(self.clone())
    }

    /// Notes that a stream has begun. `is_alone`: the connection carries nothing beside it.
    pub(super) fn begin_stream(&self, is_alone: bool) -> StreamUnderWay {
        self.0.state.lock().streams += 1;
        StreamUnderWay { clock: self.clone(), is_alone }
    }

    /// Notes that the streams were asked to end, because the connection has to close.
    pub(super) fn await_stream_ends(&self) {
        let mut state = self.0.state.lock();
        if state.streams > 0 {
            state.streams_asked.get_or_insert_with(Instant::now);
        }
    }

    /// Whether it matters that the client shuts down its half, and is not known.
    pub(super) fn is_half_close_awaited(&self) -> bool {
        let state = self.0.state.lock();
        (state.unanswered_reads > 0 || state.streams > 0) && state.half_closed.is_none()
    }

    /// Notes that the client has shut down its half. It may as well have gone: what is written next to its streams tells.
    pub(super) fn note_half_closed(&self) {
        self.0.state.lock().half_closed = Some(Instant::now());
        self.0.streams.probe();
    }

    /// The streams that are open on the connection.
    pub(super) fn streams(&self) -> &Arc<ConnectionStreams> {
        &self.0.streams
    }

    /// Notes that bytes of HTTP/1 have come. Those that come while no request is under way begin one.
    pub(super) fn note_bytes(&self) {
        let mut state = self.0.state.lock();
        if state.under_way == 0 && state.awaited == AwaitedPart::NextRequest {
            (state.awaited, state.since) = (AwaitedPart::HeaderRest, Instant::now());
        }
    }

    /// Notes that the connection was asked to close.
    pub(super) fn await_end(&self) {
        let mut state = self.0.state.lock();
        (state.awaited, state.since) = (AwaitedPart::End, Instant::now());
    }

    /// What is awaited, and since when; `None` while a request is under way that has other deadlines.
    fn awaited(&self) -> Option<(AwaitedPart, Instant)> {
        let state = self.0.state.lock();
        if let Some(asked) = state.streams_asked.filter(|_| state.streams > 0) {
            return Some((AwaitedPart::StreamEnds, asked));
        }
        match state.half_closed {
            _ if state.under_way == 0 => Some((state.awaited, state.since)),
            Some(since) if state.unanswered_reads > 0 => {
                Some((AwaitedPart::ReadAnswer, since.max(state.read_since)))
            }
            _ => None,
        }
    }
}

impl Drop for RequestUnderWay {
    fn drop(&mut self) {
        let shared = &self.0.0;
        let mut state = shared.state.lock();
        state.under_way -= 1;
        if state.under_way == 0 {
            (state.awaited, state.since) = (AwaitedPart::NextRequest, Instant::now());
            drop(state);
            shared.task.wake();
        }
    }
}

impl Drop for StreamUnderWay {
    fn drop(&mut self) {
        let mut state = self.clock.0.state.lock();
        if !self.is_alone || state.streams_asked.is_none() {
            state.streams -= 1;
        }
    }
}

impl Drop for UnansweredRead {
    fn drop(&mut self) {
        self.0.0.state.lock().unanswered_reads -= 1;
    }
}

/// Tells when a connection was waited for long enough.
pub(super) struct RequestDeadline {
    clock: RequestClock,
    header_max: Duration,
    idle_max: Duration,
    sleep: Pin<Box<Sleep>>,
}

impl RequestDeadline {
    pub(super) fn new(clock: RequestClock, config: &config::HttpConfig) -> Self {
        let header_max = Duration::from_millis(config.header_ms_max);
        let idle_max = Duration::from_secs(config.keep_alive_s_max);
        Self { clock, header_max, idle_max, sleep: Box::pin(tokio::time::sleep(header_max)) }
    }

    /// Ready with what was waited for too long. Only the task that serves the connection may poll it, whenever it is
    /// woken.
    pub(super) fn poll_passed(&mut self, cx: &mut Context<'_>) -> Poll<AwaitedPart> {
        self.clock.0.task.register(cx.waker());
        loop {
            let Some((part, since)) = self.clock.awaited() else { return Poll::Pending };
            let due = since
                + match part {
                    AwaitedPart::NextRequest => self.idle_max,
                    AwaitedPart::ReadAnswer => HALF_CLOSED_READ_MAX,
                    AwaitedPart::StreamEnds => STREAM_END_WAIT_MAX,
                    AwaitedPart::FirstRequest | AwaitedPart::HeaderRest | AwaitedPart::End => self.header_max,
                };
            // An earlier wake-up is left as it is: to set the timer anew at each request would cost more.
            if due < self.sleep.deadline() {
                self.sleep.as_mut().reset(due);
            }
            ready!(self.sleep.as_mut().poll(cx));
            if Instant::now() >= due {
                return Poll::Ready(part);
            }
            self.sleep.as_mut().reset(due);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    const HEADER_MAX: Duration = Duration::from_millis(40);
    const IDLE_MAX: Duration = Duration::from_millis(120);

    fn deadline(clock: &RequestClock) -> RequestDeadline {
        let sleep = Box::pin(tokio::time::sleep(HEADER_MAX));
        RequestDeadline { clock: clock.clone(), header_max: HEADER_MAX, idle_max: IDLE_MAX, sleep }
    }

    /// What is waited for too long next, and for how long it was waited.
    async fn passed(deadline: &mut RequestDeadline, since: Instant) -> (AwaitedPart, Duration) {
        let part = poll_fn(|cx| deadline.poll_passed(cx)).await;
        (part, since.elapsed())
    }

    #[tokio::test]
    async fn each_part_has_its_time() {
        let begun = Instant::now();
        let clock = RequestClock::start();
        let mut deadline = deadline(&clock);
        clock.note_bytes();
        let (part, waited) = passed(&mut deadline, begun).await;
        assert!(part == AwaitedPart::FirstRequest && waited >= HEADER_MAX, "{part:?} {waited:?}");
        drop(clock.begin_request());
        let (part, waited) = passed(&mut deadline, Instant::now()).await;
        assert!(part == AwaitedPart::NextRequest && waited >= IDLE_MAX - HEADER_MAX, "{part:?} {waited:?}");
        let begun = Instant::now();
        clock.note_bytes();
        let (part, waited) = passed(&mut deadline, begun).await;
        assert!(part == AwaitedPart::HeaderRest && waited >= HEADER_MAX, "{part:?} {waited:?}");
        drop(clock.begin_request());
        clock.await_end();
        assert_eq!(passed(&mut deadline, begun).await.0, AwaitedPart::End);
    }

    #[tokio::test]
    async fn a_request_under_way_is_not_waited_for_and_wakes_the_connection_where_it_ends() {
        let clock = RequestClock::start();
        let mut deadline = deadline(&clock);
        let (first, second) = (clock.begin_request(), clock.begin_request());
        drop(first);
        assert_eq!(clock.awaited().map(|(part, _)| part), None);
        let busy = tokio::time::timeout(2 * IDLE_MAX, poll_fn(|cx| deadline.poll_passed(cx))).await;
        assert!(busy.is_err(), "{busy:?}");
        // Only reads are given up when nobody may wait for them.
        clock.note_half_closed();
        assert_eq!(clock.awaited().map(|(part, _)| part), None);
        let read = clock.begin_read();
        assert_eq!(clock.awaited().map(|(part, _)| part), Some(AwaitedPart::ReadAnswer));
        drop(read);
        let elsewhere = tokio::spawn(async move { drop(second) });
        let (part, _) = passed(&mut deadline, Instant::now()).await;
        assert_eq!(part, AwaitedPart::NextRequest);
        elsewhere.await.expect("no panic");
    }
}
