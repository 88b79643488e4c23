//! A will: the message in a client's CONNECT that is published when the connection is lost (MQTT 5
//! section 3.1.2.5). It goes through intake like any other message, under the key that the client
//! connected with. If that key is dead by then, the will is refused.

use std::sync::Arc;

use tracing::info;

use super::client_identity::ClientIdentity;
use super::codec::connect;
use super::codec::properties::{WILL_DELAY, forward_properties};
use crate::auth::Grant;
use crate::front::credentials::is_key_header;
use crate::intake::{Draft, IncomingMessage, Intake, Refusal};
use crate::memory::MemoryCharge;
use crate::message::{RecordFlags, Transport};

/// What a will takes beside its texts.
const WILL_BYTES: usize = 256;

/// A will that has passed intake's checks.
pub(super) struct MqttWill {
    grant: Grant,
    who: Arc<ClientIdentity>,
    topic: String,
    payload: Vec<u8>,
    content_type: String,
    properties: Vec<u8>,
    flags: RecordFlags,
    publisher: u64,
    /// What it takes in memory, for as long as the connection or the will waits.
    _memory: MemoryCharge,
    /// The delay between the loss of the connection and the publication, in seconds.
    pub(super) delay_s: u32,
}

impl MqttWill {
    /// Makes a will from a CONNECT, and checks it.
    ///
    /// # Errors
    /// The refusal with which intake would answer the will.
    pub(super) fn new(
        will: &connect::ConnectWill<'_>,
        grant: &Grant,
        who: &Arc<ClientIdentity>,
        publisher: u64,
        intake: &Intake,
    ) -> Result<Self, Refusal> {
        let mut flags = RecordFlags::WILL;
        if will.retain {
            flags = flags.with(RecordFlags::RETAIN);
        }
        flags = flags.with(RecordFlags::of_mqtt_qos(will.qos));
        let bytes = will.topic.len() + will.payload.len() + will.properties.wire_bytes() + WILL_BYTES;
        let memory = intake.memory_account(grant).charge(bytes)?;
        let mut properties = Vec::new();
        let content_type = forward_properties(&will.properties, &mut properties, is_key_header);
        let will = Self {
            _memory: memory,
            grant: grant.clone(),
            who: who.clone(),
            topic: will.topic.to_owned(),
            payload: will.payload.to_owned(),
            content_type: content_type.to_owned(),
            properties,
            flags,
            publisher,
            delay_s: will.properties.u32(WILL_DELAY).unwrap_or(0),
        };
        will.draft(intake, true)?;
        Ok(will)
    }

    /// Publishes the will. Returns when it is durable or refused.
    pub(super) async fn publish(self, intake: &Intake) {
        if let Err(refusal) = self.submit(intake).await {
            intake.refusals().note(self.who.note(&self.grant, refusal.note(Transport::Mqtt)));
            info!(key_id = %self.grant.key_id(), cause = refusal.cause().name(), %refusal, "a will was refused");
        }
    }

    async fn submit(&self, intake: &Intake) -> Result<(), Refusal> {
        let mut paid = false;
        let draft = loop {
            match self.draft(intake, paid) {
                Err(Refusal::Limited(limited)) if limited.is_held_back() => {
                    paid = intake.wait_turn(*limited).await?;
                }
                drafted => break drafted?,
            }
        };
        intake.submit(draft).await.map(drop)
    }

    /// With `paid`, the will is not counted against a rate.
    fn draft(&self, intake: &Intake, paid: bool) -> Result<Draft, Refusal> {
        let mut draft = intake.draft(Transport::Mqtt, self.publisher);
        draft.set_client(&self.who.user);
        if paid {
            draft.mark_paid();
        }
        let message = IncomingMessage {
            topic: &self.topic,
            payload: &self.payload,
            content_type: &self.content_type,
            properties: &self.properties,
            flags: self.flags,
            message_id: None,
            exchange: None,
        };
        match draft.push(&self.grant, None, message) {
            // A quarantined will is in the draft too, and is kept in quarantine.
            Ok(_) | Err(Refusal::Quarantined(_)) => Ok(draft),
            Err(refusal) => Err(refusal),
        }
    }
}
