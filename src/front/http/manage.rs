//! Managing datasources: create with a first key, list, show. For admin keys; an admin key of one datasource manages
//! that one.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query as QueryString, Request, State};
use axum::http::header::LOCATION;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::charged_list::ChargedList;
use super::connect::ConnectLines;
use super::credentials::Caller;
use super::deletion::EndedIncarnationView;
use super::keys::NewKeyView;
use super::members::stated;
use super::{HttpFrontState, PathParameters, event_time, limits, run_blocking, run_in_turn, schema};
use crate::auth::{Datasource, NewDatasource, Scope, Scopes};
use crate::consume::render::Rfc3339;
use crate::front::problem::Problem;
use crate::message::{DatasourceId, Incarnation};
use crate::quota::QuotaLimits;

/// The body of a request that creates a datasource.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateDatasourceRequest {
    id: Option<String>,
    name: String,
    #[serde(default, deserialize_with = "stated")]
    scopes: Option<Scopes>,
    /// The schema for messages to all its topics.
    schema: Option<Value>,
    #[serde(default)]
    limits: Value,
    #[serde(default)]
    event_time: Value,
}

/// The answer to creating a datasource.
#[derive(Serialize)]
struct CreateDatasourceResponse<'a> {
    datasource: DatasourceView<'a>,
    key: NewKeyView<'a>,
    connect: ConnectLines,
}

/// The query string of a list of datasources.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DatasourceListParameters {
    #[serde(default)]
    deleted: bool,
}

/// The answer to listing datasources that were deleted.
#[derive(Serialize)]
struct EndedIncarnationListResponse<'a> {
    deleted: Vec<EndedIncarnationView<'a>>,
}

/// A datasource, as the API shows it.
#[derive(Serialize)]
pub(super) struct DatasourceView<'a> {
    id: &'a DatasourceId,
    name: &'a str,
    created_at: Rfc3339,
    /// Which of the datasources that had this id it is, counted from 1.
    incarnation: Incarnation,
    /// The limits on all its keys together.
    limits: QuotaLimits,
    /// Where the event time of its messages is; `null` if that is not said.
    event_time: Value,
}

impl<'a> DatasourceView<'a> {
    pub(super) fn new(datasource: &'a Datasource) -> Self {
        let created_at = Rfc3339(datasource.created_at);
        let limits = limits::current_limits(&datasource.limits);
        let Datasource { id, name, incarnation, .. } = datasource;
        let event_time = event_time::current(&datasource.event_time);
        Self { id, name, created_at, incarnation: *incarnation, limits, event_time }
    }
}

/// `POST /v1/datasources`
pub(super) async fn create(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, Problem> {
    caller.require_gateway_admin()?;
    let CreateDatasourceRequest { id, name, scopes, schema, limits, event_time } =
        shared.read_json(request).await?;
    let limits = limits::parse(&limits).map_err(Problem::after_body_read)?;
    let event_time = event_time::parse(&event_time).map_err(Problem::after_body_read)?;
    let id = match id {
        Some(id) => Some(
            DatasourceId::new(&id).map_err(|e| Problem::from(e).with("pointer", "/id").after_body_read())?,
        ),
        None => None,
    };
    let scopes = scopes.unwrap_or(Scopes::from_slice(&[Scope::Ingest]));
    let registry = shared.registry().clone();
    let actor = caller.actor();
    let schemas = schema.map(schema::initial_rules).transpose()?.map(|rules| rules.to_stored_json());
    let created = run_blocking(move || {
        let limits = limits.text();
        let (limits, schemas) = (limits.as_deref(), schemas.as_deref());
        let event_time = event_time.as_deref();
        let new = NewDatasource { id, name: &name, scopes, limits, schemas, event_time };
        Ok(registry.create_datasource_with(&actor, &new)?)
    });
    let created = created.await;
    let (datasource, key, secret) = created.map_err(Problem::after_body_read)?;
    let location = format!("/v1/datasources/{}", datasource.id);
    let body = CreateDatasourceResponse {
        datasource: DatasourceView::new(&datasource),
        key: NewKeyView::new(&key, &secret),
        connect: ConnectLines::new(&datasource.id, scopes, &shared.parts, &headers, caller.1.is_https),
    };
    Ok((StatusCode::CREATED, [(LOCATION, location)], Json(body)).into_response())
}

/// `GET /v1/datasources`; with `deleted=true`, the incarnations that have ended
pub(super) async fn list(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    uri: Uri,
) -> Result<Response, Problem> {
    caller.require_gateway_admin()?;
    let QueryString(DatasourceListParameters { deleted }) = QueryString::try_from_uri(&uri)?;
    if deleted {
        let registry = shared.registry().clone();
        let ended = run_blocking(move || Ok(registry.ended_incarnations()?)).await?;
        let deleted = ended.iter().map(EndedIncarnationView::new).collect();
        return Ok(Json(EndedIncarnationListResponse { deleted }).into_response());
    }
    let account = shared.parts.intake.memory_account(&caller.0);
    let turns = shared.clone();
    run_in_turn(&turns, &caller, move || {
        let mut list = ChargedList::json(&account, "{\"datasources\":[")?;
        let datasources = shared.registry().datasources();
        datasources.iter().try_for_each(|datasource| list.push(&DatasourceView::new(datasource)))?;
        Ok(list.finish("]}"))
    })
    .await
}

/// `GET /v1/datasources/{datasource}`
pub(super) async fn show(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters(id): PathParameters<String>,
) -> Result<Response, Problem> {
    caller.require_scope(Scope::Admin, &id)?;
    Ok(Json(DatasourceView::new(&*shared.datasource(&id)?)).into_response())
}
