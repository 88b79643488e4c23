//! The NATS front: messages that devices publish to `ingest.{datasource}.{topic}` on a NATS that stands
//! somewhere else, with their API key in a header. Gateways of one NATS share them (a queue group).
//!
//! The bridge brings everything that has come in since it last looked; [`ingest`] makes one draft of it:
//! [`identity`] says whose a message is, [`headers`] what else its headers say. When the draft is durable
//! each message is answered as JetStream would, so that any client's `js.publish` works; [`reply`] is the
//! one place where a no becomes an answer. A message without a reply subject is let in or refused all
//! the same, and counted.
//!
//! NATS does not say where a message comes from, and its server decides who may publish to `ingest.>` at
//! all. So keys that are not good are counted for no address here.

mod attested;
pub mod callout;
mod headers;
mod identity;
mod ingest;
mod kick;
mod reply;

use headgate_bridge_nats::NatsError;
use headgate_bridge_nats::connection;
use headgate_bridge_nats::ingress::{Ingress, Settings};
use tokio_util::sync::CancellationToken;

pub use self::attested::Attestation;
pub use self::callout::Callout;
use self::ingest::Ingest;
use crate::intake::Intake;
use crate::limits::{
    NATS_BATCH_BYTES_MAX, NATS_BATCH_MESSAGES_MAX, NATS_BATCHES_IN_FLIGHT_MAX, NATS_WAITING_MESSAGES_MAX,
};
use crate::subject::Space;

/// The queue group of all gateways.
const QUEUE: &str = "headgate";

/// The front.
pub struct Front {
    ingress: Ingress,
    ingest: Ingest,
}

impl Front {
    /// Begins to connect. NATS need not be there: messages come in when it is. Answers are in the name
    /// of `stream`. With an `attestation`, a message without a key is one of the key that the server says
    /// it came under.
    ///
    /// # Errors
    /// [`NatsError`] for settings that can never work.
    pub async fn connect(
        connection: connection::Settings,
        stream: &str,
        intake: Intake,
        attestation: Option<Attestation>,
    ) -> Result<Self, NatsError> {
        let settings = Settings {
            subject: Space::Ingest.all(),
            queue: QUEUE.to_owned(),
            stream: stream.to_owned(),
            batch_messages_max: NATS_BATCH_MESSAGES_MAX,
            batch_bytes_max: NATS_BATCH_BYTES_MAX,
            batches_in_flight_max: NATS_BATCHES_IN_FLIGHT_MAX,
            waiting_messages_max: NATS_WAITING_MESSAGES_MAX,
            waiting_bytes_max: intake.limits().in_flight_bytes_max,
        };
        let ingress = Ingress::connect(connection, settings).await?;
        Ok(Self { ingress, ingest: Ingest::new(intake, stream, attestation) })
    }

    /// What keeps NATS away, while it is away.
    pub fn trouble(&self) -> Option<String> {
        self.ingress.trouble()
    }

    /// Takes messages in until `drain` is cancelled; then no more, and returns when those that it took
    /// are answered.
    pub async fn serve(&self, drain: CancellationToken) {
        self.ingress.run(&self.ingest, drain.cancelled()).await;
    }
}
