//! A problem: the one form of every refusal over HTTP and NATS, an RFC 9457 problem document
//! (`application/problem+json`). Here and in `convert` alone an error becomes a status, a type that a program
//! can switch on, and words for the person who sent it.
//!
//! `type` is a stable reference, `/problems/too_large`: an identifier to compare, and a page for people. Its
//! last part is the slug of a [`ProblemKind`]. `title` goes with the type, `detail` with the one request.
//! Further members carry what a client can act on: `limit`, `retry_after_seconds`, `scope`, `line`,
//! `column`, `pointer`, `errors`.

mod convert;

use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::auth::shape::KeyShape;
use crate::message::KeyId;
use crate::observe::cause::{Cause, ProblemKind};
use crate::quota::LimitExceeded;

/// When to come again, where the error does not say.
const RETRY_AFTER_DEFAULT: Duration = Duration::from_secs(1);

/// One problem, on its way to the client. Boxed, so that a `Result` with it stays small.
#[derive(Debug)]
pub(super) struct Problem(Box<ProblemInner>);

#[derive(Debug)]
struct ProblemInner {
    kind: ProblemKind,
    detail: String,
    members: Map<String, Value>,
    retry_after: Option<Duration>,
    note: RefusedRequest,
}

/// What logs and metrics record about a refused request. Over HTTP it travels as an extension of the
/// response, and never to the client.
#[derive(Debug, Clone)]
pub(super) struct RefusedRequest {
    /// Why it was refused.
    pub(super) cause: Cause,
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
    /// A problem with the kind of its cause, and the detail for this request.
    pub(super) fn new(cause: Cause, detail: impl Into<String>) -> Self {
        let (kind, detail) = (cause.kind(), detail.into());
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
        Self::new(Cause::Internal, "The gateway's own log says more.")
    }

    /// The key is for one datasource, and the request needs a key for all of them.
    pub(super) fn needs_key_for_all(key_id: KeyId) -> Self {
        let words = format!("API key {key_id} is for one datasource; this needs a key for all of them.");
        Self::new(Cause::OtherDatasource, words).with_kind(ProblemKind::MissingScope).with_key_id(key_id)
    }

    /// Adds a member to the document.
    pub(super) fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.0.members.insert(name.to_owned(), value.into());
        self
    }

    /// Sets another kind than its cause's.
    pub(super) fn with_kind(mut self, kind: ProblemKind) -> Self {
        self.0.kind = kind;
        self
    }

    /// Says that the request is in order, and that what it asks for cannot be: its values contradict each other, or what is
    /// there.
    pub(super) fn not_possible(mut self) -> Self {
        self.0.kind = ProblemKind::NotPossible;
        self.0.note.cause = Cause::NotPossible;
        self
    }

    /// Marks that the body was read to its end.
    pub(super) fn after_body_read(mut self) -> Self {
        self.0.note.body_read = true;
        self
    }

    /// Whether it is about a size or an amount for which waiting does not help, and whose limit may have been changed.
    pub(super) fn is_over_limit(&self) -> bool {
        matches!(self.0.note.cause, Cause::LimitPayloadBytes | Cause::LimitTopics | Cause::TooLarge)
    }

    /// Marks that intake has counted the refusal.
    pub(super) fn already_counted(mut self) -> Self {
        self.0.note.counted = true;
        self
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

    /// Its kind.
    pub(super) fn kind(&self) -> ProblemKind {
        self.0.kind
    }

    /// Its words for the one request.
    pub(super) fn detail(&self) -> &str {
        &self.0.detail
    }

    /// A further member of its document, if it has it.
    pub(super) fn member(&self, name: &str) -> Option<&Value> {
        self.0.members.get(name)
    }

    /// Takes it apart into what a client is told and what is recorded of it.
    pub(super) fn into_parts(mut self) -> (ProblemReply, RefusedRequest) {
        // In whole seconds, and never 0, which would invite the client to come again at once.
        let seconds = self.0.retry_after.map(|after| after.as_secs() + u64::from(after.subsec_nanos() > 0));
        let retry_after_seconds = seconds.map(|seconds| seconds.max(1));
        if let Some(seconds) = retry_after_seconds {
            self.0.members.insert("retry_after_seconds".to_owned(), seconds.into());
        }
        let ProblemInner { kind, detail, members, retry_after, note } = *self.0;
        let document = ProblemDocument {
            r#type: format!("/problems/{}", kind.slug()),
            title: kind.title(),
            status: kind.status(),
            detail,
            members,
        };
        (ProblemReply { kind, document, retry_after, retry_after_seconds }, note)
    }
}

/// What a client is told of a problem.
pub(super) struct ProblemReply {
    pub(super) kind: ProblemKind,
    pub(super) document: ProblemDocument,
    /// When the client may come again, as exactly as it is known.
    pub(super) retry_after: Option<Duration>,
    /// The same, as the document has it.
    pub(super) retry_after_seconds: Option<u64>,
}

/// The JSON document of a problem, its own members last.
#[derive(Serialize)]
pub(super) struct ProblemDocument {
    r#type: String,
    title: &'static str,
    status: u16,
    detail: String,
    #[serde(flatten)]
    members: Map<String, Value>,
}
