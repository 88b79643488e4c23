//! Sends many messages over one [`MqttClientSession`], with a window of them unacknowledged, and counts the
//! acknowledgements itself: it reports what a device would know.

use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures_util::{Stream, StreamExt};
use hdrhistogram::Histogram;
use tokio::sync::Semaphore;

use super::session::{MqttClientError, MqttClientSession, MqttClientStep, UNACKED_MESSAGES_MAX};

/// The longest latency that is recorded, in nanoseconds; longer ones count as this.
const LATENCY_NS_MAX: u64 = 60_000_000_000;
/// How long a message may wait for its acknowledgement.
const ACK_WAIT_MAX: Duration = Duration::from_secs(30);

/// What one sender has seen.
#[derive(Debug)]
pub(super) struct Tally {
    /// Messages handed to the client.
    pub(super) sent: u64,
    /// Messages acknowledged.
    pub(super) acked: u64,
    /// From the call that published a message to its acknowledgement, in nanoseconds.
    pub(super) latency: Histogram<u64>,
}

impl Default for Tally {
    fn default() -> Self {
        Self { sent: 0, acked: 0, latency: latency_histogram() }
    }
}

impl Tally {
    /// Records that `messages` were acknowledged together, `latency` after they were sent.
    pub(super) fn count_acked(&mut self, messages: u64, latency: Duration) {
        self.acked += messages;
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.latency.saturating_record_n(nanos, messages);
    }
}

/// An empty histogram of latencies in nanoseconds, three digits each.
pub(super) fn latency_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3).expect("1 ns to 60 s with 3 digits is a range")
}

/// The messages on their way: `queued` are published and not sent yet, oldest first; `in_flight` are
/// sent and not acknowledged yet, by packet id.
#[derive(Default)]
struct ReplayFlow {
    queued: VecDeque<Instant>,
    in_flight: HashMap<u16, Instant>,
    tally: Tally,
    all_published: bool,
}

impl ReplayFlow {
    fn is_done(&self) -> bool {
        self.all_published && self.queued.is_empty() && self.in_flight.is_empty()
    }

    /// Notes a step of the session. Returns how many more messages may be on their way now.
    fn note_step(&mut self, step: MqttClientStep) -> anyhow::Result<usize> {
        match step {
            MqttClientStep::Sent(packet_id) => {
                let published = self.queued.pop_front();
                let published = published.context("a message was sent that was not published")?;
                self.in_flight.insert(packet_id, published);
            }
            MqttClientStep::Acked(packet_id) => {
                let published = self.in_flight.remove(&packet_id);
                let published = published.context("an acknowledgement of a message that was not sent")?;
                self.tally.count_acked(1, published.elapsed());
                return Ok(1);
            }
            MqttClientStep::Refused(_, why) => return Err(MqttClientError::Refused(why).into()),
            MqttClientStep::Connected => return Ok(UNACKED_MESSAGES_MAX.into()),
            // Keep-alive pings bring the loop here even if the gateway sends nothing else.
            MqttClientStep::Disconnected | MqttClientStep::Other => {
                if self.oldest_since().is_some_and(|since| since.elapsed() > ACK_WAIT_MAX) {
                    bail!("a message was not acknowledged in {ACK_WAIT_MAX:?}");
                }
            }
        }
        Ok(0)
    }

    /// When the oldest unacknowledged message was published.
    fn oldest_since(&self) -> Option<Instant> {
        self.in_flight.values().chain(self.queued.front()).min().copied()
    }
}

/// Publishes every payload to `topic` as it arrives and returns when all are acknowledged. Calls
/// `acked` for each acknowledgement.
///
/// # Errors
/// The first payload that cannot be read or is refused, or the connection's end; the text says how many
/// were acknowledged until then.
pub(super) async fn replay(
    session: &mut MqttClientSession,
    topic: &str,
    payloads: impl Stream<Item = anyhow::Result<Vec<u8>>>,
    mut acked: impl FnMut(),
) -> anyhow::Result<Tally> {
    let flow = Mutex::new(ReplayFlow::default());
    let flow = || flow.lock();
    // The window opens once connected, so that connecting does not count as a message's latency.
    let window = Semaphore::new(0);
    let publisher = session.publisher();
    let publish = async {
        let mut payloads = pin!(payloads);
        while let Some(payload) = payloads.next().await {
            let payload = payload?;
            window.acquire().await?.forget();
            flow().queued.push_back(Instant::now());
            publisher.publish(topic, payload)?;
            flow().tally.sent += 1;
        }
        flow().all_published = true;
        anyhow::Ok(())
    };
    let receive = async {
        loop {
            let step = session.step().await?;
            let is_ack = matches!(step, MqttClientStep::Acked(_));
            let mut flow = flow();
            window.add_permits(flow.note_step(step)?);
            if is_ack {
                acked();
            }
            if flow.is_done() {
                return Ok(());
            }
        }
    };
    // Once all is published, receiving goes on until every message is acknowledged.
    let mut receive = pin!(receive);
    let done = tokio::select! {
        biased;
        received = &mut receive => received,
        published = publish => match published {
            Ok(()) if flow().is_done() => Ok(()),
            Ok(()) => receive.await,
            Err(error) => Err(error),
        },
    };
    let tally = std::mem::take(&mut flow().tally);
    match tally.acked {
        0 => done?,
        acked => done.with_context(|| format!("after {acked} acknowledged messages"))?,
    }
    Ok(tally)
}

/// Ends a session cleanly: sends a DISCONNECT before the connection is closed.
pub(super) async fn disconnect_session(mut session: MqttClientSession) -> anyhow::Result<()> {
    session.publisher().disconnect()?;
    let gone = async { while !matches!(session.step().await, Ok(MqttClientStep::Disconnected) | Err(_)) {} };
    // Everything is acknowledged, so that a lost DISCONNECT does no harm.
    let _ = tokio::time::timeout(ACK_WAIT_MAX, gone).await;
    Ok(())
}
