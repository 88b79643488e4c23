//! A run of one seed: the gateway, its clients, and the steps that they take.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::check::RunOutcome;
use super::client::{
    ClientExchange, DraftedMessage, MessageNumber, ModelConnection, ModelMessage, PendingDraft, PushedAs,
};
use crate::auth::{Actor, Authorizer, Grant, Registry, Scope, Scopes};
use crate::config::{Config, LogConfig};
use crate::consume::storage::StorageSinks;
use crate::intake::{Draft, Exchange, IncomingMessage, Intake, MESSAGE_ID_PROPERTY, RedriveOutcome, Refusal};
use crate::log::power_loss_disk::PowerLossDisk;
use crate::log::{Batch, Log, SectionOutcome};
use crate::message::{DatasourceId, KeyId, Offset, RecordFlags, RecordRef, TimeMicros, Transport};
use crate::observe::metrics::Metrics;
use crate::seeded_random::SeededRandom;
use crate::time::Rfc3339;
use crate::values::EVENT_TIME_PROPERTY;

pub(super) const TENANTS: [&str; 2] = ["press-4", "oven"];
/// One connection for the first tenant would leave nothing to overtake.
pub(super) const CONNECTIONS: [usize; 3] = [0, 0, 1];
const STEPS: usize = 40;
/// The connections of the first tenant can have more.
const EXCHANGES_MAX: usize = 5;
const PACKET_IDS: u16 = 4;
const SCHEMAS: &str = r##"{"last_version":1,"rules":[{"filter":"#","version":1,"schema":{"properties":{"n":{"type":"integer"}}}}]}"##;
/// No message of a run is so small.
const TIGHT_LIMITS: &str = r#"{"payload_bytes":1}"#;

/// What the datasource of a tenant asks of messages at a time.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TenantRules {
    Schema,
    Nothing,
    /// Everything is over a limit.
    Tight,
}

/// The gateway between two starts.
pub(super) struct ModelGateway {
    pub(super) intake: Intake,
    pub(super) log: Arc<dyn Log>,
    pub(super) storage: StorageSinks,
}

impl ModelGateway {
    pub(super) fn open(dir: &Path, disk: &Arc<PowerLossDisk>) -> Self {
        let mut config = Config::default();
        config.log = LogConfig { segment_bytes: 16 << 10, ..config.log };
        config.intake.exchanges_per_datasource_max = EXCHANGES_MAX;
        config.intake.hold_back_ms_max = 0;
        let registry = Arc::new(Registry::open(dir).expect("opens"));
        let log: Arc<dyn Log> = Arc::new(disk.open_log(dir, &config.log, &config.intake).expect("opens"));
        let storage =
            StorageSinks::start(dir, &config.storage, &log, false).expect("starts").expect("has a sink");
        let metrics = Arc::new(Metrics::new());
        let intake = Intake::new(Authorizer::new(registry), log.clone(), metrics, &config.intake);
        Self { intake, log, storage }
    }
}

/// An acknowledged message.
pub(super) struct Acknowledged {
    pub(super) number: MessageNumber,
    pub(super) offset: Offset,
    /// As one that was kept before.
    pub(super) as_repetition: bool,
    pub(super) quarantined: bool,
}

/// A run.
pub(super) struct ModelRun {
    pub(super) may_crash: bool,
    pub(super) random: SeededRandom,
    pub(super) dir: tempfile::TempDir,
    pub(super) disk: Arc<PowerLossDisk>,
    pub(super) gateway: Option<ModelGateway>,
    /// The clock that messages are received by. It jumps.
    pub(super) clock: TimeMicros,
    rules: [TenantRules; TENANTS.len()],
    /// The ids and secrets of the live keys of each tenant, and that of an admin.
    keys: [Vec<(KeyId, String)>; TENANTS.len()],
    admins: Vec<String>,
    /// The end of the log when the death of a key was answered.
    pub(super) dead: HashMap<KeyId, Offset>,
    pub(super) connections: [ModelConnection; CONNECTIONS.len()],
    pub(super) sent: Vec<ModelMessage>,
    pub(super) acknowledged: Vec<Acknowledged>,
    /// Messages that were refused because their id belongs to the record at the offset.
    pub(super) conflicts: Vec<(MessageNumber, Offset)>,
    /// Offsets in quarantine that were found to be let in already.
    pub(super) superseded: HashSet<Offset>,
}

impl ModelRun {
    /// A run of a seed, with crashes or without.
    pub(super) fn new(seed: u64, may_crash: bool) -> Self {
        // In memory, if the machine has such a place: the model of the disk says what is durable.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let dir = dir.expect("temporary directory");
        let disk = Arc::new(PowerLossDisk::default());
        let gateway = ModelGateway::open(dir.path(), &disk);
        let registry = gateway.intake.authorizer().registry().clone();
        let (ingest, admin) = (Scopes::from_slice(&[Scope::Ingest]), Scopes::from_slice(&[Scope::Admin]));
        let mut keys = [Vec::new(), Vec::new()];
        let mut admins = Vec::new();
        for (tenant, keys) in TENANTS.iter().zip(&mut keys) {
            let (datasource, key, secret) =
                registry.create_datasource(&Actor::SYSTEM, None, tenant, ingest).expect("created");
            keys.push((key.id, secret.expose().to_owned()));
            let create = |scopes| registry.create_key(&Actor::SYSTEM, &datasource.id, "", scopes, None);
            let (key, secret) = create(ingest).expect("created");
            keys.push((key.id, secret.expose().to_owned()));
            admins.push(create(admin).expect("created").1.expose().to_owned());
        }
        let mut run = Self {
            may_crash,
            random: SeededRandom(seed),
            dir,
            disk,
            gateway: Some(gateway),
            clock: 1_700_000_000_000_000,
            rules: [TenantRules::Nothing; TENANTS.len()],
            keys,
            admins,
            dead: HashMap::new(),
            connections: Default::default(),
            sent: Vec::new(),
            acknowledged: Vec::new(),
            conflicts: Vec::new(),
            superseded: HashSet::new(),
        };
        (0..TENANTS.len()).for_each(|tenant| run.set_rules(tenant, TenantRules::Schema));
        run
    }

    pub(super) fn gateway(&self) -> &ModelGateway {
        self.gateway.as_ref().expect("open between restarts")
    }

    fn grant(&self, secret: &str) -> Grant {
        self.gateway().intake.authorizer().identify(secret.as_bytes()).expect("a live key")
    }

    pub(super) fn message(&mut self, number: MessageNumber) -> &mut ModelMessage {
        &mut self.sent[usize::try_from(number).expect("few")]
    }

    fn set_rules(&mut self, tenant: usize, rules: TenantRules) {
        if self.rules[tenant] == rules {
            return;
        }
        self.rules[tenant] = rules;
        let registry = self.gateway().intake.authorizer().registry().clone();
        let datasource = DatasourceId::new(TENANTS[tenant]).expect("slug");
        let schemas = (rules == TenantRules::Schema).then(|| SCHEMAS.to_owned());
        registry.set_datasource_schemas(&Actor::SYSTEM, &datasource, schemas).expect("set");
        let limits = (rules == TenantRules::Tight).then(|| TIGHT_LIMITS.to_owned());
        registry.set_datasource_limits(&Actor::SYSTEM, &datasource, limits).expect("set");
    }

    /// Runs all steps. Returns what came of them.
    pub(super) async fn run(mut self) -> RunOutcome {
        for _ in 0..STEPS {
            let connection = self.random.below(CONNECTIONS.len());
            match self.random.below(100) {
                0..46 => self.read_and_admit(connection).await,
                46..65 => self.take_answer(connection).await,
                65..76 => self.release(connection).await,
                76..79 => self.forget_exchange(connection),
                79..83 => self.end_key(CONNECTIONS[connection]).await,
                83..87 => self.redrive(CONNECTIONS[connection]).await,
                87..90 => self.jump_clock(),
                90..94 => self.fill_disk(connection).await,
                94..96 => self.restart().await,
                _ => self.crash(connection).await,
            }
        }
        self.take_all_answers().await;
        self.check().await;
        match self.random.percent(50) {
            true => self.restart().await,
            false => self.crash(0).await,
        }
        self.take_all_answers().await;
        self.check().await
    }

    /// A read of a socket, handed to the log. A key may die in between.
    async fn read_and_admit(&mut self, connection: usize) {
        let tenant = CONNECTIONS[connection];
        if self.random.percent(25) {
            let rules = [TenantRules::Schema, TenantRules::Nothing, TenantRules::Tight];
            let rules = rules[self.random.below(rules.len())];
            self.set_rules(tenant, rules);
        }
        let (draft, messages) = self.draft(connection);
        if self.random.percent(10) {
            self.end_key(tenant).await;
        }
        if !draft.is_empty() {
            let admitted = self.gateway().intake.admit(draft).await.expect("room");
            self.connections[connection].pending.push_back(PendingDraft { admitted, messages });
        }
    }

    /// The draft of a read: messages with and without ids, new and again, under two keys, good and bad.
    pub(super) fn draft(&mut self, connection: usize) -> (Draft, Vec<DraftedMessage>) {
        let tenant = CONNECTIONS[connection];
        let mut draft = self.gateway().intake.draft(Transport::Mqtt, 1 + connection as u64);
        self.clock += 1000;
        draft.received_at = self.clock;
        draft.end_failed_exchanges();
        let mut places: HashMap<usize, usize> = HashMap::new();
        let mut messages = Vec::new();
        for _ in 0..1 + self.random.below(6) {
            let number = self.choose_message(connection);
            let message = self.message(number).clone();
            let key = self.random.below(2);
            let grant = self.grant(&self.keys[tenant][key].1.clone());
            let mut properties = message.id.as_deref().map_or(Vec::new(), message_id_property);
            // Near and far from now, so that it counts or does not.
            if self.random.percent(30) {
                let at = self.clock + i64::try_from(self.random.below(20)).expect("small") * 600_000_000_000;
                properties.extend(user_property(EVENT_TIME_PROPERTY, &Rfc3339(at).to_string()));
            }
            let pushed = draft.push(
                &grant,
                None,
                IncomingMessage {
                    topic: "t",
                    payload: message.payload(number).as_bytes(),
                    content_type: "",
                    properties: &properties,
                    flags: RecordFlags::default(),
                    message_id: message.id.as_deref(),
                    exchange: message.exchange.map(|(exchange, _)| exchange),
                },
            );
            let (origin, pushed_as) = match (pushed.map_err(|refusal| *refusal), self.rules[tenant]) {
                (Ok(origin), TenantRules::Nothing) => (origin, PushedAs::LetIn),
                (Ok(origin), TenantRules::Schema) if message.good => (origin, PushedAs::LetIn),
                (Err(Refusal::Quarantined(quarantined)), TenantRules::Schema) if !message.good => {
                    (quarantined.origin, PushedAs::Quarantined)
                }
                (Err(Refusal::Asked(asked)), TenantRules::Tight) => (asked.origin, PushedAs::Asked),
                (Err(Refusal::Limited(_)), TenantRules::Tight) => {
                    self.message(number).refused = true;
                    continue;
                }
                (other, _) => panic!("{number} {other:?}"),
            };
            let client = &mut self.connections[connection];
            if let Some((exchange, _)) = message.exchange {
                client.exchanges.insert(exchange.packet_id, ClientExchange::Sent(number));
                client.maybe_open.insert(exchange.packet_id);
            }
            let place = places.entry(origin).or_default();
            let of_tenant = self.connections.iter().zip(CONNECTIONS).filter(|(_, of)| *of == tenant);
            let maybe_open = of_tenant.map(|(connection, _)| connection.maybe_open.len()).sum();
            messages.push(DraftedMessage { number, origin, place: *place, pushed_as, maybe_open });
            *place += 1;
        }
        (draft, messages)
    }

    /// The number of the next message: a new one, or one that is sent again.
    fn choose_message(&mut self, connection: usize) -> MessageNumber {
        let tenant = CONNECTIONS[connection];
        let kind = self.random.below(4);
        let packet_id = self.random.packet_id(PACKET_IDS);
        let client = &self.connections[connection];
        let exchange = match (kind, client.exchanges.get(&packet_id).copied()) {
            (0, Some(ClientExchange::Unanswered(number))) => {
                self.message(number).attempts += 1;
                return number;
            }
            (0, None) => {
                let exchange = Exchange { session: 1 + connection as u64, packet_id };
                Some((exchange, client.round(packet_id)))
            }
            _ => None,
        };
        if kind == 1 && self.random.percent(40) {
            let is_repeatable = |message: &ModelMessage| {
                message.tenant == tenant && message.id.is_some() && message.exchange.is_none()
            };
            let repeatable: Vec<_> =
                (0..).zip(&self.sent).filter(|(_, message)| is_repeatable(message)).collect();
            if !repeatable.is_empty() {
                let (number, _) = repeatable[self.random.below(repeatable.len())];
                self.message(number).attempts += 1;
                return number;
            }
        }
        self.sent.push(ModelMessage {
            tenant,
            connection,
            id: (kind == 1).then(|| format!("id-{}", self.random.below(25))),
            exchange,
            good: self.random.percent(80),
            attempts: 1,
            refused: false,
        });
        self.sent.len() as MessageNumber - 1
    }

    pub(super) async fn take_answer(&mut self, connection: usize) {
        let pending = self.connections[connection].pending.pop_front();
        let Some(PendingDraft { admitted, messages }) = pending else { return };
        let outcomes = admitted.await.expect("the disk is sound").outcomes;
        self.settle(connection, &messages, &outcomes).await;
    }

    /// Takes the answer to each message of a draft.
    pub(super) async fn settle(
        &mut self,
        connection: usize,
        messages: &[DraftedMessage],
        outcomes: &[SectionOutcome],
    ) {
        for &DraftedMessage { number, origin, place, pushed_as, maybe_open } in messages {
            let (mut is_kept, mut offset, mut as_repetition) = (true, 0, true);
            match &outcomes[origin] {
                SectionOutcome::Kept(offsets) => (offset, as_repetition) = (offsets.nth(place), false),
                SectionOutcome::Duplicate(earlier) if pushed_as != PushedAs::Asked => {
                    offset = earlier.first()
                }
                SectionOutcome::Known(earlier) if pushed_as != PushedAs::LetIn => offset = earlier.first(),
                SectionOutcome::Conflict { earlier, .. } => {
                    is_kept = false;
                    self.conflicts.push((number, earlier.first()));
                }
                SectionOutcome::ExchangesFull => {
                    is_kept = false;
                    assert!(maybe_open > EXCHANGES_MAX, "{number}: {maybe_open} are not too many");
                }
                SectionOutcome::KeyDead => is_kept = false,
                SectionOutcome::Unknown if pushed_as == PushedAs::Asked => is_kept = false,
                other => panic!("{number} {other:?}"),
            }
            // A message in quarantine that is known is let in; one that is there again is not.
            let is_known = matches!(outcomes[origin], SectionOutcome::Known(_));
            let quarantined = pushed_as == PushedAs::Quarantined && !is_known;
            match is_kept {
                true => self.acknowledged.push(Acknowledged { number, offset, as_repetition, quarantined }),
                false => self.message(number).refused = true,
            }
            let Some((exchange, _)) = self.message(number).exchange else { continue };
            if is_kept && !quarantined {
                self.connections[connection].exchanges.insert(exchange.packet_id, ClientExchange::Open);
            } else {
                // As the front does before it says no: an earlier connection may have brought it into the log.
                self.gateway().intake.release(&[exchange]).await.expect("released");
                self.connections[connection].maybe_open.remove(&exchange.packet_id);
                self.connections[connection].free(exchange.packet_id);
            }
        }
    }

    pub(super) async fn take_all_answers(&mut self) {
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
        self.connections[connection].maybe_open.remove(&packet_id);
        self.connections[connection].free(packet_id);
    }

    /// A client that has lost what it knew of an exchange, which the log has.
    fn forget_exchange(&mut self, connection: usize) {
        let packet_id = self.random.packet_id(PACKET_IDS);
        let client = &mut self.connections[connection];
        if client.exchanges.get(&packet_id) == Some(&ClientExchange::Open) {
            client.free(packet_id);
        }
    }

    /// Revokes a key, and makes another for it.
    async fn end_key(&mut self, tenant: usize) {
        let intake = self.gateway().intake.clone();
        let registry = intake.authorizer().registry();
        let datasource = DatasourceId::new(TENANTS[tenant]).expect("slug");
        let at = self.random.below(2);
        let id = self.keys[tenant][at].0;
        if !self.may_crash {
            // Whether what is on its way is kept is then the same in every run.
            self.gateway().log.barrier().await;
        }
        let dead = registry.revoke_key(&Actor::SYSTEM, &datasource, id).expect("revoked").expect("was live");
        intake.settle(&[dead], Instant::now()).await;
        self.dead.insert(id, self.gateway().log.next_offset());
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let (key, secret) =
            registry.create_key(&Actor::SYSTEM, &datasource, "", scopes, None).expect("created");
        self.keys[tenant][at] = (key.id, secret.expose().to_owned());
    }

    /// Sends some of what is in quarantine through intake again, as the API does.
    async fn redrive(&mut self, tenant: usize) {
        self.set_rules(tenant, TenantRules::Nothing);
        let datasource =
            self.gateway().intake.authorizer().registry().datasource(TENANTS[tenant]).expect("there");
        let mut draft = self.gateway().intake.draft(Transport::Http, 0);
        draft.received_at = self.clock;
        let admin = self.grant(&self.admins[tenant]);
        self.gateway().log.barrier().await;
        let batches = batches_from(&*self.gateway().log, 0);
        let mut added = Vec::new();
        for record in batches.iter().flat_map(Batch::records) {
            let is_parked = RecordKind::of(&record) == RecordKind::Parked;
            if is_parked && record.datasource == TENANTS[tenant] && self.random.percent(30) {
                let redriven = draft.redrive(&admin, &datasource, &record, None).expect("may");
                assert!(matches!(redriven, RedriveOutcome::Added));
                added.push(record);
            }
        }
        if added.is_empty() {
            return;
        }
        let intake = self.gateway().intake.clone();
        let outcomes = intake.admit(draft).await.expect("room").await.expect("kept").outcomes;
        let mut superseded = Vec::new();
        for (record, outcome) in added.into_iter().zip(outcomes) {
            match outcome {
                SectionOutcome::Kept(_) => {}
                SectionOutcome::Duplicate(earlier) | SectionOutcome::Conflict { earlier, .. } => {
                    superseded.push((record, earlier.first()));
                }
                other => panic!("{other:?}"),
            }
        }
        self.superseded.extend(superseded.iter().map(|(record, _)| record.offset));
        intake.mark_superseded(&admin, &datasource, &superseded).await.expect("marked");
    }
}

/// What a record of the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RecordKind {
    LetIn,
    Redriven,
    Parked,
    /// A mark of [`Intake::mark_superseded`].
    Mark,
}

impl RecordKind {
    pub(super) fn of(record: &RecordRef<'_>) -> Self {
        let has = |flag| record.flags.contains(flag);
        match (has(RecordFlags::QUARANTINED), has(RecordFlags::REDRIVEN)) {
            (false, false) => Self::LetIn,
            (false, true) => Self::Redriven,
            (true, false) => Self::Parked,
            (true, true) => Self::Mark,
        }
    }
}

/// The user property that a client sends an id in, in wire form.
fn message_id_property(id: &str) -> Vec<u8> {
    user_property(MESSAGE_ID_PROPERTY, id)
}

/// A user property in wire form.
fn user_property(name: &str, value: &str) -> Vec<u8> {
    let text =
        |text: &str| [&u16::try_from(text.len()).expect("short").to_be_bytes()[..], text.as_bytes()].concat();
    [&[0x26][..], &text(name), &text(value)].concat()
}

/// Everything in a log from an offset on.
pub(super) fn batches_from(log: &dyn Log, mut from: Offset) -> Vec<Batch> {
    let mut all = Vec::new();
    while from < log.next_offset() {
        let batches = log.read(from, 4 << 10).expect("readable");
        from = batches.last().expect("there is more").next_offset();
        all.extend(batches);
    }
    all
}
