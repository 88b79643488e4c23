//! Where the suite plays: a log of one kind or the other, which a test opens, closes and opens again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use headgate::testing::message::{DatasourceId, KeyId, Lease, Offset, RecordFlags, Transport, now_micros};
use headgate::testing::{
    AppendError, CommitOutcome, Config, EmbeddedLog, JetstreamLog, Log, LogBackend, LogOpenError,
    LogReadError, Offsets, OnceId, Section, SectionOutcome,
};
use headgate_bridge_nats::{Nats, NatsCredentials, NatsSettings};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::common::nats::NatsServer;
use crate::common::{PATIENCE, scratch, wait_for};

/// One log, and what it lives in.
pub(crate) struct Stage {
    pub(crate) config: Config,
    pub(crate) server: Option<NatsServer>,
    runtime: Runtime,
    dir: TempDir,
}

/// A log that is open, and its connection.
pub(crate) struct Opened {
    log: Arc<dyn Log>,
    _nats: Option<Nats>,
}

impl std::ops::Deref for Opened {
    type Target = Arc<dyn Log>;

    fn deref(&self) -> &Self::Target {
        &self.log
    }
}

impl Stage {
    pub(crate) fn new(backend: LogBackend) -> Self {
        let mut config = Config::default();
        config.log.backend = backend;
        let server = (backend == LogBackend::Jetstream).then(NatsServer::start);
        config.nats.servers = server.iter().map(NatsServer::url).collect();
        let runtime = Runtime::new().expect("a runtime");
        Self { config, server, runtime, dir: scratch() }
    }

    /// Opens the log, as the first node where it matters.
    pub(crate) fn open(&self) -> Opened {
        self.open_as("one").expect("opens")
    }

    /// Opens it as a node of this name.
    pub(crate) fn open_as(&self, node: &str) -> Result<Opened, LogOpenError> {
        match self.config.log.backend {
            LogBackend::Embedded => {
                let log = EmbeddedLog::open(self.dir.path(), &self.config.log, &self.config.intake)?;
                Ok(Opened { log: Arc::new(log), _nats: None })
            }
            LogBackend::Jetstream => self.runtime.block_on(async {
                let nats = self.connect().await;
                let deadline = Instant::now() + PATIENCE;
                loop {
                    match JetstreamLog::open(&nats, &nats, &self.config, node).await {
                        Ok(log) => return Ok(Opened { log: Arc::new(log), _nats: Some(nats) }),
                        Err(LogOpenError::Away(_)) if Instant::now() < deadline => {
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                        Err(error) => return Err(error),
                    }
                }
            }),
        }
    }

    async fn connect(&self) -> Nats {
        let settings = NatsSettings {
            servers: self.config.nats.servers.clone(),
            credentials: NatsCredentials::None,
            ca: None,
            name: "test".to_owned(),
        };
        Nats::connect(&settings).await.expect("settings that can work")
    }

    /// Ends a log as a gateway does, and opens it again.
    pub(crate) fn reopen(&self, log: Opened) -> Opened {
        self.close(log);
        self.open()
    }

    pub(crate) fn close(&self, log: Opened) {
        self.runtime.block_on(log.close());
    }

    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// The consumers that the stream has: who is sent what it takes.
    pub(crate) fn consumers(&self) -> Vec<String> {
        let answer = self.ask_jetstream("CONSUMER.NAMES.headgate");
        let names = answer["consumers"].as_array().into_iter().flatten();
        names.map(|name| name.as_str().expect("a name").to_owned()).collect()
    }

    /// Ends one of them. Whoever it was for is not told.
    pub(crate) fn end_consumer(&self, name: &str) {
        let answer = self.ask_jetstream(&format!("CONSUMER.DELETE.headgate.{name}"));
        assert_eq!(answer["success"], true, "{answer}");
    }

    fn ask_jetstream(&self, what: &str) -> serde_json::Value {
        self.block_on(async {
            let nats = self.connect().await;
            let subject = format!("$JS.API.{what}");
            let answer = nats.client().request(subject, Vec::new().into()).await.expect("an answer");
            serde_json::from_slice(&answer.payload).expect("JSON")
        })
    }

    /// The server of a log in JetStream.
    pub(crate) fn server(&mut self) -> &mut NatsServer {
        self.server.as_mut().expect("the log is in JetStream")
    }
}

pub(crate) fn datasource() -> DatasourceId {
    DatasourceId::new("press-4").expect("a slug")
}

/// A section of messages with these payloads.
pub(crate) fn section(payloads: &[&[u8]]) -> Section {
    section_under(payloads, &Lease::new())
}

pub(crate) fn section_under(payloads: &[&[u8]], lease: &Lease) -> Section {
    let mut section =
        Section::new(datasource(), KeyId([1; 6]), lease.clone(), Transport::Http, 0, now_micros());
    for payload in payloads {
        section.push("t", payload, "", &[], RecordFlags::default());
    }
    section
}

/// A section of messages that are kept once under `ids`.
pub(crate) fn once(ids: &[OnceId], payloads: &[&[u8]]) -> Section {
    let mut section = section(payloads);
    ids.iter().for_each(|id| section.keep_once(*id));
    section
}

pub(crate) fn message(id: u32) -> OnceId {
    OnceId::of_message(&datasource(), &id.to_string())
}

pub(crate) fn exchange(packet_id: u16) -> OnceId {
    OnceId::of_exchange(1, packet_id)
}

pub(crate) fn later() -> Instant {
    Instant::now() + PATIENCE
}

pub(crate) fn try_keep(log: &dyn Log, sections: Vec<Section>) -> Result<Vec<SectionOutcome>, AppendError> {
    let committed = log.append(sections, later()).blocking_recv().expect("the log answers");
    committed.map(|CommitOutcome { outcomes }| outcomes)
}

/// Appends sections and says what has become of each.
pub(crate) fn keep(log: &dyn Log, sections: Vec<Section>) -> Vec<SectionOutcome> {
    try_keep(log, sections).expect("kept")
}

/// Appends messages of one origin, and returns where they are.
pub(crate) fn kept(log: &dyn Log, payloads: &[&[u8]]) -> Offsets {
    offsets(keep(log, vec![section(payloads)]).remove(0))
}

/// Where the records of a section that was kept are.
pub(crate) fn offsets(outcome: SectionOutcome) -> Offsets {
    match outcome {
        SectionOutcome::Kept(offsets) => offsets,
        other => panic!("not kept: {other:?}"),
    }
}

pub(crate) fn release(log: &dyn Log, ids: &[OnceId]) {
    let released = log.release(ids.to_vec(), later()).blocking_recv();
    assert_eq!(released.expect("the log answers").expect("released").outcomes, []);
}

/// Everything from an offset on, as offsets and payloads.
pub(crate) fn read_all(log: &dyn Log, from: Offset) -> Result<Vec<(Offset, Vec<u8>)>, LogReadError> {
    let (mut seen, mut next) = (Vec::new(), from);
    while next < log.next_offset() {
        let batches = log.read(next, 64 << 10)?;
        let last = batches.last().expect("there is something at every offset below the end");
        let records = batches.iter().flat_map(|batch| batch.records()).filter(|r| r.offset >= next);
        seen.extend(records.map(|record| (record.offset, record.payload.to_vec())));
        assert!(last.next_offset() > next, "reading gets on");
        next = last.next_offset();
    }
    Ok(seen)
}

/// What was read, with the offsets that it was kept at.
pub(crate) fn payloads(read: &[(Offset, Vec<u8>)]) -> Vec<&[u8]> {
    read.iter().map(|(_, payload)| &payload[..]).collect()
}

pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    wait_for(what, || holds().then_some(()));
}
