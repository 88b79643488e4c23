//! What an `add` action says of the rows of a file: how many, and the bounds of their columns.
//!
//! The bounds are those that the Parquet file has. Timestamps are in milliseconds there; bounds in microseconds are
//! rounded outward, so that nobody who skips files by them misses a row.

use arrow_schema::{DataType, Field, Schema, TimeUnit};
use jiff::Timestamp;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::statistics::Statistics;
use serde_json::{Map, Value, json};

/// The longest text that stands in bounds, in bytes: a longer one is left out rather than cut.
const TEXT_BOUND_BYTES_MAX: usize = 64;

/// The JSON of `stats`.
pub(crate) fn file_stats(schema: &Schema, parquet: &ParquetMetaData, rows: u64) -> String {
    let (mut least, mut greatest, mut nulls) = (Map::new(), Map::new(), Map::new());
    for (index, field) in schema.fields().iter().enumerate() {
        let Some(bounds) = ColumnBounds::of(parquet, index) else {
            continue;
        };
        nulls.insert(field.name().clone(), json!(bounds.nulls));
        if let (Some(min), Some(max)) = (
            bound_value(field, bounds.least, Outward::Down),
            bound_value(field, bounds.greatest, Outward::Up),
        ) {
            least.insert(field.name().clone(), min);
            greatest.insert(field.name().clone(), max);
        }
    }
    json!({ "numRecords": rows, "minValues": least, "maxValues": greatest, "nullCount": nulls }).to_string()
}

/// Which way a bound is rounded.
#[derive(Clone, Copy)]
enum Outward {
    Down,
    Up,
}

/// A value as Parquet's statistics have it.
#[derive(Clone, PartialEq, PartialOrd)]
enum BoundValue {
    Integer(i64),
    Float(f64),
    Text(Vec<u8>),
}

/// The bounds of a column over all row groups.
#[derive(Default)]
struct ColumnBounds {
    least: Option<BoundValue>,
    greatest: Option<BoundValue>,
    nulls: u64,
}

impl ColumnBounds {
    /// `None` where a row group says nothing of the column.
    fn of(parquet: &ParquetMetaData, column: usize) -> Option<Self> {
        let mut bounds = Self::default();
        let mut are_known = true;
        for group in parquet.row_groups() {
            let chunk = group.column(column);
            let statistics = chunk.statistics()?;
            let nulls = statistics.null_count_opt()?;
            bounds.nulls += nulls;
            if i64::try_from(nulls) == Ok(chunk.num_values()) {
                continue;
            }
            match group_bounds(statistics) {
                Some((least, greatest)) if are_known => bounds.widen(least, greatest),
                _ => are_known = false,
            }
        }
        if !are_known {
            (bounds.least, bounds.greatest) = (None, None);
        }
        Some(bounds)
    }

    fn widen(&mut self, least: BoundValue, greatest: BoundValue) {
        if self.least.as_ref().is_none_or(|known| least < *known) {
            self.least = Some(least);
        }
        if self.greatest.as_ref().is_none_or(|known| greatest > *known) {
            self.greatest = Some(greatest);
        }
    }
}

fn group_bounds(statistics: &Statistics) -> Option<(BoundValue, BoundValue)> {
    let (least, greatest) = match statistics {
        Statistics::Int32(s) => {
            (BoundValue::Integer((*s.min_opt()?).into()), BoundValue::Integer((*s.max_opt()?).into()))
        }
        Statistics::Int64(s) => (BoundValue::Integer(*s.min_opt()?), BoundValue::Integer(*s.max_opt()?)),
        // Engines differ in where NaN stands; no bounds are right for all.
        Statistics::Double(s) if s.nan_count_opt().unwrap_or(0) > 0 => return None,
        Statistics::Double(s) => (BoundValue::Float(*s.min_opt()?), BoundValue::Float(*s.max_opt()?)),
        Statistics::ByteArray(s) if s.min_is_exact() && s.max_is_exact() => {
            (BoundValue::Text(s.min_opt()?.data().to_vec()), BoundValue::Text(s.max_opt()?.data().to_vec()))
        }
        _ => return None,
    };
    Some((least, greatest))
}

fn bound_value(field: &Field, bound: Option<BoundValue>, outward: Outward) -> Option<Value> {
    match (field.data_type(), bound?) {
        (DataType::Int64 | DataType::Int32, BoundValue::Integer(value)) => Some(json!(value)),
        (DataType::Timestamp(TimeUnit::Microsecond, _), BoundValue::Integer(us)) => {
            let ms = match outward {
                Outward::Down => us.div_euclid(1000),
                Outward::Up => us.div_euclid(1000) + i64::from(us.rem_euclid(1000) > 0),
            };
            Some(json!(format!("{:.3}", Timestamp::from_millisecond(ms).ok()?)))
        }
        (DataType::Date32, BoundValue::Integer(days)) => {
            let day = Timestamp::from_second(days.checked_mul(24 * 60 * 60)?).ok()?;
            Some(json!(day.strftime("%Y-%m-%d").to_string()))
        }
        (DataType::Float64, BoundValue::Float(value)) if value.is_finite() => Some(json!(value)),
        // Engines differ in the order of what is beyond ASCII.
        (DataType::Utf8, BoundValue::Text(text)) if text.len() <= TEXT_BOUND_BYTES_MAX && text.is_ascii() => {
            Some(json!(std::str::from_utf8(&text).ok()?))
        }
        _ => None,
    }
}
