//! The rules about leaked keys and deleted datasources, applied to rows that are in the lake: where each row belongs
//! follows from the rules alone, and the files whose rows belong elsewhere are written anew, in one commit.

use std::collections::BTreeSet;

use headgate_bridge_delta::array::cast::AsArray;
use headgate_bridge_delta::array::types::{Int64Type, TimestampMicrosecondType};
use headgate_bridge_delta::array::{Array, RecordBatch};
use headgate_bridge_delta::{AddFile, LakeError, LakeTable, PartitionValues, RowTarget, RowTargets};

use super::columns::{DATASOURCE, DAY, KEY_ID, OFFSET, RECEIVED_AT, partition};
use super::{WITHHELD_MARK, cursor_of, offset_of};
use crate::consume::sink::incarnations::shown_name;
use crate::log::{IncarnationStep, WithheldChange, WithheldSnapshot};
use crate::message::{KeyId, Offset, TimeMicros};

/// Which rows some changes concern.
#[derive(Default)]
struct ConcernedRows {
    /// All of these datasources: incarnations have begun, ended, or are purged.
    datasources: BTreeSet<String>,
    /// Those of these keys, of a datasource or of all.
    keys: Vec<(Option<String>, String)>,
}

impl ConcernedRows {
    fn of<'a>(changes: impl IntoIterator<Item = &'a WithheldChange>) -> Self {
        let mut concerned = Self::default();
        for change in changes {
            match change {
                WithheldChange::Withhold(rule) => {
                    let datasource =
                        (!rule.datasource.is_all()).then(|| rule.datasource.of_scope().0.as_str().to_owned());
                    concerned.keys.push((datasource, rule.key_id.to_string()));
                }
                // What is given back is aside, where everything is looked at.
                WithheldChange::GiveBack(..) => {}
                WithheldChange::Incarnation(datasource, ..) => {
                    concerned.datasources.insert(datasource.as_str().to_owned());
                }
            }
        }
        concerned
    }

    /// Whether rows that are shown under this name are concerned, whatever their keys.
    fn contains_all_of(&self, shown: Option<&str>) -> bool {
        shown.is_some_and(|shown| self.datasources.contains(datasource_of(shown)))
    }

    /// Whether a file may have some of them.
    fn are_in(&self, file: &AddFile) -> bool {
        let shown = file.partition(DATASOURCE);
        if self.contains_all_of(shown) {
            return true;
        }
        let is_named = |datasource: &str| shown.is_none_or(|shown| datasource_of(shown) == datasource);
        let mut keys = self.keys.iter().filter(|(of, _)| of.as_deref().is_none_or(is_named)).peekable();
        if keys.peek().is_none() {
            return false;
        }
        let bounds = file.text_bounds(KEY_ID);
        let is_within = |key: &String| bounds.as_ref().is_none_or(|(min, max)| min <= key && key <= max);
        keys.any(|(_, key)| is_within(key))
    }
}

/// Makes the rows that are in the table, and those aside, follow the rules, whose version is `version` from now on.
/// `changes` are those since the version that they followed, which is at `expected` among the marks. Rows of a later epoch
/// follow other rules, and those that another gateway has made follow newer rules are not sorted by older ones.
///
/// # Errors
/// The table's, and [`LakeError::Superseded`] when one of the marks is elsewhere by now: nothing has changed then.
pub(super) async fn follow(
    table: &mut LakeTable,
    expected: &[(&str, i64)],
    changes: &[WithheldChange],
    left_out: &WithheldSnapshot,
    version: u64,
) -> Result<(), LakeError> {
    let concerned = ConcernedRows::of(changes);
    table
        .rewrite_with_mark(
            Some((WITHHELD_MARK, cursor_of(version))),
            expected,
            |file| concerned.are_in(file),
            |partition, rows| Ok(targets_of(partition, rows, left_out)),
        )
        .await?;
    Ok(())
}

/// Erases the files that earlier versions of the table have of what was purged by these changes. Returns whether one of them
/// is a purge.
pub(super) async fn erase_purged(
    table: &mut LakeTable,
    changes: &[WithheldChange],
) -> Result<bool, LakeError> {
    let is_purge = |change: &&WithheldChange| {
        matches!(change, WithheldChange::Incarnation(_, _, IncarnationStep::Purged))
    };
    let concerned = ConcernedRows::of(changes.iter().filter(is_purge));
    if concerned.datasources.is_empty() {
        return Ok(false);
    }
    let shown = |values: Option<&PartitionValues>| values.and_then(|values| values.get(DATASOURCE)?.clone());
    table
        .erase_removed(|file| concerned.contains_all_of(shown(file.partition_values.as_ref()).as_deref()))
        .await?;
    Ok(true)
}

/// Where the rows of a batch belong.
fn targets_of(
    partition_values: &PartitionValues,
    rows: &RecordBatch,
    left_out: &WithheldSnapshot,
) -> RowTargets {
    let value = |column: &str| partition_values.get(column).and_then(Option::as_deref).unwrap_or_default();
    let (shown, day) = (value(DATASOURCE), value(DAY));
    let mut places: Vec<RowTarget> = Vec::new();
    let mut place_of_row = Vec::with_capacity(rows.num_rows());
    let stays = RowTarget::Table(partition_values.clone());
    for row in 0..rows.num_rows() {
        let place = match row_of(rows, row) {
            None => stays.clone(),
            Some((key_id, received_at, offset)) => {
                target_of(shown, day, key_id, received_at, offset, left_out)
            }
        };
        // There are few: the datasource in its incarnations, aside and nowhere.
        let known = places.iter().position(|known| *known == place);
        place_of_row.push(known.unwrap_or_else(|| {
            places.push(place);
            places.len() - 1
        }));
    }
    let rows_of = |wanted: usize| place_of_row.iter().map(|place| Some(*place == wanted)).collect();
    places.into_iter().enumerate().map(|(number, place)| (place, rows_of(number))).collect()
}

/// What the rules look at, of one row. `None` for a row that is not the gateway's.
pub(super) fn row_of(rows: &RecordBatch, row: usize) -> Option<(KeyId, TimeMicros, Offset)> {
    let keys = rows.column_by_name(KEY_ID)?.as_string_opt::<i32>()?;
    let times = rows.column_by_name(RECEIVED_AT)?.as_primitive_opt::<TimestampMicrosecondType>()?;
    let offsets = rows.column_by_name(OFFSET)?.as_primitive_opt::<Int64Type>()?;
    let key_id = keys.is_valid(row).then(|| KeyId::parse(keys.value(row)).ok())??;
    Some((key_id, times.value(row), offset_of(offsets.value(row))))
}

fn target_of(
    shown: &str,
    day: &str,
    key_id: KeyId,
    received_at: TimeMicros,
    offset: Offset,
    left_out: &WithheldSnapshot,
) -> RowTarget {
    let datasource = datasource_of(shown);
    let mut name = shown.to_owned();
    if let Some(history) = left_out.history(datasource) {
        let incarnation = history.incarnation_of(key_id, received_at, offset);
        if history.is_purged(incarnation) {
            return RowTarget::Nowhere;
        }
        name = shown_name(datasource, incarnation, history);
    }
    if left_out.covers(datasource, key_id, received_at, offset) {
        return RowTarget::Aside;
    }
    RowTarget::Table(partition(&name, day))
}

/// The datasource that is shown under this name, in one of its incarnations.
fn datasource_of(shown: &str) -> &str {
    shown.split_once('~').map_or(shown, |(datasource, _)| datasource)
}
