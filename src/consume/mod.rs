//! What follows the log: each consumer has its own cursor, so that a slow one delays nobody and the next
//! start resumes where the last one stopped.
//!
//! [`storage`] consumes every record and writes it to a [`sink`]. [`query`] reads a sink back and
//! [`render`] gives the result its outward form. [`subscriber`] serves MQTT clients that subscribe,
//! [`egress`] clients of NATS. [`quarantine`] has the records that none of them is given. `follower.rs`
//! is the thread that some of them run on.

pub mod egress;
mod follower;
pub mod latest;
pub mod quarantine;
pub mod query;
pub mod render;
pub mod schema_inference;
pub mod sink;
pub mod storage;
pub mod subscriber;

use std::path::Path;

pub(crate) use self::subscriber::sessions::table::SESSIONS_FILE_NAME;
use crate::sqlite::{SqliteError, SqliteProfile, SqliteSnapshot};

/// The databases of consumers that others may read while they are written, each with its newest format.
const SHARED_DATABASES: [(&str, &SqliteProfile); 2] = [
    (subscriber::retained::table::RETAINED_FILE_NAME, &subscriber::retained::table::RETAINED_DATABASE),
    (sink::sqlite::RECORDS_FILE_NAME, &sink::schema::RECORDS_DATABASE),
];

/// The databases of consumers in `dir` as they are now, with their names: none is ahead of what the log has afterwards. The
/// sessions are not among them, because nobody else may read them.
///
/// # Errors
/// [`SqliteError`].
pub(crate) fn take_snapshots(dir: &Path) -> Result<Vec<(&'static str, SqliteSnapshot)>, SqliteError> {
    let mut snapshots = Vec::new();
    for (name, profile) in SHARED_DATABASES {
        snapshots.extend(SqliteSnapshot::take(&dir.join(name), profile)?.map(|snapshot| (name, snapshot)));
    }
    Ok(snapshots)
}

/// The newest format of the database with this name that this Headgate knows. `None` if it is not a consumer's.
pub(crate) fn newest_format(name: &str) -> Option<i64> {
    let sessions = (SESSIONS_FILE_NAME, &subscriber::sessions::table::SESSIONS_DATABASE);
    let known = SHARED_DATABASES.into_iter().chain([sessions]).find(|(known, _)| *known == name);
    known.map(|(_, profile)| profile.newest_version())
}

#[cfg(test)]
pub mod testing;
