//! An outlet: a JetStream stream to which one writer sends messages, in order, each once.
//!
//! The stream itself is the writer's cursor. [`Outlet::open`] returns its last message, so that the writer
//! can continue after it. Every message names the sequence that it follows (`Nats-Expected-Last-Sequence`).
//! If a message is lost, JetStream refuses all messages after it; if one is sent again, it refuses the
//! second copy. So there are no holes, duplicates or reorderings, whatever is lost, killed, or elected
//! leader. After any error the outlet is closed. The writer opens it again and learns how far it got.
//!
//! A message is stored only after all messages before it, so one answer confirms all of them. Most messages
//! ask for no answer, which saves work on both sides. The first one after opening always does, and the writer
//! waits for it alone, so that a refusal by the server concerns that very message.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::client::PublishErrorKind;
use async_nats::jetstream::context::{ContextBuilder, GetStreamErrorKind};
use async_nats::jetstream::stream::{
    Config, DiscardPolicy, LastRawMessageErrorKind, RetentionPolicy, StorageType, Stream,
};
use async_nats::jetstream::{Context, ErrorCode};
use async_nats::{HeaderMap, HeaderName, StatusCode, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use serde::Deserialize;

use crate::connection::Nats;

/// How long opening waits for a connection, and how often it checks.
const OUTLET_CONNECT_WAIT_MAX: Duration = Duration::from_millis(500);
const OUTLET_CONNECT_POLL_INTERVAL: Duration = Duration::from_millis(10);
/// How long an answer may take before it counts as lost.
const OUTLET_ANSWER_WAIT_MAX: Duration = Duration::from_secs(5);
/// How often a wait for an answer checks that the connection is still the same.
const OUTLET_CONNECTION_CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// The most messages under way, and the most bytes. A server drops messages that a stream has not taken yet
/// when they are more than 10,000 or 128 MiB.
const OUTLET_WINDOW_MAX: (usize, usize) = (4096, 8 << 20);
/// How many messages of a full window ask for an answer.
const ANSWERS_PER_WINDOW: usize = 4;
/// Bytes that count toward the server's message limit beside payload and headers: the first and last line of
/// the headers, and the expected sequence that is added to them.
const HEADERS_EXTRA_BYTES: usize = 80;

const EXPECTED_LAST_SEQUENCE: HeaderName = HeaderName::from_static("Nats-Expected-Last-Sequence");

/// What a stream is to be like.
#[derive(Debug, Clone)]
pub struct OutletStreamSettings {
    /// Its name in JetStream.
    pub name: String,
    /// The subjects that it stores.
    pub subjects: Vec<String>,
    /// How many servers hold each message.
    pub replicas: usize,
    /// Its maximum size on each server, in bytes, if it is created here; beyond that the oldest messages go.
    pub bytes_max: u64,
    /// How long it remembers a `Nats-Msg-Id`, if it is created here.
    pub duplicate_window: Duration,
}

/// A message of a stream.
#[derive(Debug, Clone)]
pub struct OutletMessage {
    /// The subject under which it is stored.
    pub subject: String,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its payload.
    pub payload: Bytes,
}

/// How far a stream is.
#[derive(Debug, Clone)]
pub struct OutletPosition {
    /// The sequence of the newest message ever stored; 0 if there was none.
    pub sequence: u64,
    /// The newest message that exists, with its sequence. That may be lower: newer messages may have been
    /// deleted.
    pub message: Option<(u64, OutletMessage)>,
}

/// Why a message was not sent or the stream not opened.
#[derive(Debug, thiserror::Error)]
pub enum OutletError {
    /// NATS is away.
    #[error("{0}")]
    Away(String),
    /// An existing stream has another configuration, which may be intended by its owner.
    #[error("the stream {stream} is configured differently: {detail}; it is left as it is")]
    Differs {
        /// Which.
        stream: String,
        /// What differs.
        detail: String,
    },
    /// The stream cannot be created or read.
    #[error("the stream {stream}: {detail}")]
    Stream {
        /// Which.
        stream: String,
        /// What JetStream says.
        detail: String,
    },
    /// The message is over the server's size limit. The outlet stays open.
    #[error("a message of {bytes} bytes is larger than the server takes ({bytes_max})")]
    TooLarge {
        /// The size of its payload and headers.
        bytes: usize,
        /// The server's `max_payload`.
        bytes_max: usize,
    },
    /// JetStream did not store a message.
    #[error("the stream {stream} refuses a message to follow sequence {behind}: {detail}")]
    Refused {
        /// Which.
        stream: String,
        /// The sequence that it was to follow.
        behind: u64,
        /// What JetStream says.
        detail: String,
    },
    /// The connection was lost, or no answer came.
    #[error("no answer from the stream {stream}: {detail}")]
    Silent {
        /// Which.
        stream: String,
        /// What has happened.
        detail: &'static str,
    },
    /// It was not opened, or an earlier error closed it.
    #[error("the stream is not open")]
    Closed,
}

/// A stream to send to.
pub struct Outlet {
    nats: Nats,
    context: Context,
    settings: OutletStreamSettings,
    flow: Option<OutletFlow>,
}

/// The messages under way on an open outlet.
struct OutletFlow {
    /// Answers arrive on this subject, followed by the sequence of the message.
    inbox: String,
    answers: Subscriber,
    /// The client's connect count at opening: another value means a reconnect.
    connection: u64,
    /// The last message given, held back: whether it asks for an answer depends on the next one.
    last: Option<OutletMessage>,
    /// The sequences of the last message given, the last one sent, and the last one known to be stored.
    given: u64,
    sent: u64,
    stored: u64,
    /// The messages whose answer is outstanding: their sequence, and the bytes sent up to it.
    asked: VecDeque<(u64, usize)>,
    /// Messages and bytes sent since the last one that asked for an answer.
    unasked: (usize, usize),
    /// Messages that may be under way: 1 at first, doubled by each answer.
    window: usize,
}

/// JetStream's answer to a message.
#[derive(Deserialize)]
struct OutletAnswer {
    #[serde(default)]
    stream: String,
    #[serde(default)]
    seq: u64,
    error: Option<async_nats::jetstream::Error>,
}

impl OutletMessage {
    /// An upper bound of the size that the server compares with its limit, in bytes.
    fn bytes(&self) -> usize {
        let headers = self.headers.iter().flat_map(|(name, values)| {
            values.iter().map(|value| AsRef::<str>::as_ref(name).len() + value.as_str().len() + 4)
        });
        headers.sum::<usize>() + HEADERS_EXTRA_BYTES + self.payload.len()
    }
}

impl Outlet {
    /// Makes a closed outlet; the stream need not exist yet. Must be called in a tokio runtime.
    pub fn new(nats: Nats, settings: OutletStreamSettings) -> Self {
        let context = ContextBuilder::new().timeout(OUTLET_ANSWER_WAIT_MAX).build(nats.client().clone());
        Self { nats, context, settings, flow: None }
    }

    /// Creates the stream if there is none, and says how far it is. The next message follows that. Messages
    /// that were under way before may still be stored, once.
    ///
    /// # Errors
    /// [`OutletError::Away`], [`OutletError::Differs`], [`OutletError::Stream`].
    pub async fn open(&mut self) -> Result<OutletPosition, OutletError> {
        self.flow = None;
        let begun = tokio::time::Instant::now();
        while let Some(trouble) = self.nats.trouble() {
            if begun.elapsed() >= OUTLET_CONNECT_WAIT_MAX {
                return Err(OutletError::Away(trouble));
            }
            tokio::time::sleep(OUTLET_CONNECT_POLL_INTERVAL).await;
        }
        let client = self.nats.client();
        let connection = client.statistics().connects.load(Ordering::Acquire);
        let inbox = client.new_inbox();
        let answers = client.subscribe(format!("{inbox}.*")).await;
        let answers = answers.map_err(|error| self.stream_error(&error))?;
        let (stream, sequence, messages) = self.ensure().await?;
        let message = if messages == 0 { None } else { self.newest(&stream, sequence).await? };
        self.flow = Some(OutletFlow {
            inbox,
            answers,
            connection,
            last: None,
            given: sequence,
            sent: sequence,
            stored: sequence,
            asked: VecDeque::new(),
            unasked: (0, 0),
            window: 1,
        });
        Ok(OutletPosition { sequence, message })
    }

    /// The stream, its last sequence, and how many messages it has.
    async fn ensure(&self) -> Result<(Stream, u64, u64), OutletError> {
        let name = &self.settings.name;
        let stream = match self.context.get_stream(name).await {
            Ok(stream) => stream,
            Err(error) => {
                let absent = matches!(
                    error.kind(),
                    GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND
                );
                if !absent {
                    return Err(self.stream_error(&error));
                }
                let made = self.context.create_stream(self.config()).await;
                made.map_err(|error| self.stream_error(&error))?
            }
        };
        let info = stream.cached_info();
        let differs = self.difference(&info.config);
        if !differs.is_empty() {
            return Err(OutletError::Differs { stream: name.clone(), detail: differs.join(", ") });
        }
        let (sequence, messages) = (info.state.last_sequence, info.state.messages);
        Ok((stream, sequence, messages))
    }

    /// The configuration of a new stream.
    fn config(&self) -> Config {
        let OutletStreamSettings { name, subjects, replicas, bytes_max, duplicate_window } =
            self.settings.clone();
        Config {
            name,
            subjects,
            num_replicas: replicas,
            max_bytes: i64::try_from(bytes_max).unwrap_or(i64::MAX),
            duplicate_window,
            retention: RetentionPolicy::Limits,
            storage: StorageType::File,
            discard: DiscardPolicy::Old,
            allow_direct: true,
            ..Config::default()
        }
    }

    /// What makes an existing stream unusable here. Its limits and its placement are up to its owner.
    fn difference(&self, config: &Config) -> Vec<String> {
        let OutletStreamSettings { subjects, replicas, .. } = &self.settings;
        let mut differs = Vec::new();
        let (mut have, mut want) = (config.subjects.clone(), subjects.clone());
        have.sort();
        want.sort();
        if have != want {
            differs.push(format!("its subjects are {have:?} and not {want:?}"));
        }
        if config.num_replicas < *replicas {
            differs.push(format!("it has {} replicas and not {replicas}", config.num_replicas));
        }
        for (as_it_is_to_be, what) in [
            (config.storage == StorageType::File, "it is not in files"),
            (config.retention == RetentionPolicy::Limits, "its retention is not by limits"),
            (config.mirror.is_none() && config.sources.is_none(), "it copies another stream"),
            (config.subject_transform.is_none(), "it changes subjects"),
            (!config.no_ack, "it does not acknowledge"),
            (!config.sealed, "it is sealed"),
        ] {
            if !as_it_is_to_be {
                differs.push(what.to_owned());
            }
        }
        differs
    }

    /// The newest message, from the leader: other servers may be behind.
    async fn newest(
        &self,
        stream: &Stream,
        sequence: u64,
    ) -> Result<Option<(u64, OutletMessage)>, OutletError> {
        let found = match stream.get_raw_message(sequence).await {
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => {
                stream.get_last_raw_message_by_subject(">").await
            }
            found => found,
        };
        match found {
            Ok(found) => {
                let (sequence, subject) = (found.sequence, found.subject.to_string());
                let message = OutletMessage { subject, headers: found.headers, payload: found.payload };
                Ok(Some((sequence, message)))
            }
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(self.stream_error(&error)),
        }
    }

    /// Sends a message after all those before it, and returns the sequence that it will have. Waits while too
    /// much is under way. The last message may stay here until [`Outlet::settle`].
    ///
    /// # Errors
    /// [`OutletError::TooLarge`], and then the message is left out. All others close the outlet:
    /// [`OutletError::Refused`], [`OutletError::Silent`], [`OutletError::Closed`].
    pub async fn send(&mut self, message: OutletMessage) -> Result<u64, OutletError> {
        let (bytes, bytes_max) = (message.bytes(), self.nats.client().max_payload());
        if bytes > bytes_max {
            return Err(OutletError::TooLarge { bytes, bytes_max });
        }
        let flow = self.flow.as_mut().ok_or(OutletError::Closed)?;
        flow.given += 1;
        let given = flow.given;
        if let Some(before) = flow.last.replace(message) {
            let sent = self.push(before, false).await;
            self.close_on_error(sent)?;
        }
        Ok(given)
    }

    /// Waits until everything that was given is stored.
    ///
    /// # Errors
    /// As [`Outlet::send`].
    pub async fn settle(&mut self) -> Result<(), OutletError> {
        let settled = self.push_and_wait().await;
        self.close_on_error(settled)
    }

    /// Checks that NATS is connected. The client would send a message given while NATS is away after the
    /// reconnect, when it may be stale.
    ///
    /// # Errors
    /// [`OutletError::Away`], which closes the outlet.
    pub fn check(&mut self) -> Result<(), OutletError> {
        let away = self.nats.trouble().map_or(Ok(()), |trouble| Err(OutletError::Away(trouble)));
        self.close_on_error(away)
    }

    /// The sequence up to which everything is known to be stored.
    pub fn stored(&self) -> u64 {
        self.flow.as_ref().map_or(0, |flow| flow.stored)
    }

    fn close_on_error<T>(&mut self, result: Result<T, OutletError>) -> Result<T, OutletError> {
        if result.is_err() {
            self.flow = None;
        }
        result
    }

    async fn push_and_wait(&mut self) -> Result<(), OutletError> {
        let last = self.flow.as_mut().ok_or(OutletError::Closed)?.last.take();
        if let Some(last) = last {
            self.push(last, true).await?;
        }
        while self.flow.as_ref().is_some_and(|flow| flow.stored < flow.given) {
            self.await_answer().await?;
        }
        Ok(())
    }

    /// Hands a message to the connection, and waits for answers while there is no room for the next one.
    async fn push(&mut self, mut message: OutletMessage, ask: bool) -> Result<(), OutletError> {
        let flow = self.flow.as_mut().ok_or(OutletError::Closed)?;
        let bytes = message.bytes();
        message.headers.insert(EXPECTED_LAST_SEQUENCE, flow.sent.to_string());
        flow.sent += 1;
        flow.unasked.0 += 1;
        flow.unasked.1 += bytes;
        let ask = ask
            || flow.unasked.0 >= flow.window.div_ceil(ANSWERS_PER_WINDOW)
            || flow.unasked.1 >= OUTLET_WINDOW_MAX.1 / ANSWERS_PER_WINDOW;
        let client = self.nats.client();
        let OutletMessage { subject, headers, payload } = message;
        let published = if ask {
            flow.asked.push_back((flow.sent, flow.unasked.1));
            flow.unasked = (0, 0);
            let reply = format!("{}.{}", flow.inbox, flow.sent);
            let publish = client.publish_with_reply_and_headers(subject, reply, headers, payload);
            tokio::time::timeout(OUTLET_ANSWER_WAIT_MAX, publish).await
        } else {
            let publish = client.publish_with_headers(subject, headers, payload);
            tokio::time::timeout(OUTLET_ANSWER_WAIT_MAX, publish).await
        };
        match published {
            Ok(Ok(())) => {}
            Ok(Err(error)) if error.kind() == PublishErrorKind::Send => {
                return Err(self.silent_error(CONNECTION_LOST_DETAIL));
            }
            Ok(Err(error)) => return Err(self.stream_error(&error)),
            Err(_) => return Err(self.silent_error("the connection takes nothing more")),
        }
        while self.is_full() {
            self.await_answer().await?;
        }
        // Answers that have arrived meanwhile make room without a wait.
        while ask && let Some(answer) = self.try_next_answer() {
            self.note_answer(&answer)?;
        }
        Ok(())
    }

    /// Whether the next message has to wait for an answer.
    fn is_full(&self) -> bool {
        self.flow.as_ref().is_some_and(|flow| {
            let bytes: usize = flow.asked.iter().map(|(_, bytes)| bytes).sum();
            let messages = usize::try_from(flow.sent - flow.stored).unwrap_or(usize::MAX);
            messages >= flow.window || bytes + flow.unasked.1 >= OUTLET_WINDOW_MAX.1
        })
    }

    /// An answer that has arrived already.
    fn try_next_answer(&mut self) -> Option<async_nats::Message> {
        let flow = self.flow.as_mut()?;
        if flow.asked.is_empty() { None } else { flow.answers.next().now_or_never().flatten() }
    }

    /// Waits for an answer and handles it.
    async fn await_answer(&mut self) -> Result<(), OutletError> {
        let statistics = self.nats.client().statistics();
        let begun = tokio::time::Instant::now();
        loop {
            let away = self.nats.trouble();
            let flow = self.flow.as_mut().ok_or(OutletError::Closed)?;
            match tokio::time::timeout(OUTLET_CONNECTION_CHECK_INTERVAL, flow.answers.next()).await {
                Ok(Some(answer)) => return self.note_answer(&answer),
                Ok(None) => return Err(self.silent_error(CONNECTION_LOST_DETAIL)),
                Err(_) if away.is_some() => return Err(OutletError::Away(away.unwrap_or_default())),
                Err(_) if statistics.connects.load(Ordering::Acquire) != flow.connection => {
                    return Err(self.silent_error(CONNECTION_LOST_DETAIL));
                }
                Err(_) if begun.elapsed() >= OUTLET_ANSWER_WAIT_MAX => {
                    return Err(self.silent_error("none came in time"));
                }
                Err(_) => {}
            }
        }
    }

    fn note_answer(&mut self, answer: &async_nats::Message) -> Result<(), OutletError> {
        let flow = self.flow.as_mut().ok_or(OutletError::Closed)?;
        let asked = answer.subject.rsplit('.').next().and_then(|sequence| sequence.parse().ok());
        let Some((expected, _)) = flow.asked.front().copied().filter(|(front, _)| Some(*front) == asked)
        else {
            // Answers arrive in the order of the messages, so one is missing.
            return Err(self.silent_error("one is missing"));
        };
        let name = &self.settings.name;
        let refused =
            |detail: String| Err(OutletError::Refused { stream: name.clone(), behind: expected - 1, detail });
        if answer.status == Some(StatusCode::NO_RESPONDERS) {
            return refused("there is no stream, or none that has a leader".to_owned());
        }
        match serde_json::from_slice(&answer.payload) {
            Ok(OutletAnswer { error: Some(error), .. }) => refused(error.to_string()),
            Ok(OutletAnswer { stream, seq, .. }) if stream == *name && seq == expected => {
                flow.asked.pop_front();
                flow.stored = expected;
                flow.window = (flow.window * 2).min(OUTLET_WINDOW_MAX.0);
                Ok(())
            }
            Ok(OutletAnswer { stream, seq, .. }) => refused(format!("it is in {stream:?} at sequence {seq}")),
            Err(error) => refused(format!("its answer cannot be read: {error}")),
        }
    }

    fn stream_error(&self, error: &dyn std::error::Error) -> OutletError {
        OutletError::Stream { stream: self.settings.name.clone(), detail: error.to_string() }
    }

    fn silent_error(&self, detail: &'static str) -> OutletError {
        OutletError::Silent { stream: self.settings.name.clone(), detail }
    }
}

const CONNECTION_LOST_DETAIL: &str = "the connection was lost";
