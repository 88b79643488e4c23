//! Answers that wait for durability: the messages of one read, and the acknowledgements that they
//! are due once the log has them.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::codec::write::{self, Form};
use super::codec::{Reason, Version};
use crate::intake::{Accepted, Admitted, Refusal};

/// One QoS 1 message's answer.
struct Ack {
    packet_id: u16,
    verdict: Verdict,
}

enum Verdict {
    /// On its way into the log, as part of this origin of the draft.
    Admitted { origin: u32 },
    /// Refused for good.
    Refused(Box<(Reason, String)>),
}

/// The answers that one read's messages are due, in the order in which they came.
#[derive(Default)]
pub(super) struct Train {
    acks: Vec<Ack>,
}

impl Train {
    /// A message went into the draft, as part of its `origin`.
    pub(super) fn admitted(&mut self, packet_id: u16, origin: usize) {
        let origin = u32::try_from(origin).unwrap_or(u32::MAX);
        self.acks.push(Ack { packet_id, verdict: Verdict::Admitted { origin } });
    }

    /// A message was refused for good.
    pub(super) fn refused(&mut self, packet_id: u16, reason: Reason, words: String) {
        self.acks.push(Ack { packet_id, verdict: Verdict::Refused(Box::new((reason, words))) });
    }

    pub(super) fn len(&self) -> usize {
        self.acks.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.acks.is_empty()
    }

    fn write(&self, accepted: Option<&Accepted>, form: Form, to: &mut Vec<u8>) {
        to.reserve(4 * self.acks.len());
        for ack in &self.acks {
            match &ack.verdict {
                Verdict::Admitted { origin } => {
                    let first = accepted.and_then(|a| a.first_offsets.get(*origin as usize));
                    match first {
                        Some(Some(_)) => write::puback(to, form, ack.packet_id, Reason::Success, None),
                        // The key died between the check and the append: nothing was kept. MQTT 3.1.1
                        // cannot say so, and says nothing: its connection closes with its key.
                        _ if form.version != Version::V5 => {}
                        _ => write::puback(to, form, ack.packet_id, Reason::NotAuthorized, None),
                    }
                }
                Verdict::Refused(refused) => {
                    write::puback(to, form, ack.packet_id, refused.0, Some(&refused.1));
                }
            }
        }
    }
}

/// The trains that wait, oldest first. Answers leave in the order in which the messages came
/// (MQTT 5 section 4.6).
#[derive(Default)]
pub(super) struct Trains {
    waiting: VecDeque<(Option<Admitted>, Train)>,
    unacknowledged: usize,
}

impl Trains {
    /// Adds a read's answers, and the draft that they wait for, if any of its messages went in.
    pub(super) fn push(&mut self, admitted: Option<Admitted>, train: Train) {
        self.unacknowledged += train.len();
        self.waiting.push_back((admitted, train));
    }

    /// How many reads wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// How many messages wait for their answer.
    pub(super) fn unacknowledged(&self) -> usize {
        self.unacknowledged
    }

    /// Writes the answers that are due to `to`. Ready when none waits any more.
    ///
    /// # Errors
    /// The transient refusal of a draft: none of its messages, and none that came after, may be
    /// answered.
    pub(super) fn poll_write(
        &mut self,
        form: Form,
        to: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Refusal>> {
        while let Some((admitted, train)) = self.waiting.front_mut() {
            let accepted = match admitted {
                Some(admitted) => Some(ready!(Pin::new(admitted).poll(cx))?),
                None => None,
            };
            train.write(accepted.as_ref(), form, to);
            self.unacknowledged -= train.len();
            self.waiting.pop_front();
        }
        if self.waiting.capacity() > 0 {
            // An idle connection holds no queue.
            self.waiting = VecDeque::new();
        }
        Poll::Ready(Ok(()))
    }
}
