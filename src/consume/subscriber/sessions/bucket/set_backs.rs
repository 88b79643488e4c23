//! Sessions from before the log went on from an earlier state: what they have beyond that is set aside.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use super::super::StoredSession;
use crate::log::LogHistory;
use crate::time::Rfc3339;

/// The file with what was set aside of cursors, in the data directory: a line of JSON each.
const CURSORS_ASIDE_FILE: &str = "cursors-set-aside.jsonl";

/// Sets sessions back. Cheap to clone.
#[derive(Clone, Default)]
pub struct CursorSetBacks(Arc<CursorSetBackState>);

#[derive(Default)]
struct CursorSetBackState {
    history: LogHistory,
    path: PathBuf,
}

impl CursorSetBacks {
    /// Those of a log. What they set aside is noted in `dir`.
    pub fn new(history: LogHistory, dir: &Path) -> Self {
        Self(Arc::new(CursorSetBackState { history, path: dir.join(CURSORS_ASIDE_FILE) }))
    }

    /// Sets a session back whose row was written at this revision, and notes what it was.
    pub(super) fn apply(&self, session: &mut StoredSession, written: u64) {
        let Some(end) = self.0.history.end_since_row(written) else { return };
        let (cursor, in_flight): (_, Vec<_>) =
            (session.cursor, session.flights.sent.iter().map(|flight| flight.offset).collect());
        if !session.set_back(end) {
            return;
        }
        let (datasource, client_id) = (session.datasource.as_str(), session.client_id.as_str());
        let line = json!({
            "at": Rfc3339(crate::message::now_micros()).to_string(), "datasource": datasource, "client_id": client_id,
            "cursor": cursor, "in_flight": in_flight, "goes_on_at": session.cursor,
        });
        let file = std::fs::File::options().create(true).append(true).open(&self.0.path);
        let noted = file.and_then(|mut file| writeln!(file, "{line}"));
        let file = self.0.path.display();
        tracing::warn!(
            datasource, client_id, cursor, goes_on_at = session.cursor, %file, noted = noted.is_ok(),
            "a session was ahead of the log, which went on from an earlier state"
        );
    }
}
