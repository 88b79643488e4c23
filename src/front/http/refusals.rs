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
use super::problem::{Kind, Problem};
use super::{Shared, off_the_runtime};
use crate::auth::Scope;
use crate::auth::shape::Shape;
use crate::consume::render::Rfc3339;
use crate::limits::{REFUSALS_DEFAULT, REFUSALS_PER_SHARD_MAX, REFUSALS_SHARDS};
use crate::message::{KeyId, Transport};
use crate::observe::refusals::{Entry, Filter, OverLimit};

/// The cause of refusals for a revoked key.
const REVOKED: &str = "revoked_key";
/// The most entries that can exist.
const COUNT_MAX: usize = REFUSALS_SHARDS * REFUSALS_PER_SHARD_MAX;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    client: Option<String>,
    address: Option<String>,
    cause: Option<String>,
    datasource: Option<String>,
    limit: Option<usize>,
}

/// The answer to listing refusals.
#[derive(Serialize)]
struct List<'a> {
    refusals: Vec<View<'a>>,
    /// How many refusals since the start of the gateway were counted but are in no entry.
    unlisted: u64,
}

/// One source of refusals. Unknown members are left out.
#[derive(Serialize)]
struct View<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<IpAddr>,
    #[serde(skip_serializing_if = "str::is_empty")]
    client: &'a str,
    transport: Transport,
    cause: &'a str,
    detail: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    datasource: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_id: Option<KeyId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_shape: Option<Shape>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<LimitView<'a>>,
    count: u64,
    first_at: Rfc3339,
    last_at: Rfc3339,
    advice: String,
}

#[derive(Serialize)]
struct LimitView<'a> {
    name: &'a str,
    max: u64,
    of: &'a str,
    wait_seconds: f64,
}

impl<'a> View<'a> {
    fn of(entry: &'a Entry, end: Option<&str>) -> Self {
        let limit = |limit: &'a OverLimit| LimitView {
            name: limit.name,
            max: limit.max,
            of: &limit.owner,
            wait_seconds: limit.wait.as_secs_f64(),
        };
        Self {
            address: entry.address,
            client: &entry.client,
            transport: entry.transport,
            cause: entry.cause,
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
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    uri: Uri,
) -> Result<Response, Problem> {
    let QueryString(parameters) = QueryString::<Parameters>::try_from_uri(&uri)?;
    let Parameters { client, address, cause, datasource, limit } = parameters;
    match &datasource {
        Some(datasource) => caller.may(Scope::Admin, datasource)?,
        None => caller.may_manage_all()?,
    }
    let address = match address {
        None => None,
        Some(text) => Some(text.parse().map_err(|_| {
            Problem::new(Kind::Malformed, "address has to be an IP address, 203.0.113.9 or 2001:db8::1.")
        })?),
    };
    let limit = limit.unwrap_or(REFUSALS_DEFAULT);
    if !(1..=COUNT_MAX).contains(&limit) {
        let words = format!("limit is {limit}: it has to be between 1 and {COUNT_MAX}.");
        return Err(Problem::new(Kind::Malformed, words).with("limit", COUNT_MAX));
    }
    let refusals = shared.parts.intake.refusals();
    let entries = refusals.newest(&Filter { client, address, cause, datasource }, limit);
    let unlisted = refusals.unlisted();
    off_the_runtime(move || {
        // Each key's end is looked up once, however many clients still try it.
        let mut ends = HashMap::new();
        for id in entries.iter().filter(|entry| entry.cause == REVOKED).filter_map(|entry| entry.key_id) {
            if let Vacant(place) = ends.entry(id) {
                place.insert(shared.registry().end_of(id)?);
            }
        }
        let end = |entry: &Entry| ends.get(&entry.key_id?)?.as_deref();
        let refusals = entries.iter().map(|entry| View::of(entry, end(entry))).collect();
        Ok(Json(List { refusals, unlisted }).into_response())
    })
    .await
}
