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
use futures_util::future::BoxFuture;
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

    /// Serves a new subscription until it ends.
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
        let mut work = IngressWork::new(&self.settings, client, answers, inlet);
        let mut arrived = Vec::new();
        let (mut stopping, mut open) = (false, true);
        let mut close_by = std::pin::pin!(tokio::time::sleep(INGRESS_DRAIN_MAX));
        loop {
            work.begin();
            if !open && work.is_done() {
                break;
            }
            tokio::select! {
                biased;
                () = work.advance() => {}
                goes_on = tokio::task::unconstrained(receive_arrived(&mut subscription, &mut arrived, &self.settings)),
                if open => {
                    open = goes_on;
                    arrived.drain(..).for_each(|parcel| work.accept(parcel));
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

/// Verdicts on messages, in their order, and the reply subjects.
type AnsweredBatch = (Vec<InletVerdict>, Vec<Option<Subject>>);

/// The messages of a subscription on their way through the inlet, and their answers on the way back.
struct IngressWork<'a, I> {
    settings: &'a IngressSettings,
    client: &'a Client,
    answers: &'a InletAnswerWriter,
    inlet: &'a I,
    waiting: WaitingParcels,
    /// The batch being handed over. There is one at a time, so that messages keep their order.
    handing: Option<BoxFuture<'a, (InletVerdicts, Vec<Option<Subject>>)>>,
    /// Batches being stored, with the reply subjects of their messages.
    keeping: FuturesOrdered<BoxFuture<'a, AnsweredBatch>>,
    /// Answers on their way out: a future of its own, so that a slow NATS does not stop the receiving.
    answering: Option<BoxFuture<'a, ()>>,
    /// Verdicts on messages that were too many.
    overflowed: AnsweredBatch,
}

impl<'a, I: Inlet> IngressWork<'a, I> {
    fn new(
        settings: &'a IngressSettings,
        client: &'a Client,
        answers: &'a InletAnswerWriter,
        inlet: &'a I,
    ) -> Self {
        Self {
            settings,
            client,
            answers,
            inlet,
            waiting: WaitingParcels::default(),
            handing: None,
            keeping: FuturesOrdered::new(),
            answering: None,
            overflowed: (Vec::new(), Vec::new()),
        }
    }

    /// Takes a message, or refuses it if too many wait.
    fn accept(&mut self, mut parcel: Parcel) {
        if self.waiting.has_room(&parcel, self.settings) {
            self.waiting.push(parcel);
        } else if self.overflowed.0.len() < self.settings.batch_messages_max {
            self.overflowed.0.push(self.inlet.overflow(&parcel));
            self.overflowed.1.push(parcel.take_reply());
        } else {
            // No room for a refusal either: the sender gets no answer, and tries again.
            drop(self.inlet.overflow(&parcel));
        }
    }

    /// Begins whatever has become possible: to hand over the next batch, to answer what was too many.
    fn begin(&mut self) {
        if self.handing.is_none()
            && self.keeping.len() < self.settings.batches_in_flight_max
            && let Some((parcels, replies)) = self.waiting.take_batch(self.settings)
        {
            let inlet = self.inlet;
            self.handing = Some(Box::pin(async move { (inlet.deliver(parcels).await, replies) }));
        }
        if self.answering.is_none() && !self.overflowed.0.is_empty() {
            let batch = std::mem::take(&mut self.overflowed);
            self.answering = Some(Box::pin(publish_answers(self.client, self.answers, batch)));
        }
    }

    /// Whether everything that was taken is answered.
    fn is_done(&self) -> bool {
        self.handing.is_none() && self.keeping.is_empty() && self.answering.is_none()
    }

    /// Waits until one of the things under way is done. Cancel-safe. Never returns while nothing is.
    async fn advance(&mut self) {
        tokio::select! {
            biased;
            () = or_never(&mut self.answering) => self.answering = None,
            Some(batch) = self.keeping.next(), if self.answering.is_none() && !self.keeping.is_empty() => {
                self.answering = Some(Box::pin(publish_answers(self.client, self.answers, batch)));
            }
            (verdicts, replies) = or_never(&mut self.handing) => {
                self.handing = None;
                self.keeping.push_back(Box::pin(async move { (verdicts.await, replies) }));
            }
        }
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

/// Publishes the verdicts to the senders that asked for an answer.
async fn publish_answers(client: &Client, answers: &InletAnswerWriter, (verdicts, replies): AnsweredBatch) {
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
