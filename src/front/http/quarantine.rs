//! Quarantine over HTTP: list it, send messages through intake again after a schema was corrected
//! (redrive), and quarantine what a leaked key has let in.
//!
//! A message is sent again under the authority of the admin who asks, and becomes a record of the key
//! that it first came with. It is kept once for ever, however often and by however many it is asked for at once: the
//! record in the log names the offset that it was redriven from, storage notes that, and a page is read when storage
//! has everything that is in the log, in the only redrive of this gateway. Between the gateways of a cluster JetStream
//! tells: what another gateway has redriven is on the page or came into the stream after the page was begun, and of
//! that the id is known for the whole window. So what is read on a page is published within half of that, or not at
//! all. A message that turns out to be let in already, itself or as a corrected one with its
//! id, gets a mark in the log, which storage notes as well.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Query as QueryString, Request, State};
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::credentials::Caller;
use super::members::{PARAMETER_MAX, stated, whole_parameter};
use super::page_stream::{self, JsonItems, PageFrame, PageSource};
use super::query::{self, page_limit, time_parameter};
use super::{HttpFrontState, PathParameters, keys, run_blocking, run_in_turn, run_reading};
use crate::auth::{AuditEvent, Datasource, GrantDenial, Scope};
use crate::consume::quarantine::QuarantineQuery;
use crate::consume::quarantine::leaks::LeakError;
use crate::consume::quarantine::page::{LeakedRecords, QuarantinedRecord};
use crate::consume::query::{PageBudget, QueryError, RecordsReader};
use crate::consume::render::Rfc3339;
use crate::front::problem::Problem;
use crate::intake::{RedriveOutcome, Refusal};
use crate::limits::{
    HTTP_MANAGE_BYTES_MAX, PAYLOAD_BYTES_MAX, QUERY_PIECE_BYTES, QUERY_RECORDS_MAX, REDRIVE_PAGE_RECORDS,
    REDRIVE_RECORDS_MAX, VALIDATION_ERRORS_MAX,
};
use crate::log::{QuarantineReason, SectionOutcome};
use crate::message::{Incarnation, KeyId, Offset, Transport, now_micros};
use crate::observe::cause::Cause;
use crate::time::parse_time;
use crate::whole_number::WholeNumber;

/// What a redrive holds in memory: a piece of a page, in which the last record may be of the largest size, and the draft
/// that is made of it.
const REDRIVE_BYTES: usize = 4 * (QUERY_PIECE_BYTES + PAYLOAD_BYTES_MAX);
/// The body of a redrive that names as many messages as one may.
const REDRIVE_BODY_BYTES_MAX: usize = HTTP_MANAGE_BYTES_MAX + 24 * QUERY_RECORDS_MAX;
/// How long a request waits until storage has caught up.
const STORAGE_WAIT_MAX: Duration = Duration::from_secs(30);

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

/// Which messages to send again: those with these offsets, those whose topic matches the filter, or those
/// that meet both; everything, if neither is given.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RedriveRequest {
    #[serde(default, deserialize_with = "stated")]
    ids: Option<BTreeSet<WholeNumber>>,
    filter: Option<String>,
}

/// The outcome of a redrive.
#[derive(Default, Serialize)]
struct RedriveResponse {
    /// Messages let in now.
    redriven: u64,
    /// Messages that an earlier redrive let in, or a corrected message with the same id took the place of.
    duplicates: u64,
    /// Messages that still fail: they stay in quarantine.
    failing: u64,
    /// Details of the first messages that fail.
    errors: Vec<RedriveFailure>,
    /// Whether there may be more: the client has to ask again.
    more: bool,
}

/// A message that fails again.
#[derive(Serialize)]
struct RedriveFailure {
    offset: Offset,
    topic: String,
    pointer: String,
    keyword: String,
    detail: String,
    schema_version: u32,
}

impl RedriveFailure {
    fn new(offset: Offset, topic: &str, reason: QuarantineReason<'static>) -> Self {
        Self {
            offset,
            topic: topic.to_owned(),
            pointer: reason.pointer.into_owned(),
            keyword: reason.keyword.into_owned(),
            detail: reason.words.into_owned(),
            schema_version: reason.schema_version,
        }
    }
}

/// `POST /v1/datasources/{datasource}/quarantine/redrive`
pub(super) async fn redrive(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters(id): PathParameters<String>,
    request: Request,
) -> Result<Response, Problem> {
    caller.require_scope(Scope::Admin, &id)?;
    let datasource = shared.datasource(&id)?;
    let RedriveRequest { ids, filter } = shared.read_json_up_to(request, REDRIVE_BODY_BYTES_MAX).await?;
    if ids.as_ref().and_then(BTreeSet::last).is_some_and(|WholeNumber(last)| *last > PARAMETER_MAX) {
        let words = format!("An offset is {PARAMETER_MAX} at most.");
        return Err(Problem::new(Cause::Malformed, words).with("pointer", "/ids").after_body_read());
    }
    let ids: Option<BTreeSet<Offset>> =
        ids.map(|ids| ids.into_iter().map(|WholeNumber(offset)| offset).collect());
    if ids.as_ref().is_some_and(|ids| ids.len() > QUERY_RECORDS_MAX) {
        let words = format!("One request names at most {QUERY_RECORDS_MAX} messages.");
        return Err(Problem::new(Cause::TooLarge, words).with("limit", QUERY_RECORDS_MAX).after_body_read());
    }
    let stored = query::stored_records_query(&shared).map_err(Problem::after_body_read)?;
    // A page with the draft that is made of it.
    let account = shared.parts.intake.memory_account(&caller.0);
    let _memory =
        account.charge(REDRIVE_BYTES).map_err(|exceeded| Problem::from(exceeded).after_body_read())?;
    let mut answer = RedriveResponse::default();
    let mut query = QuarantineQuery {
        scope: datasource.scope(),
        topic: filter,
        from: None,
        after_offset: None,
        offsets: ids,
        redrivable: true,
        limit: REDRIVE_PAGE_RECORDS,
    };
    let redriven: Result<(), Problem> = async {
        loop {
            // Storage notes what was sent again. A redrive that it has not seen yet would be repeated here, and ids are not
            // known for ever.
            let turn = shared.redriving.lock().await;
            let before = shared.parts.log.shared_id_window().map(|window| Instant::now() + window / 2);
            let end = shared.parts.log.next_offset();
            await_stored_up_to_now(&shared).await.map_err(Problem::after_body_read)?;
            let (asked, reader) = (query.clone(), stored.clone());
            let page = run_in_turn(&shared, &caller, move || {
                let mut budget = PageBudget::new(asked.limit);
                budget.begin_piece();
                Ok(reader.quarantine_within(&asked, &mut budget)?)
            })
            .await;
            let page = page.map_err(Problem::after_body_read)?;
            // What was read may be of a database that was made anew meanwhile, which does not have every mark yet.
            if !is_stored(&shared, end).await {
                let words = "Storage was made anew meanwhile; asking again is safe.";
                return Err(Problem::new(Cause::StorageBehind, words).after_body_read());
            }
            redrive_page(&shared, &caller, &datasource, (&page.records, before), &mut answer).await?;
            drop(turn);
            answer.more = page.next.is_some();
            query.after_offset = page.next;
            let looked_at = answer.redriven + answer.duplicates + answer.failing;
            if page.next.is_none() || looked_at >= REDRIVE_RECORDS_MAX {
                return Ok(());
            }
        }
    }
    .await;
    // What was let in is in the audit, whatever became of the rest.
    if answer.redriven > 0 {
        let (registry, actor) = (shared.registry().clone(), caller.actor().under_way());
        let what = json!({ "redriven": answer.redriven, "failing": answer.failing });
        run_blocking(move || {
            let (action, datasource) = ("quarantine.redriven", Some(&datasource.id));
            Ok(registry.audit(&actor, &AuditEvent { action, datasource, key_id: None, what: &what })?)
        })
        .await
        .map_err(Problem::after_body_read)?;
    }
    redriven?;
    Ok(Json(answer).into_response())
}

/// Sends a page of messages through intake again, as one draft, before its time is over if it has one, and counts in
/// `answer` what became of them.
async fn redrive_page(
    shared: &HttpFrontState,
    caller: &Caller,
    datasource: &Datasource,
    (page, before): (&[QuarantinedRecord], Option<Instant>),
    answer: &mut RedriveResponse,
) -> Result<(), Problem> {
    let intake = &shared.parts.intake;
    let mut draft = intake.draft(Transport::Http, 0);
    let left_out = shared.parts.log.withheld().now();
    let (mut added, mut superseded) = (Vec::new(), Vec::new());
    for parked in page {
        let record = parked.as_record(&datasource.id);
        // What a leaked key or a deleted datasource let in must not come back through a redrive.
        if left_out.withholds(&record) {
            continue;
        }
        match draft.redrive(&caller.0, datasource, &record, before)? {
            RedriveOutcome::Added => added.push(record),
            RedriveOutcome::Fails(reason) => {
                answer.failing += 1;
                if answer.errors.len() < VALIDATION_ERRORS_MAX {
                    answer.errors.push(RedriveFailure::new(record.offset, record.topic, *reason));
                }
            }
        }
    }
    if draft.is_empty() {
        return Ok(());
    }
    let accepted = intake.admit(draft).await.map_err(|refusal| Problem::from(refusal).after_body_read())?;
    let accepted = accepted.await.map_err(|refusal| Problem::from(refusal).after_body_read())?;
    for (record, outcome) in added.into_iter().zip(accepted.outcomes) {
        match outcome {
            SectionOutcome::Kept(_) => answer.redriven += 1,
            SectionOutcome::Duplicate(earlier) | SectionOutcome::Conflict { earlier, .. } => {
                answer.duplicates += 1;
                superseded.push((record, earlier.first()));
            }
            SectionOutcome::KeyDead if before.is_some_and(|before| before <= Instant::now()) => {
                let words =
                    "It took so long that another gateway may have redriven the rest; asking again is safe.";
                return Err(Problem::new(Cause::StorageBehind, words).after_body_read());
            }
            other => {
                let refusal = Refusal::from_outcome(&other).unwrap_or(GrantDenial::Revoked.into());
                return Err(Problem::from(refusal).after_body_read());
            }
        }
    }
    if superseded.is_empty() {
        return Ok(());
    }
    let marked = intake.mark_superseded(&caller.0, datasource, &superseded).await;
    marked.map_err(|refusal| Problem::from(refusal).after_body_read())
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
async fn is_stored(shared: &HttpFrontState, end: Offset) -> bool {
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
