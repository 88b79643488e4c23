//! A shared place in a stream: each of its messages goes to one of those who take from it, and to another
//! if that one does not say that it has dealt with it. JetStream keeps the place, as a durable pull
//! consumer; who takes from it may be anywhere.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, FromConsumer, Info as ConsumerInfo, pull};
use async_nats::jetstream::context::ConsumerInfoErrorKind;
use async_nats::jetstream::stream::ConsumerCreateStrictErrorKind;
use async_nats::{Message, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use tokio::time::{Instant, timeout, timeout_at};

use super::follower::places;
use super::{Sequence, Stored, Stream, StreamError};
use crate::connection::Nats;

/// How long JetStream lets one who takes wait for messages, before he has to ask again.
const WAIT: Duration = Duration::from_secs(20);
/// How often it says meanwhile that it is there.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// The silence after which it counts as gone.
const SILENCE_MAX: Duration = Duration::from_millis(3_200);
/// How long it may take until JetStream knows that somebody takes no more.
const REST_MAX: Duration = Duration::from_millis(500);
/// Messages that are given out and not dealt with, of one place; then nobody is given any.
const OUTSTANDING_MAX: i64 = 1_000_000;
/// How many may wait for messages of one place; one more is told to come again.
const WAITING_MAX: i64 = 65_536;
/// Where in the metadata of a place's consumer it stands how many messages were removed before anybody took
/// them, and below which sequence.
const SKIPPED: &str = "headgate-skipped";

/// Where a shared place is.
#[derive(Debug, Clone)]
pub struct SharedSettings {
    /// Its name: letters, digits, `-`.
    pub name: String,
    /// The subjects of its messages, with wildcards; no two of them match the same.
    pub subjects: Vec<String>,
    /// Where it begins, if it is not there yet.
    pub from: Sequence,
    /// After how long a message that was not dealt with goes to another.
    pub redelivered_after: Duration,
    /// How long it stays while nobody takes from it; `None`: for ever. What it has already is not made less.
    pub kept: Option<Duration>,
}

/// A shared place that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedPlace {
    /// It was not there before.
    pub is_new: bool,
    /// How many messages were removed before anybody took them, and nobody was told of yet.
    pub skipped: u64,
}

/// Messages that were asked for, as they come.
#[derive(Debug)]
pub struct Taking {
    nats: Nats,
    messages: Subscriber,
    left: usize,
    until: Instant,
    /// When JetStream was heard last.
    heard_at: Instant,
}

/// One of them.
#[derive(Debug)]
pub struct Taken {
    /// What it is.
    pub stored: Stored,
    /// What is to be said of it.
    pub receipt: Receipt,
}

/// What JetStream waits to be told of a message that it has given out. Without it, the message goes to
/// another after a while.
#[derive(Debug)]
pub struct Receipt {
    nats: Nats,
    reply: Subject,
}

impl Stream {
    /// Makes a shared place, or finds it: then where it is counts, and not `from`.
    ///
    /// # Errors
    /// [`StreamError::Away`]; [`StreamError::Refused`] for subjects that JetStream does not take.
    pub async fn share(&self, settings: &SharedSettings) -> Result<SharedPlace, StreamError> {
        let name = &settings.name;
        loop {
            match self.answered(self.handle.consumer_info(name)).await? {
                Ok(info) => {
                    let skipped = Skipped::of(&info).map_or(0, |skipped| skipped.messages);
                    let is = info.config.inactive_threshold;
                    let wanted = settings.kept.unwrap_or_default();
                    if !is.is_zero() && (wanted.is_zero() || wanted > is) {
                        self.change(info, |config| config.inactive_threshold = wanted).await?;
                    }
                    return Ok(SharedPlace { is_new: false, skipped });
                }
                Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => {}
                Err(error) => return Err(self.away(&error)),
            }
            let from = settings.from.max(1);
            let config = pull::Config {
                durable_name: Some(name.clone()),
                filter_subjects: settings.subjects.clone(),
                deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: from },
                ack_policy: AckPolicy::Explicit,
                ack_wait: settings.redelivered_after,
                max_ack_pending: OUTSTANDING_MAX,
                max_waiting: WAITING_MAX,
                inactive_threshold: settings.kept.unwrap_or_default(),
                metadata: Skipped::default().into_metadata(),
                ..pull::Config::default()
            };
            match self.answered(self.handle.create_consumer_strict(config)).await? {
                Ok(info) => {
                    let below = self.state().await?.first;
                    let skipped = below.saturating_sub(from);
                    if skipped > 0 {
                        let noted = Skipped { messages: skipped, below };
                        self.change(info.cached_info().clone(), |config| {
                            config.metadata.extend(noted.into_metadata())
                        })
                        .await?;
                    }
                    return Ok(SharedPlace { is_new: true, skipped });
                }
                // Somebody else has made it meanwhile.
                Err(error) if error.kind() == ConsumerCreateStrictErrorKind::AlreadyExists => {}
                Err(error) => match error.kind() {
                    ConsumerCreateStrictErrorKind::JetStream(of) => {
                        return Err(super::of_server(format!("stream {}: {error}", self.name), &of));
                    }
                    _ => return Err(self.away(&error)),
                },
            }
        }
    }

    /// Gives up a shared place, if nobody takes from it.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn give_up_shared(&self, name: &str) -> Result<(), StreamError> {
        let info = match self.answered(self.handle.consumer_info(name)).await? {
            Ok(info) => info,
            Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(self.away(&error)),
        };
        if info.num_waiting == 0 {
            let deleted = self.answered(self.handle.delete_consumer(name)).await?;
            deleted.map_err(|error| self.away(&error))?;
        }
        Ok(())
    }

    /// Says that somebody was told of what was removed. Returns how many that were: whoever says so a second
    /// time gets 0.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn told_of_skipped(&self, name: &str) -> Result<u64, StreamError> {
        let info = match self.answered(self.handle.consumer_info(name)).await? {
            Ok(info) => info,
            Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(self.away(&error)),
        };
        let Some(Skipped { messages: messages @ 1.., below }) = Skipped::of(&info) else { return Ok(0) };
        let told = Skipped { messages: 0, below };
        self.change(info, |config| config.metadata.extend(told.into_metadata())).await?;
        Ok(messages)
    }

    /// Before the messages below a sequence are removed: notes with each shared place how many of them nobody
    /// has taken from it, for whoever takes next. Counted are all messages, once there is one for the place.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn note_skipped(&self, below: Sequence) -> Result<(), StreamError> {
        let mut consumers = self.handle.consumers();
        while let Some(info) = self.answered(consumers.next()).await? {
            let info = info.map_err(|error| self.away(&error))?;
            // Others, which whoever uses NATS may have made, are left alone.
            let Some(noted) = Skipped::of(&info).filter(|_| info.num_pending > 0) else { continue };
            let next = noted.below.max(info.delivered.stream_sequence + 1);
            let mut first = below;
            for subject in std::iter::once(&info.config.filter_subject).chain(&info.config.filter_subjects) {
                if next < below && !subject.is_empty() {
                    let request = serde_json::json!({ "seq": next, "next_by_subj": subject, "batch": 1 });
                    let found = self.direct(request, 1).await?;
                    first = found.first().map_or(first, |message| first.min(message.sequence));
                }
            }
            let messages = (below - first).min(info.num_pending);
            if messages > 0 {
                let noted = Skipped { messages: noted.messages + messages, below };
                self.change(info, |config| config.metadata.extend(noted.into_metadata())).await?;
            }
        }
        Ok(())
    }

    async fn change(
        &self,
        info: ConsumerInfo,
        change: impl FnOnce(&mut pull::Config),
    ) -> Result<(), StreamError> {
        let config = pull::Config::try_from_consumer_config(info.config);
        let mut config = config.map_err(|error| StreamError::Refused(error.to_string()))?;
        change(&mut config);
        let changed = self.answered(self.handle.update_consumer(config)).await?;
        changed.map_err(|error| self.away(&error))?;
        Ok(())
    }

    /// Asks a shared place for up to `max` messages.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn take(&self, name: &str, max: usize) -> Result<Taking, StreamError> {
        if let Some(trouble) = self.nats.trouble() {
            return Err(StreamError::Away(trouble));
        }
        let client = self.nats.client();
        let inbox = client.new_inbox();
        let messages = client.subscribe(inbox.clone()).await.map_err(|error| self.away(&error))?;
        let nanos = |of: Duration| u64::try_from(of.as_nanos()).unwrap_or(u64::MAX);
        let request = serde_json::json!({
            "batch": max, "expires": nanos(WAIT), "idle_heartbeat": nanos(HEARTBEAT),
        });
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{name}", self.name);
        let asked = client.publish_with_reply(subject, inbox, request.to_string().into());
        self.answered(asked).await?.map_err(|error| self.away(&error))?;
        let heard_at = Instant::now();
        let until = heard_at + WAIT + SILENCE_MAX;
        Ok(Taking { nats: self.nats.clone(), messages, left: max, until, heard_at })
    }
}

/// What was removed before anybody took it, in the metadata of a place's consumer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Skipped {
    /// How many, of which nobody was told.
    messages: u64,
    /// Below this they are counted.
    below: Sequence,
}

impl Skipped {
    fn of(info: &ConsumerInfo) -> Option<Self> {
        let (messages, below) = info.config.metadata.get(SKIPPED)?.split_once(' ')?;
        Some(Self { messages: messages.parse().ok()?, below: below.parse().ok()? })
    }

    fn into_metadata(self) -> HashMap<String, String> {
        HashMap::from([(SKIPPED.to_owned(), format!("{} {}", self.messages, self.below))])
    }
}

impl Taking {
    /// The next message, when there is one; `None` when no more come, and it is to be asked again. May be
    /// dropped and called again.
    pub async fn next(&mut self) -> Option<Taken> {
        while self.left > 0 {
            let silent = self.until.min(self.heard_at + SILENCE_MAX);
            let message = timeout_at(silent, self.messages.next()).await.ok()??;
            self.heard_at = Instant::now();
            match message.status {
                Some(StatusCode::IDLE_HEARTBEAT) => {}
                // That was all for now, or there is no such place any more: who asks again is told.
                Some(_) => return None,
                None => {
                    self.left -= 1;
                    if let Some(taken) = self.taken(message) {
                        return Some(taken);
                    }
                }
            }
        }
        None
    }

    /// Whether all that were asked for have come.
    pub fn is_full(&self) -> bool {
        self.left == 0
    }

    /// Takes no more, which JetStream knows when this returns. What it sent a moment before and did not arrive
    /// goes to others after a while; returned is what did.
    pub async fn end(mut self) -> Vec<Receipt> {
        let mut rest = Vec::new();
        while let Some(Some(message)) = self.messages.next().now_or_never() {
            rest.extend(self.taken(message).map(|taken| taken.receipt));
        }
        let client = self.nats.client().clone();
        let ended = async {
            if self.messages.unsubscribe().await.is_ok() {
                let _ = client.flush().await;
            }
        };
        let _ = timeout(REST_MAX, ended).await;
        while let Some(Some(message)) = self.messages.next().now_or_never() {
            rest.extend(self.taken(message).map(|taken| taken.receipt));
        }
        rest
    }

    /// `None` if it is no message of the stream.
    fn taken(&self, message: Message) -> Option<Taken> {
        let Message { subject, payload, headers, reply, .. } = message;
        let reply = reply?;
        let (sequence, _) = places(&reply)?;
        let stored = Stored { sequence, subject, headers: headers.unwrap_or_default(), payload };
        Some(Taken { stored, receipt: Receipt { nats: self.nats.clone(), reply } })
    }
}

impl Receipt {
    /// The message is dealt with.
    pub async fn done(self) {
        self.say(b"+ACK").await;
    }

    /// It is not going to be: it goes to another at once.
    pub async fn pass_on(self) {
        self.say(b"-NAK").await;
    }

    /// It is being dealt with, which takes its time.
    pub async fn keep(&self) {
        self.say(b"+WPI").await;
    }

    async fn say(&self, what: &'static [u8]) {
        // If it cannot be sent, the message goes to another in a while.
        let _ = self.nats.client().publish(self.reply.clone(), Bytes::from_static(what)).await;
    }
}
