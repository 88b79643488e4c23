//! Putting right a `records.db` that is ahead of the log. The log goes on at its end, so that it gives offsets
//! anew under which storage has records already: those are set aside first.
//!
//! A start does that by itself only if nothing acknowledged is in doubt: the log is the one that was stored from
//! (the newest record that both have is the same), and storage has every record that the log lacks, up to
//! its cursor, but for those that were removed or are not stored at all. Otherwise it is `headgate repair` that does it, so
//! that somebody knows what is lost.

use std::path::Path;

use tracing::warn;

use super::StorageError;
use super::sqlite_place::begin_anew;
use crate::consume::sink::sqlite::{RECORDS_FILE_NAME, SqliteSink};
use crate::log::Log;
use crate::message::Offset;

/// What is wrong between a store and the log that it is ahead of.
enum HistoryDoubt {
    /// Records that neither has.
    Missing(u64),
    /// The two may not be of the same history. The text says why.
    OtherLog(String),
}

/// Sets aside what `sink` has from `log_end` on, the end that the log had at the start. Also returns what to tell the
/// operator. With `is_ordered`, also if something acknowledged is in doubt: then all that is stored may be set aside.
///
/// # Errors
/// [`StorageError::LogBehind`] if it is in doubt; [`StorageError::Sink`].
pub(super) fn put_right(
    path: &Path,
    mut sink: SqliteSink,
    log: &dyn Log,
    log_end: Offset,
    is_ordered: bool,
) -> Result<(SqliteSink, String), StorageError> {
    let stored = sink.cursor();
    let missing = match doubt(&sink, log, log_end)? {
        Some(doubt) if !is_ordered => {
            return Err(StorageError::LogBehind { stored, log_end, why: doubt.to_string() });
        }
        Some(HistoryDoubt::OtherLog(why)) => {
            drop(sink);
            return Ok(begin_anew(path, log, &format!("does not fit the log ({why})"))?);
        }
        Some(HistoryDoubt::Missing(missing)) => missing,
        None => 0,
    };
    let records = sink.count_from(log_end)?;
    let aside = sink.set_aside_from(log_end, path)?;
    let said = format!(
        "{RECORDS_FILE_NAME} was ahead of the log, which ends at offset {log_end}: its {records} records from there \
         on are set aside in {} (tables records and quarantine), and the log gives their offsets anew",
        aside.display()
    );
    warn!(stored, log_end, records, missing, "storage: {said}");
    Ok((sink, said))
}

/// What [`put_right`] would do if it is ordered to.
///
/// # Errors
/// [`StorageError::Sink`].
pub(super) fn tell(sink: &SqliteSink, log: &dyn Log) -> Result<String, StorageError> {
    let (stored, log_end) = (sink.cursor(), log.next_offset());
    let doubt = doubt(sink, log, log_end)?;
    let head =
        format!("{RECORDS_FILE_NAME} holds everything up to offset {stored}, but the log ends at {log_end}");
    if let Some(HistoryDoubt::OtherLog(why)) = doubt {
        return Ok(format!(
            "{head}, and {why}: the whole file is set aside as records-set-aside-TIME.db, and storage is made again \
             from the log, from offset {} on. Older records are then in that file alone",
            log.first_offset()
        ));
    }
    let missing = doubt.map_or(String::new(), |doubt| format!(" ({doubt})"));
    let records = sink.count_from(log_end)?;
    Ok(format!(
        "{head}{missing}: the {records} records that only storage has are set aside in records-set-aside-TIME.db, and \
         the log gives their offsets anew"
    ))
}

fn doubt(sink: &SqliteSink, log: &dyn Log, log_end: Offset) -> Result<Option<HistoryDoubt>, StorageError> {
    let other = |why: &str| Ok(Some(HistoryDoubt::OtherLog(why.to_owned())));
    let Some(trace) = sink.newest_below(log_end)? else {
        return other("the two have no record in common that would show that they belong together");
    };
    let batches = match log.read(trace.offset, 1) {
        Ok(batches) => batches,
        Err(error) => {
            return other(&format!("the record at offset {} cannot be compared: {error}", trace.offset));
        }
    };
    let record =
        batches.iter().flat_map(|batch| batch.records()).find(|record| record.offset == trace.offset);
    match record {
        None => other(&format!("the log has no record at offset {} to compare", trace.offset)),
        Some(record) if !trace.is_of(&record) => {
            other(&format!("the log has another record at offset {} than storage", trace.offset))
        }
        Some(_) => {
            let missing = sink.missing_from(log_end)?;
            Ok((missing > 0).then_some(HistoryDoubt::Missing(missing)))
        }
    }
}

impl std::fmt::Display for HistoryDoubt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing(missing) => write!(f, "{missing} records in between are in neither"),
            Self::OtherLog(why) => f.write_str(why),
        }
    }
}
