//! The inlet: the contract between NATS and the code that admits messages. Each message of a subject becomes
//! a [`Parcel`], and the [`Inlet`] gives a [`InletVerdict`] on it. The answer on the message's reply subject
//! has the form of JetStream's, so that a client's `js.publish` works unchanged.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use async_nats::header::HeaderMap;
use async_nats::{HeaderValue, Message};
use bytes::Bytes;

/// One message from NATS. It has no `Debug`: a header holds the API key.
pub struct Parcel {
    message: Message,
    reply: NatsReplyPolicy,
}

/// Whether a message can be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NatsReplyPolicy {
    /// It has no reply subject: no sender waits for an answer.
    Unwanted,
    /// It has a reply subject that may be answered.
    Wanted,
    /// Its reply subject is no inbox. An answer there could be a message that the sender may not publish, so
    /// there is none.
    Elsewhere,
}

impl Parcel {
    pub(crate) fn new(message: Message) -> Self {
        let reply = match &message.reply {
            None => NatsReplyPolicy::Unwanted,
            Some(reply) if reply.starts_with('_') => NatsReplyPolicy::Wanted,
            Some(_) => NatsReplyPolicy::Elsewhere,
        };
        Self { message, reply }
    }

    /// The subject that it was published to.
    pub fn subject(&self) -> &str {
        &self.message.subject
    }

    /// Its payload.
    pub fn payload(&self) -> &[u8] {
        &self.message.payload
    }

    /// Its headers: names and values, a name as often as it has values, in no particular order of names.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.message.headers.iter().flat_map(HeaderMap::iter).flat_map(|(name, values)| {
            let name: &str = name.as_ref();
            values.iter().map(move |value| (name, value.as_str()))
        })
    }

    /// Whether it can be answered.
    ///
    /// The gateway publishes the answer with its own permissions. An arbitrary reply subject would let the
    /// sender publish where it may not, such as into the validated stream. Only subjects that begin with `_`
    /// are answered: clients' inboxes (`_INBOX.…`), and what a server makes of them on the way from another
    /// account (`_R_.…`).
    pub fn reply(&self) -> NatsReplyPolicy {
        self.reply
    }

    /// Takes the reply subject, if it may be answered.
    pub(crate) fn take_reply(&mut self) -> Option<async_nats::Subject> {
        self.message.reply.take().filter(|_| self.reply == NatsReplyPolicy::Wanted)
    }

    /// Its approximate size in memory, in bytes.
    pub(crate) fn weight(&self) -> usize {
        size_of::<Message>() + self.message.length
    }
}

/// The outcome for a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InletVerdict {
    /// It is stored durably.
    Stored {
        /// Its sequence number.
        seq: u64,
        /// It was stored earlier, under the same id.
        duplicate: bool,
    },
    /// It is not stored, or only in quarantine.
    Refused(Box<InletRefusal>),
}

/// A refusal, as the sender is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InletRefusal {
    /// An HTTP status code: 401, 429.
    pub code: u16,
    /// A short text.
    pub text: String,
    /// The whole answer, a JSON object. A member `error` like that of JetStream's answers makes a client's
    /// `js.publish` fail with a proper error.
    pub body: Vec<u8>,
    /// After how long a retry may succeed; `None`: it cannot.
    pub retry_after: Option<Duration>,
}

/// Resolves to one verdict for each message of a batch, in their order.
pub type InletVerdicts = Pin<Box<dyn Future<Output = Vec<InletVerdict>> + Send>>;

/// Admits messages.
pub trait Inlet: Sync {
    /// Takes messages in the order of their arrival. It returns when their order is fixed, so that the next
    /// batch follows them; the returned future gives the verdicts later.
    fn deliver(&self, parcels: Vec<Parcel>) -> impl Future<Output = InletVerdicts> + Send;

    /// The verdict on a message for which there is no room: NATS has no way to make a publisher wait.
    fn overflow(&self, parcel: &Parcel) -> InletVerdict;
}

/// Encodes verdicts as JetStream encodes its answers.
#[derive(Debug, Clone)]
pub(crate) struct InletAnswerWriter {
    /// `{"stream":"NAME","seq":`
    stored: String,
}

impl InletAnswerWriter {
    /// Answers in the name of a stream.
    pub(crate) fn for_stream(stream: &str) -> Self {
        Self { stored: format!("{{\"stream\":{},\"seq\":", serde_json::Value::from(stream)) }
    }

    /// The headers and the payload of an answer.
    pub(crate) fn write(&self, verdict: InletVerdict) -> (Option<HeaderMap>, Bytes) {
        match verdict {
            InletVerdict::Stored { seq, duplicate } => {
                (None, format!("{}{seq},\"duplicate\":{duplicate}}}", self.stored).into())
            }
            InletVerdict::Refused(refused) => {
                let InletRefusal { code, text, body, retry_after } = *refused;
                let mut headers = HeaderMap::new();
                // A line break would end the header.
                let text: String = text.chars().filter(|c| !c.is_control()).collect();
                headers.insert("Nats-Service-Error", text);
                headers.insert("Nats-Service-Error-Code", HeaderValue::from(code));
                headers.insert("Content-Type", "application/json");
                if let Some(after) = retry_after {
                    // Whole seconds, rounded up and never 0: 0 would invite an immediate retry.
                    let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
                    headers.insert("Retry-After", HeaderValue::from(seconds.max(1)));
                }
                (Some(headers), body.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parcel(reply: Option<&str>) -> Parcel {
        let mut headers = HeaderMap::new();
        headers.append("X", "1");
        headers.append("X", "2");
        Parcel::new(Message {
            subject: "ingest.press-4.temp".into(),
            reply: reply.map(Into::into),
            payload: Bytes::from_static(b"21.5"),
            headers: Some(headers),
            status: None,
            description: None,
            length: 40,
        })
    }

    #[test]
    fn a_yes_is_what_jetstream_says() {
        let (headers, body) =
            InletAnswerWriter::for_stream("headgate").write(InletVerdict::Stored { seq: 7, duplicate: true });
        assert!(headers.is_none());
        let ack: async_nats::jetstream::publish::PublishAck =
            serde_json::from_slice(&body).expect("as a client reads it");
        assert_eq!((ack.stream.as_str(), ack.sequence, ack.duplicate), ("headgate", 7, true));
    }

    #[test]
    fn a_no_has_its_code_in_the_headers_and_no_line_break_from_a_text() {
        let refused = InletRefusal {
            code: 429,
            text: "too many\r\nX: y".to_owned(),
            body: b"{}".to_vec(),
            retry_after: Some(Duration::from_millis(1001)),
        };
        let (headers, _) =
            InletAnswerWriter::for_stream("headgate").write(InletVerdict::Refused(Box::new(refused)));
        let headers = headers.expect("headers");
        let value = |name: &str| headers.get(name).map(HeaderValue::as_str);
        assert_eq!(value("Nats-Service-Error"), Some("too manyX: y"));
        assert_eq!(value("Nats-Service-Error-Code"), Some("429"));
        assert_eq!(value("Retry-After"), Some("2"));
    }

    #[test]
    fn an_answer_goes_to_an_inbox_and_nowhere_else() {
        for (reply, answered) in [
            (None, NatsReplyPolicy::Unwanted),
            (Some("_INBOX.abc.1"), NatsReplyPolicy::Wanted),
            (Some("_R_.abc.1"), NatsReplyPolicy::Wanted),
            (Some("stream.press-4.temp"), NatsReplyPolicy::Elsewhere),
            (Some("$KV.headgate-registry.key"), NatsReplyPolicy::Elsewhere),
            (Some("ingest.press-4.temp"), NatsReplyPolicy::Elsewhere),
        ] {
            let mut parcel = parcel(reply);
            assert_eq!(parcel.reply(), answered, "{reply:?}");
            assert_eq!(parcel.take_reply().is_some(), answered == NatsReplyPolicy::Wanted, "{reply:?}");
        }
    }

    #[test]
    fn a_header_is_there_as_often_as_it_has_values() {
        let parcel = parcel(None);
        assert_eq!(parcel.headers().collect::<Vec<_>>(), [("X", "1"), ("X", "2")]);
    }
}
