//! Where the MQTT sessions of a datasource stand, for those who look after its subscribers.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query as QueryString, State};
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::credentials::Caller;
use super::query::page_limit;
use super::{HttpFrontState, PathParameters, run_in_turn};
use crate::auth::Scope;
use crate::consume::render::Rfc3339;
use crate::front::mqtt::SessionStanding;
use crate::front::problem::Problem;
use crate::message::{DatasourceId, Offset};

/// The query string of a list of sessions.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SessionListParameters {
    after: Option<String>,
    limit: Option<usize>,
    #[serde(default)]
    still: bool,
}

/// The answer to listing sessions.
#[derive(Serialize)]
struct SessionListResponse {
    sessions: Vec<SessionView>,
    /// The client after which the next page begins.
    next: Option<String>,
}

/// One session, as the API shows it.
#[derive(Serialize)]
struct SessionView {
    client_id: String,
    connected: bool,
    cursor: Offset,
    /// How many records the log has from the cursor on, of any datasource.
    behind: u64,
    in_flight: u32,
    still_since: Option<Rfc3339>,
    expires_at: Option<Rfc3339>,
}

impl SessionView {
    fn new(standing: SessionStanding, end: Offset) -> Self {
        let SessionStanding { client_id, is_connected, cursor, in_flight, still_since, expires_at } =
            standing;
        Self {
            client_id: client_id.as_ref().to_owned(),
            connected: is_connected,
            cursor,
            behind: end.saturating_sub(cursor),
            in_flight,
            still_since: still_since.map(Rfc3339),
            expires_at: expires_at.map(Rfc3339),
        }
    }
}

/// `GET /v1/datasources/{datasource}/sessions`: those that this gateway has
pub(super) async fn list(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters(owner): PathParameters<String>,
    uri: Uri,
) -> Result<Response, Problem> {
    caller.require_scope(Scope::Admin, &owner)?;
    let QueryString(SessionListParameters { after, limit, still }) = QueryString::try_from_uri(&uri)?;
    let limit = page_limit(limit)?;
    let scope = match owner.as_str() {
        "*" => DatasourceId::all(),
        owner => shared.datasource(owner)?.scope(),
    };
    let turns = shared.clone();
    let listed = run_in_turn(&turns, &caller, move || {
        let (standings, has_more) = shared.parts.mqtt.standings(&scope, after.as_deref(), limit, still);
        let next = standings.last().filter(|_| has_more).map(|last| last.client_id.as_ref().to_owned());
        let end = shared.parts.log.next_offset();
        let sessions = standings.into_iter().map(|standing| SessionView::new(standing, end)).collect();
        Ok(Json(SessionListResponse { sessions, next }).into_response())
    });
    listed.await
}
