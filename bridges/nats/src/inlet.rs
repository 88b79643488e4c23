//! The inlet: the contract between NATS and the code that admits messages. Each message of a subject becomes
//! a [`Parcel`], and the [`Inlet`] gives a [`InletVerdict`] on it. The answer on the message's reply subject
//! has the form of JetStream's, so that a client's `js.publish` works unchanged.

use std::fmt::Write;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::future::BoxFuture;
use memchr::memmem;

/// What the subjects begin with that a server puts in the place of a reply subject from another account.
const SERVICE_REPLY_PREFIX: &str = "_R_.";
/// The first line of a message's headers.
const HEAD_VERSION: &str = "NATS/1.0";

/// One message from NATS. It has no `Debug`: a header holds the API key.
pub struct Parcel {
    /// Subject, reply subject, headers and payload, one after the other: an allocation of its own, so that a message
    /// that waits keeps no others in memory.
    bytes: Box<[u8]>,
    subject_end: usize,
    reply_end: usize,
    head_end: usize,
    has_reply: bool,
    is_well_formed: bool,
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
    /// A message with these bytes, whatever they are. `head` is empty without headers.
    pub(crate) fn new(subject: &[u8], reply: Option<&[u8]>, head: &[u8], payload: &[u8]) -> Self {
        let reply_bytes = reply.unwrap_or_default();
        let bytes = [subject, reply_bytes, head, payload].concat().into_boxed_slice();
        let subject_end = subject.len();
        let reply_end = subject_end + reply_bytes.len();
        let is_well_formed =
            is_head(head) && std::str::from_utf8(subject).is_ok() && std::str::from_utf8(reply_bytes).is_ok();
        let head_end = reply_end + head.len();
        Self { bytes, subject_end, reply_end, head_end, has_reply: reply.is_some(), is_well_formed }
    }

    /// The subject that it was published to; empty if that is not UTF-8.
    pub fn subject(&self) -> &str {
        std::str::from_utf8(&self.bytes[..self.subject_end]).unwrap_or_default()
    }

    /// Its payload.
    pub fn payload(&self) -> &[u8] {
        &self.bytes[self.head_end..]
    }

    /// Its headers: names and values, a name as often as it has values. Of headers that are malformed, those lines
    /// that are none are left out.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &str)> {
        let head = &self.bytes[self.reply_end..self.head_end];
        head_lines(head).skip(1).filter_map(read_header)
    }

    /// Whether subject and headers are as NATS has them. A publisher can write anything: line breaks in a header,
    /// bytes that are not UTF-8.
    pub fn is_well_formed(&self) -> bool {
        self.is_well_formed
    }

    /// Its reply subject, if it has one and that is UTF-8.
    pub(crate) fn reply_subject(&self) -> Option<&str> {
        let reply = &self.bytes[self.subject_end..self.reply_end];
        self.has_reply.then(|| std::str::from_utf8(reply).ok()).flatten()
    }

    /// Whether it can be answered.
    ///
    /// The gateway publishes the answer with its own permissions. An arbitrary reply subject would let the
    /// sender publish where it may not, such as into the validated stream. Only subjects under `prefixes` are
    /// answered, and what a server makes of any on the way from another account (`_R_.…`). The prefix `_INBOX`
    /// includes `_INBOX_x.…`.
    pub fn reply(&self, prefixes: &[String]) -> NatsReplyPolicy {
        if !self.has_reply {
            return NatsReplyPolicy::Unwanted;
        }
        let Some(reply) = self.reply_subject() else { return NatsReplyPolicy::Elsewhere };
        let is_under = |prefix: &String| {
            reply.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.starts_with(['.', '_']))
        };
        match reply.starts_with(SERVICE_REPLY_PREFIX) || prefixes.iter().any(is_under) {
            true => NatsReplyPolicy::Wanted,
            false => NatsReplyPolicy::Elsewhere,
        }
    }

    /// The reply subject, if it may be answered.
    pub(crate) fn wanted_reply(&self, prefixes: &[String]) -> Option<String> {
        let is_wanted = self.reply(prefixes) == NatsReplyPolicy::Wanted;
        is_wanted.then(|| self.reply_subject().map(str::to_owned)).flatten()
    }

    /// Its approximate size in memory, in bytes.
    pub(crate) fn weight(&self) -> usize {
        size_of::<Self>() + self.bytes.len()
    }
}

/// The lines of headers, without their ends.
fn head_lines(head: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = head;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = memmem::find(rest, b"\r\n");
        let (line, next) = end.map_or((rest, &[][..]), |end| (&rest[..end], &rest[end + 2..]));
        rest = next;
        Some(line)
    })
}

/// Reads one header; `None` if the line is none.
fn read_header(line: &[u8]) -> Option<(&str, &str)> {
    let line = std::str::from_utf8(line).ok()?;
    let (name, value) = line.split_once(':')?;
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic());
    let is_value = !value.contains(['\r', '\n']);
    (is_name && is_value).then(|| (name, value.trim()))
}

/// Whether these are headers of NATS, or none.
fn is_head(head: &[u8]) -> bool {
    let mut lines = head_lines(head);
    match lines.next() {
        None => true,
        Some(version) => {
            version.starts_with(HEAD_VERSION.as_bytes())
                && !version.contains(&b'\r')
                && !version.contains(&b'\n')
                && lines.all(|line| line.is_empty() || read_header(line).is_some())
        }
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

/// Memory that the waiting messages of one lane are counted against, for as long as it exists.
pub trait LaneMemory: Send {
    /// Counts `bytes`, more or fewer than before. `false` if there is no room for so many: nothing changes then.
    fn try_hold(&mut self, bytes: usize) -> bool;
}

/// What there is no room in for a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParcelOverflow {
    /// What may wait, of its lane or of all.
    Waiting,
    /// The memory that its lane is counted against.
    Memory {
        /// How many bytes it takes.
        bytes: usize,
    },
}

/// Admits messages.
pub trait Inlet: Send + Sync + 'static {
    /// The lane of a message: a number of its sender's own. Messages of one lane keep their order, and a lane in which
    /// many wait delays no other.
    fn lane(&self, parcel: &Parcel) -> u64;

    /// What has to be found out about the sender of a message before that is handed over, if anything. Its lane waits
    /// for it.
    fn introduction(&self, parcel: &Parcel) -> Option<BoxFuture<'static, ()>> {
        let _ = parcel;
        None
    }

    /// Takes messages in the order of their arrival. It returns when their order is fixed, so that the next
    /// batch follows them; the returned future gives the verdicts later.
    fn deliver(&self, parcels: Vec<Parcel>) -> impl Future<Output = InletVerdicts> + Send;

    /// What the waiting messages of this one's lane are counted against, if anything: asked when the first begins to wait.
    fn memory(&self, parcel: &Parcel) -> Option<Box<dyn LaneMemory>> {
        let _ = parcel;
        None
    }

    /// The verdict on a message for which there is no room: NATS has no way to make a publisher wait.
    fn overflow(&self, parcel: &Parcel, full: ParcelOverflow) -> InletVerdict;
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

    /// The answers to a batch, as they go over the wire. Senders without a reply subject get none.
    pub(crate) fn write_all(&self, verdicts: Vec<InletVerdict>, replies: Vec<Option<String>>) -> Bytes {
        let mut wire = BytesMut::new();
        for (verdict, reply) in verdicts.into_iter().zip(replies) {
            if let Some(reply) = reply {
                self.write(&mut wire, &reply, verdict);
            }
        }
        wire.freeze()
    }

    /// Writes one answer: PUB, or HPUB with headers.
    fn write(&self, wire: &mut BytesMut, reply: &str, verdict: InletVerdict) {
        match verdict {
            InletVerdict::Stored { seq, duplicate } => {
                let body = format!("{}{seq},\"duplicate\":{duplicate}}}", self.stored);
                put_text(wire, format_args!("PUB {reply} {}\r\n{body}\r\n", body.len()));
            }
            InletVerdict::Refused(refused) => {
                let InletRefusal { code, text, body, retry_after } = *refused;
                // A line break would end the header.
                let text: String = text.chars().filter(|c| !c.is_control()).collect();
                let mut head = format!(
                    "{HEAD_VERSION}\r\nNats-Service-Error: {text}\r\nNats-Service-Error-Code: {code}\r\n\
                     Content-Type: application/json\r\n"
                );
                if let Some(after) = retry_after {
                    // Whole seconds, rounded up and never 0: 0 would invite an immediate retry.
                    let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
                    head.push_str(&format!("Retry-After: {}\r\n", seconds.max(1)));
                }
                head.push_str("\r\n");
                put_text(
                    wire,
                    format_args!("HPUB {reply} {} {}\r\n{head}", head.len(), head.len() + body.len()),
                );
                wire.put_slice(&body);
                wire.put_slice(b"\r\n");
            }
        }
    }
}

/// Appends a text.
fn put_text(wire: &mut BytesMut, text: std::fmt::Arguments<'_>) {
    // `BytesMut` grows: this cannot fail.
    let _ = wire.write_fmt(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parcel(reply: Option<&str>) -> Parcel {
        let head = b"NATS/1.0\r\nX: 1\r\nX:2 \r\n\r\n";
        Parcel::new(b"ingest.press-4.temp", reply.map(str::as_bytes), head, b"21.5")
    }

    fn answer(verdict: InletVerdict) -> String {
        let wire = InletAnswerWriter::for_stream("headgate")
            .write_all(vec![verdict], vec![Some("_INBOX.1".to_owned())]);
        String::from_utf8(wire.to_vec()).expect("text")
    }

    #[test]
    fn a_yes_is_what_jetstream_says() {
        let wire = answer(InletVerdict::Stored { seq: 7, duplicate: true });
        let (line, body) = wire.split_once("\r\n").expect("a line");
        let body = body.strip_suffix("\r\n").expect("its end");
        assert_eq!(line, format!("PUB _INBOX.1 {}", body.len()));
        let ack: async_nats::jetstream::publish::PublishAck =
            serde_json::from_slice(body.as_bytes()).expect("as a client reads it");
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
        let wire = answer(InletVerdict::Refused(Box::new(refused)));
        let (line, rest) = wire.split_once("\r\n").expect("a line");
        let (head, body) = rest.split_at(rest.len() - 4);
        assert_eq!(line, format!("HPUB _INBOX.1 {} {}", head.len(), head.len() + 2));
        assert_eq!(body, "{}\r\n");
        assert_eq!(
            head,
            "NATS/1.0\r\nNats-Service-Error: too manyX: y\r\nNats-Service-Error-Code: 429\r\n\
             Content-Type: application/json\r\nRetry-After: 2\r\n\r\n"
        );
    }

    #[test]
    fn an_answer_goes_under_a_configured_prefix_and_nowhere_else() {
        let prefixes = ["_INBOX".to_owned(), "my.app".to_owned()];
        for (reply, answered) in [
            (None, NatsReplyPolicy::Unwanted),
            (Some("_INBOX.abc.1"), NatsReplyPolicy::Wanted),
            (Some("_INBOX_0123456789ab.1"), NatsReplyPolicy::Wanted),
            (Some("_R_.abc.1"), NatsReplyPolicy::Wanted),
            (Some("my.app.1"), NatsReplyPolicy::Wanted),
            (Some("_INBOX"), NatsReplyPolicy::Elsewhere),
            (Some("_INBOXES.1"), NatsReplyPolicy::Elsewhere),
            (Some("_mine.1"), NatsReplyPolicy::Elsewhere),
            (Some("my.apple.1"), NatsReplyPolicy::Elsewhere),
            (Some("stream.press-4.temp"), NatsReplyPolicy::Elsewhere),
            (Some("$KV.headgate-registry.key"), NatsReplyPolicy::Elsewhere),
            (Some("$JS.ACK._.hash.headgate.c.1.2.3.4.5"), NatsReplyPolicy::Elsewhere),
            (Some("ingest.press-4.temp"), NatsReplyPolicy::Elsewhere),
        ] {
            let parcel = parcel(reply);
            assert_eq!(parcel.reply(&prefixes), answered, "{reply:?}");
            let wanted = (answered == NatsReplyPolicy::Wanted).then_some(reply).flatten();
            assert_eq!(parcel.wanted_reply(&prefixes).as_deref(), wanted, "{reply:?}");
        }
        assert_eq!(
            Parcel::new(b"a", Some(b"_INBOX.\xff"), b"", b"").reply(&prefixes),
            NatsReplyPolicy::Elsewhere
        );
    }

    #[test]
    fn a_header_is_there_as_often_as_it_has_values() {
        let parcel = parcel(None);
        assert!(parcel.is_well_formed());
        assert_eq!(parcel.headers().collect::<Vec<_>>(), [("X", "1"), ("X", "2")]);
        assert_eq!(parcel.payload(), b"21.5");
    }

    #[test]
    fn malformed_headers_are_told_and_hide_no_others() {
        for bad in [
            &b"A: b\rc"[..],
            b"A: b\nNats-Request-Info: {}",
            b"no colon",
            b"A: \xff",
            b": no name",
            b"a b: c",
            b" folded: x",
        ] {
            let head = [&b"NATS/1.0\r\nX: 1\r\n"[..], bad, b"\r\nY: 2\r\n\r\n"].concat();
            let parcel = Parcel::new(b"a", None, &head, b"");
            assert!(!parcel.is_well_formed(), "{}", String::from_utf8_lossy(bad));
            assert_eq!(parcel.headers().collect::<Vec<_>>(), [("X", "1"), ("Y", "2")]);
        }
        for head in [&b"HTTP/1.1\r\n\r\n"[..], b"\r\n", b"NATS/1.0\r503\r\n\r\n", b"\xff"] {
            assert!(
                !Parcel::new(b"a", None, head, b"").is_well_formed(),
                "{}",
                String::from_utf8_lossy(head)
            );
        }
        assert!(Parcel::new(b"a", None, b"NATS/1.0\r\n\r\n", b"").is_well_formed());
        assert!(!Parcel::new(b"\xff", None, b"", b"").is_well_formed());
    }
}
