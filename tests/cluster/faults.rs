//! What an ack promises in a cluster, under the worst: two gateways in front of three nats-servers, of which
//! one or the other is killed or cut off again and again while clients publish and move on to whichever
//! gateway is there. In the end every message that was acknowledged is in storage, and none is there twice.

use std::collections::HashSet;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::common::load::{Ledger, number, publish_until_closed};
use crate::common::servers::Servers;
use crate::common::wire::{Version, Wire};
use crate::common::{Gateway, Setup, Source, kept, scratch, wait_for};

/// How long a fault lasts.
const FAULT: Duration = Duration::from_millis(1500);

/// Two gateways, and clients that publish through them all the time.
struct Stage {
    dirs: [tempfile::TempDir; 2],
    setups: [Setup; 2],
    gateways: [Option<Gateway>; 2],
    /// Where clients find them.
    there: Arc<Mutex<[Option<SocketAddr>; 2]>>,
    source: Source,
    ledger: Arc<Ledger>,
    done: Arc<AtomicBool>,
    senders: Vec<JoinHandle<Vec<u64>>>,
}

impl Stage {
    fn set(servers: &Servers) -> Self {
        let dirs = [scratch(), scratch()];
        let setup = |dir: &Path| {
            Setup::on(dir)
                .set("log.backend", "jetstream")
                .set("nats.servers", serde_json::to_string(&servers.urls()).expect("JSON"))
                .set("nats.stream.replicas", 3)
        };
        let setups = [setup(dirs[0].path()), setup(dirs[1].path())];
        let gateways = [Some(setups[0].start()), Some(setups[1].start())];
        let there = gateways.each_ref().map(|gateway| gateway.as_ref().map(|gateway| gateway.mqtt));
        let source = gateways[0].as_ref().expect("started").create("press-4");
        // The cluster's first gateway has made the admin key for all.
        let admin_key = |dir: &tempfile::TempDir| dir.path().join("admin.key");
        std::fs::copy(admin_key(&dirs[0]), admin_key(&dirs[1])).expect("the admin key is there");
        let mut stage = Self {
            dirs,
            setups,
            gateways,
            there: Arc::new(Mutex::new(there)),
            source,
            ledger: Arc::default(),
            done: Arc::default(),
            senders: Vec::new(),
        };
        for (nth, (version, window)) in
            [(Version::V311, 1), (Version::V311, 50), (Version::V5, 10), (Version::V5, 200)]
                .into_iter()
                .enumerate()
        {
            let sender = stage.sender(nth, version, window);
            stage.senders.push(sender);
        }
        stage.flows();
        stage
    }

    /// A client that goes on with the next gateway when its own has gone.
    fn sender(&self, nth: usize, version: Version, window: u16) -> JoinHandle<Vec<u64>> {
        let (there, done, ledger) = (self.there.clone(), self.done.clone(), self.ledger.clone());
        let key = self.source.key.clone();
        std::thread::spawn(move || {
            let mut acked = Vec::new();
            let mut next = nth;
            while !done.load(Ordering::Relaxed) {
                next += 1;
                let addr = there.lock().expect("no holder panics")[next % 2];
                let Some(Ok(socket)) = addr.map(TcpStream::connect) else {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                };
                acked.extend(publish_until_closed(Wire::over(socket), &key, &ledger, version, window).acked);
            }
            acked
        })
    }

    /// Waits until messages are acknowledged that were sent after this was called.
    fn flows(&self) {
        let goal = self.ledger.acked() + 1_000;
        wait_for("messages to be acknowledged", || (self.ledger.acked() > goal).then_some(()));
    }

    fn kill(&mut self, gateway: usize) {
        self.there.lock().expect("no holder panics")[gateway] = None;
        self.gateways[gateway].take().expect("it runs").kill();
    }

    fn restart(&mut self, gateway: usize) {
        let started = self.setups[gateway].start();
        self.there.lock().expect("no holder panics")[gateway] = Some(started.mqtt);
        self.gateways[gateway] = Some(started);
    }

    /// Ends the load, lets storage catch up, and compares what was acknowledged with what each gateway has
    /// stored.
    fn judge(mut self) {
        self.done.store(true, Ordering::Relaxed);
        *self.there.lock().expect("no holder panics") = [None, None];
        // The drain closes the clients' connections. What one has let in at its end the other is to store.
        self.gateways[0].take().expect("it runs").stop();
        self.gateways[1].take().expect("it runs").stop();
        let acked: Vec<u64> =
            self.senders.drain(..).flat_map(|sender| sender.join().expect("a sender")).collect();
        let stored = [0, 1].map(|gateway| {
            self.restart(gateway);
            let started = self.gateways[gateway].take().expect("it runs");
            started.settle();
            started.stop();
            kept::in_storage(self.dirs[gateway].path())
        });
        eprintln!("acknowledged {}, stored {} and {}", acked.len(), stored[0].len(), stored[1].len());
        for stored in &stored {
            let numbers: HashSet<u64> = stored.iter().map(|record| number(&record.payload)).collect();
            assert_eq!(numbers.len(), stored.len(), "no message is stored twice");
            let lost: Vec<_> = acked.iter().filter(|n| !numbers.contains(n)).collect();
            assert!(lost.is_empty(), "{} acknowledged and not stored: {lost:?}", lost.len());
        }
        assert!(stored[0] == stored[1], "both gateways have stored the same");
    }
}

#[test]
fn what_was_acknowledged_survives_the_end_of_any_gateway_and_any_server() {
    let mut servers = Servers::start();
    let mut stage = Stage::set(&servers);
    for round in 0..2 {
        for gateway in [0, 1] {
            stage.kill(gateway);
            stage.flows();
            stage.restart(gateway);
        }
        let leader = servers.leader_of("headgate");
        for server in [(leader + 1 + round) % 3, leader] {
            servers.kill(server);
            stage.flows();
            std::thread::sleep(FAULT);
            servers.restart(server);
            servers.settle();
            stage.flows();
        }
    }
    stage.judge();
}

#[test]
fn a_server_that_is_cut_off_and_comes_back_costs_nothing_that_was_acknowledged() {
    let servers = Servers::on_hosts();
    let stage = Stage::set(&servers);
    for round in 0..2 {
        // Once a follower, once the leader.
        let server = (servers.leader_of("headgate") + 1 - round) % 3;
        servers.cable(server, false);
        stage.flows();
        std::thread::sleep(FAULT);
        servers.cable(server, true);
        servers.settle();
        stage.flows();
    }
    stage.judge();
}

/// A partial partition: two servers do not reach each other, and everybody else reaches both.
#[test]
fn a_way_between_two_servers_that_is_cut_costs_nothing_that_was_acknowledged() {
    let servers = Servers::on_hosts();
    let stage = Stage::set(&servers);
    for round in 1..3 {
        // The leader and one follower, and then the other one.
        let leader = servers.leader_of("headgate");
        let cut = (leader, (leader + round) % 3);
        servers.way(cut, false);
        // Whether messages are taken meanwhile is up to the servers: one that hears of no leader stands for election again
        // and again, which interrupts the others.
        std::thread::sleep(2 * FAULT);
        servers.way(cut, true);
        servers.settle();
        stage.flows();
    }
    stage.judge();
}
