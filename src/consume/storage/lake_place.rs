//! The Delta lake as a sink: where it is, and what is done about one that is ahead of the log.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use headgate_bridge_delta::{BucketAccess, LakePlace, probe_store};

use super::record_sink::{OpenedSink, RecordSink, SinkFault, SinkPlace};
use super::{StorageError, StoredLimitsSource};
use crate::config::{DeltaConfig, SinkKind};
use crate::consume::sink::lake::{LakeFault, LakeSettings, LakeSink, NewestRow};
use crate::log::{Log, LogReadError, WithheldRules};
use crate::message::{Offset, RecordRef};

/// How long the store may take to answer [`probe_lake`].
const LAKE_PROBE_TIME_MAX: Duration = Duration::from_secs(20);

/// The lake of the settings.
pub(in crate::consume) struct DeltaPlace {
    config: DeltaConfig,
    data_dir: PathBuf,
    log: Arc<dyn Log>,
    /// Whether other gateways with the same log write there too.
    is_shared: bool,
    /// The cursor of the lake when it was last seen to be that of this log.
    checked: Option<Offset>,
}

impl DeltaPlace {
    /// The lake of `config`; a relative path is in `data_dir`.
    pub(in crate::consume) fn new(
        data_dir: &Path,
        config: &DeltaConfig,
        log: Arc<dyn Log>,
        is_shared: bool,
    ) -> Self {
        Self { config: config.clone(), data_dir: data_dir.to_owned(), log, is_shared, checked: None }
    }

    /// Reads the files of the settings each time: a secret may have been replaced.
    fn settings(&self) -> Result<LakeSettings, LakeFault> {
        let config = &self.config;
        let place = place_of(config, &self.data_dir)?;
        Ok(LakeSettings {
            place,
            interval: Duration::from_secs(config.interval_s),
            removed_kept: Duration::from_secs(config.removed_kept_s),
            retention_days: config.retention_days,
            is_shared: self.is_shared,
        })
    }

    /// Opens it. What it has beyond the state from which the log went on is set aside; then also returns what to tell the
    /// operator. A lake that has what the log does not have otherwise is left alone: nobody else may have it.
    fn open_sink(&mut self, log_end: Offset) -> Result<(LakeSink, Option<String>), LakeFault> {
        let mut sink = LakeSink::open(self.settings()?)?;
        let said = self.log.history().map(|history| sink.follow_epochs(history)).transpose()?.flatten();
        let (stored, place) = (sink.committed(), || sink.place().to_string());
        // Where gateways share it another one may be ahead of what this one knows, and none is ahead of the servers.
        let log_end = match self.is_shared && stored > log_end {
            true => sink.wait_for(self.log.end()).map_err(|error| LakeFault::Log(error.to_string()))?,
            false => log_end,
        };
        if stored > log_end {
            return Err(LakeFault::AheadOfLog { place: place(), stored, log_end });
        }
        if self.checked != Some(stored)
            && let Some(newest) = sink.newest_row()?
            && self.is_another(&newest)?
        {
            return Err(LakeFault::OtherLog { place: place(), offset: newest.offset });
        }
        self.checked = Some(stored);
        Ok((sink, said))
    }

    /// Whether the log has another record in the place of this one. One that the log no longer has tells nothing.
    ///
    /// # Errors
    /// [`LakeFault::Log`].
    fn is_another(&self, newest: &NewestRow) -> Result<bool, LakeFault> {
        let is_there = (self.log.first_offset()..self.log.next_offset()).contains(&newest.offset);
        let batches = match is_there.then(|| self.log.read(newest.offset, 1)) {
            None | Some(Err(LogReadError::Removed { .. })) => return Ok(false),
            Some(Err(error)) => return Err(LakeFault::Log(error.to_string())),
            Some(Ok(batches)) => batches,
        };
        let record = batches
            .iter()
            .flat_map(|batch| batch.records())
            .find(|record| record.offset == newest.offset)
            .map(|record| (record.key_id, record.received_at));
        Ok(record.is_some_and(|record| record != (newest.key_id, newest.received_at)))
    }
}

/// Where the lake of the settings is; a relative path is in `data_dir`.
fn place_of(config: &DeltaConfig, data_dir: &Path) -> Result<LakePlace, LakeFault> {
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
    Ok(match LakePlace::parse(&config.place, access)? {
        LakePlace::Directory(path) => LakePlace::Directory(data_dir.join(path)),
        bucket => bucket,
    })
}

/// Looks whether the lake of the settings can be reached and written, and creates no object twice. A directory that is not
/// there yet is not made. Returns where it is, and whether it is there.
///
/// # Errors
/// What is wrong with the settings or the store, for an operator.
pub fn probe_lake(config: &DeltaConfig, data_dir: &Path) -> Result<(String, bool), String> {
    let place = place_of(config, data_dir).map_err(|error| error.to_string())?;
    let name = place.to_string();
    if matches!(&place, LakePlace::Directory(path) if !path.exists()) {
        return Ok((name, false));
    }
    let store = place.open().map_err(|error| format!("{name}: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    // Inside, because a timeout is made where its clock is.
    let probed =
        runtime.block_on(async { tokio::time::timeout(LAKE_PROBE_TIME_MAX, probe_store(&*store)).await });
    match probed {
        Ok(Ok(())) => Ok((name, true)),
        Ok(Err(fault)) => Err(format!("{name}: {fault}")),
        Err(_) => Err(format!("{name}: it has not answered within {} s", LAKE_PROBE_TIME_MAX.as_secs())),
    }
}

impl SinkPlace for DeltaPlace {
    fn kind(&self) -> SinkKind {
        SinkKind::Delta
    }

    fn is_local(&self) -> bool {
        !self.config.place.contains("://")
    }

    fn open(&mut self, _: &dyn Log, log_end: Offset, _: bool) -> Result<OpenedSink, StorageError> {
        let (sink, said) = self.open_sink(log_end).map_err(SinkFault::from)?;
        Ok(OpenedSink { sink: Box::new(sink), said })
    }

    fn reopen(&mut self) -> Result<Box<dyn RecordSink>, SinkFault> {
        let log_end = self.log.next_offset();
        Ok(Box::new(self.open_sink(log_end)?.0))
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

    fn stored_cursor(&self) -> Offset {
        self.committed()
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

    fn is_writer(&mut self) -> Result<bool, SinkFault> {
        Ok(self.is_writer()?)
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

    fn end_catching_up(&mut self) -> Result<(), SinkFault> {
        Ok(self.end_catching_up()?)
    }

    fn keep_within(&mut self, limits: &StoredLimitsSource, _: Duration) -> Result<(), SinkFault> {
        Ok(self.keep_within(|| limits())?)
    }

    fn finish(&mut self) -> Result<(), SinkFault> {
        Ok(self.commit()?)
    }
}
