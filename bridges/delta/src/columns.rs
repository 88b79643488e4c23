//! The columns of a table: what the log's `schemaString` says, and what Arrow calls it.

use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema, SchemaRef, TimeUnit};
use serde_json::{Map, Value, json};

/// Characters that a column's name has not, without a mapping of names that older readers do not know.
const FORBIDDEN_IN_NAMES: &[char] = &[' ', ',', ';', '{', '}', '(', ')', '\n', '\t', '='];
/// The zone of all timestamps.
const UTC: &str = "UTC";

/// Why columns are not those of a table.
#[derive(Debug, thiserror::Error)]
pub enum TableSchemaError {
    /// A name that Delta does not take.
    #[error("a column cannot be called {0:?}")]
    Name(String),
    /// The table has a column of that name (case does not count), of another type.
    #[error("the table has a column {column:?} of another type")]
    Conflict {
        /// Its name.
        column: String,
    },
    /// A required column that is new: the rows that are there have no value for it.
    #[error("the column {0:?} is new and cannot be required")]
    Required(String),
    /// A schema that is no struct of named columns.
    #[error("the table's schema: {0}")]
    Unreadable(String),
}

/// The types of columns that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ColumnType {
    /// 64-bit integers.
    Long,
    /// 64-bit floating point numbers.
    Double,
    /// True or false.
    Boolean,
    /// UTF-8.
    Text,
    /// Bytes.
    Binary,
    /// Microseconds since the Unix epoch, in UTC.
    Timestamp,
    /// Days since the Unix epoch.
    Date,
}

impl ColumnType {
    const ALL: [Self; 7] =
        [Self::Long, Self::Double, Self::Boolean, Self::Text, Self::Binary, Self::Timestamp, Self::Date];

    /// Its name in Delta's schema.
    pub fn delta_name(self) -> &'static str {
        match self {
            Self::Long => "long",
            Self::Double => "double",
            Self::Boolean => "boolean",
            Self::Text => "string",
            Self::Binary => "binary",
            Self::Timestamp => "timestamp",
            Self::Date => "date",
        }
    }

    /// Its type in memory.
    pub fn arrow_type(self) -> DataType {
        match self {
            Self::Long => DataType::Int64,
            Self::Double => DataType::Float64,
            Self::Boolean => DataType::Boolean,
            Self::Text => DataType::Utf8,
            Self::Binary => DataType::Binary,
            Self::Timestamp => DataType::Timestamp(TimeUnit::Microsecond, Some(UTC.into())),
            Self::Date => DataType::Date32,
        }
    }
}

/// Where a column's metadata say whose values it was added for.
const BROUGHT_BY: &str = "headgate.broughtBy";

/// A column: its name, its type, and what it was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableColumn {
    /// Its name.
    pub name: String,
    /// The type of its values.
    pub column_type: ColumnType,
    /// Whether each row has a value.
    pub is_required: bool,
    /// A note that the schema keeps beside it.
    pub comment: Option<String>,
    /// Whose values it was added for, which the schema keeps too.
    pub brought_by: Option<String>,
}

impl TableColumn {
    /// A column in which rows may have no value.
    pub fn nullable(name: impl Into<String>, column_type: ColumnType) -> Self {
        Self { name: name.into(), column_type, is_required: false, comment: None, brought_by: None }
    }

    /// A column in which each row has a value.
    pub fn required(name: impl Into<String>, column_type: ColumnType) -> Self {
        Self { is_required: true, ..Self::nullable(name, column_type) }
    }

    /// Whether a table may have a column of that name.
    pub fn may_be_called(name: &str) -> bool {
        !name.is_empty() && !name.contains(FORBIDDEN_IN_NAMES)
    }

    /// What Arrow calls it.
    pub fn arrow_field(&self) -> Field {
        Field::new(&self.name, self.column_type.arrow_type(), !self.is_required)
    }

    fn to_json(&self) -> Value {
        let mut metadata = Map::new();
        if let Some(comment) = &self.comment {
            metadata.insert("comment".to_owned(), json!(comment));
        }
        if let Some(name) = &self.brought_by {
            metadata.insert(BROUGHT_BY.to_owned(), json!(name));
        }
        json!({
            "name": self.name, "type": self.column_type.delta_name(), "nullable": !self.is_required, "metadata": metadata,
        })
    }

    /// `None` for a type that is not written here: somebody else has added the column.
    fn from_json(field: &Value) -> Option<Self> {
        let delta_name = field["type"].as_str()?;
        Some(Self {
            name: field["name"].as_str()?.to_owned(),
            column_type: ColumnType::ALL.into_iter().find(|t| t.delta_name() == delta_name)?,
            is_required: field["nullable"] == json!(false),
            comment: field["metadata"]["comment"].as_str().map(str::to_owned),
            brought_by: field["metadata"][BROUGHT_BY].as_str().map(str::to_owned),
        })
    }
}

/// All columns of a table, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct TableSchema {
    /// As the log has them, with those whose type is unknown here.
    fields: Vec<Value>,
    columns: Vec<TableColumn>,
}

impl TableSchema {
    /// A schema of these columns.
    ///
    /// # Errors
    ///
    /// Two of the same name, or a name that cannot be.
    pub fn new(columns: &[TableColumn]) -> Result<Self, TableSchemaError> {
        let mut schema = Self { fields: Vec::new(), columns: Vec::new() };
        for column in columns {
            if schema.has_name(&column.name) {
                return Err(TableSchemaError::Conflict { column: column.name.clone() });
            }
            schema.push(column)?;
        }
        Ok(schema)
    }

    /// The columns whose types are known here.
    pub fn columns(&self) -> &[TableColumn] {
        &self.columns
    }

    /// The column of that name; case does not count, as in most engines.
    pub fn column(&self, name: &str) -> Option<&TableColumn> {
        self.columns.iter().find(|c| c.name.eq_ignore_ascii_case(name))
    }

    /// The names of all columns, of whatever type.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.fields.iter().filter_map(|field| field["name"].as_str())
    }

    /// Whether a column of that name is there, of whatever type.
    pub fn has_name(&self, name: &str) -> bool {
        self.fields.iter().any(|f| f["name"].as_str().is_some_and(|n| n.eq_ignore_ascii_case(name)))
    }

    /// This schema with those of `columns` that it has not yet; `None` when it has all of them.
    ///
    /// # Errors
    ///
    /// A column that is there with another type, one that is new and required, or a name that cannot be.
    pub fn extended(&self, columns: &[TableColumn]) -> Result<Option<Self>, TableSchemaError> {
        let mut extended = None;
        for column in columns {
            let schema = extended.as_ref().unwrap_or(self);
            if schema.has_name(&column.name) {
                if schema
                    .column(&column.name)
                    .is_none_or(|c| c.column_type != column.column_type || c.name != column.name)
                {
                    return Err(TableSchemaError::Conflict { column: column.name.clone() });
                }
                continue;
            }
            if column.is_required {
                return Err(TableSchemaError::Required(column.name.clone()));
            }
            extended.get_or_insert_with(|| self.clone()).push(column)?;
        }
        Ok(extended)
    }

    /// The schema of files, which have no columns of partitions.
    pub fn file_schema(&self, partitions: &[String]) -> SchemaRef {
        let fields: Vec<Field> = self
            .columns
            .iter()
            .filter(|c| !partitions.contains(&c.name))
            .map(TableColumn::arrow_field)
            .collect();
        Arc::new(Schema::new(fields))
    }

    /// `schemaString`.
    pub(crate) fn to_json(&self) -> String {
        json!({ "type": "struct", "fields": self.fields }).to_string()
    }

    /// From `schemaString`.
    pub(crate) fn from_json(text: &str) -> Result<Self, TableSchemaError> {
        let schema: Value =
            serde_json::from_str(text).map_err(|e| TableSchemaError::Unreadable(e.to_string()))?;
        let Some(fields) = schema["fields"].as_array() else {
            return Err(TableSchemaError::Unreadable("it has no fields".to_owned()));
        };
        Ok(Self {
            fields: fields.clone(),
            columns: fields.iter().filter_map(TableColumn::from_json).collect(),
        })
    }

    fn push(&mut self, column: &TableColumn) -> Result<(), TableSchemaError> {
        if !TableColumn::may_be_called(&column.name) {
            return Err(TableSchemaError::Name(column.name.clone()));
        }
        self.fields.push(column.to_json());
        self.columns.push(column.clone());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_survive_the_log_and_case_does_not_make_a_new_one() {
        let fixed = [
            TableColumn::required("offset", ColumnType::Long),
            TableColumn::nullable("at", ColumnType::Timestamp),
        ];
        let schema = TableSchema::new(&fixed).expect("columns");
        assert_eq!(TableSchema::from_json(&schema.to_json()).expect("JSON"), schema);
        let brought_by = Some("press-4".to_owned());
        let more = [TableColumn { brought_by, ..TableColumn::nullable("v_t", ColumnType::Double) }];
        let wider = schema.extended(&more).expect("new").expect("wider");
        assert_eq!(wider.columns().len(), 3);
        assert_eq!(TableSchema::from_json(&wider.to_json()).expect("JSON"), wider);
        assert!(wider.extended(&more).expect("known").is_none());
        for conflict in [
            TableColumn::nullable("v_T", ColumnType::Double),
            TableColumn::nullable("v_t", ColumnType::Text),
            TableColumn::required("other", ColumnType::Text),
            TableColumn::nullable("a b", ColumnType::Text),
        ] {
            wider.extended(&[conflict]).expect_err("does not fit");
        }
    }

    #[test]
    fn a_column_of_a_type_that_is_unknown_here_stays_in_the_schema() {
        let text = r#"{"type":"struct","fields":[{"name":"d","type":"decimal(10,2)","nullable":true,"metadata":{}}]}"#;
        let schema = TableSchema::from_json(text).expect("schema");
        assert!(schema.columns().is_empty() && schema.has_name("D"));
        let wider =
            schema.extended(&[TableColumn::nullable("x", ColumnType::Long)]).expect("new").expect("wider");
        assert!(wider.to_json().contains("decimal(10,2)"));
        schema.extended(&[TableColumn::nullable("d", ColumnType::Long)]).expect_err("taken");
    }
}
