//! Where the MQTT sessions of a datasource stand, for those who look after its subscribers.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query as QueryString, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::credentials::Caller;
use super::query::page_limit;
use super::{HttpFrontState, PathParameters, run_blocking, run_in_turn};
use crate::auth::{AuditEvent, Scope};
use crate::consume::render::Rfc3339;
use crate::front::mqtt::{SessionStanding, StandingWish};
use crate::front::problem::Problem;
use crate::message::{DatasourceId, Offset};
use crate::observe::cause::Cause;

/// The query string of a list of sessions.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SessionListParameters {
    after: Option<String>,
    limit: Option<usize>,
    #[serde(default)]
    still: bool,
    #[serde(default)]
    publishers: bool,
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
    subscriber: bool,
    cursor: Offset,
    /// How many records the log has from the cursor on, of any datasource.
    behind: u64,
    in_flight: u32,
    still_since: Option<Rfc3339>,
    expires_at: Option<Rfc3339>,
}

impl SessionView {
    fn new(standing: SessionStanding, end: Offset) -> Self {
        let SessionStanding {
            client_id,
            is_connected,
            is_subscriber,
            cursor,
            in_flight,
            still_since,
            expires_at,
        } = standing;
        Self {
            client_id: client_id.as_ref().to_owned(),
            connected: is_connected,
            subscriber: is_subscriber,
            cursor,
            behind: end.saturating_sub(cursor),
            in_flight,
            still_since: still_since.map(Rfc3339),
            expires_at: expires_at.map(Rfc3339),
        }
    }
}

/// The scope of the keys under which clients are that a path names.
fn client_scope(shared: &HttpFrontState, owner: &str) -> Result<DatasourceId, Problem> {
    match owner {
        "*" => Ok(DatasourceId::all()),
        owner => Ok(shared.datasource(owner)?.scope()),
    }
}

/// `POST /v1/datasources/{datasource}/sessions/{client_id}/disconnect`: closes the client's connection to this gateway.
/// Its session stays, and it may come back: what keeps it out is the end of its key.
pub(super) async fn disconnect(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters((owner, client_id)): PathParameters<(String, String)>,
) -> Result<Response, Problem> {
    caller.require_scope(Scope::Admin, &owner)?;
    let scope = client_scope(&shared, &owner)?;
    if !shared.parts.mqtt.kick(&scope, &client_id) {
        let words =
            "No client with this identifier is connected to this gateway under a key of the datasource.";
        return Err(Problem::new(Cause::NotFound, words));
    }
    let (registry, actor) = (shared.registry().clone(), caller.actor().under_way());
    run_blocking(move || {
        let (of, _) = scope.of_scope();
        let what = json!({ "client_id": client_id });
        let event =
            AuditEvent { action: "client.disconnected", datasource: Some(&of), key_id: None, what: &what };
        Ok(registry.audit(&actor, &event)?)
    })
    .await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// `GET /v1/datasources/{datasource}/sessions`: those that this gateway has
pub(super) async fn list(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters(owner): PathParameters<String>,
    uri: Uri,
) -> Result<Response, Problem> {
    caller.require_scope(Scope::Admin, &owner)?;
    let QueryString(SessionListParameters { after, limit, still, publishers }) =
        QueryString::try_from_uri(&uri)?;
    let limit = page_limit(limit)?;
    let wish = match (still, publishers) {
        (true, _) => StandingWish::StillSubscribers,
        (false, true) => StandingWish::AllClients,
        (false, false) => StandingWish::Subscribers,
    };
    let scope = client_scope(&shared, &owner)?;
    let turns = shared.clone();
    let listed = run_in_turn(&turns, &caller, move || {
        let (standings, has_more) = shared.parts.mqtt.standings(&scope, after.as_deref(), limit, wish);
        let next = standings.last().filter(|_| has_more).map(|last| last.client_id.as_ref().to_owned());
        let end = shared.parts.log.next_offset();
        let sessions = standings.into_iter().map(|standing| SessionView::new(standing, end)).collect();
        Ok(Json(SessionListResponse { sessions, next }).into_response())
    });
    listed.await
}
