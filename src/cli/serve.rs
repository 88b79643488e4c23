//! `headgate serve`: runs the gateway in the foreground until SIGTERM or Ctrl-C.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;

use super::out::{self, CommandOutput};
use super::signals::{AskedSignal, Signals};
use crate::config::Config;
use crate::gateway::Gateway;
use crate::observe::trace;

/// How long a thread may still run after the drain, for example a query of a disconnected client.
pub(super) const THREADS_END_WAIT_MAX: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub(super) struct ServeArgs {
    /// The configuration (TOML); without it, the defaults and the environment
    #[arg(long, value_name = "FILE", env = "HEADGATE_CONFIG")]
    config: Option<PathBuf>,
    /// Where everything is kept, whatever the configuration says
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

pub(super) fn run(args: ServeArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let mut config = Config::load(args.config.as_deref())?;
    if let Some(data_dir) = args.data_dir {
        config.data_dir = data_dir;
    }
    trace::init(&config.trace)?;
    let runtime = runtime()?;
    let served = runtime.block_on(serve(config, args.config.as_deref(), out));
    runtime.shutdown_timeout(THREADS_END_WAIT_MAX);
    served
}

async fn serve(config: Config, file: Option<&Path>, out: &mut CommandOutput) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    // In a cluster the start may have to wait for NATS.
    let gateway = tokio::select! {
        biased;
        started = Gateway::start(config) => started?,
        () = signals.asked() => return Ok(()),
    };
    // Devices are served whether or not anybody reads these lines.
    if let Err(error) = announce(&gateway, out) {
        let error = anyhow::Error::new(error);
        if !out::is_reader_gone(&error) {
            tracing::warn!("standard output: {error:#}");
        }
    }
    while signals.asked_or_hung_up().await == AskedSignal::Reload {
        reload(&gateway, file);
    }
    tracing::info!("draining");
    signals.finish(gateway.stop()).await;
    tracing::info!("stopped");
    Ok(())
}

/// Reads the configuration again, and applies what can be changed while the gateway runs.
fn reload(gateway: &Gateway, file: Option<&Path>) {
    match Config::load(file) {
        Ok(config) => {
            gateway.apply_live(&config);
            tracing::info!(
                memory_bytes_max = config.intake.memory_bytes_max,
                memory_share_bytes_max = config.intake.memory_share_bytes_max,
                "the configuration was read again: the limits of memory and of strangers hold now, all others after \
                 a restart"
            );
        }
        Err(error) => tracing::warn!(%error, "the configuration is left as it was"),
    }
}

/// Prints one line per listener with its address and how a client connects, then the admin key's path.
/// The addresses are the words that begin with `mqtt://`, `mqtts://`, `http://`, `https://` and `nats://` or `tls://`.
pub(super) fn announce(gateway: &Gateway, out: &mut CommandOutput) -> std::io::Result<()> {
    writeln!(
        out,
        "MQTT  mqtt://{}  3.1.1 and 5; the key as user name, password or user property \"authorization\"",
        gateway.mqtt_addr
    )?;
    if let Some(addr) = gateway.mqtt_tls_addr {
        writeln!(out, "MQTT  mqtts://{addr}  the same over TLS")?;
    }
    let dashboard = if gateway.admin_addr.is_some() { "" } else { "dashboard; " };
    writeln!(
        out,
        "HTTP  http://{}  {dashboard}POST /v1/ingest/DATASOURCE[/TOPIC]; the key as \"Authorization: KEY\"",
        gateway.http_addr
    )?;
    if let Some(addr) = gateway.http_tls_addr {
        writeln!(out, "HTTP  https://{addr}  the same over TLS")?;
    }
    if let Some(addr) = gateway.admin_addr {
        let scheme = if gateway.http_tls_addr.is_some() { "https" } else { "http" };
        writeln!(
            out,
            "admin {scheme}://{addr}  the admin API, metrics, dashboard; for the commands, HEADGATE_URL"
        )?;
    }
    if !gateway.nats_servers().is_empty() {
        let servers = gateway.nats_servers().join(",");
        writeln!(out, "NATS  {servers}  ingest.DATASOURCE.TOPIC; the key as header \"Authorization: KEY\"")?;
    }
    writeln!(out, "admin key  {}", gateway.admin_key_path.display())?;
    out.flush()
}

/// A listener's address as seen from this machine: loopback if it listens on every address.
pub(super) fn reachable(listener: SocketAddr) -> SocketAddr {
    let ip = match listener.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listener.port())
}

/// The runtime of the commands that serve.
pub(super) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting threads")
}
