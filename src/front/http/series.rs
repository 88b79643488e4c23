//! `GET /v1/datasources/{datasource}/series`: the samples of one key of a topic, gathered in steps of time. It is read a piece
//! at a time, each in a turn of the caller's tenant of its own.

use std::sync::Arc;

use axum::extract::{Query as QueryString, State};
use axum::http::Uri;
use axum::response::Response;
use serde::{Deserialize, Serialize};

use super::charged_list::ChargedList;
use super::credentials::DataCaller;
use super::query::{readable_scope, stored_records_query, time_parameter};
use super::{HttpFrontState, PathParameters, run_in_turn};
use crate::config::parse_duration_ms;
use crate::consume::query::series::{SeriesAggregate, SeriesError, SeriesPoint, SeriesQuery, SeriesReading};
use crate::consume::render::Rfc3339;
use crate::front::problem::Problem;
use crate::limits::{SERIES_POINTS_DEFAULT, SERIES_POINTS_MAX, SERIES_POINTS_MIN, SERIES_STEP_MS_MAX};
use crate::message::{DatasourceId, Incarnation, check_topic};
use crate::observe::cause::Cause;

/// The query string. An unknown parameter is refused, as by `records`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SeriesParameters {
    topic: String,
    #[serde(default)]
    key: String,
    from: Option<String>,
    to: Option<String>,
    step: Option<String>,
    agg: Option<SeriesAggregate>,
    points: Option<usize>,
    incarnation: Option<Incarnation>,
}

impl SeriesParameters {
    fn into_query(self, scope: DatasourceId) -> Result<SeriesQuery, Problem> {
        check_topic(&self.topic)?;
        let points_max = self.points.unwrap_or(SERIES_POINTS_DEFAULT);
        if !(SERIES_POINTS_MIN..=SERIES_POINTS_MAX).contains(&points_max) {
            let words = format!(
                "points is {points_max}: it has to be between {SERIES_POINTS_MIN} and {SERIES_POINTS_MAX}."
            );
            return Err(Problem::new(Cause::Malformed, words).with("limit", SERIES_POINTS_MAX));
        }
        Ok(SeriesQuery {
            scope,
            topic: self.topic,
            key: self.key,
            from: time_parameter("from", self.from)?,
            to: time_parameter("to", self.to)?,
            step_us: step_parameter(self.step)?,
            aggregate: self.agg.unwrap_or_default(),
            points_max,
        })
    }
}

/// Parses a step: `30s`, `1m`, `1h30m`, or a number of seconds. `auto` is none.
fn step_parameter(text: Option<String>) -> Result<Option<i64>, Problem> {
    let Some(text) = text.filter(|text| text != "auto") else { return Ok(None) };
    let refused = |cause| {
        let words = "step has to be a time between 1ms and 366d such as 30s, 1m or 1h, or auto.";
        Problem::new(cause, words).with("parameter", "step")
    };
    let step_ms = parse_duration_ms(&text).ok_or_else(|| refused(Cause::Malformed))?;
    let step_ms = Some(step_ms).filter(|ms| (1..=SERIES_STEP_MS_MAX).contains(ms));
    let step_us = step_ms.and_then(|ms| i64::try_from(ms * 1_000).ok());
    step_us.map(Some).ok_or_else(|| refused(Cause::NotPossible))
}

/// The answer's beginning.
#[derive(Serialize)]
struct SeriesHead<'a> {
    datasource: &'a DatasourceId,
    topic: &'a str,
    key: &'a str,
    agg: SeriesAggregate,
    /// `null` if there is nothing and no range was asked for.
    from: Option<Rfc3339>,
    to: Option<Rfc3339>,
    step_s: f64,
}

/// A step of the answer. A gap has the value `null`.
#[derive(Serialize)]
struct SeriesPointJson {
    at: Rfc3339,
    value: Option<f64>,
    count: u64,
}

impl From<SeriesPoint> for SeriesPointJson {
    fn from(point: SeriesPoint) -> Self {
        Self { at: Rfc3339(point.at), value: point.value, count: point.count }
    }
}

/// `GET /v1/datasources/{datasource}/series`
pub(super) async fn series(
    State(shared): State<Arc<HttpFrontState>>,
    DataCaller(caller): DataCaller,
    PathParameters(datasource): PathParameters<String>,
    uri: Uri,
) -> Result<Response, Problem> {
    let QueryString(parameters) = QueryString::<SeriesParameters>::try_from_uri(&uri)?;
    let scope = readable_scope(&shared, &caller, &datasource, parameters.incarnation)?;
    let query = parameters.into_query(scope)?;
    caller.0.allows_topic(&datasource, &query.topic)?;
    let stored = stored_records_query(&shared)?;
    let account = shared.parts.intake.memory_account(&caller.0);
    let mut memory = account.charge(SeriesReading::bytes_max(&query))?;

    let first = stored.clone();
    let mut reading = run_in_turn(&shared, &caller, move || Ok(SeriesReading::begin(&first, query)?)).await?;
    memory.set_held(reading.memory_bytes());
    loop {
        let stored = stored.clone();
        let read = move || {
            let has_more = reading.read_some(&stored)?;
            Ok((reading, has_more))
        };
        let has_more;
        (reading, has_more) = run_in_turn(&shared, &caller, read).await?;
        if !has_more {
            break;
        }
    }
    // What is rendered is charged by itself.
    drop(memory);
    let mut list = ChargedList::json(&account, &head_json(&reading))?;
    reading.points().try_for_each(|point| list.push(&SeriesPointJson::from(point)))?;
    Ok(list.finish("]}"))
}

/// The JSON of the answer up to the items of its list.
fn head_json(reading: &SeriesReading) -> String {
    let SeriesQuery { scope, topic, key, aggregate, .. } = reading.query();
    let (from, to) = reading.range().unzip();
    #[expect(
        clippy::cast_precision_loss,
        reason = "microseconds of a step are far below 2^53, or a step of centuries"
    )]
    let step_s = reading.step_us() as f64 / 1e6;
    let (datasource, _) = scope.of_scope();
    let (from, to) = (from.map(Rfc3339), to.map(Rfc3339));
    let head = SeriesHead { datasource: &datasource, topic, key, agg: *aggregate, from, to, step_s };
    let mut head = serde_json::to_string(&head).expect("texts and numbers are JSON");
    head.pop();
    head.push_str(",\"points\":[");
    head
}

impl From<SeriesError> for Problem {
    fn from(error: SeriesError) -> Self {
        match error {
            SeriesError::Query(error) => error.into(),
            SeriesError::TooManySteps { points_max, least_step_us, .. } => {
                let words =
                    format!("{error}: ask for a longer step, for a shorter range, or for more points.");
                let problem = Self::new(Cause::NotPossible, words).with("limit", points_max);
                problem.with("least_step_s", least_step_us.unsigned_abs().div_ceil(1_000_000))
            }
            SeriesError::TooMuch => Self::new(Cause::NotPossible, format!("{error}.")),
        }
    }
}
