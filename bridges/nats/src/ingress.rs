//! The ingress: carries what is published to a subject to an [`Inlet`], and the answers back. One task takes
//! everything that has arrived since its last turn and hands it over as one batch. It continues while that
//! batch is being stored, so that load makes the batches larger.
//!
//! NATS does not wait for a slow subscriber but cuts it off. So the ingress never stops receiving: a message
//! over the bounds is refused at once.
//!
//! The ingress has a connection of its own, because its publishers control what the client library parses. A
//! message with malformed headers costs the library its connection, or even its task: async-nats 0.51 panics
//! on a bare carriage return in a header. The ingress then connects again, and the rest of the gateway is not
//! affected.

use parking_lot::Mutex;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use async_nats::{Client, Subject, Subscriber};
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::connection::{self, Nats, NatsError};
use crate::inlet::{Inlet, InletAnswerWriter, InletVerdict, InletVerdicts, Parcel};

/// The pause before a new connection replaces one that the client library gave up.
const INGRESS_RECONNECT_PAUSE: Duration = Duration::from_millis(50);
/// How long the drain of the subscription may take, and then the last answers.
const INGRESS_DRAIN_MAX: Duration = Duration::from_secs(2);

/// What an ingress receives, and its bounds.
#[derive(Debug, Clone)]
pub struct IngressSettings {
    /// The subject, with wildcards.
    pub subject: String,
    /// The queue group: each message goes to one of its subscribers, on however many gateways.
    pub queue: String,
    /// The stream name in the answers.
    pub stream: String,
    /// The most messages in one batch.
    pub batch_messages_max: usize,
    /// The most bytes in one batch; a larger message is a batch of its own.
    pub batch_bytes_max: usize,
    /// Batches that may be on their way to storage at the same time.
    pub batches_in_flight_max: usize,
    /// Messages that may wait for a batch; one more is refused as too many.
    pub waiting_messages_max: usize,
    /// The same, in bytes.
    pub waiting_bytes_max: usize,
}

/// The ingress of a subject.
#[derive(Debug)]
pub struct Ingress {
    connection: connection::NatsSettings,
    settings: IngressSettings,
    nats: Mutex<Nats>,
}

/// Why a subscription ended.
#[derive(Debug, PartialEq)]
enum SubscriptionEnd {
    /// It was told to stop, and everything is answered.
    Stopped,
    /// The client library gave up the connection.
    Lost,
}

impl Ingress {
    /// Begins to connect. NATS may be away.
    ///
    /// # Errors
    /// [`NatsError`] for settings that can never work.
    pub async fn connect(
        connection: connection::NatsSettings,
        settings: IngressSettings,
    ) -> Result<Self, NatsError> {
        let nats = Mutex::new(Nats::connect(&connection).await?);
        Ok(Self { connection, settings, nats })
    }

    /// What keeps NATS away, while it is away.
    pub fn trouble(&self) -> Option<String> {
        self.nats().trouble()
    }

    fn nats(&self) -> Nats {
        self.nats.lock().clone()
    }

    /// Hands everything that is published to the subject to `inlet` until `stop` resolves. Then it receives
    /// no more, and returns once everything received is answered.
    pub async fn run(&self, inlet: &impl Inlet, stop: impl Future<Output = ()>) {
        let mut stop = std::pin::pin!(stop);
        let answers = InletAnswerWriter::for_stream(&self.settings.stream);
        loop {
            let client = self.nats().client().clone();
            if self.serve(&client, &answers, inlet, stop.as_mut()).await == SubscriptionEnd::Stopped {
                return;
            }
            warn!(subject = self.settings.subject, "the connection to NATS was lost for good: a new one");
            tokio::select! {
                () = tokio::time::sleep(INGRESS_RECONNECT_PAUSE) => {}
                () = &mut stop => return,
            }
            match Nats::connect(&self.connection).await {
                Ok(nats) => *self.nats.lock() = nats,
                Err(error) => warn!(%error, "cannot connect to NATS"),
            }
        }
    }

    async fn serve(
        &self,
        client: &Client,
        answers: &InletAnswerWriter,
        inlet: &impl Inlet,
        mut stop: Pin<&mut impl Future<Output = ()>>,
    ) -> SubscriptionEnd {
        let IngressSettings { subject, queue, .. } = &self.settings;
        let mut subscription = match client.queue_subscribe(subject.clone(), queue.clone()).await {
            Ok(subscription) => subscription,
            Err(error) => {
                warn!(subject, %error, "cannot subscribe");
                return SubscriptionEnd::Lost;
            }
        };
        let mut waiting = WaitingParcels::default();
        let mut arrived = Vec::new();
        // The batch being handed over. There is one at a time, so that messages keep their order.
        let mut handing = None;
        // Batches being stored, with the reply subjects of their messages.
        let mut keeping = FuturesOrdered::new();
        // Answers on their way out: a future of its own, so that a slow NATS does not stop the receiving.
        let mut answering = None;
        // Verdicts on messages that were too many, with their reply subjects.
        let mut overflowed = (Vec::new(), Vec::new());
        let (mut stopping, mut open) = (false, true);
        let mut close_by = std::pin::pin!(tokio::time::sleep(INGRESS_DRAIN_MAX));
        loop {
            if handing.is_none()
                && keeping.len() < self.settings.batches_in_flight_max
                && let Some((parcels, replies)) = waiting.take_batch(&self.settings)
            {
                handing = Some(Box::pin(async move { (inlet.deliver(parcels).await, replies) }));
            }
            if answering.is_none() && !overflowed.0.is_empty() {
                let (verdicts, replies) = std::mem::take(&mut overflowed);
                answering = Some(Box::pin(publish_answers(client, answers, verdicts, replies)));
            }
            if !open && handing.is_none() && keeping.is_empty() && answering.is_none() {
                break;
            }
            tokio::select! {
                biased;
                () = or_never(&mut answering) => answering = None,
                Some((verdicts, replies)) = keeping.next(), if answering.is_none() && !keeping.is_empty() => {
                    answering = Some(Box::pin(publish_answers(client, answers, verdicts, replies)));
                }
                (verdicts, replies) = or_never(&mut handing) => {
                    handing = None;
                    keeping.push_back(await_verdicts(verdicts, replies));
                }
                goes_on = tokio::task::unconstrained(receive_arrived(&mut subscription, &mut arrived, &self.settings)),
                if open => {
                    open = goes_on;
                    for mut parcel in arrived.drain(..) {
                        if waiting.has_room(&parcel, &self.settings) {
                            waiting.push(parcel);
                        } else if overflowed.0.len() < self.settings.batch_messages_max {
                            overflowed.0.push(inlet.overflow(&parcel));
                            overflowed.1.push(parcel.take_reply());
                        } else {
                            // No room for a refusal either: the sender gets no answer, and tries again.
                            drop(inlet.overflow(&parcel));
                        }
                    }
                }
                () = &mut stop, if !stopping => {
                    stopping = true;
                    close_by.as_mut().reset(Instant::now() + INGRESS_DRAIN_MAX);
                    // A drain still delivers what has arrived, and then ends the subscription. If NATS is
                    // away, neither would ever happen.
                    let ending = tokio::time::timeout(INGRESS_DRAIN_MAX, subscription.drain());
                    open = open && self.trouble().is_none() && matches!(ending.await, Ok(Ok(())));
                }
                () = &mut close_by, if stopping && open => open = false,
            }
        }
        if !stopping {
            return SubscriptionEnd::Lost;
        }
        if tokio::time::timeout(INGRESS_DRAIN_MAX, client.flush()).await.is_err() {
            debug!(subject, "the last answers may not have been sent");
        }
        SubscriptionEnd::Stopped
    }
}

/// Messages that wait for their batch, in the order of their arrival.
#[derive(Default)]
struct WaitingParcels {
    parcels: std::collections::VecDeque<Parcel>,
    bytes: usize,
}

impl WaitingParcels {
    fn has_room(&self, parcel: &Parcel, settings: &IngressSettings) -> bool {
        self.parcels.len() < settings.waiting_messages_max
            && self.bytes + parcel.weight() <= settings.waiting_bytes_max
    }

    fn push(&mut self, parcel: Parcel) {
        self.bytes += parcel.weight();
        self.parcels.push_back(parcel);
    }

    /// Takes the next batch, and the reply subjects of its messages.
    fn take_batch(&mut self, settings: &IngressSettings) -> Option<(Vec<Parcel>, Vec<Option<Subject>>)> {
        let (mut parcels, mut replies) = (Vec::new(), Vec::new());
        let mut bytes = 0;
        while let Some(parcel) = self.parcels.front()
            && parcels.len() < settings.batch_messages_max
        {
            bytes += parcel.weight();
            if bytes > settings.batch_bytes_max && !parcels.is_empty() {
                break;
            }
            let mut parcel = self.parcels.pop_front()?;
            self.bytes -= parcel.weight();
            replies.push(parcel.take_reply());
            parcels.push(parcel);
        }
        (!parcels.is_empty()).then_some((parcels, replies))
    }
}

/// Waits for a message and takes all that have arrived, at most a batch. `false`: the subscription is over.
async fn receive_arrived(
    subscription: &mut Subscriber,
    arrived: &mut Vec<Parcel>,
    settings: &IngressSettings,
) -> bool {
    std::future::poll_fn(|cx: &mut Context<'_>| {
        loop {
            match subscription.poll_next_unpin(cx) {
                Poll::Ready(Some(message)) => {
                    arrived.push(Parcel::new(message));
                    if arrived.len() >= settings.batch_messages_max {
                        return Poll::Ready(true);
                    }
                }
                Poll::Ready(None) => return Poll::Ready(false),
                Poll::Pending if arrived.is_empty() => return Poll::Pending,
                Poll::Pending => return Poll::Ready(true),
            }
        }
    })
    .await
}

async fn or_never<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn await_verdicts(
    verdicts: InletVerdicts,
    replies: Vec<Option<Subject>>,
) -> (Vec<InletVerdict>, Vec<Option<Subject>>) {
    (verdicts.await, replies)
}

/// Publishes the verdicts to the senders that asked for an answer.
async fn publish_answers(
    client: &Client,
    answers: &InletAnswerWriter,
    verdicts: Vec<InletVerdict>,
    replies: Vec<Option<Subject>>,
) {
    for (verdict, reply) in verdicts.into_iter().zip(replies) {
        let Some(reply) = reply else { continue };
        let (headers, body) = answers.write(verdict);
        let published = match headers {
            Some(headers) => client.publish_with_headers(reply, headers, body).await,
            None => client.publish(reply, body).await,
        };
        if let Err(error) = published {
            debug!(%error, "an answer was not sent");
        }
    }
}
