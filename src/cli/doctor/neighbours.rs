//! Whom a gateway shares its ports with, and whom it depends on: one that runs already, NATS, and where records are stored.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

use headgate_bridge_nats::Nats;
use headgate_bridge_postgres::PostgresConnection;
use serde_json::Value;
use ureq::Agent;

use super::DoctorFinding;
use crate::cli::client::{self, ApiClient};
use crate::config::{Config, ListenAddress, LogBackend, SinkKind};
#[cfg(feature = "delta")]
use crate::consume::storage::probe_lake;
use crate::gateway::clock_of_servers;

/// How long an answer may take.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(3);
/// A clock that is further off than this is wrong.
const CLOCK_OFF_S_MAX: i64 = 5;

/// A gateway that answers where the commands ask, or where this configuration would serve.
pub(super) struct RunningGateway {
    url: Option<String>,
    /// What `/readyz` says.
    readiness: Option<Value>,
    /// How many seconds its clock is ahead of this one.
    clock_ahead_s: Option<i64>,
    /// Where it serves MQTT.
    mqtt: Vec<String>,
}

impl RunningGateway {
    /// Asks at `HEADGATE_URL` and at the listeners of HTTP.
    pub(super) fn find(config: &Config) -> Self {
        let mut urls: Vec<String> = client::gateway_url().into_iter().collect();
        let listeners = [Some(&config.http.listen), config.http.admin.listen.as_ref()];
        for listen in listeners.into_iter().flatten() {
            let found = listen.resolve().unwrap_or_default();
            urls.extend(
                found
                    .into_iter()
                    .filter(|addr| addr.port() != 0)
                    .map(|addr| format!("http://{}", near(addr))),
            );
        }
        let mut none = Self { url: None, readiness: None, clock_ahead_s: None, mqtt: Vec::new() };
        for url in urls {
            let agent = client::agent(&url).ok();
            if let Some((readiness, clock_ahead_s)) = agent.and_then(|agent| ask_readiness(&agent, &url)) {
                none.mqtt = mqtt_of(&url);
                return Self { url: Some(url), readiness: Some(readiness), clock_ahead_s, ..none };
            }
        }
        none
    }

    /// Whether the ports of the configuration are free, or taken by this gateway.
    pub(super) fn look_at_ports(&self, config: &Config) -> Vec<DoctorFinding> {
        let (mqtt, http) = (&config.mqtt.tls, &config.http.tls);
        let listeners = [
            ("port of MQTT", Some(&config.mqtt.listen)),
            ("port of MQTT over TLS", mqtt.is_served().then_some(&mqtt.listen)),
            ("port of HTTP", Some(&config.http.listen)),
            ("port of HTTPS", http.is_served().then_some(&http.listen)),
            ("port of the administration", config.http.admin.listen.as_ref()),
        ];
        let served = listeners.into_iter().filter_map(|(what, listen)| Some((what, listen?)));
        served.map(|(what, listen)| self.look_at_port(what, listen)).collect()
    }

    fn look_at_port(&self, what: &str, listen: &ListenAddress) -> DoctorFinding {
        let addresses = match listen.resolve() {
            Ok(addresses) => addresses,
            Err(error) => {
                let found = format!("{listen}: {error}");
                return DoctorFinding::bad(what, found, "name a host that this machine has");
            }
        };
        for addr in addresses {
            match TcpListener::bind(addr).map_err(|error| error.kind()) {
                Ok(_) => {}
                Err(std::io::ErrorKind::AddrInUse) if self.has(addr) => {
                    return DoctorFinding::ok(what, format!("{addr} is served by the gateway that runs"));
                }
                Err(std::io::ErrorKind::AddrInUse) if self.url.is_some() => {
                    return DoctorFinding::warn(
                        what,
                        format!("{addr} is taken, while a gateway runs"),
                        "if it is not that gateway's: end what has it, or name another port",
                    );
                }
                Err(std::io::ErrorKind::AddrInUse) => {
                    return DoctorFinding::bad(
                        what,
                        format!("{addr} is taken by another program"),
                        "end that one (ss -ltnp names it), or name another port",
                    );
                }
                Err(std::io::ErrorKind::PermissionDenied) => {
                    return DoctorFinding::bad(
                        what,
                        format!("{addr} may not be served by this user"),
                        "name a port above 1023, or give the gateway CAP_NET_BIND_SERVICE",
                    );
                }
                Err(error) => {
                    let found = format!("{addr} cannot be served: {error}");
                    return DoctorFinding::bad(what, found, "name an address that this machine has");
                }
            }
        }
        DoctorFinding::ok(what, format!("{listen} is free"))
    }

    /// Whether the gateway that runs serves this address.
    fn has(&self, addr: SocketAddr) -> bool {
        let port = format!(":{}", addr.port());
        // Whoever speaks HTTP to a port of MQTT is refused there, and listed.
        self.mqtt.iter().any(|place| place.ends_with(&port)) || self.url.is_some() && is_alive(addr)
    }

    /// What the gateway that runs says of itself.
    pub(super) fn look_at_readiness(&self) -> Vec<DoctorFinding> {
        const WHAT: &str = "gateway";
        let (Some(url), Some(readiness)) = (&self.url, &self.readiness) else {
            return vec![DoctorFinding::ok(WHAT, "none runs here")];
        };
        let words = |list: &str| {
            let list = readiness[list].as_array().into_iter().flatten();
            list.filter_map(|words| words.as_str().map(str::to_owned)).collect::<Vec<_>>()
        };
        let mut findings: Vec<_> = words("reasons")
            .into_iter()
            .map(|reason| DoctorFinding::bad(WHAT, reason, "it takes nothing: see its own log"))
            .collect();
        let warnings = words("warnings").into_iter();
        findings.extend(
            warnings.map(|words| DoctorFinding::warn(WHAT, words, "devices are served; see its own log")),
        );
        if findings.is_empty() {
            findings.push(DoctorFinding::ok(WHAT, format!("{url} is ready")));
        }
        if let Some(ahead) = self.clock_ahead_s.filter(|ahead| ahead.abs() > CLOCK_OFF_S_MAX) {
            let order = if ahead < 0 { "behind" } else { "ahead of" };
            findings.push(DoctorFinding::warn(
                "clock",
                format!("that of {url} is {} s {order} this machine's", ahead.abs()),
                "set the one right that is wrong: spans such as --from 1h are of this machine's clock",
            ));
        }
        findings
    }
}

/// An address that can be connected to.
fn near(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        ip if !ip.is_unspecified() => addr,
        _ if addr.is_ipv4() => ([127, 0, 0, 1], addr.port()).into(),
        _ => (std::net::Ipv6Addr::LOCALHOST, addr.port()).into(),
    }
}

fn is_alive(addr: SocketAddr) -> bool {
    ["http", "https"].into_iter().any(|scheme| {
        let url = format!("{scheme}://{}", near(addr));
        let agent = client::agent(&url).ok();
        let ask = |agent: Agent| {
            let request = agent.get(format!("{url}/livez")).config();
            request.timeout_global(Some(ANSWER_WAIT_MAX)).build().call().ok()
        };
        let answer = agent.and_then(ask);
        answer
            .and_then(|mut answer| answer.body_mut().read_to_string().ok())
            .is_some_and(|text| text == "alive\n")
    })
}

/// What `/readyz` says at a URL, if a gateway is there, and how many seconds its clock is ahead.
fn ask_readiness(agent: &Agent, url: &str) -> Option<(Value, Option<i64>)> {
    let request = agent.get(format!("{url}/readyz")).config().timeout_global(Some(ANSWER_WAIT_MAX)).build();
    let mut answer = request.call().ok()?;
    let date = answer.headers().get("date").and_then(|date| date.to_str().ok());
    let then = date.and_then(|date| jiff::fmt::rfc2822::parse(date).ok()).map(|date| date.timestamp());
    let ahead = then.map(|then| then.as_second() - jiff::Timestamp::now().as_second());
    let readiness: Value = answer.body_mut().read_json().ok()?;
    readiness["status"].is_string().then_some((readiness, ahead))
}

/// Where a gateway serves MQTT, if the commands have a key to ask with.
fn mqtt_of(url: &str) -> Vec<String> {
    let ask = || {
        let client = ApiClient::new(url, client::key_from_environment(url).ok()?).ok()?;
        let answer: Value = client.get("/v1/connect", &[]).ok()?;
        let places = answer["mqtt"].as_array()?.iter();
        Some(places.filter_map(|place| place.as_str().map(str::to_owned)).collect())
    };
    ask().unwrap_or_default()
}

/// Whether NATS is there, if the configuration has one, and lets the gateway in.
pub(super) fn look_at_nats(config: &Config) -> Vec<DoctorFinding> {
    const WHAT: &str = "NATS";
    const SETTINGS_ADVICE: &str = "correct the settings under [nats]";
    if config.nats.servers.is_empty() {
        return Vec::new();
    }
    let settings = match config.nats.connection("doctor") {
        Ok(settings) => settings,
        Err(error) => return vec![DoctorFinding::bad(WHAT, error.to_string(), SETTINGS_ADVICE)],
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return vec![DoctorFinding::bad(WHAT, error.to_string(), "free some of the machine")],
    };
    runtime.block_on(async {
        let nats = match Nats::connect(&settings).await {
            Ok(nats) => nats,
            Err(error) => return vec![DoctorFinding::bad(WHAT, error.to_string(), SETTINGS_ADVICE)],
        };
        let asked = Instant::now();
        while let Some(trouble) = nats.trouble() {
            if asked.elapsed() > ANSWER_WAIT_MAX {
                let needs = config.log.backend == LogBackend::Jetstream;
                let advice = "start it, or correct nats.servers and its credentials";
                return vec![match needs {
                    true => DoctorFinding::bad(WHAT, trouble, format!("{advice}: the log is there")),
                    false => {
                        DoctorFinding::warn(WHAT, trouble, format!("{advice}; devices are served without it"))
                    }
                }];
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let server = nats.client().server_info();
        let found = format!("connected to {} (nats-server {})", server.server_name, server.version);
        let asked = tokio::time::timeout(ANSWER_WAIT_MAX, clock_of_servers(&nats, config)).await;
        let clock = asked.ok().flatten().map(look_at_clock_of_nats);
        std::iter::once(DoctorFinding::ok(WHAT, found)).chain(clock).collect()
    })
}

/// This machine's clock beside that of NATS' servers, which is so far ahead of it.
fn look_at_clock_of_nats(ahead_us: i64) -> DoctorFinding {
    const WHAT: &str = "clock of NATS";
    let seconds = ahead_us / 1_000_000;
    if seconds.abs() <= CLOCK_OFF_S_MAX {
        return DoctorFinding::ok(WHAT, "as this machine's");
    }
    let order = if seconds < 0 { "behind" } else { "ahead of" };
    DoctorFinding::warn(
        WHAT,
        format!("{} s {order} this machine's", seconds.abs()),
        "set the one right that is wrong: in a cluster keys end by the servers' clock, and records have the gateways' time",
    )
}

/// Where records are stored.
pub(super) fn look_at_sinks(config: &Config) -> Vec<DoctorFinding> {
    let of = |sink: &SinkKind| match sink {
        SinkKind::Sqlite => look_at_sqlite(&config.data_dir.join("records.db")),
        SinkKind::Postgres => look_at_postgres(config),
        SinkKind::Delta => look_at_lake(config),
    };
    match config.storage.sinks.is_empty() {
        true => {
            vec![DoctorFinding::ok("storage", "nothing is stored beside the log: storage.sinks is empty")]
        }
        false => config.storage.sinks.iter().map(of).collect(),
    }
}

fn look_at_sqlite(file: &Path) -> DoctorFinding {
    const WHAT: &str = "storage in SQLite";
    if !file.exists() {
        return DoctorFinding::ok(WHAT, format!("{} is not there yet: serve makes it", file.display()));
    }
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY | rusqlite::OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let opened = rusqlite::Connection::open_with_flags(file, flags);
    let read = opened.and_then(|database| {
        database.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, i64>(0))
    });
    match read {
        Ok(_) => DoctorFinding::ok(WHAT, format!("{} can be read", file.display())),
        Err(error) => DoctorFinding::bad(
            WHAT,
            format!("{} cannot be read: {error}", file.display()),
            "devices are served without it; headgate repair says what can be done",
        ),
    }
}

#[cfg(not(feature = "delta"))]
fn look_at_lake(_: &Config) -> DoctorFinding {
    DoctorFinding::bad(
        "storage in a Delta lake",
        "this build is without it",
        "use one with the feature delta (headgate --version says), or take delta out of storage.sinks",
    )
}

#[cfg(feature = "delta")]
fn look_at_lake(config: &Config) -> DoctorFinding {
    const WHAT: &str = "storage in a Delta lake";
    match probe_lake(&config.storage.delta, &config.data_dir) {
        Ok((place, true)) => {
            DoctorFinding::ok(WHAT, format!("{place} can be written, and creates no object twice"))
        }
        Ok((place, false)) => DoctorFinding::ok(WHAT, format!("{place} is not there yet: serve makes it")),
        Err(trouble) => DoctorFinding::bad(
            WHAT,
            trouble,
            "correct the settings under [storage.delta], or what the store lets the gateway do there: read, write, remove \
             and conditional writes (If-None-Match); the log keeps records until it is there",
        ),
    }
}

fn look_at_postgres(config: &Config) -> DoctorFinding {
    const WHAT: &str = "storage in PostgreSQL";
    let settings = match config.storage.postgres.settings() {
        Ok(settings) => settings,
        Err(error) => {
            return DoctorFinding::bad(
                WHAT,
                error.to_string(),
                "correct the settings under [storage.postgres]",
            );
        }
    };
    let place = settings.place().to_owned();
    match PostgresConnection::open(&settings).and_then(|database| database.run("SELECT 1")) {
        Ok(()) => DoctorFinding::ok(WHAT, format!("{place} lets the gateway in")),
        Err(error) => DoctorFinding::bad(
            WHAT,
            format!("{place}: {error}"),
            "start it, or correct storage.postgres.url; the log keeps records until it is there",
        ),
    }
}
