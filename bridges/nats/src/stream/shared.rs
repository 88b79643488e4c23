//! A shared place in a stream: each message goes to one member, and to another one if the first does not
//! confirm it. JetStream keeps the place as a durable pull consumer, so members may be on any node.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, FromConsumer, Info as ConsumerInfo, pull};
use async_nats::jetstream::context::ConsumerInfoErrorKind;
use async_nats::jetstream::stream::ConsumerCreateStrictErrorKind;
use async_nats::{Message, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, TryStreamExt, future, stream};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{JetstreamStream, StoredMessage, StreamError, StreamSequence, stream_error_of_jetstream};
use crate::connection::Nats;
use crate::pushed::AckPlace;

/// How long a pull request waits for messages before the member has to ask again.
const PULL_WAIT_MAX: Duration = Duration::from_secs(20);
/// How often JetStream sends a heartbeat to a waiting pull request.
const PULL_HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// A pull request that is silent for longer counts as lost: three heartbeats are missing.
const PULL_SILENCE_MAX: Duration = Duration::from_millis(3_200);
/// How long the end of a pull request may take to reach JetStream.
const PULL_END_WAIT_MAX: Duration = Duration::from_millis(500);
/// Unconfirmed messages of one place; at this number JetStream delivers no more.
const SHARED_UNACKED_MESSAGES_MAX: i64 = 1_000_000;
/// Pull requests that may wait at one place; JetStream refuses one more.
const SHARED_WAITING_PULLS_MAX: i64 = 65_536;
/// The metadata key of a place's consumer that holds a [`SkippedTally`].
const SKIPPED_METADATA_KEY: &str = "headgate-skipped";
/// The metadata key that holds who has reported them last, as a random token.
const TOLD_METADATA_KEY: &str = "headgate-told-by";
/// After how long a change of a place's consumer is read back. JetStream knows no condition for it: another node that has
/// read the consumer before writes within that time.
const CONSUMER_CHANGE_SETTLED: Duration = Duration::from_millis(200);
/// How many places are changed at once.
const CONSUMER_CHANGES_AT_ONCE_MAX: usize = 32;
/// How often a change that another node has overwritten is made again.
const CONSUMER_CHANGES_MAX: usize = 10;

/// What a shared place is to be like.
#[derive(Debug, Clone)]
pub struct SharedSettings {
    /// Its name: letters, digits, `-`.
    pub name: String,
    /// The subjects of its messages, with wildcards; they must not overlap.
    pub subjects: Vec<String>,
    /// Where it begins, if it has to be created.
    pub from: StreamSequence,
    /// After how long an unconfirmed message goes to another member.
    pub redelivered_after: Duration,
    /// How long it stays without members; `None`: forever. An existing place's time is never shortened.
    pub kept: Option<Duration>,
}

/// A shared place that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedPlace {
    /// Whether this call created it.
    pub is_new: bool,
    /// How many messages retention removed before any member took them, and no client was told of yet.
    pub skipped: u64,
}

/// A pull request: the messages that it asked for, as they arrive.
#[derive(Debug)]
pub struct SharedPull {
    nats: Nats,
    messages: Subscriber,
    left: usize,
    until: Instant,
    /// When JetStream was last heard.
    heard_at: Instant,
}

/// One delivered message.
#[derive(Debug)]
pub struct SharedDelivery {
    /// The message.
    pub stored: StoredMessage,
    /// How to confirm it.
    pub receipt: DeliveryReceipt,
}

/// The confirmation that JetStream expects for a delivered message. Without it, the message goes to another
/// member after a while.
#[derive(Debug)]
pub struct DeliveryReceipt {
    nats: Nats,
    reply: Subject,
}

impl JetstreamStream {
    /// Opens a shared place, and creates it if there is none. An existing place stays where it is.
    ///
    /// # Errors
    /// [`StreamError::Away`]; [`StreamError::Refused`] for subjects that JetStream does not take.
    pub async fn share(&self, settings: &SharedSettings) -> Result<SharedPlace, StreamError> {
        loop {
            if let Some(info) = self.shared_info(&settings.name).await? {
                return self.join_shared(info, settings).await;
            }
            if let Some(info) = self.create_shared(settings).await? {
                return self.begin_shared(info, settings).await;
            }
            // Another node has created it meanwhile: read it again.
        }
    }

    /// The state of a shared place; `None` if there is none.
    async fn shared_info(&self, name: &str) -> Result<Option<ConsumerInfo>, StreamError> {
        match self.await_answer(self.handle.consumer_info(name)).await? {
            Ok(info) => Ok(Some(info)),
            Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.away_error(&error)),
        }
    }

    /// Uses an existing place, which stays at least as long as the settings want.
    async fn join_shared(
        &self,
        info: ConsumerInfo,
        settings: &SharedSettings,
    ) -> Result<SharedPlace, StreamError> {
        let skipped = SkippedTally::from_consumer_info(&info).map_or(0, |skipped| skipped.messages);
        let is = info.config.inactive_threshold;
        let wanted = settings.kept.unwrap_or_default();
        let is_enough = |is: Duration| is.is_zero() || (!wanted.is_zero() && wanted <= is);
        if !is_enough(is) {
            let is_there = |info: &ConsumerInfo| is_enough(info.config.inactive_threshold);
            self.change_consumer(info, is_there, |config| config.inactive_threshold = wanted).await?;
        }
        Ok(SharedPlace { is_new: false, skipped })
    }

    /// Creates a place; `None` if another node was first.
    async fn create_shared(&self, settings: &SharedSettings) -> Result<Option<ConsumerInfo>, StreamError> {
        let config = pull::Config {
            durable_name: Some(settings.name.clone()),
            filter_subjects: settings.subjects.clone(),
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: settings.from.max(1) },
            ack_policy: AckPolicy::Explicit,
            ack_wait: settings.redelivered_after,
            max_ack_pending: SHARED_UNACKED_MESSAGES_MAX,
            max_waiting: SHARED_WAITING_PULLS_MAX,
            inactive_threshold: settings.kept.unwrap_or_default(),
            metadata: SkippedTally::default().into_metadata(),
            ..pull::Config::default()
        };
        let error = match self.await_answer(self.handle.create_consumer_strict(config)).await? {
            Ok(created) => return Ok(Some(created.cached_info().clone())),
            Err(error) => error,
        };
        match error.kind() {
            ConsumerCreateStrictErrorKind::AlreadyExists => Ok(None),
            ConsumerCreateStrictErrorKind::JetStream(of) => {
                Err(stream_error_of_jetstream(format!("stream {}: {error}", self.name), &of))
            }
            _ => Err(self.away_error(&error)),
        }
    }

    /// Notes with a new place what the stream no longer had of it.
    async fn begin_shared(
        &self,
        info: ConsumerInfo,
        settings: &SharedSettings,
    ) -> Result<SharedPlace, StreamError> {
        let below = self.state().await?.first;
        let skipped = below.saturating_sub(settings.from.max(1));
        if skipped > 0 {
            let noted = SkippedTally { messages: skipped, below };
            let is_there = |info: &ConsumerInfo| {
                SkippedTally::from_consumer_info(info).is_none_or(|noted| noted.below >= below)
            };
            self.change_consumer(info, is_there, |config| config.metadata.extend(noted.into_metadata()))
                .await?;
        }
        Ok(SharedPlace { is_new: true, skipped })
    }

    /// Deletes a shared place, unless a pull request waits there.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn give_up_shared(&self, name: &str) -> Result<(), StreamError> {
        if self.shared_info(name).await?.is_some_and(|info| info.num_waiting == 0) {
            let deleted = self.await_answer(self.handle.delete_consumer(name)).await?;
            deleted.map_err(|error| self.away_error(&error))?;
        }
        Ok(())
    }

    /// Marks the removed messages as reported to a client. Returns how many there were; a second call
    /// returns 0, also one from another node at the same time.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn mark_skipped_told(&self, name: &str) -> Result<u64, StreamError> {
        for _ in 0..CONSUMER_CHANGES_MAX {
            let Some(info) = self.shared_info(name).await? else { return Ok(0) };
            let Some(SkippedTally { messages: messages @ 1.., below }) =
                SkippedTally::from_consumer_info(&info)
            else {
                return Ok(0);
            };
            let told = SkippedTally { messages: 0, below };
            let token = self.nats.client().new_inbox();
            self.update_consumer(info, |config| {
                config.metadata.extend(told.into_metadata());
                config.metadata.insert(TOLD_METADATA_KEY.to_owned(), token.clone());
            })
            .await?;
            sleep(CONSUMER_CHANGE_SETTLED).await;
            let Some(written) = self.shared_info_again(name).await? else { return Ok(0) };
            // What another node wrote may have brought them back: then nobody has reported them.
            if SkippedTally::from_consumer_info(&written).is_none_or(|now| now.messages == 0) {
                // Of several nodes the last one reports them.
                let is_own = written.config.metadata.get(TOLD_METADATA_KEY) == Some(&token);
                return Ok(if is_own { messages } else { 0 });
            }
        }
        Ok(0)
    }

    /// As [`JetstreamStream::shared_info`], asked some more times while NATS is away.
    async fn shared_info_again(&self, name: &str) -> Result<Option<ConsumerInfo>, StreamError> {
        let mut left = CONSUMER_CHANGES_MAX;
        loop {
            left -= 1;
            match self.shared_info(name).await {
                Err(StreamError::Away(_)) if left > 0 => sleep(CONSUMER_CHANGE_SETTLED).await,
                asked => return asked,
            }
        }
    }

    /// Must be called before the messages below a sequence are removed. Records with each shared place how
    /// many of them no member has taken, for the next member to report. From the first message that matches
    /// the place's subjects on, all messages count, whatever their subject.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn note_skipped(&self, below: StreamSequence) -> Result<(), StreamError> {
        let mut consumers = self.handle.consumers();
        let mut changes = Vec::new();
        while let Some(info) = self.await_answer(consumers.next()).await? {
            let info = info.map_err(|error| self.away_error(&error))?;
            // Consumers without this metadata belong to other users of NATS.
            let Some(noted) = SkippedTally::from_consumer_info(&info).filter(|_| info.num_pending > 0) else {
                continue;
            };
            let next = noted.below.max(info.delivered.stream_sequence + 1);
            let mut first = below;
            for subject in std::iter::once(&info.config.filter_subject).chain(&info.config.filter_subjects) {
                if next < below && !subject.is_empty() {
                    let found = self.first_of_leader(subject, next).await?;
                    first = found.map_or(first, |message| first.min(message.sequence));
                }
            }
            let messages = (below - first).min(info.num_pending);
            if messages > 0 {
                changes.push(self.add_skipped(info.name.clone(), messages, below));
            }
        }
        // Together and not read back: the messages are to be gone before a member takes one that counts as removed.
        stream::iter(changes)
            .buffer_unordered(CONSUMER_CHANGES_AT_ONCE_MAX)
            .try_for_each(|()| future::ready(Ok(())))
            .await
    }

    /// Adds `messages` to those of a place that no member has taken below a sequence, unless that was done. The place is read
    /// again: what others have changed since all were looked through stays.
    async fn add_skipped(
        &self,
        name: String,
        messages: u64,
        below: StreamSequence,
    ) -> Result<(), StreamError> {
        let Some(info) = self.shared_info(&name).await? else { return Ok(()) };
        let noted = SkippedTally::from_consumer_info(&info).filter(|noted| noted.below < below);
        let Some(noted) = noted else { return Ok(()) };
        let noted = SkippedTally { messages: noted.messages + messages, below };
        self.update_consumer(info, |config| config.metadata.extend(noted.into_metadata())).await
    }

    /// Changes the consumer of a place, and again until the change is there: another node may have written what it had
    /// read before.
    async fn change_consumer(
        &self,
        mut info: ConsumerInfo,
        is_there: impl Fn(&ConsumerInfo) -> bool,
        change: impl Fn(&mut pull::Config),
    ) -> Result<(), StreamError> {
        for _ in 0..CONSUMER_CHANGES_MAX {
            let name = info.name.clone();
            self.update_consumer(info, &change).await?;
            sleep(CONSUMER_CHANGE_SETTLED).await;
            match self.shared_info(&name).await? {
                Some(overwritten) if !is_there(&overwritten) => info = overwritten,
                _ => return Ok(()),
            }
        }
        Err(self.away_error(&"other nodes change a shared place all the time"))
    }

    async fn update_consumer(
        &self,
        info: ConsumerInfo,
        change: impl FnOnce(&mut pull::Config),
    ) -> Result<(), StreamError> {
        let config = pull::Config::try_from_consumer_config(info.config);
        let mut config = config.map_err(|error| StreamError::Refused(error.to_string()))?;
        change(&mut config);
        let changed = self.await_answer(self.handle.update_consumer(config)).await?;
        changed.map_err(|error| self.away_error(&error))?;
        Ok(())
    }

    /// Asks a shared place for up to `max` messages.
    ///
    /// # Errors
    /// [`StreamError::Away`].
    pub async fn take(&self, name: &str, max: usize) -> Result<SharedPull, StreamError> {
        if let Some(trouble) = self.nats.trouble() {
            return Err(StreamError::Away(trouble));
        }
        let client = self.nats.client();
        let inbox = client.new_inbox();
        let messages = client.subscribe(inbox.clone()).await.map_err(|error| self.away_error(&error))?;
        let nanos = |of: Duration| u64::try_from(of.as_nanos()).unwrap_or(u64::MAX);
        let request = serde_json::json!({
            "batch": max, "expires": nanos(PULL_WAIT_MAX), "idle_heartbeat": nanos(PULL_HEARTBEAT_INTERVAL),
        });
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{name}", self.name);
        let asked = client.publish_with_reply(subject, inbox, request.to_string().into());
        self.await_answer(asked).await?.map_err(|error| self.away_error(&error))?;
        let heard_at = Instant::now();
        let until = heard_at + PULL_WAIT_MAX + PULL_SILENCE_MAX;
        Ok(SharedPull { nats: self.nats.clone(), messages, left: max, until, heard_at })
    }
}

/// The messages that were removed before any member took them, in the metadata of a place's consumer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct SkippedTally {
    /// How many were not reported to a client yet.
    messages: u64,
    /// The sequence below which removed messages are counted.
    below: StreamSequence,
}

impl SkippedTally {
    fn from_consumer_info(info: &ConsumerInfo) -> Option<Self> {
        let (messages, below) = info.config.metadata.get(SKIPPED_METADATA_KEY)?.split_once(' ')?;
        Some(Self { messages: messages.parse().ok()?, below: below.parse().ok()? })
    }

    fn into_metadata(self) -> HashMap<String, String> {
        HashMap::from([(SKIPPED_METADATA_KEY.to_owned(), format!("{} {}", self.messages, self.below))])
    }
}

impl SharedPull {
    /// Waits for the next message; `None` when the request is over and the caller has to ask again.
    /// Cancel-safe.
    pub async fn next(&mut self) -> Option<SharedDelivery> {
        while self.left > 0 {
            let silent = self.until.min(self.heard_at + PULL_SILENCE_MAX);
            let message = timeout_at(silent, self.messages.next()).await.ok()??;
            self.heard_at = Instant::now();
            match message.status {
                Some(StatusCode::IDLE_HEARTBEAT) => {}
                // The request is over, or the place is gone; the next request tells which.
                Some(_) => return None,
                None => {
                    self.left -= 1;
                    if let Some(taken) = self.to_delivery(message) {
                        return Some(taken);
                    }
                }
            }
        }
        None
    }

    /// Whether all messages that were asked for have arrived.
    pub fn is_full(&self) -> bool {
        self.left == 0
    }

    /// Ends the request, and returns the receipts of messages that arrived unread. Messages still under way
    /// go to other members after a while.
    pub async fn end(mut self) -> Vec<DeliveryReceipt> {
        let mut rest = Vec::new();
        while let Some(Some(message)) = self.messages.next().now_or_never() {
            rest.extend(self.to_delivery(message).map(|taken| taken.receipt));
        }
        let client = self.nats.client().clone();
        let ended = async {
            if self.messages.unsubscribe().await.is_ok() {
                let _ = client.flush().await;
            }
        };
        let _ = timeout(PULL_END_WAIT_MAX, ended).await;
        while let Some(Some(message)) = self.messages.next().now_or_never() {
            rest.extend(self.to_delivery(message).map(|taken| taken.receipt));
        }
        rest
    }

    /// Decodes a delivered message; `None` if it is none of the stream's.
    fn to_delivery(&self, message: Message) -> Option<SharedDelivery> {
        let reply = message.reply.clone()?;
        let stored = StoredMessage::from_delivery(message, AckPlace::parse(&reply)?);
        Some(SharedDelivery { stored, receipt: DeliveryReceipt { nats: self.nats.clone(), reply } })
    }
}

impl DeliveryReceipt {
    /// Confirms the message.
    pub async fn done(self) {
        self.send_ack(b"+ACK").await;
    }

    /// Rejects the message: it goes to another member at once.
    pub async fn pass_on(self) {
        self.send_ack(b"-NAK").await;
    }

    /// Asks for more time to deal with the message.
    pub async fn keep(&self) {
        self.send_ack(b"+WPI").await;
    }

    async fn send_ack(&self, what: &'static [u8]) {
        // If this cannot be sent, the message goes to another member after a while.
        let _ = self.nats.client().publish(self.reply.clone(), Bytes::from_static(what)).await;
    }
}
