//! The rules about leaked keys and deleted datasources, applied to rows that are in the lake: where each row belongs
//! follows from the rules alone, and the files whose rows belong elsewhere are written anew, in one commit.

use std::collections::{BTreeMap, BTreeSet};

use headgate_bridge_delta::array::cast::AsArray;
use headgate_bridge_delta::array::types::{Int64Type, TimestampMicrosecondType};
use headgate_bridge_delta::array::{Array, RecordBatch};
use headgate_bridge_delta::{LakeError, LakeTable, PartitionValues, RowTarget, RowTargets};

use super::columns::{DATASOURCE, DAY, KEY_ID, OFFSET, RECEIVED_AT, partition};
use super::offset_of;
use crate::consume::sink::incarnations::shown_name;
use crate::log::{IncarnationStep, WithheldChange, WithheldSnapshot};
use crate::message::{KeyId, Offset, TimeMicros};

/// Which datasources some changes concern.
#[derive(Default)]
struct ConcernedSources {
    are_all: bool,
    some: BTreeSet<String>,
}

impl ConcernedSources {
    fn of(changes: &[WithheldChange]) -> Self {
        let mut concerned = Self::default();
        for change in changes {
            let datasource = match change {
                WithheldChange::Withhold(rule) => &rule.datasource,
                WithheldChange::GiveBack(datasource, _) | WithheldChange::Incarnation(datasource, ..) => {
                    datasource
                }
            };
            if datasource.is_all() {
                concerned.are_all = true;
            } else {
                concerned.some.insert(datasource.as_str().to_owned());
            }
        }
        concerned
    }

    /// Whether rows that are shown under this name are concerned.
    fn contains(&self, shown: Option<&str>) -> bool {
        self.are_all || shown.is_some_and(|shown| self.some.contains(datasource_of(shown)))
    }
}

/// Makes the rows that are in the table, and those aside, follow the rules. `changes` are those since the version that they
/// followed. What is purged is nowhere afterwards, in no file that an earlier version of the table has either.
pub(super) async fn follow(
    table: &mut LakeTable,
    changes: &[WithheldChange],
    left_out: &WithheldSnapshot,
) -> Result<(), LakeError> {
    let concerned = ConcernedSources::of(changes);
    table
        .rewrite(
            |file| concerned.contains(file.partition(DATASOURCE)),
            |partition, rows| Ok(targets_of(partition, rows, left_out)),
        )
        .await?;
    let is_purge = |change: &WithheldChange| {
        matches!(change, WithheldChange::Incarnation(_, _, IncarnationStep::Purged))
    };
    if changes.iter().any(is_purge) {
        let shown = |values: Option<&PartitionValues>| {
            values.and_then(|values| values.get(DATASOURCE)?.clone()).unwrap_or_default()
        };
        table.erase_removed(|file| concerned.contains(Some(&shown(file.partition_values.as_ref())))).await?;
    }
    Ok(())
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
    let mut known: BTreeMap<String, usize> = BTreeMap::new();
    let stays = RowTarget::Table(partition_values.clone());
    for row in 0..rows.num_rows() {
        let place = match row_of(rows, row) {
            None => stays.clone(),
            Some((key_id, received_at, offset)) => {
                target_of(shown, day, key_id, received_at, offset, left_out)
            }
        };
        let name = format!("{place:?}");
        let number = *known.entry(name).or_insert_with(|| {
            places.push(place);
            places.len() - 1
        });
        place_of_row.push(number);
    }
    let rows_of = |wanted: usize| place_of_row.iter().map(|place| Some(*place == wanted)).collect();
    places.into_iter().enumerate().map(|(number, place)| (place, rows_of(number))).collect()
}

/// What the rules look at, of one row. `None` for a row that is not the gateway's.
fn row_of(rows: &RecordBatch, row: usize) -> Option<(KeyId, TimeMicros, Offset)> {
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
