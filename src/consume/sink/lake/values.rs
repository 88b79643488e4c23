//! Columns of values: the members of payloads that are JSON objects, `v_temp` for `temp`, and of objects in these,
//! `v_state_rpm` for `state.rpm`.
//!
//! The first value that comes under a name decides its type for all datasources: double, boolean or string. A value of
//! another type stays in the payload alone, as do long strings, arrays, and members whose column would have the
//! name of another one's. So do new members once a datasource has brought [`LAKE_VALUE_COLUMNS_OF_ONE_MAX`] columns, or the
//! table is full. A column's comment is the member's name.

use std::fmt;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use headgate_bridge_delta::array::ArrayRef;
use headgate_bridge_delta::array::builder::{BooleanBuilder, Float64Builder, StringBuilder};
use headgate_bridge_delta::{ColumnType, TableColumn, TableSchema};
use serde::Deserializer;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::limits::{
    LAKE_VALUE_BYTES_MAX, LAKE_VALUE_COLUMNS_OF_ONE_MAX, LAKE_VALUE_NAME_BYTES_MAX, SAMPLE_DEPTH_MAX,
};

/// What the names of all columns of values begin with.
const VALUE_PREFIX: &str = "v_";
/// Between the name of a member that is an object and those in it.
const NESTED: char = '.';

/// All columns of values, of the table and of the records that wait.
pub(super) struct ValueColumns {
    columns: Vec<TableColumn>,
    /// Which column a member has; `None`: it has none, and gets none.
    by_member: HashMap<String, Option<usize>>,
    /// The names of all columns, in lower case: to most engines case makes no difference.
    names: HashSet<String>,
    /// How many columns each datasource has brought.
    brought: HashMap<String, usize>,
    columns_max: usize,
    /// Columns from here on may be new to the table.
    known: usize,
}

impl ValueColumns {
    /// Those of the table.
    pub(super) fn new(schema: &TableSchema, columns_max: usize) -> Self {
        let names = schema.names().map(str::to_lowercase).collect();
        let is_value =
            |column: &&TableColumn| column.name.starts_with(VALUE_PREFIX) && column.comment.is_some();
        let columns: Vec<TableColumn> = schema.columns().iter().filter(is_value).cloned().collect();
        let member = |(place, column): (usize, &TableColumn)| Some((column.comment.clone()?, Some(place)));
        let by_member = columns.iter().enumerate().filter_map(member).collect();
        let known = columns.len();
        let mut brought: HashMap<String, usize> = HashMap::new();
        for name in columns.iter().filter_map(|column| column.brought_by.as_ref()) {
            *brought.entry_ref(name).or_insert(0) += 1;
        }
        Self { columns, by_member, names, brought, columns_max, known }
    }

    /// All of them, each in its place.
    pub(super) fn columns(&self) -> &[TableColumn] {
        &self.columns
    }

    /// Those that came since the last call, which the table may not have yet.
    pub(super) fn take_new(&mut self) -> Vec<TableColumn> {
        let new = self.columns[self.known..].to_vec();
        self.known = self.columns.len();
        new
    }

    /// The column of a member whose value has this type.
    fn place_of(&mut self, member: &str, column_type: ColumnType, datasource: &str) -> Option<usize> {
        let place = match self.by_member.get(member) {
            Some(place) => (*place)?,
            None => self.add(member, column_type, datasource)?,
        };
        (self.columns[place].column_type == column_type).then_some(place)
    }

    fn add(&mut self, member: &str, column_type: ColumnType, datasource: &str) -> Option<usize> {
        // What gets no column is not remembered beyond a bound either: names are the devices' to choose.
        if member.len() > LAKE_VALUE_NAME_BYTES_MAX || self.columns.len() >= self.columns_max {
            return None;
        }
        let brought = self.brought.entry_ref(datasource).or_insert(0);
        if *brought >= LAKE_VALUE_COLUMNS_OF_ONE_MAX {
            return None;
        }
        *brought += 1;
        let plain = |c: char| if c.is_alphanumeric() || c == '_' { c } else { '_' };
        let name = format!("{VALUE_PREFIX}{}", member.chars().map(plain).collect::<String>());
        let is_new = self.names.insert(name.to_lowercase());
        let place = is_new.then_some(self.columns.len());
        if is_new {
            let (comment, brought_by) = (Some(member.to_owned()), Some(datasource.to_owned()));
            self.columns.push(TableColumn {
                comment,
                brought_by,
                ..TableColumn::nullable(name, column_type)
            });
        }
        self.by_member.insert(member.to_owned(), place);
        place
    }
}

/// What a value takes in memory beside its text, about; also one that is not there.
const COLUMN_VALUE_BYTES: usize = 9;
/// The rows that a column has room for at first: most datasources bring few records an interval.
pub(super) const COLUMN_ROWS_FIRST: usize = 16;

/// The values of the rows of one file. A column is as long as its last value, until it is finished.
#[derive(Default)]
pub(super) struct ValueBuilders {
    columns: HashMap<usize, ValueBuilder>,
    /// By how many bytes they have grown, about, beside the row that is not counted yet.
    growth: usize,
}

impl ValueBuilders {
    /// Takes the values of a payload, which is that of row `row`. One that is no JSON object has none.
    pub(super) fn read(&mut self, payload: &str, datasource: &str, row: usize, columns: &mut ValueColumns) {
        if !payload.trim_start().starts_with('{') {
            return;
        }
        let member = String::new();
        let mut reader = PayloadReader { builders: self, datasource, row, columns, member, one_by_one: None };
        if serde_json::Deserializer::from_str(payload).deserialize_map(&mut reader).is_err() {
            // A number beyond a double, half a surrogate pair or much nesting costs no other member its column. What is
            // broken off is no JSON: its first members may stand in columns, its payload is there as it came.
            (reader.member, reader.one_by_one) = (String::new(), Some(0));
            let _ = serde_json::Deserializer::from_str(payload).deserialize_map(&mut reader);
        }
    }

    /// The columns, each with `rows` values.
    pub(super) fn finish(self, rows: usize, columns: &[TableColumn]) -> Vec<(TableColumn, ArrayRef)> {
        let mut finished: Vec<_> = self.columns.into_iter().collect();
        finished.sort_unstable_by_key(|(place, _)| *place);
        finished.into_iter().map(|(place, column)| (columns[place].clone(), column.finish(rows))).collect()
    }

    fn append(&mut self, place: usize, row: usize, value: &MemberValue<'_>) {
        let column = self.columns.entry(place).or_insert_with(|| {
            self.growth += (row + COLUMN_ROWS_FIRST) * COLUMN_VALUE_BYTES;
            ValueBuilder::new(value)
        });
        if let MemberValue::Text(text) = value {
            self.growth += text.len();
        }
        column.append(row, value);
    }

    /// How much more memory they take since the last call, with one more row in each column, in bytes.
    pub(super) fn take_growth(&mut self) -> usize {
        std::mem::take(&mut self.growth) + self.columns.len() * COLUMN_VALUE_BYTES
    }
}

/// A value that may stand in a column.
enum MemberValue<'a> {
    Number(f64),
    Flag(bool),
    Text(&'a str),
}

impl MemberValue<'_> {
    fn column_type(&self) -> Option<ColumnType> {
        match self {
            Self::Number(_) => Some(ColumnType::Double),
            Self::Flag(_) => Some(ColumnType::Boolean),
            Self::Text(text) if text.len() <= LAKE_VALUE_BYTES_MAX => Some(ColumnType::Text),
            Self::Text(_) => None,
        }
    }
}

enum ValueBuilder {
    Numbers(Float64Builder, usize),
    Flags(BooleanBuilder, usize),
    Texts(StringBuilder, usize),
}

impl ValueBuilder {
    fn new(first: &MemberValue<'_>) -> Self {
        match first {
            MemberValue::Number(_) => Self::Numbers(Float64Builder::with_capacity(COLUMN_ROWS_FIRST), 0),
            MemberValue::Flag(_) => Self::Flags(BooleanBuilder::with_capacity(COLUMN_ROWS_FIRST), 0),
            MemberValue::Text(_) => Self::Texts(
                StringBuilder::with_capacity(COLUMN_ROWS_FIRST, COLUMN_ROWS_FIRST * COLUMN_VALUE_BYTES),
                0,
            ),
        }
    }

    /// Sets the value of a row; of a member that comes twice the first counts.
    fn append(&mut self, row: usize, value: &MemberValue<'_>) {
        if row < self.len() {
            return;
        }
        self.fill(row);
        match (self, value) {
            (Self::Numbers(numbers, len), MemberValue::Number(value)) => {
                numbers.append_value(*value);
                *len += 1;
            }
            (Self::Flags(flags, len), MemberValue::Flag(value)) => {
                flags.append_value(*value);
                *len += 1;
            }
            (Self::Texts(texts, len), MemberValue::Text(value)) => {
                texts.append_value(value);
                *len += 1;
            }
            _ => {}
        }
    }

    fn len(&self) -> usize {
        let (Self::Numbers(_, len) | Self::Flags(_, len) | Self::Texts(_, len)) = self;
        *len
    }

    /// Rows up to `rows` have no value.
    fn fill(&mut self, rows: usize) {
        let missing = rows.saturating_sub(self.len());
        match self {
            Self::Numbers(numbers, len) => {
                numbers.append_nulls(missing);
                *len += missing;
            }
            Self::Flags(flags, len) => {
                flags.append_nulls(missing);
                *len += missing;
            }
            Self::Texts(texts, len) => {
                (0..missing).for_each(|_| texts.append_null());
                *len += missing;
            }
        }
    }

    fn finish(mut self, rows: usize) -> ArrayRef {
        self.fill(rows);
        match self {
            Self::Numbers(mut numbers, _) => Arc::new(numbers.finish()),
            Self::Flags(mut flags, _) => Arc::new(flags.finish()),
            Self::Texts(mut texts, _) => Arc::new(texts.finish()),
        }
    }
}

/// Reads the members of an object, and of objects in it, without a copy of them.
struct PayloadReader<'a> {
    builders: &'a mut ValueBuilders,
    datasource: &'a str,
    row: usize,
    columns: &'a mut ValueColumns,
    /// The member that is read: `state.rpm`.
    member: String,
    /// How deep it is, if each member is read by itself.
    one_by_one: Option<usize>,
}

impl PayloadReader<'_> {
    fn put(&mut self, value: &MemberValue<'_>) {
        let Some(column_type) = value.column_type() else { return };
        if let Some(place) = self.columns.place_of(&self.member, column_type, self.datasource) {
            self.builders.append(place, self.row, value);
        }
    }
}

/// A member's value.
impl<'de> DeserializeSeed<'de> for &mut PayloadReader<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        let Some(depth) = self.one_by_one else { return from.deserialize_any(self) };
        let value = <&'de RawValue as serde::Deserialize>::deserialize(from)?;
        if depth < SAMPLE_DEPTH_MAX {
            self.one_by_one = Some(depth + 1);
            let _ = serde_json::Deserializer::from_str(value.get()).deserialize_any(&mut *self);
            self.one_by_one = Some(depth);
        }
        Ok(())
    }
}

impl<'de> Visitor<'de> for &mut PayloadReader<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<(), E> {
        self.put(&MemberValue::Flag(value));
        Ok(())
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "the column is of doubles; the payload has the number as it came"
    )]
    fn visit_i64<E>(self, value: i64) -> Result<(), E> {
        self.put(&MemberValue::Number(value as f64));
        Ok(())
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "the column is of doubles; the payload has the number as it came"
    )]
    fn visit_u64<E>(self, value: u64) -> Result<(), E> {
        self.put(&MemberValue::Number(value as f64));
        Ok(())
    }

    fn visit_f64<E>(self, value: f64) -> Result<(), E> {
        self.put(&MemberValue::Number(value));
        Ok(())
    }

    fn visit_str<E>(self, value: &str) -> Result<(), E> {
        self.put(&MemberValue::Text(value));
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
        while elements.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        let outer = self.member.len();
        while members.next_key_seed(MemberPath(&mut self.member))?.is_some() {
            members.next_value_seed(&mut *self)?;
            self.member.truncate(outer);
        }
        Ok(())
    }
}

/// Adds a member's name to those of the objects that it is in.
struct MemberPath<'a>(&'a mut String);

impl<'de> DeserializeSeed<'de> for MemberPath<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_str(self)
    }
}

impl Visitor<'_> for MemberPath<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E>(self, name: &str) -> Result<(), E> {
        if !self.0.is_empty() {
            self.0.push(NESTED);
        }
        self.0.push_str(name);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use headgate_bridge_delta::array::Array;

    use super::*;

    fn columns(payloads: &[&str], columns_max: usize) -> Vec<(String, usize)> {
        let schema = TableSchema::new(&[]).expect("no columns");
        let (mut columns, mut builders) = (ValueColumns::new(&schema, columns_max), ValueBuilders::default());
        for (row, payload) in payloads.iter().enumerate() {
            builders.read(payload, "press-4", row, &mut columns);
        }
        let finished = builders.finish(payloads.len(), columns.columns());
        let values = |array: &ArrayRef| array.len() - array.null_count();
        assert!(finished.iter().all(|(_, array)| array.len() == payloads.len()));
        finished.iter().map(|(column, array)| (column.name.clone(), values(array))).collect()
    }

    #[test]
    fn the_first_value_of_a_name_decides_its_type_and_others_stay_in_the_payload() {
        let payloads = [
            r#"{"t":1,"ok":true,"unit":"C","deep":{"t":2},"list":[1]}"#,
            "21.5",
            r#"{"t":"warm","T":3,"t\u0000":4}"#,
            r#"{"t":5,"t":6,"a b":7,"a.b":8}"#,
            r#"{"t":9"#,
        ];
        let found = columns(&payloads, 100);
        let expected = [("v_t", 3), ("v_ok", 1), ("v_unit", 1), ("v_deep_t", 1), ("v_t_", 1), ("v_a_b", 1)];
        let expected: Vec<_> = expected.map(|(name, values)| (name.to_owned(), values)).to_vec();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_value_that_no_column_takes_costs_the_others_nothing() {
        let deep =
            format!(r#"{{"deep":{}{},"t":4}}"#, r#"{"a":"#.repeat(200), "1".to_owned() + &"}".repeat(200));
        let payloads = [r#"{"big":1e400,"t":1}"#, r#"{"name":"\ud83d","t":2,"state":{"t":3}}"#, &deep];
        let found = columns(&payloads, 100);
        assert_eq!(found, [("v_t".to_owned(), 3), ("v_state_t".to_owned(), 1)]);
    }

    #[test]
    fn no_device_makes_the_table_wider_than_its_bounds() {
        let members: Vec<String> =
            (0..2 * LAKE_VALUE_COLUMNS_OF_ONE_MAX).map(|n| format!(r#""m{n}":{n}"#)).collect();
        let payload = format!("{{{}}}", members.join(","));
        assert_eq!(columns(&[&payload], 10_000).len(), LAKE_VALUE_COLUMNS_OF_ONE_MAX);
        assert_eq!(columns(&[&payload], 3).len(), 3);
        // Nor does it after a restart.
        let mut bounded = ValueColumns::new(&TableSchema::new(&[]).expect("no columns"), 10_000);
        ValueBuilders::default().read(&payload, "press-4", 0, &mut bounded);
        let schema = TableSchema::new(bounded.columns()).expect("columns");
        let mut again = ValueColumns::new(&schema, 10_000);
        let other = payload.replace("\"m", "\"other");
        for (source, expected) in [("press-4", 0), ("boiler", LAKE_VALUE_COLUMNS_OF_ONE_MAX)] {
            ValueBuilders::default().read(&other, source, 0, &mut again);
            assert_eq!(again.take_new().len(), expected, "{source}");
        }
    }
}
