//! The settings that all gateways of a cluster share: how many servers have the log, the registry and the sessions,
//! how large the log may be, how long ids, exchanges and sessions are known. A start never changes them: it finds out
//! that its configuration has others, and ends. `headgate cluster change` changes them on purpose.

use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::bail;
use headgate_bridge_nats::stream::SettingDifference;
use headgate_bridge_nats::{ManagedStream, Nats, StreamError};

use super::history::ClusterCommandError;
use crate::auth::cluster;
use crate::config::{Config, LogBackend};
use crate::consume::subscriber::sessions::bucket::sessions_bucket_settings;
use crate::log::{managed_streams, timed_report};

/// How long `headgate cluster change` waits for NATS.
const CLUSTER_CHANGE_TIMEOUT: Duration = Duration::from_secs(10);
const CLUSTER_CHANGE_PAUSE: Duration = Duration::from_millis(100);

/// Every stream and bucket of the cluster, as the configuration has it; the log's stream is the first.
pub(super) fn all_streams(config: &Config) -> Vec<ManagedStream> {
    let replicas = config.nats.stream.replicas;
    let sessions = sessions_bucket_settings(replicas, config.mqtt.session_expiry_s_max);
    let others = cluster::managed_streams(replicas).into_iter().chain([(&sessions).into()]);
    managed_streams(config).into_iter().chain(others).collect()
}

/// Compares the cluster's settings with the configuration, and takes the servers' time over. A stream or bucket that is
/// not there yet fits.
///
/// # Errors
/// [`StreamError::Away`]; [`StreamError::Refused`] with every difference and what to do.
pub(super) async fn check_cluster_settings(nats: &Nats, config: &Config) -> Result<(), StreamError> {
    let mut differences: Vec<SettingDifference> = Vec::new();
    for stream in all_streams(config) {
        let Some(report) = timed_report(&stream, nats).await? else { continue };
        if let Some(clock) = report.clock {
            clock.note();
        }
        differences.extend(stream.differences(&report.report));
    }
    if differences.is_empty() {
        return Ok(());
    }
    let mut text =
        "the cluster's settings are others than this gateway's, and a start changes none:".to_owned();
    for SettingDifference { what, setting, is, wanted } in differences {
        let _ = write!(text, "\n  {what}: {setting} is {is} in the cluster, {wanted} in the configuration");
    }
    text.push_str(
        "\nset what the cluster has in the configuration (nats.stream.replicas, log.retention_bytes, intake.dedup_window_s, \
         mqtt.session_expiry_s_max), or change the cluster to it: headgate cluster change --config FILE",
    );
    Err(StreamError::Refused(text))
}

/// How far the clock of NATS' servers is ahead of this machine's, in microseconds. `None` if they have no stream of the
/// configuration, whose report tells it, or do not answer.
pub async fn clock_of_servers(nats: &Nats, config: &Config) -> Option<i64> {
    for stream in all_streams(config) {
        if let Ok(Some(report)) = timed_report(&stream, nats).await
            && let Some(clock) = report.clock
        {
            return Some(clock.ahead_micros());
        }
    }
    None
}

/// Changes the cluster's settings to those of the configuration. With `apply` false nothing is changed. Returns what
/// is (or would be) changed.
///
/// # Errors
/// The configuration has no cluster, NATS is away, or JetStream refuses; worded for an operator.
pub fn change_cluster(config: &Config, apply: bool) -> anyhow::Result<Vec<SettingDifference>> {
    if config.log.backend != LogBackend::Jetstream {
        bail!("log.backend is not \"jetstream\": this configuration has no cluster");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let nats = Nats::connect(&config.nats.connection("headgate cluster change")?).await?;
        let give_up_at = Instant::now() + CLUSTER_CHANGE_TIMEOUT;
        loop {
            match try_change(&nats, config, apply).await {
                Err(StreamError::Away(_)) if Instant::now() < give_up_at => {
                    tokio::time::sleep(CLUSTER_CHANGE_PAUSE).await;
                }
                Err(StreamError::Away(trouble)) => return Err(ClusterCommandError::Away(trouble).into()),
                Err(error) => return Err(ClusterCommandError::Refused(error.to_string()).into()),
                Ok(changed) => return Ok(changed),
            }
        }
    })
}

async fn try_change(
    nats: &Nats,
    config: &Config,
    apply: bool,
) -> Result<Vec<SettingDifference>, StreamError> {
    if let Some(trouble) = nats.trouble() {
        return Err(StreamError::Away(trouble));
    }
    let mut changed = Vec::new();
    for stream in all_streams(config) {
        let Some(report) = stream.report(nats).await? else { continue };
        let differences = stream.differences(&report);
        if apply && !differences.is_empty() {
            stream.change(nats, &report).await?;
        }
        changed.extend(differences);
    }
    Ok(changed)
}
