//! What wraps every handler: it refuses a request without a host or with a key in the URL, counts and logs a refusal, and sets the headers that
//! every answer has.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::body::HttpBody;
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{CACHE_CONTROL, CONNECTION, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderValue, Method, Version};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::debug;
use tracing::field::display;

use super::answer::{self, AnswerHold, RequestHolder, RequestMemory, StrangerRequest};
use super::lent::BodyLender;
use super::long_answer::IsLong;
use super::persistence::{announce_keep_alive, wants_to_persist};
use super::request_form::{check_host, note_authority};
use super::server::HttpPeer;
use super::stream::StreamReader;
use super::{HttpFrontState, credentials, influx};
use crate::front::problem::{Problem, RefusedRequest};
use crate::limits::HTTP_ANSWER_PIECE_BYTES;
use crate::message::{DatasourceId, Transport};
use crate::observe::cause::Cause;
use crate::observe::refusals::{RefusalNote, Refusals};

/// Requests without a valid key that a connection on which no key was presented may have under way.
const STRANGER_REQUESTS_MAX: usize = 16;
/// What the answer to such a request is charged for at least.
const STRANGER_ANSWER_BYTES: usize = 2 << 10;

/// Wraps every handler: refuses a request without a host or with a key in the URL, counts and logs a refusal, and sets the headers that
/// every answer has. It logs the route and not the path, because a client may put anything into a path.
pub(super) async fn request_middleware(
    State(shared): State<Arc<HttpFrontState>>,
    request: Request,
    next: Next,
) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let name = route.as_ref().map_or("-", MatchedPath::as_str);
    wrap_request(&shared, name, request, |request| next.run(request)).await
}

/// As [`request_middleware`], around whatever answers the request.
pub(super) async fn wrap_request<F: Future<Output = Response>>(
    shared: &HttpFrontState,
    route: &str,
    mut request: Request,
    answer: impl FnOnce(Request) -> F,
) -> Response {
    let started = Instant::now();
    let peer = request.extensions().get::<HttpPeer>().cloned();
    let (stranger, under_way) = match &peer {
        Some(peer) => StrangerRequest::enter(&peer.stranger_requests),
        None => StrangerRequest::enter(&Arc::default()),
    };
    let memory = RequestMemory::of_stranger(stranger);
    request.extensions_mut().insert(memory.clone());
    let method = request.method().clone();
    let datasource = influx::datasource_named(request.uri())
        .unwrap_or_else(|| datasource_in(request.uri().path()).to_owned());
    let has_body = !request.body().is_end_stream();
    let http1 = request.version() < Version::HTTP_2;
    let persists = wants_to_persist(request.version(), request.headers());
    let has_url_token = credentials::token_in_url(request.uri()).is_some();
    note_authority(&mut request);
    let host = check_host(request.version(), request.uri(), request.headers());
    // A body that nobody reads is looked for below. What comes in is read to its end, or the refusal says that it was not.
    let (request, lender) = if has_body && !(http1 && route.starts_with("/v1/ingest")) {
        let (head, body) = request.into_parts();
        let (body, lender) = BodyLender::lend(body);
        (Request::from_parts(head, body), Some(lender))
    } else {
        (request, None)
    };
    let is_read = matches!(method, Method::GET | Method::HEAD);
    let unanswered = peer.as_ref().filter(|_| is_read).map(|peer| peer.clock.begin_read());
    let mut response = match host.and_then(|()| credentials::refuse_key_in_url(request.uri())) {
        Ok(()) => answer(request).await,
        Err(problem) => {
            let response = influx::in_dialect_of(request.uri().path(), problem);
            drop(request);
            response
        }
    };
    drop(unanswered);
    let held = memory.take();
    let mut held = charge_answer(shared, peer.as_ref(), held, under_way, &method, &mut response);
    held.under_way = peer.as_ref().map(|peer| peer.clock.begin_request());
    let refused = response.extensions_mut().remove::<RefusedRequest>();
    if let Some(refused) = &refused {
        let address = peer.as_ref().map(|peer| peer.addr);
        refused.note(shared.parts.intake.refusals(), address, &datasource);
        let (peer, key_id) = (address.map(display), refused.key_id.map(display));
        let (status, cause) = (response.status().as_u16(), refused.cause.name());
        debug!(peer, %method, route, status, cause, key_id, "an HTTP request was refused");
    }
    let mut is_unread = refused.is_some_and(|refused| !refused.body_read);
    if let Some(body) = lender.and_then(BodyLender::unread) {
        is_unread = true;
        // HTTP/2 carries other requests beside an unread body; HTTP/1.1 closes the connection below. A stream does not wait.
        if !http1 && response.body().size_hint().exact().is_some() {
            body.discard().await;
        }
    }
    shared.requests.note(route, &method, response.status(), started.elapsed());
    let headers = response.headers_mut();
    if http1 && has_body && is_unread {
        // The unread rest of the body is where the next request would begin. Announce the close, so that
        // the client sends no further request on this connection.
        if let Some(peer) = &peer {
            peer.unread.store(true, Ordering::Relaxed);
        }
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if persists && peer.as_ref().is_some_and(|peer| !peer.closing.load(Ordering::Relaxed)) {
        announce_keep_alive(headers, &shared.keep_alive);
    }
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if has_url_token {
        // What the answer names, as a page that is followed from it, is not told the URL with the token.
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    }
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    if let Some(reader) = response.extensions_mut().remove::<Arc<StreamReader>>() {
        reader.hold(held);
        response.extensions_mut().insert(IsLong);
        return response;
    }
    let stall_max = Duration::from_millis(shared.parts.config.body_ms_max);
    answer::hold_until_taken(response, held, stall_max)
}

/// Charges for an answer. One that its key cannot hold becomes a refusal, if the request has changed nothing. A stranger
/// that leaves its answers unread, or whose address has too many of them, is told to leave.
fn charge_answer(
    shared: &HttpFrontState,
    peer: Option<&HttpPeer>,
    holder: RequestHolder,
    under_way: usize,
    method: &Method,
    response: &mut Response,
) -> AnswerHold {
    match holder {
        RequestHolder::Key(mut memory) => {
            if let Err(exceeded) = answer::charge_for(response, &mut memory) {
                if method == Method::GET {
                    *response = Problem::from(exceeded).into_response();
                } else {
                    memory.set_held(memory.bytes() + answer::known_bytes(response));
                }
            }
            AnswerHold { memory, stranger: None, under_way: None }
        }
        RequestHolder::Stranger(stranger) => {
            if let Some(peer) = peer.filter(|peer| peer.keys.are_none()) {
                peer.payer.end_welcome();
            }
            let address = peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.addr.ip());
            let account = shared.parts.intake.memory().account_of_stranger(address);
            let bytes = STRANGER_ANSWER_BYTES + answer::known_bytes(response).min(HTTP_ANSWER_PIECE_BYTES);
            let is_crowding =
                under_way > STRANGER_REQUESTS_MAX && peer.is_some_and(|peer| peer.keys.are_none());
            if (is_crowding || account.is_over())
                && let Some(peer) = peer
                && peer.entry.eviction().tell()
            {
                let words =
                    "its answers wait unread, or its address has too many requests without a key under way";
                let note = RefusalNote::new(Transport::Http, Cause::StrangersShare, &words);
                shared.parts.intake.refusals().note(RefusalNote { address: Some(address), ..note });
            }
            AnswerHold { memory: account.charge_held(bytes), stranger: Some(stranger), under_way: None }
        }
        RequestHolder::Answer => {
            let address = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
            let account = shared.parts.intake.memory().account_of_stranger(address);
            AnswerHold { memory: account.charge_held(0), stranger: None, under_way: None }
        }
    }
}

impl RefusedRequest {
    /// Counts and lists it, unless intake has done so.
    fn note(&self, refusals: &Refusals, address: Option<SocketAddr>, datasource: &str) {
        if !self.counted {
            refusals.note(RefusalNote {
                address: address.map(|address| address.ip()),
                datasource,
                key_id: self.key_id,
                key_shape: self.key_shape,
                limited: self.limited.as_deref(),
                ..RefusalNote::new(Transport::Http, self.cause, &self.words)
            });
        }
    }
}

/// The datasource that a path names, or an empty string.
fn datasource_in(path: &str) -> &str {
    let rest = ["/v1/ingest/", "/v1/datasources/"].iter().find_map(|prefix| path.strip_prefix(prefix));
    let id = rest.map_or("", |rest| rest.split('/').next().unwrap_or(rest));
    // A path may hold anything there; what is not a valid id belongs to no datasource.
    if DatasourceId::new(id).is_ok() { id } else { "" }
}
