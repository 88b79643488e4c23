//! Why something could not be done with a table.

use std::fmt::Write as _;

use arrow_schema::ArrowError;
use parquet::errors::ParquetError;

use crate::columns::SchemaError;

/// The longest text that is shown of a store's answer, in bytes.
const STORE_ANSWER_BYTES_MAX: usize = 300;

/// Why an operation on a table has failed. What it has not committed is not in the table.
#[derive(Debug, thiserror::Error)]
pub enum LakeError {
    /// The store has refused, or was not reached. Whether a commit got through is not known: the next operation looks.
    #[error("the lake's store: {}", store_text(.0))]
    Store(#[source] object_store::Error),
    /// The table has features that this crate does not write.
    #[error(
        "the table asks for reader version {reader} and writer version {writer} of Delta's protocol; known are 1 and 2"
    )]
    ProtocolNewer {
        /// `minReaderVersion`.
        reader: i32,
        /// `minWriterVersion`.
        writer: i32,
    },
    /// An object of the table's log is not what the protocol says.
    #[error("the table's log is damaged: {0}")]
    LogDamaged(String),
    /// There is a table, and it is another one: its partition columns or fixed columns differ.
    #[error("there is another table at this place: {0}")]
    OtherTable(String),
    /// Somebody else has moved the cursor, or a mark that the rows depend on.
    #[error("another writer has moved the table's cursor, which is {cursor:?}, or its marks")]
    Superseded {
        /// Where it is.
        cursor: Option<i64>,
    },
    /// New columns do not fit those of the table.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// Other writers committed first, again and again.
    #[error("other writers were faster {attempts} times")]
    Contended {
        /// How often it was tried.
        attempts: u32,
    },
    /// Files were stored so long before their commit that a vacuum may have removed them.
    #[error("storing the files took longer than a vacuum spares files without a commit")]
    FilesTooOld,
    /// A file could not be encoded or decoded.
    #[error("Parquet: {0}")]
    Parquet(#[from] ParquetError),
    /// Rows do not fit their columns.
    #[error("rows: {0}")]
    Rows(#[from] ArrowError),
}

impl From<object_store::Error> for LakeError {
    fn from(error: object_store::Error) -> Self {
        Self::Store(error)
    }
}

/// An error of a store in one line. Answers of S3 are XML of any length; none holds a secret, only what was signed.
fn store_text(error: &object_store::Error) -> String {
    let mut text = String::new();
    for word in error.to_string().split_whitespace() {
        if text.len() + word.len() > STORE_ANSWER_BYTES_MAX {
            text.push('…');
            break;
        }
        let gap = if text.is_empty() { "" } else { " " };
        let _ = write!(text, "{gap}{word}");
    }
    text
}
