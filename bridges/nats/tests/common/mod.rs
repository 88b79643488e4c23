//! A nats-server for tests: on a free port, with JetStream. A test can kill it and start it again.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use headgate_bridge_nats::{Nats, NatsCredentials, NatsSettings};
use tempfile::TempDir;

/// How long anything in a test may take.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A nats-server.
pub(crate) struct Server {
    dir: TempDir,
    port: u16,
    child: Option<Child>,
}

impl Server {
    /// Starts one.
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        // The port is free now, and is used again after each kill.
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
        let mut server = Self { dir, port: port.expect("a free port").port(), child: None };
        server.restart();
        server
    }

    /// Starts it again, with what it had stored.
    pub(crate) fn restart(&mut self) {
        assert!(self.child.is_none(), "it is running");
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log"));
        let child = Command::new(binary())
            .args(["--addr", "127.0.0.1", "--port", &self.port.to_string(), "--jetstream", "--store_dir"])
            .arg(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.expect("a file for its log"))
            .spawn();
        self.child = Some(child.expect("nats-server starts"));
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("it is running");
        child.kill().expect("our child can be killed");
        child.wait().expect("our child can be waited for");
    }

    /// An established connection to it.
    pub(crate) async fn connect(&self) -> Nats {
        let nats = self.begin_to_connect().await;
        let deadline = Instant::now() + SOON;
        while nats.trouble().is_some() {
            assert!(Instant::now() < deadline, "no connection to nats-server");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        nats
    }

    /// A connection to it that may not be established yet.
    pub(crate) async fn begin_to_connect(&self) -> Nats {
        let settings = NatsSettings {
            servers: vec![format!("nats://127.0.0.1:{}", self.port)],
            credentials: NatsCredentials::None,
            ca: None,
            name: "test".to_owned(),
        };
        Nats::connect(&settings).await.expect("settings that can work")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The nats-server that `tests/run` installed, or one in `PATH`.
fn binary() -> PathBuf {
    let installed = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../venv/bin/nats-server");
    if installed.exists() { installed } else { PathBuf::from("nats-server") }
}

/// The result of a future, within [`SOON`].
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, what).await.expect("happens soon")
}
