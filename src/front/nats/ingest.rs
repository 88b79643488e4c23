//! Ingest: turns a batch of NATS messages into one draft, and the draft's outcome into the answers.
//!
//! A publisher on NATS cannot be held back. Where HTTP answers 429 or 503, this front does the same, and the
//! sender tries again.

use std::sync::Arc;

use headgate_bridge_nats::inlet::{Inlet, Parcel, Reply, Verdict, Verdicts};
use tracing::debug;

use super::attested::Attestation;
use super::headers::Headers;
use super::{identity, reply};
use crate::auth::shape::Shape;
use crate::auth::usage::Client;
use crate::auth::{Denied, Grant, Rejected, Scope};
use crate::front::http::problem::Problem;
use crate::intake::{Accepted, Draft, Incoming, Intake, Refusal};
use crate::log::Outcome;
use crate::message::{DatasourceId, KeyId, RecordFlags, Transport};
use crate::observe::refusals::Note;
use crate::subject::{Space, topic_of};

/// Admits the messages of NATS.
pub(super) struct Ingest {
    intake: Intake,
    /// The stream name in the answers.
    stream: String,
    /// The client on record: NATS does not tell one sender from another.
    client: Arc<Client>,
    /// How to find the sender of a message without a key, if servers attest it.
    attestation: Option<Attestation>,
}

/// What the answer to a message of a batch depends on.
enum Due {
    /// It is in the draft, at this place among the messages of this origin.
    Admitted { origin: usize, place: usize },
    /// The same, but it goes into quarantine, and the sender is told so.
    Quarantined { origin: usize, place: usize, problem: Problem },
    /// It was refused.
    Refused(Verdict),
}

/// A message that was refused, and what is known of its key.
struct Refusing {
    refusal: Refusal,
    key_id: Option<KeyId>,
    key_shape: Option<Shape>,
}

impl From<Rejected> for Refusing {
    fn from(rejected: Rejected) -> Self {
        Self { refusal: rejected.denied.into(), key_id: rejected.key_id, key_shape: rejected.shape }
    }
}

/// A draft under construction.
struct Batch {
    draft: Draft,
    /// The number of messages for each origin of the draft.
    counts: Vec<usize>,
}

impl Batch {
    /// The next place in an origin.
    fn place(&mut self, origin: usize) -> usize {
        if self.counts.len() <= origin {
            self.counts.resize(origin + 1, 0);
        }
        self.counts[origin] += 1;
        self.counts[origin] - 1
    }
}

impl Ingest {
    pub(super) fn new(intake: Intake, stream: &str, attestation: Option<Attestation>) -> Self {
        let client = Arc::new(Client::new(Transport::Nats, None, None));
        Self { intake, stream: stream.to_owned(), client, attestation }
    }

    /// Checks one message and adds it to the draft, or reports its refusal.
    fn take(&self, batch: &mut Batch, parcel: &Parcel) -> Due {
        match self.push(&mut batch.draft, parcel) {
            Ok(origin) => Due::Admitted { origin, place: batch.place(origin) },
            Err(Refusing { refusal: Refusal::Quarantined(quarantined), .. }) => {
                let origin = quarantined.origin;
                let place = batch.place(origin);
                Due::Quarantined { origin, place, problem: Refusal::Quarantined(quarantined).into() }
            }
            Err(Refusing { refusal, key_id, key_shape }) => {
                let datasource = datasource_in(parcel.subject());
                let note = refusal.note(Transport::Nats);
                let attestation = self.attestation.as_ref();
                let sender = attestation.and_then(|attestation| attestation.sender(parcel.headers()));
                let address = sender.and_then(|sender| sender.address);
                self.intake.refusals().note(Note { datasource, key_id, key_shape, address, ..note });
                debug!(
                    key_id = key_id.map(tracing::field::display),
                    cause = refusal.cause(),
                    "refused a message"
                );
                Due::Refused(reply::refused(refusal))
            }
        }
    }

    fn push(&self, draft: &mut Draft, parcel: &Parcel) -> Result<usize, Refusing> {
        let grant = identity::of(parcel, self.intake.authorizer(), self.attestation.as_ref())?;
        let refusing = |refusal| Refusing { refusal, key_id: Some(grant.key_id()), key_shape: None };
        let addressed = address(&grant, parcel);
        let read = addressed.and_then(|to| Ok((to, Headers::read(parcel.headers(), &self.stream)?)));
        let ((datasource, topic), headers) = read.map_err(|refusal| {
            // Refusals by the draft are counted there; these come before it.
            self.intake.authorizer().registry().refused(grant.key());
            refusing(refusal)
        })?;
        let unanswered = parcel.reply() == Reply::Unwanted;
        let message = Incoming {
            topic: &topic,
            payload: parcel.payload(),
            content_type: headers.content_type,
            properties: &headers.properties,
            flags: if unanswered { RecordFlags::AT_MOST_ONCE } else { RecordFlags::default() },
            message_id: headers.message_id,
            exchange: None,
        };
        draft.push(&grant, Some(&datasource), message).map_err(refusing)
    }
}

impl Inlet for Ingest {
    async fn deliver(&self, parcels: Vec<Parcel>) -> Verdicts {
        let mut draft = self.intake.draft(Transport::Nats, 0);
        draft.sent_by(&self.client);
        let mut batch = Batch { draft, counts: Vec::new() };
        let due: Vec<Due> = parcels.iter().map(|parcel| self.take(&mut batch, parcel)).collect();
        // The draft has copies: free the originals before the wait for the disk.
        drop(parcels);
        let admitted = match batch.draft {
            draft if draft.is_empty() => None,
            draft => Some(self.intake.admit(draft).await),
        };
        let intake = self.intake.clone();
        Box::pin(async move {
            let accepted = match admitted {
                None => Ok(Accepted { outcomes: Vec::new() }),
                Some(Ok(admitted)) => admitted.await,
                Some(Err(refusal)) => Err(refusal),
            };
            due.into_iter().map(|due| due.settle(&accepted, &intake)).collect()
        })
    }

    fn overflow(&self, _: &Parcel) -> Verdict {
        let refusal = self.intake.busy();
        self.intake.refusals().note(refusal.note(Transport::Nats));
        reply::refused(refusal)
    }
}

impl Due {
    /// The verdict on a message, given the outcome of its draft.
    fn settle(self, accepted: &Result<Accepted, Refusal>, intake: &Intake) -> Verdict {
        let (origin, place, problem) = match self {
            Due::Refused(verdict) => return verdict,
            Due::Admitted { origin, place } => (origin, place, None),
            Due::Quarantined { origin, place, problem } => (origin, place, Some(problem)),
        };
        let outcome = match accepted {
            Ok(accepted) => accepted.outcomes.get(origin),
            Err(refusal) => {
                intake.refusals().note(refusal.note(Transport::Nats));
                return reply::refused(refusal.clone());
            }
        };
        let (seq, duplicate) = match outcome {
            Some(Outcome::Kept(offsets)) => (offsets.nth(place), false),
            // A message with an id has an origin of its own.
            Some(Outcome::Duplicate(earlier)) => (earlier.first(), true),
            // The key died before the write; intake has counted it.
            Some(Outcome::KeyDead) | None => return reply::refused(Refusal::from(Denied::Revoked)),
        };
        match problem {
            None => Verdict::Stored { seq, duplicate },
            Some(problem) => reply::refused(problem.with("offset", seq)),
        }
    }
}

/// The datasource and the topic that a message's subject names, if its key may publish there and its reply
/// subject is acceptable.
fn address(grant: &Grant, parcel: &Parcel) -> Result<(DatasourceId, String), Refusal> {
    let (named, tokens) = Space::Ingest.split(parcel.subject())?;
    // Check the grant first: without it the sender learns nothing else about the subject.
    grant.allows(Scope::Ingest, named)?;
    let own = grant.datasource();
    let datasource = if own.as_str() == named { own.clone() } else { DatasourceId::new(named)? };
    if parcel.reply() == Reply::Elsewhere {
        return Err(Refusal::ReplySubject);
    }
    Ok((datasource, topic_of(tokens)?))
}

/// The datasource that a subject names; empty if it is no valid id, as a sender may write anything there.
fn datasource_in(subject: &str) -> &str {
    let named = Space::Ingest.split(subject).map_or("", |(datasource, _)| datasource);
    if DatasourceId::new(named).is_ok() { named } else { "" }
}
