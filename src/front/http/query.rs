//! Queries: the stored records of a datasource, as pages and as the newest values. A query waits for the
//! disk, so it runs on a blocking thread, and only a limited number runs at once.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query as QueryString, State};
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::credentials::Caller;
use super::problem::{Kind, Problem};
use super::{InPath, Shared, off_the_runtime};
use crate::auth::Scope;
use crate::consume::query::{Query, QueryError, RecordsQuery};
use crate::consume::render::{self, parse_time};
use crate::limits::{QUERY_RECORDS_DEFAULT, QUERY_RECORDS_MAX};
use crate::message::{DatasourceId, KeyId, Offset, TimeMicros};

/// The query string of `records`. An unknown parameter is refused: a filter that is not applied would
/// return records that were not asked for.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    topic: Option<String>,
    from: Option<String>,
    to: Option<String>,
    after_offset: Option<Offset>,
    key_id: Option<String>,
    limit: Option<usize>,
}

impl Parameters {
    fn query(self, datasource: DatasourceId) -> Result<RecordsQuery, Problem> {
        let key_id = self.key_id.map(|id| KeyId::parse(&id)).transpose()?;
        Ok(RecordsQuery {
            datasource,
            topic: self.topic,
            from: time("from", self.from)?,
            to: time("to", self.to)?,
            after_offset: self.after_offset,
            key_id,
            limit: limit(self.limit)?,
        })
    }
}

/// How many records a page may have.
pub(super) fn limit(asked: Option<usize>) -> Result<usize, Problem> {
    let limit = asked.unwrap_or(QUERY_RECORDS_DEFAULT);
    if (1..=QUERY_RECORDS_MAX).contains(&limit) {
        return Ok(limit);
    }
    let words = format!("limit is {limit}: it has to be between 1 and {QUERY_RECORDS_MAX}.");
    Err(Problem::new(Kind::Malformed, words).with("limit", QUERY_RECORDS_MAX))
}

/// Parses the time in the parameter `name`.
pub(super) fn time(name: &str, text: Option<String>) -> Result<Option<TimeMicros>, Problem> {
    let Some(text) = text else { return Ok(None) };
    let time = parse_time(&text).ok_or_else(|| {
        let words = format!("{name} has to be an RFC 3339 time such as 2026-11-23T09:00:00Z.");
        Problem::new(Kind::Malformed, words)
    });
    time.map(Some)
}

/// `GET /v1/datasources/{datasource}/records`
pub(super) async fn records(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    InPath(datasource): InPath<String>,
    uri: Uri,
) -> Result<Response, Problem> {
    let datasource = readable(&shared, &caller, &datasource)?;
    let QueryString(parameters) = QueryString::<Parameters>::try_from_uri(&uri)?;
    let query = parameters.query(datasource)?;
    run(&shared, move |stored| {
        // Not through a `Value`, which could change the digits of a number in a payload.
        Ok(Json(render::page_json(&stored.records(&query)?)).into_response())
    })
    .await
}

/// The query string of `latest`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LatestParameters {
    after_topic: Option<String>,
}

/// `GET /v1/datasources/{datasource}/latest`
pub(super) async fn latest(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    InPath(datasource): InPath<String>,
    uri: Uri,
) -> Result<Response, Problem> {
    let datasource = readable(&shared, &caller, &datasource)?;
    let QueryString(LatestParameters { after_topic }) = QueryString::try_from_uri(&uri)?;
    run(&shared, move |stored| Ok(Json(stored.latest(&datasource, after_topic.as_deref())?).into_response()))
        .await
}

/// The datasource whose records are to be read, if the caller may read them.
pub(super) fn readable(shared: &Shared, caller: &Caller, datasource: &str) -> Result<DatasourceId, Problem> {
    caller.may(Scope::Subscribe, datasource)?;
    Ok(shared.datasource(datasource)?.id.clone())
}

/// The stored records, if there is storage.
pub(super) fn stored(shared: &Shared) -> Result<Query, Problem> {
    shared.parts.query.clone().ok_or_else(|| {
        let words = "Storage is off (storage.sink = \"none\"), so that no records can be read.";
        Problem::new(Kind::NotFound, words).cause("no_storage")
    })
}

/// Runs one query, as soon as fewer than the maximum are running.
pub(super) async fn run(
    shared: &Shared,
    query: impl FnOnce(&Query) -> Result<Response, QueryError> + Send + 'static,
) -> Result<Response, Problem> {
    let stored = stored(shared)?;
    let _turn = shared.queries.acquire().await.expect("the semaphore is never closed");
    off_the_runtime(move || Ok(query(&stored)?)).await
}
