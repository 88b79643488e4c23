//! Deleting a datasource, and removing what is stored of deleted ones.
//!
//! A deletion ends the incarnation of the datasource: its keys are dead, and no reader gets its records any more but
//! admins of the gateway who ask for that incarnation. A purge removes what is stored of an ended incarnation: from
//! `records.db`, with quarantine and newest values. Retained messages and sessions go with the deletion itself. The log
//! is not rewritten: what it has of an ended incarnation is skipped by all its readers until retention removes it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Query as QueryString, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tokio::time::timeout_at;

use super::credentials::Caller;
use super::keys::undurable_answer;
use super::quarantine::await_stored_up_to_now;
use super::query::no_incarnation;
use super::{HttpFrontState, PathParameters, run_blocking, run_reading};
use crate::auth::{Actor, Datasource, EndedIncarnation, Scope};
use crate::consume::render::Rfc3339;
use crate::front::problem::Problem;
use crate::message::{DatasourceId, Incarnation};
use crate::observe::cause::Cause;

/// How long the answer to a purge waits for what ends with the deletion to be counted.
const DELETION_WAIT_MAX: Duration = Duration::from_secs(3);
/// How long it waits for storage and retained messages. Together this is less than a client's patience.
const PURGE_WAIT_MAX: Duration = Duration::from_secs(40);

/// The query string of a deletion.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeletionParameters {
    #[serde(default)]
    purge: bool,
    incarnation: Option<Incarnation>,
}

/// An ended incarnation, as the API shows it.
#[derive(Serialize)]
pub(super) struct EndedIncarnationView<'a> {
    id: &'a DatasourceId,
    incarnation: Incarnation,
    name: Option<&'a str>,
    created_at: Option<Rfc3339>,
    deleted_at: Rfc3339,
    /// When its removal was asked for.
    purged_at: Option<Rfc3339>,
}

impl<'a> EndedIncarnationView<'a> {
    pub(super) fn new(ended: &'a EndedIncarnation) -> Self {
        Self {
            id: &ended.datasource,
            incarnation: ended.incarnation,
            name: ended.name.as_deref(),
            created_at: ended.created_at.map(Rfc3339),
            deleted_at: Rfc3339(ended.ended_at),
            purged_at: ended.purged_at.map(Rfc3339),
        }
    }
}

/// The answer to a purge: what this call has removed.
#[derive(Serialize)]
struct PurgeResponse<'a> {
    id: &'a DatasourceId,
    incarnations: &'a [Incarnation],
    /// Whether nothing of them is stored any more. Otherwise it goes on being removed.
    done: bool,
    /// Stored records.
    records: u64,
    /// Records in quarantine.
    quarantined: u64,
    /// The payloads of both, in bytes.
    bytes: u64,
    /// Retained messages.
    retained: u64,
    /// Sessions that outlive their connection.
    sessions: u64,
}

/// What the end of a datasource takes with it at once.
#[derive(Default)]
struct EndedWithDatasource {
    retained: u64,
    sessions: u64,
}

/// `DELETE /v1/datasources/{datasource}`: answers once its keys are dead and nothing more can come in
/// under them; with 202 as long as that is not durable. With `purge`, once what was stored is removed, or with 202
/// if that takes long.
pub(super) async fn delete(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters(id): PathParameters<String>,
    uri: Uri,
) -> Result<Response, Problem> {
    let called = Instant::now();
    caller.require_scope(Scope::Admin, &id)?;
    let QueryString(DeletionParameters { purge, incarnation }) = QueryString::try_from_uri(&uri)?;
    if incarnation.is_some() && !purge {
        let words = "incarnation says what to purge: give purge=true as well, or leave it out.";
        return Err(Problem::new(Cause::NotPossible, words).with("parameter", "incarnation"));
    }
    let present = shared.datasource(&id);
    let is_present = |of: &Arc<Datasource>| incarnation.is_none_or(|wanted| wanted == of.incarnation);
    if let Ok(present) = present.as_ref().map(Arc::clone)
        && is_present(&present)
    {
        return delete_present(&shared, &caller, &present, purge, called).await;
    }
    let id = match (DatasourceId::new(&id), present) {
        // It may have been deleted by an earlier call.
        (Ok(id), Err(problem)) if !purge => return undurable_deletion(&shared, &id).ok_or(problem),
        (Err(_), Err(problem)) => return Err(problem),
        (id, _) => id?,
    };
    caller.require_gateway_admin()?;
    if let Some(answer) = undurable_deletion(&shared, &id) {
        return Ok(answer);
    }
    let registry = shared.registry().clone();
    let ended = run_blocking(move || Ok(registry.ended_incarnations()?)).await?;
    let wanted = ended.iter().filter(|ended| ended.datasource == id).map(|ended| ended.incarnation);
    let wanted: Vec<_> = wanted.filter(|ended| incarnation.is_none_or(|of| of == *ended)).collect();
    if wanted.is_empty() {
        return Err(no_incarnation(&id, incarnation.unwrap_or(1)));
    }
    purge_ended(&shared, caller.actor(), &id, &wanted, EndedWithDatasource::default()).await
}

/// The answer while the deletion of a datasource is not durable.
fn undurable_deletion(shared: &HttpFrontState, of: &DatasourceId) -> Option<Response> {
    let detail = shared.registry().describe_unwritten(of, None)?;
    Some(undurable_answer(&format!("The deletion of {of} is {detail}.")))
}

async fn delete_present(
    shared: &Arc<HttpFrontState>,
    caller: &Caller,
    datasource: &Arc<Datasource>,
    purge: bool,
    called: Instant,
) -> Result<Response, Problem> {
    let subscribers = &shared.parts.subscribers;
    let mut gone = EndedWithDatasource::default();
    if purge {
        let (retained, of) = (subscribers.retained.clone(), datasource.id.clone());
        // Counted now, because they go with the deletion.
        let until = tokio::time::Instant::now() + DELETION_WAIT_MAX;
        let caught_up = retained.wait_caught_up(shared.parts.log.next_offset());
        is_done_by(until, retained.trouble(), caught_up).await;
        let counted = run_reading(move || retained.count_of(&of).map_err(|error| Problem::internal(&error)));
        // Keys die whatever this database says.
        gone.retained = counted.await.map_or(0, |(messages, _)| messages);
    }
    let (registry, actor, of) = (shared.registry().clone(), caller.actor(), datasource.clone());
    let dead = run_blocking(move || Ok(registry.delete_incarnation(&actor, &of)?)).await?;
    shared.settle(caller, &dead, called).await;
    if let Some(answer) = undurable_deletion(shared, &datasource.id) {
        return Ok(answer);
    }
    // What reads the log has to have let go of it before its id can be used again.
    let version = shared.parts.log.withheld().version();
    let swept = async {
        subscribers.session_ends.wait_swept(version).await;
        gone.sessions = subscribers.session_ends.take_count(&datasource.scope());
    };
    if purge {
        let _ = tokio::time::timeout(DELETION_WAIT_MAX, swept).await;
        let incarnations = [datasource.incarnation];
        // The key may be one of those that have just ended.
        let actor = caller.actor().under_way();
        return purge_ended(shared, actor, &datasource.id, &incarnations, gone).await;
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Waits until a consumer of the log has done something, and returns whether it has. Not while it has trouble: that may
/// take for ever.
async fn is_done_by(
    until: tokio::time::Instant,
    trouble: Option<String>,
    done: impl Future<Output = ()>,
) -> bool {
    trouble.is_none() && timeout_at(until, done).await.is_ok()
}

/// Removes what is stored of incarnations that have ended, and says how much that was.
async fn purge_ended(
    shared: &Arc<HttpFrontState>,
    actor: Actor,
    id: &DatasourceId,
    incarnations: &[Incarnation],
    gone: EndedWithDatasource,
) -> Result<Response, Problem> {
    // What is stored is counted when nothing more comes in, and is under the name of its incarnation.
    let until = tokio::time::Instant::now() + PURGE_WAIT_MAX;
    let mut done = shared.parts.storage.as_ref().is_none_or(|storage| storage.trouble().is_none());
    done = done && matches!(timeout_at(until, await_stored_up_to_now(shared)).await, Ok(Ok(())));
    let scopes: Vec<_> = incarnations.iter().map(|incarnation| id.scope(*incarnation)).collect();
    let mut stored = (0, 0, 0);
    if let (Some(query), Some(storage)) = (shared.parts.query.clone(), &shared.parts.storage) {
        let version = shared.parts.log.withheld().version();
        done &= is_done_by(until, storage.trouble(), storage.wait_reconciled(version)).await;
        let counted = run_reading(move || {
            let mut sum = (0, 0, 0);
            for scope in &scopes {
                let (records, quarantined, bytes) = query.count_of(scope)?;
                sum = (sum.0 + records, sum.1 + quarantined, sum.2 + bytes);
            }
            Ok(sum)
        });
        match counted.await {
            Ok(counted) => stored = counted,
            Err(_) => done = false,
        }
    }
    let (registry, of, ended) = (shared.registry().clone(), id.clone(), incarnations.to_vec());
    let version = run_blocking(move || {
        let mut version = 0;
        for incarnation in ended {
            version = version.max(registry.purge_incarnation(&actor, &of, incarnation)?);
        }
        Ok(version)
    });
    let version = version.await?;
    if let Some(storage) = &shared.parts.storage {
        done &= is_done_by(until, storage.trouble(), storage.wait_reconciled(version)).await;
    }
    let retained = &shared.parts.subscribers.retained;
    done &= is_done_by(until, retained.trouble(), retained.wait_reconciled(version)).await;
    let (records, quarantined, bytes) = stored;
    let EndedWithDatasource { retained, sessions } = gone;
    let answer = PurgeResponse { id, incarnations, done, records, quarantined, bytes, retained, sessions };
    let status = if done { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, Json(answer)).into_response())
}
