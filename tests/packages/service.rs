//! The gateway under a service manager: what it says over the socket that systemd gives to a service of `Type=notify`.

use std::collections::VecDeque;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::{PATIENCE, Setup, scratch, signal};

/// The service manager's end of the socket.
struct Manager {
    socket: UnixDatagram,
    /// What was said and not asked for yet.
    said: VecDeque<String>,
}

impl Manager {
    fn listen(dir: &Path) -> Self {
        let socket = UnixDatagram::bind(dir.join("notify")).expect("a socket");
        Self { socket, said: VecDeque::new() }
    }

    fn setup(dir: &Path, watchdog: Duration) -> Setup {
        let socket = dir.join("notify");
        let setup = Setup::embedded_on(&dir.join("data"))
            .with_env("NOTIFY_SOCKET", socket.to_str().expect("UTF-8"))
            .with_env("WATCHDOG_USEC", &watchdog.as_micros().to_string());
        setup.set("drain_ms_max", "3s")
    }

    /// Passes over what is said until a line begins with `words`; returns that line, or `None` after `within`.
    fn hears_within(&mut self, words: &str, within: Duration) -> Option<String> {
        let deadline = Instant::now() + within;
        loop {
            while let Some(line) = self.said.pop_front() {
                if line.starts_with(words) {
                    return Some(line);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            self.socket.set_read_timeout(Some(left.max(Duration::from_millis(1)))).expect("set");
            let mut datagram = [0; 4096];
            let Ok(bytes) = self.socket.recv(&mut datagram) else { return None };
            self.said.extend(String::from_utf8_lossy(&datagram[..bytes]).lines().map(str::to_owned));
        }
    }

    fn hears(&mut self, words: &str) -> String {
        self.hears_within(words, PATIENCE).unwrap_or_else(|| panic!("the gateway has not said {words}"))
    }

    /// Passes over what was said so far.
    fn forget(&mut self) {
        while self.hears_within("\0", Duration::ZERO).is_some() {}
    }
}

#[test]
fn the_service_manager_is_told_of_the_start_of_life_of_a_reload_and_of_the_drain() {
    let dir = scratch();
    let mut manager = Manager::listen(dir.path());
    let gateway = Manager::setup(dir.path(), Duration::from_millis(600)).start();
    manager.hears("EXTEND_TIMEOUT_USEC=");
    manager.hears("READY=1");
    assert!(manager.hears("STATUS=").contains(&gateway.mqtt.to_string()));
    let began = Instant::now();
    (0..5).for_each(|_| _ = manager.hears("WATCHDOG=1"));
    // Of three signs in the time after which it would be killed none is left out.
    assert!(began.elapsed() >= Duration::from_millis(500), "{:?}", began.elapsed());
    let source = gateway.create("press-4");
    assert_eq!(gateway.request("POST", "/v1/ingest/press-4", &source.key, &[], b"1").status, 200);
    manager.hears("WATCHDOG=1");

    signal(gateway.pid(), libc::SIGHUP);
    manager.hears("RELOADING=1");
    let now = manager.hears("MONOTONIC_USEC=");
    assert!(now["MONOTONIC_USEC=".len()..].parse::<u64>().is_ok_and(|now| now > 0), "{now}");
    manager.hears("READY=1");
    manager.hears("WATCHDOG=1");

    gateway.terminate();
    manager.hears("STOPPING=1");
    let within = manager.hears("EXTEND_TIMEOUT_USEC=");
    let within: u64 = within["EXTEND_TIMEOUT_USEC=".len()..].parse().expect("a number");
    assert!((3_000_000..=30_000_000).contains(&within), "the drain's time and a little more: {within}");
    assert!(gateway.wait().status.success());
    assert!(manager.hears_within("READY=1", Duration::ZERO).is_none(), "it is over");
}

/// A service manager that waits for it would end a gateway whose NATS comes up later than it.
#[test]
fn a_start_that_waits_asks_for_more_time_and_is_not_ready() {
    let dir = scratch();
    let mut manager = Manager::listen(dir.path());
    // It refuses connections, and is nobody else's meanwhile.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("nats://{}", taken.local_addr().expect("its address"));
    let setup = Manager::setup(dir.path(), Duration::from_millis(600));
    let mut child = setup.set("log.backend", "jetstream").set("nats.servers", url).spawn();
    (0..4).for_each(|_| _ = manager.hears("EXTEND_TIMEOUT_USEC="));
    manager.forget();
    signal(child.id(), libc::SIGTERM);
    manager.hears("STOPPING=1");
    let ended = crate::common::wait_for("the end", || child.try_wait().expect("our child"));
    assert!(ended.success(), "{ended}");
}

/// It hangs, as far as anybody can tell.
#[test]
fn a_gateway_that_does_not_run_gives_no_sign_of_life() {
    let dir = scratch();
    let mut manager = Manager::listen(dir.path());
    let gateway = Manager::setup(dir.path(), Duration::from_millis(300)).start();
    manager.hears("READY=1");
    manager.hears("WATCHDOG=1");
    signal(gateway.pid(), libc::SIGSTOP);
    manager.forget();
    let sign = manager.hears_within("WATCHDOG=1", Duration::from_secs(1));
    signal(gateway.pid(), libc::SIGCONT);
    assert!(sign.is_none());
    manager.hears("WATCHDOG=1");
    gateway.stop();
}

#[test]
fn without_a_service_manager_nothing_is_said() {
    let dir = scratch();
    let gateway =
        Setup::embedded_on(dir.path()).with_env("NOTIFY_SOCKET", "").with_env("WATCHDOG_USEC", "1").start();
    let source = gateway.create("press-4");
    assert_eq!(gateway.request("POST", "/v1/ingest/press-4", &source.key, &[], b"1").status, 200);
    let exit = gateway.stop();
    assert!(!exit.output.contains("service manager"), "{}", exit.output);
}
