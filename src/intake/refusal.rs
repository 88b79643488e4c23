//! A refusal: why a message was not let in, with what an operator needs to act on it.

use std::time::Duration;

use crate::auth::GrantDenial;
use crate::limits::{CONTENT_TYPE_BYTES_MAX, MESSAGE_ID_BYTES_MAX, RETRY_AFTER};
use crate::log::{AppendError, QuarantineReason, RecordTooLarge};
use crate::message::{NameError, Transport};
use crate::observe::cause::Cause;
use crate::observe::refusals::RefusalNote;
use crate::quota::{Limit, LimitExceeded};
use crate::subject::SubjectError;

use super::QuarantinedMessage;

/// Why a message was not let in. Each front translates it into its protocol in one function.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refusal {
    /// The key does not allow the message.
    #[error(transparent)]
    Denied(#[from] GrantDenial),
    /// The topic cannot be used.
    #[error("{0}")]
    Topic(#[from] NameError),
    /// A `*` key named a datasource that does not exist.
    #[error("there is no datasource {0:?}")]
    NoDatasource(String),
    /// A `*` key has to name a datasource in front of the topic.
    #[error("a key for all datasources publishes to {{datasource}}/{{topic}}")]
    DatasourceMissing,
    /// A NATS subject that does not translate into a topic.
    #[error("{0}")]
    Subject(#[from] SubjectError),
    /// A NATS message whose reply subject is not an inbox: the gateway would publish there with
    /// permissions that the sender may not have.
    #[error("its reply subject is no inbox (_INBOX.…): nothing is published there, so it is not let in")]
    ReplySubject,
    /// A header of a NATS message that asks for what only JetStream itself does.
    #[error("the header {0} asks for what only JetStream itself does; send the message without it")]
    Header(&'static str),
    /// A payload over the limit.
    #[error("a payload of {bytes} bytes is over the limit of {bytes_max} ({limit})")]
    TooLarge {
        /// The size of the payload.
        bytes: usize,
        /// The largest size that is let in.
        bytes_max: usize,
        /// The setting that limits it.
        limit: &'static str,
    },
    /// A media type that is too long or holds control characters.
    #[error("a content type is at most {CONTENT_TYPE_BYTES_MAX} bytes of printable text")]
    ContentType,
    /// A message id that is empty, too long or holds control characters.
    #[error("a message id is 1 to {MESSAGE_ID_BYTES_MAX} bytes of printable text")]
    MessageId,
    /// It does not meet its schema, or exceeds a limit whose policy is quarantine. It is in the draft
    /// nevertheless, and goes into quarantine with it.
    #[error("{}; it is kept in quarantine", .0.reason)]
    Quarantined(Box<QuarantinedMessage>),
    /// A limit of the key or the datasource. Transient if its policy is to hold back.
    #[error("{0}")]
    Limited(Box<LimitExceeded>),
    /// Transient: too many bytes are on their way into the log, for longer than a client is held back.
    #[error(
        "more than {in_flight_bytes_max} bytes (intake.in_flight_bytes_max) are waiting to be written; try again in {} s",
        retry_after.as_secs()
    )]
    Busy {
        /// The limit.
        in_flight_bytes_max: usize,
        /// When to come again.
        retry_after: Duration,
    },
    /// Transient: the log cannot take it.
    #[error("{0}")]
    Log(#[from] AppendError),
}

impl Refusal {
    /// When to come again, if time helps.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Refusal::Busy { retry_after, .. } => Some(*retry_after),
            Refusal::Denied(GrantDenial::TooManyFailures { retry_after }) => Some(*retry_after),
            Refusal::Limited(limited) if limited.limit.is_rate() => Some(limited.wait),
            Refusal::Limited(limited) if limited.limit == Limit::Connections => Some(RETRY_AFTER),
            Refusal::Log(_) => Some(RETRY_AFTER),
            _ => None,
        }
    }

    /// Why, for metrics, logs and the client.
    pub fn cause(&self) -> Cause {
        match self {
            Refusal::Denied(denied) => denied.cause(),
            Refusal::Topic(_) | Refusal::DatasourceMissing | Refusal::Subject(_) => Cause::Topic,
            Refusal::ReplySubject => Cause::ReplySubject,
            Refusal::Header(_) => Cause::Header,
            Refusal::NoDatasource(_) => Cause::NoDatasource,
            Refusal::TooLarge { .. } => Cause::TooLarge,
            Refusal::ContentType => Cause::ContentType,
            Refusal::MessageId => Cause::MessageId,
            Refusal::Quarantined(quarantined) if quarantined.reason.is_limit() => Cause::LimitQuarantine,
            Refusal::Quarantined(_) => Cause::Schema,
            Refusal::Limited(limited) => match limited.limit {
                Limit::MessagesPerS => Cause::LimitMessagesPerS,
                Limit::BytesPerS => Cause::LimitBytesPerS,
                Limit::Connections => Cause::LimitConnections,
                Limit::PayloadBytes => Cause::LimitPayloadBytes,
                Limit::Topics => Cause::LimitTopics,
                Limit::Sessions => Cause::LimitSessions,
                Limit::Subscriptions => Cause::LimitSubscriptions,
                Limit::SubscriptionBytes => Cause::LimitSubscriptionBytes,
                Limit::ShareGroups => Cause::LimitShareGroups,
                Limit::Inflight => Cause::LimitInflight,
                Limit::RetainedTopics => Cause::LimitRetainedTopics,
                Limit::RetainedBytes => Cause::LimitRetainedBytes,
                Limit::Keys => Cause::LimitKeys,
            },
            Refusal::Busy { .. } => Cause::Busy,
            Refusal::Log(AppendError::DiskFull) => Cause::DiskFull,
            Refusal::Log(AppendError::Budget { .. }) => Cause::LogBudget,
            Refusal::Log(AppendError::Starved(_)) => Cause::LogStarved,
            Refusal::Log(AppendError::TooLarge { .. }) => Cause::LogTooLarge,
            Refusal::Log(AppendError::Failed(_)) => Cause::LogFailed,
            Refusal::Log(AppendError::Away(_)) => Cause::LogAway,
            Refusal::Log(AppendError::Unknown(_)) => Cause::LogUnknown,
            Refusal::Log(AppendError::Closed) => Cause::ShuttingDown,
        }
    }

    /// The note to report it with; the caller adds who was refused.
    pub fn note(&self, transport: Transport) -> RefusalNote<'_> {
        let limited = if let Refusal::Limited(limited) = self { Some(&**limited) } else { None };
        RefusalNote { limited, ..RefusalNote::new(transport, self.cause(), self) }
    }
}

impl From<RecordTooLarge> for Refusal {
    fn from(RecordTooLarge { bytes, bytes_max, limit }: RecordTooLarge) -> Self {
        Refusal::TooLarge { bytes, bytes_max, limit }
    }
}

impl From<LimitExceeded> for Refusal {
    fn from(limited: LimitExceeded) -> Self {
        Refusal::Limited(Box::new(limited))
    }
}

/// The quarantine reason of a message that exceeds a limit.
pub(super) fn quarantine_reason(limited: &LimitExceeded) -> QuarantineReason<'static> {
    QuarantineReason {
        keyword: QuarantineReason::LIMIT.into(),
        pointer: "".into(),
        words: limited.to_string().into(),
        schema_version: 0,
    }
}
