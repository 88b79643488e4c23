//! Limits of keys and datasources over HTTP: setting them, and the headers that say how much of a rate is
//! used.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::Value;

use super::credentials::Caller;
use super::{HttpFrontState, PathParameters, event_time, keys, manage, members, run_blocking};
use crate::auth::Scope;
use crate::auth::setting::JsonSetting;
use crate::front::problem::Problem;
use crate::intake::meters;
use crate::message::KeyId;
use crate::observe::cause::Cause;
use crate::quota::{LimitOwner, LimitsError, QuotaLimits, QuotaStanding};

/// The body of a change: a JSON merge patch of the datasource.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DatasourcePatch {
    /// `Some(null)` takes all of them away; so for the setting below.
    #[serde(default, deserialize_with = "members::stated")]
    limits: Option<Value>,
    #[serde(default, deserialize_with = "members::stated")]
    event_time: Option<Value>,
}

/// The body of a change: a JSON merge patch of the key.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitsPatch {
    #[serde(default = "nothing")]
    limits: Value,
}

/// A patch that changes nothing.
fn nothing() -> Value {
    Value::Object(serde_json::Map::new())
}

/// `PATCH /v1/datasources/{datasource}`: answers once the settings apply, limits also to clients that are held back.
pub(super) async fn patch_datasource(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters(id): PathParameters<String>,
    request: Request,
) -> Result<Response, Problem> {
    caller.require_scope(Scope::Admin, &id)?;
    let id = shared.datasource(&id)?.id.clone();
    let DatasourcePatch { limits, event_time } = shared.read_json(request).await?;
    let actor = caller.actor();
    let changed = run_blocking(move || {
        let _one_at_a_time = shared.limiting.lock();
        let datasource = shared.datasource(id.as_str())?;
        // Both are checked before one of them is set.
        let limits = limits.map(|patch| patched(current_limits(&datasource.limits), &patch)).transpose()?;
        let event_time = event_time.map(|patch| event_time::patched(&datasource.event_time, &patch));
        if let Some(event_time) = event_time.transpose()? {
            shared.registry().set_datasource_event_time(&actor, &id, event_time.as_deref())?;
        }
        if let Some(limits) = limits {
            let old = meters(&datasource.limits, || LimitOwner::Datasource(id.clone()));
            shared.registry().set_datasource_limits(&actor, &id, limits.text())?;
            old.inspect(|old| old.mark_replaced());
        }
        Ok(Json(manage::DatasourceView::new(&datasource)).into_response())
    });
    changed.await.map_err(Problem::after_body_read)
}

/// `PATCH /v1/datasources/{datasource}/keys/{key_id}`: answers once the limits apply, also to clients that
/// are held back.
pub(super) async fn patch_key_limits(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters((datasource, key_id)): PathParameters<(String, String)>,
    request: Request,
) -> Result<Response, Problem> {
    caller.require_scope(Scope::Admin, &datasource)?;
    let datasource = keys::key_owner(&shared, &datasource)?;
    let key_id = KeyId::parse(&key_id)?;
    let LimitsPatch { limits: patch } = shared.read_json(request).await?;
    let actor = caller.actor();
    let changed = run_blocking(move || {
        let no_key = || Problem::new(Cause::NoKeyId, format!("There is no key {key_id} here."));
        let _one_at_a_time = shared.limiting.lock();
        let key = shared.registry().key(&datasource, key_id).ok_or_else(no_key)?;
        let limits = of_key(patched(current_limits(&key.limits), &patch)?)?;
        let old = meters(&key.limits, || LimitOwner::Key(key_id));
        if !shared.registry().set_key_limits(&actor, &datasource, key_id, limits.text())? {
            return Err(no_key());
        }
        old.inspect(|old| old.mark_replaced());
        Ok(Json(keys::KeyView::new(&key)).into_response())
    });
    changed.await.map_err(Problem::after_body_read)
}

/// The limits after a JSON merge patch of them.
fn patched(limits: QuotaLimits, patch: &Value) -> Result<QuotaLimits, Problem> {
    limits.patched(patch).map_err(|error| {
        let setting = error.pointer.strip_suffix("/max").and_then(|at| patch.pointer(at));
        // What is left out has its place where the limit is set already.
        match setting.is_some_and(|setting| setting.is_object() && setting.get("max").is_none()) {
            true => Problem::from(error).not_possible(),
            false => error.into(),
        }
    })
}

/// Refuses limits that only datasources have.
pub(super) fn of_key(limits: QuotaLimits) -> Result<QuotaLimits, Problem> {
    match limits.first_of_datasources() {
        None => Ok(limits),
        Some(limit) => Err(LimitsError {
            pointer: format!("/{}", limit.name()),
            words: "only datasources have it: set it there".to_owned(),
        }
        .into()),
    }
}

/// Parses the limits in a request that creates a key or datasource.
pub(super) fn parse(limits: &Value) -> Result<QuotaLimits, Problem> {
    Ok(QuotaLimits::from_json(limits)?)
}

/// The limits that are set now.
pub(super) fn current_limits(limits: &JsonSetting) -> QuotaLimits {
    // Limits that cannot be read are logged where they are enforced.
    limits.text().and_then(|text| QuotaLimits::parse(&text).ok()).unwrap_or_default()
}

impl From<LimitsError> for Problem {
    fn from(error: LimitsError) -> Self {
        let words = format!("The limits cannot be used: {}.", error.words);
        Self::new(Cause::Malformed, words).with("pointer", format!("/limits{}", error.pointer))
    }
}

/// `X-RateLimit-Limit`: what may come at once when nothing is used (the burst). `X-RateLimit-Remaining`:
/// what may come at once now. `X-RateLimit-Reset`: in how many seconds the whole burst is available again.
/// The first two are in messages, or in bytes if the refusal was for a limit in bytes.
pub(super) fn rate_headers(standing: &QuotaStanding) -> [(HeaderName, HeaderValue); 3] {
    let QuotaStanding { burst, left, full_in } = *standing;
    let seconds = full_in.as_secs() + u64::from(full_in.subsec_nanos() > 0);
    [
        (HeaderName::from_static("x-ratelimit-limit"), HeaderValue::from(burst)),
        (HeaderName::from_static("x-ratelimit-remaining"), HeaderValue::from(left)),
        (HeaderName::from_static("x-ratelimit-reset"), HeaderValue::from(seconds)),
    ]
}
