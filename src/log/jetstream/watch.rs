//! Watching the stream: whether it is there, whether its settings are still those of this gateway's configuration,
//! whether all its servers have it, and what time it is there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use headgate_bridge_nats::stream::StreamReport;
use headgate_bridge_nats::{ManagedStream, Nats, StreamError};

use super::JetstreamLogShared;
use crate::message::{TimeMicros, now_micros};
use crate::time::{Rfc3339, parse_time, running_micros, set_cluster_time};

/// How often to check that the stream is there, and how large it is.
pub(super) const STREAM_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How often to ask for settings, servers and time.
const STREAM_REPORT_INTERVAL: Duration = Duration::from_secs(3);
/// A clock that differs from the servers' by more than this is wrong, in microseconds.
const CLOCK_ERROR_MICROS_MAX: u64 = 5_000_000;
/// What differs by less is not worth a correction: an answer takes time too.
const CLOCK_CORRECTION_MICROS_MIN: u64 = 500_000;
/// An answer that took longer says too little about the time.
const CLOCK_ANSWER_WAIT_MAX: Duration = Duration::from_millis(500);

/// Checks at intervals whether the stream is there.
pub(super) async fn watch_stream_state(shared: Arc<JetstreamLogShared>) {
    loop {
        tokio::time::sleep(STREAM_CHECK_INTERVAL).await;
        let trouble = match shared.stream.state().await {
            Ok(state) => {
                shared.note_state(&state);
                None
            }
            Err(error) => Some(error.to_string()),
        };
        shared.stream_trouble.set(trouble);
    }
}

/// Asks at intervals for the settings of the log's stream and buckets, for the servers that are behind, and for the time.
pub(super) async fn watch_reports(shared: Arc<JetstreamLogShared>, streams: [ManagedStream; 4]) {
    let nats = shared.stream.nats().clone();
    // A server that is behind for a moment is nothing to warn of.
    let mut behind_before: Vec<String> = Vec::new();
    loop {
        tokio::time::sleep(STREAM_REPORT_INTERVAL).await;
        let mut warnings = Vec::new();
        let mut behind = Vec::new();
        for stream in &streams {
            let Ok(Some(report)) = timed_report(stream, &nats).await else { continue };
            let Some(first) = streams.first().filter(|first| std::ptr::eq(*first, stream)) else {
                warnings.extend(stream.differences(&report.report).iter().map(ToString::to_string));
                continue;
            };
            if let Some(clock) = report.clock {
                shared.clock_trouble.set(clock.note());
            }
            warnings.extend(first.differences(&report.report).iter().map(ToString::to_string));
            behind = report.report.peers_behind();
            warnings.extend(behind.iter().filter(|peer| behind_before.contains(peer)).cloned());
        }
        behind_before = behind;
        shared.report_warning.set((!warnings.is_empty()).then(|| warnings.join("; ")));
    }
}

/// A report, and what this machine's clock said when it came.
pub struct TimedReport {
    pub report: StreamReport,
    /// `None` if the answer took too long to say anything.
    pub clock: Option<ServersClock>,
}

/// What the servers' clock said, and how far it is ahead of this machine's.
#[derive(Debug, Clone, Copy)]
pub struct ServersClock {
    time: TimeMicros,
    ahead_micros: i64,
    /// By the clock that nobody can set.
    running: i64,
}

/// Asks for a report of a stream; `None` if there is no such stream.
///
/// # Errors
/// Those of [`ManagedStream::report`].
pub async fn timed_report(stream: &ManagedStream, nats: &Nats) -> Result<Option<TimedReport>, StreamError> {
    let (asked, asked_at, running) = (Instant::now(), now_micros(), running_micros());
    let Some(report) = stream.report(nats).await? else { return Ok(None) };
    let waited = asked.elapsed();
    let half = i64::try_from(waited.as_micros() / 2).unwrap_or(0);
    let (middle, running) = (asked_at.saturating_add(half), running.saturating_add(half));
    let time = report.time.as_deref().and_then(parse_time).filter(|_| waited <= CLOCK_ANSWER_WAIT_MAX);
    let clock = time.map(|time| ServersClock { time, ahead_micros: time.saturating_sub(middle), running });
    Ok(Some(TimedReport { report, clock }))
}

impl ServersClock {
    /// How far it is ahead of this machine's, in microseconds.
    pub fn ahead_micros(self) -> i64 {
        self.ahead_micros
    }

    /// Takes the servers' time over for whatever is judged by it. Returns what is wrong with this machine's clock, if
    /// anything is.
    pub fn note(self) -> Option<String> {
        let ahead = self.ahead_micros;
        let is_right = ahead.unsigned_abs() < CLOCK_CORRECTION_MICROS_MIN;
        set_cluster_time(if is_right { self.time.saturating_sub(ahead) } else { self.time }, self.running);
        (ahead.unsigned_abs() > CLOCK_ERROR_MICROS_MAX).then(|| {
            let (seconds, order) = (ahead.unsigned_abs() / 1_000_000, if ahead < 0 { "ahead of" } else { "behind" });
            let now = Rfc3339(now_micros().saturating_add(ahead));
            format!("this machine's clock is {seconds} s {order} that of the NATS servers, where it is {now}: set it right")
        })
    }
}
