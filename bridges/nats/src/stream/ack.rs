//! JetStream's answers to published messages: the inbox where they arrive, and how they are decoded.

use std::borrow::Cow;

use async_nats::jetstream::ErrorCode;
use async_nats::{Message, StatusCode, Subscriber};
use futures_util::{FutureExt, StreamExt};
use serde::Deserialize;

use super::{StreamError, StreamSequence};
use crate::connection::Nats;

/// Why a message was not added, or may not have been.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// It was not added: NATS is away, or the stream takes no messages now.
    #[error("{0}")]
    Away(String),
    /// It was not added: the stream has reached its maximum size.
    #[error("{0}")]
    Full(String),
    /// It was not added: JetStream refuses it, and a retry does not help.
    #[error("{0}")]
    Refused(String),
    /// It may or may not have been added.
    #[error("{0}")]
    Unknown(String),
}

/// The inbox of a publisher. Each message that asks for an answer has a number, and its own reply subject.
#[derive(Debug)]
pub(crate) struct AckInbox {
    /// The prefix of the reply subjects; the message's number follows it.
    prefix: String,
    acks: Subscriber,
}

impl AckInbox {
    /// Subscribes to a new inbox.
    ///
    /// # Errors
    /// [`StreamError::Away`]: the connection was closed for good.
    pub(crate) async fn open(nats: &Nats) -> Result<Self, StreamError> {
        let inbox = nats.client().new_inbox();
        let acks = nats.client().subscribe(format!("{inbox}.*")).await;
        let acks = acks.map_err(|error| StreamError::Away(error.to_string()))?;
        Ok(Self { prefix: inbox + ".", acks })
    }

    /// The reply subject of a message.
    pub(crate) fn reply(&self, number: u64) -> String {
        format!("{}{number}", self.prefix)
    }

    /// The number of the message that an answer is for.
    pub(crate) fn number(&self, answer: &Message) -> Option<u64> {
        answer.subject.as_str().strip_prefix(self.prefix.as_str())?.parse().ok()
    }

    /// Waits for an answer; `None` if the connection was closed for good. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<Message> {
        self.acks.next().await
    }

    /// An answer that has arrived already.
    pub(crate) fn try_next(&mut self) -> Option<Message> {
        self.acks.next().now_or_never().flatten()
    }
}

/// JetStream's confirmation that a message is in a stream.
#[derive(Debug, Deserialize)]
pub(crate) struct PublishAnswer<'a> {
    /// The stream.
    #[serde(default, borrow)]
    pub(crate) stream: Cow<'a, str>,
    /// The message's place there.
    #[serde(default)]
    pub(crate) seq: StreamSequence,
    /// It was stored earlier, under the same id.
    #[serde(default)]
    pub(crate) duplicate: bool,
    #[serde(borrow)]
    error: Option<PublishAnswerError<'a>>,
}

#[derive(Debug, Deserialize)]
struct PublishAnswerError<'a> {
    #[serde(default)]
    err_code: u64,
    #[serde(default, borrow)]
    description: Cow<'a, str>,
    #[serde(default)]
    code: u16,
}

impl<'a> PublishAnswer<'a> {
    /// Decodes an answer.
    ///
    /// # Errors
    /// [`PublishError`] for an answer that does not confirm the message.
    pub(crate) fn decode(message: &'a Message) -> Result<Self, PublishError> {
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            let text = "the stream has no leader, or JetStream is off";
            return Err(PublishError::Away(text.to_owned()));
        }
        let answer: Self = serde_json::from_slice(&message.payload)
            .map_err(|error| PublishError::Unknown(format!("an ack that cannot be read: {error}")))?;
        match answer.error {
            None if answer.seq > 0 => Ok(answer),
            None => Err(PublishError::Unknown("an ack without a sequence".to_owned())),
            Some(error) => Err(error.into()),
        }
    }
}

impl From<PublishAnswerError<'_>> for PublishError {
    fn from(PublishAnswerError { err_code, description, code }: PublishAnswerError<'_>) -> Self {
        let full =
            ErrorCode(err_code) == ErrorCode::STREAM_STORE_FAILED && description.contains("maximum bytes");
        let text = description.into_owned();
        match code {
            _ if full => PublishError::Full(text),
            // Transient: a message with the same id is on its way (409), too many requests (429), or a failure of the
            // server.
            409 | 429 | 500.. => PublishError::Away(text),
            _ => PublishError::Refused(text),
        }
    }
}
