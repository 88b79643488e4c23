//! An ordered push consumer: JetStream pushes the messages of a stream, and heartbeats between them. A feed
//! notices when one of either is missing. Its reader then opens another where it stands.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, Info as ConsumerInfo, push};
use async_nats::jetstream::stream::Stream;
use async_nats::{Message, StatusCode, Subject, Subscriber, header};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::connection::Nats;
use crate::stream::StreamSequence;

/// How often JetStream sends a heartbeat while there are no messages.
const PUSH_HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);
/// A consumer that is silent for longer counts as lost: three heartbeats are missing.
const PUSH_SILENCE_MAX: Duration = Duration::from_millis(1_600);
/// How long JetStream keeps a consumer that nobody listens to.
const PUSH_CONSUMER_INACTIVE_MAX: Duration = Duration::from_secs(10);

/// One push consumer.
#[derive(Debug)]
pub(crate) struct PushFeed {
    nats: Nats,
    messages: Subscriber,
    /// How many messages it has delivered.
    delivered: u64,
    connections: watch::Receiver<u64>,
}

/// What came from a feed.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "almost every event is a message, and none is kept")]
pub(crate) enum PushEvent {
    /// A message of the stream, and its place.
    Message(Message, AckPlace),
    /// A heartbeat that is due.
    Heartbeat,
    /// Something is missing, or the connection is another one: the feed is of no more use.
    Broken,
}

impl PushFeed {
    /// Makes a consumer that delivers over `nats` from where `from` says. `connections` is the count of `nats`
    /// as it was marked before: a change since then breaks the feed.
    ///
    /// # Errors
    /// That of the subscription or of JetStream; another attempt may succeed.
    pub(crate) async fn open(
        nats: &Nats,
        stream: &Stream<()>,
        from: DeliverPolicy,
        connections: watch::Receiver<u64>,
    ) -> Result<(Self, ConsumerInfo), async_nats::Error> {
        let client = nats.client();
        let inbox = client.new_inbox();
        let messages = client.subscribe(inbox.clone()).await?;
        let config = push::Config {
            deliver_subject: inbox,
            deliver_policy: from,
            ack_policy: AckPolicy::None,
            max_deliver: 1,
            flow_control: true,
            idle_heartbeat: PUSH_HEARTBEAT_INTERVAL,
            num_replicas: 1,
            memory_storage: true,
            inactive_threshold: PUSH_CONSUMER_INACTIVE_MAX,
            ..push::Config::default()
        };
        let consumer = stream.create_consumer(config).await?;
        let feed = Self { nats: nats.clone(), messages, delivered: 0, connections };
        Ok((feed, consumer.cached_info().clone()))
    }

    /// Waits for a message or a heartbeat. Cancel-safe.
    pub(crate) async fn next(&mut self) -> PushEvent {
        let message = tokio::select! {
            message = timeout(PUSH_SILENCE_MAX, self.messages.next()) => message.ok().flatten(),
            _ = self.connections.changed() => None,
        };
        message.map_or(PushEvent::Broken, |message| self.accept(message))
    }

    /// What has arrived already.
    pub(crate) fn try_next(&mut self) -> Option<PushEvent> {
        let message = self.messages.next().now_or_never()?;
        Some(message.map_or(PushEvent::Broken, |message| self.accept(message)))
    }

    fn accept(&mut self, message: Message) -> PushEvent {
        match message.status {
            None => {}
            Some(StatusCode::IDLE_HEARTBEAT) => return self.accept_heartbeat(&message),
            Some(_) => return PushEvent::Broken,
        }
        match message.reply.as_ref().and_then(|reply| AckPlace::parse(reply)) {
            Some(place) if place.delivered == self.delivered + 1 => {
                self.delivered = place.delivered;
                PushEvent::Message(message, place)
            }
            _ => PushEvent::Broken,
        }
    }

    fn accept_heartbeat(&self, message: &Message) -> PushEvent {
        if let Some(reply) = flow_reply(message) {
            let client = self.nats.client().clone();
            // If this cannot be sent, the connection is lost, and the feed with it.
            tokio::spawn(async move { client.publish(reply, Bytes::new()).await });
            return PushEvent::Heartbeat;
        }
        let last = message.headers.as_ref().and_then(|headers| headers.get(header::NATS_LAST_CONSUMER));
        match last.is_some_and(|last| last.as_str().parse() == Ok(self.delivered)) {
            true => PushEvent::Heartbeat,
            false => PushEvent::Broken,
        }
    }
}

/// The subject on which flow control waits for an empty answer: the reply of a flow-control request, or the
/// header of a heartbeat when the consumer is stalled already.
fn flow_reply(heartbeat: &Message) -> Option<Subject> {
    let stalled =
        || heartbeat.headers.as_ref()?.get("Nats-Consumer-Stalled").map(|reply| reply.as_str().into());
    heartbeat.reply.clone().or_else(stalled)
}

/// The place of a delivered message, as its reply subject tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AckPlace {
    /// In the stream.
    pub(crate) sequence: StreamSequence,
    /// In the consumer: the first is 1.
    pub(crate) delivered: u64,
    /// How many messages come after it.
    pub(crate) pending: u64,
}

impl AckPlace {
    /// Parses a reply subject: `$JS.ACK.` and the tokens
    /// `{stream}.{consumer}.{deliveries}.{stream sequence}.{consumer sequence}.{time}.{pending}`, possibly with
    /// one more at the end (ADR-15).
    pub(crate) fn parse(reply: &str) -> Option<Self> {
        let rest = reply.strip_prefix("$JS.ACK.")?;
        // Stream and consumer; a domain and the account's hash may precede them.
        let before = if rest.split('.').count() > 7 { 4 } else { 2 };
        let mut tokens = rest.split('.').skip(before + 1);
        let (sequence, delivered) = (tokens.next()?.parse().ok()?, tokens.next()?.parse().ok()?);
        Some(Self { sequence, delivered, pending: tokens.nth(1)?.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_where_it_is_in_the_stream_and_in_its_consumer() {
        let place = Some(AckPlace { sequence: 1234, delivered: 7, pending: 3 });
        assert_eq!(AckPlace::parse("$JS.ACK.headgate.c1.1.1234.7.1700000000000000000.3"), place);
        let with_domain = "$JS.ACK.hub.ACCOUNT.headgate.c1.1.1234.7.1700000000000000000.3.x9";
        assert_eq!(AckPlace::parse(with_domain), place);
        assert_eq!(AckPlace::parse("_INBOX.1.2"), None);
    }
}
