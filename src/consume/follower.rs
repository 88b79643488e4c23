//! A follower: a thread that reads the log behind a consumer's cursor, round after round.
//!
//! The [`Consumer`] decides what a round does: storage writes a transaction, retained messages are brought
//! up to date, the stream on NATS gets new records. This file has what all of them need: the pace, errors
//! that are logged once and retried until they are over, and an end within a deadline. Whatever goes
//! wrong, the log keeps the records, and no acknowledgement waits for a consumer.

use parking_lot::{Condvar, Mutex};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::warn;

use crate::log::Log;
use crate::message::Offset;
use crate::scheduler::lower_priority;
use crate::trouble::TroubleCell;

/// How long the thread waits for the log before it checks whether it should stop.
const FOLLOWER_WAIT_SLICE: Duration = Duration::from_millis(50);
/// The first and the longest pause after a failed round; it doubles each time.
const FOLLOWER_RETRY_PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// Consumes the log. All methods run on the follower's thread.
pub(super) trait Consumer: Send + 'static {
    /// Why a round failed.
    type RoundError: fmt::Display;

    /// Consumes the next records of the log, as many as suit one round.
    fn round(&mut self) -> Result<NextRound, Self::RoundError>;

    /// The first offset that was not consumed.
    fn cursor(&self) -> Offset;

    /// Whether a round that has failed may succeed before the thread has to end. If not, it ends at once.
    fn may_recover(&self) -> bool {
        true
    }

    /// Cleans up after the last round.
    fn end(self);
}

/// When the next round is.
pub(super) enum NextRound {
    /// When the log has more: everything is consumed.
    AtTail,
    /// After this time, or once somebody [waits](FollowerControl::request_offset) for a record that is not consumed yet.
    After(Duration),
    /// After this time: another gateway does the work.
    Elsewhere(Duration),
    /// Now.
    Again,
}

/// What the log says about a consumer, and how it treats errors while it stops.
pub(super) struct FollowerProfile {
    /// The name of its thread.
    pub(super) name: &'static str,
    /// What an error means for the operator; the error follows.
    pub(super) down: &'static str,
    /// That the error is over.
    pub(super) up: &'static str,
    /// That it did not end by its deadline.
    pub(super) late: &'static str,
    /// Whether it retries until the deadline when a round fails while it stops, to consume what the log
    /// already has.
    pub(super) patient: bool,
    /// How much lower than usual the priority of its thread is. What acknowledgements do not wait for is not to be in
    /// their way.
    pub(super) nice: u8,
}

/// What the thread and those who ask about it share.
pub(super) struct FollowerControl {
    words: &'static FollowerProfile,
    trouble: TroubleCell,
    asked: Mutex<FollowerRequests>,
    asked_more: Condvar,
    ended: watch::Sender<bool>,
}

/// What others want of the thread.
#[derive(Default)]
struct FollowerRequests {
    /// Somebody waits until everything below this is consumed.
    wanted: Offset,
    /// The deadline, once the thread is to end.
    stop: Option<Instant>,
}

impl FollowerControl {
    /// For a thread that has not started yet.
    pub(super) fn new(words: &'static FollowerProfile) -> Arc<Self> {
        Arc::new(Self {
            words,
            trouble: TroubleCell::new(words.down, words.up),
            asked: Mutex::default(),
            asked_more: Condvar::new(),
            ended: watch::Sender::new(false),
        })
    }

    /// Notes what does not work before the thread has begun.
    pub(super) fn begin_with(&self, trouble: Option<String>) {
        self.trouble.set(trouble);
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// The operating system's, if it gives no thread.
    pub(super) fn start(self: &Arc<Self>, consumer: impl Consumer, log: Arc<dyn Log>) -> io::Result<()> {
        let control = self.clone();
        let thread = std::thread::Builder::new().name(self.words.name.to_owned());
        thread
            .spawn(move || {
                // Told once the consumer has closed what it writes: who is told may open it again.
                let _ended = FollowerEndGuard(control.clone());
                control.run(consumer, &*log);
            })
            .map(drop)
    }

    /// The present error, while rounds fail.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.current()
    }

    /// Tells the thread that somebody waits until everything below `offset` is consumed.
    pub(super) fn request_offset(&self, offset: Offset) {
        let mut asked = self.asked.lock();
        asked.wanted = asked.wanted.max(offset);
        self.asked_more.notify_all();
    }

    /// Tells the thread to consume what the log already has, within the deadline, and to end.
    pub(super) fn stop_by(&self, deadline: Instant) {
        let mut asked = self.asked.lock();
        asked.stop = Some(asked.stop.map_or(deadline, |earlier| earlier.min(deadline)));
        self.asked_more.notify_all();
    }

    /// As [`FollowerControl::stop_by`], and waits for the end until the deadline.
    pub(super) async fn stop(&self, deadline: Instant) {
        self.stop_by(deadline);
        let mut ended = self.ended.subscribe();
        if tokio::time::timeout_at(deadline.into(), ended.wait_for(|ended| *ended)).await.is_err() {
            warn!("{}", self.words.late);
        }
    }

    /// The deadline by which the thread should end, once it is told to.
    pub(super) fn stop_deadline(&self) -> Option<Instant> {
        self.asked.lock().stop
    }

    /// Whether the thread has ended.
    #[cfg(test)]
    pub(super) fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    fn run<C: Consumer>(&self, mut consumer: C, log: &dyn Log) {
        lower_priority(self.words.nice);
        let mut retry = FOLLOWER_RETRY_PAUSES.0;
        loop {
            let stop = self.stop_deadline();
            if stop.is_some_and(|deadline| deadline <= Instant::now()) {
                break;
            }
            match consumer.round() {
                Ok(next) => {
                    retry = FOLLOWER_RETRY_PAUSES.0;
                    self.trouble.set_at(None, Some(consumer.cursor()));
                    match next {
                        NextRound::AtTail if stop.is_some() => break,
                        NextRound::AtTail => log.wait_blocking(consumer.cursor(), FOLLOWER_WAIT_SLICE),
                        NextRound::After(time) => self.pause(time, |asked| asked.wanted > consumer.cursor()),
                        NextRound::Elsewhere(_) if stop.is_some() => break,
                        NextRound::Elsewhere(time) => self.pause(time, |_| false),
                        NextRound::Again => {}
                    }
                }
                Err(trouble) => {
                    self.trouble.set_at(Some(trouble.to_string()), Some(consumer.cursor()));
                    match stop {
                        Some(_) if !self.words.patient || !consumer.may_recover() => break,
                        // `pause` returns at once while the thread is to end, so it would spin here.
                        Some(_) => std::thread::sleep(FOLLOWER_RETRY_PAUSES.0),
                        None => self.pause(retry, |_| false),
                    }
                    retry = (retry * 2).min(FOLLOWER_RETRY_PAUSES.1);
                }
            }
        }
        consumer.end();
    }

    /// Waits for `time`, or until the thread is to end or `enough` holds.
    fn pause(&self, time: Duration, enough: impl Fn(&FollowerRequests) -> bool) {
        let go_on = |asked: &mut FollowerRequests| asked.stop.is_none() && !enough(asked);
        self.asked_more.wait_while_for(&mut self.asked.lock(), go_on, time);
    }
}

/// Marks the thread as ended when it is dropped, also after a panic.
struct FollowerEndGuard(Arc<FollowerControl>);

impl Drop for FollowerEndGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let trouble = "the thread has ended by a panic, and needs a restart";
            self.0.trouble.set(Some(trouble.to_owned()));
        }
        self.0.ended.send_replace(true);
    }
}
