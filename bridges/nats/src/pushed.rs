//! Ordered push consumers: their configuration, and the heartbeats that JetStream sends between messages. A
//! reader that misses a message or a heartbeat makes a new consumer where it stands.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, push};
use async_nats::{Message, Subject};

/// How often JetStream sends a heartbeat while there are no messages.
const PUSH_HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);
/// A consumer that is silent for longer counts as lost: three heartbeats are missing.
pub(crate) const PUSH_SILENCE_MAX: Duration = Duration::from_millis(1_600);
/// How long JetStream keeps a consumer that nobody listens to.
const PUSH_CONSUMER_INACTIVE_MAX: Duration = Duration::from_secs(10);

/// A consumer that pushes to `inbox` from where `from` says.
pub(crate) fn push_consumer_config(inbox: String, from: DeliverPolicy) -> push::Config {
    push::Config {
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
    }
}

/// The subject on which flow control waits for an empty answer: the reply of a flow-control request, or the
/// header of a heartbeat when the consumer is stalled already.
pub(crate) fn flow_reply(heartbeat: &Message) -> Option<Subject> {
    let stalled =
        || heartbeat.headers.as_ref()?.get("Nats-Consumer-Stalled").map(|reply| reply.as_str().into());
    heartbeat.reply.clone().or_else(stalled)
}
