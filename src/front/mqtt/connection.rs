//! A connection being served: one task, one loop that reads, hands over, answers, and listens for
//! the reasons to stop.
//!
//! What an idle connection holds is a few hundred bytes: sockets are read into a buffer that the
//! threads own, and every queue is given back when it is empty.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};
use tracing::debug;

use super::Front;
use super::acks::Trains;
use super::codec::Reason;
use super::codec::write;
use super::handshake::{self, Opened};
use super::inbound::{End, Inbound, reason_of};
use crate::auth::Denied;
use crate::auth::connections::Close;
use crate::intake::{Admitted, Draft, Refusal};
use crate::limits::{MQTT_READ_BYTES, MQTT_READS_IN_FLIGHT_MAX, MQTT_UNSENT_BYTES_MAX};
use crate::message::Transport;

/// How long a client may take to read what it is told last.
const GOODBYE_MAX: Duration = Duration::from_secs(2);
/// How long a client may take to read its acknowledgements before it counts as gone.
const STUCK_MAX: Duration = Duration::from_secs(30);
/// The least and the most time between two looks at the clock.
const CLOCK_STEP_MIN: Duration = Duration::from_millis(10);
const CLOCK_STEP_MAX: Duration = Duration::from_secs(3600);

thread_local! {
    static READ_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; MQTT_READ_BYTES].into());
}

/// Serves one connection from its first byte to its last.
pub(super) async fn run(front: &Arc<Front>, mut stream: TcpStream, peer: SocketAddr) {
    // An answer waits for nothing but the disk.
    let _ = stream.set_nodelay(true);
    match handshake::shake(front, &mut stream, peer).await {
        Err(answer) => say_goodbye(&mut stream, &answer).await,
        Ok(opened) => {
            front.intake.metrics().mqtt_connections.increment(1);
            let goodbye = serve(front, &mut stream, peer, opened).await;
            front.intake.metrics().mqtt_connections.decrement(1);
            say_goodbye(&mut stream, &goodbye).await;
        }
    }
}

/// Why a connection stops being served.
enum Stop {
    /// The client ended it, or broke a rule.
    End(End),
    /// The key's death, a takeover, a shutdown.
    Close(Close),
    /// The log could not take what it brought, for too long.
    Transient(Refusal),
    /// It was silent for longer than its keep-alive allows.
    Silent,
    /// It does not read its acknowledgements.
    Stuck,
    /// The network.
    Io,
}

/// Serves an opened connection; returns the last thing to be said to the client.
async fn serve(front: &Arc<Front>, stream: &mut TcpStream, peer: SocketAddr, opened: Opened) -> Vec<u8> {
    let Opened { inbound, entered, present, silence_max, early, answer } = opened;
    let mut connection = Connection {
        front,
        stream,
        inbound,
        trains: Trains::default(),
        blocked: None,
        ended: None,
        out: answer,
        sent: 0,
        stuck_since: None,
        silence_max,
        heard_at: Instant::now(),
    };
    if !early.is_empty() {
        connection.take(&early);
    }
    drop(early);
    let stop = {
        let clock = tokio::time::sleep(connection.next_look());
        tokio::pin!(clock);
        std::future::poll_fn(|cx| connection.poll(present.control(), clock.as_mut(), cx)).await
    };
    let goodbye = connection.goodbye(&stop);
    debug!(%peer, client_id_bytes = present.client_id().len(), stop = %Told(&stop), "disconnected");
    // The client has left before it is told: a call that waits for its key's connections to be
    // gone does not wait for a client to read.
    drop((entered, present));
    goodbye
}

struct Connection<'a> {
    front: &'a Arc<Front>,
    stream: &'a mut TcpStream,
    inbound: Inbound,
    trains: Trains,
    /// A draft for which intake has no room yet; nothing is read meanwhile.
    blocked: Option<Blocked>,
    /// Nothing more is read: what is under way is finished first.
    ended: Option<End>,
    /// What is to be written, and how much of it was.
    out: Vec<u8>,
    sent: usize,
    /// Since when the client has taken none of it.
    stuck_since: Option<Instant>,
    silence_max: Option<Duration>,
    heard_at: Instant,
}

struct Blocked {
    admitting: Pin<Box<dyn Future<Output = Result<Admitted, Refusal>> + Send>>,
    train: super::acks::Train,
}

impl Connection<'_> {
    /// One turn: answers that are due, then writing, then reading.
    fn poll(
        &mut self,
        control: &crate::auth::connections::Control,
        mut clock: Pin<&mut Sleep>,
        cx: &mut Context<'_>,
    ) -> Poll<Stop> {
        loop {
            match control.poll_closed(cx) {
                // What was handed over before the shutdown is finished and acknowledged.
                Poll::Ready(Close::Drain) => {
                    self.ended.get_or_insert(End::Client);
                    if self.trains.is_empty() && self.blocked.is_none() && self.sent == self.out.len() {
                        return Poll::Ready(Stop::Close(Close::Drain));
                    }
                }
                Poll::Ready(why) => return Poll::Ready(Stop::Close(why)),
                Poll::Pending => {}
            }
            if let Some(blocked) = &mut self.blocked
                && let Poll::Ready(admitted) = blocked.admitting.as_mut().poll(cx)
            {
                let train = std::mem::take(&mut blocked.train);
                self.blocked = None;
                match admitted {
                    Ok(admitted) => self.trains.push(Some(admitted), train),
                    Err(refusal) => return Poll::Ready(Stop::Transient(refusal)),
                }
            }
            let waiting = self.trains.poll_write(self.inbound.form, &mut self.out, cx);
            if let Poll::Ready(Err(refusal)) = waiting {
                return Poll::Ready(Stop::Transient(refusal));
            }
            let written = self.poll_flush(cx);
            if let Poll::Ready(Err(_)) = written {
                return Poll::Ready(Stop::Io);
            }
            if written.is_pending() && self.stuck_since.is_none() {
                self.stuck_since = Some(Instant::now());
                clock.as_mut().reset(Instant::now() + self.next_look());
            }
            let finished = waiting.is_ready() && written.is_ready() && self.blocked.is_none();
            if self.ended.is_some() {
                if finished && let Some(end) = self.ended.take() {
                    return Poll::Ready(if control.closed() == Some(Close::Drain) {
                        Stop::Close(Close::Drain)
                    } else {
                        Stop::End(end)
                    });
                }
            } else if self.may_read() {
                match self.poll_read(cx) {
                    Poll::Ready(Ok(())) => continue,
                    Poll::Ready(Err(_)) => return Poll::Ready(Stop::Io),
                    Poll::Pending => {}
                }
            }
            ready!(clock.as_mut().poll(cx));
            if let Some(stop) = self.look_at_the_clock() {
                return Poll::Ready(stop);
            }
            let next = Instant::now() + self.next_look();
            clock.as_mut().reset(next);
        }
    }

    /// Whether another read's worth of messages is welcome. While it is not, TCP tells the client.
    fn may_read(&self) -> bool {
        self.blocked.is_none()
            && self.trains.len() < MQTT_READS_IN_FLIGHT_MAX
            && self.out.len() - self.sent < MQTT_UNSENT_BYTES_MAX
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        READ_BUFFER.with_borrow_mut(|buffer| {
            let mut read = ReadBuf::new(buffer);
            ready!(Pin::new(&mut *self.stream).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                self.ended = Some(End::Client);
            } else {
                self.take(read.filled());
            }
            Poll::Ready(Ok(()))
        })
    }

    /// Takes in what was read, and hands the messages in it to intake.
    fn take(&mut self, bytes: &[u8]) {
        let intake = &self.front.intake;
        let batch = self.inbound.take(bytes, intake, self.trains.unacknowledged(), &mut self.out);
        if batch.packets > 0 {
            self.heard_at = Instant::now();
        }
        match batch.draft.filter(|draft| !draft.is_empty()).map(|draft| intake.try_admit(draft)) {
            Some(Ok(admitted)) => self.trains.push(Some(admitted), batch.train),
            Some(Err(draft)) => {
                self.blocked = Some(Blocked { admitting: self.admit(draft), train: batch.train })
            }
            None if !batch.train.is_empty() => self.trains.push(None, batch.train),
            None => {}
        }
        self.ended = batch.end;
    }

    fn admit(&self, draft: Draft) -> Pin<Box<dyn Future<Output = Result<Admitted, Refusal>> + Send>> {
        let intake = self.front.intake.clone();
        Box::pin(async move { intake.admit(draft).await })
    }

    /// Ready when everything is written.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.out.len() {
            let n = ready!(Pin::new(&mut *self.stream).poll_write(cx, &self.out[self.sent..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += n;
            self.stuck_since = None;
        }
        if !self.out.is_empty() {
            self.sent = 0;
            self.out.clear();
            if self.trains.is_empty() {
                // An idle connection holds no buffer.
                self.out = Vec::new();
            }
        }
        Poll::Ready(Ok(()))
    }

    /// When to look at the clock again.
    fn next_look(&self) -> Duration {
        let silence =
            self.silence_max.map_or(Duration::MAX, |max| max.saturating_sub(self.heard_at.elapsed()));
        let stuck = self.stuck_since.map_or(Duration::MAX, |since| STUCK_MAX.saturating_sub(since.elapsed()));
        silence.min(stuck).clamp(CLOCK_STEP_MIN, CLOCK_STEP_MAX)
    }

    fn look_at_the_clock(&self) -> Option<Stop> {
        // A client that is held back cannot be heard.
        let silent = self.may_read() && self.silence_max.is_some_and(|max| self.heard_at.elapsed() >= max);
        let stuck = self.stuck_since.is_some_and(|since| since.elapsed() >= STUCK_MAX);
        if silent { Some(Stop::Silent) } else { stuck.then_some(Stop::Stuck) }
    }

    /// What the client is told last, and counted with.
    fn goodbye(&mut self, stop: &Stop) -> Vec<u8> {
        let metrics = self.front.intake.metrics();
        let mut out = self.out.split_off(self.sent);
        let mut say = |reason, words: &str| write::disconnect(&mut out, self.inbound.form, reason, words);
        match stop {
            Stop::End(End::Client) | Stop::Stuck | Stop::Io => {}
            Stop::End(End::Violation(violation)) => {
                metrics.refused(Transport::Mqtt, "protocol");
                say(violation.reason, violation.text);
            }
            Stop::End(End::Refused(Refusal::Denied(Denied::Revoked))) => {
                say(Reason::AdministrativeAction, "the API key is no longer valid")
            }
            Stop::End(End::Refused(refusal)) => say(reason_of(refusal), &refusal.to_string()),
            Stop::Transient(refusal) => {
                metrics.refused(Transport::Mqtt, refusal.cause());
                say(reason_of(refusal), &refusal.to_string());
            }
            Stop::Close(Close::KeyDead) => {
                say(Reason::AdministrativeAction, "the API key is no longer valid")
            }
            Stop::Close(Close::TakenOver) => say(Reason::SessionTakenOver, "the client connected again"),
            Stop::Close(Close::Drain) => say(Reason::ServerShuttingDown, "the gateway is shutting down"),
            Stop::Silent => say(Reason::KeepAliveTimeout, "nothing was heard for one and a half keep-alives"),
        }
        out
    }
}

/// A [`Stop`] for the log.
struct Told<'a>(&'a Stop);

impl std::fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Stop::End(End::Client) => f.write_str("the client left"),
            Stop::End(End::Violation(violation)) => write!(f, "{violation}"),
            Stop::End(End::Refused(refusal)) | Stop::Transient(refusal) => write!(f, "{refusal}"),
            Stop::Close(why) => write!(f, "{why:?}"),
            Stop::Silent => f.write_str("keep-alive"),
            Stop::Stuck => f.write_str("the client does not read"),
            Stop::Io => f.write_str("the network"),
        }
    }
}

/// Writes the last words and waits a moment until the client has them: closing with unread input
/// would reset the connection, and the words might never arrive.
async fn say_goodbye(stream: &mut TcpStream, words: &[u8]) {
    let said = async {
        if stream.write_all(words).await.is_err() || stream.shutdown().await.is_err() {
            return;
        }
        let mut rest = [0; 512];
        while matches!(stream.read(&mut rest).await, Ok(1..)) {}
    };
    let _ = tokio::time::timeout(GOODBYE_MAX, said).await;
}
