//! A problem: the one form of every refusal over HTTP, an RFC 9457 problem document
//! (`application/problem+json`), and of every refusal over NATS. This file is the only place that turns
//! an error into a status, a type that a program can switch on, and words for the person who sent it.
//!
//! `type` is a stable reference, `/problems/too_large`: an identifier to compare, not a page to fetch.
//! Its last part is a word that metrics use too. `title` goes with the type, `detail` with the one request.
//! Further members carry what a client can act on: `limit`, `retry_after_seconds`, `scope`, `line`,
//! `column`, `pointer`, `errors`.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::http::header::{
    ACCEPT_ENCODING, CONNECTION, CONTENT_TYPE, RETRY_AFTER, SEC_WEBSOCKET_VERSION, UPGRADE, WWW_AUTHENTICATE,
};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::limits::rate_headers;
use crate::auth::shape::KeyShape;
use crate::auth::{GrantDenial, RegistryError, RejectedKey};
use crate::consume::query::QueryError;
use crate::intake::Refusal;
use crate::log::AppendError;
use crate::message::{KeyId, NameError};
use crate::quota::{Limit, LimitExceeded};

/// When to come again, where the error does not say.
const RETRY_AFTER_DEFAULT: Duration = Duration::from_secs(1);

/// The same words for a stranger, a key of another datasource and a dead key, so that they reveal nothing.
const UNAUTHORIZED_DETAIL: &str = "Send a valid API key of this datasource in a header: \
    'Authorization: Bearer KEY', 'Authorization: KEY' or 'X-API-Key: KEY'.";

/// The kinds of problem. A kind's slug is the last part of its `type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProblemKind {
    Malformed,
    Topic,
    Unauthorized,
    KeyInUrl,
    MissingScope,
    NotFound,
    MethodNotAllowed,
    Timeout,
    Conflict,
    TooLarge,
    ContentEncoding,
    Validation,
    UpgradeRequired,
    OverLimit,
    TooManyRequests,
    Internal,
    Unavailable,
}

impl ProblemKind {
    #[cfg(test)]
    pub(super) const ALL: [ProblemKind; 17] = [
        ProblemKind::Malformed,
        ProblemKind::Topic,
        ProblemKind::Unauthorized,
        ProblemKind::KeyInUrl,
        ProblemKind::MissingScope,
        ProblemKind::NotFound,
        ProblemKind::MethodNotAllowed,
        ProblemKind::Timeout,
        ProblemKind::Conflict,
        ProblemKind::TooLarge,
        ProblemKind::ContentEncoding,
        ProblemKind::Validation,
        ProblemKind::UpgradeRequired,
        ProblemKind::OverLimit,
        ProblemKind::TooManyRequests,
        ProblemKind::Internal,
        ProblemKind::Unavailable,
    ];

    /// Status, slug and title.
    pub(super) fn spec(self) -> (StatusCode, &'static str, &'static str) {
        match self {
            ProblemKind::Malformed => (StatusCode::BAD_REQUEST, "malformed", "The request is malformed"),
            ProblemKind::Topic => (StatusCode::BAD_REQUEST, "topic", "The topic cannot be used"),
            ProblemKind::Unauthorized => {
                (StatusCode::UNAUTHORIZED, "unauthorized", "A valid API key is needed")
            }
            ProblemKind::KeyInUrl => {
                (StatusCode::UNAUTHORIZED, "key_in_url", "An API key does not belong in a URL")
            }
            ProblemKind::MissingScope => {
                (StatusCode::FORBIDDEN, "missing_scope", "The API key lacks a scope")
            }
            ProblemKind::NotFound => (StatusCode::NOT_FOUND, "not_found", "There is nothing here"),
            ProblemKind::MethodNotAllowed => {
                (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "The method is not allowed here")
            }
            ProblemKind::Timeout => {
                (StatusCode::REQUEST_TIMEOUT, "timeout", "The request took too long to arrive")
            }
            ProblemKind::Conflict => {
                (StatusCode::CONFLICT, "conflict", "What is there already stands against it")
            }
            ProblemKind::TooLarge => {
                (StatusCode::PAYLOAD_TOO_LARGE, "too_large", "The request is over a limit")
            }
            ProblemKind::ContentEncoding => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "content_encoding",
                "The content encoding is not supported",
            ),
            ProblemKind::Validation => {
                (StatusCode::UNPROCESSABLE_ENTITY, "validation", "A message does not meet its schema")
            }
            ProblemKind::UpgradeRequired => {
                (StatusCode::UPGRADE_REQUIRED, "upgrade_required", "Another protocol is spoken here")
            }
            ProblemKind::OverLimit => {
                (StatusCode::UNPROCESSABLE_ENTITY, "over_limit", "A limit is reached; waiting does not help")
            }
            ProblemKind::TooManyRequests => {
                (StatusCode::TOO_MANY_REQUESTS, "too_many_requests", "A limit is reached for now")
            }
            ProblemKind::Internal => {
                (StatusCode::INTERNAL_SERVER_ERROR, "internal", "The gateway has failed")
            }
            ProblemKind::Unavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "unavailable", "It cannot be done right now")
            }
        }
    }
}

/// One problem, on its way to the client. Boxed, so that a `Result` with it stays small.
#[derive(Debug)]
pub(in crate::front) struct Problem(Box<ProblemInner>);

#[derive(Debug)]
struct ProblemInner {
    kind: ProblemKind,
    detail: String,
    members: Map<String, Value>,
    retry_after: Option<Duration>,
    note: RefusedRequest,
}

/// What logs and metrics record about a refused request. It travels as an extension of the response, and
/// never to the client.
#[derive(Debug, Clone)]
pub(super) struct RefusedRequest {
    /// One word.
    pub(super) cause: &'static str,
    /// The cause in words, for people.
    pub(super) words: String,
    /// The id of the presented key, if it was ever given out.
    pub(super) key_id: Option<KeyId>,
    /// The shape of the presented key, if it was never given out.
    pub(super) key_shape: Option<KeyShape>,
    /// The limit that was exceeded, if any.
    pub(super) limited: Option<Box<LimitExceeded>>,
    /// Whether the request's body was read to its end. If not, the connection cannot carry another
    /// request.
    pub(super) body_read: bool,
    /// Whether intake has counted it already, message by message.
    pub(super) counted: bool,
}

impl Problem {
    /// A problem of a kind, with the detail for this request.
    pub(super) fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        let (_, cause, _) = kind.spec();
        let detail = detail.into();
        let note = RefusedRequest {
            cause,
            words: detail.clone(),
            key_id: None,
            key_shape: None,
            limited: None,
            body_read: false,
            counted: false,
        };
        let retry_after = (kind == ProblemKind::Unavailable).then_some(RETRY_AFTER_DEFAULT);
        Self(Box::new(ProblemInner { kind, detail, members: Map::new(), retry_after, note }))
    }

    /// An internal error: the log has it for the operator, and the client learns nothing about it.
    pub(super) fn internal(error: &dyn std::fmt::Display) -> Self {
        tracing::error!(%error, "an HTTP request failed");
        Self::new(ProblemKind::Internal, "The gateway's own log says more.")
    }

    /// Adds a member to the document.
    pub(in crate::front) fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.0.members.insert(name.to_owned(), value.into());
        self
    }

    /// The key is for one datasource, and the request needs a key for all of them.
    pub(super) fn needs_key_for_all(key_id: KeyId) -> Self {
        let words = format!("API key {key_id} is for one datasource; this needs a key for all of them.");
        Self::new(ProblemKind::MissingScope, words).with_cause("other_datasource").with_key_id(key_id)
    }

    /// Sets another cause for metrics than the kind's slug.
    pub(super) fn with_cause(mut self, cause: &'static str) -> Self {
        self.0.note.cause = cause;
        self
    }

    /// Marks that the body was read to its end.
    pub(super) fn after_body_read(mut self) -> Self {
        self.0.note.body_read = true;
        self
    }

    /// Marks that intake has counted the refusal.
    pub(super) fn already_counted(mut self) -> Self {
        self.0.note.counted = true;
        self
    }

    /// The problem for an exceeded limit of a key or datasource.
    fn limited(limited: Box<LimitExceeded>, words: String) -> Self {
        let kind = match limited.limit {
            Limit::PayloadBytes => ProblemKind::TooLarge,
            Limit::Topics => ProblemKind::OverLimit,
            Limit::MessagesPerS | Limit::BytesPerS | Limit::Connections => ProblemKind::TooManyRequests,
        };
        let mut problem = Self::new(kind, format!("This is {words}."))
            .with("limit", limited.setting.max)
            .with("limit_name", limited.limit.name())
            .with("limit_of", limited.owner.to_string());
        problem.0.note.limited = Some(limited);
        problem
    }

    /// Sets when the client may come again.
    pub(super) fn with_retry_after(mut self, after: Duration) -> Self {
        self.0.retry_after = Some(after);
        self
    }

    fn with_key_id(mut self, key_id: KeyId) -> Self {
        self.0.note.key_id = Some(key_id);
        self
    }

    /// The form for a NATS reply: the status, the title, the document, and when to come again.
    pub(in crate::front) fn into_nats_reply(
        mut self,
    ) -> (u16, &'static str, Map<String, Value>, Option<Duration>) {
        self.0.insert_retry_after();
        let (status, _, title) = self.0.kind.spec();
        let retry_after = self.0.retry_after;
        let document = serde_json::to_value(self.0.document()).unwrap_or_default();
        let document = if let Value::Object(document) = document { document } else { Map::new() };
        (status.as_u16(), title, document, retry_after)
    }

    /// Its kind.
    #[cfg(test)]
    pub(super) fn kind(&self) -> ProblemKind {
        self.0.kind
    }
}

/// The JSON document of a problem, its own members last.
#[derive(Serialize)]
struct ProblemDocument<'a> {
    r#type: String,
    title: &'static str,
    status: u16,
    detail: &'a str,
    #[serde(flatten)]
    members: &'a Map<String, Value>,
}

impl ProblemInner {
    fn document(&self) -> ProblemDocument<'_> {
        let (status, slug, title) = self.kind.spec();
        let Self { detail, members, .. } = self;
        ProblemDocument {
            r#type: format!("/problems/{slug}"),
            title,
            status: status.as_u16(),
            detail,
            members,
        }
    }

    /// Adds `retry_after_seconds` to the members, and returns it: in whole seconds, and never 0, which
    /// would invite the client to come again at once.
    fn insert_retry_after(&mut self) -> Option<u64> {
        let seconds = self.retry_after.map(|after| after.as_secs() + u64::from(after.subsec_nanos() > 0));
        let seconds = seconds.map(|seconds| seconds.max(1));
        if let Some(seconds) = seconds {
            self.members.insert("retry_after_seconds".to_owned(), seconds.into());
        }
        seconds
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut inner = self.0;
        let seconds = inner.insert_retry_after();
        let (status, ..) = inner.kind.spec();
        let mut response = (status, Json(inner.document())).into_response();
        let ProblemInner { kind, note, .. } = *inner;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"headgate\""));
        }
        if kind == ProblemKind::ContentEncoding {
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip, zstd"));
        }
        if kind == ProblemKind::UpgradeRequired {
            headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
            headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        }
        if let Some(seconds) = seconds {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(limited) = &note.limited
            && limited.limit.is_rate()
        {
            headers.extend(rate_headers(&limited.standing));
        }
        response.extensions_mut().insert(note);
        response
    }
}

impl From<RejectedKey> for Problem {
    fn from(rejected: RejectedKey) -> Self {
        let mut problem = Self::from(rejected.denied);
        (problem.0.note.key_id, problem.0.note.key_shape) = (rejected.key_id, rejected.shape);
        problem
    }
}

impl From<GrantDenial> for Problem {
    fn from(denied: GrantDenial) -> Self {
        let cause = denied.cause();
        let words = denied.to_string();
        let mut problem = match denied {
            GrantDenial::NoKey
            | GrantDenial::Malformed
            | GrantDenial::Unknown
            | GrantDenial::Expired
            | GrantDenial::Revoked => Self::new(ProblemKind::Unauthorized, UNAUTHORIZED_DETAIL),
            GrantDenial::OtherDatasource { key_id } => {
                Self::new(ProblemKind::Unauthorized, UNAUTHORIZED_DETAIL).with_key_id(key_id)
            }
            // These words may be specific: they follow from the request alone and reveal nothing about a key.
            GrantDenial::Ambiguous => Self::new(
                ProblemKind::Unauthorized,
                "The request carries two different API keys. Send one, in one header.",
            ),
            GrantDenial::MissingScope { key_id, scope } => {
                let name = json!(scope);
                let words = format!("API key {key_id} lacks the scope {name}.");
                Self::new(ProblemKind::MissingScope, words).with("scope", name).with_key_id(key_id)
            }
            GrantDenial::TooManyFailures { retry_after } => {
                Self::new(ProblemKind::TooManyRequests, format!("{denied}.")).with_retry_after(retry_after)
            }
        };
        // For logs and metrics only; the client is not told.
        problem.0.note.words = words;
        problem.with_cause(cause)
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let cause = refusal.cause();
        let words = refusal.to_string();
        let retry_after = refusal.retry_after();
        let problem = match refusal {
            Refusal::Denied(denied) => denied.into(),
            Refusal::Topic(_) | Refusal::DatasourceMissing | Refusal::Subject(_) => {
                Self::new(ProblemKind::Topic, words)
            }
            Refusal::NoDatasource(_) => Self::new(ProblemKind::NotFound, words),
            Refusal::TooLarge { bytes_max, .. } => {
                Self::new(ProblemKind::TooLarge, words).with("limit", bytes_max)
            }
            Refusal::ContentType | Refusal::MessageId | Refusal::ReplySubject | Refusal::Header(_) => {
                Self::new(ProblemKind::Malformed, words)
            }
            Refusal::Quarantined(quarantined) => {
                let pointer = quarantined.reason.pointer.into_owned();
                Self::new(ProblemKind::Validation, words).with("pointer", pointer)
            }
            Refusal::Limited(limited) => Self::limited(limited, words),
            Refusal::Busy { in_flight_bytes_max, .. } => {
                Self::new(ProblemKind::Unavailable, words).with("limit", in_flight_bytes_max)
            }
            Refusal::Log(AppendError::Budget { retention_bytes }) => {
                Self::new(ProblemKind::Unavailable, words).with("limit", retention_bytes)
            }
            Refusal::Log(_) => Self::new(ProblemKind::Unavailable, words),
        };
        match retry_after {
            Some(after) => problem.with_retry_after(after),
            None => problem,
        }
        .with_cause(cause)
    }
}

impl From<RegistryError> for Problem {
    fn from(error: RegistryError) -> Self {
        let words = error.to_string();
        match error {
            RegistryError::Exists(_) => Self::new(ProblemKind::Conflict, words),
            RegistryError::Rotation(_) => Self::new(ProblemKind::Conflict, words).with_cause("rotation"),
            RegistryError::LastAdmin => Self::new(ProblemKind::Conflict, words).with_cause("last_admin_key"),
            RegistryError::NoDatasource(_) => Self::new(ProblemKind::NotFound, words),
            RegistryError::InvalidName(_) => Self::new(ProblemKind::Malformed, words),
            RegistryError::TooLarge(_) => Self::new(ProblemKind::TooLarge, words),
            RegistryError::Away(_) => Self::new(ProblemKind::Unavailable, words).with_cause("cluster_away"),
            RegistryError::Overtaken => Self::new(ProblemKind::Unavailable, words),
            _ => {
                tracing::error!(error = words, "the registry could not be changed");
                Self::new(ProblemKind::Unavailable, "The registry cannot be written; nothing was changed.")
            }
        }
    }
}

impl From<QueryError> for Problem {
    fn from(error: QueryError) -> Self {
        if let QueryError::Filter(_) = error {
            return Self::new(ProblemKind::Malformed, error.to_string());
        }
        match error {
            QueryError::Filter(_) => Self::new(ProblemKind::Topic, error.to_string()),
            QueryError::Database(_) => {
                tracing::error!(%error, "a query of stored records failed");
                Self::new(ProblemKind::Unavailable, "The stored records cannot be read.")
            }
        }
    }
}

impl From<NameError> for Problem {
    fn from(error: NameError) -> Self {
        Self::new(ProblemKind::Malformed, error.to_string())
    }
}

impl From<PathRejection> for Problem {
    fn from(rejection: PathRejection) -> Self {
        Self::new(ProblemKind::Malformed, format!("The path cannot be read: {}", rejection.body_text()))
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        // "Failed to deserialize query string: unknown field `x`, expected one of …": only the part after
        // the colon helps a person.
        let words = rejection.body_text();
        let words = words.split_once(": ").map_or(words.as_str(), |(_, reason)| reason);
        Self::new(ProblemKind::Malformed, format!("The query string cannot be used: {words}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(problem: Problem) -> (StatusCode, axum::http::HeaderMap, Value) {
        let response = problem.into_response();
        let (parts, body) = response.into_parts();
        let bytes = futures_util::FutureExt::now_or_never(axum::body::to_bytes(body, 1 << 20));
        let bytes = bytes.expect("the body is there").expect("and whole");
        (parts.status, parts.headers, serde_json::from_slice(&bytes).expect("JSON"))
    }

    #[test]
    fn every_kind_has_a_slug_of_its_own() {
        let mut slugs = ProblemKind::ALL.map(|kind| kind.spec().1);
        slugs.sort_unstable();
        assert!(slugs.windows(2).all(|pair| pair[0] != pair[1]), "{slugs:?}");
    }

    #[test]
    fn a_transient_refusal_says_when_to_come_again_in_whole_seconds() {
        for (after, seconds) in [(0, 1), (1, 1), (1000, 1), (1001, 2), (2500, 3)] {
            let problem =
                Problem::new(ProblemKind::Unavailable, "full").with_retry_after(Duration::from_millis(after));
            let (status, headers, json) = document(problem);
            assert_eq!(status, 503);
            assert_eq!(headers[RETRY_AFTER], seconds.to_string());
            assert_eq!(json["retry_after_seconds"], seconds);
        }
    }

    #[test]
    fn a_stranger_is_told_the_same_whatever_is_wrong_with_the_key() {
        let key_id = KeyId([7; 6]);
        let all = [
            GrantDenial::NoKey,
            GrantDenial::Malformed,
            GrantDenial::Unknown,
            GrantDenial::Expired,
            GrantDenial::Revoked,
            GrantDenial::OtherDatasource { key_id },
        ];
        let mut answers = all.map(|denied| document(denied.into()));
        let (first, others) = answers.split_first_mut().expect("six");
        assert_eq!(first.0, 401);
        assert_eq!(first.1[WWW_AUTHENTICATE], "Bearer realm=\"headgate\"");
        assert!(others.iter().all(|other| other == first), "{others:?}");
    }

    #[test]
    fn a_missing_scope_is_named() {
        let denied =
            GrantDenial::MissingScope { key_id: KeyId([7; 6]), scope: crate::auth::Scope::Subscribe };
        let (status, _, json) = document(denied.into());
        assert_eq!((status.as_u16(), &json["scope"]), (403, &json!("subscribe")));
        assert_eq!(json["type"], "/problems/missing_scope");
    }
}
