//! The stored records of a datasource: a page as JSON, or all that match as NDJSON or CSV, oldest or newest first.
//!
//! An answer has what was stored when it began, so that it ends however much comes in meanwhile. It is read piece by piece
//! (`page_stream.rs`) and has no size that it may not exceed: a client that reads slowly holds one piece in memory and no
//! reader of storage. The place where an answer goes on is an offset, which stays valid whatever is removed.

use std::sync::Arc;

use axum::extract::{Query as QueryString, State};
use axum::http::header::{ACCEPT, VARY};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Uri};
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};

use super::credentials::DataCaller;
use super::members::whole_parameter;
use super::page_stream::{self, JsonItems, PageFrame, PageSource};
use super::query::{readable_scope, stored_records_query, time_parameter, topic_of_read};
use super::{HttpFrontState, PathParameters, run_in_turn};
use crate::consume::query::{PageBudget, QueryError, RecordsOrder, RecordsQuery, RecordsReader, StoredRange};
use crate::consume::render::{self, CSV_HEADER};
use crate::front::problem::Problem;
use crate::limits::{QUERY_RECORDS_DEFAULT, QUERY_RECORDS_MAX};
use crate::message::{DatasourceId, Incarnation, KeyId, Offset};
use crate::observe::cause::Cause;
use crate::time::Rfc3339;

/// The form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RecordsForm {
    Json,
    Ndjson,
    Csv,
}

impl RecordsForm {
    fn media_type(self) -> &'static str {
        match self {
            RecordsForm::Json => "application/json",
            RecordsForm::Ndjson => "application/x-ndjson",
            RecordsForm::Csv => "text/csv; charset=utf-8",
        }
    }

    /// The form that a client likes best of those that there are; JSON for one that likes none or all of them.
    fn of_accept(headers: &HeaderMap) -> Self {
        let ranges = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let mut best = (0.0, RecordsForm::Json);
        for range in ranges.flat_map(|value| value.split(',')) {
            let mut parts = range.split(';').map(str::trim);
            let form = match parts.next().unwrap_or_default().to_ascii_lowercase().as_str() {
                "application/x-ndjson" | "application/ndjson" | "application/jsonl" => RecordsForm::Ndjson,
                "text/csv" => RecordsForm::Csv,
                "application/json" => RecordsForm::Json,
                _ => continue,
            };
            let weight = parts.find_map(|part| part.strip_prefix("q=")).map_or(Ok(1.0), str::parse);
            let weight: f32 = weight.unwrap_or(0.0);
            if weight > best.0 {
                best = (weight, form);
            }
        }
        best.1
    }

    fn frame(self, range: &StoredRange) -> PageFrame {
        match self {
            RecordsForm::Json => PageFrame::object(json_head(range)),
            RecordsForm::Ndjson => PageFrame::lines(self.media_type(), ""),
            RecordsForm::Csv => PageFrame::lines(self.media_type(), CSV_HEADER),
        }
    }
}

/// The JSON of a page up to its records.
fn json_head(range: &StoredRange) -> String {
    let stored_from = range.first.map(|(offset, at)| json!({ "offset": offset, "received_at": Rfc3339(at) }));
    let (stored_from, removed) = (Value::from(stored_from), Value::from(range.removed_below));
    format!("{{\"stored_from\":{stored_from},\"removed_below\":{removed},\"records\":[")
}

/// The query string. An unknown parameter is refused: a filter that is not applied would return records that were not
/// asked for.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordsParameters {
    topic: Option<String>,
    from: Option<String>,
    to: Option<String>,
    event_from: Option<String>,
    event_to: Option<String>,
    #[serde(default, deserialize_with = "whole_parameter")]
    from_offset: Option<Offset>,
    #[serde(default, deserialize_with = "whole_parameter")]
    to_offset: Option<Offset>,
    #[serde(default, deserialize_with = "whole_parameter")]
    after_offset: Option<Offset>,
    #[serde(default, deserialize_with = "whole_parameter")]
    cursor: Option<Offset>,
    order: Option<OrderParameter>,
    key_id: Option<String>,
    #[serde(default, deserialize_with = "whole_parameter")]
    limit: Option<u64>,
    incarnation: Option<Incarnation>,
    format: Option<RecordsForm>,
}

/// Which records come first.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum OrderParameter {
    Oldest,
    Newest,
}

impl RecordsParameters {
    /// What is to be read for an answer of this form: without a limit as much as there is, but for a page
    /// of JSON.
    fn into_query(self, scope: DatasourceId, form: RecordsForm) -> Result<RecordsQuery, Problem> {
        let order = match self.order {
            None | Some(OrderParameter::Oldest) => RecordsOrder::Oldest,
            Some(OrderParameter::Newest) => RecordsOrder::Newest,
        };
        if order == RecordsOrder::Newest && self.after_offset.is_some() {
            let words = "With order=newest an answer goes on with cursor, and from_offset is the oldest to be read: \
                         after_offset would give the same records again.";
            return Err(Problem::new(Cause::NotPossible, words).with("parameter", "after_offset"));
        }
        let limit = match (self.limit, form) {
            (Some(0), _) => {
                let words = "limit is 0: it has to be at least 1.";
                return Err(Problem::new(Cause::Malformed, words).with("parameter", "limit"));
            }
            (Some(limit), _) => usize::try_from(limit).unwrap_or(usize::MAX),
            (None, RecordsForm::Json) => QUERY_RECORDS_DEFAULT,
            (None, _) => usize::MAX,
        };
        let below_first = self.from_offset.and_then(|from| from.checked_sub(1));
        let mut query = RecordsQuery {
            scope,
            topic: self.topic,
            from: time_parameter("from", self.from)?,
            to: time_parameter("to", self.to)?,
            event_from: time_parameter("event_from", self.event_from)?,
            event_to: time_parameter("event_to", self.event_to)?,
            after_offset: self.after_offset.max(below_first),
            before_offset: self.to_offset,
            order,
            key_id: self.key_id.map(|id| KeyId::parse(&id)).transpose()?,
            limit,
        };
        if let Some(cursor) = self.cursor {
            query.go_on_at(cursor);
        }
        Ok(query)
    }
}

/// `GET /v1/datasources/{datasource}/records`
pub(super) async fn records(
    State(shared): State<Arc<HttpFrontState>>,
    DataCaller(caller): DataCaller,
    PathParameters(datasource): PathParameters<String>,
    headers: HeaderMap,
    uri: Uri,
) -> Result<Response, Problem> {
    let QueryString(mut parameters) = QueryString::<RecordsParameters>::try_from_uri(&uri)?;
    let scope = readable_scope(&shared, &caller, &datasource, parameters.incarnation)?;
    parameters.topic = topic_of_read(&caller, &datasource, parameters.topic)?;
    let form = parameters.format.unwrap_or_else(|| RecordsForm::of_accept(&headers));
    let mut query = parameters.into_query(scope.clone(), form)?;
    let stored = stored_records_query(&shared)?;
    let range = run_in_turn(&shared, &caller, move || Ok(stored.range_of(&scope)?)).await?;
    query.end_before(range.end);
    let budget = match form {
        // A short page and its `next` come soon, however few records a filter passes.
        RecordsForm::Json if query.limit <= QUERY_RECORDS_MAX => PageBudget::new(query.limit),
        _ => PageBudget::without_bounds(query.limit),
    };
    let frame = form.frame(&range);
    let source = RecordsSource { query, form };
    let mut answer = page_stream::answer_page(&shared, &caller, frame, budget, source).await?;
    add_range_headers(answer.headers_mut(), &range);
    Ok(answer)
}

/// Says from where on there is something, also where a form has no place for that.
fn add_range_headers(headers: &mut HeaderMap, range: &StoredRange) {
    headers.insert(VARY, HeaderValue::from_static("accept"));
    if let Some((offset, at)) = range.first {
        headers.insert(HeaderName::from_static("headgate-stored-from"), offset.into());
        if let Ok(at) = HeaderValue::from_str(&Rfc3339(at).to_string()) {
            headers.insert(HeaderName::from_static("headgate-stored-from-time"), at);
        }
    }
    if let Some(below) = range.removed_below {
        headers.insert(HeaderName::from_static("headgate-removed-below"), below.into());
    }
}

/// The records that a query gives, in a form.
struct RecordsSource {
    query: RecordsQuery,
    form: RecordsForm,
}

impl PageSource for RecordsSource {
    fn read(
        &mut self,
        stored: &RecordsReader,
        budget: &mut PageBudget,
        items: &mut JsonItems,
    ) -> Result<Option<String>, QueryError> {
        let page = stored.records_within(&self.query, budget)?;
        for record in &page.records {
            match self.form {
                // Into memory, which takes everything.
                RecordsForm::Csv => drop(render::write_csv_line(record, items)),
                // Not through a `Value`, which could change the digits of a number in a payload.
                RecordsForm::Json | RecordsForm::Ndjson => items.push(&render::record_json(record)),
            }
        }
        if let Some(next) = page.next {
            self.query.go_on_at(next);
        }
        Ok(page.next.map(|next| next.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_that_a_client_likes_best_is_the_one_that_it_gets() {
        for (accept, form) in [
            ("", RecordsForm::Json),
            ("*/*", RecordsForm::Json),
            ("text/csv", RecordsForm::Csv),
            ("Text/CSV; header=present", RecordsForm::Csv),
            ("application/x-ndjson, application/json;q=0.5", RecordsForm::Ndjson),
            ("application/json;q=0.5, text/csv;q=0.7", RecordsForm::Csv),
            ("text/csv;q=0, application/json", RecordsForm::Json),
            ("text/csv;q=0", RecordsForm::Json),
            ("text/csv;q=x, image/png", RecordsForm::Json),
            ("text/html,application/xhtml+xml,*/*;q=0.8", RecordsForm::Json),
        ] {
            let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_str(accept).expect("a value"))]);
            assert_eq!(RecordsForm::of_accept(&headers), form, "{accept}");
        }
    }
}
