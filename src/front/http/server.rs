//! The server: accepts connections up to a limit, speaks HTTP/1.1 or HTTP/2 on each, and ends them in a
//! drain once the requests under way are answered.
//!
//! A crowd of strangers takes nobody's place: when there are too many of them, or all places are taken, a connection
//! that is there makes room ([`ConnectionTable`]). A stranger whose answers wait unread is closed.
//!
//! How long a connection is waited for says [`RequestClock`]. A client that has shut down its half still gets its
//! answers. Dropping the future of [`run`] aborts every connection.

use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::Version;
use axum::response::Response;
use futures_util::future::{Either, ready};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::Service;
use tracing::{debug, warn};

use super::HttpFrontState;
use super::arrival::{ArrivedConnection, HttpPort, report_proxy_header};
use super::frame_meter::FrameFault;
use super::ingest::IngestRoute;
use super::lent_socket::LentSocket;
use super::long_answer::{IsLong, LongAnswerOffer, ServedConnection};
use super::presented::PresentedKeys;
use super::request_clock::{AwaitedPart, RequestClock, RequestDeadline};
use super::socket::HttpSocket;
use super::stranger_pace::StrangerPace;
use crate::auth::usage::KeyClient;
use crate::config;
use crate::front::connection_table::{ConnectionTable, EvictedStranger, TableEntry};
use crate::front::early_key;
use crate::front::listen_sockets::ListenSockets;
use crate::front::peer_stream::PeerStream;
use crate::front::proxied::{ProxyHeaderError, ProxyTrust, forwarded_address, is_forwarded_https};
use crate::limits::{ACCEPTS_PER_TURN_MAX, EARLY_REQUESTS_MAX, HTTP_HEADER_BYTES_MAX, HTTP2_STREAMS_MAX};
use crate::message::Transport;
use crate::observe::cause::Cause;
use crate::observe::refusals::{RefusalNote, Refusals};
use crate::processor::{FairTask, ProcessorTime, TaskPayer, spawn_fairly};

/// How long to wait before accepting again when the process has no file descriptor left.
const HTTP_ACCEPT_RETRY_PAUSE: Duration = Duration::from_millis(100);
/// How long a new connection waits for a place before others have to leave.
const HTTP_PLACE_PATIENCE: Duration = Duration::from_millis(500);
/// How long a connection that has to make room is waited for, before another one has to as well.
const HTTP_ROOM_WAIT: Duration = Duration::from_millis(20);
/// How long others have to leave at once after that.
const HTTP_CROWDED: Duration = Duration::from_secs(10);
/// How often an HTTP/2 client is asked whether it is still there, and how long it has to answer.
const HTTP2_PING_INTERVAL: Duration = Duration::from_secs(20);
/// What is taken of an HTTP/2 answer before it can be sent.
const HTTP2_SEND_BYTES_MAX: usize = 64 << 10;
/// What an HTTP/2 client may send of one body, and of all, before any of it is read.
const HTTP2_WINDOW_BYTES: u32 = 256 << 10;

/// The connection that a request came on: an extension of every request.
#[derive(Clone)]
pub(super) struct HttpPeer {
    /// The client: of the connection, or of the request, if a trusted proxy says whose it is.
    pub(super) addr: SocketAddr,
    /// Whether the client speaks HTTPS, to the gateway or to a trusted proxy.
    pub(super) is_https: bool,
    /// Set when the request is answered before its body was read to the end.
    pub(super) unread: Arc<AtomicBool>,
    /// The keys that the connection has presented.
    pub(super) keys: Arc<PresentedKeys>,
    /// The client, as the usage of its key records it.
    pub(super) client: Arc<KeyClient>,
    /// Its place among the connections.
    pub(super) entry: Arc<TableEntry>,
    /// How many of its requests under way have no valid key.
    pub(super) stranger_requests: Arc<AtomicUsize>,
    /// Who pays for its tasks.
    pub(super) payer: Arc<TaskPayer>,
    /// What the connection is waited for.
    pub(super) clock: RequestClock,
    /// Set when the connection was asked to close.
    pub(super) closing: Arc<AtomicBool>,
}

impl HttpPeer {
    /// As of one request: of the client that a trusted proxy names, if it is one that the connection is from.
    fn of_request<B>(&self, request: &hyper::Request<B>, proxies: &ProxyTrust, crowd: &HttpCrowd) -> Self {
        let mut peer = self.clone();
        if !proxies.is_trusted(self.addr.ip()) {
            return peer;
        }
        peer.is_https |= is_forwarded_https(request.headers());
        if let Some(address) = forwarded_address(request.headers(), proxies)
            && address != self.addr.ip()
        {
            peer.addr = SocketAddr::new(address, 0);
            peer.client = Arc::new(KeyClient::new(Transport::Http, Some(address), None));
        }
        // As long as the connection has presented no key it is the stranger's whose request came last.
        crowd.note_evicted(self.entry.move_to(peer.addr.ip()));
        peer
    }
}

impl fmt::Debug for HttpPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpPeer").field("addr", &self.addr).finish_non_exhaustive()
    }
}

/// The connections that are served, and where those are reported that had to leave.
#[derive(Clone)]
pub(super) struct HttpCrowd {
    table: Arc<ConnectionTable>,
    /// A permit for each connection that there may be.
    permits: Arc<Semaphore>,
    /// A permit for each request that may come early: see [`StrangerPace::begin`].
    early: Arc<Semaphore>,
    refusals: Option<Arc<Refusals>>,
    processor: ProcessorTime,
}

impl HttpCrowd {
    /// No connections yet.
    pub(super) fn new(config: &config::HttpConfig, refusals: Option<Arc<Refusals>>) -> Self {
        let table = Arc::new(ConnectionTable::new(config.stranger_limits()));
        Self::over(table, config.connections_max, refusals, ProcessorTime::new())
    }

    /// The connections in `table`, of which there may be so many, and which are served with shares of `processor`.
    pub(super) fn over(
        table: Arc<ConnectionTable>,
        connections_max: usize,
        refusals: Option<Arc<Refusals>>,
        processor: ProcessorTime,
    ) -> Self {
        let permits = Arc::new(Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS)));
        let early = Arc::new(Semaphore::new(EARLY_REQUESTS_MAX));
        Self { table, permits, early, refusals, processor }
    }

    /// How many connections have presented no valid key.
    pub(super) fn stranger_count(&self) -> usize {
        self.table.stranger_count()
    }

    pub(super) fn enter(&self, address: IpAddr) -> TableEntry {
        let (entry, evicted) = self.table.enter(address);
        self.note_evicted(evicted);
        entry
    }

    fn note_evicted(&self, evicted: Option<EvictedStranger>) {
        match evicted {
            None => {}
            Some(EvictedStranger::OfAddress { address, max }) => {
                self.report(address, Cause::Strangers, &format!("http.strangers_per_address_max = {max}"));
            }
            Some(EvictedStranger::OfStrangers { address, max }) => {
                self.report(address, Cause::Strangers, &format!("http.strangers_max = {max}"));
            }
        }
    }

    /// Waits for a place. When none is free for a while, connections have to leave; and as long as it is so crowded, at
    /// once.
    async fn wait_place(&self, crowded_until: &mut Instant) -> OwnedSemaphorePermit {
        let mut patience = HTTP_PLACE_PATIENCE;
        if Instant::now() < *crowded_until {
            self.table.make_room();
            patience = HTTP_ROOM_WAIT;
        }
        loop {
            let freed = self.permits.clone().acquire_owned();
            if let Ok(permit) = tokio::time::timeout(patience, freed).await {
                return permit.expect("the semaphore is never closed");
            }
            // Who is answered slowly is not waited for: another one makes room.
            self.table.make_room();
            (patience, *crowded_until) = (HTTP_ROOM_WAIT, Instant::now() + HTTP_CROWDED);
        }
    }

    pub(super) fn report(&self, address: IpAddr, cause: Cause, words: &str) {
        if let Some(refusals) = &self.refusals {
            let note = RefusalNote::new(Transport::Http, cause, &words);
            refusals.note(RefusalNote { address: Some(address), ..note });
        }
    }
}

/// What answers the requests of a listener.
#[derive(Clone)]
pub(super) struct ServedRoutes {
    pub(super) router: Router,
    /// What answers those for ingest without the router; `None` while the gateway starts.
    pub(super) front: Option<Arc<HttpFrontState>>,
}

impl ServedRoutes {
    /// Answers a request. The future is boxed: it is moved several times on its way to a task.
    fn answer(&self, request: Request) -> Pin<Box<dyn Future<Output = Response> + Send>> {
        if let Some(front) = &self.front
            && let Some(route) = IngestRoute::of(request.method(), request.uri().path())
        {
            return Box::pin(route.answer(front.clone(), request));
        }
        let answering = self.router.clone().call(request);
        Box::pin(async {
            match answering.await {
                Ok(response) => response,
                Err(never) => match never {},
            }
        })
    }
}

/// Serves `routes` on `listener` until `drain` is cancelled; returns when the requests under way at that
/// moment are answered.
pub(super) async fn run(
    listener: ListenSockets,
    port: HttpPort,
    routes: ServedRoutes,
    config: &config::HttpConfig,
    crowd: HttpCrowd,
    drain: CancellationToken,
) {
    let mut connections = JoinSet::new();
    tokio::select! {
        biased;
        () = drain.cancelled() => {}
        never = accept_on(&listener, &port, routes, config, &crowd, &drain, &mut connections) => match never {},
    }
    // From here on the kernel refuses connections, instead of accepting them and leaving them unserved.
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Accepts connections for as long as it is polled, and serves `routes` on each until `drain` is cancelled.
pub(super) async fn accept_on(
    listener: &ListenSockets,
    port: &HttpPort,
    routes: ServedRoutes,
    config: &config::HttpConfig,
    crowd: &HttpCrowd,
    drain: &CancellationToken,
    connections: &mut JoinSet<()>,
) -> Infallible {
    let server = Arc::new(ConnectionServer {
        port: port.clone(),
        routes,
        config: config.clone(),
        crowd: crowd.clone(),
        drain: drain.clone(),
    });
    let mut crowded_until = Instant::now();
    let mut accepts = 0_u32;
    loop {
        accepts = accepts.wrapping_add(1);
        if accepts.is_multiple_of(ACCEPTS_PER_TURN_MAX) {
            crowd.processor.give_way().await;
        }
        let (stream, peer) = accept(listener).await;
        let entry = (!port.is_proxied(peer)).then(|| Arc::new(crowd.enter(peer.ip())));
        let permit = match crowd.permits.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => crowd.wait_place(&mut crowded_until).await,
        };
        while connections.try_join_next().is_some() {}
        let (server, payer) = (server.clone(), TaskPayer::stranger(&crowd.processor));
        connections.spawn(async move {
            if let Some(entry) = &entry
                && !server.greet((&stream, peer), entry, &payer).await
            {
                return;
            }
            FairTask::new(payer.clone(), async move {
                let header_max = Duration::from_millis(server.config.header_ms_max);
                let until = (header_max, &server.drain);
                let arriving = Box::pin(server.port.arrive(stream, peer, entry, &server.crowd, until));
                if let Some(arrived) = arriving.await {
                    server.serve_connection(arrived, payer).await;
                }
                drop(permit);
            })
            .await;
        });
    }
}

/// The next connection; retries after any error.
async fn accept(listener: &ListenSockets) -> (TcpStream, SocketAddr) {
    let mut warned = false;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                // An answer is one small write; Nagle's algorithm would only delay it.
                if let Err(error) = stream.set_nodelay(true) {
                    debug!(%peer, %error, "TCP_NODELAY is not set");
                }
                return (stream, peer);
            }
            Err(error) if is_single_connection_error(&error) => {}
            Err(error) => {
                if !warned {
                    warn!(%error, "HTTP connections cannot be accepted; trying again");
                    warned = true;
                }
                tokio::time::sleep(HTTP_ACCEPT_RETRY_PAUSE).await;
            }
        }
    }
}

/// Whether the error concerns one connection only, which was gone before it was accepted.
fn is_single_connection_error(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Runs the requests of an HTTP/2 connection, each as a task for whom the same pays.
#[derive(Clone)]
struct RequestExecutor(Arc<TaskPayer>);

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for RequestExecutor {
    fn execute(&self, request: F) {
        spawn_fairly(&self.0, request);
    }
}

fn connection_builder(payer: Arc<TaskPayer>) -> auto::Builder<RequestExecutor> {
    let mut builder = auto::Builder::new(RequestExecutor(payer));
    builder
        .http1()
        .timer(TokioTimer::new())
        // The deadline of a header would be that of an idle connection too; `RequestDeadline` tells the two apart.
        .header_read_timeout(None)
        .half_close(true)
        .max_buf_size(HTTP_HEADER_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(HTTP2_PING_INTERVAL)
        .keep_alive_timeout(HTTP2_PING_INTERVAL)
        .max_concurrent_streams(HTTP2_STREAMS_MAX)
        .max_send_buf_size(HTTP2_SEND_BYTES_MAX)
        .initial_stream_window_size(HTTP2_WINDOW_BYTES)
        .initial_connection_window_size(HTTP2_WINDOW_BYTES)
        .max_header_list_size(u32::try_from(HTTP_HEADER_BYTES_MAX).expect("a limit of a few KiB"));
    builder
}

/// What serves the connections of one listener.
struct ConnectionServer {
    port: HttpPort,
    routes: ServedRoutes,
    config: config::HttpConfig,
    crowd: HttpCrowd,
    drain: CancellationToken,
}

impl ConnectionServer {
    /// Lets a client with a key past the strangers that stand in line. `false` if the connection has to make room.
    async fn greet(&self, from: (&TcpStream, SocketAddr), entry: &TableEntry, payer: &TaskPayer) -> bool {
        let Some(front) = self.routes.front.as_ref().filter(|_| self.port.tls.is_none()) else { return true };
        let (intake, processor) = (&front.parts.intake, &self.crowd.processor);
        early_key::greet(from, entry, intake.authorizer(), (processor, payer)).await
    }

    /// Serves one connection to its end.
    async fn serve_connection(&self, arrived: ArrivedConnection, payer: Arc<TaskPayer>) {
        let ArrivedConnection { stream, peer, entry } = arrived;
        let (unread, closing) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let fault = Arc::new(OnceLock::new());
        // Held to the end: a long answer goes on without hyper, and without what its service holds.
        let place = entry.clone();
        let eviction = place.eviction();
        let keys = Arc::new(PresentedKeys::default());
        let clock = RequestClock::start();
        let mut deadline = RequestDeadline::new(clock.clone(), &self.config);
        let (builder, paying) = (connection_builder(payer.clone()), payer.clone());
        let offer = LongAnswerOffer::default();
        let service = {
            let from = HttpPeer {
                addr: peer,
                is_https: matches!(stream, PeerStream::Tls(_)),
                unread: unread.clone(),
                keys: keys.clone(),
                client: Arc::new(KeyClient::new(Transport::Http, Some(peer.ip()), None)),
                entry,
                stranger_requests: Arc::default(),
                payer,
                clock: clock.clone(),
                closing: closing.clone(),
            };
            let (proxies, crowd, routes) =
                (self.port.proxies.clone(), self.crowd.clone(), self.routes.clone());
            // While the gateway starts, nobody can present a key.
            let is_paced = crowd.refusals.is_some() && !proxies.is_trusted(peer.ip());
            let pace = Arc::new(StrangerPace::new());
            let offer = offer.clone();
            hyper::service::service_fn(move |mut request: Request<hyper::body::Incoming>| {
                let version = request.version();
                // Behind a body the next request may have been read already.
                let takes_long = version < Version::HTTP_2 && request.body().is_end_stream();
                let offer = takes_long.then(|| offer.clone());
                let is_stranger = is_paced && from.keys.are_none();
                let begun =
                    if is_stranger { pace.begin(version, &crowd.early, Instant::now()) } else { Some(None) };
                let Some(early) = begun else {
                    return Either::Left(ready(Ok::<_, Infallible>(pace.turn_away(&crowd, &from, version))));
                };
                // Over HTTP/2 the keys of all that came at once are looked at later.
                let is_unknown = is_stranger && version == Version::HTTP_2;
                let paced = is_unknown.then(|| (pace.clone(), crowd.clone(), from.clone()));
                let under_way = from.clock.begin_request();
                let of_request = from.of_request(&request, &proxies, &crowd);
                request.extensions_mut().insert(of_request);
                let answering = routes.answer(request.map(Body::new));
                // Boxed: it is moved several times on its way to a task.
                Either::Right(Box::pin(async move {
                    let answer = answering.await;
                    drop((under_way, early));
                    match paced {
                        Some((pace, crowd, from))
                            if from.keys.are_none() && !pace.may_answer(Instant::now()) =>
                        {
                            Ok(pace.turn_away(&crowd, &from, version))
                        }
                        _ => match offer.filter(|_| answer.extensions().get::<IsLong>().is_some()) {
                            Some(offer) => offer.leave(answer, version).await,
                            None => Ok(answer),
                        },
                    }
                }))
            })
        };
        let stall_max = Duration::from_millis(self.config.body_ms_max);
        let socket = HttpSocket::new(stream, stall_max, unread, clock.clone(), paying, fault.clone());
        let socket = LentSocket::new(socket);
        let connection =
            builder.serve_connection_with_upgrades(TokioIo::new(socket.clone()), service).into_owned();
        let mut served = ServedConnection::Hyper { connection: Box::pin(connection), socket, offer };
        let mut asked_to_close = pin!(async {
            tokio::select! {
                () = self.drain.cancelled() => {}
                _ = poll_fn(|cx| keys.control().poll_closed(cx)) => {}
            }
        });
        let mut makes_room = pin!(poll_fn(|cx| eviction.poll_due(cx)));
        let (mut leaving, mut is_asked) = (false, false);
        let mut passed = pin!(poll_fn(|cx| deadline.poll_passed(cx)));
        loop {
            let is_closing = closing.load(Ordering::Relaxed);
            tokio::select! {
                biased;
                ended = poll_fn(|cx| served.poll_served(cx)) => {
                    if let Err(error) = ended {
                        debug!(%peer, error, "an HTTP connection ended");
                    }
                    if let Some(fault) = fault.get() {
                        self.report_fault(peer, *fault);
                    }
                    return;
                }
                // A stranger leaves at once, whoever has presented a key when its requests are answered.
                () = makes_room.as_mut(), if !leaving => {
                    if keys.are_none() {
                        debug!(%peer, "an HTTP connection without a key makes room for others");
                        return;
                    }
                    leaving = true;
                    clock.streams().close(false);
                    clock.await_stream_ends();
                    if !closing.swap(true, Ordering::Relaxed)
                        && let Some(connection) = served.of_hyper()
                    {
                        connection.graceful_shutdown();
                    }
                }
                // An idle connection ends at once, a busy one when its requests are answered. A stream is told to end.
                () = asked_to_close.as_mut(), if !is_asked => {
                    is_asked = true;
                    clock.streams().close(self.drain.is_cancelled());
                    clock.await_stream_ends();
                    if closing.swap(true, Ordering::Relaxed) {
                        continue;
                    }
                    if let Some(connection) = served.of_hyper() {
                            connection.graceful_shutdown();
                        }
                }
                part = passed.as_mut() => {
                    if part != AwaitedPart::NextRequest || is_closing {
                        debug!(%peer, ?part, "an HTTP connection was waited for too long");
                        return;
                    }
                    closing.store(true, Ordering::Relaxed);
                    if let Some(connection) = served.of_hyper() {
                            connection.graceful_shutdown();
                        }
                    clock.await_end();
                }
            }
        }
    }

    fn report_fault(&self, peer: SocketAddr, fault: FrameFault) {
        match fault {
            FrameFault::Flood => self.crowd.report(peer.ip(), Cause::FrameFlood, &fault.to_string()),
            FrameFault::ProxyHeader => report_proxy_header(&self.crowd, peer, &ProxyHeaderError::Untrusted),
        }
    }
}
