//! The incarnations of datasources in `records.db`. Each has a row of its own in `datasources`, so that the next one
//! begins empty: the one that has not ended has the datasource's id there, an ended one the id of its scope
//! (`press-4~1`), under which the views show it.
//!
//! When an incarnation ends its row gets that name, and nothing is moved. In a cluster the log may be ahead of the
//! registry: records that were stored as another incarnation's are put right when the next one is known to have begun.

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension, params};

use super::insert::note_gap;
use super::quarantined::{CREATE_MOVED, for_each_moved_topic, forget_moved, restore_moved};
use super::retention::{forget_if_empty, forget_sizes};
use super::samples;
use super::schema::{offset_from_sql, sql_offset};
use crate::log::{IncarnationHistory, IncarnationStep, WithheldSnapshot};
use crate::message::{DatasourceId, Incarnation, KeyId, Offset};

/// How many records one transaction of a purge removes: storage goes on in between, and a kill loses little.
const PURGE_RECORDS_PER_TRANSACTION: i64 = 10_000;

/// What `datasources` calls an incarnation.
pub(in crate::consume) fn shown_name(
    datasource: &str,
    incarnation: Incarnation,
    history: &IncarnationHistory,
) -> String {
    match history.has_ended(incarnation) {
        true => format!("{datasource}~{incarnation}"),
        false => datasource.to_owned(),
    }
}

/// The row id of the incarnation whose scope this is, if it has records.
pub(in crate::consume) fn row_id_of_scope(
    connection: &Connection,
    scope: &DatasourceId,
) -> rusqlite::Result<Option<i64>> {
    let (id, incarnation) = scope.of_scope();
    connection
        .prepare_cached("SELECT id FROM datasources WHERE incarnation = ?3 AND datasource IN (?1, ?2)")?
        .query_row(params![id.as_str(), format!("{id}~{incarnation}"), incarnation], |row| row.get(0))
        .optional()
}

/// Makes the tables follow a step of an incarnation, in the transaction that `connection` is in. A purge is not made
/// here: see [`purge_some`].
pub(super) fn follow_step(
    connection: &Connection,
    datasource: &DatasourceId,
    incarnation: Incarnation,
    step: &IncarnationStep,
    left_out: &WithheldSnapshot,
    keeps_samples: bool,
) -> rusqlite::Result<()> {
    let Some(history) = left_out.history(datasource.as_str()) else { return Ok(()) };
    match step {
        IncarnationStep::Ended { .. } => {
            let ended = format!("{datasource}~{incarnation}");
            connection.execute(
                "UPDATE datasources SET datasource = ?2 WHERE datasource = ?1 AND incarnation = ?3",
                params![datasource.as_str(), ended, incarnation],
            )?;
            Ok(())
        }
        IncarnationStep::Begun { first_offset, .. } => {
            let (earlier, scope) = (datasource.scope(incarnation - 1), datasource.scope(incarnation));
            move_misplaced(connection, &earlier, *first_offset, history, keeps_samples)?;
            move_misplaced(connection, &scope, 0, history, keeps_samples)
        }
        IncarnationStep::Purged => Ok(()),
    }
}

/// Moves what is stored as `scope` from an offset on, and is of other incarnations, to those.
pub(super) fn move_misplaced(
    connection: &Connection,
    scope: &DatasourceId,
    from: Offset,
    history: &IncarnationHistory,
    keeps_samples: bool,
) -> rusqlite::Result<()> {
    let Some(row) = row_id_of_scope(connection, scope)? else { return Ok(()) };
    let (datasource, incarnation) = scope.of_scope();
    connection.execute_batch(CREATE_MOVED)?;
    for table in ["entries", "quarantined"] {
        let mut targets = BTreeSet::new();
        for_each_stored(connection, table, row, from, history, |_, _, target| {
            targets.insert(target);
            Ok(())
        })?;
        for target in targets.into_iter().filter(|target| *target != incarnation) {
            connection.execute("DELETE FROM temp.moved", [])?;
            let mut insert = connection.prepare("INSERT INTO temp.moved VALUES (?1, ?2)")?;
            for_each_stored(connection, table, row, from, history, |offset, topic, of| match of == target {
                true => insert.execute([offset, topic]).map(drop),
                false => Ok(()),
            })?;
            let name = shown_name(datasource.as_str(), target, history);
            move_selected(connection, table, (&datasource.scope(target), &name), keeps_samples)?;
        }
    }
    Ok(())
}

/// Calls `each` with the offset and the topic of the records in a row of `datasources` from an offset on, and the
/// incarnation that each is of.
fn for_each_stored(
    connection: &Connection,
    table: &str,
    row: i64,
    from: Offset,
    history: &IncarnationHistory,
    mut each: impl FnMut(i64, i64, Incarnation) -> rusqlite::Result<()>,
) -> rusqlite::Result<()> {
    let mut select = connection.prepare(&format!(
        "SELECT e.offset, e.topic_id, e.received_us, o.key_id FROM {table} e JOIN origins o ON o.id = e.origin_id
         WHERE e.datasource_id = ?1 AND e.offset >= ?2"
    ))?;
    let mut rows = select.query([row, sql_offset(from)])?;
    while let Some(row) = rows.next()? {
        let (offset, topic): (i64, i64) = (row.get(0)?, row.get(1)?);
        let Ok(key) = KeyId::parse(row.get_ref(3)?.as_str()?) else { continue };
        each(offset, topic, history.incarnation_of(key, row.get(2)?, offset_from_sql(offset)))?;
    }
    Ok(())
}

/// Moves the records in `temp.moved` to an incarnation, with the newest values that they bring.
fn move_selected(
    connection: &Connection,
    table: &str,
    (scope, name): (&DatasourceId, &str),
    keeps_samples: bool,
) -> rusqlite::Result<()> {
    let to = ensure_row(connection, scope, name)?;
    connection.execute(
        "INSERT OR IGNORE INTO topics (datasource_id, topic, latest_offset)
         SELECT DISTINCT ?1, t.topic, -1 FROM temp.moved m JOIN topics t ON t.id = m.topic_id",
        [to],
    )?;
    // They have their origins still, and so have others of where they are now.
    connection.execute(
        &format!(
            "UPDATE origins SET datasource_id = NULL
             WHERE id IN (SELECT origin_id FROM {table} WHERE offset IN (SELECT offset FROM temp.moved))"
        ),
        [],
    )?;
    connection.execute(
        &format!(
            "UPDATE {table} SET datasource_id = ?1, topic_id = (
                 SELECT n.id FROM topics t JOIN topics n ON n.topic = t.topic AND n.datasource_id = ?1
                 WHERE t.id = {table}.topic_id)
             WHERE offset IN (SELECT offset FROM temp.moved)"
        ),
        [to],
    )?;
    let has_values = table == "entries";
    for_each_moved_topic(connection, |topic_id| {
        if has_values {
            forget_moved(connection, topic_id)?;
        }
        forget_if_empty(connection, topic_id).map(drop)
    })?;
    if !has_values {
        return Ok(());
    }
    connection.execute(
        "UPDATE temp.moved SET topic_id = (SELECT topic_id FROM entries e WHERE e.offset = moved.offset)",
        [],
    )?;
    for_each_moved_topic(connection, |topic_id| restore_moved(connection, topic_id, keeps_samples))
}

/// The row of the incarnation with this scope, which has this name then; without one, makes it.
pub(super) fn ensure_row(connection: &Connection, scope: &DatasourceId, name: &str) -> rusqlite::Result<i64> {
    let (_, incarnation) = scope.of_scope();
    // Another incarnation may still have the name: by another registry, or by rules that were not followed.
    connection
        .prepare_cached(
            "UPDATE datasources SET datasource = datasource || '~' || incarnation
             WHERE datasource = ?1 AND incarnation <> ?2",
        )?
        .execute(params![name, incarnation])?;
    if let Some(row) = row_id_of_scope(connection, scope)? {
        connection
            .prepare_cached("UPDATE datasources SET datasource = ?1 WHERE id = ?2 AND datasource <> ?1")?
            .execute(params![name, row])?;
        return Ok(row);
    }
    connection
        .prepare_cached("INSERT INTO datasources (datasource, incarnation) VALUES (?1, ?2) RETURNING id")?
        .query_row(params![name, incarnation], |row| row.get(0))
}

/// Removes some of what is stored of an incarnation, in the transaction that `connection` is in. Returns whether
/// nothing is left of it.
pub(super) fn purge_some(connection: &Connection, scope: &DatasourceId) -> rusqlite::Result<bool> {
    let Some(row) = row_id_of_scope(connection, scope)? else { return Ok(true) };
    forget_sizes(connection)?;
    note_gap(connection, i64::MAX)?;
    let mut left = PURGE_RECORDS_PER_TRANSACTION;
    for table in ["entries", "quarantined"] {
        let removed = connection.execute(
            &format!(
                "DELETE FROM {table} WHERE offset IN (SELECT offset FROM {table} WHERE datasource_id = ?1 LIMIT ?2)"
            ),
            [row, left],
        )?;
        left -= i64::try_from(removed).unwrap_or(i64::MAX);
    }
    if left > 0 {
        left -= i64::try_from(samples::purge_some(connection, row, left)?).unwrap_or(i64::MAX);
    }
    if left <= 0 {
        return Ok(false);
    }
    connection.execute(
        "DELETE FROM latest_values WHERE topic_id IN (SELECT id FROM topics WHERE datasource_id = ?1)",
        [row],
    )?;
    connection.execute("DELETE FROM topics WHERE datasource_id = ?1", [row])?;
    connection.execute("DELETE FROM origins WHERE datasource_id = ?1", [row])?;
    connection.execute("DELETE FROM retention WHERE datasource_id = ?1", [row])?;
    connection.execute("DELETE FROM datasources WHERE id = ?1", [row])?;
    Ok(true)
}

/// Removes the origins of the keys of a purged incarnation, which no other records have.
pub(super) fn purge_origins(
    connection: &Connection,
    keys: impl Iterator<Item = KeyId>,
) -> rusqlite::Result<()> {
    let transaction = connection.unchecked_transaction()?;
    let mut remove = transaction.prepare_cached("DELETE FROM origins WHERE key_id = ?1")?;
    for key in keys {
        remove.execute([key.to_string()])?;
    }
    drop(remove);
    transaction.commit()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::consume::query::{RecordsOrder, RecordsQuery, RecordsReader};
    use crate::consume::sink::sqlite::{RECORDS_FILE_NAME, SqliteSink};
    use crate::consume::testing::record;
    use crate::log::{WithheldChange, WithheldRules};
    use crate::message::{RecordRef, TimeMicros};

    const OLD: KeyId = KeyId([1; 6]);
    const NEW: KeyId = KeyId([2; 6]);
    const ALL: KeyId = KeyId([9; 6]);

    fn press() -> DatasourceId {
        DatasourceId::new("press-4").expect("a slug")
    }

    fn push(rules: &WithheldRules, incarnation: Incarnation, step: IncarnationStep) {
        rules.push(WithheldChange::Incarnation(press(), incarnation, step));
    }

    fn ended(keys: &[KeyId], end: Offset) -> IncarnationStep {
        IncarnationStep::Ended { keys: keys.into(), end }
    }

    fn begun(first_offset: Offset) -> IncarnationStep {
        IncarnationStep::Begun { first_offset, since: TimeMicros::MIN }
    }

    fn by(key_id: KeyId, offset: Offset, topic: &'static str) -> RecordRef<'static> {
        RecordRef { key_id, ..record(offset, "press-4", topic, b"1") }
    }

    /// The offsets of an incarnation, and those of its newest values.
    fn stored(dir: &std::path::Path, incarnation: Incarnation) -> (Vec<Offset>, Vec<(String, Offset)>) {
        let reader = RecordsReader::new(dir);
        let scope = press().scope(incarnation);
        let query = RecordsQuery {
            scope: scope.clone(),
            topic: None,
            from: None,
            to: None,
            event_from: None,
            event_to: None,
            after_offset: None,
            before_offset: None,
            order: RecordsOrder::Oldest,
            key_id: None,
            limit: 100,
        };
        let records = reader.records(&query).expect("reads").records;
        let latest = reader.latest(&scope, None).expect("reads").topics;
        (
            records.iter().map(|record| record.offset).collect(),
            latest.into_iter().map(|topic| (topic.topic, topic.offset)).collect(),
        )
    }

    fn latest(of: &[(&str, Offset)]) -> Vec<(String, Offset)> {
        of.iter().map(|(topic, offset)| ((*topic).to_owned(), *offset)).collect()
    }

    fn open(dir: &std::path::Path) -> SqliteSink {
        SqliteSink::open(&dir.join(RECORDS_FILE_NAME)).expect("opens")
    }

    #[test]
    fn the_next_incarnation_begins_empty_and_a_late_record_of_a_dead_key_is_of_the_last_one() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (mut sink, rules) = (open(dir.path()), WithheldRules::default());
        sink.store([by(OLD, 0, "a"), by(ALL, 1, "b")].into_iter(), 2, false).expect("stored");
        push(&rules, 1, ended(&[OLD], Offset::MAX));
        push(&rules, 2, begun(2));
        sink.reconcile(&rules).expect("reconciled");
        assert_eq!(stored(dir.path(), 2), (vec![], vec![]));
        sink.store([by(NEW, 2, "a"), by(OLD, 3, "a"), by(ALL, 4, "b")].into_iter(), 5, false)
            .expect("stored");
        assert_eq!(stored(dir.path(), 1), (vec![0, 1, 3], latest(&[("a", 3), ("b", 1)])));
        assert_eq!(stored(dir.path(), 2), (vec![2, 4], latest(&[("a", 2), ("b", 4)])));
        let shown = sink.connection().prepare("SELECT DISTINCT datasource FROM records ORDER BY 1").and_then(
            |mut select| select.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<Vec<String>>>(),
        );
        assert_eq!(shown.expect("reads"), ["press-4", "press-4~1"]);
    }

    #[test]
    fn what_was_stored_before_its_incarnation_was_known_is_put_right() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (mut sink, rules) = (open(dir.path()), WithheldRules::default());
        // The log is ahead of the registry: 3 to 5 are of the next incarnation already.
        let records = [by(OLD, 0, "a"), by(ALL, 1, "b"), by(OLD, 2, "c"), by(NEW, 3, "a"), by(OLD, 4, "b")];
        sink.store(records.into_iter(), 5, false).expect("stored");
        push(&rules, 1, ended(&[OLD], 5));
        sink.reconcile(&rules).expect("reconciled");
        sink.store([by(ALL, 5, "d"), by(ALL, 6, "d")].into_iter(), 7, false).expect("stored");
        assert_eq!(stored(dir.path(), 2).0, [5, 6], "behind the end that was known");
        push(&rules, 2, begun(3));
        sink.reconcile(&rules).expect("reconciled");
        assert_eq!(stored(dir.path(), 1), (vec![0, 1, 2, 4], latest(&[("a", 0), ("b", 4), ("c", 2)])));
        assert_eq!(stored(dir.path(), 2), (vec![3, 5, 6], latest(&[("a", 3), ("d", 6)])));
    }

    #[test]
    fn all_rules_at_once_lead_to_the_same_as_one_by_one() {
        const THIRD: KeyId = KeyId([3; 6]);
        let steps = [
            (1, ended(&[OLD], 3)),
            (2, begun(3)),
            (2, ended(&[NEW], 6)),
            (1, IncarnationStep::Purged),
            (3, begun(6)),
        ];
        let keys = [OLD, ALL, OLD, NEW, ALL, OLD, THIRD, ALL, NEW];
        let records = || keys.into_iter().zip(0..).map(|(key, offset)| by(key, offset, "a"));
        let mut contents = Vec::new();
        for together in [true, false] {
            let dir = tempfile::tempdir().expect("temporary directory");
            let (mut sink, rules) = (open(dir.path()), WithheldRules::default());
            sink.store(records(), 9, false).expect("stored");
            for (incarnation, step) in steps.clone() {
                push(&rules, incarnation, step);
                if !together {
                    sink.reconcile(&rules).expect("reconciled");
                }
            }
            sink.reconcile(&rules).expect("reconciled");
            contents.push([1, 2, 3].map(|incarnation| stored(dir.path(), incarnation).0));
        }
        assert_eq!(contents[0], [vec![], vec![3, 4, 8], vec![6, 7]]);
        assert_eq!(contents[0], contents[1]);
    }

    /// What `datasources` calls each incarnation.
    fn names(sink: &SqliteSink) -> Vec<(String, Incarnation)> {
        let mut select = sink
            .connection()
            .prepare("SELECT datasource, incarnation FROM datasources ORDER BY incarnation")
            .expect("SQL");
        let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).expect("reads");
        rows.collect::<rusqlite::Result<_>>().expect("reads")
    }

    fn named(of: &[(&str, Incarnation)]) -> Vec<(String, Incarnation)> {
        of.iter().map(|(name, incarnation)| ((*name).to_owned(), *incarnation)).collect()
    }

    #[test]
    fn incarnations_by_another_registry_stay_apart_and_storage_goes_on() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (mut sink, rules) = (open(dir.path()), WithheldRules::default());
        push(&rules, 1, ended(&[OLD], Offset::MAX));
        push(&rules, 2, begun(1));
        sink.reconcile(&rules).expect("reconciled");
        sink.store([by(OLD, 0, "a"), by(NEW, 1, "a")].into_iter(), 2, false).expect("stored");
        assert_eq!(names(&sink), named(&[("press-4~1", 1), ("press-4", 2)]));
        drop(sink);

        // The registry was made anew: it knows one incarnation, and then two.
        let (mut sink, rules) = (open(dir.path()), WithheldRules::default());
        sink.reconcile(&rules).expect("reconciled");
        sink.store([by(ALL, 2, "a")].into_iter(), 3, false).expect("stored");
        assert_eq!(names(&sink), named(&[("press-4", 1), ("press-4~2", 2)]));
        assert_eq!([1, 2].map(|incarnation| stored(dir.path(), incarnation).0), [vec![0, 2], vec![1]]);
        push(&rules, 1, ended(&[ALL], Offset::MAX));
        push(&rules, 2, begun(3));
        sink.reconcile(&rules).expect("reconciled");
        sink.store([by(KeyId([4; 6]), 3, "a")].into_iter(), 4, false).expect("stored");
        assert_eq!(names(&sink), named(&[("press-4~1", 1), ("press-4", 2)]));
        assert_eq!([1, 2].map(|incarnation| stored(dir.path(), incarnation).0), [vec![0, 1, 2], vec![3]]);
        assert_eq!(stored(dir.path(), 2).1, latest(&[("a", 3)]));
    }

    #[test]
    fn a_later_incarnation_by_rules_that_were_not_followed_takes_the_name_of_the_earlier() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = open(dir.path());
        sink.store([by(OLD, 0, "a")].into_iter(), 1, false).expect("stored");
        let earlier = ensure_row(sink.connection(), &press(), "press-4").expect("there");
        let later = ensure_row(sink.connection(), &press().scope(2), "press-4").expect("made");
        assert_ne!(earlier, later);
        assert_eq!(names(&sink), named(&[("press-4~1", 1), ("press-4", 2)]));
        assert_eq!(ensure_row(sink.connection(), &press(), "press-4~1").expect("there"), earlier);
        assert_eq!([1, 2].map(|incarnation| stored(dir.path(), incarnation).0), [vec![0], vec![]]);
    }

    #[test]
    fn new_rules_are_followed_where_more_were_noted_of_another_registry() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (mut sink, rules) = (open(dir.path()), WithheldRules::default());
        for incarnation in 1..4 {
            push(&rules, incarnation, ended(&[], Offset::MAX));
            push(&rules, incarnation + 1, begun(0));
        }
        sink.reconcile(&rules).expect("reconciled");
        assert_eq!(sink.withheld_version(), 6);
        drop(sink);
        let rules = WithheldRules::default();
        let mut sink = open(dir.path());
        sink.store([by(OLD, 0, "a"), by(NEW, 1, "a")].into_iter(), 2, false).expect("stored");
        let rule =
            crate::log::WithheldRule { datasource: press(), key_id: NEW, since: TimeMicros::MIN, below: 2 };
        rules.push(WithheldChange::Withhold(rule));
        sink.reconcile(&rules).expect("reconciled");
        assert_eq!((sink.withheld_version(), stored(dir.path(), 1).0), (1, vec![0]));
        push(&rules, 1, ended(&[OLD, NEW], Offset::MAX));
        push(&rules, 1, IncarnationStep::Purged);
        sink.reconcile(&rules).expect("reconciled");
        assert_eq!((sink.withheld_version(), names(&sink)), (3, vec![]));
        drop(sink);
        assert_eq!(open(dir.path()).withheld_version(), 3);
    }

    #[test]
    fn a_purge_goes_on_after_a_kill_at_any_step_and_nothing_of_it_is_stored_again() {
        let count = u64::try_from(PURGE_RECORDS_PER_TRANSACTION).expect("positive") * 2 + 5;
        for steps in 0..4 {
            let dir = tempfile::tempdir().expect("temporary directory");
            let (mut sink, rules) = (open(dir.path()), WithheldRules::default());
            sink.store((0..count).map(|offset| by(OLD, offset, "a")), count, false).expect("stored");
            push(&rules, 1, ended(&[OLD], Offset::MAX));
            push(&rules, 1, IncarnationStep::Purged);
            for _ in 0..steps {
                purge_some(sink.connection(), &press()).expect("removed");
            }
            // Killed here: the version of the rules is not noted.
            drop(sink);
            let mut sink = open(dir.path());
            sink.reconcile(&rules).expect("reconciled");
            let late = [by(OLD, count, "a"), by(NEW, count + 1, "a")];
            push(&rules, 2, begun(count));
            sink.reconcile(&rules).expect("reconciled");
            sink.store(late.into_iter(), count + 2, false).expect("stored");
            assert_eq!(stored(dir.path(), 1), (vec![], vec![]), "after {steps}");
            assert_eq!(stored(dir.path(), 2).0, [count + 1]);
            let left = ["entries", "topics", "datasources", "latest_values"].map(|table| {
                let select = format!("SELECT count(*) FROM {table}");
                sink.connection().query_row(&select, [], |row| row.get::<_, i64>(0)).expect("reads")
            });
            assert_eq!(left, [1; 4], "after {steps}");
        }
    }

    #[test]
    fn storage_goes_on_while_a_purge_takes_its_time() {
        let count = u64::try_from(PURGE_RECORDS_PER_TRANSACTION).expect("positive") * 2 + 5;
        let dir = tempfile::tempdir().expect("temporary directory");
        let (mut sink, rules) = (open(dir.path()), WithheldRules::default());
        sink.store((0..count).map(|offset| by(OLD, offset, "a")), count, false).expect("stored");
        push(&rules, 1, ended(&[OLD], Offset::MAX));
        push(&rules, 1, IncarnationStep::Purged);
        push(&rules, 2, begun(count));
        push(&rules, 2, ended(&[NEW], Offset::MAX));
        push(&rules, 3, begun(count + 2));
        let (mut steps, mut next, mut left) = (0, count, vec![count]);
        loop {
            let is_done = sink.reconcile_some(&rules).expect("reconciled");
            let here = stored_count(&sink, 1);
            assert!(here < *left.last().expect("there is one") || here == 0, "a step removes something");
            left.push(here);
            let keys = [OLD, NEW, ALL];
            let records = keys.into_iter().zip(next..).map(|(key, offset)| by(key, offset, "a"));
            sink.store(records, next + 3, false).expect("stored");
            (steps, next) = (steps + 1, next + 3);
            assert_eq!(stored_count(&sink, 1), here, "nothing of it is stored again");
            if is_done {
                break;
            }
        }
        assert!(steps > 2, "{left:?}");
        assert_eq!(sink.withheld_version(), rules.version());
        let of = |nth: u64| (0..steps).map(|step| count + 3 * step + nth).collect::<Vec<_>>();
        assert_eq!(stored(dir.path(), 1), (vec![], vec![]));
        assert_eq!([2, 3].map(|incarnation| stored(dir.path(), incarnation).0), [of(1), of(2)]);
        assert_eq!(names(&sink), named(&[("press-4~2", 2), ("press-4", 3)]));
    }

    fn stored_count(sink: &SqliteSink, incarnation: Incarnation) -> u64 {
        let select = "SELECT count(*) FROM entries e JOIN datasources d ON d.id = e.datasource_id
                      WHERE d.incarnation = ?1";
        sink.connection()
            .query_row(select, [incarnation], |row| row.get(0).map(offset_from_sql))
            .expect("reads")
    }

    #[test]
    fn a_purge_leaves_what_is_of_an_incarnation_that_is_not_known_yet() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (mut sink, rules) = (open(dir.path()), WithheldRules::default());
        // The log is ahead of the registry by a whole life.
        sink.store([by(OLD, 0, "a"), by(ALL, 1, "a"), by(NEW, 2, "a")].into_iter(), 3, false)
            .expect("stored");
        push(&rules, 1, ended(&[OLD], 2));
        push(&rules, 1, IncarnationStep::Purged);
        sink.reconcile(&rules).expect("reconciled");
        push(&rules, 2, begun(2));
        sink.reconcile(&rules).expect("reconciled");
        assert_eq!([1, 2].map(|incarnation| stored(dir.path(), incarnation).0), [vec![], vec![2]]);
    }

    #[test]
    fn a_leaked_key_s_records_are_in_the_quarantine_of_their_own_incarnation() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (mut sink, rules) = (open(dir.path()), WithheldRules::default());
        sink.store([by(OLD, 0, "a")].into_iter(), 1, false).expect("stored");
        push(&rules, 1, ended(&[OLD], Offset::MAX));
        push(&rules, 2, begun(1));
        let (datasource, since) = (press(), TimeMicros::MIN);
        let rule = crate::log::WithheldRule { datasource, key_id: OLD, since, below: 1 };
        rules.push(WithheldChange::Withhold(rule));
        sink.reconcile(&rules).expect("reconciled");
        let reader = RecordsReader::new(dir.path());
        assert_eq!(reader.leaked(&press(), OLD).expect("reads").records, 1);
        assert_eq!(reader.leaked(&press().scope(2), OLD).expect("reads").records, 0);
        rules.push(WithheldChange::GiveBack(press(), OLD));
        sink.reconcile(&rules).expect("reconciled");
        assert_eq!(stored(dir.path(), 1).0, [0]);
    }

    #[test]
    fn nothing_of_a_datasource_that_was_never_deleted_changes() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = open(dir.path());
        sink.reconcile(&Arc::new(WithheldRules::default())).expect("nothing to do");
        sink.store([by(OLD, 0, "a")].into_iter(), 1, false).expect("stored");
        assert_eq!(stored(dir.path(), 1), (vec![0], latest(&[("a", 0)])));
    }
}
