//! A model test: seeded runs of a session's deliveries, with a real log, router and store. A client acknowledges in any
//! order and loses its connection at any moment; the session is taken over, or its gateway is stopped or killed and
//! started again. `HEADGATE_MODEL_SEED=17` runs only that seed, `HEADGATE_MODEL_SEEDS=2000` so many.
//!
//! | always | |
//! |---|---|
//! | a QoS 1 message | comes at least once; not again once its PUBACK was handled, unless the gateway is killed |
//! | a QoS 2 message | comes once, to a client that recognizes it by its packet identifier |
//! | a packet identifier | is given to no other message before its exchange is over |
//! | in flight | are never more than the client takes |

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::poll_fn;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::time::timeout;

use super::super::codec::MqttVersion;
use super::super::codec::write::PacketForm;
use super::super::delivery::PublishWriter;
use super::super::flights::FlightAck;
use super::super::session::{MqttSession, Subscription};
use super::Outbound;
use crate::config::{Config, Durability, LogConfig};
use crate::consume::subscriber::retained::RetainedStore;
use crate::consume::subscriber::sessions::{FlightOrigin, SessionStore, SessionStoreChange};
use crate::consume::subscriber::{Router, SessionEnds, ShareGroups, Subscribers};
use crate::filter::TopicFilter;
use crate::log::{EmbeddedLog, Log, Section};
use crate::message::{DatasourceId, KeyId, Lease, Offset, RecordFlags, Transport, now_micros};
use crate::observe::metrics::Metrics;
use crate::seeded_random::SeededRandom;
use crate::shares::TenantShares;

/// Seeds of a normal run, and when it ends at the latest.
const SEEDS: u64 = 60;
const NORMAL_RUN_MAX: Duration = Duration::from_secs(20);
const STEPS: usize = 120;
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

/// A packet to the client.
#[derive(Debug, Clone, Copy)]
pub(super) enum ToClient {
    Publish { qos: u8, dup: bool, packet_id: u16, message: u32 },
    Pubrel(u16),
}

/// The packets in what was sent.
pub(super) fn parse(mut bytes: &[u8]) -> Vec<ToClient> {
    let mut packets = Vec::new();
    while let [first, length, body @ ..] = bytes {
        let (body, rest) = body.split_at(usize::from(*length));
        bytes = rest;
        packets.push(if first >> 4 == 6 {
            ToClient::Pubrel(u16::from_be_bytes([body[0], body[1]]))
        } else {
            // A topic of one letter, and a payload of four bytes.
            let qos = first >> 1 & 3;
            let packet_id = if qos > 0 { u16::from_be_bytes([body[3], body[4]]) } else { 0 };
            let payload = &body[body.len() - 4..];
            let message = u32::from_be_bytes(payload.try_into().expect("four bytes"));
            ToClient::Publish { qos, dup: first & 8 != 0, packet_id, message }
        });
    }
    packets
}

/// A gateway's part: the subscribers with their store, which a restart replaces.
pub(in super::super) struct Gateway {
    pub(in super::super) subscribers: Arc<Subscribers>,
    dir: TempDir,
}

impl Gateway {
    /// One that finds `dir`, and the session in it. The router is the log's only listener, and stays.
    fn start(log: &Arc<dyn Log>, router: &Router, dir: TempDir) -> (Self, Option<MqttSession>) {
        let (store, mut stored) = SessionStore::open(dir.path()).expect("opens");
        let retained = RetainedStore::start(dir.path(), log.clone(), |_| ()).expect("starts");
        let shares: Arc<TenantShares> = Arc::default();
        let subscribers = Subscribers {
            log: log.clone(),
            router: router.clone(),
            groups: ShareGroups::local(router.clone(), log.clone(), shares.clone()),
            store,
            session_ends: SessionEnds::default(),
            retained,
            shares,
        };
        (
            Self { subscribers: Arc::new(subscribers), dir },
            stored.sessions.pop().map(MqttSession::from_stored),
        )
    }

    /// What the disk has at this moment.
    fn copy(&self) -> TempDir {
        let copy = tempfile::tempdir().expect("temporary directory");
        for file in std::fs::read_dir(self.dir.path()).expect("readable") {
            let file = file.expect("readable");
            if file.file_name().to_string_lossy().starts_with("sessions.db") {
                std::fs::copy(file.path(), copy.path().join(file.file_name())).expect("copied");
            }
        }
        copy
    }
}

/// What the client remembers.
#[derive(Default)]
struct ModelClient {
    /// QoS 2 messages that it has, by packet identifier, until their PUBREL.
    held: BTreeMap<u16, u32>,
    /// How often each message came, as the application sees it.
    received: BTreeMap<u32, u32>,
    /// What it will acknowledge.
    due: Vec<(u16, FlightAck, u32)>,
    /// PUBCOMPs go at once, in their order.
    pubcomps: VecDeque<u16>,
}

pub(in super::super) struct ModelRun {
    random: SeededRandom,
    log: Arc<dyn Log>,
    pub(in super::super) gateway: Gateway,
    pub(super) outbound: Option<Box<Outbound>>,
    receive_maximum: u16,
    /// The cursor that was last written.
    written: Offset,
    client: ModelClient,
    /// Packets on their way to the client.
    wire: VecDeque<ToClient>,
    /// The QoS of every message.
    messages: Vec<u8>,
    /// QoS 1 messages whose PUBACK was handled, since the last kill.
    done: BTreeSet<u32>,
    _log_dir: TempDir,
}

pub(in super::super) fn press_4() -> DatasourceId {
    DatasourceId::new("press-4").expect("a slug")
}

/// A new subscription.
pub(super) fn subscription(filter: &str, qos: u8) -> Subscription {
    Subscription {
        filter: filter.to_owned(),
        qos,
        no_local: false,
        retain_as_published: false,
        identifier: None,
        from: 0,
        replay: None,
        is_renewed: true,
        metadata: false,
    }
}

impl ModelRun {
    /// A session that stays, and has no subscriptions.
    pub(in super::super) fn bare(seed: u64) -> Self {
        let log_dir = tempfile::tempdir().expect("temporary directory");
        let config = Config::default();
        let log_config = LogConfig { durability: Durability::Os, ..config.log };
        let log = EmbeddedLog::open(log_dir.path(), &log_config, &config.intake).expect("opens");
        let log: Arc<dyn Log> = Arc::new(log);
        let router = Router::start(&log).expect("a thread");
        let dir = tempfile::tempdir().expect("temporary directory");
        let (gateway, _) = Gateway::start(&log, &router, dir);
        let mut run = Self {
            random: SeededRandom(seed),
            log,
            gateway,
            outbound: None,
            receive_maximum: 1,
            written: 0,
            client: ModelClient::default(),
            wire: VecDeque::new(),
            messages: Vec::new(),
            done: BTreeSet::new(),
            _log_dir: log_dir,
        };
        let mut session = MqttSession::new(7, 3600);
        session.stored = true;
        run.connect(session);
        run
    }

    async fn new(seed: u64) -> Self {
        let mut run = Self::bare(seed);
        let outbound = run.outbound.as_mut().expect("connected");
        for (slot, (filter, qos)) in [("a", 2), ("+", 1), ("b", 2)].into_iter().enumerate() {
            let slot_in_session = outbound.session.free_slot();
            assert_eq!(slot_in_session, slot);
            let topics = TopicFilter::new(filter).expect("a filter");
            outbound.subscribe(slot, topics, subscription(filter, qos), None, false);
        }
        let put = SessionStoreChange::PutSession(outbound.session.to_stored(&press_4(), "c"));
        run.gateway.subscribers.store.write(vec![put]).await.expect("written");
        run
    }

    fn connect(&mut self, session: MqttSession) {
        self.written = 0;
        self.receive_maximum = [1, 3, 10, 100][self.random.below(4)];
        let form = PacketForm { version: MqttVersion::V311, reasons: true, packet_bytes_max: u32::MAX };
        self.outbound = Some(Box::new(Outbound::new(
            self.gateway.subscribers.clone(),
            Arc::new(Metrics::new()),
            press_4(),
            session,
            PublishWriter::new(form, 1, false, false, 0),
            self.receive_maximum,
        )));
    }

    /// The connection ends: what is on its way is lost.
    pub(super) fn disconnect(&mut self) -> MqttSession {
        self.wire.clear();
        self.client.due.clear();
        self.client.pubcomps.clear();
        self.outbound.take().expect("connected").into_session()
    }

    async fn append(&mut self) {
        for _ in 0..=self.random.below(3) {
            let mut section =
                Section::new(press_4(), KeyId([1; 6]), Lease::new(), Transport::Mqtt, 0, now_micros());
            for _ in 0..=self.random.below(8) {
                let payload = u32::try_from(self.messages.len()).expect("few").to_be_bytes();
                let (topic, published) = (["a", "b", "c"][self.random.below(3)], 1 + self.random.below(2));
                let published = u8::try_from(published).expect("1 or 2");
                self.messages.push(published.min(if topic == "c" { 1 } else { 2 }));
                section.push(topic, &payload, "", &[], RecordFlags::of_mqtt_qos(published));
            }
            let appended = self.log.append(vec![section], Instant::now() + DEADLINE);
            appended.await.expect("an answer").expect("appended");
        }
    }

    /// Appends one message to `a`.
    pub(super) async fn publish(&self, qos: u8) {
        let mut section =
            Section::new(press_4(), KeyId([1; 6]), Lease::new(), Transport::Mqtt, 0, now_micros());
        section.push("a", &[0; 4], "", &[], RecordFlags::of_mqtt_qos(qos));
        let appended = self.log.append(vec![section], Instant::now() + DEADLINE);
        appended.await.expect("an answer").expect("appended");
    }

    /// The gateway sends what it may.
    pub(super) async fn send(&mut self, wait: Duration) {
        let outbound = self.outbound.as_mut().expect("connected");
        let mut out = Vec::new();
        let filling = poll_fn(|cx| outbound.poll_fill(0, &mut out, cx));
        if let Ok(error) = timeout(wait, filling).await {
            panic!("{error}");
        }
        assert!(outbound.session.flights.len() <= 100, "{}", outbound.session.flights.len());
        self.wire.extend(parse(&out));
    }

    /// The client takes some of what is on its way.
    fn take(&mut self, count: usize) {
        for packet in self.wire.drain(..count.min(self.wire.len())) {
            let client = &mut self.client;
            match packet {
                ToClient::Publish { qos: 1, message, packet_id, dup } => {
                    assert_eq!(self.messages[message as usize], 1);
                    assert!(!self.done.contains(&message), "{message} comes again");
                    assert!(dup || !client.held.contains_key(&packet_id), "{packet_id} is in use");
                    *client.received.entry(message).or_default() += 1;
                    client.due.push((packet_id, FlightAck::Puback, message));
                }
                ToClient::Publish { message, packet_id, dup, .. } => {
                    assert_eq!(self.messages[message as usize], 2);
                    match client.held.insert(packet_id, message) {
                        Some(before) => assert!(dup && before == message, "{packet_id} is in use"),
                        None => *client.received.entry(message).or_default() += 1,
                    }
                    assert_eq!(client.received[&message], 1, "{message} comes again");
                    client.due.push((packet_id, FlightAck::Pubrec { is_refusal: false }, message));
                }
                ToClient::Pubrel(packet_id) => {
                    client.held.remove(&packet_id);
                    client.pubcomps.push_back(packet_id);
                }
            }
        }
    }

    /// The gateway handles some acknowledgements.
    fn acknowledge(&mut self, count: usize) {
        let outbound = self.outbound.as_mut().expect("connected");
        for _ in 0..count.min(self.client.due.len()) {
            // Mostly a late one, so that some stay for long.
            let late = self.client.due.len() - 1 - self.random.below(self.client.due.len().min(3));
            let (packet_id, ack, message) = self.client.due.remove(late);
            assert_eq!(outbound.acknowledge(packet_id, ack), Ok(true), "{packet_id} {ack:?}");
            if ack == FlightAck::Puback {
                self.done.insert(message);
            }
        }
        for packet_id in self.client.pubcomps.drain(..) {
            // An exchange that ended before a kill is unknown.
            outbound.acknowledge(packet_id, FlightAck::Pubcomp).expect("in order");
        }
    }

    /// What the keeper of the sessions does every second.
    async fn tick(&mut self) {
        let outbound = self.outbound.as_mut().expect("connected");
        let routed = self.gateway.subscribers.router.routed_offset();
        let store = &self.gateway.subscribers.store;
        outbound.mailbox().write_cursor(routed, &mut self.written, |cursor| {
            drop(store.write(vec![SessionStoreChange::MoveCursor { uid: 7, cursor }]));
        });
        poll_fn(|cx| {
            outbound.poll_asked(cx);
            std::task::Poll::Ready(())
        })
        .await;
    }

    async fn stop_and_start(&mut self) {
        let session = self.disconnect();
        let store = &self.gateway.subscribers.store;
        store.write(vec![session.moved()]).await.expect("written");
        store.close().await;
        // The thread copies the write-ahead log into the database at its end.
        while self.gateway.dir.path().join("sessions.db-wal").exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.restart(self.gateway.copy());
    }

    fn kill_and_start(&mut self) {
        let copy = self.gateway.copy();
        // Nothing that it does from here on is in the copy.
        drop(self.disconnect());
        self.done.clear();
        self.restart(copy);
    }

    fn restart(&mut self, dir: TempDir) {
        let router = self.gateway.subscribers.router.clone();
        let (gateway, session) = Gateway::start(&self.log, &router, dir);
        self.gateway = gateway;
        self.connect(session.expect("it was stored"));
    }

    async fn run(mut self) {
        for _ in 0..STEPS {
            match self.random.below(100) {
                0..20 => self.append().await,
                20..50 => self.send(Duration::from_millis(3)).await,
                50..70 => {
                    let count = self.random.below(30);
                    self.take(count);
                }
                70..88 => {
                    let count = self.random.below(20);
                    self.acknowledge(count);
                }
                88..92 => self.tick().await,
                92..96 => {
                    let session = self.disconnect();
                    self.connect(session);
                }
                96..98 => self.stop_and_start().await,
                _ => self.kill_and_start(),
            }
        }
        while self.receive_maximum < 10 {
            // A sync for each message takes long on a busy machine.
            let session = self.disconnect();
            self.connect(session);
        }
        let missing = |run: &Self| run.messages.len() - run.client.received.len() + run.client.held.len();
        let (mut moved_at, mut before) = (Instant::now(), usize::MAX);
        while missing(&self) > 0 {
            if missing(&self) < before {
                (moved_at, before) = (Instant::now(), missing(&self));
            }
            assert!(moved_at.elapsed() < DEADLINE, "{before} messages are missing: {:?}", self.client.held);
            self.send(Duration::from_millis(5)).await;
            self.take(usize::MAX);
            self.acknowledge(usize::MAX);
        }
        assert!(
            self.client
                .received
                .iter()
                .all(|(message, times)| self.messages[*message as usize] == 1 || *times == 1)
        );
    }
}

#[tokio::test]
async fn deliveries_keep_their_promises_whatever_is_mixed() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let (only, seeds) = (number("HEADGATE_MODEL_SEED"), number("HEADGATE_MODEL_SEEDS"));
    let range = only.map_or(0..seeds.unwrap_or(SEEDS), |only| only..only + 1);
    let begun = Instant::now();
    for seed in range {
        if seeds.is_none() && begun.elapsed() > NORMAL_RUN_MAX {
            break;
        }
        eprintln!("HEADGATE_MODEL_SEED={seed}");
        ModelRun::new(seed).await.run().await;
    }
}

/// Such a record was acknowledged to JetStream, and lost if another gateway had taken the session meanwhile.
#[tokio::test]
async fn a_record_that_waits_for_the_store_goes_back_to_a_group_of_other_gateways() {
    let mut run = ModelRun::new(1).await;
    let outbound = run.outbound.as_mut().expect("connected");
    let mut out = Vec::new();
    outbound.packets.begin(&out);
    // This gateway keeps no group of that subscription.
    outbound.session.flights.push(5, FlightOrigin::Shared, 2);
    outbound.packets.take_for_good(9, 5);
    out.push(0);
    outbound.hold_packets(&mut out);
    assert!(out.is_empty() && !outbound.session.flights.is_empty());
    assert_eq!(run.disconnect().flights.all_sent(), []);
}
