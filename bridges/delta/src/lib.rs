//! A table in a Delta lake: Parquet files and the log that says which of them count, in a directory or in S3.
//!
//! The crate knows Parquet, Delta's protocol and object stores, and nothing of keys or records. Its contract is small:
//!
//! - [`LakePlace`] names a directory or a bucket, and opens it as an object store.
//! - [`LakeTable::open`] finds or creates a table of a [`TableSpec`].
//! - [`DataFileWriter`] turns rows of one partition into a Parquet file in memory, row group by row group.
//! - [`LakeTable::append`] stores such files and commits them together with a number that only grows: the cursor.
//!   A commit is an object that is created or is there already, so rows and cursor appear together or not at all, and
//!   a repetition of what has been committed does nothing: each row is in the table once, whatever is killed.
//! - [`LakeTable::compact`], [`LakeTable::rewrite`], [`LakeTable::drop_files`], [`LakeTable::vacuum`] and
//!   [`LakeTable::expire_log`] keep it small, and take out of it what must not be there.
//!
//! The table asks readers for protocol 1 and writers for protocol 2, without deletion vectors and column mapping: every
//! reader of Delta tables reads it. Source: `PROTOCOL.md` of <https://github.com/delta-io/delta>.
//!
//! Encoding is work for a processor and runs on the thread that polls these functions.

mod actions;
mod checkpoint;
mod columns;
mod commit_log;
mod data_file;
mod error;
mod http_connector;
mod place;
mod snapshot;
mod stats;
mod table;

pub use actions::{AddFile, RemoveFile};
pub use columns::{ColumnType, TableColumn, TableSchema, TableSchemaError};
pub use data_file::{DataFile, DataFileWriter, PartitionValues};
pub use error::LakeError;
pub use place::{BucketAccess, LakePlace, PlaceError};
pub use snapshot::TableSnapshot;
pub use table::vacuum::{ORPHAN_AGE_MIN, VacuumReport};
pub use table::{
    AppendOutcome, FileSettings, FileStage, LakeTable, RewriteReport, RowTarget, RowTargets, TableAppend,
    TableSpec,
};

/// What rows are made of, for those who build them.
pub use arrow_array as array;
/// See [`array`].
pub use arrow_schema as schema;
/// The contract for what holds the table's files; tests put faults between.
pub use object_store;
