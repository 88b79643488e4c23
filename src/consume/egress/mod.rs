//! Egress: the consumer that sends the validated stream on to NATS, on `stream.{datasource}.{topic}` of
//! one JetStream stream.
//!
//! It keeps no cursor of its own. The stream's last message names its record and the log that it came
//! from; egress resumes with the record after it, whatever was killed or restored meanwhile. The outlet
//! ensures that nothing is stored twice, out of order or with a gap (`bridges/nats/src/outlet/`).
//!
//! Egress leaves out records in quarantine, and records that it cannot send: the topic is no valid
//! subject, or the message is larger than NATS takes. It counts the latter and logs an example.
//!
//! While NATS is away the log keeps unsent records for as long as there is room. At `log.retention_bytes`
//! devices take precedence: the log removes the oldest records unsent, egress logs and counts them, and
//! the next message says how many are missing before it (`Headgate-Skipped`).
//!
//! Two headers let it resume: `Headgate-Offset` is the record's offset, and `Nats-Msg-Id` names the log as
//! well. Before egress resumes it compares the stream's last message with the record at that offset in the
//! log. If they differ, the log was restored to an earlier state, and egress stops before it mixes two
//! histories. A log that `headgate restore` has made has an id of its own, and knows what it has of the log before it
//! (`log_id.rs`).

mod counts;
mod follower;
mod log_id;
mod message;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use headgate_bridge_nats::stream::{JetstreamSettings, StreamPurpose};
use headgate_bridge_nats::{Nats, Outlet};
use tokio::sync::watch;

use self::follower::EgressFollower;
use self::log_id::LOG_ID_FILE;
pub use self::log_id::begin_history;
use super::follower::{FollowerControl, FollowerProfile};
use crate::config;
use crate::log::Log;
use crate::subject::SubjectSpace;

pub use counts::{EgressCounts, EgressSkipReason};

/// How long JetStream remembers message ids. A message in flight when a connection broke arrives within
/// this time or not at all. A longer window would fill the server's memory while egress catches up.
const EGRESS_DUPLICATE_WINDOW: Duration = Duration::from_secs(10);

const EGRESS_PROFILE: FollowerProfile = FollowerProfile {
    name: "egress",
    down: "egress to NATS is failing",
    up: "egress to NATS has recovered",
    late: "egress to NATS did not finish by its deadline; the log has the rest",
    // NATS may be away for longer than any deadline; the next start sends the rest.
    patient: false,
    nice: 0,
};

/// The running consumer.
pub struct Egress {
    control: Arc<FollowerControl>,
    stop: watch::Sender<Option<Instant>>,
    counts: Arc<EgressCounts>,
}

/// Why egress could not start.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    /// The thread could not be started.
    #[error("the stream on NATS: {0}")]
    Io(#[from] io::Error),
}

impl Egress {
    /// Starts the thread that follows the log into the stream. Must be called in a tokio runtime. NATS need
    /// not be there: the thread waits for it, now and later.
    ///
    /// # Errors
    /// [`EgressError`].
    pub fn start(
        dir: &Path,
        config: &config::Config,
        nats: Nats,
        log: Arc<dyn Log>,
    ) -> Result<Self, EgressError> {
        let stream = &config.nats.stream;
        let settings = JetstreamSettings {
            name: stream.name.clone(),
            subjects: vec![SubjectSpace::Stream.space_wildcard(), SubjectSpace::Quarantine.space_wildcard()],
            replicas: stream.replicas,
            bytes_max: config.log.retention_bytes,
            duplicate_window: EGRESS_DUPLICATE_WINDOW,
            purpose: StreamPurpose::Copy,
        };
        let log_id_path = dir.join(LOG_ID_FILE);
        let counts = Arc::new(EgressCounts::default());
        let stop = watch::Sender::new(None);
        let outlet = Outlet::new(nats, settings);
        let follower = EgressFollower::new(
            log_id_path,
            &stream.name,
            log.clone(),
            outlet,
            stop.subscribe(),
            counts.clone(),
        );
        let control = FollowerControl::new(&EGRESS_PROFILE);
        control.start(follower, log)?;
        Ok(Self { control, stop, counts })
    }

    /// The present error, while egress fails.
    pub fn trouble(&self) -> Option<String> {
        self.control.trouble()
    }

    /// The position of egress and its counts.
    pub fn counts(&self) -> &EgressCounts {
        &self.counts
    }

    /// Sends what the log already has, within the deadline and if NATS is there, and ends the thread. The
    /// next start sends the rest.
    pub async fn stop(&self, deadline: Instant) {
        self.stop.send_replace(Some(deadline));
        self.control.stop(deadline).await;
    }
}

impl Drop for Egress {
    /// Ends the thread at once if nobody has stopped it.
    fn drop(&mut self) {
        let now = Instant::now();
        self.stop.send_replace(Some(now));
        self.control.stop_by(now);
    }
}
