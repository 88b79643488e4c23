//! CORS (the Fetch standard): pages of the origins in `http.cors_origins` may post messages and read records. It tells
//! browsers what they may show to a page, and lets nobody in: that does the key, which the page has to have and to send
//! in a header. Nothing that a browser sends by itself is ever allowed for (`Access-Control-Allow-Credentials`), and
//! nothing of the admin API is.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;

use super::HttpFrontState;
use crate::config::CorsOrigin;

/// The paths that pages may use, with the method of each.
const CORS_ROUTES: [(Method, &str); 8] = [
    (Method::POST, "/v1/ingest/{datasource}"),
    (Method::POST, "/v1/ingest/{datasource}/"),
    (Method::POST, "/v1/ingest/{datasource}/{*topic}"),
    (Method::GET, "/v1/datasources/{datasource}/records"),
    (Method::GET, "/v1/datasources/{datasource}/latest"),
    (Method::GET, "/v1/datasources/{datasource}/series"),
    (Method::GET, "/v1/datasources/{datasource}/stream"),
    (Method::GET, "/v1/datasources/{datasource}/schema"),
];
/// What a page may send beside what every page may.
const CORS_REQUEST_HEADERS: &str =
    "authorization, x-api-key, content-type, content-encoding, idempotency-key, event-time, last-event-id";
/// What a page may see of an answer beside what every page may.
const CORS_ANSWER_HEADERS: &str = "retry-after, www-authenticate, x-ratelimit-limit, x-ratelimit-remaining, x-ratelimit-reset, \
     headgate-stored-from, headgate-stored-from-time, headgate-removed-below";
/// How long a browser may remember a preflight's answer, in seconds.
const CORS_MAX_AGE_S: &str = "600";
/// What the answer to a preflight depends on.
const CORS_PREFLIGHT_VARY: &str = "origin, access-control-request-method, access-control-request-headers";

/// Answers preflights, and says in every other answer which page may see it.
pub(super) async fn cors_middleware(
    State(shared): State<Arc<HttpFrontState>>,
    request: Request,
    next: Next,
) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let path = route.as_ref().map(MatchedPath::as_str).unwrap_or_default();
    wrap_page(&shared, path, request, |request| next.run(request)).await
}

/// As [`cors_middleware`], around whatever answers a request for this route.
pub(super) async fn wrap_page<F: Future<Output = Response>>(
    shared: &HttpFrontState,
    path: &str,
    request: Request,
    answer: impl FnOnce(Request) -> F,
) -> Response {
    let origins = &shared.parts.config.cors_origins;
    if origins.is_empty() {
        return answer(request).await;
    }
    let methods: Vec<&Method> =
        CORS_ROUTES.iter().filter(|(_, of_pages)| *of_pages == path).map(|(method, _)| method).collect();
    if methods.is_empty() {
        return answer(request).await;
    }
    let allowed = allowed_origin(origins, request.headers());
    if request.method() == Method::OPTIONS {
        return match &allowed {
            Some(origin) if request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD) => {
                preflight_answer(origin, methods[0])
            }
            // What a page of no such origin asks for is a method that there is not.
            _ => answer(request).await,
        };
    }
    let is_of_pages = methods.contains(&request.method()) || request.method() == Method::HEAD;
    let mut response = answer(request).await;
    // A cache must not show one page's answer to another.
    response.headers_mut().append(VARY, HeaderValue::from_static("origin"));
    if let Some(origin) = allowed.filter(|_| is_of_pages) {
        let headers = response.headers_mut();
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(CORS_ANSWER_HEADERS));
    }
    response
}

/// What allows the origin of a request, if it is one of those.
fn allowed_origin(origins: &[CorsOrigin], headers: &HeaderMap) -> Option<HeaderValue> {
    let mut named = headers.get_all(ORIGIN).iter();
    let origin = named.next().filter(|_| named.next().is_none())?;
    let allowing = origins.iter().find(|allowed| allowed.matches(origin.as_bytes()))?;
    Some(if allowing.is_any() { HeaderValue::from_static("*") } else { origin.clone() })
}

/// The answer to the question whether a page may send a request. It needs no key: browsers send none.
fn preflight_answer(origin: &HeaderValue, method: &Method) -> Response {
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = StatusCode::NO_CONTENT;
    let headers = answer.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    let method = HeaderValue::from_str(method.as_str()).expect("a method is a token");
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, method);
    headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(CORS_REQUEST_HEADERS));
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(CORS_MAX_AGE_S));
    headers.insert(VARY, HeaderValue::from_static(CORS_PREFLIGHT_VARY));
    answer
}
