//! Redrives over HTTP: messages in quarantine are sent through intake again after a schema was corrected.
//!
//! A message is sent again under the authority of the admin who asks, and becomes a record of the key
//! that it first came with. It is kept once for ever, however often and by however many it is asked for at once: the
//! record in the log names the offset that it was redriven from, storage notes that, and a page is read when storage
//! has everything that is in the log, in the only redrive of its datasource at this gateway. Between the gateways of a
//! cluster JetStream tells: what another gateway has redriven is on the page or came into the stream after the page was
//! begun, and of that the id is known for the whole window. So what is read on a page is published within half of that, or
//! not at all. A message that turns out to be let in already, itself or as a corrected one with its
//! id, gets a mark in the log, which storage notes as well.
//!
//! A redrive is a task of its own: if its client leaves, it ends with the page that it has begun, and with the audit entry of
//! what it has let in.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::{OwnedMutexGuard, oneshot};
use tokio_util::sync::CancellationToken;

use super::credentials::Caller;
use super::members::{PARAMETER_MAX, stated};
use super::quarantine::{STORAGE_WAIT_MAX, await_stored_up_to_now, is_stored};
use super::turns::run_in_turn_of;
use super::{HttpFrontState, PathParameters, query, run_blocking};
use crate::auth::{Actor, AuditEvent, Datasource, Grant, GrantDenial, Scope};
use crate::consume::quarantine::QuarantineQuery;
use crate::consume::quarantine::page::QuarantinedRecord;
use crate::consume::query::{PageBudget, RecordsReader};
use crate::front::problem::Problem;
use crate::intake::{RedriveOutcome, Refusal};
use crate::limits::{
    HTTP_MANAGE_BYTES_MAX, PAYLOAD_BYTES_MAX, QUERY_PIECE_BYTES, QUERY_RECORDS_MAX, REDRIVE_PAGE_RECORDS,
    REDRIVE_RECORDS_MAX, VALIDATION_ERRORS_MAX,
};
use crate::log::{QuarantineReason, SectionOutcome};
use crate::message::{DatasourceId, Offset, Transport};
use crate::observe::cause::Cause;
use crate::processor::spawn_fairly;
use crate::whole_number::WholeNumber;

/// What a redrive holds in memory: a piece of a page, in which the last record may be of the largest size, and the draft
/// that is made of it.
const REDRIVE_BYTES: usize = 4 * (QUERY_PIECE_BYTES + PAYLOAD_BYTES_MAX);
/// The body of a redrive that names as many messages as one may.
const REDRIVE_BODY_BYTES_MAX: usize = HTTP_MANAGE_BYTES_MAX + 24 * QUERY_RECORDS_MAX;

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
    let memory =
        account.charge(REDRIVE_BYTES).map_err(|exceeded| Problem::from(exceeded).after_body_read())?;
    let query = QuarantineQuery {
        scope: datasource.scope(),
        topic: filter,
        from: None,
        after_offset: None,
        offsets: ids,
        redrivable: true,
        limit: REDRIVE_PAGE_RECORDS,
    };
    let (actor, grant, answer) = (caller.actor().under_way(), caller.0.clone(), RedriveResponse::default());
    let redrive = Redrive { shared, grant, actor, datasource, stored, query, answer };
    let gone = CancellationToken::new();
    let _leaving = gone.clone().drop_guard();
    let (answering, answered) = oneshot::channel();
    let intake = redrive.shared.parts.intake.clone();
    let redriving = async move {
        let _ = answering.send(redrive.run(&gone).await);
        drop(memory);
    };
    spawn_fairly(&caller.1.payer, intake.track(redriving));
    let answer = answered.await.map_err(|error| Problem::internal(&error))?;
    Ok(Json(answer.map_err(Problem::after_body_read)?).into_response())
}

/// A redrive under way.
struct Redrive {
    shared: Arc<HttpFrontState>,
    grant: Grant,
    actor: Actor,
    datasource: Arc<Datasource>,
    stored: RecordsReader,
    /// What is left to be looked at.
    query: QuarantineQuery,
    answer: RedriveResponse,
}

/// A page of quarantine, which nobody else sends again meanwhile.
struct RedrivePage {
    records: Vec<QuarantinedRecord>,
    /// Where the next page begins, if there is one.
    next: Option<Offset>,
    /// When it has to be in the log at the latest.
    before: Option<Instant>,
    _turn: RedriveTurn,
}

impl Redrive {
    /// Sends again what was asked for, page by page, until its client is `gone`.
    async fn run(mut self, gone: &CancellationToken) -> Result<RedriveResponse, Problem> {
        let redriven = self.send_pages(gone).await;
        // What was let in is in the audit, whatever became of the rest.
        if self.answer.redriven > 0 {
            let (registry, actor) = (self.shared.registry().clone(), self.actor);
            let (id, answer) = (self.datasource.id.clone(), &self.answer);
            let what = json!({ "redriven": answer.redriven, "failing": answer.failing });
            run_blocking(move || {
                let (action, datasource) = ("quarantine.redriven", Some(&id));
                Ok(registry.audit(&actor, &AuditEvent { action, datasource, key_id: None, what: &what })?)
            })
            .await?;
        }
        redriven.map(|()| self.answer)
    }

    async fn send_pages(&mut self, gone: &CancellationToken) -> Result<(), Problem> {
        loop {
            let Some(page) = gone.run_until_cancelled(self.read_page()).await else { return Ok(()) };
            let page = page?;
            let to_send = (&*page.records, page.before);
            redrive_page(&self.shared, &self.grant, &self.datasource, to_send, &mut self.answer).await?;
            self.answer.more = page.next.is_some();
            self.query.after_offset = page.next;
            let looked_at = self.answer.redriven + self.answer.duplicates + self.answer.failing;
            if page.next.is_none() || looked_at >= REDRIVE_RECORDS_MAX {
                return Ok(());
            }
        }
    }

    /// Reads the next page, in the turn of this redrive.
    async fn read_page(&self) -> Result<RedrivePage, Problem> {
        let shared = &self.shared;
        // Storage notes what was sent again. A redrive that it has not seen yet would be repeated here, and ids are not
        // known for ever.
        let turn = shared.redrives.turn(&self.query.scope, STORAGE_WAIT_MAX).await.ok_or_else(|| {
            let words = "Other redrives of this datasource are under way; asking again is safe.";
            Problem::new(Cause::StorageBehind, words)
        })?;
        let before = shared.parts.log.shared_id_window().map(|window| Instant::now() + window / 2);
        let end = shared.parts.log.next_offset();
        await_stored_up_to_now(shared).await?;
        let (asked, reader) = (self.query.clone(), self.stored.clone());
        let page = run_in_turn_of(shared, &self.grant, move || {
            let mut budget = PageBudget::new(asked.limit);
            budget.begin_piece();
            Ok(reader.quarantine_within(&asked, &mut budget)?)
        })
        .await?;
        // What was read may be of a database that was made anew meanwhile, which does not have every mark yet.
        if !is_stored(shared, end).await {
            let words = "Storage was made anew meanwhile; asking again is safe.";
            return Err(Problem::new(Cause::StorageBehind, words));
        }
        Ok(RedrivePage { records: page.records, next: page.next, before, _turn: turn })
    }
}

/// One redrive at a time of each datasource: what a message's ids and marks say is of its datasource alone.
#[derive(Default)]
pub struct RedriveTurns {
    /// The datasources of which something is sent again, or waits to be.
    places: Mutex<HashMap<DatasourceId, Arc<tokio::sync::Mutex<()>>>>,
}

/// A redrive's turn, or its wait for one. The last of its datasource takes the place away.
struct RedriveTurn {
    turns: Arc<RedriveTurns>,
    scope: DatasourceId,
    held: Option<OwnedMutexGuard<()>>,
}

impl RedriveTurns {
    /// The turn of a redrive: held from where quarantine is read until what is sent again of it is in the log, so that it
    /// is sent again once. `None` if it has not come within `wait_max`.
    async fn turn(self: &Arc<Self>, scope: &DatasourceId, wait_max: Duration) -> Option<RedriveTurn> {
        let mut turn = RedriveTurn { turns: self.clone(), scope: scope.clone(), held: None };
        let place = self.places.lock().entry(scope.clone()).or_default().clone();
        turn.held = Some(tokio::time::timeout(wait_max, place.lock_owned()).await.ok()?);
        Some(turn)
    }
}

impl Drop for RedriveTurn {
    fn drop(&mut self) {
        drop(self.held.take());
        let mut places = self.turns.places.lock();
        if places.get(&self.scope).is_some_and(|place| Arc::strong_count(place) == 1) {
            places.remove(&self.scope);
        }
    }
}

/// Sends a page of messages through intake again, as one draft, before its time is over if it has one, and counts in
/// `answer` what became of them.
async fn redrive_page(
    shared: &HttpFrontState,
    grant: &Grant,
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
        match draft.redrive(grant, datasource, &record, before)? {
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
    let accepted = intake.admit(draft).await?.await?;
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
                return Err(Problem::new(Cause::StorageBehind, words));
            }
            other => {
                let refusal = Refusal::from_outcome(&other).unwrap_or(GrantDenial::Revoked.into());
                return Err(refusal.into());
            }
        }
    }
    if superseded.is_empty() {
        return Ok(());
    }
    Ok(intake.mark_superseded(grant, datasource, &superseded).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_redrive_waits_for_those_of_its_datasource_alone_and_not_for_ever() {
        let turns = Arc::<RedriveTurns>::default();
        let [press, oven] = ["press-4", "oven"].map(|id| DatasourceId::new(id).expect("a slug"));
        let first = turns.turn(&press, SOON).await.expect("nobody has it");
        let other = turns.turn(&oven, SOON).await.expect("nobody has that");
        assert!(turns.turn(&press, Duration::from_millis(10)).await.is_none(), "it is taken");
        let (waiting, of) = (turns.clone(), press.clone());
        let leaves = tokio::spawn(async move { waiting.turn(&of, SOON).await.is_some() });
        let (waiting, of) = (turns.clone(), press.clone());
        let stays = tokio::spawn(async move { waiting.turn(&of, SOON).await.is_some() });
        tokio::time::sleep(Duration::from_millis(50)).await;
        leaves.abort();
        assert!(leaves.await.is_err());
        drop((first, other));
        assert!(stays.await.expect("no panic"), "it has come");
        assert!(turns.places.lock().is_empty(), "none is left behind");
    }
}
