//! Ingest: a batch of NATS messages becomes one draft, and what becomes of that the answers.
//!
//! NATS cannot be told to wait, so nobody is held back: what HTTP answers with 429 or 503 is answered so
//! here, and the sender comes again.

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

/// Lets messages in.
pub(super) struct Ingest {
    intake: Intake,
    /// The stream in whose name is answered.
    stream: String,
    /// Who sends them, as far as NATS says: somebody on it.
    client: Arc<Client>,
    /// Who sends those that carry no key, if a server's word for it can be trusted.
    attestation: Option<Attestation>,
}

/// What a message of a batch is due.
enum Due {
    /// It is in the draft: so many others are before it in this origin of it.
    Admitted { origin: usize, place: usize },
    /// The same, on its way into quarantine, and told so.
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

/// Messages on their way into one draft.
struct Batch {
    draft: Draft,
    /// Per origin of the draft: how many messages are in it.
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

    /// Checks one message and adds it to the draft, or reports why not.
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
            // What the draft refuses is counted there.
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
        // They are in the draft: what waits for the disk is held once.
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
    /// What a message is told, now that it is known what has become of its draft.
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
            // With an id it is alone.
            Some(Outcome::Duplicate(earlier)) => (earlier.first(), true),
            // The key died on the way; intake has counted it.
            Some(Outcome::KeyDead) | None => return reply::refused(Refusal::from(Denied::Revoked)),
        };
        match problem {
            None => Verdict::Stored { seq, duplicate },
            Some(problem) => reply::refused(problem.with("offset", seq)),
        }
    }
}

/// Where a message goes: the datasource and the topic that its subject names, if its key may publish
/// there and the sender be answered.
fn address(grant: &Grant, parcel: &Parcel) -> Result<(DatasourceId, String), Refusal> {
    let (named, tokens) = Space::Ingest.split(parcel.subject())?;
    // Before anything else is said about the subject.
    grant.allows(Scope::Ingest, named)?;
    let own = grant.datasource();
    let datasource = if own.as_str() == named { own.clone() } else { DatasourceId::new(named)? };
    if parcel.reply() == Reply::Elsewhere {
        return Err(Refusal::ReplySubject);
    }
    Ok((datasource, topic_of(tokens)?))
}

/// The datasource that a subject names, or nothing: anything else may be written there.
fn datasource_in(subject: &str) -> &str {
    let named = Space::Ingest.split(subject).map_or("", |(datasource, _)| datasource);
    if DatasourceId::new(named).is_ok() { named } else { "" }
}
