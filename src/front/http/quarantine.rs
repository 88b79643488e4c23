//! Quarantine over HTTP: list it, and quarantine what a leaked key has let in. What is sent again of it: `redrive`.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Query as QueryString, Request, State};
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::credentials::Caller;
use super::members::{stated, whole_parameter};
use super::page_stream::{self, JsonItems, PageFrame, PageSource};
use super::query::{self, page_limit, time_parameter};
use super::{HttpFrontState, PathParameters, keys, run_blocking, run_reading};
use crate::auth::{AuditEvent, Scope};
use crate::consume::quarantine::QuarantineQuery;
use crate::consume::quarantine::leaks::LeakError;
use crate::consume::quarantine::page::LeakedRecords;
use crate::consume::query::{PageBudget, QueryError, RecordsReader};
use crate::consume::render::Rfc3339;
use crate::front::problem::Problem;
use crate::message::{Incarnation, KeyId, Offset, now_micros};
use crate::observe::cause::Cause;
use crate::time::parse_time;

/// How long a request waits until storage has caught up.
pub(super) const STORAGE_WAIT_MAX: Duration = Duration::from_secs(30);

/// The query string of `quarantine`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QuarantineParameters {
    topic: Option<String>,
    from: Option<String>,
    #[serde(default, deserialize_with = "whole_parameter")]
    after_offset: Option<Offset>,
    limit: Option<usize>,
    incarnation: Option<Incarnation>,
}

/// `GET /v1/datasources/{datasource}/quarantine`
pub(super) async fn list(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters(datasource): PathParameters<String>,
    uri: Uri,
) -> Result<Response, Problem> {
    let QueryString(parameters) = QueryString::<QuarantineParameters>::try_from_uri(&uri)?;
    let scope = query::readable_scope(&shared, &caller, &datasource, parameters.incarnation)?;
    let query = QuarantineQuery {
        scope,
        topic: parameters.topic,
        from: time_parameter("from", parameters.from)?,
        after_offset: parameters.after_offset,
        offsets: None,
        redrivable: false,
        limit: page_limit(parameters.limit)?,
    };
    let frame = PageFrame::object("{\"records\":[".to_owned());
    page_stream::answer_page(&shared, &caller, frame, PageBudget::new(query.limit), query).await
}

impl PageSource for QuarantineQuery {
    fn read(
        &mut self,
        stored: &RecordsReader,
        budget: &mut PageBudget,
        items: &mut JsonItems,
    ) -> Result<Option<String>, QueryError> {
        let page = stored.quarantine_within(self, budget)?;
        page.records.iter().for_each(|record| items.push(record));
        self.after_offset = page.next;
        Ok(page.next.map(|next| next.to_string()))
    }
}

/// The body of a request that quarantines what a key has let in.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyQuarantineRequest {
    #[serde(default, deserialize_with = "stated")]
    since: Option<String>,
    #[serde(default)]
    undo: bool,
}

/// The answer to quarantining what a key has let in, or to undoing it.
#[derive(Serialize)]
struct KeyQuarantineResponse {
    key_id: KeyId,
    /// From which time on; `None` when it was undone.
    since: Option<Rfc3339>,
    #[serde(flatten)]
    leaked: LeakedRecords,
}

/// `POST /v1/datasources/{datasource}/keys/{key_id}/quarantine`: answers once the records of the key are
/// withheld from every reader, or given back to them.
pub(super) async fn quarantine_key_records(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters((datasource, key_id)): PathParameters<(String, String)>,
    request: Request,
) -> Result<Response, Problem> {
    caller.require_scope(Scope::Admin, &datasource)?;
    let datasource = keys::key_owner(&shared, &datasource)?;
    let key_id = KeyId::parse(&key_id)?;
    let KeyQuarantineRequest { since, undo } = shared.read_json(request).await?;
    let refused = |cause| {
        let words = "Give a past time as since: {\"since\": \"2026-11-23T09:00:00Z\"}; or {\"undo\": true}.";
        Problem::new(cause, words).with("pointer", "/since").after_body_read()
    };
    let since = since.map(|text| parse_time(&text).ok_or_else(|| refused(Cause::Malformed))).transpose()?;
    if since.is_some() == undo {
        return Err(refused(Cause::Malformed));
    }
    if since.is_some_and(|since| since > now_micros()) {
        return Err(refused(Cause::NotPossible));
    }
    let (for_change, of, actor) = (shared.clone(), datasource.clone(), caller.actor());
    let version = run_blocking(move || {
        let leaks = &for_change.parts.leaks;
        let action = if undo { "key.records_given_back" } else { "key.records_quarantined" };
        let what = json!({ "since": since.map(Rfc3339) });
        // The audit entry comes first: an entry for a change that then fails is better than a change
        // without an entry.
        for_change.registry().audit(
            &actor,
            &AuditEvent { action, datasource: Some(&of), key_id: Some(key_id), what: &what },
        )?;
        Ok(match since {
            Some(since) => leaks.withhold(&actor, &of, key_id, since)?,
            None => leaks.give_back(&actor, &of, key_id)?,
        })
    });
    let version = version.await.map_err(Problem::after_body_read)?;
    tracing::warn!(%datasource, %key_id, undo, "what a key let in was put into quarantine, or taken out");
    wait_for_storage(shared.parts.subscribers.retained.wait_reconciled(version))
        .await
        .map_err(Problem::after_body_read)?;
    await_stored_up_to_now(&shared).await.map_err(Problem::after_body_read)?;
    if let Some(storage) = &shared.parts.storage {
        wait_for_storage(storage.wait_reconciled(version)).await.map_err(Problem::after_body_read)?;
    }
    let (stored, log) = (shared.parts.query.clone(), shared.parts.log.clone());
    let present = shared.registry().datasource(datasource.as_str());
    let scope = present.map_or_else(|| datasource.clone(), |present| present.scope());
    let leaked = run_reading(move || match stored {
        Some(stored) => Ok(stored.leaked(&scope, key_id)?),
        None => LeakedRecords::in_log(&*log, &datasource, key_id).map_err(|error| Problem::internal(&error)),
    });
    let leaked = leaked.await.map_err(Problem::after_body_read)?;
    Ok(Json(KeyQuarantineResponse { key_id, since: since.map(Rfc3339), leaked }).into_response())
}

/// Waits until storage has everything that any gateway has kept by now.
pub(super) async fn await_stored_up_to_now(shared: &HttpFrontState) -> Result<(), Problem> {
    let log = &shared.parts.log;
    let caught_up = log.catch_up(Offset::MAX).await;
    caught_up.map_err(|error| Problem::new(Cause::Unavailable, format!("{error}.")))?;
    match &shared.parts.storage {
        Some(storage) => wait_for_storage(storage.wait_stored(log.next_offset())).await,
        None => Ok(()),
    }
}

/// Whether storage has everything below `end` now.
pub(super) async fn is_stored(shared: &HttpFrontState, end: Offset) -> bool {
    match &shared.parts.storage {
        Some(storage) => tokio::time::timeout(Duration::ZERO, storage.wait_stored(end)).await.is_ok(),
        None => true,
    }
}

async fn wait_for_storage(done: impl Future<Output = ()>) -> Result<(), Problem> {
    tokio::time::timeout(STORAGE_WAIT_MAX, done).await.map_err(|_| {
        let words = "Storage has not caught up; what was asked for holds, and asking again is safe.";
        Problem::new(Cause::StorageBehind, words)
    })
}

impl From<LeakError> for Problem {
    fn from(error: LeakError) -> Self {
        match error {
            LeakError::TooMany => Self::new(Cause::Conflict, format!("{error}.")),
            LeakError::Registry(error) => error.into(),
            LeakError::Log(_) => Self::new(Cause::Unavailable, format!("{error}.")),
        }
    }
}
