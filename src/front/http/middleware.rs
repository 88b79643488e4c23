//! What wraps every handler: it refuses a key in the URL, counts and logs a refusal, and sets the headers that
//! every answer has.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::HttpBody;
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{CACHE_CONTROL, CONNECTION, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderValue, Version};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::debug;
use tracing::field::display;

use super::lent::BodyLender;
use super::server::HttpPeer;
use super::{HttpFrontState, credentials};
use crate::front::problem::RefusedRequest;
use crate::message::{DatasourceId, Transport};
use crate::observe::refusals::{RefusalNote, Refusals};

/// Wraps every handler: refuses a key in the URL, counts and logs a refusal, and sets the headers that
/// every answer has. It logs the route and not the path, because a client may put anything into a path.
pub(super) async fn request_middleware(
    State(shared): State<Arc<HttpFrontState>>,
    request: Request,
    next: Next,
) -> Response {
    let peer = request.extensions().get::<HttpPeer>().cloned();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let method = request.method().clone();
    let datasource = datasource_in(request.uri().path()).to_owned();
    let has_body = !request.body().is_end_stream();
    let http1 = request.version() < Version::HTTP_2;
    // HTTP/2 carries other requests beside an unread body; HTTP/1.1 closes the connection below.
    let (request, lender) = if has_body && !http1 {
        let (head, body) = request.into_parts();
        let (body, lender) = BodyLender::lend(body);
        (Request::from_parts(head, body), Some(lender))
    } else {
        (request, None)
    };
    let mut response = match credentials::refuse_key_in_url(request.uri()) {
        Ok(()) => next.run(request).await,
        Err(problem) => {
            drop(request);
            problem.into_response()
        }
    };
    let refused = response.extensions_mut().remove::<RefusedRequest>();
    if let Some(refused) = &refused {
        let address = peer.as_ref().map(|peer| peer.addr);
        refused.note(shared.parts.intake.refusals(), address, &datasource);
        let (peer, key_id) = (address.map(display), refused.key_id.map(display));
        let route = route.as_ref().map_or("-", MatchedPath::as_str);
        let (status, cause) = (response.status().as_u16(), refused.cause.name());
        debug!(peer, %method, route, status, cause, key_id, "an HTTP request was refused");
    }
    let unread = refused.is_some_and(|refused| !refused.body_read);
    if let Some(lender) = lender
        && unread
    {
        lender.discard().await;
    }
    let headers = response.headers_mut();
    if http1 && has_body && unread {
        // The unread rest of the body is where the next request would begin. Announce the close, so that
        // the client sends no further request on this connection.
        if let Some(peer) = &peer {
            peer.unread.store(true, Ordering::Relaxed);
        }
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
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
