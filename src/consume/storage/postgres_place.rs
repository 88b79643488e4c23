//! PostgreSQL as a sink: how it is opened, and what storage asks of it.

use std::time::{Duration, Instant};

use super::record_sink::{OpenedSink, RecordSink, SinkFault, SinkPlace};
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
        Ok(OpenedSink { sink: Box::new(sink), said })
    }

    fn reopen(&mut self) -> Result<Box<dyn RecordSink>, SinkFault> {
        Ok(Box::new(self.connect()?))
    }

    /// The server answers for what it has stored: there is nothing to set aside.
    fn begin_anew(&mut self, _: &dyn Log) -> Result<OpenedSink, SinkFault> {
        Ok(OpenedSink { sink: self.reopen()?, said: None })
    }
}

impl RecordSink for PostgresSink {
    fn cursor(&self) -> Offset {
        self.cursor()
    }

    fn durable_cursor(&self) -> Offset {
        self.durable_cursor()
    }

    fn withheld_version(&self) -> u64 {
        self.withheld_version()
    }

    fn has_rules(&self) -> bool {
        self.has_rules()
    }

    fn is_writer(&mut self) -> Result<bool, SinkFault> {
        Ok(self.is_writer()?)
    }

    fn reconcile_some(&mut self, withheld: &WithheldRules) -> Result<bool, SinkFault> {
        Ok(self.reconcile_some(withheld)?)
    }

    fn store<'a>(
        &mut self,
        records: &mut dyn Iterator<Item = RecordRef<'a>>,
        next: Offset,
        sync: bool,
    ) -> Result<(), SinkFault> {
        Ok(self.store(records, next, sync)?)
    }

    /// Nothing is removed: how long rows stay there is the database's own matter.
    fn keep_within(&mut self, _: &StoredLimitsSource, _: Duration) -> Result<(), SinkFault> {
        Ok(())
    }

    fn finish(&mut self) -> Result<(), SinkFault> {
        Ok(self.finish()?)
    }
}
