//! The MQTT front: 3.1, 3.1.1 and 5 over TCP, TLS and WebSocket.
//!
//! The [`Acceptor`] admits connections; the HTTP front passes WebSocket connections to it. Each
//! admitted connection is one task. The task [shakes hands](handshake), registers with its key's
//! connections and with the [sessions], and is then [served](connection): each read of the socket is
//! decoded in place and handed to intake as one draft; the next read proceeds while the log makes the
//! draft durable; the answers to one draft leave in one write.
//!
//! A permanent refusal is answered at once. A transient one is never answered: the front holds the client
//! back, then closes without an acknowledgement, so that the client sends the message again.

mod acks;
mod bridge_notice;
mod client_identity;
mod connection;
mod credentials;
mod delivery;
mod exchanges;
mod flights;
mod forwarded;
mod goodbye;
mod handshake;
mod inbound;
mod metadata_wish;
mod outbound;
mod output;
mod places;
mod reason;
mod session;
mod sessions;
mod stream;
mod subscribe;
mod websocket;
mod wills;

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
pub use headgate_format::codec;
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, warn};

use crate::config;
use crate::consume::subscriber::Subscribers;
use crate::consume::subscriber::sessions::StoredSessions;
use crate::front::connection_table::{ConnectionTable, EvictedStranger, TableEntry};
use crate::front::early_key;
use crate::front::listen_sockets::ListenSockets;
use crate::front::peer_stream::PeerStream;
use crate::front::proxied::{ProxyHeaderError, ProxyTrust, peek_proxy_header, read_proxy_header};
use crate::front::tls::Tls;
use crate::intake::Intake;
use crate::limits::{ACCEPTS_PER_TURN_MAX, TLS_HANDSHAKE_BYTES};
use crate::message::{DatasourceId, Transport};
use crate::observe::cause::Cause;
use crate::observe::refusals::RefusalNote;
use crate::processor::{FairTask, TaskPayer};
use handshake::report_refused_connection;
use places::{ConnectionPlaces, PlaceWait};
use sessions::Sessions;
use stream::{ClientStream, prepare_socket};
use websocket::WebSocket;

/// What a deadline of the handshake is exceeded by, at most.
const DEADLINE_GRACE: Duration = Duration::from_millis(100);

pub use sessions::claims::ClientClaims;
pub use sessions::standing::{SessionStanding, StandingWish};

/// The state that all connections share.
pub(super) struct MqttFront {
    intake: Intake,
    config: config::MqttConfig,
    sessions: Arc<Sessions>,
    subscribers: Arc<Subscribers>,
    drain: CancellationToken,
}

/// Admits connections of every transport, up to `mqtt.connections_max` at once.
#[derive(Clone)]
pub struct Acceptor {
    front: Arc<MqttFront>,
    places: ConnectionPlaces,
    connections: TaskTracker,
    /// The connections that have not presented a valid key yet.
    strangers: Arc<ConnectionTable>,
    proxies: Arc<ProxyTrust>,
}

impl Acceptor {
    /// An acceptor whose connections end when `drain` is cancelled. `stored` holds the sessions that
    /// `subscribers` has kept; with `claims`, all nodes of a cluster share them.
    pub fn new(
        intake: Intake,
        subscribers: Arc<Subscribers>,
        stored: StoredSessions,
        claims: Option<ClientClaims>,
        config: config::MqttConfig,
        proxies: Arc<ProxyTrust>,
        drain: CancellationToken,
    ) -> Self {
        let places = ConnectionPlaces::new(config.connections_max);
        let still_after = Duration::from_millis(config.still_ms);
        let sessions = Sessions::new(subscribers.clone(), intake.clone(), stored, claims, still_after);
        let sessions = Arc::new(sessions);
        let strangers = Arc::new(ConnectionTable::new(config.stranger_limits()));
        let front = Arc::new(MqttFront { intake, config, sessions, subscribers, drain });
        Self { front, places, connections: TaskTracker::new(), strangers, proxies }
    }

    /// The connections that have not presented a valid key yet.
    pub fn strangers(&self) -> &Arc<ConnectionTable> {
        &self.strangers
    }

    /// Where the sessions under keys of this scope stand: those of clients that come after one, at most `count`, and
    /// whether there are more.
    pub fn standings(
        &self,
        scope: &DatasourceId,
        after: Option<&str>,
        count: usize,
        wish: StandingWish,
    ) -> (Vec<SessionStanding>, bool) {
        self.front.sessions.standings(scope, after, count, wish)
    }

    /// Closes the connection of a client under keys of this scope, if this gateway has one. Its session stays.
    pub fn kick(&self, scope: &DatasourceId, client_id: &str) -> bool {
        self.front.sessions.kick(scope, client_id)
    }

    /// Enters a connection among the strangers. If there are too many, the oldest makes room, and is reported.
    fn enter_stranger(&self, peer: SocketAddr) -> Box<TableEntry> {
        let (entry, evicted) = self.strangers.enter(peer.ip());
        let entry = Box::new(entry);
        let (address, words) = match evicted {
            None => return entry,
            Some(EvictedStranger::OfAddress { address, max }) => {
                (address, format!("mqtt.strangers_per_address_max = {max}"))
            }
            Some(EvictedStranger::OfStrangers { address, max }) => {
                (address, format!("mqtt.strangers_max = {max}"))
            }
        };
        let note = RefusalNote::new(Transport::Mqtt, Cause::Strangers, &words);
        self.front.intake.refusals().note(RefusalNote { address: Some(address), ..note });
        entry
    }

    /// Reserves a place for one connection. At `mqtt.connections_max` waits a little for one; if there is none, counts a
    /// refusal and returns `None`.
    pub async fn admit(&self, peer: SocketAddr) -> Option<Admission> {
        let connect_by = self.connect_by();
        if let Some(permit) = self.places.try_take() {
            return Some(self.admit_with(permit, peer, connect_by));
        }
        let Some(wait) = self.places.begin_waiting() else {
            self.refuse(peer);
            return None;
        };
        let permit = self.wait_place(wait, peer).await?;
        Some(self.admit_with(permit, peer, connect_by))
    }

    /// When a connection that is accepted now has to have sent its CONNECT.
    fn connect_by(&self) -> Instant {
        Instant::now() + Duration::from_millis(self.front.config.connect_ms_max)
    }

    /// Waits for a place. If there is none, counts a refusal and returns `None`.
    async fn wait_place(&self, wait: PlaceWait, peer: SocketAddr) -> Option<OwnedSemaphorePermit> {
        let permit = self.front.drain.run_until_cancelled(wait.take()).await.flatten();
        if permit.is_none() {
            self.refuse(peer);
        }
        permit
    }

    fn refuse(&self, peer: SocketAddr) {
        let connections_max = self.front.config.connections_max;
        let words = format!("mqtt.connections_max = {connections_max} connections are open");
        let note = RefusalNote::new(Transport::Mqtt, Cause::ConnectionsMax, &words);
        self.front.intake.refusals().note(RefusalNote { address: Some(peer.ip()), ..note });
        debug!(%peer, connections_max, "refused a connection: there are too many");
    }

    fn admit_with(&self, permit: OwnedSemaphorePermit, peer: SocketAddr, connect_by: Instant) -> Admission {
        Admission {
            front: self.front.clone(),
            connections: self.connections.clone(),
            permit,
            stranger: self.enter_stranger(peer),
            peer,
            connect_by,
        }
    }

    /// Admits a connection that was accepted: now, or as soon as there is a place for it.
    fn admit_accepted(
        &self,
        tcp: TcpStream,
        peer: SocketAddr,
        serve: impl FnOnce(Admission, TcpStream) + Send + 'static,
    ) {
        let connect_by = self.connect_by();
        if let Some(permit) = self.places.try_take() {
            return self.admit_placed(permit, tcp, (peer, connect_by), serve);
        }
        let Some(wait) = self.places.begin_waiting() else { return self.refuse(peer) };
        let acceptor = self.clone();
        self.connections.spawn(async move {
            if let Some(permit) = acceptor.wait_place(wait, peer).await {
                acceptor.admit_placed(permit, tcp, (peer, connect_by), serve);
            }
        });
    }

    /// Admits a connection that has its place. One from a trusted proxy is nobody's until its header says whose it is.
    fn admit_placed(
        &self,
        permit: OwnedSemaphorePermit,
        mut tcp: TcpStream,
        (peer, connect_by): (SocketAddr, Instant),
        serve: impl FnOnce(Admission, TcpStream) + Send + 'static,
    ) {
        if !self.proxies.may_send_header(peer.ip()) {
            return serve(self.admit_with(permit, peer, connect_by), tcp);
        }
        let (acceptor, proxy) = (self.clone(), peer);
        self.connections.spawn(async move {
            let reading = read_proxy_header(&mut tcp, proxy, &acceptor.proxies, connect_by);
            let Some(read) = acceptor.front.drain.run_until_cancelled(reading).await else { return };
            match read {
                Ok(peer) => serve(acceptor.admit_with(permit, peer, connect_by), tcp),
                Err(error) => report_proxy_header(&acceptor.front, proxy, &error),
            }
        });
    }
}

/// Reports a connection that is closed for its PROXY protocol header.
fn report_proxy_header(front: &MqttFront, peer: SocketAddr, error: &ProxyHeaderError) {
    match error.cause() {
        Some(cause) => {
            report_refused_connection(front, peer, RefusalNote::new(Transport::Mqtt, cause, error));
        }
        None => debug!(%peer, %error, "a connection ended"),
    }
}

/// A reserved place for one connection. The connection's task holds the place until it ends, and a
/// drain waits for the task.
pub struct Admission {
    front: Arc<MqttFront>,
    connections: TaskTracker,
    permit: OwnedSemaphorePermit,
    stranger: Box<TableEntry>,
    peer: SocketAddr,
    connect_by: Instant,
}

impl Admission {
    /// Serves a WebSocket. `opened` resolves after the opening handshake, to the connection and the bytes
    /// that were read behind the handshake.
    pub fn serve_websocket(self, opened: impl Future<Output = Option<(PeerStream, Bytes)>> + Send + 'static) {
        let Self { front, connections, permit, stranger, peer, connect_by } = self;
        let payer = TaskPayer::stranger(front.intake.processor());
        // The handshake may be served in another lane, and a connection belongs to none.
        let usual = front.intake.processor().usual_runtime();
        let serving = FairTask::new(payer.clone(), async move {
            if let Ok(Some((stream, early))) = heard_by(connect_by, opened).await {
                prepare_socket(stream.tcp(), &front.config);
                let websocket = Box::new(WebSocket::new(stream, early, peer, front.clone()));
                let stream = ClientStream::WebSocket(websocket);
                connection::run(&front, stream, stranger, peer, connect_by, &payer).await;
            } else {
                debug!(%peer, "a WebSocket handshake did not complete");
            }
            drop(permit);
        });
        connections.spawn_on(serving, &usual);
    }

    fn serve_tcp(self, tcp: TcpStream) {
        let Self { front, connections, permit, stranger, peer, connect_by } = self;
        let payer = TaskPayer::stranger(front.intake.processor());
        connections.spawn(async move {
            let intake = &front.intake;
            let (authorizer, processor) = (intake.authorizer(), intake.processor());
            if !early_key::greet((&tcp, peer), &stranger, authorizer, (processor, &payer)).await {
                return;
            }
            let serving = FairTask::new(payer.clone(), async move {
                connection::run(&front, ClientStream::Tcp(tcp), stranger, peer, connect_by, &payer).await;
                drop(permit);
            });
            serving.await;
        });
    }

    fn serve_tls(self, tcp: TcpStream, tls: Arc<Tls>) {
        let Self { front, connections, permit, stranger, peer, connect_by } = self;
        let payer = TaskPayer::stranger(front.intake.processor());
        connections.spawn(FairTask::new(payer.clone(), async move {
            let shaking = Box::pin(accept_tls(&front, tls, tcp, peer, connect_by));
            if let Some(Some(stream)) = unless_evicted(&stranger, shaking).await {
                connection::run(&front, ClientStream::Tls(stream), stranger, peer, connect_by, &payer).await;
            }
            drop(permit);
        }));
    }
}

/// The output of `work`, if it is there by `deadline`. A gateway that was stopped hears of what lies in its sockets only a
/// little after that.
async fn heard_by<T>(deadline: Instant, work: impl Future<Output = T>) -> Result<T, Elapsed> {
    let mut work = pin!(work);
    match timeout_at(deadline, &mut work).await {
        Err(_) => timeout(DEADLINE_GRACE, work).await,
        done => done,
    }
}

/// The output of `work`, or `None` if the connection has to make room for others meanwhile.
async fn unless_evicted<T>(stranger: &TableEntry, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        done = work => Some(done),
        () = poll_fn(|cx| stranger.eviction().poll_due(cx)) => None,
    }
}

/// Why a client is not let in over TLS.
enum TlsAcceptError {
    Proxy(ProxyHeaderError),
    /// The handshake failed; `None` if the client just left.
    Handshake(Option<String>),
}

/// Performs the TLS handshake. Returns `None` if it fails, and counts the failure.
async fn accept_tls(
    front: &MqttFront,
    tls: Arc<Tls>,
    tcp: TcpStream,
    peer: SocketAddr,
    connect_by: Instant,
) -> Option<Box<TlsStream<TcpStream>>> {
    let account = front.intake.memory().account_of_stranger(peer.ip());
    // The handshake needs more memory than the connection: it is on the heap only while it lasts.
    let shaking = Box::pin(heard_by(connect_by, async move {
        let _memory = account.wait_for(TLS_HANDSHAKE_BYTES).await;
        if let Err(error @ ProxyHeaderError::Untrusted) = peek_proxy_header(&tcp).await {
            return Err(TlsAcceptError::Proxy(error));
        }
        tls.accept(tcp).await.map_err(|error| TlsAcceptError::Handshake(tls.handshake_fault(&error)))
    }));
    match front.drain.run_until_cancelled(shaking).await? {
        Ok(Ok(stream)) => return Some(Box::new(stream)),
        Ok(Err(TlsAcceptError::Proxy(error))) => report_proxy_header(front, peer, &error),
        Ok(Err(TlsAcceptError::Handshake(fault))) => match fault {
            Some(fault) => report_refused_connection(
                front,
                peer,
                RefusalNote::new(Transport::Mqtt, Cause::TlsHandshake, &fault),
            ),
            None => debug!(%peer, "a client left in the TLS handshake"),
        },
        Err(_) => {
            let words = "the TLS handshake was not over within mqtt.connect_ms_max";
            report_refused_connection(
                front,
                peer,
                RefusalNote::new(Transport::Mqtt, Cause::ConnectTimeout, &words),
            );
        }
    }
    None
}

/// Serves MQTT on `listener`, and over TLS if there is a TLS listener, until the acceptor's `drain` is
/// cancelled. Then every connection, including those from HTTP, sends the acknowledgements that it
/// owes. Returns when the last connection is closed.
pub async fn serve(acceptor: Acceptor, listener: ListenSockets, tls: Option<(ListenSockets, Arc<Tls>)>) {
    let Acceptor { front, connections, .. } = &acceptor;
    let keeping = tokio::spawn({
        let (sessions, drain) = (front.sessions.clone(), front.drain.clone());
        async move { sessions.run(drain).await }
    });
    let plain = accept_connections(&listener, &acceptor, Admission::serve_tcp);
    match &tls {
        None => front.drain.run_until_cancelled(plain).await,
        Some((listener, tls)) => {
            let tls = tls.clone();
            let serve = move |admission: Admission, tcp| admission.serve_tls(tcp, tls.clone());
            let encrypted = accept_connections(listener, &acceptor, serve);
            let both = async { tokio::join!(plain, encrypted).0 };
            front.drain.run_until_cancelled(both).await
        }
    };
    drop((listener, tls));
    front.sessions.drain();
    connections.close();
    connections.wait().await;
    if keeping.await.is_err() {
        error!("the session keeper panicked");
    }
    front.sessions.finish().await;
}

/// Accepts connections, for as long as it is polled.
async fn accept_connections(
    listener: &ListenSockets,
    acceptor: &Acceptor,
    serve: impl Fn(Admission, TcpStream) + Clone + Send + 'static,
) {
    let (mut warned, mut accepts) = (false, 0_u32);
    loop {
        accepts = accepts.wrapping_add(1);
        if accepts.is_multiple_of(ACCEPTS_PER_TURN_MAX) {
            acceptor.front.intake.processor().give_way().await;
        }
        let (tcp, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Mostly out of file descriptors: a retry helps only after other connections have closed.
                if !std::mem::replace(&mut warned, true) {
                    warn!(%error, "MQTT connections cannot be accepted; trying again");
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        warned = false;
        prepare_socket(&tcp, &acceptor.front.config);
        acceptor.admit_accepted(tcp, peer, serve.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::{Authorizer, Registry};
    use crate::config::Config;
    use crate::consume::subscriber::retained::RetainedStore;
    use crate::consume::subscriber::sessions::SessionStore;
    use crate::consume::subscriber::{Router, SessionEnds, ShareGroups};
    use crate::log::{EmbeddedLog, Log};
    use crate::observe::metrics::Metrics;
    use crate::shares::TenantShares;

    /// An acceptor of a gateway of its own in `dir`.
    fn acceptor(dir: &std::path::Path) -> Acceptor {
        let config = Config::default();
        let log = EmbeddedLog::open(dir, &config.log, &config.intake).expect("opens");
        let log: Arc<dyn Log> = Arc::new(log);
        let authorizer = Authorizer::new(Arc::new(Registry::open(dir).expect("opens")));
        let intake = Intake::new(authorizer, log.clone(), Arc::new(Metrics::new()), &config.intake);
        let (store, stored) = SessionStore::open(dir).expect("opens");
        let router = Router::start(&log).expect("a thread");
        let shares: Arc<TenantShares> = Arc::default();
        let subscribers = Arc::new(Subscribers {
            log: log.clone(),
            router: router.clone(),
            groups: ShareGroups::local(router, log.clone(), shares.clone()),
            store,
            session_ends: SessionEnds::default(),
            retained: RetainedStore::start(dir, log, |_| ()).expect("starts"),
            shares,
        });
        let proxies = Arc::new(ProxyTrust::new(&config));
        Acceptor::new(intake, subscribers, stored, None, config.mqtt, proxies, CancellationToken::new())
    }

    #[tokio::test]
    async fn a_websocket_that_is_opened_in_another_lane_is_served_on_the_usual_runtime() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let acceptor = acceptor(dir.path());
        let lane = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let lane = lane.expect("a thread");
        let usual = tokio::runtime::Handle::current().id();
        let (telling, told) = tokio::sync::oneshot::channel();
        let admission = acceptor.admit(([127, 0, 0, 1], 1883).into()).await.expect("there is room");
        let opening = lane.spawn(async move {
            admission.serve_websocket(async move {
                let _ = telling.send(tokio::runtime::Handle::current().id());
                None
            });
            tokio::runtime::Handle::current().id()
        });
        assert_ne!(opening.await.expect("no panic"), usual);
        assert_eq!(told.await.expect("it is polled"), usual);
        lane.shutdown_background();
    }
}
