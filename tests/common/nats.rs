//! A nats-server of a test's own: on free ports, with JetStream, killed and started again as the test
//! likes, and killed for good when it is dropped.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::{python, scratch, wait_for};

/// How much JetStream believes that it may store, whatever is free on this disk: a stream reserves what it may become.
pub const STORE_ROOM: &str = "max_file_store: 1TB, max_memory_store: 1GB";

/// A nats-server. While it is stopped, its port is nobody's.
pub struct NatsServer {
    /// Its log, and in most cases its configuration and JetStream's files.
    dir: TempDir,
    config: PathBuf,
    child: Option<Child>,
    /// Where it serves what, as it says itself.
    ports: Value,
    port: u16,
}

impl NatsServer {
    /// One at the defaults, with JetStream.
    pub fn start() -> Self {
        Self::with("")
    }

    /// One with `config` in its configuration file, beside JetStream and the place of its files. Ports
    /// in there are best -1, which takes a free one.
    pub fn with(config: &str) -> Self {
        Self::with_jetstream(STORE_ROOM, config)
    }

    /// One with these settings of JetStream beside the place of its files.
    pub fn with_jetstream(settings: &str, config: &str) -> Self {
        let dir = scratch();
        let file = dir.path().join("nats.conf");
        std::fs::write(&file, text_of(dir.path(), settings, config)).expect("the configuration is written");
        Self::begin(dir, file, 0)
    }

    /// Stops it and starts it again with the usual room.
    pub fn give_room(&mut self) {
        self.kill();
        std::fs::write(&self.config, text_of(self.dir.path(), STORE_ROOM, "")).expect("it is written");
        self.restart();
    }

    /// One with this configuration file, on the port that it names.
    pub fn of_file(config: &Path, port: u16) -> Self {
        Self::begin(scratch(), config.to_owned(), port)
    }

    fn begin(dir: TempDir, config: PathBuf, port: u16) -> Self {
        let mut server = Self { dir, config, child: None, ports: Value::Null, port };
        server.restart();
        server
    }

    /// Starts it after [`NatsServer::kill`], on the port and with the files that it had.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "it is running");
        let port = if self.port == 0 { "-1".to_owned() } else { self.port.to_string() };
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log"));
        let child = Command::new(binary("nats-server"))
            .arg("--config")
            .arg(&self.config)
            .args(["--addr", "127.0.0.1", "--port", &port, "--ports_file_dir"])
            .arg(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.expect("a file for its log"))
            .spawn()
            .expect("nats-server starts");
        let file = self.dir.path().join(format!("nats-server_{}.ports", child.id()));
        self.child = Some(child);
        self.ports = wait_for("nats-server to say where it serves", || {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().expect("our child"));
            assert!(ended.is_none(), "nats-server ended:\n{}", self.log());
            match std::fs::read(&file) {
                // It may be half written.
                Ok(text) => serde_json::from_slice(&text).ok(),
                Err(error) if error.kind() == ErrorKind::NotFound => None,
                Err(error) => panic!("{}: {error}", file.display()),
            }
        });
        self.port = self.port_of("nats");
    }

    /// SIGKILL. Connections break, and new ones are refused.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it is running");
        child.kill().expect("our child can be killed");
        child.wait().expect("our child can be waited for");
    }

    /// Stops it, keeps a copy of what it has stored, and starts it again.
    pub fn keep_store(&mut self) -> TempDir {
        let kept = scratch();
        self.kill();
        copy_tree(&self.dir.path().join("jetstream"), kept.path());
        self.restart();
        kept
    }

    /// Stops it, puts a copy of what it had stored in the place of what it has, and starts it again.
    pub fn put_back_store(&mut self, kept: &Path) {
        self.kill();
        let store = self.dir.path().join("jetstream");
        std::fs::remove_dir_all(&store).expect("it has stored something");
        std::fs::create_dir(&store).expect("a directory");
        copy_tree(kept, &store);
        self.restart();
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it is running").id()
    }

    /// Where clients connect: `nats://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// The port of one of its listeners, by its name in the file of ports: `nats`, `cluster`,
    /// `websocket`, `monitoring`.
    pub fn port_of(&self, listener: &str) -> u16 {
        let address = self.ports[listener][0].as_str();
        let port = address.and_then(|address| address.rsplit(':').next()?.parse().ok());
        port.unwrap_or_else(|| panic!("no port of {listener} in {}", self.ports))
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        let text = std::fs::read(self.dir.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Its own directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- nats-server's last lines");
            for line in &lines[lines.len().saturating_sub(20)..] {
                eprintln!("{line}");
            }
        }
    }
}

fn copy_tree(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from.join(".")).arg(to).status().expect("cp runs");
    assert!(copied.success(), "{} to {}", from.display(), to.display());
}

/// A program that `tests/run` has installed beside Python, or one in `PATH`.
pub fn binary(name: &str) -> PathBuf {
    let installed = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../venv/bin").join(name);
    if installed.exists() { installed } else { PathBuf::from(name) }
}

/// Runs the body of an `async def` with nats-py, as `nc` connected to `url` and `js`, its JetStream. It
/// may use `json` and `sys.argv[2:]`.
pub fn nats_py(url: &str, body: &str, arguments: &[&str]) -> Output {
    let body: String = body.lines().map(|line| format!("    {line}\n")).collect();
    let program = format!(
        "import asyncio, json, sys\nimport nats\n\
         async def main():\n    nc = await nats.connect(sys.argv[1])\n    js = nc.jetstream()\n\
         {body}    await nc.close()\nasyncio.run(main())\n"
    );
    let arguments: Vec<&str> = [url].into_iter().chain(arguments.iter().copied()).collect();
    python(&program, &arguments)
}

fn text_of(dir: &Path, jetstream: &str, config: &str) -> String {
    format!("jetstream {{ store_dir: {:?}, {jetstream} }}\n{config}\n", dir.join("jetstream"))
}
