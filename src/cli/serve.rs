//! `headgate serve`: runs the gateway in the foreground until SIGTERM or Ctrl-C.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;

use super::client;
use super::out::{self, CommandOutput};
use super::service_manager::ServiceManager;
use super::signals::{self, AskedSignal, Signals};
use crate::config::{Config, ConfigChanges, ConfigError, LoadedConfig};
use crate::gateway::Gateway;
use crate::observe::spans::SpanExport;
use crate::observe::trace::{self, TraceControl};

/// How long a thread may still run after the drain, for example a query of a disconnected client.
pub(super) const THREADS_END_WAIT_MAX: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub(super) struct ServeArgs {
    /// The configuration (TOML) [env: HEADGATE_CONFIG]; without it, the defaults and the environment
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where everything is kept, whatever the configuration says
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

/// A running gateway and what its configuration was read from.
struct ServedConfig {
    file: Option<PathBuf>,
    data_dir: Option<PathBuf>,
    /// As it was at the start.
    started: Config,
    /// As it was read last.
    newest: Config,
    trace: TraceControl,
}

pub(super) fn run(args: ServeArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    signals::catch_early_hangup();
    let (file, data_dir) = (config_file(args.config), args.data_dir);
    let LoadedConfig { config, passed_over } = load(file.as_deref(), data_dir.as_deref())?;
    let trace = trace::init(&config.trace)?;
    tell_passed_over(&passed_over);
    let served = ServedConfig { file, data_dir, started: config.clone(), newest: config, trace };
    let runtime = runtime()?;
    let served = runtime.block_on(serve(served, out));
    runtime.shutdown_timeout(THREADS_END_WAIT_MAX);
    served
}

/// The configuration file that an argument or else `HEADGATE_CONFIG` names. An empty variable counts as absent.
pub(super) fn config_file(argument: Option<PathBuf>) -> Option<PathBuf> {
    argument.or_else(|| client::variable("HEADGATE_CONFIG").map(PathBuf::from))
}

/// Says which variables look like settings by their prefix and are none.
pub(super) fn tell_passed_over(variables: &[String]) {
    if !variables.is_empty() {
        let variables = variables.join(", ");
        tracing::info!(variables, "environment variables that are no settings are passed over");
    }
}

fn load(file: Option<&Path>, data_dir: Option<&Path>) -> Result<LoadedConfig, ConfigError> {
    let mut loaded = LoadedConfig::load(file)?;
    if let Some(data_dir) = data_dir {
        data_dir.clone_into(&mut loaded.config.data_dir);
    }
    Ok(loaded)
}

async fn serve(mut served: ServedConfig, out: &mut CommandOutput) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let mut manager = ServiceManager::from_environment();
    let mut config = served.started.clone();
    let spans = SpanExport::begin(&config.trace.otlp)?;
    loop {
        manager.starting();
        // In a cluster the start may have to wait for NATS.
        let mut gateway = tokio::select! {
            biased;
            started = Gateway::start(config.clone()) => started?,
            () = signals.asked() => {
                manager.stopping(Duration::ZERO);
                return Ok(());
            }
        };
        // What was read again since the process began holds on.
        gateway.apply_live(&served.newest);
        manager.ready(&gateway);
        // Devices are served whether or not anybody reads these lines.
        if let Err(error) = announce(&gateway, out) {
            let error = anyhow::Error::new(error);
            if !out::is_reader_gone(&error) {
                tracing::warn!("standard output: {error:#}");
            }
        }
        let mut starts_again = loop {
            tokio::select! {
                biased;
                asked = signals.asked_or_hung_up() => match asked {
                    AskedSignal::Reload => {
                        manager.reloading();
                        served.reload(&mut gateway);
                        manager.reloaded();
                    }
                    _ => break false,
                },
                () = gateway.left_history() => break true,
            }
        };
        gateway.pin_listeners(&mut config);
        let drain_max = gateway.drain_max();
        tracing::info!("draining");
        if starts_again {
            manager.starting();
        } else {
            manager.stopping(drain_max);
        }
        let mut stopping = std::pin::pin!(gateway.stop());
        tokio::select! {
            () = &mut stopping, if starts_again => {}
            () = signals.asked(), if starts_again => {
                starts_again = false;
                manager.stopping(drain_max);
                signals.finish(stopping).await;
            }
            else => signals.finish(stopping).await,
        }
        tracing::info!("stopped");
        if !starts_again {
            spans.end().await;
            return Ok(());
        }
    }
}

impl ServedConfig {
    /// Reads the configuration again, applies what can be changed while the gateway runs, and names what cannot. A
    /// configuration that cannot be used changes nothing.
    fn reload(&mut self, gateway: &mut Gateway) {
        let loaded = load(self.file.as_deref(), self.data_dir.as_deref()).map_err(anyhow::Error::new);
        let config = match loaded.and_then(|loaded| {
            self.trace.set_filter(&loaded.config.trace)?;
            Ok(loaded.config)
        }) {
            Ok(config) => config,
            Err(error) => {
                tracing::warn!(%error, "the configuration was read again and cannot be used: all stays as it was");
                return;
            }
        };
        gateway.apply_live(&config);
        let changed = ConfigChanges::between(&self.newest, &config).live.join(", ");
        tracing::info!(changed, "the configuration was read again, and the certificates are");
        let settings = ConfigChanges::between(&self.started, &config).after_restart.join(", ");
        if !settings.is_empty() {
            tracing::warn!(settings, "these settings differ from those in use, and hold after a restart");
        }
        self.newest = config;
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
