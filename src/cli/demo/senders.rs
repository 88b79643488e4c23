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

use super::nats;
use super::sensors::{Sensor, SensorTransport};
use crate::cli::client::{self, KeySecret};
use crate::cli::out;
use crate::cli::replay::{Tally, disconnect_session, replay};
use crate::cli::session::{Dialect, MqttClientSession};

/// The topic of every reading, relative to its datasource.
pub(super) const READING_TOPIC: &str = "reading";

/// Readings in one HTTP request. A device alternates between one reading and so many.
const READINGS_PER_REQUEST: usize = 50;

/// The gateway's addresses.
#[derive(Debug, Clone)]
pub(super) struct GatewayAddresses {
    pub(super) mqtt: SocketAddr,
    pub(super) http: String,
    /// The servers of NATS, if there is one.
    pub(super) nats: Vec<String>,
}

/// A progress bar for each sensor (drawn only on a terminal), and the total of acknowledged readings.
#[derive(Clone, Default)]
pub(super) struct DemoProgress {
    pub(super) bars: MultiProgress,
    acked: Arc<AtomicU64>,
}

impl DemoProgress {
    /// Readings acknowledged so far, of all sensors.
    pub(super) fn acked(&self) -> u64 {
        self.acked.load(Ordering::Relaxed)
    }

    fn bar(&self, sensor: &Sensor) -> anyhow::Result<ProgressBar> {
        let bar = self.bars.add(ProgressBar::new(sensor.readings().count() as u64));
        bar.set_style(out::progress_style("{prefix:20} {bar:30} {human_pos:>6}/{human_len} {rate}")?);
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
    key: KeySecret,
    gate: GatewayAddresses,
    progress: DemoProgress,
) -> anyhow::Result<Tally> {
    let bar = progress.bar(&sensor)?;
    let sent = match mqtt_dialect(sensor.way) {
        Some(dialect) => {
            let mut session = MqttClientSession::new(dialect, gate.mqtt, &datasource, Some(&key));
            let payloads = stream::iter(sensor.readings().map(|reading| Ok(reading.payload().into_bytes())));
            match replay(&mut session, READING_TOPIC, payloads, || progress.advance(&bar, 1)).await {
                Ok(tally) => disconnect_session(session).await.map(|()| tally),
                Err(error) => Err(error),
            }
        }
        None if sensor.way == SensorTransport::Nats => {
            let acked = |acked| progress.advance(&bar, acked);
            nats::request_all_readings(sensor, &datasource, &key, &gate.nats, acked).await
        }
        None => {
            let (bar, progress) = (bar.clone(), progress.clone());
            let work = move || {
                post_all_readings(sensor, &datasource, &key, &gate, |acked| progress.advance(&bar, acked))
            };
            tokio::task::spawn_blocking(work).await?
        }
    };
    bar.finish();
    sent.with_context(|| format!("{} over {}", sensor.id, sensor.way.describe()))
}

/// The MQTT dialect of `way`; `None` for HTTP and NATS.
pub(super) fn mqtt_dialect(way: SensorTransport) -> Option<Dialect> {
    match way {
        SensorTransport::Mqtt311 => Some(Dialect::V311),
        SensorTransport::Mqtt5 => Some(Dialect::V5),
        SensorTransport::HttpPlain
        | SensorTransport::HttpBearer
        | SensorTransport::HttpApiKey
        | SensorTransport::Nats => None,
    }
}

fn post_all_readings(
    sensor: Sensor,
    datasource: &str,
    key: &KeySecret,
    gate: &GatewayAddresses,
    acked: impl Fn(u64),
) -> anyhow::Result<Tally> {
    #[derive(Deserialize)]
    struct IngestAnswer {
        accepted: u64,
    }
    let agent = client::agent(&gate.http)?;
    let mut tally = Tally::default();
    let mut readings = sensor.readings();
    for alone in [true, false].into_iter().cycle() {
        let many = if alone { 1 } else { READINGS_PER_REQUEST };
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
        let IngestAnswer { accepted } = answer.body_mut().read_json()?;
        ensure!(accepted == count, "{accepted} of {count} messages of a request were acknowledged");
        tally.count_acked(count, posted.elapsed());
        acked(count);
    }
    Ok(tally)
}

/// Sends one request with readings, the key (if any) placed as `way` says.
pub(super) fn post(
    agent: &Agent,
    gate: &GatewayAddresses,
    datasource: &str,
    way: SensorTransport,
    key: Option<&KeySecret>,
    body: &str,
) -> anyhow::Result<Response<Body>> {
    let request = agent.post(format!("{}/v1/ingest/{datasource}/{READING_TOPIC}", gate.http));
    let request = match key {
        Some(key) => present_key(request, way, key),
        None => request,
    };
    Ok(request.content_type("application/json").send(body)?)
}

fn present_key<B>(request: RequestBuilder<B>, way: SensorTransport, key: &KeySecret) -> RequestBuilder<B> {
    match way {
        SensorTransport::HttpBearer => request.header("authorization", format!("Bearer {}", key.expose())),
        SensorTransport::HttpApiKey => request.header("x-api-key", key.expose()),
        SensorTransport::HttpPlain
        | SensorTransport::Mqtt311
        | SensorTransport::Mqtt5
        | SensorTransport::Nats => request.header("authorization", key.expose()),
    }
}
