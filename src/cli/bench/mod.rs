//! `headgate bench`: how many messages a second a gateway acknowledges over MQTT, and how long an
//! acknowledgement takes.

mod gateway;
mod load;
mod wire;

use std::io::Write;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::json;

use self::gateway::OwnGateway;
use self::load::{BenchMeasurement, BenchPlan};
use super::client::named_key;
use super::out::{CommandOutput, grouped, latency, table};

#[derive(Debug, clap::Args)]
pub(super) struct BenchArgs {
    /// The gateway to load, with the key of HEADGATE_API_KEY or HEADGATE_API_KEY_FILE; without it,
    /// one is started for the purpose, in another process, with a temporary data directory
    #[arg(long, value_name = "HOST:PORT")]
    addr: Option<String>,
    /// Clients at once
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    connections: u32,
    /// Messages that each has unacknowledged; at QoS 0, messages between two pings
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..))]
    window: u16,
    /// Bytes of a payload
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(..=1 << 20))]
    payload: u32,
    /// 1 counts acknowledgements; 0 has none, and counts what lies before an answered ping
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    qos: u8,
    /// How long to measure
    #[arg(long, default_value_t = 5.0, value_parser = seconds)]
    seconds: f64,
    /// How long to load before that
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    warmup: f64,
    /// MQTT's version: 4 is 3.1.1
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(4..=5))]
    protocol: u8,
    /// Print a JSON object instead of a table
    #[arg(long)]
    json: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("it has to be a number of seconds, at most a day".to_owned()),
    }
}

pub(super) fn run(args: BenchArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    ensure!(args.seconds > 0.0, "--seconds has to be more than 0");
    let mut own = None;
    let (addr, key) = match &args.addr {
        Some(addr) => {
            let key = named_key()?.context("no API key: set HEADGATE_API_KEY or HEADGATE_API_KEY_FILE")?;
            (resolve(addr)?, key)
        }
        None => {
            let gateway = own.insert(OwnGateway::start()?);
            (gateway.mqtt, gateway.key.clone())
        }
    };
    let plan = BenchPlan {
        addr,
        protocol: args.protocol,
        qos: args.qos,
        connections: usize::try_from(args.connections)?,
        window: args.window,
        payload_bytes: usize::try_from(args.payload)?,
        warmup: Duration::from_secs_f64(args.warmup),
        measure: Duration::from_secs_f64(args.seconds),
    };
    let measured = load::run(plan, key.expose())?;
    if args.json { print_json(&args, &measured, out) } else { print_table(&args, addr, &measured, out) }
}

fn resolve(addr: &str) -> anyhow::Result<SocketAddr> {
    let mut found = addr.to_socket_addrs().with_context(|| format!("{addr} is not HOST:PORT"))?;
    found.next().with_context(|| format!("{addr} has no address"))
}

/// The latency quantiles that are reported, with their column names.
const REPORTED_QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0)];

#[allow(clippy::cast_precision_loss, reason = "a rate, of which a few digits count")]
fn per_second(measured: &BenchMeasurement) -> f64 {
    measured.acked as f64 / measured.elapsed.as_secs_f64()
}

fn print_table(
    args: &BenchArgs,
    addr: SocketAddr,
    measured: &BenchMeasurement,
    out: &mut CommandOutput,
) -> anyhow::Result<()> {
    let whose = match args.addr {
        Some(_) => format!("the gateway at {addr}"),
        None => "a gateway of its own, in another process, with a temporary data directory".to_owned(),
    };
    let version = if args.protocol == 5 { "5" } else { "3.1.1" };
    writeln!(
        out,
        "{whose}: MQTT {version}, QoS {}, connections {}, window {}, payload {} bytes, {:.1} s",
        args.qos,
        args.connections,
        measured.window,
        args.payload,
        measured.elapsed.as_secs_f64()
    )?;
    let mut columns = vec![if args.qos == 0 { "fenced msg/s" } else { "acked msg/s" }];
    columns.extend(REPORTED_QUANTILES.map(|(name, _)| name));
    let mut rows = table(&columns, &[0, 1, 2, 3, 4]);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rate is positive and far below 2^64"
    )]
    let mut cells = vec![grouped(per_second(measured).round() as u64)];
    cells.extend(
        REPORTED_QUANTILES.map(|(_, quantile)| latency(measured.latency.value_at_quantile(quantile))),
    );
    rows.add_row(cells);
    writeln!(out, "{rows}")?;
    Ok(())
}

fn print_json(args: &BenchArgs, measured: &BenchMeasurement, out: &mut CommandOutput) -> anyhow::Result<()> {
    #[allow(clippy::cast_precision_loss, reason = "three digits are measured")]
    let micros = |quantile| measured.latency.value_at_quantile(quantile) as f64 / 1e3;
    let latency: serde_json::Map<_, _> = REPORTED_QUANTILES
        .iter()
        .map(|(name, quantile)| ((*name).to_owned(), micros(*quantile).into()))
        .collect();
    let report = json!({
        "gateway": args.addr.as_deref().unwrap_or("own"),
        "protocol": args.protocol,
        "qos": args.qos,
        "connections": args.connections,
        "window": measured.window,
        "payload_bytes": args.payload,
        "seconds": measured.elapsed.as_secs_f64(),
        "acked": measured.acked,
        "acked_per_second": per_second(measured),
        "latency_us": latency,
    });
    writeln!(out, "{report}")?;
    Ok(())
}
