//! Queries: what the reading endpoints have in common, and the newest values of a datasource; `records.rs` has the
//! records. A query waits for the disk, so it runs on a blocking thread, in a turn of the caller's tenant.

use std::sync::Arc;

use axum::extract::{Query as QueryString, State};
use axum::http::Uri;
use axum::response::Response;
use serde::Deserialize;

use super::credentials::{Caller, DataCaller};
use super::page_stream::{self, JsonItems, PageFrame, PageSource};
use super::{HttpFrontState, PathParameters, run_in_turn};
use crate::auth::Scope;
use crate::consume::query::{PageBudget, QueryError, RecordsReader};
use crate::consume::render::parse_time;
use crate::filter::TopicFilter;
use crate::front::problem::Problem;
use crate::limits::{LATEST_TOPICS_MAX, QUERY_RECORDS_DEFAULT, QUERY_RECORDS_MAX};
use crate::message::{DatasourceId, Incarnation, TimeMicros};
use crate::observe::cause::Cause;

/// How many records a page may have.
pub(super) fn page_limit(asked: Option<usize>) -> Result<usize, Problem> {
    let limit = asked.unwrap_or(QUERY_RECORDS_DEFAULT);
    if (1..=QUERY_RECORDS_MAX).contains(&limit) {
        return Ok(limit);
    }
    let words = format!("limit is {limit}: it has to be between 1 and {QUERY_RECORDS_MAX}.");
    Err(Problem::new(Cause::Malformed, words).with("limit", QUERY_RECORDS_MAX))
}

/// Parses the time in the parameter `name`.
pub(super) fn time_parameter(name: &str, text: Option<String>) -> Result<Option<TimeMicros>, Problem> {
    let Some(text) = text else { return Ok(None) };
    let time = parse_time(&text).ok_or_else(|| {
        let words = format!("{name} has to be an RFC 3339 time such as 2026-11-23T09:00:00Z.");
        Problem::new(Cause::Malformed, words).with("parameter", name)
    });
    time.map(Some)
}

/// The query string of `latest`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LatestParameters {
    after_topic: Option<String>,
    incarnation: Option<Incarnation>,
}

/// `GET /v1/datasources/{datasource}/latest`
pub(super) async fn latest(
    State(shared): State<Arc<HttpFrontState>>,
    DataCaller(caller): DataCaller,
    PathParameters(datasource): PathParameters<String>,
    uri: Uri,
) -> Result<Response, Problem> {
    let QueryString(LatestParameters { after_topic, incarnation }) = QueryString::try_from_uri(&uri)?;
    let scope = readable_scope(&shared, &caller, &datasource, incarnation)?;
    let (datasource, _) = scope.of_scope();
    let head = format!("{{\"datasource\":\"{datasource}\",\"topics\":[");
    let topics = caller.0.topics_within(datasource.as_str());
    let source = LatestSource { scope, after_topic, topics, shown: None };
    let (frame, budget) = (PageFrame::object(head), PageBudget::new(LATEST_TOPICS_MAX));
    page_stream::answer_page(&shared, &caller, frame, budget, source).await
}

/// The newest values of the topics of a datasource, in the incarnation with this scope.
struct LatestSource {
    scope: DatasourceId,
    after_topic: Option<String>,
    /// Those that are shown, if an access token is not for all.
    topics: Option<Vec<TopicFilter>>,
    /// The last one of them that was shown.
    shown: Option<String>,
}

impl PageSource for LatestSource {
    fn read(
        &mut self,
        stored: &RecordsReader,
        budget: &mut PageBudget,
        items: &mut JsonItems,
    ) -> Result<Option<String>, QueryError> {
        let (scope, after) = (&self.scope, self.after_topic.as_deref());
        let Some(topics) = &self.topics else {
            self.after_topic =
                stored.latest_json_within(scope, after, budget, &mut |_, json| items.push_json(json))?;
            return Ok(self.after_topic.as_deref().map(json_text));
        };
        // What is looked at ends the piece, and what is shown the page: where that goes on tells no other topic's name.
        let (mut looked_at, shown) = (budget.clone(), &mut self.shown);
        let next = stored.latest_json_within(scope, after, &mut looked_at, &mut |topic, json| {
            if topics.iter().any(|filter| filter.matches(topic)) {
                budget.take(json.len());
                items.push_json(json);
                *shown = Some(topic.to_owned());
            }
        });
        self.after_topic = next?;
        let is_more = self.after_topic.is_some();
        Ok(is_more.then(|| json_text(self.shown.as_deref().unwrap_or_default())))
    }
}

/// A text as JSON.
fn json_text(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The topic or filter that a read is for: the one that is asked for, if the caller's access token is for all of that; or
/// else the one that the token is for.
pub(super) fn topic_of_read(
    caller: &Caller,
    datasource: &str,
    asked: Option<String>,
) -> Result<Option<String>, Problem> {
    let Some(topics) = caller.0.topics_within(datasource) else { return Ok(asked) };
    match (asked, &*topics) {
        (Some(asked), topics) => {
            let filter = TopicFilter::new(&asked).map_err(QueryError::from)?;
            match topics.iter().any(|topic| topic.covers(&filter)) {
                true => Ok(Some(asked)),
                false => Err(caller.0.outside_topics().into()),
            }
        }
        (None, [topic]) => Ok(Some(topic.as_str().to_owned())),
        (None, []) => Err(caller.0.outside_topics().into()),
        (None, _) => {
            let words = "The access token is for several topics: say which of them, as topic.";
            Err(Problem::new(Cause::Malformed, words).with("parameter", "topic"))
        }
    }
}

/// The scope of the records to be read, if the caller may read them: that of the datasource that there is, or of an
/// `incarnation` that is asked for. One that has ended is for admins of the gateway alone.
pub(super) fn readable_scope(
    shared: &HttpFrontState,
    caller: &Caller,
    datasource: &str,
    incarnation: Option<Incarnation>,
) -> Result<DatasourceId, Problem> {
    caller.require_scope(Scope::Subscribe, datasource)?;
    let Some(incarnation) = incarnation else {
        // Its scope first: a datasource that is created again while the key is looked at is not what the key reads.
        let scope = shared.datasource(datasource)?.scope();
        caller.require_scope(Scope::Subscribe, datasource)?;
        return Ok(scope);
    };
    let present = shared.registry().datasource(datasource);
    if let Some(present) = present.filter(|present| present.incarnation == incarnation) {
        caller.require_scope(Scope::Subscribe, datasource)?;
        return Ok(present.scope());
    }
    caller.require_gateway_admin()?;
    let id = DatasourceId::new(datasource)?;
    let left_out = shared.parts.log.withheld().now();
    let has_ended = incarnation > 0
        && left_out
            .history(datasource)
            .is_some_and(|of| of.has_ended(incarnation) && !of.is_purged(incarnation));
    match has_ended {
        true => Ok(id.scope(incarnation)),
        false => Err(no_incarnation(&id, incarnation)),
    }
}

/// The answer to asking for an incarnation that there is not, or that is purged.
pub(super) fn no_incarnation(id: &DatasourceId, incarnation: Incarnation) -> Problem {
    let words = format!(
        "There is no incarnation {incarnation} of the datasource {id}, or it is purged:          GET /v1/datasources?deleted=true lists those that were deleted."
    );
    Problem::new(Cause::NoDatasource, words)
}

/// The stored records, if there is storage.
pub(super) fn stored_records_query(shared: &HttpFrontState) -> Result<RecordsReader, Problem> {
    shared.parts.query.clone().ok_or_else(|| {
        let words =
            "Storage is off (storage.sinks names none that can be read), so that no records can be read.";
        Problem::new(Cause::NoStorage, words)
    })
}

/// Runs one query, when it is the turn of the caller's tenant.
pub(super) async fn run_query(
    shared: &HttpFrontState,
    caller: &Caller,
    query: impl FnOnce(&RecordsReader) -> Result<Response, QueryError> + Send + 'static,
) -> Result<Response, Problem> {
    let stored = stored_records_query(shared)?;
    run_in_turn(shared, caller, move || Ok(query(&stored)?)).await
}
