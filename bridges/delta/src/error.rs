//! Why something could not be done with a table.

use std::fmt::Write as _;

use arrow_schema::ArrowError;
use parquet::errors::ParquetError;

use crate::columns::TableSchemaError;

/// The longest text that is shown of a store's answer, in bytes.
const STORE_ANSWER_BYTES_MAX: usize = 300;
/// The hexadecimal digits of a file's name.
const FILE_NAME_DIGITS: usize = 32;

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
    Schema(#[from] TableSchemaError),
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
    plain_text(&error.to_string())
}

/// Without what differs each time, how long a request took and the names of files: an error that stays is told once.
fn plain_text(error: &str) -> String {
    let mut text = String::new();
    let mut words = error.split_whitespace().peekable();
    while let Some(word) = words.next() {
        if word == "in" && words.next_if(|next| is_time(next)).is_some() {
            continue;
        }
        let word = without_file_names(word);
        if text.len() + word.len() > STORE_ANSWER_BYTES_MAX {
            text.push('…');
            break;
        }
        let gap = if text.is_empty() { "" } else { " " };
        let _ = write!(text, "{gap}{word}");
    }
    text
}

/// Whether it is a time as Rust prints it: `1.5ms`.
fn is_time(word: &str) -> bool {
    let digits = word.trim_end_matches(['n', 'µ', 'm', 's']);
    word.ends_with('s') && !digits.is_empty() && digits.parse::<f64>().is_ok()
}

/// With `…` for names that were drawn at random.
fn without_file_names(word: &str) -> String {
    let mut plain = String::new();
    let mut rest = word;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(rest.len());
        plain.push_str(if end >= FILE_NAME_DIGITS { "…" } else { &rest[..end] });
        rest = &rest[end..];
        let end = rest.find(|c: char| c.is_ascii_hexdigit()).unwrap_or(rest.len());
        plain.push_str(&rest[..end]);
        rest = &rest[end..];
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_stays_has_the_same_words_each_time() {
        let of = |name: &str, time: &str| {
            plain_text(&format!("PUT http://h/a/{name}.parquet#1 in {time} -  no room"))
        };
        let said = of("00ff00ff00ff00ff00ff00ff00ff00ff", "1.777046ms");
        assert_eq!(said, "PUT http://h/a/….parquet#1 - no room");
        assert_eq!(said, of("10ff00ff00ff00ff00ff00ff00ff00fe", "12.5µs"));
        assert_eq!(plain_text("in time, in 1s"), "in time,");
        assert!(plain_text(&"x ".repeat(1_000)).len() <= STORE_ANSWER_BYTES_MAX + 4);
    }
}
