//! The gate in front of a log that may be another one: whether the stream is, as far as is known, the one that this
//! gateway has followed. While it may not be, nothing is taken into it and nothing of it is followed.
//!
//! The gateway checks that at intervals, after every connection, and whenever somebody asks ([`HistoryGate::confirm`]). An
//! acknowledgement shows it at once: what was published after an offset was followed cannot come to lie before that.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::watch;

use crate::message::Offset;
use crate::trouble::TroubleCell;

/// The gate. Cheap to clone.
#[derive(Clone)]
pub struct HistoryGate(Arc<HistoryGateState>);

struct HistoryGateState {
    /// Why the stream is not the one that was followed.
    doubt: TroubleCell,
    /// Whether it has not been checked since something made that necessary.
    is_unchecked: AtomicBool,
    /// How often a check has found another one.
    closings: AtomicU64,
    /// Whether anybody checks.
    is_watched: AtomicBool,
    /// The number of the newest request for a check, and of the newest that a check has confirmed.
    asked: watch::Sender<u64>,
    confirmed: watch::Sender<u64>,
}

/// The epoch of a log, and what was decided at the beginning of each later than the first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogHistory {
    /// The present epoch.
    pub epoch: u64,
    /// Where earlier epochs end, in the order of the epochs that came after.
    pub set_backs: Vec<HistorySetBack>,
}

/// An earlier state of the log from which a later epoch goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistorySetBack {
    /// The epoch that begins.
    pub epoch: u64,
    /// The first offset that is given anew.
    pub end: Offset,
    /// The newest row of the bucket of sessions that is of an earlier epoch.
    pub sessions: u64,
}

impl LogHistory {
    /// The first offset that was given anew since an epoch; `None` if none was.
    pub fn end_since(&self, epoch: u64) -> Option<Offset> {
        self.set_backs.iter().filter(|set_back| set_back.epoch > epoch).map(|set_back| set_back.end).min()
    }

    /// The first offset that was given anew since a row of the bucket of sessions was written.
    pub fn end_since_row(&self, revision: u64) -> Option<Offset> {
        self.set_backs
            .iter()
            .filter(|set_back| revision <= set_back.sessions)
            .map(|set_back| set_back.end)
            .min()
    }
}

impl Default for HistoryGate {
    fn default() -> Self {
        let doubt = TroubleCell::new(
            "the gateway takes no messages: the log may be another one than it has followed",
            "the log is the one that this gateway has followed",
        );
        Self(Arc::new(HistoryGateState {
            doubt,
            closings: AtomicU64::new(0),
            is_unchecked: AtomicBool::new(false),
            is_watched: AtomicBool::new(false),
            asked: watch::Sender::new(0),
            confirmed: watch::Sender::new(0),
        }))
    }
}

impl HistoryGate {
    /// Whether the stream may be another one. Two atomic loads.
    pub fn is_in_doubt(&self) -> bool {
        self.0.is_unchecked.load(Ordering::Acquire) || self.0.doubt.is_present()
    }

    /// Whether it is known to be another one. One atomic load.
    pub(super) fn is_closed(&self) -> bool {
        self.0.doubt.is_present()
    }

    /// Why it may be another one, once that is known.
    pub fn doubt(&self) -> Option<String> {
        self.0.doubt.current()
    }

    /// As [`HistoryGate::doubt`], for what is refused meanwhile.
    pub fn words(&self) -> Arc<str> {
        let unchecked =
            || "whether the log is still the one that this gateway has followed is being checked".into();
        self.doubt().map_or_else(unchecked, Into::into)
    }

    /// Tells that somebody checks from now on: then [`HistoryGate::confirm`] waits for that.
    pub fn begin(&self) {
        self.0.is_watched.store(true, Ordering::Release);
    }

    /// Closes the gate until the next check.
    pub fn close_until_checked(&self) {
        self.0.is_unchecked.store(true, Ordering::Release);
    }

    /// Closes the gate, and says why.
    pub fn close(&self, why: String) {
        self.0.closings.fetch_add(1, Ordering::AcqRel);
        self.0.doubt.set(Some(why));
    }

    /// Opens it, after a check that was begun when `asked` was the newest request.
    pub fn open(&self, asked: u64) {
        // What somebody has met since then is looked at by the next check.
        if *self.0.asked.borrow() == asked {
            self.0.doubt.set(None);
            self.0.is_unchecked.store(false, Ordering::Release);
        }
        self.0.confirmed.send_replace(asked);
    }

    /// Notes an acknowledgement that puts a message at `sequence` although `followed` was the next offset before it was
    /// published.
    pub(super) fn note_lower_ack(&self, sequence: Offset, followed: Offset) {
        self.close(format!(
            "JetStream has stored a message at {sequence}, and this gateway has followed the log up to {followed}"
        ));
        self.ask();
    }

    /// Watches the number of the newest request for a check.
    pub fn requests(&self) -> watch::Receiver<u64> {
        self.0.asked.subscribe()
    }

    fn ask(&self) -> u64 {
        let mut number = 0;
        self.0.asked.send_modify(|asked| {
            *asked += 1;
            number = *asked;
        });
        number
    }

    /// Returns once a check that began after this call has found that the stream is the one that was followed; at once
    /// if nobody checks. `false` if a check has found another one meanwhile: what was received before may be of that.
    pub(super) async fn confirm(&self) -> bool {
        if !self.0.is_watched.load(Ordering::Acquire) {
            return true;
        }
        let closings = self.0.closings.load(Ordering::Acquire);
        let number = self.ask();
        // Never fails: the sender is in `self`.
        let _ = self.0.confirmed.subscribe().wait_for(|confirmed| *confirmed >= number).await;
        self.0.closings.load(Ordering::Acquire) == closings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_of_the_offsets_that_were_given_anew_since_counts() {
        let set_back = |epoch, end, sessions| HistorySetBack { epoch, end, sessions };
        let set_backs = vec![set_back(5, 501, 40), set_back(9, 801, 90)];
        let history = LogHistory { epoch: 9, set_backs };
        assert_eq!(history.end_since(1), Some(501));
        assert_eq!(history.end_since(5), Some(801));
        assert_eq!(history.end_since(9), None);
        assert_eq!(history.end_since_row(40), Some(501));
        assert_eq!(history.end_since_row(41), Some(801));
        assert_eq!(history.end_since_row(91), None);
    }

    #[tokio::test]
    async fn who_asks_waits_for_a_check_that_began_later() {
        let gate = HistoryGate::default();
        assert!(gate.confirm().await);
        gate.begin();
        let asking = tokio::spawn({
            let gate = gate.clone();
            async move { gate.confirm().await }
        });
        let mut requests = gate.requests();
        requests.wait_for(|asked| *asked == 1).await.expect("it is asked");
        gate.open(0);
        tokio::task::yield_now().await;
        assert!(!asking.is_finished());
        gate.open(1);
        assert!(asking.await.expect("confirmed"));
        gate.note_lower_ack(501, 1001);
        assert!(gate.is_in_doubt());
        // A check that began before that does not open it.
        gate.open(1);
        assert!(gate.is_in_doubt());
        gate.open(2);
        assert!(!gate.is_in_doubt());
    }

    #[tokio::test]
    async fn what_came_while_another_stream_was_found_is_not_confirmed() {
        let gate = HistoryGate::default();
        gate.begin();
        let asking = tokio::spawn({
            let gate = gate.clone();
            async move { gate.confirm().await }
        });
        gate.requests().wait_for(|asked| *asked == 1).await.expect("it is asked");
        gate.close("another one".to_owned());
        gate.open(1);
        assert!(!asking.await.expect("answered"));
    }
}
