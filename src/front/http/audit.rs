//! The audit over HTTP: who changed what, when and from where; as pages of JSON, or as NDJSON for another
//! system to keep.

use std::sync::Arc;

use axum::extract::{Query as QueryString, State};
use axum::http::header::ACCEPT;
use axum::http::{HeaderMap, Uri};
use axum::response::Response;
use serde::{Deserialize, Serialize};

use super::charged_list::ChargedList;
use super::credentials::Caller;
use super::members::whole_parameter;
use super::{HttpFrontState, run_in_turn};
use crate::auth::audit::{AuditEntry, AuditQuery};
use crate::front::problem::Problem;
use crate::limits::{AUDIT_ENTRIES_DEFAULT, AUDIT_ENTRIES_MAX, AUDIT_ENTRIES_PER_READ};
use crate::message::TimeMicros;
use crate::observe::cause::Cause;
use crate::time::{Rfc3339, parse_time};

const NDJSON_MEDIA_TYPE: &str = "application/x-ndjson";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AuditParameters {
    from: Option<String>,
    to: Option<String>,
    #[serde(default, deserialize_with = "whole_parameter")]
    after: Option<u64>,
    limit: Option<usize>,
    format: Option<AuditFormat>,
}

#[derive(Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum AuditFormat {
    Json,
    Ndjson,
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
    let after = after.and_then(|id| i64::try_from(id).ok()).unwrap_or(0);
    let mut query = AuditQuery { from, to, after, limit };
    let registry = shared.registry().clone();
    let account = shared.parts.intake.memory_account(&caller.0);
    run_in_turn(&shared, &caller, move || {
        let mut list = match ndjson {
            true => ChargedList::lines(&account, NDJSON_MEDIA_TYPE)?,
            false => ChargedList::json(&account, "{\"entries\":[")?,
        };
        let mut left = limit;
        while left > 0 {
            query.limit = left.min(AUDIT_ENTRIES_PER_READ);
            let entries = registry.audit_entries(&query)?;
            entries.iter().try_for_each(|entry| list.push(&AuditEntryView::new(entry)))?;
            left -= entries.len();
            query.after = entries.last().map_or(query.after, |last| last.id);
            if entries.len() < query.limit {
                break;
            }
        }
        // The `after` of the next page, if there may be one.
        let next = if left == 0 { query.after.to_string() } else { "null".to_owned() };
        Ok(list.finish(&if ndjson { String::new() } else { format!("],\"next\":{next}}}") }))
    })
    .await
}

fn audit_time_parameter(name: &str, text: Option<String>) -> Result<Option<TimeMicros>, Problem> {
    let Some(text) = text else { return Ok(None) };
    let time = parse_time(&text).ok_or_else(|| {
        let words = format!("{name} has to be an RFC 3339 time such as 2026-11-23T09:28:39Z.");
        Problem::new(Cause::Malformed, words).with("parameter", name)
    })?;
    Ok(Some(time))
}
