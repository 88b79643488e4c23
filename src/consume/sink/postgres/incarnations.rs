//! The incarnations of datasources in PostgreSQL, as in `records.db` ([`crate::consume::sink::incarnations`]): each has a row of its own in
//! `datasources`, and when one ends, its row gets another name.

use std::collections::BTreeMap;

use super::{PostgresError, PostgresSink};
use crate::consume::sink::incarnations::shown_name;
use crate::consume::sink::schema::{offset_from_sql, sql_offset};
use crate::log::{IncarnationHistory, IncarnationStep, WithheldSnapshot};
use crate::message::{DatasourceId, Incarnation, KeyId, Offset};

/// How many records one transaction of a purge removes: storage goes on in between, and a kill loses little.
const PURGE_RECORDS_PER_TRANSACTION: i64 = 20_000;

impl PostgresSink {
    /// Makes the tables follow a step of an incarnation, in the present transaction. A purge is not made here.
    pub(super) fn follow_step(
        &mut self,
        datasource: &DatasourceId,
        incarnation: Incarnation,
        step: &IncarnationStep,
        left_out: &WithheldSnapshot,
    ) -> Result<(), PostgresError> {
        let Some(history) = left_out.history(datasource.as_str()) else { return Ok(()) };
        match step {
            IncarnationStep::Ended { .. } => {
                self.connection.execute(
                    "UPDATE datasources SET datasource = $2 WHERE datasource = $1 AND incarnation = $3",
                    &[&datasource.as_str(), &format!("{datasource}~{incarnation}"), &i64::from(incarnation)],
                )?;
                Ok(())
            }
            IncarnationStep::Begun { first_offset, .. } => {
                let (earlier, scope) = (datasource.scope(incarnation - 1), datasource.scope(incarnation));
                self.move_misplaced(&earlier, *first_offset, history)?;
                self.move_misplaced(&scope, 0, history)
            }
            IncarnationStep::Purged => Ok(()),
        }
    }

    /// Moves what is stored as `scope` from an offset on, and is of other incarnations, to those.
    pub(super) fn move_misplaced(
        &mut self,
        scope: &DatasourceId,
        from: Offset,
        history: &IncarnationHistory,
    ) -> Result<(), PostgresError> {
        let Some(row) = self.row_id_of_scope(scope)? else { return Ok(()) };
        let (datasource, incarnation) = scope.of_scope();
        for table in ["entries", "quarantined"] {
            // What is asked for is a record's key, time and offset: a page at a time.
            let mut targets: BTreeMap<Incarnation, (Vec<i64>, Vec<i64>)> = BTreeMap::new();
            let mut after = sql_offset(from) - 1;
            loop {
                let rows = self.connection.query(
                    &format!(
                        "SELECT e.log_offset, e.topic_id::bigint, (extract(epoch FROM e.received_at) * 1000000)::bigint, o.key_id
                         FROM {table} e JOIN origins o ON o.id = e.origin_id
                         WHERE e.datasource_id = $1 AND e.log_offset > $2 ORDER BY e.log_offset LIMIT 50000"
                    ),
                    &[&row, &after],
                )?;
                let Some(last) = rows.last() else { break };
                after = last.get(0);
                for row in rows {
                    let (offset, key): (i64, String) = (row.get(0), row.get(3));
                    let Ok(key) = KeyId::parse(&key) else { continue };
                    let target = history.incarnation_of(key, row.get(2), offset_from_sql(offset));
                    if target != incarnation {
                        let (offsets, topics) = targets.entry(target).or_default();
                        offsets.push(offset);
                        topics.push(row.get(1));
                    }
                }
            }
            for (target, (offsets, topics)) in targets {
                self.make_moved()?;
                self.note_moved(&offsets, &topics)?;
                let name = shown_name(datasource.as_str(), target, history);
                let to = self.ensure_datasource(&datasource.scope(target), &name)?;
                self.move_to_datasource(table, to)?;
            }
        }
        Ok(())
    }

    /// Moves the records in `moved` to another row of `datasources`, with their samples and the newest values that they
    /// bring.
    fn move_to_datasource(&mut self, table: &str, to: i32) -> Result<(), PostgresError> {
        self.connection.execute(
            "INSERT INTO topics (datasource_id, topic, latest_offset)
             SELECT DISTINCT $1::int, t.topic, -1 FROM moved m JOIN topics t ON t.id = m.topic_id ON CONFLICT DO NOTHING",
            &[&to],
        )?;
        // They have their origins still, and so have others of where they are now.
        self.connection.execute(
            &format!(
                "UPDATE origins SET datasource_id = NULL
                 WHERE id IN (SELECT e.origin_id FROM {table} e JOIN moved m ON m.log_offset = e.log_offset)"
            ),
            &[],
        )?;
        self.connection.execute(
            &format!(
                "UPDATE {table} e SET datasource_id = $1, topic_id = n.id
                 FROM moved m, topics t, topics n
                 WHERE e.log_offset = m.log_offset AND t.id = m.topic_id AND n.topic = t.topic AND n.datasource_id = $1"
            ),
            &[&to],
        )?;
        for samples in ["sample_rows", "withheld_samples"] {
            let of_moved = "v.log_offset = m.log_offset AND k.id = v.key_set_id AND t.id = v.topic_id
                 AND n.topic = t.topic AND n.datasource_id = $1";
            self.connection.execute(
                &format!(
                    "INSERT INTO key_sets (topic_id, digest, keys) SELECT DISTINCT n.id, k.digest, k.keys
                     FROM {samples} v, moved m, key_sets k, topics t, topics n WHERE {of_moved} ON CONFLICT DO NOTHING"
                ),
                &[&to],
            )?;
            self.connection.execute(
                &format!(
                    "UPDATE {samples} v SET topic_id = n.id, key_set_id = s.id
                     FROM moved m, key_sets k, topics t, topics n, key_sets s
                     WHERE {of_moved} AND s.topic_id = n.id AND s.digest = k.digest"
                ),
                &[&to],
            )?;
            // Those that have their keys themselves.
            self.connection.execute(
                &format!(
                    "UPDATE {samples} v SET topic_id = n.id FROM moved m, topics t, topics n
                     WHERE v.key_set_id = 0 AND v.log_offset = m.log_offset AND t.id = v.topic_id AND n.topic = t.topic
                         AND n.datasource_id = $1"
                ),
                &[&to],
            )?;
        }
        let left = self.moved_topics()?;
        if table == "quarantined" {
            return self.forget_empty_topics(&left);
        }
        self.forget_moved_values()?;
        self.forget_empty_topics(&left)?;
        self.connection.execute(
            "UPDATE moved m SET topic_id = e.topic_id FROM entries e WHERE e.log_offset = m.log_offset",
            &[],
        )?;
        self.restore_moved_values()
    }

    /// The row of the incarnation with this scope, if it has one.
    pub(super) fn row_id_of_scope(&self, scope: &DatasourceId) -> Result<Option<i32>, PostgresError> {
        let (id, incarnation) = scope.of_scope();
        let rows = self.connection.query(
            "SELECT id FROM datasources WHERE incarnation = $3 AND datasource IN ($1, $2)",
            &[&id.as_str(), &format!("{id}~{incarnation}"), &i64::from(incarnation)],
        )?;
        Ok(rows.first().map(|row| row.get(0)))
    }

    /// The row of the incarnation with this scope, which has this name then; without one, makes it.
    pub(super) fn ensure_datasource(&self, scope: &DatasourceId, name: &str) -> Result<i32, PostgresError> {
        let (_, incarnation) = scope.of_scope();
        let incarnation = i64::from(incarnation);
        // Another incarnation may still have the name: by another registry, or by rules that were not followed.
        self.connection.execute(
            "UPDATE datasources SET datasource = datasource || '~' || incarnation
             WHERE datasource = $1 AND incarnation <> $2",
            &[&name, &incarnation],
        )?;
        if let Some(row) = self.row_id_of_scope(scope)? {
            self.connection.execute(
                "UPDATE datasources SET datasource = $1 WHERE id = $2 AND datasource <> $1",
                &[&name, &row],
            )?;
            return Ok(row);
        }
        let row = self.connection.query_one(
            "INSERT INTO datasources (datasource, incarnation) VALUES ($1, $2) RETURNING id",
            &[&name, &incarnation],
        )?;
        Ok(row.get(0))
    }

    /// Removes some of what is stored of an incarnation, in the present transaction. Returns whether nothing is left of
    /// it. The server keeps the dead rows until its next vacuum.
    pub(super) fn purge_some(
        &mut self,
        scope: &DatasourceId,
        history: Option<&IncarnationHistory>,
    ) -> Result<bool, PostgresError> {
        let (_, incarnation) = scope.of_scope();
        let Some(row) = self.row_id_of_scope(scope)? else { return Ok(true) };
        for (table, samples) in [("entries", "sample_rows"), ("quarantined", "withheld_samples")] {
            self.make_moved()?;
            let gone = self.connection.execute(
                &format!(
                    "WITH gone AS (
                         DELETE FROM {table} WHERE log_offset IN (
                             SELECT log_offset FROM {table} WHERE datasource_id = $1 ORDER BY log_offset LIMIT $2)
                         RETURNING log_offset, topic_id)
                     INSERT INTO moved SELECT * FROM gone"
                ),
                &[&row, &PURGE_RECORDS_PER_TRANSACTION],
            )?;
            if gone == 0 {
                continue;
            }
            self.connection.run("ANALYZE moved")?;
            self.connection.execute(
                &format!(
                    "DELETE FROM {samples} WHERE log_offset IN (SELECT log_offset FROM moved)
                         AND log_offset BETWEEN (SELECT min(log_offset) FROM moved) AND (SELECT max(log_offset) FROM moved)"
                ),
                &[],
            )?;
            return Ok(false);
        }
        for statement in [
            "DELETE FROM latest_values WHERE topic_id IN (SELECT id FROM topics WHERE datasource_id = $1)",
            "DELETE FROM key_sets WHERE topic_id IN (SELECT id FROM topics WHERE datasource_id = $1)",
            "DELETE FROM topics WHERE datasource_id = $1",
            "DELETE FROM origins WHERE datasource_id = $1",
            "DELETE FROM retention WHERE datasource_id = $1",
            "DELETE FROM datasources WHERE id = $1",
        ] {
            self.connection.execute(statement, &[&row])?;
        }
        let keys = history.into_iter().flat_map(|history| history.keys_of(incarnation));
        let keys: Vec<String> = keys.map(|key| key.to_string()).collect();
        self.connection.execute("DELETE FROM origins WHERE key_id = ANY($1)", &[&keys])?;
        self.names.clear();
        Ok(true)
    }
}
