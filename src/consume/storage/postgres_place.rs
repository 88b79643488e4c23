//! PostgreSQL as a sink: how it is opened, and what storage asks of it.

use std::time::{Duration, Instant};

use super::record_sink::{OpenedSink, RecordSink, SinkFault, SinkPlace};
use super::retention::RetentionTurns;
use super::{StorageError, StoredLimitsSource};
use crate::config::{PostgresConfig, SinkKind};
use crate::consume::sink::postgres::PostgresSink;
use crate::log::{Log, WithheldRules};
use crate::message::{Offset, RecordRef};

/// A schema of a database.
pub(in crate::consume) struct PostgresPlace {
    config: PostgresConfig,
    /// Whether the numbers in payloads are stored as samples too.
    keeps_samples: bool,
    /// Whether other gateways with the same log write there too.
    is_shared: bool,
    started_at: Instant,
}

impl PostgresPlace {
    /// That of the settings.
    pub(in crate::consume) fn new(config: &PostgresConfig, keeps_samples: bool, is_shared: bool) -> Self {
        Self { config: config.clone(), keeps_samples, is_shared, started_at: Instant::now() }
    }

    fn connect(&self) -> Result<PostgresSink, SinkFault> {
        Ok(PostgresSink::open(&self.config, self.keeps_samples, self.is_shared, self.started_at)?)
    }
}

impl SinkPlace for PostgresPlace {
    fn kind(&self) -> SinkKind {
        SinkKind::Postgres
    }

    fn is_local(&self) -> bool {
        false
    }

    fn open(&mut self, log: &dyn Log, log_end: Offset, _: bool) -> Result<OpenedSink, StorageError> {
        let mut sink = self.connect()?;
        let said = sink.put_right(log, log_end).map_err(SinkFault::from)?;
        Ok(OpenedSink { sink: in_use(sink), said })
    }

    fn reopen(&mut self) -> Result<Box<dyn RecordSink>, SinkFault> {
        Ok(in_use(self.connect()?))
    }

    /// The server answers for what it has stored: there is nothing to set aside.
    fn begin_anew(&mut self, _: &dyn Log) -> Result<OpenedSink, SinkFault> {
        Ok(OpenedSink { sink: self.reopen()?, said: None })
    }
}

fn in_use(sink: PostgresSink) -> Box<dyn RecordSink> {
    Box::new(PostgresStore { sink, retention: RetentionTurns::default() })
}

/// The open tables, and where their retention is.
struct PostgresStore {
    sink: PostgresSink,
    retention: RetentionTurns,
}

impl RecordSink for PostgresStore {
    fn cursor(&self) -> Offset {
        self.sink.cursor()
    }

    fn durable_cursor(&self) -> Offset {
        self.sink.durable_cursor()
    }

    fn withheld_version(&self) -> u64 {
        self.sink.withheld_version()
    }

    fn has_rules(&self) -> bool {
        self.sink.has_rules()
    }

    fn is_writer(&mut self) -> Result<bool, SinkFault> {
        Ok(self.sink.is_writer()?)
    }

    fn reconcile_some(&mut self, withheld: &WithheldRules) -> Result<bool, SinkFault> {
        Ok(self.sink.reconcile_some(withheld)?)
    }

    fn store<'a>(
        &mut self,
        records: &mut dyn Iterator<Item = RecordRef<'a>>,
        next: Offset,
        sync: bool,
    ) -> Result<(), SinkFault> {
        Ok(self.sink.store(records, next, sync)?)
    }

    /// Where gateways share the tables, the one that writes removes too.
    fn keep_within(&mut self, limits: &StoredLimitsSource, storing: Duration) -> Result<(), SinkFault> {
        match self.sink.has_place() {
            true => Ok(self.retention.take_turn(&mut self.sink, limits, storing)?),
            false => Ok(()),
        }
    }

    fn finish(&mut self) -> Result<(), SinkFault> {
        Ok(self.sink.finish()?)
    }
}
