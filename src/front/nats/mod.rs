//! The NATS front: messages that devices publish to `ingest.{datasource}.{topic}` on an external NATS, with
//! their API key in a header. All gateways of one NATS share them in a queue group.
//!
//! The bridge delivers all that has arrived since its last turn, and [`ingest`] makes one draft of it.
//! [`identity`] finds the grant of each message, and [`headers`] reads its other headers. When the draft is
//! durable, each message is answered as JetStream would answer, so that any client's `js.publish` works.
//!
//! [`reply`] is the one place where a refusal becomes an answer. A message without a reply subject is
//! admitted or refused all the same, and counted.
//!
//! NATS does not tell the address of a sender, and its server decides who may publish to `ingest.>`. So the
//! NATS front counts bad keys for no address.
//!
//! Answers go to inboxes alone, subjects under `nats.reply_prefixes`. The gateway may publish where a device may not,
//! and a reply subject of the device's choice would be a way around that. A message that asks for an answer elsewhere
//! is refused: kept and never answered, it would be sent again and again.

mod attested;
pub mod callout;
mod clients;
mod headers;
mod identity;
mod ingest;
mod kick;
mod reach;
mod reply;

use std::sync::Arc;

use headgate_bridge_nats::NatsError;
use headgate_bridge_nats::connection;
use headgate_bridge_nats::ingress::{Ingress, IngressSettings};
use headgate_bridge_nats::system::SystemAccount;
use tokio_util::sync::CancellationToken;

pub use self::attested::Attestation;
pub use self::callout::NatsKeyCallout;
use self::ingest::NatsIngest;
use self::reach::NatsClientReach;
use crate::config;
use crate::intake::Intake;
use crate::limits::{
    NATS_BATCH_BYTES_MAX, NATS_BATCH_MESSAGES_MAX, NATS_BATCHES_IN_FLIGHT_MAX, NATS_WAITING_MESSAGES_MAX,
};
use crate::subject::SubjectSpace;

/// The queue group of all gateways.
const NATS_INGEST_QUEUE_GROUP: &str = "headgate";

/// The NATS front.
pub struct NatsFront {
    ingress: Ingress,
    ingest: Arc<NatsIngest>,
}

impl NatsFront {
    /// Checks the settings. NATS may be away; messages arrive once it is back. Answers name the stream, and go to
    /// subjects under the reply prefixes alone. With an `attestation`, a message without a key belongs to the key that
    /// the server attests; with `system`, one whose sender can hear no answer is refused.
    ///
    /// # Errors
    /// [`NatsError`] for settings that can never work.
    pub fn new(
        connection: connection::NatsSettings,
        config: &config::NatsConfig,
        intake: Intake,
        attestation: Option<Attestation>,
        system: Option<SystemAccount>,
    ) -> Result<Self, NatsError> {
        let settings = IngressSettings {
            subject: SubjectSpace::Ingest.space_wildcard(),
            queue: NATS_INGEST_QUEUE_GROUP.to_owned(),
            stream: config.stream.name.clone(),
            reply_prefixes: config.reply_prefixes.clone(),
            batch_messages_max: NATS_BATCH_MESSAGES_MAX,
            batch_bytes_max: NATS_BATCH_BYTES_MAX,
            batches_in_flight_max: NATS_BATCHES_IN_FLIGHT_MAX,
            waiting_messages_max: NATS_WAITING_MESSAGES_MAX,
            waiting_bytes_max: intake.limits().in_flight_bytes_max,
        };
        let ingest =
            Arc::new(NatsIngest::new(intake, &settings, attestation, system.map(NatsClientReach::new)));
        Ok(Self { ingress: Ingress::new(connection, settings)?, ingest })
    }

    /// What keeps NATS away, while it is away.
    pub fn trouble(&self) -> Option<String> {
        self.ingress.trouble()
    }

    /// Admits messages until `drain` is cancelled, and returns once all received messages are answered.
    pub async fn serve(&self, drain: CancellationToken) {
        self.ingress.run(self.ingest.clone(), drain.cancelled()).await;
    }
}
