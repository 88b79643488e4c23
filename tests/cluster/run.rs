//! `config/cluster/run`: what it promises to whoever tries a cluster on one machine.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::common::nats::binary;
use crate::common::{http, http_agent, scratch, wait_for};

/// How long all of it may take to be ready.
const READY: Duration = Duration::from_secs(50);
/// Attempts to find free ports.
const ATTEMPTS: u16 = 5;
/// The ports of the script, before what is added to them.
const PORTS: [u16; 13] = [4222, 4223, 4224, 6222, 6223, 6224, 8222, 8223, 8224, 1883, 1884, 8080, 8081];

/// The script, with the programs of this build. Ended as a terminal ends it.
struct Script(Child);

impl Script {
    fn start(dir: &Path, plus: u16) -> Self {
        let headgate = Path::new(env!("CARGO_BIN_EXE_headgate")).parent().expect("it is in a directory");
        let nats = binary("nats-server");
        let nats = nats.parent().expect("it is in a directory, or in PATH");
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{}:{path}", headgate.display(), nats.display());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/cluster/run");
        let child = Command::new(script)
            .arg(dir)
            .env("PATH", path)
            .env("PORTS_PLUS", plus.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        Self(child.expect("the script starts"))
    }

    fn interrupt(&self) {
        let pid = libc::pid_t::try_from(self.0.id()).expect("a process id");
        // SAFETY: kill(2) takes two integers; the child has not been waited for, so the id is its.
        unsafe { libc::kill(pid, libc::SIGINT) };
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        self.interrupt();
        let _ = self.0.wait();
    }
}

/// Starts it where ports are free, and waits until it says that all is ready.
fn ready(dir: &Path) -> (Script, u16) {
    for attempt in 0..ATTEMPTS {
        // Below the ports that the system gives to connections.
        let plus = rand::random_range(12_000..23_000);
        let mut script = Script::start(dir, plus);
        let (tell, lines) = mpsc::channel();
        let stdout = script.0.stdout.take().expect("piped");
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        let deadline = Instant::now() + READY;
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.starts_with("ready") => return (script, plus),
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) if attempt + 1 < ATTEMPTS => break,
                Err(error) => panic!("the cluster is not ready: {error}"),
            }
        }
    }
    unreachable!("the last attempt returns or panics")
}

#[test]
fn the_script_starts_a_cluster_whose_gateways_know_the_same_and_leaves_nothing_behind() {
    let dir = scratch();
    let (mut script, plus) = ready(dir.path());
    let key = std::fs::read_to_string(dir.path().join("gateway-1/admin.key")).expect("an admin key");
    let agent = http_agent();
    let request = |gateway: u16, method: &str, path: &str, body: &[u8]| {
        let addr = ([127, 0, 0, 1], plus + 8080 + gateway).into();
        let json = [("content-type", "application/json")];
        http(&agent, addr, method, path, key.trim(), &json, body).expect("an HTTP answer")
    };
    let made = request(0, "POST", "/v1/datasources", br#"{"id": "press-4", "name": "press-4"}"#);
    assert_eq!(made.status, 201, "{}", made.text());
    let seen = request(1, "GET", "/v1/datasources/press-4", &[]);
    assert_eq!(seen.status, 200, "{}", seen.text());

    script.interrupt();
    // As somebody does who has no patience.
    script.interrupt();
    let status = wait_for("the script to end", || script.0.try_wait().expect("our child"));
    assert_eq!(status.code(), Some(130));
    let left: Vec<_> =
        PORTS.into_iter().filter(|port| TcpStream::connect(("127.0.0.1", port + plus)).is_ok()).collect();
    assert!(left.is_empty(), "something still listens on {left:?} + {plus}");
}
