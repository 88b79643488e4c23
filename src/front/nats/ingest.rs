//! Ingest: turns a batch of NATS messages into one draft, and the draft's outcome into the answers.
//!
//! A publisher on NATS cannot be held back. Where HTTP answers 429 or 503, this front does the same, and the
//! sender tries again.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use headgate_bridge_nats::ingress::IngressSettings;
use headgate_bridge_nats::inlet::{
    Inlet, InletVerdict, InletVerdicts, LaneMemory, NatsReplyPolicy, Parcel, ParcelOverflow,
};
use tracing::{debug, info};

use super::attested::{Attestation, AttestedSender};
use super::headers::NatsMessageHeaders;
use super::reach::NatsClientReach;
use super::{identity, reply};
use crate::auth::shape::KeyShape;
use crate::auth::usage::KeyClient;
use crate::auth::{Grant, GrantDenial, RejectedKey, Scope};
use crate::front::problem::Problem;
use crate::intake::{Draft, DurableDraft, IncomingMessage, Intake, Refusal};
use crate::log::SectionOutcome;
use crate::memory::{MemoryAccount, MemoryCharge};
use crate::message::{DatasourceId, KeyId, RecordFlags, Transport};
use crate::observe::refusals::RefusalNote;
use crate::subject::{SubjectSpace, topic_from_tokens};

/// Admits the messages of NATS.
pub(super) struct NatsIngest {
    intake: Intake,
    /// The stream name in the answers.
    stream: String,
    /// The client on record: NATS does not tell one sender from another.
    client: Arc<KeyClient>,
    /// How to find the sender of a message without a key, if servers attest it.
    attestation: Option<Attestation>,
    /// What the reply subjects begin with that are answered.
    reply_prefixes: Vec<String>,
    /// Whether attested senders hear answers, if the system account can be asked.
    reach: Option<Arc<NatsClientReach>>,
    /// The verdict on a message for which there is no room.
    overflow: InletVerdict,
}

/// The lane of all senders without a good key: they share it, or one of them could take any number.
const STRANGERS_LANE: u64 = 0;

/// What the answer to a message of a batch depends on.
enum PendingInletVerdict {
    /// It is in the draft, at this place among the messages of this origin.
    Admitted { origin: usize, place: usize },
    /// The same, but it goes into quarantine, and the sender is told so.
    Quarantined { origin: usize, place: usize, problem: Problem },
    /// It is refused so, unless the log knows it: it asks, as this origin.
    Asked { origin: usize, verdict: InletVerdict },
    /// It was refused.
    Refused(InletVerdict),
}

/// What the waiting messages of a lane take of the memory of their key and datasource.
struct NatsLaneMemory(MemoryCharge);

impl LaneMemory for NatsLaneMemory {
    fn try_hold(&mut self, bytes: usize) -> bool {
        self.0.resize(bytes).is_ok()
    }
}

/// A message that was refused, and what is known of its key.
struct RefusedParcel {
    refusal: Refusal,
    key_id: Option<KeyId>,
    key_shape: Option<KeyShape>,
}

impl From<RejectedKey> for RefusedParcel {
    fn from(rejected: RejectedKey) -> Self {
        Self { refusal: rejected.denied.into(), key_id: rejected.key_id, key_shape: rejected.shape }
    }
}

/// A draft under construction.
struct NatsDraftBatch {
    draft: Draft,
    /// The number of messages for each origin of the draft.
    counts: Vec<usize>,
}

impl NatsDraftBatch {
    /// The next place in an origin.
    fn next_place(&mut self, origin: usize) -> usize {
        if self.counts.len() <= origin {
            self.counts.resize(origin + 1, 0);
        }
        self.counts[origin] += 1;
        self.counts[origin] - 1
    }
}

impl NatsIngest {
    pub(super) fn new(
        intake: Intake,
        settings: &IngressSettings,
        attestation: Option<Attestation>,
        reach: Option<Arc<NatsClientReach>>,
    ) -> Self {
        let client = Arc::new(KeyClient::new(Transport::Nats, None, None));
        let overflow = reply::refusal_verdict(intake.busy_refusal());
        let IngressSettings { stream, reply_prefixes, .. } = settings;
        let (stream, reply_prefixes) = (stream.clone(), reply_prefixes.clone());
        Self { intake, stream, client, attestation, reply_prefixes, reach, overflow }
    }

    /// The account that a message is counted against while it waits, and the key that it is of: all senders without a
    /// good key share one.
    fn memory_account(&self, parcel: &Parcel) -> (Arc<MemoryAccount>, Option<KeyId>) {
        match identity::grant_of_parcel(parcel, self.intake.authorizer(), self.attestation.as_ref()) {
            Ok(grant) => (self.intake.memory_account(&grant), Some(grant.key_id())),
            Err(_) => (self.intake.memory().account_of_strangers(), None),
        }
    }

    /// Checks one message and adds it to the draft, or reports its refusal.
    fn admit_parcel(&self, batch: &mut NatsDraftBatch, parcel: &Parcel) -> PendingInletVerdict {
        match self.push(&mut batch.draft, parcel) {
            Ok(origin) => PendingInletVerdict::Admitted { origin, place: batch.next_place(origin) },
            Err(RefusedParcel { refusal: Refusal::Quarantined(quarantined), .. }) => {
                let origin = quarantined.origin;
                let place = batch.next_place(origin);
                PendingInletVerdict::Quarantined {
                    origin,
                    place,
                    problem: Refusal::Quarantined(quarantined).into(),
                }
            }
            // Intake reports it if the log does not know it.
            Err(RefusedParcel { refusal: Refusal::Asked(asked), .. }) => {
                batch.next_place(asked.origin);
                PendingInletVerdict::Asked {
                    origin: asked.origin,
                    verdict: reply::refusal_verdict(asked.refusal),
                }
            }
            Err(RefusedParcel { refusal, key_id, key_shape }) => {
                let datasource = datasource_of_subject(parcel.subject());
                let note = refusal.note(Transport::Nats);
                let address = self.attested_sender(parcel).and_then(|sender| sender.address);
                self.intake.refusals().note(RefusalNote { datasource, key_id, key_shape, address, ..note });
                let (key_id, cause) = (key_id.map(tracing::field::display), refusal.cause().name());
                // A sender that asks for an answer which it cannot get sends again, and hears of it nowhere else.
                match refusal {
                    Refusal::ReplySubject => info!(key_id, cause, why = %refusal, "refused a message"),
                    _ => debug!(key_id, cause, "refused a message"),
                }
                PendingInletVerdict::Refused(reply::refusal_verdict(refusal))
            }
        }
    }

    /// The sender that a server attests.
    fn attested_sender(&self, parcel: &Parcel) -> Option<AttestedSender> {
        self.attestation.as_ref()?.sender(parcel.headers())
    }

    /// The datasource and the topic that a message's subject names, if its key may publish there, its headers can be
    /// read and its reply subject is acceptable.
    fn address_of_parcel(&self, grant: &Grant, parcel: &Parcel) -> Result<(DatasourceId, String), Refusal> {
        let (named, tokens) = SubjectSpace::Ingest.split(parcel.subject())?;
        // Check the grant first: without it the sender learns nothing else about the subject.
        grant.allows(Scope::Ingest, named)?;
        let own = grant.datasource();
        let datasource = if own.as_str() == named { own.clone() } else { DatasourceId::new(named)? };
        if !parcel.is_well_formed() {
            return Err(Refusal::HeaderForm);
        }
        if parcel.reply(&self.reply_prefixes) == NatsReplyPolicy::Elsewhere {
            return Err(Refusal::ReplySubject);
        }
        if parcel.reply(&self.reply_prefixes) == NatsReplyPolicy::Wanted
            && let (Some(reach), Some(sender)) = (&self.reach, self.attested_sender(parcel))
            && reach.is_deaf(&sender)
        {
            return Err(Refusal::ReplySubject);
        }
        Ok((datasource, topic_from_tokens(tokens)?))
    }

    fn push(&self, draft: &mut Draft, parcel: &Parcel) -> Result<usize, RefusedParcel> {
        let grant = identity::grant_of_parcel(parcel, self.intake.authorizer(), self.attestation.as_ref())?;
        let refusing = |refusal| RefusedParcel { refusal, key_id: Some(grant.key_id()), key_shape: None };
        let addressed = self.address_of_parcel(&grant, parcel);
        let read =
            addressed.and_then(|to| Ok((to, NatsMessageHeaders::read(parcel.headers(), &self.stream)?)));
        let ((datasource, topic), headers) = read.map_err(|refusal| {
            // Refusals by the draft are counted there; these come before it.
            self.intake.authorizer().registry().note_refusal(grant.key());
            refusing(refusal)
        })?;
        if headers.reserved > 0 {
            self.intake.metrics().count_reserved_names(Transport::Nats, headers.reserved);
        }
        let unanswered = parcel.reply(&self.reply_prefixes) == NatsReplyPolicy::Unwanted;
        let message = IncomingMessage {
            topic: &topic,
            payload: parcel.payload(),
            content_type: headers.content_type,
            properties: &headers.properties,
            flags: if unanswered { RecordFlags::AT_MOST_ONCE } else { RecordFlags::default() },
            message_id: headers.message_id,
            exchange: None,
        };
        if draft.payer() != Some(grant.key_id()) {
            draft.charge_to(&self.intake.memory_account(&grant), grant.key_id());
        }
        draft.push(&grant, Some(&datasource), message).map_err(|refusal| refusing(*refusal))
    }
}

impl Inlet for NatsIngest {
    fn lane(&self, parcel: &Parcel) -> u64 {
        match identity::grant_of_parcel(parcel, self.intake.authorizer(), self.attestation.as_ref()) {
            Ok(grant) => {
                let mut number = [0; 8];
                number[2..].copy_from_slice(&grant.key_id().0);
                u64::from_be_bytes(number).max(1)
            }
            Err(_) => STRANGERS_LANE,
        }
    }

    async fn deliver(&self, parcels: Vec<Parcel>) -> InletVerdicts {
        let mut draft = self.intake.draft(Transport::Nats, 0);
        draft.set_client(&self.client);
        let mut batch = NatsDraftBatch { draft, counts: Vec::new() };
        let due: Vec<PendingInletVerdict> =
            parcels.iter().map(|parcel| self.admit_parcel(&mut batch, parcel)).collect();
        // The draft has copies: free the originals before the wait for the disk.
        drop(parcels);
        let admitted = match batch.draft {
            draft if draft.is_empty() => None,
            draft => Some(self.intake.admit(draft).await),
        };
        let intake = self.intake.clone();
        Box::pin(async move {
            let accepted = match admitted {
                None => Ok(DurableDraft { outcomes: Vec::new() }),
                Some(Ok(admitted)) => admitted.await,
                Some(Err(refusal)) => Err(refusal),
            };
            due.into_iter().map(|due| due.settle(&accepted, &intake)).collect()
        })
    }

    fn introduction(&self, parcel: &Parcel) -> Option<BoxFuture<'static, ()>> {
        let reach = self.reach.as_ref()?;
        if parcel.reply(&self.reply_prefixes) != NatsReplyPolicy::Wanted {
            return None;
        }
        reach.look(&self.attested_sender(parcel)?)
    }

    fn memory(&self, parcel: &Parcel) -> Option<Box<dyn LaneMemory>> {
        Some(Box::new(NatsLaneMemory(self.memory_account(parcel).0.charge_held(0))))
    }

    fn overflow(&self, parcel: &Parcel, full: ParcelOverflow) -> InletVerdict {
        let (account, key_id) = self.memory_account(parcel);
        let exceeded = match full {
            ParcelOverflow::Memory { bytes } => account.charge(bytes).err(),
            ParcelOverflow::Waiting => None,
        };
        let is_memory = exceeded.is_some();
        let refusal = exceeded.map_or_else(|| self.intake.busy_refusal(), Refusal::from);
        let datasource = datasource_of_subject(parcel.subject());
        let note = refusal.note(Transport::Nats);
        self.intake.refusals().note(RefusalNote { datasource, key_id, ..note });
        if is_memory { reply::refusal_verdict(refusal) } else { self.overflow.clone() }
    }
}

impl PendingInletVerdict {
    /// The verdict on a message, given the outcome of its draft.
    fn settle(self, accepted: &Result<DurableDraft, Refusal>, intake: &Intake) -> InletVerdict {
        let (origin, place, problem, refused) = match self {
            PendingInletVerdict::Refused(verdict) => return verdict,
            PendingInletVerdict::Asked { origin, verdict } => (origin, 0, None, Some(verdict)),
            PendingInletVerdict::Admitted { origin, place } => (origin, place, None, None),
            PendingInletVerdict::Quarantined { origin, place, problem } => {
                (origin, place, Some(problem), None)
            }
        };
        let outcome = match accepted {
            Ok(accepted) => accepted.outcomes.get(origin),
            Err(refusal) => {
                intake.refusals().note(refusal.note(Transport::Nats));
                return reply::refusal_verdict(refusal.clone());
            }
        };
        let (seq, duplicate) = match outcome {
            Some(SectionOutcome::Kept(offsets)) => (offsets.nth(place), false),
            // A message with an id has an origin of its own.
            Some(SectionOutcome::Duplicate(earlier)) => (earlier.first(), true),
            // It was let in before, although it would be refused now.
            Some(SectionOutcome::Known(earlier)) => {
                return InletVerdict::Stored { seq: earlier.first(), duplicate: true };
            }
            // The key died before the write, or the id belongs to another message; intake has counted it.
            other => {
                let refusal = other.and_then(Refusal::from_outcome);
                let refusal = refusal.unwrap_or(GrantDenial::Revoked.into());
                return refused.unwrap_or_else(|| reply::refusal_verdict(refusal));
            }
        };
        match problem {
            None => InletVerdict::Stored { seq, duplicate },
            Some(problem) => reply::refusal_verdict(problem.with("offset", seq)),
        }
    }
}

/// The datasource that a subject names; empty if it is no valid id, as a sender may write anything there.
fn datasource_of_subject(subject: &str) -> &str {
    let named = SubjectSpace::Ingest.split(subject).map_or("", |(datasource, _)| datasource);
    if DatasourceId::new(named).is_ok() { named } else { "" }
}
