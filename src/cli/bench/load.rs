//! The load: connections that each keep a window of unacknowledged messages. All run on one thread, so
//! that the generator takes little of the machine that it shares with the measured gateway.
//!
//! One write per read refills a window. The clock is read once per write and once per read: a message's
//! latency runs from just before the write that held it to just after the read that held its
//! acknowledgement.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use hdrhistogram::Histogram;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinSet, LocalSet};

use super::wire::{self, PublishTemplate, ServerPacket};
use crate::cli::replay::latency_histogram;
use crate::cli::signals::Signals;

/// Connections that are being opened at once.
const BENCH_CONNECTS_AT_ONCE_MAX: usize = 64;
/// How long a connection may take to be accepted.
const BENCH_CONNECT_WAIT_MAX: Duration = Duration::from_secs(30);
/// How long to wait at the end for unacknowledged messages.
const BENCH_DRAIN_WAIT_MAX: Duration = Duration::from_secs(15);
/// Encoded bytes that a connection has not written yet, at most.
const BENCH_UNWRITTEN_BYTES_MAX: usize = 256 << 10;
/// Bytes that one read takes at most.
const BENCH_READ_BYTES: usize = 32 << 10;
/// QoS 0: unanswered fences. With two, the next batch is already on its way when a fence comes back.
const BENCH_FENCES_MAX: usize = 2;

/// The target and the shape of the load.
#[derive(Debug, Clone)]
pub(super) struct BenchPlan {
    pub(super) addr: SocketAddr,
    pub(super) protocol: u8,
    pub(super) qos: u8,
    pub(super) connections: usize,
    pub(super) window: u16,
    pub(super) payload_bytes: usize,
    pub(super) warmup: Duration,
    pub(super) measure: Duration,
}

/// The result of a load.
pub(super) struct BenchMeasurement {
    /// Messages that were acknowledged during the measurement.
    pub(super) acked: u64,
    /// How long the measurement took.
    pub(super) elapsed: Duration,
    /// Latencies of those messages (QoS 0: of their fences), in nanoseconds.
    pub(super) latency: Histogram<u64>,
    /// The window in use: the server may have asked for a smaller one.
    pub(super) window: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BenchPhase {
    Connect,
    Send,
    Stop,
}

/// What all connections share; they run on one thread.
struct BenchShared {
    plan: BenchPlan,
    key: String,
    start: Instant,
    measuring: Cell<bool>,
    acked: Cell<u64>,
    in_flight: Cell<u64>,
    window: Cell<u16>,
    latency: RefCell<Histogram<u64>>,
}

impl BenchShared {
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn record_acked(&self, messages: u64, latency_ns: u64) {
        self.in_flight.set(self.in_flight.get() - messages);
        if self.measuring.get() {
            self.acked.set(self.acked.get() + messages);
            self.latency.borrow_mut().saturating_record_n(latency_ns, messages);
        }
    }
}

/// Connects, warms up, measures, and waits for what is unacknowledged.
///
/// # Errors
/// The first connection that was refused or broke, the first message that was refused, or messages
/// that were never acknowledged.
pub(super) fn run(plan: BenchPlan, key: &str) -> anyhow::Result<BenchMeasurement> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, run_load(plan, key))
}

async fn run_load(plan: BenchPlan, key: &str) -> anyhow::Result<BenchMeasurement> {
    // Without this, a signal would end the process and leave its gateway and directory behind.
    let mut signals = Signals::listen()?;
    let (warmup, measure) = (plan.warmup, plan.measure);
    let all = u32::try_from(plan.connections).context("too many connections")?;
    let shared = Rc::new(BenchShared {
        key: key.to_owned(),
        start: Instant::now(),
        measuring: Cell::new(false),
        acked: Cell::new(0),
        in_flight: Cell::new(0),
        window: Cell::new(plan.window),
        latency: RefCell::new(latency_histogram()),
        plan,
    });
    let (phase, watch) = watch::channel(BenchPhase::Connect);
    let connected = Rc::new(Semaphore::new(0));
    let mut tasks = spawn_connections(&shared, &watch, &connected);
    let timeline = async {
        let _all = connected.acquire_many(all).await?;
        phase.send_replace(BenchPhase::Send);
        tokio::time::sleep(warmup).await;
        let begun = Instant::now();
        shared.measuring.set(true);
        tokio::time::sleep(measure).await;
        shared.measuring.set(false);
        anyhow::Ok(begun.elapsed())
    };
    let elapsed = tokio::select! {
        elapsed = timeline => elapsed?,
        error = first_failure(&mut tasks) => return Err(error),
        () = signals.asked() => bail!("interrupted"),
    };
    phase.send_replace(BenchPhase::Stop);
    let drained = tokio::time::timeout(BENCH_DRAIN_WAIT_MAX, async {
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        anyhow::Ok(())
    });
    match drained.await {
        Ok(drained) => drained?,
        Err(_) => bail!(
            "{} messages were not acknowledged {BENCH_DRAIN_WAIT_MAX:?} after the last was sent",
            shared.in_flight.get()
        ),
    }
    Ok(BenchMeasurement {
        acked: shared.acked.get(),
        elapsed,
        latency: shared.latency.replace(latency_histogram()),
        window: shared.window.get(),
    })
}

/// Spawns every connection. Each adds a permit to `connected` once it is open, and sends when the phase says
/// so.
fn spawn_connections(
    shared: &Rc<BenchShared>,
    phase: &watch::Receiver<BenchPhase>,
    connected: &Rc<Semaphore>,
) -> JoinSet<anyhow::Result<()>> {
    let connecting = Rc::new(Semaphore::new(BENCH_CONNECTS_AT_ONCE_MAX));
    let mut tasks = JoinSet::new();
    for number in 0..shared.plan.connections {
        let (shared, mut phase) = (Rc::clone(shared), phase.clone());
        let (connecting, connected) = (Rc::clone(&connecting), Rc::clone(connected));
        tasks.spawn_local(async move {
            let permit = connecting.acquire().await?;
            let opened = BenchConnection::open(number, Rc::clone(&shared));
            let opened = tokio::time::timeout(BENCH_CONNECT_WAIT_MAX, opened);
            let mut connection = opened.await.context("no answer to CONNECT")??;
            drop(permit);
            connected.add_permits(1);
            phase.wait_for(|phase| *phase != BenchPhase::Connect).await?;
            connection.run(&phase).await
        });
    }
    tasks
}

/// The error of the first connection that ends too early.
async fn first_failure(tasks: &mut JoinSet<anyhow::Result<()>>) -> anyhow::Error {
    match tasks.join_next().await {
        Some(Ok(Ok(()))) | None => anyhow::anyhow!("a connection ended early"),
        Some(Ok(Err(error))) => error,
        Some(Err(error)) => error.into(),
    }
}

/// One client's connection.
struct BenchConnection {
    shared: Rc<BenchShared>,
    stream: TcpStream,
    template: PublishTemplate,
    /// Bytes to write; the first `written` of them have been.
    out: Vec<u8>,
    written: usize,
    /// The beginning of a packet whose end has not come yet.
    partial: Vec<u8>,
    flight: BenchFlight,
}

/// The unacknowledged messages.
enum BenchFlight {
    /// QoS 1: which packet ids are free, and when each of the others was sent.
    Acks { free: Vec<u16>, sent_ns: Vec<u64> },
    /// QoS 0: when each unanswered fence was sent, behind a window of messages.
    Fences { window: u16, sent_ns: VecDeque<u64> },
}

impl BenchConnection {
    /// Connects and presents the key.
    async fn open(number: usize, shared: Rc<BenchShared>) -> anyhow::Result<Self> {
        let plan = &shared.plan;
        let stream =
            TcpStream::connect(plan.addr).await.with_context(|| format!("connecting to {}", plan.addr))?;
        stream.set_nodelay(true)?;
        let client_id = format!("bench-{}-{number}", std::process::id());
        let template = PublishTemplate::new(
            plan.protocol,
            plan.qos,
            &format!("bench/{number}"),
            &payload(plan.payload_bytes),
        );
        let mut connection = Self {
            out: wire::encode_connect(plan.protocol, &client_id, &shared.key),
            written: 0,
            partial: Vec::new(),
            flight: BenchFlight::Fences { window: plan.window, sent_ns: VecDeque::new() },
            template,
            stream,
            shared,
        };
        let window = connection.handshake().await?.min(connection.shared.plan.window);
        connection.shared.window.set(connection.shared.window.get().min(window));
        connection.flight = match connection.shared.plan.qos {
            0 => BenchFlight::Fences { window, sent_ns: VecDeque::with_capacity(BENCH_FENCES_MAX) },
            _ => BenchFlight::Acks {
                free: (1..=window).rev().collect(),
                sent_ns: vec![0; usize::from(window) + 1],
            },
        };
        Ok(connection)
    }

    async fn handshake(&mut self) -> anyhow::Result<u16> {
        let mut buffer = vec![0; BENCH_READ_BYTES];
        loop {
            self.ready().await?;
            self.write()?;
            let fresh = self.read(&mut buffer)?;
            self.partial.extend_from_slice(&buffer[..fresh]);
            if let Some(packet) = wire::first_packet(&self.partial)? {
                let window = wire::read_connack(self.shared.plan.protocol, &packet)?;
                let length = packet.length;
                self.partial.drain(..length);
                return Ok(window);
            }
        }
    }

    /// Sends until it is told to stop, and returns when everything is acknowledged.
    async fn run(&mut self, phase: &watch::Receiver<BenchPhase>) -> anyhow::Result<()> {
        let mut buffer = vec![0; BENCH_READ_BYTES];
        loop {
            if *phase.borrow() == BenchPhase::Send {
                self.fill();
            } else if self.in_flight() == 0 {
                self.out.extend_from_slice(&wire::DISCONNECT_PACKET);
                self.write()?;
                return Ok(());
            }
            self.write()?;
            self.ready().await?;
            let fresh = self.read(&mut buffer)?;
            if self.partial.is_empty() {
                self.take_packets(&buffer[..fresh])?;
            } else {
                let mut joined = std::mem::take(&mut self.partial);
                joined.extend_from_slice(&buffer[..fresh]);
                self.take_packets(&joined)?;
            }
        }
    }

    /// Waits until there is something to read, or room to write if bytes are pending.
    async fn ready(&self) -> io::Result<()> {
        let interest =
            if self.out.is_empty() { Interest::READABLE } else { Interest::READABLE | Interest::WRITABLE };
        self.stream.ready(interest).await.map(drop)
    }

    fn in_flight(&self) -> usize {
        match &self.flight {
            BenchFlight::Acks { free, sent_ns } => sent_ns.len() - 1 - free.len(),
            BenchFlight::Fences { sent_ns, .. } => sent_ns.len(),
        }
    }

    /// Encodes messages until the window is full or enough is ready to be written.
    fn fill(&mut self) {
        let now = self.shared.now();
        let mut messages = 0;
        match &mut self.flight {
            BenchFlight::Acks { free, sent_ns } => {
                while self.out.len() < BENCH_UNWRITTEN_BYTES_MAX {
                    let Some(packet_id) = free.pop() else { break };
                    self.template.put(&mut self.out, packet_id);
                    sent_ns[usize::from(packet_id)] = now;
                    messages += 1;
                }
            }
            BenchFlight::Fences { window, sent_ns } => {
                while self.out.len() < BENCH_UNWRITTEN_BYTES_MAX && sent_ns.len() < BENCH_FENCES_MAX {
                    for _ in 0..*window {
                        self.template.put(&mut self.out, 0);
                    }
                    self.out.extend_from_slice(&wire::PINGREQ_PACKET);
                    sent_ns.push_back(now);
                    messages += u64::from(*window);
                }
            }
        }
        self.shared.in_flight.set(self.shared.in_flight.get() + messages);
    }

    /// Writes as much as the socket takes.
    fn write(&mut self) -> io::Result<()> {
        while self.written < self.out.len() {
            match self.stream.try_write(&self.out[self.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.written = 0;
        Ok(())
    }

    /// Reads what is available, which may be nothing.
    fn read(&self, buffer: &mut [u8]) -> anyhow::Result<usize> {
        match self.stream.try_read(buffer) {
            Ok(0) => bail!("the gateway closed a connection"),
            Ok(count) => Ok(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Handles every whole packet in `bytes` and keeps the rest for the next read.
    fn take_packets(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let now = self.shared.now();
        let mut rest = bytes;
        while let Some(packet) = wire::first_packet(rest)? {
            rest = &rest[packet.length..];
            self.handle_server_packet(&packet, now)?;
        }
        self.partial.extend_from_slice(rest);
        Ok(())
    }

    fn handle_server_packet(&mut self, packet: &ServerPacket<'_>, now: u64) -> anyhow::Result<()> {
        match (packet.kind, packet.body, &mut self.flight) {
            (wire::PUBACK, [high, low, reason @ ..], BenchFlight::Acks { free, sent_ns }) => {
                // 0x10 means no matching subscribers: the message was still accepted.
                let code = reason.first().copied().unwrap_or(0);
                ensure!(
                    code < 0x80,
                    "a message was refused with code 0x{code:02x}{}",
                    wire::refusal_meaning(code)
                );
                let packet_id = u16::from_be_bytes([*high, *low]);
                let sent = sent_ns.get_mut(usize::from(packet_id)).map(std::mem::take).unwrap_or_default();
                ensure!(sent > 0, "the server acknowledges packet id {packet_id}, which is not in flight");
                free.push(packet_id);
                self.shared.record_acked(1, now.saturating_sub(sent));
            }
            (wire::PINGRESP, _, BenchFlight::Fences { window, sent_ns }) => {
                let sent = sent_ns.pop_front().context("the server answers a ping that was not sent")?;
                self.shared.record_acked((*window).into(), now.saturating_sub(sent));
            }
            (wire::DISCONNECT, body, _) => {
                let code = body.first().copied().unwrap_or(0);
                bail!("the server ended a connection with code 0x{code:02x}{}", wire::refusal_meaning(code))
            }
            (kind, ..) => bail!("the server sends a packet of type {} that was not asked for", kind >> 4),
        }
        Ok(())
    }
}

/// A payload of `bytes` bytes, which is JSON if that is long enough.
fn payload(bytes: usize) -> Vec<u8> {
    const HEAD: &str = r#"{"value":73.96,"text":""#;
    const TAIL: &str = r#""}"#;
    match bytes.checked_sub(HEAD.len() + TAIL.len()) {
        Some(filler) => format!("{HEAD}{}{TAIL}", "x".repeat(filler)).into_bytes(),
        None => vec![b'7'; bytes],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_has_the_size_that_was_asked_for_and_is_json_when_it_can_be() {
        for bytes in [0, 1, 24, 25, 26, 128, 4096] {
            assert_eq!(payload(bytes).len(), bytes);
        }
        for bytes in [1, 25, 128] {
            serde_json::from_slice::<serde_json::Value>(&payload(bytes)).expect("JSON");
        }
    }
}
