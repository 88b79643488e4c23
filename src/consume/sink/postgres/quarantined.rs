//! The table `quarantined` in PostgreSQL: records that are kept and not passed on, moved there by rules about leaked keys, and
//! back when a rule is undone, with their samples and the newest values that they brought.

use super::{PostgresError, PostgresSink};
use crate::consume::sink::quarantined::CAUSE_KEY;
use crate::consume::sink::schema::{offset_from_sql, sql_offset};
use crate::log::{WithheldChange, WithheldSnapshot};
use crate::message::KeyId;

/// The columns that a record has in both tables.
const ENTRY_COLUMNS: &str = "log_offset, received_at, event_at, datasource_id, topic_id, origin_id, payload, payload_bytes, payload_note, payload_size";

/// The columns of a row of samples, withheld or not.
pub(super) const SAMPLE_COLUMNS: &str = "time, log_offset, topic_id, key_set_id, numbers, keys";

impl PostgresSink {
    /// Makes the tables follow changes of the rules but for purges, in the present transaction. `left_out` holds the
    /// present rules.
    pub(super) fn follow_rules(
        &mut self,
        changes: &[WithheldChange],
        left_out: &WithheldSnapshot,
    ) -> Result<(), PostgresError> {
        self.make_moved()?;
        for change in changes {
            if let WithheldChange::Incarnation(datasource, incarnation, step) = change {
                self.follow_step(datasource, *incarnation, step, left_out)?;
            }
        }
        let mut keys: Vec<KeyId> = changes.iter().filter_map(WithheldChange::key_id).collect();
        keys.sort_unstable();
        keys.dedup();
        for key_id in keys {
            self.withhold(key_id, left_out)?;
            self.give_back(key_id, left_out)?;
        }
        Ok(())
    }

    /// Makes the table of the records that a correction is about, empty, for this transaction.
    pub(super) fn make_moved(&self) -> Result<(), PostgresError> {
        Ok(self.connection.run(
            "CREATE TEMP TABLE IF NOT EXISTS moved (log_offset bigint PRIMARY KEY, topic_id bigint NOT NULL) ON COMMIT DELETE ROWS;
             DELETE FROM moved",
        )?)
    }

    /// Moves records that rules about this key cover into quarantine.
    fn withhold(&self, key_id: KeyId, left_out: &WithheldSnapshot) -> Result<(), PostgresError> {
        self.make_moved()?;
        for rule in left_out.rules().filter(|rule| rule.key_id == key_id) {
            // All incarnations of a datasource: the key is of one of them.
            self.connection.execute(
                "INSERT INTO moved SELECT e.log_offset, e.topic_id FROM entries e
                 JOIN origins o ON o.id = e.origin_id JOIN datasources d ON d.id = e.datasource_id
                 WHERE o.key_id = $1 AND e.log_offset < $2
                     AND e.received_at >= 'epoch'::timestamptz + $3::bigint * interval '1 microsecond'
                     AND ($4 = '*' OR split_part(d.datasource, '~', 1) = $4)
                 ON CONFLICT DO NOTHING",
                &[
                    &key_id.to_string(),
                    &sql_offset(rule.below),
                    &rule.since.clamp(TIME_FIRST_US, TIME_LAST_US),
                    &rule.datasource.as_str(),
                ],
            )?;
        }
        // Without, the server takes it for large, and reads the whole of what it is joined with.
        self.connection.run("ANALYZE moved")?;
        self.connection.execute(
            &format!(
                "INSERT INTO quarantined ({ENTRY_COLUMNS}, properties, publisher, flags, cause)
                 SELECT {ENTRY_COLUMNS}, '', 0, 0, '{CAUSE_KEY}' FROM entries
                 WHERE log_offset IN (SELECT log_offset FROM moved)"
            ),
            &[],
        )?;
        self.connection
            .execute("DELETE FROM entries WHERE log_offset IN (SELECT log_offset FROM moved)", &[])?;
        self.move_samples("sample_rows", "withheld_samples")?;
        self.forget_moved_values()
    }

    /// Moves records that no rule about this key covers any more back.
    fn give_back(&self, key_id: KeyId, left_out: &WithheldSnapshot) -> Result<(), PostgresError> {
        self.make_moved()?;
        let rows = self.connection.query(
            "SELECT q.log_offset, q.topic_id::bigint, (extract(epoch FROM q.received_at) * 1000000)::bigint, d.datasource
             FROM quarantined q JOIN datasources d ON d.id = q.datasource_id JOIN origins o ON o.id = q.origin_id
             WHERE q.cause = $1 AND o.key_id = $2",
            &[&CAUSE_KEY, &key_id.to_string()],
        )?;
        let (mut offsets, mut topics): (Vec<i64>, Vec<i64>) = (Vec::new(), Vec::new());
        for row in rows {
            let (offset, name): (i64, String) = (row.get(0), row.get(3));
            let datasource = name.split_once('~').map_or(&*name, |(datasource, _)| datasource);
            if !left_out.covers(datasource, key_id, row.get(2), offset_from_sql(offset)) {
                offsets.push(offset);
                topics.push(row.get(1));
            }
        }
        if offsets.is_empty() {
            return Ok(());
        }
        self.note_moved(&offsets, &topics)?;
        self.connection.execute(
            &format!(
                "INSERT INTO entries ({ENTRY_COLUMNS}) SELECT {ENTRY_COLUMNS} FROM quarantined
                 WHERE log_offset IN (SELECT log_offset FROM moved)"
            ),
            &[],
        )?;
        self.connection
            .execute("DELETE FROM quarantined WHERE log_offset IN (SELECT log_offset FROM moved)", &[])?;
        self.move_samples("withheld_samples", "sample_rows")?;
        self.restore_moved_values()
    }

    /// Adds records to `moved`.
    pub(super) fn note_moved(&self, offsets: &[i64], topics: &[i64]) -> Result<(), PostgresError> {
        self.connection.execute(
            "INSERT INTO moved SELECT * FROM unnest($1::bigint[], $2::bigint[])",
            &[&offsets, &topics],
        )?;
        Ok(self.connection.run("ANALYZE moved")?)
    }

    /// Moves the samples of the records in `moved` from one table to the other. The bounds are for the index, which knows
    /// ranges.
    fn move_samples(&self, from: &str, to: &str) -> Result<(), PostgresError> {
        self.connection.execute(
            &format!(
                "WITH gone AS (
                     DELETE FROM {from} WHERE log_offset IN (SELECT log_offset FROM moved)
                         AND log_offset BETWEEN (SELECT min(log_offset) FROM moved) AND (SELECT max(log_offset) FROM moved)
                     RETURNING {SAMPLE_COLUMNS})
                 INSERT INTO {to} ({SAMPLE_COLUMNS}) SELECT * FROM gone"
            ),
            &[],
        )?;
        Ok(())
    }
}

/// The times that are compared with what is stored, in microseconds since the Unix epoch: of the years -4712 to 9999.
const TIME_FIRST_US: i64 = -210_866_803_200_000_000;
const TIME_LAST_US: i64 = 253_402_300_799_999_999;
