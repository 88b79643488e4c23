//! The ingress's own connection. It connects in the background, and again without end, to one server of the cluster
//! after the other. What it reads goes to the lanes at once: NATS does not wait for a slow subscriber but cuts it off.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::ServerAddr;
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tracing::{debug, info, warn};

use super::IngressSettings;
use super::dial::{DialedLink, LinkStream, SUBSCRIPTION_ID, dial};
use super::lanes::ParcelLanes;
use super::wire::{ServerOperation, take_operation};
use crate::connection::{NatsSettings, without_credentials};
use crate::inlet::{Inlet, InletVerdict, NatsReplyPolicy, Parcel};

/// How long a server may take to accept the gateway.
const LINK_DIAL_MAX: Duration = Duration::from_secs(2);
/// The shortest and the longest pause between two attempts.
const LINK_PAUSE_MIN: Duration = Duration::from_millis(50);
const LINK_PAUSE_MAX: Duration = Duration::from_secs(1);
/// How often the server is asked whether it is there; it counts as gone when it is silent three times.
const LINK_PING_INTERVAL: Duration = Duration::from_secs(1);
const LINK_PINGS_UNANSWERED_MAX: u64 = 3;
/// How long a server may take no bytes of what the gateway sends. Nothing else is looked at meanwhile.
const LINK_WRITE_STALL_MAX: Duration = Duration::from_secs(3);
/// What is read at a time.
const LINK_READ_BYTES: usize = 256 << 10;
/// Refusals of messages for which there is no room that wait to be sent: more senders get no answer, and try again.
const OVERFLOW_ANSWERS_MAX: usize = 1024;

/// What the ingress and its connection share.
pub(super) struct LinkShare<I> {
    pub(super) settings: IngressSettings,
    pub(super) inlet: Arc<I>,
    pub(super) state: Mutex<LinkState>,
    /// Told when there are messages, or refusals, or no more of them.
    pub(super) arrived: Notify,
    /// Told when the link is to receive no more.
    pub(super) stop: Notify,
    pub(super) trouble: Arc<Mutex<Option<String>>>,
}

/// What has arrived.
#[derive(Default)]
pub(super) struct LinkState {
    pub(super) lanes: ParcelLanes,
    /// Refusals of messages for which there was no room, and where to send them.
    pub(super) overflowed: VecDeque<(InletVerdict, String)>,
    /// The ingress is to end: no new connection is made.
    pub(super) is_stopping: bool,
    /// Nothing more will arrive.
    pub(super) is_closed: bool,
}

/// The questions to the server, and its answers.
#[derive(Default)]
struct LinkPings {
    sent: AtomicU64,
    answered: AtomicU64,
    /// How many were sent when something was heard last: any bytes show that the server is there, also if its PONG is
    /// far behind them.
    heard: AtomicU64,
    /// PONGs that the gateway owes.
    owed: AtomicU64,
    wake: Notify,
    /// How many answers end the drain; 0 while there is none.
    drained_at: AtomicU64,
}

/// Keeps the ingress connected until it is told to stop, and returns when everything is received and sent.
pub(super) async fn keep_link<I: Inlet>(
    connection: NatsSettings,
    mut servers: Vec<ServerAddr>,
    share: Arc<LinkShare<I>>,
    mut answers: mpsc::Receiver<Bytes>,
) {
    let names = connection.servers.iter().map(|address| without_credentials(address));
    let names = names.collect::<Vec<_>>().join(",");
    let configured = servers.len();
    let (mut turn, mut pause, mut is_told, mut was_there) = (0, LINK_PAUSE_MIN, false, false);
    loop {
        let server = servers[turn % servers.len()].clone();
        turn += 1;
        let dialing = timeout(LINK_DIAL_MAX, dial(&server, &connection, &share.settings));
        let dialed = tokio::select! {
            dialed = dialing => dialed.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
            () = share.stop.notified() => break,
        };
        match dialed {
            Ok(link) => {
                (pause, is_told, was_there) = (LINK_PAUSE_MIN, false, true);
                for other in &link.others {
                    let is_known =
                        |known: &ServerAddr| known.host() == other.host() && known.port() == other.port();
                    if !servers.iter().any(is_known) {
                        servers.push(other.clone());
                    }
                }
                info!(servers = names, "connected to NATS");
                *share.trouble.lock() = None;
                let ended = serve_link(link, &share, &mut answers).await;
                let (is_closed, is_stopping) = {
                    let state = share.state.lock();
                    (state.is_closed, state.is_stopping)
                };
                if is_closed {
                    return;
                }
                *share.trouble.lock() = Some(format!("NATS at {names} is away"));
                if let Err(error) = ended {
                    warn!(servers = names, %error, "NATS is away");
                }
                if is_stopping {
                    break;
                }
            }
            Err(error) => {
                // Servers that were found may be gone for good.
                servers.truncate(configured.max(1));
                let state = if was_there { "is away" } else { "cannot be reached" };
                *share.trouble.lock() =
                    Some(format!("not connected to NATS at {names}, which {state}: {error}"));
                if !std::mem::replace(&mut is_told, true) {
                    warn!(servers = names, %error, "cannot connect to NATS; trying again");
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LINK_PAUSE_MAX),
            () = share.stop.notified() => break,
        }
    }
    // NATS is away: nothing more can arrive, and no answer be sent.
    share.close();
    while answers.recv().await.is_some() {}
}

impl<I: Inlet> LinkShare<I> {
    /// Nothing more will arrive.
    fn close(&self) {
        self.state.lock().is_closed = true;
        self.arrived.notify_one();
    }

    /// Sorts a message into its lane, and begins to find out about its sender if that is unknown.
    fn sort(self: &Arc<Self>, parcel: Parcel, parcels: &mut Vec<(u64, Parcel)>) {
        let lane = self.inlet.lane(&parcel);
        if let Some(introduction) = self.inlet.introduction(&parcel) {
            self.state.lock().lanes.pause(lane);
            let share = self.clone();
            // It ends by itself, in a second or so; nothing is lost if it does not.
            tokio::spawn(async move {
                introduction.await;
                share.state.lock().lanes.resume(lane);
                share.arrived.notify_one();
            });
        }
        parcels.push((lane, parcel));
    }

    /// Takes messages into their lanes; refuses those for which there is no room.
    fn accept(&self, parcels: &mut Vec<(u64, Parcel)>) {
        if parcels.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        for (lane, parcel) in parcels.drain(..) {
            let pushed = state.lanes.push(lane, parcel, &self.settings, |parcel| self.inlet.memory(parcel));
            let Err((parcel, full)) = pushed else { continue };
            let verdict = self.inlet.overflow(&parcel, full);
            if parcel.reply(&self.settings.reply_prefixes) == NatsReplyPolicy::Wanted
                && state.overflowed.len() < OVERFLOW_ANSWERS_MAX
                && let Some(reply) = parcel.reply_subject()
            {
                let reply = reply.to_owned();
                state.overflowed.push_back((verdict, reply));
            }
        }
        drop(state);
        self.arrived.notify_one();
    }
}

/// Receives and sends until the connection ends, or the drain does.
async fn serve_link<I: Inlet>(
    link: DialedLink,
    share: &Arc<LinkShare<I>>,
    answers: &mut mpsc::Receiver<Bytes>,
) -> io::Result<()> {
    let DialedLink { stream, read, pings_sent, .. } = link;
    let (reader, writer) = tokio::io::split(stream);
    let pings = LinkPings { sent: AtomicU64::new(pings_sent), ..LinkPings::default() };
    let receiving = receive(reader, read, share, &pings);
    let sending = send(writer, share, answers, &pings);
    tokio::select! {
        ended = receiving => ended,
        ended = sending => ended,
    }
}

/// Reads operations and acts on them. Returns with an error alone.
async fn receive<I: Inlet>(
    mut reader: ReadHalf<Box<dyn LinkStream>>,
    mut read: BytesMut,
    share: &Arc<LinkShare<I>>,
    pings: &LinkPings,
) -> io::Result<()> {
    let mut parcels = Vec::new();
    loop {
        while let Some(operation) = take_operation(&mut read).map_err(io::Error::other)? {
            match operation {
                ServerOperation::Message(parcel) => share.sort(parcel, &mut parcels),
                ServerOperation::Ping => {
                    pings.owed.fetch_add(1, Ordering::Relaxed);
                    pings.wake.notify_one();
                }
                ServerOperation::Pong => {
                    let answered = pings.answered.fetch_add(1, Ordering::AcqRel) + 1;
                    let drained_at = pings.drained_at.load(Ordering::Acquire);
                    if drained_at > 0 && answered >= drained_at {
                        share.accept(&mut parcels);
                        share.close();
                    }
                }
                ServerOperation::Complaint(words) => warn!(words, "NATS"),
                ServerOperation::Info(_) | ServerOperation::Other => {}
            }
        }
        share.accept(&mut parcels);
        read.reserve(LINK_READ_BYTES);
        if reader.read_buf(&mut read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        pings.heard.store(pings.sent.load(Ordering::Acquire), Ordering::Release);
    }
}

/// Sends answers, and asks whether the server is there. Returns `Ok` when the ingress has ended and all is sent.
async fn send<I>(
    mut writer: WriteHalf<Box<dyn LinkStream>>,
    share: &LinkShare<I>,
    answers: &mut mpsc::Receiver<Bytes>,
    pings: &LinkPings,
) -> io::Result<()> {
    let mut ask = tokio::time::interval_at(Instant::now() + LINK_PING_INTERVAL, LINK_PING_INTERVAL);
    // After a stall of this task the answers have to be read first.
    ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            batch = answers.recv() => match batch {
                Some(batch) => write(&mut writer, &batch).await?,
                None => {
                    let _ = timeout(LINK_WRITE_STALL_MAX, writer.shutdown()).await;
                    return Ok(());
                }
            },
            () = pings.wake.notified() => {
                for _ in 0..pings.owed.swap(0, Ordering::Relaxed) {
                    write(&mut writer, b"PONG\r\n").await?;
                }
            }
            _ = ask.tick() => {
                let sent = pings.sent.fetch_add(1, Ordering::AcqRel);
                if sent.saturating_sub(pings.heard.load(Ordering::Acquire)) >= LINK_PINGS_UNANSWERED_MAX {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                write(&mut writer, b"PING\r\n").await?;
            }
            () = share.stop.notified() => {
                // Everything that has been sent to the gateway comes before the answer.
                let sent = pings.sent.fetch_add(1, Ordering::AcqRel) + 1;
                pings.drained_at.store(sent, Ordering::Release);
                write(&mut writer, format!("UNSUB {SUBSCRIPTION_ID}\r\nPING\r\n").as_bytes()).await?;
                debug!("the ingress receives no more");
            }
        }
    }
}

/// Sends all of it, as long as the server goes on to take some.
async fn write(writer: &mut WriteHalf<Box<dyn LinkStream>>, mut bytes: &[u8]) -> io::Result<()> {
    let stalled = |_| io::Error::from(io::ErrorKind::TimedOut);
    while !bytes.is_empty() {
        let taken = timeout(LINK_WRITE_STALL_MAX, writer.write(bytes)).await.map_err(stalled)??;
        if taken == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[taken..];
    }
    timeout(LINK_WRITE_STALL_MAX, writer.flush()).await.map_err(stalled)?
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The liveness check was not looked at while a write waited.
    #[tokio::test]
    async fn a_server_that_takes_nothing_is_left() {
        let share = LinkShare {
            settings: IngressSettings::small(),
            inlet: Arc::new(()),
            state: Mutex::new(LinkState::default()),
            arrived: Notify::new(),
            stop: Notify::new(),
            trouble: Arc::default(),
        };
        let (ours, _frozen) = tokio::io::duplex(64);
        let stream: Box<dyn LinkStream> = Box::new(ours);
        let (_reader, writer) = tokio::io::split(stream);
        let (answers, mut sending) = mpsc::channel(1);
        answers.try_send(Bytes::from(vec![b'x'; 1_000])).expect("room");
        let pings = LinkPings::default();
        let sent = timeout(Duration::from_secs(60), send(writer, &share, &mut sending, &pings)).await;
        let error = sent.expect("it is left within a minute").expect_err("nothing was taken");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
