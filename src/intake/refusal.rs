//! A refusal: why a message was not let in, with what an operator needs to act on it.

use std::time::Duration;

use crate::auth::GrantDenial;
use crate::limits::{CONTENT_TYPE_BYTES_MAX, MESSAGE_ID_BYTES_MAX, RETRY_AFTER};
use crate::log::{AppendError, QuarantineReason, RecordTooLarge, SectionOutcome};
use crate::memory::{MemoryExceeded, MemoryOwner};
use crate::message::{NameError, Offset, Transport};
use crate::observe::cause::Cause;
use crate::observe::refusals::RefusalNote;
use crate::quota::{Limit, LimitExceeded};
use crate::subject::SubjectError;

use super::{AskedMessage, QuarantinedMessage};

/// An id that belongs to another message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdConflict {
    /// The id that the sender gave it.
    #[error("its message id belongs to another message, which was kept at offset {0}: this one is not kept")]
    MessageId(Offset),
    /// The packet identifier of a QoS 2 exchange that is open.
    #[error(
        "its packet identifier belongs to another message, which was kept and not released: this one is not kept"
    )]
    Exchange,
}

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
    #[error(
        "its reply subject is not under one of nats.reply_prefixes (_INBOX): nothing is published there, so it is not \
         let in"
    )]
    ReplySubject,
    /// A NATS message whose headers cannot be read.
    #[error("its headers cannot be read: one holds a line break, has no colon, or is not UTF-8")]
    HeaderForm,
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
    /// Its id, or the QoS 2 exchange that it is part of, belongs to another message, which the log has.
    #[error("{}", .0)]
    Conflict(IdConflict),
    /// Transient: its datasource has as many open QoS 2 exchanges as it may have now.
    #[error(
        "the datasource has too many QoS 2 messages that its clients have not released \
         (intake.exchanges_per_datasource_max)"
    )]
    Exchanges,
    /// Transient: its datasource brings new ids faster than the cluster forgets them.
    #[error(
        "the datasource has brought as many ids of messages as the cluster remembers of it \
         (intake.dedup_ids_per_datasource_max, intake.dedup_ids_max); the oldest leave after intake.dedup_window_s"
    )]
    Ids,
    /// It was refused, but may be a repetition of a message that the log has. It is in the draft as a question:
    /// the refusal holds unless the log knows it.
    #[error("{}", .0.refusal)]
    Asked(Box<AskedMessage>),
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
    /// It does not fit in the memory that its key, its datasource or all clients may take. Transient, unless it is too
    /// large by itself.
    #[error("{0}")]
    Memory(Box<MemoryExceeded>),
    /// The log cannot take it. Transient, unless it is too large.
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
            Refusal::Memory(exceeded) if !exceeded.is_too_large => Some(RETRY_AFTER),
            // What is larger than a frame of the log stays so.
            Refusal::Log(AppendError::TooLarge { .. }) => None,
            Refusal::Log(_) | Refusal::Exchanges | Refusal::Ids => Some(RETRY_AFTER),
            Refusal::Asked(asked) => asked.refusal.retry_after(),
            _ => None,
        }
    }

    /// Whether the message may be taken later: its sender must not be told anything with which it forgets the message. A
    /// rate whose policy is to reject, and a bad key, are a no for good.
    pub fn is_transient(&self) -> bool {
        match self {
            Refusal::Denied(_) => false,
            Refusal::Limited(limited) if limited.limit.is_rate() => limited.is_held_back(),
            Refusal::Asked(asked) => asked.refusal.is_transient(),
            _ => self.retry_after().is_some(),
        }
    }

    /// Why, for metrics, logs and the client.
    pub fn cause(&self) -> Cause {
        match self {
            Refusal::Denied(denied) => denied.cause(),
            Refusal::Topic(_) | Refusal::DatasourceMissing | Refusal::Subject(_) => Cause::Topic,
            Refusal::ReplySubject => Cause::ReplySubject,
            Refusal::Header(_) => Cause::Header,
            Refusal::HeaderForm => Cause::HeaderForm,
            Refusal::NoDatasource(_) => Cause::NoDatasource,
            Refusal::TooLarge { .. } => Cause::TooLarge,
            Refusal::ContentType => Cause::ContentType,
            Refusal::MessageId => Cause::MessageId,
            Refusal::Conflict(_) => Cause::IdConflict,
            Refusal::Exchanges => Cause::Exchanges,
            Refusal::Ids => Cause::LimitIds,
            Refusal::Asked(asked) => asked.refusal.cause(),
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
                // Nothing is refused for these.
                Limit::StoredAgeS | Limit::StoredBytes => Cause::Internal,
            },
            Refusal::Busy { .. } => Cause::Busy,
            Refusal::Memory(exceeded) => exceeded.cause(),
            Refusal::Log(AppendError::DiskFull) => Cause::DiskFull,
            Refusal::Log(AppendError::Budget { .. }) => Cause::LogBudget,
            Refusal::Log(AppendError::Starved(_)) => Cause::LogStarved,
            Refusal::Log(AppendError::TooLarge { .. }) => Cause::LogTooLarge,
            Refusal::Log(AppendError::Failed(_)) => Cause::LogFailed,
            Refusal::Log(AppendError::Away(_)) => Cause::LogAway,
            Refusal::Log(AppendError::Unknown(_)) => Cause::LogUnknown,
            Refusal::Log(AppendError::OtherHistory(_)) => Cause::LogHistory,
            Refusal::Log(AppendError::Closed) => Cause::ShuttingDown,
        }
    }

    /// The note to report it with; the caller adds who was refused.
    pub fn note(&self, transport: Transport) -> RefusalNote<'_> {
        let limited = match self {
            Refusal::Asked(asked) => return asked.refusal.note(transport),
            Refusal::Limited(limited) => Some(&**limited),
            _ => None,
        };
        RefusalNote { limited, ..RefusalNote::new(transport, self.cause(), self) }
    }
}

impl Refusal {
    /// The refusal of messages that were not kept, from their outcome in the log. `None` if they were kept, now or
    /// before, or if they only asked.
    pub fn from_outcome(outcome: &SectionOutcome) -> Option<Self> {
        match outcome {
            SectionOutcome::Kept(_)
            | SectionOutcome::Duplicate(_)
            | SectionOutcome::Known(_)
            | SectionOutcome::Unknown => None,
            SectionOutcome::KeyDead => Some(GrantDenial::Revoked.into()),
            SectionOutcome::Conflict { in_exchange: true, .. } => Some(Self::Conflict(IdConflict::Exchange)),
            SectionOutcome::Conflict { earlier, .. } => {
                Some(Self::Conflict(IdConflict::MessageId(earlier.first())))
            }
            SectionOutcome::ExchangesFull => Some(Self::Exchanges),
            SectionOutcome::IdsFull => Some(Self::Ids),
        }
    }
}

impl From<RecordTooLarge> for Refusal {
    fn from(RecordTooLarge { bytes, bytes_max, limit }: RecordTooLarge) -> Self {
        Refusal::TooLarge { bytes, bytes_max, limit }
    }
}

impl MemoryExceeded {
    /// The cause for metrics and logs.
    pub fn cause(&self) -> Cause {
        match &self.owner {
            _ if self.is_too_large => Cause::TooLarge,
            None => Cause::MemoryFull,
            Some(MemoryOwner::Key(_) | MemoryOwner::Datasource(_)) => Cause::MemoryShare,
            Some(MemoryOwner::Address(_) | MemoryOwner::Strangers) => Cause::StrangersShare,
        }
    }
}

impl From<MemoryExceeded> for Refusal {
    fn from(exceeded: MemoryExceeded) -> Self {
        Refusal::Memory(Box::new(exceeded))
    }
}

/// So that whether a message was let in fits into registers.
impl From<GrantDenial> for Box<Refusal> {
    fn from(denial: GrantDenial) -> Self {
        Box::new(denial.into())
    }
}

impl From<MemoryExceeded> for Box<Refusal> {
    fn from(exceeded: MemoryExceeded) -> Self {
        Box::new(exceeded.into())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_time_does_not_help_is_not_to_come_again() {
        let too_large = Refusal::Log(AppendError::TooLarge { bytes: 2, bytes_max: 1 });
        assert!(too_large.retry_after().is_none() && !too_large.is_transient());
        let full = Refusal::Log(AppendError::DiskFull);
        assert!(full.retry_after().is_some() && full.is_transient());
    }
}
