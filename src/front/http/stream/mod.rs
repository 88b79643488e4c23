//! `GET /v1/datasources/{datasource}/stream`: the records of a datasource as they come in, or from any earlier point
//! on, as server-sent events (WHATWG HTML, section 9.2) or as NDJSON.
//!
//! A stream is served as an MQTT subscription is: from a place in the log ([`SubscriberFeed`]), in turns of its tenant's
//! share, and as fast as its client takes it. The handler finds the place; [`source`] turns what the feed gives into
//! chunks; [`reader`] is the body that hands them over; [`table`] knows all that are open, and ends them.
//!
//! An event's id is the offset of its record, so that a client that comes back, to any gateway of a cluster, says with
//! `Last-Event-ID` what it has. Heartbeats have ids too: also a client that has got nothing goes on where it was.

mod accept;
mod event;
mod reader;
mod source;
mod table;

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Query as QueryString, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version};
use axum::response::Response;
use serde::Deserialize;
use serde::de::IgnoredAny;

use self::event::StreamForm;
use self::source::{SourceParts, StreamSource};
use super::credentials::{Caller, DataCaller};
use super::members::whole_parameter;
use super::query::{readable_scope, time_parameter, topic_of_read};
use super::{HttpFrontState, PathParameters};
use crate::consume::query::QueryError;
use crate::consume::subscriber::{ReplayError, ReplayStart, SubscriberFeed};
use crate::filter::TopicFilter;
use crate::front::problem::Problem;
use crate::limits::RETRY_AFTER;
use crate::log::LogReadError;
use crate::message::{DatasourceId, Offset};
use crate::observe::cause::Cause;

pub(super) use reader::{ChunkSource, StreamBody, StreamEnd, StreamReader};
pub(super) use table::{ConnectionStreams, StreamReaders};

/// Where a client that comes back says what it has had.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Has nginx, and proxies that follow it, pass on each event as it comes.
const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
/// The id of a heartbeat before the first record of the log.
const ID_BEFORE_ALL: &str = "start";

/// The query string of `stream`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamParameters {
    topic: Option<String>,
    #[serde(default, deserialize_with = "whole_parameter")]
    from_offset: Option<Offset>,
    from_time: Option<String>,
    #[serde(default, deserialize_with = "whole_parameter")]
    tail: Option<u64>,
    /// The caller's; it has been read.
    #[serde(rename = "access_token")]
    _access_token: Option<IgnoredAny>,
}

impl StreamParameters {
    /// Where the stream begins; `None` for what comes from now on. A client that comes back asks with the same
    /// parameters as before, so `Last-Event-ID` counts before them.
    fn start(&self, headers: &HeaderMap) -> Result<Option<ReplayStart>, Problem> {
        let from_time = time_parameter("from_time", self.from_time.clone())?;
        let (offset, time) = (self.from_offset.map(ReplayStart::Offset), from_time.map(ReplayStart::Time));
        let mut given = [offset, time, self.tail.map(ReplayStart::Tail)].into_iter().flatten();
        let start = given.next();
        if given.next().is_some() {
            let words = "Give only one of from_offset, from_time and tail.";
            return Err(Problem::new(Cause::NotPossible, words).with("parameter", "from_offset"));
        }
        Ok(last_event_id(headers)?.map(ReplayStart::Offset).or(start))
    }
}

/// The first record after the one that the client has had last, if it says so.
fn last_event_id(headers: &HeaderMap) -> Result<Option<Offset>, Problem> {
    let mut given = headers.get_all(LAST_EVENT_ID).iter();
    let Some(id) = given.next() else { return Ok(None) };
    let id = id.to_str().unwrap_or("?").trim();
    let next = match id {
        "" => Some(None),
        ID_BEFORE_ALL => Some(Some(0)),
        id if id.bytes().all(|b| b.is_ascii_digit()) => {
            // One that is too large is behind the log's end, as many smaller ones are.
            Some(Some(id.parse::<Offset>().unwrap_or(Offset::MAX).saturating_add(1)))
        }
        _ => None,
    };
    match next {
        Some(next) if given.next().is_none() => Ok(next),
        _ => {
            let words =
                "Last-Event-ID has to be the id of an event of this stream, which is the offset of a record.";
            Err(Problem::new(Cause::Malformed, words))
        }
    }
}

/// `GET /v1/datasources/{datasource}/stream`
pub(super) async fn read(
    State(shared): State<Arc<HttpFrontState>>,
    DataCaller(caller): DataCaller,
    PathParameters(datasource): PathParameters<String>,
    (method, version, uri, headers): (Method, Version, Uri, HeaderMap),
) -> Result<Response, Problem> {
    let QueryString(parameters) = QueryString::<StreamParameters>::try_from_uri(&uri)?;
    let scope = readable_scope(&shared, &caller, &datasource, None)?;
    let form = accept::form_of(&headers);
    let start = parameters.start(&headers)?;
    drop(headers);
    let topic = topic_of_read(&caller, &datasource, parameters.topic)?;
    let filter = TopicFilter::new(topic.as_deref().unwrap_or("#")).map_err(QueryError::from)?;
    let mut response = Response::new(Body::empty());
    if method != Method::HEAD {
        let parts = open(&shared, &caller, scope, form, &filter, start).await?;
        let reader =
            StreamReader::open(&shared.streams, &caller.1, version, Box::new(StreamSource::new(parts)));
        reader.end_with_token(shared.registry(), &caller.0);
        *response.body_mut() = Body::new(StreamBody::new(reader.clone()));
        response.extensions_mut().insert(reader);
    }
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(form.media_type()));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform"));
    headers.insert(X_ACCEL_BUFFERING, HeaderValue::from_static("no"));
    Ok(response)
}

/// Finds where the stream begins, and takes its place there.
async fn open(
    shared: &Arc<HttpFrontState>,
    caller: &Caller,
    scope: DatasourceId,
    form: StreamForm,
    filter: &TopicFilter,
    start: Option<ReplayStart>,
) -> Result<SourceParts, Problem> {
    let subscribers = &shared.parts.subscribers;
    let (log, tenant) = (&subscribers.log, caller.0.datasource());
    let (datasource, _) = scope.of_scope();
    // Whose key is for all pays with what those have, and names the datasource.
    let filter = match tenant.is_all() {
        true => TopicFilter::new(&format!("{datasource}/{}", filter.as_str())).map_err(QueryError::from)?,
        false => filter.clone(),
    };
    let share = subscribers.shares.share(tenant);
    shared.parts.intake.limit_share(tenant, &share);
    let mut held = share.charge();
    let charged = held.try_take_filter(filter.as_str());
    charged.map_err(|over| Problem::from(shared.parts.intake.share_refusal(tenant, over)))?;
    let from = match start {
        Some(start) => Some(subscribers.find_replay_start(tenant, &filter, start).await.map_err(refused)?),
        None => {
            // What was acknowledged anywhere before is not live. If the log cannot be asked, more comes, not less.
            let _ = log.catch_up(Offset::MAX).await;
            None
        }
    };
    let (router, end) = (subscribers.router.clone(), log.next_offset());
    let mut feed = SubscriberFeed::new(router, log.clone(), &subscribers.shares, tenant, end);
    feed.set_filter(0, filter.as_str(), from);
    let heartbeat = shared.parts.config.stream_heartbeat();
    let (shared, grant) = (shared.clone(), caller.0.clone());
    Ok(SourceParts { shared, grant, scope, form, feed, held, heartbeat })
}

/// The refusal of a stream whose beginning was not found.
fn refused(error: ReplayError) -> Problem {
    let words = format!("{error}.");
    let cause = match error {
        ReplayError::TooMany(_) => Cause::Replays,
        ReplayError::Away(_) | ReplayError::Read(LogReadError::Away(_)) => Cause::LogAway,
        ReplayError::Read(_) | ReplayError::Ended(_) => Cause::Unavailable,
    };
    Problem::new(cause, words).with_retry_after(RETRY_AFTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn had(ids: &[&'static str]) -> Result<Option<Offset>, ()> {
        let lines = ids.iter().map(|id| (LAST_EVENT_ID, HeaderValue::from_static(id)));
        last_event_id(&lines.collect()).map_err(drop)
    }

    #[test]
    fn a_stream_goes_on_behind_the_last_event() {
        assert_eq!(had(&[]), Ok(None));
        assert_eq!(had(&[""]), Ok(None), "a client that has none says so");
        assert_eq!(had(&["0"]), Ok(Some(1)));
        assert_eq!(had(&["41"]), Ok(Some(42)));
        assert_eq!(had(&["start"]), Ok(Some(0)));
        for far in ["18446744073709551614", "18446744073709551615", "99999999999999999999999"] {
            assert_eq!(had(&[far]), Ok(Some(Offset::MAX)), "{far}");
        }
        for bad in ["-1", "+1", "1.0", "0x1", "one", "1 2", "1,2", "START"] {
            assert_eq!(had(&[bad]), Err(()), "{bad}");
        }
        assert_eq!(had(&["1", "1"]), Err(()), "twice");
    }
}
