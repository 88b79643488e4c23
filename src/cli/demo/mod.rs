//! `headgate demo`: the whole path of a message, on real input. Starts a gateway, creates a datasource
//! for each of five recorded sensors, and replays all their readings through real clients over real
//! sockets while strangers try to get in. Then reads everything back from storage and checks that it
//! is complete.

mod nats;
mod report;
mod senders;
mod sensors;
mod strangers;

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Deserialize;
use serde_json::value::RawValue;
use tempfile::TempDir;
use tokio::task::{JoinSet, spawn_blocking};

use self::nats::DemoNats;
use self::report::{Comparison, DemoReport, SensorRow, StoredReadings};
use self::senders::{DemoProgress, GatewayAddresses, READING_TOPIC};
use self::sensors::{SENSORS, Sensor, sensors_with};
use self::strangers::Strangers;
use super::client::{ApiClient, KeySecret};
use super::out::{CommandOutput, grouped, latency};
use super::replay::Tally;
use super::signals::{self, Signals};
use super::{datasource, records, serve};
use crate::config::Config;
use crate::gateway::Gateway;
use crate::observe::trace;

/// How long storage may take to hold every acknowledged reading.
const DEMO_STORAGE_WAIT_MAX: Duration = Duration::from_secs(60);
/// The pause between two looks at storage's cursor.
const STORAGE_POLL_PAUSE: Duration = Duration::from_millis(5);

#[derive(Debug, clap::Args)]
pub(super) struct DemoArgs {
    /// The configuration (TOML) [env: HEADGATE_CONFIG]; without it and --data-dir, free ports and a temporary directory
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to keep everything, instead of a temporary directory that is removed at the end
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// A NATS server to replay one sensor over, such as nats://127.0.0.1:4222 [default: a nats-server of the demo's own,
    /// if there is one in the path]
    #[arg(long, value_name = "URL")]
    nats: Option<String>,
    /// Exit after the report instead of serving on until Ctrl-C
    #[arg(long)]
    once: bool,
}

pub(super) fn run(mut args: DemoArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    signals::catch_early_hangup();
    args.config = serve::config_file(args.config);
    let (once, named_nats) = (args.once, args.nats.take());
    // The directory lives until the gateway has stopped.
    let (mut config, _temporary) = configure(args)?;
    ensure!(
        config.storage.read_from().is_some(),
        "the demo reads back from storage; storage.sinks names none that can be read"
    );
    trace::init(&config.trace)?;
    let nats = nats::find(named_nats, &mut config)?;
    let runtime = serve::runtime()?;
    let shown = runtime.block_on(demo(config, once, nats, out));
    runtime.shutdown_timeout(serve::THREADS_END_WAIT_MAX);
    shown
}

/// The configuration that the arguments ask for. Where they ask for nothing, defaults are replaced so
/// that the demo runs anywhere: free ports, a temporary directory, few log lines.
fn configure(args: DemoArgs) -> anyhow::Result<(Config, Option<TempDir>)> {
    let mut config = Config::load(args.config.as_deref())?;
    let default = Config::default();
    if config.trace == default.trace {
        // An operator wants a log line for each stranger; here the report counts them.
        config.trace.filter = "error,rumqttc=off".to_owned();
    }
    if config.auth == default.auth {
        // The strangers fail more often than the limit allows, and each must be told the real reason.
        config.auth.failures_exempt =
            ["127.0.0.0/8", "::1"].iter().map(|network| network.parse()).collect::<Result<_, _>>()?;
    }
    // It manages what it shows by the one address that it knows.
    config.http.admin.listen = None;
    if let Some(data_dir) = args.data_dir {
        config.data_dir = data_dir;
    } else if args.config.is_none() {
        for (listen, usual) in
            [(&mut config.mqtt.listen, default.mqtt.listen), (&mut config.http.listen, default.http.listen)]
        {
            if *listen == usual {
                listen.set_port(0);
            }
        }
        if config.data_dir == default.data_dir {
            let temporary = tempfile::Builder::new()
                .prefix("headgate-demo-")
                .tempdir()
                .context("a temporary directory")?;
            temporary.path().clone_into(&mut config.data_dir);
            return Ok((config, Some(temporary)));
        }
    }
    Ok((config, None))
}

async fn demo(
    config: Config,
    once: bool,
    nats: Option<DemoNats>,
    out: &mut CommandOutput,
) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let gateway = Gateway::start(config).await?;
    let shown = tokio::select! {
        shown = replay_and_report(&gateway, nats.as_ref(), out) => shown,
        () = signals.asked() => Err(anyhow::anyhow!("interrupted")),
    };
    if shown.is_ok() && !once {
        writeln!(out, "The gateway serves on until Ctrl-C.")?;
        out.flush()?;
        signals.asked().await;
    }
    signals.finish(gateway.stop()).await;
    shown
}

/// Replays, reads back and reports: everything between the gateway's start and stop.
async fn replay_and_report(
    gateway: &Gateway,
    nats: Option<&DemoNats>,
    out: &mut CommandOutput,
) -> anyhow::Result<()> {
    serve::announce(gateway, out)?;
    let sensors = sensors_with(nats.is_some());
    if nats.is_none() {
        writeln!(out, "NATS  left out: no nats-server is in the path, and --nats names none")?;
    }
    let gate = GatewayAddresses {
        mqtt: serve::reachable(gateway.mqtt_addr),
        http: format!("http://{}", serve::reachable(gateway.http_addr)),
        nats: nats.map(|nats| nats.servers.clone()).unwrap_or_default(),
    };
    let key_file = &gateway.admin_key_path;
    let key = std::fs::read_to_string(key_file).with_context(|| key_file.display().to_string())?;
    let admin = ApiClient::new(&gate.http, KeySecret::new(&key))?;

    let readings = SENSORS.iter().map(|sensor| sensor.readings().count() as u64).sum();
    // The log may hold records of an earlier run: only what this run adds is compared.
    let (begin, datasources) = {
        let admin = admin.clone();
        spawn_blocking(move || anyhow::Ok((log_end(&admin)?, create_datasources(&admin)?))).await??
    };
    let strangers = Strangers::prepare(&admin, gate.clone(), &datasources[0].0, &datasources[0].1).await?;
    writeln!(out, "\nreplaying {} readings of {} sensors at once ...", grouped(readings), SENSORS.len())?;
    out.flush()?;

    let progress = DemoProgress::default();
    let started = Instant::now();
    let mut strangers = tokio::spawn(strangers.run(progress.clone(), readings));
    let tallies = replay_sensors(sensors, &datasources, &gate, &progress, out).await?;
    let took = started.elapsed();
    let refused = (&mut strangers).await??;

    let report = spawn_blocking(move || {
        let end = wait_until_stored(&admin)?;
        let acked: u64 = tallies.iter().map(|tally| tally.acked).sum();
        let unaccounted = i128::from(end) - i128::from(begin) - i128::from(acked);
        let mut rows = Vec::with_capacity(SENSORS.len());
        for ((sensor, tally), (id, _)) in sensors.into_iter().zip(tallies).zip(&datasources) {
            rows.push(SensorRow { sensor, tally, stored: read_back(&admin, sensor, id)? });
        }
        anyhow::Ok(DemoReport { rows, refused, unaccounted })
    })
    .await??;
    report.print(out)?;
    report.check(readings)?;
    writeln!(
        out,
        "{} sent = acknowledged = stored, in {:.1} s; {} attempts refused, 0 of them stored",
        grouped(readings),
        took.as_secs_f64(),
        grouped(report.refusals())
    )?;
    out.flush()?;
    Ok(())
}

/// Replays all sensors at once, and says of each when it is done. Returns their tallies, in their order.
async fn replay_sensors(
    sensors: [Sensor; 5],
    datasources: &[(String, KeySecret)],
    gate: &GatewayAddresses,
    progress: &DemoProgress,
    out: &mut CommandOutput,
) -> anyhow::Result<Vec<Tally>> {
    let mut devices = JoinSet::new();
    for (index, (sensor, (id, key))) in sensors.into_iter().zip(datasources.iter().cloned()).enumerate() {
        let sending = senders::send(sensor, id, key, gate.clone(), progress.clone());
        devices.spawn(async move { anyhow::Ok((index, sending.await?)) });
    }
    let mut tallies: Vec<(usize, Tally)> = Vec::with_capacity(SENSORS.len());
    while let Some(sent) = devices.join_next().await {
        let (index, tally) = sent??;
        let sensor = sensors[index];
        progress.bars.suspend(|| {
            let done = format!("{:>7} acknowledged over {}", grouped(tally.acked), sensor.way.describe());
            let median = latency(tally.latency.value_at_quantile(0.5));
            writeln!(out, "  {:20} {done}, p50 {median}", sensor.id)?;
            out.flush()
        })?;
        tallies.push((index, tally));
    }
    tallies.sort_by_key(|(index, _)| *index);
    Ok(tallies.into_iter().map(|(_, tally)| tally).collect())
}

fn create_datasources(admin: &ApiClient) -> anyhow::Result<Vec<(String, KeySecret)>> {
    SENSORS.iter().map(|sensor| datasource::create_for_command(admin, sensor.id, sensor.name)).collect()
}

/// Waits until storage holds everything that is in the log; returns the log's end.
fn wait_until_stored(admin: &ApiClient) -> anyhow::Result<u64> {
    let end = log_end(admin)?;
    let deadline = Instant::now() + DEMO_STORAGE_WAIT_MAX;
    loop {
        let stored = gauge(&admin.text("/metrics")?, "headgate_storage_cursor")?;
        if stored >= end {
            return Ok(end);
        }
        ensure!(
            Instant::now() < deadline,
            "storage holds {stored} of {end} records after {DEMO_STORAGE_WAIT_MAX:?}"
        );
        std::thread::sleep(STORAGE_POLL_PAUSE);
    }
}

/// The offset that the next record will get.
fn log_end(admin: &ApiClient) -> anyhow::Result<u64> {
    gauge(&admin.text("/metrics")?, "headgate_log_next_offset")
}

/// Reads a whole number from Prometheus' text format.
fn gauge(metrics: &str, name: &str) -> anyhow::Result<u64> {
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = value.with_context(|| format!("the gateway has no metric {name}"))?;
    value.trim().parse().with_context(|| format!("{name} is {value:?}"))
}

/// Reads all of a datasource's records, compares each with its sensor's recording, and reads the
/// newest reading.
fn read_back(admin: &ApiClient, sensor: Sensor, id: &str) -> anyhow::Result<StoredReadings> {
    let mut sent = sensor.readings();
    let mut comparison = Comparison::default();
    records::for_each_record(admin, id, &[("topic", READING_TOPIC)], |record| {
        let record: StoredPayload = serde_json::from_str(record)?;
        comparison.record(record.payload.get(), sent.next());
        Ok(())
    })?;
    let latest: LatestAnswer = admin.get(&format!("{}/latest", datasource::path(id)?), &[])?;
    let [newest] = latest.topics;
    Ok(comparison.finish(newest.payload.get().to_owned(), sensor.readings().last()))
}

/// The newest values of a datasource that has one topic.
#[derive(Deserialize)]
struct LatestAnswer {
    topics: [StoredPayload; 1],
}

/// A stored record's payload, as the gateway writes it.
#[derive(Deserialize)]
struct StoredPayload {
    payload: Box<RawValue>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gauge_is_found_by_its_whole_name() {
        let metrics = "# TYPE log gauge\nlog_next 12\nlog 7\n";
        assert_eq!(gauge(metrics, "log").expect("there"), 7);
        assert_eq!(gauge(metrics, "log_next").expect("there"), 12);
        assert!(gauge(metrics, "other").is_err());
    }
}
