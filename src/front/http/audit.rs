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
use super::{HttpFrontState, run_in_turn};
use crate::auth::audit::{AuditEntry, AuditQuery};
use crate::front::problem::Problem;
use crate::limits::{AUDIT_ENTRIES_DEFAULT, AUDIT_ENTRIES_MAX};
use crate::message::TimeMicros;
use crate::observe::cause::Cause;
use crate::time::{Rfc3339, parse_time};

const NDJSON_MEDIA_TYPE: &str = "application/x-ndjson";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AuditParameters {
    from: Option<String>,
    to: Option<String>,
    after: Option<i64>,
    limit: Option<usize>,
    format: Option<AuditFormat>,
}

#[derive(Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum AuditFormat {
    Json,
    Ndjson,
}

/// The answer to reading the audit.
#[derive(Serialize)]
struct AuditListResponse<'a> {
    entries: Vec<AuditEntryView<'a>>,
    /// The `after` of the next page, if there may be one.
    next: Option<i64>,
}

#[derive(Serialize)]
struct AuditEntryView<'a> {
    at: Rfc3339,
    #[serde(flatten)]
    entry: &'a AuditEntry,
}

impl<'a> AuditEntryView<'a> {
    fn new(entry: &'a AuditEntry) -> Self {
        Self { at: Rfc3339(entry.at), entry }
    }
}

/// `GET /v1/audit`
pub(super) async fn list(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    headers: HeaderMap,
    uri: Uri,
) -> Result<Response, Problem> {
    caller.require_gateway_admin()?;
    let QueryString(parameters) = QueryString::<AuditParameters>::try_from_uri(&uri)?;
    let AuditParameters { from, to, after, limit, format } = parameters;
    let accepts =
        |value: &axum::http::HeaderValue| value.to_str().is_ok_and(|text| text.contains(NDJSON_MEDIA_TYPE));
    let ndjson = match format {
        Some(format) => format == AuditFormat::Ndjson,
        None => headers.get_all(ACCEPT).iter().any(accepts),
    };
    let limit = limit.unwrap_or(if ndjson { AUDIT_ENTRIES_MAX } else { AUDIT_ENTRIES_DEFAULT });
    if !(1..=AUDIT_ENTRIES_MAX).contains(&limit) {
        let words = format!("limit is {limit}: it has to be between 1 and {AUDIT_ENTRIES_MAX}.");
        return Err(Problem::new(Cause::Malformed, words).with("limit", AUDIT_ENTRIES_MAX));
    }
    let (from, to) = (audit_time_parameter("from", from)?, audit_time_parameter("to", to)?);
    let page = AuditQuery { from, to, after: after.unwrap_or(0), limit };
    let registry = shared.registry().clone();
    let entries = run_in_turn(&shared, &caller, move || Ok(registry.audit_entries(&page)?)).await?;
    if ndjson {
        let mut lines = Vec::new();
        for entry in &entries {
            serde_json::to_writer(&mut lines, &AuditEntryView::new(entry))
                .map_err(|error| Problem::internal(&error))?;
            lines.push(b'\n');
        }
        return Ok(([(CONTENT_TYPE, NDJSON_MEDIA_TYPE)], lines).into_response());
    }
    let next = entries.last().filter(|_| entries.len() == limit).map(|entry| entry.id);
    Ok(Json(AuditListResponse { entries: entries.iter().map(AuditEntryView::new).collect(), next })
        .into_response())
}

fn audit_time_parameter(name: &str, text: Option<String>) -> Result<Option<TimeMicros>, Problem> {
    let Some(text) = text else { return Ok(None) };
    let time = parse_time(&text).ok_or_else(|| {
        let words = format!("{name} has to be an RFC 3339 time such as 2026-11-23T09:28:39Z.");
        Problem::new(Cause::Malformed, words).with("parameter", name)
    })?;
    Ok(Some(time))
}
