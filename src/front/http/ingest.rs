//! Ingest: messages by HTTP POST. The key is checked before any of the body is read, the body is split
//! into messages (see [`super::messages`]), and all of them go through intake as one draft. Either all
//! are kept, at consecutive offsets, or none is. The answer comes when they are durable.
//!
//! If one message does not meet its schema, none is let in: the answer is 422 and names the messages that
//! fail, which are durable in quarantine by then. The client has to send the others again, with those that
//! it has corrected; a request that failed does not use up its `Idempotency-Key`.
//!
//! With an `Idempotency-Key` a request can be sent again when its answer was lost: as long as the key
//! is known (`intake.dedup_window_s`), the same request to the same datasource is answered as the first one was,
//! and nothing is kept again, also if a limit or a schema would refuse it now. Topic, payloads and their
//! number count, and not how they were sent; a request with other ones is refused.
//!
//! InfluxDB's own endpoints ([`super::influx`]) end here too.

use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRequestParts, Query, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, Method, Uri};
use axum::response::{IntoResponse, Response};
use headgate_format::line::TimePrecision;
use serde::{Deserialize, Serialize};

use super::body::{self, ReceivedBody};
use super::cors::wrap_page;
use super::credentials::{Caller, DataCaller};
use super::limits::rate_headers;
use super::messages::{RequestMessages, TopicBuffer};
use super::middleware::wrap_request;
use super::{HttpFrontState, PathParameters, event_time, run_blocking};
use crate::auth::usage::KeyClient;
use crate::auth::{Grant, Scope};
use crate::front::problem::Problem;
use crate::front::reserved_names::is_reserved_name;
use crate::intake::{Draft, DurableOffsets, IncomingMessage, Intake, Refusal, check_message_id};
use crate::limits::{HTTP_INLINE_BYTES_MAX, VALIDATION_ERRORS_MAX};
use crate::log::{Offsets, QuarantineReason};
use crate::memory::{MemoryAccount, MemoryCharge};
use crate::message::{DatasourceId, Offset, RecordFlags, Transport};
use crate::observe::cause::Cause;
use crate::observe::spans::RequestTrace;
use crate::processor::run_slowly;
use crate::quota::QuotaStanding;

const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// The topic of messages that are posted to a datasource without a topic.
const TOPIC_DEFAULT: &str = "data";

/// The answer to a request whose messages are all durable.
#[derive(Debug, Serialize)]
pub(super) struct IngestResponse {
    accepted: u32,
    first_offset: Offset,
    last_offset: Offset,
    /// Whether the `Idempotency-Key` was known: then the numbers are those of the first request with it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    duplicate: bool,
}

/// `POST /v1/ingest/{datasource}`
pub(super) async fn to_datasource(
    State(shared): State<Arc<HttpFrontState>>,
    DataCaller(caller): DataCaller,
    PathParameters(datasource): PathParameters<String>,
    request: Request,
) -> Result<Response, Problem> {
    ingest(&shared, caller, &datasource, None, request).await
}

/// `POST /v1/ingest/{datasource}/{topic…}`
pub(super) async fn to_topic(
    State(shared): State<Arc<HttpFrontState>>,
    DataCaller(caller): DataCaller,
    PathParameters((datasource, topic)): PathParameters<(String, String)>,
    request: Request,
) -> Result<Response, Problem> {
    ingest(&shared, caller, &datasource, Some(topic), request).await
}

/// A request for ingest that needs no router: all of its path is as it is meant.
pub(super) struct IngestRoute {
    /// The route, as the router names it.
    name: &'static str,
    datasource: String,
    topic: Option<String>,
}

impl IngestRoute {
    /// The route of a request; `None` if it is for the router.
    pub(super) fn of(method: &Method, path: &str) -> Option<Self> {
        let rest = path.strip_prefix("/v1/ingest/").filter(|_| method == Method::POST)?;
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
        let (name, datasource, topic) = match rest.split_once('/') {
            None => ("/v1/ingest/{datasource}", rest, None),
            Some((datasource, topic)) => ("/v1/ingest/{datasource}/{*topic}", datasource, Some(topic)),
        };
        let is_whole = !datasource.is_empty() && topic != Some("") && rest.bytes().all(is_plain);
        is_whole.then(|| Self { name, datasource: datasource.to_owned(), topic: topic.map(str::to_owned) })
    }

    /// Answers the request as the router does, without its layers: each of them is a future on the heap, and a copy of
    /// the request.
    pub(super) async fn answer(self, shared: Arc<HttpFrontState>, request: Request) -> Response {
        let Self { name, datasource, topic } = self;
        let shared = &shared;
        // Boxed, because what is around it would be copied with it.
        let handle = |request: Request| {
            Box::pin(async move {
                let (mut parts, body) = request.into_parts();
                let answered = match DataCaller::from_request_parts(&mut parts, shared).await {
                    Ok(DataCaller(caller)) => {
                        ingest(shared, caller, &datasource, topic, Request::from_parts(parts, body)).await
                    }
                    Err(problem) => Err(problem),
                };
                answered.into_response()
            })
        };
        wrap_request(shared, name, request, |request| wrap_page(shared, name, request, handle)).await
    }
}

async fn ingest(
    shared: &HttpFrontState,
    caller: Caller,
    datasource: &str,
    topic: Option<String>,
    request: Request,
) -> Result<Response, Problem> {
    let content_type = content_type(request.headers())?;
    let precision = precision(request.uri(), &content_type)?;
    let topic = match (precision, topic) {
        (None, topic) => topic.unwrap_or_else(|| TOPIC_DEFAULT.to_owned()),
        // Each point has a topic of its own.
        (Some(_), None) => String::new(),
        (Some(_), Some(topic)) => topic + "/",
    };
    let destination = IngestDestination { datasource, topic, content_type, precision };
    let (accepted, standing) = keep(shared, caller, destination, request).await?;
    let mut response = Json(accepted).into_response();
    response.headers_mut().extend(standing.iter().flat_map(rate_headers));
    Ok(response)
}

/// Where the messages of a request go, and what they are.
pub(super) struct IngestDestination<'a> {
    /// The datasource.
    pub(super) datasource: &'a str,
    /// The topic; with a precision the one above those of the points, empty or with a slash at its end.
    pub(super) topic: String,
    /// As the client sent it, or empty.
    pub(super) content_type: String,
    /// That of line protocol.
    pub(super) precision: Option<TimePrecision>,
}

/// Keeps the messages of a request. Resolves when they are durable.
pub(super) async fn keep(
    shared: &HttpFrontState,
    Caller(grant, peer): Caller,
    destination: IngestDestination<'_>,
    request: Request,
) -> Result<(IngestResponse, Option<QuotaStanding>), Problem> {
    let IngestDestination { datasource, topic, content_type, precision } = destination;
    grant.allows(Scope::Ingest, datasource).inspect_err(|_| shared.registry().note_refusal(grant.key()))?;
    let datasource = shared.datasource(datasource)?.id.clone();
    let (parts, body) = request.into_parts();
    let trace = RequestTrace::begin(parts.headers.get("traceparent").map(HeaderValue::as_bytes));
    let message_id = idempotency_key(&parts.headers)?;
    let properties = event_time::stated_property(&parts.headers)?;
    let reserved = parts.headers.keys().filter(|name| is_reserved_name(name.as_str())).count() as u64;
    if reserved > 0 {
        shared.parts.intake.metrics().count_reserved_names(Transport::Http, reserved);
    }
    let account = shared.account_of(&parts);
    let body = body::read(&parts.headers, body, shared.body_limits(), &account).await?;

    let intake = shared.parts.intake.clone();
    let (client, payer) = (peer.client, peer.payer);
    let upload = Upload {
        grant,
        client,
        datasource,
        topic,
        content_type,
        precision,
        message_id,
        properties,
        body,
        trace,
        account,
    };
    let kept = async {
        // The draft has copies of the messages: the body is free before the wait for the disk.
        let (drafted, question) = if upload.body.bytes.len() <= HTTP_INLINE_BYTES_MAX {
            upload.into_draft_or_question(&intake)
        } else {
            let intake = intake.clone();
            // Not on all threads: the registry needs some.
            let turn = shared.parses.clone().acquire_owned().await.expect("the semaphore is never closed");
            // The turn lasts as long as the work, which goes on if the client goes away.
            let work = move || {
                let _turn = turn;
                Ok(upload.into_draft_or_question(&intake))
            };
            match payer.is_alone() {
                true => run_blocking(work).await?,
                // It takes what others leave.
                false => run_slowly(work).await.map_err(|error| Problem::internal(&error))??,
            }
        };
        if let Some(question) = question
            && let Some(known) = submit(&intake, question).await?
        {
            return Ok((known, None));
        }
        let (draft, standing, failures) = drafted?;
        let kept = submit(&intake, draft).await?;
        let kept = kept.ok_or_else(|| Problem::internal(&"a draft of messages came back without offsets"))?;
        match failures.all == 0 || kept.known {
            true => Ok((kept, standing)),
            false => Err(failures.into_problem(&kept.offsets)),
        }
    };
    let (DurableOffsets { offsets, duplicate, .. }, standing) =
        kept.await.map_err(Problem::after_body_read)?;
    let (accepted, first_offset, last_offset) = (offsets.records(), offsets.first(), offsets.last());
    Ok((IngestResponse { accepted, first_offset, last_offset, duplicate }, standing))
}

/// Submits a draft of one origin.
async fn submit(intake: &Intake, draft: Draft) -> Result<Option<DurableOffsets>, Problem> {
    intake.submit(draft).await.map_err(|refusal| match &refusal {
        // Only the log could tell; intake has counted each message already.
        Refusal::Denied(_) | Refusal::Conflict(_) => Problem::from(refusal).already_counted(),
        _ => refusal.into(),
    })
}

fn content_type(headers: &HeaderMap) -> Result<String, Problem> {
    let Some(value) = headers.get(CONTENT_TYPE) else { return Ok(String::new()) };
    let text = value.to_str().map(str::to_owned);
    text.map_err(|_| Problem::new(Cause::Malformed, "The Content-Type is not printable ASCII."))
}

/// The query of a request that publishes.
#[derive(Deserialize)]
struct IngestQuery {
    precision: Option<String>,
}

/// The precision of line protocol, if the body is that: it is what says so.
fn precision(uri: &Uri, content_type: &str) -> Result<Option<TimePrecision>, Problem> {
    let in_type = TimePrecision::from_media_type(content_type).map_err(unknown_precision)?;
    let Query(query) = Query::<IngestQuery>::try_from_uri(uri)?;
    let Some(name) = query.precision else { return Ok(in_type) };
    let essence = content_type.split(';').next().unwrap_or_default().trim_ascii();
    // The last is what `curl -d` says.
    let may_be_points = ["", "text/plain", "application/x-www-form-urlencoded"];
    if !may_be_points.iter().any(|of_points| essence.eq_ignore_ascii_case(of_points)) {
        let words = format!("A precision is for line protocol (text/plain), and the body is {essence:?}.");
        return Err(Problem::new(Cause::Malformed, words));
    }
    let named = TimePrecision::parse(&name).ok_or_else(|| unknown_precision(&name))?;
    match in_type {
        Some(other) if other != named => {
            let words = "The query and the Content-Type name different precisions.";
            Err(Problem::new(Cause::Malformed, words))
        }
        _ => Ok(Some(named)),
    }
}

pub(super) fn unknown_precision(name: &str) -> Problem {
    let name: String = name.chars().take(16).collect();
    let words = format!("The precision is ns, us, ms, s, m or h, and not {name:?}.");
    Problem::new(Cause::Malformed, words)
}

/// The id that all messages of a request share. The IETF draft "The Idempotency-Key HTTP Header Field"
/// puts it in quotes; the id is the same without them.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Problem::new(Cause::Malformed, "The request has more than one Idempotency-Key."));
    }
    let text = std::str::from_utf8(value.as_bytes());
    let text = text.map_err(|_| Problem::new(Cause::Malformed, "The Idempotency-Key is not UTF-8."))?;
    let quoted = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    let id = quoted.unwrap_or(text);
    check_message_id(id).map_err(|refusal| {
        let words = format!("The Idempotency-Key cannot be used: {refusal}.");
        Problem::new(refusal.cause(), words)
    })?;
    Ok(Some(id.to_owned()))
}

/// The messages of a request that do not meet their schemas.
#[derive(Default)]
struct IngestFailures {
    /// How many there are.
    all: usize,
    /// Details of the first ones.
    listed: Vec<IngestFailure>,
}

/// A message that failed, as the answer shows it.
#[derive(Serialize)]
struct IngestFailure {
    /// Where in the request's body.
    pointer: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u32>,
    keyword: String,
    detail: String,
    schema_version: u32,
    /// Its offset in quarantine.
    offset: Offset,
}

impl IngestFailures {
    fn add(&mut self, messages: &RequestMessages<'_>, index: usize, reason: QuarantineReason<'static>) {
        if self.listed.len() < VALIDATION_ERRORS_MAX {
            let (pointer, line) = messages.pointer(index, &reason.pointer);
            let (keyword, detail) = (reason.keyword.into_owned(), reason.words.into_owned());
            let schema_version = reason.schema_version;
            self.listed.push(IngestFailure { pointer, line, keyword, detail, schema_version, offset: 0 });
        }
        self.all += 1;
    }

    /// The answer to the client, once the messages are in quarantine at these offsets.
    fn into_problem(mut self, offsets: &Offsets) -> Problem {
        for (nth, failure) in self.listed.iter_mut().enumerate() {
            failure.offset = offsets.nth(nth);
        }
        let words = match (&self.listed[..], self.all) {
            ([only], 1) => format!(
                "{}{}. The message is in quarantine at offset {}; nothing of the \
                 request was let in.",
                only.detail,
                of_schema(only.schema_version),
                only.offset
            ),
            (_, all) => format!(
                "{all} messages do not meet their schema or have no usable event time. They are in quarantine; nothing of the request \
                 was let in."
            ),
        };
        let pointer = self.listed.first().map(|first| first.pointer.clone()).unwrap_or_default();
        let errors = serde_json::to_value(&self.listed).unwrap_or_default();
        Problem::new(Cause::Schema, words)
            .already_counted()
            .with("pointer", pointer)
            .with("quarantined", self.all)
            .with("errors", errors)
    }
}

/// What to add to a reason of this schema version; 0 is that of an event time.
fn of_schema(version: u32) -> String {
    if version == 0 { String::new() } else { format!(" (schema version {version})") }
}

/// What the draft takes for each message beside its payload, mostly.
const DRAFT_BYTES_PER_MESSAGE: usize = 8;

/// A request whose body was read.
struct Upload {
    grant: Grant,
    client: Arc<KeyClient>,
    datasource: DatasourceId,
    topic: String,
    content_type: String,
    precision: Option<TimePrecision>,
    message_id: Option<String>,
    /// MQTT 5 properties of each message, in wire form.
    properties: Vec<u8>,
    body: ReceivedBody,
    trace: RequestTrace,
    /// Who is charged for the memory of what is made of it.
    account: Arc<MemoryAccount>,
}

/// The draft of a request, how much of its rate is used then, and what is not let in.
type UploadDraft = (Draft, Option<QuotaStanding>, IngestFailures);

impl Upload {
    /// The draft of the request. If it is refused, or some of it goes into quarantine, also the question whether all
    /// of it was let in before under its id: then it is a repetition, whatever it would be today.
    fn into_draft_or_question(self, intake: &Intake) -> (Result<UploadDraft, Problem>, Option<Draft>) {
        let drafted = self.draft(intake);
        let may_be_repetition = match &drafted {
            Ok((.., failures)) => failures.all > 0,
            Err(problem) => problem.is_over_limit(),
        };
        let asks = may_be_repetition && self.message_id.is_some();
        let question = asks.then(|| self.question(intake).ok()).flatten();
        (drafted, question)
    }

    /// The question whether the log has all messages under their id.
    fn question(&self, intake: &Intake) -> Result<Draft, Problem> {
        let (_of_places, messages) = self.split()?;
        let mut draft = intake.draft(Transport::Http, 0);
        draft.charge_to(&self.account, self.grant.key_id());
        draft.only_ask();
        self.message_id.as_deref().map_or(Ok(()), |id| draft.keep_once(id))?;
        let mut topic = TopicBuffer::new(&self.topic);
        for index in 0..messages.payloads.len() {
            let message = self.message(&messages, index, &mut topic);
            draft.push(&self.grant, Some(&self.datasource), message).map_err(|refusal| *refusal)?;
        }
        Ok(draft)
    }

    /// One of the messages.
    fn message<'a, 'b>(
        &'b self,
        messages: &'b RequestMessages<'a>,
        index: usize,
        topic: &'b mut TopicBuffer<'a>,
    ) -> IncomingMessage<'b> {
        IncomingMessage {
            topic: messages.topic(index, topic),
            payload: messages.payloads[index],
            content_type: messages.content_type,
            properties: &self.properties,
            flags: RecordFlags::default(),
            message_id: None,
            exchange: None,
        }
    }

    /// The draft of all its messages, or of only those that fail, if any does; and how much of their rate
    /// is used then, if they have one.
    fn draft(&self, intake: &Intake) -> Result<UploadDraft, Problem> {
        let (_of_places, messages) = self.split()?;
        let mut draft = intake.draft(Transport::Http, 0);
        draft.charge_to(&self.account, self.grant.key_id());
        draft.set_client(&self.client);
        draft.let_in_all_or_none();
        draft.follow(&self.trace);
        // The id of a single message goes with it into quarantine. One for several covers them all or none.
        let message_id = self.message_id.as_deref();
        let of_one = message_id.filter(|_| messages.payloads.len() == 1);
        message_id.filter(|_| of_one.is_none()).map_or(Ok(()), |id| draft.keep_once(id))?;
        let mut failures = IngestFailures::default();
        let (count, bytes) = (messages.payloads.len() as u64, self.body.bytes.len() as u64);
        let standing = draft.pay(&self.grant, &self.datasource, count, bytes)?;
        let mut topic = TopicBuffer::new(&self.topic);
        for index in 0..messages.payloads.len() {
            if index == 1 {
                draft.reserve_charged(
                    self.body.bytes.len()
                        + (DRAFT_BYTES_PER_MESSAGE + self.properties.len()) * messages.payloads.len(),
                )?;
            }
            let message =
                IncomingMessage { message_id: of_one, ..self.message(&messages, index, &mut topic) };
            match draft.push(&self.grant, Some(&self.datasource), message).map_err(|refusal| *refusal) {
                Ok(_) => {}
                Err(Refusal::Quarantined(quarantined)) => failures.add(&messages, index, quarantined.reason),
                Err(refusal) => {
                    if matches!(refusal, Refusal::Asked(_)) {
                        intake.authorizer().registry().note_refusal(self.grant.key());
                    }
                    return Err(messages.locate(index, refusal.into()));
                }
            }
        }
        if failures.all > 0 {
            draft.keep_quarantined_only();
        }
        Ok((draft, standing, failures))
    }

    /// The messages of the body, with the charge for the places where they are in it.
    fn split(&self) -> Result<(MemoryCharge, RequestMessages<'_>), Problem> {
        let (body, precision) = (&self.body.bytes, self.precision);
        let charge = self.account.charge(RequestMessages::place_bytes_max(body, precision))?;
        Ok((charge, RequestMessages::split(&self.content_type, precision, body)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_nothing_to_decode_needs_no_router() {
        let of = |path| {
            IngestRoute::of(&Method::POST, path).map(|route| (route.name, route.datasource, route.topic))
        };
        let found = |name, datasource: &str, topic: Option<&str>| {
            Some((name, datasource.to_owned(), topic.map(str::to_owned)))
        };
        let (short, long) = ("/v1/ingest/{datasource}", "/v1/ingest/{datasource}/{*topic}");
        assert_eq!(of("/v1/ingest/press-4"), found(short, "press-4", None));
        assert_eq!(of("/v1/ingest/press-4/a/b.c"), found(long, "press-4", Some("a/b.c")));
        assert_eq!(of("/v1/ingest/press-4//a/"), found(long, "press-4", Some("/a/")));
        for path in [
            "/v1/ingest/",
            "/v1/ingest/press-4/",
            "/v1/ingest//a",
            "/v1/ingest/press%2D4",
            "/v1/ingest/a/b%2Fc",
            "/v1/datasources",
        ] {
            assert_eq!(of(path), None, "{path}");
        }
        assert!(IngestRoute::of(&Method::PUT, "/v1/ingest/press-4").is_none());
    }
}
