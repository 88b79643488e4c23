//! The benchmark's own gateway: another process of this program with a temporary data directory, so
//! that `headgate bench` needs no running gateway and the generator's work stays apart from the
//! gateway's.

use std::env;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, bail};
use tempfile::TempDir;

use crate::cli::client::{ApiClient, KeySecret};
use crate::cli::datasource;

/// A running gateway, ended when this is dropped.
pub(super) struct OwnGateway {
    child: Child,
    lines: BufReader<ChildStdout>,
    /// Removed after the gateway has ended.
    data_dir: TempDir,
    pub(super) mqtt: SocketAddr,
    /// A key of a datasource made for the benchmark.
    pub(super) key: KeySecret,
}

impl OwnGateway {
    pub(super) fn start() -> anyhow::Result<Self> {
        let data_dir = tempfile::Builder::new().prefix("headgate-bench-").tempdir()?;
        let program = env::current_exe().context("the path of this program")?;
        let mut child = Command::new(program)
            .arg("serve")
            .arg("--data-dir")
            .arg(data_dir.path())
            .env("HEADGATE_MQTT__LISTEN", "127.0.0.1:0")
            .env("HEADGATE_HTTP__LISTEN", "127.0.0.1:0")
            .env("HEADGATE_TRACE__FILTER", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a gateway")?;
        let stdout = child.stdout.take().context("the gateway has no standard output")?;
        let mut gateway = Self {
            child,
            lines: BufReader::new(stdout),
            mqtt: SocketAddr::from(([127, 0, 0, 1], 0)),
            key: KeySecret::new(""),
            data_dir,
        };
        let http = gateway.read_addresses()?;
        let admin =
            std::fs::read_to_string(gateway.data_dir.path().join("admin.key")).context("admin.key")?;
        let admin = ApiClient::new(&http, KeySecret::new(&admin))?;
        (_, gateway.key) = datasource::create_for_command(&admin, "bench", "Benchmark")?;
        Ok(gateway)
    }

    /// Reads the lines that say where the gateway listens.
    fn read_addresses(&mut self) -> anyhow::Result<String> {
        let (mut mqtt, mut http) = (None, None);
        let mut line = String::new();
        while mqtt.is_none() || http.is_none() {
            line.clear();
            if self.lines.read_line(&mut line)? == 0 {
                bail!("the gateway did not start: {}", self.child.wait()?);
            }
            for word in line.split_whitespace() {
                if let Some(addr) = word.strip_prefix("mqtt://") {
                    mqtt = Some(addr.parse().with_context(|| format!("the gateway says {word}"))?);
                } else if word.starts_with("http://") {
                    http = Some(word.to_owned());
                }
            }
        }
        let (Some(mqtt), Some(http)) = (mqtt, http) else {
            bail!("the gateway did not say where it listens")
        };
        self.mqtt = mqtt;
        Ok(http)
    }
}

impl Drop for OwnGateway {
    /// Kills the gateway without a drain: its data is removed with the directory.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
