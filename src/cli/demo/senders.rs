//! The devices of the demo: each replays one recording through a real client over a real socket,
//! and counts the acknowledgements itself.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use futures_util::stream;
use indicatif::{MultiProgress, ProgressBar};
use serde::Deserialize;
use ureq::http::Response;
use ureq::{Agent, Body, RequestBuilder};

use super::sensors::{Sensor, Way};
use crate::cli::client::{self, Secret};
use crate::cli::out;
use crate::cli::replay::{Tally, end, replay};
use crate::cli::session::{Dialect, Session};

/// The topic of every reading, relative to its datasource.
pub(super) const TOPIC: &str = "reading";

/// Readings in one HTTP request. A device alternates between one reading and so many.
const ARRAY_READINGS: usize = 50;

/// The gateway's addresses.
#[derive(Debug, Clone)]
pub(super) struct Gate {
    pub(super) mqtt: SocketAddr,
    pub(super) http: String,
}

/// A progress bar for each sensor (drawn only on a terminal), and the total of acknowledged readings.
#[derive(Clone, Default)]
pub(super) struct Progress {
    pub(super) bars: MultiProgress,
    acked: Arc<AtomicU64>,
}

impl Progress {
    /// Readings acknowledged so far, of all sensors.
    pub(super) fn acked(&self) -> u64 {
        self.acked.load(Ordering::Relaxed)
    }

    fn bar(&self, sensor: &Sensor) -> anyhow::Result<ProgressBar> {
        let bar = self.bars.add(ProgressBar::new(sensor.readings().count() as u64));
        bar.set_style(out::progress("{prefix:20} {bar:30} {human_pos:>6}/{human_len} {rate}")?);
        bar.set_prefix(sensor.id);
        Ok(bar)
    }

    fn advance(&self, bar: &ProgressBar, readings: u64) {
        bar.inc(readings);
        self.acked.fetch_add(readings, Ordering::Relaxed);
    }
}

/// Sends all of a sensor's readings over its transport, and returns when all are acknowledged.
pub(super) async fn send(
    sensor: Sensor,
    datasource: String,
    key: Secret,
    gate: Gate,
    progress: Progress,
) -> anyhow::Result<Tally> {
    let bar = progress.bar(&sensor)?;
    let sent = match dialect(sensor.way) {
        Some(dialect) => {
            let mut session = Session::new(dialect, gate.mqtt, &datasource, Some(&key));
            let payloads = stream::iter(sensor.readings().map(|reading| Ok(reading.payload().into_bytes())));
            match replay(&mut session, TOPIC, payloads, || progress.advance(&bar, 1)).await {
                Ok(tally) => end(session).await.map(|()| tally),
                Err(error) => Err(error),
            }
        }
        None => {
            let (bar, progress) = (bar.clone(), progress.clone());
            let work =
                move || post_all(sensor, &datasource, &key, &gate, |acked| progress.advance(&bar, acked));
            tokio::task::spawn_blocking(work).await?
        }
    };
    bar.finish();
    sent.with_context(|| format!("{} over {}", sensor.id, sensor.way.describe()))
}

/// The MQTT dialect of `way`; `None` for HTTP.
pub(super) fn dialect(way: Way) -> Option<Dialect> {
    match way {
        Way::Mqtt311 => Some(Dialect::V311),
        Way::Mqtt5 => Some(Dialect::V5),
        Way::HttpPlain | Way::HttpBearer | Way::HttpApiKey => None,
    }
}

fn post_all(
    sensor: Sensor,
    datasource: &str,
    key: &Secret,
    gate: &Gate,
    acked: impl Fn(u64),
) -> anyhow::Result<Tally> {
    #[derive(Deserialize)]
    struct Accepted {
        accepted: u64,
    }
    let agent = client::agent(&gate.http);
    let mut tally = Tally::default();
    let mut readings = sensor.readings();
    for alone in [true, false].into_iter().cycle() {
        let many = if alone { 1 } else { ARRAY_READINGS };
        let payloads: Vec<String> = readings.by_ref().take(many).map(|reading| reading.payload()).collect();
        if payloads.is_empty() {
            break;
        }
        let count = payloads.len() as u64;
        let body = if alone { payloads.concat() } else { format!("[{}]", payloads.join(",\n")) };
        tally.sent += count;
        let posted = Instant::now();
        let mut answer = post(&agent, gate, datasource, sensor.way, Some(key), &body)?;
        if !answer.status().is_success() {
            bail!("after {} acknowledged messages: {}", tally.acked, client::problem(answer));
        }
        let Accepted { accepted } = answer.body_mut().read_json()?;
        ensure!(accepted == count, "{accepted} of {count} messages of a request were acknowledged");
        tally.acked(count, posted.elapsed());
        acked(count);
    }
    Ok(tally)
}

/// Sends one request with readings, the key (if any) placed as `way` says.
pub(super) fn post(
    agent: &Agent,
    gate: &Gate,
    datasource: &str,
    way: Way,
    key: Option<&Secret>,
    body: &str,
) -> anyhow::Result<Response<Body>> {
    let request = agent.post(format!("{}/v1/ingest/{datasource}/{TOPIC}", gate.http));
    let request = match key {
        Some(key) => present(request, way, key),
        None => request,
    };
    Ok(request.content_type("application/json").send(body)?)
}

fn present<B>(request: RequestBuilder<B>, way: Way, key: &Secret) -> RequestBuilder<B> {
    match way {
        Way::HttpBearer => request.header("authorization", format!("Bearer {}", key.expose())),
        Way::HttpApiKey => request.header("x-api-key", key.expose()),
        Way::HttpPlain | Way::Mqtt311 | Way::Mqtt5 => request.header("authorization", key.expose()),
    }
}
