//! `records.db` as a sink: where it is, and what is done about one that is damaged or ahead of the log.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tracing::{error, warn};

use super::record_sink::{OpenedSink, RecordSink, SinkFault, SinkPlace};
use super::retention::RetentionTurns;
use super::{StorageError, StoredLimitsSource, ahead, unopened_words};
use crate::config::SinkKind;
use crate::consume::sink::latest_board::LatestBoard;
use crate::consume::sink::sqlite::{RECORDS_FILE_NAME, SinkError, SqliteSink};
use crate::log::{Log, WithheldRules};
use crate::message::{Offset, RecordRef};
use crate::sqlite::set_aside;

/// Why [`begin_anew`] sets a database aside that cannot be read.
const WAS_DAMAGED: &str = "was damaged";

/// The `records.db` of a data directory.
pub(in crate::consume) struct SqlitePlace {
    path: PathBuf,
    /// Whether the numbers in payloads are stored as samples too.
    keeps_samples: bool,
    /// Where the newest values are shown from.
    board: Arc<LatestBoard>,
    /// Whether this process has tried to open it.
    was_tried: bool,
}

impl SqlitePlace {
    /// That of the data directory `dir`.
    pub(in crate::consume) fn new(dir: &Path, keeps_samples: bool, board: Arc<LatestBoard>) -> Self {
        Self { path: dir.join(RECORDS_FILE_NAME), keeps_samples, board, was_tried: false }
    }

    fn in_use(&self, mut sink: SqliteSink) -> Box<dyn RecordSink> {
        sink.keep_samples(self.keeps_samples);
        sink.show_on(self.board.clone());
        Box::new(SqliteStore { sink, retention: RetentionTurns::default() })
    }
}

impl SinkPlace for SqlitePlace {
    fn kind(&self) -> SinkKind {
        SinkKind::Sqlite
    }

    fn is_local(&self) -> bool {
        true
    }

    fn open(&mut self, log: &dyn Log, log_end: Offset, is_ordered: bool) -> Result<OpenedSink, StorageError> {
        // What has failed may have been a sync of the write-ahead log.
        let open =
            if std::mem::replace(&mut self.was_tried, true) { SqliteSink::reopen } else { SqliteSink::open };
        let (sink, said) = open_right(&self.path, open, log, log_end, is_ordered)?;
        Ok(OpenedSink { sink: self.in_use(sink), said })
    }

    fn reopen(&mut self) -> Result<Box<dyn RecordSink>, SinkFault> {
        Ok(self.in_use(SqliteSink::reopen(&self.path)?))
    }

    fn begin_anew(&mut self, log: &dyn Log) -> Result<OpenedSink, SinkFault> {
        let (sink, said) = begin_anew(&self.path, log, WAS_DAMAGED)?;
        Ok(OpenedSink { sink: self.in_use(sink), said: Some(said) })
    }
}

/// The open `records.db`, and where its retention is.
struct SqliteStore {
    sink: SqliteSink,
    retention: RetentionTurns,
}

impl RecordSink for SqliteStore {
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

    fn keep_within(&mut self, limits: &StoredLimitsSource, storing: Duration) -> Result<(), SinkFault> {
        Ok(self.retention.take_turn(&mut self.sink, limits, storing)?)
    }

    fn warning(&self) -> Option<String> {
        self.sink.warning()
    }

    /// Copies the write-ahead log into the one file, if nobody else reads it.
    fn finish(&mut self) -> Result<(), SinkFault> {
        self.sink.checkpoint()?;
        Ok(())
    }
}

/// Does what a start does by itself, and what it refuses to do because something acknowledged may be lost; or only
/// tells it, without `apply`. `None` if there is nothing to do.
///
/// # Errors
/// [`StorageError::Sink`].
pub fn repair(dir: &Path, log: &dyn Log, apply: bool) -> Result<Option<String>, StorageError> {
    let path = dir.join(RECORDS_FILE_NAME);
    if !path.exists() {
        return Ok(None);
    }
    let sink = match SqliteSink::open(&path) {
        Err(damage) if damage.is_damage() && apply => {
            return Ok(Some(begin_anew(&path, log, WAS_DAMAGED)?.1));
        }
        Err(damage) if damage.is_damage() => {
            return Ok(Some(format!(
                "{damage}: every start sets it aside and makes another one from the log"
            )));
        }
        Err(error) => return Ok(Some(unopened_words(&error.into()))),
        Ok(sink) => sink,
    };
    let log_end = log.next_offset();
    if sink.cursor() <= log_end {
        return Ok(None);
    }
    Ok(Some(if apply {
        ahead::put_right(&path, sink, log, log_end, true)?.1
    } else {
        ahead::tell(&sink, log)?
    }))
}

/// Sets aside what `records.db` in a data directory has from `end` on, because the log goes on there from an earlier state.
/// Returns what to tell the operator, if there was anything.
///
/// # Errors
/// [`StorageError::Sink`].
pub fn set_back_records(dir: &Path, end: Offset) -> Result<Option<String>, StorageError> {
    let path = dir.join(RECORDS_FILE_NAME);
    if !path.exists() {
        return Ok(None);
    }
    let mut sink = match SqliteSink::open(&path) {
        // The start makes another one from the log.
        Err(damage) if damage.is_damage() => return Ok(None),
        opened => opened?,
    };
    if sink.cursor() <= end {
        sink.forget_rules()?;
        return Ok(None);
    }
    let records = sink.count_from(end)?;
    let aside = sink.set_aside_from(end, &path)?;
    Ok(Some(format!(
        "{RECORDS_FILE_NAME} was ahead of the log, which goes on at offset {end} from an earlier state: its {records} \
         records from there on are set aside in {} (tables records and quarantine)",
        aside.display()
    )))
}

/// Opens `records.db` with `open`. One that is damaged is set aside, and so is what it has behind `log_end`, the end of the
/// log at the start: then also returns what to tell the operator. `is_ordered` is that of [`ahead::put_right`].
///
/// # Errors
/// [`StorageError::Sink`] if it cannot be opened; [`StorageError::LogBehind`].
fn open_right(
    path: &Path,
    open: fn(&Path) -> Result<SqliteSink, SinkError>,
    log: &dyn Log,
    log_end: Offset,
    is_ordered: bool,
) -> Result<(SqliteSink, Option<String>), StorageError> {
    let (sink, said) = match open(path) {
        Err(damage) if damage.is_damage() => {
            error!(%damage, "storage");
            let (sink, said) = begin_anew(path, log, WAS_DAMAGED)?;
            (sink, Some(said))
        }
        opened => (opened?, None),
    };
    if sink.cursor() <= log_end {
        if let Err(error) = sink.forget_marks_below(log.first_offset()) {
            // They do no harm, and go at a later start.
            warn!(%error, "storage: marks of what the log has no longer stay");
        }
        return Ok((sink, said));
    }
    let (sink, said) = ahead::put_right(path, sink, log, log_end, is_ordered)?;
    Ok((sink, Some(said)))
}

/// Sets a `records.db` aside and begins another one where the log begins. Also returns what to tell the
/// operator; `why` completes "records.db".
pub(super) fn begin_anew(path: &Path, log: &dyn Log, why: &str) -> Result<(SqliteSink, String), SinkError> {
    let aside = set_aside(path)?;
    let first = log.first_offset();
    let said = format!(
        "{RECORDS_FILE_NAME} {why} and is set aside as {}; storage is made again from the log, from offset \
         {first} on: what is older is in that file alone",
        aside.display()
    );
    // Said before the new one is opened, which may fail.
    error!("storage: {said}");
    let mut sink = SqliteSink::open(path)?;
    sink.store(std::iter::empty(), first, true)?;
    Ok((sink, said))
}
