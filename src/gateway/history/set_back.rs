//! What a gateway has beyond the state from which its cluster goes on: set aside before anything comes under those offsets.

use std::path::Path;

use anyhow::Context;
use tracing::warn;

use crate::consume::storage::set_back_records;
use crate::consume::subscriber::retained::set_back_retained;
use crate::log::Log;
use crate::message::Offset;

/// Sets aside what the stores in `dir` have from `end` on. Doing it twice does no harm.
///
/// # Errors
/// A store that cannot be opened or written: a start has to try again, because what it has would be taken for records of
/// the log as it is now.
pub(in crate::gateway) fn set_back_stores(dir: &Path, log: &dyn Log, end: Offset) -> anyhow::Result<()> {
    let records = set_back_records(dir, end).context("records.db cannot be set back")?;
    let retained =
        set_back_retained(dir, end, log.first_offset()).context("retained.db cannot be set back")?;
    for said in records.into_iter().chain(retained) {
        warn!(end, "{said}");
    }
    Ok(())
}
