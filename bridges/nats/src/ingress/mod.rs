//! The ingress: carries what is published to a subject to an [`Inlet`], and the answers back. It takes everything that
//! has arrived since its last turn, each sender in its turn (`lanes.rs`), and hands it over as one batch. It continues
//! while that batch is being stored, so that load makes the batches larger.
//!
//! NATS does not wait for a slow subscriber but cuts it off. So the ingress never stops receiving: a message
//! over the bounds is refused at once.
//!
//! The ingress speaks NATS itself (`wire.rs`, `link.rs`), over a connection of its own: publishers decide what is parsed
//! there. async-nats 0.51 panics on a bare carriage return in a header, and gives up the connection for a header that is
//! not UTF-8 or has no colon: whoever may publish could have everybody else's messages lost.

mod dial;
mod lanes;
mod link;
mod wire;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_nats::ServerAddr;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesOrdered, StreamExt};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tracing::debug;

use self::link::{LinkShare, LinkState, keep_link};
use crate::connection::{self, NatsError, without_credentials};
use crate::inlet::{Inlet, InletAnswerWriter, InletVerdict, InletVerdicts, Parcel};

/// How long the drain of the subscription may take, and then the last answers.
const INGRESS_DRAIN_MAX: Duration = Duration::from_secs(2);
/// Batches of answers that wait to be sent.
const ANSWER_BATCHES_MAX: usize = 64;

/// What an ingress receives, and its bounds.
#[derive(Debug, Clone)]
pub struct IngressSettings {
    /// The subject, with wildcards.
    pub subject: String,
    /// The queue group: each message goes to one of its subscribers, on however many gateways.
    pub queue: String,
    /// The stream name in the answers.
    pub stream: String,
    /// What the reply subjects begin with that are answered: `_INBOX`.
    pub reply_prefixes: Vec<String>,
    /// The most messages in one batch.
    pub batch_messages_max: usize,
    /// The most bytes in one batch; a larger message is a batch of its own.
    pub batch_bytes_max: usize,
    /// Batches that may be on their way to storage at the same time.
    pub batches_in_flight_max: usize,
    /// Messages that may wait for a batch; one more is refused as too many. One sender's share is half of the room
    /// that is left.
    pub waiting_messages_max: usize,
    /// The same, in bytes.
    pub waiting_bytes_max: usize,
}

#[cfg(test)]
impl IngressSettings {
    /// Bounds that a test can reach.
    fn small() -> Self {
        Self {
            subject: "a.>".to_owned(),
            queue: "q".to_owned(),
            stream: "s".to_owned(),
            reply_prefixes: vec!["_INBOX".to_owned()],
            batch_messages_max: 8,
            batch_bytes_max: 1 << 20,
            batches_in_flight_max: 4,
            waiting_messages_max: 100,
            waiting_bytes_max: 1 << 20,
        }
    }
}

/// The ingress of a subject.
#[derive(Debug)]
pub struct Ingress {
    connection: connection::NatsSettings,
    servers: Vec<ServerAddr>,
    settings: IngressSettings,
    trouble: Arc<Mutex<Option<String>>>,
}

impl Ingress {
    /// Checks the settings. NATS may be away.
    ///
    /// # Errors
    /// [`NatsError`] for settings that can never work.
    pub fn new(connection: connection::NatsSettings, settings: IngressSettings) -> Result<Self, NatsError> {
        let servers = connection.server_addresses()?;
        if servers.is_empty() {
            return Err(NatsError::Client("no server is named".to_owned()));
        }
        let names = connection.servers.iter().map(|address| without_credentials(address));
        let names = names.collect::<Vec<_>>().join(",");
        let trouble = Arc::new(Mutex::new(Some(format!("not connected to NATS at {names} yet"))));
        Ok(Self { connection, servers, settings, trouble })
    }

    /// What keeps NATS away, while it is away.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().clone()
    }

    /// Connects, and hands everything that is published to the subject to `inlet` until `stop` resolves. Then it
    /// receives no more, and returns once everything received is answered.
    pub async fn run<I: Inlet>(&self, inlet: Arc<I>, stop: impl Future<Output = ()>) {
        let (answers, sending) = mpsc::channel(ANSWER_BATCHES_MAX);
        let share = Arc::new(LinkShare {
            settings: self.settings.clone(),
            inlet,
            state: Mutex::new(LinkState::default()),
            arrived: Notify::new(),
            stop: Notify::new(),
            trouble: self.trouble.clone(),
        });
        // A task of its own, so that the reading goes on while a batch is checked.
        let mut link =
            tokio::spawn(keep_link(self.connection.clone(), self.servers.clone(), share.clone(), sending));
        serve(&share, answers, stop).await;
        if tokio::time::timeout(INGRESS_DRAIN_MAX, &mut link).await.is_err() {
            debug!(subject = self.settings.subject, "the last answers may not have been sent");
            link.abort();
        }
    }
}

/// Hands batches over until everything is received and answered.
async fn serve<I: Inlet>(share: &LinkShare<I>, answers: mpsc::Sender<Bytes>, stop: impl Future<Output = ()>) {
    let mut stop = std::pin::pin!(stop);
    let mut stopping = false;
    let mut close_by = std::pin::pin!(tokio::time::sleep(INGRESS_DRAIN_MAX));
    let mut work = IngressWork::new(share, answers);
    loop {
        work.begin();
        if work.is_done() && share.state.lock().is_closed && !work.has_waiting() && !work.has_overflowed() {
            return;
        }
        tokio::select! {
            biased;
            () = work.advance() => {}
            () = share.arrived.notified() => {}
            () = &mut stop, if !stopping => {
                stopping = true;
                share.state.lock().is_stopping = true;
                close_by.as_mut().reset(Instant::now() + INGRESS_DRAIN_MAX);
                share.stop.notify_one();
            }
            // The server does not answer: what has arrived is all there is.
            () = &mut close_by, if stopping && !share.state.lock().is_closed => {
                share.state.lock().is_closed = true;
            }
        }
    }
}

/// Verdicts on messages, in their order, and the reply subjects.
type AnsweredBatch = (Vec<InletVerdict>, Vec<Option<String>>);

/// The messages of a subscription on their way through the inlet, and their answers on the way back.
struct IngressWork<'a, I> {
    share: &'a LinkShare<I>,
    writer: InletAnswerWriter,
    answers: mpsc::Sender<Bytes>,
    /// The batch being handed over. There is one at a time, so that messages keep their order.
    handing: Option<BoxFuture<'a, (InletVerdicts, Vec<Option<String>>)>>,
    /// Batches being stored, with the reply subjects of their messages.
    keeping: FuturesOrdered<BoxFuture<'a, AnsweredBatch>>,
    /// Answers on their way out: a future of its own, so that a slow NATS does not stop the receiving.
    answering: Option<BoxFuture<'a, ()>>,
}

impl<'a, I: Inlet> IngressWork<'a, I> {
    fn new(share: &'a LinkShare<I>, answers: mpsc::Sender<Bytes>) -> Self {
        Self {
            share,
            writer: InletAnswerWriter::for_stream(&share.settings.stream),
            answers,
            handing: None,
            keeping: FuturesOrdered::new(),
            answering: None,
        }
    }

    /// Begins to hand over the next batch, if that has become possible.
    fn begin(&mut self) {
        let settings = &self.share.settings;
        if self.handing.is_none()
            && self.keeping.len() < settings.batches_in_flight_max
            && let Some(mut parcels) = self.take_batch()
        {
            let replies = parcels.iter_mut().map(|parcel| parcel.wanted_reply(&settings.reply_prefixes));
            let replies: Vec<Option<String>> = replies.collect();
            let inlet = &self.share.inlet;
            self.handing = Some(Box::pin(async move { (inlet.deliver(parcels).await, replies) }));
        }
    }

    fn take_batch(&self) -> Option<Vec<Parcel>> {
        self.share.state.lock().lanes.take_batch(&self.share.settings)
    }

    fn has_waiting(&self) -> bool {
        !self.share.state.lock().lanes.is_empty()
    }

    fn has_overflowed(&self) -> bool {
        !self.share.state.lock().overflowed.is_empty()
    }

    /// Begins to send the refusals of what was too many.
    fn answer_overflowed(&mut self) {
        let overflowed = std::mem::take(&mut self.share.state.lock().overflowed);
        self.answer(overflowed.into_iter().map(|(verdict, reply)| (verdict, Some(reply))).unzip());
    }

    /// Begins to send answers.
    fn answer(&mut self, (verdicts, replies): AnsweredBatch) {
        let batch = self.writer.write_all(verdicts, replies);
        if batch.is_empty() {
            return;
        }
        let answers = self.answers.clone();
        self.answering = Some(Box::pin(async move {
            // Closed only if the connection's task has ended, which outlives this unless it panics.
            let _ = answers.send(batch).await;
        }));
    }

    /// Whether everything that was taken is answered.
    fn is_done(&self) -> bool {
        self.handing.is_none() && self.keeping.is_empty() && self.answering.is_none()
    }

    /// Waits until one of the things under way is done. Cancel-safe. Never returns while nothing is.
    ///
    /// What is durable is answered first: a flood of refusals would keep back the answers to everybody else, and the
    /// room that their batches hold.
    async fn advance(&mut self) {
        tokio::select! {
            biased;
            () = or_never(&mut self.answering) => self.answering = None,
            Some(batch) = self.keeping.next(), if self.answering.is_none() && !self.keeping.is_empty() => {
                self.answer(batch);
            }
            (verdicts, replies) = or_never(&mut self.handing) => {
                self.handing = None;
                self.keeping.push_back(Box::pin(async move { (verdicts.await, replies) }));
            }
            () = std::future::ready(()), if self.answering.is_none() && self.has_overflowed() => {
                self.answer_overflowed();
            }
        }
    }
}

async fn or_never<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::inlet::{InletRefusal, ParcelOverflow};

    /// Stores every message at once.
    struct ReadyInlet;

    impl Inlet for ReadyInlet {
        fn lane(&self, _: &Parcel) -> u64 {
            1
        }

        async fn deliver(&self, parcels: Vec<Parcel>) -> InletVerdicts {
            let verdicts =
                parcels.iter().map(|_| InletVerdict::Stored { seq: 7, duplicate: false }).collect();
            Box::pin(std::future::ready(verdicts))
        }

        fn overflow(&self, _: &Parcel, _: ParcelOverflow) -> InletVerdict {
            let (text, body) = ("busy".to_owned(), b"{}".to_vec());
            InletVerdict::Refused(Box::new(InletRefusal { code: 503, text, body, retry_after: None }))
        }
    }

    #[test]
    fn refusals_that_never_end_keep_back_no_answer_to_what_is_stored() {
        let share = LinkShare {
            settings: IngressSettings::small(),
            inlet: Arc::new(ReadyInlet),
            state: Mutex::new(LinkState::default()),
            arrived: Notify::new(),
            stop: Notify::new(),
            trouble: Arc::default(),
        };
        let parcel = || Parcel::new(b"a.b", Some(b"_INBOX.1"), b"", b"x");
        assert!(share.state.lock().lanes.push(1, parcel(), &share.settings, |_| None).is_ok());
        let (answers, mut sent) = mpsc::channel(1);
        let mut work = IngressWork::new(&share, answers);
        let mut seen = String::new();
        for _ in 0..20 {
            let refusal = (share.inlet.overflow(&parcel(), ParcelOverflow::Waiting), "_INBOX.2".to_owned());
            share.state.lock().overflowed.push_back(refusal);
            work.begin();
            let _ = work.advance().now_or_never();
            while let Ok(batch) = sent.try_recv() {
                seen.push_str(&String::from_utf8_lossy(&batch));
            }
        }
        assert!(seen.contains("PUB _INBOX.1 "), "the answer to what is stored: {seen}");
        assert!(seen.contains("HPUB _INBOX.2 "), "refusals come too: {seen}");
    }
}
