//! The harness of the integration tests: the real binary, started on a data directory and on free
//! ports, and spoken to over its sockets alone. A gateway that a test leaves behind, by returning
//! or by panicking, is killed.
//!
//! With `HEADGATE_TEST_LOG=jetstream` in the environment every gateway is one of a cluster: each data directory
//! that a test uses has a nats-server of its own (`cluster.rs`), and the log is there.

#![allow(dead_code, unreachable_pub, reason = "every test binary holds all of this and uses a part")]

pub mod cluster;
pub mod events;
pub mod kept;
pub mod load;
pub mod members;
pub mod memory;
pub mod nats;
pub mod openapi;
pub mod postgres;
pub mod seaweed;
pub mod servers;
pub mod steady;
pub mod stores;
pub mod threads;
pub mod tls;
pub mod wire;
pub mod ws;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything that is expected to happen may take on a slow, busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A directory on the disk that the build uses (a `/tmp` in memory would make every sync free): in that of the whole run, which
/// `tests/run` removes however the test ends.
pub fn scratch() -> tempfile::TempDir {
    let place = std::env::var("HEADGATE_TEST_SCRATCH");
    let place = place.as_deref().unwrap_or(env!("CARGO_TARGET_TMPDIR"));
    tempfile::tempdir_in(place).expect("a temporary directory")
}

/// Sends a signal to a process that the test has started, and not waited for yet.
pub fn signal(pid: u32, signal: libc::c_int) {
    let pid = libc::pid_t::try_from(pid).expect("a process id");
    // SAFETY: kill(2) takes two integers; the child has not been waited for, so the id is its.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "signal {signal}");
}

/// Polls until `ready` gives a value; panics with `what` when [`PATIENCE`] is over. What takes long is looked at less
/// often: to look takes processor time from what is waited for.
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for: {what}");
        std::thread::sleep(pause);
        pause = (pause * 5 / 4).min(Duration::from_millis(25));
    }
}

/// How a gateway is to be started: on which directory, with which settings.
#[derive(Clone)]
pub struct Setup {
    dir: PathBuf,
    env: BTreeMap<String, String>,
    open_files_max: Option<u64>,
}

impl Setup {
    /// On a data directory, at the defaults, on free ports.
    pub fn on(dir: &Path) -> Self {
        let setup = Self::embedded_on(dir);
        match cluster::server_of(dir) {
            Some(url) => setup.set("log.backend", "jetstream").set("nats.servers", format!("[\"{url}\"]")),
            None => setup,
        }
    }

    /// The same, with the embedded log whatever the environment says: for a test of its files.
    pub fn embedded_on(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), env: BTreeMap::new(), open_files_max: None }
            .set("mqtt.listen", "127.0.0.1:0")
            .set("mqtt.tls.listen", "127.0.0.1:0")
            .set("http.listen", "127.0.0.1:0")
            .set("http.tls.listen", "127.0.0.1:0")
    }

    /// With one key of the configuration set, by its dotted name.
    pub fn set(mut self, key: &str, value: impl ToString) -> Self {
        let name = format!("HEADGATE_{}", key.to_uppercase().replace('.', "__"));
        self.env.insert(name, value.to_string());
        self
    }

    /// Has a cluster take these settings over, which no start does. Without a cluster there is nothing to do.
    pub fn change_cluster(self) -> Self {
        if self.env.get("HEADGATE_LOG__BACKEND").is_some_and(|backend| backend == "jetstream") {
            let output = self.run(&["cluster", "change", "--yes"]);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        self
    }

    /// With a variable of the environment that is no setting.
    pub fn with_env(mut self, name: &str, value: &str) -> Self {
        self.env.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Another command of Headgate with these settings, to its end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_headgate"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HEADGATE_")) {
            command.env_remove(name);
        }
        command.envs(&self.env).args(arguments).stdin(Stdio::null()).output().expect("headgate runs")
    }

    /// With no more open files than this, whatever the gateway asks for.
    pub fn open_files_max(self, limit: u64) -> Self {
        Self { open_files_max: Some(limit), ..self }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_headgate"));
        command.arg("serve").arg("--data-dir").arg(&self.dir);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HEADGATE_")) {
            command.env_remove(name);
        }
        command.envs(&self.env).env("RUST_BACKTRACE", "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(limit) = self.open_files_max {
            let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
            // SAFETY: the closure runs after fork(2) and calls setrlimit(2) only, with a valid pointer.
            unsafe {
                command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                });
            }
        }
        command
    }

    /// Starts the process and waits for nothing: for a test that kills it while it starts.
    pub fn spawn(&self) -> Child {
        self.command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("headgate starts")
    }

    /// Starts it and waits until it says that it is ready.
    pub fn start(&self) -> Gateway {
        match self.try_start() {
            Ok(gateway) => gateway,
            Err(exit) => panic!("headgate serve exited with {}:\n{}", exit.status, exit.output),
        }
    }

    /// Starts it where it is expected to refuse, and returns how it ended.
    pub fn refused(&self) -> Exit {
        match self.try_start() {
            Ok(gateway) => panic!("headgate serve started:\n{}", gateway.output()),
            Err(exit) => exit,
        }
    }

    /// Starts it; `Err` when the process ends before it is ready.
    pub fn try_start(&self) -> Result<Gateway, Exit> {
        let mut child = self.command().spawn().expect("headgate starts");
        let output = Arc::new(Mutex::new(String::new()));
        let (line_tx, lines) = mpsc::channel();
        let readers = [
            follow(child.stdout.take().expect("piped"), &output, Some(line_tx)),
            follow(child.stderr.take().expect("piped"), &output, None),
        ];
        let process = Process { child, output, readers: readers.into() };
        let deadline = Instant::now() + PATIENCE;
        let (mut mqtt, mut mqtts, mut http, mut https, mut admin) = (None, None, None, None, None);
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains("mqtts://") => mqtts = loopback_address(&line),
                Ok(line) if line.starts_with("admin key") => break,
                Ok(line) if line.starts_with("admin") => admin = loopback_address(&line),
                Ok(line) if line.contains("https://") => https = loopback_address(&line),
                Ok(line) if line.contains("MQTT") => mqtt = mqtt.or_else(|| loopback_address(&line)),
                Ok(line) if line.contains("HTTP") => http = http.or_else(|| loopback_address(&line)),
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(process.wait()),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    panic!("headgate serve named no listeners:\n{}", process.output())
                }
            }
        }
        let mqtt = mqtt.expect("it says where it serves MQTT");
        let http = http.expect("it says where it serves HTTP");
        let gateway =
            Gateway { process, mqtt, mqtts, http, https, admin, setup: self.clone(), agent: agent() };
        wait_for("/readyz to say 200", || (gateway.get("/readyz", "").status == 200).then_some(()));
        Ok(gateway)
    }
}

/// Copies what a process prints into `output`, and line by line into `lines`, on a thread.
fn follow(
    stream: impl Read + Send + 'static,
    output: &Arc<Mutex<String>>,
    lines: Option<mpsc::Sender<String>>,
) -> JoinHandle<()> {
    let output = output.clone();
    std::thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        while stream.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).into_owned();
            output.lock().expect("no holder panics").push_str(&text);
            if let Some(lines) = &lines {
                let _ = lines.send(text);
            }
            line.clear();
        }
    })
}

/// The first `127.0.0.1:PORT` in a line.
fn loopback_address(line: &str) -> Option<SocketAddr> {
    let rest = &line[line.find("127.0.0.1:")?..];
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.' && c != ':').unwrap_or(rest.len());
    rest[..end].trim_end_matches(['.', ':']).parse().ok()
}

/// It keeps no connection: the gateway closes those of a key as it ends, and a request that goes out over
/// one at that moment gets no answer.
fn agent() -> ureq::Agent {
    agent_config().max_idle_connections(0).build().new_agent()
}

fn agent_config() -> ureq::config::ConfigBuilder<ureq::typestate::AgentScope> {
    ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE))
}

/// A child process whose output is kept. Killed when dropped.
struct Process {
    child: Child,
    output: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    fn output(&self) -> String {
        self.output.lock().expect("no holder panics").clone()
    }

    /// Waits for the end, which has to come within [`PATIENCE`].
    fn wait(mut self) -> Exit {
        let status = wait_for("headgate to exit", || self.child.try_wait().expect("our child"));
        for reader in self.readers.drain(..) {
            reader.join().expect("a reader does not panic");
        }
        Exit { status, output: self.output() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_some()) {
            return;
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let output = self.output();
            let lines: Vec<&str> = output.lines().collect();
            eprintln!("--- the gateway's last lines");
            for line in &lines[lines.len().saturating_sub(40)..] {
                eprintln!("{line}");
            }
        }
    }
}

/// How a process ended, and everything that it printed.
#[derive(Debug)]
pub struct Exit {
    pub status: ExitStatus,
    pub output: String,
}

/// A datasource that a test created, with its first key.
#[derive(Clone)]
pub struct Source {
    pub id: String,
    pub key_id: String,
    pub key: String,
}

/// An HTTP answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }
}

/// A running gateway.
pub struct Gateway {
    process: Process,
    /// Where it serves MQTT.
    pub mqtt: SocketAddr,
    /// Where it serves MQTT over TLS, if it does.
    pub mqtts: Option<SocketAddr>,
    /// Where it serves HTTP.
    pub http: SocketAddr,
    /// Where it serves HTTP over TLS, if it does.
    pub https: Option<SocketAddr>,
    /// Where it serves the administration, if not there.
    pub admin: Option<SocketAddr>,
    setup: Setup,
    agent: ureq::Agent,
}

impl Gateway {
    /// A gateway at the defaults on `dir`.
    pub fn start(dir: &Path) -> Self {
        Setup::on(dir).start()
    }

    /// Its data directory.
    pub fn dir(&self) -> &Path {
        &self.setup.dir
    }

    /// Everything that it has printed so far.
    pub fn output(&self) -> String {
        self.process.output()
    }

    /// Waits until it has printed these words: what it prints comes here a little later.
    pub fn says(&self, words: &str) {
        wait_for(&format!("the gateway to say {words:?}"), || self.output().contains(words).then_some(()));
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// The key that the first start wrote to `admin.key`.
    pub fn admin_key(&self) -> String {
        let path = self.dir().join("admin.key");
        std::fs::read_to_string(&path).expect("admin.key is readable").trim().to_owned()
    }

    /// SIGKILL: no chance to finish anything.
    pub fn kill(mut self) {
        self.process.child.kill().expect("our child can be killed");
        self.process.child.wait().expect("our child can be waited for");
    }

    /// SIGTERM, without waiting.
    pub fn terminate(&self) {
        signal(self.pid(), libc::SIGTERM);
    }

    /// Waits for the end after [`Gateway::terminate`].
    pub fn wait(self) -> Exit {
        self.process.wait()
    }

    /// SIGTERM, and the drain has to end with exit code 0.
    pub fn stop(self) -> Exit {
        self.terminate();
        let exit = self.wait();
        assert!(exit.status.success(), "the drain ended with {}:\n{}", exit.status, exit.output);
        exit
    }

    /// One HTTP request; `key`, unless empty, goes into `Authorization`.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        key: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        self.try_request(method, path, key, headers, body).expect("an HTTP answer")
    }

    /// As [`Gateway::request`]; `Err` when the connection ends before an answer.
    pub fn try_request(
        &self,
        method: &str,
        path: &str,
        key: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Answer, ureq::Error> {
        let addr = match self.admin {
            Some(admin) if !key.is_empty() && key == self.admin_key() => admin,
            _ => self.http,
        };
        http(&self.agent, addr, method, path, key, headers, body)
    }

    /// GET.
    pub fn get(&self, path: &str, key: &str) -> Answer {
        self.request("GET", path, key, &[], &[])
    }

    /// POST of JSON.
    pub fn post(&self, path: &str, key: &str, body: &Value) -> Answer {
        let body = body.to_string();
        self.request("POST", path, key, &[("content-type", "application/json")], body.as_bytes())
    }

    /// Creates a datasource whose key may publish.
    pub fn create(&self, id: &str) -> Source {
        self.create_as(&serde_json::json!({ "id": id, "name": id }))
    }

    /// A datasource whose key may publish and subscribe.
    pub fn create_open(&self, id: &str) -> Source {
        self.create_as(&serde_json::json!({ "id": id, "name": id, "scopes": ["ingest", "subscribe"] }))
    }

    fn create_as(&self, body: &Value) -> Source {
        let answer = self.post("/v1/datasources", &self.admin_key(), body);
        assert_eq!(answer.status, 201, "{}", answer.text());
        let json = answer.json();
        let text = |pointer: &str| {
            let value = json.pointer(pointer).and_then(Value::as_str);
            value.unwrap_or_else(|| panic!("{pointer} in {json}")).to_owned()
        };
        Source { id: text("/datasource/id"), key_id: text("/key/id"), key: text("/key/secret") }
    }

    /// Deletes a datasource.
    pub fn delete(&self, id: &str) {
        let answer = self.request("DELETE", &format!("/v1/datasources/{id}"), &self.admin_key(), &[], &[]);
        assert_eq!(answer.status, 204, "{}", answer.text());
    }

    /// Every stored record of a datasource, page by page.
    pub fn records(&self, id: &str) -> Vec<Value> {
        let mut records = Vec::new();
        let mut page = format!("/v1/datasources/{id}/records?limit=1000");
        loop {
            let answer = self.get(&page, &self.admin_key());
            assert_eq!(answer.status, 200, "{}", answer.text());
            let mut json = answer.json();
            let Some(Value::Array(mut more)) = json.get_mut("records").map(Value::take) else {
                panic!("no records in {json}")
            };
            records.append(&mut more);
            match &json["next"] {
                Value::Null => return records,
                next => page = format!("/v1/datasources/{id}/records?limit=1000&after_offset={next}"),
            }
        }
    }

    /// Waits until storage has `count` records of a datasource, and returns them.
    pub fn stored(&self, id: &str, count: usize) -> Vec<Value> {
        wait_for(&format!("{count} records of {id} in storage"), || {
            Some(self.records(id)).filter(|records| records.len() >= count)
        })
    }

    /// How many records there have ever been in the log.
    pub fn records_in_log(&self) -> f64 {
        self.metric("headgate_log_next_offset") - cluster::first_offset() as f64
    }

    /// Waits until storage has everything that the log had when this was called, for as long as it gets on.
    pub fn settle(&self) {
        let end = self.metric("headgate_log_next_offset");
        let mut cursor = self.metric("headgate_storage_cursor");
        while cursor < end {
            cursor = wait_for("storage to get on towards the end of the log", || {
                let now = self.metric("headgate_storage_cursor");
                (now > cursor || now >= end).then_some(now)
            });
        }
    }

    /// `/metrics`, as text.
    pub fn metrics(&self) -> String {
        let answer = self.get("/metrics", &self.admin_key());
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.text()
    }

    /// One sample of `/metrics`, by its name with labels, as printed; 0 when it is not there yet.
    pub fn metric(&self, name: &str) -> f64 {
        let metrics = self.metrics();
        let sample = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        sample.map_or(0.0, |value| value.parse().expect("a number"))
    }
}

/// Runs a Python program with paho at hand.
pub fn python(program: &str, arguments: &[&str]) -> Output {
    let python = format!("{}/../venv/bin/python3", env!("CARGO_TARGET_TMPDIR"));
    let output = Command::new(python).arg("-c").arg(program).args(arguments).output();
    output.expect("there is an environment with paho (tests/run makes it)")
}

/// Runs a JavaScript program with mqtt.js at hand.
pub fn node(program: &str, arguments: &[&str]) -> Output {
    let modules = format!("{}/../node/node_modules", env!("CARGO_TARGET_TMPDIR"));
    let output =
        Command::new("node").arg("-e").arg(program).args(arguments).env("NODE_PATH", modules).output();
    output.expect("there is Node.js with mqtt.js (tests/run installs it)")
}

/// One HTTP request to the gateway at `addr`, whose answer is held against its description (`openapi.rs`).
pub fn http(
    agent: &ureq::Agent,
    addr: SocketAddr,
    method: &str,
    path: &str,
    key: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Result<Answer, ureq::Error> {
    let mut request = ureq::http::Request::builder().method(method).uri(format!("http://{addr}{path}"));
    if !key.is_empty() {
        request = request.header("authorization", key);
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut answer = if matches!(method, "GET" | "DELETE") {
        agent.run(request.body(()).expect("a request"))?
    } else {
        agent.run(request.body(body).expect("a request"))?
    };
    let headers = answer.headers().iter();
    let headers = headers.map(|(k, v)| (k.to_string(), String::from_utf8_lossy(v.as_bytes()).into_owned()));
    let answer = Answer {
        status: answer.status().as_u16(),
        headers: headers.collect(),
        body: answer.body_mut().with_config().limit(256 << 20).read_to_vec()?,
    };
    openapi::check(method, path, &answer);
    Ok(answer)
}

/// An agent of a test's own, for a thread that outlives a [`Gateway`]. It keeps its connections.
pub fn http_agent() -> ureq::Agent {
    agent_config().build().new_agent()
}
