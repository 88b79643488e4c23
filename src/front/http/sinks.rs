//! Sinks over HTTP: where records are stored, how far each is, and what is wrong with it.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::HttpFrontState;
use super::credentials::Caller;
use crate::consume::storage::SinkState;
use crate::front::problem::Problem;
use crate::message::Offset;
use crate::time::Rfc3339;

#[derive(Serialize)]
struct SinkList {
    sinks: Vec<SinkView>,
    /// The offset that the next record gets.
    log_end: Offset,
}

/// A sink, as the API shows it.
#[derive(Serialize)]
pub(super) struct SinkView {
    sink: &'static str,
    is_read: bool,
    is_writer: bool,
    cursor: Offset,
    lag: u64,
    records_per_s: f64,
    trouble: Option<String>,
    last_error: Option<SinkErrorView>,
    set_aside: Option<String>,
}

#[derive(Serialize)]
struct SinkErrorView {
    at: Rfc3339,
    error: String,
}

impl SinkView {
    fn new(state: SinkState, log_end: Offset) -> Self {
        Self {
            sink: state.kind.as_str(),
            is_read: state.is_read,
            is_writer: state.is_writer,
            cursor: state.cursor,
            lag: log_end.saturating_sub(state.cursor),
            records_per_s: (state.rate * 10.0).round() / 10.0,
            trouble: state.trouble,
            last_error: state.last_error.map(|(at, error)| SinkErrorView { at: Rfc3339(at), error }),
            set_aside: state.set_aside,
        }
    }
}

/// `GET /v1/sinks`
pub(super) async fn list(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
) -> Result<Response, Problem> {
    caller.require_gateway_admin()?;
    let (sinks, log_end) = sinks_and_end(&shared);
    Ok(Json(SinkList { sinks, log_end }).into_response())
}

/// The sinks, and the offset that the next record gets.
pub(super) fn sinks_and_end(shared: &HttpFrontState) -> (Vec<SinkView>, Offset) {
    let states = shared.parts.storage.as_ref().map(|storage| storage.states()).unwrap_or_default();
    // Read after the cursors, so that none is ahead of it.
    let log_end = shared.parts.log.next_offset();
    (states.into_iter().map(|state| SinkView::new(state, log_end)).collect(), log_end)
}
