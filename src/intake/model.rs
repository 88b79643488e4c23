//! A model test: seeded runs of intake, log, window and storage, with everything mixed that a client may mix,
//! against what was promised. The same seed gives the same run. `HEADGATE_MODEL_SEEDS=5000` tries more seeds
//! than the normal run, and `HEADGATE_MODEL_SEED=17` only that one.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::auth::{Actor, Registry, Scope, Scopes};
use crate::config::{Config, Durability, LogConfig};
use crate::consume::storage::StorageConsumer;
use crate::log::EmbeddedLog;
use crate::message::{KeyId, Offset, RecordFlags, RecordRef};

const TENANTS: [&str; 2] = ["press-4", "oven"];
/// One connection for the first tenant would leave nothing to overtake.
const CONNECTIONS: [usize; 3] = [0, 0, 1];
const STEPS: usize = 40;
const SEEDS: u64 = 300;
/// The normal run ends after this time, however few seeds the machine has tried by then.
const NORMAL_RUN_MAX: Duration = Duration::from_secs(15);
const SCHEMAS: &str = r##"{"last_version":1,"rules":[{"filter":"#","version":1,"schema":{"properties":{"n":{"type":"integer"}}}}]}"##;

/// SplitMix64: small, and the same on every machine.
struct SeededRandom(u64);

impl SeededRandom {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % end as u64).expect("below a usize")
    }

    fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// What the model knows of a message, which is named by the number in its payload.
#[derive(Clone)]
struct ModelMessage {
    tenant: usize,
    connection: usize,
    id: Option<String>,
    /// The exchange, and how many the packet identifier has had before.
    exchange: Option<(Exchange, u32)>,
    good: bool,
    /// How often it was sent.
    attempts: u32,
}

impl ModelMessage {
    /// Whether the two may be taken for one another.
    fn is_same(&self, other: &Self) -> bool {
        let same_id = self.tenant == other.tenant && self.id.is_some() && self.id == other.id;
        same_id || (self.exchange.is_some() && self.exchange == other.exchange)
    }
}

/// What a client believes of a packet identifier.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ClientExchange {
    /// It waits for the answer to this message.
    Sent(u64),
    /// It has lost its connection while it waited, and sends this message again.
    Unanswered(u64),
    Open,
}

/// A draft on its way into the log, and number, origin and place of each of its messages.
struct PendingDraft {
    admitted: AdmittedDraft,
    messages: Vec<(u64, usize, usize)>,
}

#[derive(Default)]
struct ModelConnection {
    /// By packet identifier; others are free.
    exchanges: BTreeMap<u16, ClientExchange>,
    /// How many exchanges each packet identifier has had.
    rounds: HashMap<u16, u32>,
    /// Drafts that are not answered.
    pending: VecDeque<PendingDraft>,
}

impl ModelConnection {
    fn free(&mut self, packet_id: u16) {
        self.exchanges.remove(&packet_id);
        *self.rounds.entry(packet_id).or_default() += 1;
    }
}

/// The gateway between two starts.
struct ModelGateway {
    intake: Intake,
    log: Arc<dyn Log>,
    storage: StorageConsumer,
}

impl ModelGateway {
    fn open(dir: &Path) -> Self {
        let mut config = Config::default();
        config.log = LogConfig { durability: Durability::Os, segment_bytes: 16 << 10, ..config.log };
        let registry = Arc::new(Registry::open(dir).expect("opens"));
        let log = EmbeddedLog::open(dir, &config.log, &config.intake).expect("opens");
        let log: Arc<dyn Log> = Arc::new(log);
        let storage = StorageConsumer::start(dir, &config.storage, log.clone()).expect("starts");
        let metrics = Arc::new(Metrics::new());
        let intake = Intake::new(Authorizer::new(registry), log.clone(), metrics, &config.intake);
        Self { intake, log, storage }
    }
}

/// A run of one seed.
struct ModelRun {
    random: SeededRandom,
    dir: tempfile::TempDir,
    gateway: Option<ModelGateway>,
    /// The ids and secrets of the live keys of each tenant, and that of an admin.
    keys: [Vec<(KeyId, String)>; 2],
    admins: Vec<String>,
    /// The end of the log when the death of a key was answered.
    dead: HashMap<KeyId, Offset>,
    connections: [ModelConnection; CONNECTIONS.len()],
    sent: Vec<ModelMessage>,
    /// Acknowledged messages: number, offset, and whether it was one that was kept before.
    acknowledged: Vec<(u64, Offset, bool)>,
}

impl ModelRun {
    fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let gateway = ModelGateway::open(dir.path());
        let registry = gateway.intake.authorizer().registry().clone();
        let (ingest, admin) = (Scopes::from_slice(&[Scope::Ingest]), Scopes::from_slice(&[Scope::Admin]));
        let mut keys = [Vec::new(), Vec::new()];
        let mut admins = Vec::new();
        for (tenant, keys) in TENANTS.iter().zip(&mut keys) {
            let (datasource, key, secret) =
                registry.create_datasource(&Actor::SYSTEM, None, tenant, ingest).expect("created");
            keys.push((key.id, secret.expose().to_owned()));
            let (key, secret) =
                registry.create_key(&Actor::SYSTEM, &datasource.id, "", ingest, None).expect("created");
            keys.push((key.id, secret.expose().to_owned()));
            let (_, secret) =
                registry.create_key(&Actor::SYSTEM, &datasource.id, "", admin, None).expect("created");
            admins.push(secret.expose().to_owned());
        }
        let run = Self {
            random: SeededRandom(seed),
            dir,
            gateway: Some(gateway),
            keys,
            admins,
            dead: HashMap::new(),
            connections: Default::default(),
            sent: Vec::new(),
            acknowledged: Vec::new(),
        };
        (0..TENANTS.len()).for_each(|tenant| run.set_schemas(tenant, Some(SCHEMAS)));
        run
    }

    fn gateway(&self) -> &ModelGateway {
        self.gateway.as_ref().expect("open between restarts")
    }

    fn grant(&self, secret: &str) -> Grant {
        self.gateway().intake.authorizer().identify(secret.as_bytes()).expect("a live key")
    }

    fn set_schemas(&self, tenant: usize, schemas: Option<&str>) {
        let registry = self.gateway().intake.authorizer().registry();
        let datasource = DatasourceId::new(TENANTS[tenant]).expect("slug");
        let set = registry.set_datasource_schemas(&Actor::SYSTEM, &datasource, schemas.map(str::to_owned));
        set.expect("set");
    }

    async fn run(mut self) {
        for _ in 0..STEPS {
            let connection = self.random.below(CONNECTIONS.len());
            match self.random.below(100) {
                0..50 => self.read_and_admit(connection).await,
                50..70 => self.take_answer(connection).await,
                70..82 => self.release(connection).await,
                82..88 => self.end_key(CONNECTIONS[connection]).await,
                88..95 => self.redrive(CONNECTIONS[connection]).await,
                _ => self.restart().await,
            }
        }
        self.take_all_answers().await;
        self.check().await;
        self.restart().await;
        self.check().await;
    }

    /// A read of a socket: messages with and without ids, under two keys, good and bad. A key may die before
    /// they are handed to the log.
    async fn read_and_admit(&mut self, connection: usize) {
        let tenant = CONNECTIONS[connection];
        let mut draft = self.gateway().intake.draft(Transport::Mqtt, 1 + connection as u64);
        draft.end_failed_exchanges();
        let mut places: HashMap<usize, usize> = HashMap::new();
        let mut messages = Vec::new();
        for _ in 0..1 + self.random.below(6) {
            let (number, packet_id) = self.choose_message(connection);
            let message = self.sent[usize::try_from(number).expect("few")].clone();
            let key = self.random.below(2);
            let grant = self.grant(&self.keys[tenant][key].1.clone());
            let quoted = if message.good { "" } else { "\"" };
            let pushed = draft.push(
                &grant,
                None,
                IncomingMessage {
                    topic: "t",
                    payload: format!("{{\"n\": {quoted}{number}{quoted}}}").as_bytes(),
                    content_type: "",
                    properties: &message.id.as_deref().map_or(Vec::new(), |id| {
                        let text = |text: &str| {
                            [&u16::try_from(text.len()).expect("short").to_be_bytes()[..], text.as_bytes()]
                                .concat()
                        };
                        [&[0x26][..], &text(MESSAGE_ID_PROPERTY), &text(id)].concat()
                    }),
                    flags: RecordFlags::default(),
                    message_id: message.id.as_deref(),
                    exchange: message.exchange.map(|(exchange, _)| exchange),
                },
            );
            let origin = match pushed {
                Ok(origin) if message.good => origin,
                Err(Refusal::Quarantined(quarantined)) if !message.good => quarantined.origin,
                other => panic!("{number} {other:?}"),
            };
            if let Some(packet_id) = packet_id {
                self.connections[connection].exchanges.insert(packet_id, ClientExchange::Sent(number));
            }
            let place = places.entry(origin).or_default();
            messages.push((number, origin, *place));
            *place += 1;
        }
        if self.random.percent(10) {
            self.end_key(tenant).await;
        }
        let admitted = self.gateway().intake.admit(draft).await.expect("room");
        self.connections[connection].pending.push_back(PendingDraft { admitted, messages });
    }

    /// The number of the next message, and its packet identifier at QoS 2.
    fn choose_message(&mut self, connection: usize) -> (u64, Option<u16>) {
        let kind = self.random.below(4);
        let packet_id = 1 + u16::try_from(self.random.below(4)).expect("small");
        let state = self.connections[connection].exchanges.get(&packet_id).copied();
        let exchange = match (kind, state) {
            (0, Some(ClientExchange::Unanswered(number))) => {
                self.sent[usize::try_from(number).expect("few")].attempts += 1;
                return (number, Some(packet_id));
            }
            (0, None) => {
                let round = self.connections[connection].rounds.get(&packet_id).copied().unwrap_or_default();
                Some((Exchange { session: 1 + connection as u64, packet_id }, round))
            }
            _ => None,
        };
        self.sent.push(ModelMessage {
            tenant: CONNECTIONS[connection],
            connection,
            id: (kind == 1).then(|| format!("id-{}", self.random.below(25))),
            exchange,
            good: self.random.percent(80),
            attempts: 1,
        });
        (self.sent.len() as u64 - 1, exchange.map(|_| packet_id))
    }

    async fn take_answer(&mut self, connection: usize) {
        let pending = self.connections[connection].pending.pop_front();
        let Some(PendingDraft { admitted, messages }) = pending else { return };
        let outcomes = admitted.await.expect("the disk is sound").outcomes;
        for (number, origin, place) in messages {
            let message = self.sent[usize::try_from(number).expect("few")].clone();
            let client = &mut self.connections[connection];
            let packet_id = message.exchange.map(|(exchange, _)| exchange.packet_id);
            match &outcomes[origin] {
                SectionOutcome::Kept(offsets) => {
                    self.acknowledged.push((number, offsets.nth(place), false));
                }
                SectionOutcome::Duplicate(earlier) => {
                    assert!(message.good, "{number} is in quarantine, where it is no repetition");
                    self.acknowledged.push((number, earlier.first(), true));
                }
                SectionOutcome::KeyDead => {
                    if let Some((exchange, _)) = message.exchange {
                        // As the front does: a start ago the message may have come into the log.
                        drop(self.gateway.as_ref().map(|gateway| gateway.intake.release(&[exchange])));
                        client.free(exchange.packet_id);
                    }
                    continue;
                }
            }
            match packet_id {
                Some(packet_id) if message.good => {
                    client.exchanges.insert(packet_id, ClientExchange::Open);
                }
                // The client was told of quarantine.
                Some(packet_id) => client.free(packet_id),
                None => {}
            }
        }
    }

    async fn take_all_answers(&mut self) {
        for connection in 0..CONNECTIONS.len() {
            while !self.connections[connection].pending.is_empty() {
                self.take_answer(connection).await;
            }
        }
    }

    /// The PUBREL of an open exchange.
    async fn release(&mut self, connection: usize) {
        let open = &self.connections[connection].exchanges;
        let open = open.iter().find(|(_, state)| **state == ClientExchange::Open);
        let Some(packet_id) = open.map(|(packet_id, _)| *packet_id) else { return };
        let exchange = Exchange { session: 1 + connection as u64, packet_id };
        self.gateway().intake.release(&[exchange]).await.expect("released");
        self.connections[connection].free(packet_id);
    }

    /// Revokes a key, and makes another for it.
    async fn end_key(&mut self, tenant: usize) {
        let intake = self.gateway().intake.clone();
        let registry = intake.authorizer().registry();
        let datasource = DatasourceId::new(TENANTS[tenant]).expect("slug");
        let at = self.random.below(2);
        let id = self.keys[tenant][at].0;
        let dead = registry.revoke_key(&Actor::SYSTEM, &datasource, id).expect("revoked").expect("was live");
        intake.settle(&[dead], Instant::now()).await;
        self.dead.insert(id, self.gateway().log.next_offset());
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let (key, secret) =
            registry.create_key(&Actor::SYSTEM, &datasource, "", scopes, None).expect("created");
        self.keys[tenant][at] = (key.id, secret.expose().to_owned());
    }

    /// Sends some of what is in quarantine through intake again.
    async fn redrive(&mut self, tenant: usize) {
        self.set_schemas(tenant, None);
        let datasource =
            self.gateway().intake.authorizer().registry().datasource(TENANTS[tenant]).expect("there");
        let mut draft = self.gateway().intake.draft(Transport::Http, 0);
        let admin = self.grant(&self.admins[tenant]);
        let batches = batches_from(&*self.gateway().log, 0);
        for record in batches.iter().flat_map(|batch| batch.records()) {
            let parked = record.flags.contains(RecordFlags::QUARANTINED);
            if parked && record.datasource == TENANTS[tenant] && self.random.percent(30) {
                let redriven = draft.redrive(&admin, &datasource, &record).expect("may");
                assert!(matches!(redriven, RedriveOutcome::Added));
            }
        }
        if !draft.is_empty() {
            self.gateway().intake.admit(draft).await.expect("room").await.expect("kept");
        }
        self.set_schemas(tenant, Some(SCHEMAS));
    }

    /// Stops and starts the gateway. Clients may lose the answers that they wait for.
    async fn restart(&mut self) {
        if self.random.percent(50) {
            self.take_all_answers().await;
        }
        for client in &mut self.connections {
            client.pending.clear();
            for state in client.exchanges.values_mut() {
                if let ClientExchange::Sent(number) = *state {
                    *state = ClientExchange::Unanswered(number);
                }
            }
        }
        let ModelGateway { intake, log, storage } = self.gateway.take().expect("open");
        log.close().await;
        storage.stop(Instant::now() + Duration::from_secs(10)).await;
        drop((intake, log, storage));
        self.gateway = Some(ModelGateway::open(self.dir.path()));
    }

    async fn check(&mut self) {
        let log = self.gateway().log.clone();
        let batches = batches_from(&*log, 0);
        let records: Vec<RecordRef<'_>> = batches.iter().flat_map(|batch| batch.records()).collect();
        let offsets: Vec<Offset> = records.iter().map(|record| record.offset).collect();
        assert_eq!(offsets, (0..log.next_offset()).collect::<Vec<_>>(), "no offset is missing");
        let at = |offset: Offset| &records[usize::try_from(offset).expect("few")];
        let message_of =
            |record: &RecordRef<'_>| &self.sent[usize::try_from(number_of(record)).expect("few")];
        let is_parked = |record: &RecordRef<'_>| record.flags.contains(RecordFlags::QUARANTINED);
        let is_redriven = |record: &RecordRef<'_>| record.flags.contains(RecordFlags::REDRIVEN);

        for &(number, offset, before) in &self.acknowledged {
            let (message, record) = (&self.sent[usize::try_from(number).expect("few")], at(offset));
            match before {
                false => assert_eq!((number_of(record), is_parked(record)), (number, !message.good)),
                true => assert!(
                    message.is_same(message_of(record)) && !is_parked(record),
                    "{number} was taken for a repetition of {}",
                    number_of(record)
                ),
            }
        }
        let mut newest = [None; CONNECTIONS.len()];
        let mut once = HashSet::new();
        for record in &records {
            let (number, message) = (number_of(record), message_of(record));
            assert_eq!(record.datasource, TENANTS[message.tenant]);
            if !is_parked(record) {
                let id = message.id.as_ref().map(|id| (message.tenant, id));
                assert!(id.is_none() || once.insert((id, None)), "{id:?} is there twice");
                let exchange =
                    message.exchange.map(|(exchange, round)| (exchange.session, exchange.packet_id, round));
                // A message in quarantine has no exchange.
                let once_in_exchange =
                    is_redriven(record) || exchange.is_none() || once.insert((None, exchange));
                assert!(once_in_exchange, "{exchange:?} is there twice");
            }
            if !is_redriven(record) {
                let end = self.dead.get(&record.key_id).copied();
                assert!(end.is_none_or(|end| record.offset < end), "{number} came after its key's end");
                if message.attempts == 1 {
                    let before = newest[message.connection].replace(number);
                    assert!(before < Some(number), "{number} came after {before:?}");
                }
            }
        }
        for _ in 0..5 {
            let from = self.random.below(records.len() + 1) as Offset;
            let read = batches_from(&*log, from);
            let read = read.iter().flat_map(|batch| batch.records()).filter(|record| record.offset >= from);
            let read: Vec<_> = read.map(|record| (record.offset, number_of(&record))).collect();
            let expected = records.iter().filter(|record| record.offset >= from);
            assert_eq!(read, expected.map(|r| (r.offset, number_of(r))).collect::<Vec<_>>(), "from {from}");
        }
        self.gateway().storage.wait_stored(log.next_offset()).await;
        let stored = rusqlite::Connection::open(self.dir.path().join("records.db")).expect("opens");
        let payloads = |table: &str| {
            let sql = format!("SELECT \"offset\", payload FROM {table} ORDER BY 1");
            let mut rows = stored.prepare(&sql).expect("a view");
            let row = |row: &rusqlite::Row<'_>| Ok((row.get::<_, i64>(0)?.cast_unsigned(), row.get(1)?));
            let rows = rows.query_map([], row).expect("rows");
            rows.collect::<Result<Vec<(Offset, String)>, _>>().expect("rows")
        };
        let logged = |parked: bool| {
            let records = records.iter().filter(|record| is_parked(record) == parked);
            let row = |r: &RecordRef<'_>| (r.offset, String::from_utf8_lossy(r.payload).into_owned());
            records.map(row).collect::<Vec<_>>()
        };
        assert_eq!(payloads("records"), logged(false));
        assert_eq!(payloads("quarantine"), logged(true));
    }
}

/// Everything in a log from an offset on.
fn batches_from(log: &dyn Log, mut from: Offset) -> Vec<crate::log::Batch> {
    let mut all = Vec::new();
    while from < log.next_offset() {
        let batches = log.read(from, 4 << 10).expect("readable");
        from = batches.last().expect("there is more").next_offset();
        all.extend(batches);
    }
    all
}

/// The number in a payload.
fn number_of(record: &RecordRef<'_>) -> u64 {
    let text = std::str::from_utf8(record.payload).expect("text");
    text.trim_matches(|c: char| !c.is_ascii_digit()).parse().expect("a number")
}

#[test]
fn what_was_promised_holds_whatever_is_mixed() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let (only, seeds) = (number("HEADGATE_MODEL_SEED"), number("HEADGATE_MODEL_SEEDS"));
    let began = Instant::now();
    let range = only.map_or(0..seeds.unwrap_or(SEEDS), |only| only..only + 1);
    let next = AtomicU64::new(range.start);
    // A run mostly waits for the disk, so several go beside each other.
    let runner = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= range.end || (seeds.is_none() && began.elapsed() > NORMAL_RUN_MAX) {
                return;
            }
            let run = std::panic::AssertUnwindSafe(|| runtime.block_on(ModelRun::new(seed).run()));
            if let Err(panic) = std::panic::catch_unwind(run) {
                next.store(range.end, Ordering::Relaxed);
                eprintln!("HEADGATE_MODEL_SEED={seed} runs this again");
                std::panic::resume_unwind(panic);
            }
        }
    };
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(runner))));
}
