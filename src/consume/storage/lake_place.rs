//! The Delta lake as a sink: where it is, and what is done about one that is ahead of the log.

use std::path::Path;

use headgate_bridge_delta::{BucketAccess, LakePlace};

use super::StorageError;
use super::record_sink::{OpenedSink, RecordSink, SinkFault, SinkPlace};
use crate::config::{DeltaConfig, SinkKind};
use crate::consume::sink::lake::{LakeFault, LakeSettings, LakeSink};
use crate::log::{Log, WithheldRules};
use crate::message::{Offset, RecordRef};

/// The lake of the settings.
pub(in crate::consume) struct DeltaPlace {
    config: DeltaConfig,
    data_dir: std::path::PathBuf,
}

impl DeltaPlace {
    /// The lake of `config`; a relative path is in `data_dir`.
    pub(in crate::consume) fn new(data_dir: &Path, config: &DeltaConfig) -> Self {
        Self { config: config.clone(), data_dir: data_dir.to_owned() }
    }

    /// Reads the files of the settings each time: a secret may have been replaced.
    fn settings(&self) -> Result<LakeSettings, LakeFault> {
        let config = &self.config;
        let said = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let secret = config.secret().map_err(|error| LakeFault::Settings(error.to_string()))?;
        let ca_pem = match config.ca.as_os_str().is_empty() {
            true => None,
            false => Some(std::fs::read(&config.ca).map_err(|error| {
                LakeFault::Settings(format!("storage.delta.ca {}: {error}", config.ca.display()))
            })?),
        };
        let access = BucketAccess {
            endpoint: said(&config.endpoint),
            region: said(&config.region),
            access_key_id: said(&config.access_key_id),
            secret_access_key: said(&secret),
            session_token: None,
            ca_pem,
        };
        let place = match LakePlace::parse(&config.place, access)? {
            LakePlace::Directory(path) => LakePlace::Directory(self.data_dir.join(path)),
            bucket => bucket,
        };
        Ok(LakeSettings {
            place,
            interval: std::time::Duration::from_secs(config.interval_s),
            removed_kept: std::time::Duration::from_secs(config.removed_kept_s),
            retention_days: config.retention_days,
        })
    }

    fn open_sink(&self) -> Result<LakeSink, LakeFault> {
        LakeSink::open(self.settings()?)
    }
}

impl SinkPlace for DeltaPlace {
    fn kind(&self) -> SinkKind {
        SinkKind::Delta
    }

    fn is_local(&self) -> bool {
        !self.config.place.contains("://")
    }

    /// A lake that is ahead of the log is left alone: what it has, nobody else may have.
    fn open(&mut self, _: &dyn Log, log_end: Offset, _: bool) -> Result<OpenedSink, StorageError> {
        let sink = self.open_sink().map_err(SinkFault::from)?;
        if sink.cursor() > log_end {
            let place = sink.place().to_string();
            return Err(
                SinkFault::from(LakeFault::AheadOfLog { place, stored: sink.cursor(), log_end }).into()
            );
        }
        Ok(OpenedSink { sink: Box::new(sink), said: None })
    }

    fn reopen(&mut self) -> Result<Box<dyn RecordSink>, SinkFault> {
        Ok(Box::new(self.open_sink()?))
    }

    /// Nothing is set aside: a table is never begun anew by itself.
    fn begin_anew(&mut self, _: &dyn Log) -> Result<OpenedSink, SinkFault> {
        Ok(OpenedSink { sink: self.reopen()?, said: None })
    }
}

impl RecordSink for LakeSink {
    fn cursor(&self) -> Offset {
        self.cursor()
    }

    fn durable_cursor(&self) -> Offset {
        self.committed()
    }

    fn withheld_version(&self) -> u64 {
        self.withheld_version()
    }

    fn has_rules(&self) -> bool {
        self.has_rules()
    }

    fn reconcile_some(&mut self, withheld: &WithheldRules) -> Result<bool, SinkFault> {
        self.reconcile(withheld)?;
        Ok(true)
    }

    fn store<'a>(
        &mut self,
        records: &mut dyn Iterator<Item = RecordRef<'a>>,
        next: Offset,
        _: bool,
    ) -> Result<(), SinkFault> {
        Ok(self.store(records, next)?)
    }

    fn finish(&mut self) -> Result<(), SinkFault> {
        Ok(self.commit()?)
    }
}
