//! Managing datasources: create with a first key, list, show, delete. For admin keys; an admin key of
//! one datasource manages that one.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::header::LOCATION;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::connect::Connect;
use super::credentials::Caller;
use super::keys::NewKey;
use super::problem::Problem;
use super::{InPath, Shared, off_the_runtime};
use crate::auth::{Datasource, Scope, Scopes};
use crate::consume::render::Rfc3339;
use crate::message::DatasourceId;

/// What creating a datasource takes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Create {
    id: Option<String>,
    name: String,
    scopes: Option<Scopes>,
}

/// What creating a datasource answers.
#[derive(Serialize)]
struct Created<'a> {
    datasource: View<'a>,
    key: NewKey<'a>,
    connect: Connect,
}

/// What listing datasources answers.
#[derive(Serialize)]
struct List<'a> {
    datasources: Vec<View<'a>>,
}

/// A datasource, as the API shows it.
#[derive(Serialize)]
struct View<'a> {
    id: &'a DatasourceId,
    name: &'a str,
    created_at: Rfc3339,
}

impl<'a> View<'a> {
    fn of(datasource: &'a Datasource) -> Self {
        let created_at = Rfc3339(datasource.created_at);
        Self { id: &datasource.id, name: &datasource.name, created_at }
    }
}

/// `POST /v1/datasources`
pub(super) async fn create(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, Problem> {
    caller.may_manage_all()?;
    let Create { id, name, scopes } = shared.read_json(request).await?;
    let id = match id {
        Some(id) => {
            Some(DatasourceId::new(&id).map_err(|e| Problem::from(e).with("pointer", "/id").body_read())?)
        }
        None => None,
    };
    let scopes = scopes.unwrap_or(Scopes::of(&[Scope::Ingest]));
    let registry = shared.registry().clone();
    let created = off_the_runtime(move || Ok(registry.create_datasource(id, &name, scopes)?)).await;
    let (datasource, key, secret) = created.map_err(Problem::body_read)?;
    let location = format!("/v1/datasources/{}", datasource.id);
    let body = Created {
        datasource: View::of(&datasource),
        key: NewKey::of(&key, &secret),
        connect: Connect::new(&datasource.id, scopes, &shared.parts, &headers),
    };
    Ok((StatusCode::CREATED, [(LOCATION, location)], Json(body)).into_response())
}

/// `GET /v1/datasources`
pub(super) async fn list(State(shared): State<Arc<Shared>>, caller: Caller) -> Result<Response, Problem> {
    caller.may_manage_all()?;
    let datasources = shared.registry().datasources();
    let datasources = datasources.iter().map(|datasource| View::of(datasource)).collect();
    Ok(Json(List { datasources }).into_response())
}

/// `GET /v1/datasources/{datasource}`
pub(super) async fn show(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    InPath(id): InPath<String>,
) -> Result<Response, Problem> {
    caller.may(Scope::Admin, &id)?;
    Ok(Json(View::of(&*shared.datasource(&id)?)).into_response())
}

/// `DELETE /v1/datasources/{datasource}`: answers when its keys are dead and nothing more can come in
/// under them.
pub(super) async fn delete(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    InPath(id): InPath<String>,
) -> Result<StatusCode, Problem> {
    caller.may(Scope::Admin, &id)?;
    let datasource = shared.datasource(&id)?;
    let registry = shared.registry().clone();
    let dead = off_the_runtime(move || Ok(registry.delete_datasource(&datasource.id)?)).await?;
    shared.parts.intake.settle(&dead).await;
    Ok(StatusCode::NO_CONTENT)
}
