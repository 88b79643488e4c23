//! The audit over HTTP: who changed what, when and from where; as pages of JSON, or as NDJSON for another
//! system to keep.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query as QueryString, State};
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, Uri};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::credentials::Caller;
use super::problem::{Kind, Problem};
use super::{Shared, off_the_runtime};
use crate::auth::audit::{Entry, Page};
use crate::limits::{AUDIT_ENTRIES_DEFAULT, AUDIT_ENTRIES_MAX};
use crate::message::TimeMicros;
use crate::time::{Rfc3339, parse_time};

const NDJSON: &str = "application/x-ndjson";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    from: Option<String>,
    to: Option<String>,
    after: Option<i64>,
    limit: Option<usize>,
    format: Option<Format>,
}

#[derive(Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Format {
    Json,
    Ndjson,
}

/// The answer to reading the audit.
#[derive(Serialize)]
struct List<'a> {
    entries: Vec<View<'a>>,
    /// The `after` of the next page, if there may be one.
    next: Option<i64>,
}

#[derive(Serialize)]
struct View<'a> {
    at: Rfc3339,
    #[serde(flatten)]
    entry: &'a Entry,
}

impl<'a> View<'a> {
    fn of(entry: &'a Entry) -> Self {
        Self { at: Rfc3339(entry.at), entry }
    }
}

/// `GET /v1/audit`
pub(super) async fn list(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    headers: HeaderMap,
    uri: Uri,
) -> Result<Response, Problem> {
    caller.may_manage_all()?;
    let QueryString(parameters) = QueryString::<Parameters>::try_from_uri(&uri)?;
    let Parameters { from, to, after, limit, format } = parameters;
    let accepts = |value: &axum::http::HeaderValue| value.to_str().is_ok_and(|text| text.contains(NDJSON));
    let ndjson = match format {
        Some(format) => format == Format::Ndjson,
        None => headers.get_all(ACCEPT).iter().any(accepts),
    };
    let limit = limit.unwrap_or(if ndjson { AUDIT_ENTRIES_MAX } else { AUDIT_ENTRIES_DEFAULT });
    if !(1..=AUDIT_ENTRIES_MAX).contains(&limit) {
        let words = format!("limit is {limit}: it has to be between 1 and {AUDIT_ENTRIES_MAX}.");
        return Err(Problem::new(Kind::Malformed, words).with("limit", AUDIT_ENTRIES_MAX));
    }
    let (from, to) = (time("from", from)?, time("to", to)?);
    let page = Page { from, to, after: after.unwrap_or(0), limit };
    let registry = shared.registry().clone();
    let entries = off_the_runtime(move || Ok(registry.audited(&page)?)).await?;
    if ndjson {
        let mut lines = Vec::new();
        for entry in &entries {
            serde_json::to_writer(&mut lines, &View::of(entry)).map_err(|error| Problem::internal(&error))?;
            lines.push(b'\n');
        }
        return Ok(([(CONTENT_TYPE, NDJSON)], lines).into_response());
    }
    let next = entries.last().filter(|_| entries.len() == limit).map(|entry| entry.id);
    Ok(Json(List { entries: entries.iter().map(View::of).collect(), next }).into_response())
}

fn time(name: &str, text: Option<String>) -> Result<Option<TimeMicros>, Problem> {
    let Some(text) = text else { return Ok(None) };
    let time = parse_time(&text).ok_or_else(|| {
        let words = format!("{name} has to be an RFC 3339 time such as 2026-11-23T09:28:39Z.");
        Problem::new(Kind::Malformed, words).with("parameter", name)
    })?;
    Ok(Some(time))
}
