//! A cluster of three nats-servers of a test's own, on loopback or each on a host of its own: a network
//! namespace with a cable that can be pulled. Killed, with their hosts, when it is dropped.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::nats::{STORE_ROOM, binary};
use super::{http_agent, scratch, wait_for};

/// How many servers.
const SERVERS: usize = 3;

/// Three nats-servers that are one.
pub struct Servers {
    servers: Vec<Server>,
    // After the servers, which live on them.
    network: Option<Network>,
}

struct Server {
    dir: TempDir,
    /// Its network namespace, if it has one.
    host: Option<String>,
    address: String,
    port: u16,
    monitoring: u16,
    child: Option<Child>,
}

impl Servers {
    /// On loopback.
    pub fn start() -> Self {
        let free = || TcpListener::bind("127.0.0.1:0").expect("a free port");
        let listeners: Vec<_> = (0..3 * SERVERS).map(|_| free()).collect();
        let ports: Vec<u16> = listeners.iter().map(|l| l.local_addr().expect("bound").port()).collect();
        drop(listeners);
        let places = (0..SERVERS).map(|n| Place {
            host: None,
            address: "127.0.0.1".to_owned(),
            ports: [ports[3 * n], ports[3 * n + 1], ports[3 * n + 2]],
        });
        Self::at(places.collect(), None)
    }

    /// Each on a host of its own. Needs root.
    pub fn on_hosts() -> Self {
        let network = Network::new(SERVERS);
        let places = (0..SERVERS).map(|n| Place {
            host: Some(network.host(n)),
            address: network.address(n),
            ports: [4222, 6222, 8222],
        });
        Self::at(places.collect(), Some(network))
    }

    fn at(places: Vec<Place>, network: Option<Network>) -> Self {
        let routes: Vec<_> = places.iter().map(|p| format!("nats://{}:{}", p.address, p.ports[1])).collect();
        let routes = routes.join(", ");
        let servers = places.into_iter().enumerate().map(|(n, Place { host, address, ports })| {
            let dir = scratch();
            let [port, cluster, monitoring] = ports;
            let config = format!(
                "server_name: n{n}\nlisten: \"{address}:{port}\"\nhttp: \"{address}:{monitoring}\"\n\
                 jetstream {{ store_dir: {:?}, {STORE_ROOM} }}\n\
                 cluster {{ name: test, listen: \"{address}:{cluster}\", routes: [{routes}] }}\n",
                dir.path().join("jetstream"),
            );
            std::fs::write(dir.path().join("nats.conf"), config).expect("the configuration is written");
            let mut server = Server { dir, host, address, port, monitoring, child: None };
            server.start();
            server
        });
        let servers = Self { servers: servers.collect(), network };
        servers.settle();
        servers
    }

    /// Waits until JetStream works.
    pub fn settle(&self) {
        wait_for("the servers to be one cluster", || {
            let ready = |server: &Server| server.monitor("/healthz").is_some_and(|h| h["status"] == "ok");
            self.servers.iter().all(ready).then_some(())
        });
    }

    /// Where clients connect.
    pub fn urls(&self) -> Vec<String> {
        self.servers.iter().map(|server| format!("nats://{}:{}", server.address, server.port)).collect()
    }

    /// Which server leads a stream.
    pub fn leader_of(&self, stream: &str) -> usize {
        wait_for("a leader", || {
            let jsz = self.servers.iter().find_map(|server| server.monitor("/jsz?streams=true"))?;
            let streams = jsz["account_details"][0]["stream_detail"].as_array()?;
            let found = streams.iter().find(|found| found["name"] == stream)?;
            let name = found["cluster"]["leader"].as_str()?;
            name.strip_prefix('n')?.parse().ok()
        })
    }

    /// The process id of one.
    pub fn pid(&self, server: usize) -> u32 {
        self.servers[server].child.as_ref().expect("it is running").id()
    }

    /// SIGKILL to one, for a while, and back.
    pub fn kill(&mut self, server: usize) {
        self.servers[server].kill();
    }

    /// Starts one again.
    pub fn restart(&mut self, server: usize) {
        self.servers[server].start();
    }

    /// Pulls the cable of one server's host, or puts it back.
    pub fn cable(&self, server: usize, plugged: bool) {
        let network = self.network.as_ref().expect("the servers are on hosts");
        ip(&["link", "set", &network.cable(server), if plugged { "up" } else { "down" }]);
    }
}

impl Servers {
    /// Cuts the way between two servers' hosts, and nothing else, or opens it again.
    pub fn way(&self, between: (usize, usize), open: bool) {
        let network = self.network.as_ref().expect("the servers are on hosts");
        for (from, to) in [between, (between.1, between.0)] {
            let (host, address) = (network.host(from), format!("{}/32", network.address(to)));
            let what = if open { "del" } else { "add" };
            ip(&["-n", &host, "route", what, "blackhole", &address]);
        }
    }
}

struct Place {
    host: Option<String>,
    address: String,
    /// For clients, for the other servers, for monitoring.
    ports: [u16; 3],
}

impl Server {
    fn start(&mut self) {
        let mut command = match &self.host {
            Some(host) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", host]).arg(binary("nats-server"));
                command
            }
            None => Command::new(binary("nats-server")),
        };
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log"));
        command.arg("--config").arg(self.dir.path().join("nats.conf"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log.expect("a file for its log"));
        self.child = Some(command.spawn().expect("nats-server starts"));
    }

    fn kill(&mut self) {
        // `ip netns exec` becomes the server: it is the process itself that is killed.
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// What its monitoring says; `None` while it says nothing.
    fn monitor(&self, path: &str) -> Option<Value> {
        self.child.as_ref()?;
        let url = format!("http://{}:{}{path}", self.address, self.monitoring);
        let request = ureq::http::Request::get(url).body(()).expect("a request");
        let mut answer = http_agent().run(request).ok()?;
        serde_json::from_slice(&answer.body_mut().read_to_vec().ok()?).ok()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- the last lines of nats-server {}:{}", self.address, self.port);
            lines[lines.len().saturating_sub(10)..].iter().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// Hosts and the switch that they are plugged into. Named after this process, so that tests do not meet.
struct Network {
    hosts: usize,
    id: u32,
}

impl Network {
    fn new(hosts: usize) -> Self {
        let network = Self { hosts, id: std::process::id() };
        let switch = network.switch();
        ip(&["link", "add", &switch, "type", "bridge"]);
        ip(&["addr", "add", &format!("{}/24", network.address(253)), "dev", &switch]);
        ip(&["link", "set", &switch, "up"]);
        for n in 0..hosts {
            let (host, cable) = (network.host(n), network.cable(n));
            ip(&["netns", "add", &host]);
            ip(&["link", "add", &cable, "type", "veth", "peer", "name", "eth0", "netns", &host]);
            ip(&["link", "set", &cable, "master", &switch, "up"]);
            ip(&["-n", &host, "addr", "add", &format!("{}/24", network.address(n)), "dev", "eth0"]);
            ip(&["-n", &host, "link", "set", "eth0", "up"]);
            ip(&["-n", &host, "link", "set", "lo", "up"]);
        }
        network
    }

    fn switch(&self) -> String {
        format!("hgb{}", self.id)
    }

    fn host(&self, n: usize) -> String {
        format!("headgate-{}-{n}", self.id)
    }

    /// This side of a host's cable.
    fn cable(&self, n: usize) -> String {
        format!("hgc{}.{n}", self.id)
    }

    fn address(&self, n: usize) -> String {
        format!("10.{}.{}.{}", 200 + self.id % 50, self.id / 50 % 250, n + 1)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for n in 0..self.hosts {
            let _ = Command::new("ip").args(["netns", "del", &self.host(n)]).status();
        }
        let _ = Command::new("ip").args(["link", "del", &self.switch()]).status();
    }
}

fn ip(arguments: &[&str]) {
    let output =
        Command::new("ip").args(arguments).output().expect("iproute2 is there (tests/run installs it)");
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
