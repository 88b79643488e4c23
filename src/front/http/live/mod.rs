//! `GET /v1/live`: what happens, once a second, as server-sent events for people who watch: how many records each
//! datasource got and its newest ones, whether the gateway is healthy, and that there is something new to be asked for.
//!
//! It is a digest: however much comes in, a second of it is some kilobytes. A program that has to have every record
//! reads `/v1/datasources/{datasource}/stream`.

mod digest;
mod places;
mod source;
mod start;

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::{Query as QueryString, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue, Method, Uri, Version};
use axum::response::Response;
use serde::Deserialize;

pub(super) use self::places::LivePlaces;
use self::source::LiveSource;
use super::credentials::Caller;
use super::dashboard::browser_sessions::SessionDigest;
use super::stream::{StreamBody, StreamReader};
use super::{HttpFrontState, run_in_turn};
use crate::auth::Scope;
use crate::consume::query::QueryError;
use crate::filter::TopicFilter;
use crate::front::problem::Problem;
use crate::message::DatasourceId;
use crate::observe::cause::Cause;

/// The query string.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LiveParameters {
    datasource: Option<String>,
    topic: Option<String>,
}

/// What is watched.
struct LiveView {
    /// The scope of the datasource; that of all, if all are watched.
    scope: DatasourceId,
    /// Which records of a single datasource are shown.
    filter: Option<TopicFilter>,
    /// Whether its keys and refusals are for this watcher.
    is_admin: bool,
    /// Whether the gateway's sinks are.
    is_gateway_admin: bool,
}

impl LiveView {
    /// Whether one datasource is watched, with its records.
    fn is_of_one(&self) -> bool {
        self.filter.is_some()
    }
}

/// `GET /v1/live`
pub(super) async fn watch(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    session: Option<Extension<SessionDigest>>,
    (method, version, uri): (Method, Version, Uri),
) -> Result<Response, Problem> {
    let QueryString(parameters) = QueryString::<LiveParameters>::try_from_uri(&uri)?;
    let view = view_of(&shared, &caller, &parameters)?;
    let mut response = Response::new(Body::empty());
    if method != Method::HEAD {
        let place = shared.live_places.take(caller.0.key_id(), caller.0.datasource())?;
        // From here on nothing is missed; what came before is looked for behind it.
        let next = shared.parts.log.next_offset();
        let (front, start) = (shared.clone(), start::LiveStart::of(&view, &caller));
        let hello = run_in_turn(&shared, &caller, move || start.render(&front, next)).await?;
        let watcher = (caller.0.clone(), session.map(|Extension(digest)| digest));
        let source = LiveSource::new(shared.clone(), watcher, place, view, next, hello);
        let reader = StreamReader::open(&shared.streams, &caller.1, version, Box::new(source));
        *response.body_mut() = Body::new(StreamBody::new(reader.clone()));
        response.extensions_mut().insert(reader);
    }
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform"));
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    Ok(response)
}

/// What the caller may watch of what it asks for.
fn view_of(
    shared: &HttpFrontState,
    caller: &Caller,
    parameters: &LiveParameters,
) -> Result<LiveView, Problem> {
    let grant = &caller.0;
    let is_gateway_admin = caller.require_gateway_admin().is_ok();
    let Some(id) = &parameters.datasource else {
        if parameters.topic.is_some() {
            let words = "topic says which records of a datasource are shown: give datasource as well.";
            return Err(Problem::new(Cause::NotPossible, words).with("parameter", "topic"));
        }
        grant.allows_scope(Scope::Subscribe)?;
        let own = grant.datasource();
        let scope = if own.is_all() { own.clone() } else { shared.datasource(own.as_str())?.scope() };
        let is_admin = grant.allows_scope(Scope::Admin).is_ok();
        return Ok(LiveView { scope, filter: None, is_admin, is_gateway_admin });
    };
    caller.require_scope(Scope::Subscribe, id)?;
    let scope = shared.datasource(id)?.scope();
    // Its scope first: a datasource that is made again while the key is looked at is not what the key reads.
    caller.require_scope(Scope::Subscribe, id)?;
    let filter = TopicFilter::new(parameters.topic.as_deref().unwrap_or("#")).map_err(QueryError::from)?;
    let is_admin = grant.allows(Scope::Admin, id).is_ok();
    Ok(LiveView { scope, filter: Some(filter), is_admin, is_gateway_admin })
}

/// Writes an event.
fn write_event(out: &mut Vec<u8>, name: &str, data: &impl serde::Serialize) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\ndata: ");
    if let Err(error) = serde_json::to_writer(&mut *out, data) {
        tracing::error!(%error, "a part of the live view has no JSON form");
    }
    out.extend_from_slice(b"\n\n");
}
