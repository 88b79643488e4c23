//! The flow of an open outlet: messages under way to the stream, and the answers that confirm them.
//!
//! A message is stored only after all messages before it, so one answer confirms all of them. Most messages
//! ask for no answer, which saves work on both sides. The first one after opening always does, and the writer
//! waits for it alone, so that a refusal by the server concerns that very message.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::client::PublishErrorKind;
use async_nats::{Message, header};
use tokio::time::{Instant, timeout};

use super::OutletError;
use crate::stream::{AckInbox, JetstreamStream, OutgoingMessage, PublishAnswer, StreamError, StreamSequence};

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

const CONNECTION_LOST_DETAIL: &str = "the connection was lost";

/// The messages under way on an open outlet.
pub(super) struct OutletFlow {
    stream: JetstreamStream,
    /// The number of a message is its sequence.
    acks: AckInbox,
    /// The client's connect count at opening: another value means a reconnect.
    connection: u64,
    /// The last message given, held back: whether it asks for an answer depends on the next one.
    last: Option<OutgoingMessage>,
    /// The sequences of the last message given, the last one sent, and the last one known to be stored.
    given: StreamSequence,
    sent: StreamSequence,
    stored: StreamSequence,
    /// The messages whose answer is outstanding: their sequence, and the bytes sent up to it.
    asked: VecDeque<(StreamSequence, usize)>,
    /// Messages and bytes sent since the last one that asked for an answer.
    unasked: (usize, usize),
    /// Messages that may be under way: 1 at first, doubled by each answer.
    window: usize,
}

impl OutletFlow {
    /// The stream.
    pub(super) fn stream(&self) -> &JetstreamStream {
        &self.stream
    }

    /// A flow that continues after `sequence`.
    pub(super) fn new(
        stream: JetstreamStream,
        acks: AckInbox,
        connection: u64,
        sequence: StreamSequence,
    ) -> Self {
        Self {
            stream,
            acks,
            connection,
            last: None,
            given: sequence,
            sent: sequence,
            stored: sequence,
            asked: VecDeque::new(),
            unasked: (0, 0),
            window: 1,
        }
    }

    /// The sequence up to which everything is known to be stored.
    pub(super) fn stored(&self) -> StreamSequence {
        self.stored
    }

    /// Takes a message, sends the one before it, and returns the sequence that the message will have.
    pub(super) async fn send(&mut self, message: OutgoingMessage) -> Result<StreamSequence, OutletError> {
        self.given += 1;
        let given = self.given;
        if let Some(before) = self.last.replace(message) {
            self.push(before, false).await?;
        }
        Ok(given)
    }

    /// Sends the last message, and waits until everything is stored.
    pub(super) async fn settle(&mut self) -> Result<(), OutletError> {
        if let Some(last) = self.last.take() {
            self.push(last, true).await?;
        }
        while self.stored < self.given {
            self.await_answer().await?;
        }
        Ok(())
    }

    /// Hands a message to the connection, and waits for answers while there is no room for the next one.
    async fn push(&mut self, mut message: OutgoingMessage, ask: bool) -> Result<(), OutletError> {
        let bytes = message_bytes(&message);
        message.headers.insert(header::NATS_EXPECTED_LAST_SEQUENCE, self.sent.to_string());
        self.sent += 1;
        self.unasked.0 += 1;
        self.unasked.1 += bytes;
        let ask = ask
            || self.unasked.0 >= self.window.div_ceil(ANSWERS_PER_WINDOW)
            || self.unasked.1 >= OUTLET_WINDOW_MAX.1 / ANSWERS_PER_WINDOW;
        let client = self.stream.nats().client();
        let OutgoingMessage { subject, headers, payload } = message;
        let published = if ask {
            self.asked.push_back((self.sent, self.unasked.1));
            self.unasked = (0, 0);
            let reply = self.acks.reply(self.sent);
            let publish = client.publish_with_reply_and_headers(subject, reply, headers, payload);
            timeout(OUTLET_ANSWER_WAIT_MAX, publish).await
        } else {
            timeout(OUTLET_ANSWER_WAIT_MAX, client.publish_with_headers(subject, headers, payload)).await
        };
        match published {
            Ok(Ok(())) => {}
            Ok(Err(error)) if error.kind() == PublishErrorKind::Send => {
                return Err(self.silent_error(CONNECTION_LOST_DETAIL));
            }
            Ok(Err(error)) => {
                let text = format!("stream {}: {error}", self.stream.name());
                return Err(StreamError::Refused(text).into());
            }
            Err(_) => return Err(self.silent_error("the connection takes nothing more")),
        }
        while self.is_full() {
            self.await_answer().await?;
        }
        // Answers that have arrived meanwhile make room without a wait.
        while ask
            && !self.asked.is_empty()
            && let Some(answer) = self.acks.try_next()
        {
            self.note_answer(&answer)?;
        }
        Ok(())
    }

    /// Whether the next message has to wait for an answer.
    fn is_full(&self) -> bool {
        let bytes: usize = self.asked.iter().map(|(_, bytes)| bytes).sum();
        let messages = usize::try_from(self.sent - self.stored).unwrap_or(usize::MAX);
        messages >= self.window || bytes + self.unasked.1 >= OUTLET_WINDOW_MAX.1
    }

    /// Waits for an answer and handles it.
    async fn await_answer(&mut self) -> Result<(), OutletError> {
        let statistics = self.stream.nats().client().statistics();
        let begun = Instant::now();
        loop {
            let away = self.stream.nats().trouble();
            match timeout(OUTLET_CONNECTION_CHECK_INTERVAL, self.acks.next()).await {
                Ok(Some(answer)) => return self.note_answer(&answer),
                Ok(None) => return Err(self.silent_error(CONNECTION_LOST_DETAIL)),
                Err(_) => {}
            }
            if let Some(trouble) = away {
                return Err(StreamError::Away(trouble).into());
            }
            if statistics.connects.load(Ordering::Acquire) != self.connection {
                return Err(self.silent_error(CONNECTION_LOST_DETAIL));
            }
            if begun.elapsed() >= OUTLET_ANSWER_WAIT_MAX {
                return Err(self.silent_error("none came in time"));
            }
        }
    }

    fn note_answer(&mut self, answer: &Message) -> Result<(), OutletError> {
        let number = self.acks.number(answer);
        let Some((expected, _)) = self.asked.front().copied().filter(|(front, _)| Some(*front) == number)
        else {
            // Answers arrive in the order of the messages, so one is missing.
            return Err(self.silent_error("one is missing"));
        };
        let detail = match PublishAnswer::decode(answer) {
            Ok(stored) if stored.stream == self.stream.name() && stored.seq == expected => {
                self.asked.pop_front();
                self.stored = expected;
                self.window = (self.window * 2).min(OUTLET_WINDOW_MAX.0);
                return Ok(());
            }
            Ok(stored) => format!("it is in {:?} at sequence {}", stored.stream, stored.seq),
            Err(error) => error.to_string(),
        };
        Err(OutletError::Refused { stream: self.stream.name().to_owned(), behind: expected - 1, detail })
    }

    fn silent_error(&self, detail: &'static str) -> OutletError {
        OutletError::Silent { stream: self.stream.name().to_owned(), detail }
    }
}

/// An upper bound of the size that the server compares with its limit, in bytes.
pub(super) fn message_bytes(message: &OutgoingMessage) -> usize {
    let headers = message.headers.iter().flat_map(|(name, values)| {
        values.iter().map(|value| AsRef::<str>::as_ref(name).len() + value.as_str().len() + 4)
    });
    headers.sum::<usize>() + HEADERS_EXTRA_BYTES + message.payload.len()
}
