//! What the datasources with a limit in bytes take: counted once, in steps, and then kept up to date in the transactions that
//! store and remove.

use std::collections::HashMap;

use rusqlite::{Connection, OptionalExtension, params};

use crate::limits::{PRUNE_RECORDS_PER_TRANSACTION, STORED_RECORD_BYTES};

/// What the datasources with a limit in bytes take, by the row id of the datasource.
#[derive(Default)]
pub(in crate::consume::sink) struct StoredSizes(HashMap<i64, SizeCount>);

/// What one takes.
#[derive(Debug, Clone, Copy)]
struct SizeCount {
    bytes: u64,
    /// The first offset that is not counted.
    next: i64,
    /// Everything is counted, and what comes is added as it comes.
    is_whole: bool,
    is_changed: bool,
}

impl StoredSizes {
    /// Forgets what was not written: a transaction was not committed.
    pub(in crate::consume::sink) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn forget(&mut self, datasource: i64) {
        self.0.remove(&datasource);
    }

    /// Adds a record that is stored now.
    #[inline]
    pub(in crate::consume::sink) fn add(&mut self, datasource: i64, offset: i64, payload_bytes: usize) {
        if !self.0.is_empty()
            && let Some(count) = self.0.get_mut(&datasource)
            && count.is_whole
        {
            count.bytes += payload_bytes as u64 + STORED_RECORD_BYTES;
            count.next = offset + 1;
            count.is_changed = true;
        }
    }

    pub(super) fn subtract(&mut self, datasource: i64, bytes: u64) {
        if let Some(count) = self.0.get_mut(&datasource) {
            count.bytes = count.bytes.saturating_sub(bytes);
            count.is_changed = true;
        }
    }

    /// Writes what has changed, in the transaction that `connection` is in.
    pub(in crate::consume::sink) fn write(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        for (datasource, count) in self.0.iter_mut().filter(|(_, count)| count.is_changed) {
            connection
                .prepare_cached(
                    "INSERT INTO stored_sizes (datasource_id, bytes, next_offset) VALUES (?1, ?2, ?3)
                     ON CONFLICT DO UPDATE SET bytes = excluded.bytes, next_offset = excluded.next_offset",
                )?
                .execute(params![datasource, i64::try_from(count.bytes).unwrap_or(i64::MAX), count.next])?;
            count.is_changed = false;
        }
        Ok(())
    }

    /// What a datasource takes; `None` after a step that has not counted all of it, up to `cursor`.
    pub(super) fn count_some(
        &mut self,
        connection: &Connection,
        datasource: i64,
        cursor: i64,
    ) -> rusqlite::Result<Option<u64>> {
        let count = match self.0.get_mut(&datasource) {
            Some(count) if count.is_whole => return Ok(Some(count.bytes)),
            Some(count) => count,
            None => self.0.entry(datasource).or_insert(read_count(connection, datasource)?),
        };
        let mut select = connection.prepare_cached(
            "SELECT offset, octet_length(payload) FROM entries WHERE datasource_id = ?1 AND offset >= ?2
             UNION ALL SELECT offset, octet_length(payload) FROM quarantined
             WHERE datasource_id = ?1 AND offset >= ?2 ORDER BY offset LIMIT ?3",
        )?;
        let most = i64::try_from(10 * PRUNE_RECORDS_PER_TRANSACTION).unwrap_or(i64::MAX);
        let mut rows = select.query([datasource, count.next, most])?;
        let mut left = most;
        while let Some(row) = rows.next()? {
            count.bytes += row.get::<_, i64>(1)?.unsigned_abs() + STORED_RECORD_BYTES;
            count.next = row.get::<_, i64>(0)? + 1;
            left -= 1;
        }
        count.is_changed = true;
        if left == 0 {
            return Ok(None);
        }
        (count.next, count.is_whole) = (count.next.max(cursor), true);
        Ok(Some(count.bytes))
    }
}

fn read_count(connection: &Connection, datasource: i64) -> rusqlite::Result<SizeCount> {
    let known = connection
        .prepare_cached("SELECT bytes, next_offset FROM stored_sizes WHERE datasource_id = ?1")?
        .query_row([datasource], |row| Ok((row.get::<_, i64>(0)?.unsigned_abs(), row.get(1)?)))
        .optional()?;
    let (bytes, next) = known.unwrap_or((0, 0));
    Ok(SizeCount { bytes, next, is_whole: false, is_changed: false })
}
