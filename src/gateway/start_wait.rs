//! What a start waits for: `/readyz` says it at once, and the log once it has lasted.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The pause before a retry while NATS is unreachable.
const CLUSTER_RETRY_PAUSE: Duration = Duration::from_millis(250);

/// How long it has waited for the same thing when the log says so.
const START_WAIT_SAID_AFTER: Duration = Duration::from_secs(1);

/// The pause before the log says it again.
const START_WAIT_SAID_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// The wait of a start for what it cannot do without.
pub(super) struct StartWait {
    reason: Mutex<WaitReason>,
}

/// What is waited for, and who was told.
struct WaitReason {
    text: String,
    /// When the log says it.
    say_at: Instant,
}

impl StartWait {
    pub(super) fn new(reason: &str) -> Self {
        let say_at = Instant::now() + START_WAIT_SAID_AFTER;
        Self { reason: Mutex::new(WaitReason { text: reason.to_owned(), say_at }) }
    }

    /// What it last waited for.
    pub(super) fn reason(&self) -> String {
        self.reason.lock().text.clone()
    }

    /// Waits before the next attempt, because of `reason`.
    pub(super) async fn pause(&self, reason: impl ToString) {
        let reason = reason.to_string();
        if self.note(&reason, Instant::now()) {
            tracing::warn!(reason, "waiting to start");
        }
        tokio::time::sleep(CLUSTER_RETRY_PAUSE).await;
    }

    /// Notes what is waited for at `now`. Returns `true` if the log is to say it.
    fn note(&self, text: &str, now: Instant) -> bool {
        let mut reason = self.reason.lock();
        if reason.text != text {
            *reason = WaitReason { text: text.to_owned(), say_at: now + START_WAIT_SAID_AFTER };
            return false;
        }
        let is_due = now >= reason.say_at;
        if is_due {
            reason.say_at = now + START_WAIT_SAID_AGAIN_AFTER;
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_says_what_has_lasted_and_again_each_minute() {
        let wait = StartWait::new("the registry is read");
        let began = Instant::now();
        let said = |reason: &str, ms: u64| wait.note(reason, began + Duration::from_millis(ms));
        assert!(!said("no room", 0));
        assert!(!said("no room", 999));
        assert!(said("no room", 1_000));
        assert!(!said("no room", 60_999));
        assert!(said("no room", 61_000));
        assert!(!said("no leader", 61_100), "another reason has not lasted yet");
        assert!(said("no leader", 62_100));
        assert_eq!(wait.reason(), "no leader");
    }
}
