//! What JetStream pushes to one reader, in order: the consumer that it does so for, and the signs of life that
//! it gives meanwhile. Who reads begins again where it is when a message is missing, or nothing is heard.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, push};
use async_nats::{Message, Subject};

/// How often JetStream says that it is there, if it has nothing else to say.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// The silence after which it counts as gone.
pub(crate) const SILENCE_MAX: Duration = Duration::from_millis(1_600);
/// How long JetStream keeps a consumer that nobody listens to.
const CONSUMER_KEPT: Duration = Duration::from_secs(10);

/// A consumer that pushes to `inbox` from where `from` says.
pub(crate) fn consumer(inbox: String, from: DeliverPolicy) -> push::Config {
    push::Config {
        deliver_subject: inbox,
        deliver_policy: from,
        ack_policy: AckPolicy::None,
        max_deliver: 1,
        flow_control: true,
        idle_heartbeat: HEARTBEAT,
        num_replicas: 1,
        memory_storage: true,
        inactive_threshold: CONSUMER_KEPT,
        ..push::Config::default()
    }
}

/// Where a heartbeat wants an empty answer: it has a reply if JetStream waits for us to keep up, or names it, if
/// it does so already.
pub(crate) fn flow_reply(heartbeat: &Message) -> Option<Subject> {
    let stalled =
        || heartbeat.headers.as_ref()?.get("Nats-Consumer-Stalled").map(|reply| reply.as_str().into());
    heartbeat.reply.clone().or_else(stalled)
}
