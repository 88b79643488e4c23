//! Refusals over HTTP: what was refused lately, and what to do about it; for admins of the gateway, or of
//! the one datasource that is asked for.

use std::collections::HashMap;
use std::collections::hash_map::Entry::Vacant;
use std::net::IpAddr;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Query as QueryString, State};
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::credentials::Caller;
use super::{HttpFrontState, run_in_turn};
use crate::auth::Scope;
use crate::auth::shape::KeyShape;
use crate::consume::render::Rfc3339;
use crate::front::problem::Problem;
use crate::limits::{REFUSALS_DEFAULT, REFUSALS_PER_SHARD_MAX, REFUSALS_SHARDS};
use crate::message::{KeyId, Transport};
use crate::observe::cause::Cause;
use crate::observe::refusals::{OverLimit, RefusalEntry, RefusalFilter};

/// The most entries that can exist.
const REFUSALS_LISTED_MAX: usize = REFUSALS_SHARDS * REFUSALS_PER_SHARD_MAX;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RefusalsParameters {
    client: Option<String>,
    address: Option<String>,
    cause: Option<String>,
    datasource: Option<String>,
    limit: Option<usize>,
}

/// The answer to listing refusals.
#[derive(Serialize)]
struct RefusalListResponse<'a> {
    refusals: Vec<RefusalView<'a>>,
    /// How many refusals since the start of the gateway were counted but are in no entry.
    unlisted: u64,
}

/// One source of refusals. Unknown members are left out.
#[derive(Serialize)]
struct RefusalView<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<IpAddr>,
    #[serde(skip_serializing_if = "str::is_empty")]
    client: &'a str,
    transport: Transport,
    cause: &'static str,
    detail: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    datasource: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_id: Option<KeyId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_shape: Option<KeyShape>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<RefusalLimitView<'a>>,
    count: u64,
    first_at: Rfc3339,
    last_at: Rfc3339,
    advice: String,
}

#[derive(Serialize)]
struct RefusalLimitView<'a> {
    name: &'a str,
    max: u64,
    of: &'a str,
    wait_seconds: f64,
}

impl<'a> RefusalView<'a> {
    fn new(entry: &'a RefusalEntry, end: Option<&str>) -> Self {
        let limit = |limit: &'a OverLimit| RefusalLimitView {
            name: limit.name,
            max: limit.max,
            of: &limit.owner,
            wait_seconds: limit.wait.as_secs_f64(),
        };
        Self {
            address: entry.address,
            client: &entry.client,
            transport: entry.transport,
            cause: entry.cause.name(),
            detail: &entry.words,
            datasource: &entry.datasource,
            key_id: entry.key_id,
            key_shape: entry.key_shape,
            limit: entry.limit.as_ref().map(limit),
            count: entry.count,
            first_at: Rfc3339(entry.first_at),
            last_at: Rfc3339(entry.last_at),
            advice: entry.advice(end),
        }
    }
}

/// `GET /v1/refusals`
pub(super) async fn list(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    uri: Uri,
) -> Result<Response, Problem> {
    let QueryString(parameters) = QueryString::<RefusalsParameters>::try_from_uri(&uri)?;
    let RefusalsParameters { client, address, cause, datasource, limit } = parameters;
    match &datasource {
        Some(datasource) => caller.require_scope(Scope::Admin, datasource)?,
        None => caller.require_gateway_admin()?,
    }
    let address = match address {
        None => None,
        Some(text) => Some(text.parse().map_err(|_| {
            Problem::new(Cause::Malformed, "address has to be an IP address, 203.0.113.9 or 2001:db8::1.")
        })?),
    };
    let limit = limit.unwrap_or(REFUSALS_DEFAULT);
    if !(1..=REFUSALS_LISTED_MAX).contains(&limit) {
        let words = format!("limit is {limit}: it has to be between 1 and {REFUSALS_LISTED_MAX}.");
        return Err(Problem::new(Cause::Malformed, words).with("limit", REFUSALS_LISTED_MAX));
    }
    let refusals = shared.parts.intake.refusals();
    // What was refused to an earlier datasource with this id is not for the admins of this one.
    let of_present = caller.require_gateway_admin().is_err().then(|| {
        let present = datasource.as_deref().and_then(|id| shared.registry().datasource(id));
        present.filter(|present| present.incarnation > 1).map(|present| present.created_at)
    });
    let since = of_present.flatten();
    let entries = refusals.newest(&RefusalFilter { client, address, cause, datasource, since }, limit);
    let unlisted = refusals.unlisted();
    let turns = shared.clone();
    run_in_turn(&turns, &caller, move || {
        // Each key's end is looked up once, however many clients still try it.
        let mut ends = HashMap::new();
        for id in
            entries.iter().filter(|entry| entry.cause == Cause::RevokedKey).filter_map(|entry| entry.key_id)
        {
            if let Vacant(place) = ends.entry(id) {
                place.insert(shared.registry().describe_revocation(id)?);
            }
        }
        let end = |entry: &RefusalEntry| ends.get(&entry.key_id?)?.as_deref();
        let refusals = entries.iter().map(|entry| RefusalView::new(entry, end(entry))).collect();
        Ok(Json(RefusalListResponse { refusals, unlisted }).into_response())
    })
    .await
}
