//! Moving datasources between gateways: exported with the digests of their keys, and imported. For admin keys of the whole
//! gateway: whoever imports decides which keys are let in.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query as QueryString, Request, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::credentials::Caller;
use super::{HttpFrontState, PathParameters, event_time, limits, no_datasource, run_blocking};
use crate::auth::registry::transfer::{EXPORT_FORMAT, ExportedDatasource, NewImport};
use crate::front::problem::Problem;
use crate::intake::Refusal;
use crate::limits::HTTP_IMPORT_BYTES_MAX;
use crate::message::DatasourceId;
use crate::observe::cause::Cause;
use crate::quota::{Limit, LimitExceeded, QuotaLimits};
use crate::validate::Rules;
use crate::whole_number::WholeNumber;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ImportParameters {
    /// Whether it gets another id if its own is taken.
    #[serde(default)]
    rename: bool,
    /// Whether it is only checked.
    #[serde(default)]
    check: bool,
}

/// The answer to an import.
#[derive(Serialize)]
struct ImportResponse {
    /// Its id here.
    id: DatasourceId,
    keys: usize,
}

/// `GET /v1/datasources/{datasource}/export`
pub(super) async fn export(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters(id): PathParameters<String>,
) -> Result<Response, Problem> {
    caller.require_gateway_admin()?;
    let registry = shared.registry().clone();
    let exported = run_blocking(move || registry.export(&id).ok_or_else(|| no_datasource(&id)));
    Ok(Json(exported.await?).into_response())
}

/// `POST /v1/import`
pub(super) async fn import(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    uri: Uri,
    request: Request,
) -> Result<Response, Problem> {
    caller.require_gateway_admin()?;
    let QueryString(ImportParameters { rename, check }) = QueryString::try_from_uri(&uri)?;
    let body: Value = shared.read_json_up_to(request, HTTP_IMPORT_BYTES_MAX).await?;
    let (registry, actor) = (shared.registry().clone(), caller.actor());
    let imported = run_blocking(move || {
        let exported = parse_export(body)?;
        let of_key = |limits: &Value| Ok::<_, Problem>(limits::of_key(limits::parse(limits)?)?.text());
        let keys = exported.keys.iter().map(|key| Ok((key, of_key(&key.limits)?)));
        let keys: Vec<_> = keys.collect::<Result<_, Problem>>()?;
        let id = DatasourceId::new(&exported.id).map_err(|e| Problem::from(e).with("pointer", "/id"))?;
        let limits = limits::parse(&exported.limits)?;
        check_key_count(&id, &limits, keys.len())?;
        let new = NewImport {
            id,
            may_rename: rename,
            name: &exported.name,
            limits: limits.text(),
            schemas: checked_schemas(&exported.schemas)?,
            event_time: event_time::parse(&exported.event_time)?,
            keys: &keys,
            is_rehearsal: check,
        };
        Ok(registry.import(&actor, &new)?)
    });
    let imported = imported.await.map_err(Problem::after_body_read)?;
    let status = if check { StatusCode::OK } else { StatusCode::CREATED };
    Ok((status, Json(ImportResponse { id: imported.id, keys: imported.keys })).into_response())
}

/// A datasource as another gateway has exported it.
fn parse_export(body: Value) -> Result<ExportedDatasource, Problem> {
    let malformed = |words: String| Problem::new(Cause::Malformed, words);
    match body["headgate_export"].as_number().and_then(WholeNumber::of) {
        Some(WholeNumber(format)) if format == u64::from(EXPORT_FORMAT) => {}
        Some(WholeNumber(format)) => {
            let words =
                format!("It has format {format}, and this Headgate knows {EXPORT_FORMAT}: use a newer one.");
            return Err(malformed(words).with("pointer", "/headgate_export"));
        }
        None => return Err(malformed("It is no datasource that a gateway has exported.".to_owned())),
    }
    serde_json::from_value(body).map_err(|error| malformed(format!("It cannot be used: {error}.")))
}

/// Fails if there are more keys than the datasource may have by its limits.
fn check_key_count(id: &DatasourceId, limits: &QuotaLimits, keys: usize) -> Result<(), Problem> {
    match limits.get_or_default(Limit::Keys) {
        Some(setting) if keys as u64 > setting.max => {
            Err(Refusal::from(LimitExceeded::of_count(Limit::Keys, setting, id)).into())
        }
        _ => Ok(()),
    }
}

/// The schemas in the form of the registry, once all of them have been compiled.
fn checked_schemas(schemas: &Value) -> Result<Option<String>, Problem> {
    if schemas.is_null() {
        return Ok(None);
    }
    let rules = Rules::from_stored_json(&schemas.to_string())?;
    if !rules.is_numbered() {
        let words = "A schema has a version from 1 to last_version.";
        return Err(Problem::new(Cause::NotPossible, words).with("pointer", "/schemas"));
    }
    Ok(Some(rules.to_stored_json()))
}
