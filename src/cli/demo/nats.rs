//! NATS in the demo: a server that is named, or one of its own if a nats-server is in the path; and the sensor that is
//! replayed over it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures_util::{StreamExt, stream};
use headgate_bridge_nats::{HeaderMap, Nats, NatsCredentials, NatsSettings};
use serde::Deserialize;
use tempfile::TempDir;

use super::senders::READING_TOPIC;
use super::sensors::Sensor;
use crate::cli::client::KeySecret;
use crate::cli::replay::Tally;
use crate::config::Config;

/// How long nats-server may take to start, and the gateway to be there.
const NATS_START_WAIT_MAX: Duration = Duration::from_secs(10);
/// The pause between two looks.
const NATS_LOOK_PAUSE: Duration = Duration::from_millis(20);
/// Readings that may wait for their answer at once.
const NATS_UNANSWERED_MAX: usize = 100;

/// Where the demo's NATS is.
pub(super) struct DemoNats {
    pub(super) servers: Vec<String>,
    /// A server of the demo's own.
    _own: Option<OwnNatsServer>,
}

/// A nats-server, ended when this is dropped.
struct OwnNatsServer {
    child: Child,
    /// Removed after the server has ended.
    _dir: TempDir,
}

impl Drop for OwnNatsServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Finds NATS, and has the gateway use it: the server that is named, that of the configuration, or one of the demo's
/// own. `None` where there is none.
///
/// # Errors
/// A nats-server that does not start.
pub(super) fn find(named: Option<String>, config: &mut Config) -> anyhow::Result<Option<DemoNats>> {
    if config.nats.is_used() && named.is_none() {
        let servers = config.nats.servers.clone();
        return Ok(config.nats.ingest.then_some(DemoNats { servers, _own: None }));
    }
    let (server, own) = match named {
        Some(url) => (url, None),
        None => match program_in_path("nats-server") {
            Some(program) => {
                let (url, own) = start_server(&program)?;
                (url, Some(own))
            }
            None => return Ok(None),
        },
    };
    config.nats.servers = vec![server];
    config.nats.ingest = true;
    // The demo is about what comes in; the server need not have JetStream.
    config.nats.stream.enabled = false;
    Ok(Some(DemoNats { servers: config.nats.servers.clone(), _own: own }))
}

/// A program in one of the directories of `PATH`.
fn program_in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|program| program.is_file())
}

/// Starts a server on a free port of loopback.
fn start_server(program: &Path) -> anyhow::Result<(String, OwnNatsServer)> {
    let dir =
        tempfile::Builder::new().prefix("headgate-demo-nats-").tempdir().context("a temporary directory")?;
    let child = Command::new(program)
        .args(["--addr", "127.0.0.1", "--port", "-1", "--ports_file_dir"])
        .arg(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    let ports = dir.path().join(format!("nats-server_{}.ports", child.id()));
    let mut own = OwnNatsServer { child, _dir: dir };
    #[derive(Deserialize)]
    struct ServerPorts {
        nats: [String; 1],
    }
    let deadline = Instant::now() + NATS_START_WAIT_MAX;
    loop {
        // It may be half written.
        if let Some(ServerPorts { nats: [url] }) =
            std::fs::read(&ports).ok().and_then(|text| serde_json::from_slice(&text).ok())
        {
            return Ok((url, own));
        }
        if let Some(status) = own.child.try_wait()? {
            bail!("{} ended at once: {status}", program.display());
        }
        if Instant::now() >= deadline {
            bail!("{} does not say where it listens", program.display());
        }
        std::thread::sleep(NATS_LOOK_PAUSE);
    }
}

/// Publishes all of a sensor's readings as requests, and returns when all are answered.
///
/// # Errors
/// The first reading that is refused or not answered.
pub(super) async fn request_all_readings(
    sensor: Sensor,
    datasource: &str,
    key: &KeySecret,
    servers: &[String],
    acked: impl Fn(u64),
) -> anyhow::Result<Tally> {
    let settings = NatsSettings {
        servers: servers.to_vec(),
        credentials: NatsCredentials::None,
        ca: None,
        name: "headgate demo".to_owned(),
    };
    let nats = Nats::connect(&settings).await?;
    let (client, subject) = (nats.client(), format!("ingest.{datasource}.{READING_TOPIC}"));
    let request = |payload: String, is_first: bool| {
        let subject = subject.clone();
        async move {
            let begun = Instant::now();
            loop {
                let mut headers = HeaderMap::new();
                headers.insert("Authorization", key.expose());
                headers.insert("Content-Type", "application/json");
                let sent = Instant::now();
                match client.request_with_headers(subject.clone(), headers, payload.clone().into()).await {
                    Ok(answer) => match answer.headers.and_then(|of| of.get("Nats-Service-Error").cloned()) {
                        None => return Ok(sent.elapsed()),
                        Some(why) => bail!("refused: {why}"),
                    },
                    // Nobody has it: the gateway is not there yet.
                    Err(_) if is_first && begun.elapsed() < NATS_START_WAIT_MAX => {
                        tokio::time::sleep(NATS_LOOK_PAUSE).await;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
    };
    let mut tally = Tally::default();
    let mut readings = sensor.readings().map(|reading| reading.payload());
    // Alone, so that the gateway is there for all others.
    if let Some(first) = readings.next() {
        tally.sent += 1;
        tally.count_acked(1, request(first, true).await?);
        acked(1);
    }
    let answers = stream::iter(readings).map(|payload| request(payload, false)).buffered(NATS_UNANSWERED_MAX);
    let mut answers = std::pin::pin!(answers);
    while let Some(latency) = answers.next().await {
        tally.sent += 1;
        let latency = latency.with_context(|| format!("after {} acknowledged messages", tally.acked))?;
        tally.count_acked(1, latency);
        acked(1);
    }
    Ok(tally)
}
