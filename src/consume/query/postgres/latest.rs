//! The newest values from PostgreSQL.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use headgate_bridge_postgres::{PostgresTime, Row};

use super::{PostgresRecords, row_id_of_scope};
use crate::consume::latest::{LatestPage, LatestTopic, LatestValue, VALUE_BYTES};
use crate::consume::query::{PageBudget, QueryError};
use crate::consume::sink::postgres::text_of;
use crate::consume::sink::schema::offset_from_sql;
use crate::message::DatasourceId;

/// The newest record of each topic and its newest values, a row each: `key` is `NULL` in that of the record.
const LATEST_SQL: &str = "SELECT t.topic, n.* FROM topics t CROSS JOIN LATERAL (
         SELECT NULL::text AS key, e.log_offset, e.received_at, e.event_at, o.content_type,
             coalesce(e.payload_bytes, convert_to(e.payload::text, 'UTF8')) AS value
         FROM entries e JOIN origins o ON o.id = e.origin_id WHERE e.log_offset = t.latest_offset
         UNION ALL
         SELECT v.key, v.log_offset, v.received_at, NULL, NULL, coalesce(v.value_bytes, convert_to(v.value, 'UTF8'))
         FROM latest_values v WHERE v.topic_id = t.id
     ) n WHERE t.datasource_id = $1 AND t.topic > $2 AND t.latest_offset >= 0 ORDER BY t.topic";

impl PostgresRecords {
    /// See [`RecordsReader::latest_within`](crate::consume::query::RecordsReader::latest_within).
    ///
    /// # Errors
    /// [`QueryError`].
    pub(in crate::consume::query) fn latest_within(
        &self,
        scope: &DatasourceId,
        after_topic: Option<&str>,
        budget: &mut PageBudget,
    ) -> Result<LatestPage, QueryError> {
        let after = text_of(after_topic.unwrap_or_default());
        let left = budget.clone();
        self.read(|snapshot| {
            *budget = left.clone();
            let (datasource, _) = scope.of_scope();
            let mut page = LatestPage { datasource, topics: Vec::new(), next: None };
            let Some(id) = row_id_of_scope(snapshot, scope)? else { return Ok(page) };
            let mut present = TopicRows::default();
            snapshot.scan(LATEST_SQL, &[&id, &&*after], |row| {
                let topic: &str = row.get(0);
                if present.topic != topic {
                    present.end(budget, &mut page);
                    if budget.is_spent() {
                        page.next = page.topics.last().map(|last| last.topic.clone());
                        return ControlFlow::Break(());
                    }
                    topic.clone_into(&mut present.topic);
                }
                present.add(row);
                ControlFlow::Continue(())
            })?;
            present.end(budget, &mut page);
            Ok(page)
        })
    }
}

/// The rows of one topic.
#[derive(Default)]
struct TopicRows {
    topic: String,
    newest: Option<LatestTopic>,
    values: BTreeMap<String, LatestValue>,
    bytes: usize,
}

impl TopicRows {
    fn add(&mut self, row: &Row) {
        let key: Option<String> = row.get(1);
        let offset = offset_from_sql(row.get(2));
        let received_at = row.get::<_, PostgresTime>(3).0;
        let value: Option<Vec<u8>> = row.get(6);
        self.bytes += value.as_ref().map_or(0, Vec::len);
        if let Some(key) = key {
            self.bytes += key.len() + VALUE_BYTES;
            self.values.insert(key, LatestValue { value, offset, received_at });
            return;
        }
        self.bytes += self.topic.len();
        self.newest = Some(LatestTopic {
            topic: self.topic.clone(),
            offset,
            received_at,
            event_at: row.get::<_, Option<PostgresTime>>(4).map(|at| at.0),
            payload: value.unwrap_or_default(),
            content_type: row.get::<_, Option<String>>(5).unwrap_or_default(),
            values: BTreeMap::new(),
        });
    }

    /// Puts the topic on the page, and forgets it.
    fn end(&mut self, budget: &mut PageBudget, page: &mut LatestPage) {
        let Self { newest, values, bytes, .. } = std::mem::take(self);
        if let Some(newest) = newest {
            budget.take(bytes);
            page.topics.push(LatestTopic { values, ..newest });
        }
    }
}
